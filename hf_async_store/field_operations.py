"""Changes of a field that are computed from its stored value: operations, and changes of nested values.

`read_update` converts the argument of an update. A `FieldChange` in its result is applied by
`preconditions.patched`, in the atomic step in which the engine decides the change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal, TypeAlias, final, get_args

import msgspec

from hf_async_store.errors import InvalidFieldError, InvalidQueryError
from hf_async_store.query import MISSING, Missing, Path, Steps, checked_steps, order_key
from hf_async_store.schema import Collection, Field, described
from hf_async_store.values import (
    INT_MAX,
    INT_MIN,
    REMOVE,
    VERSION,
    FieldType,
    Removed,
    Value,
    join_path,
    normalise,
    type_name,
    weighed,
)

OperationName: TypeAlias = Literal["increment", "append", "add_to_set", "remove_from_set"]


class Operation(msgspec.Struct, frozen=True):
    """An operation with its operand, as a value in an update. `read_update` validates it."""

    name: OperationName
    operand: object


def increment(amount: int = 1) -> Operation:
    """In an update: add an integer, which may be negative, to a stored integer; a missing one is 0.

    `InvalidFieldError`: the stored value is null or not an integer, or the result exceeds 64 bits.
    """
    return Operation("increment", amount)


def append(value: object) -> Operation:
    """In an update: add an element to the end of a stored list; a missing list is created."""
    return Operation("append", value)


def add_to_set(value: object) -> Operation:
    """In an update: as `append`, unless an element is `eq` to the value (1 equals 1.0, not True)."""
    return Operation("add_to_set", value)


def remove_from_set(value: object) -> Operation:
    """In an update: remove all elements that are `eq` to the value from a stored list, if it exists."""
    return Operation("remove_from_set", value)


class NestedChange(msgspec.Struct, frozen=True):
    """The change of the value at a path.

    Attributes:
        path: from the top-level field, whose name is the first step.
        change: the new value, REMOVE, or an operation whose operand is portable.
    """

    path: Steps
    change: Value | Removed | Operation

    @property
    def creates(self) -> bool:
        """Whether missing maps on the path are created."""
        if isinstance(self.change, Operation):
            return self.change.name != "remove_from_set"
        return not isinstance(self.change, Removed)

    def apply(self, value: Value | Missing, depth: int = 1) -> Value | Missing:
        """The changed copy of the value at the first `depth` steps of the path.

        Raises:
            InvalidFieldError: a stored value has a type that the change does not apply to.
        """
        if depth == len(self.path):
            return self._replaced(value)
        if value is MISSING and not self.creates:
            return MISSING
        step = self.path[depth]
        if isinstance(step, int):
            return self._with_element(value, step, depth)
        if value is MISSING:
            value = {}
        if not isinstance(value, dict):
            raise self.refused(f"{join_path(self.path[:depth])} is {_described(value)}, not a dict")
        inner = self.apply(value.get(step, MISSING), depth + 1)
        if inner is MISSING:
            return {name: each for name, each in value.items() if name != step}
        return {**value, step: inner}

    def _with_element(self, value: Value | Missing, index: int, depth: int) -> Value | Missing:
        if not isinstance(value, list):
            raise self.refused(f"{join_path(self.path[:depth])} is {_described(value)}, not a list")
        if index >= len(value):
            if not self.creates:
                return value
            raise self.refused(f"the list has only {len(value)} elements")
        element = self.apply(value[index], depth + 1)
        # An element is never removed, because that would change the indexes of others.
        return value if element is MISSING else [*value[:index], element, *value[index + 1 :]]

    def _replaced(self, value: Value | Missing) -> Value | Missing:
        change = self.change
        if isinstance(change, Removed):
            return MISSING
        return self._operated(value, change) if isinstance(change, Operation) else change

    def _operated(self, value: Value | Missing, operation: Operation) -> Value | Missing:
        operand = normalise(operation.operand)
        if operation.name == "increment":
            return self._incremented(0 if value is MISSING else value, operand)
        if value is MISSING:
            return [operand] if self.creates else MISSING
        if not isinstance(value, list):
            raise self.refused(f"{operation.name} needs a list, not {_described(value)}")
        if operation.name == "append":
            return [*value, operand]
        key = order_key(operand)
        others = [each for each in value if order_key(each) != key]
        if operation.name == "remove_from_set":
            return others
        return [*value, operand] if len(others) == len(value) else value

    def _incremented(self, value: Value, amount: Value) -> int:
        if type(value) is not int or type(amount) is not int:
            raise self.refused(f"increment needs a stored integer, not {_described(value)}")
        if not INT_MIN <= value + amount <= INT_MAX:
            raise self.refused("the result of increment has more than 64 bits")
        return value + amount

    def refused(self, problem: str) -> InvalidFieldError:
        return InvalidFieldError(f"{join_path(self.path)}: {problem}")


def _described(value: Value | Missing) -> str:
    return "missing" if value is MISSING else "null" if value is None else described(value)


@final
class FieldChange(msgspec.Struct, frozen=True):
    """The change of one top-level field, computed from its stored value.

    Attributes:
        field: its declaration, if it is declared.
        parts: applied one after another; no path begins with another one.
    """

    collection: str
    name: str
    field: Field | None
    parts: tuple[NestedChange, ...]

    def apply(self, stored: Value | Missing) -> Value | Removed:
        """The new value; REMOVE if the entity does not have the field afterwards.

        Raises:
            InvalidFieldError: the stored value has another type, or the new one is not as declared.
            UnsupportedValueError: the new value is nested too deep.
        """
        value = stored
        try:
            for each in self.parts:
                value = each.apply(value)
        except InvalidFieldError as exc:
            raise InvalidFieldError(f"{self.collection}.{exc}") from exc
        if value is MISSING:
            if self.field is not None and self.field.required:
                raise InvalidFieldError(f"{self.collection}.{self.name} is required")
            return REMOVE
        value = weighed(value, (self.name,))[0]
        return value if self.field is None else self.field.check(value, self.collection)


FieldUpdate: TypeAlias = Value | Removed | FieldChange
"""What an update does with one field: a new value, REMOVE, or a change of the stored value."""


def plain_fields(fields: Mapping[str, FieldUpdate]) -> dict[str, Value | Removed] | None:
    """The fields of an update; None if one of them is computed from its stored value."""
    plain: dict[str, Value | Removed] = {}
    for name, each in fields.items():
        if isinstance(each, FieldChange):
            return None
        plain[name] = each
    return plain


# -- the argument of an update ---------------------------------------------------------------

UpdateMap: TypeAlias = "Mapping[Any, object]"
"""The changes of an update: maps a field name or a `Path` to a value, REMOVE or an operation.

The keys are of type Any, because type checkers infer `dict[object, ...]` for names and paths together.
"""


def read_update(collection: Collection, entity_id: str, data: UpdateMap) -> dict[str, FieldUpdate]:
    """A portable, validated copy of the fields of an update, without `version`.

    Raises:
        InvalidFieldError: also for a change of the key, and for removing a required field.
        UnsupportedValueError: a value cannot be stored.
    """
    if not isinstance(data, Mapping) or not _is_special(data):
        return {**collection.changes(entity_id, data)}
    plain: dict[str, object] = {}
    nested: dict[str, list[NestedChange]] = {}
    for key, value in data.items():
        path = _checked_path(key)
        name = str(path[0])
        if len(path) > 1 or isinstance(value, Operation):
            nested.setdefault(name, []).append(_nested_change(collection, path, value))
        elif name in plain:
            raise InvalidFieldError(f"{name} is changed twice")
        else:
            plain[name] = value
    _refuse_overlaps([*((name,) for name in plain), *(e.path for e in chain(*nested.values()))])
    fields: dict[str, FieldUpdate] = {**collection.changes(entity_id, plain)}
    for name, parts in nested.items():
        field = collection.fields.get(name)
        fields[name] = FieldChange(collection.name, name, field, tuple(parts))
    return fields


def _is_special(data: Mapping[Any, object]) -> bool:
    return Path in map(type, data) or Operation in map(type, data.values())


def _checked_path(key: object) -> Steps:
    try:
        return checked_steps(key.parts if isinstance(key, Path) else (key,))
    except InvalidQueryError as exc:
        raise InvalidFieldError(str(exc)) from exc


def _nested_change(collection: Collection, path: Steps, value: object) -> NestedChange:
    name = path[0]
    if name in (collection.key, VERSION):
        what = "the key" if name == collection.key else "set by the store"
        raise InvalidFieldError(f"{collection.name}.{name} is {what} and cannot be changed")
    if isinstance(value, Removed):
        change = NestedChange(path, value)
        if isinstance(path[-1], int):
            raise change.refused("an element of a list cannot be removed by its index")
    elif isinstance(value, Operation):
        change = NestedChange(path, _checked_operation(path, value))
    else:
        change = NestedChange(path, normalise(value, path))
    field = collection.fields.get(str(name))
    if field is not None and field.type not in _types_for(change):
        raise InvalidFieldError(
            f"{collection.name}.{name} is declared as {field.type}: {_called(change)} does not apply"
        )
    return change


def _called(change: NestedChange) -> str:
    """What the change is, for errors."""
    if len(change.path) > 1:
        return f"a change of {join_path(change.path)}"
    return change.change.name if isinstance(change.change, Operation) else "this change"


def _types_for(change: NestedChange) -> tuple[FieldType, ...]:
    """The declared types of fields that a change can apply to."""
    is_increment = isinstance(change.change, Operation) and change.change.name == "increment"
    if is_increment and len(change.path) == 1:
        return ("integer", "number", "json")
    return ("json",)


def _checked_operation(path: Steps, operation: Operation) -> Operation:
    if operation.name not in get_args(OperationName):
        raise InvalidFieldError(f"{join_path(path)}: {operation.name!r} is not an operation")
    operand = normalise(operation.operand, path)
    if operation.name == "increment" and type(operand) is not int:
        raise InvalidFieldError(
            f"{join_path(path)}: increment needs an integer, not {type_name(operation.operand)}"
        )
    return Operation(operation.name, operand)


def _refuse_overlaps(paths: Sequence[Steps]) -> None:
    """Refuse changes of a value and of a value inside it, whose result would depend on their order."""
    distinct = set(paths)
    if len(distinct) < len(paths):
        raise InvalidFieldError("a value is changed twice")
    for path in paths:
        for length in range(1, len(path)):
            if path[:length] in distinct:
                raise InvalidFieldError(
                    f"{join_path(path)} is changed, and {join_path(path[:length])} as well"
                )
