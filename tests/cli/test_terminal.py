"""Output on a terminal: tables, sentences, progress bars; and stored text cannot contain control
sequences for the terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from typing import TYPE_CHECKING

import pytest
from command import PROGRAM

from hf_async_store.cli import output

if TYPE_CHECKING:
    from command import Cli

COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(*words: str, columns: int = 100, stdin: bytes | None = None) -> tuple[int, str]:
    """Run a command on a terminal of this width; returns its exit code and output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with subprocess.Popen(
        [*PROGRAM, *words],
        stdin=theirs if stdin is None else subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
        env={**{k: v for k, v in os.environ.items() if k != "COLUMNS"}, "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        if process.stdin is not None:
            process.stdin.write(stdin or b"")
            process.stdin.close()
        seen = b"".join(iter(lambda: _read(ours), b""))
    os.close(ours)
    return process.returncode, seen.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # how Linux reports that the other side is closed
        return b""


def plain(seen: str) -> list[str]:
    return [line.rstrip() for line in COLOURS.sub("", seen).splitlines()]


@pytest.mark.usefixtures("filled")
def test_a_table() -> None:
    words = ("query", "machines", "--order", "-machine_id", "--fields", "status,name,public_ip")
    code, seen = on_a_terminal(*words)
    assert code == 0
    assert plain(seen) == [
        "machine_id  status   name  public_ip  version",
        "m-3         RUNNING                         1",
        "m-2         STOPPED  null                   1",
        "m-1         RUNNING  one                    1",
        "3 rows",
    ]


@pytest.mark.usefixtures("filled")
def test_a_narrow_terminal() -> None:
    _, seen = on_a_terminal("query", "requests", columns=60)
    heading, first, _, *last = plain(seen)
    assert heading.split() == ["request_id", "machine_count", "status", "zone", "version"]
    assert first.split() == ["r-1", "3", "PENDING", "1"]
    assert " ".join(last).startswith("2 rows; not shown for lack of space: completed_at, tags, ")


def test_long_strings_are_truncated_and_wide_ones_aligned(cli: Cli) -> None:
    cli("put", "machines", '[{"machine_id": "日本", "name": "x"}, {"machine_id": "m-1"}]')
    cli("update", "machines", "m-1", f"name={'y' * 60}")
    _, seen = on_a_terminal("query", "machines", "--order", "-machine_id", "--fields", "name")
    assert plain(seen)[1:3] == [
        f"日本        x{' ' * 47}        1",
        f"m-1         {'y' * 47}…        2",
    ]


def test_stored_strings_cannot_contain_control_sequences(cli: Cli) -> None:
    cli(
        "put", "machines", '{"machine_id": "m\\u001b[31m", "name": "a\\n\\u0007b", "[b]": "[red]x"}'
    )
    _, seen = on_a_terminal("query", "machines", "--fields", "name", "--fields", '["[b]"]')
    assert plain(seen)[:2] == [
        "machine_id  name      [b]     version",
        "m\\x1b[31m   a\\n\\x07b  [red]x        1",
    ]
    assert "\x1b[31m" not in seen
    _, seen = on_a_terminal("get", "machines", "no\x1b[31mne")
    assert "\x1b" not in seen


@pytest.mark.usefixtures("filled")
def test_json_lines_also_on_a_terminal() -> None:
    code, seen = on_a_terminal("query", "machines", "status=STOPPED", "--json")
    assert code == 0
    assert seen.startswith('{"version":1,"machine_id":"m-2"')


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["get", "machines", "m-3"], 0, '{\n  "version": 1,\n  "machine_id": "m-3",'),
        (["query", "machines", "status=GONE"], 0, ""),
        (["put", "machines", '{"machine_id": "m-1"}'], 0, "machines m-1 stored, version 2\n"),
        (["update", "machines", "m-1", "name=x"], 0, "machines m-1 updated, version 2\n"),
        (["delete", "machines", "m-1"], 0, "machines m-1 deleted\n"),
        (["count", "machines"], 0, "3\n"),
        (["init"], 0, "data/db.json: exists already, nothing to do\n"),
        (["checkpoint"], 0, "data/db.json: all commits are in the data files\n"),
        (["backup", "--copy", "b.json"], 0, "data/db.json copied to b.json ("),
        (
            ["restore", "data/db.json"],
            0,
            "data/db.json was restored from data/db.json: 1 templates,",
        ),
        (["describe"], 0, '{\n  "engine": "json",'),
    ],
)
def test_sentences(
    filled: Cli, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, told: str
) -> None:
    monkeypatch.setattr(output, "for_people", lambda arguments: True)
    ran = filled(*words)
    assert ran.code == code
    assert ran.out.startswith(told)
    assert ran.err == ("hf-async-store: no machines match\n" if not told else "")


def test_a_progress_bar(cli: Cli) -> None:
    cli("init")
    lines = b"".join(b'{"machine_id": "m-%05d"}\n' % each for each in range(3000))
    code, seen = on_a_terminal("put", "machines", "-", stdin=lines)
    assert code == 0
    assert "put machines" in seen
    assert "3000/3000" in seen
    assert plain(seen)[-1].endswith("3,000 machines stored")


def test_a_table_of_backups(filled: Cli) -> None:
    filled("update", "machines", "m-1", "name=x")
    filled("update", "machines", "m-1", "name=y")
    _, seen = on_a_terminal("backups")
    heading, first, *_ = plain(seen)
    assert heading.split() == ["backup", "written", "bytes"]
    assert re.match(r"/\S+  20\d\d-\d\d-\d\dT.*Z +\d+$", first)
