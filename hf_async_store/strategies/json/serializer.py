"""The JSON of entities and files: encoding, decoding, and parsing a file into undecoded entities.

In memory an entity is the bytes of its JSON, with `version` first. Bytes in that form are canonical:
this package wrote them from checked values. An entity that another program wrote is stored as
`msgspec.Raw` until it is changed, so that compactions keep its form. When it is first read, it is
checked, and its canonical form is kept beside it. Opening a file therefore decodes no entity, and no
unchecked entity reaches a caller.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, TypeAlias, cast

import msgspec

from hf_async_store.errors import CorruptionError, StorageError
from hf_async_store.schema import Collection, Schema
from hf_async_store.values import VERSION, Entity, Key, Value, copy_entity, parse_timestamp

StoredEntity: TypeAlias = bytes | msgspec.Raw
"""An entity in memory: canonical bytes, or a Raw of JSON that another program wrote."""

Span: TypeAlias = tuple[int, int]
"""Where a section with one entity per line begins and ends in a file."""

_PREFIX: Final = b'{"version":'
_VERSION_START: Final = len(_PREFIX)
UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""The errors of msgspec decoders for invalid input."""

_FILE_REMEDY: Final = (
    "Nothing was changed. Correct the file, or restore a backup (`hf-async-store restore`)"
)
_STRING: Final = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_TOKEN: Final = rb"(?s)" + _STRING + rb"|-?(?:NaN|Infinity)\b"
_ESCAPE: Final = (
    rb"(?s)\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|\\u[0-9a-fA-F]{4}|\\.|[\x00-\x1f]"
)
_NAME: Final = rb'(?s)([\s,]*)"(?:[^"\\]|\\.)*"(\s*:\s*)'
_MEMBERS: Final = 512
CHUNK_BYTES: Final = 1 << 19
"""How many bytes of a file are written in one step, or parsed in two: about 1 ms each."""

_REMEDY: Final = (
    "Correct it in the data file, restore a backup (`hf-async-store restore`), or delete it "
    "(without an expected version)"
)

encode_json = msgspec.json.Encoder().encode
_decode = cast("msgspec.json.Decoder[Entity]", msgspec.json.Decoder()).decode
decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class _CreatedAt(msgspec.Struct):
    created_at: str | msgspec.UnsetType | None = msgspec.UNSET


_decode_created_at = msgspec.json.Decoder(_CreatedAt).decode


def version_prefix(version: int) -> bytes:
    """The beginning of the canonical bytes of an entity with this version."""
    return b'{"version":%d,' % version


class JSONSerializer:
    """Encodes and decodes the entities of a schema.

    Args:
        location: returns the path of a collection's data file as " in PATH", for error messages; "" if
            it is unknown.
    """

    def __init__(self, schema: Schema, location: Callable[[str], str] = lambda _: "") -> None:
        self._schema = schema
        self._location = location

    def encode(self, entity: Mapping[str, Value], version: int) -> bytes:
        """The canonical bytes of a checked entity that does not contain `version`."""
        # The sum is an object of the exact size: the result of an encoder has spare capacity.
        return version_prefix(version) + encode_json(entity)[1:]

    def decode(self, canonical: bytes) -> Entity:
        """Decode an entity, including `version`; the caller owns the returned object."""
        return _decode(canonical)

    def entity(self, collection: Collection, entity_id: str, canonical: bytes) -> Entity:
        """Decode and check a stored entity, including `version`; the caller owns the returned object.

        The checksums of journal and data file protect against damage, not against another program
        that wrote other content with a valid checksum. So the properties on which callers rely are
        checked here.

        Raises:
            CorruptionError: the entity is not in the form that this package writes.
        """
        try:
            entity = _decode(canonical)
        except UNREADABLE as exc:
            raise self.not_canonical(collection, entity_id, str(exc)) from exc
        if entity.get(collection.key) != entity_id:
            raise self._without_id(collection, entity_id, entity)
        version = entity.get(VERSION)
        if type(version) is not int or version < 0:
            raise self.not_canonical(collection, entity_id, f"{VERSION} is {version!r}")
        return entity

    def version(self, key: Key, canonical: bytes) -> int:
        try:
            return int(canonical[_VERSION_START : canonical.index(b",", _VERSION_START)])
        except ValueError as exc:
            collection = self._schema[key.collection]
            raise self.not_canonical(collection, key.id, "it has no version") from exc

    def created_at(
        self, collection: Collection, entity_id: str, canonical: bytes
    ) -> str | msgspec.UnsetType | None:
        try:
            return _decode_created_at(canonical).created_at
        except UNREADABLE as exc:
            raise self.not_canonical(collection, entity_id, str(exc)) from exc

    def other_key(self, collection: Collection, entity_id: str, stored: StoredEntity) -> str | None:
        """The field of a stored entity that contains its id; None if that is the declared key, or unknown.

        Entities of other programs are not concerned: a missing key field is added to them.
        """
        if type(stored) is not bytes or self.has_id(collection, entity_id, stored):
            return None
        try:
            return _field_with(entity_id, _decode(stored))
        except UNREADABLE:
            return None

    def has_id(self, collection: Collection, entity_id: str, canonical: bytes) -> bool:
        """Whether the entity has its id in the declared key; mostly without decoding it."""
        if encode_json({collection.key: entity_id})[1:-1] in canonical:
            return True
        try:
            return _decode(canonical).get(collection.key) == entity_id
        except UNREADABLE:
            return False

    def _without_id(
        self, collection: Collection, entity_id: str, entity: Entity
    ) -> CorruptionError:
        other = _field_with(entity_id, entity)
        if collection.key in entity or other is None:
            key = entity.get(collection.key, "missing")
            return self.not_canonical(collection, entity_id, f"{collection.key} is {key!r}")
        return CorruptionError(
            f"{collection.name} {entity_id!r}{self._location(collection.name)} was written with the key "
            f"{other!r}, but {collection.key!r} is declared: read it with a declaration that has this key"
        )

    def not_canonical(self, collection: Collection, entity_id: str, reason: str) -> CorruptionError:
        """The error for an entity that should be canonical and is not."""
        location = self._location(collection.name)
        return CorruptionError(
            f"{collection.name} {entity_id!r}{location and f'{location} or its journal'} is not in the "
            f"form that this store writes: {reason}. Restore a backup (`hf-async-store restore`), or "
            "delete the entity (without an expected version)"
        )

    def normalize(self, collection: Collection, entity_id: str, raw: StoredEntity) -> bytes:
        """The canonical bytes of an entity that another program wrote; the file keeps its own form.

        A missing version becomes 0, a missing key field is added, and declared timestamps are
        converted to the fixed form (those without a time zone are UTC). Everything else is unchanged.

        Raises:
            CorruptionError: the entity is invalid; the message names the entity, the file and the
                cause.
        """
        if type(raw) is bytes:
            return raw
        where = f"{collection.name} {entity_id!r}{self._location(collection.name)}"
        try:
            decoded = msgspec.json.decode(raw)
        except UNREADABLE as exc:
            cause = _standard_library_error(bytes(raw)) or str(exc)
            raise CorruptionError(f"{where} is damaged: {cause}. {_REMEDY}") from exc
        duplicates = _duplicate_name(bytes(raw), decoded)
        if duplicates is not None:
            raise CorruptionError(
                f"{where} contains the name {duplicates!r} twice, and it is unknown which value is valid. "
                f"{_REMEDY}"
            )
        if type(decoded) is not dict:
            raise CorruptionError(
                f"{where} is not a JSON object but {type(decoded).__name__}. {_REMEDY}"
            )
        try:
            entity = copy_entity(decoded)
        except RecursionError as exc:
            raise CorruptionError(f"{where} is damaged: {exc}. {_REMEDY}") from exc
        except StorageError as exc:
            raise CorruptionError(f"{where} cannot be read: {exc}. {_REMEDY}") from exc
        return self._canonical(collection, entity_id, entity, where)

    def _canonical(
        self, collection: Collection, entity_id: str, entity: Entity, where: str
    ) -> bytes:
        version = entity.pop(VERSION, 0)
        if type(version) is not int or version < 0:
            raise CorruptionError(
                f"{where} has the version {version!r}, which is not an integer of at least 0. "
                f"{_REMEDY}"
            )
        if entity.setdefault(collection.key, entity_id) != entity_id:
            raise CorruptionError(
                f"{where} has another id, {entity[collection.key]!r}, in its field {collection.key}. "
                f"{_REMEDY}"
            )
        for name, field in collection.typed.items():
            value = entity.get(name)
            if field.type == "timestamp" and isinstance(value, str):
                entity[name] = parse_timestamp(value) or value
        return self.encode(entity, version)


def _field_with(entity_id: str, entity: Entity) -> str | None:
    return next((name for name, value in entity.items() if value == entity_id), None)


def compact(raw: StoredEntity) -> bytes:
    """The JSON on one line with unchanged values, in a form that is never mistaken for canonical."""
    try:
        line = bytes(msgspec.json.format(bytes(raw), indent=-1))
    except UNREADABLE:
        line = re.sub(_TOKEN, _without_newlines, bytes(raw))
        line = line.replace(b"\r", b" ").replace(b"\n", b" ")
    return b"{ " + line[1:] if line.startswith(_PREFIX) else line


def _without_newlines(token: re.Match[bytes]) -> bytes:
    return token[0].replace(b"\r", b"\\r").replace(b"\n", b"\\n")


def _standard_library_error(data: bytes) -> str | None:
    """The error of the standard library's decoder, which names the position; None if it accepts the
    JSON."""
    import json  # here, because it is needed for damaged files only

    try:
        copy_entity(json.loads(data))
    except (StorageError, ValueError, RecursionError, AttributeError) as exc:
        return str(exc)
    return None


def _duplicate_name(data: bytes, decoded: object) -> str | None:
    """A name that occurs twice in an object in `data`, which decoders do not report; None if there is
    none."""
    if bytes(msgspec.json.format(data, indent=-1)) == encode_json(decoded):
        return None  # decoding lost nothing: the case of nearly all entities
    import json  # here, because it is rarely needed

    duplicates: list[str] = []

    def collect_duplicates(members: list[tuple[str, object]]) -> None:
        seen: set[str] = set()
        for name, _ in members:
            if name in seen:
                duplicates.append(name)
            seen.add(name)

    json.loads(data, object_pairs_hook=collect_duplicates)
    return duplicates[0] if duplicates else None


# -- files ----------------------------------------------------------------------------------


class OtherLayout(Exception):  # noqa: N818  # never leaves the strategy; selects another parser
    """The input does not have one entity per line in the form that this package writes."""


def section_lines(ids: Sequence[str], entities: Iterable[bytes], start: bytes = b"") -> bytes:
    """Entities as lines after `start`, without a comma after the last."""
    pieces = [b",\n", b"", b":", b""] * len(ids)
    # Joined once: a line of its own for each entity would be copied again.
    pieces[:1], pieces[1::4], pieces[3::4] = [start], map(encode_json, ids), entities
    return b"".join(pieces)


def parse_lines(
    data: bytes, start: int, *, trusted: bool
) -> Iterator[dict[str, StoredEntity] | int]:
    """Parse a section with one entity per line that begins at `start`, in chunks.

    Yields the entities of each chunk and, last, the offset of the brace that ends the section.

    Raises:
        OtherLayout: the section has another layout, or a chunk contains an id twice.
    """
    if data[start : start + 1] == b"}":
        yield start
        return
    while (stop := data.find(b"\n", start + CHUNK_BYTES // 2)) >= 0:
        try:
            entities = parse_chunk(data[start:stop], last=False, trusted=trusted)
        except OtherLayout:
            break  # the section ends in this chunk, or has another layout
        yield entities
        start = stop + 1
    # Only the last chunk is searched: a search of the whole data takes 30 ms in one step for 30 MB.
    end = data.find(b"\n}", start, len(data) if stop < 0 else stop + 2)
    if end < 0:
        raise OtherLayout
    yield parse_chunk(data[start:end], last=True, trusted=trusted)
    yield end + 1


def span_of_section(data: bytes, start: int) -> Span:
    """The span of the section with one entity per line that begins at `start`; a brace follows it.

    Raises:
        OtherLayout: it does not end.
    """
    end = data.find(b"\n}", start - 1)
    if end < 0:
        raise OtherLayout
    return start, end + 1


async def find_line(data: bytes, span: Span, entity_id: str) -> msgspec.Raw | None:
    """The JSON of an entity in a section with one entity per line; None if no line has this id."""
    start, end = span
    name = b"\n" + encode_json(entity_id) + b":"
    for first in range(start - 1, end, CHUNK_BYTES):
        found = data.find(name, first, min(first + CHUNK_BYTES + len(name), end))
        if found >= 0:
            found += len(name)
            return msgspec.Raw(data[found : data.index(b"\n", found)].removesuffix(b","))
        if first + CHUNK_BYTES < end:
            await asyncio.sleep(0)
    return None


def parse_chunk(lines: bytes, *, last: bool, trusted: bool) -> dict[str, StoredEntity]:
    """Parse the entities in whole lines.

    Args:
        last: these lines end the section, so no comma follows.

    Raises:
        OtherLayout: the lines have another layout, or contain an id twice.
    """
    if not last and not lines.endswith(b","):
        raise OtherLayout
    data = b"{" + (lines if last else lines[:-1]) + b"}"
    try:
        members = decode_members(data)
        if not trusted:
            for _ in refuse_duplicates(data, members, "a chunk"):
                pass
    except (*UNREADABLE, CorruptionError) as exc:
        raise OtherLayout from exc
    if len(members) != lines.count(b"\n") + 1:
        raise OtherLayout
    return stored_entities(members, trusted=trusted)


def stored_entities(members: dict[str, msgspec.Raw], *, trusted: bool) -> dict[str, StoredEntity]:
    """The members of a section as they are stored in memory: canonical bytes if `trusted`, else Raw."""
    if not trusted:
        return cast("dict[str, StoredEntity]", members)
    # A copy: a view would keep the whole chunk alive, and Raw takes 60 bytes more than bytes.
    size = len(_PREFIX)
    return {
        entity_id: encoded if (encoded := bytes(raw))[:size] == _PREFIX else msgspec.Raw(encoded)
        for entity_id, raw in members.items()
    }


def parse_object(data: StoredEntity, what: str, *, unique: bool = False) -> dict[str, msgspec.Raw]:
    """The members of a JSON object, undecoded.

    Args:
        what: the name of the object in error messages.
        unique: check that no name occurs twice.

    Raises:
        CorruptionError: it is no JSON object, or a name occurs twice.
    """
    try:
        members = decode_members(data)
    except UNREADABLE as exc:
        return _parse_damaged(bytes(data), what, exc)
    if unique:
        for _ in refuse_duplicates(bytes(data), members, what):
            pass
    return members


def _parse_damaged(data: bytes, what: str, exc: Exception) -> dict[str, msgspec.Raw]:
    """The members of an object with invalid values but a valid structure.

    Half a surrogate pair, an unknown escape, a control character or NaN affects only the entity that
    contains it. A copy is parsed in which a valid value of the same length replaces each of these.

    Args:
        exc: the error of the decoder; the cause of the error if the structure is invalid, too.
    """
    try:
        valid_copy = re.sub(_TOKEN, _valid_token, data)
        parsed = decode_members(valid_copy)
    except UNREADABLE:
        raise CorruptionError(f"{what} is not a valid JSON object: {exc}. {_FILE_REMEDY}") from exc
    members: dict[str, msgspec.Raw] = {}
    match_name = re.compile(_NAME).match
    end = valid_copy.index(b"{") + 1
    for raw in parsed.values():
        between = match_name(valid_copy, end)
        value = bytes(raw)
        if between is None or not valid_copy.startswith(value, between.end()):
            break
        name = _decoded_name(data[end : between.end()], what, end)
        if name in members:
            break
        members[name] = msgspec.Raw(data[between.end() : between.end() + len(value)])
        end = between.end() + len(value)
    if len(members) < len(parsed) or valid_copy[end:].strip() != b"}":
        raise CorruptionError(f"{what}: a name occurs twice. {_FILE_REMEDY}")
    return members


def _valid_token(token: re.Match[bytes]) -> bytes:
    data = token[0]
    return re.sub(_ESCAPE, _valid_escape, data) if data.startswith(b'"') else b"1" * len(data)


def _valid_escape(escape: re.Match[bytes]) -> bytes:
    data = escape[0]
    lone_surrogate = len(data) == 6 and data[2:3] in b"dD" and data[3:4] in b"89abcdefABCDEF"
    valid = len(data) == 12 or (len(data) == 6 and not lone_surrogate)
    if len(data) == 2:
        valid = data[1:] in b'"\\/bfnrt'
    return data if valid else b"x" * len(data)


def _decoded_name(between: bytes, what: str, offset: int) -> str:
    name = between.strip(b" \t\r\n,:")
    try:
        return msgspec.json.decode(name, type=str)
    except UNREADABLE as exc:
        raise CorruptionError(
            f"{what}: the name {name.decode(errors='replace')} after byte {offset} cannot be "
            f"read: {exc}. {_FILE_REMEDY}"
        ) from exc


def holds_entities(data: bytes) -> bool:
    """Whether this appears to be a data file: a JSON object whose members are objects."""
    try:
        members = parse_object(data, "it")
    except CorruptionError:
        return False
    return bool(members) and all(bytes(each).startswith(b"{") for each in members.values())


def refuse_duplicates(data: bytes, parsed: Mapping[str, msgspec.Raw], what: str) -> Iterator[None]:
    """Check, in chunks, that no name occurs twice in a parsed object.

    A decoder keeps only the last member of a name. The remaining members are then not contiguous: there
    is more than a name between some of them.

    Raises:
        CorruptionError: a name occurs twice.
    """
    members = iter(parsed.items())
    end = data.index(b"{") + 1
    before, after = b"", b""
    size = 2  # the second member shows the separators
    while chunk := list(islice(members, size)):
        # In most files all separators are equal: comparing a whole chunk takes a third of the time.
        expected = b"".join(
            [each for name, raw in chunk for each in (before, encode_json(name), after, raw)]
        )
        if after and data.startswith(expected, end):
            end += len(expected)
        else:
            for name, raw in chunk:
                value = bytes(raw)
                between = re.compile(_NAME).match(data, end)
                if between is None or not data.startswith(value, between.end()):
                    raise CorruptionError(
                        f"{what}: the name {name!r}, or a name before it, occurs twice. "
                        f"{_FILE_REMEDY}"
                    )
                before, after = between.groups()
                end = between.end() + len(value)
        size = _MEMBERS
        yield
    if data[end:].strip() != b"}":
        raise CorruptionError(f"{what}: a name occurs twice. {_FILE_REMEDY}")


def is_wrapped(collection: str, key: str, members: Mapping[str, msgspec.Raw]) -> bool:
    """Whether the file of one collection, which has this key field, contains its entities in a member
    with the name of the collection; otherwise they are the members of the file.

    A member with that name is an entity if its key field contains the name.
    """
    try:
        inner = parse_object(members[collection], collection)
    except (KeyError, CorruptionError):
        return False
    return not has_key(key, collection, inner)


def has_key(key: str, entity_id: str, members: Mapping[str, StoredEntity]) -> bool:
    """Whether the key field of an entity with these members contains the id."""
    try:
        return bool(msgspec.json.decode(members[key]) == entity_id)
    except (KeyError, *UNREADABLE):
        return False
