"""The blocking form of the typed collections of a store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from hf_async_store import typed_collections
from hf_async_store.claims import LEASE_SECONDS
from hf_async_store.models import Model
from hf_async_store.query import Filters, OrderBy
from hf_async_store.sync.calls import Context, blocking
from hf_async_store.sync.claims import TypedClaim
from hf_async_store.sync.event_loop_thread import EventLoopThread
from hf_async_store.sync.feed import Changes
from hf_async_store.sync.transaction import Transaction
from hf_async_store.sync.typed import TypedRepository
from hf_async_store.typed import Id
from hf_async_store.typed_collections import TypedChange

_wait_for = blocking(typed_collections.TypedCollection.wait_for)


class TypedCollection(TypedRepository[Model]):
    """As `typed_collections.TypedCollection`."""

    _target: typed_collections.TypedCollection[Model]

    def __init__(
        self,
        target: typed_collections.TypedCollection[Model],
        loop_thread: EventLoopThread | None,
        transaction_type: type[Transaction],
    ) -> None:
        super().__init__(target, loop_thread)
        self._transaction_type = transaction_type

    def claim(
        self,
        filters: Filters = None,
        *,
        order_by: OrderBy = None,
        limit: int = 1,
        lease: float = LEASE_SECONDS,
        owner: str | None = None,
        wait: float | None = None,
        max_attempts: int | None = None,
    ) -> list[TypedClaim[Model]]:
        """As `typed_collections.TypedCollection.claim`."""
        claim = partial(
            self._target.claim,
            filters,
            order_by=order_by,
            limit=limit,
            lease=lease,
            owner=owner,
            wait=wait,
            max_attempts=max_attempts,
        )
        return [
            TypedClaim(each, self._opened(), self._transaction_type) for each in self._run(claim)
        ]

    @contextmanager
    def watch(
        self, filters: Filters = None, *, since: str | None = None
    ) -> Iterator[Changes[TypedChange[Model]]]:
        """As `typed_collections.TypedCollection.watch`, for use with `with`."""
        with Context(self._opened(), self._target.watch(filters, since=since)) as changes:
            yield Changes(changes, self._loop_thread)

    def wait_for(self, entity_id: Id, filters: Filters = None, *, timeout: float | None) -> Model:
        """As `typed_collections.TypedCollection.wait_for`."""
        instance: Model = _wait_for(self, entity_id, filters, timeout=timeout)
        return instance
