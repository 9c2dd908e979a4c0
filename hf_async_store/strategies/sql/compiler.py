"""Compiles a query to a SELECT.

A field with a key column is compared and sorted by its `sort_bytes`; any other path by expressions of the
document. A condition is true, false or NULL, and a WHERE treats false and NULL alike. A negation is
therefore written as `IS NOT TRUE`, which is true for both. If SQL cannot express a condition exactly, the
compiled condition accepts more rows, and the rows are filtered again in Python.

The bytes of a long string, a list or a dict do not determine its place. Rows whose sort keys begin with
the same such values are a group: SQL returns them next to each other, and `reading` sorts them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from hf_async_store.query import (
    FOLDED_OPS,
    And,
    Comparison,
    Filter,
    Missing,
    Not,
    OpName,
    Order,
    Query,
    compile_filter,
    rows_per_step,
)
from hf_async_store.sort_bytes import is_exact, ranges, sort_bytes
from hf_async_store.strategies.sql.grammar import (
    FALSE,
    OPERATORS,
    ROWS_PER_STEP,
    TRUE,
    Arguments,
    Compiled,
    Condition,
)
from hf_async_store.strategies.sql.names import key_column, quoted
from hf_async_store.values import VERSION, Value

if TYPE_CHECKING:
    from hf_async_store.lifetimes import Lifetime
    from hf_async_store.sort_bytes import ByteRange
    from hf_async_store.strategies.sql.rows import Table

_OPPOSITE: Final = {"ne": "eq", "not_in": "in"}
_KNOWN: Final = frozenset(
    {
        *_OPPOSITE,
        *OPERATORS,
        "eq",
        "in",
        "between",
        "exists",
        "contains",
        "begins_with",
        "timestamp_lte",
    }
)
"""The operators that SQL can express; the rows are filtered in Python by all others."""
SHORT: Final = 63
"""A string of at most this many characters is always exact."""


def compile_query(
    table: Table,
    query: Query,
    *,
    group: Sequence[Value | Missing] | None = None,
    args: Arguments | None = None,
    also: Callable[[], str] | None = None,
    prefix: Sequence[str] = (),
    selected: str | None = None,
    in_order: bool = True,
) -> Compiled:
    """The SELECT of a query.

    If the query's position is in a group, the statement returns the rows after that group.

    Args:
        group: only the rows of a group, whose sort keys begin with these values: see `group_of`.
        args: those of the statement so far.
        also: adds a further condition to them, which is not in `Compiled.where`.
        prefix: fields that are compared for equality. They are compared as ranges, and come first in the
            order, so that no other index has this order: see `index_order`.
        selected: what the statement returns, instead of `Table.selected`.
        in_order: the rows are sorted.
    """
    compiler = _Compiler(table, args, prefix)
    descending = bool(query.order) and query.order[-1].descending
    first = [Order((each,), descending) for each in prefix]
    keys = [compiler.key(each) for each in (*first, *query.order)]
    conditions, exact = compiler.conditions(query.where)
    if group is not None:
        pairs = zip(keys, group, strict=False)
        conditions += [each for key, value in pairs for each in compiler.equal(key, value)]
    elif query.after is not None:
        values = group_of(table, query.order, query.after.values)
        conditions += compiler.after(keys, values or [*query.after.values, query.after.id])
    where = _all(conditions)
    filtered = where if also is None else _all([*conditions, also()])
    limited = exact and group is None and query.limit is not None
    order = ", ".join(
        f"{term} DESC" if key.descending else term
        for key in _with_id(table, keys)
        for term in key.terms
    )
    sorted_by = f"ORDER BY {order}" if in_order else ""
    return Compiled(
        f"SELECT {selected or table.selected} FROM {table.name} AS t WHERE {filtered} "
        + sorted_by
        + (f" LIMIT {query.limit}" if limited else ""),
        compiler.args.values,
        None if exact else compile_filter(query.where),
        limited,
        ROWS_PER_STEP if exact else rows_per_step(query.where, ROWS_PER_STEP),
        where,
    )


def compile_first_by_id(table: Table, query: Query, compiled: Compiled, most: int) -> Compiled:
    """The matches of a query in the order of ids, among the first rows in that order.

    Args:
        compiled: the query.
        most: how many rows are read.
    """
    key, args = table.key, list(compiled.args)
    # An id is a text, which is greater than any other text but '', and less than any blob.
    direction, after, until, end = "", ">", "<=", "x''"
    if query.order and query.order[0].descending:
        direction, after, until, end = " DESC", "<", ">=", "''"
    position = "TRUE"
    if query.after is not None:
        args.append(query.after.id)
        position = f"{key} {after} {table.grammar.parameter(len(args), 'text')}"
    last = (
        f"SELECT {key} FROM {table.name} WHERE {position} "
        f"ORDER BY {key}{direction} LIMIT 1 OFFSET {most - 1}"
    )
    sql = (
        f"SELECT {table.selected} FROM {table.name} AS t WHERE {position} "
        f"AND {key} {until} coalesce(({last}), {end}) "
        f"AND ({compiled.where}) IS TRUE "  # so that no index is used for it
        f"ORDER BY {key}{direction} LIMIT {query.limit}"
    )
    return compiled._replace(sql=sql, args=args)


def compile_count(table: Table, query: Query) -> Compiled:
    """The SELECT that counts the matches of a filter, exactly if it has no residual condition."""
    compiler = _Compiler(table)
    conditions, exact = compiler.conditions(query.where)
    sql = f"SELECT count(*) FROM {table.name} AS t WHERE {_all(conditions)}"
    return Compiled(sql, compiler.args.values, None if exact else compile_filter(query.where))


class LivingConditions:
    """The conditions that rows have not expired, for statements that write.

    Args:
        first: the number of the parameter of the first argument.

    Attributes:
        arguments: of all conditions, in order. The conditions do not depend on the time; these do.
    """

    def __init__(self, first: int) -> None:
        self._before = first - 1
        self.arguments: list[object] = []

    @staticmethod
    def are_exact(table: Table, lifetime: Lifetime) -> bool:
        """Whether SQL can express them."""
        return _Compiler(table).conditions(lifetime.over())[1]

    def of(self, table: Table, lifetime: Lifetime) -> str:
        """The condition that the entity of the row `t` has not expired."""
        compiler = _Compiler(table)
        compiler.args.values = [None] * self._before + self.arguments
        conditions, _ = compiler.conditions(Not(lifetime.over()))
        self.arguments = compiler.args.values[self._before :]
        return f"({_all(conditions)})"


def group_of(
    table: Table, order: Sequence[Order], values: Sequence[Value | Missing]
) -> list[Value | Missing] | None:
    """The values that a row has in common with the rows of its group, up to the first inexact one.

    None if the values determine the place of the row, up to its id.

    Args:
        values: of the row, at the paths of the order.
    """
    for number, (key, value) in enumerate(zip(order, values, strict=True), 1):
        kind = type(value)
        if kind is str:
            inexact = len(cast("str", value)) > SHORT and not is_exact(sort_bytes(value))
            if inexact and key.path != (table.key_field,):
                return list(values[:number])
        elif kind is list or kind is dict:
            return list(values[:number])
    return None


def paths_in(where: Filter) -> set[tuple[str | int, ...]]:
    """The paths in a filter."""
    if isinstance(where, Comparison):
        return {where.path}
    parts = (where.part,) if isinstance(where, Not) else where.parts
    return set().union(*map(paths_in, parts))


class _Key(NamedTuple):
    """How SQL sorts by one key of an order.

    Attributes:
        column: it is the id, or the version; None: any other value.
    """

    terms: tuple[str, ...]
    descending: bool
    column: str | None = None
    by_bytes: bool = False


class _Compiler:
    def __init__(
        self, table: Table, args: Arguments | None = None, prefix: Sequence[str] = ()
    ) -> None:
        self._table = table
        self._grammar = table.grammar
        self._prefix = prefix
        self.args = args or Arguments(table.grammar)

    # -- filters -----------------------------------------------------------------------------

    def conditions(self, where: Filter) -> tuple[list[str], bool]:
        """The conditions of a filter, to be joined by AND, and whether they are exact. If not, they accept
        more rows."""
        parts = _deepest_first(where.parts) if isinstance(where, And) else (where,)
        found = [self._filter(each) for each in parts]
        return [each.sql for each in found if each.sql != TRUE], all(each.exact for each in found)

    def _filter(self, where: Filter) -> Condition:
        if isinstance(where, Comparison):
            if where.op in FOLDED_OPS:
                return Condition(TRUE, exact=False)
            return self._comparison(where.path, where.op, where.value)
        if isinstance(where, Not):
            before = len(self.args.values)
            return self._opposite(self._filter(where.part), before)
        found = [self._filter(each) for each in _deepest_first(where.parts)]
        is_and = isinstance(where, And)
        if not found:
            return Condition(TRUE if is_and else FALSE)
        joined = _joined(" AND " if is_and else " OR ", [each.sql for each in found])
        return Condition(f"({joined})", all(each.exact for each in found))

    def _opposite(self, condition: Condition, before: int) -> Condition:
        """The negation of a condition, whose arguments begin at `before`."""
        if condition.exact:
            return Condition(_not(condition.sql))
        # Only an exact condition can be negated; the arguments of any other one are removed.
        del self.args.values[before:]
        return Condition(TRUE, exact=False)

    def _comparison(self, path: Sequence[str | int], op: OpName, value: Value) -> Condition:
        if op not in _KNOWN:
            return Condition(TRUE, exact=False)
        if op in _OPPOSITE:
            before = len(self.args.values)
            positive = self._comparison(path, cast("OpName", _OPPOSITE[op]), value)
            return self._opposite(positive, before)
        name = cast("str", path[0])
        if name in (VERSION, self._table.key_field):
            if len(path) > 1:  # missing in every row
                return Condition(TRUE if op == "exists" and value is False else FALSE)
            return Condition(self._version(op, value) if name == VERSION else self._id(op, value))
        found = ranges(op, value)
        if found == []:
            return Condition(FALSE)
        narrowed = self._in_ranges(name, found) if len(path) == 1 else None
        if narrowed is not None and narrowed.exact:
            return narrowed
        before = len(self.args.values)
        test = self._grammar.test(self._grammar.at(path, self.args), op, value, self.args)
        if test.sql == FALSE:
            del self.args.values[before:]  # those of the path
        if narrowed is None:
            return test
        return Condition(f"({narrowed.sql} AND {test.sql})", test.exact)

    def _in_ranges(self, name: str, found: list[ByteRange] | None) -> Condition | None:
        """The condition that the bytes of a field are in some ranges; None if it has no key column."""
        if found is None or name not in self._table.ready:
            return None
        column, add = self._column(name), self.args.add
        exact = all(each.exact for each in found)
        single = [each.only for each in found if each.only is not None]
        if len(found) > 1 and len(single) == len(found):
            return Condition(self._grammar.in_bytes(column, single, self.args), exact)
        equal = "BETWEEN {0} AND {0}" if name in self._prefix else "= {0}"
        parts = [
            f"{column} {equal.format(add(each.low, 'bytes'))}"
            if each.only is not None
            else f"({column} >= {add(each.low, 'bytes')} AND {column} < {add(each.high, 'bytes')})"
            for each in found
        ]
        return Condition(parts[0] if len(parts) == 1 else f"({_joined(' OR ', parts)})", exact)

    def _column(self, name: str) -> str:
        return f"t.{quoted(key_column(name))}"

    def _id(self, op: str, value: Value) -> str:
        """The condition for an operator on the id."""
        column, grammar = f"t.{self._table.key}", self._grammar
        if op == "exists":
            return TRUE if value else FALSE
        if op in ("eq", "in"):
            values = [value] if op == "eq" else cast("list[Value]", value)
            strings = [each for each in values if isinstance(each, str)]
            if len(strings) == 1:
                return f"{column} = {self.args.add(strings[0])}"
            return grammar.in_strings(column, strings, self.args) if strings else FALSE
        if op == "between":
            low, high = cast("list[Value]", value)
            return f"({self._id('gte', low)} AND {self._id('lte', high)})"
        if not isinstance(value, str):
            return FALSE
        if op == "contains":
            return grammar.contains(column, self.args.add(value))
        if op == "begins_with":
            above = _upper_bound(value)
            low = self._id("gte", value)
            return low if above is None else f"({low} AND {self._id('lt', above)})"
        return f"{column} {OPERATORS[op]} {self.args.add(value)}"

    def _version(self, op: str, value: Value) -> str:
        """The condition for an operator on the version."""
        if op == "exists":
            return TRUE if value else FALSE
        if op == "in":
            versions = [
                str(int(each))
                for each in cast("list[Value]", value)
                if type(each) in (int, float) and each == int(cast("float", each))
            ]
            as_text = f"CAST(t.{VERSION} AS text)"
            return self._grammar.in_strings(as_text, versions, self.args) if versions else FALSE
        if op == "between":
            low, high = cast("list[Value]", value)
            return f"({self._version('gte', low)} AND {self._version('lte', high)})"
        if op not in ("eq", *OPERATORS) or type(value) not in (int, float):
            return FALSE
        column, sign = self._grammar.version(f"t.{VERSION}"), OPERATORS.get(op, "=")
        return f"{column} {sign} {self._grammar.number(cast('float', value), self.args)}"

    # -- order and position ------------------------------------------------------------------

    def key(self, order: Order) -> _Key:
        """How SQL sorts by a key of the order."""
        name, down = cast("str", order.path[0]), order.descending
        if name in (VERSION, self._table.key_field):
            if len(order.path) > 1:  # missing in every row: all are equal
                return _Key((), down, "")
            column = self._table.key if name != VERSION else VERSION
            return _Key((f"t.{column}",), down, column)
        if len(order.path) == 1 and name in self._table.ready:
            return _Key((self._column(name),), down, by_bytes=True)
        return _Key(self._grammar.terms(self._grammar.at(order.path, self.args)), down)

    def equal(self, key: _Key, value: Value | Missing) -> list[str]:
        """The condition that the rows have a value, at most one."""
        operands = self._operands(key, value)
        if operands is None:
            return [FALSE]
        return [_compared(key.terms, "=", operands)] if key.terms else []

    def after(self, keys: Sequence[_Key], values: Sequence[Value | Missing]) -> list[str]:
        """The conditions of the rows after a position, to be joined by AND.

        Args:
            values: of the first keys, or of all keys and the id.
        """
        pairs: list[tuple[_Key, tuple[str, ...]]] = []
        for key, value in zip(_with_id(self._table, keys), values, strict=False):
            operands = self._operands(key, value)
            if operands is None:  # no row has such a value: the cursor is forged
                return [FALSE]
            if key.terms:
                pairs.append((key, tuple(map(self._grammar.unknown, operands))))
        if len({key.descending for key, _ in pairs}) == 1:
            terms = [term for key, _ in pairs for term in key.terms]
            operands = tuple(each for _, found in pairs for each in found)
            return [_compared(terms, "<" if pairs[0][0].descending else ">", operands)]
        after = FALSE
        for key, operands in reversed(pairs):
            later = _compared(key.terms, "<" if key.descending else ">", operands)
            equal = _compared(key.terms, "=", operands)
            # The nested condition comes first: see `_deepest_first`.
            after = f"(({after} AND {equal}) OR {later})"
        # A redundant condition on the first key alone, so that an index scan can start there.
        key, operands = pairs[0]
        return [_compared(key.terms, "<=" if key.descending else ">=", operands), after]

    def _operands(self, key: _Key, value: Value | Missing) -> tuple[str, ...] | None:
        """The value of a key's terms as parameters; None if no row can have it."""
        if not key.terms:
            return ()
        if key.column is None:
            if key.by_bytes:
                return (self.args.add(sort_bytes(value), "bytes"),)
            return self._grammar.operands(value, self.args)
        if key.column == VERSION:
            return (f"{value}",) if type(value) is int else None
        return (self.args.add(value),) if isinstance(value, str) else None


def _with_id(table: Table, keys: Sequence[_Key]) -> list[_Key]:
    """The keys, and the id in the direction of the last one, if it is not among them."""
    if any(key.column == table.key for key in keys):
        return list(keys)
    down = bool(keys) and keys[-1].descending
    return [*keys, _Key((f"t.{table.key}",), down, table.key)]


def _compared(terms: Sequence[str], sign: str, values: Sequence[str]) -> str:
    if len(terms) == 1:
        return f"{terms[0]} {sign} {values[0]}"
    return f"({', '.join(terms)}) {sign} ({', '.join(values)})"


def _not(sql: str) -> str:
    return FALSE if sql == TRUE else TRUE if sql == FALSE else f"({sql}) IS NOT TRUE"


# The stack of SQLite's parser has 100 entries, and every open parenthesis keeps the terms before it on
# that stack. SQLite also refuses expressions more than 1,000 levels deep, and treats 1,000 terms in
# a row as such an expression.
_MAX_TERMS: Final = 16


def _all(conditions: Sequence[str]) -> str:
    return _joined(" AND ", conditions) or TRUE


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


def _upper_bound(prefix: str) -> str | None:
    """The least string, by code point, above all strings with a prefix; None if there is none."""
    while prefix:
        last = ord(prefix[-1])
        if last < 0x10FFFF:
            return prefix[:-1] + chr(0xE000 if last == 0xD7FF else last + 1)
        prefix = prefix[:-1]
    return None
