"""Helpers for the tests of the JSON engine: stores on disk, and interception of every file call."""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple, cast

import aiofiles.threadpool

from hf_async_store import HOST_FACTORY, Collection, JSONStorageStrategy
from hf_async_store.config import JSONConfig
from hf_async_store.values import Entity

LAYOUTS: Final = ("single_file", "split_files")

SINGLE: Final = "request_database.json"

Stored = dict[str, dict[str, Entity]]
"""Entities by id, by collection."""


def open_json(
    folder: Path,
    layout: str = "single_file",
    *,
    collections: Iterable[Collection] = HOST_FACTORY,
    **settings: Any,
) -> JSONStorageStrategy:
    """A store in `folder`, not opened yet."""
    config = JSONConfig(storage_type=cast("Any", layout), base_path=str(folder), **settings)
    return JSONStorageStrategy(config, collections=collections)


async def whole(store: JSONStorageStrategy) -> Stored:
    """All entities of the store, read by queries."""
    return {
        name: {str(each[declared.key]): each for each in await store.query_entities(name)}
        for name, declared in store.collections.items()
    }


async def reopened(folder: Path, layout: str = "single_file", **settings: Any) -> Stored:
    """All entities that a new store on the folder returns; nothing is written."""
    store = await open_json(folder, layout, **settings).open()
    try:
        return await whole(store)
    finally:
        await abandon(store)


async def abandon(store: JSONStorageStrategy) -> None:
    """Close without the final compaction, so that the files remain as if the process had died."""
    store._json.compactor.at_close = _nothing  # type: ignore[method-assign]
    await store.close()


async def _nothing() -> None:
    pass


def never_folds(store: JSONStorageStrategy) -> None:
    """Disable automatic compactions, for tests of the contents of the journal."""
    store._json.compactor.consider = lambda: None  # type: ignore[method-assign]


def without_times(stored: Stored) -> Stored:
    """The same entities without timestamps set by the store."""
    return {
        name: {
            each: {key: value for key, value in entity.items() if key not in _TIMES}
            for each, entity in entities.items()
        }
        for name, entities in stored.items()
    }


_TIMES: Final = frozenset({"created_at", "updated_at"})


def data_files(folder: Path) -> list[Path]:
    """The data files, plain and packed, without backups and journals."""
    return sorted(each for each in folder.glob("*") if each.name.endswith((".json", ".json.gz")))


def journals(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.journal.*"))


def temporary(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.tmp"))


def parsed(path: Path) -> Any:
    """A data file as any JSON parser reads it."""
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def open_files(folder: Path) -> list[str]:
    """Files below `folder` that this process has open; empty on systems without /proc."""
    return sorted(path for _, path in _open_now() if path.startswith(str(folder)))


def _open_now() -> Iterator[tuple[int, str]]:
    for each in Path("/proc/self/fd").glob("*"):
        try:
            yield int(each.name), os.readlink(each)
        except OSError:
            continue  # the descriptor by which the folder was listed


# -- every call of the file system ------------------------------------------------------------


class Call(NamedTuple):
    """One file call, before it is made."""

    number: int
    name: str
    path: str

    def __str__(self) -> str:
        return f"#{self.number} {self.name} {Path(self.path).name}"


WHOLE: Final = -1
"""The result of a hook: make the call unchanged. Another number: write only that many bytes."""

Hook = Callable[[Call, int], int]
"""Called before each file call, with the number of bytes to write (0 if none). It may raise, or kill the
process. If it returns a number of bytes, only these are written, and it is called again for the rest."""

CHANGES: Final = frozenset(
    {
        "create",
        "write",
        "pwrite",
        "fsync",
        "fdatasync",
        "ftruncate",
        "rename",
        "replace",
        "link",
        "unlink",
        "mkdir",
    }
)
"""The calls that modify or sync files."""


class FileCalls:
    """Intercepts the file calls of this process that access one folder.

    Args:
        folder: the folder; calls outside of it are not intercepted.
        hook: is called before each call.
        only: the names of the calls to intercept; None: all.
    """

    def __init__(self, folder: Path, hook: Hook, only: Iterable[str] | None = CHANGES) -> None:
        self._folder = str(folder)
        self._hook = hook
        self._only = None if only is None else frozenset(only)
        self._lock = threading.Lock()
        self._count = 0
        self._paths: dict[int, str] = {}
        self._saved: list[tuple[ModuleType, str, Any]] = []

    @property
    def count(self) -> int:
        """The number of intercepted calls."""
        return self._count

    def __enter__(self) -> FileCalls:
        self._paths |= {fd: path for fd, path in _open_now() if self._inside(path)}
        self._stand_in(os, "open", self._open)
        self._stand_in(os, "close", self._close)
        self._stand_in(os, "dup", self._dup)
        for name in ("write", "pwrite"):
            self._stand_in(os, name, self._writing(name))
        for name in ("fsync", "fdatasync", "ftruncate", "fstat", "pread"):
            if hasattr(os, name):  # macOS has no fdatasync
                self._stand_in(os, name, self._by_descriptor(name))
        for name in ("rename", "replace", "link", "unlink", "mkdir", "stat", "listdir"):
            self._stand_in(os, name, self._by_path(name))
        self._stand_in(fcntl, "flock", self._by_descriptor("flock", fcntl.flock))
        self._stand_in(aiofiles.threadpool, "sync_open", self._open_file)
        return self

    def __exit__(self, *exc: object) -> None:
        for module, name, real in self._saved:
            setattr(module, name, real)
        self._saved.clear()

    def _stand_in(self, module: ModuleType, name: str, function: Any) -> None:
        self._saved.append((module, name, getattr(module, name)))
        setattr(module, name, function)

    def _ask(self, name: str, path: str, size: int = 0) -> int:
        if (self._only is not None and name not in self._only) or not self._inside(path):
            return WHOLE
        with self._lock:
            number = self._count
            self._count += 1
        return self._hook(Call(number, name, path), size)

    def _inside(self, path: str) -> bool:
        return path == self._folder or path.startswith(self._folder + "/")

    def _open(self, path: Any, flags: int, mode: int = 0o777, **rest: Any) -> int:
        where = os.fspath(path)
        self._ask("create" if flags & os.O_CREAT and not _there(where) else "open", where)
        fd: int = _REAL.open(path, flags, mode, **rest)
        self._paths[fd] = where
        return fd

    def _close(self, fd: int) -> None:
        self._paths.pop(fd, None)
        _REAL.close(fd)

    def _dup(self, fd: int) -> int:
        path = self._paths.get(fd, "")
        self._ask("dup", path)
        copy: int = _REAL.dup(fd)
        if path:
            self._paths[copy] = path
        return copy

    def _writing(self, name: str) -> Any:
        real = getattr(os, name)

        def write(fd: int, data: Any, *offset: int) -> int:
            size = memoryview(data).nbytes
            part = self._ask(name, self._paths.get(fd, ""), size)
            return int(real(fd, data if part == WHOLE else memoryview(data)[:part], *offset))

        return write

    def _by_descriptor(self, name: str, function: Any = None) -> Any:
        real = function or getattr(os, name)

        def call(fd: int, *rest: Any) -> Any:
            self._ask(name, self._paths.get(fd, ""))
            return real(fd, *rest)

        return call

    def _by_path(self, name: str) -> Any:
        real = getattr(os, name)

        def call(path: Any, *rest: Any, **named: Any) -> Any:
            where = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
            # mkdir mostly fails because the folder exists, and unlink because the file was renamed.
            changes = name not in ("mkdir", "unlink") or (name == "unlink") == _there(where)
            self._ask(name if changes else f"{name} in vain", where)
            return real(path, *rest, **named)

        return call

    def _open_file(self, file: Any, *rest: Any, **named: Any) -> Any:
        self._ask("open", os.fspath(file))
        return _Watched(open(file, *rest, **named), lambda: self._ask("read", os.fspath(file)))


class _Real(NamedTuple):
    open: Any = os.open
    close: Any = os.close
    dup: Any = os.dup
    stat: Any = os.stat


_REAL: Final = _Real()


def _there(path: str) -> bool:
    try:
        _REAL.stat(path)
    except OSError:
        return False
    return True


class _Watched(io.BufferedReader):
    """A file whose reads are intercepted, too."""

    def __init__(self, file: Any, ask: Callable[[], int]) -> None:
        super().__init__(file.detach())
        self._ask = ask

    def read(self, size: int | None = -1, /) -> bytes:
        self._ask()
        return super().read(size)


@contextmanager
def watched(folder: Path, only: Iterable[str] | None = CHANGES) -> Iterator[list[Call]]:
    """The file calls made within the context."""
    calls: list[Call] = []

    def hook(call: Call, size: int) -> int:
        calls.append(call)
        return WHOLE

    with FileCalls(folder, hook, only):
        yield calls


def names(stored: Mapping[str, Mapping[str, object]]) -> dict[str, list[str]]:
    return {name: sorted(entities) for name, entities in stored.items()}
