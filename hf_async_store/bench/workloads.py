"""The workloads, named for what an orchestrator does.

Each notes what was acknowledged, and at the end the target has to show exactly that: a machine
counts its writes in a field, a store counts them in versions. A run against a target that lost one
fails, however fast it was.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Final

from hf_async_store.bench.data import (
    MACHINES_OF_A_REQUEST,
    STATUSES,
    Entity,
    machine,
    machine_id,
    request,
    request_id,
)
from hf_async_store.bench.places import Places
from hf_async_store.bench.plan import Claim, Claims, Place, Plan, Verdict, WrongAnswerError
from hf_async_store.bench.targets import (
    Acquires,
    Creates,
    CreatesMany,
    Gets,
    GetsAndSaves,
    Saves,
    SavesMany,
    StoreTarget,
    Target,
    Updates,
)
from hf_async_store.errors import BatchError, ConcurrencyConflictError, StorageError
from hf_async_store.migration import MigrationTool
from hf_async_store.strategies import open_store

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy

_MANY: Final = 1_000_000
"""Between the numbers of what two lanes create."""

_LIMIT: Final = 50
_CHANGED: Final = 0.3
_SETTLE_SECONDS: Final = 10.0
_COUNTED: Final = 100
_SAMPLE: Final = 500
"""Of a floor or a peer, which may read them back one by one."""


class Workload:
    """One kind of work on one target, in one process.

    Args:
        lanes: how many run in each process; no two processes share a lane.

    Attributes:
        needs: the protocol that a target has to have.
        unit: what is counted.
        counts: every write sets the field `count` of its machine to how many there were.
        writes: it changes what is stored before.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[type]
    unit: ClassVar[str] = "operations"
    counts: ClassVar[bool] = True
    writes: ClassVar[bool] = True

    def __init__(self, target: Any, plan: Plan, lanes: int) -> None:
        self.target = target
        self.plan = plan
        self.claims: Claims = {}
        self.retries = 0
        self.entities = plan.load.entities
        self.random = random.Random(f"{plan.seed}-{plan.index}")
        self.lanes = lanes * plan.load.processes
        self.first = lanes * plan.index

    async def prepare(self) -> None:
        """Whatever a round needs and should not be measured with it."""

    async def one(self, lane: int) -> int:
        """One operation; returns how many entities it was about."""
        raise NotImplementedError

    async def verify(self, target: Target, claims: Claims) -> Verdict:
        """Compare what a freshly opened target holds with what all processes claim together."""
        return await _verify(target, claims, self.entities, self.counts)

    def left_out(self) -> str | None:
        """Why this target cannot be measured with it, if so."""
        return None

    # -- what lanes own ----------------------------------------------------------------------

    def own(self, lane: int) -> int:
        """A stored machine that only this lane writes to."""
        share = self.entities // self.lanes
        return self.first + lane + self.random.randrange(share) * self.lanes

    def new(self, lane: int, made: int) -> int:
        """A number that nothing has yet."""
        return (self.first + lane + 1) * _MANY + made

    def machine(self, number: int, count: int = 0) -> Entity:
        return machine(number, self.plan.load.size, count)

    @asynccontextmanager
    async def claiming(self, *ids: str) -> AsyncIterator[list[Claim]]:
        """A write to these: acknowledged when the context is left, unknown if it ends in an error
        that does not say that nothing was written."""
        claims = [self.claims.setdefault(each, Claim()) for each in ids]
        try:
            yield claims
        except BaseException as exc:
            if not isinstance(exc, StorageError) or exc.outcome_unknown:
                for each in claims:
                    each.unknown += 1
            raise
        for each in claims:
            each.acknowledged += 1


class Save(Workload):
    name = "save"
    summary = "one machine, whole, insert or replace"
    needs: ClassVar[type] = Saves
    unit = "saves"
    target: Saves

    async def one(self, lane: int) -> int:
        number = self.own(lane)
        async with self.claiming(machine_id(number)) as (claim,):
            count = claim.acknowledged + claim.unknown + 1
            await self.target.save(self.machine(number, count))
        return 1


class Update(Workload):
    name = "update"
    summary = "two fields of one machine that is there"
    needs = Updates
    unit = "updates"
    target: Updates

    async def one(self, lane: int) -> int:
        number = self.own(lane)
        async with self.claiming(machine_id(number)) as (claim,):
            count = claim.acknowledged + claim.unknown + 1
            await self.target.update(machine_id(number), {"status": "RUNNING", "count": count})
        return 1


class Create(Workload):
    name = "create"
    summary = "one machine that must not be there yet"
    needs: ClassVar[type] = Creates
    unit = "creates"
    target: Creates

    def __init__(self, target: Any, plan: Plan, lanes: int) -> None:
        super().__init__(target, plan, lanes)
        self._made = 0

    async def one(self, lane: int) -> int:
        self._made += 1
        entity = self.machine(self.new(lane, self._made), count=1)
        entity["request_id"] = request_id(0)
        async with self.claiming(entity["machine_id"]):
            await self.target.create(entity)
        return 1


class CreateBatch(Create):
    name = "create batch"
    summary = "so many new machines in one call, each for itself"
    needs: ClassVar[type] = CreatesMany
    unit = "machines"
    target: CreatesMany  # type: ignore[assignment]  # each workload names what it needs

    async def one(self, lane: int) -> int:
        entities = self.batch(lane)
        async with self.claiming(*(each["machine_id"] for each in entities)):
            await self.target.create_many(entities)
        return len(entities)

    def batch(self, lane: int) -> list[Entity]:
        start = self.new(lane, self._made)
        self._made += self.plan.load.burst
        numbers = range(start, start + self.plan.load.burst)
        shared = {"request_id": request_id(0)}
        return [{**self.machine(number, count=1), **shared} for number in numbers]


class SaveBatch(Workload):
    name = "save batch"
    summary = "so many machines in one call, whole, each for itself"
    needs = SavesMany
    unit = "machines"
    target: SavesMany

    async def one(self, lane: int) -> int:
        count = min(self.plan.load.burst, self.entities // self.lanes)
        place = self.first + lane
        numbers = [place + each * self.lanes for each in range(count)]
        async with self.claiming(*map(machine_id, numbers)) as claims:
            entities = [
                self.machine(number, claim.acknowledged + claim.unknown + 1)
                for number, claim in zip(numbers, claims, strict=True)
            ]
            await self.target.save_many(entities)
        return count


class Acquire(Create):
    name = "acquire"
    summary = "a request and its machines, all or none, as the demo makes them"
    needs: ClassVar[type] = Acquires
    unit = "machines"
    target: Acquires  # type: ignore[assignment]  # each workload names what it needs

    async def one(self, lane: int) -> int:
        number = self.new(lane, self._made)
        size = self.plan.load.burst
        self._made += size
        asked = request(number, size)
        shared = {"request_id": asked["request_id"]}
        machines = [{**self.machine(each), **shared} for each in range(number, number + size)]
        async with self.claiming(asked["request_id"]):
            await self.target.acquire(asked, machines)
        return size

    async def verify(self, target: Target, claims: Claims) -> Verdict:
        """Every acknowledged request has all of its machines: the first and the last are looked
        for everywhere, and a store counts them."""
        size = self.plan.load.burst
        names = [name for name, each in claims.items() if each.acknowledged][:_COUNTED]
        firsts = [int(each.removeprefix("req-")) for each in names]
        ends = [machine_id(number) for each in firsts for number in (each, each + size - 1)]
        stored = await target.read_back(ends)
        failures = []
        for place, name in enumerate(names):
            if None in stored[2 * place : 2 * place + 2]:
                failures.append(f"{name}: acknowledged, and its machines are not all there")
            elif isinstance(target, StoreTarget):
                found = await _settled_count(target.store, {"request_id": name}, size)
                if found != size:
                    failures.append(f"{name}: {found:,} machines of {size:,}")
        return Verdict(len(names), failures)


class Get(Workload):
    name = "get"
    summary = "one machine by its key"
    needs = Gets
    unit = "gets"
    writes = False
    target: Gets

    async def one(self, lane: int) -> int:
        name = machine_id(self.random.randrange(self.entities))
        found = await self.target.get(name)
        if found is None or found["machine_id"] != name or found["count"] != 0:
            raise WrongAnswerError(name)
        return 1

    async def verify(self, target: Target, claims: Claims) -> Verdict:
        """Nothing was written, so everything has to be as it was."""
        numbers = self.random.sample(range(self.entities), min(self.entities, 1000))
        stored = await target.read_back([machine_id(each) for each in numbers])
        failures = []
        for number, found in zip(numbers, stored, strict=True):
            expected = self.machine(number)
            if found is None or any(found.get(name) != value for name, value in expected.items()):
                failures.append(f"{machine_id(number)}: is not as it was stored")
        return Verdict(len(numbers), failures)


class Mixed(Save):
    name = "mixed"
    summary = "gets of any machine and saves of an own one, 80 to 20 if nothing else is said"
    needs = GetsAndSaves
    unit = "operations"
    target: GetsAndSaves

    async def one(self, lane: int) -> int:
        if self.random.random() * 100 >= self.plan.load.reads:
            return await super().one(lane)
        number = self.random.randrange(self.entities)
        claim = self.claims.get(machine_id(number), _NOTHING)
        least = claim.acknowledged
        found = await self.target.get(machine_id(number))
        if found is None or found["machine_id"] != machine_id(number) or found["count"] < least:
            raise WrongAnswerError(f"{machine_id(number)}: older than what was acknowledged")
        return 1


class StoreWorkload(Workload):
    """Work that only a store of this package can do."""

    needs = StoreTarget
    target: StoreTarget

    @property
    def store(self) -> StorageStrategy:
        return self.target.store


class Poll(StoreWorkload):
    name = "poll"
    summary = "one request, its machines by index, and the changed ones written back"
    unit = "polls"
    counts = False

    async def one(self, lane: int) -> int:
        # Any request: two that poll the same one at once is what happens, and a conflict then.
        requests = max(1, self.entities // MACHINES_OF_A_REQUEST)
        name = request_id(self.random.randrange(requests))
        if await self.store.get_entity("requests", name) is None:
            raise WrongAnswerError(name)
        machines = await self.store.query_entities("machines", {"request_id": name})
        if not machines:
            raise WrongAnswerError(f"{name}: no machines")
        changed = [each for each in machines if self.random.random() < _CHANGED]
        await self._write({str(each["machine_id"]): int(each["version"]) for each in changed})  # type: ignore[arg-type]
        return 1

    async def _write(self, versions: dict[str, int]) -> None:
        """By compare-and-set: another poll of the same request may be faster."""
        status = {"status": self.random.choice(STATUSES)}
        outcomes: Sequence[object]
        try:
            outcomes = await self.store.update_entities(
                "machines", dict.fromkeys(versions, status), versions
            )
        except BatchError as exc:
            outcomes = exc.outcomes
        lost = [each for each in outcomes if isinstance(each, ConcurrencyConflictError)]
        for name, outcome in zip(versions, outcomes, strict=True):
            claim = self.claims.setdefault(name, Claim())
            if not isinstance(outcome, StorageError):
                claim.acknowledged += 1
            elif outcome.outcome_unknown:
                claim.unknown += 1
        others = [each for each in outcomes if isinstance(each, StorageError) and each not in lost]
        if others:
            raise others[0]
        if lost:
            raise lost[0]


class Query(StoreWorkload):
    name = "query"
    summary = "machines by status, newest first, at most 50"
    unit = "queries"
    writes = False

    async def one(self, lane: int) -> int:
        status = self.random.choice(STATUSES)
        found = await self.store.query_entities(
            "machines", {"status": status}, order_by="-created_at", limit=_LIMIT
        )
        wrong = [each for each in found if each["status"] != status]
        times = [str(each["created_at"]) for each in found]
        expected = min(_LIMIT, self.entities // len(STATUSES))
        if wrong or len(found) < expected or times != sorted(times, reverse=True):
            raise WrongAnswerError(status)
        return 1

    async def verify(self, target: Target, claims: Claims) -> Verdict:
        """The answers were looked at as they came; nothing else has become of the data."""
        assert isinstance(target, StoreTarget)
        found = await _settled_count(target.store, {}, self.entities)
        return Verdict(1, [] if found == self.entities else [f"{found:,} of {self.entities:,}"])


class Contend(StoreWorkload):
    name = "contend"
    summary = "all tasks count one entity up by compare-and-set"
    unit = "steps"
    COUNTER: Final = machine_id(0)

    async def one(self, lane: int) -> int:
        tries = 0

        def step(entity: Entity) -> Entity:
            nonlocal tries
            tries += 1
            return {**entity, "count": entity["count"] + 1}

        async with self.claiming(self.COUNTER):
            await self.store.modify_entity("machines", self.COUNTER, step)
        self.retries += tries - 1
        return 1


class OneShot(StoreWorkload):
    name = "one-shot"
    summary = "a whole process that shows one machine: hf-async-store get"
    unit = "processes"
    writes = False

    def left_out(self) -> str | None:
        if self.store.capabilities.processes:
            return None
        return "no other process can open such a store"

    async def one(self, lane: int) -> int:
        name = machine_id(self.random.randrange(self.entities))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "hf_async_store",
            "get",
            "machines",
            name,
            "--json",
            env={**os.environ, "HF_ASYNC_STORE": self.plan.place.url},
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
        if process.returncode or name.encode() not in output:
            raise WrongAnswerError(f"exit code {process.returncode}")
        return 1


class Migrate(StoreWorkload):
    name = "migrate"
    summary = "the whole store into a new JSON store, verified by the tool itself"
    unit = "machines"
    writes = False
    moved = 0

    async def one(self, lane: int) -> int:
        self.moved += 1
        folder = Path(self.plan.place.folder) / f"out-{self.plan.index}-{self.moved}"
        config = {"create_backup": False, "backup_location": f"{folder}/backups/"}
        async with MigrationTool(self.store, f"json:{folder}/store.json", config) as tool:
            report = await tool.migrate()
        await asyncio.to_thread(shutil.rmtree, folder)
        moved = report.collections["machines"].read
        if not report.verified or moved != self.entities:
            raise WrongAnswerError(f"{moved:,} of {self.entities:,} machines moved")
        return moved

    async def verify(self, target: Target, claims: Claims) -> Verdict:
        """Each migration was compared; the source is as it was."""
        assert isinstance(target, StoreTarget)
        found = await _settled_count(target.store, {}, self.entities)
        return Verdict(found, [] if found == self.entities else [f"{found:,} of {self.entities:,}"])


class MigrateIn(StoreWorkload):
    name = "migrate in"
    summary = "a JSON store of as many machines into a new store, verified by the tool itself"
    unit = "machines"
    writes = False

    def __init__(self, target: Any, plan: Plan, lanes: int) -> None:
        super().__init__(target, plan, lanes)
        self._places = Places.beside(plan.subject, plan.place)
        self._source = ""
        self._ready: list[Place] = []
        self._used: list[Place] = []

    async def prepare(self) -> None:
        """The source, and a new place to move it to: making a database takes a while."""
        if not self._source:
            self._source = f"json:{self._places.__enter__().folder}/source.json"
            async with open_store(self._source) as source:
                machines = [self.machine(each) for each in range(self.entities)]
                await StoreTarget(source).fill(machines)
        while self._used:
            self._places.remove(self.plan.subject, self._used.pop())
        if not self._ready:
            self._ready.append(self._places.make(self.plan.subject))

    async def one(self, lane: int) -> int:
        place = self._ready.pop() if self._ready else self._places.make(self.plan.subject)
        self._used.append(place)
        config = {"create_backup": False, "backup_location": f"{place.folder}/backups/"}
        async with MigrationTool(self._source, place.url, config) as tool:
            report = await tool.migrate()
        moved = report.collections["machines"].written
        if not report.verified or moved != self.entities:
            raise WrongAnswerError(f"{moved:,} of {self.entities:,} machines moved")
        return moved

    async def verify(self, target: Target, claims: Claims) -> Verdict:
        """What was moved last is still there; the tool compared each by itself."""
        async with open_store(self._used[-1].url) as store:
            can = store.capabilities
            lives_on = can.durable or can.processes
            found = await _settled_count(store, {}, self.entities) if lives_on else self.entities
        for each in (*self._used, *self._ready):
            self._places.remove(self.plan.subject, each)
        self._places.__exit__()
        return Verdict(found, [] if found == self.entities else [f"{found:,} of {self.entities:,}"])


_NOTHING: Final = Claim()


async def _verify(target: Target, claims: Claims, loaded: int, counts: bool) -> Verdict:
    """Each entity that was written to: the field `count` of a machine, the version in a store."""
    ids = list(claims)
    if not isinstance(target, StoreTarget) and len(ids) > _SAMPLE:
        ids = random.Random(0).sample(ids, _SAMPLE)
    failures = []
    for name, stored in zip(ids, await target.read_back(ids), strict=True):
        claim = claims[name]
        least, most = claim.acknowledged, claim.acknowledged + claim.unknown
        if stored is None:
            if least:
                failures.append(f"{name}: acknowledged, and not there")
            continue
        if counts and not least <= stored["count"] <= most:
            failures.append(f"{name}: counts {stored['count']}, {least} were acknowledged")
        if "version" in stored and isinstance(target, StoreTarget):
            before = 1 if int(name.removeprefix("i-"), 16) < loaded else 0
            if not before + least <= stored["version"] <= before + most:
                what = f"version {stored['version']}, {before + least} was acknowledged"
                failures.append(f"{name}: {what}")
    return Verdict(len(ids), failures)


async def _settled_count(store: StorageStrategy, filters: dict[str, object], expected: int) -> int:
    """How many machines match; where queries may be behind, once they have caught up."""
    patience = monotonic() + _SETTLE_SECONDS
    while True:
        found = await store.count_entities("machines", filters)
        behind = store.capabilities.query_isolation == "eventual" and found != expected
        if not behind or monotonic() > patience:
            return found
        await asyncio.sleep(0.2)


WORKLOADS: Final[dict[str, type[Workload]]] = {
    each.name: each
    for each in (
        Acquire,
        Save,
        Poll,
        Get,
        Query,
        Contend,
        Mixed,
        OneShot,
        Migrate,
        MigrateIn,
        Create,
        Update,
        CreateBatch,
        SaveBatch,
    )
}
