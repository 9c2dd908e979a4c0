"""Change feeds in a live migration: each belongs to one store, so a watch ends with the switch."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from hf_async_store import (
    Collection,
    ConfigurationError,
    EntityNotFoundError,
    FeedExpiredError,
    InvalidCursorError,
    open_store,
)
from hf_async_store.migration.live import LiveMigration

if TYPE_CHECKING:
    from pathlib import Path

JOBS = [Collection("jobs", key="job_id", fields=["status"], feed=3600)]
_SECONDS = 20.0

PAIRS = [("json:a.json", "sqlite:b.db"), ("sqlite:b.db", "json:a")]


@pytest.mark.parametrize(("source", "target"), PAIRS)
async def test_110_a_watch_ends_at_the_switch(
    source: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with (
        open_store(source, collections=JOBS, follow_moves=[target]) as store,
        LiveMigration(source, target, collections=JOBS) as move,
    ):
        await store.create_entity("jobs", {"job_id": "a", "status": "new"})
        async with store.watch("jobs") as changes, store.subscribe("copy", "jobs") as subscribed:
            await move.start(cut_over=False)
            await store.update_entity("jobs", "a", {"status": "running"})
            async with asyncio.timeout(_SECONDS):
                change = await anext(changes)
                assert (change.id, change.version) == ("a", 2)
                assert (await anext(subscribed)).token
            await subscribed.advance(change)
            waiting = asyncio.create_task(
                store.wait_for("jobs", "a", {"status": "done"}, timeout=_SECONDS)
            )
            watching = asyncio.create_task(anext(changes))
            await move.start()
            async with asyncio.timeout(_SECONDS):
                with pytest.raises(FeedExpiredError):
                    await watching
        for token in (change.token, changes.token):
            with pytest.raises(FeedExpiredError):
                async with store.watch("jobs", since=token) as changes:
                    await anext(changes)
        with pytest.raises(FeedExpiredError):
            async with store.subscribe("copy", "jobs") as subscribed:
                await anext(subscribed)
        # From now on, the feed is that of the target.
        async with store.watch("jobs") as changes:
            token = changes.token
            await store.update_entity("jobs", "a", {"status": "done"})
            async with asyncio.timeout(_SECONDS):
                assert (await anext(changes)).version == 3
        assert (await waiting)["version"] == 3
        async with store.watch("jobs", since=token) as changes:
            async with asyncio.timeout(_SECONDS):
                assert (await anext(changes)).version == 3
        await move.finalize()
        await asyncio.sleep(2.1)  # until the phase is read again
        async with store.watch("jobs", since=token) as changes, asyncio.timeout(_SECONDS):
            assert (await anext(changes)).version == 3
    async with open_store(target, collections=JOBS) as store:
        with pytest.raises(InvalidCursorError):
            async with store.watch("jobs", since=change.token) as changes:
                await anext(changes)
        with pytest.raises(InvalidCursorError):
            async with store.subscribe("copy", "jobs") as subscribed:
                await anext(subscribed)
        with pytest.raises(EntityNotFoundError):
            await store.wait_for("jobs", "b", timeout=_SECONDS)


async def test_110_after_a_rollback_the_feed_has_what_was_copied_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, target = PAIRS[0]
    async with (
        open_store(source, collections=JOBS, follow_moves=[target]) as store,
        LiveMigration(source, target, collections=JOBS) as move,
    ):
        async with store.watch("jobs") as changes:
            before = changes.token
        await move.start()
        async with store.watch("jobs") as changes:
            between = changes.token
        await store.create_entity("jobs", {"job_id": "a"})
        await store.update_entity("jobs", "a", {"status": "new"})
        await move.rollback()
        with pytest.raises(FeedExpiredError):
            async with store.watch("jobs", since=between) as changes:
                await anext(changes)
        async with store.watch("jobs", since=before) as changes, asyncio.timeout(_SECONDS):
            change = await anext(changes)
            assert (change.kind, change.id, change.version) == ("put", "a", 2)


def test_109_a_target_without_a_feed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = [Collection("jobs", key="job_id", feed=100 * 86_400)]
    target = "dynamodb://eu-west-1/x"
    with pytest.raises(ConfigurationError, match="jobs declares a feed"):
        open_store("json:a.json", collections=long, follow_moves=[target])
