"""The longest blocking of the event loop does not grow with the size of the store."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store import JSONStorageStrategy
from tests.json.support import abandon, open_json

if TYPE_CHECKING:
    from pathlib import Path

SMALL: Final = 1_000
LARGE: Final = 100_000
BATCH: Final = 10_000
NEVER: Final = 1 << 40

ROOM: Final = 10
"""The maximum ratio of the blocking times with 100,000 and 1,000 machines; an operation that blocks
while it processes all machines has a ratio of 100."""

SHORT: Final = 0.020
"""Seconds that are always accepted, however short the blocking with 1,000 machines is."""

ATTEMPTS: Final = 10
FEW_ATTEMPTS: Final = 3
"""A busy machine only prolongs the blocking, so the shortest of several attempts is used."""

Work = Callable[[JSONStorageStrategy], Awaitable[object]]


def machines(start: int, count: int) -> list[dict[str, object]]:
    return [
        {
            "machine_id": f"i-{number:017x}",
            "name": f"node-{number}",
            "status": "RUNNING",
            "private_ip": None,
            "tags": {"owner": "somebody"},
        }
        for number in range(start, start + count)
    ]


async def make(folder: Path, size: int) -> None:
    async with open_json(folder, write_buffer_size=NEVER) as store:
        for start in range(0, size, BATCH):
            await store.create_entities("machines", machines(start, min(size - start, BATCH)))
        await store.checkpoint()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of machines, a folder with a store, to be copied."""
    folders = {size: tmp_path_factory.mktemp(f"machines-{size}") for size in (SMALL, LARGE)}
    for size, folder in folders.items():
        asyncio.run(make(folder, size))
    return folders


@pytest.fixture(autouse=True)
def _frozen() -> None:
    """Exclude objects of earlier tests from garbage collections."""
    gc.collect()
    gc.freeze()  # not undone, because that would undo it for the collected tests, too


def clock() -> float:
    """A clock in seconds that stops while this thread waits for a processor.

    A busy machine is not what is measured. Where the kernel does not report that time, it is included.
    """
    try:
        status = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text()
    except OSError:
        return time.perf_counter()
    return time.perf_counter() - int(status.split()[1]) / 1e9


async def longest_hold(work: Awaitable[object]) -> float:
    """The longest time between two event-loop iterations while `work` runs."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        last = clock()
        while True:
            await asyncio.sleep(0.001)
            now = clock()
            longest = max(longest, now - last)
            last = now

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.005)
    await work
    await asyncio.sleep(0.005)
    ticker.cancel()
    return longest


async def nothing(store: JSONStorageStrategy) -> None:
    pass


async def open_it(store: JSONStorageStrategy) -> None:
    await store.open()
    await get_one(store)


async def get_one(store: JSONStorageStrategy) -> None:
    assert await store.get_entity("machines", f"i-{0:017x}")


async def change_some(store: JSONStorageStrategy) -> None:
    await store.open()
    await store.save_entities("machines", machines(0, SMALL))


async def create_many(store: JSONStorageStrategy) -> None:
    await store.create_entities("machines", machines(LARGE, BATCH))


async def fold(store: JSONStorageStrategy) -> None:
    await store.checkpoint()


async def read_all(store: JSONStorageStrategy) -> None:
    await store.open()
    data = await store.read_file()
    for each in data["machines"].values():
        each["status"] = "CHANGED"
    WRITTEN[store] = data
    await store.count_entities("machines", {"status": "RUNNING"})


async def write_all(store: JSONStorageStrategy) -> None:
    await store.write_file(WRITTEN.pop(store))


async def change_all_elsewhere(store: JSONStorageStrategy) -> None:
    await open_it(store)
    other = open_json(store._json.files.folder, write_buffer_size=NEVER)
    await read_all(other)
    await write_all(other)
    await abandon(other)


async def stream_in_order(store: JSONStorageStrategy) -> None:
    async for each in store.stream_entities("machines", order_by="-name"):
        assert each


WRITTEN: Final[dict[JSONStorageStrategy, dict[str, dict[str, Any]]]] = {}
"""The entities to write, which are read before the measurement."""


async def hold_of(before: Work, work: Work, folder: Path, copy: Path) -> float:
    """The longest blocking by `work` on a copy of a store."""
    shutil.copytree(folder, copy)
    store = open_json(copy, write_buffer_size=NEVER)
    try:
        await before(store)
        gc.collect()
        gc.freeze()
        return await longest_hold(work(store))
    finally:
        await abandon(store)
        shutil.rmtree(copy)


@pytest.mark.hf_sampled
@pytest.mark.parametrize(
    ("before", "work"),
    [
        pytest.param(nothing, open_it, id="open"),
        pytest.param(open_it, create_many, id="batch"),
        pytest.param(change_some, fold, id="fold"),
        pytest.param(read_all, write_all, id="write_file"),
        pytest.param(change_all_elsewhere, get_one, id="follow"),
        pytest.param(open_it, stream_in_order, id="stream"),
    ],
)
async def test_the_longest_blocking_does_not_grow_with_the_store(
    before: Work, work: Work, made: dict[int, Path], tmp_path: Path
) -> None:
    async def hold(size: int) -> float:
        return await hold_of(before, work, made[size], tmp_path / "copy")

    small = min([await hold(SMALL) for _ in range(FEW_ATTEMPTS)])
    large = float("inf")
    for _ in range(ATTEMPTS):
        large = min(large, await hold(LARGE))
        if large <= max(ROOM * small, SHORT):
            return
    pytest.fail(
        f"the loop was held for {large * 1000:.0f} ms at {LARGE:,} machines, "
        f"for {small * 1000:.0f} ms at {SMALL:,}"
    )
