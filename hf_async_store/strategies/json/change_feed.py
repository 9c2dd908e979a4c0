"""The change feed of a JSON store, which is read from its journals.

A FED_COMMIT contains entities as they were before and after. A position names the last one that a reader
knows, by its offset and its checksum, which no other record has: in a store that was restored from a
copy, another record is there, or none. A HEAD names the last position before its generation. So changes
that are missing between two journals are never skipped; and a reader that knows all changes needs none of
the earlier journals.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager, suppress
from hashlib import blake2s
from pathlib import Path
from typing import Final, NamedTuple

from hf_async_store.changes import Record
from hf_async_store.driver import FeedBatch, FeedEntry
from hf_async_store.errors import CorruptionError, FeedExpiredError, InvalidCursorError
from hf_async_store.event_loop import pause
from hf_async_store.schema import Collection
from hf_async_store.strategies.json.files import FileManager
from hf_async_store.strategies.json.journal import (
    HEADER_SIZE,
    Entry,
    FeedPosition,
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


class _Place(NamedTuple):
    """Where a reader is.

    Attributes:
        position: the last record of which it knows changes.
        done: it knows this number of its changes of the collection; None: all.
    """

    position: FeedPosition
    done: int | None = None

    def text(self, feed: str) -> str:
        generation, offset, check = self.position
        return f"{feed}-{generation}-{offset}-{check:08x}-{'' if self.done is None else self.done}"


class _Tail(NamedTuple):
    """The last record of the store that was read, when no changes followed a position.

    Attributes:
        size, inode: of its journal.
    """

    record: FeedPosition
    size: int
    inode: int


class _Change(NamedTuple):
    """The stored bytes of an entity before and after a commit."""

    id: str
    before: bytes | None
    after: bytes | None


class _Commit(NamedTuple):
    """The changes of one collection in a commit."""

    collection: str
    position: FeedPosition
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

    def head(self) -> tuple[Head, RecordHeader] | None:
        """The HEAD, and its header; None if there is none."""
        found = self.header(0)
        if found is None or found.kind != Kind.HEAD:
            return None
        data = os.pread(self.fd, HEADER_SIZE + found.length, self.begin)
        entry, _ = next(scan([data], str(self.path), self.begin, 0))
        return read_naming(Head, entry.payload, str(self.path)), found


class _Reached(NamedTuple):
    """The last record that was read.

    Attributes:
        end, sequence: where the next one begins, and its sequence number.
    """

    record: FeedPosition
    kind: int
    end: int
    sequence: int

    @classmethod
    def of(cls, record: FeedPosition, found: RecordHeader) -> _Reached:
        end = record.offset + HEADER_SIZE + found.length
        return cls(record, found.kind, end, found.sequence + 1)

    def following(self, entry: Entry, end: int) -> _Reached:
        record = FeedPosition(self.record.generation, self.end, entry.check)
        return _Reached(record, entry.kind, end, self.sequence + 1)


class ChangeFeed:
    """Reads the change feed of one store.

    While a process appends to the journal, a method may raise `CorruptionError`; the caller then tries
    again, and at last under a lock.
    """

    def __init__(self, files: FileManager, serializer: JSONSerializer) -> None:
        self._files = files
        self._serializer = serializer
        self._tails: dict[FeedPosition, _Tail] = {}
        self._begins: tuple[Path, int, list[int]] | None = None
        """Path and inode of a file of merged journals, and where each of them begins."""
        self._cut: _Commit | None = None
        """The commit within which a batch ended, so that it is not parsed again for the next one."""

    def may_go_on(self, positions: Iterable[str]) -> bool:
        """Whether changes may have been committed after one of the positions."""
        return any(self._may_go_on(each) for each in positions)

    def _may_go_on(self, text: str) -> bool:
        match = _TEXT.fullmatch(text)
        place = None if match is None else _place(match)
        tail = None if place is None or place.done is not None else self._tails.get(place.position)
        if tail is None:
            return True
        generation = tail.record.generation
        try:
            status = os.stat(self._files.journal_path(generation))  # noqa: PTH116  # polled
        except OSError:
            return True
        if (status.st_size, status.st_ino) != (tail.size, tail.inode):
            return True
        return os.path.exists(self._files.journal_path(generation + 1))  # noqa: PTH110

    def _remember(self, position: FeedPosition, tail: _Tail) -> None:
        self._tails.pop(position, None)
        self._tails[position] = tail
        if len(self._tails) > _MAX_TAILS:
            del self._tails[next(iter(self._tails))]

    # -- changes -----------------------------------------------------------------------------

    async def read(self, collection: Collection, store: str, since: str, limit: int) -> FeedBatch:
        """The changes after a position; see `Engine.read_feed`.

        Args:
            store: the random name of the store.
        """
        feed = _feed_name(store, collection.name)
        match = _TEXT.fullmatch(since)
        if match is None or match[1] != feed:
            raise _invalid(collection)
        start = place = after = _place(match)
        batch = _Batch(self._serializer, collection, feed, limit)
        cut = self._cut
        if (
            start.done is not None
            and cut is not None
            and cut[:2] == (collection.name, start.position)
        ):
            place = await batch.add(cut, start.done)
            after = _Place(start.position)
        async with aclosing(self._records(after)) as records:
            while not batch.is_full and (record := await anext(records, None)) is not None:
                position, entry = record
                cut = _Commit(collection.name, position, await _changes(collection.name, entry))
                done = after.done or 0 if position == after.position else 0
                place = await batch.add(cut, done)
        self._cut = None if place.done is None else cut
        return FeedBatch(batch.entries, since if place == start else place.text(feed))

    async def _records(self, place: _Place) -> AsyncGenerator[tuple[FeedPosition, Entry], None]:
        """The commits with changes after a place; if it is within a commit, that commit is the first."""
        position = place.position
        reached: _Reached | None = self._start(place)
        while reached is not None:
            with self._opened(reached.record.generation) as journal:
                begin = journal.begin + reached.end
                entries = scan_file(journal.fd, journal.path, journal.end, begin, reached.sequence)
                async with aclosing(entries):
                    async for entry, end in entries:
                        reached = reached.following(entry, end - journal.begin)
                        if entry.before:
                            position = reached.record
                            yield position, entry
            if reached.kind != Kind.SEAL and journal.ended:
                raise feed_expired()  # its last records were lost
            tail = _Tail(reached.record, journal.end, journal.inode)
            reached = (
                self._next(position, journal.generation) if reached.kind == Kind.SEAL else None
            )
        self._remember(position, tail)

    def _start(self, place: _Place) -> _Reached:
        """Where to read on."""
        position = place.position
        if place.done is not None:
            found = self._reached(position)
            if found is not None and found.kind == Kind.FED_COMMIT:
                return found._replace(end=position.offset, sequence=found.sequence - 1)
            raise feed_expired()
        tail = self._tails.get(position)
        found = None if tail is None else self._reached(tail.record, tail.inode)
        if found is None:
            # Without reading all that lies between, if nothing was changed.
            newest = self._files.journals()[-1:]
            found = self._continuing(newest[0], position) if newest else None
        found = found or self._reached(position) or self._next(position, position.generation)
        if found is None:
            raise feed_expired()
        return found

    def _reached(self, record: FeedPosition, inode: int | None = None) -> _Reached | None:
        """A record; None if it is not there any more.

        Args:
            inode: of its file, for a record whose checksum another one may have.
        """
        with suppress(FeedExpiredError), self._opened(record.generation) as journal:
            found = journal.header(record.offset)
            is_same = inode in (None, journal.inode)
            if found is not None and found.check == record.check and is_same:
                return _Reached.of(record, found)
        return None

    def _continuing(self, generation: int, position: FeedPosition) -> _Reached | None:
        """The HEAD of a generation; None if changes were made between the position and it."""
        with suppress(FeedExpiredError), self._opened(generation) as journal:
            found = journal.head()
            if found is not None and found[0].last == position:
                return _Reached.of(FeedPosition(generation, 0, found[1].check), found[1])
        return None

    def _next(self, position: FeedPosition, generation: int) -> _Reached | None:
        """The HEAD of the next generation after this one; None if it does not exist yet.

        Args:
            position: the last one before it.

        Raises:
            FeedExpiredError: changes that followed the position are missing.
        """
        for _ in range(_TRIES):
            following = self._files.following_journal(generation)
            if following is None:
                return None
            found = self._continuing(following, position)
            if found is not None:
                return found
        raise feed_expired()

    # -- journals ----------------------------------------------------------------------------

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

    async def add(self, commit: _Commit, done: int) -> _Place:
        """Add the changes of a commit after the first `done`; returns the place after the last one that
        was added."""
        count = len(commit.changes)
        if done > count:
            raise _invalid(self._collection)
        for number, change in enumerate(commit.changes[done:], done + 1):
            place = _Place(commit.position, None if number == count else number)
            self.entries.append(self._entry(change, place))
            if self.is_full:
                return place
            if not number % _DECODED:
                await pause()
        return _Place(commit.position)

    def _entry(self, change: _Change, place: _Place) -> FeedEntry:
        key = Key(self._collection.name, change.id)
        return FeedEntry(
            key,
            None if change.before is None else self._before(key, change.before),
            None if change.after is None else self._record(key, change.after),
            place.text(self._feed),
        )

    def _record(self, key: Key, stored: bytes) -> Record:
        return Record(key, self._serializer.entity(self._collection, key.id, stored))

    def _before(self, key: Key, stored: bytes) -> Record:
        try:
            return self._record(key, stored)
        except CorruptionError:
            # It was damaged, and was replaced or deleted, which is possible without an expected version.
            return Record(key, {self._collection.key: key.id, VERSION: 0})


async def _changes(collection: str, entry: Entry) -> list[_Change]:
    """The changes of a collection in a commit."""
    before = await images_in(entry.before)
    if collection not in before:
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


def _place(match: re.Match[str]) -> _Place:
    position = FeedPosition(int(match[2]), int(match[3]), int(match[4], 16))
    return _Place(position, None if match[5] is None else int(match[5]))


def position_text(position: FeedPosition, store: str, collection: str) -> str:
    """A position of the store as a position in the feed of a collection.

    Args:
        store: the random name of the store.
    """
    return _Place(position).text(_feed_name(store, collection))


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
