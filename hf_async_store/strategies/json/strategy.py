"""`JSONStorageStrategy`: the store on JSON files, and the methods that only it has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final, Literal, cast

import msgspec

from hf_async_store.changes import Record, check_version
from hf_async_store.config import (
    JSONConfig,
    StorageConfig,
    anchored,
    load_config,
    strategy_config,
)
from hf_async_store.errors import InvalidInputError, UnsupportedValueError
from hf_async_store.migration_routing import (
    MIGRATION_COLLECTION,
    MIGRATION_KEY,
    migration_state_in,
    not_followed,
)
from hf_async_store.preconditions import missing_parent
from hf_async_store.schema import HOST_FACTORY, Collection
from hf_async_store.strategies.json.engine import JSONEngine
from hf_async_store.strategies.json.recovery import StoreState
from hf_async_store.strategy import StorageStrategy, schema_of
from hf_async_store.values import CREATED_AT, UPDATED_AT, VERSION, Entity, utc_now

_CHUNK_SIZE: Final = 256
_CHECK_CHUNK: Final = 8192


class JSONStorageStrategy(StorageStrategy):
    """A store on JSON files.

    Args:
        config: `json:PATH`, a map in the spec's shape, a `StorageConfig` or a `JSONConfig`.
        collections: what may be stored.

    Raises:
        ConfigurationError.
    """

    def __init__(
        self,
        config: StorageConfig | JSONConfig | Mapping[str, object] | str | Path,
        *,
        collections: Iterable[Collection] = HOST_FACTORY,
    ) -> None:
        schema = schema_of(collections)
        loaded = anchored(load_config(config))
        self._json = JSONEngine(strategy_config(loaded, JSONConfig), schema)
        super().__init__(self._json, schema, loaded)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} in {self._json.files.folder}>"

    # -- locks and whole files ---------------------------------------------------------------

    def acquire_read_lock(self, timeout: float | None = None) -> AbstractAsyncContextManager[None]:
        """Hold the store so that nobody writes, in this process or another, while others may read.

        Inside, `read_file` is what to use; the methods for entities are refused.

        Raises:
            LockTimeoutError: not free within `timeout` seconds (the configured `lock_timeout`).
            TransactionReentryError: this task holds a lock or a transaction of the store.
        """
        return self._locked("a read lock", exclusive=False, timeout=timeout)

    def acquire_write_lock(self, timeout: float | None = None) -> AbstractAsyncContextManager[None]:
        """Hold the store alone; `read_file` and `write_file` are what to use inside.

        Raises: as `acquire_read_lock`.
        """
        return self._locked("the write lock", exclusive=True, timeout=timeout)

    @asynccontextmanager
    async def _locked(
        self, what: str, *, exclusive: bool, timeout: float | None
    ) -> AsyncIterator[None]:
        self._usable()
        if not exclusive:
            await self._require_source_active(what)
        leave = self._transactions.enter(what)
        try:
            locks = self._json.locks
            self._json.files.make_folder()
            async with locks.exclusive(timeout) if exclusive else locks.shared(timeout):
                if exclusive:
                    await self._refuse_move(what)
                yield
        finally:
            leave()

    async def _refuse_move(self, what: str) -> None:
        """What the lock is taken for gets no marks. While it is held, no move can begin; nor can
        one go on, so nothing may wait for it here."""
        state = await self._json.refresh_locked()
        raw = state.kept(MIGRATION_COLLECTION.name, MIGRATION_KEY.id)
        if raw is not None:
            text = self._json.serializer.normalize(MIGRATION_COLLECTION, MIGRATION_KEY.id, raw)
            found = self._json.serializer.entity(MIGRATION_COLLECTION, MIGRATION_KEY.id, text)
            move = migration_state_in(Record(MIGRATION_KEY, found))
            assert move is not None, "there is a record"
            elsewhere = move.role == "source" and move.phase not in ("COPYING", "CUTTING_OVER")
            raise not_followed(what, move.other if elsewhere else None)

    async def read_file(self) -> dict[str, dict[str, Entity]]:
        """The whole store in the spec's shape: entities by id, by collection.

        Uses the lock that the task holds, or takes the read lock.
        """
        async with self._holding(exclusive=False):
            state = await self._json.refresh_locked()
            return {name: await self._decoded(state, name) for name in self._schema}

    async def write_file(self, data: Mapping[str, Mapping[str, Mapping[str, object]]]) -> None:
        """Replace the whole store as one commit.

        A changed entity gets its stored version + 1, a new one its given version or 1, and what
        `data` does not have is gone. An entity that differs only in `version` or the timestamps
        that the store sets is not changed. Uses the write lock that the task holds, or takes it.

        Raises:
            UnknownCollectionError, InvalidKeyError, InvalidFieldError, UnsupportedValueError,
            InvalidVersionError: before anything is written.
            ReferenceViolationError: the new whole refers to what it does not have.
        """
        wanted = await self._checked(data)
        async with self._holding(exclusive=True), self._json.owning() as state:
            if self._json.config.enforce_references:
                await self._refuse_broken(wanted)
            images = {name: await self._images(state, name, wanted[name]) for name in wanted}
            await self._json.commit(state, {name: each for name, each in images.items() if each})

    async def checkpoint(
        self, recover_from: Literal["file", "journal", "salvage"] | None = None
    ) -> None:
        """Have all that was committed in the data files, and nothing in the journal.

        Args:
            recover_from: settles a data file that was replaced by hand while the journal held commits:
                "file" takes the file and drops the journal, "journal" puts the journal's commits
                on top of the file. The file that is replaced is kept as a backup. "salvage"
                settles a damaged journal: every commit before the damage counts, and the journal
                is kept beside, as `NAME.damaged.NUMBER`. If it is interrupted, either nothing was
                changed or the question is settled.
        """
        self._usable()
        if recover_from is None:
            await self._json.folding.checkpoint()
        else:
            await self._json.recover(recover_from)

    def backups(self) -> list[Path]:
        """The backups of the data files that folds kept, newest first."""
        files = self._json.files
        return [each for name in files.names for each in files.backups(name)]

    # -- inside ------------------------------------------------------------------------------

    def _reopen_with_collections(self, collections: Iterable[Collection]) -> JSONStorageStrategy:
        # The same place, also where the working directory has changed since.
        place = str(self._json.files.given)
        config = msgspec.structs.replace(self._json.config, base_path=place)
        return JSONStorageStrategy(config, collections=collections)

    @asynccontextmanager
    async def _holding(self, *, exclusive: bool) -> AsyncIterator[None]:
        held = self._json.locks.holds()
        if held == "write" or (held == "read" and not exclusive):
            yield
        elif exclusive:
            async with self.acquire_write_lock():
                yield
        elif not await self.exists():
            yield  # empty, and no lock file is made for that
        else:
            async with self.acquire_read_lock():
                yield

    async def _decoded(self, state: StoreState, name: str) -> dict[str, Entity]:
        section = state.sections[name]
        found: dict[str, Entity] = {}
        for number, entity_id in enumerate(list(section.held), 1):
            raw = section.canonical(entity_id)
            if raw is not None:
                found[entity_id] = section.entity(entity_id, raw)
            if not number % _CHUNK_SIZE:
                await asyncio.sleep(0)
        return found

    async def _checked(
        self, data: Mapping[str, Mapping[str, Mapping[str, object]]]
    ) -> dict[str, dict[str, bytes]]:
        """The text of each entity, which the garbage collector never looks into."""
        encode = self._json.serializer.encode
        wanted: dict[str, dict[str, bytes]] = {name: {} for name in self._schema}
        number = 0
        for name, entities in data.items():
            collection = self._schema[name]
            for entity_id, each in entities.items():
                try:
                    version = check_version(each.get(VERSION, 1), absent=False)
                    key, entity = collection.entity({collection.key: entity_id, **each})
                except InvalidInputError as exc:
                    raise exc.at(f"{name}[{entity_id!r}]") from exc
                if key.id != entity_id:
                    raise UnsupportedValueError(
                        f"{name}[{entity_id!r}] names itself {key.id!r} in {collection.key}"
                    )
                wanted[name][entity_id] = encode(entity, cast("int", version))
                number += 1
                if not number % _CHUNK_SIZE:
                    await asyncio.sleep(0)
        return wanted

    async def _images(
        self, state: StoreState, name: str, wanted: dict[str, bytes]
    ) -> dict[str, bytes | None]:
        """What changes in a section; `wanted` is used up, for freeing it at once holds the loop."""
        section = state.sections[name]
        serializer = self._json.serializer
        at = utc_now()
        images: dict[str, bytes | None] = {}
        for number, entity_id in enumerate(list(section.held), 1):
            if entity_id not in wanted:
                images[entity_id] = None
            if not number % _CHECK_CHUNK:
                await asyncio.sleep(0)
        for number, entity_id in enumerate(list(wanted), 1):
            entity = serializer.decode(wanted.pop(entity_id))
            raw = section.canonical(entity_id)
            given = entity.pop(VERSION)
            if raw is None:
                stamped = {CREATED_AT: at, **entity, UPDATED_AT: at}
                images[entity_id] = serializer.encode(stamped, cast("int", given))
            else:
                current = section.entity(entity_id, raw)
                version = cast("int", current.pop(VERSION))
                kept = {CREATED_AT: current[CREATED_AT]} if CREATED_AT in current else {}
                entity = {**kept, **entity}
                if not _same(entity, current):
                    stamped = {**entity, UPDATED_AT: at}
                    images[entity_id] = serializer.encode(stamped, version + 1)
            if not number % _CHUNK_SIZE:
                await asyncio.sleep(0)
        return images

    async def _refuse_broken(self, wanted: Mapping[str, Mapping[str, bytes]]) -> None:
        decode = self._json.serializer.decode
        for name, collection in self._schema.items():
            if not collection.references:
                continue
            for number, (entity_id, text) in enumerate(wanted[name].items(), 1):
                if not number % _CHUNK_SIZE:
                    await asyncio.sleep(0)
                entity = decode(text)
                for field in collection.references:
                    parent = entity.get(field.name)
                    parents = wanted[cast("str", field.references)]
                    if isinstance(parent, str) and parent not in parents:
                        raise missing_parent(name, entity_id, field, parent)


def _same(entity: Entity, current: Entity) -> bool:
    """Equal in value and type, but for `updated_at`."""
    without = {name: value for name, value in entity.items() if name != UPDATED_AT}
    stored = {name: value for name, value in current.items() if name != UPDATED_AT}
    # repr tells 1, 1.0 and True apart, and -0.0 from 0.0, which == does not.
    return without == stored and all(repr(without[name]) == repr(stored[name]) for name in without)
