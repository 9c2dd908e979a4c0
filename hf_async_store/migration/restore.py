"""Restoring a portable backup into a store: the whole file is verified before it is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.errors import (
    CorruptionError,
    InvalidInputError,
    MigrationError,
    ReferenceViolationError,
    StorageError,
    TargetNotEmptyError,
)
from hf_async_store.migration.backup_format import (
    read_header,
    read_portable,
    refuse_other_schema,
)
from hf_async_store.migration.backup_verification import Parents, check_portable
from hf_async_store.migration.dry_run import enforces_references
from hf_async_store.migration.merge import Merged, MergeRule, put
from hf_async_store.migration.store_checks import (
    check_leave_out,
    not_empty_in,
    refuse_undeclared_fields,
)
from hf_async_store.schema import Schema
from hf_async_store.values import Entity

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy

_BATCH_SIZE: Final = 1000


class RestoreResult(msgspec.Struct, frozen=True):
    """The result of `restore_store`.

    Attributes:
        path: the path of the backup.
        merged: the number of entities that were written, unchanged or kept, by collection.
        left_out: collections of the backup that were not restored, as requested.
    """

    path: str
    merged: dict[str, Merged]
    left_out: list[str] = []


async def restore_store(
    store: StorageStrategy,
    path: str | Path,
    *,
    merge: MergeRule | None = None,
    leave_out: Collection[str] = (),
    advance: Callable[[int], None] = lambda count: None,
) -> RestoreResult:
    """Restore a portable backup into a store, with the original versions and timestamps.

    The whole file is verified before anything is written: its digests, that each entity can be
    stored in this store, and that the parents of each entity exist. Entities are written in batches.
    Repeat an interrupted restore with `merge="replace"` if it had no rule, otherwise with the same rule.

    Args:
        merge: how to treat entities that the store holds already (see `MergeRule`); None requires
            an empty store.
        leave_out: collections of the file that are not declared and are not restored.
        advance: called with the number of entities of each batch that is done.

    Raises:
        CorruptionError: the file is truncated or was altered, or an entity cannot be stored in any
            store.
        InvalidInputError: the file is not a portable backup, or an entity does not fit its
            declaration.
        ReferenceViolationError: a parent is missing.
        TargetNotEmptyError: the store is not empty, and no merge rule was given.
        ConfigurationError: the store has fields that are not declared.
        MigrationError: an error occurred after writing had begun; the message says how many
            entities were written.

    After any error but the last, nothing was written.
    """
    path = Path(path)
    check_leave_out(leave_out, store.collections)
    header = await read_header(path)
    refuse_other_schema(header, Schema(store.collections.values()), path, leave_out)
    await refuse_undeclared_fields(store, "the store")
    parents = Parents(store.collections) if enforces_references(store) else None
    try:
        await check_portable(path, store.collections, parents)
        if parents is not None:
            await parents.refuse_missing(store)
    except (CorruptionError, InvalidInputError, ReferenceViolationError) as exc:
        raise _nothing_written(exc) from exc
    if merge is None:
        await _refuse_not_empty(store)
    restore = _Restore(store, path, merge, advance, {name: Merged() for name in store.collections})
    await restore.run()
    left_out = [each.name for each in header.collections if each.count and each.name in leave_out]
    return RestoreResult(str(path), restore.merged, left_out)


def _nothing_written(exc: StorageError) -> StorageError:
    """A copy of the error, whose message adds that nothing was written."""
    copy = exc.copy()
    copy.args = (f"{str(exc).rstrip('.')}; nothing was written",)
    return copy


async def _refuse_not_empty(store: StorageStrategy) -> None:
    not_empty = await not_empty_in(store)
    if not_empty:
        counts = ", ".join([f"{await store.count_entities(each):,} {each}" for each in not_empty])
        raise TargetNotEmptyError(
            f"the target of the restore is not empty ({counts}), and nothing was written; restore "
            "into an empty store, or give a merge rule (--merge keep, replace or newest)"
        )


class _Restore(msgspec.Struct):
    """Writes a verified backup into a store.

    Attributes:
        merged: the number of entities that were written, unchanged or kept so far, by collection.
        waiting: by collection, the ids of entities whose parents have not been written yet.
    """

    store: StorageStrategy
    path: Path
    rule: MergeRule | None
    advance: Callable[[int], None]
    merged: dict[str, Merged]
    waiting: dict[str, set[str]] = msgspec.field(default_factory=lambda: defaultdict(set))

    async def run(self) -> None:
        """Write all entities.

        Raises:
            MigrationError: a write failed.
        """
        try:
            await self._write_file(None)
            # Children that precede their parents in the file, as in a tree of one collection.
            while waiting := {name: ids for name, ids in self.waiting.items() if ids}:
                self.waiting.clear()
                await self._write_file(waiting)
                if self.waiting == waiting:
                    name, ids = next(iter(waiting.items()))
                    raise ReferenceViolationError(
                        f"{len(ids):,} entities of {name} refer to a parent that does not exist; "
                        f"the first: {min(ids)!r}. Create the parents, or declare the field with "
                        "enforced=False"
                    )
        except StorageError as exc:
            raise self._incomplete(exc) from exc

    async def _write_file(self, only: dict[str, set[str]] | None) -> None:
        """Read the file once and write its entities, or only those with the given ids."""
        async with aclosing(read_portable(self.path)) as chunks:
            async for name, entities in chunks:
                if only is not None:
                    if name not in only:
                        continue
                    ids, key = only[name], self.store.collections[name].key
                    entities = [each for each in entities if each[key] in ids]
                for start in range(0, len(entities), _BATCH_SIZE):
                    await self._write(name, entities[start : start + _BATCH_SIZE])

    async def _write(self, name: str, batch: list[Entity]) -> None:
        if name not in self.store.collections:
            return  # left out
        waiting: list[Entity] = []
        done = await put(self.store, name, batch, self.rule, stored=False, waiting=waiting)
        self.merged[name].add(done)
        self.waiting[name].update(map(self.store.collections[name].id_of, waiting))
        self.advance(len(batch) - len(waiting))

    def _incomplete(self, exc: StorageError) -> MigrationError:
        counts = {name: each.written for name, each in self.merged.items() if each.written}
        written = ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"
        return MigrationError(
            f"the restore of {self.path} is incomplete: {exc}. Entities that were written: "
            f"{written}, and possibly some of the batch that failed (at most {_BATCH_SIZE:,}). Fix the "
            f"cause, then restore again with --merge {self.rule or 'replace'}",
            retryable=exc.retryable,
            outcome_unknown=exc.outcome_unknown,
        )
