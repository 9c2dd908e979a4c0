"""Runs a command in a separate process, and collects its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STORE = "json:data/db.json"
PROGRAM = [sys.executable, "-m", "hf_async_store"]


def absolute(path: str) -> str:
    """The absolute path, as messages contain it: the reader may have another working directory."""
    return str(Path(path).absolute())


class Ran(NamedTuple):
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[Any]:
        return [json.loads(each) for each in self.out.splitlines()]

    @property
    def message(self) -> str:
        """The single line that it printed on stderr."""
        [line] = self.err.splitlines()
        assert line.startswith("hf-async-store: ")
        return line.removeprefix("hf-async-store: ")


Cli = Callable[..., Ran]


def shell(
    *words: str,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    program: Sequence[str] = PROGRAM,
) -> Ran:
    """Run a command in a separate process."""
    done = subprocess.run(
        [*program, *words],
        input=stdin,
        capture_output=True,
        env={**os.environ, **(environment or {})},
        timeout=60,
        check=False,
    )
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())


# -- imports that fail ------------------------------------------------------------------------


def line(number: int) -> bytes:
    return b'{"machine_id": "m-%06d"}\n' % number


MACHINES = b"".join(map(line, range(3500)))


def check_failure(cli: Cli, ran: Ran, words: Sequence[str], code: int = 4) -> None:
    """Assert that an import of MACHINES failed in the middle, and that going on as it says loses no row."""
    assert ran.code == code
    [counts] = ran.rows
    last = counts["last_line"]
    assert counts == {"imported": last, "skipped": 0, "refused": 0, "last_line": last}
    assert last < 3500
    [error] = [each for each in ran.err.splitlines() if "stdin, line " in each]
    assert f"stdin, line {last + 1}: " in error
    hint = ran.err.partition("go on with ")[2].split("\n")[0].split()
    assert hint[:2] == ["--from-line", str(last + 1)]
    assert hint[2:] == (["--skip-existing"] if "it is unknown" in error else [])
    assert cli(*words, *hint, stdin=MACHINES).code == 0
    assert cli("count", "machines", "--store", words[-1]).out == "3500\n"
