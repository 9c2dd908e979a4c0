"""What the commands do to the files of a JSON store beneath its verbs: make, copy, replace them.

Each under the lock of the store that keeps others from doing the same, and every file whole or not
there at all.
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
from hf_async_store.strategies.json.files import FileManager, sync_data, sync_folder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping
    from pathlib import Path

    from hf_async_store.cli.context import Context
    from hf_async_store.ownership import Ownership
    from hf_async_store.strategies.json import JSONStorageStrategy
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.values import Entity

Data: TypeAlias = "Mapping[str, Mapping[str, Entity]]"
"""Entities by collection and id."""

_CHUNK_SIZE: Final = 1 << 20
_WAIT_SECONDS: Final = 0.02
_TRIES: Final = 100
EMPTY: Final = b"{}\n"


def as_json(store: StorageStrategy) -> JSONStorageStrategy:
    """The store, if it is one on JSON files.

    Raises:
        ConfigurationError: it is not.
    """
    engine = store.capabilities.engine
    if engine != "json":
        raise ConfigurationError(f"this command is for JSON stores; here is the engine {engine}")
    return cast("JSONStorageStrategy", store)


class JSONFiles:
    """The files of the store of a command.

    Raises:
        ConfigurationError: it is no JSON store.
    """

    def __init__(self, context: Context) -> None:
        self.store = as_json(context.store)
        self.options = strategy_config(context.config, JSONConfig)
        self.manager = FileManager(self.options, context.schema)
        self.folder = self.manager.folder

    @property
    def names(self) -> list[str]:
        """The data files by name; once the store was read, also those that only others declare."""
        return cast("list[str]", self.store.describe()["files"])

    def size(self) -> int:
        """How much the data files hold."""
        return sum(each.stat().st_size for each in map(self._at, self.names) if each is not None)

    async def make_empty(self) -> list[Path]:
        """An empty store at rest where there is none; the files that were made."""
        files = self.manager
        async with self.store.acquire_write_lock():
            # Where there is a journal, a missing file is one that no fold has written yet.
            missing = (
                [] if files.journals() else [each for each in self.names if not self._at(each)]
            )
            await self.place(dict.fromkeys(missing, EMPTY))
            return [files.path(each) for each in missing]

    async def place(self, texts: Mapping[str, bytes]) -> None:
        """Put these texts where the data files belong, over what is there."""
        files = self.manager
        for name, text in texts.items():
            temporary, _, _ = await files.write_temporary(name, _one(text))
            try:
                await asyncio.to_thread(_replace, temporary, files.path(name), self._forms(name))
            except OSError as exc:
                raise translate_os_error(exc, f"put {files.path(name)} in place") from exc

    def _forms(self, name: str) -> tuple[Path, Path]:
        """Where a data file may lie, plain and compressed."""
        return self.folder / name, self.folder / f"{name}.gz"

    def _at(self, name: str) -> Path | None:
        """Where a data file is stored, in the configured form if in both; None if there is none."""
        forms = sorted(self._forms(name), key=lambda each: each != self.manager.path(name))
        return next((each for each in forms if each.exists()), None)

    async def copy_out(self, target: Path) -> list[Path]:
        """Copy all that was committed before to a new file or folder; the files that were made."""
        for _ in range(_TRIES):
            await self.store.checkpoint()
            async with self.no_folding(), self.store.acquire_read_lock():
                # A second journal while nobody folds was left by one who died between two renames:
                # the files may not belong together until the next checkpoint.
                if len(self.manager.journals()) <= 1:
                    found = (self._at(each) for each in self.names)
                    return await self._make(target, {each.name: each for each in found if each})
            await asyncio.sleep(_WAIT_SECONDS)
        raise UnavailableError(f"the journals in {self.folder} do not come to rest; try again")

    async def keep(self, data: Data) -> Path:
        """Write this content to a new file or folder beside the data files, for `restore`."""
        target = dated(self.folder, "replaced", ".json" if self.manager.single else "")
        await self._make(target, self.texts(data))
        return target

    async def _make(self, target: Path, contents: Mapping[str, Path | bytes]) -> list[Path]:
        try:
            return await asyncio.to_thread(
                _make_new, target, contents, self.manager.single, self._owned()
            )
        except OSError as exc:
            raise translate_os_error(exc, f"write {target}") from exc

    def texts(self, data: Data) -> dict[str, bytes]:
        """The data files, by name, as they would hold this content."""
        return {
            name: _section(data[collection])
            if collection is not None
            else as_object({each: _section(entities).rstrip() for each, entities in data.items()})
            for name, collection in self.manager.names.items()
            if collection is None or collection in data
        }

    @asynccontextmanager
    async def no_folding(self) -> AsyncIterator[None]:
        """Keep every process from folding the journal into the data files.

        Raises:
            LockTimeoutError: another fold did not end in time.
        """
        turn = FileLock(self.manager.lock(".fold"), self.manager.ownership)
        ends = monotonic() + self.options.lock_timeout
        try:
            while not turn.try_lock(exclusive=True):
                if monotonic() >= ends:
                    raise LockTimeoutError(
                        f"another process has been writing the files of {self.folder} for "
                        f"{self.options.lock_timeout:g} s"
                    )
                await asyncio.sleep(_WAIT_SECONDS)
            yield
        finally:
            turn.close()

    async def set_aside(self, folder: Path) -> None:
        """Copies of the data files and journals, as damaged as they are, in a new folder.

        Copies and not links: a process that has a journal open knows by its links that it is gone.
        """
        files = self.manager
        found: list[Path] = [form for each in self.names for form in self._forms(each)]
        found += [files.journal(each) for each in files.journals()]
        there = [each for each in found if each.is_file()]
        contents = {each.name: each for each in there}
        try:
            await asyncio.to_thread(_fill_folder, folder, contents, self._owned())
        except OSError as exc:
            raise translate_os_error(exc, f"set the damaged files aside in {folder}") from exc

    def _owned(self) -> Ownership | None:
        """Whose the copies are to be: root makes them for those who may use the store. Anybody else
        can only make files of their own, which nobody else can read."""
        return self.manager.ownership() if os.geteuid() == 0 else None


async def _one(text: bytes) -> AsyncIterator[bytes]:
    yield text


def dated(folder: Path, stem: str, suffix: str = "") -> Path:
    """A name in the folder that nothing has: the stem and the time."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    names = (f"{stem}_{stamp}{f'_{n}' if n > 1 else ''}{suffix}" for n in count(1))
    return next(path for path in (folder / each for each in names) if not path.exists())


def _section(entities: Mapping[str, Entity]) -> bytes:
    return as_object({each: msgspec.json.encode(entity) for each, entity in entities.items()})


def as_object(members: Mapping[str, bytes]) -> bytes:
    """A JSON object with a line for each member, as the store lays out its files."""
    lines = (msgspec.json.encode(name) + b":" + text for name, text in members.items())
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


# -- in a worker thread ---------------------------------------------------------------------


def _replace(temporary: Path, target: Path, forms: Iterable[Path]) -> None:
    try:
        temporary.replace(target)
        for each in forms:
            if each != target:
                each.unlink(missing_ok=True)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _make_new(
    target: Path, contents: Mapping[str, Path | bytes], single: bool, owned: Ownership | None
) -> list[Path]:
    """Files at a path where nothing is: one, or a folder of them."""
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if single:
            (content,) = contents.values()
            _fill(temporary, content, owned)
            # Unlike a rename, a link does not take the place of what came there meanwhile.
            target.hardlink_to(temporary)
            made = [target]
        else:
            _fill_folder(temporary, contents, owned)
            temporary.rename(target)
            made = [target / each for each in contents]
        sync_folder(target.parent)
        return made
    finally:
        remove(temporary)


def _fill_folder(
    folder: Path, contents: Mapping[str, Path | bytes], owned: Ownership | None
) -> None:
    folder.mkdir(mode=0o700)
    for name, content in contents.items():
        _fill(folder / name, content, owned)
    if owned is not None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            share(fd, owned.of_folder())
        finally:
            os.close(fd)
    sync_folder(folder)


def _fill(target: Path, content: Path | bytes, owned: Ownership | None) -> None:
    """A new file with what a file or a text holds, on the disk."""
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as made:
        if owned is not None:
            share(fd, owned)
        if isinstance(content, bytes):
            made.write(content)
        else:
            with content.open("rb") as file:
                shutil.copyfileobj(file, made, _CHUNK_SIZE)
        made.flush()
        sync_data(made.fileno())


def remove(path: Path) -> None:
    """A file or a folder, as far as it can be done."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
