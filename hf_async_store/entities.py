"""What is stored: declared collections, the values they may hold, and the values of the seam.

From the top down: the portable value domain, the declaration of a collection, `HOST_FACTORY`,
and `Key`, `Record`, `Change`, `Outcome`, which is all that engines and the layers above exchange.

The hot values are msgspec structs: as frozen as dataclasses with slots, and five times cheaper
to make, which counts where every single operation makes two of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from enum import Enum
from math import isfinite
from time import time_ns
from types import MappingProxyType, NoneType
from typing import Final, Literal, TypeAlias, cast
from uuid import UUID

import msgspec

from hf_async_store.errors import (
    ConfigurationError,
    InvalidFieldError,
    InvalidKeyError,
    InvalidVersionError,
    StorageError,
    UnknownCollectionError,
    ValueOutOfDomainError,
)

Value: TypeAlias = "None | bool | int | float | str | list[Value] | dict[str, Value]"
Entity: TypeAlias = dict[str, Value]
FieldType: TypeAlias = Literal["text", "integer", "number", "boolean", "timestamp", "json"]

canonical: Final[Callable[[object], bytes]] = msgspec.json.Encoder(order="sorted").encode
"""The text of an entity, one to one: by it entities are compared, hashed and backed up."""

# -- the portable value domain --------------------------------------------------------------

MAX_DEPTH: Final = 30
"""How many lists and maps may lie inside one another in the value of a field."""

MAX_ENTITY_BYTES: Final = 396 * 1024
"""What one entity may weigh, by `check_size`. DynamoDB takes items of 400 KiB; the rest is for its keys,
version, write token and index stand-ins (source: DynamoDB service quotas, item size)."""

MAX_KEY_BYTES: Final = 1024
INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**63 - 1

# What a value weighs in the form that the DynamoDB codec writes, side forms included: a number of
# 64 bits takes at most 12 bytes; a float at most 32, because one that the service cannot hold
# (integral, -0.0, beyond 1e125) is written as text; containers 3, and 1 for each element.
_INT_WEIGHT: Final = 12
_FLOAT_WEIGHT: Final = 32

LIGHT_BYTES: Final = MAX_ENTITY_BYTES // 8
"""An entity whose JSON is shorter cannot weigh too much: no value weighs 8 times its JSON."""

_NOT_UTF8: Final = re.compile("[\x00\ud800-\udfff]")
_FIXED_FORM: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\Z", re.ASCII)
_PLAIN_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class Removed:
    """The type of `REMOVED`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "REMOVED"

    def __copy__(self) -> Removed:
        return self

    def __deepcopy__(self, memo: object) -> Removed:
        return self


REMOVED: Final = Removed()
"""In the fields of an update: take this field away. (None sets it to null.)"""


def join_path(parts: Sequence[str | int]) -> str:
    """The path of a value as errors print it: `tags.owner[2]`, odd names quoted."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _PLAIN_NAME.match(part):
            text += f".{part}" if text else part
        else:
            text += f"[{part!a}]"
    return text or "(entity)"


def normalise(value: object, path: tuple[str | int, ...] = ()) -> Value:
    """A portable copy of `value` that shares nothing mutable with it.

    Beside JSON's own types these have one obvious text form and are accepted: aware `datetime`
    (UTC, `YYYY-MM-DDTHH:MM:SS.ffffffZ`), `date` (ISO), `UUID`, IP addresses and networks, and
    `Enum` (its value). Tuples become lists. Bytes, sets, Decimal and naive datetimes have no one
    obvious form and are refused.

    Args:
        path: where the value stands, for the error.

    Raises:
        ValueOutOfDomainError: naming the path of the value.
    """
    return weighed(value, path)[0]


def weighed(value: object, path: tuple[str | int, ...] = ()) -> tuple[Value, int]:
    """`normalise`, and what the value weighs."""
    try:
        return _copy(value, 0)
    except _Outside as exc:
        exc.path.extend(reversed(path))
        raise exc.public() from exc.__cause__


def copy_entity(data: Mapping[str, object]) -> Entity:
    """`normalise` for a whole entity, which may be as large and as deep as entities may be.

    Raises:
        ValueOutOfDomainError.
    """
    return _weighed(data)[0]


def _weighed(data: Mapping[str, object]) -> tuple[Entity, int]:
    """A portable copy of an entity, and what it weighs."""
    try:
        return _copy_map(cast("Mapping[object, object]", data), 0)
    except _Outside as exc:
        raise exc.public() from exc.__cause__


class _Outside(Exception):  # noqa: N818  # on its way out it gathers the path, and becomes public
    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.path: list[str | int] = []

    def public(self) -> ValueOutOfDomainError:
        return ValueOutOfDomainError(f"{join_path(self.path[::-1])}: {self}")


def _copy(value: object, depth: int) -> tuple[Value, int]:
    kind = type(value)
    if kind is str:
        text = cast("str", value)
        if text.isascii():
            if "\x00" in text:
                raise _Outside("text with U+0000")
            return text, len(text)
        if _NOT_UTF8.search(text):
            raise _Outside("text with U+0000 or a lone surrogate")
        return text, len(text.encode())
    if value is None or kind is bool:
        return cast("bool | None", value), 1
    if kind is int:
        number = cast("int", value)
        if not INT_MIN <= number <= INT_MAX:
            raise _Outside("an integer of more than 64 bits")
        return number, _INT_WEIGHT
    if kind is float:
        if not isfinite(cast("float", value)):
            raise _Outside(f"{value} (only finite numbers can be stored)")
        return cast("float", value), _FLOAT_WEIGHT
    if kind is dict:
        return _copy_map(cast("dict[object, object]", value), depth + 1)
    if kind is list or kind is tuple:
        return _copy_list(cast("Sequence[object]", value), depth + 1)
    return _copy(_plain(value), depth)


def _copy_map(value: Mapping[object, object], depth: int) -> tuple[Entity, int]:
    # The hottest loop above the engines: every entity that is written goes through it. Short
    # texts are copied in line, and a path is put together only for an error.
    if depth > MAX_DEPTH:
        raise _Outside(f"nested more than {MAX_DEPTH} deep")
    copied: Entity = {}
    weight = 3 + len(value)
    for name, each in value.items():
        try:
            weight += _NAMES.get(name) or _name_weight(name)  # type: ignore[call-overload]  # any key
            if type(each) is str and each.isascii() and "\x00" not in each:
                copied[name] = each  # type: ignore[index]  # `_name_weight` let only text pass
                weight += len(each)
            else:
                copied[name], more = _copy(each, depth)  # type: ignore[index]  # as above
                weight += more
        except _Outside as exc:
            exc.path.append(name if type(name) is str else f"{name!a}")
            raise
    return copied, weight


def _copy_list(value: Sequence[object], depth: int) -> tuple[Value, int]:
    if depth > MAX_DEPTH:
        raise _Outside(f"nested more than {MAX_DEPTH} deep")
    copied: list[Value] = []
    weight = 3 + len(value)
    for index, each in enumerate(value):
        try:
            one, more = _copy(each, depth)
        except _Outside as exc:
            exc.path.append(index)
            raise
        copied.append(one)
        weight += more
    return copied, weight


# What names weigh: a store sees the same few again and again. Bounded, for names may be data, too.
_NAMES: Final[dict[str, int]] = {}
_MOST_NAMES: Final = 4096


def _name_weight(name: object) -> int:
    if type(name) is not str:
        raise _Outside(f"a map key that is {_type_name(name)}, not text")
    if _NOT_UTF8.search(name):
        raise _Outside("a field name with U+0000 or a lone surrogate")
    weight = len(name.encode())
    if 0 < weight <= 64 and len(_NAMES) < _MOST_NAMES:
        _NAMES[name] = weight
    return weight


def _plain(value: object) -> object:
    """The portable form of a type that is not JSON's own."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return _timestamp_text(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Mapping):
        return dict(value)
    if type(value).__module__ == "ipaddress":
        return str(value)
    raise _Outside(f"{_type_name(value)} has no portable form (give a text, a number or a list)")


def _timestamp_text(value: datetime) -> str:
    if value.tzinfo is None:
        raise _Outside("a naive datetime (give it a time zone)")
    try:
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    except OverflowError as exc:
        raise _Outside("a datetime outside the years 1 to 9999 in UTC") from exc


class _Clock:
    """The text of the current second: most calls fall into the same one as the call before."""

    second = -1
    text = ""


def utc_now() -> str:
    """The clock's time in the fixed text form: UTC, six digits, `Z`."""
    second, fraction = divmod(time_ns() // 1000, 1_000_000)
    if second != _Clock.second:
        _Clock.text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S.")
        _Clock.second = second
    return f"{_Clock.text}{fraction:06d}Z"


_is_usual_time: Final = re.compile(
    r"(?!0000)[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    r"T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]\.[0-9]{6}Z\Z"
).match
"""Most timestamps in the fixed form are told by this alone: those of days that every month has."""


def parse_timestamp(text: str) -> str | None:
    """The fixed form of an ISO 8601 text; one without a zone is UTC. None if it is no timestamp."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    if len(text) == 27 and _FIXED_FORM.match(text):
        return text
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    try:
        return _timestamp_text(moment)
    except _Outside:
        return None


def _type_name(value: object) -> str:
    return type(value).__name__


def check_size(entity: Mapping[str, Value]) -> None:
    """Refuse an entity that weighs too much; what the store sets in it is not counted.

    Raises:
        ValueOutOfDomainError.
    """
    _refuse_weight(*_weighed(entity))


def _refuse_weight(entity: Entity, weight: int) -> None:
    if weight <= MAX_ENTITY_BYTES:
        return
    # What came out must go in again, with the version and the timestamps that it got.
    weight -= sum(1 + len(name) + _copy(entity[name], 0)[1] for name in _OWN & entity.keys())
    if weight > MAX_ENTITY_BYTES:
        raise ValueOutOfDomainError(
            f"(entity): {weight:,} bytes by the measure of the portable form, "
            f"over {MAX_ENTITY_BYTES:,}"
        )


# -- declarations ---------------------------------------------------------------------------

_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,47}\Z")
_RESERVED: Final = frozenset({"doc", "version"})
CREATED_AT: Final = "created_at"
UPDATED_AT: Final = "updated_at"
VERSION: Final = "version"
_OWN: Final = frozenset({CREATED_AT, UPDATED_AT, VERSION})


def _declared_name(name: str, what: str) -> str:
    if not isinstance(name, str) or not _NAME.match(name):
        raise ConfigurationError(f"{what} {name!r} does not match [a-z][a-z0-9_]{{0,47}}")
    if name in _RESERVED:
        raise ConfigurationError(f"{what} {name!r} is reserved")
    return name


class Field(msgspec.Struct, frozen=True):
    """One declared field.

    Args:
        name: `[a-z][a-z0-9_]{0,47}`; `doc` and `version` are reserved.
        type: text, integer (64 bits), number (integer or finite float), boolean, timestamp, or
            json (anything). A null is allowed unless the field is required.
        required: an entity without it, or with null in it, is refused.
        references: the collection whose key this field holds. Needs type text.
        enforced: False: the reference is only told. Nobody looks whether the parent is there, as
            where parents are kept elsewhere; their collection need not be declared.
    """

    name: str
    type: FieldType = "text"
    required: bool = False
    references: str | None = None
    enforced: bool = True

    def __post_init__(self) -> None:
        _declared_name(self.name, "field name")
        if self.type not in _CHECKS:
            raise ConfigurationError(f"field {self.name!r}: no such type {self.type!r}")
        if self.references is not None and self.type != "text":
            raise ConfigurationError(f"field {self.name!r}: a reference is text, not {self.type}")

    def check(self, value: Value, collection: str) -> Value:
        """The value as it is stored.

        Raises:
            InvalidFieldError: naming collection, field and type.
        """
        if value is None:
            if self.required:
                raise InvalidFieldError(f"{collection}.{self.name} is required, not null")
            return None
        if self.type == "timestamp" and isinstance(value, str):
            moment = parse_timestamp(value)
            if moment is not None:
                return moment
        elif isinstance(value, _CHECKS[self.type]) and (
            type(value) is not bool or self.type in ("boolean", "json")
        ):
            return value
        raise InvalidFieldError(
            f"{collection}.{self.name} is declared {self.type}, not {_describe(value)}"
        )


_USUAL: Final = {"text": str, "integer": int, "boolean": bool}

_CHECKS: Final[Mapping[str, type | tuple[type, ...]]] = MappingProxyType(
    {
        "text": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "timestamp": (),
        "json": object,
    }
)


def _describe(value: Value) -> str:
    # The value itself may be a secret; its type says enough.
    if isinstance(value, str):
        return "text" if parse_timestamp(value) is None else "a timestamp text"
    return {bool: "a boolean", int: "an integer", float: "a float", list: "a list"}.get(
        type(value), "a map"
    )


class Index(msgspec.Struct, frozen=True):
    """A declared index: equality on `field`, then range and order on `sort`.

    Its `name` is the spec's form: `template_id-created_at-index`, or `status-index` without a
    sort field. Only text, integer, number, boolean and timestamp fields can be indexed.
    """

    field: str
    sort: str | None = None

    @property
    def name(self) -> str:
        return f"{self.field}-{self.sort}-index" if self.sort else f"{self.field}-index"


class Collection:
    """A declared collection.

    Args:
        name: `[a-z][a-z0-9_]{0,47}`.
        key: the field that holds the id.
        fields: the declared fields beside the key, `Field`s or names of text fields.
            `created_at` and `updated_at` are always there.
        indexes: `Index`es, or names of fields to be indexed alone.

    Example:
        `Collection("accounts", key="account_id", fields=["owner"], indexes=["owner"])`

    Raises:
        ConfigurationError: a name that is malformed, reserved, unknown or given twice.
    """

    __slots__ = (
        "_times",
        "_usual",
        "fields",
        "indexes",
        "key",
        "name",
        "references",
        "required",
        "typed",
    )

    name: str
    key: str
    fields: Mapping[str, Field]
    """All declared fields by name: the key first, then as given, then the timestamps."""
    indexes: tuple[Index, ...]
    references: tuple[Field, ...]
    """The fields that hold a key of another collection, where that is enforced."""
    required: tuple[str, ...]
    typed: Mapping[str, Field]
    """The fields whose values must be checked: all but the json ones that are not required."""

    def __init__(
        self,
        name: str,
        *,
        key: str,
        fields: Iterable[Field | str] = (),
        indexes: Iterable[Index | str] = (),
    ) -> None:
        declared = [Field(key, required=True)]
        declared += [Field(each) if isinstance(each, str) else each for each in fields]
        given = {each.name for each in declared}
        declared += [
            Field(each, "timestamp") for each in (CREATED_AT, UPDATED_AT) if each not in given
        ]
        self.name = _declared_name(name, "collection name")
        self.key = key
        self.fields = MappingProxyType({each.name: each for each in declared})
        self.indexes = tuple(Index(each) if isinstance(each, str) else each for each in indexes)
        self.references = tuple(
            each for each in declared if each.references is not None and each.enforced
        )
        self.required = tuple(each.name for each in declared[1:] if each.required)
        self.typed = MappingProxyType(
            {each.name: each for each in declared[1:] if each.type != "json" or each.required}
        )
        # Most values have the usual type of their field, and then need no further look.
        self._usual = tuple(
            (name, (_USUAL.get(each.type),) if each.required else (_USUAL.get(each.type), NoneType))
            for name, each in self.typed.items()
            if each.type != "timestamp" or each.required
        )
        self._times = tuple(
            name
            for name, each in self.typed.items()
            if each.type == "timestamp" and not each.required
        )
        self._check(declared)

    def _check(self, declared: Sequence[Field]) -> None:
        if len(self.fields) != len(declared):
            raise ConfigurationError(f"collection {self.name!r} declares a field twice")
        if len({each.name for each in self.indexes}) != len(self.indexes):
            raise ConfigurationError(f"collection {self.name!r} declares an index twice")
        for each in (CREATED_AT, UPDATED_AT):
            if self.fields[each].type != "timestamp":
                raise ConfigurationError(f"{self.name}.{each} is always a timestamp")
        for index in self.indexes:
            for name in (index.field, index.sort):
                if name is not None and (
                    name not in self.fields or self.fields[name].type == "json"
                ):
                    raise ConfigurationError(
                        f"index {index.name!r} of {self.name!r}: {name!r} is not a declared field "
                        "that can be indexed"
                    )

    def __repr__(self) -> str:
        return f"Collection({self.name!r}, key={self.key!r})"

    # What callers hand in, made fit to be stored --------------------------------------------

    def key_of(self, entity_id: object) -> Key:
        """The key of an id.

        Raises:
            InvalidKeyError: not text of 1 to 1,024 bytes of UTF-8 without U+0000.
        """
        if type(entity_id) is not str:
            entity_id = self._id_text(entity_id)
        if entity_id.isascii():
            if not 0 < len(entity_id) <= MAX_KEY_BYTES or "\x00" in entity_id:
                raise self._bad_id(entity_id)
        elif _NOT_UTF8.search(entity_id) or len(entity_id.encode()) > MAX_KEY_BYTES:
            raise self._bad_id(entity_id)
        return Key(self.name, entity_id)

    def _id_text(self, entity_id: object) -> str:
        try:
            text = normalise(entity_id)
        except ValueOutOfDomainError as exc:
            raise InvalidKeyError(
                f"an id of {self.name} is text, not {_type_name(entity_id)}"
            ) from exc
        if type(text) is not str:
            raise InvalidKeyError(f"an id of {self.name} is text, not {_type_name(entity_id)}")
        return text

    def _bad_id(self, entity_id: str) -> InvalidKeyError:
        return InvalidKeyError(
            f"an id of {self.name} is 1 to {MAX_KEY_BYTES} bytes of UTF-8 without U+0000, "
            f"not {entity_id[:40]!a}"
        )

    def entity(self, data: Mapping[str, object]) -> tuple[Key, Entity]:
        """The key and a portable, checked copy of a whole entity; `version` is left out.

        Raises:
            InvalidKeyError, ValueOutOfDomainError, InvalidFieldError.
        """
        self._refuse_other_than_map(data)
        if self.key not in data:
            raise InvalidKeyError(f"an entity of {self.name} needs its key field {self.key!r}")
        # Before the copy, so that an id that cannot be stored is refused as an id.
        key = self.key_of(data[self.key])
        return key, self._whole(self._copied(data))

    def stored(self, data: Entity, size: int) -> tuple[Key, Entity]:
        """As `entity`, of one that came out of a store: its values are portable, and are not copied.

        Args:
            size: of its JSON in bytes.

        Raises:
            InvalidKeyError, ValueOutOfDomainError, InvalidFieldError.
        """
        if self.key not in data:
            raise InvalidKeyError(f"an entity of {self.name} needs its key field {self.key!r}")
        key = self.key_of(data[self.key])
        if size > LIGHT_BYTES:
            check_size(data)
        return key, self._whole(self._checked(dict(data)))

    def _whole(self, entity: Entity) -> Entity:
        entity.pop(VERSION, None)
        for name in self.required:
            if name not in entity:
                raise InvalidFieldError(f"{self.name}.{name} is required")
        return entity

    def changes(self, entity_id: str, data: Mapping[str, object]) -> dict[str, Value | Removed]:
        """A portable, checked copy of the named fields of an update; `version` is left out.

        Raises:
            InvalidFieldError: also for taking away the key or a required field.
        """
        self._refuse_other_than_map(data)
        removed = [name for name, value in data.items() if value is REMOVED]
        for name in removed:
            if name in self.required:
                raise InvalidFieldError(f"{self.name}.{name} is required and cannot be removed")
        # The names of what is taken away are checked, too, as if they held nulls.
        kept = {**data, **dict.fromkeys(removed)} if removed else data
        copied: dict[str, Value | Removed] = dict(self._copied(kept))
        copied.update(dict.fromkeys(removed, REMOVED))
        copied.pop(VERSION, None)
        if copied.get(self.key, entity_id) != entity_id or self.key in removed:
            raise InvalidFieldError(f"{self.name}.{self.key} is the key and cannot be changed")
        return copied

    def _refuse_other_than_map(self, data: object) -> None:
        if not isinstance(data, Mapping):
            raise ValueOutOfDomainError(
                f"an entity of {self.name} is a map, not {_type_name(data)}"
            )

    def _copied(self, data: Mapping[str, object]) -> Entity:
        entity, weight = _weighed(data)
        _refuse_weight(entity, weight)
        return self._checked(entity)

    def _checked(self, entity: Entity) -> Entity:
        """The entity with its declared fields as they are stored, in place."""
        for name, kinds in self._usual:
            if name in entity and type(entity[name]) not in kinds:
                entity[name] = self.typed[name].check(entity[name], self.name)
        for name in self._times:
            value = entity.get(name)
            if value is not None and (type(value) is not str or not _is_usual_time(value)):
                entity[name] = self.typed[name].check(value, self.name)
        return entity


class Schema(Mapping[str, Collection]):
    """The declared collections of a store, by name, parents before children.

    Raises:
        ConfigurationError: a name twice, a reference to an undeclared collection, or a cycle of
            references other than of a collection to itself.
    """

    __slots__ = ("_by_name", "children")

    children: Mapping[str, tuple[tuple[Collection, Field], ...]]
    """By parent: every (collection, field) that refers to it."""

    def __init__(self, collections: Iterable[Collection]) -> None:
        given = list(collections)
        by_name = {each.name: each for each in given}
        if len(by_name) != len(given):
            raise ConfigurationError("a collection is declared twice")
        for each in given:
            for field in each.references:
                if field.references not in by_name:
                    raise ConfigurationError(
                        f"{each.name}.{field.name} refers to {field.references!r}, "
                        "which is not declared"
                    )
        self._by_name = {each.name: each for each in _parents_first(given)}
        self.children = MappingProxyType(
            {
                parent.name: tuple(
                    (each, field)
                    for each in given
                    for field in each.references
                    if field.references == parent.name
                )
                for parent in given
            }
        )

    def __getitem__(self, name: str) -> Collection:
        try:
            return self._by_name[name]
        except (KeyError, TypeError):
            raise UnknownCollectionError(
                f"no collection {name!r}; declared are: {', '.join(self._by_name) or 'none'}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)


def _parents_first(given: Sequence[Collection]) -> list[Collection]:
    ordered: list[Collection] = []
    placed: set[str] = set()
    waiting = list(given)
    while waiting:
        ready = [
            each
            for each in waiting
            if all(f.references in placed or f.references == each.name for f in each.references)
        ]
        if not ready:
            raise ConfigurationError(
                "references run in a circle: " + ", ".join(each.name for each in waiting)
            )
        ordered += ready
        placed |= {each.name for each in ready}
        waiting = [each for each in waiting if each.name not in placed]
    return ordered


HOST_FACTORY: Final = (
    Collection(
        "templates",
        key="template_id",
        fields=[
            "name",
            "provider_api",
            "vm_type",
            Field("max_number", "integer"),
            "image_id",
            Field("subnet_ids", "json"),
            Field("security_group_ids", "json"),
            Field("attributes", "json"),
        ],
    ),
    Collection(
        "requests",
        key="request_id",
        fields=[
            Field("template_id", references="templates"),
            Field("machine_count", "integer"),
            "status",
            "request_type",
            Field("completed_at", "timestamp"),
            Field("tags", "json"),
            Field("metadata", "json"),
        ],
        indexes=[Index("template_id", "created_at"), "status", "request_type"],
    ),
    Collection(
        "machines",
        key="machine_id",
        fields=[
            Field("request_id", references="requests"),
            Field("template_id", references="templates"),
            "return_request_id",
            "name",
            "status",
            "instance_type",
            "provider_instance_id",
            "private_ip",
            "public_ip",
            Field("started_at", "timestamp"),
            Field("terminated_at", "timestamp"),
        ],
        indexes=[Index("request_id", "created_at"), "return_request_id", "status", "name"],
    ),
)
"""The spec's schema: templates, requests and machines, its columns and references, and the indexes
that an orchestrator's own queries need. Only the keys are required, because the spec's own
examples leave out columns that its DDL calls NOT NULL."""

# -- the values of the seam -----------------------------------------------------------------


class Key(msgspec.Struct, frozen=True, order=True, gc=False):
    """The identity of an entity."""

    collection: str
    id: str


class Record(msgspec.Struct, frozen=True, gc=False):
    """An entity as it is stored. `entity` is the receiver's own copy, `version` in it."""

    key: Key
    entity: Entity

    @property
    def version(self) -> int:
        return cast("int", self.entity[VERSION])


class Expect(Enum):
    """A condition on what is stored, other than an exact version."""

    # Values that no entity can hold: an ABSENT in a filter must not turn into the text "absent".
    ANY = object()
    ABSENT = object()
    PRESENT = object()

    def __repr__(self) -> str:
        return self.name


ANY: Final = Expect.ANY
ABSENT: Final = Expect.ABSENT
"""As `expected_version`: the entity must not be there."""
PRESENT: Final = Expect.PRESENT

Condition: TypeAlias = Expect | int


def check_version(expected: object, *, absent: bool) -> Condition:
    """The condition of an `expected_version` as a caller gives it.

    Raises:
        InvalidVersionError: anything but an integer from 0 on, ABSENT (where `absent` allows it),
            or ANY, which stands for "left out".
    """
    if expected is ANY or (absent and expected is ABSENT):
        return cast("Expect", expected)
    if type(expected) is int and 0 <= expected <= INT_MAX:
        return expected
    allowed = "an integer from 0 on" + (" or ABSENT" if absent else "")
    raise InvalidVersionError(f"expected_version is {allowed}, not {expected!r}")


class Mark(msgspec.Struct, frozen=True):
    """A small record written in the same commit as its change (live migration needs it)."""

    key: Key
    entity: Entity


class Put(msgspec.Struct, frozen=True, gc=False):
    """Insert or replace a whole entity.

    Attributes:
        entity: portable and checked, without `version`. Without `created_at`, what is stored is
            kept, be it missing, and a new entity gets `at`.
        at: the clock's time of this verb, in the fixed form.
        version: for imports: the version to write as given; `created_at` is then as given too.
    """

    key: Key
    entity: Entity
    at: str
    expect: Condition = ANY
    version: int | None = None
    mark: Mark | None = None


class Patch(msgspec.Struct, frozen=True, gc=False):
    """Change the named top-level fields of an entity that is there; REMOVED takes one away."""

    key: Key
    fields: dict[str, Value | Removed]
    at: str
    expect: Condition = PRESENT
    mark: Mark | None = None


class Delete(msgspec.Struct, frozen=True, gc=False):
    """Take an entity away. Its outcome is the version that it had, or None if it was not there."""

    key: Key
    expect: Condition = ANY
    mark: Mark | None = None


Change: TypeAlias = Put | Patch | Delete
Outcome: TypeAlias = int | None | StorageError
"""The new version (for a Delete the old one, None if there was none), or the error of that change."""
