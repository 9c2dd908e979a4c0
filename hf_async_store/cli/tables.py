"""Tables on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from hf_async_store.cli.output import line, printable
from hf_async_store.values import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hf_async_store.schema import Collection
    from hf_async_store.values import Entity

_MAX_WIDTH: Final = 48
"""Wider texts are truncated."""

_NUMBERS: Final = (VERSION, "bytes")

_PADDING: Final = 2


def show_entities(collection: Collection, rows: Sequence[Entity], fields: list[str] | None) -> None:
    """Print entities, with as many columns as fit, the key first and the version last."""
    names = _columns(collection, rows) if fields is None else list(dict.fromkeys(fields))
    names = [collection.key, *(each for each in names if each not in (collection.key, VERSION))]
    cells = {name: [_cell(row, name) for row in rows] for name in (*names, VERSION)}
    console = Console()
    shown, hidden = _fitting(names, cells, console.width)
    _print(console, [*shown, VERSION], cells)
    console.print(Text(_summary(len(rows), hidden), style="dim"))


def show_plain(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of texts."""
    columns = zip(*rows, strict=True)
    cells = dict(
        zip(headings, ([printable(each) for each in column] for column in columns), strict=True)
    )
    _print(Console(), headings, cells)


def _columns(collection: Collection, rows: Sequence[Entity]) -> list[str]:
    """The fields that are not null in at least one row: declared ones in their order, then others."""
    used: dict[str, None] = {}
    for row in rows:
        used.update(dict.fromkeys(name for name, value in row.items() if value is not None))
    declared = [name for name in collection.fields if name in used]
    return declared + [name for name in used if name not in collection.fields]


def _fitting(
    names: Sequence[str], cells: dict[str, list[str]], width: int
) -> tuple[list[str], list[str]]:
    """The columns that fit, and the others, which are hidden rather than making all columns
    unreadably narrow."""
    shown: list[str] = []
    hidden: list[str] = []
    remaining = width - _width(VERSION, cells)
    for name in names:
        remaining -= _width(name, cells)
        if remaining >= 0 or not shown:
            shown.append(name)
        else:
            hidden.append(name)
            remaining += _width(name, cells)
    return shown, hidden


def _width(name: str, cells: dict[str, list[str]]) -> int:
    longest = max(cell_len(each) for each in (printable(name), *cells[name]))
    return min(longest, _MAX_WIDTH) + _PADDING


def _cell(row: Entity, name: str) -> str:
    if name not in row:
        return ""
    value: Any = row[name]
    if isinstance(value, str):
        return printable(value)
    return printable(msgspec.json.encode(value).decode())


def _print(console: Console, names: Iterable[str], cells: dict[str, list[str]]) -> None:
    """Print one line per row. The table of rich is not used: it takes seconds for 10,000 rows."""
    columns = [_column(printable(name), cells[name]) for name in names]
    heading, *rows = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    console.print(Text(heading, style="bold"), soft_wrap=True)
    for row in rows:
        line(row)


def _column(name: str, texts: Sequence[str]) -> list[str]:
    """The heading and the texts of a column, padded or truncated to one width; numbers are
    right-aligned."""
    column = [name, *texts]
    width = min(max(map(cell_len, column)), _MAX_WIDTH)
    if name in _NUMBERS:
        return [each.rjust(width) for each in column]
    return [_fit(each, width) for each in column]


def _fit(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    return f"{set_cell_size(text, width - 1)}…"


def _summary(count: int, hidden: Sequence[str]) -> str:
    rows = "1 row" if count == 1 else f"{count:,} rows"
    if not hidden:
        return rows
    names = ", ".join(map(printable, hidden))
    return f"{rows}; not shown for lack of space: {names} (--fields selects, --json shows all)"
