"""The command that moves a store while applications use it: move."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from hf_async_store.cli import output
from hf_async_store.cli.context import collections_of, warnings_told
from hf_async_store.cli.progress import Bars
from hf_async_store.migration.live import LiveMigration, LiveStatus
from hf_async_store.repository import operation_timeout

if TYPE_CHECKING:
    from argparse import Namespace

_SAID = {
    None: "there is no move; {} counts",
    "copying": "copied so far and followed; {} counts",
    "cut_over": "amid the cut-over; {} counts",
    "flipped": "{} counts; `back` leads back, `finish` gives the source up",
    "cut_back": "amid going back; {} counts",
    "moved": "finished; {} counts, and the source refuses to open",
}


def move(arguments: Namespace) -> int:
    schema = tuple(collections_of(arguments.collections))

    async def work() -> LiveStatus:
        with Bars({}) as bars:
            live = LiveMigration(
                arguments.source,
                arguments.target,
                collections=schema,
                rate=arguments.rate,
                advance=bars.advance,
            )
            async with operation_timeout(arguments.timeout), live:
                return await _act(live, arguments)

    with warnings_told(verbose=arguments.verbose):
        status = asyncio.run(work())
    sentence = _SAID[status.phase].format(status.authoritative)
    waiting = sum(status.waiting)
    if waiting:
        sentence += f" ({waiting:,} changes are not brought over yet)"
    output.result(arguments, msgspec.to_builtins(status), sentence)
    return 0


async def _act(live: LiveMigration, arguments: Namespace) -> LiveStatus:
    action: str = arguments.action
    if action == "start":
        return await live.start(cut_over=not arguments.no_cut_over)
    if action == "back":
        return await live.rollback()
    if action == "stop":
        return await live.abort()
    return await live.finalize() if action == "finish" else await live.status()
