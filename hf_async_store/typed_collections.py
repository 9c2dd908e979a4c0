"""Typed collections of a store: besides what a transaction has, its claims and its changes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Any, Final, Generic, Literal, NamedTuple, Self

from hf_async_store.claims import LEASE_SECONDS, Claim, ClaimFacts
from hf_async_store.feed import Changes
from hf_async_store.models import Model
from hf_async_store.query import Filters, OrderBy
from hf_async_store.transaction import Transaction
from hf_async_store.typed import Id, TypedRepository, id_string
from hf_async_store.values import REMOVE, Entity
from hf_async_store.watching import WatchedStore


class TypedChange(NamedTuple, Generic[Model]):
    """A change of an instance: as `EntityChange`; `instance` is None for a delete."""

    kind: Literal["put", "delete"]
    id: str
    version: int
    instance: Model | None
    token: str


class TypedChanges(AsyncIterator[TypedChange[Model]], Generic[Model]):
    """As `Changes`, with instances."""

    def __init__(self, changes: Changes, instance: Callable[[Entity], Model]) -> None:
        self._changes = changes
        self._instance = instance

    @property
    def token(self) -> str:
        """As `Changes.token`."""
        return self._changes.token

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TypedChange[Model]:
        """The next change; waits for it.

        Raises:
            EntityMismatchError: the entity does not fit the model. The next call continues after it.
        """
        change = await anext(self._changes)
        instance = None if change.entity is None else self._instance(change.entity)
        return TypedChange(change.kind, change.id, change.version, instance, change.token)


class TypedClaim(ClaimFacts, Generic[Model]):
    """As `Claim`, of an instance.

    What is done through it is refused with `ClaimLostError` when it is not held any more. As an async
    context manager, it is renewed in the background, and released at the end.

    Attributes:
        claim: the same claim, whose `entity` is a dict.
    """

    def __init__(self, claim: Claim, collection: TypedRepository[Model]) -> None:
        self.claim: Final = claim
        self._held = claim
        self._typed = collection
        # What the fields of the model are, as far as it is known: as claimed, and written since.
        self._stored: dict[str, object] = {}

    def __repr__(self) -> str:
        return repr(self.claim)

    @cached_property
    def instance(self) -> Model:
        """The instance as it was claimed.

        Raises:
            EntityMismatchError: the entity does not fit the model. The claim is held nevertheless, because
                the entity would be claimed again at once otherwise.
        """
        instance = self._typed.instance_of(self.claim.entity)
        # Copied: the instance is the caller's, who may change it.
        self._stored = {**self._typed._codec.entity(instance), **self._stored}
        return instance

    async def update(self, instance: Model | None = None, /, **fields: object) -> int:
        """Change the given fields, or those that were changed in an instance; returns the new version.

        Of an instance, only the fields are written in which it differs from what was claimed, and from what
        was written through this claim since. So other fields stay as other programs have written them.

        Example:
            `await claim.update(status=Status.RUNNING, attempts=increment(1))`

        Raises: as `Claim.update` and `TypedRepository.patch`.
        """
        changes = self._changes(instance, fields)
        version = await self.claim.update(changes)
        self._stored |= changes
        return version

    async def finish(self, instance: Model | None = None, /, **fields: object) -> None:
        """End the claim, with a last change as by `update` in the same commit, if one is given.

        How often the entity was claimed is forgotten.
        """
        is_changed = instance is not None or fields
        await self.claim.finish(self._changes(instance, fields) if is_changed else None)

    def _changes(self, instance: Model | None, fields: dict[str, object]) -> dict[str, object]:
        named = self._typed._named(fields)
        if instance is None:
            return named
        _ = self.instance  # notes what is stored
        changes = self._typed._changes(self._typed._codec.entity(instance))
        return {
            name: value
            for name, value in changes.items()
            if not _is_same(value, self._stored.get(name, REMOVE))
        } | named

    async def delete(self) -> None:
        """As `Claim.delete`."""
        await self.claim.delete()

    async def renew(self, lease: float | None = None) -> None:
        """As `Claim.renew`."""
        await self.claim.renew(lease)

    async def release(self, *, after: float = 0.0) -> None:
        """As `Claim.release`."""
        await self.claim.release(after=after)

    def transaction(self) -> Transaction:
        """As `Claim.transaction`; its `typed(Job)` has the methods with instances."""
        return self.claim.transaction()

    async def __aenter__(self) -> Self:
        await self.claim.__aenter__()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self.claim.__aexit__(*exc_info)


def _is_same(one: object, other: object) -> bool:
    """Whether two values are stored alike: 1, 1.0 and true are not, and NaN is like no other."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[each], other[each]) for each in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return one == other


class TypedCollection(TypedRepository[Model]):
    """The methods of a collection of a store that was declared by `Collection.from_model`.

    Get it by `store.typed(Job)`.
    """

    def __init__(
        self,
        store: WatchedStore,
        model: type[Model],
        claim: Callable[..., Awaitable[list[Claim]]],
    ) -> None:
        super().__init__(store, model)
        self._store = store
        self._claim = claim

    async def claim(
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
        """Claim the first matching instances that nobody holds. See `StorageStrategy.claim_entities`."""
        claimed = await self._claim(
            self._name,
            filters,
            order_by=order_by,
            limit=limit,
            lease=lease,
            owner=owner,
            wait=wait,
            max_attempts=max_attempts,
        )
        return [TypedClaim(each, self) for each in claimed]

    @asynccontextmanager
    async def watch(
        self, filters: Filters = None, *, since: str | None = None
    ) -> AsyncGenerator[TypedChanges[Model], None]:
        """The committed changes of the instances. See `StorageStrategy.watch`."""
        async with self._store.watch(self._name, filters, since=since) as changes:
            yield TypedChanges(changes, self.instance_of)

    async def wait_for(
        self, entity_id: Id, filters: Filters = None, *, timeout: float | None
    ) -> Model:
        """Wait until an instance matches. See `StorageStrategy.wait_for`."""
        return self.instance_of(
            await self._store.wait_for(self._name, id_string(entity_id), filters, timeout=timeout)
        )
