"""Runs `mypy --strict` over the Python examples of pages, a file for each page, with the same lines; and
over the examples that are applications.

python tests/type_checks/pages.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = (
    ROOT / "README.md",
    *(each for each in sorted((ROOT / "docs").rglob("*.md")) if "```python" in each.read_text()),
)

APPLICATIONS: Final = (ROOT / "docs/examples/machines",)


def module_of(page: str) -> str:
    """The examples as one function, since they await: line for line as in the page.

    The first line of a page is its heading, so the function begins there.
    """
    lines = ["async def page() -> None:"]
    in_block = False
    for line in page.splitlines()[1:]:
        if line.startswith("```"):
            in_block = line == "```python"
            lines.append(" ...")
        else:
            lines.append(f" {line}" if in_block and line else "")
    return "\n".join(lines) + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for page in PAGES:
            name = str(page.relative_to(ROOT))
            path = Path(folder, re.sub(r"\W", "_", name.removesuffix(".md")) + ".py")
            path.write_text(module_of(page.read_text("utf-8")), "utf-8")
            files[str(path)] = name
        options = ["--strict", "--no-error-summary", "--no-pretty", "--config-file="]
        done = subprocess.run(
            [sys.executable, "-m", "mypy", *options, *files, *map(str, APPLICATIONS)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    output = done.stdout + done.stderr
    for file, name in files.items():
        output = output.replace(file, name)
    print(output or f"examples of {len(PAGES)} pages and applications: no errors of types")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
