"""How far a migration has come, in a small file: replaced as a whole after each batch.

It is never ahead of the target. If it is behind, as after a kill, a few batches are written twice,
which changes nothing.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.engine import finish
from hf_async_store.errors import CorruptionError
from hf_async_store.migration.merging import MergeRule
from hf_async_store.oserrors import translate_os_error

if TYPE_CHECKING:
    from hf_async_store.entities import Value
    from hf_async_store.strategy import StorageStrategy

_FORMAT: Final = "hf_async_store checkpoint 1"
_PLACE: Final = ("type", "name", "host", "port", "region", "table_prefix", "endpoint_url")


class Progress(msgspec.Struct):
    """Of one collection: what is certainly in the target.

    Attributes:
        cursor: where the walk over the source goes on; None at its begin, or when it is done.
        digest: of the `count` entities that were read up to there.
    """

    cursor: str | None = None
    count: int = 0
    digest: str | None = None
    done: bool = False


class Checkpoint(msgspec.Struct):
    """A migration under way.

    Attributes:
        pair: tells which source and target it is about.
        rule: how batches are written (see `MergeRule`); None: over whatever is there.
        merge: the rule that the operator gave for what was there before; None: nothing was.
    """

    pair: str
    batch_size: int
    rule: MergeRule | None
    merge: MergeRule | None
    collections: dict[str, Progress]
    backup: str | None = None
    format: str = _FORMAT


def identity(store: StorageStrategy) -> str:
    """What tells a store from others: where it is, and not how it is opened."""
    told = {
        name: value
        for name, value in store.describe().items()
        if name not in ("capabilities", "collections", "configuration")
    }
    configured = store.describe().get("configuration")
    settings = configured if isinstance(configured, dict) else {}
    place: dict[str, Value] = {name: settings[name] for name in _PLACE if name in settings}
    if not store.capabilities.durable:
        place["object"] = id(store)  # it is nowhere else
    text = msgspec.json.encode({**told, **place}, order="deterministic")
    return blake2b(text, digest_size=8).hexdigest()


class CheckpointFile:
    """The file of one pair of stores.

    Args:
        folder: where it lies.
    """

    def __init__(self, folder: Path, source: StorageStrategy, target: StorageStrategy) -> None:
        self.pair = f"{identity(source)}-{identity(target)}"
        self.path = folder / f"migration-{self.pair}.checkpoint"
        self._newest: bytes | None = None
        self._writing: asyncio.Task[None] | None = None

    async def read(self) -> Checkpoint | None:
        """The checkpoint of this pair; None if there is none.

        Raises:
            CorruptionError: what is there is none.
        """
        try:
            data = await asyncio.to_thread(self.path.read_bytes)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise translate_os_error(exc, f"read {self.path}") from exc
        try:
            found = msgspec.json.decode(data, type=Checkpoint)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise self._unreadable() from exc
        if found.format != _FORMAT or found.pair != self.pair:
            raise self._unreadable()
        return found

    def _unreadable(self) -> CorruptionError:
        return CorruptionError(
            f"{self.path} cannot be read as a checkpoint. Remove it and migrate again: what is in "
            "the target already is compared, and not written again"
        )

    async def save(self, checkpoint: Checkpoint) -> None:
        """Have the file hold this, or something newer; saves that come together share a write."""
        self._newest = msgspec.json.encode(checkpoint)
        while self._newest is not None:
            if self._writing is None or self._writing.done():
                data, self._newest = self._newest, None
                self._writing = asyncio.ensure_future(self._write(data))
            await asyncio.shield(self._writing)

    async def settle(self) -> None:
        """Wait for a write that is under way."""
        if self._writing is not None and not self._writing.done():
            await finish(self._writing)

    async def remove(self) -> None:
        await self.settle()
        with suppress(FileNotFoundError):
            await asyncio.to_thread(self.path.unlink)

    async def _write(self, data: bytes) -> None:
        try:
            await asyncio.to_thread(_replace, self.path, data)
        except OSError as exc:
            raise translate_os_error(exc, f"write {self.path}") from exc


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # Of a known name: whatever lies there is not followed to another file.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(temporary, flags, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
