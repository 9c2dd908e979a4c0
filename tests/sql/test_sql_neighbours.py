"""Changes that share a statement: one that fails does not affect the others."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg  # type: ignore[import-untyped]  # it has no types
import pytest

from hf_async_store import (
    BatchError,
    InvalidInputError,
    LockTimeoutError,
    StorageError,
    UnsupportedValueError,
    open_store,
)
from hf_async_store.changes import Delete, Patch, Put
from hf_async_store.values import Key
from tests.contract.harnesses import execute

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from hf_async_store_bench.servers import PostgresServer


pytestmark = pytest.mark.hf_sampled(by="url")


def template(key: str, **fields: object) -> dict[str, object]:
    return {"template_id": key, **fields}


async def outcomes_of(store: Any, names: Sequence[str]) -> list[Any]:
    """The outcomes of writes that are queued at the same time, one for each name."""
    saves = [
        store.save_entity("templates", template(f"t-{n}", name=name))
        for n, name in enumerate(names)
    ]
    return await asyncio.gather(*saves, return_exceptions=True)


@pytest.fixture
def latin(postgres_server: PostgresServer) -> Iterator[str]:
    url = postgres_server.database("ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'")
    yield url
    postgres_server.drop(url)


@pytest.mark.parametrize("options", ["", "?pgbouncer=yes"])
async def test_a_string_that_the_database_encoding_cannot_represent(
    latin: str, options: str
) -> None:
    async with open_store(latin + options) as store:
        names = ["plain", "caf\u00e9", "\u65e5\u672c", *map(str, range(60)), "\u0416"]
        found = await outcomes_of(store, names)
        for name, outcome in zip(names, found, strict=True):
            if name in ("\u65e5\u672c", "\u0416"):
                assert isinstance(outcome, UnsupportedValueError), outcome
                assert "UTF8" in str(outcome)
                assert not outcome.outcome_unknown
            else:
                assert outcome == 1, name
        assert await store.count_entities("templates") == len(names) - 2
        with pytest.raises(BatchError) as caught:
            await store.save_entities(
                "templates", [template("a"), template("b", name="\u65e5"), template("c")]
            )
        kinds = [each if isinstance(each, int) else type(each) for each in caught.value.outcomes]
        assert kinds == [1, UnsupportedValueError, 1]


@pytest.mark.parametrize("rule", ["unique", "check", "trigger"])
@pytest.mark.parametrize("options", ["", "pgbouncer=yes"])
async def test_a_constraint_of_an_administrator(url: str, rule: str, options: str) -> None:
    sqlite = url.startswith("sqlite")
    if sqlite and (options or rule == "check"):
        pytest.skip("SQLite adds no constraint to a table that is there, and has no pgbouncer")
    async with open_store(f"{url}?{options}") as store:
        await store.save_entity("templates", template("first", name="x"))
        for statement in _rules(rule, sqlite=sqlite):
            if sqlite:
                await store.execute_with_lock(statement)  # type: ignore[attr-defined]
            else:
                execute(url, statement)
        names = ["a", "b", "x", *(f"n{n}" for n in range(60)), "x"]
        found = await outcomes_of(store, names)
        for name, outcome in zip(names, found, strict=True):
            if name == "x":
                assert isinstance(outcome, InvalidInputError), outcome
                assert not outcome.retryable
            else:
                assert outcome == 1, (name, outcome)
        updates = [
            store.update_entity("templates", "t-0", {"name": "x"}),
            store.update_entity("templates", "t-1", {"name": "fine"}),
            store.delete_entity("templates", "t-3"),
        ]
        refused, updated, deleted = await asyncio.gather(*updates, return_exceptions=True)
        assert isinstance(refused, InvalidInputError)
        assert (updated, deleted) == (2, True)
        # In a transaction one failure aborts all.
        with pytest.raises(StorageError):
            await _together(store)
        assert await store.get_entity("templates", "y") is None


def _rules(rule: str, *, sqlite: bool) -> list[str]:
    if rule == "unique":
        return ["CREATE UNIQUE INDEX one_name ON \"templates-entities\" ((doc ->> 'name'))"]
    if rule == "check":
        return [
            "ALTER TABLE \"templates-entities\" ADD CONSTRAINT no_x CHECK (doc ->> 'name' <> 'x') "
            "NOT VALID"
        ]
    if sqlite:
        return [
            f'CREATE TRIGGER no_x_{verb} BEFORE {verb} ON "templates-entities" '
            "WHEN NEW.doc ->> 'name' = 'x' BEGIN SELECT RAISE(ABORT, 'no x here'); END"
            for verb in ("INSERT", "UPDATE")
        ]
    return [
        "CREATE FUNCTION no_x() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.doc ->> 'name' = 'x' THEN RAISE EXCEPTION 'no x here'; END IF; RETURN NEW; END $$; "
        'CREATE TRIGGER no_x AFTER INSERT OR UPDATE ON "templates-entities" '
        "FOR EACH ROW EXECUTE FUNCTION no_x()"
    ]


async def _together(store: Any) -> None:
    async with store.begin_transaction() as tx:
        await tx.save_entity("templates", template("y"))
        await tx.save_entity("templates", template("z", name="x"))


# -- a row that another transaction holds ---------------------------------------------------


@asynccontextmanager
async def locked(url: str, *keys: str) -> AsyncIterator[None]:
    """While templates are locked by another program."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            for each in keys:
                row = 'SELECT 1 FROM "templates-entities" WHERE template_id = $1 FOR UPDATE'
                await connection.execute(row, each)
            yield
    finally:
        await connection.close()


@pytest.mark.parametrize("verb", ["update", "save", "delete", "batch"])
@pytest.mark.parametrize("options", ["", "&pgbouncer=yes", "&isolation=read_committed"])
async def test_a_locked_row_blocks_only_its_own_change(
    database: str, verb: str, options: str
) -> None:
    url = f"{database}?timeout=60{options}"
    async with open_store(url) as store:
        await store.save_entities("templates", [template(each) for each in "abcx"])

        def write(key: str) -> Any:
            if verb == "update":
                return store.update_entity("templates", key, {"n": 1})
            if verb == "save":
                return store.save_entity("templates", template(key, n=1))
            if verb == "delete":
                return store.delete_entity("templates", key)
            return store.save_entities("templates", [template(key, n=1), template(f"{key}2")])

        async with locked(database, "x"):
            held = asyncio.create_task(write("x"))
            neighbours = asyncio.gather(write("a"), write("b"))
            try:
                async with asyncio.timeout(20):
                    await neighbours
                    await write("c")
                assert not held.done()
            finally:
                neighbours.cancel()
                late = asyncio.gather(held, return_exceptions=True)
        [ended] = await late
        assert not isinstance(ended, BaseException), ended


async def test_many_locked_rows_take_few_connections(database: str) -> None:
    names = [f"x{each}" for each in range(30)]
    async with open_store(f"{database}?timeout=60") as store:
        await store.save_entities("templates", [template(each) for each in [*names, "a"]])
        async with locked(database, *names):
            writes = [
                asyncio.create_task(store.update_entity("templates", each, {"n": 1}))
                for each in names
            ]
            async with asyncio.timeout(20):
                for _ in range(5):
                    await store.update_entity("templates", "a", {"n": 1})
            assert not any(each.done() for each in writes)
            pool: Any = (await store.health())["pool"]
            assert pool["in_use"] <= 6
        assert await asyncio.gather(*writes) == [2] * len(names)


@pytest.mark.parametrize("options", ["", "&pgbouncer=yes", "&isolation=read_committed"])
async def test_what_was_applied_is_not_reported_as_failed(database: str, options: str) -> None:
    """One row is locked for longer than `timeout`, which a statement of other rows does not take."""
    async with open_store(f"{database}?timeout=3{options}") as store:
        await store.save_entities("templates", [template(each) for each in "abcx"])
        async with locked(database, "x"):
            with pytest.raises(BatchError) as caught:
                await store.save_entities("templates", [template(each, n=1) for each in "axbc"])
            outcomes = caught.value.outcomes
            assert [each if isinstance(each, int) else type(each) for each in outcomes] == [
                2,
                LockTimeoutError,
                2,
                2,
            ]
            # As the import and the tools write, which do not share batches with others.
            changes = [Put(Key("templates", each), template(each), "") for each in "axbc"]
            found = await store.engine.write_each(changes)
            assert [each if isinstance(each, int) else type(each) for each in found] == [
                3,
                LockTimeoutError,
                3,
                3,
            ]
        assert await store.save_entity("templates", template("x")) == 2


async def test_waiting_for_a_lock_is_told_from_a_slow_statement(database: str) -> None:
    """A statement may need some time before it waits: then `timeout` ends it before its wait has ended."""
    slow = (
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "PERFORM pg_sleep(0.5); RETURN NULL; END $$; "
        'CREATE TRIGGER slow BEFORE UPDATE ON "templates-entities" '
        "FOR EACH STATEMENT EXECUTE FUNCTION slow()"
    )
    async with open_store(f"{database}?timeout=2") as store:
        await store.save_entities("templates", [template(each) for each in "ax"])
        execute(database, slow)
        async with locked(database, "x"):
            changes = [
                Patch(Key("templates", "x"), {"n": 1}, ""),
                Put(Key("templates", "b"), template("b"), ""),
                Delete(Key("templates", "a")),
            ]
            blocked, *others = await store.engine.write_each(changes)
        assert isinstance(blocked, LockTimeoutError), blocked
        assert others == [1, 1]
        execute(database, 'DROP TRIGGER slow ON "templates-entities"')


async def test_a_change_behind_a_locked_one_of_the_same_row_keeps_its_place(database: str) -> None:
    async with open_store(f"{database}?timeout=10") as store:
        await store.save_entities("templates", [template(each) for each in "ax"])
        async with locked(database, "x"):
            writes = [
                asyncio.create_task(store.update_entity("templates", "x", {"n": each}))
                for each in range(4)
            ]
            await store.update_entity("templates", "a", {"n": 1})
            writes += [
                asyncio.create_task(store.update_entity("templates", "x", {"n": each}))
                for each in range(4, 8)
            ]
            await asyncio.sleep(0.3)
        assert await asyncio.gather(*writes) == list(range(2, 10))
        found = await store.get_entity("templates", "x")
        assert found is not None
        assert found["n"] == 7


async def test_an_entity_that_is_being_created_elsewhere(database: str) -> None:
    """Its row cannot be found locked, because it is not committed."""
    async with open_store(database) as other, open_store(f"{database}?timeout=60") as store:
        await store.save_entity("templates", template("a"))
        async with other.begin_transaction() as tx:
            await tx.save_entity("templates", template("x", n=1))
            names = [*(f"n{each}" for each in range(20)), "x"]
            writes = [
                asyncio.create_task(store.save_entity("templates", template(each)))
                for each in names
            ]
            async with asyncio.timeout(20):
                assert await asyncio.gather(*writes[:-1]) == [1] * 20
            assert not writes[-1].done()
        assert await writes[-1] == 2


@pytest.mark.parametrize("created", [True, False])
async def test_many_blocked_changes_wait_together(database: str, created: bool) -> None:
    """Not one after the other: it would take minutes until the last one was found to be blocked."""
    entities = [template(f"x{each:03}", n=1) for each in range(150)]
    async with open_store(database) as other, open_store(f"{database}?timeout=2") as store:
        await store.save_entities("templates", [template("a"), *([] if created else entities)])
        async with other.begin_transaction() as tx:
            await tx.save_entities("templates", entities)
            async with asyncio.timeout(60):  # instead of 150 times 2 seconds
                with pytest.raises(BatchError) as caught:
                    await store.save_entities("templates", [*entities, template("a")])
                outcomes = await store.engine.write_each(
                    [Put(Key("templates", str(each["template_id"])), each, "") for each in entities]
                )
        assert caught.value.outcomes[-1] == 2
        for each in (*caught.value.outcomes[:-1], *outcomes):
            assert isinstance(each, LockTimeoutError), each


async def test_a_single_change_of_a_locked_row_waits_until_its_timeout(
    database: str,
) -> None:
    async with open_store(database) as other, open_store(f"{database}?timeout=2") as store:
        await other.save_entity("templates", template("x"))
        async with other.begin_transaction() as tx:
            await tx.update_entity("templates", "x", {"n": 9})
            with pytest.raises(LockTimeoutError) as caught:
                await asyncio.create_task(store.update_entity("templates", "x", {"n": 1}))
            assert caught.value.retryable
            assert not caught.value.outcome_unknown
        assert await store.update_entity("templates", "x", {"n": 1}) == 3
