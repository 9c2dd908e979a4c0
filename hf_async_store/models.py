"""Classes of entities: what a model declares, and how its instances are stored.

A model is a pydantic model, a `msgspec.Struct`, a dataclass or an attrs class. None of these libraries
is imported here, except msgspec, which converts all of them but pydantic's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)
from uuid import UUID

import msgspec

from hf_async_store import single_fields
from hf_async_store.errors import (
    ConfigurationError,
    EntityMismatchError,
    InvalidFieldError,
    UnsupportedValueError,
)
from hf_async_store.values import (
    CREATED_AT,
    UPDATED_AT,
    VERSION,
    Entity,
    FieldType,
    parse_timestamp,
)

Model = TypeVar("Model")


class References(NamedTuple):
    """Marks a field of a model as a reference, in `Annotated[str, References("requests")]`.

    Attributes:
        collection: the name of the collection whose key the field contains.
        enforced: see `Field`.
    """

    collection: str
    enforced: bool = True


class StoreVersion(NamedTuple):
    """Marks the field of a model that holds the version of the entity.

    `revision: Annotated[int | None, StoreVersion()] = None`. A field named `version` needs no mark. The
    store sets it in what it returns. An instance in which it is a number is saved only if that
    version is stored.
    """


class ModelField(NamedTuple):
    """A field of a model, as it is declared.

    Attributes:
        name: as it is stored: the alias of the field, if it has one.
        attribute: its name in the model.
        type: the declared type that its annotation stands for.
        required: it has no default and is not optional.
        references: its mark, if it is a reference.
        has_default: an instance can be made without it.
    """

    name: str
    attribute: str
    type: FieldType
    required: bool
    references: References | None
    has_default: bool


class ModelCodec(Generic[Model]):
    """How the instances of a model are stored.

    Attributes:
        model: the class.
        fields: its fields, except the one that holds the version.
        version: the stored name of the field that holds the version, or None.
        attributes: the stored names of the fields, by their names in the model.
        names: the names of all stored fields of an instance.
    """

    def __init__(self, model: type[Model], library: _Library) -> None:
        self.model = model
        self.fields: tuple[ModelField, ...]
        self.version: str | None
        self._library = library
        self.fields, self.version, self._version_attribute = _described(model, library)
        self.attributes: Final = {each.attribute: each.name for each in self.fields}
        self._by_name: Final = {each.name: each for each in self.fields}
        self._single: dict[str, type | None] = {}
        self._in_order: Final = (*self.attributes.values(), *library.tags(model))
        self.names: Final = frozenset(self._in_order)
        self._checked = tuple(
            (each.name, each.attribute)
            for each in self.fields
            if each.type in ("timestamp", "json")
        )

    def name_of(self, attribute: str) -> str | None:
        """The stored name of a field of the model; None if there is no such field."""
        return self.attributes.get(attribute)

    def entity(self, instance: Model) -> dict[str, object]:
        """The fields of an instance as they are stored, without the version.

        Raises:
            UnsupportedValueError: it is not an instance of the model, or holds what cannot be stored, for
                example a datetime without a zone.
        """
        if not isinstance(instance, self.model):
            raise UnsupportedValueError(
                f"an instance of {self.model.__name__} is expected, not {type(instance).__name__}"
            )
        try:
            for name, attribute in self._checked:
                _refuse_what_is_lost(getattr(instance, attribute, None), name)
            fields = self._library.dump(instance)
        except (TypeError, ValueError, RecursionError) as exc:
            raise _not_stored(self.model.__name__, exc) from exc
        if self.version is not None:
            fields.pop(self.version, None)
        for name in (CREATED_AT, UPDATED_AT):
            if fields.get(name) is None:  # the store sets it
                fields.pop(name, None)
        return fields

    def version_in(self, instance: Model) -> int | None:
        """The version that an instance holds."""
        if self._version_attribute is None:
            return None
        held = getattr(instance, self._version_attribute)
        return None if held is msgspec.UNSET else cast("int | None", held)

    def value(self, name: str, value: object) -> object:
        """A value of a field as it is stored, in an update.

        Args:
            name: the stored name of the field, which may be unknown to the model.

        Raises:
            UnsupportedValueError: it cannot be stored.
            InvalidFieldError: it does not fit the field, so that the entity could not be read any more.
        """
        stored = self.stored(name, value)
        field = self._by_name.get(name)
        if field is not None:
            try:
                self._check(field, stored)
            except ValueError as exc:
                where, problem = self._library.problems(exc)[0]
                raise InvalidFieldError(
                    f"{self.model.__name__}, field {where or name!r}: {problem}"
                ) from exc
        return stored

    def stored(self, name: str | None, value: object) -> object:
        """A value in its stored form, as `value`, whether it fits its field or not."""
        kind = type(value).__name__
        field = None if name is None else self._by_name.get(name)
        attribute = None if field is None else field.attribute
        try:
            _refuse_what_is_lost(value, kind)
            return self._library.dump_value(self.model, attribute, value)
        except (TypeError, ValueError, RecursionError) as exc:
            raise _not_stored(kind, exc) from exc

    def check_removal(self, name: str) -> None:
        """Raise `InvalidFieldError` for a field without which no instance can be made."""
        field = self._by_name.get(name)
        if field is not None and not field.has_default:
            raise InvalidFieldError(
                f"{self.model.__name__}, field {name!r}: it has no default, and cannot be removed"
            )

    def _check(self, field: ModelField, stored: object) -> None:
        """Raise a ValueError of the library if a stored value does not fit its field."""
        if field.name not in self._single:
            self._single[field.name] = self._library.single(self.model, field)
        single = self._single[field.name]
        if single is None:
            return
        if field.type == "timestamp" and isinstance(stored, str):
            stored = parse_timestamp(stored) or stored  # as the store writes it
        with suppress(OverflowError, UnicodeEncodeError):  # the store names what it cannot contain
            self._library.load(single, {field.name: stored})

    def instance(self, collection: str, entity_id: str, entity: Entity) -> Model:
        """The instance for a stored entity. Fields that are unknown to the model are left out.

        Raises:
            EntityMismatchError: the entity does not fit the model.
        """
        known = {name: entity[name] for name in self._in_order if name in entity}
        if self.version is not None:
            known[self.version] = entity[VERSION]
        try:
            return cast("Model", self._library.load(self.model, known))
        except ValueError as exc:  # of msgspec and of pydantic, and of validators of the user's
            (field, problem), *others = self._problems(exc, known)
            listed = [f"; field {where!r}: {what}" for where, what in others[: _MAX_PROBLEMS - 1]]
            more = len(others) - len(listed)
            raise EntityMismatchError(
                collection,
                entity_id,
                self.model.__name__,
                field,
                "".join([problem, *listed, f"; and {more} more" if more else ""]),
            ) from exc

    def _problems(self, exc: ValueError, entity: Mapping[str, object]) -> list[tuple[str, str]]:
        """The paths of the fields of an entity that do not fit, and what is wrong with each."""
        found = self._library.problems(exc)
        if self._library.names_all:
            return found
        first = re.match(_FIRST_STEP, found[0][0])
        for each in self.fields:
            if first is not None and each.name == first[0]:
                continue
            if each.name in entity:
                try:
                    self._check(each, entity[each.name])
                except ValueError as other:
                    [(where, what)] = self._library.problems(other)
                    found.append((where or each.name, what))
            elif not each.has_default:
                found.append((each.name, "it is missing"))
        is_repeated = not found[0][0] and found[0][1] in [what for _, what in found[1:]]
        return found[1:] if is_repeated else found


class _Library:
    """How instances are converted by msgspec: structs, dataclasses and attrs classes."""

    def declared(self, model: Any) -> Iterable[tuple[str, str, bool]]:
        """Each field: its name in the model, its stored name, and whether it has no default."""
        try:
            msgspec.json.Decoder(model)
        except (TypeError, KeyError) as exc:  # a KeyError for a field without an annotation
            raise ConfigurationError(
                f"the fields of {model.__name__} cannot be converted: {exc!r}"
            ) from exc
        if hasattr(model, "__struct_fields__"):
            if model.__struct_config__.array_like:
                raise ConfigurationError(
                    f"{model.__name__} is array_like: its fields would have no names"
                )
            return [(e.name, e.encode_name, e.required) for e in msgspec.structs.fields(model)]
        info = msgspec.inspect.type_info(model)
        assert isinstance(info, msgspec.inspect.DataclassType)
        return [(each.name, each.encode_name, each.required) for each in info.fields]

    def tags(self, model: type) -> tuple[str, ...]:
        """The names of stored fields that are not fields of the model."""
        config = getattr(model, "__struct_config__", None)
        tag = None if config is None else config.tag_field
        return () if tag is None else (tag,)

    def dump(self, instance: object) -> dict[str, object]:
        return cast("dict[str, object]", msgspec.to_builtins(instance, str_keys=True))

    def dump_value(self, model: type, attribute: str | None, value: object) -> object:
        """A value of a field; the attribute is None if the model does not have it."""
        return msgspec.to_builtins(value, str_keys=True)

    def single(self, model: type, field: ModelField) -> type | None:
        """A class that has only this field; None if the field cannot be checked alone."""
        return single_fields.of_annotation(model, field.attribute, field.name)

    def load(self, model: type, entity: Mapping[str, object]) -> object:
        return msgspec.convert(entity, model, str_keys=True)

    names_all = False
    """Whether an error names all fields that do not fit, and not only the first."""

    def problems(self, exc: ValueError) -> list[tuple[str, str]]:
        """The paths of the fields that do not fit, and what is wrong with each."""
        message = str(exc)
        found = re.search(_MSGSPEC_PATH, message)
        if found is None:
            missing = re.search(_MSGSPEC_MISSING, message)
            return [("" if missing is None else missing[1], message)]
        return [(found[1], message[: found.start()])]


_MSGSPEC_PATH: Final = r" - at `\$\.?([^`]*)`$"
_MSGSPEC_MISSING: Final = r"required field `([^`]*)`"
_FIRST_STEP: Final = r"[^.\[]+"

_MAX_PROBLEMS: Final = 5
"""How many fields an `EntityMismatchError` names."""


class _Pydantic(_Library):
    """How instances of pydantic models are converted. All values pass as JSON, so that models in strict
    mode accept timestamps and the like."""

    def declared(self, model: Any) -> Iterable[tuple[str, str, bool]]:
        by_name = model.model_config.get("validate_by_name") or model.model_config.get(
            "populate_by_name"
        )
        for name, field in model.model_fields.items():
            if field.exclude:
                continue
            written = field.serialization_alias or name
            read = field.validation_alias or name
            if written != read and not (by_name and written == name):
                raise ConfigurationError(
                    f"{model.__name__}.{name} would be stored as {written!r}, and read as {read!r}: it "
                    "needs the same alias for both"
                )
            yield name, written, field.is_required()

    def tags(self, model: type) -> tuple[str, ...]:
        return ()

    def dump(self, instance: Any) -> dict[str, object]:
        if instance.model_extra:
            listed = ", ".join(map(repr, instance.model_extra))
            raise UnsupportedValueError(f"{listed}: not a field of {type(instance).__name__}")
        names = type(instance).model_fields  # without computed fields, which cannot be read back
        fields: dict[str, object] = instance.model_dump(
            mode="json", by_alias=True, include=set(names)
        )
        _refuse_masked(vars(instance).values(), fields)
        return fields

    def dump_value(self, model: Any, attribute: str | None, value: object) -> object:
        stored: object
        if attribute is None:
            stored = sys.modules["pydantic_core"].to_jsonable_python(value, by_alias=True)
        else:
            # By the serializer of the model, because its fields may have serializers of their own.
            # Nothing is called for the defaults of the others, which are not written.
            instance = model.__new__(model)
            object.__setattr__(
                instance, "__dict__", dict.fromkeys(model.model_fields) | {attribute: value}
            )
            object.__setattr__(instance, "__pydantic_fields_set__", {attribute})
            object.__setattr__(instance, "__pydantic_extra__", None)
            object.__setattr__(instance, "__pydantic_private__", None)
            [stored] = model.__pydantic_serializer__.to_python(
                instance, mode="json", by_alias=True, include={attribute}, warnings="none"
            ).values()
        _refuse_masked([value], {type(value).__name__: stored})
        return stored

    def single(self, model: type, field: ModelField) -> type | None:
        return single_fields.of_pydantic(model, field.attribute)

    def load(self, model: Any, entity: Mapping[str, object]) -> object:
        return model.model_validate_json(msgspec.json.encode(entity))

    names_all = True

    def problems(self, exc: ValueError) -> list[tuple[str, str]]:
        errors: Callable[..., list[dict[str, Any]]] | None = getattr(exc, "errors", None)
        if errors is None:
            return [("", str(exc))]
        found = errors(include_input=False, include_url=False, include_context=False)
        return [(".".join(map(str, each["loc"])), each["msg"]) for each in found]


def _not_stored(what: str, exc: Exception) -> UnsupportedValueError:
    return UnsupportedValueError(f"{what}: it cannot be stored: {exc}")


def _refuse_what_is_lost(value: object, where: str) -> None:
    """Refuse what the libraries would write as something else than it is.

    That is, at any depth, a datetime without a zone, which would be a string without one, and a float that
    is not finite, which pydantic would write as null.
    """
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise UnsupportedValueError(f"{where}: a datetime without a time zone")
    elif isinstance(value, float):
        if not isfinite(value):
            raise UnsupportedValueError(f"{where}: {value} (only finite numbers can be stored)")
    elif isinstance(value, Mapping):
        for name, each in value.items():
            _refuse_what_is_lost(each, f"{where}.{name}")
    elif isinstance(value, list | tuple | set | frozenset):
        for number, each in enumerate(value):
            _refuse_what_is_lost(each, f"{where}[{number}]")
    else:
        for name in _attributes(type(value)):
            _refuse_what_is_lost(getattr(value, name, None), f"{where}.{name}")


def _attributes(kind: type) -> Iterable[str]:
    """The names of the fields of a class, if it is like a model."""
    listed: Iterable[str] | None = getattr(kind, "__struct_fields__", None)
    if listed is None:
        listed = getattr(kind, "__dataclass_fields__", None)
    if listed is None:
        listed = getattr(kind, "model_fields", None)
    if listed is None:
        return [each.name for each in getattr(kind, "__attrs_attrs__", ())]
    return listed


def _refuse_masked(values: Iterable[Any], fields: Mapping[str, object]) -> None:
    """Refuse secrets of pydantic that would be stored as asterisks."""
    masked = {str(each) for each in values if hasattr(each, "get_secret_value")}
    for name, stored in fields.items():
        if isinstance(stored, str) and stored in masked and not stored.strip("*"):
            raise UnsupportedValueError(
                f"{name}: a secret, which would be stored as asterisks: give its field a field_serializer"
            )


def codec_of(model: type[Model]) -> ModelCodec[Model]:
    """How the instances of a model are stored.

    Raises:
        ConfigurationError: it is not a model, or a field of it cannot be stored.
    """
    any_class: object = model
    return _codec_of(any_class)


@cache
def _codec_of(model: Any) -> ModelCodec[Any]:
    if not isinstance(model, type):
        raise ConfigurationError(f"a model is a class, not {model!r}")
    if hasattr(model, "__pydantic_validator__") and hasattr(model, "model_fields"):
        return ModelCodec(model, _Pydantic())
    if (
        hasattr(model, "__struct_fields__")
        or hasattr(model, "__dataclass_fields__")
        or hasattr(model, "__attrs_attrs__")
    ):
        return ModelCodec(model, _Library())
    raise ConfigurationError(
        f"{model.__name__} is not a model: a pydantic model, a msgspec.Struct, a dataclass or an attrs "
        "class is needed"
    )


def default_name(model: type) -> str:
    """The name of the collection of a model: `HostRequest` is stored in `host_requests`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", model.__name__).lower() + "s"


def _described(
    model: type, library: _Library
) -> tuple[tuple[ModelField, ...], str | None, str | None]:
    """The fields of a model, and the stored name and the attribute that hold the version."""
    try:
        hints = get_type_hints(model, include_extras=True)
    except (NameError, TypeError) as exc:
        raise ConfigurationError(
            f"the annotations of {model.__name__} cannot be evaluated: {exc}"
        ) from exc
    fields: list[ModelField] = []
    versions: list[tuple[str, str]] = []
    for attribute, name, is_required in library.declared(model):
        annotation = _annotation(hints[attribute])
        if annotation.is_version or attribute == VERSION:
            versions.append((name, attribute))
            continue
        fields.append(
            ModelField(
                name,
                attribute,
                annotation.type,
                is_required and not annotation.is_optional,
                annotation.references,
                not is_required,
            )
        )
    if len(versions) > 1:
        raise ConfigurationError(f"{model.__name__} has several fields for the version")
    name_of_version, attribute_of_version = versions[0] if versions else (None, None)
    return tuple(fields), name_of_version, attribute_of_version


class _Annotation(NamedTuple):
    """What an annotation says."""

    type: FieldType
    is_optional: bool = False
    references: References | None = None
    is_version: bool = False


def _annotation(annotation: Any) -> _Annotation:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *marks = get_args(annotation)
        found = _annotation(inner)
        for mark in marks:
            if isinstance(mark, References):
                found = found._replace(references=mark)
            elif isinstance(mark, StoreVersion) or mark is StoreVersion:
                found = found._replace(is_version=True)
        return found
    if origin in (Union, UnionType):
        return _union(get_args(annotation))
    if isinstance(annotation, NewType):
        return _annotation(annotation.__supertype__)
    if origin is Literal:
        return _Annotation(_type_of({type(each) for each in get_args(annotation)}))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _Annotation(_type_of({type(each.value) for each in annotation}))
    return _Annotation(_type_of({annotation}))


def _union(alternatives: Iterable[Any]) -> _Annotation:
    found = [_annotation(each) for each in alternatives if each not in _ABSENT]
    kinds = {each.type for each in found}
    if kinds == {"integer", "number"}:
        kinds = {"number"}
    marks = [each.references for each in found if each.references is not None]
    return _Annotation(
        kinds.pop() if len(kinds) == 1 else "json",
        is_optional=len(found) < len(list(alternatives)) or any(e.is_optional for e in found),
        references=marks[0] if marks else None,
        is_version=any(each.is_version for each in found),
    )


def _type_of(kinds: set[Any]) -> FieldType:
    """The declared type for classes of values."""
    found: set[FieldType] = {_single_type(each) for each in kinds}
    return found.pop() if len(found) == 1 else "json"


def _single_type(kind: Any) -> FieldType:
    if not isinstance(kind, type):
        return "json"
    return next((name for base, name in _TYPES if issubclass(kind, base)), "json")


_ABSENT: Final = (NoneType, msgspec.UnsetType)

_TYPES: Final[tuple[tuple[type, FieldType], ...]] = (
    (bool, "boolean"),
    (int, "integer"),
    (float, "number"),
    (str, "text"),
    (datetime, "timestamp"),
    (date, "text"),
    (time, "text"),
    (timedelta, "text"),
    (UUID, "text"),
    (Decimal, "text"),
    (bytes, "text"),
)
"""In this order, because a bool is an int, and a datetime is a date."""
