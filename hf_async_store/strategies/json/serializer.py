"""The JSON of entities and files: encoding, decoding, and cutting a file into entities undecoded.

An entity is held as the bytes of its JSON text, `version` first. Bytes of that form are canonical:
this package wrote them from checked values. What came from elsewhere is held as `msgspec.Raw` until
it is first looked at; then it is checked, brought into the fixed form and made canonical. So opening
a file costs no decoding, and nothing unchecked ever reaches a caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Final, Literal, TypeAlias, cast

import msgspec

from hf_async_store.errors import CorruptionError, StorageError
from hf_async_store.schema import Collection, Schema
from hf_async_store.values import VERSION, Entity, Value, copy_entity, parse_timestamp

Held: TypeAlias = bytes | msgspec.Raw
"""An entity in memory: canonical bytes, or Raw text that nobody has looked at yet."""

_PREFIX: Final = b'{"version":'
UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoders raise."""

_FILE_WAY_BACK: Final = (
    "Nothing was changed. Correct the file, or restore a backup (`hf-async-store restore`)"
)
_STRING: Final = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_TOKEN: Final = re.compile(_STRING + rb"|-?(?:NaN|Infinity)\b", re.DOTALL)
_ESCAPE: Final = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|\\u[0-9a-fA-F]{4}|\\.|[\x00-\x1f]",
    re.DOTALL,
)
_NAME: Final = re.compile(rb'([\s,]*)"(?:[^"\\]|\\.)*"(\s*:\s*)', re.DOTALL)
_MEMBERS: Final = 512
CHUNK_BYTES: Final = 1 << 19
"""How many bytes of a file are cut in one go: about 1 ms."""

_WAY_BACK: Final = (
    "Correct it in the data file, restore a backup (`hf-async-store restore`), or delete it "
    "(without an expected version)"
)

encode_text = msgspec.json.Encoder().encode
_decode = cast("msgspec.json.Decoder[Entity]", msgspec.json.Decoder()).decode
cut_text = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class _Created(msgspec.Struct):
    created_at: str | msgspec.UnsetType | None = msgspec.UNSET


_created = msgspec.json.Decoder(_Created).decode


class JSONSerializer:
    """Entities of a schema to text and back.

    Args:
        place: where the entities of a collection lie, as it reads in an error; "" if unknown.
    """

    def __init__(self, schema: Schema, place: Callable[[str], str] = lambda _: "") -> None:
        self._schema = schema
        self._place = place

    def encode(self, entity: Mapping[str, Value], version: int) -> bytes:
        """The canonical text of a checked entity that has no `version` in it."""
        # A fresh object of just the size: what an encoder returns holds spare room.
        return b"".join((_PREFIX, b"%d," % version, encode_text(entity)[1:]))

    def decode(self, canonical: bytes) -> Entity:
        """The entity that `encode` was given, `version` in it: the caller's own copy."""
        return _decode(canonical)

    def entity(self, collection: Collection, entity_id: str, canonical: bytes) -> Entity:
        """A stored entity, `version` in it: the caller's own copy.

        The checksums of journal and data file protect against damage, not against a program that
        wrote something else together with the right checksum. So what a caller relies on is
        checked here.

        Raises:
            CorruptionError: it is not what this package writes.
        """
        try:
            entity = _decode(canonical)
        except UNREADABLE as exc:
            raise self.not_as_written(collection, entity_id, str(exc)) from exc
        if entity.get(collection.key) != entity_id:
            found = entity.get(collection.key, "missing")
            raise self.not_as_written(collection, entity_id, f"{collection.key} is {found!r}")
        version = entity.get(VERSION)
        if type(version) is not int or version < 0:
            raise self.not_as_written(collection, entity_id, f"{VERSION} is {version!r}")
        return entity

    def version(self, collection: Collection, entity_id: str, canonical: bytes) -> int:
        try:
            return int(canonical[len(_PREFIX) : canonical.index(b",", len(_PREFIX))])
        except ValueError as exc:
            raise self.not_as_written(collection, entity_id, "it has no version") from exc

    def created_at(
        self, collection: Collection, entity_id: str, canonical: bytes
    ) -> str | msgspec.UnsetType | None:
        try:
            return _created(canonical).created_at
        except UNREADABLE as exc:
            raise self.not_as_written(collection, entity_id, str(exc)) from exc

    def not_as_written(self, collection: Collection, entity_id: str, why: str) -> CorruptionError:
        """The error for an entity that passed for ours and is not what this package writes."""
        place = self._place(collection.name)
        return CorruptionError(
            f"{collection.name} {entity_id!r}{place and f'{place} or its journal'} is not what this "
            f"store writes: {why}. Restore a backup (`hf-async-store restore`), or delete it "
            "(without an expected version)"
        )

    def normalize(self, collection: Collection, entity_id: str, raw: Held) -> bytes:
        """The canonical text of an entity that something else wrote.

        A missing version is 0, a missing key field is filled in, and declared timestamps take
        the fixed form (those without a zone are UTC). Everything else stays as it is.

        Raises:
            CorruptionError: what is wrong with it, and where.
        """
        if type(raw) is bytes:
            return raw
        where = f"{collection.name} {entity_id!r}{self._place(collection.name)}"
        try:
            found = msgspec.json.decode(raw)
        except UNREADABLE as exc:
            cause = _cause(bytes(raw)) or str(exc)
            raise CorruptionError(f"{where} is damaged: {cause}. {_WAY_BACK}") from exc
        repeated = _repeated(bytes(raw), found)
        if repeated is not None:
            raise CorruptionError(
                f"{where} has {repeated!r} twice, and nobody can say which counts. {_WAY_BACK}"
            )
        if type(found) is not dict:
            raise CorruptionError(
                f"{where} is not an entity but {type(found).__name__}. {_WAY_BACK}"
            )
        try:
            entity = copy_entity(found)
        except RecursionError as exc:
            raise CorruptionError(f"{where} is damaged: {exc}. {_WAY_BACK}") from exc
        except StorageError as exc:
            raise CorruptionError(f"{where} cannot be read: {exc}. {_WAY_BACK}") from exc
        return self._canonical(collection, entity_id, entity, where)

    def _canonical(
        self, collection: Collection, entity_id: str, entity: Entity, where: str
    ) -> bytes:
        version = entity.pop(VERSION, 0)
        if type(version) is not int or version < 0:
            raise CorruptionError(
                f"{where} has no version but {version!r} in its place. {_WAY_BACK}"
            )
        if entity.setdefault(collection.key, entity_id) != entity_id:
            raise CorruptionError(
                f"{where} names itself {entity[collection.key]!r} in {collection.key}. {_WAY_BACK}"
            )
        for name, field in collection.typed.items():
            value = entity.get(name)
            if field.type == "timestamp" and isinstance(value, str):
                entity[name] = parse_timestamp(value) or value
        return self.encode(entity, version)


def compact(raw: Held) -> bytes:
    """The text on one line, its values untouched, in a form that is never taken for canonical."""
    try:
        text = bytes(msgspec.json.format(bytes(raw), indent=-1))
    except UNREADABLE:
        text = _TOKEN.sub(_without_newlines, bytes(raw))
        text = text.replace(b"\r", b" ").replace(b"\n", b" ")
    return b"{ " + text[1:] if text.startswith(_PREFIX) else text


def _without_newlines(token: re.Match[bytes]) -> bytes:
    return token[0].replace(b"\r", b"\\r").replace(b"\n", b"\\n")


def _cause(text: bytes) -> str | None:
    """What a decoder that takes more finds in a text that ours refuses: it names the place."""
    import json  # here, for it is needed for damaged files alone

    try:
        copy_entity(json.loads(text))
    except (StorageError, ValueError, RecursionError, AttributeError) as exc:
        return str(exc)
    return None


def _repeated(text: bytes, found: object) -> str | None:
    """A name that comes twice in an object of the text, which a decoder does not tell."""
    if bytes(msgspec.json.format(text, indent=-1)) == encode_text(found):
        return None  # nothing is lost; so it is with nearly all
    import json  # here, for it is needed for few texts

    repeated: list[str] = []

    def look(members: list[tuple[str, object]]) -> None:
        seen: set[str] = set()
        for name, _ in members:
            if name in seen:
                repeated.append(name)
            seen.add(name)

    json.loads(text, object_pairs_hook=look)
    return repeated[0] if repeated else None


# -- files ----------------------------------------------------------------------------------


class NotOurs(Exception):  # noqa: N818  # never leaves the strategy; it only chooses the way to read
    """The text is not laid out one entity a line."""


def section_lines(images: Mapping[str, bytes]) -> bytes:
    """Entities as lines, without a comma at the end."""
    return b",\n".join(
        b"".join((encode_text(entity_id), b":", raw)) for entity_id, raw in images.items()
    )


def cut_lines(data: bytes, start: int, *, ours: bool) -> Iterator[dict[str, Held] | int]:
    """Cut a section that lies one entity a line, beginning at `start`, piece by piece.

    Yields the entities of each piece and, last, the offset of the brace that ends the section.

    Raises:
        NotOurs: it is laid out otherwise, or an id comes twice in a piece.
    """
    if data[start : start + 1] == b"}":
        yield start
        return
    while (stop := data.find(b"\n", start + CHUNK_BYTES)) >= 0:
        try:
            piece = cut_piece(data[start:stop], last=False, ours=ours)
        except NotOurs:
            break  # the section ends in this piece, if it is ours at all
        yield piece
        start = stop + 1
    # Looked for in the last piece only: in the whole text it takes one step of 30 ms for 30 MB.
    end = data.find(b"\n}", start, len(data) if stop < 0 else stop + 2)
    if end < 0:
        raise NotOurs
    yield cut_piece(data[start:end], last=True, ours=ours)
    yield end + 1


def cut_piece(lines: bytes, *, last: bool, ours: bool) -> dict[str, Held]:
    """The entities of whole lines.

    Args:
        last: they end the section, so no comma follows.

    Raises:
        NotOurs: they are laid out otherwise, or an id comes twice.
    """
    if not last and not lines.endswith(b","):
        raise NotOurs
    text = b"{" + (lines if last else lines[:-1]) + b"}"
    try:
        found = cut_text(text)
        if not ours:
            for _ in refuse_repeated(text, found, "a piece"):
                pass
    except (*UNREADABLE, CorruptionError) as exc:
        raise NotOurs from exc
    if len(found) != lines.count(b"\n") + 1:
        raise NotOurs
    return held(found, ours=ours)


def held(found: dict[str, msgspec.Raw], *, ours: bool) -> dict[str, Held]:
    if not ours:
        return cast("dict[str, Held]", found)
    # A view would keep the whole piece alive, and Raw takes 60 bytes more than bytes.
    size = len(_PREFIX)
    return {
        entity_id: text if (text := bytes(raw))[:size] == _PREFIX else msgspec.Raw(text)
        for entity_id, raw in found.items()
    }


def cut_object(text: Held, what: str, *, once: bool = False) -> dict[str, msgspec.Raw]:
    """The members of a JSON object, undecoded.

    Args:
        once: make sure that no name comes twice.

    Raises:
        CorruptionError: it is no JSON object, or nobody can say which member counts.
    """
    try:
        found = cut_text(text)
    except UNREADABLE as exc:
        return _cut_damaged(bytes(text), what, exc)
    if once:
        for _ in refuse_repeated(bytes(text), found, what):
            pass
    return found


def _cut_damaged(text: bytes, what: str, exc: Exception) -> dict[str, msgspec.Raw]:
    """The members of an object where single values are none, and all else is as it should be.

    Half a surrogate pair, an unknown escape, a control character or NaN costs the entity that it is
    in. It is cut in a copy in which each of these is a harmless value of the same length.

    Args:
        exc: why it is no JSON object; raised, if more than that is wrong.
    """
    try:
        harmless = _TOKEN.sub(_harmless, text)
        found = cut_text(harmless)
    except UNREADABLE:
        raise CorruptionError(
            f"{what} is not what it should be, a JSON object: {exc}. {_FILE_WAY_BACK}"
        ) from exc
    members: dict[str, msgspec.Raw] = {}
    end = harmless.index(b"{") + 1
    for raw in found.values():
        between = _NAME.match(harmless, end)
        value = bytes(raw)
        if between is None or not harmless.startswith(value, between.end()):
            break
        name = _decoded_name(text[end : between.end()], what, end)
        if name in members:
            break
        members[name] = msgspec.Raw(text[between.end() : between.end() + len(value)])
        end = between.end() + len(value)
    if len(members) < len(found) or harmless[end:].strip() != b"}":
        raise CorruptionError(f"{what}: a name comes twice. {_FILE_WAY_BACK}")
    return members


def _harmless(token: re.Match[bytes]) -> bytes:
    text = token[0]
    return _ESCAPE.sub(_plain, text) if text.startswith(b'"') else b"1" * len(text)


def _plain(escape: re.Match[bytes]) -> bytes:
    text = escape[0]
    half = len(text) == 6 and text[2:3] in b"dD" and text[3:4] in b"89abcdefABCDEF"
    right = len(text) == 12 or (len(text) == 6 and not half)
    if len(text) == 2:
        right = text[1:] in b'"\\/bfnrt'
    return text if right else b"x" * len(text)


def _decoded_name(between: bytes, what: str, offset: int) -> str:
    name = between.strip(b" \t\r\n,:")
    try:
        return msgspec.json.decode(name, type=str)
    except UNREADABLE as exc:
        raise CorruptionError(
            f"{what}: the name {name.decode(errors='replace')} after byte {offset} cannot be "
            f"read: {exc}. {_FILE_WAY_BACK}"
        ) from exc


def holds_entities(text: bytes) -> bool:
    """Whether this looks like a data file: an object of objects."""
    try:
        members = cut_object(text, "it")
    except CorruptionError:
        return False
    return bool(members) and all(bytes(each).startswith(b"{") for each in members.values())


def refuse_repeated(text: bytes, found: Mapping[str, msgspec.Raw], what: str) -> Iterator[None]:
    """Make sure, piece by piece, that no name came twice in the object that was cut.

    A decoder keeps the last member of a name. Then the others do not lie as they should: one
    behind another, with nothing but a name between them.

    Raises:
        CorruptionError: one did.
    """
    members = iter(found.items())
    end = text.index(b"{") + 1
    before, after = b"", b""
    size = 2  # The second member shows how they lie.
    while part := list(islice(members, size)):
        # Most files are laid out evenly: comparing a whole piece takes a third of the time.
        even = b"".join(
            [each for name, raw in part for each in (before, encode_text(name), after, raw)]
        )
        if after and text.startswith(even, end):
            end += len(even)
        else:
            for name, raw in part:
                value = bytes(raw)
                between = _NAME.match(text, end)
                if between is None or not text.startswith(value, between.end()):
                    raise CorruptionError(
                        f"{what}: {name!r}, or a name before it, comes twice. {_FILE_WAY_BACK}"
                    )
                before, after = between.groups()
                end = between.end() + len(value)
        size = _MEMBERS
        yield
    if text[end:].strip() != b"}":
        raise CorruptionError(f"{what}: a name comes twice. {_FILE_WAY_BACK}")


Layout: TypeAlias = Literal["flat", "wrapped"]


def layout_of(collection: Collection, members: Mapping[str, msgspec.Raw]) -> Layout:
    """How the file of one collection lies: ids at its top, or wrapped in the collection's name.

    The key field inside an entity tells an entity from a wrapping of the same name.
    """
    try:
        inner = cut_object(members[collection.name], collection.name)
    except (KeyError, CorruptionError):
        return "flat"
    own = inner.get(collection.key)
    is_entity = own is not None and bytes(own) == encode_text(collection.name)
    return "flat" if is_entity else "wrapped"
