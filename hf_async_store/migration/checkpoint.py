"""The checkpoint file of a migration, which records its progress and is replaced after each batch.

It never records more than the target holds. If it records less, as after a crash, a few batches are
written twice, which changes nothing.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import msgspec

from hf_async_store.driver import run_to_completion
from hf_async_store.errors import CorruptionError
from hf_async_store.event_loop import in_thread
from hf_async_store.migration.digest import PATTERN
from hf_async_store.migration.merge import MergeRule
from hf_async_store.migration.store_checks import settings_of
from hf_async_store.os_errors import translate_os_error

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.values import Value

_FORMAT: Final = "hf_async_store checkpoint 1"
_LOCATION_SETTINGS: Final = (
    "type",
    "name",
    "host",
    "port",
    "schema",
    "region",
    "table_prefix",
    "endpoint_url",
)
_MAX_BYTES: Final = 16 << 20
"""Far more than any checkpoint, which holds a few numbers for each collection."""

_Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
_DigestString: TypeAlias = Annotated[str, msgspec.Meta(pattern=PATTERN)]


class Progress(msgspec.Struct):
    """The progress of one collection: the entities that are certainly in the target.

    Attributes:
        cursor: the query cursor from which to continue reading the source; None at the beginning,
            and when the collection is done.
        digest: the digest of the `count` entities that were read up to the cursor.
    """

    cursor: str | None = None
    count: _Number = 0
    digest: _DigestString | None = None
    done: bool = False


class Checkpoint(msgspec.Struct):
    """The recorded state of a migration.

    Attributes:
        pair: identifies the source and the target.
        rule: how batches are written (see `MergeRule`); None: existing entities are overwritten.
        merge: the rule that the operator gave for entities that the target held before; None: the
            target was empty, or held only entities that equal the source's.
    """

    pair: str
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    rule: MergeRule | None
    merge: MergeRule | None
    collections: dict[str, Progress]
    backup: str | None = None
    format: str = _FORMAT


def identity(store: StorageStrategy, configured: str = "") -> str:
    """A hash of the location of a store as it is written, by which its checkpoint is found.

    Settings that do not belong to the location are ignored. Two spellings of one location have two
    identities; `is_same_store` finds out whether two stores are the same.

    Args:
        configured: the location in the configuration of a third-party strategy, which may describe none.
    """
    description = {
        name: value
        for name, value in store.describe().items()
        if name not in ("capabilities", "collections", "configuration")
    }
    settings = settings_of(store)
    names = (each for each in _LOCATION_SETTINGS if each in settings)
    location: dict[str, Value] = {each: settings[each] for each in names}
    if not (store.capabilities.durable or store.capabilities.multi_process):
        location["object"] = id(store)  # the store exists only in this process
    if configured:
        location["configured"] = configured
    encoded = msgspec.json.encode({**description, **location}, order="deterministic")
    return blake2b(encoded, digest_size=8).hexdigest()


class CheckpointFile:
    """The checkpoint file of one pair of stores.

    Args:
        folder: the folder in which the file is stored.
        configured: see `identity`, of each.
    """

    def __init__(
        self,
        folder: Path,
        source: StorageStrategy,
        target: StorageStrategy,
        configured: tuple[str, str] = ("", ""),
    ) -> None:
        stores = zip((source, target), configured, strict=True)
        self.pair = "-".join(identity(*each) for each in stores)
        self.path = folder / f"migration-{self.pair}.checkpoint"
        self._newest: bytes | None = None
        self._writing: asyncio.Task[None] | None = None

    async def read(self) -> Checkpoint | None:
        """The checkpoint of this pair; None if there is none.

        Raises:
            CorruptionError: the file is not a valid checkpoint.
        """
        try:
            data = await in_thread(_content, self.path)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise translate_os_error(exc, f"read {self.path}") from exc
        try:
            checkpoint = msgspec.json.decode(data, type=Checkpoint)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise self._unreadable() from exc
        if checkpoint.format != _FORMAT or checkpoint.pair != self.pair:
            raise self._unreadable()
        return checkpoint

    def _unreadable(self) -> CorruptionError:
        return CorruptionError(
            f"{self.path} is not a valid progress file. Remove it and migrate again: entities that "
            "are in the target already are compared, and not written again"
        )

    async def save(self, checkpoint: Checkpoint) -> None:
        """Write this checkpoint, or a newer one, to the file; concurrent calls share one write."""
        self._newest = msgspec.json.encode(checkpoint)
        while self._newest is not None:
            if self._writing is None or self._writing.done():
                data, self._newest = self._newest, None
                self._writing = asyncio.ensure_future(self._write(data))
            await asyncio.shield(self._writing)

    async def wait_written(self) -> None:
        """Wait for a write that is in progress."""
        if self._writing is not None and not self._writing.done():
            await run_to_completion(self._writing)

    async def remove(self) -> None:
        await self.wait_written()
        with suppress(FileNotFoundError):
            await in_thread(self.path.unlink)

    async def _write(self, data: bytes) -> None:
        try:
            await in_thread(_replace, self.path, data)
        except OSError as exc:
            raise translate_os_error(exc, f"write {self.path}") from exc


def _content(path: Path) -> bytes:
    """The content of the file, limited to the maximum size of a checkpoint."""
    if path.exists() and not path.is_file():
        return b""  # reading from a pipe or a device might never end
    with path.open("rb") as file:
        return file.read(_MAX_BYTES)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # The name is predictable, so O_NOFOLLOW refuses a symbolic link that leads to another file.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(temporary, flags, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
