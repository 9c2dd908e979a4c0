"""The three existing layouts: a single file, split files that wrap their collection, and flat ones.

The tests use the data that `HF_ASYNC_STORE_REAL_DATA` names; if it is not set, generated data in the
same layouts. The test ids contain which of them is used.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest

from hf_async_store import HOST_FACTORY, Collection, open_store
from hf_async_store.errors import UnknownCollectionError
from tests.json.support import (
    SINGLE,
    abandon,
    data_files,
    journals,
    open_files,
    open_json,
    parsed,
    temporary,
    whole,
)

pytestmark = pytest.mark.hf_sampled(by="layout")

REAL: Final = os.environ.get("HF_ASYNC_STORE_REAL_DATA")
SOURCE: Final = "real" if REAL else "generated"
SHAPES: Final = {
    "single_file": "single_file",
    "split_files_wrapped": "split_files",
    "split_files_flat": "split_files",
}
KEYS: Final = {each.name: each.key for each in HOST_FACTORY}
shapes = pytest.mark.parametrize("shape", SHAPES, ids=[f"{each}-{SOURCE}" for each in SHAPES])

Found = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with data in the three layouts, which the tests may modify."""
    folder = tmp_path / "field"
    if REAL:
        for shape in SHAPES:
            shutil.copytree(Path(REAL) / shape, folder / shape)
    else:
        _generate(folder)
    for each in folder.rglob("*"):
        each.chmod(0o755 if each.is_dir() else 0o644)
    return folder


def _generate(folder: Path) -> None:
    """Data like real ones: version 0, null and missing timestamps, with or without zone, any text."""
    templates = {
        f"t-{n}": {
            "template_id": f"t-{n}",
            "name": f"Fleet é {n} \U0001f680",
            "created_at": f"2026-07-06T22:07:11.80671{n}",
            "machine_types": {"t3.medium": n, "t3.xlarge": 4},
            "max_spot_price": 0.1 * n,
            "attributes": {"deep": [{"list": [1, 1.0, None, True, "1"]}]},
        }
        for n in range(5)
    }
    requests = {
        f"req-{n}": {
            "request_id": f"req-{n}",
            "template_id": f"t-{n % 5}",
            "status": "failed",
            "message": None,
            "machine_ids": [f"i-{n}{k}" for k in range(5)],
            "created_at": "2026-07-06T22:07:11+00:00",
            "updated_at": None,
            "version": 0,
        }
        for n in range(8)
    }
    machines = {
        f"i-{n}": {
            "machine_id": f"i-{n}",
            "request_id": f"req-{n % 8}",
            "name": 'quote " backslash \\ slash / tab \t',
            "status": "running",
            "metadata": {"empty": {}, "none": [], "big": 2**62, "e": 1e-7},
            "created_at": "2026-07-06T23:07:11.5+01:00",
            "updated_at": None,
            "version": n % 3,
        }
        for n in range(120)
    }
    found = {"templates": templates, "requests": requests, "machines": machines}
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True)
    _write(folder / "single_file" / SINGLE, found)
    for name, entities in found.items():
        _write(folder / "split_files_wrapped" / f"{name}.json", {name: entities})
        _write(folder / "split_files_flat" / f"{name}.json", entities)


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _read(folder: Path) -> Found:
    """The entities of a folder, read with a plain JSON parser."""
    single = folder / SINGLE
    if single.exists():
        return {name: parsed(single)[name] for name in KEYS}
    found = {name: parsed(folder / f"{name}.json") for name in KEYS}
    return {name: each.get(name, each) for name, each in found.items()}


def _differences(found: Mapping[str, Mapping[str, Any]], wanted: Found) -> list[str]:
    """Differences in value or type; timestamps are compared as instants."""
    problems = []
    for name, entities in wanted.items():
        if found[name].keys() != entities.keys():
            problems.append(f"{name}: other ids")
            continue
        declared = next(each for each in HOST_FACTORY if each.name == name)
        times = {each.name for each in declared.fields.values() if each.type == "timestamp"}
        for entity_id, entity in entities.items():
            expected = {"version": 0, **entity}
            now = found[name][entity_id]
            if now.keys() != expected.keys():
                problems.append(f"{name} {entity_id}: fields {now.keys() ^ expected.keys()}")
            problems += [
                f"{name} {entity_id}.{field}: {now[field]!r} for {value!r}"
                for field, value in expected.items()
                if field in now and not _same(now[field], value, moment=field in times)
            ]
    return problems


def _same(now: Any, before: Any, *, moment: bool) -> bool:
    if moment and isinstance(before, str):
        return bool(len(now) == 27 and now.endswith("Z") and _instant(now) == _instant(before))
    return repr(now) == repr(before)


def _instant(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in sorted(folder.iterdir())}


@shapes
async def test_every_entity_is_read_as_it_is(data: Path, shape: str) -> None:
    folder = data / shape
    before = _bytes_of(folder)
    wanted = _read(folder)
    assert sum(map(len, wanted.values())) > 100
    async with open_json(folder, SHAPES[shape]) as store:
        found = await whole(store)
        assert _differences(found, wanted) == []
        for name, entities in wanted.items():
            ids = list(entities)
            assert await store.get_entities(name, ids) == [found[name][each] for each in ids]
            assert await store.count_entities(name) == len(ids)
        assert (await store.health())["problems"] == []
    after = {name: text for name, text in _bytes_of(folder).items() if ".lock" not in name}
    assert after == before, "reading changed the files"


@shapes
async def test_write_compact_and_reopen(data: Path, shape: str) -> None:
    folder = data / shape
    wanted = _read(folder)
    machine = next(iter(wanted["machines"].values()))
    at = int(machine.get("version", 0))
    async with open_json(folder, SHAPES[shape]) as store:
        version = await store.update_entity(
            "machines", machine["machine_id"], {"name": "changed"}, expected_version=at
        )
        assert version == at + 1
        created = (await store.get_entity("machines", machine["machine_id"]) or {})["created_at"]
        await store.save_entity("templates", {"template_id": "new ünïcode"})
        await store.checkpoint()
        assert len(journals(folder)) == 1
    assert not temporary(folder)
    async with open_json(folder, SHAPES[shape]) as store:
        found = await whole(store)
    changed = found["machines"][machine["machine_id"]]
    assert (changed["name"], changed["version"]) == ("changed", at + 1)
    assert changed["created_at"] == created
    assert found["templates"].pop("new ünïcode")["version"] == 1
    found["machines"][machine["machine_id"]] = {
        **changed,
        **{name: machine[name] for name in ("name", "updated_at") if name in machine},
        "version": at,
    }
    assert _differences(found, wanted) == []
    # After the compaction the file is plain JSON, one entity per line, with all data.
    at_rest = _read(folder)
    assert at_rest["machines"][machine["machine_id"]]["version"] == at + 1
    for file in data_files(folder):
        lines = file.read_bytes().splitlines()
        assert len(lines) >= len(parsed(file))
        assert max(map(len, lines)) < file.stat().st_size or len(lines) < 4


@shapes
async def test_a_compaction_into_the_other_layout(data: Path, shape: str) -> None:
    """The backup of the first compaction is the original file, byte for byte."""
    folder = data / shape
    before = {each.name: each.read_bytes() for each in data_files(folder)}
    async with open_json(folder, SHAPES[shape], enable_compression=True) as store:
        for name, key in KEYS.items():
            await store.save_entity(name, {key: "new"})
        await store.checkpoint()
    packed = data_files(folder)
    assert {each.name for each in packed} == {f"{name}.gz" for name in before}
    for name, text in before.items():
        (backup,) = folder.glob(f"{name}.bak.*")
        assert backup.read_bytes() == text
    async with open_json(folder, SHAPES[shape]) as store:
        assert await store.get_entity("machines", "new")
        await store.save_entity("machines", {"machine_id": "newer"})
    assert len(data_files(folder)) == len(before)


KEPT: Final = {
    "odd": b'{ "b":1.50,"a" : [ 1e5, 0.10 ] , "\\u00e9":"\\/" }',
    "a list": b'[ {"id":1}, null,\n   true ]',
    "text": b'"just text \\u0041"',
    "empty": b"{ }",
}


def _with_more(text: bytes) -> bytes:
    """Undeclared sections before and after those of the file."""
    (first, one), *rest = KEPT.items()
    head = json.dumps(first).encode() + b" : " + one + b","
    tail = b"".join(b",\n" + json.dumps(name).encode() + b":" + raw for name, raw in rest)
    start, end = text.index(b"{") + 1, text.rindex(b"}")
    return text[:start] + head + text[start:end] + tail + text[end:]


@pytest.mark.parametrize("shape", ["single_file", "split_files_wrapped"])
async def test_undeclared_sections_are_kept_byte_for_byte(data: Path, shape: str) -> None:
    folder = data / shape
    file = folder / (SINGLE if shape == "single_file" else "machines.json")
    wanted = _read(folder)
    file.write_bytes(_with_more(file.read_bytes()))
    for round_ in range(3):
        async with open_json(folder, SHAPES[shape]) as store:
            found = await whole(store)
            if not round_:
                assert _differences(found, wanted) == []
            assert (await store.health())["undeclared_sections"] == sorted(KEPT)
            with pytest.raises(UnknownCollectionError):
                await store.get_entity("odd", "b")
            assert set(await store.read_file()) == set(KEYS)
            await store.save_entity("machines", {"machine_id": "new"})
            await store.checkpoint()
            await store.save_entity("machines", {"machine_id": "new"})
            await store.checkpoint()
        text = file.read_bytes()
        for name, raw in KEPT.items():
            assert json.dumps(name).encode() + b":" + raw in text
        assert parsed(file)["odd"]["b"] == 1.5
        assert _read(folder)["machines"]["new"]["version"] == 2 * (round_ + 1)


async def test_an_undeclared_section_is_kept_when_it_is_declared_later(tmp_path: Path) -> None:
    known = [Collection("known", key="id")]
    more = [*known, Collection("odd", key="id")]
    (tmp_path / SINGLE).write_bytes(b'{"known":{},"odd":{"x":{"n":1.0}}}')
    async with open_json(tmp_path, collections=known) as store:
        await store.save_entity("known", {"id": "k"})
    async with open_json(tmp_path, collections=more) as store:
        assert await store.get_entity("odd", "x") == {"version": 0, "id": "x", "n": 1.0}
        await store.save_entity("odd", {"id": "y"})
    async with open_json(tmp_path, collections=known) as store:
        assert (await store.health())["undeclared_sections"] == ["odd"]
        await store.save_entity("known", {"id": "k"})
    found = parsed(tmp_path / SINGLE)
    assert set(found["odd"]) == {"x", "y"}
    assert found["odd"]["x"]["n"] == 1.0


# -- nothing may be written -------------------------------------------------------------------


@contextmanager
def _read_only(source: Path, folder: Path) -> Iterator[Path]:
    """A read-only copy: by permissions, or for root by a read-only mount."""
    if os.geteuid():
        shutil.copytree(source, folder)
        folder.chmod(0o555)
        try:
            yield folder
        finally:
            folder.chmod(0o755)
        return
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("root may write everywhere, and no file system can be mounted here")
    try:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@shapes
async def test_a_read_only_folder(
    data: Path, tmp_path: Path, shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything can be read, no file is created, and no problem is reported."""
    wanted = _read(data / shape)
    with _read_only(data / shape, tmp_path / "locked") as folder:
        before = _bytes_of(folder)
        async with open_json(folder, SHAPES[shape]) as store:
            found = await whole(store)
            report = await store.health()
            assert not report["ok"], "a read-only folder is reported as a problem"
        assert _differences(found, wanted) == []
        assert _bytes_of(folder) == before
        assert open_files(folder) == []
    assert not caplog.records


@shapes
async def test_a_read_only_folder_with_a_journal(data: Path, tmp_path: Path, shape: str) -> None:
    """A store with commits in its journal, as a short-lived process leaves it."""
    store = await open_json(data / shape, SHAPES[shape]).open()
    await store.save_entity("templates", {"template_id": "waiting"})
    expected = await whole(store)
    await abandon(store)
    for each in (data / shape).glob(".*"):
        each.unlink()
    with _read_only(data / shape, tmp_path / "locked") as folder:
        before = _bytes_of(folder)
        async with open_json(folder, SHAPES[shape]) as store:
            assert await whole(store) == expected
            with pytest.raises(Exception, match=r"(?i)read-only|denied"):
                await store.save_entity("templates", {"template_id": "new"})
            assert await whole(store) == expected
        assert _bytes_of(folder) == before


# -- large ones -------------------------------------------------------------------------------


@shapes
async def test_a_large_file_in_a_foreign_layout(data: Path, tmp_path: Path, shape: str) -> None:
    """Over 4 MB a child process reformats the file into lines first; the result must be the same."""
    source = _read(data / shape)
    copies = 1 + 5_000_000 // len(json.dumps(source["machines"]))
    machines = {
        f"{machine_id}-{copy}": {**entity, "machine_id": f"{machine_id}-{copy}"}
        for machine_id, entity in source["machines"].items()
        for copy in range(copies)
    }
    large = {**source, "machines": machines}
    folder = tmp_path / "large"
    folder.mkdir()
    if shape == "single_file":
        _write(folder / SINGLE, {**large, "kept": {"as it is": [1.50]}})
    for name, entities in large.items() if shape != "single_file" else ():
        content = {name: entities} if shape == "split_files_wrapped" else entities
        _write(folder / f"{name}.json", content)
    async with open_json(folder, SHAPES[shape]) as store:
        found = await whole(store)
        assert _differences(found, large) == []
        await store.save_entity("machines", {"machine_id": "new"})
        await store.checkpoint()
    async with open_json(folder, SHAPES[shape]) as store:
        found = await whole(store)
    assert found["machines"].pop("new")
    assert _differences(found, large) == []
    if shape == "single_file":
        assert parsed(folder / SINGLE)["kept"] == {"as it is": [1.5]}


@pytest.mark.parametrize("lack", ["folder", "program"])
async def test_a_large_file_without_a_child_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    """Without space for temporary files, or without a child process, it is read nevertheless."""
    if lack == "folder":
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    else:
        monkeypatch.setattr("sys.executable", str(tmp_path / "nothing"))
    rows = {f"m{n}": {"machine_id": f"m{n}", "name": "x" * 1000} for n in range(4500)}
    (tmp_path / "data").mkdir()
    _write(tmp_path / "data" / SINGLE, {"machines": rows})
    async with open_json(tmp_path / "data") as store:
        assert await store.count_entities("machines") == 4500


async def test_by_url(data: Path) -> None:
    """Stores are opened by URL."""
    for url in (
        f"json:{data / 'single_file' / SINGLE}",
        f"json:{data / 'split_files_flat'}",
        f"json:{data / 'split_files_wrapped'}",
    ):
        async with open_store(url) as store:
            assert await store.count_entities("machines") > 50


# -- names that could be either ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids", "wrapped"),
    [
        (b'{"machines":{"machine_id":"machines","name":"x"}}', ["machines"], False),
        (b'{"machines":{"a":{"machine_id":"a"}}}', ["a"], True),
        (
            b'{"machines":{"machine_id":"machines"},"b":{"machine_id":"b"}}',
            ["b", "machines"],
            False,
        ),
        (b'{"machines":{}}', [], True),
        (b"{}", [], False),
        (b"{\n}\n", [], False),
        (b'{"machines":{"machine_id":{"machine_id":"machine_id"}}}', ["machine_id"], True),
        (b'{"machines":{"machines":{"machine_id":"machines"}}}', ["machines"], True),
        (b'{\n"machines":{\n"machine_id":"machines"\n}\n}\n', ["machines"], False),
        (
            b'{\n"machines":{\n"machine_id":"machines"\n},\n"b":{\n"machine_id":"b"\n}\n}\n',
            ["b", "machines"],
            False,
        ),
        (
            b'{\n"machines":{\n"machine_id":"machines"\n},\n"b":{"machine_id":"b"}\n}\n',
            ["b", "machines"],
            False,
        ),
        (b'{\n"machines":{\n"a":{"machine_id":"a"}\n}\n}\n', ["a"], True),
    ],
)
async def test_an_entity_named_like_its_collection(
    tmp_path: Path, text: bytes, ids: list[str], wrapped: bool
) -> None:
    (tmp_path / "machines.json").write_bytes(text)
    for _ in range(2):
        async with open_json(tmp_path, "split_files") as store:
            assert [each["machine_id"] for each in await store.query_entities("machines")] == ids
            await store.save_entity("templates", {"template_id": "t"})
            for each in ids:
                await store.update_entity("machines", each, {"name": "y"})
    found = parsed(tmp_path / "machines.json")
    assert sorted(found["machines"] if wrapped else found) == ids


async def test_an_entity_named_like_its_collection_written_by_the_store(tmp_path: Path) -> None:
    async with open_json(tmp_path, "split_files") as store:
        await store.save_entity("machines", {"machine_id": "machines", "name": "x"})
        await store.save_entity("machines", {"machine_id": "other"})
    for each in journals(tmp_path):
        each.unlink()
    async with open_json(tmp_path, "split_files") as store:
        found = await store.query_entities("machines")
        assert [each["machine_id"] for each in found] == ["machines", "other"]
