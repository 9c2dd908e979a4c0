"""The blocking form of typed collections.

The methods whose types contain the model are written out: for what `blocking` makes of a method of a
generic class, type checkers other than mypy do not know the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Generic

from hf_async_store import typed
from hf_async_store.changes import ANY, Expect
from hf_async_store.conflict_retry import RETRY_SECONDS
from hf_async_store.models import Model
from hf_async_store.query import Filters, OrderBy
from hf_async_store.schema import Collection
from hf_async_store.sync.calls import (
    Blocking,
    Stream,
    blocking,
    calling_back,
    streaming,
)
from hf_async_store.typed import Id, OnInvalid, TypedPage, Versioned
from hf_async_store.values import Entity

_get = blocking(typed.TypedRepository.get)
_get_versioned = blocking(typed.TypedRepository.get_versioned)
_create = blocking(typed.TypedRepository.create)
_save = blocking(typed.TypedRepository.save)
_modify = calling_back(typed.TypedRepository.modify)
_get_many = calling_back(typed.TypedRepository.get_many)
_create_many = blocking(typed.TypedRepository.create_many)
_save_many = blocking(typed.TypedRepository.save_many)
_query = calling_back(typed.TypedRepository.query)
_stream = streaming(typed.TypedRepository.stream)
_page = blocking(typed.TypedRepository.page)


class TypedRepository(Blocking, Generic[Model]):
    """As `typed.TypedRepository`."""

    _target: typed.TypedRepository[Model]

    @property
    def model(self) -> type[Model]:
        """As `typed.TypedRepository.model`."""
        return self._target.model

    @property
    def collection(self) -> Collection:
        """As `typed.TypedRepository.collection`."""
        return self._target.collection

    def id_of(self, instance: Model) -> str:
        """As `typed.TypedRepository.id_of`."""
        return self._target.id_of(instance)

    def instance_of(self, entity: Entity) -> Model:
        """As `typed.TypedRepository.instance_of`."""
        return self._target.instance_of(entity)

    patch = blocking(typed.TypedRepository.patch)
    delete = blocking(typed.TypedRepository.delete)
    delete_many = blocking(typed.TypedRepository.delete_many)
    count = blocking(typed.TypedRepository.count)
    count_by = blocking(typed.TypedRepository.count_by)
    sum_of = blocking(typed.TypedRepository.sum_of)
    min_of = blocking(typed.TypedRepository.min_of)
    max_of = blocking(typed.TypedRepository.max_of)
    update_where = blocking(typed.TypedRepository.update_where)
    delete_where = blocking(typed.TypedRepository.delete_where)

    def get(self, entity_id: Id, *, timeout: float | None = None) -> Model | None:
        """As `typed.TypedRepository.get`."""
        return _get(self, entity_id, timeout=timeout)

    def get_versioned(
        self, entity_id: Id, *, timeout: float | None = None
    ) -> Versioned[Model] | None:
        """As `typed.TypedRepository.get_versioned`."""
        return _get_versioned(self, entity_id, timeout=timeout)

    def create(self, instance: Model, *, timeout: float | None = None) -> int:
        """As `typed.TypedRepository.create`."""
        return _create(self, instance, timeout=timeout)

    def save(
        self,
        instance: Model,
        *,
        expected_version: int | Expect = ANY,
        timeout: float | None = None,
    ) -> int:
        """As `typed.TypedRepository.save`."""
        return _save(self, instance, expected_version=expected_version, timeout=timeout)

    def modify(
        self,
        entity_id: Id,
        change: Callable[[Model], Model],
        *,
        default: Model | None = None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> int:
        """As `typed.TypedRepository.modify`; `change` is called in the calling thread."""
        return _modify(self, entity_id, change, default=default, retry_seconds=retry_seconds)

    def get_many(
        self,
        ids: Iterable[Id],
        *,
        on_invalid: OnInvalid = None,
        timeout: float | None = None,
    ) -> list[Model | None]:
        """As `typed.TypedRepository.get_many`."""
        return _get_many(self, ids, on_invalid=on_invalid, timeout=timeout)

    def create_many(self, instances: Iterable[Model], *, timeout: float | None = None) -> list[int]:
        """As `typed.TypedRepository.create_many`."""
        return _create_many(self, instances, timeout=timeout)

    def save_many(self, instances: Iterable[Model]) -> list[int]:
        """As `typed.TypedRepository.save_many`."""
        return _save_many(self, instances)

    def query(
        self,
        filters: Filters = None,
        order_by: OrderBy = None,
        limit: int | None = None,
        *,
        offset: int = 0,
        on_invalid: OnInvalid = None,
        timeout: float | None = None,
    ) -> list[Model]:
        """As `typed.TypedRepository.query`."""
        return _query(
            self, filters, order_by, limit, offset=offset, on_invalid=on_invalid, timeout=timeout
        )

    def stream(
        self,
        filters: Filters = None,
        order_by: OrderBy = None,
        limit: int | None = None,
        *,
        on_invalid: OnInvalid = None,
    ) -> Stream[Model]:
        """As `typed.TypedRepository.stream`."""
        return _stream(self, filters, order_by, limit, on_invalid=on_invalid)

    def page(
        self,
        filters: Filters = None,
        order_by: OrderBy = None,
        limit: int = 100,
        *,
        cursor: str | None = None,
        timeout: float | None = None,
    ) -> TypedPage[Model]:
        """As `typed.TypedRepository.page`."""
        return _page(self, filters, order_by, limit, cursor=cursor, timeout=timeout)

    if not TYPE_CHECKING:  # which refuses them, as they are not there
        claim = typed.TypedRepository.claim
        watch = typed.TypedRepository.watch
        wait_for = typed.TypedRepository.wait_for
