"""Values and entities: which values can be stored, and their canonical forms."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from enum import Enum
from functools import cache
from math import isfinite
from time import time_ns
from types import NoneType
from typing import Any, Final, Literal, TypeAlias, TypeVar, cast, final
from uuid import UUID

import msgspec

from hf_async_store.errors import UnsupportedValueError
from hf_async_store.value_types import Entity as Entity
from hf_async_store.value_types import Value as Value

Each = TypeVar("Each")
FieldType: TypeAlias = Literal["text", "integer", "number", "boolean", "timestamp", "json"]

CREATED_AT: Final = "created_at"
UPDATED_AT: Final = "updated_at"
VERSION: Final = "version"
STORE_FIELDS: Final = frozenset({CREATED_AT, UPDATED_AT, VERSION})


class Key(msgspec.Struct, frozen=True, order=True, gc=False):
    """The identity of an entity."""

    collection: str
    id: str


def version_of(entity: Entity) -> int:
    """The version of an entity that was read from a store, which has checked it."""
    return cast("int", entity[VERSION])


_encode: Final = msgspec.json.Encoder(order="sorted").encode
_decode_unsigned: Final[Callable[[bytes], Any]] = msgspec.json.Decoder(
    float_hook=lambda text: float(text) + 0.0
).decode


def canonical(value: object) -> bytes:
    """The canonical JSON of an entity, by which entities are compared, hashed and backed up."""
    encoded = _encode(value)
    return with_canonical(value)[1] if b"-0.0" in encoded else encoded


def all_canonical(values: Sequence[object]) -> list[bytes]:
    """`canonical` of each of some entities, in half the time."""
    encoded = list(map(_encode, values))
    return list(map(canonical, values)) if b"-0.0" in b"".join(encoded) else encoded


def with_canonical(value: Each) -> tuple[Each, bytes]:
    """A value that was read from a store, as it would be stored now, and its canonical JSON.

    Older versions and other programs store -0.0; it is replaced by 0.0. Strings can contain the same
    characters, which is why the JSON is decoded.
    """
    encoded = _encode(value)
    if b"-0.0" in encoded:
        value = _decode_unsigned(encoded)
        encoded = _encode(value)
    return value, encoded


# -- portable values ------------------------------------------------------------------------

MAX_DEPTH: Final = 30
"""The maximum nesting depth of lists and dicts in the value of a field."""

MAX_ENTITY_BYTES: Final = 396 * 1024
"""The maximum size of an entity, as measured by `check_size`. DynamoDB allows items of 400 KiB; the
remainder is for its keys, version, write token and index placeholders (source: DynamoDB service quotas,
item size)."""

MAX_KEY_BYTES: Final = 1024
INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**63 - 1

# The maximum size of a value in the encoding of the DynamoDB codec: a 64-bit integer takes at most 12
# bytes; a float at most 32, because one that the service cannot store (integral, beyond 1e125) is
# written as a string; containers take 3, and 1 for each element.
_INT_SIZE: Final = 12
FLOAT_SIZE: Final = 32

LIGHT_BYTES: Final = MAX_ENTITY_BYTES // 8
"""An entity whose JSON is shorter is never too large: no value has 8 times the size of its JSON."""

NOT_UTF8: Final = re.compile("[\x00\ud800-\udfff]")
_PLAIN_NAME: Final = r"[A-Za-z_][A-Za-z0-9_]*\Z"


@final
class Removed:
    """The type of `REMOVE`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "REMOVE"

    def __copy__(self) -> Removed:
        return self

    def __deepcopy__(self, memo: object) -> Removed:
        return self


REMOVE: Final = Removed()
"""As a value in an update: delete this field. (None sets it to null.)"""


def join_path(parts: Sequence[str | int]) -> str:
    """The path of a value as printed in errors: `tags.owner[2]`, unusual names quoted."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.match(_PLAIN_NAME, part):
            path += f".{part}" if path else part
        else:
            path += f"[{part!a}]"
    return path or "(entity)"


def normalise(value: object, path: tuple[str | int, ...] = (), *, depth: int = 1) -> Value:
    """A portable copy of `value` that shares nothing mutable with it.

    In addition to the types of JSON, these are converted to strings: aware `datetime` (UTC,
    `YYYY-MM-DDTHH:MM:SS.ffffffZ`), `date` (ISO 8601), `UUID`, IP addresses and networks. An `Enum`
    is replaced by its value, a tuple by a list, -0.0 by 0.0. Bytes, sets, Decimal and naive
    datetimes have no single obvious representation and are rejected.

    Args:
        path: the path of the value, for the error.
        depth: the nesting depth of the value; that of the value of a field is 1.

    Raises:
        UnsupportedValueError: names the path of the value.
    """
    return weighed(value, path, depth=depth)[0]


def weighed(
    value: object, path: tuple[str | int, ...] = (), *, depth: int = 1
) -> tuple[Value, int]:
    """`normalise`, and the size of the value."""
    try:
        return _copy(value, depth)
    except _NotStorableError as exc:
        exc.path.extend(reversed(path))
        raise exc.public() from exc.__cause__


def copy_entity(data: Mapping[str, object]) -> Entity:
    """`normalise` for a whole entity."""
    return sized(data)[0]


def sized(data: Mapping[str, object]) -> tuple[Entity, int]:
    """A portable copy of an entity, and its size."""
    try:
        return _copy_dict(data, 0)
    except _NotStorableError as exc:
        raise exc.public() from exc.__cause__


class _NotStorableError(Exception):
    """A value that cannot be stored. Collects the path of the value while it propagates."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.path: list[str | int] = []  # innermost step first

    def public(self) -> UnsupportedValueError:
        return UnsupportedValueError(f"{join_path(self.path[::-1])}: {self}")


def _copy(value: object, depth: int) -> tuple[Value, int]:
    """A portable copy of a value at this nesting depth, and its size."""
    return _copier_of(type(value), _copy_other)(value, depth)


def _copy_constant(value: bool | None, depth: int) -> tuple[Value, int]:
    return value, 1


def _copy_string(value: str, depth: int) -> tuple[Value, int]:
    if value.isascii() and "\x00" not in value:
        return value, len(value)
    if NOT_UTF8.search(value):
        raise _NotStorableError("a string with U+0000 or a lone surrogate")
    return value, len(value.encode())


def _copy_integer(value: int, depth: int) -> tuple[Value, int]:
    if not INT_MIN <= value <= INT_MAX:
        raise _NotStorableError("an integer of more than 64 bits")
    return value, _INT_SIZE


def _copy_float(value: float, depth: int) -> tuple[Value, int]:
    if not isfinite(value):
        raise _NotStorableError(f"{value} (only finite numbers can be stored)")
    return value + 0.0, FLOAT_SIZE  # the addition replaces -0.0 by 0.0


def _copy_dict(value: Mapping[Any, object], depth: int) -> tuple[Entity, int]:
    # The most frequent loop outside the engines, because it copies every entity that is written. So
    # ASCII strings are copied inline, and paths are built only for errors.
    if depth > MAX_DEPTH:
        raise _NotStorableError(f"nested more than {MAX_DEPTH} deep")
    copied: Entity = {}
    size = 3 + len(value)
    for name, each in value.items():
        try:
            if type(name) is not str:  # a subclass may be equal to a name in the cache
                raise _NotStorableError(f"a dict key of type {type_name(name)}, not str")
            size += _cached_size(name) or _name_size(name)
            if type(each) is str and each.isascii() and "\x00" not in each:
                copied[name] = each
                size += len(each)
            else:
                copy = _copier_of(type(each), _copy_other)
                copied[name], value_size = copy(each, depth + 1)
                size += value_size
        except _NotStorableError as exc:
            exc.path.append(name if type(name) is str else f"{name!a}")
            raise
    return copied, size


def _copy_list(value: Sequence[object], depth: int) -> tuple[Value, int]:
    if depth > MAX_DEPTH:
        raise _NotStorableError(f"nested more than {MAX_DEPTH} deep")
    copied: list[Value] = []
    size = 3 + len(value)
    for index, each in enumerate(value):
        try:
            element, element_size = _copier_of(type(each), _copy_other)(each, depth + 1)
        except _NotStorableError as exc:
            exc.path.append(index)
            raise
        copied.append(element)
        size += element_size
    return copied, size


def _copy_other(value: object, depth: int) -> tuple[Value, int]:
    return _copy(_plain(value), depth)


_COPIERS: Final[Mapping[type, Callable[[Any, int], tuple[Value, int]]]] = {
    str: _copy_string,
    NoneType: _copy_constant,
    bool: _copy_constant,
    int: _copy_integer,
    float: _copy_float,
    dict: _copy_dict,
    list: _copy_list,
    tuple: _copy_list,
}
_copier_of: Final = _COPIERS.get


# A cache of the sizes of field names, as a store has few of them. Bounded, because the keys of dicts
# may also be data.
_NAME_SIZES: Final[dict[str, int]] = {}
_cached_size: Final = _NAME_SIZES.get
_MAX_NAMES: Final = 4096


def _name_size(name: str) -> int:
    if NOT_UTF8.search(name):
        raise _NotStorableError("a field name with U+0000 or a lone surrogate")
    size = len(name.encode())
    if 0 < size <= 64 and len(_NAME_SIZES) < _MAX_NAMES:
        _NAME_SIZES[name] = size
    return size


def _plain(value: object) -> object:
    """The JSON value that is stored for a value of another type."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return _format_timestamp(value)
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
    raise _NotStorableError(
        f"a value of type {type_name(value)} is not supported (pass a string, a number or a list)"
    )


def _format_timestamp(value: datetime) -> str:
    if value.tzinfo is None:
        raise _NotStorableError("a datetime without a time zone (add one)")
    try:
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    except OverflowError as exc:
        raise _NotStorableError("a datetime outside the years 1 to 9999 in UTC") from exc


class _Clock:
    """A cache of the formatted current second: most calls are in the same second as the previous one."""

    second = -1
    prefix = ""


def utc_now() -> str:
    """The current time in canonical form: UTC, six digits, `Z`."""
    second, fraction = divmod(time_ns() // 1000, 1_000_000)
    if second != _Clock.second:
        _Clock.prefix = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S.")
        _Clock.second = second
    return f"{_Clock.prefix}{fraction:06d}Z"


@cache
def _fixed_form() -> re.Pattern[str]:
    return re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\Z", re.ASCII)


def has_fixed_form(text: str) -> bool:
    """Whether a text has the form in which the store writes timestamps."""
    return _fixed_form().match(text) is not None


_CANONICAL_TIMESTAMP: Final = (
    r"(?!0000)[0-9]{4}-"
    r"(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
    r"T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]\.[0-9]{6}Z\Z"
)


@cache
def _canonical_timestamp() -> re.Pattern[str]:
    # Compiled when it is needed: it takes a hundredth of the start of a process.
    return re.compile(_CANONICAL_TIMESTAMP)


def is_canonical_timestamp(text: str) -> bool:
    """A quick check that recognises most canonical timestamps: all but those of 29 February."""
    return _canonical_timestamp().match(text) is not None


TIMESTAMP_FORM: Final = "a timestamp, for example 2025-06-30T12:00:00Z"
"""What a field of type timestamp takes, for errors."""


def parse_timestamp(text: str) -> str | None:
    """The canonical form of an ISO 8601 string, in UTC if it has no zone; None if it is not one."""
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return None
    # From Python 3.14 on, T24:00 is the beginning of the next day.
    if len(text) == 27 and has_fixed_form(text) and text[11:13] != "24":
        return text
    if parsed.tzinfo is None:
        parsed = parsed.replace(tzinfo=UTC)
    try:
        return _format_timestamp(parsed)
    except _NotStorableError:
        return None


def stamp(entity: Entity, at: str) -> None:
    """Set `updated_at` of a whole entity, and remove a `created_at` that is null."""
    entity[UPDATED_AT] = at
    # The dump of a model contains null for a field that was not set.
    if CREATED_AT in entity and entity[CREATED_AT] is None:
        del entity[CREATED_AT]


def type_name(value: object) -> str:
    return type(value).__name__


def check_size(entity: Mapping[str, Value]) -> None:
    """Raise `UnsupportedValueError` for an entity that is too large; see `refuse_oversize`."""
    refuse_oversize(*sized(entity))


def refuse_oversize(entity: Entity, size: int) -> None:
    if size <= MAX_ENTITY_BYTES:
        return
    # The fields that the store sets are not counted, so that an entity that was read can be written
    # again with them.
    size -= sum(1 + len(name) + _copy(entity[name], 1)[1] for name in STORE_FIELDS & entity.keys())
    if size > MAX_ENTITY_BYTES:
        raise UnsupportedValueError(
            f"(entity): its size is {size:,} bytes, more than the limit of {MAX_ENTITY_BYTES:,}"
        )
