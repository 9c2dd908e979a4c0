"""Cases 1 to 15: single entities, ids, and copies of entities."""

from __future__ import annotations

import asyncio
import unicodedata
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    InvalidFieldError,
    InvalidKeyError,
    UnknownCollectionError,
    UnsupportedValueError,
)
from hf_async_store.query import eq, path
from hf_async_store.testing.assertions import (
    all_refused_at_once,
    counted,
    get_existing,
    payload,
    payloads,
    refused_at_once,
    typed,
)
from hf_async_store.testing.concurrency import answer_of
from hf_async_store.testing.harness import Harness, ObservesIO
from hf_async_store.values import REMOVE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from hf_async_store.strategy import StorageStrategy

FULL: Final[dict[str, Any]] = {
    "item_id": "full",
    "label": "a label",
    "count": 7,
    "ratio": 0.5,
    "active": True,
    "due_at": "2024-05-06T07:08:09.000010Z",
    "data": {"deep": [1, 1.0, True, "1", None, {"x": []}]},
    "undeclared": [{"a": 1}, "text"],
    "nothing": None,
}
"""An entity with a value in every declared field of `items`, and undeclared fields."""

STRANGE_IDS: Final = (
    " ",
    "a b",
    " leading and trailing ",
    "line\nbreak",
    "tab\tand\x01control\x7f",
    "/",
    "a/b",
    "/etc/passwd",
    ".",
    "..",
    "../../outside",
    ".hidden",
    "-option",
    "%",
    "%2F",
    "100%",
    "%s%d",
    "'",
    '"',
    "`",
    "it's",
    'say "x"',
    "back\\slash",
    "\\",
    "?",
    "#",
    "&",
    ":name",
    "$1",
    "${HOME}",
    "{}",
    "[0]",
    "*",
    "a,b;c",
    "null",
    "None",
    "true",
    "0",
    "1.0",
    "__proto__",
    "items",
    "é",
    "\N{NO-BREAK SPACE}",
    "\N{ZERO WIDTH SPACE}",
    "\N{LINE SEPARATOR}",
    "\N{ZERO WIDTH NO-BREAK SPACE}",
    "\uffff",
    "\N{RIGHT-TO-LEFT OVERRIDE}x",
    "\N{GRINNING FACE}",
    "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}",
    "x" * 1024,
    "é" * 512,
    "\N{GRINNING FACE}" * 256,
)

BAD_IDS: Final = (
    "",
    "\0",
    "a\0b",
    "x" * 1025,
    "é" * 513,
    "\N{GRINNING FACE}" * 256 + "x",
    "lone \ud800 surrogate",
    None,
    1,
    1.5,
    True,
    b"bytes",
    ["list"],
    object(),
)

LOOKALIKES: Final = (
    "a",
    "A",
    "a ",
    " a",
    "a\t",
    "é",
    unicodedata.normalize("NFD", "é"),
    "É",
    "e",
    "\N{ANGSTROM SIGN}",
    "\N{LATIN CAPITAL LETTER A WITH RING ABOVE}",
    "ß",
    "ss",
    "SS",
    "\N{LATIN SMALL LIGATURE FI}",
    "fi",
    "i",
    "I",
    "\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}",
    "\N{LATIN SMALL LETTER DOTLESS I}",
    "\N{FULLWIDTH LATIN SMALL LETTER A}",
    "a\N{ZERO WIDTH SPACE}",
    "1",
    "01",
    "1.0",
)

INJECTIONS: Final = (
    "'; DROP TABLE items; --",
    "x' OR '1'='1",
    '" OR ""="',
    "`; DELETE FROM items; #",
    "1); DROP TABLE items; --",
    "/* */",
    "\\'; --",
    "$where",
    "$.items[*]",
    "{'$gt': ''}",
    '{"$ne": null}',
    "#n = :v",
    ":version",
    "attribute_exists(version)",
    "doc.version",
    "version = 1 OR 1=1",
    "%(name)s",
    "{0.__class__}",
    "$(reboot)",
    "../../../etc/passwd",
    "items",
    "*",
    "' || (SELECT 1) || '",
    "a'->>'b",
    "{a,b}",
)


class EntityContract:
    """The verbs for one entity."""

    # 1 --------------------------------------------------------------------------------------

    async def test_01_get_of_missing_is_none(self, store: StorageStrategy) -> None:
        assert await store.get_entity("items", "nobody") is None
        await store.create_entity("items", {"item_id": "a"})
        assert await store.get_entity("items", "nobody") is None
        found = await store.get_entities("items", ["nobody", "a", "none"])
        assert [payload(each) for each in found] == [None, {"item_id": "a"}, None]
        assert await store.get_entities("items", []) == []
        assert await store.query_entities("items", {"item_id": "nobody"}) == []

    async def test_01_verbs_that_require_the_entity_raise_not_found(
        self, store: StorageStrategy
    ) -> None:
        calls: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: store.update_entity("items", "nobody", {"label": "x"}),
            lambda: store.save_entity("items", {"item_id": "nobody"}, expected_version=1),
            lambda: store.delete_entity("items", "nobody", expected_version=1),
            lambda: store.modify_entity("items", "nobody", lambda entity: entity),
        )
        for call in calls:
            with pytest.raises(EntityNotFoundError) as caught:
                await call()
            assert (caught.value.collection, caught.value.entity_id) == ("items", "nobody")
            assert not caught.value.retryable
            assert not caught.value.outcome_unknown
        assert await store.get_entity("items", "nobody") is None

    # 2 --------------------------------------------------------------------------------------

    async def test_02_create_then_get_is_equal_in_value_and_type(
        self, store: StorageStrategy
    ) -> None:
        assert await store.create_entity("items", FULL) == 1
        entity = await get_existing(store, "items", "full")
        assert typed(payload(entity)) == typed(FULL)
        assert typed(entity["version"]) == typed(1)
        assert {"created_at", "updated_at"} < entity.keys()

    async def test_02_an_entity_with_only_its_key(self, store: StorageStrategy) -> None:
        assert await store.create_entity("counters", {"counter_id": "c"}) == 1
        entity = await get_existing(store, "counters", "c")
        assert entity.keys() == {"counter_id", "version", "created_at", "updated_at"}

    # 3 --------------------------------------------------------------------------------------

    async def test_03_create_on_an_existing_id_changes_nothing(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", FULL)
        before = await get_existing(store, "items", "full")
        with pytest.raises(AlreadyExistsError) as caught:
            await store.create_entity("items", {"item_id": "full", "label": "other"})
        assert (caught.value.collection, caught.value.entity_id) == ("items", "full")
        assert typed(await store.get_entity("items", "full")) == typed(before)

    # 4 --------------------------------------------------------------------------------------

    async def test_04_update_of_a_missing_id_inserts_nothing(self, store: StorageStrategy) -> None:
        with pytest.raises(EntityNotFoundError):
            await store.update_entity("items", "nobody", {"label": "x"})
        with pytest.raises(BatchError):
            await store.update_entities("items", {"nobody": {"label": "x"}})
        assert await store.get_entity("items", "nobody") is None
        assert await counted(store, "items", 0) == 0

    # 5 --------------------------------------------------------------------------------------

    async def test_05_save_inserts_then_replaces_the_whole_document(
        self, store: StorageStrategy
    ) -> None:
        assert await store.save_entity("items", FULL) == 1
        first = await get_existing(store, "items", "full")
        assert typed(payload(first)) == typed(FULL)
        second = {"item_id": "full", "count": 8, "new": {"a": None}}
        assert await store.save_entity("items", second) == 2
        entity = await get_existing(store, "items", "full")
        assert typed(payload(entity)) == typed(second)
        assert entity["version"] == 2
        assert entity["created_at"] == first["created_at"]

    async def test_05_save_of_only_the_key_removes_all_other_fields(
        self, store: StorageStrategy
    ) -> None:
        await store.save_entity("items", FULL)
        await store.save_entity("items", {"item_id": "full"})
        assert payload(await store.get_entity("items", "full")) == {"item_id": "full"}

    # 6 --------------------------------------------------------------------------------------

    async def test_06_update_changes_only_the_named_fields(self, store: StorageStrategy) -> None:
        await store.create_entity("items", FULL)
        named = {"label": "new", "undeclared": 1, "extra": {"deep": [1]}, "ratio": 2}
        assert await store.update_entity("items", "full", named) == 2
        entity = await get_existing(store, "items", "full")
        assert typed(payload(entity)) == typed({**FULL, **named})
        assert entity["version"] == 2

    async def test_06_a_dict_in_an_update_is_replaced_and_not_merged(
        self, store: StorageStrategy
    ) -> None:
        maps = {"data": {"a": 1, "b": 2}, "other": {"a": 1, "b": {"c": 3}}}
        await store.create_entity("items", {"item_id": "m", **maps})
        await store.update_entity("items", "m", {"data": {"a": 9}, "other": {"b": {}}})
        assert typed(payload(await store.get_entity("items", "m"))) == typed(
            {"item_id": "m", "data": {"a": 9}, "other": {"b": {}}}
        )

    async def test_06_an_update_without_fields_increments_the_version(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", FULL)
        assert await store.update_entity("items", "full", {}) == 2
        entity = await get_existing(store, "items", "full")
        assert typed(payload(entity)) == typed(FULL)
        assert entity["version"] == 2

    async def test_06_an_update_may_contain_the_key_but_not_change_it(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", FULL)
        await store.update_entity("items", "full", {"item_id": "full", "label": "x"})
        for change in ({"item_id": "other"}, {"item_id": None}, {"item_id": REMOVE}):
            refused_at_once(store.update_entity("items", "full", change), InvalidFieldError)
        entity = await store.get_entity("items", "full")
        assert typed(payload(entity)) == typed({**FULL, "label": "x"})

    async def test_06_modify_entity_cannot_change_the_key(self, store: StorageStrategy) -> None:
        """Otherwise it would replace another entity that happens to have the same version."""
        both = [{"item_id": "a", "label": "a"}, {"item_id": "b", "label": "b"}]
        await store.create_entities("items", both)
        with pytest.raises(InvalidFieldError):
            await store.modify_entity("items", "a", lambda entity: {**entity, "item_id": "b"})
        assert list((await payloads(store, "items", ["a", "b"])).values()) == both

    # 7 --------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "field", ["label", "count", "due_at", "data", "undeclared", "odd.name"]
    )
    async def test_07_null_and_removed_are_different(
        self, store: StorageStrategy, field: str
    ) -> None:
        before = {**FULL, "odd.name": 1}
        await store.create_entity("items", before)
        await store.update_entity("items", "full", {field: None})
        assert typed(payload(await store.get_entity("items", "full"))) == typed(
            {**before, field: None}
        )
        await store.update_entity("items", "full", {field: REMOVE})
        without = {name: each for name, each in before.items() if name != field}
        assert typed(payload(await store.get_entity("items", "full"))) == typed(without)
        # Removing a missing field is no error.
        assert await store.update_entity("items", "full", {field: REMOVE}) == 4
        assert typed(payload(await store.get_entity("items", "full"))) == typed(without)

    async def test_07_queries_distinguish_null_from_missing(self, store: StorageStrategy) -> None:
        await store.create_entities(
            "items", [{"item_id": "null", "label": None}, {"item_id": "missing"}]
        )
        for filters, expected in (
            ({"label": None}, ["null"]),
            ({"item_id": "missing", "label": None}, []),
        ):
            found = await answer_of(
                store.capabilities,
                lambda filters=filters: _ids(store, filters),  # type: ignore[misc]
                expected,
            )
            assert found == expected

    async def test_07_remove_is_not_a_storable_value(self, store: StorageStrategy) -> None:
        await store.create_entity("items", FULL)
        all_refused_at_once(
            UnsupportedValueError,
            store.save_entity("items", {"item_id": "x", "label": REMOVE}),
            store.create_entity("items", {"item_id": "x", "data": [REMOVE]}),
            store.update_entity("items", "full", {"data": {"inner": REMOVE}}),
        )

    # 8 --------------------------------------------------------------------------------------

    async def test_08_delete_is_true_then_false(self, store: StorageStrategy) -> None:
        await store.create_entity("items", FULL)
        await store.create_entity("items", {"item_id": "other"})
        assert await store.delete_entity("items", "full") is True
        assert await store.get_entity("items", "full") is None
        assert await store.delete_entity("items", "full") is False
        assert await store.delete_entity("items", "never") is False
        assert payload(await store.get_entity("items", "other")) == {"item_id": "other"}

    async def test_08_a_deleted_id_can_be_created_again(self, store: StorageStrategy) -> None:
        await store.create_entity("items", FULL)
        await store.update_entity("items", "full", {"label": "x"})
        await store.delete_entity("items", "full")
        assert await store.create_entity("items", {"item_id": "full", "count": 1}) == 1
        entity = await get_existing(store, "items", "full")
        assert payload(entity) == {"item_id": "full", "count": 1}

    # 9 --------------------------------------------------------------------------------------

    async def test_09_one_id_in_two_collections_is_two_entities(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", {"item_id": "same", "label": "item"})
        await store.create_entity("counters", {"counter_id": "same", "n": 1})
        await store.create_entity("templates", {"template_id": "same", "name": "template"})
        assert await store.update_entity("counters", "same", {"n": 2}) == 2
        assert await store.delete_entity("templates", "same") is True
        item, counter = (
            await get_existing(store, "items", "same"),
            await get_existing(store, "counters", "same"),
        )
        assert payload(item) == {"item_id": "same", "label": "item"}
        assert item["version"] == 1
        assert payload(counter) == {"counter_id": "same", "n": 2}
        assert await store.get_entity("templates", "same") is None

    # 10 -------------------------------------------------------------------------------------

    async def test_10_every_read_returns_a_copy(self, store: StorageStrategy) -> None:
        await store.create_entity("items", FULL)
        before = deepcopy(await get_existing(store, "items", "full"))
        async for each in _every_way_to_read(store, "full"):
            assert typed(each) == typed(before)
            _modify_in_place(each)
        assert typed(await get_existing(store, "items", "full")) == typed(before)

    async def test_10_two_copies_of_one_entity_are_independent(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", FULL)
        first, second = await store.get_entities("items", ["full", "full"])
        assert first is not None
        assert second is not None
        _modify_in_place(first)
        assert typed(payload(second)) == typed(FULL)

    async def test_10_entities_read_in_a_transaction_are_copies(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", FULL)
        async with store.begin_transaction() as tx:
            _modify_in_place(await get_existing(tx, "items", "full"))
            assert typed(payload(await get_existing(tx, "items", "full"))) == typed(FULL)
            await tx.save_entity("items", {"item_id": "new", "data": {"list": [1]}})
            _modify_in_place(await get_existing(tx, "items", "new"))
        assert typed(payload(await get_existing(store, "items", "full"))) == typed(FULL)
        assert payload(await get_existing(store, "items", "new")) == {
            "item_id": "new",
            "data": {"list": [1]},
        }

    async def test_10_the_entity_in_a_conflict_is_a_copy(self, store: StorageStrategy) -> None:
        await store.create_entity("items", FULL)
        with pytest.raises(ConcurrencyConflictError) as caught:
            await store.update_entity("items", "full", {}, expected_version=9)
        if caught.value.current is not None:
            _modify_in_place(caught.value.current)
        assert typed(payload(await store.get_entity("items", "full"))) == typed(FULL)

    # 11 -------------------------------------------------------------------------------------

    async def test_11_a_write_leaves_the_callers_object_unchanged(
        self, store: StorageStrategy
    ) -> None:
        given = {**deepcopy(FULL), "version": 77, "created_at": "2001-01-01", "zone": (1, [2])}
        before = deepcopy(given)
        fields = {"data": {"list": [1, {"a": 2}]}, "label": REMOVE, "version": 5}
        named = deepcopy(fields)
        await store.create_entity("items", given)
        await store.save_entity("items", given)
        await store.update_entity("items", "full", fields)
        await store.save_entities("items", [given])
        await store.update_entities("items", {"full": fields})
        await store.import_entities("items", [given])
        async with store.begin_transaction() as tx:
            await tx.save_entity("items", given)
            await tx.update_entity("items", "full", fields)
        assert given == before
        assert fields == named

    async def test_11_a_failed_write_leaves_the_callers_object_unchanged(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", FULL)
        given = {**deepcopy(FULL), "version": 77, "due_at": "2024-01-01T00:00:00+02:00"}
        bad = {**deepcopy(given), "undeclared": {"deep": [float("nan")]}}
        before, before_bad = deepcopy(given), repr(bad)
        with pytest.raises(AlreadyExistsError):
            await store.create_entity("items", given)
        with pytest.raises(ConcurrencyConflictError):
            await store.save_entity("items", given, expected_version=9)
        with pytest.raises(BatchError):
            await store.create_entities("items", [given])
        with pytest.raises(UnsupportedValueError):
            await store.save_entity("items", bad)
        with pytest.raises(UnsupportedValueError):
            await store.update_entity("items", "full", bad)
        assert given == before
        assert repr(bad) == before_bad

    async def test_11_modifying_an_object_after_its_write_has_no_effect(
        self, store: StorageStrategy
    ) -> None:
        given = deepcopy(FULL)
        await store.save_entity("items", given)
        _modify_in_place(given)
        assert typed(payload(await store.get_entity("items", "full"))) == typed(FULL)

    async def test_11_modifying_an_object_during_its_write_has_no_effect(
        self, store: StorageStrategy
    ) -> None:
        given, batch = deepcopy(FULL), [{**deepcopy(FULL), "item_id": "in a batch"}]
        writes = [
            asyncio.create_task(store.save_entity("items", given)),
            asyncio.create_task(store.save_entities("items", batch)),
        ]
        await asyncio.sleep(0)
        _modify_in_place(given)
        _modify_in_place(batch[0])
        batch.clear()
        await asyncio.gather(*writes)
        assert typed(payload(await store.get_entity("items", "full"))) == typed(FULL)
        assert typed(payload(await store.get_entity("items", "in a batch"))) == typed(
            {**FULL, "item_id": "in a batch"}
        )

    # 12 -------------------------------------------------------------------------------------

    async def test_12_unusual_ids_are_accepted(self, store: StorageStrategy) -> None:
        for each in STRANGE_IDS:
            assert await store.create_entity("items", {"item_id": each, "label": each}) == 1, each
        expected = {each: {"item_id": each, "label": each} for each in STRANGE_IDS}
        assert await payloads(store, "items", STRANGE_IDS) == expected
        for each in STRANGE_IDS:
            assert await store.update_entity("items", each, {"count": 1}) == 2, each
            assert payload(await store.get_entity("items", each)) == {**expected[each], "count": 1}
        for each in STRANGE_IDS[::2]:
            assert await store.delete_entity("items", each) is True, each
        remaining = sorted(STRANGE_IDS[1::2])
        assert sorted(await _ids_when_consistent(store, remaining)) == remaining

    async def test_12_unusual_ids_in_queries_and_pages(self, store: StorageStrategy) -> None:
        await store.create_entities("items", [{"item_id": each} for each in STRANGE_IDS])
        assert sorted(await _ids_when_consistent(store, sorted(STRANGE_IDS))) == sorted(STRANGE_IDS)
        for each in STRANGE_IDS:
            assert await _ids(store, {"item_id": each}) == [each]
        assert await _ids_page_by_page(store, 7) == sorted(STRANGE_IDS)

    async def test_12_unusual_ids_are_durable(self, harness: Harness) -> None:
        if not harness.capabilities.durable:
            pytest.skip("the engine is not durable")
        entities = [{"item_id": each, "label": each} for each in STRANGE_IDS]
        async with harness.store() as store:
            await store.create_entities("items", entities)
        async with harness.store() as store:
            found = await payloads(store, "items", STRANGE_IDS)
        assert list(found.values()) == entities

    # 13 -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("bad", BAD_IDS, ids=lambda bad: ascii(bad)[:12])
    async def test_13_an_invalid_id_is_refused_before_io(
        self, harness: Harness, store: StorageStrategy, bad: Any
    ) -> None:
        all_refused_at_once(
            InvalidKeyError,
            store.get_entity("items", bad),
            store.get_entities("items", ["good", bad]),
            store.create_entity("items", {"item_id": bad}),
            store.save_entity("items", {"item_id": bad}),
            store.update_entity("items", bad, {"label": "x"}),
            store.delete_entity("items", bad),
            store.create_entities("items", [{"item_id": "good"}, {"item_id": bad}]),
            store.save_entities("items", [{"item_id": "good"}, {"item_id": bad}]),
            store.delete_entities("items", ["good", bad]),
            store.import_entities("items", [{"item_id": bad, "version": 1}]),
            store.modify_entity("items", bad, lambda entity: entity),
        )
        if isinstance(harness, ObservesIO):
            assert not harness.touched()

    async def test_13_an_entity_without_its_key_is_refused(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        for entity in ({}, {"label": "x"}, {"id": "x"}, {"request_id": "x"}):
            refused_at_once(store.create_entity("items", entity), InvalidKeyError)
            refused_at_once(store.save_entity("items", entity), InvalidKeyError)
        if isinstance(harness, ObservesIO):
            assert not harness.touched()

    async def test_13_the_error_names_the_position_in_a_batch(self, store: StorageStrategy) -> None:
        batch = [{"item_id": "good"}, {"item_id": "fine"}, {"item_id": ""}]
        error = refused_at_once(store.create_entities("items", batch), InvalidKeyError)
        assert "item 2" in str(error)
        assert await store.get_entity("items", "good") is None

    # 14 -------------------------------------------------------------------------------------

    async def test_14_lookalikes_are_different_ids(self, store: StorageStrategy) -> None:
        for index, each in enumerate(LOOKALIKES):
            assert await store.create_entity("items", {"item_id": each, "count": index}) == 1
        expected: dict[str, dict[str, object] | None] = {
            each: {"item_id": each, "count": index} for index, each in enumerate(LOOKALIKES)
        }
        assert await payloads(store, "items", LOOKALIKES) == expected
        assert await _ids_when_consistent(store, sorted(LOOKALIKES)) == sorted(LOOKALIKES)
        for each in LOOKALIKES:
            assert await _ids(store, {"item_id": each}) == [each]
        for each in LOOKALIKES[::2]:
            assert await store.delete_entity("items", each) is True
            expected[each] = None
        assert await payloads(store, "items", LOOKALIKES) == expected

    # 15 -------------------------------------------------------------------------------------

    async def test_15_injection_as_id_field_name_and_value(self, store: StorageStrategy) -> None:
        await store.create_entity("items", FULL)
        entities = [{"item_id": each, each: each, "label": each} for each in INJECTIONS]
        for entity in entities:
            await store.create_entity("items", entity)
            await store.update_entity("items", entity["item_id"], {"data": {entity["label"]: 1}})
        expected = [{**each, "data": {each["label"]: 1}} for each in entities]
        found = await payloads(store, "items", INJECTIONS)
        assert list(found.values()) == expected
        for each in INJECTIONS:
            assert await store.update_entity("items", each, {each: REMOVE}) == 3
            assert await store.delete_entity("items", each) is True
        assert typed(payload(await store.get_entity("items", "full"))) == typed(FULL)
        assert await counted(store, "items", 1) == 1

    async def test_15_injection_as_filter_and_order(self, store: StorageStrategy) -> None:
        entities = [{"item_id": each, each: each, "label": each} for each in INJECTIONS]
        await store.create_entities("items", [FULL, *entities])
        everyone = sorted(["full", *INJECTIONS])
        assert await _ids_when_consistent(store, everyone) == everyone
        for each in INJECTIONS:
            assert await _ids(store, {each: each}) == [each]
            assert await _ids(store, {"label": eq(each)}) == [each]
            assert await _ids(store, {path("data", each): each}) == []
            ordered = await store.query_entities("items", order_by=f"-{each}", limit=1)
            assert [found["item_id"] for found in ordered] == [each]
            named = await store.query_entities("items", {"item_id": each}, fields=[each])
            assert named == [{"item_id": each, each: each, "version": 1}]
        assert await store.count_entities("items") == len(INJECTIONS) + 1

    async def test_15_injection_as_collection(self, store: StorageStrategy) -> None:
        await store.create_entity("items", FULL)
        for name in (
            *(each for each in INJECTIONS if each != "items"),
            "",
            "Items",
            "sqlite_master",
        ):
            all_refused_at_once(
                UnknownCollectionError,
                store.get_entity(name, "x"),
                store.save_entity(name, {"item_id": "x"}),
                store.delete_entity(name, "x"),
                store.query_entities(name),
                store.count_entities(name),
            )
        error = refused_at_once(store.get_entity("Items", "x"), UnknownCollectionError)
        assert "items" in str(error), "the error does not list the declared collections"
        assert typed(payload(await store.get_entity("items", "full"))) == typed(FULL)


async def _ids(store: StorageStrategy, filters: Any = None) -> list[str]:
    rows = await store.query_entities("items", filters, order_by="item_id")
    return [str(each["item_id"]) for each in rows]


async def _ids_when_consistent(store: StorageStrategy, expected: list[str]) -> list[str]:
    return await answer_of(store.capabilities, lambda: _ids(store), expected)


async def _ids_page_by_page(store: StorageStrategy, limit: int) -> list[str]:
    ids: list[str] = []
    cursor = None
    while True:
        page = await store.query_page("items", order_by="item_id", limit=limit, cursor=cursor)
        ids += [str(each["item_id"]) for each in page.items]
        cursor = page.cursor
        if cursor is None:
            return ids


async def _every_way_to_read(store: StorageStrategy, entity_id: str) -> Any:
    yield await get_existing(store, "items", entity_id)
    for found in await store.get_entities("items", [entity_id]):
        yield found
    await _ids_when_consistent(store, [entity_id])
    for row in await store.query_entities("items"):
        yield row
    async for row in store.stream_entities("items"):
        yield row
    for row in (await store.query_page("items")).items:
        yield row


def _containers(value: object) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _containers(each)
        yield value


def _modify_in_place(entity: dict[str, Any]) -> None:
    """Modify every dict and list in an entity, the innermost first."""
    for each in list(_containers(entity)):
        if isinstance(each, dict):
            each["modified"] = "modified"
        else:
            each.append("modified")
