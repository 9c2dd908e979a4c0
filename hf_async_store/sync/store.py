"""The blocking store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from hf_async_store import claims, strategy, transaction
from hf_async_store.arguments import check_callable
from hf_async_store.claims import LEASE_SECONDS
from hf_async_store.conflict_retry import RETRY_SECONDS
from hf_async_store.errors import StoreClosedError
from hf_async_store.models import Model
from hf_async_store.sync.calls import Context, blocking, passed_functions
from hf_async_store.sync.claims import Claim
from hf_async_store.sync.event_loop_thread import EventLoopThread, refuse_running_loop
from hf_async_store.sync.feed import Changes, Subscription
from hf_async_store.sync.transaction import Repository, Snapshot, Transaction
from hf_async_store.sync.typed_collections import TypedCollection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_async_store.driver import Capabilities, Isolation, SchemaProgress
    from hf_async_store.feed import EntityChange
    from hf_async_store.query import Filters, OrderBy
    from hf_async_store.transforms import Transforms
    from hf_async_store.values import Value

Result = TypeVar("Result")


class Store(Repository):
    """A store whose methods wait for their results, for any number of threads; as `StorageStrategy`.

    Open it by `with`, or by `open()` and `close()`. A transaction or a lock belongs to the thread that
    entered it.

    Args:
        store: the asynchronous store, not opened.

    Every method may raise, in addition to its own errors:
        EventLoopMismatchError: in a thread that runs an event loop, or in a forked child.
        StoreClosedError: before opening or after closing.
        TransactionReentryError: by a thread that is inside a transaction of this store.
    """

    transaction_type: ClassVar[type[Transaction]] = Transaction
    _target: strategy.StorageStrategy

    def __init__(self, store: strategy.StorageStrategy) -> None:
        super().__init__(store, None)
        self._closing = Lock()
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__name__} of {self._target!r}>"

    @property
    def capabilities(self) -> Capabilities:
        """As `StorageStrategy.capabilities`."""
        return self._target.capabilities

    # -- lifecycle ---------------------------------------------------------------------------

    def open(self) -> Self:
        """Start the event loop if this is the first open store of the process; no I/O."""
        refuse_running_loop()
        with self._closing:
            if self._closed:
                raise StoreClosedError("this store was closed; create a new one")
            if self._loop_thread is not None:
                raise StoreClosedError("this store is already open")
            loop_thread = EventLoopThread.acquire(self._target)
            if self._target._observer is not None:
                loop_thread.passes_context = True
            try:
                loop_thread.caller().run(self._target.open)
            except BaseException:
                loop_thread.release(self._target)
                raise
            for each in (self._target._writes, self._target._reads):
                if each is not None:
                    each.let_callers_run = loop_thread.let_callers_run
            self._loop_thread = loop_thread
        return self

    def close(self) -> None:
        """As `StorageStrategy.close`; with the last open store of the process, the event loop ends."""
        if self._loop_thread is None:
            self._closed = True
            return
        if not self._closed:
            self._caller()  # before the lock, which another thread may have held during a fork
        with self._closing:
            if self._closed:
                return
            try:
                self._run(self._target.close)
            except Exception:
                self._closed = True
                self._loop_thread.release(self._target)
                raise
            except BaseException:  # Ctrl-C: it would wait, for example for a lock
                self.abandon()
                raise
            self._closed = True
            self._loop_thread.release(self._target)

    def abandon(self) -> None:
        """As `StorageStrategy.abandon`; the event loop runs until the process ends."""
        self._closed = True
        self._target.abandon()
        if self._loop_thread is not None:
            self._loop_thread.stores.discard(self._target)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _opened(self) -> EventLoopThread:
        if self._closed:
            refuse_running_loop()
            raise StoreClosedError("this store was closed")
        return super()._opened()

    def typed(self, model: type[Model]) -> TypedCollection[Model]:
        """As `StorageStrategy.typed`."""
        return TypedCollection(self._target.typed(model), self._loop_thread, self.transaction_type)

    # -- transactions ------------------------------------------------------------------------

    def begin_transaction(
        self, isolation: Isolation | None = None, *, read_only: bool = False
    ) -> Transaction:
        """As `StorageStrategy.begin_transaction`, for use with `with`."""
        return self.transaction_type(
            self._target.begin_transaction(isolation, read_only=read_only), self._opened()
        )

    def run_transaction(
        self,
        work: Callable[[Transaction], Result],
        *,
        isolation: Isolation | None = None,
        read_only: bool = False,
        retry_seconds: float = RETRY_SECONDS,
    ) -> Result:
        """As `StorageStrategy.run_transaction`; `work` is called in the calling thread."""
        check_callable(work, "work")
        loop_thread = self._opened()
        caller = loop_thread.caller()

        async def work_in_thread(tx: transaction.Transaction) -> Result:
            return await caller.call_back(lambda: work(self.transaction_type(tx, loop_thread)))

        return caller.run(
            partial(
                self._target.run_transaction,
                work_in_thread,
                isolation=isolation,
                read_only=read_only,
                retry_seconds=retry_seconds,
            )
        )

    @contextmanager
    def snapshot(self, *, expired: bool = False) -> Iterator[Snapshot]:
        """As `StorageStrategy.snapshot`."""
        with Context(self._opened(), self._target.snapshot(expired=expired)) as reader:
            yield Snapshot(reader, self._loop_thread)

    purge_expired = blocking(strategy.StorageStrategy.purge_expired)
    clear = blocking(strategy.StorageStrategy.clear)

    # -- claims and locks --------------------------------------------------------------------

    def claim_entities(
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
        """As `StorageStrategy.claim_entities`."""
        claim = partial(
            self._target.claim_entities,
            collection,
            filters,
            order_by=order_by,
            limit=limit,
            lease=lease,
            owner=owner,
            wait=wait,
            max_attempts=max_attempts,
        )
        return [self._claim(each) for each in self._run(claim)]

    def _claim(self, claim: claims.Claim) -> Claim:
        return Claim(claim, self._opened(), self.transaction_type)

    @contextmanager
    def lock(
        self, name: str, *, lease: float = LEASE_SECONDS, timeout: float | None = None
    ) -> Iterator[Claim]:
        """As `StorageStrategy.lock`, for use with `with`. `Claim` says what happens if it is lost."""
        names = [claims.check_name(name, "name")]
        with self._acquired(names, lease, timeout) as claim:
            yield claim

    @contextmanager
    def permits(
        self,
        name: str,
        limit: int,
        *,
        lease: float = LEASE_SECONDS,
        timeout: float | None = None,
    ) -> Iterator[Claim]:
        """As `StorageStrategy.permits`, for use with `with`. `Claim` says what happens if it is lost."""
        with self._acquired(claims.permit_names(name, limit), lease, timeout) as claim:
            yield claim

    def _acquired(self, names: list[str], lease: float, timeout: float | None) -> Claim:
        acquire = partial(self._target._acquired, names, lease, timeout)
        return self._claim(self._run(acquire))

    claims = blocking(strategy.StorageStrategy.claims)
    break_claim = blocking(strategy.StorageStrategy.break_claim)

    # -- watching ----------------------------------------------------------------------------

    @contextmanager
    def watch(
        self, collection: str, filters: Filters = None, *, since: str | None = None
    ) -> Iterator[Changes[EntityChange]]:
        """As `StorageStrategy.watch`, for use with `with`. Closing the store ends it."""
        watched = self._target.watch(collection, filters, since=since)
        with Context(self._opened(), watched) as changes:
            yield Changes(changes, self._loop_thread)

    @contextmanager
    def subscribe(
        self, name: str, collection: str, filters: Filters = None
    ) -> Iterator[Subscription]:
        """As `StorageStrategy.subscribe`, for use with `with`. Closing the store ends it."""
        subscribed = self._target.subscribe(name, collection, filters)
        with Context(self._opened(), subscribed) as changes:
            yield Subscription(changes, self._loop_thread)

    wait_for = blocking(strategy.StorageStrategy.wait_for)
    subscriptions = blocking(strategy.StorageStrategy.subscriptions)
    drop_subscription = blocking(strategy.StorageStrategy.drop_subscription)

    # -- declarations and health -------------------------------------------------------------

    recorded_collections = blocking(strategy.StorageStrategy.recorded_collections)
    schema_changes = blocking(strategy.StorageStrategy.schema_changes)
    exists = blocking(strategy.StorageStrategy.exists)
    undeclared = blocking(strategy.StorageStrategy.undeclared)
    explain_query = blocking(strategy.StorageStrategy.explain_query)
    test_connection = blocking(strategy.StorageStrategy.test_connection)
    health = blocking(strategy.StorageStrategy.health)

    def apply_schema(
        self,
        progress: SchemaProgress | None = None,
        complete: bool = False,
        transform: Transforms | None = None,
    ) -> int:
        """As `StorageStrategy.apply_schema`. The functions of `transform` are called in the calling thread;
        `progress` is called in another one, and must not use the store."""
        caller = self._caller()
        functions = passed_functions(caller, transform)
        return caller.run(partial(self._target.apply_schema, progress, complete, functions))

    def is_same_store(self, other: Store) -> bool:
        """As `StorageStrategy.is_same_store`."""
        return self._run(partial(self._target.is_same_store, other._target))

    def describe(self) -> dict[str, Value]:
        """As `StorageStrategy.describe`."""
        return self._target.describe()
