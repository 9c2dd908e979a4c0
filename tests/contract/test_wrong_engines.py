"""Wrong engines, each of which a case of the contract refuses: one for each method of the interface.

An engine is right but for one method. The case is called as pytest would call it.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from pathlib import Path
from typing import Any, ClassVar, Final, cast

import msgspec
import pytest

from hf_async_store import Collection, StorageStrategy
from hf_async_store.claim_clock import Moment
from hf_async_store.config import MemoryConfig
from hf_async_store.driver import (
    Change,
    ChangedMatches,
    Claimed,
    ClaimInfo,
    ClaimTerms,
    EncodedPut,
    Engine,
    Entity,
    FeedBatch,
    Isolation,
    Key,
    Outcome,
    Overlay,
    Owned,
    Put,
    Query,
    QueryPlan,
    Reader,
    Record,
    Session,
    TakeChanges,
    batched,
    run_to_completion,
)
from hf_async_store.errors import (
    ConcurrencyConflictError,
    ConfigurationError,
    InvalidCursorError,
    ProtocolError,
    SchemaMismatchError,
    StorageError,
    UnavailableError,
    UnsupportedValueError,
)
from hf_async_store.passed_over import PassedOver
from hf_async_store.query import EVERYTHING, CursorPosition
from hf_async_store.strategies.json.engine import JSONEngine
from hf_async_store.strategies.memory import MemoryEngine
from hf_async_store.strategies.sql.engine import SQLEngine
from hf_async_store.testing import cancellation
from hf_async_store.testing.contract import StrategyContract
from hf_async_store.testing.harness import (
    CONTRACT_COLLECTIONS,
    DisturbsFeeds,
    InjectsRowLocks,
    ObservesIO,
    RefusesLabels,
)
from hf_async_store.testing.plugin import NOT_TRIED
from hf_async_store.testing.proxy import HeldRequest
from hf_async_store.testing.random_choices import FULL_VARIABLE
from tests.contract.harnesses import JSONHarness, MemoryHarness, SQLiteHarness
from tests.contract.wrong_engines import (
    Nothing,
    Optimistic,
    OptimisticSession,
    Wrapped,
    Wrong,
    WrongHarness,
    assert_refused,
    run_case,
    sessions_of,
)

_TOKEN: Final = 1


class _MiscountsFilters(Wrapped):
    async def count(self, query: Query) -> int:
        return await self._right.count(query) + (query.where != EVERYTHING)


class _WritesNoMarkers(Wrapped):
    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        outcomes: list[Outcome] = await self._right.write(_unmarked(changes))
        return outcomes


def _unmarked(changes: Iterable[Change]) -> list[Change]:
    return [msgspec.structs.replace(each, mark=None) for each in changes]


class _EmptySnapshot(MemoryEngine):
    def snapshot(self) -> AbstractAsyncContextManager[Reader]:
        return nullcontext(Nothing())


class _LiveSnapshot(MemoryEngine):
    def snapshot(self) -> AbstractAsyncContextManager[Reader]:
        return nullcontext(self)


class _EmptyEventualSnapshot(_EmptySnapshot):
    capabilities = msgspec.structs.replace(MemoryEngine.capabilities, query_isolation="eventual")


class _MiscountingSnapshot(MemoryEngine):
    @asynccontextmanager
    async def snapshot(self) -> AsyncGenerator[Any, None]:
        async with super().snapshot() as reader:
            yield _MiscountsFilters(reader)


class _Miscounts(MemoryEngine):
    async def count(self, query: Query) -> int:
        return await super().count(query) + (query.where != EVERYTHING)


class _KnowsNoUndeclared(MemoryEngine):
    async def fetch_undeclared(self, collection: Collection, entity_id: str) -> Record | None:
        return None


class _KnowsNoDeclarations(MemoryEngine):
    async def declarations(self) -> list[Collection]:
        return []


class _RemembersNothing(MemoryEngine):
    async def remember(self, collections: Iterable[Collection]) -> None:
        pass


class _DropsMarkers(MemoryEngine):
    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        return await super().write_each(_unmarked(changes))


class _DropsEntries(MemoryEngine):
    async def read_feed(self, collection: str, since: str, limit: int) -> FeedBatch:
        batch = await super().read_feed(collection, since, limit)
        return FeedBatch(batch.entries[:1], batch.position)


class _ForgetsBefore(MemoryEngine):
    async def read_feed(self, collection: str, since: str, limit: int) -> FeedBatch:
        batch = await super().read_feed(collection, since, limit)
        entries = [msgspec.structs.replace(each, before=None) for each in batch.entries]
        return FeedBatch(entries, batch.position)


class _NeverWakes(MemoryEngine):
    async def feed_changed(self, positions: Mapping[str, str], seconds: float) -> None:
        await asyncio.sleep(seconds)


class _WaitsForEver(MemoryEngine):
    async def feed_changed(self, positions: Mapping[str, str], seconds: float) -> None:
        await asyncio.Event().wait()


class _GivesToTwo(MemoryEngine):
    async def claim(self, query: Query, terms: ClaimTerms) -> list[Claimed]:
        async with Owned(self.select(query)) as records:
            return [Claimed(each, _TOKEN, 1) async for each in records]


class _LocksForTwo(MemoryEngine):
    async def claim_name(self, keys: Sequence[Key], terms: ClaimTerms) -> Claimed | None:
        return Claimed(Record(keys[0], {"version": 0}), _TOKEN, 1)


class _NeverRenews(MemoryEngine):
    async def renew_claim(self, key: Key, token: int, lease: float) -> None:
        pass


class _NeverReleases(MemoryEngine):
    async def release_claim(self, key: Key, token: int, after: float | None) -> None:
        pass


class _ReleasesWithoutDelay(MemoryEngine):
    async def release_claim(self, key: Key, token: int, after: float | None) -> None:
        await super().release_claim(key, token, None)


class _ChecksNoClaim(MemoryEngine):
    def claimed_session(
        self, key: Key, token: int, *, ends: bool = False
    ) -> AbstractAsyncContextManager[Session]:
        return self.session(None)


class _NeverFinishes(MemoryEngine):
    def claimed_session(
        self, key: Key, token: int, *, ends: bool = False
    ) -> AbstractAsyncContextManager[Session]:
        return super().claimed_session(key, token)


class _BreaksNoClaim(MemoryEngine):
    async def break_claim(self, key: Key) -> bool:
        return False


class _IsEveryStore(MemoryEngine):
    async def is_same_store(self, other: Engine) -> bool:
        return True


class _IsNoStore(MemoryEngine):
    async def is_same_store(self, other: Engine) -> bool:
        return False


class _IsEveryStoreOfItsKind(MemoryEngine):
    async def is_same_store(self, other: Engine) -> bool:
        return isinstance(other, MemoryEngine)


class _LeavesOutRepetitions(MemoryEngine):
    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return await super().fetch(list(dict.fromkeys(keys)))


class _ExplainsWrongly(MemoryEngine):
    async def explain(self, query: Query) -> QueryPlan:
        return QueryPlan(access="key")


class _SelectsNothing(MemoryEngine):
    def select(self, query: Query) -> AsyncGenerator[Record, None]:
        return Nothing().select(query)


class _SelectsNoBatches(MemoryEngine):
    def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        return batched(Nothing().select(query))


class _SelectsNothingAtOnce(MemoryEngine):
    async def select_at_once(self, query: Query) -> list[Entity] | None:
        return []


class _ChangesNoMatches(MemoryEngine):
    async def change_matches(self, query: Query, change: Change) -> ChangedMatches | None:
        return ChangedMatches([], [], [])


class _WritesNothing(MemoryEngine):
    async def write_unblocked(self, take: TakeChanges) -> list[Outcome]:
        return [1 for _ in take()]


class _WritesAfterCancellation(MemoryEngine):
    def write_cancellable(self, changes: Sequence[Change]) -> Coroutine[Any, Any, list[Outcome]]:
        return self._go_on(changes)

    async def _go_on(self, changes: Sequence[Change]) -> list[Outcome]:
        return await asyncio.shield(self._write_later(changes))

    async def _write_later(self, changes: Sequence[Change]) -> list[Outcome]:
        for _ in range(20):
            await asyncio.sleep(0)
        return await self.write_each(changes)


class _LetsNobodyRun(MemoryEngine):
    def write_cancellable(self, changes: Sequence[Change]) -> Coroutine[Any, Any, list[Outcome]]:
        return self.write_each(changes)


class _StoresTextAlone(MemoryEngine):
    def takes_encoded(self, collection: str) -> bool:
        return True

    async def write_unblocked(self, take: TakeChanges) -> list[Outcome]:
        decoded: list[Change] = [
            Put(each.key, msgspec.json.decode(each.text), each.written_at)
            if isinstance(each, EncodedPut)
            else each
            for each in take()
        ]
        return await self.write_each(decoded)


class _SharesFedChanges(MemoryEngine):
    def shares_changes(self, key: Key) -> bool:
        return True


class _EverythingIsPassedOver(PassedOver):
    def begin(self, now: Moment, times: list[str]) -> list[str]:
        self.position = CursorPosition((), "\U0010ffff")
        return []


class _PassesOverEverything(Wrapped):
    async def passed_over(
        self, query: Query, most_attempts: int | None
    ) -> tuple[PassedOver, list[str]]:
        over, times = await self._right.passed_over(query, most_attempts)
        over.__class__ = _EverythingIsPassedOver
        return over, times


class _WritesWithoutClaim(MemoryEngine):
    async def write_claimed(self, token: int, change: Change, *, ends: bool) -> int:
        [outcome] = await self.write_each([change])
        assert isinstance(outcome, int)
        return outcome


class _ListsNoClaims(MemoryEngine):
    async def claims(self, collection: str) -> list[ClaimInfo]:
        return []


class _BeginsFeedsTooEarly(MemoryEngine):
    async def feed_position(self, collection: str) -> str:
        return (await super().feed_position(collection)).rpartition(".")[0] + ".0"


class _NeverCloses(MemoryEngine):
    async def close(self) -> None:
        pass


class _OrdersPagesById(MemoryEngine):
    async def first_page(self, query: Query) -> Query:
        return msgspec.structs.replace(query, order=(), by_id=True)


class _PagesOfEverything(MemoryEngine):
    async def first_page(self, query: Query) -> Query:
        return msgspec.structs.replace(await super().first_page(query), where=EVERYTHING)


class _IsUnwell(MemoryEngine):
    async def health(self) -> Mapping[str, Any]:
        return {"problems": ["nothing can be done about it"]}


class _TellsObjects(MemoryEngine):
    async def health(self) -> Mapping[str, Any]:
        return {"engine_object": self}


class _TellsWhatIsStored(MemoryEngine):
    async def health(self) -> Mapping[str, Any]:
        return {"tables": str([each.entities for each in self._stored.tables.values()])}


class _DescribesObjects(MemoryEngine):
    def describe(self) -> Mapping[str, Any]:
        return {"location": Path("/")}


class _DescribesWhatIsStored(MemoryEngine):
    def describe(self) -> Mapping[str, Any]:
        return {"tables": str([each.entities for each in self._stored.tables.values()])}


class _LeadsElsewhere(MemoryEngine):
    def direct(self, method: str, *, writes: bool) -> AbstractAsyncContextManager[Engine]:
        return nullcontext(MemoryEngine(self._schema, MemoryConfig()))


class _LeadsNowhere(MemoryEngine):
    def direct(self, method: str, *, writes: bool) -> AbstractAsyncContextManager[Any]:
        return nullcontext()


class _RefusesItsOwn(MemoryEngine):
    async def check_direct(self, method: str) -> None:
        raise UnavailableError(f"{method} is refused")


class _LeadsOutOfTheSession(Wrapped):
    async def direct(self, method: str) -> Any:
        return Nothing()


class _FailsToAbandon(MemoryEngine):
    def abandon(self) -> None:
        raise UnavailableError("the connections cannot be closed now")


class _WritesNothingInSessions(Wrapped):
    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        return [1 for _ in changes]


class _HidesFailures(Wrapped):
    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        outcomes = await self._right.write(changes)
        return [1 if isinstance(each, StorageError) else each for each in outcomes]


class _KeepsWhatIsRolledBack(Wrapped):
    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[Any, None]:
        yield self._right


class _RollsBackWhatIsKept(Wrapped):
    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[Any, None]:
        with suppress(ZeroDivisionError):
            async with self._right.savepoint() as inner:
                yield inner
                raise ZeroDivisionError


class _DiscardsWhatIsRetried(MemoryEngine):
    @asynccontextmanager
    async def retried_session(self, isolation: Isolation | None) -> AsyncGenerator[Session, None]:
        with suppress(ZeroDivisionError):
            async with self.session(isolation) as session:
                yield session
                raise ZeroDivisionError


class _CommitsFailures(MemoryEngine):
    @asynccontextmanager
    async def session(self, isolation: Isolation | None) -> AsyncGenerator[Session, None]:
        failure: BaseException | None = None
        async with super().session(isolation) as session:
            try:
                yield session
            except BaseException as exc:  # raised again below
                failure = exc
        if failure is not None:
            raise failure


class _NotesNoChanges(Wrapped):
    async def passed_over(self, query: Query, most_attempts: int | None) -> Any:
        over, times = await self._right.passed_over(query, most_attempts)
        over.note = _pass
        return over, times


def _pass(*given: object) -> None:
    pass


class _RefusesAllOrNone(MemoryEngine):
    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        outcomes = await super().write_each(changes)
        failed = [each for each in outcomes if isinstance(each, StorageError)]
        return [failed[0] for _ in outcomes] if failed else outcomes


_DESCRIBED: Final = "test_70_what_a_store_tells_of_itself"
_DIRECT: Final = "test_124_a_method_of_its_own_reaches_the_engine"
_ABANDONED: Final = "test_121_an_abandoned_store_keeps_what_was_acknowledged"
_SNAPSHOT: Final = "test_124_a_snapshot_has_what_was_written"
_TOLD: Final = "test_124_declarations_are_recorded_and_merged"
_SAME: Final = "test_134_two_stores_on_the_same_data_are_the_same_store"
_INDEX: Final = "test_124_an_index_that_is_not_there_is_listed"
_FIRST_CLAIM: Final = "test_104_a_claim_takes_the_first_matches_that_nobody_holds"

_IN_MEMORY: Final = [
    Wrong(_EmptySnapshot, _SNAPSHOT),
    Wrong(_EmptyEventualSnapshot, _SNAPSHOT),
    Wrong(_MiscountingSnapshot, _SNAPSHOT),
    Wrong(_LiveSnapshot, "test_47_a_snapshot_does_not_change_while_it_is_open"),
    Wrong(sessions_of(_MiscountsFilters), "test_124_a_transaction_counts_what_it_selects"),
    Wrong(_Miscounts, "test_63_count_equals_the_streamed_length"),
    Wrong(_KnowsNoUndeclared, "test_124_an_entity_is_fetched_without_a_declaration"),
    Wrong(_KnowsNoDeclarations, _TOLD),
    Wrong(_RemembersNothing, _TOLD),
    Wrong(_DropsMarkers, "test_124_a_marker_is_written_with_its_change"),
    Wrong(sessions_of(_WritesNoMarkers), "test_124_a_marker_is_part_of_a_transaction"),
    Wrong(_DropsEntries, "test_109_a_claim_is_no_change", TimeoutError, seconds=3.0),
    Wrong(_ForgetsBefore, "test_109_an_entity_comes_as_it_was_written", ProtocolError),
    Wrong(_NeverWakes, "test_124_a_wait_for_a_feed_ends_with_a_change"),
    Wrong(_WaitsForEver, "test_124_a_wait_for_a_feed_ends_in_time", TimeoutError),
    Wrong(_GivesToTwo, _FIRST_CLAIM),
    Wrong(_LocksForTwo, "test_131_a_lock_is_waited_for_and_lost"),
    Wrong(_NeverRenews, "test_105_a_block_is_renewed_in_the_background"),
    Wrong(_NeverReleases, "test_104_one_of_two_claimers_gets_an_entity"),
    Wrong(_ReleasesWithoutDelay, "test_105_what_leaves_a_block_ends_the_claim"),
    Wrong(_ChecksNoClaim, "test_105_a_claim_ends_with_its_lease"),
    Wrong(_NeverFinishes, "test_106_finish_is_one_commit"),
    Wrong(_BreaksNoClaim, "test_131_a_lock_is_waited_for_and_lost"),
    Wrong(_IsEveryStore, _SAME),
    Wrong(_IsNoStore, _SAME),
    Wrong(_IsEveryStoreOfItsKind, "test_134_a_store_on_other_data_is_another_store"),
    Wrong(_LeavesOutRepetitions, "test_124_keys_may_repeat"),
    Wrong(_ExplainsWrongly, "test_64_a_declared_index_is_used_and_named"),
    Wrong(_SelectsNothing, _SNAPSHOT),
    Wrong(_SelectsNoBatches, _SNAPSHOT),
    Wrong(_SelectsNothingAtOnce, _SNAPSHOT),
    Wrong(_ChangesNoMatches, "test_124_matches_are_changed_in_one_step"),
    Wrong(_DiscardsWhatIsRetried, "test_46_run_transaction_returns_what_its_function_returns"),
    Wrong(_StoresTextAlone, "test_66_batches_set_the_fields_of_the_store"),
    Wrong(_SharesFedChanges, "test_109_each_modification_of_an_entity_comes"),
    Wrong(sessions_of(_PassesOverEverything), _FIRST_CLAIM),
    Wrong(_WritesNothing, "test_02_create_then_get_is_equal_in_value_and_type"),
    Wrong(_WritesAfterCancellation, "test_124_a_cancellable_write_ends_with_its_task"),
    Wrong(_LetsNobodyRun, "test_124_a_cancellable_write_ends_with_its_task"),
    Wrong(_WritesWithoutClaim, "test_106_finish_is_one_commit"),
    Wrong(_ListsNoClaims, "test_106_renew_extends_and_release_frees"),
    Wrong(_BeginsFeedsTooEarly, "test_109_a_watch_begins_when_it_is_entered"),
    Wrong(_NeverCloses, "test_124_a_session_cannot_commit_after_close"),
    Wrong(_LiveSnapshot, "test_128_every_read_sees_one_snapshot"),
    Wrong(_OrdersPagesById, "test_62_pages_show_every_unchanged_row_once", InvalidCursorError),
    Wrong(_PagesOfEverything, "test_61_limit_counts_matches"),
    Wrong(_IsUnwell, _DESCRIBED),
    Wrong(_TellsObjects, _DESCRIBED, UnsupportedValueError),
    Wrong(_TellsWhatIsStored, _DESCRIBED),
    Wrong(_DescribesWhatIsStored, _DESCRIBED),
    Wrong(_DescribesObjects, "test_76_opening_does_no_io", UnsupportedValueError),
    Wrong(_LeadsElsewhere, _DIRECT),
    Wrong(_LeadsNowhere, _DIRECT),
    Wrong(_RefusesItsOwn, _DIRECT, UnavailableError),
    Wrong(sessions_of(_LeadsOutOfTheSession), _DIRECT),
    Wrong(_FailsToAbandon, _ABANDONED, UnavailableError),
    Wrong(
        sessions_of(_WritesNothingInSessions), "test_35_commit_shows_everything_across_collections"
    ),
    Wrong(sessions_of(_HidesFailures), "test_39_a_failed_change_aborts_the_transaction"),
    Wrong(sessions_of(_KeepsWhatIsRolledBack), "test_44_an_inner_rollback_keeps_the_outer_work"),
    Wrong(
        sessions_of(_RollsBackWhatIsKept),
        "test_44_inner_changes_are_committed_by_the_outer_transaction",
    ),
    Wrong(_CommitsFailures, "test_36_an_exception_rolls_back_and_propagates"),
    Wrong(sessions_of(_NotesNoChanges), "test_104_one_of_two_claimers_gets_an_entity"),
    Wrong(_RefusesAllOrNone, "test_66_a_conflict_does_not_affect_the_other_changes"),
]


def _number(case: str) -> int:
    return int(case.split("_")[1])


@pytest.mark.parametrize("case", sorted({each.case for each in _IN_MEMORY}))
async def test_the_right_engine_passes(case: str) -> None:
    await run_case(case, MemoryHarness())


@pytest.mark.parametrize(
    "wrong", _IN_MEMORY, ids=[each.engine.__name__.strip("_") for each in _IN_MEMORY]
)
async def test_a_wrong_engine_fails(wrong: Wrong) -> None:
    await assert_refused(wrong.case, WrongHarness(wrong.engine), wrong.error, wrong.seconds)


class _Mistyped(MemoryEngine):
    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return await super().fetched(keys)


async def test_neither_a_mistake_nor_a_right_engine_is_refused() -> None:
    for engine, found in ((_Mistyped, "fails by AttributeError"), (MemoryEngine, "does not fail")):
        with pytest.raises(AssertionError, match=found):
            await assert_refused("test_124_keys_may_repeat", WrongHarness(engine))


# -- an engine that works after `close` ----------------------------------------------------------


class _ReadsAfterClose(MemoryEngine):
    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return [None for _ in keys] if self._closed else await super().fetch(keys)


async def test_an_engine_that_reads_after_close_fails() -> None:
    case = StrategyContract().test_124_no_method_works_after_close
    await case(MemoryHarness())
    with pytest.raises(AssertionError, match="fetch"):
        await case(WrongHarness(_ReadsAfterClose))


# -- engines whose stores outlive their programs -------------------------------------------------


async def _true(*given: object) -> bool:
    return True


async def _nothing(*given: object) -> None:
    pass


async def _ignore(*given: object, **named: object) -> None:
    pass


async def _no_names(*given: object) -> list[str]:
    return []


async def _is_json(self: JSONEngine, other: Engine) -> bool:
    return isinstance(other, JSONEngine)


_write_unblocked: Final = JSONEngine.write_unblocked


async def _take_at_once(self: JSONEngine, take: TakeChanges) -> list[Outcome]:
    changes = take()
    return await _write_unblocked(self, lambda: changes)


_WAITING: Final = "test_126_a_write_that_waits_for_the_store_is_known_not_to_be_applied"


_DURABLE: Final[Sequence[tuple[str, Callable[..., Any], str]]] = [
    ("probe", _nothing, "test_124_a_probe_reaches_the_store"),
    ("fetch_undeclared", _nothing, "test_124_an_entity_is_fetched_without_a_declaration"),
    ("exists", _true, "test_134_exists_does_not_create_the_store"),
    ("undeclared", _no_names, "test_134_undeclared_collections_are_reported"),
    ("is_same_store", _is_json, "test_134_a_store_on_other_data_is_another_store"),
    ("write_unblocked", _take_at_once, _WAITING),
    ("unenforced", _no_names, "test_96_unique_declared_on_data_with_duplicates"),
    ("apply_schema", _ignore, "test_96_unique_declared_on_data_with_duplicates"),
]


WRONG_METHODS: Final = {
    ("schema_changes", _number(_INDEX)),
    *((method, _number(case)) for method, _, case in _DURABLE),
    *(
        (method, _number(case))
        for engine, case, *_ in _IN_MEMORY
        for kind in [getattr(engine, "sessions", engine)]
        for method in vars(kind)
        if method[0] != "_" and inspect.isfunction(getattr(kind, method))
    ),
}
"""Each method that an engine does wrongly, with the number of the case that refuses it."""


@pytest.mark.parametrize(
    ("method", "wrong", "case"), _DURABLE, ids=[method for method, *_ in _DURABLE]
)
async def test_a_wrong_engine_with_files_fails(
    method: str,
    wrong: Callable[..., Any],
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await run_case(case, JSONHarness(tmp_path / "right", "db.json"))
    monkeypatch.setattr(cancellation, "_SLOW_SECONDS", 0.3)
    monkeypatch.setattr(JSONEngine, method, wrong)
    await assert_refused(case, JSONHarness(tmp_path / "wrong", "db.json"))


async def test_an_engine_that_hides_what_it_lacks_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run_case(_INDEX, SQLiteHarness(tmp_path / "right"))
    monkeypatch.setattr(SQLEngine, "schema_changes", _no_names)
    await assert_refused(_INDEX, SQLiteHarness(tmp_path / "wrong"))


# -- engines whose transactions are optimistic --------------------------------------------------


class _ComparesNoQueries(OptimisticSession):
    """Compares the entities that a query has returned, like those that were read by key."""

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        async with Owned(super().select(query)) as records:
            async for each in records:
                self.read.setdefault(each.key, self._stored.get(each.key))
                yield each

    def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        return batched(self.select(query))

    def is_current(self) -> bool:
        self.queried.clear()
        return super().is_current()


class _ComparesTheLastRead(OptimisticSession):
    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        self.read.clear()
        return await super().fetch(keys)

    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        self.read.clear()
        async with Owned(super().select(query)) as records:
            async for each in records:
                yield each

    def select_batches(self, query: Query) -> AsyncGenerator[list[Entity], None]:
        return batched(self.select(query))


_PHANTOM: Final = "test_41_a_phantom_is_a_conflict_if_declared"
_MOMENT: Final = "test_40_what_was_read_in_several_calls_is_of_one_moment"


@pytest.mark.parametrize(
    "case",
    [
        _PHANTOM,
        _MOMENT,
        "test_41_write_skew_by_queries_is_prevented_if_declared",
        "test_47_the_sum_is_constant_in_every_snapshot",
    ],
)
async def test_an_engine_that_compares_at_the_commit_passes(case: str) -> None:
    await run_case(case, WrongHarness(Optimistic))


@pytest.mark.parametrize(
    ("session", "case"), [(_ComparesNoQueries, _PHANTOM), (_ComparesTheLastRead, _MOMENT)]
)
async def test_an_engine_that_compares_too_little_fails(
    session: type[OptimisticSession], case: str
) -> None:
    engine = type(session.__name__, (Optimistic,), {"session_class": session})
    await assert_refused(case, WrongHarness(engine))


class _RefusesEverySecond(MemoryEngine):
    """Every second commit of a session is refused, as if another transaction had come first."""

    commits = 0

    @asynccontextmanager
    async def session(self, isolation: Isolation | None) -> AsyncGenerator[Session, None]:
        async with super().session(isolation) as session:
            yield session
            self.commits += 1
            if self.commits % 2:
                raise ConcurrencyConflictError("another came first", retryable=True)


@pytest.mark.parametrize("case", [_FIRST_CLAIM, "test_106_renew_extends_and_release_frees"])
async def test_the_defaults_of_claims_try_again_after_a_conflict(case: str) -> None:
    await run_case(case, WrongHarness(_RefusesEverySecond))


# -- engines in a database with something of another program -------------------------------------


class _RefusesOccupied(MemoryEngine):
    occupied = "things"

    async def close(self) -> None:
        self._closed = True  # the tables are those of the next store, too

    async def _commit(self, overlay: Overlay) -> None:
        self._refuse({each.collection for each in overlay.changes})
        await super()._commit(overlay)

    def _refuse(self, collections: Iterable[str]) -> None:
        if self.occupied in collections:
            raise SchemaMismatchError("things belongs to another program; set table_prefix")


class _CommitsBeforeWhatIsOccupied(_RefusesOccupied):
    async def _commit(self, overlay: Overlay) -> None:
        for key, entity in overlay.changes.items():
            self._refuse([key.collection])
            self._stored.table(key.collection).apply({key.id: entity}, None)


class _OccupiedHarness(WrongHarness):
    """All stores have the same data."""

    def __init__(self, engine: type[MemoryEngine]) -> None:
        super().__init__(engine)
        self._tables: dict[str, Any] = {}

    def store(
        self, collections: Iterable[Collection] = CONTRACT_COLLECTIONS, **settings: object
    ) -> StorageStrategy:
        store = super().store(collections, **settings)
        stored = cast("MemoryEngine", store.engine)._stored
        self._tables.update({**stored.tables, **self._tables})
        stored.tables = self._tables
        return store

    def neighbour(self, name: str, collections: Iterable[Collection]) -> StorageStrategy:
        raise ConfigurationError(f"no store {name}")

    async def occupy(self, collection: str) -> str:
        assert collection == _RefusesOccupied.occupied
        return collection

    async def occupant(self) -> object:
        return None


_OCCUPIED: Final = "test_98_nothing_of_a_transaction_with_a_refused_collection_is_written"


async def test_an_engine_that_refuses_what_is_occupied_passes() -> None:
    await run_case(_OCCUPIED, _OccupiedHarness(_RefusesOccupied))


class _KeepsAllInOneTable(_RefusesOccupied):
    """The table that is occupied is that of every collection."""

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        self._refuse([self.occupied])
        return await super().fetch(keys)


async def test_an_engine_with_one_table_for_all_collections_passes() -> None:
    await run_case(_OCCUPIED, _OccupiedHarness(_KeepsAllInOneTable))


async def test_an_engine_that_commits_before_what_is_occupied_fails() -> None:
    with pytest.raises(AssertionError):
        await run_case(_OCCUPIED, _OccupiedHarness(_CommitsBeforeWhatIsOccupied))


# -- faults that are not tried -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("test_135_a_change_refused_by_the_database_does_not_affect_its_neighbours", RefusesLabels),
        ("test_135_a_change_refused_by_the_database_among_others_of_its_entity", RefusesLabels),
        ("test_135_a_blocked_change_does_not_delay_its_neighbours", InjectsRowLocks),
        ("test_110_what_happens_to_the_data_makes_no_gap", DisturbsFeeds),
        ("test_43_an_empty_transaction_does_no_io", ObservesIO),
    ],
)
async def test_a_case_of_a_fault_is_skipped_and_named_without_it(case: str, fault: type) -> None:
    with pytest.raises(RuntimeError, match=f"{NOT_TRIED}{fault.__name__}"):
        await run_case(case, WrongHarness(_Lasting))


# -- engines that connect -----------------------------------------------------------------------


class _Connects(MemoryEngine):
    """A read opens a connection, which takes a while."""

    connections: ClassVar[set[object]] = set()

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        self._refuse_closed()
        connection = object()
        try:
            await run_to_completion(self._connect(connection))
            return await super().fetch(keys)
        finally:
            self.connections.discard(connection)

    async def _connect(self, connection: object) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        self.connections.add(connection)


class _ConnectedHarness(WrongHarness):
    def leaks(self) -> list[str]:
        return [str(each) for each in _Connects.connections]


async def test_an_engine_that_completes_its_connection_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(FULL_VARIABLE, "1")  # each moment of a close
    await run_case("test_72_cancel_at_every_await_of_a_close", _ConnectedHarness(_Connects))
    assert _Connects.connections == set()


# -- engines whose connections break -------------------------------------------------------------


class _GoesOnWithoutItsLock(OptimisticSession):
    """Like a session that has connected again, and so holds no lock any more."""

    def is_current(self) -> bool:
        return True


class _CutHarness(WrongHarness):
    def cut_connections(self) -> None:
        pass  # the engine under test goes on as if nothing had happened


_CUT: Final = "test_84_a_transaction_ends_with_its_connection"


async def test_an_engine_that_compares_what_it_read_needs_no_connection() -> None:
    await run_case(_CUT, _CutHarness(Optimistic))


async def test_an_engine_that_goes_on_without_its_lock_fails() -> None:
    engine = type("_Reconnects", (Optimistic,), {"session_class": _GoesOnWithoutItsLock})
    await assert_refused(_CUT, _CutHarness(engine))


# -- engines whose answers are lost --------------------------------------------------------------


class _LosesAnswers(MemoryEngine):
    """Stores everything, and while `is_losing`, answers with this error."""

    is_losing = False
    error = UnavailableError("the connection was lost", outcome_unknown=True, retryable=False)

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        outcomes = await super().write_each(changes)
        self._lose()
        return outcomes

    @asynccontextmanager
    async def session(self, isolation: Isolation | None) -> AsyncGenerator[Session, None]:
        async with super().session(isolation) as session:
            yield session
        self._lose()

    def _lose(self) -> None:
        if self.is_losing:
            raise self.error.copy()


class _HidesLostAnswers(_LosesAnswers):
    error = UnavailableError("the server cannot be reached")


class _RepeatsAfterLostAnswers(_LosesAnswers):
    error = UnavailableError("the connection was lost", outcome_unknown=True, retryable=True)


class _LosingHarness(WrongHarness):
    hurried: Mapping[str, object] = {}

    @contextmanager
    def lose_answers(self) -> Iterator[None]:
        engine = cast("_LosesAnswers", self._stores[-1].engine)
        engine.is_losing = True
        yield
        engine.is_losing = False


_ALL_LOST: Final = "test_34_if_every_response_is_lost_the_outcome_is_unknown"


async def test_an_engine_that_says_that_the_outcome_is_unknown_passes() -> None:
    await run_case(_ALL_LOST, _LosingHarness(_LosesAnswers))


@pytest.mark.parametrize("engine", [_HidesLostAnswers, _RepeatsAfterLostAnswers])
async def test_an_engine_that_hides_lost_answers_fails(engine: type[MemoryEngine]) -> None:
    with pytest.raises(AssertionError, match="it was applied|a repetition may be a conflict"):
        await run_case(_ALL_LOST, _LosingHarness(engine))


# -- engines whose server forgets ----------------------------------------------------------------


class _Lasting(MemoryEngine):
    capabilities = msgspec.structs.replace(MemoryEngine.capabilities, durable=True)


class _RestartedHarness(_OccupiedHarness):
    """A server without data on disk, or with all of them there.

    Args:
        keeps: it has them.
    """

    def __init__(self, *, keeps: bool) -> None:
        super().__init__(_Lasting)
        self._keeps = keeps

    async def restart(self) -> None:
        for table in () if self._keeps else self._tables.values():
            table.apply(dict.fromkeys(table.entities), None)


_OUTLASTS: Final = "test_84_what_was_acknowledged_outlasts_the_server"


async def test_an_engine_whose_server_keeps_everything_passes() -> None:
    await run_case(_OUTLASTS, _RestartedHarness(keeps=True))


async def test_an_engine_whose_server_forgets_fails() -> None:
    with pytest.raises(AssertionError):
        await run_case(_OUTLASTS, _RestartedHarness(keeps=False))


# -- engines that are cancelled during a commit --------------------------------------------------


class _Late(Optimistic):
    """A commit waits until `held` is released."""

    held: HeldRequest | None = None

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        return await run_to_completion(self._written_late(changes))

    async def _written_late(self, changes: Sequence[Change]) -> list[Outcome]:
        async with self._holding():
            return await super().write_each(changes)

    async def finish(self, session: OptimisticSession) -> None:
        await run_to_completion(self._finished_late(session))

    async def _finished_late(self, session: OptimisticSession) -> None:
        async with self._holding():
            await super().finish(session)

    @asynccontextmanager
    async def _holding(self) -> AsyncGenerator[None, None]:
        held, self.held = self.held, None
        if held is not None:
            await held.hold()
        yield
        if held is not None:
            held.answer()


class _LeavesItsCommit(_Late):
    async def finish(self, session: OptimisticSession) -> None:
        await asyncio.shield(self._finished_late(session))


class _LateHarness(WrongHarness):
    def hold_next_write(self) -> HeldRequest:
        engine = cast("_Late", self._stores[-1].engine)
        engine.held = HeldRequest()
        return engine.held


_ON_ITS_WAY: Final = "test_126_a_write_on_its_way_is_not_applied_after_its_cancellation"


async def test_an_engine_that_completes_its_commit_passes() -> None:
    await run_case(_ON_ITS_WAY, _LateHarness(_Late))


async def test_an_engine_that_leaves_its_commit_fails() -> None:
    with pytest.raises(AssertionError, match="after CancelledError"):
        await run_case(_ON_ITS_WAY, _LateHarness(_LeavesItsCommit))


def test_no_part_of_the_contract_hides_a_fixture_or_a_test_of_another() -> None:
    owners: dict[str, list[str]] = {}
    for part in StrategyContract.__bases__:
        for name in vars(part):
            if not name.startswith("__"):
                owners.setdefault(name, []).append(part.__name__)
    assert {name: parts for name, parts in owners.items() if len(parts) > 1} == {}
