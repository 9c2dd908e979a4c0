"""What the store logs, beside case 149 of the contract."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_async_store import Collection, JSONStorageStrategy, MigrationTool, open_store
from hf_async_store.logs import hide_debug_messages

SECRET = "Zq9xKpW"
JOBS = Collection("jobs", key="job_id", fields=["status"], indexes=["status"])


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    for name in (None, "hf_async_store"):
        caplog.set_level(logging.DEBUG, name)
    return caplog


def messages(log: pytest.LogCaptureFixture, area: str) -> list[tuple[str, str]]:
    """The levels and messages of a logger."""
    name = f"hf_async_store.{area}"
    return [(each.levelname, each.getMessage()) for each in log.records if each.name == name]


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{SECRET}@127.0.0.1:1/db?application_name=x",
        f"dynamodb://us-east-1/x_?endpoint_url=http://user:{SECRET}@127.0.0.1:1",
    ],
)
async def test_an_opened_store_shows_no_secret(url: str, log: pytest.LogCaptureFixture) -> None:
    async with open_store(url, collections=[JOBS]):
        pass
    [(level, message)] = messages(log, "store")
    assert level == "INFO"
    assert "'collections': ['jobs']" in message
    assert SECRET not in log.text


async def test_compactions_and_recoveries(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    async with JSONStorageStrategy(f"json:{tmp_path}/a.json", collections=[JOBS]) as store:
        await store.create_entity("jobs", {"job_id": SECRET})
        await store.checkpoint()
        [journal] = [each for each in tmp_path.iterdir() if ".journal." in each.name]
        size = journal.stat().st_size
        await store.create_entity("jobs", {"job_id": "b"})
        record = journal.read_bytes()[size:]
        with journal.open("ab") as file:
            file.write(record[:-1])  # by a process that was killed
        await store.create_entity("jobs", {"job_id": "c"})
        await store.checkpoint("salvage")
    shown = messages(log, "json")
    compacted = f"compacted the journal in {tmp_path} into the data files in "
    assert [level for level, message in shown if message.startswith(compacted)][:1] == ["INFO"]
    cut = f"removed an incomplete record, of an interrupted append, from {journal}"
    assert ("INFO", cut) in shown
    assert ("INFO", f"recovered the store in {tmp_path} from salvage") in shown
    assert SECRET not in log.text


async def test_slow_queries_and_commits(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hf_async_store.coalescing._SLOW_SECONDS", 0.0)
    monkeypatch.setattr("hf_async_store.slow_queries.SLOW_SECONDS", 0.0)
    async with open_store("memory:", collections=[JOBS]) as store:
        await store.create_entities("jobs", [{"job_id": each} for each in "ab"])
        await store.query_entities("jobs", {"status": SECRET}, "-status")
        await store.count_entities("jobs")
    commit, query, count = messages(log, "slow")
    assert commit[1].startswith("a shared commit of 2 took 0.0")
    assert query[1].startswith("a query of jobs took 0.0")
    assert query[1].endswith(": status = ?; order ['-status']; 0 rows")
    assert count[1].endswith(": all; order []; 2 rows")
    assert {level for level, _ in (commit, query, count)} == {"DEBUG"}
    assert SECRET not in log.text


async def test_schema_changes(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    url = f"sqlite:{tmp_path}/a.db"
    bare = Collection("jobs", key="job_id", fields=["status"])
    async with open_store(url, collections=[bare]) as store:
        await store.create_entity("jobs", {"job_id": "a"})
    async with open_store(url, collections=[JOBS]) as store:
        await store.apply_schema()
    shown = messages(log, "schema")
    assert ("INFO", "to do: index of jobs.status-index") in shown
    assert shown[-1] == ("INFO", "the store agrees with the declared collections")


async def test_steps_of_a_migration(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    urls = f"json:{tmp_path}/a.json", f"sqlite:{tmp_path}/b.db"
    async with open_store(urls[0], collections=[JOBS]) as store:
        await store.create_entity("jobs", {"job_id": SECRET})
    block = {"create_backup": True, "backup_location": str(tmp_path / "backups")}
    async with MigrationTool(*urls, {"migration": block}, collections=[JOBS]) as tool:
        await tool.migrate()
    assert messages(log, "migration") == [
        ("INFO", "migration: the source was backed up"),
        ("INFO", "migration: copied jobs, 1 entities"),
        ("INFO", "migration: verified"),
    ]
    assert SECRET not in log.text


@pytest.fixture
def driver() -> Iterator[logging.Logger]:
    logger = logging.getLogger(f"driver.{time.monotonic_ns()}")
    yield logger
    logger.setLevel(logging.NOTSET)


def test_debug_messages_of_drivers(driver: logging.Logger, log: pytest.LogCaptureFixture) -> None:
    child = driver.getChild("child")
    hide_debug_messages(driver.name)
    child.debug("hidden")
    child.info("shown")
    driver.setLevel(logging.DEBUG)
    hide_debug_messages(driver.name)  # it was asked for
    child.debug("shown")
    assert [each.getMessage() for each in log.records] == ["shown", "shown"]


def test_the_package_is_quiet() -> None:
    code = "import logging, hf_async_store; logging.getLogger('hf_async_store.x').error('loud')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
