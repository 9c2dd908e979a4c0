"""The portable backup file: the same entities give the same bytes, whichever engine stores them.

The file is gzip-compressed JSON lines, so `zcat` shows its content. The lines are:

    {"format": "hf_async_store backup", "format_version": 1, "collections": [...]}   schema, counts
    "templates"                    a string begins a collection; parents come before children
    {"template_id": "t-1", ...}    an entity; sorted by id, with the keys of every object sorted
    ["end", {...}]                 the digest of each collection, and one of these and the header

The file names neither a time nor an engine. The header is a separate gzip member, uncompressed and
of a length that is known before the counts are known. It is overwritten with the counts at the end.
"""

from __future__ import annotations

import asyncio
import errno
import os
import zlib
from collections.abc import AsyncGenerator, Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from hashlib import blake2b
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, BinaryIO, Final

import msgspec

from hf_async_store.declarations import decoded, encoded
from hf_async_store.driver import run_to_completion
from hf_async_store.errors import CorruptionError, InvalidInputError
from hf_async_store.event_loop import in_thread
from hf_async_store.migration.digest import Digest
from hf_async_store.os_errors import translate_os_error
from hf_async_store.query import build_query
from hf_async_store.schema import Collection, Schema
from hf_async_store.values import INT_MAX, MAX_ENTITY_BYTES, Entity, all_canonical

if TYPE_CHECKING:
    from hf_async_store.driver import Reader

FORMAT: Final = "hf_async_store backup"
FORMAT_VERSION: Final = 1
_GZIP: Final = 31
_MAGIC: Final = b"\x1f\x8b"
_LEVEL: Final = 6
_CHUNK_SIZE: Final = 1 << 19
"""Maximum number of uncompressed bytes that are compressed or read at once."""

_MAX_LINE_BYTES: Final = 8 << 20
"""Longer than any header. A file with a longer line is not a portable backup."""

_MAX_ENTITY_JSON_BYTES: Final = 8 * MAX_ENTITY_BYTES
"""One byte of a string may take six bytes in JSON."""

_HINT: Final = "Use another backup"
_AFTER_END: Final = "it was altered: there is data after its last line"


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
    declarations: object = None
    """The declarations of the collections (`declarations.encoded`); None in older backups."""


class End(msgspec.Struct, frozen=True):
    """The content of the last line: a digest of each collection, and one of these and the header."""

    collections: dict[str, str]
    file: str


# -- writing --------------------------------------------------------------------------------


async def write_portable(
    path: Path, reader: Reader, schema: Mapping[str, Collection], *, sort: bool
) -> dict[str, Digest]:
    """Write the content of `reader` to a new file atomically; returns the digest of each collection.

    Args:
        sort: request the order by id, because it is not the reader's default order.

    Raises:
        InvalidInputError: the file exists already.
        DiskFullError, PermissionDeniedError, ReadOnlyStoreError, UnavailableError.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        await in_thread(path.parent.mkdir, parents=True, exist_ok=True)
        try:
            digests = await _PortableWriter(temporary, schema).write(reader, sort=sort)
            await in_thread(_publish, temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except FileExistsError as exc:
        raise InvalidInputError(f"{path} exists already; a backup needs a new name") from exc
    except OSError as exc:
        raise translate_os_error(exc, f"write the backup {path}") from exc
    return digests


def _publish(temporary: Path, path: Path) -> None:
    """Give the complete file its final name, without replacing an existing file."""
    try:
        path.hardlink_to(temporary)
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        # The file system has no hard links: all that can be done is to check before the rename.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from exc
        temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _PortableWriter:
    """Writes one backup file, in a thread of its own.

    The thread compresses a chunk while the next one is collected. It runs its calls one by one, so the
    file is closed after the last write that a cancelled backup has begun, while the event loop goes on.
    """

    def __init__(self, path: Path, schema: Mapping[str, Collection]) -> None:
        self._path = path
        self._schema = schema
        self._compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
        self._file: BinaryIO | None = None
        self._lines: list[bytes] = []
        self._size = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hf-async-store-backup")
        self._pending: Future[None] | None = None

    async def write(self, reader: Reader, *, sort: bool) -> dict[str, Digest]:
        digests = {name: Digest() for name in self._schema}
        placeholder = self._header(dict.fromkeys(self._schema, INT_MAX))
        try:
            await asyncio.wrap_future(self._thread.submit(self._begin, placeholder))
            for name in self._schema:
                await self._write_section(name, reader, digests[name], sort=sort)
            header = self._header({name: each.count for name, each in digests.items()})
            header = header[:-1].ljust(len(placeholder) - 1) + b"\n"
            await self._flush()
            await self._wait_pending()
            await asyncio.wrap_future(self._thread.submit(self._end, digests, header))
        finally:
            if self._pending is not None:
                self._pending.cancel()
            closing = self._thread.submit(self._close)
            self._thread.shutdown(wait=False)
            await run_to_completion(asyncio.wrap_future(closing))
        return digests

    def _begin(self, placeholder: bytes) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(fd, "wb")
        self._file.write(_stored_member(placeholder))

    def _end(self, digests: Mapping[str, Digest], header: bytes) -> None:
        assert self._file is not None
        end = End(
            {name: str(each) for name, each in digests.items()}, _file_digest(header, digests)
        )
        last = self._compressor.compress(msgspec.json.encode(["end", end]) + b"\n")
        self._file.write(last + self._compressor.flush())
        self._file.seek(0)
        self._file.write(_stored_member(header))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a complete file is flushed already
                self._file.close()

    def _header(self, counts: Mapping[str, int]) -> bytes:
        sections = [_section_of(each, counts[name]) for name, each in self._schema.items()]
        header = Header(FORMAT, FORMAT_VERSION, sections, encoded(self._schema.values()))
        return msgspec.json.encode(header) + b"\n"

    async def _write_section(
        self, name: str, reader: Reader, digest: Digest, *, sort: bool
    ) -> None:
        declared = self._schema[name]
        query = build_query(declared, order_by=declared.key if sort else None)
        self._lines.append(msgspec.json.encode(name))
        async with aclosing(reader.select_batches(query)) as batches:
            async for batch in batches:
                encoded = all_canonical(batch)
                digest.add_all(encoded)
                self._lines += encoded
                self._size += sum(map(len, encoded))
                if self._size >= _CHUNK_SIZE:
                    await self._flush()

    async def _flush(self) -> None:
        """Start the compression of the collected lines, when that of the previous chunk is done."""
        self._lines.append(b"")
        chunk = b"\n".join(self._lines)
        self._lines.clear()
        self._size = 0
        await self._wait_pending()
        loop = asyncio.get_running_loop()
        started = asyncio.Event()

        def compress() -> None:
            assert self._file is not None
            loop.call_soon_threadsafe(started.set)
            self._file.write(self._compressor.compress(chunk))

        self._pending = self._thread.submit(compress)
        # The thread may have to wait for the GIL as long as this thread is busy. So wait here until
        # it has started; the compressor itself then runs without the GIL.
        await started.wait()

    async def _wait_pending(self) -> None:
        if self._pending is not None:
            await asyncio.wrap_future(self._pending)


def _section_of(collection: Collection, count: int) -> Section:
    fields = {
        name: field.type + (f" -> {field.references}" if field.references else "")
        for name, field in collection.fields.items()
    }
    return Section(
        collection.name, collection.key, count, fields, [each.name for each in collection.indexes]
    )


def _stored_member(line: bytes) -> bytes:
    """An uncompressed gzip member, whose length depends only on the length of the line."""
    compressor = zlib.compressobj(0, zlib.DEFLATED, _GZIP)
    return compressor.compress(line) + compressor.flush()


def _file_digest(header: bytes, digests: Mapping[str, Digest]) -> str:
    """The digest of the header and of the digests of all collections."""
    lines = "".join(f"{name} {each.count} {each}\n" for name, each in digests.items())
    return "blake2b:" + blake2b(header + lines.encode(), digest_size=32).hexdigest()


# -- reading --------------------------------------------------------------------------------


async def declarations_in(path: Path) -> list[Collection]:
    """The declarations in a portable backup; empty if it was made without them.

    Raises:
        CorruptionError: the header of the file, or the declarations in it, are invalid.
    """
    header = await read_header(path)
    return [] if header.declarations is None else decoded(header.declarations, str(path))


def is_portable(path: Path) -> bool:
    """Whether a file begins like a portable backup."""
    try:
        if not path.is_file():
            return False  # reading from a pipe would block
        with path.open("rb") as file:
            start = file.read(512)
        if not start.startswith(_MAGIC):
            return False
        data = zlib.decompressobj(_GZIP).decompress(start)
    except (OSError, zlib.error):
        return False
    return data.startswith(b'{"format":"' + FORMAT.encode() + b'"')


async def read_header(path: Path) -> Header:
    """The header of a backup, which lists its collections; the rest of the file is not read.

    Raises:
        InvalidInputError: the file is not a portable backup.
        CorruptionError: the file is damaged.
    """
    async with aclosing(_line_chunks(path)) as chunks:
        async for lines in chunks:
            return _header_in(lines[0], path)
    raise damaged(path, "it is empty")


async def read_portable(path: Path) -> AsyncGenerator[tuple[str, list[Entity]], None]:
    """The entities of a backup, in chunks of one collection each.

    Only unreadable files are refused here; `check_portable` verifies digests and entities.
    """
    reader = PortableReader(path)
    async with aclosing(reader.sections()) as sections:
        async for name, encoded in sections:
            yield name, reader.entities(name, encoded)


class PortableReader:
    """Reads a portable backup once, from its beginning to its end.

    Attributes:
        digests: the digest of each collection. The caller adds the entities to it.
        header: None until the first line was read.
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
        """The lines that hold entities, in chunks of one collection each."""
        name: str | None = None
        async with aclosing(_line_chunks(self._path)) as chunks:
            async for lines in chunks:
                start = 0
                if not self._header:
                    self._read_header_line(lines[0])
                    start = 1
                for number in range(start, len(lines)):
                    line = lines[number]
                    if line.startswith(b"{"):
                        continue
                    if number > start:
                        yield self._require_section(name), lines[start:number]
                    start = number + 1
                    self._refuse_after_end()
                    if line.startswith(b"["):
                        self._end = self._end_in(line)
                    else:
                        name = self._section_in(line)
                if start < len(lines):
                    yield self._require_section(name), lines[start:]

    def entities(self, name: str, encoded: Sequence[bytes]) -> list[Entity]:
        """Decode the next lines of a collection.

        Raises:
            CorruptionError: a line cannot be decoded; the error names the first one.
        """
        before = self._read.get(name, 0)
        self._read[name] = before + len(encoded)
        return [self._entity(name, number, line) for number, line in enumerate(encoded, before + 1)]

    def _entity(self, name: str, number: int, line: bytes) -> Entity:
        if len(line) > _MAX_ENTITY_JSON_BYTES:
            raise damaged(self._path, f"entity {number:,} of {name} exceeds the maximum size")
        try:
            return _decode(line)
        except RecursionError as exc:
            raise damaged(self._path, f"entity {number:,} of {name} is nested too deeply") from exc
        except ValueError as exc:  # the base class of the errors of msgspec
            raise damaged(
                self._path, f"entity {number:,} of {name} is not valid JSON: {exc}"
            ) from exc

    def verify_digests(self) -> None:
        """Refuse a truncated or altered file. Call it when all entities were read and added to
        `digests`."""
        if self._end is None:
            raise damaged(self._path, "it is truncated: its last line is missing")
        actual = {name: str(each) for name, each in self.digests.items()}
        counts = {name: each.count for name, each in self.digests.items()}
        if (
            self._end.file != _file_digest(self._header, self.digests)
            or self._end.collections != actual
            or counts != self._counts
        ):
            raise damaged(self._path, "it was altered: its digests or counts do not match")

    def _read_header_line(self, line: bytes) -> None:
        header = _header_in(line, self._path)
        self.header = header
        self._header = line + b"\n"
        self._counts = {each.name: each.count for each in header.collections}
        if len(self._counts) < len(header.collections):
            raise damaged(self._path, "its header names a collection twice")
        self.digests = {each: Digest() for each in self._counts}

    def _refuse_after_end(self) -> None:
        if self._end is not None:
            raise damaged(self._path, _AFTER_END)

    def _require_section(self, name: str | None) -> str:
        self._refuse_after_end()
        if name is None:
            raise damaged(self._path, "it was altered: an entity precedes the first collection")
        return name

    def _section_in(self, line: bytes) -> str:
        try:
            name = msgspec.json.decode(line, type=str)
        except (ValueError, RecursionError) as exc:
            raise damaged(self._path, "a line is neither a collection nor an entity") from exc
        if name not in self._counts:
            raise damaged(self._path, f"its header does not list the collection {name!r}")
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
        raise InvalidInputError(f"{path} is not a portable backup") from exc
    if header.format != FORMAT:
        raise InvalidInputError(f"{path} is not a portable backup")
    if header.format_version != FORMAT_VERSION:
        raise InvalidInputError(
            f"{path} is a backup of format version {header.format_version}; this version of "
            f"hf_async_store reads version {FORMAT_VERSION}"
        )
    return header


async def _line_chunks(path: Path) -> AsyncGenerator[list[bytes], None]:
    """The lines of a backup, in chunks, without their newlines."""
    rest = last = b""
    is_complete = False  # the member that ends with the last line has ended
    try:
        if not S_ISREG((await in_thread(path.stat)).st_mode):
            raise InvalidInputError(f"{path} is not a regular file, so it is not a portable backup")
        with await in_thread(path.open, "rb") as file:
            if await in_thread(_is_other_file, file):
                raise InvalidInputError(f"{path} is not a portable backup")
            chunks = _text_chunks(file)
            while chunk := await in_thread(next, chunks, None):
                if is_complete:
                    raise damaged(path, _AFTER_END)
                text, ends_member = chunk
                lines = (rest + text).split(b"\n")
                rest = lines.pop()
                if len(rest) > _MAX_LINE_BYTES:
                    raise damaged(path, "a line exceeds the maximum length")
                last = lines[-1] if lines else last
                is_complete = ends_member and not rest and last.startswith(b"[")
                if lines:
                    yield lines
    except (EOFError, zlib.error) as exc:
        raise damaged(path, _AFTER_END if is_complete else _reason(exc)) from exc
    except OSError as exc:
        raise translate_os_error(exc, f"read the backup {path}") from exc
    if rest:
        raise damaged(path, "it is truncated")


def _is_other_file(file: BinaryIO) -> bool:
    """Whether a file that is not empty does not begin like a gzip file."""
    start = file.read(len(_MAGIC))
    file.seek(0)
    return not _MAGIC.startswith(start)


def _text_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """The text of a gzip file in chunks, and whether a member ends with the chunk.

    Unlike the module gzip, it fills each chunk, never returns the end of a member before its checksum
    is verified, so that a damaged header is not believed, and accepts neither padding nor an empty
    member.

    Raises:
        zlib.error: the data is damaged.
        EOFError: it is truncated.
    """
    data = file.read(_CHUNK_SIZE)
    while data:
        member = zlib.decompressobj(_GZIP)
        is_empty = True
        parts: list[bytes] = []
        room = _CHUNK_SIZE
        while not member.eof:
            part = member.decompress(data, room)
            data = member.unconsumed_tail or member.unused_data or file.read(_CHUNK_SIZE)
            if not (part or data or member.eof):
                raise EOFError
            is_empty = is_empty and not part
            parts.append(part)
            room -= len(part)
            if not room and not member.eof:
                yield b"".join(parts), False
                parts, room = [], _CHUNK_SIZE
        if is_empty:
            raise zlib.error("a member is empty")
        yield b"".join(parts), True


def _reason(exc: Exception) -> str:
    if isinstance(exc, EOFError):
        return "it is truncated"
    return f"its compressed data is damaged ({exc})"


_decode: Final[Callable[[bytes], Entity]] = msgspec.json.Decoder().decode


def damaged(path: Path, reason: str) -> CorruptionError:
    """The error for a backup that was altered or truncated, or that no store can restore."""
    return CorruptionError(f"{path} is not a valid backup: {reason}. {_HINT}")


def refuse_other_schema(
    header: Header, schema: Schema, path: Path, leave_out: Container[str] = ()
) -> None:
    """Refuse a backup with entities of undeclared collections, or with another key field.

    Args:
        leave_out: collections of the backup that need not be declared.

    Raises:
        InvalidInputError.
    """
    for each in header.collections:
        if each.name not in schema:
            if each.count and each.name not in leave_out:
                raise InvalidInputError(
                    f"{path} holds {each.count:,} entities of {each.name!r}, which is not declared; "
                    "declare it (--collections MODULE:NAME on the command line), or exclude it "
                    "from the restore (leave_out, or --leave-out NAME)"
                )
        elif schema[each.name].key != each.key:
            raise InvalidInputError(
                f"the key field of {each.name} is {each.key!r} in {path}, and "
                f"{schema[each.name].key!r} in the declaration"
            )
