"""Engines that declare a capability wrongly, each of which a case of the contract refuses.

Where absence is tested as well, a second engine has what it declares absent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import msgspec
import pytest

from hf_async_store.config import MemoryConfig
from hf_async_store.driver import (
    Change,
    Claimed,
    ClaimTerms,
    Engine,
    FeedBatch,
    Isolation,
    Key,
    Outcome,
    Overlay,
    Owned,
    Query,
    Record,
    Schema,
    Session,
    copy_entity,
)
from hf_async_store.errors import (
    FeedExpiredError,
    InvalidInputError,
    StorageError,
    TransactionTooLargeError,
    UnavailableError,
)
from hf_async_store.strategies.memory import MemoryEngine
from tests.contract.harnesses import MemoryHarness
from tests.contract.wrong_engines import (
    Wrapped,
    Wrong,
    WrongHarness,
    assert_refused,
    run_case,
    sessions_of,
)

_RIGHT: Final = MemoryEngine.capabilities


def _declaring(
    engine: type[MemoryEngine] = MemoryEngine, /, **capabilities: object
) -> type[MemoryEngine]:
    """The engine, with these capabilities declared."""
    declared = msgspec.structs.replace(_RIGHT, **capabilities)
    return type(engine.__name__, (engine,), {"capabilities": declared})


class _RefusesIsolations(MemoryEngine):
    def session(self, isolation: Isolation | None) -> AbstractAsyncContextManager[Session]:
        if isolation not in (None, "serializable"):
            raise InvalidInputError(f"no isolation {isolation!r}")
        return super().session(isolation)


class _StreamsWhatComes(MemoryEngine):
    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        async with Owned(super().select(query)) as records:
            keys = [each.key async for each in records]
        for key in keys:
            [record] = await self.fetch([key])
            if record is not None:
                yield record


class _QueriesTheCommitted(MemoryEngine):
    @asynccontextmanager
    async def session(self, isolation: Isolation | None) -> AsyncGenerator[Any, None]:
        async with super().session(isolation) as session:
            wrong = Wrapped(session)
            for name in ("select", "select_batches", "count"):
                setattr(wrong, name, getattr(self, name))
            yield wrong


class _LocksNothing(MemoryEngine):
    @asynccontextmanager
    async def session(self, isolation: Isolation | None) -> AsyncGenerator[Any, None]:
        overlay = self._overlay()

        class Unlocked(Wrapped):
            async def write(self, changes: Sequence[Change]) -> list[Outcome]:
                return [overlay.apply(each) for each in changes]

            async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
                found = [(each, overlay.get(each)) for each in keys]
                return [
                    None if one is None else Record(key, copy_entity(one)) for key, one in found
                ]

        yield Unlocked(self)
        await self._commit(overlay)


class _NoSavepoints(Wrapped):
    savepoint = Session.savepoint


class _ScansEverything(MemoryEngine):
    explain = Engine.explain


class _KnowsNoParents(MemoryEngine):
    def __init__(self, schema: Schema, config: MemoryConfig) -> None:
        super().__init__(schema, MemoryConfig(enforce_references=False))


class _KnowsNoOwners(MemoryEngine):
    def _overlay(self) -> Overlay:
        return Overlay(self._schema, self._stored, references=True, owners=lambda *_: [])


class _GivesToTwo(MemoryEngine):
    async def claim(self, query: Query, terms: ClaimTerms) -> list[Claimed]:
        async with Owned(self.select(query)) as records:
            return [Claimed(each, 1, 1) async for each in records]


class _DropsMarkers(MemoryEngine):
    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        unmarked = [msgspec.structs.replace(each, mark=None) for each in changes]
        return await super().write_each(unmarked)


class _RemovesTooEarly(MemoryEngine):
    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        stay = {name for name, each in self._schema.items() if each.expires is None}
        found = await super().fetch(keys)
        return [each if each and each.key.collection in stay else None for each in found]


class _FeedsNothing(MemoryEngine):
    feed_position = Engine.feed_position
    read_feed = Engine.read_feed
    feed_changed = Engine.feed_changed


class _FeedsBackwards(MemoryEngine):
    async def read_feed(self, collection: str, since: str, limit: int) -> FeedBatch:
        batch = await super().read_feed(collection, since, limit)
        return FeedBatch(batch.entries[::-1], batch.position)


class _ForgetsTooEarly(MemoryEngine):
    async def read_feed(self, collection: str, since: str, limit: int) -> FeedBatch:
        if (await super().read_feed(collection, since, limit)).entries:
            raise FeedExpiredError("it was kept for a moment")
        return FeedBatch([], since)


class _SelectsLastFirst(MemoryEngine):
    async def select(self, query: Query) -> AsyncGenerator[Record, None]:
        async with Owned(super().select(query)) as records:
            found = [each async for each in records]
        for each in found if query.order else found[::-1]:
            yield each

    def select_batches(self, query: Query) -> Any:
        return Engine.select_batches(self, query)


class _TellsNoEntity(MemoryEngine):
    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        outcomes = await super().write_each(changes)
        for each in outcomes:
            if isinstance(each, StorageError) and hasattr(each, "current"):
                each.current = None
        return outcomes


class _RefusesLargeTransactions(Wrapped):
    written = 0

    async def write(self, changes: Sequence[Change]) -> list[Outcome]:
        self.written += len(changes)
        if self.written > 50:
            raise TransactionTooLargeError("it has more than 50 changes")
        outcomes: list[Outcome] = await self._right.write(changes)
        return outcomes


class _WritesAtOnce(MemoryEngine):
    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        overlays = [self._overlay() for _ in changes]
        outcomes = [one.apply(each) for one, each in zip(overlays, changes, strict=True)]
        await asyncio.sleep(0)
        for each in overlays:
            await self._commit(each)
        return outcomes


class _WritesFew(MemoryEngine):
    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        if len(changes) > 8:
            raise UnavailableError("more than 8 changes at once")
        return await super().write_each(changes)


class _MixesReads(MemoryEngine):
    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        return await super().fetch(sorted(keys))


class _ReadsOneByOne(MemoryEngine):
    reading = False

    async def fetch(self, keys: Sequence[Key]) -> list[Record | None]:
        if self.reading:
            raise UnavailableError("another read is in progress")
        self.reading = True
        await asyncio.sleep(0)
        self.reading = False
        return await super().fetch(keys)


_FIRST_CLAIM: Final = "test_104_a_claim_takes_the_first_matches_that_nobody_holds"
_UNDECLARED: Final = "test_44_undeclared_savepoints_are_refused"
_COALESCED: Final = "test_69_each_caller_reads_its_own_writes"
_PROBE: Final = "test_124_a_probe_reaches_the_store"

WRONG: Final[Sequence[tuple[str, Wrong]]] = [
    ("engine", Wrong(_declaring(engine=""), "test_76_opening_does_no_io")),
    (
        "durable",
        Wrong(_declaring(durable=True), _PROBE, NotImplementedError),
    ),
    (
        "multi_process",
        Wrong(
            _declaring(multi_process=True),
            "test_134_two_stores_on_the_same_data_are_the_same_store",
            NotImplementedError,
        ),
    ),
    (
        "isolations",
        Wrong(
            _declaring(_RefusesIsolations, isolations=("serializable", "read_committed")),
            "test_35_every_declared_isolation_commits",
            InvalidInputError,
        ),
    ),
    (
        "query_isolation",
        Wrong(_StreamsWhatComes, "test_49_a_stream_does_not_show_part_of_a_transaction"),
    ),
    (
        "queries_in_transaction",
        Wrong(_QueriesTheCommitted, "test_37_queries_see_its_own_writes_as_declared"),
    ),
    (
        "queries_in_transaction",
        Wrong(
            _declaring(queries_in_transaction="outside"),
            "test_37_queries_see_its_own_writes_as_declared",
        ),
    ),
    (
        "read_conflict_policy",
        Wrong(_LocksNothing, "test_40_an_entity_was_read_and_is_changed_concurrently"),
    ),
    (
        "savepoints",
        Wrong(
            sessions_of(_NoSavepoints),
            "test_44_an_inner_rollback_keeps_the_outer_work",
            InvalidInputError,
        ),
    ),
    ("savepoints", Wrong(_declaring(savepoints=False), _UNDECLARED)),
    ("indexes", Wrong(_ScansEverything, "test_64_a_declared_index_is_used_and_named")),
    ("indexes", Wrong(_declaring(indexes=False), "test_64_a_declared_index_is_used_and_named")),
    ("references", Wrong(_KnowsNoParents, "test_86_a_missing_parent")),
    (
        "references",
        Wrong(_declaring(references=False), "test_86_parents_and_children_in_one_batch"),
    ),
    ("unique_indexes", Wrong(_KnowsNoOwners, "test_99_which_values_are_the_same")),
    ("claims", Wrong(_GivesToTwo, _FIRST_CLAIM)),
    ("change_markers", Wrong(_DropsMarkers, "test_124_a_marker_is_written_with_its_change")),
    (
        "detects_recreation",
        Wrong(_declaring(detects_recreation=True), "test_89_a_stale_writer_after_a_recreation"),
    ),
    (
        "removes_expired",
        Wrong(
            _declaring(_RemovesTooEarly, removes_expired=True),
            "test_114_absent_for_every_read_at_once",
        ),
    ),
    ("feed", Wrong(_FeedsNothing, "test_109_an_entity_comes_as_it_was_written", InvalidInputError)),
    ("feed_order", Wrong(_FeedsBackwards, "test_109_commits_come_in_their_order")),
    (
        "max_feed_retention",
        Wrong(
            _declaring(_ForgetsTooEarly, max_feed_retention=timedelta(days=1)),
            "test_109_an_entity_comes_as_it_was_written",
            FeedExpiredError,
        ),
    ),
    ("default_order", Wrong(_SelectsLastFirst, "test_60_ids_are_ordered_by_code_point")),
    (
        "default_order",
        Wrong(
            _declaring(_SelectsLastFirst, default_order="none"),
            "test_62_pages_show_every_unchanged_row_once",
        ),
    ),
    (
        "conflict_entity",
        Wrong(_TellsNoEntity, "test_26_a_stale_version_is_a_conflict_with_all_details"),
    ),
    (
        "conflict_entity",
        Wrong(
            _declaring(conflict_entity=False),
            "test_26_a_stale_version_is_a_conflict_with_all_details",
        ),
    ),
    (
        "max_transaction_changes",
        Wrong(_declaring(max_transaction_changes=100), "test_42_the_declared_limit_of_changes"),
    ),
    (
        "max_transaction_changes",
        Wrong(
            sessions_of(_RefusesLargeTransactions),
            "test_42_the_declared_limit_of_changes",
            TransactionTooLargeError,
        ),
    ),
    (
        "max_transaction_bytes",
        Wrong(_declaring(max_transaction_bytes=4_000_000), "test_42_the_declared_size_limit"),
    ),
    (
        "write_concurrency",
        Wrong(
            _declaring(_WritesAtOnce, write_concurrency=4), "test_31_concurrent_write_each_calls"
        ),
    ),
    ("write_batch", Wrong(_WritesFew, _COALESCED, UnavailableError)),
    ("read_batch", Wrong(_declaring(_MixesReads, read_batch=64), "test_124_keys_may_repeat")),
    (
        "read_concurrency",
        Wrong(
            _declaring(_ReadsOneByOne, read_batch=4, read_concurrency=4),
            _COALESCED,
            UnavailableError,
        ),
    ),
]
"""Each capability, and an engine that declares it wrongly."""


# The probe is that of a durable engine: JSON passes it in `test_a_wrong_engine_with_files_fails`.
@pytest.mark.parametrize("case", sorted({wrong.case for _, wrong in WRONG} - {_PROBE}))
async def test_the_right_engine_passes(case: str) -> None:
    without = _declaring(sessions_of(_NoSavepoints), savepoints=False)
    await run_case(case, WrongHarness(without) if case == _UNDECLARED else MemoryHarness())


@pytest.mark.parametrize(
    "wrong",
    [wrong for _, wrong in WRONG],
    ids=[f"{name}-{wrong.engine.__name__.strip('_')}" for name, wrong in WRONG],
)
async def test_a_wrong_declaration_fails(wrong: Wrong) -> None:
    await assert_refused(wrong.case, WrongHarness(wrong.engine), wrong.error)


def test_each_capability_is_declared_wrongly() -> None:
    assert {name for name, _ in WRONG} == set(_RIGHT.__struct_fields__)
