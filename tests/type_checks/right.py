"""Uses of the public interface that every type checker accepts in its strictest mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_type
from uuid import UUID

import msgspec
import pydantic

from hf_async_store import (
    ABSENT,
    Collection,
    Entity,
    Page,
    Transaction,
    TypedClaim,
    TypedCollection,
    TypedPage,
    TypedRepository,
    Value,
    Versioned,
    and_,
    begins_with,
    gt,
    in_,
    increment,
    open_store,
    path,
    sync,
)


class Job(msgspec.Struct):
    job_id: str
    status: str = "WAITING"


class Machine(pydantic.BaseModel):
    machine_id: str
    name: str | None = None


JOBS = Collection.from_model(Job, key="job_id", indexes=["status"])


async def dicts() -> None:
    async with open_store("memory:", collections=[JOBS]) as store:
        assert_type(await store.save_entity("jobs", {"job_id": "j", "n": 1}), int)
        entity = await store.get_entity("jobs", "j")
        assert_type(entity, Entity | None)
        if entity is not None:
            assert_type(entity["n"], Value)
        filters: Mapping[object, object] = {"status": "WAITING", path("n"): gt(1)}
        assert_type(await store.query_entities("jobs", filters, "-created_at", 10), list[Entity])
        await store.query_entities("jobs", {"status": in_(["A"]), path("a", "b"): begins_with("x")})
        await store.query_entities("jobs", and_({"status": "A"}, {path("n"): 1}))
        assert_type(await store.query_page("jobs"), Page)
        assert_type(await store.update_entity("jobs", "j", {"n": increment(1)}), int)
        assert_type(await store.update_entity("jobs", "j", {"n": 1}, returning=True), Entity)
        assert_type(await store.create_entities("jobs", [], if_absent=True), list[bool])
        async with store.begin_transaction() as tx:
            assert_type(tx, Transaction)
            assert_type(await tx.delete_entity("jobs", "j"), bool)

        async def work(inner: Transaction) -> int:
            return await inner.count_entities("jobs")

        assert_type(await store.run_transaction(work), int)


async def typed() -> None:
    async with open_store("memory:", collections=[JOBS]) as store:
        jobs = store.typed(Job)
        assert_type(jobs, TypedCollection[Job])
        job = await jobs.get("j")
        assert_type(job, Job | None)
        if job is not None:
            assert_type(job.job_id, str)
            assert_type(await jobs.save(job), int)
        versioned = await jobs.get_versioned("j")
        assert_type(versioned, Versioned[Job] | None)
        if versioned is not None:
            assert_type(versioned.version, int)
            assert_type(versioned.instance, Job)
        assert_type(await jobs.query({"status": "DONE"}), list[Job])
        assert_type(await jobs.get_many(["j"]), list[Job | None])
        assert_type(await jobs.page(), TypedPage[Job])
        assert_type(jobs.id_of(Job("j")), str)
        async for each in jobs.stream():
            assert_type(each, Job)
        assert_type(await jobs.patch("j", status="DONE"), int)
        assert_type(await jobs.modify("j", _done), int)
        assert_type(await jobs.save(Job("k"), expected_version=ABSENT), int)
        [claim] = await jobs.claim({"status": "WAITING"}, order_by="job_id", wait=1.0)
        assert_type(claim, TypedClaim[Job])
        async with claim as entered:
            assert_type(entered, TypedClaim[Job])
            assert_type(claim.instance.status, str)
            assert_type(await claim.update(status="RUNNING"), int)
            assert_type(claim.claim.entity, Entity)
            async with claim.transaction() as tx:
                assert_type(tx.typed(Job), TypedRepository[Job])
            await claim.finish(_done(claim.instance), status="DONE")
        assert_type(jobs.instance_of({"job_id": "j"}), Job)
        async with store.begin_transaction() as tx:
            assert_type(await tx.typed(Machine).get("m"), Machine | None)


class Order(msgspec.Struct):
    order_id: UUID


async def keys_of_other_types(order_id: UUID) -> None:
    async with open_store(
        "memory:", collections=[Collection.from_model(Order, key="order_id")]
    ) as store:
        orders = store.typed(Order)
        assert_type(await orders.get(order_id), Order | None)
        assert_type(await orders.get_many([order_id, str(order_id)]), list[Order | None])
        assert_type(await orders.patch(order_id), int)
        assert_type(await orders.delete(order_id), bool)


def _done(job: Job) -> Job:
    return msgspec.structs.replace(job, status="DONE")


def blocking() -> None:
    with sync.open_store("memory:", collections=[JOBS]) as store:
        assert_type(store.get_entity("jobs", "j"), Entity | None)
        assert_type(store.typed(Job).get("j"), Job | None)
        assert_type(store.typed(Job).query(), list[Job])
        [claim] = store.typed(Job).claim(limit=1)
        assert_type(claim, sync.TypedClaim[Job])
        with claim as entered:
            assert_type(entered, sync.TypedClaim[Job])
            assert_type(claim.instance, Job)
            assert_type(claim.update(Job("j")), int)
            with claim.transaction() as tx:
                assert_type(tx.typed(Job).get("j"), Job | None)
            claim.finish(status="DONE")
