"""Compaction: the commits in the journal are written to the data files.

Commits continue meanwhile, except with `update_files: after each commit`, and after a failed sync.
Under the write lock the journal is sealed and the next generation begins. Everything that was committed
until then is written to new files without any lock. Under the lock again, a FOLD record names the new
files, and they are renamed into place. A crash at any step leaves files and journals that name each
other: the old files and all journals; or the new files and the newer journals; or, with split files,
some old and some new files.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, TypeGuard

import msgspec

from hf_async_store.config import JSONConfig
from hf_async_store.driver import run_to_completion
from hf_async_store.errors import DataFileConflictError, LockTimeoutError, StorageError
from hf_async_store.event_loop import pause
from hf_async_store.locks import FileLock
from hf_async_store.os_errors import translate_os_error
from hf_async_store.strategies.json.files import SYSTEM_SECTIONS, FileManager
from hf_async_store.strategies.json.follower import Follower
from hf_async_store.strategies.json.journal import FileState, Fold
from hf_async_store.strategies.json.journal_writer import JournalWriter
from hf_async_store.strategies.json.serializer import (
    CHUNK_BYTES,
    StoredEntity,
    compact,
    encode_json,
    section_lines,
)
from hf_async_store.strategies.json.store_state import StoreState

log: Final = logging.getLogger("hf_async_store.json")

_IDLE_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 0.5
"""The pause between compactions that the size of the journal requires: without it, a small store
under load would compact almost continuously."""

_STEP_DIVISOR: Final = 4
"""A compaction is considered again when the journal has grown by this fraction of `write_buffer_size`."""

_NEVER: Final = 0, 0
"""The first journal has generation 1."""

_REST_FACTOR: Final = 10
"""A compaction begins only after this many times the duration of the last one, unless the journal is larger
than the data files: under load, compactions would otherwise take much of the time on a slow machine."""

_DOUBLINGS: Final = 7
"""The pause doubles after each failed compaction, at most this number of times: to one minute."""

_WAIT_SECONDS: Final = 0.01
_LINES: Final = 1024
"""How many entities are encoded in one step, unless they have more than `CHUNK_BYTES`."""


class _FileContent(NamedTuple):
    """The future content of a data file: the entities of its sections, and undeclared sections.

    Attributes:
        flat: the entities of its only section are the members of the file.
    """

    sections: dict[str, dict[str, StoredEntity]]
    extras: dict[str, bytes]
    flat: bool


Written: TypeAlias = Mapping[str, tuple[Path, FileState]]
"""New data files by name: each with its temporary path."""


class Compactor:
    """Decides when the journal of one store is compacted, and does it.

    Args:
        writing: holds the write lock, with a state that is up to date.
    """

    def __init__(
        self,
        config: JSONConfig,
        files: FileManager,
        follower: Follower,
        journal: JournalWriter,
        writing: Callable[[], AbstractAsyncContextManager[StoreState]],
    ) -> None:
        self._config = config
        self._after_each_commit = config.update_files == "after each commit"
        self._files = files
        self._follower = follower
        self._journal = journal
        self._writing = writing
        self._lock = FileLock(files.lock(".fold"), files.ownership)
        self._running = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last_commit = 0.0
        # The generation and the end of the journal when it was considered last.
        self._considered = _NEVER
        self._step = 0 if self._after_each_commit else config.write_buffer_size // _STEP_DIVISOR
        self._last_end = -_PAUSE_SECONDS
        self._last_duration = 0.0
        self._failures = 0
        # The contents of the data files that stay in place even after a power failure. Other processes
        # replace files, too, and may fail before they sync the folder.
        self._settled: dict[str, FileState] = {}
        self.failure: StorageError | None = None
        """The error of the last compaction; None if it succeeded, or could not get the lock in time."""

    # -- when --------------------------------------------------------------------------------

    def consider(self) -> None:
        """Called after a commit, even a failed one: compact now, when the store is idle, or later."""
        self._last_commit = time.monotonic()
        state = self._follower.state
        if self._task is not None or state is None:
            return
        generation, offset = self._considered
        if generation == state.generation and state.offset - offset < self._step:
            return  # adding up what is pending takes as long as deciding about a change
        self._considered = (state.generation, state.offset) if state.pending else _NEVER
        if (
            state.is_journal_large(self._config.write_buffer_size)
            and self._seconds_to_wait() + self._rest(state) <= 0
        ):
            self._start()
        elif self._timer is None and self._is_wanted_when_idle(state):
            self._schedule(_IDLE_SECONDS)

    def _is_wanted_when_idle(self, state: StoreState) -> bool:
        wanted = (
            self._after_each_commit
            or state.is_small
            or state.is_journal_large(self._config.write_buffer_size)
        )
        return wanted and bool(state.pending)

    def _schedule(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._on_idle)

    def _on_idle(self) -> None:
        self._timer, self._considered = None, _NEVER
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

    def _rest(self, state: StoreState) -> float:
        """How many seconds more than `_PAUSE_SECONDS` a compaction waits because the last one took long."""
        if state.pending_bytes > state.file_bytes:
            return 0.0
        return max(0.0, self._last_duration * _REST_FACTOR - _PAUSE_SECONDS)

    def begin(self) -> None:
        """Compact in the background."""
        if self._task is None:
            self._start()

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._in_background())

    async def _in_background(self) -> None:
        began, succeeded = time.monotonic(), False
        try:
            await self.compact()
            self._last_duration = time.monotonic() - began
            succeeded = True
        except StorageError:
            # Nothing is lost: the journal contains every commit. `health` reports the failure.
            log.warning("the journal could not be compacted into the data files", exc_info=True)
        finally:
            self._task, self._considered = None, _NEVER
            self._last_end = time.monotonic()
        if succeeded or self._after_each_commit:
            self.consider()  # it may have failed, or may not contain what was committed meanwhile

    async def checkpoint(self) -> None:
        """Write everything that was committed until now to the data files.

        Raises:
            LockTimeoutError: another process was compacting all the time; it may be suspended.
        """
        timeout = self._config.lock_timeout
        deadline = time.monotonic() + timeout
        while not await self.compact():
            if time.monotonic() > deadline:
                raise LockTimeoutError(
                    f"the journal in {self._files.folder} could not be compacted within "
                    f"{timeout:g} s: another process is compacting it, or is suspended while it does so"
                )
            await asyncio.sleep(_WAIT_SECONDS)

    async def at_close(self) -> None:
        """Called in the last process that closes the store, if a compaction is configured or due."""
        if self._config.update_files != "when needed":
            await self.checkpoint()
        else:
            await self.compact()

    async def close(self) -> None:
        """Wait for a running compaction: if it were cancelled, its work would be lost."""
        if self._task is not None:
            await asyncio.wait([self._task])
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._considered = None, _NEVER

    def release(self) -> None:
        self._lock.close()

    def needed_bytes(self, state: StoreState) -> int:
        """The disk space for the next compaction, which writes the files beside the old ones, and for the
        journal until then."""
        return state.file_bytes + state.pending_bytes + self._config.write_buffer_size

    # -- how ---------------------------------------------------------------------------------

    async def compact(self) -> bool:
        """Write all commits to the data files.

        Returns:
            False if another process is compacting, or changed the store meanwhile.
        """
        state = self._follower.state
        if (state is None or state.fd < 0) and not self._files.exists():
            return True  # there is no store, and a compaction does not create one
        async with self._running:
            self._follower.refuse_closed()
            if not self._lock.try_lock(exclusive=True):
                return False
            try:
                done = await self._compact()
                with self._follower.step():
                    await self._journal.tidy_kept()
                self.failure, self._failures = None, 0
                return done
            except StorageError as exc:
                self._record_failure(exc)
                raise
            finally:
                self._lock.unlock()

    def _record_failure(self, exc: StorageError) -> None:
        # A lock that another process holds is a problem of its own in `health`.
        self.failure = None if isinstance(exc, LockTimeoutError) else exc
        self._failures += 1

    async def _compact(self) -> bool:
        while True:
            began = time.monotonic()
            try:
                await self._prepare_journal()
                async with self._writing() as state:
                    with self._follower.step():
                        self._files.clean(self._journal.prepared)
                        resuming = self.is_behind(state)
                        contents = await self._begin(state)
                    generation = state.generation
            finally:
                self._journal.discard_prepared()
            if not contents:
                return True
            written = await self._write(contents, state, generation)
            try:
                async with self._writing() as current:
                    is_same = current is state and state.generation == generation
                    if is_same:
                        with self._follower.step():
                            await run_to_completion(self._replace(written, state))
                    elif current.replaced or not _contain(current, generation):
                        return False
                    # Otherwise another process has written the files meanwhile.
            finally:
                _unlink(path for path, _ in written.values())
            if is_same:
                await self._drop_replaced(written, state)
                log.info(
                    "compacted the journal in %s into the data files in %.3f s",
                    *(self._files.folder, time.monotonic() - began),
                )
            if not resuming:
                return True

    async def _prepare_journal(self) -> None:
        state = self._follower.state
        if state is not None and state.pending and state.is_open and not self.is_behind(state):
            with self._follower.step():
                await self._journal.prepare(state)

    async def _drop_replaced(self, written: Written, replaced: StoreState) -> None:
        """After files were replaced, remove the journals that they contain. Commits wait for that alone,
        and not for the sync that comes before."""
        with self._follower.step():
            await run_to_completion(self._settle(written, replaced))
        async with self._writing() as state:
            with self._follower.step():
                await self._drop_journals(state)

    async def update_files(self, state: StoreState) -> None:
        """Write all commits to the data files before the last one is acknowledged. The write lock is
        held.

        If this fails, nothing is lost, and `health` reports it: the journal contains every commit. The
        caller then calls `consider`, by which it is repeated.
        """
        try:
            await self.tidy()
            while contents := await self._begin(state):
                await self._write_and_replace(contents, state)
            self.failure, self._failures = None, 0
        except StorageError as exc:
            self._record_failure(exc)
            self._last_end = time.monotonic()
            log.warning("a commit could not be written to the data files", exc_info=True)

    async def tidy(self) -> None:
        """Remove temporary files of processes that died, unless a compaction is writing some, and
        journals that were kept long enough. The write lock is held."""
        if self._lock.held is None and self._lock.try_lock(exclusive=True):
            try:
                self._files.clean()
                await self._journal.tidy_kept()
            finally:
                self._lock.unlock()

    async def renew(self, state: StoreState) -> None:
        """Write all data files again, since a sync of the journal failed. The write lock is held.

        No commit can be made meanwhile: none may rely on records that may not be on the disk.
        """
        await self._journal.start_generation(state)
        contents = {name: self._content(name, state) for name in self._files.names}
        await self._write_and_replace(contents, state)

    async def _begin(self, state: StoreState) -> dict[str, _FileContent]:
        """Begin a generation; returns what the data files contain before it. The write lock is held.

        A compaction that was not completed is repeated in the generation that it began.
        """
        names = [each for each in self._files.names if self._needs_compaction(each, state)]
        if not names:
            await self._drop_journals(state)
        elif not self.is_behind(state) or not state.is_open or state.replaced:
            await self._journal.start_generation(state)
        return {name: self._content(name, state) for name in names}

    def is_behind(self, state: StoreState) -> bool:
        """Whether a compaction began this generation and was not completed.

        The next compaction then first brings the files to the beginning of this generation, without
        beginning another one: it may fail again any number of times, and each failure would leave
        one more journal.
        """
        return any(each < state.generation for each in self._files.journals())

    def is_stuck(self, state: StoreState) -> bool:
        """Whether a compaction was not completed, and none is running now. The write lock is held."""
        if self._task is not None or self._running.locked() or not self.is_behind(state):
            return False
        try:
            free = self._lock.try_lock(exclusive=True)
        except StorageError:
            return False
        self._lock.unlock()
        return free and self.is_behind(state)

    def _needs_compaction(self, name: str, state: StoreState) -> bool:
        return (
            state.has_pending(self._follower.loader.collections_of(name, state))
            or name in state.replaced
            or self._files.paths_of(name) not in ([], [self._files.path(name)])
        )

    def _content(self, name: str, state: StoreState) -> _FileContent:
        """The future content of a file. The dicts are shallow copies, since commits continue."""
        collections = self._follower.loader.collections_of(name, state)
        # Without claims or subscriptions, a file of all collections has no section for them.
        unused = SYSTEM_SECTIONS if self._files.names[name] is None else ()
        return _FileContent(
            {
                each: dict(section.entities)
                for each, section in state.sections.items()
                if each in collections and (section.entities or each not in unused)
            },
            dict(state.extras.get(name, {})),
            flat=self._files.names[name] is not None and not state.content[name].wrapped,
        )

    async def _write(
        self, contents: Mapping[str, _FileContent], state: StoreState, generation: int
    ) -> Written:
        """Write new files beside the old ones, and sync them."""
        written: dict[str, tuple[Path, FileState]] = {}
        try:
            for name, content in contents.items():
                path, digest, signature = await self._files.write_temporary(
                    name, _encode_file(content)
                )
                covering = state.content[name].covering(generation)
                file_state = msgspec.structs.replace(covering, digest=digest, ours=True)
                written[name] = (path, signature.added_to(file_state))
        except BaseException:
            _unlink(path for path, _ in written.values())
            raise
        return written

    async def _write_and_replace(
        self, contents: Mapping[str, _FileContent], state: StoreState
    ) -> None:
        written = await self._write(contents, state, state.generation)
        try:
            if self._follower.files_changed(state):
                raise DataFileConflictError(
                    f"a data file in {self._files.folder} was replaced while its new content was "
                    "written. It was not overwritten"
                )
            await run_to_completion(self._replace(written, state))
            await run_to_completion(self._settle(written, state))
            await self._drop_journals(state)
        finally:
            _unlink(path for path, _ in written.values())

    async def _replace(self, written: Written, state: StoreState) -> None:
        contents = {name: content for name, (_, content) in written.items()}
        contents |= self._unchanged(contents, state)
        await self._journal.append_control(state, Fold(contents))
        paths = {name: path for name, (path, _) in written.items()}
        try:
            await self._journal.in_thread(self._files.put_in_place, paths, state.generation)
        except OSError as exc:
            raise translate_os_error(exc, f"replace files in {self._files.folder}") from exc
        for name, content in contents.items():
            collections = self._follower.loader.collections_of(name, state)
            state.mark_covered(name, content, collections)

    async def _settle(self, names: Iterable[str], state: StoreState) -> None:
        """Make the replacement of files durable: until then, a power failure may bring the old ones back,
        which need the journals."""
        content = dict(state.content)
        try:
            await self._journal.in_thread(self._files.settle, names)
        except OSError as exc:
            raise translate_os_error(exc, f"replace files in {self._files.folder}") from exc
        self._settled = content

    def _unchanged(
        self, written: Mapping[str, FileState], state: StoreState
    ) -> dict[str, FileState]:
        """The files for which the journals contained no commit: they are complete as they are. The
        FOLD record names them too; otherwise the journals would have to be kept until each of them
        changes."""
        unchanged = {}
        for name, content in state.content.items():
            if name not in written and content.covers < state.generation:
                covering = content.covering(state.generation)
                signature = state.signatures.get(name)
                unchanged[name] = signature.added_to(covering) if signature else covering
        return unchanged

    async def _drop_journals(self, state: StoreState) -> None:
        if self._settled != state.content:
            await run_to_completion(self._settle((), state))
        covers = [each.covers for each in state.content.values()]
        await self._journal.release_journals(min(covers, default=0))


# -- content of the files --------------------------------------------------------------------


async def _encode_file(content: _FileContent) -> AsyncGenerator[bytes, None]:
    """The bytes of a data file, one entity per line, in chunks."""
    yield b"{\n"
    for number, (section, entities) in enumerate(content.sections.items()):
        if not content.flat:
            yield (b",\n" if number else b"") + encode_json(section) + b":{\n"
        async for chunk in _encode_lines(entities):
            yield chunk
        if not content.flat:
            yield b"}"
    for number, (section, raw) in enumerate(content.extras.items(), len(content.sections)):
        yield (b",\n" if number else b"") + encode_json(section) + b":" + raw
    yield b"}\n" if content.flat else b"\n}\n"


async def _encode_lines(entities: Mapping[str, StoredEntity]) -> AsyncGenerator[bytes, None]:
    remaining = len(entities)
    items = iter(entities.items())
    while chunk := dict(islice(items, _LINES)):
        for lines in _pieces(chunk):
            remaining -= len(lines)
            yield section_lines([*lines], lines.values()) + (b",\n" if remaining else b"\n")
            await pause()


def _pieces(chunk: dict[str, StoredEntity]) -> Iterator[dict[str, bytes]]:
    """The lines of some entities, divided if they have more than `CHUNK_BYTES`."""
    if _are_canonical(chunk) and sum(map(len, chunk.values())) <= CHUNK_BYTES:
        yield chunk
        return
    lines: dict[str, bytes] = {}
    size = 0
    for entity_id, raw in chunk.items():
        # Entities that other programs wrote, and nobody changed since, keep their form.
        line = raw if type(raw) is bytes else compact(raw)
        lines[entity_id] = line
        size += len(line)
        if size > CHUNK_BYTES:
            yield lines
            lines, size = {}, 0
    if lines:
        yield lines


def _are_canonical(entities: dict[str, StoredEntity]) -> TypeGuard[dict[str, bytes]]:
    """Whether this package wrote all of the entities."""
    return set(map(type, entities.values())) == {bytes}


def _contain(state: StoreState, generation: int) -> bool:
    """Whether the data files contain everything before this generation."""
    return all(each.covers >= generation for each in state.content.values())


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()
