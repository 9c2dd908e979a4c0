"""The SQL of SQLite. Entities are JSON text.

SQLite's own JSON functions may read a float with an error in the last bit, compare the text of an
object instead of its names and numbers, and have no order for arrays and objects. Such values are
compared by the functions of `sqlite_functions`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from sqlalchemy import BigInteger, Boolean, Text
from sqlalchemy.types import UserDefinedType

from hf_async_store.query import Missing
from hf_async_store.strategies.sql.errors import REFERENCE_TRIGGER
from hf_async_store.strategies.sql.grammar import (
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
from hf_async_store.strategies.sql.names import DOC, declared_name, limited, quoted, sql_name
from hf_async_store.values import FieldType, Value

if TYPE_CHECKING:
    from sqlalchemy.types import TypeEngine

    from hf_async_store.schema import Collection, Field, Schema

_SIMPLE_NAME: Final = re.compile(r'[^"\\\x00-\x1f]+\Z')
_PLAIN_NAME: Final = re.compile(r"[a-z][a-z0-9_]*\Z")
_INDEXED_FIELD: Final = re.compile(r'"(\w+)~sort"')
_OTHERS: Final = {"null": 1, "false": 2, "true": 3, "array": 6, "object": 7}
_CODES: Final = {
    0: "-9e999",
    1: "-1.7976931348623157e308",
    2: "-1.797693134862315e308",
    3: "-1.79769313486231e308",
    6: "x'06'",
    7: "x'07'",
}
"""By rank, what sorts instead of a value that is neither a number nor a string."""

_LEAST: Final = -1.7e308
"""Numbers below this may be taken for one of the codes."""

_EXACT: Final = 2**53
_TOLERANCE: Final = 1e-15
"""How far SQLite's reading of a float may be from it, relatively; several times as much as it is."""

_SMALLEST: Final = 1e-320


class _Untyped(UserDefinedType[Any]):
    """A column without type affinity, which preserves the difference between 1 and 1.0."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "BLOB"


class SQLiteGrammar(Grammar):
    """The SQL of SQLite."""

    stored: ClassVar[bool] = False

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
        if op in ("eq", "in"):
            values = [value] if op == "eq" else cast("list[Value]", value)
            if not any(isinstance(each, list | dict) for each in values):
                forms = [form for each in values for form in _json_forms(each)]
                return Condition(self.in_strings(target, forms, args))
        if op in OPERATORS and isinstance(value, str):
            test = f"{target} ->> '$' {OPERATORS[op]} {args.add(value)}"
            return Condition(f"(substr({target}, 1, 1) = '\"' AND {test})")
        return Condition(f"hf_test({target}, '{op}', {args.add(self.encode(value))})")

    def in_strings(self, expression: str, values: Sequence[str], args: Arguments) -> str:
        if len(values) == 1:
            return f"{expression} = {args.add(values[0])}"
        return f"{expression} {self.in_list(args.add(self.strings(values)))}"

    def contains(self, expression: str, part: str) -> str:
        return f"instr({expression}, {part}) > 0"

    def version(self, column: str) -> str:
        return column

    def number(self, value: float, args: Arguments) -> str:
        return args.add(value)

    # -- sort terms --------------------------------------------------------------------------

    def terms(self, target: str) -> SortTerms:
        return SortTerms("any", (_sort_term(f"json_type({target})", f"{target} ->> '$'"),))

    def indexed_terms(self, field: Field, prefix: str) -> SortTerms:
        # Columns, and not expressions, because SQLite uses only columns for the comparison of rows.
        return SortTerms("any", tuple(f'{prefix}"{each}"' for each in self.sort_columns(field)))

    def operand(
        self, value: Value | Missing, form: Form, args: Arguments, *, below: bool | None = None
    ) -> tuple[str, ...]:
        rank = rank_of(value)
        if isinstance(value, str):
            return (args.add(value),)
        if rank != NUMBER_RANK:
            return (_CODES[rank],)
        number = cast("float", value)
        if below is not None and not self.exact(number, form):
            return (args.add(number - _margin(number) if below else number + _margin(number)),)
        return (f"json_extract({args.add(self.encode(number))}, '$')",)

    def exact(self, value: Value | Missing, form: Form) -> bool:
        if isinstance(value, float):
            return value.is_integer() and abs(value) < _EXACT
        return not isinstance(value, list | dict)

    def confusable(self, one: Value | Missing, other: Value | Missing, form: Form) -> bool:
        if rank_of(one) == rank_of(other) == NUMBER_RANK:
            first, second = cast("float", one), cast("float", other)
            return abs(first - second) <= _margin(first)
        smaller = [each for each in (one, other) if rank_of(each) < NUMBER_RANK]
        numbers = [each for each in (one, other) if isinstance(each, float)]
        if smaller and numbers:
            return numbers[0] < _LEAST
        return rank_of(one) == rank_of(other) and isinstance(one, list | dict)

    def equal(self, terms: SortTerms, values: Sequence[Value], args: Arguments) -> Condition:
        [term] = terms.sql
        if len(values) == 1:
            test = f"{term} = {self.operand(values[0], terms.form, args)[0]}"
        else:
            test = f"{term} {self.in_list(args.add(self.encode(list(values))))}"
        # A number may be read as another one, or equal the code of null.
        return Condition(test, rank_of(values[0]) == TEXT_RANK)

    def bound(
        self, terms: SortTerms, target: str, op: str, value: str | float, args: Arguments
    ) -> Condition:
        [term] = terms.sql
        sign = OPERATORS[op]
        if isinstance(value, str):
            others = f"{term} >= ''" if sign[0] == "<" else f"{term} < x''"
            return Condition(f"({term} {sign} {args.add(value)} AND {others})")
        low, high = value - _margin(value), value + _margin(value)
        # Only numbers within the tolerance are compared by a function in Python.
        test = f"hf_test({target}, '{op}', {args.add(self.encode(value))})"
        if sign[0] == ">":
            near, far = args.add(low), args.add(high)
            return Condition(f"({term} >= {near} AND {term} < '' AND ({term} > {far} OR {test}))")
        near, far = args.add(high), args.add(low)
        sure = f"({term} < {far} AND {term} > {_LEAST})"
        return Condition(f"({term} <= {near} AND {term} > {_CODES[0]} AND ({sure} OR {test}))")

    # -- definitions -------------------------------------------------------------------------

    def type_of(self, kind: FieldType) -> TypeEngine[Any]:
        if kind == "integer":
            return BigInteger()
        if kind == "boolean":
            return Boolean(create_constraint=False)
        return _Untyped() if kind == "number" else Text()

    @property
    def document_type(self) -> TypeEngine[Any]:
        return Text()

    def same_type(self, existing: str, type_: TypeEngine[Any]) -> bool:
        wanted = {BigInteger: "BIGINT", Boolean: "BOOLEAN", _Untyped: "BLOB", Text: "TEXT"}
        return existing == wanted[type(type_)]

    def generated(self, field: Field) -> str:
        path = f"'$.{field.name}'"
        if field.type == "json":
            return f"{DOC} -> {path}"
        is_reference = field.references is not None and field.enforced
        if field.type in ("text", "timestamp") and not is_reference:
            # Without a test of the type, which would take as long as everything else.
            return f"{DOC} ->> {path}"
        kind = f"CASE json_type({DOC}, {path})"
        if field.type == "boolean":
            return f"{kind} WHEN 'true' THEN 1 WHEN 'false' THEN 0 END"
        kinds = {"integer": ("integer",), "number": ("integer", "real")}.get(field.type, ("text",))
        cases = " ".join(f"WHEN '{each}' THEN {DOC} ->> {path}" for each in kinds)
        return f"{kind} {cases} END"

    def sort_columns(self, field: Field) -> Mapping[str, str]:
        kind, value = f"json_type({DOC}, '$.{field.name}')", f"{DOC} ->> '$.{field.name}'"
        return {f"{sql_name(field.name)}~sort": _sort_term(kind, value)}

    def index_fields(self, definition: str) -> list[str]:
        return list(dict.fromkeys(map(declared_name, _INDEXED_FIELD.findall(definition))))

    def refers(self, alias: str, field: Field, parent: str) -> str:
        [term] = self.indexed_terms(field, f"{alias}.").sql
        return f"{term} = {parent}"

    def reference_ddl(
        self, schema: Schema, existing: Mapping[str, str], *, enforced: bool
    ) -> list[str]:
        """Create or drop the triggers, and index the references."""
        statements: list[str] = []
        for collection in schema.values():
            for field in collection.references:
                name = f"{sql_name(collection.name)}-{sql_name(field.name)}"
                index = limited(f"{name}-children")
                indexed = any(each.field == field.name for each in collection.indexes)
                if not indexed and index not in existing:
                    terms = ", ".join(self.indexed_terms(field, "").sql)
                    statements.append(
                        f'CREATE INDEX "{index}" ON {quoted(collection.name)} ({terms})'
                    )
                triggers = self._triggers(collection, field, schema[cast("str", field.references)])
                for event, definition in triggers.items():
                    trigger = limited(f"{name}-{event}")
                    if enforced and trigger not in existing:
                        statements.append(f'CREATE TRIGGER "{trigger}" {definition}')
                    if not enforced and trigger in existing:
                        statements.append(f'DROP TRIGGER "{trigger}"')
        return statements

    def _triggers(self, collection: Collection, field: Field, parent: Collection) -> dict[str, str]:
        """The triggers that enforce a reference. A reference that stays the same is not checked."""
        table, column = quoted(collection.name), f"NEW.{quoted(field.name)}"
        key = quoted(parent.key)
        refuse = f"BEGIN SELECT RAISE(ABORT, '{REFERENCE_TRIGGER}'); END"
        itself = collection.name == parent.name
        missing = (
            f"{column} IS NOT NULL{f' AND {column} <> NEW.{key}' if itself else ''} AND NOT EXISTS "
            f"(SELECT 1 FROM {quoted(parent.name)} WHERE {key} = {column})"
        )
        changed = f"{column} IS NOT OLD.{quoted(field.name)}"
        others = f" AND c.{key} <> OLD.{key}" if itself else ""
        children = (
            f"EXISTS (SELECT 1 FROM {table} AS c "
            f"WHERE {self.refers('c', field, f'OLD.{key}')}{others})"
        )
        return {
            "inserted": f"AFTER INSERT ON {table} WHEN {missing} {refuse}",
            "updated": f"AFTER UPDATE ON {table} WHEN {changed} AND {missing} {refuse}",
            "deleted": f"AFTER DELETE ON {quoted(parent.name)} WHEN {children} {refuse}",
        }


def _sort_term(kind: str, value: str) -> str:
    """The sort term of a value. SQLite sorts numbers before strings, and blobs after them."""
    cases = [f"WHEN '{each}' THEN {value}" for each in ("text", "integer", "real")]
    cases += [f"WHEN '{name}' THEN {_CODES[rank]}" for name, rank in _OTHERS.items()]
    return f"CASE {kind} {' '.join(cases)} ELSE {_CODES[0]} END"


def _margin(number: float) -> float:
    return abs(number) * _TOLERANCE + _SMALLEST


def _json_forms(value: Value) -> list[str]:
    """All forms in which stored JSON may contain a value that equals this one."""
    forms = [encode_json(value).decode()]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return forms
    if isinstance(value, float) and value.is_integer():
        forms.append(str(int(value)))
    elif isinstance(value, int) and int(float(value)) == value:
        forms.append(encode_json(float(value)).decode())
    return [*forms, "0.0", "-0.0"] if value == 0 else forms
