"""Cases 121 and 136: how streams are left, and how a process ends that forgot to close its store."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Final

import pytest

from hf_async_store.errors import PoolTimeoutError, StoreClosedError
from hf_async_store.testing.assertions import get_existing, nothing_is_left, payload
from hf_async_store.testing.cancellation import usable
from hf_async_store.testing.concurrency import HANG_SECONDS, answer_of, is_shared

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness

_ROWS: Final = 300
_READERS: Final = 12
_NESTED: Final = 24
"""More tasks than any pool has connections by default, fewer than there may be streams."""

_SLOW_SECONDS: Final = 3 * HANG_SECONDS
"""For what takes many round trips: what is not done by then never will be."""

_KEPT: list[object] = []
"""Streams that somebody still refers to when the store closes."""


async def _break(store: StorageStrategy) -> None:
    async for _row in store.stream_entities("items"):
        break  # as anybody writes it


async def _raise(store: StorageStrategy) -> None:
    with suppress(ZeroDivisionError):
        async for _row in store.stream_entities("items"):
            raise ZeroDivisionError


async def _close(store: StorageStrategy) -> None:
    async with aclosing(store.stream_entities("items")) as rows:
        await anext(rows)


async def _drop(store: StorageStrategy) -> None:
    rows = store.stream_entities("items")
    await anext(rows)
    del rows


async def _keep(store: StorageStrategy) -> None:
    rows = store.stream_entities("items")
    await anext(rows)
    _KEPT.append(rows)


async def _be_cancelled_in_the_body(store: StorageStrategy) -> None:
    async for _row in store.stream_entities("items"):
        _cancel_soon()
        await asyncio.sleep(HANG_SECONDS)


async def _be_cancelled_in_a_step(store: StorageStrategy) -> None:
    async for _row in store.stream_entities("items"):
        _cancel_soon()


async def _be_cancelled_in_a_query(store: StorageStrategy) -> None:
    while True:
        _cancel_soon()
        await store.query_entities("items", order_by="-extra")


async def _break_out_of_an_order(store: StorageStrategy) -> None:
    async for _row in store.stream_entities("items", order_by="-extra"):
        break


def _cancel_soon() -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_soon(task.cancel)


LEAVING: Final[Mapping[str, Callable[[StorageStrategy], Awaitable[None]]]] = {
    "break": _break,
    "an exception": _raise,
    "aclose": _close,
    "the garbage collector": _drop,
    "not at all": _keep,
    "cancelled in the body": _be_cancelled_in_the_body,
    "cancelled in a step": _be_cancelled_in_a_step,
    "cancelled in a query": _be_cancelled_in_a_query,
    "break out of an order": _break_out_of_an_order,
}


class StreamContract:
    """How streams and stores are left."""

    # 121 ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("how", ["ends", "fails", "exits", "streams"])
    async def test_121_an_unclosed_store_lets_the_process_end(
        self, harness: Harness, how: str
    ) -> None:
        url = harness.url()
        if url is None:
            return
        code, told = await _child(_FORGETFUL, url, how)
        assert code == {"ends": 0, "fails": 1, "exits": 3, "streams": 0}[how], told
        assert "ResourceWarning: unclosed store" in told
        for each in _COMPLAINTS:
            assert each not in told, told
        if is_shared(harness.capabilities):
            async with harness.store() as store:
                assert payload(await store.get_entity("items", "acknowledged")) == {
                    "item_id": "acknowledged",
                    "label": how,
                }

    # 136 ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("way", LEAVING)
    async def test_136_streams_are_left_in_every_way_before_close(
        self, harness: Harness, way: str
    ) -> None:
        store = await harness.store().open()
        await _fill(store)
        tasks = [asyncio.create_task(_left(store, way)) for _ in range(_READERS)]
        await asyncio.wait(tasks, timeout=HANG_SECONDS)
        await asyncio.wait_for(store.close(), HANG_SECONDS)
        for each in tasks:
            if not each.cancelled():
                each.result()
        _KEPT.clear()
        await nothing_is_left(harness)

    async def test_136_close_beside_tasks_that_were_just_cancelled(self, harness: Harness) -> None:
        """A usual shutdown: cancel the tasks, and leave the store."""
        store = await harness.store().open()
        await _fill(store)

        async def work() -> None:
            while True:
                await store.query_entities("items", {"text": "nobody"})
                async for _row in store.stream_entities("items"):
                    break

        tasks = [asyncio.create_task(work()) for _ in range(4)]
        await asyncio.sleep(0.1)
        for each in tasks:
            each.cancel()
        await asyncio.wait_for(store.close(), HANG_SECONDS)
        await asyncio.wait(tasks, timeout=HANG_SECONDS)
        for each in tasks:
            assert each.cancelled() or isinstance(each.exception(), StoreClosedError)
        await nothing_is_left(harness)

    async def test_136_a_stream_does_not_end_quietly_when_its_store_closes(
        self, harness: Harness
    ) -> None:
        """What was read so far must not be taken for all there is."""
        store = await harness.store().open()
        await _fill(store)
        async with aclosing(store.stream_entities("items")) as rows:
            await anext(rows)
            await asyncio.wait_for(store.close(), HANG_SECONDS)
            with pytest.raises(StoreClosedError):
                async for _row in rows:
                    pass
        await nothing_is_left(harness)

    async def test_136_a_query_inside_the_body_of_a_stream(self, store: StorageStrategy) -> None:
        await _fill(store)
        await answer_of(store.capabilities, lambda: store.count_entities("items"), _ROWS)
        counts = await asyncio.wait_for(
            asyncio.gather(*(_nested(store, 5) for _ in range(_NESTED))), HANG_SECONDS
        )
        assert counts == [5] * _NESTED
        await usable(store)

    async def test_136_more_streams_than_there_may_be_are_refused_at_once(
        self, store: StorageStrategy
    ) -> None:
        """Or all are served; but nobody waits for a stream that waits for others."""
        await _fill(store)
        await answer_of(store.capabilities, lambda: store.count_entities("items"), _ROWS)
        outcomes = await asyncio.wait_for(
            asyncio.gather(*(_nested(store, 2) for _ in range(60)), return_exceptions=True),
            _SLOW_SECONDS,
        )
        served = [each for each in outcomes if each == 2]
        refused = [each for each in outcomes if isinstance(each, PoolTimeoutError)]
        assert len(served) >= _NESTED
        assert len(served) + len(refused) == len(outcomes), set(map(repr, outcomes))
        await usable(store)

    async def test_136_nothing_is_printed_afterwards(self, harness: Harness) -> None:
        """All of it in a process with the checks of the interpreter switched on."""
        url = harness.url()
        if url is None:
            return
        code, told = await _child(_LEAVER, url, "")
        assert (code, told) == (0, "")


async def _fill(store: StorageStrategy) -> None:
    pad = "x" * 500
    await store.save_entities(
        "items",
        [{"item_id": f"{each:03}", "extra": each % 7, "pad": pad} for each in range(_ROWS)],
    )


async def _left(store: StorageStrategy, way: str) -> None:
    await LEAVING[way](store)


async def _nested(store: StorageStrategy, rows: int) -> int:
    """Ask once more for each of the first rows of a stream; how many of them were found."""
    found = 0
    # Without a limit: what is not all read at once stays open.
    async with aclosing(store.stream_entities("items", order_by="-item_id")) as outer:
        async for row in outer:
            found += len(await store.query_entities("items", {"item_id": row["item_id"]}))
            await get_existing(store, "items", str(row["item_id"]))
            if found >= rows:
                break
    return found


# -- other processes ------------------------------------------------------------------------

_COMPLAINTS: Final = ("Task was destroyed", "never retrieved", "never awaited", "Exception ignored")

_FORGETFUL: Final = """
import asyncio, sys
from hf_async_store import open_store
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS
url, how = sys.argv[1:]

async def main():
    store = await open_store(url, collections=CONTRACT_COLLECTIONS).open()
    await store.save_entity("items", {"item_id": "acknowledged", "label": how})
    if how == "streams":
        await store.save_entities("items", [{"item_id": str(n)} for n in range(300)])
        async for row in store.stream_entities("items"):
            break
    if how == "fails":
        raise RuntimeError("the service fails")
    if how == "exits":
        sys.exit(3)

asyncio.run(main())
"""

_LEAVER: Final = """
import asyncio, sys
from hf_async_store import open_store
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS
from hf_async_store.testing.streams import LEAVING, _KEPT, _fill
url = sys.argv[1]

async def main():
    asyncio.get_running_loop().slow_callback_duration = 60  # how busy a machine is says nothing
    async with open_store(url, collections=CONTRACT_COLLECTIONS) as store:
        await _fill(store)
    for way, leave in LEAVING.items():
        async with open_store(url, collections=CONTRACT_COLLECTIONS) as store:
            tasks = [asyncio.create_task(leave(store)) for _ in range(12)]
            await asyncio.wait(tasks)
        _KEPT.clear()

asyncio.run(main())
"""


async def _child(code: str, *arguments: str) -> tuple[int | None, str]:
    """Run a program with all of the interpreter's checks; its exit code, and what it complained of."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", "-c", code, *arguments),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, told = await asyncio.wait_for(process.communicate(), _SLOW_SECONDS)
    except TimeoutError:
        process.kill()
        _, told = await process.communicate()
        raise AssertionError(f"it does not end: {told.decode()}") from None
    return process.returncode, told.decode()
