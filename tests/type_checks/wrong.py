"""Mistakes: every type checker reports each line that ends with a comment `# error`, and no other."""

from __future__ import annotations

import msgspec

import hf_async_store
from hf_async_store import Collection, Index, open_store, sync


class Job(msgspec.Struct):
    job_id: str
    status: str = "WAITING"


class Machine(msgspec.Struct):
    machine_id: str


JOBS = Collection.from_model(Job, key="job_id")
Collection.from_model(Job)  # error
Collection.from_model(Job("j"), key="job_id")  # error
Collection("jobs", "job_id")  # error
Index("status", sort=1)  # error
hf_async_store.open_stores()  # error


async def mistakes() -> None:
    async with open_store("memory:", collections=[JOBS]) as store:
        store.typed(Job("j"))  # error
        jobs = store.typed(Job)
        await jobs.save(Machine("m"))  # error
        await jobs.save({"job_id": "j"})  # error
        job = await jobs.get("j")
        print(job.status)  # error
        number: int = await jobs.query()  # error
        await jobs.get(1)  # error
        await jobs.save(Job("j"), expected_version="1")  # error
        await jobs.modify("j", lambda _: Machine("m"))  # error
        await jobs.query(["status"])  # error
        [claim] = await jobs.claim()
        print(claim.instance.name)  # error
        await claim.update(Machine("m"))  # error
        await claim.finish({"status": "DONE"})  # error
        await jobs.claim(lease="1")  # error
        async with store.begin_transaction() as tx:
            await tx.typed(Job).claim()  # error
        await store.save_entity("jobs", ["j"])  # error
        await store.get_entity("jobs", 1)  # error
        await store.query_entities("jobs", "status")  # error
        await store.query_entities("jobs", limit="1")  # error
        name: str = await store.save_entity("jobs", {})  # error
        entity = await store.get_entity("jobs", "j")
        print(entity["status"])  # error
        print(number, name)


def blocking_mistakes() -> None:
    with sync.open_store("memory:", collections=[JOBS]) as store:
        store.typed(Job).save(Machine("m"))  # error
        print(store.typed(Job).get("j").status)  # error
        [claim] = store.typed(Job).claim()
        claim.finish(Machine("m"))  # error
