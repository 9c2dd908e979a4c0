"""The servers for the tests: they can be killed and restarted, and leave no processes or files."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import asyncpg
import pytest

from hf_async_store.testing.harness import skip_engine
from hf_async_store_bench import servers

ROOT: Final = Path(__file__).parents[2]


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder for servers. It is not in pytest's folder, which each start of pytest makes
    inaccessible to other users, because the server may run as another user."""
    with tempfile.TemporaryDirectory(prefix="hf-test-servers-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", name)
        for variable in (servers.POSTGRES_VARIABLE, servers.DYNAMODB_VARIABLE):
            monkeypatch.delenv(variable, raising=False)
        yield folder


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
    with pytest.raises(asyncpg.UndefinedTableError):
        await rows_of(url)


async def test_a_dropped_database_is_used_again_as_a_new_one_is(
    postgres: servers.PostgresServer,
) -> None:
    url = postgres.database()
    name = url.rpartition("/")[2]
    connection = await asyncpg.connect(url)
    await connection.execute(
        "CREATE SCHEMA other; CREATE TABLE other.kept (id int); CREATE TABLE kept (id int);"
        f"ALTER DATABASE {name} SET work_mem = '1MB'"
    )
    postgres.drop(url)
    assert connection.is_closed() or await is_lost(connection)
    assert postgres.database() == url
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE kept (id int)")
    others = "SELECT count(*) FROM pg_namespace WHERE nspname = 'other'"
    assert await connection.fetchval(others) == 0
    assert await connection.fetchval("SHOW work_mem") != "1MB"
    await connection.execute(f"REVOKE CONNECT ON DATABASE {name} FROM public")
    await connection.close()
    postgres.drop(url)
    assert postgres.database() != url
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await asyncpg.connect(url)


async def is_lost(connection: asyncpg.Connection) -> bool:
    try:
        await connection.fetchval("SELECT 1")
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        return True
    return False


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


# -- a run that is ended ----------------------------------------------------------------------

_SUITE = """
import asyncio, os, pathlib, time

def report(server):
    path = pathlib.Path(os.environ["REPORT"])
    path.with_suffix(".tmp").write_text(str(server.process.pid))
    path.with_suffix(".tmp").rename(path)

def test_in_a_call(postgres_server):
    report(postgres_server)
    time.sleep(300)

async def test_in_a_loop(postgres_server):
    report(postgres_server)
    await asyncio.sleep(300)
"""


@pytest.mark.hf_sampled
@pytest.mark.parametrize(
    "test", ["test_in_a_loop", pytest.param("test_in_a_call", marks=pytest.mark.long)]
)
@pytest.mark.parametrize(
    ("options", "how"),
    [([], signal.SIGTERM), (["-n1"], signal.SIGTERM), (["-n1"], signal.SIGKILL)],
    ids=["ended", "ended-with-workers", "killed-with-workers"],
)
def test_a_run_that_is_ended_leaves_no_server(
    test: str, options: list[str], how: signal.Signals, folders: Path
) -> None:
    """The controller of xdist workers may be killed; a run without workers cannot clean up after a kill."""
    try:
        servers._postgres_programs()
    except servers.ServerUnavailable as exc:
        skip_engine("postgresql", str(exc))
    suite = folders / "test_suite.py"
    suite.write_text(_SUITE)
    report = folders / "report"
    environment = {**os.environ, "REPORT": str(report), "TMPDIR": str(folders)}
    for name in [each for each in environment if each.startswith("PYTEST_")]:
        del environment[name]  # this run may be in a worker
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", f"--rootdir={folders}"]
    command += ["-o", "asyncio_mode=auto"]
    command += ["-o", "asyncio_default_fixture_loop_scope=function", *options, f"{suite}::{test}"]
    said = folders / "said"
    with (
        said.open("wb") as log,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) as run,
    ):
        try:
            wait_until(lambda: report.exists() or run.poll() is not None, 120)
            assert report.exists(), said.read_text()
            server = int(report.read_text())
            run.send_signal(how)
            wait_until(lambda: not is_running(server), 60)
            wait_until(lambda: not list(folders.glob("hf-async-store-*")), 60)
        finally:
            run.kill()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
