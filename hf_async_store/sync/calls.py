"""Blocking methods, streams and context managers around asynchronous ones, with the same parameters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from copy import deepcopy
from functools import partial, wraps
from threading import Lock
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from hf_async_store.errors import StoreClosedError
from hf_async_store.sync.event_loop_thread import Caller, EventLoopThread, refuse_running_loop

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Item = TypeVar("Item")
Entered = TypeVar("Entered")


class Blocking:
    """An object whose methods run in the event loop.

    Args:
        target: the asynchronous object.
        loop_thread: the event loop; None if the object has not been opened yet.
    """

    def __init__(self, target: Any, loop_thread: EventLoopThread | None) -> None:
        self._target = target
        self._loop_thread = loop_thread

    def _opened(self) -> EventLoopThread:
        if self._loop_thread is None:
            refuse_running_loop()
            raise StoreClosedError("this store is not open (use `with`)")
        return self._loop_thread

    def _caller(self) -> Caller:
        return self._opened().caller()

    def _run(self, work: Callable[[], Awaitable[Result]]) -> Result:
        return self._caller().run(work)


def blocking(
    method: Callable[Concatenate[Any, Parameters], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[Blocking, Parameters], Result]:
    """A method that calls the asynchronous one of the same name, and waits for its result."""
    return _blocking(method, calls_back=False)


def calling_back(
    method: Callable[Concatenate[Any, Parameters], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[Blocking, Parameters], Result]:
    """As `blocking`; the functions among its arguments are called in the calling thread.

    The asynchronous method accepts async ones; the blocking one refuses them with InvalidInputError.
    """
    return _blocking(method, calls_back=True)


def _blocking(
    method: Callable[Concatenate[Any, Parameters], Coroutine[Any, Any, Result]],
    *,
    calls_back: bool,
) -> Callable[Concatenate[Blocking, Parameters], Result]:
    name = method.__name__

    @wraps(method)
    def call(self: Blocking, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        caller = self._caller()
        passed = partial(_passed, caller) if calls_back else _listed
        named = {each: passed(value) for each, value in kwargs.items()} if kwargs else {}
        work: Callable[[], Awaitable[Result]] = partial(
            getattr(self._target, name), *map(passed, args), **named
        )
        return caller.run(work)

    return call


def streaming(
    method: Callable[Concatenate[Any, Parameters], AsyncGenerator[Item, None]],
    *,
    read_ahead: int = 64,
) -> Callable[Concatenate[Blocking, Parameters], Stream[Item]]:
    """A method that returns the asynchronous generator of the same name as a `Stream`."""
    name = method.__name__

    @wraps(method)
    def call(
        self: Blocking, /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Stream[Item]:
        source = getattr(self._target, name)(*args, **kwargs)
        return Stream(self._opened(), source, read_ahead=read_ahead)

    return call


def entering(
    method: Callable[Concatenate[Any, Parameters], AbstractAsyncContextManager[Entered]],
) -> Callable[Concatenate[Blocking, Parameters], Context[Entered]]:
    """A method that returns the asynchronous context manager of the same name as a `Context`."""
    name = method.__name__

    @wraps(method)
    def call(
        self: Blocking, /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Context[Entered]:
        return Context(self._opened(), getattr(self._target, name)(*args, **kwargs))

    return call


class Entering(Blocking):
    """The base of context managers that are entered and left in the event loop.

    An interrupt, such as Ctrl-C, may come at any moment: a context that was entered is left even then.
    """

    _is_entered = False

    async def _enter(self) -> Any:
        value = await self._target.__aenter__()
        self._is_entered = True
        self._opened().entered[self] = None
        return value

    async def _leave(self, exc: BaseException | None) -> None:
        """Leave the context, which suppresses no exception, by an exception of the calling thread."""
        self._is_entered = False
        if self._loop_thread is not None:
            self._loop_thread.entered.pop(self, None)
        if exc is not None and not isinstance(exc, Exception):
            # KeyboardInterrupt, SystemExit: in a task, asyncio would end the event loop.
            exc = asyncio.CancelledError()
        kind, traceback = (None, None) if exc is None else (type(exc), exc.__traceback__)
        await self._target.__aexit__(kind, exc, traceback)

    def _leave_if_interrupted(self, exc: BaseException) -> None:
        if self._is_entered and not isinstance(exc, Exception):
            self._run(partial(self._leave, exc))

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        try:
            self._run(partial(self._leave, exc))
        except BaseException as interrupt:
            self._leave_if_interrupted(interrupt)
            raise


class Context(Entering, Generic[Entered]):
    """A context manager around an asynchronous one."""

    def __init__(
        self, loop_thread: EventLoopThread, context: AbstractAsyncContextManager[Entered]
    ) -> None:
        super().__init__(context, loop_thread)

    def __enter__(self) -> Entered:
        try:
            value: Entered = self._run(self._enter)
            return value
        except BaseException as exc:
            self._leave_if_interrupted(exc)
            raise


class Stream(Iterator[Item], Generic[Item]):
    """An iterator over an asynchronous generator. It may be read and closed by any thread.

    Close it, by `close()` or as a context manager, if it is not read to its end; otherwise this happens
    when it is freed.

    Args:
        read_ahead: the maximum number of items that it reads at once; it begins with one.
    """

    def __init__(
        self,
        loop_thread: EventLoopThread,
        source: AsyncGenerator[Item, None],
        *,
        read_ahead: int,
    ) -> None:
        self._loop_thread = loop_thread
        self._source = source
        loop_thread.sources.add(source)
        self._lock = Lock()  # threads that read at the same time take turns
        self._ready: list[Item] = []  # in reverse order
        self._end: Exception | None = None
        self._size = 1
        self._read_ahead = read_ahead

    def __next__(self) -> Item:
        with self._lock:
            if not self._ready and self._end is None:
                self._loop_thread.caller().run(self._read)
            if self._ready:
                return self._ready.pop()
            end, self._end = self._end, StopAsyncIteration()
            if end is None or isinstance(end, StopAsyncIteration):
                raise StopIteration
            raise end

    async def _read(self) -> None:
        items: list[Item] = []
        try:
            while len(items) < self._size:
                items.append(await anext(self._source))
        except Exception as exc:  # noqa: BLE001 - raised after the items before it
            self._end = exc
        self._ready = items[::-1]
        self._size = min(2 * self._size, self._read_ahead)

    def close(self) -> None:
        """End the stream, and release what it holds."""
        with self._lock:
            self._ready.clear()
            if self._end is None:
                self._loop_thread.caller().run(self._source.aclose)
                self._end = StopAsyncIteration()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _listed(argument: Any) -> Any:
    """An argument as it is passed on: code of the caller runs in the calling thread.

    An iterator becomes the list of its items, copied, because it may change an item that it has
    returned.
    """
    if hasattr(type(argument), "__next__"):
        return [_copied(each) for each in argument]
    return argument


def _passed(caller: Caller, argument: Any) -> Any:
    """As `_listed`; a function becomes one that is called by `caller`."""
    if callable(argument) and not hasattr(type(argument), "__next__"):
        return lambda *args: caller.call_back(partial(argument, *args))
    return _listed(argument)


def passed_functions(caller: Caller, functions: Any) -> Any:
    """A dict of functions as it is passed on; anything else is left for the method to refuse."""
    if not isinstance(functions, Mapping):
        return functions
    return {name: _passed(caller, each) for name, each in functions.items()}


def _copied(item: Any) -> Any:
    try:
        return deepcopy(item)
    except Exception:  # noqa: BLE001 - not a portable value: the method refuses it
        return item
