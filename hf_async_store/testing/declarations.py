"""Cases 92 to 97 and 129: declarations that change, and programs with different declarations."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, get_args

import pytest

from hf_async_store.changes import Put
from hf_async_store.errors import InvalidFieldError, SchemaMismatchError, StorageError
from hf_async_store.query import (
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
    path,
)
from hf_async_store.schema import Collection, Field, Index
from hf_async_store.strategies.memory import MemoryStorageStrategy
from hf_async_store.testing.assertions import get_existing, typed
from hf_async_store.testing.cancellation_stepper import cancelled_at, turns
from hf_async_store.testing.repetitions import sampled
from hf_async_store.values import REMOVE, VERSION, FieldType, Key, utc_now

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hf_async_store.driver import SchemaChange
    from hf_async_store.query import Filters, OrderBy
    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.values import Entity, Value

TYPES: Final[tuple[FieldType, ...]] = get_args(FieldType)
TIMES: Final = tuple(f"2026-01-{day:02}T00:00:00.000000Z" for day in (2, 3, 29))
MISSING: Final = object()

VALUES: Final[Mapping[FieldType, Sequence[object]]] = {
    "text": ("b", "B", "", "bc", "10", TIMES[0], "2026-01-02"),
    "integer": (0, -1, 2, 10, 2**53 + 1),
    "number": (1.5, 2, 0.0, -0.5, 10**15),
    "boolean": (True, False),
    "timestamp": TIMES,
    "json": ([1, "b"], {"a": 1}, "b", 2, 1.5, True, TIMES[1], "2026-01-02"),
}
"""Values that fit each type, in addition to null and a missing field."""

OPERANDS: Final[Mapping[FieldType, Sequence[Value]]] = {
    "text": ("b", "", TIMES[0]),
    "integer": (0, 2, 10),
    "number": (1.5, 2, -0.5),
    "boolean": (True, False),
    "timestamp": TIMES,
    "json": (),
}

POSITIVE: Final = (1.5, 2, 10, 2**53 + 1, 10**15)
"""Of all values, the numbers above 0."""

PAIRS: Final = [(before, after) for before in TYPES for after in TYPES if before != after]
"""Every ordered pair of different types."""


def filters_of(name: str, kind: FieldType) -> list[Filters]:
    """Filters of a field with every operator."""
    filters = [{name: exists()}, {name: exists(False)}, {name: eq(None)}]
    operands = OPERANDS[kind]
    for each in operands:
        filters += [{name: compare(each)} for compare in (eq, ne, lt, lte, gt, gte)]
    if operands:
        filters += [{name: in_(operands)}, {name: not_in(operands)}]
        low, high = sorted(operands[:2], key=lambda each: (str(type(each)), each))
        filters += [{name: between(low, high)}]
    if kind == "text":
        filters += [{name: begins_with("b")}, {name: contains("b")}]
    negated: list[Filters] = [not_(each) for each in filters]
    return [*filters, *negated]


async def answers(
    store: RepositoryInterface, collection: Collection, fields: Iterable[str]
) -> dict[str, object]:
    """The answers of a store to queries of these fields: filters, counts, orders, pages, streams."""
    name = collection.name
    found: dict[str, object] = {}
    for each in fields:
        kind = collection.fields[each].type
        for filters in sampled(filters_of(each, kind)):
            entities = await store.query_entities(name, filters)
            found[f"{filters}"] = sorted(map(collection.id_of, entities))
            found[f"count {filters}"] = await store.count_entities(name, filters)
        if kind == "json":
            continue
        for order in (asc(each), desc(each)):
            entities = await store.query_entities(name, None, order)
            found[f"{order}"] = list(map(collection.id_of, entities))
            found[f"{order} limit"] = [
                collection.id_of(entity)
                async for entity in store.stream_entities(name, None, order, 5)
            ]
            found[f"{order} pages"] = await _walk(store, collection, order)
    return found


async def _walk(
    store: RepositoryInterface, collection: Collection, order: OrderBy
) -> list[list[str]]:
    pages: list[list[str]] = []
    cursor = None
    while not pages or cursor is not None:
        page = await store.query_page(collection.name, None, order, 5, cursor=cursor)
        pages.append(list(map(collection.id_of, page.items)))
        cursor = page.cursor
    return pages


async def expected_answers(
    entities: Iterable[Entity], collection: Collection, fields: Iterable[str]
) -> dict[str, object]:
    """The answers of the memory engine that has these entities, whatever their values."""
    async with MemoryStorageStrategy(collections=[collection]) as store:
        puts = [
            Put(
                Key(collection.name, collection.id_of(each)),
                {name: value for name, value in each.items() if name != VERSION},
                utc_now(),
                import_version=1,
            )
            for each in entities
        ]
        for outcome in await store.engine.write_each(puts):
            assert not isinstance(outcome, StorageError), outcome
        return await answers(store, collection, fields)


async def check_answers(store: StorageStrategy, collection: Collection) -> None:
    """Assert that the answers of a store by its declaration are those of the memory engine."""
    fields = [each for each in collection.fields if each not in (collection.key, "updated_at")]
    entities = await store.query_entities(collection.name)
    expected = await expected_answers(entities, collection, fields)
    found = await answers(store, collection, fields)
    wrong = [each for each in expected if typed(found[each]) != typed(expected[each])]
    assert wrong == []
    for each in entities:
        assert typed(await store.get_entity(collection.name, collection.id_of(each))) == typed(each)


def declared(*fields: Field | str, indexes: Iterable[Index | str] = ()) -> list[Collection]:
    return [Collection("things", key="thing_id", fields=fields, indexes=indexes)]


def thing(number: int, **fields: object) -> dict[str, object]:
    present = {name: value for name, value in fields.items() if value is not MISSING}
    return {"thing_id": f"t{number:02}", "group": f"g{number % 2}", **present}


def ids_of(things: Iterable[Entity]) -> list[str]:
    return sorted(str(each["thing_id"]) for each in things)


def _several(values: Sequence[object], number: int) -> object:
    """One of the values, of null and of a missing field."""
    all_values = (*values, None, MISSING)
    return all_values[number % len(all_values)]


def _by_kind(found: Iterable[SchemaChange], kind: str) -> dict[str, str]:
    """The changes of a kind: the details by field."""
    return {each.name: each.detail for each in found if each.kind == kind}


GROUP: Final = Field("group")
ANY_VALUES: Final = [each for kind in TYPES for each in VALUES[kind]]
LATER: Final = declared(
    GROUP,
    *(Field(f"a_{kind}", kind) for kind in TYPES),
    indexes=["a_text", Index("group", "a_integer"), Index("a_timestamp")],
)


class DeclarationContract:
    """Declarations that change."""

    @pytest.fixture
    def kept(self, harness: Harness) -> Harness:
        """The harness of an engine whose stores keep their data when they are closed."""
        if not harness.capabilities.multi_process:
            pytest.skip("another store of this engine has other data")
        return harness

    # -- 92: declared later ------------------------------------------------------------------

    async def test_92_a_field_declared_later_answers_as_if_it_had_always_been(
        self, kept: Harness
    ) -> None:
        async with kept.store(declared(GROUP)) as store:
            for number in range(len(ANY_VALUES) + 2):
                value = _several(ANY_VALUES, number)
                entity = thing(number, **{f"a_{kind}": value for kind in TYPES})
                await store.save_entity("things", entity)
        [collection] = LATER
        async with kept.store(LATER) as store:
            await check_answers(store, collection)
            async with store.begin_transaction() as tx:
                found = await tx.query_entities("things", {"a_integer": gt(0)})
            positive = [
                each
                for each in await store.query_entities("things")
                if type(each.get("a_integer")) in (int, float) and each["a_integer"] in POSITIVE
            ]
            assert ids_of(found) == ids_of(positive)

    async def test_92_a_field_declared_later_is_updated_and_removed(self, kept: Harness) -> None:
        async with kept.store(declared(GROUP)) as store:
            for number in range(3):
                await store.save_entity("things", thing(number, a_integer=number, a_text="x"))
        async with kept.store(LATER) as store:
            await store.update_entity("things", "t00", {"a_integer": 7})
            await store.update_entity("things", "t01", {"a_integer": REMOVE, "a_text": None})
            found = await get_existing(store, "things", "t00")
            assert (found["a_integer"], found["a_text"]) == (7, "x")
            found = await get_existing(store, "things", "t01")
            assert "a_integer" not in found
            assert found["a_text"] is None
            missing = await store.query_entities("things", {"a_integer": exists(False)})
            assert ids_of(missing) == ["t01"]
            assert await store.count_entities("things", {"a_integer": gt(1)}) == 2
            await check_answers(store, LATER[0])

    async def test_92_timestamps_of_another_form_are_rewritten_by_apply_schema(
        self, kept: Harness
    ) -> None:
        forms = ("2026-01-05", "2026-01-03T01:00:00+01:00", TIMES[2], "soon", 7)
        async with kept.store(declared(GROUP)) as store:
            for number, each in enumerate(forms):
                await store.save_entity("things", thing(number, a_timestamp=each))
        async with kept.store(declared(GROUP, Field("a_timestamp", "timestamp"))) as store:
            changes = await store.schema_changes()
            assert ": 2;" in _by_kind(changes, "form")["a_timestamp"]
            assert "'t00', 't01'" in _by_kind(changes, "form")["a_timestamp"]
            assert "'t03', 't04'" in _by_kind(changes, "values")["a_timestamp"]
            await store.apply_schema()
            assert {each.kind for each in await store.schema_changes()} == {"values"}
            found = await store.get_entities("things", [f"t{each:02}" for each in range(5)])
            assert [each and each["a_timestamp"] for each in found] == [
                "2026-01-05T00:00:00.000000Z",
                "2026-01-03T00:00:00.000000Z",
                *forms[2:],
            ]
            assert [each and each[VERSION] for each in found] == [2, 2, 1, 1, 1]
            await store.apply_schema()
            assert [each and each[VERSION] for each in found] == [2, 2, 1, 1, 1]

    # -- 93: no longer declared --------------------------------------------------------------

    async def test_93_a_field_no_longer_declared_stays(self, kept: Harness) -> None:
        async with kept.store(LATER) as store:
            for number in range(4):
                await store.save_entity("things", thing(number, a_integer=number, a_text="x"))
        async with kept.store(declared(GROUP)) as store:
            await store.update_entity("things", "t03", {"group": "other"})
            found = await get_existing(store, "things", "t03")
            assert (found["a_integer"], found["a_text"], found["group"]) == (3, "x", "other")
            found_by = await store.query_entities("things", {path("a_integer"): gt(1)})
            assert ids_of(found_by) == ["t02", "t03"]
        async with kept.store(LATER) as store:
            await check_answers(store, LATER[0])

    # -- 94: another type --------------------------------------------------------------------

    async def test_94_a_type_is_changed(self, kept: Harness) -> None:
        """Each ordered pair of types has a field of its own."""
        names = {f"{before}_{after}": (before, after) for before, after in PAIRS}
        first = declared(GROUP, *(Field(name, before) for name, (before, _) in names.items()))
        then = declared(GROUP, *(Field(name, after) for name, (_, after) in names.items()))
        count = max(map(len, VALUES.values())) + 2
        async with kept.store(first) as store:
            for number in range(count):
                values = {name: _several(VALUES[kind], number) for name, (kind, _) in names.items()}
                await store.save_entity("things", thing(number, **values))
            stored = {each["thing_id"]: each for each in await store.query_entities("things")}
        async with kept.store(then) as store:
            for each in stored.values():
                found = await store.get_entity("things", str(each["thing_id"]))
                assert typed(found) == typed(each)
            await check_answers(store, then[0])
            listed = _by_kind(await store.schema_changes(), "values")
            for name, (_, after) in names.items():
                misfits = [
                    str(entity["thing_id"])
                    for entity in stored.values()
                    if entity.get(name) is not None and not _fits(entity[name], after)
                ]
                assert bool(misfits) == (name in listed), name
                if misfits:
                    assert f": {len(misfits)};" in listed[name]
                    assert ", ".join(map(repr, sorted(misfits)[:5])) in listed[name]
            await self._only_the_new_type_is_written(store, names)

    async def _only_the_new_type_is_written(
        self, store: StorageStrategy, names: Mapping[str, tuple[FieldType, FieldType]]
    ) -> None:
        for name, (before, after) in names.items():
            await store.update_entity("things", "t00", {name: VALUES[after][0]})
            refused = [each for each in VALUES[before] if not _fits(each, after)]
            for each in refused:
                with pytest.raises(InvalidFieldError, match=after):
                    await store.update_entity("things", "t00", {name: each})

    # -- 95: two declarations at once --------------------------------------------------------

    async def test_95_programs_with_two_declarations_at_once(self, kept: Harness) -> None:
        old = declared(GROUP, Field("n", "integer"), indexes=["n"])
        new = declared(
            GROUP, Field("a_text"), Field("a_integer", "integer"), indexes=["a_text", "group"]
        )
        async with kept.store(old) as one, kept.store(new) as other:
            for number in range(6):
                await (one, other)[number % 2].save_entity("things", thing(number))

            async def count_up(store: StorageStrategy, field: str) -> None:
                for number in range(24):
                    await store.update_entity("things", f"t{number % 6:02}", {field: number})

            await asyncio.gather(
                count_up(one, "n"), count_up(other, "a_integer"), count_up(one, "extra")
            )
            for number in range(6):
                for store in (one, other):
                    found = await get_existing(store, "things", f"t{number:02}")
                    values = [found.get(each) for each in ("n", "a_integer", "extra")]
                    assert values == [18 + number] * 3
            await check_answers(one, old[0])
            await check_answers(other, new[0])
            await one.update_entity("things", "t00", {"a_text": "by old", "a_integer": REMOVE})
            await other.update_entity("things", "t01", {"a_text": "by new", "n": REMOVE})
            await check_answers(one, old[0])
            await check_answers(other, new[0])
            assert ids_of(await other.query_entities("things", {"a_text": "by old"})) == ["t00"]
            assert await one.count_entities("things", {"n": exists(False)}) == 1

    # -- 96: required ------------------------------------------------------------------------

    async def test_96_required_declared_on_data_without_it(self, kept: Harness) -> None:
        async with kept.store(declared(GROUP)) as store:
            for number, value in enumerate((MISSING, None, "x")):
                await store.save_entity("things", thing(number, a_text=value))
            before = await store.query_entities("things", order_by="thing_id")
        async with kept.store(declared(GROUP, Field("a_text", required=True))) as store:
            required = _by_kind(await store.schema_changes(), "required")
            assert "'t00', 't01'" in required["a_text"]
            with pytest.raises(SchemaMismatchError, match=r"things\.a_text.*'t00', 't01'"):
                await store.apply_schema()
            assert await store.query_entities("things", order_by="thing_id") == before
            # It is enforced on what a program writes, and not on what is stored.
            await store.update_entity("things", "t00", {"group": "other"})
            async with store.begin_transaction() as tx:
                await tx.update_entity("things", "t01", {"group": "other"})
            for fields in ({"a_text": None}, {"a_text": REMOVE}):
                with pytest.raises(InvalidFieldError, match="a_text"):
                    await store.update_entity("things", "t02", fields)
            with pytest.raises(InvalidFieldError, match="a_text"):
                await store.save_entity("things", thing(3))
            for each in ("t00", "t01"):
                await store.update_entity("things", each, {"a_text": "y"})
            await store.apply_schema()
            assert await store.schema_changes() == []

    async def test_96_another_key_declared_on_data(self, kept: Harness) -> None:
        async with kept.store(declared(GROUP)) as store:
            await store.save_entity("things", thing(0, size=1))
        others = Collection("others", key="other_id")
        key = [
            Collection("things", key="group", fields=["thing_id"], indexes=["thing_id"]),
            others,
        ]
        async with kept.store(key) as store:
            changes = await store.schema_changes()
            assert [(each.kind, each.collection, each.name) for each in changes] == [
                ("key", "things", "group"),
                ("collection", "others", ""),
            ]
            assert changes[0].detail == "the store knows this collection with the key 'thing_id'"
            with pytest.raises(
                SchemaMismatchError, match=r"nothing was .* things\.group: .*'thing_id'"
            ):
                await store.apply_schema()
        async with kept.store([*declared(GROUP), others]) as store:
            assert ids_of(await store.query_entities("things")) == ["t00"]

    # -- 97: interrupted, and twice at once --------------------------------------------------

    async def test_97_apply_schema_is_interrupted_and_repeated(self, kept: Harness) -> None:
        async with kept.store(declared(GROUP)) as store:
            for number in range(12):
                await store.save_entity("things", thing(number, a_timestamp="2026-01-05"))
        later = declared(GROUP, Field("a_timestamp", "timestamp"), indexes=["a_timestamp"])
        async with kept.store(later) as store:
            for turn in turns():
                if not await cancelled_at(turn, store.apply_schema()):
                    break
            await store.apply_schema(complete=True)
            assert await store.schema_changes() == []
            await check_answers(store, later[0])
            found = await store.query_entities("things")
            assert {each[VERSION] for each in found} == {2}

    async def test_97_apply_schema_runs_twice_at_once_beside_a_writer(self, kept: Harness) -> None:
        async with kept.store(declared(GROUP)) as store:
            for number in range(30):
                await store.save_entity("things", thing(number, a_timestamp="2026-01-05"))
        later = declared(GROUP, Field("a_timestamp", "timestamp"), indexes=["a_timestamp"])
        async with kept.store(declared(GROUP)) as old, kept.store(later) as new:

            async def write() -> None:
                for number in range(30):
                    await old.update_entity("things", f"t{number:02}", {"n": number})

            async with kept.store(later) as third:
                await asyncio.gather(new.apply_schema(), third.apply_schema(), write())
            await new.apply_schema(complete=True)
            assert await new.schema_changes() == []
            await check_answers(new, later[0])
            found = await new.query_entities("things", order_by="thing_id")
            assert [each["n"] for each in found] == list(range(30))

    # -- 129: the store remembers ------------------------------------------------------------

    async def test_129_the_declarations_of_all_programs_are_recorded(self, kept: Harness) -> None:
        one = declared(GROUP, Field("n", "integer"), indexes=["n"])
        other = [
            *declared(GROUP, Field("a_text", required=True), indexes=[Index("group", "a_text")]),
            Collection("parts", key="part_id", fields=[Field("thing_id", references="things")]),
        ]
        async with kept.store(one) as store:
            await store.get_entity("things", "t00")
            assert await store.recorded_collections() == []
            async with store.begin_transaction() as tx:
                await tx.get_entity("things", "t00")
            assert await store.recorded_collections() == [], "nothing was written"
            await store.save_entity("things", thing(0))
            assert _shown(await store.recorded_collections()) == _shown(one)
            assert await store.schema_changes() == []
        async with kept.store(other) as store:
            kinds = [(each.kind, each.name) for each in await store.schema_changes()]
            assert ("field", "a_text") in kinds
            assert ("collection", "") in kinds
            async with store.begin_transaction() as tx:
                await tx.save_entity("things", thing(1, a_text="x"))
            assert _shown(await store.recorded_collections()) == _shown(
                [
                    *declared(
                        GROUP,
                        Field("n", "integer"),
                        Field("a_text", required=True),
                        indexes=["n", Index("group", "a_text")],
                    ),
                    other[1],
                ]
            )
        async with kept.store(one) as store:
            # An engine may list what the index of another program lacks.
            changes = await store.schema_changes()
            assert not {each.kind for each in changes} & {"collection", "field", "index", "key"}

    async def test_129_contradictions_are_reported_and_no_error_at_open(
        self, kept: Harness
    ) -> None:
        async with kept.store(declared(Field("n", "integer"))) as store:
            await store.save_entity("things", {"thing_id": "t00", "n": 1})
        async with kept.store(declared(Field("n", "text"))) as store:
            [change] = [each for each in await store.schema_changes() if each.kind == "field"]
            assert (change.collection, change.name) == ("things", "n")
            assert "integer" in change.detail
            assert "things.n" in str((await store.health())["problems"])
            await store.save_entity("things", {"thing_id": "t01", "n": "x"})
            [recorded] = await store.recorded_collections()
            assert recorded.fields["n"].type == "text", "the latest"

    async def test_129_many_programs_record_at_once(self, kept: Harness) -> None:
        stores = [kept.store([Collection(f"c{each}", key="c_id")]) for each in range(4)]

        async def write(number: int, store: StorageStrategy) -> None:
            async with store:
                entities = [{"c_id": str(each)} for each in range(3)]
                await asyncio.gather(*(store.save_entity(f"c{number}", each) for each in entities))

        await asyncio.gather(*(write(number, each) for number, each in enumerate(stores)))
        async with kept.store([Collection("c0", key="c_id")]) as store:
            names = [each.name for each in await store.recorded_collections()]
            assert sorted(names) == ["c0", "c1", "c2", "c3"]


def _shown(collections: Iterable[Collection]) -> dict[str, object]:
    """The declarations, in a form that can be compared; the order of the fields does not matter."""
    return {
        each.name: (
            each.key,
            {name: repr(field) for name, field in each.fields.items()},
            sorted(index.name for index in each.indexes),
        )
        for each in collections
    }


def _fits(value: object, kind: FieldType) -> bool:
    """Whether a stored value is of a type, in its stored form or one that `apply_schema` rewrites."""
    fitting = {"text": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,)}
    if kind == "json":
        return True
    if kind == "timestamp":
        return isinstance(value, str) and value.startswith("2026-")
    return type(value) in fitting[kind]
