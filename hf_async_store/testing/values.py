"""Cases 16 to 25: a value is read as it was written, including its type, or refused before any I/O."""

from __future__ import annotations

import ipaddress
import sys
import unicodedata
from collections import OrderedDict
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import pytest

from hf_async_store.errors import UnsupportedValueError
from hf_async_store.query import path
from hf_async_store.schema import Collection, Index, Schema
from hf_async_store.testing.assertions import (
    all_refused_at_once,
    get_existing,
    payload,
    payloads,
    refused_at_once,
    typed,
)
from hf_async_store.testing.concurrency import answer_of
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS, Harness, ObservesIO
from hf_async_store.values import MAX_DEPTH, MAX_ENTITY_BYTES, REMOVE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hf_async_store.strategy import StorageStrategy

_53: Final = 2**53
_63: Final = 2**63

INTEGERS: Final = (
    *(
        sign * (edge + step)
        for sign in (1, -1)
        for edge in (0, 2**31, 2**32, _53, 2**62)
        for step in (-1, 0, 1)
    ),
    *(_63 - 1, _63 - 2, -_63, -_63 + 1, 10**18, 999999999999999999),
)

TOO_LARGE: Final = (_63, -_63 - 1, _63 + 1, 2**64, -(2**64), 10**30, 10**400)

FLOATS: Final = (
    0.0,
    0.1,
    0.1 + 0.2,
    1 / 3,
    -2.5,
    1.0,
    -1.0,
    1e-7,
    1e15,
    1e16,
    1e17,
    1e21,
    1e22,
    1e23,
    float(_53),
    float(_53 + 2),
    float(_63),
    -float(_63),
    123456789.12345679,
    9.999999999999999e22,
    1e125,
    9.9e125,
    1e126,
    1.7e308,
    sys.float_info.max,
    -sys.float_info.max,
    1e-129,
    1e-130,
    1e-131,
    sys.float_info.min,
    2.225073858507201e-308,
    5e-324,
    -5e-324,
)

TEXTS: Final = (
    "",
    " ",
    "true",
    "null",
    "NULL",
    "1",
    "1.0",
    "NaN",
    "2024-01-01T00:00:00",
    "2024-01-01T00:00:00+02:00",
    '"quoted"',
    "back\\slash",
    "\\u0000",
    "\\ud800",
    "/",
    "line\nbreak\r\n\ttab",
    "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    unicodedata.normalize("NFC", "é한글ﬁÅ"),
    unicodedata.normalize("NFD", "é한글ﬁÅ"),
    "\N{ANGSTROM SIGN}\N{KELVIN SIGN}\N{OHM SIGN}",
    "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{VARIATION SELECTOR-16}",
    "\N{LINE SEPARATOR}\N{PARAGRAPH SEPARATOR}\N{NEXT LINE}",
    "\N{ZERO WIDTH NO-BREAK SPACE}bom",
    "\ufffd\ufffe\uffff\U0010ffff",
    "\ue000 private use",
    "שלום \N{RIGHT-TO-LEFT OVERRIDE}",
    "x" * 100_000,
)

NAMES: Final = (
    "a.b",
    "a",
    ".",
    "..",
    "$set",
    "$",
    "#name",
    ":value",
    "[0]",
    "a[0]",
    "0",
    "a b",
    " ",
    "'",
    '"',
    "`",
    "\\",
    "/",
    "%",
    "*",
    "?",
    "a,b",
    "a->b",
    "a::text",
    "{}",
    "line\nbreak",
    "\x01",
    "é",
    unicodedata.normalize("NFD", "é"),
    "\N{GRINNING FACE}",
    "\uffff",
    "__proto__",
    "constructor",
    "doc",
    "_doc",
    "_version",
    "_id",
    "id",
    "Version",
    "VERSION",
    "Label",
    "LABEL",
    "Item_Id",
    "status",
    "name",
    "order",
    "size",
    "select",
    "group",
    "from",
    "where",
    "index",
    "table",
    "user",
    "key",
    "value",
    "values",
    "date",
    "timestamp",
    "hash",
    "range",
    "rowid",
    "oid",
    "ctid",
    "xmin",
    "collection",
    "entity",
    "n" * 1000,
)

RESERVED: Final = (
    "order",
    "group",
    "from",
    "size",
    "name",
    "status",
    "user",
    "index",
    "values",
    "rowid",
    "oid",
    "xmin",
    "xmax",
    "ctid",
    "hash",
    "ttl",
    "default",
    "end",
)
"""Words that are reserved by some engine, and must be usable as names of declared fields.
`xmin` and `xmax` are plausible field names, for a bounding box."""


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class Word(StrEnum):
    YES = "yes"


class Wrong(Enum):
    SET = frozenset({1})


class ValueContract:
    """Values after they were stored and read."""

    # 16 -------------------------------------------------------------------------------------

    async def test_16_true_1_float_1_and_text_1_remain_different(
        self, store: StorageStrategy
    ) -> None:
        await _check_round_trips(
            store, (True, 1, 1.0, "1", False, 0, 0.0, "0", None, "", "true", "null")
        )

    async def test_16_types_are_kept_in_declared_fields(self, store: StorageStrategy) -> None:
        for ratio in (1, 1.0, 0, 0.0):
            for active in (True, False, None):
                fields = {"ratio": ratio, "active": active, "count": int(ratio), "label": "1"}
                await _check_fields_round_trip(store, fields)

    async def test_16_an_update_can_change_the_type_of_a_value(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", {"item_id": "a"})
        for value in (True, 1, 1.0, "1", [1], {"1": 1}, None, False, 0, 0.0, ""):
            fields = {"x": value, "data": value}
            await store.update_entity("items", "a", fields)
            found = payload(await store.get_entity("items", "a"))
            assert typed(found) == typed({"item_id": "a", **fields})

    # 17 -------------------------------------------------------------------------------------

    async def test_17_integer_edges_exact(self, store: StorageStrategy) -> None:
        await _check_round_trips(store, INTEGERS)

    async def test_17_integer_edges_in_declared_fields(self, store: StorageStrategy) -> None:
        for each in INTEGERS:
            await _check_fields_round_trip(store, {"count": each, "ratio": each})

    async def test_17_queries_distinguish_adjacent_integers(self, store: StorageStrategy) -> None:
        edges = (_53, _53 + 1, _63 - 2, _63 - 1, -_63, -_63 + 1)
        await store.create_entities(
            "items",
            [{"item_id": str(each), "count": each, "ratio": each, "x": each} for each in edges],
        )
        for each in edges:
            for name in ("count", "ratio", "x"):
                found = await _ids_by(store, {name: each}, [str(each)])
                assert found == [str(each)], name

    @pytest.mark.parametrize(
        "value",
        TOO_LARGE,
        ids=lambda value: f"{value:.3e}"[:12] if abs(value) < 10**300 else "huge",
    )
    async def test_17_integers_beyond_64_bits_are_refused(
        self, harness: Harness, store: StorageStrategy, value: int
    ) -> None:
        _check_all_verbs_refuse(harness, store, value)

    # 18 -------------------------------------------------------------------------------------

    async def test_18_floats_bit_exact(self, store: StorageStrategy) -> None:
        await _check_round_trips(store, FLOATS)

    async def test_18_floats_bit_exact_in_declared_fields(self, store: StorageStrategy) -> None:
        for each in FLOATS:
            await _check_fields_round_trip(store, {"ratio": each, "data": [each]})

    # 19 -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    async def test_19_nan_and_infinities_are_refused(
        self, harness: Harness, store: StorageStrategy, value: float
    ) -> None:
        _check_all_verbs_refuse(harness, store, value)
        all_refused_at_once(
            UnsupportedValueError, store.save_entity("items", {"item_id": "a", "ratio": value})
        )

    async def test_19_negative_zero_is_stored_as_zero(self, store: StorageStrategy) -> None:
        given = {"ratio": -0.0, "x": -0.0, "data": [-0.0, {"a": -0.0}], "y": {"z": [[-0.0, 0]]}}
        expected = {"ratio": 0.0, "x": 0.0, "data": [0.0, {"a": 0.0}], "y": {"z": [[0.0, 0]]}}
        await _check_fields_round_trip(store, given, expected)
        await _check_fields_round_trip(store, expected)
        await store.create_entity("items", {"item_id": "in a transaction"})
        async with store.begin_transaction() as tx:
            await tx.update_entity("items", "in a transaction", given)
            await tx.save_entity("items", {"item_id": "another", **given})
        ids = [f"in a batch {n}" for n in range(20)]
        await store.create_entities("items", [{"item_id": each, **given} for each in ids])
        found = await payloads(store, "items", ["in a transaction", "another", *ids])
        for entity_id, entity in found.items():
            assert typed(entity) == typed({"item_id": entity_id, **expected})

    # 20 -------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "value",
        [
            Decimal("0.1"),
            Decimal(1),
            Fraction(1, 2),
            1j,
            b"bytes",
            bytearray(b"bytes"),
            memoryview(b"bytes"),
            {1, 2},
            frozenset({"a"}),
            time(1, 2),
            timedelta(seconds=1),
            Wrong.SET,
            object(),
            int,
            iter([1]),
            range(3),
            REMOVE,
        ],
        ids=lambda value: type(value).__name__,
    )
    async def test_20_other_types_are_refused(
        self, harness: Harness, store: StorageStrategy, value: object
    ) -> None:
        # In an update REMOVE has its own meaning, but nowhere else.
        _check_all_verbs_refuse(harness, store, value, top_level=value is not REMOVE)

    @pytest.mark.parametrize(
        ("value", "form"),
        [
            ((1, (2, 3)), [1, [2, 3]]),
            (UUID(int=5), "00000000-0000-0000-0000-000000000005"),
            (Colour.RED, "red"),
            (Level.HIGH, 3),
            (Word.YES, "yes"),
            (date(2024, 5, 6), "2024-05-06"),
            (ipaddress.ip_address("10.0.0.1"), "10.0.0.1"),
            (ipaddress.ip_address("::1"), "::1"),
            (ipaddress.ip_network("10.0.0.0/8"), "10.0.0.0/8"),
            (OrderedDict(b=1, a=(2,)), {"b": 1, "a": [2]}),
            (MappingProxyType({"a": 1}), {"a": 1}),
        ],
        ids=lambda value: type(value).__name__,
    )
    async def test_20_convertible_types_are_converted(
        self, store: StorageStrategy, value: object, form: object
    ) -> None:
        given = {"x": value, "data": {"deep": [value]}}
        expected = {"x": form, "data": {"deep": [form]}}
        await _check_fields_round_trip(store, given, expected)

    async def test_20_declared_fields_convert_in_the_same_way(self, store: StorageStrategy) -> None:
        await _check_fields_round_trip(
            store,
            {"label": UUID(int=5), "count": Level.HIGH, "due_at": date(2024, 5, 6)},
            {
                "label": "00000000-0000-0000-0000-000000000005",
                "count": 3,
                "due_at": "2024-05-06T00:00:00.000000Z",
            },
        )

    async def test_20_an_id_is_converted_in_the_same_way(self, store: StorageStrategy) -> None:
        await store.create_entity("items", {"item_id": UUID(int=5), "label": Word.YES})
        text = "00000000-0000-0000-0000-000000000005"
        for given in (UUID(int=5), text):
            found = await store.get_entity("items", given)  # type: ignore[arg-type]
            assert typed(payload(found)) == typed({"item_id": text, "label": "yes"})

    # 21 -------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("moment", "text"),
        [
            (datetime(2024, 1, 2, 3, 4, 5, 678901, UTC), "2024-01-02T03:04:05.678901Z"),
            (datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC), "2024-01-02T03:04:05.000000Z"),
            (
                datetime(2024, 1, 1, 0, 30, 0, 1, timezone(timedelta(hours=5, minutes=45))),
                "2023-12-31T18:45:00.000001Z",
            ),
            (
                datetime(2024, 2, 29, 23, 0, tzinfo=timezone(timedelta(hours=-3))),
                "2024-03-01T02:00:00.000000Z",
            ),
            (
                datetime(2024, 1, 1, tzinfo=timezone(timedelta(seconds=-1))),
                "2024-01-01T00:00:01.000000Z",
            ),
            (datetime.min.replace(tzinfo=UTC), "0001-01-01T00:00:00.000000Z"),
            (datetime.max.replace(tzinfo=UTC), "9999-12-31T23:59:59.999999Z"),
        ],
        ids=lambda value: str(value)[:10],
    )
    async def test_21_aware_datetimes_keep_instant_and_microseconds(
        self, store: StorageStrategy, moment: datetime, text: str
    ) -> None:
        given = {"due_at": moment, "x": moment, "data": [moment]}
        await _check_fields_round_trip(store, given, {"due_at": text, "x": text, "data": [text]})

    async def test_21_naive_datetimes_are_refused(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        naive = datetime(2024, 1, 2)
        _check_all_verbs_refuse(harness, store, naive)
        error = refused_at_once(
            store.save_entity("items", {"item_id": "a", "due_at": naive}), UnsupportedValueError
        )
        assert "due_at" in str(error)

    async def test_21_a_datetime_outside_the_range_of_utc_is_refused(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _check_all_verbs_refuse(
            harness, store, datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1)))
        )

    # 22 -------------------------------------------------------------------------------------

    async def test_22_empty_and_null_values(self, store: StorageStrategy) -> None:
        await _check_round_trips(
            store,
            (
                "",
                [],
                {},
                None,
                [None],
                [[], {}, "", None],
                {"a": None, "b": [], "c": {}, "d": ""},
                {"": ""},
                [[[]]],
                {"a": {"b": {}}},
            ),
        )

    async def test_22_empty_and_null_values_in_declared_fields(
        self, store: StorageStrategy
    ) -> None:
        names = ("label", "count", "ratio", "active", "due_at", "data")
        await _check_fields_round_trip(store, dict.fromkeys(names))
        await _check_fields_round_trip(store, {"label": "", "data": {}})
        await _check_fields_round_trip(store, {"label": "", "data": []})

    # 23 -------------------------------------------------------------------------------------

    async def test_23_strings_are_read_as_written(self, store: StorageStrategy) -> None:
        await _check_round_trips(store, TEXTS)
        for each in TEXTS:
            await _check_fields_round_trip(store, {"label": each})

    @pytest.mark.parametrize(
        "name", [1, 1.5, None, True, b"a", ("a",), Colour.RED], ids=lambda name: type(name).__name__
    )
    async def test_23_dict_keys_must_be_strings(
        self, harness: Harness, store: StorageStrategy, name: Any
    ) -> None:
        _check_all_verbs_refuse(harness, store, {name: 1})
        all_refused_at_once(
            UnsupportedValueError,
            store.save_entity("items", {"item_id": "a", name: 1}),
            store.update_entity("items", "a", {name: 1}),
        )

    @pytest.mark.parametrize("text", ["\0", "a\0b", "\ud800", "a\udfffb"], ids=ascii)
    async def test_23_nul_and_lone_surrogates_are_refused(
        self, harness: Harness, store: StorageStrategy, text: str
    ) -> None:
        _check_all_verbs_refuse(harness, store, text)
        all_refused_at_once(
            UnsupportedValueError,
            store.save_entity("items", {"item_id": "a", "label": text}),
            store.save_entity("items", {"item_id": "a", text: 1}),
            store.update_entity("items", "a", {text: 1}),
            store.update_entity("items", "a", {text: REMOVE}),
            store.save_entity("items", {"item_id": "a", "data": {"b": [{text: 1}]}}),
        )

    # 24 -------------------------------------------------------------------------------------

    async def test_24_unusual_field_names(self, store: StorageStrategy) -> None:
        fields = {name: index for index, name in enumerate(NAMES)}
        await _check_fields_round_trip(store, fields)
        await _check_fields_round_trip(store, {"data": fields, "x": [{"y": fields}]})

    async def test_24_an_empty_field_name(self, store: StorageStrategy) -> None:
        await _check_fields_round_trip(store, {"": 1, "data": {"": {"": None}}})

    async def test_24_unusual_field_names_in_updates_and_queries(
        self, store: StorageStrategy
    ) -> None:
        entity: dict[str, Any] = {name: index for index, name in enumerate(NAMES)}
        await store.create_entities("items", [{"item_id": "a", **entity}, {"item_id": "other"}])
        for index, name in enumerate(NAMES):
            assert await _ids_by(store, {name: index}, ["a"]) == ["a"], name
            await store.update_entity("items", "a", {name: REMOVE})
            entity.pop(name)
            await store.update_entity("items", "a", {name: [name]})
            entity[name] = [name]
        found = await store.get_entity("items", "a")
        assert typed(payload(found)) == typed({"item_id": "a", **entity})

    async def test_24_a_dotted_name_is_not_a_path(self, store: StorageStrategy) -> None:
        await store.create_entities(
            "items",
            [
                {"item_id": "name", "a.b": 1, "a": {"b": 2}},
                {"item_id": "path", "a.b": 2, "a": {"b": 1}},
            ],
        )
        assert await _ids_by(store, {"a.b": 1}, ["name"]) == ["name"]
        assert await _ids_by(store, {path("a", "b"): 1}, ["path"]) == ["path"]
        assert await _ids_by(store, {"a[0]": 1}, []) == []

    async def test_24_reserved_words_as_declared_fields(self, harness: Harness) -> None:
        declared = Collection("select", key="primary", fields=RESERVED, indexes=RESERVED[:3])
        entity = {"primary": "a", **{name: f"is {name}" for name in RESERVED}}
        async with harness.store([declared]) as store:
            assert await store.create_entity("select", entity) == 1
            assert payload(await store.get_entity("select", "a")) == entity
            for name in RESERVED:
                await store.update_entity("select", "a", {name: "new"})
                entity[name] = "new"
                rows = await answer_of(
                    store.capabilities,
                    lambda name=name: store.query_entities(  # type: ignore[misc]
                        "select", {name: "new"}, order_by=f"-{name}"
                    ),
                    [await get_existing(store, "select", "a")],
                )
                assert [payload(each) for each in rows] == [entity], name
            assert await store.delete_entity("select", "a") is True

    @pytest.mark.parametrize(
        "name", ["order", "table", "sqlite_things", "pg_things", "con", "store", "c" * 48]
    )
    async def test_24_unusual_collection_names(self, harness: Harness, name: str) -> None:
        async with harness.store([Collection(name, key="k", fields=["f"], indexes=["f"])]) as store:
            await store.create_entity(name, {"k": "a", "f": "x"})
            assert payload(await store.get_entity(name, "a")) == {"k": "a", "f": "x"}

    async def test_24_the_longest_declared_names(self, harness: Harness) -> None:
        """The field names have the same first 47 characters, and the names of their indexes are longer."""
        name, first, second = "c" * 48, "f" * 47 + "1", "f" * 47 + "2"
        declared = Collection(
            name,
            key="k" * 48,
            fields=[first, second],
            indexes=[first, second, Index(first, second), Index(second, first)],
        )
        entity = {"k" * 48: "a", first: "1", second: "2"}
        async with harness.store([declared]) as store:
            await store.create_entity(name, entity)
            assert payload(await store.get_entity(name, "a")) == entity
            for field in (first, second):
                rows = await answer_of(
                    store.capabilities,
                    lambda field=field: store.query_entities(  # type: ignore[misc]
                        name, {field: entity[field]}, order_by=[first, second]
                    ),
                    [await get_existing(store, name, "a")],
                )
                assert [payload(each) for each in rows] == [entity]

    # 25 -------------------------------------------------------------------------------------

    async def test_25_depth_at_the_limit(self, store: StorageStrategy) -> None:
        deepest_values = (
            _nested(MAX_DEPTH, list),
            _nested(MAX_DEPTH, dict),
            _nested(MAX_DEPTH, dict, key=""),
            _nested(MAX_DEPTH, None),
        )
        for number, each in enumerate(deepest_values):
            await _check_fields_round_trip(store, {"x": each, "data": each})
            created = {"item_id": f"created-{number}", "": each, "data": each}
            assert await store.create_entity("items", created) == 1
            found = await store.get_entity("items", f"created-{number}")
            assert typed(payload(found)) == typed(created)

    async def test_25_one_level_too_deep_is_refused(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        for form in (list, dict, None):
            too_deep = _nested(MAX_DEPTH + 1, form)
            for name in ("x", "data"):
                for call in (
                    store.save_entity("items", {"item_id": "a", name: too_deep}),
                    store.update_entity("items", "a", {name: too_deep}),
                ):
                    error = refused_at_once(call, UnsupportedValueError)
                    assert name in str(error)
        cyclic: list[Any] = []
        cyclic.append(cyclic)
        refused_at_once(
            store.save_entity("items", {"item_id": "a", "x": cyclic}), UnsupportedValueError
        )
        _check_no_io(harness)

    @pytest.mark.parametrize("kind", ["ascii", "wide", "integers", "floats", "empties", "names"])
    async def test_25_size_at_the_limit(self, store: StorageStrategy, kind: str) -> None:
        largest, larger = _around_the_limit(kind)
        refused_at_once(store.create_entity("items", larger), UnsupportedValueError)
        refused_at_once(store.save_entity("items", larger), UnsupportedValueError)
        refused_at_once(
            store.update_entity("items", "a", {"x": "", **larger}), UnsupportedValueError
        )
        assert await store.create_entity("items", largest) == 1
        found = await store.get_entity("items", "full")
        assert typed(payload(found)) == typed(largest)
        assert await store.save_entity("items", largest) == 2

    async def test_25_what_was_stored_can_be_written_again(self, store: StorageStrategy) -> None:
        """The fields that the store adds must not make an accepted entity exceed the size limit."""
        largest, _ = _around_the_limit("ascii")
        await store.create_entity("items", largest)
        entity = await get_existing(store, "items", "full")
        assert await store.save_entity("items", entity) == 2
        assert await store.update_entity("items", "full", {"label": largest["label"]}) == 3
        assert await store.modify_entity("items", "full", lambda found: found) == 4
        assert await store.import_entities("items", [entity]) == [1]
        assert typed(payload(await store.get_entity("items", "full"))) == typed(largest)

    async def test_25_an_update_cannot_exceed_the_size_limit(self, store: StorageStrategy) -> None:
        half = {"item_id": "full", "one": "x" * (MAX_ENTITY_BYTES * 6 // 10)}
        await store.create_entity("items", half)
        before = await store.get_entity("items", "full")
        with pytest.raises(UnsupportedValueError):
            await store.update_entity("items", "full", {"two": "x" * (MAX_ENTITY_BYTES // 2)})
        assert typed(await store.get_entity("items", "full")) == typed(before)


# -- accepted values ------------------------------------------------------------------------


async def _check_round_trips(store: StorageStrategy, values: Sequence[object]) -> None:
    """Assert that each value is read as written: as a field, in the json field, and nested in both."""
    named = {f"x{index}": each for index, each in enumerate(values)}
    await _check_fields_round_trip(store, {**named, "data": list(values)})
    await _check_fields_round_trip(store, {"x": {"y": [list(values)]}, "data": {"y": named}})


async def _check_fields_round_trip(
    store: StorageStrategy,
    given: Mapping[str, object],
    expected: Mapping[str, object] | None = None,
) -> None:
    """Assert that the fields are read as written, or in the expected form, with all verbs."""
    wanted = typed({"item_id": "kept", **(given if expected is None else expected)})
    writes: tuple[Callable[[], Any], ...] = (
        lambda: store.save_entity("items", {"item_id": "kept", **given}),
        lambda: store.update_entity("items", "kept", given),
        lambda: store.import_entities("items", [{"item_id": "kept", **given}]),
    )
    for write in writes:
        if write is writes[1]:
            await store.save_entity("items", {"item_id": "kept"})
        await write()
        entity = await get_existing(store, "items", "kept")
        assert typed(payload(entity)) == wanted
    rows = await answer_of(
        store.capabilities, lambda: store.query_entities("items", {"item_id": "kept"}), [entity]
    )
    assert [typed(payload(each)) for each in rows] == [wanted]


async def _ids_by(store: StorageStrategy, filters: Any, expected: list[str]) -> list[str]:
    async def ask() -> list[str]:
        return [str(each["item_id"]) for each in await store.query_entities("items", filters)]

    return await answer_of(store.capabilities, ask, expected)


# -- refused values -------------------------------------------------------------------------


def _check_all_verbs_refuse(
    harness: Harness, store: StorageStrategy, value: object, *, top_level: bool = True
) -> None:
    """Assert that all verbs refuse the value, at any depth, and that the error names its path."""
    cases: list[tuple[dict[str, object], str]] = [
        ({"data": {"deep": [0, value]}}, "data.deep[1]"),
        ({"x": ({"odd name": value},)}, "x[0]['odd name']"),
    ]
    if top_level:
        cases.append(({"x": value}, "x"))
    for fields, value_path in cases:
        entity = {"item_id": "refused", **fields}
        for call in (
            store.create_entity("items", entity),
            store.save_entity("items", entity),
            store.update_entity("items", "refused", fields),
            store.create_entities("items", [entity]),
            store.save_entities("items", [entity]),
            store.update_entities("items", {"refused": fields}),
            store.import_entities("items", [entity]),
        ):
            error = refused_at_once(call, UnsupportedValueError)
            assert value_path in str(error), "the error does not name the path of the value"
    _check_no_io(harness)


def _check_no_io(harness: Harness) -> None:
    if isinstance(harness, ObservesIO):
        assert not harness.touched()


# -- depth and size -------------------------------------------------------------------------


def _nested(depth: int, form: type | None, *, key: str = "k") -> object:
    """A number in `depth` nested containers: lists, dicts, or (form None) both alternately."""
    value: object = 1
    for level in range(depth):
        in_list = form is list or (form is None and level % 2)
        value = [value] if in_list else {key: value}
    return value


_FILLINGS: Final[Mapping[str, tuple[Callable[[int], object], int]]] = {
    "ascii": (lambda size: "x" * size, 1),
    "wide": (lambda size: "é\N{GRINNING FACE}" * size, 6),
    "integers": (lambda size: [-(2**63)] * size, 13),
    "floats": (lambda size: [0.0, 1e300, 5e-324, 123.0] * size, 132),
    "empties": (lambda size: [[], {}, "", None] * size, 11),
    "names": (lambda size: {f"{index:05}": True for index in range(size)}, 7),
}
"""Values of a variable size, and the approximate number of bytes by which each step grows."""


@cache
def _around_the_limit(kind: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The largest entity that is accepted, and one that is one byte larger.

    A label of ASCII characters fills the space that remains after the last whole unit of the filling.
    """
    collection = Schema(CONTRACT_COLLECTIONS)["items"]
    filling, unit = _FILLINGS[kind]

    def entity(size: int, rest: int) -> dict[str, Any]:
        return {"item_id": "full", "label": "x" * rest, "x": filling(size)}

    def fits(size: int, rest: int) -> bool:
        try:
            collection.entity(entity(size, rest))
        except UnsupportedValueError:
            return False
        return True

    size = _largest(lambda each: fits(each, 0), MAX_ENTITY_BYTES // unit)
    rest = _largest(lambda each: fits(size, each), unit // 2)
    return entity(size, rest), entity(size, rest + 1)


def _largest(holds: Callable[[int], bool], guess: int) -> int:
    """The largest number for which `holds` is true, found by a search that begins at `guess`.

    `holds` must be true for 0 and monotonic: true up to some number, and false beyond it.
    """
    step = 1
    if holds(guess):
        while holds(guess + step):
            step *= 2
        low, high = guess, guess + step
    else:
        while guess > step and not holds(guess - step):
            step *= 2
        low, high = max(guess - step, 0), guess
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
