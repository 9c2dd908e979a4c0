"""The fixtures for tests of applications: `hf_store`, and what it is made of.

The plugin of this package provides them in every pytest run in an environment in which the package is
installed. They do nothing until a test asks for one.

The options `--hf-store-url` and `--hf-store-collections`, and the settings of the same names, or fixtures
`hf_store_url` and `hf_store_collections` of a project's own, say where the store is and what it declares.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Container, Coroutine, Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest

if TYPE_CHECKING:
    from hf_async_store.schema import Collection
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.faults import Faults
    from hf_async_store.testing.settable_clock import SettableClock

NewStore: TypeAlias = "Callable[[], StorageStrategy]"

URL: Final = "hf_store_url"
COLLECTIONS: Final = "hf_store_collections"

MEMORY: Final = "memory:"
TMP_PATH: Final = "{tmp_path}"
WORKER: Final = "{worker}"

_WORKER_VARIABLE: Final = "PYTEST_XDIST_WORKER"
_SEEN: Final = pytest.StashKey[dict[str, set[str]]]()
"""By URL, the collections that had no entities before the first test that declares them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hf_async_store")
    for name, metavar, text in (
        (
            URL,
            "URL",
            "where `hf_store` is, `memory:` by default; {tmp_path} is a folder of the test, {worker} the "
            "worker of pytest-xdist. A store that outlives a test is cleared after it",
        ),
        (
            COLLECTIONS,
            "MODULE:NAME",
            "what `hf_store` declares, by default the schema HOST_FACTORY",
        ),
    ):
        group.addoption(f"--{name.replace('_', '-')}", metavar=metavar, help=text)
        parser.addini(name, f"the option of the same name: {text}")


def _setting(config: pytest.Config, name: str) -> str:
    return str(config.getoption(name) or config.getini(name) or "")


@pytest.fixture
def hf_store_url(pytestconfig: pytest.Config) -> str:
    """Where the store of the tests is; to be replaced by a fixture of the project's own."""
    url = _setting(pytestconfig, URL) or MEMORY
    is_shared = url != MEMORY and TMP_PATH not in url and WORKER not in url
    if is_shared and _WORKER_VARIABLE in os.environ:
        raise pytest.UsageError(f"{URL} needs {WORKER} or {TMP_PATH}: each worker needs its store")
    return url


@pytest.fixture
def hf_store_collections(pytestconfig: pytest.Config) -> Iterable[Collection]:
    """The collections of the tests; to be replaced by a fixture of the project's own."""
    from hf_async_store.schema import HOST_FACTORY, Collection

    named = _setting(pytestconfig, COLLECTIONS)
    if not named:
        return HOST_FACTORY
    module, _, name = named.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise pytest.UsageError(f"{COLLECTIONS} must be MODULE:NAME, not {named}: {exc}") from exc
    return (found,) if isinstance(found, Collection) else tuple(found)


@pytest.fixture
def hf_clock() -> SettableClock:
    """The clock of the stores of the test."""
    from hf_async_store.testing.settable_clock import SettableClock

    return SettableClock()


@pytest.fixture
def hf_new_store(
    hf_store_url: str,
    hf_store_collections: Iterable[Collection],
    hf_clock: SettableClock,
    pytestconfig: pytest.Config,
    tmp_path: Path,
) -> Iterator[NewStore]:
    """A function that returns a new store on the data of the test, not opened yet: for an application
    that opens its store itself, and for several stores on the same data."""
    from hf_async_store import open_store

    worker = os.environ.get(_WORKER_VARIABLE, "main")
    url = hf_store_url.replace(TMP_PATH, str(tmp_path)).replace(WORKER, worker)

    def new_store() -> StorageStrategy:
        store = open_store(
            url, collections=hf_store_collections, clock=hf_clock, purge_seconds=None
        )
        hf_clock.set_in(store)
        return store

    if TMP_PATH in hf_store_url or not new_store().capabilities.durable:
        yield new_store
        return
    seen = pytestconfig.stash.setdefault(_SEEN, {}).setdefault(url, set())
    store = new_store()
    new = {*store.collections} - seen
    if new:
        _run_in_thread(_refuse_data(store, new))
        seen |= new
    yield new_store
    _run_in_thread(_clear(new_store()))


async def _refuse_data(store: StorageStrategy, collections: Set[str]) -> None:
    """Refuse a store that has entities or subscriptions before the first test: it may not be for tests.

    Raises:
        UsageError: it has.
    """
    async with store:
        found = [
            f"entities of {each}"
            for each in collections
            if await store.query_entities(each, limit=1)
        ]
        found += [f"the subscription {each!r}" for each in await _subscriptions(store, collections)]
    if found:
        raise pytest.UsageError(
            f"the store of {URL} has {found[0]}, which these tests would delete. If they may be deleted, "
            "`await store.clear()` and `await store.drop_subscription(name)` do so"
        )


async def _clear(store: StorageStrategy) -> None:
    async with store:
        await store.clear()
        for each in await _subscriptions(store, store.collections):
            await store.drop_subscription(each)


async def _subscriptions(store: StorageStrategy, collections: Container[str]) -> list[str]:
    """The names of the subscriptions to these collections."""
    if not store.capabilities.feed:
        return []
    return [each.name for each in await store.subscriptions() if each.collection in collections]


def _run_in_thread(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in an event loop of its own, whatever loops the plugins of the run have."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


@pytest.fixture
def hf_store(request: pytest.FixtureRequest, hf_new_store: NewStore) -> StorageStrategy:
    """An open store, for one test and the fixtures of that test, in the event loop of the test."""
    del hf_new_store  # requested here, so that a test can be run with several parameters of it
    store: StorageStrategy = request.getfixturevalue(f"_hf_store_in_{_loop_of(request)}_loop")
    return store


@pytest.fixture
def hf_faults(hf_store: StorageStrategy) -> Faults:
    """Lets writes of `hf_store` fail."""
    from hf_async_store.testing.faults import Faults

    return Faults(hf_store)


# -- event loops ----------------------------------------------------------------------------


def _loop_of(request: pytest.FixtureRequest) -> str:
    """The scope of the event loop in which a test runs; "anyio" for a test of anyio."""
    marker = request.node.get_closest_marker("asyncio")
    if marker is None and "anyio_backend" in request.fixturenames:
        return "anyio"
    named = {} if marker is None else marker.kwargs
    try:
        default = request.config.getini("asyncio_default_test_loop_scope")
    except (KeyError, ValueError):  # pytest-asyncio is older than the setting, or not installed
        default = "function"
    return str(named.get("loop_scope") or named.get("scope") or default or "function")


def _opening() -> Callable[..., AsyncGenerator[StorageStrategy, None]]:
    """A function of its own for each event loop, because pytest-asyncio notes the loop in it."""

    async def opened(hf_new_store: NewStore) -> AsyncGenerator[StorageStrategy, None]:
        async with hf_new_store() as store:
            yield store

    return opened


_hf_store_in_anyio_loop = pytest.fixture(_opening(), name="_hf_store_in_anyio_loop")

try:
    import pytest_asyncio
except ImportError:  # tests run by anyio alone
    pass
else:
    for _scope in ("function", "class", "module", "package", "session"):
        _name = f"_hf_store_in_{_scope}_loop"
        globals()[_name] = pytest_asyncio.fixture(loop_scope=_scope, name=_name)(_opening())
