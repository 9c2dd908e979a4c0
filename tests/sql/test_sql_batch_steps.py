"""A batch of 1,000 is encoded and decided in short steps, between which the event loop runs."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store import event_loop, open_store
from hf_async_store.strategies.sql import pending, sqlite_writer
from hf_async_store.strategies.sql.pending import Encoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ENTITIES: Final = 1000
STEP: Final = 128
MACHINES: Final = [{"machine_id": f"m-{n}", "status": f"s{n}"} for n in range(ENTITIES)]


async def test_postgresql_encodes_it_in_several_iterations(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    iteration = 0
    calls: dict[str, Counter[int]] = {"pending": Counter(), "arguments": Counter()}

    async def iterate() -> None:
        nonlocal iteration
        while True:
            iteration += 1
            await asyncio.sleep(0)

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            calls[name][iteration] += 1
            return call(*args, **options)

        return counting

    async with open_store(database) as store:
        await store.save_entity("machines", MACHINES[0])
        monkeypatch.setattr(Encoder, "pending", counted("pending", Encoder.pending))
        for name in ("array_text", "hex_array_text"):
            monkeypatch.setattr(pending, name, counted("arguments", getattr(pending, name)))
        # A clock by which each step takes all the time that there is in an iteration.
        monkeypatch.setattr(event_loop, "monotonic", count().__next__)
        iterating = asyncio.create_task(iterate())
        assert len(await store.save_entities("machines", MACHINES)) == ENTITIES
        iterating.cancel()
    assert calls["pending"].total() == ENTITIES
    assert max(calls["pending"].values()) <= STEP
    assert calls["arguments"].total() > 3
    assert max(calls["arguments"].values()) == 1


async def test_the_thread_of_sqlite_lets_the_event_loop_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = 0

    def run() -> None:
        nonlocal times
        times += 1

    async with open_store(f"sqlite:{tmp_path}/store.db") as store:
        monkeypatch.setattr(sqlite_writer, "let_event_loop_run", run)
        await store.save_entities("machines", MACHINES[:STEP])
        assert times == 0
        await store.save_entities("machines", MACHINES)
    assert times == 3
