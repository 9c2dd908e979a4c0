"""Standbys, failovers, read-only databases, and URLs with several servers, as in libpq."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from hf_async_store import (
    ConfigurationError,
    ReadOnlyStoreError,
    StorageError,
    UnavailableError,
    load_config,
    open_store,
    path,
)
from hf_async_store.testing.proxy import FaultyProxy
from hf_async_store.values import Key
from hf_async_store_bench.servers import ServerUnavailable, postgres
from tests.contract.harnesses import execute
from tests.sql.standby import Standby, standby_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_async_store_bench.servers import PostgresServer


def template(name: str, **fields: object) -> dict[str, object]:
    return {"template_id": name, **fields}


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[PostgresServer, Standby]]:
    """A primary for this module, and a hot standby that is never promoted."""
    try:
        with postgres() as server, standby_of(server) as standby:
            yield server, standby
    except ServerUnavailable as exc:
        pytest.skip(str(exc))


@pytest.fixture
def replicated(pair: tuple[PostgresServer, Standby]) -> Iterator[Replicated]:
    """A database with one entity, and its URLs on both servers."""
    server, standby = pair
    url = server.database()
    asyncio.run(_one_template(url))
    standby.follow(server)
    yield Replicated(url, standby.port)
    server.drop(url)


class Replicated:
    def __init__(self, url: str, standby: int) -> None:
        parts = urlsplit(url)
        assert parts.port is not None
        self.primary, self.standby, self.name = parts.port, standby, parts.path[1:]

    def url(self, *ports: int, **more: object) -> str:
        """The URL of these servers, in this order."""
        hosts = ",".join(f"127.0.0.1:{each}" for each in ports)
        query = "&".join(f"{key}={value}" for key, value in more.items())
        return f"postgresql://postgres@{hosts}/{self.name}?{query}"


async def _one_template(url: str) -> None:
    async with open_store(url) as store:
        await store.save_entity("templates", template("t", n=0))


async def port_of(store: Any) -> int:
    """The port of the server to which a store is connected."""
    async with store._sql._main.lease() as lease:
        [[port]] = await lease.rows("SELECT inet_server_port()")
    return int(port)


# -- standbys -------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ["serializable", "repeatable_read", "read_committed"])
async def test_every_read_works_on_a_standby(replicated: Replicated, isolation: str) -> None:
    url = replicated.url(replicated.standby, isolation=isolation)
    async with open_store(url) as store:
        found = await store.get_entity("templates", "t")
        assert found is not None
        assert await store.get_entities("templates", ["t", "u"]) == [found, None]
        assert await store.query_entities("templates", {path("n"): 0}) == [found]
        assert await store.count_entities("templates") == 1
        assert [each async for each in store.stream_entities("templates")] == [found]
        assert (await store.query_page("templates", limit=5)).items == [found]
        assert (await store.explain_query("templates", {path("n"): 0})).access == "scan"
        async with store.snapshot() as snapshot:
            assert await snapshot.fetch([Key("templates", "t")]) != [None]
        for wanted in (None, *store.capabilities.isolations):
            async with store.begin_transaction(wanted) as tx:
                assert await tx.get_entity("templates", "t") == found
        sql = "SELECT pg_is_in_recovery() AS standby"
        assert await store.execute_with_lock(sql) == [{"standby": True}]  # type: ignore[attr-defined]
        report = await store.health()
        assert "standby" in str(report["problems"])


async def test_every_write_to_a_standby_reports_that_it_is_read_only(
    replicated: Replicated,
) -> None:
    async with open_store(replicated.url(replicated.standby)) as store:

        async def in_transaction() -> None:
            async with store.begin_transaction() as tx:
                await tx.delete_entity("templates", "t")

        for work in (
            lambda: store.save_entity("templates", template("t")),
            lambda: store.update_entity("templates", "t", {"n": 1}),
            lambda: store.delete_entity("templates", "t"),
            in_transaction,
            lambda: store.execute_with_lock("DELETE FROM templates"),  # type: ignore[attr-defined]
            store.test_connection,
        ):
            with pytest.raises(
                ReadOnlyStoreError, match="target_session_attrs|try again"
            ) as caught:
                await work()
            assert not caught.value.outcome_unknown
        with pytest.raises(ReadOnlyStoreError) as last:
            await store.save_entity("templates", template("t"))
        assert not last.value.retryable
        assert await store.get_entity("templates", "t") is not None


async def test_an_endpoint_that_briefly_pointed_to_the_standby(replicated: Replicated) -> None:
    """Like a delayed DNS update after a failover: connections opened then must not be kept."""
    with FaultyProxy("127.0.0.1", replicated.standby) as link:
        async with open_store(replicated.url(link.port)) as store:
            reads = [store.get_entity("templates", "t") for _ in range(5)]
            reads += [store.query_entities("templates") for _ in range(5)]  # type: ignore[misc]
            await asyncio.gather(*reads)
            with pytest.raises(ReadOnlyStoreError):
                await store.update_entity("templates", "t", {"n": 1})
            link.to = "127.0.0.1", replicated.primary
            await asyncio.sleep(0.3)
            # The first attempt succeeds, without a failure in between.
            assert await store.update_entity("templates", "t", {"n": 1}) == 2
            changes = [store.save_entity("templates", template(f"x{n}")) for n in range(20)]
            assert await asyncio.gather(*changes) == [1] * 20
            async with store.begin_transaction() as tx:
                await tx.save_entity("templates", template("y"))
            assert (await store.health())["ok"] is True


async def test_a_transaction_refused_by_a_read_only_server_is_retryable(
    replicated: Replicated,
) -> None:
    with FaultyProxy("127.0.0.1", replicated.standby) as link:
        async with open_store(replicated.url(link.port)) as store:
            assert await store.get_entity("templates", "t") is not None
            assert await store.count_entities("templates") == 1
            link.to = "127.0.0.1", replicated.primary
            await asyncio.sleep(0.3)
            with pytest.raises(ReadOnlyStoreError) as caught:
                async with store.begin_transaction() as tx:
                    await tx.update_entity("templates", "t", {"n": 1})
            assert caught.value.retryable
            async with store.begin_transaction() as tx:
                await tx.update_entity("templates", "t", {"n": 1})


async def test_which_server_is_chosen(replicated: Replicated) -> None:
    primary, standby = replicated.primary, replicated.standby
    for wanted, order, taken in (
        ("any", (standby, primary), standby),
        ("read-write", (standby, primary), primary),
        ("primary", (1, standby, primary), primary),
        ("standby", (primary, standby), standby),
        ("read-only", (primary, standby), standby),
        ("prefer-standby", (primary, standby), standby),
        ("prefer-standby", (1, primary), primary),
    ):
        url = replicated.url(*order, target_session_attrs=wanted)
        async with open_store(url) as store:
            assert await store.get_entity("templates", "t") is not None
            assert await port_of(store) == taken, wanted
    url = replicated.url(primary, standby, load_balance_hosts="random", pool_size=1)
    taken_at_random = set()
    for _ in range(40):
        async with open_store(url) as store:
            taken_at_random.add(await port_of(store))
    assert taken_at_random == {primary, standby}


async def test_no_server_of_the_requested_kind(replicated: Replicated) -> None:
    for wanted, port, said in (
        ("primary", replicated.standby, "is a standby"),
        ("standby", replicated.primary, "is a primary"),
        ("read-only", replicated.primary, "accepts writes"),
    ):
        async with open_store(replicated.url(port, target_session_attrs=wanted)) as store:
            with pytest.raises(UnavailableError, match=f"{said}.*{wanted}") as caught:
                await store.get_entity("templates", "t")
            assert caught.value.retryable
    url = replicated.url(1, replicated.standby, target_session_attrs="primary")
    async with open_store(url) as store:
        with pytest.raises(UnavailableError) as both:
            await store.get_entity("templates", "t")
    assert "127.0.0.1:1:" in str(both.value)
    assert f"127.0.0.1:{replicated.standby} is a standby" in str(both.value)


async def test_failover_to_the_standby() -> None:
    """The primary is stopped and the standby promoted: the open store continues on the new primary."""
    try:
        with postgres(durable=True) as server, standby_of(server) as standby:
            url = server.database()
            name, port = urlsplit(url).path[1:], urlsplit(url).port
            servers = f"127.0.0.1:{port},127.0.0.1:{standby.port}"
            both = f"postgresql://postgres@{servers}/{name}?target_session_attrs=read-write"
            async with (
                open_store(both) as store,
                open_store(f"postgresql://postgres@127.0.0.1:{standby.port}/{name}") as reader,
            ):
                await store.save_entity("templates", template("t", n=0))
                await asyncio.to_thread(standby.follow, server)
                assert await reader.get_entity("templates", "t") is not None
                await asyncio.to_thread(server.kill)
                with pytest.raises(UnavailableError):
                    await store.update_entity("templates", "t", {"n": 1})
                await asyncio.to_thread(standby.promote)
                version = await _written(store)
                assert await port_of(store) == standby.port
                # By then, a store that was connected to the standby writes there, as expected.
                assert await reader.update_entity("templates", "t", {"n": 2}) == version + 1
                sql = "SELECT current_setting('transaction_isolation') AS isolation"
                [row] = await reader.execute_with_lock(sql)  # type: ignore[attr-defined]
                assert row == {"isolation": "serializable"}
    except ServerUnavailable as exc:
        pytest.skip(str(exc))


async def _written(store: Any) -> int:
    async with asyncio.timeout(20):
        while True:
            with suppress(UnavailableError):
                version: int = await store.update_entity("templates", "t", {"n": 1})
                return version
            await asyncio.sleep(0.05)


# -- an administrator's settings ------------------------------------------------------------


@pytest.mark.parametrize("whose", ["DATABASE", "ROLE"])
async def test_a_database_that_was_set_to_read_only_is_not_written(
    database: str, whose: str, postgres_server: PostgresServer
) -> None:
    await _one_template(database)
    elsewhere = postgres_server.url
    name, role = urlsplit(database).path[1:], f"frozen_{urlsplit(database).path[1:]}"
    execute(database, f"CREATE ROLE {role} SUPERUSER LOGIN")
    url = database.replace("postgres@", f"{role}@")
    target = name if whose == "DATABASE" else role
    try:
        async with open_store(url) as store:
            await store.get_entity("templates", "t")
            execute(elsewhere, f"ALTER {whose} {target} SET default_transaction_read_only = on")
            async with open_store(url) as frozen:
                with pytest.raises(
                    ReadOnlyStoreError, match="default_transaction_read_only"
                ) as caught:
                    await frozen.update_entity("templates", "t", {"n": 1})
                assert not caught.value.retryable
                with pytest.raises(ReadOnlyStoreError):
                    await frozen.test_connection()
                assert await frozen.get_entity("templates", "t") is not None
                assert await frozen.count_entities("templates") == 1
                execute(elsewhere, f"ALTER {whose} {target} RESET default_transaction_read_only")
                await asyncio.sleep(0.3)
                assert await frozen.update_entity("templates", "t", {"n": 1}) == 2
    finally:
        execute(elsewhere, f"DROP ROLE {role}")


async def test_no_table_is_created_in_a_read_only_database(database: str) -> None:
    name = urlsplit(database).path[1:]
    execute(database, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with open_store(database) as store:
        with pytest.raises(ReadOnlyStoreError):
            await store.save_entity("templates", template("t"))


# -- what a URL says ------------------------------------------------------------------------


async def test_settings_of_a_url_are_set_in_the_session(database: str) -> None:
    execute(database, 'CREATE SCHEMA "Own"')
    url = (
        f"{database}?application_name=factory&schema=Own&connect_timeout=3"
        "&options=-c%20work_mem=7MB&channel_binding=prefer&gssencmode=disable"
    )
    async with open_store(url) as store:
        await store.save_entity("templates", template("t"))
        names = ("application_name", "search_path", "work_mem", "default_transaction_isolation")
        columns = ", ".join(f"current_setting('{each}') AS {each}" for each in names)
        [row] = await store.execute_with_lock(f"SELECT {columns}")  # type: ignore[attr-defined]
        assert list(row.values()) == ["factory", '"Own"', "7MB", "serializable"]
        assert await store.count_entities("templates") == 1
    async with open_store(database) as other:
        assert await other.count_entities("templates") == 0  # its tables are in another schema


async def test_a_schema_that_is_not_there_is_named(database: str) -> None:
    async with open_store(f"{database}?schema=nowhere") as store:
        with pytest.raises(ConfigurationError, match="schema"):
            await store.save_entity("templates", template("t"))


async def test_connect_timeout_applies_to_each_server(database: str) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    parts = urlsplit(database)
    try:
        url = f"postgresql://postgres@127.0.0.1:{port}/x?connect_timeout=2"
        async with open_store(url) as store:
            began = time.monotonic()
            with pytest.raises(UnavailableError, match="connect_timeout") as caught:
                await store.save_entity("templates", template("t"))
            assert time.monotonic() - began < 10
            assert not caught.value.outcome_unknown
        both = f"postgresql://postgres@127.0.0.1:{port},127.0.0.1:{parts.port}{parts.path}"
        async with open_store(f"{both}?connect_timeout=2") as store:
            await store.save_entity("templates", template("t"))
    finally:
        server.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "h/db?channel_binding=require",
            "channel_binding: 'require' is not supported by the driver",
        ),
        ("h/db?gssencmode=require", "gssencmode: 'require' is not supported by the driver"),
        ("h/db?target_session_attrs=master", "target_session_attrs: expected 'any' or"),
        ("h/db?keepalives=1", "keepalives: unknown key"),
        ("h1,h2/db?port=1,2,3", "port: 3 ports for 2 hosts"),
        ("h1,h2/db?port=1,x", "port: expected a number"),
        ("h1:1,h2:70000/db", "port: expected integer <= 65535"),
        ("h/db?schema=own&pgbouncer=yes", "schema: not supported with pgbouncer"),
    ],
)
def test_unsupported_settings_are_refused_by_name(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        load_config(f"postgresql://me@{url}")


def test_several_servers_in_a_url_and_in_a_map() -> None:
    for given, servers in (
        ("postgresql://me@h1:1,h2:2/db", [("h1", 1), ("h2", 2)]),
        ("postgresql://me@h1,h2/db", [("h1", 0), ("h2", 0)]),
        ("postgresql://me@h1,h2/db?port=7", [("h1", 7), ("h2", 7)]),
        ("postgresql://me@h1:1,h2/db", [("h1", 1), ("h2", 0)]),
        ("postgresql://me@[::1]:1,h2:2/db", [("::1", 1), ("h2", 2)]),
        ("postgresql:///db?host=/run/a,h2&port=1,2", [("/run/a", 1), ("h2", 2)]),
        ({"host": "h1,h2", "port": "1,2"}, [("h1", 1), ("h2", 2)]),
        ({"host": "h1,h2", "port": 5}, [("h1", 5), ("h2", 5)]),
        ({"host": "h1", "port": "5"}, [("h1", 5)]),
    ):
        source = (
            given if isinstance(given, str) else {"sql_strategy": {"type": "postgresql", **given}}  # type: ignore[dict-item]
        )
        options: Any = load_config(source).options
        assert options.servers() == servers, given


@pytest.mark.parametrize("host", ["no..host", "x" * 70, "nowhere.invalid"])
async def test_an_invalid_host_is_named(host: str) -> None:
    async with open_store(f"postgresql://me@{host}/db?timeout=5") as store:
        with pytest.raises(StorageError, match="host|resolve|known|name") as caught:
            await store.get_entity("templates", "t")
    assert isinstance(caught.value, ConfigurationError | UnavailableError)
    assert host[:20] in str(caught.value)


async def test_a_server_that_is_not_there_is_asked_about() -> None:
    async with open_store("postgresql://app@127.0.0.1:1/jobs") as store:
        with pytest.raises(UnavailableError) as caught:
            await store.get_entity("templates", "t")
    assert str(caught.value) == (
        "cannot connect to 127.0.0.1:1: connection refused; is the server running? Check host and port"
    )
    assert caught.value.retryable


@pytest.mark.parametrize("seen", [False, True])
async def test_a_session_that_was_ended_is_explained(database: str, seen: bool) -> None:
    """Whether the driver sees it before the next statement, and discards the reason, or with it."""
    end = (
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    async with open_store(database) as store:
        await store.save_entity("templates", {"template_id": "t"})
        tx = await store.begin_transaction().__aenter__()
        await tx.get_entity("templates", "t")
        if seen:
            await asyncio.to_thread(execute, database, end)
            await asyncio.sleep(0.1)
        else:
            execute(database, end)
        with pytest.raises(
            UnavailableError, match="server (is|was) restarted or shut down"
        ) as caught:
            await tx.get_entity("templates", "u")
        assert "idle" not in str(caught.value).partition("restarted")[0]
        with suppress(StorageError):
            await tx.__aexit__(None, None, None)
