"""Changes of the schema on PostgreSQL, while programs with old and new declarations use the store."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import asyncpg  # type: ignore[import-untyped]  # it has no types
import pytest

from hf_async_store import (
    Collection,
    ConcurrencyConflictError,
    ConfigurationError,
    Field,
    Index,
    PermissionDeniedError,
    ReferenceViolationError,
    TransactionAbortedError,
    UnavailableError,
    gt,
    open_store,
    path,
)
from hf_async_store.query import MISSING
from hf_async_store.sort_bytes import sort_bytes
from tests.contract.harnesses import ask, execute

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_async_store_bench.servers import PostgresServer

pytestmark = pytest.mark.hf_sampled(by="url")

OLD: Final = [Collection("jobs", key="job_id", fields=["owner"], indexes=["owner"])]
NEW: Final = [
    Collection(
        "jobs",
        key="job_id",
        fields=["owner", Field("size", "integer"), Field("created_at", "timestamp")],
        indexes=["owner", Index("owner", "size"), "created_at"],
    )
]
COUNT: Final = 600  # more than two batches
_PAUSE: Final = 0.002  # of a writer, whose writes are to be many and not the load of the machine


def job(number: int, **more: object) -> dict[str, object]:
    return {"job_id": f"j{number:05}", "owner": f"o{number % 3}", "size": number, **more}


async def filled(url: str, count: int = COUNT) -> None:
    async with open_store(url, collections=OLD) as store:
        await store.save_entities("jobs", [job(each) for each in range(count)])


async def kinds(store: Any) -> list[str]:
    return sorted({each.kind for each in await store.engine.schema_changes()})


async def assert_complete(
    url: str, fields: tuple[str, ...] = ("owner", "size", "created_at")
) -> None:
    """Every row has its key columns, and every declared index is valid."""
    connection = await asyncpg.connect(url)
    try:
        columns = ", ".join(f'"{each}-key"' for each in fields)
        # Of a very large table, a part is enough.
        part = 'WHERE random() < 100000.0 / (SELECT 1 + count(*) FROM "jobs-entities")'
        for doc, *keys in await connection.fetch(
            f'SELECT doc::text, {columns} FROM "jobs-entities" {part}'
        ):
            entity = json.loads(doc)
            assert [sort_bytes(entity.get(each, MISSING)) for each in fields] == keys, doc
        invalid = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"
        assert await connection.fetch(invalid) == []
    finally:
        await connection.close()
    async with open_store(url, collections=NEW) as store:
        assert await store.engine.schema_changes() == []
        plan = await store.explain_query("jobs", {"owner": "o1"}, order_by="size", limit=5)
        assert "not ready" not in plan.detail
        if await store.count_entities("jobs") >= COUNT:  # the server reads a small table as a whole
            assert (plan.access, plan.index) == ("index", "owner-size-index")


async def test_an_index_that_is_declared_later_is_built_by_apply_schema(database: str) -> None:
    await filled(database)
    progress: dict[tuple[str, str], list[tuple[int, int | None]]] = {}
    async with open_store(database, collections=NEW) as store:
        wanted = [
            ("add key column", "size"),
            ("add key column", "created_at"),
            ("create index", "owner-size-index"),
            ("create index", "created_at-index"),
        ]
        for _ in range(2):
            changes = await store.engine.schema_changes()
            listed = [(each.kind, each.name) for each in changes if each.kind != "replace view"]
            assert listed == wanted
            assert not any(each.blocking for each in changes)
            await store.save_entity(
                "jobs", job(1)
            )  # it records the declaration, and builds nothing
        plan = await store.explain_query("jobs", {"size": gt(3)})
        assert plan.access == "scan"
        assert "size" in str((await store.health())["schema_changes"])
        slow = await store.query_entities("jobs", {"owner": "o1"}, order_by="-size", limit=7)
        await store.engine.apply_schema(
            progress=lambda change, done, total: progress.setdefault(
                (change.kind, change.name), []
            ).append((done, total))
        )
        assert set(progress) == set(wanted)
        assert (COUNT, COUNT) in progress["add key column", "size"]
        assert await store.engine.schema_changes() == []
        assert slow == await store.query_entities(
            "jobs", {"owner": "o1"}, order_by="-size", limit=7
        )
        await store.engine.apply_schema()  # nothing is left to do
    await assert_complete(database)


async def _in_transaction(store: Any, number: int) -> None:
    async with store.begin_transaction() as tx:
        await tx.save_entity("jobs", job(number, size=-number))
        await tx.update_entity("jobs", f"j{number + 1:05}", {"size": None})


WRITES: Final[dict[str, Callable[[Any, int], Any]]] = {
    "save": lambda store, n: store.save_entity("jobs", job(n, size=-n)),
    "create": lambda store, n: store.create_entity("jobs", job(n + 10_000)),
    "update": lambda store, n: store.update_entity("jobs", f"j{n:05}", {"size": -n}),
    "another field": lambda store, n: store.update_entity("jobs", f"j{n:05}", {"owner": "x"}),
    "replace": lambda store, n: store.modify_entity("jobs", f"j{n:05}", lambda e: {**e, "size": 0}),
    "import": lambda store, n: store.import_entities("jobs", [job(n, size=7, version=9)]),
    "batch": lambda store, n: store.save_entities("jobs", [job(n + m) for m in range(5)]),
    "delete": lambda store, n: store.delete_entity("jobs", f"j{n:05}"),
    "transaction": _in_transaction,
}


@pytest.mark.parametrize("verb", WRITES)
async def test_a_program_with_an_old_declaration_leaves_no_stale_key(
    database: str, verb: str
) -> None:
    write = WRITES[verb]
    await filled(database, 60)
    async with (
        open_store(database, collections=OLD) as old,
        open_store(database, collections=NEW) as new,
    ):
        await write(old, 10)
        await new.engine.apply_schema()
        if verb == "transaction":
            with pytest.raises(ConcurrencyConflictError) as caught:
                await write(old, 20)
            assert caught.value.retryable
        await write(old, 20)
        await write(new, 30)
    await assert_complete(database)


async def test_a_transaction_that_began_before_the_change_fails(database: str) -> None:
    """Its snapshot shows the old catalogue, so the constraint of the table refuses the row."""
    await filled(database, 10)
    others = Collection("others", key="id")
    async with (
        open_store(database, collections=[*OLD, others]) as old,
        open_store(database, collections=NEW) as new,
    ):
        await old.save_entity("others", {"id": "a"})
        applying, write = await _write_late(database, old, new)
        with pytest.raises(TransactionAbortedError) as caught:
            await write
        assert isinstance(caught.value.__cause__, ConcurrencyConflictError)
        assert caught.value.__cause__.retryable
        await applying
        await old.save_entity("jobs", job(1, size=4))
    await assert_complete(database)


async def _write_late(
    url: str, old: Any, new: Any
) -> tuple[asyncio.Task[None], asyncio.Task[None]]:
    """A change of the schema, and a transaction that has begun before it, and writes afterwards."""
    begun = asyncio.Event()

    async def write() -> None:
        async with old.begin_transaction() as tx:
            await tx.get_entity("others", "a")
            begun.set()
            await until(url, "SELECT 1 FROM pg_attribute WHERE attname = 'size-key'")
            with suppress(ConcurrencyConflictError):  # the transaction cannot be used after it
                await tx.save_entity("jobs", job(1, size=4))

    writing = asyncio.create_task(write())
    await begun.wait()
    return asyncio.create_task(new.engine.apply_schema()), writing


async def until(url: str, query: str) -> list[Any]:
    """Wait until a query has a row; returns its first column."""
    async with asyncio.timeout(20):
        while not (found := await asyncio.to_thread(ask, url, query)):
            await asyncio.sleep(0.02)
    return found


# -- interrupted, and several at once -------------------------------------------------------

APPLY: Final = """
import asyncio, os, signal, sys
from hf_async_store import open_store
from hf_async_store.strategies.sql.postgresql import PostgreSQL
from tests.sql.test_postgres_schema import NEW

url, limit = sys.argv[1], int(sys.argv[2])
count = 0

def counted(method):
    async def run(*args):
        global count
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return await method(*args)
    return run

async def main():
    async with open_store(url, collections=NEW) as store:
        await store.get_entity("jobs", "j00001")
        for name in ("rows", "run_unlimited", "commit"):
            setattr(PostgreSQL, name, counted(getattr(PostgreSQL, name)))
        await store.engine.apply_schema()
    print(count)

asyncio.run(main())
"""


async def apply_in_process(url: str, limit: int = 0) -> int | None:
    """Run `apply_schema` in a process that kills itself before a statement; returns how many it ran."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", APPLY, url, str(limit), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    return int(said) if process.returncode == 0 else None


@pytest.mark.parametrize(
    "share",
    [
        *(each / 8 for each in range(8)),
        *(pytest.param(n, marks=pytest.mark.long) for n in range(2, 80)),
    ],
)
async def test_an_apply_that_is_killed_is_completed_by_the_next_one(
    postgres_server: PostgresServer, database: str, share: float
) -> None:
    """At a share of its statements, or before one of them."""
    await filled(database)
    copy = postgres_server.copy(database)
    try:
        total = await apply_in_process(copy)
        await assert_complete(copy)
    finally:
        postgres_server.drop(copy)
    assert total is not None
    limit = int(share * total) + 1 if share < 1 else int(share)
    if limit > total:
        pytest.skip(f"there are only {total} statements")
    assert await apply_in_process(database, limit) is None
    async with (
        open_store(database, collections=OLD) as old,
        open_store(database, collections=NEW) as new,
    ):
        for each in (old, new):
            await each.update_entity("jobs", "j00002", {"size": 5})
            found = await each.query_entities(
                "jobs", {"owner": "o1"}, order_by=path("size"), limit=2
            )
            assert [entity["job_id"] for entity in found] == ["j00001", "j00004"]
        await new.engine.apply_schema()
    await assert_complete(database)


async def test_an_index_whose_build_was_ended_is_rebuilt(database: str) -> None:
    await filled(database, 10)
    async with open_store(database, collections=NEW) as store:
        connection = await asyncpg.connect(database)
        reader = connection.transaction(isolation="repeatable_read")
        await reader.start()
        await connection.fetch("SELECT 1")  # the build waits for its snapshot
        applying = asyncio.create_task(store.engine.apply_schema())
        builds = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONCURRENTLY%'"
        waiting = f"{builds} AND wait_event_type = 'Lock'"
        [pid, *_] = await until(database, waiting)
        await asyncio.to_thread(ask, database, f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(UnavailableError):
            await applying
        assert "rebuild invalid index" in await kinds(store)
        await reader.rollback()
        await connection.close()
        await store.engine.apply_schema()
    await assert_complete(database)


async def test_a_cancelled_apply_leaves_no_lock(database: str) -> None:
    await filled(database, 10)
    async with open_store(database, collections=NEW) as store:
        connection = await asyncpg.connect(database)
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetch("SELECT 1")
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(1):
                        await store.engine.apply_schema()
        await connection.close()
        await store.engine.apply_schema()
    await assert_complete(database)


async def test_several_processes_apply_at_once(database: str) -> None:
    await filled(database)
    results = await asyncio.gather(*(apply_in_process(database) for _ in range(3)))
    assert None not in results
    await assert_complete(database)


@pytest.mark.parametrize(
    "count",
    [
        10_000,
        pytest.param(1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(1800)]),
    ],
)
async def test_an_index_is_built_while_writers_go_on(database: str, count: int) -> None:
    """The longest wait of a write is printed; on a machine that does nothing else it is below 0.2 s."""
    async with open_store(database, collections=OLD) as store:
        for start in range(0, count, 5_000):
            jobs = [job(each, version=1) for each in range(start, start + 5_000)]
            await store.import_entities("jobs", jobs)
    waits: list[float] = []
    written: dict[str, object] = {}
    ended = asyncio.Event()

    async def write(store: Any, lane: int) -> None:
        number = lane
        while not ended.is_set():
            number = (number + 4 * secrets.randbelow(1000)) % count
            entity = job(number, size=secrets.randbelow(1000))
            begun = time.monotonic()
            if number % 3:
                await store.save_entity("jobs", entity)
            else:
                change = {"size": entity["size"]}
                await store.update_entity("jobs", entity["job_id"], change)
            waits.append(time.monotonic() - begun)
            written[str(entity["job_id"])] = entity["size"]
            await asyncio.sleep(_PAUSE)

    async with (
        open_store(database, collections=OLD) as old,
        open_store(database, collections=NEW) as new,
        open_store(database, collections=NEW) as applier,
    ):
        tasks = [asyncio.create_task(write(old if n % 2 else new, n)) for n in range(4)]
        await asyncio.sleep(0.2)
        begun = time.monotonic()
        await applier.engine.apply_schema()
        seconds = time.monotonic() - begun
        await asyncio.sleep(0.2)
        ended.set()
        await asyncio.gather(*tasks)
        longest = max(waits)
        print(  # the figure is the purpose of the long run
            f"{count:,} rows: applied in {seconds:.1f} s beside {len(waits):,} writes, of which the "
            f"longest took {longest * 1000:.0f} ms"
        )
        assert longest < 3, longest
        stored = await new.get_entities("jobs", list(written))
        assert {each["job_id"]: each["size"] for each in stored if each} == written
        assert len(stored) == len(written)
    await assert_complete(database)


async def test_an_apply_waits_for_the_lock_of_a_table_without_blocking_writers(
    database: str,
) -> None:
    await filled(database, 10)
    async with open_store(database, collections=NEW) as store:
        connection = await asyncpg.connect(database)
        async with connection.transaction():
            await connection.execute('UPDATE "jobs-entities" SET version = version WHERE FALSE')
            applying = asyncio.create_task(store.engine.apply_schema())
            for number in range(20):
                await asyncio.wait_for(store.save_entity("jobs", job(number)), 2)
            assert not applying.done()
        await connection.close()
        await applying
    await assert_complete(database)


async def test_rows_that_are_locked_are_filled_later(database: str) -> None:
    await filled(database, 10)
    async with open_store(database, collections=NEW) as store:
        await store.save_entity("jobs", job(3))
        connection = await asyncpg.connect(database)
        changes = connection.transaction()
        progress: list[int] = []
        applying = asyncio.create_task(
            store.engine.apply_schema(progress=lambda change, done, total: progress.append(done))
        )
        # Its lock on the table would keep the columns from being added, so it comes after that.
        await changes.start()
        await until(database, "SELECT 1 FROM pg_attribute WHERE attname = 'size-key'")
        lock = """SELECT 1 FROM "jobs-entities" WHERE job_id = 'j00005' FOR UPDATE"""
        await connection.execute(lock)
        await asyncio.sleep(0.3)
        await changes.rollback()
        await connection.close()
        await applying
    await assert_complete(database)


# -- roles, poolers -------------------------------------------------------------------------


async def test_a_role_without_rights_is_told_the_statement(database: str) -> None:
    await filled(database, 3)
    role = f"writer_{secrets.randbelow(10**9)}"
    execute(
        database,
        f"CREATE ROLE {role} LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC; "
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}",
    )
    url = database.replace("postgres@", f"{role}@")
    try:
        async with open_store(url, collections=OLD) as store:
            assert await store.save_entity("jobs", job(1)) == 2
        other = [*OLD, Collection("others", key="id")]
        async with open_store(url, collections=other) as store:
            with pytest.raises(PermissionDeniedError, match='CREATE TABLE "others-entities"'):
                await store.save_entity("others", {"id": "a"})
        same_view = [Collection("jobs", key="job_id", fields=["owner"], indexes=["created_at"])]
        async with open_store(url, collections=same_view) as store:
            assert await store.save_entity("jobs", job(1)) == 3
            with pytest.raises(PermissionDeniedError, match='ALTER TABLE "jobs-entities"'):
                await store.engine.apply_schema()
    finally:
        execute(database, f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_an_apply_through_a_pooler_is_refused(database: str) -> None:
    await filled(database, 3)
    async with open_store(f"{database}?pgbouncer=yes", collections=NEW) as store:
        with pytest.raises(ConfigurationError, match="pgbouncer"):
            await store.engine.apply_schema()


# -- references -----------------------------------------------------------------------------

PARENTS: Final = Collection("parents", key="id")
UNRELATED: Final = [PARENTS, Collection("children", key="id", fields=["parent"])]
RELATED: Final = [
    PARENTS,
    Collection("children", key="id", fields=[Field("parent", references="parents")]),
]


@pytest.mark.parametrize("applied", [False, True])
async def test_a_reference_that_is_declared_later_holds_in_every_program(
    database: str, applied: bool
) -> None:
    async with (
        open_store(database, collections=UNRELATED) as old,
        open_store(database, collections=RELATED) as new,
    ):
        await old.save_entities("parents", [{"id": each} for each in "abc"])
        await old.save_entity("children", {"id": "orphan", "parent": "nobody"})
        await old.save_entity("children", {"id": "x", "parent": "a"})
        await new.save_entity("children", {"id": "y", "parent": "b"})
        if applied:
            await new.engine.apply_schema()
            columns = "SELECT attname FROM pg_attribute WHERE attname = 'parent-key'"
            assert await asyncio.to_thread(ask, database, columns)
        for store in (old, new):
            for parent in ("a", "b"):
                with pytest.raises(ReferenceViolationError, match="refers to it in parent"):
                    await store.delete_entity("parents", parent)
            with pytest.raises(ReferenceViolationError, match="nobody"):
                await store.save_entity("children", {"id": "z", "parent": "nobody"})
            with pytest.raises(ReferenceViolationError, match="nobody"):
                await store.update_entity("children", "x", {"parent": "nobody"})
            assert not await store.delete_entity("parents", "nobody")
            assert await store.update_entity("children", "orphan", {"n": 1})
            assert await store.save_entity("children", {"id": "orphan", "parent": "nobody"})
        assert await old.delete_entity("parents", "c")


async def _attempt(work: Any) -> bool:
    try:
        await work
    except ReferenceViolationError:
        return False
    return True


@pytest.mark.parametrize("isolation", ["serializable", "repeatable_read", "read_committed"])
@pytest.mark.parametrize("verb", ["delete", "transaction"])
async def test_no_race_breaks_a_reference(database: str, isolation: str, verb: str) -> None:
    if (isolation, verb) == ("repeatable_read", "transaction"):
        pytest.skip("the snapshot of such a transaction may be older than a child: decision 121")
    url = f"{database}?isolation={isolation}"

    async def delete(store: Any, key: str) -> None:
        if verb == "delete":
            await store.delete_entity("parents", key)
            return

        async def body(tx: Any) -> None:
            await tx.get_entity("children", "none")
            await tx.delete_entity("parents", key)

        await store.run_transaction(body)

    async with (
        open_store(url, collections=RELATED) as one,
        open_store(url, collections=RELATED) as other,
    ):
        kept = 0
        for number in range(40):
            key = f"p{number}"
            await one.save_entity("parents", {"id": key})
            child = {"id": f"c{number}", "parent": key}
            saved, deleted = await asyncio.gather(
                _attempt(one.save_entity("children", child)), _attempt(delete(other, key))
            )
            assert (saved, deleted) in ((True, False), (False, True))
            kept += saved
        children = await one.query_entities("children")
        parents = {each["id"] for each in await one.query_entities("parents")}
        assert len(children) == kept
        assert {each["parent"] for each in children} <= parents


@pytest.mark.parametrize("isolation", ["serializable", "repeatable_read", "read_committed"])
@pytest.mark.parametrize("first", ["child", "delete"])
async def test_a_reference_and_a_transaction_that_is_not_committed(
    database: str, isolation: str, first: str
) -> None:
    url = f"{database}?isolation={isolation}"
    child = {"id": "c", "parent": "p"}
    async with (
        open_store(url, collections=RELATED) as one,
        open_store(url, collections=RELATED) as other,
    ):
        await one.save_entity("parents", {"id": "p"})
        await one.save_entity("children", {"id": "other"})
        committed = True
        try:
            async with one.begin_transaction() as tx:
                if first == "child":
                    await tx.save_entity("children", child)
                    work: Any = other.delete_entity("parents", "p")
                else:
                    await tx.delete_entity("parents", "p")
                    work = other.save_entity("children", child)
                second = asyncio.create_task(_attempt(work))
                await asyncio.sleep(0.3)
        except ConcurrencyConflictError:
            assert isolation == "serializable"
            committed = False
        assert await second is not committed
        kept = (first == "child") is committed
        assert (await one.get_entity("children", "c") is not None) is kept
        assert (await one.get_entity("parents", "p") is not None) is kept


async def test_a_view_that_gets_more_columns_keeps_what_depends_on_it(database: str) -> None:
    """A view of another program, and privileges."""
    await filled(database, 3)
    execute(
        database, "CREATE VIEW report AS SELECT owner FROM jobs; GRANT SELECT ON jobs TO PUBLIC"
    )
    async with open_store(database, collections=NEW) as store:
        await store.save_entity("jobs", job(3))
    assert ask(database, "SELECT count(*) FROM report") == ["4"]
    assert ask(database, "SELECT sum(size) FROM jobs") == ["6"]
    granted = "SELECT relacl::text LIKE '%,=r/%' FROM pg_class WHERE relname = 'jobs'"
    assert ask(database, granted) == ["True"]
    execute(database, "DROP VIEW report")
    other = [Collection("jobs", key="job_id", fields=["owner", Field("size", "text")])]
    async with open_store(database, collections=other) as store:  # a column gets another type
        await store.save_entity("jobs", job(4, size="large"))
    assert ask(database, "SELECT max(size) FROM jobs") == ["large"]


@pytest.mark.parametrize("verb", ["get", "delete"])
async def test_a_reference_that_is_declared_during_a_transaction_holds(
    database: str, verb: str
) -> None:
    """The transaction of a program that does not know it began before."""

    def declared(references: str | None) -> list[Collection]:
        owner = Field("owner", references=references)
        return [
            Collection("owners", key="owner_id"),
            Collection("jobs", key="job_id", fields=[owner]),
        ]

    async with open_store(database, collections=declared(None)) as store:
        await store.save_entities("owners", [{"owner_id": each} for each in "ab"])

        async def declare() -> None:
            async with open_store(database, collections=declared("owners")) as other:
                await other.save_entity("jobs", {"job_id": "j", "owner": "a"})

        async def delete() -> None:
            async with store.begin_transaction() as tx:
                if verb == "delete":
                    await tx.delete_entity("owners", "a")
                else:
                    await tx.get_entity("owners", "b")
                await asyncio.create_task(declare())
                await tx.delete_entity("owners", "a")

        with pytest.raises((ConcurrencyConflictError, ReferenceViolationError)):
            await delete()
        assert await store.get_entity("owners", "a") is not None
        with pytest.raises(ReferenceViolationError):
            await store.delete_entity("owners", "a")
