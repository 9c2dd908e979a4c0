"""The journal: what a commit appends, and how it is read back.

A journal file is a sequence of records. Each has a header of 28 bytes (big endian) and a payload
of JSON:

    magic "HFJ1" | kind u8 | 3 zero bytes | payload length u32 | payload CRC u32
    | sequence u64 | header CRC u32

The first record is the HEAD; it names the generation and the data files that the journal belongs
to. A COMMIT holds full post-images, so replaying one twice, or over a file that has it already, is
harmless. A SEAL ends a generation, and a FOLD names the data files that hold everything before its own
generation.

Header and payload have checksums of their own. So an incomplete last record, the one trace that an
interrupted append leaves, is distinguished from damage: everything else that is bad is corruption.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import islice
from typing import Final, TypeAlias, TypeVar
from zlib import crc32

import msgspec

from hf_async_store.errors import CorruptionError, NewerFormatError

_FAMILY: Final = b"HFJ"
_MAGIC: Final = _FAMILY + b"1"
_HEADER: Final = struct.Struct(">4sB3xIIQ")
_CHECK: Final = struct.Struct(">I")
HEADER_SIZE: Final = _HEADER.size + _CHECK.size

Images: TypeAlias = Mapping[str, Mapping[str, bytes | None]]
"""Post-images by collection and id: the stored bytes, None for what is gone."""


class Kind(IntEnum):
    HEAD = 1
    COMMIT = 2
    SEAL = 3
    FOLD = 4


class FileState(msgspec.Struct, frozen=True):
    """One known content of a data file.

    Attributes:
        digest: SHA-256 of the file as it lies on disk, hexadecimal; None: there is no file.
        covers: the first generation that is not in it.
        ours: this package wrote it, so its bytes need no checking again.
        collection: whose file it is, None for a file of several.
        size, mtime_ns, inode: how `stat` shows it, where known; tells a replacement at a glance.
    """

    digest: str | None
    covers: int
    ours: bool
    collection: str | None = None
    size: int = -1
    mtime_ns: int = -1
    inode: int = -1


class Head(msgspec.Struct, frozen=True):
    """The first record of a generation.

    Attributes:
        files: by name, as they were when it began.
        alone: nothing before this generation counts: the operator settled what does.
    """

    generation: int
    files: dict[str, FileState]
    alone: bool = False


class Fold(msgspec.Struct, frozen=True):
    """These files, once they are in place, hold everything before this generation."""

    files: dict[str, FileState]


class Seal(msgspec.Struct, frozen=True):
    """No more commits here; `next` is the generation that goes on."""

    next: int


class Entry(msgspec.Struct, frozen=True):
    """A record as it was read.

    Attributes:
        pieces: its payload, a large one in several: nothing of 30 MB is ever copied, or freed, in
            one step.
    """

    kind: Kind
    pieces: list[bytes]

    @property
    def payload(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def size(self) -> int:
        return sum(map(len, self.pieces))


_KINDS: Final = frozenset(Kind)
_CHUNK_SIZE: Final = 1024

_TYPES: Final = {Kind.HEAD: Head, Kind.FOLD: Fold, Kind.SEAL: Seal}
_encode = msgspec.json.Encoder().encode
_commit_decoder: Final = msgspec.json.Decoder(dict[str, dict[str, msgspec.Raw]])
_head_decoder: Final = msgspec.json.Decoder(Head)
_fold_decoder: Final = msgspec.json.Decoder(Fold)
_seal_decoder: Final = msgspec.json.Decoder(Seal)
_ENTITY: Final = b'{"version":'

Body = TypeVar("Body")


def record(kind: Kind, payload: bytes, sequence: int) -> bytes:
    """A whole record, ready to be appended."""
    return header(kind, [payload], sequence) + payload


def header(kind: Kind, payload: Sequence[bytes], sequence: int) -> bytes:
    """What goes before a payload, which may lie in pieces."""
    check = 0
    for piece in payload:
        check = crc32(piece, check)
    own = _HEADER.pack(_MAGIC, kind, sum(map(len, payload)), check, sequence)
    return own + _CHECK.pack(crc32(own))


def control(body: Head | Fold | Seal) -> tuple[Kind, bytes]:
    """Kind and payload of a record other than a commit."""
    kind = next(kind for kind, type_ in _TYPES.items() if isinstance(body, type_))
    return kind, _encode(body)


def commit_text(images: Images) -> Iterator[bytes]:
    """The payload of a COMMIT in pieces, for the loop to have a turn between them.

    One entity a line, so that a large one can be read in pieces, too.
    """
    start = b"{"
    for name, section in images.items():
        yield start + _encode(name) + b":{\n"
        start = b"\n},"
        items = iter(section.items())
        comma = b""
        while part := list(islice(items, _CHUNK_SIZE)):
            yield comma + b",\n".join(
                b"".join((_encode(entity_id), b":", b"null" if raw is None else raw))
                for entity_id, raw in part
            )
            comma = b",\n"
    yield b"\n}}"


def read_commit(payload: bytes) -> dict[str, dict[str, bytes | None]]:
    """The post-images in the payload of a COMMIT."""
    return {
        name: {entity_id: image(bytes(raw)) for entity_id, raw in images.items()}
        for name, images in _read(_commit_decoder, payload).items()
    }


def image(text: bytes) -> bytes | None:
    """An image as it lies in a COMMIT."""
    if text == b"null":
        return None
    if not text.startswith(_ENTITY):
        raise CorruptionError("a journal holds an entity in a form that no commit writes")
    return text


def read_head(payload: bytes) -> Head:
    return _of_this_folder(_read(_head_decoder, payload))


def read_fold(payload: bytes) -> Fold:
    return _of_this_folder(_read(_fold_decoder, payload))


Naming = TypeVar("Naming", Head, Fold)


def _of_this_folder(body: Naming) -> Naming:
    """A record that names files of the store's folder alone: what it names is read, and replaced.

    Raises:
        CorruptionError: one that lies elsewhere.
    """
    for name in body.files:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise CorruptionError(
                f"a record of the journal names the file {name!r}, which is not in its folder; no "
                "store wrote that. Restore a backup"
            )
    return body


def read_seal(payload: bytes) -> Seal:
    return _read(_seal_decoder, payload)


def _read(decoder: msgspec.json.Decoder[Body], payload: bytes) -> Body:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        # Its checksum is right: so somebody wrote it just so.
        raise CorruptionError(f"a journal holds a record that cannot be read: {exc}") from exc


def scan(
    blocks: Iterable[bytes], name: str, offset: int, sequence: int
) -> Iterator[tuple[Entry, int]]:
    """The records in `blocks`, each with the offset of its end.

    Stops before an incomplete last record. The caller tells it by the offset.

    Args:
        blocks: what the file holds from `offset` on, one behind another.
        name: of the file, for errors.
        offset: where they begin in the file.
        sequence: the sequence that its first record must have.

    Raises:
        CorruptionError: a record that is there and not as it was written.
        NewerFormatError: one that this release does not know.
    """
    left = iter(blocks)
    data = b""  # which lies at `offset`
    position = 0
    while True:
        while len(data) - position < HEADER_SIZE:
            more = next(left, b"")
            if not more:
                if not _MAGIC.startswith(data[position : position + len(_MAGIC)]):
                    raise _damaged(name, offset + position, "no record begins here")
                return
            offset += position
            data = data[position:] + more
            position = 0
        header = data[position : position + _HEADER.size]
        magic, kind, length, check, number = _HEADER.unpack(header)
        (own,) = _CHECK.unpack_from(data, position + _HEADER.size)
        if own == crc32(header) and magic != _MAGIC and magic.startswith(_FAMILY):
            raise _newer(name, offset + position)
        if magic != _MAGIC or own != crc32(header):
            raise _damaged(name, offset + position, "the header of a record is damaged")
        begin = offset + position
        start = position + HEADER_SIZE
        pieces = [data[start : start + length]]
        position = start + length
        while position > len(data):
            more = next(left, b"")
            if not more:
                return
            offset += len(data)
            position -= len(data)
            data = more
            pieces.append(data[:position])
        found = 0
        for piece in pieces:
            found = crc32(piece, found)
        if check != found:
            raise _damaged(name, begin + HEADER_SIZE, "the content of a record is damaged")
        if number != sequence:
            raise _damaged(name, begin, f"record {number} stands where {sequence} belongs")
        if kind not in _KINDS:
            raise _newer(name, begin)
        sequence += 1
        yield Entry(Kind(kind), pieces), offset + position


def _newer(name: str, offset: int) -> NewerFormatError:
    return NewerFormatError(
        f"{name} at byte {offset}: a newer release of hf_async_store wrote this. Update this "
        "installation; nothing was changed"
    )


def _damaged(name: str, offset: int, what: str) -> CorruptionError:
    return CorruptionError(
        f"{name} at byte {offset}: {what}. Nothing was changed. Restore a backup "
        "(`hf-async-store restore`), or go on with what can be read: `hf-async-store checkpoint "
        "--recover-from salvage` (the data file and every commit before this place), or "
        "`--recover-from file` (the data file alone, without the journal)"
    )
