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


class DeferredModule:
    """Has the attributes of a module, which is imported for the first of them."""

    __slots__ = ("__dict__", "_name")

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        module = import_module(self._name)
        # The very dict of the module, in which a test may replace an attribute. From now on, this method
        # is not called; it takes ten times as long as a lookup.
        self.__dict__ = module.__dict__
        return getattr(module, attribute)


def deferred(name: str) -> DeferredModule:
    """A module of this package."""
    return DeferredModule(f"hf_async_store.{name}")
