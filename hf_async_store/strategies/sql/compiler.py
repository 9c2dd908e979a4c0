"""From a query to a SELECT that answers exactly as `query.matches` and `query.sort_key` do.

Every test is either true, or false or NULL, which a WHERE takes alike; a negation is written as
`IS NOT TRUE`, so that it is true for both. What an engine cannot say exactly it says too widely,
and the rows are filtered once more here; an order that it does not have is made here.
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
    """The arguments of a statement, as it is put together."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self.values: list[object] = []

    def add(self, value: object, kind: Kind) -> str:
        """A new parameter with this argument."""
        self.values.append(self._dialect.argument(value, kind))
        return self._dialect.parameter(len(self.values), kind)


class SortPart(NamedTuple):
    """An expression to sort by.

    Attributes:
        nullable: NULL stands for a place that is missing.
        null: a condition that tells a null, NULL too, from a missing one.
    """

    sql: str
    nullable: bool = False
    null: str | None = None


class Compiled(NamedTuple):
    """A query as SQL.

    Attributes:
        args: of the statement.
        names: the declared fields that its rows begin with; None is all.
        residual: what its rows must still pass; None if they all match.
        sorted_here: the rows come in no order, from no position on and without a limit.
    """

    sql: str
    args: list[object]
    names: tuple[str, ...] | None
    residual: Callable[[Entity], bool] | None
    sorted_here: bool


def compile_query(table: TableMapping, query: Query, selection: str | None = None) -> Compiled:
    """The SELECT of a query.

    Args:
        selection: what it names, where that is not what `Table.entity` reads.
    """
    compiler = _Compiler(table)
    conditions, exact = compiler.conditions(query.where)
    parts = [compiler.order_of(each) for each in query.order]
    pushed = None not in parts
    order = ""
    if pushed:
        keys = list(zip(query.order, cast("list[_Sorted]", parts), strict=True))
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
    """The SELECT that counts what a query matches; None if not all of its filter can be pushed."""
    compiler = _Compiler(table)
    conditions, exact = compiler.conditions(query.where)
    if not exact or query.limit is not None or query.after is not None:
        return None
    where = _joined(" AND ", conditions) or TRUE
    sql = f"SELECT count(*) FROM {table.name} AS t WHERE {where}"
    return Compiled(sql, compiler.args.values, (), None, sorted_here=False)


def comparisons_in(where: Filter) -> int:
    """How many comparisons a filter is made of."""
    if isinstance(where, Comparison):
        return 1
    if isinstance(where, Not):
        return comparisons_in(where.part)
    return sum(map(comparisons_in, where.parts))


class _Sorted(NamedTuple):
    """What a key of an order sorts by, and what a position's value is to it."""

    part: SortPart | None
    field: Field | None
    is_key: bool


class _Compiler:
    def __init__(self, table: TableMapping) -> None:
        self._table = table
        self._dialect = table.dialect
        self._collection = table.collection
        self.args = Arguments(table.dialect)

    # -- what is selected --------------------------------------------------------------------

    def selected(self, query: Query, *, exact: bool) -> tuple[tuple[str, ...] | None, str]:
        """The declared fields to read, None if all, and the list that a SELECT names."""
        if query.fields is None or not exact:
            return None, self._table.selected
        # A cursor is made of what the order reads, too.
        wanted = {*query.fields, *(cast("str", each.path[0]) for each in query.order)}
        fields = [each for each in self._table.fields if each.name in wanted]
        others = wanted - self._collection.fields.keys() - {VERSION}
        names = tuple(each.name for each in fields)
        return names, self._table.selection(fields, doc=bool(others))

    # -- filters -----------------------------------------------------------------------------

    def conditions(self, where: Filter) -> tuple[list[str], bool]:
        """What must hold, part by part; and whether that is exact, or lets more pass."""
        parts = _deepest_first(where.parts) if isinstance(where, And) else (where,)
        pairs = [self._filter(each) for each in parts]
        return [sql for sql, _ in pairs if sql != TRUE], all(exact for _, exact in pairs)

    def _filter(self, where: Filter) -> tuple[str, bool]:
        if isinstance(where, Comparison):
            return self._comparison(where.path, where.op, where.value)
        if isinstance(where, Not):
            before = len(self.args.values)
            return self._opposite(*self._filter(where.part), before)
        pairs = [self._filter(each) for each in _deepest_first(where.parts)]
        together = all if isinstance(where, And) else any
        if not pairs:
            return (TRUE if together is all else FALSE), True
        word = " AND " if together is all else " OR "
        return f"({_joined(word, [sql for sql, _ in pairs])})", all(exact for _, exact in pairs)

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
        if exact:
            return _not(sql), True
        # Only what is exact can be turned round; the arguments of the rest go.
        del self.args.values[before:]
        return TRUE, False

    def _column(self, field: Field | None, op: str, value: Value) -> str:
        """An operator on a declared column, or on the version."""
        column = f"t.{VERSION}" if field is None else f"t.{quoted(field.name)}"
        kind = "integer" if field is None else field.type
        null = None
        if field is not None and field.name != self._collection.key:
            null = f"({column} IS NULL AND {self._dialect.has_overflow(field.name)})"
        if op == "exists":
            there = TRUE if null is None else f"({column} IS NOT NULL OR {null})"
            return there if value is True else _not(there)
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
            return self._dialect.has_text(column, self.args.add(value, kind))
        return self._begins_with(column, kind, value)

    def _one_of(self, column: str, kind: Kind, values: list[Value], null: str | None) -> str:
        fitting = [fit for each in values if (fit := _fitted(kind, each)) is not None]
        tests = []
        if null is not None and None in values:
            tests.append(null)
        if fitting:
            short = self._shortened(column, kind)
            if len(fitting) == 1:
                parameter = self.args.add(fitting[0], kind)
                test = f"{column} = {parameter}"
                if short is not None:
                    # The same parameter: an index holds the beginning, the text itself decides.
                    test = f"({short} = {self._dialect.index_prefix(parameter)} AND {test})"
            else:
                test = self._dialect.one_of(column, fitting, kind, self.args)
                if short is not None:
                    first = [cast("str", each)[:SHORT] for each in fitting]
                    quick = self._dialect.one_of(short, first, kind, self.args)
                    test = f"({quick} AND {test})"
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
            wide = "<=" if op.startswith("lt") else ">="
            test = f"({short} {wide} {self._dialect.index_prefix(parameter)} AND {test})"
        return test

    def _begins_with(self, column: str, kind: Kind, prefix: str) -> str:
        if not prefix:
            return f"{column} IS NOT NULL"
        above = _after_all_with(prefix)
        low = self._range(column, kind, "gte", prefix)
        return low if above is None else f"({low} AND {self._range(column, kind, 'lt', above)})"

    def _shortened(self, column: str, kind: Kind) -> str | None:
        if kind != "text" or column in self._table.whole:
            return None
        return self._dialect.index_prefix(column)

    # -- order and position ------------------------------------------------------------------

    def order_of(self, order: Order) -> _Sorted | None:
        """What a key of the order sorts by; None if the engine cannot sort by it."""
        name = cast("str", order.path[0])
        field = self._collection.fields.get(name)
        if (field is not None and field.type == "json") or (field is None and name != VERSION):
            base = f"t.{DOC}" if field is None else f"t.{quoted(name)}"
            steps = order.path if field is None else order.path[1:]
            part = self._dialect.json_order(base, steps, self.args)
            return None if part is None else _Sorted(part, None, is_key=False)
        if len(order.path) > 1:
            return _Sorted(None, None, is_key=False)  # missing in every row: all are tied
        if field is None:
            return _Sorted(SortPart(f"t.{VERSION}"), _VERSION_FIELD, is_key=False)
        column = f"t.{quoted(name)}"
        if name == self._collection.key:
            return _Sorted(SortPart(column), field, is_key=True)
        part = SortPart(column, nullable=True, null=self._dialect.has_overflow(name))
        return _Sorted(part, field, is_key=False)

    def order_by(self, keys: Sequence[tuple[Order, _Sorted]]) -> str:
        parts = []
        for order, key in keys:
            if key.part is not None:
                parts.append(self._dialect.ordered(key.part, descending=order.descending))
        if not any(key.is_key for _, key in keys):
            parts.append(f"t.{self._table.key}")
        return ", ".join(parts)

    def after(
        self,
        keys: Sequence[tuple[Order, _Sorted]],
        values: Sequence[Value | Missing],
        entity_id: str,
    ) -> list[str]:
        """The conditions of the rows behind a position."""
        behind = FALSE
        if not any(key.is_key for _, key in keys):
            behind = f"t.{self._table.key} > {self.args.add(entity_id, 'text')}"
        first: list[str] = []
        pairs = list(zip(keys, values, strict=True))
        for number, ((order, key), value) in reversed(list(enumerate(pairs))):
            if key.part is None:
                continue
            if key.field is None:
                tests = self._behind_in_json(key.part, value)
            else:
                tests = self._behind_in_column(key.part, key.field, value)
            less, equal, greater = tests
            later = less if order.descending else greater
            # What is nested stands first: see `_deepest_first`.
            behind = f"(({behind} AND {equal}) OR {later})"
            if number == 0 and isinstance(value, str | int | float) and later != FALSE:
                # Said once more without the rest, so that an index can begin there.
                first = [f"({later} OR {equal})"]
        return [*first, behind]

    def _behind_in_json(self, part: SortPart, value: Value | Missing) -> tuple[str, str, str]:
        """Whether a row comes before, with, or behind a value."""
        column = part.sql
        if value is MISSING:
            return FALSE, f"{column} IS NULL", f"{column} IS NOT NULL"
        there = self.args.add(self._dialect.order_argument(value), "sort")
        return (
            f"({column} IS NULL OR {column} < {there})",
            f"{column} = {there}",
            f"{column} > {there}",
        )

    def _behind_in_column(
        self, part: SortPart, field: Field, value: Value | Missing
    ) -> tuple[str, str, str]:
        column, null = part.sql, part.null or FALSE
        missing = f"({column} IS NULL AND NOT {null})" if part.nullable else FALSE
        is_null = f"({column} IS NULL AND {null})" if part.nullable else FALSE
        some = f"{column} IS NOT NULL" if part.nullable else TRUE
        if value is MISSING:
            return FALSE, missing, f"({is_null} OR {some})"
        if value is None:
            return missing, is_null, some
        if not _comparable(field.type, value) or (
            isinstance(value, float) and field.type == "integer"
        ):
            # No row of this store was ever there: a cursor that somebody made up.
            return FALSE, FALSE, FALSE
        there = self.args.add(value, field.type)
        less = (
            f"({column} IS NULL OR {column} < {there})" if part.nullable else f"{column} < {there}"
        )
        return less, f"{column} = {there}", f"{column} > {there}"


SHORT: Final = 256
"""How many characters of a text an index holds, where it cannot hold all."""


def _not(sql: str) -> str:
    return FALSE if sql == TRUE else TRUE if sql == FALSE else f"({sql}) IS NOT TRUE"


# SQLite's parser keeps what stands before an open parenthesis on a stack of 100, and refuses
# expressions that are 1,000 deep, as which it takes 1,000 terms in a row.
_IN_A_ROW: Final = 16


def _joined(word: str, terms: Sequence[str]) -> str:
    """Terms with AND or OR between them, many of them in groups."""
    while len(terms) > _IN_A_ROW:
        groups = [terms[start : start + _IN_A_ROW] for start in range(0, len(terms), _IN_A_ROW)]
        terms = [f"({word.join(each)})" if len(each) > 1 else each[0] for each in groups]
    return word.join(terms)


def _deepest_first(parts: Sequence[Filter]) -> Sequence[Filter]:
    """So that as little as possible stands before the parentheses that are nested most."""
    return sorted(parts, key=_depth, reverse=True)


def _depth(where: Filter) -> int:
    if isinstance(where, Comparison):
        return 0
    parts = (where.part,) if isinstance(where, Not) else where.parts
    return 1 + max(map(_depth, parts), default=0)


def _comparable(kind: Kind, value: Value) -> bool:
    """Whether a value is of the type that a column compares within."""
    if kind in ("text", "timestamp"):
        return isinstance(value, str)
    if kind == "boolean":
        return isinstance(value, bool)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fitted(kind: Kind, value: Value) -> Value:
    """The value of a column that equals an operand; None if there can be none."""
    if not _comparable(kind, value):
        return None
    if kind == "integer" and isinstance(value, float):
        whole = value.is_integer() and INT_MIN <= value <= INT_MAX
        return int(value) if whole and INT_MIN <= int(value) <= INT_MAX else None
    return value


def _integer_bound(op: str, value: float) -> tuple[str, int] | bool:
    """A comparison of integers that says the same as one with a float; or what all answer."""
    below = op.startswith("lt")
    if value.is_integer():
        whole = int(value)
    else:
        # x < 1.5 and x <= 1.5 both are x <= 1; x > 1.5 is x >= 2.
        op = "lte" if below else "gte"
        whole = math.floor(value) if below else math.ceil(value)
    if whole > INT_MAX:
        return below
    if whole < INT_MIN:
        return not below
    return op, whole


def _after_all_with(prefix: str) -> str | None:
    """The least text, by code point, above all that begin with a prefix; None if there is none."""
    while prefix:
        last = ord(prefix[-1])
        if last < 0x10FFFF:
            return prefix[:-1] + chr(0xE000 if last == 0xD7FF else last + 1)
        prefix = prefix[:-1]
    return None
