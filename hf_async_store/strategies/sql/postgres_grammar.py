"""The SQL of PostgreSQL. Entities are JSONB; numbers in it are decimals.

The role of the tables may not be the only one that creates objects in their schema. The server would
prefer a function or operator of that schema whose types match better than those of pg_catalog. So the
names of functions are qualified, and no argument of an operator needs a conversion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final, cast

from hf_async_store.query import MISSING, Missing
from hf_async_store.sort_bytes import MAX_SORT_BYTES, sort_bytes
from hf_async_store.strategies.sql.grammar import (
    FALSE,
    OPERATORS,
    Arguments,
    Condition,
    Grammar,
    encode_json,
)
from hf_async_store.strategies.sql.names import (
    DOC,
)
from hf_async_store.strategies.sql.postgres_jsonb import (
    array_text,
    bytes_array_text,
    decimal_text,
    json_text,
)
from hf_async_store.values import INT_MAX, INT_MIN, FieldType, Value

if TYPE_CHECKING:
    pass

_CASTS: Final = {
    "text": "::text",
    "bytes": "::bytea",
    "number": "::text::numeric",
    "json": "::text::jsonb",
    "path": "::text::jsonpath",
    "place": "::tid",
    "list": "::text::text[]",
    "list of bytes": "::text::bytea[]",
}
_MAX_ANY_VALUES: Final = 64
"""With more values than this, a list is searched by hash instead of with ANY."""

_MAX_ARROWS: Final = 8
"""A path of at most this many steps is compiled to operators `->`, which are faster than a jsonpath."""

_JSON_TYPES: Final = {str: "string", bool: "boolean", int: "number", float: "number"}
_PLAIN_NAME: Final = re.compile(r"[a-z][a-z0-9_]*\Z")


class PostgresGrammar(Grammar):
    """The SQL of PostgreSQL."""

    text_type: ClassVar[str] = 'text COLLATE "C"'
    has_statistics: ClassVar[bool] = True

    def encode(self, value: Value) -> str:
        return json_text(value)

    def parameter(self, number: int, kind: str) -> str:
        return f"${number}{_CASTS[kind]}"

    def strings(self, values: Sequence[str]) -> object:
        return array_text(values)

    def in_list(self, parameter: str) -> str:
        return f"= ANY({parameter})"

    def unknown(self, operand: str) -> str:
        # The server compares what a plan costs for the known values, and for any. For a position, it would
        # always find the first one cheaper, and plan each page again, which takes longer than to read it.
        return f"(SELECT {operand})"

    def read(self, column: str) -> str:
        return f"{column}::text"

    # -- conditions --------------------------------------------------------------------------

    def at(self, steps: Sequence[str | int], args: Arguments) -> str:
        if len(steps) > _MAX_ARROWS or not all(isinstance(each, str) for each in steps):
            # Strict, so that a single string or number is not treated as an array; a mismatch returns
            # NULL.
            path = args.add("strict $" + "".join(map(_accessor, steps)), "path")
            return f"pg_catalog.jsonb_path_query_first(t.{DOC}, {path}, '{{}}'::jsonb, true)"
        target = f"t.{DOC}"
        for each in cast("Sequence[str]", steps):
            # The operator -> with a string selects members of objects only.
            name = f"'{each}'::text" if _PLAIN_NAME.match(each) else args.add(each)
            target = f"({target} -> {name})"
        return target

    def test(self, target: str, op: str, value: Value, args: Arguments) -> Condition:
        if op == "exists":
            return Condition(f"{target} IS {'NOT ' if value else ''}NULL")
        if op == "eq":
            return Condition(f"{target} = {args.add(json_text(value), 'json')}")
        if op == "in":
            texts = args.add(array_text(list(map(json_text, cast("list[Value]", value)))), "list")
            return Condition(_one_of(target, f"{texts}::jsonb[]", len(cast("list[Value]", value))))
        if op == "timestamp_lte":
            latest = self._compared(target, "lte", value, args)
            return Condition(f"({latest.sql} AND {_text_of(target)} ~ '{_TIMESTAMP}'::text)")
        if op == "between":
            low, high = cast("list[Value]", value)
            one, other = (
                self._compared(target, "gte", low, args),
                self._compared(target, "lte", high, args),
            )
            return Condition(f"({one.sql} AND {other.sql})", one.exact and other.exact)
        if op == "contains":
            return Condition(self._contains(target, value, args))
        if op == "begins_with":
            prefix = args.add(value)
            begins = f"pg_catalog.starts_with({_text_of(target)}, {prefix})"
            return Condition(f"({_has_type(target, 'string')} AND {begins})")
        return self._compared(target, op, value, args)

    def _compared(self, target: str, op: str, value: Value, args: Arguments) -> Condition:
        if value is None:
            return Condition(FALSE)
        if isinstance(value, list | dict):
            # JSONB orders arrays and objects differently from the store.
            kind = "array" if isinstance(value, list) else "object"
            return Condition(_has_type(target, kind), exact=False)
        if isinstance(value, str):
            test = f'({_text_of(target)} COLLATE "C") {OPERATORS[op]} {args.add(value)}'
        else:
            test = f"{target} {OPERATORS[op]} {args.add(json_text(value), 'json')}"
        return Condition(f"({_has_type(target, _JSON_TYPES[type(value)])} AND {test})")

    def _contains(self, target: str, value: Value, args: Arguments) -> str:
        array = f"CASE WHEN {_has_type(target, 'array')} THEN {target} ELSE '[]'::jsonb END"
        element = args.add(json_text(value), "json")
        test = (
            f"EXISTS (SELECT 1 FROM pg_catalog.jsonb_array_elements({array}) AS e (v) "
            f"WHERE e.v = {element})"
        )
        if not isinstance(value, str):
            return test
        text = self.contains(_text_of(target), args.add(value))
        return f"({test} OR ({_has_type(target, 'string')} AND {text}))"

    def in_strings(self, expression: str, values: Sequence[str], args: Arguments) -> str:
        return _one_of(expression, args.add(array_text(values), "list"), len(values))

    def in_bytes(self, column: str, values: Sequence[bytes], args: Arguments) -> str:
        listed = args.add(bytes_array_text(values), "list of bytes")
        return _one_of(column, listed, len(values))

    def contains(self, expression: str, part: str) -> str:
        return f'pg_catalog.strpos({expression} COLLATE "C", {part}) > 0'

    def version(self, column: str) -> str:
        return f"{column}::numeric"

    def number(self, value: float, args: Arguments) -> str:
        return args.add(decimal_text(value), "number")

    # -- order -------------------------------------------------------------------------------

    def terms(self, target: str) -> tuple[str, ...]:
        cases = [f"WHEN '{kind}'::text THEN {code}" for kind, code in _CODES.items()]
        flag = f"CASE WHEN {target} = 'true'::jsonb THEN {_TRUE} ELSE {_FALSE} END"
        text = f"pg_catalog.convert_to({_text_of(target)}, 'UTF8'::name)"
        return (
            f"(CASE pg_catalog.jsonb_typeof({target}) WHEN 'number'::text THEN {target}::numeric "
            f"{' '.join(cases)} WHEN 'boolean'::text THEN {flag} ELSE {_MISSING} END)",
            f"(CASE WHEN {_has_type(target, 'string')} "
            f"THEN pg_catalog.substring({text}, 1, {MAX_SORT_BYTES - 1}) ELSE ''::bytea END)",
        )

    def operands(self, value: Value | Missing, args: Arguments) -> tuple[str, ...]:
        if isinstance(value, str):
            return _CODES["string"], args.add(sort_bytes(value)[1:], "bytes")
        return self._code(value, args), "''::bytea"

    def _code(self, value: Value | Missing, args: Arguments) -> str:
        if value is MISSING:
            return _MISSING
        if value is None:
            return _CODES["null"]
        if isinstance(value, bool):
            return _TRUE if value else _FALSE
        if isinstance(value, int | float):
            return self.number(value, args)
        return _CODES["array" if isinstance(value, list) else "object"]

    # -- definitions -------------------------------------------------------------------------

    def view_column(self, field: str, kind: FieldType) -> str:
        member = f"({DOC} -> '{field}'::text)"
        if kind == "json":
            return member
        if kind in ("text", "timestamp"):
            text = f"({DOC} ->> '{field}'::text)"
            return f"CASE WHEN {_has_type(member, 'string')} THEN {text} END"
        number = f"{member}::numeric"
        value = {
            "number": number,
            "boolean": f"{member}::boolean",
            "integer": (
                f"CASE WHEN {number} >= {INT_MIN}::numeric AND {number} <= {INT_MAX}::numeric "
                f"AND pg_catalog.trunc({number}) = {number} THEN {number}::bigint END"
            ),
        }[kind]
        json_type = "boolean" if kind == "boolean" else "number"
        return f"CASE WHEN {_has_type(member, json_type)} THEN {value} END"


_MISSING, _FALSE, _TRUE = (f"{code}e309::numeric" for code in ("-8", "-6", "-5"))
_CODES: Final = {
    "null": "-7e309::numeric",
    "string": "5e309::numeric",
    "array": "6e309::numeric",
    "object": "7e309::numeric",
}
"""The terms of values that are not numbers, below and above all numbers."""


_TIMESTAMP: Final = "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}[.][0-9]{6}Z$"
"""The fixed form of timestamps."""


def _one_of(expression: str, array: str, count: int) -> str:
    if count > _MAX_ANY_VALUES:
        # ANY would compare the values one by one for each row; a subquery is hashed once.
        return f"{expression} IN (SELECT pg_catalog.unnest({array}))"
    return f"{expression} = ANY({array})"


def _text_of(target: str) -> str:
    return f"({target} #>> '{{}}'::text[])"


def _accessor(step: str | int) -> str:
    return f"[{step}]" if isinstance(step, int) else f".{encode_json(step).decode()}"


def _has_type(target: str, kind: str) -> str:
    return f"pg_catalog.jsonb_typeof({target}) = '{kind}'::text"
