"""Which entities have expired now, by the declarations of one program and its clock.

An expired entity is absent for every method, whatever was removed of it. Reads of a store add a condition
to the query, and leave out what was read by key. A change takes these lifetimes along
(`changes.Change`), because it must be decided at the moment of the write whether the stored entity
exists: see `preconditions.is_there`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Final, TypeAlias

import msgspec

from hf_async_store.errors import ConfigurationError, InvalidInputError, StorageError
from hf_async_store.query import (
    EVERYTHING,
    Comparison,
    Filter,
    Not,
    Query,
    build_query,
    compile_filter,
    conjunction,
    is_timestamp_up_to,
)
from hf_async_store.schema import Collection
from hf_async_store.values import Entity, normalise, parse_timestamp, utc_now

TimeSource: TypeAlias = Callable[[], datetime]

_NEVER: Final = "0"
"""Less than every timestamp."""


class Clock:
    """The time of a store. It never runs backwards.

    Args:
        source: returns the time, with a time zone; None: the clock of the machine.
    """

    def __init__(self, source: TimeSource | None = None) -> None:
        self._source = source
        self._latest = ""

    def now(self) -> str:
        """The time in canonical form."""
        now = utc_now() if self._source is None else self._given(self._source())
        if now < self._latest:
            return self._latest
        self._latest = now
        return now

    def _given(self, time: object) -> str:
        if isinstance(time, datetime) and time.tzinfo is not None:
            canonical = normalise(time)
            if isinstance(canonical, str):
                return canonical
        raise InvalidInputError(f"the clock must return a datetime with a time zone, not {time!r}")


class Lifetime:
    """Which entities of one collection have expired.

    Raises:
        ConfigurationError: the filter of the declaration is malformed.
    """

    def __init__(self, collection: Collection, clock: Clock) -> None:
        assert collection.expires is not None
        self.field = collection.expires.field
        self._after = collection.expires.after
        self._now = clock.now
        self._where = filter_of(collection)
        self._may_expire = compile_filter(self._where)

    def __str__(self) -> str:
        return f"{self.field} {self._after} {self._where}"

    def over(self) -> Filter:
        """The filter that matches the entities that have expired now."""
        expired = Comparison((self.field,), "timestamp_lte", self._latest())
        return expired if self._where == EVERYTHING else conjunction([expired, self._where])

    def is_over(self, entity: Entity) -> bool:
        """Whether an entity has expired now."""
        return is_timestamp_up_to(entity.get(self.field), self._latest()) and self._may_expire(
            entity
        )

    def end(self, entity: Entity) -> str | None:
        """When an entity expires; None if it does not."""
        value = entity.get(self.field)
        if not isinstance(value, str) or not is_timestamp_up_to(value, value):
            return None
        if parse_timestamp(value) is None or not self._may_expire(entity):
            return None
        return _moved(value, self._after)

    def _latest(self) -> str:
        """The latest time of expired entities."""
        now = self._now()
        return now if not self._after else _moved(now, -self._after) or _NEVER


def _moved(time: str, by: timedelta) -> str | None:
    """A time, moved; None if it leaves the years 1 to 9999."""
    try:
        moved = datetime.fromisoformat(time) + by
    except OverflowError:
        return None
    return moved.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def filter_of(collection: Collection) -> Filter:
    """The filter that entities must match to expire.

    Raises:
        ConfigurationError: it is malformed.
    """
    assert collection.expires is not None
    where = collection.expires.where
    try:
        return EVERYTHING if where is None else build_query(collection, filters=where).where
    except StorageError as exc:
        raise ConfigurationError(
            f"collection {collection.name!r}, the filter of its Expire: {exc}"
        ) from exc


class Lifetimes:
    """The lifetimes of a program's collections.

    Args:
        references: whether the store enforces references.

    Attributes:
        deciding: the collections of which a change depends on lifetimes: they expire, or refer to one
            that does.
        children: by collection, the collections that expire and refer to it, each with the field.
    """

    def __init__(
        self, collections: Iterable[Collection], clock: Clock, *, references: bool
    ) -> None:
        declared = list(collections)
        self._of = {
            each.name: Lifetime(each, clock) for each in declared if each.expires is not None
        }
        referring = [(each, field) for each in declared for field in each.references if references]
        self.deciding = frozenset(self._of) | {
            child.name for child, field in referring if field.parent in self._of
        }
        self.children: dict[str, list[tuple[str, str]]] = {}
        for child, field in referring:
            if child.name in self._of:
                self.children.setdefault(field.parent, []).append((child.name, field.name))

    def __bool__(self) -> bool:
        return bool(self._of)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __contains__(self, collection: object) -> bool:
        return collection in self._of

    def of(self, collection: str) -> Lifetime | None:
        """The lifetime of the entities of a collection; None if they do not expire."""
        return self._of.get(collection)

    def is_over(self, collection: str, entity: Entity) -> bool:
        """Whether an entity of a collection has expired now."""
        lifetime = self._of.get(collection)
        return lifetime is not None and lifetime.is_over(entity)

    def living(self, query: Query) -> Query:
        """The query without the entities that have expired now."""
        lifetime = self._of.get(query.collection)
        if lifetime is None:
            return query
        where = conjunction([query.where, Not(lifetime.over())])
        return msgspec.structs.replace(query, where=where)

    def expired(self, query: Query) -> Query:
        """The query for the entities that have expired now, of a collection of which they do."""
        where = conjunction([query.where, self._of[query.collection].over()])
        return msgspec.structs.replace(query, where=where)
