"""TLS, passwords, password providers, and pgbouncer between the store and the server."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import pytest

from hf_async_store import (
    AuthenticationError,
    ConfigurationError,
    SQLStorageStrategy,
    StorageError,
    UnavailableError,
    open_store,
)
from hf_async_store.strategies.sql.postgresql import PostgreSQL
from hf_async_store.strategies.sql.sqlite import _ClosingConnection
from hf_async_store_bench.servers import ServerUnavailable, postgres
from tests.contract.harnesses import ask, execute

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_async_store_bench.servers import PostgresServer

SECRET = "p@ss:w/o?r%d #&+'\"\\ é${x}"


@pytest.fixture(scope="module")
def guarded() -> Iterator[PostgresServer]:
    """A server with TLS that requires a password of some users."""
    try:
        with _certificate() as folder, postgres() as server:
            if os.environ.get("HF_ASYNC_STORE_TEST_POSTGRES_URL"):
                pytest.skip("the server is not ours to configure")
            [hba] = ask(server.url, "SHOW hba_file")
            rules = (
                "hostssl all asked 127.0.0.1/32 scram-sha-256\nhost all asked all reject\n"
                "hostssl all certified 127.0.0.1/32 cert\nhost all certified all reject\n"
            )
            Path(hba).write_text(rules + Path(hba).read_text())
            execute(server.url, f"ALTER SYSTEM SET ssl_cert_file = '{folder}/server.crt'")
            execute(server.url, f"ALTER SYSTEM SET ssl_key_file = '{folder}/server.key'")
            execute(server.url, f"ALTER SYSTEM SET ssl_ca_file = '{folder}/server.crt'")
            execute(server.url, "ALTER SYSTEM SET ssl = on")
            execute(server.url, "CREATE ROLE certified SUPERUSER LOGIN")
            literal = SECRET.replace("'", "''")
            execute(server.url, f"CREATE ROLE asked SUPERUSER LOGIN PASSWORD '{literal}'")
            execute(server.url, "SELECT pg_reload_conf()")
            yield server
    except ServerUnavailable as exc:
        pytest.skip(str(exc))


# Signed with the server's key, which is the authority here; once with an encrypted key.
_CLIENT_CERTIFICATE = (
    "openssl req -new -nodes -newkey rsa:2048 -subj /CN=certified -keyout client.key -out client.csr",
    "openssl x509 -req -days 2 -in client.csr -CA server.crt -CAkey server.key -set_serial 2 "
    "-out client.crt",
    "openssl rsa -aes256 -passout pass:of-the-key -in client.key -out locked.key",
)


@contextmanager
def _certificate() -> Iterator[Path]:
    """A folder with a self-signed certificate for localhost."""
    folder = Path(tempfile.mkdtemp(prefix="hf-async-store-tls-"))
    try:
        command = "openssl req -new -x509 -days 2 -nodes -newkey rsa:2048 -subj /CN=localhost"
        names = "subjectAltName=DNS:localhost"
        subprocess.run(
            [*command.split(), "-addext", names, "-keyout", "server.key", "-out", "server.crt"],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        for each in _CLIENT_CERTIFICATE:
            subprocess.run(each.split(), cwd=folder, check=True, capture_output=True)
        folder.chmod(0o755)
        (folder / "server.key").chmod(0o600)
        if os.geteuid() == 0:
            shutil.chown(folder / "server.key", "postgres")
        yield folder
    finally:
        shutil.rmtree(folder)


def config(server: PostgresServer, **more: Any) -> dict[str, Any]:
    parts = urlsplit(server.url)
    return {
        "strategy": "sql",
        "sql_strategy": {
            "type": "postgresql",
            "host": "localhost",
            "port": parts.port,
            "name": "postgres",
            "username": "asked",
            "password": SECRET.replace("${", "$${"),
            "timeout": 5,
            **more,
        },
    }


async def encrypted(store: Any) -> bool:
    [row] = await store.execute_with_lock(
        "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    )
    return bool(row["ssl"])


async def test_tls_is_checked_according_to_the_mode(guarded: PostgresServer) -> None:
    [certificate] = ask(guarded.url, "SHOW ssl_cert_file")
    for more in (
        {"sslmode": "prefer"},
        {"sslmode": "require"},
        {"sslmode": "verify-ca", "sslrootcert": certificate},
        {"sslmode": "verify-full", "sslrootcert": certificate},
    ):
        async with open_store(config(guarded, **more)) as store:
            assert await encrypted(store), more
    # The certificate is for localhost, by name.
    wrong = config(guarded, sslmode="verify-full", sslrootcert=certificate, host="127.0.0.1")
    async with open_store(wrong) as store:
        with pytest.raises(ConfigurationError, match=r"verify-full.*sslrootcert") as caught:
            await store.test_connection()
        assert not caught.value.retryable
    async with open_store(config(guarded, sslmode="disable")) as store:
        with pytest.raises(AuthenticationError):
            await store.test_connection()


async def test_a_certificate_of_the_client(guarded: PostgresServer) -> None:
    [found] = ask(guarded.url, "SHOW ssl_cert_file")
    folder = Path(found).parent
    tls: dict[str, Any] = {"sslmode": "verify-full", "sslrootcert": found, "password": None}
    tls |= {"username": "certified", "sslcert": str(folder / "client.crt")}
    for more in (
        {"sslkey": str(folder / "client.key")},
        {"sslkey": str(folder / "locked.key"), "sslpassword": "of-the-key"},
    ):
        async with open_store(config(guarded, **tls, **more)) as store:
            assert await encrypted(store)
            assert "of-the-key" not in f"{store.describe()} {store!r}"
    for more in (
        {"sslkey": str(folder / "locked.key"), "sslpassword": "another"},
        {"sslkey": str(folder / "locked.key")},
    ):
        async with open_store(config(guarded, **tls, **more)) as store:
            with pytest.raises(ConfigurationError, match="sslpassword"):
                await store.test_connection()
    del tls["sslcert"]
    async with open_store(config(guarded, **tls)) as store:
        with pytest.raises(AuthenticationError, match="certificate"):
            await store.test_connection()


async def test_a_password_may_contain_any_character(
    guarded: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", SECRET)
    port = urlsplit(guarded.url).port
    for given in (
        config(guarded, password="${DB_PASSWORD}"),
        f"postgresql://asked:${{DB_PASSWORD}}@localhost:{port}/postgres",
        f"postgresql://asked:{quote(SECRET, safe='')}@localhost:{port}/postgres".replace("$", "$$"),
    ):
        async with open_store(given) as store:
            assert await store.test_connection() > 0
            shown = f"{store.describe()} {await store.health()} {store!r}"
            assert SECRET not in shown
            assert quote(SECRET, safe="") not in shown


async def test_a_wrong_password_is_reported_without_showing_it(guarded: PostgresServer) -> None:
    async with open_store(config(guarded, password="not-the-password")) as store:
        with pytest.raises(AuthenticationError) as caught:
            await store.save_entity("templates", {"template_id": "t"})
        assert not caught.value.retryable
        assert "not-the-password" not in f"{caught.value!r}{caught.value.__cause__!r}"
    async with open_store(config(guarded, password="")) as store:
        with pytest.raises(StorageError):
            await store.test_connection()


@pytest.mark.parametrize("step", ["after the handshake", "before the driver's first statement"])
async def test_a_new_connection_that_the_server_closes_is_unavailable(
    database: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"after the handshake": "_open", "before the driver's first statement": "connect"}[step]
    original = getattr(PostgreSQL, made)

    async def connect(self: PostgreSQL, *args: Any, **options: Any) -> Any:
        driver = await original(self, *args, **options)
        driver.terminate()
        if step == "after the handshake":  # a server before version 14 does not report this
            monkeypatch.setattr(
                "hf_async_store.strategies.sql.postgresql._setting", lambda *_: None
            )
        return driver

    monkeypatch.setattr(PostgreSQL, made, connect)
    async with open_store(database) as store:
        for verb in (
            store.get_entity("templates", "t"),
            store.save_entity("templates", {"template_id": "t"}),
        ):
            with pytest.raises(UnavailableError, match=r"clos") as caught:
                await verb
            assert caught.value.retryable
            assert not caught.value.outcome_unknown


async def token(host: str, port: int, username: str) -> str:
    assert (host, username) == ("localhost", "asked")
    assert port > 0
    return SECRET


async def test_each_connection_asks_for_its_password(guarded: PostgresServer) -> None:
    asked: list[str] = []

    def provider(host: str, port: int, username: str) -> str:
        asked.append(username)
        return SECRET if len(asked) < 3 else "expired"

    given = config(guarded, password="unused", pool_size=1, max_overflow=9)
    async with SQLStorageStrategy(given, password=provider) as store:
        await store.test_connection()
        assert await store.get_entity("templates", "t") is None
        before = len(asked)
        assert before >= 1
        async with store.begin_transaction() as tx:
            await tx.count_entities("templates")
            with pytest.raises(AuthenticationError):
                await asyncio.create_task(_as_many(store, 6))
    assert len(asked) > before

    async def failing(host: str, port: int, username: str) -> str:
        raise LookupError(username)

    async with SQLStorageStrategy(config(guarded), password=failing) as store:
        with pytest.raises(AuthenticationError, match="LookupError"):
            await store.test_connection()
    named = config(guarded, password="unused", login_provider=f"{__name__}:token")
    async with open_store(named) as store:
        assert await store.test_connection() > 0
    for wrong in ("nowhere:token", f"{__name__}:nothing", "token"):
        with pytest.raises(ConfigurationError, match="login_provider"):
            open_store(config(guarded, login_provider=wrong))


async def _as_many(store: Any, number: int) -> None:
    streams = [store.stream_entities("templates") for _ in range(number)]
    try:
        for each in streams:
            await anext(each, None)
    finally:
        for each in streams:
            await each.aclose()


async def test_behind_pgbouncer_no_session_state_is_left(database: str) -> None:
    async with open_store(f"{database}?pgbouncer=yes&pool_size=1&max_overflow=0") as store:
        await store.save_entities("templates", [{"template_id": f"t{n}"} for n in range(40)])
        await store.update_entity("templates", "t1", {"name": "x"}, expected_version=1)
        assert await store.get_entity("templates", "t1") is not None
        assert await store.count_entities("templates", {"name": "x"}) == 1
        async with store.begin_transaction() as tx:
            await tx.delete_entity("templates", "t2")
            assert len([each async for each in tx.stream_entities("templates")]) == 39
        [left] = await store.execute_with_lock(  # type: ignore[attr-defined]
            "SELECT (SELECT count(*) FROM pg_prepared_statements) AS statements, "
            "current_setting('transaction_isolation') AS isolation, "
            "(SELECT reset_val FROM pg_settings WHERE name = 'default_transaction_isolation') AS own"
        )
        assert left == {"statements": 0, "isolation": "serializable", "own": "read committed"}


async def test_a_lower_isolation_is_the_default_of_all(database: str) -> None:
    async with open_store(f"{database}?isolation=read_committed") as store:
        assert store.capabilities.isolations[0] == "read_committed"
        query = "SELECT current_setting('transaction_isolation') AS isolation"
        for isolation in (None, "serializable", "repeatable_read"):
            async with store.begin_transaction(isolation) as tx:  # type: ignore[arg-type]
                [found] = await tx.execute_with_lock(query)  # type: ignore[attr-defined]
                assert found["isolation"] == (isolation or "read_committed").replace("_", " ")


async def test_a_cancelled_task_leaves_no_connection_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when it waits for a statement nor while the pool opens a new connection for it."""
    is_open: set[int] = set()

    class Counted(_ClosingConnection):
        def close(self) -> None:
            super().close()
            is_open.discard(id(self))

    def connect(*arguments: Any, **named: Any) -> sqlite3.Connection:
        connection = open_really(*arguments, **{**named, "factory": Counted})
        is_open.add(id(connection))
        kept.append(connection)  # so that no other object gets the same id
        return connection

    kept: list[sqlite3.Connection] = []
    open_really = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", connect)
    for turns in range(24):
        async with open_store(f"sqlite:{tmp_path / 'store.db'}") as store:
            await store.save_entity("templates", {"template_id": "t"})
            for moment in range(12):
                task = asyncio.create_task(store.count_entities("templates"))
                for _ in range(turns if moment % 2 else 5):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
        assert not is_open, f"cancelled after {turns} turns"
