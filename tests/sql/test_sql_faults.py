"""Faults of real engines: killed servers, broken connections, full disks."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from hf_async_store import (
    BatchError,
    ConcurrencyConflictError,
    CorruptionError,
    DiskFullError,
    PermissionDeniedError,
    PoolTimeoutError,
    ReadOnlyStoreError,
    StorageError,
    UnavailableError,
    open_store,
    path,
)
from hf_async_store.strategies.sql.connections import Connections
from hf_async_store.testing.proxy import FaultyProxy
from hf_async_store_bench.acked_writes import AckedByEntity, AckedWrites, lost_writes, writing
from hf_async_store_bench.servers import ServerUnavailable, postgres
from tests.contract.harnesses import RestartedPostgreSQLHarness, ask, execute
from tests.contract.wrong_engines import run_case

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hf_async_store import StorageStrategy


def template(name: str, **fields: object) -> dict[str, object]:
    return {"template_id": name, **fields}


@asynccontextmanager
async def store_behind_proxy(database: str) -> AsyncIterator[tuple[StorageStrategy, FaultyProxy]]:
    """A store whose connections go through a proxy."""
    parts = urlsplit(database)
    assert parts.hostname is not None
    assert parts.port is not None
    with FaultyProxy(parts.hostname, parts.port) as link:
        through = database.replace(f":{parts.port}/", f":{link.port}/")
        async with open_store(f"{through}?sslmode=disable") as store:
            yield store, link


async def until_it_works(work: Any, seconds: float = 20) -> None:
    """Retry until it succeeds, without reopening the store."""
    async with asyncio.timeout(seconds):
        while True:
            with suppress(UnavailableError):
                await work()
                return
            await asyncio.sleep(0.05)


# -- PostgreSQL -----------------------------------------------------------------------------


async def test_84_the_server_is_killed_under_load_and_restarted() -> None:
    try:
        context = postgres(durable=True)
        server = context.__enter__()
    except ServerUnavailable as exc:
        pytest.skip(str(exc))
    try:
        await _killed_under_load(server)
    finally:
        context.__exit__(None, None, None)


async def test_84_the_case_of_the_contract_about_a_killed_server() -> None:
    try:
        with postgres(durable=True) as server:
            harness = RestartedPostgreSQLHarness(server)
            await run_case("test_84_what_was_acknowledged_outlasts_the_server", harness)
    except ServerUnavailable as exc:
        pytest.skip(str(exc))


async def _acknowledge(acknowledged: AckedByEntity, count: int) -> None:
    """Wait until so many more writes were acknowledged."""
    wanted = len(acknowledged) + count
    async with asyncio.timeout(60):
        while len(acknowledged) < wanted:
            await asyncio.sleep(0.05)


async def _killed_under_load(server: Any) -> None:
    acknowledged: AckedByEntity = {}
    tried: AckedByEntity = {}
    stop = asyncio.Event()
    failures: list[StorageError] = []

    async def write(store: Any, task: int) -> None:
        n = 0
        while not stop.is_set():
            n += 1
            name = f"{task}-{n}"
            entry = tried[name] = AckedWrites()
            try:
                with writing(entry):
                    if n % 3:
                        await store.save_entity("templates", template(name, x=n))
                    else:
                        async with store.begin_transaction() as tx:
                            await tx.save_entity("templates", template(name, x=n))
                acknowledged[name] = entry
            except StorageError as exc:
                failures.append(exc)
                await asyncio.sleep(0.01)

    async def read(store: Any) -> None:
        while not stop.is_set():
            try:
                name = next(iter(acknowledged), None)
                if name is not None:
                    found = await store.get_entity("templates", name)
                    assert found is not None, "an error was reported as a missing entity"
            except StorageError as exc:
                failures.append(exc)
            await asyncio.sleep(0.005)

    async with open_store(server.database()) as store:
        async with asyncio.TaskGroup() as group:
            for task in range(12):
                group.create_task(write(store, task))
            group.create_task(read(store))
            for how in (server.kill, server.stop):
                await _acknowledge(acknowledged, 10)
                await asyncio.to_thread(how)
                await asyncio.sleep(0.2)
                await asyncio.to_thread(server.start)
                await _acknowledge(acknowledged, 50)
            stop.set()
        assert failures, "no write failed while the server was down"
        for each in failures:
            assert isinstance(each, UnavailableError | ConcurrencyConflictError), repr(each)
            assert each.__cause__ is not None
        found = await store.get_entities("templates", list(tried))
        stored = zip(tried, found, strict=True)
        assert lost_writes(tried, stored, first_version={}) == [], (
            "an acknowledged write is lost, or a refused one is stored"
        )
        assert {
            each["template_id"] for each in await store.query_entities("templates")
        } <= tried.keys()


async def test_73_cancellations_leave_all_connections_usable(database: str) -> None:
    async with open_store(f"{database}?pool_size=4&max_overflow=4") as store:
        await store.save_entities("templates", [template(f"t{n}", n=n) for n in range(300)])

        async def transaction() -> None:
            async with store.begin_transaction() as tx:
                await tx.get_entity("templates", "t1")
                await tx.save_entity("templates", template(f"t{random.randrange(300)}"))
                await tx.query_entities("templates", {path("n"): 5})

        async def stream() -> None:
            async for _ in store.stream_entities("templates"):
                await asyncio.sleep(0)

        works = (
            transaction,
            stream,
            lambda: store.save_entity("templates", template(f"t{random.randrange(300)}")),
            lambda: store.get_entity("templates", "t1"),
            lambda: store.query_entities("templates", {path("n"): 7}),
            lambda: store.count_entities("templates"),
        )
        for _ in range(50):
            tasks = [asyncio.ensure_future(random.choice(works)()) for _ in range(10)]
            await asyncio.sleep(random.uniform(0, 0.01))
            for each in tasks:
                each.cancel()
            for found in await asyncio.gather(*tasks, return_exceptions=True):
                assert not isinstance(found, Exception) or isinstance(
                    found, ConcurrencyConflictError
                ), repr(found)
        name = urlsplit(database).path[1:]
        states = f"SELECT state FROM pg_stat_activity WHERE datname = '{name}'"
        postgres_url = database.replace(f"/{name}", "/postgres")
        sql = store._sql  # type: ignore[attr-defined]
        pools = (sql._main, sql._readers, sql._streams)
        for _ in range(100):
            found_states = await asyncio.to_thread(ask, postgres_url, states)
            in_use = [each.figures()["in_use"] for each in pools]
            if set(found_states) <= {"idle"} and not any(in_use):
                break
            await asyncio.sleep(0.05)
        assert set(found_states) <= {"idle"}, found_states
        assert in_use == [0, 0, 0]
        assert len(found_states) <= 8 + sql._streams.figures()["open"]
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(
                    store.run_transaction(lambda tx: tx.get_entity("templates", "t1"))
                )


async def test_71_an_exhausted_pool_names_its_settings(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[bool] = []  # whether each caller that needs a connection would wait for it
    permit = Connections._wait_for_permit

    async def noted(self: Connections, patience: float) -> None:
        waits.append(self._waits)
        await permit(self, patience)

    monkeypatch.setattr(Connections, "_wait_for_permit", noted)
    more = "pool_size=1&max_overflow=1&pool_timeout=1&max_streams=2"
    async with open_store(f"{url}?{more}") as store:
        await store.save_entities("templates", [template(f"t{n}") for n in range(600)])
        async with AsyncExitStack() as held:
            for _ in range(2):
                await held.enter_async_context(store._sql._main.lease())  # type: ignore[attr-defined]
            with pytest.raises(
                PoolTimeoutError, match=r"pool_size.*max_overflow.*pool_timeout"
            ) as no:
                await store.count_entities("templates")
            waits.clear()
            with pytest.raises(PoolTimeoutError):
                await store.query_entities("templates", limit=1)
            with pytest.raises(PoolTimeoutError):
                await store.count_entities("templates")
            assert waits == [True, True], "each waits once"
        assert no.value.retryable
        assert not no.value.outcome_unknown
        assert await store.count_entities("templates") == 600
        streams = [store.stream_entities("templates") for _ in range(2)]
        for each in streams:
            await anext(each)
        assert await store.count_entities("templates") == 600
        waits.clear()
        with pytest.raises(PoolTimeoutError, match="max_streams") as no:
            await anext(store.stream_entities("templates"))
        assert waits == [False], "at once"
        assert no.value.retryable
        await streams.pop().aclose()
        assert len([each async for each in store.stream_entities("templates")]) == 600
        for each in streams:
            await each.aclose()


@pytest.mark.parametrize("verb", ["transaction", "save", "batch"])
async def test_71_a_lost_response_is_an_unknown_outcome(database: str, verb: str) -> None:
    async with store_behind_proxy(database) as (store, link):
        await store.save_entity("templates", template("t", n=0))
        if verb == "transaction":
            link.lose_next_answer(lambda data: b"COMMIT" in data)
            with pytest.raises(UnavailableError) as caught:
                async with store.begin_transaction() as tx:
                    await tx.save_entity("templates", template("t", n=1))
            error: StorageError = caught.value
        else:
            link.lose_next_answer(lambda data: b"marker" in data)
            marked = template("t", n=1, note="marker")
            work = (
                store.save_entity("templates", marked)
                if verb == "save"
                else store.save_entities("templates", [marked, template("u")])
            )
            with pytest.raises(StorageError) as lost:
                await work
            error = lost.value
        assert link.lost == 1
        assert error.outcome_unknown
        if isinstance(error, BatchError):
            assert all(isinstance(each, UnavailableError) for each in error.outcomes)
        else:
            assert error.__cause__ is not None
        # It was applied; and the store is usable without reopening.
        found = await store.get_entity("templates", "t")
        assert found is not None
        assert (found["n"], found["version"]) == (1, 2)


async def test_71_the_first_connection_is_lost_while_it_is_opened(database: str) -> None:
    """SQLAlchemy sends statements of its own on the first connection."""
    async with store_behind_proxy(database) as (store, link):
        link.lose_next_answer(lambda data: b"show transaction isolation level" in data)
        assert await store.save_entity("templates", template("t")) == 1
        assert link.lost == 1


async def test_71_a_read_is_retried_after_a_broken_connection(database: str) -> None:
    async with store_behind_proxy(database) as (store, link):
        await store.save_entity("templates", template("needle"))
        link.lose_next_answer(lambda data: b"needle" in data)
        assert await store.get_entity("templates", "needle") is not None
        assert link.lost == 1


async def test_71_no_server_listens() -> None:
    async with open_store("postgresql://me@127.0.0.1:1/db?timeout=2") as store:
        with pytest.raises(UnavailableError) as caught:
            await store.save_entity("templates", template("t"))
        assert caught.value.retryable
        assert not caught.value.outcome_unknown
        report = await store.health()
        assert report["ok"] is False


async def test_71_a_missing_privilege(database: str) -> None:
    async with open_store(database) as store:
        await store.save_entity("templates", template("t"))
    role = f"reader_{random.randrange(10**9)}"
    execute(
        database,
        f"CREATE ROLE {role} LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}",
    )
    try:
        async with open_store(database.replace("postgres@", f"{role}@")) as store:
            # The tables exist, so none is created; the granted operations work.
            assert await store.get_entity("templates", "t") is not None
            assert await store.count_entities("templates") == 1
            with pytest.raises(PermissionDeniedError):
                await store.save_entity("templates", template("t"))
    finally:
        execute(database, f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_71_a_statement_timeout(database: str) -> None:
    async with open_store(f"{database}?timeout=2") as store:
        with pytest.raises(StorageError) as caught:
            await store.execute_with_lock("SELECT pg_sleep(60)")  # type: ignore[attr-defined]
        assert type(caught.value).__name__ == "OperationTimeoutError"
        await store.save_entity("templates", template("t"))


# -- SQLite ---------------------------------------------------------------------------------


async def test_71_a_full_disk(tmp_path: Path) -> None:
    async with open_store(f"sqlite:{tmp_path}/store.db?pool_size=1&max_overflow=0") as store:
        await store.save_entity("templates", template("kept", note="x" * 1000))
        [[pages]] = await _rows(store, "PRAGMA page_count")
        await _set(store, f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(DiskFullError) as caught:
            await _fill(store)
        assert not caught.value.outcome_unknown
        kept = await store.get_entity("templates", "kept")
        assert kept is not None
        assert kept["note"] == "x" * 1000
        await _set(store, "PRAGMA max_page_count = 1000000")
        await store.save_entity("templates", template("more", note="y" * 5000))


async def test_71_a_read_only_database(tmp_path: Path) -> None:
    async with open_store(f"sqlite:{tmp_path}/store.db?pool_size=1&max_overflow=0") as store:
        await store.save_entity("templates", template("t"))
        await _set(store, "PRAGMA query_only = ON")
        with pytest.raises(ReadOnlyStoreError):
            await store.save_entity("templates", template("u"))
        assert await store.get_entity("templates", "t") is not None
        await _set(store, "PRAGMA query_only = OFF")
        await store.save_entity("templates", template("u"))


async def test_a_file_that_is_not_a_database(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"this is no database" * 1000)
    async with open_store(f"sqlite:{path}") as store:
        for work in (
            lambda: store.get_entity("templates", "t"),
            lambda: store.save_entity("templates", template("t")),
            lambda: store.query_entities("templates"),
        ):
            with pytest.raises(CorruptionError):
                await work()
        assert (await store.health())["ok"] is False
    assert path.read_bytes() == b"this is no database" * 1000


async def test_71_another_process_holds_the_lock(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path}/store.db"
    async with open_store(url) as store, open_store(f"{url}?timeout=1") as other:
        await store.save_entity("templates", template("t"))
        async with store.begin_transaction() as tx:
            await tx.update_entity("templates", "t", {"name": "mine"})
            with pytest.raises(StorageError) as caught:
                await asyncio.create_task(other.save_entity("templates", template("t")))
            assert type(caught.value).__name__ == "LockTimeoutError"
            assert (
                f"another process, or another store object of this process, holds the lock of {tmp_path}"
                in str(caught.value)
            )
            assert caught.value.retryable
            # Readers do not wait.
            found = await asyncio.create_task(other.get_entity("templates", "t"))
            assert found is not None
            assert "name" not in found
        await other.save_entity("templates", template("t"))


async def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    async with open_store(f"sqlite:{tmp_path}/sub/store.db") as store:
        await store.save_entity("templates", template("t"))
        modes = {each.name: each.stat().st_mode & 0o777 for each in (tmp_path / "sub").iterdir()}
    assert modes == dict.fromkeys(modes, 0o600)
    assert "store.db-wal" in modes


async def _fill(store: Any) -> None:
    for n in range(50):
        await store.save_entity("templates", template(f"t{n}", note="y" * 5000))


async def _set(store: Any, sql: str) -> None:
    """Change a setting of the store's connection, which users cannot access."""
    async with store._sql._main.lease() as lease:
        await lease.rows(sql)


async def _rows(store: Any, sql: str) -> list[list[object]]:
    return [list(each.values()) for each in await store.execute_with_lock(sql)]
