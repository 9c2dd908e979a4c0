"""Runs mypy, pyright and basedpyright over a file of right uses and one of mistakes.

python -m tests.type_checks
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
Lines = set[tuple[str, int]]


def by_mypy(files: list[str]) -> Lines:
    options = [
        "--strict",
        "--no-error-summary",
        "--hide-error-context",
        "--config-file=",
        "--no-pretty",
    ]
    output = _output([sys.executable, "-m", "mypy", *options, *files])
    found = re.findall(r"^(.*?):(\d+): error: ", output, re.MULTILINE)
    return {(Path(file).name, int(line)) for file, line in found}


def by_pyright(name: str) -> Callable[[list[str]], Lines]:
    def check(files: list[str]) -> Lines:
        project = HERE / "pyrightconfig.json"
        options = ["--outputjson", "--pythonpath", sys.executable, "-p", str(project)]
        output = _output([sys.executable, "-m", name, *options])
        found = json.loads(output)["generalDiagnostics"]
        return {
            (Path(each["file"]).name, each["range"]["start"]["line"] + 1)
            for each in found
            if each["severity"] == "error"
        }

    return check


CHECKERS: Final = {
    "mypy": by_mypy,
    "pyright": by_pyright("pyright"),
    "basedpyright": by_pyright("basedpyright"),
}


def _output(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=HERE.parents[1]
    ).stdout


def expected(files: list[str]) -> Lines:
    return {
        (Path(file).name, number)
        for file in files
        for number, line in enumerate(Path(file).read_text().splitlines(), 1)
        if line.endswith("# error")
    }


def main() -> int:
    files = [str(HERE / "right.py"), str(HERE / "wrong.py")]
    wanted = expected(files)
    differ = False
    for name, check in CHECKERS.items():
        found = check(files)
        for what, lines in (("reports", found - wanted), ("does not report", wanted - found)):
            for file, line in sorted(lines):
                differ = True
                print(f"{name} {what} {file}:{line}")
    print(
        "type checkers: "
        + ("differences" if differ else f"{len(wanted)} mistakes reported by each")
    )
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
