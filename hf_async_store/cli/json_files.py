"""Direct operations on the files of a JSON store: creating, copying and replacing them.

Each operation holds the lock of the store that excludes concurrent ones, and every file is created
atomically.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias, cast

import msgspec

from hf_async_store.config import JSONConfig, strategy_config
from hf_async_store.errors import ConfigurationError, LockTimeoutError, UnavailableError
from hf_async_store.locks import FileLock
from hf_async_store.os_errors import translate_os_error
from hf_async_store.ownership import share
from hf_async_store.strategies.json import JSONStorageStrategy
from hf_async_store.strategies.json.files import FileManager, sync_data, sync_folder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping
    from pathlib import Path

    from hf_async_store.cli.context import Context
    from hf_async_store.ownership import Ownership
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.values import Entity

Data: TypeAlias = "Mapping[str, Mapping[str, Entity]]"
"""Entities by collection and id."""

_CHUNK_SIZE: Final = 1 << 20
_WAIT_SECONDS: Final = 0.02
_TRIES: Final = 100
EMPTY: Final = b"{}\n"


def as_json(store: StorageStrategy) -> JSONStorageStrategy:
    """Return the store as a JSON store.

    Raises:
        ConfigurationError: it is not a JSON store.
    """
    if not isinstance(store, JSONStorageStrategy):
        raise ConfigurationError(
            "this command is only for JSON stores; the engine of this store is "
            f"{store.capabilities.engine}"
        )
    return store


class JSONFiles:
    """The files of the JSON store of a command.

    Raises:
        ConfigurationError: the store is not a JSON store.
    """

    def __init__(self, context: Context) -> None:
        self.store = as_json(context.store)
        self.options = strategy_config(context.config, JSONConfig)
        self.manager = FileManager(self.options, context.schema)
        self.folder = self.manager.folder

    @property
    def names(self) -> list[str]:
        """The names of the data files; after the store was read, also those of collections that
        only other programs declare."""
        return cast("list[str]", self.store.describe()["files"])

    def size(self) -> int:
        """The total size of the data files in bytes."""
        return sum(each.stat().st_size for each in map(self._path, self.names) if each is not None)

    async def make_empty(self) -> list[Path]:
        """Create the data files of an empty store, if none exists; returns the created files."""
        files = self.manager
        async with self.store.acquire_write_lock():
            # If there is a journal, missing files are those that no compaction has written yet.
            missing = (
                [] if files.journals() else [each for each in self.names if not self._path(each)]
            )
            await self.replace_files(dict.fromkeys(missing, EMPTY))
            return [files.path(each) for each in missing]

    async def replace_files(self, contents: Mapping[str, bytes]) -> None:
        """Write data files, by name, and replace existing ones."""
        files = self.manager
        for name, content in contents.items():
            temporary, _, _ = await files.write_temporary(name, _single_chunk(content))
            try:
                await asyncio.to_thread(_replace, temporary, files.path(name), self._variants(name))
            except OSError as exc:
                raise translate_os_error(exc, f"replace {files.path(name)}") from exc

    def _variants(self, name: str) -> tuple[Path, Path]:
        """The paths of a data file, uncompressed and compressed."""
        return self.folder / name, self.folder / f"{name}.gz"

    def _path(self, name: str) -> Path | None:
        """The path of an existing data file, preferably in the configured form; None if missing."""
        variants = sorted(self._variants(name), key=lambda each: each != self.manager.path(name))
        return next((each for each in variants if each.exists()), None)

    async def copy_out(self, target: Path) -> list[Path]:
        """Copy everything committed before to a new file or folder; returns the created files."""
        for _ in range(_TRIES):
            await self.store.checkpoint()
            async with self.no_compaction(), self.store.acquire_read_lock():
                # If there is a second journal although no compaction runs, a process has crashed
                # between two renames, and the files may be inconsistent until the next checkpoint.
                if len(self.manager.journals()) <= 1:
                    paths = (self._path(each) for each in self.names)
                    created = await self._create(
                        target, {each.name: each for each in paths if each}
                    )
                    return created + await self._copy_declarations(target)
            await asyncio.sleep(_WAIT_SECONDS)
        raise UnavailableError(
            f"cannot copy the files in {self.folder}: there was an unfinished compaction in each of "
            f"{_TRIES} attempts; try again"
        )

    async def _copy_declarations(self, target: Path) -> list[Path]:
        """Copy the recorded declarations to a copy of the data files; returns the created file."""
        source = self.manager.declarations()
        copy = target / source.name
        if self.manager.single:
            copy = target.with_name(f".{target.name.removesuffix('.gz')}.declarations")
        try:
            copy.unlink(missing_ok=True)  # of an earlier file of this name
            await asyncio.to_thread(_create_file, copy, source.read_bytes(), self._ownership())
        except FileNotFoundError:
            return []  # nothing is recorded
        except OSError as exc:
            raise translate_os_error(exc, f"write {copy}") from exc
        return [copy]

    async def keep(self, data: Data) -> Path:
        """Write this content to a new file or folder next to the data files, for `restore`."""
        target = dated(self.folder, "replaced", ".json" if self.manager.single else "")
        await self._create(target, self.encode(data))
        return target

    async def _create(self, target: Path, contents: Mapping[str, Path | bytes]) -> list[Path]:
        try:
            return await asyncio.to_thread(
                _create_new, target, contents, self.manager.single, self._ownership()
            )
        except OSError as exc:
            raise translate_os_error(exc, f"write {target}") from exc

    def encode(self, data: Data) -> dict[str, bytes]:
        """The contents of the data files with these entities, by file name."""
        return {
            name: _section(data[collection])
            if collection is not None
            else as_object({each: _section(entities).rstrip() for each, entities in data.items()})
            for name, collection in self.manager.names.items()
            if collection is None or collection in data
        }

    @asynccontextmanager
    async def no_compaction(self) -> AsyncIterator[None]:
        """Prevent all processes from compacting the journal into the data files.

        Raises:
            LockTimeoutError: a running compaction did not end within the lock timeout.
        """
        lock = FileLock(self.manager.lock(".fold"), self.manager.ownership)
        deadline = monotonic() + self.options.lock_timeout
        try:
            while not lock.try_lock(exclusive=True):
                if monotonic() >= deadline:
                    raise LockTimeoutError(
                        f"another process has been writing the files of {self.folder} for "
                        f"{self.options.lock_timeout:g} s"
                    )
                await asyncio.sleep(_WAIT_SECONDS)
            yield
        finally:
            lock.close()

    async def copy_damaged(self, folder: Path) -> None:
        """Copy the data files and journals as they are to a new folder.

        They are not hard links: a process that has a journal open finds out from its link count
        that it was deleted.
        """
        files = self.manager
        candidates: list[Path] = [path for each in self.names for path in self._variants(each)]
        candidates += [files.journal(each) for each in files.journals()]
        existing = [each for each in candidates if each.is_file()]
        contents = {each.name: each for each in existing}
        try:
            await asyncio.to_thread(_create_folder, folder, contents, self._ownership())
        except OSError as exc:
            raise translate_os_error(exc, f"copy the damaged files to {folder}") from exc

    def _ownership(self) -> Ownership | None:
        """The owner, group and mode of the copies. Root gives them those of the store; other users
        create private files of their own."""
        return self.manager.ownership() if os.geteuid() == 0 else None


async def _single_chunk(content: bytes) -> AsyncIterator[bytes]:
    yield content


def dated(folder: Path, stem: str, suffix: str = "") -> Path:
    """An unused path in the folder, named after the stem and the current time."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    names = (f"{stem}_{stamp}{f'_{n}' if n > 1 else ''}{suffix}" for n in count(1))
    return next(path for path in (folder / each for each in names) if not path.exists())


def _section(entities: Mapping[str, Entity]) -> bytes:
    return as_object({each: msgspec.json.encode(entity) for each, entity in entities.items()})


def as_object(members: Mapping[str, bytes]) -> bytes:
    """A JSON object with one line per member, in the format of the data files."""
    lines = (msgspec.json.encode(name) + b":" + value for name, value in members.items())
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


# -- in a worker thread ---------------------------------------------------------------------


def _replace(temporary: Path, target: Path, variants: Iterable[Path]) -> None:
    try:
        temporary.replace(target)
        for each in variants:
            if each != target:
                each.unlink(missing_ok=True)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _create_new(
    target: Path, contents: Mapping[str, Path | bytes], single: bool, ownership: Ownership | None
) -> list[Path]:
    """Create one file, or a folder of files, at a path that does not exist."""
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if single:
            (content,) = contents.values()
            _create_file(temporary, content, ownership)
            # Unlike a rename, a hard link does not replace a file that was created meanwhile.
            target.hardlink_to(temporary)
            created = [target]
        else:
            _create_folder(temporary, contents, ownership)
            temporary.rename(target)
            created = [target / each for each in contents]
        sync_folder(target.parent)
        return created
    finally:
        remove(temporary)


def _create_folder(
    folder: Path, contents: Mapping[str, Path | bytes], ownership: Ownership | None
) -> None:
    folder.mkdir(mode=0o700)
    for name, content in contents.items():
        _create_file(folder / name, content, ownership)
    if ownership is not None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            share(fd, ownership.of_folder())
        finally:
            os.close(fd)
    sync_folder(folder)


def _create_file(target: Path, content: Path | bytes, ownership: Ownership | None) -> None:
    """Create a file with the given bytes, or with those of another file, and sync it to disk."""
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as created:
        if ownership is not None:
            share(fd, ownership)
        if isinstance(content, bytes):
            created.write(content)
        else:
            with content.open("rb") as file:
                shutil.copyfileobj(file, created, _CHUNK_SIZE)
        created.flush()
        sync_data(created.fileno())


def remove(path: Path) -> None:
    """Delete a file or a folder, ignoring errors."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
