"""The blocking store on JSON files."""

from __future__ import annotations

from pathlib import Path

from hf_async_store.strategies.json import JSONStorageStrategy
from hf_async_store.sync.calls import blocking, entering
from hf_async_store.sync.store import Store


class JSONStore(Store):
    """As `JSONStorageStrategy`. A lock belongs to the thread that acquired it."""

    _target: JSONStorageStrategy

    def __init__(self, store: JSONStorageStrategy) -> None:
        super().__init__(store)

    acquire_read_lock = entering(JSONStorageStrategy.acquire_read_lock)
    acquire_write_lock = entering(JSONStorageStrategy.acquire_write_lock)
    read_file = blocking(JSONStorageStrategy.read_file)
    write_file = blocking(JSONStorageStrategy.write_file)
    checkpoint = blocking(JSONStorageStrategy.checkpoint)

    def backups(self) -> list[Path]:
        """As `JSONStorageStrategy.backups`."""
        return self._target.backups()
