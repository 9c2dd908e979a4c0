"""APScheduler 4 over hf_async_store: a data store that any number of schedulers and workers share.

    async with AsyncScheduler(EntityDataStore("postgresql://localhost/jobs")) as scheduler:
        await scheduler.add_schedule(tick, IntervalTrigger(seconds=1))
        await scheduler.run_until_stopped()

Two workers never get the same job: what is acquired is claimed, and the claim ends in the commit that
writes who acquired it, and until when. That lease is APScheduler's own, by its own clock. How many jobs of
a task run is counted and not stored; where it is limited, a named lock makes workers count in turn.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from enum import Enum
from logging import Logger
from typing import Any, Final, cast
from uuid import UUID

import apscheduler as ap
import attrs
from apscheduler.abc import EventBroker
from apscheduler.datastores.base import BaseExternalDataStore

from hf_async_store import (
    AlreadyExistsError,
    Claim,
    ClaimLostError,
    Collection,
    Entity,
    Expire,
    Field,
    Index,
    StorageStrategy,
    Transaction,
    and_,
    gt,
    gte,
    in_,
    lt,
    lte,
    not_in,
    open_store,
    or_,
)

TASKS, SCHEDULES, JOBS, RESULTS = "ap_tasks", "ap_schedules", "ap_jobs", "ap_results"
COLLECTIONS: Final = (
    Collection(TASKS, key="id"),
    Collection(
        SCHEDULES,
        key="id",
        fields=[
            Field("next_fire_time", "timestamp"),
            Field("paused", "boolean"),
            "acquired_by",
            Field("acquired_until", "timestamp"),
        ],
        indexes=["next_fire_time"],
    ),
    Collection(
        JOBS,
        key="id",
        fields=["task_id", "schedule_id", "acquired_by", Field("free_at", "timestamp")],
        indexes=["free_at", Index("task_id", "free_at"), "schedule_id", "acquired_by"],
    ),
    Collection(
        RESULTS,
        key="job_id",
        fields=[Field("expires_at", "timestamp")],
        indexes=["expires_at"],
        expires=Expire("expires_at"),
    ),
)
_SOMEBODY: Final = gt("")
_EVER: Final = gte("0001-01-01T00:00:00Z")
_MOST_JOBS: Final = 1000
_INSTANT: Final = timedelta(microseconds=1)


@attrs.define(eq=False)
class EntityDataStore(BaseExternalDataStore):
    """A data store of APScheduler.

    Args:
        store: the URL of a store, which is opened and closed with the scheduler; or an open one that
            declares `COLLECTIONS`, which data stores in one event loop can share.
    """

    store: str | StorageStrategy
    _store: StorageStrategy = attrs.field(init=False, repr=False)

    async def start(
        self, exit_stack: AsyncExitStack, event_broker: EventBroker, logger: Logger
    ) -> None:
        await super().start(exit_stack, event_broker, logger)
        self._store = (
            await exit_stack.enter_async_context(open_store(self.store, collections=COLLECTIONS))
            if isinstance(self.store, str)
            else self.store
        )
        if self.start_from_scratch:
            for each in COLLECTIONS:
                await self._store.delete_where(each.name, {})

    async def _publish(self, events: Iterable[ap.Event]) -> None:
        for each in events:
            await self._event_broker.publish(each)

    # -- tasks -------------------------------------------------------------------------------

    async def add_task(self, task: ap.Task) -> None:
        stored = _stored(task.marshal(self.serializer))
        is_new = await self._store.save_entity(TASKS, stored) == 1
        await self._publish([(ap.TaskAdded if is_new else ap.TaskUpdated)(task_id=task.id)])

    async def remove_task(self, task_id: str) -> None:
        if not await self._store.delete_entity(TASKS, task_id):
            raise ap.TaskLookupError(task_id)
        await self._publish([ap.TaskRemoved(task_id=task_id)])

    async def get_task(self, task_id: str) -> ap.Task:
        entity = await self._store.get_entity(TASKS, task_id)
        if entity is None:
            raise ap.TaskLookupError(task_id)
        return await self._task(entity)

    async def get_tasks(self) -> list[ap.Task]:
        return [
            await self._task(each)
            for each in await self._store.query_entities(TASKS, order_by="id")
        ]

    async def _task(self, entity: Entity) -> ap.Task:
        task = ap.Task.unmarshal(self.serializer, _loaded(ap.Task, entity))
        task.running_jobs = await self._running(task.id, _now())
        return task

    async def _running(self, task_id: str, now: datetime) -> int:
        held = {"task_id": task_id, "free_at": gt(now), "acquired_by": _SOMEBODY}
        return await self._store.count_entities(JOBS, held)

    # -- schedules ---------------------------------------------------------------------------

    async def add_schedule(self, schedule: ap.Schedule, conflict_policy: ap.ConflictPolicy) -> None:
        stored = _stored({"acquired_by": None, **schedule.marshal(self.serializer)})
        try:
            if conflict_policy is ap.ConflictPolicy.replace:
                version = await self._store.save_entity(SCHEDULES, stored)
            else:
                version = await self._store.create_entity(SCHEDULES, stored)
        except AlreadyExistsError as exc:
            if conflict_policy is ap.ConflictPolicy.exception:
                raise ap.ConflictingIdError(schedule.id) from exc
            return
        event = ap.ScheduleAdded if version == 1 else ap.ScheduleUpdated
        next_time = schedule.next_fire_time
        await self._publish(
            [event(schedule_id=schedule.id, task_id=schedule.task_id, next_fire_time=next_time)]
        )

    async def remove_schedules(self, ids: Iterable[str], *, finished: bool = False) -> None:
        removed = await self._store.delete_where(
            SCHEDULES, {"id": in_(list(ids))}, order_by="id", returning=True
        )
        await self._publish(
            ap.ScheduleRemoved(
                schedule_id=str(each["id"]), task_id=str(each["task_id"]), finished=finished
            )
            for each in removed
        )

    async def get_schedules(self, ids: set[str] | None = None) -> list[ap.Schedule]:
        some = {"id": in_(list(ids))} if ids else None
        found = await self._store.query_entities(SCHEDULES, some, order_by="id")
        return list(map(self._schedule, found))

    def _schedule(self, entity: Entity) -> ap.Schedule:
        return ap.Schedule.unmarshal(self.serializer, _loaded(ap.Schedule, entity))

    async def acquire_schedules(
        self, scheduler_id: str, lease_duration: timedelta, limit: int
    ) -> list[ap.Schedule]:
        now = _now()
        is_free = or_({"acquired_by": in_([None, scheduler_id])}, {"acquired_until": lt(now)})
        due = and_({"next_fire_time": lte(now), "paused": False}, is_free)
        claims = await self._store.claim_entities(
            SCHEDULES, due, order_by="next_fire_time", limit=limit, owner=scheduler_id
        )
        lease = {"acquired_by": scheduler_id, "acquired_until": now + lease_duration}
        kept = await _kept(claims, lease)
        return [self._schedule({**each.entity, **_stored(lease)}) for each in kept]

    async def release_schedules(
        self, scheduler_id: str, results: Sequence[ap.ScheduleResult]
    ) -> None:
        async def release(result: ap.ScheduleResult) -> None:
            mine = {"id": result.schedule_id, "acquired_by": scheduler_id}
            changes = {
                "trigger": self.serializer.serialize(result.trigger),
                "last_fire_time": result.last_fire_time,
                "next_fire_time": result.next_fire_time,
                "acquired_by": None,
                "acquired_until": None,
            }
            await self._store.update_where(SCHEDULES, mine, _stored(changes))

        await asyncio.gather(*map(release, results))
        await self._publish(
            ap.ScheduleUpdated(
                schedule_id=each.schedule_id,
                task_id=each.task_id,
                next_fire_time=each.next_fire_time,
            )
            for each in results
        )

    async def extend_acquired_schedule_leases(
        self, scheduler_id: str, schedule_ids: set[str], duration: timedelta
    ) -> None:
        mine = {"id": in_(list(schedule_ids)), "acquired_by": scheduler_id}
        await self._store.update_where(SCHEDULES, mine, {"acquired_until": _now() + duration})

    async def get_next_schedule_run_time(self) -> datetime | None:
        waiting = {"next_fire_time": _EVER, "paused": False, "acquired_by": None}
        found = await self._store.query_entities(
            SCHEDULES, waiting, order_by="next_fire_time", limit=1
        )
        return self._schedule(found[0]).next_fire_time if found else None

    # -- jobs --------------------------------------------------------------------------------

    async def add_job(self, job: ap.Job) -> None:
        entity = {"acquired_by": None, "free_at": job.created_at, **job.marshal(self.serializer)}
        await self._store.create_entity(JOBS, _stored(entity))
        event = ap.JobAdded(job_id=job.id, task_id=job.task_id, schedule_id=job.schedule_id)
        await self._publish([event])

    async def get_jobs(self, ids: Iterable[UUID] | None = None) -> list[ap.Job]:
        some = None if ids is None else {"id": in_([str(each) for each in ids])}
        found = await self._store.query_entities(JOBS, some, order_by="free_at")
        return [self._job(each) for each in found]

    def _job(self, entity: Entity, *, with_arguments: bool = True) -> ap.Job:
        fields = _loaded(ap.Job, entity)
        if not with_arguments:
            fields |= {"args": (), "kwargs": {}}
        return ap.Job.unmarshal(self.serializer, fields)

    async def acquire_jobs(
        self, scheduler_id: str, lease_duration: timedelta, limit: int | None = None
    ) -> list[ap.Job]:
        now, most = _now(), limit or _MOST_JOBS
        until = now + lease_duration
        lease = {"acquired_by": scheduler_id, "acquired_until": until, "free_at": until + _INSTANT}
        acquired: list[ap.Job] = []
        full: set[str] = set()  # the tasks of which no more jobs may run
        while len(acquired) < most:
            free: dict[str, object] = {"free_at": lte(now)}
            if full:
                free["task_id"] = not_in(sorted(full))
            claims = await self._store.claim_entities(
                JOBS, free, order_by="free_at", limit=most - len(acquired), owner=scheduler_id
            )
            runnable = await self._runnable(scheduler_id, claims, now)
            taken = await self._take(runnable, lease, now, full)
            acquired += taken
            if len(taken) == len(claims):
                break  # there are no others, or enough
        for job in acquired:
            job.acquired_by, job.acquired_until = scheduler_id, until
        await self._publish(
            ap.JobAcquired.from_job(each, scheduler_id=scheduler_id) for each in acquired
        )
        return acquired

    async def _runnable(
        self, scheduler_id: str, claims: Iterable[Claim], now: datetime
    ) -> dict[Claim, ap.Job]:
        """The jobs of claims. Those that cannot be run are released, with a result that says why."""
        runnable = {}
        for claim in claims:
            try:
                job = self._job(claim.entity)
            except ap.DeserializationError as exc:
                job = self._job(claim.entity, with_arguments=False)
                failed = ap.JobOutcome.deserialization_failed
                result = ap.JobResult.from_job(job, failed, finished_at=now, exception=exc)
            else:
                if job.start_deadline is None or job.start_deadline >= now:
                    runnable[claim] = job
                    continue
                result = ap.JobResult.from_job(
                    job, ap.JobOutcome.missed_start_deadline, finished_at=now
                )
            await self.release_job(scheduler_id, job, result)
        return runnable

    async def _take(
        self,
        claimed: Mapping[Claim, ap.Job],
        lease: Mapping[str, object],
        now: datetime,
        full: set[str],
    ) -> list[ap.Job]:
        """Write a lease into claimed jobs, as far as their tasks permit; returns those jobs."""
        by_task = defaultdict(list)
        for claim, job in claimed.items():
            by_task[job.task_id].append(claim)
        tasks = await self._store.get_entities(TASKS, list(by_task))
        kept: list[Claim] = []
        for (task_id, those), task in zip(by_task.items(), tasks, strict=True):
            most = None if task is None else task["max_running_jobs"]
            if most is None:
                kept += await _kept(those, lease)
                continue
            async with self._store.lock(f"ap {task_id}"):
                slots = max(cast("int", most) - await self._running(task_id, now), 0)
                kept += await _kept(those[:slots], lease)
            if slots < len(those):
                full.add(task_id)
                await asyncio.gather(*(each.release() for each in those[slots:]))
        return [claimed[each] for each in kept]

    async def release_job(self, scheduler_id: str, job: ap.Job, result: ap.JobResult) -> None:
        job_id = str(result.job_id)
        if result.expires_at > result.finished_at:
            stored = _stored(result.marshal(self.serializer))

            async def released(tx: Transaction) -> None:
                await tx.save_entity(RESULTS, stored)
                await tx.delete_entity(JOBS, job_id)

            await self._store.run_transaction(released)
        else:
            await self._store.delete_entity(JOBS, job_id)
        event = ap.JobReleased.from_result(
            result, scheduler_id, job.task_id, job.schedule_id, job.scheduled_fire_time
        )
        await self._publish([event])

    async def get_job_result(self, job_id: UUID) -> ap.JobResult | None:
        found = await self._store.delete_where(RESULTS, {"job_id": str(job_id)}, returning=True)
        if not found:
            return None
        return ap.JobResult.unmarshal(self.serializer, _loaded(ap.JobResult, found[0]))

    async def extend_acquired_job_leases(
        self, scheduler_id: str, job_ids: set[UUID], duration: timedelta
    ) -> None:
        until = _now() + duration
        mine = {"id": in_([str(each) for each in job_ids]), "acquired_by": scheduler_id}
        lease = {"acquired_until": until, "free_at": until + _INSTANT}
        await self._store.update_where(JOBS, mine, lease)

    async def reap_abandoned_jobs(self, scheduler_id: str) -> None:
        await self._abandon({"acquired_by": scheduler_id})

    async def _abandon(self, filters: Mapping[str, object]) -> None:
        for each in await self._store.query_entities(JOBS, filters):
            job = self._job(each, with_arguments=False)
            result = ap.JobResult.from_job(job, ap.JobOutcome.abandoned, finished_at=_now())
            await self.release_job(str(job.acquired_by), job, result)

    async def cleanup(self) -> None:
        await self._store.purge_expired(RESULTS)
        await self._abandon({"acquired_by": _SOMEBODY, "free_at": lte(_now())})
        finished = await self._store.query_entities(
            SCHEDULES, {"next_fire_time": None}, fields=["id"]
        )
        ids = [str(each["id"]) for each in finished]
        if ids:
            busy = {
                schedule
                for schedule, _ in await self._store.count_by(
                    JOBS, "schedule_id", {"schedule_id": in_(ids)}
                )
            }
            await self.remove_schedules(set(ids) - busy, finished=True)


def _now() -> datetime:
    return datetime.now(UTC)


async def _kept(claims: Sequence[Claim], lease: Mapping[str, object]) -> list[Claim]:
    """Write a lease, and end the claims in the same commits; returns those that were still held."""

    async def is_kept(claim: Claim) -> bool:
        try:
            await claim.finish(lease)
        except ClaimLostError:
            return False
        return True

    kept = await asyncio.gather(*map(is_kept, claims))
    return [claim for claim, is_held in zip(claims, kept, strict=True) if is_held]


def _stored(fields: Mapping[str, object]) -> dict[str, Any]:
    """The fields of an object of APScheduler as the store takes them."""
    return {name: _value(value) for name, value in fields.items()}


def _value(value: object) -> object:
    if isinstance(value, bytes):
        return b64encode(value).decode()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value.name if isinstance(value, Enum) else value


def _loaded(kind: type[Any], entity: Entity) -> dict[str, Any]:
    """The fields of an object of APScheduler, as it marshals them."""
    names = (each.name for each in attrs.fields(kind))
    fields: dict[str, Any] = {name: entity[name] for name in names if name in entity}
    for name in ("trigger", "args", "kwargs", "exception", "return_value"):
        if isinstance(value := fields.get(name), str):
            fields[name] = b64decode(value)
    for name in ("id", "job_id"):
        if name in fields and kind in (ap.Job, ap.JobResult):
            fields[name] = UUID(fields[name])
    return fields
