"""Hypothesis strategies of the suite: portable values, entities, filters and orders.

Values and operands are drawn from the same pool, because a filter that never matches tests little.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from hypothesis import strategies as st

from hf_async_store.query import (
    Path,
    SortKeyInput,
    and_,
    asc,
    begins_with,
    between,
    contains,
    desc,
    eq,
    exists,
    gt,
    gte,
    in_,
    lt,
    lte,
    ne,
    not_,
    not_in,
    or_,
    path,
)
from hf_async_store.schema import Collection, Field
from hf_async_store.values import INT_MAX, INT_MIN, MAX_DEPTH

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Strategy: TypeAlias = "st.SearchStrategy[Any]"
Option = TypeVar("Option")
Fields: TypeAlias = "dict[str, object]"

# -- values ---------------------------------------------------------------------------------

NUMBERS: Final = (0, 1, -1, 2, 0.0, -0.0, 1.0, 0.5, -1.5, 0.1, 1e-7, 5e-324, 1.7e308, -1.7e308)
LARGE_NUMBERS: Final = (2**53 - 1, 2**53, 2**53 + 1, float(2**53), -(2**53) - 1, 10**15)
EDGES: Final = (INT_MAX, INT_MIN, float(2**63), -float(2**63), INT_MAX - 1, 1e18, 10**18)

# WORDS are in the order of code points, which differs from the order of UTF-16, of a locale, or of a
# case-insensitive comparison. SIGNS contain the special characters of patterns and paths.
WORDS: Final = (
    "",
    "a",
    "A",
    "ab",
    "B",
    "b",
    "z",
    "é",
    "e\u0301",
    "ß",
    "ss",
    "\uffff",
    "\U00010000",
)
SIGNS: Final = ("%", "_", "a%", "a_b", "\\", "'", '"', "*", "[a]", "$.a", " a", "a ", "1", "true")

SMALL: Final = (None, True, False, *NUMBERS, *LARGE_NUMBERS, *EDGES, *WORDS, *SIGNS)
CONTAINERS: Final[tuple[object, ...]] = (
    [],
    {},
    [1],
    [1.0],
    [True],
    ["a"],
    ["a", "b"],
    ["b", "a"],
    [None],
    [[]],
    [["a"], 1],
    {"a": 1},
    {"a": 1.0},
    {"a": True},
    {"a": None},
    {"b": 1, "a": "x"},
    {"a": {"b": [1, {"c": "a"}]}},
    {"a.b": 1, "0": "a", "": 2},
)

# Hypothesis validates every new strategy object and computes its representation. So the strategies
# below are created once; those that need arguments are functions that take `draw`.

_characters: Final = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
_text: Final = st.text(_characters, max_size=8)
_word: Final = st.sampled_from((*WORDS, *SIGNS))
_number: Final = st.sampled_from((*NUMBERS, *LARGE_NUMBERS, *EDGES))
_integer: Final = st.integers(INT_MIN, INT_MAX)
_float: Final = st.floats(allow_nan=False, allow_infinity=False)
_below: Final = {many: st.integers(0, many - 1) for many in range(1, 21)}


def chance(draw: st.DrawFn, many: int) -> bool:
    """True with probability 1/many. (Not at an end of the range, which Hypothesis prefers.)"""
    return draw(_below[many]) == many // 2


def pick(draw: st.DrawFn, options: Sequence[Option]) -> Option:
    """One of up to 20 options."""
    return options[draw(_below[len(options)])]


def _nested_value(depth: int) -> object:
    """A value of `depth` nested lists and dicts."""
    value: object = None
    for n in range(depth):
        value = [value] if n % 2 else {"a": value}
    return value


pooled: Final[Strategy] = st.sampled_from((*SMALL, *CONTAINERS))
"""A value from the pool: cheap to draw, and likely to be drawn repeatedly."""


@st.composite
def _texts(draw: st.DrawFn) -> str:
    return draw(_text if chance(draw, 3) else _word)


@st.composite
def _numbers(draw: st.DrawFn) -> int | float:
    return draw(pick(draw, (_number, _number, _integer, _float)))


@st.composite
def _integers(draw: st.DrawFn) -> int:
    number = draw(_number)
    return number if isinstance(number, int) else draw(_integer)


@st.composite
def _values(draw: st.DrawFn) -> Any:
    kinds = (pooled, pooled, pooled, pooled, texts, numbers, _lists, _maps, _nested)
    return draw(pick(draw, kinds))


texts: Final = _texts()
numbers: Final = _numbers()
integers: Final = _integers()
_inner: Final[Strategy] = st.deferred(lambda: values)
_lists: Final = st.lists(_inner, max_size=3)
_maps: Final = st.dictionaries(texts, _inner, max_size=3)
_nested: Final = st.sampled_from([_nested_value(3), _nested_value(MAX_DEPTH // 2)])
values: Final[Strategy] = _values()
"""A value from the whole portable domain."""

DEEPEST: Final = _nested_value(MAX_DEPTH)
"""A value with the maximum depth for a field; nested in another value it is too deep."""

STRANGERS: Final = (
    INT_MAX + 1,
    float("inf"),
    float("nan"),
    "a\0",
    "\ud800",
    b"a",
    {1: 2},
    _nested_value(MAX_DEPTH + 1),
    datetime(2001, 1, 1),
)
"""Values outside the portable domain."""

_ZONES: Final = (UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-8)))

# In the past, so that a given timestamp can be distinguished from one that the store has set.
_moments: Final = st.datetimes(datetime(1971, 1, 1), datetime(2009, 12, 31))
_FORMS: Final = ("2001-02-03T04:05:06.000007Z", "2001-02-03", "2001-02-03T04:05:06+02:00")


@st.composite
def _timestamps(draw: st.DrawFn) -> str | datetime:
    if not chance(draw, 3):
        return pick(draw, _FORMS)
    moment = draw(_moments).replace(tzinfo=pick(draw, _ZONES))
    return moment.isoformat() if chance(draw, 2) else moment


timestamps: Final[Strategy] = _timestamps()
"""A timestamp in one of the accepted forms."""

_BY_FIELD_TYPE: Final[Mapping[str, Strategy]] = {
    "text": texts,
    "integer": integers,
    "number": numbers,
    "boolean": st.booleans(),
    "timestamp": timestamps,
    "json": values,
}

# -- entities -------------------------------------------------------------------------------

UNDECLARED: Final = ("extra", "a.b", "$x", "", "0", "order", "é")
"""Names of fields that no collection declares."""


def draw_fields(
    draw: st.DrawFn,
    collection: Collection,
    references: Mapping[str, Sequence[str]],
    *,
    whole: bool,
) -> Fields:
    """Some fields of an entity, without its key.

    Args:
        references: the ids that a reference may contain, by collection.
        whole: include all required fields, as for a whole entity.
    """
    names = [*(collection.required if whole else ()), *draw(_names(collection))]
    return {
        name: _draw_field(draw, collection.fields[name], references)
        if name in collection.fields
        else draw(values)
        for name in dict.fromkeys(names)
    }


@cache
def _names(collection: Collection) -> st.SearchStrategy[list[str]]:
    optional = [each for each in collection.fields if each != collection.key]
    return st.lists(st.sampled_from([*optional, *UNDECLARED]), max_size=4, unique=True)


def _draw_field(draw: st.DrawFn, field: Field, references: Mapping[str, Sequence[str]]) -> Any:
    if not field.required and chance(draw, 4):
        return None
    if field.references is not None:
        return pick(draw, references[field.references])
    return draw(_BY_FIELD_TYPE[field.type])


# -- filters and orders ---------------------------------------------------------------------

Places: TypeAlias = "tuple[str | Path, ...]"
OperandsAt: TypeAlias = "Callable[[str | Path], Strategy]"

_ONE_OPERAND_OPERATORS: Final = (eq, ne, lt, lte, gt, gte, contains)
_place = cache(st.sampled_from)


def draw_filters(draw: st.DrawFn, places: Places, operands: OperandsAt, depth: int = 0) -> Any:
    """Filters of a few comparisons, in any combination.

    Args:
        places: the fields and paths that the filters may use.
        operands: returns the strategy of the values that a field or path is compared with.
    """
    kind = draw(_below[7]) if depth < 2 else 0
    if kind < 4:
        chosen = [draw(_place(places)) for _ in range(draw(_below[3]) or (not depth))]
        return {_unchecked(place): _draw_test(draw, operands(place)) for place in chosen}
    if kind == 6:
        return not_(draw_filters(draw, places, operands, depth + 1))
    parts = [draw_filters(draw, places, operands, depth + 1) for _ in range(draw(_below[4]))]
    return and_(*parts) if kind == 4 else or_(*parts)


def _draw_test(draw: st.DrawFn, operands: Strategy) -> object:
    """A random operator, or an operand without one, which means equality."""
    kind = draw(_below[15])
    if kind < len(_ONE_OPERAND_OPERATORS):
        return _ONE_OPERAND_OPERATORS[kind](draw(operands))
    if kind < 9:
        return between(draw(operands), draw(operands))
    if kind < 11:
        make = in_ if kind == 9 else not_in
        return make([draw(operands) for _ in range(draw(_below[5]))])
    if kind == 11:
        return exists(chance(draw, 2))
    if kind == 12:
        return begins_with(draw(_word), ignore_case=chance(draw, 2))
    if kind == 13:
        return contains(draw(_word), ignore_case=True)
    return draw(operands)


def _unchecked(place: str | Path) -> Path:
    """As a path, a field can be compared with values of any type."""
    return path(place) if isinstance(place, str) else place


def draw_order(draw: st.DrawFn, places: Places) -> list[SortKeyInput]:
    """Up to three keys of an order; without any, the order is by id."""
    return [
        pick(draw, (asc, desc))(_unchecked(draw(_place(places)))) for _ in range(draw(_below[4]))
    ]


def paths_in(*names: str) -> list[Path]:
    """Paths into the dicts and lists of the pool, for these fields."""
    inner: tuple[tuple[str | int, ...], ...] = (
        ("a",),
        ("a.b",),
        ("a", "b"),
        ("a", "b", 1, "c"),
        (0,),
        (1,),
        ("0",),
        (0, 0),
        ("",),
    )
    return [path(name, *steps) for name in names for steps in inner]
