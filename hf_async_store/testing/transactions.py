"""Cases 35 to 46: transactions, savepoints and `run_transaction`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store.changes import ABSENT
from hf_async_store.errors import (
    AlreadyExistsError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidInputError,
    InvalidQueryError,
    RetriesExhaustedError,
    StorageError,
    TransactionAbortedError,
    TransactionClosedError,
    TransactionReentryError,
    TransactionTooLargeError,
    UnavailableError,
)
from hf_async_store.query import gte
from hf_async_store.testing.concurrency import (
    HANG_SECONDS,
    PATIENCE,
    answer_of,
    elsewhere,
    failure_of,
    has_ended,
    second_store,
)
from hf_async_store.testing.harness import ObservesIO, skip_fault
from hf_async_store.values import MAX_ENTITY_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from hf_async_store.driver import Engine, Isolation, Session
    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.transaction import Transaction
    from hf_async_store.values import Entity

_Verb = Callable[["RepositoryInterface"], Awaitable[object]]


class _CallerError(Exception):
    """An exception of the caller."""


class _Stop(BaseException):
    """An exception that `except Exception` does not catch, like a cancellation or an interrupt."""


def item(item_id: str, **fields: object) -> dict[str, object]:
    return {"item_id": item_id, **fields}


async def labels(repository: RepositoryInterface, *ids: str) -> list[object]:
    """The field `label` of each entity; None for a missing entity."""
    found = await repository.get_entities("items", ids)
    return [None if each is None else each.get("label") for each in found]


async def version_of(repository: RepositoryInterface, item_id: str) -> object:
    entity = await repository.get_entity("items", item_id)
    return None if entity is None else entity["version"]


class _FailingCommit:
    """Wraps an engine and lets its sessions fail at commit."""

    def __init__(self, engine: Engine, failure: Exception) -> None:
        self._engine = engine
        self._failure = failure

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @asynccontextmanager
    async def session(self, isolation: Isolation | None) -> AsyncGenerator[Session, None]:
        async with self._engine.session(isolation) as session:
            yield session
            raise self._failure

    retried_session = session


_STALE: Final = 7
"""A version that no entity has in these cases."""

FAILING_CHANGES: Final[dict[str, tuple[_Verb, type[StorageError], str]]] = {
    "create of what is there": (
        lambda tx: tx.create_entity("items", item("old")),
        AlreadyExistsError,
        "old",
    ),
    "save of what must be absent": (
        lambda tx: tx.save_entity("items", item("old"), expected_version=ABSENT),
        AlreadyExistsError,
        "old",
    ),
    "save at a stale version": (
        lambda tx: tx.save_entity("items", item("old"), expected_version=_STALE),
        ConcurrencyConflictError,
        "old",
    ),
    "save at a version of nothing": (
        lambda tx: tx.save_entity("items", item("none"), expected_version=1),
        EntityNotFoundError,
        "none",
    ),
    "update of nothing": (
        lambda tx: tx.update_entity("items", "none", {"label": "x"}),
        EntityNotFoundError,
        "none",
    ),
    "update at a stale version": (
        lambda tx: tx.update_entity("items", "old", {"label": "x"}, expected_version=_STALE),
        ConcurrencyConflictError,
        "old",
    ),
    "delete at a stale version": (
        lambda tx: tx.delete_entity("items", "old", expected_version=_STALE),
        ConcurrencyConflictError,
        "old",
    ),
    "one of a batch": (
        lambda tx: tx.save_entities(
            "items", [item("b1"), item("old"), item("b2")], {"old": _STALE}
        ),
        ConcurrencyConflictError,
        "old",
    ),
    "one of a batch of updates": (
        lambda tx: tx.update_entities("items", {"old": {"label": "x"}, "none": {"label": "x"}}),
        EntityNotFoundError,
        "none",
    ),
}


async def _all_entities(store: StorageStrategy) -> tuple[object, ...]:
    template = await store.get_entity("templates", "t")
    request = await store.get_entity("requests", "r")
    machines = await store.get_entities("machines", [f"m{n}" for n in range(5)])
    account = await store.get_entity("accounts", "a")
    assert account is not None
    return (
        template and template["template_id"],
        request and request["request_id"],
        [each and each["machine_id"] for each in machines],
        account["balance"],
        await store.get_entity("counters", "gone") is not None,
    )


async def _query_ids(repository: RepositoryInterface, filters: Any) -> list[object]:
    found = await repository.query_entities("items", filters, "item_id")
    return [each["item_id"] for each in found]


async def _run_with_rival(
    work: Callable[[Callable[[], Awaitable[bool]]], Awaitable[bool]],
    rival: Callable[[], Coroutine[Any, Any, None]],
    *,
    before: bool = False,
) -> Exception | None:
    """Run a rival in the run_rival of a transaction that depends on what the rival changes.

    Either the rival completes, and the transaction must end with a conflict; or the rival has to
    wait until the transaction is over.

    Args:
        work: runs the transaction, and awaits its argument to run the rival; returns the result of
            that, which is whether the rival has completed.
        before: the transaction may also commit, because it can be ordered before the rival.

    Returns:
        The error of the transaction, or None if it committed.
    """
    started: list[asyncio.Task[None]] = []

    async def run_rival() -> bool:
        started.append(asyncio.create_task(rival()))
        return await has_ended(*started)

    rival_completed = False

    async def whole() -> None:
        nonlocal rival_completed
        rival_completed = await work(run_rival)

    async with asyncio.timeout(HANG_SECONDS):
        failure = await failure_of(whole())
        await asyncio.gather(*started)
    if failure is not None:
        assert isinstance(failure, ConcurrencyConflictError), failure
        assert failure.retryable
    else:
        assert before or not rival_completed, (
            "the transaction committed although an entity that it depends on was changed"
        )
    return failure


def _may_be_ordered_before(store: StorageStrategy) -> bool:
    """Whether a transaction may commit if it can be ordered before the one that changed what it read."""
    return store.capabilities.read_conflict_policy == "ordered"


async def _check_write_skew(
    store: StorageStrategy,
    on_call: Callable[[Transaction], Awaitable[list[str]]],
    sign_off: Callable[[Transaction, str], Awaitable[object]],
) -> None:
    """Write skew: of two people on call, each signs off if the other one is still on call.

    If the engine allows it, both have read who is on call before either signs off.
    """
    has_read = {name: asyncio.Event() for name in ("ann", "bob")}

    async def one(name: str, other: str) -> None:
        async with store.begin_transaction() as tx:
            there = await on_call(tx)
            has_read[name].set()
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    await has_read[other].wait()
            if other in there:
                await sign_off(tx, name)

    async with asyncio.timeout(HANG_SECONDS):
        failures = await asyncio.gather(
            failure_of(one("ann", "bob")), failure_of(one("bob", "ann"))
        )
    for failure in failures:
        if failure is not None:
            assert isinstance(failure, ConcurrencyConflictError)
            assert failure.retryable
    # If both failed, nobody has signed off, and both can retry.
    async with store.begin_transaction() as tx:
        assert len(await on_call(tx)) == 1 + (None not in failures)


async def _check_all_verbs_refuse(tx: Transaction) -> None:
    for verb in (
        tx.create_entity("items", item("b")),
        tx.save_entity("items", item("a")),
        tx.update_entity("items", "a", {"label": "x"}),
        tx.conditional_update("items", "a", {"label": "x"}),
        tx.delete_entity("items", "a"),
        tx.get_entity("items", "a"),
        tx.save_entities("items", [item("a")]),
        tx.get_entities("items", ["a"]),
        tx.query_entities("items"),
        tx.query_page("items"),
        tx.count_entities("items"),
        anext(tx.stream_entities("items")),
    ):
        with pytest.raises(TransactionClosedError):
            await verb
    with pytest.raises(TransactionClosedError):
        tx.begin_transaction()


_ACTIVE: Final = {"active": True}


async def _queried(tx: Transaction, order_by: str | None = None) -> int:
    return len(await tx.query_entities("items", _ACTIVE, order_by))


async def _on_a_page(tx: Transaction) -> int:
    return len((await tx.query_page("items", _ACTIVE)).items)


async def _streamed(tx: Transaction) -> int:
    return len([each async for each in tx.stream_entities("items", _ACTIVE)])


_COUNTS: Final[dict[str, Callable[[Transaction], Awaitable[int]]]] = {
    "query": _queried,
    "ordered query": lambda tx: _queried(tx, "-count"),
    "page": _on_a_page,
    "stream": _streamed,
    "count": lambda tx: tx.count_entities("items", _ACTIVE),
}
"""The number of active items, by each kind of query."""


class TransactionContract:
    """Cases 35 to 46."""

    # -- 35: commit --------------------------------------------------------------------------

    async def test_35_commit_shows_everything_across_collections(
        self, store: StorageStrategy, harness: Harness
    ) -> None:
        await store.create_entity("accounts", {"account_id": "a", "balance": 1})
        await store.create_entity("counters", {"counter_id": "gone"})
        async with store.begin_transaction() as tx:
            await tx.create_entity("templates", {"template_id": "t"})
            await tx.save_entity("requests", {"request_id": "r", "template_id": "t"})
            await tx.create_entities(
                "machines", [{"machine_id": f"m{n}", "request_id": "r"} for n in range(5)]
            )
            await tx.update_entity("accounts", "a", {"balance": 2}, expected_version=1)
            assert await tx.delete_entity("counters", "gone")
            assert await elsewhere(_all_entities(store)) == (None, None, [None] * 5, 1, True)
        shown = ("t", "r", [f"m{n}" for n in range(5)], 2, False)
        assert await _all_entities(store) == shown
        async with second_store(harness, store) as other:
            assert await _all_entities(other) == shown

    async def test_35_commit_is_durable(self, store: StorageStrategy, harness: Harness) -> None:
        if not harness.capabilities.durable:
            pytest.skip("the engine is not durable")
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", item("a", label="x"))
            await tx.create_entity("counters", {"counter_id": "c"})
        await store.close()
        async with harness.store() as again:
            assert await labels(again, "a") == ["x"]
            assert await again.get_entity("counters", "c") is not None

    async def test_35_every_declared_isolation_commits(self, store: StorageStrategy) -> None:
        for n, isolation in enumerate(store.capabilities.isolations):
            async with store.begin_transaction(isolation) as tx:
                await tx.create_entity("items", item(isolation))
            assert await version_of(store, isolation) == 1, n

    async def test_35_an_undeclared_isolation_is_refused(self, store: StorageStrategy) -> None:
        known: tuple[Isolation, ...] = ("serializable", "repeatable_read", "read_committed")
        for isolation in (*known, "chaos"):
            if isolation not in store.capabilities.isolations:
                with pytest.raises(InvalidInputError):
                    store.begin_transaction(isolation)  # type: ignore[arg-type]

    async def test_35_several_tasks_share_a_transaction(self, store: StorageStrategy) -> None:
        async with store.begin_transaction() as tx, asyncio.TaskGroup() as group:
            for n in range(10):
                group.create_task(tx.create_entity("items", item(f"i{n}", label=str(n))))
        assert await labels(store, *(f"i{n}" for n in range(10))) == [str(n) for n in range(10)]

    # -- 36: rollback ------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "failure",
        [
            _CallerError("x"),
            asyncio.CancelledError("x"),
            _Stop("x"),
            EntityNotFoundError("items", "x"),
            StopAsyncIteration(),
        ],
        ids=lambda failure: type(failure).__name__,
    )
    async def test_36_an_exception_rolls_back_and_propagates(
        self, store: StorageStrategy, failure: BaseException
    ) -> None:
        await store.create_entities("items", [item("kept", label="old"), item("gone", label="old")])
        with pytest.raises(type(failure)) as caught:
            async with store.begin_transaction() as tx:
                await tx.create_entity("items", item("new", label="new"))
                await tx.update_entity("items", "kept", {"label": "new"})
                await tx.delete_entity("items", "gone")
                await tx.save_entity("counters", {"counter_id": "c"})
                raise failure
        assert caught.value is failure
        assert await labels(store, "new", "kept", "gone") == [None, "old", "old"]
        assert await version_of(store, "kept") == 1
        assert await store.get_entity("counters", "c") is None
        assert await store.count_entities("items") == 2

    async def test_36_the_store_is_usable_after_a_rollback(self, store: StorageStrategy) -> None:
        for n in range(20):
            with suppress(_CallerError):
                async with store.begin_transaction() as tx:
                    await tx.save_entity("items", item("a", label=str(n)))
                    raise _CallerError
            assert await version_of(store, "a") is None
        async with store.begin_transaction() as tx:
            assert await tx.create_entity("items", item("a")) == 1

    async def test_36_another_store_never_sees_a_rolled_back_write(
        self, store: StorageStrategy, harness: Harness
    ) -> None:
        await store.create_entity("items", item("a", label="old"))
        async with second_store(harness, store) as other:
            with suppress(_CallerError):
                async with store.begin_transaction() as tx:
                    await tx.update_entity("items", "a", {"label": "new"})
                    assert await elsewhere(labels(other, "a")) == ["old"]
                    raise _CallerError
            assert await labels(other, "a") == ["old"]

    # -- 37: its own writes ------------------------------------------------------------------

    async def test_37_reads_see_its_own_writes(self, store: StorageStrategy) -> None:
        await store.create_entities(
            "items", [item("kept", label="old", count=1), item("gone"), item("same", label="old")]
        )
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", item("new", label="new"))
            await tx.update_entity("items", "kept", {"label": "new"})
            await tx.delete_entity("items", "gone")
            assert await labels(tx, "new", "kept", "gone", "same") == ["new", "new", None, "old"]
            kept = await tx.get_entity("items", "kept")
            assert kept is not None
            assert (kept["version"], kept["count"]) == (2, 1)
            assert await tx.conditional_update("items", "kept", {"count": 2}) == 3
            assert await version_of(tx, "kept") == 3

    async def test_37_queries_see_its_own_writes_as_declared(self, store: StorageStrategy) -> None:
        before = [item("gone", count=1), item("moved", count=0), item("same", count=5)]
        await store.create_entities("items", before)
        filters = {"count": gte(1)}
        outside = await answer_of(
            store.capabilities, lambda: _query_ids(store, filters), ["gone", "same"]
        )
        assert outside == ["gone", "same"]
        inside = store.capabilities.queries_in_transaction != "outside"
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", item("new", count=2))
            await tx.update_entity("items", "moved", {"count": 3})
            await tx.delete_entity("items", "gone")
            expected = ["moved", "new", "same"] if inside else ["gone", "same"]
            assert await _query_ids(tx, filters) == expected
            assert await tx.count_entities("items", filters) == len(expected)
            streamed = [each["item_id"] async for each in tx.stream_entities("items", filters)]
            assert sorted(map(str, streamed)) == expected
            page = await tx.query_page("items", filters, "item_id", limit=1)
            assert [each["item_id"] for each in page.items] == expected[:1]
            rest = await tx.query_page("items", filters, "item_id", limit=9, cursor=page.cursor)
            assert [each["item_id"] for each in rest.items] == expected[1:]

    async def test_37_reads_are_what_is_stored(self, store: StorageStrategy) -> None:
        await store.create_entities("items", [item("replaced", label="old"), item("changed")])
        ids = ["new", "replaced", "changed"]
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", item("new"))
            await tx.save_entity("items", item("replaced", label="new"))
            await tx.update_entity("items", "changed", {"label": "new"})
            found = await tx.get_entities("items", ids)
        assert await store.get_entities("items", ids) == found, "with all versions and times"

    async def test_37_reads_return_copies(self, store: StorageStrategy) -> None:
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", item("a", data={"list": [1]}))
            for _ in range(2):
                entity = await tx.get_entity("items", "a")
                assert entity is not None
                assert entity["data"] == {"list": [1]}
                entity["data"] = None

    # -- 38: several writes to one id --------------------------------------------------------

    async def test_38_create_update_delete_of_one_id(self, store: StorageStrategy) -> None:
        async with store.begin_transaction() as tx:
            assert await tx.create_entity("items", item("a", label="1")) == 1
            assert await tx.update_entity("items", "a", {"label": "2"}, expected_version=1) == 2
            assert await tx.save_entity("items", item("a", label="3"), expected_version=2) == 3
            assert await tx.delete_entity("items", "a", expected_version=3)
            assert not await tx.delete_entity("items", "a")
        assert await store.get_entity("items", "a") is None
        assert await store.create_entity("items", item("a")) == 1

    async def test_38_delete_and_create_restart_the_version(self, store: StorageStrategy) -> None:
        await store.create_entity("items", item("a", label="old", count=1))
        await store.update_entity("items", "a", {"count": 2})
        async with store.begin_transaction() as tx:
            assert await tx.delete_entity("items", "a", expected_version=2)
            with_absent = await tx.save_entity(
                "items", item("a", label="new"), expected_version=ABSENT
            )
            assert with_absent == 1
        entity = await store.get_entity("items", "a")
        assert entity is not None
        assert (entity["version"], entity["label"]) == (1, "new")
        assert "count" not in entity

    async def test_38_each_write_increments_the_version(self, store: StorageStrategy) -> None:
        await store.create_entity("items", item("a", label="0"))
        async with store.begin_transaction() as tx:
            assert await tx.update_entity("items", "a", {"label": "1"}) == 2
            assert await tx.update_entity("items", "a", {"count": 1}) == 3
            assert await tx.save_entities("items", [item("a", label="2"), item("b")] * 2) == [
                4,
                1,
                5,
                2,
            ]
        assert [await version_of(store, each) for each in ("a", "b")] == [5, 2]
        assert await labels(store, "a") == ["2"]

    async def test_38_repeated_writes_keep_the_first_condition(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", item("a", label="0"))
        with pytest.raises(ConcurrencyConflictError):
            async with store.begin_transaction() as tx:
                await tx.update_entity("items", "a", {"label": "1"}, expected_version=_STALE)
                await tx.update_entity("items", "a", {"label": "2"})
        assert await labels(store, "a") == ["0"]

        async def overtake() -> None:
            await store.update_entity("items", "a", {"count": 1})

        async def write_twice(rival: Callable[[], Awaitable[bool]]) -> bool:
            async with store.begin_transaction() as tx:
                await tx.update_entity("items", "a", {"label": "1"}, expected_version=1)
                rival_completed = await rival()
                await tx.update_entity("items", "a", {"label": "2"})
                return rival_completed

        failure = await _run_with_rival(write_twice, overtake)
        expected = (3, "2") if failure is None else (1, "0")
        entity = await store.get_entity("items", "a")
        assert entity is not None
        # The write of the rival was applied after the transaction, or the transaction failed.
        assert (entity["version"], entity["label"]) == (expected[0] + 1, expected[1])
        assert entity["count"] == 1

    # -- 39: a change that fails -------------------------------------------------------------

    @pytest.mark.parametrize("change", FAILING_CHANGES)
    async def test_39_a_failed_change_aborts_the_transaction(
        self, store: StorageStrategy, change: str
    ) -> None:
        verb, kind, entity_id = FAILING_CHANGES[change]
        await store.create_entity("items", item("old", label="old"))
        with pytest.raises(kind) as caught:
            async with store.begin_transaction() as tx:
                await tx.create_entity("items", item("new"))
                await tx.update_entity("items", "old", {"label": "new"})
                await verb(tx)
        assert vars(caught.value)["collection"] == "items"
        assert vars(caught.value)["entity_id"] == entity_id
        assert await labels(store, "new", "old", "b1", "b2") == [None, "old", None, None]

    async def test_39_a_conflict_names_expected_and_actual(self, store: StorageStrategy) -> None:
        await store.create_entity("items", item("a"))
        with pytest.raises(ConcurrencyConflictError) as caught:
            async with store.begin_transaction() as tx:
                await tx.update_entity("items", "a", {"label": "x"}, expected_version=_STALE)
        assert (caught.value.expected, caught.value.actual) == (_STALE, 1)
        assert not caught.value.retryable

    async def test_39_the_first_of_several_failures_is_raised(self, store: StorageStrategy) -> None:
        await store.create_entities("items", [item("a"), item("b")])
        for order in (("a", "b", "none"), ("a", "none", "b"), ("b", "a", "none")):
            with pytest.raises((ConcurrencyConflictError, EntityNotFoundError)) as caught:
                async with store.begin_transaction() as tx:
                    updates = {each: {"label": "x"} for each in order}
                    await tx.update_entities("items", updates, {"b": _STALE})
            failed = next(each for each in order if each != "a")
            assert getattr(caught.value, "entity_id", None) == failed, order
        assert await labels(store, "a", "b") == [None, None]

    async def test_39_an_invalid_argument_does_not_abort_the_transaction(
        self, store: StorageStrategy
    ) -> None:
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", item("a"))
            for refused in (
                tx.create_entity("items", item("")),
                tx.create_entity("items", item("b", count="one")),
                tx.save_entity("nowhere", item("b")),
                tx.update_entity("items", "a", {}, expected_version=-1),
                tx.query_entities("items", 5),  # type: ignore[arg-type]
            ):
                with pytest.raises(InvalidInputError):
                    await refused
        assert await version_of(store, "a") == 1

    # -- 40: an entity that another changes --------------------------------------------------

    @pytest.mark.parametrize("rival", ["updates", "deletes", "recreates"])
    async def test_40_an_entity_was_read_and_is_changed_concurrently(
        self, store: StorageStrategy, rival: str
    ) -> None:
        await store.create_entities("items", [item("read", label="old"), item("written")])

        async def change() -> None:
            if rival == "updates":
                await store.update_entity("items", "read", {"label": "new"})
                return
            await store.delete_entity("items", "read")
            if rival == "recreates":
                await store.create_entity("items", item("read", label="new"))

        async def depend(run_rival: Callable[[], Awaitable[bool]]) -> bool:
            async with store.begin_transaction() as tx:
                [seen] = await labels(tx, "read")
                rival_completed = await run_rival()
                await tx.update_entity("items", "written", {"label": seen})
                return rival_completed

        failure = await _run_with_rival(depend, change, before=_may_be_ordered_before(store))
        after = {"updates": "new", "deletes": None, "recreates": "new"}[rival]
        assert await labels(store, "read", "written") == [after, None if failure else "old"]

    async def test_40_a_missing_entity_was_read_and_is_created_concurrently(
        self, store: StorageStrategy
    ) -> None:
        async def change() -> None:
            await store.create_entity("items", item("read", label="new"))

        async def depend(run_rival: Callable[[], Awaitable[bool]]) -> bool:
            async with store.begin_transaction() as tx:
                assert await labels(tx, "read") == [None]
                rival_completed = await run_rival()
                await tx.create_entity("items", item("written", label="there was none"))
                return rival_completed

        failure = await _run_with_rival(depend, change, before=_may_be_ordered_before(store))
        written = None if failure else "there was none"
        assert await labels(store, "read", "written") == ["new", written]

    async def test_40_conditional_update_checks_the_version_that_was_read(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", item("a", label="old", count=1))

        async def change() -> None:
            await store.update_entity("items", "a", {"count": 2})

        async def depend(run_rival: Callable[[], Awaitable[bool]]) -> bool:
            async with store.begin_transaction() as tx:
                assert await version_of(tx, "a") == 1
                rival_completed = await run_rival()
                await tx.conditional_update("items", "a", {"label": "new"})
                return rival_completed

        failure = await _run_with_rival(depend, change)
        assert await labels(store, "a") == ["old" if failure else "new"]
        assert await version_of(store, "a") == (2 if failure else 3)

    async def test_40_conditional_update_of_a_missing_entity(self, store: StorageStrategy) -> None:
        with pytest.raises(EntityNotFoundError):
            async with store.begin_transaction() as tx:
                await tx.conditional_update("items", "none", {"label": "x"})
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", item("a"))
            assert await tx.conditional_update("items", "a", {"label": "x"}) == 2
        assert await labels(store, "a") == ["x"]

    @pytest.mark.parametrize("then", ["ends", "writes"])
    @pytest.mark.parametrize("second", ["by key", "by query"])
    async def test_40_what_was_read_in_several_calls_is_of_one_moment(
        self, store: StorageStrategy, harness: Harness, second: str, then: str
    ) -> None:
        """Otherwise the transaction ends with a conflict, at the latest at its commit."""
        if second == "by query" and store.capabilities.queries_in_transaction != "serializable":
            pytest.skip("the engine does not declare serializable queries")
        await store.create_entities("items", [item("a", label="old"), item("b", label="old")])

        async def change_both(tx: Transaction) -> None:
            await tx.update_entities("items", {"b": {"label": "new"}, "a": {"label": "new"}})

        seen: list[object] = []

        async def depend(run_rival: Callable[[], Awaitable[bool]]) -> bool:
            async with store.begin_transaction() as tx:
                seen.extend(await labels(tx, "a"))
                rival_completed = await run_rival()
                if second == "by key":
                    seen.extend(await labels(tx, "b"))
                else:
                    found = await tx.query_entities("items", {"item_id": "b"})
                    seen.extend(each["label"] for each in found)
                if then == "writes":
                    await tx.create_entity("items", item("written"))
                return rival_completed

        async with second_store(harness, store) as other:
            failure = await _run_with_rival(
                depend, lambda: other.run_transaction(change_both), before=True
            )
        if failure is None:
            assert seen == ["old", "old"]
        assert await labels(store, "a", "b") == ["new", "new"]
        written = failure is None and then == "writes"
        assert await version_of(store, "written") == (1 if written else None)

    # -- 41: write skew ----------------------------------------------------------------------

    async def test_41_write_skew_is_prevented(self, store: StorageStrategy) -> None:
        await store.create_entities("items", [item("ann", active=True), item("bob", active=True)])

        async def on_call(tx: Transaction) -> list[str]:
            both = await tx.get_entities("items", ["ann", "bob"])
            return [str(each["item_id"]) for each in both if each and each["active"]]

        await _check_write_skew(
            store, on_call, lambda tx, name: tx.update_entity("items", name, {"active": False})
        )

    async def test_41_write_skew_by_missing_entities_is_prevented(
        self, store: StorageStrategy
    ) -> None:
        # To sign off is to create an entity; a missing entity means that the person is on call.
        async def on_call(tx: Transaction) -> list[str]:
            both = await tx.get_entities("counters", ["ann", "bob"])
            return [name for name, note in zip(("ann", "bob"), both, strict=True) if note is None]

        await _check_write_skew(
            store, on_call, lambda tx, name: tx.create_entity("counters", {"counter_id": name})
        )

    async def test_41_write_skew_by_queries_is_prevented_if_declared(
        self, store: StorageStrategy
    ) -> None:
        if store.capabilities.queries_in_transaction != "serializable":
            pytest.skip("the engine does not declare serializable queries")
        await store.create_entities("items", [item("ann", active=True), item("bob", active=True)])

        async def on_call(tx: Transaction) -> list[str]:
            there = await tx.query_entities("items", {"active": True})
            return [str(each["item_id"]) for each in there]

        await _check_write_skew(
            store, on_call, lambda tx, name: tx.update_entity("items", name, {"active": False})
        )

    @pytest.mark.parametrize("how", _COUNTS)
    @pytest.mark.parametrize("rival", ["creates", "updates"])
    async def test_41_a_phantom_is_a_conflict_if_declared(
        self, store: StorageStrategy, harness: Harness, rival: str, how: str
    ) -> None:
        """Each of two transactions must see what the other one writes, so that no order explains both."""
        if store.capabilities.queries_in_transaction != "serializable":
            pytest.skip("the engine does not declare serializable queries")
        await store.create_entities(
            "items", [item("there", active=True), item("noted", label="old")]
        )
        if rival == "updates":
            await store.create_entity("items", item("phantom", active=False))

        async def add_a_match(tx: Transaction) -> None:
            [noted] = await labels(tx, "noted")
            await tx.save_entity("items", item("phantom", active=True, label=noted))

        async def depend(run_rival: Callable[[], Awaitable[bool]]) -> bool:
            async with store.begin_transaction() as tx:
                assert await _COUNTS[how](tx) == 1
                rival_completed = await run_rival()
                await tx.update_entity("items", "noted", {"label": "there is one"})
                return rival_completed

        async with second_store(harness, store) as other:
            failure = await _run_with_rival(depend, lambda: other.run_transaction(add_a_match))
        noted = "old" if failure else "there is one"
        assert await labels(store, "noted", "phantom") == [noted, noted]

    # -- 42: limits --------------------------------------------------------------------------

    async def test_42_the_declared_limit_of_changes(self, store: StorageStrategy) -> None:
        limit = store.capabilities.max_transaction_changes
        if limit is None:
            async with store.begin_transaction() as tx:
                await tx.save_entities("items", [item(f"i{n}") for n in range(1500)])
            assert await store.count_entities("items") == 1500
            return
        with pytest.raises(TransactionTooLargeError):
            async with store.begin_transaction() as tx:
                await tx.save_entities("items", [item(f"i{n}") for n in range(limit)])
                await tx.create_entity("items", item("one more"))
        found = await store.get_entities("items", [*(f"i{n}" for n in range(limit)), "one more"])
        assert found == [None] * (limit + 1)
        async with store.begin_transaction() as tx:
            await tx.save_entities("items", [item(f"i{n}") for n in range(limit)])
        assert None not in await store.get_entities("items", [f"i{n}" for n in range(limit)])

    async def test_42_the_declared_size_limit(self, store: StorageStrategy) -> None:
        limit = store.capabilities.max_transaction_bytes
        entity_bytes = MAX_ENTITY_BYTES * 3 // 4
        fitting = 20 if limit is None else (limit - limit // 20) // entity_bytes
        entities = [item(f"i{n}", filler="x" * entity_bytes) for n in range(fitting)]
        async with store.begin_transaction() as tx:
            await tx.save_entities("items", entities)
        assert [await version_of(store, f"i{n}") for n in range(fitting)] == [1] * fitting
        if limit is None:
            return
        too_much = [item(f"j{n}", filler="x" * entity_bytes) for n in range(fitting + 2)]
        with pytest.raises(TransactionTooLargeError):
            async with store.begin_transaction() as tx:
                await tx.save_entities("items", too_much)
        assert {await version_of(store, f"j{n}") for n in range(fitting + 2)} == {None}

    # -- 43: empty and ended -----------------------------------------------------------------

    async def test_43_an_empty_transaction_does_no_io(self, harness: Harness) -> None:
        async with harness.store() as store:
            async with store.begin_transaction():
                pass
            with suppress(_CallerError):
                async with store.begin_transaction():
                    raise _CallerError
        if not isinstance(harness, ObservesIO):
            skip_fault(harness, ObservesIO)
        assert not harness.touched()

    async def test_43_use_after_the_end_is_refused(self, store: StorageStrategy) -> None:
        async with store.begin_transaction() as committed:
            await committed.create_entity("items", item("a"))
        with suppress(_CallerError):
            async with store.begin_transaction() as rolled_back:
                raise _CallerError
        for tx in (committed, rolled_back, store.begin_transaction()):
            await _check_all_verbs_refuse(tx)
        assert await version_of(store, "a") == 1

    async def test_43_a_transaction_can_be_entered_only_once(self, store: StorageStrategy) -> None:
        tx = store.begin_transaction()
        async with tx:
            await tx.create_entity("items", item("a"))
        with pytest.raises(TransactionClosedError):
            async with tx:
                pass
        assert await store.delete_entity("items", "a")

    # -- 44: savepoints ----------------------------------------------------------------------

    async def test_44_undeclared_savepoints_are_refused(self, store: StorageStrategy) -> None:
        if store.capabilities.savepoints:
            pytest.skip("the engine declares savepoints")
        with pytest.raises(StorageError):
            async with store.begin_transaction() as tx, tx.begin_transaction() as inner:
                await inner.create_entity("items", item("a"))
        assert await version_of(store, "a") is None

    async def test_44_an_inner_rollback_keeps_the_outer_work(
        self, store_with_savepoints: StorageStrategy
    ) -> None:
        store = store_with_savepoints
        await store.create_entities("items", [item("kept", label="0"), item("gone", label="0")])
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", item("outer", label="1"))
            await tx.update_entity("items", "kept", {"label": "1"})
            with pytest.raises(_CallerError):
                async with tx.begin_transaction() as inner:
                    assert await inner.create_entity("items", item("inner", label="2")) == 1
                    assert await inner.update_entity("items", "kept", {"label": "2"}) == 3
                    assert await inner.delete_entity("items", "gone")
                    assert await inner.delete_entity("items", "outer")
                    seen = await labels(inner, "outer", "inner", "kept", "gone")
                    assert seen == [None, "2", "2", None]
                    raise _CallerError
            assert await labels(tx, "outer", "inner", "kept", "gone") == ["1", None, "1", "0"]
            assert await tx.update_entity("items", "kept", {"count": 1}, expected_version=2) == 3
        assert await labels(store, "outer", "inner", "kept", "gone") == ["1", None, "1", "0"]

    async def test_44_inner_changes_are_committed_by_the_outer_transaction(
        self, store_with_savepoints: StorageStrategy
    ) -> None:
        store = store_with_savepoints
        for end in (None, _CallerError()):
            with suppress(_CallerError):
                async with store.begin_transaction() as tx:
                    async with tx.begin_transaction() as inner:
                        await inner.create_entity("items", item("a", label="x"))
                    assert await labels(tx, "a") == ["x"]
                    assert await elsewhere(labels(store, "a")) == [None]
                    if end is not None:
                        raise end
            assert await labels(store, "a") == ["x" if end is None else None]
            await store.delete_entity("items", "a")

    async def test_44_nested_savepoints(self, store_with_savepoints: StorageStrategy) -> None:
        store = store_with_savepoints
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", item("0"))
            with suppress(_CallerError):
                async with tx.begin_transaction() as one:
                    await one.create_entity("items", item("1"))
                    async with one.begin_transaction() as two:
                        await two.create_entity("items", item("2"))
                        async with two.begin_transaction() as three:
                            await three.create_entity("items", item("3"))
                    assert await version_of(one, "3") == 1
                    raise _CallerError
            async with tx.begin_transaction() as again:
                await again.create_entity("items", item("1"))
                with suppress(_CallerError):
                    async with again.begin_transaction() as two:
                        await two.save_entity("items", item("1"))
                        raise _CallerError
        assert [await version_of(store, each) for each in "0123"] == [1, 1, None, None]

    async def test_44_a_failed_change_aborts_only_its_savepoint(
        self, store_with_savepoints: StorageStrategy
    ) -> None:
        store = store_with_savepoints
        await store.create_entity("items", item("old", label="old"))
        async with store.begin_transaction() as tx:
            await tx.create_entity("items", item("a"))
            with pytest.raises(AlreadyExistsError):
                async with tx.begin_transaction() as inner:
                    await inner.update_entity("items", "old", {"label": "new"})
                    await inner.create_entity("items", item("a"))
            with pytest.raises(TransactionAbortedError):
                async with tx.begin_transaction() as inner:
                    with suppress(AlreadyExistsError):
                        await inner.create_entity("items", item("a"))
            await tx.create_entity("items", item("b"))
        assert await labels(store, "old") == ["old"]
        assert [await version_of(store, each) for each in "ab"] == [1, 1]

    async def test_44_the_outer_transaction_is_unusable_inside_a_savepoint(
        self, store_with_savepoints: StorageStrategy
    ) -> None:
        store = store_with_savepoints
        async with store.begin_transaction() as tx:
            async with tx.begin_transaction() as inner:
                await inner.create_entity("items", item("a"))
                with pytest.raises(TransactionReentryError):
                    await tx.get_entity("items", "a")
                with pytest.raises(TransactionReentryError):
                    tx.begin_transaction()
            await tx.create_entity("items", item("b"))
        assert [await version_of(store, each) for each in "ab"] == [1, 1]

    async def test_44_reads_of_a_savepoint_are_part_of_the_transaction(
        self, store_with_savepoints: StorageStrategy
    ) -> None:
        store = store_with_savepoints
        await store.create_entities("items", [item("read", label="old"), item("written")])

        async def change() -> None:
            await store.update_entity("items", "read", {"label": "new"})

        async def depend(run_rival: Callable[[], Awaitable[bool]]) -> bool:
            async with store.begin_transaction() as tx:
                seen: list[object] = []
                with suppress(_CallerError):
                    async with tx.begin_transaction() as inner:
                        seen = await labels(inner, "read")
                        raise _CallerError
                rival_completed = await run_rival()
                await tx.update_entity("items", "written", {"label": seen[0]})
                return rival_completed

        failure = await _run_with_rival(depend, change, before=_may_be_ordered_before(store))
        assert await labels(store, "read", "written") == ["new", None if failure else "old"]

    @pytest.fixture
    def store_with_savepoints(self, store: StorageStrategy) -> StorageStrategy:
        if not store.capabilities.savepoints:
            pytest.skip("the engine declares no savepoints")
        return store

    # -- 45: a commit that fails -------------------------------------------------------------

    async def test_45_a_failure_at_commit_is_raised(
        self, store: StorageStrategy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failure = UnavailableError("the connection was lost at commit", outcome_unknown=True)
        with monkeypatch.context() as patch:
            patch.setattr(store, "_engine", _FailingCommit(store.engine, failure))
            with pytest.raises(UnavailableError) as caught:
                async with store.begin_transaction() as tx:
                    await tx.create_entity("items", item("a"))
            assert caught.value is failure
            with pytest.raises(UnavailableError):
                await store.run_transaction(lambda tx: tx.create_entity("items", item("a")))
        assert await version_of(store, "a") is None
        async with store.begin_transaction() as tx:
            assert await tx.create_entity("items", item("a")) == 1

    async def test_45_a_suppressed_failure_is_raised_at_the_end(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", item("old", label="old"))
        with pytest.raises(TransactionAbortedError) as at_end:
            async with store.begin_transaction() as tx:
                await tx.update_entity("items", "old", {"label": "new"})
                with pytest.raises(AlreadyExistsError) as first:
                    await tx.create_entity("items", item("old"))
                for verb in (
                    tx.get_entity("items", "old"),
                    tx.create_entity("items", item("new")),
                    tx.query_entities("items"),
                ):
                    with pytest.raises(TransactionAbortedError) as later:
                        await verb
                    assert later.value.__cause__ is first.value
        assert at_end.value.__cause__ is first.value
        assert await labels(store, "old", "new") == ["old", None]

    async def test_45_modify_entity_is_not_retried_in_an_aborted_transaction(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", item("old", label="old"))
        with pytest.raises(TransactionAbortedError):
            async with store.begin_transaction() as tx:
                with pytest.raises(ConcurrencyConflictError):
                    await tx.update_entity("items", "old", {"label": "x"}, expected_version=_STALE)
                with pytest.raises(TransactionAbortedError):
                    await tx.modify_entity("items", "old", dict, retry_seconds=0.2)
        assert await labels(store, "old") == ["old"]

    async def test_45_a_transaction_left_with_an_open_savepoint_is_aborted(
        self, store_with_savepoints: StorageStrategy
    ) -> None:
        store = store_with_savepoints
        with pytest.raises(TransactionAbortedError):
            async with store.begin_transaction() as tx:
                await tx.create_entity("items", item("a"))
                inner = tx.begin_transaction()
                await inner.__aenter__()
                await inner.create_entity("items", item("b"))
        with suppress(StorageError):
            await inner.__aexit__(None, None, None)
        assert [await version_of(store, each) for each in "ab"] == [None, None]
        assert await store.create_entity("items", item("a")) == 1

    # -- 46: run_transaction -----------------------------------------------------------------

    async def test_46_run_transaction_returns_what_its_function_returns(
        self, store: StorageStrategy
    ) -> None:
        async def work(tx: Transaction) -> str:
            await tx.create_entity("items", item("a"))
            return "done"

        assert await store.run_transaction(work) == "done"
        assert await version_of(store, "a") == 1

    async def test_46_run_transaction_retries_a_conflict(self, store: StorageStrategy) -> None:
        await store.create_entity("items", item("a", label="0"))
        attempts: list[int] = []

        async def work(tx: Transaction) -> None:
            attempts.append(len(attempts))
            await tx.create_entity("items", item(f"try {len(attempts)}"))
            # The expected version is wrong until the third attempt.
            await tx.update_entity(
                "items", "a", {"label": "1"}, expected_version=3 - len(attempts) + 1
            )

        await store.run_transaction(work)
        assert len(attempts) == 3
        assert [await version_of(store, f"try {n}") for n in (1, 2, 3)] == [None, None, 1]
        assert await version_of(store, "a") == 2

    @pytest.mark.parametrize("then", ["writes", "reads again", "reads its own change", "nests"])
    @pytest.mark.parametrize("rival", ["updates", "recreates"])
    async def test_46_run_transaction_relies_on_the_entity_that_it_read(
        self, store: StorageStrategy, harness: Harness, rival: str, then: str
    ) -> None:
        """Also if the one that is written has the same version, of another entity with this id."""
        if then == "nests" and not store.capabilities.savepoints:
            pytest.skip("the engine has no savepoints")
        await store.create_entity("items", item("a", label="old"))
        tried: list[object] = []
        rivals: list[asyncio.Task[None]] = []

        async def change(other: StorageStrategy) -> None:
            if rival == "recreates":
                await other.delete_entity("items", "a")
            await other.save_entity("items", item("a", label="new"))

        async def work(tx: Transaction, other: StorageStrategy) -> None:
            [seen] = await labels(tx, "a")
            tried.append(seen)
            if not rivals:
                rivals.append(asyncio.create_task(change(other)))
                await has_ended(*rivals)
            if then == "reads again":
                assert await labels(tx, "a", "none") == [seen, None]
            entity = item("a", label=f"{seen} and more")
            if then == "nests":
                async with tx.begin_transaction() as nested:
                    await nested.save_entity("items", entity)
            elif seen is None:
                await tx.create_entity("items", entity)
            else:
                await tx.update_entity("items", "a", {"label": entity["label"]})
            if then == "reads its own change":
                assert await labels(tx, "a") == [entity["label"]]

        async with second_store(harness, store) as other, asyncio.timeout(HANG_SECONDS):
            await store.run_transaction(lambda tx: work(tx, other))
            await asyncio.gather(*rivals)
        [label] = await labels(store, "a")
        # The rival was before this transaction, which then read what it had left, or after it.
        assert label in ("new and more", "new")
        assert tried[-1] == ("old" if label == "new" else "new")

    async def test_46_run_transaction_relies_on_the_absence_of_the_store(
        self, store: StorageStrategy, harness: Harness
    ) -> None:
        """Another program may create the store after the first read."""
        rivals: list[asyncio.Task[None]] = []

        async def create(other: StorageStrategy) -> None:
            async with other.begin_transaction() as tx:
                await tx.create_entities("items", [item("a"), item("b", label="new")])

        async def work(tx: Transaction, other: StorageStrategy) -> None:
            first = await tx.get_entity("items", "a")
            if not rivals:
                rivals.append(asyncio.create_task(create(other)))
                await has_ended(*rivals)
            if await tx.get_entity("items", "b") is not None:
                label = "without the other" if first is None else "with the other"
                await tx.update_entity("items", "b", {"label": label})

        async with second_store(harness, store) as other, asyncio.timeout(HANG_SECONDS):
            await store.run_transaction(lambda tx: work(tx, other))
            await asyncio.gather(*rivals)
        assert await labels(store, "b") in (["new"], ["with the other"])

    @pytest.mark.parametrize("end", ["raises", "is refused"])
    async def test_46_run_transaction_undoes_the_change_of_what_it_read(
        self, store: StorageStrategy, end: str
    ) -> None:
        await store.create_entities("items", [item("a", label="old"), item("b", label="old")])

        async def work(tx: Transaction) -> None:
            assert await labels(tx, "a") == ["old"]
            assert await tx.update_entity("items", "a", {"label": "new"}) == 2
            if end == "raises":
                raise _CallerError
            await tx.update_entity("items", "b", {"label": "new"}, expected_version=_STALE)

        with pytest.raises(_CallerError if end == "raises" else RetriesExhaustedError):
            await store.run_transaction(work, retry_seconds=0.05)
        assert await labels(store, "a", "b") == ["old", "old"]

    async def test_46_run_transaction_retries_a_suppressed_conflict(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", item("a"))
        attempts: list[int] = []

        async def work(tx: Transaction) -> None:
            attempts.append(len(attempts))
            with suppress(ConcurrencyConflictError):
                expected = _STALE if len(attempts) == 1 else 1
                await tx.update_entity("items", "a", {"label": "x"}, expected_version=expected)

        await store.run_transaction(work)
        assert len(attempts) == 2
        assert await version_of(store, "a") == 2

    @pytest.mark.parametrize(
        "failure",
        [
            _CallerError("x"),
            EntityNotFoundError("items", "x"),
            UnavailableError("x"),
            InvalidQueryError("x"),
            ConcurrencyConflictError("x", outcome_unknown=True),
        ],
        ids=lambda failure: type(failure).__name__,
    )
    async def test_46_run_transaction_retries_nothing_else(
        self, store: StorageStrategy, failure: Exception
    ) -> None:
        attempts: list[int] = []

        async def work(tx: Transaction) -> None:
            attempts.append(len(attempts))
            await tx.create_entity("items", item("a"))
            raise failure

        with pytest.raises(type(failure)) as caught:
            await store.run_transaction(work)
        assert caught.value is failure
        assert len(attempts) == 1
        assert await version_of(store, "a") is None

    async def test_46_run_transaction_stops_at_its_time_limit(self, store: StorageStrategy) -> None:
        await store.create_entity("items", item("a", label="0"))
        attempts: list[int] = []

        async def work(tx: Transaction) -> None:
            attempts.append(len(attempts))
            await tx.create_entity("items", item("b"))
            await tx.update_entity("items", "a", {"label": "1"}, expected_version=_STALE)

        with pytest.raises(RetriesExhaustedError) as caught:
            await store.run_transaction(work, retry_seconds=0.2)
        last = caught.value.__cause__
        assert isinstance(last, ConcurrencyConflictError)
        assert (last.collection, last.entity_id, last.expected) == ("items", "a", _STALE)
        assert (caught.value.collection, caught.value.entity_id) == ("items", "a")
        assert caught.value.retryable
        assert len(attempts) >= 1
        assert await labels(store, "a", "b") == ["0", None]

    async def test_46_modify_entity_retries_a_conflict_until_its_time_limit(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", item("a", count=0))
        calls: list[int] = []

        async def rival_completed(entity: Entity) -> Entity:
            calls.append(len(calls))
            if len(calls) < 3:
                await store.update_entity("items", "a", {"count": len(calls)})
            return {**entity, "label": "mine"}

        assert await store.modify_entity("items", "a", rival_completed) == 4
        entity = await store.get_entity("items", "a")
        assert entity is not None
        assert (len(calls), entity["count"], entity["label"]) == (3, 2, "mine")

        async def always(entity: Entity) -> Entity:
            await store.update_entity("items", "a", {"label": "theirs"})
            return {**entity, "label": "mine"}

        with pytest.raises(RetriesExhaustedError) as caught:
            await store.modify_entity("items", "a", always, retry_seconds=0.2)
        assert isinstance(caught.value.__cause__, ConcurrencyConflictError)
        assert await labels(store, "a") == ["theirs"]
        with pytest.raises(EntityNotFoundError):
            await store.modify_entity("items", "none", always)

    async def test_46_tasks_that_compete_for_an_entity_take_turns(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entities("items", [item("a", count=0), item("b", count=0)])
        attempts: list[int] = []

        async def work(tx: Transaction) -> None:
            attempts.append(len(attempts))
            entity = await tx.get_entity("items", "a")
            assert entity is not None
            count = entity["count"]
            assert isinstance(count, int)
            await tx.update_entity("items", "a", {"count": count + 1})

        async def task() -> None:
            for _ in range(5):
                await store.run_transaction(work)

        async with asyncio.timeout(HANG_SECONDS):
            await asyncio.gather(*(task() for _ in range(16)))
        entity = await store.get_entity("items", "a")
        assert entity is not None
        assert (entity["count"], entity["version"]) == (80, 81)
        # At random, each of 16 tasks would lose to most of the others.
        assert len(attempts) <= 3 * 80
