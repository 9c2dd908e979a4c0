"""What this store itself wrote last: the version, token and weight that it left of an entity.

An update that knows them says them, instead of having the server count, weigh and answer: that is
cheaper for both, and can be sent again when its answer is lost. What is known may be wrong, for
others write, too; then the statement's condition fails and nothing was done. For a while after that
nothing is taken as known, so that a store among others does not pay for its guesses.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, NamedTuple

from hf_async_store.strategies.dynamodb.items import SIZE, TOKEN
from hf_async_store.values import VERSION

if TYPE_CHECKING:
    from hf_async_store.strategies.dynamodb.codec import Attributes

_MAX_ENTRIES: Final = 10_000
_WRONG_SECONDS: Final = 60.0


class WriteReceipt(NamedTuple):
    """What a write left."""

    version: int
    token: str
    weight: int

    def seen(self) -> Attributes:
        """The part of the item that tells it."""
        return {
            VERSION: {"N": str(self.version)},
            TOKEN: {"S": self.token},
            SIZE: {"N": str(self.weight)},
        }


class WriteCache:
    """The last writes of a store, by table and id."""

    def __init__(self) -> None:
        self._left: dict[tuple[str, str], WriteReceipt] = {}
        self._wrong_until = 0.0

    def get(self, table: str, entity_id: str) -> WriteReceipt | None:
        left = self._left.get((table, entity_id))
        return None if left is None or time.monotonic() < self._wrong_until else left

    def put(self, table: str, entity_id: str, left: WriteReceipt) -> None:
        place = table, entity_id
        known = self._left.pop(place, None)
        # Answers may come in another order than the writes were done in.
        self._left[place] = left if known is None or known.version < left.version else known
        if len(self._left) > _MAX_ENTRIES:
            del self._left[next(iter(self._left))]

    def drop(self, table: str, entity_id: str) -> None:
        self._left.pop((table, entity_id), None)

    def was_wrong(self) -> None:
        """Others write here: rely on nothing for a while."""
        self._wrong_until = time.monotonic() + _WRONG_SECONDS
