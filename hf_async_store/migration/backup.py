"""Backups of any store in the portable form: making them, and keeping the last few."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.errors import InvalidInputError, StorageError
from hf_async_store.migration.backup_format import read_header, write_portable
from hf_async_store.migration.requirements import (
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
    """A backup that was made.

    Attributes:
        path: where it is.
        counts, digests: by collection.
        removed: older backups that went, because only so many are kept.
        spared: older backups that should have gone, and stay because this one holds far less than
            they do: see `allow_smaller` of `backup_store`.
        left_out: what the store holds and is not in it, as requested.
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
    """Write everything that a store holds to a portable file: one moment of it, if the engine can.

    Args:
        location: a new file; or a folder, by a `/` at its end or because it is one, for a file with
            a dated name.
        keep: afterwards only so many dated files of this `stem` stay in the folder, the newest.
        allow_smaller: remove the others also where this backup is empty, or holds less than half
            of what the one before did, or those that stay less than half of one that goes.
        leave_out: what is stored, not declared and not to be in the backup: collections (`jobs`)
            and fields (`machines.owner`). Whatever else is not declared is refused.

    Raises:
        InvalidInputError: there is such a file; or `keep` without a folder.
        StoreNotFoundError: there is no store; no file was made.
        ConfigurationError: the store holds what is not declared.
        StorageError: of the store, or of the disk.
    """
    path, is_dated = await asyncio.to_thread(_destination, str(location), stem)
    if keep is not None and (keep < 1 or not is_dated):
        raise InvalidInputError("keep is a number >= 1, and needs a folder of dated backups")
    check_leave_out(leave_out, store.collections)
    await require_store(store)
    left_out = await refuse_undeclared(store, "the store", leave_out)
    sort = store.capabilities.default_order != "id"
    async with store.snapshot() as reader:
        digests = await write_portable(path, reader, store.collections, sort=sort)
    counts = {name: each.count for name, each in digests.items()}
    removed: list[Path] = []
    spared: list[Path] = []
    if keep is not None:
        others = await asyncio.to_thread(_others, path, stem)
        surplus = others[keep - 1 :]
        if surplus and not allow_smaller:
            spared = await _worth_more(sum(counts.values()), others, keep)
        removed = [each for each in surplus if each not in spared]
        await asyncio.to_thread(_remove, removed)
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
            raise InvalidInputError(f"{path} is there already; a backup needs a new name")
        return path, False
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    dated = path / f"{stem}_{moment}{SUFFIX}"
    number = 1
    while dated.exists():
        number += 1
        dated = path / f"{stem}_{moment}-{number}{SUFFIX}"
    return dated, True


# -- which stay -----------------------------------------------------------------------------


def _others(newest: Path, stem: str) -> list[Path]:
    """The other dated backups of this name, newest first; what is named otherwise is not looked at."""
    found = []
    for each in newest.parent.iterdir():
        match = _DATED.fullmatch(each.name)
        if match is not None and match["stem"] == stem and each != newest:
            found.append((match["time"], each.stat().st_mtime_ns, each))
    return [each for _, _, each in sorted(found, reverse=True)]


async def _worth_more(count: int, others: Sequence[Path], keep: int) -> list[Path]:
    """Of those that would go, the ones that hold far more than what stays.

    A store that was mistyped or emptied must not take the good backups with it, one a night.
    """
    counts = [await _count_in(each) for each in others]
    before = next((each for each in counts if each is not None), 0)
    surplus = list(zip(others, counts, strict=True))[keep - 1 :]
    if _is_far_less(count, before) or count == 0:
        return [each for each, held in surplus if held]
    most = max([count, *(each or 0 for each in counts[: keep - 1])])
    return [each for each, held in surplus if _is_far_less(most, held or 0)]


def _is_far_less(count: int, other: int) -> bool:
    return 2 * count < other


async def _count_in(path: Path) -> int | None:
    """How many entities a backup holds, by its header; None if that cannot be read."""
    try:
        return sum(each.count for each in (await read_header(path)).collections)
    except StorageError:
        return None


def _remove(backups: Sequence[Path]) -> None:
    for each in backups:
        with suppress(FileNotFoundError):  # another backup was faster
            each.unlink()
