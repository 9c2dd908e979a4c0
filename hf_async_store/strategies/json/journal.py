"""The journal: the format of its records, and how they are read.

A journal file is a sequence of records. Each has a header of 28 bytes (big endian) and a payload
of JSON (except in a FED_COMMIT):

    magic "HFJ1" | kind u8 | 3 zero bytes | payload length u32 | payload CRC u32
    | sequence u64 | header CRC u32

The first record is the HEAD. It names the generation and the data files to which the journal belongs.
A COMMIT contains full post-images, so replaying it twice, or over a file that already contains it, is
harmless. A FED_COMMIT also contains the pre-images of collections with a change feed: its payload begins
with 8 random bytes, by which no other record has the same checksum, and the length of the post-images;
both parts have the form of a COMMIT. A SEAL ends a generation. A FOLD names the data files that contain
everything before its own generation; a compaction writes it.

Header and payload have separate checksums. An incomplete last record is the effect of an interrupted
append, and is distinguished from damage: any other invalid record is corruption.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import islice
from typing import Final, NamedTuple, TypeAlias, TypeVar
from zlib import crc32

import msgspec

from hf_async_store.errors import CorruptionError, NewerFormatError
from hf_async_store.strategies.json.serializer import encode_json, section_lines

_FAMILY: Final = b"HFJ"
_MAGIC: Final = _FAMILY + b"1"
_HEADER: Final = struct.Struct(">4sB3xIIQ")
_CHECK: Final = struct.Struct(">I")
_CHECKED_HEADER: Final = struct.Struct(_HEADER.format + _CHECK.format[1:])
_FED_COMMIT: Final = struct.Struct(">8sI")
HEADER_SIZE: Final = _CHECKED_HEADER.size

USE_FILES: Final = (
    "Restore a backup (`hf-async-store restore`), or use the data files without the journal: "
    "`hf-async-store checkpoint --recover-from file` (all commits since the last compaction are then "
    "lost; copy the folder first)"
)
USE_UNDAMAGED: Final = (
    "Restore a backup (`hf-async-store restore`), or continue with the undamaged part: `hf-async-store "
    "checkpoint --recover-from salvage`"
)

Images: TypeAlias = Mapping[str, Mapping[str, bytes | None]]
"""Post-images by collection and id: the stored bytes, None for a deleted entity."""


class Kind(IntEnum):
    HEAD = 1
    COMMIT = 2
    SEAL = 3
    FOLD = 4
    FED_COMMIT = 5


COMMITS: Final = frozenset({Kind.COMMIT, Kind.FED_COMMIT})


class FileState(msgspec.Struct, frozen=True):
    """One known content of a data file.

    Attributes:
        digest: SHA-256 of the file on disk, hexadecimal; None: there is no file.
        covers: the first generation that the file does not contain.
        ours: this package wrote it, so an entity that begins with `version` is in canonical form.
        collection: the collection of the file; None for a file of several collections.
        key: the key field of that collection, for processes that do not declare it.
        size, mtime_ns, inode: its signature, if known, by which a replacement is detected without
            reading the file.
        wrapped: the file of one collection has a member with the name of the collection, and the
            entities are in it.
    """

    digest: str | None
    covers: int
    ours: bool
    collection: str | None = None
    size: int = -1
    mtime_ns: int = -1
    inode: int = -1
    wrapped: bool = False
    key: str = ""

    def covering(self, generation: int) -> FileState:
        """The same content, complete up to the beginning of `generation`."""
        return FileState(
            self.digest, generation, self.ours, self.collection, wrapped=self.wrapped, key=self.key
        )


class FeedPosition(NamedTuple):
    """A record with changes: a FED_COMMIT, or the HEAD with which the feed began.

    Attributes:
        offset: of the record, from the beginning of its journal.
        check: the checksum of its header.
    """

    generation: int
    offset: int
    check: int


class Head(msgspec.Struct, frozen=True, omit_defaults=True):
    """The first record of a generation.

    Attributes:
        files: the data files by name, as they were when the generation began.
        alone: journals before this generation are ignored: `checkpoint --recover-from` wrote this one.
        feed: a random text, if the store has a change feed. By it, no other HEAD has the same checksum.
        last: the last position of the feed before this generation; None if the feed begins here.
    """

    generation: int
    files: dict[str, FileState]
    alone: bool = False
    feed: str = ""
    last: FeedPosition | None = None

    def position(self, check: int) -> FeedPosition | None:
        """The position of the feed at the beginning of this generation; None if the store has no feed.

        Args:
            check: the checksum of the header of this record.
        """
        return (self.last or FeedPosition(self.generation, 0, check)) if self.feed else None


class Fold(msgspec.Struct, frozen=True):
    """The data files that contain everything before this generation, once they are in place."""

    files: dict[str, FileState]


class Seal(msgspec.Struct, frozen=True):
    """The end of a generation; `next` is the number of the following one."""

    next: int


class Entry(msgspec.Struct, frozen=True):
    """A record that was read.

    Attributes:
        kind: a FED_COMMIT is read as a COMMIT that has `before`.
        chunks: its payload. A large payload has several chunks, so that 30 MB are never copied, or
            freed, in one step.
        size: the size of the payload.
        before: the pre-images of a FED_COMMIT, in chunks.
        check: the checksum of its header.
    """

    kind: Kind
    chunks: list[bytes]
    size: int
    before: list[bytes]
    check: int

    @property
    def payload(self) -> bytes:
        return b"".join(self.chunks)


_KINDS: Final = {int(each): each for each in Kind}
_CHUNK_SIZE: Final = 256

_TYPES: Final = {Kind.HEAD: Head, Kind.FOLD: Fold, Kind.SEAL: Seal}
_commit_decoder: Final = msgspec.json.Decoder(dict[str, dict[str, msgspec.Raw]])
_ENTITY: Final = b'{"version":'

Body = TypeVar("Body")


def record(kind: Kind, payload: bytes, sequence: int) -> bytes:
    """The bytes of a record, ready to be appended."""
    return header(kind, [payload], len(payload), sequence) + payload


def header(kind: Kind, payload: Sequence[bytes], size: int, sequence: int) -> bytes:
    """The header of a record, whose payload of this size may have several chunks."""
    fields = _HEADER.pack(_MAGIC, kind, size, _checksum(payload), sequence)
    return fields + _CHECK.pack(crc32(fields))


def header_check(data: bytes) -> int:
    """The checksum of the header with which a record begins."""
    (check,) = _CHECK.unpack_from(data, _HEADER.size)
    return int(check)


def _checksum(chunks: Iterable[bytes]) -> int:
    checksum = 0
    for chunk in chunks:
        checksum = crc32(chunk, checksum)
    return checksum


def control(body: Head | Fold | Seal) -> tuple[Kind, bytes]:
    """Kind and payload of a record other than a commit."""
    kind = next(kind for kind, type_ in _TYPES.items() if isinstance(body, type_))
    return kind, encode_json(body)


def commit_payload(images: Images) -> Iterator[bytes]:
    """The payload of a COMMIT in chunks, so that control can return to the event loop in between.

    There is one entity per line, so that a large payload can also be read in chunks.
    """
    start = b"{"
    for name, section in images.items():
        start += encode_json(name) + b":{\n"
        names, entities = iter(section), iter(section.values())
        while ids := list(islice(names, _CHUNK_SIZE)):
            texts = [b"null" if e is None else e for e in islice(entities, len(ids))]
            yield section_lines(ids, texts, start)
            start = b",\n"
        start = b"\n}," if section else start + b"\n},"
    yield start[:-1] + b"}"


def fed_payload(payload: Sequence[bytes], before: Images) -> Iterator[bytes]:
    """The payload of a FED_COMMIT in chunks.

    Args:
        payload: that of a COMMIT with the same post-images.
        before: the pre-images, with at least one collection.
    """
    yield _FED_COMMIT.pack(os.urandom(8), sum(map(len, payload)))
    yield from payload
    yield from commit_payload(before)


def read_commit(payload: bytes) -> dict[str, dict[str, bytes | None]]:
    """The post-images in the payload of a COMMIT."""
    # Without a call for each entity: other processes wait for the lock meanwhile.
    return {
        name: {
            entity_id: raw if (raw := bytes(each)).startswith(_ENTITY) else image(raw)
            for entity_id, each in section.items()
        }
        for name, section in _read(_commit_decoder, payload).items()
    }


def image(encoded: bytes) -> bytes | None:
    """The post-image of an entity in a COMMIT; None for a deleted entity."""
    if encoded == b"null":
        return None
    if not encoded.startswith(_ENTITY):
        raise CorruptionError(
            "a commit contains an entity in a form that this store does not write"
        )
    return encoded


Naming = TypeVar("Naming", Head, Fold)


def read_naming(kind: type[Naming], payload: bytes, name: str = "the journal") -> Naming:
    """Read a record that names data files. These files are read and replaced, so they must be in the
    folder of the journal.

    Args:
        name: the path of the journal, for error messages.
    """
    try:
        body = _read(msgspec.json.Decoder(kind), payload)
    except CorruptionError as exc:
        raise CorruptionError(f"{name}: {exc}. {USE_UNDAMAGED}") from exc
    for each in body.files:
        if each in ("", ".", "..") or "/" in each or "\0" in each:
            raise CorruptionError(
                f"a record of {name} names the file {each!r}, which is not in the folder of the "
                "journal: this store did not write the record. Restore a backup "
                "(`hf-async-store restore`)"
            )
    return body


def _read(decoder: msgspec.json.Decoder[Body], payload: bytes) -> Body:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        # The checksum is valid, so the record was written in this form.
        raise CorruptionError(
            f"a record of the journal cannot be decoded, although its checksum is valid: {exc}"
        ) from exc


class _Chunks:
    """The content of a journal in chunks; `offset` is the position in the file up to which it was read."""

    def __init__(self, chunks: Iterable[bytes], offset: int) -> None:
        self.offset = offset
        self._remaining = iter(chunks)
        self._data = b""
        self._position = 0

    def read(self, size: int) -> list[bytes]:
        """The next bytes in chunks; fewer at the end of the file."""
        within = self._position + size
        if within <= len(self._data):
            found = [self._data[self._position : within]]
            self._position = within
            self.offset += size
            return found
        found = []
        end = self.offset + size
        while self.offset < end:
            if self._position == len(self._data):
                self._data, self._position = next(self._remaining, b""), 0
                if not self._data:
                    break
            chunk = self._data[self._position : self._position + end - self.offset]
            found.append(chunk)
            self._position += len(chunk)
            self.offset += len(chunk)
        return found


class RecordHeader(msgspec.Struct, frozen=True):
    """The header of a record.

    Attributes:
        check: its own checksum.
    """

    kind: int
    length: int
    payload_crc: int
    sequence: int
    check: int


def read_header(data: bytes, name: str, offset: int) -> RecordHeader:
    """Read the header of the record at an offset of a file.

    Raises:
        CorruptionError: it is damaged.
        NewerFormatError: a newer release wrote it.
    """
    magic, kind, length, payload_crc, number, check = _CHECKED_HEADER.unpack_from(data)
    is_valid = check == crc32(data[: _HEADER.size])
    if is_valid and magic != _MAGIC and magic.startswith(_FAMILY):
        raise _newer(name, offset)
    if magic != _MAGIC or not is_valid:
        raise _damaged(name, offset, "the header of a record is damaged")
    return RecordHeader(kind, length, payload_crc, number, check)


def scan(
    chunks: Iterable[bytes], name: str, offset: int, sequence: int
) -> Iterator[tuple[Entry, int]]:
    """The records in `chunks`, each with the offset of its end.

    Stops before an incomplete last record, which the caller detects by the last offset.

    Args:
        chunks: the content of the file from `offset` on, in chunks.
        name: the path of the file, for error messages.
        offset: the position of the first chunk in the file.
        sequence: the sequence number that the first record must have.

    Raises:
        CorruptionError: a record is damaged.
        NewerFormatError: a newer release wrote a record.
    """
    data = _Chunks(chunks, offset)
    while len(start := b"".join(data.read(HEADER_SIZE))) == HEADER_SIZE:
        begin = data.offset - HEADER_SIZE
        found = read_header(start, name, begin)
        payload = data.read(found.length)
        if data.offset < begin + HEADER_SIZE + found.length:
            return
        if found.payload_crc != _checksum(payload):
            raise _damaged(name, begin + HEADER_SIZE, "the payload of a record is damaged")
        if found.sequence != sequence:
            raise _damaged(
                name, begin, f"record {found.sequence} follows, but record {sequence} is expected"
            )
        if found.kind not in _KINDS:
            raise _newer(name, begin)
        sequence += 1
        if found.kind == Kind.FED_COMMIT and found.length < _FED_COMMIT.size:
            raise _damaged(name, begin, "a record is too short, although its checksum is valid")
        yield _entry(found, payload), data.offset
    if not _MAGIC.startswith(start[: len(_MAGIC)]):
        raise _damaged(name, data.offset - len(start), "no record begins here")


def _entry(found: RecordHeader, payload: list[bytes]) -> Entry:
    if found.kind != Kind.FED_COMMIT:
        return Entry(_KINDS[found.kind], payload, found.length, [], found.check)
    size = _FED_COMMIT.size
    _, length = _FED_COMMIT.unpack(b"".join(_cut(payload, 0, size)))
    before = _cut(payload, size + length, found.length)
    return Entry(Kind.COMMIT, _cut(payload, size, size + length), length, before, found.check)


def _cut(chunks: Iterable[bytes], begin: int, end: int) -> list[bytes]:
    """A part of chunks, in chunks."""
    found = []
    position = 0
    for chunk in chunks:
        part = chunk[max(begin - position, 0) : max(end - position, 0)]
        if part:
            found.append(part)
        position += len(chunk)
    return found


def _newer(name: str, offset: int) -> NewerFormatError:
    return NewerFormatError(
        f"{name} at byte {offset}: a newer release of hf_async_store wrote this record. Nothing was "
        "changed. Update hf_async_store on this machine"
    )


def _damaged(name: str, offset: int, what: str) -> CorruptionError:
    return CorruptionError(
        f"{name} at byte {offset}: {what}. Nothing was changed. {USE_UNDAMAGED} (the data file and "
        "every commit before this position), or `--recover-from file` (the data file alone; all commits "
        "since the last compaction are then lost). Copy the folder first"
    )
