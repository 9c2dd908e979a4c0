"""The error class and message for each error of PostgreSQL and of its driver."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import asyncpg  # type: ignore[import-untyped]  # it has no types
import pytest

from hf_async_store import (
    AuthenticationError,
    ConcurrencyConflictError,
    ConfigurationError,
    CorruptionError,
    DiskFullError,
    InvalidInputError,
    InvalidQueryError,
    LockTimeoutError,
    OperationTimeoutError,
    PermissionDeniedError,
    ProtocolError,
    ReadOnlyStoreError,
    ReferenceViolationError,
    SchemaMismatchError,
    StorageError,
    UnavailableError,
    UnsupportedValueError,
    open_store,
)
from hf_async_store.query import Query
from hf_async_store.strategies.sql import engine, errors, retries, sending
from hf_async_store.strategies.sql.errors import postgres_error
from tests.contract.harnesses import execute

if TYPE_CHECKING:
    from pathlib import Path

    from hf_async_store_bench.servers import PostgresServer

pytestmark = pytest.mark.hf_sampled(by="url")

# The classes of the manual's appendix A, up to version 18.
CLASSES = [
    "00",
    "01",
    "02",
    "03",
    "08",
    "09",
    "0A",
    "0B",
    "0F",
    "0L",
    "0P",
    "0Z",
    "10",
    "20",
    "21",
    "22",
    "23",
    "24",
    "25",
    "26",
    "27",
    "28",
    "2B",
    "2D",
    "2F",
    "34",
    "38",
    "39",
    "3B",
    "3D",
    "3F",
    "40",
    "42",
    "44",
    "53",
    "54",
    "55",
    "57",
    "58",
    "72",
    "F0",
    "HV",
    "P0",
    "XX",
]

# SQLSTATE: the error for a statement of the store, whether it is retryable, whether a write may have
# been applied; and the error for a statement of the caller, if that differs.
MEANT: dict[str, tuple[type[StorageError], bool, bool, type[StorageError] | None]] = {
    "00000": (ProtocolError, False, True, None),
    "01000": (ProtocolError, False, True, None),
    "02000": (ProtocolError, False, False, InvalidInputError),
    "03000": (ProtocolError, False, False, InvalidInputError),
    "08000": (UnavailableError, False, True, None),
    "08001": (UnavailableError, True, False, None),
    "08003": (UnavailableError, False, True, None),
    "08006": (UnavailableError, False, True, None),
    "08P01": (ProtocolError, False, True, None),
    "09000": (InvalidInputError, False, False, None),
    "0A000": (ProtocolError, False, False, InvalidInputError),
    "0B000": (ProtocolError, False, False, InvalidInputError),
    "0F001": (ProtocolError, False, False, InvalidInputError),
    "0L000": (PermissionDeniedError, False, False, None),
    "0P000": (ConfigurationError, False, False, InvalidInputError),
    "0Z000": (InvalidInputError, False, False, None),
    "10608": (ProtocolError, False, False, InvalidInputError),
    "20000": (InvalidInputError, False, False, None),
    "21000": (ProtocolError, False, False, InvalidInputError),
    "22003": (ProtocolError, False, False, InvalidInputError),
    "22021": (UnsupportedValueError, False, False, None),
    "22P05": (UnsupportedValueError, False, False, None),
    "23000": (InvalidInputError, False, False, None),
    "23001": (ReferenceViolationError, False, False, InvalidInputError),
    "23502": (InvalidInputError, False, False, None),
    "23503": (ReferenceViolationError, False, False, None),
    "23505": (InvalidInputError, False, False, None),
    "23514": (InvalidInputError, False, False, None),
    "23P01": (InvalidInputError, False, False, None),
    "24000": (ProtocolError, False, False, InvalidInputError),
    "25001": (ProtocolError, False, False, InvalidInputError),
    "25006": (ReadOnlyStoreError, False, False, None),
    "25P02": (ProtocolError, False, False, InvalidInputError),
    "25P03": (UnavailableError, True, False, None),
    "26000": (ProtocolError, False, False, InvalidInputError),
    "27000": (InvalidInputError, False, False, None),
    "28000": (AuthenticationError, False, False, None),
    "28P01": (AuthenticationError, False, False, None),
    "2BP01": (ProtocolError, False, False, InvalidInputError),
    "2D000": (ProtocolError, False, False, InvalidInputError),
    "2F005": (InvalidInputError, False, False, None),
    "34000": (ProtocolError, False, False, InvalidInputError),
    "38000": (InvalidInputError, False, False, None),
    "39000": (InvalidInputError, False, False, None),
    "3B001": (ProtocolError, False, False, InvalidInputError),
    "3D000": (ConfigurationError, False, False, InvalidInputError),
    "3F000": (ConfigurationError, False, False, InvalidInputError),
    "40001": (ConcurrencyConflictError, True, False, None),
    "40002": (InvalidInputError, False, False, None),
    "40003": (ConcurrencyConflictError, False, True, None),
    "40P01": (ConcurrencyConflictError, True, False, None),
    "42501": (PermissionDeniedError, False, False, None),
    "42601": (ProtocolError, False, False, InvalidInputError),
    "42701": (SchemaMismatchError, False, False, InvalidInputError),
    "42703": (SchemaMismatchError, False, False, InvalidInputError),
    "42710": (SchemaMismatchError, False, False, InvalidInputError),
    "42804": (SchemaMismatchError, False, False, InvalidInputError),
    "42883": (SchemaMismatchError, False, False, InvalidInputError),
    "42P01": (SchemaMismatchError, False, False, InvalidInputError),
    "42P07": (SchemaMismatchError, False, False, InvalidInputError),
    "44000": (InvalidInputError, False, False, None),
    "53000": (UnavailableError, True, False, None),
    "53100": (DiskFullError, False, False, None),
    "53200": (UnavailableError, True, False, None),
    "53300": (UnavailableError, True, False, None),
    "54000": (UnsupportedValueError, False, False, InvalidInputError),
    "54001": (InvalidQueryError, False, False, InvalidInputError),
    "54011": (ConfigurationError, False, False, InvalidInputError),
    "54023": (InvalidQueryError, False, False, InvalidInputError),
    "55000": (ProtocolError, False, False, InvalidInputError),
    "55006": (UnavailableError, True, False, None),
    "55P03": (LockTimeoutError, True, False, None),
    "57014": (OperationTimeoutError, True, False, None),
    "57P01": (UnavailableError, False, True, None),
    "57P02": (UnavailableError, False, True, None),
    "57P03": (UnavailableError, True, False, None),
    "57P04": (ConfigurationError, False, True, None),
    "57P05": (UnavailableError, True, False, None),
    "58000": (UnavailableError, False, True, None),
    "58030": (UnavailableError, False, True, None),
    "58P01": (CorruptionError, False, True, None),
    "72000": (ConcurrencyConflictError, True, False, None),
    "F0000": (UnavailableError, False, False, None),
    "F0001": (UnavailableError, True, False, None),
    "HV000": (InvalidInputError, False, False, None),
    "P0001": (InvalidInputError, False, False, None),
    "P0002": (InvalidInputError, False, False, None),
    "XX000": (ProtocolError, False, True, None),
    "XX001": (CorruptionError, False, True, None),
    "XX002": (CorruptionError, False, True, None),
}


def template(key: str, **fields: object) -> dict[str, object]:
    return {"template_id": key, **fields}


# -- the table ------------------------------------------------------------------------------


def test_the_table_knows_every_class_and_every_state_of_the_driver() -> None:
    assert list(errors._CLASSES) == CLASSES
    assert {each[:2] for each in MEANT} == set(CLASSES)
    assert errors._STATES.keys() <= MEANT.keys() | {"08004", "25P04", "42704", "42809", "42P18"}
    for name in dir(asyncpg.exceptions):
        state = getattr(getattr(asyncpg.exceptions, name), "sqlstate", None)
        if state:
            assert state[:2] in errors._CLASSES, name


@pytest.mark.parametrize("state", MEANT)
def test_each_sqlstate_has_its_error_class(state: str) -> None:
    kind, retryable, unknown, callers = MEANT[state]
    error = postgres_error(state, "what it said", doing="write", writes=True)
    assert type(error) is kind
    assert (error.retryable, error.outcome_unknown) == (retryable, unknown)
    assert "what it said" in str(error)
    # A read has no unknown outcome.
    assert not postgres_error(state, "it", doing="read", writes=False).outcome_unknown
    own = postgres_error(state, "it", doing="execute", writes=False, callers=True)
    assert type(own) is (callers or kind)
    if callers is not None:
        assert str(own).startswith("execute_with_lock: ")
        assert not own.retryable


def test_an_invalid_sqlstate_leaves_the_outcome_of_a_write_unknown() -> None:
    for state in ("", "ZZ000", "\x00", "99999"):
        error = postgres_error(state, "?", doing="write", writes=True)
        assert type(error) is ProtocolError
        assert error.outcome_unknown
        assert not postgres_error(state, "?", doing="read", writes=False).outcome_unknown


async def test_each_sqlstate_raised_by_the_server(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trigger raises each state. States that end the connection are tested only with the table."""
    for module in (engine, sending):  # what is tried again ends soon; a statement may take its time
        monkeypatch.setattr(module, "conflict_backoff", lambda _: retries.conflict_backoff(0.3))
    async with open_store(database) as store:
        await store.save_entity("templates", template("t"))
        execute(
            database,
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE EXCEPTION 'refused here' USING ERRCODE = NEW.doc ->> 'name'; END $$; "
            'CREATE TRIGGER refuse BEFORE INSERT ON "templates-entities" '
            "FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        for state, (kind, retryable, unknown, _) in MEANT.items():
            if state == "00000":
                continue  # no exception can have this state
            with pytest.raises(StorageError, match="refused here") as caught:
                await store.save_entity("templates", template("u", name=state))
            error = caught.value
            if state == "25006":
                assert isinstance(error, ReadOnlyStoreError)  # the flags depend on the connection
            elif state[:2] in ("40", "72") and state not in ("40002", "40003"):
                assert isinstance(error, ConcurrencyConflictError)
            else:
                assert (type(error), error.retryable, error.outcome_unknown) == (
                    kind,
                    retryable,
                    unknown,
                ), state
            assert error.__cause__ is not None
        assert await store.get_entity("templates", "u") is None
        execute(database, 'DROP TRIGGER refuse ON "templates-entities"')
        await store.save_entity("templates", template("u"))


# -- a caller's own statement ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "params"),
    [
        ("SELEC 1", ()),
        ("SELECT nothing FROM templates", ()),
        ("SELECT * FROM nothing", ()),
        ("SELECT * FROM templates WHERE template_id = ?", (None, 1)),
        ("SELECT * FROM templates WHERE template_id = ?", ({1, 2},)),
        ("SELECT * FROM templates WHERE template_id = ?", (object(),)),
        ("INSERT INTO templates (template_id) VALUES ('t')", ()),  # it has a version
    ],
)
async def test_invalid_sql_of_the_caller_is_an_input_error(url: str, sql: str, params: Any) -> None:
    async with open_store(url) as store:
        await store.save_entity("templates", template("t"))
        with pytest.raises(InvalidInputError, match="execute_with_lock") as caught:
            await store.execute_with_lock(sql, params)  # type: ignore[attr-defined]
        assert not caught.value.retryable
        assert not caught.value.outcome_unknown
        with pytest.raises(InvalidInputError, match="execute_with_lock"):
            async with store.begin_transaction() as tx:
                await tx.execute_with_lock(sql, params)  # type: ignore[attr-defined]
        assert await store.get_entity("templates", "t") is not None


async def test_an_argument_is_not_shown(database: str) -> None:
    async with open_store(database) as store:
        sql = "SELECT * FROM templates WHERE version = ?"
        with pytest.raises(InvalidInputError, match=r"\$1") as caught:
            await store.execute_with_lock(sql, ["hunter2"])  # type: ignore[attr-defined]
        assert "hunter2" not in str(caught.value)


async def test_an_added_column_does_not_break_a_prepared_statement(database: str) -> None:
    """The statement was prepared when the table had one column less."""
    async with open_store(f"{database}?pool_size=3&max_overflow=0") as store:
        await store.save_entity("templates", template("t"))
        table = '"templates-entities"'
        sql = f"SELECT * FROM {table} WHERE template_id = 't'"
        for column in ("owner", "zone", "tier"):
            # Prepared on every connection of the pool.
            calls = [store.execute_with_lock(sql) for _ in range(12)]  # type: ignore[attr-defined]
            await asyncio.gather(*calls)
            execute(database, f"ALTER TABLE {table} ADD COLUMN {column} text")
            [row] = await store.execute_with_lock(sql)  # type: ignore[attr-defined]
            assert column in row
        execute(database, f"ALTER TABLE {table} ADD COLUMN more text")

        async def work(tx: Any) -> Any:
            return await tx.execute_with_lock(sql)

        [row] = await store.run_transaction(work)
        assert "more" in row


# -- changes of the database by others ------------------------------------------------------


async def test_a_table_that_was_dropped_is_named(url: str, tmp_path: Path) -> None:
    async with open_store(url) as store:
        await store.save_entity("templates", template("t"))
        await store.execute_with_lock(  # type: ignore[attr-defined]
            'DROP TABLE "templates-entities"' + (" CASCADE" if url.startswith("postgresql") else "")
        )
        for work in (
            lambda: store.get_entity("templates", "t"),
            lambda: store.save_entity("templates", template("t")),
            lambda: store.query_entities("templates"),
            lambda: store.delete_entity("templates", "t"),
        ):
            with pytest.raises(SchemaMismatchError, match="templates.*restore") as caught:
                await work()
            assert not caught.value.retryable
            assert not caught.value.outcome_unknown


async def test_a_column_that_was_dropped_or_changed_is_named(database: str) -> None:
    async with open_store(database) as store:
        await store.save_entity("templates", template("t", name="x"))
        execute(database, 'ALTER TABLE "templates-entities" DROP COLUMN doc CASCADE')
        with pytest.raises(SchemaMismatchError, match="doc"):
            await store.get_entity("templates", "t")


async def test_a_violated_constraint_of_an_administrator_is_named(database: str) -> None:
    async with open_store(database) as store:
        await store.save_entity("templates", template("t", name="x"))
        execute(
            database,
            "CREATE UNIQUE INDEX one_name ON \"templates-entities\" ((doc ->> 'name'));"
            'ALTER TABLE "templates-entities" ADD CONSTRAINT no_shouting '
            "CHECK (doc ->> 'name' = lower(doc ->> 'name'))",
        )
        for name, said in (("x", "one_name"), ("SECRET", "no_shouting")):
            with pytest.raises(InvalidInputError, match=said) as caught:
                await store.save_entity("templates", template("u", name=name))
            assert not caught.value.retryable
            assert "SECRET" not in str(caught.value)


# -- an idle session ------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["commit", "write", "read"])
async def test_a_session_that_was_idle_for_too_long(database: str, last: str) -> None:
    name = urlsplit(database).path[1:]
    async with open_store(database) as store:
        await store.save_entity("templates", template("t", n=0))
    execute(database, f"ALTER DATABASE {name} SET idle_in_transaction_session_timeout = '200ms'")
    async with open_store(database) as store:
        with pytest.raises(UnavailableError, match="idle_in_transaction_session_timeout") as caught:
            await _idle(store, last)
        assert not caught.value.outcome_unknown
        assert caught.value.retryable
        found = await store.get_entity("templates", "t")
        assert found is not None
        assert (found["n"], found["version"]) == (0, 1)
        assert await store.update_entity("templates", "t", {"n": 3}) == 2


async def _idle(store: Any, last: str) -> None:
    async with store.begin_transaction() as tx:
        await tx.update_entity("templates", "t", {"n": 1})
        await asyncio.sleep(0.8)
        if last == "write":
            await tx.update_entity("templates", "t", {"n": 2})
        if last == "read":
            await tx.query_entities("templates")


async def test_sessions_that_an_administrator_ended_while_idle(database: str) -> None:
    name = urlsplit(database).path[1:]
    async with open_store(database) as store:
        await store.save_entity("templates", template("t", n=0))
        for n in range(1, 4):
            execute(
                database.replace(f"/{name}", "/postgres"),
                f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'",
            )
            assert await store.get_entity("templates", "t") is not None
            assert await store.update_entity("templates", "t", {"n": n}) == n + 1


@pytest.mark.parametrize(
    "verb", ["transaction", "snapshot", "stream", "query", "explain", "schema"]
)
async def test_what_begins_after_sessions_were_ended_begins_on_others(
    database: str, verb: str
) -> None:
    name = urlsplit(database).path[1:]
    async with open_store(database) as store:
        await store.save_entities("templates", [template(f"t{n}", n=n) for n in range(700)])

        async def read() -> int:
            if verb == "transaction":
                async with store.begin_transaction() as tx:
                    return await tx.count_entities("templates")
            if verb == "snapshot":
                async with store.snapshot() as snapshot:
                    return await snapshot.count(Query("templates"))
            if verb == "explain":
                return 700 * ((await store.explain_query("templates")).access == "scan")
            if verb == "schema":
                return 700 + len(await store.schema_changes())
            if verb == "stream":
                return len([each async for each in store.stream_entities("templates")])
            return len(await store.query_entities("templates"))

        for _ in range(2):
            assert await read() == 700
            execute(
                database.replace(f"/{name}", "/postgres"),
                f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'",
            )
        assert await read() == 700


@pytest.mark.parametrize("verb", ["query", "count"])
async def test_small_queries_whose_sessions_were_ended_are_repeated(
    database: str, verb: str
) -> None:
    """Also those for which no connection of their own pool was free."""
    name = urlsplit(database).path[1:]
    async with open_store(database) as store:
        await store.save_entity("templates", template("t", n=0))

        async def read() -> list[Any]:
            if verb == "query":
                return await asyncio.gather(
                    *(store.query_entities("templates", limit=2) for _ in range(6))
                )
            return await asyncio.gather(*(store.count_entities("templates") for _ in range(6)))

        expected = await read()
        execute(
            database.replace(f"/{name}", "/postgres"),
            f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'",
        )
        assert await read() == expected


# -- roles, names, endpoints ----------------------------------------------------------------


async def test_connection_errors_name_the_wrong_setting(
    database: str, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    parts = urlsplit(database)
    port = parts.port
    broken = tmp_path / "broken.pem"
    broken.write_text("this is no certificate")
    missing = tmp_path / "missing.pem"
    role = f"denied_{random.randrange(10**9)}"
    execute(database, f"CREATE ROLE {role} NOLOGIN")
    nosuch = f"postgresql://postgres@127.0.0.1:{port}"
    authority, cert = f"{database}?sslrootcert={missing}", f"{database}?sslcert="
    cases: list[tuple[str, type[StorageError], str, bool]] = [
        (f"postgresql://{role}@127.0.0.1:{port}{parts.path}", AuthenticationError, role, False),
        (f"postgresql://nobody_1@127.0.0.1:{port}{parts.path}", AuthenticationError, "nobody_1", False),
        (f"{nosuch}/no_such_database", ConfigurationError, "exist; create it, or .* setting name$", False),
        (f"{database}?sslmode=require", ConfigurationError, "sslmode 'require' needs TLS", False),
        (f"postgresql://me@127.0.0.1:1{parts.path}", UnavailableError, "127.0.0.1:1", True),
        (f"postgresql:///db?host={tmp_path}/nowhere", UnavailableError, "nowhere", True),
        (f"{authority}&sslmode=verify-ca", ConfigurationError, f"sslrootcert: .*{missing}", False),
        (authority, ConfigurationError, f"sslrootcert: .*{missing}", False),
        (f"{cert}{missing}", ConfigurationError, f"sslcert: .*{missing}", False),
        (f"{cert}{broken}&sslkey={missing}", ConfigurationError, f"sslkey: .*{missing}", False),
        (f"{cert}{broken}&sslkey={broken}", ConfigurationError, "sslcert, sslkey: ", False),
        (f"{database}?sslkey={broken}", ConfigurationError, "sslkey: sslcert is required", False),
        (f"{database}?sslrootcert={broken}", ConfigurationError, "sslrootcert: .*no PEM", False),
        (f"{database}?sslcrl={missing}", ConfigurationError, f"sslcrl: .*{missing}", False),
    ]  # fmt: skip
    try:
        for url, kind, said, retryable in cases:
            async with open_store(url) as store:
                for work in (
                    store.get_entity("templates", "t"),
                    store.save_entity("templates", template("t")),
                ):
                    with pytest.raises(kind, match=said) as caught:
                        await work
                    assert caught.value.retryable is retryable, url
                    assert not caught.value.outcome_unknown, url
    finally:
        execute(database, f"DROP ROLE {role}")


async def test_a_missing_privilege_is_reported(database: str) -> None:
    async with open_store(database) as store:
        await store.save_entity("templates", template("t"))
    role = f"reader_{random.randrange(10**9)}"
    execute(database, f"CREATE ROLE {role} LOGIN")
    try:
        async with open_store(database.replace("postgres@", f"{role}@")) as store:
            for name in ("hf_catalogue", "templates"):
                for work in (
                    store.get_entity("templates", "t"),
                    store.save_entity("templates", template("t")),
                    store.execute_with_lock("SELECT * FROM templates"),  # type: ignore[attr-defined]
                ):
                    with pytest.raises(PermissionDeniedError, match=f"{name}.*GRANT") as caught:
                        await work
                    assert not caught.value.retryable
                execute(database, f"GRANT SELECT ON hf_catalogue TO {role}")
    finally:
        execute(database, f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_server_that_is_not_postgresql() -> None:
    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(web, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        for mode in ("disable", "prefer", "require"):
            url = f"postgresql://me@127.0.0.1:{port}/db?sslmode={mode}&timeout=1"
            async with open_store(url) as store:
                with pytest.raises(StorageError, match=f"127.0.0.1:{port}") as caught:
                    await store.save_entity("templates", template("t"))
                assert not caught.value.outcome_unknown
    finally:
        server.close()


@pytest.mark.parametrize(
    "exc",
    [
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.InterfaceError("cannot perform operation: connection is closed"),
        asyncpg.InternalClientError(
            "cannot switch to state 15; another operation (2) is in progress"
        ),
        asyncpg.InternalClientError("not connected"),
    ],
    ids=str,
)
@pytest.mark.parametrize("writes", [False, True])
async def test_a_statement_that_was_never_sent_can_be_retried(exc: Exception, writes: bool) -> None:
    """The driver raises these if the server ended the session, also while it sets up a connection."""
    async with open_store("postgresql://127.0.0.1:1/none") as store:
        dialect = store._sql._dialect  # type: ignore[attr-defined]
        error = dialect.translate(exc, doing="connect", writes=writes)
    assert isinstance(error, UnavailableError)
    assert error.retryable
    assert not error.outcome_unknown
