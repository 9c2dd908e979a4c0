"""Cases 121 and 136: streams that are not read to the end, and stores that are never closed."""

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
"""More tasks than a pool has connections by default, but fewer than the maximum of open streams."""

_SLOW_SECONDS: Final = 3 * HANG_SECONDS
"""The time limit for tests with many round trips; a test that exceeds it is considered to hang."""

_KEPT: list[object] = []
"""Streams that are still referenced when the store closes."""


async def _break(store: StorageStrategy) -> None:
    async for _row in store.stream_entities("items"):
        break  # without aclosing


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
    """Abandoned streams and unclosed stores."""

    # 121 ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("how", ["ends", "fails", "exits", "streams"])
    async def test_121_an_unclosed_store_lets_the_process_end(
        self, harness: Harness, how: str
    ) -> None:
        url = harness.url()
        if url is None:
            pytest.skip("the engine does not declare multi_process")
        code, stderr = await _child(_UNCLOSED_STORE_PROGRAM, url, how)
        assert code == {"ends": 0, "fails": 1, "exits": 3, "streams": 0}[how], stderr
        assert "ResourceWarning: unclosed store" in stderr
        for each in _ERROR_MESSAGES:
            assert each not in stderr, stderr
        if is_shared(harness.capabilities):
            async with harness.store() as store:
                assert payload(await store.get_entity("items", "acknowledged")) == {
                    "item_id": "acknowledged",
                    "label": how,
                }

    async def test_121_an_abandoned_store_keeps_what_was_acknowledged(
        self, harness: Harness
    ) -> None:
        """The process can end without a warning."""
        url = harness.url()
        if url is None:
            store = await harness.store().open()
            store.abandon()
            return
        code, stderr = await _child(_UNCLOSED_STORE_PROGRAM, url, "abandons")
        assert code == 0, stderr
        for each in (*_ERROR_MESSAGES, "ResourceWarning"):
            assert each not in stderr, stderr
        async with harness.store() as store:
            assert (await get_existing(store, "items", "acknowledged"))["label"] == "abandons"
            assert await store.update_entity("items", "acknowledged", {}) == 2

    # 136 ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("way", LEAVING)
    async def test_136_streams_abandoned_in_every_way_before_close(
        self, harness: Harness, way: str
    ) -> None:
        store = await harness.store().open()
        await _fill(store)
        tasks = [asyncio.create_task(_leave_stream(store, way)) for _ in range(_READERS)]
        await asyncio.wait(tasks, timeout=HANG_SECONDS)
        await asyncio.wait_for(store.close(), HANG_SECONDS)
        for each in tasks:
            if not each.cancelled():
                each.result()
        _KEPT.clear()
        await nothing_is_left(harness)

    async def test_136_close_right_after_cancelling_tasks(self, harness: Harness) -> None:
        """A typical shutdown: cancel the tasks and close the store."""
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

    async def test_136_a_stream_fails_when_its_store_closes(self, harness: Harness) -> None:
        """Otherwise the rows read so far would be taken for the complete result."""
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
            asyncio.gather(*(_query_in_stream(store, 5) for _ in range(_NESTED))), HANG_SECONDS
        )
        assert counts == [5] * _NESTED
        await usable(store)

    async def test_136_excess_streams_are_refused_without_waiting(
        self, store: StorageStrategy
    ) -> None:
        """Or all are served; but no stream waits for others, which could be a deadlock."""
        await _fill(store)
        await answer_of(store.capabilities, lambda: store.count_entities("items"), _ROWS)
        outcomes = await asyncio.wait_for(
            asyncio.gather(
                *(_query_in_stream(store, 2) for _ in range(60)), return_exceptions=True
            ),
            _SLOW_SECONDS,
        )
        served = [each for each in outcomes if each == 2]
        refused = [each for each in outcomes if isinstance(each, PoolTimeoutError)]
        assert len(served) >= _NESTED
        assert len(served) + len(refused) == len(outcomes), set(map(repr, outcomes))
        await usable(store)

    async def test_136_abandoned_streams_print_nothing_to_stderr(self, harness: Harness) -> None:
        """All ways of leaving a stream, in a process with `-X dev`, print nothing to stderr."""
        url = harness.url()
        if url is None:
            pytest.skip("the engine does not declare multi_process")
        code, stderr = await _child(_ABANDONED_STREAMS_PROGRAM, url, "")
        assert (code, stderr) == (0, "")


async def _fill(store: StorageStrategy) -> None:
    pad = "x" * 500
    await store.save_entities(
        "items",
        [{"item_id": f"{each:03}", "extra": each % 7, "pad": pad} for each in range(_ROWS)],
    )


async def _leave_stream(store: StorageStrategy, way: str) -> None:
    await LEAVING[way](store)


async def _query_in_stream(store: StorageStrategy, rows: int) -> int:
    """Query each of the first rows of a stream inside its body; returns the number of rows found."""
    found = 0
    # Without a limit, so that the rows are not all read at once and the stream stays open.
    async with aclosing(store.stream_entities("items", order_by="-item_id")) as outer:
        async for row in outer:
            found += len(await store.query_entities("items", {"item_id": row["item_id"]}))
            await get_existing(store, "items", str(row["item_id"]))
            if found >= rows:
                break
    return found


# -- other processes ------------------------------------------------------------------------

_ERROR_MESSAGES: Final = (
    "Task was destroyed",
    "never retrieved",
    "never awaited",
    "Exception ignored",
)

_UNCLOSED_STORE_PROGRAM: Final = """
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
    if how == "abandons":
        store.abandon()

asyncio.run(main())
"""

_ABANDONED_STREAMS_PROGRAM: Final = """
import asyncio, sys
from hf_async_store import open_store
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS
from hf_async_store.testing.streams import LEAVING, _KEPT, _fill
url = sys.argv[1]

async def main():
    asyncio.get_running_loop().slow_callback_duration = 60  # do not report slow callbacks of a busy machine
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
    """Run a program with `-X dev`; returns its exit code and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", "-c", code, *arguments),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, stderr = await asyncio.wait_for(process.communicate(), _SLOW_SECONDS)
    except TimeoutError:
        process.kill()
        _, stderr = await process.communicate()
        raise AssertionError(f"the process does not end: {stderr.decode()}") from None
    return process.returncode, stderr.decode()
