"""Records, preconditions and changes: the data exchanged with engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from hf_async_store.errors import InvalidVersionError, StorageError
from hf_async_store.field_operations import FieldUpdate
from hf_async_store.lifetimes import Lifetimes
from hf_async_store.values import INT_MAX, Entity, Key, version_of

_decode: Final[Callable[[bytes], Any]] = msgspec.json.Decoder().decode


class Record(msgspec.Struct, frozen=True, gc=False):
    """A stored entity. `entity` is the receiver's own copy and includes `version`."""

    key: Key
    entity: Entity

    @property
    def version(self) -> int:
        return version_of(self.entity)


class Expect(Enum):
    """A precondition on the stored entity, other than an exact version."""

    # The values cannot be stored, so that an ABSENT in a filter is rejected and not converted to a
    # string.
    ANY = object()
    ABSENT = object()
    PRESENT = object()

    def __repr__(self) -> str:
        return self.name


ANY: Final = Expect.ANY
ABSENT: Final = Expect.ABSENT
"""As `expected_version`: the entity must not exist."""
PRESENT: Final = Expect.PRESENT

Precondition: TypeAlias = Expect | int


def check_version(expected: object, *, absent: bool) -> Precondition:
    """The precondition for the `expected_version` argument of a caller.

    Raises:
        InvalidVersionError: it is not a non-negative integer, ABSENT (where `absent` allows it) or
            ANY, which means that the argument was omitted.
    """
    if expected is ANY or (absent and expected is ABSENT):
        return expected
    if type(expected) is int and 0 <= expected <= INT_MAX:
        return expected
    allowed = "a non-negative integer" + (" or ABSENT" if absent else "")
    raise InvalidVersionError(f"expected_version must be {allowed}, not {expected!r}")


class ChangeMarker(msgspec.Struct, frozen=True):
    """A small record that is written in the same commit as its change, for live migration."""

    key: Key
    entity: Entity


class Put(msgspec.Struct, frozen=True, gc=False):
    """Insert or replace a whole entity.

    Attributes:
        entity: portable and validated, without `version`. If `created_at` is missing in it, a new
            entity gets `written_at`, and an existing one keeps its `created_at`, or has none if it
            had none.
        written_at: the time of this change, in canonical form.
        expect: the precondition on the stored entity.
        import_version: for imports: the version to store. Then `entity` is stored exactly as given,
            with or without `created_at`.
        mark: during a live migration: the change marker to write in the same commit.
        lifetimes: by which stored entities have expired, also the parents; None if that does not matter.
        shared: it is several changes in one, with `import_version` as that of the last; see
            `Engine.shares_changes`.
    """

    key: Key
    entity: Entity
    written_at: str
    expect: Precondition = ANY
    import_version: int | None = None
    mark: ChangeMarker | None = None
    lifetimes: Lifetimes | None = None
    shared: bool = False


class PutForm(msgspec.Struct, frozen=True, eq=False):
    """What several `EncodedPut`s have in common.

    Attributes:
        end: the end of their JSON, which replaces the last brace of `text`: the fields that the store sets.
        has_created_at: whether the entities contain `created_at`.
        parents: by referencing field, the ids that the entities contain, and perhaps others.
    """

    end: bytes
    has_created_at: bool
    parents: Mapping[str, AbstractSet[str]]


class EncodedPut(Put, frozen=True, gc=False):
    """A `Put` of a batch, for an engine that stores JSON (`Engine.takes_encoded`).

    The field `entity` of the base is not used: it is decoded for those who ask for it.

    Attributes:
        text: the JSON of the entity, without the fields in `form.end`.
    """

    text: bytes = b"{}"
    form: PutForm = PutForm(b"}", has_created_at=False, parents={})

    @property  # type: ignore[misc]  # a field of the base, which so costs others nothing
    def entity(self) -> Entity:
        entity: Entity = _decode(self.text[:-1] + self.form.end)
        return entity


class Patch(msgspec.Struct, frozen=True, gc=False):
    """Change the given top-level fields of an existing entity; REMOVE deletes a field.

    A `FieldChange` computes the new value of a field from the stored one. `preconditions.patched` applies
    all of them; `field_operations.plain_fields` tells whether there is any.
    """

    key: Key
    fields: dict[str, FieldUpdate]
    written_at: str
    expect: Precondition = PRESENT
    mark: ChangeMarker | None = None
    lifetimes: Lifetimes | None = None


class Delete(msgspec.Struct, frozen=True, gc=False):
    """Delete an entity. The outcome is the version that it had, or None if it did not exist.

    Attributes:
        purge: remove an entity that has expired, for which other changes are as if it were absent. If it
            has not, the outcome is a conflict.
    """

    key: Key
    expect: Precondition = ANY
    mark: ChangeMarker | None = None
    lifetimes: Lifetimes | None = None
    purge: bool = False


Change: TypeAlias = Put | Patch | Delete
Outcome: TypeAlias = int | None | StorageError
"""The new version (of a Delete: the old one, or None), or the error of that change."""


def decoded(change: Change) -> Change:
    """The change, as a plain `Put` if it is an `EncodedPut`."""
    if not isinstance(change, EncodedPut):
        return change
    return Put(*[getattr(change, name) for name in Put.__struct_fields__])


TakeChanges: TypeAlias = Callable[[], Sequence[Change]]
"""Returns the changes to apply; see `Engine.write_unblocked`."""


class ChangedMatches(NamedTuple):
    """The result of `Engine.change_matches`.

    Attributes:
        keys: of the entities that matched.
        entities: as they were read: at least their keys and versions, and the fields of the query.
        outcomes: of the change of each of them.
    """

    keys: list[Key]
    entities: list[Entity]
    outcomes: list[Outcome]
