"""Classes of a single field of a model: they tell whether a value alone fits that field.

What a model says about several fields together cannot be told of one, and is left out of them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from typing import Any, Self, get_args, get_type_hints

import msgspec


def of_annotation(model: type, attribute: str, name: str) -> type:
    """A struct with one field of a struct, a dataclass or an attrs class.

    Args:
        name: the stored name of the field.
    """
    declared = (each for each in getattr(model, "__attrs_attrs__", ()) if each.name == attribute)
    field = next(declared, None)

    def validate(instance: object) -> None:
        if field is not None and field.validator is not None:
            with suppress(AttributeError):  # of a validator that reads other fields of the instance
                field.validator(None, field, getattr(instance, attribute))

    return msgspec.defstruct(
        model.__name__,
        [(attribute, get_type_hints(model, include_extras=True)[attribute])],
        rename={attribute: name},
        namespace={"__post_init__": validate},
    )


def of_pydantic(model: Any, attribute: str) -> type | None:
    """A model with one field of a pydantic model, and the validators of that field.

    Validators that receive `info` may read other fields, and are left out; None if the field cannot be
    validated without them.
    """
    pydantic = sys.modules["pydantic"]
    field = model.model_fields[attribute]
    if _contains_self(field.annotation) or any(map(_is_informed, field.metadata)):
        return None
    validators = {}
    for name, each in model.__pydantic_decorators__.field_validators.items():
        if attribute not in each.info.fields and "*" not in each.info.fields:
            continue
        if not _takes_info(each.func, each.info.mode):
            validators[name] = pydantic.field_validator(attribute, mode=each.info.mode)(
                _as_function(each.func, each.info.mode)
            )
        elif each.info.mode != "after":
            return None
    single = pydantic.create_model(
        model.__name__,
        __config__=model.model_config | {"use_attribute_docstrings": False, "defer_build": False},
        __validators__=validators,
        **{attribute: (field.annotation, copy(field))},
    )
    # It is not complete if an annotation contains a name that only the model could look up.
    return single if single.__pydantic_complete__ else None


def _as_function(validator: Callable[..., object], mode: str) -> Callable[..., object]:
    """A function of a bound method, because pydantic would bind that again."""
    if mode == "wrap":
        return lambda value, validate: validator(value, validate)
    return lambda value: validator(value)


def _contains_self(annotation: object) -> bool:
    return annotation is Self or any(map(_contains_self, get_args(annotation)))


def _is_informed(mark: object) -> bool:
    """Whether a mark of `Annotated` is a validator that receives `info`."""
    name = type(mark).__name__
    mode = name.removesuffix("Validator").lower()
    return name != mode and hasattr(mark, "func") and _takes_info(mark.func, mode)


def _takes_info(validator: Callable[..., object], mode: str) -> bool:
    try:
        parameters = inspect.signature(validator).parameters.values()
    except ValueError:  # some functions that are written in C
        return False
    needed = [each for each in parameters if each.default is each.empty]
    return len(needed) > (2 if mode == "wrap" else 1)
