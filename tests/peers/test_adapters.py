"""Each adapter in docs/examples does its main job, where its project is installed.

`make test-peers` installs them, and also runs the suites of the projects.
"""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from importlib import import_module
from logging import getLogger
from pathlib import Path
from random import Random
from typing import Any

import pytest

from hf_async_store import UniqueViolationError, open_store

DOCS = str(Path(__file__).parents[2] / "docs")


def adapter(name: str, *requirements: str) -> Any:
    for each in requirements:
        pytest.importorskip(each, reason=f"{each} is not installed; see docs/adapters.md")
    if DOCS not in sys.path:
        sys.path.append(DOCS)
    return import_module(f"examples.{name}")


async def test_key_values(tmp_path: Path) -> None:
    module = adapter("key_value_store", "key_value.aio")
    async with module.EntityKeyValueStore(f"sqlite:{tmp_path}/s.db") as values:
        await values.put("ada", {"n": 1}, collection="sessions", ttl=60)
        assert await values.get("ada", collection="sessions") == {"n": 1}
        assert await values.get("ada") is None
        assert await values.collections() == ["sessions"]
        assert await values.delete("ada", collection="sessions")


async def test_rate_limits() -> None:
    module = adapter("rate_limit_storage", "limits.aio")
    from limits import parse
    from limits.aio import strategies

    async with open_store("memory:", collections=module.COLLECTIONS) as store:
        for kind in ("FixedWindow", "MovingWindow", "SlidingWindowCounter"):
            limiter = getattr(strategies, f"{kind}RateLimiter")(module.EntityStorage(store=store))
            hits = [await limiter.hit(parse("2/hour"), kind) for _ in range(3)]
            assert hits == [True, True, False]


async def test_rate_limits_count_as_those_of_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same hits at the same times have the same answers as of its own memory."""
    module = adapter("rate_limit_storage", "limits.aio")
    from limits import RateLimitItemPerSecond
    from limits.aio import strategies
    from limits.aio.storage import MemoryStorage

    random = Random(17)
    now = 1_800_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    async with open_store(
        "memory:",
        collections=module.COLLECTIONS,
        clock=lambda: datetime.fromtimestamp(now, UTC),
    ) as store:
        for kind in ("FixedWindow", "MovingWindow", "SlidingWindowCounter"):
            limiter = getattr(strategies, f"{kind}RateLimiter")
            own, ours = limiter(MemoryStorage()), limiter(module.EntityStorage(store=store))
            limit = RateLimitItemPerSecond(5, 2)
            for step in range(400):
                now += random.uniform(0, random.choice((0.1, 0.5, 5)))
                verb, cost = random.choice(("hit", "hit", "test")), random.choice((1, 2, 6))
                expected = await getattr(own, verb)(limit, "ada" * 400, cost=cost)
                assert await getattr(ours, verb)(limit, "ada" * 400, cost=cost) == expected, step
                if kind == "SlidingWindowCounter":
                    stats = await own.get_window_stats(limit, "ada" * 400)
                    found = await ours.get_window_stats(limit, "ada" * 400)
                    assert found == pytest.approx(stats), step


async def test_users() -> None:
    module = adapter("users_database", "fastapi_users")
    async with open_store("memory:", collections=module.COLLECTIONS) as store:
        users = module.EntityUserDatabase(store, module.User)
        ada = await users.create({"email": "Ada@example.com", "hashed_password": "x"})
        with pytest.raises(UniqueViolationError):
            await users.create({"email": "ada@EXAMPLE.com", "hashed_password": "x"})
        account = {"oauth_name": "a", "access_token": "t", "account_id": "1", "account_email": "e"}
        await users.add_oauth_account(ada, account)
        found = await users.get_by_oauth_account("a", "1")
        assert found.id == ada.id
        tokens = module.EntityAccessTokenDatabase(store)
        token = await tokens.create({"token": "t", "user_id": ada.id})
        assert await tokens.get_by_token("t", token.created_at + timedelta(seconds=1)) is None
        await users.delete(ada)
        assert await tokens.get_by_token("t") is None


async def test_scheduler() -> None:
    module = adapter("scheduler_data_store", "apscheduler.abc")
    from apscheduler import Job, JobOutcome, JobResult, Task
    from apscheduler.eventbrokers.local import LocalEventBroker

    async with AsyncExitStack() as stack:
        broker, data_store = LocalEventBroker(), module.EntityDataStore("memory:")
        await broker.start(stack, getLogger())
        await data_store.start(stack, broker, getLogger())
        task = Task(id="t", func="builtins:print", job_executor="async", max_running_jobs=2)
        await data_store.add_task(task)
        keep = timedelta(minutes=1)
        for _ in range(3):
            job = Job(task_id="t", executor="async", result_expiration_time=keep)
            await data_store.add_job(job)
        first = await data_store.acquire_jobs("w-1", keep, 1)
        second = await data_store.acquire_jobs("w-2", keep)
        assert len({each.id for each in first + second}) == 2  # of three, as the task permits
        result = JobResult.from_job(first[0], JobOutcome.success, return_value=7)
        await data_store.release_job("w-1", first[0], result)
        assert (await data_store.get_job_result(first[0].id)).return_value == 7
        assert (await data_store.get_task("t")).running_jobs == 1


async def test_checkpoints() -> None:
    module = adapter("langgraph_saver", "langgraph.checkpoint.base")
    from langgraph.checkpoint.base import empty_checkpoint

    async with open_store("memory:", collections=module.COLLECTIONS) as store:
        saver = module.EntitySaver(store)
        thread = {"configurable": {"thread_id": "ada", "checkpoint_ns": ""}}
        config = await saver.aput(thread, empty_checkpoint(), {"step": 1}, {})
        await saver.aput_writes(config, [("channel", b"value")], "task")
        [found] = [each async for each in saver.alist(None, filter={"step": 1})]
        assert found == await saver.aget_tuple(thread)
        assert found.pending_writes == [("task", "channel", b"value")]
        long = {"configurable": {"thread_id": "ada" * 400, "checkpoint_ns": ""}}
        config = await saver.aput(long, empty_checkpoint(), {}, {})
        assert (await saver.aget_tuple(long)).config == config


async def test_memories() -> None:
    module = adapter("langgraph_store", "langgraph.store.base")
    now = datetime(2030, 1, 1, tzinfo=UTC)
    async with open_store("memory:", collections=module.COLLECTIONS, clock=lambda: now) as entities:
        store = module.EntityMemoryStore(entities)
        await store.aput(("users", "ada"), "drink", {"likes": "tea"})
        [found] = await store.asearch(("users",), filter={"likes": {"$ne": "coffee"}})
        assert (found.namespace, found.key, found.updated_at) == (("users", "ada"), "drink", now)
        assert await store.alist_namespaces(suffix=("*",)) == [("users", "ada")]
        await store.aput(("users", "ada"), "drink" * 300, {"likes": "mate"})
        assert (await store.aget(("users", "ada"), "drink" * 300)).value == {"likes": "mate"}
