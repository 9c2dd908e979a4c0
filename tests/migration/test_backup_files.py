"""Case 81: the portable backup, and that a truncated or altered one is refused."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import random
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from support import everything, fill, generated_items, odd_items, opened

from hf_async_store import (
    CorruptionError,
    InvalidInputError,
    StorageError,
    TargetNotEmptyError,
    open_store,
)
from hf_async_store.migration import (
    backup_store,
    check_portable,
    is_portable,
    read_header,
    read_portable,
    restore_store,
)
from hf_async_store.migration.backup_format import _stored_member
from hf_async_store.testing.repetitions import sampled

if TYPE_CHECKING:
    from conftest import Place

pytestmark = pytest.mark.hf_sampled(by="kind")

URLS = ("memory:", "json:{}/one.json", "json:{}/split")


@pytest.mark.parametrize("url", URLS)
async def test_81_backup_and_restore_give_an_equal_store(url: str, tmp_path: Path) -> None:
    async with opened(url.format(tmp_path)) as store:
        await fill(store)
        before = await everything(store)
        made = await backup_store(store, tmp_path / "b.jsonl.gz")
    assert made.counts["machines"] == 60
    assert is_portable(Path(made.path))
    assert Path(made.path).stat().st_mode & 0o777 == 0o600
    for other in URLS:
        async with opened(other.format(tmp_path / "restored")) as store:
            await restore_store(store, made.path)
            after = await everything(store)
            assert repr(_sorted(after)) == repr(_sorted(before))
            again = await backup_store(store, tmp_path / f"again-{URLS.index(other)}.jsonl.gz")
            assert Path(again.path).read_bytes() == Path(made.path).read_bytes()
            assert again.digests == made.digests


def _sorted(value: object) -> object:
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return [_sorted(each) for each in value] if isinstance(value, list) else value


@given(generated_items())
@hypothesis_settings(max_examples=25)
async def test_generated_stores_round_trip(items: list[dict[str, object]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        async with opened("memory:") as one, opened(f"json:{folder}/db.json") as other:
            await one.import_entities("items", items)
            first = await backup_store(one, f"{folder}/1.jsonl.gz")
            await restore_store(other, first.path)
            if not items:
                return  # a store without files does not exist, and is not backed up
            second = await backup_store(other, f"{folder}/2.jsonl.gz")
            assert Path(first.path).read_bytes() == Path(second.path).read_bytes()
            assert repr(_sorted(await everything(one))) == repr(_sorted(await everything(other)))


async def _backup(tmp_path: Path) -> Path:
    async with opened("memory:") as store:
        await fill(store, 20)
        await store.delete_entity("items", "long")
        return Path((await backup_store(store, tmp_path / "b.jsonl.gz")).path)


async def test_81_a_truncated_backup_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = await _backup(tmp_path)
    whole = path.read_bytes()
    cut = tmp_path / "cut.jsonl.gz"
    async with opened("memory:") as store:
        for length in sampled(range(len(whole)), one_in=40):
            cut.write_bytes(whole[:length])
            with pytest.raises((CorruptionError, InvalidInputError)):
                await restore_store(store, cut)
        assert not any((await everything(store)).values())


async def test_81_an_altered_backup_is_refused_whichever_byte(tmp_path: Path) -> None:
    path = await _backup(tmp_path)
    whole = path.read_bytes()
    altered = tmp_path / "altered.jsonl.gz"
    digests = await check_portable(path)
    rng = random.Random(11)
    harmless = 0
    for place in sampled(range(len(whole)), one_in=40):
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        altered.write_bytes(data)
        try:
            found = await check_portable(altered)
        except StorageError:
            continue
        assert found == digests  # a byte of gzip without effect, like the timestamp
        harmless += 1
    assert harmless < 20


async def test_81_a_damaged_header_is_corruption_whichever_bit(tmp_path: Path) -> None:
    path = await _backup(tmp_path)
    whole = path.read_bytes()
    header = await read_header(path)
    [line, _] = gzip.decompress(whole).split(b"\n", 1)
    altered = tmp_path / "altered.jsonl.gz"
    end = len(_stored_member(line + b"\n"))
    for bit in sampled(range(8 * end), one_in=150):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        altered.write_bytes(data)
        try:
            found = await read_header(altered)
        except InvalidInputError:
            assert bit < 16  # the first two bytes tell gzip files from others
        except CorruptionError:
            pass
        else:
            assert found == header  # a byte of gzip without effect, like the timestamp
            assert bit < 88


@pytest.mark.parametrize(
    "data",
    [bytes(1), bytes(1024), gzip.compress(b""), b"\x1f\x8b", b"\x1f", b"x", gzip.compress(b"x")],
    ids=[
        "zero",
        "zeros",
        "empty member",
        "magic",
        "half a magic",
        "x",
        "member",
    ],  # not the time in gzip
)
async def test_81_data_after_the_end_is_refused(data: bytes, tmp_path: Path) -> None:
    path = await _backup(tmp_path)
    path.write_bytes(path.read_bytes() + data)
    with pytest.raises(CorruptionError, match="there is data after its last line"):
        await check_portable(path)
    async with opened("memory:") as store:
        with pytest.raises(CorruptionError, match="there is data after its last line"):
            await restore_store(store, path)
        assert not any((await everything(store)).values())


async def test_a_backup_is_read_in_full_chunks(tmp_path: Path) -> None:
    """Each chunk that is read is written in commits of its own."""
    noise = random.Random(3).randbytes(1_500_000).hex()
    items = [{"item_id": f"{n:04}", "data": noise[n * 3000 : (n + 1) * 3000]} for n in range(1000)]
    async with opened("memory:") as store:
        await store.import_entities("items", items)
        path = Path((await backup_store(store, tmp_path / "b.jsonl.gz")).path)
    chunks = [len(entities) async for _, entities in read_portable(path)]
    assert sum(chunks) == 1000
    assert len(chunks) <= 7


@pytest.mark.parametrize(
    "alter",
    [
        lambda lines: [*lines[:3], *lines[4:]],
        lambda lines: [*lines[:4], lines[3], *lines[4:]],
        lambda lines: [each.replace(b'"Template 1"', b'"Template 2"') for each in lines],
        lambda lines: [each.replace(b'"version":1}', b'"version":2}') for each in lines],
        lambda lines: [lines[0].replace(b'"count":3', b'"count":2'), *lines[1:]],
        lambda lines: [lines[0].replace(b'"text"', b'"json"'), *lines[1:]],
        lambda lines: [*lines, lines[3]],
        lambda lines: lines[:-1],
        lambda lines: [*lines[:2], b'"machines"', *lines[2:]],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [*lines[:2], b"what", *lines[2:]],
        lambda lines: [*lines[:2], b'"nobody"', *lines[2:]],
    ],
)
async def test_81_an_alteration_that_is_good_gzip_is_refused(alter: object, tmp_path: Path) -> None:
    path = await _backup(tmp_path)
    lines = gzip.decompress(path.read_bytes()).splitlines()
    assert callable(alter)
    altered = alter(lines)
    assert altered != lines
    text = b"\n".join([*altered, b""])
    end = text.index(b"\n") + 1
    other = tmp_path / "other.jsonl.gz"
    other.write_bytes(gzip.compress(text[:end]) + gzip.compress(text[end:]))
    async with opened("memory:") as store:
        with pytest.raises(CorruptionError, match="is not a valid backup"):
            await restore_store(store, other)
        assert not any((await everything(store)).values())


async def test_a_backup_is_json_lines_without_time_and_engine(tmp_path: Path) -> None:
    path = await _backup(tmp_path)
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    header = lines[0]
    assert "memory" not in header
    assert not any(each in header for each in ("20:", "T0", "202"))
    assert lines[1] == '"templates"'
    assert lines[2].startswith('{"created_at"') or lines[2].startswith('{"name"')
    assert lines[-1].startswith('["end",')
    names = [each.name for each in (await read_header(path)).collections]
    assert names.index("templates") < names.index("requests") < names.index("machines")


async def test_files_that_are_no_backup_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"{}", gzip.compress(b"{}\n"), gzip.compress(b""), os.urandom(100)):
        path = tmp_path / "x"
        path.write_bytes(content)
        assert not is_portable(path)
        async with opened("memory:") as store:
            with pytest.raises((InvalidInputError, CorruptionError)):
                await restore_store(store, path)


async def test_a_cancelled_backup_does_not_block_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, closed = threading.Event(), threading.Event()

    class SlowFile(io.FileIO):
        def write(self, data: object) -> int:
            if len(memoryview(data)) > 100_000:  # type: ignore[arg-type]
                writes.set()
                time.sleep(0.6)
            return super().write(data)  # type: ignore[arg-type]

        def close(self) -> None:
            closed.set()
            super().close()

    def opened_slowly(fd: int, mode: str) -> io.BufferedWriter:
        return io.BufferedWriter(SlowFile(fd, mode))

    monkeypatch.setattr("hf_async_store.migration.backup_format.os.fdopen", opened_slowly)
    noise = random.Random(3).randbytes(1_500_000).hex()
    items = [{"item_id": f"{n:04}", "data": noise[n * 3000 : (n + 1) * 3000]} for n in range(1000)]
    async with opened("memory:") as store:
        await store.import_entities("items", items)
        backup = asyncio.create_task(backup_store(store, tmp_path / "b.jsonl.gz"))
        while not writes.is_set():
            await asyncio.sleep(0.01)
        backup.cancel()
        longest = 0.0
        while not backup.done():
            began = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - began)
        assert longest < 0.3
        assert closed.is_set()
        with pytest.raises(asyncio.CancelledError):
            await backup
    assert not list(tmp_path.iterdir())


async def test_an_existing_backup_is_not_overwritten(tmp_path: Path) -> None:
    path = await _backup(tmp_path)
    async with opened("memory:") as store:
        with pytest.raises(InvalidInputError, match="exists already"):
            await backup_store(store, path)
    assert [each.name for each in tmp_path.iterdir()] == ["b.jsonl.gz"]


async def test_only_the_last_few_are_kept(tmp_path: Path) -> None:
    other = tmp_path / "notes_20200101T000000Z.jsonl.gz"
    other.write_bytes(b"not ours")
    async with opened("memory:") as store:
        made = [(await backup_store(store, f"{tmp_path}/", keep=2)).path for _ in range(5)]
        left = sorted(each.name for each in tmp_path.glob("backup_*"))
        assert left == sorted(Path(each).name for each in made[-2:])
        assert other.exists()
        with pytest.raises(InvalidInputError, match="keep"):
            await backup_store(store, tmp_path / "one.jsonl.gz", keep=2)


async def test_a_store_that_is_not_empty_needs_a_rule(tmp_path: Path) -> None:
    path = await _backup(tmp_path)
    async with opened("memory:") as store:
        await store.save_entity("templates", {"template_id": "t-1", "name": "mine"})
        await store.save_entity("templates", {"template_id": "own"})
        with pytest.raises(TargetNotEmptyError):
            await restore_store(store, path)
        kept = await restore_store(store, path, merge="keep")
        assert (kept.merged["templates"].written, kept.merged["templates"].kept) == (2, 1)
        newest = await restore_store(store, path, merge="newest")
        assert newest.merged["templates"].kept == 1  # the one in the backup has no updated_at
        replaced = await restore_store(store, path, merge="replace")
        assert (replaced.merged["templates"].written, replaced.merged["templates"].unchanged) == (
            1,
            2,
        )
        found = await store.get_entity("templates", "t-1")
        assert found == {"template_id": "t-1", "name": "Template 1", "version": 1}
        assert await store.get_entity("templates", "own") is not None


async def test_collections_that_are_not_declared_are_refused(tmp_path: Path) -> None:
    path = await _backup(tmp_path)
    async with open_store("memory:") as store:
        with pytest.raises(InvalidInputError, match=r"entities of 'items', which is not declared"):
            await restore_store(store, path)


@pytest.mark.parametrize("kind", ["json-single", "sqlite", "postgresql"])
async def test_a_backup_is_a_consistent_snapshot_during_writes(
    kind: str, place: Place, tmp_path: Path
) -> None:
    """During transfers between two collections, the sum in the backup is correct."""
    import asyncio

    async with opened(place(kind, "db")) as store:
        await store.create_entities(
            "accounts", [{"account_id": f"a-{n:04d}", "balance": 10} for n in range(3000)]
        )
        await store.create_entity("counters", {"counter_id": "rest", "balance": 0})
        moved = 0

        async def move() -> None:
            nonlocal moved
            rng = random.Random(3)
            while True:
                async with store.begin_transaction() as tx:
                    entity_id = f"a-{rng.randrange(3000):04d}"
                    account = await tx.get_entity("accounts", entity_id)
                    rest = await tx.get_entity("counters", "rest")
                    assert account is not None
                    assert rest is not None
                    await tx.update_entity(
                        "accounts", entity_id, {"balance": account["balance"] - 1}
                    )
                    await tx.update_entity("counters", "rest", {"balance": rest["balance"] + 1})
                moved += 1

        moving = asyncio.create_task(move())
        await asyncio.sleep(0.05)
        for number in range(5):
            before = moved
            made = await backup_store(store, tmp_path / f"{number}.jsonl.gz")
            assert moved > before
            async with opened("memory:") as copy:
                await restore_store(copy, made.path)
                accounts = await copy.query_entities("accounts")
                rest = await copy.get_entity("counters", "rest")
                assert rest is not None
                assert sum(each["balance"] for each in accounts) + rest["balance"] == 30_000  # type: ignore[misc, operator]
            if moving.done():
                break
        assert not moving.done()
        moving.cancel()
        await asyncio.wait([moving])


def test_there_are_enough_unusual_values() -> None:
    assert len(odd_items()) > 30
