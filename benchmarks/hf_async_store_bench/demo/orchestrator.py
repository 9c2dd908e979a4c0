"""The orchestrator of one process: it asks for machines, and works on requests that it has claimed, of
whichever process: watches their machines start, and returns some, many requests at once. It waits for the
store to tell it, and polls nothing.

Whatever the store answers goes into the write log; a conflict is a normal answer, any other error
breaks the invariant "no errors", and the work goes on. Nothing here knows an engine.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter
from typing import Any, Final, TypeAlias, cast

import msgspec

import hf_async_store as hfas
from hf_async_store import Changes, Claim, Entity, StorageError, StorageStrategy, Transaction
from hf_async_store_bench.concurrency import side_by_side
from hf_async_store_bench.data import batches, machine, settled_count, transaction_limit, utc_now
from hf_async_store_bench.demo.data import OPEN
from hf_async_store_bench.demo.plan import Plan
from hf_async_store_bench.demo.write_log import Answer, Broken, Hold, Read, Write, WriteLog, answer

_FLOWS: Final = 12  # requests that one process has under way at once
_FEW: Final = 4  # the same where each watcher reads a feed of several parts by itself
_LEASE: Final = 3.0  # seconds after which the claims of a killed process end
_WAIT: Final = 0.05  # seconds for which a flow looks for something to claim
_IDLE: Final = 0.5  # the same when nothing is left to ask for
_LATE: Final = 60.0  # seconds without a change after which what was expected is missing
_LEFT: Final = 0.2  # the share of the rounds after which whoever claims the request next goes on
_PIECEMEAL_EVERY: Final = 4  # of so many requests one gets its machines in batches in any case
_BATCH: Final = 100
_READY: Final = 0.7  # the share of the waiting machines that start in a round
_RETURNED: Final = 0.6
_DRAIN_SECONDS: Final = 60.0  # how long what was begun may take beyond the time of the run
_STUCK_SECONDS: Final = 15.0  # how long after that a call counts as stuck
_NORMAL: Final = (hfas.ConcurrencyConflictError, hfas.EntityNotFoundError, hfas.ClaimLostError)

_Change: TypeAlias = tuple[Write, list[Answer]]


class _LeftError(Exception):
    """The rest is left to whoever claims the request next."""


@dataclass(eq=False)
class Orchestrator:
    """One process's part of the work; `progress` is told how many requests have come to their end."""

    _store: StorageStrategy
    _log: WriteLog
    _plan: Plan
    _progress: Callable[[int], None] = lambda done: None

    def __post_init__(self) -> None:
        plan, can = self._plan, self._store.capabilities
        self._random = random.Random(f"{plan.settings.seed}-{plan.index}")
        self._limit = transaction_limit(can)
        self._eventual = can.query_isolation == "eventual"
        self._until = monotonic() + plan.settings.seconds
        self._patience = asyncio.timeout(None)
        self._open = {"status": "PENDING", "request_id": hfas.begins_with(plan.prefix)}
        self._returns = itertools.count()
        self._awaited: set[str] = set()
        self._tasks = asyncio.TaskGroup()
        self._done = 0

    async def run(self) -> None:
        """All of the plan, or what fits in its time; what was begun is completed, unless the store
        never answers."""
        more = itertools.repeat(5) if self._plan.endless else ()
        waiting = enumerate(itertools.chain(self._plan.sizes, more))
        patience = self._plan.settings.seconds + _DRAIN_SECONDS + _STUCK_SECONDS
        with suppress(TimeoutError):
            async with asyncio.timeout(patience) as self._patience, self._tasks as tasks:
                tasks.create_task(self._adopt())
                for _ in range(_FLOWS if self._store.capabilities.feed_order else _FEW):
                    tasks.create_task(self._serve_all(waiting))

    async def sweep(self) -> int:
        """Complete what is left when all processes have ended, also what a killed one had claimed, once
        its leases have ended; returns how many requests that were."""
        self._until = monotonic()
        swept: set[str] = set()
        if self._eventual:
            await asyncio.sleep(1)  # for the index to learn of the last writes
        while self._in_time():
            await self._adopt()
            left = await self._store.query_entities("requests", self._open)
            if not left:
                break
            names = [str(each["request_id"]) for each in left]
            swept.update(names)
            await side_by_side(self._work, map(_single, names), at_once=_FLOWS)
            await asyncio.sleep(_WAIT)
        return len(swept)

    async def _serve_all(self, waiting: Iterator[tuple[int, int]]) -> None:
        for number, size in waiting:
            if monotonic() >= self._until:
                break
            await self._ask(number, size)
            while await self._work(self._open, wait=_WAIT) and self._in_time():
                pass
        while self._awaited and self._in_time():  # others may have left them, or have been killed
            await self._work(self._open, wait=_IDLE)

    async def _ask(self, number: int, size: int) -> None:
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
            self._awaited.add(request)
            self._tasks.create_task(self._await(request, size))

    async def _await(self, request: str, size: int) -> None:
        """Wait until somebody has completed a request, and look at what it is then."""
        started = perf_counter()
        async with self._noting_errors(f"requests/{request}"):
            left = max(0.1, self._until + _DRAIN_SECONDS - monotonic())
            wanted = {"status": "COMPLETED"}
            found = await self._store.wait_for("requests", request, wanted, timeout=left)
            self._log.note(Read("wait", perf_counter() - started))
            asked = {"request_id": request, "machine_count": size, **wanted}
            if not found["completed_at"] or {**found, **asked} != found:
                what = f"was awaited, and is {found}"
                self._log.note(Broken("waiters", f"requests/{request}", what))
        self._awaited.discard(request)

    async def _work(self, wanted: Mapping[str, object], wait: float = 0.0) -> bool:
        """Claim a request, and work on it; False if none of these is free."""
        claims: list[Claim] = []
        async with self._noting_errors("requests"):
            since = monotonic()
            claims = await self._store.claim_entities("requests", wanted, lease=_LEASE, wait=wait)
        for claim in claims:
            async with self._noting_errors(f"requests/{claim.id}"):
                await self._work_on(claim, Hold(claim.id, claim.token, monotonic(), since + _LEASE))
        return bool(claims)

    async def _work_on(self, claim: Claim, hold: Hold) -> None:
        self._log.note(hold)
        try:
            async with claim:
                ours = claim.id.startswith(self._plan.prefix)
                is_return = ours and claim.entity["request_type"] == "return"
                if is_return:
                    await self._terminate(claim)
                completed = not is_return and await self._run_machines(claim)
                # Noted before the release: after it, another may begin.
                self._log.note(msgspec.structs.replace(hold, until=monotonic(), ended=True))
        except hfas.ClaimLostError:
            self._log.note(hold)  # it was held for its first lease at least
            return
        if completed:
            self._done += 1
            self._progress(self._done)
            await self._give_back(claim)

    async def _acquire_whole(self, request: str, template: str, machines: list[str]) -> None:
        """The request and its machines in one transaction: all of them or nothing."""
        more = {"tags": {"owner": "数据"}, "metadata": {"whole": True, "ratio": 2.5}}
        entity = _request(request, template, len(machines), "acquire", **more)
        shared = _machine_fields(request, template)

        async def work(tx: Transaction) -> list[_Change]:
            request_write = Write("requests", "create", [request], entity)
            machine_write = Write("machines", "create", machines, shared)
            version = await tx.create_entity("requests", entity)
            versions = await tx.create_entities("machines", _machines(machines, shared))
            return [(request_write, [version]), (machine_write, list(versions))]

        await self._transaction("acquire", work)

    async def _acquire_piecemeal(self, request: str, template: str, machines: list[str]) -> None:
        """The request, its machines in batches, and only then PENDING: holders rely on that."""
        entity = _request(request, template, len(machines), "acquire", status="creating")
        write = Write("requests", "create", [request], entity)
        creating = self._store.create_entity("requests", entity)
        (version,) = await self._write("create", write, creating)
        if not isinstance(version, int):
            return  # noted already; its machines would have no parent
        shared = _machine_fields(request, template)
        for batch in batches(machines, _BATCH):
            write = Write("machines", "create", list(batch), shared)
            creates = self._store.create_entities("machines", _machines(batch, shared))
            await self._write("create batch", write, creates)
        fields = {"status": "PENDING"}
        update = self._store.update_entity("requests", request, fields, expected_version=version)
        await self._write("request write", Write("requests", "update", [request], fields), update)

    async def _run_machines(self, claim: Claim) -> bool:
        """See all machines run, and complete the request; False if that is left to others."""
        try:
            async with self._store.watch("machines", {"request_id": claim.id}) as changes:
                waiting = await self._look(claim)  # after it is watched: so nothing is between
                names = {str(each["machine_id"]) for each in waiting}
                seeing = partial(self._see_running, claim.id, changes, names)
                await side_by_side(lambda each: each(), (seeing, partial(self._start_all, waiting)))
        except _LeftError:
            return False
        if names:
            return False  # whoever claims it next looks again
        fields = {"status": "COMPLETED", "completed_at": utc_now()}

        async def finish() -> int:
            await claim.finish(fields)
            return claim.version

        write = Write("requests", "update", [claim.id], fields)
        return isinstance((await self._write("request write", write, finish()))[0], int)

    async def _give_back(self, claim: Claim) -> None:
        """Two returns at once that want some of the same machines: each machine goes once."""
        machines = [str(each["machine_id"]) for each in await self._machines_of(claim.id)]
        await side_by_side(lambda _: self._return(claim, machines), range(2))

    async def _return(self, claim: Claim, machines: list[str]) -> None:
        name = f"{self._plan.prefix}return-{self._plan.index}-{next(self._returns):04}"
        wanted = [each for each in machines if self._random.random() < _RETURNED]
        if self._limit is not None:
            wanted = wanted[: self._limit - 1]

        async def work(tx: Transaction) -> list[_Change]:
            found = [each for each in await tx.get_entities("machines", wanted) if each]
            running = [
                i for i in found if i["status"] == "running" and not i.get("return_request_id")
            ]
            free = {str(each["machine_id"]): cast("int", each["version"]) for each in running}
            return await _mark_returned(tx, name, claim.entity, free) if free else []

        async with self._noting_errors(f"requests/{name}"):
            await self._transaction("return", work)

    async def _terminate(self, claim: Claim) -> None:
        """The machines go, and the return is COMPLETED, in one transaction under the claim."""
        machines = cast("dict[str, Any]", claim.entity["metadata"])["machine_ids"]
        fields = {"status": "COMPLETED", "completed_at": utc_now()}

        async def work(tx: Transaction) -> list[_Change]:
            gone = await tx.delete_entities("machines", machines)
            version = await tx.update_entity("requests", claim.id, fields)
            return [
                (Write("machines", "delete", machines), [answer(each) for each in gone]),
                (Write("requests", "update", [claim.id], fields), [version]),
            ]

        with suppress(hfas.ConcurrencyConflictError):  # whoever claims it next tries again
            await self._transaction("terminate", work, claim)
            await claim.finish()

    async def _look(self, claim: Claim) -> list[Entity]:
        """The machines of a request that do not run yet."""
        started = perf_counter()
        machines = await self._machines_of(claim.id)
        self._log.note(Read("look", perf_counter() - started))
        if claim.id.startswith(self._plan.prefix):
            machines = await self._expect_all(claim, machines)
        if self._eventual:
            names = [str(each["machine_id"]) for each in machines]
            machines = [each for each in await self._store.get_entities("machines", names) if each]
        return [each for each in machines if _is_pending(each)]

    async def _see_running(self, request: str, changes: Changes, waiting: set[str]) -> None:
        """Follow the changes until none of these machines waits any more."""
        while waiting:
            try:
                async with asyncio.timeout(_LATE):
                    change = await anext(changes)
            except TimeoutError:
                what = f"{len(waiting)} of its machines were not seen running, as {min(waiting)}"
                self._log.note(Broken("changes", f"requests/{request}", what))
                return
            if change.entity is None or not _is_pending(change.entity):
                waiting.discard(change.id)

    async def _machines_of(self, request: str) -> list[Entity]:
        return await self._store.query_entities("machines", {"request_id": request}, "created_at")

    async def _expect_all(self, claim: Claim, machines: list[Entity]) -> list[Entity]:
        """A PENDING request has all of its machines; until it is COMPLETED, none of them leaves."""
        count = cast("int", claim.entity["machine_count"])
        if self._eventual and len(machines) != count:
            await settled_count(self._store, {"request_id": claim.id}, count)
            machines = await self._machines_of(claim.id)
        if len(machines) != count:
            await claim.renew()  # if it was lost, another holder may have returned some
            what = f"is PENDING, and its holder found {len(machines)} of {count} machines"
            self._log.note(Broken("machines", f"requests/{claim.id}", what))
        return machines

    async def _start_all(self, waiting: list[Entity]) -> None:
        """What a provider does: some machines start in each round, written by compare-and-set."""
        while waiting:
            self._random.shuffle(waiting)
            size = max(1, int(len(waiting) * _READY))
            started, waiting = waiting[:size], waiting[size:]
            fields = {"status": "running", "started_at": utc_now()}
            versions = {str(each["machine_id"]): cast("int", each["version"]) for each in started}
            write = Write("machines", "update", list(versions), fields)
            changes = dict.fromkeys(versions, fields)
            updates = self._store.update_entities("machines", changes, versions)
            answers = await self._write("status write", write, updates)
            if self._random.random() < _LEFT or not self._in_time():
                raise _LeftError
            doubtful = [i for i, v in zip(versions, answers, strict=True) if not isinstance(v, int)]
            again = await self._store.get_entities("machines", doubtful)
            waiting += [each for each in again if each and _is_pending(each)]

    async def _count_up(self, template: str) -> None:
        """All flows of all processes count up the same few entities: each step must count."""
        write = Write("templates", "add", [template], {"uses": 1})
        counting = self._store.modify_entity("templates", template, _one_more)
        await self._write("count up", write, counting)

    async def _adopt(self) -> None:
        """Go on with the open requests of the loaded data."""
        for name in self._plan.adopted:
            while await self._work(_single(name)) and self._in_time():
                pass

    async def _write(
        self, work: str, write: Write, call: Awaitable[int | Sequence[int | bool]]
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
        except asyncio.CancelledError:
            self._cancelled(number)
            raise
        seconds = perf_counter() - started
        answers = [answer(each) for each in outcomes]
        self._log.done(number, [answers], seconds)
        for name, each in zip(write.ids, outcomes, strict=True):
            if isinstance(each, StorageError) and not isinstance(each, _NORMAL):
                self._log.note(Broken("errors", f"{write.collection}/{name}", repr(each)))
        return answers

    async def _transaction(
        self,
        work: str,
        attempt: Callable[[Transaction], Awaitable[list[_Change]]],
        claim: Claim | None = None,
    ) -> None:
        """Writes that land together, noted just before the commit; retried on conflicts, or only tried
        under a claim."""
        number = 0

        async def noted(tx: Transaction) -> list[_Change]:
            nonlocal number
            if number:
                self._log.done(number, None)
                number = 0
            changes = await attempt(tx)
            if changes:
                number = self._log.intent(work, [write for write, _ in changes], whole=True)
            return changes

        started = perf_counter()
        try:
            if claim is None:
                changes = await self._store.run_transaction(noted)
            else:
                async with claim.transaction() as tx:
                    changes = await noted(tx)
        except StorageError as exc:
            if number and not exc.outcome_unknown:
                self._log.done(number, None)
            raise
        except asyncio.CancelledError:
            self._cancelled(number)
            raise
        if number:
            self._log.done(number, [each for _, each in changes], perf_counter() - started)

    @asynccontextmanager
    async def _noting_errors(self, entity: str) -> AsyncIterator[None]:
        """An error breaks an invariant, and not the other requests."""
        try:
            yield
        except StorageError as exc:
            self._log.note(Broken("errors", entity, repr(exc)))

    def _cancelled(self, number: int) -> None:
        """A lost claim ends what is under way under it; at the end of all patience, it is stuck."""
        if number and not self._patience.expired():
            self._log.done(number, [])

    def _in_time(self) -> bool:
        return monotonic() < self._until + _DRAIN_SECONDS


async def _mark_returned(
    tx: Transaction, name: str, request: Entity, machines: Mapping[str, int]
) -> list[_Change]:
    """The return request, and its machines marked, if nobody changed them meanwhile."""
    metadata = {"of": request["request_id"], "machine_ids": list(machines)}
    template = request.get("template_id")
    entity = _request(name, template, len(machines), "return", metadata=metadata)
    fields = {"return_request_id": name, "status": "returning"}
    version = await tx.create_entity("requests", entity)
    versions = await tx.update_entities("machines", dict.fromkeys(machines, fields), machines)
    return [
        (Write("requests", "create", [name], entity), [version]),
        (Write("machines", "update", list(machines), fields), list(versions)),
    ]


def _is_pending(machine: Entity) -> bool:
    return str(machine["status"]).lower() == "pending"


def _one_more(template: Entity) -> Mapping[str, object]:
    return {**template, "uses": cast("int", template.get("uses", 0)) + 1}


def _single(request: str) -> dict[str, Any]:
    return {"request_id": request, "status": hfas.in_(OPEN)}


def _request(name: str, template: object, count: int, kind: str, **more: object) -> dict[str, Any]:
    entity = {"request_id": name, "template_id": template, "machine_count": count}
    return {**entity, "status": "PENDING", "request_type": kind, **more}


def _machine_fields(request: str, template: str) -> dict[str, Any]:
    fields = {"request_id": request, "template_id": template, "return_request_id": None}
    tags = {"Environment": "demo", "Owner": "数据"}
    return {**fields, "status": "pending", "tags": tags, "price": 0.0416}


def _machines(names: Sequence[str], shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**machine(number), **shared, "machine_id": name} for number, name in enumerate(names)]
