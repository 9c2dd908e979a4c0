"""Declarations: collections, their fields and indexes, and the schema that contains them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import time, timedelta
from decimal import Decimal
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, Final, Self

import msgspec

from hf_async_store.arguments import check_declared
from hf_async_store.deferred import deferred
from hf_async_store.errors import (
    ConfigurationError,
    InvalidFieldError,
    InvalidKeyError,
    UnknownCollectionError,
    UnsupportedValueError,
)
from hf_async_store.expiry import Expire
from hf_async_store.values import (
    CREATED_AT,
    LIGHT_BYTES,
    MAX_KEY_BYTES,
    NOT_UTF8,
    REMOVE,
    TIMESTAMP_FORM,
    UPDATED_AT,
    VERSION,
    Entity,
    FieldType,
    Key,
    Removed,
    Value,
    check_size,
    is_canonical_timestamp,
    normalise,
    parse_timestamp,
    refuse_oversize,
    sized,
    type_name,
)

if TYPE_CHECKING:
    from hf_async_store import models
    from hf_async_store.models import ModelCodec, ModelField
else:
    models = deferred("models")

_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,47}\Z")
_RESERVED: Final = frozenset({"doc", "version"})
_MAX_SECONDS: Final = 1e9
"""About 31 years: what a timedelta, and every engine, can add to a time."""

MAX_UNIQUE_BYTES: Final = 1024
"""The UTF-8 of a text in a field of a unique index has at most this many bytes."""


def _checked_name(name: str, what: str) -> str:
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
            json (anything). Null is allowed unless the field is required.
        required: an entity in which it is missing or null is rejected.
        references: the collection whose key this field contains. Requires type text.
        enforced: False: the reference is documentation only. It is not checked whether the parent
            exists, for example because parents are stored elsewhere; their collection need not be
            declared.
    """

    name: str
    type: FieldType = "text"
    required: bool = False
    references: str | None = None
    enforced: bool = True

    def __post_init__(self) -> None:
        _checked_name(self.name, "field name")
        if not isinstance(self.type, str) or self.type not in _CHECKS:
            raise ConfigurationError(
                f"field {self.name!r}: unknown type {self.type!r}; the types are: "
                f"{', '.join(_CHECKS)}"
            )
        for switch in (self.required, self.enforced):
            if not isinstance(switch, bool):
                raise ConfigurationError(
                    f"field {self.name!r}: required and enforced must be True or False"
                )
        if self.references is not None and not isinstance(self.references, str):
            raise ConfigurationError(
                f"field {self.name!r}: references must be the name of a collection"
            )
        if self.references is not None and self.type != "text":
            raise ConfigurationError(
                f"field {self.name!r}: a reference must be of type text, not {self.type}"
            )

    @property
    def parent(self) -> str:
        """The collection to which a reference refers."""
        assert self.references is not None
        return self.references

    def check(self, value: Value, collection: str) -> Value:
        """The value in its stored form.

        Raises:
            InvalidFieldError: names collection, field and type.
        """
        if value is None:
            if self.required:
                raise InvalidFieldError(f"{collection}.{self.name} is required, not null")
            return None
        if self.type == "timestamp" and isinstance(value, str):
            canonical = parse_timestamp(value)
            if canonical is not None:
                return canonical
        elif isinstance(value, _CHECKS[self.type]) and (
            type(value) is not bool or self.type in ("boolean", "json")
        ):
            return value
        is_time = self.type == "timestamp"
        wanted = f"takes {TIMESTAMP_FORM}" if is_time else f"is declared as {self.type}"
        raise InvalidFieldError(
            f"{collection}.{self.name} {wanted}, but the value is {described(value)}"
        )


def _check_stored_name(field: ModelField, model: type) -> None:
    try:
        _checked_name(field.name, f"{model.__name__}: field name")
    except ConfigurationError as exc:
        raise ConfigurationError(
            f"{exc}; give it an alias (pydantic) or another name (`rename` of msgspec), under which it is "
            "stored; a field of a dataclass or an attrs class is stored under its own name"
        ) from exc


def _field_of(field: ModelField) -> Field:
    """The declaration of a field of a model."""
    # The store sets the timestamps, so an instance need not have them.
    required = field.required and field.name not in (CREATED_AT, UPDATED_AT)
    if field.references is None:
        return Field(field.name, field.type, required=required)
    collection, enforced = field.references
    return Field(field.name, field.type, required, references=collection, enforced=enforced)


_USUAL_TYPES: Final = {"text": str, "integer": int, "boolean": bool}

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


def described(value: Value) -> str:
    """The type of a value other than null, for errors."""
    # The value itself may be a secret; its type is enough.
    if isinstance(value, str):
        return "a string" if parse_timestamp(value) is None else "a timestamp string"
    return {bool: "a boolean", int: "an integer", float: "a float", list: "a list"}.get(
        type(value), "a dict"
    )


class _Uniqueness(msgspec.Struct, frozen=True, kw_only=True):
    """The argument of `Index` that can only be given by name."""

    unique: bool = False


class Index(_Uniqueness, frozen=True):
    """A declared index of one to four fields, compared in this order.

    It serves a query with equality on its first fields, a range on the next one, and the order by those
    that follow, in both directions. Its `name` follows the spec: `template_id-created_at-index`, or
    `name-index`. Only text, integer, number, boolean and timestamp fields can be indexed.

    Args:
        unique: no two entities may have the same values in all of its fields; entities in which one of
            them is missing or null do not count. It neither contains the key, which is unique anyway,
            nor `created_at` or `updated_at`.

    Example:
        `Index("template_id", "created_at")`
    """

    field: str
    sort: str | None = None
    third: str | None = None
    fourth: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.unique, bool):
            raise ConfigurationError("an index: unique must be True or False")
        for each in (self.field, self.sort, self.third, self.fourth):
            if not isinstance(each, str) and (each is not None or self.field is None):
                raise ConfigurationError(
                    'an index has one to four names of fields, for example Index("status", '
                    f'"created_at"), not {type(each).__name__}'
                )

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of its fields, in order."""
        named = (self.field, self.sort, self.third, self.fourth)
        return tuple(each for each in named if each is not None)

    @property
    def name(self) -> str:
        return "-".join([*self.fields, "index"])

    @classmethod
    def of(cls, fields: Sequence[str], *, unique: bool = False) -> Index:
        """The index of one to four fields."""
        first, *others = fields
        sort, third, fourth = [*others, None, None, None][:3]
        return cls(first, sort, third, fourth, unique=unique)


class Collection:
    """A declared collection.

    Args:
        name: `[a-z][a-z0-9_]{0,47}`.
        key: the field that contains the id.
        fields: the other declared fields: `Field`s, or names of fields of type text.
            `created_at` and `updated_at` are always declared.
        indexes: `Index`es, or names of single fields to index.
        open: queries may name undeclared fields without `path`. By default such a name is an error,
            because it may be misspelt.
        expires: when its entities expire; None: never.
        feed: for how long its changes are kept for `watch`, as a timedelta or in seconds; None: not at all.

    Attributes:
        fields: all declared fields by name: the key first, then in the order given, then the timestamps.
        indexes: each as an `Index`.
        references: the fields with an enforced reference, to another collection or to this one.
        required: the names of the required fields, without the key.
        typed: the fields whose values must be checked: all except optional ones of type json.
        unique: the names of the fields of each unique index.
        model: the class of its entities, if it was declared by `from_model`.
        feed: as a timedelta.

    Example:
        `Collection("accounts", key="account_id", fields=["owner"], indexes=["owner"])`

    Raises:
        ConfigurationError: a name is malformed, reserved, unknown or used twice.
    """

    name: str
    key: str
    fields: Mapping[str, Field]
    indexes: tuple[Index, ...]
    references: tuple[Field, ...]
    required: tuple[str, ...]
    typed: Mapping[str, Field]
    unique: tuple[tuple[str, ...], ...]
    open: bool
    model: type | None
    expires: Expire | None
    feed: timedelta | None

    def __init__(
        self,
        name: str,
        *,
        key: str,
        fields: Iterable[Field | str] = (),
        indexes: Iterable[Index | str] = (),
        open: bool = False,  # noqa: A002  # as an argument it reads best
        expires: Expire | None = None,
        feed: timedelta | float | None = None,
    ) -> None:
        self.name = _checked_name(name, "collection name")
        if not isinstance(open, bool):
            raise ConfigurationError(f"collection {name!r}: open must be True or False")
        self.open = open
        self.model = None
        self.key = key
        if not isinstance(expires, Expire | None):
            raise ConfigurationError(
                f"collection {name!r}: expires must be an Expire, not {type(expires).__name__}"
            )
        self.expires = expires
        self.feed = _checked_feed(self.name, feed)
        declared = _with_timestamps(
            [
                Field(key, required=True),
                *check_declared(fields, Field, f"the fields of {name!r}", Field),
            ],
            [] if expires is None else [expires.field],
        )
        self.fields = MappingProxyType({each.name: each for each in declared})
        self.indexes = check_declared(
            indexes,
            Index,
            f"the indexes of {name!r}",
            Index,
            form='; one of two fields is Index("status", "created_at")',
        )
        self.references = tuple(
            each for each in declared if each.references is not None and each.enforced
        )
        others = declared[1:]
        self.required = tuple(each.name for each in others if each.required)
        typed = [each for each in others if each.type != "json" or each.required]
        self.typed = MappingProxyType({each.name: each for each in typed})
        # Most values have the usual type of their field and need no further check.
        optional_timestamps = [e for e in typed if e.type == "timestamp" and not e.required]
        self._optional_timestamps = tuple(each.name for each in optional_timestamps)
        self._usual_types = tuple(
            (each.name, _usual_types(each)) for each in typed if each not in optional_timestamps
        )
        self._check(declared)
        self.unique = tuple(each.fields for each in self.indexes if each.unique)
        names = dict.fromkeys(name for fields in self.unique for name in fields)
        self._unique_texts = tuple(
            name for name in names if self.fields[name].type in ("text", "timestamp")
        )

    @classmethod
    def from_model(
        cls,
        model: type,
        *,
        key: str,
        name: str | None = None,
        fields: Iterable[Field | str] = (),
        indexes: Iterable[Index | str] = (),
        open: bool = False,  # noqa: A002  # as in the constructor
        expires: Expire | None = None,
        feed: timedelta | float | None = None,
    ) -> Self:
        """The declaration of a collection whose entities are instances of a class.

        The class is a pydantic model, a `msgspec.Struct`, a dataclass or an attrs class. Each of its
        fields is declared, under its alias if it has one. Strings, dates, UUIDs, decimals and bytes are
        text, `datetime`s are timestamps, enumerations and literals have the type of their values, and
        everything else is json. A field that has no default and is not optional is required. `References`
        marks a reference, `StoreVersion` the field that holds the version.

        Args:
            model: the class.
            key: the name of the field that contains the id.
            name: of the collection; by default from that of the class: `host_requests` for
                `HostRequest`.
            fields: declarations that replace those of the class, or are added to them.

        Example:
            `Collection.from_model(Job, key="job_id", indexes=["status"])`

        Raises:
            ConfigurationError: it is not such a class, or a field cannot be declared.
        """
        codec: ModelCodec[object] = models.codec_of(model)
        for each in codec.fields:
            _check_stored_name(each, model)
        declared = {each.name: _field_of(each) for each in codec.fields if each.name != key}
        given = check_declared(fields, Field, f"the fields of {model.__name__}", Field)
        declared.update({each.name: each for each in given})
        collection = cls(
            models.default_name(model) if name is None else name,
            key=key,
            fields=declared.values(),
            indexes=indexes,
            open=open,
            expires=expires,
            feed=feed,
        )
        if key not in codec.names:
            raise ConfigurationError(f"{model.__name__} has no field {key!r}, which is the key")
        kind = next((each.type for each in codec.fields if each.name == key), "text")
        if kind in ("integer", "number", "boolean"):
            raise ConfigurationError(
                f"{model.__name__}.{key} is the key, and of type {kind}; ids are strings: declare it as "
                "str or UUID"
            )
        collection.model = model
        return collection

    def _check(self, declared: Sequence[Field]) -> None:
        if len(self.fields) != len(declared):
            raise ConfigurationError(f"collection {self.name!r} declares a field twice")
        if len({each.name for each in self.indexes}) != len(self.indexes):
            raise ConfigurationError(f"collection {self.name!r} declares an index twice")
        for each in (CREATED_AT, UPDATED_AT):
            if self.fields[each].type != "timestamp":
                raise ConfigurationError(f"{self.name}.{each} must be of type timestamp")
        if self.expires is not None and self.fields[self.expires.field].type != "timestamp":
            raise ConfigurationError(
                f"{self.name}.{self.expires.field}, by which entities expire, must be of type timestamp"
            )
        for index in self.indexes:
            for name in index.fields:
                if name not in self.fields or self.fields[name].type == "json":
                    raise ConfigurationError(
                        f"index {index.name!r} of {self.name!r}: {name!r} is not a declared field "
                        "of a type that can be indexed"
                    )
                if index.unique and name in (self.key, CREATED_AT, UPDATED_AT):
                    raise ConfigurationError(
                        f"index {index.name!r} of {self.name!r}: a unique index does not contain "
                        f"{name!r}"
                    )

    def __repr__(self) -> str:
        return f"Collection({self.name!r}, key={self.key!r})"

    # -- validation of arguments -------------------------------------------------------------

    def key_of(self, entity_id: object) -> Key:
        """The key of an id.

        Raises:
            InvalidKeyError: it is not a string of 1 to 1,024 bytes of UTF-8 without U+0000.
        """
        if type(entity_id) is not str:
            entity_id = self._id_string(entity_id)
        if entity_id.isascii():
            if not 0 < len(entity_id) <= MAX_KEY_BYTES or "\x00" in entity_id:
                raise self._bad_id(entity_id)
        elif NOT_UTF8.search(entity_id) or len(entity_id.encode()) > MAX_KEY_BYTES:
            raise self._bad_id(entity_id)
        return Key(self.name, entity_id)

    def _id_string(self, entity_id: object) -> str:
        try:
            string = normalise(entity_id)
        except UnsupportedValueError as exc:
            raise InvalidKeyError(
                f"an id of {self.name} must be a string, not {type_name(entity_id)}"
            ) from exc
        if type(string) is not str:
            raise InvalidKeyError(
                f"an id of {self.name} must be a string, not {type_name(entity_id)}"
            )
        return string

    def id_of(self, entity: Entity) -> str:
        """The id of an entity that was read from a store."""
        entity_id = entity[self.key]
        assert isinstance(entity_id, str)
        return entity_id

    def field_at(self, path: Sequence[str | int]) -> Field | None:
        """The declared field at a path; None for an undeclared one, and for a path inside a field."""
        name, *inner = path
        return self.fields.get(name) if isinstance(name, str) and not inner else None

    def as_stored(self, path: Sequence[str | int], value: object) -> object:
        """A value of a query as the model stores it, if it is of a type that only models have."""
        if self.model is None or not isinstance(value, Decimal | time | timedelta | bytes):
            return value
        field = self.field_at(path)
        return models.codec_of(self.model).stored(None if field is None else field.name, value)

    def _bad_id(self, entity_id: str) -> InvalidKeyError:
        return InvalidKeyError(
            f"an id of {self.name} must be 1 to {MAX_KEY_BYTES} bytes of UTF-8 without U+0000, "
            f"not {entity_id[:40]!a}"
        )

    def entity(self, data: Mapping[str, object]) -> tuple[Key, Entity]:
        """The key and a portable, validated copy of a whole entity, without `version`.

        Raises:
            InvalidKeyError, UnsupportedValueError, InvalidFieldError: it cannot be stored.
        """
        self._check_is_mapping(data)
        if self.key not in data:
            raise InvalidKeyError(f"an entity of {self.name} needs its key field {self.key!r}")
        # Before the copy, so that an id that cannot be stored is reported as an invalid id.
        key = self.key_of(data[self.key])
        return key, self._whole(self._copied(data))

    def stored(self, data: Entity, size: int) -> tuple[Key, Entity]:
        """Like `entity`, for an entity that was read from a store: its portable values are not copied.

        `values.with_canonical` has replaced -0.0 in it.

        Args:
            size: the size of its JSON in bytes.

        Raises:
            InvalidKeyError, UnsupportedValueError, InvalidFieldError: it cannot be stored.
        """
        if self.key not in data:
            raise InvalidKeyError(f"an entity of {self.name} needs its key field {self.key!r}")
        key = self.key_of(data[self.key])
        if size > LIGHT_BYTES:
            check_size(data)
        return key, self._whole(self._checked(dict(data)))

    def _whole(self, entity: Entity) -> Entity:
        """Check the required fields and remove `version`, in place."""
        entity.pop(VERSION, None)
        for name in self.required:
            if name not in entity:
                raise InvalidFieldError(f"{self.name}.{name} is required")
        return entity

    def changes(self, entity_id: str, data: Mapping[str, object]) -> dict[str, Value | Removed]:
        """A portable, validated copy of the fields of an update, without `version`.

        Raises:
            InvalidFieldError: also for removing the key or a required field.
        """
        self._check_is_mapping(data)
        removed = [name for name, value in data.items() if value is REMOVE]
        for name in removed:
            if name in self.required:
                raise InvalidFieldError(f"{self.name}.{name} is required and cannot be removed")
        # The names of removed fields are validated too, as if their values were null.
        kept = {**data, **dict.fromkeys(removed)} if removed else data
        copied: dict[str, Value | Removed] = dict(self._copied(kept))
        copied.update(dict.fromkeys(removed, REMOVE))
        copied.pop(VERSION, None)
        if copied.get(self.key, entity_id) != entity_id or self.key in removed:
            raise InvalidFieldError(f"{self.name}.{self.key} is the key and cannot be changed")
        return copied

    def _check_is_mapping(self, data: object) -> None:
        if type(data) is not dict and not isinstance(data, Mapping):  # the latter takes longer
            raise UnsupportedValueError(
                f"an entity of {self.name} must be a dict, not {type_name(data)}"
            )

    def _copied(self, data: Mapping[str, object]) -> Entity:
        entity, size = sized(data)
        refuse_oversize(entity, size)
        return self._checked(entity)

    def _checked(self, entity: Entity) -> Entity:
        """Convert the declared fields of the entity to their stored form, in place."""
        for name, kinds in self._usual_types:
            if type(value := entity.get(name)) not in kinds and name in entity:
                entity[name] = self.typed[name].check(value, self.name)
        for name in self._optional_timestamps:
            value = entity.get(name)
            if value is not None and (type(value) is not str or not is_canonical_timestamp(value)):
                entity[name] = self.typed[name].check(value, self.name)
        for name in self._unique_texts:
            value = entity.get(name)
            if value is not None and len(str(value).encode()) > MAX_UNIQUE_BYTES:
                raise InvalidFieldError(
                    f"{self.name}.{name} is in a unique index: its text has at most "
                    f"{MAX_UNIQUE_BYTES:,} bytes"
                )
        return entity


def _checked_feed(collection: str, feed: object) -> timedelta | None:
    if feed is None or isinstance(feed, timedelta):
        retention = feed
    elif isinstance(feed, int | float) and not isinstance(feed, bool) and 0 < feed < _MAX_SECONDS:
        retention = timedelta(seconds=feed)
    else:
        raise ConfigurationError(
            f"collection {collection!r}: feed must be a timedelta or seconds, not {feed!r}"
        )
    if retention is not None and retention <= timedelta():
        raise ConfigurationError(f"collection {collection!r}: feed must be longer than 0")
    return retention


def _with_timestamps(declared: list[Field], others: Iterable[str] = ()) -> list[Field]:
    names = {each.name for each in declared}
    wanted = dict.fromkeys([*others, CREATED_AT, UPDATED_AT])
    timestamps = (Field(each, "timestamp") for each in wanted)
    return declared + [each for each in timestamps if each.name not in names]


def _usual_types(field: Field) -> tuple[type | None, ...]:
    usual = _USUAL_TYPES.get(field.type)
    return (usual,) if field.required else (usual, NoneType)


class Schema(Mapping[str, Collection]):
    """The declared collections of a store, by name, parents before children.

    Attributes:
        children: by the name of a parent: each child collection, with its field that refers to the parent.
            References with `enforced=False` are left out; without children, the tuple is empty.
        unique: by the name of a collection that has unique indexes: the names of the fields of each.

    Raises:
        ConfigurationError: a duplicate name, a reference to an undeclared collection, or a cycle of
            references other than from a collection to itself.
    """

    __slots__ = ("_by_name", "_found", "children", "unique")

    children: Mapping[str, tuple[tuple[Collection, Field], ...]]
    unique: Mapping[str, tuple[tuple[str, ...], ...]]

    def __init__(self, collections: Iterable[Collection]) -> None:
        declared = check_declared(
            collections,
            Collection,
            "collections",
            form="; a class is declared by Collection.from_model",
        )
        by_name = {each.name: each for each in declared}
        if len(by_name) != len(declared):
            names = [each.name for each in declared]
            twice = next(each for each in names if names.count(each) > 1)
            raise ConfigurationError(f"the collection {twice!r} is declared twice")
        for each in declared:
            for field in each.references:
                if field.references not in by_name:
                    raise ConfigurationError(
                        f"{each.name}.{field.name} refers to {field.references!r}, "
                        "which is not declared"
                    )
        self._by_name = {each.name: each for each in _parents_first(declared)}
        self._found = self._by_name  # also those that are not listed
        self.unique = MappingProxyType({e.name: e.unique for e in declared if e.unique})
        self.children = MappingProxyType(
            {
                parent.name: tuple(
                    (each, field)
                    for each in declared
                    for field in each.references
                    if field.references == parent.name
                )
                for parent in declared
            }
        )

    def __getitem__(self, name: str) -> Collection:
        try:
            return self._found[name]
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


def _parents_first(collections: Sequence[Collection]) -> list[Collection]:
    ordered: list[Collection] = []
    placed: set[str] = set()
    waiting = list(collections)
    while waiting:
        ready = [
            each
            for each in waiting
            if all(f.references in placed or f.references == each.name for f in each.references)
        ]
        if not ready:
            raise ConfigurationError(
                "the references form a cycle: " + ", ".join(each.name for each in waiting)
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
        indexes=[
            Index("template_id", "created_at"),
            "request_type",
            Index("status", "created_at"),
            "created_at",
        ],
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
        indexes=[
            Index("request_id", "created_at"),
            "return_request_id",
            "name",
            Index("status", "created_at"),
            "created_at",
        ],
    ),
)
"""The collections of the spec: templates, requests and machines, with its columns and references, and
the indexes for the queries of an orchestrator. Only the keys are required, because examples in the spec
omit columns that are NOT NULL in its DDL."""

MIGRATION_COLLECTION: Final = Collection("hf_move", key="move_id")
MARKER_COLLECTION: Final = Collection("hf_marks", key="mark_id")
MIGRATION_COLLECTIONS: Final = (MIGRATION_COLLECTION, MARKER_COLLECTION)
"""The collections of a live migration: its record, and the change markers."""

CATALOGUE_COLLECTION: Final = Collection("hf_catalogue", key="name")
UNIQUE_COLLECTION: Final = Collection("hf_unique", key="value", fields=["owner"])
CLAIM_COLLECTION: Final = Collection("hf_claims", key="claim_id")
LOCK_COLLECTION: Final = Collection("hf_locks", key="name")
SUBSCRIPTION_COLLECTION: Final = Collection("hf_subscriptions", key="name")
SYSTEM_COLLECTIONS: Final = (
    *MIGRATION_COLLECTIONS,
    CATALOGUE_COLLECTION,
    UNIQUE_COLLECTION,
    CLAIM_COLLECTION,
    LOCK_COLLECTION,
    SUBSCRIPTION_COLLECTION,
)
"""The collections that a store itself needs, in addition to the declared ones: those of a live migration,
the declarations that the store remembers (`Engine.remember`), the owners of unique values, where the
engine itself has no unique indexes, claims (`claim_records`), named locks, which are claims without
entities, and the positions of named subscriptions to a change feed (`feed.py`)."""

SYSTEM_NAMES: Final = frozenset(each.name for each in SYSTEM_COLLECTIONS)

_UNLISTED: Final = {
    each.name: each for each in SYSTEM_COLLECTIONS if each not in MIGRATION_COLLECTIONS
}


class EngineSchema(Schema):
    """The schema that an engine gets: looking up a name also finds the collections of the declarations,
    of the owners of unique values, of the claims, of the locks and of the subscriptions.

    They are not listed, so they have no entities for a store, a backup or a migration.
    """

    __slots__ = ()

    def __init__(self, collections: Iterable[Collection]) -> None:
        super().__init__(collections)
        self._found = {**_UNLISTED, **self._by_name}
        self.children = MappingProxyType({**dict.fromkeys(_UNLISTED, ()), **self.children})
