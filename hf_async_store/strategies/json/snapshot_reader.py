"""A snapshot: the store as it was at one moment, while writes continue.

Nothing is copied: while the snapshot is open, each section records the previous value of an entity
that changes. The cost of a snapshot depends on the number of changes, not on the size of the store.
If the dict of a section is replaced as a whole, the snapshot keeps the old dict.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from hf_async_store.changes import Record
from hf_async_store.collector import GatheredObjects
from hf_async_store.event_loop import pause
from hf_async_store.strategies.json.collection_table import CollectionTable
from hf_async_store.strategies.json.serializer import StoredEntity
from hf_async_store.strategies.json.store_state import StoreState
from hf_async_store.table import PastMoment
from hf_async_store.table_reading import TableReader
from hf_async_store.values import Key

_CHUNK_SIZE: Final = 512


class SnapshotReader(TableReader[StoredEntity]):
    """Reads the store as it was when the snapshot was created. The user must close it.

    Args:
        state: the current state.
        names: the collections that are read; None: those that are declared.
    """

    def __init__(self, state: StoreState, names: AbstractSet[str] | None = None) -> None:
        self._sections = {
            name: (section, section.pin())
            for name, section in state.sections.items()
            if (section.declared if names is None else name in names)
        }

    async def close(self) -> None:
        for section, moment in self._sections.values():
            await section.unpin(moment)

    def _table(self, collection: str) -> CollectionTable:
        return self._sections[collection][0]

    def _pin(self, collection: str) -> PastMoment[StoredEntity]:
        return self._sections[collection][1]

    async def _unpin(self, collection: str, moment: PastMoment[StoredEntity]) -> None:
        pass  # by `close`

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        records: list[Record | None] = []
        gathered = GatheredObjects()
        for number, key in enumerate(keys, 1):
            section, moment = self._sections[key.collection]
            stored = moment.get(key.id)
            entity = None if stored is None else section.entity(key.id, stored)
            records.append(None if entity is None else Record(key, entity))
            if not number % _CHUNK_SIZE:
                gathered.add(_CHUNK_SIZE)
                await pause()
        return records
