"""Positions in the change feed of a collection: a stream, and how far each of its shards was read.

A shard is a part of a stream that contains all changes of some items for a while. When it ends, others
continue it, its children. So a position names the shards that are read at the same time.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from hf_async_store.errors import InvalidCursorError

_SHARD: Final = re.compile(r"[A-Za-z0-9-]{1,65}\Z")
_NUMBER: Final = re.compile(r"[0-9]{0,40}\Z")


class Mark(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A place in a shard.

    Attributes:
        number: a sequence number; "" for the beginning of the shard.
        is_next: the record with this number is the next one; else it is the last one before.
        since: skip records that were made before, in seconds since 1970; 0: none.
        iterator: an iterator for this place, or "". It is exact, but soon expires.
    """

    number: str = ""
    is_next: bool = False
    since: float = 0.0
    iterator: str = ""


class Position(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A place in a stream.

    Attributes:
        stream: its ARN.
        shards: the marks of the shards by their ids.
    """

    stream: str
    shards: dict[str, Mark]

    @property
    def table(self) -> str:
        """The ARN of the table."""
        return table_of(self.stream)

    def text(self) -> str:
        return msgspec.json.encode(self).decode()


def table_of(stream: str) -> str:
    """The ARN of the table of a stream."""
    return stream.rpartition("/stream/")[0]


def position_in(text: str) -> Position:
    """The position in a text.

    Raises:
        InvalidCursorError: it contains none.
    """
    try:
        position = msgspec.json.decode(text, type=Position)
    except (msgspec.MsgspecError, UnicodeError) as exc:
        raise invalid_position() from exc
    if not position.shards or not all(map(_is_valid, position.shards.items())):
        raise invalid_position()
    return position


def _is_valid(shard: tuple[str, Mark]) -> bool:
    name, mark = shard
    return bool(_SHARD.match(name) and _NUMBER.match(mark.number))


def invalid_position() -> InvalidCursorError:
    return InvalidCursorError("this is not a position of the change feed of this collection")
