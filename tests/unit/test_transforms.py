"""Transforms: functions that change stored entities together with their declaration."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store import (
    REMOVE,
    Collection,
    Field,
    InvalidFieldError,
    InvalidInputError,
    SchemaMismatchError,
    UnknownCollectionError,
    UnsupportedValueError,
    increment,
    open_store,
)
from hf_async_store.testing.repetitions import sampled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OLD: Final = [Collection("jobs", key="job_id", fields=["status"], indexes=["status"])]
NEW: Final = [
    Collection(
        "jobs",
        key="job_id",
        fields=["state", Field("size", "integer", required=True)],
        indexes=["state"],
    )
]


def renamed(entity: dict[str, Any]) -> dict[str, Any] | None:
    if "status" not in entity:
        return None
    return {"state": entity["status"], "status": REMOVE, "size": 0}


async def test_wrong_transforms_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    async with open_store(f"json:{tmp_path}/db.json", collections=NEW) as store:
        for wrong, error in (
            ([], InvalidInputError),
            ({"jobs": 1}, InvalidInputError),
            ({"nope": renamed}, UnknownCollectionError),
        ):
            with pytest.raises(error):
                await store.apply_schema(transform=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("result", "error", "told"),
    [
        ({"size": "x"}, InvalidFieldError, "jobs.size"),
        ({"size": REMOVE}, InvalidFieldError, "required"),
        ({"job_id": "b"}, InvalidFieldError, "key"),
        ({"x": object()}, UnsupportedValueError, "x"),
        ({"x": increment(1)}, UnsupportedValueError, "x"),
        (7, UnsupportedValueError, "dict"),
    ],
)
async def test_what_a_transform_must_not_return(
    tmp_path: Path, result: Any, error: type[Exception], told: str
) -> None:
    async with open_store(f"json:{tmp_path}/db.json", collections=OLD) as store:
        await store.save_entity("jobs", {"job_id": "a"})
    async with open_store(f"json:{tmp_path}/db.json", collections=NEW) as store:
        with pytest.raises(error, match=told) as caught:
            await store.apply_schema(transform={"jobs": lambda entity: result})
        assert caught.value.__notes__ == ["in the transform of jobs 'a'"]
        assert (await store.get_entity("jobs", "a") or {})["version"] == 1


async def test_an_error_of_the_function_is_raised_as_it_is(tmp_path: Path) -> None:
    async with open_store(f"json:{tmp_path}/db.json", collections=OLD) as store:
        await store.save_entity("jobs", {"job_id": "a"})
        with pytest.raises(ZeroDivisionError) as caught:
            await store.apply_schema(transform={"jobs": lambda entity: {"x": 1 // 0}})
        assert "'a'" in caught.value.__notes__[0]


async def test_a_transform_that_never_ends_is_refused(tmp_path: Path) -> None:
    def larger(entity: dict[str, Any]) -> dict[str, Any]:
        return {"size": entity.get("size", 0) + 1}

    async with open_store(f"json:{tmp_path}/db.json", collections=OLD) as store:
        await store.save_entity("jobs", {"job_id": "a"})
        with pytest.raises(InvalidInputError, match="'a' each time it is run, in size"):
            await store.apply_schema(transform={"jobs": larger})
        assert (await store.get_entity("jobs", "a") or {})["version"] == 1


async def test_a_value_of_another_type_is_another_value(tmp_path: Path) -> None:
    async with open_store(f"json:{tmp_path}/db.json", collections=OLD) as store:
        for number, each in enumerate((1, 1.0, True, "1", None)):
            await store.save_entity("jobs", {"job_id": f"j{number}", "x": each})
        await store.save_entity("jobs", {"job_id": "j5"})
        await store.apply_schema(transform={"jobs": lambda entity: {"x": 1}})
        found = await store.query_entities("jobs", order_by="job_id")
        assert [(type(each["x"]), each["version"]) for each in found] == [
            (int, 1 if number == 0 else 2) for number in range(6)
        ]
        await store.apply_schema(transform={"jobs": lambda entity: {"x": REMOVE}})
        assert not any("x" in each for each in await store.query_entities("jobs"))


async def test_a_key_that_the_store_does_not_know_is_refused_first(tmp_path: Path) -> None:
    async with open_store(f"json:{tmp_path}/db.json", collections=OLD) as store:
        await store.save_entity("jobs", {"job_id": "a"})
    other = [Collection("jobs", key="id")]
    async with open_store(f"json:{tmp_path}/db.json", collections=other) as store:
        with pytest.raises(SchemaMismatchError, match="key"):
            await store.apply_schema(transform={"jobs": renamed})


KILLED: Final = """
import asyncio, os, signal, sys
from hf_async_store import open_store
from hf_async_store import entity_rewriting
from tests.unit.test_transforms import NEW, renamed

url, limit = sys.argv[1], int(sys.argv[2])
entity_rewriting._PAGE_SIZE = 8
entity_rewriting._BATCH_SIZE = 4

async def main():
    steps = 0
    async with open_store(url, collections=NEW) as store:
        engine = store.engine
        write = engine.write_each
        async def counted(changes):
            nonlocal steps
            for before in (True, False):
                steps += 1
                if steps == limit:
                    os.kill(os.getpid(), signal.SIGKILL)
                if before:
                    outcomes = await write(changes)
            return outcomes
        engine.write_each = counted
        await store.apply_schema(transform={"jobs": renamed})
    print(steps)

asyncio.run(main())
"""


async def run_killed(url: str, limit: int) -> int | None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, url, str(limit), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    return int(said) if process.returncode == 0 else None


@pytest.fixture(params=["json", "sqlite", "postgresql", "dynamodb"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store."""
    if request.param == "json":
        yield f"json:{tmp_path}/db.json"
    elif request.param == "sqlite":
        yield f"sqlite:{tmp_path}/store.db"
    elif request.param == "dynamodb":
        endpoint = request.getfixturevalue("dynamodb_server").endpoint_url
        yield f"dynamodb://us-east-1/t{secrets.token_hex(6)}?endpoint_url={endpoint}"
    else:
        server = request.getfixturevalue("postgres_server")
        database: str = server.database()
        yield database
        server.drop(database)


@pytest.mark.hf_sampled
async def test_a_transform_that_is_killed_at_any_step_is_completed_by_the_next(url: str) -> None:
    count = 13  # two pages of two batches each
    steps = 8  # before and after each batch
    for step in (*sampled(range(1, steps + 1)), steps + 1):
        async with open_store(url, collections=OLD) as old:
            await old.delete_entities("jobs", [f"j{n:02}" for n in range(count)])
            await old.save_entities(
                "jobs",
                [{"job_id": f"j{n:02}", "status": f"s{n % 3}", "n": n} for n in range(count)],
            )
        if step > steps:
            assert await run_killed(url, step) is not None
            break
        assert await run_killed(url, step) is None
        async with open_store(url, collections=OLD) as old:  # goes on meanwhile
            await old.update_entity("jobs", "j03", {"status": "again"})
            assert await old.count_entities("jobs") == count
        await assert_completed(url, count)


async def assert_completed(url: str, count: int) -> None:
    async with open_store(url, collections=NEW) as store:
        await store.apply_schema(complete=True, transform={"jobs": renamed})
        found = sorted(await store.query_entities("jobs"), key=lambda each: str(each["job_id"]))
        assert [each["n"] for each in found] == list(range(count))
        assert not any("status" in each for each in found)
        states = [f"s{n % 3}" for n in range(count)]
        states[3] = "again"
        assert [each["state"] for each in found] == states
        assert {each["version"] for each in found if each["n"] != 3} == {2}
        assert await store.schema_changes() == []
        assert await store.count_entities("jobs", {"state": "s1"}) == 4
