"""The mapping between entities and items of a table.

A declared field is an attribute of its own; all other fields are stored in the map `doc`. Further
attributes are:

* `version`;
* the write token `_w`, unique to each write, which identifies the write that produced the item, also
  after the entity was deleted and created again;
* `_s`, an upper bound of the size of the entity, so that a condition of an update can check the limit;
* `_l`, the claim of the entity, see `claim_items`;
* `_f`, a digest of the declaration that the item was written with. If the current declaration is
  different, the item is once written as a whole. Otherwise, the attribute of a field that is no longer
  declared would remain and hide the saved value;
* `_t`, if the entity expires by the declaration that the item was written with: the second from which
  DynamoDB may remove the item. Such items are always written as a whole, so that it is current.

The value of a field is its entry in `doc` if there is one, and else the attribute with its name. This
holds for every item, whichever declaration it was written with.

**Fields that are keys of an index** need additional rules, because DynamoDB rejects an item whose
index key is null, empty or of another type, and omits an item without the key from the index. They hold
for the declared indexes and for those of the table:

* A value that the index cannot contain is stored in `doc`.
* The sort key of an index always has an attribute, see `index_keys.position`. For a missing value,
  `doc` contains a sentinel.
* A boolean field has an additional string attribute `_b_NAME`, because DynamoDB has no boolean keys.
* `_k_FIELD-FIELD` is the sort key of an index on several fields, and `_p` the partition key of an
  index that is only ordered; see `index_keys`.
* `created_at` is stored by these rules in every collection, but its substitute is in `_c` instead of
  `doc`, because a save that does not name `created_at` keeps it and replaces `doc`.
"""

from __future__ import annotations

import secrets
from base64 import urlsafe_b64encode
from datetime import datetime
from hashlib import blake2b
from itertools import count
from math import ceil
from typing import TYPE_CHECKING, Final, cast

from hf_async_store.changes import ABSENT, Change, Patch, Put, Record
from hf_async_store.lifetimes import Clock, Lifetime
from hf_async_store.query import MISSING, Missing
from hf_async_store.schema import Collection
from hf_async_store.strategies.dynamodb.codec import (
    Attribute,
    Attributes,
    decode,
    decode_map,
    encode,
    encode_map,
    is_native,
)
from hf_async_store.strategies.dynamodb.errors import UnexpectedResponse, unreadable
from hf_async_store.strategies.dynamodb.index_keys import (
    BOOLEAN_KEY,
    COMPOSITE_KEY,
    MAX_HASH_BYTES,
    MAX_SORT_CHARACTERS,
    PARTITION,
    IndexShape,
    KeyAttribute,
    Kind,
    composite,
    composite_fields,
    key_attribute,
    partition_of,
    position,
)
from hf_async_store.values import (
    CREATED_AT,
    INT_MAX,
    MAX_ENTITY_BYTES,
    MAX_KEY_BYTES,
    REMOVE,
    VERSION,
    Entity,
    Key,
    Removed,
    Value,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DOC: Final = "doc"
TOKEN: Final = "_w"  # noqa: S105 - the name of an attribute
SIZE: Final = "_s"
CREATED_SUBSTITUTE: Final = "_c"
DECLARATION_DIGEST: Final = "_f"
CLAIM: Final = "_l"
TIME_TO_LIVE: Final = "_t"
_INTERNAL_ATTRIBUTES: Final = frozenset(
    {TOKEN, SIZE, CREATED_SUBSTITUTE, DECLARATION_DIGEST, CLAIM, PARTITION, TIME_TO_LIVE}
)
_INTERNAL_TYPES: Final = {
    TOKEN: "S",
    SIZE: "N",
    DECLARATION_DIGEST: "S",
    CLAIM: "M",
    PARTITION: "S",
    TIME_TO_LIVE: "N",
}
_BOOLEAN_KEYS: Final = ({"S": "0"}, {"S": "1"}, {"S": "2"}, {"S": "3"})
MISSING_SENTINEL: Final[Attribute] = {"SS": ["missing"]}

_MAX_SCALAR_SIZE: Final = 32
"""The maximum size of a number, boolean or null in `check_size`."""

_CREATED_AT_SIZE: Final = 64
NEAR_MAX_VERSION: Final = INT_MAX - 2**40

_MAX_DIGITS: Final = 10.0**38


class _Tokens:
    """Write tokens: a random prefix for the process and a counter, which avoids a system call each."""

    start = secrets.token_urlsafe(9)
    number = count()


def new_token() -> str:
    return f"{_Tokens.start}{next(_Tokens.number):x}"


def probe_id() -> str:
    """A new key for a probe item, longer than the id of any entity."""
    return f"probe-{new_token()}-".ljust(MAX_KEY_BYTES + 64, "-")


def seconds_of(time: str) -> int:
    """A timestamp as seconds since 1970, rounded up."""
    return ceil(datetime.fromisoformat(time).timestamp())


def size_of(value: Value | Removed) -> int:
    """An upper bound of the size that `check_size` computes for a value, at a fraction of its cost."""
    kind = type(value)
    if kind is str:
        string = cast("str", value)
        return len(string) if string.isascii() else 4 * len(string)
    if kind is dict:
        pairs = cast("dict[str, Value]", value)
        return sum([3 + len(pairs), *[size_of(each) for each in (*pairs, *pairs.values())]])
    if kind is list:
        items = cast("list[Value]", value)
        return sum([3 + len(items), *map(size_of, items)])
    return _MAX_SCALAR_SIZE


def stored_size(entity: Entity, version: int) -> Attribute:
    """The attribute with the upper bound of the size, including a `created_at` that is kept.

    Near the maximum version the bound exceeds the limit for every update, so that the item is
    read and written as a whole, which checks version and size exactly.
    """
    size = size_of(entity) + _CREATED_AT_SIZE
    return {"N": str(size if version < NEAR_MAX_VERSION else MAX_ENTITY_BYTES * 2)}


def number_key(value: float) -> str | None:
    """A number as the key of an index, integral floats as integers; None if it is not exact."""
    if type(value) is int:
        return str(value)
    if value.is_integer():
        return str(int(value)) if abs(value) < _MAX_DIGITS else None
    return repr(value) if is_native(value) else None


class IndexedField:
    """A field that is a key of an index by itself."""

    def __init__(self, name: str, kind: Kind) -> None:
        self.name = name
        self.kind = kind
        self.is_sort = False
        self.attribute = key_attribute(name, kind)
        self.substitute_attribute = CREATED_SUBSTITUTE if name == CREATED_AT else None

    def encode(self, value: Value | Removed) -> tuple[Attribute | None, Attribute | None]:
        """The attribute for the index and the substitute encoding; None for those not needed."""
        if isinstance(value, Removed):
            return self._position(MISSING), MISSING_SENTINEL if self.is_sort else None
        key = self.key_of(value)
        if key is not None and (type(value) is not float or is_native(value)):
            return key, None
        return key or self._position(value), encode(value)

    def _position(self, value: Value | Missing) -> Attribute | None:
        if not self.is_sort:
            return None
        return {"N" if self.kind == "N" else "S": position(self.kind, value)}

    def key_of(self, value: object) -> Attribute | None:
        """The key by which the index finds exactly this value; None if the index cannot contain it."""
        if type(value) is bool:
            return {"S": "2" if value else "1"} if self.kind == "BOOL" else None
        if isinstance(value, str) and self.kind == "S":
            return {"S": value} if value and self._fits(value) else None
        if type(value) in (int, float) and self.kind == "N":
            number = number_key(cast("float", value))
            return None if number is None else {"N": number}
        return None

    def _fits(self, string: str) -> bool:
        if self.is_sort:
            return len(string) <= MAX_SORT_CHARACTERS
        return len(string) <= MAX_HASH_BYTES // 4 or len(string.encode()) <= MAX_HASH_BYTES


class ItemMapping:
    """The mapping between the entities and the items of one collection.

    Args:
        found: the key attributes of the indexes of the table. Where they differ from the declared
            ones, the table decides, because it would refuse other items.
    """

    def __init__(self, collection: Collection, found: Iterable[KeyAttribute] = ()) -> None:
        self.collection = collection
        self.key = collection.key
        self.shapes = tuple(IndexShape(each, collection) for each in collection.indexes)
        # Stored like a sort key, so that every item has the attribute and a save can keep or set it.
        keys = [KeyAttribute(CREATED_AT, "S", is_sort=True)]
        keys += [key for shape in self.shapes for key in shape.keys]
        keys += found
        self.indexed = self._indexed(keys)
        self.composites = {
            each.name: composite_fields(each.name)
            for each in keys
            if each.name.startswith(COMPOSITE_KEY)
        }
        self.is_spread = any(each.name == PARTITION for each in keys)
        self.plain = frozenset(collection.fields) - set(self.indexed)
        self.lifetime = None if collection.expires is None else Lifetime(collection, Clock())
        self.digest: Attribute = {"S": self._digest()}

    def _indexed(self, keys: Iterable[KeyAttribute]) -> dict[str, IndexedField]:
        indexed: dict[str, IndexedField] = {}
        for each in keys:
            if each.name in (self.key, PARTITION) or each.name.startswith(COMPOSITE_KEY):
                continue
            name = each.name.removeprefix(BOOLEAN_KEY)
            kind: Kind = "BOOL" if name != each.name else "N" if each.type == "N" else "S"
            field = indexed.get(name)
            if field is None or field.kind != kind:
                field, previous = IndexedField(name, kind), field
                field.is_sort = previous is not None and previous.is_sort
            field.is_sort = field.is_sort or each.is_sort
            indexed[name] = field
        return indexed

    def is_attribute(self, name: str) -> bool:
        """Whether a field is stored as an attribute, if that can contain its value."""
        return name == self.key or name in self.plain or name in self.indexed

    def _digest(self) -> str:
        """A digest of the parts of the declaration that determine the attributes of an item."""
        declared_parts = [self.key, *sorted(self.plain), *sorted(self.composites)]
        declared_parts += sorted(
            f"{each.attribute} {each.kind} {each.is_sort}" for each in self.indexed.values()
        )
        declared_parts.append(str(self.is_spread))
        if self.lifetime is not None:
            # A program that does not know when entities expire must remove `_t`.
            declared_parts.append(str(self.lifetime))
        return urlsafe_b64encode(
            blake2b("\n".join(declared_parts).encode(), digest_size=6).digest()
        ).decode()

    def needs_stored(self, change: Change) -> bool:
        """Whether a change determines a part of a composite sort key only, so that it needs the others."""
        if isinstance(change, Patch):
            names = change.fields.keys()
            return any(0 < len(names & {*each}) < len(each) for each in self.composites.values())
        if not isinstance(change, Put) or change.expect is ABSENT:
            return False
        is_kept = change.import_version is None and CREATED_AT not in change.entity
        return is_kept and any(CREATED_AT in each for each in self.composites.values())

    def item(self, entity_id: str, entity: Entity, version: int, token: str) -> Attributes:
        """The whole item of an entity."""
        attributes, _ = self.parts(entity)
        attributes[self.key] = {"S": entity_id}
        attributes[VERSION] = {"N": str(version)}
        attributes[TOKEN] = {"S": token}
        attributes[SIZE] = stored_size(entity, version)
        time_to_live = self.time_to_live(entity)
        if time_to_live is not None:
            attributes[TIME_TO_LIVE] = time_to_live
        return attributes

    def time_to_live(self, entity: Entity) -> Attribute | None:
        """The attribute `_t` of an entity; None if it does not expire."""
        end = None if self.lifetime is None else self.lifetime.end(entity)
        return None if end is None else {"N": str(seconds_of(end))}

    def parts(self, entity: Entity, *, keep_created: bool = False) -> tuple[Attributes, list[str]]:
        """The attributes for the fields of a whole entity, and the names of attributes to remove.

        Args:
            keep_created: keep the stored `created_at` if the entity does not contain the field.
        """
        attributes: Attributes = {}
        document: Attributes = {}
        removed: list[str] = []
        undeclared: Entity = {}
        plain = self.plain
        indexed = self.indexed
        for name, value in entity.items():
            if name in plain:
                attributes[name] = encode(value)
            elif name not in indexed and name != VERSION:
                undeclared[name] = value
        if undeclared:
            document = encode_map(undeclared)
        removed += [name for name in plain if name not in attributes]
        for name, field in indexed.items():
            if keep_created and name == CREATED_AT and name not in entity:
                continue
            field_value: Value | Removed = entity.get(name, REMOVE)
            self._encode_field(field, field_value, attributes, document, removed)
        attributes.update(self._composite_keys(entity))
        if self.is_spread:
            attributes[PARTITION] = partition_of(cast("str", entity[self.key]))
        attributes[DOC] = {"M": document}
        attributes[DECLARATION_DIGEST] = self.digest
        return attributes, removed

    def _composite_keys(self, entity: Mapping[str, Value | Removed]) -> Attributes:
        return {
            attribute: {"B": composite(_present(entity.get(each, REMOVE)) for each in fields)}
            for attribute, fields in self.composites.items()
        }

    def _encode_field(
        self,
        field: IndexedField,
        value: Value | Removed,
        attributes: Attributes,
        document: Attributes,
        removed: list[str],
    ) -> None:
        key, substitute = field.encode(value)
        if key is not None:
            attributes[field.attribute] = key
        else:
            removed.append(field.attribute)
        if field.kind == "BOOL":
            if isinstance(value, Removed):
                removed.append(field.name)
            else:
                attributes[field.name] = encode(value)
        elif field.substitute_attribute is not None:
            if substitute is None:
                removed.append(field.substitute_attribute)
            else:
                attributes[field.substitute_attribute] = substitute
        elif substitute is not None:
            document[field.name] = substitute

    def changes(
        self, fields: Mapping[str, Value | Removed], stored: Entity | None = None
    ) -> tuple[dict[tuple[str, ...], Attribute], list[tuple[str, ...]]]:
        """The attributes that an update of these fields sets, by path, and the paths it removes.

        Args:
            stored: the entity before, which is required if `needs_stored`.
        """
        assigned: dict[tuple[str, ...], Attribute] = {}
        removed: list[tuple[str, ...]] = []
        for name, value in fields.items():
            field = self.indexed.get(name)
            if field is not None:
                self._update_field(field, value, assigned, removed)
                continue
            path = (name,) if name in self.plain else (DOC, name)
            if isinstance(value, Removed):
                removed.append(path)
            else:
                assigned[path] = encode(value)
        keys = self._composite_keys({**(stored or {}), **fields}) if self.composites else {}
        for attribute, key in keys.items():
            if not fields.keys().isdisjoint(self.composites[attribute]):
                assigned[attribute,] = key
        return assigned, removed

    def _update_field(
        self,
        field: IndexedField,
        value: Value | Removed,
        assigned: dict[tuple[str, ...], Attribute],
        removed: list[tuple[str, ...]],
    ) -> None:
        attributes: Attributes = {}
        document: Attributes = {}
        removed_names: list[str] = []
        self._encode_field(field, value, attributes, document, removed_names)
        assigned.update({(name,): each for name, each in attributes.items()})
        removed += [(name,) for name in removed_names]
        if field.kind != "BOOL" and field.substitute_attribute is None:
            if field.name in document:
                assigned[(DOC, field.name)] = document[field.name]
            else:
                removed.append((DOC, field.name))

    # -- from items to entities --------------------------------------------------------------

    def is_entity(self, item: Attributes) -> bool:
        """Whether the item is an entity and not a probe, whose key is longer than any id."""
        return len(self.id_of(item)) <= MAX_KEY_BYTES

    def id_of(self, item: Attributes) -> str:
        """The id of an item.

        Raises:
            UnexpectedResponse: it has none, although no table accepts such an item.
        """
        content = item.get(self.key, {}).get("S")
        if content is None:
            raise UnexpectedResponse(
                f"DynamoDB returned an item of {self.collection.name} without its key"
            )
        return cast("str", content)

    def entity(self, item: Attributes) -> Entity:
        """The entity of an item, including `version`.

        Raises:
            CorruptionError: the item contains an invalid value.
        """
        try:
            return self._entity(item)
        except ValueError as exc:
            raise unreadable(self.collection.name, self.id_of(item), str(exc)) from exc

    def _entity(self, item: Attributes) -> Entity:
        entity: Entity = {}
        document: Attributes = {}
        for name, attribute in item.items():
            if name == DOC and "M" in attribute:
                document = attribute["M"]
            elif is_field_name(name):
                entity[name] = decode(attribute)
        if CREATED_SUBSTITUTE in item and CREATED_AT in item:
            document = {**document, CREATED_AT: item[CREATED_SUBSTITUTE]}
        if document:
            entity.update(decode_map(document))
            if DECLARATION_DIGEST in item:
                for name, attribute in document.items():
                    if attribute == MISSING_SENTINEL:
                        del entity[name]
        entity.setdefault(VERSION, 0)
        return entity

    # -- attributes of other programs --------------------------------------------------------

    def check_attributes(self, item: Attributes) -> None:
        """Refuse to rewrite an item of another program that has attributes a rewrite would remove.

        Raises:
            CorruptionError: it has; the message names the item and an attribute.
        """
        if token_of(item) is not None:
            return
        document = item.get(DOC, {}).get("M", {})
        for name, attribute in item.items():
            if name.startswith("\0") or _is_reserved(name, attribute, item):
                why = "has a name that the store uses itself"
            elif name in document and name not in self.indexed:
                why = f"is hidden by the entry of the same name in {DOC}"
            else:
                continue
            raise unreadable(
                self.collection.name,
                self.id_of(item),
                f"its attribute {name} {why}, so that an update would remove it",
            )

    def keep_encodings(self, item: Attributes, replaced: Attributes) -> None:
        """Keep the stored encoding of each value of an item that is the same in the new item.

        The store itself would write some values of other programs differently: a set as a list, a
        binary value as a string, a number with more digits than a float as that float.
        """
        document = item[DOC]["M"]
        stored_document = replaced.get(DOC, {}).get("M")
        stored = {**replaced, **(stored_document or {})}
        if stored_document is not None and DOC not in stored_document:
            del stored[DOC]
        if CREATED_SUBSTITUTE in replaced:
            stored[CREATED_AT] = replaced[CREATED_SUBSTITUTE]
        for name, attribute in stored.items():
            container, key = (document if name in document else item), name
            if name == CREATED_AT and CREATED_SUBSTITUTE in item:
                key = CREATED_SUBSTITUTE
            written = container.get(key)
            if (
                written is not None
                and written != attribute
                and encode(decode(attribute)) == written
            ):
                container[key] = attribute

    def record(self, item: Attributes) -> Record:
        entity = self.entity(item)
        return Record(Key(self.collection.name, cast("str", entity[self.key])), entity)


def is_field_name(name: str) -> bool:
    """Whether the attribute of this name can be a field, except for `doc`."""
    return name not in _INTERNAL_ATTRIBUTES and not name.startswith((BOOLEAN_KEY, COMPOSITE_KEY))


def _present(value: Value | Removed) -> Value | Missing:
    return MISSING if isinstance(value, Removed) else value


def _is_reserved(name: str, attribute: Attribute, item: Attributes) -> bool:
    """Whether another program uses a name of the store for an attribute of its own.

    The store's own attributes may have come into an item by copying an item of the store.
    """
    if name.startswith(BOOLEAN_KEY):
        is_missing = name.removeprefix(BOOLEAN_KEY) not in item
        return attribute not in _BOOLEAN_KEYS[: 1 if is_missing else None]
    if name.startswith(COMPOSITE_KEY):
        return "B" not in attribute
    if name == CREATED_SUBSTITUTE:
        return CREATED_AT not in item
    return name in _INTERNAL_TYPES and _INTERNAL_TYPES[name] not in attribute


def token_of(item: Attributes) -> str | None:
    """The write token of an item; None if another program wrote the item."""
    attribute = item.get(TOKEN)
    return None if attribute is None else cast("str", attribute.get("S"))


def version_of(item: Attributes, table: str, entity_id: str) -> int:
    """The version of an item; 0 if it has none.

    Raises:
        CorruptionError: another program set an invalid version; the message names table and id.
    """
    attribute = item.get(VERSION)
    if attribute is None:
        return 0
    number = _integer_in(attribute)
    if number is None or not 0 <= number <= INT_MAX:
        why = f"its version is {str(attribute)[:100]}, not a non-negative 64-bit integer"
        raise unreadable(table, entity_id, why)
    return number


def size_bound_of(item: Attributes) -> int | None:
    """The stored upper bound of the size of an item; None if it is missing or invalid."""
    return _integer_in(item.get(SIZE, {}))


def _integer_in(attribute: Attribute) -> int | None:
    string = attribute.get("N", "")
    return (
        int(string) if isinstance(string, str) and string.isdecimal() and string.isascii() else None
    )
