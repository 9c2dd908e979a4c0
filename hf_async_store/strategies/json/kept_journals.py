"""Sealed journals that are kept for the change feed, after the data files contain their commits.

A kept journal is renamed, and small ones are later merged: `STEM.feed.FIRST-LAST` contains the journals
of these generations, one after the other. They are removed, oldest first, when the longest retention of
the declared feeds has passed since they were sealed, or when they have more than `feed_bytes`. All methods
are synchronous, for a worker thread.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import Final, NamedTuple

from hf_async_store.strategies.json.files import (
    FileManager,
    discard_file,
    prepare_file,
    sync_folder,
)

_MERGED: Final = 32
"""So many small files are merged. A store that is compacted every second would have a file for each."""

_SMALL_BYTES: Final = 1 << 19


class _Kept(NamedTuple):
    first: int
    last: int
    path: Path
    size: int
    sealed: float


class KeptJournals:
    """The kept journals of one store.

    Args:
        max_bytes: the size that they may have together.
    """

    def __init__(self, files: FileManager, max_bytes: int) -> None:
        self._files = files
        self._max_bytes = max_bytes

    def keep(self, before: int) -> None:
        """Keep the journals before generation `before`."""
        for generation in self._files.journals():
            if generation < before:
                kept = self._files.kept_journal(generation, generation)
                with suppress(FileNotFoundError):
                    self._files.journal(generation).rename(kept)

    def remove_all(self) -> None:
        for each in self._kept():
            each.path.unlink(missing_ok=True)

    def tidy(self, retention: timedelta) -> None:
        """Remove what need not be kept any longer, and merge small files.

        The caller holds the compaction lock.
        """
        kept = self._kept()
        size = _size(kept)
        oldest = time.time() - retention.total_seconds()
        while kept and (kept[0].sealed < oldest or size > self._max_bytes):
            size -= kept[0].size
            kept.pop(0).path.unlink(missing_ok=True)
        self._merge(kept)

    def _kept(self) -> list[_Kept]:
        """The files, oldest first. A file whose generations another one contains, too, is removed: it
        was merged into that one by a process that died."""
        kept: list[_Kept] = []
        for first, last in self._files.kept_journals():
            path = self._files.kept_journal(first, last)
            with suppress(FileNotFoundError):
                if kept and last <= kept[-1].last:
                    path.unlink()
                    continue
                status = path.stat()
                while kept and first <= kept[-1].first:
                    kept.pop().path.unlink()
                kept.append(_Kept(first, last, path, status.st_size, status.st_mtime))
        return kept

    def _merge(self, kept: list[_Kept]) -> None:
        small = [*takewhile(lambda each: each.size < _SMALL_BYTES, reversed(kept))]
        if len(small) < _MERGED:
            return
        group: list[_Kept] = []
        for each in reversed(small):
            if group and (_size(group) >= _SMALL_BYTES or each.first != group[-1].last + 1):
                self._join(group)
                group = []
            group.append(each)
        self._join(group)

    def _join(self, group: list[_Kept]) -> None:
        if len(group) < 2:
            return
        path = self._files.kept_journal(group[0].first, group[-1].last)
        data = b"".join(each.path.read_bytes() for each in group)
        temporary, fd = prepare_file(path, data, self._files.ownership())
        try:
            os.utime(fd, (group[-1].sealed, group[-1].sealed))
            temporary.rename(path)
        except BaseException:
            discard_file(temporary, fd)
            raise
        os.close(fd)
        sync_folder(path.parent)  # before the files that it replaces are removed
        for each in group:
            each.path.unlink(missing_ok=True)


def _size(group: list[_Kept]) -> int:
    return sum(each.size for each in group)
