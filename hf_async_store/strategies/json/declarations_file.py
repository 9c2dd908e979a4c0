"""The file beside the journal in which a JSON store remembers its declarations.

It is replaced atomically, under the write lock, and it is not part of the data: without it, every
entity is still there, and each program records its own declarations again; but a unique index is then
enforced only after it was applied again. It also contains the unique indexes that every program
enforces, and the collections whose changes it keeps, so a writer looks whether it was replaced.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import msgspec

from hf_async_store.declarations import are_equal, damaged, decoded, encoded, longest, merged
from hf_async_store.driver import run_to_completion
from hf_async_store.errors import (
    CorruptionError,
    NewerFormatError,
    StorageError,
)
from hf_async_store.event_loop import in_thread
from hf_async_store.os_errors import translate_os_error
from hf_async_store.ownership import Ownership, share
from hf_async_store.schema import Collection, Schema
from hf_async_store.strategies.json.files import FileManager, sync_data, sync_folder, write_all
from hf_async_store.unique import Fields


class _OwnPart(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the file contains beside the declarations.

    Attributes:
        enforced: by collection, the fields of each unique index that is enforced.
        store: a random name of the store, for the positions of its change feed.
    """

    enforced: dict[str, tuple[Fields, ...]] = {}
    store: str = ""


class DeclarationsFile:
    """The declarations of one store.

    Attributes:
        enforced: by collection, the unique indexes that every program enforces, as they were read last.
        feeds: by collection, for how long every program keeps its changes, as it was read last.
        store: a random name of the store; empty if it keeps no changes.
    """

    def __init__(self, files: FileManager) -> None:
        self._files = files
        self.path = files.declarations()
        self._path = str(self.path)  # every write needs it
        self.enforced: Mapping[str, tuple[Fields, ...]] = {}
        self.feeds: Mapping[str, timedelta] = {}
        self.store = ""
        self._signature: tuple[int, ...] | None = None

    @property
    def retention(self) -> timedelta | None:
        """For how long journals are kept for the change feed; None: not at all."""
        return longest(self.feeds.values())

    def keeps(self, feeds: Mapping[str, timedelta]) -> bool:
        """Whether every program keeps these changes for at least this time."""
        known = self.feeds
        return all(each in known and feeds[each] <= known[each] for each in feeds)

    def is_current(self) -> bool:
        """Whether the file is the one that was read last; every write asks."""
        try:
            return _signature(os.stat(self._path)) == self._signature  # noqa: PTH116
        except OSError:
            return False  # `refresh` reports it

    async def refresh(self, own: Schema) -> None:
        """Read `enforced` and `feeds` again, if the file was replaced.

        If it is damaged, which `health` reports, what was read before counts, and what this program itself
        declares.
        """
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._signature = None
            self._set([], _OwnPart())
            return
        except OSError as exc:
            raise translate_os_error(exc, f"read {self.path}") from exc
        signature = _signature(status)
        if signature != self._signature:
            try:
                self._set(*await self._read())
            except (CorruptionError, NewerFormatError):
                self.enforced = {
                    name: tuple(
                        dict.fromkeys([*self.enforced.get(name, ()), *own.unique.get(name, ())])
                    )
                    for name in {**self.enforced, **own.unique}
                }
                self.feeds = {**feeds_of(own.values()), **self.feeds}
            self._signature = signature

    def _set(self, collections: Iterable[Collection], own: _OwnPart) -> None:
        self.enforced = own.enforced
        self.feeds = feeds_of(collections)
        self.store = own.store

    async def read(self) -> list[Collection]:
        """The recorded declarations; none if the file does not exist.

        Raises:
            CorruptionError, NewerFormatError.
        """
        return (await self._read())[0]

    async def _read(self) -> tuple[list[Collection], _OwnPart]:
        try:
            content = await in_thread(_content, self.path)
        except OSError as exc:
            raise translate_os_error(exc, f"read {self.path}") from exc
        if content is None:
            return [], _OwnPart()
        where = self._path
        try:
            document = msgspec.json.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise damaged(where, f"not JSON: {exc}") from exc
        collections = decoded(document, where)
        try:
            return collections, msgspec.convert(document, _OwnPart)
        except msgspec.ValidationError as exc:
            raise damaged(where, f"invalid: {exc}") from exc

    async def key_of(self) -> dict[str, str]:
        """The recorded key of each collection; none if the file is damaged, which `health` reports."""
        try:
            return {each.name: each.key for each in await self.read()}
        except StorageError:
            return {}

    async def add(
        self,
        collections: Iterable[Collection],
        enforced: Mapping[str, tuple[Fields, ...]] | None = None,
    ) -> None:
        """Record further declarations. The caller holds the write lock of the store.

        Args:
            enforced: the unique indexes that every program enforces from now on; None: as recorded.
        """
        recorded, already = await self._read()
        wanted = merged(recorded, collections)
        own = _OwnPart(
            already.enforced if enforced is None else dict(enforced),
            already.store or (os.urandom(8).hex() if feeds_of(wanted) else ""),
        )
        if own == already and are_equal(recorded, wanted):
            return
        document = {**encoded(wanted), **msgspec.to_builtins(own)}
        content = msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
        # Not interrupted by a cancellation: the lock is held until the file is complete.
        writing = in_thread(_replace, self.path, content, self._files.ownership())
        try:
            await run_to_completion(writing)
        except OSError as exc:
            raise translate_os_error(exc, f"write {self.path}") from exc
        self._set(wanted, own)


def feeds_of(collections: Iterable[Collection]) -> dict[str, timedelta]:
    """By collection, for how long its changes are kept."""
    return {each.name: each.feed for each in collections if each.feed is not None}


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _replace(path: Path, content: bytes, ownership: Ownership | None) -> None:
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            if ownership is not None:
                share(fd, ownership)
            write_all(fd, content, 0)
            sync_data(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)
