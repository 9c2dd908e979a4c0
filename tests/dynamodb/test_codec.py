"""The codec: compared with Amazon's serializer, for all storable values, and for items with indexes."""

from __future__ import annotations

import json
from base64 import b64encode
from copy import deepcopy
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from boto3.dynamodb.types import TypeDeserializer, TypeSerializer
from hypothesis import given
from hypothesis import strategies as st

from hf_async_store import Collection, Field, Index
from hf_async_store.query import MISSING, Missing, order_key
from hf_async_store.sort_bytes import sort_bytes
from hf_async_store.strategies.dynamodb import index_keys
from hf_async_store.strategies.dynamodb.codec import decode, encode, encode_map
from hf_async_store.strategies.dynamodb.items import (
    MISSING_SENTINEL,
    ItemMapping,
    probe_id,
    size_of,
)
from hf_async_store.testing import hypothesis_strategies
from hf_async_store.testing.assertions import typed
from hf_async_store.values import MAX_ENTITY_BYTES, REMOVE, check_size

if TYPE_CHECKING:
    from hf_async_store.values import Value

THINGS = Collection(
    "things",
    key="thing_id",
    fields=[
        "label",
        "plain",
        Field("count", "integer"),
        Field("ratio", "number"),
        Field("active", "boolean"),
        Field("due_at", "timestamp"),
        Field("data", "json"),
    ],
    indexes=[
        Index("label", "created_at"),
        Index("count", "label"),
        Index("ratio", "count"),
        Index("active", "ratio"),
        Index("due_at", "active"),
        Index("label", "thing_id"),
        Index("count", "active", "label", "ratio"),
        Index("active", "created_at", "count"),
        Index("due_at"),
        Index("ratio"),
    ],
)
FORM = ItemMapping(THINGS)
TIMES = st.just("2024-01-02T03:04:05.000006Z") | st.none()
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@st.composite
def things(draw: st.DrawFn) -> dict[str, Any]:
    columns: dict[str, st.SearchStrategy[Any]] = {
        "label": TEXTS | st.none() | st.just("x" * 3000) | st.just("\x01"),
        "plain": TEXTS | st.none(),
        "count": INTEGERS | st.none(),
        "ratio": INTEGERS
        | FLOATS
        | st.none()
        | st.sampled_from(hypothesis_strategies.LARGE_NUMBERS),
        "active": st.booleans() | st.none(),
        "due_at": TIMES,
        "created_at": TIMES,
        "data": hypothesis_strategies.values,
        "extra": hypothesis_strategies.values,
        "": hypothesis_strategies.values,
        "_w": hypothesis_strategies.values,
        "doc": hypothesis_strategies.values,
    }
    entity: dict[str, Any] = {"thing_id": "t"}
    for name, column in columns.items():
        if draw(st.booleans()):
            entity[name] = draw(column)
    return entity


def through_json(attribute: Any) -> Any:
    """The value after encoding to JSON and decoding, as it is sent and received."""
    return json.loads(json.dumps(attribute, default=lambda each: b64encode(each).decode()))


def as_amazon_reads(attribute: Any) -> Any:
    """A value decoded by Amazon's deserializer, with decimals converted to numbers."""
    return _plain(TypeDeserializer().deserialize(attribute))


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value


@given(hypothesis_strategies.values)
def test_every_value_round_trips_with_its_type(value: Value) -> None:
    assert typed(decode(through_json(encode(value)))) == typed(value)


def _has_side_form(value: Any) -> bool:
    if isinstance(value, float):
        return "N" not in encode(value)
    if isinstance(value, dict):
        return "" in value or any(map(_has_side_form, value.values()))
    return isinstance(value, list) and any(map(_has_side_form, value))


@given(hypothesis_strategies.values)
def test_amazon_decodes_the_same_values(value: Value) -> None:
    if not _has_side_form(value):
        assert as_amazon_reads(encode(value)) == value


@given(hypothesis_strategies.values)
def test_amazon_encodes_the_same_values(value: Value) -> None:
    try:
        theirs = TypeSerializer().serialize(value)
    except TypeError:
        return  # Amazon's serializer accepts no floats
    if not _has_side_form(value):
        assert encode(value) == theirs


@pytest.mark.parametrize(
    ("value", "attribute"),
    [
        (1, {"N": "1"}),
        (1.0, {"SS": ["1.0"]}),
        (-0.0, {"SS": ["-0.0"]}),
        (0.1, {"N": "0.1"}),
        (1e-130, {"N": "1e-130"}),
        (9e-131, {"SS": ["9e-131"]}),
        (1.7e308, {"SS": ["1.7e+308"]}),
        (5e-324, {"SS": ["5e-324"]}),
        (2**63 - 1, {"N": "9223372036854775807"}),
        (True, {"BOOL": True}),
        ("", {"S": ""}),
        (None, {"NULL": True}),
        ([], {"L": []}),
        ({}, {"M": {}}),
    ],
)
def test_the_forms(value: Value, attribute: object) -> None:
    assert encode(value) == attribute
    assert typed(decode(through_json(attribute))) == typed(value)


def test_numbers_as_the_service_writes_them() -> None:
    assert typed(decode({"N": "0.0000001"})) == typed(1e-7)
    assert typed(decode({"N": "1E-130"})) == typed(1e-130)
    assert typed(decode({"N": "-9007199254740993"})) == typed(-(2**53) - 1)


@pytest.mark.parametrize("name", ["", "x" * 70_000, "\U0001f600" * 20_000])
def test_attribute_names_that_dynamodb_refuses(name: str) -> None:
    value: dict[str, Value] = {name: {"": 1}, "plain": [name]}
    encoded = encode_map(value)
    assert all(0 < len(each.encode()) <= 65_535 for each in encoded)
    assert typed(decode(through_json({"M": encoded}))) == typed(value)


@given(things())
def test_every_entity_round_trips(entity: dict[str, Any]) -> None:
    item = FORM.item("t", entity, 3, "token")
    assert typed(FORM.entity(through_json(item))) == typed({**entity, "version": 3})


@given(things())
def test_index_keys_are_valid_in_dynamodb(entity: dict[str, Any]) -> None:
    item = FORM.item("t", entity, 3, "token")
    for field in FORM.indexed.values():
        key = item.get(field.attribute)
        if field.is_sort:
            assert key is not None, "an item without the key attribute is not in the index"
        if key is not None:
            [(kind, held)] = key.items()
            assert kind == ("N" if field.kind == "N" else "S")
            assert held
            assert len(held.encode()) <= (1024 if field.is_sort else 2048)
            assert kind != "N" or len(Decimal(held).as_tuple().digits) <= 38


@given(things(), things())
def test_an_update_of_every_field_is_the_same_as_a_save(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    """For all stored forms of a field before and after the update."""
    item = FORM.item("t", before, 1, "token")
    names = {*before, *after} - {"thing_id"}
    put, removed = FORM.changes({name: after.get(name, REMOVE) for name in names}, before)
    for path, attribute in put.items():
        (item if len(path) == 1 else item["doc"]["M"])[path[-1]] = attribute
    for path in removed:
        (item if len(path) == 1 else item["doc"]["M"]).pop(path[-1], None)
    if "" in names:
        return  # such an update is made differently; see `test_writes`
    assert typed(FORM.entity(through_json(item))) == typed({**after, "version": 1})
    whole = FORM.item("t", after, 1, "token")
    keys = {key.name for shape in FORM.shapes for key in shape.keys}
    assert {each: item.get(each) for each in keys} == {each: whole.get(each) for each in keys}


@given(things(), things())
def test_a_save_removes_all_old_fields(before: dict[str, Any], after: dict[str, Any]) -> None:
    item = FORM.item("t", before, 1, "token")
    attributes, removed = FORM.parts(after, keep_created=True)
    for name in removed:
        item.pop(name, None)
    item.update(attributes)
    kept = {"created_at": before["created_at"]} if "created_at" in before else {}
    assert typed(FORM.entity(through_json(item))) == typed({**kept, **after, "version": 1})


@given(things(), things())
def test_kept_encodings_do_not_change_the_entity(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    stored, item = FORM.item("t", before, 1, "old"), FORM.item("t", after, 2, "new")
    written = deepcopy(item)
    FORM.keep_encodings(item, stored)
    assert item == written, "the store itself encodes each value in one way"
    theirs = {name: {"SS": ["a", "b"]} for name in ("plain", "data", "_b_active", "extra", "_x")}
    FORM.keep_encodings(item, {**stored, **theirs, "doc": {"M": {"extra": {"NS": ["1"]}}}})
    assert typed(FORM.entity(item)) == typed({**after, "version": 2})


@given(things())
def test_the_estimated_size_is_never_too_small(entity: dict[str, Any]) -> None:
    filler = MAX_ENTITY_BYTES - size_of(entity) - 20
    if filler > 0:
        check_size({**entity, "filler": "x" * filler})  # must not raise


def test_a_missing_sort_key_is_distinguished_from_null() -> None:
    missing = FORM.item("t", {"thing_id": "t"}, 1, "token")
    null = FORM.item("t", {"thing_id": "t", "label": None, "created_at": None}, 1, "token")
    assert missing["label"] == null["label"] == {"S": "\x01"}
    assert missing["doc"]["M"]["label"] == MISSING_SENTINEL
    assert FORM.entity(missing) == {"thing_id": "t", "version": 1}
    assert FORM.entity(null) == {"thing_id": "t", "version": 1, "label": None, "created_at": None}


ANYTHING = st.just(MISSING) | hypothesis_strategies.values


@given(st.sampled_from(["S", "N", "BOOL"]), st.lists(ANYTHING, min_size=2))
def test_sort_keys_follow_the_order_of_all_values(
    kind: index_keys.Kind, values: list[Value | Missing]
) -> None:
    ordered = sorted(values, key=order_key)
    keys = [index_keys.position(kind, each) for each in ordered]
    found = [Decimal(each) if kind == "N" else each for each in keys]
    assert found == sorted(found)
    for one, other in pairwise(ordered):
        if isinstance(one, Missing) or not index_keys.is_exact(kind, one):
            continue
        is_equal = order_key(one) == order_key(other)
        assert is_equal == (index_keys.position(kind, one) == index_keys.position(kind, other))


TUPLES = st.tuples(ANYTHING, ANYTHING, ANYTHING)


@given(st.lists(TUPLES, min_size=2))
def test_composite_sort_keys_follow_the_order_of_their_parts(tuples: list[Any]) -> None:
    ordered = sorted(tuples, key=lambda each: [sort_bytes(part) for part in each])
    keys = [index_keys.composite(each) for each in ordered]
    assert keys == sorted(keys)
    for key, parts in zip(keys, ordered, strict=True):
        assert len(key) <= 1024
        assert index_keys.beginning(key, 2, 0) == index_keys.composite(parts[:2])
        assert index_keys.beginning(key, 3, 0) == key


@given(TUPLES, ANYTHING, ANYTHING)
def test_ranges_of_a_part_of_a_composite_sort_key(parts: Any, low: Any, high: Any) -> None:
    start, middle, _ = parts
    prefix, key = index_keys.composite([start]), index_keys.composite(parts)
    lowest = prefix + index_keys.escaped(sort_bytes(low))
    highest = prefix + index_keys.escaped(sort_bytes(high))
    is_inside = sort_bytes(low) <= sort_bytes(middle) < sort_bytes(high)
    assert is_inside == (lowest <= key <= highest)


def test_a_probe_id_is_not_a_valid_entity_id() -> None:
    assert 1024 < len(probe_id()) <= 2048
    assert probe_id() != probe_id()
