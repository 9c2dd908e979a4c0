"""Checks of the kinds of arguments that callers pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from hf_async_store.errors import ConfigurationError, InvalidInputError

Item = TypeVar("Item")


def is_listed(items: object) -> bool:
    """Whether the items of an iterable are meant: not of a string, whose items are its characters, and
    not of a dict, whose items are its keys."""
    return isinstance(items, Iterable) and not isinstance(
        items, str | bytes | bytearray | memoryview | Mapping
    )


def check_listed(items: Iterable[Item], what: str) -> Iterable[Item]:
    """Raise `InvalidInputError` for an argument that is not an iterable of items.

    Args:
        what: the name of the argument.
    """
    if not is_listed(items):
        raise InvalidInputError(f"{what} must be a list of {what}, not {type(items).__name__}")
    return items


def check_mapping(data: object, what: str) -> None:
    """Raise `InvalidInputError` for an argument that is not a dict."""
    if not isinstance(data, Mapping):
        raise InvalidInputError(f"{what} must be a dict, not {type(data).__name__}")


def check_boolean(switch: object, what: str) -> None:
    """Raise `InvalidInputError` for an argument that is not True or False."""
    if not isinstance(switch, bool):
        raise InvalidInputError(f"{what} must be True or False, not {type(switch).__name__}")


def check_callable(function: object, what: str) -> None:
    """Raise `InvalidInputError` for an argument that is not callable."""
    if not callable(function):
        raise InvalidInputError(f"{what} must be a function, not {type(function).__name__}")


def check_seconds(seconds: object, what: str) -> None:
    """Raise `InvalidInputError` for an argument that is not a number of seconds."""
    if type(seconds) not in (int, float) or seconds != seconds:  # NaN would never expire
        raise InvalidInputError(f"{what} must be a number of seconds, not {type(seconds).__name__}")
    if isinstance(seconds, int) and abs(seconds) > sys.float_info.max:
        raise InvalidInputError(f"{what} must be a number of seconds in the range of floats")


def check_declared(
    items: object,
    kind: type[Item],
    what: str,
    named: Callable[[str], Item] | None = None,
    *,
    form: str = "",
) -> tuple[Item, ...]:
    """The items of a declaration or configuration.

    Args:
        named: makes an item of its name; None: names are not accepted.
        form: how an item is written that is often written in another way.

    Raises:
        ConfigurationError: says what was expected.
    """
    expected = f"{what} must be a list of {kind.__name__}{'' if named is None else ' or str'}"
    if not isinstance(items, Iterable) or not is_listed(items):
        raise ConfigurationError(f"{expected}, not {type(items).__name__}")
    listed = [named(each) if named and isinstance(each, str) else each for each in items]
    for each in listed:
        if not isinstance(each, kind):
            raise ConfigurationError(f"{expected}, but an item is {type(each).__name__}{form}")
    return tuple(listed)
