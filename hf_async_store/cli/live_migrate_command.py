"""The command that migrates a store while applications use it: live-migrate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.cli import output
from hf_async_store.cli.context import declared_schema, repeatable, run_work
from hf_async_store.cli.progress import Bars
from hf_async_store.config import load_config
from hf_async_store.migration.live import LiveMigration, LiveStatus

if TYPE_CHECKING:
    from argparse import Namespace

_SENTENCES: Final = {
    None: "there is no live migration; {} is active",
    "COPYING": "changes of the source are copied to the target; {} is active",
    "CUTTING_OVER": "switching to the target; {} is active",
    "SWITCHED": "{} is active; `rollback` switches back, `finalize` decommissions the source",
    "ROLLING_BACK": "switching back to the source; {} is active",
    "FINALIZED": "finalized; {} is active, and the source refuses to open",
}


def live_migrate(arguments: Namespace) -> int:
    sides = [load_config(each) for each in (arguments.source, arguments.target)]
    schema = declared_schema(arguments, *sides)

    async def work() -> LiveStatus:
        with Bars({}) as bars:
            live = LiveMigration(
                *sides,
                collections=schema.values(),
                rate=arguments.rate,
                advance=bars.advance,
            )
            async with live:
                if arguments.action == "status":
                    return await live.status()
                with repeatable(f"run `live-migrate {arguments.action}` again to complete it"):
                    if arguments.action == "start":
                        return await live.start(cut_over=not arguments.no_cut_over)
                    status: LiveStatus = await getattr(live, arguments.action)()
                    return status

    status = run_work(arguments, work())
    sentence = _SENTENCES[status.phase].format(status.authoritative)
    waiting = sum(status.waiting)
    if waiting:
        sentence += f" ({waiting:,} changes are still to be copied)"
    output.result(arguments, msgspec.to_builtins(status), sentence)
    return 0
