"""What is written on the command line about entities: places, values, filters, assignments, JSON.

    status=RUNNING            the field has this value
    machine_count:gt=3        field, operator, value
    tags/owner=ops            a place inside the entity; a step of digits is an index of a list
    ["a/b","0"]=x             any place: the steps as a JSON list, where names hold / : = or digits
    status:in=PENDING,FAILED  a list is written with commas
    name:=null                `:=` takes any JSON value: null, "5" as text, commas in `in`

A value is read as the declared type of its field. In a field of type json, or in one that is not
declared, it is JSON if it reads as such, else text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast, get_args

import msgspec

from hf_async_store.errors import InvalidFieldError, InvalidInputError, InvalidQueryError
from hf_async_store.query import (
    Combined,
    Op,
    OpName,
    Order,
    Path,
    and_,
)
from hf_async_store.values import REMOVE, VERSION, Removed, Value, parse_timestamp

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hf_async_store.schema import Collection
    from hf_async_store.values import FieldType

Steps: TypeAlias = "tuple[str | int, ...]"

OPERATORS: Final[tuple[str, ...]] = get_args(OpName)
_LISTS: Final = ("in", "not_in", "between")
_TEXTS: Final = ("contains", "begins_with")
_LONG: Final = 80
_LONGEST_INDEX: Final = 18
"""Digits. No list is that long, and Python refuses to read thousands of them."""

# -- filters --------------------------------------------------------------------------------


def filters_of(words: Iterable[str], collection: Collection) -> Combined | None:
    """The filter that all of the words make together; None without any.

    Raises:
        InvalidQueryError: naming the word, and how it would be right.
    """
    parts = [_filter(each, collection) for each in words]
    return and_(*parts) if parts else None


def _filter(word: str, collection: Collection) -> Mapping[Path, object]:
    written = _split(word)
    if written.operator not in OPERATORS:
        raise InvalidQueryError(
            f"{_shown(word)}: no operator {written.operator!r}; there are: {', '.join(OPERATORS)} "
            "(a name with a colon is written as a JSON list: '[\"a:b\"]=x')"
        )
    operator = cast("OpName", written.operator)
    return {Path(written.steps): Op(operator, _operand(word, operator, written, collection))}


def _operand(word: str, operator: OpName, written: _Written, collection: Collection) -> object:
    value = written.value
    if operator == "exists":
        if value not in (None, "true", "false"):
            raise InvalidQueryError(f"{_shown(word)}: exists is written =true or =false")
        return value != "false"
    if value is None:
        raise InvalidQueryError(
            f"{_shown(word)} is no filter; write field=value, or field:gt=value with one of: "
            + ", ".join(OPERATORS)
        )
    if written.is_json:
        return _json_operand(word, operator, value)
    kind = _type_of(written.steps, collection)
    if operator in _TEXTS:
        return value if operator == "begins_with" or kind in _TEXT_TYPES else _loose(value)
    if operator not in _LISTS:
        return _typed(value, kind, word)
    return _checked_list(
        word, operator, [_typed(each.strip(), kind, word) for each in value.split(",")]
    )


def _json_operand(word: str, operator: OpName, text: str) -> object:
    value = _json(text, word)
    if operator not in _LISTS:
        return value
    if not isinstance(value, list):
        raise InvalidQueryError(f"{_shown(word)}: {operator} needs a JSON list behind :=")
    return _checked_list(word, operator, value)


def _checked_list(word: str, operator: OpName, values: list[Value]) -> tuple[Value, ...]:
    if operator == "between" and len(values) != 2:
        raise InvalidQueryError(f"{_shown(word)}: between takes two values, as in 1,10")
    # An empty variable of a shell makes one of these, and `not_in` of nothing is everything.
    if values in ([""], []):
        raise InvalidQueryError(f"{_shown(word)}: {operator} needs at least one value")
    return tuple(values)


def order_of(words: Iterable[str]) -> list[Order] | None:
    """The order of `--order`: names with commas between, `-` in front for descending."""
    names = [
        name
        for word in words
        for name in ([word] if word.lstrip("-").startswith("[") else word.split(","))
    ]
    if not all(name.strip("-") for name in names):
        raise InvalidQueryError("--order needs names, as in --order status,-created_at")
    return [Order(steps_of(each.removeprefix("-")), each.startswith("-")) for each in names] or None


# -- assignments ----------------------------------------------------------------------------


def changes_of(
    words: Sequence[str], removed: Iterable[str], collection: Collection
) -> dict[str, Value | Removed]:
    """The fields of an update: assignments, or one JSON object; and what is to be removed.

    Raises:
        InvalidInputError: naming the word, and how it would be right.
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
            raise InvalidInputError(f"--remove {name}: it is given a value, too")
        changes[name] = REMOVE
    if not changes:
        raise InvalidInputError(
            "nothing to change: give field=value, a JSON object, or --remove FIELD"
        )
    return changes


def _assignment(word: str, collection: Collection) -> tuple[str, Value]:
    written = _split(word)
    if written.value is None or written.operator != "eq":
        raise InvalidInputError(
            f"{_shown(word)} is no assignment; write field=value, or field:=JSON"
        )
    name = written.steps[0]
    if len(written.steps) > 1 or not isinstance(name, str):
        raise InvalidInputError(
            f"{_shown(word)}: an update sets whole fields; give all of it: '{name}:={{...}}' "
            f"(a field whose name holds a slash: '[\"a/b\"]=x')"
        )
    if name == VERSION:
        raise InvalidInputError(
            "the version belongs to the store; to update only what nobody changed, "
            "use --expected-version"
        )
    if written.is_json:
        return name, _json(written.value, word)
    return name, _typed(written.value, _type_of(written.steps, collection), word)


# -- words ----------------------------------------------------------------------------------


class _Written(NamedTuple):
    """`steps:operator=value` in its parts; the value None without a `=`."""

    steps: Steps
    operator: str
    value: str | None
    is_json: bool = False


def _split(word: str) -> _Written:
    steps, rest = _leading_steps(word)
    left, equals, value = rest.partition("=")
    is_json = bool(equals) and left.endswith(":")
    left = left.removesuffix(":") if is_json else left
    if steps is None:
        place, _, operator = left.partition(":")
        steps = steps_of(place, word)
    elif left and not left.startswith(":"):
        raise InvalidInputError(
            f"{_shown(word)}: behind the JSON list belongs =value or :operator=value"
        )
    else:
        operator = left[1:]
    return _Written(steps, operator or "eq", value if equals else None, is_json)


def _shown(word: str) -> str:
    return repr(word if len(word) <= _LONG else f"{word[:_LONG]}...")


def _leading_steps(word: str) -> tuple[Steps | None, str]:
    """The JSON list that a word begins with, and the rest; None if it does not."""
    if not word.startswith("["):
        return None, word
    from json import JSONDecoder

    try:
        steps, end = JSONDecoder().raw_decode(word)
    except (ValueError, RecursionError) as exc:
        raise InvalidInputError(
            f"{_shown(word)} begins with [ but with no JSON list of steps"
        ) from exc
    if not steps or not all(type(each) in (str, int) for each in steps):
        raise InvalidInputError(f"{_shown(word)}: the steps of a place are texts and integers")
    return tuple(steps), word[end:]


def steps_of(place: str, word: str | None = None) -> Steps:
    """The steps of a place: `tags/owner`, `disks/0/size`, or a JSON list."""
    listed, rest = _leading_steps(place)
    if listed is not None and not rest:
        return listed
    parts = place.split("/")
    if not all(parts):
        raise InvalidInputError(f"{_shown(word or place)}: the name of a field is missing")
    return (parts[0], *(int(each) if _is_index(each) else each for each in parts[1:]))


def _is_index(step: str) -> bool:
    return step.isascii() and step.isdecimal() and len(step) <= _LONGEST_INDEX


# -- values ---------------------------------------------------------------------------------

_TEXT_TYPES: Final = ("text", "timestamp")
_NUMBER: Final = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"


def _type_of(steps: Steps, collection: Collection) -> FieldType:
    """The declared type of the place, json for all others."""
    field = collection.fields.get(cast("str", steps[0])) if len(steps) == 1 else None
    if field is not None:
        return field.type
    return "integer" if steps == (VERSION,) else "json"


def _typed(text: str, kind: FieldType, word: str) -> Value:
    """The value that a text stands for in a field of this type."""
    if kind == "text":
        return text
    if kind == "json":
        return _loose(text)
    if text == "null":
        return None
    if kind == "timestamp":
        if parse_timestamp(text) is None:
            raise _mistyped(word, "a timestamp, as in 2025-06-30T12:00:00Z")
        return text
    if kind == "boolean":
        if text.lower() not in ("true", "false"):
            raise _mistyped(word, "true or false")
        return text.lower() == "true"
    if not re.fullmatch(_NUMBER, text):
        raise _mistyped(word, "an integer" if kind == "integer" else "a number")
    return _json(text, word)


def _mistyped(word: str, expected: str) -> InvalidFieldError:
    return InvalidFieldError(f"{_shown(word)}: the field takes {expected}")


def _loose(text: str) -> Value:
    try:
        return cast("Value", msgspec.json.decode(text))
    except (ValueError, RecursionError):  # what msgspec raises are ValueErrors
        return text


def _json(text: str, word: str) -> Value:
    try:
        return cast("Value", msgspec.json.decode(text))
    except (ValueError, RecursionError) as exc:
        raise InvalidInputError(
            f"{_shown(word)}: what stands behind the = is no JSON: {exc}"
        ) from exc


def _json_object(text: str) -> dict[str, Any]:
    [(_, entity)] = entities_of(text.encode(errors="surrogateescape"), "the JSON given")
    return entity


# -- JSON input -----------------------------------------------------------------------------


class Given(NamedTuple):
    """An entity, and where it stood."""

    place: str
    entity: dict[str, Any]


def entities_of(data: bytes, source: str) -> list[Given]:
    """The entities in a text: one JSON object, a JSON list of them, or one a line.

    Raises:
        InvalidInputError: naming the line and column.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise InvalidInputError(f"{source}: nothing in it")
    lines = data.splitlines()
    filled = [each for each in lines if each.strip()]
    if len(filled) > 1 and _is_whole(filled[0]):
        return _from_lines(lines, source)
    whole = _decoded(data, source)
    if isinstance(whole, list):
        return [_given(each, f"{source}, item {n}") for n, each in enumerate(whole, 1)]
    return [_given(whole, source)]


def _is_whole(line: bytes) -> bool:
    """Whether a line is a JSON value by itself, so that the lines are one each."""
    try:
        msgspec.json.decode(line)
    except (ValueError, RecursionError):
        return False
    return True


def _from_lines(lines: Sequence[bytes], source: str) -> list[Given]:
    return [
        _given(_decoded(each, source, number), f"{source}, line {number}")
        for number, each in enumerate(lines, 1)
        if each.strip()
    ]


def _given(value: object, place: str) -> Given:
    if not isinstance(value, dict):
        raise InvalidInputError(f"{place}: expected a JSON object, got {type(value).__name__}")
    return Given(place, value)


def _decoded(data: bytes, source: str, line: int = 1) -> object:
    """A JSON text; an error names the place, with `line` as the number of the first line."""
    try:
        return msgspec.json.decode(data.decode())
    except UnicodeDecodeError as exc:
        at: int | None = exc.start
        problem = "not UTF-8"
    except RecursionError:
        at, problem = None, "nested too deep"
    except msgspec.MsgspecError as exc:
        said = str(exc)
        found = re.search(r" \(byte (\d+)\)", said)
        at = int(found[1]) if found else len(data) if "truncated" in said else None
        problem = re.sub(r" \(byte \d+\)", "", said).replace(
            "Input data was truncated", "it ends too early"
        )
    if at is None:
        raise InvalidInputError(f"{source}: {problem}")
    start = data.rfind(b"\n", 0, at) + 1
    line += data.count(b"\n", 0, at)
    column = len(data[start:at].decode(errors="replace")) + 1
    raise InvalidInputError(f"{source}, line {line}, column {column}: {problem}")
