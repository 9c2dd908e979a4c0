"""The JSON engine: memory plus a journal.

A read is answered from memory, after one `fstat` has shown that no process appended to the journal.
A write takes the store's write lock, reads what others appended, decides, and appends one record:
changes that wait at the same time share the record and its sync. The journal is written to the data
files from time to time (`compaction.py`).
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
from hf_async_store.migration_routing import SYSTEM_COLLECTIONS
from hf_async_store.os_errors import translate_os_error
from hf_async_store.ownership import share
from hf_async_store.schema import Collection
from hf_async_store.strategies.json.compaction import Compactor
from hf_async_store.strategies.json.files import (
    FileManager,
    Signature,
    is_doubtful,
    mark_doubtful,
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
    commit_text,
    control,
    header,
    read_fold,
    read_head,
    record,
    scan,
)
from hf_async_store.strategies.json.overlay import OverlayView
from hf_async_store.strategies.json.recovery import (
    JournalMissing,
    Merged,
    StoreLoader,
    StoreState,
    open_journal,
    read_blocks,
    reclaim_images,
    scanned,
)
from hf_async_store.strategies.json.serializer import JSONSerializer, holds_entities
from hf_async_store.strategies.json.snapshot import Snapshot
from hf_async_store.values import Entity, Key, Value

if TYPE_CHECKING:
    from hf_async_store.config import JSONConfig
    from hf_async_store.ownership import Ownership
    from hf_async_store.query import Query
    from hf_async_store.schema import Schema

Result = TypeVar("Result")

log: Final = logging.getLogger("hf_async_store.json")

_FILE_CHECK_SECONDS: Final = 0.05
"""How often reads look whether a data file was replaced by hand. Writes always look."""

_LARGE_CHUNK: Final = 1 << 16
_LARGE_RECORD: Final = 1 << 22
_HEALTH_CHUNK: Final = 128
_HEALTH_LOCK_SECONDS: Final = 5.0
_TRIES: Final = 3
"""How often a reader starts over before it asks for the lock."""

_YIELD_MASK: Final = 0x7F
"""Every so many reads yield to the event loop: reads from memory never wait for anything."""


class _PendingAppend:
    """A commit on its way to the journal."""

    __slots__ = ("applied", "end", "images", "merged", "size")

    def __init__(self, images: Images, end: int, size: int, merged: Merged) -> None:
        self.images = images
        self.end = end
        self.size = size
        self.merged = merged
        self.applied = False


class _Prepared:
    """A journal that is written and does not have its name yet."""

    __slots__ = ("begun", "fd", "head", "path", "sequence", "size", "temporary")

    def __init__(
        self, head: Head, path: Path, temporary: Path, fd: int, size: int, sequence: int
    ) -> None:
        self.head = head
        self.path = path
        self.temporary = temporary
        self.fd = fd
        self.size = size
        self.sequence = sequence
        self.begun = False


class _ExecutorJob:
    """One call in a worker thread; whoever waits for it may be cancelled, the call is not.

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
        """In the thread."""
        try:
            self._call()
        except BaseException as exc:  # noqa: BLE001  # raised where the commit looks at it
            self.failure = exc
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self.done = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        self._waiter = self._loop.create_future()
        await self._waiter


class _SyncFailed(Exception):  # noqa: N818  # never leaves this module
    """The record was written, and nobody knows whether it is on the disk."""


class JSONEngine:
    """Entities in JSON files."""

    capabilities: Final = Capabilities(engine="json", durable=True, multi_process=True)

    def __init__(self, config: JSONConfig, schema: Schema) -> None:
        self.config = config
        self.schema = schema
        self.files = FileManager(config, schema)
        self.serializer = JSONSerializer(schema, self._place)
        self.locks = LockManager(
            self.files.lock(), timeout=config.lock_timeout, owned=self.files.ownership
        )
        self.loader = StoreLoader(self.files, schema, self.serializer, config.cache_size)
        self.folding = Compactor(self)
        self._registry = FileLock(self.files.lock(".open"), self.files.ownership)
        # Two: a commit never waits for a fold that is writing.
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="hf-async-store-json")
        self._state: StoreState | None = None
        self._plain: OverlayView  # without layers, on the current state
        self._refreshing = asyncio.Lock()
        self._owned = False  # the write lock is held, and the state follows all there is
        self._append: _PendingAppend | None = None
        self._write_fd = -1
        self._broken = False  # a sync failed: the journal may lack what it shows
        self._next_file_check = 0.0
        self._reads = 0
        self._closed = False

    def _place(self, collection: str) -> str:
        """Where it lies, for errors."""
        for name, each in self.files.names.items():
            if each in (None, collection):
                return f" in {(self.files.found(name) or [self.files.path(name)])[0]}"
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
        return await self._plain.fetch(keys)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        state = await self.current()
        async with Owned(self.view(state).select(query)) as records:
            async for each in records:
                yield each

    async def iter_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        """See `SupportsBatches`."""
        state = await self.current()
        async with Owned(self.view(state).iter_batches(query)) as pieces:
            async for each in pieces:
                yield each

    async def count(self, query: Query) -> int:
        return await self.view(await self.current()).count(query)

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        state = await self.current()
        raw = state.kept(collection.name, entity_id)
        if raw is None:
            return None
        text = self.serializer.normalize(collection, entity_id, raw)
        return Record(
            Key(collection.name, entity_id), self.serializer.entity(collection, entity_id, text)
        )

    async def exists(self) -> bool:
        self.refuse_closed()
        return self.files.is_there()

    async def is_same_store(self, other: Engine) -> bool:
        if not isinstance(other, JSONEngine):
            return False
        try:
            return bool(self.files.identities() & other.files.identities())
        except OSError as exc:
            raise translate_os_error(exc, f"look at {self.files.folder}") from exc

    async def undeclared(self) -> list[str]:
        state = await self.current()
        found = {*self._undeclared(state), *await self._strange_files()}
        return sorted(found - set(self.schema))

    async def _strange_files(self) -> list[str]:
        """Collections that lie in files of their own which nothing names, by the names of these."""
        found = []
        for name in self.files.strange_files():
            try:
                file = await self.files.read(name)
            except CorruptionError:
                found.append(name.removesuffix(".json"))  # nobody can say that it is none
                continue
            if file is not None and await asyncio.to_thread(holds_entities, file.text):
                found.append(name.removesuffix(".json"))
        return found

    async def explain(self, query: Query) -> QueryPlan:
        return await self.view(await self.current()).explain(query)

    @property
    def loaded(self) -> StoreState | None:
        """The state as it is in memory, be it behind the files."""
        return self._state

    def view(self, state: StoreState) -> OverlayView:
        return OverlayView(
            state, self.schema, self.serializer, references=self.config.enforce_references
        )

    async def current(self) -> StoreState:
        """The state as the files have it now."""
        state = self._state
        return state if state is not None and self._is_current(state) else await self.refresh()

    # -- following ---------------------------------------------------------------------------

    def _is_current(self, state: StoreState) -> bool:
        """Whether memory holds all that the journal shows: one system call where it does."""
        try:
            return self._shows_all(state)
        except OSError as exc:
            raise translate_os_error(exc, f"look at the files in {self.files.folder}") from exc

    def _shows_all(self, state: StoreState) -> bool:
        append = self._append
        if append is not None:
            # Ours is the only append there can be. From the moment at which others can read the
            # record it must be seen here, too, or a value would be seen to go back.
            if not append.applied and os.fstat(state.fd).st_size >= append.end:
                self._apply(state, append)
            return True
        if self._owned:
            return True
        if state.fd < 0 or state.sealed:
            self.files.refuse_moved_links()
            return not self._has_successor(state) and not self._files_changed(state)
        found = os.fstat(state.fd)
        if found.st_size != state.offset or not found.st_nlink:
            return False
        now = time.monotonic()
        if now < self._next_file_check:
            return True
        self.files.refuse_moved_links()
        moved = self._has_successor(state) or not self._in_place(state)
        if moved or self._files_changed(state):
            return False  # and look again at the next read, until this is settled
        self._next_file_check = now + _FILE_CHECK_SECONDS
        return True

    def _has_successor(self, state: StoreState) -> bool:
        return os.path.exists(self.files.journal_path(state.generation + 1))  # noqa: PTH110  # every write

    def _files_changed(self, state: StoreState) -> bool:
        return any(
            self.files.signature(name) != state.signatures.get(name) for name in self.files.names
        )

    async def refresh(self) -> StoreState:
        """Follow the files, without a lock; with the shared one where that does not do.

        Whoever holds a lock of the store calls `refresh_locked` instead.
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
            # No lock file can be made here, so nobody writes here, either.
            return await self.refresh_locked()

    async def refresh_locked(self) -> StoreState:
        """Follow the files while nobody can change them."""
        self.refuse_closed()
        self._register()
        try:
            return await self._follow()
        except JournalMissing as exc:
            raise self._gap(exc) from exc

    def _gap(self, exc: JournalMissing) -> CorruptionError:
        return CorruptionError(
            f"the journal of {self.files.folder} has a gap: {exc}. Restore a backup "
            "(`hf-async-store restore`), or take the data files alone: `hf-async-store "
            "checkpoint --recover-from file`"
        )

    def _unchanged(self, state: StoreState) -> bool:
        """Whether there is surely nothing to follow: the common case, decided in a few calls.

        Others must be kept from writing, and no other task of this process may be following.
        """
        if self._closed or self._refreshing.locked() or state.fd < 0 or state.sealed:
            return False
        try:
            found = os.fstat(state.fd)
            there = os.stat(self.files.journal_path(state.generation))  # noqa: PTH116  # every write
            return (
                found.st_size == state.offset
                and not is_doubtful(found)
                and os.path.samestat(found, there)
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

    async def _load(self, adopt: str | None = None) -> StoreState:
        self.files.refuse_moved_links()
        loaded = await self.loader.load(adopt=adopt)
        if self._state is not None:
            self._state.close()
        self._close_writer()
        self._state = loaded
        self._plain = self.view(loaded)
        return loaded

    def _refuse_removed(self, state: StoreState | None) -> None:
        """Folds leave a journal. If there is none any more, somebody removed it, and perhaps the
        files: what memory knows to have been there must not silently be gone."""
        if state is None or state.fd < 0 or self.files.journals():
            return
        gone = [name for name, found in state.signatures.items() if found is not None]
        gone = [name for name in gone if self.files.signature(name) is None]
        if state.pending or gone:
            raise JournalMissing(
                f"{self.files.journal(state.generation)} was removed while it was in use"
            )

    def _in_place(self, state: StoreState) -> bool:
        """Whether the journal that is open is the one in the folder."""
        try:
            there = os.stat(self.files.journal_path(state.generation))  # noqa: PTH116  # often
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(state.fd))

    async def _catch_up(self, state: StoreState) -> bool:
        """Read what was appended since; False if the files must be read anew."""
        if self._append is not None or self._owned:
            return True
        while True:
            try:
                if state.fd >= 0 and not await self._read_tail(state):
                    return False
            except CorruptionError:
                if self._in_place(state) and not self._has_successor(state):
                    raise
                return False  # an adoption put that journal aside
            if state.fd >= 0 and not state.sealed:
                if not self._has_successor(state):
                    break
                # A seal comes before its successor, unless an adoption put the journal aside.
                if not await self._read_tail(state) or not state.sealed:
                    return False
            if not self._has_successor(state):
                if self.files.journals()[-1:] > [state.generation]:
                    return False
                break
            if state.generation == 0 or not await self._step(state):
                return False
        if state.fd >= 0 and not state.sealed and not self._in_place(state):
            return False
        return not self._files_changed(state) or await self._same_files(state)

    async def _read_tail(self, state: StoreState) -> bool:
        path = self.files.journal(state.generation)
        found = os.fstat(state.fd)
        size = found.st_size
        if is_doubtful(found):
            state.suspect = state.generation
        if size == state.offset:
            return True
        if size < state.offset:
            return False
        async for entry, end in scanned(state.fd, path, size, state.offset, state.sequence):
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

    async def _step(self, state: StoreState) -> bool:
        """Go over to the next generation; False if it begins from other files than we know."""
        path = self.files.journal(state.generation + 1)
        fd = open_journal(path)
        try:
            size = os.fstat(fd).st_size
            # No more than that record: a commit of 30 MB may follow it.
            first = next(scan(read_blocks(fd, 0, size, path), str(path), 0, 0), None)
            if first is None or first[0].kind is not Kind.HEAD:
                raise JournalMissing(f"{path} has no head yet")
            head, end = first
            found = read_head(head.payload)
            if found.alone or not self._knows(state, found):
                os.close(fd)
                return False
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        left = state.fd
        self._close_writer()
        state.fd = fd
        state.generation += 1
        state.offset = end
        state.sequence = 1
        state.sealed = False
        if left >= 0:
            # In a thread: this may be all that is left of a large file that was removed.
            await run_to_completion(asyncio.to_thread(os.close, left))
        return True

    def _knows(self, state: StoreState, head: Head) -> bool:
        return all(
            any(each.digest == content.digest for each in state.known.get(name, []))
            for name, content in head.files.items()
        )

    async def _same_files(self, state: StoreState) -> bool:
        """Whether files that look changed hold what they should; costs reading them."""
        for name in list(self.files.names):
            signature = self.files.signature(name)
            if signature == state.signatures.get(name):
                continue
            known = state.known.get(name, [])
            match = next((each for each in known if Signature.known(each) == signature), None)
            if match is None:
                found = await self.files.read(name, known)
                digest = None if found is None else found.digest
                match = next((each for each in reversed(known) if each.digest == digest), None)
                signature = None if found is None else found.signature
            if match is None or match.covers < state.content[name].covers:
                return False
            if match.covers > state.content[name].covers:
                state.covered(name, match, self.loader.collections_of(name, state))
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

    def session(self, isolation: Isolation | None) -> _SessionContext:
        return _SessionContext(self)

    @asynccontextmanager
    async def snapshot(self) -> AsyncGenerator[Reader, None]:
        reader = Snapshot(await self.current())
        try:
            yield reader
        finally:
            await reader.close()

    @asynccontextmanager
    async def writing(self, owner: asyncio.Task[object] | None = None) -> AsyncIterator[StoreState]:
        """Hold the store's write lock, with a state that follows all there is.

        Args:
            owner: the task that holds it, where that is not the current one.
        """
        self.refuse_closed()
        if not self._has_journal():
            self.files.make_folder()
        async with self.locks.exclusive(owner=owner):
            self._register(making=True)
            # As `owning`, which costs every write as much as a look at the files.
            try:
                yield await self._own()
            finally:
                self._owned = False

    def _has_journal(self) -> bool:
        """Whether the open journal still lies in a folder; then that folder is there."""
        try:
            state = self._state
            return state is not None and state.fd >= 0 and os.fstat(state.fd).st_nlink > 0
        except OSError:
            return False

    @asynccontextmanager
    async def owning(self) -> AsyncIterator[StoreState]:
        """The state, following all there is; the caller holds the write lock."""
        try:
            yield await self._own()
        finally:
            self._owned = False

    async def _own(self) -> StoreState:
        self.files.refuse_moved_links()
        state = self._state
        if state is None or not self._unchanged(state):
            state = await self.refresh_locked()
        self._owned = True
        if state.superseded:
            # Left by an adoption that was interrupted; somebody may still have them open.
            await self.drop_journals(state.first)
            state.superseded = False
        if self._broken or state.in_doubt:
            await self.folding.renew(state)
            self._broken = False
        return state

    async def commit(self, state: StoreState, images: Images) -> None:
        """Append the images as one record; in memory once it is there. The lock is held.

        Raises:
            DiskFullError, ReadOnlyStoreError, PermissionDeniedError, UnavailableError: nothing was
                written; or, with `outcome_unknown`, the record may not outlive a loss of power.
        """
        if not any(images.values()):
            return
        unnamed = state.replaced or state.content.keys() - state.known.keys()
        if state.fd < 0 or state.sealed or unnamed:
            await self.start_generation(state)
        payload: list[bytes] = []
        for piece in commit_text(images):
            payload.append(piece)
            if len(piece) > _LARGE_CHUNK:
                await asyncio.sleep(0)
        merged = await state.merged(images)
        try:
            await self._append_record(state, Kind.COMMIT, payload, images, merged)
        finally:
            await state.reclaim()
        self.folding.consider()

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
            # Its checksum alone would hold the loop, and so would making one text of it.
            head = await asyncio.to_thread(header, kind, payload, state.sequence)
            data = [head, *payload]
        else:
            data = [b"".join((header(kind, payload, state.sequence), *payload))]
        append = _PendingAppend(images or {}, state.offset + HEADER_SIZE + size, size, merged or {})
        path = self.files.journal_path(state.generation)
        try:
            fd = self._writer(state)
            if os.fstat(fd).st_size > state.offset:
                # What an interrupted append left is cut off now: whoever looks at the size must
                # not take it for this record.
                os.ftruncate(fd, state.offset)
        except OSError as exc:
            raise translate_os_error(exc, f"write {path}") from exc
        # The seal of a broken journal is for those who read on now; it need not last.
        lasting = self.config.sync_writes if kind is Kind.COMMIT else True
        broken = self._broken or state.suspect == state.generation
        sync = lasting and not (broken and kind is Kind.SEAL)
        offset = state.offset  # which moves on as soon as somebody sees the record
        hop = _ExecutorJob(lambda: _append(fd, data, offset, sync))
        self.threads.submit(hop.run)
        self._append = append
        cancelled: asyncio.CancelledError | None = None
        while not hop.done:
            try:
                await hop.wait()
            except asyncio.CancelledError as exc:
                cancelled = exc
        self._append = None
        failure = hop.failure
        if failure is None or isinstance(failure, _SyncFailed):
            self._apply(state, append)
        if isinstance(failure, _SyncFailed):
            # What a failed sync left behind is not known, and another one on the same file would
            # claim success. The record can be read, so it counts; the next write starts over.
            self._broken = True
        if cancelled is not None:
            raise cancelled
        if isinstance(failure, OSError | _SyncFailed):
            cause = failure.__cause__ or failure
            raise _append_error(failure, path, commit=kind is Kind.COMMIT) from cause
        if failure is not None:
            raise failure  # a defect, or no memory

    def _apply(self, state: StoreState, append: _PendingAppend) -> None:
        if not append.applied:
            append.applied = True
            state.offset = append.end
            state.sequence += 1
            if append.images:
                state.apply(append.images, append.size, append.merged)

    async def append_control(self, state: StoreState, body: Head | Seal | Fold) -> None:
        """Append a record that is no commit. The lock is held."""
        sequence = state.sequence
        try:
            kind, payload = control(body)
            await self._append_record(state, kind, [payload])
        finally:
            # Also where its sync failed: whoever reads on finds it there.
            if isinstance(body, Seal) and state.sequence > sequence:
                state.sealed = True

    async def start_generation(self, state: StoreState) -> None:
        """Seal the journal, if there is one, and begin the next. The lock is held."""
        # To its end, also when cancelled: what is sealed, and what begins, must be known here.
        await run_to_completion(self._start_generation(state))

    async def _start_generation(self, state: StoreState) -> None:
        generation = state.generation + 1
        files = {
            name: _from(
                content,
                generation if name in state.replaced or state.generation == 0 else content.covers,
            )
            for name, content in state.content.items()
        }
        async with self._prepared(Head(generation, files)) as journal:
            if state.fd >= 0 and not state.sealed:
                await self.append_control(state, Seal(generation))
            await self._begin(state, journal)

    @asynccontextmanager
    async def _prepared(self, head: Head, rest: bytes = b"") -> AsyncGenerator[_Prepared, None]:
        """A new journal under another name, with this head and, behind it, one more record.

        Before the journal that is there is sealed: where none can be made, that one goes on.
        """
        path = self.files.journal(head.generation)
        data = record(*control(head), 0) + rest
        sequence = 2 if rest else 1
        try:
            owned = self.files.ownership()
            temporary, fd = await self._in_thread(_prepare_journal, path, data, owned)
        except OSError as exc:
            raise translate_os_error(exc, f"write {path}") from exc
        journal = _Prepared(head, path, temporary, fd, len(data), sequence)
        try:
            yield journal
        finally:
            if not journal.begun:
                os.close(fd)
                with suppress(OSError):
                    temporary.unlink()

    async def _in_thread(self, call: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.threads, call, *args)

    async def _begin(self, state: StoreState, journal: _Prepared) -> None:
        """The prepared journal gets its name, and the state goes over to it."""
        head = journal.head
        try:
            await self._in_thread(
                _name_journal, journal.temporary, journal.path, head.generation == 1
            )
        except OSError as exc:
            raise translate_os_error(exc, f"write {journal.path}") from exc
        journal.begun = True
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

    async def recover(self, which: str) -> None:
        """Settle a data file that was replaced by hand, or a damaged journal: "file", "journal" or
        what is "salvage" counts.

        One step settles it: a journal that leans on no earlier one. Interrupted before, the question
        is open still, and nothing was changed; afterwards whoever comes next goes on from there.
        """
        self.refuse_closed()
        self.files.make_folder()
        async with self.locks.exclusive():
            async with self._refreshing:
                try:
                    state = await self._load(which)
                except JournalMissing as exc:
                    raise self._gap(exc) from exc
                except OSError as exc:
                    raise translate_os_error(exc, f"read the files in {self.files.folder}") from exc
            self._owned = True
            try:
                await run_to_completion(self._start_fresh_journal(state))
                await self.folding.renew(state)
            except BaseException:
                # What was read must not be taken for the answer: the files have it.
                state.close()
                self._state = None
                raise
            finally:
                self._owned = False

    async def _start_fresh_journal(self, state: StoreState) -> None:
        """Begin a journal on the data files as they lie there, with all that was replayed in it."""
        generation = max([state.generation, *self.files.journals()]) + 1
        files = {name: _from(content, generation) for name, content in state.content.items()}
        images, state.replayed = state.replayed, {}
        rest = b""
        if any(images.values()):
            rest = await asyncio.to_thread(_commit_record, images)
        try:
            if state.unread:
                await asyncio.to_thread(self.files.keep_damaged, state.unread)
        except OSError as exc:
            raise translate_os_error(exc, f"keep a journal in {self.files.folder}") from exc
        async with self._prepared(Head(generation, files, alone=True), rest) as journal:
            await self._begin(state, journal)
        state.known = {name: [content] for name, content in files.items()}
        state.pending = {generation: dict.fromkeys(images, len(rest))} if rest else {}
        await self.drop_journals(generation)

    async def drop_journals(self, before: int) -> None:
        """Remove the generations that every data file holds. The lock is held."""
        try:
            # In a thread: to free what a large file takes on the disk is not done in a moment.
            await run_to_completion(asyncio.to_thread(self.files.drop_journals, before))
        except OSError as exc:
            raise translate_os_error(exc, "remove a journal") from exc

    async def probe(self) -> None:
        self.refuse_closed()
        # Where there is no store yet, its folder need not be made for this.
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
            paths = self.files.found(name)
            data_files[name] = _file_health(paths[0], problems) if paths else None
        problems += [
            f"{self.files.path(name)} was replaced by hand and taken over; the next write, or "
            "`hf-async-store checkpoint`, confirms it"
            for name in sorted(state.replaced)
        ]
        if state.in_doubt:
            problems.append(
                f"{self.files.journal(state.suspect)} could not be brought to the disk; the next "
                "write, or `hf-async-store checkpoint`, writes everything anew"
            )
        problems += self._unfolded(state)
        problems += await self._held_up()
        problems += await self._unreadable(state)
        return {
            "folder": str(self.files.folder.absolute()),
            "files": data_files,
            "journal": str(journal) if state.fd >= 0 else None,
            "journal_bytes_pending": state.pending_bytes,
            "entities": {name: len(state.sections[name].held) for name in self.schema},
            "undeclared_sections": [*self._undeclared(state)],
            "backups": {
                name: [each.name for each in self.files.backups(name)] for name in self.files.names
            },
            "free_bytes": self.files.free_bytes(),
            "problems": problems,
        }

    def _unfolded(self, state: StoreState) -> list[Value]:
        """Whether the journal can be folded, as far as the last try tells."""
        if self.folding.failure is not None:
            return [f"the journal could not be folded into the data files: {self.folding.failure}"]
        if self.folding.is_stuck(state):
            return [
                f"an earlier fold in {self.files.folder} did not come to its end; "
                "`hf-async-store checkpoint` does it, or says what is in the way"
            ]
        return []

    async def _held_up(self) -> list[Value]:
        """Whether writers get their turn. A process that holds the lock may be suspended."""
        if not self.files.is_there():
            return []  # and no lock file is made for this
        seconds = min(self.config.lock_timeout, _HEALTH_LOCK_SECONDS)
        try:
            async with self.locks.exclusive(seconds):
                return []
        except LockTimeoutError:
            return [
                f"no write could begin within {seconds:g} s: another process, or a transaction of "
                f"this one, holds {self.files.lock()}. A suspended process holds it until it goes on"
            ]
        except (PermissionDeniedError, ReadOnlyStoreError):
            return []  # the probe reports it

    async def _unreadable(self, state: StoreState) -> list[Value]:
        """What is wrong with entities that came from elsewhere and that nobody has read yet."""
        found: list[Value] = []
        for name in self.schema:
            section = state.sections[name]
            foreign = [each for each, held in section.held.items() if type(held) is not bytes]
            for number, entity_id in enumerate(foreign, 1):
                try:
                    section.canonical(entity_id)
                except CorruptionError as exc:
                    found.append(str(exc))
                if not number % _HEALTH_CHUNK:
                    await asyncio.sleep(0)
        return found

    def _undeclared(self, state: StoreState) -> list[str]:
        kept = {each for extras in state.extras.values() for each in extras}
        there = kept | (state.sections.keys() - self.schema.keys())
        return sorted(there - {each.name for each in SYSTEM_COLLECTIONS})

    def describe(self) -> Mapping[str, Value]:
        return {
            "folder": str(self.files.folder.absolute()),
            "files": [str(each) for each in self.files.names],
            "configuration": redacted(self.config),
        }

    async def close(self) -> None:
        try:
            await self.folding.close()
            if self._state is not None:
                await self._leave()
        finally:
            self._closed = True
            self._close_writer()
            if self._state is not None:
                self._state.close()
                self._state = None
            self._registry.close()
            self.folding.release()
            self.locks.close()
            self.threads.shutdown(wait=False)

    async def _leave(self) -> None:
        """The last process out folds the journal, so that the files at rest hold everything."""
        self._register()  # others may have been leaving when it was tried before
        if self._registry.held is None:
            return  # no lock file can be made here, so nobody writes here, either
        try:
            self._registry.unlock()
            if self._registry.try_lock(exclusive=True):
                await self.folding.at_close()
        except (PermissionDeniedError, ReadOnlyStoreError):
            pass  # whoever may write here will fold it
        except StorageError:
            # The journal holds everything that was acknowledged; the next one to open folds it.
            log.warning("the journal was not folded at close", exc_info=True)

    def _register(self, *, making: bool = False) -> None:
        """Be known as one that has the store open; where no lock file can be made, go without.

        Args:
            making: the store is about to be made. Else nothing is, where there is none.
        """
        if self._registry.held is None:
            with suppress(StorageError, OSError):
                if making or self.files.is_there():
                    self._registry.try_lock(exclusive=False)

    def refuse_closed(self) -> None:
        if self._closed:
            raise StoreClosedError("this store was closed")

    def __del__(self) -> None:
        """Nothing is lost: the journal holds what was acknowledged. The store warns."""
        if getattr(self, "_closed", True) or self._state is None:
            return  # it was closed, or never did anything
        self._close_writer()
        self._state.close()
        self._registry.close()
        self.folding.release()
        self.locks.close()
        self.threads.shutdown(wait=False)


class _SessionContext:
    """A transaction on the JSON engine: it takes the write lock at its first operation."""

    def __init__(self, engine: JSONEngine) -> None:
        self._engine = engine
        self._stack = AsyncExitStack()
        self._view: OverlayView | None = None
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

    async def _begun(self) -> OverlayView:
        if self._view is None:
            self._state = await self._stack.enter_async_context(self._engine.writing(self._owner))
            self._view = self._engine.view(self._state)
            self._view.layers.append({})
        self._engine.refuse_closed()
        return self._view

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return await (await self._begun()).fetch(keys)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        async with Owned((await self._begun()).select(query)) as records:
            async for each in records:
                yield each

    async def count(self, query: Query) -> int:
        return await (await self._begun()).count(query)

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        return await (await self._begun()).write(changes)

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[Session]:
        view = await self._begun()
        depth = len(view.layers)
        view.layers.append({})
        try:
            yield self
        except BaseException:
            del view.layers[depth:]
            raise
        view.commit_overlay()


def _from(content: FileState, generation: int) -> FileState:
    """The same content of a data file, which lacks nothing before this generation."""
    return FileState(content.digest, generation, content.ours, content.collection)


def _append_error(failure: OSError | _SyncFailed, path: str, *, commit: bool) -> StorageError:
    if isinstance(failure, _SyncFailed) and isinstance(failure.__cause__, OSError):
        error = translate_os_error(failure.__cause__, f"bring {path} to the disk")
        error.outcome_unknown = commit
        return error
    assert isinstance(failure, OSError), "all else that appending raises"
    return translate_os_error(failure, f"write {path}")


# -- in worker threads ----------------------------------------------------------------------


def _append(fd: int, data: Sequence[bytes], offset: int, sync: bool) -> None:
    """One record at the end of a journal."""
    end = offset
    try:
        for piece in data:
            write_all(fd, piece, end)
            end += len(piece)
    except OSError:
        with suppress(OSError):
            os.ftruncate(fd, offset)
        raise
    if sync:
        try:
            sync_data(fd)
        except OSError as exc:
            # While the lock is held: whoever writes next must know, also in another process.
            try:
                mark_doubtful(fd)
            except OSError:
                log.warning("a failed sync could not be marked for other processes", exc_info=True)
            raise _SyncFailed from exc


def _commit_record(images: Images) -> bytes:
    return record(Kind.COMMIT, b"".join(commit_text(images)), 1)


def _prepare_journal(path: Path, data: bytes, owned: Ownership | None) -> tuple[Path, int]:
    """A journal that begins with `data`, on the disk, not under its name yet; a descriptor of it."""
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
    """Whole or not at all.

    Args:
        first: its folder may be new, too.
    """
    try:
        temporary.rename(path)
        sync_folder(path.parent)
        if first:
            sync_parents(path.parent)
    except BaseException:
        # Perhaps it has its name already, and the folder could not be brought to the disk.
        with suppress(OSError):
            path.unlink()
        raise


def _probe(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, b"probe", 0)
        sync_data(fd)
        if os.pread(fd, 5, 0) != b"probe":
            raise OSError(errno.EIO, "what was written did not come back")
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)  # a fold clears away what looks left behind


def _file_health(path: Path, problems: list[Value]) -> Value:
    try:
        found = path.stat()
    except OSError as exc:
        problems.append(f"{path}: {exc.strerror}")
        return None
    if not os.access(path, os.R_OK):
        problems.append(f"{path} cannot be read")
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        problems.append(f"{path} cannot be replaced")
    return {"path": str(path), "bytes": found.st_size, "mode": oct(found.st_mode & 0o777)}
