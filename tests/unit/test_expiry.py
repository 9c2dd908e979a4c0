"""Declarations of expiry, the clock, and which entities have expired."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_async_store import (
    HOST_FACTORY,
    Collection,
    ConfigurationError,
    CorruptionError,
    Expire,
    Field,
    InvalidInputError,
    StorageError,
    StorageStrategy,
    UnavailableError,
    and_,
    gt,
    in_,
    not_,
    open_store,
    or_,
    path,
    sync,
)
from hf_async_store.changes import Outcome
from hf_async_store.declarations import are_equal, decoded, encoded, merged
from hf_async_store.lifetimes import Clock, Lifetime, Lifetimes
from hf_async_store.query import Query, matches

SESSIONS = Collection("sessions", key="id", expires=Expire("expires_at"))
JOBS = Collection(
    "jobs",
    key="id",
    fields=["status", Field("done_at", "timestamp"), Field("size", "integer")],
    expires=Expire(
        "done_at",
        after=timedelta(days=30, microseconds=1),
        where=or_(
            {"status": in_(["DONE", "FAILED"])},
            and_({"size": gt(5)}, not_({path("labels", "kept"): True})),
        ),
    ),
)


def at(moment: datetime) -> Clock:
    return Clock(lambda: moment)


# -- declarations ---------------------------------------------------------------------------


def test_the_field_is_declared_as_a_timestamp() -> None:
    assert SESSIONS.fields["expires_at"] == Field("expires_at", "timestamp")
    with pytest.raises(ConfigurationError, match="must be of type timestamp"):
        Collection("s", key="id", fields=["expires_at"], expires=Expire("expires_at"))
    with pytest.raises(ConfigurationError, match="must be of type timestamp"):
        Collection("s", key="id", expires=Expire("id"))
    with pytest.raises(ConfigurationError, match="does not match"):
        Collection("s", key="id", expires=Expire("No!"))
    with pytest.raises(ConfigurationError, match="at least 0"):
        Expire("x", after=timedelta(seconds=-1))


def test_a_malformed_filter_is_refused_when_a_store_is_created() -> None:
    wrong = Collection("jobs", key="id", expires=Expire("done_at", where={"statsu": "DONE"}))
    with pytest.raises(ConfigurationError, match="collection 'jobs', the filter of its Expire: .*"):
        open_store("memory:", collections=[wrong])


def test_116_the_recorded_form() -> None:
    document = encoded([SESSIONS, JOBS, *HOST_FACTORY])
    sessions, jobs, *others = decoded(document, "here")
    assert sessions.expires == Expire("expires_at")
    assert jobs.expires is not None
    assert jobs.expires.after == timedelta(days=30, microseconds=1)
    assert are_equal([sessions, jobs, *others], [SESSIONS, JOBS, *HOST_FACTORY])
    assert all(each.expires is None for each in others)
    known = Lifetime(jobs, at(datetime(2030, 1, 1, tzinfo=UTC)))
    assert known.over() == Lifetime(JOBS, at(datetime(2030, 1, 1, tzinfo=UTC))).over()


@pytest.mark.parametrize(
    "where",
    [5, [], [["x"], "eq"], {"xor": []}, {"and": 1}, [["x"], "run", 1], [[], "eq", 1], {"not": []}],
)
def test_118_a_recorded_filter_is_data(where: object) -> None:
    expires = {"field": "expires_at", "where": where}
    fields = [{"name": "expires_at", "type": "timestamp"}]
    recorded = {"name": "s", "key": "id", "fields": fields, "indexes": [], "expires": expires}
    with pytest.raises(CorruptionError):
        decoded({"format": 1, "collections": [recorded]}, "here")


def test_another_program_is_merged() -> None:
    plain = Collection("sessions", key="id", fields=["user"])
    [both] = merged([SESSIONS], [plain])
    assert both.expires == SESSIONS.expires
    [both] = merged([plain], [SESSIONS])
    assert both.expires == SESSIONS.expires
    [both] = merged([SESSIONS], [Collection("sessions", key="id", fields=["expires_at"])])
    assert both.expires is None, "the field has another type now"


# -- the clock ------------------------------------------------------------------------------


def test_117_the_clock_never_runs_backwards() -> None:
    times = [datetime(2030, 1, day, tzinfo=UTC) for day in (2, 1, 3)]
    given_times = iter(times)
    clock = Clock(lambda: next(given_times))
    found = [clock.now() for _ in times]
    assert [each[:10] for each in found] == ["2030-01-02", "2030-01-02", "2030-01-03"]
    zone = timezone(timedelta(hours=2))
    assert (
        Clock(lambda: datetime(2030, 1, 1, 2, tzinfo=zone)).now() == "2030-01-01T00:00:00.000000Z"
    )


@pytest.mark.parametrize("time", [None, 5, "2030-01-01", datetime(2030, 1, 1)])
def test_a_clock_returns_times_with_a_zone(time: object) -> None:
    with pytest.raises(InvalidInputError, match="the clock must return a datetime"):
        Clock(lambda: time).now()  # type: ignore[arg-type,return-value]


# -- what has expired -----------------------------------------------------------------------

_NOW = datetime(2030, 6, 1, tzinfo=UTC)
_TIMES = [
    (_NOW - timedelta(days=30) + timedelta(microseconds=n))
    .replace(tzinfo=None)
    .isoformat(timespec="microseconds")
    + "Z"
    for n in range(-3, 3)
]
_VALUES = st.one_of(
    st.sampled_from(
        [*_TIMES, None, "", "2001", "0", "2030-02-31T00:00:00.000000Z", 5, True, [], {}]
    ),
    st.text(max_size=30),
)


@given(
    entity=st.fixed_dictionaries(
        {},
        optional={
            "done_at": _VALUES,
            "status": st.sampled_from(["DONE", "OPEN", None]),
            "size": st.sampled_from([1, 6, None]),
            "labels": st.sampled_from([{"kept": True}, {}, 5]),
        },
    )
)
def test_117_an_entity_is_judged_as_by_the_filter(entity: dict[str, object]) -> None:
    lifetime = Lifetime(JOBS, at(_NOW))
    assert lifetime.is_over(entity) is matches(lifetime.over(), entity)  # type: ignore[arg-type]


def test_the_end_of_an_entity() -> None:
    lifetime = Lifetime(JOBS, at(_NOW))
    done: dict[str, object] = {"status": "DONE", "done_at": "2030-01-01T00:00:00.000000Z"}
    assert lifetime.end(done) == "2030-01-31T00:00:00.000001Z"  # type: ignore[arg-type]
    for other in (
        {**done, "status": "OPEN"},
        {**done, "done_at": None},
        {**done, "done_at": "2030-02-31T00:00:00.000000Z"},
        {**done, "done_at": "9999-12-31T00:00:00.000000Z"},
        {"status": "DONE"},
    ):
        assert lifetime.end(other) is None  # type: ignore[arg-type]


def test_117_times_at_the_ends_of_the_calendar() -> None:
    first = datetime.min.replace(tzinfo=UTC)
    entity: dict[str, object] = {"status": "DONE", "done_at": "0001-01-01T00:00:00.000000Z"}
    assert not Lifetime(JOBS, at(first)).is_over(entity)  # type: ignore[arg-type]
    last = datetime.max.replace(tzinfo=UTC)
    assert Lifetime(JOBS, at(last)).is_over(entity)  # type: ignore[arg-type]


def test_a_store_in_which_nothing_expires_knows_no_lifetimes() -> None:
    assert not Lifetimes(HOST_FACTORY, Clock(), references=True)
    assert open_store("memory:")._lifetimes is None


# -- the background -------------------------------------------------------------------------


def _store(**more: object) -> StorageStrategy:
    return open_store("memory:", collections=[SESSIONS], purge_seconds=0.01, **more)  # type: ignore[arg-type]


async def _until_task(store: StorageStrategy) -> None:
    for _ in range(500):
        if store._purging._failure is not None:
            return
        await asyncio.sleep(0.01)


async def test_114_a_failure_in_the_background_is_shown_in_health(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with _store() as store:
        await store.create_entity("sessions", {"id": "a", "expires_at": "2001-01-01"})

        async def fail(*args: object) -> list[Outcome]:
            raise UnavailableError("no contact")

        write = store._write
        with caplog.at_level(logging.WARNING):
            monkeypatch.setattr(store, "_write", fail)
            await _until_task(store)
        report = await store.health()
        assert report["ok"] is False
        assert report["problems"] == [
            "expired entities were not removed in the background: no contact"
        ]
        assert "expired entities were not removed: no contact" in caplog.text
        monkeypatch.setattr(store, "_write", write)
        for _ in range(500):
            if store._purging._failure is None:
                break
            await asyncio.sleep(0.01)
        assert (await store.health())["ok"] is True
        assert await store.purge_expired() == 0, "it was removed"


async def test_114_the_background_can_be_switched_off() -> None:
    store = open_store("memory:", collections=[SESSIONS], purge_seconds=None)
    async with store:
        assert store._purging._timer is None
    async with open_store("memory:") as plain:
        assert plain._purging._timer is None, "nothing expires"


async def test_114_a_store_that_nobody_uses_is_freed() -> None:
    store = await _store().open()
    purging = store._purging
    store.abandon()
    with pytest.raises(StorageError):
        await store.count_entities("sessions")
    await asyncio.sleep(0.05)
    assert purging._task is None or purging._task.done()


def test_125_blocking_callers() -> None:
    now = _NOW
    with sync.open_store(
        "memory:", collections=[SESSIONS], clock=lambda: now, purge_seconds=None
    ) as store:
        store.create_entity("sessions", {"id": "a", "expires_at": _NOW + timedelta(seconds=1)})
        assert store.count_entities("sessions") == 1
        now += timedelta(seconds=1)
        assert store.count_entities("sessions") == 0
        with store.snapshot(expired=True) as snapshot:
            assert snapshot.count(Query("sessions")) == 1
        assert store.purge_expired("sessions", limit=5) == 1
        with store.snapshot(expired=True) as snapshot:
            assert snapshot.count(Query("sessions")) == 0


@dataclass
class _Visit:
    visit_id: str
    until: datetime | None = None


def test_a_collection_of_a_class_expires() -> None:
    collection = Collection.from_model(
        _Visit, key="visit_id", name="visits", expires=Expire("until")
    )
    assert collection.expires == Expire("until")
    assert collection.fields["until"].type == "timestamp"
