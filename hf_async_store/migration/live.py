"""Migrating a store while its applications use it: the coordinator.

The applications follow by themselves (`hf_async_store.migration_routing`). docs/live-migration.md
describes the protocol; this module is its other half. Everything that is written to the side that is
not active is written in transactions that read its record first, so that a coordinator that was
replaced, or woke up too late, can write nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, cast

import msgspec

from hf_async_store.changes import ABSENT, Change, Delete, Put, Record
from hf_async_store.config import anchored, load_config
from hf_async_store.conflict_retry import retry_conflicts
from hf_async_store.errors import (
    AlreadyExistsError,
    ConcurrencyConflictError,
    MigrationError,
    ReferenceViolationError,
    StorageError,
    TargetNotEmptyError,
    VerificationError,
)
from hf_async_store.migration.diff import compare_readers
from hf_async_store.migration.preflight import enforces_references
from hf_async_store.migration.requirements import (
    refuse_same,
    refuse_undeclared,
    require_store,
)
from hf_async_store.migration_routing import (
    LEASE_SECONDS,
    MARKER_COLLECTION,
    MIGRATION_KEY,
    SWITCH_SECONDS,
    SYSTEM_COLLECTIONS,
    MigrationState,
    Phase,
    migration_state_in,
)
from hf_async_store.query import CursorPosition, build_query, eq
from hf_async_store.schema import HOST_FACTORY, Collection, Schema
from hf_async_store.strategies import open_store
from hf_async_store.values import VERSION, Entity, Key, canonical, utc_now

if TYPE_CHECKING:
    from hf_async_store.config import ConfigSource
    from hf_async_store.driver import Engine, Session

_MARGIN: Final = 0.25
"""Seconds beyond a lease, for what a process does between its last reading of the clock and its answer."""

_BATCH: Final = 200
_FEW: Final = 50
"""With so few markers in a round, the target keeps up."""

_ROUNDS: Final = 200
_TRIES: Final = 3
_CONFLICT_SECONDS: Final = 20.0

Advance = Callable[[str, int], None]


class LiveStatus(msgspec.Struct, frozen=True):
    """How far a live migration is.

    Attributes:
        phase: see `migration_routing.Phase`; None: there is no live migration.
        authoritative: the active side: its URL without secrets.
        waiting: change markers that are still to be applied: of the source, and of the target.
    """

    phase: Phase | None
    authoritative: str
    waiting: tuple[int, int]


class LiveMigration:
    """A live migration from one store to another; an async context manager.

    Only one coordinator at a time carries it out: a later one takes over and fences off the earlier.

    Args:
        source, target: whatever `open_store` takes. What is recorded in the stores is only where
            they are, without secrets and variables; the applications open the other store as
            their own `follow_moves` says.
        collections: what the applications declare.
        rate: maximum number of entities a second that are copied in the background.
        advance: called with the progress.

    Raises:
        ConfigurationError: a configuration that cannot be used, or a location that no other
            process could find.
        MigrationError: an engine that cannot take part.
    """

    def __init__(
        self,
        source: ConfigSource,
        target: ConfigSource,
        *,
        collections: Iterable[Collection] = HOST_FACTORY,
        rate: float = 5000.0,
        advance: Advance = lambda what, count: None,
    ) -> None:
        sides = [anchored(load_config(each)) for each in (source, target)]
        self.source_location, self.target_location = (each.place() for each in sides)
        self._schema = Schema(collections)
        self._rate = rate
        self._advance = advance
        declared = [*self._schema.values(), *SYSTEM_COLLECTIONS]
        stores = [open_store(each, collections=declared) for each in sides]
        # The engines themselves: the stores would follow the migration, and wait for this.
        self._source, self._target = (each._engine for each in stores)
        self._references = {id(each._engine): enforces_references(each) for each in stores}
        self._state: MigrationState | None = None
        self._touched: set[Key] = set()

    async def __aenter__(self) -> Self:
        for engine, what in ((self._source, "source"), (self._target, "target")):
            if not engine.capabilities.multi_process or not engine.capabilities.durable:
                raise MigrationError(
                    f"the engine {engine.capabilities.engine!r} cannot be the {what} of a live "
                    "migration"
                )
        if not self._source.capabilities.change_markers:
            raise MigrationError(
                f"the engine {self._source.capabilities.engine!r} does not support change markers, so "
                "it cannot be the source of a live migration; stop the applications and use `migrate`"
            )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._source.close()
        finally:
            await self._target.close()

    # -- what an operator does ---------------------------------------------------------------

    async def status(self) -> LiveStatus:
        """How far the migration is."""
        state = await self._read(self._source)
        waiting = (await self._count_markers(self._source), await self._count_markers(self._target))
        if state is None:
            return LiveStatus(None, self.source_location, waiting)
        at_target = state.phase in ("SWITCHED", "ROLLING_BACK", "FINALIZED")
        return LiveStatus(
            state.phase, self.target_location if at_target else self.source_location, waiting
        )

    async def start(self, *, cut_over: bool = True) -> LiveStatus:
        """Copy everything to the target, follow the changes, verify, and make the target active.
        Called again after a failure, it continues.

        Args:
            cut_over: False ends before the target becomes active.

        Raises:
            TargetNotEmptyError: the target holds something that is not of this migration.
            MigrationError, VerificationError: the switch was not made; the source stays active.
        """
        await self._begin()
        if self._here().phase == "SWITCHED":
            return await self.status()
        await self._copy()
        await self._catch_up(self._source, self._target)
        await self._repair(self._source, self._target)
        if cut_over:
            await self._switch(self._source, self._target, "CUTTING_OVER", "SWITCHED")
        return await self.status()

    async def rollback(self) -> LiveStatus:
        """Make the source active again, with everything that was written since; the migration has
        then ended, and the target refuses to open.

        Raises:
            MigrationError, VerificationError: the switch was not made; the target stays active.
        """
        await self._acquire_epoch()
        if self._here().phase == "SWITCHED":
            if not self._target.capabilities.change_markers:
                raise MigrationError(
                    f"the engine {self._target.capabilities.engine!r} did not write change "
                    "markers, so the changes since the switch are unknown; migrate back with the "
                    "applications stopped"
                )
            await self._catch_up(self._target, self._source)
            await self._repair(self._target, self._source)
            await self._switch(self._target, self._source, "ROLLING_BACK", "COPYING")
        await self._end()
        return await self.status()

    async def abort(self) -> LiveStatus:
        """End the migration before the switch; the source stays active.

        Raises:
            MigrationError: the target is already active; `rollback` switches back.
        """
        await self._acquire_epoch()
        if self._here().phase != "COPYING":
            raise MigrationError(
                "the target is already active; `rollback` switches back, `finalize` decommissions the "
                "source"
            )
        await self._end()
        return await self.status()

    async def finalize(self) -> LiveStatus:
        """Decommission the source: it refuses to open, and names the target.

        Raises:
            MigrationError: the target is not active yet.
        """
        state = await self._read(self._source)
        if state is not None and state.phase == "FINALIZED" and state.other == self.target_location:
            self._state = state  # a finalize that was interrupted, perhaps
        else:
            await self._acquire_epoch()
            if self._here().phase != "SWITCHED":
                raise MigrationError("the target is not active yet; `start` switches to it")
            await self._change(phase="FINALIZED")
        await _leases_over()
        await self._cleanup(self._target)
        return await self.status()

    # -- the record --------------------------------------------------------------------------

    def _here(self) -> MigrationState:
        assert self._state is not None, "the epoch was acquired"
        return self._state

    async def _read(self, engine: Engine) -> MigrationState | None:
        return migration_state_in((await engine.fetch([MIGRATION_KEY]))[0])

    async def _change(self, **changed: object) -> None:
        """Change the record of the source: nobody else has meanwhile.

        Raises:
            MigrationError: another coordinator took over, or an application ended the switch.
        """
        state = self._here()
        outcome = (await self._source.write_each([state.put(**changed)]))[0]
        if isinstance(outcome, ConcurrencyConflictError):
            raise MigrationError(
                "another coordinator has taken this live migration over, or an application ended "
                "a switch that took too long; run the action again"
            ) from outcome
        if isinstance(outcome, StorageError):
            raise outcome
        self._state = await self._read(self._source)

    async def _begin(self) -> None:
        """Have the record of this coordinator in both stores."""
        state = await self._read(self._source)
        if state is not None:
            await self._acquire_epoch()
            return
        await self._refuse_foreign()
        # The target first: who opens it by its URL then follows from the beginning.
        await self._put_record(
            self._target, MigrationState("target", "COPYING", self.source_location, 1, 0)
        )
        await self._put_record(
            self._source, MigrationState("source", "COPYING", self.target_location, 1, 0)
        )
        await self._acquire_epoch()

    async def _refuse_foreign(self) -> None:
        await require_store(self._source, "the source")
        await refuse_same(self._source.is_same_store(self._target))
        await refuse_undeclared(self._source, "the source")
        there = await self._read(self._target)
        if there is not None:
            if there.other == self.source_location:
                return  # a copy that an earlier migration of the two left
            raise MigrationError(
                f"the target is part of another live migration, with {there.other}"
            )
        for declared in self._schema.values():
            async with aclosing(self._target.select(build_query(declared, limit=1))) as found:
                async for record in found:
                    raise TargetNotEmptyError(
                        f"the target is not empty: it holds {declared.name} {record.key.id!r}; a "
                        "live migration needs an empty one"
                    )

    async def _put_record(self, engine: Engine, state: MigrationState) -> None:
        entity = cast("Entity", msgspec.to_builtins(state))
        del entity[VERSION]
        entity["move_id"] = MIGRATION_KEY.id
        there = await self._read(engine)
        expect = ABSENT if there is None else there.version
        version = 1 if there is None else there.version + 1
        put = Put(MIGRATION_KEY, entity, utc_now(), expect, version)
        outcome = (await engine.write_each([put]))[0]
        if isinstance(outcome, AlreadyExistsError | ConcurrencyConflictError):
            raise MigrationError("another coordinator is starting a live migration") from outcome
        if isinstance(outcome, StorageError):
            raise outcome

    async def _acquire_epoch(self) -> None:
        """Become the coordinator, by a new epoch in both records.

        Raises:
            MigrationError: there is no such migration.
        """
        state = await self._read(self._source)
        if state is None or state.role != "source" or state.other != self.target_location:
            raise MigrationError(
                "there is no live migration between these two"
                + ("" if state is None else f"; the source is part of one with {state.other}")
            )
        if state.phase == "FINALIZED":
            raise MigrationError("this live migration is finalized: the target is active")
        self._state = state
        phase: Phase = state.phase
        if phase in ("CUTTING_OVER", "ROLLING_BACK"):
            phase = "COPYING" if phase == "CUTTING_OVER" else "SWITCHED"
        await self._change(phase=phase, epoch=state.epoch + 1)
        there = await self._read(self._target)
        epoch = self._here().epoch
        if there is None:
            await self._put_record(
                self._target, MigrationState("target", "COPYING", self.source_location, epoch, 0)
            )
        else:
            change = there.put(
                role="target", phase="COPYING", other=self.source_location, epoch=epoch
            )
            outcome = (await self._target.write_each([change]))[0]
            if isinstance(outcome, StorageError):
                raise MigrationError(
                    "another coordinator is taking this live migration over"
                ) from outcome
        # After that, every process knows of the migration and of this phase.
        await _leases_over()

    async def _end(self) -> None:
        """End the migration while the source is active."""
        there = await self._read(self._target)
        assert there is not None, "the epoch was acquired"
        outcome = (await self._target.write_each([there.put(phase="FINALIZED")]))[0]
        if isinstance(outcome, StorageError):
            raise outcome
        await self._cleanup(self._source)

    async def _cleanup(self, engine: Engine) -> None:
        """Delete the record and the change markers from the store that stays active."""
        state = await self._read(engine)
        if state is not None:
            outcome = (await engine.write_each([Delete(MIGRATION_KEY, state.version)]))[0]
            if isinstance(outcome, StorageError):
                raise outcome
        await _leases_over()
        while markers := await self._markers(engine, None):
            await engine.write_each([Delete(each.key) for each in markers])

    # -- copying -----------------------------------------------------------------------

    async def _copy(self) -> None:
        """Everything of the source, collection by collection, changes in between."""
        for declared in self._schema.values():
            async with aclosing(_key_chunks(self._source, declared, _BATCH)) as chunks:
                async for keys in chunks:
                    began = time.monotonic()
                    await self._apply_markers(self._source, self._target, keys)
                    await self._catch_up_once(self._source, self._target)
                    self._advance(declared.name, len(keys))
                    pause = len(keys) / self._rate - (time.monotonic() - began)
                    await asyncio.sleep(max(0.0, pause))

    async def _catch_up(self, origin: Engine, copy: Engine) -> None:
        """Apply change markers until few remain at a time."""
        for _ in range(_ROUNDS):
            if await self._catch_up_once(origin, copy) <= _FEW:
                return

    async def _catch_up_once(self, origin: Engine, copy: Engine) -> int:
        """Copy what is marked as changed, and delete the markers; how many there were.

        Markers on the side that is not active are of writes that came too late and were not
        acknowledged: what they changed is overwritten with the state of the active side.
        """
        drained = 0
        for marked in (origin, copy):
            after: str | None = None
            while markers := await self._markers(marked, after):
                after = markers[-1].key.id
                keys = [
                    Key(cast("str", each.entity["collection"]), cast("str", each.entity["id"]))
                    for each in markers
                ]
                await self._apply_markers(
                    origin, copy, [each for each in keys if self._knows(each)]
                )
                # A marker that was written again since has another version, and stays.
                await marked.write_each([Delete(each.key, each.version) for each in markers])
                drained += len(markers)
        self._advance("changes", drained)
        return drained

    def _knows(self, key: Key) -> bool:
        if key.collection not in self._schema:
            raise MigrationError(
                f"an application writes to {key.collection!r}, which is not declared here; name all "
                "collections that any of them declares"
            )
        return True

    async def _markers(self, engine: Engine, after: str | None) -> list[Record]:
        query = build_query(MARKER_COLLECTION, limit=_BATCH)
        if after is not None:
            query = msgspec.structs.replace(query, after=CursorPosition((), after))
        async with aclosing(engine.select(query)) as records:
            return [each async for each in records]

    async def _count_markers(self, engine: Engine) -> int:
        return await engine.count(build_query(MARKER_COLLECTION))

    async def _apply_markers(self, origin: Engine, copy: Engine, keys: Sequence[Key]) -> None:
        """Have `copy` hold of these keys, and of what they need, what `origin` does."""
        limit = copy.capabilities.max_transaction_changes
        size = _BATCH if limit is None else min(_BATCH, limit // 2 - 1)
        for start in range(0, len(keys), size):
            chunk = keys[start : start + size]
            self._touched.update(chunk)
            await retry_conflicts(
                lambda chunk=chunk: self._copy_chunk(origin, copy, chunk),  # type: ignore[misc]
                _CONFLICT_SECONDS,
            )

    async def _copy_chunk(self, origin: Engine, copy: Engine, keys: Sequence[Key]) -> None:
        async with copy.session(None) as session:
            record = migration_state_in((await session.fetch([MIGRATION_KEY]))[0])
            if record is None or record.epoch != self._here().epoch:
                raise MigrationError("another coordinator has taken this live migration over")
            wanted = await self._with_relatives(origin, copy, session, keys)
            there = dict(zip(wanted, await origin.fetch(wanted), strict=True))
            here = dict(zip(wanted, await session.fetch(wanted), strict=True))
            changes = self._changes(wanted, there, here)
            for outcome in await session.write(changes) if changes else []:
                if isinstance(outcome, ReferenceViolationError):
                    # Relatives changed between the two reads: read again.
                    raise ConcurrencyConflictError(str(outcome), retryable=True) from outcome
                if isinstance(outcome, StorageError):
                    raise outcome

    def _changes(
        self,
        keys: Sequence[Key],
        there: dict[Key, Record | None],
        here: dict[Key, Record | None],
    ) -> list[Change]:
        """What makes the copy equal: parents before children, and the other way round to delete."""
        rank = {name: number for number, name in enumerate(self._schema)}
        at = utc_now()
        puts: list[Change] = []
        deletes: list[Change] = []
        for key in sorted(keys, key=lambda each: (rank[each.collection], each.id)):
            wanted, found = there[key], here[key]
            if wanted is None:
                if found is not None:
                    deletes.append(Delete(key))
            elif found is None or canonical(wanted.entity) != canonical(found.entity):
                entity = {name: value for name, value in wanted.entity.items() if name != VERSION}
                puts.append(Put(key, entity, at, import_version=wanted.version))
        return [*puts, *reversed(deletes)]

    async def _with_relatives(
        self, origin: Engine, copy: Engine, session: Session, keys: Sequence[Key]
    ) -> list[Key]:
        """The keys, with the parents that the copy lacks and the children that it must lose first."""
        found = dict.fromkeys(keys)
        if not self._references[id(copy)]:
            return list(found)
        new = list(found)
        while new:
            records = await origin.fetch(new)
            parents = [
                Key(cast("str", field.references), parent)
                for record in records
                if record is not None
                for field in self._schema[record.key.collection].references
                if isinstance(parent := record.entity.get(field.name), str)
            ]
            gone = [key for key, record in zip(new, records, strict=True) if record is None]
            relatives = await self._missing(session, parents)
            for key in gone:
                relatives += await self._children(session, key)
            new = [each for each in dict.fromkeys(relatives) if each not in found]
            found.update(dict.fromkeys(new))
        return list(found)

    async def _missing(self, session: Session, keys: list[Key]) -> list[Key]:
        unique = list(dict.fromkeys(keys))
        there = await session.fetch(unique)
        return [key for key, record in zip(unique, there, strict=True) if record is None]

    async def _children(self, session: Session, parent: Key) -> list[Key]:
        found: list[Key] = []
        for child, field in self._schema.children[parent.collection]:
            query = build_query(child, filters={field.name: eq(parent.id)}, fields=[child.key])
            async with aclosing(session.select(query)) as records:
                found += [each.key async for each in records]
        return found

    async def _repair(self, origin: Engine, copy: Engine) -> None:
        """Compare everything once; what differs is copied again. From here on, only what is
        touched can differ."""
        self._touched.clear()
        for declared in self._schema.values():
            for one, other in ((origin, copy), (copy, origin)):
                async with aclosing(_key_chunks(one, declared, _BATCH)) as chunks:
                    async for keys in chunks:
                        suspects = await self._differing(one, other, keys)
                        if suspects:
                            await self._apply_markers(origin, copy, suspects)
                        self._advance("verify", len(keys))
                        await self._catch_up_once(origin, copy)

    async def _differing(self, one: Engine, other: Engine, keys: Sequence[Key]) -> list[Key]:
        ours, theirs = await one.fetch(keys), await other.fetch(keys)
        return [
            key
            for key, mine, yours in zip(keys, ours, theirs, strict=True)
            if (None if mine is None else canonical(mine.entity))
            != (None if yours is None else canonical(yours.entity))
        ]

    # -- the switch ------------------------------------------------------------------------

    async def _switch(self, origin: Engine, copy: Engine, during: Phase, after: Phase) -> None:
        """Make `copy` the active side, in a few seconds, or leave everything as it was."""
        for attempt in range(1, _TRIES + 1):
            await self._catch_up(origin, copy)
            before = self._here().phase
            await self._change(phase=during)
            try:
                async with asyncio.timeout(SWITCH_SECONDS):
                    await _leases_over()
                    while await self._catch_up_once(origin, copy):
                        pass
                    await self._verify(origin, copy)
            except TimeoutError as exc:
                await self._change(phase=before)
                if attempt == _TRIES:
                    raise MigrationError(
                        f"the switch was not done within {SWITCH_SECONDS:g} s, {_TRIES} times; "
                        "nothing was changed. Try again when fewer writes are under way"
                    ) from exc
            except BaseException:
                with suppress(StorageError):
                    await self._change(phase=before)
                raise
            else:
                # This one write is the switch: before it one side is active, after it the other.
                await self._change(phase=after, term=self._here().term + 1)
                return

    async def _verify(self, origin: Engine, copy: Engine) -> None:
        """Nobody writes now: what was touched since all was compared must be equal, and the counts.

        Raises:
            VerificationError.
        """
        touched = sorted(self._touched)
        for start in range(0, len(touched), _BATCH):
            wrong = await self._differing(origin, copy, touched[start : start + _BATCH])
            if wrong:
                named = [f"{each.collection} {each.id!r} differs" for each in wrong[:20]]
                raise VerificationError(f"the two sides differ: {'; '.join(named[:3])}", named)
        for name, declared in self._schema.items():
            query = build_query(declared)
            counts = await asyncio.gather(origin.count(query), copy.count(query))
            if counts[0] != counts[1]:
                raise VerificationError(f"{name}: {counts[0]:,} entities and {counts[1]:,}")

    async def compare(self) -> bool:
        """Read both sides through and compare their digests; True if they are equal.

        Meant for a time when nobody writes.
        """
        async with self._source.snapshot() as there, self._target.snapshot() as here:
            return (await compare_readers(there, here, self._schema)).equal


async def _leases_over() -> None:
    """Wait until no process relies on a phase from before now."""
    await asyncio.sleep(LEASE_SECONDS + _MARGIN)


async def _key_chunks(
    engine: Engine, declared: Collection, size: int
) -> AsyncGenerator[list[Key], None]:
    """The keys of a collection, in chunks, by keyset; concurrent changes do not disturb it."""
    query = build_query(declared, limit=size, fields=[declared.key])
    while True:
        async with aclosing(engine.select(query)) as records:
            keys = [each.key async for each in records]
        if keys:
            yield keys
        if len(keys) < size:
            return
        query = msgspec.structs.replace(query, after=CursorPosition((), keys[-1].id))
