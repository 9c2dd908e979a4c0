"""When a cancelled task raises CancelledError, its write has ended."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import pytest

from hf_async_store import open_store
from hf_async_store.changes import ANY
from hf_async_store.values import utc_now

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hf_async_store_bench.servers import PostgresServer

pytestmark = pytest.mark.hf_sampled(by="url")

ROUNDS = 60


def template(name: str, **fields: object) -> dict[str, object]:
    return {"template_id": name, **fields}


async def _transaction(store: Any, n: int) -> None:
    async with store.begin_transaction() as tx:
        await tx.get_entity("templates", "t")
        await tx.update_entity("templates", "t", {"n": n})


async def _nested(store: Any, n: int) -> None:
    async with store.begin_transaction() as tx, tx.begin_transaction() as inner:
        await inner.update_entity("templates", "t", {"n": n})


async def _run(store: Any, n: int) -> None:
    await store.run_transaction(lambda tx: tx.update_entity("templates", "t", {"n": n}))


async def _import(store: Any, n: int) -> None:
    rows = [template("t", n=n, version=n), template("u", n=n, version=1)]
    await store._import_stored("templates", rows)


async def _import_many(store: Any, n: int) -> None:
    rows = [template(f"m{each:03}", n=n, version=1) for each in range(299)]
    await store._import_stored("templates", [*rows, template("t", n=n, version=n)])


async def _sql(store: Any, n: int) -> None:
    await store.execute_with_lock(
        "UPDATE \"templates-entities\" SET version = ? WHERE template_id = 't'", [n]
    )


async def _direct(store: Any, n: int) -> None:
    patch = store._patch(store._schema["templates"], "t", {"n": n}, ANY, utc_now())
    await store.engine.write_each([patch])


VERBS = [_transaction, _nested, _run, _import, _import_many, _sql, _direct]


@pytest.mark.parametrize("verb", VERBS)
async def test_126_nothing_is_applied_after_the_cancellation(
    url: str, verb: Callable[[Any, int], Awaitable[None]]
) -> None:
    # A second store reads, so that its reads do not wait in the queues of the first one.
    async with open_store(url) as store, open_store(url) as other:
        await store.save_entity("templates", template("t"))
        await verb(store, 1)
        landed = 0
        for n in range(2, ROUNDS + 2):
            task = asyncio.ensure_future(verb(store, n))
            if n % 2:
                for _ in range(n // 2 % 12):
                    await asyncio.sleep(0)
            else:
                await asyncio.sleep(random.uniform(0, 0.006))
            task.cancel()
            await asyncio.wait([task])
            at_once = await other.get_entity("templates", "t")
            await asyncio.sleep(0.002)
            later = await other.get_entity("templates", "t")
            assert later == at_once, f"after {n}"
            assert at_once is not None
            landed += n in (at_once.get("n"), at_once["version"])
        assert landed < ROUNDS, "a write that had not begun was applied"


async def test_a_connection_whose_statement_was_cancelled_is_not_used_again(
    postgres_server: PostgresServer,
) -> None:
    """The driver prepares a statement with Flush, which leaves the server in a transaction until the
    statement is executed. If the task is cancelled between the two, the driver knows nothing of it."""
    url = postgres_server.database()
    try:
        async with open_store(url) as store:
            await store.save_entity("templates", {"template_id": "t"})
            engine = cast("Any", store)._sql
            dialect = engine._dialect
            for number, run in enumerate((dialect.rows, dialect.fetch_dicts)):
                prepared = asyncio.Event()
                lease = await engine._main.acquire()
                protocol = lease.driver._protocol
                with mock.patch.object(lease.driver, "_protocol", _Prepared(protocol, prepared)):
                    running = asyncio.create_task(run(lease.driver, f"SELECT {number} + 4711", ()))
                    await prepared.wait()
                    running.cancel()
                    await asyncio.wait([running])
                assert running.cancelled()
                assert not lease.driver.is_in_transaction()
                assert not await engine._main._is_reusable(lease)
                await engine._main.release(lease, check=True)
            assert await store.get_entity("templates", "t") is not None
    finally:
        postgres_server.drop(url)


class _Prepared:
    """The protocol of a connection, which never executes what it has prepared."""

    def __init__(self, protocol: Any, prepared: asyncio.Event) -> None:
        self._protocol = protocol
        self._prepared = prepared

    async def bind_execute(self, *_: object, **__: object) -> None:
        self._prepared.set()
        await asyncio.Event().wait()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol, name)


async def test_a_connection_whose_begin_was_cancelled_is_not_used_again(
    postgres_server: PostgresServer,
) -> None:
    """The server begins the transaction, although the driver does not know it yet. A write on this
    connection would be acknowledged, and never committed."""
    url = postgres_server.database()
    try:
        async with open_store(url) as store:
            await store.save_entity("templates", {"template_id": "t"})
            engine = cast("Any", store)._sql
            dialect = engine._dialect
            for begin in (
                dialect.begin_ddl,
                lambda driver: dialect.begin(driver, None),
                lambda driver: dialect.begin_reading(driver, "many"),
                lambda driver: dialect.read_committed(driver, "SELECT 1", ()),
            ):
                lease = await engine._main.acquire()
                beginning = asyncio.create_task(begin(lease.driver))
                await asyncio.sleep(0)  # BEGIN is sent, and not answered
                beginning.cancel()
                await asyncio.wait([beginning])
                assert not await engine._main._is_reusable(lease)
                await engine._main.release(lease, check=True)
            assert await store.save_entity("templates", {"template_id": "t"}) == 2
        async with open_store(url) as store:
            entity = await store.get_entity("templates", "t")
            assert entity is not None
            assert entity["version"] == 2
    finally:
        postgres_server.drop(url)
