"""The commands `hf-async-store bench` and `advise`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from hf_async_store.cli import main
from hf_async_store_bench import recommend
from hf_async_store_bench.messages import Load, decode
from hf_async_store_bench.results import Results

SMALL = ["--entities", "200", "--tasks", "4", "--rounds", "2", "--duration", "0.1"]


def called(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hf_async_store", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.hf_sampled(by="module")
def test_a_run_writes_its_report_and_two_can_be_compared(tmp_path: Path) -> None:
    for name in ("old", "new"):
        chosen = ["--only", "json split", "--only", "group commit by hand", "--workload", "save"]
        done = called("bench", *SMALL, *chosen, "--output", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert "Every invariant held" in done.stdout
        assert "json split" in done.stdout
        assert "save, 4 tasks: 2 systems" in done.stderr
    old, new = (str(tmp_path / each / "report.json") for each in ("old", "new"))
    compared = called("bench", "compare", old, new)
    assert compared.returncode == 0, compared.stderr
    assert "save, 4 tasks" in compared.stdout
    assert "may be the machine" in compared.stdout
    lines = called("bench", "compare", old, new, "--json").stdout.splitlines()
    assert {json.loads(each)["system"] for each in lines} == {"json split", "group commit by hand"}


@pytest.mark.hf_sampled(by="module")
def test_a_store_given_by_url_is_measured_in_a_separate_folder(tmp_path: Path) -> None:
    done = called(
        "bench", *SMALL, "--only", "memory", "--workload", "get", "--json",
        "--store", "json:{folder}/mine.json?cache_size=0", "--output", str(tmp_path / "report"),
        "--folder", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = decode(done.stdout.encode(), Results)
    assert [each.system for each in results.cells] == ["memory", "yours (json)"]
    assert [each.name for each in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "one.json"], "compare OLD.json NEW.json"),
        (["compare", "no.json", "no.json"], "no.json: cannot be read"),
        (["--only", "oracle"], "nothing to measure is called 'oracle'"),
        (["--workload", "dance"], "no workload 'dance'"),
        (["--store", "json:data"], "needs {folder}"),
        (["--page", "no.md"], "no.md: cannot be read"),
        (["--tasks", "0"], "invalid number >= 1 value"),
        (["--reads-percent", "101"], "invalid number from 0 to 100 value"),
        (["--short", "--full"], "not allowed with"),
    ],
)
def test_errors_are_reported_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1


def test_a_file_that_is_not_a_result_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"made_at": 5}')
    assert main(["bench", "compare", str(other), str(other)]) == 2
    assert "these are no results of a run" in capsys.readouterr().err


# -- advice ---------------------------------------------------------------------------------


def candidate(engine: str, rate: float, against: str = "") -> recommend.Candidate:
    return recommend.Candidate(
        engine=engine, rate=rate, low=rate, high=rate, p50=0.001, p99=0.002, memory=1e6,
        needs="this", against=against,
    )  # fmt: skip


def advice(*candidates: recommend.Candidate, entities: int = 10) -> recommend.Advice:
    found = recommend.Advice(
        wanted=Load(workload="mixed", entities=entities, tasks=1, processes=1, reads=80),
        measured=Load(workload="mixed", entities=10),
        candidates=list(candidates),
        skipped=[],
        failures=[],
    )
    recommend.decide(found)
    return found


def test_the_simpler_engine_wins_if_it_is_nearly_as_fast() -> None:
    close = advice(candidate("json", 80), candidate("sqlite", 90), candidate("postgresql", 100))
    assert close.engine == "json"
    far = advice(candidate("json", 10), candidate("sqlite", 90), candidate("postgresql", 100))
    assert far.engine == "sqlite"
    best = advice(candidate("json", 10), candidate("sqlite", 20), candidate("postgresql", 100))
    assert best.engine == "postgresql"
    assert "5 times" in " ".join(best.reasons)


def test_unsuitable_engines_are_not_recommended() -> None:
    found = advice(candidate("json", 100, "would take 900 GB of memory"), candidate("sqlite", 10))
    assert found.engine == "sqlite"
    assert advice(candidate("json", 100, "no")).engine is None
    assert "no engine" in recommend.as_text(advice(candidate("json", 100, "no")))


def test_the_advice_contains_its_figures() -> None:
    told = recommend.as_text(
        advice(candidate("json", 1234), candidate("dynamodb", 200), entities=10**6)
    )
    assert "1,230" in told
    assert "recommended" in told
    assert "Measured with 10 machines, not 1,000,000" in told
    assert "test server" in told


def test_advise_refuses_options_that_it_does_not_use() -> None:
    for option in ("--store", "--config", "--collections"):
        done = called("advise", option, "memory:")
        assert done.returncode == 2
        assert f"advise does not take {option}: it measures temporary stores" in done.stderr


@pytest.mark.timeout(200)
@pytest.mark.long
def test_advise_measures_and_recommends(tmp_path: Path) -> None:
    done = called(
        "advise", "--entities", "1000", "--tasks", "4", "--processes", "2",
        "--reads-percent", "90", "--json", "--folder", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode(done.stdout, type=recommend.Advice)
    measured = {each.engine: each for each in found.candidates}
    assert found.engine in measured
    assert measured["json"].rate > 10
    assert measured["json"].p99 >= measured["json"].p50 > 0
    assert found.measured.processes == 2
    assert found.reasons
    assert list(tmp_path.iterdir()) == []


def test_the_short_run_uses_known_systems() -> None:
    from hf_async_store_bench.systems import ALL, SHORT_SYSTEMS

    assert set(SHORT_SYSTEMS) < set(ALL)
    short = {each.name for each in SHORT_SYSTEMS}
    assert {"memory", "json", "sqlite", "postgresql", "dynamodb", "asyncpg pool each"} <= short
    assert not {"tinydb", "aiosqlite each"} & short


@pytest.mark.hf_sampled(by="module")
@pytest.mark.parametrize(("ending", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_stops_its_processes(
    tmp_path: Path, ending: signal.Signals, code: int
) -> None:
    command = [
        sys.executable, "-m", "hf_async_store", "bench", "--only", "dynamodb", "--workload", "save",
        "--entities", "200", "--duration", "60", "--output", str(tmp_path / "report"),
        "--folder", str(tmp_path),
    ]  # fmt: skip
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        server = _child_of(run.pid, "ministack")
        if server is None:
            pytest.skip("no DynamoDB server is installed")
        time.sleep(1)
        run.send_signal(ending)
        out = run.communicate(timeout=30)[0]
    finally:
        run.kill()
        run.communicate()
    assert run.returncode == code, out
    assert "Traceback" not in out
    assert _child_of(server, "ministack", seconds=0) is None
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
    assert list(tmp_path.iterdir()) == []


def _child_of(pid: int, name: str, seconds: float = 30) -> int | None:
    """Wait for a child process with this name in its command line; returns its id."""
    until = time.monotonic() + seconds
    while True:
        table = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for line in table.splitlines():
            child, parent, words = line.split(None, 2)
            if int(parent) == pid and name in words:
                return int(child)
        if time.monotonic() > until:
            return None
        time.sleep(0.3)  # each look starts a process
