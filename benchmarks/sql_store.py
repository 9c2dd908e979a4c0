"""Measures the SQL store on this machine, beside what one would write by hand on the same drivers.

    python benchmarks/sql_store.py [--quick] [--only NAME ...] [--json FILE]

Starts a PostgreSQL of its own, with fsync. Prints a table and writes a JSON file. The sides of a
comparison take turns in one run, so hold on to the ratios.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import asyncpg  # type: ignore[import-untyped]
import sql_floors as floors
from measure import (
    Figure,
    alternate,
    arguments,
    ratios,
    reported,
    seconds,
)
from stores import Entity, machine, machine_id, request, request_id

from hf_async_store import SQLStorageStrategy, open_store
from hf_async_store.bench.floors import rows
from hf_async_store.testing.servers import postgres

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

_HERE: Final = Path(__file__).parent
_RESULTS: Final = _HERE / "results" / "sql_store.json"
_TASKS: Final = 64
_SIZE: Final = 10_000
_BURST: Final = 1000


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is done.

    Attributes:
        each: operations of each of the waiting tasks of the store; the slower sides do fewer.
    """

    rounds: int = 7
    each: int = 60
    alone: int = 300
    load: int = 10_000


_QUICK: Final = Settings(rounds=3, each=30, alone=150, load=4_000)


@dataclass(frozen=True, slots=True)
class Bench:
    settings: Settings
    folder: Path
    server: Any

    def sqlite(self, name: str) -> Path:
        return self.folder / f"{name}-{next(_NUMBERS)}.db"


_NUMBERS: Final = itertools.count()
Row: TypeAlias = "Callable[[Bench], Coroutine[None, None, list[Figure]]]"
Save: TypeAlias = "Callable[[Entity], Awaitable[object]]"
Get: TypeAlias = "Callable[[str], Awaitable[object]]"


# -- loads ----------------------------------------------------------------------------------


async def saving(save: Save, tasks: int, each: int) -> float:
    """Saves a second by so many tasks; new and old entities in turns."""

    async def work(task: int) -> None:
        for n in range(each):
            await save(machine((task * 7919 + n * 31) % _SIZE))

    return tasks * each / await seconds(_all(work, tasks))


async def getting(get: Get, tasks: int, each: int) -> float:
    """Gets a second by so many tasks."""

    async def work(task: int) -> None:
        for n in range(each):
            assert await get(machine_id((task * 7919 + n * 31) % _SIZE)) is not None

    return tasks * each / await seconds(_all(work, tasks))


async def _all(work: Callable[[int], Awaitable[None]], tasks: int) -> None:
    async with asyncio.TaskGroup() as group:
        for task in range(tasks):
            group.create_task(work(task))  # type: ignore[arg-type]  # coroutines, all of them


async def fill(store: SQLStorageStrategy, size: int = _SIZE) -> None:
    await store.save_entity("templates", {"template_id": "t-1"})
    await store.save_entities("requests", [request(n) for n in range(-(-size // 1000) + 20)])
    for start in range(0, size, 1000):
        await store.save_entities("machines", [machine(n) for n in range(start, start + 1000)])


async def fill_bare(core: floors.Core, size: int = _SIZE) -> None:
    await core.make()
    async with core.engine.begin() as connection:
        for table, name, ids in zip(
            floors.PARENTS,
            ("template_id", "request_id"),
            (["t-1"], [request_id(n) for n in range(100)]),
            strict=True,
        ):
            await connection.execute(table.insert(), [{name: each} for each in ids])
        for start in range(0, size, 1000):
            rows = [floors.row_of(machine(n)) for n in range(start, start + 1000)]
            await connection.execute(floors.BARE.insert(), rows)


def _save(store: SQLStorageStrategy) -> Save:
    return lambda entity: store.save_entity("machines", entity)


def _get(store: SQLStorageStrategy) -> Get:
    return lambda entity_id: store.get_entity("machines", entity_id)


def compared(
    row: str, what: str, ours: Sequence[float], theirs: Sequence[float], by: str, **target: float
) -> Figure:
    """Ours as a multiple of theirs; the rates beside."""
    beside = {"ours/s": _median(ours), f"{by}/s": _median(theirs)}
    return Figure(row, what, ratios(ours, theirs), "x", beside=beside, **target)


def _median(samples: Sequence[float]) -> float:
    return sorted(samples)[len(samples) // 2]


# -- SQLite ---------------------------------------------------------------------------------


async def sqlite_waiting(bench: Bench) -> list[Figure]:
    """64 tasks waiting."""
    setting = bench.settings
    async with AsyncExitStack() as stack:
        store = await _sqlite_store(bench, stack)
        core = await _sqlite_core(bench, stack)
        saves = await alternate(
            setting.rounds,
            lambda: saving(_save(store), _TASKS, setting.each),
            lambda: saving(core.save, _TASKS, max(setting.each // 15, 2)),
        )
        gets = await alternate(
            setting.rounds,
            lambda: getting(_get(store), _TASKS, setting.each * 3),
            lambda: getting(core.get, _TASKS, max(setting.each // 10, 3)),
        )
    return [
        compared("sqlite", "64 waiting: durable saves", *saves, "Core", at_least=15),
        compared("sqlite", "64 waiting: gets", *gets, "Core", at_least=20),
    ]


async def sqlite_alone(bench: Bench) -> list[Figure]:
    """One at a time."""
    setting = bench.settings
    async with AsyncExitStack() as stack:
        store = await _sqlite_store(bench, stack)
        core = await _sqlite_core(bench, stack)
        saves = await alternate(
            setting.rounds,
            lambda: saving(_save(store), 1, setting.alone),
            lambda: saving(core.save, 1, setting.alone),
        )
        gets = await alternate(
            setting.rounds,
            lambda: getting(_get(store), 1, setting.alone),
            lambda: getting(core.get, 1, setting.alone),
        )
    return [
        compared("sqlite", "one at a time: saves", *saves, "Core begin/commit", at_least=1),
        compared("sqlite", "one at a time: gets", *gets, "Core", at_least=1),
    ]


async def sqlite_many(bench: Bench) -> list[Figure]:
    """1,000 machines in one transaction, and a bulk load."""
    setting = bench.settings
    numbers = itertools.count(_SIZE, _BURST)
    loads = itertools.count(10**6, setting.load)
    async with AsyncExitStack() as stack:
        store = await _sqlite_store(bench, stack)
        path = bench.sqlite("bare")
        core = floors.sqlite_core(path)
        stack.push_async_callback(core.close)
        await fill_bare(core)
        connection = await stack.enter_async_context(
            floors.aiosqlite.connect(bench.sqlite("rows"), isolation_level=None)
        )
        await floors.prepare(connection)
        await rows.make_sqlite(connection)
        stored = [machine(n) for n in range(_SIZE)]
        await rows.add_parents_sqlite(connection, *rows.parents_of(stored))
        await rows.insert_sqlite(connection, stored)
        bursts = await alternate(
            setting.rounds,
            lambda: _burst(store, next(numbers)),
            lambda: seconds(rows.insert_sqlite(connection, _machines(next(numbers), _BURST))),
        )
        many = await alternate(
            max(setting.rounds // 2, 2),
            lambda: _import(store, next(loads), setting.load),
            lambda: _rate(
                floors.sqlite_load(path, _machines(next(loads), setting.load)), setting.load
            ),
        )
    return [
        _slower("sqlite", "1,000 machines in one transaction", *bursts, at_most=1.5),
        compared("sqlite", f"import of {setting.load:,}", *many, "executemany", at_least=0.3),
    ]


async def _sqlite_store(bench: Bench, stack: AsyncExitStack) -> Any:
    store = await stack.enter_async_context(open_store(f"sqlite:{bench.sqlite('store')}"))
    await fill(store)  # type: ignore[arg-type]
    return store


async def _sqlite_core(bench: Bench, stack: AsyncExitStack) -> floors.Core:
    core = floors.sqlite_core(bench.sqlite("core"))
    stack.push_async_callback(core.close)
    await fill_bare(core)
    return core


def _machines(start: int, count: int) -> list[Entity]:
    entities = [machine(n) for n in range(start, start + count)]
    for each in entities:
        each["request_id"] = "req-00000000"
    return entities


async def _burst(store: SQLStorageStrategy, start: int) -> float:
    machines = _machines(start, _BURST)

    async def work() -> None:
        async with store.begin_transaction() as tx:
            await tx.create_entities("machines", machines)

    return await seconds(work())


async def _import(store: SQLStorageStrategy, start: int, count: int) -> float:
    machines = _machines(start, count)

    async def work() -> None:
        for at in range(0, count, 1000):
            await store.import_entities("machines", machines[at : at + 1000])

    return await _rate(work(), count)


async def _rate(work: Awaitable[object], count: int) -> float:
    return count / await seconds(work)


def _slower(
    row: str, what: str, ours: Sequence[float], theirs: Sequence[float], **target: float
) -> Figure:
    beside = {"ours ms": _median(ours) * 1000, "by hand ms": _median(theirs) * 1000}
    return Figure(row, what, ratios(ours, theirs), "x as long", beside=beside, **target)


# -- PostgreSQL -----------------------------------------------------------------------------


async def _postgres(bench: Bench, stack: AsyncExitStack) -> tuple[Any, floors.Core, Any]:
    """The store, Core and an asyncpg pool, each on a database of one server."""
    url = bench.server.database()
    store = await stack.enter_async_context(open_store(url))
    await fill(store)  # type: ignore[arg-type]
    bare = bench.server.database()
    core = floors.postgresql_core(bare)
    stack.push_async_callback(core.close)
    await fill_bare(core)
    pool = await stack.enter_async_context(asyncpg.create_pool(bare, min_size=32, max_size=32))
    for each in (url, bare):
        bench_connection = await asyncpg.connect(each)
        await bench_connection.execute("VACUUM ANALYZE")
        await bench_connection.close()
    return store, core, pool


async def postgresql_waiting(bench: Bench) -> list[Figure]:
    """64 tasks waiting."""
    setting = bench.settings
    async with AsyncExitStack() as stack:
        store, _, pool = await _postgres(bench, stack)
        by_pool = floors.AsyncpgPool(pool)

        async def held() -> float:
            each = setting.each
            machines = [
                [machine((task * 7919 + n * 31) % _SIZE) for n in range(each)] for task in range(32)
            ]
            return await _rate(floors.held_saves(pool, machines), 32 * each)

        ours, theirs, holding = await alternate(
            setting.rounds,
            lambda: saving(_save(store), _TASKS, setting.each),
            lambda: saving(by_pool.save, _TASKS, max(setting.each // 3, 5)),
            held,
        )
        gets = await alternate(
            setting.rounds,
            lambda: getting(_get(store), _TASKS, setting.each * 3),
            lambda: getting(by_pool.get, _TASKS, setting.each),
        )
    return [
        compared("postgresql", "64 waiting: saves", ours, theirs, "pool", at_least=2),
        compared("postgresql", "64 waiting: saves", ours, holding, "held", at_least=1),
        compared("postgresql", "64 waiting: gets", *gets, "pool", at_least=2),
    ]


async def postgresql_alone(bench: Bench) -> list[Figure]:
    """One at a time."""
    setting = bench.settings
    async with AsyncExitStack() as stack:
        store, core, _ = await _postgres(bench, stack)
        saves = await alternate(
            setting.rounds,
            lambda: saving(_save(store), 1, setting.alone),
            lambda: saving(core.save, 1, setting.alone),
        )
        gets = await alternate(
            setting.rounds,
            lambda: getting(_get(store), 1, setting.alone),
            lambda: getting(core.get, 1, setting.alone),
        )
    return [
        compared("postgresql", "one at a time: saves", *saves, "Core autocommit", at_least=1 / 1.3),
        compared("postgresql", "one at a time: gets", *gets, "Core autocommit", at_least=1 / 1.3),
    ]


async def postgresql_many(bench: Bench) -> list[Figure]:
    """1,000 machines in one transaction, and a bulk load."""
    setting = bench.settings
    numbers = itertools.count(_SIZE, _BURST)
    loads = itertools.count(10**6, setting.load)
    async with AsyncExitStack() as stack:
        store, _, pool = await _postgres(bench, stack)
        connection = await stack.enter_async_context(pool.acquire())
        await rows.make_postgres(connection)
        stored = [machine(n) for n in range(_SIZE)]
        await rows.add_parents_postgres(connection, *rows.parents_of(stored))
        await rows.insert_postgres(connection, stored)
        await connection.execute("ANALYZE")
        bursts = await alternate(
            setting.rounds,
            lambda: _burst(store, next(numbers)),
            lambda: seconds(rows.insert_postgres(connection, _machines(next(numbers), _BURST))),
        )
        many = await alternate(
            max(setting.rounds // 2, 2),
            lambda: _import(store, next(loads), setting.load),
            lambda: _rate(
                floors.postgresql_load(pool, _machines(next(loads), setting.load)), setting.load
            ),
        )
    return [
        _slower("postgresql", "1,000 machines in one transaction", *bursts, at_most=1.5),
        compared("postgresql", f"import of {setting.load:,}", *many, "COPY", at_least=0.3),
    ]


ROWS: Final[dict[str, Row]] = {
    "sqlite-waiting": sqlite_waiting,
    "sqlite-alone": sqlite_alone,
    "sqlite-many": sqlite_many,
    "postgresql-waiting": postgresql_waiting,
    "postgresql-alone": postgresql_alone,
    "postgresql-many": postgresql_many,
}


def main() -> None:
    options = arguments("Measures the SQL store on this machine.", ROWS, _RESULTS).parse_args()
    settings = _QUICK if options.quick else Settings()
    drivers = ("sqlalchemy", "aiosqlite", "asyncpg")
    with (
        reported(options, settings, drivers) as (folder, figures),
        postgres(durable=True) as server,
    ):
        bench = Bench(settings, folder, server)
        for name in options.only:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            gc.collect()
            figures += asyncio.run(ROWS[name](bench))


if __name__ == "__main__":
    main()
