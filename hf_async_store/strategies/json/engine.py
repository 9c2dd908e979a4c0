"""The JSON engine: memory plus a journal.

A read is served from memory, after one `fstat` has shown that no process appended to the journal.
A write acquires the store's write lock, reads the records that other processes appended, checks its
preconditions and appends one record: changes that wait at the same time share the record and its
sync. The commits in the journal are written to the data files from time to time (`compaction.py`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, TypeVar

from hf_async_store.changes import Change, Outcome, Record
from hf_async_store.config import redacted
from hf_async_store.driver import (
    Capabilities,
    Engine,
    Isolation,
    QueryPlan,
    Reader,
    Session,
    run_to_completion,
)
from hf_async_store.errors import (
    CorruptionError,
    LockTimeoutError,
    PermissionDeniedError,
    ReadOnlyStoreError,
    StorageError,
    StoreClosedError,
)
from hf_async_store.generators import Owned
from hf_async_store.locks import FileLock, LockManager
from hf_async_store.os_errors import translate_os_error
from hf_async_store.ownership import share
from hf_async_store.schema import SYSTEM_COLLECTIONS, Collection
from hf_async_store.strategies.json.compaction import Compactor
from hf_async_store.strategies.json.files import (
    FileManager,
    Signature,
    has_failed_sync,
    mark_sync_failed,
    sync_data,
    sync_folder,
    sync_parents,
    write_all,
)
from hf_async_store.strategies.json.journal import (
    HEADER_SIZE,
    FileState,
    Fold,
    Head,
    Images,
    Kind,
    Seal,
    commit_payload,
    control,
    header,
    read_fold,
    read_head,
    record,
    scan,
)
from hf_async_store.strategies.json.recovery import (
    JournalMissing,
    Merged,
    StoreLoader,
    StoreState,
    open_journal,
    read_chunks,
    reclaim_images,
    scan_file,
)
from hf_async_store.strategies.json.serializer import JSONSerializer, holds_entities
from hf_async_store.strategies.json.session_view import SessionView
from hf_async_store.strategies.json.snapshot_reader import SnapshotReader
from hf_async_store.values import Entity, Key, Value

if TYPE_CHECKING:
    from hf_async_store.config import JSONConfig
    from hf_async_store.ownership import Ownership
    from hf_async_store.query import Query
    from hf_async_store.schema import Schema

Result = TypeVar("Result")

log: Final = logging.getLogger("hf_async_store.json")

_FILE_CHECK_SECONDS: Final = 0.05
"""How often reads check whether a data file was replaced manually. Writes always check."""

_LARGE_CHUNK: Final = 1 << 16
_LARGE_RECORD: Final = 1 << 22
_HEALTH_CHUNK: Final = 128
_HEALTH_LOCK_SECONDS: Final = 5.0
_TRIES: Final = 3
"""How often a reader tries without the lock before it acquires the read lock."""

_YIELD_MASK: Final = 0x7F
"""One of 128 reads returns control to the event loop: reads from memory never wait otherwise."""


class _PendingAppend:
    """A record that is being appended to the journal, and the images of its commit."""

    __slots__ = ("applied", "end", "images", "merged", "size")

    def __init__(self, images: Images, end: int, size: int, merged: Merged) -> None:
        self.images = images
        self.end = end
        self.size = size
        self.merged = merged
        self.applied = False


class _PreparedJournal:
    """A journal that is written under a temporary name and not renamed yet."""

    __slots__ = ("fd", "head", "path", "renamed", "sequence", "size", "temporary")

    def __init__(
        self, head: Head, path: Path, temporary: Path, fd: int, size: int, sequence: int
    ) -> None:
        self.head = head
        self.path = path
        self.temporary = temporary
        self.fd = fd
        self.size = size
        self.sequence = sequence
        self.renamed = False


class _ExecutorJob:
    """One call in a worker thread. A task that waits for it may be cancelled; the call is not.

    `run_in_executor` and a shield do the same with four futures and one more iteration of the event
    loop, which is measurable in a commit of one entity.
    """

    __slots__ = ("_call", "_loop", "_waiter", "done", "failure")

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self.done = False
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Make the call. Runs in the worker thread."""
        try:
            self._call()
        except BaseException as exc:  # noqa: BLE001  # raised by the commit that waits for the job
            self.failure = exc
        with suppress(RuntimeError):  # the event loop is closed: no task waits any longer
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self.done = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        self._waiter = self._loop.create_future()
        await self._waiter


class _SyncFailed(Exception):  # noqa: N818  # never leaves this module
    """The record was written, but its sync failed: it may not be on the disk."""


class JSONEngine(Engine):
    """Entities in JSON files."""

    capabilities: Capabilities = Capabilities(engine="json", durable=True, multi_process=True)

    def __init__(self, config: JSONConfig, schema: Schema) -> None:
        self.config = config
        self.schema = schema
        self.files = FileManager(config, schema)
        self.serializer = JSONSerializer(schema, self._location)
        self.locks = LockManager(
            self.files.lock(), timeout=config.lock_timeout, owned=self.files.ownership
        )
        self.loader = StoreLoader(self.files, schema, self.serializer, config.cache_size)
        self.compactor = Compactor(self)
        self._registry = FileLock(self.files.lock(".open"), self.files.ownership)
        # Two threads: a commit never waits for a compaction that is writing.
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="hf-async-store-json")
        self._state: StoreState | None = None
        self._committed_view: SessionView  # a view of the current state without layers
        self._refreshing = asyncio.Lock()
        self._write_locked = False  # the write lock is held, and the state is up to date
        self._append: _PendingAppend | None = None
        self._write_fd = -1
        self._sync_failed = False  # a sync failed: records of the journal may not be on the disk
        self._next_file_check = 0.0
        self._reads = 0
        self._closed = False

    def _location(self, collection: str) -> str:
        """The path of a collection's data file, for error messages."""
        for name, each in self.files.names.items():
            if each in (None, collection):
                return f" in {(self.files.paths_of(name) or [self.files.path(name)])[0]}"
        return ""

    # -- reading -----------------------------------------------------------------------------

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        state = self._state
        if state is None or not self._is_current(state):
            state = await self.refresh()
        self._reads += 1
        if not self._reads & _YIELD_MASK:
            await asyncio.sleep(0)
            if not self._is_current(state):
                state = await self.refresh()
        return await self._committed_view.fetch(keys)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        state = await self.current()
        async with Owned(self.view(state).select(query)) as records:
            async for each in records:
                yield each

    async def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        state = await self.current()
        async with Owned(self.view(state).select_batches(query)) as batches:
            async for batch in batches:
                yield batch

    async def count(self, query: Query) -> int:
        return await self.view(await self.current()).count(query)

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        # `current` may wait for the read lock; a task that holds a lock must not.
        state = await (self.refresh_locked() if self.locks.holds() else self.current())
        raw = state.raw_entity(collection.name, entity_id)
        if raw is None:
            return None
        encoded = self.serializer.normalize(collection, entity_id, raw)
        return Record(
            Key(collection.name, entity_id), self.serializer.entity(collection, entity_id, encoded)
        )

    async def exists(self) -> bool:
        self.refuse_closed()
        return self.files.exists()

    async def is_same_store(self, other: Engine) -> bool:
        if not isinstance(other, JSONEngine):
            return False
        try:
            return bool(self.files.identities() & other.files.identities())
        except OSError as exc:
            raise translate_os_error(exc, f"check {self.files.folder}") from exc

    async def undeclared(self) -> list[str]:
        state = await self.current()
        names = {*self._undeclared_sections(state), *await self._undeclared_files()}
        return sorted(names - set(self.schema))

    async def _undeclared_files(self) -> list[str]:
        """The names of collections in data files that neither configuration nor journal names."""
        names = []
        for name in self.files.undeclared_files():
            try:
                file = await self.files.read(name)
            except CorruptionError:
                names.append(name.removesuffix(".json"))  # it may be a damaged data file
                continue
            if file is not None and await asyncio.to_thread(holds_entities, file.text):
                names.append(name.removesuffix(".json"))
        return names

    async def explain(self, query: Query) -> QueryPlan:
        return await self.view(await self.current()).explain(query)

    @property
    def loaded(self) -> StoreState | None:
        """The state in memory, which may be behind the files; None if nothing was read yet."""
        return self._state

    def view(self, state: StoreState) -> SessionView:
        return SessionView(
            state, self.schema, self.serializer, references=self.config.enforce_references
        )

    async def current(self) -> StoreState:
        """The state, brought up to date with the files."""
        state = self._state
        return state if state is not None and self._is_current(state) else await self.refresh()

    # -- following ---------------------------------------------------------------------------

    def _is_current(self, state: StoreState) -> bool:
        """Whether memory contains every record of the journal: one system call if it does."""
        try:
            return self._has_every_record(state)
        except OSError as exc:
            raise translate_os_error(exc, f"check the files in {self.files.folder}") from exc

    def _has_every_record(self, state: StoreState) -> bool:
        append = self._append
        if append is not None:
            # No other process can append meanwhile. As soon as other processes can read the record,
            # it must be visible here, too; otherwise a reader could see an older value after a newer.
            if not append.applied and os.fstat(state.fd).st_size >= append.end:
                self._apply(state, append)
            return True
        if self._write_locked:
            return True
        if state.fd < 0 or state.sealed:
            self.files.refuse_moved_links()
            return not self._has_successor(state) and not self._files_changed(state)
        status = os.fstat(state.fd)
        if status.st_size != state.offset or not status.st_nlink:
            return False
        now = time.monotonic()
        if now < self._next_file_check:
            return True
        self.files.refuse_moved_links()
        moved = self._has_successor(state) or not self._journal_in_place(state)
        if moved or self._files_changed(state):
            return False  # the next read checks again, until the state is up to date
        self._next_file_check = now + _FILE_CHECK_SECONDS
        return True

    def _has_successor(self, state: StoreState) -> bool:
        return os.path.exists(self.files.journal_path(state.generation + 1))  # noqa: PTH110  # every write

    def _files_changed(self, state: StoreState) -> bool:
        return any(
            self.files.signature(name) != state.signatures.get(name) for name in self.files.names
        )

    async def refresh(self) -> StoreState:
        """Bring the state up to date: without a lock, or with the read lock if that fails.

        A caller that holds a lock of the store calls `refresh_locked` instead.
        """
        self.refuse_closed()
        self._register()
        for _ in range(_TRIES):
            with suppress(CorruptionError, JournalMissing):
                return await self._follow()
            await asyncio.sleep(0)
        try:
            async with self.locks.shared():
                return await self.refresh_locked()
        except (PermissionDeniedError, ReadOnlyStoreError):
            # No lock file can be created here, so no process can write here, either.
            return await self.refresh_locked()

    async def refresh_locked(self) -> StoreState:
        """Bring the state up to date. The caller holds a lock of the store."""
        self.refuse_closed()
        self._register()
        try:
            return await self._follow()
        except JournalMissing as exc:
            raise self._gap_error(exc) from exc

    def _gap_error(self, exc: JournalMissing) -> CorruptionError:
        return CorruptionError(
            f"the journal in {self.files.folder} has a gap: {exc}. Restore a backup "
            "(`hf-async-store restore`), or use the data files without the journal: "
            "`hf-async-store checkpoint --recover-from file` (all commits since the last compaction are "
            "then lost; copy the folder first)"
        )

    def _unchanged(self, state: StoreState) -> bool:
        """Whether the state is certainly up to date: the common case, decided by a few system calls.

        The caller holds the write lock. False if another task of this process is refreshing.
        """
        if self._closed or self._refreshing.locked() or state.fd < 0 or state.sealed:
            return False
        try:
            status = os.fstat(state.fd)
            in_folder = os.stat(self.files.journal_path(state.generation))  # noqa: PTH116  # hot path
            return (
                status.st_size == state.offset
                and not has_failed_sync(status)
                and os.path.samestat(status, in_folder)
                and not self._has_successor(state)
                and not self._files_changed(state)
            )
        except OSError:
            return False  # the full check reports it

    async def _follow(self) -> StoreState:
        async with self._refreshing:
            state = self._state
            try:
                if state is None or not await self._catch_up(state):
                    self._refuse_removed(state)
                    state = await self._load()
            except OSError as exc:
                raise translate_os_error(exc, f"read the files in {self.files.folder}") from exc
            return state

    async def _load(self, recover_from: str | None = None) -> StoreState:
        self.files.refuse_moved_links()
        loaded = await self.loader.load(recover_from=recover_from)
        if self._state is not None:
            self._state.close()
        self._close_writer()
        self._state = loaded
        self._committed_view = self.view(loaded)
        return loaded

    def _refuse_removed(self, state: StoreState | None) -> None:
        """Refuse a store whose journals, and perhaps data files, were removed while it was open.

        A compaction always leaves a journal. Data that was read before must not disappear silently.
        """
        if state is None or state.fd < 0 or self.files.journals():
            return
        existed = [name for name, each in state.signatures.items() if each is not None]
        removed = [name for name in existed if self.files.signature(name) is None]
        if state.pending or removed:
            raise JournalMissing(
                f"{self.files.journal(state.generation)} was removed while it was in use"
            )

    def _journal_in_place(self, state: StoreState) -> bool:
        """Whether the open journal is the file of this generation in the folder."""
        try:
            in_folder = os.stat(self.files.journal_path(state.generation))  # noqa: PTH116  # hot path
        except FileNotFoundError:
            return False
        return os.path.samestat(in_folder, os.fstat(state.fd))

    async def _catch_up(self, state: StoreState) -> bool:
        """Read the records appended since; False if the files must be read again from the start."""
        if self._append is not None or self._write_locked:
            return True
        while True:
            try:
                if state.fd >= 0 and not await self._read_tail(state):
                    return False
            except CorruptionError:
                if self._journal_in_place(state) and not self._has_successor(state):
                    raise
                return False  # a recovery has replaced that journal
            if state.fd >= 0 and not state.sealed:
                if not self._has_successor(state):
                    break
                # A journal is sealed before its successor is created, except by a recovery.
                if not await self._read_tail(state) or not state.sealed:
                    return False
            if not self._has_successor(state):
                if self.files.journals()[-1:] > [state.generation]:
                    return False
                break
            if state.generation == 0 or not await self._follow_successor(state):
                return False
        if state.fd >= 0 and not state.sealed and not self._journal_in_place(state):
            return False
        return not self._files_changed(state) or await self._accept_changed_files(state)

    async def _read_tail(self, state: StoreState) -> bool:
        path = self.files.journal(state.generation)
        status = os.fstat(state.fd)
        size = status.st_size
        if has_failed_sync(status):
            state.failed_sync_generation = state.generation
        if size == state.offset:
            return True
        if size < state.offset:
            return False
        async for entry, end in scan_file(state.fd, path, size, state.offset, state.sequence):
            images = {}
            if entry.kind is Kind.COMMIT:
                images = await self.loader.commit(state, entry)
            elif entry.kind is Kind.SEAL:
                state.sealed = True
            elif entry.kind is Kind.FOLD:
                self.loader.announce(state, read_fold(entry.payload).files)
            state.offset = end
            state.sequence += 1
            await state.reclaim()
            await reclaim_images(entry, images)
        return True

    async def _follow_successor(self, state: StoreState) -> bool:
        """Switch to the next generation; False if its HEAD names unknown contents of data files."""
        path = self.files.journal(state.generation + 1)
        fd = open_journal(path)
        try:
            size = os.fstat(fd).st_size
            # Only the first record is read: a commit of 30 MB may follow it.
            first = next(scan(read_chunks(fd, 0, size, path), str(path), 0, 0), None)
            if first is None or first[0].kind is not Kind.HEAD:
                raise JournalMissing(f"{path} has no HEAD record yet")
            entry, end = first
            head = read_head(entry.payload)
            if head.alone or not self._knows_contents(state, head):
                os.close(fd)
                return False
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        old_fd = state.fd
        self._close_writer()
        state.fd = fd
        state.generation += 1
        state.offset = end
        state.sequence = 1
        state.sealed = False
        if old_fd >= 0:
            # In a thread: closing the last descriptor of a large deleted file frees its disk space.
            await run_to_completion(asyncio.to_thread(os.close, old_fd))
        return True

    def _knows_contents(self, state: StoreState, head: Head) -> bool:
        return all(
            any(each.digest == content.digest for each in state.known.get(name, []))
            for name, content in head.files.items()
        )

    async def _accept_changed_files(self, state: StoreState) -> bool:
        """Whether the changed files have contents that the journals name; reads the files."""
        for name in list(self.files.names):
            signature = self.files.signature(name)
            if signature == state.signatures.get(name):
                continue
            known = state.known.get(name, [])
            match = next((each for each in known if Signature.known(each) == signature), None)
            if match is None:
                file = await self.files.read(name, known)
                digest = None if file is None else file.digest
                match = next((each for each in reversed(known) if each.digest == digest), None)
                signature = None if file is None else file.signature
            if match is None or match.covers < state.content[name].covers:
                return False
            if match.covers > state.content[name].covers:
                state.mark_covered(name, match, self.loader.collections_of(name, state))
            state.signatures[name] = signature
        return True

    # -- writing -----------------------------------------------------------------------------

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        async with self.writing() as state:
            view = self.view(state)
            view.layers.append({})
            outcomes = await view.write_each(changes)
            await self.commit(state, view.layers[0])
        return outcomes

    def session(self, isolation: Isolation | None) -> _JSONSession:
        return _JSONSession(self)

    @asynccontextmanager
    async def snapshot(self) -> AsyncGenerator[Reader, None]:
        reader = SnapshotReader(await self.current())
        try:
            yield reader
        finally:
            await reader.close()

    @asynccontextmanager
    async def writing(self, owner: asyncio.Task[object] | None = None) -> AsyncIterator[StoreState]:
        """Hold the store's write lock, with a state that is up to date.

        Args:
            owner: the task that is to hold it, if that is not the current one.
        """
        self.refuse_closed()
        if not self._has_journal():
            self.files.make_folder()
        async with self.locks.exclusive(owner=owner):
            self._register(creating=True)
            # The same as `write_locked_state`, without its overhead, which equals that of a check of
            # the files.
            try:
                yield await self._refresh_for_write()
            finally:
                self._write_locked = False

    def _has_journal(self) -> bool:
        """Whether the open journal was not deleted; then its folder exists."""
        try:
            state = self._state
            return state is not None and state.fd >= 0 and os.fstat(state.fd).st_nlink > 0
        except OSError:
            return False

    @asynccontextmanager
    async def write_locked_state(self) -> AsyncIterator[StoreState]:
        """The state, up to date; the caller holds the write lock."""
        try:
            yield await self._refresh_for_write()
        finally:
            self._write_locked = False

    async def _refresh_for_write(self) -> StoreState:
        self.files.refuse_moved_links()
        state = self._state
        if state is None or not self._unchanged(state):
            state = await self.refresh_locked()
        self._write_locked = True
        if state.superseded:
            # Old journals of an interrupted recovery; another process may still have them open.
            await self.drop_journals(state.first)
            state.superseded = False
        if self._sync_failed or state.needs_rewrite:
            await self.compactor.renew(state)
            self._sync_failed = False
        return state

    async def commit(self, state: StoreState, images: Images) -> None:
        """Append the images as one record, then apply them in memory. The write lock is held.

        Raises:
            DiskFullError, ReadOnlyStoreError, PermissionDeniedError, UnavailableError: nothing was
                written; or, with `outcome_unknown`, the record may be lost in a power failure.
        """
        if not any(images.values()):
            return
        unnamed = state.replaced or state.content.keys() - state.known.keys()
        if state.fd < 0 or state.sealed or unnamed:
            await self.start_generation(state)
        payload: list[bytes] = []
        for chunk in commit_payload(images):
            payload.append(chunk)
            if len(chunk) > _LARGE_CHUNK:
                await asyncio.sleep(0)
        merged = await state.merged(images)
        try:
            await self._append_record(state, Kind.COMMIT, payload, images, merged)
        finally:
            await state.reclaim()
        self.compactor.consider()

    async def _append_record(
        self,
        state: StoreState,
        kind: Kind,
        payload: Sequence[bytes],
        images: Images | None = None,
        merged: Merged | None = None,
    ) -> None:
        size = sum(map(len, payload))
        if size > _LARGE_RECORD:
            # Computing its checksum, or joining its chunks, would block the event loop.
            head = await asyncio.to_thread(header, kind, payload, state.sequence)
            data = [head, *payload]
        else:
            data = [b"".join((header(kind, payload, state.sequence), *payload))]
        append = _PendingAppend(images or {}, state.offset + HEADER_SIZE + size, size, merged or {})
        path = self.files.journal_path(state.generation)
        try:
            fd = self._writer(state)
            if os.fstat(fd).st_size > state.offset:
                # The incomplete record of an interrupted append is truncated first: readers that
                # compare the file size must not mistake it for this record.
                os.ftruncate(fd, state.offset)
        except OSError as exc:
            raise translate_os_error(exc, f"write {path}") from exc
        # After a failed sync the SEAL need not be durable: only current readers need it.
        durable = self.config.sync_writes if kind is Kind.COMMIT else True
        sync_failed = self._sync_failed or state.failed_sync_generation == state.generation
        sync = durable and not (sync_failed and kind is Kind.SEAL)
        offset = state.offset  # a reader that sees the record advances `state.offset`
        job = _ExecutorJob(lambda: _append(fd, data, offset, sync))
        self.threads.submit(job.run)
        self._append = append
        cancelled: asyncio.CancelledError | None = None
        while not job.done:
            try:
                await job.wait()
            except asyncio.CancelledError as exc:
                cancelled = exc
        self._append = None
        failure = job.failure
        if failure is None or isinstance(failure, _SyncFailed):
            self._apply(state, append)
        if isinstance(failure, _SyncFailed):
            # After a failed sync it is unknown what is on the disk, and another sync of the same
            # file would report success. The record can be read, so it is valid; the next write
            # first writes all data files again.
            self._sync_failed = True
        if cancelled is not None:
            raise cancelled
        if isinstance(failure, OSError | _SyncFailed):
            cause = failure.__cause__ or failure
            raise _append_error(failure, path, commit=kind is Kind.COMMIT) from cause
        if failure is not None:
            raise failure  # a programming error, or a MemoryError

    def _apply(self, state: StoreState, append: _PendingAppend) -> None:
        if not append.applied:
            append.applied = True
            state.offset = append.end
            state.sequence += 1
            if append.images:
                state.apply(append.images, append.size, append.merged)

    async def append_control(self, state: StoreState, body: Head | Seal | Fold) -> None:
        """Append a record other than a COMMIT. The write lock is held."""
        sequence = state.sequence
        try:
            kind, payload = control(body)
            await self._append_record(state, kind, [payload])
        finally:
            # Even if its sync failed: readers find the SEAL in the file.
            if isinstance(body, Seal) and state.sequence > sequence:
                state.sealed = True

    async def start_generation(self, state: StoreState) -> None:
        """Seal the journal, if there is one, and begin the next. The write lock is held."""
        # Not interrupted by a cancellation: the state in memory must match the journals.
        await run_to_completion(self._start_generation(state))

    async def _start_generation(self, state: StoreState) -> None:
        generation = state.generation + 1
        files = {
            name: _covering(
                content,
                generation if name in state.replaced or state.generation == 0 else content.covers,
            )
            for name, content in state.content.items()
        }
        async with self._prepared_journal(Head(generation, files)) as journal:
            if state.fd >= 0 and not state.sealed:
                await self.append_control(state, Seal(generation))
            await self._switch_to(state, journal)

    @asynccontextmanager
    async def _prepared_journal(
        self, head: Head, rest: bytes = b""
    ) -> AsyncGenerator[_PreparedJournal, None]:
        """A new journal under a temporary name, with this head and optionally one more record.

        It is written before the current journal is sealed: if this fails, the current one stays in use.
        """
        path = self.files.journal(head.generation)
        data = record(*control(head), 0) + rest
        sequence = 2 if rest else 1
        try:
            owned = self.files.ownership()
            temporary, fd = await self._in_thread(_prepare_journal, path, data, owned)
        except OSError as exc:
            raise translate_os_error(exc, f"write {path}") from exc
        journal = _PreparedJournal(head, path, temporary, fd, len(data), sequence)
        try:
            yield journal
        finally:
            if not journal.renamed:
                os.close(fd)
                with suppress(OSError):
                    temporary.unlink()

    async def _in_thread(self, call: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.threads, call, *args)

    async def _switch_to(self, state: StoreState, journal: _PreparedJournal) -> None:
        """Rename the prepared journal to its final name, and switch the state to it."""
        head = journal.head
        try:
            await self._in_thread(
                _name_journal, journal.temporary, journal.path, head.generation == 1
            )
        except OSError as exc:
            raise translate_os_error(exc, f"write {journal.path}") from exc
        journal.renamed = True
        state.close()
        self._close_writer()
        state.fd = journal.fd
        state.generation = head.generation
        state.offset = journal.size
        state.sequence = journal.sequence
        state.sealed = False
        state.replaced.clear()
        for name, content in head.files.items():
            state.content[name] = content
            known = state.known.setdefault(name, [])
            if content not in known:
                known.append(content)

    def _writer(self, state: StoreState) -> int:
        if self._write_fd < 0:
            path = self.files.journal_path(state.generation)
            self._write_fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return self._write_fd

    def _close_writer(self) -> None:
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1

    # -- lifecycle ---------------------------------------------------------------------------

    async def recover(self, recover_from: str) -> None:
        """Recover from a manually replaced data file, or from a damaged journal.

        One step, the rename of a journal that depends on no earlier one, makes the recovery effective.
        If it is interrupted before that step, nothing was changed; if after it, the next process that
        opens the store continues from the new journal.

        Args:
            recover_from: "file", "journal" or "salvage", as in `JSONStorageStrategy.checkpoint`.
        """
        self.refuse_closed()
        self.files.make_folder()
        async with self.locks.exclusive():
            async with self._refreshing:
                try:
                    state = await self._load(recover_from)
                except JournalMissing as exc:
                    raise self._gap_error(exc) from exc
                except OSError as exc:
                    raise translate_os_error(exc, f"read the files in {self.files.folder}") from exc
            self._write_locked = True
            try:
                await run_to_completion(self._start_fresh_journal(state))
                await self.compactor.renew(state)
            except BaseException:
                # The state in memory may differ from the files, which are read again.
                state.close()
                self._state = None
                raise
            finally:
                self._write_locked = False

    async def _start_fresh_journal(self, state: StoreState) -> None:
        """Begin a journal for the current data files. Its first commit contains everything that was
        replayed from the old journals."""
        generation = max([state.generation, *self.files.journals()]) + 1
        files = {name: _covering(content, generation) for name, content in state.content.items()}
        images, state.replayed = state.replayed, {}
        rest = b""
        if any(images.values()):
            rest = await asyncio.to_thread(_commit_record, images)
        try:
            if state.unread:
                await asyncio.to_thread(self.files.keep_damaged, state.unread)
        except OSError as exc:
            raise translate_os_error(exc, f"copy a journal in {self.files.folder}") from exc
        async with self._prepared_journal(Head(generation, files, alone=True), rest) as journal:
            await self._switch_to(state, journal)
        state.known = {name: [content] for name, content in files.items()}
        state.pending = {generation: dict.fromkeys(images, len(rest))} if rest else {}
        await self.drop_journals(generation)

    async def drop_journals(self, before: int) -> None:
        """Remove the journals before generation `before`. The write lock is held."""
        try:
            # In a thread: freeing the disk space of a large file takes time.
            await run_to_completion(asyncio.to_thread(self.files.drop_journals, before))
        except OSError as exc:
            raise translate_os_error(exc, "remove a journal") from exc

    async def probe(self) -> None:
        self.refuse_closed()
        # If there is no store yet, its folder is not created for a probe.
        name = self.files.lock(f".probe.{os.urandom(4).hex()}.tmp").name
        path = self.files.nearest_folder() / name
        try:
            await self._in_thread(_probe, path)
        except OSError as exc:
            raise translate_os_error(exc, f"write to {self.files.folder}") from exc

    async def health(self) -> Mapping[str, Value]:
        state = await self.current()
        journal = self.files.journal(state.generation)
        problems: list[Value] = []
        data_files: dict[str, Value] = {}
        for name in self.files.names:
            paths = self.files.paths_of(name)
            data_files[name] = _file_health(paths[0], problems) if paths else None
        problems += [
            f"{self.files.path(name)} was replaced manually, and its content is in use; the next "
            "write, or `hf-async-store checkpoint`, makes it permanent"
            for name in sorted(state.replaced)
        ]
        if state.needs_rewrite:
            problems.append(
                f"a sync of {self.files.journal(state.failed_sync_generation)} failed: recent commits "
                "may not be on the disk. The next write, or `hf-async-store checkpoint`, writes all "
                "data files again"
            )
        problems += self._compaction_problems(state)
        problems += await self._lock_problems()
        problems += await self._entity_problems(state)
        return {
            "folder": str(self.files.folder.absolute()),
            "files": data_files,
            "journal": str(journal) if state.fd >= 0 else None,
            "journal_bytes_pending": state.pending_bytes,
            "entities": {name: len(state.sections[name].entities) for name in self.schema},
            "undeclared_sections": [*self._undeclared_sections(state)],
            "backups": {
                name: [each.name for each in self.files.backups(name)] for name in self.files.names
            },
            "free_bytes": self.files.free_bytes(),
            "problems": problems,
        }

    def _compaction_problems(self, state: StoreState) -> list[Value]:
        """Failed or unfinished compactions."""
        if self.compactor.failure is not None:
            return [
                f"the journal could not be compacted into the data files: {self.compactor.failure}"
            ]
        if self.compactor.is_stuck(state):
            return [
                f"an earlier compaction in {self.files.folder} was not completed; "
                "`hf-async-store checkpoint` completes it, or reports why it cannot"
            ]
        return []

    async def _lock_problems(self) -> list[Value]:
        """Whether the write lock can be acquired. The process that holds it may be suspended."""
        if not self.files.exists():
            return []  # no lock file is created for this check
        seconds = min(self.config.lock_timeout, _HEALTH_LOCK_SECONDS)
        try:
            async with self.locks.exclusive(seconds):
                return []
        except LockTimeoutError:
            return [
                f"no write could begin within {seconds:g} s: another process, or a transaction of "
                f"this one, holds {self.files.lock()}. A suspended process holds it until it is "
                "resumed or ends"
            ]
        except (PermissionDeniedError, ReadOnlyStoreError):
            return []  # the probe reports it

    async def _entity_problems(self, state: StoreState) -> list[Value]:
        """The errors of entities that another program wrote and that were not read yet."""
        problems: list[Value] = []
        for name in self.schema:
            section = state.sections[name]
            unchecked = [
                each for each, stored in section.entities.items() if type(stored) is not bytes
            ]
            for number, entity_id in enumerate(unchecked, 1):
                try:
                    section.canonical(entity_id)
                except CorruptionError as exc:
                    problems.append(str(exc))
                if not number % _HEALTH_CHUNK:
                    await asyncio.sleep(0)
        return problems

    def _undeclared_sections(self, state: StoreState) -> list[str]:
        extra = {each for extras in state.extras.values() for each in extras}
        undeclared = extra | (state.sections.keys() - self.schema.keys())
        return sorted(undeclared - {each.name for each in SYSTEM_COLLECTIONS})

    def describe(self) -> Mapping[str, Value]:
        return {
            "folder": str(self.files.folder.absolute()),
            "files": [str(each) for each in self.files.names],
            "configuration": redacted(self.config),
        }

    async def close(self) -> None:
        try:
            await self.compactor.close()
            if self._state is not None:
                await self._compact_if_last()
        finally:
            self._closed = True
            self._close_writer()
            if self._state is not None:
                self._state.close()
                self._state = None
            self._registry.close()
            self.compactor.release()
            self.locks.close()
            self.threads.shutdown(wait=False)

    async def _compact_if_last(self) -> None:
        """Compact, if no other process has the store open: the data files then contain everything."""
        self._register()  # an earlier attempt may have met another process that was closing the store
        if self._registry.held is None:
            return  # no lock file can be created here, so no process can write here, either
        try:
            self._registry.unlock()
            if self._registry.try_lock(exclusive=True):
                await self.compactor.at_close()
        except (PermissionDeniedError, ReadOnlyStoreError):
            pass  # a process that may write here compacts the journal
        except StorageError:
            # The journal contains every acknowledged commit; a later process compacts it.
            log.warning("the journal was not compacted into the data files at close", exc_info=True)

    def _register(self, *, creating: bool = False) -> None:
        """Lock the file that shows that a process has the store open. Without effect if no lock file
        can be created.

        Args:
            creating: the store is about to be created. Otherwise no lock file is created where there is
                no store.
        """
        if self._registry.held is None:
            with suppress(StorageError, OSError):
                if creating or self.files.exists():
                    self._registry.try_lock(exclusive=False)

    def refuse_closed(self) -> None:
        if self._closed:
            raise StoreClosedError("this store was closed")

    def __del__(self) -> None:
        """Nothing is lost: the journal contains every acknowledged commit. The store warns."""
        if getattr(self, "_closed", True) or self._state is None:
            return  # it was closed, or never used
        self._close_writer()
        self._state.close()
        self._registry.close()
        self.compactor.release()
        self.locks.close()
        self.threads.shutdown(wait=False)


class _JSONSession(Session):
    """A transaction on the JSON engine. It acquires the write lock at its first operation."""

    def __init__(self, engine: JSONEngine) -> None:
        self._engine = engine
        self._stack = AsyncExitStack()
        self._view: SessionView | None = None
        self._state: StoreState | None = None
        self._owner: asyncio.Task[object] | None = None

    async def __aenter__(self) -> Session:
        self._owner = asyncio.current_task()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc is None and self._view is not None and self._state is not None:
                await self._engine.commit(self._state, self._view.layers[0])
        finally:
            await self._stack.aclose()

    async def _begin(self) -> SessionView:
        if self._view is None:
            self._state = await self._stack.enter_async_context(self._engine.writing(self._owner))
            self._view = self._engine.view(self._state)
            self._view.layers.append({})
        self._engine.refuse_closed()
        return self._view

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return await (await self._begin()).fetch(keys)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        async with Owned((await self._begin()).select(query)) as records:
            async for each in records:
                yield each

    async def count(self, query: Query) -> int:
        return await (await self._begin()).count(query)

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        return await (await self._begin()).write(changes)

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[Session]:
        view = await self._begin()
        depth = len(view.layers)
        view.layers.append({})
        try:
            yield self
        except BaseException:
            del view.layers[depth:]
            raise
        view.commit_overlay()


def _covering(content: FileState, generation: int) -> FileState:
    """The same content of a data file, complete up to the beginning of `generation`."""
    return FileState(content.digest, generation, content.ours, content.collection)


def _append_error(failure: OSError | _SyncFailed, path: str, *, commit: bool) -> StorageError:
    if isinstance(failure, _SyncFailed) and isinstance(failure.__cause__, OSError):
        error = translate_os_error(failure.__cause__, f"sync {path} to the disk")
        error.outcome_unknown = commit
        return error
    assert isinstance(failure, OSError), "an append raises no other errors"
    return translate_os_error(failure, f"write {path}")


# -- in worker threads ----------------------------------------------------------------------


def _append(fd: int, data: Sequence[bytes], offset: int, sync: bool) -> None:
    """Append one record to a journal."""
    end = offset
    try:
        for chunk in data:
            write_all(fd, chunk, end)
            end += len(chunk)
    except OSError:
        with suppress(OSError):
            os.ftruncate(fd, offset)
        raise
    if sync:
        try:
            sync_data(fd)
        except OSError as exc:
            # While the lock is held: the next writer, in any process, must know about the failure.
            try:
                mark_sync_failed(fd)
            except OSError:
                log.warning(
                    "a sync of the journal failed, and the journal could not be marked so that other "
                    "processes know about it",
                    exc_info=True,
                )
            raise _SyncFailed from exc


def _commit_record(images: Images) -> bytes:
    return record(Kind.COMMIT, b"".join(commit_payload(images)), 1)


def _prepare_journal(path: Path, data: bytes, owned: Ownership | None) -> tuple[Path, int]:
    """Write and sync a journal that begins with `data`, under a temporary name.

    Returns:
        Its path, and an open descriptor.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if owned is not None:
            share(fd, owned)
        write_all(fd, data, 0)
        os.fsync(fd)
    except BaseException:
        os.close(fd)
        with suppress(OSError):
            temporary.unlink()
        raise
    return temporary, fd


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


def _probe(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, b"probe", 0)
        sync_data(fd)
        if os.pread(fd, 5, 0) != b"probe":
            raise OSError(errno.EIO, "the bytes read back differ from the bytes written")
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)  # a compaction may have removed it as an old temporary file


def _file_health(path: Path, problems: list[Value]) -> Value:
    try:
        status = path.stat()
    except OSError as exc:
        problems.append(f"{path}: {exc.strerror}")
        return None
    if not os.access(path, os.R_OK):
        problems.append(f"{path} cannot be read: this process has no permission")
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        problems.append(
            f"{path} cannot be replaced: this process may not write the file or its folder"
        )
    return {"path": str(path), "bytes": status.st_size, "mode": oct(status.st_mode & 0o777)}
