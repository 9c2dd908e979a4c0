"""Compiles a query to a SELECT with exactly the results of `query.matches` and `query.sort_key`.

A condition is true, false or NULL, and a WHERE treats false and NULL alike. A negation is therefore
written as `IS NOT TRUE`, which is true for both. If SQL cannot express a condition exactly, the
compiled condition accepts more rows, and the rows are filtered again in Python. If it cannot express
an order, the rows are sorted in Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from hf_async_store.query import (
    MISSING,
    And,
    Comparison,
    Filter,
    Missing,
    Not,
    Order,
    Query,
    compile_filter,
)
from hf_async_store.schema import Field
from hf_async_store.strategies.sql.row_mapping import DOC, Kind, TableMapping, quoted
from hf_async_store.values import INT_MAX, INT_MIN, VERSION, Entity, Value

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.dialect import Dialect

TRUE: Final = "TRUE"
FALSE: Final = "FALSE"

_COMPARE: Final = {"lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
_OPPOSITE: Final = {"ne": "eq", "not_in": "in"}
_VERSION_FIELD: Final = Field("n", "integer")


class Arguments:
    """Collects the arguments of a statement while it is compiled."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self.values: list[object] = []

    def add(self, value: object, kind: Kind) -> str:
        """Add an argument; returns its parameter."""
        self.values.append(self._dialect.argument(value, kind))
        return self._dialect.parameter(len(self.values), kind)


class SortPart(NamedTuple):
    """An expression to sort by.

    Attributes:
        nullable: the expression is NULL if the value is missing.
        null: the condition that a NULL is an explicit null, and not a missing value; None if the
            expression is NULL only for a missing value.
    """

    sql: str
    nullable: bool = False
    null: str | None = None


class Compiled(NamedTuple):
    """A query as SQL.

    Attributes:
        args: the arguments of the statement.
        names: the declared fields with which its rows begin; None: all.
        residual: the condition by which the rows must still be filtered; None if all rows match.
        sorted_here: the statement applies neither order, nor position, nor limit; the rows must be
            sorted in Python.
    """

    sql: str
    args: list[object]
    names: tuple[str, ...] | None
    residual: Callable[[Entity], bool] | None
    sorted_here: bool


def compile_query(table: TableMapping, query: Query, selection: str | None = None) -> Compiled:
    """The SELECT of a query.

    Args:
        selection: the list of expressions to select; None: those that `TableMapping.entity` reads.
    """
    compiler = _Compiler(table)
    conditions, exact = compiler.conditions(query.where)
    sort_keys = [compiler.sort_key(each) for each in query.order]
    pushed = None not in sort_keys
    order = ""
    if pushed:
        keys = list(zip(query.order, cast("list[_SortKey]", sort_keys), strict=True))
        if query.after is not None:
            conditions += compiler.after(keys, query.after.values, query.after.id)
        order = f" ORDER BY {compiler.order_by(keys)}"
        if query.limit is not None and exact:
            order += f" LIMIT {query.limit}"
    names, selected = compiler.selected(query, exact=exact)
    where = _joined(" AND ", conditions) or TRUE
    return Compiled(
        sql=f"SELECT {selection or selected} FROM {table.name} AS t WHERE {where}{order}",
        args=compiler.args.values,
        names=names,
        residual=None if exact else compile_filter(query.where),
        sorted_here=not pushed,
    )


def compile_count(table: TableMapping, query: Query) -> Compiled | None:
    """The SELECT that counts the matches of a query; None if SQL cannot express the filter exactly, or if
    the query has a limit or a position."""
    compiler = _Compiler(table)
    conditions, exact = compiler.conditions(query.where)
    if not exact or query.limit is not None or query.after is not None:
        return None
    where = _joined(" AND ", conditions) or TRUE
    sql = f"SELECT count(*) FROM {table.name} AS t WHERE {where}"
    return Compiled(sql, compiler.args.values, (), None, sorted_here=False)


def comparisons_in(where: Filter) -> int:
    """The number of comparisons in a filter."""
    if isinstance(where, Comparison):
        return 1
    if isinstance(where, Not):
        return comparisons_in(where.part)
    return sum(map(comparisons_in, where.parts))


_FILTERED_HERE: Final = ("contains_ignore_case", "begins_with_ignore_case")
"""The operators for which SQL has no exact equivalent: its case folding is not that of `str.casefold`."""


class _SortKey(NamedTuple):
    """How SQL sorts by one key of an order.

    Attributes:
        part: the expression; None if the value is missing in every row.
        field: the declared field; None for a path in a JSON column.
        is_key: the field is the key of the collection, so that no two rows are equal.
    """

    part: SortPart | None
    field: Field | None
    is_key: bool


class _Compiler:
    def __init__(self, table: TableMapping) -> None:
        self._table = table
        self._dialect = table.dialect
        self._collection = table.collection
        self.args = Arguments(table.dialect)

    # -- selection ---------------------------------------------------------------------------

    def selected(self, query: Query, *, exact: bool) -> tuple[tuple[str, ...] | None, str]:
        """The declared fields to read, or None for all, and the list of expressions to select."""
        if query.fields is None or not exact:
            return None, self._table.selected
        # A cursor contains the values of the fields of the order.
        wanted = {*query.fields, *(cast("str", each.path[0]) for each in query.order)}
        fields = [each for each in self._table.fields if each.name in wanted]
        others = wanted - self._collection.fields.keys() - {VERSION}
        names = tuple(each.name for each in fields)
        return names, self._table.selection(fields, doc=bool(others))

    # -- filters -----------------------------------------------------------------------------

    def conditions(self, where: Filter) -> tuple[list[str], bool]:
        """The conditions of a filter, to be joined by AND, and whether they are exact. If not, they accept
        more rows."""
        parts = _deepest_first(where.parts) if isinstance(where, And) else (where,)
        pairs = [self._filter(each) for each in parts]
        return [sql for sql, _ in pairs if sql != TRUE], all(exact for _, exact in pairs)

    def _filter(self, where: Filter) -> tuple[str, bool]:
        if isinstance(where, Comparison):
            if where.op in _FILTERED_HERE:
                return TRUE, False
            return self._comparison(where.path, where.op, where.value)
        if isinstance(where, Not):
            before = len(self.args.values)
            return self._opposite(*self._filter(where.part), before)
        pairs = [self._filter(each) for each in _deepest_first(where.parts)]
        combine = all if isinstance(where, And) else any
        if not pairs:
            return (TRUE if combine is all else FALSE), True
        operator = " AND " if combine is all else " OR "
        return f"({_joined(operator, [sql for sql, _ in pairs])})", all(exact for _, exact in pairs)

    def _comparison(self, path: Sequence[str | int], op: str, value: Value) -> tuple[str, bool]:
        if op in _OPPOSITE:
            before = len(self.args.values)
            return self._opposite(*self._comparison(path, _OPPOSITE[op], value), before)
        name = cast("str", path[0])
        field = self._collection.fields.get(name)
        if field is not None and field.type == "json":
            base, steps = f"t.{quoted(name)}", path[1:]
        elif field is None and name != VERSION:
            base, steps = f"t.{DOC}", path
        elif len(path) == 1:
            return self._column(field, op, value), True
        else:
            return (TRUE if op == "exists" and value is False else FALSE), True
        return self._dialect.json_test(base, steps, op, value, self.args)

    def _opposite(self, sql: str, exact: bool, before: int) -> tuple[str, bool]:
        """The negation of a condition, whose arguments begin at `before`."""
        if exact:
            return _not(sql), True
        # Only an exact condition can be negated; the arguments of any other one are removed.
        del self.args.values[before:]
        return TRUE, False

    def _column(self, field: Field | None, op: str, value: Value) -> str:
        """The condition for an operator on a declared column, or on the version."""
        column = f"t.{VERSION}" if field is None else f"t.{quoted(field.name)}"
        kind = "integer" if field is None else field.type
        null = None
        if field is not None and field.name != self._collection.key:
            null = f"({column} IS NULL AND {self._dialect.has_overflow(field.name)})"
        if op == "exists":
            exists = TRUE if null is None else f"({column} IS NOT NULL OR {null})"
            return exists if value is True else _not(exists)
        if op == "eq":
            return self._one_of(column, kind, [value], null)
        if op == "in":
            return self._one_of(column, kind, cast("list[Value]", value), null)
        if op == "between":
            low, high = cast("list[Value]", value)
            return f"({self._range(column, kind, 'gte', low)} AND {self._range(column, kind, 'lte', high)})"
        if op in _COMPARE:
            return self._range(column, kind, op, value)
        if kind not in ("text", "timestamp") or not isinstance(value, str):
            return FALSE
        if op == "contains":
            return self._dialect.contains_string(column, self.args.add(value, kind))
        return self._begins_with(column, kind, value)

    def _one_of(self, column: str, kind: Kind, values: list[Value], null: str | None) -> str:
        comparable = [
            converted for each in values if (converted := _column_value(kind, each)) is not None
        ]
        tests = []
        if null is not None and None in values:
            tests.append(null)
        if comparable:
            short = self._shortened(column, kind)
            if len(comparable) == 1:
                parameter = self.args.add(comparable[0], kind)
                test = f"{column} = {parameter}"
                if short is not None:
                    # An index contains only the prefix; the whole string decides.
                    test = f"({short} = {self._dialect.index_prefix(parameter)} AND {test})"
            else:
                test = self._dialect.one_of(column, comparable, kind, self.args)
                if short is not None:
                    prefixes = [cast("str", each)[:SHORT] for each in comparable]
                    indexed = self._dialect.one_of(short, prefixes, kind, self.args)
                    test = f"({indexed} AND {test})"
            tests.append(test)
        return f"({' OR '.join(tests)})" if len(tests) > 1 else tests[0] if tests else FALSE

    def _range(self, column: str, kind: Kind, op: str, value: Value) -> str:
        if not _comparable(kind, value):
            return FALSE
        if kind == "integer" and isinstance(value, float):
            bound = _integer_bound(op, value)
            if isinstance(bound, bool):
                return f"{column} IS NOT NULL" if bound else FALSE
            op, value = bound
        parameter = self.args.add(value, kind)
        test = f"{column} {_COMPARE[op]} {parameter}"
        short = self._shortened(column, kind)
        if short is not None:
            inclusive = "<=" if op.startswith("lt") else ">="
            test = f"({short} {inclusive} {self._dialect.index_prefix(parameter)} AND {test})"
        return test

    def _begins_with(self, column: str, kind: Kind, prefix: str) -> str:
        if not prefix:
            return f"{column} IS NOT NULL"
        above = _upper_bound(prefix)
        low = self._range(column, kind, "gte", prefix)
        return low if above is None else f"({low} AND {self._range(column, kind, 'lt', above)})"

    def _shortened(self, column: str, kind: Kind) -> str | None:
        """The prefix of a column that an index contains; None if it contains the whole value."""
        if kind != "text" or column in self._table.whole:
            return None
        return self._dialect.index_prefix(column)

    # -- order and position ------------------------------------------------------------------

    def sort_key(self, order: Order) -> _SortKey | None:
        """How SQL sorts by a key of the order; None if it cannot."""
        name = cast("str", order.path[0])
        field = self._collection.fields.get(name)
        if (field is not None and field.type == "json") or (field is None and name != VERSION):
            base = f"t.{DOC}" if field is None else f"t.{quoted(name)}"
            steps = order.path if field is None else order.path[1:]
            part = self._dialect.json_order(base, steps, self.args)
            return None if part is None else _SortKey(part, None, is_key=False)
        if len(order.path) > 1:
            return _SortKey(None, None, is_key=False)  # missing in every row: all are equal
        if field is None:
            return _SortKey(SortPart(f"t.{VERSION}"), _VERSION_FIELD, is_key=False)
        column = f"t.{quoted(name)}"
        if name == self._collection.key:
            return _SortKey(SortPart(column), field, is_key=True)
        part = SortPart(column, nullable=True, null=self._dialect.has_overflow(name))
        return _SortKey(part, field, is_key=False)

    def order_by(self, keys: Sequence[tuple[Order, _SortKey]]) -> str:
        parts = []
        for order, key in keys:
            if key.part is not None:
                parts.append(self._dialect.ordered(key.part, descending=order.descending))
        if not any(key.is_key for _, key in keys):
            parts.append(f"t.{self._table.key}")
        return ", ".join(parts)

    def after(
        self,
        keys: Sequence[tuple[Order, _SortKey]],
        values: Sequence[Value | Missing],
        entity_id: str,
    ) -> list[str]:
        """The conditions of the rows after a position, to be joined by AND."""
        after_sql = FALSE
        if not any(key.is_key for _, key in keys):
            after_sql = f"t.{self._table.key} > {self.args.add(entity_id, 'text')}"
        first: list[str] = []
        pairs = list(zip(keys, values, strict=True))
        for number, ((order, key), value) in reversed(list(enumerate(pairs))):
            if key.part is None:
                continue
            if key.field is None:
                tests = self._compare_json(key.part, value)
            else:
                tests = self._compare_column(key.part, key.field, value)
            less, equal, greater = tests
            later = less if order.descending else greater
            # The nested condition comes first: see `_deepest_first`.
            after_sql = f"(({after_sql} AND {equal}) OR {later})"
            if number == 0 and isinstance(value, str | int | float) and later != FALSE:
                # A redundant condition on the first key alone, so that an index scan can start there.
                first = [f"({later} OR {equal})"]
        return [*first, after_sql]

    def _compare_json(self, part: SortPart, value: Value | Missing) -> tuple[str, str, str]:
        """The conditions that a row sorts before, equal to, and after a value."""
        column = part.sql
        if value is MISSING:
            return FALSE, f"{column} IS NULL", f"{column} IS NOT NULL"
        parameter = self.args.add(self._dialect.order_argument(value), "sort")
        return (
            f"({column} IS NULL OR {column} < {parameter})",
            f"{column} = {parameter}",
            f"{column} > {parameter}",
        )

    def _compare_column(
        self, part: SortPart, field: Field, value: Value | Missing
    ) -> tuple[str, str, str]:
        column, null = part.sql, part.null or FALSE
        missing = f"({column} IS NULL AND NOT {null})" if part.nullable else FALSE
        is_null = f"({column} IS NULL AND {null})" if part.nullable else FALSE
        not_null = f"{column} IS NOT NULL" if part.nullable else TRUE
        if value is MISSING:
            return FALSE, missing, f"({is_null} OR {not_null})"
        if value is None:
            return missing, is_null, not_null
        if not _comparable(field.type, value) or (
            isinstance(value, float) and field.type == "integer"
        ):
            # No row of this store has such a value: the cursor is forged.
            return FALSE, FALSE, FALSE
        parameter = self.args.add(value, field.type)
        less = (
            f"({column} IS NULL OR {column} < {parameter})"
            if part.nullable
            else f"{column} < {parameter}"
        )
        return less, f"{column} = {parameter}", f"{column} > {parameter}"


SHORT: Final = 256
"""The number of characters of a string that an index contains if it cannot contain the whole string."""


def _not(sql: str) -> str:
    return FALSE if sql == TRUE else TRUE if sql == FALSE else f"({sql}) IS NOT TRUE"


# The stack of SQLite's parser has 100 entries, and every open parenthesis keeps the terms before it on
# that stack. SQLite also refuses expressions more than 1,000 levels deep, and treats 1,000 terms in
# a row as such an expression.
_MAX_TERMS: Final = 16


def _joined(operator: str, terms: Sequence[str]) -> str:
    """Terms joined by AND or OR; many terms are nested in groups."""
    while len(terms) > _MAX_TERMS:
        groups = [terms[start : start + _MAX_TERMS] for start in range(0, len(terms), _MAX_TERMS)]
        terms = [f"({operator.join(each)})" if len(each) > 1 else each[0] for each in groups]
    return operator.join(terms)


def _deepest_first(parts: Sequence[Filter]) -> Sequence[Filter]:
    """Sort parts so that as few terms as possible precede the most deeply nested parentheses."""
    return sorted(parts, key=_depth, reverse=True)


def _depth(where: Filter) -> int:
    if isinstance(where, Comparison):
        return 0
    parts = (where.part,) if isinstance(where, Not) else where.parts
    return 1 + max(map(_depth, parts), default=0)


def _comparable(kind: Kind, value: Value) -> bool:
    """Whether a value has a type with which values of a column can be compared."""
    if kind in ("text", "timestamp"):
        return isinstance(value, str)
    if kind == "boolean":
        return isinstance(value, bool)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _column_value(kind: Kind, value: Value) -> Value:
    """The value of a column that equals an operand; None if no value of the column can."""
    if not _comparable(kind, value):
        return None
    if kind == "integer" and isinstance(value, float):
        whole = value.is_integer() and INT_MIN <= value <= INT_MAX
        return int(value) if whole and INT_MIN <= int(value) <= INT_MAX else None
    return value


def _integer_bound(op: str, value: float) -> tuple[str, int] | bool:
    """The comparison with an integer that is equivalent to one with a float, or its result if it is the
    same for every integer."""
    below = op.startswith("lt")
    if value.is_integer():
        whole = int(value)
    else:
        # x < 1.5 and x <= 1.5 are equivalent to x <= 1, and x > 1.5 to x >= 2.
        op = "lte" if below else "gte"
        whole = math.floor(value) if below else math.ceil(value)
    if whole > INT_MAX:
        return below
    if whole < INT_MIN:
        return not below
    return op, whole


def _upper_bound(prefix: str) -> str | None:
    """The least string, by code point, above all strings with a prefix; None if there is none."""
    while prefix:
        last = ord(prefix[-1])
        if last < 0x10FFFF:
            return prefix[:-1] + chr(0xE000 if last == 0xD7FF else last + 1)
        prefix = prefix[:-1]
    return None
