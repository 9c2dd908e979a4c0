"""Components of the JSON engine in isolation: journal framing, serialization, indexes."""

from __future__ import annotations

import asyncio
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hf_async_store import Collection, Field, Index, ordered_index, path
from hf_async_store.errors import CorruptionError
from hf_async_store.ordered_index import AFTER, BY_ID, Span, index_key
from hf_async_store.query import MISSING, build_query, eq, matches
from hf_async_store.schema import Schema
from hf_async_store.strategies.json import JSONSerializer
from hf_async_store.strategies.json.collection_table import CollectionTable
from hf_async_store.strategies.json.compaction import _encode_lines
from hf_async_store.strategies.json.journal import (
    HEADER_SIZE,
    Entry,
    FileState,
    Fold,
    Head,
    Kind,
    Seal,
    commit_payload,
    control,
    read_commit,
    read_naming,
    record,
    scan,
)
from hf_async_store.strategies.json.journal_writer import _AppendJob, _AppendThread
from hf_async_store.strategies.json.recovery import parse_commit
from hf_async_store.strategies.json.serializer import (
    CHUNK_BYTES,
    OtherLayout,
    StoredEntity,
    compact,
    parse_lines,
    parse_object,
    section_lines,
)
from hf_async_store.table import Merged
from hf_async_store.values import Entity, Key, Value, normalise
from tests.json.support import SINGLE, open_json

pytestmark = pytest.mark.hf_sampled(by="layout")

# Slow generation on a loaded machine is no failure.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# -- what may be stored -----------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
ids = texts.filter(bool)
versions = st.integers(0, 2**63 - 1)
THINGS: Final = Collection(
    "things",
    key="id",
    fields=["status", Field("due_at", "timestamp"), Field("data", "json"), Field("n", "number")],
    indexes=["status", Index("n")],
)
UNDECLARED: Final = st.text('abcxyz é"\\/$.#[]', min_size=1, max_size=8).filter(
    lambda name: name not in THINGS.fields
)
entities = st.dictionaries(UNDECLARED, values, max_size=5)
SERIALIZER: Final = JSONSerializer(Schema([THINGS]))


def same(one: object, other: object) -> bool:
    """Equal in value and type, bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        two = cast("dict[str, object]", other)
        return one.keys() == two.keys() and all(same(one[each], two[each]) for each in one)
    if isinstance(one, list):
        more = cast("list[object]", other)
        return len(one) == len(more) and all(map(same, one, more))
    if isinstance(one, float):
        return one.hex() == cast("float", other).hex()
    return one == other


# -- the framing of the journal ---------------------------------------------------------------

payloads = st.binary(max_size=40)
kinds = st.sampled_from([each for each in Kind if each is not Kind.FED_COMMIT])
journals = st.lists(st.tuples(kinds, payloads), min_size=1, max_size=5)


def _journal(entries: Iterable[tuple[Kind, bytes]]) -> tuple[bytes, list[int]]:
    """The bytes of a journal, and the end offset of each record."""
    data = b""
    ends = []
    for number, (kind, payload) in enumerate(entries):
        data += record(kind, payload, number)
        ends.append(len(data))
    return data, ends


def _blocks(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def _scanned(data: bytes) -> tuple[list[tuple[Entry, int]], CorruptionError | None]:
    """Check that the records are the same for all sizes of the chunks that are read."""
    whole, *others = [_scanned_in(_blocks(data, size)) for size in (len(data) or 1, 1, 7, 40)]
    for other in others:
        assert _plain(other) == _plain(whole)
    return whole


def _plain(scanned: tuple[list[tuple[Entry, int]], CorruptionError | None]) -> object:
    found, error = scanned
    return [(each.kind, each.payload, end) for each, end in found], str(error)


def _scanned_in(blocks: list[bytes]) -> tuple[list[tuple[Entry, int]], CorruptionError | None]:
    found = []
    try:
        for each in scan(blocks, "journal", 0, 0):
            found.append(each)  # noqa: PERF402  # keeps the records before the error
    except CorruptionError as exc:
        return found, exc
    return found, None


@given(journals)
@relaxed
def test_records_round_trip(entries: list[tuple[Kind, bytes]]) -> None:
    data, ends = _journal(entries)
    found, error = _scanned(data)
    assert error is None
    assert [(each.kind, each.payload) for each, _ in found] == entries
    assert [end for _, end in found] == ends


@given(journals, st.data())
@relaxed
def test_reading_can_start_at_any_record(entries: list[tuple[Kind, bytes]], data: Any) -> None:
    text, ends = _journal(entries)
    start = data.draw(st.integers(0, len(ends)))
    offset = ends[start - 1] if start else 0
    found = list(scan([text[offset:]], "journal", offset, start))
    assert [end for _, end in found] == ends[start:]


@given(journals)
@settings(relaxed, max_examples=30)
def test_every_truncation_is_an_incomplete_record(entries: list[tuple[Kind, bytes]]) -> None:
    data, ends = _journal(entries)
    for length in range(len(data)):
        found, error = _scanned(data[:length])
        assert error is None, f"cut at {length}"
        assert [end for _, end in found] == [end for end in ends if end <= length]


@given(journals, st.integers(0, 7))
@settings(relaxed, max_examples=30)
def test_every_bit_flip_is_detected(entries: list[tuple[Kind, bytes]], bit: int) -> None:
    data, ends = _journal(entries)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        found, error = _scanned(bytes(changed))
        assert error is not None, f"byte {place}"
        assert "journal" in str(error)
        before = [end for end in ends if end <= place]
        assert [end for _, end in found] == before


@given(journals, st.data())
@relaxed
def test_a_bit_flip_in_a_truncated_journal_gives_no_wrong_result(
    entries: list[tuple[Kind, bytes]], data: Any
) -> None:
    text, _ = _journal(entries)
    length = data.draw(st.integers(1, len(text)))
    place = data.draw(st.integers(0, length - 1))
    changed = bytearray(text[:length])
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    found, _ = _scanned(bytes(changed))
    assert [(each.kind, each.payload) for each, _ in found] == entries[: len(found)]


@given(journals, st.data())
@relaxed
def test_a_missing_or_repeated_record_is_damage(
    entries: list[tuple[Kind, bytes]], data: Any
) -> None:
    records = [record(kind, payload, n) for n, (kind, payload) in enumerate(entries)]
    place = data.draw(st.integers(0, len(records) - 1))
    assert _scanned(b"".join([*records[: place + 1], *records[place:]]))[1] is not None
    if place < len(records) - 1:
        assert _scanned(b"".join([*records[:place], *records[place + 1 :]]))[1] is not None


@given(journals, st.binary(min_size=1, max_size=60))
@relaxed
def test_bytes_after_the_last_record_are_incomplete_or_damaged(
    entries: list[tuple[Kind, bytes]], more: bytes
) -> None:
    data, ends = _journal(entries)
    found, error = _scanned(data + more)
    assert [end for _, end in found] == ends
    assert (error is None) == b"HFJ1".startswith(more[:4]) or len(more) >= HEADER_SIZE


small = st.dictionaries(UNDECLARED, scalars, max_size=3)


sections = st.dictionaries(ids, st.none() | small, max_size=3)


@given(st.dictionaries(ids, sections, min_size=1, max_size=3))
@relaxed
def test_images_round_trip(images: dict[str, dict[str, Entity | None]]) -> None:
    iter_json = {
        name: {
            each: None if entity is None else SERIALIZER.encode({**entity, "id": each}, 3)
            for each, entity in section.items()
        }
        for name, section in images.items()
    }
    text = b"".join(commit_payload(iter_json))
    assert read_commit(text) == iter_json
    for size in (1, 7, 40, len(text)):
        try:
            assert asyncio.run(parse_commit(_blocks(text, size))) == iter_json
        except OtherLayout:
            assert not all(iter_json.values()), "only an empty section has another format"


@pytest.mark.parametrize("missing", [b"{", b"},"])
def test_a_commit_with_a_missing_brace_is_not_split(missing: bytes) -> None:
    entity = SERIALIZER.encode({"id": "x"}, 3)
    payload = b"".join(commit_payload({"one": {"x": entity}, "two": {"x": entity}}))
    with pytest.raises(OtherLayout):
        asyncio.run(parse_commit([payload.replace(missing, b"", 1)]))


@given(
    st.dictionaries(ids, st.dictionaries(ids, small, min_size=1, max_size=3), min_size=1),
    st.data(),
)
@relaxed
def test_a_commit_in_another_format_is_not_split(
    images: dict[str, dict[str, Entity]], data: Any
) -> None:
    """Splitting by lines gives the same result as the decoder, or is refused."""
    iter_json = {
        name: {each: SERIALIZER.encode({**entity, "id": each}, 3) for each, entity in some.items()}
        for name, some in images.items()
    }
    text = bytearray(b"".join(commit_payload(iter_json)))
    place = data.draw(st.integers(0, len(text) - 1))
    text[place : place + data.draw(st.integers(0, 2))] = data.draw(
        st.sampled_from([b"", b"\n", b",", b"}", b"{", b"},", b"\n}", b' "'])
    )
    try:
        found = asyncio.run(parse_commit(_blocks(bytes(text), 64)))
    except (OtherLayout, CorruptionError):
        return
    assert read_commit(bytes(text)) == found


def test_control_records_round_trip() -> None:
    state = FileState("ab" * 32, 7, ours=True, collection="things", size=5, mtime_ns=6, inode=7)
    none = FileState(None, 1, ours=False)
    for body, read in (
        (Head(3, {"a.json": state, "b.json": none}), partial(read_naming, Head)),
        (Fold({"a.json": state}), partial(read_naming, Fold)),
        (Seal(4), msgspec.json.Decoder(Seal).decode),
    ):
        kind, payload = control(body)
        assert kind is {Head: Kind.HEAD, Fold: Kind.FOLD, Seal: Kind.SEAL}[type(body)]
        assert read(payload) == body


# -- texts of entities ------------------------------------------------------------------------


@given(entities, ids, versions)
@relaxed
def test_entities_round_trip(entity: Entity, entity_id: str, version: int) -> None:
    given_entity = {**entity, "id": entity_id, "created_at": None}
    text = SERIALIZER.encode(given_entity, version)
    assert SERIALIZER.version(Key(THINGS.name, entity_id), text) == version
    assert SERIALIZER.created_at(THINGS, entity_id, text) is None
    assert same(SERIALIZER.decode(text), {"version": version, **given_entity})
    assert b"\n" not in text
    assert same(json.loads(text), {"version": version, **given_entity})


@given(entities, ids, versions, st.booleans(), st.sampled_from([None, 0, 2, "\t"]))
@relaxed
def test_foreign_json_is_adopted_as_it_parses(
    entity: Entity, entity_id: str, version: int, escaped: bool, indent: int | str | None
) -> None:
    found = {**entity, "id": entity_id, "version": version}
    raw = msgspec.Raw(json.dumps(found, ensure_ascii=escaped, indent=indent).encode())
    adopted = SERIALIZER.normalize(THINGS, entity_id, raw)
    assert same(SERIALIZER.decode(adopted), normalise({"version": version, **found}))
    assert SERIALIZER.normalize(THINGS, entity_id, msgspec.Raw(adopted)) == adopted
    assert SERIALIZER.version(Key(THINGS.name, entity_id), adopted) == version


async def test_a_compaction_writes_large_foreign_entities_in_small_steps() -> None:
    given_text = {f"e-{each}": f'{{"name": "{"a" * 50_000}"}}' for each in range(100)}
    raw = {each: msgspec.Raw(text.encode()) for each, text in given_text.items()}
    chunks = [each async for each in _encode_lines(raw)]
    assert max(map(len, chunks)) < CHUNK_BYTES + 60_000
    found = json.loads(b"{" + b"".join(chunks) + b"}")
    assert found == {each: json.loads(text) for each, text in given_text.items()}


def _adopted(text: str, entity_id: str = "x") -> Entity:
    return SERIALIZER.decode(SERIALIZER.normalize(THINGS, entity_id, msgspec.Raw(text.encode())))


def test_missing_fields_are_added() -> None:
    assert _adopted("{}") == {"version": 0, "id": "x"}
    assert _adopted('{"version":7}') == {"version": 7, "id": "x"}
    assert _adopted('{"version":-0}') == {"version": 0, "id": "x"}


@pytest.mark.parametrize(
    ("given_text", "kept"),
    [
        ("2026-07-06T22:07:11", "2026-07-06T22:07:11.000000Z"),
        ("2026-07-06T22:07:11.5+02:00", "2026-07-06T20:07:11.500000Z"),
        ("2026-07-06T22:07:11Z", "2026-07-06T22:07:11.000000Z"),
        ("2026-07-06", "2026-07-06T00:00:00.000000Z"),
        ("yesterday", "yesterday"),
        ("", ""),
    ],
)
def test_declared_timestamps_are_normalised(given_text: str, kept: str) -> None:
    found = _adopted(json.dumps({"due_at": given_text, "other": given_text}))
    assert found["due_at"] == kept
    assert found["other"] == given_text


@pytest.mark.parametrize("value", ["null", "5", "true", "[]", "{}"])
def test_an_invalid_timestamp_is_kept(value: str) -> None:
    assert _adopted(f'{{"due_at":{value}}}')["due_at"] == json.loads(value)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "1",
        '"text"',
        "{",
        '{"version":"x"}',
        '{"version":-1}',
        '{"version":1.0}',
        '{"version":true}',
        '{"version":null}',
        f'{{"version":{2**63}}}',
        '{"id":"y"}',
        '{"id":1}',
        '{"id":null}',
        '{"n":1e400}',
        f'{{"n":{10**30}}}',
        f'{{"n":{"9" * 5000}}}',
        '{"s":"a\\u0000b"}',
        '{"a\\u0000b":1}',
        '{"s":"\\ud800"}',
        '{"data":%s}' % ("[" * 31 + "]" * 31),
        '{"data":%s}' % ("[" * 5000 + "]" * 5000),
    ],
)
def test_invalid_values_are_not_adopted(text: str) -> None:
    with pytest.raises(CorruptionError, match="things 'x'"):
        _adopted(text)


def test_bytes_that_are_not_utf8_are_not_adopted() -> None:
    for raw in (b'{"s":"\xff"}', b'{"\xff":1}', b"\xef\xbb\xbf{}", b""):
        with pytest.raises(CorruptionError, match="things 'x'"):
            SERIALIZER.normalize(THINGS, "x", msgspec.Raw(raw))


@given(entities, versions, st.sampled_from([None, 2]))
@relaxed
def test_foreign_json_is_never_taken_for_canonical(
    entity: Entity, version: int, indent: int | None
) -> None:
    for found in ({"version": version, **entity}, entity):
        text = compact(msgspec.Raw(json.dumps(found, indent=indent).encode()))
        assert b"\n" not in text
        assert not text.startswith(b'{"version":')
        assert same(json.loads(text), found)


# -- files of lines ---------------------------------------------------------------------------


def _parse(text: bytes, *, trusted: bool) -> tuple[dict[str, StoredEntity], int]:
    found: dict[str, StoredEntity] = {}
    end = 0
    for piece in parse_lines(text, 2, trusted=trusted):
        if isinstance(piece, int):
            end = piece
        else:
            found |= piece
    return found, end


@given(st.dictionaries(ids, small, max_size=8), st.booleans(), st.integers(1, 200))
@relaxed
def test_lines_are_split_as_they_were_written(
    section: dict[str, Entity], ours: bool, piece: int
) -> None:
    images = {each: SERIALIZER.encode({**one, "id": each}, 1) for each, one in section.items()}
    text = b"{\n" + section_lines([*images], images.values()) + (b"\n" if images else b"") + b"}\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_async_store.strategies.json.serializer.CHUNK_BYTES", piece)
        found, end = _parse(text, trusted=ours)
    assert end == len(text) - 2
    assert {each: bytes(raw) for each, raw in found.items()} == images
    assert {type(raw) for raw in found.values()} <= {bytes if ours else msgspec.Raw}


@pytest.mark.parametrize(
    "text",
    [
        b'{\n"a":{}, "b":{}\n}\n',
        b'{\n"a":{}\n"b":{}\n}\n',
        b'{\n"a":{},\n}\n',
        b'{\n"a":{\n}\n}\n',
        b'{\n"a":{},\n"a":{}\n}\n',
        b"{\nx\n}\n",
        b'{\n\n"a":{}\n}\n',
        b'{\n"a":{}',
    ],
)
def test_other_formats_are_not_split_by_lines(text: bytes) -> None:
    with pytest.raises(OtherLayout):
        _parse(text, trusted=False)


@given(st.dictionaries(ids, values, max_size=6), st.sampled_from([None, 1]), st.data())
@relaxed
def test_a_duplicate_member_is_found(
    members: dict[str, Value], indent: int | None, data: Any
) -> None:
    text = json.dumps(members, indent=indent).encode()
    assert parse_object(text, "it", unique=True).keys() == members.keys()
    if not members:
        return
    name = data.draw(st.sampled_from(sorted(members)))
    again = json.dumps({name: data.draw(values)}, indent=indent).encode()
    twice = text.rstrip()[:-1] + b"," + again.lstrip()[1:]
    with pytest.raises(CorruptionError, match="twice"):
        parse_object(twice, "it", unique=True)
    first = again.rstrip()[:-1] + b"," + text.lstrip()[1:]
    with pytest.raises(CorruptionError, match="twice"):
        parse_object(first, "it", unique=True)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("odd", ["", "\u00e9", '"'])
@pytest.mark.parametrize("place", [0, 1, 2, 3, 513, 514, 515, 1999])
def test_a_duplicate_member_is_found_among_many(place: int, odd: str, indent: int | None) -> None:
    """The members are checked in chunks."""
    members = {f"m{each}{odd if each == 700 else ''}": {"n": each} for each in range(2000)}
    text = json.dumps(members, indent=indent).encode()
    assert parse_object(text, "it", unique=True).keys() == members.keys()
    begin = text.index(b'"m%d"' % place)
    for name in ("m0", "m1", "m2", "m1000", "m1999"):
        again = json.dumps({name: {"n": place}}, indent=indent).encode()[1:-1].strip()
        with pytest.raises(CorruptionError, match="twice"):
            parse_object(text[:begin] + again + b"," + text[begin:], "it", unique=True)


@given(st.binary(max_size=30) | st.text('{}[]":,\\ tfn0e-.\n', max_size=30).map(str.encode))
@relaxed
def test_an_object_or_an_error(text: bytes) -> None:
    try:
        expected = json.loads(text.decode())
    except (ValueError, RecursionError):
        expected = None
    if not isinstance(expected, dict):
        return  # what is more lenient here is checked when an entity is first looked at
    try:
        found = parse_object(text, "it")
    except CorruptionError:
        assert any(
            isinstance(each, float) and not math.isfinite(each) for each in expected.values()
        )
    else:
        assert found.keys() == expected.keys()


# -- the indexes of a section -----------------------------------------------------------------

_MISSING: Final = object()
indexed = st.sampled_from(
    [_MISSING, None, True, False, 0, 1, 1.0, 0.5, -1, "", "a", "b", "1", [1], {"a": 1}]
)
few_ids = st.sampled_from([f"i{n}" for n in range(9)])
puts = st.tuples(st.just("put"), few_ids, indexed, indexed)
swaps = st.tuples(st.just("swap"), few_ids, indexed, indexed)
deletes = st.tuples(st.just("delete"), few_ids, st.none(), st.none())
looks = st.tuples(st.sampled_from(["status", "n", "ids"]), st.just(""), st.none(), st.none())
steps = st.lists(puts | swaps | deletes | looks, max_size=40)
Step = tuple[str, str, Any, Any]
starts = st.dictionaries(few_ids, st.tuples(indexed, indexed), max_size=6)


class _Model:
    """A section, and a model with the expected contents."""

    def __init__(self, foreign: Mapping[str, tuple[Any, Any]]) -> None:
        self.section = CollectionTable(THINGS, SERIALIZER, 2)
        self.entities: dict[str, Entity] = {}
        for entity_id, (status, number) in foreign.items():
            entity = _entity(entity_id, status, number)
            self.entities[entity_id] = entity
            self.section.entities[entity_id] = msgspec.Raw(json.dumps(entity, indent=1).encode())

    def change(self, step: Step) -> None:
        kind, entity_id, status, number = step
        if kind == "delete":
            self.entities.pop(entity_id, None)
            self.section.apply({entity_id: None})
            return
        entity = _entity(entity_id, status, number)
        self.entities[entity_id] = entity
        images = {entity_id: SERIALIZER.encode(entity, 1)}
        stored = self.section.entities
        merged = Merged({**stored, **images}, {entity_id: stored.get(entity_id)})
        self.section.apply(images, merged if kind == "swap" else None)

    async def look(self, kind: str) -> None:
        fields = BY_ID if kind == "ids" else (kind,)
        await self.section.indexes.ready(fields)
        everything = Span((b"", ""), (AFTER, ""))
        pieces = self.section.indexes.get(fields).pieces(everything)
        assert [entry for piece in pieces for entry in piece] == sorted(
            (index_key([entity.get(name, MISSING) for name in fields]), each)
            for each, entity in self.entities.items()
        )

    def check(self) -> None:
        assert self.section.entities.keys() == self.entities.keys()
        for entity_id, entity in self.entities.items():
            raw = self.section.canonical(entity_id)
            assert raw is not None
            found = SERIALIZER.decode(raw)
            del found["version"]
            assert same(found, entity)


def _entity(entity_id: str, status: Any, number: Any) -> Entity:
    entity: Entity = {"id": entity_id}
    for name, value in (("status", status), ("n", number)):
        if value is not _MISSING:
            entity[name] = value
    return entity


@example({"i0": ([1], _MISSING), "i1": ({"a": 1}, _MISSING)}, [1], "status")
@given(starts, indexed, st.sampled_from(["status", "n"]))
@settings(relaxed, max_examples=60)
def test_queries_over_invalid_values_agree_with_the_reference(
    start: dict[str, tuple[Any, Any]], value: Any, field: str
) -> None:
    """Files of other programs may contain any value in a declared field, also invalid ones."""
    rows = {each: _entity(each, *fields) for each, fields in start.items()}
    wanted = None if value is _MISSING else value
    query = build_query(THINGS, filters={path(field): eq(wanted)})
    expected = [rows[each] for each in sorted(rows) if matches(query.where, rows[each])]

    async def run(folder: Path) -> list[Entity]:
        (folder / SINGLE).write_text(json.dumps({"things": rows}))
        async with open_json(folder, collections=[THINGS]) as store:
            found = await store.query_entities("things", {path(field): eq(wanted)})
            assert await store.count_entities("things", {path(field): eq(wanted)}) == len(found)
            return found

    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run(Path(folder)))
    assert same(found, [{"version": 0, **each} for each in expected])


@given(starts, steps)
@settings(relaxed, max_examples=80)
def test_indexes_agree_with_a_scan(start: dict[str, tuple[Any, Any]], taken: list[Step]) -> None:
    async def run() -> None:
        model = _Model(start)
        for step in taken:
            if step[0] in ("put", "swap", "delete"):
                model.change(step)
            else:
                await model.look(step[0])
        for kind in ("status", "n", "ids"):
            await model.look(kind)
        model.check()

    _in_small_pieces(run)


@given(starts, steps, steps, st.lists(st.integers(0, 3), max_size=30))
@settings(relaxed, max_examples=80)
def test_indexes_are_correct_during_concurrent_changes(
    start: dict[str, tuple[Any, Any]], taken: list[Step], meanwhile: list[Step], turns: list[int]
) -> None:
    """Changes and queries happen whenever the build of an index yields to the event loop."""

    async def run() -> None:
        model = _Model(start)
        changes = [each for each in meanwhile if each[0] in ("put", "swap", "delete")]

        async def disturb() -> None:
            for number, step in enumerate(changes):
                model.change(step)
                for _ in range(turns[number % len(turns)] if turns else 0):
                    await asyncio.sleep(0)

        async def use() -> None:
            for step in taken:
                if step[0] in ("put", "swap", "delete"):
                    model.change(step)
                else:
                    await model.look(step[0])

        await asyncio.gather(disturb(), use(), use())
        for kind in ("status", "n", "ids"):
            await model.look(kind)
        model.check()

    _in_small_pieces(run)


def _in_small_pieces(run: Any) -> None:
    """Chunks of two, so that with few entities the event loop runs often."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (
            ("_BUILD_CHUNK", 2),
            ("_CHANGE_CHUNK", 2),
            ("_RUN", 2),
            ("_SAMPLE", 1),
            ("_BLOCK", 2),
            ("_MIN_BULK_CHANGES", 5),
        ):
            patch.setattr(ordered_index, name, size)
        patch.setattr("hf_async_store.event_loop._ITERATION_SECONDS", 0)
        asyncio.run(run())


# -- appends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_CTask", "_PyTask"])
@pytest.mark.parametrize("cancels", [False, True])
async def test_a_task_awaits_an_append_as_it_awaits_a_future(
    tmp_path: Path, name: str, cancels: bool
) -> None:
    """What tasks call is no documented interface: this fails on a version of Python that changes it."""
    fd = os.open(tmp_path / "journal", os.O_RDWR | os.O_CREAT)
    job = _AppendJob(fd, [b"ab", b"c"], 0, False, None)
    loop = asyncio.get_running_loop()

    async def append() -> None:
        await job

    task: asyncio.Task[None] = getattr(asyncio.tasks, name)(append(), loop=loop)
    await asyncio.sleep(0)
    if cancels:
        task.cancel("stop")
        await asyncio.sleep(0)
    assert not task.done()
    appends = _AppendThread()
    appends.submit(job)
    async with asyncio.timeout(10):
        await task
    appends.close()
    os.close(fd)
    cancelled = job.cancelled
    assert (None if cancelled is None else cancelled.args) == (("stop",) if cancels else None)
    assert job.written
    assert (tmp_path / "journal").read_bytes() == b"abc"


async def test_a_task_continues_after_its_own_append(tmp_path: Path) -> None:
    """Also if an earlier one, whose task is gone, has not ended yet."""
    fd = os.open(tmp_path / "journal", os.O_RDWR | os.O_CREAT)
    appends = _AppendThread()

    async def append(number: int) -> bool:
        job = _AppendJob(fd, [b"%d" % number] * 50, 50 * number, False, None)
        appends.submit(job)
        await job
        return job.written

    async with asyncio.timeout(10):
        assert all(await asyncio.gather(*map(append, range(10))))
    appends.close()
    os.close(fd)
    assert (tmp_path / "journal").read_bytes() == b"".join(b"%d" % each * 50 for each in range(10))
