"""Faulty stores: the demo detects and reports every violation of an acknowledged write."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import msgspec
import pytest

from hf_async_store import Collection, StorageStrategy, Transaction, open_store
from hf_async_store.changes import PRESENT, Change, Delete, Outcome, Patch, Put
from hf_async_store.driver import FeedBatch, FeedEntry
from hf_async_store.strategies.json import JSONStorageStrategy
from hf_async_store.strategies.memory import MemoryEngine, MemoryStorageStrategy
from hf_async_store.values import Key
from hf_async_store_bench.demo import orchestrator, recorder
from hf_async_store_bench.demo.data import OPEN, Source
from hf_async_store_bench.demo.plan import Plan, Settings
from hf_async_store_bench.demo.runner import FAILED, run_demo

if TYPE_CHECKING:
    from pathlib import Path

NOW = "2026-01-01T00:00:00.000000Z"
Chosen = Callable[[Change], bool]


class OnceAfter:
    """Is true once, for a change of the given kind, after some others were skipped."""

    def __init__(self, chosen: Chosen, after: int = 3) -> None:
        self._chosen = chosen
        self._left = after

    def __call__(self, change: Change) -> bool:
        if self._chosen(change):
            self._left -= 1
            return self._left == -1
        return False


def is_machine(kind: type, **fields: object) -> Chosen:
    def chosen(change: Change) -> bool:
        given = getattr(change, "fields", None) or getattr(change, "entity", None) or {}
        return (
            isinstance(change, kind)
            and change.key.collection == "machines"
            and all(given.get(name) == value for name, value in fields.items())
        )

    return chosen


class _Drops(StorageStrategy):
    """Acknowledges one write without applying it."""

    lost: OnceAfter

    async def _write(self, changes: Sequence[Change], timeout: float | None) -> list[Outcome]:
        done = [each for each in changes if not self.lost(each)]
        outcomes = iter(await super()._write(done, timeout) if done else [])
        kept = {id(each) for each in done}
        return [next(outcomes) if id(each) in kept else _claimed(each) for each in changes]


def _claimed(change: Change) -> Outcome:
    return change.expect + 1 if isinstance(change.expect, int) else 1


class Dropping(_Drops, MemoryStorageStrategy):
    def __init__(self, lost: OnceAfter, collections: Sequence[Collection]) -> None:
        super().__init__(collections=collections)
        self.lost = lost


class DroppingOnDisk(_Drops, JSONStorageStrategy):
    def __init__(self, lost: OnceAfter, path: Path, collections: Sequence[Collection]) -> None:
        super().__init__(f"json:{path}/db.json", collections=collections)
        self.lost = lost


class _Torn(Transaction):
    lost: OnceAfter

    async def _write(self, changes: Sequence[Change], timeout: float | None) -> list[Outcome]:
        done = [each for each in changes if not type(self).lost(each)]
        outcomes = iter(await super()._write(done, timeout) if done else [])
        kept = {id(each) for each in done}
        return [next(outcomes) if id(each) in kept else 1 for each in changes]


class Tearing(MemoryStorageStrategy):
    """Commits a transaction without one of its changes."""

    def __init__(self, lost: OnceAfter, collections: Sequence[Collection]) -> None:
        super().__init__(collections=collections)
        self.transaction_type = type("Torn", (_Torn,), {"lost": lost})  # type: ignore[misc]


class Unconditional(MemoryStorageStrategy):
    """Ignores the preconditions of writes: the last writer wins."""

    async def _write(self, changes: Sequence[Change], timeout: float | None) -> list[Outcome]:
        free = [
            msgspec.structs.replace(each, expect=PRESENT) if isinstance(each.expect, int) else each
            for each in changes
        ]
        return await super()._write(free, timeout)


class WritingTooMuch(MemoryStorageStrategy):
    """Applies one update, and an additional write that was not requested.

    Args:
        extra: creates the additional write from the requested one.
    """

    def __init__(
        self, extra: Callable[[Change], Change], collections: Sequence[Collection]
    ) -> None:
        super().__init__(collections=collections)
        self._extra: Callable[[Change], Change] | None = extra

    async def _write(self, changes: Sequence[Change], timeout: float | None) -> list[Outcome]:
        outcomes = await super()._write(changes, timeout)
        if self._extra is not None and RUNNING(changes[0]):
            extra, self._extra = self._extra, None
            await super()._write([extra(changes[0])], timeout)
        return outcomes


class IncompleteQuery(MemoryStorageStrategy):
    """One query omits one machine, which is stored."""

    hidden = 3  # counts down to the query that hides

    async def query_entities(self, collection, *args, **more):  # type: ignore[no-untyped-def]
        rows = await super().query_entities(collection, *args, **more)
        if collection == "machines" and rows:
            self.hidden -= 1
            return rows[1:] if self.hidden == 0 else rows
        return rows


class _Truncated(Transaction):
    lost: Chosen

    async def _write(self, changes: Sequence[Change], timeout: float | None) -> list[Outcome]:
        short = [_without_price(each) if self.lost(each) else each for each in changes]
        return await super()._write(short, timeout)


def _without_price(change: Change) -> Change:
    assert isinstance(change, Put)
    entity = {name: value for name, value in change.entity.items() if name != "price"}
    return Put(change.key, entity, change.written_at, change.expect)


class Truncating(MemoryStorageStrategy):
    """Loses the value of a field, with a correct version."""

    def __init__(self, lost: Chosen, collections: Sequence[Collection]) -> None:
        super().__init__(collections=collections)
        self.transaction_type = type("Truncated", (_Truncated,), {"lost": staticmethod(lost)})  # type: ignore[misc]


RUNNING = is_machine(Patch, status="running")
CREATED = is_machine(Put, status="pending")
GONE = is_machine(Delete)


def ghost(of: Change) -> Put:
    name = f"{of.key.id}-ghost"
    return Put(Key("machines", name), {"machine_id": name, "request_id": None}, NOW)


Opening = Callable[[Sequence[Collection]], StorageStrategy]

LIARS: dict[str, tuple[Opening, set[str]]] = {
    "a lost status write": (lambda of: Dropping(OnceAfter(RUNNING), of), {"versions"}),
    "a lost create": (lambda of: Dropping(OnceAfter(CREATED), of), {"acknowledged", "counts"}),
    "a torn burst": (
        lambda of: Tearing(OnceAfter(CREATED), of),
        {"acknowledged", "transactions", "counts", "changes"},
    ),
    "a delete that was none": (
        lambda of: Tearing(OnceAfter(GONE), of),
        {"acknowledged", "transactions", "changes"},
    ),
    "no conditions": (lambda of: Unconditional(collections=of), {"counters"}),
    "a lost value": (lambda of: Truncating(CREATED, of), {"contents", "changes"}),
    "a query that hides": (lambda of: IncompleteQuery(collections=of), {"machines"}),
    "an entity from nowhere": (lambda of: WritingTooMuch(ghost, of), {"acknowledged", "changes"}),
}


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for long for what never comes."""
    monkeypatch.setattr(orchestrator, "_LATE", 2.0)
    monkeypatch.setattr(recorder, "_PATIENCE", 2.0)


def settings(**more: object) -> Settings:
    given: dict[str, object] = {
        "store": "memory:",
        "seconds": 3.0,
        "requests": 8,
        "processes": 1,
        **more,
    }
    return Settings(**given)  # type: ignore[arg-type]


@pytest.mark.hf_sampled
@pytest.mark.parametrize("liar", LIARS)
async def test_a_fault_is_detected(liar: str, capsys: pytest.CaptureFixture[str]) -> None:
    opening, broken = LIARS[liar]
    assert await run_demo(settings(), lambda plan: opening(plan.collections())) == FAILED
    out = capsys.readouterr().out
    last = out.splitlines()[-1]
    assert last.startswith("FAILED: broken: ")
    assert broken <= set(re.findall(r"[a-z]+", last.partition("broken:")[2].partition("(")[0]))
    for each in broken:
        assert re.search(rf"^  {each}: (machines|requests|templates)/demo-[0-9a-f]+-", out, re.M)


class TwoHolders(MemoryStorageStrategy):
    """Lets others claim what is claimed."""

    async def claim_entities(self, collection, *args, **more):  # type: ignore[no-untyped-def]
        claims = await super().claim_entities(collection, *args, **more)
        for each in claims:
            await self.break_claim(collection, each.id)
        return claims


class NotPurging(MemoryStorageStrategy):
    """Removes nothing that has expired."""

    async def purge_expired(self, *args, **more):  # type: ignore[no-untyped-def]
        return 0


def an_hour_ago() -> datetime:
    return datetime.now(UTC) - timedelta(hours=1)


async def test_two_holders_of_a_request_are_detected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(orchestrator, "_DRAIN_SECONDS", 0.5)
    asked = settings(seconds=2.0)
    assert await run_demo(asked, lambda plan: TwoHolders(collections=plan.collections())) == FAILED
    assert re.search(r"^  holders: requests/demo-\S+: claim", capsys.readouterr().out, re.M)


async def test_what_is_not_purged_is_detected(capsys: pytest.CaptureFixture[str]) -> None:
    def opening(plan: Plan) -> StorageStrategy:
        return NotPurging(collections=plan.collections())

    assert await run_demo(settings(), opening) == FAILED
    out = capsys.readouterr().out
    assert re.search(r"^  expired: requests/demo-\S+: has expired, and is there", out, re.M)
    assert "FAILED: broken: expired, changes (" in out


async def test_what_does_not_expire_is_detected(capsys: pytest.CaptureFixture[str]) -> None:
    def opening(plan: Plan) -> StorageStrategy:
        return open_store("memory:", collections=plan.collections(), clock=an_hour_ago)

    assert await run_demo(settings(), opening) == FAILED
    out = capsys.readouterr().out
    assert re.search(r"^  acknowledged: requests/demo-\S+: is there, and its delete", out, re.M)
    assert re.search(r"^  expired: requests/demo-\S+: has expired, and is there", out, re.M)


async def test_a_change_that_no_process_made_is_detected(
    single_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = Source(single_file).plain({"requests": None, "machines": None})
    assert held is not None
    # The run continues with open requests only.
    name = next(
        each
        for each, one in held["machines"].items()
        if held["requests"][str(one["request_id"])]["status"] not in OPEN
    )
    extra = Patch(Key("machines", name), {"name": "another"}, NOW)
    asked = settings(data=str(single_file))

    def opening(plan: Plan) -> StorageStrategy:
        return WritingTooMuch(lambda of: extra, plan.collections())

    assert await run_demo(asked, opening) == FAILED
    assert f"loaded: machines/{name}: had version" in capsys.readouterr().out


async def test_a_fault_on_disk_is_detected_with_three_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first process may not get any request to work on, but it creates machines in batches.
    lost = OnceAfter(is_machine(Put), 0)
    asked = settings(store=f"json:{tmp_path}/db.json", processes=3, requests=12)

    def opening(plan: Plan) -> StorageStrategy:
        return DroppingOnDisk(lost, tmp_path, plan.collections())

    assert await run_demo(asked, opening) == FAILED
    out = capsys.readouterr().out
    assert re.search(r"^  (acknowledged|versions): machines/demo-", out, re.M)
    (kept,) = (tmp_path / "tmp").iterdir()
    assert f"(kept in {kept})" in out


class Hanging(MemoryStorageStrategy):
    """Never returns from one call."""

    answers = 5

    async def update_entities(self, *args, **more):  # type: ignore[no-untyped-def]
        self.answers -= 1
        if self.answers == 0:
            await asyncio.Event().wait()
        return await super().update_entities(*args, **more)


async def test_a_hanging_call_is_detected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(orchestrator, "_DRAIN_SECONDS", 0.5)
    monkeypatch.setattr(orchestrator, "_STUCK_SECONDS", 0.5)
    asked = settings(seconds=2.0)
    assert await run_demo(asked, lambda plan: Hanging(collections=plan.collections())) == FAILED
    out = capsys.readouterr().out
    assert re.search(r"^  finished: machines/demo-\S+: status write was never answered", out, re.M)


# -- feeds -----------------------------------------------------------------------------------

Altered = Callable[[FeedEntry, FeedEntry], list[FeedEntry]]
"""Gets a change and the same as a delete; returns what the feed contains instead."""


def _other(entry: FeedEntry) -> FeedEntry:
    assert entry.after is not None
    entity = {**entry.after.entity, "status": "failed"}
    return msgspec.structs.replace(entry, after=msgspec.structs.replace(entry.after, entity=entity))


def _later(entry: FeedEntry) -> FeedEntry:
    assert entry.after is not None
    entity = {**entry.after.entity, "version": entry.after.version + 1}
    return msgspec.structs.replace(entry, after=msgspec.structs.replace(entry.after, entity=entity))


FEEDS: dict[str, tuple[bool, Altered, str]] = {
    "a put is absent": (False, lambda one, gone: [], "wrong order|as well, and that did not come"),
    "a delete is absent": (True, lambda one, gone: [], "as well, and that did not come"),
    "other fields": (False, lambda one, gone: [_other(one)], "came without status 'running'"),
    "a wrong order": (False, lambda one, gone: [_later(one), one], "in a wrong order"),
    "nobody's delete": (False, lambda one, gone: [one, gone], "wrong order|nobody made it"),
    "nobody's change": (True, lambda one, gone: [_later(one), gone], "in a wrong order"),
}


@pytest.mark.hf_sampled
@pytest.mark.parametrize("fault", FEEDS)
async def test_a_faulty_feed_is_detected(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The feed differs at one change, whoever reads it, and however often."""
    deletes, altered, expected = FEEDS[fault]
    read_feed = MemoryEngine.read_feed
    chosen: list[tuple[Key, int]] = []

    def read(entry: FeedEntry) -> list[FeedEntry]:
        record = entry.before if entry.after is None else entry.after
        assert record is not None
        wanted = entry.after is None if deletes else record.entity.get("status") == "running"
        if wanted and entry.key.collection == "machines" and not chosen:
            chosen.append((entry.key, record.version))
        if not wanted or (entry.key, record.version) not in chosen:
            return [entry]
        gone = msgspec.structs.replace(entry, before=record, after=None)
        return altered(msgspec.structs.replace(entry, after=record), gone)

    async def faulty(engine: MemoryEngine, collection: str, since: str, limit: int) -> FeedBatch:
        batch = await read_feed(engine, collection, since, limit)
        entries = [each for entry in batch.entries for each in read(entry)]
        return msgspec.structs.replace(batch, entries=entries)

    monkeypatch.setattr(MemoryEngine, "read_feed", faulty)
    assert await run_demo(settings()) == FAILED
    out = capsys.readouterr().out
    assert re.search(rf"^  changes: machines/demo-\S+: .*({expected})", out, re.M), out
    assert "FAILED: broken: changes (" in out
