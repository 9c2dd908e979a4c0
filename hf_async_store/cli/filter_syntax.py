"""The command-line syntax of paths, values, filters, assignments and JSON input.

`hf-async-store query --help` describes it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

import msgspec

from hf_async_store.errors import InvalidFieldError, InvalidInputError, InvalidQueryError
from hf_async_store.json_input import decode_json
from hf_async_store.query import Combined, Op, OpName, Order, Path, and_
from hf_async_store.values import REMOVE, VERSION, Removed, Value, parse_timestamp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from hf_async_store.query import Steps
    from hf_async_store.schema import Collection
    from hf_async_store.values import FieldType

OPERATORS: Final[tuple[OpName, ...]] = get_args(OpName)
_LISTS: Final = ("in", "not_in", "between")
_STRING_OPERATORS: Final = tuple(
    each for each in OPERATORS if each.startswith(("contains", "begins_with"))
)
_MAX_SHOWN_LENGTH: Final = 80
_MAX_INDEX_DIGITS: Final = 18
"""Enough for any list. Python refuses to convert strings of thousands of digits to integers."""

# -- filters --------------------------------------------------------------------------------


def filters_of(words: Iterable[str], collection: Collection) -> Combined | None:
    """Parse filters and combine them with `and_`; None if there are none.

    Raises:
        InvalidQueryError: an argument is not a valid filter; the error names it, and says what is
            expected.
    """
    filters = [_filter(each, collection) for each in words]
    return and_(*filters) if filters else None


def _filter(word: str, collection: Collection) -> Mapping[Path, object]:
    parsed = _split(word)
    operator = next((each for each in OPERATORS if each == parsed.operator), None)
    if operator is None:
        raise InvalidQueryError(
            f"{_shown(word)}: unknown operator {parsed.operator!r}; the operators are: "
            f"{', '.join(OPERATORS)} (write a field name with a colon as a JSON list: "
            "'[\"a:b\"]=x')"
        )
    return {Path(parsed.steps): Op(operator, _operand(word, operator, parsed, collection))}


def _operand(word: str, operator: OpName, parsed: _ParsedWord, collection: Collection) -> object:
    value = parsed.value
    if operator == "exists":
        if value not in (None, "true", "false"):
            raise InvalidQueryError(f"{_shown(word)}: exists takes =true or =false")
        return value != "false"
    if value is None:
        raise InvalidQueryError(
            f"{_shown(word)} is not a filter; write field=value, or field:operator=value with one "
            f"of the operators: {', '.join(OPERATORS)}"
        )
    if parsed.is_json:
        return _json_operand(word, operator, value)
    field_type = _type_of(parsed.steps, collection)
    if operator in _STRING_OPERATORS:
        is_string = operator != "contains" or field_type in _STRING_TYPES
        return value if is_string else _json_or_string(value)
    if operator not in _LISTS:
        return _typed(value, field_type, word)
    return _checked_list(
        word, operator, [_typed(each.strip(), field_type, word) for each in value.split(",")]
    )


def _json_operand(word: str, operator: OpName, encoded: str) -> object:
    value = _json(encoded, word)
    if operator not in _LISTS:
        return value
    if not isinstance(value, list):
        raise InvalidQueryError(f"{_shown(word)}: {operator} needs a JSON list after :=")
    return _checked_list(word, operator, value)


def _checked_list(word: str, operator: OpName, values: list[Value]) -> tuple[Value, ...]:
    if operator == "between" and len(values) != 2:
        raise InvalidQueryError(f"{_shown(word)}: between takes two values, for example 1,10")
    # These result from an empty shell variable, and `not_in` with no values would match everything.
    if values in ([""], []):
        raise InvalidQueryError(f"{_shown(word)}: {operator} needs at least one value")
    return tuple(values)


def order_of(words: Iterable[str]) -> list[Order] | None:
    """Parse `--order`: names separated by commas, with a leading `-` for descending order."""
    names = [
        name
        for word in words
        for name in ([word] if word.lstrip("-").startswith("[") else word.split(","))
    ]
    if not all(name.strip("-") for name in names):
        raise InvalidQueryError("--order needs names, for example --order status,-created_at")
    return [Order(steps_of(each.removeprefix("-")), each.startswith("-")) for each in names] or None


# -- assignments ----------------------------------------------------------------------------


def changes_of(
    words: Sequence[str], removed: Iterable[str], collection: Collection
) -> dict[str, Value | Removed]:
    """Parse the changes of an update: assignments or one JSON object, and the fields to remove.

    Raises:
        InvalidInputError: an argument is not valid; the error names it, and says what is expected.
    """
    changes: dict[str, Value | Removed] = {}
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        changes.update(_json_object(words[0]))
    else:
        for word in words:
            name, value = _assignment(word, collection)
            if name in changes:
                raise InvalidInputError(f"{_shown(word)}: {name} is given twice")
            changes[name] = value
    for name in removed:
        if name in changes:
            raise InvalidInputError(f"--remove {name}: the field is also given a value")
        changes[name] = REMOVE
    if not changes:
        raise InvalidInputError(
            "no change is given: give field=value, a JSON object, or --remove FIELD"
        )
    return changes


def _assignment(word: str, collection: Collection) -> tuple[str, Value]:
    parsed = _split(word)
    if parsed.value is None or parsed.operator != "eq":
        raise InvalidInputError(
            f"{_shown(word)} is not an assignment; write field=value, or field:=JSON"
        )
    name = parsed.steps[0]
    if len(parsed.steps) > 1 or not isinstance(name, str):
        raise InvalidInputError(
            f"{_shown(word)}: an update sets whole fields; give the whole value: '{name}:={{...}}' "
            f"(write a field name with a slash as a JSON list: '[\"a/b\"]=x')"
        )
    if name == VERSION:
        raise InvalidInputError(
            "the version cannot be set; to update only if the stored version is unchanged, use "
            "--expected-version"
        )
    if parsed.is_json:
        return name, _json(parsed.value, word)
    return name, _typed(parsed.value, _type_of(parsed.steps, collection), word)


# -- arguments ------------------------------------------------------------------------------


class _ParsedWord(NamedTuple):
    """The parts of an argument `steps:operator=value`; the value is None if there is no `=`."""

    steps: Steps
    operator: str
    value: str | None
    is_json: bool = False


def _split(word: str) -> _ParsedWord:
    steps, rest = _leading_steps(word)
    head, equals, value = rest.partition("=")
    is_json = bool(equals) and head.endswith(":")
    head = head.removesuffix(":") if is_json else head
    if steps is None:
        path, _, operator = head.partition(":")
        steps = steps_of(path, word)
    elif head and not head.startswith(":"):
        raise InvalidInputError(
            f"{_shown(word)}: expected =value or :operator=value after the JSON list"
        )
    else:
        operator = head[1:]
    return _ParsedWord(steps, operator or "eq", value if equals else None, is_json)


def _shown(word: str) -> str:
    return repr(word if len(word) <= _MAX_SHOWN_LENGTH else f"{word[:_MAX_SHOWN_LENGTH]}...")


def _leading_steps(word: str) -> tuple[Steps | None, str]:
    """The steps of the JSON list at the beginning of an argument, or None, and the rest of it."""
    if not word.startswith("["):
        return None, word
    from json import JSONDecoder

    try:
        steps, end = JSONDecoder().raw_decode(word)
    except (ValueError, RecursionError) as exc:
        raise InvalidInputError(
            f"{_shown(word)} begins with [, but not with a valid JSON list of path steps"
        ) from exc
    if not steps or not all(type(each) in (str, int) for each in steps):
        raise InvalidInputError(f"{_shown(word)}: path steps must be strings or integers")
    return tuple(steps), word[end:]


def steps_of(path: str, word: str | None = None) -> Steps:
    """The steps of a path: `tags/owner`, `disks/0/size`, or a JSON list."""
    listed, rest = _leading_steps(path)
    if listed is not None and not rest:
        return listed
    parts = path.split("/")
    if not all(parts):
        raise InvalidInputError(f"{_shown(word or path)}: a field name is missing")
    return (parts[0], *(int(each) if _is_index(each) else each for each in parts[1:]))


def _is_index(step: str) -> bool:
    return step.isascii() and step.isdecimal() and len(step) <= _MAX_INDEX_DIGITS


# -- values ---------------------------------------------------------------------------------

_STRING_TYPES: Final = ("text", "timestamp")
_NUMBER: Final = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"


def _type_of(steps: Steps, collection: Collection) -> FieldType:
    """The declared type of a field; json for paths inside a field, and for undeclared fields."""
    field = collection.field_at(steps)
    if field is not None:
        return field.type
    return "integer" if steps == (VERSION,) else "json"


def _typed(string: str, field_type: FieldType, word: str) -> Value:
    """Convert a string to a value of the type of its field."""
    if field_type == "text":
        return string
    if field_type == "json":
        return _json_or_string(string)
    if string == "null":
        return None
    if field_type == "timestamp":
        if parse_timestamp(string) is None:
            raise _wrong_type(word, "a timestamp, for example 2025-06-30T12:00:00Z")
        return string
    if field_type == "boolean":
        if string.lower() not in ("true", "false"):
            raise _wrong_type(word, "true or false")
        return string.lower() == "true"
    if not re.fullmatch(_NUMBER, string):
        raise _wrong_type(word, "an integer" if field_type == "integer" else "a number")
    return _json(string, word)


def _wrong_type(word: str, expected: str) -> InvalidFieldError:
    return InvalidFieldError(f"{_shown(word)}: the field takes {expected}")


_decode: Final[Callable[[str | bytes], Value]] = msgspec.json.Decoder().decode


def _json_or_string(string: str) -> Value:
    try:
        return _decode(string)
    except (ValueError, RecursionError):  # ValueError is the base class of the errors of msgspec
        return string


def _json(encoded: str, word: str) -> Value:
    try:
        return _decode(encoded)
    except (ValueError, RecursionError) as exc:
        raise InvalidInputError(
            f"{_shown(word)}: the value after = is not valid JSON: {exc}"
        ) from exc


def _json_object(encoded: str) -> dict[str, Any]:
    # An argument that is not UTF-8 contains surrogates, and is then refused as such.
    [(_, entity)] = entities_of(encoded.encode(errors="surrogatepass"), "the JSON argument")
    return entity


# -- JSON input -----------------------------------------------------------------------------


class EntityInput(NamedTuple):
    """An entity, and its position in the input for error messages."""

    position: str
    entity: dict[str, Any]


def entities_of(data: bytes, source: str) -> list[EntityInput]:
    """Parse entities: one JSON object, a JSON list of objects, or one object per line.

    Raises:
        InvalidInputError: the input is not valid; the error says where.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise InvalidInputError(f"{source}: the input is empty")
    lines = data.splitlines()
    filled = [each for each in lines if each.strip()]
    if len(filled) > 1 and _is_whole(filled[0]):
        return _from_lines(lines, source)
    whole = _decoded(data, source)
    if isinstance(whole, list):
        return [_entity_input(each, f"{source}, item {n}") for n, each in enumerate(whole, 1)]
    return [_entity_input(whole, source)]


def _is_whole(line: bytes) -> bool:
    """Whether a line is a complete JSON value, so that the input is JSON lines."""
    try:
        _decode(line)
    except (ValueError, RecursionError):
        return False
    return True


def _from_lines(lines: Sequence[bytes], source: str) -> list[EntityInput]:
    return [
        _entity_input(_decoded(each, source, number), f"{source}, line {number}")
        for number, each in enumerate(lines, 1)
        if each.strip()
    ]


def _entity_input(value: object, position: str) -> EntityInput:
    if not isinstance(value, dict):
        raise InvalidInputError(f"{position}: expected a JSON object, got {type(value).__name__}")
    return EntityInput(position, value)


def _decoded(data: bytes, source: str, line: int = 1) -> object:
    value, problem = decode_json(data, source, line)
    if problem is not None:
        raise InvalidInputError(problem)
    return value
