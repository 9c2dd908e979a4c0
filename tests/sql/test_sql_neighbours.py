"""Changes that share a statement: one that fails does not affect the others."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import asyncpg  # type: ignore[import-untyped]  # it has no types
import pytest

from hf_async_store import (
    BatchError,
    InvalidInputError,
    StorageError,
    UnsupportedValueError,
    open_store,
    path,
)
from tests.contract.harnesses import execute

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hf_async_store_bench.servers import PostgresServer


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


@pytest.mark.parametrize("verb", ["update", "save", "delete", "batch"])
@pytest.mark.xfail(
    strict=True,
    raises=TimeoutError,
    reason="the outcomes of a batch are delivered together, those of locked rows with them",
)
async def test_a_locked_row_blocks_only_its_own_change(database: str, verb: str) -> None:
    async with open_store(database) as other, open_store(f"{database}?timeout=10") as store:
        await other.save_entities("templates", [template(each) for each in "abcx"])

        def write(key: str) -> Any:
            if verb == "update":
                return store.update_entity("templates", key, {"n": 1})
            if verb == "save":
                return store.save_entity("templates", template(key, n=1))
            if verb == "delete":
                return store.delete_entity("templates", key)
            return store.save_entities("templates", [template(key, n=1), template(f"{key}2")])

        async with other.begin_transaction() as tx:  # stands for another process
            await tx.update_entity("templates", "x", {"n": 9})
            held = asyncio.create_task(write("x"))
            neighbours = asyncio.gather(write("a"), write("b"))
            try:
                async with asyncio.timeout(3):
                    await neighbours
                    await write("c")
                assert not held.done()
            finally:
                neighbours.cancel()
                late = asyncio.gather(held, return_exceptions=True)
        [ended] = await late
        assert not isinstance(ended, BaseException), ended


async def test_changes_of_other_rows_are_written_while_one_is_locked(database: str) -> None:
    """Their callers wait for the whole batch, but what they wrote is committed."""
    async with open_store(database) as other, open_store(f"{database}?timeout=10") as store:
        await other.save_entities("templates", [template(each) for each in "abcx"])
        connection = await asyncpg.connect(database)
        try:
            async with connection.transaction():
                row = "SELECT 1 FROM \"templates-entities\" WHERE template_id = 'x' FOR UPDATE"
                await connection.execute(row)
                writes = asyncio.gather(
                    *(store.update_entity("templates", each, {"n": 1}) for each in "abcx")
                )
                async with asyncio.timeout(5):
                    while await other.count_entities("templates", {path("n"): 1}) < 3:
                        await asyncio.sleep(0.05)
                assert not writes.done()
            assert await writes == [2, 2, 2, 2]
        finally:
            await connection.close()


async def test_a_single_change_of_a_locked_row_waits_until_its_timeout(
    database: str,
) -> None:
    async with open_store(database) as other, open_store(f"{database}?timeout=0.5") as store:
        await other.save_entity("templates", template("x"))
        async with other.begin_transaction() as tx:
            await tx.update_entity("templates", "x", {"n": 9})
            with pytest.raises(StorageError) as caught:
                await asyncio.create_task(store.update_entity("templates", "x", {"n": 1}))
            assert type(caught.value).__name__ in ("LockTimeoutError", "OperationTimeoutError")
            assert caught.value.retryable
            assert not caught.value.outcome_unknown
        assert await store.update_entity("templates", "x", {"n": 1}) == 3
