"""What passes between the shared layers and an engine: keys, records, preconditions and changes."""

from __future__ import annotations

from enum import Enum
from typing import Final, TypeAlias, cast

import msgspec

from hf_async_store.errors import (
    InvalidVersionError,
    StorageError,
)
from hf_async_store.values import INT_MAX, VERSION, Entity, Key, Removed, Value


class Record(msgspec.Struct, frozen=True, gc=False):
    """An entity as it is stored. `entity` is the receiver's own copy, `version` in it."""

    key: Key
    entity: Entity

    @property
    def version(self) -> int:
        return cast("int", self.entity[VERSION])


class Expect(Enum):
    """A condition on what is stored, other than an exact version."""

    # Values that no entity can hold: an ABSENT in a filter must not turn into the text "absent".
    ANY = object()
    ABSENT = object()
    PRESENT = object()

    def __repr__(self) -> str:
        return self.name


ANY: Final = Expect.ANY
ABSENT: Final = Expect.ABSENT
"""As `expected_version`: the entity must not be there."""
PRESENT: Final = Expect.PRESENT

Precondition: TypeAlias = Expect | int


def check_version(expected: object, *, absent: bool) -> Precondition:
    """The condition of an `expected_version` as a caller gives it.

    Raises:
        InvalidVersionError: anything but an integer from 0 on, ABSENT (where `absent` allows it),
            or ANY, which stands for "left out".
    """
    if expected is ANY or (absent and expected is ABSENT):
        return cast("Expect", expected)
    if type(expected) is int and 0 <= expected <= INT_MAX:
        return expected
    allowed = "an integer from 0 on" + (" or ABSENT" if absent else "")
    raise InvalidVersionError(f"expected_version is {allowed}, not {expected!r}")


class ChangeMarker(msgspec.Struct, frozen=True):
    """A small record written in the same commit as its change (live migration needs it)."""

    key: Key
    entity: Entity


class Put(msgspec.Struct, frozen=True, gc=False):
    """Insert or replace a whole entity.

    Attributes:
        entity: portable and checked, without `version`. Without `created_at`, what is stored is
            kept, be it missing, and a new entity gets `at`.
        at: the clock's time of this verb, in the fixed form.
        version: for imports: the version to write as given; `created_at` is then as given too.
    """

    key: Key
    entity: Entity
    written_at: str
    expect: Precondition = ANY
    import_version: int | None = None
    mark: ChangeMarker | None = None


class Patch(msgspec.Struct, frozen=True, gc=False):
    """Change the named top-level fields of an entity that is there; REMOVED takes one away."""

    key: Key
    fields: dict[str, Value | Removed]
    written_at: str
    expect: Precondition = PRESENT
    mark: ChangeMarker | None = None


class Delete(msgspec.Struct, frozen=True, gc=False):
    """Take an entity away. Its outcome is the version that it had, or None if it was not there."""

    key: Key
    expect: Precondition = ANY
    mark: ChangeMarker | None = None


Change: TypeAlias = Put | Patch | Delete
Outcome: TypeAlias = int | None | StorageError
"""The new version (for a Delete the old one, None if there was none), or the error of that change."""
