"""The command-line syntax of paths, values, filters, assignments and JSON input.

`hf-async-store query --help` describes it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast, get_args

import msgspec

from hf_async_store.errors import InvalidFieldError, InvalidInputError, InvalidQueryError
from hf_async_store.field_checks import directed, is_known, operand_problem, signed, undeclared
from hf_async_store.json_input import decode_json
from hf_async_store.query import Combined, Op, OpName, Path, and_, asc, desc
from hf_async_store.values import (
    REMOVE,
    TIMESTAMP_FORM,
    VERSION,
    Removed,
    Value,
    join_path,
    parse_timestamp,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from hf_async_store.query import SortKeyInput, Steps
    from hf_async_store.schema import Collection
    from hf_async_store.values import FieldType

OPERATORS: Final[tuple[OpName, ...]] = tuple(
    each
    for each in get_args(OpName)
    if each != "timestamp_lte"  # it is part of expiry, and not of filters
)
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
    _refuse_sign(word)
    parsed = _split(word)
    operator = next((each for each in OPERATORS if each == parsed.operator), None)
    if operator is None:
        raise InvalidQueryError(
            f"{_shown(word)}: unknown operator {parsed.operator!r}; the operators are: "
            f"{', '.join(OPERATORS)} (write a field name with a colon as a JSON list: "
            "'[\"a:b\"]=x')"
        )
    operand = _operand(word, operator, parsed, collection)
    if parsed.bare_name is not None:
        _check_name(parsed.bare_name, word, collection)
        _check_operand(word, operator, operand, parsed.bare_name, collection)
    return {Path(parsed.steps): Op(operator, operand)}


def _refuse_sign(word: str) -> None:
    """Refuse `status!=done` and `size>=5`, which would else be the fields `status!` and `size>`."""
    meant = signed(word)
    if meant is None or re.match(r"\s*[\w/]+=(?!=)", word):
        return
    name, operator = meant
    if operator != "eq":
        raise InvalidQueryError(
            f"{_shown(word)} is not a filter; write {name}:{operator}=VALUE, or a field name that "
            "contains such a sign as a JSON list"
        )
    raise InvalidQueryError(
        f"{_shown(word)} is not a filter; write {name}=VALUE, or {name}:='\"=...\"' for a value that "
        "begins with ="
    )


def _check_name(name: str, word: str, collection: Collection) -> None:
    if not is_known(collection, name):
        raise InvalidQueryError(
            f"{_shown(word)}: {undeclared(collection, name)}; a field that is not declared is "
            f"written as a JSON list: '{_listed_name(name)}'"
        )


def _check_operand(
    word: str, operator: OpName, operand: object, name: str, collection: Collection
) -> None:
    if operator == "exists":
        return
    field_type = _type_of((name,), collection)
    for each in operand if isinstance(operand, tuple) else (operand,):
        problem = operand_problem(operator, field_type, cast("Value", each))
        if problem is not None:
            several = (
                f"; for any of several values: {name}:in=a,b" if isinstance(each, list) else ""
            )
            raise InvalidQueryError(
                f"{_shown(word)}: {operator} {problem}{several}; any value is accepted after the "
                f"name as a JSON list: '{_listed_name(name)}'"
            )


def _listed_name(name: str) -> str:
    from json import dumps

    return dumps([name if len(name) <= _MAX_SHOWN_LENGTH else "NAME"])


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
        return value_of(value, field_type, word)
    return _checked_list(
        word, operator, [value_of(each.strip(), field_type, word) for each in value.split(",")]
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


def order_of(words: Iterable[str], collection: Collection) -> list[SortKeyInput] | None:
    """Parse `--order`: names separated by commas, with a leading `-` for descending order."""
    names = _names(words)
    if not all(name.strip("-") for name in names):
        raise InvalidQueryError("--order needs names, for example --order status,-created_at")
    return [_sort_key(each, collection) for each in names] or None


def _sort_key(word: str, collection: Collection) -> SortKeyInput:
    meant = directed(word)
    if meant is not None:
        name, descending = meant
        raise InvalidQueryError(
            f"--order {_shown(word)}: write --order {'-' if descending else ''}{name}"
        )
    if word.lower() in ("asc", "desc") and not is_known(collection, word.lower()):
        raise InvalidQueryError(f"--order {_shown(word)}: a descending order is written -name")
    return (desc if word.startswith("-") else asc)(
        _named_path(word.removeprefix("-"), "--order", collection)
    )


def fields_of(words: Iterable[str], collection: Collection) -> list[Path] | None:
    """Parse `--fields`: names separated by commas; None if there are none."""
    names = _names(words)
    if not all(names):
        raise InvalidInputError("--fields needs field names, for example --fields name,status")
    return [_named_path(each, "--fields", collection, nested=False) for each in names] or None


def aggregated_of(word: str, option: str, collection: Collection) -> Path:
    """Parse `--by`, `--sum`, `--min` or `--max`: the path of the value that is counted or compared."""
    return _named_path(word, option, collection)


def _names(words: Iterable[str]) -> list[str]:
    """The names in words that contain one JSON list, or names separated by commas."""
    return [
        name.strip()
        for word in words
        for name in ([word] if word.lstrip("-").startswith("[") else word.split(","))
    ]


def _named_path(word: str, option: str, collection: Collection, *, nested: bool = True) -> Path:
    """The path of a word of an option; a bare name in it must be declared."""
    if word.startswith("["):
        return Path(steps_of(word))
    steps = steps_of(word) if nested else (word,)
    if len(steps) == 1:
        _check_name(word, f"{option} {word}", collection)
    return Path(steps)


# -- assignments ----------------------------------------------------------------------------


def changes_of(
    words: Sequence[str], removed: Iterable[str], collection: Collection
) -> dict[str | Path, Value | Removed]:
    """Parse the changes of an update: assignments or one JSON object, and the fields to remove.

    Raises:
        InvalidInputError: an argument is not valid; the error names it, and says what is expected.
    """
    changes: dict[str | Path, Value | Removed] = {}
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        changes.update(_json_object(words[0]))
    else:
        for word in words:
            target, value = _assignment(word, collection)
            if target in changes:
                name = target if isinstance(target, str) else join_path(target.parts)
                raise InvalidInputError(f"{_shown(word)}: {name} is given twice")
            changes[target] = value
    for word in removed:
        target = _target(steps_of(word))
        if target in changes:
            raise InvalidInputError(f"--remove {word}: the field is also given a value")
        changes[target] = REMOVE
    if not changes:
        raise InvalidInputError(
            "no change is given: give field=value, a JSON object, or --remove FIELD"
        )
    return changes


def _target(steps: Steps) -> str | Path:
    """What an update changes: a field, or a value inside one."""
    name, *inner = steps
    return Path(steps) if inner or not isinstance(name, str) else name


def _assignment(word: str, collection: Collection) -> tuple[str | Path, Value]:
    parsed = _split(word)
    if parsed.value is None or parsed.operator != "eq":
        raise InvalidInputError(
            f"{_shown(word)} is not an assignment; write field=value, or field:=JSON"
        )
    target = _target(parsed.steps)
    if target == VERSION:
        raise InvalidInputError(
            "the version cannot be set; to update only if the stored version is unchanged, use "
            "--expected-version"
        )
    if parsed.is_json:
        return target, _json(parsed.value, word)
    return target, value_of(parsed.value, _type_of(parsed.steps, collection), word)


# -- arguments ------------------------------------------------------------------------------


class _ParsedWord(NamedTuple):
    """The parts of an argument `steps:operator=value`; the value is None if there is no `=`."""

    steps: Steps
    operator: str
    value: str | None
    is_json: bool = False
    is_listed: bool = False

    @property
    def bare_name(self) -> str | None:
        """The name of a field that is not written as a path or a JSON list."""
        name, *inner = self.steps
        return None if inner or self.is_listed or not isinstance(name, str) else name


def _split(word: str) -> _ParsedWord:
    steps, rest = _leading_steps(word)
    is_listed = steps is not None
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
    return _ParsedWord(steps, operator or "eq", value if equals else None, is_json, is_listed)


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


def value_of(string: str, field_type: FieldType, word: str) -> Value:
    """Convert a string to a value of the type of its field.

    Args:
        word: what the string is a part of, for the error.

    Raises:
        InvalidFieldError: it is no value of the type.
    """
    if field_type == "text":
        return string
    if field_type == "json":
        return _json_or_string(string)
    if string == "null":
        return None
    if field_type == "timestamp":
        if parse_timestamp(string) is None:
            raise _wrong_type(word, TIMESTAMP_FORM)
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
