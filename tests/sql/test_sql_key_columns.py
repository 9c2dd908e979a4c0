"""Key columns: the indexes on them, groups of inexact values, and several programs on a store."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_async_store import (
    Collection,
    DiskFullError,
    Field,
    Index,
    ReferenceViolationError,
    StorageError,
    begins_with,
    between,
    exists,
    gt,
    in_,
    lt,
    lte,
    open_store,
    path,
)
from hf_async_store.changes import Put
from hf_async_store.query import build_query
from hf_async_store.strategies.sql.compiler import compile_query
from hf_async_store.strategies.sql.sqlite_writer import SQLiteWriter
from hf_async_store.testing.assertions import typed
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import Key

if TYPE_CHECKING:
    from pathlib import Path

    from hypothesis.strategies import SearchStrategy

pytestmark = pytest.mark.hf_sampled(by="url")

AT = "2026-01-01T00:00:00.000000Z"
BEFORE = Collection("jobs", key="job_id", fields=["owner"])
JOBS = Collection(
    "jobs",
    key="job_id",
    fields=["owner", "status", Field("size", "integer"), Field("due_at", "timestamp"), "place"],
    indexes=[
        Index("owner", "due_at"),
        Index("status", "size", "due_at"),
        Index("place", "job_id"),
        "size",
    ],
)


def job(number: int, **more: object) -> dict[str, Any]:
    return {
        "job_id": f"j{number:04}",
        "owner": f"o{number % 4}",
        "status": ["NEW", "RUNNING"][number % 2],
        "size": number % 7,
        "due_at": f"2026-01-{number % 28 + 1:02}T00:00:00.000000Z",
        "place": f"p{number % 3}",
        **more,
    }


# -- plans ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 10])
@pytest.mark.parametrize("sign", ["", "-"])
@pytest.mark.parametrize(
    ("index", "filters", "order"),
    [
        ("owner-due_at-index", {"owner": "o1"}, ["due_at"]),
        ("owner-due_at-index", {"owner": "o1"}, ["due_at", "job_id"]),
        ("owner-due_at-index", {"owner": "o1", "due_at": gt("2026-01-05")}, ["due_at"]),
        ("owner-due_at-index", {"owner": begins_with("o")}, ["owner", "due_at"]),
        ("owner-due_at-index", {"owner": exists()}, ["owner", "due_at"]),
        ("status-size-due_at-index", {"status": "NEW", "size": 3}, ["due_at"]),
        ("status-size-due_at-index", {"status": "NEW"}, ["size", "due_at"]),
        ("status-size-due_at-index", {"status": "NEW", "size": between(2, 5)}, ["size", "due_at"]),
        ("place-job_id-index", {"place": "p1"}, ["job_id"]),
        ("size-index", {"size": lt(3)}, ["size"]),
    ],
)
async def test_an_index_serves_a_filter_its_order_and_the_limit(
    tmp_path: Path, index: str, filters: dict[str, Any], order: list[str], sign: str, limit: Any
) -> None:
    async with open_store(f"sqlite:{tmp_path}/store.db", collections=[JOBS]) as store:
        await store.save_entities("jobs", [job(n) for n in range(200)])
        keys = [f"{sign}{each}" for each in order]
        plan = await store.explain_query("jobs", filters, keys, limit)
        assert (plan.access, plan.index, plan.sorted_here) == ("index", index, False), plan
        page = await store.query_page("jobs", filters, order_by=keys, limit=3)
        query = build_query(
            JOBS, filters=filters, order_by=keys, limit=3, cursor=page.cursor, paged=True
        )
        plan = await store.engine.explain(query)
        assert (plan.access, plan.index, plan.sorted_here) == ("index", index, False), plan


async def test_many_values_are_one_argument_and_use_the_index(tmp_path: Path) -> None:
    async with open_store(f"sqlite:{tmp_path}/store.db", collections=[JOBS]) as store:
        await store.save_entities("jobs", [job(n) for n in range(100)])
        wanted = [*(f"o{n}" for n in range(2, 20_000)), 7, None, True, 1.5]
        query = build_query(JOBS, filters={path("owner"): in_(wanted)})
        compiled = compile_query(store._sql._state.tables["jobs"], query)  # type: ignore[attr-defined]
        assert len(compiled.args) == 1
        assert (await store.engine.explain(query)).index == "owner-due_at-index"
        assert await store.count_entities("jobs", {path("owner"): in_(wanted)}) == 50


# -- groups of inexact values ---------------------------------------------------------------

LONG = "x" * 300
values: SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, 1.5, 2.0, -0.5, 1e300]),
    st.sampled_from(
        ["", "a", "b", "é", "a" * 254, "a" * 255, "a" * 256, LONG, LONG + "a", LONG + "é"]
    ),
    st.sampled_from([[], [1], [1, 2], ["a"], {}, {"a": 1}, {"a": 2}, {"b": None}]),
)
entities = st.lists(
    st.fixed_dictionaries({}, optional={"a": values, "b": values, "c": values}), max_size=14
)
orders = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", "job_id"]), st.sampled_from(["", "-"])),
    min_size=1,
    max_size=3,
    unique_by=lambda each: each[0],
).map(lambda keys: [sign + name for name, sign in keys])
OPEN = Collection(
    "jobs",
    key="job_id",
    fields=[Field(each, "json") for each in "abc"],
)
INDEXED = Collection(
    "jobs", key="job_id", fields=["a", "b", Field("c", "json")], indexes=[Index("a", "b"), "b"]
)


async def test_groups_are_sorted_and_pages_continue_in_them(url: str) -> None:
    """The same as the engine in memory answers, with a limit of 1 to 3."""
    store = open_store(url, collections=[INDEXED])
    reference = open_store("memory:", collections=[OPEN])
    async with store, reference:
        found: list[tuple[Any, Any]] = []

        @given(entities, orders, st.integers(1, 3), values)
        @settings(max_examples=repetitions(60), database=None, deadline=None)
        def gather(rows: list[dict[str, Any]], order: list[str], limit: int, operand: Any) -> None:
            found.append((rows, (order, limit, operand)))

        gather()
        for rows, (order, limit, operand) in found:
            listed = [{**row, "job_id": f"j{n}"} for n, row in enumerate(rows)]
            puts = [Put(Key("jobs", each["job_id"]), each, AT) for each in listed]
            for each in (store, reference):
                ids = [e["job_id"] for e in await each.query_entities("jobs")]
                await each.delete_entities("jobs", ids)
                assert all(type(o) is int for o in await each.engine.write_each(puts))
            cursor = expected = None
            while True:
                page = await store.query_page("jobs", order_by=order, limit=limit, cursor=cursor)
                wanted = await reference.query_page(
                    "jobs", order_by=order, limit=limit, cursor=expected
                )
                assert typed(page.items) == typed(wanted.items), (listed, order)
                cursor, expected = page.cursor, wanted.cursor
                if cursor is None or expected is None:
                    assert cursor is expected
                    break
            assert await streamed(store, order) == await streamed(reference, order)
            if type(operand) is str:
                for filters in ({"a": operand}, {"a": lte(operand)}, {"b": begins_with(operand)}):
                    assert await ids_of(store, filters) == await ids_of(reference, filters)


async def streamed(store: Any, order: list[str]) -> list[str]:
    return [each["job_id"] async for each in store.stream_entities("jobs", order_by=order)]


async def ids_of(store: Any, filters: Any) -> list[str]:
    found = await store.query_entities("jobs", filters, order_by="-a", limit=5)
    return [each["job_id"] for each in found]


async def test_a_limit_within_a_group_is_in_the_statement(tmp_path: Path) -> None:
    async with open_store(f"sqlite:{tmp_path}/store.db", collections=[JOBS]) as store:
        await store.save_entities("jobs", [job(n, owner=f"{LONG}{n % 9}") for n in range(50)])
        query = build_query(JOBS, order_by=["owner", "due_at"], limit=5)
        compiled = compile_query(store._sql._state.tables["jobs"], query)  # type: ignore[attr-defined]
        assert compiled.limited
        assert compiled.sql.endswith("LIMIT 5")
        found = await store.query_entities("jobs", order_by=["owner", "due_at"], limit=5)
        wanted = sorted((job(n, owner=f"{LONG}{n % 9}") for n in range(50)), key=sort_key)[:5]
        assert [each["job_id"] for each in found] == [each["job_id"] for each in wanted]


def sort_key(entity: dict[str, Any]) -> tuple[str, ...]:
    return entity["owner"], entity["due_at"], entity["job_id"]


# -- several programs -----------------------------------------------------------------------


async def test_an_index_of_another_program_is_filled_by_every_program(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path}/store.db"
    async with open_store(url, collections=[BEFORE]) as old:
        await old.save_entities("jobs", [job(n) for n in range(20)])
        async with open_store(url, collections=[JOBS]) as new:
            assert [each.kind for each in await new.engine.schema_changes()][-1:] == [
                "replace view"
            ]
            await new.save_entity("jobs", job(20))
            assert await new.engine.schema_changes() == []
            # The old program was opened before the new columns existed.
            await old.save_entities("jobs", [job(n) for n in range(21, 40)])
            await old.update_entity("jobs", "j0003", {"status": "DONE", "size": 99})
            async with old.begin_transaction() as tx:
                await tx.save_entity("jobs", job(40, status="DONE"))
                await tx.update_entity("jobs", "j0004", {"status": "DONE"})
            await old.import_entities("jobs", [{**job(41, status="DONE"), "version": 7}])
            plan = await new.explain_query("jobs", {"status": "DONE"}, "size")
            assert plan.index == "status-size-due_at-index"
            found = await new.query_entities("jobs", {"status": "DONE"}, order_by="size")
            assert [each["job_id"] for each in found] == ["j0004", "j0040", "j0041", "j0003"]
            assert await new.count_entities("jobs", {"size": 99}) == 1


async def test_apply_schema_reports_what_it_adds(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path}/store.db"
    async with open_store(url, collections=[BEFORE]) as old:
        await old.save_entities("jobs", [job(n) for n in range(5)])
    async with open_store(url, collections=[JOBS, TEAMS]) as new:
        planned = await new.engine.schema_changes()
        health = await new.engine.health()  # that of the store begins with a write
        assert "create index" in str(health["schema_changes"])
        plan = await new.explain_query("jobs", {"owner": "o1"})
        assert (plan.access, "owner-due_at-index" in plan.detail) == ("scan", True)
        reported: list[Any] = []
        await new.engine.apply_schema(progress=lambda *change: reported.append(change))
        assert reported == [(each, 1, 1) for each in planned]
        kinds = {each.kind for each in planned}
        assert kinds == {"add key column", "create index", "replace view", "create table"}
        assert all(each.blocking for each in planned if each.kind.endswith(("column", "index")))
        assert await new.engine.schema_changes() == []
        assert (await new.explain_query("jobs", {"owner": "o1"})).index == "owner-due_at-index"


async def test_a_transaction_begins_with_the_columns_of_another_program(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path}/store.db"
    async with open_store(url, collections=[BEFORE]) as old:
        await old.save_entity("jobs", job(1))
        async with open_store(url, collections=[JOBS]) as new:
            await new.save_entity("jobs", job(2))
            async with old.begin_transaction() as tx:
                await tx.update_entity("jobs", "j0001", {"size": 50})
                found = await tx.query_entities("jobs", {path("size"): 50})
                assert [each["job_id"] for each in found] == ["j0001"]
            assert await new.count_entities("jobs", {"size": gt(49)}) == 1


TEAMS = Collection("teams", key="team_id")
MEMBERS = Collection("members", key="member_id", fields=[Field("team_id", references="teams")])
PLAIN = Collection("members", key="member_id", fields=[Field("team_id", "json")])


async def test_a_reference_of_another_program_is_enforced(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path}/store.db"
    async with (
        open_store(url, collections=[TEAMS]) as old,
        open_store(url, collections=[TEAMS, PLAIN]) as other,
    ):
        await old.save_entity("teams", {"team_id": "t"})
        await other.save_entity("members", {"member_id": "early", "team_id": "nobody"})
        async with open_store(url, collections=[TEAMS, MEMBERS]) as new:
            await new.save_entity("members", {"member_id": "m", "team_id": "t"})
        with pytest.raises(ReferenceViolationError, match="'m' refers to it in team_id"):
            await old.delete_entity("teams", "t")
        with pytest.raises(ReferenceViolationError):
            await other.save_entity("members", {"member_id": "n", "team_id": "nobody"})
        await other.update_entity("members", "early", {"name": "x"})  # its reference stays
        await other.delete_entity("members", "m")
        assert await old.delete_entity("teams", "t")


async def test_a_reference_to_a_long_id(url: str) -> None:
    async with open_store(url, collections=[TEAMS, MEMBERS]) as store:
        await store.save_entities("teams", [{"team_id": f"{LONG}{each}"} for each in "ab"])
        await store.save_entity("members", {"member_id": "m", "team_id": f"{LONG}a"})
        assert await store.delete_entity("teams", f"{LONG}b")
        with pytest.raises(ReferenceViolationError):
            await store.delete_entity("teams", f"{LONG}a")


async def test_two_programs_with_different_collections(url: str) -> None:
    async with (
        open_store(url, collections=[JOBS]) as one,
        open_store(url, collections=[TEAMS]) as other,
    ):
        await one.save_entity("jobs", job(1))
        await other.save_entity("teams", {"team_id": "t"})
        await one.save_entity("jobs", job(2))
        for store in (one, other):
            found = await store.engine.declarations()
            assert [each.name for each in found] == ["jobs", "teams"]
            assert found[0].indexes == JOBS.indexes
        assert await one.engine.undeclared() == ["teams"]


async def test_programs_with_contrary_declarations_do_not_change_the_catalogue_in_turns(
    url: str,
) -> None:
    text, number = (Collection("jobs", key="job_id", fields=[Field("x", each)]) for each in KINDS)
    async with open_store(url, collections=[text]) as one:
        async with open_store(url, collections=[number]) as other:
            await one.save_entity("jobs", {"job_id": "a", "x": "1"})
            await other.save_entity("jobs", {"job_id": "b", "x": 1})
            recorded = (await one.engine.declarations())[0].fields["x"].type
            assert recorded == "integer", "the latest"
            before = await generation(one)
            for n in range(3):
                await one.save_entity("jobs", {"job_id": "a", "x": str(n)})
                await other.save_entity("jobs", {"job_id": "b", "x": n})
            assert await generation(one) == before


KINDS: tuple[Any, Any] = ("text", "integer")


async def generation(store: Any) -> str:
    sql = "SELECT value FROM hf_catalogue WHERE name = 'generation'"
    return str((await store.execute_with_lock(sql))[0]["value"])


# -- values of other programs, and failures -------------------------------------------------


async def test_numbers_in_any_spelling_are_found(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    async with open_store(f"sqlite:{file}", collections=[BEFORE]) as store:
        await store.save_entity("jobs", {"job_id": "a"})
        connection = sqlite3.connect(file)
        doc = '{"job_id": "a", "size": 1.0e+20, "one": 1.00, "text": "\\u0061", "few": [1.0, 2]}'
        connection.execute('UPDATE "jobs-entities" SET doc = ?', (doc,))
        connection.commit()
        connection.close()
        for name, value in (("size", 1e20), ("size", 10**18 * 100.0), ("one", 1), ("text", "a")):
            assert await store.count_entities("jobs", {path(name): value}) == 1, name
            assert await store.count_entities("jobs", {path(name): in_([value, 7])}) == 1
        assert await store.count_entities("jobs", {path("few"): [1, 2]}) == 1


async def test_what_a_half_of_a_batch_wrote_is_not_reported_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "store.db"
    async with open_store(f"sqlite:{file}", collections=[BEFORE]) as store:
        await store.save_entity("jobs", {"job_id": "first"})
        connection = sqlite3.connect(file)
        connection.execute(
            "CREATE TRIGGER no BEFORE INSERT ON \"jobs-entities\" WHEN NEW.job_id = 'j3' "
            "BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
        connection.close()
        decided = SQLiteWriter._decided

        def failing(self: SQLiteWriter, connection: Any, changes: Any) -> Any:
            if changes[0].key.id == "j2":
                raise DiskFullError("the disk is full")
            return decided(self, connection, changes)

        monkeypatch.setattr(SQLiteWriter, "_decided", failing)
        puts = [Put(Key("jobs", f"j{n}"), {"job_id": f"j{n}"}, AT) for n in range(4)]
        outcomes = await store.engine.write_each(puts)
        assert outcomes[:2] == [1, 1]
        assert [type(each) for each in outcomes[2:]] == [DiskFullError, DiskFullError]
        monkeypatch.undo()
        assert await store.count_entities("jobs") == 3
        with pytest.raises(StorageError):
            await store.save_entity("jobs", {"job_id": "j3"})
