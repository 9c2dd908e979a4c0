"""Modules that are imported when something in them is first used.

A command that reads one entity spends most of its time on imports. What only other methods need stands in
a deferred module:

    if TYPE_CHECKING:
        from hf_async_store import claims
    else:
        claims = deferred("claims")

The methods then use `claims.Claim` as ever; nothing of it can be used when a class or a default is defined.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType


class DeferredModule:
    """Has the attributes of a module, which is imported for the first of them."""

    __slots__ = ("_module", "_name")

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: ModuleType | None = None

    def __getattr__(self, attribute: str) -> object:
        module = self._module
        if module is None:
            module = self._module = import_module(self._name)
        # Not kept here: a test may replace the attribute of the module.
        return getattr(module, attribute)


def deferred(name: str) -> DeferredModule:
    """A module of this package."""
    return DeferredModule(f"hf_async_store.{name}")
