"""Runs the suites of other projects on stores of this one, through the adapters in `docs/examples`.

    python tests/peers/run.py --python PEERS/bin/python --suites FOLDER [--engine E]... [--peer P]...
    python tests/peers/run.py --python PEERS/bin/python --throughput

The folder of suites holds a checkout or an unpacked source archive of each project. A suite is copied, our
fixtures are added to the copy, and pytest runs it with the interpreter in whose environment the projects
are installed. A project or suite that is not there is skipped, and the last lines say so.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hf_async_store_bench.servers import ServerUnavailable, dynamodb, postgres

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT: Final = Path(__file__).parents[2]
FIXTURES: Final = Path(__file__).with_name("suites")
ENGINES: Final = ("memory", "json", "sqlite", "postgresql", "dynamodb")
SUITE_SECONDS: Final = 900
OPTIONS: Final = (
    *["-p", "no:cacheprovider", "-p", "no:hf_async_store", "-W", "ignore", "--tb=short", "-rfEs"],
)


@dataclass(frozen=True)
class Peer:
    """A project whose suite is run.

    Attributes:
        requirement: what pip installs.
        module: what is imported to see that it is installed.
        source: where its suite comes from.
        marker: a file by which the suite is found; empty if the project installs its suite.
        imports: what is imported at the end of files of the copy: one of our modules of fixtures.
        arguments: what pytest is given.
        options: of the URL of an engine.
    """

    requirement: str
    module: str
    source: str
    marker: str
    imports: Mapping[str, str]
    arguments: Sequence[str] = field(default=())
    options: Mapping[str, str] = field(default_factory=dict)


PEERS: Final = {
    "py-key-value": Peer(
        "py-key-value-aio",
        "key_value.aio",
        "a checkout of strawgate/py-key-value",
        "tests/stores/base.py",
        {"tests/stores/test_entities.py": "peer_key_value"},
        ("tests/stores/test_entities.py", "-o", "asyncio_mode=auto"),
    ),
    "limits": Peer(
        "limits",
        "limits.aio",
        "the source archive of limits, or a checkout of alisaifee/limits",
        "tests/aio/test_storage.py",
        {"tests/conftest.py": "peer_rate_limits"},
        ("tests/aio", "-o", "asyncio_mode=auto", "--deselect=tests/aio/storage"),
        # As its own storages, for which its tests measure durations, do not wait for the disk.
        {"json": "?sync_writes=no", "sqlite": "?synchronous=NORMAL"},
    ),
    "fastapi-users": Peer(
        "fastapi-users",
        "fastapi_users",
        "the source archive of fastapi-users-db-sqlalchemy",
        "tests/test_access_token.py",
        {"tests/test_users.py": "peer_users", "tests/test_access_token.py": "peer_users"},
        ("tests", "-o", "asyncio_mode=auto"),
    ),
    "apscheduler": Peer(
        "apscheduler==4.0.0a6",
        "apscheduler.abc",
        "the source archive of apscheduler 4.0.0a6",
        "tests/test_datastores.py",
        {"tests/conftest.py": "peer_scheduler"},
        (
            *("tests/test_datastores.py", "tests/test_schedulers.py"),
            *("-p", "no:asyncio", "-m", "not external_service", "-k", "not TestRepr"),
        ),
    ),
    "langgraph-checkpoints": Peer(
        "langgraph-checkpoint-conformance",
        "langgraph.checkpoint.conformance",
        "",
        "",
        {"test_conformance.py": "peer_langgraph_saver"},
        ("test_conformance.py", "-o", "asyncio_mode=auto"),
    ),
    "langgraph-store": Peer(
        "langgraph-checkpoint-sqlite",
        "langgraph.store.sqlite",
        "the source archive of langgraph-checkpoint-sqlite, or a checkout of langchain-ai/langgraph",
        "tests/test_aiosqlite.py",
        {"tests/test_async_store.py": "peer_langgraph_store"},
        ("tests/test_async_store.py", "-o", "asyncio_mode=auto"),
    ),
}


def suite_of(peer: Peer, suites: Path) -> Path | None:
    """The folder of a suite, in the folder of all of them."""
    if not peer.marker:
        return suites
    for pattern in ("*/", "*/libs/*/"):
        for found in sorted(suites.glob(pattern + peer.marker)):
            return found.parents[len(Path(peer.marker).parts) - 1]
    return None


def copied(peer: Peer, suite: Path, folder: Path) -> Path:
    """A copy of the tests of a suite, with our fixtures in place of its own."""
    if peer.marker:
        shutil.copytree(suite / "tests", folder / "tests")
    for name, module in peer.imports.items():
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(f"\nfrom {module} import *\n")
    return folder


def paths(*first: Path) -> dict[str, str]:
    """The environment in which the projects find our package, the adapters and our fixtures."""
    found = os.pathsep.join(map(str, (*first, ROOT / "docs", FIXTURES, ROOT)))
    return {**os.environ, "PYTHONPATH": found}


def run_suite(peer: Peer, suite: Path, url: str, python: str) -> tuple[int, str]:
    """Run a suite on the store of a URL; returns the exit code and what pytest has written."""
    with tempfile.TemporaryDirectory() as folder:
        work = copied(peer, suite, Path(folder))
        done = subprocess.run(
            [
                python,
                *f"-m pytest -q -c {os.devnull} --rootdir {work}".split(),
                *OPTIONS,
                *peer.arguments,
            ],
            cwd=work,
            env=paths(work) | {"HF_ASYNC_STORE_PEERS_URL": url},
            capture_output=True,
            text=True,
            timeout=SUITE_SECONDS,
            check=False,
        )
    return done.returncode, done.stdout + done.stderr


def is_installed(peer: Peer, python: str) -> bool:
    command = [python, "-c", f"import {peer.module}"]
    return not subprocess.run(command, capture_output=True, check=False).returncode


class Servers:
    """The servers that engines need, each started when it is first asked for."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._urls: dict[str, str] = {}

    def url(self, engine: str) -> str:
        """The URL of a store that no other run uses."""
        if engine == "postgresql":
            url = self._urls.get(engine) or self._stack.enter_context(postgres()).database()
            self._urls[engine] = url
            return f"{url}?table_prefix=p{secrets.token_hex(3)}"
        if engine == "dynamodb":
            url = self._urls.get(engine) or self._stack.enter_context(dynamodb()).endpoint_url
            self._urls[engine] = url
            return f"dynamodb://us-east-1/p{secrets.token_hex(3)}?endpoint_url={url}"
        local = {"memory": "memory:", "json": "json:{folder}/s.json"}
        return local.get(engine, "sqlite:{folder}/s.db")


def measure(python: str) -> int:
    """Run `throughput.py` with a PostgreSQL server that waits for the disk."""
    with postgres(durable=True) as server:
        command = [python, "-W", "ignore", str(Path(__file__).with_name("throughput.py"))]
        command += ["--postgresql", server.database()]
        return subprocess.run(command, env=paths(), check=False).returncode


def smoke_tests(python: str) -> tuple[int, str]:
    """Run `test_adapters.py` where the projects are installed."""
    command = [python, *f"-m pytest -q -c {os.devnull} --noconftest --rootdir {ROOT}".split()]
    command += [
        *OPTIONS,
        "-o",
        "asyncio_mode=auto",
        str(Path(__file__).with_name("test_adapters.py")),
    ]
    done = subprocess.run(command, env=paths(), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


class Report:
    """What was run, and how it ended."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self.lines: list[str] = []
        self.failed = False

    def add(self, name: str, code: int, output: str) -> None:
        self.failed = self.failed or code != 0
        if code or self._verbose:
            print(output)
        last = output.strip().splitlines()[-1].strip("= ")
        self.lines.append(f"{name}: {last}")
        print(self.lines[-1], flush=True)

    def skip(self, what: str, why: str) -> None:
        self.lines.append(f"SKIPPED {what}: {why}")


def run_peer(name: str, options: argparse.Namespace, servers: Servers, report: Report) -> None:
    """Run the suite of a project on each engine."""
    peer = PEERS[name]
    suite = suite_of(peer, options.suites)
    if suite is None:
        report.skip(name, f"it needs {peer.source} in {options.suites.resolve()}")
        return
    if not is_installed(peer, options.python):
        report.skip(name, f"pip install {peer.requirement}")
        return
    for engine in options.engine or ENGINES:
        try:
            url = servers.url(engine) + peer.options.get(engine, "")
        except ServerUnavailable as exc:
            report.skip(f"{name} on {engine}", str(exc))
        else:
            report.add(f"{name} on {engine}", *run_suite(peer, suite, url, options.python))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="where the projects are installed")
    parser.add_argument("--suites", type=Path, default=Path("suites"), help="where the suites are")
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--peer", action="append", choices=list(PEERS))
    parser.add_argument("--verbose", action="store_true", help="everything that pytest writes")
    parser.add_argument("--throughput", action="store_true", help="measure instead")
    options = parser.parse_args()
    if options.throughput:
        return measure(options.python)
    report = Report(verbose=options.verbose)
    report.add("smoke tests", *smoke_tests(options.python))
    with ExitStack() as stack:
        servers = Servers(stack)
        for name in options.peer or PEERS:
            run_peer(name, options, servers, report)
    print("\n".join(["", "Suites of other projects:", *report.lines]))
    return report.failed


if __name__ == "__main__":
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
    sys.exit(main())
