"""The entity methods: one interface for the store and for its transactions.

`RepositoryInterface` is implemented once, on four primitives. Arguments are validated and copied
before any I/O, synchronously up to a chunk of 128 entities: a caller may change its dict as soon as
the coroutine runs.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
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
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from itertools import repeat
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar, cast, overload

from msgspec.structs import replace

from hf_async_store.arguments import check_boolean, check_callable, check_listed, check_seconds
from hf_async_store.changes import (
    ABSENT,
    ANY,
    PRESENT,
    Change,
    ChangedMatches,
    Delete,
    EncodedPut,
    Expect,
    Outcome,
    Patch,
    Precondition,
    Put,
    Record,
    check_version,
)
from hf_async_store.collector import GatheredObjects
from hf_async_store.conflict_retry import RETRY_SECONDS, Made, Step
from hf_async_store.deferred import deferred
from hf_async_store.driver import batched
from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidFieldError,
    InvalidInputError,
    InvalidQueryError,
    InvalidVersionError,
    OperationTimeoutError,
    RetriesExhaustedError,
    StorageError,
    UnsupportedValueError,
)
from hf_async_store.event_loop import Chunks, reclaim
from hf_async_store.field_operations import UpdateMap, read_update
from hf_async_store.generators import Owned
from hf_async_store.lifetimes import Clock, Lifetimes
from hf_async_store.query import (
    MISSING,
    Comparison,
    Filters,
    Missing,
    OrderBy,
    Page,
    Path,
    Query,
    build_large_query,
    build_query,
    encode_cursor,
    project,
    projected,
    value_reader,
)
from hf_async_store.schema import Collection, Schema
from hf_async_store.slow_queries import SlowQueries
from hf_async_store.values import (
    MAX_KEY_BYTES,
    UPDATED_AT,
    VERSION,
    Entity,
    Key,
    Value,
    copy_entity,
    stamp,
    version_of,
    with_canonical,
)

if TYPE_CHECKING:
    from hf_async_store import (
        aggregates,
        batch_validation,
        changes_by_filter,
        modifications,
        returning_updates,
    )
    from hf_async_store.aggregates import Counts, Sum
    from hf_async_store.changes_by_filter import ChangesByFilter
    from hf_async_store.modifications import Write
else:
    aggregates = deferred("aggregates")
    batch_validation = deferred("batch_validation")
    changes_by_filter = deferred("changes_by_filter")
    modifications = deferred("modifications")
    returning_updates = deferred("returning_updates")

Item = TypeVar("Item")
Converted = TypeVar("Converted")
Result = TypeVar("Result")
Done = TypeVar("Done", int, bool, Entity)
Modification: TypeAlias = Callable[
    [Entity], "Mapping[str, object] | Awaitable[Mapping[str, object]]"
]

log: Final = logging.getLogger("hf_async_store.retries")

_CHUNK_SIZE: Final = 128
"""The number of entities validated one by one between two iterations of the event loop."""

_RECORDS_CHUNK: Final = 1 << 14
"""The number of records whose entities are taken in one step."""

_BATCH_CHUNK_SIZE: Final = 512
"""The number of entities validated together, column by column, in about the same time."""


class RepositoryInterface(ABC):
    """The methods that the store and its transactions share.

    Every method takes the collection first and raises `UnknownCollectionError` if it is not
    declared. Entities are dicts of portable values (see `values.normalise`); a returned entity is
    the caller's own copy and includes `version`. Arguments are never modified.

    Every method may raise a `StorageError`, with its attributes `retryable` and `outcome_unknown`.
    `timeout` is in seconds; when it expires, `OperationTimeoutError` is raised, whose
    `outcome_unknown` is true if a write may have been applied, or may be applied later: it had begun, and
    goes on in the background until the time limit of the engine. Closing the store waits until it is
    settled. A write that had not begun, because it waited for others or for the lock of the store, is never
    applied.

    In a transaction, a failed change can only be followed by a rollback: later calls and the commit
    raise `TransactionAbortedError`.
    """

    def __init__(self, schema: Schema, slow_queries: SlowQueries) -> None:
        self._schema = schema
        self._slow_queries = slow_queries
        self._clock = Clock()
        self._lifetimes: Lifetimes | None = None  # None: nothing expires

    @property
    def collections(self) -> Mapping[str, Collection]:
        """The declared collections by name, parents before children."""
        return self._schema

    # -- primitives --------------------------------------------------------------------------

    @abstractmethod
    async def _fetch(self, keys: Sequence[Key], timeout: float | None) -> list[Record | None]: ...

    @abstractmethod
    async def _write(self, changes: Sequence[Change], timeout: float | None) -> list[Outcome]: ...

    def _takes_encoded(self, collection: str) -> bool:
        """Whether a batch can be written as `EncodedPut`s."""
        del collection
        return False

    @abstractmethod
    def _select(self, query: Query) -> AsyncGenerator[Record, None]: ...

    @abstractmethod
    async def _count(self, query: Query) -> int: ...

    @abstractmethod
    async def _first_page(self, query: Query) -> Query: ...

    def _select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        return batched(self._select(query))

    async def _select_at_once(self, query: Query) -> list[Entity] | None:
        """See `Engine.select_at_once`."""
        del query
        return None

    async def _change_matches(self, query: Query, change: Change) -> ChangedMatches | None:
        """See `Engine.change_matches`."""
        del query, change
        return None

    async def _batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        """The matching entities in batches, by `_select_at_once` or by `_select_batches`."""
        few = await self._select_at_once(query)
        if few is not None:
            yield few
            return
        async with Owned(self._select_batches(query)) as batches:
            async for each in batches:
                yield each

    # -- expiry ------------------------------------------------------------------------------

    @abstractmethod
    def _select_stored(self, query: Query) -> AsyncGenerator[Record, None]:
        """As `_select`, with the entities that have expired and were not removed."""

    def _living_query(self, query: Query) -> Query:
        return query if self._lifetimes is None else self._lifetimes.living(query)

    def _living(self, records: list[Record | None]) -> list[Record | None]:
        """The records that were read by key, without those that have expired."""
        return records if self._lifetimes is None else living(self._lifetimes, records)

    async def _for_writing(
        self, changes: Sequence[Change], lifetimes: Lifetimes, timeout: float | None
    ) -> Sequence[Change]:
        """The changes with the lifetimes that decide them."""
        await self._remove_expired_children(changes, lifetimes, timeout)
        return [
            replace(each, lifetimes=lifetimes)
            if each.key.collection in lifetimes.deciding
            else each
            for each in changes
        ]

    async def _remove_expired_children(
        self, changes: Sequence[Change], lifetimes: Lifetimes, timeout: float | None
    ) -> None:
        """Remove the expired entities that refer to those that are to be deleted."""
        deleted = [each.key for each in changes if isinstance(each, Delete)]
        for key in deleted:
            for child, field in lifetimes.children.get(key.collection, ()):
                query = lifetimes.expired(Query(child, Comparison((field,), "eq", key.id)))
                async with Owned(self._select_stored(query)) as records:
                    expired = [purging(each) async for each in records if each.key != key]
                if expired:
                    await self._write(expired, timeout)

    # -- one entity --------------------------------------------------------------------------

    async def create_entity(
        self, collection: str, entity: Mapping[str, object], *, timeout: float | None = None
    ) -> int:
        """Insert a new entity under the id in its key field; returns its version, 1.

        Raises:
            AlreadyExistsError: the id is in use; the stored entity is unchanged.
            InvalidKeyError, UnsupportedValueError, InvalidFieldError: before any I/O.
            ReferenceViolationError: a declared reference names an entity that does not exist.
        """
        change = self._put(self._schema[collection], entity, ABSENT, self._clock.now())
        return new_version(await self._write((change,), timeout))

    async def save_entity(
        self,
        collection: str,
        entity: Mapping[str, object],
        *,
        expected_version: int | Expect = ANY,
        timeout: float | None = None,
    ) -> int:
        """Insert or replace a whole entity; returns the new version.

        Stored fields that the entity does not contain are deleted, except `created_at`. A `version`
        in it is ignored.

        Args:
            expected_version: the version that must be stored, or ABSENT. By default, any.

        Raises:
            ConcurrencyConflictError: another version is stored.
            EntityNotFoundError: a version was expected, and the entity does not exist.
            AlreadyExistsError: ABSENT was expected, and the entity exists.
            InvalidVersionError, InvalidKeyError, UnsupportedValueError, InvalidFieldError: before
                any I/O.
            ReferenceViolationError: a declared reference names an entity that does not exist.
        """
        expect = check_version(expected_version, absent=True)
        change = self._put(self._schema[collection], entity, expect, self._clock.now())
        return new_version(await self._write((change,), timeout))

    @overload
    async def update_entity(
        self,
        collection: str,
        entity_id: str,
        fields: UpdateMap,
        *,
        expected_version: int | Expect = ANY,
        returning: Literal[False] = False,
        timeout: float | None = None,
    ) -> int: ...

    @overload
    async def update_entity(
        self,
        collection: str,
        entity_id: str,
        fields: UpdateMap,
        *,
        expected_version: int | Expect = ANY,
        returning: Literal[True],
        timeout: float | None = None,
    ) -> Entity: ...

    async def update_entity(
        self,
        collection: str,
        entity_id: str,
        fields: UpdateMap,
        *,
        expected_version: int | Expect = ANY,
        returning: bool = False,
        timeout: float | None = None,
    ) -> int | Entity:
        """Change the given fields of an existing entity; returns the new version.

        None sets a field to null, REMOVE deletes it; `increment`, `append`, `add_to_set` and
        `remove_from_set` compute the new value from the stored one, atomically with the write. A
        `path("labels", "owner")` instead of a name changes a nested value; missing dicts on it are
        created.

        Args:
            returning: return the entity as written instead of the version. It is read first, and written
                on condition that it has not changed since, again after each conflict: one round trip
                more than without.

        Raises:
            EntityNotFoundError: the entity does not exist; nothing is inserted.
            InvalidFieldError: also if a stored value has a type that the change does not apply to.
            ConcurrencyConflictError, InvalidVersionError: as in `save_entity`.
            UnsupportedValueError, ReferenceViolationError: as in `save_entity`.
        """
        check_boolean(returning, "returning")
        expect = check_version(expected_version, absent=False)
        change = self._patch(self._schema[collection], entity_id, fields, expect, self._clock.now())
        if returning:
            return all_succeeded(await self._update_returning([change], timeout), alone=True)[0]
        return new_version(await self._write((change,), timeout))

    async def delete_entity(
        self,
        collection: str,
        entity_id: str,
        *,
        expected_version: int | Expect = ANY,
        timeout: float | None = None,
    ) -> bool:
        """Delete an entity; returns whether it existed.

        Raises:
            EntityNotFoundError: a version was expected, and the entity does not exist.
            ConcurrencyConflictError, InvalidVersionError: as in `save_entity`.
            ReferenceViolationError: other entities still refer to it.
        """
        expect = check_version(expected_version, absent=False)
        change = Delete(self._schema[collection].key_of(entity_id), expect)
        return _succeeded(await self._write((change,), timeout)) is not None

    async def get_entity(
        self, collection: str, entity_id: str, *, timeout: float | None = None
    ) -> Entity | None:
        """The entity, including `version`, or None if it does not exist.

        Raises:
            InvalidKeyError: an id that cannot be stored.
        """
        record = (await self._fetch((self._schema[collection].key_of(entity_id),), timeout))[0]
        return None if record is None else record.entity

    # -- many --------------------------------------------------------------------------------

    @overload
    async def create_entities(
        self,
        collection: str,
        entities: Iterable[Mapping[str, object]],
        *,
        if_absent: Literal[False] = False,
        timeout: float | None = None,
    ) -> list[int]: ...

    @overload
    async def create_entities(
        self,
        collection: str,
        entities: Iterable[Mapping[str, object]],
        *,
        if_absent: Literal[True],
        timeout: float | None = None,
    ) -> list[bool]: ...

    async def create_entities(
        self,
        collection: str,
        entities: Iterable[Mapping[str, object]],
        *,
        if_absent: bool = False,
        timeout: float | None = None,
    ) -> list[int] | list[bool]:
        """`create_entity` for each; returns the versions in input order.

        Called on the store, each entity succeeds or fails independently; in a transaction, the first
        failure aborts the transaction. If an entity cannot be stored (an invalid key, value or
        field), the whole batch is rejected before any I/O, and the error names the item.

        Args:
            if_absent: leave existing entities unchanged, which is then no failure; returns whether each
                entity was created.

        Raises:
            BatchError: some failed; each element of its `outcomes` is a version or an error.
        """
        check_boolean(if_absent, "if_absent")
        declared = self._schema[collection]
        at = self._clock.now()
        changes = await _in_chunks(
            check_listed(entities, "entities"),
            lambda each: self._put(declared, each, ABSENT, at),
            lambda chunk: self._puts(declared, chunk, ABSENT, at),
            collection=declared,
        )
        if if_absent:
            return await self._create_absent(changes, timeout)
        return await self._write_many(changes, timeout)

    async def _create_absent(self, puts: Sequence[Put], timeout: float | None) -> list[bool]:
        """Create the entities that do not exist; returns which were created."""
        outcomes = await self._write(puts, timeout) if puts else []
        return all_succeeded(
            [
                each
                if isinstance(each, StorageError) and not isinstance(each, AlreadyExistsError)
                else not isinstance(each, AlreadyExistsError)
                for each in outcomes
            ]
        )

    async def save_entities(
        self,
        collection: str,
        entities: Iterable[Mapping[str, object]],
        expected_versions: Mapping[str, int | Expect] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[int]:
        """`save_entity` for each; `expected_versions` maps ids to versions. See `create_entities`.

        Changes of the same id are applied in input order.
        """
        declared = self._schema[collection]
        expected = _Expected(expected_versions, absent=True)
        at = self._clock.now()

        def change(each: Mapping[str, object]) -> Put:
            put = self._put(declared, each, ANY, at)
            expect = expected.pop(put.key.id)
            return put if expect is ANY else Put(put.key, put.entity, at, expect)

        changes = await _in_chunks(
            check_listed(entities, "entities"),
            change,
            None if expected_versions else lambda chunk: self._puts(declared, chunk, ANY, at),
            collection=declared,
        )
        expected.assert_exhausted()
        return await self._write_many(changes, timeout)

    @overload
    async def update_entities(
        self,
        collection: str,
        updates: Mapping[str, UpdateMap],
        expected_versions: Mapping[str, int | Expect] | None = None,
        *,
        returning: Literal[False] = False,
        timeout: float | None = None,
    ) -> list[int]: ...

    @overload
    async def update_entities(
        self,
        collection: str,
        updates: Mapping[str, UpdateMap],
        expected_versions: Mapping[str, int | Expect] | None = None,
        *,
        returning: Literal[True],
        timeout: float | None = None,
    ) -> list[Entity]: ...

    async def update_entities(
        self,
        collection: str,
        updates: Mapping[str, UpdateMap],
        expected_versions: Mapping[str, int | Expect] | None = None,
        *,
        returning: bool = False,
        timeout: float | None = None,
    ) -> list[int] | list[Entity]:
        """`update_entity` for each id in `updates`; see `save_entities`."""
        declared = self._schema[collection]
        expected = _Expected(expected_versions, absent=False)
        check_boolean(returning, "returning")
        _check_mapping(updates, "updates", "changes")
        at = self._clock.now()
        latest: tuple[UpdateMap, Patch] | None = None

        def patch(item: tuple[str, UpdateMap]) -> Patch:
            nonlocal latest
            entity_id, data = item
            expect = expected.pop(entity_id)
            if latest is not None and latest[0] is data and declared.key not in data:
                # The same change of many entities is validated once.
                return Patch(declared.key_of(entity_id), latest[1].fields, at, _existing(expect))
            latest = data, self._patch(declared, entity_id, data, expect, at)
            return latest[1]

        changes = await _in_chunks(updates.items(), patch)
        expected.assert_exhausted()
        if returning:
            return all_succeeded(await self._update_returning(changes, timeout))
        return await self._write_many(changes, timeout)

    async def _update_returning(
        self, patches: Sequence[Patch], timeout: float | None
    ) -> list[Entity | StorageError]:
        """The entities as written, in order, or the error of each update."""
        if timeout is not None:
            check_seconds(timeout, "timeout")
        updates = returning_updates.ReturningUpdates(self, patches, timeout)
        if patches:
            try:
                await self._retried(patches[0].key, updates.attempt, RETRY_SECONDS)
            except StorageError as exc:
                if not updates.results and not isinstance(exc, RetriesExhaustedError):
                    raise
                # An earlier attempt has written some of them, which this error alone would conceal.
                updates.results.update({number: exc.copy() for number in updates.pending})
        return [updates.results[number] for number in range(len(patches))]

    async def delete_entities(
        self,
        collection: str,
        ids: Iterable[str],
        expected_versions: Mapping[str, int | Expect] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[bool]:
        """`delete_entity` for each id; see `save_entities`. Returns one bool each."""
        declared = self._schema[collection]
        expected = _Expected(expected_versions, absent=False)
        changes = await _in_chunks(
            check_listed(ids, "ids"), lambda each: _delete(declared.key_of(each), expected)
        )
        expected.assert_exhausted()
        outcomes = await self._write(changes, timeout) if changes else []
        return all_succeeded(
            [each if isinstance(each, StorageError) else each is not None for each in outcomes]
        )

    async def get_entities(
        self, collection: str, ids: Iterable[str], *, timeout: float | None = None
    ) -> list[Entity | None]:
        """The entities in the order of `ids`, None for each that does not exist."""
        declared = self._schema[collection]
        keys = await _in_chunks(check_listed(ids, "ids"), declared.key_of)
        if not keys:
            return []
        records = await self._fetch(keys, timeout)
        return [
            None if each is None else each.entity
            async for chunk in Chunks(records, _RECORDS_CHUNK)
            for each in chunk
        ]

    async def import_entities(
        self,
        collection: str,
        entities: Iterable[Mapping[str, object]],
        expected_versions: Mapping[str, int | Expect] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[int]:
        """Write entities with their versions and timestamps, for migration and restore.

        Existing entities are replaced, whatever their version, unless `expected_versions` maps their
        ids to one. `version` is stored as given (0 if it is missing), and so are the timestamps: null
        stays null, missing stays missing. References are checked. Fails like `create_entities`.

        Returns:
            The versions, in input order.
        """
        changes = await self._imports(collection, entities, expected_versions)
        return await self._write_many(changes, timeout)

    async def _import_restored(
        self,
        collection: str,
        entities: Iterable[Mapping[str, object]],
        expected_versions: Mapping[str, int | Expect] | None = None,
    ) -> list[int]:
        """`import_entities`, for which entities and parents exist even if they have expired."""
        changes = await self._imports(collection, entities, expected_versions)
        return _versions(await self._import(changes)) if changes else []

    async def _imports(
        self,
        collection: str,
        entities: Iterable[Mapping[str, object]],
        expected_versions: Mapping[str, int | Expect] | None,
    ) -> list[Put]:
        declared = self._schema[collection]
        expected = _Expected(expected_versions, absent=True)
        at = self._clock.now()
        changes = await _in_chunks(
            check_listed(entities, "entities"),
            lambda each: _imported(declared, each, expected, at),
            None
            if expected_versions
            else lambda chunk: self._puts(declared, chunk, ANY, at, imported=True),
            collection=declared,
        )
        expected.assert_exhausted()
        return changes

    async def _import_stored(
        self,
        collection: str,
        entities: Iterable[Entity],
        expected_versions: Mapping[str, int | Expect] | None = None,
        *,
        sizes: Iterable[int] | None = None,
    ) -> list[int]:
        """`_import_restored` for entities that were read from a store: they are validated against
        the declarations here, but neither copied nor measured again.

        Args:
            sizes: the size of the JSON of each in bytes, if known; such entities are results of
                `values.with_canonical`.
        """
        declared = self._schema[collection]
        expected = _Expected(expected_versions, absent=True)
        at = self._clock.now()

        def change(item: tuple[Entity, int]) -> Put:
            stored, size = item
            key, entity = declared.stored(stored, size)
            return Put(key, entity, at, expected.pop(key.id), version_of(stored))

        if sizes is None:
            forms = list(map(with_canonical, entities))
            entities, sizes = [each for each, _ in forms], [len(each) for _, each in forms]
        changes = await _in_chunks(zip(entities, sizes, strict=True), change)
        return _versions(await self._import(changes))

    async def _import(self, changes: Sequence[Change]) -> list[Outcome]:
        """Write in batches that need not be combined with other writes, also entities that have expired."""
        return await self._write(changes, None)

    @overload
    async def modify_entity(
        self,
        collection: str,
        entity_id: str,
        change: Modification,
        *,
        default: Mapping[str, object] | None = None,
        returning: Literal[False] = False,
        retry_seconds: float = RETRY_SECONDS,
        timeout: float | None = None,
    ) -> int: ...

    @overload
    async def modify_entity(
        self,
        collection: str,
        entity_id: str,
        change: Modification,
        *,
        default: Mapping[str, object] | None = None,
        returning: Literal[True],
        retry_seconds: float = RETRY_SECONDS,
        timeout: float | None = None,
    ) -> Entity: ...

    async def modify_entity(
        self,
        collection: str,
        entity_id: str,
        change: Modification,
        *,
        default: Mapping[str, object] | None = None,
        returning: bool = False,
        retry_seconds: float = RETRY_SECONDS,
        timeout: float | None = None,
    ) -> int | Entity:
        """Read an entity, change it and write it back if unchanged; returns the new version.

        Args:
            change: a function, plain or async, that takes the entity and returns the changed one. It
                is called again after each conflict, with the current entity, until `retry_seconds`
                have passed; in a transaction it is called once, because after a conflict the
                transaction can only be rolled back.
            default: if the entity does not exist, the function gets a copy of this one with the id in
                its key field, and what it returns is created. Without it, that is an error.
            returning: return the entity as written instead of the version, at no extra cost.
            timeout: as of `update_entity`, for all attempts together, without the time that `change`
                takes in the last one.

        Raises:
            EntityNotFoundError: the entity does not exist, and there is no default.
            RetriesExhaustedError: there were conflicts until the time had passed; the last one is
                the cause.
        """
        declared = self._schema[collection]
        key = declared.key_of(entity_id)
        check_boolean(returning, "returning")
        check_callable(change, "change")
        check_seconds(retry_seconds, "retry_seconds")
        remaining = _countdown(timeout)
        if default is not None:
            if not isinstance(default, Mapping):
                raise UnsupportedValueError(f"default must be a dict, not {type(default).__name__}")
            default = declared.entity({declared.key: key.id, **default})[1]

        def put(new: Mapping[str, object], expect: Precondition) -> Put:
            return self._put(declared, new, expect, self._clock.now())

        modifying = modifications.Modifying(declared, key, change, default, put)

        async def attempt(write: Write) -> Entity:
            made = await modifying.make(await self._read_to_change(key, remaining()))
            try:
                written = await write(made, remaining())
            except AlreadyExistsError as exc:
                raise ConcurrencyConflictError(str(exc), retryable=True) from exc
            except EntityNotFoundError as exc:  # it was deleted, or has expired, since it was read
                if default is None:
                    raise
                raise ConcurrencyConflictError(str(exc), retryable=True) from exc
            return written

        most = retry_seconds if timeout is None else min(retry_seconds, timeout)
        step = modifying.step if timeout is None else None
        written = await self._modified(key, attempt, step, most)
        return copy_entity(written) if returning else version_of(written)

    async def _modified(
        self,
        key: Key,
        attempt: Callable[[Write], Awaitable[Entity]],
        step: Step | None,
        seconds: float,
    ) -> Entity:
        """What `attempt` returns, with a function that writes what it has made; again after conflicts.

        Args:
            step: as an attempt, without reading and writing, for a task that writes for several.
        """
        del step
        return await self._retried(key, lambda: attempt(self._write_made), seconds)

    async def _write_made(self, made: Made, timeout: float | None) -> Entity:
        version = new_version(await self._write((made.put,), timeout))
        return {**made.entity, VERSION: version}

    @abstractmethod
    async def _retried(
        self, key: Key, attempt: Callable[[], Awaitable[Result]], seconds: float
    ) -> Result:
        """Await `attempt()`, and again after each conflict on the entity of this key."""

    async def _read_to_change(self, key: Key, timeout: float | None) -> Entity | None:
        """The entity of a key for an attempt that writes only if it is unchanged."""
        return await self.get_entity(key.collection, key.id, timeout=timeout)

    def _note_retry(self, collection: str | None) -> None:
        """Something is tried again after a conflict."""
        log.debug("trying again after a conflict in %s", collection or "a transaction")

    # -- changes by filter -------------------------------------------------------------------

    async def update_where(
        self,
        collection: str,
        filters: Filters,
        changes: UpdateMap,
        *,
        order_by: OrderBy = None,
        limit: int | None = None,
    ) -> int:
        """Change the given fields of every entity that matches; returns how many were changed.

        Each is changed at most once, and only if it matches at the moment at which it is written: an
        entity that is changed by another task meanwhile is read and judged again. (It is judged by its
        version: one that is deleted and created again with the same version is not distinguished
        from the first where the engine does not declare `detects_recreation`.)

        Called on the store, the entities are changed in batches, each independently, and the first
        failure ends the call. In a transaction, all of them are changed or none.

        Args:
            changes: as in `update_entity`.
            order_by, limit: as in `query_entities`: the first `limit` entities in this order.

        Raises:
            PartialChangeError: a change failed; those before it stay.
            InvalidQueryError, InvalidFieldError, UnsupportedValueError: before any I/O.
        """
        declared = self._schema[collection]
        query = await self._built_query(collection, filters, order_by, limit, None)
        fields = read_update(declared, "", changes)
        if declared.key in fields:
            raise InvalidFieldError(f"{collection}.{declared.key} is the key and cannot be changed")

        def change(key: Key, version: int) -> Patch:
            at = self._clock.now()
            return Patch(key, {**fields, UPDATED_AT: at}, at, version)

        matching = changes_by_filter.ChangesByFilter(self, declared, query, change)
        await self._change_by_filter(matching)
        return matching.done

    @overload
    async def delete_where(
        self,
        collection: str,
        filters: Filters,
        *,
        order_by: OrderBy = None,
        limit: int | None = None,
        returning: Literal[False] = False,
    ) -> int: ...

    @overload
    async def delete_where(
        self,
        collection: str,
        filters: Filters,
        *,
        order_by: OrderBy = None,
        limit: int | None = None,
        returning: Literal[True],
    ) -> list[Entity]: ...

    async def delete_where(
        self,
        collection: str,
        filters: Filters,
        *,
        order_by: OrderBy = None,
        limit: int | None = None,
        returning: bool = False,
    ) -> int | list[Entity]:
        """Delete every entity that matches, in the way of `update_where`; returns how many.

        Args:
            returning: return the deleted entities instead, as they were.

        Raises:
            PartialChangeError, InvalidQueryError: as in `update_where`.
        """
        check_boolean(returning, "returning")
        query = await self._built_query(collection, filters, order_by, limit, None)
        matching = changes_by_filter.ChangesByFilter(
            self, self._schema[collection], query, Delete, keep=returning
        )
        await self._change_by_filter(matching)
        return matching.entities if returning else matching.done

    async def _change_by_filter(self, changes: ChangesByFilter) -> None:
        await changes.run()

    # -- queries -----------------------------------------------------------------------------

    async def query_entities(
        self,
        collection: str,
        filters: Filters = None,
        order_by: OrderBy = None,
        limit: int | None = None,
        *,
        fields: Sequence[str | Path] | None = None,
        offset: int = 0,
        timeout: float | None = None,
    ) -> list[Entity]:
        """The matching entities, in order.

        Args:
            filters: maps declared fields (or `path(...)`) to a value, which means equality, or to an
                operator; or a combination by `and_`, `or_`, `not_`. None: all entities. A field that
                is not declared, or a value of another type than the declared one, is asked for by
                `path("name")`.
            order_by: `"name"`, `"-name"`, or a list of them or of `asc(...)`, `desc(...)`. Ties
                are broken by id; None sorts by id if the engine's `default_order` is "id".
            limit: the maximum number of entities.
            fields: return only these; the key field and `version` are always included.
            offset: skip this number of entities first, in the order by id if `order_by` is None. They
                are read, so that its cost grows with the offset: `query_page` has no such cost.

        Raises:
            InvalidQueryError: an argument is malformed; raised before any I/O.
        """
        if type(offset) is not int or offset < 0:
            raise InvalidQueryError("offset must be a non-negative integer")
        if offset and order_by is None:
            order_by = self._schema[collection].key
        query = await self._built_query(collection, filters, order_by, limit, fields)
        if query.limit == 0:
            return []
        end = None if query.limit is None else query.limit + offset
        return await self._entities(query.with_limit(end), query.fields, timeout, skipped=offset)

    async def stream_entities(
        self,
        collection: str,
        filters: Filters = None,
        order_by: OrderBy = None,
        limit: int | None = None,
        *,
        fields: Sequence[str | Path] | None = None,
    ) -> AsyncGenerator[Entity, None]:
        """Like `query_entities`, one entity at a time, without keeping all of them in memory."""
        query = await self._built_query(collection, filters, order_by, limit, fields)
        async with Owned(self._rows(query)) as rows:
            async for each in rows:
                yield each

    async def query_page(
        self,
        collection: str,
        filters: Filters = None,
        order_by: OrderBy = None,
        limit: int = 100,
        *,
        cursor: str | None = None,
        fields: Sequence[str | Path] | None = None,
        timeout: float | None = None,
    ) -> Page:
        """One page of entities, and the cursor of the next page; None on the last.

        Reading page by page returns every entity that is not changed in the meantime exactly once,
        whatever other changes happen.

        Raises:
            InvalidCursorError: an invalid cursor, or the cursor of another query.
        """
        if limit is None or limit == 0:
            raise InvalidQueryError("limit of a page must be at least 1")
        declared = self._schema[collection]
        query = await build_large_query(
            declared,
            filters=filters,
            order_by=order_by,
            limit=limit,
            fields=fields,
            cursor=cursor,
            paged=True,
        )
        if cursor is None:
            async with operation_timeout(timeout):
                query = await self._first_page(query)
        # One entity more than requested is read, to determine whether there is a next page.
        entities = await self._entities(query.with_limit(limit + 1), None, timeout)
        return self._page(query, limit, entities)

    async def _stored_page(self, collection: str, limit: int, cursor: str | None) -> Page:
        """A page of all entities, with those that have expired and were not removed."""
        query = build_query(self._schema[collection], limit=limit, cursor=cursor, paged=True)
        more = query.with_limit(limit + 1)
        if self._lifetimes is None:  # in batches, which is faster
            return self._page(query, limit, await self._entities(more, None, None))
        async with Owned(self._select_stored(more)) as records:
            return self._page(query, limit, [each.entity async for each in records])

    def _page(self, query: Query, limit: int, entities: list[Entity]) -> Page:
        """The page of a query.

        Args:
            entities: one more than the limit, if there is a next page.
        """
        page = projected(entities[:limit], query.fields)
        if len(entities) <= limit:
            return Page(page, None)
        last = entities[limit - 1]
        return Page(page, encode_cursor(query, self._schema[query.collection].id_of(last), last))

    async def count_entities(
        self, collection: str, filters: Filters = None, *, timeout: float | None = None
    ) -> int:
        """The number of matching entities."""
        query = await self._built_query(collection, filters, None, None, None)
        started, number = perf_counter(), 0
        try:
            if timeout is None:
                number = await self._count(query)
            else:
                async with operation_timeout(timeout):
                    number = await self._count(query)
        finally:
            self._slow_queries.note(query, started, number)
        return number

    async def count_by(
        self,
        collection: str,
        field: str | Path,
        filters: Filters = None,
        *,
        timeout: float | None = None,
    ) -> list[tuple[Value | Missing, int]]:
        """The values of a field among the matching entities, each with the number of entities.

        In the order of `asc`: MISSING, None, False, True, numbers, strings. Integers and floats that are
        equal count together, and are shown as an integer if one of them is.

        Args:
            field: a name, or a `path`. A field declared as json is refused; a value inside it is not.

        Raises:
            InvalidQueryError: before any I/O.
        """
        counts = aggregates.Counts()
        await self._aggregate(collection, field, filters, counts, timeout)
        return await counts.sorted()

    async def sum_of(
        self,
        collection: str,
        field: str | Path,
        filters: Filters = None,
        *,
        timeout: float | None = None,
    ) -> int | float:
        """The exact sum of the numbers in a field; values that are no numbers are not counted.

        0 if there are none. An integer, of any size, if all numbers are integers, else a float.

        Args:
            field: declared as integer or number, or a `path`.

        Raises:
            InvalidQueryError: before any I/O.
            UnsupportedValueError: the sum exceeds the range of floats.
        """
        numbers = aggregates.Sum()
        await self._aggregate(collection, field, filters, numbers, timeout)
        return numbers.total()

    async def _aggregate(
        self,
        collection: str,
        field: str | Path,
        filters: Filters,
        result: Counts | Sum,
        timeout: float | None,
    ) -> None:
        numeric = isinstance(result, aggregates.Sum)
        steps = aggregates.aggregated_path(self._schema[collection], field, numeric=numeric)
        query = await self._built_query(collection, filters, None, None, [Path((steps[0],))])
        read = value_reader(steps)
        started, rows = perf_counter(), 0
        try:
            async with operation_timeout(timeout), Owned(self._batches(query)) as batches:
                async for batch in batches:
                    result.add(map(read, batch))
                    rows += len(batch)
        finally:
            self._slow_queries.note(query, started, rows)

    async def min_of(
        self,
        collection: str,
        field: str | Path,
        filters: Filters = None,
        *,
        timeout: float | None = None,
    ) -> Value:
        """The least value of a field in the order of `asc`, without null; None if there is no value.

        Raises:
            InvalidQueryError: the field is declared as json; before any I/O.
        """
        return await self._extreme(collection, field, filters, timeout, greatest=False)

    async def max_of(
        self,
        collection: str,
        field: str | Path,
        filters: Filters = None,
        *,
        timeout: float | None = None,
    ) -> Value:
        """The greatest value of a field; see `min_of`."""
        return await self._extreme(collection, field, filters, timeout, greatest=True)

    async def _extreme(
        self,
        collection: str,
        field: str | Path,
        filters: Filters,
        timeout: float | None,
        *,
        greatest: bool,
    ) -> Value:
        steps = aggregates.aggregated_path(self._schema[collection], field)
        query = await self._built_query(collection, filters, None, None, [Path((steps[0],))])
        query = aggregates.extreme_query(query, steps, greatest=greatest)
        entities = await self._entities(query, None, timeout)
        values = [value for each in entities if (value := value_reader(steps)(each)) is not MISSING]
        return values[0] if values else None

    # -- shared by the methods ---------------------------------------------------------------

    def _query(
        self,
        collection: str,
        filters: Filters,
        order_by: OrderBy,
        limit: int | None,
        fields: Sequence[str | Path] | None,
    ) -> Query:
        return build_query(
            self._schema[collection],
            filters=filters,
            order_by=order_by,
            limit=limit,
            fields=fields,
        )

    def _built_query(
        self,
        collection: str,
        filters: Filters,
        order_by: OrderBy,
        limit: int | None,
        fields: Sequence[str | Path] | None,
    ) -> Coroutine[Any, Any, Query]:
        """`_query`, whose filter may have many values."""
        return build_large_query(
            self._schema[collection],
            filters=filters,
            order_by=order_by,
            limit=limit,
            fields=fields,
        )

    async def _entities(
        self,
        query: Query,
        fields: tuple[str, ...] | None,
        timeout: float | None,
        *,
        skipped: int = 0,
    ) -> list[Entity]:
        entities: list[Entity] = []
        started = perf_counter()
        try:
            async with operation_timeout(timeout):
                if (few := await self._select_at_once(query)) is not None:
                    entities = projected(few[skipped:], fields)
                    return entities
                gathered = GatheredObjects()
                async with Owned(self._select_batches(query)) as batches:
                    async for batch in batches:
                        entities += projected(batch[skipped:], fields)
                        skipped = max(0, skipped - len(batch))
                        gathered.add(len(batch))
        finally:
            self._slow_queries.note(query, started, len(entities))
        return entities

    async def _rows(self, query: Query) -> AsyncGenerator[Entity, None]:
        if query.limit == 0:
            return
        async with Owned(self._select(query)) as records:
            async for record in records:
                yield project(record.entity, query.fields)

    def _put(
        self, collection: Collection, data: Mapping[str, object], expect: Precondition, at: str
    ) -> Put:
        key, entity = collection.entity(data)
        stamp(entity, at)
        return Put(key, entity, at, expect)

    def _puts(
        self,
        collection: Collection,
        chunk: Sequence[Mapping[str, object]],
        expect: Precondition,
        at: str,
        *,
        imported: bool = False,
    ) -> list[Put] | None:
        """`_put` or `_imported` of each, validated together; None if they must be validated one by one."""
        versions: Iterable[int | None] = repeat(None)
        if imported:
            found = _versions_to_import(chunk)
            if found is None:
                return None
            versions = found
        if self._takes_encoded(collection.name):
            encoded = batch_validation.encode_batch(collection, chunk, None if imported else at)
            if encoded is not None:
                keys, texts, form = encoded
                unused: Entity = {}
                none = repeat(None)  # neither a mark nor lifetimes
                common = (repeat(unused), repeat(at), repeat(expect))
                rest = (none, none, repeat(False), texts, repeat(form))
                return list(map(EncodedPut, keys, *common, versions, *rest))
        checked = batch_validation.validate_batch(collection, chunk)
        if checked is None:
            return None
        if not imported:
            for each in checked[1]:
                stamp(each, at)
        return list(map(Put, *checked, repeat(at), repeat(expect), versions))

    def _patch(
        self,
        collection: Collection,
        entity_id: str,
        data: UpdateMap,
        expect: Precondition,
        at: str,
    ) -> Patch:
        key = collection.key_of(entity_id)
        fields = read_update(collection, key.id, data)
        fields[UPDATED_AT] = at
        return Patch(key, fields, at, _existing(expect))

    async def _write_many(
        self, changes: list[Put] | list[Patch], timeout: float | None
    ) -> list[int]:
        """The new version of each entity. The list of changes is empty afterwards."""
        versions = _versions(await self._write(changes, timeout)) if changes else []
        await reclaim(changes)
        return versions


def _countdown(timeout: float | None) -> Callable[[], float | None]:
    """A function that returns how many seconds of a timeout are left."""
    if timeout is None:
        return lambda: None
    check_seconds(timeout, "timeout")
    deadline = monotonic() + timeout
    return lambda: max(0.0, deadline - monotonic())


def _existing(expect: Precondition) -> Precondition:
    """The precondition of an update, which never creates an entity."""
    return PRESENT if expect is ANY else expect


def _succeeded(outcomes: Sequence[Outcome]) -> int | None:
    """The outcome of the only change of a call."""
    [outcome] = outcomes
    if isinstance(outcome, StorageError):
        raise outcome
    return outcome


def new_version(outcomes: Sequence[Outcome]) -> int:
    """The version that the only change of a call, which is no delete, has written."""
    version = _succeeded(outcomes)
    assert version is not None, "only a delete has no version"
    return version


def _versions(outcomes: Sequence[Outcome]) -> list[int]:
    """The outcomes of changes other than deletes, if no change has failed."""
    return all_succeeded([each for each in outcomes if each is not None])


def all_succeeded(results: Sequence[Done | StorageError], *, alone: bool = False) -> list[Done]:
    """The results of the changes of a batch.

    Args:
        alone: raise the error of the only change as it is.

    Raises:
        BatchError: some of them failed.
    """
    succeeded = [each for each in results if not isinstance(each, StorageError)]
    if len(succeeded) == len(results):
        return succeeded
    errors = [each for each in results if isinstance(each, StorageError)]
    if alone:
        raise errors[0]
    raise BatchError(
        f"{len(errors)} of {len(results)} changes failed; the first: {errors[0]}", results
    ) from errors[0]


class _Expected:
    """The expected versions of a batch by id; each must belong to one of its changes."""

    def __init__(self, versions: Mapping[str, int | Expect] | None, *, absent: bool) -> None:
        if versions is not None:
            _check_mapping(versions, "expected_versions", "versions")
        self._versions = {
            each: check_version(version, absent=absent)
            for each, version in (versions or {}).items()
        }
        self._remaining = set(self._versions)

    def pop(self, entity_id: str) -> Precondition:
        """The precondition for the first change of an id; ANY for further changes of the same id."""
        if entity_id not in self._remaining:
            return ANY
        self._remaining.discard(entity_id)
        return self._versions[entity_id]

    def assert_exhausted(self) -> None:
        if self._remaining:
            names = ", ".join(sorted(map(repr, self._remaining))[:5])
            raise InvalidVersionError(
                f"expected_versions has ids that are not in the batch: {names}"
            )


def living(lifetimes: Lifetimes, records: Sequence[Record | None]) -> list[Record | None]:
    """Records that were read by key; None for each that has expired."""
    return [
        None if each is None or lifetimes.is_over(each.key.collection, each.entity) else each
        for each in records
    ]


def purging(record: Record) -> Delete:
    """The change that removes an entity, if it has expired then."""
    return Delete(record.key, record.version, purge=True)


def _delete(key: Key, expected: _Expected) -> Delete:
    return Delete(key, expected.pop(key.id))


def _imported(
    collection: Collection, data: Mapping[str, object], expected: _Expected, at: str
) -> Put:
    version = check_version(data.get(VERSION, 0) if isinstance(data, Mapping) else 0, absent=False)
    if isinstance(version, Expect):
        raise InvalidVersionError("an imported version must be a non-negative integer")
    key, entity = collection.entity(data)
    return Put(key, entity, at, expected.pop(key.id), version)


def _versions_to_import(chunk: Sequence[Mapping[str, object]]) -> list[int] | None:
    """The versions of entities, 0 if it is missing; None if one of them is invalid."""
    versions = [each.get(VERSION, 0) if type(each) is dict else None for each in chunk]
    if set(map(type, versions)) != {int}:
        return None
    found = cast("list[int]", versions)
    # Validated as a value, it has at most 64 bits.
    return found if min(found) >= 0 else None


async def _in_chunks(
    items: Iterable[Item],
    convert: Callable[[Item], Converted],
    convert_chunk: Callable[[Sequence[Item]], list[Converted] | None] | None = None,
    *,
    collection: Collection | None = None,
) -> list[Converted]:
    """Convert each item; between the chunks of a large batch the event loop runs other tasks.

    Args:
        convert_chunk: converts a whole chunk, or returns None if the items must be converted one by
            one.
        collection: the items are entities of this collection: an error then names the entity's id.
    """
    converted: list[Converted] = []
    gathered = GatheredObjects()
    if convert_chunk is None or not isinstance(items, list | tuple):
        # One by one: a generator may yield the same dict again, changed between the items.
        each_converted = (
            _with_item_context(convert, index, item, collection) for index, item in enumerate(items)
        )
        async for part in Chunks(each_converted, _CHUNK_SIZE):
            converted += part
            gathered.add(len(part))
        return converted
    async for chunk in Chunks(items, _BATCH_CHUNK_SIZE):
        converted += convert_chunk(chunk) or [
            _with_item_context(convert, index, item, collection)
            for index, item in enumerate(chunk, len(converted))
        ]
        gathered.add(len(chunk))
    return converted


def _with_item_context(
    convert: Callable[[Item], Converted], index: int, item: Item, collection: Collection | None
) -> Converted:
    """Convert an item; an error names the item."""
    try:
        return convert(item)
    except InvalidInputError as exc:
        raise exc.at(_name_of(index, item, collection)) from exc


def _name_of(index: int, item: object, collection: Collection | None) -> str:
    """The name of an item of a batch in errors: its collection and id, else its position."""
    if collection is not None and isinstance(item, Mapping):
        entity_id = item.get(collection.key)
        if isinstance(entity_id, str) and 0 < len(entity_id) <= MAX_KEY_BYTES:
            return f"{collection.name} {entity_id!r}"
    return f"item {index}"


def _check_mapping(items: object, what: str, values: str) -> None:
    if not isinstance(items, Mapping):
        raise InvalidInputError(
            f"{what} must be a dict that maps ids to {values}, not {type(items).__name__}"
        )


def timed_out(timeout: float, *, outcome_unknown: bool) -> OperationTimeoutError:
    # A command gives what remains of its time: 1.994 s of 2.
    seconds = round(timeout, 1 if timeout > 1 else 3) or timeout
    return OperationTimeoutError(
        f"not completed within {seconds:g} s",
        retryable=not outcome_unknown,
        outcome_unknown=outcome_unknown,
    )


_NO_TIMEOUT: Final = nullcontext()


def operation_timeout(
    timeout: float | None, *, outcome_unknown: Callable[[], bool] = bool
) -> AbstractAsyncContextManager[None]:
    """Limit the duration of the body to `timeout` seconds.

    Raises:
        OperationTimeoutError: the time expired; `outcome_unknown` is called at that moment.
    """
    return _NO_TIMEOUT if timeout is None else _limited(timeout, outcome_unknown)


@asynccontextmanager
async def _limited(timeout: float, outcome_unknown: Callable[[], bool]) -> AsyncIterator[None]:
    check_seconds(timeout, "timeout")
    scope = asyncio.timeout(timeout)
    try:
        async with scope:
            yield
    except TimeoutError as exc:
        if not scope.expired():
            raise
        raise timed_out(timeout, outcome_unknown=outcome_unknown()) from exc
