"""Compiles a query to a SELECT.

A condition is true, false or NULL, and a WHERE treats false and NULL alike. A negation is therefore
written as `IS NOT TRUE`, which is true for both. If SQL cannot express a condition exactly, the
compiled condition accepts more rows, and the rows are filtered again in Python.

The order is that of the sort terms of each key, then of the id. Where these do not determine the
position of a row, `reading` compares it with its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from hf_async_store.query import (
    MISSING,
    And,
    Comparison,
    CursorPosition,
    Filter,
    Missing,
    Not,
    Order,
    Query,
    compile_filter,
)
from hf_async_store.strategies.sql.grammar import (
    FALSE,
    OPERATORS,
    TRUE,
    Arguments,
    Condition,
    Form,
    SortTerms,
    rank_of,
)
from hf_async_store.values import VERSION, Entity, Value

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.rows import Table

_OPPOSITE: Final = {"ne": "eq", "not_in": "in"}


class Compiled(NamedTuple):
    """A query as SQL.

    Attributes:
        args: the arguments of the statement.
        residual: the condition by which the rows must still be filtered; None if all rows match.
        forms: of the terms by which the statement sorts, for each key of the order. Rows may be in the
            wrong order where they have inexact values. Empty if they cannot.
        limited: the statement applies the limit.
    """

    sql: str
    args: list[object]
    residual: Callable[[Entity], bool] | None
    forms: tuple[Form, ...]
    limited: bool


def compile_query(table: Table, query: Query, *, limited: bool = True) -> Compiled:
    """The SELECT of a query.

    Args:
        limited: whether the statement may apply the limit.
    """
    compiler = _Compiler(table)
    conditions, exact = compiler.conditions(query.where)
    keys = [compiler.key(each) for each in query.order]
    if query.after is not None:
        after, is_exact = compiler.after(keys, query.after)
        conditions += after
        limited = limited and is_exact
    order = compiler.order_by(keys)
    limited = limited and exact and query.limit is not None
    where = _joined(" AND ", conditions) or TRUE
    limit = f" LIMIT {query.limit}" if limited else ""
    return Compiled(
        sql=f"SELECT {table.selected} FROM {table.name} AS t WHERE {where} ORDER BY {order}{limit}",
        args=compiler.args.values,
        residual=None if exact else compile_filter(query.where),
        forms=tuple(key.form or "any" for key in keys) if any(key.form for key in keys) else (),
        limited=limited,
    )


def compile_count(table: Table, query: Query) -> Compiled | None:
    """The SELECT that counts the matches of a query; None if SQL cannot express the filter exactly, or if
    the query has a limit or a position."""
    compiler = _Compiler(table)
    conditions, exact = compiler.conditions(query.where)
    if not exact or query.limit is not None or query.after is not None:
        return None
    where = _joined(" AND ", conditions) or TRUE
    sql = f"SELECT count(*) FROM {table.name} AS t WHERE {where}"
    return Compiled(sql, compiler.args.values, None, (), limited=False)


def paths_in(where: Filter) -> set[tuple[str | int, ...]]:
    """The paths in a filter."""
    if isinstance(where, Comparison):
        return {where.path}
    parts = (where.part,) if isinstance(where, Not) else where.parts
    return set().union(*map(paths_in, parts))


class _Key(NamedTuple):
    """How SQL sorts by one key of an order.

    Attributes:
        form: of the terms; None if the key is a column of its own: the id, or the version.
        is_id: no two rows are equal.
    """

    terms: tuple[str, ...]
    descending: bool
    form: Form | None = None
    is_id: bool = False


class _Compiler:
    def __init__(self, table: Table) -> None:
        self._table = table
        self._grammar = table.grammar
        self.args = Arguments(table.grammar)

    # -- filters -----------------------------------------------------------------------------

    def conditions(self, where: Filter) -> tuple[list[str], bool]:
        """The conditions of a filter, to be joined by AND, and whether they are exact. If not, they accept
        more rows."""
        parts = _deepest_first(where.parts) if isinstance(where, And) else (where,)
        found = [self._filter(each) for each in parts]
        return [each.sql for each in found if each.sql != TRUE], all(each.exact for each in found)

    def _filter(self, where: Filter) -> Condition:
        if isinstance(where, Comparison):
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

    def _comparison(self, path: Sequence[str | int], op: str, value: Value) -> Condition:
        if op in _OPPOSITE:
            before = len(self.args.values)
            return self._opposite(self._comparison(path, _OPPOSITE[op], value), before)
        name = cast("str", path[0])
        if name in (VERSION, self._table.collection.key):
            if len(path) > 1:  # missing in every row
                return Condition(TRUE if op == "exists" and value is False else FALSE)
            return Condition(self._version(op, value) if name == VERSION else self._id(op, value))
        if (op == "in" and not value) or (op == "between" and not _comparable_pair(value)):
            return Condition(FALSE)
        if len(path) == 1 and name in self._table.terms:
            narrowed = self._narrowed(name, op, value)
            if narrowed is not None:
                return narrowed
        before = len(self.args.values)
        test = self._grammar.test(self._grammar.at(path, self.args), op, value, self.args)
        if test.sql == FALSE:
            del self.args.values[before:]  # those of the path
        return test

    def _narrowed(self, name: str, op: str, value: Value) -> Condition | None:
        """A condition on the sort terms of an indexed field; None if they do not help."""
        terms = self._table.terms[name]
        if op == "exists":
            sign = ">" if value else "="
            missing = self._grammar.operand(MISSING, terms.form, self.args)
            return Condition(f"{terms.sql[0]} {sign} {missing[0]}")
        if op in ("eq", "in"):
            found = self._equal(terms, [value] if op == "eq" else cast("list[Value]", value))
        elif op == "between" and _is_ordered(cast("list[Value]", value)[0]):
            low, high = cast("list[str | float]", value)
            parts = [self._bound(name, "gte", low), self._bound(name, "lte", high)]
            joined = " AND ".join(each.sql for each in parts)
            found = Condition(f"({joined})", all(each.exact for each in parts))
        elif op == "begins_with" and value:
            found = self._begins_with(name, cast("str", value))
        elif op in OPERATORS and _is_ordered(value):
            found = self._bound(name, op, cast("str | float", value))
        else:
            return None
        if found is None or found.exact:
            return found
        test = self._grammar.test(self._grammar.at((name,), self.args), op, value, self.args)
        return Condition(f"({found.sql} AND {test.sql})", test.exact)

    def _equal(self, terms: SortTerms, values: Sequence[Value]) -> Condition | None:
        by_rank: dict[int, list[Value]] = {}
        for each in values:
            if isinstance(each, list | dict):
                return None
            by_rank.setdefault(rank_of(each), []).append(each)
        found = [self._grammar.equal(terms, each, self.args) for each in by_rank.values()]
        joined = " OR ".join(each.sql for each in found)
        return Condition(
            f"({joined})" if len(found) > 1 else joined, all(each.exact for each in found)
        )

    def _bound(self, name: str, op: str, value: str | float) -> Condition:
        target = self._grammar.at((name,), self.args)
        return self._grammar.bound(self._table.terms[name], target, op, value, self.args)

    def _begins_with(self, name: str, prefix: str) -> Condition:
        low, above = self._bound(name, "gte", prefix), _upper_bound(prefix)
        if above is None:
            return low
        high = self._bound(name, "lt", above)
        return Condition(f"({low.sql} AND {high.sql})", low.exact and high.exact)

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
        column = self._grammar.version(f"t.{VERSION}")
        if op == "exists":
            return TRUE if value else FALSE
        if op == "in":
            tests = [self._version("eq", each) for each in cast("list[Value]", value)]
            return f"({_joined(' OR ', tests)})" if tests else FALSE
        if op == "between":
            low, high = cast("list[Value]", value)
            return f"({self._version('gte', low)} AND {self._version('lte', high)})"
        if (
            op not in ("eq", *OPERATORS)
            or value is None
            or isinstance(value, bool | str | list | dict)
        ):
            return FALSE
        sign = "=" if op == "eq" else OPERATORS[op]
        return f"{column} {sign} {self._grammar.number(value, self.args)}"

    # -- order and position ------------------------------------------------------------------

    def key(self, order: Order) -> _Key:
        """How SQL sorts by a key of the order."""
        name, down = cast("str", order.path[0]), order.descending
        if name in (VERSION, self._table.collection.key):
            if len(order.path) > 1:  # missing in every row: all are equal
                return _Key((), down)
            is_id = name != VERSION
            return _Key((f"t.{self._table.key if is_id else VERSION}",), down, None, is_id)
        if len(order.path) == 1 and name in self._table.terms:
            terms = self._table.terms[name]
        else:
            terms = self._grammar.terms(self._grammar.at(order.path, self.args))
        return _Key(terms.sql, down, terms.form)

    def _with_id(self, keys: Sequence[_Key]) -> list[_Key]:
        if any(key.is_id for key in keys):
            return list(keys)
        return [*keys, _Key((f"t.{self._table.key}",), descending=False, is_id=True)]

    def order_by(self, keys: Sequence[_Key]) -> str:
        """The terms of the ORDER BY."""
        return ", ".join(
            f"{term} DESC" if key.descending else term
            for key in self._with_id(keys)
            for term in key.terms
        )

    def after(self, keys: Sequence[_Key], position: CursorPosition) -> tuple[list[str], bool]:
        """The conditions of the rows after a position, to be joined by AND, and whether they are exact."""
        pairs: list[tuple[_Key, tuple[str, ...]]] = []
        exact = True
        for key, value in zip(keys, position.values, strict=True):
            exact = key.form is None or self._grammar.exact(value, key.form)
            if key.form is None:
                parameter = self._position(key, value)
                if parameter is None:  # no row has such a value: the cursor is forged
                    return [FALSE], True
                pairs.append((key, parameter))
                continue
            below = not key.descending
            operand = self._grammar.operand(value, key.form, self.args, below=below)
            pairs.append((key, operand))
            if not exact:
                break
        if exact and not any(key.is_id for key in keys):
            [last] = self._with_id(keys)[len(keys) :]
            pairs.append((last, (self.args.add(position.id),)))
        return self._after(pairs, strict=exact), exact

    def _position(self, key: _Key, value: Value | Missing) -> tuple[str, ...] | None:
        if not key.terms:
            return ()
        if key.is_id:
            return (self.args.add(value),) if isinstance(value, str) else None
        return (f"{value}",) if type(value) is int else None

    def _after(self, pairs: Sequence[tuple[_Key, tuple[str, ...]]], *, strict: bool) -> list[str]:
        """Compare rows of terms: at once if all keys have the same direction, else key by key."""
        used = [(key, values) for key, values in pairs if key.terms]
        if len({key.descending for key, _ in used}) == 1:
            terms = [term for key, _ in used for term in key.terms]
            values = [value for _, each in used for value in each]
            sign = "<" if used[0][0].descending else ">"
            return [_compared(terms, sign if strict else f"{sign}=", values)]
        after = FALSE if strict else TRUE
        for key, each in reversed(used):
            later = _compared(key.terms, "<" if key.descending else ">", each)
            equal = _compared(key.terms, "=", each)
            # The nested condition comes first: see `_deepest_first`.
            after = f"(({after} AND {equal}) OR {later})"
        # A redundant condition on the first key alone, so that an index scan can start there.
        key, each = used[0]
        return [_compared(key.terms, "<=" if key.descending else ">=", each), after]


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


def _is_ordered(value: Value) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _kind(value: Value) -> type:
    return float if _is_ordered(value) and not isinstance(value, str) else type(value)


def _comparable_pair(bounds: Value) -> bool:
    """Whether a value can be between two bounds."""
    low, high = cast("list[Value]", bounds)
    return low is not None and _kind(low) is _kind(high)


def _upper_bound(prefix: str) -> str | None:
    """The least string, by code point, above all strings with a prefix; None if there is none."""
    while prefix:
        last = ord(prefix[-1])
        if last < 0x10FFFF:
            return prefix[:-1] + chr(0xE000 if last == 0xD7FF else last + 1)
        prefix = prefix[:-1]
    return None
