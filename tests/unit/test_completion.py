"""Driver calls that are not interrupted."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store.strategies.sql.completion import completed

if TYPE_CHECKING:
    from collections.abc import Generator


class _Call:
    """A driver call that ends when it is told to."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.has_ended = False

    async def run(self) -> int:
        await asyncio.sleep(0)
        try:
            return await self.answer + await self.answer
        finally:
            self.has_ended = True


async def _begun(call: _Call) -> asyncio.Task[int]:
    async def caller() -> int:
        return await completed(call.run())

    task = asyncio.create_task(caller())
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def test_a_call_returns_its_result() -> None:
    call = _Call()
    task = await _begun(call)
    call.answer.set_result(2)
    assert await task == 4


async def test_a_call_that_does_not_wait_returns_at_once() -> None:
    async def call() -> int:
        return 1

    assert await completed(call()) == 1


async def test_a_call_raises_its_error() -> None:
    call = _Call()
    task = await _begun(call)
    call.answer.set_exception(OSError("lost"))
    with pytest.raises(OSError, match="lost"):
        await task


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_call_ends_before_the_cancellation_is_raised(times: int, *, fails: bool) -> None:
    call = _Call()
    task = await _begun(call)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
    if fails:
        call.answer.set_exception(OSError("lost"))
    else:
        call.answer.set_result(2)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert call.has_ended


async def test_a_call_that_the_driver_cancels_does_not_cancel_the_caller() -> None:
    call = _Call()
    task = await _begun(call)
    call.answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert call.has_ended
    assert not task.cancelling()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_the_caller_keeps_its_context(*, cancelled: bool) -> None:
    variable: ContextVar[int] = ContextVar("variable", default=0)
    call = _Call()
    seen: list[int] = []

    async def caller() -> None:
        variable.set(1)
        try:
            await completed(call.run())
        finally:
            seen.append(variable.get())
            variable.set(2)
            await asyncio.sleep(0)
            seen.append(variable.get())

    task = asyncio.create_task(caller())
    for _ in range(3):
        await asyncio.sleep(0)
    if cancelled:
        task.cancel("why")
    call.answer.set_result(1)
    if cancelled:
        with pytest.raises(asyncio.CancelledError, match="why"):
            await task
    await asyncio.wait([task])
    assert seen == [1, 2]
    assert variable.get() == 0


async def test_a_time_limit_of_the_caller_is_raised_after_the_call() -> None:
    call = _Call()

    async def caller() -> None:
        async with asyncio.timeout(0):
            await completed(call.run())

    task = asyncio.create_task(caller())
    await asyncio.sleep(0.01)
    assert not task.done()
    call.answer.set_result(2)
    with pytest.raises(TimeoutError):
        await task
    assert call.has_ended


async def test_a_call_that_a_closing_loop_leaves_is_closed() -> None:
    call = _Call()
    steps = completed(call.run())
    for _ in range(2):
        steps.send(None)
    with suppress(RuntimeError):
        steps.close()
    assert call.has_ended
    call.answer.cancel()


async def test_a_call_that_is_cancelled_again_and_again_takes_no_memory() -> None:
    """As anyio does, in each turn of the loop."""
    call = _Call()
    callbacks: list[object] = []
    add, remove = call.answer.add_done_callback, call.answer.remove_done_callback

    class Answer:
        """The future, of which the callbacks are counted."""

        _asyncio_future_blocking = False

        def add_done_callback(self, callback: Any) -> None:
            callbacks.append(callback)
            add(callback)

        def remove_done_callback(self, callback: Any) -> None:
            callbacks.remove(callback)
            remove(callback)

        def __getattr__(self, name: str) -> Any:
            return getattr(call.answer, name)

        def __await__(self) -> Generator[Any, None, int]:
            if not self.done():
                self._asyncio_future_blocking = True
                yield self
            return call.answer.result()

    async def run() -> int:
        return await Answer()

    async def caller() -> int:
        return await completed(run())

    task = asyncio.create_task(caller())
    for _ in range(100):
        await asyncio.sleep(0)
        task.cancel()
    registered = len(callbacks)
    call.answer.set_result(1)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert registered <= 1


async def test_a_cancelled_call_that_a_closing_loop_leaves_is_closed() -> None:
    call = _Call()
    steps = completed(call.run())
    for _ in range(2):
        steps.send(None)
    steps.throw(asyncio.CancelledError())
    steps.close()
    assert call.has_ended
    call.answer.cancel()
