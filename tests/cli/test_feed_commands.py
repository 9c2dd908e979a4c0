"""`watch` and `wait`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from command import PROGRAM

if TYPE_CHECKING:
    from command import Cli

STORE: Final = ("--store", "json:pool")
FEED: Final = """\
from hf_async_store import Collection

COLLECTIONS = [
    Collection("jobs", key="job_id", fields=["status"], feed=3600),
    Collection("logs", key="log_id"),
]
"""


@pytest.fixture
def fed(cli: Cli, workplace: Path) -> Cli:
    """The command line, with a store that remembers a collection with a feed."""
    (workplace / "jobs_schema.py").write_text(FEED)
    ran = cli(*STORE, "--collections", "jobs_schema:COLLECTIONS", "put", "jobs", '{"job_id": "a"}')
    assert ran.code == 0, ran.err
    return cli


@contextmanager
def _running(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A command that is running until the context is left."""
    with subprocess.Popen(
        [*PROGRAM, *STORE, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _token(process: subprocess.Popen[str]) -> str:
    """Wait until a command watches; returns the token of that moment."""
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "watching jobs after the token " in line, line
    return line.split()[-1]


def test_changes_are_written_as_they_are_committed(fed: Cli) -> None:
    with _running("watch", "jobs", "status=DONE") as process:
        token = _token(process)
        assert process.stdout is not None
        assert fed(*STORE, "update", "jobs", "a", "status=OPEN").code == 0
        assert fed(*STORE, "update", "jobs", "a", "status=DONE").code == 0
        change = json.loads(process.stdout.readline())
        assert (change["kind"], change["id"], change["version"]) == ("put", "a", 3)
        assert change["entity"]["status"] == "DONE"
        assert fed(*STORE, "delete", "jobs", "a").code == 0
        last = json.loads(process.stdout.readline())
        assert (last["kind"], last["version"], last["entity"]) == ("delete", 3, None)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    ran = fed(*STORE, "watch", "jobs", "--since", token, "--limit", "3")
    assert (ran.code, [each["version"] for each in ran.rows]) == (0, [2, 3, 3])
    ran = fed(*STORE, "watch", "jobs", "--since", change["token"], "--limit", "1")
    assert [each["kind"] for each in ran.rows] == ["delete"]


def test_watch_refuses_what_it_cannot_follow(fed: Cli) -> None:
    ran = fed(*STORE, "watch", "logs")
    assert (ran.code, "feed=" in ran.message) == (2, True)
    assert fed(*STORE, "watch", "nothing").code == 2
    assert fed(*STORE, "watch", "jobs", "--since", "x").code == 2
    ran = fed("--store", "json:elsewhere", "watch", "jobs")
    assert (ran.code, ran.message[:20]) == (1, "there is no store at")
    assert fed(*STORE, "watch", "jobs", "--limit", "0").rows == []
    ran = fed(*STORE, "watch", "jobs", "--timeout", "0.5")
    assert (ran.code, ran.rows) == (4, [])


def test_waiting_for_an_entity(fed: Cli) -> None:
    for collection in ("jobs", "logs"):
        key = f"{collection[:-1]}_id"
        assert fed(*STORE, "put", collection, json.dumps({key: "b", "status": "OPEN"})).code == 0
        filters = ["status=DONE"] if collection == "jobs" else ['["status"]=DONE']
        with _running("wait", collection, "b", *filters, "--timeout", "60") as process:
            assert process.stdout is not None
            done = json.dumps({key: "b", "status": "DONE"})
            assert fed(*STORE, "put", collection, done).code == 0
            assert json.loads(process.stdout.readline())["version"] == 2
            assert process.wait(20) == 0
        assert fed(*STORE, "wait", collection, "b", *filters).rows[0]["version"] == 2


def test_exit_codes_of_wait(fed: Cli) -> None:
    ran = fed(*STORE, "wait", "jobs", "a", "status=DONE", "--timeout", "0.3")
    assert (ran.code, ran.rows) == (5, [])
    assert "--timeout" in ran.message
    assert fed(*STORE, "wait", "jobs", "none", "--timeout", "5").code == 1
    with _running("wait", "jobs", "a", "status=DONE") as process:
        assert fed(*STORE, "delete", "jobs", "a").code == 0
        assert process.wait(20) == 1
