"""The change feed of a JSON store, which is read from its journals.

A FED_COMMIT contains its changes as they were before and after. A position names such a record, or the
HEAD of a generation, by its offset and its checksum, which no other record has: in a store that was
restored from a copy, another record is there, or none. A HEAD names the generation that it continues, so
what is missing between two journals is never skipped.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager, suppress
from hashlib import blake2s
from pathlib import Path
from typing import Final, NamedTuple

from hf_async_store.changes import Record
from hf_async_store.driver import FeedBatch, FeedEntry, run_to_completion
from hf_async_store.errors import CorruptionError, FeedExpiredError, InvalidCursorError
from hf_async_store.schema import Collection
from hf_async_store.strategies.json.files import FileManager
from hf_async_store.strategies.json.journal import (
    HEADER_SIZE,
    Entry,
    Head,
    Kind,
    RecordHeader,
    read_header,
    read_naming,
    scan,
)
from hf_async_store.strategies.json.recovery import (
    JournalMissing,
    images_in,
    open_journal,
    scan_file,
)
from hf_async_store.strategies.json.serializer import JSONSerializer
from hf_async_store.values import VERSION, Key

_TEXT: Final = re.compile(r"([0-9a-f]{12})-(\d{1,15})-(\d{1,15})-([0-9a-f]{8})-(\d{1,15})?")

_TRIES: Final = 3
"""How often a journal is searched, since it may be renamed, or merged with others, meanwhile."""

_DECODED: Final = 128
"""How many changes are decoded in one step."""

_MAX_TAILS: Final = 64
_LARGE_TAIL: Final = 1 << 20


class _Position(NamedTuple):
    """A position after a record.

    Attributes:
        offset: of the record, from the beginning of its journal.
        check: the checksum of its header.
        done: after this number of its changes of the collection; None: after all.
    """

    generation: int
    offset: int
    check: int
    done: int | None = None

    def text(self, feed: str) -> str:
        done = "" if self.done is None else self.done
        return f"{feed}-{self.generation}-{self.offset}-{self.check:08x}-{done}"

    @property
    def whole(self) -> _Position:
        return self._replace(done=None)


class _Tail(NamedTuple):
    """Where reading goes on after a position that no change followed when it was read last.

    Attributes:
        offset, check: of the last record that was read.
        size, inode: of the file.
    """

    offset: int
    check: int
    size: int
    inode: int


class _Change(NamedTuple):
    """The stored bytes of an entity before and after a commit."""

    id: str
    before: bytes | None
    after: bytes | None


class _Cut(NamedTuple):
    """The commit in which a batch ended, so that it is not parsed again for the next batch."""

    collection: str
    position: _Position
    changes: list[_Change]


class _Journal(NamedTuple):
    """An open journal.

    Attributes:
        begin, end: where it is in its file.
        ended: no record will be appended to it.
    """

    generation: int
    fd: int
    path: Path
    inode: int
    begin: int
    end: int
    ended: bool

    def header(self, offset: int) -> RecordHeader | None:
        """The header of the record at an offset; None if there is no complete record."""
        data = os.pread(self.fd, HEADER_SIZE, self.begin + offset)
        if len(data) == HEADER_SIZE:
            with suppress(CorruptionError):
                found = read_header(data, str(self.path), self.begin + offset)
                if self.begin + offset + HEADER_SIZE + found.length <= self.end:
                    return found
        return None

    def head(self) -> tuple[Head, _Position] | None:
        """The HEAD, and the position after it; None if there is none."""
        found = self.header(0)
        if found is None or found.kind != Kind.HEAD:
            return None
        data = os.pread(self.fd, HEADER_SIZE + found.length, self.begin)
        entry, _ = next(scan([data], str(self.path), self.begin, 0))
        head = read_naming(Head, entry.payload, str(self.path))
        return head, _Position(self.generation, 0, found.check)

    def last_position(self, position: _Position, offset: int) -> tuple[_Position, _Tail]:
        """The last position in the journal, by the headers of the records from `offset` on.

        Args:
            position: the last one before `offset`.
        """
        last, check = offset, 0
        while (found := self.header(offset)) is not None:
            if found.kind == Kind.FED_COMMIT:
                position = _Position(self.generation, offset, found.check)
            last, check = offset, found.check
            offset += HEADER_SIZE + found.length
        return position, _Tail(last, check, self.end, self.inode)


class ChangeFeed:
    """Reads the change feed of one store.

    While a process appends to the journal, a method may raise `CorruptionError`; the caller then tries
    again, and at last under a lock.
    """

    def __init__(self, files: FileManager, serializer: JSONSerializer) -> None:
        self._files = files
        self._serializer = serializer
        self._tails: dict[_Position, _Tail] = {}
        self._begins: tuple[Path, int, list[int]] | None = None
        """Path and inode of a file of merged journals, and where each of them begins."""
        self._cut: _Cut | None = None

    # -- positions ---------------------------------------------------------------------------

    async def end(self, collection: str, store: str) -> str | None:
        """The position after everything that was committed; None if the current generation has no name.

        Args:
            store: the random name of the store.
        """
        generations = self._files.journals()
        if not generations:
            return None
        with self._opened(generations[-1]) as journal:
            head = journal.head()
            if head is None or not head[0].feed:
                return None
            position, offset = self._known_position(journal) or (head[1], 0)
            if journal.end - offset > _LARGE_TAIL:
                hopping = asyncio.to_thread(journal.last_position, position, offset)
                position, tail = await run_to_completion(hopping)
            else:
                position, tail = journal.last_position(position, offset)
        self._remember(position, tail)
        return position.text(_feed_name(store, collection))

    def _known_position(self, journal: _Journal) -> tuple[_Position, int] | None:
        """A position in a journal, and an offset behind which the next one is."""
        for position, tail in reversed(self._tails.items()):
            if position.generation == journal.generation:
                found = journal.header(tail.offset)
                if found is not None and found.check == tail.check:
                    return position, tail.offset
        return None

    def may_go_on(self, positions: Iterable[str]) -> bool:
        """Whether changes may have been committed after one of the positions."""
        return any(self._may_go_on(each) for each in positions)

    def _may_go_on(self, text: str) -> bool:
        match = _TEXT.fullmatch(text)
        tail = None if match is None else self._tails.get(_parsed(match))
        if match is None or tail is None:
            return True
        generation = int(match[2])
        try:
            status = os.stat(self._files.journal_path(generation))  # noqa: PTH116  # polled
        except OSError:
            return True
        if (status.st_size, status.st_ino) != (tail.size, tail.inode):
            return True
        return os.path.exists(self._files.journal_path(generation + 1))  # noqa: PTH110

    def _remember(self, position: _Position, tail: _Tail) -> None:
        self._tails.pop(position, None)
        self._tails[position] = tail
        if len(self._tails) > _MAX_TAILS:
            del self._tails[next(iter(self._tails))]

    # -- changes -----------------------------------------------------------------------------

    async def read(self, collection: Collection, store: str, since: str, limit: int) -> FeedBatch:
        """The changes after a position; see `Engine.read_feed`."""
        feed = _feed_name(store, collection.name)
        match = _TEXT.fullmatch(since)
        if match is None or match[1] != feed:
            raise _invalid(collection)
        start = position = after = _parsed(match)
        batch = _Batch(self._serializer, collection, feed, limit)
        cut = self._cut
        if start.done is not None and cut is not None and cut[:2] == (collection.name, start.whole):
            position = await batch.add(cut, start.done)
            after = start.whole
        async with aclosing(self._records(after)) as records:
            while not batch.is_full and (record := await anext(records, None)) is not None:
                cut = _Cut(collection.name, record[0], await _changes(collection.name, record[1]))
                done = after.done or 0 if record[0] == after.whole else 0
                position = await batch.add(cut, done)
        self._cut = None if position.done is None else cut
        return FeedBatch(batch.entries, since if position == start else position.text(feed))

    async def _records(
        self, position: _Position
    ) -> AsyncGenerator[tuple[_Position, Entry | None], None]:
        """The commits with changes after a position, and the HEADs. If the position is within a commit,
        that commit is the first."""
        while True:
            with self._opened(position.generation) as journal:
                offset, sequence, last = self._start(journal, position)
                entries = scan_file(
                    journal.fd, journal.path, journal.end, journal.begin + offset, sequence
                )
                async with aclosing(entries):
                    async for entry, end in entries:
                        last = _Last(entry.kind, offset, entry.check)
                        if entry.before:
                            position = _Position(journal.generation, offset, entry.check)
                            yield position, entry
                        offset = end - journal.begin
                successor = self._successor(journal) if last.kind == Kind.SEAL else None
                if successor is None:
                    if journal.ended and last.kind != Kind.SEAL:
                        raise feed_expired()  # its last records were lost
                    tail = _Tail(last.offset, last.check, journal.end, journal.inode)
                    self._remember(position.whole, tail)
                    return
            position = successor
            yield position, None

    def _start(self, journal: _Journal, position: _Position) -> tuple[int, int, _Last]:
        """Where to read on after a position: offset and sequence number, and the record before that."""
        offset = position.offset
        found = journal.header(offset)
        if found is None or found.check != position.check:
            raise feed_expired()
        if position.done is not None:
            if found.kind != Kind.FED_COMMIT:
                raise feed_expired()
            return offset, found.sequence, _Last(found.kind, offset, found.check)
        tail = self._tails.get(position)
        later = None if tail is None else journal.header(tail.offset)
        if tail is not None and later is not None and later.check == tail.check:
            offset, found = tail.offset, later
        end = offset + HEADER_SIZE + found.length
        return end, found.sequence + 1, _Last(found.kind, offset, found.check)

    # -- journals ----------------------------------------------------------------------------

    def _successor(self, journal: _Journal) -> _Position | None:
        """The position after the HEAD of the next generation; None if it does not exist yet."""
        generation = journal.generation + 1
        try:
            with self._opened(generation) as successor:
                found, own = successor.head(), journal.head()
        except FeedExpiredError:
            newer = [*self._files.journals(), *(last for _, last in self._files.kept_journals())]
            if any(each >= generation for each in newer):
                raise
            return None
        if found is None or own is None or found[0].continues != own[0].feed:
            raise feed_expired()
        return found[1]

    @contextmanager
    def _opened(self, generation: int) -> Iterator[_Journal]:
        journal = next(filter(None, (self._open(generation) for _ in range(_TRIES))), None)
        if journal is None:
            raise feed_expired()
        try:
            yield journal
        finally:
            os.close(journal.fd)

    def _open(self, generation: int) -> _Journal | None:
        path = self._files.journal(generation)
        ended = self._files.journal(generation + 1).exists()
        with suppress(JournalMissing):
            fd = open_journal(path)
            status = os.fstat(fd)
            return _Journal(generation, fd, path, status.st_ino, 0, status.st_size, ended)
        for first, last in self._files.kept_journals():
            if first <= generation <= last:
                path = self._files.kept_journal(first, last)
                with suppress(JournalMissing):
                    return self._in_kept(path, generation, generation - first)
        return None

    def _in_kept(self, path: Path, generation: int, number: int) -> _Journal | None:
        """A journal in a file of merged journals; None if it is not there."""
        fd = open_journal(path)
        status = os.fstat(fd)
        if self._begins is None or self._begins[:2] != (path, status.st_ino):
            whole = _Journal(generation, fd, path, status.st_ino, 0, status.st_size, ended=True)
            self._begins = path, status.st_ino, [*_heads(whole)]
        begins = self._begins[2]
        if number >= len(begins):
            os.close(fd)
            return None
        begin, end = [*begins, status.st_size][number : number + 2]
        return _Journal(generation, fd, path, status.st_ino, begin, end, ended=True)


class _Last(NamedTuple):
    """The last record that was read."""

    kind: int
    offset: int
    check: int


class _Batch:
    """The changes of one collection that are read."""

    def __init__(
        self, serializer: JSONSerializer, collection: Collection, feed: str, limit: int
    ) -> None:
        self.entries: list[FeedEntry] = []
        self._serializer = serializer
        self._collection = collection
        self._feed = feed
        self._limit = limit

    @property
    def is_full(self) -> bool:
        return len(self.entries) >= self._limit

    async def add(self, commit: _Cut, done: int) -> _Position:
        """Add the changes of a commit after the first `done`; returns the position after the last one
        that was added."""
        count = len(commit.changes)
        if done > count:
            raise _invalid(self._collection)
        for number, change in enumerate(commit.changes[done:], done + 1):
            whole = commit.position
            position = whole if number == count else whole._replace(done=number)
            self.entries.append(self._entry(change, position))
            if self.is_full:
                return position
            if not number % _DECODED:
                await asyncio.sleep(0)
        return commit.position

    def _entry(self, change: _Change, position: _Position) -> FeedEntry:
        key = Key(self._collection.name, change.id)
        return FeedEntry(
            key,
            None if change.before is None else self._before(key, change.before),
            None if change.after is None else self._record(key, change.after),
            position.text(self._feed),
        )

    def _record(self, key: Key, stored: bytes) -> Record:
        return Record(key, self._serializer.entity(self._collection, key.id, stored))

    def _before(self, key: Key, stored: bytes) -> Record:
        try:
            return self._record(key, stored)
        except CorruptionError:
            # It was damaged, and was replaced or deleted, which is possible without an expected version.
            return Record(key, {self._collection.key: key.id, VERSION: 0})


async def _changes(collection: str, entry: Entry | None) -> list[_Change]:
    """The changes of a collection in a commit."""
    before = {} if entry is None else await images_in(entry.before)
    if entry is None or collection not in before:
        return []
    known = before[collection]
    images = (await images_in(entry.chunks)).get(collection, {})
    # An entity that the commit created and deleted is in neither.
    return [
        _Change(each, known.get(each), after)
        for each, after in images.items()
        if after is not None or each in known
    ]


def _heads(journal: _Journal) -> Iterator[int]:
    """Where the journals begin in a file of merged journals."""
    offset = 0
    while (found := journal.header(offset)) is not None:
        if found.kind == Kind.HEAD:
            yield offset
        offset += HEADER_SIZE + found.length


def _feed_name(store: str, collection: str) -> str:
    """What the positions of a feed begin with."""
    return blake2s(f"{store}/{collection}".encode(), digest_size=6).hexdigest()


def _parsed(match: re.Match[str]) -> _Position:
    done = None if match[5] is None else int(match[5])
    return _Position(int(match[2]), int(match[3]), int(match[4], 16), done)


def _invalid(collection: Collection) -> InvalidCursorError:
    return InvalidCursorError(
        f"this is not a position in the change feed of {collection.name} in this store"
    )


def feed_expired() -> FeedExpiredError:
    return FeedExpiredError(
        "the change feed does not contain any more what was committed after this position: it was removed "
        "after the retention of the feed or beyond `feed_bytes`, or files of the store were replaced or "
        "restored. Read the collection, and watch it from now on"
    )
