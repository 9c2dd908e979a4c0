"""The demo runs, reports correctly, and cleans up."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from rich.console import Console

from hf_async_store import ConfigurationError, StorageStrategy, open_store
from hf_async_store.strategies.memory import MemoryStorageStrategy
from hf_async_store_bench.cli.demo import add_arguments, run
from hf_async_store_bench.demo import report
from hf_async_store_bench.demo.plan import Plan, Settings, draw_sizes, shares
from hf_async_store_bench.demo.runner import FAILED, PASSED, run_demo
from hf_async_store_bench.demo.verify import Invariant
from hf_async_store_bench.demo.write_log import ProcessLog

if TYPE_CHECKING:
    from collections.abc import Iterator


def short(**settings: object) -> Settings:
    given = {"seconds": 4.0, "requests": 12, "seed": 7} | settings
    return Settings(**given)  # type: ignore[arg-type]


def digests(folder: Path) -> dict[str, str]:
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in folder.iterdir()}


def test_random_sizes_are_reproducible_and_contain_a_burst() -> None:
    sizes = draw_sizes(1, 0, 60)
    assert sizes == draw_sizes(1, 0, 60) != draw_sizes(2, 0, 60)
    assert max(sizes) == 1000
    assert sum(shares(240, 3)) == 240
    assert shares(1, 3) == [1, 1, 1]


# -- runs that pass --------------------------------------------------------------------------


@pytest.mark.hf_sampled
async def test_three_processes_on_data_from_the_field(
    field_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(field_data)
    assert await run_demo(short(data=str(field_data))) == PASSED
    out = capsys.readouterr().out
    assert re.search(r"Working on a copy of .*: \d+ templates, \d+ requests, [\d,]+ machines", out)
    assert re.search(r"Killed process 3 \(pid \d+\) with SIGKILL", out)
    assert re.search(r"\(killed\): \d+ of its claims were taken over after their leases", out)
    assert re.search(r"what has expired is absent, and is removed by a purge +[1-9]", out)
    assert re.search(r"initial entities that were not written are unchanged +[1-9]", out)
    assert re.search(r"watcher, after the answer +[1-9]", out)
    assert re.search(r"whoever waited for a request got it completed +[1-9]", out)
    assert re.search(
        r"no change was missed by a watcher, and none came that nobody made +[1-9]", out
    )
    assert "PASSED: 16 invariants, none broken" in out
    assert digests(field_data) == before
    assert list((tmp_path / "tmp").iterdir()) == []


async def test_memory_is_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert await run_demo(short(store="memory:", requests=8)) == PASSED
    out = capsys.readouterr().out
    assert "One process only" in out
    assert "No initial data was given" in out
    assert "Killed" not in out


async def test_an_existing_store_keeps_the_written_data(
    single_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"json:{tmp_path}/mine"
    async with open_store(url) as store:
        await store.create_entity("templates", {"template_id": "mine", "name": "not yours"})
        mine = await store.get_entity("templates", "mine")
    again = short(store=url, data=str(single_file), requests=6, processes=1)
    assert await run_demo(again) == PASSED
    assert "Imported from a copy" in capsys.readouterr().out
    async with open_store(url) as store:
        assert await store.get_entity("templates", "mine") == mine
    assert await run_demo(again) == PASSED
    assert "already: nothing is imported" in capsys.readouterr().out
    assert list((tmp_path / "tmp").iterdir()) == []


def test_arguments_config_and_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"strategy": "memory"}))
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    add_arguments(parser)
    asked = ["--config", str(config), "--requests", "3", "--seconds", "2", "--keep"]
    assert run(parser.parse_args(asked)) == PASSED
    assert "(kept in " in capsys.readouterr().out
    (kept,) = (tmp_path / "tmp").iterdir()
    assert ProcessLog.of(kept / "process-1.notes").operations


async def test_invalid_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no JSON store there"):
        await run_demo(short(data=str(tmp_path / "nowhere")))
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("value", ["0", "-1", "inf", "many"])
def test_options_are_positive(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--requests", value])
    assert "--requests" in capsys.readouterr().err


class Small(MemoryStorageStrategy):
    """An engine that accepts only small transactions, like some services."""

    @property
    def capabilities(self):  # type: ignore[no-untyped-def]
        return msgspec.structs.replace(super().capabilities, max_transaction_changes=25)


async def test_bursts_beyond_the_transaction_limit_are_split(tmp_path: Path) -> None:
    settings = short(store="memory:", requests=8, keep=True)

    def opening(plan: Plan) -> StorageStrategy:
        return Small(collections=plan.collections())

    assert await run_demo(settings, opening) == PASSED
    (kept,) = (tmp_path / "tmp").iterdir()
    operations = ProcessLog.of(kept / "process-1.notes").operations
    whole = [
        sum(len(each.ids) for each in op.intent.writes) for op in operations if op.intent.whole
    ]
    assert 0 < max(whole) <= 25
    assert any(op.intent.work == "create batch" for op in operations)


async def test_eventually_consistent_queries_are_repeated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A stale index is not a lost write if the engine declares eventual consistency."""

    class Behind(MemoryStorageStrategy):
        @property
        def capabilities(self):  # type: ignore[no-untyped-def]
            return msgspec.structs.replace(super().capabilities, query_isolation="eventual")

        async def query_entities(self, collection, *args, **more):  # type: ignore[no-untyped-def]
            rows = await super().query_entities(collection, *args, **more)
            if collection == "machines" and rows and not self.caught_up:
                self.caught_up = True
                return rows[1:]
            return rows

        caught_up = False

    def opening(plan: Plan) -> StorageStrategy:
        return Behind(collections=plan.collections())

    assert await run_demo(short(store="memory:", requests=4), opening) == PASSED


# -- ends in the middle ----------------------------------------------------------------------


def children_of(pid: int) -> list[int]:
    table = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    rows = [tuple(map(int, line.split())) for line in table.splitlines()]
    return [child for child, parent in rows if parent == pid]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return bool(state.strip()) and not state.startswith("Z")


def wait_for(condition, seconds: float = 15) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


@contextmanager
def running_demo() -> Iterator[subprocess.Popen[str]]:
    """The demo in a separate process, which is killed afterwards."""
    command = [
        sys.executable,
        "-m",
        "hf_async_store",
        "demo",
        "--seconds",
        "30",
        "--requests",
        "9999",
    ]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield demo
    finally:
        if demo.poll() is None:
            demo.kill()
        demo.communicate()


@pytest.mark.hf_sampled
@pytest.mark.parametrize(
    ("ending", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["ctrl-c", "sigterm", "sigkill"],
)
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path, ending: int, code: int) -> None:
    with running_demo() as demo:
        wait_for(lambda: len(children_of(demo.pid)) == 2)
        workers = children_of(demo.pid)
        (folder,) = (tmp_path / "tmp").iterdir()
        wait_for(lambda: len(list(folder.glob("*.notes"))) == 3)
        time.sleep(0.3)
        demo.send_signal(ending)
        out = demo.communicate(timeout=20)[0]
        assert demo.returncode == code, out
        assert "Traceback" not in out
    wait_for(lambda: not any(map(is_alive, workers)))
    # After SIGKILL nothing can be cleaned up, but no process may remain.
    assert ending == signal.SIGKILL or not folder.exists()


async def test_a_worker_that_fails_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only this process can open the store; the workers fail."""
    good = f"json:{tmp_path}/db.json"

    def opening(plan: Plan) -> StorageStrategy:
        return open_store(good, collections=plan.collections())

    bad = "json:/dev/null/nowhere.json"
    assert await run_demo(short(store=bad, requests=3, seconds=2.0), opening) == FAILED
    out = capsys.readouterr().out
    assert "process 2: ended by itself with 1" in out
    assert "FAILED: broken: finished" in out


# -- output ----------------------------------------------------------------------------------


def test_an_invariant_without_checks_does_not_hold() -> None:
    shown = io.StringIO()
    invariants = [Invariant("one", "first", 3), Invariant("two", "second")]
    report.print_verdict(report.Screen(Console(file=shown, width=100)), invariants, None)
    assert re.search(r"first +3 +holds", shown.getvalue())
    assert re.search(r"second +0 +unchecked", shown.getvalue())
    assert "PASSED: 2 invariants, none broken" in shown.getvalue()


def test_output_on_a_terminal_has_colours_and_a_bar() -> None:
    shown = io.StringIO()
    terminal = report.Screen(Console(file=shown, force_terminal=True, width=100))
    with terminal.progress(3) as progress:
        terminal.stage("working [on] it")
        progress(2)
    terminal.table("Title", ["", "verdict"], [["[odd] name", "holds"]])
    terminal.verdict("FAILED", "broken: counts")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert "working [on] it" in plain
    assert "[odd] name" in plain
    assert "FAILED: broken: counts" in plain
    assert "\x1b[" in shown.getvalue()
