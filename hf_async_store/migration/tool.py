"""`MigrationTool`: from one store to another, by the steps of the spec or all of them at once."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, cast

import msgspec

from hf_async_store.config import MigrationConfig, absolute, load_migration
from hf_async_store.errors import (
    BatchError,
    ConfigurationError,
    MigrationError,
    ReferenceViolationError,
    StorageError,
    StoreNotFoundError,
    TargetNotEmptyError,
    VerificationError,
)
from hf_async_store.migration.backup import backup_store
from hf_async_store.migration.checkpoint import Checkpoint, CheckpointFile, Progress
from hf_async_store.migration.copier import RESUME_HINT, Copying, MigrationBatch, batches_of
from hf_async_store.migration.diff import (
    Comparison,
    compare_declared,
    differing,
    first_unexpected,
)
from hf_async_store.migration.digest import Digest
from hf_async_store.migration.merge import RULES, Merged, MergeRule, name_of, resolve
from hf_async_store.migration.preflight import enforces_references, find_incompatibilities
from hf_async_store.migration.requirements import (
    check_leave_out,
    refuse_same,
    refuse_undeclared,
    refuse_undeclared_fields,
    require_store,
)
from hf_async_store.schema import HOST_FACTORY, Collection
from hf_async_store.strategies import open_store
from hf_async_store.strategy import StorageStrategy
from hf_async_store.values import VERSION, Entity, canonical

if TYPE_CHECKING:
    from hf_async_store.config import ConfigSource

_CHUNK_SIZE: Final = 500
_MAX_SHOWN: Final = 3

Advance = Callable[[str, int], None]
"""Is told what is going on, and how many entities it has done more."""


class CollectionReport(msgspec.Struct):
    """What became of one collection.

    Attributes:
        read: entities of the source, from its begin.
        written, unchanged, kept: what this run did with them (see `MergeRule`).
        digest: of what was read, whatever its order.
        cleaned: how many were taken out of the source afterwards.
    """

    read: int = 0
    written: int = 0
    unchanged: int = 0
    kept: int = 0
    digest: str = ""
    cleaned: int = 0


class MigrationReport(msgspec.Struct):
    """What a migration did, or, as a dry run, would meet.

    Attributes:
        ok: it came to its end, and what was to be verified is.
        problems: of a dry run: what is incompatible with the target.
        left_out: what the source holds and nobody declared, left there as requested.
        notices: what a person should know.
        verified: source and target were compared, and are equal (or merged by the rule).
    """

    source: str
    target: str
    dry_run: bool = False
    resumed: bool = False
    backup: str | None = None
    collections: dict[str, CollectionReport] = {}
    verified: bool = False
    cleaned: bool = False
    problems: list[str] = []
    more_problems: bool = False
    left_out: list[str] = []
    notices: list[str] = []
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems


class MigrationTool:
    """Moves everything from one store to another; neither may be written to meanwhile.

    Use it with `async with`, which opens and closes the stores that it was given as configurations.

    Args:
        source, target: whatever `open_store` takes, or an open store.
        config: the `migration` block, in any form that a configuration has.
        collections: what is moved, where the stores are not open yet.
        merge: how to settle with entities that the target has already; None refuses such a target
            unless all it holds is of this source.
        leave_out: what the source holds, is not declared and stays there: collections (`jobs`) and
            fields (`machines.owner`). Whatever else is not declared is refused.
        advance: called with the progress.

    Raises:
        ConfigurationError.
    """

    def __init__(
        self,
        source: StorageStrategy | ConfigSource,
        target: StorageStrategy | ConfigSource,
        config: MigrationConfig | ConfigSource | None = None,
        *,
        collections: Iterable[Collection] = HOST_FACTORY,
        merge: MergeRule | None = None,
        leave_out: Iterable[str] = (),
        advance: Advance = lambda what, count: None,
    ) -> None:
        given = MigrationConfig() if config is None else load_migration(config)
        self._config = msgspec.structs.replace(
            given, backup_location=absolute(given.backup_location)
        )
        if merge is not None and merge not in RULES:
            raise ConfigurationError(f"merge is one of {', '.join(RULES)}, not {merge!r}")
        if self._config.cleanup_source and not self._config.validate_after_migration:
            raise ConfigurationError(
                "migration.cleanup_source needs validate_after_migration: the source is emptied "
                "only when it is proven that nothing is lost"
            )
        declared = tuple(collections)
        self._given = (source, target)
        self.source = _store(source, declared)
        self.target = _store(target, declared)
        self._merge = merge
        self._leave_out = frozenset(leave_out)
        check_leave_out(self._leave_out, self.source.collections)
        if self._config.cleanup_source and any("." in each for each in self._leave_out):
            raise ConfigurationError(
                "migration.cleanup_source does not go with fields that are left out: with their "
                "entities they would be gone"
            )
        self.advance = advance
        self._stack = AsyncExitStack()
        location = self._config.backup_location
        folder = Path(location) if location.endswith("/") else Path(location).parent
        self._file = CheckpointFile(folder, self.source, self.target)

    async def __aenter__(self) -> Self:
        for store, given in zip((self.source, self.target), self._given, strict=True):
            if store is not given:
                await self._stack.enter_async_context(store)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    # -- the steps of the spec ---------------------------------------------------------------

    async def validate_source_connection(self) -> None:
        """Make sure that the source can be read; nothing is written to it.

        Raises:
            StoreNotFoundError: nothing is there.
            MigrationError: what stands in the way, as its cause.
        """
        try:
            await require_store(self.source, "the source")
            for name in self.source.collections:
                await self.source.query_entities(name, limit=1)
        except StoreNotFoundError:
            raise
        except StorageError as exc:
            raise _failed("the source cannot be read", exc) from exc

    async def validate_target_connection(self) -> None:
        """Make sure that the target can be written, by a probe that is no entity.

        Raises:
            MigrationError: what stands in the way, as its cause.
        """
        try:
            await self.target.test_connection()
        except StorageError as exc:
            raise _failed("the target cannot be written", exc) from exc

    async def validate_schema_compatibility(self) -> list[str]:
        """Make sure that the source declares all that it holds, and the target what the source does;
        returns what is worth knowing.

        Raises:
            MigrationError: a collection that the target lacks, or another key field; or the two
                are one store.
            ConfigurationError: there is more in the source than is declared.
        """
        await self._refuse_one_store()
        await self._look_for_undeclared()
        await refuse_undeclared_fields(self.target, "the target")
        for name, ours in self.source.collections.items():
            if name not in self.target.collections:
                raise MigrationError(
                    f"the target does not declare {name!r}; open it with the same collections"
                )
            theirs = self.target.collections[name]
            if ours.key != theirs.key:
                raise MigrationError(
                    f"the key of {name} is {ours.key!r} in the source and {theirs.key!r} in the "
                    "target; open both with the same collections"
                )
        notices = []
        if enforces_references(self.target) and not enforces_references(self.source):
            notices.append(
                "the target enforces references and the source does not: an entity whose parent "
                "is missing will be refused (a dry run finds it)"
            )
        if not enforces_references(self.target) and enforces_references(self.source):
            notices.append("the target does not enforce references, as the source did")
        return notices

    async def _refuse_one_store(self) -> None:
        await refuse_same(self.source.is_same_store(self.target))

    async def _look_for_undeclared(self) -> list[str]:
        return await refuse_undeclared(self.source, "the source", self._leave_out)

    async def create_backup(
        self, source_type: str | None = None, backup_location: str | Path | None = None
    ) -> str:
        """Write a portable backup of the source; returns its path.

        Args:
            source_type: what the caller takes the source for; refused if it is another engine.
            backup_location: a new file, or a folder; the configured one if left out.
        """
        engine = self.source.capabilities.engine
        if source_type is not None and not _is_type(source_type, engine):
            raise ConfigurationError(f"the source is of the engine {engine!r}, not {source_type!r}")
        made = await backup_store(
            self.source,
            backup_location or self._config.backup_location,
            stem="migration_backup",
            leave_out=self._leave_out,
        )
        return made.path

    async def get_migration_batches(
        self, batch_size: int | None = None
    ) -> AsyncGenerator[MigrationBatch, None]:
        """Everything in the source, in batches of one collection each, parents before children."""
        size = batch_size or self._config.batch_size
        for name in self.source.collections:
            async with aclosing(batches_of(self.source, name, size)) as batches:
                async for each in batches:
                    yield each

    async def validate_migration(self) -> dict[str, int]:
        """Read both stores through and compare them; returns the counts by collection.

        Raises:
            StoreNotFoundError: one of them is not there.
            VerificationError: they differ; the first differences are in it, by id and field.
        """
        await require_store(self.source, "the source")
        await require_store(self.target, "the target")
        await self._look_for_undeclared()
        compared = await self.compare()
        refuse_different(compared)
        return {name: each.target_count for name, each in compared.collections.items()}

    async def compare(self) -> Comparison:
        """Both stores side by side: counts, digests, and the first differences in what is declared."""
        return await compare_declared(
            self.source, self.target, advance=lambda count: self.advance("verify", count)
        )

    # -- all of them -------------------------------------------------------------------------

    async def migrate(self, *, dry_run: bool = False) -> MigrationReport:
        """Back up, copy, verify and, if configured, empty the source.

        Running it again changes nothing. Whatever goes wrong, the source is as it was, until it
        was verified that the target has everything.

        Args:
            dry_run: write nothing; read the source through and report what is incompatible.

        Raises:
            TargetNotEmptyError: the target holds something else, and no rule was given.
            MigrationError: what went wrong, as its cause, and what to do next.
            VerificationError: source and target differ afterwards.
        """
        report = self._report(dry_run=dry_run)
        started = time.monotonic()
        await self._look(report)
        if dry_run:
            await self._would_meet(report)
        else:
            await self.validate_target_connection()
            rule = await self._rule()
            await self._back_up(report)
            checkpoint = Checkpoint(
                self._file.pair,
                self._config.batch_size,
                rule,
                self._merge if rule == self._merge else None,
                {name: Progress() for name in self.source.collections},
                report.backup,
            )
            # Before the first write, so that whatever follows can be resumed.
            await self._file.save(checkpoint)
            await self._go_on(checkpoint, report)
        report.seconds = round(time.monotonic() - started, 3)
        return report

    async def resume(self) -> MigrationReport:
        """Go on with a migration that was interrupted, from its checkpoint.

        What was copied is read on both sides first. If the source changed since, the collection is
        compared from its begin and what differs is copied again; the report says so.

        Raises:
            MigrationError: there is nothing to resume; or the target was changed since by others.
        """
        report = self._report(resumed=True)
        started = time.monotonic()
        checkpoint = await self._file.read()
        if checkpoint is None:
            raise MigrationError(
                f"there is nothing to resume: no checkpoint {self._file.path}. `migrate` begins "
                "anew, and writes nothing twice"
            )
        await self._look(report)
        await self.validate_target_connection()
        report.backup = checkpoint.backup
        for name in self.source.collections:
            progress = checkpoint.collections.setdefault(name, Progress())
            if progress.count or progress.done:
                await self._check_progress(name, progress, checkpoint, report)
        await self._go_on(checkpoint, report)
        report.seconds = round(time.monotonic() - started, 3)
        return report

    async def _look(self, report: MigrationReport) -> None:
        await self.validate_source_connection()
        report.notices += await self.validate_schema_compatibility()
        report.left_out = await self._look_for_undeclared()

    def _report(self, *, dry_run: bool = False, resumed: bool = False) -> MigrationReport:
        return MigrationReport(
            self.source.capabilities.engine,
            self.target.capabilities.engine,
            dry_run=dry_run,
            resumed=resumed,
            collections={name: CollectionReport() for name in self.source.collections},
        )

    async def _would_meet(self, report: MigrationReport) -> None:
        try:
            await self._rule()
        except TargetNotEmptyError as exc:
            report.problems.append(str(exc))
        except StorageError as exc:
            raise _failed("the target cannot be read", exc) from exc
        counts, problems, more = await find_incompatibilities(
            self.source, self.target, advance=lambda count: self.advance("check", count)
        )
        for name, count in counts.items():
            report.collections[name].read = count
        report.problems += problems
        report.more_problems = more

    async def _rule(self) -> MergeRule | None:
        """How to write into this target.

        Raises:
            TargetNotEmptyError.
        """
        full = [name for name in self.target.collections if await self._holds_any(name)]
        if self._merge is not None or not full:
            return self._merge if full else None
        # Left by an earlier run, perhaps. Then all of it is of this source.
        stranger = await first_unexpected(self.source, self.target)
        if stranger is None:
            return "keep"
        what = "is not in the source" if stranger.kind == "extra" else "differs from the source's"
        raise TargetNotEmptyError(
            f"the target is not empty, and {stranger.collection} {stranger.id!r} in it {what}; "
            "nothing was written. Take an empty target, or say with merge (--merge on the command "
            "line) what counts: keep, replace or newest"
        )

    async def _holds_any(self, name: str) -> bool:
        return bool(await self.target.query_entities(name, limit=1))

    async def _back_up(self, report: MigrationReport) -> None:
        if not self._config.create_backup:
            return
        try:
            report.backup = await self.create_backup()
        except StorageError as exc:
            raise _failed("no backup could be made, so nothing was moved", exc) from exc

    async def _go_on(self, checkpoint: Checkpoint, report: MigrationReport) -> None:
        for name in self.source.collections:
            await self._copy(name, checkpoint, report)
        if self._config.validate_after_migration:
            await self._verify(checkpoint.merge, report)
        if self._config.cleanup_source:
            await self._clean(checkpoint.merge, report)
        await self._file.remove()

    async def _copy(self, name: str, checkpoint: Checkpoint, report: MigrationReport) -> None:
        start = checkpoint.collections[name]
        told = report.collections[name]
        told.read, told.digest = start.count, start.digest or str(Digest())
        if start.done:
            return

        async def save(progress: Progress) -> None:
            checkpoint.collections[name] = progress
            await self._file.save(checkpoint)

        copying = Copying(
            self.source,
            self.target,
            name,
            size=self._config.batch_size,
            workers=self._config.parallel_workers,
            rule=checkpoint.rule,
            start=start,
            save=save,
            advance=lambda count: self.advance(name, count),
        )
        self.advance(name, start.count)
        try:
            await copying.run()
        except StorageError as exc:
            raise _failed(
                f"{name} could not be copied; the source is as it was, and what was copied stays "
                f"in the target. Fix the cause, {RESUME_HINT}",
                exc,
            ) from exc
        finally:
            await self._file.settle()
            _count(told, copying.merged)
            told.read, told.digest = copying.digest.count, str(copying.digest)

    async def _check_progress(
        self, name: str, progress: Progress, checkpoint: Checkpoint, report: MigrationReport
    ) -> None:
        """Whether what was copied is still the same on both sides."""
        ours, theirs = Digest(), Digest()
        key = self.source.collections[name].key
        changed: list[str] = []
        async with aclosing(batches_of(self.source, name, checkpoint.batch_size)) as batches:
            async for batch in batches:
                # All of it, if all was copied: it may have grown since.
                left = len(batch.entities) if progress.done else progress.count - ours.count
                if left <= 0:
                    break
                entities = batch.entities[:left]
                ids = [cast("str", each[key]) for each in entities]
                twins = await self.target.get_entities(name, ids)
                for entity_id, entity, twin in zip(ids, entities, twins, strict=True):
                    ours.add(canonical(entity))
                    if twin is not None:
                        theirs.add(canonical(twin))
                    if (twin is None or differing(entity, twin)) and len(changed) < _MAX_SHOWN:
                        changed.append(entity_id)
        recorded = Digest(progress.digest, progress.count)
        if ours != recorded:
            report.notices.append(
                f"{name} changed in the source since the checkpoint, so it is compared from its "
                f"begin ({_ids(changed)})"
            )
            checkpoint.collections[name] = Progress()
            checkpoint.rule = checkpoint.rule or "replace"
        elif checkpoint.rule is None and theirs != recorded:
            raise MigrationError(
                f"{name} changed in the target since the checkpoint ({_ids(changed)}): somebody "
                "else writes to it, or it is another one. Stop that, then empty the target and "
                f"migrate anew, or migrate with a merge rule; {self._file.path} can be removed"
            )

    async def _verify(self, merge: MergeRule | None, report: MigrationReport) -> None:
        try:
            if merge is None:
                refuse_different(await self.compare())
            else:
                await self._verify_merge(merge)
        except VerificationError:
            raise
        except StorageError as exc:
            raise _failed(
                "everything was copied, and could not be verified; the source is as it was. Mend "
                "the cause, then verify again, or resume",
                exc,
            ) from exc
        report.verified = True

    async def _verify_merge(self, rule: MergeRule) -> None:
        """That every entity of the source is in the target, or lost to another by the rule."""
        wrong: list[str] = []
        async for batch in self.get_migration_batches(_CHUNK_SIZE):
            key = self.source.collections[batch.collection].key
            ids = [cast("str", each[key]) for each in batch.entities]
            twins = await self.target.get_entities(batch.collection, ids)
            for entity_id, entity, twin in zip(ids, batch.entities, twins, strict=True):
                if twin is None:
                    wrong.append(f"{batch.collection} {entity_id!r} is missing in the target")
                elif differing(entity, twin) and resolve(entity, twin, rule):
                    wrong.append(
                        f"{batch.collection} {entity_id!r} differs in "
                        + ", ".join(differing(entity, twin))
                    )
            self.advance("verify", len(ids))
            if len(wrong) > _CHUNK_SIZE:
                break
        if wrong:
            raise VerificationError(_different(wrong), wrong)

    async def _clean(self, merge: MergeRule | None, report: MigrationReport) -> None:
        """Empty the source, children before parents: of each entity that the target has."""
        # Once more: a target that was only made by this run could not be asked before.
        await self._refuse_one_store()
        await self._look_for_undeclared()
        for name in reversed(list(self.source.collections)):
            while entities := await self.source.query_entities(name, limit=_CHUNK_SIZE):
                gone = await self._clean_batch(name, entities, merge)
                report.collections[name].cleaned += gone
                self.advance("clean", gone)
        report.cleaned = True

    async def _clean_batch(self, name: str, entities: list[Entity], merge: MergeRule | None) -> int:
        """Delete what is certainly in the target, and has not changed since it was read here."""
        key = self.source.collections[name].key
        ids = [cast("str", each[key]) for each in entities]
        twins = await self.target.get_entities(name, ids)
        for entity_id, entity, twin in zip(ids, entities, twins, strict=True):
            if twin is None or (
                differing(entity, twin) and (merge is None or resolve(entity, twin, merge))
            ):
                raise MigrationError(
                    f"the source is not emptied any further: {name} {entity_id!r} changed since it "
                    "was verified, and the target does not have it so; all that is gone from the "
                    "source is in the target"
                )
        versions = {
            entity_id: cast("int", entity[VERSION])
            for entity_id, entity in zip(ids, entities, strict=True)
        }
        try:
            return len(await self.source.delete_entities(name, ids, versions))
        except BatchError as exc:
            errors = [
                (entity, each)
                for entity, each in zip(entities, exc.outcomes, strict=True)
                if isinstance(each, StorageError)
            ]
            done = len(ids) - len(errors)
            if done and all(isinstance(each, ReferenceViolationError) for _, each in errors):
                return done  # parents in their own collection: their children are gone now
            first, error = errors[0]
            raise _failed(
                "the source was verified, and could not be emptied as a whole; all that is gone "
                f"from it is in the target. {name_of(self.source.collections[name], first)}",
                error,
            ) from exc


# -- parts ----------------------------------------------------------------------------------


def _store(given: object, collections: tuple[Collection, ...]) -> StorageStrategy:
    if isinstance(given, StorageStrategy):
        return given
    return open_store(cast("Mapping[str, object]", given), collections=collections)


def _is_type(source_type: str, engine: str) -> bool:
    return source_type == engine or (source_type == "sql" and engine in ("sqlite", "postgresql"))


def _count(told: CollectionReport, merged: Merged) -> None:
    told.written += merged.written
    told.unchanged += merged.unchanged
    told.kept += merged.kept


def _failed(what: str, cause: StorageError) -> MigrationError:
    return MigrationError(f"{what}: {cause}", retryable=cause.retryable)


def _ids(changed: list[str]) -> str:
    return f"the first: {', '.join(map(repr, changed))}" if changed else "some are gone"


def _different(differences: list[str]) -> str:
    more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
    return (
        f"source and target differ: {'; '.join(differences[:3])}{more}. The source is as it was. "
        "If nobody writes to it, migrate again with merge replace; what is extra in the target "
        "must be deleted there"
    )


def refuse_different(compared: Comparison) -> None:
    """
    Raises:
        VerificationError: the two are not equal.
    """
    if not compared.equal:
        listed = [str(each) for each in compared.differences]
        raise VerificationError(_different(listed), listed)


__all__ = ["CollectionReport", "Entity", "MigrationReport", "MigrationTool"]
