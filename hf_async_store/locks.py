"""Locks: between the tasks of one event loop, and between operating-system processes.

`ReaderWriterLock` is for tasks. `FileLock` is for processes: it is synchronous and makes one attempt.
`LockManager` combines the two: a task acquires the first, then the second. Linux and macOS.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections import OrderedDict
from contextlib import suppress
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from msgspec import Struct

from hf_async_store.backoff import between
from hf_async_store.errors import LockTimeoutError, StoreClosedError, TransactionReentryError
from hf_async_store.lock_signals import WaitingLine
from hf_async_store.locked_descriptors import close_locked, register_locked
from hf_async_store.os_errors import translate_os_error
from hf_async_store.ownership import share

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from hf_async_store.ownership import Ownership

Mode: TypeAlias = Literal["read", "write"]
_GERUNDS: Final[dict[Mode, str]] = {"read": "reading", "write": "writing"}

_FIRST_PAUSE: Final = 0.0003
"""The pause between the first two attempts to lock a file."""

_PAUSE_FRACTION: Final = 1 / 8
"""Each further pause is this fraction of the time waited so far."""

_MAX_PAUSE_SECONDS: Final = 0.005
"""The longest pause between two attempts by a process that is not next in line. A process that has
waited long polls less often than a new one, so a larger maximum delays it further: with 20 ms, the
longest wait of eight processes that compete for 10 ms each is 2.5 times as long, at the same
throughput."""

_OPEN: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Symbolic links are not followed: a user who can write to the folder could link the lock file to a
file of another user."""

_NEXT_IN_LINE_PAUSE: Final = 0.001
"""The longest pause between two attempts by the one process that is next in line."""


class _LockContext(Struct, eq=False):
    """An async context manager that holds a lock, for one holder."""

    lock: ReaderWriterLock | LockManager
    mode: Mode
    timeout: float | None
    task: asyncio.Task[Any] | None = None
    """The holder; None: the task that enters the context."""

    async def __aenter__(self) -> None:
        self.task = self.task or this_task()
        await self.lock.acquire(self.mode, self.timeout, self.task)

    async def __aexit__(self, *exc_info: object) -> None:
        # Released for the task that acquired it, which may not be the current one: the event loop
        # closes an abandoned async generator in a separate task.
        self.lock.release(self.mode, self.task)


class ReaderWriterLock:
    """A lock that many tasks may hold to read, or one task to write, on one event loop.

    * Waiters are served in the order of their arrival. Consecutive readers at the head of the
      queue are admitted together; a reader that arrives while a writer waits queues behind it.
      Neither readers nor writers starve.
    * The task that acquires the lock is the holder, and only the holder may release it. A holder
      that acquires the lock again, in either mode, would wait for itself: this raises an error
      immediately.
    * A waiter may be cancelled or time out at any moment, even after the lock was granted to it
      and before the task resumed. The lock is then granted to the next waiter.
    * Acquiring a free lock does not suspend.

    Args:
        name: the name of the lock in error messages.
    """

    # `_admit` grants the lock to waiters without an await, in the step in which the lock becomes
    # free; the future of a waiter only wakes its task. The lock is therefore never free while it
    # is reserved for a waiter, and a waiter that is cancelled has only to remove its own entry.

    __slots__ = ("_name", "_queue", "_readers", "_writer")

    def __init__(self, name: str = "the lock") -> None:
        self._name = name
        self._readers: set[asyncio.Task[Any]] = set()
        self._writer: asyncio.Task[Any] | None = None
        # A future's result is true if the lock was granted, false after a timeout. Not a deque:
        # removing a waiter from the middle must not take a scan of the queue.
        self._queue: OrderedDict[asyncio.Future[bool], tuple[asyncio.Task[Any], Mode]] = (
            OrderedDict()
        )

    @property
    def readers(self) -> int:
        """The number of tasks that hold the lock to read."""
        return len(self._readers)

    @property
    def has_writer(self) -> bool:
        """Whether a task holds the lock to write."""
        return self._writer is not None

    @property
    def waiting(self) -> int:
        """The number of tasks that wait, in either mode."""
        return len(self._queue)

    def holds(self, task: asyncio.Task[Any] | None = None) -> Mode | None:
        """The mode in which `task`, by default the current one, holds the lock; None if it does not.

        A waiter holds the lock as soon as it is granted, even before the task resumes.
        """
        task = task or this_task()
        if task is self._writer:
            return "write"
        return "read" if task in self._readers else None

    def reading(self, timeout: float | None = None) -> AbstractAsyncContextManager[None]:
        """`acquire("read")` on entry, `release("read")` on exit."""
        return _LockContext(self, "read", timeout)

    def writing(
        self, timeout: float | None = None, *, owner: asyncio.Task[Any] | None = None
    ) -> AbstractAsyncContextManager[None]:
        """`acquire("write")` on entry, `release("write")` on exit, for `owner` or the current task."""
        return _LockContext(self, "write", timeout, owner)

    async def acquire(
        self, mode: Mode, timeout: float | None = None, task: asyncio.Task[Any] | None = None
    ) -> None:
        """Hold the lock: to read together with other readers, to write alone.

        Args:
            timeout: seconds to wait at most; 0 makes one attempt, None waits without a limit.
            task: the holder, by default the current task.

        Raises:
            LockTimeoutError: the lock did not become free in time.
            TransactionReentryError: the task already holds the lock.
        """
        task = task or this_task()
        if not self.try_acquire(mode, task):
            await self._wait(task, mode, timeout)

    def try_acquire(self, mode: Mode, task: asyncio.Task[Any]) -> bool:
        """Hold the lock if it is free; whether it was."""
        free = self._writer is None
        if free and mode == "write" and not self._readers:
            # The queue need not be checked: the task that releases the lock grants it to a waiter
            # in the same step, so a free lock has no waiter other than cancelled ones.
            self._writer = task
        elif free and mode == "read" and not self._queue and task not in self._readers:
            self._readers.add(task)
        else:
            return False
        return True

    def release(self, mode: Mode, task: asyncio.Task[Any] | None = None) -> None:
        """Release the lock.

        Raises:
            RuntimeError: the task does not hold the lock in this mode.
        """
        task = task or this_task()
        if mode == "read" and task in self._readers:
            self._readers.remove(task)
        elif mode == "write" and task is self._writer:
            self._writer = None
        else:
            raise RuntimeError(f"this task does not hold {self._name} for {_GERUNDS[mode]}")
        if self._queue:
            self._admit()

    async def _wait(self, task: asyncio.Task[Any], mode: Mode, timeout: float | None) -> None:
        held = self.holds(task)
        if held is not None:
            raise TransactionReentryError(
                f"this task already holds {self._name} for {_GERUNDS[held]}: "
                f"acquiring it for {_GERUNDS[mode]} would wait for itself"
            )
        limit = inf if timeout is None else timeout
        if limit <= 0:
            raise self._timed_out(mode, limit)
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[bool] = loop.create_future()
        self._queue[granted] = task, mode
        # A timer rather than `asyncio.timeout`, which cancels the task: the timeout, or the grant,
        # takes effect in one step, and cannot be confused with a cancellation by the caller.
        timer = None if limit == inf else loop.call_later(limit, self._expire, granted)
        try:
            in_time = await granted
        except BaseException:
            # Cancelled, either while in the queue or after the lock was granted. Only the effect of
            # this wait is undone: `task` may hold the lock through another wait on its behalf.
            self._queue.pop(granted, None)
            if granted.done() and not granted.cancelled() and granted.result():
                self.release(mode, task)
            else:
                self._admit()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if not in_time:
            raise self._timed_out(mode, limit)

    def _expire(self, granted: asyncio.Future[bool]) -> None:
        """End the wait of a waiter whose timeout has passed."""
        if not granted.done():
            del self._queue[granted]
            granted.set_result(False)
            self._admit()

    def _admit(self) -> None:
        """Grant the lock to the waiters at the head of the queue that can hold it now."""
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
            # else: the waiter was cancelled, and its task has not resumed yet. It must neither get
            # the lock nor delay the waiters behind it.
            del queue[granted]

    def _timed_out(self, mode: Mode, timeout: float) -> LockTimeoutError:
        holders = "a writer" if self.has_writer else _counted(self.readers, "reader")
        return LockTimeoutError(
            f"{self._name} was not free for {_GERUNDS[mode]} within {timeout:g} s: "
            f"held by {holders}, {self.waiting} waiting"
        )


def this_task() -> asyncio.Task[Any]:
    """The current task, which can hold a lock."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a lock can be acquired and released only inside an asyncio task")
    return task


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class FileLock:
    """A lock between processes: `flock` on a file that serves no other purpose.

    It is synchronous and makes one attempt at a time. The file is created at the first attempt and
    is never deleted; deleting it while the lock is held breaks the lock. The lock of a process that
    dies is released. Two objects exclude one another, even within one process; one object must not
    be used by two threads at a time.

    A forked child does not have the file any more (`locked_descriptors`): it neither keeps nor releases
    the lock of its parent. It must not use the locks of its parent; the layers above refuse such use.

    Args:
        owned: called when the file has to be created; returns its owner, group and mode. None: the
            user of this process, and mode 0600.

    Attributes:
        descriptor: of the file; None if it is not open.
        held: the mode in which this object holds the lock; None if it does not.
    """

    __slots__ = ("_identity", "_owned", "_path", "descriptor", "held")

    def __init__(
        self,
        path: str | os.PathLike[str],
        owned: Callable[[], Ownership | None] = lambda: None,
    ) -> None:
        self._path = os.fspath(path)
        self._owned = owned
        self.descriptor: int | None = None
        self._identity = (0, 0)
        self.held: Literal["shared", "exclusive"] | None = None

    @property
    def path(self) -> str:
        return self._path

    def try_lock(self, exclusive: bool) -> bool:
        """Acquire the lock if it is free; return False if it is not. Never waits.

        Raises:
            PermissionDeniedError, ReadOnlyStoreError, DiskFullError, UnavailableError: the file cannot
                be created, opened or locked. Nothing is held.
            RuntimeError: this object already holds the lock.
        """
        if self.held is not None:
            raise RuntimeError(f"{self._path} is already locked ({self.held}) by this object")
        operation = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            # Two attempts, because the file may have been replaced since it was opened. No more:
            # some file systems may never report the same inode number twice for one file.
            for _ in range(2):
                fd = self._open_file() if self.descriptor is None else self.descriptor
                fcntl.flock(fd, operation | fcntl.LOCK_NB)
                if self._is_current():
                    self.held = "exclusive" if exclusive else "shared"
                    return True
                self.close()
        except BlockingIOError:
            pass
        except OSError as exc:
            self.close()
            raise translate_os_error(exc, f"lock {self._path}") from exc
        return False

    def unlock(self) -> None:
        """Release the lock; does nothing if it is not held. Never raises."""
        if self.held is not None and self.descriptor is not None:
            self.held = None
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            except OSError:
                self.close()

    def close(self) -> None:
        """Release the lock and close the file; a later attempt opens it again. Never raises."""
        # Unlocked first, because a child process between fork and exec still has the descriptor:
        # if only this process closed it, the child would keep the lock.
        self.unlock()
        fd, self.descriptor = self.descriptor, None
        if fd is not None:
            with suppress(OSError):
                close_locked(fd)

    def _open_file(self) -> int:
        try:
            fd = os.open(self._path, _OPEN)
        except FileNotFoundError:
            fd = self._create()
        self.descriptor = register_locked(fd)
        stat = os.fstat(fd)
        self._identity = stat.st_dev, stat.st_ino
        return fd

    def _create(self) -> int:
        owned = self._owned()
        if owned is None:
            return os.open(self._path, _OPEN | os.O_CREAT, 0o600)
        # The file is linked to its path only after its owner and mode are set: another process may
        # open it at any moment.
        temporary = f"{self._path}.{os.urandom(4).hex()}.tmp"
        fd = os.open(temporary, _OPEN | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            share(fd, owned)
            self._publish(temporary)
        except BaseException:
            os.close(fd)
            raise
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)  # noqa: PTH108  # as everywhere in this class
        return fd

    def _publish(self, temporary: str) -> None:
        """Link a new lock file to its path. If another process was first, `_is_current` detects it."""
        try:
            os.link(temporary, self._path)
        except FileExistsError:
            pass
        except OSError:
            if os.path.lexists(self._path):
                return
            os.rename(temporary, self._path)  # noqa: PTH104  # a file system without hard links

    def _is_current(self) -> bool:
        """Whether the locked file is still the one at the path, which other processes open."""
        try:
            stat = os.stat(self._path)  # noqa: PTH116 - once per acquire, and a Path is slower
        except FileNotFoundError:
            return False
        return (stat.st_dev, stat.st_ino) == self._identity


class LockManager:
    """A reader-writer lock between all tasks of all processes that use one path.

    A task first acquires a `ReaderWriterLock`, with the guarantees of that class, and then the lock
    between processes. Each release wakes the process whose turn it is (`WaitingLine`); a process without
    signals polls with pauses of at most 5 ms. A process that acquires the lock in a loop, to read or to
    write, does not starve another. The lock of a process that dies is released. Acquiring a free lock does
    not suspend; a cancelled or failed acquire leaves nothing held.

    It must not be used in a forked child (see `FileLock`).

    Args:
        path: the lock file. A second file in the same folder has the suffix `.turn`. Both are
            created at the first use and are never deleted.
        timeout: the default for the total number of seconds that an acquire may take.
        owned: see `FileLock`.
        while_waiting: called again and again while the lock is not free; what it returns is awaited.
    """

    # The turnstile: a process that wants the lock file first locks `.turn`, and keeps it until it
    # has the lock file. With polling alone, a process that releases and acquires the lock in a
    # tight loop would win nearly always, since the others sleep when the lock is free for a few
    # microseconds. With the turnstile, another process gets `.turn` while the looping process works
    # (it keeps `.turn` for microseconds only), and from then on the looping process has to wait for
    # it. For the same reason readers pass the turnstile even if this process already holds the lock
    # file to read: otherwise overlapping readers would block a writer of another process forever.

    def __init__(
        self,
        path: Path,
        *,
        timeout: float = 30.0,
        owned: Callable[[], Ownership | None] = lambda: None,
        while_waiting: Callable[[], Awaitable[None] | None] = lambda: None,
    ) -> None:
        self._path = path
        self._timeout = timeout
        self._while_waiting = while_waiting
        self._closed = False
        self._main = FileLock(path, owned)
        self._turnstile = FileLock(f"{os.fspath(path)}.turn", owned)
        self._line = WaitingLine(lambda: self._turnstile.descriptor)
        self._tasks = ReaderWriterLock(f"the lock {path}")
        # One reader at a time locks the files for all readers of this process.
        self._gate = ReaderWriterLock(f"the lock {path}")
        self._sharers = 0
        self._passages = 0

    @property
    def exclusive_held(self) -> bool:
        """Whether this object holds the lock file exclusively."""
        return self._main.held == "exclusive"

    def holds(self, task: asyncio.Task[Any] | None = None) -> Mode | None:
        """The mode in which `task`, by default the current one, holds the lock between tasks."""
        return self._tasks.holds(task)

    def exclusive(
        self, timeout: float | None = None, *, owner: asyncio.Task[Any] | None = None
    ) -> AbstractAsyncContextManager[None]:
        """Hold the lock alone.

        Args:
            timeout: seconds to wait at most; 0 makes one attempt, None is the timeout of this
                object.
            owner: the task that is to hold the lock, if another task waits for it (a transaction
                whose first operation is awaited by a child task). None: the current task.

        Raises (on entry):
            LockTimeoutError: the lock did not become free in time; the message names the file.
            TransactionReentryError: this task already holds the lock.
            PermissionDeniedError, ReadOnlyStoreError, DiskFullError, UnavailableError: the lock files
                cannot be created, opened or locked.
            StoreClosedError: after `close`.
        """
        return _LockContext(self, "write", timeout, owner)

    def shared(self, timeout: float | None = None) -> AbstractAsyncContextManager[None]:
        """Hold the lock together with other readers. Otherwise as `exclusive`."""
        return _LockContext(self, "read", timeout)

    def close(self) -> None:
        """Close the files. The lock is released, and `StoreClosedError` is raised in waiters."""
        self._closed = True
        if self._main.held is not None:
            self.hand_on()
        self._line.close()
        self._main.close()
        self._turnstile.close()

    async def acquire(self, mode: Mode, timeout: float | None, task: asyncio.Task[Any]) -> None:
        """See `exclusive`, which releases the lock again."""
        wait = _Wait(mode, self._timeout if timeout is None else timeout)
        # Mostly both locks are free, and then nothing is awaited: a coroutine for each step takes longer.
        if not self._tasks.try_acquire(mode, task):
            await self._tasks.acquire(mode, wait.timeout, task)
        try:
            if mode == "read":
                await self._join_readers(task, wait)
            elif not self._pass_at_once(mode):
                await self._pass_turnstile(wait)
        except BaseException:
            self._tasks.release(mode, task)
            raise

    def release(self, mode: Mode, task: asyncio.Task[Any] | None) -> None:
        self._tasks.release(mode, task)
        if mode == "read":
            self._sharers -= 1
        if not self._sharers and self._main.held is not None:
            self.hand_on()

    @property
    def is_awaited(self) -> bool:
        """Whether another process waits for the lock and can be woken."""
        return self._line.is_waiting()

    def hand_on(self) -> None:
        """Let other processes have the lock, although the task that holds it has not released it yet: the
        other tasks of this process still wait for that.

        Another thread may call this while the task waits.
        """
        self._main.unlock()
        self._line.wake()

    async def _join_readers(self, task: asyncio.Task[Any], wait: _Wait) -> None:
        """Register as one of the tasks for which this process holds the lock file to read."""
        passages = self._passages
        try:
            await self._gate.acquire("write", wait.remaining(), task)
        except LockTimeoutError as exc:
            raise self._timed_out(wait) from exc
        try:
            # A reader that waited here while another reader passed the turnstile is admitted
            # together with it, like consecutive readers in a queue.
            if passages == self._passages or self._main.held is None:
                if not self._pass_at_once("read"):
                    await self._pass_turnstile(wait)
                self._passages += 1
                self._line.wake()  # another reader may join
            self._sharers += 1
        finally:
            self._gate.release("write", task)

    async def _pass_turnstile(self, wait: _Wait) -> None:
        """Lock the file for this process, in the order in which processes wait."""
        try:
            if not await self._pass_when_woken(wait):
                # If another process was faster, this one is the next now.
                await self._lock(self._turnstile, wait, True, _MAX_PAUSE_SECONDS)
                if self._main.held is None:
                    await self._lock(self._main, wait, wait.mode == "write", _NEXT_IN_LINE_PAUSE)
        except BaseException:
            self._turnstile.unlock()
            self._line.leave()
            self._line.wake()  # the signal for this process may be in vain
            raise
        self._turnstile.unlock()
        self._line.leave()

    def _pass_at_once(self, mode: Mode) -> bool:
        """Lock the file if no other process waits for it, has it or is next in line."""
        return not self._line.is_waiting() and self._try_to_pass(mode)

    def _try_to_pass(self, mode: Mode) -> bool:
        """Lock the file if no other process has it or is next in line."""
        if self._closed or not self._turnstile.try_lock(exclusive=True):
            return False
        try:
            return self._main.held is not None or self._main.try_lock(mode == "write")
        finally:
            self._turnstile.unlock()

    async def _pass_when_woken(self, wait: _Wait) -> bool:
        """Wait for a signal, at most for a moment; whether the file is locked then."""
        if wait.remaining() <= 0 or not self._line.join(is_next=False):
            return False
        if self._pass_at_once(wait.mode):
            return True  # it was unlocked before this process had joined
        if (work := self._while_waiting()) is not None:
            await work
        await self._line.wait(min(_MAX_PAUSE_SECONDS, wait.remaining()))
        return self._try_to_pass(wait.mode)

    async def _lock(
        self, lock: FileLock, wait: _Wait, exclusive: bool, longest_pause: float
    ) -> None:
        started = 0.0
        is_signalled = False
        while not self._closed:
            if lock.try_lock(exclusive):
                return
            remaining = wait.remaining()
            if remaining <= 0:
                raise self._timed_out(wait)
            if not started:
                started = monotonic()
                is_signalled = self._line.join(is_next=lock is self._main)
                if is_signalled:
                    continue  # the lock may have been released before
            if (work := self._while_waiting()) is not None:
                await work
            if is_signalled:
                await self._line.wait(min(longest_pause, remaining))
            else:
                await asyncio.sleep(min(_pause(monotonic() - started, longest_pause), remaining))
        raise StoreClosedError(f"the lock {self._path} was closed")

    def _timed_out(self, wait: _Wait) -> LockTimeoutError:
        return LockTimeoutError(
            f"the lock {self._path} was not free for {_GERUNDS[wait.mode]} within {wait.timeout:g} s: "
            "another process, or another store object of this process, holds it"
        )


class _Wait:
    """The mode and the deadline of one acquire."""

    __slots__ = ("_deadline", "mode", "timeout")

    def __init__(self, mode: Mode, timeout: float) -> None:
        self.mode: Mode = mode
        self.timeout = timeout
        self._deadline = monotonic() + timeout

    def remaining(self) -> float:
        return self._deadline - monotonic()


def _pause(waited: float, longest: float) -> float:
    """The pause between two attempts of a process without signals that has waited for so many seconds."""
    # In proportion to the wait so far: the lock is then idle for a small fraction of any wait. With doubled
    # pauses it could be idle for as long as the wait lasted.
    pause = min(max(_FIRST_PAUSE, waited * _PAUSE_FRACTION), longest)
    # Jitter, so that processes that began to wait together do not poll at the same times.
    return pause * between(0.5, 1)
