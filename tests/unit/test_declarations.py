"""The declarations that a store remembers: their JSON form, merging, and bad content."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from hf_async_store import (
    HOST_FACTORY,
    Collection,
    ConfigurationError,
    CorruptionError,
    Field,
    Index,
    NewerFormatError,
    SchemaMismatchError,
    StorageError,
    TransactionAbortedError,
    open_store,
)
from hf_async_store.changes import Put
from hf_async_store.declarations import are_equal, decoded, encoded, merged, schema_of_recorded
from hf_async_store.values import Key, utc_now

if TYPE_CHECKING:
    from pathlib import Path

JOBS = Collection(
    "jobs",
    key="job_id",
    fields=["owner", Field("size", "integer", required=True), Field("parent", references="jobs")],
    indexes=["owner", Index("owner", "size")],
)

BAD: dict[str, Any] = {
    "no format": {"collections": []},
    "no collections": {"format": 1},
    "a list": [],
    "a text": "hf_async_store:HOST_FACTORY",
    "null": None,
    "module": {"format": 1, "collections": "os:system"},
    "name": {
        "format": 1,
        "collections": [{"name": "../x", "key": "a", "fields": [], "indexes": []}],
    },
    "type": {
        "format": 1,
        "collections": [
            {"name": "x", "key": "a", "fields": [{"name": "f", "type": "code"}], "indexes": []}
        ],
    },
    "index": {
        "format": 1,
        "collections": [{"name": "x", "key": "a", "fields": [], "indexes": [{"field": "nope"}]}],
    },
    "twice": {"format": 1, "collections": [encoded([JOBS])["collections"][0]] * 2},  # type: ignore[index,call-overload]
}


def test_the_json_form_keeps_everything() -> None:
    stored = msgspec.json.decode(msgspec.json.encode(encoded([*HOST_FACTORY, JOBS])))
    found = decoded(stored, "here")
    assert are_equal(found, [*HOST_FACTORY, JOBS])
    assert [found[-1].fields, found[-1].indexes] == [JOBS.fields, JOBS.indexes]


@pytest.mark.parametrize("name", BAD)
def test_bad_content_is_corruption(name: str) -> None:
    with pytest.raises(CorruptionError, match="here"):
        decoded(BAD[name], "here")


def test_a_newer_format_is_named() -> None:
    with pytest.raises(NewerFormatError):
        decoded({"format": 4, "collections": {"other": "form"}}, "here")


def test_only_unique_indexes_need_the_newer_format() -> None:
    plain = [Collection("jobs", key="job_id", fields=["owner"], indexes=["owner"])]
    unique = [
        Collection("jobs", key="job_id", fields=["owner"], indexes=[Index("owner", unique=True)])
    ]
    assert [encoded(plain)["format"], encoded(unique)["format"]] == [1, 2]
    assert decoded(encoded(unique), "here")[0].indexes == (Index("owner", unique=True),)
    for first, then in ((plain, unique), (unique, plain)):
        assert merged(first, then)[0].indexes == (Index("owner", unique=True),)


def test_feeds_need_a_newer_format_and_the_longest_counts() -> None:
    short, long = (
        Collection("jobs", key="job_id", feed=seconds) for seconds in (60, timedelta(hours=1))
    )
    plain = Collection("jobs", key="job_id")
    assert encoded([short])["format"] == 3
    assert decoded(encoded([short]), "here")[0].feed == timedelta(minutes=1)
    for first, then in ((short, long), (long, short), (long, plain), (plain, long)):
        assert merged([first], [then])[0].feed == timedelta(hours=1)


@pytest.mark.parametrize("feed", [0, -1, True, "1", float("nan"), float("inf"), 1e12, timedelta(0)])
def test_a_wrong_retention_is_refused(feed: Any) -> None:
    with pytest.raises(ConfigurationError, match="feed"):
        Collection("jobs", key="job_id", feed=feed)


def test_merging_keeps_what_others_declare() -> None:
    other = Collection(
        "jobs", key="job_id", fields=[Field("size", "json"), "state"], indexes=["state"]
    )
    [found] = merged([JOBS], [other])
    assert set(found.fields) >= {"owner", "size", "parent", "state"}
    assert found.fields["size"] == Field("size", "json"), "the latest declaration of a field"
    # An index on a field that is of type json now cannot be declared any more.
    assert [each.name for each in found.indexes] == ["owner-index", "state-index"]
    assert are_equal(merged([found], [other]), [found])


def test_merging_never_changes_a_key() -> None:
    assert are_equal(merged([JOBS], [Collection("jobs", key="id", fields=["x"])]), [JOBS])


def test_references_of_several_programs_may_form_a_cycle() -> None:
    one = Collection("one", key="one_id", fields=[Field("other_id", references="other")])
    other = Collection("other", key="other_id", fields=[Field("one_id", references="one")])
    schema = schema_of_recorded([one, other])
    assert not any(each.references for each in schema.values())
    assert schema_of_recorded([JOBS])["jobs"].references


async def test_bad_content_of_the_default_is_corruption_and_no_failed_write() -> None:
    async with open_store("memory:", collections=[JOBS]) as store:
        key = Key("hf_catalogue", "declarations")
        entity = {"name": "declarations", "format": 1, "collections": "os:system"}
        [outcome] = await store.engine.write_each([Put(key, entity, utc_now())])
        assert outcome == 1
        with pytest.raises(CorruptionError, match="hf_catalogue"):
            await store.recorded_collections()
        assert await store.create_entity("jobs", {"job_id": "j", "size": 1}) == 1
        assert "hf_catalogue" in str((await store.health())["problems"])


async def test_the_collection_of_the_declarations_is_no_collection_of_the_store() -> None:
    async with open_store("memory:", collections=[JOBS]) as store:
        await store.create_entity("jobs", {"job_id": "j", "size": 1})
        assert sorted(store.collections) == ["jobs"]
        with pytest.raises(StorageError, match="no collection 'hf_catalogue'"):
            await store.get_entity("hf_catalogue", "declarations")
        assert await store.schema_changes() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"format": 1}', b"\xff"])
async def test_a_bad_file_of_a_json_store(tmp_path: Path, content: bytes) -> None:
    url = f"json:{tmp_path}/db.json"
    async with open_store(url, collections=[JOBS]) as store:
        await store.create_entity("jobs", {"job_id": "j", "size": 1})
    file = tmp_path / ".db.json.declarations"
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(content)
    async with open_store(url, collections=[JOBS]) as store:
        with pytest.raises(CorruptionError, match=r"\.db\.json\.declarations .*Restore"):
            await store.recorded_collections()
        assert await store.update_entity("jobs", "j", {"size": 2}) == 2
    assert file.read_bytes() == content
    file.unlink()
    async with open_store(url, collections=[JOBS]) as store:
        await store.update_entity("jobs", "j", {"size": 3})
        assert are_equal(await store.recorded_collections(), [JOBS])
    assert [each.name for each in tmp_path.glob("*.tmp")] == []


async def test_another_key_is_refused_by_apply_schema() -> None:
    other = Collection("jobs", key="id")
    async with open_store("memory:", collections=[other]) as store:
        await store.engine.remember([JOBS])
        with pytest.raises(SchemaMismatchError, match="jobs.id: .*'job_id'"):
            await store.apply_schema()
        assert "jobs.id" in str((await store.health())["problems"])


async def test_progress_is_reported() -> None:
    async with open_store("memory:", collections=[JOBS]) as store:
        seen: list[tuple[str, str, int, int | None]] = []
        await store.apply_schema(
            lambda each, *count: seen.append((each.kind, each.collection, *count))
        )
        assert seen == [("collection", "jobs", 1, 1)]
        await store.apply_schema(
            lambda each, *count: seen.append((each.kind, each.collection, *count))
        )
        assert len(seen) == 1


async def test_another_key_is_listed_and_refused(tmp_path: Path) -> None:
    location = f"json:{tmp_path / 'store.json'}"
    async with open_store(location, collections=[Collection("items", key="id")]) as store:
        await store.create_entity("items", {"id": "a"})
    renamed = [Collection("items", key="name"), Collection("others", key="id")]
    async with open_store(location, collections=renamed) as store:
        found = [(each.kind, each.name) for each in await store.schema_changes()]
        assert found == [("key", "name"), ("collection", "")]
        with pytest.raises(SchemaMismatchError, match="items.name: .* the key 'id'"):
            await store.apply_schema()
        assert [each.key for each in await store.recorded_collections()] == ["id"]


async def test_nothing_is_written_under_another_key(tmp_path: Path) -> None:
    location = f"json:{tmp_path / 'store.json'}"
    declared = [Collection("items", key="id")]
    async with open_store(location, collections=declared) as store:
        await store.create_entity("items", {"id": "a"})
    async with open_store(location, collections=[Collection("items", key="name")]) as store:
        for _ in range(2):
            with pytest.raises(SchemaMismatchError, match="'items' is 'id' in this store"):
                await store.create_entity("items", {"name": "b"})
        tx = await store.begin_transaction().__aenter__()
        with pytest.raises(SchemaMismatchError):
            await tx.save_entity("items", {"name": "b"})
        with pytest.raises(TransactionAbortedError):
            await tx.__aexit__(None, None, None)
    async with open_store(location, collections=declared) as store:
        assert [each["id"] for each in await store.query_entities("items")] == ["a"]


@pytest.mark.parametrize("layout", ["json:{}/store.json", "json:{}/files"])
async def test_a_lost_record_does_not_let_a_collection_have_two_keys(
    tmp_path: Path, layout: str
) -> None:
    location = layout.format(tmp_path)
    declared = [Collection("items", key="id"), Collection("others", key="id")]
    renamed = [Collection("items", key="name"), Collection("others", key="id")]
    async with open_store(location, collections=declared) as store:
        await store.create_entity("items", {"id": "a", "size": 1})
    [record] = tmp_path.rglob(".*.declarations")
    record.unlink()
    async with open_store(location, collections=renamed) as store:
        with pytest.raises(
            SchemaMismatchError, match="'items' is 'id' in this store.*copy"
        ) as found:
            await store.create_entity("items", {"name": "b"})
        assert "delete" not in str(found.value)
        with pytest.raises(CorruptionError, match=r"'a' in .* with the key 'id', but 'name' is"):
            await store.query_entities("items")
        assert "1 entities cannot be read, such as 'a'" in str((await store.health())["problems"])
    async with open_store(location, collections=declared) as store:
        await store.create_entity("items", {"id": "b"})
        assert (await store.health())["ok"]


async def test_a_field_that_becomes_required_is_described() -> None:
    before, after = (
        Collection("items", key="id", fields=[Field("size", "integer", required=required)])
        for required in (False, True)
    )
    async with open_store("memory:", collections=[after]) as store:
        await store.engine.remember([before])
        [found] = await store.schema_changes()
        assert found.detail == "another program declared it as integer, not as required integer"


def test_an_index_stays_unique_if_a_program_declares_its_field_as_json() -> None:
    unique = Collection(
        "jobs", key="job_id", fields=["owner"], indexes=[Index("owner", unique=True)]
    )
    untyped = Collection("jobs", key="job_id", fields=[Field("owner", "json"), Field("x", "json")])
    for one, other in ((unique, untyped), (untyped, unique)):
        [found] = merged([one], [other])
        assert found.unique == (("owner",),)
        assert found.fields.keys() >= {"owner", "x"}
