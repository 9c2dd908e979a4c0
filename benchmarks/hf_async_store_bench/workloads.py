"""The workloads, named for what an orchestrator does. Each notes what was acknowledged, and at the end the
system has to show exactly that. A slot is one of the concurrent tasks: only it writes to its machines."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, cast

import hf_async_store as hfas
from hf_async_store import ConcurrencyConflictError, StorageError, StorageStrategy
from hf_async_store_bench import data
from hf_async_store_bench.acked_writes import AckedByEntity, AckedWrites, lost_writes, writing
from hf_async_store_bench.adapters import StoreAdapter
from hf_async_store_bench.data import Entity
from hf_async_store_bench.messages import Plan, VerificationResult, WrongAnswerError

_MANY: Final = 1_000_000  # between the numbers of what two slots create
_LIMIT: Final = 50
_CHANGED: Final = 0.3
_COUNTED: Final = 100
_SAMPLE: Final = 500  # of a baseline or a competitor, which may read them back one by one
_NOTHING: Final = AckedWrites()
_FIRST_REQUEST: Final = data.request_id(0)

WORKLOADS: Final[dict[str, type[Workload]]] = {}  # by their names


class Workload:
    """One kind of work on one system, in the slots of one process. It needs some methods of the adapter;
    if it counts, every write sets the field `count` of its machine to how many there were."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "operations"
    counts: ClassVar[bool] = True
    writes: ClassVar[bool] = True

    def __init_subclass__(cls, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(cls, name, value)
        if attributes:
            WORKLOADS[cls.name] = cls

    def __init__(self, system: Any, plan: Plan, slots: int) -> None:
        self.system = system
        self.plan = plan
        self.acked: AckedByEntity = {}
        self.retries = 0
        self.made = 0
        self.entities = plan.load.entities
        self.random = random.Random(f"{plan.seed}-{plan.index}")
        self.slots = slots * plan.load.processes
        self.first = slots * plan.index

    @classmethod
    def can_measure(cls, adapter: type) -> bool:
        """Whether such an adapter has all that it needs."""
        return all(hasattr(adapter, each) for each in cls.needs)

    def skipped(self) -> str | None:
        """Why this system cannot be measured with it, if so."""
        return None

    async def one(self, slot: int) -> int:
        """One operation; returns how many entities it was about."""
        raise NotImplementedError

    async def verify(self, system: Any, acked: AckedByEntity) -> VerificationResult:
        """Compare what a freshly opened system holds with what all processes wrote together."""
        ids = list(acked)
        first: dict[str, int] | None = None
        if isinstance(system, StoreAdapter):
            first = {i: int(int(i.removeprefix("i-"), 16) < self.entities) for i in ids}
        elif len(ids) > _SAMPLE:
            ids = random.Random(0).sample(ids, _SAMPLE)
        stored = zip(ids, await system.read_back(ids), strict=True)
        counter = "count" if self.counts else None
        failures = lost_writes(acked, stored, counter=counter, first_version=first)
        return VerificationResult(len(ids), failures)

    def own(self, slot: int) -> int:
        """A stored machine that only this slot writes to."""
        share = self.entities // self.slots
        return self.first + slot + self.random.randrange(share) * self.slots

    def any(self) -> str:
        return data.machine_id(self.random.randrange(self.entities))

    def new(self, slot: int) -> int:
        """A number from which on no machine is there yet."""
        return (self.first + slot + 1) * _MANY + self.made

    def machine(self, number: int, count: int = 0) -> Entity:
        return data.machine(number, self.plan.load.size, count)

    def fresh(self, slot: int, count: int, of: str = _FIRST_REQUEST) -> list[Entity]:
        """New machines of a request."""
        start = self.new(slot)
        self.made += count
        numbers = range(start, start + count)
        return [{**self.machine(each, count=1), "request_id": of} for each in numbers]

    def acked_of(self, *ids: str) -> list[AckedWrites]:
        return [self.acked.setdefault(each, AckedWrites()) for each in ids]

    async def get(self) -> Mapping[str, Any]:
        """Get any machine, and see that it is the one, and not older than what was acknowledged."""
        name = self.any()
        least = self.acked.get(name, _NOTHING).acknowledged
        found = await self.system.get(name)
        if found is None or found["machine_id"] != name or found["count"] < least:
            raise WrongAnswerError(f"{name}: another, or older than what was acknowledged")
        return cast("Mapping[str, Any]", found)


class Save(Workload, name="save", needs=("save",), unit="saves"):
    """One machine, whole, insert or replace."""

    async def one(self, slot: int) -> int:
        number = self.own(slot)
        (entry,) = self.acked_of(data.machine_id(number))
        with writing(entry):
            await self.system.save(self.machine(number, entry.tried + 1))
        return 1


class Update(Workload, name="update", needs=("update",), unit="updates"):
    """Two fields of one machine that is there."""

    async def one(self, slot: int) -> int:
        name = data.machine_id(self.own(slot))
        (entry,) = self.acked_of(name)
        with writing(entry):
            await self.system.update(name, {"status": "RUNNING", "count": entry.tried + 1})
        return 1


class Create(Workload, name="create", needs=("create",), unit="creates"):
    """One machine that must not be there yet."""

    async def one(self, slot: int) -> int:
        (entity,) = self.fresh(slot, 1)
        with writing(*self.acked_of(entity["machine_id"])):
            await self.system.create(entity)
        return 1


class CreateBatch(Workload, name="create batch", needs=("create_many",), unit="machines"):
    """So many new machines in one call, each for itself."""

    async def one(self, slot: int) -> int:
        entities = self.fresh(slot, self.plan.load.burst)
        with writing(*self.acked_of(*(each["machine_id"] for each in entities))):
            await self.write(entities)
        return len(entities)

    async def write(self, entities: list[Entity]) -> None:
        await self.system.create_many(entities)


class ImportBatch(CreateBatch, name="import batch", needs=("import_many",)):
    """So many new machines as they are, as when data is loaded in bulk."""

    async def write(self, entities: list[Entity]) -> None:
        await self.system.import_many([{**each, "version": 1} for each in entities])


class SaveBatch(Workload, name="save batch", needs=("save_many",), unit="machines"):
    """So many machines in one call, whole, each for itself."""

    async def one(self, slot: int) -> int:
        count = min(self.plan.load.burst, self.entities // self.slots)
        numbers = [self.first + slot + each * self.slots for each in range(count)]
        entries = self.acked_of(*map(data.machine_id, numbers))
        counts = [each.tried + 1 for each in entries]
        with writing(*entries):
            await self.system.save_many(list(map(self.machine, numbers, counts)))
        return count


class Acquire(Workload, name="acquire", needs=("acquire",), unit="machines"):
    """A request and its machines, all or none, as the demo makes them."""

    async def one(self, slot: int) -> int:
        size = self.plan.load.burst
        asked = data.request(self.new(slot), size)
        machines = self.fresh(slot, size, of=asked["request_id"])
        with writing(*self.acked_of(asked["request_id"])):
            await self.system.acquire(asked, machines)
        return size

    async def verify(self, system: Any, acked: AckedByEntity) -> VerificationResult:
        """Every acknowledged request has all of its machines: the first and the last are looked
        for everywhere, and a store counts them."""
        size = self.plan.load.burst
        names = [name for name, each in acked.items() if each.acknowledged][:_COUNTED]
        firsts = [int(each.removeprefix("req-")) for each in names]
        ends = [data.machine_id(number) for each in firsts for number in (each, each + size - 1)]
        stored = await system.read_back(ends)
        failures = []
        for place, name in enumerate(names):
            if None in stored[2 * place : 2 * place + 2]:
                failures.append(f"{name}: acknowledged, and its machines are not all there")
            elif isinstance(system, StoreAdapter):
                found = await data.settled_count(system.store, {"request_id": name}, size)
                if found != size:
                    failures.append(f"{name}: {found:,} machines of {size:,}")
        return VerificationResult(len(names), failures)


class Get(Workload, name="get", needs=("get",), unit="gets", writes=False):
    """One machine by its key."""

    async def one(self, slot: int) -> int:
        found = await self.get()
        if found["count"] != 0:
            raise WrongAnswerError(found["machine_id"])
        return 1

    async def verify(self, system: Any, acked: AckedByEntity) -> VerificationResult:
        """Nothing was written, so everything has to be as it was."""
        numbers = self.random.sample(range(self.entities), min(self.entities, 1000))
        ids = list(map(data.machine_id, numbers))
        failures = []
        for name, number, found in zip(ids, numbers, await system.read_back(ids), strict=True):
            expected = self.machine(number).items()  # a null may be stored as nothing
            if found is None or any(found.get(field) != value for field, value in expected):
                failures.append(f"{name}: is not as it was stored")
        return VerificationResult(len(numbers), failures)


class Mixed(Save, name="mixed", needs=("get", "save"), unit="operations"):
    """Gets of any machine and saves of an own one, 80 to 20 if nothing else is said."""

    async def one(self, slot: int) -> int:
        if self.random.random() * 100 >= self.plan.load.reads:
            return await super().one(slot)
        await self.get()
        return 1


class OneShot(Workload, name="one-shot", needs=("run_process",), unit="processes", writes=False):
    """A whole process that shows one machine: hf-async-store get."""

    def skipped(self) -> str | None:
        store = self.system.store if isinstance(self.system, StoreAdapter) else None
        alone = store is not None and not store.capabilities.multi_process
        return "no other process can open such a store" if alone else None

    async def one(self, slot: int) -> int:
        await self.system.run_process(self.any())
        return 1

    async def verify(self, system: Any, acked: AckedByEntity) -> VerificationResult:
        return VerificationResult(1, [])


class StoreWorkload(Workload):
    """Work that only a store of the product can do."""

    def __init__(self, system: Any, plan: Plan, slots: int) -> None:
        super().__init__(system, plan, slots)
        self.store: StorageStrategy = system.store

    @classmethod
    def can_measure(cls, adapter: type) -> bool:
        return issubclass(adapter, StoreAdapter)


class Poll(StoreWorkload, name="poll", unit="polls", counts=False):
    """One request, its machines by index, and the changed ones written back."""

    async def one(self, slot: int) -> int:
        # Any request: two that poll the same one at once is what happens, and a conflict then.
        requests = max(1, self.entities // data.MACHINES_OF_A_REQUEST)
        name = data.request_id(self.random.randrange(requests))
        request = await self.store.get_entity("requests", name)
        machines = await self.store.query_entities("machines", {"request_id": name})
        if request is None or not machines:
            raise WrongAnswerError(f"{name}: it or its machines are missing")
        changed = [each for each in machines if self.random.random() < _CHANGED]
        # By compare-and-set: another poll of the same request may be faster.
        versions = {str(each["machine_id"]): cast("int", each["version"]) for each in changed}
        status = {"status": self.random.choice(data.STATUSES)}
        changes = dict.fromkeys(versions, status)
        outcomes: Sequence[object]
        try:
            outcomes = await self.store.update_entities("machines", changes, versions)
        except hfas.BatchError as exc:
            outcomes = exc.outcomes
        errors = [each if isinstance(each, StorageError) else None for each in outcomes]
        for entry, error in zip(self.acked_of(*versions), errors, strict=True):
            entry.note(error)
        # What is no conflict is told first.
        for error in sorted(
            filter(None, errors), key=lambda e: isinstance(e, ConcurrencyConflictError)
        ):
            raise error
        return 1


class Query(StoreWorkload, name="query", unit="queries", writes=False):
    """Machines by status, newest first, at most 50."""

    async def one(self, slot: int) -> int:
        status = self.random.choice(data.STATUSES)
        found = await self.store.query_entities(
            "machines", {"status": status}, order_by="-created_at", limit=_LIMIT
        )
        wrong = [each for each in found if each["status"] != status]
        times = [str(each["created_at"]) for each in found]
        expected = min(_LIMIT, self.entities // len(data.STATUSES))
        if wrong or len(found) < expected or times != sorted(times, reverse=True):
            raise WrongAnswerError(status)
        return 1

    async def verify(self, system: Any, acked: AckedByEntity) -> VerificationResult:
        """Nothing was written."""
        found = await data.settled_count(system.store, {}, self.entities)
        wrong = [] if found == self.entities else [f"{found:,} of {self.entities:,} machines"]
        return VerificationResult(found, wrong)


class Contend(StoreWorkload, name="contend", unit="steps"):
    """All tasks count one entity up by compare-and-set."""

    async def one(self, slot: int) -> int:
        counter, tries = data.machine_id(0), 0

        def step(entity: Entity) -> Entity:
            nonlocal tries
            tries += 1
            return {**entity, "count": entity["count"] + 1}

        with writing(*self.acked_of(counter)):
            await self.store.modify_entity("machines", counter, step)
        self.retries += tries - 1
        return 1


class Increment(StoreWorkload, name="increment", unit="steps"):
    """All tasks count one entity up by an operation of the store."""

    async def one(self, slot: int) -> int:
        counter = data.machine_id(0)
        with writing(*self.acked_of(counter)):
            await self.store.update_entity("machines", counter, {"count": hfas.increment(1)})
        return 1
