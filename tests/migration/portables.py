"""Portable backups with arbitrary contents and correct digests."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from hf_async_store.migration.backup_format import (
    FORMAT,
    End,
    Header,
    Section,
    _file_digest,
    _stored_member,
)
from hf_async_store.migration.digest import Digest


def write_by_hand(path: Path, sections: Mapping[str, Sequence[bytes]], *, level: int = 6) -> Path:
    """Write a backup whose collections contain these lines, with matching digests."""
    digests = {name: Digest() for name in sections}
    for name, lines in sections.items():
        digests[name].add_all(lines)
    listed = [
        Section(name, f"{name.removesuffix('s')}_id", digest.count, {}, [])
        for name, digest in digests.items()
    ]
    head = msgspec.json.encode(Header(FORMAT, 1, listed)) + b"\n"
    pack = zlib.compressobj(level, zlib.DEFLATED, 31)
    body = []
    for name, lines in sections.items():
        body.append(pack.compress(msgspec.json.encode(name) + b"\n"))
        body += [pack.compress(each + b"\n") for each in lines]
    end = End({name: str(each) for name, each in digests.items()}, _file_digest(head, digests))
    body.append(pack.compress(msgspec.json.encode(["end", end]) + b"\n"))
    path.write_bytes(_stored_member(head) + b"".join(body) + pack.flush())
    return path


def line(**fields: object) -> bytes:
    return msgspec.json.encode({"version": 1, **fields})
