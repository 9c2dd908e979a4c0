"""`limits` over hf_async_store: rate limits that all processes of a store share, with all its strategies.

    async with open_store("sqlite:limits.db?synchronous=NORMAL", collections=COLLECTIONS) as store:
        limiter = MovingWindowRateLimiter(EntityStorage(store=store))
        await limiter.hit(parse("10/minute"), "ada")

A counter is an entity with an `increment`. The moving window of a key is one entity with the times of its
hits, changed by compare-and-set. Both expire. As hits need not survive a power failure, a store of their
own need not wait for the disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from hashlib import sha256
from math import floor
from typing import Final, cast

from limits.aio.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage
from limits.storage.base import TimestampedSlidingWindow

from hf_async_store import (
    AlreadyExistsError,
    Collection,
    Entity,
    EntityNotFoundError,
    Expire,
    Field,
    StorageError,
    StorageStrategy,
    increment,
)

COUNTERS: Final = "rate_limit_counters"
WINDOWS: Final = "rate_limit_windows"
_EXPIRES: Final = Field("expires_at", "timestamp", required=True)
COLLECTIONS: Final = (
    Collection(
        COUNTERS,
        key="limit_key",
        fields=[Field("hits", "integer", required=True), _EXPIRES],
        indexes=["expires_at"],
        expires=Expire("expires_at"),
    ),
    Collection(
        WINDOWS,
        key="limit_key",
        fields=[Field("hits", "json"), _EXPIRES],
        indexes=["expires_at"],
        expires=Expire("expires_at"),
    ),
)


class _FullError(Exception):
    """The window holds as many hits as it may."""


class EntityStorage(
    Storage, MovingWindowSupport, SlidingWindowCounterSupport, TimestampedSlidingWindow
):
    """A storage of `limits`, on an open store that declares `COLLECTIONS`.

    Args:
        store: who opened it closes it.
        uri, wrap_exceptions: as of every storage of `limits`.
    """

    STORAGE_SCHEME = ["async+hf-async-store"]  # noqa: RUF012  # as `limits` declares it

    def __init__(
        self, uri: str | None = None, wrap_exceptions: bool = False, *, store: StorageStrategy
    ) -> None:
        super().__init__(uri, wrap_exceptions=wrap_exceptions)
        self._store = store

    @property
    def base_exceptions(self) -> type[Exception]:
        return StorageError

    # -- counters ----------------------------------------------------------------------------

    async def incr(self, key: str, expiry: float, amount: int = 1, *, is_new: bool = False) -> int:
        """
        Args:
            is_new: the counter was missing a moment ago.
        """
        while True:
            try:
                if is_new:
                    counter = {"limit_key": _id(key), "hits": amount}
                    end = _at(time.time() + expiry)
                    await self._store.create_entity(COUNTERS, {**counter, "expires_at": end})
                    return amount
                counted = {"hits": increment(amount)}
                return _hits(
                    await self._store.update_entity(COUNTERS, _id(key), counted, returning=True)
                )
            except (AlreadyExistsError, EntityNotFoundError):
                is_new = not is_new

    async def get(self, key: str) -> int:
        return _hits(await self._store.get_entity(COUNTERS, _id(key)))

    async def get_expiry(self, key: str) -> float:
        counter = await self._store.get_entity(COUNTERS, _id(key))
        if counter is None:
            return time.time()
        return datetime.fromisoformat(str(counter["expires_at"])).timestamp()

    async def clear(self, key: str) -> None:
        for each in COLLECTIONS:
            await self._store.delete_entity(each.name, _id(key))

    async def reset(self) -> int | None:
        return sum([await self._store.delete_where(each.name, {}) for each in COLLECTIONS])

    async def check(self) -> bool:
        try:
            await self._store.test_connection()
        except StorageError:
            return False
        return True

    # -- moving windows ----------------------------------------------------------------------

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        def hit(window: Entity) -> dict[str, object]:
            now = time.time()
            recent = _since(now - expiry, window)
            if sum(count for _, count in recent) + amount > limit:
                raise _FullError
            return {**window, "hits": [(now, amount), *recent], "expires_at": _at(now + expiry)}

        try:
            new = {"expires_at": _at(time.time())}
            await self._store.modify_entity(WINDOWS, _id(key), hit, default=new)
        except _FullError:
            return False
        return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        now = time.time()
        recent = _since(now - expiry, await self._store.get_entity(WINDOWS, _id(key)))
        return (recent[-1][0], sum(count for _, count in recent)) if recent else (now, 0)

    # -- sliding windows ---------------------------------------------------------------------

    async def acquire_sliding_window_entry(
        self, key: str, limit: int, expiry: int, amount: int = 1
    ) -> bool:
        (_, current), (before, hits), left = await self._windows(key, expiry)
        weight = _hits(before) * left / expiry
        if amount > limit or floor(weight + _hits(hits)) + amount > limit:
            return False
        counted = await self.incr(current, 2 * expiry, amount, is_new=hits is None)
        if floor(weight + counted) <= limit:
            return True
        # Another task was faster.
        await self._store.update_entity(COUNTERS, _id(current), {"hits": increment(-amount)})
        return False

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        _, counters, left = await self._windows(key, expiry)
        before, hits = map(_hits, counters)
        return before, left if before else 0.0, hits, left + expiry

    async def clear_sliding_window(self, key: str, expiry: int) -> None:
        keys = self.sliding_window_keys(key, expiry, time.time())
        await self._store.delete_entities(COUNTERS, list(map(_id, keys)))

    async def _windows(
        self, key: str, expiry: int
    ) -> tuple[tuple[str, str], list[Entity | None], float]:
        """The keys and counters of the last window and of this one, and how long this one goes on."""
        while True:
            keys = self.sliding_window_keys(key, expiry, time.time())
            counters = await self._store.get_entities(COUNTERS, list(map(_id, keys)))
            now = time.time()
            if self.sliding_window_keys(key, expiry, now) == keys:  # they have not moved meanwhile
                return keys, counters, (1 - now / expiry % 1) * expiry


def _id(key: str) -> str:
    """An id has 1,024 bytes at most."""
    text = key.encode()
    return key if len(text) <= 1024 else sha256(text).hexdigest()


def _hits(counter: Entity | None) -> int:
    return 0 if counter is None else cast("int", counter["hits"])


def _since(start: float, window: Entity | None) -> list[tuple[float, int]]:
    """The hits of a window from `start` on, the newest first: when, and how many."""
    hits = cast("Iterable[tuple[float, int]]", (window or {}).get("hits", ()))
    return [(at, count) for at, count in hits if at >= start]


def _at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
