"""The follower: keeps the state in memory current with the files, which other processes change.

One `fstat` shows whether the journal has grown; then only the new records are read. After a SEAL the
follower continues with the next journal, without reading the data files again. They are read again if
they were replaced by anything but a compaction that a journal names.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Final

from hf_async_store.driver import run_to_completion
from hf_async_store.errors import (
    CorruptionError,
    DataFileConflictError,
    LockTimeoutError,
    PermissionDeniedError,
    ReadOnlyStoreError,
    StorageError,
    StoreClosedError,
    UnavailableError,
)
from hf_async_store.event_loop import in_thread
from hf_async_store.locks import FileLock, LockManager
from hf_async_store.os_errors import translate_os_error
from hf_async_store.strategies.json.files import FileManager, Signature, has_failed_sync
from hf_async_store.strategies.json.journal import (
    USE_FILES,
    USE_UNDAMAGED,
    Entry,
    FeedPosition,
    Fold,
    Head,
    Kind,
    read_naming,
    scan,
)
from hf_async_store.strategies.json.recovery import (
    SMALL_TAIL,
    JournalMissing,
    StoreLoader,
    open_journal,
    read_chunks,
    reclaim_images,
    scan_file,
)
from hf_async_store.strategies.json.session_view import SessionView
from hf_async_store.strategies.json.store_state import StoreState
from hf_async_store.values import Key

_FILE_CHECK_SECONDS: Final = 0.05
"""How often reads check whether a data file was replaced manually. Writes always check."""

_POLL_SECONDS: Final = 0.01
"""The pause between two attempts to lock the registry at close."""

_MOST_LOOK_UPS: Final = 3
"""How many reads find their entities in the data files before these are parsed: one of a command, and those
of the record of a live migration."""

_MOST_LOOKED_UP: Final = 4
"""The most entities of one such read. Parsing takes as long as finding some ten of them."""

_TRIES: Final = 3
"""How often a reader tries without the lock before it acquires the read lock."""


class _Steps:
    """Counts the steps that run now. A context manager of a generator takes twice as long, twice for each
    write."""

    __slots__ = ("ended", "running")

    def __init__(self) -> None:
        self.running = 0
        self.ended: asyncio.Event | None = None  # if somebody waits for it

    def __enter__(self) -> None:
        self.running += 1

    def __exit__(self, *exc_info: object) -> None:
        self.running -= 1
        if not self.running and self.ended is not None:
            self.ended.set()


class Follower:
    """Holds the state of one store, and brings it up to date.

    Args:
        view: returns a view of a state.

    Attributes:
        state: the state in memory, which may be behind the files; None if nothing was read yet.
        committed: a view of the state, if there is one.
        write_locked: this process has acquired the write lock, and the state was up to date then.
        registry: the lock file that shows that a process has the store open.
    """

    committed: SessionView

    def __init__(
        self,
        files: FileManager,
        loader: StoreLoader,
        locks: LockManager,
        view: Callable[[StoreState], SessionView],
    ) -> None:
        self.state: StoreState | None = None
        self.loader = loader
        self.write_locked = False
        self.registry = FileLock(files.lock(".open"), files.ownership)
        self._files = files
        self._locks = locks
        self._view = view
        self._unparsed: StoreState | None = None
        self._look_ups = 0
        self._refreshing = asyncio.Lock()  # one task refreshes at a time
        self._next_file_check = 0.0
        self._closed = False
        self._steps = _Steps()

    # -- opening and closing -----------------------------------------------------------------

    def register(self, *, creating: bool = False) -> None:
        """Lock the registry. Without effect if no lock file can be created.

        Args:
            creating: the store is about to be created. Otherwise no lock file is created where there is
                no store.
        """
        if self.registry.held is None:
            with suppress(StorageError, OSError):
                if creating or self._files.exists():
                    self.registry.try_lock(exclusive=False)

    async def is_last(self, patience: float) -> bool:
        """Whether no other process has the store open. Afterwards no other one can register.

        Args:
            patience: how many seconds to wait for another process that is closing the store.

        Raises:
            LockTimeoutError: it did not end in this time.
            PermissionDeniedError, ReadOnlyStoreError: no lock file can be created here, so no process
                can write here, either.
        """
        deadline = time.monotonic() + patience
        while self.registry.held is None and self._files.exists():
            # An earlier attempt may have met a process that was closing the store. It may not have
            # seen the last commits of this one.
            if self.registry.try_lock(exclusive=False):
                break
            if time.monotonic() >= deadline:
                if not patience:
                    return False
                raise LockTimeoutError(
                    f"another process did not close the store in {self._files.folder} within "
                    f"{patience:g} s"
                )
            await asyncio.sleep(_POLL_SECONDS)
        if self.registry.held is None:
            return False
        self.registry.unlock()
        return self.registry.try_lock(exclusive=True)

    def refuse_closed(self) -> None:
        if self._closed:
            raise StoreClosedError("this store was closed")

    def step(self) -> AbstractContextManager[None]:
        """Work with files or locks of the store, which stay open until it has ended."""
        if self._closed:
            self.refuse_closed()
        return self._steps

    async def end_steps(self) -> None:
        """Wait for the steps that have begun; afterwards none begins.

        Otherwise a thread might write to the file of somebody else, to which the number of a closed
        descriptor was given, or write after another process has got the lock.
        """
        while self._steps.running:
            self._steps.ended = asyncio.Event()
            await self._steps.ended.wait()
        self._closed = True

    def discard(self) -> None:
        """Forget the state, which the next refresh reads from the files."""
        for each in (self.state, self._unparsed):
            if each is not None:
                each.close()
        self.state = self._unparsed = None

    def close(self) -> None:
        self._closed = True
        self.discard()
        self.registry.close()

    # -- checking ----------------------------------------------------------------------------

    def is_current(self, state: StoreState) -> bool:
        """Whether memory contains every record of the journal: one system call if it does."""
        try:
            append = state.appending
            if (
                append is not None
                and not append.is_applied
                and os.fstat(state.fd).st_size >= append.end
            ):
                # As soon as other processes can read the record, it must be visible here, too; otherwise a
                # reader could see an older value after a newer.
                state.complete(append)
            if self._is_alone(state):
                return True
            if state.fd < 0 or state.sealed:
                self._files.refuse_moved_links()
                return not self._has_successor(state) and not self.files_changed(state)
            status = os.fstat(state.fd)
            if status.st_size != state.offset or not status.st_nlink:
                return False
            now = time.monotonic()
            return now < self._next_file_check or self._are_files_current(state, status, now)
        except OSError as exc:
            raise translate_os_error(exc, f"check the files in {self._files.folder}") from exc

    def _are_files_current(self, state: StoreState, status: os.stat_result, now: float) -> bool:
        self._files.refuse_moved_links()
        moved = self._has_successor(state) or not self._journal_in_place(state, status)
        if moved or self.files_changed(state):
            return False  # the next read checks again, until the state is up to date
        self._next_file_check = now + _FILE_CHECK_SECONDS
        return True

    def _is_alone(self, state: StoreState) -> bool:
        """Whether the state is up to date because no other process can write now."""
        is_writing = self.write_locked or state.appending is not None
        return is_writing and self._locks.exclusive_held

    def follow_at_once(self, state: StoreState) -> bool:
        """Bring the state up to date in one step, if others have appended a few small records at most: the
        common case, decided by a few system calls.

        The caller holds the write lock. False if `refresh_locked` has to do it.
        """
        if not self._may_read_at_once(state):
            return False
        path = self._files.journal_path(state.generation)
        try:
            status = os.stat(path)  # noqa: PTH116  # every write
            return (
                (status.st_dev, status.st_ino) == state.journal_identity
                and not self._has_successor(state)
                and not self.files_changed(state)
                and self._read_small_tail(state, status, path)
                and not state.sealed
            )
        except (OSError, StorageError):
            return False  # `refresh_locked` reports it

    def _may_read_at_once(self, state: StoreState) -> bool:
        return state.is_open and not self._closed and not self._refreshing.locked()

    def files_changed(self, state: StoreState) -> bool:
        """Whether a data file is not the one that was read, or written, last."""
        signature, known = self._files.signature, state.signatures
        return bool([name for name in self._files.names if signature(name) != known.get(name)])

    def _has_successor(self, state: StoreState) -> bool:
        # Every write asks. Mostly it does not exist, and `exists` would catch an error each time.
        path = self._files.journal_path(state.generation + 1)
        return os.access(path, os.F_OK, effective_ids=True)

    def _journal_in_place(self, state: StoreState, status: os.stat_result) -> bool:
        """Whether the open journal, which has this status, is the file of its generation in the folder."""
        try:
            in_folder = os.stat(self._files.journal_path(state.generation))  # noqa: PTH116  # hot path
        except FileNotFoundError:
            return False
        return os.path.samestat(in_folder, status)

    # -- looking up --------------------------------------------------------------------------

    async def look_up(self, keys: Sequence[Key]) -> StoreState | None:
        """A state for the first reads, up to date, with at least these entities; None: use `current`.

        A short-lived process reads one entity. Parsing all others would take most of its time.
        """
        if self._look_ups >= _MOST_LOOK_UPS or len(keys) > _MOST_LOOKED_UP:
            return None
        self.refuse_closed()
        self.register()
        async with self._refreshing:
            with self.step():
                if self.state is not None:
                    return None
                self._look_ups += 1
                if self._unparsed is None:
                    self._files.refuse_moved_links()
                    self._unparsed = await self.loader.load_unparsed()
                found = self._unparsed
                if found and self.is_current(found) and await self.loader.look_up(found, keys):
                    return found
                self._look_ups = _MOST_LOOK_UPS
                return None

    @property
    def looked_up(self) -> StoreState | None:
        """The state of the look-ups, if they were the only reads, and nothing has changed since."""
        found = self._unparsed
        return found if self.state is None and found and self.is_current(found) else None

    @property
    def is_used(self) -> bool:
        """Whether anything was read."""
        return self.state is not None or self._unparsed is not None

    # -- refreshing --------------------------------------------------------------------------

    async def current(self) -> StoreState:
        """The state, brought up to date with the files."""
        state = self.state
        return state if state is not None and self.is_current(state) else await self.refresh()

    async def refresh(self) -> StoreState:
        """Bring the state up to date: without a lock, or with the read lock if that fails.

        A caller that holds a lock of the store calls `refresh_locked` instead.
        """
        self.refuse_closed()
        self.register()
        for _ in range(_TRIES):
            with suppress(CorruptionError, JournalMissing):
                return await self._follow()
            await asyncio.sleep(0)
        try:
            async with self._locks.shared():
                return await self.refresh_locked()
        except (PermissionDeniedError, ReadOnlyStoreError):
            # No lock file can be created here, so no process can write here, either.
            return await self.refresh_locked()
        except UnavailableError:
            self.refuse_removed_folder()
            raise

    async def refresh_locked(self, recover_from: str | None = None) -> StoreState:
        """Bring the state up to date. The caller holds a lock of the store.

        Args:
            recover_from: load the store again in this way; see `StoreLoader.load`.
        """
        self.refuse_closed()
        self.register()
        try:
            return await self._follow(recover_from)
        except JournalMissing as exc:
            raise CorruptionError(
                f"the journal in {self._files.folder} has a gap: {exc}. "
                f"{USE_UNDAMAGED if exc.remains else USE_FILES}"
            ) from exc

    def read_ahead(self) -> Awaitable[None] | None:
        """Read what other processes append while this one waits for a lock, so that it has less to read
        when it holds the lock. What cannot be read is left to `refresh_locked`.

        Returns what is to be awaited; None if it has been read.
        """
        state = self.state
        if state is None or self.write_locked or not self._may_read_at_once(state):
            return None
        with suppress(StorageError, OSError):
            path = self._files.journal_path(state.generation)
            if not self._read_small_tail(state, os.fstat(state.fd), path):
                return self._read_ahead(state)
        return None

    async def _read_ahead(self, state: StoreState) -> None:
        with suppress(StorageError, OSError):
            async with self._refreshing:
                with self.step():
                    await self._read_tail(state)

    async def _follow(self, recover_from: str | None = None) -> StoreState:
        async with self._refreshing:
            with self.step():
                state = self.state
                try:
                    if recover_from is not None:
                        return await self._load(recover_from)
                    if state is None or not await self._catch_up(state):
                        self._refuse_removed()
                        state = await self._load()
                except OSError as exc:
                    raise translate_os_error(
                        exc, f"read the files in {self._files.folder}"
                    ) from exc
                return state

    async def reload(self) -> StoreState:
        """Load the store again, because a data file was added. The caller holds the write lock."""
        async with self._refreshing:
            with self.step():
                return await self._load()

    async def _load(self, recover_from: str | None = None) -> StoreState:
        self._files.refuse_moved_links()
        loaded = await self.loader.load(recover_from=recover_from)
        self.discard()
        self.state = loaded
        self._next_file_check = 0.0
        self.committed = self._view(loaded)
        return loaded

    def refuse_removed_folder(self) -> None:
        """Refuse a store whose folder was removed or renamed while it was open.

        Raises:
            DataFileConflictError.
        """
        folder = self._files.folder
        if self._removed() is not None and self._files.nearest_folder() != folder:
            raise DataFileConflictError(
                f"{folder} was removed or renamed while the store was in use: nothing is read from it or "
                "written to it any more. Restore it, or close this store and open it again"
            )

    def _refuse_removed(self) -> None:
        removed = self._removed()
        if removed is not None:
            self.refuse_removed_folder()
            raise JournalMissing(f"{removed} was removed while it was in use")

    def _removed(self) -> Path | None:
        """The journal, if it was removed while the store was open, and perhaps data files as well.

        A compaction always leaves a journal. Data that was read before must not disappear silently.
        """
        state = self.state or self._unparsed
        if state is None or state.fd < 0 or self._files.journals():
            return None
        existed = [name for name, each in state.signatures.items() if each is not None]
        if state.pending or any(self._files.signature(name) is None for name in existed):
            return self._files.journal(state.generation)
        return None

    # -- catching up -------------------------------------------------------------------------

    async def _catch_up(self, state: StoreState) -> bool:
        """Read the records appended since; False if the files must be read again from the start."""
        if self._is_alone(state):
            return True
        if state.appending is not None:
            state.complete(state.appending)  # it is written, and is being synced
        if not await self._read_journals(state):
            return False
        if state.is_open and not self._journal_in_place(state, os.fstat(state.fd)):
            return False
        return not self.files_changed(state) or await self._accept_changed_files(state)

    async def _read_journals(self, state: StoreState) -> bool:
        while state.fd < 0 or await self._read_unless_replaced(state):
            if not self._has_successor(state):
                return state.is_open or self._files.journals()[-1:] <= [state.generation]
            # A journal is sealed before its successor is created, except by a recovery.
            if state.is_open and not (await self._read_tail(state) and state.sealed):
                return False
            if state.generation == 0 or not await self._follow_successor(state):
                return False
        return False

    async def _read_unless_replaced(self, state: StoreState) -> bool:
        try:
            return await self._read_tail(state)
        except CorruptionError:
            if self._journal_in_place(state, os.fstat(state.fd)) and not self._has_successor(state):
                raise
            return False  # a recovery has replaced that journal

    async def _read_tail(self, state: StoreState) -> bool:
        """Read the records after the offset; False if the journal is shorter."""
        path = self._files.journal_path(state.generation)
        status = os.fstat(state.fd)
        size = status.st_size
        if self._read_small_tail(state, status, path):
            await state.reclaim()
            return True
        if size < state.offset:
            return False
        async for entry, end in scan_file(state.fd, path, size, state.offset, state.sequence):
            images = await self.loader.commit(state, entry) if entry.kind is Kind.COMMIT else {}
            self._advance(state, entry, end, path)
            await state.reclaim()
            await reclaim_images(entry, images)
        return True

    def _read_small_tail(self, state: StoreState, status: os.stat_result, path: str) -> bool:
        """Read the records after the offset in one step, if they are small: others wait for the lock while
        this process reads what they have written. False if they are not, or if the journal is shorter.

        The caller calls `reclaim` afterwards.

        Args:
            status: of the open journal.
            path: of the open journal.
        """
        if has_failed_sync(status):
            state.failed_sync_generation = state.generation
        size = status.st_size - state.offset
        if size:
            state.is_end_checked = False
            if not 0 < size <= SMALL_TAIL:
                return False
            chunks = read_chunks(state.fd, state.offset, status.st_size, path)
            found = list(scan(chunks, path, state.offset, state.sequence))
            commits = [entry for entry, _ in found if entry.kind is Kind.COMMIT]
            self.loader.commit_small(state, commits)
            for entry, end in found:
                self._advance(state, entry, end, path)
        return True

    def _advance(self, state: StoreState, entry: Entry, end: int, path: str) -> None:
        """Go on after the next record, which ends at this offset. A commit was applied before."""
        if entry.kind is Kind.SEAL:
            state.sealed = True
        elif entry.kind is Kind.FOLD:
            self.loader.announce(state, read_naming(Fold, entry.payload, path).files)
        if entry.before:
            state.feed_end = FeedPosition(state.generation, state.offset, entry.check)
        state.offset = end
        state.sequence += 1

    async def _follow_successor(self, state: StoreState) -> bool:
        """Switch to the next generation; False if its HEAD names unknown contents of data files."""
        path = self._files.journal(state.generation + 1)
        fd = open_journal(path)
        try:
            status = os.fstat(fd)
            # Only the first record is read: a commit of 30 MB may follow it.
            first = next(scan(read_chunks(fd, 0, status.st_size, path), str(path), 0, 0), None)
            if first is None or first[0].kind is not Kind.HEAD:
                raise JournalMissing(f"{path} has no HEAD record yet")
            entry, end = first
            head = read_naming(Head, entry.payload, str(path))
            if head.alone or not self._knows_contents(state, head):
                os.close(fd)
                return False
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        previous = state.switch(fd, status, head, entry.check, end, 1)
        if previous >= 0:
            # In a thread: closing the last descriptor of a large deleted file frees its disk space.
            await run_to_completion(in_thread(os.close, previous))
        return True

    def _knows_contents(self, state: StoreState, head: Head) -> bool:
        return all(
            any(each.digest == content.digest for each in state.known.get(name, []))
            for name, content in head.files.items()
        )

    async def _accept_changed_files(self, state: StoreState) -> bool:
        """Whether the changed files have contents that the journals name; reads the files."""
        for name in list(self._files.names):
            signature = self._files.signature(name)
            if signature == state.signatures.get(name):
                continue
            known = state.known.get(name, [])
            match = next((each for each in known if Signature.known(each) == signature), None)
            if match is None:
                file = await self._files.read(name, known)
                digest = None if file is None else await file.digest
                match = next((each for each in reversed(known) if each.digest == digest), None)
                signature = None if file is None else file.signature
            if match is None or match.covers < state.content[name].covers:
                return False
            if match.covers > state.content[name].covers:
                state.mark_covered(name, match, self.loader.collections_of(name, state))
            state.signatures[name] = signature
        return True
