"""The portable backup file: the same bytes for the same entities, whatever engine holds them.

A gzip file of JSON lines, so that `zcat` shows it. By line:

    {"format": "hf_async_store backup", "format_version": 1, "collections": [...]}   the schema, counts
    "templates"                    a text begins a collection, parents before children
    {"template_id": "t-1", ...}    an entity: by id, the keys of every map sorted
    ["end", {...}]                 the digest of each collection, and of these and the header

There is no time and no engine in it. The header is a gzip member of its own, uncompressed and of a
length that is known before the counts are: it is written last, in its place.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import zlib
from collections.abc import AsyncGenerator, Callable, Container, Mapping, Sequence
from contextlib import aclosing, suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import msgspec

from hf_async_store.driver import iter_json
from hf_async_store.errors import CorruptionError, InvalidInputError
from hf_async_store.migration.digest import Digest
from hf_async_store.os_errors import translate_os_error
from hf_async_store.query import build_query
from hf_async_store.schema import Collection, Schema
from hf_async_store.values import INT_MAX, MAX_ENTITY_BYTES, Entity

if TYPE_CHECKING:
    from hf_async_store.driver import Reader

FORMAT: Final = "hf_async_store backup"
FORMAT_VERSION: Final = 1
_GZIP: Final = 31
_MAGIC: Final = b"\x1f\x8b"
_LEVEL: Final = 6
_CHUNK_SIZE: Final = 1 << 19
"""How much text is compressed, or unpacked, in one go."""

_READ: Final = 1 << 18

_LONGEST_LINE: Final = 8 << 20
"""More than any header: a line of more is none of ours."""

_LONGEST_ENTITY: Final = 8 * MAX_ENTITY_BYTES
"""In JSON: a byte of a text may take six there."""

_WAY_BACK: Final = "Take another backup"


class Section(msgspec.Struct, frozen=True):
    """A collection in the header of a backup."""

    name: str
    key: str
    count: int
    fields: dict[str, str]
    indexes: list[str]


class Header(msgspec.Struct, frozen=True):
    """The first line of a backup."""

    format: str
    format_version: int
    collections: list[Section]


class End(msgspec.Struct, frozen=True):
    """What the last line holds: digests by collection, and one of these and the header."""

    collections: dict[str, str]
    file: str


# -- writing --------------------------------------------------------------------------------


async def write_portable(
    path: Path, reader: Reader, schema: Mapping[str, Collection], *, sort: bool
) -> dict[str, Digest]:
    """Write what `reader` shows to a new file, whole or not at all; the digests by collection.

    Args:
        sort: the reader does not give entities by id of itself.

    Raises:
        InvalidInputError: there is such a file.
        DiskFullError, PermissionDeniedError, ReadOnlyStoreError, UnavailableError.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
        try:
            digests = await _Writing(temporary, schema).write(reader, sort=sort)
            await asyncio.to_thread(_put_in_place, temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except FileExistsError as exc:
        raise InvalidInputError(f"{path} is there already; a backup needs a new name") from exc
    except OSError as exc:
        raise translate_os_error(exc, f"write the backup {path}") from exc
    return digests


def _put_in_place(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        # A file system without links: nothing better than to look first.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from exc
        temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Writing:
    """One file being written. Text is compressed in a thread while the next piece is made."""

    def __init__(self, path: Path, schema: Mapping[str, Collection]) -> None:
        self._path = path
        self._schema = schema
        self._compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
        self._lines: list[bytes] = []
        self._size = 0
        self._pending: asyncio.Task[None] | None = None

    async def write(self, reader: Reader, *, sort: bool) -> dict[str, Digest]:
        import aiofiles

        digests = {name: Digest() for name in self._schema}
        room = self._header(dict.fromkeys(self._schema, INT_MAX))
        async with aiofiles.open(
            self._path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)
        ) as self._file:
            try:
                await self._file.write(_stored(room))
                for name in self._schema:
                    await self._section(name, reader, digests[name], sort=sort)
                header = self._header({name: each.count for name, each in digests.items()})
                header = header[:-1].ljust(len(room) - 1) + b"\n"
                await self._end(digests, header)
                await self._file.seek(0)
                await self._file.write(_stored(header))
                await self._file.flush()
                await asyncio.to_thread(os.fsync, self._file.fileno())
            finally:
                if self._pending is not None:
                    self._pending.cancel()
                    await asyncio.wait([self._pending])
        return digests

    def _header(self, counts: Mapping[str, int]) -> bytes:
        sections = [_section_of(each, counts[name]) for name, each in self._schema.items()]
        return msgspec.json.encode(Header(FORMAT, FORMAT_VERSION, sections)) + b"\n"

    async def _section(self, name: str, reader: Reader, digest: Digest, *, sort: bool) -> None:
        declared = self._schema[name]
        query = build_query(declared, order_by=declared.key if sort else None)
        self._lines.append(msgspec.json.encode(name))
        async with aclosing(iter_json(reader, query)) as pieces:
            async for texts in pieces:
                digest.add_all(texts)
                self._lines += texts
                self._size += sum(map(len, texts))
                if self._size >= _CHUNK_SIZE:
                    await self._flush()

    async def _end(self, digests: Mapping[str, Digest], header: bytes) -> None:
        await self._flush()
        await self._settle()
        end = End({name: str(each) for name, each in digests.items()}, _sealed(header, digests))
        last = self._compressor.compress(msgspec.json.encode(["end", end]) + b"\n")
        await self._file.write(last + self._compressor.flush())

    async def _flush(self) -> None:
        """Hand what was gathered to the compressor, once it is done with the piece before."""
        self._lines.append(b"")
        text = b"\n".join(self._lines)
        self._lines.clear()
        self._size = 0
        await self._settle()
        begun = asyncio.Event()
        self._pending = asyncio.create_task(self._put(text, begun))
        # A thread that wants to begin may wait for its turn for as long as this one is busy. So
        # it is let begin; the compressor then needs no turn.
        await begun.wait()

    async def _settle(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            await pending

    async def _put(self, text: bytes, begun: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        try:
            packed = await asyncio.to_thread(
                self._compressed, text, lambda: loop.call_soon_threadsafe(begun.set)
            )
        finally:
            begun.set()
        await self._file.write(packed)

    def _compressed(self, text: bytes, begin: Callable[[], object]) -> bytes:
        begin()
        return self._compressor.compress(text)


def _section_of(collection: Collection, count: int) -> Section:
    fields = {
        name: field.type + (f" -> {field.references}" if field.references else "")
        for name, field in collection.fields.items()
    }
    return Section(
        collection.name, collection.key, count, fields, [each.name for each in collection.indexes]
    )


def _stored(line: bytes) -> bytes:
    """A gzip member whose length depends on that of the line alone."""
    compressor = zlib.compressobj(0, zlib.DEFLATED, _GZIP)
    return compressor.compress(line) + compressor.flush()


def _sealed(header: bytes, digests: Mapping[str, Digest]) -> str:
    texts = "".join(f"{name} {each.count} {each}\n" for name, each in digests.items())
    return "blake2b:" + blake2b(header + texts.encode(), digest_size=32).hexdigest()


# -- reading --------------------------------------------------------------------------------


def is_portable(path: Path) -> bool:
    """Whether a file begins as a portable backup does."""
    try:
        if not path.is_file():
            return False  # a pipe would be waited for
        with path.open("rb") as file:
            begin = file.read(512)
        if not begin.startswith(_MAGIC):
            return False
        text = zlib.decompressobj(_GZIP).decompress(begin)
    except (OSError, zlib.error):
        return False
    return text.startswith(b'{"format":"' + FORMAT.encode() + b'"')


async def read_header(path: Path) -> Header:
    """The header of a backup, which says what is in it; the rest is not looked at.

    Raises:
        InvalidInputError: it is no portable backup.
        CorruptionError: it is damaged.
    """
    async with aclosing(_pieces(path)) as pieces:
        async for lines in pieces:
            return _header_in(lines[0], path)
    raise damaged(path, "it is empty")


async def read_portable(path: Path) -> AsyncGenerator[tuple[str, list[Entity]], None]:
    """The entities of a backup in pieces of one collection, as they are there.

    `check_portable` is what proves them; here only what cannot be read is refused.
    """
    reading = Reading(path)
    async with aclosing(reading.sections()) as sections:
        async for name, texts in sections:
            yield name, reading.entities(name, texts)


class Reading:
    """One pass over a backup.

    Attributes:
        digests: by collection, of what `add` was told of.
        header: None before the first line was read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header = b""
        self._counts: dict[str, int] = {}
        self._end: End | None = None
        self._read: dict[str, int] = {}
        self.digests: dict[str, Digest] = {}
        self.header: Header | None = None

    async def sections(self) -> AsyncGenerator[tuple[str, list[bytes]], None]:
        """The lines of entities, in pieces of one collection."""
        name: str | None = None
        async with aclosing(_pieces(self._path)) as pieces:
            async for lines in pieces:
                begin = 0
                if not self._header:
                    self._take_header(lines[0])
                    begin = 1
                for number in range(begin, len(lines)):
                    line = lines[number]
                    if line.startswith(b"{"):
                        continue
                    if number > begin:
                        yield self._named(name), lines[begin:number]
                    begin = number + 1
                    self._refuse_after_end()
                    if line.startswith(b"["):
                        self._end = self._end_in(line)
                    else:
                        name = self._section_in(line)
                if begin < len(lines):
                    yield self._named(name), lines[begin:]

    def entities(self, name: str, texts: Sequence[bytes]) -> list[Entity]:
        """What these lines hold, which are the next of their collection.

        Raises:
            CorruptionError: naming the first that cannot be read.
        """
        before = self._read.get(name, 0)
        self._read[name] = before + len(texts)
        return [self._entity(name, number, text) for number, text in enumerate(texts, before + 1)]

    def _entity(self, name: str, number: int, text: bytes) -> Entity:
        if len(text) > _LONGEST_ENTITY:
            raise damaged(self._path, f"entity {number:,} of {name} is longer than any can be")
        try:
            return cast("Entity", _decode(text))
        except RecursionError as exc:
            raise damaged(self._path, f"entity {number:,} of {name} is nested too deep") from exc
        except ValueError as exc:  # as what msgspec raises is
            raise damaged(self._path, f"entity {number:,} of {name} is no JSON: {exc}") from exc

    def prove(self) -> None:
        """Refuse a file that is not as it was written; once all was read, and counted."""
        if self._end is None:
            raise damaged(self._path, "it is truncated: its end is missing")
        found = {name: str(each) for name, each in self.digests.items()}
        counts = {name: each.count for name, each in self.digests.items()}
        if (
            self._end.file != _sealed(self._header, self.digests)
            or self._end.collections != found
            or counts != self._counts
        ):
            raise damaged(self._path, "it was altered: its digest is another")

    def _take_header(self, line: bytes) -> None:
        header = _header_in(line, self._path)
        self.header = header
        self._header = line + b"\n"
        self._counts = {each.name: each.count for each in header.collections}
        if len(self._counts) < len(header.collections):
            raise damaged(self._path, "its header names a collection twice")
        self.digests = {each: Digest() for each in self._counts}

    def _refuse_after_end(self) -> None:
        if self._end is not None:
            raise damaged(self._path, "it was altered: something stands behind its end")

    def _named(self, name: str | None) -> str:
        self._refuse_after_end()
        if name is None:
            raise damaged(self._path, "it was altered: an entity belongs to no collection")
        return name

    def _section_in(self, line: bytes) -> str:
        try:
            name = msgspec.json.decode(line, type=str)
        except (ValueError, RecursionError) as exc:
            raise damaged(self._path, "a line is neither a collection nor an entity") from exc
        if name not in self._counts:
            raise damaged(self._path, f"its header does not know the collection {name!r}")
        return name

    def _end_in(self, line: bytes) -> End:
        try:
            return msgspec.json.decode(line, type=tuple[str, End])[1]
        except (ValueError, RecursionError) as exc:
            raise damaged(self._path, "its last line cannot be read") from exc


def _header_in(line: bytes, path: Path) -> Header:
    try:
        header = msgspec.json.decode(line, type=Header)
    except (ValueError, RecursionError) as exc:
        raise InvalidInputError(f"{path} is no portable backup") from exc
    if header.format != FORMAT:
        raise InvalidInputError(f"{path} is no portable backup")
    if header.format_version != FORMAT_VERSION:
        raise InvalidInputError(
            f"{path} is a backup of format {header.format_version}, which is not known here"
        )
    return header


async def _pieces(path: Path) -> AsyncGenerator[list[bytes], None]:
    """The lines of a backup, in pieces, without their ends."""
    import aiofiles

    unpacking = _Unpacking(path)
    rest = b""
    try:
        if not stat.S_ISREG((await asyncio.to_thread(path.stat)).st_mode):
            raise InvalidInputError(f"{path} is no file, so it is no portable backup")
        async with aiofiles.open(path, "rb") as file:
            while data := await file.read(_READ):
                while data:
                    text, data = await asyncio.to_thread(unpacking.step, data)
                    lines = (rest + text).split(b"\n")
                    rest = lines.pop()
                    if len(rest) > _LONGEST_LINE:
                        raise damaged(path, "a line of it does not end")
                    if lines:
                        yield lines
    except OSError as exc:
        raise translate_os_error(exc, f"read the backup {path}") from exc
    unpacking.finish(rest)


_decode: Final = msgspec.json.Decoder().decode


class _Unpacking:
    """The text of a gzip file of two members."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_second = False
        self._unpack = zlib.decompressobj(_GZIP)
        self._began = False

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        """Some text, and what is left of the data."""
        if self._unpack.eof:
            if self._is_second:
                raise damaged(self._path, "it was altered: something stands behind its end")
            self._is_second = True
            self._unpack = zlib.decompressobj(_GZIP)
        try:
            text = self._unpack.decompress(data, _CHUNK_SIZE)
            left = self._unpack.unconsumed_tail or self._unpack.unused_data
            if not left and not self._unpack.eof:
                # What did not fit into the text, without any data of its own.
                text += self._unpack.decompress(b"")
        except zlib.error as exc:
            if not (self._began or data.startswith(_MAGIC)):
                raise InvalidInputError(f"{self._path} is no portable backup") from exc
            raise damaged(self._path, f"its bytes are damaged ({exc})") from exc
        self._began = True
        return text, left

    def finish(self, rest: bytes) -> None:
        if not self._unpack.eof or not self._is_second or rest:
            raise damaged(self._path, "it is truncated")


def damaged(path: Path, why: str) -> CorruptionError:
    """The error of a backup that is not as it was written, or that nobody can restore."""
    return CorruptionError(f"{path} is not a valid backup: {why}. {_WAY_BACK}")


def refuse_other_schema(
    header: Header, schema: Schema, path: Path, leave_out: Container[str] = ()
) -> None:
    """Refuse a backup with entities of collections that are not declared, or under another key.

    Args:
        leave_out: collections of it that need not be declared.

    Raises:
        InvalidInputError.
    """
    for each in header.collections:
        if each.name not in schema:
            if each.count and each.name not in leave_out:
                raise InvalidInputError(
                    f"{path} holds {each.count:,} entities of {each.name!r}, which is not declared; "
                    "declare it (--collections MODULE:NAME on the command line), or say that it is "
                    "not restored (leave_out, or --leave-out NAME)"
                )
        elif schema[each.name].key != each.key:
            raise InvalidInputError(
                f"{path} keeps the id of {each.name} in {each.key!r}, not in "
                f"{schema[each.name].key!r}"
            )
