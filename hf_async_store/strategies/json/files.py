"""The files of a JSON store: their names, and how one is read, replaced and kept as a backup."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import stat
import sys
import zlib
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.engine import finish
from hf_async_store.errors import CorruptionError
from hf_async_store.oserrors import translate_os_error
from hf_async_store.strategies.json.journal import FileState

if TYPE_CHECKING:
    from hf_async_store.config import JSONConfig
    from hf_async_store.entities import Schema

log: Final = logging.getLogger("hf_async_store.json")

_MODE: Final = 0o600
_WRITE_PIECE: Final = 1 << 20
_TEMPORARY: Final = ".tmp"


class Signature(msgspec.Struct, frozen=True):
    """How `stat` shows a file: another content has another one, save for a clock that stands still."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Signature:
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)

    @classmethod
    def known(cls, state: FileState) -> Signature:
        return cls(state.size, state.mtime_ns, state.inode)


class DataFile(msgspec.Struct, frozen=True):
    """A data file as it was read: its text, and what identifies the bytes on disk."""

    text: bytes
    digest: str
    signature: Signature


class FileManager:
    """The files of one store, in one folder.

    With `enable_compression` a data file NAME lies as `NAME.gz`. If only the other form is there,
    that one is read, and the next fold replaces it by the configured form.
    """

    def __init__(self, config: JSONConfig, schema: Schema) -> None:
        # Absolute, for the working directory may change while the store is open.
        self.folder = Path(config.base_path).absolute()
        self.single = config.storage_type == "single_file"
        self._compress = config.enable_compression
        self._backups = config.backup_count if config.backup_enabled else 0
        if self.single:
            self._collections: dict[str, str | None] = {config.filenames.single_file: None}
            self._stem = config.filenames.single_file
        else:
            self._collections = {file: name for name, file in config.files(schema).items()}
            self._stem = "store"
        self._journal_prefix = f"{self._stem}.journal."
        self._journals = str(self.folder / self._journal_prefix)
        self._paths: dict[str, tuple[Path, Path]] = {}

    # -- names -------------------------------------------------------------------------------

    @property
    def names(self) -> Mapping[str, str | None]:
        """The data files by name, each with its collection, None for a file of all of them."""
        return self._collections

    def add(self, name: str, collection: str | None) -> None:
        """Take a file in that the journal knows and this configuration does not."""
        self._collections.setdefault(name, collection)

    def path(self, name: str) -> Path:
        """Where a data file is written."""
        return self._both_paths(name)[0]

    def _other_path(self, name: str) -> Path:
        return self._both_paths(name)[1]

    def _both_paths(self, name: str) -> tuple[Path, Path]:
        # Kept, because every write looks at the files, and joining paths costs more than that.
        paths = self._paths.get(name)
        if paths is None:
            plain, packed = self.folder / name, self.folder / f"{name}.gz"
            paths = self._paths[name] = (packed, plain) if self._compress else (plain, packed)
        return paths

    def found(self, name: str) -> list[Path]:
        """Where a data file lies now, in the configured form first. Both are there only after a
        fold that was to bring it into that form was interrupted."""
        return [each for each in (self.path(name), self._other_path(name)) if _exists(each)]

    def signature(self, name: str) -> Signature | None:
        """How the file looks to `stat` now; None if there is none."""
        for path in self._both_paths(name):
            try:
                return Signature.of(os.stat(path))  # noqa: PTH116  # every write asks
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise translate_os_error(exc, f"look at {path}") from exc
        return None

    def journal(self, generation: int) -> Path:
        return Path(self.journal_path(generation))

    def journal_path(self, generation: int) -> str:
        """The same as text: every write asks, and making a Path costs more than a look at the file."""
        return f"{self._journals}{generation:08d}"

    def lock(self, suffix: str = "") -> Path:
        """Lock files begin with a dot: they are nobody's business but the store's."""
        return self.folder / f".{self._stem}.lock{suffix}"

    def journals(self) -> list[int]:
        """The generations that lie in the folder, oldest first."""
        found = []
        for entry in self._entries():
            number = _number(entry, self._journal_prefix)
            if number is not None:
                found.append(number)
        return sorted(found)

    def backups(self, name: str) -> list[Path]:
        """The backups of a data file, newest first."""
        found = [
            (number, entry)
            for entry in self._entries()
            for form in (name, f"{name}.gz")
            if (number := _number(entry, f"{form}.bak.")) is not None
        ]
        return [self.folder / entry for _, entry in sorted(found, reverse=True)]

    def _entries(self) -> list[str]:
        try:
            return os.listdir(self.folder)  # noqa: PTH208  # names are enough, and cheaper
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise translate_os_error(exc, f"list {self.folder}") from exc

    # -- reading -----------------------------------------------------------------------------

    async def read(self, name: str, known: Iterable[FileState] = ()) -> DataFile | None:
        """The whole text of a data file; None if there is none.

        Args:
            known: the contents that belong there.

        Raises:
            CorruptionError: it lies there in both forms, and nothing says which one counts.
        """
        files = [each for path in self.found(name) if (each := await read_file(path)) is not None]
        if len(files) > 1 and not {each.digest for each in files} <= {
            each.digest for each in known
        }:
            raise CorruptionError(
                f"{self.path(name)} and {self._other_path(name)} are both there: move the one that "
                "is not the store away"
            )
        return files[0] if files else None

    # -- writing -----------------------------------------------------------------------------

    def make_folder(self) -> None:
        try:
            os.mkdir(self.folder)  # noqa: PTH102  # every write asks; a Path takes five times as long
        except FileExistsError:
            if not os.path.isdir(self.folder):  # noqa: PTH112  # which says no to errors, too
                self._make_parents()
        except OSError:
            self._make_parents()

    def _make_parents(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise translate_os_error(exc, f"make the folder {self.folder}") from exc

    async def write_temporary(
        self, name: str, pieces: AsyncIterator[bytes]
    ) -> tuple[Path, str, Signature]:
        """A new file beside `name`, written and on the disk; its path, digest and signature.

        The caller renames it into place, or removes it.
        """
        path = self.folder / f".{name}.{os.urandom(4).hex()}{_TEMPORARY}"
        digest = hashlib.sha256()
        packer = zlib.compressobj(wbits=31) if self._compress else None
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
            try:
                async for piece in pieces:
                    # To its end, also when cancelled: a thread may not write to a closed file.
                    await finish(asyncio.to_thread(_write, fd, piece, digest, packer))
                await finish(asyncio.to_thread(_end, fd, digest, packer))
                return path, digest.hexdigest(), Signature.of(os.fstat(fd))
            finally:
                os.close(fd)
        except BaseException as exc:
            with suppress(OSError):
                path.unlink()
            if isinstance(exc, OSError):
                raise translate_os_error(exc, f"write {path}") from exc
            raise

    def put_in_place(self, written: Mapping[str, Path], generation: int) -> None:
        """Rename the temporary files to their names, each old file kept as a backup by hard link.

        Synchronous, for a worker thread. Whatever is interrupted here, each file is the old one or
        the new one, and the journal tells them apart.
        """
        for name, temporary in written.items():
            target = self.path(name)
            old = self.found(name)
            if old and self._backups:
                # Numbers grow, also where journals were removed and generations began anew.
                newest = [int(each.name.rpartition(".")[2]) for each in self.backups(name)[:1]]
                number = max([generation, *(each + 1 for each in newest)])
                _link(old[0], self.folder / f"{old[0].name}.bak.{number:08d}")
            temporary.replace(target)
            for each in old:
                if each != target:
                    each.unlink()
        sync_folder(self.folder)
        for name in written if self._backups else ():  # to make none is no reason to remove any
            for path in self.backups(name)[self._backups :]:
                with suppress(OSError):
                    path.unlink()

    def clean(self) -> None:
        """Remove temporary files that somebody who died left behind.

        Only whoever holds the locks to fold and to write may call this: nobody else writes any.
        """
        prefixes = tuple(f".{each}." for each in (*self._collections, self._stem))
        for entry in self._entries():
            if entry.endswith(_TEMPORARY) and entry.startswith(prefixes):
                with suppress(OSError):
                    (self.folder / entry).unlink()

    def drop_journals(self, before: int) -> None:
        """Remove the generations that every data file holds."""
        for generation in self.journals():
            if generation < before:
                with suppress(FileNotFoundError):
                    self.journal(generation).unlink()

    def keep_damaged(self, generations: Iterable[int]) -> None:
        """Copy journals aside: evidence of what could not be read. Nobody but a person uses them."""
        import shutil  # here, because it brings every compressor along

        for generation in generations:
            # No link: whoever has the journal open takes it for removed when it has no name left.
            aside = self.folder / f"{self._stem}.damaged.{generation:08d}"
            shutil.copy2(self.journal(generation), aside)
            log.warning("%s keeps the journal that could not be read to its end", aside)

    def free_bytes(self) -> int:
        import shutil  # here, because it brings every compressor along

        try:
            return shutil.disk_usage(self.folder if self.folder.exists() else Path.cwd()).free
        except OSError as exc:
            raise translate_os_error(exc, f"look at {self.folder}") from exc


async def read_file(path: Path) -> DataFile | None:
    """A data file, plain or gzip by its name; None if it is not there.

    Raises:
        CorruptionError: it ends too early, or is no gzip file.
    """
    # One hop for all of it, and not aiofiles, which would cost one hop for each step and every
    # one-shot process 6 ms of import. Each step lets go of the interpreter's lock.
    try:
        return await asyncio.to_thread(_read, path)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise translate_os_error(exc, f"read {path}") from exc
    except zlib.error as exc:
        raise CorruptionError(f"{path} is no whole gzip file: {exc}") from exc


def _read(path: Path) -> DataFile:
    with path.open("rb") as file:
        signature = Signature.of(os.fstat(file.fileno()))
        data = file.read()
    digest = hashlib.sha256(data).hexdigest()
    text = zlib.decompress(data, wbits=31) if path.suffix == ".gz" else data
    return DataFile(text, digest, signature)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder outlive a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_parents(folder: Path) -> None:
    """Make a folder that was just made, with those above it, outlive a loss of power."""
    device = folder.stat().st_dev
    for each in folder.parents:
        if each.stat().st_dev != device:
            return
        with suppress(PermissionError):  # then this user did not make it
            sync_folder(each)


_DOUBT: Final = stat.S_IXUSR


def mark_doubtful(fd: int) -> None:
    """Tell every process that a sync of this journal failed.

    By a bit of its mode: that takes no room on a disk that is full, and no write on one that fails.
    It need not outlive a loss of power, after which everybody reads what the disk has.
    """
    os.fchmod(fd, _MODE | _DOUBT)


def is_doubtful(found: os.stat_result) -> bool:
    """Whether a sync of the journal that `stat` shows so failed."""
    return bool(found.st_mode & _DOUBT)


def sync_data(fd: int) -> None:
    """Bring a file's content to the disk, past the drive's own cache where the system allows."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """All of `data` at `offset`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]


def _write(fd: int, piece: bytes, digest: hashlib._Hash, packer: zlib._Compress | None) -> None:
    data = piece if packer is None else packer.compress(piece)
    digest.update(data)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _end(fd: int, digest: hashlib._Hash, packer: zlib._Compress | None) -> None:
    if packer is not None:
        _write(fd, packer.flush(), digest, None)
    sync_data(fd)


def _link(old: Path, backup: Path) -> None:
    with suppress(FileNotFoundError):
        backup.unlink()
    try:
        os.link(old, backup)
    except OSError:
        # A file system without hard links: a copy costs more and keeps as well.
        import shutil

        shutil.copy2(old, backup)


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise translate_os_error(exc, f"look at {path}") from exc
    return True


def _number(entry: str, prefix: str) -> int | None:
    """The number behind the prefix of a name; None: not a name that the store gives."""
    digits = entry.removeprefix(prefix)
    is_ours = digits != entry and digits.isascii() and digits.isdigit()
    return int(digits) if is_ours else None


__all__ = [
    "DataFile",
    "FileManager",
    "Signature",
    "is_doubtful",
    "mark_doubtful",
    "read_file",
    "sync_data",
    "sync_folder",
    "sync_parents",
    "write_all",
]
