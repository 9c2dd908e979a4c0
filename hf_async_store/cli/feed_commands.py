"""The commands that follow changes: watch, wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_async_store.cli import output
from hf_async_store.cli.context import Context
from hf_async_store.cli.exit_codes import TIMED_OUT, sentence
from hf_async_store.cli.filter_syntax import filters_of
from hf_async_store.errors import OperationTimeoutError

if TYPE_CHECKING:
    from argparse import Namespace

    from hf_async_store.feed import EntityChange
    from hf_async_store.strategy import StorageStrategy


def watch(arguments: Namespace) -> int:
    context = Context(arguments)
    collection = context.collection()
    filters = filters_of(arguments.filters, collection)

    async def work(store: StorageStrategy) -> int:
        left: int | None = arguments.limit
        async with store.watch(collection.name, filters, since=arguments.since) as changes:
            output.log_line(f"watching {collection.name} after the token {changes.token}")
            while left is None or left > 0:
                _show(arguments, collection.name, await anext(changes))
                output.flush()  # a reader of a pipe waits for this line
                left = None if left is None else left - 1
        return 0

    return context.run(work, needs_store=True)


def _show(arguments: Namespace, collection: str, change: EntityChange) -> None:
    if output.for_people(arguments):
        output.line(f"{change.kind} {collection} {change.id}, version {change.version}")
    else:
        output.json_line(change)


def wait(arguments: Namespace) -> int:
    context = Context(arguments)
    collection = context.collection()
    filters = filters_of(arguments.filters, collection)

    async def work(store: StorageStrategy) -> int:
        timeout = context.remaining_time()
        try:
            found = await store.wait_for(collection.name, arguments.id, filters, timeout=timeout)
        except OperationTimeoutError as exc:
            output.log_line(sentence(exc))
            return TIMED_OUT
        output.value(arguments, found)
        return 0

    return context.run(work, writes=True, needs_store=True)
