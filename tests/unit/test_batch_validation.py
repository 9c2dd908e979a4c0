"""Validation of a batch by columns gives the check_same results as validation of each entity."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, timedelta
from enum import Enum, IntEnum
from types import MappingProxyType
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_async_store import (
    HOST_FACTORY,
    Collection,
    Field,
    StorageError,
    batch_validation,
    open_store,
    values,
)
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import INT_MAX, MAX_ENTITY_BYTES

pytestmark = pytest.mark.hf_sampled

NOW = "2026-11-29T12:00:00.000000Z"
MACHINES = HOST_FACTORY[2]
EVERY = Collection(
    "every",
    key="id",
    fields=[
        "text",
        Field("needed", "text", required=True),
        Field("whole", "integer"),
        Field("some", "number"),
        Field("flag", "boolean"),
        Field("moment", "timestamp"),
        Field("any", "json"),
        Field("must", "json", required=True),
    ],
)


class Word(str, Enum):  # noqa: UP042  # the older form is what many programs have
    A = "a"


class Number(IntEnum):
    ONE = 1


class Text(str):
    pass


def validated_one_by_one(collection: Collection, items: Any) -> Any:
    """The result of validating each entity, with the types of all values; None for an error."""
    try:
        return with_types([collection.entity(each) for each in items])
    except StorageError:
        return None


def with_types(value: Any) -> Any:
    if isinstance(value, dict):
        return ("dict", [(with_types(k), with_types(v)) for k, v in value.items()])
    if isinstance(value, list | tuple):
        return (type(value).__name__, [with_types(each) for each in value])
    return (type(value).__name__, repr(value))


def check_same(collection: Collection, items: list[Any]) -> bool:
    """Assert that both validations agree; returns whether the batch validation had a result."""
    before = with_types(items)
    found = batch_validation.validate_batch(collection, items)
    texts = [encoded_texts(collection, items, written_at) for written_at in (None, NOW)]
    assert with_types(items) == before, "the batch validation modified its input"
    if found is None:
        assert texts == [None, None]
        return False
    expected = validated_one_by_one(collection, items)
    assert with_types(list(zip(*found, strict=True))) == expected
    for encoded, written_at in zip(texts, (None, NOW), strict=True):
        if encoded is not None:
            assert encoded == texts_one_by_one(collection, items, written_at)
    return True


def encoded_texts(
    collection: Collection, items: list[Any], written_at: str | None
) -> list[tuple[Any, bytes, bool]] | None:
    """The keys and texts of `encode_batch`, and whether they contain `created_at`."""
    found = batch_validation.encode_batch(collection, items, written_at)
    if found is None:
        return None
    keys, texts, form = found
    return [
        (key, text[:-1] + form.end, form.has_created_at)
        for key, text in zip(keys, texts, strict=True)
    ]


def texts_one_by_one(
    collection: Collection, items: list[Any], written_at: str | None
) -> list[tuple[Any, bytes, bool]]:
    found = [collection.entity(each) for each in items]
    if written_at is not None:
        for _, each in found:
            values.stamp(each, written_at)
    return [(key, msgspec.json.encode(each), "created_at" in each) for key, each in found]


UNUSUAL: list[Any] = [
    math.nan,
    -math.inf,
    -0.0,
    1.0,
    2**63,
    2**63 - 1,
    -(2**63) - 1,
    True,
    None,
    "",
    "\x00",
    "a\ud800",
    "数据",
    "x" * 300,
    "x" * (MAX_ENTITY_BYTES // 300),
    "x" * MAX_ENTITY_BYTES,
    b"x",
    {1, 2},
    Text("a"),
    Word.A,
    Number.ONE,
    UUID(int=1),
    date(2026, 1, 1),
    datetime(2026, 1, 1, tzinfo=UTC),
    datetime(2026, 1, 1),  # a naive one is refused
    "2026-01-01",
    "2026-01-01T00:00:00.000000Z",
    "2026-13-01T00:00:00.000000Z",
    (1, 2),
    [1, [2, "\x00"]],
    {"a": {1: 2}},
    {"a": [Word.A]},
    MappingProxyType({"a": 1}),
    [[]],
]
NAMES: list[Any] = [*EVERY.fields, "version", "other", "\x00", "", "ü", Word.A, Text("other"), 1]


def entity(number: int, **fields: Any) -> dict[str, Any]:
    return {"id": f"e-{number}", "needed": "x", "must": [number], **fields}


@pytest.mark.parametrize("value", UNUSUAL, ids=lambda each: repr(each)[:30])
@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_an_unusual_value_among_plain_ones(name: Any, value: Any) -> None:
    items = [entity(n, text="a", whole=n, other=None) for n in range(20)]
    for each in items:
        each[name] = each.get(name, "plain")
    check_same(EVERY, items)
    items[7][name] = value
    check_same(EVERY, items)
    for each in items:
        each[name] = value
    check_same(EVERY, items)


@pytest.mark.parametrize("value", UNUSUAL, ids=lambda each: repr(each)[:30])
@pytest.mark.parametrize("name", ["inner", Text("inner"), "\x00", "ü", "version", 1], ids=repr)
def test_an_unusual_value_in_a_nested_dict(name: Any, value: Any) -> None:
    for unusual in (slice(7, 8), slice(None)):
        items = [entity(n, other={"inner": "x", "more": {"n": n}}) for n in range(20)]
        for each in items[unusual]:
            each["other"]["more"] = {"n": 1, name: value}
        check_same(EVERY, items)


def test_dicts_nested_as_deep_as_allowed() -> None:
    for depth in (29, 30, 31):
        nested: Any = 1
        for _ in range(depth):
            nested = {"a": nested}
        assert check_same(EVERY, [entity(n, other=nested) for n in range(20)]) == (depth <= 30)


PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(UNUSUAL)
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
ENTITIES = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), VALUES, max_size=6)


@settings(max_examples=repetitions(400), deadline=None)
@given(st.data())
def test_batches_of_few_forms_are_validated_like_single_entities(data: st.DataObject) -> None:
    forms = data.draw(st.lists(ENTITIES, min_size=1, max_size=3))
    items = [entity(n) | forms[n % len(forms)] for n in range(8 * len(forms))]
    place = data.draw(st.integers(0, len(items) - 1))
    items[place] = items[place] | data.draw(ENTITIES)
    check_same(EVERY, items)


def test_plain_batches_are_validated_by_columns() -> None:
    times = ["2026-06-01T08:00:00.414002Z", "2026-06-01T08:00:00", None]
    items = [
        {
            "machine_id": f"i-{n}",
            "version": n,
            "name": "数据" if n % 2 else None,
            "created_at": times[n % 3],
            "launch_time": "2026-06-01T08:00:00",
            "metadata": {"vcpu": n, "tags": ["a", None]},
            "price": n / 7,
        }
        for n in range(64)
    ]
    assert check_same(MACHINES, items)
    assert check_same(
        MACHINES, [each if n % 4 else {**each, "more": n} for n, each in enumerate(items)]
    )
    assert not check_same(MACHINES, [{**each, f"field-{n}": n} for n, each in enumerate(items)])
    assert not check_same(MACHINES, items[:7])


def test_the_result_shares_nothing_with_the_input() -> None:
    items = [entity(n, any=[n]) for n in range(8)]
    found = batch_validation.validate_batch(EVERY, items)
    assert found is not None
    items[0]["any"].append("more")
    items[0]["text"] = "more"
    assert found[1][0] == entity(0, any=[0])


@pytest.mark.parametrize(
    "version", [0, 7, INT_MAX, -1, True, None, "1", 1.0, INT_MAX + 1], ids=repr
)
async def test_versions_of_a_batch_of_imports_are_checked_as_of_each(version: object) -> None:
    items = [entity(number) for number in range(16)]  # 0 if it is missing
    items[-1]["version"] = version
    async with open_store("memory:", collections=[EVERY]) as store:

        async def imported(batch: list[dict[str, Any]]) -> list[int] | str:
            try:
                return await store.import_entities("every", batch)
            except StorageError as exc:
                return str(exc)

        alone = [await imported([each]) for each in items]
        together = await imported(items)
    failures = [each for each in alone if isinstance(each, str)]
    if failures:
        assert together == failures[0]
    else:
        assert together == [version for [version] in alone]
        assert together == [0] * 15 + [version]


_MOMENTS = st.sampled_from(
    [
        "2026-01-01T00:00:00.000000Z",
        "2024-02-29T23:59:59.999999Z",
        "2026-02-29T00:00:00.000000Z",
        "2026-02-30T00:00:00.000000Z",
        "2026-01-01T24:00:00.000000Z",
        "0000-01-01T00:00:00.000000Z",
        "2026-01-01T00:00:00.00000Z",
        "2026-01-01T00:00:00.0000000Z",
        "2026-01-01 00:00:00.000000Z",
        "2026-01-01T00:00:00+00:00",
        "2026-01-01T00:00:00.00000٣Z",
        "2026-01-01",
        "T00:00:00.000000Z",
        "",
        None,
    ]
)


@given(st.lists(_MOMENTS, min_size=8, max_size=12))
@settings(max_examples=repetitions(200), deadline=None)
def test_a_column_of_timestamps_is_that_of_each(moments: list[str | None]) -> None:
    check_same(EVERY, [entity(number, moment=each) for number, each in enumerate(moments)])


@settings(deadline=None)
@given(st.lists(st.permutations("abc").map(tuple) | st.sampled_from([("a",), ("a", "b"), ()])))
def test_dicts_are_grouped_by_their_keys(keys: list[tuple[str, ...]]) -> None:
    found = batch_validation.group_by_keys([dict.fromkeys(each) for each in keys])
    expected: dict[tuple[str, ...], list[int]] = {}
    for place, each in enumerate(keys):
        expected.setdefault(each, []).append(place)
    assert found == expected or (found is None and len(expected) * 8 > len(keys)) or not keys


class DatetimeOfPython314(datetime):
    @classmethod
    def fromisoformat(cls, text: str) -> datetime:  # type: ignore[override]  # a plain one is enough
        found = datetime.fromisoformat(text.replace("T24:00", "T00:00"))
        return found + timedelta(days="T24:00" in text)


@pytest.mark.parametrize("count", [1, 8])
def test_24_o_clock_is_stored_as_the_next_day(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (batch_validation, values):
        monkeypatch.setattr(module, "datetime", DatetimeOfPython314)
    field = Field("at", type="timestamp")
    collection = Collection("jobs", key="job_id", fields=[field])
    items = [{"job_id": f"{each}", "at": "2024-02-29T24:00:00.000000Z"} for each in range(count)]
    found = batch_validation.validate_batch(collection, items)
    stored = [collection.entity(each)[1] for each in items] if found is None else found[1]
    assert {each["at"] for each in stored} == {"2024-03-01T00:00:00.000000Z"}
