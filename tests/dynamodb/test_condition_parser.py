"""`query_by_gsi` and `condition_expression`: expressions of DynamoDB, with the field names of callers."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_async_store import (
    HOST_FACTORY,
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidInputError,
    InvalidQueryError,
    UnknownCollectionError,
)
from hf_async_store.strategies.dynamodb.condition_parser import condition, key_condition
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.items import ItemMapping
from hf_async_store.testing.assertions import refused_at_once
from hf_async_store.testing.repetitions import repetitions
from tests.dynamodb.support import store_at

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hf_async_store import DynamoDBStorageStrategy
    from tests.dynamodb.proxy import Proxy

pytestmark = pytest.mark.hf_sampled

GSI = "template_id-created_at-index"


@pytest.fixture
async def store(proxy: Proxy) -> AsyncIterator[DynamoDBStorageStrategy]:
    async with store_at(proxy.url) as store:
        yield store


async def _requests(store: DynamoDBStorageStrategy) -> None:
    await store.create_entities(
        "requests",
        [
            {
                "request_id": f"r{n}",
                "template_id": "t" if n < 6 else "u",
                "created_at": f"2024-01-0{n + 1}T00:00:00Z",
                "status": "PENDING",
            }
            for n in range(8)
        ],
    )


@pytest.mark.parametrize(
    ("condition", "values", "expected"),
    [
        ("template_id = :t", {":t": "t"}, "012345"),
        ("template_id=:t", {"t": "u"}, "67"),
        ("template_id = :t AND created_at > :c", {":t": "t", ":c": "2024-01-05"}, "45"),
        ("template_id = :t and created_at < :c", {":t": "t", ":c": "2024-01-02"}, "0"),
        (
            "template_id = :t AND created_at BETWEEN :a AND :b",
            {":t": "t", ":a": "2024-01-02", ":b": "2024-01-04"},
            "12",
        ),
        ("template_id = :t AND begins_with(created_at, :p)", {":t": "t", ":p": "2024-01-03"}, "2"),
        ("template_id = :t", {":t": "nobody"}, ""),
    ],
)
async def test_query_by_gsi(
    store: DynamoDBStorageStrategy, condition: str, values: dict[str, object], expected: str
) -> None:
    await _requests(store)
    found = await store.query_by_gsi("requests", GSI, condition, values)
    assert [each["request_id"] for each in found] == [f"r{each}" for each in expected]
    assert all(each["version"] == 1 for each in found)
    back = await store.query_by_gsi("requests", GSI, condition, values, limit=2, descending=True)
    assert [each["request_id"] for each in back] == [f"r{each}" for each in expected[::-1][:2]]


async def test_query_by_gsi_on_other_types(store: DynamoDBStorageStrategy) -> None:
    await store.create_entities(
        "items",
        [
            {"item_id": "a", "count": 1, "ratio": 2.0, "active": True},
            {"item_id": "b", "count": 2, "ratio": 2, "active": False},
        ],
    )
    asked: list[tuple[str, object, list[str]]] = [
        ("count", 2, ["b"]),
        ("ratio", 2, ["a", "b"]),
        ("ratio", 2.0, ["a", "b"]),
        ("active", True, ["a"]),
    ]
    for field, value, expected in asked:
        index = "count-due_at-index" if field == "count" else f"{field}-index"
        found = await store.query_by_gsi("items", index, f"{field} = :v", {":v": value})
        assert sorted(str(each["item_id"]) for each in found) == expected


@pytest.mark.parametrize(
    ("index", "condition", "values"),
    [
        ("nothing", "template_id = :t", {":t": "t"}),
        (GSI, "", {}),
        (GSI, "template_id", {}),
        (GSI, "template_id = ", {}),
        (GSI, "template_id = :t", {}),
        (GSI, "template_id = :t", {":t": "t", ":more": 1}),
        (GSI, "status = :t", {":t": "t"}),
        (GSI, "template_id <> :t", {":t": "t"}),
        (GSI, "template_id = 'x' OR 1 = 1", {}),
        (GSI, "template_id = :t; DROP", {":t": "t"}),
        (GSI, "template_id = :t OR created_at = :t", {":t": "t"}),
        (GSI, "template_id = :t", {":t": None}),
        (GSI, "template_id = :t", {":t": ""}),
        (GSI, "template_id = :t", {":t": 5}),
        (GSI, "template_id = :t", 5),
        (GSI, 5, {}),
    ],
)
async def test_a_malformed_key_condition_is_refused_at_once(
    store: DynamoDBStorageStrategy, index: str, condition: Any, values: Any
) -> None:
    refused_at_once(store.query_by_gsi("requests", index, condition, values), InvalidQueryError)


async def test_an_unknown_collection(store: DynamoDBStorageStrategy) -> None:
    refused_at_once(store.query_by_gsi("nowhere", GSI, "a = :a", {":a": 1}), UnknownCollectionError)


ENTITY = {
    "request_id": "r",
    "template_id": "t",
    "status": "PENDING",
    "machine_count": 3,
    "tags": {"owner": {"name": "ann"}, "list": [1, 2]},
    "size": 5,
    "odd name": "x",
    "ratio": 2.0,
}

HOLD = {
    "attribute_exists(request_id) AND version = :v": {":v": 1},
    "status = :s": {":s": "PENDING"},
    "status IN (:a, :b)": {":a": "x", ":b": "PENDING"},
    "NOT status = :s": {":s": "DONE"},
    "(status = :s OR size > :n) AND machine_count BETWEEN :lo AND :hi": {
        ":s": "x",
        ":n": 4,
        ":lo": 3,
        ":hi": 9,
    },
    "tags.owner.name = :n": {":n": "ann"},
    "tags.list[1] = :n": {":n": 2},
    'attribute_exists("odd name") and attribute_not_exists(nothing)': {},
    '"odd name" = :x': {":x": "x"},
    "begins_with(status, :p)": {":p": "PEND"},
    "contains(tags.list, :n)": {":n": 1},
    "size(status) > :n": {":n": 3},
    "size = :n": {":n": 5},
}


@pytest.mark.parametrize("condition", HOLD)
async def test_a_condition_that_holds(store: DynamoDBStorageStrategy, condition: str) -> None:
    await store.create_entity("requests", ENTITY)
    values: dict[str, object] = dict(HOLD[condition])
    version = await store.update_entity(
        "requests",
        "r",
        {"machine_count": 4, "new": 1.0},
        condition_expression=condition,
        expression_values=values or None,
    )
    assert version == 2
    entity = await store.get_entity("requests", "r")
    assert entity is not None
    assert (entity["machine_count"], entity["new"], entity["size"]) == (4, 1.0, 5)


async def test_a_condition_that_does_not_hold(store: DynamoDBStorageStrategy) -> None:
    await store.create_entity("requests", ENTITY)
    with pytest.raises(ConcurrencyConflictError) as caught:
        await store.update_entity(
            "requests",
            "r",
            {"status": "DONE"},
            condition_expression="status = :s",
            expression_values={":s": "RUNNING"},
        )
    assert (caught.value.entity_id, caught.value.actual) == ("r", 1)
    assert caught.value.current == await store.get_entity("requests", "r")
    assert not caught.value.retryable
    with pytest.raises(ConcurrencyConflictError) as caught:
        await store.update_entity(
            "requests", "r", {}, expected_version=7, condition_expression="attribute_exists(status)"
        )
    assert caught.value.expected == 7
    with pytest.raises(EntityNotFoundError):
        await store.update_entity(
            "requests", "nobody", {}, condition_expression="attribute_not_exists(status)"
        )
    assert await store.get_entity("requests", "nobody") is None, "an entity was inserted"


@pytest.mark.parametrize(
    ("condition", "values"),
    [
        ("", {}),
        ("status = :s", {}),
        ("status = :s", {":s": 1, ":t": 2}),
        ("drop(status)", {}),
        ("status = 'PENDING'", {}),
        ("status; x", {}),
        (5, {}),
        ("status = :s", 5),
        ("status = :s", {":s": object()}),
    ],
)
async def test_a_malformed_condition_is_refused_at_once(
    store: DynamoDBStorageStrategy, condition: Any, values: Any
) -> None:
    from hf_async_store import InvalidInputError

    call = store.update_entity(
        "requests", "r", {}, condition_expression=condition, expression_values=values
    )
    with pytest.raises(InvalidInputError):
        call.send(None)


async def test_values_without_a_condition(store: DynamoDBStorageStrategy) -> None:
    refused_at_once(
        store.update_entity("requests", "r", {}, expression_values={":a": 1}), InvalidQueryError
    )


async def test_conditions_that_only_dynamodb_can_refuse(store: DynamoDBStorageStrategy) -> None:
    await store.create_entity("requests", ENTITY)
    with pytest.raises(InvalidQueryError):
        await store.update_entity("requests", "r", {}, condition_expression="status AND AND")


# -- generated expressions -------------------------------------------------------------------

_WORDS: Final = (
    *(
        "template_id",
        "created_at",
        "status",
        '"template_id"',
        '""',
        "begins_with",
        "size",
        "contains",
    ),
    *(
        "AND",
        "and",
        "OR",
        "NOT",
        "BETWEEN",
        "IN",
        "=",
        "<",
        "<=",
        ">",
        ">=",
        "<>",
        "(",
        ")",
        ",",
        ".",
    ),
    *(
        "[",
        "]",
        "0",
        "99999999999999999999",
        ":t",
        ":a",
        ":b",
        ":missing",
        "é",
        "\0",
        "'",
        '"',
        "#",
    ),
)
_GOOD: Final = "template_id = :t AND created_at BETWEEN :a AND :b"
_TEXTS: Final = st.lists(st.sampled_from(_WORDS), max_size=12).map(" ".join) | st.text(max_size=30)


@st.composite
def _nearly_good(draw: st.DrawFn) -> str:
    words = _GOOD.split()
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(words)))
        words[place : place + draw(st.integers(0, 2))] = draw(
            st.lists(st.sampled_from(_WORDS), max_size=2)
        )
    return " ".join(words)


_VALUES: Final = st.dictionaries(
    st.sampled_from([":t", "t", ":a", ":b", ":x", "", ":"]) | st.text(max_size=3),
    st.sampled_from(
        ["x", "", 1, 1.5, None, True, [], {}, "2024-01-01T00:00:00Z", 2**70, b"x", object()]
    ),
    max_size=4,
)
_GIVEN: Final = st.just({":t": "t", ":a": "2024-01-01T00:00:00Z", ":b": "2024-01-02T00:00:00Z"})


@settings(max_examples=repetitions(1_000))
@example(text="template_id = :t AND", values={":t": "t"})
@example(text="begins_with", values={})
@example(text="AND", values={})
@given(text=_nearly_good() | _TEXTS, values=_GIVEN | _VALUES)
def test_any_condition_is_read_or_refused(text: str, values: dict[str, object]) -> None:
    form = ItemMapping(next(each for each in HOST_FACTORY if each.name == "requests"))
    shape = next(each for each in form.shapes if each.sort is not None)
    for read in (
        lambda: key_condition(text, values, form, shape, Names()),
        lambda: condition(text, values, form, Names()),
    ):
        with suppress(InvalidInputError):
            assert read()


async def test_a_malformed_key_condition_sends_nothing(proxy: Proxy) -> None:
    values = {":t": "t"}
    async with store_at(proxy.url, collections=HOST_FACTORY) as store:
        proxy.requests.clear()

        async def ask(*args: Any, **more: Any) -> object:
            return await store.query_by_gsi(*args, **more)

        index = "template_id-created_at-index"
        for text in (
            *(
                "template_id = :t AND",
                "AND template_id = :t",
                "template_id",
                "= :t",
                "template_id = :t :t",
            ),
            *(
                "template_id > :t",
                "begins_with(template_id, :t)",
                "created_at = :t",
                "begins_with(",
                "",
            ),
            *("template_id = :t AND template_id = :t", "template_id = :t OR created_at = :t"),
            *(
                "template_id = :t AND created_at BETWEEN :t",
                "x" * 5_000,
                None,
                5,
                b"template_id = :t",
                [],
            ),
        ):
            with pytest.raises(InvalidInputError):
                await ask("requests", index, text, values)
        good = "template_id = :t"
        for wrong in (
            {"limit": -1},
            {"limit": "1"},
            {"limit": True},
            {"descending": "no"},
            {"timeout": "x"},
            {"timeout": -1},
            {"timeout": float("nan")},
        ):
            with pytest.raises(InvalidInputError):
                await ask("requests", index, good, values, **wrong)
        for given_values in (
            None,
            [],
            "x",
            {5: "t"},
            {":t": object()},
            {":t": None},
            {":t": "t", ":u": "u"},
        ):
            with pytest.raises(InvalidInputError):
                await ask("requests", index, good, given_values)
        for name in ("nothing", None, 5, []):
            with pytest.raises(InvalidInputError):
                await ask("requests", name, good, values)
            with pytest.raises(InvalidInputError):
                await ask(name, index, good, values)
    assert not proxy.requests
