"""Typed collections: the methods of one collection, with instances of a model instead of dicts."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeAlias, cast
from uuid import UUID

from hf_async_store.arguments import check_callable, check_listed, check_mapping
from hf_async_store.backoff import Backoff
from hf_async_store.changes import ABSENT, ANY, Expect
from hf_async_store.conflict_retry import RETRY_SECONDS
from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    ConcurrencyConflictError,
    ConfigurationError,
    EntityMismatchError,
    EntityNotFoundError,
    InvalidFieldError,
    InvalidInputError,
    StorageError,
)
from hf_async_store.event_loop import Chunks
from hf_async_store.field_operations import Operation, UpdateMap
from hf_async_store.generators import Owned
from hf_async_store.models import Model, ModelCodec, codec_of
from hf_async_store.query import Filters, Missing, OrderBy, Path
from hf_async_store.repository import RepositoryInterface, all_succeeded
from hf_async_store.schema import Collection
from hf_async_store.values import (
    CREATED_AT,
    REMOVE,
    UPDATED_AT,
    VERSION,
    Entity,
    Removed,
    Value,
    version_of,
)

_CHUNK_SIZE: Final = 128
"""How many instances are converted between two iterations of the event loop."""

Id: TypeAlias = str | UUID
"""An id, as a model may hold it."""

OnInvalid: TypeAlias = Callable[[EntityMismatchError], object] | None


class Versioned(NamedTuple, Generic[Model]):
    """An instance, and the version with which it is stored."""

    instance: Model
    version: int


class TypedPage(NamedTuple, Generic[Model]):
    """A page of instances.

    Attributes:
        items: the instances, in order.
        cursor: that of the next page; None on the last page.
        invalid: an error for each entity of the page that does not fit the model. It is not in `items`.
    """

    items: list[Model]
    cursor: str | None
    invalid: list[EntityMismatchError]


class TypedRepository(Generic[Model]):
    """The methods of a collection that was declared by `Collection.from_model`.

    They are those of `RepositoryInterface`, with its arguments and errors. What they return fits the
    model, or is an `EntityMismatchError`: methods that return several instances take `on_invalid`, a
    function that is called with the error of each entity that does not fit, and continue with the
    others; without it, they raise the first.

    Get it by `tx.typed(Job)` in a transaction, or by `store.typed(Job)`: a `TypedCollection`.
    """

    def __init__(self, repository: RepositoryInterface, model: type[Model]) -> None:
        self._repository = repository
        self._model = model
        self._collection = _declared(repository, model)
        self._codec: ModelCodec[Model] = codec_of(model)
        self._name = self._collection.name

    @property
    def model(self) -> type[Model]:
        """The class of the instances."""
        return self._model

    @property
    def collection(self) -> Collection:
        """The declaration."""
        return self._collection

    def id_of(self, instance: Model) -> str:
        """The id of an instance."""
        return self._key(self._codec.entity(instance))

    def instance_of(self, entity: Entity) -> Model:
        """The instance for an entity that a method of the store has returned.

        Raises:
            EntityMismatchError: it does not fit the model.
        """
        return self._codec.instance(self._name, self._collection.id_of(entity), entity)

    # -- one entity --------------------------------------------------------------------------

    async def get(self, entity_id: Id, *, timeout: float | None = None) -> Model | None:
        """The instance, or None if it does not exist."""
        entity = await self._repository.get_entity(
            self._name, id_string(entity_id), timeout=timeout
        )
        return None if entity is None else self.instance_of(entity)

    async def get_versioned(
        self, entity_id: Id, *, timeout: float | None = None
    ) -> Versioned[Model] | None:
        """The instance and its version, for a model without a field that holds it."""
        entity = await self._repository.get_entity(
            self._name, id_string(entity_id), timeout=timeout
        )
        return None if entity is None else Versioned(self.instance_of(entity), version_of(entity))

    async def create(self, instance: Model, *, timeout: float | None = None) -> int:
        """Insert a new entity; returns its version, 1. See `create_entity`."""
        entity = self._codec.entity(instance)
        return await self._repository.create_entity(self._name, entity, timeout=timeout)

    async def save(
        self,
        instance: Model,
        *,
        expected_version: int | Expect = ANY,
        timeout: float | None = None,
    ) -> int:
        """Insert the entity, or change its fields to those of the instance; returns the new version.

        Stored fields that the model does not have stay as they are.

        Args:
            expected_version: as in `save_entity`. By default, the version that the instance holds; any,
                if it holds none.

        Raises:
            ConcurrencyConflictError, EntityNotFoundError, AlreadyExistsError: as `save_entity`.
        """
        entity = self._codec.entity(instance)
        expected = self._expected(instance, expected_version)
        if expected is ABSENT:
            return await self._repository.create_entity(self._name, entity, timeout=timeout)
        if expected is not ANY:
            return await self._repository.update_entity(
                self._name,
                self._key(entity),
                self._changes(entity),
                expected_version=expected,
                timeout=timeout,
            )
        return await self._repository.modify_entity(
            self._name,
            self._key(entity),
            lambda stored: self._merged(stored, entity),
            default=entity,
            timeout=timeout,
        )

    async def patch(self, entity_id: Id, /, **fields: object) -> int:
        """Change only the given fields of the model; returns the new version. See `update_entity`.

        All names are those of fields: for `expected_version`, call `update_entity` of the store. The values
        must fit their fields in the class; what a class says about several fields together is not checked.

        Example:
            `await jobs.patch("j-1", status=Status.DONE, attempts=increment(1))`
        """
        return await self._repository.update_entity(
            self._name, id_string(entity_id), self._named(fields)
        )

    async def modify(
        self,
        entity_id: Id,
        change: Callable[[Model], Model | Awaitable[Model]],
        *,
        default: Model | None = None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> int:
        """Read, change and write until no other writer interferes; returns the new version.

        Args:
            change: receives the instance, and returns the changed one. It is called again after a
                conflict.
            default: the instance of which `change` receives a copy if the entity does not exist.
        """
        check_callable(change, "change")

        async def awaited(stored: Entity, result: Awaitable[Model]) -> dict[str, object]:
            return self._merged(stored, self._codec.entity(await result))

        def changed(stored: Entity) -> dict[str, object] | Awaitable[dict[str, object]]:
            is_stored = VERSION in stored
            given = self.instance_of(stored) if default is None or is_stored else deepcopy(default)
            result = change(given)
            if inspect.isawaitable(result):
                return awaited(stored, result)
            return self._merged(stored, self._codec.entity(result))

        return await self._repository.modify_entity(
            self._name,
            id_string(entity_id),
            changed,
            default=None if default is None else self._codec.entity(default),
            retry_seconds=retry_seconds,
        )

    async def delete(
        self,
        entity_id: Id,
        *,
        expected_version: int | Expect = ANY,
        timeout: float | None = None,
    ) -> bool:
        """Delete an entity; returns whether it existed. See `delete_entity`."""
        return await self._repository.delete_entity(
            self._name, id_string(entity_id), expected_version=expected_version, timeout=timeout
        )

    # -- many --------------------------------------------------------------------------------

    async def get_many(
        self,
        ids: Iterable[Id],
        *,
        on_invalid: OnInvalid = None,
        timeout: float | None = None,
    ) -> list[Model | None]:
        """The instances in the order of `ids`; None for each that does not exist or does not fit."""
        entities = await self._repository.get_entities(self._name, _strings(ids), timeout=timeout)
        return [
            None if each is None else next(self._instances([each], on_invalid), None)
            async for chunk in Chunks(entities, _CHUNK_SIZE)
            for each in chunk
        ]

    async def create_many(
        self, instances: Iterable[Model], *, timeout: float | None = None
    ) -> list[int]:
        """`create` for each, in one batch; returns the versions. See `create_entities`."""
        entities = map(self._codec.entity, check_listed(instances, "instances"))
        return await self._repository.create_entities(self._name, entities, timeout=timeout)

    async def save_many(self, instances: Iterable[Model]) -> list[int]:
        """`save` for each, in one batch; returns the versions in input order.

        Raises:
            InvalidInputError: two instances have the same id.
            BatchError: some failed; the others are saved.
        """
        given = list(check_listed(instances, "instances"))
        entities = {
            self._key(entity): entity
            async for chunk in Chunks(given, _CHUNK_SIZE)
            for entity in map(self._codec.entity, chunk)
        }
        if len(entities) != len(given):
            raise InvalidInputError("save_many: two instances have the same id")
        expected = dict(zip(entities, map(self._expected, given), strict=True))
        outcomes: dict[str, int | StorageError] = {}
        backoff = Backoff(RETRY_SECONDS, first=0.001, longest=0.1)
        pending = entities
        while pending:
            outcomes |= await self._save_merged(pending, expected)
            pending = {
                entity_id: entity
                for entity_id, entity in pending.items()
                if expected[entity_id] is ANY and isinstance(outcomes[entity_id], _OVERTAKEN)
            }
            if pending and not await backoff.pause():
                break
        return all_succeeded([outcomes[each] for each in entities])

    async def _save_merged(
        self, entities: Mapping[str, dict[str, object]], expected: Mapping[str, int | Expect]
    ) -> dict[str, int | StorageError]:
        """Save entities with the stored fields that the model does not have; their outcomes by id."""
        merged: list[dict[str, object]] = []
        versions: dict[str, int | Expect] = {}
        stored = await self._repository.get_entities(self._name, list(entities))
        for (entity_id, entity), old in zip(entities.items(), stored, strict=True):
            merged.append(entity if old is None else self._merged(old, entity))
            current = ABSENT if old is None else version_of(old)
            versions[entity_id] = current if expected[entity_id] is ANY else expected[entity_id]
        try:
            outcomes = await self._repository.save_entities(self._name, merged, versions)
        except BatchError as exc:
            outcomes = exc.outcomes
        return dict(zip(entities, outcomes, strict=True))

    async def delete_many(self, ids: Iterable[Id], *, timeout: float | None = None) -> list[bool]:
        """`delete` for each id, in one batch. See `delete_entities`."""
        return await self._repository.delete_entities(self._name, _strings(ids), timeout=timeout)

    # -- queries -----------------------------------------------------------------------------

    async def query(
        self,
        filters: Filters = None,
        order_by: OrderBy = None,
        limit: int | None = None,
        *,
        offset: int = 0,
        on_invalid: OnInvalid = None,
        timeout: float | None = None,
    ) -> list[Model]:
        """The matching instances, in order. See `query_entities`."""
        entities = await self._repository.query_entities(
            self._name, filters, order_by, limit, offset=offset, timeout=timeout
        )
        return await self._converted(entities, on_invalid)

    async def stream(
        self,
        filters: Filters = None,
        order_by: OrderBy = None,
        limit: int | None = None,
        *,
        on_invalid: OnInvalid = None,
    ) -> AsyncGenerator[Model, None]:
        """As `query`, one instance at a time, without keeping all of them in memory."""
        entities = self._repository.stream_entities(self._name, filters, order_by, limit)
        async with Owned(entities) as owned:
            async for each in owned:
                for instance in self._instances([each], on_invalid):
                    yield instance

    async def page(
        self,
        filters: Filters = None,
        order_by: OrderBy = None,
        limit: int = 100,
        *,
        cursor: str | None = None,
        timeout: float | None = None,
    ) -> TypedPage[Model]:
        """One page of instances, and the cursor of the next page. See `query_page`."""
        page = await self._repository.query_page(
            self._name, filters, order_by, limit, cursor=cursor, timeout=timeout
        )
        invalid: list[EntityMismatchError] = []
        items = await self._converted(page.items, invalid.append)
        return TypedPage(items, page.cursor, invalid)

    async def count(self, filters: Filters = None, *, timeout: float | None = None) -> int:
        """The number of matching entities."""
        return await self._repository.count_entities(self._name, filters, timeout=timeout)

    async def count_by(
        self, field: str | Path, filters: Filters = None, *, timeout: float | None = None
    ) -> list[tuple[Value | Missing, int]]:
        """The values of a field, each with the number of entities. See `RepositoryInterface.count_by`."""
        return await self._repository.count_by(self._name, field, filters, timeout=timeout)

    async def sum_of(
        self, field: str | Path, filters: Filters = None, *, timeout: float | None = None
    ) -> int | float:
        """The sum of the numbers in a field. See `RepositoryInterface.sum_of`."""
        return await self._repository.sum_of(self._name, field, filters, timeout=timeout)

    async def min_of(
        self, field: str | Path, filters: Filters = None, *, timeout: float | None = None
    ) -> Value:
        """The least value of a field. See `RepositoryInterface.min_of`."""
        return await self._repository.min_of(self._name, field, filters, timeout=timeout)

    async def max_of(
        self, field: str | Path, filters: Filters = None, *, timeout: float | None = None
    ) -> Value:
        """The greatest value of a field. See `RepositoryInterface.max_of`."""
        return await self._repository.max_of(self._name, field, filters, timeout=timeout)

    async def update_where(
        self,
        filters: Filters,
        changes: UpdateMap,
        *,
        order_by: OrderBy = None,
        limit: int | None = None,
    ) -> int:
        """Change the given fields of every match. See `RepositoryInterface.update_where`.

        The values must fit their fields in the class, as for `patch`.
        """
        return await self._repository.update_where(
            self._name, filters, self._stored(changes), order_by=order_by, limit=limit
        )

    async def delete_where(
        self, filters: Filters, *, order_by: OrderBy = None, limit: int | None = None
    ) -> int:
        """Delete every match; returns how many. See `RepositoryInterface.delete_where`."""
        return await self._repository.delete_where(
            self._name, filters, order_by=order_by, limit=limit
        )

    # -- what only a store has ---------------------------------------------------------------

    if not TYPE_CHECKING:  # which refuses them, as they are not there

        def claim(self, *_: object, **__: object) -> None:
            """Refused: see `TypedCollection`."""
            raise InvalidInputError("entities are claimed by a store, not in a transaction")

        def watch(self, *_: object, **__: object) -> None:
            """Refused: see `TypedCollection`."""
            raise InvalidInputError("changes are watched by a store, not in a transaction")

        def wait_for(self, *_: object, **__: object) -> None:
            """Refused: see `TypedCollection`."""
            raise InvalidInputError("changes are awaited by a store, not in a transaction")

    # -- conversion --------------------------------------------------------------------------

    def _key(self, entity: Mapping[str, object]) -> str:
        return self._collection.key_of(entity.get(self._collection.key)).id

    async def _converted(self, entities: Iterable[Entity], on_invalid: OnInvalid) -> list[Model]:
        return [
            instance
            async for chunk in Chunks(entities, _CHUNK_SIZE)
            for instance in self._instances(chunk, on_invalid)
        ]

    def _instances(self, entities: Iterable[Entity], on_invalid: OnInvalid) -> Iterator[Model]:
        if on_invalid is not None:
            check_callable(on_invalid, "on_invalid")
        for each in entities:
            try:
                instance = self.instance_of(each)
            except EntityMismatchError as exc:
                if on_invalid is None:
                    raise
                on_invalid(exc)
            else:
                yield instance

    def _expected(self, instance: Model, given: int | Expect = ANY) -> int | Expect:
        held = self._codec.version_in(instance)
        return held if given is ANY and held is not None else given

    def _merged(self, stored: Entity, entity: Mapping[str, object]) -> dict[str, object]:
        """The entity with the stored fields that the model does not have."""
        unknown = {name: stored[name] for name in stored.keys() - self._codec.names}
        return {**unknown, **entity}

    def _changes(self, entity: Mapping[str, object]) -> dict[str, object]:
        """The update that gives a stored entity the fields of an instance."""
        left_out = self._codec.names - entity.keys() - {CREATED_AT, UPDATED_AT}
        return {**dict.fromkeys(left_out, REMOVE), **entity}

    def _named(self, fields: Mapping[str, object]) -> dict[str, object]:
        """An update by names of the model, by stored names."""
        named: dict[str, object] = {}
        for attribute, value in fields.items():
            name = self._codec.name_of(attribute)
            if name is None:
                from difflib import get_close_matches

                nearest = get_close_matches(attribute, self._codec.attributes, 1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                if attribute in ("expected_version", "timeout"):
                    hint = f"; `update_entity` of the store takes {attribute}"
                raise InvalidFieldError(f"{self._model.__name__} has no field {attribute!r}{hint}")
            named[name] = value
        return dict(self._stored(named))

    def _stored(self, changes: UpdateMap) -> UpdateMap:
        """An update with the values as they are stored; each fits its field."""
        check_mapping(changes, "changes")
        stored: dict[Any, object] = {}
        for name, value in changes.items():
            if isinstance(value, Removed):
                self._codec.check_removal(name)
            computed = isinstance(value, _UNCHANGED)
            stored[name] = value if computed else self._codec.value(name, value)
        return stored


_UNCHANGED: Final = (Operation, Removed)
"""What the store itself computes."""

_OVERTAKEN: Final = (ConcurrencyConflictError, AlreadyExistsError, EntityNotFoundError)
"""The errors of a save whose entity another task changed, created or deleted after it was read."""


def id_string(entity_id: Id) -> str:
    """The id as it is stored."""
    return str(entity_id) if isinstance(entity_id, UUID) else entity_id


def _strings(ids: Iterable[Id]) -> Iterable[str]:
    return cast("Iterable[str]", ids)  # the repository makes strings of UUIDs, in chunks


def _declared(repository: RepositoryInterface, model: type) -> Collection:
    """The collection of a model.

    Raises:
        ConfigurationError: the store has no such collection.
    """
    found = [each for each in repository.collections.values() if each.model is model]
    if len(found) == 1:
        return found[0]
    name = getattr(model, "__name__", repr(model))
    if found:
        names = ", ".join(each.name for each in found)
        raise ConfigurationError(
            f"several collections of this store are declared from {name}: {names}"
        )
    raise ConfigurationError(
        f"no collection of this store is declared from {name}: open it with "
        f"`collections=[Collection.from_model({name}, key=...)]`"
    )
