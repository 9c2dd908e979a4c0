"""The orchestrator of one process: it asks for machines, polls them, returns them, all at once.

Whatever the store answers goes into the write log; a conflict is a normal answer, any other error
breaks the invariant "no errors", and the work goes on. Nothing here knows an engine.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from time import monotonic, perf_counter
from typing import Any, Final, TypeAlias, cast

import hf_async_store as hfas
from hf_async_store import Entity, StorageError, StorageStrategy, Transaction, begins_with
from hf_async_store_bench.concurrency import side_by_side
from hf_async_store_bench.data import batches, machine, transaction_limit
from hf_async_store_bench.demo.data import OPEN
from hf_async_store_bench.demo.plan import Plan
from hf_async_store_bench.demo.write_log import Answer, Read, Write, WriteLog, answer

_FLOWS: Final = 24  # requests that one process has under way at once
_WATCHERS: Final = 4
_COUNTERS: Final = 3
_PIECEMEAL_EVERY: Final = 4  # of so many requests one gets its machines in batches in any case
_BATCH: Final = 100
_READY: Final = 0.7  # the share of the waiting machines that a poll finds running
_RETURNED: Final = 0.6
_DRAIN_SECONDS: Final = 30.0  # how long what was begun may take beyond the time of the run
_STUCK_SECONDS: Final = 15.0  # how long after that a call counts as stuck
_SETTLE_SECONDS: Final = 10.0
_NORMAL: Final = (hfas.ConcurrencyConflictError, hfas.EntityNotFoundError, hfas.AlreadyExistsError)

_Change: TypeAlias = tuple[Write, list[Answer]]


class Orchestrator:
    """One process's part of the work; `progress` is told how many requests have come to their end."""

    def __init__(
        self,
        store: StorageStrategy,
        log: WriteLog,
        plan: Plan,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self._store = store
        self._log = log
        self._plan = plan
        self._progress = progress
        self._random = random.Random(f"{plan.settings.seed}-{plan.index}")
        self._limit = transaction_limit(store.capabilities)
        self._eventual = store.capabilities.query_isolation == "eventual"
        self._until = monotonic() + plan.settings.seconds
        self._returns = itertools.count()
        self._finished = False
        self._done = 0

    async def run(self) -> None:
        """All of the plan, or what fits in its time; what was begun is completed, unless the store
        never answers."""
        more = itertools.repeat(5) if self._plan.endless else ()
        waiting = enumerate(itertools.chain(self._plan.sizes, more))
        patience = self._plan.settings.seconds + _DRAIN_SECONDS + _STUCK_SECONDS
        with suppress(TimeoutError):
            async with asyncio.timeout(patience), asyncio.TaskGroup() as helpers:
                for _ in range(_WATCHERS):
                    helpers.create_task(self._watch())
                for number in range(_COUNTERS):
                    helpers.create_task(self._count(number))
                async with asyncio.TaskGroup() as flows:
                    flows.create_task(self._adopt())
                    for _ in range(_FLOWS):
                        flows.create_task(self._serve_all(waiting))
                self._finished = True

    async def sweep(self) -> int:
        """Complete what other processes left behind; returns how many requests that were."""
        self._until = monotonic()
        swept: set[str] = set()
        if self._eventual:
            await asyncio.sleep(1)  # for the index to learn of the last writes
        while self._in_time():
            left = await self._pending("acquire") + await self._pending("return")
            if not left:
                return len(swept)
            swept |= {str(each["request_id"]) for each in left}
            await side_by_side(self._sweep_one, left)
        return len(swept)

    async def _serve_all(self, waiting: Iterator[tuple[int, int]]) -> None:
        for number, size in waiting:
            if monotonic() >= self._until:
                return
            await self._serve(number, size)
            self._done += 1
            self._progress(self._done)

    async def _serve(self, number: int, size: int) -> None:
        request = f"{self._plan.prefix}request-{self._plan.index}-{number:04}"
        template = self._random.choice(self._plan.templates)
        async with self._noting_errors(f"requests/{request}"):
            await self._count_up(template)
            name = request.replace("request", "machine")
            machines = [f"{name}-{each:04}" for each in range(size)]
            fits = self._limit is None or size < self._limit
            if fits and number % _PIECEMEAL_EVERY != _PIECEMEAL_EVERY - 1:
                await self._acquire_whole(request, template, machines)
            else:
                await self._acquire_piecemeal(request, template, machines)
            if await self._poll_to_the_end(request):
                await self._give_back(request, template, machines)

    async def _acquire_whole(self, request: str, template: str, machines: list[str]) -> None:
        """The request and its machines in one transaction: all of them or nothing."""
        entity = _acquire_request(request, template, len(machines), "PENDING")
        shared = _machine_fields(request, template)

        async def work(tx: Transaction) -> list[_Change]:
            request_write = Write("requests", "create", [request], entity)
            machine_write = Write("machines", "create", machines, shared)
            version = await tx.create_entity("requests", entity)
            versions = await tx.create_entities("machines", _machines(machines, shared))
            return [(request_write, [version]), (machine_write, list(versions))]

        await self._transaction("acquire", work)

    async def _acquire_piecemeal(self, request: str, template: str, machines: list[str]) -> None:
        """The request, its machines in batches, and only then PENDING: pollers rely on that."""
        entity = _acquire_request(request, template, len(machines), "creating")
        write = Write("requests", "create", [request], entity)
        creating = self._store.create_entity("requests", entity)
        (version,) = await self._write("create", write, creating)
        if not isinstance(version, int):
            return  # noted already; its machines would have no parent
        shared = _machine_fields(request, template)
        for batch in batches(machines, _BATCH):
            write = Write("machines", "create", list(batch), shared)
            creates = self._store.create_entities("machines", _machines(batch, shared))
            answers = await self._write("create batch", write, creates)
            for name, each in zip(batch, answers, strict=True):
                if not isinstance(each, int):
                    self._log.broken("errors", f"machines/{name}", f"could not be created: {each}")
        await self._set_request(request, {"status": "PENDING"}, version)

    async def _poll_to_the_end(self, request: str) -> bool:
        """Poll until all machines run; False if there was no time for that."""
        while await self._poll(request):
            if not self._in_time():
                self._log.broken("finished", f"requests/{request}", "was not done in time")
                return False
            await asyncio.sleep(self._random.uniform(0.001, 0.02))
        return True

    async def _give_back(self, request: str, template: str, machines: list[str]) -> None:
        """Two returns at once that want some of the same machines: each machine goes once."""
        await side_by_side(lambda _: self._return(request, template, machines), range(2))

    async def _return(self, request: str, template: str, machines: list[str]) -> None:
        name = f"{self._plan.prefix}return-{self._plan.index}-{next(self._returns):04}"
        wanted = [each for each in machines if self._random.random() < _RETURNED]
        if self._limit is not None:
            wanted = wanted[: self._limit - 1]
        taken: list[str] = []

        async def work(tx: Transaction) -> list[_Change]:
            found = [each for each in await tx.get_entities("machines", wanted) if each]
            running = [each for each in found if each["status"] == "running"]
            free = {_id(i): _version(i) for i in running if i.get("return_request_id") is None}
            taken[:] = free
            return await _mark_returned(tx, name, request, template, free) if free else []

        async with self._noting_errors(f"requests/{name}"):
            await self._transaction("return", work)
            if taken:
                await asyncio.sleep(self._random.uniform(0, 0.02))
                await self._terminate(name, taken)

    async def _terminate(self, name: str, machines: list[str]) -> None:
        """The machines go, and the return is COMPLETED, in one transaction."""
        fields = {"status": "COMPLETED", "completed_at": _now()}

        async def work(tx: Transaction) -> list[_Change]:
            returned = await tx.get_entity("requests", name)
            if returned is None or returned["status"] == "COMPLETED":
                return []
            gone = await tx.delete_entities("machines", machines)
            version = await tx.update_entity("requests", name, fields)
            return [
                (Write("machines", "delete", machines), [answer(each) for each in gone]),
                (Write("requests", "update", [name], fields), [version]),
            ]

        await self._transaction("terminate", work)

    async def _poll(self, name: str) -> bool:
        """One status poll; True while the request is open."""
        started = perf_counter()
        request = await self._store.get_entity("requests", name)
        if request is None:
            self._log.broken("acknowledged", f"requests/{name}", "a poll does not find it")
            return False
        if request["status"] not in OPEN:
            return False
        machines = await self._machines_of(name)
        self._log.note(Read("poll", perf_counter() - started))
        if name.startswith(self._plan.prefix):
            machines = await self._expect_all(request, machines)
        waiting = [each for each in machines if str(each["status"]).lower() == "pending"]
        if await self._start_some(waiting):
            done = {"status": "COMPLETED", "completed_at": _now()}
            await self._set_request(name, done, _version(request))
        return True

    async def _machines_of(self, request: str) -> list[Entity]:
        return await self._store.query_entities("machines", {"request_id": request}, "created_at")

    async def _expect_all(self, request: Entity, machines: list[Entity]) -> list[Entity]:
        """A PENDING request has all of its machines; until it is COMPLETED, none of them leaves."""
        name, count = str(request["request_id"]), cast("int", request["machine_count"])
        patience = monotonic() + (_SETTLE_SECONDS if self._eventual else 0)
        while len(machines) != count:
            now = await self._store.get_entity("requests", name)
            if now is None or now["version"] != request["version"]:
                return machines  # it was completed meanwhile, and some went back
            if monotonic() >= patience:
                what = f"is PENDING, and a poll found {len(machines)} of {count} machines"
                self._log.broken("pollers", f"requests/{name}", what)
                return machines
            await asyncio.sleep(0.1)
            machines = await self._machines_of(name)
        return machines

    async def _start_some(self, waiting: Sequence[Entity]) -> bool:
        """Write what the provider says has started, by compare-and-set; True if all run now."""
        started = [each for each in waiting if self._random.random() < _READY]
        if not started:
            return not waiting
        fields = {"status": "running", "started_at": _now()}
        versions = {_id(each): _version(each) for each in started}
        write = Write("machines", "update", list(versions), fields)
        changes = dict.fromkeys(versions, fields)
        updates = self._store.update_entities("machines", changes, versions)
        answers = await self._write("status write", write, updates)
        return sum(isinstance(each, int) for each in answers) == len(waiting)

    async def _set_request(self, name: str, fields: dict[str, Any], version: int) -> None:
        """Compare-and-set: whoever else polls the same request may be faster."""
        write = Write("requests", "update", [name], fields)
        update = self._store.update_entity("requests", name, fields, expected_version=version)
        await self._write("request write", write, update)

    async def _watch(self) -> None:
        """Poll requests of every process, found by their status: that is where conflicts are."""
        while not self._finished:
            async with self._noting_errors("requests"):
                found = await self._pending("acquire", limit=16)
                if found:
                    await self._poll(str(self._random.choice(found)["request_id"]))
            await asyncio.sleep(self._random.uniform(0.01, 0.06))

    async def _count(self, number: int) -> None:
        """Everybody counts up the same few entities: each step must count."""
        counter = self._plan.counters[number % len(self._plan.counters)]
        while not self._finished:
            async with self._noting_errors(f"templates/{counter}"):
                await self._count_up(counter)
            await asyncio.sleep(self._random.uniform(0, 0.02))

    async def _count_up(self, template: str) -> None:
        tries = 0

        def one_more(entity: Entity) -> Mapping[str, object]:
            nonlocal tries
            tries += 1
            return {**entity, "uses": cast("int", entity.get("uses", 0)) + 1}

        write = Write("templates", "add", [template], {"uses": 1})
        counting = self._store.modify_entity("templates", template, one_more)
        await self._write("count up", write, counting, conflicts=lambda: tries - 1)

    async def _adopt(self) -> None:
        """Go on with the open requests of the loaded data; the first process returns some."""
        for name in self._plan.adopted:
            async with self._noting_errors(f"requests/{name}"):
                ended = await self._poll_to_the_end(name)
                machines = await self._machines_of(name) if ended and not self._plan.index else []
                if machines:
                    template = str(machines[0]["template_id"])
                    await self._give_back(name, template, [_id(each) for each in machines])

    async def _pending(self, kind: str, limit: int | None = None) -> list[Entity]:
        ours = begins_with(self._plan.prefix)
        wanted = {"status": "PENDING", "request_type": kind, "request_id": ours}
        return await self._store.query_entities("requests", wanted, limit=limit)

    async def _sweep_one(self, request: Entity) -> None:
        name = str(request["request_id"])
        async with self._noting_errors(f"requests/{name}"):
            if request["request_type"] == "acquire":
                await self._poll(name)
            else:
                metadata = cast("dict[str, Any]", request["metadata"])
                await self._terminate(name, metadata["machine_ids"])

    async def _write(
        self,
        work: str,
        write: Write,
        call: Awaitable[int | Sequence[int | bool]],
        conflicts: Callable[[], int] = lambda: 0,
    ) -> list[Answer]:
        """Independent writes, noted before and after; the call begins only when it is awaited."""
        number = self._log.intent(work, [write])
        started = perf_counter()
        outcomes: Sequence[int | bool | StorageError]
        try:
            outcome = await call
            outcomes = [outcome] if isinstance(outcome, int) else outcome
        except hfas.BatchError as exc:
            outcomes = exc.outcomes
        except StorageError as exc:
            outcomes = [exc] * len(write.ids)
        seconds = perf_counter() - started
        answers = [answer(each) for each in outcomes]
        self._log.done(number, [answers], seconds, conflicts() + answers.count("refused"))
        for name, each in zip(write.ids, outcomes, strict=True):
            if isinstance(each, StorageError) and not isinstance(each, _NORMAL):
                self._log.broken("errors", f"{write.collection}/{name}", _told(each))
        return answers

    async def _transaction(
        self, work: str, attempt: Callable[[Transaction], Awaitable[list[_Change]]]
    ) -> None:
        """Writes that land together, noted just before the commit; retried on conflicts."""
        number = 0
        tries = 0

        async def noted(tx: Transaction) -> list[_Change]:
            nonlocal number, tries
            if number:
                self._log.done(number, None, 0, 0)
                number = 0
            tries += 1
            changes = await attempt(tx)
            if changes:
                number = self._log.intent(work, [write for write, _ in changes], whole=True)
            return changes

        started = perf_counter()
        try:
            changes = await self._store.run_transaction(noted)
        except StorageError as exc:
            if number and not exc.outcome_unknown:
                self._log.done(number, None, 0, tries)
            raise
        if number:
            answers = [each for _, each in changes]
            self._log.done(number, answers, perf_counter() - started, tries - 1)

    @asynccontextmanager
    async def _noting_errors(self, entity: str) -> AsyncIterator[None]:
        """An error breaks an invariant, and not the other requests."""
        try:
            yield
        except StorageError as exc:
            self._log.broken("errors", entity, _told(exc))

    def _in_time(self) -> bool:
        return monotonic() < self._until + _DRAIN_SECONDS


async def _mark_returned(
    tx: Transaction, name: str, request: str, template: str, machines: Mapping[str, int]
) -> list[_Change]:
    """The return request, and its machines marked, if nobody changed them meanwhile."""
    metadata = {"of": request, "machine_ids": list(machines)}
    entity = _request(name, template, len(machines), "PENDING", "return") | {"metadata": metadata}
    fields = {"return_request_id": name, "status": "returning"}
    version = await tx.create_entity("requests", entity)
    versions = await tx.update_entities("machines", dict.fromkeys(machines, fields), machines)
    return [
        (Write("requests", "create", [name], entity), [version]),
        (Write("machines", "update", list(machines), fields), list(versions)),
    ]


def _acquire_request(name: str, template: str, count: int, status: str) -> dict[str, Any]:
    more = {"tags": {"owner": "数据"}, "metadata": {"whole": status == "PENDING", "ratio": 2.5}}
    return _request(name, template, count, status, "acquire") | more


def _request(name: str, template: str, count: int, status: str, kind: str) -> dict[str, Any]:
    return {
        "request_id": name,
        "template_id": template,
        "machine_count": count,
        "status": status,
        "request_type": kind,
    }


def _machine_fields(request: str, template: str) -> dict[str, Any]:
    return {
        "request_id": request,
        "template_id": template,
        "return_request_id": None,
        "status": "pending",
        "tags": {"Environment": "demo", "Owner": "数据"},
        "price": 0.0416,
    }


def _machines(names: Sequence[str], shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**machine(number), **shared, "machine_id": name} for number, name in enumerate(names)]


def _id(machine: Entity) -> str:
    return str(machine["machine_id"])


def _version(entity: Entity) -> int:
    return cast("int", entity["version"])


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _told(exc: StorageError) -> str:
    return f"{type(exc).__name__}: {exc}"
