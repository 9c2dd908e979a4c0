"""Cases 102 and 103: groups, sums, offsets, and filters that ignore case."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store.errors import InvalidQueryError, UnsupportedValueError
from hf_async_store.query import (
    MISSING,
    begins_with,
    contains,
    gte,
    not_,
    order_key,
    path,
    value_reader,
)
from hf_async_store.testing.assertions import all_refused_at_once, typed
from hf_async_store.testing.concurrency import answer_of
from hf_async_store.testing.repetitions import sampled

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hf_async_store.query import Missing, Op, Path
    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.values import Entity, Value

_VALUES: Final[tuple[Any, ...]] = (
    None,
    True,
    False,
    0,
    1,
    1.0,
    "1",
    "",
    "B",
    "a",
    -1.5,
    2**53 + 1,
    float(2**53),
    2**63 - 1,
    [1],
    [True],
    {"a": 1.0},
    {},
)
_ITEMS: Final[tuple[dict[str, Any], ...]] = (
    {"count": 1, "ratio": 1, "active": True, "label": "b"},
    {"count": 1, "ratio": 1.0, "active": True, "label": "b"},
    {"count": None, "ratio": 0.1, "active": None, "label": None},
    {"count": 2**63 - 1, "ratio": 1e300, "active": False, "label": "B"},
    {"count": 2**63 - 1, "ratio": -1e300, "active": False, "label": ""},
    {"count": -7, "ratio": 2**53 + 1, "due_at": "2024-05-06T07:08:09Z", "data": {"n": 1}},
    {"due_at": "2024-05-06T09:08:09+02:00", "data": {"n": 2}},
    {},
)
_PLACES: Final[tuple[str | Path, ...]] = (
    "count",
    "ratio",
    "active",
    "label",
    "due_at",
    "item_id",
    "version",
    path("data", "n"),
    path("value"),
)

# Texts, the operator, and which of them match.
_WORDS: Final = (
    "straße",
    "STRASSE",
    "Strasse 1",
    "\u017ftraße",
    "İ",
    "i\u0307",
    "ǅ",
    "a%b",
    None,
    7,
)


async def _save(store: RepositoryInterface) -> list[Entity]:
    await store.create_entities(
        "items",
        [
            *({"item_id": f"v{n}", "value": each} for n, each in enumerate(_VALUES)),
            *({"item_id": f"w{n}", "value": each} for n, each in enumerate(_VALUES[::-1])),
            *({"item_id": f"x{n}", **each} for n, each in enumerate(_ITEMS)),
        ],
    )
    return await _all(store)


async def _all(store: RepositoryInterface) -> list[Entity]:
    return await store.query_entities("items", order_by="item_id")


def _groups(values: Iterable[Value | Missing]) -> list[tuple[Any, int]]:
    """The keys of the groups, with their counts."""
    keys = list(map(order_key, values))
    return [(each, keys.count(each)) for each in sorted(set(keys))]


def _values(entities: list[Entity], place: str | Path) -> list[Value | Missing]:
    read = value_reader((place,) if isinstance(place, str) else place.parts)
    return [read(each) for each in entities]


def _numbers(values: Iterable[Value | Missing]) -> list[int | float]:
    return [each for each in values if isinstance(each, int | float) and type(each) is not bool]


async def _check(
    repository: RepositoryInterface, entities: list[Entity], place: str | Path, filters: Any = None
) -> None:
    """Compare the answers about one field with those computed from the entities."""
    values = _values(entities, place)
    groups = await repository.count_by("items", place, filters)
    assert [(order_key(each), count) for each, count in groups] == _groups(values)
    present = sorted(
        (each for each in values if each is not MISSING and each is not None), key=order_key
    )
    least = await repository.min_of("items", place, filters)
    greatest = await repository.max_of("items", place, filters)
    if not present:
        assert least is None
        assert greatest is None
        return
    assert order_key(least) == order_key(present[0])
    assert order_key(greatest) == order_key(present[-1])


class GroupContract:
    """What groups, sums, extremes, offsets and case-insensitive filters guarantee."""

    # 102 ------------------------------------------------------------------------------------

    async def test_102_groups_and_extremes_equal_those_of_the_stream(
        self, store: StorageStrategy
    ) -> None:
        entities = await _save(store)
        for place in sampled(_PLACES):
            await _check(store, entities, place)
        late = [each for each in entities if str(each["item_id"]) >= "w5"]
        for place in sampled(_PLACES):
            await _check(store, late, place, {"item_id": gte("w5")})
            await _check(store, [], place, {"item_id": "none"})

    async def test_102_types_and_absence_are_distinguished(self, store: StorageStrategy) -> None:
        values = [None, True, 1, 1.0, "1", 1.0, 2.5]
        await store.create_entities(
            "items",
            [{"item_id": "z"}, *({"item_id": f"{n}", "v": each} for n, each in enumerate(values))],
        )
        assert typed([list(each) for each in await store.count_by("items", path("v"))]) == typed(
            [[MISSING, 1], [None, 1], [True, 1], [1, 3], [2.5, 1], ["1", 1]]
        )

    async def test_102_sums_are_exact(self, store: StorageStrategy) -> None:
        entities = await _save(store)
        assert await store.sum_of("items", "count") == 2 * (2**63 - 1) + 1 + 1 - 7
        ratios = _numbers(_values(entities, "ratio"))
        total = await store.sum_of("items", "ratio")
        assert typed(total) == typed(float(sum(map(Fraction, ratios))))
        assert typed(await store.sum_of("items", path("data", "n"))) == typed(3)
        assert typed(await store.sum_of("items", path("no such"))) == typed(0)
        assert typed(await store.sum_of("items", "ratio", {"item_id": "none"})) == typed(0)
        await store.create_entities(
            "items", [{"item_id": f"y{n}", "ratio": 1.7e308} for n in range(2)]
        )
        with pytest.raises(UnsupportedValueError):
            await store.sum_of("items", "ratio")

    async def test_102_in_a_transaction_with_its_own_changes(self, store: StorageStrategy) -> None:
        if store.capabilities.queries_in_transaction == "outside":
            pytest.skip("queries are not part of a transaction")
        await _save(store)
        async with store.begin_transaction() as tx:
            await tx.update_entity("items", "v1", {"value": "changed", "count": 12})
            await tx.delete_entity("items", "x3")
            await tx.create_entity("items", {"item_id": "new", "value": 2**60, "count": 5})
            entities = await _all(tx)
            for place in _PLACES:
                await _check(tx, entities, place)
            assert await tx.sum_of("items", "count") == sum(_numbers(_values(entities, "count")))

    async def test_102_arguments_are_refused_before_io(self, store: StorageStrategy) -> None:
        wrong: Any = 5
        all_refused_at_once(
            InvalidQueryError,
            store.count_by("items", "data"),
            store.min_of("items", "data"),
            store.max_of("items", "data"),
            store.sum_of("items", "data"),
            store.sum_of("items", "label"),
            store.count_by("items", wrong),
            store.count_by("items", path()),
            store.sum_of("items", "count", wrong),
        )

    # 103 ------------------------------------------------------------------------------------

    async def test_103_an_offset_equals_the_slice_of_the_whole(
        self, store: StorageStrategy
    ) -> None:
        await _save(store)
        orders: tuple[Any, ...] = (
            None,
            "item_id",
            "-item_id",
            ["count", "-item_id"],
            path("value"),
        )
        for order_by in orders:
            whole = await store.query_entities("items", order_by=order_by or "item_id")
            for offset in (0, 1, 7, len(whole) - 1, len(whole), len(whole) + 5):
                for limit in (None, 0, 1, 10):
                    end = None if limit is None else offset + limit
                    if not offset and order_by is None:
                        continue  # any order, on some engines
                    found = await store.query_entities(
                        "items", None, order_by, limit, offset=offset, fields=["label"]
                    )
                    expected = [each["item_id"] for each in whole[offset:end]]
                    assert [each["item_id"] for each in found] == expected
        wrong: Any = None
        all_refused_at_once(
            InvalidQueryError,
            store.query_entities("items", offset=-1),
            store.query_entities("items", offset=True),
            store.query_entities("items", offset=wrong),
        )

    @pytest.mark.parametrize("place", ["label", "data", path("extra")], ids=str)
    async def test_103_filters_that_ignore_case(
        self, store: StorageStrategy, place: str | Path
    ) -> None:
        name = place if isinstance(place, str) else str(place.parts[0])
        entities: list[dict[str, Any]] = [
            {"item_id": f"{n}", name: each}
            for n, each in enumerate(_WORDS)
            if name != "label" or each is None or isinstance(each, str)
        ]
        await store.create_entities("items", [*entities, {"item_id": "none"}])
        for part in ("STRASSE", "ß", "straSSe", "i\u0307", "ǆ", "A%", "%", "_", ""):
            folded = part.casefold()
            texts = [each for each in entities if isinstance(each[name], str)]
            matching = [each for each in texts if folded in each[name].casefold()]
            await _check_ignoring_case(store, place, contains(part, ignore_case=True), matching)
            matching = [each for each in texts if each[name].casefold().startswith(folded)]
            await _check_ignoring_case(store, place, begins_with(part, ignore_case=True), matching)

    async def test_103_elements_of_lists_and_invalid_operands(self, store: StorageStrategy) -> None:
        lists = {"a": ["x", "ABC"], "b": ["abcd"], "c": [["abc"]], "d": {"abc": 1}}
        await store.create_entities(
            "items", [{"item_id": each, "data": value} for each, value in lists.items()]
        )
        matching = [{"item_id": "a"}]
        await _check_ignoring_case(store, "data", contains("aBc", ignore_case=True), matching)
        wrong: Any = 5
        all_refused_at_once(
            InvalidQueryError,
            store.query_entities("items", {"data": contains(wrong, ignore_case=True)}),
            store.query_entities("items", {"data": begins_with(wrong, ignore_case=True)}),
            store.query_entities("items", {"data": contains(None, ignore_case=True)}),
        )


async def _check_ignoring_case(
    store: StorageStrategy, place: str | Path, op: Op, matching: list[dict[str, Any]]
) -> None:
    expected = [str(each["item_id"]) for each in matching]
    filters: Any = {place: op}

    async def found() -> list[str]:
        rows = await store.query_entities("items", filters, "item_id", fields=["item_id"])
        return [str(each["item_id"]) for each in rows]

    assert await answer_of(store.capabilities, found, expected) == expected
    assert await store.count_entities("items", filters) == len(expected)
    others = await store.count_entities("items", not_(filters))
    assert others == await store.count_entities("items") - len(expected)
    limited = await store.query_entities("items", filters, "item_id", limit=1)
    assert [each["item_id"] for each in limited] == expected[:1]
