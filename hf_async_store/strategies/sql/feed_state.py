"""The state of the change feed of a collection: what identifies it, and what it contains no longer.

It is a row of the catalogue, `feed:NAME`. A place in the feed is a number: on SQLite that of a change, on
PostgreSQL that of a transaction.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias, TypeVar

import msgspec

from hf_async_store.errors import CorruptionError, FeedExpiredError, InvalidCursorError
from hf_async_store.strategies.sql.names import Names, quoted

Position = TypeVar("Position")

Integer: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""An integer that the databases accept, in a position, which anybody may have written."""

STEPS: Final = 16
"""Changes are kept for the retention, and at most by one of so many parts of it longer."""


class Horizon(msgspec.Struct, frozen=True, array_like=True):
    """The end of what was deleted from a feed.

    Attributes:
        place: the last place of which a change was deleted; 0: none was.
        number: the greatest number of a deleted change.
        mark: that of a change at the last place: see the positions of the engines.
    """

    place: int = 0
    number: int = 0
    mark: int = 0


class FeedState(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of the feed of one collection.

    Attributes:
        epoch: a random identity; a new one means that positions of earlier ones cannot be continued.
        home: on PostgreSQL: the identity of the server, and of the table. A copy has another one.
        horizon: the changes up to there were deleted.
        marks: times, in seconds, each with a place before which every transaction had ended by then.
    """

    epoch: str
    home: str = ""
    horizon: Horizon = Horizon()
    marks: tuple[tuple[float, int], ...] = ()

    def marked(self, now: float, place: int, retention: float) -> FeedState:
        """With a mark for the present if the last one is old enough, and without those not needed."""
        marks = self.marks
        if not marks or not marks[-1][0] <= now < marks[-1][0] + retention / STEPS:
            marks = (*(each for each in marks if each[0] <= now), (now, place))
        old = [each for each in marks if each[0] <= now - retention]
        return msgspec.structs.replace(self, marks=marks[max(len(old) - 1, 0) :])

    def expired_before(self, now: float, retention: float) -> int:
        """The place before which changes have been kept long enough; 0 if there is none."""
        return max((place for time, place in self.marks if time <= now - retention), default=0)


def state_name(collection: str) -> str:
    """The name of the row of the catalogue."""
    return f"feed:{collection}"


def state_sql(names: Names, collection: str) -> str:
    """The expression that reads the row in a SELECT."""
    table = quoted(names.catalogue)
    return f"(SELECT c.value FROM {table} AS c WHERE c.name = '{state_name(collection)}')"


def decoded_state(value: object, collection: str) -> FeedState:
    """The state from its row.

    Raises:
        CorruptionError: the row is missing or damaged.
    """
    try:
        return msgspec.json.decode(value if isinstance(value, str) else "", type=FeedState)
    except msgspec.DecodeError as exc:
        raise CorruptionError(
            f"the catalogue does not describe the change feed of {collection}: restore it from a backup"
        ) from exc


def encoded_state(state: FeedState) -> str:
    """The row of a state."""
    return msgspec.json.encode(state).decode()


def decoded_position(text: str, kind: type[Position]) -> Position:
    """A position from its text.

    Raises:
        InvalidCursorError: it is malformed.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeEncodeError) as exc:
        raise InvalidCursorError("invalid position in a change feed") from exc


def expired(collection: str) -> FeedExpiredError:
    """The error for changes that are not kept any more."""
    return FeedExpiredError(
        f"the changes of {collection} after this position are not kept any more, or the store was restored "
        "from a copy since"
    )


def foreign(collection: str) -> InvalidCursorError:
    """The error for a position of another store or collection."""
    return InvalidCursorError(
        f"this is not a position in the change feed of {collection} of this store"
    )
