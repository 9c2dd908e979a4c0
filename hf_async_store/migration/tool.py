"""`MigrationTool`: migrates one store to another, step by step or all steps at once."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import msgspec

from hf_async_store.arguments import check_boolean, check_callable, check_declared
from hf_async_store.changes import Delete
from hf_async_store.config import MigrationConfig, absolute, load_config, load_migration
from hf_async_store.errors import (
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
from hf_async_store.migration.copier import (
    RESUME_HINT,
    CollectionCopier,
    MigrationBatch,
    batches_of,
)
from hf_async_store.migration.diff import (
    Comparison,
    compare_declared,
    differing,
    first_unexpected,
)
from hf_async_store.migration.digest import Digest
from hf_async_store.migration.dry_run import enforces_references, find_incompatibilities
from hf_async_store.migration.merge import RULES, MergeRule, name_of, replaces
from hf_async_store.migration.store_checks import (
    check_leave_out,
    first_stored,
    not_empty_in,
    refuse_same,
    refuse_undeclared,
    refuse_undeclared_fields,
    require_store,
)
from hf_async_store.schema import HOST_FACTORY, Collection
from hf_async_store.strategies import open_store
from hf_async_store.strategy import StorageStrategy
from hf_async_store.values import Entity, Key, canonical, version_of

if TYPE_CHECKING:
    from hf_async_store.config import ConfigSource

log: Final = logging.getLogger("hf_async_store.migration")

_CHUNK_SIZE: Final = 500
_MAX_SHOWN: Final = 3

Advance = Callable[[str, int], None]
"""Called with the name of the current work and the number of entities done since the last call."""


class CollectionReport(msgspec.Struct):
    """The result for one collection.

    Attributes:
        read: the number of entities read from the source, including those of earlier runs that
            this run resumed.
        written, unchanged, kept: the number of entities that this run wrote to the target, found
            equal there, or did not write because of the merge rule (see `MergeRule`).
        digest: the digest of the entities that were read, which does not depend on their order.
        cleaned: the number of entities deleted from the source afterwards.
    """

    read: int = 0
    written: int = 0
    unchanged: int = 0
    kept: int = 0
    digest: str = ""
    cleaned: int = 0


class MigrationReport(msgspec.Struct):
    """The result of a migration, or of a dry run.

    Attributes:
        ok: the migration is complete; for a dry run, no problems were found.
        problems: of a dry run: what the target would refuse.
        left_out: undeclared collections and fields that remain in the source, as requested.
        notices: messages for the operator.
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
    """Migrates all entities from one store to another; no other process may write to either store.

    Use it with `async with`, which opens and closes the stores that are given as configurations.

    Args:
        source, target: anything that `open_store` accepts, or an open store.
        config: the `migration` block, in any form that a configuration may have.
        collections: the collections of the stores that are given as configurations.
        merge: how to treat entities that the target holds already; None refuses such a target,
            unless all of its entities equal those of the source.
        leave_out: collections (`jobs`) and fields (`machines.owner`) of the source that are not
            declared and are not migrated. All other undeclared ones are refused.
        advance: called with the progress.

    Raises:
        ConfigurationError: the configuration or a combination of arguments is not valid.
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
        loaded = MigrationConfig() if config is None else load_migration(config)
        self._config = msgspec.structs.replace(
            loaded, backup_location=absolute(loaded.backup_location)
        )
        if merge is not None and merge not in RULES:
            raise ConfigurationError(f"merge must be one of {', '.join(RULES)}, not {merge!r}")
        if self._config.cleanup_source and not self._config.validate_after_migration:
            raise ConfigurationError(
                "migration.cleanup_source needs validate_after_migration: the source is emptied "
                "only after the target was verified"
            )
        check_callable(advance, "advance")
        declared = check_declared(collections, Collection, "collections")
        self._arguments = (source, target)
        self.source = _store(source, declared)
        self.target = _store(target, declared)
        self._merge = merge
        self._leave_out = frozenset(check_declared(leave_out, str, "leave_out"))
        check_leave_out(self._leave_out, self.source.collections)
        if self._config.cleanup_source and any("." in each for each in self._leave_out):
            raise ConfigurationError(
                "migration.cleanup_source cannot be combined with fields that are left out: their "
                "values would be lost when the entities are deleted from the source"
            )
        self.advance = advance
        self._stack = AsyncExitStack()
        location = self._config.backup_location
        path = Path(location)
        folder = path if location.endswith("/") or path.is_dir() else path.parent
        configured = (_configured_location(source), _configured_location(target))
        self._file = CheckpointFile(folder, self.source, self.target, configured)

    async def __aenter__(self) -> Self:
        for store, argument in zip((self.source, self.target), self._arguments, strict=True):
            if store is not argument:
                await self._stack.enter_async_context(store)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    # -- single steps ------------------------------------------------------------------------

    async def validate_source_connection(self) -> None:
        """Check that the source can be read; nothing is written to it.

        Raises:
            StoreNotFoundError: the source does not exist.
            MigrationError: the source cannot be read; `__cause__` is the error.
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
        """Check that the target can be written, by a test write that is not an entity.

        Raises:
            MigrationError: the target cannot be written; `__cause__` is the error.
        """
        try:
            await self.target.test_connection()
        except StorageError as exc:
            raise _failed("the target cannot be written", exc) from exc

    async def validate_schema_compatibility(self) -> list[str]:
        """Check that everything in the source is declared, and that the target declares the same
        collections; returns notices for the operator.

        Raises:
            MigrationError: the target does not declare a collection, or declares another key field;
                or source and target are the same store.
            ConfigurationError: there are undeclared collections or fields.
        """
        await self._refuse_same_store()
        await self._refuse_undeclared()
        await refuse_undeclared_fields(self.target, "the target")
        for name, in_source in self.source.collections.items():
            if name not in self.target.collections:
                raise MigrationError(
                    f"the target does not declare {name!r}; open it with the same collections"
                )
            in_target = self.target.collections[name]
            if in_source.key != in_target.key:
                raise MigrationError(
                    f"the key of {name} is {in_source.key!r} in the source and {in_target.key!r} "
                    "in the target; open both with the same collections"
                )
        notices = []
        if enforces_references(self.target) and not enforces_references(self.source):
            notices.append(
                "the target enforces references and the source does not: an entity whose parent "
                "is missing will be refused (a dry run reports it)"
            )
        if not enforces_references(self.target) and enforces_references(self.source):
            notices.append("the source enforces references, and the target does not")
        return notices

    async def _refuse_same_store(self) -> None:
        await refuse_same(self.source.is_same_store(self.target))

    async def _refuse_undeclared(self) -> list[str]:
        return await refuse_undeclared(self.source, "the source", self._leave_out)

    async def create_backup(
        self, source_type: str | None = None, backup_location: str | Path | None = None
    ) -> str:
        """Write a portable backup of the source; returns its path.

        Args:
            source_type: the expected engine of the source, if any.
            backup_location: a new file, or a folder; by default the configured one.

        Raises:
            ConfigurationError: the source is of another engine.
        """
        engine = self.source.capabilities.engine
        _check_location(backup_location)
        if source_type is not None and not _is_type(source_type, engine):
            raise ConfigurationError(f"the engine of the source is {engine!r}, not {source_type!r}")
        backup = await backup_store(
            self.source,
            backup_location or self._config.backup_location,
            stem="migration_backup",
            leave_out=self._leave_out,
        )
        return backup.path

    async def get_migration_batches(
        self, batch_size: int | None = None
    ) -> AsyncGenerator[MigrationBatch, None]:
        """All entities of the source, in batches of one collection each, parents before children."""
        size = self._config.batch_size if batch_size is None else batch_size
        if type(size) is not int or size < 1:
            raise ConfigurationError("batch_size must be a positive integer, or None")
        for name in self.source.collections:
            async with aclosing(batches_of(self.source, name, size)) as batches:
                async for each in batches:
                    yield each

    async def validate_migration(self) -> dict[str, int]:
        """Read both stores completely and compare them; returns the counts by collection.

        Raises:
            StoreNotFoundError: one of the stores does not exist.
            MigrationError: both are the same store, or this cannot be determined.
            VerificationError: the stores differ; `differences` lists the first differences by id
                and field.
        """
        await require_store(self.source, "the source")
        await require_store(self.target, "the target")
        await self._refuse_undeclared()
        compared = await self.compare()
        refuse_different(compared)
        return {name: each.target_count for name, each in compared.collections.items()}

    async def compare(self) -> Comparison:
        """Compare the declared collections: counts, digests, and the first differences.

        Raises:
            MigrationError: both are the same store, or this cannot be determined.
        """
        advance = partial(self.advance, "verify")
        return await compare_declared(self.source, self.target, advance=advance)

    # -- all steps ---------------------------------------------------------------------------

    async def migrate(self, *, dry_run: bool = False) -> MigrationReport:
        """Back up, copy, verify and, if configured, empty the source.

        Running it again changes nothing. Until the target was verified, the source is unchanged,
        whatever error occurs.

        Args:
            dry_run: write nothing; read the whole source and report what the target would refuse.

        Raises:
            TargetNotEmptyError: the target holds other entities, and no merge rule was given.
            MigrationError: a step failed; `__cause__` is the error, and the message says what to do.
            VerificationError: source and target differ after copying.
        """
        check_boolean(dry_run, "dry_run")
        report = self._report(dry_run=dry_run)
        started = time.monotonic()
        await self._check_stores(report)
        if dry_run:
            await self._dry_run(report)
        else:
            await self.validate_target_connection()
            rule = await self._write_rule()
            await self._back_up(report)
            checkpoint = Checkpoint(
                self._file.pair,
                self._config.batch_size,
                rule,
                self._merge if rule == self._merge else None,
                {name: Progress() for name in self.source.collections},
                report.backup,
            )
            # Saved before the first write, so that the migration can be resumed from then on.
            await self._file.save(checkpoint)
            await self._copy_and_verify(checkpoint, report)
        report.seconds = round(time.monotonic() - started, 3)
        return report

    async def resume(self) -> MigrationReport:
        """Continue an interrupted migration from its checkpoint.

        First, the entities that were copied already are read from both stores. If a collection of
        the source has changed since, it is compared from its beginning, and entities that differ are
        copied again; a notice in the report says so.

        Raises:
            MigrationError: there is no checkpoint; or the target was changed since the checkpoint.
        """
        report = self._report(resumed=True)
        started = time.monotonic()
        checkpoint = await self._file.read()
        if checkpoint is None:
            raise MigrationError(
                f"there is nothing to resume: the progress file {self._file.path} does not exist. Start "
                "again with `migrate`; entities that are in the target already are not written again"
            )
        await self._check_stores(report)
        await self.validate_target_connection()
        report.backup = checkpoint.backup
        for name in self.source.collections:
            progress = checkpoint.collections.setdefault(name, Progress())
            if progress.count or progress.done:
                await self._check_progress(name, progress, checkpoint, report)
        await self._copy_and_verify(checkpoint, report)
        report.seconds = round(time.monotonic() - started, 3)
        return report

    async def _check_stores(self, report: MigrationReport) -> None:
        await self.validate_source_connection()
        report.notices += await self.validate_schema_compatibility()
        report.left_out = await self._refuse_undeclared()

    def _report(self, *, dry_run: bool = False, resumed: bool = False) -> MigrationReport:
        return MigrationReport(
            self.source.capabilities.engine,
            self.target.capabilities.engine,
            dry_run=dry_run,
            resumed=resumed,
            collections={name: CollectionReport() for name in self.source.collections},
        )

    async def _dry_run(self, report: MigrationReport) -> None:
        """Report the problems that a migration would encounter."""
        try:
            await self._write_rule()
        except TargetNotEmptyError as exc:
            report.problems.append(str(exc))
        except StorageError as exc:
            raise _failed("the target cannot be read", exc) from exc
        counts, problems, more = await find_incompatibilities(
            self.source, self.target, advance=partial(self.advance, "check")
        )
        for name, count in counts.items():
            report.collections[name].read = count
        report.problems += problems
        report.more_problems = more

    async def _write_rule(self) -> MergeRule | None:
        """The rule by which entities are written to the target; None if it is empty.

        Raises:
            TargetNotEmptyError: the target holds other entities, and no merge rule was given.
        """
        not_empty = await not_empty_in(self.target)
        if self._merge is not None or not not_empty:
            return self._merge if not_empty else None
        # An earlier run may have written these entities. Then all of them equal the source's.
        unexpected = await first_unexpected(self.source, self.target)
        if unexpected is None:
            return "keep"
        problem = "is not in" if unexpected.kind == "extra" else "differs from that in"
        raise TargetNotEmptyError(
            f"the target is not empty, and {unexpected.collection} {unexpected.id!r} in it "
            f"{problem} the source; nothing was written. Use an empty target, or give a merge rule "
            "(merge, or --merge on the command line): keep, replace or newest"
        )

    async def _back_up(self, report: MigrationReport) -> None:
        if not self._config.create_backup:
            return
        try:
            report.backup = await self.create_backup()
            log.info("migration: the source was backed up")
        except StorageError as exc:
            raise _failed("the backup failed, so nothing was migrated", exc) from exc

    async def _copy_and_verify(self, checkpoint: Checkpoint, report: MigrationReport) -> None:
        for name in self.source.collections:
            await self._copy(name, checkpoint, report)
        if self._config.validate_after_migration:
            await self._verify(checkpoint.merge, report)
        if self._config.cleanup_source:
            await self._clean(checkpoint.merge, report)
        await self._file.remove()

    async def _copy(self, name: str, checkpoint: Checkpoint, report: MigrationReport) -> None:
        start = checkpoint.collections[name]
        result = report.collections[name]
        result.read, result.digest = start.count, start.digest or str(Digest())
        if start.done:
            return
        copier = CollectionCopier(
            source=self.source,
            target=self.target,
            declared=self.target.collections[name],
            size=self._config.batch_size,
            workers=self._config.parallel_workers,
            rule=checkpoint.rule,
            start=start,
            save=partial(self._save_progress, checkpoint, name),
            advance=partial(self.advance, name),
        )
        self.advance(name, start.count)
        try:
            await copier.run()
        except StorageError as exc:
            raise _failed(
                f"{name} could not be copied; the source is unchanged, and the entities copied so "
                f"far remain in the target. Fix the cause, {RESUME_HINT}",
                exc,
            ) from exc
        finally:
            await self._file.wait_written()
            result.written, result.unchanged, result.kept = msgspec.structs.astuple(copier.merged)
            result.read, result.digest = copier.digest.count, str(copier.digest)
        log.info("migration: copied %s, %d entities", name, result.read)

    async def _save_progress(self, checkpoint: Checkpoint, name: str, progress: Progress) -> None:
        checkpoint.collections[name] = progress
        await self._file.save(checkpoint)

    async def _check_progress(
        self, name: str, progress: Progress, checkpoint: Checkpoint, report: MigrationReport
    ) -> None:
        """Check that the entities copied so far are still the same in both stores."""
        in_source, in_target = Digest(), Digest()
        changed: list[str] = []
        async with aclosing(batches_of(self.source, name, checkpoint.batch_size)) as batches:
            async for batch in batches:
                # If the collection was complete, read all of it: the source may have grown since.
                remaining = (
                    len(batch.entities) if progress.done else progress.count - in_source.count
                )
                if remaining <= 0:
                    break
                for entity_id, entity, copy in await self._copies(name, batch.entities[:remaining]):
                    in_source.add(canonical(entity))
                    if copy is not None:
                        in_target.add(canonical(copy))
                    if (copy is None or differing(entity, copy)) and len(changed) < _MAX_SHOWN:
                        changed.append(entity_id)
        recorded = Digest(progress.digest, progress.count)
        if in_source != recorded:
            report.notices.append(
                f"{name} changed in the source since its progress was recorded, so it is compared from its "
                f"beginning ({_ids(changed)})"
            )
            checkpoint.collections[name] = Progress()
            checkpoint.rule = checkpoint.rule or "replace"
        elif checkpoint.rule is None and in_target != recorded:
            raise MigrationError(
                f"{name} changed in the target since its progress was recorded ({_ids(changed)}): another "
                "program writes to it, or the target was replaced. Stop that program, then empty "
                "the target and migrate again, or migrate with a merge rule; "
                f"{self._file.path} can be removed"
            )

    async def _copies(
        self, name: str, entities: Sequence[Entity]
    ) -> Iterable[tuple[str, Entity, Entity | None]]:
        """Entities of the source, each with its id and its copy in the target, if there is one."""
        ids = list(map(self.source.collections[name].id_of, entities))
        return zip(ids, entities, await self.target._get_stored(name, ids), strict=True)

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
                "everything was copied, but the verification failed; the source is unchanged. Fix "
                "the cause, then verify again, or resume",
                exc,
            ) from exc
        report.verified = True
        log.info("migration: verified")

    async def _verify_merge(self, rule: MergeRule) -> None:
        """Check that the target holds every entity of the source, or another one that the rule
        prefers."""
        differences: list[str] = []
        async for batch in self.get_migration_batches(_CHUNK_SIZE):
            name = batch.collection
            for entity_id, entity, copy in await self._copies(name, batch.entities):
                if copy is None:
                    differences.append(f"{name} {entity_id!r} is missing in the target")
                elif differing(entity, copy) and replaces(entity, copy, rule):
                    differences.append(
                        f"{name} {entity_id!r} differs in {', '.join(differing(entity, copy))}"
                    )
            self.advance("verify", len(batch.entities))
            if len(differences) > _CHUNK_SIZE:
                break
        if differences:
            raise VerificationError(_different(differences), differences)

    async def _clean(self, merge: MergeRule | None, report: MigrationReport) -> None:
        """Delete the entities that the target holds from the source, children before parents."""
        # Checked again, because a target that this run has created could not be checked before.
        await self._refuse_same_store()
        await self._refuse_undeclared()
        for name in reversed(list(self.source.collections)):
            while entities := await first_stored(self.source, name, _CHUNK_SIZE):
                deleted = await self._clean_batch(name, entities, merge)
                report.collections[name].cleaned += deleted
                self.advance("clean", deleted)
        report.cleaned = True

    async def _clean_batch(self, name: str, entities: list[Entity], merge: MergeRule | None) -> int:
        """Delete entities that are in the target and have not changed in the source since they
        were read; returns the number of deleted entities."""
        versions: dict[str, int] = {}
        for entity_id, entity, copy in await self._copies(name, entities):
            versions[entity_id] = version_of(entity)
            if copy is None or (
                differing(entity, copy) and (merge is None or replaces(entity, copy, merge))
            ):
                raise MigrationError(
                    f"emptying the source was stopped: {name} {entity_id!r} changed since it was "
                    "verified, and differs from the target; all entities that were deleted from the "
                    "source are in the target"
                )
        deletes = [Delete(Key(name, each), version) for each, version in versions.items()]
        outcomes = await self.source._import(deletes)
        errors = [
            (entity, each)
            for entity, each in zip(entities, outcomes, strict=True)
            if isinstance(each, StorageError)
        ]
        deleted = len(entities) - len(errors)
        if not errors or (
            deleted and all(isinstance(each, ReferenceViolationError) for _, each in errors)
        ):
            return deleted  # the others are parents, whose children are deleted by now
        first, error = errors[0]
        raise _failed(
            "the target was verified, but the source could not be emptied completely; all "
            "entities that were deleted from the source are in the target. If no program has "
            "written to the source since, use the target, and delete the rest of the source "
            "yourself. The first error: "
            f"{name_of(self.source.collections[name], first)}",
            error,
        ) from error


# -- functions ------------------------------------------------------------------------------


def _store(
    argument: StorageStrategy | ConfigSource, collections: tuple[Collection, ...]
) -> StorageStrategy:
    if isinstance(argument, StorageStrategy):
        return argument
    return open_store(load_config(argument), collections=collections)


def _configured_location(argument: StorageStrategy | ConfigSource) -> str:
    """The location of a store that a third-party strategy opens; empty if it is another, or has none."""
    if not isinstance(argument, StorageStrategy):
        config = load_config(argument)
        if isinstance(config.options, Mapping) and "url" in config.options:
            return config.location()
    return ""


def _check_location(location: object) -> None:
    if not isinstance(location, str | Path | None):
        raise ConfigurationError(
            f"backup_location must be a path or None, not {type(location).__name__}"
        )


def _is_type(source_type: str, engine: str) -> bool:
    return source_type == engine or (source_type == "sql" and engine in ("sqlite", "postgresql"))


def _failed(message: str, cause: StorageError) -> MigrationError:
    return MigrationError(f"{message}: {cause}", retryable=cause.retryable)


def _ids(changed: list[str]) -> str:
    return f"the first: {', '.join(map(repr, changed))}" if changed else "some were deleted"


def _different(differences: list[str]) -> str:
    more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
    return (
        f"source and target differ: {'; '.join(differences[:3])}{more}. The source is unchanged. "
        "Stop all programs that write to either store. Only if none has written to the target, "
        "migrate again with the merge rule replace, and delete the entities that are in the target only; "
        "otherwise use an empty target"
    )


def refuse_different(compared: Comparison) -> None:
    """Raise an error if the two stores differ.

    Raises:
        VerificationError: the stores differ.
    """
    if not compared.equal:
        listed = [str(each) for each in compared.differences]
        raise VerificationError(_different(listed), listed)


__all__ = ["CollectionReport", "Entity", "MigrationReport", "MigrationTool"]
