"""A hot standby of a test server, created with pg_basebackup."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import asyncpg  # type: ignore[import-untyped]  # it has no types
import pytest

from hf_async_store_bench.servers import ServerUnavailable, _postgres_programs, _unprivileged
from tests.contract.harnesses import ask

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hf_async_store_bench.servers import PostgresServer


class Standby:
    """A running standby.

    Attributes:
        port: where it listens, on 127.0.0.1.
    """

    def __init__(self, programs: Path, folder: Path, port: int) -> None:
        self.port = port
        self._programs = programs
        self._data = folder / "data"

    def promote(self) -> None:
        """Promote it to a primary."""
        command = [self._programs / "pg_ctl", "promote", "-w", "-D", self._data]
        _run_as_server(command, self._data.parent)

    def follow(self, server: PostgresServer) -> None:
        """Wait until it has replayed everything that its primary has written so far."""
        [there] = ask(server.url, "SELECT pg_current_wal_lsn()::text")
        own = server.url.replace(f":{urlsplit(server.url).port}/", f":{self.port}/")
        for _ in range(400):
            if ask(own, f"SELECT pg_last_wal_replay_lsn() >= '{there}'") == ["True"]:
                return
            time.sleep(0.05)
        raise AssertionError("the standby does not follow")


@contextmanager
def standby_of(server: PostgresServer) -> Iterator[Standby]:
    """A hot standby for as long as the context lasts."""
    try:
        programs = _postgres_programs()
    except ServerUnavailable as exc:
        pytest.skip(str(exc))
    if not (programs / "pg_basebackup").exists():
        pytest.skip("no pg_basebackup beside the server's programs")
    if os.environ.get("HF_ASYNC_STORE_TEST_POSTGRES_URL"):
        pytest.skip("the server is not ours to copy")
    parts = urlsplit(server.url)
    folder = Path(tempfile.mkdtemp(prefix="hf-async-store-standby-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, _unprivileged())
        _run_as_server(
            [
                *(programs / "pg_basebackup", "-h", str(parts.hostname), "-p", str(parts.port)),
                *("-U", "postgres", "-D", folder / "data", "-R", "-c", "fast", "-N"),
            ],
            folder,
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = ("listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=200")
        process = subprocess.Popen(
            [
                *(programs / "postgres", "-D", folder / "data", f"--port={port}"),
                *(f"--{each}" for each in (*options, "hot_standby_feedback=on", "fsync=off")),
            ],
            stderr=subprocess.DEVNULL,
            **_as_server(folder),
        )
        try:
            standby = Standby(programs, folder, port)
            _wait_for(port)
            standby.follow(server)
            yield standby
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(20)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_as_server(command: Sequence[str | Path], folder: Path) -> None:
    subprocess.run(command, check=True, capture_output=True, **_as_server(folder))


def _as_server(folder: Path) -> dict[str, object]:
    """Arguments of `subprocess.run` for a program of the server, which refuses to run as root."""
    if os.geteuid() != 0:
        return {"cwd": folder}
    return {"cwd": folder, "user": _unprivileged(), "extra_groups": []}


def _wait_for(port: int) -> None:
    for _ in range(400):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
    for _ in range(400):
        try:
            ask(url, "SELECT 1")
        except (asyncpg.PostgresError, OSError):  # it is starting
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the standby does not start")
