"""Converts a large foreign layout to ours, in a process of its own: one entity a line.

Cutting a file that lies one entity a line takes many small steps; any other layout takes one step over
all of it, which would hold the event loop of the service that opens it. Values are not touched.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import aiofiles
import anyio
import msgspec

from hf_async_store.errors import CorruptionError
from hf_async_store.strategies.json.serializer import (
    NotOurs,
    compact,
    cut_object,
    encode_text,
    layout_of,
    section_lines,
)

if TYPE_CHECKING:
    from hf_async_store.schema import Collection, Schema


async def rewritten(text: bytes, collection: Collection | None, schema: Schema) -> bytes:
    """The same file, one entity a line.

    Args:
        collection: whose file it is; None for a file of several.

    Raises:
        NotOurs: it cannot be done in this way; the caller cuts the file as it is.
    """
    if collection is not None and layout_of(collection, cut_object(text, "the file")) != "flat":
        raise NotOurs
    names = [] if collection is not None else list(schema)
    with tempfile.TemporaryDirectory(prefix="hf-async-store-") as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        async with aiofiles.open(source, "wb") as file:
            await file.write(text)
        command = [sys.executable, "-m", __name__, str(source), str(target), *names]
        done = await anyio.run_process(command, check=False, stderr=None)
        if done.returncode:
            raise NotOurs
        async with aiofiles.open(target, "rb") as file:
            return await file.read()


def _main(source: str, target: str, *names: str) -> int:
    members = cut_object(Path(source).read_bytes(), source, once=True)
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
            lines = _lines(cut_object(raw, f"section {name!r}", once=True))
            parts.insert(0, encode_text(name) + b":{\n" + lines + b"}")
        else:
            parts.append(encode_text(name) + b":" + bytes(raw))
    return b"{\n" + b",\n".join(parts) + b"\n}\n"


def _lines(entities: Mapping[str, msgspec.Raw]) -> bytes:
    lines = section_lines({each: compact(raw) for each, raw in entities.items()})
    return lines + b"\n" if lines else b""


if __name__ == "__main__":
    try:
        sys.exit(_main(*sys.argv[1:]))
    except (CorruptionError, OSError):
        os._exit(1)
