"""Queries and their semantics, the same on every engine.

In this order: the functions by which callers specify queries (operators, `path`, `and_`, `or_`,
`not_`, `asc`, `desc`); the classes that engines evaluate (`Filter`, `Order`, `Query`);
`build_query`, which converts the former to the latter; the semantics, with `matches` and `sort_key`
as the reference implementation for every engine; cursors; and `ordered`, for engines that sort in
memory.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import msgspec

from hf_async_store.errors import InvalidCursorError, InvalidQueryError, UnsupportedValueError
from hf_async_store.event_loop import Chunks, computed, pause
from hf_async_store.field_checks import OPERATOR_CALLS, operand_problem, type_of, usual_operands
from hf_async_store.sealed_text import sealed, unsealed
from hf_async_store.values import (
    VERSION,
    Entity,
    Value,
    has_fixed_form,
    join_path,
    normalise,
    parse_timestamp,
    weighed,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence

    from hf_async_store.schema import Collection

# -- how callers specify queries ------------------------------------------------------------

Steps: TypeAlias = "tuple[str | int, ...]"
"""The steps of a path: keys of dicts, and indexes of lists."""

OpName: TypeAlias = Literal[
    "eq",
    "ne",
    "lt",
    "lte",
    "gt",
    "gte",
    "in",
    "not_in",
    "between",
    "exists",
    "contains",
    "begins_with",
    "contains_ignore_case",
    "begins_with_ignore_case",
    "timestamp_lte",
]


class Op(msgspec.Struct, frozen=True):
    """An operator with its operand, as a value in a filter mapping. `build_query` validates it."""

    name: OpName
    operand: object


def eq(value: object) -> Op:
    """Equal, type by type: integers and floats are one type, booleans another. The default.

    `eq(None)` matches null, not a missing field: that is `exists(False)`.
    """
    return Op("eq", value)


def ne(value: object) -> Op:
    """Not `eq`: null, a missing field and values of other types match too."""
    return Op("ne", value)


def lt(value: object) -> Op:
    """Less, within one type. Null, missing and values of other types never match."""
    return Op("lt", value)


def lte(value: object) -> Op:
    """Less or equal, within one type; see `lt`."""
    return Op("lte", value)


def gt(value: object) -> Op:
    """Greater, within one type; see `lt`."""
    return Op("gt", value)


def gte(value: object) -> Op:
    """Greater or equal, within one type; see `lt`."""
    return Op("gte", value)


def between(low: object, high: object) -> Op:
    """From `low` to `high`, inclusive: `gte(low)` and `lte(high)`."""
    return Op("between", (low, high))


def in_(values: Iterable[object]) -> Op:
    """`eq` to one of the values; with no values, it matches nothing."""
    return Op("in", _frozen(values))


def not_in(values: Iterable[object]) -> Op:
    """Not `in_`: null, a missing field and values of other types match too."""
    return Op("not_in", _frozen(values))


def exists(wanted: bool = True) -> Op:
    """The field is present, null or not; with False, it is missing.

    `or_({"done_at": None}, {"done_at": exists(False)})` matches a field without a value in both ways.
    """
    return Op("exists", wanted)


def contains(value: object, *, ignore_case: bool = False) -> Op:
    """A string that contains this string, or a list with an element that is `eq` to this value.

    Args:
        ignore_case: compare strings by their Unicode case folding (`str.casefold`), so that "STRASSE"
            contains "ße"; the value must be a string. No index serves it.
    """
    return Op("contains_ignore_case" if ignore_case else "contains", value)


def begins_with(prefix: str, *, ignore_case: bool = False) -> Op:
    """A string with this prefix. No character is special.

    Args:
        ignore_case: as for `contains`.
    """
    return Op("begins_with_ignore_case" if ignore_case else "begins_with", prefix)


def _frozen(values: object) -> object:
    # An iterator would be exhausted when the operator is used again, and `not_in` of nothing
    # matches everything. Anything else is left unchanged; build_query rejects it with its field.
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | bytearray | Mapping):
        return tuple(values)
    return values


class Path(msgspec.Struct, frozen=True):
    """A path to a value inside an entity, created by `path`."""

    parts: Steps


def path(*parts: str | int) -> Path:
    """A path to a nested value, as a filter key or an order key: `path("disks", 0, "size")`.

    A string selects a key of a dict, a non-negative integer an element of a list. If the path does
    not lead to a value, the value is missing. A plain string instead of a path is the name of a
    declared field; dots in it have no special meaning.

    `path("name")` is the top-level field `name`, declared or not, and can be compared with any value:
    a declared field may hold values of other types, which were stored before it was declared.

    Raises:
        InvalidQueryError: a step is neither a string nor an integer.
    """
    for each in parts:
        _check_step_type(each)
    return Path(parts)


def _check_step_type(part: object) -> None:
    # Checked before `build_query`, because a path is used as a dict key and must be hashable.
    if not isinstance(part, str | int):
        kind = type(part).__name__
        raise InvalidQueryError(f"a step of a path must be a string or an integer, not {kind}")


class Combined(msgspec.Struct, frozen=True):
    """A combination of filters, created by `and_`, `or_` or `not_`. `build_query` validates it."""

    kind: Literal["and", "or", "not"]
    filters: tuple[FilterMap | Combined, ...]


FilterMap: TypeAlias = Mapping[Any, object]
"""Maps a declared field or a `path` to a value, which means equality, or to an operator. All must match.

The type of the keys is not `str | Path`, because type checkers infer `object` for both in one dict.
"""

Filters: TypeAlias = "FilterMap | Combined | None"
"""The `filters` argument of the query methods; None matches all entities."""


def and_(*filters: FilterMap | Combined) -> Combined:
    """All of the filters match. Without filters: everything."""
    return Combined("and", filters)


def or_(*filters: FilterMap | Combined) -> Combined:
    """At least one of the filters matches. Without filters: nothing."""
    return Combined("or", filters)


def not_(filters: FilterMap | Combined) -> Combined:
    """The filter does not match. Plain negation: null, missing and other types match."""
    return Combined("not", (filters,))


class SortKeyInput(msgspec.Struct, frozen=True):
    """A field or path with a direction, created by `asc` or `desc`. `build_query` validates it."""

    name: str | Path
    descending: bool


OrderBy: TypeAlias = "str | Path | SortKeyInput | Sequence[str | Path | SortKeyInput] | None"
"""The `order_by` argument of the query methods; None sorts by id."""


def asc(name: str | Path) -> SortKeyInput:
    """Ascending: missing, null, booleans, numbers, strings, lists, dicts."""
    return SortKeyInput(name, descending=False)


def desc(name: str | Path) -> SortKeyInput:
    """Descending: the reverse of `asc`, so missing comes last."""
    return SortKeyInput(name, descending=True)


# -- the classes that engines evaluate ------------------------------------------------------


class Order(msgspec.Struct, frozen=True):
    """One sort key."""

    path: Steps
    descending: bool = False


class Missing(Enum):
    """The type of `MISSING`: the field does not exist, in contrast to null."""

    # Not a string: as an operand or in an entity it must be rejected like any other object.
    MISSING = object()

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = Missing.MISSING


class Comparison(msgspec.Struct, frozen=True):
    """One operator applied to one path.

    Attributes:
        value: portable. For `in` and `not_in` a list of distinct values in ascending order, for
            `between` the list of the two bounds, for `exists` a bool, for `begins_with` a string, for
            the operators that ignore case a string after `str.casefold`. `timestamp_lte`, of which
            expiry makes use, is no operator of callers: its value is a timestamp in the fixed form, and
            it matches such timestamps alone.
    """

    path: Steps
    op: OpName
    value: Value


class And(msgspec.Struct, frozen=True):
    """Every part matches. Never directly inside another `And`, never with exactly one part."""

    parts: tuple[Filter, ...]


class Or(msgspec.Struct, frozen=True):
    """At least one part matches. Never directly inside another `Or`, never with exactly one part."""

    parts: tuple[Filter, ...]


class Not(msgspec.Struct, frozen=True):
    """The part does not match."""

    part: Filter


Filter: TypeAlias = Comparison | And | Or | Not
EVERYTHING: Final = And(())


class CursorPosition(msgspec.Struct, frozen=True):
    """The position directly after the row with this id and these values at the order's paths."""

    values: tuple[Value | Missing, ...]
    id: str


class Query(msgspec.Struct, frozen=True):
    """A validated query, created by `build_query`.

    Its result is the rows that match `where`, in this order, strictly after `after`, at most
    `limit` of them.

    Attributes:
        order: the sort keys. Ties are broken by id, in the direction of the last sort key, so that an
            index can be read in both directions; without sort keys the rows are sorted by ascending
            id. No path occurs twice, and none follows the key field.
        by_id: the order by id was asked for explicitly, or by a cursor. It matters only to an engine
            whose `default_order` is "none": without it, an empty order there means any order.
        paged: the query reads one page, so its order must be one that a cursor can continue (see
            `Reader.first_page`).
        has_many_values: the filter has so many that working with all of them, for example to compile
            it, takes long for one step of the event loop.
        fields: the top-level fields to return, including the key field and `version`; None is the
            whole entity. The filter and the order may use other fields.
    """

    collection: str
    where: Filter = EVERYTHING
    order: tuple[Order, ...] = ()
    limit: int | None = None
    after: CursorPosition | None = None
    fields: tuple[str, ...] | None = None
    by_id: bool = False
    paged: bool = False
    has_many_values: bool = False

    def with_limit(self, limit: int | None) -> Query:
        """The same query with another limit. Cursors of the two are interchangeable."""
        limit = None if limit is None else min(limit, _MAX_LIMIT)
        return msgspec.structs.replace(self, limit=limit)


class Page(msgspec.Struct, frozen=True):
    """A page of entities, and the cursor of the next page; None on the last."""

    items: list[Entity]
    cursor: str | None


# -- building a query -----------------------------------------------------------------------

# Within these limits every engine can run a query: SQLite's parser allows some 90 open parentheses
# and expressions 1,000 deep, PostgreSQL's protocol 32,767 parameters.

MAX_FILTER_DEPTH: Final = 32
"""The maximum nesting depth of `and_`, `or_` and `not_`."""

MAX_FILTER_TERMS: Final = 1_000
"""The maximum number of comparisons in a filter."""

MAX_FILTER_VALUES: Final = 50_000
"""The maximum number of values in all `in_` and `not_in` lists of a filter together."""

MAX_FILTER_BYTES: Final = 16 * 1024 * 1024
"""The maximum size of the names and values of a filter, measured like the size of entities."""

MAX_PATH_STEPS: Final = 32
"""The maximum number of steps of a path: one more than the deepest value that can be stored has."""

MAX_ORDER_FIELDS: Final = 32
"""The maximum number of sort keys."""

_MANY_VALUES: Final = 1_000
"""With more values than this, a filter is read, planned and compiled in a thread; it takes some 10 ms."""

# No list is that long. In SQLite, greater indexes wrap around to an existing element.
_MAX_INDEX: Final = 2**31 - 1

# Above any number of rows, and an engine can still add one to it.
_MAX_LIMIT: Final = 2**62


def build_query(
    collection: Collection,
    *,
    filters: Filters = None,
    order_by: OrderBy = None,
    limit: int | None = None,
    fields: Iterable[str | Path] | None = None,
    cursor: str | None = None,
    paged: bool = False,
) -> Query:
    """Validate the arguments of a query method and build the query.

    Args:
        filters: a mapping from names or paths, or a combination; None: all rows.
        order_by: `"name"`, `"-name"` for descending, a `path`, `asc(...)` or `desc(...)`, or a
            list of these; None: by id.
        limit: the maximum number of rows.
        fields: the top-level fields to return, as names or paths of one step; the key and `version`
            are always included.
        cursor: the end of the previous page, from `encode_cursor` with the same collection, filters
            and order. The limit and the fields may differ.
        paged: the query reads one page.

    A bare name must be a declared field or `version`, and its operands must be values that the field
    can hold by its type; null is one of them, except in comparisons. A `path` may lead to any field, and
    is compared with any value. The undeclared fields of a collection that is declared `open` are like
    fields of type json.

    Operands are normalised like stored values. If compared with a declared timestamp, a string that
    can be parsed as one is converted to its canonical form; `contains` and `begins_with` take the
    string unchanged.

    Raises:
        InvalidQueryError: a malformed filter, operator, order, limit or field list; the message shows
            how to write what may be meant.
        UnsupportedValueError: an operand that could not be stored.
        InvalidCursorError: an invalid cursor, or the cursor of another query.
    """
    order = None if order_by is None else _order(order_by, collection)
    reader = _FilterReader(collection)
    query = Query(
        collection=collection.name,
        where=EVERYTHING if filters is None else reader.read(filters, 0),
        order=order or (),
        limit=None if limit is None else _limit(limit),
        fields=None if fields is None else _fields(fields, collection),
        by_id=order == () and order_by != [] and order_by != (),
        paged=paged,
        has_many_values=reader.has_many_values,
    )
    if cursor is None:
        return query
    after, by_id = _decode_cursor(query, cursor)
    return msgspec.structs.replace(query, after=after, by_id=by_id)


FOLDED_OPS: Final = ("contains_ignore_case", "begins_with_ignore_case")
"""The operators that ignore case as `str.casefold` does. No database folds case exactly so."""

_TEXT_OPS: Final = ("begins_with", *FOLDED_OPS)
_STRING_OPS: Final = ("contains", *_TEXT_OPS)
_VALUE_OPS: Final = ("eq", "ne", "lt", "lte", "gt", "gte", *_STRING_OPS)
_LIST_OPS: Final = ("in", "not_in")


async def build_large_query(
    collection: Collection, *, filters: Filters = None, **arguments: Any
) -> Query:
    """`build_query`, in a thread if the filter has many values."""
    number = _number_of_values(filters)
    if number <= _MANY_VALUES:
        return build_query(collection, filters=filters, **arguments)
    if number > MAX_FILTER_VALUES:
        raise InvalidQueryError(f"more than {MAX_FILTER_VALUES:,} values in one filter")
    filters = _copied(filters)  # the caller may change its dicts
    return await computed(partial(build_query, collection, filters=filters, **arguments), long=True)


def _number_of_values(filters: object) -> int:
    """The number of values in the lists of a filter, which was not validated.

    0 if it has too many parts, which `build_query` soon refuses: as a part may occur several times, few
    objects can have any number of parts.
    """
    if filters is None:
        return 0
    number = 0
    pending = [filters]
    for _ in range(MAX_FILTER_TERMS * MAX_FILTER_DEPTH):
        if not pending:
            return number
        part = pending.pop()
        if type(part) is dict or isinstance(part, Mapping):
            number += sum([_number_in_list(e) for e in part.values() if isinstance(e, Op)])
        elif isinstance(part, Combined) and isinstance(part.filters, tuple):
            pending += part.filters
    return 0


def _number_in_list(op: Op) -> int:
    return len(op.operand) if op.name in _LIST_OPS and isinstance(op.operand, tuple) else 0


def _copied(filters: Any, depth: int = 0) -> Any:
    if isinstance(filters, Mapping):
        return dict(filters)
    if not isinstance(filters, Combined) or depth > MAX_FILTER_DEPTH:
        return filters
    parts: Any = filters.filters
    if isinstance(parts, tuple):
        parts = tuple([_copied(each, depth + 1) for each in parts])
    return Combined(filters.kind, parts)


class _FilterReader:
    """Validates one filter, and counts what is limited."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._terms = 0
        self._values = 0
        self._bytes = 0

    @property
    def has_many_values(self) -> bool:
        return self._values > _MANY_VALUES

    def read(self, filters: object, depth: int) -> Filter:
        if depth > MAX_FILTER_DEPTH:
            raise InvalidQueryError(f"filters are nested more than {MAX_FILTER_DEPTH} deep")
        if type(filters) is dict or isinstance(filters, Mapping):
            return _joined(And, [self._entry(key, each) for key, each in self._items(filters)])
        if not isinstance(filters, Combined):
            raise InvalidQueryError(
                f"a filter must be a dict of fields, and_, or_ or not_, not {type(filters).__name__}"
            )
        if not isinstance(filters.filters, tuple):
            raise InvalidQueryError(f"{filters.kind} takes filters as its arguments")
        if not filters.filters:
            self._count_term()
        parts = [self.read(each, depth + 1) for each in filters.filters]
        if filters.kind == "not" and len(parts) == 1:
            return Not(parts[0])
        if filters.kind in ("and", "or"):
            return _joined(And if filters.kind == "and" else Or, parts)
        raise InvalidQueryError(f"invalid combination {filters.kind!r} of {len(parts)} filters")

    def _items(self, filters: Mapping[object, object]) -> Iterable[tuple[object, object]]:
        if not filters:
            self._count_term()
        return filters.items()

    def _entry(self, key: object, value: object) -> Comparison:
        """One entry of a filter mapping."""
        self._count_term()
        if type(key) is str and type(value) is str and value.isascii() and "\0" not in value:
            field = self._collection.fields.get(key)
            if field is not None and field.type == "text":
                # The usual filter: the same as below, by a quarter of the calls.
                self._add_size(len(key.encode()) + len(value))
                return Comparison((key,), "eq", value)
        steps = named_steps(key, self._collection)
        self._add_size(sum(len(each.encode()) for each in steps if isinstance(each, str)))
        if not isinstance(value, Op):
            value = Op("eq", value)
        if value.name in _LIST_OPS and isinstance(value.operand, tuple):
            self._values += len(value.operand)
            if self._values > MAX_FILTER_VALUES:
                raise InvalidQueryError(
                    f"{join_path(steps)}: more than {MAX_FILTER_VALUES:,} values in one filter"
                )
        operand = self._operand(value, steps)
        if not isinstance(key, Path) and value.name != "exists":
            self._check_operand(value, steps[0], operand)
        return Comparison(steps, value.name, operand)

    def _count_term(self) -> None:
        self._terms += 1
        if self._terms > MAX_FILTER_TERMS:
            raise InvalidQueryError(f"the filter has more than {MAX_FILTER_TERMS:,} comparisons")

    def _add_size(self, size: int) -> None:
        self._bytes += size
        if self._bytes > MAX_FILTER_BYTES:
            raise InvalidQueryError(f"the filter has more than {MAX_FILTER_BYTES:,} bytes")

    def _operand(self, op: Op, steps: Steps) -> Value:
        """The portable operand of an operator, as `Comparison` describes it."""
        operand = op.operand
        if op.name in _LIST_OPS:
            return self._distinct(op, steps)
        if op.name == "between":
            if not isinstance(operand, tuple) or len(operand) != 2:
                raise _refused(op, steps, "needs two bounds")
            return [self._portable(op, steps, each) for each in operand]
        if op.name == "exists":
            if not isinstance(operand, bool):
                raise _refused(op, steps, f"needs True or False, not {type(operand).__name__}")
            return operand
        if op.name not in _VALUE_OPS:
            raise _refused(op, steps, f"is not an operator; write one of {OPERATOR_CALLS}")
        value = self._portable(op, steps, operand)
        if op.name in _TEXT_OPS and not isinstance(value, str):
            raise _refused(op, steps, f"needs a string, not {type(operand).__name__}")
        return value.casefold() if op.name in FOLDED_OPS and isinstance(value, str) else value

    def _check_operand(self, op: Op, name: str | int, operand: Value) -> None:
        """Check that a declared field can hold an operand."""
        assert isinstance(name, str), "a bare name"
        field_type = type_of(self._collection, name)
        operands = _listed(operand) if op.name in (*_LIST_OPS, "between") else [operand]
        if usual_operands(op.name, field_type, operands):
            return
        for each in operands:
            problem = operand_problem(op.name, field_type, each)
            if problem is not None:
                several = (
                    "" if not isinstance(each, list) else "; for any of several values, in_([...])"
                )
                raise _refused(op, (name,), f"{problem}{several}; path({name!r}) takes any value")

    def _distinct(self, op: Op, steps: Steps) -> list[Value]:
        if not isinstance(op.operand, tuple):
            raise _refused(op, steps, f"needs a list of values, not {type(op.operand).__name__}")
        values = [self._portable(op, steps, each) for each in op.operand]
        by_rank: dict[int, list[Value]] = {}
        for each in values:
            by_rank.setdefault(order_key(each)[0], []).append(each)
        return [each for rank in sorted(by_rank) for each in _in_order(rank, by_rank[rank])]

    def _portable(self, op: Op, steps: Steps, item: object) -> Value:
        if isinstance(item, msgspec.Struct):
            # A combination, a path or an operator, which cannot be an operand.
            raise _refused(op, steps, f"needs a value, not {type(item).__name__}")
        if isinstance(item, AbstractSet):
            raise _refused(
                op, steps, "needs a value, not a set; for any of several values, in_([...])"
            )
        try:
            value, size = weighed(item, steps)
        except UnsupportedValueError:
            value, size = weighed(self._collection.as_stored(steps, item), steps)
        self._add_size(size)
        if isinstance(value, str) and op.name not in _STRING_OPS:
            field = self._collection.field_at(steps)
            if field is not None and field.type == "timestamp":
                return parse_timestamp(value) or value
        return value


def _in_order(rank: int, values: Sequence[Value]) -> list[Value]:
    """The distinct ones of values of one rank, which is the first part of their `order_key`."""
    has_own_order = rank in _OWN_ORDER
    distinct: dict[Any, Value] = {
        each if has_own_order else order_key(each): each for each in values
    }
    keys = list(distinct)
    for start in range(0, len(keys), _RUN_SIZE):
        keys[start : start + _RUN_SIZE] = sorted(keys[start : start + _RUN_SIZE])
    keys.sort()  # merges the runs, in a third of the time that one sort of all would take
    return list(map(distinct.__getitem__, keys))


def _joined(kind: type[And | Or], parts: Iterable[Filter]) -> Filter:
    flat: list[Filter] = []
    for each in parts:
        flat += each.parts if isinstance(each, And | Or) and type(each) is kind else (each,)
    return flat[0] if len(flat) == 1 else kind(tuple(flat))


def conjunction(parts: Iterable[Filter]) -> Filter:
    """The filter that every part matches."""
    return _joined(And, parts)


def named_steps(name: object, collection: Collection) -> Steps:
    """The steps of a path, or of a bare name, which must be declared."""
    if isinstance(name, Path):
        return checked_steps(name.parts)
    if type(name) is str and name in collection.fields:
        return (name,)
    steps = checked_steps((name,))
    type_of(collection, str(steps[0]))
    return steps


def checked_steps(parts: object) -> Steps:
    """The steps of a path, validated."""
    if not isinstance(parts, tuple) or not parts:
        raise InvalidQueryError("a path needs at least one step")
    if len(parts) > MAX_PATH_STEPS:
        raise InvalidQueryError(f"the path has more than {MAX_PATH_STEPS} steps")
    return (_field_name(parts[0]), *map(_step, parts[1:]))


def _field_name(part: object) -> str:
    name = _step(part)
    if not isinstance(name, str) or not name:
        raise InvalidQueryError(f"the first step of a path must be a field name, not {name!r}")
    return name


def _step(part: object) -> str | int:
    if type(part) is int and 0 <= part <= _MAX_INDEX:
        return part
    if not isinstance(part, str):
        raise InvalidQueryError(
            "a field name must be a string, and a list index a non-negative integer"
        )
    try:
        normalise(part)
    except UnsupportedValueError as exc:
        raise InvalidQueryError(f"invalid field name {part!a}") from exc
    return str.__str__(part)


def _refused(op: Op, steps: Steps, problem: str) -> InvalidQueryError:
    return InvalidQueryError(f"{join_path(steps)}: {op.name} {problem}")


def _order(order_by: object, collection: Collection) -> tuple[Order, ...]:
    key_field = collection.key
    if type(order_by) is str:  # the usual order: the same as below, by fewer calls
        down = order_by.startswith("-")
        name = order_by[1:] if down else order_by
        if name in collection.fields and name != key_field:
            return (Order((name,), down),)
    entries = [order_by] if isinstance(order_by, str | Path | SortKeyInput) else order_by
    if not isinstance(entries, list | tuple):
        raise InvalidQueryError(
            "order_by must be a name, a path, asc, desc or a list of these, not "
            f"{type(entries).__name__}"
        )
    if len(entries) > MAX_ORDER_FIELDS:
        raise InvalidQueryError(f"order_by has more than {MAX_ORDER_FIELDS} sort keys")
    by_path: dict[Steps, Order] = {}
    for each in (_order_entry(entry, collection) for entry in entries):
        # A sort key after the id, or after another with the same path, has no effect.
        if (key_field,) not in by_path:
            by_path.setdefault(each.path, each)
    *others, last = by_path.values() if by_path else (Order((key_field,)),)
    if last.path == (key_field,) and last.descending is _ties_descend(others):
        return tuple(others)  # ties are broken like this anyway
    return (*others, last)


def _order_entry(entry: object, collection: Collection) -> Order:
    if isinstance(entry, str):
        entry = desc(entry[1:]) if entry.startswith("-") else asc(entry)
    elif isinstance(entry, Path):
        entry = asc(entry)
    if not isinstance(entry, SortKeyInput) or not isinstance(entry.descending, bool):
        raise InvalidQueryError(
            f'{type(entry).__name__} is not a sort key; write "name", or desc("name") or "-name"'
        )
    return Order(named_steps(entry.name, collection), entry.descending)


def _limit(limit: object) -> int:
    if type(limit) is not int or limit < 0:
        raise InvalidQueryError("limit must be a non-negative integer or None")
    return min(limit, _MAX_LIMIT)


def _fields(fields: object, collection: Collection) -> tuple[str, ...]:
    if not isinstance(fields, list | tuple | AbstractSet):
        raise InvalidQueryError(f"fields must be a list of names, not {type(fields).__name__}")
    names = [_top_level(named_steps(each, collection)) for each in fields]
    return tuple(dict.fromkeys([collection.key, *names, VERSION]))


def _top_level(steps: Steps) -> str:
    name, *inner = steps
    if inner or not isinstance(name, str):
        raise InvalidQueryError(f"fields takes whole fields, not the path {join_path(steps)}")
    return name


# -- semantics: order -----------------------------------------------------------------------

SortKey: TypeAlias = "tuple[Any, ...]"

_OWN_ORDER: Final = (3, 4)
"""The ranks of numbers and strings, which compare and hash as their `order_key` does."""


def order_key(value: Value | Missing) -> SortKey:
    """A key that compares and hashes according to the total order of values.

    Missing, null, booleans, numbers, strings by code point, lists element by element, dicts as
    their sorted (name, value) pairs. Two values have equal keys if and only if they are `eq`.
    """
    kind = type(value)
    if kind is str:
        return 4, value
    if kind is int or kind is float:
        return 3, value
    if value is None:
        return (1,)
    if kind is bool:
        return 2, value
    if isinstance(value, list):
        return 5, tuple(map(order_key, value))
    if isinstance(value, dict):
        return 6, tuple([(name, order_key(value[name])) for name in sorted(value)])
    return (0,)


def sort_key(query: Query, entity_id: str, entity: Entity) -> SortKey:
    """The sort key of a row in the order of a query. No two rows have the same key."""
    return compile_order(query)(entity_id, entity)


def compile_order(query: Query) -> Callable[[str, Entity], SortKey]:
    """`sort_key` for one query, compiled for use with many rows."""
    parts = [(value_reader(each.path), _part_key(each)) for each in query.order]
    tie = _id_key(query)
    if len(parts) == 1:  # the usual case; this takes two thirds of the time of the general code
        [(read, part)] = parts
        if not query.order[0].descending:
            return lambda entity_id, entity: (*part(read(entity)), entity_id)
        return lambda entity_id, entity: (*part(read(entity)), tie(entity_id))

    def key(entity_id: str, entity: Entity) -> SortKey:
        flat: list[Any] = []
        for read, part in parts:
            flat += part(read(entity))
        return (*flat, tie(entity_id))

    return key


def position_key(query: Query, position: CursorPosition) -> SortKey:
    """The `sort_key` of the row that a position follows."""
    pairs = zip(query.order, position.values, strict=True)
    parts = chain.from_iterable(_part_key(order)(value) for order, value in pairs)
    return (*parts, _id_key(query)(position.id))


def _id_key(query: Query) -> Callable[[str], str | bytes]:
    """The key that breaks ties, in the direction of the last sort key."""
    return _flipped if _ties_descend(query.order) else str


def _ties_descend(order: Sequence[Order]) -> bool:
    return bool(order) and order[-1].descending


def _part_key(order: Order) -> Callable[[Value | Missing], SortKey]:
    return _descending if order.descending else order_key


class Desc(msgspec.Struct, frozen=True, gc=False):
    """The key of a list or dict, with the comparison reversed."""

    key: SortKey

    def __lt__(self, other: Desc) -> bool:
        return other.key < self.key


_FLIPPED: Final = bytes(range(255, -1, -1))


def _flipped(text: str) -> bytes:
    # UTF-8 sorts like code points. The final byte exceeds all others: the longer string is first.
    return text.encode().translate(_FLIPPED) + b"\xff"


def _unflipped(key: bytes) -> str:
    return key[:-1].translate(_FLIPPED).decode()


def _descending(value: Value | Missing) -> SortKey:
    """`order_key` reversed. Strings and numbers need no `Desc`, which halves the time of a sort."""
    key = order_key(value)
    if isinstance(value, str):
        return -key[0], _flipped(value)
    if isinstance(value, int | float):
        return -key[0], -value
    return (-key[0], *map(Desc, key[1:]))


def value_reader(steps: Steps) -> Callable[[Entity], Value | Missing]:
    """A function that reads the value at a path."""
    name = steps[0]
    if isinstance(name, str) and len(steps) == 1:
        return lambda entity: entity.get(name, MISSING)

    def read(entity: Entity) -> Value | Missing:
        value: Value | Missing = entity
        for step in steps:
            if isinstance(value, dict) and isinstance(step, str):
                value = value.get(step, MISSING)
            elif isinstance(value, list) and isinstance(step, int) and step < len(value):
                value = value[step]
            else:
                return MISSING
        return value

    return read


# -- semantics: filters ---------------------------------------------------------------------

_Test: TypeAlias = "Callable[[Value | Missing], bool]"

_TESTS_PER_STEP: Final = 30_000
_MIN_ROWS_PER_STEP: Final = 16


def matches(where: Filter, entity: Entity) -> bool:
    """Whether an entity matches a filter. Never raises, whatever portable values are compared."""
    return compile_filter(where)(entity)


def compile_filter(where: Filter) -> Callable[[Entity], bool]:
    """`matches` for one filter, compiled for use with many entities."""
    if isinstance(where, Comparison):
        test = _test(where.op, where.value)
        name = where.path[0]
        if isinstance(name, str) and len(where.path) == 1:
            return lambda entity: test(entity.get(name, MISSING))
        read = value_reader(where.path)
        return lambda entity: test(read(entity))
    if isinstance(where, Not):
        inner = compile_filter(where.part)
        return lambda entity: not inner(entity)
    return _any_or_all([compile_filter(each) for each in where.parts], every=isinstance(where, And))


def rows_per_step(where: Filter, most: int) -> int:
    """How many rows a filter can test in one step of the event loop, at most `most`."""
    return max(_MIN_ROWS_PER_STEP, min(most, _TESTS_PER_STEP // max(1, _number_of_tests(where))))


def _number_of_tests(where: Filter) -> int:
    if isinstance(where, Comparison):
        return 1
    return sum(map(_number_of_tests, (where.part,) if isinstance(where, Not) else where.parts))


def _any_or_all(tests: list[Callable[[Entity], bool]], *, every: bool) -> Callable[[Entity], bool]:
    def decide(entity: Entity) -> bool:
        for test in tests:  # all() and any() over a generator take twice as long
            if test(entity) is not every:
                return not every
        return every

    return decide


def _test(op: OpName, value: Value) -> _Test:
    if op == "eq":
        return _equal(value)
    if op == "in":
        return _one_of(_listed(value))
    if op == "ne" or op == "not_in":
        positive = _test("eq" if op == "ne" else "in", value)
        return lambda actual: not positive(actual)
    if op == "between":
        low, high = _listed(value)
        above, below = _compared(operator.ge, low), _compared(operator.le, high)
        return lambda actual: above(actual) and below(actual)
    if op == "exists":
        return lambda actual: (actual is not MISSING) is value
    if op == "contains":
        return _contains(value)
    if op == "begins_with":
        prefix = str(value)
        return lambda actual: isinstance(actual, str) and actual.startswith(prefix)
    if op in FOLDED_OPS:
        return _folded(op, str(value))
    if op == "timestamp_lte":
        latest = str(value)
        return lambda actual: is_timestamp_up_to(actual, latest)
    return _compared(_COMPARE[op], value)


def _one_of(values: Sequence[Value]) -> _Test:
    if values and all(type(each) is str for each in values):
        strings = frozenset(values)
        return lambda actual: type(actual) is str and actual in strings
    wanted = frozenset(map(order_key, values))
    return lambda actual: order_key(actual) in wanted


def is_timestamp_up_to(value: object, latest: str) -> bool:
    """Whether a value is a timestamp in the fixed form, not later than this one."""
    return isinstance(value, str) and value <= latest and has_fixed_form(value)


def _listed(value: Value) -> list[Value]:
    assert isinstance(value, list), "the operator takes a list"
    return value


_COMPARE: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "lt": operator.lt,
    "lte": operator.le,
    "gt": operator.gt,
    "gte": operator.ge,
}


def _equal(value: Value) -> _Test:
    if isinstance(value, str):
        return partial(operator.eq, value)
    if value is None or isinstance(value, bool):
        return partial(operator.is_, value)
    if isinstance(value, int | float):
        return lambda actual: actual == value and type(actual) is not bool
    key = order_key(value)
    # In Python, [True] == [1]; so `==` is only a fast check that excludes most values.
    return lambda actual: actual == value and order_key(actual) == key


def _compared(compare: Callable[[Any, Any], bool], value: Value) -> _Test:
    """A comparison within the type of `value`; null never matches."""
    types = (int, float) if type(value) in (int, float) else (type(value),)
    if value is None:
        return lambda actual: False
    if isinstance(value, list | dict):
        key = order_key(value)
        return lambda actual: type(actual) in types and compare(order_key(actual), key)
    return lambda actual: type(actual) in types and compare(actual, value)


def _contains(value: Value) -> _Test:
    equal = _equal(value)

    def test(actual: Value | Missing) -> bool:
        if isinstance(actual, list):
            return any(map(equal, actual))
        return isinstance(actual, str) and isinstance(value, str) and value in actual

    return test


def _folded(op: OpName, value: str) -> _Test:
    """The operators that ignore case, for an operand after `str.casefold`."""
    if op == "begins_with_ignore_case":
        return lambda actual: isinstance(actual, str) and actual.casefold().startswith(value)

    def test(actual: Value | Missing) -> bool:
        if isinstance(actual, list):
            return any(isinstance(each, str) and each.casefold() == value for each in actual)
        return isinstance(actual, str) and value in actual.casefold()

    return test


# -- for planners and projections -----------------------------------------------------------


def equality_candidates(where: Filter) -> dict[Steps, list[Value]]:
    """Values for a lookup in an index: by path, a list of values of which every matching row has one.

    They are taken from `eq` and `in`; of two lists for the same path, the shorter one. The filter must
    still be applied to the rows that are read, because it may have other conditions. Also, `eq(1)`
    matches 1.0.
    """
    candidates: dict[Steps, list[Value]] = {}
    for part in where.parts if isinstance(where, And) else (where,):
        if not isinstance(part, Comparison) or part.op not in ("eq", "in"):
            continue
        values = [part.value] if part.op == "eq" else list(_listed(part.value))
        if part.path not in candidates or len(values) < len(candidates[part.path]):
            candidates[part.path] = values
    return candidates


def project(entity: Entity, fields: tuple[str, ...] | None) -> Entity:
    """The `fields` of a query that an entity has; the whole entity if `fields` is None."""
    if fields is None:
        return entity
    return {name: entity[name] for name in fields if name in entity}


def projected(entities: list[Entity], fields: tuple[str, ...] | None) -> list[Entity]:
    """`project` of each entity."""
    return entities if fields is None else [project(each, fields) for each in entities]


# -- cursors --------------------------------------------------------------------------------


class _CursorPayload(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """An encoded position: each value in a list of its own, which is empty for a missing value."""

    values: list[list[Any]]
    id: str
    any_order: bool = False


def position_of(query: Query, entity_id: str, entity: Entity) -> CursorPosition:
    """The position directly after a row, which has at least the fields of the order."""
    values = tuple(value_reader(each.path)(entity) for each in query.order)
    return CursorPosition(values, entity_id)


def encode_cursor(query: Query, entity_id: str, entity: Entity) -> str:
    """The cursor that continues a query after this row.

    Args:
        entity: before projection. The cursor contains, readable, the values that the order uses.
    """
    position = position_of(query, entity_id, entity)
    values = [[] if each is MISSING else [each] for each in position.values]
    any_order = query.paged and not query.order and not query.by_id
    payload = _CursorPayload(values, entity_id, any_order)
    return sealed(msgspec.json.encode(payload), _seal(query))


def _decode_cursor(query: Query, cursor: object) -> tuple[CursorPosition, bool]:
    """The position, and whether the pages without an order of the query are in the order by id."""
    try:
        body = unsealed(cursor, _seal(query), "cursor of another collection, filter or order")
        payload = msgspec.json.decode(body, type=_CursorPayload)
        values = [normalise(each[0]) if each else MISSING for each in payload.values]
        normalise(payload.id)
    except (ValueError, msgspec.MsgspecError, UnsupportedValueError, RecursionError) as exc:
        raise InvalidCursorError("invalid cursor") from exc
    if len(values) != len(query.order) or (query.by_id and payload.any_order):
        raise InvalidCursorError("the cursor belongs to a query with another order")
    by_id = not query.order and not payload.any_order
    return CursorPosition(tuple(values), payload.id), by_id


def _seal(query: Query) -> bytes:
    order = msgspec.json.encode(query.order)
    # JSON contains no NUL, so the concatenation is unambiguous.
    return b"\0".join((query.collection.encode(), fingerprint(query.where), order))


def fingerprint(where: Filter) -> bytes:
    """Bytes that identify a filter, regardless of the order of its parts."""
    if isinstance(where, Comparison):
        triple = (where.path, where.op, where.value)
        return msgspec.json.encode(triple, order="deterministic")
    if isinstance(where, Not):
        return b"not(" + fingerprint(where.part) + b")"
    parts = b",".join(sorted(map(fingerprint, where.parts)))
    return (b"and(" if isinstance(where, And) else b"or(") + parts + b")"


# -- sorting in memory ----------------------------------------------------------------------

# The number of rows sorted in one step (at most twice as many), which takes a few milliseconds.
_RUN_SIZE: Final = 1_000

# The number of rows yielded between two iterations of the event loop, which takes as long.
_ROWS_PER_ITERATION: Final = 500

# For a limit up to this, only the first rows in the order are kept in memory.
_SMALL_LIMIT: Final = 5_000


class _SortRow(msgspec.Struct, gc=False):
    """A row to be sorted. For 100,000 rows as tuples, the garbage collector paused for 100 ms."""

    key: SortKey  # its last part is the id
    entity: Entity


_key_of_row: Final = operator.attrgetter("key")


_EMPTY: Final[Entity] = {}


async def ordered(
    batches: AsyncIterable[Sequence[tuple[str, Entity]]], query: Query, *, keep: bool = True
) -> AsyncGenerator[tuple[str, Entity], None]:
    """Sort matching rows (id, entity) in the order of a query.

    The result starts after the query's `after` and ends at its `limit`. All rows are kept in memory,
    or with a small limit only that number. The event loop is never blocked for long. The caller must
    close `batches`.

    Args:
        keep: keep the entities. If false, each id is returned with an empty entity, so that the number
            of objects that the garbage collector traverses does not grow with the number of rows.
    """
    if query.limit == 0:
        return
    runs = _SortedRuns(query, keep=keep)
    id_of = _unflipped if _ties_descend(query.order) else str
    async for batch in batches:
        for start in range(0, len(batch), _RUN_SIZE):
            if runs.add(batch[start : start + _RUN_SIZE]):
                await pause()
    async for rows in Chunks(islice(runs.merged(), query.limit), _ROWS_PER_ITERATION):
        for row in rows:
            yield id_of(row.key[-1]), row.entity
    async for _ in Chunks(runs.discarded(), 1):
        pass


class _SortedRuns:
    """The rows after the query's position in sorted runs; with a small limit, one run of the first rows."""

    def __init__(self, query: Query, *, keep: bool) -> None:
        self._key_of = compile_order(query)
        self._after = None if query.after is None else position_key(query, query.after)
        small = query.limit is not None and query.limit <= _SMALL_LIMIT
        self._limit = query.limit if small else None
        self._keep = keep
        # Tuples, which the garbage collector does not traverse if they contain only such structs.
        self._runs: list[tuple[_SortRow, ...]] = []
        self._waiting: list[_SortRow] = []

    def add(self, batch: Sequence[tuple[str, Entity]]) -> bool:
        """Add rows; returns whether a run was sorted, which takes some time."""
        rows = [
            _SortRow(self._key_of(entity_id, entity), entity if self._keep else _EMPTY)
            for entity_id, entity in batch
        ]
        after = self._after
        self._waiting += rows if after is None else [row for row in rows if row.key > after]
        if len(self._waiting) < _RUN_SIZE:
            return False
        self._sort_waiting()
        return True

    def _sort_waiting(self) -> None:
        rows, self._waiting = self._waiting, []
        if self._limit is not None and self._runs:
            first = list(self._runs.pop())
            if len(first) == self._limit:
                last_key = first[-1].key
                rows = [row for row in rows if row.key < last_key]
            rows = first + rows
        rows.sort(key=_key_of_row)
        self._runs.append(tuple(rows[: self._limit]))

    def merged(self) -> Iterable[_SortRow]:
        """All rows in order."""
        self._sort_waiting()
        return heapq.merge(*self._runs, key=_key_of_row)

    def discarded(self) -> Iterator[None]:
        """Releases one run at a time: for 100,000 rows, releasing all at once takes 50 ms."""
        while self._runs:
            self._runs.pop()
            yield
