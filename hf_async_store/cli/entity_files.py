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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO, Final, Literal, NamedTuple, Self

import msgspec

from hf_async_store.cli.filter_syntax import value_of
from hf_async_store.cli.output import PROGRAM
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

_MAX_NAMES: Final = 20
"""Maximum number of columns that an error names."""

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_GZIP: Final = b"\x1f\x8b"
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
    return read(stream, collection, source, _KeyName(key or collection.key, collection.key))


class _KeyName(NamedTuple):
    """The name of the field that holds the id: in the file, and in the collection."""

    given: str
    own: str

    def renamed(self, name: str) -> str:
        """The name in the collection of a field of the file."""
        if name == self.own != self.given:
            raise InvalidInputError(f"--key {self.given}: there is a field {self.own}, too")
        return self.own if name == self.given else name


def _lines(stream: BinaryIO, source: str) -> Iterator[bytes]:
    for number, line in enumerate(iter(lambda: stream.readline(_MAX_LINE_BYTES + 1), b""), 1):
        if number == 1 and line.startswith(_GZIP):
            raise InvalidInputError(
                f"{source} is compressed with gzip: decompress it, for example with `zcat FILE | "
                f"{PROGRAM} import COLLECTION - --format ...`"
            )
        if len(line) > _MAX_LINE_BYTES:
            raise InvalidInputError(f"{source}, line {number}: the line is too long")
        yield line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line


def _json_rows(
    stream: BinaryIO, collection: Collection, source: str, key: _KeyName
) -> Iterator[Row]:
    for number, line in enumerate(_lines(stream, source), 1):
        if line.strip():
            yield Row(number, number, _json_entity(line.rstrip(), source, number, key))


def _json_entity(
    line: bytes, source: str, number: int, key: _KeyName
) -> Entity | InvalidInputError:
    value, problem = decode_json(line, source, number)
    if problem is not None:
        return InvalidInputError(problem)
    where = _position(source, number)
    if not isinstance(value, dict):
        return InvalidInputError(f"{where}: expected a JSON object, got {type(value).__name__}")
    if key.given != key.own and key.given not in value:
        return InvalidInputError(f"{where}: there is no field {key.given!r}, which --key names")
    try:
        return {key.renamed(name): each for name, each in value.items()}
    except InvalidInputError as exc:
        return exc.at(where)


def _csv_rows(
    stream: BinaryIO, collection: Collection, source: str, key: _KeyName
) -> Iterator[Row]:
    csv.field_size_limit(_MAX_LINE_BYTES)
    texts = _Texts(_lines(stream, source))
    reader = csv.reader(texts, strict=True)
    header: _Header | None = None
    while True:
        line = reader.line_num + 1
        texts.begin_row()
        try:
            cells = next(reader, None)
        except csv.Error as exc:
            # Where the next row begins is not known: the rest of the line may contain an open quote.
            where = _position(source, line)
            raise InvalidInputError(f"{where}: {exc}{texts.open_quote(line)}") from exc
        if cells is None:
            break
        if not cells:
            continue
        where = _position(source, line)
        invalid = None if texts.are_valid else InvalidInputError(f"{where}: not UTF-8")
        if header is not None:
            yield Row(line, reader.line_num, invalid or header.entity(cells, where))
        elif invalid is not None:
            raise invalid
        else:
            header = _header_of(cells, collection, where, key)
    if header is None:
        raise InvalidInputError(f"{source}: the first line must contain the names of the columns")


class _Texts:
    """The lines of a CSV file as text.

    Bytes that are not UTF-8 are replaced, and refuse their row: quotes, commas and line breaks, which end a
    row, are the same bytes in every encoding that extends ASCII.

    Attributes:
        are_valid: whether all lines of the row that is read are UTF-8.
    """

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._row: list[str] = []
        self.are_valid = True

    def begin_row(self) -> None:
        self._row.clear()
        self.are_valid = True

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self._row.append("")
            raise StopIteration
        try:
            text = line.decode()
        except UnicodeDecodeError:
            text = line.decode(errors="replace")
            self.are_valid = False
        self._row.append(text)
        return text

    def open_quote(self, line: int) -> str:
        """Where a quote was opened that was still open at the end of the last line but one.

        Args:
            line: where the row begins.
        """
        opened: int | None = None
        for number, text in enumerate(self._row[:-1], line):
            if text.count('"') % 2:
                opened = number if opened is None else None
        return "" if opened is None else f"; the quote opened in line {opened} is not closed there"


def _position(source: str, line: int) -> str:
    return f"{source}, line {line}"


def _header_of(cells: Sequence[str], collection: Collection, where: str, key: _KeyName) -> _Header:
    try:
        names = [key.renamed(each) for each in cells]
    except InvalidInputError as exc:
        raise exc.at(where) from exc
    twice = sorted({each for each in names if names.count(each) > 1})
    if twice:
        raise InvalidInputError(f"{where}: the column {twice[0]!r} is there twice")
    if collection.key not in names:
        found = ", ".join(map(repr, cells[:_MAX_NAMES])) + (", ..." if cells[_MAX_NAMES:] else "")
        raise InvalidInputError(
            f"{where}: there is no column {key.given!r}, only {found}; the first line must contain the "
            "names of the columns, separated by commas, and --key names the one that holds the id"
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
                if twice := sorted((value.keys() & self.types.keys()) - {_OTHER_FIELDS}):
                    return InvalidInputError(
                        f"{where}: the column * contains {twice[0]!r}, which has a column of its own"
                    )
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
