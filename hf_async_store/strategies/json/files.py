"""The files of a JSON store: their names, and how one is read, replaced and kept as a backup."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import stat
import sys
import zlib
from collections.abc import AsyncIterator, Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.driver import run_to_completion
from hf_async_store.errors import ConfigurationError, CorruptionError, DataFileConflictError
from hf_async_store.os_errors import translate_os_error
from hf_async_store.ownership import Ownership, keep, of_a_new_store
from hf_async_store.strategies.json.journal import FileState

if TYPE_CHECKING:
    from hf_async_store.config import JSONConfig
    from hf_async_store.schema import Schema

log: Final = logging.getLogger("hf_async_store.json")

_MODE: Final = 0o600
_TEMPORARY: Final = ".tmp"
_PACKED: Final = ".gz"
_SPLIT_STEM: Final = "store"
"""What journal and locks of split files are called after."""

_RESERVED: Final = re.compile(
    r".*\.(journal|bak|damaged)\.\d+(\.gz)?|\..*\.lock(\..*)?|\..*\.tmp", re.DOTALL
)
"""Names that the store gives its own files."""

_UNPACKED_CHUNK: Final = 1 << 20
_UNPACKED_BYTES: Final = 64 << 20
_UNPACKED_RATIO: Final = 100
"""A packed file of others may unpack to this many bytes at least, or to this many times its size."""


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

    A store is where its files really are: links are followed when it is made, so that locks and
    journal are the same by whatever path it is opened.

    Attributes:
        given: the folder as it was configured, absolute.
        folder: where the files are.

    Raises:
        ConfigurationError: a file name that the store gives its own files, or links that lead to
            several folders.
    """

    def __init__(self, config: JSONConfig, schema: Schema) -> None:
        self.single = config.storage_type == "single_file"
        self._compress = config.enable_compression
        self._backups = config.backup_count if config.backup_enabled else 0
        if self.single:
            given: dict[str, str | None] = {config.filenames.single_file: None}
        else:
            given = {file: name for name, file in config.files(schema).items()}
        for name in given:
            _refuse_reserved(name, single=self.single)
        # Absolute, for the working directory may change while the store is open.
        self.given = Path(config.base_path).absolute()
        places = _Places(self.given, given, single=self.single)
        self.folder = places.folder
        self._links = places.links
        self._collections = {places.names[name]: each for name, each in given.items()}
        self._stem = next(iter(self._collections)) if self.single else _SPLIT_STEM
        self._journal_prefix = f"{self._stem}.journal."
        self._journals = str(self.folder / self._journal_prefix)
        self._paths: dict[str, tuple[Path, Path]] = {}

    # -- names -------------------------------------------------------------------------------

    @property
    def names(self) -> Mapping[str, str | None]:
        """The data files by name, each with its collection, None for a file of all of them."""
        return self._collections

    def add(self, name: str, collection: str | None) -> None:
        """Take a file in that the journal names and this configuration does not: one of split
        files, of a collection that only other processes declare.

        Raises:
            CorruptionError: no store writes a journal that names it.
            ConfigurationError: this configuration keeps the collection in another file, or keeps
                another collection in this one.
        """
        if name in self._collections and self._collections[name] == collection:
            return
        named = f"the journal of {self.folder} names the file {name!r}"
        # What it names is read, and replaced by the next fold.
        if self.single or collection is None or is_reserved(name):
            raise CorruptionError(
                f"{named}, which is no data file of this store. Restore a backup "
                "(`hf-async-store restore`), or take the data files alone: `hf-async-store "
                "checkpoint --adopt-file`"
            )
        if name in self._collections or collection in self._collections.values():
            raise ConfigurationError(
                f"{named} for the collection {collection!r}; filenames.split_files does not. Give "
                "the file the same name in the configuration of every process"
            )
        self._collections[name] = collection

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

    def ownership(self, name: str | None = None) -> Ownership | None:
        """Whose a new file is to be, and its mode; None: of this process, 0600.

        Args:
            name: of the data file that it is to replace; None: it is made beside the data files.
        """
        replaced = None if name is None else self._ownership_of(self._both_paths(name))
        if replaced is not None:
            return replaced
        for each in self._collections:
            found = self._ownership_of(self._both_paths(each))
            if found is not None:
                return found.beside()
        journals = self._ownership_of(self.journal(each) for each in reversed(self.journals()))
        if journals is not None:
            return journals.beside()
        try:
            return of_a_new_store(self.folder)
        except OSError as exc:
            raise translate_os_error(exc, f"look at {self.folder}") from exc

    def _ownership_of(self, paths: Iterable[Path]) -> Ownership | None:
        for path in paths:
            try:
                return Ownership.of(os.stat(path))  # noqa: PTH116
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise translate_os_error(exc, f"look at {path}") from exc
        return None

    def is_there(self) -> bool:
        """Whether there is a store: a data file, or a journal."""
        return any(self.found(name) for name in self._collections) or bool(self.journals())

    def identities(self) -> set[tuple[int, int, str]]:
        """What two stores have in common that are one: their data files by device and inode, and
        the place of their journal by its folder and name."""
        folder, rest = self.folder, ""
        while not folder.exists():
            rest = f"{folder.name}/{rest}"
            folder = folder.parent
        found = folder.stat()
        # The names in full, for a file that is not there yet has no inode.
        places = {(found.st_dev, found.st_ino, f"{rest}{each}") for each in self._collections}
        places.add((found.st_dev, found.st_ino, f"{rest}{self._journal_prefix}"))
        for name in self._collections:
            for path in self.found(name):
                there = path.stat()
                places.add((there.st_dev, there.st_ino, ""))
        return places

    def refuse_moved_links(self) -> None:
        """Make sure that the paths still lead to where they led when the store was made.

        Raises:
            DataFileConflictError: one leads elsewhere.
        """
        for given, real in self._links.items():
            now = os.path.realpath(given)
            if now != real:
                raise DataFileConflictError(
                    f"{given} led to {real} when the store was opened, and leads to {now} now. "
                    "Nothing was written there. Close the store and open it again"
                )

    def inspect(self, path: Path) -> None:
        """Make sure that a data file that is there can be read, and be replaced by a rename.

        Raises:
            ConfigurationError: it never can.
            DataFileConflictError: it became a link since the store was made.
        """
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise translate_os_error(exc, f"look at {path}") from exc
        if stat.S_ISLNK(found.st_mode):
            raise DataFileConflictError(
                f"{path} was replaced by a link to {os.path.realpath(path)}. Close the store and "
                "open it again: it is then kept where the link leads"
            )
        if not stat.S_ISREG(found.st_mode):
            raise ConfigurationError(f"{path} is {_kind(found)}, and no file that can hold a store")
        if os.fspath(path) in _mount_points():
            raise ConfigurationError(
                f"{path} is a mount of its own, which cannot be replaced, and what the store keeps "
                "beside it would not be on that mount. Mount the folder instead"
            )

    def other_names(self, path: Path) -> int:
        """How many hard links lead to a data file beside this path and the backups of it."""
        try:
            found = os.stat(path)  # noqa: PTH116
            if found.st_nlink == 1:
                return 0
            own = 0
            for each in self._entries():
                base, _, digits = each.rpartition(".bak.")
                if base and digits.isdigit():
                    own += os.path.samestat(found, os.stat(self.folder / each))  # noqa: PTH116
            return found.st_nlink - 1 - own
        except FileNotFoundError:
            return 0
        except OSError as exc:
            raise translate_os_error(exc, f"look at {path}") from exc

    def strange_files(self) -> list[str]:
        """The JSON files in the folder of split files that belong to no known collection."""
        if self.single:
            return []
        entries = set(self._entries())
        singles = {each.partition(".journal.")[0] for each in entries if ".journal." in each}
        known = singles | self._collections.keys()
        found = {each.removesuffix(_PACKED) for each in entries if not each.startswith(".")}
        return sorted(
            each
            for each in found - known
            if each.endswith(".json") and any(path.is_file() for path in self._both_paths(each))
        )

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
        known = list(known)
        ours = {each.digest for each in known if each.ours and each.digest is not None}
        files = []
        for path in self.found(name):
            self.inspect(path)
            each = await read_file(path, trusted=ours)
            if each is not None:
                files.append(each)
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
        # Every write asks; a Path takes five times as long. It says no to errors, too.
        if not os.path.isdir(self.folder):  # noqa: PTH112
            self._make_parents()

    def _make_parents(self) -> None:
        try:
            lacking = [each for each in (self.folder, *self.folder.parents) if not each.is_dir()]
            for each in reversed(lacking):
                owner = of_a_new_store(each.parent)
                each.mkdir(exist_ok=True)
                if owner is not None:
                    os.chown(each, owner.uid, owner.gid)
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
                owned = self.ownership(name)
                if owned is not None:
                    keep(fd, owned)
                async for piece in pieces:
                    # To its end, also when cancelled: a thread may not write to a closed file.
                    await run_to_completion(asyncio.to_thread(_write, fd, piece, digest, packer))
                await run_to_completion(asyncio.to_thread(_end, fd, digest, packer))
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
            for each in {target, *old}:
                self.inspect(each)
            backup = self._keep_backup(name, old[0], generation) if old and self._backups else None
            try:
                temporary.replace(target)
            except BaseException:
                if backup is not None:  # or each try would leave one more
                    backup.unlink()
                raise
            for each in old:
                if each != target:
                    each.unlink()
        sync_folder(self.folder)
        for name in written if self._backups else ():  # to make none is no reason to remove any
            for path in self.backups(name)[self._backups :]:
                with suppress(OSError):
                    path.unlink()

    def _keep_backup(self, name: str, old: Path, generation: int) -> Path | None:
        """A backup of a data file; None if one was made by a try that was interrupted."""
        there = self.backups(name)
        if there and os.path.samefile(there[0], old):  # noqa: PTH121
            return None
        # Numbers grow, also where journals were removed and generations began anew.
        newest = [int(each.name.rpartition(".")[2]) for each in there[:1]]
        number = max([generation, *(each + 1 for each in newest)])
        backup = self.folder / f"{old.name}.bak.{number:08d}"
        _link(old, backup)
        return backup

    def clean(self) -> None:
        """Remove temporary files that somebody who died left behind.

        Only whoever holds the locks to fold and to write may call this: nobody else writes any. The
        names in full: stores whose names begin alike may lie in one folder.
        """
        names = "|".join(map(re.escape, self._collections))
        stem = re.escape(self._stem)
        ours = re.compile(
            rf"\.((?:{names})|{stem}\.journal\.\d+|{stem}\.lock(\.[a-z]+)?)\.[0-9a-f]{{8}}\.tmp"
        )
        for entry in self._entries():
            if ours.fullmatch(entry):
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
        for generation in generations:
            # No link: whoever has the journal open takes it for removed when it has no name left.
            aside = self.folder / f"{self._stem}.damaged.{generation:08d}"
            with suppress(FileNotFoundError):
                aside.unlink()  # of an adoption that was interrupted
            _copy(self.journal(generation), aside)
            log.warning("%s keeps the journal that could not be read to its end", aside)

    def nearest_folder(self) -> Path:
        """The folder, or what is there of the way to it."""
        return next(filter(_exists, (self.folder, *self.folder.parents)))

    def free_bytes(self) -> int:
        import shutil  # here, because it brings every compressor along

        try:
            return shutil.disk_usage(self.nearest_folder()).free
        except OSError as exc:
            raise translate_os_error(exc, f"look at {self.folder}") from exc


async def read_file(path: Path, trusted: Container[str] = ()) -> DataFile | None:
    """A data file, plain or gzip by its name; None if it is not there.

    Args:
        trusted: digests of files that this package wrote: these may unpack to any size.

    Raises:
        CorruptionError: it ends too early, is no gzip file, or unpacks to far more than it holds.
        ConfigurationError: it is no regular file.
    """
    # One hop for all of it, and not aiofiles, which would cost one hop for each step and every
    # one-shot process 6 ms of import. Each step lets go of the interpreter's lock.
    try:
        return await asyncio.to_thread(_read, path, trusted)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise translate_os_error(exc, f"read {path}") from exc
    except zlib.error as exc:
        raise CorruptionError(f"{path} is no whole gzip file: {exc}") from exc


def _read(path: Path, trusted: Container[str]) -> DataFile:
    # Not to wait for the other end of a pipe.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:  # noqa: PTH123
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigurationError(f"{path} is {_kind(found)}, and no file that can hold a store")
        data = file.read()
    digest = hashlib.sha256(data).hexdigest()
    text = data
    if path.suffix == _PACKED:
        limit = max(_UNPACKED_BYTES, _UNPACKED_RATIO * len(data))
        text = _unpacked(path, data, sys.maxsize if digest in trusted else limit)
    return DataFile(text, digest, Signature.of(found))


def _unpacked(path: Path, data: bytes, limit: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    left = data
    while left:  # a gzip file may have several members
        unpacker = zlib.decompressobj(wbits=31)
        while not unpacker.eof:
            piece = unpacker.decompress(left, _UNPACKED_CHUNK)
            left = unpacker.unconsumed_tail
            if not piece and not left and not unpacker.eof:
                raise zlib.error("it ends too early")
            size += len(piece)
            if size > limit:
                raise CorruptionError(
                    f"{path} has {len(data)} bytes and unpacks to more than {limit}. Nothing was "
                    "changed. If it is what it should be, unpack it with gunzip"
                )
            pieces.append(piece)
        left = unpacker.unused_data.lstrip(b"\0")
    if not data:
        raise zlib.error("it is empty")
    return b"".join(pieces)


def _kind(found: os.stat_result) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(found.st_mode), "of another kind")


class _Places:
    """Where the data files of a configuration really are.

    Attributes:
        folder: of all of them.
        names: as they are called there, by the name that is configured.
        links: of those to which links lead: the path as it is configured, and where it leads.
    """

    def __init__(self, given: Path, names: Iterable[str], *, single: bool) -> None:
        self.names: dict[str, str] = {}
        self.links: dict[str, str] = {}
        folders: dict[Path, str] = {}
        base = Path(os.path.realpath(given))
        if os.fspath(base) != os.path.normpath(given):
            self.links[os.fspath(given)] = os.fspath(base)
        for name in names:
            path = self._followed(base, name) or base / name
            _refuse_reserved(path.name, single=single)
            self.names[name] = path.name
            folders.setdefault(path.parent, name)
        if len(folders) > 1:
            led = ", ".join(f"{name} to {folder}" for folder, name in folders.items())
            raise ConfigurationError(
                f"the files of {given} lie in several folders ({led}). Keep them in one, where "
                "journal and locks lie beside them; that folder may be a link"
            )
        if len(set(self.names.values())) < len(self.names):
            raise ConfigurationError(f"two files of {given} are links to one")
        self.folder = next(iter(folders), base)

    def _followed(self, base: Path, name: str) -> Path | None:
        """Where a data file is, without the ending of a packed one; None if no link leads there."""
        found: set[Path] = set()
        for ending in ("", _PACKED):
            path = base / f"{name}{ending}"
            if not path.is_symlink():
                continue
            real = os.path.realpath(path)
            if real.endswith(_PACKED) != bool(ending):
                raise ConfigurationError(
                    f"{path} is a link to {real}: one of the two is a packed file by its name, and "
                    "the other is not"
                )
            self.links[os.fspath(path)] = real
            found.add(Path(real.removesuffix(ending)))
        there = [each for each in (base / name, base / f"{name}{_PACKED}") if os.path.lexists(each)]
        if len(found) > 1 or (found and any(not each.is_symlink() for each in there)):
            raise ConfigurationError(
                f"{base / name} and {base / name}{_PACKED} lead to two files: move one away"
            )
        return next(iter(found), None)


def is_reserved(name: str) -> bool:
    """Whether no data file can have this name."""
    return name.casefold().endswith(_PACKED) or _RESERVED.fullmatch(name) is not None


def _refuse_reserved(name: str, *, single: bool) -> None:
    if single and name == _SPLIT_STEM:
        raise ConfigurationError(
            f"filenames: {name!r} is what the journal of split files is called"
        )
    if name.casefold().endswith(_PACKED):
        raise ConfigurationError(
            f"filenames: {name!r}: the ending of packed files is added by enable_compression"
        )
    if _RESERVED.fullmatch(name):
        raise ConfigurationError(
            f"filenames: {name!r} is a name that the store gives its own files (journals, locks, "
            "backups, temporary files)"
        )


_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


def _mount_points() -> set[str]:
    """Where something is mounted, where the system tells; a file can be, too."""
    try:
        with open("/proc/self/mountinfo", "rb") as file:  # noqa: PTH123  # read at every opening
            lines = file.read().splitlines()
    except OSError:
        return set()
    points = (line.split(b" ", 5)[4] for line in lines if line.count(b" ") > 5)
    plain = (_OCTAL.sub(lambda code: bytes([int(code[1], 8)]), each) for each in points)
    return {os.fsdecode(each) for each in plain}


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
    os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | _DOUBT)


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
    try:
        os.link(old, backup)
    except OSError:
        # A file system without hard links: a copy costs more and keeps as well.
        try:
            _copy(old, backup)
        except BaseException:
            with suppress(OSError):
                backup.unlink()
            raise


def _copy(old: Path, new: Path) -> None:
    """A copy with owner, group and mode."""
    import shutil  # here, because it brings every compressor along

    with old.open("rb") as source, new.open("xb") as target:
        keep(target.fileno(), Ownership.of(os.fstat(source.fileno())))
        shutil.copyfileobj(source, target)
    shutil.copystat(old, new)


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
    is_held = digits != entry and digits.isascii() and digits.isdigit()
    return int(digits) if is_held else None


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
