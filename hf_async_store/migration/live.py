"""Migrating a store while its applications use it: the coordinator.

The applications follow the migration by themselves (`hf_async_store.migration_routing`).
docs/live-migration.md describes the protocol. Copies are written to the store that is not active in
transactions that read its migration record first, so a coordinator that was replaced, or was
suspended for too long, writes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Self

import msgspec
from msgspec.structs import replace

from hf_async_store.changes import ABSENT, Change, Delete, Put, Record
from hf_async_store.config import anchored, load_config
from hf_async_store.conflict_retry import retry_conflicts
from hf_async_store.entity_rewriting import pages
from hf_async_store.errors import (
    AlreadyExistsError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    MigrationError,
    ReferenceViolationError,
    StorageError,
    TargetNotEmptyError,
    TransactionTooLargeError,
    UniqueViolationError,
    VerificationError,
)
from hf_async_store.migration.dry_run import enforces_references
from hf_async_store.migration.store_checks import (
    refuse_same,
    refuse_undeclared,
    require_store,
)
from hf_async_store.migration_routing import (
    LEASE_SECONDS,
    MIGRATION_KEY,
    SWITCH_SECONDS,
    MigrationRouter,
    MigrationState,
    Phase,
    marker_of,
    migration_state_in,
    unrouted,
)
from hf_async_store.query import CursorPosition, Query, build_query, eq
from hf_async_store.schema import (
    HOST_FACTORY,
    MARKER_COLLECTION,
    MIGRATION_COLLECTIONS,
    SUBSCRIPTION_COLLECTION,
    Collection,
    Schema,
)
from hf_async_store.strategies import open_store
from hf_async_store.unique import stored_digest
from hf_async_store.values import VERSION, Key, canonical, utc_now, with_canonical

if TYPE_CHECKING:
    from hf_async_store.config import ConfigSource
    from hf_async_store.driver import Engine, Session

log: Final = logging.getLogger("hf_async_store.migration")

_MARGIN: Final = 0.25
"""Seconds added to a lease, because a process returns some time after it last read the clock."""

_BATCH: Final = 200
_FEW_MARKERS: Final = 50
"""If a round finds at most this number of markers, the target keeps up with the changes."""

_MAX_ROUNDS: Final = 200
_TRIES: Final = 3
_CONFLICT_SECONDS: Final = 20.0

Advance = Callable[[str, int], None]


class LiveStatus(msgspec.Struct, frozen=True):
    """The state of a live migration.

    Attributes:
        phase: see `migration_routing.Phase`; None if there is no live migration.
        authoritative: the location of the active store, without secrets.
        waiting: the numbers of change markers in the source and in the target that are still to be
            applied.
    """

    phase: Phase | None
    authoritative: str
    waiting: tuple[int, int]


class LiveMigration:
    """A live migration from one store to another; an async context manager.

    Only one coordinator is effective at a time: a later one takes over and fences off the earlier
    one.

    Args:
        source, target: anything that `open_store` accepts. The stores record only each other's
            location, without secrets and variables; the applications open the other store with the
            configuration in their own `follow_moves`.
        collections: all collections that the applications declare.
        rate: the maximum number of entities per second that are copied in the background.
        advance: called with the progress.

    Raises:
        ConfigurationError: a configuration is not valid, or its location cannot be used by other
            processes.
        MigrationError: an engine cannot take part in a live migration.
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
        self.source_location, self.target_location = (each.location() for each in sides)
        self._schema = Schema(collections)
        self._rate = rate
        self._advance = advance
        declared = [*self._schema.values(), *MIGRATION_COLLECTIONS]
        stores = [open_store(each, collections=declared) for each in sides]
        # The engines are used directly: the stores would follow the migration, and wait for the
        # switch that this coordinator makes.
        self._unrouted = [
            role
            for role, each in zip(("source", "target"), stores, strict=True)
            if not isinstance(each.engine, MigrationRouter)
        ]
        self._source, self._target = (unrouted(each.engine) for each in stores)
        self._references = {
            id(engine): enforces_references(store)
            for engine, store in zip((self._source, self._target), stores, strict=True)
        }
        self._state: MigrationState | None = None
        self._touched: set[Key] = set()

    async def __aenter__(self) -> Self:
        for engine, role in ((self._source, "source"), (self._target, "target")):
            if not engine.capabilities.multi_process or not engine.capabilities.durable:
                raise MigrationError(
                    f"the engine {engine.capabilities.engine!r} cannot be the {role} of a live "
                    "migration, because it is not durable or is limited to one process"
                )
        for role in self._unrouted:
            raise MigrationError(
                f"the strategy of the {role} does not follow live migrations: it does not use "
                "`hf_async_store.strategies.routing`. Stop the applications and use `migrate`"
            )
        if not self._source.capabilities.change_markers:
            raise MigrationError(
                f"the engine {self._source.capabilities.engine!r} does not support change markers, so "
                "it cannot be the source of a live migration; stop the applications and use `migrate`"
            )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            await self._source.close()
        finally:
            await self._target.close()

    # -- actions of the operator -------------------------------------------------------------

    async def status(self) -> LiveStatus:
        """The current state of the migration."""
        state = await self._read_state(self._source)
        waiting = (await self._count_markers(self._source), await self._count_markers(self._target))
        if state is None:
            return LiveStatus(None, self.source_location, waiting)
        at_target = state.phase in ("SWITCHED", "ROLLING_BACK", "FINALIZED")
        return LiveStatus(
            state.phase, self.target_location if at_target else self.source_location, waiting
        )

    async def start(self, *, cut_over: bool = True) -> LiveStatus:
        """Copy everything to the target, apply the changes made meanwhile, verify, and make the
        target active. Call it again to continue after a failure.

        Args:
            cut_over: if False, return before the target becomes active.

        Raises:
            TargetNotEmptyError: the target holds entities that no live migration between the two
                stores has copied.
            MigrationError, VerificationError: the switch was not made; the source stays active.
        """
        await self._begin()
        if self._current().phase == "SWITCHED":
            return await self.status()
        await self._target.remember(self._schema.values())
        await self._copy()
        await self._catch_up(self._source, self._target)
        await self._repair(self._source, self._target)
        if cut_over:
            await self._switch(self._source, self._target, "CUTTING_OVER", "SWITCHED")
        return await self.status()

    async def rollback(self) -> LiveStatus:
        """Make the source active again, with everything that was written since the switch. This
        ends the migration; afterwards the target refuses to open.

        Raises:
            MigrationError, VerificationError: the switch was not made; the target stays active.
        """
        await self._acquire_epoch()
        if self._current().phase == "SWITCHED":
            if not self._target.capabilities.change_markers:
                raise MigrationError(
                    f"the engine {self._target.capabilities.engine!r} does not support change "
                    "markers, so the changes since the switch are unknown; stop the applications "
                    "and migrate back with `migrate`"
                )
            await self._catch_up(self._target, self._source)
            await self._repair(self._target, self._source)
            await self._switch(self._target, self._source, "ROLLING_BACK", "COPYING")
        await self._end()
        return await self.status()

    async def abort(self) -> LiveStatus:
        """End the migration before the switch; the source stays active, and the target refuses to
        open.

        Raises:
            MigrationError: the target is already active; `rollback` switches back.
        """
        await self._acquire_epoch()
        if self._current().phase != "COPYING":
            raise MigrationError(
                "the target is already active; `rollback` switches back, `finalize` decommissions the "
                "source"
            )
        await self._end()
        return await self.status()

    async def finalize(self) -> LiveStatus:
        """Decommission the source: from then on it refuses to open, with an error that names the
        target.

        Raises:
            MigrationError: the target is not active yet.
        """
        state = await self._read_state(self._source)
        if (
            state is not None
            and state.phase == "FINALIZED"
            and state.other_location == self.target_location
        ):
            self._state = state  # complete a `finalize` that may have been interrupted
        else:
            await self._acquire_epoch()
            if self._current().phase != "SWITCHED":
                raise MigrationError("the target is not active yet; `start` switches to it")
            await self._change_state(phase="FINALIZED")
        await _wait_for_leases()
        await self._cleanup(self._target)
        return await self.status()

    # -- the record --------------------------------------------------------------------------

    def _current(self) -> MigrationState:
        assert self._state is not None, "the epoch was acquired"
        return self._state

    async def _read_state(self, engine: Engine) -> MigrationState | None:
        return migration_state_in((await engine.fetch([MIGRATION_KEY]))[0])

    async def _change_state(self, **changed: object) -> None:
        """Change the record of the source, if it was not changed concurrently.

        Raises:
            MigrationError: another coordinator took over, or an application ended the switch.
        """
        try:
            await _write(self._source, self._current().put(**changed))
        except ConcurrencyConflictError as exc:
            raise MigrationError(
                "another coordinator has taken this live migration over, or an application ended "
                "a switch that took too long; run the action again"
            ) from exc
        self._state = await self._read_state(self._source)
        log.info("live migration: %s", self._current().phase)

    async def _begin(self) -> None:
        """Create the records in both stores, if needed, and become the coordinator."""
        state = await self._read_state(self._source)
        if state is not None:
            await self._acquire_epoch()
            return
        await self._check_new_migration()
        # The target first, so that a process that opens it follows from the beginning.
        await self._put_record(
            self._target, MigrationState("target", "COPYING", self.source_location, 1, 0)
        )
        await self._put_record(
            self._source, MigrationState("source", "COPYING", self.target_location, 1, 0)
        )
        await self._acquire_epoch()

    async def _check_new_migration(self) -> None:
        """Check that the two stores can begin a live migration."""
        await require_store(self._source, "the source")
        await refuse_same(self._source.is_same_store(self._target))
        if self.source_location == self.target_location:
            raise MigrationError(
                f"source and target have the same location, {self.source_location}, though they are two "
                "stores: nothing was written. Applications could not tell them apart; name another target"
            )
        await refuse_undeclared(self._source, "the source")
        target_state = await self._read_state(self._target)
        if target_state is not None:
            if target_state.other_location == self.source_location:
                return  # a copy that an earlier live migration between the two stores has made
            raise MigrationError(
                f"the target is part of another live migration, with {target_state.other_location}"
            )
        for declared in self._schema.values():
            async with aclosing(self._target.select(build_query(declared, limit=1))) as records:
                async for record in records:
                    raise TargetNotEmptyError(
                        f"the target is not empty: it holds {declared.name} {record.key.id!r}; a "
                        "live migration needs an empty target"
                    )

    async def _put_record(self, engine: Engine, state: MigrationState) -> None:
        existing = await self._read_state(engine)
        put = replace(state, version=0 if existing is None else existing.version).put()
        try:
            await _write(engine, replace(put, expect=ABSENT) if existing is None else put)
        except (AlreadyExistsError, ConcurrencyConflictError) as exc:
            raise MigrationError("another coordinator is starting a live migration") from exc

    async def _acquire_epoch(self) -> None:
        """Become the coordinator by writing a new epoch to both records.

        Raises:
            MigrationError: there is no live migration between the two stores, or it is finalized,
                or another coordinator takes over.
        """
        state = await self._read_state(self._source)
        if state is None or state.role != "source" or state.other_location != self.target_location:
            raise MigrationError(
                "there is no live migration between these two stores"
                + (
                    ""
                    if state is None
                    else f"; the source is part of one with {state.other_location}"
                )
            )
        if state.phase == "FINALIZED":
            raise MigrationError("this live migration is finalized: the target is active")
        self._state = state
        phase: Phase = state.phase
        if phase in ("CUTTING_OVER", "ROLLING_BACK"):
            phase = "COPYING" if phase == "CUTTING_OVER" else "SWITCHED"
        await self._change_state(phase=phase, epoch=state.epoch + 1)
        target_state = await self._read_state(self._target)
        epoch = self._current().epoch
        if target_state is None:
            await self._put_record(
                self._target, MigrationState("target", "COPYING", self.source_location, epoch, 0)
            )
        else:
            change = target_state.put(
                role="target", phase="COPYING", other_location=self.source_location, epoch=epoch
            )
            try:
                await _write(self._target, change)
            except (ConcurrencyConflictError, AlreadyExistsError, EntityNotFoundError) as exc:
                raise MigrationError(
                    "another coordinator is taking this live migration over"
                ) from exc
        # Afterwards every process has read a record with this phase.
        await _wait_for_leases()

    async def _end(self) -> None:
        """End the migration while the source is active."""
        target_state = await self._read_state(self._target)
        assert target_state is not None, "the epoch was acquired"
        await _write(self._target, target_state.put(phase="FINALIZED"))
        await self._cleanup(self._source)

    async def _cleanup(self, engine: Engine) -> None:
        """Delete the record and the change markers from the store that stays active."""
        state = await self._read_state(engine)
        if state is not None:
            await _write(engine, Delete(MIGRATION_KEY, state.version))
        await _wait_for_leases()
        while markers := await self._markers(engine, None):
            await engine.write_each([Delete(each.key) for each in markers])

    # -- copying -----------------------------------------------------------------------

    async def _copy(self) -> None:
        """Copy all collections of the source, and apply the change markers after each chunk."""
        for declared in self._schema.values():
            async with aclosing(_key_chunks(self._source, declared)) as chunks:
                async for keys in chunks:
                    began = time.monotonic()
                    await self._copy_keys(self._source, self._target, keys)
                    await self._catch_up_once(self._source, self._target)
                    self._advance(declared.name, len(keys))
                    pause = len(keys) / self._rate - (time.monotonic() - began)
                    await asyncio.sleep(max(0.0, pause))

    async def _catch_up(self, origin: Engine, copy: Engine) -> None:
        """Apply change markers until a round finds only few."""
        for _ in range(_MAX_ROUNDS):
            if await self._catch_up_once(origin, copy) <= _FEW_MARKERS:
                return

    async def _catch_up_once(self, origin: Engine, copy: Engine) -> int:
        """Copy the entities that have change markers, and delete the markers; returns their number.

        Markers in the store that is not active come from writes that were too late and were not
        acknowledged. The entities that they changed are overwritten with those of the active store.
        """
        drained = 0
        for marked in (origin, copy):
            after: str | None = None
            while markers := await self._markers(marked, after):
                after = markers[-1].key.id
                await self._copy_keys(origin, copy, list(map(self._marked_key, markers)))
                # A marker that was written again meanwhile has another version, so it is not
                # deleted.
                await marked.write_each([Delete(each.key, each.version) for each in markers])
                drained += len(markers)
        self._advance("changes", drained)
        return drained

    def _marked_key(self, marker: Record) -> Key:
        """The key of the entity that a change marker names."""
        collection, entity_id = str(marker.entity["collection"]), str(marker.entity["id"])
        if collection not in self._schema:
            raise MigrationError(
                f"an application writes to {collection!r}, which is not declared here; declare "
                "all collections that any application declares (--collections MODULE:NAME on the "
                "command line)"
            )
        return Key(collection, entity_id)

    async def _markers(self, engine: Engine, after: str | None) -> list[Record]:
        query = build_query(MARKER_COLLECTION, limit=_BATCH)
        if after is not None:
            query = replace(query, after=CursorPosition((), after))
        async with aclosing(engine.select(query)) as records:
            return [each async for each in records]

    async def _count_markers(self, engine: Engine) -> int:
        return await engine.count(build_query(MARKER_COLLECTION))

    async def _copy_keys(self, origin: Engine, copy: Engine, keys: Sequence[Key]) -> None:
        """Copy the entities with these keys, and the relatives that references require, from
        `origin` to `copy`; entities that `origin` does not hold are deleted."""
        limit = copy.capabilities.max_transaction_changes
        size = _BATCH if limit is None else min(_BATCH, limit // 2 - 1)
        for start in range(0, len(keys), size):
            chunk = keys[start : start + size]
            self._touched.update(chunk)
            await self._copy_together(origin, copy, chunk)

    async def _copy_together(self, origin: Engine, copy: Engine, keys: Sequence[Key]) -> None:
        """Copy some entities in one transaction, or in several if it would be too large."""
        attempt = partial(self._copy_chunk, origin, copy, keys)
        try:
            try:
                await retry_conflicts(partial(attempt, moves_values=False), _CONFLICT_SECONDS)
            except UniqueViolationError:
                await retry_conflicts(partial(attempt, moves_values=True), _CONFLICT_SECONDS)
        except TransactionTooLargeError:
            if len(keys) == 1:
                raise
            middle = len(keys) // 2
            for part in (keys[:middle], keys[middle:]):
                await self._copy_together(origin, copy, part)

    async def _copy_chunk(
        self, origin: Engine, copy: Engine, keys: Sequence[Key], *, moves_values: bool
    ) -> None:
        """Copy some entities in one transaction.

        Args:
            moves_values: take unique values from the entities of the copy that have them. This takes a
                request for each change.
        """
        async with copy.session(None) as session:
            record = migration_state_in((await session.fetch([MIGRATION_KEY]))[0])
            if record is None or record.epoch != self._current().epoch:
                raise MigrationError("another coordinator has taken this live migration over")
            keys = await self._with_relatives(origin, copy, session, keys)
            in_origin = dict(zip(keys, await origin.fetch(keys), strict=True))
            in_copy = dict(zip(keys, await session.fetch(keys), strict=True))
            changes = self._changes(keys, in_origin, in_copy)
            if moves_values:
                for each in changes:
                    await _write_moving(origin, session, each)
            elif changes:
                await _write_all(session, changes)

    def _changes(
        self,
        keys: Sequence[Key],
        in_origin: dict[Key, Record | None],
        in_copy: dict[Key, Record | None],
    ) -> list[Change]:
        """The changes that make the copy equal to the origin: first puts, parents before children,
        then deletions, children before parents."""
        rank = {name: number for number, name in enumerate(self._schema)}
        puts: list[Change] = []
        deletes: list[Change] = []
        for key in sorted(keys, key=lambda each: (rank[each.collection], each.id)):
            original, copied = in_origin[key], in_copy[key]
            if original is None:
                if copied is not None:
                    deletes.append(Delete(key))
                continue
            entity, encoded = with_canonical(original.entity)
            if copied is None or encoded != canonical(copied.entity):
                puts.append(_imported(Record(key, entity)))
        return [*puts, *reversed(deletes)]

    async def _with_relatives(
        self, origin: Engine, copy: Engine, session: Session, keys: Sequence[Key]
    ) -> list[Key]:
        """The keys, the parents that the copy lacks, and the children that must be deleted first."""
        all_keys = dict.fromkeys(keys)
        if not self._references[id(copy)]:
            return list(all_keys)
        new = list(all_keys)
        while new:
            records = await origin.fetch(new)
            parents = [
                Key(field.parent, parent)
                for record in records
                if record is not None
                for field in self._schema[record.key.collection].references
                if isinstance(parent := record.entity.get(field.name), str)
            ]
            deleted = [key for key, record in zip(new, records, strict=True) if record is None]
            relatives = await self._missing(session, parents)
            for key in deleted:
                relatives += await self._children(session, key)
            new = [each for each in dict.fromkeys(relatives) if each not in all_keys]
            all_keys.update(dict.fromkeys(new))
        return list(all_keys)

    async def _missing(self, session: Session, keys: list[Key]) -> list[Key]:
        unique = list(dict.fromkeys(keys))
        records = await session.fetch(unique)
        return [key for key, record in zip(unique, records, strict=True) if record is None]

    async def _children(self, session: Session, parent: Key) -> list[Key]:
        children: list[Key] = []
        for child, field in self._schema.children[parent.collection]:
            query = build_query(child, filters={field.name: eq(parent.id)}, fields=[child.key])
            async with aclosing(session.select(query)) as records:
                children += [each.key async for each in records]
        return children

    async def _repair(self, origin: Engine, copy: Engine) -> None:
        """Compare all entities once, and copy those that differ again. From then on, only entities
        in `_touched` can differ."""
        self._touched.clear()
        for declared in self._schema.values():
            for one, other in ((origin, copy), (copy, origin)):
                async with aclosing(_key_chunks(one, declared)) as chunks:
                    async for keys in chunks:
                        differing = await self._differing(one, other, keys)
                        if differing:
                            await self._copy_keys(origin, copy, differing)
                        self._advance("verify", len(keys))
                        await self._catch_up_once(origin, copy)

    async def _differing(self, one: Engine, other: Engine, keys: Sequence[Key]) -> list[Key]:
        in_one, in_other = await one.fetch(keys), await other.fetch(keys)
        return [
            key
            for key, first, second in zip(keys, in_one, in_other, strict=True)
            if (None if first is None else canonical(first.entity))
            != (None if second is None else canonical(second.entity))
        ]

    # -- the switch ------------------------------------------------------------------------

    async def _switch(self, origin: Engine, copy: Engine, during: Phase, after: Phase) -> None:
        """Make `copy` the active store within a few seconds, or restore the previous phase."""
        for attempt in range(1, _TRIES + 1):
            await self._catch_up(origin, copy)
            before = self._current().phase
            await self._change_state(phase=during)
            try:
                async with asyncio.timeout(SWITCH_SECONDS):
                    await _wait_for_leases()
                    while await self._catch_up_once(origin, copy):
                        pass
                    await self._verify(origin, copy)
                    await _copy_subscriptions(origin, copy)
            except TimeoutError as exc:
                await self._change_state(phase=before)
                if attempt == _TRIES:
                    raise MigrationError(
                        f"the switch did not complete within {SWITCH_SECONDS:g} s in {_TRIES} "
                        "attempts, so the active store is unchanged. Try again when there are fewer "
                        "writes"
                    ) from exc
            except BaseException:
                with suppress(StorageError):
                    await self._change_state(phase=before)
                raise
            else:
                # This write is the switch: before it one store is active, after it the other.
                await self._change_state(phase=after, term=self._current().term + 1)
                return

    async def _verify(self, origin: Engine, copy: Engine) -> None:
        """Check, while no process writes, that the counts are equal, and all entities that were
        copied since the full comparison.

        Raises:
            VerificationError: the stores differ.
        """
        touched = sorted(self._touched)
        for start in range(0, len(touched), _BATCH):
            differing = await self._differing(origin, copy, touched[start : start + _BATCH])
            if differing:
                named = [f"{each.collection} {each.id!r} differs" for each in differing[:20]]
                raise self._not_switched(origin, "; ".join(named[:3]), named)
        for name, declared in self._schema.items():
            query = build_query(declared)
            counts = await asyncio.gather(origin.count(query), copy.count(query))
            if counts[0] != counts[1]:
                raise self._not_switched(
                    origin,
                    f"{name} has {counts[0]:,} entities in the active store and {counts[1]:,} in the "
                    "other",
                )

    def _not_switched(
        self, origin: Engine, difference: str, differences: Sequence[str] = ()
    ) -> VerificationError:
        active = "source" if origin is self._source else "target"
        return VerificationError(
            f"the two stores differ: {difference}. The switch was not made, and the {active} stays "
            "active. Run the action again: it compares all entities, and copies those that differ",
            differences,
        )


async def _write(engine: Engine, change: Change) -> None:
    """Apply one change; its error is raised."""
    [outcome] = await engine.write_each([change])
    if isinstance(outcome, StorageError):
        raise outcome


async def _wait_for_leases() -> None:
    """Wait until every lease on a phase that was read before now has expired."""
    await asyncio.sleep(LEASE_SECONDS + _MARGIN)


async def _key_chunks(engine: Engine, declared: Collection) -> AsyncGenerator[list[Key], None]:
    """The keys of a collection in chunks, read with keyset pagination: despite concurrent changes,
    an entity that exists throughout is returned exactly once."""
    query = build_query(declared, fields=[declared.key], paged=True)
    async with aclosing(pages(engine, declared, query, _BATCH)) as read:
        async for page in read:
            yield [Key(declared.name, declared.id_of(each)) for each in page]


async def _write_all(session: Session, changes: Sequence[Change]) -> None:
    for outcome in await session.write(changes):
        if isinstance(outcome, ReferenceViolationError):
            # Relatives changed between the two reads: the transaction is retried.
            raise ConcurrencyConflictError(str(outcome), retryable=True) from outcome
        if isinstance(outcome, StorageError):
            raise outcome


async def _write_moving(origin: Engine, session: Session, change: Change) -> None:
    """Write a change, after taking its unique values from the entities that have them."""
    while True:
        try:
            return await _write_all(session, [change])
        except UniqueViolationError as exc:
            await _free(origin, session, exc)


async def _free(origin: Engine, session: Session, refused: UniqueViolationError) -> None:
    """Take the values of a unique index from their owner, and mark it, so that it is copied again.

    Raises:
        ConcurrencyConflictError: the owner has the values in the origin, too.
    """
    owner = Key(refused.collection, refused.owner_id)
    [original], [copied] = await origin.fetch([owner]), await session.fetch([owner])
    if copied is None or (
        original is not None
        and stored_digest(original.entity, refused.fields)
        == stored_digest(copied.entity, refused.fields)
    ):
        raise ConcurrencyConflictError(str(refused), retryable=True) from refused
    freed = Record(owner, {**copied.entity, **dict.fromkeys(refused.fields)})
    marker = marker_of(owner)
    await _write_all(session, [_imported(freed), _imported(Record(marker.key, marker.entity))])


async def _copy_subscriptions(origin: Engine, copy: Engine) -> None:
    """Copy the positions of named subscriptions, which the feed of the copy does not continue.

    A consumer that enters its subscription later learns by them that it missed the switch.
    """
    query = Query(SUBSCRIPTION_COLLECTION.name)
    kept = [_imported(each) async for each in origin.select(query)]
    keys = {each.key for each in kept}
    gone = [Delete(each.key) async for each in copy.select(query) if each.key not in keys]
    if kept or gone:
        for outcome in await copy.write_each([*kept, *gone]):
            if isinstance(outcome, StorageError):
                raise outcome


def _imported(record: Record) -> Put:
    """The change that writes an entity with its version."""
    entity = {name: value for name, value in record.entity.items() if name != VERSION}
    return Put(record.key, entity, utc_now(), import_version=record.version)
