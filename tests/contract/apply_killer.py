"""Runs `apply_schema` on a store, and kills this process before one of its steps.

    python -m tests.contract.apply_killer URL STEP

A step is a call that changes a file, a statement, or a request. With step 0, the process runs to its end
and prints how many steps it took.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from hf_async_store import open_store, schema_changes
from hf_async_store.strategies.dynamodb import schema_changes as items
from hf_async_store.testing.rollout_programs import NEW
from tests.json.support import WHOLE, Call, FileCalls

URL, STEP = sys.argv[1], int(sys.argv[2])
steps = 0


def step(*ignored: object) -> int:
    del ignored
    global steps  # this program has one purpose
    steps += 1
    if steps == STEP:
        os.kill(os.getpid(), signal.SIGKILL)
    return WHOLE


def counted(owner: Any, *names: str) -> None:
    """Make each call of a method a step."""
    for name in names:
        method = getattr(owner, name)

        async def run(*args: Any, method: Any = method, **more: Any) -> Any:
            step()
            return await method(*args, **more)

        setattr(owner, name, run)


def traced(*args: Any, connect: Any = sqlite3.connect, **more: Any) -> sqlite3.Connection:
    """A connection of which each statement is a step."""
    connection: sqlite3.Connection = connect(*args, **more)
    connection.set_trace_callback(step)
    return connection


def hooked() -> AbstractContextManager[object]:
    """Count the steps of the engine of this store."""
    engine = URL.partition(":")[0]
    if engine == "json":

        def call(call: Call, size: int) -> int:
            return step(call, size)

        return FileCalls(Path(URL.partition(":")[2]).parent, call)
    if engine == "sqlite":
        sqlite3.connect = traced
    elif engine == "dynamodb":
        from hf_async_store.strategies.dynamodb.client import Client

        counted(Client, "read", "call")
    else:
        from hf_async_store.strategies.sql.postgresql import PostgreSQL

        counted(PostgreSQL, "rows", "run_unlimited", "commit", "read_committed")
    return nullcontext()


async def main() -> None:
    # So that some entities are rewritten before a step, and some after it.
    schema_changes._CHUNK_SIZE = 8  # type: ignore[misc]
    items._PAGE_SIZE = 8  # type: ignore[misc]
    async with open_store(URL, collections=NEW) as store:
        await store.apply_schema(complete=True)


with hooked():
    asyncio.run(main())
sys.stdout.write(str(steps))
