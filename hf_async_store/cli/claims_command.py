"""The command that shows and breaks claims: claims list, break."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hf_async_store.cli import output
from hf_async_store.cli.context import Context
from hf_async_store.cli.exit_codes import NOT_FOUND
from hf_async_store.errors import InvalidInputError

if TYPE_CHECKING:
    from argparse import Namespace

    from hf_async_store.driver import ClaimInfo
    from hf_async_store.strategy import StorageStrategy


def claims(arguments: Namespace) -> int:
    context = Context(arguments)
    if arguments.action == "list" and arguments.ids:
        raise InvalidInputError("`claims list` takes a collection and no ids")
    if arguments.action == "break" and not arguments.ids:
        raise InvalidInputError("`claims break` needs the ids of the entities")

    async def work(store: StorageStrategy) -> int:
        if arguments.action == "list":
            for each in await store.claims(arguments.collection):
                _show(arguments, each)
            return 0
        broken = [await store.break_claim(arguments.collection, each) for each in arguments.ids]
        missing = [each for each, was in zip(arguments.ids, broken, strict=True) if not was]
        for each in missing:
            output.log_line(f"{arguments.collection} {each!r} has no claim")
        shown = {"broken": sum(broken)}
        output.result(arguments, shown, f"{sum(broken)} of {len(broken)} claims broken")
        return NOT_FOUND if missing else 0

    return context.run(work, needs_store=True)


def _show(arguments: Namespace, claim: ClaimInfo) -> None:
    if not output.for_people(arguments):
        output.json_line(msgspec.to_builtins(claim))
        return
    state = claim.state if claim.state == "free" else f"{claim.state} for {claim.seconds:.1f} s"
    attempts = f"claimed {claim.attempts} times, last by {claim.owner}"
    output.line(f"{claim.id}: {state}, {attempts}")
