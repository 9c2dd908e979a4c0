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
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import msgspec

from hf_async_store.driver import run_to_completion
from hf_async_store.errors import CorruptionError
from hf_async_store.migration.digest import PATTERN
from hf_async_store.migration.merge import MergeRule
from hf_async_store.os_errors import translate_os_error

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.values import Value

_FORMAT: Final = "hf_async_store checkpoint 1"
_PLACE: Final = ("type", "name", "host", "port", "schema", "region", "table_prefix", "endpoint_url")
_MOST_BYTES: Final = 16 << 20
"""A checkpoint holds a few numbers for each collection."""

_Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
_DigestText: TypeAlias = Annotated[str, msgspec.Meta(pattern=PATTERN)]


class Progress(msgspec.Struct):
    """Of one collection: what is certainly in the target.

    Attributes:
        cursor: where the walk over the source goes on; None at its begin, or when it is done.
        digest: of the `count` entities that were read up to there.
    """

    cursor: str | None = None
    count: _Number = 0
    digest: _DigestText | None = None
    done: bool = False


class Checkpoint(msgspec.Struct):
    """A migration under way.

    Attributes:
        pair: tells which source and target it is about.
        rule: how batches are written (see `MergeRule`); None: over whatever is there.
        merge: the rule that the operator gave for what was there before; None: nothing was.
    """

    pair: str
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    rule: MergeRule | None
    merge: MergeRule | None
    collections: dict[str, Progress]
    backup: str | None = None
    format: str = _FORMAT


def identity(store: StorageStrategy) -> str:
    """What a checkpoint is found by: where a store is, as it is spelt, and not how it is opened.

    Two spellings are two; whether two stores are one is for `is_same_store` to say.
    """
    told = {
        name: value
        for name, value in store.describe().items()
        if name not in ("capabilities", "collections", "configuration")
    }
    configured = store.describe().get("configuration")
    settings = configured if isinstance(configured, dict) else {}
    place: dict[str, Value] = {name: settings[name] for name in _PLACE if name in settings}
    if not (store.capabilities.durable or store.capabilities.multi_process):
        place["object"] = id(store)  # no other process, now or later, has this one
    text = msgspec.json.encode({**told, **place}, order="deterministic")
    return blake2b(text, digest_size=8).hexdigest()


class CheckpointFile:
    """The file of one pair of stores.

    Args:
        folder: where it is stored.
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
            data = await asyncio.to_thread(_content, self.path)
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
            await run_to_completion(self._writing)

    async def remove(self) -> None:
        await self.settle()
        with suppress(FileNotFoundError):
            await asyncio.to_thread(self.path.unlink)

    async def _write(self, data: bytes) -> None:
        try:
            await asyncio.to_thread(_replace, self.path, data)
        except OSError as exc:
            raise translate_os_error(exc, f"write {self.path}") from exc


def _content(path: Path) -> bytes:
    """The bytes of a checkpoint, and no more of what is none."""
    if path.exists() and not path.is_file():
        return b""  # to read from a pipe or a device might never end
    with path.open("rb") as file:
        return file.read(_MOST_BYTES)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # Of a known name: a link there is not followed to another file.
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
