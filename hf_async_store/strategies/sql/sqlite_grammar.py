"""The SQL of SQLite. Entities are JSON text.

SQLite's own JSON functions may read a float with an error in the last bit, compare the text of an
object instead of its names and numbers, and have no order for arrays and objects. Everything but strings
is therefore compared and sorted by the functions of `sqlite_functions`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Final, cast

from hf_async_store.query import Missing
from hf_async_store.sort_bytes import MAX_SORT_BYTES, sort_bytes
from hf_async_store.strategies.sql.grammar import (
    OPERATORS,
    Arguments,
    Condition,
    Grammar,
    encode_json,
)
from hf_async_store.strategies.sql.names import DOC
from hf_async_store.values import FieldType, Value

_REAL_ERROR: Final = 1e-9
"""Far above the relative error with which SQLite reads a float: about 1e-16."""

_SORT_STRING: Final = sort_bytes("")[0]
_SIMPLE_NAME: Final = re.compile(r'[^"\\\x00-\x1f]+\Z')
_PLAIN_NAME: Final = re.compile(r"[a-z][a-z0-9_]*\Z")
_VIEW_CASES: Final[dict[FieldType, str]] = {
    "text": "WHEN 'text' THEN {value}",
    "timestamp": "WHEN 'text' THEN {value}",
    "integer": "WHEN 'integer' THEN {value}",
    "number": "WHEN 'integer' THEN {value} WHEN 'real' THEN {value}",
    "boolean": "WHEN 'true' THEN 1 WHEN 'false' THEN 0",
}


class SQLiteGrammar(Grammar):
    """The SQL of SQLite."""

    text_type: ClassVar[str] = "TEXT"
    has_statistics: ClassVar[bool] = False

    def encode(self, value: Value) -> str:
        return encode_json(value).decode()

    def parameter(self, number: int, kind: str) -> str:
        return f"?{number}"

    def strings(self, values: Sequence[str]) -> object:
        return encode_json(values).decode()

    def in_list(self, parameter: str) -> str:
        return f"IN (SELECT value FROM json_each({parameter}))"

    def read(self, column: str) -> str:
        return column

    # -- conditions --------------------------------------------------------------------------

    def at(self, steps: Sequence[str | int], args: Arguments) -> str:
        if len(steps) == 1 and _PLAIN_NAME.match(cast("str", steps[0])):
            return f"(t.{DOC} -> '$.{steps[0]}')"
        if all(isinstance(each, int) or _SIMPLE_NAME.match(each) for each in steps):
            path = "".join(f"[{each}]" if isinstance(each, int) else f'."{each}"' for each in steps)
            return f"(t.{DOC} -> {args.add(f'${path}')})"
        return f"hf_at(t.{DOC}, {args.add(self.encode(list(steps)))})"

    def test(self, target: str, op: str, value: Value, args: Arguments) -> Condition:
        if op == "exists":
            return Condition(f"{target} IS {'NOT ' if value else ''}NULL")
        text = _text_of(target)
        if op == "timestamp_lte":
            latest = self.test(target, "lte", value, args)
            return Condition(f"({latest.sql} AND {text} GLOB '{_TIMESTAMP}')")
        sign = "=" if op == "eq" else OPERATORS.get(op)
        if isinstance(value, str) and sign is not None:
            return Condition(f"({text} {sign} {args.add(value)} AND {_is_string(target)})")
        if op == "in" and all(isinstance(each, str) for each in cast("list[Value]", value)):
            found = self.in_strings(text, cast("list[str]", value), args)
            return Condition(f"({found} AND {_is_string(target)})")
        if isinstance(value, str) and op == "begins_with":
            start = f"substr({text}, 1, {len(value)})"
            return Condition(f"({start} = {args.add(value)} AND {_is_string(target)})")
        test = f"hf_test({target}, '{op}', {args.add(self.encode(value))})"
        if isinstance(value, str) and op == "contains":
            part = self.contains(text, args.add(value))
            strings, lists = f"WHEN 'text' THEN {part}", f"WHEN 'array' THEN {test}"
            return Condition(f"CASE {_type_of(target)} {strings} {lists} ELSE FALSE END")
        if type(value) in (int, float) and sign is not None:
            integers = f"WHEN 'integer' THEN {text} {sign} {args.add(value)}"
            reals = f"WHEN 'real' THEN {_real_test(text, sign, float(cast('float', value)), test, args)}"
            test = f"CASE {_type_of(target)} {integers} {reals} ELSE FALSE END"
        return Condition(test)

    def in_strings(self, expression: str, values: Sequence[str], args: Arguments) -> str:
        return f"{expression} {self.in_list(args.add(self.strings(values)))}"

    def in_bytes(self, column: str, values: Sequence[bytes], args: Arguments) -> str:
        listed = args.add(self.strings([each.hex() for each in values]))
        return f"{column} IN (SELECT hf_bytes(value) FROM json_each({listed}))"

    def contains(self, expression: str, part: str) -> str:
        return f"instr({expression}, {part}) > 0"

    def version(self, column: str) -> str:
        return column

    def number(self, value: float, args: Arguments) -> str:
        return args.add(value)

    # -- order -------------------------------------------------------------------------------

    def terms(self, target: str) -> tuple[str, ...]:
        # The key of a string is computed here, because a call of a Python function takes longer.
        string = f"CAST(char({_SORT_STRING}) || {_text_of(target)} AS BLOB)"
        short = f"substr({string}, 1, {MAX_SORT_BYTES})"
        return (f"CASE WHEN {_is_string(target)} THEN {short} ELSE hf_key({target}) END",)

    def operands(self, value: Value | Missing, args: Arguments) -> tuple[str, ...]:
        return (args.add(sort_bytes(value)),)

    # -- definitions -------------------------------------------------------------------------

    def view_column(self, field: str, kind: FieldType) -> str:
        value = f"{DOC} ->> '$.{field}'"
        if kind == "json":
            return f"{DOC} -> '$.{field}'"
        return f"CASE json_type({DOC}, '$.{field}') {_VIEW_CASES[kind].format(value=value)} END"


def _real_test(text: str, sign: str, value: float, exact: str, args: Arguments) -> str:
    """The condition for a float: the exact one, which takes long, only for those that are near `value`."""
    margin = abs(value) * _REAL_ERROR
    below, above = args.add(value - margin), args.add(value + margin)
    is_below, is_above = sign.startswith("<"), sign.startswith(">")
    return (
        f"CASE WHEN {text} < {below} THEN {is_below} WHEN {text} > {above} THEN {is_above} "
        f"ELSE {exact} END"
    )


_DIGIT: Final = "[0-9]"
_TIMESTAMP: Final = (
    f"{_DIGIT * 4}-{_DIGIT * 2}-{_DIGIT * 2}T{_DIGIT * 2}:{_DIGIT * 2}:{_DIGIT * 2}.{_DIGIT * 6}Z"
)
"""The fixed form of timestamps."""

_MEMBER: Final = f"(t.{DOC} -> "


def _text_of(target: str) -> str:
    """The string or number that JSON contains; without parsing twice what `at` returns."""
    if target.startswith(_MEMBER):
        return f"(t.{DOC} ->> {target.removeprefix(_MEMBER)}"
    return f"({target} ->> '$')"


def _type_of(target: str) -> str:
    """The type of JSON; without parsing twice what `at` returns."""
    if target.startswith(_MEMBER):
        return f"json_type(t.{DOC}, {target.removeprefix(_MEMBER)}"
    return f"json_type({target})"


def _is_string(target: str) -> str:
    return f"{_type_of(target)} = 'text'"
