"""`completion`: what can come next, and the scripts in the shells that are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command import PROGRAM

from hf_async_store.cli.arguments import COMMANDS

if TYPE_CHECKING:
    from command import Cli

MODULE = """
from hf_async_store import Collection
ALL = [Collection("jobs", key="job_id"), Collection("owners", key="owner_id")]
"""


def completed(cli: Cli, *words: str) -> list[str]:
    ran = cli("completion", "words", "--", *words)
    assert (ran.code, ran.err) == (0, "")
    return ran.out.splitlines()


def test_commands(cli: Cli) -> None:
    assert set(COMMANDS) <= set(completed(cli, ""))
    assert "bench" in completed(cli, "")
    assert completed(cli, "--store", "json:x.json", "up") == ["update", "update-where"]
    assert completed(cli, "--store", "") == []
    assert completed(cli, "frobnicate", "") == []
    assert completed(cli, "--verb") == ["--verbose"]


def test_options_and_choices(cli: Cli) -> None:
    assert completed(cli, "export", "machines", "--f") == ["--fields", "--format"]
    assert completed(cli, "export", "machines", "--format", "") == ["csv", "jsonl"]
    assert completed(cli, "--store=json:x", "schema", "") == ["apply", "check", "plan"]
    assert "--store" not in completed(cli, "migrate", "--")
    options = completed(cli, "query", "machines", "--")
    assert {"--limit", "--order", "--store"} <= set(options)
    assert completed(cli, "query", "machines", "-") == [*options, "-h"]
    assert "--version" in completed(cli, "--")
    assert completed(cli, "completion", "z") == ["zsh"]
    assert completed(cli, "get", "machines", "") == []
    assert completed(cli, "init", "") == []


def test_collections(cli: Cli, workplace: Path) -> None:
    spec = ["machines", "requests", "templates"]
    assert completed(cli, "get", "") == spec
    assert completed(cli, "claims", "list", "r") == ["requests"]
    Path("shop.py").write_text(MODULE)
    assert completed(cli, "get", "--collections", "shop:ALL", "") == ["jobs", "owners"]
    cli("put", "jobs", '{"job_id": "j"}', "--collections", "shop:ALL", "--store", "json:s.json")
    assert "jobs" in completed(cli, "get", "--store", "json:s.json", "")
    # Nothing listens there: it is not asked.
    assert completed(cli, "get", "--store", "postgresql://x@127.0.0.1:1/db", "") == spec
    assert completed(cli, "get", "--config", "nope.json", "") == spec
    before = sorted(os.listdir())
    assert completed(cli, "get", "--store", "json:no.json", "") == spec
    assert completed(cli, "get", "--store", "sqlite:no.db", "") == spec
    assert sorted(os.listdir()) == before  # looking for collections creates nothing


def _script(cli: Cli, shell: str, folder: Path) -> str:
    program = folder / "hf-async-store"
    program.write_text(f'#!/bin/sh\nexec {" ".join(PROGRAM)} "$@"\n')
    program.chmod(0o755)
    return cli("completion", shell).out


def test_bash(cli: Cli, workplace: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    script = _script(cli, "bash", workplace)
    code = (
        f"{script}\nCOMP_LINE='./hf-async-store export --store json:x.json ma'; "
        "COMP_POINT=${#COMP_LINE}; _hf_async_store; echo ${COMPREPLY[@]}; "
        "COMP_LINE='./hf-async-store export m --format '; "
        "COMP_POINT=${#COMP_LINE}; _hf_async_store; echo ${COMPREPLY[@]}; "
        "COMP_LINE='./hf-async-store backups --'; "
        "COMP_POINT=${#COMP_LINE}; _hf_async_store; echo ${COMPREPLY[@]}; complete -p"
    )
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["machines", "csv jsonl"]
    assert lines[2].startswith("--collections --config --help --json")
    assert "-F _hf_async_store hf-async-store" in done.stdout


@pytest.mark.parametrize(
    ("shell", "flag"), [("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute")]
)
def test_the_scripts_are_valid(cli: Cli, workplace: Path, shell: str, flag: str) -> None:
    script = _script(cli, shell, workplace)
    assert "completion words --" in script
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    Path("script").write_text(script)
    subprocess.run([shell, flag, "script"], timeout=60, check=True)
