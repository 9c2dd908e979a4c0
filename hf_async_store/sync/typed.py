"""The blocking form of typed collections.

The methods whose types contain the model are written out: for what `blocking` makes of a method of a
generic class, type checkers other than mypy do not know the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic

from hf_async_store import typed
from hf_async_store.changes import ANY, Expect
from hf_async_store.conflict_retry import RETRY_SECONDS
from hf_async_store.models import Model
from hf_async_store.query import Filters, OrderBy
from hf_async_store.schema import Collection
from hf_async_store.sync.calls import (
    Blocking,
    Context,
    Stream,
    blocking,
    calling_back,
    streaming,
)
from hf_async_store.sync.feed import Changes
from hf_async_store.typed import OnInvalid, TypedChange, TypedPage, Versioned

_get = blocking(typed.TypedCollection.get)
_get_versioned = blocking(typed.TypedCollection.get_versioned)
_create = blocking(typed.TypedCollection.create)
_save = blocking(typed.TypedCollection.save)
_modify = calling_back(typed.TypedCollection.modify)
_get_many = calling_back(typed.TypedCollection.get_many)
_create_many = blocking(typed.TypedCollection.create_many)
_save_many = blocking(typed.TypedCollection.save_many)
_query = calling_back(typed.TypedCollection.query)
_stream = streaming(typed.TypedCollection.stream)
_page = blocking(typed.TypedCollection.page)
_wait_for = blocking(typed.TypedCollection.wait_for)


class TypedCollection(Blocking, Generic[Model]):
    """As `typed.TypedCollection`."""

    _target: typed.TypedCollection[Model]

    @property
    def model(self) -> type[Model]:
        """As `typed.TypedCollection.model`."""
        return self._target.model

    @property
    def collection(self) -> Collection:
        """As `typed.TypedCollection.collection`."""
        return self._target.collection

    def id_of(self, instance: Model) -> str:
        """As `typed.TypedCollection.id_of`."""
        return self._target.id_of(instance)

    patch = blocking(typed.TypedCollection.patch)
    delete = blocking(typed.TypedCollection.delete)
    delete_many = blocking(typed.TypedCollection.delete_many)
    count = blocking(typed.TypedCollection.count)
    count_by = blocking(typed.TypedCollection.count_by)
    update_where = blocking(typed.TypedCollection.update_where)
    delete_where = blocking(typed.TypedCollection.delete_where)

    def get(self, entity_id: str, *, timeout: float | None = None) -> Model | None:
        """As `typed.TypedCollection.get`."""
        return _get(self, entity_id, timeout=timeout)

    def get_versioned(
        self, entity_id: str, *, timeout: float | None = None
    ) -> Versioned[Model] | None:
        """As `typed.TypedCollection.get_versioned`."""
        return _get_versioned(self, entity_id, timeout=timeout)

    def create(self, instance: Model, *, timeout: float | None = None) -> int:
        """As `typed.TypedCollection.create`."""
        return _create(self, instance, timeout=timeout)

    def save(
        self,
        instance: Model,
        *,
        expected_version: int | Expect = ANY,
        timeout: float | None = None,
    ) -> int:
        """As `typed.TypedCollection.save`."""
        return _save(self, instance, expected_version=expected_version, timeout=timeout)

    def modify(
        self,
        entity_id: str,
        change: Callable[[Model], Model],
        *,
        default: Model | None = None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> int:
        """As `typed.TypedCollection.modify`; `change` is called in the calling thread."""
        return _modify(self, entity_id, change, default=default, retry_seconds=retry_seconds)

    def get_many(
        self,
        ids: Iterable[str],
        *,
        on_invalid: OnInvalid = None,
        timeout: float | None = None,
    ) -> list[Model | None]:
        """As `typed.TypedCollection.get_many`."""
        return _get_many(self, ids, on_invalid=on_invalid, timeout=timeout)

    def create_many(self, instances: Iterable[Model], *, timeout: float | None = None) -> list[int]:
        """As `typed.TypedCollection.create_many`."""
        return _create_many(self, instances, timeout=timeout)

    def save_many(self, instances: Iterable[Model]) -> list[int]:
        """As `typed.TypedCollection.save_many`."""
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
        """As `typed.TypedCollection.query`."""
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
        """As `typed.TypedCollection.stream`."""
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
        """As `typed.TypedCollection.page`."""
        return _page(self, filters, order_by, limit, cursor=cursor, timeout=timeout)

    @contextmanager
    def watch(
        self, filters: Filters = None, *, since: str | None = None
    ) -> Iterator[Changes[TypedChange[Model]]]:
        """As `typed.TypedCollection.watch`, for use with `with`."""
        with Context(self._opened(), self._target.watch(filters, since=since)) as changes:
            yield Changes(changes, self._loop_thread)

    def wait_for(self, entity_id: str, filters: Filters = None, *, timeout: float | None) -> Model:
        """As `typed.TypedCollection.wait_for`."""
        instance: Model = _wait_for(self, entity_id, filters, timeout=timeout)
        return instance
