"""The fixtures for tests of applications: in the event loop of each test, with a clock and with faults."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from hf_async_store import (
    HOST_FACTORY,
    ClaimLostError,
    Collection,
    ConcurrencyConflictError,
    DiskFullError,
    Expire,
    Field,
    InvalidInputError,
    RepositoryInterface,
    StorageStrategy,
    UnavailableError,
)
from hf_async_store.sync import blocking_store
from tests.pytest_process import PYTEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from hf_async_store.testing.faults import Faults
    from hf_async_store.testing.settable_clock import SettableClock
    from hf_async_store_bench.servers import PostgresServer

pytestmark = pytest.mark.hf_sampled

SESSIONS = Collection(
    "sessions",
    key="session_id",
    fields=[Field("until", "timestamp"), Field("hits", "integer")],
    expires=Expire("until"),
)


@pytest.fixture
def hf_store_collections() -> Iterable[Collection]:
    return (*HOST_FACTORY, SESSIONS)


@pytest.fixture(scope="session")
def shared_urls(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Stores on servers, each for all tests, by engine."""

    @cache
    def url_of(engine: str) -> str:
        if engine == "postgresql":
            server: PostgresServer = request.getfixturevalue("postgres_server")
            return server.database("")
        endpoint = request.getfixturevalue("dynamodb_server").endpoint_url
        return f"dynamodb://us-east-1/fixtures{secrets.token_hex(4)}?endpoint_url={endpoint}"

    return url_of


FILES = {
    "memory": "memory:",
    "json": "json:{tmp_path}/store",
    "sqlite": "sqlite:{tmp_path}/store.db",
}


@pytest.fixture(params=[*FILES, "postgresql", "dynamodb"])
def hf_store_url(request: pytest.FixtureRequest, shared_urls: Callable[[str], str]) -> str:
    return FILES.get(request.param) or shared_urls(request.param)


async def created(store: RepositoryInterface, entity_id: str = "t") -> int:
    return await store.create_entity("templates", {"template_id": entity_id})


# -- event loops ----------------------------------------------------------------------------


async def test_in_the_loop_of_a_function(hf_store: StorageStrategy) -> None:
    assert await created(hf_store) == 1


@pytest.mark.asyncio(loop_scope="class")
class TestInTheLoopOfAClass:
    @pytest_asyncio.fixture(loop_scope="class")
    async def prepared(self, hf_store: StorageStrategy) -> StorageStrategy:
        await created(hf_store)
        return hf_store

    async def test_first(self, prepared: StorageStrategy) -> None:
        assert await prepared.count_entities("templates") == 1

    async def test_second(self, hf_store: StorageStrategy, prepared: StorageStrategy) -> None:
        assert prepared is hf_store
        assert await prepared.count_entities("templates") == 1


@pytest.mark.asyncio(loop_scope="module")
async def test_in_the_loop_of_a_module(hf_store: StorageStrategy) -> None:
    assert await created(hf_store) == 1


@pytest.mark.asyncio(loop_scope="session")
async def test_in_the_loop_of_a_session(hf_store: StorageStrategy) -> None:
    assert await created(hf_store) == 1


async def test_an_application_that_opens_its_store(
    hf_new_store: Callable[[], StorageStrategy],
) -> None:
    async with hf_new_store() as store:
        await created(store)
        async with hf_new_store() as other:
            shared = store.capabilities.durable
            assert (await other.get_entity("templates", "t") is not None) is shared


def test_a_test_without_asyncio(hf_new_store: Callable[[], StorageStrategy]) -> None:
    with blocking_store(hf_new_store()) as store:
        assert store.create_entity("templates", {"template_id": "t"}) == 1


# -- the clock ------------------------------------------------------------------------------


async def test_entities_expire_by_the_clock(
    hf_store: StorageStrategy, hf_clock: SettableClock
) -> None:
    until = hf_clock() + timedelta(minutes=10)
    await hf_store.create_entity("sessions", {"session_id": "s", "until": until})
    hf_clock.advance(minutes=9, seconds=30)
    assert await hf_store.get_entity("sessions", "s") is not None
    hf_clock.advance(seconds=31)
    assert await hf_store.get_entity("sessions", "s") is None
    assert await hf_store.purge_expired() == 1


async def test_claims_end_by_the_clock(hf_store: StorageStrategy, hf_clock: SettableClock) -> None:
    await created(hf_store)
    [claim] = await hf_store.claim_entities("templates", lease=30)
    hf_clock.advance(seconds=29)
    await claim.renew()
    hf_clock.advance(seconds=29)
    assert await hf_store.claim_entities("templates") == []
    hf_clock.advance(seconds=2)
    [other] = await hf_store.claim_entities("templates")
    assert other.token > claim.token
    with pytest.raises(ClaimLostError):
        await claim.finish()


async def test_a_stopped_clock(hf_store: StorageStrategy, hf_clock: SettableClock) -> None:
    noon = datetime(2040, 1, 1, 12, tzinfo=UTC)
    hf_clock.stop_at(noon)
    await created(hf_store)
    entity = await hf_store.get_entity("templates", "t")
    assert entity is not None
    assert entity["created_at"] == "2040-01-01T12:00:00.000000Z"
    hf_clock.advance(days=1)
    assert hf_clock() == noon + timedelta(days=1)
    hf_clock.stop_at()
    with pytest.raises(InvalidInputError, match="2040-01-02.*never goes back.*not 2040-01-01"):
        hf_clock.stop_at(noon)
    with pytest.raises(InvalidInputError, match="time zone, such as"):
        hf_clock.stop_at(datetime(2050, 1, 1))
    with pytest.raises(InvalidInputError):
        hf_clock.advance(hours=-1)


# -- faults ---------------------------------------------------------------------------------


async def test_a_write_that_fails_has_done_nothing(
    hf_store: StorageStrategy, hf_faults: Faults
) -> None:
    hf_faults.fail_next_write()
    with pytest.raises(UnavailableError) as caught:
        await created(hf_store)
    assert (caught.value.retryable, caught.value.outcome_unknown) == (True, False)
    assert await hf_store.get_entity("templates", "t") is None
    hf_faults.fail_next_write(DiskFullError("no space left"))
    with pytest.raises(DiskFullError):
        await hf_store.save_entity("templates", {"template_id": "t"})
    assert hf_faults.pending == 0
    assert await created(hf_store) == 1


async def test_a_write_whose_answer_is_lost_was_done(
    hf_store: StorageStrategy, hf_faults: Faults
) -> None:
    await created(hf_store)
    hf_faults.lose_next_answer()
    with pytest.raises(UnavailableError) as caught:
        await hf_store.update_entity("templates", "t", {"name": "x"}, expected_version=1)
    assert (caught.value.retryable, caught.value.outcome_unknown) == (False, True)
    with pytest.raises(ConcurrencyConflictError):
        await hf_store.update_entity("templates", "t", {"name": "x"}, expected_version=1)


@pytest.mark.parametrize("executed", [False, True])
async def test_a_transaction_fails_at_its_end(
    hf_store: StorageStrategy, hf_faults: Faults, executed: bool
) -> None:
    arm = hf_faults.lose_next_answer if executed else hf_faults.fail_next_write
    arm()
    async with hf_store.begin_transaction() as tx:
        assert await tx.get_entity("templates", "t") is None
    assert hf_faults.pending == 1, "nothing was written"
    with pytest.raises(UnavailableError):
        async with hf_store.begin_transaction() as tx, tx.begin_transaction() as inner:
            assert await created(inner) == 1
    assert await hf_store.count_entities("templates") == int(executed)


async def test_changes_under_a_claim_fail(hf_store: StorageStrategy, hf_faults: Faults) -> None:
    await created(hf_store)
    [claim] = await hf_store.claim_entities("templates")
    hf_faults.fail_next_write()
    with pytest.raises(UnavailableError):
        await claim.update({"name": "x"})
    hf_faults.lose_next_answer()
    with pytest.raises(UnavailableError):
        await claim.finish({"name": "x"})
    assert await hf_store.claims("templates") == []


async def test_tasks_that_share_a_commit_fail_together(
    hf_store: StorageStrategy, hf_faults: Faults
) -> None:
    hf_faults.fail_next_write()
    several = (created(hf_store, f"t-{each}") for each in range(3))
    outcomes = await asyncio.gather(*several, return_exceptions=True)
    assert [type(each) for each in outcomes] == [UnavailableError] * 3


# -- runs of other projects -----------------------------------------------------------------

SUITE = """
import pytest

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.mark.anyio
async def test_of_anyio(hf_store):
    assert await hf_store.save_entity("jobs", {"job_id": "j"}) == 1

@pytest.mark.asyncio
async def test_of_asyncio(hf_store):
    assert await hf_store.save_entity("jobs", {"job_id": "j"}) == 1
"""

DECLARED = """
from hf_async_store import Collection

JOBS = Collection("jobs", key="job_id")
"""

SETTINGS = """
[pytest]
pythonpath = .
hf_store_collections = declared:JOBS
filterwarnings = error
asyncio_default_fixture_loop_scope = function
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    for name, text in (
        ("test_suite.py", SUITE),
        ("declared.py", DECLARED),
        ("pytest.ini", SETTINGS),
    ):
        (folder / name).write_text(text)
    return subprocess.run(
        [*PYTEST, *arguments],
        cwd=folder,
        # Also if this test itself runs in a worker of pytest-xdist.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST_")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_store_that_outlives_a_test_is_cleared(tmp_path: Path) -> None:
    url = f"--hf-store-url=json:{tmp_path}/data"
    for _ in range(2):
        done = run(tmp_path, url)
        assert "2 passed" in done.stdout, done.stdout


def test_data_of_somebody_else_is_not_deleted(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    content = '{"jobs": {"j-1": {"job_id": "j-1", "version": 1}}}'
    data.write_text(content)
    done = run(tmp_path, f"--hf-store-url=json:{data}")
    assert "has entities of jobs, which these tests would delete" in done.stdout
    assert "2 errors" in done.stdout, done.stdout
    assert data.read_text() == content


SEVERAL = """
import pytest
from hf_async_store import Collection, InvalidInputError

pytestmark = pytest.mark.asyncio

JOBS = Collection("jobs", key="job_id", feed=60)
PEOPLE = Collection("people", key="person_id")


@pytest.fixture
def hf_store_collections(request):
    return [PEOPLE] if "people" in request.node.name else [JOBS]


@pytest.mark.parametrize("turn", range(2))
async def test_jobs(hf_store, turn):
    async with hf_store.subscribe("consumer", "jobs") as changes:
        await hf_store.create_entity("jobs", {"job_id": f"j-{turn}"})
        change = await anext(changes)
        assert change.id == f"j-{turn}"
        await changes.advance(change)


async def test_people(hf_store):
    await hf_store.create_entity("people", {"person_id": "new"})
"""


def test_nothing_is_left_of_a_test_and_no_collection_is_cleared_unseen(tmp_path: Path) -> None:
    content = '{"people": {"p-1": {"person_id": "p-1", "version": 1}}}'
    data = tmp_path / "data.json"
    data.write_text(content)
    (tmp_path / "test_several.py").write_text(SEVERAL)
    done = run(tmp_path, f"--hf-store-url=json:{data}", "test_several.py")
    assert "has entities of people, which these tests would delete" in done.stdout, done.stdout
    assert "2 passed, 1 error" in done.stdout, done.stdout


def test_workers_do_not_share_a_store(tmp_path: Path) -> None:
    shared = run(tmp_path, "-n2", "--dist=each", f"--hf-store-url=json:{tmp_path}/data")
    assert "each worker needs its store" in shared.stdout
    own = run(tmp_path, "-n2", "--dist=each", f"--hf-store-url=json:{tmp_path}/data-{{worker}}")
    assert "4 passed" in own.stdout, own.stdout


def test_collections_that_cannot_be_imported(tmp_path: Path) -> None:
    done = run(tmp_path, "--hf-store-collections=declared:NOTHING")
    assert "hf_store_collections must be MODULE:NAME, not declared:NOTHING" in done.stdout
