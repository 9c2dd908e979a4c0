"""A cache of the last writes of this store: version, token and size bound of each entity.

An update whose entity is in the cache sends the new version and size, with the token as a condition,
instead of having the server compute and return them. That is cheaper for both, and can be retried if
no response is received. An entry is stale if another process has written the entity; then the
condition of the statement fails, and nothing is written. After that the cache is not used for a while,
so that a store with other concurrent writers does not pay for stale entries.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.strategies.dynamodb.items import SIZE, TOKEN
from hf_async_store.values import VERSION

if TYPE_CHECKING:
    from hf_async_store.strategies.dynamodb.codec import Attributes

_MAX_ENTRIES: Final = 10_000
_DISABLED_SECONDS: Final = 60.0


class WriteReceipt(msgspec.Struct, frozen=True, gc=False):
    """The state of an entity after a write. The garbage collector would traverse 10,000 named tuples.

    Attributes:
        is_claimed: whether the item has a claim; None: the write did not tell.
    """

    version: int
    token: str
    size: int
    is_claimed: bool | None = None

    def as_attributes(self) -> Attributes:
        """This state as attributes of an item."""
        return {
            VERSION: {"N": str(self.version)},
            TOKEN: {"S": self.token},
            SIZE: {"N": str(self.size)},
        }


class WriteCache:
    """The last writes of a store, by table and id."""

    def __init__(self) -> None:
        self._receipts: dict[tuple[str, str], WriteReceipt] = {}
        self._disabled_until = 0.0

    def get(self, table: str, entity_id: str) -> WriteReceipt | None:
        receipt = self._receipts.get((table, entity_id))
        return None if receipt is None or time.monotonic() < self._disabled_until else receipt

    def put(self, table: str, entity_id: str, receipt: WriteReceipt) -> None:
        key = table, entity_id
        known = self._receipts.pop(key, None)
        if known is not None:
            # The order of the responses may differ from the order in which the writes were applied.
            if known.version >= receipt.version:
                receipt = known
            elif receipt.is_claimed is None:
                receipt = msgspec.structs.replace(receipt, is_claimed=known.is_claimed)
        self._receipts[key] = receipt
        if len(self._receipts) > _MAX_ENTRIES:
            del self._receipts[next(iter(self._receipts))]

    def drop(self, table: str, entity_id: str) -> None:
        self._receipts.pop((table, entity_id), None)

    def report_stale_entry(self) -> None:
        """An entry was stale: do not use the cache for a while."""
        self._disabled_until = time.monotonic() + _DISABLED_SECONDS
