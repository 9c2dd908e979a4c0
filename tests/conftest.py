"""Fixtures and hooks of all tests."""

from __future__ import annotations

import gc
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import HealthCheck, settings

from hf_async_store.testing.assertions import no_complaints
from hf_async_store.testing.harness import skip_engine
from hf_async_store.testing.plugin import repeating
from hf_async_store.testing.random_choices import FULL_VARIABLE
from hf_async_store_bench.servers import (
    DynamoDBServer,
    PostgresServer,
    ServerUnavailable,
    dynamodb,
    postgres,
)
from tests.dynamodb.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

# The test server takes any credentials; without some, botocore would ask the network for them.
os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")

# A background job of a shell ignores SIGINT, and so would the processes that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_OWN_PROCESS: Final = os.getpid()
_WORKERS: Final[list[int]] = []
"""The processes of pytest-xdist, if this is their controller."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_newgateway(gateway: Any) -> None:
    _WORKERS.append(gateway._rinfo().pid)  # the same lookup as in the reporter of xdist


def _end_session(number: int, frame: FrameType | None) -> None:
    """End the run like Ctrl-C, so that fixtures are torn down: the servers would outlive this process."""
    del frame
    if os.getpid() != _OWN_PROCESS:  # a fork of a test, which inherited this handler
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        return
    signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the teardown
    for each in _WORKERS:  # at once: xdist kills a worker that does not end soon enough
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGTERM)
    raise KeyboardInterrupt


signal.signal(signal.SIGTERM, _end_session)

# Timings depend on the load of the machine.
settings.register_profile(
    "full", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("plain", settings.get_profile("full"), max_examples=25)


def pytest_configure(config: pytest.Config) -> None:
    is_full = config.getoption("--hf-full") or os.environ.get(FULL_VARIABLE)
    settings.load_profile("full" if is_full else "plain")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Print the seed, also with `-q`, which leaves out the header."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(repeating())


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Let each worker process of a whole run begin with other folders: in a new checkout, all of them
    would otherwise compile the same modules at the same time, which takes each of them 10 s."""
    gc.disable()  # what is collected stays; see `pytest_collection_finish`
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if number and session.config.args == session.config.getini("testpaths"):
        folders = sorted(str(each) for each in Path(__file__).parent.iterdir() if each.is_dir())
        first = int(number) * len(folders) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        session.config.args[:] = folders[first:] + folders[:first]


_LONG: Final = ("bench", "demo", "migration")
"""The folders with the longest tests."""

_LONG_TEST_SECONDS: Final = 1800
"""The time limit of a test marked `long` that has none of its own: some try inputs for ten minutes, twice
the limit of ordinary tests."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring them into one order again, as pytest-xdist requires: by the folder; long tests are first, so
    that no worker process ends late."""
    for each in items:
        if each.get_closest_marker("long") and not each.get_closest_marker("timeout"):
            each.add_marker(pytest.mark.timeout(_LONG_TEST_SECONDS))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_place)


def _place(item: pytest.Item) -> tuple[bool, str]:
    folder = item.path.parent.name
    return folder not in _LONG, folder


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exclude imported modules and collected tests from garbage collections: a full one takes 80 ms
    otherwise, and is a tenth of a run."""
    del session
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _no_complaints() -> Iterator[None]:
    """Every test fails if the event loop has logged an error during it."""
    with no_complaints():
        yield


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server for the whole run; without one, its tests are skipped and reported."""
    try:
        with postgres() as server:
            yield server
    except ServerUnavailable as exc:
        skip_engine("postgresql", str(exc))


@pytest.fixture(scope="session")
def dynamodb_server() -> Iterator[DynamoDBServer]:
    """A DynamoDB server for the whole run; each test has a table prefix of its own."""
    try:
        with dynamodb() as server:
            yield server
    except ServerUnavailable as exc:
        skip_engine("dynamodb", str(exc))


@pytest.fixture(scope="session")
def dynamodb_proxy(dynamodb_server: DynamoDBServer) -> Iterator[Proxy]:
    """A proxy in front of the DynamoDB server that counts requests and injects faults."""
    with Proxy(dynamodb_server.endpoint_url) as proxy:
        yield proxy
