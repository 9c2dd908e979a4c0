"""Damaged, malicious and unusual files: detected or harmless, never a wrong result (contract 85)."""

from __future__ import annotations

import gzip
import json
import os
import random
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from hf_async_store import HOST_FACTORY, JSONStorageStrategy
from hf_async_store.changes import Record
from hf_async_store.errors import ConfigurationError, CorruptionError, StorageError
from hf_async_store.query import Query
from hf_async_store.strategies.json.journal import (
    FileState,
    Fold,
    Head,
    Kind,
    control,
    record,
    scan,
)
from hf_async_store.testing.repetitions import repetitions, sampled
from hf_async_store.values import Entity, Key, parse_timestamp
from tests.json.layouts import both_layouts, one_layout
from tests.json.support import (
    LAYOUTS,
    SINGLE,
    Stored,
    abandon,
    data_files,
    journals,
    never_folds,
    open_files,
    open_json,
    parsed,
    reopened,
    temporary,
    whole,
)

pytestmark = pytest.mark.hf_sampled(by="layout")


@contextmanager
def quick_folder() -> Iterator[Path]:
    memory = Path("/dev/shm")
    where = str(memory) if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hf-damage-", dir=where) as folder:
        yield Path(folder)


async def _at_rest(folder: Path, layout: str) -> None:
    async with open_json(folder, layout) as store:
        await store.save_entity("templates", {"template_id": "t1", "name": "é"})
        await store.save_entity("requests", {"request_id": "r1", "template_id": "t1"})
        await store.checkpoint()


async def _pending(folder: Path, layout: str) -> list[Stored]:
    """A journal with two commits; returns the contents after each of them."""
    await _at_rest(folder, layout)
    for each in journals(folder):
        each.unlink()
    store = await open_json(folder, layout).open()
    never_folds(store)
    states = [await whole(store)]
    await store.update_entity("templates", "t1", {"name": "b"})
    states.append(await whole(store))
    async with store.begin_transaction() as tx:
        await tx.delete_entity("requests", "r1")
        await tx.save_entity("machines", {"machine_id": "m1"})
    states.append(await whole(store))
    await abandon(store)
    return states


async def _shown(folder: Path, layout: str) -> Stored | CorruptionError:
    try:
        return await reopened(folder, layout)
    except CorruptionError as exc:
        return exc


def _names_cause_and_recovery(error: CorruptionError, folder: Path) -> bool:
    """Whether the error names a file or an entity, and how to recover."""
    text = str(error)
    return str(folder) in text or " 't1'" in text or " 'r1'" in text


def _flips(data: bytes, bits: tuple[int, ...]) -> Iterator[tuple[str, bytes]]:
    for place in range(len(data)):
        for bit in bits:
            changed = bytearray(data)
            changed[place] ^= bit
            yield f"byte {place} ^ {bit:#x}", bytes(changed)


# -- every byte -------------------------------------------------------------------------------


@one_layout
async def test_85_every_byte_of_the_journal(layout: str) -> None:
    bits = (0x01, 0x80) if layout == "single_file" else (0x20,)
    with quick_folder() as folder:
        states = await _pending(folder, layout)
        (journal,) = journals(folder)
        whole_journal = journal.read_bytes()
        for what, data in sampled(_flips(whole_journal, bits)):
            journal.write_bytes(data)
            found = await _shown(folder, layout)
            if isinstance(found, CorruptionError):
                assert _names_cause_and_recovery(found, folder), f"{what}: {found}"
                assert "restore" in str(found), f"{what}: {found}"
            else:
                assert found == states[-1], f"{what}: {found}"
        journal.write_bytes(whole_journal)
        assert await _shown(folder, layout) == states[-1]


@one_layout
async def test_85_every_length_of_the_journal(layout: str) -> None:
    """A truncated journal is damaged, or ends before an incomplete commit."""
    with quick_folder() as folder:
        states = await _pending(folder, layout)
        (journal,) = journals(folder)
        whole_journal = journal.read_bytes()
        seen: list[int] = []
        for length in sampled(range(len(whole_journal))):
            journal.write_bytes(whole_journal[:length])
            found = await _shown(folder, layout)
            if isinstance(found, CorruptionError):
                assert not seen, f"{length} bytes: {found}"
                continue
            assert found in states, f"{length} bytes: {found}"
            seen.append(states.index(found))
        assert seen == sorted(seen)
        assert set(seen) == {0, 1}


@one_layout
async def test_85_every_byte_of_a_data_file_with_commits_waiting(layout: str) -> None:
    bits = (0x01, 0x80) if layout == "single_file" else (0x20,)
    with quick_folder() as folder:
        states = await _pending(folder, layout)
        for file in data_files(folder):
            text = file.read_bytes()
            for what, data in sampled(_flips(text, bits)):
                file.write_bytes(data)
                found = await _shown(folder, layout)
                assert isinstance(found, CorruptionError), f"{file.name} {what}: {found}"
                assert _names_cause_and_recovery(found, folder), f"{what}: {found}"
            for length in sampled(range(len(text))):
                file.write_bytes(text[:length])
                found = await _shown(folder, layout)
                assert isinstance(found, CorruptionError), f"{file.name} cut at {length}: {found}"
            file.write_bytes(text)
        assert await _shown(folder, layout) == states[-1]


def _as_parsed(folder: Path, layout: str) -> Stored | None:
    """The contents of the data files by a plain JSON parser and the adoption rules; None if unreadable."""
    stored: Stored = {}
    for declared in HOST_FACTORY:
        file = folder / (SINGLE if layout == "single_file" else f"{declared.name}.json")
        try:
            text = json.loads(file.read_bytes()) if file.exists() else {}
        except ValueError:
            return None
        section = text.get(declared.name, {}) if layout == "single_file" else text
        stored[declared.name] = {
            name: _taken_over(name, entity, declared) for name, entity in section.items()
        }
    return stored


def _taken_over(entity_id: str, found: dict[str, Any], declared: Any) -> Entity:
    entity = {declared.key: entity_id, "version": 0, **found}
    for name, field in declared.fields.items():
        if field.type == "timestamp" and isinstance(entity.get(name), str):
            entity[name] = parse_timestamp(entity[name]) or entity[name]
    return entity


@one_layout
async def test_85_every_byte_of_a_data_file_with_an_empty_journal(layout: str) -> None:
    """With an empty journal a changed file is adopted with a report, or refused."""
    with quick_folder() as folder:
        await _at_rest(folder, layout)
        for file in data_files(folder):
            text = file.read_bytes()
            changes = list(_flips(text, (0x01, 0x80, 0x20) if layout == LAYOUTS[0] else (0x01,)))
            changes += [(f"cut at {length}", text[:length]) for length in range(len(text))]
            for what, data in sampled(changes):
                file.write_bytes(data)
                await _refused_or_taken_over(folder, layout, f"{file.name} {what}: {data!r}")
            file.write_bytes(text)


async def _refused_or_taken_over(folder: Path, layout: str, what: str) -> None:
    store = await open_json(folder, layout).open()
    try:
        found = await whole(store)
    except CorruptionError as exc:
        assert _names_cause_and_recovery(exc, folder) or "has another id" in str(exc), (
            f"{what}: {exc}"
        )
    else:
        assert found == _as_parsed(folder, layout), f"{what}: {found}"
        problems = (await store.health())["problems"]
        assert "replaced manually" in str(problems), f"{what}: {problems}"
    finally:
        await abandon(store)


async def test_85_every_byte_of_a_packed_file(tmp_path: Path) -> None:
    with quick_folder() as folder:
        async with open_json(folder, enable_compression=True) as store:
            await store.save_entity("templates", {"template_id": "t1"})
            before = await whole(store)
        (file,) = data_files(folder)
        packed = file.read_bytes()
        for what, data in sampled(_flips(packed, (0x01,))):
            file.write_bytes(data)
            try:
                found = await reopened(folder, enable_compression=True)
            except CorruptionError:
                continue
            # Only the gzip header contains bytes without effect.
            assert found == before, what
            assert gzip.decompress(data), what
        for length in sampled(range(len(packed))):
            file.write_bytes(packed[:length])
            with pytest.raises(CorruptionError):
                await reopened(folder, enable_compression=True)
        assert open_files(folder) == []


# -- a larger one, at random ------------------------------------------------------------------


@one_layout
async def test_85_at_random_in_a_large_store(layout: str) -> None:
    chance = random.Random(85)
    with quick_folder() as folder:
        rows = [{"machine_id": f"m{n:04}", "name": "x" * (n % 200)} for n in range(3000)]
        async with open_json(folder, layout) as store:
            await store.save_entities("machines", rows)
        store = await open_json(folder, layout, write_buffer_size=1 << 30).open()
        never_folds(store)
        for n in range(40):
            await store.save_entities("machines", rows[n * 10 : n * 10 + 10])
        expected = await whole(store)
        await abandon(store)
        for file in [
            *journals(folder),
            folder / (SINGLE if layout == LAYOUTS[0] else "machines.json"),
        ]:
            text = file.read_bytes()
            for _ in range(repetitions(25)):
                place = chance.randrange(len(text))
                bit = 1 << chance.randrange(8)
                changed = text[:place] + bytes([text[place] ^ bit]) + text[place + 1 :]
                file.write_bytes(changed)
                found = await _shown(folder, layout)
                assert isinstance(found, CorruptionError), f"{file.name} byte {place} ^ {bit}"
            file.write_bytes(text)
        assert await _shown(folder, layout) == expected


# -- hostile files ----------------------------------------------------------------------------

GOOD: Final = b'"t0":{"template_id":"t0","version":3}'


def _section(entities: bytes) -> bytes:
    return b'{"templates":{%b},"requests":{},"machines":{}}' % entities


HOSTILE: Final[dict[str, bytes]] = {
    "an empty file": b"",
    "white space": b" \n",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "a text": b'"templates"',
    "NUL bytes": b"\0" * 64,
    "a byte order mark": b"\xef\xbb\xbf" + _section(GOOD),
    "UTF-16": _section(GOOD).decode().encode("utf-16"),
    "invalid UTF-8 in a value": _section(GOOD + b',"t1":{"template_id":"t1","name":"\xff"}'),
    "invalid UTF-8 in an id": _section(GOOD + b',"\xff":{"name":"x"}'),
    "a section that is a list": b'{"templates":[],"requests":{}}',
    "a section that is null": b'{"templates":null}',
    "an entity that is a list": _section(GOOD + b',"t1":[1]'),
    "an entity that is null": _section(GOOD + b',"t1":null'),
    "an id twice": _section(GOOD + b',"t1":{"name":"a"},"t1":{"name":"b"}'),
    "a section twice": b'{"templates":{%b},"templates":{}}' % GOOD,
    "a field twice": _section(GOOD + b',"t1":{"name":"a","name":"b"}'),
    "a float beyond all": _section(GOOD + b',"t1":{"max":1e400}'),
    "NaN": _section(GOOD + b',"t1":{"max":NaN}'),
    "an integer of 30 digits": _section(GOOD + b',"t1":{"max":%b}' % (b"9" * 30)),
    "an integer of 5,000 digits": _section(GOOD + b',"t1":{"max":%b}' % (b"9" * 5000)),
    "a text with NUL": _section(GOOD + b',"t1":{"name":"a\\u0000b"}'),
    "a raw NUL in a text": _section(GOOD + b',"t1":{"name":"a\0b"}'),
    "a lone surrogate": _section(GOOD + b',"t1":{"name":"\\ud800"}'),
    "nested 31 deep": _section(GOOD + b',"t1":{"x":%b}' % (b"[" * 31 + b"]" * 31)),
    "nested 1,000 deep": _section(GOOD + b',"t1":{"x":%b}' % (b"[" * 1000 + b"]" * 1000)),
    "nested 200,000 deep": _section(GOOD + b',"t1":{"x":%b}' % (b"[" * 200000 + b"]" * 200000)),
    "undeclared and 200,000 deep": b'{"x":%b,"templates":{%b}}'
    % (b"[" * 200000 + b"]" * 200000, GOOD),
    "a wrong key field": _section(GOOD + b',"t1":{"template_id":"t2"}'),
    "a key field that is a number": _section(GOOD + b',"1":{"template_id":1}'),
    "a version that is text": _section(GOOD + b',"t1":{"version":"x"}'),
    "a version that is negative": _section(GOOD + b',"t1":{"version":-1}'),
    "a version that is true": _section(GOOD + b',"t1":{"version":true}'),
    "a version that is a float": _section(GOOD + b',"t1":{"version":1.0}'),
    "a version of 30 digits": _section(GOOD + b',"t1":{"version":%b}' % (b"9" * 30)),
    "an empty id": _section(GOOD + b',"":{"name":"x"}'),
    "an id of 2,000 bytes": _section(GOOD + b',"%b":{"name":"x"}' % (b"i" * 2000)),
    "two files in one": b'{\n"templates":{\n%b\n}\n}\n{\n"templates":{\n}\n}\n' % GOOD,
    "something after the end": b'{\n"templates":{\n%b\n}\n}}\n' % GOOD,
    "no comma between sections": b'{\n"templates":{\n%b\n}\n"requests":{\n}\n}\n' % GOOD,
    "a byte between sections": b'{\n"templates":{\n%b\n}x\n}\n' % GOOD,
    "a comma too many": b'{\n"templates":{\n%b,\n}\n}\n' % GOOD,
    "a comma at the very end": b'{\n"templates":{\n%b\n},\n}\n' % GOOD,
    "no end": _section(GOOD)[:-1],
    "a version that looks ours": b'{\n"templates":{\n%b,\n"t1":{"version":,"name":"x"}\n}\n}\n'
    % GOOD,
    "a comment": b"// the store\n" + _section(GOOD),
}


def _strict(text: bytes) -> Any:
    """Parse the file strictly; raises ValueError or RecursionError."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in found}) < len(found):
            raise ValueError("a name comes twice")
        return dict(found)

    def refused(name: str) -> Any:
        raise ValueError(name)

    return json.loads(text.decode(), object_pairs_hook=pairs, parse_constant=refused)


@pytest.mark.parametrize("backups", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
async def test_85_hostile_files(tmp_path: Path, name: str, backups: bool) -> None:
    """A typed error, or the exact content; the next write and compaction lose nothing of it."""
    file = tmp_path / SINGLE
    file.write_bytes(HOSTILE[name])
    store = await open_json(tmp_path, backup_enabled=backups).open()
    try:
        found = await _each_verb(store)
        wrote = await _succeeds(lambda: store.save_entity("templates", {"template_id": "new"}))
        folded = await _succeeds(store.checkpoint)
        if wrote:
            assert folded, "a commit was accepted that cannot be compacted"
            assert await store.get_entity("templates", "new")
            assert await _succeeds(lambda: store.get_entity("templates", "t0")) == found
    finally:
        await store.close()
    if not wrote:
        assert file.read_bytes() == HOSTILE[name]
    else:
        _nothing_is_lost(file, HOSTILE[name], backups)
        assert _readable(file) or not _readable_text(HOSTILE[name])
    assert not temporary(tmp_path)
    assert open_files(tmp_path) == []


async def _each_verb(store: JSONStorageStrategy) -> bool:
    """Call every read verb; returns whether the undamaged entity can be read."""
    for verb in (
        lambda: store.query_entities("templates"),
        lambda: store.query_entities("requests", {"status": "x"}),
        lambda: store.count_entities("templates", {"name": "x"}),
        lambda: store.get_entities("templates", ["t1", "t0"]),
        lambda: store.get_entity("templates", "t1"),
        store.read_file,
        store.health,
    ):
        await _succeeds(verb)
    return await _succeeds(lambda: store.get_entity("templates", "t0"))


async def _succeeds(verb: Callable[[], Any]) -> bool:
    """Whether the call succeeded; a `StorageError` is accepted, any other exception fails the test."""
    try:
        return await verb() is not False
    except StorageError:
        return False


def _readable_text(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _readable(file: Path) -> bool:
    return _readable_text(file.read_bytes())


def _nothing_is_lost(file: Path, text: bytes, backups: bool) -> None:
    """Check that the old file is a backup, and that all entities a strict parser reads in it are kept."""
    if backups:
        kept = [each.read_bytes() for each in file.parent.glob("*.bak.*")]
        assert text in kept, "the original file is not among the backups"
    try:
        old = _strict(text)
    except (ValueError, RecursionError):
        return
    new = _strict(file.read_bytes())
    assert new["templates"].pop("new")
    for section, entities in old.items():
        for entity_id, entity in entities.items():
            now = new[section][entity_id]
            if isinstance(entity, dict) and isinstance(now, dict):
                now = {field: now[field] for field in now if field in entity}
            assert now == entity


async def test_85_a_duplicate_id_is_refused(tmp_path: Path) -> None:
    """There is no rule for which of the two is valid."""
    for text in (HOSTILE["an id twice"], HOSTILE["a section twice"]):
        (tmp_path / SINGLE).write_bytes(text)
        with pytest.raises(CorruptionError):
            await reopened(tmp_path)
    lines = b'{\n"templates":{\n"t1":{"name":"a"},\n"t2":{},\n"t1":{"name":"b"}\n}\n}\n'
    (tmp_path / SINGLE).write_bytes(lines)
    with pytest.raises(CorruptionError):
        await reopened(tmp_path)


async def test_85_a_duplicate_id_with_several_ids_per_line(tmp_path: Path) -> None:
    """An equal number of lines and ids does not prove that the ids are unique."""
    text = b'{\n"templates":{\n"t1":{"name":"a"},"t2":{},\n"t1":{"name":"b"}\n}\n}\n'
    (tmp_path / SINGLE).write_bytes(text)
    with pytest.raises(CorruptionError):
        await reopened(tmp_path)


async def test_85_a_duplicate_id_in_a_large_file(tmp_path: Path) -> None:
    """It is detected although the two ids are in different chunks of a large file."""
    rows = [b'"m%d":{"name":"%b"}' % (n, b"x" * 2000) for n in range(2000)]
    rows.append(b'"m0":{"name":"again"}')
    text = b'{\n"machines":{\n' + b",\n".join(rows) + b"\n}\n}\n"
    (tmp_path / SINGLE).write_bytes(text)
    with pytest.raises(CorruptionError):
        await reopened(tmp_path)


@pytest.mark.parametrize(
    "name", ["two files in one", "something after the end", "a byte between sections"]
)
async def test_85_invalid_json_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / SINGLE).write_bytes(HOSTILE[name])
    with pytest.raises(CorruptionError):
        await reopened(tmp_path)


async def test_85_two_split_files_in_one(tmp_path: Path) -> None:
    (tmp_path / "machines.json").write_bytes(b'{\n"a":{}\n}\n{\n"b":{}\n}\n')
    with pytest.raises(CorruptionError):
        await reopened(tmp_path, "split_files")


@pytest.mark.parametrize("name", HOSTILE)
async def test_85_hostile_split_files(tmp_path: Path, name: str) -> None:
    """With one bad file the data of the other files are unchanged, and only a `StorageError` is raised."""
    async with open_json(tmp_path, "split_files") as store:
        await store.save_entity("machines", {"machine_id": "m"})
    machines = parsed(tmp_path / "machines.json")
    (tmp_path / "templates.json").write_bytes(HOSTILE[name])
    store = await open_json(tmp_path, "split_files").open()
    try:
        await _each_verb(store)
        wrote = await _succeeds(lambda: store.save_entity("templates", {"template_id": "new"}))
        assert await _succeeds(store.checkpoint) or not wrote
    finally:
        await store.close()
    assert parsed(tmp_path / "machines.json") == machines
    texts = [each.read_bytes() for each in tmp_path.glob("templates.json*")]
    assert HOSTILE[name] in texts


# -- hostile journals -------------------------------------------------------------------------


def _record(kind: int, payload: bytes, sequence: int) -> bytes:
    header = struct.pack(">4sB3xIIQ", b"HFJ1", kind, len(payload), zlib.crc32(payload), sequence)
    return header + struct.pack(">I", zlib.crc32(header)) + payload


@pytest.mark.parametrize(
    "record",
    [
        (9, b"{}"),
        (2, b"[]"),
        (2, b"{"),
        (2, b'{"templates":[]}'),
        (2, b'{"templates":{"t1":5}}'),
        (2, b'{"templates":{"t1":{"template_id":"t1"}}}'),
        (4, b"{}"),
        (4, b'{"files":[]}'),
        (4, b'{"files":{"request_database.json":{"digest":5}}}'),
        (1, b"{}"),
    ],
)
async def test_85_forged_records_with_correct_checksums(
    tmp_path: Path, record: tuple[int, bytes]
) -> None:
    """Records with invalid content but correct checksums also raise a typed error."""
    await _pending(tmp_path, "single_file")
    (journal,) = journals(tmp_path)
    with journal.open("ab") as file:
        file.write(_record(*record, sequence=3))
    store = await open_json(tmp_path).open()
    try:
        for verb in (
            lambda: store.get_entity("templates", "t1"),
            lambda: store.query_entities("templates"),
            lambda: store.save_entity("templates", {"template_id": "t1"}),
            store.checkpoint,
        ):
            await _succeeds(verb)
    finally:
        await abandon(store)


@pytest.mark.parametrize("first", [b"", b"HFJ", b"HFJ1" + b"\0" * 40, _record(2, b"{}", 0)])
async def test_85_a_journal_without_its_head_record(tmp_path: Path, first: bytes) -> None:
    await _pending(tmp_path, "single_file")
    (journal,) = journals(tmp_path)
    journal.write_bytes(first)
    with pytest.raises(CorruptionError, match="journal"):
        await reopened(tmp_path)


async def test_85_a_damaged_record_in_the_middle_is_not_the_end_of_the_journal(
    tmp_path: Path,
) -> None:
    """A damaged record is not the end of the journal: a writer must not append after it."""
    await _pending(tmp_path, "single_file")
    (journal,) = journals(tmp_path)
    data = bytearray(journal.read_bytes())
    data[-5] ^= 1
    journal.write_bytes(data)
    store = await open_json(tmp_path).open()
    with pytest.raises(CorruptionError):
        await store.save_entity("templates", {"template_id": "t9"})
    with pytest.raises(CorruptionError):
        await store.checkpoint()
    await store.close()
    assert journal.read_bytes() == bytes(data)


async def test_85_recovery_from_a_damaged_journal(tmp_path: Path) -> None:
    """`recover_from="file"` uses only the data file, as the error message says."""
    states = await _pending(tmp_path, "single_file")
    (journal,) = journals(tmp_path)
    data = bytearray(journal.read_bytes())
    data[-5] ^= 1
    journal.write_bytes(data)
    async with open_json(tmp_path) as store:
        with pytest.raises(CorruptionError, match="recover-from file"):
            await store.get_entity("templates", "t1")
        await store.checkpoint(recover_from="file")
        assert await whole(store) == states[0]
        assert await store.save_entity("templates", {"template_id": "t1"}) == 2
    assert (await reopened(tmp_path))["templates"]["t1"]["version"] == 2


# -- a right checksum over something that no store writes -------------------------------------


@both_layouts
@pytest.mark.parametrize("kind", [Kind.HEAD, Kind.FOLD])
async def test_a_record_that_cannot_be_decoded_names_its_remedy(
    tmp_path: Path, layout: str, kind: Kind
) -> None:
    states = await _pending(tmp_path, layout)
    (journal,) = journals(tmp_path)
    data = journal.read_bytes()
    if kind is Kind.HEAD:
        head = next(scan([data], "", 0, 0))[1]
        journal.write_bytes(record(kind, b'{"generation":[]}', 0) + data[head:])
    else:
        journal.write_bytes(data + record(kind, b'{"files":[]}', len(list(scan([data], "", 0, 0)))))
    async with open_json(tmp_path, layout) as store:
        with pytest.raises(
            CorruptionError, match="cannot be decoded.*--recover-from salvage"
        ) as caught:
            await store.get_entity("templates", "t1")
        assert str(journal) in str(caught.value)
        await store.checkpoint(recover_from="salvage")
        assert await whole(store) == states[0 if kind is Kind.HEAD else -1]


FORGED: Final = {
    "no key field": b'{"version":4,"name":"x"}',
    "the key of another": b'{"version":4,"template_id":"t2"}',
    "a key that is no string": b'{"version":4,"template_id":null}',
    "a version that is a string": b'{"version":"4","template_id":"t1"}',
    "a version that is a bool": b'{"version":true,"template_id":"t1"}',
    "a negative version": b'{"version":-4,"template_id":"t1"}',
    "two versions": b'{"version":4,"template_id":"t1","version":null}',
    "a number that is none": b'{"version":4,"template_id":"t1","n":1e999}',
}


def _forge(folder: Path, image: bytes) -> None:
    """Append a commit that makes `templates` `t1` this."""
    payload = b'{"templates":{\n"t1":' + image + b"\n}}"
    (journal,) = journals(folder)
    data = journal.read_bytes()
    sequence = sum(1 for _ in scan([data], "journal", 0, 0))
    journal.write_bytes(data + record(Kind.COMMIT, payload, sequence))


@both_layouts
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("image", FORGED.values(), ids=FORGED)
async def test_a_forged_entity_is_refused(
    tmp_path: Path, layout: str, folded: bool, image: bytes
) -> None:
    """Rule 14: the error names collection, id and file; other entities can be read; it can be repaired."""
    await _at_rest(tmp_path, layout)
    _forge(tmp_path, image)
    if folded:
        async with open_json(tmp_path, layout) as store:
            await store.checkpoint()
    named = rf"templates 't1'.*{tmp_path}"
    async with open_json(tmp_path, layout) as store:
        await store.save_entity("templates", {"template_id": "t2"})
        reads: list[Callable[[], Any]] = [
            lambda: store.get_entity("templates", "t1"),
            lambda: store.get_entities("templates", ["t2", "t1"]),
            lambda: store.query_entities("templates"),
            lambda: store.query_entities("templates", {"name": "x"}),
            lambda: store.query_entities("templates", order_by=["name"]),
            lambda: store.query_page("templates", limit=5),
            lambda: _streamed(store),
            lambda: _in_a_snapshot(store),
            lambda: _fetched_in_a_snapshot(store),
            lambda: store.update_entity("templates", "t1", {"name": "y"}),
            lambda: store.delete_entity("templates", "t1", expected_version=3),
            store.read_file,
        ]
        for read in reads:
            with pytest.raises(CorruptionError, match=named):
                await read()
        assert await store.get_entity("templates", "t2")
        await store.delete_entity("requests", "r1")
        assert await store.delete_entity("templates", "t1") is True
        assert list((await whole(store))["templates"]) == ["t2"]
        assert await store.save_entity("templates", {"template_id": "t1"}) == 1
    assert list((await reopened(tmp_path, layout))["templates"]) == ["t1", "t2"]


async def _streamed(store: JSONStorageStrategy) -> list[Entity]:
    return [each async for each in store.stream_entities("templates")]


async def _in_a_snapshot(store: JSONStorageStrategy) -> list[Record]:
    async with store._json.snapshot() as snapshot:
        return [each async for each in snapshot.select(Query("templates"))]


async def _fetched_in_a_snapshot(store: JSONStorageStrategy) -> list[Record | None]:
    async with store._json.snapshot() as snapshot:
        return await snapshot.fetch([Key("templates", "t1")])


async def test_an_index_survives_a_forged_entity(tmp_path: Path) -> None:
    """The index cannot index the entity; once the entity is deleted, the index contains nothing of it."""
    await _at_rest(tmp_path, "single_file")
    async with open_json(tmp_path) as store:
        assert len(await store.query_entities("requests", {"template_id": "t1"})) == 1
        (journal,) = journals(tmp_path)
        data = journal.read_bytes()
        payload = b'{"requests":{\n"r1":{"version":2,"request_id":"r1","template_id":1e999}\n}}'
        sequence = sum(1 for _ in scan([data], "journal", 0, 0))
        journal.write_bytes(data + record(Kind.COMMIT, payload, sequence))
        for _ in range(2):
            with pytest.raises(CorruptionError, match="requests 'r1'"):
                await store.query_entities("requests", {"template_id": "t1"})
        assert await store.delete_entity("requests", "r1")
        assert await store.query_entities("requests", {"template_id": "t1"}) == []
        await store.save_entity("requests", {"request_id": "r1", "template_id": "t1"})
        assert len(await store.query_entities("requests", {"template_id": "t1"})) == 1


@both_layouts
async def test_a_damaged_entity_can_be_deleted(tmp_path: Path, layout: str) -> None:
    """It is deleted without an expected version, because its version is unknown."""
    await _at_rest(tmp_path, layout)
    (file,) = [each for each in data_files(tmp_path) if each.name in (SINGLE, "requests.json")]
    file.write_bytes(file.read_bytes().replace(b'"template_id":"t1","', b'"status":NaN,"'))
    for each in journals(tmp_path):
        each.unlink()
    async with open_json(tmp_path, layout) as store:
        with pytest.raises(CorruptionError, match="or delete it"):
            await store.get_entity("requests", "r1")
        with pytest.raises(CorruptionError, match="or delete it"):
            await store.delete_entity("requests", "r1", expected_version=1)
        with pytest.raises(CorruptionError, match="r1"):
            await store.delete_entity("templates", "t1")  # which it may refer to
        async with store.begin_transaction() as tx:
            assert await tx.delete_entity("requests", "r1") is True
            assert await tx.get_entity("requests", "r1") is None
            assert await tx.delete_entity("requests", "r1") is False
        assert await store.delete_entity("templates", "t1") is True
    assert (await reopened(tmp_path, layout))["requests"] == {}


@both_layouts
@pytest.mark.parametrize("kind", ["head", "fold"])
@pytest.mark.parametrize("collection", [None, "templates", "strangers"])
@pytest.mark.parametrize("name", ["victim.json", "victim", SINGLE + ".journal.00000001", "a.gz"])
async def test_a_journal_that_names_an_unrelated_file_is_refused(
    tmp_path: Path, layout: str, kind: str, collection: str | None, name: str
) -> None:
    """The files that a journal names are read and replaced. With split files it may name those of
    collections that only other processes declare, with any valid name of a data file."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_text('{"x":{"y":1}}')
    if layout == "split_files" and collection == "strangers" and name.startswith("victim"):
        pytest.skip("such a file may be one of its own")
    state = FileState(None, 0, ours=True, collection=collection)
    records = [] if kind == "head" else [record(*control(Head(2, {})), 0)]
    body = Head(2, {name: state}) if kind == "head" else Fold({name: state})
    records.append(record(*control(body), len(records)))
    async with open_json(folder, layout) as store:
        for each in store._json.files.journals():
            store._json.files.journal(each).unlink()
        store._json.files.journal(2).write_bytes(b"".join(records))
        for verb in (
            lambda: store.get_entity("templates", "t"),
            lambda: store.save_entity("templates", {"template_id": "t"}),
            store.checkpoint,
        ):
            with pytest.raises((CorruptionError, ConfigurationError), match="names the file"):
                await verb()
        assert "names the file" in str((await store.health())["problems"])
        await abandon(store)
    if ".journal." not in name:
        assert (folder / name).read_text() == '{"x":{"y":1}}'
