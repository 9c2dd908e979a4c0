"""Effects of a change on its neighbours, of cancelled callers, and of unclosed stores."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store import (
    BatchError,
    OperationTimeoutError,
    PermissionDeniedError,
    ProtocolError,
    StorageError,
    and_,
    in_,
    not_,
    or_,
)
from hf_async_store.changes import ABSENT, Put
from hf_async_store.query import MAX_FILTER_DEPTH
from hf_async_store.values import Key
from tests.dynamodb.proxy import WRITES, Answer, Fault, Late, Request
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from hf_async_store_bench.servers import DynamoDBServer
    from tests.dynamodb.proxy import Proxy

AT: Final = "2026-01-01T00:00:00.000000Z"


# -- refused changes -------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["ValidationException", "AccessDeniedException"])
async def test_a_statement_that_makes_the_service_refuse_the_batch(proxy: Proxy, code: str) -> None:
    """Each change has its own outcome: the others are applied, with few requests."""

    def rule(request: Request) -> Fault | None:
        if "poison" in str(request.params) and request.operation in WRITES:
            return Answer(400, {"__type": code, "message": "no"})
        return None

    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "first"})
        proxy.rule = rule
        for verb in ("create", "import"):
            ids = [f"{verb} {n}" for n in range(24)]
            ids.insert(7, f"{verb} poison")
            proxy.requests.clear()
            entities = [{"item_id": each} for each in ids]
            imported = [{**each, "version": 1} for each in entities]
            with pytest.raises(BatchError) as caught:
                await (
                    store.create_entities("items", entities)
                    if verb == "create"
                    else store.import_entities("items", imported)
                )
            outcomes = dict(zip(ids, caught.value.outcomes, strict=True))
            refused = outcomes.pop(f"{verb} poison")
            assert isinstance(refused, ProtocolError | PermissionDeniedError)
            assert not refused.outcome_unknown
            assert set(outcomes.values()) == {1}
            assert len(proxy.requests) < 25, (
                "the batch is split into halves, not into single statements"
            )
        proxy.rule = None
        found = await store.query_entities("items")
        assert len(found) == 49


async def test_an_item_that_is_too_large_for_the_service(proxy: Proxy) -> None:
    """The size is checked before; an item that the service still refuses fails alone."""
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "first"})
        large: Any = {"item_id": "large", "text": "x" * 420_000}
        puts = [
            Put(Key("items", each["item_id"]), each, AT, expect=ABSENT)
            for each in ({"item_id": "a"}, large, {"item_id": "b"})
        ]
        first, refused, third = await store.engine.write_each(puts)
        assert (first, third) == (1, 1)
        assert isinstance(refused, StorageError)
        assert not refused.retryable
        assert await store.get_entity("items", "large") is None


# -- cancelled callers -----------------------------------------------------------------------


async def test_a_cancelled_write_ends_before_the_cancellation_is_raised(
    proxy: Proxy,
) -> None:
    """Contract case 126, for the writes that do not go through the coalescer."""
    async with store_at(proxy.url) as store:
        await store.create_entities("items", [{"item_id": each} for each in "abcdef"])
        works = {
            "a": lambda: store.update_entity(
                "items", "a", {"n": 1}, condition_expression="attribute_exists(item_id)"
            ),
            "b": lambda: store.engine.write_each(
                [Put(Key("items", "b"), {"item_id": "b", "n": 1}, AT, import_version=5)]
            ),
        }
        loop = asyncio.get_running_loop()
        for entity_id, work in works.items():
            sent = asyncio.Event()

            def rule(request: Request, sent: asyncio.Event = sent) -> Fault | None:
                if request.operation not in WRITES:
                    return None
                loop.call_soon_threadsafe(sent.set)
                return Late(0.5)

            proxy.rule = rule
            task: asyncio.Task[Any] = asyncio.create_task(work())  # type: ignore[arg-type]
            await sent.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            proxy.rule = None
            before = await store.get_entity("items", entity_id)
            await asyncio.sleep(0.8)
            assert await store.get_entity("items", entity_id) == before, (
                "the write was applied after the cancellation"
            )


async def test_a_timeout_does_not_wait_for_the_write(proxy: Proxy) -> None:
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "a"})
        proxy.rule = lambda request: Late(2) if request.operation in WRITES else None
        with pytest.raises(OperationTimeoutError) as caught:
            await store.update_entity(
                "items",
                "a",
                {"n": 1},
                condition_expression="attribute_exists(item_id)",
                timeout=0.2,
            )
        assert store._conditional_updates._running, "the caller waited for the write"
        assert caught.value.outcome_unknown
    # Closing waits for it.
    proxy.rule = None


async def test_closing_does_not_wait_for_retries_without_a_caller() -> None:
    """Several callers share the task that looks for a table; it continues when all have given up."""
    loop = asyncio.get_running_loop()
    async with store_at("http://127.0.0.1:1", retry_timeout=60) as store:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await store.count_entities("items")
        started = loop.time()
    assert loop.time() - started < 10, "closing waited for the retries"


async def test_a_failed_read_stops_concurrent_reads_of_the_same_call(proxy: Proxy) -> None:
    async with store_at(proxy.url, retry_timeout=30) as store:
        await store.create_entity("items", {"item_id": "a"})

        def rule(request: Request) -> Fault | None:
            if request.operation != "Scan":
                return None
            if request.params["Segment"] == 2:
                return Answer(400, {"__type": "AccessDeniedException", "message": "no"})
            return Answer(500, {"__type": "InternalServerError", "message": "again"})

        proxy.rule = rule
        with pytest.raises(StorageError):
            await store.query_entities("items")
        await asyncio.sleep(0.3)  # for requests that were already sent
        proxy.requests.clear()
        await asyncio.sleep(1)
        assert not proxy.requests, "other reads continued in the background"


# -- large filters ---------------------------------------------------------------------------


async def test_filters_that_exceed_the_limits_of_a_request(proxy: Proxy) -> None:
    """Conditions that a request cannot contain are evaluated by the store, without an error."""
    deep: Any = {"label": "x"}
    for _ in range(MAX_FILTER_DEPTH // 2):
        deep = not_(not_(deep))
    filters: dict[str, Any] = {
        "many or": or_(*({"label": f"l{n}"} for n in range(120)), {"label": "x"}),
        "many and": and_(*(not_({"label": f"l{n}"}) for n in range(120))),
        "long values": and_({"label": "x"}, *(not_({"kind": f"{n}" * 2_000}) for n in range(60))),
        "deep": deep,
        "in": {"label": in_(["x", *(f"l{n}" for n in range(200))])},
    }
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "a", "label": "x"})
        for name, each in filters.items():
            found = await store.query_entities("items", each)
            assert [one["item_id"] for one in found] == ["a"], name
            assert await store.count_entities("items", each) == 1, name
            fields = ["label", *(f"field number {n}" for n in range(800))]
            assert len(await store.query_entities("items", each, fields=fields)) == 1, name


# -- the end of a process --------------------------------------------------------------------


def _run(server: DynamoDBServer, body: str) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(body).format(
        url=f"dynamodb://us-east-1/{new_prefix()}?endpoint_url={server.endpoint_url}"
    )
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
    )


def test_an_unclosed_store_lets_the_process_end(dynamodb_server: DynamoDBServer) -> None:
    """Contract case 121."""
    done = _run(
        dynamodb_server,
        """
        import asyncio
        from hf_async_store import open_store

        async def main():
            store = await open_store("{url}").open()
            print(await store.create_entity("templates", {{"template_id": "t"}}))
            return store

        store = asyncio.run(main())
        """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"
    assert "ResourceWarning: a DynamoDB store was not closed" in done.stderr
    for noise in ("Unclosed client session", "Unclosed connector", "Traceback", "never retrieved"):
        assert noise not in done.stderr, done.stderr


def test_abandoned_streams_cause_no_output(dynamodb_server: DynamoDBServer) -> None:
    done = _run(
        dynamodb_server,
        """
        import asyncio
        from hf_async_store import open_store

        async def leave(store):
            async for _ in store.stream_entities("templates"):
                break

        async def stay(store):
            async for _ in store.stream_entities("templates"):
                await asyncio.sleep(60)

        async def main():
            async with open_store("{url}") as store:
                rows = [{{"template_id": f"t{{n}}", "x": "y" * 5000}} for n in range(600)]
                await store.create_entities("templates", rows)
                await asyncio.gather(*(leave(store) for _ in range(5)))
                tasks = [asyncio.create_task(stay(store)) for _ in range(5)]
                await asyncio.sleep(0.3)
                for each in tasks:
                    each.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                async for _ in store.stream_entities("templates"):
                    break
            async with open_store("{url}") as store:
                tasks = [asyncio.create_task(store.query_entities("templates")) for _ in range(9)]
                await asyncio.sleep(0.01)
                for each in tasks:
                    each.cancel()
            print("done")

        asyncio.run(main())
        """,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    # On a busy machine, debug mode reports slow callbacks.
    said = [each for each in done.stderr.splitlines() if not each.startswith("Executing <")]
    assert said == []
