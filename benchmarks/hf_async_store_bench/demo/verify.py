"""The end of the run: what all processes logged, against what a freshly opened store holds.

Everything is counted from the logs alone; nothing of what the store said about itself is believed.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from contextlib import aclosing
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from hf_async_store import Collection, Entity, StorageStrategy, begins_with
from hf_async_store_bench.acked_writes import AckedWrites

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from hf_async_store_bench.demo.data import Entities
    from hf_async_store_bench.demo.write_log import Answer, Operation, ProcessLog, Write

EntityKey: TypeAlias = "tuple[str, str]"
"""A collection and an id."""

_BATCH: Final = 500
_AT_ONCE: Final = 16
_SETTLE_SECONDS: Final = 10.0
_OF_THE_STORE: Final = frozenset({"version", "created_at", "updated_at"})


class Invariant:
    """Something that has to hold, and where it does not."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.checked = 0
        self.failures: list[str] = []

    def check(self, holds: bool, place: EntityKey | str, what: str) -> None:
        """Count a check; name the entity if it fails."""
        self.checked += 1
        if not holds:
            name = place if isinstance(place, str) else "/".join(place)
            self.failures.append(f"{name}: {what}")


class EntityHistory:
    """What the notes know of one entity."""

    __slots__ = ("deleted", "maybe", "twice", "versions")

    def __init__(self) -> None:
        self.versions: dict[int, Write] = {}
        """The acknowledged writes by the version that each made."""
        self.twice: list[int] = []
        self.deleted = False
        self.maybe: list[Write] = []
        """The writes of which nobody knows."""

    def take(self, write: Write, answer: Answer) -> None:
        """Add a write and what became of it."""
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

    def writes(self, *kinds: str) -> AckedWrites:
        """How many writes of these kinds were acknowledged, and of how many nobody knows."""
        acknowledged = sum(each.kind in kinds for each in self.versions.values())
        return AckedWrites(acknowledged, len(self.may(*kinds)))

    @property
    def created(self) -> bool:
        return any(each.kind == "create" for each in self.versions.values())


async def read_back(store: StorageStrategy, prefix: str, base: Entities) -> Entities:
    """All that the run made or loaded, as it is stored now."""
    return {name: await _read_collection(store, name, prefix, base[name]) for name in base}


async def compare_indexes(
    store: StorageStrategy, stored: Entities, prefix: str, invariant: Invariant
) -> None:
    """Ask for the machines of each request by index, and compare with the walk over all."""
    of_request = Counter(each["request_id"] for each in stored["machines"].values())
    turns = asyncio.Semaphore(_AT_ONCE)
    patience = monotonic() + (
        _SETTLE_SECONDS if store.capabilities.query_isolation == "eventual" else 0
    )

    async def compare(request: str) -> None:
        async with turns:
            found = await store.count_entities("machines", {"request_id": request})
            while found != of_request[request] and monotonic() < patience:
                await asyncio.sleep(0.2)
                found = await store.count_entities("machines", {"request_id": request})
        what = f"the index finds {found} machines, a walk over all {of_request[request]}"
        invariant.check(found == of_request[request], ("requests", request), what)

    async with asyncio.TaskGroup() as group:
        for name in stored["requests"]:
            if name.startswith(prefix):
                group.create_task(compare(name))


class Verifier:
    """The invariants of a run.

    Args:
        notes: of each process.
        base: what was there before the first noted write, by the files themselves where possible.
        stored: what is there now.
    """

    def __init__(
        self,
        notes: Sequence[ProcessLog],
        base: Entities,
        stored: Entities,
        collections: Mapping[str, Collection],
        prefix: str,
    ) -> None:
        self._notes = notes
        self._base = base
        self._stored = stored
        self._collections = collections
        self._prefix = prefix
        self._histories: defaultdict[EntityKey, EntityHistory] = defaultdict(EntityHistory)
        self._of_the_killed: set[EntityKey] = set()
        for each in notes:
            self._add(each)

    def invariants(self) -> list[Invariant]:
        """Every invariant, checked."""
        return [
            self._acknowledged(),
            self._versions(),
            self._contents(),
            self._counters(),
            self._loaded(),
            self._counts(),
            self._transactions(),
            self._orphans(),
            self._noted("pollers", "a poll that sees PENDING finds every machine", reads=True),
            self._finished(),
            self._noted("errors", "no error but conflicts"),
        ]

    def landed(self, unanswered: Iterable[Operation]) -> int:
        """How many of the writes whose answer nobody got show in the store."""
        left = {place: self._surplus(place, history) for place, history in self._histories.items()}
        landed = 0
        for operation in unanswered:
            for write, name, _ in operation.each():
                place = (write.collection, name)
                if left[place] > 0 or self._shows(write, name):
                    left[place] -= 1
                    landed += 1
                    break
        return landed

    def _surplus(self, place: EntityKey, history: EntityHistory) -> int:
        """How many versions there are beyond those that were acknowledged."""
        stored, was = self._at(place), self._was(place)
        first = 0 if was is None else _version(was)
        return 0 if stored is None else _version(stored) - first - len(history.versions)

    def _add(self, notes: ProcessLog) -> None:
        for operation in notes.operations:
            for write, name, answer in operation.each():
                self._histories[write.collection, name].take(write, answer)
                if notes.killed and write.kind == "create":
                    self._of_the_killed.add((write.collection, name))

    # -- entity by entity --------------------------------------------------------------------

    def _acknowledged(self) -> Invariant:
        invariant = Invariant("acknowledged", "every acknowledged write is there, and no other")
        for place, history in self._histories.items():
            wrong = self._missing(place, history, self._at(place))
            invariant.check(wrong is None, place, wrong or "")
        for collection, entities in self._stored.items():
            for name in entities:
                if (collection, name) not in self._histories and name not in self._base[collection]:
                    invariant.check(False, (collection, name), "is there, and nobody wrote it")
        for each in self._told("acknowledged"):
            invariant.failures.append(each)
        return invariant

    def _missing(
        self, place: EntityKey, history: EntityHistory, stored: Entity | None
    ) -> str | None:
        known = history.created or self._was(place) is not None
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

    def _versions(self) -> Invariant:
        invariant = Invariant("versions", "versions are as many as the acknowledged writes")
        for place, history in self._histories.items():
            wrong = self._miscounted(place, history, self._at(place))
            invariant.check(wrong is None, place, wrong or "")
        return invariant

    def _miscounted(
        self, place: EntityKey, history: EntityHistory, stored: Entity | None
    ) -> str | None:
        if history.twice:
            return f"version {history.twice[0]} was acknowledged to two writers"
        was = self._was(place)
        first = 0 if was is None else _version(was)
        writes = history.writes("create", "update", "add")
        most = first + writes.tried
        odd = sorted(each for each in history.versions if not first < each <= most)
        if odd:
            return f"version {odd[0]} was acknowledged; {len(history.versions)} writes from {first}"
        return None if stored is None else writes.wrong_version(_version(stored), first)

    def _contents(self) -> Invariant:
        invariant = Invariant("contents", "the last acknowledged value of every field is there")
        for place, history in self._histories.items():
            stored = self._at(place)
            if stored is not None:
                for field, value in self._expected(place, history).items():
                    found = stored.get(field)
                    invariant.check(
                        _same(self._collections[place[0]], field, value, found),
                        place,
                        f"{field} is {found!r}; {value!r} was acknowledged",
                    )
        return invariant

    def _expected(self, place: EntityKey, history: EntityHistory) -> dict[str, Any]:
        """The fields of an entity after all acknowledged writes, but for those in doubt."""
        expected: dict[str, Any] = dict(self._was(place) or {})
        for write in history.may("create"):
            expected |= write.fields  # nobody else creates it, and it is there
        for _, write in sorted(history.versions.items()):
            expected |= write.fields
        unsure = {field for write in history.may("update", "add") for field in write.fields}
        counted = {
            field
            for write in history.versions.values()
            if write.kind == "add"
            for field in write.fields
        }
        left_out = unsure | counted | {"version", "updated_at"}
        return {field: value for field, value in expected.items() if field not in left_out}

    def _counters(self) -> Invariant:
        invariant = Invariant("counters", "counters are as high as the acknowledged steps")
        for place, history in self._histories.items():
            steps = history.writes("add")
            stored = self._at(place)
            if steps.acknowledged and stored is not None:
                first = int(cast("int", (self._was(place) or {}).get("uses", 0)))
                wrong = steps.wrong_count(stored.get("uses"), first)
                invariant.check(wrong is None, place, wrong or "")
        return invariant

    def _loaded(self) -> Invariant:
        invariant = Invariant("loaded", "loaded entities that nobody wrote are as they were")
        for collection, entities in self._base.items():
            for name, was in entities.items():
                if (collection, name) not in self._histories:
                    wrong = self._changed(collection, was, self._at((collection, name)))
                    invariant.check(wrong is None, (collection, name), wrong or "")
        return invariant

    def _changed(self, collection: str, was: Entity, stored: Entity | None) -> str | None:
        if stored is None:
            return "is gone"
        if _version(was) != _version(stored):
            return f"had version {_version(was)}, has {_version(stored)}"
        more = stored.keys() - was.keys() - _OF_THE_STORE
        if more:
            return f"has more fields than before: {', '.join(sorted(more))}"
        declared = self._collections[collection]
        for field, value in was.items():
            if field != "version" and not _same(declared, field, value, stored.get(field)):
                return f"{field} was {value!r}, is {stored.get(field)!r}"
        return None

    # -- entities together -------------------------------------------------------------------

    def _counts(self) -> Invariant:
        invariant = Invariant("counts", "a request has its machines, less those that went back")
        there = Counter(each["request_id"] for each in self._stored["machines"].values())
        back: Counter[str] = Counter()
        for each in self._mine("return"):
            if each["status"] == "COMPLETED":
                metadata = cast("dict[str, Any]", each["metadata"])
                back[metadata["of"]] += cast("int", each["machine_count"])
        for each in self._mine("acquire"):
            name, asked = str(each["request_id"]), cast("int", each["machine_count"])
            left = asked - back[name]
            holds = there[name] <= left if each["status"] == "creating" else there[name] == left
            what = f"{asked} machines, {back[name]} went back, {there[name]} are there"
            invariant.check(holds, ("requests", name), what)
        return invariant

    def _transactions(self) -> Invariant:
        """All or nothing, also of those that were under way at a kill."""
        invariant = Invariant("transactions", "transactions were applied whole, or not at all")
        for operation in self._operations():
            if operation.intent.whole:
                shown = [
                    ((write.collection, name), self._shows(write, name))
                    for write, name, _ in operation.each()
                ]
                whole = all(here is not False for _, here in shown)
                nothing = operation.answers is None and not any(here for _, here in shown)
                part = next((place for place, here in shown if here is False), ("", ""))
                what = f"is not there, and other parts of its {operation.intent.work} are"
                invariant.check(whole or nothing, part, what)
        return invariant

    def _shows(self, write: Write, name: str) -> bool | None:
        """Whether a write can be seen, or something that came only after it; None: cannot tell."""
        history = self._histories[write.collection, name]
        stored = self._at((write.collection, name))
        if any(write is each for each in history.versions.values()):
            # Whether its values are still there is the question of another invariant.
            return (
                stored is not None or history.deleted or (None if history.may("delete") else False)
            )
        if write.kind == "create":
            return stored is not None or bool(history.versions) or history.deleted
        if write.kind == "delete":
            # Gone, but by another's acknowledged delete.
            return None if history.deleted and write in history.maybe else stored is None
        if stored is None:
            return None
        return all(stored.get(field) == value for field, value in write.fields.items())

    def _orphans(self) -> Invariant:
        invariant = Invariant("orphans", "whatever an entity refers to is there")
        for collection, entities in self._stored.items():
            references = [
                (field.name, str(field.references))
                for field in self._collections[collection].references
            ]
            if collection == "machines":
                references.append(("return_request_id", "requests"))
            for name, entity in entities.items():
                for field, parents in references:
                    parent = entity.get(field)
                    if parent is not None:
                        holds = self._is_there(parents, str(parent))
                        what = f"{field} names {parent!r}, which is not there"
                        invariant.check(holds, (collection, name), what)
        return invariant

    def _is_there(self, collection: str, name: str) -> bool:
        ours = name.startswith(self._prefix) or name in self._base[collection]
        # In a store of the user's, a parent may be one that the run did not load.
        return name in self._stored[collection] or not ours

    def _finished(self) -> Invariant:
        """Only what a killed process was still creating may be left as it was."""
        invariant = self._noted("finished", "every request came to its end")
        invariant.checked = 0
        for each in (*self._mine("acquire"), *self._mine("return")):
            place = ("requests", str(each["request_id"]))
            died = each["status"] == "creating" and place in self._of_the_killed
            invariant.check(each["status"] == "COMPLETED" or died, place, f"is {each['status']}")
        for notes in self._notes:
            if not notes.killed:
                invariant.failures += map(_unanswered, notes.unanswered)
        return invariant

    # -- small things ------------------------------------------------------------------------

    def _noted(self, name: str, text: str, *, reads: bool = False) -> Invariant:
        """What processes saw with their own eyes while they worked."""
        invariant = Invariant(name, text)
        invariant.failures += self._told(name)
        for each in self._notes:
            invariant.checked += len(each.reads if reads else each.operations)
        return invariant

    def _told(self, name: str) -> list[str]:
        return [
            f"{each.entity}: {each.what}"
            for notes in self._notes
            for each in notes.broken
            if each.invariant == name
        ]

    def _operations(self) -> Iterator[Operation]:
        for notes in self._notes:
            yield from notes.operations

    def _mine(self, kind: str) -> Iterable[Entity]:
        for name, each in self._stored["requests"].items():
            if name.startswith(self._prefix) and each["request_type"] == kind:
                yield each

    def _at(self, place: EntityKey) -> Entity | None:
        return self._stored[place[0]].get(place[1])

    def _was(self, place: EntityKey) -> Entity | None:
        return self._base[place[0]].get(place[1])


async def _read_collection(
    store: StorageStrategy, name: str, prefix: str, base: Mapping[str, Entity]
) -> dict[str, Entity]:
    key = store.collections[name].key
    found: dict[str, Entity] = {}
    async with aclosing(store.stream_entities(name, {key: begins_with(prefix)})) as rows:
        async for each in rows:
            found[str(each[key])] = each
    ids = list(base)
    for start in range(0, len(ids), _BATCH):
        batch = ids[start : start + _BATCH]
        entities = await store.get_entities(name, batch)
        found |= {str(each[key]): each for each in entities if each is not None}
    return found


def _unanswered(operation: Operation) -> str:
    write = operation.intent.writes[0]
    return f"{write.collection}/{write.ids[0]}: {operation.intent.work} was never answered"


def _version(entity: Entity) -> int:
    return cast("int", entity.get("version", 0))


def _same(declared: Collection, field: str, one: object, other: object) -> bool:
    """Equal, type for type; of a declared timestamp, the same moment in time."""
    known = declared.fields.get(field)
    if known is not None and known.type == "timestamp":
        return _moment(one) == _moment(other)
    return one is other or _text(one) == _text(other)


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _moment(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return value
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
