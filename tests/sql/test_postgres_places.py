"""Where a store is on a server: whether two are one, names that need quotes, and other people's
objects in its schema."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import pytest

from hf_async_store import open_store
from hf_async_store.testing.servers import ServerUnavailable, pgbouncer
from tests.contract.harnesses import execute
from tests.sql.standby import standby_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_async_store.testing.servers import PostgresServer


async def same(one: str, other: str) -> bool:
    """What the dialect says of two stores, asked both ways."""
    async with open_store(one) as mine, open_store(other) as theirs:
        sql: Any = mine._sql  # type: ignore[attr-defined]
        others: Any = theirs._sql  # type: ignore[attr-defined]
        async with sql._main.lease() as first, others._main.lease() as second:
            dialect = sql._dialect
            found: bool = await dialect.is_same_store(first.driver, second.driver)
            assert await dialect.is_same_store(second.driver, first.driver) is found
            assert await dialect.is_same_store(first.driver, first.driver)
            for each in (first, second):
                assert not each.driver.is_in_transaction()
        return found


async def test_one_store_by_several_names(database: str) -> None:
    parts = urlsplit(database)
    execute(database, "CREATE ROLE other_name SUPERUSER LOGIN")
    try:
        for spelt in (
            database,
            database.replace("127.0.0.1", "localhost"),
            database.replace("postgres@", "other_name@"),
            f"postgresql://postgres@127.0.0.1:1,127.0.0.1:{parts.port}{parts.path}",
            f"{database}?schema=public&isolation=read_committed",
            f"{database}?pgbouncer=yes",
        ):
            assert await same(database, spelt), spelt
    finally:
        execute(database, "DROP ROLE other_name")


async def test_other_stores_of_the_server(database: str, postgres_server: PostgresServer) -> None:
    async with open_store(database) as store:
        await store.save_entity("templates", {"template_id": "t"})
    copied = await asyncio.to_thread(postgres_server.copy, database)
    execute(database, "CREATE SCHEMA apart")
    try:
        for other in (postgres_server.url, copied, f"{database}?schema=apart"):
            assert not await same(database, other), other
        assert await same(f"{database}?schema=apart", f"{database}?schema=apart")
    finally:
        postgres_server.drop(copied)


async def test_a_standby_is_its_primary_and_a_promoted_copy_is_not(
    database: str, postgres_server: PostgresServer
) -> None:
    with standby_of(postgres_server) as standby:
        port = urlsplit(database).port
        other = database.replace(f":{port}/", f":{standby.port}/")
        assert await same(database, other)
        assert await same(other, other)
        await asyncio.to_thread(standby.promote)
        assert not await same(database, other)


@pytest.fixture
def behind_pgbouncer(postgres_server: PostgresServer, database: str) -> Iterator[str]:
    try:
        with pgbouncer(postgres_server) as address:
            name = urlsplit(database).path
            yield f"postgresql://postgres@{address}{name}?pgbouncer=yes"
    except ServerUnavailable as exc:
        pytest.skip(str(exc))


async def test_behind_pgbouncer(
    database: str, behind_pgbouncer: str, postgres_server: PostgresServer
) -> None:
    assert await same(behind_pgbouncer, behind_pgbouncer)
    assert await same(database, behind_pgbouncer)
    assert not await same(behind_pgbouncer, postgres_server.url)


# -- names that need quotes -----------------------------------------------------------------

ODD = 'My "odd" Name; é'


async def every_verb(url: str) -> None:
    async with open_store(url) as store:
        await store.create_entities(
            "requests", [{"request_id": f"r{n}", "status": "NEW"} for n in range(3)]
        )
        await store.save_entity("machines", {"machine_id": "m", "request_id": "r1"})
        assert await store.update_entity("requests", "r1", {"status": "DONE", "n": 1.5}) == 2
        assert await store.get_entity("requests", "r1") is not None
        assert await store.count_entities("requests", {"status": "NEW"}) == 2
        assert len([each async for each in store.stream_entities("requests")]) == 3
        async with store.begin_transaction() as tx:
            await tx.delete_entity("requests", "r2")
        sql = "SELECT count(*) AS n FROM requests"
        assert await store.execute_with_lock(sql) == [{"n": 2}]  # type: ignore[attr-defined]
        await store.explain_query("requests", {"status": "NEW"})
        report = await store.health()
        assert report["ok"], report["problems"]
        assert report["table_bytes"]["requests"] > 0  # type: ignore[index, call-overload]
        assert await store.test_connection() > 0
    async with open_store(url) as again:
        assert await again.count_entities("requests") == 2


async def test_a_schema_whose_name_needs_quotes(database: str) -> None:
    name = ODD.replace('"', '""')
    execute(database, f'CREATE SCHEMA "{name}"')
    await every_verb(f"{database}?schema={quote(ODD, safe='')}")
    # By the role's own search_path, too.
    database_name = urlsplit(database).path[1:]
    execute(
        database, f'CREATE SCHEMA "Own-2"; ALTER DATABASE {database_name} SET search_path = "Own-2"'
    )
    await every_verb(database)


async def test_a_role_whose_name_needs_quotes(database: str) -> None:
    name = ODD.replace('"', '""')
    execute(database, f'CREATE ROLE "{name}" SUPERUSER LOGIN; CREATE SCHEMA "{name}"')
    try:
        await every_verb(database.replace("postgres@", f"{quote(ODD, safe='')}@"))
    finally:
        execute(database, f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


async def test_a_database_whose_name_needs_quotes(postgres_server: PostgresServer) -> None:
    name = ODD.replace('"', '""')
    execute(postgres_server.url, f'CREATE DATABASE "{name}"')
    try:
        url = postgres_server.url.removesuffix("/postgres") + "/" + quote(ODD, safe="")
        await every_verb(url)
    finally:
        execute(postgres_server.url, f'DROP DATABASE "{name}" WITH (FORCE)')
