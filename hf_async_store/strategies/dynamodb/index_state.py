"""What a table remembers of its indexes, in an item that is not an entity.

An index that is made after entities were written lacks those, and the ones of programs that do not know
it, whoever made it. Queries use it once the table remembers that it is complete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.strategies.dynamodb.errors import unreadable
from hf_async_store.unique import Fields
from hf_async_store.values import MAX_KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Set as AbstractSet

    from hf_async_store.strategies.dynamodb.codec import Attributes

STATE_ID: Final = "indexes".ljust(MAX_KEY_BYTES + 64, "-")
"""The key of the item, which is longer than the id of any entity."""

CONTENT: Final = "state"


class Pass(msgspec.Struct, frozen=True):
    """A pass over the table that rewrites the items of other declarations.

    Attributes:
        declaration: the digest of the declaration that it writes.
        complete: it began after the programs that do not know the indexes had ended.
        after: the id of the last item that it has examined.
    """

    declaration: str
    complete: bool
    after: str

    def covers(self, other: Pass) -> bool:
        """Whether what it has done is also done for another pass."""
        return self.declaration == other.declaration and self.complete >= other.complete

    def up_to(self, entity_id: str) -> Pass:
        return msgspec.structs.replace(self, after=entity_id)


class IndexState(msgspec.Struct, frozen=True):
    """What a table remembers.

    Attributes:
        complete: the names of the complete indexes.
        interrupted: the interrupted pass, if any.
        unique: the fields of the unique indexes: every program maintains their markers.
        unmarked: those of them whose values may lack a marker, because entities were there before.
    """

    complete: frozenset[str] = frozenset()
    interrupted: Pass | None = None
    unique: tuple[Fields, ...] = ()
    unmarked: frozenset[Fields] = frozenset()

    def is_enforced(self, fields: Fields) -> bool:
        return fields in self.unique and fields not in self.unmarked

    def with_unique(self, new: Iterable[Fields], *, marked: bool) -> IndexState:
        """The state when programs begin to maintain markers.

        Args:
            marked: the table has no entities without them.
        """
        wanted = dict.fromkeys(new)
        return msgspec.structs.replace(
            self,
            unique=tuple(dict.fromkeys([*self.unique, *wanted])),
            unmarked=self.unmarked - wanted.keys() if marked else self.unmarked | wanted.keys(),
        )

    def without_unique(self, fields: Iterable[Fields]) -> IndexState:
        """The state after the entities were found to have the same values."""
        gone = {*fields}
        return msgspec.structs.replace(
            self,
            unique=tuple(each for each in self.unique if each not in gone),
            unmarked=self.unmarked - gone,
        )

    def without(self, names: AbstractSet[str]) -> IndexState:
        """The state before these indexes are made; a pass that began before cannot complete them."""
        return msgspec.structs.replace(self, complete=self.complete - names, interrupted=None)

    def with_complete(self, names: AbstractSet[str]) -> IndexState:
        """The state after a pass that these indexes preceded."""
        return msgspec.structs.replace(self, complete=self.complete | names, interrupted=None)

    def with_pass(self, interrupted: Pass | None) -> IndexState:
        return msgspec.structs.replace(self, interrupted=interrupted)


def attributes_of(state: IndexState) -> Attributes:
    return {CONTENT: {"S": msgspec.json.encode(state, order="deterministic").decode()}}


def state_of(item: Attributes) -> IndexState:
    """The state in an item.

    Raises:
        CorruptionError: the item was not written by this package.
    """
    try:
        return msgspec.json.decode(item[CONTENT]["S"], type=IndexState)
    except (KeyError, msgspec.MsgspecError) as exc:
        raise unreadable(
            "the table", STATE_ID.rstrip("-"), f"it is not a state of indexes: {exc}"
        ) from exc
