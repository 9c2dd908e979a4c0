"""Bringing a portable backup back into a store: proven first, as a whole, then written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

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
from hf_async_store.migration.merge import Merged, MergeRule, put
from hf_async_store.migration.preflight import enforces_references
from hf_async_store.migration.proving import Parents, check_portable
from hf_async_store.migration.requirements import check_leave_out, refuse_undeclared_fields
from hf_async_store.schema import Schema
from hf_async_store.values import Entity

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy

_BATCH: Final = 1000


class RestoreResult(msgspec.Struct, frozen=True):
    """A backup that was restored.

    Attributes:
        merged: by collection, what became of its entities.
        left_out: collections of it that were not restored, as requested.
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
    """Bring a portable backup into a store: versions and timestamps as they were.

    The whole file is read and proven before anything is written: its digests, that each entity can
    be stored here, and that its parents are there. Entities come in batches; a restore that was
    interrupted is run again, with `merge="replace"`.

    Args:
        merge: how to settle with what is there (see `MergeRule`); None needs an empty store.
        leave_out: collections of the file that are not declared and are not to be restored.

    Raises:
        CorruptionError: the file is truncated or was altered, or holds what can be stored nowhere.
        InvalidInputError: it is no portable backup, or its entities do not fit what is declared.
        ReferenceViolationError: a parent is missing.
        TargetNotEmptyError: the store is not empty, and there is no rule.
        ConfigurationError: the store has fields that are not declared.
        MigrationError: something failed after writing had begun; says how much was written.

    In all cases but the last nothing was written.
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
        raise _untouched(exc) from exc
    if merge is None:
        await _refuse_full(store)
    restoring = _Restoring(store, path, merge, advance)
    await restoring.run()
    left_out = [each.name for each in header.collections if each.count and each.name in leave_out]
    return RestoreResult(str(path), restoring.merged, left_out)


def _untouched(exc: StorageError) -> StorageError:
    """The same error, saying what became of the store."""
    told = exc.copy()
    told.args = (f"{str(exc).rstrip('.')}; nothing was written",)
    return told


async def _refuse_full(store: StorageStrategy) -> None:
    full = [name for name in store.collections if await store.query_entities(name, limit=1)]
    if full:
        counts = ", ".join([f"{await store.count_entities(each):,} {each}" for each in full])
        raise TargetNotEmptyError(
            f"the target of the restore is not empty ({counts}), and nothing was written; "
            "--merge keep, replace or newest says what counts"
        )


class _Restoring:
    """The writing of a backup that was proven.

    Attributes:
        merged: by collection, what became of its entities so far.
    """

    def __init__(
        self,
        store: StorageStrategy,
        path: Path,
        rule: MergeRule | None,
        advance: Callable[[int], None],
    ) -> None:
        self._store = store
        self._path = path
        self._rule = rule
        self._advance = advance
        self._waiting: dict[str, set[str]] = defaultdict(set)
        self.merged = {name: Merged() for name in store.collections}

    async def run(self) -> None:
        """
        Raises:
            MigrationError.
        """
        try:
            await self._pass(None)
            # Children that come before their parents in the file, as in a tree of one collection.
            while waiting := {name: ids for name, ids in self._waiting.items() if ids}:
                self._waiting.clear()
                await self._pass(waiting)
                if self._waiting == waiting:
                    name, ids = next(iter(waiting.items()))
                    raise ReferenceViolationError(
                        f"{len(ids):,} entities of {name} name a parent that is not there, the "
                        f"first: {min(ids)!r}"
                    )
        except StorageError as exc:
            raise self._ended(exc) from exc

    async def _pass(self, only: dict[str, set[str]] | None) -> None:
        async with aclosing(read_portable(self._path)) as pieces:
            async for name, entities in pieces:
                if only is not None:
                    ids, key = only.get(name, set()), self._store.collections[name].key
                    entities = [each for each in entities if each[key] in ids]
                for start in range(0, len(entities), _BATCH):
                    await self._write(name, entities[start : start + _BATCH])

    async def _write(self, name: str, batch: list[Entity]) -> None:
        if name not in self._store.collections:
            return  # left out
        key = self._store.collections[name].key
        waiting: list[Entity] = []
        done = await put(self._store, name, batch, self._rule, stored=False, waiting=waiting)
        self.merged[name].add(done)
        self._waiting[name] |= {cast("str", each[key]) for each in waiting}
        self._advance(len(batch) - len(waiting))

    def _ended(self, exc: StorageError) -> MigrationError:
        counts = {name: each.written for name, each in self.merged.items() if each.written}
        written = ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"
        return MigrationError(
            f"the restore of {self._path} ended before its end: {exc}. Entities that were written: "
            f"{written}, and perhaps some of the batch that failed (of {_BATCH:,} at most). Mend the "
            "cause, then run it again with --merge replace",
            retryable=exc.retryable,
            outcome_unknown=exc.outcome_unknown,
        )
