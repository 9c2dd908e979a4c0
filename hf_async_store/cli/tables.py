"""Tables for a person at a terminal."""

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

_WIDEST: Final = 48
"""A text that is wider is cut."""

_NUMBERS: Final = (VERSION, "bytes")

_PADDING: Final = 2


def show_entities(collection: Collection, rows: Sequence[Entity], fields: list[str] | None) -> None:
    """The rows, with as many columns as the terminal holds, the key first and the version last."""
    names = _columns(collection, rows) if fields is None else list(dict.fromkeys(fields))
    names = [collection.key, *(each for each in names if each not in (collection.key, VERSION))]
    cells = {name: [_cell(row, name) for row in rows] for name in (*names, VERSION)}
    console = Console()
    shown, hidden = _fitting(names, cells, console.width)
    _print(console, [*shown, VERSION], cells)
    console.print(Text(_summary(len(rows), hidden), style="dim"))


def show_plain(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows of text."""
    columns = zip(*rows, strict=True)
    cells = dict(
        zip(headings, ([printable(each) for each in column] for column in columns), strict=True)
    )
    _print(Console(), headings, cells)


def _columns(collection: Collection, rows: Sequence[Entity]) -> list[str]:
    """Every field that some row has: the declared ones in their order, then the others."""
    found: dict[str, None] = {}
    for row in rows:
        found.update(dict.fromkeys(name for name, value in row.items() if value is not None))
    declared = [name for name in collection.fields if name in found]
    return declared + [name for name in found if name not in collection.fields]


def _fitting(
    names: Sequence[str], cells: dict[str, list[str]], width: int
) -> tuple[list[str], list[str]]:
    """The columns that there is room for, and the others: squeezed, none could be read."""
    shown: list[str] = []
    hidden: list[str] = []
    left = width - _width(VERSION, cells)
    for name in names:
        left -= _width(name, cells)
        if left >= 0 or not shown:
            shown.append(name)
        else:
            hidden.append(name)
            left += _width(name, cells)
    return shown, hidden


def _width(name: str, cells: dict[str, list[str]]) -> int:
    longest = max(cell_len(each) for each in (printable(name), *cells[name]))
    return min(longest, _WIDEST) + _PADDING


def _cell(row: Entity, name: str) -> str:
    if name not in row:
        return ""
    value: Any = row[name]
    if isinstance(value, str):
        return printable(value)
    return printable(msgspec.json.encode(value).decode())


def _print(console: Console, names: Iterable[str], cells: dict[str, list[str]]) -> None:
    """One line a row. Not by rich's own table, which takes seconds for 10,000 of them."""
    columns = [_column(printable(name), cells[name]) for name in names]
    heading, *rows = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    console.print(Text(heading, style="bold"), soft_wrap=True)
    for row in rows:
        line(row)


def _column(name: str, texts: Sequence[str]) -> list[str]:
    """The name and the texts of a column, all of one width: numbers to the right, long ones cut."""
    given = [name, *texts]
    width = min(max(map(cell_len, given)), _WIDEST)
    if name in _NUMBERS:
        return [each.rjust(width) for each in given]
    return [_cut(each, width) for each in given]


def _cut(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    return f"{set_cell_size(text, width - 1)}…"


def _summary(count: int, hidden: Sequence[str]) -> str:
    rows = "1 row" if count == 1 else f"{count:,} rows"
    if not hidden:
        return rows
    names = ", ".join(map(printable, hidden))
    return f"{rows}; no room for {names} (--fields chooses, --json shows all)"
