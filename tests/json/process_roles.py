"""Processes that use one JSON store at the same time.

    python -m tests.json.process_roles ROLE '{"folder": ..., "layout": ..., "settings": {}, ...}'

Each process opens the store, prints "ready", waits for a line, runs its role, and prints the result
as one line of JSON. The roles are the functions below.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, Self

from hf_async_store import JSONStorageStrategy
from hf_async_store.errors import ConcurrencyConflictError, StorageError
from hf_async_store.strategies.json import compaction
from hf_async_store.values import Key
from tests.json.support import WHOLE, Call, FileCalls, open_json

_ROOT: Final = Path(__file__).parents[2]
_PATIENCE: Final = 240.0


class Member:
    """One worker process, which has started and waits for its start signal."""

    def __init__(self, role: str, folder: Path, layout: str, **arguments: Any) -> None:
        self._command = [
            *(sys.executable, "-m", "tests.json.process_roles", role),
            json.dumps({"folder": str(folder), "layout": layout, **arguments}),
        ]
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, cwd=_ROOT, stdin=pipe, stdout=pipe
        )
        assert await self.line() == "ready"
        return self

    async def __aexit__(self, *exc: object) -> None:
        process = self.process
        if process.returncode is None:
            process.kill()
        await process.wait()

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "entered first"
        return self._process

    async def line(self) -> Any:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), _PATIENCE)
        return json.loads(line) if line else None

    def say(self, word: str = "go") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word.encode() + b"\n")

    async def result(self) -> Any:
        """The result that the process prints when it has ended."""
        found = await self.line()
        await self.process.wait()
        assert self.process.returncode == 0
        return found


async def together(*members: Member) -> list[Any]:
    """Start all workers at the same moment; returns their results."""
    async with AsyncExitStack() as stack:
        started = await asyncio.gather(*map(stack.enter_async_context, members))
        for each in started:
            each.say()
        return await asyncio.gather(*(each.result() for each in started))


# -- roles ------------------------------------------------------------------------------------


async def saver(store: JSONStorageStrategy, *, name: str, times: int) -> list[int]:
    rows = [{"machine_id": f"{name}-{number}"} for number in range(times)]
    return [await store.save_entity("machines", row) for row in rows]


async def feeder(store: JSONStorageStrategy, *, name: str, times: int) -> int:
    """Save and delete entities that all processes use, and own ones; returns the number of changes."""
    changes = 0
    for number in range(times):
        if number % 5 == 4:
            changes += await store.delete_entity("machines", f"m-{number % 3}")
        elif number % 7 == 6:
            rows = [{"machine_id": f"{name}-{number}-{each}"} for each in range(20)]
            changes += len(await store.save_entities("machines", rows))
        else:
            await store.save_entity("machines", {"machine_id": f"m-{number % 3}", "by": name})
            changes += 1
    return changes


async def counter(store: JSONStorageStrategy, *, times: int) -> int:
    """Increment by compare and set; returns the number of conflicts."""
    lost = 0
    for _ in range(times):
        while True:
            entity: dict[str, Any] = await store.get_entity("templates", "counter") or {}
            try:
                await store.update_entity(
                    "templates",
                    "counter",
                    {"max_number": entity["max_number"] + 1},
                    expected_version=entity["version"],
                )
                break
            except ConcurrencyConflictError:
                lost += 1
    return lost


async def pairs(store: JSONStorageStrategy, *, name: str, times: int) -> int:
    """Write two files in each transaction."""
    for number in range(1, times + 1):
        async with store.begin_transaction() as tx:
            await tx.save_entity("templates", {"template_id": name, "name": str(number)})
            await tx.save_entity("machines", {"machine_id": name, "name": str(number)})
    return times


async def teller(store: JSONStorageStrategy, *, name: str) -> None:
    """`pairs` in an endless loop that reports each acknowledged commit, with occasional compactions."""
    entity = await store.get_entity("templates", name) or {"version": 0}
    number = int(str(entity["version"]))
    while True:
        number += 1
        async with store.begin_transaction() as tx:
            await tx.save_entity("templates", {"template_id": name, "name": str(number)})
            await tx.save_entity("machines", {"machine_id": name, "name": str(number)})
        os.write(1, b"%d\n" % number)
        if not number % 7:
            await store.checkpoint()


async def folder(store: JSONStorageStrategy) -> int:
    """Compact repeatedly until told to stop."""
    stop = _stopped()
    folds = 0
    while not stop.done():
        await store.checkpoint()
        folds += 1
        await asyncio.sleep(0.001)
    return folds


async def watcher(store: JSONStorageStrategy, *, names: list[str], pause: float) -> dict[str, int]:
    """Read pairs until told to stop: both entities agree, and no version decreases."""
    stop = _stopped()
    keys = [Key(collection, name) for name in names for collection in ("templates", "machines")]
    highest = dict.fromkeys(names, 0)
    looks = 0
    while not stop.done():
        records = await store._fetch(keys, None)
        for number, name in enumerate(names):
            halves = [each and each.version for each in records[2 * number : 2 * number + 2]]
            assert halves[0] == halves[1], f"a transaction is visible in part: {name} {halves}"
            assert (halves[0] or 0) >= highest[name], f"{name} went back to {halves[0]}"
            highest[name] = halves[0] or 0
        looks += 1
        await asyncio.sleep(pause)
    return {"looks": looks, **highest}


async def holder(store: JSONStorageStrategy) -> str:
    """Suspend this process while it holds the write lock."""
    async with store.begin_transaction() as tx:
        await tx.save_entity("templates", {"template_id": "held"})
        print(json.dumps("holding"), flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    return "committed"


async def sleeper_in_a_fold(store: JSONStorageStrategy) -> str:
    """Suspend this process during a compaction."""

    def hook(call: Call, size: int) -> int:
        if call.name == "fdatasync" and call.path.endswith(".tmp"):
            print(json.dumps("folding"), flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        return WHOLE

    await store.save_entity("templates", {"template_id": "before"})
    with FileCalls(Path(str(store.describe()["folder"])), hook):
        await store.checkpoint()
    return "folded"


async def unsynced(store: JSONStorageStrategy) -> bool:
    """Make one commit whose sync fails, and nothing else."""
    compaction._IDLE_SECONDS = 300  # type: ignore[misc]  # it is a constant for all but this test

    def hook(call: Call, size: int) -> int:
        if call.name == "fdatasync" and ".journal." in call.path:
            raise OSError(errno.EIO, "the device says no")
        return WHOLE

    await store.save_entity("templates", {"template_id": "synced"})
    with FileCalls(Path(str(store.describe()["folder"])), hook):
        try:
            await store.save_entity("templates", {"template_id": "unsynced"})
        except StorageError as exc:
            print(json.dumps({"unknown": exc.outcome_unknown}), flush=True)
        await _stopped()
        os.kill(os.getpid(), signal.SIGKILL)
    return True


async def killed_in_a_sync(store: JSONStorageStrategy) -> bool:
    """Die while a commit is synced and another process has the write lock already."""
    locks = store._json.locks

    def hook(call: Call, size: int) -> int:
        if ".journal." in call.path and call.name == "pwrite":
            print(json.dumps("writing"), flush=True)
            while not locks.is_awaited:
                time.sleep(0.001)
        elif ".journal." in call.path and call.name == "fdatasync":
            while locks.exclusive_held:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
        return WHOLE

    await store.save_entity("templates", {"template_id": "synced"})
    with FileCalls(Path(str(store.describe()["folder"])), hook):
        await store.save_entity("templates", {"template_id": "unsynced"})
    return False


ROLES: Final[dict[str, Callable[..., Awaitable[object]]]] = {
    each.__name__: each
    for each in (
        saver,
        feeder,
        counter,
        pairs,
        teller,
        folder,
        watcher,
        holder,
        sleeper_in_a_fold,
        unsynced,
        killed_in_a_sync,
    )
}


def _stopped() -> asyncio.Future[str]:
    """Completes when another line is read from stdin."""
    return asyncio.ensure_future(asyncio.to_thread(sys.stdin.readline))


async def main(role: str, given: str) -> None:
    arguments = json.loads(given)
    folder = Path(arguments.pop("folder"))
    store = open_json(folder, arguments.pop("layout"), **arguments.pop("settings", {}))
    print(json.dumps("ready"), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    async with store:
        try:
            result = await ROLES[role](store, **arguments)
        except (StorageError, AssertionError) as exc:
            result = f"{type(exc).__name__}: {exc}"
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
