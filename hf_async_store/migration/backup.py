"""Backups of any store in the portable form: making, keeping the last few, restoring."""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.entities import Schema
from hf_async_store.errors import InvalidInputError, TargetNotEmptyError
from hf_async_store.migration.merging import Merged, MergeRule, put
from hf_async_store.migration.portable import (
    check_portable,
    read_header,
    read_portable,
    refuse_other_schema,
    write_portable,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_async_store.strategy import StorageStrategy

SUFFIX: Final = ".jsonl.gz"
_DATED: Final = re.compile(r"(?P<stem>.+)_(?P<time>\d{8}T\d{6}Z)(?:-\d+)?" + re.escape(SUFFIX))
_BATCH: Final = 1000


class BackupResult(msgspec.Struct, frozen=True):
    """A backup that was made.

    Attributes:
        path: where it lies.
        counts, digests: by collection.
        removed: older backups that went, because only so many are kept.
    """

    path: str
    counts: dict[str, int]
    digests: dict[str, str]
    removed: list[str]


class RestoreResult(msgspec.Struct, frozen=True):
    """A backup that was restored.

    Attributes:
        merged: by collection, what became of its entities.
    """

    path: str
    merged: dict[str, Merged]


async def backup_store(
    store: StorageStrategy, location: str | Path, *, keep: int | None = None, stem: str = "backup"
) -> BackupResult:
    """Write everything that a store holds to a portable file: one moment of it, if the engine can.

    Args:
        location: a new file; or a folder, by a `/` at its end or because it is one, for a file with
            a dated name.
        keep: afterwards only so many dated files of this `stem` stay in the folder, the newest.

    Raises:
        InvalidInputError: there is such a file; or `keep` without a folder.
        StorageError: of the store, or of the disk.
    """
    path, is_dated = await asyncio.to_thread(_destination, str(location), stem)
    if keep is not None and (keep < 1 or not is_dated):
        raise InvalidInputError("keep is a number from 1 on, and needs a folder of dated backups")
    sort = store.capabilities.default_order != "id"
    async with store.snapshot() as reader:
        digests = await write_portable(path, reader, store.collections, sort=sort)
    removed = await asyncio.to_thread(_retire, path, stem, keep) if keep is not None else []
    return BackupResult(
        str(path),
        {name: each.count for name, each in digests.items()},
        {name: str(each) for name, each in digests.items()},
        [str(each) for each in removed],
    )


def _destination(location: str, stem: str) -> tuple[Path, bool]:
    path = Path(location)
    if not (location.endswith("/") or path.is_dir()):
        if path.exists():
            raise InvalidInputError(f"{path} is there already; a backup needs a new name")
        return path, False
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    dated = path / f"{stem}_{moment}{SUFFIX}"
    number = 1
    while dated.exists():
        number += 1
        dated = path / f"{stem}_{moment}-{number}{SUFFIX}"
    return dated, True


def _retire(newest: Path, stem: str, keep: int) -> list[Path]:
    """Remove all but the last backups of this name; what is named otherwise is not looked at."""
    found = []
    for each in newest.parent.iterdir():
        match = _DATED.fullmatch(each.name)
        if match is not None and match["stem"] == stem and each != newest:
            found.append((match["time"], each.stat().st_mtime_ns, each))
    gone = [each for _, _, each in sorted(found, reverse=True)[keep - 1 :]]
    for each in gone:
        with suppress(FileNotFoundError):  # another backup was faster
            each.unlink()
    return gone


async def restore_store(
    store: StorageStrategy,
    path: str | Path,
    *,
    merge: MergeRule | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> RestoreResult:
    """Bring a portable backup into a store: versions and timestamps as they were.

    The whole file is read and proven before anything is written. Entities come in batches; a
    restore that was interrupted is run again, with `merge="replace"`.

    Args:
        merge: how to settle with what is there (see `MergeRule`); None needs an empty store.

    Raises:
        CorruptionError: the file is truncated or was altered; nothing was written.
        InvalidInputError: it is no portable backup, or of collections that are not declared.
        TargetNotEmptyError: the store is not empty, and there is no rule.
        BatchError: something of it cannot be stored here.
    """
    path = Path(path)
    refuse_other_schema(await read_header(path), Schema(store.collections.values()), path)
    await check_portable(path)
    if merge is None:
        await refuse_full(store, "restore", "--merge keep, replace or newest says what counts")
    merged = {name: Merged() for name in store.collections}
    async with aclosing(read_portable(path)) as pieces:
        async for name, entities in pieces:
            for start in range(0, len(entities), _BATCH):
                batch = entities[start : start + _BATCH]
                merged[name].add(await put(store, name, batch, merge, stored=False))
                advance(len(batch))
    return RestoreResult(str(path), merged)


async def refuse_full(store: StorageStrategy, what: str, way_out: str) -> None:
    """Refuse a store that holds anything.

    Raises:
        TargetNotEmptyError.
    """
    full = [name for name in store.collections if await store.query_entities(name, limit=1)]
    if full:
        counts = ", ".join([f"{await store.count_entities(each):,} {each}" for each in full])
        raise TargetNotEmptyError(
            f"the target of the {what} is not empty ({counts}), and nothing was written; {way_out}"
        )
