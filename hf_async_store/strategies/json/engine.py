"""The JSON engine: memory plus a journal.

A read is served from memory, after one `fstat` has shown that no process appended to the journal
(`follower.py`). A write acquires the store's write lock, reads the records that other processes
appended, checks its preconditions and appends one record (`journal_writer.py`): changes that wait at
the same time share the record and its sync. The commits in the journal are written to the data files
from time to time (`compaction.py`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hf_async_store.changes import Change, Outcome, Record, TakeChanges
from hf_async_store.config import JSONConfig, redacted
from hf_async_store.declarations import are_equal, merged, other_key
from hf_async_store.deferred import deferred
from hf_async_store.disk_space import free_bytes, too_little
from hf_async_store.driver import (
    INTERFACE_VERSION,
    Capabilities,
    Claimed,
    ClaimTerms,
    Engine,
    FeedBatch,
    Isolation,
    QueryPlan,
    Reader,
    SchemaChange,
    SchemaProgress,
    Session,
)
from hf_async_store.errors import (
    ConfigurationError,
    CorruptionError,
    LockTimeoutError,
    PermissionDeniedError,
    ReadOnlyStoreError,
    SchemaMismatchError,
    StorageError,
    UnavailableError,
)
from hf_async_store.event_loop import Chunks, in_thread, pause
from hf_async_store.generators import Owned
from hf_async_store.locks import LockManager, this_task
from hf_async_store.os_errors import translate_os_error
from hf_async_store.passed_over import PassedOver
from hf_async_store.query import Query
from hf_async_store.schema import (
    CLAIM_COLLECTION,
    SYSTEM_COLLECTIONS,
    Collection,
    Index,
    Schema,
)
from hf_async_store.strategies.json.declarations_file import DeclarationsFile, feeds_of
from hf_async_store.strategies.json.files import (
    CLAIM_FILE,
    SYSTEM_SECTIONS,
    FileManager,
    sync_data,
    write_all,
)
from hf_async_store.strategies.json.folder_watch import FolderWatch
from hf_async_store.strategies.json.follower import Follower
from hf_async_store.strategies.json.journal import FeedPosition, Images
from hf_async_store.strategies.json.recovery import StoreLoader
from hf_async_store.strategies.json.serializer import (
    JSONSerializer,
    StoredEntity,
    holds_entities,
)
from hf_async_store.strategies.json.session_view import SessionView
from hf_async_store.strategies.json.snapshot_reader import SnapshotReader
from hf_async_store.strategies.json.store_state import StoreState
from hf_async_store.unique import Fields
from hf_async_store.values import Entity, Key, Value

if TYPE_CHECKING:
    from hf_async_store.strategies.json import (
        change_feed,
        compaction,
        journal_writer,
        kept_journals,
    )
    from hf_async_store.strategies.json.change_feed import ChangeFeed
    from hf_async_store.strategies.json.compaction import Compactor
    from hf_async_store.strategies.json.journal_writer import JournalWriter
else:
    change_feed = deferred("strategies.json.change_feed")
    compaction = deferred("strategies.json.compaction")
    journal_writer = deferred("strategies.json.journal_writer")
    kept_journals = deferred("strategies.json.kept_journals")

Result = TypeVar("Result")

log: Final = logging.getLogger("hf_async_store.json")

_HEALTH_CHUNK: Final = 1 << 16
"""How many bytes of entities are checked in one step: about 1 ms."""

_HEALTH_ENTITIES: Final = 1 << 10
"""How many entities are looked at in one step: about 1 ms."""

_HEALTH_LOCK_SECONDS: Final = 5.0

_FEED_TRIES: Final = 3
"""How often the change feed is read without the lock before the read lock is acquired."""

_REPLACED_PAUSE: Final = 0.02
"""Before the change feed is read because a data file was replaced: mostly by a compaction, which may need
a moment until the file is known."""

_FIRST_PATIENCE: Final = 0.05
"""For how many seconds a writer first keeps the write lock while it waits for the syncs of others."""

_YIELD_MASK: Final = 0x7F
"""One of 128 reads returns control to the event loop: reads from memory never wait otherwise."""


class JSONEngine(Engine):
    """Entities in JSON files."""

    interface_version = INTERFACE_VERSION
    capabilities: Capabilities = Capabilities(
        engine="json",
        durable=True,
        multi_process=True,
        claims=True,
        change_markers=True,
        unique_indexes=True,
        feed=True,
        feed_order=True,
        write_batch=4096,
    )

    def __init__(self, config: JSONConfig, schema: Schema) -> None:
        self.config = config
        self.schema = schema
        self.files = FileManager(config, schema)
        self.serializer = JSONSerializer(schema, self._location)
        self.locks = LockManager(
            self.files.lock(),
            timeout=config.lock_timeout,
            owned=self.files.ownership,
            while_waiting=lambda: self.follower.read_ahead(),
        )
        loader = StoreLoader(self.files, schema, self.serializer, config.cache_size)
        self.follower = Follower(self.files, loader, self.locks, self.view)
        self._declarations = DeclarationsFile(self.files)
        self._folder_watch = FolderWatch(self.files.folder)
        self._unique = schema.unique
        self._feeds = feeds_of(schema.values())
        self._keys_checked = False
        self._tidied = False
        self._reads = 0

    @cached_property
    def journal(self) -> JournalWriter:
        """What appends commits; made, and imported, when it is needed, as is `compactor`."""
        return journal_writer.JournalWriter(
            self.files,
            self._declarations,
            kept_journals.KeptJournals(self.files, self.config.feed_bytes),
            self.locks,
            sync_commits=self.config.sync_writes,
        )

    @cached_property
    def compactor(self) -> Compactor:
        """What writes the commits to the data files."""
        return compaction.Compactor(
            self.config, self.files, self.follower, self.journal, self.writing
        )

    @property
    def _has_compactor(self) -> bool:
        return "compactor" in vars(self)

    def _location(self, collection: str) -> str:
        """The path of a collection's data file, for error messages."""
        for name, each in self.files.names.items():
            if each in (None, collection):
                return f" in {(self.files.paths_of(name) or [self.files.path(name)])[0]}"
        return ""

    # -- reading -----------------------------------------------------------------------------

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        follower = self.follower
        state = follower.state
        if state is None and (state := await follower.look_up(keys)) is not None:
            return await self.view(state).fetch(keys)
        if state is None or not follower.is_current(state):
            state = await follower.refresh()
        self._reads += 1
        if not self._reads & _YIELD_MASK:
            await asyncio.sleep(0)
            follower.refuse_closed()  # closing frees the entities
            if not follower.is_current(state):
                await follower.refresh()
        return await follower.committed.fetch(keys)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        state = await self.follower.current()
        async with Owned(self.view(state).select(query)) as records:
            async for each in records:
                yield each

    async def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        state = await self.follower.current()
        async with Owned(self.view(state).select_batches(query)) as batches:
            async for batch in batches:
                yield batch

    async def count(self, query: Query) -> int:
        return await self.view(await self.follower.current()).count(query)

    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        state = None
        if self.follower.state is None and not self.locks.holds():
            state = await self.follower.look_up([Key(collection.name, entity_id)])
        if state is None:
            state = await self._current()
        raw = state.raw_entity(collection.name, entity_id)
        if raw is None:
            return None
        encoded = self.serializer.normalize(collection, entity_id, raw)
        return Record(
            Key(collection.name, entity_id), self.serializer.entity(collection, entity_id, encoded)
        )

    async def _current(self) -> StoreState:
        # `current` may wait for the read lock; a task that holds a lock must not.
        follower = self.follower
        return await (follower.refresh_locked() if self.locks.holds() else follower.current())

    async def exists(self) -> bool:
        self.follower.refuse_closed()
        return self.files.exists()

    async def is_same_store(self, other: Engine) -> bool:
        if not isinstance(other, JSONEngine):
            return False
        try:
            return bool(self.files.identities() & other.files.identities())
        except OSError as exc:
            raise translate_os_error(exc, f"check {self.files.folder}") from exc

    async def undeclared(self) -> list[str]:
        state = await self.follower.current()
        names = {*self._undeclared_sections(state), *await self._undeclared_files()}
        return sorted(names - {*self.schema, *SYSTEM_SECTIONS})

    async def _undeclared_files(self) -> list[str]:
        """The names of collections in data files that neither configuration nor journal names."""
        names = []
        for name in self.files.undeclared_files():
            try:
                file = await self.files.read(name)
            except ConfigurationError:
                continue  # the database of another store
            except CorruptionError:
                names.append(name.removesuffix(".json"))  # it may be a damaged data file
                continue
            if file is not None and await in_thread(holds_entities, file.text):
                names.append(name.removesuffix(".json"))
        return names

    async def declarations(self) -> list[Collection]:
        self.follower.refuse_closed()
        return await self._declarations.read()

    async def remember(self, collections: Iterable[Collection]) -> None:
        self.follower.refuse_closed()
        declared = list(collections)
        recorded = await self._declarations.read()
        if are_equal(recorded, merged(recorded, declared)):
            return  # without waiting for the lock, in most processes
        self.files.make_folder()
        if self.locks.holds() == "write":
            await self._record(declared)
            return
        async with self.locks.exclusive():
            await self._record(declared)

    async def _record(
        self,
        collections: Iterable[Collection],
        enforced: Mapping[str, tuple[Fields, ...]] | None = None,
    ) -> None:
        """See `DeclarationsFile.add`."""
        with self.follower.step():
            await self._declarations.add(collections, enforced)

    # -- unique indexes ----------------------------------------------------------------------

    @property
    def enforced(self) -> Mapping[str, tuple[Fields, ...]]:
        """By collection, the fields of the unique indexes that every program enforces."""
        return self._declarations.enforced

    def _unenforced(self) -> list[tuple[str, Index]]:
        enforced = self._declarations.enforced
        return [
            (name, index)
            for name in self._unique
            for index in self.schema[name].indexes
            if index.unique and index.fields not in enforced.get(name, ())
        ]

    async def _enforce_new(self, state: StoreState) -> None:
        """From now on, enforce the declared unique indexes of collections without entities."""
        new = [each for each in self._unenforced() if not state.sections[each[0]].entities]
        if new:
            await self._enforce(new)

    async def _enforce(self, indexes: Iterable[tuple[str, Index]]) -> None:
        """Record unique indexes that every program enforces from now on."""
        enforced = dict(self._declarations.enforced)
        for name, index in indexes:
            enforced[name] = (*enforced.get(name, ()), index.fields)
        await self._record(self.schema.values(), enforced)

    async def unenforced(self) -> list[tuple[str, Index]]:
        if not self._unique:
            return []
        state = await self.follower.current()
        await self._declarations.refresh(self.schema)
        return [each for each in self._unenforced() if state.sections[each[0]].entities]

    async def apply_schema(
        self, *, progress: SchemaProgress | None = None, complete: bool = False
    ) -> None:
        del complete
        if not self._unique:
            return
        async with self.writing() as state:
            indexes = self._unenforced()
            for name, index in indexes:
                await state.sections[name].refuse_duplicates(index.fields)
            await self._enforce(indexes)
        if progress is not None:
            for name, index in indexes:
                progress(SchemaChange("unique index", name, index.name, "enforced"), 1, 1)

    async def explain(self, query: Query) -> QueryPlan:
        return await self.view(await self.follower.current()).explain(query)

    def view(self, state: StoreState) -> SessionView:
        return SessionView(
            state,
            self.schema,
            self.serializer,
            references=self.config.enforce_references,
            unique=self._declarations.enforced,
            shares_changes=self.shares_changes,
        )

    # -- change feed -------------------------------------------------------------------------

    @cached_property
    def _feed(self) -> ChangeFeed:
        return change_feed.ChangeFeed(self.files, self.serializer)

    async def feed_position(self, collection: str) -> str:
        state = await self._current()
        await self._declarations.refresh(self.schema)
        end = state.feed_end
        if collection not in self._declarations.feeds or end is None or state.replaced:
            end = await self._begin_feed(collection)
        return change_feed.position_text(end, self._store_name(collection), collection)

    async def _begin_feed(self, collection: str) -> FeedPosition:
        try:
            async with self.writing() as state:  # records the declared feeds
                self._store_name(collection)
                if state.feed_end is None or state.replaced:
                    with self.follower.step():
                        await self.journal.start_generation(state)
                if state.feed_end is not None:
                    return state.feed_end
        except (PermissionDeniedError, ReadOnlyStoreError) as exc:
            raise _not_recorded(collection) from exc
        raise _not_recorded(collection)

    async def read_feed(self, collection: str, since: str, limit: int) -> FeedBatch:
        self.follower.refuse_closed()
        await self._declarations.refresh(self.schema)
        store, declared = self._store_name(collection), self.schema[collection]
        if self.follower.state is not None and (await self._current()).replaced:
            raise change_feed.feed_expired()  # otherwise the next write finds out
        return await self._unlocked(partial(self._feed.read, declared, store, since, limit))

    async def feed_changed(self, positions: Mapping[str, str], seconds: float) -> None:
        is_replaced = False

        def is_changed() -> bool:
            nonlocal is_replaced
            self.follower.refuse_closed()
            if self._feed.may_go_on(positions.values()):
                return True
            state = self.follower.state
            is_replaced = state is not None and self.follower.files_changed(state)
            return is_replaced

        await self._folder_watch.wait(is_changed, seconds)
        if is_replaced:
            await asyncio.sleep(_REPLACED_PAUSE)

    def _store_name(self, collection: str) -> str:
        """The random name of the store, which records the changes of this collection."""
        if collection not in self._declarations.feeds or not self._declarations.store:
            raise _not_recorded(collection)
        return self._declarations.store

    async def _unlocked(self, read: Callable[[], Awaitable[Result]]) -> Result:
        """Read the journal: without a lock, or if an append disturbs it with the read lock."""
        try:
            for _ in range(_FEED_TRIES):
                with suppress(CorruptionError):
                    return await read()
                await asyncio.sleep(0)
            if self.locks.holds():
                return await read()
            async with self.locks.shared():
                return await read()
        except OSError as exc:
            raise translate_os_error(exc, f"read the journals in {self.files.folder}") from exc

    # -- writing -----------------------------------------------------------------------------

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        return await self.write_unblocked(lambda: changes)

    async def write_unblocked(self, take: TakeChanges) -> list[Outcome]:
        async with self.writing() as state:
            changes = take()
            if not changes:
                return []
            view = self.view(state)
            view.layers.append({})
            outcomes = await view.write(changes, each=True)
            has_written = await self.commit(state, view.layers[0], is_last=True)
        if not has_written:
            await asyncio.sleep(0)  # the caller may try again at once
        return outcomes

    def write_cancellable(self, changes: Sequence[Change]) -> Coroutine[Any, Any, list[Outcome]]:
        return self.write_unblocked(lambda: changes)  # which can be cancelled as in a session

    def shares_changes(self, key: Key) -> bool:
        # A change feed has each version, and one of several changes may take a unique value of another
        # entity. Tasks queue only after a write, by which both are known; if another process begins with
        # either before the shared write, that is refused.
        known, name = self._declarations, key.collection
        return name not in known.feeds and not known.enforced.get(name)

    def takes_encoded(self, collection: str) -> bool:
        return not self._declarations.enforced.get(collection)  # which compares values

    def session(self, isolation: Isolation | None) -> _JSONSession:
        return _JSONSession(self)

    async def claim(self, query: Query, terms: ClaimTerms) -> list[Claimed]:
        async with self._claims_file():
            return await super().claim(query, terms)

    async def claim_name(self, keys: Sequence[Key], terms: ClaimTerms) -> Claimed | None:
        async with self._claims_file():
            return await super().claim_name(keys, terms)

    @asynccontextmanager
    async def _claims_file(self) -> AsyncIterator[None]:
        """Add the data file of claims, which no configuration names, to those of split files.

        The next commit then begins a journal, because a journal names all files; a compaction ends the
        earlier one.
        """
        self.follower.refuse_closed()
        if self.files.has_claims():
            yield
            return
        self.files.make_folder()
        async with self.locks.exclusive():
            if not self.files.has_claims():
                await self.follower.refresh_locked()  # the journal may name it
            if not self.files.has_claims():
                self.files.add(CLAIM_FILE, CLAIM_COLLECTION.name)
                await self.follower.reload()
        yield
        self.compactor.begin()

    @asynccontextmanager
    async def snapshot(self) -> AsyncGenerator[Reader, None]:
        reader = SnapshotReader(await self._current())
        try:
            yield reader
        finally:
            await reader.close()

    def writing(
        self, owner: asyncio.Task[object] | None = None
    ) -> AbstractAsyncContextManager[StoreState]:
        """Hold the store's write lock, with a state that is up to date.

        Args:
            owner: the task that is to hold it, if that is not the current one.
        """
        return _Writing(self, owner)

    @asynccontextmanager
    async def write_locked_state(self) -> AsyncIterator[StoreState]:
        """The state, up to date; the caller holds the write lock."""
        try:
            with self.follower.step():
                state = await self.refresh_for_write(self.config.lock_timeout)
            yield state
        finally:
            self.follower.write_locked = False

    async def refresh_for_write(self, patience: float) -> StoreState:
        """Bring the state up to date for a writer, who has acquired the write lock.

        Args:
            patience: how many seconds to wait for the syncs of others; see `open_to_append`.
        """
        self.files.refuse_moved_links()
        follower = self.follower
        state = follower.state
        if state is None or not follower.follow_at_once(state):
            state = await follower.refresh_locked()
        follower.write_locked = True
        if not self._keys_checked:
            await self._refuse_other_keys(state)
            self._keys_checked = True
        if not self._declarations.is_current():
            await self._declarations.refresh(self.schema)
        if self._unique:
            await self._enforce_new(state)
        if self._feeds and not self._declarations.keeps(self._feeds):
            await self._declarations.add(self.schema.values())
        if self._declarations.feeds and not self._tidied:
            self._tidied = True
            with suppress(StorageError):
                await self.compactor.tidy()
        if state.superseded:
            # Old journals of an interrupted recovery; another process may still have them open.
            await self.journal.drop_journals(state.first)
            state.superseded = False
        if state.is_open and state.write_fd < 0:
            await self.journal.open_to_append(state, patience)
        if self.journal.sync_failed or state.needs_rewrite:
            await self.compactor.renew(state)
            self.journal.sync_failed = False
        return state

    async def _refuse_other_keys(self, state: StoreState) -> None:
        """Refuse a declaration by which entities would be written that other programs cannot read.

        Without the recorded declarations, as in a copy of the store without its hidden files, the first
        entity of a collection decides.

        Raises:
            SchemaMismatchError: a collection has another key in the store.
        """
        recorded = await self._declarations.key_of()
        for name, declared in self.schema.items():
            key = recorded.get(name)
            if key is None:
                for entity_id, stored in islice(state.sections[name].entities.items(), 1):
                    key = self.serializer.other_key(declared, entity_id, stored)
            if key not in (None, declared.key):
                raise other_key(name, key, declared.key)

    async def commit(self, state: StoreState, images: Images, *, is_last: bool = False) -> bool:
        """Append the images as one record, then apply them in memory. The write lock is held.

        Returns whether there are any.

        Args:
            is_last: the caller does nothing else under the lock, which other processes may therefore have
                before the commit is synced.

        Raises: as `JournalWriter.append_commit`.
        """
        if not any(images.values()):
            return False
        updates_files = self.config.update_files == "after each commit"
        with self.follower.step():
            try:
                await self.journal.append_commit(
                    state, images, hands_on=is_last and not updates_files
                )
                if updates_files:
                    await self.compactor.update_files(state)
            finally:
                # Also after a failure, or a cancellation: the record may have been written.
                self.compactor.consider()
        return True

    # -- lifecycle ---------------------------------------------------------------------------

    async def recover(self, recover_from: str) -> None:
        """Recover from a manually replaced data file, or from a damaged journal.

        One step, the rename of a journal that depends on no earlier one, makes the recovery effective.
        If it is interrupted before that step, nothing was changed; if after it, the next process that
        opens the store continues from the new journal.

        Args:
            recover_from: "file", "journal" or "salvage", as in `JSONStorageStrategy.checkpoint`.
        """
        follower = self.follower
        follower.refuse_closed()
        self.files.make_folder()
        async with self.locks.exclusive():
            state = await follower.refresh_locked(recover_from)
            follower.write_locked = True
            try:
                with follower.step():
                    await self.journal.start_alone(state)
                    await self.compactor.renew(state)
                log.info("recovered the store in %s from %s", self.files.folder, recover_from)
            except BaseException:
                follower.discard()  # it may differ from the files, which are read again
                raise
            finally:
                follower.write_locked = False

    async def probe(self) -> None:
        self.follower.refuse_closed()
        # If there is no store yet, its folder is not created for a probe.
        name = self.files.lock(f".probe.{os.urandom(4).hex()}.tmp").name
        path = self.files.nearest_folder() / name
        try:
            await self.journal.in_thread(_probe, path)
        except OSError as exc:
            raise translate_os_error(exc, f"write to {self.files.folder}") from exc

    async def health(self) -> Mapping[str, Value]:
        state = await self.follower.current()
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
        if self._has_compactor and self.compactor.failure is not None:
            problems.append(
                f"the journal could not be compacted into the data files: {self.compactor.failure}"
            )
        folder = self.files.nearest_folder()
        free = free_bytes(folder)
        problems += too_little(folder, free, self.compactor.needed_bytes(state))
        problems += await self._lock_problems(state)
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
            "free_bytes": free,
            "problems": problems,
        }

    async def _lock_problems(self, state: StoreState) -> list[Value]:
        """Whether the write lock can be acquired, and whether a compaction was not completed. The
        process that holds the lock may be suspended."""
        if not self.files.exists():
            return []  # no lock file is created for this check
        seconds = min(self.config.lock_timeout, _HEALTH_LOCK_SECONDS)
        try:
            # Under the lock no commit, of any process, is updating the files.
            async with self.locks.exclusive(seconds):
                if self.compactor.failure is not None or not self.compactor.is_stuck(state):
                    return []
                return [
                    f"an earlier compaction in {self.files.folder} was not completed; "
                    "`hf-async-store checkpoint` completes it, or reports why it cannot"
                ]
        except LockTimeoutError:
            return [
                f"no write could begin within {seconds:g} s: another process, or a transaction of "
                f"this one, holds {self.files.lock()}. A suspended process holds it until it is "
                "resumed or ends"
            ]
        except (PermissionDeniedError, ReadOnlyStoreError):
            return []  # the probe reports it

    async def _entity_problems(self, state: StoreState) -> list[Value]:
        """The errors of entities that another program wrote, and entities under another key."""
        problems: list[Value] = []
        for name, declared in self.schema.items():
            section = state.sections[name]
            unchecked: list[tuple[str, StoredEntity]] = []
            under_another: list[str] = []
            async for chunk in Chunks(list(section.entities.items()), _HEALTH_ENTITIES):
                for entity_id, stored in chunk:
                    if type(stored) is not bytes:
                        unchecked.append((entity_id, stored))
                    elif not self.serializer.has_id(declared, entity_id, stored):
                        under_another.append(entity_id)
            if under_another:
                problems.append(
                    f"{name}: {len(under_another):,} entities cannot be read, such as "
                    f"{under_another[0]!r}: their ids are not in {declared.key!r}, the declared key"
                )
            size = 0
            for entity_id, stored in unchecked:
                try:
                    # Not by the section, which would keep the result of each: twice the memory.
                    self.serializer.normalize(declared, entity_id, stored)
                except CorruptionError as exc:
                    problems.append(str(exc))
                size += memoryview(stored).nbytes
                if size > _HEALTH_CHUNK:
                    size = 0
                    await pause()
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
            await self._end_compaction()
            if self.follower.is_used:
                await self._compact_if_last()
        finally:
            await self.follower.end_steps()
            await self._end_compaction()  # a commit that has just ended may have begun one
            # A transaction that has not ended may still read it.
            state = None if self.locks.exclusive_held else self.follower.state
            self._release()
            if state is not None:
                await state.free()

    async def _end_compaction(self) -> None:
        if self._has_compactor:
            await self.compactor.close()

    async def _compact_if_last(self) -> None:
        """Compact, if no other process has the store open: the data files then contain everything."""
        try:
            waits = self.config.update_files == "at close"
            is_last = await self.follower.is_last(self.config.lock_timeout if waits else 0)
            if not is_last:
                return
            # Not to parse the files, and import the compaction, only to find that nothing is to be done.
            known = self.follower.looked_up
            if known is not None and not self._is_compacted_at_close(known):
                return
            if self._is_compacted_at_close(await self.follower.current()):
                await self.compactor.at_close()
        except (PermissionDeniedError, ReadOnlyStoreError):
            pass  # a process that may write here compacts the journal
        except StorageError:
            # The journal contains every acknowledged commit; a later process compacts it.
            log.warning("the journal was not compacted into the data files at close", exc_info=True)

    def _is_compacted_at_close(self, state: StoreState) -> bool:
        if not state.pending:
            return False
        is_configured = self.config.update_files != "when needed"
        return (
            is_configured or state.is_small or state.is_journal_large(self.config.write_buffer_size)
        )

    def _release(self) -> None:
        self.follower.close()
        self._folder_watch.close()
        if self._has_compactor:
            self.compactor.release()
        self.locks.close()
        if "journal" in vars(self):
            self.journal.close()

    def __del__(self) -> None:
        """Nothing is lost: the journal contains every acknowledged commit. The store warns."""
        # It may not have been initialized, or was closed, or never used.
        if hasattr(self, "_folder_watch") and self.follower.is_used:
            self._release()


def _not_recorded(collection: str) -> SchemaMismatchError:
    return SchemaMismatchError(
        f"the store does not keep the changes of {collection!r} yet. The first write of a program that "
        "declares the collection with `feed` lets it do so from then on"
    )


class _Writing:
    """See `JSONEngine.writing`. A context manager of an async generator takes twice as long, as much as a
    check of the files."""

    __slots__ = ("_engine", "_owner")

    def __init__(self, engine: JSONEngine, owner: asyncio.Task[object] | None) -> None:
        self._engine = engine
        self._owner = owner

    async def __aenter__(self) -> StoreState:
        engine, follower = self._engine, self._engine.follower
        follower.refuse_closed()
        if follower.state is None or follower.state.fd < 0:
            engine.files.make_folder()
        self._owner = owner = self._owner or this_task()
        patience = _FIRST_PATIENCE
        remaining = engine.config.lock_timeout
        while True:
            try:
                await engine.locks.acquire("write", None, owner)
            except UnavailableError:
                if engine.files.nearest_folder() == engine.files.folder:
                    raise
                follower.refuse_removed_folder()
                engine.files.make_folder()  # it was removed, and the store was empty
                await engine.locks.acquire("write", None, owner)
            try:
                follower.register(creating=True)
                with follower.step():
                    return await engine.refresh_for_write(min(patience, remaining))
            except BaseException as exc:
                await self.__aexit__(type(exc), exc, exc.__traceback__)
                remaining -= patience
                if not isinstance(exc, LockTimeoutError) or remaining <= 0:
                    raise
            # Others may write now: the process whose sync does not end may be suspended. If syncs merely
            # take long, they would not all have ended at one moment, so the lock is kept longer each time.
            await asyncio.sleep(patience)
            remaining -= patience
            patience *= 2

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._engine.follower.write_locked = False
        self._engine.locks.release("write", self._owner)


class _JSONSession(Session):
    """A transaction on the JSON engine. It acquires the write lock at its first operation."""

    def __init__(self, engine: JSONEngine) -> None:
        self._engine = engine
        self._stack = AsyncExitStack()
        self._view: SessionView | None = None
        # Another task may enter it, for the first call.
        self._owner = asyncio.current_task()

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc is None and self._view is not None:
                self._engine.follower.refuse_closed()
                await self._engine.commit(self._view.state, self._view.layers[0], is_last=True)
        finally:
            await self._stack.aclose()

    async def _begin(self) -> SessionView:
        if self._view is None:
            state = await self._stack.enter_async_context(self._engine.writing(self._owner))
            self._view = self._engine.view(state)
            self._view.layers.append({})
        self._engine.follower.refuse_closed()
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

    async def passed_over(
        self, query: Query, most_attempts: int | None
    ) -> tuple[PassedOver, list[str]] | None:
        return await (await self._begin()).passed_over(query, most_attempts)

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
