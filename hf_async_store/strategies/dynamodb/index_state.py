"""What a table remembers of its indexes, in an item that is not an entity.

An index that is made after its table lacks entities: those that were written before it was declared, and
those of programs that do not know it. Queries use it once it is complete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.strategies.dynamodb.errors import unreadable
from hf_async_store.values import MAX_KEY_BYTES

if TYPE_CHECKING:
    from hf_async_store.strategies.dynamodb.codec import Attributes

STATE_ID: Final = "indexes".ljust(MAX_KEY_BYTES + 64, "-")
"""The key of the item, which is longer than the id of any entity."""

_CONTENT: Final = "state"


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


class IndexState(msgspec.Struct, frozen=True):
    """The names of the incomplete indexes, and the interrupted pass, if any."""

    incomplete: frozenset[str] = frozenset()
    interrupted: Pass | None = None

    def with_incomplete(self, name: str) -> IndexState:
        # A pass that began before cannot complete this index.
        return IndexState(self.incomplete | {name})


def attributes_of(state: IndexState) -> Attributes:
    return {_CONTENT: {"S": msgspec.json.encode(state).decode()}}


def state_of(item: Attributes) -> IndexState:
    """The state in an item.

    Raises:
        CorruptionError: the item was not written by this package.
    """
    try:
        return msgspec.json.decode(item[_CONTENT]["S"], type=IndexState)
    except (KeyError, msgspec.MsgspecError) as exc:
        raise unreadable(
            "the table", STATE_ID.rstrip("-"), f"it is not a state of indexes: {exc}"
        ) from exc
