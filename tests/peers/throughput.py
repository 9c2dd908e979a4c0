"""How fast the adapters are beside the peers' own backends: both sides in turn, medians of the rounds.

    python tests/peers/throughput.py [--postgresql URL] [--only NAME] [--rounds N]

`run.py --throughput` starts it with a PostgreSQL server of its own. Each line has the operations of a
second of the peer's own backend, those of the adapter, and their ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from examples import (
    key_value_store,
    langgraph_saver,
    langgraph_store,
    rate_limit_storage,
    scheduler_data_store,
    users_database,
)

from hf_async_store import open_store

TASKS: Final = 64
WORKERS: Final = 8
Work = Callable[[], Awaitable[object]]


async def rate(work: Callable[[int], Awaitable[object]], count: int, tasks: int = TASKS) -> float:
    """Operations a second of tasks that share the numbers 0 to count - 1."""
    numbers = iter(range(count))

    async def task() -> None:
        for number in numbers:
            await work(number)

    began = time.perf_counter()
    await asyncio.gather(*(task() for _ in range(tasks)))
    return count / (time.perf_counter() - began)


class Place:
    """Where the stores of one side of one round are."""

    def __init__(self, folder: Path, postgresql: str | None) -> None:
        self.folder = folder
        self.postgresql = postgresql

    def url(self, engine: str) -> str:
        if engine == "postgresql":
            return f"{self.postgresql}?table_prefix=t{secrets.token_hex(3)}"
        return {"memory": "memory:", "sqlite": f"sqlite:{self.folder}/s.db"}[engine]


def _sqlalchemy(place: Place) -> str:
    return str(place.postgresql).replace("postgresql:", "postgresql+asyncpg:")


# -- py-key-value ---------------------------------------------------------------------------


async def key_values(store: Any, count: int = 3000) -> dict[str, float]:
    value = {"name": "x" * 200, "n": 1}
    async with store if hasattr(store, "__aenter__") else AsyncExitStack():
        await store.put("warm", value)
        put = await rate(lambda n: store.put(str(n), value), count)
        return {"put": put, "get": await rate(lambda n: store.get(str(n)), count)}


async def own_key_values(engine: str, place: Place) -> dict[str, float]:
    if engine == "postgresql":
        from key_value.aio.stores.postgresql import PostgreSQLStore

        table = f"t{secrets.token_hex(3)}"
        return await key_values(PostgreSQLStore(url=str(place.postgresql), table_name=table))
    if engine == "memory":
        from key_value.aio.stores.memory import MemoryStore

        return await key_values(MemoryStore())
    from key_value.aio.stores.disk import DiskStore

    return await key_values(DiskStore(directory=place.folder))


async def our_key_values(engine: str, place: Place) -> dict[str, float]:
    return await key_values(key_value_store.EntityKeyValueStore(place.url(engine)))


# -- limits ---------------------------------------------------------------------------------


async def hits(storage: Any, count: int = 3000) -> dict[str, float]:
    from limits import parse
    from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter

    limit = parse("100/minute")
    fixed, moving = FixedWindowRateLimiter(storage), MovingWindowRateLimiter(storage)
    return {
        "fixed window": await rate(lambda n: fixed.hit(limit, str(n % 640)), count),
        "moving window": await rate(lambda n: moving.hit(limit, str(n % 640)), count),
    }


async def own_hits(engine: str, place: Place) -> dict[str, float]:
    from limits.aio.storage import MemoryStorage

    return await hits(MemoryStorage())


async def our_hits(engine: str, place: Place) -> dict[str, float]:
    collections = rate_limit_storage.COLLECTIONS
    async with open_store(place.url(engine), collections=collections) as store:
        return await hits(rate_limit_storage.EntityStorage(store=store))


# -- fastapi-users --------------------------------------------------------------------------


async def users(database: Callable[[], Any], count: int = 300) -> dict[str, float]:
    async def create(number: int) -> None:
        async with database() as users:
            await users.create({"email": f"{number}@example.com", "hashed_password": "x"})

    async def get(number: int) -> None:
        async with database() as users:
            assert await users.get_by_email(f"{number}@example.com")

    return {"create": await rate(create, count), "get by address": await rate(get, count)}


async def own_users(engine: str, place: Place) -> dict[str, float]:
    from fastapi_users_db_sqlalchemy import SQLAlchemyBaseUserTableUUID, SQLAlchemyUserDatabase
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
    from sqlalchemy.orm import DeclarativeBase

    class Base(DeclarativeBase):
        pass

    class User(SQLAlchemyBaseUserTableUUID, Base):
        pass

    if engine == "postgresql":
        sql = create_async_engine(_sqlalchemy(place))
    else:  # by one connection, or tasks would find the database locked
        url = f"sqlite+aiosqlite:///{place.folder}/u.db"
        sql = create_async_engine(url, pool_size=1, max_overflow=0)
    async with sql.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    sessions = async_sessionmaker(sql, expire_on_commit=False)

    @asynccontextmanager
    async def database() -> AsyncGenerator[Any, None]:
        async with sessions() as session:
            yield SQLAlchemyUserDatabase(session, User)

    try:
        return await users(database)
    finally:
        await sql.dispose()


async def our_users(engine: str, place: Place) -> dict[str, float]:
    async with open_store(place.url(engine), collections=users_database.COLLECTIONS) as store:

        @asynccontextmanager
        async def database() -> AsyncGenerator[Any, None]:
            yield users_database.EntityUserDatabase(store, users_database.User)

        return await users(database)


# -- APScheduler ----------------------------------------------------------------------------


async def jobs(stores: list[Any], count: int = 480) -> dict[str, float]:
    """Workers acquire jobs and release them with a result, as a scheduler does."""
    from apscheduler import Job, JobOutcome, JobResult, Task
    from apscheduler.eventbrokers.local import LocalEventBroker

    async with AsyncExitStack() as stack:
        import logging

        broker, logger = LocalEventBroker(), logging.getLogger("bench")
        await broker.start(stack, logger)
        for each in stores:
            await each.start(stack, broker, logger)
        await stores[0].add_task(Task(id="t", func="builtins:print", job_executor="async"))

        async def add(number: int) -> None:
            await stores[number % WORKERS].add_job(Job(task_id="t", executor="async"))

        async def work(store: Any, name: str) -> None:
            while acquired := await store.acquire_jobs(name, timedelta(seconds=30), 10):
                for job in acquired:
                    result = JobResult.from_job(job, JobOutcome.success, return_value=None)
                    await store.release_job(name, job, result)

        async def work_off(count: int) -> tuple[float, float]:
            added = await rate(add, count)
            began = time.perf_counter()
            await asyncio.gather(*(work(each, f"w{at}") for at, each in enumerate(stores)))
            return added, count / (time.perf_counter() - began)

        await work_off(10 * WORKERS)  # opens the connections
        added, worked = await work_off(count)
        assert await stores[0].get_jobs() == []
        return {"add": added, "acquire and release": worked}


async def own_jobs(engine: str, place: Place) -> dict[str, float]:
    from apscheduler.datastores.sqlalchemy import SQLAlchemyDataStore
    from sqlalchemy.ext.asyncio import create_async_engine

    sql = create_async_engine(_sqlalchemy(place))
    try:
        first = SQLAlchemyDataStore(sql, start_from_scratch=True)
        return await jobs([first, *(SQLAlchemyDataStore(sql) for _ in range(WORKERS - 1))])
    finally:
        await sql.dispose()


async def our_jobs(engine: str, place: Place) -> dict[str, float]:
    collections = scheduler_data_store.COLLECTIONS
    async with open_store(place.url(engine), collections=collections) as store:
        return await jobs([scheduler_data_store.EntityDataStore(store) for _ in range(WORKERS)])


async def our_jobs_apart(engine: str, place: Place) -> dict[str, float]:
    """As many stores as workers, as in as many processes."""
    url = place.url(engine)
    return await jobs([scheduler_data_store.EntityDataStore(url) for _ in range(WORKERS)])


# -- LangGraph ------------------------------------------------------------------------------


async def conformance(saver: Callable[[Path], Any], folder: Path) -> dict[str, float]:
    from langgraph.checkpoint.conformance import checkpointer_test, validate

    names = iter(range(100))

    @checkpointer_test(name=f"bench-{secrets.token_hex(4)}")
    async def made() -> AsyncGenerator[Any, None]:
        async with saver(folder / f"{next(names)}.db") as each:
            yield each

    began = time.perf_counter()
    common = {"put", "put_writes", "get_tuple", "list", "delete_thread"}
    report = await validate(made, capabilities=common)
    assert report.passed_all_base(), report.results
    return {"conformance suites": 1 / (time.perf_counter() - began)}


async def own_checkpoints(engine: str, place: Place) -> dict[str, float]:
    from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

    return await conformance(lambda p: AsyncSqliteSaver.from_conn_string(str(p)), place.folder)


async def our_checkpoints(engine: str, place: Place) -> dict[str, float]:
    @asynccontextmanager
    async def saver(path: Path) -> AsyncGenerator[Any, None]:
        async with open_store(f"sqlite:{path}", collections=langgraph_saver.COLLECTIONS) as store:
            yield langgraph_saver.EntitySaver(store)

    return await conformance(saver, place.folder)


async def items(store: Any, count: int = 2000) -> dict[str, float]:
    async def put(number: int) -> None:
        await store.aput(("users", str(number % 20)), str(number), {"likes": "tea", "n": number})

    async def get(number: int) -> None:
        assert await store.aget(("users", str(number % 20)), str(number))

    async def search(number: int) -> None:
        found = await store.asearch(("users", str(number % 20)), filter={"likes": "tea"}, limit=5)
        assert len(found) == 5

    puts, gets = await rate(put, count), await rate(get, count)
    return {"put": puts, "get": gets, "search": await rate(search, count // 4)}


async def own_items(engine: str, place: Place) -> dict[str, float]:
    from langgraph.store.sqlite import AsyncSqliteStore

    async with AsyncSqliteStore.from_conn_string(f"{place.folder}/i.db") as store:
        await store.setup()
        return await items(store)


async def our_items(engine: str, place: Place) -> dict[str, float]:
    async with open_store(place.url(engine), collections=langgraph_store.COLLECTIONS) as store:
        return await items(langgraph_store.EntityMemoryStore(store))


COMPARED: Final[dict[str, Any]] = {
    "py-key-value, memory": (own_key_values, our_key_values, "memory"),
    "py-key-value, disk and SQLite": (own_key_values, our_key_values, "sqlite"),
    "py-key-value, PostgreSQL": (own_key_values, our_key_values, "postgresql"),
    "limits, memory": (own_hits, our_hits, "memory"),
    "limits, memory and SQLite": (own_hits, our_hits, "sqlite"),
    "fastapi-users, SQLite": (own_users, our_users, "sqlite"),
    "fastapi-users, PostgreSQL": (own_users, our_users, "postgresql"),
    "APScheduler, PostgreSQL": (own_jobs, our_jobs, "postgresql"),
    "APScheduler, PostgreSQL, 8 stores": (own_jobs, our_jobs_apart, "postgresql"),
    "LangGraph checkpoints, SQLite": (own_checkpoints, our_checkpoints, "sqlite"),
    "LangGraph store, SQLite": (own_items, our_items, "sqlite"),
}


def compared(name: str, rounds: int, postgresql: str | None) -> None:
    *sides, engine = COMPARED[name]
    found: list[list[dict[str, float]]] = [[], []]
    for _ in range(rounds):
        for side, results in zip(sides, found, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                results.append(asyncio.run(side(engine, Place(Path(folder), postgresql))))
    for work in found[0][0]:
        own, ours = (statistics.median(each[work] for each in results) for results in found)
        print(
            f"{name}: {work}: {own:,.2f} own, {ours:,.2f} adapter, {ours / own:.2f} x", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--postgresql", help="the URL of an empty database")
    parser.add_argument("--only", action="append", choices=list(COMPARED))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name in options.only or COMPARED:
        if options.postgresql or COMPARED[name][-1] != "postgresql":
            compared(name, options.rounds, options.postgresql)


if __name__ == "__main__":
    main()
