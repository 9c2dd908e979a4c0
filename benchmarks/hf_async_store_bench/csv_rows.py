"""Lists that are kept in a CSV file beside the module that uses them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TypeVar

import msgspec

_Row = TypeVar("_Row")


def rows_beside(module: str, kind: type[_Row]) -> tuple[_Row, ...]:
    """The rows of the file as values of this type; an empty cell has its default."""
    with Path(module).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        rows = [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    return tuple(msgspec.convert(rows, list[kind], strict=False))  # type: ignore[valid-type]
