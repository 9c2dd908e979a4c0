"""The end of the run: what all processes logged, against what a freshly opened store holds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, Final, cast

import msgspec

from hf_async_store import Collection, Entity, EntityChange, StorageStrategy, begins_with
from hf_async_store.values import Key
from hf_async_store_bench.acked_writes import AckedWrites
from hf_async_store_bench.concurrency import side_by_side
from hf_async_store_bench.data import batches, settled_count
from hf_async_store_bench.demo.data import Entities, streamed
from hf_async_store_bench.demo.recorder import WATCHED, EntityKey
from hf_async_store_bench.demo.write_log import Answer, Hold, Operation, ProcessLog, Write

_OF_THE_STORE: Final = frozenset({"version", "created_at", "updated_at"})


@dataclass
class Invariant:
    """Something that has to hold, and where it does not."""

    name: str
    text: str
    checked: int = 0
    failures: list[str] = field(default_factory=list)

    def check(self, place: EntityKey, wrong: str | None) -> None:
        """Count a check; name the entity if something is wrong with it."""
        self.checked += 1
        if wrong is not None:
            self.failures.append(f"{'/'.join(place)}: {wrong}")


@dataclass(slots=True)
class EntityHistory:
    """What the notes know of one entity: the acknowledged writes by the version that each made, the
    versions that two writers got, and the writes of which nobody knows."""

    versions: dict[int, Write] = field(default_factory=dict)
    twice: list[int] = field(default_factory=list)
    deleted: bool = False
    maybe: list[Write] = field(default_factory=list)

    def take(self, write: Write, answer: Answer) -> None:
        if answer == "unknown":
            self.maybe.append(write)
        elif answer == "deleted":
            self.deleted = True
        elif isinstance(answer, int):
            if answer in self.versions:
                self.twice.append(answer)
            self.versions[answer] = write

    def may(self, *kinds: str) -> list[Write]:
        """The writes of these kinds that may have been applied."""
        return [each for each in self.maybe if each.kind in kinds]

    def created(self) -> list[Write]:
        """The creation, if it was acknowledged or may have been applied."""
        return [each for each in (*self.versions.values(), *self.maybe) if each.kind == "create"]

    def writes(self, *kinds: str) -> AckedWrites:
        """How many writes of these kinds were acknowledged, and of how many nobody knows."""
        acknowledged = sum(each.kind in kinds for each in self.versions.values())
        return AckedWrites(acknowledged, len(self.may(*kinds)))


async def read_back(store: StorageStrategy, prefix: str, base: Entities) -> Entities:
    """All that the run made or loaded, as it is stored now."""
    stored: Entities = {}
    for name, loaded in base.items():
        key = store.collections[name].key
        found = await streamed(store, name, {key: begins_with(prefix)})
        for batch in batches(list(loaded), 500):
            entities = await store.get_entities(name, batch)
            found |= {str(each[key]): each for each in entities if each is not None}
        stored[name] = found
    return stored


async def compare_indexes(store: StorageStrategy, stored: Entities, prefix: str) -> Invariant:
    """Ask for the machines of each request by index, and compare with the walk over all."""
    invariant = Invariant("indexes", "index queries agree with a full scan")
    of_request = Counter(each["request_id"] for each in stored["machines"].values())

    async def compare(request: str) -> None:
        expected = of_request[request]
        found = await settled_count(store, {"request_id": request}, expected)
        wrong = f"the index finds {found} machines, a walk over all {expected}"
        invariant.check(("requests", request), None if found == expected else wrong)

    requests = [each for each in stored["requests"] if each.startswith(prefix)]
    await side_by_side(compare, requests, at_once=16)
    return invariant


async def purge(store: StorageStrategy, expired: Sequence[str]) -> Invariant:
    """Remove what has expired, and look also with a reader to which nothing is absent before that."""
    invariant = Invariant("expired", "what has expired is absent, and is removed by a purge")
    if expired:
        await store.purge_expired("requests")
    async with store.snapshot(expired=True) as reader:
        for batch in batches(expired, 500):
            absent = await store.get_entities("requests", batch)
            removed = await reader.fetch([Key("requests", each) for each in batch])
            for name, *found in zip(batch, absent, removed, strict=True):
                wrong = None if found == [None, None] else "has expired, and is there"
                invariant.check(("requests", name), wrong)
    return invariant


@dataclass
class Verifier:
    """The invariants of a run: of the logs of all processes, what was there before, and what is now."""

    logs: Sequence[ProcessLog]
    base: Entities
    stored: Entities
    collections: Mapping[str, Collection]
    prefix: str

    def __post_init__(self) -> None:
        self._histories: defaultdict[EntityKey, EntityHistory] = defaultdict(EntityHistory)
        self._of_the_killed: set[EntityKey] = set()
        self.expired: list[str] = []  # requests that were acknowledged as completed, and expire
        for log in self.logs:
            for operation in log.operations:
                for write, name, answer in operation.each():
                    self._histories[write.collection, name].take(write, answer)
                    if operation.intent.work == "terminate" and write.collection == "requests":
                        self._expire(name, answer)
                    if log.killed and write.kind == "create":
                        self._of_the_killed.add((write.collection, name))

    def _expire(self, name: str, completed: Answer) -> None:
        """The completion of a return deletes it, where it expires."""
        if self.collections["requests"].expires is not None:
            gone: Answer = "deleted" if isinstance(completed, int) else completed
            self._histories["requests", name].take(Write("requests", "delete", [name]), gone)
            self.expired += [name] if gone == "deleted" else []

    def invariants(self) -> list[Invariant]:
        complete = "whoever claims a PENDING request finds every machine"
        waits = "whoever waited for a request got it completed"
        reads = Counter(read.work for each in self.logs for read in each.reads)
        writes = sum(len(each.operations) for each in self.logs)
        found = [*self._entity_by_entity(), self._loaded(), self._counts(), self._transactions()]
        found += [self._orphans(), self._holders()]
        found += [self._noted("machines", complete, reads["look"])]
        found += [self._noted("waiters", waits, reads["wait"]), self._finished()]
        return [*found, self._noted("errors", "no error but conflicts", writes)]

    def to_come(self) -> set[tuple[EntityKey, Answer]]:
        """All that was acknowledged in the collections that are watched."""
        watched = [each for each in self._histories.items() if each[0][0] in WATCHED]
        versions = {(place, version) for place, history in watched for version in history.versions}
        return versions | {(place, "deleted") for place, history in watched if history.deleted}

    def changes(self, heard: Mapping[EntityKey, Sequence[EntityChange]]) -> Invariant:
        """What came through the feeds, against what was acknowledged."""
        text = "no change was missed by a watcher, and none came that nobody made"
        invariant = self._noted("changes", text)
        for place in {*heard, *self._histories}:
            ours = place in self._histories or place[1].startswith(self.prefix) or self._was(place)
            if place[0] in WATCHED and ours:
                history, changes = self._histories[place], heard.get(place, ())
                wrong = self._misheard(place, history, changes)
                invariant.check(place, wrong or self._misquoted(place, history, changes))
        return invariant

    def _misheard(
        self, place: EntityKey, history: EntityHistory, changes: Sequence[EntityChange]
    ) -> str | None:
        """Each change may come again, but the versions have one order without a gap."""
        came = [each for each, _ in groupby((each.kind, each.version) for each in changes)]
        first = _version(self._was(place))
        last = first + sum(kind == "put" for kind, _ in came)
        deletes = sum(kind == "delete" for kind, _ in came)
        puts = [("put", each) for each in range(first + 1, last + 1)]
        if came != [*puts, *[("delete", last)] * deletes]:
            return f"came with a gap, or in a wrong order: {came}"
        if max(history.versions, default=0) > last or deletes < history.deleted:
            return f"was acknowledged after version {last} as well, and that did not come"
        written = history.writes("create", "update", "add").tried
        if len(puts) > written or deletes > history.deleted + len(history.may("delete")):
            return f"{came[-1][0]} of version {last} came, and nobody made it"
        return None

    def _misquoted(
        self, place: EntityKey, history: EntityHistory, changes: Sequence[EntityChange]
    ) -> str | None:
        for each in changes:
            entity, write = each.entity or {}, history.versions.get(each.version)
            for name, value in write.fields.items() if write and entity else ():
                if not self._same(place, name, value, entity):
                    return f"version {each.version} came without {name} {value!r}, as acknowledged"
        return None

    def applied(self, unanswered: Iterable[Operation]) -> int:
        """How many of the writes whose answer nobody got show in the store."""
        left: dict[EntityKey, int] = {}  # versions beyond those that were acknowledged
        for place, history in self._histories.items():
            known = _version(self._was(place)) + len(history.versions)
            left[place] = _version(self._at(place)) - known if self._at(place) else 0
        applied = 0
        for operation in unanswered:
            for write, name, _ in operation.each():
                place = (write.collection, name)
                if left[place] > 0 or self._shows(write, name):
                    left[place] -= 1
                    applied += 1
                    break
        return applied

    def taken_over(self, log: ProcessLog) -> int:
        """How many of the requests that a process held at its end were claimed by others then."""
        held = {each.request: each.token for each in log.holds.values() if not each.ended}
        return len({i.request for i in self._holds() if i.token > held.get(i.request, i.token)})

    def _entity_by_entity(self) -> Iterator[Invariant]:
        acked = self._noted("acknowledged", "every acknowledged write is stored, and no other")
        versions = Invariant("versions", "each version equals the number of acknowledged writes")
        contents = Invariant("contents", "each field has its last acknowledged value")
        counters = Invariant("counters", "each counter equals its acknowledged increments")
        for place, history in self._histories.items():
            acked.check(place, self._missing(place, history))
            versions.check(place, self._miscounted(place, history))
            stored, steps = self._at(place), history.writes("add")
            if stored is not None:
                for name, value in self._expected(place, history).items():
                    wrong = f"{name} is {stored.get(name)!r}; {value!r} was acknowledged"
                    same = self._same(place, name, value, stored)
                    contents.check(place, None if same else wrong)
                if steps.acknowledged:
                    first = int(cast("int", (self._was(place) or {}).get("uses", 0)))
                    counters.check(place, steps.wrong_count(stored.get("uses"), first))
        for collection, entities in self.stored.items():
            for name in entities:
                if (collection, name) not in self._histories and name not in self.base[collection]:
                    acked.check((collection, name), "is there, and nobody wrote it")
        yield from (acked, versions, contents, counters)

    def _missing(self, place: EntityKey, history: EntityHistory) -> str | None:
        stored = self._at(place)
        created = any(each.kind == "create" for each in history.versions.values())
        known = created or self._was(place) is not None
        last = max(history.versions, default=0)
        if stored is None:
            gone = history.deleted or history.may("delete")
            if gone or not (known or history.versions):
                return None
            return f"is gone; version {last} was acknowledged, and no delete of it"
        if history.deleted:
            return "is there, and its delete was acknowledged"
        if not known and not history.may("create"):
            return "is there, and nobody created it"
        if _version(stored) < last:
            return f"version {last} was acknowledged, version {_version(stored)} is stored"
        return None

    def _miscounted(self, place: EntityKey, history: EntityHistory) -> str | None:
        if history.twice:
            return f"version {history.twice[0]} was acknowledged to two writers"
        stored, first = self._at(place), _version(self._was(place))
        writes = history.writes("create", "update", "add")
        most = first + writes.tried
        odd = sorted(each for each in history.versions if not first < each <= most)
        if odd:
            return f"version {odd[0]} was acknowledged; {len(history.versions)} writes from {first}"
        return None if stored is None else writes.wrong_version(_version(stored), first)

    def _expected(self, place: EntityKey, history: EntityHistory) -> dict[str, Any]:
        """The fields of an entity after all acknowledged writes, but for those in doubt."""
        expected: dict[str, Any] = dict(self._was(place) or {})
        for write in history.may("create"):
            expected |= write.fields  # nobody else creates it, and it is there
        for _, write in sorted(history.versions.items()):
            expected |= write.fields
        counted = [each for each in history.versions.values() if each.kind == "add"]
        left_out = {"version", "updated_at"}
        for write in (*history.may("update", "add"), *counted):
            left_out |= write.fields.keys()
        return {name: value for name, value in expected.items() if name not in left_out}

    def _loaded(self) -> Invariant:
        invariant = Invariant("loaded", "initial entities that were not written are unchanged")
        for collection, entities in self.base.items():
            for name, was in entities.items():
                if (collection, name) not in self._histories:
                    invariant.check((collection, name), self._changed((collection, name), was))
        return invariant

    def _changed(self, place: EntityKey, was: Entity) -> str | None:
        stored = self._at(place)
        if stored is None:
            return "is gone"
        if _version(was) != _version(stored):
            return f"had version {_version(was)}, has {_version(stored)}"
        more = stored.keys() - was.keys() - _OF_THE_STORE
        if more:
            return f"has more fields than before: {', '.join(sorted(more))}"
        for name, value in was.items():
            if name != "version" and not self._same(place, name, value, stored):
                return f"{name} was {value!r}, is {stored.get(name)!r}"
        return None

    def _counts(self) -> Invariant:
        invariant = Invariant("counts", "each request has its machines, except returned ones")
        there = Counter(each["request_id"] for each in self.stored["machines"].values())
        back: Counter[str] = Counter()
        for (collection, name), history in self._histories.items():
            gone = history.deleted or history.may("delete")
            if collection == "machines" and gone and self._at((collection, name)) is None:
                back.update(each.fields["request_id"] for each in history.created())
        for each in self._mine("acquire"):
            name, asked = str(each["request_id"]), cast("int", each["machine_count"])
            left = asked - back[name]
            holds = there[name] <= left if each["status"] == "creating" else there[name] == left
            wrong = f"{asked} machines, {back[name]} went back, {there[name]} are there"
            invariant.check(("requests", name), None if holds else wrong)
        return invariant

    def _transactions(self) -> Invariant:
        """All or nothing, also of those that were under way at a kill."""
        invariant = Invariant("transactions", "each transaction was applied whole or not at all")
        operations = (each for log in self.logs for each in log.operations)
        for operation in operations:
            if operation.intent.whole:
                each = [((write.collection, name), write) for write, name, _ in operation.each()]
                shown = {place: self._shows(write, place[1]) for place, write in each}
                missing = [place for place, here in shown.items() if here is False]
                nothing = operation.answers is None and not any(shown.values())
                wrong = f"is not there, and other parts of its {operation.intent.work} are"
                broken = bool(missing) and not nothing
                invariant.check(next(iter(missing or shown)), wrong if broken else None)
        return invariant

    def _shows(self, write: Write, name: str) -> bool | None:
        """Whether a write can be seen, or something that came only after it; None: cannot tell."""
        history = self._histories[write.collection, name]
        stored = self._at((write.collection, name))
        if any(write is each for each in history.versions.values()):
            # Whether its values are still there is the question of another invariant.
            if stored is not None or history.deleted:
                return True
            return None if history.may("delete") else False
        if write.kind == "create":
            return stored is not None or bool(history.versions) or history.deleted
        if write.kind == "delete":
            # Gone, but by another's acknowledged delete.
            return None if history.deleted and write in history.maybe else stored is None
        if stored is None:
            return None
        return all(stored.get(name) == value for name, value in write.fields.items())

    def _orphans(self) -> Invariant:
        invariant = Invariant("orphans", "every referenced entity exists")
        for collection, entities in self.stored.items():
            declared = self.collections[collection].references
            references = [(each.name, str(each.references)) for each in declared]
            if collection == "machines":
                references.append(("return_request_id", "requests"))
            for name, entity in entities.items():
                for reference, parents in references:
                    parent = entity.get(reference)
                    # In a store of the user's, a parent may be one that the run did not load.
                    known = str(parent).startswith(self.prefix) or parent in self.base[parents]
                    if parent is not None:
                        there = parent in self.stored[parents] or not known
                        wrong = f"{reference} names {parent!r}, which is not there"
                        invariant.check((collection, name), None if there else wrong)
        return invariant

    def _holders(self) -> Invariant:
        """One claim after another, also after a kill, each with a greater token."""
        invariant = Invariant("holders", "no request was worked on by two holders at once")
        last: dict[str, Hold] = {}
        for each in sorted(self._holds(), key=lambda each: each.began):
            one = last.get(each.request, each)
            wrong = one is not each and (each.token <= one.token or each.began < one.until)
            late = f"claim {each.token} began {each.began - one.until:.2f} s after claim {one.token} ended"
            invariant.check(("requests", each.request), late if wrong else None)
            last[each.request] = each
        return invariant

    def _holds(self) -> Iterator[Hold]:
        return (each for log in self.logs for each in log.holds.values())

    def _finished(self) -> Invariant:
        """Only what a killed process was still creating may be left as it was."""
        invariant = self._noted("finished", "every request was completed")
        for each in (*self._mine("acquire"), *self._mine("return")):
            place, status = ("requests", str(each["request_id"])), each["status"]
            died = status == "creating" and place in self._of_the_killed
            invariant.check(place, None if status == "COMPLETED" or died else f"is {status}")
        for log in self.logs:
            for operation in () if log.killed else log.unanswered:
                write, work = operation.intent.writes[0], operation.intent.work
                where = f"{write.collection}/{write.ids[0]}"
                invariant.failures.append(f"{where}: {work} was never answered")
        return invariant

    def _noted(self, name: str, text: str, checked: int = 0) -> Invariant:
        """What processes saw with their own eyes while they worked."""
        broken = [each for log in self.logs for each in log.broken if each.invariant == name]
        return Invariant(name, text, checked, [f"{each.entity}: {each.what}" for each in broken])

    def _same(self, place: EntityKey, name: str, value: object, stored: Entity) -> bool:
        """Equal, type for type; of a declared timestamp, the same moment in time."""
        known, found = self.collections[place[0]].fields.get(name), stored.get(name)
        if known is not None and known.type == "timestamp":
            return _moment(value) == _moment(found)
        one, other = (msgspec.json.encode(each, order="sorted") for each in (value, found))
        return one == other

    def _mine(self, kind: str) -> Iterator[Entity]:
        for name, each in self.stored["requests"].items():
            if name.startswith(self.prefix) and each["request_type"] == kind:
                yield each

    def _at(self, place: EntityKey) -> Entity | None:
        return self.stored[place[0]].get(place[1])

    def _was(self, place: EntityKey) -> Entity | None:
        return self.base[place[0]].get(place[1])


def _version(entity: Entity | None) -> int:
    return cast("int", (entity or {}).get("version", 0))


def _moment(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return value
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
