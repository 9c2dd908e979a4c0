"""Unique indexes: the digest that stands for the values of their fields, and the owners of values.

An entity in which one of the fields is missing or null has no digest, and does not count. Values with the
same digest are `eq`: 1 and 1.0 are the same value, true is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Final, TypeAlias

from hf_async_store.errors import InvalidFieldError, SchemaMismatchError, UniqueViolationError
from hf_async_store.schema import MAX_UNIQUE_BYTES
from hf_async_store.sort_bytes import sort_bytes
from hf_async_store.values import Entity, Key, Value

Fields: TypeAlias = "tuple[str, ...]"
"""The fields of a unique index, which identify it within its collection."""

_DIGEST_BYTES: Final = 20


def digest(entity: Mapping[str, Value], fields: Fields, collection: str) -> bytes | None:
    """What stands for the values of fields; None if one of them is missing or null.

    Raises:
        InvalidFieldError: a value is a long text, a list or a dict, which a unique index cannot contain.
    """
    encoded: list[bytes] = []
    for name in fields:
        value = entity.get(name)
        if value is None:
            return None
        encoded.append(_encoded(value, f"{collection}.{name}"))
    return blake2b(b"\x00".join(encoded), digest_size=_DIGEST_BYTES).digest()


def _encoded(value: Value, name: str) -> bytes:
    if isinstance(value, str):
        text = value.encode()
        if len(text) <= MAX_UNIQUE_BYTES:
            return b"s" + text  # it contains no byte 0
        raise InvalidFieldError(
            f"{name} is in a unique index: its text has at most {MAX_UNIQUE_BYTES:,} bytes, not "
            f"{len(text):,}"
        )
    if isinstance(value, list | dict):
        raise InvalidFieldError(
            f"{name} is in a unique index, which contains no lists and no dicts"
        )
    return b"v" + sort_bytes(value).hex().encode()


def stored_digest(entity: Mapping[str, Value], fields: Fields) -> bytes | None:
    """As `digest`, of an entity that was stored before the index; None if a value cannot be contained."""
    try:
        return digest(entity, fields, "")
    except InvalidFieldError:
        return None


def violation(key: Key, fields: Fields, owner: str) -> UniqueViolationError:
    """The error for an entity whose values belong to another one."""
    return UniqueViolationError(key.collection, key.id, fields, owner)


def claimed(
    collection: str, unique: Iterable[Fields], before: Entity | None, after: Entity
) -> Iterator[tuple[Fields, bytes]]:
    """The values that an entity gets by a change: the indexes, each with a digest.

    Raises:
        InvalidFieldError: as `digest`.
    """
    for fields in unique:
        if before is not None and all(before.get(each) is after.get(each) for each in fields):
            continue
        new = digest(after, fields, collection)
        if new is not None and (before is None or stored_digest(before, fields) != new):
            yield fields, new


class Claims:
    """The values that the uncommitted changes of a session give to entities.

    A rollback need not be recorded: each claim is compared with the entity as it is now.

    Args:
        current: the entity of a key as this session sees it.
        owners: the ids of the committed entities that may have a value.
    """

    def __init__(
        self,
        current: Callable[[Key], Entity | None],
        owners: Callable[[str, Fields, bytes], Iterable[str]],
    ) -> None:
        self._current = current
        self._owners = owners
        self._claimed: dict[tuple[str, Fields, bytes], list[str]] = {}

    def check(
        self,
        key: Key,
        wanted: Sequence[tuple[Fields, bytes]],
        is_there: Callable[[Key, Entity], bool],
    ) -> None:
        """Refuse values that belong to another entity, and record those that do not.

        Args:
            is_there: whether a stored entity exists for the change; one that has expired does not.

        Raises:
            UniqueViolationError.
        """
        for fields, new in wanted:
            claims = self._claimed.get((key.collection, fields, new), ())
            for each in (*claims, *self._owners(key.collection, fields, new)):
                other = Key(key.collection, each)
                entity = None if each == key.id else self._current(other)
                if entity is None or stored_digest(entity, fields) != new:
                    continue
                if is_there(other, entity):
                    raise violation(key, fields, each)
        for fields, new in wanted:
            self._claimed.setdefault((key.collection, fields, new), []).append(key.id)


class Owners:
    """The owners of all values of one unique index, by digest.

    A value has several owners if those before the last one have expired for the programs that wrote the
    others, until they are removed.
    """

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.ids: dict[bytes, str] = {}
        self._others: dict[bytes, list[str]] = {}

    def of(self, value: bytes) -> list[str]:
        """The ids of the entities that have a value."""
        owner = self.ids.get(value)
        return [] if owner is None else [owner, *self._others.get(value, ())]

    def replace(
        self, entity_id: str, before: Mapping[str, Value] | None, after: Mapping[str, Value] | None
    ) -> None:
        """Follow the change of an entity."""
        old = None if before is None else stored_digest(before, self.fields)
        new = None if after is None else stored_digest(after, self.fields)
        if old == new:
            return
        if old is not None:
            self._remove(old, entity_id)
        if new is not None and self.ids.setdefault(new, entity_id) != entity_id:
            self._others.setdefault(new, []).append(entity_id)

    def _remove(self, value: bytes, entity_id: str) -> None:
        left = [each for each in self.of(value) if each != entity_id]
        self.ids.pop(value, None)
        self._others.pop(value, None)
        if left:
            self.ids[value] = left[0]
        if len(left) > 1:
            self._others[value] = left[1:]

    def claim(self, key: Key, entity: Entity) -> None:
        """Add an entity.

        Raises:
            UniqueViolationError: another one has the same values.
            InvalidFieldError: it has values that a unique index cannot contain.
        """
        new = digest(entity, self.fields, key.collection)
        owner = key.id if new is None else self.ids.setdefault(new, key.id)
        if owner != key.id:
            raise violation(key, self.fields, owner)

    def add(self, key: Key, entity: Entity) -> None:
        """As `claim`, of an entity that was stored before the index.

        Raises:
            SchemaMismatchError: the entities cannot have a unique index.
        """
        try:
            self.claim(key, entity)
        except (InvalidFieldError, UniqueViolationError) as exc:
            raise cannot_be_unique(self.fields, exc) from exc


def cannot_be_unique(fields: Fields, reason: object) -> SchemaMismatchError:
    """The error for stored entities that prevent a unique index."""
    return SchemaMismatchError(
        f"nothing was changed: the index of {', '.join(fields)} cannot be unique: {reason}"
    )
