"""Cases 86 to 90: references, timestamps, field types, recreated entities, transaction reentry."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store.changes import ABSENT, PRESENT, Patch, Put
from hf_async_store.errors import (
    BatchError,
    ConcurrencyConflictError,
    InvalidFieldError,
    ReferenceViolationError,
    StorageError,
    TransactionReentryError,
)
from hf_async_store.query import between, gte, lt
from hf_async_store.schema import Collection, Field
from hf_async_store.testing.assertions import (
    all_refused_at_once,
    counted,
    get_existing,
    payload,
    payloads,
    refused_at_once,
    typed,
)
from hf_async_store.testing.concurrency import (
    HANG_SECONDS,
    answer_of,
    has_ended,
    is_shared,
    second_store,
)
from hf_async_store.testing.harness import Harness, ObservesIO
from hf_async_store.values import REMOVE, UPDATED_AT, Key, utc_now

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hf_async_store.strategy import StorageStrategy

_TEMPLATE: Final = {"template_id": "t", "name": "small"}
_REQUEST: Final = {"request_id": "r", "template_id": "t", "status": "PENDING"}
_ORPHAN: Final = {"request_id": "orphan", "template_id": "nobody"}

_STORED_FORM: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\Z")

_PEOPLE: Final = Collection(
    "people", key="name", fields=[Field("boss", references="people")], indexes=["boss"]
)

_EXTERNAL_PARENT: Final = Collection(
    "jobs",
    key="job_id",
    fields=[Field("template_id", references="nowhere", enforced=False)],
    indexes=["template_id"],
)

_MOMENTS: Final = (
    ("0001-01-01T00:00:00", "0001-01-01T00:00:00.000000Z"),
    ("1999-12-31T23:59:59.999999+00:00", "1999-12-31T23:59:59.999999Z"),
    ("2024-01-01T01:00:00.5+02:00", "2023-12-31T23:00:00.500000Z"),
    ("2024-01-01", "2024-01-01T00:00:00.000000Z"),
    ("2024-01-01 00:00:00.000001", "2024-01-01T00:00:00.000001Z"),
    ("2024-01-01T00:00:01Z", "2024-01-01T00:00:01.000000Z"),
    ("2023-12-31T19:00:02-05:00", "2024-01-01T00:00:02.000000Z"),
    ("20240101T000003+0000", "2024-01-01T00:00:03.000000Z"),
    (
        datetime(2024, 1, 1, 5, 45, 4, tzinfo=timezone(timedelta(hours=5, minutes=45))),
        "2024-01-01T00:00:04.000000Z",
    ),
    ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999999Z"),
)
"""Timestamps as callers write them, in chronological order, and the form in which they are stored."""

_INVALID_TIMESTAMPS: Final = (
    "",
    "soon",
    "2024-13-01",
    "2024-01-01T25:00:00",
    "24-01-01",
    "now",
    "12:00:00",
    "0000-01-01",
    "9999-12-31T23:59:59-01:00",
)

_WRONG_TYPES: Final[dict[str, tuple[object, ...]]] = {
    "label": (1, 1.5, True, ["a"], {"a": 1}),
    "count": ("1", 1.0, 1.5, True, [1], {}),
    "ratio": ("1.5", False, [1.5], {}),
    "active": (1, 0, "true", "", 1.0, []),
    "due_at": (1, 1.5, True, [], {}, *_INVALID_TIMESTAMPS),
}
_TYPES: Final = {
    "label": "text",
    "count": "integer",
    "ratio": "number",
    "active": "boolean",
    "due_at": "timestamp",
}


class ReferenceContract:
    """References, timestamps and declared types; recreated entities; reentry of a transaction."""

    # 86 -------------------------------------------------------------------------------------

    async def test_86_a_missing_parent(self, store: StorageStrategy) -> None:
        await store.create_entity("templates", _TEMPLATE)
        await store.create_entity("requests", _REQUEST)
        before = await get_existing(store, "requests", "r")
        writes: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: store.create_entity("requests", _ORPHAN),
            lambda: store.save_entity("requests", _ORPHAN),
            lambda: store.import_entities("requests", [_ORPHAN]),
            lambda: store.save_entity("requests", {**_REQUEST, "template_id": "nobody"}),
            lambda: store.update_entity("requests", "r", {"template_id": "nobody"}),
            lambda: store.create_entity("machines", {"machine_id": "m", "request_id": "nobody"}),
        )
        if not store.capabilities.references:
            for write in writes:
                await write()
            return
        for write in writes:
            assert isinstance(await _failure(write), ReferenceViolationError)
        assert await store.get_entity("requests", "orphan") is None
        assert await store.get_entity("machines", "m") is None
        assert typed(await store.get_entity("requests", "r")) == typed(before)

    async def test_86_the_error_names_the_settings_to_change(self, store: StorageStrategy) -> None:
        if not store.capabilities.references:
            pytest.skip("the engine does not enforce references")
        with pytest.raises(ReferenceViolationError, match=r"enforced=False.* enforce_references"):
            await store.create_entity("requests", _ORPHAN)
        with pytest.raises(ReferenceViolationError, match=r"enforced=False.* enforce_references"):
            async with store.begin_transaction() as tx:
                await tx.create_entity("requests", _ORPHAN)

    async def test_86_an_unenforced_reference(self, harness: Harness) -> None:
        async with harness.store([_EXTERNAL_PARENT]) as store:
            long = {"job_id": "long", "template_id": "t" * 3000}
            assert await store.create_entity("jobs", {"job_id": "j", "template_id": "t"}) == 1
            assert await store.create_entity("jobs", long) == 1
            assert await store.update_entity("jobs", "j", {"template_id": "other"}) == 2
            assert await store.import_entities("jobs", [{**long, "version": 3}]) == [3]
            assert await store.count_entities("jobs", {"template_id": "other"}) == 1

    async def test_86_deleting_a_parent_with_children(self, store: StorageStrategy) -> None:
        await _create_family(store)
        if not store.capabilities.references:
            assert await store.delete_entity("templates", "t") is True
            return
        version = (await get_existing(store, "templates", "t"))["version"]
        writes: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: store.delete_entity("templates", "t"),
            lambda: store.delete_entity("templates", "t", expected_version=1),
            lambda: store.delete_entities("templates", ["t"]),
        )
        for write in writes:
            assert isinstance(await _failure(write), ReferenceViolationError)
        assert (await get_existing(store, "templates", "t"))["version"] == version
        # A parent can be deleted once no child refers to it.
        await store.create_entity("templates", {"template_id": "other"})
        await store.update_entity("requests", "r", {"template_id": "other"})
        assert await store.delete_entity("templates", "t") is True
        await store.update_entity("requests", "r", {"template_id": REMOVE})
        assert await store.delete_entity("templates", "other") is True

    async def test_86_a_parent_may_change(self, store: StorageStrategy) -> None:
        await _create_family(store)
        assert await store.save_entity("templates", {"template_id": "t"}) == 2
        assert await store.update_entity("templates", "t", {"name": "x"}) == 3
        assert await store.import_entities("templates", [{**_TEMPLATE, "version": 9}]) == [9]
        assert payload(await store.get_entity("requests", "r")) == _REQUEST

    async def test_86_a_null_or_missing_reference_is_allowed(self, store: StorageStrategy) -> None:
        assert await store.create_entity("requests", {"request_id": "missing"}) == 1
        assert await store.create_entity("requests", {"request_id": "r", "template_id": None}) == 1
        assert await store.update_entity("requests", "missing", {"template_id": None}) == 2
        assert await store.update_entity("requests", "r", {"template_id": REMOVE}) == 2

    async def test_86_parents_and_children_in_one_transaction(self, store: StorageStrategy) -> None:
        async with store.begin_transaction() as tx:
            await _create_family(tx)
            await tx.create_entity("machines", {"machine_id": "m", "request_id": "r"})
        assert await _family_exists(store) == [True, True, True]
        async with store.begin_transaction() as tx:
            await tx.delete_entity("machines", "m")
            await tx.delete_entity("requests", "r")
            await tx.delete_entity("templates", "t")
        assert await _family_exists(store) == [False, False, False]

    async def test_86_a_broken_reference_aborts_a_transaction(self, store: StorageStrategy) -> None:
        async def write() -> None:
            async with store.begin_transaction() as tx:
                await tx.create_entity("templates", _TEMPLATE)
                await tx.create_entity("requests", _ORPHAN)

        if not store.capabilities.references:
            await write()
            assert await store.get_entity("requests", "orphan") is not None
            return
        with pytest.raises(ReferenceViolationError):
            await write()
        assert await store.get_entity("templates", "t") is None
        assert await store.get_entity("requests", "orphan") is None

    async def test_86_a_parent_deleted_in_the_same_transaction(
        self, store: StorageStrategy
    ) -> None:
        async def write() -> None:
            async with store.begin_transaction() as tx:
                await tx.delete_entity("templates", "t")
                await tx.create_entity("requests", _REQUEST)

        await store.create_entity("templates", _TEMPLATE)
        if not store.capabilities.references:
            await write()
            return
        with pytest.raises(ReferenceViolationError):
            await write()
        assert await _family_exists(store) == [True, False, False]

    async def test_86_parents_and_children_in_one_batch(self, store: StorageStrategy) -> None:
        """A batch with changes of several collections, parents first, as coalescing produces them."""
        at = utc_now()
        outcomes = await store.engine.write_each(
            [
                Put(Key("templates", "t"), {**_TEMPLATE, UPDATED_AT: at}, at, ABSENT),
                Put(Key("requests", "r"), {**_REQUEST, UPDATED_AT: at}, at, ABSENT),
                Put(Key("requests", "orphan"), {**_ORPHAN, UPDATED_AT: at}, at, ABSENT),
                Patch(Key("requests", "r"), {"template_id": "nobody"}, at, PRESENT),
                Put(
                    Key("machines", "m"),
                    {"machine_id": "m", "request_id": "r", "template_id": "t", UPDATED_AT: at},
                    at,
                ),
            ]
        )
        good = outcomes[0], outcomes[1], outcomes[4]
        assert good == (1, 1, 1)
        broken = [isinstance(each, ReferenceViolationError) for each in (outcomes[2], outcomes[3])]
        assert broken == [store.capabilities.references] * 2
        assert await _family_exists(store) == [True, True, True]

    async def test_86_orphans_in_a_large_batch(self, store: StorageStrategy) -> None:
        await store.create_entity("templates", _TEMPLATE)
        batch = [
            {"request_id": f"{each:03}", "template_id": "nobody" if each % 10 == 7 else "t"}
            for each in range(200)
        ]
        if not store.capabilities.references:
            assert await store.create_entities("requests", batch) == [1] * 200
            return
        with pytest.raises(BatchError) as caught:
            await store.create_entities("requests", batch)
        outcomes = caught.value.outcomes
        assert [each if isinstance(each, int) else type(each) for each in outcomes] == [
            ReferenceViolationError if each % 10 == 7 else 1 for each in range(200)
        ]
        assert await counted(store, "requests", 180) == 180

    async def test_86_parents_in_a_batch_of_deletes(self, store: StorageStrategy) -> None:
        await _create_family(store)
        await store.create_entity("templates", {"template_id": "free"})
        ids = ["t", "free", "nobody"]
        if not store.capabilities.references:
            assert await store.delete_entities("templates", ids) == [True, True, False]
            return
        with pytest.raises(BatchError) as caught:
            await store.delete_entities("templates", ids)
        assert isinstance(caught.value.outcomes[0], ReferenceViolationError)
        assert caught.value.outcomes[1:] == [True, False]
        assert await _family_exists(store) == [True, True, False]

    async def test_86_a_collection_that_refers_to_itself(self, harness: Harness) -> None:
        async with harness.store([_PEOPLE]) as store:
            people = [
                {"name": "ann", "boss": "ann"},
                {"name": "bob", "boss": "ann"},
                {"name": "cid", "boss": "bob"},
            ]
            assert await store.create_entities("people", people) == [1, 1, 1]
            found = await payloads(store, "people", ["ann", "bob", "cid"])
            assert list(found.values()) == people
            if store.capabilities.references:
                with pytest.raises(ReferenceViolationError):
                    await store.delete_entity("people", "bob")
                with pytest.raises(ReferenceViolationError):
                    await store.update_entity("people", "cid", {"boss": "eve"})
            assert await store.delete_entities("people", ["cid", "bob"]) == [True, True]
            assert await store.delete_entity("people", "ann") is True

    async def test_86_a_concurrent_delete_leaves_no_orphan(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        if not store.capabilities.references:
            pytest.skip("the engine does not enforce references")
        async with second_store(harness, store) as other:
            for number in range(20):
                template = {"template_id": f"t{number}"}
                request = {"request_id": f"r{number}", "template_id": f"t{number}"}
                await store.create_entity("templates", template)
                deletion, creation = await asyncio.gather(
                    store.delete_entity("templates", f"t{number}"),
                    other.create_entity("requests", request),
                    return_exceptions=True,
                )
                for each in (deletion, creation):
                    assert not isinstance(each, BaseException) or isinstance(
                        each, ReferenceViolationError
                    )
                parent = await store.get_entity("templates", f"t{number}")
                child = await store.get_entity("requests", f"r{number}")
                assert (parent is None) is (deletion is True)
                assert (child is None) is (creation != 1)
                assert child is None or parent is not None, "the child refers to a deleted parent"

    async def test_86_enforcement_turned_off(self, harness: Harness) -> None:
        if not harness.capabilities.references:
            pytest.skip("the engine does not enforce references")
        async with harness.store(enforce_references=False) as store:
            await store.create_entity("requests", _ORPHAN)
            await _create_family(store)
            await store.update_entity("requests", "r", {"template_id": "other"})
            await store.update_entity("requests", "r", {"template_id": "t"})
            assert await store.delete_entity("templates", "t") is True
            async with store.begin_transaction() as tx:
                await tx.create_entity("machines", {"machine_id": "m", "request_id": "nobody"})
            assert await _family_exists(store) == [False, True, True]

    async def test_86_existing_orphans_can_be_updated(self, harness: Harness) -> None:
        """A write that does not change a dangling reference, stored while enforcement was off, succeeds."""
        if not harness.capabilities.references or not is_shared(harness.capabilities):
            pytest.skip(
                "the engine does not enforce references, or another store of it has other data"
            )
        async with harness.store(enforce_references=False) as store:
            await store.create_entity("requests", _ORPHAN)
        async with harness.store() as store:
            assert await store.update_entity("requests", "orphan", {"status": "DONE"}) == 2
            assert await store.save_entity("requests", {**_ORPHAN, "status": "DONE"}) == 3
            with pytest.raises(ReferenceViolationError):
                await store.update_entity("requests", "orphan", {"template_id": "nobody else"})
            assert await store.delete_entity("requests", "orphan") is True

    # 87 -------------------------------------------------------------------------------------

    async def test_87_timestamps_set_by_the_store(self, store: StorageStrategy) -> None:
        writes: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: store.create_entity("items", {"item_id": "a"}),
            lambda: store.update_entity("items", "a", {"label": "x"}),
            lambda: store.save_entity("items", {"item_id": "a"}),
            lambda: store.update_entities("items", {"a": {}}),
            lambda: store.modify_entity("items", "a", lambda entity: entity),
        )
        created: object = None
        for write in writes:
            before = utc_now()
            await write()
            after = utc_now()
            entity = await get_existing(store, "items", "a")
            assert before <= str(entity["updated_at"]) <= after
            assert _STORED_FORM.match(str(entity["updated_at"]))
            created = created or entity["created_at"]
            assert entity["created_at"] == created

    async def test_87_given_timestamps(self, store: StorageStrategy) -> None:
        """A given `created_at` is stored; a given `updated_at` is replaced."""
        given = {"created_at": "2001-02-03T04:05:06+01:00", "updated_at": "2001-01-01T00:00:00Z"}
        started = utc_now()
        await store.create_entity("items", {"item_id": "a", **given})
        entity = await get_existing(store, "items", "a")
        assert entity["created_at"] == "2001-02-03T03:05:06.000000Z"
        assert str(entity["updated_at"]) >= started
        await store.save_entity("items", {"item_id": "a"})
        assert (await get_existing(store, "items", "a"))["created_at"] == entity["created_at"]
        await store.update_entity("items", "a", {**given, "created_at": "2002-01-01"})
        entity = await get_existing(store, "items", "a")
        assert entity["created_at"] == "2002-01-01T00:00:00.000000Z"
        assert str(entity["updated_at"]) >= started
        await store.save_entity("items", {"item_id": "a", "created_at": "2003-01-01"})
        assert (await get_existing(store, "items", "a"))[
            "created_at"
        ] == "2003-01-01T00:00:00.000000Z"

    @pytest.mark.parametrize("verb", ["create", "save", "create many", "save many", "transaction"])
    async def test_87_a_null_timestamp_is_set_by_the_store(
        self, store: StorageStrategy, verb: str
    ) -> None:
        ids = [str(each) for each in range(10)]  # enough for the validation of a whole batch
        dumps = [{"item_id": each, "created_at": None, "updated_at": None} for each in ids]
        if verb == "create":
            for each in dumps:
                await store.create_entity("items", each)
        elif verb == "save":
            for each in dumps:
                await store.save_entity("items", each)
        elif verb == "create many":
            await store.create_entities("items", dumps)
        elif verb == "save many":
            await store.save_entities("items", dumps)
        else:
            async with store.begin_transaction() as tx:
                await tx.create_entities("items", dumps[:5])
                for each in dumps[5:]:
                    await tx.save_entity("items", each)
        first = await store.get_entities("items", ids)
        for entity in first:
            assert entity is not None
            assert isinstance(entity["created_at"], str)
        # The stored value is kept, as if none were given.
        await store.save_entity("items", dumps[0])
        again = await get_existing(store, "items", "0")
        assert (again["version"], again["created_at"]) == (2, first[0] and first[0]["created_at"])

    async def test_87_every_accepted_form_is_normalised(self, store: StorageStrategy) -> None:
        for given, form in _MOMENTS:
            await store.save_entity("items", {"item_id": "a", "due_at": given, "created_at": given})
            entity = await get_existing(store, "items", "a")
            assert (entity["due_at"], entity["created_at"]) == (form, form)
            await store.update_entity("items", "a", {"due_at": None})
            await store.update_entity("items", "a", {"due_at": given})
            assert (await get_existing(store, "items", "a"))["due_at"] == form

    async def test_87_only_declared_fields_are_converted(self, store: StorageStrategy) -> None:
        text = "2024-01-01T01:00:00+02:00"
        entity = {"item_id": "a", "label": text, "data": [text], "when": text, "created_on": text}
        await store.save_entity("items", entity)
        assert payload(await store.get_entity("items", "a")) == entity

    async def test_87_imported_timestamps_are_kept(self, store: StorageStrategy) -> None:
        old = "2020-01-01T00:00:00.000000Z"
        given: dict[str, dict[str, Any]] = {
            "both": {"created_at": old, "updated_at": old},
            "null": {"created_at": None, "updated_at": None},
            "missing": {},
            "zone": {"created_at": "2020-01-01T02:00:00+02:00", "updated_at": "2020-01-01"},
        }
        imported = [{"item_id": name, "version": 3, **each} for name, each in given.items()]
        assert await store.import_entities("items", imported) == [3, 3, 3, 3]
        expected = [*imported[:3], {**imported[0], "item_id": "zone"}]
        assert await store.get_entities("items", list(given)) == expected

    @pytest.mark.parametrize("verb", ["save", "update", "transaction"])
    async def test_87_a_write_replaces_an_imported_updated_at(
        self, store: StorageStrategy, verb: str
    ) -> None:
        old = "2020-01-01T00:00:00.000000Z"
        given: dict[str, dict[str, Any]] = {
            "both": {"created_at": old, "updated_at": old},
            "null": {"created_at": None, "updated_at": None},
            "missing": {},
        }
        await store.import_entities(
            "items", [{"item_id": name, "version": 3, **each} for name, each in given.items()]
        )
        started = utc_now()
        for name in given:
            if verb == "save":
                assert await store.save_entity("items", {"item_id": name}) == 4
            elif verb == "update":
                assert await store.update_entity("items", name, {"label": "x"}) == 4
            else:
                async with store.begin_transaction() as tx:
                    assert await tx.update_entity("items", name, {"label": "x"}) == 4
        for name, each in given.items():
            entity = await get_existing(store, "items", name)
            assert str(entity["updated_at"]) >= started, name
            assert entity.get("created_at", "missing") == each.get("created_at", "missing"), name

    async def test_87_timestamps_are_ordered_chronologically(self, store: StorageStrategy) -> None:
        items = [
            {"item_id": f"{index:02}", "due_at": given, "created_at": given}
            for index, (given, _) in enumerate(_MOMENTS)
        ]
        await store.create_entities("items", items[::2] + items[1::2])
        ids = [str(each["item_id"]) for each in items]
        for order, expected in (
            ("due_at", ids),
            ("-due_at", ids[::-1]),
            ("created_at", ids),
            ("-created_at", ids[::-1]),
        ):
            assert await _ids(store, expected, order_by=order) == expected, order

    async def test_87_filters_accept_every_form(self, store: StorageStrategy) -> None:
        await store.create_entities(
            "items",
            [
                {"item_id": f"{index:02}", "due_at": given}
                for index, (given, _) in enumerate(_MOMENTS)
            ],
        )
        for index, (given, form) in enumerate(_MOMENTS):
            for value in (given, form):
                one = [f"{index:02}"]
                later = [f"{each:02}" for each in range(index, len(_MOMENTS))]
                assert await _ids(store, one, {"due_at": value}) == one
                assert await _ids(store, later, {"due_at": gte(value)}) == later
        assert await _ids(store, ["00", "01"], {"due_at": lt("2000-01-01")}) == ["00", "01"]
        low, high = "2024-01-01T01:00:00+01:00", datetime(2024, 1, 1, 0, 0, 1, tzinfo=UTC)
        found = await _ids(store, ["03", "04", "05"], {"due_at": between(low, high)})
        assert found == ["03", "04", "05"]

    # 88 -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("field", _WRONG_TYPES)
    async def test_88_a_wrong_type_is_refused_at_once(
        self, harness: Harness, store: StorageStrategy, field: str
    ) -> None:
        for value in _WRONG_TYPES[field]:
            entity = {"item_id": "a", field: value}
            for call in (
                store.create_entity("items", entity),
                store.save_entity("items", entity),
                store.update_entity("items", "a", {field: value}),
                store.create_entities("items", [{"item_id": "b"}, entity]),
                store.save_entities("items", [{"item_id": "b"}, entity]),
                store.update_entities("items", {"a": {field: value}}),
                store.import_entities("items", [entity]),
            ):
                error = refused_at_once(call, InvalidFieldError)
                for part in ("items", field, _TYPES[field]):
                    assert part in str(error), "the error names collection, field and type"
        if isinstance(harness, ObservesIO):
            assert not harness.touched()

    async def test_88_the_types_of_created_at_and_updated_at(self, store: StorageStrategy) -> None:
        for name in ("created_at", "updated_at"):
            for value in (1, True, "soon", [1]):
                all_refused_at_once(
                    InvalidFieldError,
                    store.save_entity("items", {"item_id": "a", name: value}),
                    store.update_entity("items", "a", {name: value}),
                    store.import_entities("items", [{"item_id": "a", name: value}]),
                )

    async def test_88_null_is_allowed(self, store: StorageStrategy) -> None:
        entity: dict[str, object] = {"item_id": "a", **dict.fromkeys((*_WRONG_TYPES, "data"))}
        await store.save_entity("items", entity)
        assert payload(await store.get_entity("items", "a")) == entity

    async def test_88_null_in_a_required_field_is_refused(self, store: StorageStrategy) -> None:
        all_refused_at_once(
            InvalidFieldError,
            store.create_entity("accounts", {"account_id": "a"}),
            store.save_entity("accounts", {"account_id": "a"}),
            store.save_entity("accounts", {"account_id": "a", "balance": None}),
            store.import_entities("accounts", [{"account_id": "a"}]),
            store.update_entity("accounts", "a", {"balance": None}),
            store.update_entity("accounts", "a", {"balance": REMOVE}),
        )
        await store.create_entity("accounts", {"account_id": "a", "balance": 1})
        assert await store.update_entity("accounts", "a", {"owner": "x"}) == 2
        assert payload(await store.get_entity("accounts", "a")) == {
            "account_id": "a",
            "balance": 1,
            "owner": "x",
        }

    async def test_88_a_wrong_type_is_refused_in_a_transaction(
        self, store: StorageStrategy
    ) -> None:
        async with store.begin_transaction() as tx:
            refused_at_once(
                tx.create_entity("items", {"item_id": "a", "count": "1"}), InvalidFieldError
            )
            refused_at_once(tx.save_entity("accounts", {"account_id": "a"}), InvalidFieldError)

    async def test_88_a_number_is_an_integer_or_a_float(self, store: StorageStrategy) -> None:
        for value in (1, 1.5, 0.0, 2**63 - 1):
            await store.save_entity("items", {"item_id": "a", "ratio": value})
            assert typed((await get_existing(store, "items", "a"))["ratio"]) == typed(value)

    # 89 -------------------------------------------------------------------------------------

    async def test_89_a_recreation_during_a_transaction_is_a_conflict(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        """Either the other writer has to wait for the transaction, or the transaction must fail."""
        await store.create_entity("items", {"item_id": "a", "label": "first incarnation"})

        async def recreate(rival: StorageStrategy) -> None:
            await rival.delete_entity("items", "a")
            await rival.create_entity("items", {"item_id": "a", "label": "second incarnation"})

        async with second_store(harness, store) as other:
            conflict, interleaved = None, False
            try:
                async with store.begin_transaction() as tx:
                    assert (await get_existing(tx, "items", "a"))["label"] == "first incarnation"
                    rival = asyncio.create_task(recreate(other))
                    interleaved = await has_ended(rival)
                    await tx.update_entity("items", "a", {"count": 1})
            except ConcurrencyConflictError as exc:
                conflict = exc
            await asyncio.wait_for(rival, HANG_SECONDS)
        if conflict is not None:
            assert conflict.retryable
        assert (conflict is not None) or not interleaved
        assert payload(await store.get_entity("items", "a")) == {
            "item_id": "a",
            "label": "second incarnation",
        }

    async def test_89_a_stale_writer_after_a_recreation(self, store: StorageStrategy) -> None:
        first = await store.create_entity("items", {"item_id": "a", "label": "first incarnation"})
        await store.delete_entity("items", "a")
        await store.create_entity("items", {"item_id": "a", "label": "second incarnation"})
        stale = store.update_entity("items", "a", {"label": "stale"}, expected_version=first)
        if store.capabilities.detects_recreation:
            with pytest.raises(ConcurrencyConflictError):
                await stale
            assert (await get_existing(store, "items", "a"))["label"] == "second incarnation"
        else:
            # A version is unique only from the creation to the deletion of an entity. This is
            # documented, and a consequence of versions that are plain numbers.
            assert await stale == 2

    # 90 -------------------------------------------------------------------------------------

    async def test_90_a_store_verb_inside_the_own_transaction_is_refused(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", {"item_id": "a"})
        async with store.begin_transaction() as tx:
            await tx.update_entity("items", "a", {"label": "inside"})
            all_refused_at_once(
                TransactionReentryError,
                store.get_entity("items", "a"),
                store.get_entities("items", ["a"]),
                store.create_entity("items", {"item_id": "b"}),
                store.save_entity("items", {"item_id": "b"}),
                store.update_entity("items", "a", {"label": "outside"}),
                store.delete_entity("items", "a"),
                store.create_entities("items", [{"item_id": "b"}]),
                store.save_entities("items", [{"item_id": "b"}]),
                store.update_entities("items", {"a": {}}),
                store.delete_entities("items", ["a"]),
                store.import_entities("items", [{"item_id": "b"}]),
                store.modify_entity("items", "a", lambda entity: entity),
                store.query_entities("items"),
                store.query_page("items"),
                store.count_entities("items"),
                store.explain_query("items"),
                store.test_connection(),
                store.health(),
                store.begin_transaction().__aenter__(),
                anext(store.stream_entities("items")),
            )
            # The refused calls do not affect the transaction.
            await tx.update_entity("items", "a", {"count": 1})
        assert payload(await store.get_entity("items", "a")) == {
            "item_id": "a",
            "label": "inside",
            "count": 1,
        }
        assert await store.get_entity("items", "b") is None

    async def test_90_a_store_verb_after_the_transaction_is_accepted(
        self, store: StorageStrategy
    ) -> None:
        with pytest.raises(ZeroDivisionError):
            async with store.begin_transaction() as tx:
                await tx.save_entity("items", {"item_id": "a"})
                raise ZeroDivisionError
        assert await store.save_entity("items", {"item_id": "a"}) == 1
        async with store.begin_transaction() as tx:
            await tx.save_entity("items", {"item_id": "a"})
        assert await store.save_entity("items", {"item_id": "a"}) == 3

    async def test_90_a_transaction_that_was_not_entered_does_not_refuse_verbs(
        self, store: StorageStrategy
    ) -> None:
        store.begin_transaction()
        assert await store.save_entity("items", {"item_id": "a"}) == 1

    async def test_90_a_store_verb_from_another_task_waits_or_conflicts(
        self, store: StorageStrategy
    ) -> None:
        await store.create_entity("items", {"item_id": "a", "count": 0})
        others: list[asyncio.Task[Any]] = []
        try:
            async with store.begin_transaction() as tx:
                await tx.update_entity("items", "a", {"count": 1})
                others += [
                    asyncio.create_task(store.update_entity("items", "a", {"label": "other"})),
                    asyncio.create_task(store.create_entity("items", {"item_id": "b"})),
                    asyncio.create_task(store.get_entity("items", "a")),
                    asyncio.create_task(store.query_entities("items")),
                    asyncio.create_task(_transaction(store)),
                ]
                await has_ended(*others)
        except ConcurrencyConflictError as exc:
            assert exc.retryable, "without locks, the later transaction must be retried"
        results = await asyncio.wait_for(
            asyncio.gather(*others, return_exceptions=True), HANG_SECONDS
        )
        for each in results:
            if isinstance(each, BaseException):
                assert isinstance(each, StorageError)
                assert each.retryable
        assert results[1] == 1
        assert await store.get_entity("items", "b") is not None


async def _create_family(repository: Any) -> None:
    await repository.create_entity("templates", _TEMPLATE)
    await repository.create_entity("requests", _REQUEST)


async def _family_exists(store: StorageStrategy) -> list[bool]:
    members = (("templates", "t"), ("requests", "r"), ("machines", "m"))
    return [await store.get_entity(*each) is not None for each in members]


async def _failure(write: Callable[[], Awaitable[object]]) -> StorageError:
    """The error of a write; for a batch of one change, the error of that change."""
    with pytest.raises(StorageError) as caught:
        await write()
    error = caught.value
    if isinstance(error, BatchError):
        [only] = error.outcomes
        assert isinstance(only, StorageError)
        return only
    return error


async def _ids(
    store: StorageStrategy, expected: list[str], filters: Any = None, order_by: str = "due_at"
) -> list[str]:
    async def ask() -> list[str]:
        rows = await store.query_entities("items", filters, order_by)
        return [str(each["item_id"]) for each in rows]

    return await answer_of(store.capabilities, ask, expected)


async def _transaction(store: StorageStrategy) -> None:
    async with store.begin_transaction() as tx:
        await tx.update_entity("items", "a", {"data": 1})
