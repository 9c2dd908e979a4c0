"""Typed collections: models of four kinds of classes, on stores in memory and in files."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import subprocess
import sys
import uuid
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import attrs
import msgspec
import pydantic
import pytest

from hf_async_store import (
    ABSENT,
    REMOVE,
    BatchError,
    ClaimLostError,
    Collection,
    ConcurrencyConflictError,
    ConfigurationError,
    EntityMismatchError,
    EntityNotFoundError,
    Field,
    InvalidFieldError,
    InvalidInputError,
    OperationTimeoutError,
    References,
    StoreVersion,
    UnsupportedValueError,
    between,
    gt,
    in_,
    increment,
    open_store,
    path,
    sync,
)
from hf_async_store.models import codec_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


AT = datetime(2026, 1, 2, 3, 4, 5, 600, tzinfo=UTC)


class Status(Enum):
    WAITING = "WAITING"
    DONE = "DONE"


class Place(msgspec.Struct):
    room: str
    floor: int = 0


class StructJob(msgspec.Struct):
    job_id: str
    status: Status = Status.WAITING
    attempts: int = 0
    due_at: datetime | None = None
    place: Place | None = None
    tags: list[str] = []


@dataclasses.dataclass
class DataPlace:
    room: str
    floor: int = 0


@dataclasses.dataclass
class DataJob:
    job_id: str
    status: Status = Status.WAITING
    attempts: int = 0
    due_at: datetime | None = None
    place: DataPlace | None = None
    tags: list[str] = dataclasses.field(default_factory=list)


@attrs.define
class AttrsJob:
    job_id: str
    status: Status = Status.WAITING
    attempts: int = 0
    due_at: datetime | None = None
    place: DataPlace | None = None
    tags: list[str] = attrs.field(factory=list)


class PydanticPlace(pydantic.BaseModel):
    room: str
    floor: int = 0


class PydanticJob(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    job_id: str
    status: Status = Status.WAITING
    attempts: int = 0
    due_at: datetime | None = None
    place: PydanticPlace | None = None
    tags: list[str] = []


JOBS: list[tuple[Any, Any]] = [
    (StructJob, Place),
    (DataJob, DataPlace),
    (AttrsJob, DataPlace),
    (PydanticJob, PydanticPlace),
]


@pytest.fixture(params=["memory", "json", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"memory": "memory:", "json": f"json:{tmp_path}/d", "sqlite": f"sqlite:{tmp_path}/s.db"}[
        request.param
    ]


def declared(model: type) -> Collection:
    return Collection.from_model(model, key="job_id", name="jobs", indexes=["status"])


@pytest.fixture(params=JOBS, ids=lambda each: each[0].__name__)
async def opened(request: pytest.FixtureRequest, url: str) -> AsyncIterator[tuple[Any, Any, Any]]:
    model, place = request.param
    async with open_store(url, collections=[declared(model)]) as store:
        yield store, model, place


async def test_an_instance_comes_back_as_it_was_saved(opened: Any) -> None:
    store, model, place = opened
    jobs = store.typed(model)
    job = model(
        job_id="j",
        status=Status.DONE,
        attempts=3,
        due_at=AT,
        place=place(room="r"),
        tags=["a", "b"],
    )
    assert await jobs.create(job) == 1
    assert await jobs.get("j") == job
    assert await jobs.get("other") is None
    assert await jobs.get_many(["other", "j"]) == [None, job]
    assert await jobs.get_versioned("j") == (job, 1)
    assert jobs.id_of(job) == "j"
    entity = await store.get_entity("jobs", "j")
    assert entity["due_at"] == "2026-01-02T03:04:05.000600Z"
    assert entity["status"] == "DONE"
    assert entity["place"] == {"room": "r", "floor": 0}


async def test_a_save_keeps_fields_that_the_model_does_not_have(opened: Any) -> None:
    store, model, _ = opened
    await store.save_entity("jobs", {"job_id": "j", "owner": {"name": "x"}, "attempts": 9})
    jobs = store.typed(model)
    assert await jobs.save(model(job_id="j", attempts=1)) == 2
    assert await jobs.save_many([model(job_id="j", attempts=2), model(job_id="k")]) == [3, 1]
    assert await jobs.save(model(job_id="j", attempts=3), expected_version=3) == 4
    entity = await store.get_entity("jobs", "j")
    assert entity["owner"] == {"name": "x"}
    assert entity["attempts"] == 3
    with pytest.raises(ConcurrencyConflictError):
        await jobs.save(model(job_id="j"), expected_version=3)
    assert await jobs.save(model(job_id="new"), expected_version=ABSENT) == 1
    created = (await store.get_entity("jobs", "j"))["created_at"]
    assert created == entity["created_at"]


async def test_a_patch_writes_only_what_is_named(opened: Any) -> None:
    store, model, place = opened
    jobs = store.typed(model)
    await jobs.create(model(job_id="j", attempts=1, tags=["x"]))
    assert (
        await jobs.patch("j", status=Status.DONE, attempts=increment(2), place=place(room="q")) == 2
    )
    assert await jobs.get("j") == model(
        job_id="j", status=Status.DONE, attempts=3, place=place(room="q"), tags=["x"]
    )
    with pytest.raises(InvalidFieldError, match="no field 'statsu'; did you mean 'status'"):
        await jobs.patch("j", statsu=Status.DONE)
    with pytest.raises(InvalidFieldError, match="`update_entity` of the store takes exp"):
        await jobs.patch("j", attempts=1, expected_version=2)
    with pytest.raises(EntityNotFoundError):
        await jobs.patch("nobody", attempts=1)


class Measured(pydantic.BaseModel):
    """A model whose fields are stored by serializers of their own."""

    item_id: str
    name: str = ""
    at: datetime | None = None

    @pydantic.field_serializer("name")
    def _upper(self, value: str) -> str:
        return value.upper()

    @pydantic.field_serializer("at")
    def _day(self, value: datetime | None) -> str | None:
        return None if value is None else value.date().isoformat()


async def test_a_patch_stores_what_a_save_would_store() -> None:
    declared = Collection.from_model(
        Measured, key="item_id", name="items", fields=[Field("at", "json")]
    )
    async with open_store("memory:", collections=[declared]) as store:
        items = store.typed(Measured)
        await items.save(Measured(item_id="saved", name="x", at=AT))
        await items.save(Measured(item_id="patched"))
        await items.patch("patched", name="x", at=AT)
        saved, patched = await store.get_entities("items", ["saved", "patched"])
        assert saved is not None
        assert patched is not None
        assert (
            (patched["name"], patched["at"]) == (saved["name"], saved["at"]) == ("X", "2026-01-02")
        )


async def test_modify_gets_and_returns_instances(opened: Any) -> None:
    store, model, _ = opened
    jobs = store.typed(model)

    def count(job: Any) -> Any:
        job.attempts += 1
        return job

    async def count_later(job: Any) -> Any:
        return count(job)

    assert await jobs.modify("j", count, default=model(job_id="j")) == 1
    await store.update_entity("jobs", "j", {"other": 1})
    assert await jobs.modify("j", count_later) == 3
    assert (await store.get_entity("jobs", "j"))["other"] == 1
    assert (await jobs.get("j")).attempts == 2


async def test_queries_return_instances(opened: Any) -> None:
    store, model, _ = opened
    jobs = store.typed(model)
    made = [
        model(job_id=f"j{n}", attempts=n, status=Status(("WAITING", "DONE")[n % 2]))
        for n in range(9)
    ]
    await jobs.create_many(made)
    assert await jobs.query({"status": Status.DONE}, "-attempts", 2) == [made[7], made[5]]
    assert [each async for each in jobs.stream(None, "attempts")] == made
    page = await jobs.page(None, "attempts", 5)
    assert page.items == made[:5]
    rest = await jobs.page(None, "attempts", 5, cursor=page.cursor)
    assert rest.items == made[5:]
    assert rest.cursor is None
    assert await jobs.count({"status": "DONE"}) == 4
    assert await jobs.count_by("status") == [("DONE", 4), ("WAITING", 5)]
    assert await jobs.update_where({"status": "DONE"}, {"status": Status.WAITING}) == 4
    assert await jobs.delete_where({"attempts": 0}) == 1
    assert await jobs.delete("j1") is True
    assert await jobs.delete_many(["j1", "j2"]) == [False, True]


async def test_an_entity_that_does_not_fit_does_not_spoil_the_others(opened: Any) -> None:
    store, model, _ = opened
    jobs = store.typed(model)
    await jobs.create_many([model(job_id="a"), model(job_id="c")])
    await store.save_entity("jobs", {"job_id": "b", "attempts": 1, "tags": [1]})
    await store.save_entity("jobs", {"job_id": "d", "status": "LOST"})
    page = await jobs.page(None, "job_id")
    assert [each.job_id for each in page.items] == ["a", "c"]
    assert [
        (e.collection, e.entity_id, e.field.split("[")[0].split(".")[0]) for e in page.invalid
    ] == [
        ("jobs", "b", "tags"),
        ("jobs", "d", "status"),
    ]
    with pytest.raises(
        EntityMismatchError, match=rf"jobs 'b' does not fit {model.__name__}, field 'tags"
    ):
        await jobs.get("b")
    with pytest.raises(EntityMismatchError):
        await jobs.query(None, "job_id")
    found: list[EntityMismatchError] = []
    assert len(await jobs.query(on_invalid=found.append)) == 2
    assert len([each async for each in jobs.stream(on_invalid=found.append)]) == 2
    assert await jobs.get_many(["a", "b"], on_invalid=found.append) == [model(job_id="a"), None]
    assert len(found) == 5


async def test_an_error_names_every_field_that_does_not_fit(opened: Any) -> None:
    store, model, _ = opened
    jobs = store.typed(model)
    wrong = {"status": "LOST", "due_at": "2026-01-02", "place": {"floor": 1}, "tags": [1]}
    await store.save_entity("jobs", {"job_id": "j", **wrong})
    await store.save_entity("jobs", {"job_id": "k", "place": {"room": 1, "floor": "x"}, "tags": 5})
    with pytest.raises(EntityMismatchError) as refused:
        await jobs.get("j")
    assert refused.value.field == "status"
    named = re.findall(r"field '(\w+)", str(refused.value))
    assert named == ["status", "place", "tags"]
    with pytest.raises(EntityMismatchError) as refused:
        await jobs.get("k")
    assert refused.value.field == "place.room"
    assert set(re.findall(r"field '([\w.]+)", str(refused.value))) >= {"place.room", "tags"}


class Loose(msgspec.Struct):
    job_id: str
    first: str
    second: str | None
    third: list[int] = []


class PydanticLoose(pydantic.BaseModel):
    job_id: str
    first: str
    second: str | None
    third: list[int] = []


@pytest.mark.parametrize("model", [Loose, PydanticLoose])
async def test_an_error_names_missing_fields_and_not_too_many(model: Any) -> None:
    plain = Collection("jobs", key="job_id", fields=[Field("third", "json")])
    async with open_store("memory:", collections=[plain]) as store:
        await store.save_entity("jobs", {"job_id": "j", "third": list("abcdefgh")})
        entity = await store.get_entity("jobs", "j")
        with pytest.raises(EntityMismatchError) as refused:
            codec_of(model).instance("jobs", "j", entity or {})
        named = re.findall(r"field '(\w+)", str(refused.value))
        assert set(named) == {"first", "second", "third"}
        assert str(refused.value).endswith("; and 5 more") is (model is PydanticLoose)


def test_an_error_names_what_a_validator_of_attrs_refuses() -> None:
    entity: Any = {"job_id": "j", "title": "", "author": {"room": "r"}, "note": 1, "version": 1}
    with pytest.raises(EntityMismatchError) as refused:
        codec_of(AttrsArticle).instance("jobs", "j", {**entity, "note": None})
    assert refused.value.field == "title"
    with pytest.raises(EntityMismatchError, match="field 'note': .*; field 'title': ") as refused:
        codec_of(AttrsArticle).instance("jobs", "j", entity)


def test_a_name_that_cannot_be_stored_is_to_be_given_another() -> None:
    class Camel(msgspec.Struct):
        job_id: str
        hostName: str = ""

    class Renamed(msgspec.Struct, rename={"hostName": "host_name"}):
        job_id: str
        hostName: str = ""

    with pytest.raises(
        ConfigurationError,
        match=r"Camel: field name 'hostName' does not match .*; give it an alias",
    ):
        Collection.from_model(Camel, key="job_id")
    assert "host_name" in Collection.from_model(Renamed, key="job_id").fields


async def test_a_transaction_is_typed_too(opened: Any) -> None:
    store, model, _ = opened
    async with store.begin_transaction() as tx:
        jobs = tx.typed(model)
        await jobs.create(model(job_id="j"))
        await jobs.save(model(job_id="j", attempts=1))
        await jobs.save_many([model(job_id="j", attempts=2), model(job_id="k")])
        assert (await jobs.get("j")).attempts == 2
    assert await store.typed(model).count() == 2


async def test_save_many_finds_every_entity_at_once(opened: Any) -> None:
    store, model, _ = opened
    jobs = store.typed(model)
    with pytest.raises(InvalidInputError, match="same id"):
        await jobs.save_many([model(job_id="j"), model(job_id="j")])
    await store.save_entity("jobs", {"job_id": "j0", "other": 1})
    assert await jobs.save_many([model(job_id=f"j{n}") for n in range(300)]) == [2] + [1] * 299
    assert (await store.get_entity("jobs", "j0"))["other"] == 1
    assert await jobs.save_many([]) == []


async def test_a_naive_datetime_is_refused(opened: Any) -> None:
    store, model, _ = opened
    with pytest.raises(UnsupportedValueError, match="due_at"):
        await store.typed(model).save(model(job_id="j", due_at=datetime(2026, 1, 1)))


class NestedTimes(msgspec.Struct):
    job_id: str
    times: list[datetime] = []
    other: Any = None


@dataclasses.dataclass
class Inner:
    at: datetime


@dataclasses.dataclass
class DataNestedTimes:
    job_id: str
    times: list[datetime] = dataclasses.field(default_factory=list)
    other: Inner | None = None


class PydanticNestedTimes(pydantic.BaseModel):
    job_id: str
    times: list[datetime] = []
    other: Any = None


@pytest.mark.parametrize("model", [NestedTimes, DataNestedTimes, PydanticNestedTimes])
async def test_a_nested_naive_datetime_is_refused(model: Any) -> None:
    async with open_store("memory:", collections=[declared_only(model)]) as store:
        jobs = store.typed(model)
        naive = datetime(2026, 1, 1)
        for refused in (
            model(job_id="j", times=[AT, naive]),
            model(job_id="j", other=Inner(naive)),
        ):
            with pytest.raises(UnsupportedValueError, match=r"(times\[1\]|other.at): a datetime"):
                await jobs.save(refused)
        assert await jobs.save(model(job_id="j", times=[AT], other=Inner(AT))) == 1
        with pytest.raises(UnsupportedValueError, match="a datetime"):
            await jobs.patch("j", times=[naive])
        assert (await jobs.get("j")).times == [AT]


@pytest.mark.parametrize("model", [NestedTimes, PydanticNestedTimes])
@pytest.mark.parametrize(
    "value",
    [object(), {"a": float("inf")}, b"\xff".join, [], 2**70],
    ids=lambda each: str(type(each)),
)
async def test_what_cannot_be_stored_is_refused(model: Any, value: Any) -> None:
    if value == []:
        value.append(value)
    async with open_store("memory:", collections=[declared_only(model)]) as store:
        jobs = store.typed(model)
        await jobs.create(model(job_id="j"))
        for attempt in (
            lambda: jobs.save(model(job_id="j", other=value)),
            lambda: jobs.save_many([model(job_id="j", other=value)]),
            lambda: jobs.create_many([model(job_id="k", other=value)]),
            lambda: jobs.patch("j", other=value),
            lambda: jobs.update_where({}, {"other": value}),
        ):
            with pytest.raises(UnsupportedValueError):
                await attempt()
        assert await jobs.count() == 1
        assert (await jobs.get("j")).other is None


class Secret(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")

    job_id: str
    password: pydantic.SecretStr | None = None


class Revealed(Secret):
    @pydantic.field_serializer("password")
    def reveal(self, value: pydantic.SecretStr | None) -> str | None:
        return None if value is None else value.get_secret_value()


async def test_what_pydantic_would_not_write_is_refused() -> None:
    collections = [declared_only(Secret), declared_only(Revealed)]
    async with open_store("memory:", collections=collections) as store:
        hidden, shown = store.typed(Secret), store.typed(Revealed)
        with pytest.raises(UnsupportedValueError, match="'more'"):
            await hidden.create(Secret.model_validate({"job_id": "j", "more": 1}))
        with pytest.raises(UnsupportedValueError, match="asterisks") as refused:
            await hidden.create(Secret(job_id="j", password=pydantic.SecretStr("s3cret")))
        assert "s3cret" not in str(refused.value)
        instance = Revealed(job_id="j", password=pydantic.SecretStr("s3cret"))
        await shown.create(instance)
        assert await shown.get("j") == instance
        await shown.patch("j", password=pydantic.SecretStr("other"))
        assert await shown.get("j") == Revealed(job_id="j", password=pydantic.SecretStr("other"))
        await hidden.create(Secret(job_id="k"))
        with pytest.raises(UnsupportedValueError, match="asterisks") as refused:
            await hidden.patch("k", password=pydantic.SecretStr("s3cret"))
        assert "s3cret" not in str(refused.value)


def declared_only(model: type) -> Collection:
    return Collection.from_model(model, key="job_id")


@pytest.mark.parametrize("verb", ["query", "get_many", "page", "save_many"])
async def test_many_instances_are_converted_in_chunks(verb: str) -> None:
    async with open_store("memory:", collections=[declared(StructJob)]) as store:
        jobs = store.typed(StructJob)
        instances = [StructJob(f"j{n:04}") for n in range(1_000)]
        await jobs.create_many(instances)
        converted = iterations = most = 0
        entity, instance = jobs._codec.entity, jobs._codec.instance

        def counted(convert: Any) -> Any:
            def convert_and_count(*given: Any) -> Any:
                nonlocal converted
                converted += 1
                return convert(*given)

            return convert_and_count

        async def other_task() -> None:
            nonlocal iterations, most, converted
            while True:
                iterations, most, converted = iterations + 1, max(most, converted), 0
                await asyncio.sleep(0)

        jobs._codec.entity, jobs._codec.instance = counted(entity), counted(instance)
        task = asyncio.create_task(other_task())
        try:
            await {
                "query": lambda: jobs.query(),
                "get_many": lambda: jobs.get_many([each.job_id for each in instances]),
                "page": lambda: jobs.page(limit=1_000),
                "save_many": lambda: jobs.save_many(instances),
            }[verb]()
        finally:
            jobs._codec.entity, jobs._codec.instance = entity, instance
            task.cancel()
        assert 0 < most <= 128


@pytest.mark.parametrize("verb", ["create_many", "save_many"])
async def test_instances_must_be_listed(verb: str) -> None:
    async with open_store("memory:", collections=[declared(StructJob)]) as store:
        with pytest.raises(InvalidInputError, match="instances"):
            await getattr(store.typed(StructJob), verb)(5)


async def test_a_save_ends_at_its_timeout(url: str) -> None:
    async with open_store(url, collections=[declared(StructJob)]) as store:
        jobs = store.typed(StructJob)
        with pytest.raises(OperationTimeoutError) as expired:
            await jobs.save(StructJob("j"), timeout=0)
        with pytest.raises(InvalidInputError, match="timeout"):
            await jobs.save(StructJob("j"), timeout="soon")  # type: ignore[arg-type]
        assert expired.value.outcome_unknown or await jobs.get("j") is None
        assert await jobs.save(StructJob("k"), timeout=30) == 1


# -- versions --------------------------------------------------------------------------------


class Counter(msgspec.Struct):
    counter_id: str
    n: int = 0
    version: int | None = None


class Marked(pydantic.BaseModel):
    counter_id: str
    n: int = 0
    revision: Annotated[int | None, StoreVersion()] = None


class Unset(msgspec.Struct):
    counter_id: str
    n: int = 0
    revision: Annotated[int | msgspec.UnsetType, StoreVersion()] = msgspec.UNSET


@pytest.mark.parametrize("model", [Counter, Marked, Unset])
async def test_modify_begins_with_a_copy_of_the_default(model: Any, url: str) -> None:
    collection = Collection.from_model(model, key="counter_id", name="counters")
    async with open_store(url, collections=[collection]) as store:
        counters = store.typed(model)
        default = model(counter_id="c", n=5)

        def count(counter: Any) -> Any:
            counter.n += 1
            return counter

        assert await counters.modify("c", count, default=default) == 1
        assert await counters.modify("c", count, default=default) == 2
        assert default == model(counter_id="c", n=5)
        assert (await counters.get("c")).n == 7
        await counters.save(model(counter_id="c"))
        await counters.save_many([model(counter_id="c")])
        with pytest.raises(InvalidFieldError):
            await counters.modify("d", count, default=default)


@pytest.mark.parametrize("model", [Counter, Marked])
async def test_the_version_that_an_instance_holds_is_expected(model: Any, url: str) -> None:
    collection = Collection.from_model(model, key="counter_id", name="counters")
    assert "version" not in collection.fields
    name = "version" if model is Counter else "revision"
    async with open_store(url, collections=[collection]) as store:
        counters = store.typed(model)
        await counters.save(model(counter_id="c"))
        first, second = await counters.get("c"), await counters.get("c")
        assert getattr(first, name) == 1
        first.n = 1
        assert await counters.save(first) == 2
        with pytest.raises(ConcurrencyConflictError):
            await counters.save(second)
        with pytest.raises(BatchError):
            await counters.save_many([second])
        fresh = await counters.get("c")
        assert await counters.save_many([fresh]) == [3]
        assert name not in (await store.get_entity("counters", "c")) or name == "version"


# -- declarations ----------------------------------------------------------------------------


class Kind(Enum):
    ONE = 1
    TWO = 2


class Everything(pydantic.BaseModel):
    every_id: str
    text: str
    maybe: str | None
    defaulted: str = ""
    number: float
    either: int | float
    flag: bool
    kind: Kind
    word: Literal["a", "b"]
    mixed: Literal["a", 1]
    day: date
    at: datetime
    unique: uuid.UUID
    price: Decimal
    listed: list[int]
    nested: PydanticPlace
    anything: Any = None
    camelCase: int = pydantic.Field(default=0, alias="camel_case")
    request: Annotated[str, References("requests")]
    loose: Annotated[str | None, References("requests", enforced=False)] = None
    created_at: datetime | None = None


def test_annotations_are_declared() -> None:
    collection = Collection.from_model(Everything, key="every_id", indexes=["text"])
    assert collection.name == "everythings"
    found = {name: (each.type, each.required) for name, each in collection.fields.items()}
    assert found == {
        "every_id": ("text", True),
        "text": ("text", True),
        "maybe": ("text", False),
        "defaulted": ("text", False),
        "number": ("number", True),
        "either": ("number", True),
        "flag": ("boolean", True),
        "kind": ("integer", True),
        "word": ("text", True),
        "mixed": ("json", True),
        "day": ("text", True),
        "at": ("timestamp", True),
        "unique": ("text", True),
        "price": ("text", True),
        "listed": ("json", True),
        "nested": ("json", True),
        "anything": ("json", False),
        "camel_case": ("integer", False),
        "request": ("text", True),
        "loose": ("text", False),
        "created_at": ("timestamp", False),
        "updated_at": ("timestamp", False),
    }
    assert collection.fields["request"].references == "requests"
    assert [each.name for each in collection.references] == ["request"]


async def test_every_annotation_comes_back() -> None:
    parent = Collection("requests", key="request_id")
    collections = [parent, Collection.from_model(Everything, key="every_id")]
    given = Everything(
        every_id="e",
        text="t",
        maybe=None,
        number=1.5,
        either=2,
        flag=True,
        kind=Kind.TWO,
        word="b",
        mixed=1,
        day=date(2026, 1, 2),
        at=AT,
        unique=uuid.UUID(int=7),
        price=Decimal("1.50"),
        listed=[1],
        nested=PydanticPlace(room="r"),
        camel_case=4,
        request="r",
    )
    async with open_store("memory:", collections=collections) as store:
        await store.save_entity("requests", {"request_id": "r"})
        everything = store.typed(Everything)
        await everything.create(given)
        read = await everything.get("e")
        assert read is not None
        assert read.created_at is not None
        assert read.model_copy(update={"created_at": None}) == given
        await everything.patch("e", camelCase=5, price=Decimal("2"))
        again = await everything.get("e")
        assert again is not None
        assert (again.camelCase, again.price) == (5, Decimal(2))


class Tagged(msgspec.Struct, tag="tagged"):
    tagged_id: str


class Array(msgspec.Struct, array_like=True):
    array_id: str


class TwoAliases(pydantic.BaseModel):
    job_id: str
    one: str = pydantic.Field(validation_alias="two", serialization_alias="three")


class TwoVersions(msgspec.Struct):
    job_id: str
    version: int | None = None
    other: Annotated[int | None, StoreVersion] = None


class Ambiguous(msgspec.Struct):
    job_id: str
    at: datetime | str = ""


@dataclasses.dataclass
class AmbiguousData:
    job_id: str
    at: datetime | str = ""


@attrs.define(auto_attribs=False)
class WithoutAnnotations:
    job_id = attrs.field(type=str)


class Unknown(msgspec.Struct):
    job_id: str
    what: Nobody = None  # type: ignore[name-defined]  # noqa: F821


async def test_a_tagged_struct_keeps_its_tag() -> None:
    async with open_store(
        "memory:", collections=[Collection.from_model(Tagged, key="tagged_id")]
    ) as store:
        await store.typed(Tagged).save(Tagged("t"))
        assert await store.typed(Tagged).get("t") == Tagged("t")


@pytest.mark.parametrize(
    ("model", "key", "problem"),
    [
        (int, "job_id", "int is not a model"),
        ("Job", "job_id", "a model is a class, not 'Job'"),
        (Array, "array_id", "array_like"),
        (TwoAliases, "job_id", "the same alias"),
        (TwoVersions, "job_id", "several fields for the version"),
        (Unknown, "job_id", "cannot be evaluated"),
        (Ambiguous, "job_id", "cannot be converted.*unions"),
        (AmbiguousData, "job_id", "cannot be converted.*unions"),
        (WithoutAnnotations, "job_id", "cannot be converted"),
        (StructJob, "id", "has no field 'id'"),
    ],
)
def test_what_cannot_be_declared(model: Any, key: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        Collection.from_model(model, key=key)


def test_given_fields_replace_those_of_the_class() -> None:
    collection = Collection.from_model(
        StructJob, key="job_id", fields=[Field("tags", "text"), "extra"], open=True
    )
    assert collection.fields["tags"].type == "text"
    assert "extra" in collection.fields
    assert collection.name == "struct_jobs"
    assert collection.model is StructJob


async def test_a_store_that_does_not_know_the_class() -> None:
    collections = [
        Collection.from_model(StructJob, key="job_id"),
        Collection.from_model(DataJob, key="job_id"),
        Collection.from_model(DataJob, key="job_id", name="others"),
    ]
    async with open_store("memory:", collections=collections) as store:
        with pytest.raises(ConfigurationError, match="is declared from AttrsJob: open it"):
            store.typed(AttrsJob)
        with pytest.raises(ConfigurationError, match="several collections .* data_jobs, others"):
            store.typed(DataJob)
        with pytest.raises(UnsupportedValueError, match="StructJob is expected, not DataJob"):
            await store.typed(StructJob).save(DataJob("j"))  # type: ignore[arg-type]


# -- the rest --------------------------------------------------------------------------------


def test_blocking_callers_get_instances(url: str) -> None:
    with sync.open_store(url, collections=[declared(DataJob)]) as store:
        jobs = store.typed(DataJob)
        assert jobs.create(DataJob("j")) == 1
        assert jobs.get("j") == DataJob("j")
        assert jobs.patch("j", status=Status.DONE) == 2
        assert jobs.modify("j", lambda job: dataclasses.replace(job, attempts=4)) == 3
        assert list(jobs.stream()) == [DataJob("j", Status.DONE, 4)]
        assert jobs.model is DataJob
        assert jobs.collection.name == "jobs"
        with store.begin_transaction() as tx:
            tx.typed(DataJob).save(DataJob("k"))
        assert jobs.count() == 2
        assert jobs.id_of(DataJob("q")) == "q"


def test_no_library_of_models_is_imported() -> None:
    code = (
        "import sys, hf_async_store; "
        "print([each for each in ('pydantic', 'attr', 'attrs') if each in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_two_tasks_that_save_one_entity_both_succeed(opened: Any) -> None:
    store, model, _ = opened
    jobs = store.typed(model)

    await asyncio.gather(*(jobs.save(model(job_id="j", attempts=n)) for n in range(8)))
    await asyncio.gather(
        *(jobs.save_many([model(job_id="j"), model(job_id=f"j{n}")]) for n in range(8))
    )
    assert (await jobs.get_versioned("j")).version == 16


# -- claims ---------------------------------------------------------------------------------


async def test_a_claim_has_an_instance(opened: Any) -> None:
    store, model, place = opened
    jobs = store.typed(model)
    await jobs.create_many(
        [model(job_id=each, place=place(room="r", floor=2)) for each in ("a", "b")]
    )
    claimed = await jobs.claim({"status": Status.WAITING}, order_by="job_id", limit=5)
    assert [each.instance for each in claimed] == await jobs.query(order_by="job_id")
    assert await jobs.claim() == []
    a, b = claimed
    assert (a.id, a.collection, a.key.id, a.version, a.attempts) == ("a", "jobs", "a", 1, 1)
    assert (a.token, a.lease, a.expires_at) == (a.claim.token, 30.0, a.claim.expires_at)
    assert repr(a) == repr(a.claim)
    async with a as same:
        assert same is a
        assert await a.update(status=Status.DONE, attempts=increment(2)) == 2
        await a.renew(60.0)
        await a.finish(due_at=AT)
    assert await jobs.get("a") == model(
        job_id="a", status=Status.DONE, attempts=2, due_at=AT, place=place(room="r", floor=2)
    )
    await b.release(after=60.0)
    assert [each.id for each in await store.claims("jobs")] == ["b"]
    await store.break_claim("jobs", "b")
    [again] = await jobs.claim({"job_id": "b"})
    await again.delete()
    assert await jobs.get("b") is None


async def test_a_claim_writes_what_was_changed_in_its_instance(opened: Any) -> None:
    store, model, place = opened
    jobs = store.typed(model)
    await store.create_entity("jobs", {"job_id": "a", "unknown": 1})
    [claim] = await jobs.claim()
    with pytest.raises(UnsupportedValueError, match="an instance of"):
        await claim.update({"status": "DONE"})
    job = claim.instance
    job.attempts, job.tags = 7, ["x"]
    await store.update_entity("jobs", "a", {"status": "DONE"})  # by another program
    assert await claim.update(job) == 3
    job.tags.append("y")
    job.place = place(room="r")
    await claim.finish(job, attempts=8)
    stored = await store.get_entity("jobs", "a")
    del stored["created_at"], stored["updated_at"]
    assert stored == {
        "job_id": "a",
        "unknown": 1,
        "status": "DONE",
        "attempts": 8,
        "tags": ["x", "y"],
        "place": {"room": "r", "floor": 0},
        "version": 4,
    }
    assert await store.claims("jobs") == []


async def test_an_instance_undoes_what_its_claim_has_written(opened: Any) -> None:
    store, model, _ = opened
    jobs = store.typed(model)
    await jobs.create(model(job_id="a"))
    [claim] = await jobs.claim()
    await claim.update(status=Status.DONE, attempts=increment(1))
    await claim.finish(claim.instance)
    assert await jobs.get("a") == model(job_id="a")


async def test_a_transaction_of_a_claim_is_typed(opened: Any) -> None:
    store, model, _ = opened
    jobs = store.typed(model)
    await jobs.create(model(job_id="a"))
    [claim] = await jobs.claim()
    async with claim.transaction() as tx:
        typed = tx.typed(model)
        await typed.save(model(job_id="a", attempts=1))
        await typed.create(model(job_id="b"))
        for refused in (typed.claim, typed.watch, typed.wait_for):
            with pytest.raises(InvalidInputError, match="by a store"):
                refused("a")
    await store.break_claim("jobs", "a")
    for change in (
        lambda: claim.update(attempts=2),
        lambda: claim.update(model(job_id="a", attempts=2)),
        lambda: claim.finish(attempts=2),
        claim.finish,
        claim.renew,
        claim.release,
        claim.delete,
    ):
        with pytest.raises(ClaimLostError):
            await change()
    assert (await jobs.get("a")).attempts == 1


async def test_an_entity_that_does_not_fit_is_claimed(opened: Any) -> None:
    store, model, _ = opened
    jobs = store.typed(model)
    await store.create_entity("jobs", {"job_id": "a", "status": "NONE"})
    [claim] = await jobs.claim()
    with pytest.raises(EntityMismatchError, match="status"):
        _ = claim.instance
    with pytest.raises(EntityMismatchError, match="status"):
        await claim.update(model(job_id="a"))
    assert await jobs.claim() == []
    with pytest.raises(InvalidFieldError, match="did you mean 'status'"):
        await claim.finish(state=Status.DONE)
    await claim.finish(status=Status.DONE)
    assert await jobs.get("a") == model(job_id="a", status=Status.DONE)


class Document(msgspec.Struct, omit_defaults=True):
    document_id: str
    content: Any = None
    note: str | None = None
    version: int = 0


@pytest.mark.parametrize(
    ("before", "after"), [({"a": [1]}, {"a": [1, 2]}), (1, True), (1, 1.0), ([{}], [{"b": None}])]
)
async def test_a_claim_finds_changes_inside_of_values(before: Any, after: Any, url: str) -> None:
    collection = Collection.from_model(Document, key="document_id")
    async with open_store(url, collections=[collection]) as store:
        documents = store.typed(Document)
        await documents.create(Document("d", before, "n"))
        [claim] = await documents.claim()
        document = claim.instance
        if isinstance(before, dict):
            document.content["a"].append(2)
        elif isinstance(before, list):
            document.content[0]["b"] = None
        else:
            document.content = after
        document.note = None
        assert await claim.update(document) == 2
        entity = await store.get_entity("documents", "d")
        assert entity is not None
        assert repr(entity["content"]) == repr(after)
        assert "note" not in entity
        with pytest.raises(InvalidFieldError):
            await claim.update(Document("e"))


class Reading(msgspec.Struct):
    reading_id: str
    ratio: float | None = None
    content: Any = None


@pytest.mark.parametrize(
    ("field", "value"), [("ratio", float("nan")), ("ratio", float("inf")), ("content", "\ud800")]
)
async def test_a_claim_refuses_what_cannot_be_stored(field: str, value: Any) -> None:
    collection = Collection.from_model(Reading, key="reading_id", name="readings")
    async with open_store("memory:", collections=[collection]) as store:
        readings = store.typed(Reading)
        await readings.create(Reading("a"))
        [claim] = await readings.claim()
        for _ in range(2):
            with pytest.raises(UnsupportedValueError, match=field):
                await claim.update(Reading("a", **{field: value}))
        assert await claim.update(Reading("a", 1.5)) == 2


async def test_entities_of_the_store_become_instances(opened: Any) -> None:
    store, model, _ = opened
    jobs = store.typed(model)
    await jobs.create_many([model(job_id=each, attempts=n) for n, each in enumerate("abc")])
    updated = await store.update_entity("jobs", "a", {"attempts": 5}, returning=True)
    assert jobs.instance_of(updated) == model(job_id="a", attempts=5)
    assert await jobs.sum_of("attempts") == 8
    assert await jobs.min_of("attempts", {"job_id": "b"}) == 1
    assert await jobs.max_of("attempts") == 5
    with pytest.raises(EntityMismatchError):
        jobs.instance_of({"job_id": "a", "attempts": "x"})


def test_blocking_callers_claim_instances(url: str) -> None:
    with sync.open_store(url, collections=[declared(DataJob)]) as store:
        jobs = store.typed(DataJob)
        jobs.create(DataJob("a"))
        [claim] = jobs.claim(order_by="job_id")
        assert claim.instance == DataJob("a")
        assert (claim.id, claim.attempts) == ("a", 1)
        assert claim.claim.entity["status"] == "WAITING"
        with claim:
            claim.instance.attempts = 3
            assert claim.update(claim.instance) == 2
            with claim.transaction() as tx:
                tx.typed(DataJob).create(DataJob("b"))
                typed: Any = tx.typed(DataJob)
                with pytest.raises(InvalidInputError, match="by a store"):
                    typed.claim()
            claim.finish(status=Status.DONE)
        assert jobs.get("a") == DataJob("a", Status.DONE, 3)
        assert jobs.max_of("attempts") == 3
        assert jobs.instance_of(store.get_entity("jobs", "b") or {}) == DataJob("b")
        with pytest.raises(ClaimLostError):
            claim.update(attempts=1)


# -- ids that are not strings ----------------------------------------------------------------


class Parcel(msgspec.Struct):
    parcel_id: uuid.UUID
    n: int = 0


class PydanticParcel(pydantic.BaseModel):
    parcel_id: uuid.UUID
    n: int = 0


@pytest.mark.parametrize("model", [Parcel, PydanticParcel])
async def test_an_id_may_be_a_uuid(model: Any, url: str) -> None:
    declared = Collection.from_model(model, key="parcel_id", name="parcels")
    async with open_store(url, collections=[declared]) as store:
        parcels = store.typed(model)
        one, other = uuid.UUID(int=1), uuid.UUID(int=2)
        await parcels.create_many([model(parcel_id=one), model(parcel_id=other)])
        assert await parcels.get(one) == model(parcel_id=one)
        assert await parcels.patch(one, n=1) == 2

        def count(parcel: Any) -> Any:
            parcel.n += 1
            return parcel

        assert await parcels.modify(one, count) == 3
        assert await parcels.get_versioned(one) == (model(parcel_id=one, n=2), 3)
        assert await parcels.get_many([other, str(one)]) == [
            model(parcel_id=other),
            model(parcel_id=one, n=2),
        ]
        assert await parcels.wait_for(one, {"n": 2}, timeout=5) == model(parcel_id=one, n=2)
        assert await parcels.delete(one)
        assert await parcels.delete_many([one, other]) == [False, True]
        with pytest.raises(InvalidInputError, match="must be a string, not int"):
            await parcels.get(1)
        with pytest.raises(InvalidInputError, match="ids must be a list"):
            await parcels.get_many("ab")


class Numbered(msgspec.Struct):
    job_id: int


class NumberedOrNot(pydantic.BaseModel):
    job_id: float | None = None


@pytest.mark.parametrize(("model", "kind"), [(Numbered, "integer"), (NumberedOrNot, "number")])
def test_an_id_is_not_a_number(model: Any, kind: str) -> None:
    with pytest.raises(
        ConfigurationError,
        match=rf"{model.__name__}.job_id is the key, and of type {kind}; ids are strings",
    ):
        Collection.from_model(model, key="job_id")


# -- values of types that only models have ---------------------------------------------------


class StructPrice(msgspec.Struct):
    price_id: str
    amount: Annotated[Decimal, msgspec.Meta(description="in euros")]
    since: time = time(8)
    lasts: timedelta = timedelta(hours=1)
    raw: bytes = b"\x01"
    content: Any = None


@dataclasses.dataclass
class DataPrice:
    price_id: str
    amount: Decimal
    since: time = time(8)
    lasts: timedelta = timedelta(hours=1)
    raw: bytes = b"\x01"
    content: Any = None


class PydanticPrice(pydantic.BaseModel):
    price_id: str
    amount: Decimal = pydantic.Field(alias="cost", ge=0)
    since: time = time(8)
    lasts: timedelta = timedelta(hours=1)
    raw: bytes = b"\x01"
    content: Any = None


@pytest.mark.parametrize("model", [StructPrice, DataPrice, PydanticPrice])
async def test_a_filter_may_be_of_a_type_that_only_models_have(model: Any, url: str) -> None:
    declared = Collection.from_model(model, key="price_id", name="prices")
    name = "cost" if model is PydanticPrice else "amount"
    async with open_store(url, collections=[declared]) as store:
        prices = store.typed(model)
        amounts = [Decimal(each) for each in ("1.10", "10", "9")]
        await prices.create_many(
            [model(price_id=str(each), **{name: each}, content=[]) for each in amounts]
        )
        for amount in amounts:
            [found] = await prices.query({name: amount})
            assert found.amount == amount
        # As text, as the page says.
        assert [each.amount for each in await prices.query(order_by=name)] == amounts
        assert await prices.count({name: in_(amounts[:2])}) == 2
        assert await prices.count({name: between(Decimal(1), Decimal(3))}) == 2
        assert await prices.count({name: gt(Decimal(-1))}) == 3
        for field, value in [
            ("since", time(8)),
            ("lasts", timedelta(hours=1)),
            ("raw", b"\x01"),
        ]:
            assert await prices.count({field: value}) == 3
        assert await prices.count({path("content", 0): Decimal(1)}) == 0
        assert await store.count_entities("prices", {name: amounts[0]}) == 1
        assert await prices.update_where({name: amounts[0]}, {name: amounts[1]}) == 1
        with pytest.raises(UnsupportedValueError, match="of type Fraction is not supported"):
            await prices.count({name: Fraction(1)})


async def test_a_filter_of_a_collection_without_a_model_is_of_the_types_of_json() -> None:
    plain = Collection("prices", key="price_id", fields=["amount"])
    async with open_store("memory:", collections=[plain]) as store:
        with pytest.raises(UnsupportedValueError, match="amount: .* Decimal is not supported"):
            await store.count_entities("prices", {"amount": Decimal(1)})


# -- values that the class refuses ----------------------------------------------------------

Title = Annotated[str, msgspec.Meta(min_length=1)]


class StructArticle(msgspec.Struct):
    job_id: str
    author: Place
    note: str | None
    title: Title = "untitled"
    status: Status = Status.WAITING
    due_at: datetime | None = None


@dataclasses.dataclass
class DataArticle:
    job_id: str
    author: DataPlace
    note: str | None
    title: Title = "untitled"
    status: Status = Status.WAITING
    due_at: datetime | None = None


@attrs.define
class AttrsArticle:
    job_id: str
    author: DataPlace
    note: str | None
    title: str = attrs.field(default="untitled", validator=attrs.validators.min_len(1))
    status: Status = Status.WAITING
    due_at: datetime | None = attrs.field(default=None)

    @due_at.validator
    def _follows(self, _: object, value: datetime | None) -> None:
        if value is not None and self.title == "no date":
            raise ValueError("no date is allowed")


class PydanticArticle(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, alias_generator=lambda name: name
    )

    job_id: str
    author: PydanticPlace
    note: str | None
    title: str = pydantic.Field("untitled", min_length=1)
    status: Status = Status.WAITING
    due_at: datetime | None = None


ARTICLES: list[tuple[Any, Any]] = [
    (StructArticle, Place),
    (DataArticle, DataPlace),
    (AttrsArticle, DataPlace),
    (PydanticArticle, PydanticPlace),
]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("title", ""),
        ("title", None),
        ("status", "BURNT"),
        ("author", {"nome": "ada"}),
        ("author", {"room": 5}),
        ("author", REMOVE),
        ("note", REMOVE),
        ("due_at", "soon"),
    ],
)
@pytest.mark.parametrize(("model", "place"), ARTICLES, ids=lambda each: each.__name__)
async def test_a_value_that_the_class_refuses_is_not_stored(
    model: Any, place: Any, field: str, value: Any
) -> None:
    async with open_store("memory:", collections=[declared(model)]) as store:
        articles = store.typed(model)
        article = model(job_id="a", author=place(room="r"), note=None)
        await articles.create(article)
        with pytest.raises(InvalidFieldError, match=field):
            await articles.patch("a", **{field: value})
        with pytest.raises(InvalidFieldError, match=field):
            await articles.update_where({"job_id": "a"}, {field: value})
        async with store.begin_transaction() as tx:
            with pytest.raises(InvalidFieldError, match=field):
                await tx.typed(model).patch("a", **{field: value})
        [claim] = await articles.claim()
        with pytest.raises(InvalidFieldError, match=field):
            await claim.update(**{field: value})
        with pytest.raises(InvalidFieldError, match=field):
            await claim.finish(**{field: value})
        assert await articles.get_versioned("a") == (article, 1)


@pytest.mark.parametrize(("model", "place"), ARTICLES, ids=lambda each: each.__name__)
async def test_a_value_that_the_class_accepts_is_stored(model: Any, place: Any) -> None:
    async with open_store("memory:", collections=[declared(model)]) as store:
        articles = store.typed(model)
        await articles.create(model(job_id="a", author=place(room="r"), note=None))
        await articles.patch(
            "a", title="t", status="DONE", author={"room": "q"}, due_at="2026-01-02"
        )
        await articles.patch("a", note="n", due_at=AT, title=REMOVE)
        assert await articles.get("a") == model(
            job_id="a", author=place(room="q"), note="n", status=Status.DONE, due_at=AT
        )
        await articles.update_where({}, {"due_at": "2026-01-02T10:00:00+01:00"})
        assert (await articles.get("a")).due_at == datetime(2026, 1, 2, 9, tzinfo=UTC)


class Node(pydantic.BaseModel):
    """A model whose fields are validated by functions."""

    job_id: str
    size: Annotated[int, pydantic.AfterValidator(lambda size: abs(size))] = 0
    word: str = pydantic.Field("a", alias="text")
    longer: str = ""
    text_of_list: list[str] = []
    marked: Annotated[int, pydantic.WrapValidator(lambda n, next_, info: next_(n))] = 0
    child: Self | None = None

    @pydantic.field_validator("word", "longer")
    @classmethod
    def _is_lower(cls, value: str) -> str:
        if value != value.lower():
            raise ValueError(f"{cls.__name__} needs lower case")
        return value

    @pydantic.field_validator("longer")
    @classmethod
    def _is_longer(cls, value: str, info: pydantic.ValidationInfo) -> str:
        if value and len(value) <= len(info.data["word"]):
            raise ValueError("not longer than word")
        return value

    @pydantic.field_validator("text_of_list", mode="plain")
    @classmethod
    def _listed(cls, value: Any, info: pydantic.ValidationInfo) -> list[str]:
        assert "word" in info.data
        return list(value)

    @pydantic.field_validator("job_id", mode="wrap")
    @classmethod
    def _key(cls, value: Any, next_: Any) -> str:
        return str(next_(value))


class Produced(pydantic.BaseModel):
    job_id: str
    n: int = 0
    length: int = pydantic.Field(default_factory=lambda others: len(others["job_id"]))


async def test_a_patch_asks_for_no_default() -> None:
    async with open_store("memory:", collections=[declared_only(Produced)]) as store:
        produced = store.typed(Produced)
        await produced.create(Produced(job_id="abc"))
        await produced.patch("abc", n=1)
        assert await produced.get("abc") == Produced(job_id="abc", n=1, length=3)


class Tree(pydantic.BaseModel):
    job_id: str
    children: list[Tree] = []
    leaf: Leaf | None = None


class Leaf(pydantic.BaseModel):
    name: str


async def test_fields_of_recursive_models_are_checked() -> None:
    async with open_store("memory:", collections=[declared_only(Tree)]) as store:
        trees = store.typed(Tree)
        await trees.create(Tree(job_id="t"))
        with pytest.raises(InvalidFieldError, match=r"children.0.job_id"):
            await trees.patch("t", children=[{"job_id": 5}])
        with pytest.raises(InvalidFieldError, match=r"leaf.name"):
            await trees.patch("t", leaf={})
        await trees.patch("t", children=[Tree(job_id="u")], leaf=Leaf(name="l"))
        assert await trees.get("t") == Tree(
            job_id="t", children=[Tree(job_id="u")], leaf=Leaf(name="l")
        )


async def test_validators_of_one_field_of_pydantic_are_asked() -> None:
    async with open_store("memory:", collections=[declared_only(Node)]) as store:
        nodes = store.typed(Node)
        await nodes.create(Node(job_id="n"))
        for field in ("word", "longer"):
            with pytest.raises(InvalidFieldError, match="Node needs lower case"):
                await nodes.patch("n", **{field: "ABC"})
        with pytest.raises(InvalidFieldError, match=r"Node, field 'text': .* valid string"):
            await nodes.patch("n", word=None)
        child = Node(job_id="c")
        await nodes.patch(
            "n", job_id="n", size=-5, longer="abc", text_of_list="xy", marked=2, child=child
        )
        # The one that compares two fields is not asked.
        await nodes.patch("n", word="b")
        read = await nodes.get("n")
        assert read is not None
        assert (read.size, read.word, read.longer, read.marked) == (5, "b", "abc", 2)
        assert (read.text_of_list, read.child) == (["x", "y"], child)
