"""Values and entities: what may be stored, and the forms in which it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from enum import Enum
from math import isfinite
from time import time_ns
from typing import Final, Literal, TypeAlias, cast
from uuid import UUID

import msgspec

from hf_async_store.errors import (
    UnsupportedValueError,
)

Value: TypeAlias = "None | bool | int | float | str | list[Value] | dict[str, Value]"
Entity: TypeAlias = dict[str, Value]
FieldType: TypeAlias = Literal["text", "integer", "number", "boolean", "timestamp", "json"]

CREATED_AT: Final = "created_at"
UPDATED_AT: Final = "updated_at"
VERSION: Final = "version"
STORE_FIELDS: Final = frozenset({CREATED_AT, UPDATED_AT, VERSION})


class Key(msgspec.Struct, frozen=True, order=True, gc=False):
    """The identity of an entity."""

    collection: str
    id: str


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

NOT_UTF8: Final = re.compile("[\x00\ud800-\udfff]")
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


REMOVE: Final = Removed()
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
    except _DomainViolation as exc:
        exc.path.extend(reversed(path))
        raise exc.public() from exc.__cause__


def copy_entity(data: Mapping[str, object]) -> Entity:
    """`normalise` for a whole entity, which may be as large and as deep as entities may be.

    Raises:
        ValueOutOfDomainError.
    """
    return sized(data)[0]


def sized(data: Mapping[str, object]) -> tuple[Entity, int]:
    """A portable copy of an entity, and what it weighs."""
    try:
        return _copy_map(cast("Mapping[object, object]", data), 0)
    except _DomainViolation as exc:
        raise exc.public() from exc.__cause__


class _DomainViolation(Exception):  # noqa: N818  # on its way out it gathers the path, and becomes public
    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.path: list[str | int] = []

    def public(self) -> UnsupportedValueError:
        return UnsupportedValueError(f"{join_path(self.path[::-1])}: {self}")


def _copy(value: object, depth: int) -> tuple[Value, int]:
    kind = type(value)
    if kind is str:
        text = cast("str", value)
        if text.isascii():
            if "\x00" in text:
                raise _DomainViolation("text with U+0000")
            return text, len(text)
        if NOT_UTF8.search(text):
            raise _DomainViolation("text with U+0000 or a lone surrogate")
        return text, len(text.encode())
    if value is None or kind is bool:
        return cast("bool | None", value), 1
    if kind is int:
        number = cast("int", value)
        if not INT_MIN <= number <= INT_MAX:
            raise _DomainViolation("an integer of more than 64 bits")
        return number, _INT_WEIGHT
    if kind is float:
        if not isfinite(cast("float", value)):
            raise _DomainViolation(f"{value} (only finite numbers can be stored)")
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
        raise _DomainViolation(f"nested more than {MAX_DEPTH} deep")
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
        except _DomainViolation as exc:
            exc.path.append(name if type(name) is str else f"{name!a}")
            raise
    return copied, weight


def _copy_list(value: Sequence[object], depth: int) -> tuple[Value, int]:
    if depth > MAX_DEPTH:
        raise _DomainViolation(f"nested more than {MAX_DEPTH} deep")
    copied: list[Value] = []
    weight = 3 + len(value)
    for index, each in enumerate(value):
        try:
            one, more = _copy(each, depth)
        except _DomainViolation as exc:
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
        raise _DomainViolation(f"a map key that is {type_name(name)}, not text")
    if NOT_UTF8.search(name):
        raise _DomainViolation("a field name with U+0000 or a lone surrogate")
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
    raise _DomainViolation(
        f"{type_name(value)} has no portable form (give a text, a number or a list)"
    )


def _timestamp_text(value: datetime) -> str:
    if value.tzinfo is None:
        raise _DomainViolation("a naive datetime (give it a time zone)")
    try:
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    except OverflowError as exc:
        raise _DomainViolation("a datetime outside the years 1 to 9999 in UTC") from exc


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


is_canonical_timestamp: Final = re.compile(
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
    except _DomainViolation:
        return None


def type_name(value: object) -> str:
    return type(value).__name__


def check_size(entity: Mapping[str, Value]) -> None:
    """Refuse an entity that weighs too much; what the store sets in it is not counted.

    Raises:
        ValueOutOfDomainError.
    """
    refuse_oversize(*sized(entity))


def refuse_oversize(entity: Entity, weight: int) -> None:
    if weight <= MAX_ENTITY_BYTES:
        return
    # What came out must go in again, with the version and the timestamps that it got.
    weight -= sum(
        1 + len(name) + _copy(entity[name], 0)[1] for name in STORE_FIELDS & entity.keys()
    )
    if weight > MAX_ENTITY_BYTES:
        raise UnsupportedValueError(
            f"(entity): {weight:,} bytes by the measure of the portable form, "
            f"over {MAX_ENTITY_BYTES:,}"
        )
