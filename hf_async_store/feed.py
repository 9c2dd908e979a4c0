"""The change feed of a collection, as a watcher reads it: changes, tokens, and the iteration over them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Final, Literal, Self

import msgspec

from hf_async_store.driver import FeedEntry
from hf_async_store.errors import InvalidCursorError, InvalidInputError
from hf_async_store.feed_reading import SharedFeed
from hf_async_store.query import Filter, compile_filter
from hf_async_store.sealed_text import sealed, unsealed
from hf_async_store.values import Entity, copy_entity

_TOKEN_FORMAT: Final = 1
_TOKEN: Final = b"feed"


class EntityChange(msgspec.Struct, frozen=True):
    """One committed change of one entity.

    Attributes:
        kind: "put" if the entity was created or changed, also if it does not match the filter any more;
            "delete".
        id: of the entity.
        version: of the entity; of a deleted one, the last.
        entity: as it was written; None for a delete.
        token: to go on after this change, with `since`.
    """

    kind: Literal["put", "delete"]
    id: str
    version: int
    entity: Entity | None
    token: str


class _Token(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    format: int
    collection: str
    position: str


def token_of(collection: str, position: str) -> str:
    """The token of a position of an engine."""
    token = _Token(_TOKEN_FORMAT, collection, position)
    return sealed(msgspec.json.encode(token), _TOKEN)


def position_in(token: object, collection: str) -> str:
    """The position that a token contains.

    Raises:
        InvalidCursorError: it is no token, was altered, or belongs to another collection.
    """
    body = unsealed(token, _TOKEN, "cursor of a page")
    try:
        found = msgspec.json.decode(body, type=_Token)
    except (msgspec.MsgspecError, UnicodeError) as exc:
        raise InvalidCursorError("invalid token") from exc
    if found.format != _TOKEN_FORMAT:
        raise InvalidCursorError("a token of another version of this package")
    if found.collection != collection:
        raise InvalidCursorError(f"the token of another collection, {found.collection}")
    return found.position


class Changes(AsyncIterator[EntityChange]):
    """The changes of a collection, for one task at a time: see `StorageStrategy.watch`.

    A call that is cancelled loses nothing: the next one returns the same change.

    Args:
        position: what is committed after it is returned.
        where: the filter.
        check: raises if the caller may not use the store.
    """

    def __init__(
        self, feed: SharedFeed, position: str, where: Filter, check: Callable[[], object]
    ) -> None:
        self._feed = feed
        self._position = position
        self._matches = compile_filter(where)
        self._check = check
        self._entries: list[FeedEntry] = []  # read and not returned yet, the next one last
        self._next_position = position  # after these entries
        self._has_ended = False

    @property
    def collection(self) -> str:
        """The collection that is watched."""
        return self._feed.collection

    @property
    def token(self) -> str:
        """To go on after everything that was returned or did not match."""
        return token_of(self.collection, self._position)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EntityChange:
        """The next change; waits for it.

        Raises:
            FeedExpiredError: what follows is not kept any more.
            StoreClosedError: the store was closed.
            TransactionReentryError: it is called inside a transaction of the same task, which may prevent
                the commits that it would wait for.
        """
        while True:
            if self._has_ended:
                raise InvalidInputError("this watch has ended")
            self._check()
            while self._entries:
                entry = self._entries.pop()
                self._position = entry.position if self._entries else self._next_position
                if self._is_wanted(entry):
                    return change_of(entry)
            await asyncio.sleep(0)
            await self._read()

    def _is_wanted(self, entry: FeedEntry) -> bool:
        return any(
            each is not None and self._matches(each.entity) for each in (entry.after, entry.before)
        )

    async def _read(self) -> None:
        """Read the next entries; wait if there are none."""
        feed = self._feed
        if self._position == feed.end:
            self._position = await feed.changed()
            return
        batch, generation = await feed.read(self._position)
        if batch.entries:
            self._entries = batch.entries[::-1]
            self._next_position = batch.position
            return
        self._position = batch.position
        if batch.is_end and await feed.may_wait(batch.position, generation):
            self._position = await feed.changed()

    def end(self) -> None:
        """Return no more changes."""
        self._has_ended = True


def change_of(entry: FeedEntry) -> EntityChange:
    """The change as callers get it, with a copy of the entity."""
    token = token_of(entry.key.collection, entry.position)
    if entry.after is not None:
        entity = copy_entity(entry.after.entity)
        return EntityChange("put", entry.key.id, entry.after.version, entity, token)
    assert entry.before is not None, "an entity that never was is no entry"
    return EntityChange("delete", entry.key.id, entry.before.version, None, token)
