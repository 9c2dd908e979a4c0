"""The store that applications use: its methods, transactions and lifecycle, on one engine.

Single writes, and reads if a read is a round trip, go through the coalescer. The behaviour depends on
the capabilities of an engine, never on its name.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
import warnings
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import timedelta
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, TypeVar, cast

from msgspec.structs import replace

from hf_async_store.arguments import check_boolean, check_callable, check_seconds
from hf_async_store.changes import PRESENT, Change, ChangedMatches, Delete, Outcome, Record
from hf_async_store.claim_clock import boot_seconds
from hf_async_store.claim_records import LEASE_SECONDS, absent
from hf_async_store.coalescing import Coalescer, taking_at_once
from hf_async_store.conflict_retry import (
    RETRY_SECONDS,
    FairRetryQueue,
    Made,
    Step,
    TransactionTicket,
)
from hf_async_store.deferred import deferred
from hf_async_store.driver import (
    Capabilities,
    ClaimInfo,
    Engine,
    Isolation,
    QueryPlan,
    Reader,
    SchemaChange,
    SchemaProgress,
    Session,
    giving_back,
    run_to_completion,
)
from hf_async_store.errors import (
    ConfigurationError,
    EventLoopMismatchError,
    InvalidInputError,
    InvalidQueryError,
    StorageError,
    StoreClosedError,
)
from hf_async_store.field_operations import UpdateMap
from hf_async_store.interface_version import check_interface_version
from hf_async_store.lifetimes import Clock, Lifetimes, TimeSource
from hf_async_store.purging import LivingReader, Purging
from hf_async_store.query import Filters, OrderBy, Query
from hf_async_store.read_only import read_only_session
from hf_async_store.redaction import redact_texts
from hf_async_store.repository import operation_timeout
from hf_async_store.schema import (
    HOST_FACTORY,
    LOCK_COLLECTION,
    Collection,
    EngineSchema,
    Schema,
)
from hf_async_store.slow_queries import SlowQueries, SlowShape
from hf_async_store.streams import OpenStreams
from hf_async_store.transaction import Transaction, TransactionManager
from hf_async_store.values import Entity, Key, Value, copy_entity
from hf_async_store.watching import WatchedStore

if TYPE_CHECKING:
    from hf_async_store import (
        claims,
        clearing,
        index_advice,
        modifications,
        observing,
        schema_changes,
        transforms,
    )
    from hf_async_store.claims import Claim
    from hf_async_store.models import Model
    from hf_async_store.modifications import Write
    from hf_async_store.observer import Observer, StoreObserver
    from hf_async_store.transforms import Transforms
    from hf_async_store.typed_collections import TypedCollection
else:
    claims = deferred("claims")
    clearing = deferred("clearing")
    index_advice = deferred("index_advice")
    modifications = deferred("modifications")
    observing = deferred("observing")
    schema_changes = deferred("schema_changes")
    transforms = deferred("transforms")

Result = TypeVar("Result")

log: Final = logging.getLogger("hf_async_store.store")

_RECORD_ATTEMPTS: Final = 3
_MAX_SLOW_SHOWN: Final = 10

_ABANDONED: Final[list[StorageStrategy]] = []
"""Abandoned stores, referenced until the process ends, so that no finalizer of an engine warns."""


class _Forks:
    """Counts the forks that led to this process: comparing this is cheaper than `os.getpid()`."""

    count: ClassVar[int] = 0

    @classmethod
    def increment(cls) -> None:
        cls.count += 1


os.register_at_fork(after_in_child=_Forks.increment)


class StorageStrategy(WatchedStore):
    """A store. Open it with `async with`, or with `open()` and `close()`.

    Opening does no I/O; the first call does. A store belongs to the event loop that it was opened
    in, and any number of tasks of that loop may use it at once.

    Every method may raise, in addition to its own errors:
        StoreClosedError: before opening or after closing.
        EventLoopMismatchError: from another event loop, or in a forked child.
        TransactionReentryError: by a task that is inside a transaction of this store.
    """

    transaction_type: ClassVar[type[Transaction]] = Transaction
    _claim_type: ClassVar[type[Claim] | None] = None
    """Of an observed store; None: `Claim`."""

    def __init__(self, engine: Engine, schema: Schema) -> None:
        super().__init__(engine, Schema(schema.values()), SlowQueries())
        check_interface_version(type(engine), engine.capabilities.engine)
        if not engine.capabilities.unique_indexes:
            _refuse_unique(schema, engine.capabilities.engine)
        _refuse_feeds(schema, engine.capabilities)
        self._engine = engine
        self._purging = Purging(self, alone=not engine.capabilities.removes_expired)
        self._set_clock(None, self._purging.seconds)
        self._record_attempts = _RECORD_ATTEMPTS if self._schema else 0
        self._transactions = TransactionManager()
        self._retry_queue = FairRetryQueue()
        self._streams = OpenStreams()
        self._observer: StoreObserver | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = _Forks.count
        self._closed = False
        capabilities = engine.capabilities
        self._writes: Coalescer[Change, Outcome] = Coalescer(
            engine.write_unblocked,
            lanes=capabilities.write_concurrency,
            size=capabilities.write_batch,
            writes=True,
            key=_key_of,
            wait=taking_at_once(engine.write_each),
            run_cancellable=engine.write_cancellable,
        )
        self._reads: Coalescer[Key, Record | None] | None = (
            Coalescer(
                taking_at_once(engine.fetch),
                lanes=capabilities.read_concurrency,
                size=capabilities.read_batch,
                writes=False,
            )
            if capabilities.read_batch
            else None
        )

    @property
    def engine(self) -> Engine:
        """The engine, for tools that need the driver interface; it bypasses the checks of the store."""
        return self._engine

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of the engine."""
        return self._engine.capabilities

    def _use_engine(self, engine: Engine) -> None:
        """Use another engine with the same capabilities; for tests, while there are no calls."""
        self._engine = engine
        self._writes.use(
            engine.write_unblocked,
            wait=taking_at_once(engine.write_each),
            run_cancellable=engine.write_cancellable,
        )
        if self._reads is not None:
            self._reads.use(taking_at_once(engine.fetch))

    def _set_clock(self, source: TimeSource | None, purge_seconds: float | None) -> None:
        """See `open_store`; before the store is opened."""
        clock = Clock(source)
        references = self._engine.capabilities.references
        lifetimes = Lifetimes(self._schema.values(), clock, references=references)
        self._clock, self._lifetimes = clock, lifetimes or None
        self._purging.seconds = purge_seconds

    # -- observation -------------------------------------------------------------------------

    def _observe(self, observer: Observer) -> None:
        """See `open_store`; before the store is opened."""
        observing.check_observer(observer)
        writes, reads = self._writes, self._reads

        def waiting() -> dict[str, int]:
            found = {"commit": writes.waiting}
            return found if reads is None else {**found, "fetch": reads.waiting}

        self._observer = told = observer.observe(self.capabilities.engine, waiting)
        writes.observer = observing.SharedOperations(told, "commit", attrgetter("key.collection"))
        if reads is not None:
            reads.observer = observing.SharedOperations(told, "fetch", attrgetter("collection"))
        self.__class__ = observing.observed_store(type(self), told)

    def _note_retry(self, collection: str | None) -> None:
        super()._note_retry(collection)
        if self._observer is not None:
            self._observer.count("retry", collection)

    def _note_lost_claim(self, collection: str) -> None:
        if self._observer is not None:
            self._observer.count("lost claim", collection)

    # -- lifecycle ---------------------------------------------------------------------------

    async def open(self) -> Self:
        """Bind the store to the running loop; no I/O."""
        if self._closed:
            raise StoreClosedError("this store was closed; create a new one")
        if self._loop is not None:
            raise StoreClosedError("this store is already open")
        self._loop = asyncio.get_running_loop()
        self._purging.start()
        if log.isEnabledFor(logging.INFO):
            described = self.describe() | {"collections": list(self._schema)}
            del described["capabilities"]
            log.info("opened a store: %s", described)
        return self

    async def close(self) -> None:
        """Finish the submitted operations, then release all resources. A second close does nothing.

        Open streams are ended. A cancelled close is completed before the cancellation is raised.

        Raises:
            EventLoopMismatchError: from another event loop; the store stays open.
        """
        if self._closed or self._loop is None:
            self._closed = True
            return
        self._refuse_other_loop()
        self._closed = True
        await run_to_completion(self._release())

    async def _release(self) -> None:
        async with AsyncExitStack() as stack:  # if one fails, the others are still released
            stack.push_async_callback(self._engine.close)
            if self._reads is not None:
                stack.push_async_callback(self._reads.drain)
            stack.push_async_callback(self._writes.drain)
            stack.push_async_callback(self._streams.close)
            stack.push_async_callback(self._stop_watching)
            await self._purging.stop()

    def abandon(self) -> None:
        """Stop using the store without closing it: for a process that is about to end.

        Use this if `close()` would wait, for example for a lock that another process holds. The effect
        on the data is as if the process had been killed: acknowledged writes are kept, and the outcome
        of writes in progress is unknown. Connections, files and locks are released when the process
        ends; until then the store stays in memory, and no ResourceWarning is issued. Later calls
        raise StoreClosedError.
        """
        self._closed = True
        self._purging.seconds = None
        self._engine.abandon()
        _ABANDONED.append(self)

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        # The default argument still exists when the interpreter has cleared its modules at exit.
        if getattr(self, "_loop", None) is None or self._closed or self._forks != _Forks.count:
            return
        _warn(f"unclosed store {self!r}: use `async with`", ResourceWarning, source=self)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def _usable(self) -> Engine:
        # The conditions of the methods that raise; without their calls, because every operation does this.
        if (
            self._closed
            or self._loop is None
            or self._forks != _Forks.count
            or self._loop is not asyncio.get_running_loop()
        ):
            self._refuse_unopened()
        self._transactions.refuse_reentry()
        return self._engine

    def _refuse_unopened(self) -> None:
        if self._closed:
            raise StoreClosedError("this store was closed")
        if self._loop is None:
            raise StoreClosedError("this store is not open (use `async with`)")
        self._refuse_other_loop()

    def _refuse_other_loop(self) -> None:
        if self._forks != _Forks.count:
            # Checked before the running loop, as the child has none.
            raise EventLoopMismatchError(
                "this store was opened before a fork; open one in the child"
            )
        if self._loop is not asyncio.get_running_loop():
            raise EventLoopMismatchError(
                "this store was opened in another event loop: use and close it there, or open one "
                "in this loop"
            )

    # -- primitives --------------------------------------------------------------------------

    def _takes_encoded(self, collection: str) -> bool:
        return self._lifetimes is None and self._engine.takes_encoded(collection)

    async def _fetch(self, keys: Sequence[Key], timeout: float | None) -> list[Record | None]:
        engine = self._usable()
        if self._reads is None:
            if timeout is None:
                return self._living(await engine.fetch(keys))
            async with operation_timeout(timeout):
                return self._living(await engine.fetch(keys))
        records: list[Record | None] = []
        for each in await self._reads.submit(keys, timeout):
            if isinstance(each, StorageError):
                raise each
            records.append(each)
        return self._living(records)

    async def _write(self, changes: Sequence[Change], timeout: float | None) -> list[Outcome]:
        self._usable()
        if self._lifetimes is not None:
            changes = await self._for_writing(changes, self._lifetimes, timeout)
        outcomes = await self._writes.submit(changes, timeout)
        if self._record_attempts:
            await self._record_declarations(outcomes, timeout)
        return outcomes

    async def _import(self, changes: Sequence[Change]) -> list[Outcome]:
        # Not through the coalescer, which would split these batches. The caller prepares the next
        # batch while this one is written.
        self._usable()
        # As in the coalescer, a cancellation waits until the batch has been written.
        outcomes = await run_to_completion(self._engine.write_each(changes))
        if self._record_attempts:
            await self._record_declarations(outcomes)
        return outcomes

    async def _record_declarations(
        self, outcomes: Iterable[Outcome] | None = None, timeout: float | None = None
    ) -> None:
        """After the first write, let the store remember the declared collections.

        A failure does not fail the write, which has been made already: a later write tries again.

        Args:
            outcomes: of the write, if some of its changes may have failed.
        """
        if outcomes is not None and all(isinstance(each, StorageError) for each in outcomes):
            return
        attempts, self._record_attempts = self._record_attempts, 0
        if not attempts:
            return
        try:
            async with operation_timeout(timeout):
                await self._engine.remember(self._schema.values())
        except StorageError as exc:
            self._record_attempts = attempts - 1
            log.warning("the declared collections were not recorded in the store: %s", exc)
        except BaseException:
            self._record_attempts = attempts
            raise

    async def _record_feeds(self) -> None:
        await self._engine.remember(self._schema.values())
        self._record_attempts = 0

    def _select(self, query: Query) -> AsyncGenerator[Record, None]:
        return self._select_stored(self._living_query(query))

    def _select_stored(self, query: Query) -> AsyncGenerator[Record, None]:
        return self._streams.read(self._usable().select(query))

    def _select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        return self._streams.read(self._usable().select_batches(self._living_query(query)))

    def _select_at_once(self, query: Query) -> Coroutine[Any, Any, list[Entity] | None]:
        return self._usable().select_at_once(self._living_query(query))

    async def _change_matches(self, query: Query, change: Change) -> ChangedMatches | None:
        engine = self._usable()
        if self._lifetimes is not None or self._writes.observer is not None:
            return None  # they concern each change that is written
        # As in the coalescer, a cancellation waits until the changes have been written, and during a live
        # migration until they have been confirmed.
        changed = await run_to_completion(engine.change_matches(query, change))
        if changed is not None and self._record_attempts:
            await self._record_declarations(changed.outcomes)
        return changed

    def _count(self, query: Query) -> Coroutine[Any, Any, int]:
        return self._usable().count(self._living_query(query))

    async def _first_page(self, query: Query) -> Query:
        return await self._usable().first_page(query)

    async def _retried(
        self, key: Key, attempt: Callable[[], Awaitable[Result]], seconds: float
    ) -> Result:
        self._usable()  # raises before waiting in the queue
        return await self._retry_queue.retry(key, attempt, seconds, self._note_retry)

    async def _read_to_change(self, key: Key, timeout: float | None) -> Entity | None:
        written = self._retry_queue.handed_on(key)
        if written is not None:
            return copy_entity(written)
        return await super()._read_to_change(key, timeout)

    async def _modified(
        self,
        key: Key,
        attempt: Callable[[Write], Awaitable[Entity]],
        step: Step | None,
        seconds: float,
    ) -> Entity:
        self._usable()  # raises before waiting in the queue
        ticket = self._retry_queue.ticket(key, step)
        has_made = False

        async def write(made: Made, timeout: float | None) -> Entity:
            nonlocal has_made
            has_made = True
            # With a timeout, it could not wait for the write of the others.
            shares = timeout is None and made.may_be_shared and self._lifetimes is None
            if shares and ticket.follower is not None and self._engine.shares_changes(key):
                shared = modifications.SharedWrite(ticket, made)
                written, last = made.entity, await shared.run(self._write_made)
            else:
                written = last = await self._write_made(made, timeout)
            if self._reads is not None:  # a read is a round trip
                self._retry_queue.hand_on(key, last)
            return written

        async def once() -> Entity:
            nonlocal has_made
            if ticket.outcome is not None:
                return modifications.shared_outcome(ticket)
            has_made, is_read = False, not self._retry_queue.has_handed_on(key)
            try:
                return await attempt(write)
            except Exception:
                if has_made or is_read:
                    raise
            # What the task before wrote may have been older than this call: it must not be the reason.
            return await attempt(write)

        return await self._retry_queue.retry_with(ticket, once, seconds, self._note_retry)

    # -- transactions ------------------------------------------------------------------------

    def typed(self, model: type[Model]) -> TypedCollection[Model]:
        """The methods of the collection that was declared from a class, with its instances.

        Raises:
            ConfigurationError: this store has no such collection, or several.
        """
        from hf_async_store.typed_collections import TypedCollection

        return TypedCollection(self, model, self.claim_entities)

    def begin_transaction(
        self, isolation: Isolation | None = None, *, read_only: bool = False
    ) -> Transaction:
        """A transaction, for use with `async with`; see `Transaction`.

        Args:
            isolation: one of `capabilities.isolations`; None means the first.
            read_only: all reads see one snapshot, and writes are refused with InvalidInputError. It can
                be used inside another transaction, too. Where `capabilities.query_isolation` is
                "eventual", only the reads by key are consistent: they are validated at its end.

        Raises:
            InvalidInputError: the engine does not support this isolation, or it was given together
                with `read_only`.
        """
        return self._transaction(isolation, read_only=read_only)

    def _transaction(
        self,
        isolation: Isolation | None,
        *,
        read_only: bool,
        ticket: TransactionTicket | None = None,
    ) -> Transaction:
        check_boolean(read_only, "read_only")
        if read_only:
            if isolation is not None:
                raise InvalidInputError("a read-only transaction is a snapshot: omit isolation")
            return self.transaction_type(
                self._schema,
                lambda: read_only_session(self._engine),
                lifetimes=self._lifetimes,
                clock=self._clock,
                enter=self._enter_read_only,
                read_only=True,
                ticket=ticket,
                slow_queries=self._slow_queries,
            )
        known = self.capabilities.isolations
        if isolation is not None and isolation not in known:
            raise InvalidInputError(
                f"isolation must be one of {', '.join(known)}, not {isolation!r}"
            )
        session = self._engine.session if ticket is None else self._engine.retried_session
        return self.transaction_type(
            self._schema,
            lambda: session(isolation),
            lifetimes=self._lifetimes,
            clock=self._clock,
            enter=self._enter_transaction,
            ticket=ticket,
            after_commit=self._record_declarations if self._record_attempts else None,
            slow_queries=self._slow_queries,
        )

    def _enter_transaction(self) -> Callable[[], None]:
        self._usable()
        return self._transactions.enter("a transaction")

    def _enter_read_only(self) -> Callable[[], None]:
        self._refuse_unopened()
        return lambda: None

    async def run_transaction(
        self,
        work: Callable[[Transaction], Awaitable[Result]],
        *,
        isolation: Isolation | None = None,
        read_only: bool = False,
        retry_seconds: float = RETRY_SECONDS,
    ) -> Result:
        """`await work(tx)` in a transaction, again after each conflict; returns its result.

        The tasks of this store that compete for one entity take turns after a conflict.

        Args:
            work: is called once per attempt, so its side effects outside the transaction are repeated.
            isolation, read_only: as in `begin_transaction`.

        Raises:
            RetriesExhaustedError: there were conflicts until `retry_seconds` had passed.
            Exception: any other exception of `work`; nothing was written.
        """

        check_callable(work, "work")
        check_seconds(retry_seconds, "retry_seconds")

        async def attempt(ticket: TransactionTicket) -> Result:
            async with self._transaction(isolation, read_only=read_only, ticket=ticket) as tx:
                result = work(tx)
                if not inspect.isawaitable(result):
                    raise InvalidInputError(
                        f"work must be an async function; it returned {type(result).__name__}"
                    )
                return await result

        return await self._retry_queue.retry_transaction(attempt, retry_seconds, self._note_retry)

    # -- claims and locks --------------------------------------------------------------------

    async def claim_entities(
        self,
        collection: str,
        filters: Filters = None,
        *,
        order_by: OrderBy = None,
        limit: int = 1,
        lease: float = LEASE_SECONDS,
        owner: str | None = None,
        wait: float | None = None,
        max_attempts: int | None = None,
    ) -> list[Claim]:
        """Claim the first matching entities that nobody holds, in one atomic step.

        Claiming changes neither an entity nor its version and `updated_at`. A claimed entity can be read
        and changed by every other method as ever; only other claims skip it. A deletion ends the claim,
        and so does the expiry of the entity; one that is created again is unclaimed.

        Args:
            filters, order_by: as in `query_entities`.
            limit: the maximum number of entities.
            lease: after how many seconds a claim ends, unless it is renewed.
            owner: who claims, for `claims`; by default host and process.
            wait: if nothing can be claimed, try again for this many seconds: in intervals, and at once
                when an entity that matches is written in a collection with a feed.
            max_attempts: leave entities alone that were claimed this often, by anybody, without a claim
                being finished: they may be what kills its workers.

        Raises:
            InvalidQueryError, InvalidInputError: before any I/O.
        """
        self._refuse_without_claims()
        if type(limit) is not int or limit < 1:
            raise InvalidQueryError("limit of claims must be at least 1")
        query = self._query(collection, filters, order_by, limit, None)
        terms = claims.check_terms(lease, owner, max_attempts)
        seconds = claims.waiting_seconds(wait, "wait")

        async def attempt() -> list[Claim]:
            since = boot_seconds()
            engine = self._usable()
            claimed = await engine.claim(self._living_query(query), terms)
            if claimed and self._record_attempts:
                async with giving_back(engine) as kept:
                    kept += claimed
                    await self._record_declarations()
            kind = self._claim_type or claims.Claim
            return [kind(self, each.record.key, each, terms.lease, since) for each in claimed]

        claimed = await attempt()
        if claimed or seconds <= 0:
            return claimed
        end = time.monotonic() + seconds
        async with self._woken_by_changes(collection, query.where, seconds) as sleep:
            return await claims.until_claimed(attempt, max(end - time.monotonic(), 0), sleep=sleep)

    async def claims(self, collection: str) -> list[ClaimInfo]:
        """The claims of a collection, by id: those that are held, and those that are kept because the
        attempts are counted. Of `hf_locks`, the named locks and permits."""
        self._refuse_without_claims()
        if collection != LOCK_COLLECTION.name:
            self._schema[collection]  # raises if it is not declared
        found = await self._usable().claims(collection)
        if self._lifetimes is None or collection not in self._lifetimes:
            return found
        records = await self._fetch([Key(collection, each.id) for each in found], None)
        return [each for each, record in zip(found, records, strict=True) if record is not None]

    async def break_claim(self, collection: str, entity_id: str) -> bool:
        """End the claim of an entity whoever holds it, and forget how often it was claimed.

        What its holder then does through the claim is refused. Returns whether there was a claim or a
        count of attempts.
        """
        self._refuse_without_claims()
        if collection == LOCK_COLLECTION.name:
            key = Key(collection, claims.check_name(entity_id, "entity_id"))
        else:
            key = self._schema[collection].key_of(entity_id)
        return await self._usable().break_claim(key)

    def lock(
        self, name: str, *, lease: float = LEASE_SECONDS, timeout: float | None = None
    ) -> AbstractAsyncContextManager[Claim]:
        """A lock that one task of all programs holds at a time, for use with `async with`.

        It is renewed in the background. If it is lost, the block is cancelled with ClaimLostError: see
        `Claim`, of which the block gets one, for its token and its transactions.

        Args:
            lease: after how many seconds the lock of a holder that is killed or stopped ends.
            timeout: how long to wait for the lock; None: without limit.

        Raises:
            LockTimeoutError: it was not free in time.
        """
        self._refuse_without_claims()
        names = [claims.check_name(name, "name")]
        return claims.held(lambda: self._acquired(names, lease, timeout))

    async def _acquired(self, names: Sequence[str], lease: float, timeout: float | None) -> Claim:
        return await claims.acquired_name(self, names, lease, timeout)

    def permits(
        self,
        name: str,
        limit: int,
        *,
        lease: float = LEASE_SECONDS,
        timeout: float | None = None,
    ) -> AbstractAsyncContextManager[Claim]:
        """As `lock`, but up to `limit` tasks of all programs hold one of the permits at a time.

        All programs must give the same limit.
        """
        self._refuse_without_claims()
        names = claims.permit_names(name, limit)
        return claims.held(lambda: self._acquired(names, lease, timeout))

    def _refuse_without_claims(self) -> None:
        if not self.capabilities.claims:
            raise InvalidInputError(f"the engine {self.capabilities.engine} has no claims")

    def _claimed_transaction(self, claim: Claim) -> Transaction:
        return self.transaction_type(
            self._schema,
            lambda: self._claimed_session(claim),
            lifetimes=self._lifetimes,
            clock=self._clock,
            enter=self._enter_transaction,
            after_commit=self._record_declarations if self._record_attempts else None,
        )

    @asynccontextmanager
    async def _claimed_session(self, claim: Claim) -> AsyncGenerator[Session, None]:
        with claim._noticing_loss():
            async with self._engine.claimed_session(claim.key, claim.token) as session:
                if self._may_expire(claim):
                    _refuse_expired(claim.key, self._living(await session.fetch([claim.key])))
                yield session

    async def _claiming_engine(self, claim: Claim) -> Engine:
        """The engine, to change a claim of an entity that has not expired.

        Raises:
            ClaimLostError: it has.
        """
        if self._may_expire(claim):
            _refuse_expired(claim.key, await self._fetch([claim.key], None))
        return self._usable()

    def _may_expire(self, claim: Claim) -> bool:
        return self._lifetimes is not None and claim.collection in self._lifetimes

    async def _update_claimed(self, claim: Claim, changes: UpdateMap, *, ends: bool) -> int:
        declared = self._schema[claim.collection]
        change = self._patch(declared, claim.id, changes, PRESENT, self._clock.now())
        return await self._write_claimed(claim, change, ends=ends)

    async def _delete_claimed(self, claim: Claim) -> None:
        await self._write_claimed(claim, Delete(claim.key), ends=True)

    async def _write_claimed(self, claim: Claim, change: Change, *, ends: bool) -> int:
        """Change a claimed entity, again after each conflict."""

        async def attempt() -> int:
            engine, changes = self._usable(), [change]
            if self._lifetimes is not None:
                changes = [*await self._for_writing(changes, self._lifetimes, None)]
            return await engine.write_claimed(claim.token, changes[0], ends=ends)

        version = await self._retried(claim.key, attempt, RETRY_SECONDS)
        if self._record_attempts:
            await self._record_declarations()
        return version

    # -- for backups and migrations ----------------------------------------------------------

    async def _get_stored(self, collection: str, ids: Iterable[str]) -> list[Entity | None]:
        """As `get_entities`, with the entities that have expired and were not removed."""
        keys = [Key(collection, each) for each in ids]
        records = await self._usable().fetch(keys) if keys else []
        return [None if each is None else each.entity for each in records]

    @asynccontextmanager
    async def snapshot(self, *, expired: bool = False) -> AsyncGenerator[Reader, None]:
        """A consistent snapshot of the whole store, for queries and reads by key.

        For reading everything, as a backup does: it does not block writers, and its memory use does
        not grow with the data read. Where `capabilities.query_isolation` is "eventual", it is no
        more consistent than queries are.

        Args:
            expired: read also the entities that have expired and were not removed yet.
        """
        check_boolean(expired, "expired")
        lifetimes = None if expired else self._lifetimes
        async with self._usable().snapshot() as reader:
            yield reader if lifetimes is None else LivingReader(reader, lifetimes)

    # -- expiry ------------------------------------------------------------------------------

    async def purge_expired(
        self, collection: str | None = None, *, limit: int | None = None
    ) -> int:
        """Remove entities that have expired; returns how many.

        They are absent anyway; this frees their space. It works in small batches between other writes, and
        each entity is removed only if it has expired at that moment. One that others refer to is left
        until the last of them is removed.

        Args:
            collection: only this one; None: all collections that expire, children before parents.
            limit: at most this number.

        Raises:
            InvalidInputError: the collection does not expire.
        """
        self._usable()
        return await self._purging.run(collection, limit)

    # -- everything --------------------------------------------------------------------------

    async def clear(self, collection: str | None = None) -> int:
        """Delete all entities of the declared collections; returns how many.

        Those that have expired, too. They are deleted in batches, children before parents, each
        independently, so that one that is created meanwhile may stay. Claims of entities end with them;
        named locks and subscriptions, what is recorded of declarations, and collections of other programs
        are kept.

        Args:
            collection: only this one; None: all collections.

        Raises:
            PartialChangeError: one could not be deleted, for example because an entity of another
                collection refers to it; those before it are deleted.
        """
        names = [*self._schema][::-1] if collection is None else [self._schema[collection].name]
        work = clearing.Clearing(self._usable())
        for each in names:
            await work.clear(self._schema[each])
        return work.done

    # -- declarations ------------------------------------------------------------------------

    async def recorded_collections(self) -> list[Collection]:
        """The collections that programs have declared for this store, recorded at their first write.

        Raises:
            CorruptionError: what is recorded is invalid.
        """
        return await self._usable().declarations()

    async def schema_changes(self) -> list[SchemaChange]:
        """What the declared collections and the store disagree about; empty if everything is in place.

        Reads all entities. Nothing is changed. A query is right without these changes, and may be slower.
        """
        return await schema_changes.compared(self._usable(), self._schema)

    async def apply_schema(
        self,
        progress: SchemaProgress | None = None,
        complete: bool = False,
        transform: Transforms | None = None,
    ) -> int:
        """Bring the store to the declared collections, while other programs read and write.

        It can be interrupted at any time, run again, and run by several processes at once. Returns the
        number of entities that `transform` has changed.

        Args:
            progress: called for each change as it proceeds.
            transform: functions by collection, plain or async, that take an entity and return the
                fields to change, as for `update_entity`, or None. Each entity that they change is
                written only if no other program has changed it meanwhile; else they are called with
                the current one. For an entity that it has transformed, a function must return nothing
                new: so an interrupted run is completed by another one. They run first, and can
                provide required values.
            complete: all programs with an older declaration have ended. Where queries use a new
                index only then, they begin to.

        Raises:
            SchemaMismatchError: the stored data breaks the declaration, for example because a
                required field is missing; the first entities are named, and nothing was changed,
                except by `transform`.
            InvalidInputError: a function of `transform` would change an entity each time it is run.
        """
        wanted = {} if transform is None else transform
        transforms.check_transforms(wanted, self._schema)
        check_boolean(complete, "complete")
        if progress is not None:
            check_callable(progress, "progress")
        return await schema_changes.apply(
            self._usable(), self._schema, progress, wanted, complete=complete
        )

    # -- health ------------------------------------------------------------------------------

    async def exists(self) -> bool:
        """Whether the store exists: its file, or one of its tables. Nothing is created."""
        return await self._usable().exists()

    async def is_same_store(self, other: StorageStrategy) -> bool:
        """Whether `other` has the same data, whatever the URLs of the two; see `Engine.is_same_store`."""
        if not isinstance(other, StorageStrategy):
            raise InvalidInputError(f"other must be a store, not {type(other).__name__}")
        mine, theirs = self._usable(), other._usable()
        if type(mine) is not type(theirs):
            # Only one of them may be a wrapper, which knows the engine that it wraps.
            return await mine.is_same_store(theirs) or await theirs.is_same_store(mine)
        return await mine.is_same_store(theirs)

    async def undeclared(self) -> list[str]:
        """The stored collections, and fields such as `machines.owner`, that are not declared."""
        return await self._usable().undeclared()

    async def explain_query(
        self,
        collection: str,
        filters: Filters = None,
        order_by: OrderBy = None,
        limit: int | None = None,
    ) -> QueryPlan:
        """How `query_entities` would run: by index or scan, and what is filtered and sorted afterwards.

        If it scans or sorts, the `advice` of the plan is the index that would serve it.
        """
        query = await self._built_query(collection, filters, order_by, limit, None)
        plan = await self._usable().explain(self._living_query(query))
        if not self.capabilities.indexes:
            return plan
        return replace(plan, advice=index_advice.advice(self._schema[collection], query, plan))

    async def test_connection(self) -> float:
        """Write, read back and delete a value that is not an entity; returns the seconds it took.

        Raises:
            StorageError: the reason why it failed.
        """
        engine = self._usable()
        started = time.perf_counter()
        await engine.probe()
        return time.perf_counter() - started

    async def health(self) -> dict[str, Value]:
        """The state of the store for an operator: reachability, latency, disk space, problems.

        `ok` is true if `problems` is empty. An engine that cannot be reached is reported as a
        problem, not raised. `slow_queries` are the shapes of the queries of this store object that took
        at least 20 ms, without their values and without streams: those that took most time in all first,
        each with the index that would serve it, if none does.
        """
        engine = self._usable()
        report: dict[str, Value] = {"engine": self.capabilities.engine}
        problems: list[Value] = []
        # Before the first write, by which an engine may record the declarations.
        contradictions = await self._contradictions(engine)
        try:
            report["latency_ms"] = round(await self.test_connection() * 1000, 3)
        except StorageError as exc:
            problems.append(str(exc))
        problems += [each for each in contradictions if each not in problems]
        problems += await self._unenforced(engine)
        try:
            details = dict(await engine.health())
        except StorageError as exc:
            details = {"problems": [str(exc)]}
        reported = details.pop("problems", [])
        problems += (
            [each for each in reported if each not in problems]
            if isinstance(reported, list)
            else []
        )
        problems += self._purging.problems()
        return {
            "ok": not problems,
            **report,
            **redact_texts(details),
            "slow_queries": [
                self._described(each) for each in self._slow_queries.slowest()[:_MAX_SLOW_SHOWN]
            ],
            "problems": redact_texts(problems),
        }

    def _described(self, shape: SlowShape) -> Value:
        query = shape.query
        advised = index_advice.advice_by_declaration(self._schema[query.collection], query)
        return {
            "collection": query.collection,
            "filter": shape.filter_text,
            "order_by": list(shape.order_by),
            "count": shape.count,
            "seconds": round(shape.seconds, 3),
            "worst_seconds": round(shape.worst_seconds, 3),
            "rows": shape.rows,
            "advice": advised if self.capabilities.indexes else None,
        }

    async def _contradictions(self, engine: Engine) -> list[Value]:
        """Where another program has declared something else for this store."""
        try:
            recorded = await engine.declarations()
        except StorageError as exc:
            return [str(exc)]
        return [
            f"the declaration of {each.collection}.{each.name} contradicts the store: {each.detail}"
            for each in schema_changes.contradictions(recorded, self._schema)
        ]

    async def _unenforced(self, engine: Engine) -> list[Value]:
        """The declared unique indexes that are not enforced yet."""
        try:
            unenforced = await engine.unenforced() if self._schema.unique else []
        except StorageError:
            return []  # it is reported anyway
        return [
            f"the unique index {index.name} of {name} is not enforced yet: run `schema apply`"
            for name, index in unenforced
        ]

    def describe(self) -> dict[str, Value]:
        """Capabilities and limits, the location of the data and the collections; without secrets."""
        capabilities = self.capabilities
        return {
            "engine": capabilities.engine,
            "capabilities": {
                each: _plain(getattr(capabilities, each))
                for each in capabilities.__struct_fields__
                if each != "engine"
            },
            "collections": {name: _description(each) for name, each in self._schema.items()},
            **redact_texts(self._engine.describe()),
        }


def _refuse_unique(schema: Schema, engine: str) -> None:
    for name in schema.unique:
        raise ConfigurationError(
            f"{name} declares a unique index, but the engine {engine!r} does not enforce any "
            "(see its capability unique_indexes)"
        )


def _refuse_feeds(schema: Schema, capabilities: Capabilities) -> None:
    longest = capabilities.max_feed_retention
    for each in schema.values():
        if each.feed is not None and not capabilities.feed:
            raise ConfigurationError(
                f"{each.name} declares a feed, but the engine {capabilities.engine!r} has none (see its "
                "capability feed)"
            )
        if each.feed is not None and longest is not None and each.feed > longest:
            raise ConfigurationError(
                f"{each.name} declares a feed of {each.feed}, but the engine {capabilities.engine!r} "
                f"keeps changes for at most {longest} (see its capability max_feed_retention)"
            )


def _key_of(change: Change) -> Key:
    return change.key


def _plain(value: object) -> Value:
    """The value of a capability as JSON; a duration in seconds."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    return cast("Value", list(value) if isinstance(value, tuple) else value)


def _description(collection: Collection) -> dict[str, Value]:
    return {
        "key": collection.key,
        "fields": {
            name: field.type + (f" -> {field.references}" if field.references else "")
            for name, field in collection.fields.items()
        },
        "indexes": [each.name for each in collection.indexes],
        **({} if collection.expires is None else {"expires": str(collection.expires)}),
        **({} if collection.feed is None else {"feed": collection.feed.total_seconds()}),
    }


def schema_of(collections: Iterable[Collection] | Schema) -> EngineSchema:
    """The schema that an engine gets, for the `collections` argument of a caller."""
    if isinstance(collections, EngineSchema):
        return collections
    return EngineSchema(collections.values() if isinstance(collections, Schema) else collections)


__all__: Final = ["HOST_FACTORY", "StorageStrategy", "schema_of"]


def _refuse_expired(key: Key, living: Sequence[Record | None]) -> None:
    """Raise ClaimLostError if the claimed entity is not among the living ones."""
    if living == [None]:
        raise absent(key)
