"""Folding: the journal becomes part of the data files, while commits go on.

Under the write lock the journal is sealed and the next generation begins; what was committed until then is
written to new files without any lock; under the lock again, a FOLD record names them, and they are
renamed into place. A crash at any step leaves files and journals that name each other: old files
and the whole chain, or new files and the rest of it, or, with split files, some of each.
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
from hf_async_store.strategies.json.serializer import Held, compact, encode_text, section_lines

if TYPE_CHECKING:
    from hf_async_store.strategies.json.engine import JSONEngine
    from hf_async_store.strategies.json.recovery import StoreState

log: Final = logging.getLogger("hf_async_store.json")

_SHARE: Final = 4
"""A journal is worth a fold when it is larger than this part of the data files: so the bytes that
folding writes stay in proportion to those that commits wrote."""

_SMALL: Final = 1 << 20
"""Data files up to this size are folded at every rest, and at close."""

_IDLE_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 0.5
"""Between folds that size asks for: a small store under load would do little else."""

_DOUBLINGS: Final = 7
"""Of that pause, at most, after folds that failed: a minute."""

_WAIT_SECONDS: Final = 0.01
_LINES: Final = 1024
_FOREIGN_LINES: Final = 128


class _Content(NamedTuple):
    """What a data file is to hold: the entities of its sections, and what is only kept."""

    sections: dict[str, dict[str, Held]]
    extras: dict[str, bytes]


class Compactor:
    """When and how the journal of one engine is folded."""

    def __init__(self, engine: JSONEngine) -> None:
        self._engine = engine
        self._fold_lock = FileLock(engine.files.lock(".fold"), engine.files.ownership)
        self._one = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last_commit = 0.0
        self._last_fold = -_PAUSE_SECONDS
        self._failures = 0
        self.failure: StorageError | None = None
        """Why the last fold did not succeed."""

    # -- when --------------------------------------------------------------------------------

    def consider(self) -> None:
        """A commit was made: fold now, at the next rest, or later."""
        self._last_commit = time.monotonic()
        state = self._engine.loaded
        if self._task is not None or state is None:
            return
        if self._is_large(state) and self._to_wait() <= 0:
            self._start()
        elif self._timer is None and (self._is_small(state) or self._is_large(state)):
            self._arm(_IDLE_SECONDS)

    def _arm(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._at_rest)

    def _at_rest(self) -> None:
        self._timer = None
        rested = time.monotonic() - self._last_commit
        left = max(_IDLE_SECONDS - rested, self._to_wait() if self._failures else 0)
        if left > 0:
            self._arm(left)
        elif self._task is None:
            self._start()

    def _to_wait(self) -> float:
        """Seconds until the next fold may begin. Each that fails leaves a journal more: the pause
        doubles, so that they stay few until the fault is gone."""
        pause = _PAUSE_SECONDS * (1 << min(self._failures, _DOUBLINGS))
        return self._last_fold + pause - time.monotonic()

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._in_background())

    async def _in_background(self) -> None:
        try:
            await self.compact()
        except StorageError:
            # Nothing is lost: the journal holds it. `health` and the next fold will tell.
            log.warning("the journal could not be folded", exc_info=True)
        finally:
            self._task = None
            self._last_fold = time.monotonic()

    async def checkpoint(self) -> None:
        """Have everything that was committed until now in the data files.

        Raises:
            LockTimeoutError: another process was folding all the time; it may be suspended.
        """
        timeout = self._engine.config.lock_timeout
        deadline = time.monotonic() + timeout
        while not await self.compact():
            if time.monotonic() > deadline:
                folder = self._engine.files.folder
                raise LockTimeoutError(f"others were folding in {folder} for {timeout:g} s")
            await asyncio.sleep(_WAIT_SECONDS)

    async def at_close(self) -> None:
        """The last process leaves: fold, if the files are small or the journal is large."""
        state = await self._engine.current()
        if state.pending and (self._is_small(state) or self._is_large(state)):
            await self.compact()

    async def close(self) -> None:
        """Wait for a fold that is under way; it is nearly done, and its work would be lost."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None:
            await asyncio.wait([self._task])

    def release(self) -> None:
        self._fold_lock.close()

    def _is_small(self, state: StoreState) -> bool:
        return self._file_bytes(state) <= _SMALL

    def _is_large(self, state: StoreState) -> bool:
        pending = state.pending_bytes
        return (
            pending > self._engine.config.write_buffer_size
            and pending > self._file_bytes(state) // _SHARE
        )

    def _file_bytes(self, state: StoreState) -> int:
        return sum(0 if each is None else each.size for each in state.signatures.values())

    # -- how ---------------------------------------------------------------------------------

    async def compact(self) -> bool:
        """Fold what is committed; False if another process is folding, or came between."""
        state = self._engine.loaded
        if (state is None or state.fd < 0) and not self._engine.files.is_there():
            return True  # there is no store, and none is made for this
        async with self._one:
            if not self._fold_lock.try_lock(exclusive=True):
                return False
            try:
                done = await self._compact()
                self.failure, self._failures = None, 0
                return done
            except StorageError as exc:
                # That others hold the lock is reported by itself, for as long as they do.
                self.failure = None if isinstance(exc, LockTimeoutError) else exc
                self._failures += 1
                raise
            finally:
                self._fold_lock.unlock()

    async def _compact(self) -> bool:
        engine = self._engine
        while True:
            async with engine.writing() as state:
                engine.files.clean()
                names = [each for each in engine.files.names if self._needs_compaction(each, state)]
                if not names:
                    await self._drop_journals(state)
                    return True
                again = self.is_behind(state)
                if not again or state.fd < 0 or state.sealed or state.replaced:
                    await engine.start_generation(state)
                generation = state.generation
                held = {name: self._held(name, state) for name in names}
            written = await self._write(held, state, generation)
            try:
                async with engine.writing() as now:
                    if now is not state or state.generation != generation:
                        return False
                    await run_to_completion(self._replace(written, state))
            finally:
                _unlink(path for path, _ in written.values())
            if not again:
                return True

    def is_behind(self, state: StoreState) -> bool:
        """Whether a fold began this generation and did not come to its end.

        Then the files are first brought to where it began, and no other is begun for that: it may
        fail again, any number of times, and each would leave one journal more.
        """
        return any(each < state.generation for each in self._engine.files.journals())

    def is_stuck(self, state: StoreState) -> bool:
        """Whether a fold did not come to its end, and nobody is at it now."""
        if self._one.locked() or not self.is_behind(state):
            return False
        try:
            free = self._fold_lock.try_lock(exclusive=True)
        except StorageError:
            return False
        self._fold_lock.unlock()
        return free and self.is_behind(state)

    def _needs_compaction(self, name: str, state: StoreState) -> bool:
        collections = self._engine.loader.collections_of(name, state)
        files = self._engine.files
        return (
            state.waiting_for(collections)
            or name in state.replaced
            or files.found(name) not in ([], [files.path(name)])
        )

    def _held(self, name: str, state: StoreState) -> _Content:
        """What the file must hold: a copy of the references, for memory moves on."""
        collections = self._engine.loader.collections_of(name, state)
        return _Content(
            {
                each: dict(state.sections[each].held)
                for each in state.sections
                if each in collections
            },
            dict(state.extras.get(name, {})),
        )

    async def _write(
        self, held: Mapping[str, _Content], state: StoreState, generation: int
    ) -> dict[str, tuple[Path, FileState]]:
        """New files, on the disk beside the old ones."""
        files = self._engine.files
        written: dict[str, tuple[Path, FileState]] = {}
        try:
            for name, content in held.items():
                pieces = self._text(name, content, state)
                path, digest, signature = await files.write_temporary(name, pieces)
                known = FileState(
                    digest,
                    generation,
                    ours=True,
                    collection=files.names[name],
                    size=signature.size,
                    mtime_ns=signature.mtime_ns,
                    inode=signature.inode,
                )
                written[name] = (path, known)
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
        await self._put_in_place(written, state.generation)
        for name, content in contents.items():
            state.covered(name, content, engine.loader.collections_of(name, state))
        await self._drop_journals(state)

    def _unchanged(
        self, written: Mapping[str, FileState], state: StoreState
    ) -> dict[str, FileState]:
        """The files for which no commit waited: they hold everything as they are. Were this not
        noted, the journals would have to be kept until each of them changes."""
        unchanged = {}
        for name, content in state.content.items():
            if name not in written and content.covers < state.generation:
                found = state.signatures.get(name) or Signature(-1, -1, -1)
                unchanged[name] = FileState(
                    content.digest,
                    state.generation,
                    ours=content.ours,
                    collection=content.collection,
                    size=found.size,
                    mtime_ns=found.mtime_ns,
                    inode=found.inode,
                )
        return unchanged

    async def _put_in_place(
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
        """Write everything anew, since a sync of the journal failed. The lock is held.

        As any fold, but that no commit comes between: what was not brought to the disk is not
        leaned on for longer than this takes.
        """
        await self._engine.start_generation(state)
        held = {name: self._held(name, state) for name in self._engine.files.names}
        written = await self._write(held, state, state.generation)
        try:
            await run_to_completion(self._replace(written, state))
        finally:
            _unlink(path for path, _ in written.values())

    # -- the text ----------------------------------------------------------------------------

    async def _text(
        self, name: str, content: _Content, state: StoreState
    ) -> AsyncGenerator[bytes, None]:
        """A data file in the spec's shape, one entity a line, in pieces."""
        sections, extras = content
        flat = self._engine.files.names[name] is not None and not extras
        yield b"{\n"
        for number, (section, held) in enumerate(sections.items()):
            if not flat:
                yield (b",\n" if number else b"") + encode_text(section) + b":{\n"
            async for piece in self._lines(section, held, state):
                yield piece
            if not flat:
                yield b"}"
        for number, (section, raw) in enumerate(extras.items(), len(sections)):
            yield (b",\n" if number else b"") + encode_text(section) + b":" + raw
        yield b"}\n" if flat else b"\n}\n"

    async def _lines(
        self, name: str, held: Mapping[str, Held], state: StoreState
    ) -> AsyncGenerator[bytes, None]:
        # Not a list of all pairs: making so many tuples, and collecting them, holds the loop.
        items = iter(held.items())
        left = len(held)
        size = _FOREIGN_LINES
        while left:
            part = list(islice(items, size))
            left -= len(part)
            lines = {each: self._line(name, each, text, state) for each, text in part}
            yield section_lines(lines) + (b",\n" if left else b"\n")
            size = _LINES if type(part[-1][1]) is bytes else _FOREIGN_LINES
            await asyncio.sleep(0)

    def _line(self, name: str, entity_id: str, text: Held, state: StoreState) -> bytes:
        if type(text) is bytes:
            return text
        section = state.sections[name]
        if section.declared:
            try:
                return section.normalized(entity_id, text)
            except CorruptionError as exc:
                log.warning("kept as it is: %s", exc)
        return compact(text)


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()
