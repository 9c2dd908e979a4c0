"""Compaction: the commits in the journal are written to the data files, while commits continue.

Under the write lock the journal is sealed and the next generation begins. Everything that was
committed until then is written to new files without any lock. Under the lock again, a FOLD record
names the new files, and they are renamed into place. A crash at any step leaves files and journals
that name each other: the old files and all journals; or the new files and the newer journals; or,
with split files, some old and some new files.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from hf_async_store.driver import run_to_completion
from hf_async_store.errors import CorruptionError, LockTimeoutError, StorageError
from hf_async_store.locks import FileLock
from hf_async_store.os_errors import translate_os_error
from hf_async_store.strategies.json.files import Signature
from hf_async_store.strategies.json.journal import FileState, Fold
from hf_async_store.strategies.json.serializer import (
    StoredEntity,
    compact,
    encode_json,
    section_lines,
)

if TYPE_CHECKING:
    from hf_async_store.strategies.json.engine import JSONEngine
    from hf_async_store.strategies.json.recovery import StoreState

log: Final = logging.getLogger("hf_async_store.json")

_JOURNAL_DIVISOR: Final = 4
"""A journal is compacted when it is larger than 1/4 of the data files: so the bytes that compactions
write stay in proportion to the bytes that commits write."""

_SMALL_FILE_BYTES: Final = 1 << 20
"""Data files up to this size are compacted whenever the store is idle, and at close."""

_IDLE_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 0.5
"""The pause between compactions that the size of the journal requires: without it, a small store
under load would compact almost continuously."""

_DOUBLINGS: Final = 7
"""The pause doubles after each failed compaction, at most this number of times: to one minute."""

_WAIT_SECONDS: Final = 0.01
_LINES: Final = 1024
_NORMALIZED_LINES: Final = 128


class _FileContent(NamedTuple):
    """The future content of a data file: the entities of its sections, and undeclared sections."""

    sections: dict[str, dict[str, StoredEntity]]
    extras: dict[str, bytes]


class Compactor:
    """Decides when the journal of one engine is compacted, and does it."""

    def __init__(self, engine: JSONEngine) -> None:
        self._engine = engine
        self._lock = FileLock(engine.files.lock(".fold"), engine.files.ownership)
        self._running = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last_commit = 0.0
        self._last_end = -_PAUSE_SECONDS
        self._failures = 0
        self.failure: StorageError | None = None
        """The error of the last compaction; None if it succeeded, or could not get the lock in time."""

    # -- when --------------------------------------------------------------------------------

    def consider(self) -> None:
        """Called after a commit: compact now, when the store is idle, or later."""
        self._last_commit = time.monotonic()
        state = self._engine.loaded
        if self._task is not None or state is None:
            return
        if self._is_large(state) and self._seconds_to_wait() <= 0:
            self._start()
        elif self._timer is None and (self._is_small(state) or self._is_large(state)):
            self._schedule(_IDLE_SECONDS)

    def _schedule(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._on_idle)

    def _on_idle(self) -> None:
        self._timer = None
        idle = time.monotonic() - self._last_commit
        pause = max(_IDLE_SECONDS - idle, self._seconds_to_wait() if self._failures else 0)
        if pause > 0:
            self._schedule(pause)
        elif self._task is None:
            self._start()

    def _seconds_to_wait(self) -> float:
        """Seconds until the next compaction may begin. Each failed one can leave one more journal, so
        the pause doubles: their number stays small until the fault is removed."""
        pause = _PAUSE_SECONDS * (1 << min(self._failures, _DOUBLINGS))
        return self._last_end + pause - time.monotonic()

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._in_background())

    async def _in_background(self) -> None:
        try:
            await self.compact()
        except StorageError:
            # Nothing is lost: the journal contains every commit. `health` reports the failure.
            log.warning("the journal could not be compacted into the data files", exc_info=True)
        finally:
            self._task = None
            self._last_end = time.monotonic()

    async def checkpoint(self) -> None:
        """Write everything that was committed until now to the data files.

        Raises:
            LockTimeoutError: another process was compacting all the time; it may be suspended.
        """
        timeout = self._engine.config.lock_timeout
        deadline = time.monotonic() + timeout
        while not await self.compact():
            if time.monotonic() > deadline:
                folder = self._engine.files.folder
                raise LockTimeoutError(
                    f"the journal in {folder} could not be compacted within {timeout:g} s: another "
                    "process is compacting it, or is suspended while it does so"
                )
            await asyncio.sleep(_WAIT_SECONDS)

    async def at_close(self) -> None:
        """Compact, if the files are small or the journal is large. Called in the last process that
        closes the store."""
        state = await self._engine.current()
        if state.pending and (self._is_small(state) or self._is_large(state)):
            await self.compact()

    async def close(self) -> None:
        """Wait for a running compaction: if it were cancelled, its work would be lost."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None:
            await asyncio.wait([self._task])

    def release(self) -> None:
        self._lock.close()

    def _is_small(self, state: StoreState) -> bool:
        return self._file_bytes(state) <= _SMALL_FILE_BYTES

    def _is_large(self, state: StoreState) -> bool:
        pending = state.pending_bytes
        return (
            pending > self._engine.config.write_buffer_size
            and pending > self._file_bytes(state) // _JOURNAL_DIVISOR
        )

    def _file_bytes(self, state: StoreState) -> int:
        return sum(0 if each is None else each.size for each in state.signatures.values())

    # -- how ---------------------------------------------------------------------------------

    async def compact(self) -> bool:
        """Write all commits to the data files.

        Returns:
            False if another process is compacting, or changed the store meanwhile.
        """
        state = self._engine.loaded
        if (state is None or state.fd < 0) and not self._engine.files.exists():
            return True  # there is no store, and a compaction does not create one
        async with self._running:
            if not self._lock.try_lock(exclusive=True):
                return False
            try:
                done = await self._compact()
                self.failure, self._failures = None, 0
                return done
            except StorageError as exc:
                # A lock that another process holds is a problem of its own in `health`.
                self.failure = None if isinstance(exc, LockTimeoutError) else exc
                self._failures += 1
                raise
            finally:
                self._lock.unlock()

    async def _compact(self) -> bool:
        engine = self._engine
        while True:
            async with engine.writing() as state:
                engine.files.clean()
                names = [each for each in engine.files.names if self._needs_compaction(each, state)]
                if not names:
                    await self._drop_journals(state)
                    return True
                resuming = self.is_behind(state)
                if not resuming or state.fd < 0 or state.sealed or state.replaced:
                    await engine.start_generation(state)
                generation = state.generation
                contents = {name: self._content(name, state) for name in names}
            written = await self._write(contents, state, generation)
            try:
                async with engine.writing() as current:
                    if current is not state or state.generation != generation:
                        return False
                    await run_to_completion(self._replace(written, state))
            finally:
                _unlink(path for path, _ in written.values())
            if not resuming:
                return True

    def is_behind(self, state: StoreState) -> bool:
        """Whether a compaction began this generation and was not completed.

        The next compaction then first brings the files to the beginning of this generation, without
        beginning another one: it may fail again any number of times, and each failure would leave
        one more journal.
        """
        return any(each < state.generation for each in self._engine.files.journals())

    def is_stuck(self, state: StoreState) -> bool:
        """Whether a compaction was not completed, and none is running now."""
        if self._running.locked() or not self.is_behind(state):
            return False
        try:
            free = self._lock.try_lock(exclusive=True)
        except StorageError:
            return False
        self._lock.unlock()
        return free and self.is_behind(state)

    def _needs_compaction(self, name: str, state: StoreState) -> bool:
        collections = self._engine.loader.collections_of(name, state)
        files = self._engine.files
        return (
            state.has_pending(collections)
            or name in state.replaced
            or files.paths_of(name) not in ([], [files.path(name)])
        )

    def _content(self, name: str, state: StoreState) -> _FileContent:
        """The future content of a file. The dicts are shallow copies, since commits continue."""
        collections = self._engine.loader.collections_of(name, state)
        return _FileContent(
            {
                each: dict(state.sections[each].entities)
                for each in state.sections
                if each in collections
            },
            dict(state.extras.get(name, {})),
        )

    async def _write(
        self, contents: Mapping[str, _FileContent], state: StoreState, generation: int
    ) -> dict[str, tuple[Path, FileState]]:
        """Write new files beside the old ones, and sync them."""
        files = self._engine.files
        written: dict[str, tuple[Path, FileState]] = {}
        try:
            for name, content in contents.items():
                chunks = self._encode_file(name, content, state)
                path, digest, signature = await files.write_temporary(name, chunks)
                file_state = FileState(
                    digest,
                    generation,
                    ours=True,
                    collection=files.names[name],
                    size=signature.size,
                    mtime_ns=signature.mtime_ns,
                    inode=signature.inode,
                )
                written[name] = (path, file_state)
        except BaseException:
            _unlink(path for path, _ in written.values())
            raise
        return written

    async def _replace(
        self, written: Mapping[str, tuple[Path, FileState]], state: StoreState
    ) -> None:
        engine = self._engine
        contents = {name: content for name, (_, content) in written.items()}
        contents |= self._unchanged(contents, state)
        await engine.append_control(state, Fold(contents))
        await self._replace_files(written, state.generation)
        for name, content in contents.items():
            state.mark_covered(name, content, engine.loader.collections_of(name, state))
        await self._drop_journals(state)

    def _unchanged(
        self, written: Mapping[str, FileState], state: StoreState
    ) -> dict[str, FileState]:
        """The files for which the journals contained no commit: they are complete as they are. The
        FOLD record names them too; otherwise the journals would have to be kept until each of them
        changes."""
        unchanged = {}
        for name, content in state.content.items():
            if name not in written and content.covers < state.generation:
                signature = state.signatures.get(name) or Signature(-1, -1, -1)
                unchanged[name] = FileState(
                    content.digest,
                    state.generation,
                    ours=content.ours,
                    collection=content.collection,
                    size=signature.size,
                    mtime_ns=signature.mtime_ns,
                    inode=signature.inode,
                )
        return unchanged

    async def _replace_files(
        self, written: Mapping[str, tuple[Path, FileState]], generation: int
    ) -> None:
        engine = self._engine
        paths = {name: path for name, (path, _) in written.items()}
        try:
            await asyncio.get_running_loop().run_in_executor(
                engine.threads, engine.files.put_in_place, paths, generation
            )
        except OSError as exc:
            raise translate_os_error(exc, f"replace files in {engine.files.folder}") from exc

    async def _drop_journals(self, state: StoreState) -> None:
        covers = [each.covers for each in state.content.values()]
        await self._engine.drop_journals(min(covers, default=0))

    async def renew(self, state: StoreState) -> None:
        """Write all data files again, since a sync of the journal failed. The write lock is held.

        Unlike in other compactions, no commit can be made meanwhile: none may rely on records that
        may not be on the disk.
        """
        await self._engine.start_generation(state)
        contents = {name: self._content(name, state) for name in self._engine.files.names}
        written = await self._write(contents, state, state.generation)
        try:
            await run_to_completion(self._replace(written, state))
        finally:
            _unlink(path for path, _ in written.values())

    # -- content of the files ----------------------------------------------------------------

    async def _encode_file(
        self, name: str, content: _FileContent, state: StoreState
    ) -> AsyncGenerator[bytes, None]:
        """The bytes of a data file, one entity per line, in chunks."""
        sections, extras = content
        flat = self._engine.files.names[name] is not None and not extras
        yield b"{\n"
        for number, (section, entities) in enumerate(sections.items()):
            if not flat:
                yield (b",\n" if number else b"") + encode_json(section) + b":{\n"
            async for chunk in self._encode_lines(section, entities, state):
                yield chunk
            if not flat:
                yield b"}"
        for number, (section, raw) in enumerate(extras.items(), len(sections)):
            yield (b",\n" if number else b"") + encode_json(section) + b":" + raw
        yield b"}\n" if flat else b"\n}\n"

    async def _encode_lines(
        self, name: str, entities: Mapping[str, StoredEntity], state: StoreState
    ) -> AsyncGenerator[bytes, None]:
        # Not a list of all pairs: creating that many tuples, and traversing them in the garbage
        # collector, would block the event loop.
        items = iter(entities.items())
        remaining = len(entities)
        size = _NORMALIZED_LINES
        while remaining:
            chunk = list(islice(items, size))
            remaining -= len(chunk)
            lines = {each: self._encode_line(name, each, raw, state) for each, raw in chunk}
            yield section_lines(lines) + (b",\n" if remaining else b"\n")
            size = _LINES if type(chunk[-1][1]) is bytes else _NORMALIZED_LINES
            await asyncio.sleep(0)

    def _encode_line(
        self, name: str, entity_id: str, raw: StoredEntity, state: StoreState
    ) -> bytes:
        if type(raw) is bytes:
            return raw
        section = state.sections[name]
        if section.declared:
            try:
                return section.normalized(entity_id, raw)
            except CorruptionError as exc:
                log.warning("a damaged entity was written to the data file unchanged: %s", exc)
        return compact(raw)


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()
