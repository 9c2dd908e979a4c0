"""Locks: between the tasks of one event loop, and between operating-system processes.

From the bottom up: `ReaderWriterLock` for tasks, `FileLock` for processes (synchronous, one try),
and `LockManager`, which puts the first in front of the second. Linux and macOS.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections import OrderedDict
from contextlib import suppress
from math import inf
from random import random
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from hf_async_store.errors import LockTimeoutError, StoreClosedError, TransactionReentryError
from hf_async_store.os_errors import translate_os_error
from hf_async_store.ownership import share

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path
    from types import TracebackType

    from hf_async_store.ownership import Ownership

Mode: TypeAlias = Literal["read", "write"]

_FIRST_PAUSE: Final = 0.0003
"""Between the first two tries for a file lock."""

_PAUSE_SHARE: Final = 1 / 8
"""Each further pause is this part of the time that was waited already."""

_MAX_PAUSE_SECONDS: Final = 0.005
"""Between two tries by a process that is not next in line. It is also what an old waiter suffers
from new ones, which try more often: with 20 ms, the longest wait of eight processes that compete
for 10 ms each is 2.5 times as long, at the same throughput."""

_OPEN: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""No link is followed: whoever may write the folder could point it at a file of others."""

_NEXT_IN_LINE_PAUSE: Final = 0.001
"""Between two tries by the one process that is next in line."""


class _Section:
    """`async with` over a lock, for one use."""

    __slots__ = ("_lock", "_mode", "_owner", "_task", "_timeout")

    _task: asyncio.Task[Any]

    def __init__(
        self,
        lock: ReaderWriterLock | LockManager,
        mode: Mode,
        timeout: float | None,
        owner: asyncio.Task[Any] | None = None,
    ) -> None:
        self._lock = lock
        self._mode = mode
        self._timeout = timeout
        self._owner = owner

    async def __aenter__(self) -> None:
        self._task = self._owner or _this_task()
        await self._lock._acquire(self._task, self._mode, self._timeout)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # In the name of the task that entered, which need not be the current one: an abandoned
        # async generator is closed by the event loop, in a task of its own.
        self._lock._release(self._task, self._mode)


class ReaderWriterLock:
    """A lock that many tasks may hold to read, or one to write, on one event loop.

    * Waiters are served in the order in which they came. Readers next to one another at the head
      of the queue are admitted together; a reader that comes while a writer waits queues behind
      it. So neither side is starved.
    * The task that acquires is the holder, and only it may release. Acquiring again in either
      mode while holding would wait for oneself: it is refused at once.
    * A waiter may be cancelled or run out of time at any moment, also after the lock was handed to
      it and before it ran: the lock then passes on.
    * Acquiring a free lock does not suspend.

    Args:
        name: what errors call the lock.
    """

    # Whether a waiter holds the lock is decided in `_admit`, in one step without an await, when
    # the lock becomes free; its future only wakes it. So there is no moment at which the lock is
    # free but promised, and a waiter that goes away has only to undo what the books say of it.

    __slots__ = ("_name", "_queue", "_readers", "_writer")

    def __init__(self, name: str = "the lock") -> None:
        self._name = name
        self._readers: set[asyncio.Task[Any]] = set()
        self._writer: asyncio.Task[Any] | None = None
        # A future is true when the lock was granted, false when the time is up. Not a deque:
        # a waiter in the middle must be able to leave without a walk over the others.
        self._queue: OrderedDict[asyncio.Future[bool], tuple[asyncio.Task[Any], Mode]] = (
            OrderedDict()
        )

    @property
    def readers(self) -> int:
        """How many tasks hold the lock to read."""
        return len(self._readers)

    @property
    def has_writer(self) -> bool:
        """Whether a task holds the lock to write."""
        return self._writer is not None

    @property
    def waiting(self) -> int:
        """How many tasks wait, in either mode."""
        return len(self._queue)

    def holds(self, task: asyncio.Task[Any] | None = None) -> Mode | None:
        """How `task`, by default the current one, holds the lock.

        A waiter holds it from the moment it is handed over, even before it runs.
        """
        task = task or _this_task()
        if task is self._writer:
            return "write"
        return "read" if task in self._readers else None

    def reading(self, timeout: float | None = None) -> AbstractAsyncContextManager[None]:
        """`acquire_read` on entry, `release_read` on exit."""
        return _Section(self, "read", timeout)

    def writing(self, timeout: float | None = None) -> AbstractAsyncContextManager[None]:
        """`acquire_write` on entry, `release_write` on exit."""
        return _Section(self, "write", timeout)

    async def acquire_read(self, timeout: float | None = None) -> None:
        """Hold the lock to read, together with other readers.

        Args:
            timeout: seconds to wait at most; 0 tries once, None waits for ever.

        Raises:
            LockTimeoutError: the lock was not free in time.
            TransactionReentryError: this task holds the lock already.
        """
        await self._acquire(_this_task(), "read", timeout)

    async def acquire_write(self, timeout: float | None = None) -> None:
        """Hold the lock to write, alone. Arguments and errors as for `acquire_read`."""
        await self._acquire(_this_task(), "write", timeout)

    def release_read(self) -> None:
        """Give the lock back.

        Raises:
            RuntimeError: this task does not hold the lock to read.
        """
        self._release(_this_task(), "read")

    def release_write(self) -> None:
        """Give the lock back.

        Raises:
            RuntimeError: this task does not hold the lock to write.
        """
        self._release(_this_task(), "write")

    async def _acquire(self, task: asyncio.Task[Any], mode: Mode, timeout: float | None) -> None:
        free = self._writer is None
        if free and mode == "write" and not self._readers:
            # The queue need not be asked: who frees the lock hands it on in the same step, so that
            # a free lock has no live waiter.
            self._writer = task
        elif free and mode == "read" and not self._queue and task not in self._readers:
            self._readers.add(task)
        else:
            await self._wait(task, mode, timeout)

    def _release(self, task: asyncio.Task[Any], mode: Mode) -> None:
        if mode == "read" and task in self._readers:
            self._readers.remove(task)
        elif mode == "write" and task is self._writer:
            self._writer = None
        else:
            raise RuntimeError(f"{self._name} is not held to {mode} by this task")
        if self._queue:
            self._admit()

    async def _wait(self, task: asyncio.Task[Any], mode: Mode, timeout: float | None) -> None:
        held = self.holds(task)
        if held is not None:
            raise TransactionReentryError(
                f"this task already holds {self._name} to {held}; "
                f"to {mode} as well, it would wait for itself"
            )
        limit = inf if timeout is None else timeout
        if limit <= 0:
            raise self._timed_out(mode, limit)
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[bool] = loop.create_future()
        self._queue[granted] = task, mode
        # A timer of our own rather than `asyncio.timeout`, which cancels: the time is up, or the
        # lock is granted, in one step, and neither can be taken for a cancellation by a caller.
        timer = None if limit == inf else loop.call_later(limit, self._give_up, granted)
        try:
            in_time = await granted
        except BaseException:
            # Cancelled, be it while in the queue, or after the lock was handed over. Only what came
            # by this wait is undone: `task` may hold the lock by another one made in its name.
            self._queue.pop(granted, None)
            if granted.done() and not granted.cancelled() and granted.result():
                self._release(task, mode)
            else:
                self._admit()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if not in_time:
            raise self._timed_out(mode, limit)

    def _give_up(self, granted: asyncio.Future[bool]) -> None:
        """The time of a waiter is up."""
        if not granted.done():
            del self._queue[granted]
            granted.set_result(False)
            self._admit()

    def _admit(self) -> None:
        """Hand the lock to those at the head of the queue who can have it now."""
        queue = self._queue
        while queue and self._writer is None:
            granted, (task, mode) = next(iter(queue.items()))
            if not granted.done():
                if mode == "read":
                    self._readers.add(task)
                elif self._readers:
                    return
                else:
                    self._writer = task
                granted.set_result(True)
            # else: it was cancelled and has not run yet. It must not be given the lock, nor hold
            # up those behind it.
            del queue[granted]

    def _timed_out(self, mode: Mode, timeout: float) -> LockTimeoutError:
        holders = "a writer" if self.has_writer else _count(self.readers, "reader")
        return LockTimeoutError(
            f"{self._name} was not free to {mode} within {timeout:g} s: "
            f"held by {holders}, {self.waiting} waiting"
        )


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("locks are held by asyncio tasks, and this is not one")
    return task


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class FileLock:
    """A lock between processes: `flock` on a file that exists for nothing else.

    Synchronous, one try at a time. The file is created at the first try and stays; whoever
    deletes it while it is held breaks the lock. A holder that dies loses the lock. Two objects
    exclude one another also within one process; one object is not for two threads.

    After a fork the child shares the parent's lock, and can release it: a process that uses locks
    must not go on using them in a forked child. That is refused above this layer.

    Args:
        owned: asked, when the file has to be made, whose it is to be; None: of this process, 0600.
    """

    __slots__ = ("_fd", "_held", "_identity", "_owned", "_path")

    def __init__(
        self,
        path: str | os.PathLike[str],
        owned: Callable[[], Ownership | None] = lambda: None,
    ) -> None:
        self._path = os.fspath(path)
        self._owned = owned
        self._fd: int | None = None
        self._identity = (0, 0)
        self._held: Literal["shared", "exclusive"] | None = None

    @property
    def path(self) -> str:
        return self._path

    @property
    def held(self) -> Literal["shared", "exclusive"] | None:
        """How this object holds the lock."""
        return self._held

    def try_lock(self, exclusive: bool) -> bool:
        """Take the lock if it is free; False if somebody else has it. Never waits.

        Raises:
            PermissionDeniedError, ReadOnlyStoreError, DiskFullError, UnavailableError: the file cannot
                be created, opened or locked. Nothing is held.
            RuntimeError: this object holds the lock already.
        """
        if self._held is not None:
            raise RuntimeError(f"{self._path} is already locked ({self._held}) by this object")
        how = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            # Twice, because the file may have been replaced since it was opened. Not for ever:
            # somewhere a file system may never give a file the same inode number twice.
            for _ in range(2):
                fcntl.flock(self._opened(), how | fcntl.LOCK_NB)
                if self._is_current():
                    self._held = "exclusive" if exclusive else "shared"
                    return True
                self.close()
        except BlockingIOError:
            pass
        except OSError as exc:
            self.close()
            raise translate_os_error(exc, f"lock {self._path}") from exc
        return False

    def unlock(self) -> None:
        """Give the lock back; nothing happens if it is not held. Cannot fail."""
        if self._held is not None and self._fd is not None:
            self._held = None
            try:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            except OSError:
                self.close()

    def close(self) -> None:
        """Give the lock back and close the file; a later try opens it again. Cannot fail."""
        # Unlocked first, because a child between fork and exec still has the descriptor, and
        # closing ours alone would leave the lock with it.
        self.unlock()
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                os.close(fd)

    def _opened(self) -> int:
        if self._fd is None:
            try:
                self._fd = os.open(self._path, _OPEN)
            except FileNotFoundError:
                self._fd = self._made()
            stat = os.fstat(self._fd)
            self._identity = stat.st_dev, stat.st_ino
        return self._fd

    def _made(self) -> int:
        owned = self._owned()
        if owned is None:
            return os.open(self._path, _OPEN | os.O_CREAT, 0o600)
        # It gets its name once it is whose it is to be: others may want it at any moment.
        temporary = f"{self._path}.{os.urandom(4).hex()}.tmp"
        fd = os.open(temporary, _OPEN | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            share(fd, owned)
            self._name(temporary)
        except BaseException:
            os.close(fd)
            raise
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)  # noqa: PTH108  # as everywhere in this class
        return fd

    def _name(self, temporary: str) -> None:
        """Its name, unless another process was first: then `_is_current` tells."""
        try:
            os.link(temporary, self._path)
        except FileExistsError:
            pass
        except OSError:
            if os.path.lexists(self._path):
                return
            os.rename(temporary, self._path)  # noqa: PTH104  # a file system without hard links

    def _is_current(self) -> bool:
        """Whether what was locked is still what others will find at the path."""
        try:
            stat = os.stat(self._path)  # noqa: PTH116 - once per acquire, and a Path is slower
        except FileNotFoundError:
            return False
        return (stat.st_dev, stat.st_ino) == self._identity


class LockManager:
    """A reader-writer lock between the tasks of this process and those of all others.

    Each task first takes its side of a `ReaderWriterLock`, with all that this one promises, then
    the lock between processes, which polls with a backoff of 5 ms at most. A process that takes
    the lock again and again, to read or to write, does not starve another. A holder that dies
    loses the lock. Taking a free lock does not suspend; a cancelled or failed acquire leaves
    nothing held.

    Not for use in a forked child (see `FileLock`).

    Args:
        path: the lock file; another one beside it has `.turn` after its name. Both are created
            at the first use and stay.
        timeout: seconds that an acquire may take in all, where it does not say otherwise.
        owned: see `FileLock`.
    """

    # The turnstile: who wants the lock file first takes `.turn` and keeps it until it has the lock
    # file. With polling alone, a process that releases and takes the lock in a tight loop would
    # win nearly always, since the others sleep when the lock is free for a few microseconds. With
    # the turnstile, one of the others gets `.turn` while the greedy process works (it keeps `.turn`
    # for microseconds only), and from then on the greedy one has to wait behind it. For the same
    # reason readers pass the turnstile even if this process already has the lock file to read:
    # else readers that overlap would keep a writer of another process out for ever.

    __slots__ = (
        "_closed",
        "_gate",
        "_main",
        "_passages",
        "_path",
        "_sharers",
        "_tasks",
        "_timeout",
        "_turn",
    )

    def __init__(
        self,
        path: Path,
        *,
        timeout: float = 30.0,
        owned: Callable[[], Ownership | None] = lambda: None,
    ) -> None:
        self._path = path
        self._timeout = timeout
        self._closed = False
        self._main = FileLock(path, owned)
        self._turn = FileLock(f"{os.fspath(path)}.turn", owned)
        self._tasks = ReaderWriterLock(f"the lock {path}")
        # One reader at a time deals with the files for all readers of this process.
        self._gate = ReaderWriterLock(f"the lock {path}")
        self._sharers = 0
        self._passages = 0

    @property
    def exclusive_held(self) -> bool:
        """Whether this object holds the lock file exclusively."""
        return self._main.held == "exclusive"

    def holds(self, task: asyncio.Task[Any] | None = None) -> Mode | None:
        """How `task`, by default the current one, holds its side of the lock."""
        return self._tasks.holds(task)

    def exclusive(
        self, timeout: float | None = None, *, owner: asyncio.Task[Any] | None = None
    ) -> AbstractAsyncContextManager[None]:
        """Hold the lock alone.

        Args:
            timeout: seconds to wait at most; 0 tries once, None is the timeout of this object.
            owner: the task that is to hold it, where another one does the waiting (a transaction
                whose first operation a child task awaits). None: the current task.

        Raises (on entry):
            LockTimeoutError: the lock was not free in time; names the file.
            TransactionReentryError: this task holds the lock already.
            PermissionDeniedError, ReadOnlyStoreError, DiskFullError, UnavailableError: the lock files
                cannot be created, opened or locked.
            StoreClosedError: after `close`.
        """
        return _Section(self, "write", timeout, owner)

    def shared(self, timeout: float | None = None) -> AbstractAsyncContextManager[None]:
        """Hold the lock together with others that share it. Otherwise as `exclusive`."""
        return _Section(self, "read", timeout)

    def close(self) -> None:
        """Close the files. A holder loses the lock, a waiter gets `StoreClosedError`."""
        self._closed = True
        self._main.close()
        self._turn.close()

    async def _acquire(self, task: asyncio.Task[Any], mode: Mode, timeout: float | None) -> None:
        wait = _Wait(mode, self._timeout if timeout is None else timeout)
        await self._tasks._acquire(task, mode, wait.timeout)
        try:
            if mode == "write":
                await self._pass_turnstile(wait)
            else:
                await self._join_readers(task, wait)
        except BaseException:
            self._tasks._release(task, mode)
            raise

    def _release(self, task: asyncio.Task[Any], mode: Mode) -> None:
        self._tasks._release(task, mode)
        if mode == "read":
            self._sharers -= 1
        if not self._sharers:
            self._main.unlock()

    async def _join_readers(self, task: asyncio.Task[Any], wait: _Wait) -> None:
        """Become one of the tasks for which this process has the lock file to read."""
        passages = self._passages
        try:
            await self._gate._acquire(task, "write", wait.left())
        except LockTimeoutError as exc:
            raise self._timed_out(wait) from exc
        try:
            # A reader that waited here while another passed the turnstile goes in with it, like
            # readers next to one another in a queue.
            if passages == self._passages or self._main.held is None:
                await self._pass_turnstile(wait)
                self._passages += 1
            self._sharers += 1
        finally:
            self._gate._release(task, "write")

    async def _pass_turnstile(self, wait: _Wait) -> None:
        """Have the lock file for this process, once those before it in the line have had it."""
        await self._poll(self._turn, wait, True, _MAX_PAUSE_SECONDS)
        try:
            if self._main.held is None:
                await self._poll(self._main, wait, wait.mode == "write", _NEXT_IN_LINE_PAUSE)
        finally:
            self._turn.unlock()

    async def _poll(
        self, lock: FileLock, wait: _Wait, exclusive: bool, longest_pause: float
    ) -> None:
        began = 0.0
        while not self._closed:
            if lock.try_lock(exclusive):
                return
            left = wait.left()
            if left <= 0:
                raise self._timed_out(wait)
            now = monotonic()
            began = began or now
            # In proportion to the wait so far: the lock then lies idle for a small part of it, be
            # it short or long. Doubling would leave it idle for as long as it was waited for.
            pause = min(max(_FIRST_PAUSE, (now - began) * _PAUSE_SHARE), longest_pause)
            # Jitter, so that processes that began to wait together do not go on in step.
            await asyncio.sleep(min(pause * (0.5 + random() / 2), left))
        raise StoreClosedError(f"the lock {self._path} was closed")

    def _timed_out(self, wait: _Wait) -> LockTimeoutError:
        return LockTimeoutError(
            f"the lock {self._path} was not free to {wait.mode} within {wait.timeout:g} s: "
            "another process, or another store of this one, holds it"
        )


class _Wait:
    """What one acquire waits for, and how long in all."""

    __slots__ = ("_deadline", "mode", "timeout")

    def __init__(self, mode: Mode, timeout: float) -> None:
        self.mode: Mode = mode
        self.timeout = timeout
        self._deadline = monotonic() + timeout

    def left(self) -> float:
        return self._deadline - monotonic()
