"""Making portable backups of any store, and deleting all but the newest few."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.errors import InvalidInputError, StorageError
from hf_async_store.event_loop import in_thread
from hf_async_store.migration.backup_format import read_header, write_portable
from hf_async_store.migration.store_checks import (
    check_leave_out,
    refuse_undeclared,
    require_store,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from hf_async_store.strategy import StorageStrategy

SUFFIX: Final = ".jsonl.gz"
_DATED: Final = re.compile(r"(?P<stem>.+)_(?P<time>\d{8}T\d{6}Z)(?:-\d+)?" + re.escape(SUFFIX))


class BackupResult(msgspec.Struct, frozen=True):
    """The result of `backup_store`.

    Attributes:
        path: the path of the backup file.
        counts, digests: the number of entities and the digest of each collection.
        removed: older backups that were deleted because of `keep`.
        spared: older backups that `keep` would have deleted, but that were kept because this
            backup, or each remaining one, holds far less than an older one; see `allow_smaller` of
            `backup_store`.
        left_out: collections and fields of the store that are not in the backup, as requested.
    """

    path: str
    counts: dict[str, int]
    digests: dict[str, str]
    removed: list[str]
    spared: list[str] = []
    left_out: list[str] = []


async def backup_store(
    store: StorageStrategy,
    location: str | Path,
    *,
    keep: int | None = None,
    allow_smaller: bool = False,
    stem: str = "backup",
    leave_out: Collection[str] = (),
) -> BackupResult:
    """Write the whole content of a store to a portable backup file.

    The backup is a snapshot of the store, if the engine supports snapshots.

    Args:
        location: the path of a new file, or a folder in which a file with a dated name is created.
            It is a folder if it ends in `/` or if such a folder exists.
        keep: keep only this number of dated backups of this `stem` in the folder, the newest ones.
        allow_smaller: with `keep`, delete older backups even if this backup is empty, holds less
            than half of what the previous one holds, or if each remaining backup holds less than
            half of what a deleted one holds.
        leave_out: collections (`jobs`) and fields (`machines.owner`) that are stored, are not
            declared, and are not included in the backup. All other undeclared ones are refused.

    Raises:
        InvalidInputError: the file exists already, or `keep` was given without a folder.
        StoreNotFoundError: the store does not exist; no file was created.
        ConfigurationError: the store holds undeclared collections or fields.
        StorageError: the store could not be read, or the file could not be written.
    """
    path, is_dated = await in_thread(_destination, str(location), stem)
    if keep is not None and (keep < 1 or not is_dated):
        raise InvalidInputError(
            "keep must be >= 1, and the destination must be a folder of dated backups"
        )
    check_leave_out(leave_out, store.collections)
    await require_store(store)
    left_out = await refuse_undeclared(store, "the store", leave_out)
    sort = store.capabilities.default_order != "id"
    async with store.snapshot(expired=True) as reader:
        digests = await write_portable(path, reader, store.collections, sort=sort)
    counts = {name: each.count for name, each in digests.items()}
    removed: list[Path] = []
    spared: list[Path] = []
    if keep is not None:
        older = await in_thread(_older_backups, path, stem)
        surplus = older[keep - 1 :]
        if surplus and not allow_smaller:
            spared = await _far_larger(sum(counts.values()), older, keep)
        removed = [each for each in surplus if each not in spared]
        await in_thread(_remove, removed)
    return BackupResult(
        str(path),
        counts,
        {name: str(each) for name, each in digests.items()},
        [str(each) for each in removed],
        [str(each) for each in spared],
        left_out,
    )


def _destination(location: str, stem: str) -> tuple[Path, bool]:
    path = Path(location)
    if not (location.endswith("/") or path.is_dir()):
        if path.exists():
            raise InvalidInputError(f"{path} exists already; a backup needs a new name")
        return path, False
    timestamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    dated = path / f"{stem}_{timestamp}{SUFFIX}"
    number = 1
    while dated.exists():
        number += 1
        dated = path / f"{stem}_{timestamp}-{number}{SUFFIX}"
    return dated, True


# -- deleting older backups -----------------------------------------------------------------


def _older_backups(newest: Path, stem: str) -> list[Path]:
    """The other dated backups with this stem, newest first; other files are ignored."""
    dated = []
    for each in newest.parent.iterdir():
        match = _DATED.fullmatch(each.name)
        if match is not None and match["stem"] == stem and each != newest:
            dated.append((match["time"], each.stat().st_mtime_ns, each))
    return [each for _, _, each in sorted(dated, reverse=True)]


async def _far_larger(count: int, older: Sequence[Path], keep: int) -> list[Path]:
    """Of the backups that would be deleted, those that hold far more than the remaining ones.

    If the name of the store is mistyped, or the store was emptied, nightly backups must not delete
    the good ones, one each night.
    """
    counts = [await _count_in(each) for each in older]
    previous = next((each for each in counts if each is not None), 0)
    surplus = list(zip(older, counts, strict=True))[keep - 1 :]
    if _is_far_less(count, previous) or count == 0:
        return [each for each, held in surplus if held]
    most = max([count, *(each or 0 for each in counts[: keep - 1])])
    return [each for each, held in surplus if _is_far_less(most, held or 0)]


def _is_far_less(count: int, other: int) -> bool:
    return 2 * count < other


async def _count_in(path: Path) -> int | None:
    """The number of entities in a backup according to its header; None if it cannot be read."""
    try:
        return sum(each.count for each in (await read_header(path)).collections)
    except StorageError:
        return None


def _remove(backups: Sequence[Path]) -> None:
    for each in backups:
        with suppress(FileNotFoundError):  # a concurrent backup has deleted it
            each.unlink()
