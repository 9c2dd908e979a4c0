"""A migration in a separate process, which a test kills.

    python mover.py SOURCE TARGET FOLDER migrate|resume [KILL_AT [BEFORE]]

It kills itself (SIGKILL) when KILL_AT batches are written; with BEFORE, while it writes the next one,
half of which is then in the target without being in the checkpoint.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from support import opened, settings

from hf_async_store import Entity, MigrationTool
from hf_async_store.migration import copier
from hf_async_store.migration.merge import Merged, MergeRule, put
from hf_async_store.repository import RepositoryInterface

BATCH = 20


async def main(source: str, target: str, folder: str, what: str, *kill: str) -> None:
    at = int(kill[0]) if kill else -1
    in_the_middle = len(kill) > 1
    written = 0

    async def counted(
        store: RepositoryInterface,
        collection: str,
        entities: Sequence[Entity],
        rule: MergeRule | None,
        *,
        sizes: Sequence[int] | None,
        waiting: list[Entity] | None,
    ) -> Merged:
        nonlocal written
        if written >= at and in_the_middle:
            await put(store, collection, entities[: len(entities) // 2], rule)
            os.kill(os.getpid(), signal.SIGKILL)
        done = await put(store, collection, entities, rule, sizes=sizes, waiting=waiting)
        written += 1
        return done

    async def checkpointed(copy: copier.CollectionCopier, batch: copier.MigrationBatch) -> None:
        await finish(copy, batch)
        if written >= at >= 0 and not in_the_middle:
            os.kill(os.getpid(), signal.SIGKILL)

    finish = copier.CollectionCopier._save_progress
    copier.put = counted  # type: ignore[attr-defined]
    copier.CollectionCopier._save_progress = checkpointed  # type: ignore[method-assign]
    config = settings(folder, batch_size=BATCH, create_backup=False, parallel_workers=2)  # type: ignore[arg-type]
    async with opened(source) as one, opened(target) as other:
        tool = MigrationTool(one, other, config)
        report = await (tool.resume() if what == "resume" else tool.migrate())
    print(sum(each.written for each in report.collections.values()))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
