"""Files of entities that `export` writes and `import` reads, row by row: CSV and JSON lines.

A CSV file has a column for the key, for each declared field and for the version, and the column `*`: a
JSON object of the fields that are not declared. A cell is JSON, with three exceptions:

* An empty cell: the entity does not have the field.
* Text and timestamps are written as they are, unless they are empty, `null` or begin with `"`.
* When read, a cell of type json, or of a field that is not declared, is text if it is not JSON and does
  not begin as JSON does.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO, Final, Literal, NamedTuple

import msgspec

from hf_async_store.cli.filter_syntax import value_of
from hf_async_store.errors import InvalidInputError
from hf_async_store.json_input import decode_json
from hf_async_store.values import VERSION

if TYPE_CHECKING:
    from hf_async_store.schema import Collection
    from hf_async_store.values import Entity, FieldType, Value

Format = Literal["csv", "jsonl"]

_OTHER_FIELDS: Final = "*"
"""The column of the fields that are not declared: no declared field has such a name."""

_MAX_LINE_BYTES: Final = 1 << 23
"""More than any entity needs in either format."""

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_UNSET: Final = object()
_encode: Final = msgspec.json.encode


class Row(NamedTuple):
    """An entity of a file, or what is wrong with it.

    Attributes:
        line: the number of its first line.
        end: the number of its last line.
    """

    line: int
    end: int
    entity: Entity | InvalidInputError


# -- writing --------------------------------------------------------------------------------


def line_of(entity: Entity) -> bytes:
    """An entity as a line of JSON."""
    return _encode(entity) + b"\n"


class CSVLines:
    """Entities as lines of CSV, as RFC 4180 describes it.

    Args:
        fields: the names of the columns besides the key and the version; None: all declared fields, and
            the column of the others.
    """

    def __init__(self, collection: Collection, fields: Sequence[str] | None) -> None:
        names = [*collection.fields] if fields is None else fields
        inner = [each for each in dict.fromkeys(names) if each not in (collection.key, VERSION)]
        self._names = [collection.key, *inner, VERSION]
        self._types = {name: _type_of(name, collection) for name in self._names}
        self._has_others = fields is None
        self._written: list[str] = []
        self._writer = csv.writer(self)

    def write(self, text: str) -> None:
        """Called by the writer."""
        self._written.append(text)

    def header(self) -> bytes:
        """The names of the columns."""
        return self._line([*self._names, *([_OTHER_FIELDS] if self._has_others else [])])

    def line_of(self, entity: Entity) -> bytes:
        """An entity as a line."""
        types = self._types
        cells = [
            "" if (value := entity.get(name, _UNSET)) is _UNSET else _cell(value, types[name])
            for name in self._names
        ]
        if self._has_others:
            others = {name: value for name, value in entity.items() if name not in types}
            cells.append(_encode(others).decode() if others else "")
        return self._line(cells)

    def _line(self, cells: Sequence[str]) -> bytes:
        self._writer.writerow(cells)
        return self._written.pop().encode()


def _cell(value: object, field_type: FieldType) -> str:
    is_plain = (
        field_type in _PLAIN_TYPES
        and isinstance(value, str)
        and value not in ("", "null")
        and not value.startswith('"')
    )
    return str(value) if is_plain else _encode(value).decode()


_PLAIN_TYPES: Final = ("text", "timestamp")


def _type_of(name: str, collection: Collection) -> FieldType:
    if name == VERSION:
        return "integer"
    if name == collection.key:
        return "text"
    field = collection.fields.get(name)
    return "json" if field is None else field.type


# -- reading --------------------------------------------------------------------------------


def rows_of(
    stream: BinaryIO, form: Format, collection: Collection, source: str, key: str | None
) -> Iterator[Row]:
    """The rows of a file.

    Args:
        source: the name of the file, for errors.
        key: the name of the field that holds the id, if it is not that of the collection.

    Raises:
        InvalidInputError: the file has no header, or cannot be read on.
    """
    read: Callable[..., Iterator[Row]] = _csv_rows if form == "csv" else _json_rows
    return read(stream, collection, source, _renaming(key or collection.key, collection.key))


def _renaming(key: str, own: str) -> Callable[[str], str]:
    def rename(name: str) -> str:
        if name == own != key:
            raise InvalidInputError(f"--key {key}: there is a field {own}, too")
        return own if name == key else name

    return rename


def _lines(stream: BinaryIO, source: str) -> Iterator[bytes]:
    for number, line in enumerate(iter(lambda: stream.readline(_MAX_LINE_BYTES + 1), b""), 1):
        if len(line) > _MAX_LINE_BYTES:
            raise InvalidInputError(f"{source}, line {number}: the line is too long")
        yield line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line


def _json_rows(
    stream: BinaryIO, collection: Collection, source: str, rename: Callable[[str], str]
) -> Iterator[Row]:
    for number, line in enumerate(_lines(stream, source), 1):
        if line.strip():
            yield Row(number, number, _json_entity(line.rstrip(), source, number, rename))


def _json_entity(
    line: bytes, source: str, number: int, rename: Callable[[str], str]
) -> Entity | InvalidInputError:
    value, problem = decode_json(line, source, number)
    if problem is not None:
        return InvalidInputError(problem)
    where = _position(source, number)
    if not isinstance(value, dict):
        return InvalidInputError(f"{where}: expected a JSON object, got {type(value).__name__}")
    try:
        return {rename(name): each for name, each in value.items()}
    except InvalidInputError as exc:
        return exc.at(where)


def _csv_rows(
    stream: BinaryIO, collection: Collection, source: str, rename: Callable[[str], str]
) -> Iterator[Row]:
    csv.field_size_limit(_MAX_LINE_BYTES)
    reader = csv.reader(_texts(_lines(stream, source), source), strict=True)
    header: _Header | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as exc:
            raise InvalidInputError(f"{_position(source, line)}: {exc}") from exc
        if cells is None:
            break
        if not cells:
            continue
        if header is None:
            header = _header_of(cells, collection, _position(source, line), rename)
            continue
        yield Row(line, reader.line_num, header.entity(cells, _position(source, line)))
    if header is None:
        raise InvalidInputError(f"{source}: the first line must contain the names of the columns")


def _texts(lines: Iterable[bytes], source: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as exc:
            raise InvalidInputError(f"{_position(source, number)}: not UTF-8") from exc


def _position(source: str, line: int) -> str:
    return f"{source}, line {line}"


def _header_of(
    cells: Sequence[str], collection: Collection, where: str, rename: Callable[[str], str]
) -> _Header:
    try:
        names = [rename(each) for each in cells]
    except InvalidInputError as exc:
        raise exc.at(where) from exc
    twice = sorted({each for each in names if names.count(each) > 1})
    if twice:
        raise InvalidInputError(f"{where}: the column {twice[0]!r} is there twice")
    if collection.key not in names:
        raise InvalidInputError(
            f"{where}: there is no column {collection.key!r}; the first line must contain the names of "
            "the columns, and --key names the one that holds the id"
        )
    return _Header({name: _type_of(name, collection) for name in names})


class _Header(NamedTuple):
    """The columns of a CSV file: the types of their fields by name, in their order."""

    types: Mapping[str, FieldType]

    def entity(self, cells: Sequence[str], where: str) -> Entity | InvalidInputError:
        if len(cells) != len(self.types):
            return InvalidInputError(
                f"{where}: {len(cells)} cells, but the first line names {len(self.types)} columns"
            )
        entity: Entity = {}
        for (name, field_type), cell in zip(self.types.items(), cells, strict=True):
            if not cell:
                continue
            try:
                value = _value(cell, field_type, name)
            except InvalidInputError as exc:
                return exc.at(where)
            if name == _OTHER_FIELDS:
                if not isinstance(value, dict):
                    return InvalidInputError(f"{where}: the column * takes a JSON object")
                entity.update(value)
            else:
                entity[name] = value
        return entity


def _value(cell: str, field_type: FieldType, name: str) -> Value:
    if cell.startswith('"') or (field_type == "json" and cell.startswith(("{", "["))):
        return _decoded(cell, name)
    if field_type in _PLAIN_TYPES:
        return None if cell == "null" else cell
    return value_of(cell, field_type, f"{name}={cell}")


def _decoded(cell: str, name: str) -> Value:
    try:
        value: Value = msgspec.json.decode(cell)
    except (ValueError, RecursionError) as exc:
        raise InvalidInputError(f"{name}: the cell is not valid JSON") from exc
    return value
