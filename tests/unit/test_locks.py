"""The guarantees of the locks, within a process and between real processes."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import os
import signal
import stat
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any

import pytest

from hf_async_store import lock_signals, locks
from hf_async_store.errors import (
    DiskFullError,
    LockTimeoutError,
    PermissionDeniedError,
    ReadOnlyStoreError,
    StorageError,
    StoreClosedError,
    TransactionReentryError,
    UnavailableError,
)
from hf_async_store.locks import FileLock, LockManager, ReaderWriterLock
from hf_async_store.os_errors import translate_os_error

Section = AbstractAsyncContextManager[None]


class Visit:
    """A task that acquires a lock, records that, and holds it until it is told to release it."""

    def __init__(self, section: Section, name: str = "", log: list[str] | None = None) -> None:
        self._section = section
        self._name = name
        self._log = log if log is not None else []
        self._told = asyncio.Event()
        self.inside = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self._section:
            self._log.append(self._name)
            self.inside.set()
            await self._told.wait()

    async def leave(self) -> None:
        self._told.set()
        await self.task

    async def cancelled(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


async def settle() -> None:
    """Run all callbacks that are ready, without waiting for timers."""
    for _ in range(10):
        await asyncio.sleep(0)


def assert_free(lock: ReaderWriterLock) -> None:
    assert (lock.readers, lock.has_writer, lock.waiting) == (0, False, 0)


# -- ReaderWriterLock: order ----------------------------------------------------------------


async def test_readers_share_and_a_writer_is_alone() -> None:
    lock = ReaderWriterLock()
    first, second = Visit(lock.reading()), Visit(lock.reading())
    await settle()
    assert (lock.readers, lock.has_writer) == (2, False)
    writer = Visit(lock.writing())
    await settle()
    assert (lock.readers, lock.has_writer, lock.waiting) == (2, False, 1)
    await first.leave()
    assert not lock.has_writer
    await second.leave()
    assert (lock.readers, lock.has_writer, lock.waiting) == (0, True, 0)
    await writer.leave()
    assert_free(lock)


async def test_waiters_are_served_in_the_order_in_which_they_came() -> None:
    lock = ReaderWriterLock()
    log: list[str] = []
    held = Visit(lock.writing())
    await settle()
    queue: dict[str, Visit] = {}
    for name in ("r1", "r2", "w1", "r3", "w2", "w3", "r4", "r5"):
        section = lock.reading() if name[0] == "r" else lock.writing()
        queue[name] = Visit(section, name, log)
        await settle()
    assert lock.waiting == 8
    await held.leave()

    async def step(*names: str) -> None:
        """Assert that exactly these tasks acquire the lock; let them release it."""
        log.clear()
        await settle()
        assert [name for name, visit in queue.items() if visit.inside.is_set()] == list(names)
        for name in names:
            await queue.pop(name).leave()

    await step("r1", "r2")
    await step("w1")
    await step("r3")
    await step("w2")
    await step("w3")
    await step("r4", "r5")
    assert_free(lock)


async def test_a_stream_of_readers_does_not_starve_a_writer() -> None:
    lock = ReaderWriterLock()
    reader = Visit(lock.reading())
    await settle()
    writer = Visit(lock.writing())
    await settle()
    for _ in range(100):  # a reader is always inside when the next one comes
        following = Visit(lock.reading())
        await settle()
        if not reader.task.done():
            await reader.leave()
        if writer.inside.is_set():
            break
        reader = following
    assert writer.inside.is_set()
    assert not following.inside.is_set()
    await writer.leave()
    await following.leave()
    assert_free(lock)


async def test_a_stream_of_writers_does_not_starve_a_reader() -> None:
    lock = ReaderWriterLock()
    log: list[str] = []
    writer = Visit(lock.writing(), "w0", log)
    await settle()
    reader = Visit(lock.reading(), "r", log)
    await settle()
    for number in range(1, 4):
        following = Visit(lock.writing(), f"w{number}", log)
        await settle()
        if number == 2:
            await reader.leave()
        await writer.leave()
        writer = following
    await writer.leave()
    assert log == ["w0", "r", "w1", "w2", "w3"]


async def test_a_writer_that_reacquires_queues_behind_the_others() -> None:
    lock = ReaderWriterLock()
    log: list[str] = []

    async def work(name: str) -> None:
        for _ in range(3):
            async with lock.writing():
                log.append(name)
                await asyncio.sleep(0)

    await asyncio.gather(work("a"), work("b"))
    assert log == ["a", "b"] * 3


async def test_a_free_lock_is_taken_without_suspending() -> None:
    lock = ReaderWriterLock()
    others_ran: list[bool] = []
    asyncio.get_running_loop().call_soon(others_ran.append, True)
    await lock.acquire("read", timeout=0)
    lock.release("read")
    await lock.acquire("write", timeout=0)
    lock.release("write")
    async with lock.reading(), ReaderWriterLock().writing():
        pass
    assert not others_ran
    await asyncio.sleep(0)
    assert others_ran


# -- ReaderWriterLock: ownership ------------------------------------------------------------


GERUNDS = {"read": "reading", "write": "writing"}


@pytest.mark.parametrize("held", ["read", "write"])
@pytest.mark.parametrize("wanted", ["read", "write"])
@pytest.mark.parametrize("others_wait", [False, True])
async def test_re_entry_upgrade_and_downgrade_are_refused_at_once(
    held: str, wanted: str, others_wait: bool
) -> None:
    lock = ReaderWriterLock("the lock of the store")
    sections: dict[str, Callable[[], Section]] = {"read": lock.reading, "write": lock.writing}
    async with sections[held]():
        other = Visit(lock.writing()) if others_wait else None
        await settle()
        with pytest.raises(TransactionReentryError) as caught:
            async with sections[wanted]():
                pass
        assert str(caught.value) == (
            f"this task already holds the lock of the store for {GERUNDS[held]}: "
            f"acquiring it for {GERUNDS[wanted]} would wait for itself"
        )
        assert lock.holds() == held
    if other:
        await settle()
        await other.leave()
    assert_free(lock)


async def test_a_child_task_is_not_its_parent() -> None:
    lock = ReaderWriterLock()
    async with lock.writing():
        with pytest.raises(LockTimeoutError):
            await asyncio.create_task(lock.acquire("read", timeout=0))
    assert_free(lock)


async def test_holds_is_per_task() -> None:
    lock = ReaderWriterLock()
    reader = Visit(lock.reading())
    await settle()
    writer = Visit(lock.writing())
    await settle()
    assert (lock.holds(), lock.holds(reader.task), lock.holds(writer.task)) == (None, "read", None)
    await reader.leave()
    assert (lock.holds(reader.task), lock.holds(writer.task)) == (None, "write")
    await writer.leave()


async def test_only_the_holder_may_release() -> None:
    lock = ReaderWriterLock()
    with pytest.raises(RuntimeError, match="this task does not hold the lock for reading"):
        lock.release("read")
    with pytest.raises(RuntimeError, match="this task does not hold the lock for writing"):
        lock.release("write")
    writer = Visit(lock.writing())
    await settle()
    with pytest.raises(RuntimeError, match="does not hold the lock for writing"):
        lock.release("write")
    await writer.leave()
    async with lock.reading():
        with pytest.raises(RuntimeError, match="does not hold the lock for writing"):
            lock.release("write")
    assert_free(lock)


async def test_an_async_generator_that_another_task_closes_releases_its_lock() -> None:
    lock = ReaderWriterLock()

    async def rows() -> AsyncIterator[int]:
        async with lock.reading():
            yield 1

    abandoned = rows()
    assert await asyncio.create_task(anext(abandoned)) == 1  # type: ignore[arg-type]
    assert lock.readers == 1
    await abandoned.aclose()  # type: ignore[attr-defined]
    assert_free(lock)


def test_a_lock_is_bound_to_an_event_loop_at_its_first_use() -> None:
    lock = ReaderWriterLock()

    async def contend() -> None:
        async with lock.writing():
            waiter = Visit(lock.reading())
            await settle()
        await settle()
        await waiter.leave()

    asyncio.run(contend())
    asyncio.run(contend())
    assert_free(lock)


def test_outside_a_task_a_lock_is_refused() -> None:
    lock = ReaderWriterLock()
    refused: list[str] = []

    def callback() -> None:
        try:
            lock.acquire("write").send(None)
        except RuntimeError as exc:
            refused.append(str(exc))

    async def main() -> None:
        asyncio.get_running_loop().call_soon(callback)
        await settle()

    asyncio.run(main())
    assert refused == ["a lock can be acquired and released only inside an asyncio task"]
    assert_free(lock)


# -- ReaderWriterLock: time and cancellation ------------------------------------------------


@pytest.mark.parametrize("timeout", [0, -1, 0.01])
async def test_a_timeout_names_the_lock_and_its_holders(timeout: float) -> None:
    lock = ReaderWriterLock("the lock of the store")
    readers = [Visit(lock.reading()) for _ in range(2)]
    await settle()
    with pytest.raises(LockTimeoutError) as caught:
        await lock.acquire("write", timeout)
    assert caught.value.retryable
    assert str(caught.value) == (
        f"the lock of the store was not free for writing within {timeout:g} s: "
        "held by 2 readers, 0 waiting"
    )
    for each in readers:
        await each.leave()
    async with lock.writing():
        other = asyncio.create_task(lock.acquire("read", timeout))
        with pytest.raises(
            LockTimeoutError, match=r"for reading within .* s: held by a writer, 0 wait"
        ):
            await other
    assert_free(lock)


async def test_readers_behind_a_writer_that_times_out_acquire_the_lock() -> None:
    lock = ReaderWriterLock()
    reader = Visit(lock.reading())
    await settle()
    writer = Visit(lock.writing(timeout=0.02))
    await settle()
    following = [Visit(lock.reading()) for _ in range(3)]
    await settle()
    assert lock.waiting == 4
    with pytest.raises(LockTimeoutError):
        await writer.task
    await settle()
    assert (lock.readers, lock.waiting) == (4, 0)
    for each in (reader, *following):
        await each.leave()
    assert_free(lock)


async def test_readers_behind_a_cancelled_writer_acquire_the_lock() -> None:
    lock = ReaderWriterLock()
    reader = Visit(lock.reading())
    await settle()
    writer = Visit(lock.writing())
    await settle()
    following = [Visit(lock.reading()) for _ in range(3)]
    await settle()
    await writer.cancelled()
    await settle()
    assert (lock.readers, lock.waiting) == (4, 0)
    for each in (reader, *following):
        await each.leave()
    assert_free(lock)


@pytest.mark.parametrize("following", ["reading", "writing"])
@pytest.mark.parametrize("lost", ["reading", "writing"])
async def test_a_waiter_cancelled_after_the_hand_over_passes_the_lock_on(
    lost: str, following: str
) -> None:
    lock = ReaderWriterLock()
    await lock.acquire("write")
    victim = Visit(getattr(lock, lost)())
    await settle()
    heir = Visit(getattr(lock, following)())
    await settle()
    lock.release("write")
    assert lock.holds(victim.task) == lost.removesuffix("ing").replace("writ", "write")
    victim.task.cancel()
    await settle()
    assert victim.task.cancelled()
    assert not victim.inside.is_set()
    assert heir.inside.is_set()
    await heir.leave()
    assert_free(lock)


async def test_a_waiter_cancelled_just_before_the_release_is_skipped() -> None:
    lock = ReaderWriterLock()
    await lock.acquire("write")
    victim, heir = Visit(lock.writing()), Visit(lock.writing())
    await settle()
    victim.task.cancel()
    lock.release("write")
    assert lock.holds(heir.task) == "write"
    await settle()
    assert victim.task.cancelled()
    await heir.leave()
    assert_free(lock)


async def test_the_last_waiter_cancelled_after_the_hand_over_leaves_the_lock_free() -> None:
    lock = ReaderWriterLock()
    await lock.acquire("read")
    victim = Visit(lock.writing())
    await settle()
    lock.release("read")
    await victim.cancelled()
    assert_free(lock)


@pytest.mark.parametrize("granted_first", [True, False])
async def test_a_timeout_and_a_hand_over_at_the_same_moment(granted_first: bool) -> None:
    """The first event decides; the other one has no effect."""
    lock = ReaderWriterLock()
    await lock.acquire("write")
    victim, heir = Visit(lock.writing(timeout=60)), Visit(lock.writing())
    await settle()
    promised = next(iter(lock._queue))
    if granted_first:
        lock.release("write")
        lock._expire(promised)
    else:
        lock._expire(promised)
        lock.release("write")
    await settle()
    assert victim.inside.is_set() is granted_first
    assert heir.inside.is_set() is not granted_first
    if granted_first:
        await victim.leave()
    else:
        with pytest.raises(LockTimeoutError):
            await victim.task
    await settle()
    await heir.leave()
    assert_free(lock)


async def test_a_cancellation_at_the_moment_of_the_timeout() -> None:
    lock = ReaderWriterLock()
    await lock.acquire("write")
    victim = Visit(lock.writing(timeout=60))
    await settle()
    lock._expire(next(iter(lock._queue)))
    await victim.cancelled()
    assert victim.task.cancelled()
    lock.release("write")
    assert_free(lock)


async def test_asyncio_timeout_around_a_wait() -> None:
    lock = ReaderWriterLock()
    writer = Visit(lock.writing())
    await settle()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), lock.reading():
            pass
    assert lock.waiting == 0
    await writer.leave()
    assert_free(lock)


async def test_a_holder_that_is_cancelled_or_fails_releases() -> None:
    lock = ReaderWriterLock()
    holder = Visit(lock.writing())
    await settle()
    await holder.cancelled()
    assert_free(lock)
    with pytest.raises(ZeroDivisionError):
        async with lock.reading():
            raise ZeroDivisionError
    assert_free(lock)


async def test_many_waiters_in_the_middle_of_the_queue_may_leave() -> None:
    lock = ReaderWriterLock()
    await lock.acquire("write")
    visits = [Visit(lock.reading() if n % 3 else lock.writing()) for n in range(3000)]
    await settle()
    assert lock.waiting == 3000
    for each in visits[100:]:
        each.task.cancel()
    await settle()
    assert lock.waiting == 100
    lock.release("write")
    for each in visits[:100]:
        await each.leave()
    assert_free(lock)


# -- FileLock and the errors of the operating system ----------------------------------------


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, DiskFullError),
        (errno.EDQUOT, DiskFullError),
        (errno.EMFILE, DiskFullError),
        (errno.ENFILE, DiskFullError),
        (errno.EACCES, PermissionDeniedError),
        (errno.EPERM, PermissionDeniedError),
        (errno.EROFS, ReadOnlyStoreError),
        (errno.EIO, UnavailableError),
        (errno.ENOENT, UnavailableError),
    ],
)
def test_os_errors_are_translated_by_one_table(number: int, kind: type[StorageError]) -> None:
    error = translate_os_error(OSError(number, os.strerror(number), "/secret"), "open /data")
    assert type(error) is kind
    assert str(error) == f"cannot open /data: {os.strerror(number)}"


def test_an_os_error_without_a_number_is_translated_too() -> None:
    error = translate_os_error(OSError("odd"), "open /data")
    assert type(error) is UnavailableError
    assert str(error) == "cannot open /data: odd"


@pytest.fixture
def file_lock(tmp_path: Path) -> Iterator[Callable[[], FileLock]]:
    """Creates locks on one file, one for each simulated process."""
    made: list[FileLock] = []

    def make() -> FileLock:
        made.append(FileLock(tmp_path / "lock"))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_file_lock_excludes(file_lock: Callable[[], FileLock]) -> None:
    first, second = file_lock(), file_lock()
    assert first.try_lock(exclusive=True)
    assert first.held == "exclusive"
    assert not second.try_lock(exclusive=True)
    assert not second.try_lock(exclusive=False)
    assert second.held is None
    first.unlock()
    assert second.try_lock(exclusive=False)
    assert first.try_lock(exclusive=False)
    assert {first.held, second.held} == {"shared"}
    first.unlock()
    assert not first.try_lock(exclusive=True)
    second.close()
    assert first.try_lock(exclusive=True)


def test_a_file_lock_is_lazy_private_and_not_inherited(
    file_lock: Callable[[], FileLock], tmp_path: Path
) -> None:
    lock = file_lock()
    assert lock.path == str(tmp_path / "lock")
    assert not (tmp_path / "lock").exists()
    lock.unlock()
    lock.close()
    assert lock.try_lock(exclusive=True)
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600
    assert lock.descriptor is not None
    assert fcntl.fcntl(lock.descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    lock.close()
    lock.close()
    assert lock.held is None
    assert lock.try_lock(exclusive=True)


def test_a_file_lock_cannot_be_acquired_twice(file_lock: Callable[[], FileLock]) -> None:
    lock = file_lock()
    assert lock.try_lock(exclusive=False)
    with pytest.raises(RuntimeError, match="already locked \\(shared\\) by this object"):
        lock.try_lock(exclusive=True)
    assert lock.held == "shared"


@pytest.mark.parametrize("change", ["unlinked", "renamed", "replaced"])
def test_a_file_lock_notices_that_its_file_was_replaced(
    change: str, file_lock: Callable[[], FileLock], tmp_path: Path
) -> None:
    old, new = file_lock(), file_lock()
    assert old.try_lock(exclusive=True)
    old.unlock()
    path = tmp_path / "lock"
    if change == "unlinked":
        path.unlink()
    elif change == "renamed":
        path.rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "other").touch()
        (tmp_path / "other").rename(path)
    assert new.try_lock(exclusive=True)
    assert not old.try_lock(exclusive=True)
    new.unlock()
    assert old.try_lock(exclusive=True)
    assert not new.try_lock(exclusive=True)


def test_a_file_that_is_replaced_again_and_again_does_not_hang(
    file_lock: Callable[[], FileLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = file_lock()
    with monkeypatch.context() as patched:
        patched.setattr(FileLock, "_is_current", lambda self: False)
        assert not lock.try_lock(exclusive=True)
    assert lock.try_lock(exclusive=True)


def test_a_file_lock_whose_file_cannot_be_opened(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "missing" / "lock")
    with pytest.raises(
        UnavailableError, match=r"cannot lock .*missing/lock: No such file"
    ) as caught:
        lock.try_lock(exclusive=True)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    (tmp_path / "missing").mkdir()
    assert lock.try_lock(exclusive=True)
    lock.close()


@pytest.mark.parametrize(("module", "name"), [(fcntl, "flock"), (os, "fstat"), (os, "stat")])
def test_a_file_lock_that_fails_half_way_holds_nothing(
    module: Any, name: str, file_lock: Callable[[], FileLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, other = file_lock(), file_lock()
    closed: list[int] = []
    really_close = os.close

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def close(fd: int) -> None:
        closed.append(fd)
        really_close(fd)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, refuse)
        patched.setattr(os, "close", close)
        with pytest.raises(UnavailableError, match=r"cannot lock .*/lock: Input/output error"):
            lock.try_lock(exclusive=True)
    assert len(closed) == 1
    assert lock.held is None
    assert other.try_lock(exclusive=True)


def test_unlock_cannot_fail(
    file_lock: Callable[[], FileLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, other = file_lock(), file_lock()
    assert lock.try_lock(exclusive=True)

    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        lock.unlock()
    assert lock.held is None
    assert other.try_lock(exclusive=True)


# -- LockManager: within one process --------------------------------------------------------


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Callable[..., LockManager]]:
    """Creates lock managers of one path. Two of them exclude one another like two processes."""
    made: list[LockManager] = []

    def make(**options: Any) -> LockManager:
        made.append(LockManager(tmp_path / "store.lock", **options))
        return made[-1]

    yield make
    for each in made:
        assert not each._main.held
        assert not each._turnstile.held
        assert_free(each._tasks)
        assert_free(each._gate)
        each.close()


Make = Callable[..., LockManager]


async def test_a_free_manager_is_taken_without_suspending(manager: Make) -> None:
    locker = manager()
    others_ran: list[bool] = []
    asyncio.get_running_loop().call_soon(others_ran.append, True)
    seen = []
    async with locker.exclusive(timeout=0):
        seen.append((locker.exclusive_held, locker.holds()))
    async with locker.shared(timeout=0):
        seen.append((locker.exclusive_held, locker.holds()))
    assert seen == [(True, "write"), (False, "read")]
    assert not others_ran
    assert locker.holds() is None


async def test_the_files_of_a_manager_are_created_at_first_use(
    manager: Make, tmp_path: Path
) -> None:
    locker = manager()
    assert list(tmp_path.iterdir()) == []
    async with locker.shared():
        pass
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()}
    assert modes == {"store.lock": 0o600, "store.lock.turn": 0o600}


async def test_managers_exclude_one_another(manager: Make, tmp_path: Path) -> None:
    here, there = manager(), manager(timeout=0.01)
    path = tmp_path / "store.lock"
    async with here.exclusive():
        for section, mode in ((there.exclusive, "writing"), (there.shared, "reading")):
            with pytest.raises(LockTimeoutError) as caught:
                async with section():
                    pass
            assert str(caught.value) == (
                f"the lock {path} was not free for {mode} within 0.01 s: "
                "another process, or another store object of this process, holds it"
            )
    async with here.shared(), there.shared():
        with pytest.raises(LockTimeoutError):
            await asyncio.create_task(there.exclusive(0).__aenter__())
    async with there.exclusive(0):
        pass


async def test_a_timeout_within_the_process_names_the_file_too(
    manager: Make, tmp_path: Path
) -> None:
    locker = manager(timeout=0.01)
    holder = Visit(locker.exclusive())
    await settle()
    with pytest.raises(
        LockTimeoutError, match=f"the lock {tmp_path}/store.lock was not free for reading"
    ):
        async with locker.shared():
            pass
    await holder.leave()


async def test_the_timeout_covers_both_stages(
    manager: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for the file lock gets only the time that the wait for other tasks did not use."""
    now = 100.0
    monkeypatch.setattr(locks, "monotonic", lambda: now)
    here, there = manager(), manager()
    file_holder = Visit(there.exclusive())
    task_holder = Visit(here._tasks.writing())
    await settle()
    victim = Visit(here.exclusive(timeout=5))
    await settle()
    now += 6
    await task_holder.leave()
    with pytest.raises(LockTimeoutError, match="within 5 s: another process, or another"):
        await asyncio.wait_for(victim.task, 4)
    await file_holder.leave()


@pytest.mark.parametrize("held", ["exclusive", "shared"])
@pytest.mark.parametrize("wanted", ["exclusive", "shared"])
async def test_a_manager_refuses_re_entry(held: str, wanted: str, manager: Make) -> None:
    locker = manager()
    async with getattr(locker, held)():
        with pytest.raises(
            TransactionReentryError, match=r"already holds the lock .*store\.lock for"
        ):
            async with getattr(locker, wanted)():
                pass
        assert locker._main.held == held


async def test_a_wait_in_the_name_of_a_holder_may_be_cancelled(manager: Make) -> None:
    """Two tasks wait on behalf of a third; cancelling one wait does not release the lock."""
    locker = manager()
    me = asyncio.current_task()
    before = Visit(locker.exclusive())
    await settle()
    first, second = Visit(locker.exclusive(owner=me)), Visit(locker.exclusive(owner=me))
    await settle()
    await before.leave()
    await first.inside.wait()
    await second.cancelled()
    assert locker.holds(me) == "write"
    assert locker.exclusive_held
    await first.leave()
    assert locker.holds(me) is None


async def test_the_first_reader_locks_the_file_and_the_last_unlocks_it(manager: Make) -> None:
    here, there = manager(), manager()
    first, second = Visit(here.shared()), Visit(here.shared())
    await settle()
    assert here._main.held == "shared"
    await first.leave()
    assert here._main.held == "shared"
    with pytest.raises(LockTimeoutError):
        async with there.exclusive(0):
            pass
    await second.leave()
    assert here._main.held is None


async def test_the_next_in_the_queue_precedes_one_that_reacquires(manager: Make) -> None:
    here, there = manager(), manager()
    log: list[str] = []
    first = Visit(here.exclusive(), "here", log)
    await settle()
    next_in_line = Visit(there.exclusive(), "there", log)
    await settle()
    again = Visit(here.exclusive(), "here again", log)
    await settle()
    await first.leave()
    await next_in_line.inside.wait()
    await next_in_line.leave()
    await again.inside.wait()
    await again.leave()
    assert log == ["here", "there", "here again"]


only_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract sockets")


@pytest.fixture
def without_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test in which a lock is found by polling takes as long as the pause."""
    for each in ("_FIRST_PAUSE", "_MAX_PAUSE_SECONDS", "_NEXT_IN_LINE_PAUSE"):
        monkeypatch.setattr(locks, each, 600.0)


@only_linux
@pytest.mark.usefixtures("without_polls")
async def test_each_release_wakes_the_next_process(manager: Make) -> None:
    """In the order of the places, whichever process releases the lock."""
    log: list[str] = []
    first, *others = [manager(timeout=900) for _ in range(5)]
    async with asyncio.timeout(60):
        for _ in range(3):
            holder = Visit(first.exclusive())
            await settle()
            visits = [Visit(each.exclusive(), str(n), log) for n, each in enumerate(others)]
            await settle()
            await holder.leave()
            for each in visits:
                await each.inside.wait()
                await each.leave()
    assert log == ["0", "1", "2", "3"] * 3


@only_linux
@pytest.mark.usefixtures("without_polls")
async def test_a_release_wakes_all_readers_that_are_next(manager: Make) -> None:
    here, *others = (manager(timeout=900) for _ in range(4))
    first = Visit(here.exclusive())
    await settle()
    readers = [Visit(each.shared()) for each in others]
    await settle()
    await first.leave()
    async with asyncio.timeout(60):
        for each in readers:
            await each.inside.wait()
    for each in readers:
        await each.leave()


@only_linux
@pytest.mark.usefixtures("without_polls")
async def test_a_cancelled_waiter_passes_its_signal_on(manager: Make) -> None:
    here, there, elsewhere = (manager(timeout=900) for _ in range(3))
    first = Visit(here.exclusive())
    await settle()
    waiting = Visit(there.exclusive())
    await settle()
    last = Visit(elsewhere.exclusive())
    await settle()
    await first.leave()
    waiting.task.cancel()  # the signal is sent, and not received yet
    async with asyncio.timeout(60):
        await last.inside.wait()
    await last.leave()
    with pytest.raises(asyncio.CancelledError):
        await waiting.task


@only_linux
@pytest.mark.usefixtures("without_polls")
async def test_a_process_that_died_while_it_waited_is_passed_over(manager: Make) -> None:
    here, dead, there = (manager(timeout=900) for _ in range(3))
    first = Visit(here.exclusive())
    await settle()
    waiting = Visit(dead.exclusive())
    await settle()
    last = Visit(there.exclusive())
    await settle()
    receiver = dead._line._socket
    assert receiver is not None
    asyncio.get_running_loop().remove_reader(receiver)
    receiver.close()
    await first.leave()
    async with asyncio.timeout(60):
        await last.inside.wait()
    await last.leave()
    dead._line._socket = dead._line._loop = None
    waiting.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting.task


@only_linux
@pytest.mark.usefixtures("without_polls")
@pytest.mark.parametrize("name", ["_CTask", "_PyTask"])
@pytest.mark.parametrize("cancels", [False, True])
async def test_a_task_that_waits_for_a_signal(manager: Make, name: str, cancels: bool) -> None:
    """It is continued by the signal, and by its cancellation before or after that, as by a future."""
    here, there = manager(), manager(timeout=900)
    loop = asyncio.get_running_loop()

    async def enter() -> None:
        async with there.exclusive():
            await asyncio.sleep(0)

    for continues in (True, False):
        first = Visit(here.exclusive())
        await settle()
        task: asyncio.Task[None] = getattr(asyncio.tasks, name)(enter(), loop=loop)
        await settle()
        assert there._line._waiting is not None
        if cancels and not continues:
            task.cancel("stop")
        await first.leave()
        if cancels and continues:
            assert task.cancel("stop")
        async with asyncio.timeout(60):
            if cancels:
                with pytest.raises(asyncio.CancelledError, match="stop"):
                    await task
            else:
                await task
        assert there._line._waiting is None
        assert not there.exclusive_held
        assert not here.is_awaited


@only_linux
async def test_a_lock_that_is_not_closed_leaves_nothing_in_the_event_loop(
    manager: Make, tmp_path: Path
) -> None:
    """The number of its socket may become that of another, and the loop does not keep it alive."""
    here, there = manager(), LockManager(tmp_path / "store.lock")
    files = there._main, there._turnstile
    first, waiting = Visit(here.exclusive()), Visit(there.exclusive())
    await settle()
    await first.leave()
    await waiting.inside.wait()
    await waiting.leave()
    receiver = there._line._socket
    assert receiver is not None
    number, line = receiver.fileno(), weakref.ref(there._line)
    del there, receiver, waiting
    gc.collect()
    assert line() is None
    assert not asyncio.get_running_loop().remove_reader(number)
    for each in files:
        each.close()


@only_linux
@pytest.mark.usefixtures("without_polls")
async def test_a_forked_child_leaves_the_signals_of_its_parent_alone(manager: Make) -> None:
    here, there = manager(), manager(timeout=900)
    for forks in (True, False):
        first = Visit(here.exclusive())
        await settle()
        waiting = Visit(there.exclusive())
        await settle()
        if forks:
            child = os.fork()
            if not child:
                there._line.close()
                os._exit(0)
            os.waitpid(child, 0)
        await first.leave()
        async with asyncio.timeout(60):
            await waiting.inside.wait()
        await waiting.leave()


@only_linux
async def test_a_suspended_process_delays_others_only_for_some_signals(manager: Make) -> None:
    """It does not receive them."""
    here, suspended, there = (manager() for _ in range(3))
    first = Visit(here.exclusive())
    await settle()
    waiting = Visit(suspended.exclusive())
    await settle()
    receiver = suspended._line._socket
    assert receiver is not None
    asyncio.get_running_loop().remove_reader(receiver)
    await first.leave()
    for _ in range(4096):
        if not there._line.is_waiting():
            break
        there._line.wake()
        async with there.exclusive():
            pass
    assert not there._line.is_waiting()
    waiting.task.cancel()
    with suppress(asyncio.CancelledError):
        await waiting.task


async def test_a_lock_that_is_handed_on_is_released_once(manager: Make) -> None:
    """While its holder waits for something else, another process has it, and tasks of this one do not."""
    here, there = manager(), manager()
    log: list[str] = []
    first = Visit(here.exclusive(), "here", log)
    await settle()
    assert not here.is_awaited
    second = Visit(here.exclusive(), "here again", log)
    other = Visit(there.exclusive(), "there", log)
    await settle()
    assert here.is_awaited or sys.platform != "linux"
    await asyncio.to_thread(here.hand_on)
    assert not here.exclusive_held
    await other.inside.wait()
    await first.leave()
    assert there.exclusive_held
    await settle()
    assert log == ["here", "there"]
    await other.leave()
    await second.inside.wait()
    await second.leave()


async def test_without_signals_the_next_in_line_polls(
    manager: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no such sockets here")

    monkeypatch.setattr(lock_signals, "_socket", refuse)
    here, there = manager(), manager()
    first = Visit(here.exclusive())
    await settle()
    waiting = Visit(there.exclusive())
    await settle()
    assert not here.is_awaited
    await first.leave()
    await waiting.inside.wait()
    await waiting.leave()


async def test_more_processes_than_places_poll(
    manager: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_signals, "_PLACES", 2)
    first, *others = [manager() for _ in range(5)]
    holder = Visit(first.exclusive())
    await settle()
    visits = [Visit(each.exclusive()) for each in others]
    await settle()
    await holder.leave()
    await asyncio.gather(*map(_passed, visits))


async def _passed(visit: Visit) -> None:
    await visit.inside.wait()
    await visit.leave()


async def test_what_is_awaited_while_waiting(manager: Make) -> None:
    called: list[bool] = []

    async def note() -> None:
        called.append(True)

    here, there = manager(), manager(while_waiting=note)
    async with here.exclusive():
        with pytest.raises(LockTimeoutError):
            async with there.exclusive(0.01):
                pass
    assert called
    called.clear()
    async with there.exclusive():
        assert not called


async def test_overlapping_readers_do_not_starve_a_writer_of_another_process(
    manager: Make,
) -> None:
    here, there = manager(), manager()
    log: list[str] = []
    reader = Visit(here.shared(), "reader", log)
    await settle()
    writer = Visit(there.exclusive(), "writer", log)
    await settle()
    late = [Visit(here.shared(), "late", log) for _ in range(2)]
    await settle()
    assert here._main.held == "shared"
    assert not late[0].inside.is_set()
    await reader.leave()
    await writer.inside.wait()
    assert log == ["reader", "writer"]
    await writer.leave()
    for each in late:
        await each.inside.wait()
    for each in late:
        await each.leave()


async def test_readers_that_waited_together_acquire_together(manager: Make) -> None:
    here, there = manager(), manager()
    holder = Visit(there.exclusive())
    await settle()
    readers = [Visit(here.shared()) for _ in range(20)]
    await settle()
    rival = Visit(there.exclusive())  # waits for the tasks there
    await settle()
    await holder.leave()
    await asyncio.gather(*(each.inside.wait() for each in readers))
    assert here._sharers == 20
    assert here._passages == 1
    for each in readers:
        await each.leave()
    await rival.inside.wait()
    await rival.leave()


async def test_a_reader_notices_that_the_file_was_unlocked_before_it_ran(
    manager: Make,
) -> None:
    here, there = manager(), manager()
    holder = Visit(there.exclusive())
    await settle()

    async def look_in() -> None:
        async with here.shared():
            pass

    looking = asyncio.create_task(look_in())
    await settle()
    reader = Visit(here.shared())
    await settle()
    await holder.leave()
    await looking
    await reader.inside.wait()
    assert here._main.held == "shared"
    await reader.leave()


async def test_a_reader_that_polls_on_behalf_of_others_can_be_cancelled(manager: Make) -> None:
    here, there = manager(), manager()
    holder = Visit(there.exclusive())
    await settle()
    readers = [Visit(here.shared()) for _ in range(3)]
    await settle()
    await readers[0].cancelled()
    await holder.leave()
    for each in readers[1:]:
        await each.inside.wait()
    assert here._sharers == 2
    for each in readers[1:]:
        await each.leave()


async def test_readers_behind_the_polling_one_time_out_with_their_own_message(
    manager: Make,
) -> None:
    here, there = manager(), manager()
    async with there.exclusive():
        polling, waiting = Visit(here.shared(timeout=60)), Visit(here.shared(timeout=0.02))
        with pytest.raises(LockTimeoutError, match=r"for reading within 0\.02 s: another process"):
            await waiting.task
        await polling.cancelled()


@pytest.mark.parametrize("mode", ["exclusive", "shared"])
@pytest.mark.parametrize("file", ["store.lock", "store.lock.turn"])
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, PermissionDeniedError),
        (errno.EROFS, ReadOnlyStoreError),
        (errno.ENOSPC, DiskFullError),
        (errno.EMFILE, DiskFullError),
        (errno.EIO, UnavailableError),
    ],
)
async def test_lock_files_that_cannot_be_created(
    number: int,
    kind: type[StorageError],
    file: str,
    mode: str,
    manager: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    locker = manager()
    really_open = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if path.endswith(f"/{file}"):
            raise OSError(number, os.strerror(number), path)
        return really_open(path, flags, mode)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(kind, match=f"cannot lock .*/{file}: {os.strerror(number)}") as caught:
            async with getattr(locker, mode)():
                pass
        assert isinstance(caught.value.__cause__, OSError)
        assert not locker._turnstile.held
        assert_free(locker._tasks)
    async with getattr(locker, mode)():
        pass


async def test_lock_files_replaced_while_they_were_free(manager: Make, tmp_path: Path) -> None:
    here, there = manager(), manager()
    async with here.exclusive():
        pass
    for each in tmp_path.iterdir():
        each.unlink()
    async with there.exclusive():
        with pytest.raises(LockTimeoutError):
            async with here.exclusive(0):
                pass
    async with here.exclusive(0):
        with pytest.raises(LockTimeoutError):
            async with there.shared(0):
                pass


async def test_close_unlocks_the_file_and_ends_waiting(manager: Make) -> None:
    here, there = manager(), manager()
    holder = Visit(here.exclusive())
    await settle()
    waiter = Visit(there.exclusive())
    await settle()
    there.close()
    there.close()
    with pytest.raises(StoreClosedError, match=r"the lock .*store\.lock was closed"):
        await waiter.task
    here.close()
    assert not here.exclusive_held
    await holder.leave()
    with pytest.raises(StoreClosedError):
        async with here.shared():
            pass
    async with manager().exclusive(0):
        pass


# -- between processes ----------------------------------------------------------------------

PROGRAM = """
import asyncio, sys, time
from pathlib import Path
from hf_async_store.errors import LockTimeoutError
from hf_async_store.locks import LockManager

folder = Path(sys.argv[1])
manager = LockManager(folder / "store.lock", timeout=60)

def say(text):
    print(text, flush=True)

def told():
    return sys.stdin.readline()

def bump(name):
    path = folder / name
    number = int(path.read_text()) + 1
    path.write_text(str(number))
    return number
"""

INCREMENT = """
async def work():
    for _ in range(50):
        async with manager.exclusive():
            bump("counter")

async def main():
    await asyncio.gather(work(), work())

say("ready"); told()
asyncio.run(main())
"""

WRITE_PAIRS = """
async def main():
    for _ in range(60):
        async with manager.exclusive():
            bump("a")
            await asyncio.sleep(0)
            bump("b")

say("ready"); told()
asyncio.run(main())
"""

READ_PAIRS = """
async def main():
    for _ in range(60):
        async with manager.shared():
            first = (folder / "a").read_text()
            await asyncio.sleep(0)
            assert (folder / "b").read_text() == first

async def both():
    await asyncio.gather(main(), main())

say("ready"); told()
asyncio.run(both())
"""

HOLD = """
async def main():
    async with getattr(manager, sys.argv[2])():
        say("held")
        await asyncio.to_thread(told)

asyncio.run(main())
"""

STAND_NEXT_IN_LINE = """
async def main():
    waiting = asyncio.create_task(manager.exclusive().__aenter__())
    while manager._turnstile.held is None:
        await asyncio.sleep(0.001)
    say("next")
    await waiting

asyncio.run(main())
"""

GREEDY = """
async def main():
    number = 0
    while number < 6000:
        async with manager.exclusive():
            number = bump("counter")
            time.sleep(0.001)

asyncio.run(main())
"""

GREEDY_READERS = """
# One reader is always inside when the other one comes or goes.
async def main():
    inside = 0
    async def read():
        nonlocal inside
        number = 0
        while number < 6000:
            async with manager.shared():
                number = bump("counter")
                inside += 1
                time.sleep(0.0005)
                for _ in range(20):
                    await asyncio.sleep(0)
                    if inside > 1:
                        break
                inside -= 1
    await asyncio.gather(read(), read(), read())

asyncio.run(main())
"""


class Processes:
    """Python programs that run concurrently with the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        package = Path(locks.__file__).parents[1]
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM + program, str(self._folder), *arguments],
            env=os.environ | {"PYTHONPATH": str(package)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    @staticmethod
    async def says(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return (await asyncio.to_thread(process.stdout.readline)).strip()

    @staticmethod
    def tell(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    async def run_together(self, *programs: str) -> None:
        """Start the processes at the same moment, and assert that all succeed."""
        processes = [self.start(each) for each in programs]
        for each in processes:
            assert await self.says(each) == "ready"
        for each in processes:
            self.tell(each)
        for each in processes:
            assert await asyncio.to_thread(each.wait, 60) == 0

    def end(self) -> None:
        for each in self._started:
            each.kill()
            each.communicate()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    (tmp_path / "counter").write_text("0")
    (tmp_path / "a").write_text("0")
    (tmp_path / "b").write_text("0")
    started = Processes(tmp_path)
    yield started
    started.end()


async def test_four_processes_lose_no_increment(processes: Processes, tmp_path: Path) -> None:
    await processes.run_together(*[INCREMENT] * 4)
    assert (tmp_path / "counter").read_text() == "400"


async def test_readers_never_see_a_partial_write(processes: Processes, tmp_path: Path) -> None:
    await processes.run_together(WRITE_PAIRS, READ_PAIRS, WRITE_PAIRS, READ_PAIRS)
    assert (tmp_path / "a").read_text() == "120"


async def test_processes_share_to_read(processes: Processes, manager: Make) -> None:
    other = processes.start(HOLD, "shared")
    assert await processes.says(other) == "held"
    here = manager()
    async with here.shared(0):
        pass
    with pytest.raises(LockTimeoutError):
        async with here.exclusive(0.05):
            pass
    processes.tell(other)
    async with here.exclusive(60):
        pass


@pytest.mark.parametrize("mode", ["exclusive", "shared"])
async def test_a_killed_holder_loses_the_lock(
    mode: str, processes: Processes, manager: Make
) -> None:
    here = manager()
    other = processes.start(HOLD, mode)
    assert await processes.says(other) == "held"
    with pytest.raises(LockTimeoutError):
        async with here.exclusive(0):
            pass
    other.send_signal(signal.SIGKILL)
    async with here.exclusive(60):
        pass


async def test_a_process_killed_in_the_queue_does_not_block_others(
    processes: Processes, manager: Make
) -> None:
    here = manager()
    async with here.exclusive():
        other = processes.start(STAND_NEXT_IN_LINE)
        assert await processes.says(other) == "next"
        other.send_signal(signal.SIGKILL)
        await asyncio.to_thread(other.wait, 60)
    async with here.exclusive(60):
        pass


@pytest.mark.parametrize("greedy", [GREEDY, GREEDY_READERS])
async def test_a_greedy_process_does_not_starve_another(
    greedy: str, processes: Processes, manager: Make, tmp_path: Path
) -> None:
    """Measured by the acquisitions of the greedy process, not in seconds.

    That process releases the lock only for a few microseconds in each millisecond. With polling alone
    this process would get the lock only when the other one is done, after 6,000 acquisitions; with
    the turnstile it gets it after one or two.
    """
    here = manager(timeout=60)
    counter = tmp_path / "counter"

    def count() -> int:
        while not (text := counter.read_text()):  # caught between its truncation and its write
            pass
        return int(text)

    processes.start(greedy)
    while count() < 20:
        await asyncio.sleep(0.005)
    meanwhile = 0
    for _ in range(10):
        before = count()
        async with here.exclusive():
            meanwhile += count() - before
        await asyncio.sleep(0.01)  # until the other process acquires the lock again
    assert meanwhile < 400
