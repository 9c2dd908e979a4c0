"""Streams, the connection pool, and closing a store or ending a process during streams."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from hf_async_store import (
    AlreadyExistsError,
    Collection,
    ConcurrencyConflictError,
    PoolTimeoutError,
    StoreClosedError,
    contains,
    open_store,
    path,
)
from hf_async_store.strategies.sql import connections
from tests.contract.harnesses import ask

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.hf_sampled(by="url")

PARENTS = Collection("parents", key="id", fields=["kind"], indexes=["kind"])
CHILDREN = Collection("children", key="id", fields=["parent"], indexes=["parent"])


def sessions(url: str) -> list[str]:
    """The connections of this process that the server still has."""
    name = urlsplit(url).path[1:]
    query = f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}' AND pid <> pg_backend_pid()"
    for _ in range(60):
        found = ask(url.replace(f"/{name}", "/postgres"), query)
        if not found:
            break
        time.sleep(0.05)
    return found


async def nothing_left(url: str) -> None:
    if url.startswith("sqlite"):
        for _ in range(60):
            left = [each for each in threading.enumerate() if each.name == "sqlite"]
            if not left:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(left)
    assert await asyncio.to_thread(sessions, url) == []


@pytest.mark.parametrize("width", [1, 16, 32])
async def test_136_a_query_inside_the_body_of_a_stream(url: str, width: int) -> None:
    collections = [PARENTS, CHILDREN]
    async with open_store(f"{url}?pool_size=2&max_overflow=2", collections=collections) as store:
        await store.save_entities("parents", [{"id": f"p{n}", "kind": "k"} for n in range(6)])
        await store.save_entities(
            "children", [{"id": f"c{n}", "parent": f"p{n % 6}"} for n in range(12)]
        )
        ready = asyncio.Barrier(width)

        async def one() -> int:
            found = 0
            async for each in store.stream_entities("parents", {"kind": "k"}, order_by="-id"):
                if not found:
                    await ready.wait()  # all streams are open
                found += len(await store.query_entities("children", {"parent": each["id"]}))
                found += await store.count_entities("children", {"parent": each["id"]})
                found += len((await store.query_page("children", limit=1)).items)
                assert await store.get_entity("parents", each["id"]) is not None
            return found

        async with asyncio.timeout(100):
            assert await asyncio.gather(*(one() for _ in range(width))) == [30] * width
    await nothing_left(url)


async def test_136_one_stream_too_many_fails_immediately(url: str) -> None:
    async with open_store(f"{url}?max_streams=3") as store:
        await store.save_entity("templates", {"template_id": "t"})
        streams = [store.stream_entities("templates") for _ in range(3)]
        for each in streams:
            await anext(each)
        with pytest.raises(PoolTimeoutError, match="max_streams"):
            async with asyncio.timeout(5):
                await anext(store.stream_entities("templates"))
        # A result that is read at once does not count as a stream.
        assert len(await store.query_entities("templates")) == 1
        await streams[0].aclose()
        assert len([each async for each in store.stream_entities("templates")]) == 1
        for each in streams:
            await each.aclose()


LEAVING = ["break", "cancel", "cancel and wait", "raise", "keep", "drop"]


@pytest.mark.parametrize("how", LEAVING)
async def test_136_a_store_closes_in_the_middle_of_streams(
    url: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    kept: list[Any] = []
    for turns in range(8):
        async with open_store(url) as store:
            await store.save_entities(
                "templates", [{"template_id": f"t{n}", "pad": "x" * 200} for n in range(700)]
            )
            begun = 0

            async def look(store: Any) -> None:
                nonlocal begun
                stream = store.stream_entities("templates")
                if how in ("keep", "drop"):
                    await anext(stream)
                    begun += 1
                    if how == "keep":
                        kept.append(stream)
                    return
                async for _ in stream:
                    begun += 1
                    if how == "break":
                        break
                    if how == "raise":
                        raise LookupError
                    await asyncio.sleep(0)

            tasks = [asyncio.create_task(look(store)) for _ in range(4)]
            while begun < 4:
                await asyncio.sleep(0)
            if how.startswith("cancel"):
                for each in tasks:
                    each.cancel()
            if how != "cancel":
                await asyncio.gather(*tasks, return_exceptions=True)
            for _ in range(turns):
                await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
    for each in kept:
        with pytest.raises(StoreClosedError):
            [_ async for _ in each]
    kept.clear()
    for _ in range(10):
        await asyncio.sleep(0)
    assert told == []
    assert caplog.records == []
    await nothing_left(url)


async def test_136_a_store_closes_after_its_tasks_were_cancelled(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    for turns in range(30):
        async with open_store(url) as store:
            await store.save_entities(
                "templates", [{"template_id": f"t{n}", "note": "y" * 100} for n in range(50)]
            )

            async def work(store: Any, number: int) -> None:
                while True:
                    if number % 3 == 0:
                        await store.query_entities("templates", {path("note"): contains("z")})
                    elif number % 3 == 1:
                        # On PostgreSQL two of these tasks may conflict.
                        with suppress(ConcurrencyConflictError):
                            async with store.begin_transaction() as tx:
                                await tx.get_entity("templates", "t1")
                                await tx.save_entity("templates", {"template_id": "t1"})
                    else:
                        await store.save_entity("templates", {"template_id": f"u{number}"})

            tasks = [asyncio.create_task(work(store, n)) for n in range(6)]
            for _ in range(turns * 2):
                await asyncio.sleep(0)
            for each in tasks:
                each.cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(found, asyncio.CancelledError | StoreClosedError), repr(found)
    assert told == []
    assert caplog.records == []
    await nothing_left(url)


# -- connections beyond the pool -------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["reads", "transactions that fail"])
async def test_connections_of_a_burst_are_kept_for_a_while(
    url: str, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(connections, "_IDLE_SECONDS", 0.4)
    async with open_store(f"{url}?pool_size=2&max_overflow=8") as store:
        await store.save_entity("templates", {"template_id": "t"})
        pool = store._sql._main  # type: ignore[attr-defined]
        connect, opened = store._sql._dialect.connect, 0  # type: ignore[attr-defined]

        async def counted(*args: Any, **named: Any) -> Any:
            nonlocal opened
            opened += 1
            return await connect(*args, **named)

        monkeypatch.setattr(store._sql._dialect, "connect", counted)  # type: ignore[attr-defined]

        async def refused() -> None:
            with pytest.raises(AlreadyExistsError):
                async with store.begin_transaction() as tx:
                    await tx.create_entity("templates", {"template_id": "t"})

        async def burst() -> None:
            one = refused if fails else partial(store.count_entities, "templates")
            await asyncio.gather(*(one() for _ in range(8)))

        await burst()
        for _ in range(10):
            await burst()
        assert opened <= 10, "each call opened a connection"
        async with asyncio.timeout(20):
            while pool.figures()["open"] > 2:
                await asyncio.sleep(0.05)
        # Connections in constant use are kept.
        assert pool.figures()["open"] >= 1
        await burst()
    await nothing_left(url)


# -- the end of a process --------------------------------------------------------------------

UNCLOSED = """
import asyncio, sys
from hf_async_store import open_store
async def main():
    store = await open_store(sys.argv[1]).open()
    tasks = []
    for n in range(20):
        await store.save_entity("templates", {"template_id": f"t{n}"})
        print(n, flush=True)
    if sys.argv[2] == "in the middle":
        stream = store.stream_entities("templates")
        await anext(stream)
        async def on():
            while True:
                await store.save_entity("templates", {"template_id": "more"})
        tasks.append(asyncio.create_task(on()))
        tasks.append(asyncio.create_task(store.run_transaction(lambda tx: asyncio.sleep(3600))))
        await asyncio.sleep(0.05)
    if sys.argv[2] == "error":
        raise RuntimeError("the service fails")
    if sys.argv[2] == "exit":
        sys.exit(3)
asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["return", "error", "exit", "in the middle"])
async def test_121_an_unclosed_store_lets_the_process_end(url: str, how: str) -> None:
    command = [sys.executable, "-X", "dev", "-c", UNCLOSED, url, how]
    started = time.monotonic()
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
    )
    assert time.monotonic() - started < 50
    assert done.returncode == {"error": 1, "exit": 3}.get(how, 0), done.stderr
    assert "ResourceWarning" in done.stderr
    assert "a store was not closed" in done.stderr
    assert "Exception in thread" not in done.stderr
    assert "Fatal Python error" not in done.stderr
    acknowledged = done.stdout.split()
    assert len(acknowledged) == 20
    async with open_store(url) as store:
        for each in acknowledged:
            assert await store.get_entity("templates", f"t{each}") is not None
    if url.startswith("sqlite"):
        path = url.removeprefix("sqlite:")
        connection = sqlite3.connect(path)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        connection.close()


QUIET = """
import asyncio, sys
from hf_async_store import open_store
async def main():
    async with open_store(sys.argv[1]) as s:
        await s.save_entities("templates", [{"template_id": f"t{i}", "pad": "x" * 500} for i in range(700)])
        async def look():
            async for _ in s.stream_entities("templates"):
                break
        async def forever():
            while True:
                async for _ in s.stream_entities("templates"):
                    await asyncio.sleep(0)
        async def held():
            stream = s.stream_entities("templates")
            await anext(stream)
            streams.append(stream)
        streams = []
        await asyncio.gather(*(look() for _ in range(4)), held())
        tasks = [asyncio.create_task(forever()) for _ in range(4)]
        await asyncio.sleep(0.05)
        for each in tasks:
            each.cancel()
asyncio.run(main())
"""


def test_136_abandoned_streams_cause_no_output(url: str) -> None:
    command = [sys.executable, "-X", "dev", "-c", QUIET, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = [each for each in done.stderr.splitlines() if not each.startswith("Executing <")]
    assert (done.returncode, said) == (0, [])
