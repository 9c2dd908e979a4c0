"""What each query costs, by the number of stored machines, beside the same by hand (queries.csv)."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from time import perf_counter
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from hf_async_store import StorageStrategy, begins_with, gte
from hf_async_store_bench import adapters, data, systems
from hf_async_store_bench.baselines import tables
from hf_async_store_bench.concurrency import alternate
from hf_async_store_bench.csv_rows import rows_beside
from hf_async_store_bench.environments import Environments
from hf_async_store_bench.messages import Measurement, Plan, WrongAnswerError
from hf_async_store_bench.statistics import ratios

BULK_LOADS: Final = {"sqlite": "sqlite3 batched by hand", "postgresql": "asyncpg batched by hand"}
"""The baselines that load in bulk, and run the statements by hand."""

_SIZES: Final = (1000, 10_000, 100_000)
_ROUNDS: Final = 9
_CALLS: Final = 8  # of a query on a store in a round, unless they take longer than this:
_SECONDS: Final = 0.03
_PAGE: Final = 10
_PENDING: Final = {"status": "PENDING"}
_CLAIMED: Final = {"status": "CLAIMED"}
_ONE_REQUEST: Final = {"request_id": data.request_id(5)}
_UNDO: Final = "UPDATE hand_machines SET status = $1 WHERE status = $2"
_SELECT: Final = tables.SELECT.partition(" WHERE ")[0]

Call: TypeAlias = Callable[[], Awaitable[Any]]


class Query(msgspec.Struct, frozen=True):
    """A query: how many machines it returns, counts or changes, and how it is written by hand."""

    name: str
    machines: int
    statement: str = ""
    arguments: str = ""


class Side(NamedTuple):
    """A filled store or its baseline: a call for each query, and what undoes the update."""

    system: str
    entities: int
    calls: Sequence[Call]
    undo: Call


QUERIES: Final = rows_beside(__file__, Query)


async def querying(plan: Plan) -> list[Measurement]:
    """All queries on stores of several sizes, which take turns: the largest is there, others are made."""
    largest = plan.load.entities
    sizes = [*(each for each in _SIZES if each < largest), largest]
    sides: list[Side] = []
    found: list[Measurement] = []
    with Environments.beside(plan.system, plan.environment) as more:
        async with AsyncExitStack() as stack:
            for entities in sizes:
                sides += await _sides(plan, entities, more, stack)
            for place, query in enumerate(QUERIES):
                calls = [partial(_seconds, query, side, side.calls[place]) for side in sides]
                found += _figures(query, sides, await alternate(_ROUNDS, *calls))
    return found


async def _sides(
    plan: Plan, entities: int, more: Environments, stack: AsyncExitStack
) -> list[Side]:
    """The store of this size, and its baseline if it has one."""

    async def filled(system: Any, environment: Any, *, fill: bool = True) -> Any:
        adapter = await system.load().open(environment)
        stack.push_async_callback(adapter.close)
        if fill:
            await adapters.fill(adapter, entities, plan.load.size)
        await more.analyze(system, environment)
        return adapter

    system, is_there = plan.system, entities == plan.load.entities
    place = plan.environment if is_there else more.make(system)
    store = (await filled(system, place, fill=not is_there)).store
    walked = await store.query_page("machines", None, "created_at", 99 * _PAGE)
    undo = partial(store.update_where, "machines", _CLAIMED, _PENDING)
    sides = [Side(system.name, entities, _of_store(store, walked.cursor), undo)]
    if system.name in BULK_LOADS:
        baseline = systems.named(BULK_LOADS[system.name])
        hand = await filled(baseline, more.make(baseline))
        undo = partial(hand.rows, _UNDO, ["PENDING", "CLAIMED"])
        sides.append(Side(baseline.name, entities, _by_hand(hand, walked.items[-1]), undo))
    return sides


def _of_store(store: StorageStrategy, cursor: str | None) -> list[Call]:
    """In the order of QUERIES."""

    def rows(filters: Any, order_by: str | None = None, limit: int | None = 50) -> Call:
        return partial(store.query_entities, "machines", filters, order_by, limit)

    async def page() -> list[data.Entity]:
        return (await store.query_page("machines", None, "created_at", _PAGE, cursor=cursor)).items

    claim = partial(store.update_where, order_by="created_at", limit=10)
    return [
        rows(_PENDING, "-created_at"),
        rows(None, "-created_at"),
        rows({"created_at": gte("2026-06-01T00:00:00Z")}, "created_at"),
        rows(_PENDING),
        rows({"name": begins_with("node-1")}, "name"),
        page,
        rows(_ONE_REQUEST, limit=None),
        partial(store.count_entities, "machines", _ONE_REQUEST),
        partial(claim, "machines", _PENDING, _CLAIMED),
        partial(_save, partial(store.save_entity, "machines")),
    ]


async def _save(save: Callable[[data.Entity], Awaitable[object]]) -> int:
    await save(data.machine(7))
    return 1


def _by_hand(baseline: Any, last: data.Entity) -> list[Call]:
    def call(query: Query) -> Call:
        statement = query.statement.replace("{select}", _SELECT)
        arguments = query.arguments.format(**last, now=data.utc_now()).split()

        async def run() -> object:
            rows = await baseline.rows(statement, arguments)
            if statement.startswith(_SELECT):
                return list(map(tables.entity_of, rows))
            return rows[0][0] if len(rows) == 1 else len(rows)

        return run

    return [*map(call, QUERIES[:-1]), partial(_save, baseline.save)]


async def _seconds(query: Query, side: Side, call: Call) -> float:
    """The median of some calls."""
    taken: list[float] = []
    while len(taken) < _CALLS and sum(taken) < _SECONDS:
        started = perf_counter()
        found = await call()
        taken.append(perf_counter() - started)
        machines = found if isinstance(found, int) else len(found)
        if machines != query.machines:
            raise WrongAnswerError(f"{query.name}: {machines} machines of {side.entities:,}")
        if query.statement.startswith("UPDATE"):
            await side.undo()
    return statistics.median(taken)


def _figures(
    query: Query, sides: Sequence[Side], taken: Sequence[list[float]]
) -> Iterator[Measurement]:
    """The points of the curves, and what is promised of the largest store."""
    found = dict(zip([each[:2] for each in sides], taken, strict=True))
    for (system, entities), samples in found.items():
        yield Measurement(query.name, samples, "s", system=system, entities=entities)
    (system, small), large = next(iter(found)), sides[-1].entities
    ours, what = found[system, large], f"{query.name}, {large:,} machines"
    growth = ratios(ours, found[system, small])
    yield Measurement(f"{what}, against {small:,}", growth, "x", at_most=1.5)
    if (baseline := sides[-1].system) != system and query.statement:
        against = ratios(ours, found[baseline, large])
        yield Measurement(f"{what}, against {baseline}", against, "x", at_most=1.3)
    if system == "json" and query.machines == 50:
        yield Measurement(what, [each * 1000 for each in ours], "ms", at_most=1.0)
