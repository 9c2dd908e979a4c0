"""The SQL of PostgreSQL. Entities are JSONB; numbers in it are decimals.

The role of the tables may not be the only one that creates objects in their schema. The server would
prefer a function or operator of that schema whose types match better than those of pg_catalog. So the
names of functions are qualified, and no argument of an operator needs a conversion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from sqlalchemy import BigInteger, Boolean, Numeric, Text
from sqlalchemy.dialects.postgresql import JSONB

from hf_async_store.query import Missing
from hf_async_store.strategies.sql.grammar import (
    FALSE,
    NUMBER_RANK,
    OPERATORS,
    TEXT_RANK,
    Arguments,
    Condition,
    Form,
    Grammar,
    SortTerms,
    encode_json,
    rank_of,
)
from hf_async_store.strategies.sql.names import DOC, limited, quoted, sql_name
from hf_async_store.strategies.sql.postgres_jsonb import array_text, decimal_text, json_text
from hf_async_store.values import INT_MAX, INT_MIN, FieldType, Value

if TYPE_CHECKING:
    from sqlalchemy.types import TypeEngine

    from hf_async_store.schema import Field, Schema

SHORT: Final = 128
"""The number of characters of a string in its sort terms. The server rejects index entries of more than
about 2,700 bytes; an entry contains at most two strings and an id."""

_CASTS: Final = {
    "text": "::text",
    "number": "::text::numeric",
    "json": "::text::jsonb",
    "path": "::text::jsonpath",
    "list": "::text::text[]",
}
_MAX_ANY_VALUES: Final = 64
"""With more values than this, a list is searched by hash instead of with ANY."""

_MAX_ARROWS: Final = 8
"""A path of at most this many steps is compiled to operators `->`, which are faster than a jsonpath."""

_JSON_TYPES: Final = {str: "string", bool: "boolean", int: "number", float: "number"}
_INDEXED_FIELD: Final = re.compile(r"doc ->>? '(\w+)'::text")
_PLAIN_NAME: Final = re.compile(r"[a-z][a-z0-9_]*\Z")


class PostgresGrammar(Grammar):
    """The SQL of PostgreSQL."""

    stored: ClassVar[bool] = True

    def encode(self, value: Value) -> str:
        return json_text(value)

    def parameter(self, number: int, kind: str) -> str:
        return f"${number}{_CASTS[kind]}"

    def strings(self, values: Sequence[str]) -> object:
        return array_text(values)

    def in_list(self, parameter: str) -> str:
        return f"= ANY({parameter})"

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

    def contains(self, expression: str, part: str) -> str:
        return f'pg_catalog.strpos({expression} COLLATE "C", {part}) > 0'

    def version(self, column: str) -> str:
        return f"{column}::numeric"

    def number(self, value: float, args: Arguments) -> str:
        return args.add(decimal_text(value), "number")

    # -- sort terms --------------------------------------------------------------------------

    def terms(self, target: str) -> SortTerms:
        text = _text_of(target)
        return SortTerms("any", (_number_term(target), _text_term(target, text)))

    def indexed_terms(self, field: Field, prefix: str) -> SortTerms:
        # One term, of the declared type, because each makes a write slower.
        target = f"({prefix}{DOC} -> '{field.name}'::text)"
        if field.type in ("text", "timestamp"):
            text = f"({prefix}{DOC} ->> '{field.name}'::text)"
            return SortTerms("text", (_text_term(target, text),))
        return SortTerms("number", (_number_term(target),))

    def operand(
        self, value: Value | Missing, form: Form, args: Arguments, *, below: bool | None = None
    ) -> tuple[str, ...]:
        rank = rank_of(value)
        terms: list[str] = []
        if form != "text":
            is_number = rank == NUMBER_RANK
            terms.append(
                self.number(cast("float", value), args) if is_number else _NUMBER_CODES[rank]
            )
        if form != "number":
            terms.append(
                args.add(_prefixed(value)) if isinstance(value, str) else _TEXT_CODES[rank]
            )
        return tuple(terms)

    def exact(self, value: Value | Missing, form: Form) -> bool:
        if isinstance(value, str):
            return form != "number" and len(value) < SHORT
        if isinstance(value, int | float) and not isinstance(value, bool):
            return form != "text"
        return not isinstance(value, list | dict)

    def confusable(self, one: Value | Missing, other: Value | Missing, form: Form) -> bool:
        if isinstance(one, str) and isinstance(other, str):
            return form == "number" or one[:SHORT] == other[:SHORT]
        return rank_of(one) == rank_of(other)

    def equal(self, terms: SortTerms, values: Sequence[Value], args: Arguments) -> Condition:
        term, first = terms.sql[0], values[0]
        exact = all(self.exact(each, terms.form) for each in values)
        fits = isinstance(first, str) == (terms.form == "text")
        if len(values) == 1 or not fits:  # the values that do not fit have the same code
            test = f"{term} = {self.operand(first, terms.form, args)[0]}"
        elif isinstance(first, str):
            prefixed = list(map(_prefixed, cast("Sequence[str]", values)))
            test = self.in_strings(term, prefixed, args)
        else:
            decimals = array_text(list(map(decimal_text, cast("Sequence[float]", values))))
            test = _one_of(term, f"{args.add(decimals, 'list')}::numeric[]", len(values))
        return Condition(test, exact)

    def bound(
        self, terms: SortTerms, target: str, op: str, value: str | float, args: Arguments
    ) -> Condition:
        term, sign = terms.sql[0], OPERATORS[op]
        if isinstance(value, str) != (terms.form == "text"):
            return Condition(f"{term} = {self.operand(value, terms.form, args)[0]}", exact=False)
        exact = self.exact(value, terms.form)
        if not exact:
            sign = f"{sign[0]}="
        test = f"{term} {sign} {self.operand(value, terms.form, args)[0]}"
        first, last = _TEXT_RANGE if isinstance(value, str) else _NUMBER_RANGE
        others = f"{term} > {first}" if sign[0] == "<" else f"{term} < {last}"
        return Condition(f"({test} AND {others})", exact)

    # -- definitions -------------------------------------------------------------------------

    def type_of(self, kind: FieldType) -> TypeEngine[Any]:
        if kind == "integer":
            return BigInteger()
        if kind == "boolean":
            return Boolean()
        if kind == "number":
            return Numeric()
        return JSONB() if kind == "json" else Text(collation="C")

    @property
    def document_type(self) -> TypeEngine[Any]:
        return JSONB()

    def same_type(self, existing: str, type_: TypeEngine[Any]) -> bool:
        return existing == _TYPE_NAMES[type(type_)]

    def generated(self, field: Field) -> str:
        member = f"({DOC} -> '{field.name}'::text)"
        text = f"({DOC} ->> '{field.name}'::text)"
        if field.type == "json":
            return member
        if field.type in ("text", "timestamp"):
            # Without a test of the type, which would take as long as everything else.
            is_reference = field.references is not None and field.enforced
            return (
                f"CASE WHEN {_has_type(member, 'string')} THEN {text} END" if is_reference else text
            )
        number = f"{member}::numeric"
        kind = "boolean" if field.type == "boolean" else "number"
        value = {
            "number": number,
            "boolean": f"{member}::boolean",
            "integer": (
                f"CASE WHEN {number} >= {INT_MIN}::numeric AND {number} <= {INT_MAX}::numeric "
                f"AND pg_catalog.trunc({number}) = {number} THEN {number}::bigint END"
            ),
        }[field.type]
        return f"CASE WHEN {_has_type(member, kind)} THEN {value} END"

    def sort_columns(self, field: Field) -> Mapping[str, str]:
        return {}

    def index_fields(self, definition: str) -> list[str]:
        return list(dict.fromkeys(_INDEXED_FIELD.findall(definition)))

    def refers(self, alias: str, field: Field, parent: str) -> str:
        return f"{alias}.{quoted(field.name)} = {parent}"

    def reference_ddl(
        self, schema: Schema, existing: Mapping[str, str], *, enforced: bool
    ) -> list[str]:
        """Add or drop the foreign keys, and index the references.

        A foreign key is added as NOT VALID, so that existing rows without a parent do not prevent it.
        """
        statements: list[str] = []
        for collection in schema.values():
            for field in collection.references:
                parent = schema[cast("str", field.references)]
                table, column = quoted(collection.name), quoted(field.name)
                name = limited(f"{sql_name(collection.name)}-{sql_name(field.name)}-reference")
                index = limited(f"{sql_name(collection.name)}-{sql_name(field.name)}-children")
                if enforced and name not in existing:
                    statements.append(
                        f'ALTER TABLE {table} ADD CONSTRAINT "{name}" FOREIGN KEY ({column}) '
                        f"REFERENCES {quoted(parent.name)} ({quoted(parent.key)}) NOT VALID"
                    )
                if not enforced and name in existing:
                    statements.append(f'ALTER TABLE {table} DROP CONSTRAINT "{name}"')
                if index not in existing:
                    statements.append(f'CREATE INDEX "{index}" ON {table} ({column})')
        return statements


_OTHERS: Final = {"null": 1, "array": 6, "object": 7}
_STRING: Final = "s"
"""What the sort term of each string begins with, so that the codes sort before and after all of them."""

_TEXT_CODES: Final = {
    rank: f"'{code}'::text"
    for rank, code in {0: "", 1: "a", 2: "b", 3: "c", 4: "d", 6: "x", 7: "y"}.items()
}
_NUMBER_CODES: Final = {
    rank: f"{code}e309::numeric"
    for rank, code in {0: "-8", 1: "-7", 2: "-6", 3: "-5", 5: "5", 6: "6", 7: "7"}.items()
}
_TEXT_RANGE: Final = _TEXT_CODES[4], _TEXT_CODES[6]
_NUMBER_RANGE: Final = _NUMBER_CODES[3], _NUMBER_CODES[5]
"""The codes directly before and after all strings, and all numbers."""

_TYPE_NAMES: Final[Mapping[type, str]] = {
    BigInteger: "bigint",
    Boolean: "boolean",
    Numeric: "numeric",
    JSONB: "jsonb",
    Text: "text COLLATE C",
}


def _number_term(target: str) -> str:
    cases = [f"WHEN '{name}'::text THEN {_NUMBER_CODES[rank]}" for name, rank in _OTHERS.items()]
    flag = f"CASE WHEN {target} = 'true'::jsonb THEN {_NUMBER_CODES[3]} ELSE {_NUMBER_CODES[2]} END"
    return (
        f"(CASE pg_catalog.jsonb_typeof({target}) WHEN 'number'::text THEN {target}::numeric "
        f"WHEN 'string'::text THEN {_NUMBER_CODES[TEXT_RANK]} {' '.join(cases)} "
        f"WHEN 'boolean'::text THEN {flag} ELSE {_NUMBER_CODES[0]} END)"
    )


def _text_term(target: str, text: str) -> str:
    cases = [f"WHEN '{name}'::text THEN {_TEXT_CODES[rank]}" for name, rank in _OTHERS.items()]
    flag = f"CASE WHEN {target} = 'true'::jsonb THEN {_TEXT_CODES[3]} ELSE {_TEXT_CODES[2]} END"
    return (
        f"(CASE pg_catalog.jsonb_typeof({target}) WHEN 'string'::text "
        f"THEN '{_STRING}'::text || pg_catalog.left({text}, {SHORT}) "
        f"WHEN 'number'::text THEN {_TEXT_CODES[NUMBER_RANK]} {' '.join(cases)} "
        f"WHEN 'boolean'::text THEN {flag} ELSE {_TEXT_CODES[0]} END COLLATE \"C\")"
    )


def _prefixed(text: str) -> str:
    """The sort term of a string."""
    return _STRING + text[:SHORT]


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
