"""`JSONStorageStrategy`: the store on JSON files, and the methods that only this strategy has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final, Literal, cast

import msgspec

from hf_async_store.arguments import check_mapping, check_seconds
from hf_async_store.changes import check_version
from hf_async_store.collector import GatheredObjects
from hf_async_store.config import (
    JSONConfig,
    StorageConfig,
    anchored,
    load_config,
    strategy_config,
)
from hf_async_store.errors import InvalidInputError, UnsupportedValueError
from hf_async_store.event_loop import pause, reclaim
from hf_async_store.preconditions import missing_parent
from hf_async_store.schema import HOST_FACTORY, Collection, Schema
from hf_async_store.strategies.json.engine import JSONEngine
from hf_async_store.strategies.json.store_state import StoreState
from hf_async_store.strategies.routing import routed
from hf_async_store.strategy import StorageStrategy, schema_of
from hf_async_store.unique import Owners
from hf_async_store.values import CREATED_AT, UPDATED_AT, VERSION, Entity, Key, utc_now

_CHUNK_SIZE: Final = 256
_CHECK_CHUNK: Final = 8192
_RECOVERIES: Final = ("file", "journal", "salvage")


class JSONStorageStrategy(StorageStrategy):
    """A store on JSON files.

    Args:
        config: `json:PATH`, a configuration dict, a `StorageConfig` or a `JSONConfig`.
        collections: the declared collections.

    Raises:
        ConfigurationError: the configuration is invalid.
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
        super().__init__(routed(self._json, schema, loaded, self._reopened), schema)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} in {self._json.files.folder}>"

    # -- locks and whole files ---------------------------------------------------------------

    def acquire_read_lock(self, timeout: float | None = None) -> AbstractAsyncContextManager[None]:
        """Hold the read lock of the store: no task of any process can write; others can read.

        While the lock is held, use `read_file`; the methods for entities raise an error.

        Raises:
            LockTimeoutError: the lock did not become free within `timeout` seconds (by default the
                configured `lock_timeout`).
            TransactionReentryError: this task holds a lock or a transaction of the store.
        """
        return self._locked("a read lock", exclusive=False, timeout=timeout)

    def acquire_write_lock(self, timeout: float | None = None) -> AbstractAsyncContextManager[None]:
        """Hold the write lock of the store: no other task of any process can write, or hold a lock.

        While the lock is held, use `read_file` and `write_file`.

        Raises: as `acquire_read_lock`.
        """
        return self._locked("the write lock", exclusive=True, timeout=timeout)

    @asynccontextmanager
    async def _locked(
        self, what: str, *, exclusive: bool, timeout: float | None
    ) -> AsyncIterator[None]:
        self._usable()
        if timeout is not None:
            check_seconds(timeout, "timeout")
        leave = self._transactions.enter(what)
        try:
            locks, files = self._json.locks, self._json.files
            if exclusive:
                files.make_folder()
                async with locks.exclusive(timeout):
                    await self._engine.check_direct(what)
                    yield
            else:
                async with self._engine.direct(what, writes=False):
                    files.make_folder()
                    async with locks.shared(timeout):
                        yield
        finally:
            leave()

    async def read_file(self) -> dict[str, dict[str, Entity]]:
        """Read the whole store: a dict of collections, each a dict of entities by id.

        It uses the lock that the task holds, or acquires the read lock.
        """
        async with self._with_lock(exclusive=False):
            state = await self._json.follower.refresh_locked()
            return {name: await self._decoded(state, name) for name in self._schema}

    async def write_file(self, data: Mapping[str, Mapping[str, Mapping[str, object]]]) -> None:
        """Replace the content of the whole store in one commit.

        A changed entity gets its stored version + 1. A new one gets the version in `data`, or 1. An
        entity that `data` does not contain is deleted. An entity that differs only in `version` or the
        timestamps that the store sets is not changed. The method uses the write lock that the task
        holds, or acquires it.

        Raises:
            InvalidInputError: `data` is invalid; nothing was written.
            ReferenceViolationError: an entity in `data` refers to one that `data` does not contain.
            UniqueViolationError: two entities in `data` have the same values of a unique index.
        """
        wanted = await self._encoded(data)
        async with self._with_lock(exclusive=True), self._json.write_locked_state() as state:
            if self._json.config.enforce_references:
                await self._check_references(wanted)
            await self._check_unique(wanted)
            images = {
                name: await self._changed_images(state, name, wanted[name]) for name in wanted
            }
            await self._json.commit(state, {name: each for name, each in images.items() if each})
            for each in images.values():
                await reclaim(each)
            await self._record_declarations()

    async def checkpoint(
        self, recover_from: Literal["file", "journal", "salvage"] | None = None
    ) -> None:
        """Write all commits to the data files, so that the journal contains none.

        Args:
            recover_from: recover from a data file that was replaced manually while the journal
                contained commits: "file" uses the file and deletes the journal, "journal" applies
                the commits in the journal to the file. In all cases the previous data file is kept as
                a `.bak` file, unless `backup_enabled` is off; only "salvage" keeps a copy of the
                journal.
                "salvage" recovers from a damaged journal: every commit before the damage is kept,
                all later ones are lost, and a copy of the journal is kept as `NAME.damaged.NUMBER`. If a
                recovery is interrupted, either nothing was changed, or it is effective.
        """
        self._usable()
        if recover_from not in (None, *_RECOVERIES):
            raise InvalidInputError(
                f"recover_from must be one of {', '.join(_RECOVERIES)}, or None"
            )
        if recover_from is None:
            await self._json.compactor.checkpoint()
        else:
            await self._json.recover(recover_from)

    def backups(self) -> list[Path]:
        """The backups of the data files that compactions created; for each file, newest first."""
        files = self._json.files
        return [each for name in files.names for each in files.backups(name)]

    # -- internals ---------------------------------------------------------------------------

    def _reopened(self, schema: Schema) -> JSONEngine:
        # An absolute path, since the working directory may have changed.
        base_path = str(self._json.files.configured_folder)
        return JSONEngine(msgspec.structs.replace(self._json.config, base_path=base_path), schema)

    @asynccontextmanager
    async def _with_lock(self, *, exclusive: bool) -> AsyncIterator[None]:
        held = self._json.locks.holds()
        if held == "write" or (held == "read" and not exclusive):
            yield
        elif exclusive:
            async with self.acquire_write_lock():
                yield
        elif not await self.exists():
            yield  # the store is empty, and no lock file is created to read it
        else:
            async with self.acquire_read_lock():
                yield

    async def _decoded(self, state: StoreState, name: str) -> dict[str, Entity]:
        section = state.sections[name]
        entities: dict[str, Entity] = {}
        gathered = GatheredObjects()
        for number, entity_id in enumerate(list(section.entities), 1):
            raw = section.canonical(entity_id)
            if raw is not None:
                entities[entity_id] = section.entity(entity_id, raw)
            if not number % _CHUNK_SIZE:
                gathered.add(_CHUNK_SIZE)
                await pause()
        return entities

    async def _encoded(
        self, data: Mapping[str, Mapping[str, Mapping[str, object]]]
    ) -> dict[str, dict[str, bytes]]:
        """Check `data` and encode each entity: the garbage collector does not traverse bytes."""
        encode = self._json.serializer.encode
        wanted: dict[str, dict[str, bytes]] = {name: {} for name in self._schema}
        number = 0
        check_mapping(data, "data")
        for name, entities in data.items():
            collection = self._schema[name]
            check_mapping(entities, f"the entities of {name}")
            for entity_id, each in entities.items():
                try:
                    check_mapping(each, "an entity")
                    version = check_version(each.get(VERSION, 1), absent=False)
                    key, entity = collection.entity({collection.key: entity_id, **each})
                except InvalidInputError as exc:
                    raise exc.at(f"{name}[{entity_id!r}]") from exc
                if key.id != entity_id:
                    raise UnsupportedValueError(
                        f"{name}[{entity_id!r}] has another id, {key.id!r}, in its field "
                        f"{collection.key}"
                    )
                wanted[name][entity_id] = encode(entity, cast("int", version))
                number += 1
                if not number % _CHUNK_SIZE:
                    await pause()
        return wanted

    async def _changed_images(
        self, state: StoreState, name: str, wanted: dict[str, bytes]
    ) -> dict[str, bytes | None]:
        """The changed entities of a section. `wanted` is emptied step by step, since freeing it in one
        step would block the event loop."""
        section = state.sections[name]
        serializer = self._json.serializer
        now = utc_now()
        images: dict[str, bytes | None] = {}
        for number, entity_id in enumerate(list(section.entities), 1):
            if entity_id not in wanted:
                images[entity_id] = None
            if not number % _CHECK_CHUNK:
                await pause()
        for number, entity_id in enumerate(list(wanted), 1):
            entity = serializer.decode(wanted.pop(entity_id))
            raw = section.canonical(entity_id)
            initial_version = entity.pop(VERSION)
            if raw is None:
                stamped = {CREATED_AT: now, **entity, UPDATED_AT: now}
                images[entity_id] = serializer.encode(stamped, cast("int", initial_version))
            else:
                current = section.entity(entity_id, raw)
                version = cast("int", current.pop(VERSION))
                created = {CREATED_AT: current[CREATED_AT]} if CREATED_AT in current else {}
                entity = {**created, **entity}
                if not _equal_content(entity, current):
                    stamped = {**entity, UPDATED_AT: now}
                    images[entity_id] = serializer.encode(stamped, version + 1)
            if not number % _CHUNK_SIZE:
                await pause()
        return images

    async def _check_references(self, wanted: Mapping[str, Mapping[str, bytes]]) -> None:
        decode = self._json.serializer.decode
        for name, collection in self._schema.items():
            if not collection.references:
                continue
            for number, (entity_id, encoded) in enumerate(wanted[name].items(), 1):
                if not number % _CHUNK_SIZE:
                    await pause()
                entity = decode(encoded)
                for field in collection.references:
                    parent = entity.get(field.name)
                    parents = wanted[cast("str", field.references)]
                    if isinstance(parent, str) and parent not in parents:
                        raise missing_parent(name, entity_id, field, parent)

    async def _check_unique(self, wanted: Mapping[str, Mapping[str, bytes]]) -> None:
        decode = self._json.serializer.decode
        for name, unique in self._json.enforced.items():
            owners = [Owners(each) for each in unique]
            for number, (entity_id, encoded) in enumerate(wanted.get(name, {}).items(), 1):
                if not number % _CHUNK_SIZE:
                    await pause()
                entity = decode(encoded)
                for each in owners:
                    each.claim(Key(name, entity_id), entity)


def _equal_content(entity: Entity, current: Entity) -> bool:
    """Whether two entities are equal in value and type, except for `updated_at`."""
    without = {name: value for name, value in entity.items() if name != UPDATED_AT}
    stored = {name: value for name, value in current.items() if name != UPDATED_AT}
    # repr distinguishes 1, 1.0 and True, and -0.0 from 0.0; == does not.
    return without == stored and all(repr(without[name]) == repr(stored[name]) for name in without)
