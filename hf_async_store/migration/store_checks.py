"""Preconditions of reading, replacing or emptying a whole store.

A backup, a migration or a comparison includes everything that is stored. So the store must exist,
because a mistyped name must not be taken for an empty store. Everything stored must be declared,
because a full read does not return undeclared collections and fields. And the source and the target
of a migration must be different stores, even if their locations are spelt differently.
"""

from __future__ import annotations

from collections.abc import Awaitable, Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from hf_async_store.errors import (
    ConfigurationError,
    InvalidInputError,
    MigrationError,
    StorageError,
    StoreNotFoundError,
)
from hf_async_store.generators import Owned
from hf_async_store.query import Query
from hf_async_store.schema import SYSTEM_NAMES

if TYPE_CHECKING:
    from hf_async_store.driver import Engine
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.values import Entity, Value

_LOCATION_PARTS: Final = (
    "path",
    "server",
    "database",
    "schema",
    "region",
    "endpoint_url",
    "table_prefix",
)
_MAX_SHOWN: Final = 5


Inspectable: TypeAlias = "StorageStrategy | Engine"


def location_of(store: Inspectable) -> str:
    """The location of a store for messages, without secrets."""
    description = store.describe()
    folder, files = description.get("folder"), description.get("files")
    if isinstance(folder, str):
        return (
            str(Path(folder, str(files[0])))
            if isinstance(files, list) and files[1:] == []
            else folder
        )
    known = {**settings_of(store), **description}
    parts = [f"{name} {known[name]}" for name in _LOCATION_PARTS if known.get(name)]
    return ", ".join(parts) if parts else str(known.get("engine", "the given location"))


def settings_of(store: Inspectable) -> dict[str, Value]:
    """The configuration of a store, without secrets; empty if it does not describe it."""
    settings = store.describe().get("configuration")
    return settings if isinstance(settings, dict) else {}


async def require_store(store: Inspectable, label: str = "") -> None:
    """Refuse a store that does not exist, because its name may be mistyped; nothing is created.

    Args:
        label: how the error names the store, if there are two.

    Raises:
        StoreNotFoundError: the store does not exist.
        StorageError: the store cannot be reached.
    """
    if not await store.exists():
        raise StoreNotFoundError(
            f"there is no store at {label and f'{label}, '}{location_of(store)}; its name may be "
            "mistyped"
        )


async def refuse_same(is_same: Awaitable[bool], nothing: str = "nothing was written") -> None:
    """Refuse to migrate a store to itself, or to compare it with itself.

    Args:
        is_same: the call of `is_same_store`, not awaited yet.
        nothing: what was not done, for the error.

    Raises:
        MigrationError: source and target are the same store, or this cannot be determined.
    """
    try:
        same = await is_same
    except StorageError as exc:
        raise MigrationError(
            f"it cannot be determined whether source and target are the same store, so {nothing}: "
            f"{exc}",
            retryable=exc.retryable,
        ) from exc
    if same:
        raise MigrationError(
            "source and target are the same store, or both follow a live migration to the same one; "
            f"{nothing}"
        )


async def refuse_undeclared(
    store: Inspectable, label: str, leave_out: Container[str] = ()
) -> list[str]:
    """Refuse a store with undeclared collections or fields, except those in `leave_out`.

    Args:
        label: how the error names the store.
        leave_out: collections (`jobs`) and fields (`machines.owner`).

    Returns:
        The undeclared collections and fields, all of which are in `leave_out`.

    Raises:
        ConfigurationError: there are others; the error names them.
    """
    found = await store.undeclared()
    undeclared = [each for each in found if each.partition(".")[0] not in SYSTEM_NAMES]
    missing = [each for each in undeclared if each not in leave_out]
    if missing:
        raise ConfigurationError(
            f"{label} holds collections or fields that are not declared here and would not be "
            f"read: {listed(missing)}. Declare them (--collections MODULE:NAME on the command "
            "line), or exclude them (leave_out, or --leave-out NAME)"
        )
    return undeclared


async def refuse_undeclared_fields(store: StorageStrategy, label: str) -> None:
    """Refuse to write whole entities into a store with undeclared fields in declared collections.

    If an entity is replaced there, the values of its undeclared fields would remain.

    Raises:
        ConfigurationError: there are undeclared fields; the error names them.
    """
    fields = [
        each for each in await store.undeclared() if each.partition(".")[0] in store.collections
    ]
    if fields:
        raise ConfigurationError(
            f"{label} has undeclared fields: {listed(fields)}. Replacing an entity would leave their "
            "old values in it. Declare them (--collections MODULE:NAME on the command line)"
        )


async def not_empty_in(store: StorageStrategy) -> list[str]:
    """The declared collections of which a store holds any entity."""
    return [each for each in store.collections if await first_stored(store, each, 1)]


async def first_stored(store: StorageStrategy, collection: str, limit: int) -> list[Entity]:
    """Some entities of a collection, with those that have expired and were not removed."""
    async with Owned(store._select_stored(Query(collection, limit=limit))) as records:
        return [each.entity async for each in records]


def check_leave_out(leave_out: Iterable[str], schema: Mapping[str, object]) -> None:
    """Refuse to leave out a declared collection.

    Raises:
        InvalidInputError: a collection is declared and also to be left out.
    """
    declared = [each for each in leave_out if each in schema]
    if declared:
        raise InvalidInputError(
            f"{declared[0]!r} is declared, so it cannot be left out: remove it from the declared "
            "collections, or from leave_out (--leave-out)"
        )


def listed(names: Iterable[str]) -> str:
    """The first names, and the number of the others."""
    all_names = list(names)
    more = len(all_names) - _MAX_SHOWN
    return ", ".join(all_names[:_MAX_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
