"""The servers that the tests run on: real ones, that come back after a kill and leave nothing."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from hf_async_store.testing.harness import skip_engine
from hf_async_store_bench import servers


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where servers put their folders, made a place of its own."""
    place = tmp_path / "servers"
    place.mkdir()
    for each in (place, *place.parents):
        if each.is_relative_to(tmp_path.parent.parent.parent):
            each.chmod(0o755)  # the server's user must come through
    monkeypatch.setattr(servers.tempfile, "tempdir", str(place))
    for name in (servers.POSTGRES_VARIABLE, servers.DYNAMODB_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return place


@pytest.fixture
def postgres(folders: Path) -> Iterator[servers.PostgresServer]:
    try:
        with servers.postgres() as server:
            yield server
    except servers.ServerUnavailable as exc:
        skip_engine("postgresql", str(exc))


async def rows_of(url: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM kept"))
    finally:
        await connection.close()


async def test_a_postgres_keeps_its_data_through_a_kill(postgres: servers.PostgresServer) -> None:
    url = postgres.database()
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE kept (id int)")
    await connection.execute("INSERT INTO kept VALUES (1)")
    pid = postgres.process.pid
    postgres.kill()
    with pytest.raises((OSError, asyncpg.PostgresError)):
        await asyncpg.connect(url)
    postgres.start()
    assert postgres.process.pid != pid
    assert await rows_of(url) == 1
    connection.terminate()
    postgres.drop(url)
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await rows_of(url)


def test_a_dynamodb_answers_on_loopback_alone_and_leaves_nothing(folders: Path) -> None:
    try:
        with servers.dynamodb() as server:
            host, port = urlsplit(server.endpoint_url).hostname, urlsplit(server.endpoint_url).port
            assert host == "127.0.0.1"
            assert port is not None
            with socket.create_connection((host, port), timeout=5):
                pass
            pid = server.process.pid
            server.kill()
            server.start()
            assert server.process.pid != pid
            pid = server.process.pid
    except servers.ServerUnavailable as exc:
        skip_engine("dynamodb", str(exc))
    assert list(folders.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_postgres_leaves_nothing(folders: Path) -> None:
    try:
        with servers.postgres() as server:
            asyncio.run(asyncio.sleep(0))
            pid = server.process.pid
    except servers.ServerUnavailable as exc:
        skip_engine("postgresql", str(exc))
    assert list(folders.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_given_server_is_used_and_never_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(servers.POSTGRES_VARIABLE, "postgresql://somebody@127.0.0.1:1/db")
    with servers.postgres() as server:
        assert server.url == "postgresql://somebody@127.0.0.1:1/db"
        with pytest.raises(servers.ServerUnavailable, match="not ours"):
            server.kill()
