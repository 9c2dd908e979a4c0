"""Files of a store with changed bytes, tokens and records give a `StorageError` or a correct result.

The recorded files were written by the store itself and by other programs. A journal with a changed
byte must give the state after one of its commits: damage must not be taken for missing entities.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_async_store import HOST_FACTORY
from hf_async_store.errors import StorageError
from hf_async_store.schema import Schema
from hf_async_store.strategies.json.journal import scan
from hf_async_store.strategies.json.serializer import JSONSerializer, parse_object
from hf_async_store.values import Entity
from tests.json.support import abandon, never_folds, open_json, whole, without_times

Files = dict[str, bytes]
Stored = dict[str, dict[str, Entity]]

IDS: Final = {
    "templates": ["t-1", "t-2", "é\n\"'"],
    "requests": ["r-1", "r-2"],
    "machines": ["m-1", "m-2", "m-3"],
}
KEYS: Final = {"templates": "template_id", "requests": "request_id", "machines": "machine_id"}
NASTY: Final = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\n", b"\0", b"\xff", b"\xed\xa0\x80"),
    *(b"null", b"true", b"-0", b"1e999", b"9" * 30, b"NaN", b"-Infinity", b"0x1", b"01", b"1."),
    *(rb'"\ud800"', rb'"\udfff"', rb'"\u0000"', rb'"\q"', b'""', b'"version"', b'"template_id"'),
    *(b'"templates":{}', b'"t-1":{}', b"{" * 40, b"[" * 3000, b'{"a":' * 3000, b"\xef\xbb\xbf"),
    *(b'{"version":', b"HFJ1", b"HFJ2", b"}\n", b",\n", b"  "),
]
_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s"{}\[\],:]+|\s+', re.DOTALL)


# -- what is changed --------------------------------------------------------------------------

place = st.floats(0, 1, exclude_max=True)
change = st.one_of(
    st.tuples(st.just("flip"), place, st.integers(0, 7)),
    st.tuples(st.just("put"), place, st.sampled_from(NASTY)),
    st.tuples(st.just("put"), place, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("over"), place, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("cut"), place, st.integers(1, 60)),
    st.tuples(st.just("end"), place, st.just(0)),
    st.tuples(st.just("again"), place, st.integers(1, 200)),
    st.tuples(st.just("token"), place, st.sampled_from(NASTY)),
    st.tuples(st.just("swap"), place, place),
)


def changed(data: bytes, changes: list[tuple[str, float, Any]]) -> bytes:
    for kind, where, what in changes:
        at = int(where * len(data))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << what)]) + data[at + 1 :]
        elif kind == "put":
            data = data[:at] + what + data[at:]
        elif kind == "over":
            data = data[:at] + what + data[at + len(what) :]
        elif kind == "cut":
            data = data[:at] + data[at + what :]
        elif kind == "end":
            data = data[:at]
        elif kind == "again":
            data = data[: at + what] + data[at:]
        elif kind in ("token", "swap"):
            tokens = _TOKEN.findall(data)
            if tokens:
                one = int(where * len(tokens))
                tokens[one] = what if kind == "token" else tokens[int(what * len(tokens))]
                data = b"".join(tokens)
    return data


# -- what is recorded -------------------------------------------------------------------------


def _recorded(folder: Path) -> Files:
    return {each.name: each.read_bytes() for each in sorted(folder.iterdir()) if each.is_file()}


async def _made(folder: Path, layout: str, **more: Any) -> list[Stored]:
    """A store with a data file, a sealed journal and an open one; returns the state after each commit."""
    states: list[Stored] = []
    async with open_json(folder, layout, **more) as store:
        never_folds(store)
        await store.save_entity("templates", {"template_id": "t-1", "name": "a"})
        await store.save_entity("requests", {"request_id": "r-1", "template_id": "t-1"})
        await store.checkpoint()
        states.append(without_times(await whole(store)))
        steps: list[Callable[[], Any]] = [
            lambda: store.save_entity("templates", {"template_id": "é\n\"'", "tags": [1, None]}),
            lambda: store.save_entities(
                "machines", [{"machine_id": each} for each in ("m-1", "m-2")]
            ),
            lambda: store.delete_entity("machines", "m-1"),
            lambda: store.update_entity("templates", "t-1", {"name": "b"}),
            lambda: store.save_entity("requests", {"request_id": "r-2", "n": 1.5}),
        ]
        for number, step in enumerate(steps):
            await step()
            states.append(without_times(await whole(store)))
            if number == 2:
                async with store._json.writing() as state:
                    await store._json.journal.start_generation(state)
        await abandon(store)
    return states


def _foreign() -> Iterator[tuple[str, str, Files]]:
    entities = {
        each: {KEYS["templates"]: each, "name": "x", "version": 3} for each in ("t-1", "t-2")
    }
    plain = {"about": [1], "templates": entities, "requests": {"r-1": {"status": "new"}}}
    for name, text in (("dumped", json.dumps(plain)), ("indented", json.dumps(plain, indent=2))):
        yield name, "single_file", {"request_database.json": text.encode()}
    for name, found in (("flat", entities), ("wrapped", {"templates": entities})):
        yield (
            name,
            "split_files",
            {"templates.json": json.dumps(found, ensure_ascii=False).encode()},
        )
    packed = gzip.compress(json.dumps(plain).encode(), mtime=0)
    yield "packed", "single_file", {"request_database.json.gz": packed}


class Recorded:
    """Files of one store, and what they may show.

    Attributes:
        states: what a damaged journal may show; empty: the data file is all there is.
    """

    def __init__(self, name: str, layout: str, files: Files, states: list[Stored]) -> None:
        self.name = name
        self.layout = layout
        self.files = files
        self.states = states


def _all() -> list[Recorded]:
    made = [Recorded(name, layout, files, []) for name, layout, files in _foreign()]
    for layout in ("single_file", "split_files"):
        for packed in (False, True):
            with tempfile.TemporaryDirectory() as name:
                states = asyncio.run(_made(Path(name), layout, enable_compression=packed))
                files = _recorded(Path(name))
            label = f"{layout}{' packed' if packed else ''}"
            made.append(Recorded(label, layout, files, states))
    return made


@pytest.fixture(scope="module")
def corpus() -> list[Recorded]:
    return _all()


# -- what is tried ----------------------------------------------------------------------------


class Tried:
    inputs = 0
    refused = 0


async def _look(folder: Path, recorded: Recorded, wants_state: bool) -> None:
    """Call every verb; each must return or raise a `StorageError`."""
    found: Stored = {}
    async with open_json(folder, recorded.layout, enforce_references=False) as store:
        for name, ids in IDS.items():
            found[name] = {}
            for each in ids:
                try:
                    entity = await store.get_entity(name, each)
                except StorageError:
                    Tried.refused += 1
                    wants_state = False
                else:
                    if entity is not None:
                        assert entity[KEYS[name]] == each
                        assert type(entity["version"]) is int
                        found[name][each] = entity
        if wants_state:
            assert without_times(found) in recorded.states, "damage was taken for something else"
        verbs: list[Callable[[], Any]] = [
            lambda: whole(store),
            lambda: store.count_entities("templates", {"name": "a"}),
            lambda: store.query_page("machines", limit=2),
            store.read_file,
            store.engine.undeclared,
            lambda: store.save_entity("machines", {"machine_id": "m-3"}),
            lambda: store.update_entity("templates", "t-1", {"name": "z"}),
            store.checkpoint,
            store.health,
            lambda: store.checkpoint(recover_from="salvage"),
        ]
        for verb in verbs:
            try:
                await verb()
            except StorageError:
                Tried.refused += 1


def _try(recorded: Recorded, name: str, data: bytes) -> None:
    Tried.inputs += 1
    journal = ".journal." in name
    with tempfile.TemporaryDirectory(dir=_FAST) as folder:
        for each, content in recorded.files.items():
            Path(folder, each).write_bytes(data if each == name else content)
        asyncio.run(_look(Path(folder), recorded, bool(recorded.states) and journal))


_FAST: Final = "/dev/shm" if Path("/dev/shm").is_dir() else None
_QUIET: Final = [
    HealthCheck.function_scoped_fixture,
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
]


def _fuzz_files(corpus: list[Recorded], examples: int, seconds: float) -> None:
    """Run examples until the time is over."""
    ends = time.monotonic() + seconds

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=_QUIET)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        recorded = data.draw(st.sampled_from(corpus))
        names = [each for each in recorded.files if not each.endswith((".open", ".fold", ".turn"))]
        name = data.draw(st.sampled_from(names))
        changes = data.draw(st.lists(change, min_size=1, max_size=3))
        _try(recorded, name, changed(recorded.files[name], changes))

    run()
    while time.monotonic() < ends:
        run()


def test_changed_files(corpus: list[Recorded], record_property: Any) -> None:
    Tried.inputs = 0
    _fuzz_files(corpus, 40, 0)
    record_property("inputs", Tried.inputs)
    assert Tried.inputs >= 20


@pytest.mark.long
def test_changed_files_at_length(corpus: list[Recorded], record_property: Any) -> None:
    Tried.inputs = 0
    _fuzz_files(corpus, 500, 600)
    record_property("inputs", Tried.inputs)
    print(f"changed files: {Tried.inputs} inputs, {Tried.refused} errors")


# -- parsers alone ----------------------------------------------------------------------------


def _records(data: bytes) -> list[tuple[int, bytes]]:
    return [(entry.kind, entry.payload) for entry, _ in scan([data], "recorded", 0, 0)]


def _written(records: list[tuple[int, bytes]]) -> bytes:
    parts = []
    for sequence, (kind, payload) in enumerate(records):
        head = struct.pack(">4sB3xIIQ", b"HFJ1", kind, len(payload), crc32(payload), sequence)
        parts += [head, struct.pack(">I", crc32(head)), payload]
    return b"".join(parts)


def _fuzz_records(corpus: list[Recorded], examples: int, seconds: float) -> None:
    """Records with correct checksums and invalid contents, as an attacker could write them."""
    ends = time.monotonic() + seconds
    made = [each for each in corpus if each.states]

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=_QUIET)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        recorded = data.draw(st.sampled_from(made))
        name = data.draw(st.sampled_from([each for each in recorded.files if ".journal." in each]))
        records = _records(recorded.files[name])
        which = data.draw(st.integers(0, len(records) - 1))
        kind, payload = records[which]
        changes = data.draw(st.lists(change, min_size=1, max_size=2))
        kind = data.draw(st.one_of(st.just(kind), st.integers(0, 6)))
        records[which] = kind, changed(payload, changes)
        Tried.inputs += 1
        with tempfile.TemporaryDirectory(dir=_FAST) as folder:
            for each, content in recorded.files.items():
                Path(folder, each).write_bytes(_written(records) if each == name else content)
            asyncio.run(_look(Path(folder), recorded, wants_state=False))

    run()
    while time.monotonic() < ends:
        run()


def test_changed_records(corpus: list[Recorded], record_property: Any) -> None:
    Tried.inputs = 0
    _fuzz_records(corpus, 30, 0)
    record_property("inputs", Tried.inputs)
    assert Tried.inputs >= 20


@pytest.mark.long
def test_changed_records_at_length(corpus: list[Recorded], record_property: Any) -> None:
    Tried.inputs = 0
    _fuzz_records(corpus, 500, 300)
    record_property("inputs", Tried.inputs)
    print(f"changed records: {Tried.inputs} inputs")


def _fuzz_texts(examples: int) -> None:
    serializer = JSONSerializer(Schema(HOST_FACTORY))
    schema = Schema(HOST_FACTORY)
    texts = [data for _, _, files in _foreign() for data in files.values()]

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=_QUIET)
    @given(st.sampled_from(texts), st.lists(change, min_size=1, max_size=4))
    def run(text: bytes, changes: list[tuple[str, float, Any]]) -> None:
        Tried.inputs += 1
        data = changed(text, changes)
        try:
            members = parse_object(data, "it", unique=True)
        except StorageError:
            return
        for name, raw in members.items():
            for collection in schema.values():
                try:
                    serializer.decode(serializer.normalize(collection, name, raw))
                except StorageError:
                    Tried.refused += 1
        try:
            parsed = json.loads(data)
        except (ValueError, RecursionError):
            return
        assert members.keys() == parsed.keys()

    run()


def test_changed_texts(record_property: Any) -> None:
    Tried.inputs = 0
    _fuzz_texts(300)
    record_property("inputs", Tried.inputs)


@pytest.mark.long
def test_changed_texts_at_length(record_property: Any) -> None:
    Tried.inputs = 0
    _fuzz_texts(100_000)
    record_property("inputs", Tried.inputs)
    print(f"changed texts: {Tried.inputs} inputs")
