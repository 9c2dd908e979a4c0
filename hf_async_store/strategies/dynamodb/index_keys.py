"""The keys of global secondary indexes: their attributes, and the order of their sort keys.

An index has a partition key and, except for an index on one text or boolean field, a sort key:

* The partition key is the attribute of the first field. An index on one timestamp, integer or number
  field is for ranges and orders: its partition key is `_p`, one of 8 values derived from the id, and
  its sort key is the field.
* The sort key for one field is the attribute of that field. Several fields have a binary attribute
  `_k_FIELD-FIELD`, which contains the `sort_bytes` of each.

The sort key of an item is a monotone function of the field's value in the total order of all values.
It is not exact: values with the same sort key have to be compared themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, cast

from hf_async_store.query import MISSING, Missing
from hf_async_store.sort_bytes import is_exact as is_exact_encoding
from hf_async_store.sort_bytes import sort_bytes

if TYPE_CHECKING:
    from hf_async_store.schema import Collection, Index
    from hf_async_store.strategies.dynamodb.codec import Attribute, Attributes
    from hf_async_store.values import FieldType, Value

Kind: TypeAlias = Literal["S", "N", "BOOL"]
"""What values the attribute of an indexed field contains: strings, numbers or booleans."""

SortKey: TypeAlias = Any
"""A sort key that can be compared with others of its index: str, Decimal or bytes."""

PARTITION: Final = "_p"
PARTITIONS: Final = 8
BOOLEAN_KEY: Final = "_b_"
COMPOSITE_KEY: Final = "_k_"

MAX_INDEXES: Final = 20
"""Source: DynamoDB service quotas, "Global secondary indexes per table"."""

MAX_HASH_BYTES: Final = 2048
"""Source: DynamoDB service quotas, "Partition key length"."""

MAX_SORT_CHARACTERS: Final = 256
"""The number of characters in the sort key of a string: at most 1,024 bytes, the limit of DynamoDB."""

_LARGEST: Final = 10**38 - 1
"""Numbers beyond it have the lowest or highest sort key; a number of DynamoDB has at most 38 digits."""

_LOWEST: Final[Mapping[Kind, str]] = {"S": "\x01", "N": f"-{_LARGEST}", "BOOL": "0"}
_HIGHEST: Final[Mapping[Kind, str]] = {
    "S": "\U0010ffff" * MAX_SORT_CHARACTERS,
    "N": f"{_LARGEST}",
    "BOOL": "3",
}
_BOOLEANS: Final = ("1", "2")
_KINDS: Final[Mapping[FieldType, Kind]] = {
    "text": "S",
    "timestamp": "S",
    "integer": "N",
    "number": "N",
    "boolean": "BOOL",
}
_ORDERED_ALONE: Final = frozenset({"timestamp", "integer", "number"})
# Source: DynamoDB Developer Guide, "Supported data types": magnitudes from 1E-130.
_SMALLEST: Final = 1e-130
_END_OF_PART: Final = b"\x00"
_ESCAPED_ZERO: Final = b"\x00\xff"
AFTER_PREFIX: Final = b"\xff"
"""Appended to the beginning of a composite sort key: a bound above all keys with this beginning."""


def key_attribute(name: str, kind: Kind) -> str:
    """The attribute by which an index finds a field."""
    return f"{BOOLEAN_KEY}{name}" if kind == "BOOL" else name


def partition_of(entity_id: str) -> Attribute:
    """The value of `_p` for an id."""
    return {"S": str(blake2b(entity_id.encode(), digest_size=1).digest()[0] % PARTITIONS)}


ALL_PARTITIONS: Final[tuple[Attribute, ...]] = tuple({"S": str(n)} for n in range(PARTITIONS))


# -- sort keys of one field ------------------------------------------------------------------


def position(kind: Kind, value: Value | Missing) -> str:
    """The sort key of any value. If a value is not greater than another, neither is its sort key."""
    if kind == "BOOL" and isinstance(value, bool):
        return _BOOLEANS[value]
    if kind == "S" and isinstance(value, str):
        return value[:MAX_SORT_CHARACTERS] or _LOWEST[kind]
    if kind == "N" and type(value) in (int, float):
        return _number(cast("float", value))
    return _HIGHEST[kind] if _is_above(kind, value) else _LOWEST[kind]


def is_exact(kind: Kind, value: Value) -> bool:
    """Whether only values that are equal to this one have its sort key."""
    if kind == "S" and isinstance(value, str):
        return _LOWEST["S"] < value and len(value) < MAX_SORT_CHARACTERS
    if kind == "N" and type(value) in (int, float):
        return _SMALLEST < abs(cast("float", value)) < _LARGEST
    return kind == "BOOL" and isinstance(value, bool)


def _is_above(kind: Kind, value: Value | Missing) -> bool:
    """Whether a value of another type sorts after all values of the kind."""
    if kind == "S":
        return isinstance(value, list | dict)
    if kind == "N":
        return isinstance(value, str | list | dict)
    return value is not None and value is not MISSING


def _number(value: float) -> str:
    if type(value) is int:
        return str(value)
    if abs(value) >= _LARGEST:
        return _HIGHEST["N"] if value > 0 else _LOWEST["N"]
    if value.is_integer():
        return str(int(value))
    return "0" if abs(value) < _SMALLEST else repr(value)


def prefix_end(prefix: str) -> str:
    """The greatest sort key of a string with this prefix."""
    start = prefix[:MAX_SORT_CHARACTERS]
    return start + "\U0010ffff" * (MAX_SORT_CHARACTERS - len(start))


# -- sort keys of several fields -------------------------------------------------------------


def composite(values: Iterable[Value | Missing]) -> bytes:
    """The beginning of a composite sort key for these values, or the whole key."""
    return b"".join(escaped(sort_bytes(each)) + _END_OF_PART for each in values)


def escaped(encoded: bytes) -> bytes:
    """Sort bytes within a composite key, in which a zero byte ends the part."""
    return encoded.replace(_END_OF_PART, _ESCAPED_ZERO)


def beginning(key: bytes, equal: int, ordered: int) -> bytes:
    """The first parts of a composite key: `equal` ones, and then `ordered` ones, up to the first that
    is not exact. The parts after it do not give the order of different values with the same bytes."""
    end = 0
    for number in range(equal + ordered):
        start, end = end, key.index(_END_OF_PART, end)
        while key[end : end + 2] == _ESCAPED_ZERO:
            end = key.index(_END_OF_PART, end + 2)
        end += 1
        if number >= equal and not is_exact_encoding(key[start : end - 1]):
            break
    return key[:end]


# -- shapes of indexes -----------------------------------------------------------------------


class KeyAttribute(NamedTuple):
    """A key attribute of an index, and its type in DynamoDB."""

    name: str
    type: str
    is_sort: bool


class IndexShape:
    """The keys of one declared index.

    Attributes:
        partition: the partition key.
        sort: the sort key; None if there is none.
        sort_fields: the fields that the sort key contains.
        is_spread: the partition key is `_p`, so that the index contains every entity.
    """

    def __init__(self, index: Index, collection: Collection) -> None:
        self.index = index
        first, *others = index.fields
        kind = _KINDS[collection.fields[first].type]
        self.is_spread = (
            not others
            and first != collection.key
            and collection.fields[first].type in _ORDERED_ALONE
        )
        if self.is_spread:
            self.partition = KeyAttribute(PARTITION, "S", is_sort=False)
            others = [first]
        else:
            name = key_attribute(first, kind)
            self.partition = KeyAttribute(name, "N" if kind == "N" else "S", is_sort=False)
        self.sort_fields: tuple[str, ...] = tuple(others)
        self.sort = _sort_key(self.sort_fields, collection)

    @property
    def keys(self) -> tuple[KeyAttribute, ...]:
        return (self.partition,) if self.sort is None else (self.partition, self.sort)

    @property
    def is_composite(self) -> bool:
        return len(self.sort_fields) > 1

    def position_in(self, item: Attributes) -> SortKey:
        """The sort key of an item of the index."""
        assert self.sort is not None
        return comparable(item[self.sort.name])


def _sort_key(fields: Sequence[str], collection: Collection) -> KeyAttribute | None:
    if not fields:
        return None
    if len(fields) > 1:
        return KeyAttribute(composite_attribute(fields), "B", is_sort=True)
    kind = _KINDS[collection.fields[fields[0]].type]
    name = key_attribute(fields[0], kind)
    return KeyAttribute(name, "N" if kind == "N" else "S", is_sort=True)


def composite_attribute(fields: Sequence[str]) -> str:
    return COMPOSITE_KEY + "-".join(fields)


def composite_fields(attribute: str) -> tuple[str, ...]:
    return tuple(attribute.removeprefix(COMPOSITE_KEY).split("-"))


def comparable(attribute: Attribute) -> SortKey:
    """A sort key as a value that compares as DynamoDB compares it."""
    [(kind, content)] = attribute.items()
    return Decimal(content) if kind == "N" else content


def sort_attribute(key: SortKey) -> Attribute:
    """The attribute value of a comparable sort key."""
    if isinstance(key, bytes):
        return {"B": key}
    return {"N": str(key)} if isinstance(key, Decimal) else {"S": key}


def keys_of_table(table: Mapping[str, Any]) -> list[KeyAttribute]:
    """The key attributes of the indexes of a table that have the names of declared indexes.

    A program maintains them whether or not it declares the indexes, so that an index does not lack
    the entities of programs with another declaration.
    """
    types = {
        each["AttributeName"]: each["AttributeType"]
        for each in table.get("AttributeDefinitions", ())
    }
    return [
        KeyAttribute(key["AttributeName"], types[key["AttributeName"]], key["KeyType"] == "RANGE")
        for each in table.get("GlobalSecondaryIndexes", ())
        for key in each["KeySchema"]
        if key["AttributeName"] in types and _is_named_after(each["IndexName"], key)
    ]


def _is_named_after(name: str, key: Mapping[str, str]) -> bool:
    """Whether an index has the name of an index declared on the fields of a key attribute."""
    *fields, last = name.split("-")
    attribute = key["AttributeName"]
    if last != "index" or attribute == PARTITION:
        return last == "index"
    if attribute.startswith(COMPOSITE_KEY):
        return composite_fields(attribute) == tuple(fields[1:])
    return attribute.removeprefix(BOOLEAN_KEY) in fields
