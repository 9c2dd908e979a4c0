"""Case 122 for backups, checkpoints and the command line: corrupted input raises only a `StorageError`,
and memory usage is bounded.

The inputs are recorded valid ones with changed bytes, lines and structures. HF_ASYNC_STORE_FUZZ_SECONDS
limits the long run.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backup_files import write_by_hand
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support import fill, opened

from hf_async_store import HOST_FACTORY, StorageError, open_store
from hf_async_store.cli.filter_syntax import changes_of, entities_of, filters_of, order_of
from hf_async_store.migration import (
    backup_store,
    check_portable,
    is_portable,
    read_header,
    read_portable,
    restore_store,
)
from hf_async_store.migration.checkpoint import Checkpoint, CheckpointFile, Progress
from hf_async_store.migration.digest import Digest
from hf_async_store.migration.tool import MigrationTool

SHORT = 300
SECONDS = float(os.environ.get("HF_ASYNC_STORE_FUZZ_SECONDS", "60"))

_ODD: list[Any] = [
    None, True, -1, 0, 2**63, 2**70, 1e999, float("nan"), "", "\0", "x" * 100, [], {}, [[[[]]]],
    {"version": 1}, {"a": {"a": {}}}, ["end", {}], "blake2b-sum:zz",
]  # fmt: skip
_TEXTS = [
    b"[" * 3000,
    b'{"a":' * 3000,
    b"1e999",
    b"\xff\xfe",
    b"9" * 5000,
    b'"\\ud800"',
    b"\0",
    b"\n",
]


# -- how good inputs are spoilt ------------------------------------------------------------------


def spoilt_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, removed, inserted, duplicated or truncated."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(found) + 1)
        what = rng.randrange(6)
        if what == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            found[at : at + rng.choice((1, 4, 50))] = b""
        elif what == 2:
            found[at:at] = rng.choice(_TEXTS)
        elif what == 3:
            other = rng.randrange(len(found) + 1)
            found[at:at] = found[other : other + rng.choice((1, 8, 200))]
        elif what == 4:
            found[at : at + 4] = rng.randbytes(4)
        elif rng.randrange(4) == 0:
            del found[at:]
    return bytes(found)


def spoilt_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with a part of it replaced, renamed or removed."""
    if rng.randrange(4) == 0 or not isinstance(value, dict | list) or not value:
        return rng.choice(_ODD)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], spoilt_value(value[at], rng), *value[at + 1 :]]
    name = rng.choice(list(value))
    kept = {each: part for each, part in value.items() if each != name}
    what = rng.randrange(4)
    if what == 0:
        return kept
    if what == 1:
        return {**kept, rng.choice(["", "version", "\0", "x"]): value[name]}
    return {**kept, name: spoilt_value(value[name], rng)}


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# -- backups -----------------------------------------------------------------------------------------


async def recorded(tmp_path: Path) -> Path:
    async with opened("memory:") as store:
        await fill(store, 8)
        await store.delete_entity("items", "long")
        return Path((await backup_store(store, tmp_path / "good.jsonl.gz")).path)


def spoilt_backups(good: Path, into: Path, rng: random.Random) -> Iterator[Path]:
    """Corrupted backups: in the gzip bytes, in the JSON text, or in a value with correct digests."""
    packed = good.read_bytes()
    lines = gzip.decompress(packed).splitlines()
    sections: dict[str, list[bytes]] = {}
    for each in lines[1:-1]:
        if each.startswith(b"{"):
            sections[list(sections)[-1]].append(each)
        else:
            sections[json.loads(each)] = []
    while True:
        into.write_bytes(spoilt_bytes(packed, rng))
        yield into
        text = spoilt_bytes(b"\n".join([*lines, b""]), rng)
        end = text.find(b"\n") + 1
        into.write_bytes(gzip.compress(text[:end], 1) + gzip.compress(text[end:], 1))
        yield into
        which = rng.choice((0, -1, rng.randrange(len(lines))))
        changed = list(lines)
        changed[which] = as_json(spoilt_value(json.loads(lines[which]), rng))
        text = b"\n".join([*changed, b""])
        end = text.find(b"\n") + 1
        into.write_bytes(gzip.compress(text[:end], 1) + gzip.compress(text[end:], 1))
        yield into
        name = rng.choice([each for each, found in sections.items() if found])
        at = rng.randrange(len(sections[name]))
        entity = sections[name][at]
        bad = rng.choice(
            (spoilt_bytes(entity, rng), as_json(spoilt_value(json.loads(entity), rng)))
        )
        bad = bad.replace(b"\n", b" ")
        write_by_hand(
            into,
            {**sections, name: [*sections[name][:at], bad, *sections[name][at + 1 :]]},
            level=1,
        )
        yield into


async def looked_at(path: Path) -> None:
    """Read a backup in every way. A refused backup must not be restored in part."""
    is_portable(path)

    async def walk() -> None:
        async for _ in read_portable(path):
            pass

    for read in (lambda: read_header(path), lambda: check_portable(path), walk):
        await refused_well(read)
    async with opened("memory:") as store:
        if await refused_well(lambda: restore_store(store, path)):
            for name in store.collections:
                assert await store.count_entities(name) == 0


async def refused_well(work: Callable[[], Awaitable[object]]) -> bool:
    try:
        await work()
    except StorageError as exc:
        assert str(exc)
        return True
    return False


async def test_122_corrupted_backups(tmp_path: Path) -> None:
    good = await recorded(tmp_path)
    spoilt = spoilt_backups(good, tmp_path / "bad.jsonl.gz", random.Random(7))
    for _ in range(SHORT):
        await looked_at(next(spoilt))


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 300)
async def test_122_corrupted_backups_for_long(tmp_path: Path) -> None:
    good = await recorded(tmp_path)
    seed = random.randrange(1 << 32)
    spoilt = spoilt_backups(good, tmp_path / "bad.jsonl.gz", random.Random(seed))
    ends = time.monotonic() + SECONDS
    count = 0
    while time.monotonic() < ends:
        path = next(spoilt)
        count += 1
        try:
            await looked_at(path)
        except BaseException:
            print(f"seed {seed}, input {count}: {path.read_bytes()!r}")
            raise
    print(f"\n{count:,} spoilt backups, seed {seed}")


# -- checkpoints -----------------------------------------------------------------------------------


def spoilt_checkpoints(data: bytes, rng: random.Random) -> Iterator[bytes]:
    while True:
        yield spoilt_bytes(data, rng)
        yield as_json(spoilt_value(json.loads(data), rng))


async def resumed_from_spoilt(
    tmp_path: Path, rng: random.Random, goes_on: Callable[[], bool]
) -> int:
    count = 0
    async with opened("memory:") as source, opened("memory:") as target:
        await fill(source, 8)
        folder = tmp_path / "checkpoints"
        file = CheckpointFile(folder, source, target)
        page = await source.query_page("machines", limit=3)
        good = Checkpoint(
            file.pair,
            3,
            None,
            None,
            {
                "templates": Progress(None, 3, str(Digest()), done=True),
                "machines": Progress(page.cursor, 3, str(Digest())),
            },
        )
        await file.save(good)
        for data in spoilt_checkpoints(file.path.read_bytes(), rng):
            if not goes_on():
                return count
            count += 1
            file.path.parent.mkdir(exist_ok=True)
            file.path.write_bytes(data)
            tool = MigrationTool(
                source, target, {"backup_location": f"{folder}/", "create_backup": False}
            )
            await refused_well(tool.resume)
    return count


async def test_122_corrupted_checkpoints(tmp_path: Path) -> None:
    left = iter(range(SHORT))
    count = await resumed_from_spoilt(
        tmp_path, random.Random(3), lambda: next(left, None) is not None
    )
    assert count == SHORT


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 300)
async def test_122_corrupted_checkpoints_for_long(tmp_path: Path) -> None:
    ends = time.monotonic() + SECONDS / 2
    seed = random.randrange(1 << 32)
    print(f"\nseed {seed}")
    count = await resumed_from_spoilt(
        tmp_path, random.Random(seed), lambda: time.monotonic() < ends
    )
    print(f"{count:,} spoilt checkpoints")


# -- words of the command line --------------------------------------------------------------------

_PARTS = st.sampled_from(
    ["status", "tags", "a/b", "/", ":", "=", ":=", "in", "between", "exists", "gt", "[", "]", '["a"]',
     "{", "}", '"', ",", "null", "true", "1", "1e999", "9" * 5000, "-", "٣", "²", "\ud800", "\0", "\udcff",
     "[" * 2000, '{"a":' * 2000, "begins_with", "contains", "not_in", "version", "x" * 300, " ", "\n",
     "machine_count", "created_at", "2025-06-30T12:00:00Z", "disks/0/size", "/999999999999999999999"]
)  # fmt: skip
WORDS = st.lists(_PARTS, max_size=8).map("".join) | st.text(max_size=20)
REQUESTS = next(each for each in HOST_FACTORY if each.name == "requests")


@given(st.lists(WORDS, max_size=3), st.booleans())
@hypothesis_settings(max_examples=SHORT)
@example(["{\ud800"], False)
@example(["[" * 5000], False)
@example(["tags/" + "9" * 5000 + "=1"], False)
@example(["status:in:=" + "[" * 5000], True)
async def test_122_arguments_of_the_command_line(words: list[str], as_order: bool) -> None:
    async with open_store("memory:") as store:
        await store.save_entity("requests", {"request_id": "r", "tags": {"a": [1, {"b": 2}]}})

        async def query() -> None:
            filters = None if as_order else filters_of(words, REQUESTS)
            order = order_of(words, REQUESTS) if as_order else None
            await store.query_entities("requests", filters, order)

        async def update() -> None:
            await store.update_entity("requests", "r", changes_of(words, words[:1], REQUESTS))

        await refused_well(query)
        await refused_well(update)


@given(
    st.binary(max_size=60)
    | st.lists(_PARTS, max_size=6).map(lambda parts: "".join(parts).encode(errors="surrogatepass"))
)
@hypothesis_settings(max_examples=SHORT)
async def test_122_json_that_is_put(data: bytes) -> None:
    async with open_store("memory:") as store:

        async def put() -> None:
            for each in entities_of(data, "stdin"):
                await store.save_entity("requests", each.entity)

        await refused_well(put)


@given(st.text(max_size=60) | st.binary(max_size=40).map(lambda data: zlib.compress(data).hex()))
@hypothesis_settings(max_examples=SHORT)
async def test_122_cursors(cursor: str) -> None:
    async with open_store("memory:") as store:
        await store.save_entities("requests", [{"request_id": f"r-{n}"} for n in range(5)])
        good = (await store.query_page("requests", limit=2)).cursor
        assert good is not None
        rng = random.Random(cursor)
        spoilt = spoilt_bytes(good.encode(), rng).decode(errors="replace")
        for each in (cursor, spoilt, good + cursor):
            await refused_well(lambda each=each: store.query_page("requests", cursor=each))  # type: ignore[misc]
