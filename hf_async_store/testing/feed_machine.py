"""A state machine of writes and readers of a change feed, compared with a model of it.

It is used as `state_machine.run_machine`.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from hf_async_store.testing.assertions import payload
from hf_async_store.testing.concurrency import HANG_SECONDS
from hf_async_store.testing.feed import all_until, by_entity
from hf_async_store.testing.harness import FED, UNFED
from hf_async_store.testing.state_machine import LONG, SHORT, MakeStores

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Sequence

    from hf_async_store.feed import Changes, EntityChange
    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.values import Entity

_IDS: Final = st.sampled_from(["a", "b", "c"])
_LABELS: Final = st.sampled_from(["x", "y"])
_WANTED: Final = "x"
"""The label for which the second reader has a filter."""


class _Write(NamedTuple):
    """A change: of a label of None, a deletion."""

    id: str
    label: str | None


_WRITES: Final = st.builds(_Write, _IDS, st.none() | _LABELS)


class _Expected(NamedTuple):
    """A change that the feed must contain, with the entity before and after it."""

    before: Entity | None
    after: Entity | None

    def told(self) -> tuple[str, str, int]:
        entity = self.after or self.before
        assert entity is not None, "it is no change"
        version = entity["version"]
        assert isinstance(version, int)
        return "put" if self.after else "delete", str(entity["note_id"]), version

    def matches(self) -> bool:
        return any(each is not None and each["label"] == _WANTED for each in self)


def _contents(
    changes: Iterable[tuple[tuple[str, str, int], Entity | None]], entity_id: str
) -> list[tuple[int, object]]:
    """The versions and contents of an entity in order. Of a change that came again, the last one counts."""
    found: list[tuple[int, object]] = []
    for (_, changed, version), entity in changes:
        if changed == entity_id:
            if found and found[-1][0] == version and (entity is None) == (found[-1][1] is None):
                found.pop()
            found.append((version, payload(entity)))
    return found


def run_feed_machine(make: MakeStores, *, long: bool = False) -> None:
    """Test the feed of an engine with many random runs; see `state_machine.run_machine`."""

    class Machine(FeedMachine):
        make_stores = staticmethod(make)

    run_state_machine_as_test(Machine, settings=LONG if long else SHORT)


class FeedMachine(RuleBasedStateMachine):
    """Writes to a collection with a feed, while two readers read and begin anew."""

    make_stores: ClassVar[MakeStores]

    def __init__(self) -> None:
        super().__init__()
        self._expected: list[_Expected] = []
        self._read: list[EntityChange] = []
        self._wanted: list[EntityChange] = []
        self._readers = AsyncExitStack()
        with ExitStack() as stack:
            self._runner = stack.enter_context(asyncio.Runner(loop_factory=asyncio.new_event_loop))
            self._stores = stack.enter_context(type(self).make_stores())
            self._store = self._stores((FED, UNFED))
            self._run(self._store.open())
            self._run(self._watch(None, None))
            self._stack = stack.pop_all()

    def _run(self, work: Awaitable[object]) -> None:
        async def awaited() -> None:
            async with asyncio.timeout(HANG_SECONDS):
                await work

        self._runner.run(awaited())

    def teardown(self) -> None:
        with self._stack:
            try:
                self._run(self._read_all())
                told = [(each.kind, each.id, each.version) for each in self._read]
                assert by_entity(told) == by_entity(each.told() for each in self._expected)
                matching = [each for each in self._expected if each.matches()]
                wanted = [(each.kind, each.id, each.version) for each in self._wanted]
                assert by_entity(wanted) == by_entity(each.told() for each in matching)
                self._compare_entities()
            finally:
                self._run(self._readers.aclose())
                self._run(self._store.close())

    async def _read_all(self) -> None:
        for label in ("y", _WANTED):  # the last one of the second reader is the last one of all
            await self._write(self._store, [_Write(f"last {label}", label)])
        last = (f"last {_WANTED}", 1)
        self._read += await all_until(self._all, [last, ("last y", 1)])
        self._wanted += await all_until(self._filtered, [last])
        if not self._store.capabilities.feed_order:
            await asyncio.sleep(0.5)  # changes of other entities may come after that one
            await self._read_some()

    def _compare_entities(self) -> None:
        for entity_id in {each.id for each in self._read}:
            found = [(each.told(), each.after) for each in self._expected]
            read = [((each.kind, each.id, each.version), each.entity) for each in self._read]
            assert _contents(read, entity_id) == _contents(found, entity_id)

    async def _watch(self, since: str | None, since_wanted: str | None) -> None:
        watch, wanted = self._store.watch, {"label": _WANTED}
        self._all: Changes = await self._readers.enter_async_context(watch("notes", since=since))
        self._filtered: Changes = await self._readers.enter_async_context(
            watch("notes", wanted, since=since_wanted)
        )

    # -- rules -------------------------------------------------------------------------------

    @rule(write=_WRITES)
    def write(self, write: _Write) -> None:
        self._run(self._write(self._store, [write]))

    @rule(writes=st.lists(_WRITES, min_size=1, max_size=5), rolled_back=st.booleans())
    def transaction(self, writes: Sequence[_Write], rolled_back: bool) -> None:
        async def work() -> None:
            async with self._store.begin_transaction() as tx:
                await self._write(tx, writes)
                if rolled_back:
                    raise KeyError

        expected = list(self._expected)
        try:
            self._run(work())
        except KeyError:
            self._expected = expected

    async def _write(self, repository: RepositoryInterface, writes: Sequence[_Write]) -> None:
        """Write all, of which the changes of each entity are one."""
        ids = list(dict.fromkeys(each.id for each in writes))
        before = await repository.get_entities("notes", ids)
        for each in writes:
            if each.label is None:
                await repository.delete_entity("notes", each.id)
            else:
                entity = {"note_id": each.id, "label": each.label}
                await repository.save_entity("notes", entity)
        after = await repository.get_entities("notes", ids)
        pairs = zip(before, after, strict=True)
        self._expected += [_Expected(*each) for each in pairs if each != (None, None)]

    @rule()
    def read(self) -> None:
        self._run(self._read_some())

    async def _read_some(self) -> None:
        for changes, found in ((self._all, self._read), (self._filtered, self._wanted)):
            try:
                async with asyncio.timeout(0.02):
                    while True:
                        found.append(await anext(changes))
            except TimeoutError:
                pass

    @rule()
    def readers_begin_anew(self) -> None:
        self._run(self._begin_anew())

    async def _begin_anew(self) -> None:
        tokens = self._all.token, self._filtered.token
        await self._readers.aclose()
        await self._watch(*tokens)

    @precondition(lambda self: self._store.capabilities.durable)
    @rule()
    def reopen(self) -> None:
        async def reopened() -> None:
            tokens = self._all.token, self._filtered.token
            await self._readers.aclose()
            await self._store.close()
            self._store = await self._stores((FED, UNFED)).open()
            await self._watch(*tokens)

        self._run(reopened())

    @precondition(lambda self: hasattr(self._store, "checkpoint"))
    @rule()
    def checkpoint(self) -> None:
        self._run(self._store.checkpoint())  # type: ignore[attr-defined]
