"""Converts a large data file in another layout to one entity per line, in a child process.

A file with one entity per line can be parsed in many small steps. Parsing any other layout is one step
over the whole file, which would block the event loop of the service that opens it. The values are not
changed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import aiofiles
import anyio
import msgspec

from hf_async_store.errors import CorruptionError
from hf_async_store.schema import Schema
from hf_async_store.strategies.json.serializer import (
    OtherLayout,
    compact,
    encode_json,
    is_wrapped,
    parse_object,
    section_lines,
)


async def rewritten(data: bytes, collection: str | None, key: str, schema: Schema) -> bytes:
    """The same file with one entity per line.

    Args:
        collection: the collection of the file; None for a file of several collections.
        key: the key field of that collection.
        schema: the collections that a file of several collections may contain.

    Raises:
        OtherLayout: the file could not be converted; the caller parses it as it is.
    """
    names = list(schema)
    if collection is not None:
        try:
            members = parse_object(data, "it")
        except CorruptionError as exc:
            raise OtherLayout from exc  # the caller reports it, with the name of the file
        names = [collection] if is_wrapped(collection, key, members) else []
    with tempfile.TemporaryDirectory(prefix="hf-async-store-") as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        async with aiofiles.open(source, "wb") as file:
            await file.write(data)
        command = [sys.executable, "-m", __name__, str(source), str(target), *names]
        result = await anyio.run_process(command, check=False, stderr=None)
        if result.returncode:
            raise OtherLayout
        async with aiofiles.open(target, "rb") as file:
            return await file.read()


def _main(source: str, target: str, *names: str) -> int:
    members = parse_object(Path(source).read_bytes(), source, unique=True)
    with Path(target).open("wb") as file:
        if names:
            file.write(_sections(members, names))
        else:
            file.write(b"{\n" + _lines(members) + b"}\n")
    return 0


def _sections(members: Mapping[str, msgspec.Raw], names: tuple[str, ...]) -> bytes:
    parts: list[bytes] = []
    for name, raw in members.items():
        if name in names:
            lines = _lines(parse_object(raw, f"section {name!r}", unique=True))
            parts.insert(0, encode_json(name) + b":{\n" + lines + b"}")
        else:
            parts.append(encode_json(name) + b":" + bytes(raw))
    return b"{\n" + b",\n".join(parts) + b"\n}\n"


def _lines(entities: Mapping[str, msgspec.Raw]) -> bytes:
    lines = section_lines([*entities], map(compact, entities.values()))
    return lines + b"\n" if lines else b""


if __name__ == "__main__":
    try:
        sys.exit(_main(*sys.argv[1:]))
    except (CorruptionError, OSError):
        os._exit(1)
