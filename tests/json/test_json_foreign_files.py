"""Files written by other programs: invalid and repeated values, layouts, sizes, newer formats."""

from __future__ import annotations

import asyncio
import errno
import gzip
import hashlib
import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import Z_FULL_FLUSH, compressobj, crc32

import pytest

from hf_async_store import HOST_FACTORY, load_config
from hf_async_store.errors import (
    ConfigurationError,
    CorruptionError,
    DataFileConflictError,
    InvalidInputError,
    NewerFormatError,
    StorageError,
)
from hf_async_store.strategies.json.journal import FileState, Head, control, record
from tests.json.layouts import both_layouts
from tests.json.support import (
    SINGLE,
    WHOLE,
    Call,
    FileCalls,
    abandon,
    journals,
    open_json,
    parsed,
    reopened,
    temporary,
)

pytestmark = pytest.mark.hf_sampled(by="layout")

T = "templates"
BAD = {
    "high half": r'"\ud800"',
    "low half": r'"caf\udce9.txt"',
    "two high halves": r'"\ud800\ud800"',
    "cut high half": r'"\ud8001234"',
    "unknown escape": r'"\q"',
    "short escape": r'"\u12"',
    "control character": '"a\x01b"',
    "NaN": "NaN",
    "minus infinity": "-Infinity",
    "U+0000": r'"a\u0000b"',
    "no UTF-8": '"\udcff\udcfe"',
    "named in it": r'{"\udfff": 1}',
    "deep": "[" * 40 + "]" * 40,
}


def file_of(layout: str, entities: str, *, wrapped: bool = False) -> str:
    if layout == "split_files":
        return f'{{"templates": {entities}}}' if wrapped else entities
    return f'{{"about": "me", "templates": {entities}, "requests": {{}}}}'


def put(folder: Path, layout: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / (SINGLE if layout == "single_file" else "templates.json")
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


@pytest.mark.parametrize("shape", ["flat", "wrapped", "lines"])
@pytest.mark.parametrize("kind", BAD)
@both_layouts
async def test_an_invalid_value_affects_only_its_entity(
    tmp_path: Path, layout: str, kind: str, shape: str
) -> None:
    between = ",\n" if shape == "lines" else ", "
    entities = between.join(
        (
            '"t-1":{"template_id":"t-1"}',
            f'"bad":{{"template_id":"bad","name":{BAD[kind]}}}',
            '"t-2":{"template_id":"t-2","name":"\\ud83d\\ude00 \\" \\\\ {"}',
        )
    )
    entities = f"{{\n{entities}\n}}" if shape == "lines" else f"{{{entities}}}"
    path = put(tmp_path, layout, file_of(layout, entities, wrapped=shape == "wrapped"))
    for turn in range(3):
        async with open_json(tmp_path, layout) as store:
            found = await store.get_entity(T, "t-2")
            assert found is not None
            assert found["name"] == '\U0001f600 " \\ {'
            assert await store.get_entity(T, "t-1") is not None
            for verb in (
                lambda: store.get_entity(T, "bad"),
                lambda: store.query_entities(T),
                lambda: store.update_entity(T, "bad", {"name": "x"}),
            ):
                with pytest.raises(CorruptionError, match=r"templates 'bad' in ") as caught:
                    await verb()
                assert str(path) in str(caught.value)
                assert "truncated" not in str(caught.value)
            health = await store.health()
            assert not health["ok"]
            assert "'bad'" in str(health["problems"])
            # Every compaction keeps it unchanged.
            assert await store.save_entity(T, {"template_id": "t-1"}) == turn + 1
            await store.checkpoint()
    kept = path.read_bytes()
    assert BAD[kind].encode(errors="surrogateescape").replace(b" ", b"") in kept.replace(b" ", b"")


async def test_a_bare_newline_is_escaped_by_a_compaction(tmp_path: Path) -> None:
    """An entity must be stored on one line; until the compaction the newline is reported."""
    put(tmp_path, "single_file", file_of("single_file", '{"t": {"name": "a\nb"}, "u":\n{"x":\n1}}'))
    async with open_json(tmp_path) as store:
        with pytest.raises(CorruptionError, match="control character"):
            await store.get_entity(T, "t")
        await store.update_entity(T, "u", {"name": "x"})
        await store.checkpoint()
    assert (await reopened(tmp_path))[T]["t"]["name"] == "a\nb"


@both_layouts
async def test_the_neighbours_of_an_invalid_entity_are_written(tmp_path: Path, layout: str) -> None:
    entities = '{"t-1": {"template_id": "t-1"}, "bad": {"template_id": "bad", "name": "\\ud800"}}'
    put(tmp_path, layout, file_of(layout, entities))
    async with open_json(tmp_path, layout) as store:
        outcomes = await asyncio.gather(
            store.update_entity(T, "t-1", {"name": "a"}),
            store.update_entity(T, "bad", {"name": "b"}),
            store.save_entity(T, {"template_id": "t-2"}),
            store.save_entity(T, {"template_id": "t-3", "name": "\ud800"}),
            store.create_entity(T, {"template_id": "t-4"}),
            return_exceptions=True,
        )
        assert isinstance(outcomes[1], CorruptionError)
        assert isinstance(outcomes[3], InvalidInputError)
        assert [each for each in outcomes if not isinstance(each, BaseException)] == [1, 1, 1]
        for key in ("t-1", "t-2", "t-4"):
            assert await store.get_entity(T, key) is not None


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"templates": {"t\\ud800": {}}}', "name .* after byte"),
        ('{"templates": {"a": {}, "b": {"x": "y}}}', "JSON object"),
        ('{"templates": {"a": {"name": "x", "b" 1}, "c": {"name": NaN}}}', "JSON object"),
        ('{"templates": {"a": {"name": nan}}}', "JSON object"),
        ('{"templates": {"a": {"name": "\\ud800"}}, "templates": {}}', "twice"),
        ('{"templates": {"a": {"name": "\\ud800"}, "a": {}}}', "twice"),
        ('{"templates": {"a": {"name": "\\ud800"}}} x', "JSON object"),
        ('{"templates": {"a": {"name": "\\ud800"}}', "JSON object"),
    ],
)
async def test_a_file_with_invalid_structure_is_refused_completely(
    tmp_path: Path, text: str, match: str
) -> None:
    """The entities beside a damaged one must not be taken for missing."""
    path = put(tmp_path, "single_file", text)
    async with open_json(tmp_path) as store:
        for verb in (
            lambda: store.get_entity(T, "a"),
            lambda: store.save_entity(T, {"template_id": "a"}),
        ):
            with pytest.raises(CorruptionError, match=match):
                await verb()
    assert path.read_text() == text


async def test_health_keeps_no_second_form_of_entities(tmp_path: Path) -> None:
    entities = {f"t-{each}": {"template_id": f"t-{each}"} for each in range(300)}
    put(tmp_path, "single_file", file_of("single_file", json.dumps(entities)))
    async with open_json(tmp_path) as store:
        assert (await store.health())["problems"] == []
        state = await store._json.follower.current()
        assert not state.sections[T]._normalized


# -- duplicates -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner",
    [
        '{"template_id": "t", "name": "a", "name": "b"}',
        '{"template_id": "t", "name": "a", "n\\u0061me": "a"}',
        '{"template_id":"t","deep":[{"x":1,"y":{"z":1e2,"z":100.0}}]}',
        '{"template_id":"t","version":1,"version":2}',
        '{"version":1,"template_id":"t","template_id":"t"}',
    ],
)
@both_layouts
async def test_a_duplicate_field_is_reported(tmp_path: Path, layout: str, inner: str) -> None:
    put(tmp_path, layout, file_of(layout, f'{{"t": {inner}, "u": {{"template_id": "u"}}}}'))
    for _ in range(2):
        async with open_json(tmp_path, layout) as store:
            with pytest.raises(CorruptionError, match="twice"):
                await store.get_entity(T, "t")
            with pytest.raises(CorruptionError, match="twice"):
                await store.update_entity(T, "t", {"name": "c"})
            await store.update_entity(T, "u", {"name": "c"})
            await store.checkpoint()
            assert not (await store.health())["ok"]


@pytest.mark.parametrize(
    "text",
    [
        '{"templates": {"t": {"template_id": "t"}, "t": {"template_id": "t"}}}',
        '{"templates": {"t": {"template_id": "t"}}, "templates": {}}',
        '{"templates": {}, "jobs": {}, "jobs": {}}',
        '{\n"templates":{\n"t":{"a":1},\n"t":{"a":2}\n}\n}\n',
        '{\n"templates":{\n"t":{"a":1}\n},\n"templates":{\n"t":{"a":2}\n}\n}\n',
    ],
)
async def test_duplicate_ids_and_sections_are_refused(tmp_path: Path, text: str) -> None:
    put(tmp_path, "single_file", text)
    async with open_json(tmp_path) as store:
        with pytest.raises(CorruptionError, match="twice"):
            await store.get_entity(T, "t")


async def test_unusual_forms_of_json_are_accepted(tmp_path: Path) -> None:
    """Other forms of escapes, spaces and numbers are accepted, after a second check."""
    inner = (
        '{"template_id": "t", "a": 1e2, "b": "\\u0061\\/", "c": [1.50, {"a": 1, "b": 2}], "d": -0}'
    )
    put(tmp_path, "single_file", file_of("single_file", f'{{"t": {inner}}}'))
    found = (await reopened(tmp_path))[T]["t"]
    assert {**found, "version": 0} == {"version": 0, **json.loads(inner)}


# -- sizes ------------------------------------------------------------------------------------


async def test_a_small_file_that_unpacks_to_a_huge_one(tmp_path: Path) -> None:
    path = tmp_path / f"{SINGLE}.gz"
    packer = compressobj(wbits=31)
    with path.open("wb") as file:
        file.write(packer.compress(b'{"templates":{"t":{"name":"') + packer.flush(Z_FULL_FLUSH))
        # Packed once, and there is no end: after a full flush, nothing depends on what is before it.
        file.write((packer.compress(b"a" * (1 << 20)) + packer.flush(Z_FULL_FLUSH)) * 300)
    tracemalloc.start()
    try:
        async with open_json(tmp_path, enable_compression=True) as store:
            with pytest.raises(CorruptionError, match="decompresses to more than"):
                await store.get_entity(T, "t")
            with pytest.raises(CorruptionError, match="decompresses to more than"):
                await store.save_entity(T, {"template_id": "t"})
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


async def test_a_file_of_the_store_may_unpack_to_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_async_store.strategies.json import files

    monkeypatch.setattr(files, "_MIN_DECOMPRESS_LIMIT", 1 << 10)
    entities = [{"template_id": f"t-{each}", "name": "a" * 300_000} for each in range(3)]
    async with open_json(tmp_path, enable_compression=True) as store:
        await store.save_entities(T, entities)
        await store.checkpoint()
    path = tmp_path / f"{SINGLE}.gz"
    assert path.stat().st_size * 100 < 900_000
    assert len((await reopened(tmp_path, enable_compression=True))[T]) == 3
    for each in journals(tmp_path):
        each.unlink()  # without the journal it is treated like a file of another program
    with pytest.raises(CorruptionError, match="decompresses to more than"):
        await reopened(tmp_path, enable_compression=True)


async def test_a_packed_file_of_several_members(tmp_path: Path) -> None:
    text = file_of("single_file", '{"t": {"template_id": "t"}}').encode()
    path = tmp_path / f"{SINGLE}.gz"
    path.write_bytes(gzip.compress(text[:20]) + gzip.compress(text[20:]) + bytes(10))
    assert (await reopened(tmp_path, enable_compression=True))[T].keys() == {"t"}
    for damaged in (gzip.compress(text)[:-5], b"", gzip.compress(text) + b"rest", bytes(20)):
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError):
            await reopened(tmp_path, enable_compression=True)


# -- newer formats ----------------------------------------------------------------------------


def _record(magic: bytes, kind: int, payload: bytes, sequence: int) -> bytes:
    head = struct.pack(">4sB3xIIQ", magic, kind, len(payload), crc32(payload), sequence)
    return head + struct.pack(">I", crc32(head)) + payload


@pytest.mark.parametrize("what", ["kind", "magic", "whole"])
@both_layouts
async def test_a_journal_of_a_newer_release_is_not_reported_as_damaged(
    tmp_path: Path, layout: str, what: str
) -> None:
    async with open_json(tmp_path, layout) as store:
        await store.save_entity(T, {"template_id": "t"})
        await store.checkpoint()
    path = journals(tmp_path)[-1]
    records = len(path.read_bytes().split(b"HFJ1")) - 1
    more = _record(b"HFJ1" if what == "kind" else b"HFJ2", 9, b"{}", records)
    with path.open("wb" if what == "whole" else "ab") as file:
        file.write(more)
    before = path.read_bytes()
    async with open_json(tmp_path, layout) as store:
        for verb in (
            lambda: store.get_entity(T, "t"),
            lambda: store.save_entity(T, {"template_id": "t"}),
            store.checkpoint,
            lambda: store.checkpoint(recover_from="salvage"),
        ):
            with pytest.raises(NewerFormatError, match="newer release"):
                await verb()
    assert path.read_bytes() == before


# -- files stay as their owner wrote them ------------------------------------------------------


def _wrapped(folder: Path, number: int = 3) -> Path:
    entities = {f"m-{each}": {"machine_id": f"m-{each}"} for each in range(number)}
    path = folder / "machines.json"
    path.write_text(json.dumps({"machines": entities}))
    return path


def _relaxed(folder: Path, layout: str = "split_files", **settings: Any) -> Any:
    return open_json(folder, layout, enforce_references=False, **settings)


async def test_split_files_stay_wrapped(tmp_path: Path) -> None:
    """The program that wrote the wrapped file can read it after a compaction."""
    path = _wrapped(tmp_path)
    async with _relaxed(tmp_path) as store:
        await store.update_entity("machines", "m-0", {"status": "x"})
        await store.checkpoint()
    assert parsed(path)["machines"].keys() == {"m-0", "m-1", "m-2"}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
async def test_a_wrapped_file_stays_wrapped_with_its_other_sections(
    tmp_path: Path, compressed: bool, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a child process reads it, and if its journal is lost."""
    from hf_async_store.strategies.json import recovery

    if large:
        monkeypatch.setattr(recovery, "_LARGE_FILE", 10)
    path = _wrapped(tmp_path)
    path.write_text(path.read_text().replace("{", '{"about": [1.50, "me"], ', 1))
    for turn in range(3):
        async with _relaxed(tmp_path, enable_compression=compressed) as store:
            assert await store.count_entities("machines") == 3
            await store.update_entity("machines", f"m-{turn}", {"status": "x"})
            await store.checkpoint()
            assert (await store.health())["undeclared_sections"] == ["about"]
        [file] = [each for each in tmp_path.glob("machines.json*") if ".bak." not in each.name]
        found = parsed(file)
        assert found.keys() == {"machines", "about"}
        assert [each.get("status") for each in found["machines"].values()].count("x") == turn + 1
        if turn:
            for each in journals(tmp_path):
                each.unlink()


async def test_processes_that_do_not_declare_a_collection_keep_its_layout(tmp_path: Path) -> None:
    path = _wrapped(tmp_path)
    async with _relaxed(tmp_path) as store:
        await store.update_entity("machines", "m-0", {"status": "x"})
        await abandon(store)
    only_templates = [each for each in HOST_FACTORY if each.name == "templates"]
    async with _relaxed(tmp_path, collections=only_templates) as store:
        await store.save_entity(T, {"template_id": "t"})
        await store.checkpoint()
    found = parsed(path)
    assert found.keys() == {"machines"}
    assert found["machines"].keys() == {"m-0", "m-1", "m-2"}
    assert found["machines"]["m-0"]["status"] == "x"
    assert found["machines"]["m-1"] == {"machine_id": "m-1"}


@pytest.mark.parametrize("compacting", ["at once", "after a commit of the other process"])
async def test_processes_that_do_not_declare_a_collection_find_its_layout_in_an_edited_file(
    tmp_path: Path, compacting: str
) -> None:
    path = _wrapped(tmp_path)
    async with _relaxed(tmp_path) as store:
        await store.update_entity("machines", "m-0", {"status": "x"})
        await store.checkpoint()
    found = parsed(path)
    found["machines"]["m-1"]["status"] = "by hand"
    path.write_text(json.dumps(found))
    only_templates = [each for each in HOST_FACTORY if each.name == "templates"]
    async with _relaxed(tmp_path, collections=only_templates) as store:
        if compacting != "at once":
            await store.save_entity(T, {"template_id": "t"})
            async with _relaxed(tmp_path) as declaring:
                await declaring.update_entity("machines", "m-0", {"status": "y"})
                await abandon(declaring)
        await store.checkpoint()
    assert parsed(path)["machines"].keys() == {"m-0", "m-1", "m-2"}
    async with _relaxed(tmp_path) as store:
        assert await store.count_entities("machines") == 3
        assert (await store.get_entity("machines", "m-1") or {})["status"] == "by hand"


async def test_a_file_that_a_process_took_for_flat_is_recognised(tmp_path: Path) -> None:
    """The store wrote it, and its journal says that it has one entity, which is in fact the wrapper."""
    path = _wrapped(tmp_path)
    path.write_text("{\n" + path.read_text()[1:-1] + "\n}\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    content = FileState(digest, 1, ours=True, collection="machines", key="machine_id")
    head = record(*control(Head(1, {path.name: content})), 0)
    (tmp_path / "store.journal.00000001").write_bytes(head)
    async with _relaxed(tmp_path) as store:
        assert await store.count_entities("machines") == 3
        await store.update_entity("machines", "m-0", {"status": "x"})
        await store.checkpoint()
    assert parsed(path)["machines"].keys() == {"m-0", "m-1", "m-2"}


@pytest.mark.parametrize("order", ["wrapped first", "flat first"])
async def test_a_file_that_mixes_two_layouts_is_refused(tmp_path: Path, order: str) -> None:
    flat = {f"m-{each}": {"machine_id": f"m-{each}"} for each in range(3)}
    wrapped = {"machines": {"m-9": {"machine_id": "m-9"}}}
    text = json.dumps({**wrapped, **flat} if order == "wrapped first" else {**flat, **wrapped})
    path = tmp_path / "machines.json"
    path.write_text(text)
    async with _relaxed(tmp_path) as store:
        with pytest.raises(CorruptionError, match="layout"):
            await store.count_entities("machines")
        with pytest.raises(CorruptionError, match="layout"):
            await store.save_entity("machines", {"machine_id": "m-9"})
    assert path.read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        '{"machines":{"a":{"machine_id":"a"}},"b":{"status":"x"}}',
        '{\n"machines":{\n"a":{"machine_id":"a"}\n},\n"b":{"status":"x"}\n}\n',
    ],
)
async def test_an_entity_without_its_key_beside_wrapped_ones_is_refused(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "machines.json"
    path.write_text(text)
    async with _relaxed(tmp_path) as store:
        with pytest.raises(CorruptionError, match="entity 'b' beside it"):
            await store.count_entities("machines")
    assert path.read_text() == text


async def test_an_error_in_a_large_file_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_async_store.strategies.json import recovery

    monkeypatch.setattr(recovery, "_LARGE_FILE", 10)
    path = _wrapped(tmp_path)
    path.write_text(path.read_text()[:-1])
    async with _relaxed(tmp_path) as store:
        with pytest.raises(CorruptionError) as caught:
            await store.count_entities("machines")
        assert str(path) in str(caught.value)


@both_layouts
async def test_unchanged_entities_keep_their_form(tmp_path: Path, layout: str) -> None:
    """Other programs can parse `+00:00`."""
    at = "2026-01-02T03:04:05.123456+00:00"
    texts = ", ".join(
        f'"{each}": {{"template_id": "{each}", "created_at": "{at}"}}' for each in ("t", "u")
    )
    path = put(tmp_path, layout, file_of(layout, f"{{{texts}}}"))
    async with open_json(tmp_path, layout) as store:
        await store.query_entities(T)
        await store.update_entity(T, "t", {"name": "x"})
        await store.checkpoint()
    found = parsed(path)[T] if layout == "single_file" else parsed(path)
    assert found["u"] == {"template_id": "u", "created_at": at}


@both_layouts
@pytest.mark.parametrize("when", ["at close", "after each commit"])
async def test_update_files_determines_when_data_files_are_updated(
    tmp_path: Path, layout: str, when: str
) -> None:
    """Also if they are large, so that other programs can read them while the journal is empty."""
    entities = {
        f"t-{each}": {"template_id": f"t-{each}", "name": "a" * 999} for each in range(2000)
    }
    path = put(tmp_path, layout, file_of(layout, json.dumps(entities)))
    async with open_json(tmp_path, layout, update_files=when) as store:
        await store.update_entity(T, "t-7", {"name": "x"})
        if when == "after each commit":
            found = parsed(path)[T] if layout == "single_file" else parsed(path)
            assert found["t-7"]["name"] == "x"
    found = parsed(path)[T] if layout == "single_file" else parsed(path)
    assert found["t-7"]["name"] == "x"


@both_layouts
async def test_files_are_updated_after_transactions_and_under_a_lock(
    tmp_path: Path, layout: str
) -> None:
    def names() -> list[str]:
        path = tmp_path / (SINGLE if layout == "single_file" else "templates.json")
        found = parsed(path)[T] if layout == "single_file" else parsed(path)
        return [each["name"] for each in found.values()]

    async with open_json(tmp_path, layout, update_files="after each commit") as store:
        assert "after each commit" in str(store.describe())
        await store.save_entity(T, {"template_id": "t", "name": "a"})
        assert names() == ["a"]
        async with store.begin_transaction() as tx:
            await tx.update_entity(T, "t", {"name": "b"})
            await tx.save_entity("requests", {"request_id": "r", "template_id": "t"})
        assert names() == ["b"]
        async with store.acquire_write_lock():
            await store.write_file({T: {"t": {"template_id": "t", "name": "c"}}})
            assert names() == ["c"]
        assert len(journals(tmp_path)) == 1
        assert not temporary(tmp_path)


@both_layouts
async def test_a_commit_succeeds_if_the_files_cannot_be_updated(
    tmp_path: Path, layout: str
) -> None:
    def full(call: Call, size: int) -> int:
        if call.name == "fdatasync" and call.path.endswith(".tmp"):
            raise OSError(errno.ENOSPC, "no room for a data file")
        return WHOLE

    path = tmp_path / (SINGLE if layout == "single_file" else "templates.json")
    async with open_json(tmp_path, layout, update_files="after each commit") as store:
        await store.save_entity(T, {"template_id": "t", "name": "a"})
        before = path.read_bytes()
        with FileCalls(tmp_path, full):
            for each in "bcd":
                await store.update_entity(T, "t", {"name": each})
            assert path.read_bytes() == before
            assert "no room" in str((await store.health())["problems"])
        assert len(journals(tmp_path)) == 2, "each failure leaves a journal"
        await store.update_entity(T, "t", {"name": "e"})
        assert (await store.health())["problems"] == []
        assert b'"name":"e"' in path.read_bytes()
        assert len(journals(tmp_path)) == 1


async def _large(store: Any) -> None:
    """Save so much that the data files are not compacted whenever the store is idle."""
    await store.save_entities(
        T, [{"template_id": f"t-{each}", "name": "a" * 999} for each in range(1500)]
    )


async def _soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.05)


async def test_a_failed_update_of_the_files_is_repeated(tmp_path: Path) -> None:
    def full(call: Call, size: int) -> int:
        if call.name == "fdatasync" and call.path.endswith(".tmp"):
            raise OSError(errno.ENOSPC, "no room for a data file")
        return WHOLE

    path = tmp_path / SINGLE
    async with open_json(tmp_path, update_files="after each commit") as store:
        await _large(store)
        with FileCalls(tmp_path, full):
            await store.update_entity(T, "t-7", {"name": "x"})
            failures = store._json.compactor._failures
            await _soon(lambda: store._json.compactor._failures > failures)
        assert b'"name":"x"' not in path.read_bytes()
        await _soon(lambda: b'"name":"x"' in path.read_bytes())
        await _soon(lambda: len(journals(tmp_path)) == 1)
        await _soon(lambda: not store._json.compactor._failures)  # a moment later
        assert (await store.health())["problems"] == []


@pytest.mark.parametrize("moment", ["pwrite", "fdatasync"])
async def test_a_cancelled_update_of_the_files_is_repeated(tmp_path: Path, moment: str) -> None:
    path = tmp_path / SINGLE
    async with open_json(tmp_path, update_files="after each commit") as store:
        await _large(store)
        loop = asyncio.get_running_loop()

        async def transaction() -> None:
            async with store.begin_transaction() as tx:
                await tx.update_entity(T, "t-7", {"name": "x"})

        commit = asyncio.create_task(transaction())

        def cancel(call: Call, size: int) -> int:
            suffix = ".tmp" if moment == "fdatasync" else ""
            if call.name == moment and call.path.endswith(suffix):
                loop.call_soon_threadsafe(commit.cancel)
                time.sleep(0.1)
            return WHOLE

        with FileCalls(tmp_path, cancel), pytest.raises(asyncio.CancelledError):
            await commit
        assert (await store.get_entity(T, "t-7") or {})["name"] == "x"
        await _soon(lambda: b'"name":"x"' in path.read_bytes())
        await _soon(lambda: len(journals(tmp_path)) == 1)
        assert not temporary(tmp_path)


async def test_health_while_commits_update_the_files(tmp_path: Path) -> None:
    """An update that is not complete yet is no problem, in any process."""

    async def saves(store: Any) -> None:
        for number in range(30):
            await store.save_entity(T, {"template_id": "u", "name": str(number)})

    async with (
        open_json(tmp_path, update_files="after each commit") as store,
        open_json(tmp_path) as other,
    ):
        await _large(store)
        saving = asyncio.create_task(saves(store))
        while not saving.done():
            for each in (store, other):
                assert (await each.health())["problems"] == []
        await saving


@both_layouts
async def test_a_commit_that_updates_the_files_removes_old_temporary_files(
    tmp_path: Path, layout: str
) -> None:
    name = SINGLE if layout == "single_file" else "templates.json"
    async with open_json(tmp_path, layout, update_files="after each commit") as store:
        await store.save_entity(T, {"template_id": "t"})
        left = tmp_path / f".{name}.0123abcd.tmp"
        left.write_bytes(b"of a process that was killed")
        await store.save_entity(T, {"template_id": "t"})
        assert not left.exists()


async def test_a_commit_that_updates_the_files_is_cancelled_at_each_step(tmp_path: Path) -> None:
    """Afterwards it is complete or without effect, and nothing is left behind."""
    loop = asyncio.get_running_loop()
    path = tmp_path / "templates.json"
    async with open_json(tmp_path, "split_files", update_files="after each commit") as store:
        await store.save_entity(T, {"template_id": "t"})
        store._json.compactor.consider = lambda: None  # type: ignore[method-assign]

        async def transaction(name: str) -> None:
            async with store.begin_transaction() as tx:
                await tx.update_entity(T, "t", {"name": name})
                await tx.save_entity("machines", {"machine_id": "m", "name": name})

        step, calls, outcomes = 0, None, set()
        while calls is None or calls.count >= step:
            commit = asyncio.create_task(transaction(str(step)))

            def cancel(call: Call, size: int, number: int = step, task: Any = commit) -> int:
                if call.number == number:
                    loop.call_soon_threadsafe(task.cancel)
                    time.sleep(0.01)
                return WHOLE

            with FileCalls(tmp_path, cancel) as calls:
                await asyncio.wait([commit])
            now = (await store.get_entity(T, "t") or {}).get("name")
            assert (await store.get_entity("machines", "m") or {}).get("name") == now
            outcomes.add((commit.cancelled(), now == str(step)))
            assert commit.cancelled() or now == str(step)
            assert not temporary(tmp_path)
            await store.checkpoint()
            assert parsed(path)["t"].get("name") == now
            assert (await store.health())["problems"] == []
            step += 1
        assert step > 15
        assert (True, True) in outcomes, "one was cancelled after its record was written"


async def test_a_checkpoint_ends_if_commits_update_the_files_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        open_json(tmp_path, lock_timeout=1) as store,
        open_json(tmp_path, update_files="after each commit") as other,
    ):
        await store.save_entity(T, {"template_id": "t", "name": "a"})
        real = store._json.compactor._write

        async def write(*args: Any) -> Any:
            written = await real(*args)
            await other.save_entity(T, {"template_id": "u"})
            await store.save_entity(T, {"template_id": "v"})
            return written

        monkeypatch.setattr(store._json.compactor, "_write", write)
        try:
            await store.checkpoint()
        finally:
            monkeypatch.undo()
        assert '"name":"a"' in (tmp_path / SINGLE).read_text()


async def test_a_file_that_is_replaced_while_a_commit_updates_it_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / SINGLE
    async with open_json(tmp_path, update_files="after each commit") as store:
        await store.save_entity(T, {"template_id": "t", "name": "a"})
        real = store._json.compactor._write

        async def write(*args: Any) -> Any:
            written = await real(*args)
            path.write_text(path.read_text().replace('"name":"a"', '"name":"by hand"'))
            return written

        monkeypatch.setattr(store._json.compactor, "_write", write)
        await store.update_entity(T, "t", {"name": "b"})
        monkeypatch.undo()
        assert '"name":"by hand"' in path.read_text()
        with pytest.raises(DataFileConflictError, match="--recover-from file"):
            await store.save_entity(T, {"template_id": "u"})
        await store.checkpoint(recover_from="journal")
        assert (await store.get_entity(T, "t") or {})["name"] == "b"
        assert not temporary(tmp_path)


@pytest.mark.parametrize("value", ["never", "", True])
def test_an_invalid_value_of_update_files_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ConfigurationError, match="update_files"):
        load_config({"json_strategy": {"update_files": value}})


def test_errors_derive_from_storage_error() -> None:
    assert issubclass(NewerFormatError, StorageError)
    assert not issubclass(NewerFormatError, CorruptionError)
