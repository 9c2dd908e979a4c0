"""`top`: the figures, as JSON and on a terminal, which is restored at the end."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import select
import signal
import subprocess
import termios
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from command import PROGRAM, shell
from rich.console import Console

from hf_async_store import Collection, open_store
from hf_async_store.cli.top_command import CollectionFigures, Sample, _rendered
from hf_async_store.values import is_canonical_timestamp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from command import Cli

JOBS = Collection("jobs", key="job_id", feed=timedelta(days=1))


def look(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


@pytest.mark.parametrize("location", ["json:jobs.json", "sqlite:jobs.db"])
async def test_what_is_seen(location: str) -> None:
    async with open_store(location, collections=[JOBS]) as store:
        await store.create_entities("jobs", [{"job_id": f"j-{each}"} for each in range(3)])
        await store.claim_entities("jobs", owner="w", lease=600, limit=1)
        async with store.lock("nightly"):
            with subprocess.Popen(
                [*PROGRAM, "top", "--interval", "0.5", "--store", location], stdout=subprocess.PIPE
            ) as process:
                first = await asyncio.to_thread(look, process)
                seen = first["collections"]["jobs"]
                assert (seen["entities"], seen["claims"], seen["oldest_claim"]) == (3, 1, "j-0")
                assert first["locks"] == ["nightly"]
                assert first["health"]["problems"] == []
                changes = 0.0
                for number in range(60):
                    await store.save_entity("jobs", {"job_id": f"new-{number}"})
                    sample = await asyncio.to_thread(look, process)
                    seen = sample["collections"]["jobs"]
                    changes += seen["changes_per_second"]
                    if changes and seen["entities_per_second"] > 0:
                        break
                assert changes > 0
                assert seen["entities_per_second"] > 0
                assert seen["oldest_claim_seconds"] > 0
                assert isinstance(seen["feed_position"], str)
                process.send_signal(signal.SIGINT)
                assert await asyncio.to_thread(process.wait, 60) == 0


def test_once(filled: Cli) -> None:
    ran = shell("top", "--once", "--interval", "0.1")
    assert ran.code == 0
    [sample] = ran.rows
    assert sample["collections"]["machines"]["entities"] == 3
    assert sample["collections"]["machines"]["changes_per_second"] is None
    assert sample["seconds"] > 0
    assert sample["health_seconds"] >= 0.1  # it was called by the first of two looks
    assert is_canonical_timestamp(sample["time"])
    assert filled("top", "--store", "json:nope.json", "--once").code == 1
    assert filled("top", "--interval", "0").code == 2


def test_a_screen_marks_what_is_not_current() -> None:
    figures = CollectionFigures(3, 0.5, None, None, 1, "j-0", 2.0)
    report = {"problems": [], "slow_queries": [], "latency_ms": 1.0}
    sample = Sample("2026-01-05T00:00:00.000000Z", 2.0, {"jobs": figures}, [], report, 12.3)

    def shown(problem: str | None) -> str:
        screen = Console(file=io.StringIO(), width=120)
        screen.print(_rendered("json:jobs.json", sample, problem))
        assert isinstance(screen.file, io.StringIO)
        return screen.file.getvalue()

    assert "health, checked 12 s ago:\na test write took 1.0 ms" in shown(None)
    assert "not current" not in shown(None)
    assert (
        "\ncannot read\nwhat follows is not current: it was seen at 2026-01-05T00:00:00.000000Z\n"
    ) in shown("cannot read")


@contextmanager
def on_a_terminal(*words: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*PROGRAM, *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
    ) as process:
        try:
            before = termios.tcgetattr(theirs)
            yield ours, process
            assert termios.tcgetattr(theirs) == before
        finally:
            process.kill()
            os.close(theirs)
            os.close(ours)


def read_until(terminal: int, text: str) -> str:
    seen, deadline = "", time.monotonic() + 60
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], deadline - time.monotonic())
        assert ready, seen
        seen += os.read(terminal, 4096).decode()
    return seen


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("way", ["q", "SIGINT", "SIGTERM"])
def test_a_screen(way: str) -> None:
    with on_a_terminal("top", "--interval", "600") as (terminal, process):
        seen = read_until(terminal, "a test write took")
        assert "machines" in seen
        assert "bytes: " in seen
        assert "\x1b[?1049h" in seen
        if way == "q":
            os.write(terminal, b"q")
        else:
            process.send_signal(getattr(signal, way))
        assert "\x1b[?25h" in read_until(terminal, "\x1b[?1049l")  # the cursor, and then the screen
        assert process.wait(timeout=60) == 0


@pytest.mark.usefixtures("filled")
def test_once_on_a_terminal() -> None:
    with on_a_terminal("top", "--once", "--interval", "0.1") as (terminal, process):
        seen = read_until(terminal, "a test write took")
        assert "\x1b[?1049h" not in seen
        assert process.wait(timeout=60) == 0
