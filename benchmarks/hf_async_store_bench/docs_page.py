"""The results in a page of the documentation, between two marks."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Final

from hf_async_store import ConfigurationError
from hf_async_store_bench import tables
from hf_async_store_bench.results import Results

_BEGIN: Final = "<!-- results: written by `make bench-full` -->"
_END: Final = "<!-- end of results -->"
_WIDTH: Final = 110


class Page:
    """A Markdown file with the marks in it.

    Raises:
        ConfigurationError: no such file, or it lacks the marks; before the minutes of a run, not after.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as exc:
            raise ConfigurationError(f"--page {path}: cannot be read: {exc.strerror}") from exc
        if _BEGIN not in text or _END not in text:
            raise ConfigurationError(f"--page {path}: needs the lines {_BEGIN!r} and {_END!r}")

    def write(self, results: Results) -> None:
        """Replace what stands between the marks."""
        before, _, rest = self._path.read_text(encoding="utf-8").partition(_BEGIN)
        _, _, after = rest.partition(_END)
        found = [tables.engines(results), *map(tables.grown, results.sweeps)]
        found += [tables.baselines(results), tables.others(results), tables.conditions(results)]
        found += [tables.targets(results), tables.skipped(results)]
        parts = [
            tables.verdict(results),
            "",
            *(tables.as_markdown(each) for each in found if each.rows),
        ]
        lines = [line for part in parts for line in _wrapped(part)]
        self._path.write_text(before + "\n".join([_BEGIN, "", *lines, _END]) + after, "utf-8")


def _wrapped(text: str) -> list[str]:
    """Prose of a bounded width, and no path of a machine."""
    lines: list[str] = []
    for line in text.split("\n"):
        if line.startswith("|"):
            lines += [] if line.startswith("| folder |") else [line]
        else:
            lines += textwrap.wrap(line, _WIDTH) or [""]
    return lines
