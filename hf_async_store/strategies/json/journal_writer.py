"""The journal writer: appends records to the journal, and begins new journals.

The caller holds the store's write lock and passes the state in memory, which is up to date. A record
is applied to the state as soon as it is written.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from time import monotonic
from typing import Final, NamedTuple, TypeVar

from hf_async_store.driver import run_to_completion
from hf_async_store.errors import LockTimeoutError, StorageError
from hf_async_store.event_loop import Continuation, in_thread, long_work, reclaim
from hf_async_store.locked_descriptors import close_locked, register_locked
from hf_async_store.locks import LockManager
from hf_async_store.os_errors import translate_os_error
from hf_async_store.strategies.json.declarations_file import DeclarationsFile
from hf_async_store.strategies.json.files import (
    FileManager,
    begin_sync,
    discard_file,
    end_sync,
    has_failed_sync,
    is_being_synced,
    mark_sync_failed,
    prepare_file,
    sync_data,
    sync_folder,
    sync_parents,
    write_all,
)
from hf_async_store.strategies.json.journal import (
    COMMITS,
    HEADER_SIZE,
    Fold,
    Head,
    Images,
    Kind,
    Seal,
    commit_payload,
    control,
    fed_payload,
    header,
    header_check,
    record,
)
from hf_async_store.strategies.json.kept_journals import KeptJournals
from hf_async_store.strategies.json.store_state import MergedSections, PendingAppend, StoreState

Result = TypeVar("Result")

log: Final = logging.getLogger("hf_async_store.json")

_LARGE_CHUNK: Final = 1 << 16
_LARGE_RECORD: Final = 1 << 22

_OPEN: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
"""Not only for writing: on NFS, a shared lock needs a descriptor for reading."""

_SYNC_PAUSE: Final = 0.001
"""The pause between two attempts to find that no other process syncs the journal."""


class _PreparedJournal(NamedTuple):
    """A journal with its first record, synced under a temporary name."""

    head: Head
    temporary: Path
    fd: int


class JournalWriter:
    """Writes the journal of one store.

    Args:
        kept: the journals that are kept for the change feed.
        locks: of the store; the caller holds the write lock.
        sync_commits: whether a commit is synced to the disk before it is acknowledged.

    Attributes:
        sync_failed: a sync failed, so records of the journal may not be on the disk. The next write
            first writes all data files again.
    """

    def __init__(
        self,
        files: FileManager,
        declarations: DeclarationsFile,
        kept: KeptJournals,
        locks: LockManager,
        *,
        sync_commits: bool,
    ) -> None:
        self.sync_failed = False
        self._files = files
        self._declarations = declarations
        self._kept = kept
        self._locks = locks
        self._sync_commits = sync_commits
        # Not the same thread: a commit never waits for a compaction that is writing.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="hf-async-store-json")
        self._appends: _AppendThread | None = None
        self._prepared: _PreparedJournal | None = None

    async def in_thread(self, call: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)

    def close(self) -> None:
        self._threads.shutdown(wait=False)
        if self._appends is not None:
            self._appends.close()

    # -- records -----------------------------------------------------------------------------

    async def open_to_append(self, state: StoreState, patience: float) -> None:
        """Open the journal for the appends of this process, and wait until no other process syncs it.

        So this process learns of every failed sync of records before its own: of those until now by the
        mark of the journal, and of later ones by its own next sync, since Linux reports an error of writing
        to all descriptors that were open then (source: fsync(2)).

        Raises:
            LockTimeoutError: another process did not end its sync within `patience` seconds.
        """
        path = self._files.journal_path(state.generation)
        try:
            fd = os.open(path, _OPEN)
        except PermissionError:
            return  # an append reports it
        except OSError as exc:
            raise translate_os_error(exc, f"write {path}") from exc
        try:
            await _other_syncs(fd, path, patience)
            if has_failed_sync(os.fstat(fd)):
                state.failed_sync_generation = state.generation
        except OSError as exc:
            os.close(fd)
            raise translate_os_error(exc, f"write {path}") from exc
        except BaseException:
            os.close(fd)
            raise
        state.write_fd = register_locked(fd)

    async def append_commit(
        self, state: StoreState, images: Images, *, hands_on: bool = False
    ) -> None:
        """Append the images as one record, then apply them in memory.

        Args:
            hands_on: if other processes wait for the write lock, let them have it before the record is
                synced.

        Raises:
            DiskFullError, ReadOnlyStoreError, PermissionDeniedError, UnavailableError: nothing was
                written; or, with `outcome_unknown`, the record may be lost in a power failure.
        """
        fed = [name for name in self._declarations.feeds if images.get(name)]
        named = not state.replaced and state.content.keys() <= state.known.keys()
        if not state.is_open or not named or (fed and state.feed_end is None):
            await self.start_generation(state)
        payload: list[bytes] = []
        for chunk in commit_payload(images):
            payload.append(chunk)
            if len(chunk) > _LARGE_CHUNK:
                await long_work().pause_if_due()
        kind, size = Kind.COMMIT, sum(map(len, payload))
        if fed:
            kind = Kind.FED_COMMIT
            before = await state.before({name: images[name] for name in fed})
            payload = await _fed_payload(payload, before)
        merged = await state.merged(images)
        try:
            locks = self._locks if hands_on else None
            await self._append(state, kind, payload, images, merged, size, locks)
        finally:
            await state.reclaim()
        if size > _LARGE_RECORD:
            await reclaim(payload)

    async def append_control(self, state: StoreState, body: Head | Seal | Fold) -> None:
        """Append a record other than a COMMIT."""
        sequence = state.sequence
        try:
            kind, payload = control(body)
            await self._append(state, kind, [payload], {}, {}, 0)
        finally:
            # Even if its sync failed: readers find the SEAL in the file.
            if isinstance(body, Seal) and state.sequence > sequence:
                state.sealed = True

    async def _append(
        self,
        state: StoreState,
        kind: Kind,
        payload: Sequence[bytes],
        images: Images,
        merged: MergedSections,
        images_size: int,
        locks: LockManager | None = None,
    ) -> None:
        size = sum(map(len, payload))
        if size > _LARGE_RECORD:
            # Computing its checksum, or joining its chunks, would block the event loop.
            head = await in_thread(header, kind, payload, size, state.sequence)
            data = [head, *payload]
        else:
            head = header(kind, payload, size, state.sequence)
            data = [b"".join((head, *payload))]
        sync = self._is_synced(state, kind)
        job = _AppendJob(self._writer(state), data, state.offset, sync, locks)
        (self._appends or self._start()).submit(job)
        # The rest, for which there is time until the thread has woken.
        check = header_check(head) if kind is Kind.FED_COMMIT else None
        end = state.offset + HEADER_SIZE + size
        state.appending = append = PendingAppend(images, merged, end, images_size, check)
        await job
        state.appending = None
        failure = job.failure
        state.is_end_checked = job.written
        if job.written:
            # Even if its sync failed: the record can be read, so it is valid.
            state.complete(append)
            # After a failed sync it is unknown what is on the disk, and another sync of the same
            # file would report success.
            self.sync_failed = self.sync_failed or failure is not None
        if job.cancelled is not None:
            raise job.cancelled
        if isinstance(failure, OSError):
            path = self._files.journal_path(state.generation)
            raise _append_error(failure, path, kind, written=job.written) from failure
        if failure is not None:
            raise failure  # a programming error, or a MemoryError

    def _start(self) -> _AppendThread:
        try:
            self._appends = _AppendThread()
        except OSError as exc:
            raise translate_os_error(exc, "open a pipe") from exc
        return self._appends

    def _writer(self, state: StoreState) -> int:
        """The descriptor by which to append to the journal."""
        if state.write_fd >= 0 and state.is_end_checked:
            return state.write_fd
        path = self._files.journal_path(state.generation)
        try:
            if state.write_fd < 0:
                state.write_fd = register_locked(os.open(path, _OPEN))
            if not state.is_end_checked and os.fstat(state.write_fd).st_size > state.offset:
                # The incomplete record of an interrupted append is truncated first: readers that compare
                # the file size must not mistake it for this record.
                os.ftruncate(state.write_fd, state.offset)
                log.info("removed an incomplete record, of an interrupted append, from %s", path)
            return state.write_fd
        except OSError as exc:
            raise translate_os_error(exc, f"write {path}") from exc

    def _is_synced(self, state: StoreState, kind: Kind) -> bool:
        if kind in COMMITS:
            return self._sync_commits
        # After a failed sync the SEAL need not be durable: only current readers need it.
        sync_failed = self.sync_failed or state.failed_sync_generation == state.generation
        return not (sync_failed and kind is Kind.SEAL)

    # -- generations -------------------------------------------------------------------------

    async def prepare(self, state: StoreState) -> None:
        """Write and sync the next journal under a temporary name, without the write lock, so that no commit
        waits for it. The compaction lock is held.

        It is used by `start_generation` if nothing that it says has changed; the caller then calls
        `discard_prepared`. With a change feed, whose last position it would say, it is not worth while.
        """
        if not self._declarations.feeds:
            await run_to_completion(self._prepare(self._next_head(state)))

    async def _prepare(self, head: Head) -> None:
        path = self._files.journal(head.generation)
        with suppress(OSError):  # reported by `start_generation`, which tries again
            owned = self._files.ownership()
            made = await self.in_thread(prepare_file, path, record(*control(head), 0), owned)
            self._prepared = _PreparedJournal(head, *made)

    @property
    def prepared(self) -> Path | None:
        """The file that `prepare` has written, if it is not used yet."""
        return None if self._prepared is None else self._prepared.temporary

    def discard_prepared(self) -> None:
        """Remove what `prepare` has written, unless it was used."""
        if self._prepared is not None:
            discard_file(self._prepared.temporary, self._prepared.fd)
            self._prepared = None

    async def start_generation(self, state: StoreState) -> None:
        """Seal the journal, if there is one, and begin the next."""
        # Not interrupted by a cancellation: the state in memory must match the journals.
        await run_to_completion(self._begin(state, self._next_head(state)))

    def _next_head(self, state: StoreState) -> Head:
        generation = state.generation + 1
        files = {
            name: content.covering(
                generation if name in state.replaced or state.generation == 0 else content.covers
            )
            for name, content in state.content.items()
        }
        feed = self._new_feed()
        last = None if state.replaced or not feed else state.feed_end
        return Head(generation, files, feed=feed, last=last)

    def _new_feed(self) -> str:
        return os.urandom(8).hex() if self._declarations.feeds else ""

    async def start_alone(self, state: StoreState) -> None:
        """Begin a journal for the data files of a recovery, which makes all earlier ones invalid. Its
        first commit contains everything that was replayed from them."""
        await run_to_completion(self._start_alone(state))

    async def _start_alone(self, state: StoreState) -> None:
        generation = max([state.generation, *self._files.journals()]) + 1
        files = {name: content.covering(generation) for name, content in state.content.items()}
        images, state.replayed = state.replayed, {}
        rest = b""
        if any(images.values()):
            rest = await in_thread(_commit_record, images)
        try:
            if state.unread:
                await in_thread(self._files.keep_damaged, state.unread)
        except OSError as exc:
            raise translate_os_error(exc, f"copy a journal in {self._files.folder}") from exc
        await self._begin(state, Head(generation, files, alone=True, feed=self._new_feed()), rest)
        state.known = {name: [content] for name, content in files.items()}
        state.pending = {generation: dict.fromkeys(images, len(rest))} if rest else {}
        await self.drop_journals(generation)

    async def _begin(self, state: StoreState, head: Head, rest: bytes = b"") -> None:
        """Begin a journal with this head and optionally one more record.

        It is written under a temporary name before the current journal is sealed: if this fails, the
        current one stays in use.
        """
        path = self._files.journal(head.generation)
        data = record(*control(head), 0) + rest
        owned = self._files.ownership()
        try:
            if head.feed and head.last is None:
                await self.in_thread(self._kept.remove_all)
            if self._prepared is not None and self._prepared.head == head:
                (_, temporary, fd), self._prepared = self._prepared, None
            else:
                temporary, fd = await self.in_thread(prepare_file, path, data, owned)
            try:
                status = os.fstat(fd)
                if state.is_open and not head.alone:
                    await self.append_control(state, Seal(head.generation))
                elif state.fd >= 0 and not head.alone and self._is_synced(state, Kind.SEAL):
                    # By a process that died, perhaps before its sync.
                    await self.in_thread(sync_data, state.fd)
                await self.in_thread(_name_journal, temporary, path, head.generation == 1)
            except BaseException:
                discard_file(temporary, fd)
                raise
        except OSError as exc:
            raise translate_os_error(exc, f"write {path}") from exc
        state.close()
        state.switch(fd, status, head, header_check(data), len(data), 2 if rest else 1)
        state.replaced.clear()
        for name, content in head.files.items():
            state.content[name] = content
            known = state.known.setdefault(name, [])
            if content not in known:
                known.append(content)

    async def drop_journals(self, before: int) -> None:
        """Remove the journals before generation `before`."""
        await self._end_journals(self._files.drop_journals, before)

    async def release_journals(self, before: int) -> None:
        """The same, but keep them for the change feed, if the store has one."""
        keeps = bool(self._declarations.feeds)
        await self._end_journals(self._kept.keep if keeps else self._files.drop_journals, before)

    async def tidy_kept(self) -> None:
        """Remove and merge journals that are kept for the change feed. The compaction lock is held."""
        retention = self._declarations.retention
        if retention is None:
            return
        try:
            await run_to_completion(in_thread(self._kept.tidy, retention))
        except OSError as exc:
            raise translate_os_error(exc, "remove or merge a kept journal") from exc

    async def _end_journals(self, end: Callable[[int], None], before: int) -> None:
        try:
            # In a thread: freeing the disk space of a large file takes time.
            await run_to_completion(self.in_thread(end, before))
        except OSError as exc:
            raise translate_os_error(exc, "remove a journal") from exc


class _AppendJob(Continuation):
    """The append of one record, in a worker thread. A task that awaits it may be cancelled; the append
    is not.

    Args:
        locks: if other processes wait for the write lock, they have it before the record is synced. It is
            then read by others, and followed by theirs, before it is known to be durable. That is safe:
            a sync covers everything before it in the file, so no later commit is acknowledged without
            this one; and an error of a sync is also reported to every other process that has the journal
            open for writing (see `open_to_append`).

    Attributes:
        cancelled: the cancellation of the task, if any.
        written: the record can be read.
        failure: the error of the append, or of the sync if the record was written.
    """

    __slots__ = ("_data", "_fd", "_locks", "_offset", "_sync", "cancelled", "failure", "written")

    def __init__(
        self, fd: int, data: Sequence[bytes], offset: int, sync: bool, locks: LockManager | None
    ) -> None:
        super().__init__(asyncio.get_running_loop())
        self._fd = fd
        self._data = data
        self._offset = offset
        self._sync = sync
        self._locks = locks
        self.cancelled: asyncio.CancelledError | None = None
        self.written = False
        self.failure: BaseException | None = None

    def cancel(self, msg: object = None) -> bool:
        self.cancelled = asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)
        return True

    # -- in the worker thread ----------------------------------------------------------------

    def run(self) -> None:
        try:
            self._write()
            self.written = True
            if self._sync and self._locks is not None and self._locks.is_awaited:
                self._hand_on_and_sync(self._locks)
            elif self._sync:
                _sync_record(self._fd)
        except BaseException as exc:  # noqa: BLE001  # raised by the commit that waits for the job
            self.failure = exc

    def _write(self) -> None:
        end = self._offset
        try:
            for chunk in self._data:
                write_all(self._fd, chunk, end)
                end += len(chunk)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._fd, self._offset)
            raise

    def _hand_on_and_sync(self, locks: LockManager) -> None:
        try:
            # From now on the event loop may close the journal, because it follows to the next one.
            fd = register_locked(os.dup(self._fd))
        except OSError:
            _sync_record(self._fd)
            return
        try:
            with suppress(OSError):
                begin_sync(fd)
                locks.hand_on()
            _sync_record(fd)
        finally:
            end_sync(fd)
            close_locked(fd)


def _sync_record(fd: int) -> None:
    try:
        sync_data(fd)
    except OSError:
        # Before `end_sync`, or before the lock is released: the next writer, in any process, must know it.
        try:
            mark_sync_failed(fd)
        except OSError:
            log.warning(
                "a sync of the journal failed, and the journal could not be marked so that other "
                "processes know about it",
                exc_info=True,
            )
        raise


class _AppendThread:
    """The thread that runs the appends of one store, one after another, until `close`.

    With a `ThreadPoolExecutor`, the hand-over takes twice as long. The thread tells the event loop by a
    pipe of its own that an append has ended. After `call_soon_threadsafe`, the loop would empty its own
    pipe just when the thread begins the next append, and both would wait for the interpreter lock.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_AppendJob | tuple[int, ...]] = SimpleQueue()
        self._running: deque[_AppendJob] = deque()  # in the order in which they end
        self._pipe = read, write = os.pipe()
        self._loop = asyncio.get_running_loop()
        # A daemon, as a store that is never closed must not keep the process alive. It has no reference to
        # this object: a store whose event loop was closed during an append would keep its locks.
        thread = Thread(
            target=_run_all, args=(self._jobs, write), name="hf-async-store-append", daemon=True
        )
        try:
            os.set_blocking(read, False)
            self._loop.add_reader(read, self._end)
            thread.start()
        except BaseException:
            self._loop.remove_reader(read)
            os.close(read)
            os.close(write)
            raise
        register_locked(read)  # a forked child shares the selector

    def submit(self, job: _AppendJob) -> None:
        self._running.append(job)
        self._jobs.put(job)

    def _end(self) -> None:
        os.read(self._pipe[0], 1)
        self._running.popleft().end()

    def close(self) -> None:
        self._loop.remove_reader(self._pipe[0])
        if self._running:
            # The event loop was closed during an append, whose end the thread is about to write.
            self._jobs.put(self._pipe)
        else:
            _close_all(self._pipe)
            self._jobs.put(())


def _run_all(jobs: SimpleQueue[_AppendJob | tuple[int, ...]], write: int) -> None:
    """Run appends until a tuple follows, with the descriptors that are to be closed then."""
    while isinstance(job := jobs.get(), _AppendJob):
        job.run()
        del job  # its data may be large
        os.write(write, b"\0")
    _close_all(job)


def _close_all(descriptors: Iterable[int]) -> None:
    for each in descriptors:
        close_locked(each)


async def _other_syncs(fd: int, path: str, patience: float) -> None:
    """Wait until no other process syncs a journal."""
    deadline = monotonic() + patience
    while is_being_synced(fd):
        if monotonic() > deadline:
            raise LockTimeoutError(
                f"another process did not end its sync of {path} in time: it may be suspended"
            )
        await asyncio.sleep(_SYNC_PAUSE)


def _append_error(failure: OSError, path: str, kind: Kind, *, written: bool) -> StorageError:
    if not written:
        return translate_os_error(failure, f"write {path}")
    error = translate_os_error(failure, f"sync {path} to the disk")
    error.outcome_unknown = kind in COMMITS
    return error


def _commit_record(images: Images) -> bytes:
    return record(Kind.COMMIT, b"".join(commit_payload(images)), 1)


async def _fed_payload(payload: Sequence[bytes], before: Images) -> list[bytes]:
    """The payload of a FED_COMMIT, from that of a COMMIT."""
    chunks: list[bytes] = []
    for chunk in fed_payload(payload, before):
        chunks.append(chunk)
        if len(chunk) > _LARGE_CHUNK:
            await long_work().pause_if_due()
    return chunks


def _name_journal(temporary: Path, path: Path, first: bool) -> None:
    """Rename a journal to its final name; on failure remove it.

    Args:
        first: the first journal of the store, whose folder may be new, too.
    """
    try:
        temporary.rename(path)
        sync_folder(path.parent)
        if first:
            sync_parents(path.parent)
    except BaseException:
        # The rename may have succeeded, and only the sync of the folder failed.
        with suppress(OSError):
            path.unlink()
        raise
