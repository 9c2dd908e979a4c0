"""py-key-value-aio over hf_async_store: its interface, and so every library that takes it, on each engine.

    async with EntityKeyValueStore("sqlite:cache.db") as values:
        await values.put("ada", {"visits": 1}, collection="sessions", ttl=3600)

A value is kept as the JSON text that py-key-value makes of it, so that it comes back as from every other of
its stores. Its collections are names in a field: they need no declaration.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from typing import Final

from key_value.aio._utils.managed_entry import load_from_json
from key_value.aio.errors import SerializationError
from key_value.aio.stores.base import (
    BaseContextManagerStore,
    BaseCullStore,
    BaseDestroyCollectionStore,
    BaseDestroyStore,
    BaseEnumerateCollectionsStore,
    BaseEnumerateKeysStore,
    ManagedEntry,
)

from hf_async_store import (
    Collection,
    Entity,
    Expire,
    Field,
    StorageStrategy,
    UnsupportedValueError,
    open_store,
)

ENTRIES: Final = "key_value_entries"
COLLECTIONS: Final = (
    Collection(
        ENTRIES,
        key="entry_id",
        fields=["collection", "key", "value", Field("expires_at", "timestamp")],
        indexes=["collection", "expires_at"],
        expires=Expire("expires_at"),
    ),
)


class EntityKeyValueStore(
    BaseEnumerateCollectionsStore,
    BaseEnumerateKeysStore,
    BaseDestroyCollectionStore,
    BaseDestroyStore,
    BaseCullStore,
    BaseContextManagerStore,
):
    """A store of py-key-value.

    Args:
        store: the URL of a store, which is opened by the first call and closed with this one; or an open
            store that declares `COLLECTIONS`, which is left open.
        default_collection: the collection of calls that name none.
    """

    def __init__(
        self, store: str | StorageStrategy, *, default_collection: str | None = None
    ) -> None:
        given = None if isinstance(store, str) else store
        self._store = given or open_store(str(store), collections=COLLECTIONS)
        super().__init__(
            default_collection=default_collection,
            client_provided_by_user=given is not None,
            stable_api=True,
        )

    async def _setup(self) -> None:
        if not self._client_provided_by_user:
            await self._exit_stack.enter_async_context(self._store)

    async def _get_managed_entry(self, *, collection: str, key: str) -> ManagedEntry | None:
        return _entry(await self._store.get_entity(ENTRIES, _id(collection, key)))

    async def _get_managed_entries(
        self, *, collection: str, keys: Sequence[str]
    ) -> list[ManagedEntry | None]:
        ids = [_id(collection, key) for key in keys]
        return list(map(_entry, await self._store.get_entities(ENTRIES, ids)))

    async def _put_managed_entry(
        self, *, collection: str, key: str, managed_entry: ManagedEntry
    ) -> None:
        try:
            await self._store.save_entity(ENTRIES, _entity(collection, key, managed_entry))
        except UnsupportedValueError as exc:
            raise SerializationError(str(exc)) from exc

    async def _put_managed_entries(
        self,
        *,
        collection: str,
        keys: Sequence[str],
        managed_entries: Sequence[ManagedEntry],
        ttl: float | None,
        created_at: datetime,
        expires_at: datetime | None,
    ) -> None:
        entries = zip(keys, managed_entries, strict=True)
        try:
            await self._store.save_entities(
                ENTRIES, [_entity(collection, key, entry) for key, entry in entries]
            )
        except UnsupportedValueError as exc:
            raise SerializationError(str(exc)) from exc

    async def _delete_managed_entry(self, *, key: str, collection: str) -> bool:
        return await self._store.delete_entity(ENTRIES, _id(collection, key))

    async def _delete_managed_entries(self, *, keys: Sequence[str], collection: str) -> int:
        ids = [_id(collection, key) for key in keys]
        return sum(await self._store.delete_entities(ENTRIES, ids))

    async def _get_collection_keys(self, *, collection: str, limit: int | None = None) -> list[str]:
        found = await self._store.query_entities(
            ENTRIES, {"collection": collection}, fields=["key"], limit=limit
        )
        return [str(each["key"]) for each in found]

    async def _get_collection_names(self, *, limit: int | None = None) -> list[str]:
        return [str(name) for name, _ in await self._store.count_by(ENTRIES, "collection")][:limit]

    async def _delete_collection(self, *, collection: str) -> bool:
        return await self._store.delete_where(ENTRIES, {"collection": collection}) > 0

    async def _delete_store(self) -> bool:
        return await self._store.delete_where(ENTRIES, {}) > 0

    async def _cull(self) -> None:
        await self._store.purge_expired(ENTRIES)


def _id(collection: str, key: str) -> str:
    """Keys of py-key-value may be longer than an id."""
    return sha256(f"{len(collection)}:{collection}{key}".encode()).hexdigest()


def _entity(collection: str, key: str, entry: ManagedEntry) -> dict[str, object]:
    return {
        "entry_id": _id(collection, key),
        "collection": collection,
        "key": key,
        "value": entry.value_as_json,
        "expires_at": entry.expires_at,
    }


def _entry(entity: Entity | None) -> ManagedEntry | None:
    if entity is None:
        return None
    expires_at = entity["expires_at"]
    return ManagedEntry(
        value=load_from_json(str(entity["value"])),
        created_at=datetime.fromisoformat(str(entity["created_at"])),
        expires_at=None if expires_at is None else datetime.fromisoformat(str(expires_at)),
    )
