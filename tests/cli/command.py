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
