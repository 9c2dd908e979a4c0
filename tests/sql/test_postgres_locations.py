"""Stores on a server: their identity, names that need quotes, and objects of other users in the
schema."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import pytest

from hf_async_store import (
    begins_with,
    between,
    contains,
    exists,
    gt,
    gte,
    in_,
    lte,
    ne,
    open_store,
    path,
)
from hf_async_store_bench.servers import ServerUnavailable
from tests.contract.harnesses import execute
from tests.pgbouncer import pgbouncer
from tests.sql.standby import standby_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_async_store_bench.servers import PostgresServer


async def same(one: str, other: str) -> bool:
    """Whether the dialect identifies two stores as the same, in both directions."""
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


async def test_different_stores_of_one_server(
    database: str, postgres_server: PostgresServer
) -> None:
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


async def test_a_standby_is_the_same_store_and_a_promoted_copy_is_not(
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
    # Also with the search_path of the role.
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


# -- objects of others in the schema --------------------------------------------------------

_TYPES = [
    "text",
    "varchar",
    "bpchar",
    "name",
    "int2",
    "int4",
    "int8",
    "float8",
    "numeric",
    "bool",
    "jsonb",
    "json",
    "text[]",
    "int8[]",
]
_FUNCTIONS = [
    "octet_length",
    "length",
    "count",
    "jsonb_typeof",
    "jsonb_array_elements",
    "jsonb_array_elements_text",
    "unnest",
    "lower",
]
_FUNCTIONS_OF_TWO = ["left", "strpos", "starts_with"]
_OPERATORS = ["=", "<>", "<", "<=", ">", ">=", "||", "-", "?", "->", "->>", "#>>", "@>", "+", "*"]


def _impostors(types: list[str]) -> str:
    """Functions and operators with the names that statements use, for every argument type.

    Those in pg_catalog with the same name and types have precedence; each other one might be the
    better match.
    """
    body = "LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'the code of another role ran'; END $$"
    made = []
    for one in types:
        made += [f"CREATE FUNCTION {name}({one}) RETURNS text {body}" for name in _FUNCTIONS]
        for two in types:
            made += [
                f"CREATE FUNCTION {name}({one}, {two}) RETURNS text {body}"
                for name in _FUNCTIONS_OF_TWO
            ]
            made.append(f"CREATE FUNCTION impostor({one}, {two}) RETURNS bool {body}")
            made += [
                f"CREATE OPERATOR {each} (LEFTARG = {one}, RIGHTARG = {two}, FUNCTION = impostor)"
                for each in _OPERATORS
            ]
    return "; ".join(made)


async def test_no_function_or_operator_of_another_role_is_run(database: str) -> None:
    """A role that may only create objects in the schema creates functions with the same names."""
    execute(database, "CREATE ROLE impostor LOGIN; GRANT CREATE ON SCHEMA public TO PUBLIC")
    try:
        async with open_store(database) as store:
            await store.save_entity("templates", {"template_id": "first"})
        execute(database.replace("postgres@", "impostor@"), _impostors(_TYPES))
        await every_verb(database)
        async with open_store(database) as store:
            await every_filter(store)
    finally:
        execute(database, "DROP OWNED BY impostor; DROP ROLE impostor")


async def every_filter(store: Any) -> None:
    entity = {"template_id": "t", "name": "x", "doc": {"a": [1, "b", None], "n": 1.5}, "l": ["x"]}
    await store.save_entity("templates", entity)
    await store.update_entity("templates", "t", {"doc": {"a": []}, "l": None})
    for filters in (
        {"name": ne("y")},
        {"name": gt("a")},
        {"name": between("a", "z")},
        {"name": in_(["x", "y"])},
        {"name": contains("x")},
        {"name": begins_with("x")},
        {"name": exists(True)},
        {"name": None},
        {"template_id": in_(["t"])},
        {"created_at": gte("2020-01-01")},
        {"version": gt(0)},
        {path("doc", "n"): 1.5},
        {path("doc", "n"): gt(1)},
        {path("doc", "a", 0): contains("b")},
        {path("doc", "a"): contains("b"), path("x"): begins_with("b")},
        {path("doc", "s"): lte("b"), path("doc", "t"): in_([1, "x", None])},
    ):
        await store.query_entities("templates", filters)
        await store.count_entities("templates", filters)
    await store.query_entities("templates", order_by="name", limit=2)
