"""Cases 65 and 127: queries at and beyond their limits, and arguments of the wrong type.

Within the limits every engine returns the correct result; beyond them all refuse with the same
error, before any I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from hf_async_store.errors import InvalidInputError, InvalidQueryError, StorageError
from hf_async_store.query import (
    MAX_FILTER_BYTES,
    MAX_FILTER_DEPTH,
    MAX_FILTER_TERMS,
    MAX_FILTER_VALUES,
    MAX_ORDER_FIELDS,
    MAX_PATH_STEPS,
    Combined,
    Filters,
    Op,
    Path,
    and_,
    asc,
    between,
    build_query,
    compile_filter,
    contains,
    desc,
    exists,
    gte,
    in_,
    lt,
    ne,
    not_,
    not_in,
    or_,
    path,
    sort_key,
)
from hf_async_store.testing.assertions import all_refused_at_once, refused_at_once
from hf_async_store.testing.concurrency import answer_of
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS
from hf_async_store.testing.repetitions import sampled

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from hf_async_store.query import OrderBy
    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.values import Entity

_ITEMS: Final = next(each for each in CONTRACT_COLLECTIONS if each.name == "items")
_MAX_TERMS: Final = MAX_FILTER_TERMS
_LIST_DEPTH: Final = 25


def _nested_lists(value: object, depth: int) -> object:
    for _ in range(depth):
        value = [value]
    return value


def _entity(number: int) -> dict[str, object]:
    entity: dict[str, object] = {"item_id": f"{number:03}", "extra": number, "text": f"t{number}"}
    if number % 3:
        entity |= {"label": f"n{number}", "count": number, "ratio": number / 7}
    if number % 4 == 1:
        entity["deep"] = _nested_lists({"x": number}, _LIST_DEPTH)
    if number % 4 == 2:
        entity["data"] = _nested_lists(number, _LIST_DEPTH)
    if number % 5 == 0:
        entity |= {f"f{each}": number % (each + 2) for each in range(MAX_ORDER_FIELDS)}
    return entity


def _nested_combinations(depth: int, terms: int) -> Filters:
    """Nested `and_`, `or_` and `not_`, with this depth and number of comparisons."""
    # The innermost dict is no combination, and `not_` has no comparison of its own.
    levels = [each for each in range(depth) if each % 3 != 2]
    per_level, rest = divmod(terms - 1, len(levels))
    inner: Any = {"extra": gte(5)}
    for level in range(depth):
        if level % 3 == 2:
            inner = not_(inner)
            continue
        count = per_level + (rest if level == 0 else 0)
        combine = and_ if level % 3 == 0 else or_
        neutral: Callable[[int], Any] = ne if combine is and_ else lambda value: value
        others = [{"extra": neutral(10_000 + number)} for number in range(count)]
        inner = combine(*others[: count // 2], inner, *others[count // 2 :])
    return cast("Filters", inner)


AT_THE_LIMIT: Final[Mapping[str, Callable[[], Filters]]] = {
    "or of an undeclared field": lambda: or_(
        *({"extra": each} for each in range(20, 20 + _MAX_TERMS))
    ),
    "or of a declared one": lambda: or_(*({"count": each} for each in range(20, 20 + _MAX_TERMS))),
    "or of texts": lambda: or_(*({"label": f"n{each}"} for each in range(20, 20 + _MAX_TERMS))),
    "and": lambda: and_(*({"label": ne(f"n{each}")} for each in range(20, 20 + _MAX_TERMS))),
    "and of paths": lambda: and_(
        *({path("deep", *([0] * (MAX_PATH_STEPS - 1))): ne(each)} for each in range(_MAX_TERMS))
    ),
    "and of long paths of names": lambda: and_(
        *({path("deep", *"x" * (MAX_PATH_STEPS - 1)): exists(False)} for _ in range(_MAX_TERMS))
    ),
    "or of ranges": lambda: or_(
        *({"ratio": between(each, each + 0.5)} for each in range(3, 3 + _MAX_TERMS))
    ),
    "deep": lambda: _nested_combinations(MAX_FILTER_DEPTH, MAX_FILTER_DEPTH),
    "deep and full": lambda: _nested_combinations(MAX_FILTER_DEPTH, _MAX_TERMS),
    "not not": lambda: _nested_nots(MAX_FILTER_DEPTH),
    "in of texts": lambda: {"label": in_(f"n{each}" for each in range(20, 20_020))},
    "in of undeclared texts": lambda: {"text": in_(f"t{each}" for each in range(20, 20_020))},
    "in of ids": lambda: {"item_id": in_(f"{each:03}" for each in range(20, 20_020))},
    "in of integers": lambda: {"count": in_(range(20, 20_020))},
    "in of floats": lambda: {"ratio": in_(each / 7 for each in range(20, 20_020))},
    "in of undeclared numbers": lambda: {"extra": in_(range(20, 20_020))},
    "in of many kinds": lambda: {
        "extra": in_([*range(20, 10_000), *(f"x{each}" for each in range(10_000)), None, [1], {}])
    },
    "not in": lambda: {"text": not_in(f"t{each}" for each in range(20, 20_020))},
    "in of versions": lambda: or_({"extra": 5}, {"version": in_([*range(2, 40_000), 2.0])}),
    "as many values as there may be": lambda: {"extra": in_(range(20, 20 + MAX_FILTER_VALUES))},
    "a path of lists": lambda: {path("data", *([0] * _LIST_DEPTH)): in_([2, 6, 10])},
    "a range at one": lambda: {path("data", *([0] * _LIST_DEPTH)): lt(20)},
    "membership at one": lambda: {path("data", *([0] * (_LIST_DEPTH - 1))): contains(6)},
    "lists and then a name": lambda: {path("deep", *([0] * _LIST_DEPTH), "x"): gte(9)},
    "no such element": lambda: {path("deep", *([0] * _LIST_DEPTH), "x", 0): exists()},
}


def _nested_nots(depth: int) -> Filters:
    inner: Any = {"extra": gte(20)}
    for _ in range(depth):
        inner = not_(inner)
    return cast("Filters", inner)


BEYOND: Final[Mapping[str, Callable[[], Filters]]] = {
    "comparisons of an or": lambda: or_(*({"extra": each} for each in range(_MAX_TERMS + 1))),
    "comparisons of an and": lambda: and_(*({"extra": ne(each)} for each in range(40_000))),
    "comparisons of a map": lambda: {f"x{each}": 1 for each in range(_MAX_TERMS + 1)},
    "empty ones": lambda: or_(*({} for _ in range(_MAX_TERMS + 1))),
    "depth": lambda: _nested_nots(MAX_FILTER_DEPTH + 1),
    "endless depth": lambda: _nested_nots(100_000),
    "values of one in": lambda: {"extra": in_(range(MAX_FILTER_VALUES + 1))},
    "values of several": lambda: and_(
        *({"extra": not_in(range(MAX_FILTER_VALUES // 4))} for _ in range(5))
    ),
    "bytes": lambda: {"text": in_("x" * 2**20 + str(each) for each in range(17))},
    "bytes of names": lambda: {"x" * (MAX_FILTER_BYTES + 1): 1},
    "steps": lambda: {path("data", *([0] * MAX_PATH_STEPS)): 1},
}


class LimitContract:
    """Large and deeply nested queries."""

    # 65 -------------------------------------------------------------------------------------

    async def test_65_filters_at_the_limits(self, store: StorageStrategy) -> None:
        """One test for the queries, because storing the entities takes longer than a query."""
        entities = [_entity(number) for number in range(40)]
        await store.save_entities("items", entities)
        wrong: list[str] = []
        for name, make in sampled(AT_THE_LIMIT.items()):
            filters = make()
            is_match = compile_filter(build_query(_ITEMS, filters=filters).where)
            expected = [each["item_id"] for each in entities if is_match(cast("Entity", each))]
            try:
                ids = await _ids(store, filters)
                count = await store.count_entities("items", filters)
                await store.explain_query("items", filters)
            except StorageError as exc:
                wrong.append(f"{name}: {type(exc).__name__}: {str(exc)[:200]}")
                continue
            if (ids, count) != (expected, len(expected)):
                wrong.append(f"{name}: {count}, {ids}, not {expected}")
        assert wrong == []

    async def test_65_filters_at_the_limits_in_a_transaction(self, store: StorageStrategy) -> None:
        await store.save_entities("items", [_entity(number) for number in range(40)])
        if store.capabilities.queries_in_transaction == "outside":
            return
        filters = AT_THE_LIMIT["deep and full"]()
        expected = await _ids(store, filters)
        async with store.begin_transaction() as tx:
            assert await _ids(tx, filters) == expected

    @pytest.mark.parametrize("direction", [asc, desc])
    async def test_65_an_order_of_the_maximum_number_of_keys(
        self, store: StorageStrategy, direction: Callable[[str], Any]
    ) -> None:
        entities = [_entity(number) for number in range(40)]
        await store.save_entities("items", entities)
        names = ["ratio", "label", *(f"f{each}" for each in range(MAX_ORDER_FIELDS - 2))]
        order = [direction(each) if index % 2 else asc(each) for index, each in enumerate(names)]
        query = build_query(_ITEMS, order_by=order)
        by_key = sorted(
            entities, key=lambda each: sort_key(query, str(each["item_id"]), cast("Entity", each))
        )
        expected = [each["item_id"] for each in by_key]
        await answer_of(store.capabilities, lambda: store.count_entities("items"), 40)
        found: list[object] = []
        cursor = None
        while True:
            page = await store.query_page("items", order_by=order, limit=7, cursor=cursor)
            found += [each["item_id"] for each in page.items]
            cursor = page.cursor
            if cursor is None:
                break
        assert found == expected

    @pytest.mark.parametrize("name", BEYOND)
    async def test_65_filters_beyond_the_limits_are_refused(
        self, store: StorageStrategy, name: str
    ) -> None:
        filters = BEYOND[name]()
        all_refused_at_once(InvalidQueryError, *_queries(store, filters, None))

    async def test_65_orders_beyond_the_limits_are_refused(self, store: StorageStrategy) -> None:
        order = [f"f{each}" for each in range(MAX_ORDER_FIELDS + 1)]
        all_refused_at_once(
            InvalidQueryError,
            store.query_entities("items", order_by=order),
            store.query_page("items", order_by=order),
            store.explain_query("items", order_by=order),
            anext(store.stream_entities("items", order_by=order)),
            store.query_entities("items", order_by=path("x", *([0] * MAX_PATH_STEPS))),
        )

    # 127 ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("timeout", ["1", True, float("nan"), [1], {}], ids=str)
    async def test_127_a_timeout_is_a_number_of_seconds(
        self, store: StorageStrategy, timeout: Any
    ) -> None:
        all_refused_at_once(
            InvalidInputError,
            store.get_entity("items", "a", timeout=timeout),
            store.get_entities("items", ["a"], timeout=timeout),
            store.create_entity("items", {"item_id": "a"}, timeout=timeout),
            store.save_entities("items", [{"item_id": "a"}], timeout=timeout),
            store.update_entity("items", "a", {}, timeout=timeout),
            store.delete_entity("items", "a", timeout=timeout),
            store.query_entities("items", timeout=timeout),
            store.query_page("items", timeout=timeout),
            store.count_entities("items", timeout=timeout),
        )

    async def test_127_invalid_arguments_raise_a_storage_error(
        self, store: StorageStrategy
    ) -> None:
        for invalid in _INVALID_ARGUMENTS:
            for call in _calls(store, invalid):
                name = getattr(call, "__name__", "stream step")
                try:
                    refused_at_once(call, StorageError)
                except AssertionError as exc:
                    raise AssertionError(f"{name} of {invalid!r}: {exc}") from exc


class _Unhashable:
    __hash__ = None  # type: ignore[assignment]  # the purpose of the class

    def __repr__(self) -> str:
        return "an object without a hash"


_INVALID_ARGUMENTS: Final[tuple[Any, ...]] = (
    5,
    1.5,
    True,
    b"x",
    object(),
    _Unhashable(),
    [[]],
    {1: 2},
)
"""Values that are neither a name, an id or a filter, nor a list of these."""


def _calls(store: StorageStrategy, invalid: Any) -> list[Coroutine[Any, Any, object]]:
    """Public calls with one invalid argument."""
    item = {"item_id": "a"}
    other: Any = "1" if invalid == 5 else invalid  # 5 is a version, and a limit
    return [
        store.get_entity(invalid, "a"),
        store.get_entity("items", invalid),
        store.get_entities("items", invalid),
        store.get_entities("items", [invalid]),
        store.create_entity(invalid, item),
        store.create_entity("items", invalid),
        store.create_entities("items", invalid),
        store.create_entities("items", [invalid]),
        store.save_entity("items", invalid),
        store.save_entity("items", item, expected_version=other),
        store.save_entities("items", invalid),
        store.save_entities("items", [item], invalid),
        store.save_entities("items", [item], {"a": other}),
        store.update_entity("items", invalid, {}),
        store.update_entity("items", "a", invalid),
        store.update_entities("items", invalid),
        store.update_entities("items", {"a": invalid}),
        store.delete_entity("items", invalid),
        store.delete_entities("items", invalid),
        store.delete_entities("items", [invalid]),
        store.import_entities("items", invalid),
        store.import_entities("items", [invalid]),
        store.import_entities("items", [{**item, "version": other}]),
        store.modify_entity("items", invalid, lambda entity: entity),
        store.query_entities(invalid),
        store.query_entities("items", invalid),
        store.query_entities("items", {"extra": Op(invalid, 1)}),
        store.query_entities("items", Combined(invalid, ())),
        store.query_entities("items", Combined("and", invalid)),
        store.query_entities("items", Combined("and", (invalid,))),
        store.query_entities("items", order_by=invalid),
        store.query_entities("items", order_by=[invalid]),
        store.query_entities("items", order_by=Path(invalid)),
        store.query_entities("items", order_by=Path((invalid,))),
        store.query_entities("items", limit=other),
        store.query_entities("items", fields=invalid),
        store.query_entities("items", fields=[invalid]),
        store.query_page("items", cursor=invalid),
        store.query_page("items", limit=other),
        store.count_entities("items", invalid),
        store.explain_query("items", invalid),
        anext(store.stream_entities("items", invalid)),
        store.run_transaction(invalid),
    ]


def _queries(
    store: StorageStrategy, filters: Filters, order: OrderBy
) -> list[Coroutine[Any, Any, object]]:
    return [
        store.query_entities("items", filters, order),
        store.query_page("items", filters, order),
        store.count_entities("items", filters),
        store.explain_query("items", filters, order),
        anext(store.stream_entities("items", filters, order)),
    ]


async def _ids(store: RepositoryInterface, filters: Filters) -> list[object]:
    rows = await store.query_entities("items", filters, "item_id")
    return [each["item_id"] for each in rows]
