"""migrate, migrateRepository, verify, live-migrate, and the portable backup, from the command line."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command import STORE, Cli, Ran, shell

from hf_async_store.cli import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

TARGET = "json:moved"


def _migrate(cli: Cli, *words: str) -> Ran:
    return cli("migrate", "--from", STORE, "--to", TARGET, *words)


def test_migrate_moves_verifies_and_reports(filled: Cli) -> None:
    ran = _migrate(filled)
    assert (ran.code, ran.err) == (0, "")
    [report] = ran.rows
    assert report["ok"]
    assert report["verified"]
    assert report["collections"]["machines"]["written"] == 3
    assert Path(report["backup"]).exists()
    found = [filled("query", "machines", "--store", url).rows for url in (STORE, TARGET)]
    assert found[0] == found[1]
    assert len(found[0]) == 3
    again = _migrate(filled)
    assert again.rows[0]["collections"]["machines"]["written"] == 0


PAIR = ("--from", STORE, "--to", TARGET)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("migrate", *PAIR), "--store"),
        (("migrateRepository", "--source-type", "json", "--target-type", "sql"), "--store"),
        (("live-migrate", "status", *PAIR), "--store"),
        (("live-migrate", "status", *PAIR), "--config"),
        (("verify", *PAIR), "--store"),
        (("verify", "b.jsonl.gz"), "--config"),
    ],
)
def test_options_that_a_command_does_not_use_are_refused(
    cli: Cli, words: tuple[str, ...], option: str
) -> None:
    for given in ((*words, option, "json:x"), (option, "json:x", *words)):
        ran = cli(*given)
        assert ran.code == 2
        assert ran.message.startswith(f"{words[0]} does not take {option}: give ")
    assert option not in re.findall(r"\S+", cli(words[0], "--help").out)
    assert not Path("x").exists()


def test_a_dry_run_writes_nothing(filled: Cli) -> None:
    ran = _migrate(filled, "--dry-run")
    assert ran.code == 0
    assert ran.rows[0]["dry_run"]
    assert ran.rows[0]["collections"]["machines"]["read"] == 3
    assert filled("count", "machines", "--store", TARGET).code == 1
    assert not Path("backups").exists()


def test_options_win_over_the_block(filled: Cli) -> None:
    block = {"batch_size": 1, "backup_location": "elsewhere/", "create_backup": False}
    config = {"strategy": "json", "migration": block}
    Path("config.json").write_text(json.dumps(config))
    ran = _migrate(filled, "--config", "config.json", "--no-verify")
    assert ran.rows[0]["backup"] is None
    assert not ran.rows[0]["verified"]
    assert Path("elsewhere").exists()  # the checkpoint was stored there
    assert not list(Path("elsewhere").iterdir())
    assert not Path("backups").exists()


def test_cleanup_empties_the_source(filled: Cli) -> None:
    ran = _migrate(filled, "--cleanup-source")
    assert ran.rows[0]["cleaned"]
    assert filled("count", "machines").out == "0\n"
    assert filled("count", "machines", "--store", TARGET).out == "3\n"
    assert _migrate(filled, "--cleanup-source", "--no-verify").code == 2


def test_a_target_with_something_else_needs_a_rule(filled: Cli) -> None:
    filled("put", "templates", '{"template_id": "own"}', "--store", TARGET)
    ran = _migrate(filled)
    assert ran.code == 3
    assert "templates 'own' in it is not in the source" in ran.message
    assert _migrate(filled, "--merge", "keep").code == 0
    assert filled("count", "templates", "--store", TARGET).out == "2\n"


def test_a_missing_source_is_not_taken_for_an_empty_one(cli: Cli) -> None:
    ran = _migrate(cli)
    assert ran.code == 1
    assert "there is no store at the source" in ran.message
    assert not Path("moved").exists()


def test_nothing_to_resume(filled: Cli) -> None:
    ran = _migrate(filled, "--resume")
    assert ran.code == 4
    assert "nothing to resume" in ran.message


def test_the_command_of_the_spec(filled: Cli) -> None:
    split = {"strategy": "json", "json_strategy": {"storage_type": "split_files", "base_path": "b"}}
    one = {"strategy": "json", "json_strategy": {"filenames": {"single_file": "db.json"}}}
    Path("source.json").write_text(json.dumps(one))
    Path("target.json").write_text(json.dumps({"storage": split}))
    words = ["--source-type", "json", "--target-type", "json", "--batch-size", "100"]
    ran = filled(
        "migrateRepository",
        *words,
        "--source-config",
        "source.json",
        "--target-config",
        "target.json",
    )
    assert ran.code == 0
    assert ran.rows[0]["collections"]["machines"]["written"] == 3
    assert Path("b/machines.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--config", "c.json"],
            "the configuration has no block for 'dynamodb'; it has: json, sql",
        ),
        (["--target-config", "gone.json"], "gone.json"),
    ],
)
def test_the_command_of_the_spec_reports_missing_arguments(
    words: Sequence[str], said: str, filled: Cli
) -> None:
    Path("c.json").write_text(
        json.dumps({"storage": {"strategy": "json", "json_strategy": {}, "sql_strategy": {}}})
    )
    ran = filled("migrateRepository", "--source-type", "json", "--target-type", "dynamodb", *words)
    assert ran.code == 2
    assert said in ran.message


def test_the_two_sql_types_are_distinguished(filled: Cli) -> None:
    Path("c.json").write_text(
        json.dumps({"storage": {"strategy": "json", "json_strategy": {}, "sql_strategy": {}}})
    )
    types = ["--source-type", "json", "--target-type", "postgresql"]
    ran = filled("migrateRepository", *types, "--config", "c.json")
    assert ran.code == 2
    assert "not of the type 'postgresql'" in ran.message


def test_verify_names_the_differences(filled: Cli) -> None:
    _migrate(filled)
    ran = filled("verify", "--from", STORE, "--to", TARGET)
    assert ran.code == 0
    assert ran.rows[0]["equal"]
    filled("update", "machines", "m-1", "status=LOST", "--store", TARGET)
    filled("delete", "machines", "m-2", "--store", TARGET)
    ran = filled("verify", "--from", STORE, "--to", TARGET)
    assert ran.code == 3
    assert not ran.rows[0]["equal"]
    assert "machines 'm-1' differs in status, updated_at, version" in ran.err
    assert "machines 'm-2' is missing in the target" in ran.err
    assert filled("verify", "--from", STORE).code == 2


def test_verify_refuses_to_compare_a_store_with_itself(filled: Cli) -> None:
    ran = filled("verify", "--from", STORE, "--to", STORE)
    assert (ran.code, ran.out) == (4, "")
    assert "source and target are the same store" in ran.message


def test_backup_verify_restore(filled: Cli) -> None:
    ran = filled("backup", "b/monday.jsonl.gz")
    assert ran.rows[0]["entities"] == {"templates": 1, "requests": 2, "machines": 3}
    assert filled("verify", "b/monday.jsonl.gz").rows[0]["ok"]
    ran = filled("restore", "b/monday.jsonl.gz")
    assert ran.code == 3
    assert "is not empty" in ran.message
    assert filled("restore", "b/monday.jsonl.gz", "--store", TARGET).code == 0
    assert filled("query", "machines").rows == filled("query", "machines", "--store", TARGET).rows
    filled("delete", "machines", "m-1")
    ran = filled("restore", "b/monday.jsonl.gz", "--merge", "keep")
    assert ran.rows[0]["entities"]["machines"] == {"written": 1, "unchanged": 2, "kept": 0}
    data = bytearray(Path("b/monday.jsonl.gz").read_bytes())
    data[len(data) // 2] ^= 1
    Path("b/bad.jsonl.gz").write_bytes(data)
    for words in (["verify", "b/bad.jsonl.gz"], ["restore", "b/bad.jsonl.gz", "--store", "json:x"]):
        ran = filled(*words)
        assert ran.code == 4
        assert "is not a valid backup" in ran.message
    assert not Path("x").exists()


def test_old_backups_are_removed(filled: Cli) -> None:
    for _ in range(3):
        ran = filled("backup", "b/", "--keep", "2")
    assert len(ran.rows[0]["removed"]) == 1
    assert len(list(Path("b").iterdir())) == 2
    assert filled("backup", "b/", "--keep", "0").code == 2
    assert filled("backup", "b/x.jsonl.gz", "--keep", "1").code == 2


def test_live_migrate_from_start_to_finalize(filled: Cli) -> None:
    pair = ["--from", STORE, "--to", TARGET]
    assert filled("live-migrate", "status", *pair).rows[0]["phase"] is None
    ran = filled("live-migrate", "start", *pair)
    assert ran.rows[0]["phase"] == "SWITCHED"
    for words in (["put", "machines", '{"machine_id": "late"}'], ["count", "machines"]):
        ran = filled(*words)
        assert ran.code == 4
        assert f"json:{Path('moved').absolute()}" in ran.message
        assert "--store 'URL?follow_moves=OTHER'" in ran.message
    follows = ["--store", f"{STORE}?follow_moves={TARGET}"]
    assert filled("put", "machines", '{"machine_id": "late"}', *follows).code == 0
    both = ["--from", follows[1], "--to", f"{TARGET}?follow_moves={STORE}"]
    ran = filled("verify", *both)
    assert (ran.code, ran.out) == (4, "")
    assert "are the same store" in ran.message
    permits = {"storage": {"json_strategy": {"storage_type": "split_files", "base_path": "moved"}}}
    permits["storage"]["follow_moves"] = [STORE]  # type: ignore[assignment]
    Path("target.json").write_text(json.dumps(permits))
    assert filled("count", "machines", "--config", "target.json").out == "4\n"
    assert filled("live-migrate", "finalize", *pair).rows[0]["phase"] == "FINALIZED"
    ran = filled("count", "machines")
    assert ran.code == 4
    assert f"this store was migrated to json:{Path('moved').absolute()}" in ran.message
    assert filled("count", "machines", "--store", TARGET).out == "4\n"
    assert filled("health", "--store", TARGET).rows[0]["undeclared_sections"] == []


def test_a_secret_is_neither_recorded_nor_shown(filled: Cli) -> None:
    to = "postgresql://a:hunter2@127.0.0.1:1/x?timeout=1"
    ran = filled("live-migrate", "start", "--from", STORE, "--to", to)
    assert ran.code == 4
    assert "hunter2" not in ran.err
    assert not [each for each in Path("data").rglob("*") if b"hunter2" in each.read_bytes()]


def test_the_command_run_as_a_module() -> None:
    ran = shell("put", "templates", '{"template_id": "t-1"}')
    assert ran.code == 0
    ran = shell("migrate", "--from", STORE, "--to", TARGET)
    assert (ran.code, ran.err) == (0, "")


def test_plain_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress.Bars({"machines": 100_000}) as bars:
        bars.advance("machines")
        for now in (1.0, 3.0, 6.0, 7.0, 12.0):  # noqa: B007  # the patched clock reads it
            bars.advance("machines", 10_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "hf-async-store: machines: 30,000 of 100,000 (6,000/s, 12 s remaining)",
        "hf-async-store: machines: 50,000 of 100,000 (4,545/s, 11 s remaining)",
    ]


def test_the_rate_is_that_of_this_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first report of a resumed migration tells what the earlier run has copied."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress.Bars({"machines": 200_000}) as bars:
        now = 6.0
        bars.advance("machines", 123_000)
        now = 11.0
        bars.advance("machines", 1_000)
        now = 16.0
        bars.advance("machines", 1_000)
        bars.advance("verify")
        now = 21.0
        bars.advance("verify", 10)
    with progress.Bars({"put machines": 1}) as bars:
        now = 30.0
        bars.advance("put machines")
        now = 30.05
        bars.advance("put machines", 1)
        now = 35.0
        bars.advance("put machines")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "hf-async-store: machines: 123,000 of 200,000",
        "hf-async-store: machines: 124,000 of 200,000 (200/s, 380 s remaining)",
        "hf-async-store: machines: 125,000 of 200,000 (200/s, 375 s remaining)",
        "hf-async-store: verify: 10 (2/s)",
        "hf-async-store: put machines: 0 of 1",
        "hf-async-store: put machines: 1 of 1 (0.2/s, 0 s remaining)",
    ]


def test_progress_bars_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress.Bars({"machines": 100_000}) as bars:
        for _ in range(5):
            bars.advance("machines", 10_000)
            time.sleep(0.15)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "machines" in shown
    assert "50000/100000" in shown
    assert re.search(r"[\d,]+/s", shown)
    assert "0:00:0" in shown
