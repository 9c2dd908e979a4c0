"""Claims: entities that one program at a time works on, for as long as it says that it is alive.

A claim has a lease, after which it ends unless it was renewed, and a token, by which the store recognises
its holder: what is done through a claim that has ended is refused in the commit that would do it. Named
locks and permits are claims of names instead of entities.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import ClassVar, Final, Protocol, Self

from hf_async_store.arguments import check_seconds
from hf_async_store.backoff import Backoff
from hf_async_store.claim_clock import boot_seconds
from hf_async_store.claim_records import LEASE_SECONDS as LEASE_SECONDS
from hf_async_store.driver import Claimed, ClaimTerms, Engine, run_to_completion
from hf_async_store.errors import (
    ClaimLostError,
    InvalidInputError,
    LockTimeoutError,
    StorageError,
)
from hf_async_store.field_operations import UpdateMap
from hf_async_store.schema import LOCK_COLLECTION
from hf_async_store.transaction import Transaction
from hf_async_store.values import NOT_UTF8, Entity, Key

log: Final = logging.getLogger("hf_async_store.claims")

_MAX_LEASE_SECONDS: Final = 30 * 86_400.0
_RENEWALS_PER_LEASE: Final = 3
_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 1.0
_LONGEST_LOCK_PAUSE: Final = 0.1
"""Pauses between two attempts to claim."""

_MAX_PERMITS: Final = 1000
_MAX_NAME_BYTES: Final = 1000
_MAX_OWNER_BYTES: Final = 200

LOCKS: Final = LOCK_COLLECTION.name


class ClaimingStore(Protocol):
    """What a claim needs of its store."""

    _claim_type: ClassVar[type[Claim] | None]

    def _usable(self) -> Engine: ...

    async def _claiming_engine(self, claim: Claim) -> Engine: ...

    async def _update_claimed(self, claim: Claim, changes: UpdateMap, *, ends: bool) -> int: ...

    async def _delete_claimed(self, claim: Claim) -> None: ...

    def _claimed_transaction(self, claim: Claim) -> Transaction: ...

    def _note_lost_claim(self, collection: str) -> None: ...


class ClaimFacts:
    """What is known of a claim, by an object that stands for it: another form of it."""

    _held: Claim

    @property
    def key(self) -> Key:
        """Collection and id of the entity."""
        return self._held.key

    @property
    def collection(self) -> str:
        """The collection of the entity."""
        return self._held.collection

    @property
    def id(self) -> str:
        """The id of the entity."""
        return self._held.id

    @property
    def version(self) -> int:
        """The version that was claimed, or written last through the claim."""
        return self._held.version

    @property
    def token(self) -> int:
        """As `Claim.token`."""
        return self._held.token

    @property
    def attempts(self) -> int:
        """As `Claim.attempts`."""
        return self._held.attempts

    @property
    def expires_at(self) -> datetime:
        """As `Claim.expires_at`."""
        return self._held.expires_at

    @property
    def lease(self) -> float:
        """In seconds."""
        return self._held.lease


class Claim:
    """An entity that this program has claimed, and what it may do with it.

    As an async context manager, it renews the claim in the background, at a third of the lease, and
    releases it at the end unless it was finished, released or deleted before. If the claim is lost
    meanwhile, because the store refused to renew it, or no renewal succeeded until the lease ended, the
    block is cancelled, and ClaimLostError comes out of it.

    Attributes:
        key: collection and id of the entity.
        entity: as it was claimed.
        version: the version that was claimed, or written last through the claim.
        token: greater than that of every earlier claim of the entity: a service that remembers the
            greatest token it has seen can refuse late requests of earlier holders. After a claim was
            finished, that depends on the clock: see `docs/claims.md`.
        attempts: how often the entity was claimed since a claim of it was last finished, this time
            included.
        expires_at: when the claim ends unless it is renewed, by the wall clock of this machine; for
            display. What decides is the clock of the store.
        lease: in seconds.
    """

    def __init__(
        self, store: ClaimingStore, key: Key, claimed: Claimed, lease: float, since: float
    ) -> None:
        self._store = store
        self.key: Final = key
        self.entity: Entity = claimed.record.entity
        self.version = claimed.record.version
        self.token = claimed.token
        self.attempts = claimed.attempts
        self.lease = lease
        self._skew: Final = claimed.skew
        self._ended = False
        self._is_lost = False
        self._block: _RenewedBlock | None = None
        self._known_end: tuple[float, datetime] | None = None
        self._renewed_at(since)

    def __repr__(self) -> str:
        return f"<Claim of {self.collection} {self.id!r}, token {self.token}>"

    @property
    def collection(self) -> str:
        return self.key.collection

    @property
    def id(self) -> str:
        return self.key.id

    @property
    def expires_at(self) -> datetime:
        """See the attributes; computed when it is asked for, because that costs as much as the entity."""
        known, deadline = self._known_end, self.deadline
        # Kept with its deadline, because another thread renews the claim of a blocking caller.
        if known is None or known[0] != deadline:
            known = (deadline, datetime.now(UTC) + timedelta(seconds=deadline - boot_seconds()))
            self._known_end = known
        return known[1]

    def _renewed_at(self, since: float) -> None:
        self.deadline = since + self.lease - self._skew

    # -- what a holder does ------------------------------------------------------------------

    async def update(self, changes: UpdateMap) -> int:
        """`update_entity` of the claimed entity; returns the new version.

        Raises:
            ClaimLostError: the claim is not held any more; nothing was written.
            InvalidFieldError, UnsupportedValueError, ReferenceViolationError: as in `update_entity`.
        """
        with self._noticing_loss():
            self.version = await self._store._update_claimed(self, changes, ends=False)
        return self.version

    async def finish(self, changes: UpdateMap | None = None) -> None:
        """End the claim, with a last change of the entity in the same commit, if there is one.

        How often the entity was claimed is forgotten.

        Raises: as `update`.
        """
        async with self._ending():
            if changes is None:
                engine = await self._store._claiming_engine(self)
                await engine.release_claim(self.key, self.token, None)
            else:
                self.version = await self._store._update_claimed(self, changes, ends=True)

    @contextmanager
    def _noticing_loss(self) -> Iterator[None]:
        try:
            yield
        except ClaimLostError:
            self._note_loss()
            raise

    def _note_loss(self) -> None:
        """The claim was lost, which its store is told once."""
        if not self._is_lost:
            self._is_lost = True
            log.info("a claim of %s was lost", self.collection)
            self._store._note_lost_claim(self.collection)

    async def delete(self) -> None:
        """Delete the claimed entity, which ends the claim.

        Raises:
            ClaimLostError: the claim is not held any more; nothing was deleted.
            ReferenceViolationError: other entities refer to it.
        """
        async with self._ending():
            await self._store._delete_claimed(self)

    def transaction(self) -> Transaction:
        """A transaction that commits only if the claim is still held then.

        Its first call raises ClaimLostError if it is not; without a call, nothing is checked. On all
        engines but DynamoDB it also delays the renewal of the claim, so it should be much shorter than
        the lease.
        """
        return self._store._claimed_transaction(self)

    async def renew(self, lease: float | None = None) -> None:
        """Let the claim end `lease` seconds from now, by default the lease that it was made with.

        Raises:
            ClaimLostError: it is not held any more.
        """
        seconds = self.lease if lease is None else check_lease(lease)
        since = boot_seconds()
        with self._noticing_loss():
            engine = await self._store._claiming_engine(self)
            await engine.renew_claim(self.key, self.token, seconds)
        self.lease = seconds
        self._renewed_at(since)
        if self._block is not None:
            self._block.lease_changed.set()

    async def release(self, *, after: float = 0.0) -> None:
        """End the claim: the entity can be claimed again, at once or `after` seconds from now.

        How often it was claimed is kept.

        Raises:
            ClaimLostError: it is not held any more.
        """
        check_seconds(after, "after")
        if not 0 <= after <= _MAX_LEASE_SECONDS:
            raise InvalidInputError(f"after must be 0 to {_MAX_LEASE_SECONDS:g} seconds")
        kept = None if self.collection == LOCKS else float(after)
        async with self._ending():
            engine = await self._store._claiming_engine(self)
            await engine.release_claim(self.key, self.token, kept)

    @asynccontextmanager
    async def _ending(self) -> AsyncGenerator[None, None]:
        # Before it has ended, because a renewal may be refused before this call returns.
        self._ended = True
        try:
            with self._noticing_loss():
                yield
        except BaseException:
            self._ended = False
            raise
        if self._block is not None:
            self._block.stop()

    # -- renewed in the background -----------------------------------------------------------

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a claim is entered by a task"
        self._enter(task)
        return self

    def _enter(self, task: asyncio.Task[object] | None) -> None:
        """Begin to renew the claim.

        Args:
            task: is cancelled if the claim is lost.
        """
        if self._block is not None:
            raise InvalidInputError("a claim can be entered only once")
        self._block = _RenewedBlock(self, task)

    async def __aexit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        assert self._block is not None, "entered"
        try:
            await self._block.leave(exc)
        except asyncio.CancelledError:
            await self._release_after_error()
            raise
        if exc is not None:
            await self._release_after_error()
        elif not self._ended:
            # To the end: otherwise a cancellation would leave it claimed until its lease ends.
            await run_to_completion(self.release())

    async def _release_after_error(self) -> None:
        """Release the claim. The error is what the caller must see; at the latest, the lease ends."""
        if self._ended:
            return
        try:
            await run_to_completion(self.release())
        except StorageError as failure:
            log.info(
                "a claim of %s could not be released: %s", self.collection, type(failure).__name__
            )


class _RenewedBlock:
    """The block of an `async with`, and the task that renews its claim."""

    def __init__(self, claim: Claim, task: asyncio.Task[object] | None) -> None:
        self._claim = claim
        self._task = task
        self._cancellations = 0 if task is None else task.cancelling()
        self._lost: ClaimLostError | None = None
        self.lease_changed = asyncio.Event()
        self._renewing = asyncio.get_running_loop().create_task(self._renew())

    def stop(self) -> None:
        """Renew no more."""
        self._renewing.cancel()

    async def leave(self, exc: BaseException | None) -> None:
        """End the block.

        Raises:
            ClaimLostError: the claim was lost, which cancelled the block.
        """
        self.stop()
        try:
            await asyncio.wait([self._renewing])
        except asyncio.CancelledError:
            if self._lost is None:
                raise
        if self._lost is None:
            return
        others = self._task is not None and self._task.uncancel() > self._cancellations
        if exc is None or (isinstance(exc, asyncio.CancelledError) and not others):
            raise self._lost from exc

    async def _renew(self) -> None:
        claim = self._claim
        try:
            while True:
                # A part of the lease may have passed before the block began.
                passed = claim.lease - (claim.deadline - boot_seconds())
                self.lease_changed.clear()
                try:
                    async with asyncio.timeout(claim.lease / _RENEWALS_PER_LEASE - passed):
                        await self.lease_changed.wait()
                except TimeoutError:
                    await self._renewed()
        except ClaimLostError as exc:
            self._lose(exc)

    def _lose(self, exc: ClaimLostError) -> None:
        """Cancel the block."""
        if not self._claim._ended and self._lost is None:
            self._lost = exc
            self._claim._note_loss()
            if self._task is not None:
                self._task.cancel()

    async def _renewed(self) -> None:
        """Renew the claim, again after errors until its lease has ended."""
        claim = self._claim
        pauses = claim.lease / (4 * _RENEWALS_PER_LEASE)
        while True:
            try:
                return await self._renewed_once()
            except ClaimLostError:
                raise
            except StorageError as exc:
                if boot_seconds() + pauses >= claim.deadline:
                    raise self._not_renewed() from exc
                await asyncio.sleep(pauses)

    async def _renewed_once(self) -> None:
        renewal = asyncio.ensure_future(self._claim.renew())
        try:
            await asyncio.wait([renewal], timeout=self._claim.deadline - boot_seconds())
            if renewal.done():
                return renewal.result()
            # The block must end now, even if the request cannot be cancelled.
            self._lose(self._not_renewed())
        finally:
            renewal.cancel()
            await asyncio.gather(renewal, return_exceptions=True)
        raise self._not_renewed()

    def _not_renewed(self) -> ClaimLostError:
        why = "it could not be renewed before its lease ended"
        return ClaimLostError(f"{self._claim!r}: {why}", self._claim.collection, self._claim.id)


# -- claiming -------------------------------------------------------------------------------


@cache
def _process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def check_lease(lease: float) -> float:
    check_seconds(lease, "lease")
    if not 0 < lease <= _MAX_LEASE_SECONDS:
        raise InvalidInputError(f"lease must be more than 0 and at most {_MAX_LEASE_SECONDS:g} s")
    return float(lease)


def check_terms(lease: float, owner: str | None, max_attempts: int | None) -> ClaimTerms:
    """The terms for the arguments of a caller."""
    lease = check_lease(lease)
    if owner is not None and len(check_name(owner, "owner").encode()) > _MAX_OWNER_BYTES:
        raise InvalidInputError(f"owner may have at most {_MAX_OWNER_BYTES} bytes")
    if max_attempts is not None and (type(max_attempts) is not int or max_attempts < 1):
        raise InvalidInputError("max_attempts must be at least 1, or None")
    return ClaimTerms(lease, owner or _process(), max_attempts)


def check_name(name: str, what: str) -> str:
    """Raise `InvalidInputError` for an argument that is not a string of 1 to 1,000 bytes without U+0000."""
    if not isinstance(name, str):
        raise InvalidInputError(f"{what} must be a string, not {type(name).__name__}")
    if not name or NOT_UTF8.search(name) or len(name.encode()) > _MAX_NAME_BYTES:
        raise InvalidInputError(
            f"{what} must be a string of 1 to {_MAX_NAME_BYTES} bytes of UTF-8 without U+0000"
        )
    return name


async def until_claimed(
    attempt: Callable[[], Awaitable[list[Claim]]],
    wait: float,
    longest: float = _LONGEST_PAUSE,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> list[Claim]:
    """What the first attempt that is not empty returns; [] if none is within `wait` seconds."""
    backoff = Backoff(wait, first=_FIRST_PAUSE, longest=longest, sleep=sleep)
    while True:
        claims = await attempt()
        if claims or not await backoff.pause():
            return claims


def waiting_seconds(wait: float | None, what: str) -> float:
    if wait is None:
        return 0.0
    check_seconds(wait, what)
    return float(wait)


async def acquired_name(
    store: ClaimingStore, names: Sequence[str], lease: float, timeout: float | None
) -> Claim:
    """A claim of one of some names.

    Raises:
        LockTimeoutError: none became free within `timeout` seconds.
    """
    terms = check_terms(lease, None, None)
    keys = [Key(LOCKS, each) for each in names]
    if timeout is not None:
        check_seconds(timeout, "timeout")

    async def attempt() -> list[Claim]:
        since = boot_seconds()
        random.shuffle(keys)
        claimed = await store._usable().claim_name(keys, terms)
        if claimed is None:
            return []
        return [
            (store._claim_type or Claim)(store, claimed.record.key, claimed, terms.lease, since)
        ]

    seconds = float("inf") if timeout is None else float(timeout)
    found = await until_claimed(attempt, seconds, _LONGEST_LOCK_PAUSE)
    if not found:
        raise LockTimeoutError(f"{names[0]!r} was not free within {timeout:g} s")
    return found[0]


@asynccontextmanager
async def held(acquire: Callable[[], Awaitable[Claim]]) -> AsyncGenerator[Claim, None]:
    """Hold a claim while the context is open."""
    async with await acquire() as claim:
        yield claim


def permit_names(name: str, limit: int) -> list[str]:
    """The names of the permits of a limit."""
    if type(limit) is not int or not 1 <= limit <= _MAX_PERMITS:
        raise InvalidInputError(f"limit must be 1 to {_MAX_PERMITS}")
    return [f"permit {number} {check_name(name, 'name')}" for number in range(limit)]
