"""The files of a JSON store: their names, and how they are read, replaced and backed up."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import re
import stat
import sys
import zlib
from collections.abc import AsyncIterator, Container, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Final

import msgspec

from hf_async_store.config import JSONConfig
from hf_async_store.driver import run_to_completion
from hf_async_store.errors import ConfigurationError, CorruptionError, DataFileConflictError
from hf_async_store.event_loop import begun_in_thread, in_thread, one_thread
from hf_async_store.os_errors import translate_os_error
from hf_async_store.ownership import Ownership, keep, of_a_new_store, share
from hf_async_store.schema import CLAIM_COLLECTION, SUBSCRIPTION_COLLECTION, Schema
from hf_async_store.strategies.json.journal import USE_FILES, FileState

log: Final = logging.getLogger("hf_async_store.json")

_MODE: Final = 0o600
_SQLITE_HEADER: Final = b"SQLite format 3\0"
_TEMPORARY: Final = ".tmp"
_GZIP_SUFFIX: Final = ".gz"
_SPLIT_STEM: Final = "store"
"""The first part of the names of the journal and the lock files of split files."""

SYSTEM_SECTIONS: Final = {each.name: each for each in (CLAIM_COLLECTION, SUBSCRIPTION_COLLECTION)}
"""The collections that a JSON store needs in addition to the declared ones."""

CLAIM_FILE: Final = f"{CLAIM_COLLECTION.name}.json"
"""With split files, the data file of claims, which exists once an entity was claimed."""

_SUBSCRIPTION_FILE: Final = f"{SUBSCRIPTION_COLLECTION.name}.json"
"""The same for the positions of named subscriptions to a change feed."""

_RESERVED: Final = re.compile(
    r".*\.(journal|bak|damaged)\.\d+(\.gz)?|.*\.feed\.\d+-\d+"
    r"|\..*\.lock(\..*)?|\..*\.(declarations|tmp)",
    re.DOTALL,
)
"""Names of journals, backups, locks, recorded declarations and temporary files."""

_KEPT: Final = r"(\d+)-(\d+)"

_LARGE_FILE: Final = 1 << 20
"""The digest of a larger file is computed while it is parsed."""

_DECOMPRESS_CHUNK: Final = 1 << 20
_MIN_DECOMPRESS_LIMIT: Final = 64 << 20
_MAX_COMPRESSION_RATIO: Final = 100
"""A gzip file that this store did not write may decompress to 64 MiB, or to 100 times its size,
whichever is more."""


class Signature(msgspec.Struct, frozen=True):
    """The attributes of a file by which a replacement is detected without reading it. A replacement
    of the same size within one step of the clock is missed if the inode number is reused."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Signature:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    @classmethod
    def known(cls, state: FileState) -> Signature:
        return cls(state.size, state.mtime_ns, state.inode)

    def added_to(self, content: FileState) -> FileState:
        """The same content, known to have this signature."""
        return msgspec.structs.replace(
            content, size=self.size, mtime_ns=self.mtime_ns, inode=self.inode
        )


class DataFile(msgspec.Struct, frozen=True):
    """A data file that was read: `text` is its decompressed content; the rest identifies the file.

    Attributes:
        digest: of a large file, it is being computed in a thread.
    """

    text: bytes
    digest: asyncio.Future[str]
    signature: Signature


class FileManager:
    """The files of one store, in one folder.

    With `enable_compression` a data file NAME is stored as `NAME.gz`. If only the other form exists,
    it is read, and the next compaction replaces it by the configured form.

    Symbolic links are resolved when the object is created, so that every path to a store leads to the
    same locks and journal.

    Attributes:
        configured_folder: the folder as it was configured, absolute.
        folder: the folder that contains the files.

    Raises:
        ConfigurationError: a configured file name is reserved for the store's own files, or links lead
            to several folders.
    """

    def __init__(self, config: JSONConfig, schema: Schema) -> None:
        self.single = config.storage_type == "single_file"
        self._compress = config.enable_compression
        self._backups = config.backup_count if config.backup_enabled else 0
        if self.single:
            configured: dict[str, str | None] = {config.filenames.single_file: None}
        else:
            configured = {file: name for name, file in config.files(schema).items()}
            if any(each.feed for each in schema.values()):
                configured[_SUBSCRIPTION_FILE] = SUBSCRIPTION_COLLECTION.name
        for name in configured:
            _refuse_reserved(name, single=self.single)
        # Absolute, since the working directory may change while the store is open.
        self.configured_folder = Path(config.base_path).absolute()
        resolved = _ResolvedPaths(self.configured_folder, configured, single=self.single)
        self.folder = resolved.folder
        self._links = resolved.links
        self._collections = {resolved.names[name]: each for name, each in configured.items()}
        self._stem = next(iter(self._collections)) if self.single else _SPLIT_STEM
        self._journal_prefix = f"{self._stem}.journal."
        # The path of a generation. Every write needs two, and creating a Path takes longer than `stat`.
        journals = str(self.folder / self._journal_prefix)
        self.journal_path = lru_cache(4)(partial("{}{:08d}".format, journals))
        self._paths: dict[str, tuple[Path, Path]] = {}
        self._path_names: dict[str, tuple[str, ...]] = {}

    # -- names -------------------------------------------------------------------------------

    @property
    def names(self) -> Mapping[str, str | None]:
        """The data files by name, each with its collection; None for a file of all collections."""
        return self._collections

    def add(self, name: str, collection: str | None) -> None:
        """Add a data file that the journal names but this configuration does not: with split files,
        that of a collection that only other processes declare.

        Raises:
            CorruptionError: the name cannot be that of a data file of this store.
            ConfigurationError: this configuration stores the collection in another file, or another
                collection in this file.
        """
        if name in self._collections and self._collections[name] == collection:
            return
        named = f"the journal of {self.folder} names the file {name!r}"
        # A data file is read, and replaced by the next compaction: only valid names are accepted.
        if self.single or collection is None or is_reserved(name):
            raise CorruptionError(f"{named}, which is not a data file of this store. {USE_FILES}")
        if name in self._collections or collection in self._collections.values():
            raise ConfigurationError(
                f"{named} for the collection {collection!r}, which contradicts filenames.split_files. "
                "Configure the same file name for the collection in every process"
            )
        self._collections[name] = collection

    def has_claims(self) -> bool:
        """Whether claims have a data file."""
        return self.single or CLAIM_COLLECTION.name in self._collections.values()

    def path(self, name: str) -> Path:
        """The path to which a data file is written."""
        return self._both_paths(name)[0]

    def _both_paths(self, name: str) -> tuple[Path, Path]:
        # Cached, because every write checks the files, and joining paths takes longer than a check.
        paths = self._paths.get(name)
        if paths is None:
            plain, packed = self.folder / name, self.folder / f"{name}.gz"
            paths = self._paths[name] = (packed, plain) if self._compress else (plain, packed)
        return paths

    def paths_of(self, name: str) -> list[Path]:
        """The existing paths of a data file, the configured form first. Both forms exist only after
        the compaction that changes the form was interrupted."""
        return [each for each in self._both_paths(name) if _exists(each)]

    def signature(self, name: str) -> Signature | None:
        """The current signature of a data file; None if it does not exist."""
        paths = self._path_names.get(name)
        if paths is None:  # as strings, because a Path takes as long as the check
            paths = self._path_names[name] = tuple(map(str, self._both_paths(name)))
        for path in paths:
            try:
                status = os.stat(path)  # noqa: PTH116  # called by every write
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise translate_os_error(exc, f"check {path}") from exc
            # Not by `Signature.of`, as every write does this for every file.
            return Signature(status.st_size, status.st_mtime_ns, status.st_ino)
        return None

    def journal(self, generation: int) -> Path:
        return Path(self.journal_path(generation))

    def lock(self, suffix: str = "") -> Path:
        """The path of a lock file. The name begins with a dot: only the store uses it."""
        return self.folder / f".{self._stem}.lock{suffix}"

    def declarations(self) -> Path:
        """The path of the file with the recorded declarations."""
        return self.folder / f".{self._stem}.declarations"

    def journals(self) -> list[int]:
        """The generations of the journals in the folder, oldest first."""
        generations = []
        for entry in self._entries():
            number = _number_after(entry, self._journal_prefix)
            if number is not None:
                generations.append(number)
        return sorted(generations)

    def kept_journal(self, first: int, last: int) -> Path:
        """The path of the journals of these generations that are kept for the change feed."""
        return self.folder / f"{self._stem}.feed.{first:08d}-{last:08d}"

    def kept_journals(self) -> list[tuple[int, int]]:
        """The first and last generation of each file of kept journals, oldest first."""
        prefix = f"{self._stem}.feed."
        entries = (each for each in self._entries() if each.startswith(prefix))
        found = (re.fullmatch(_KEPT, each.removeprefix(prefix)) for each in entries)
        return sorted((int(each[1]), int(each[2])) for each in found if each)

    def following_journal(self, generation: int) -> int | None:
        """The first generation after this one of which there is a journal, perhaps a kept one."""
        found = [each for each in self.journals() if each > generation]
        found += [
            max(first, generation + 1) for first, last in self.kept_journals() if last > generation
        ]
        return min(found, default=None)

    def backups(self, name: str) -> list[Path]:
        """The backups of a data file, newest first."""
        numbered = [
            (number, entry)
            for entry in self._entries()
            for form in (name, f"{name}.gz")
            if (number := _number_after(entry, f"{form}.bak.")) is not None
        ]
        return [self.folder / entry for _, entry in sorted(numbered, reverse=True)]

    def ownership(self, name: str | None = None) -> Ownership | None:
        """Owner, group and mode for a new file; None: the user of this process, and mode 0600.

        Args:
            name: the data file that it is to replace; None: another file beside the data files.
        """
        replaced = None if name is None else self._ownership_of(self._both_paths(name))
        if replaced is not None:
            return replaced
        for each in self._collections:
            ownership = self._ownership_of(self._both_paths(each))
            if ownership is not None:
                return ownership.beside()
        journals = self._ownership_of(self.journal(each) for each in reversed(self.journals()))
        if journals is not None:
            return journals.beside()
        try:
            return of_a_new_store(self.folder)
        except OSError as exc:
            raise translate_os_error(exc, f"check {self.folder}") from exc

    def _ownership_of(self, paths: Iterable[Path]) -> Ownership | None:
        for path in paths:
            try:
                return Ownership.of(os.stat(path))  # noqa: PTH116
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise translate_os_error(exc, f"check {path}") from exc
        return None

    def exists(self) -> bool:
        """Whether the store exists: whether there is a data file or a journal."""
        return any(self.paths_of(name) for name in self._collections) or bool(self.journals())

    def identities(self) -> set[tuple[int, int, str]]:
        """Identities of the files: two objects for the same store have at least one in common. These
        are the data files by device and inode, and data files and journal by folder and name."""
        folder, rest = self.folder, ""
        while not folder.exists():
            rest = f"{folder.name}/{rest}"
            folder = folder.parent
        status = folder.stat()
        # Also by name, since a file that does not exist yet has no inode.
        identities = {(status.st_dev, status.st_ino, f"{rest}{each}") for each in self._collections}
        identities.add((status.st_dev, status.st_ino, f"{rest}{self._journal_prefix}"))
        for name in self._collections:
            for path in self.paths_of(name):
                status = path.stat()
                identities.add((status.st_dev, status.st_ino, ""))
        return identities

    def refuse_moved_links(self) -> None:
        """Check that the symbolic links have the same targets as when the object was created.

        Raises:
            DataFileConflictError: a link has another target.
        """
        for link, target in self._links.items():
            current = os.path.realpath(link)
            if current != target:
                raise DataFileConflictError(
                    f"{link} was a link to {target} when the store was opened, and now leads to "
                    f"{current}. Nothing was written there. Close the store and open it again"
                )

    def inspect(self, path: Path) -> None:
        """Check that a data file, if it exists, is a regular file that a rename can replace.

        Raises:
            ConfigurationError: it is of another type, or a mount point.
            DataFileConflictError: it became a symbolic link since the object was created.
        """
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise translate_os_error(exc, f"check {path}") from exc
        if stat.S_ISLNK(status.st_mode):
            raise DataFileConflictError(
                f"{path} was replaced by a link to {os.path.realpath(path)}. Close the store and "
                "open it again: it then uses the target of the link"
            )
        if not stat.S_ISREG(status.st_mode):
            raise ConfigurationError(
                f"{path} is {_file_type(status)}; a data file must be a regular file"
            )
        if os.fspath(path) in _mount_points():
            raise ConfigurationError(
                f"{path} is a mount point: it cannot be replaced by a rename, and the journal and "
                "locks beside it would not be on that mount. Mount the folder instead"
            )

    def other_link_count(self, path: Path) -> int:
        """The number of hard links to a data file other than this path and backups in the folder."""
        try:
            status = os.stat(path)  # noqa: PTH116
            if status.st_nlink == 1:
                return 0
            backups = 0
            for each in self._entries():
                base, _, digits = each.rpartition(".bak.")
                if base and digits.isdigit():
                    backups += os.path.samestat(status, os.stat(self.folder / each))  # noqa: PTH116
            return status.st_nlink - 1 - backups
        except FileNotFoundError:
            return 0
        except OSError as exc:
            raise translate_os_error(exc, f"check {path}") from exc

    def undeclared_files(self) -> list[str]:
        """With split files: the JSON files in the folder that belong to no known collection."""
        if self.single:
            return []
        entries = set(self._entries())
        # A single-file store in the same folder: its journal is named after its data file.
        singles = {each.partition(".journal.")[0] for each in entries if ".journal." in each}
        known = singles | self._collections.keys()
        names = {each.removesuffix(_GZIP_SUFFIX) for each in entries if not each.startswith(".")}
        return sorted(
            each
            for each in names - known
            if each.endswith(".json") and any(path.is_file() for path in self._both_paths(each))
        )

    def _entries(self) -> list[str]:
        try:
            return os.listdir(self.folder)  # noqa: PTH208  # cheaper than Path objects
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise translate_os_error(exc, f"list {self.folder}") from exc

    # -- reading -----------------------------------------------------------------------------

    async def read(self, name: str, known: Iterable[FileState] = ()) -> DataFile | None:
        """Read a data file; None if it does not exist.

        Args:
            known: the contents of the file that the journals name.

        Raises:
            CorruptionError: both forms exist, and their contents are not both known.
        """
        known = list(known)
        trusted = {each.digest for each in known if each.ours and each.digest is not None}
        files = []
        for path in self.paths_of(name):
            self.inspect(path)
            each = await read_file(path, trusted=trusted)
            if each is not None:
                files.append(each)
        if len(files) > 1 and not {await each.digest for each in files} <= {
            each.digest for each in known
        }:
            raise CorruptionError(
                f"{' and '.join(map(str, self._both_paths(name)))} both exist, and it is unknown "
                "which of them is valid. Move the invalid one to another folder"
            )
        return files[0] if files else None

    # -- writing -----------------------------------------------------------------------------

    def make_folder(self) -> None:
        # Called by every write; a Path takes five times as long. Also false if `stat` fails.
        if not os.path.isdir(self.folder):  # noqa: PTH112
            self._make_parents()

    def _make_parents(self) -> None:
        try:
            missing = [each for each in (self.folder, *self.folder.parents) if not each.is_dir()]
            for each in reversed(missing):
                owner = of_a_new_store(each.parent)
                each.mkdir(exist_ok=True)
                if owner is not None:
                    os.chown(each, owner.uid, owner.gid)
        except OSError as exc:
            raise translate_os_error(exc, f"create the folder {self.folder}") from exc

    async def write_temporary(
        self, name: str, chunks: AsyncIterator[bytes]
    ) -> tuple[Path, str, Signature]:
        """Write and sync a new content of data file `name` under a temporary name.

        The caller renames the file into place, or removes it.

        Returns:
            Its path, digest and signature.
        """
        path = self.folder / f".{name}.{os.urandom(4).hex()}{_TEMPORARY}"
        digest = hashlib.sha256()
        compressor = zlib.compressobj(wbits=31) if self._compress else None
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
            try:
                owned = self.ownership(name)
                if owned is not None:
                    keep(fd, owned)
                with one_thread() as run:
                    async for chunk in chunks:
                        # Not interrupted by a cancellation: the thread must not write to a closed file.
                        await run_to_completion(run(_write, fd, chunk, digest, compressor))
                    await run_to_completion(run(_finish, fd, digest, compressor))
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
        """Rename the temporary files to their final names; the old files are kept as backups.

        The caller then calls `settle`. If this is interrupted, each file is either the old one or the
        new one, and the journal identifies which. Synchronous, for a worker thread.
        """
        for name, temporary in written.items():
            target = self.path(name)
            old = self.paths_of(name)
            for each in {target, *old}:
                self.inspect(each)
            backup = self._keep_backup(name, old[0], generation) if old and self._backups else None
            try:
                temporary.replace(target)
            except BaseException:
                if backup is not None:  # otherwise each failed attempt would leave one more backup
                    backup.unlink()
                raise
            for each in old:
                if each != target:
                    each.unlink()

    def settle(self, names: Iterable[str]) -> None:
        """Sync the folder, so that files that were put in place stay there, and remove old backups of them.

        Synchronous, for a worker thread.
        """
        sync_folder(self.folder)
        # Without `backup_enabled`, existing backups are not removed.
        for name in names if self._backups else ():
            for path in self.backups(name)[self._backups :]:
                with suppress(OSError):
                    path.unlink()

    def _keep_backup(self, name: str, old: Path, generation: int) -> Path | None:
        """Create a backup of a data file; None if an interrupted attempt created it."""
        backups = self.backups(name)
        if backups and os.path.samefile(backups[0], old):  # noqa: PTH121
            return None
        # The numbers increase even if journals were removed and generations restart at 1.
        newest = [int(each.name.rpartition(".")[2]) for each in backups[:1]]
        number = max([generation, *(each + 1 for each in newest)])
        backup = self.folder / f"{old.name}.bak.{number:08d}"
        _link_or_copy(old, backup)
        return backup

    def clean(self, used: Path | None = None) -> None:
        """Remove temporary files of processes that died, and not the one that is `used`.

        The caller holds the compaction lock and the write lock: no other process writes temporary
        files then. Complete names are compared: a folder may contain another store whose name has the
        same beginning.
        """
        names = "|".join(map(re.escape, self._collections))
        stem = re.escape(self._stem)
        temporary = re.compile(
            rf"\.((?:{names})|{stem}\.journal\.\d+|{stem}\.feed\.\d+-\d+|{stem}\.(declarations|lock(\.[a-z]+)?))\.[0-9a-f]{{8}}\.tmp"
        )
        for entry in self._entries():
            if temporary.fullmatch(entry) and (used is None or entry != used.name):
                with suppress(OSError):
                    (self.folder / entry).unlink()

    def drop_journals(self, before: int) -> None:
        """Remove the journals before generation `before`."""
        for generation in self.journals():
            if generation < before:
                with suppress(FileNotFoundError):
                    self.journal(generation).unlink()

    def keep_damaged(self, generations: Iterable[int]) -> None:
        """Copy damaged journals to `NAME.damaged.NUMBER`, for a person to examine."""
        for generation in generations:
            # Not a hard link: a process that has the journal open detects its removal by a link count
            # of 0.
            copy = self.folder / f"{self._stem}.damaged.{generation:08d}"
            with suppress(FileNotFoundError):
                copy.unlink()  # created by an interrupted recovery
            _copy(self.journal(generation), copy)
            log.warning("a journal that could not be read completely was copied to %s", copy)

    def nearest_folder(self) -> Path:
        """The folder, or its nearest existing parent."""
        return next(filter(_exists, (self.folder, *self.folder.parents)))


async def read_file(path: Path, trusted: Container[str] = ()) -> DataFile | None:
    """Read a data file, gzip if its name ends with .gz; None if it does not exist.

    Args:
        trusted: digests of files that this package wrote: these may decompress to any size.

    Raises:
        CorruptionError: it is truncated, no gzip file, or decompresses to more than the limit.
        ConfigurationError: it is not a regular file, or an SQLite database.
    """
    # One call in a worker thread, and not aiofiles, which would need one call for each step, and
    # 6 ms of import time in every short-lived process. Each step releases the GIL.
    try:
        text, digest, signature = await in_thread(_read, path, trusted)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise translate_os_error(exc, f"read {path}") from exc
    except zlib.error as exc:
        raise CorruptionError(
            f"{path} is not a complete gzip file: {exc}. Nothing was changed. Restore a backup "
            "(`hf-async-store restore`)"
        ) from exc
    computed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    if digest is not None:
        computed.set_result(digest)
    else:
        computed = begun_in_thread(partial(_digest, text))
    return DataFile(text, computed, signature)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path, trusted: Container[str]) -> tuple[bytes, str | None, Signature]:
    """The decompressed content, the digest unless it takes long, and the signature."""
    # O_NONBLOCK: opening a pipe must not wait for its other end.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:  # noqa: PTH123
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigurationError(
                f"{path} is {_file_type(status)}; a data file must be a regular file"
            )
        if os.pread(fd, len(_SQLITE_HEADER), 0) == _SQLITE_HEADER:
            raise ConfigurationError(f"{path} is an SQLite database: open it as sqlite:{path}")
        data = file.read()
    signature = Signature.of(status)
    if path.suffix == _GZIP_SUFFIX:
        digest = _digest(data)
        limit = max(_MIN_DECOMPRESS_LIMIT, _MAX_COMPRESSION_RATIO * len(data))
        content = _decompressed(path, data, sys.maxsize if digest in trusted else limit)
        return content, digest, signature
    return data, None if len(data) > _LARGE_FILE else _digest(data), signature


def _decompressed(path: Path, data: bytes, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    remaining = data
    while remaining:  # a gzip file may have several members
        decompressor = zlib.decompressobj(wbits=31)
        while not decompressor.eof:
            chunk = decompressor.decompress(remaining, _DECOMPRESS_CHUNK)
            remaining = decompressor.unconsumed_tail
            if not chunk and not remaining and not decompressor.eof:
                raise zlib.error("it is truncated")
            size += len(chunk)
            if size > limit:
                raise CorruptionError(
                    f"{path} has {len(data)} bytes and decompresses to more than {limit} bytes. "
                    "Nothing was changed. If the file is valid, decompress it with gunzip"
                )
            chunks.append(chunk)
        remaining = decompressor.unused_data.lstrip(b"\0")
    if not data:
        raise zlib.error("it is empty")
    return b"".join(chunks)


def _file_type(status: os.stat_result) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(status.st_mode), "of an unknown type")


class _ResolvedPaths:
    """The configured data files, with symbolic links resolved.

    Attributes:
        folder: the folder of all of them.
        names: their names in that folder, by configured name.
        links: the targets of the symbolic links, by configured path.
    """

    def __init__(self, configured_folder: Path, names: Iterable[str], *, single: bool) -> None:
        self.names: dict[str, str] = {}
        self.links: dict[str, str] = {}
        folders: dict[Path, str] = {}
        base = Path(os.path.realpath(configured_folder))
        if os.fspath(base) != os.path.normpath(configured_folder):
            self.links[os.fspath(configured_folder)] = os.fspath(base)
        for name in names:
            path = self._link_target(base, name) or base / name
            _refuse_reserved(path.name, single=single)
            self.names[name] = path.name
            folders.setdefault(path.parent, name)
        if len(folders) > 1:
            targets = ", ".join(f"{name} in {folder}" for folder, name in folders.items())
            raise ConfigurationError(
                f"links lead from {configured_folder} to data files in several folders ({targets}). "
                "Store all data files in one folder, together with the journal and the locks; "
                f"{configured_folder} itself may be a link"
            )
        if len(set(self.names.values())) < len(self.names):
            raise ConfigurationError(
                f"two data files in {configured_folder} are links to the same file. Use a separate "
                "file for each"
            )
        self.folder = next(iter(folders), base)

    def _link_target(self, base: Path, name: str) -> Path | None:
        """The target of a data file that is a symbolic link, without `.gz`; None if it is no link."""
        targets: set[Path] = set()
        for suffix in ("", _GZIP_SUFFIX):
            path = base / f"{name}{suffix}"
            # A path that cannot be read is none; the first operation reports that.
            if not os.path.islink(path):  # noqa: PTH114
                continue
            real = os.path.realpath(path)
            if real.endswith(_GZIP_SUFFIX) != bool(suffix):
                raise ConfigurationError(
                    f"{path} is a link to {real}, but only one of the two names ends with {_GZIP_SUFFIX}"
                )
            self.links[os.fspath(path)] = real
            targets.add(Path(real.removesuffix(suffix)))
        both = (base / name, base / f"{name}{_GZIP_SUFFIX}")
        existing = [each for each in both if os.path.lexists(each)]
        if len(targets) > 1 or (targets and any(not each.is_symlink() for each in existing)):
            raise ConfigurationError(
                f"{base / name} and {base / name}{_GZIP_SUFFIX} are two different files: move one of "
                "them to another folder"
            )
        return next(iter(targets), None)


def is_reserved(name: str) -> bool:
    """Whether a data file may not have this name."""
    return name.casefold().endswith(_GZIP_SUFFIX) or _RESERVED.fullmatch(name) is not None


def _refuse_reserved(name: str, *, single: bool) -> None:
    if single and name == _SPLIT_STEM:
        raise ConfigurationError(
            f"filenames: {name!r} is reserved: the journal of split files has this name"
        )
    if name.casefold().endswith(_GZIP_SUFFIX):
        raise ConfigurationError(
            f"filenames: {name!r} must not end with {_GZIP_SUFFIX}: enable_compression adds this suffix"
        )
    if _RESERVED.fullmatch(name):
        raise ConfigurationError(
            f"filenames: {name!r} is reserved for files of the store itself (journals, locks, "
            "backups, temporary files)"
        )


_OCTAL: Final = rb"\\([0-7]{3})"


def _mount_points() -> set[str]:
    """The mount points of this process, which may be files; empty if the system does not list them."""
    try:
        with open("/proc/self/mountinfo", "rb") as file:  # noqa: PTH123  # read at every open
            lines = file.read().splitlines()
    except OSError:
        return set()
    points = (line.split(b" ", 5)[4] for line in lines if line.count(b" ") > 5)
    plain = (_unescaped(each) if b"\\" in each else each for each in points)
    return {os.fsdecode(each) for each in plain}


def _unescaped(point: bytes) -> bytes:
    return re.sub(_OCTAL, lambda code: bytes([int(code[1], 8)]), point)


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames and new files in it survive a power failure."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_parents(folder: Path) -> None:
    """Sync the parents of a new folder, so that it survives a power failure."""
    device = folder.stat().st_dev
    for each in folder.parents:
        if each.stat().st_dev != device:
            return
        with suppress(PermissionError):  # then this user did not create it
            sync_folder(each)


_SYNC_FAILED_BIT: Final = stat.S_IXUSR


def mark_sync_failed(fd: int) -> None:
    """Mark a journal, for all processes, as one of which a sync failed.

    The mark is a bit of the file mode: it needs no space on a full disk, and no write to a failing
    one. It need not survive a power failure, after which every process reads the content of the disk.
    """
    os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | _SYNC_FAILED_BIT)


def has_failed_sync(status: os.stat_result) -> bool:
    """Whether the journal with this status is marked by `mark_sync_failed`."""
    return bool(status.st_mode & _SYNC_FAILED_BIT)


def begin_sync(fd: int) -> None:
    """Record that a journal is being synced, until `end_sync` or the end of the process."""
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def end_sync(fd: int) -> None:
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)


def is_being_synced(fd: int) -> bool:
    """Whether another process syncs a journal now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def sync_data(fd: int) -> None:
    """Sync the content of a file to the disk. On macOS only F_FULLFSYNC flushes the drive's cache, too."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)


def prepare_file(path: Path, data: bytes, owned: Ownership | None) -> tuple[Path, int]:
    """Write and sync a file under a temporary name; returns its path, and an open descriptor."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}{_TEMPORARY}")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    try:
        if owned is not None:
            share(fd, owned)
        write_all(fd, data, 0)
        os.fsync(fd)
    except BaseException:
        discard_file(temporary, fd)
        raise
    return temporary, fd


def discard_file(temporary: Path, fd: int) -> None:
    os.close(fd)
    with suppress(OSError):
        temporary.unlink()


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]


def _write(fd: int, chunk: bytes, digest: hashlib._Hash, compressor: zlib._Compress | None) -> None:
    data = chunk if compressor is None else compressor.compress(chunk)
    digest.update(data)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _finish(fd: int, digest: hashlib._Hash, compressor: zlib._Compress | None) -> None:
    if compressor is not None:
        _write(fd, compressor.flush(), digest, None)
    sync_data(fd)


def _link_or_copy(old: Path, backup: Path) -> None:
    try:
        os.link(old, backup)
    except OSError:
        # A file system without hard links: a copy is slower.
        try:
            _copy(old, backup)
        except BaseException:
            with suppress(OSError):
                backup.unlink()
            raise


def _copy(old: Path, new: Path) -> None:
    """Copy a file with its owner, group and mode."""
    import shutil  # here, because it imports every compression module

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
        raise translate_os_error(exc, f"check {path}") from exc
    return True


def _number_after(entry: str, prefix: str) -> int | None:
    """The number after the prefix of a file name; None if the name has another form."""
    digits = entry.removeprefix(prefix)
    is_valid = digits != entry and digits.isascii() and digits.isdigit()
    return int(digits) if is_valid else None
