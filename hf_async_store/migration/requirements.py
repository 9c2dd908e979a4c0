"""What must hold before a store is read, written over or emptied as a whole.

A backup, a move or a comparison is of everything that is stored. So the store must be there, for a
mistyped name is no empty store; what is stored must be declared, for a full read leaves out what is
not; and a move is between two stores, however they are spelt.
"""

from __future__ import annotations

from collections.abc import Awaitable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from hf_async_store.errors import (
    ConfigurationError,
    InvalidInputError,
    MigrationError,
    StorageError,
    StoreNotFoundError,
)
from hf_async_store.migration_routing import SYSTEM_COLLECTIONS
from hf_async_store.values import Value

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy

_WHERE: Final = ("path", "server", "database", "schema", "region", "endpoint_url", "table_prefix")
_MAX_SHOWN: Final = 5


class Asked(Protocol):
    """What is asked here of a store, or of its engine."""

    async def exists(self) -> bool: ...

    async def undeclared(self) -> list[str]: ...

    def describe(self) -> Mapping[str, Value]: ...


def location_of(store: Asked) -> str:
    """Where a store is, in its own words, without secrets."""
    told = store.describe()
    folder, files = told.get("folder"), told.get("files")
    if isinstance(folder, str):
        return (
            str(Path(folder, str(files[0])))
            if isinstance(files, list) and files[1:] == []
            else folder
        )
    settings = told.get("configuration")
    told = {**(settings if isinstance(settings, dict) else {}), **told}
    parts = [f"{name} {told[name]}" for name in _WHERE if told.get(name)]
    return ", ".join(parts) if parts else str(told.get("engine", "the place given"))


async def require_store(store: Asked, what: str = "") -> None:
    """Refuse to take for empty what is not there: its name may be mistyped. Nothing is made.

    Args:
        what: the store, as the error names it, if there are two.

    Raises:
        StoreNotFoundError.
        StorageError: it cannot be reached.
    """
    if not await store.exists():
        raise StoreNotFoundError(
            f"there is no store at {what and f'{what}, '}{location_of(store)}; its name may be mistyped"
        )


async def refuse_same(answer: Awaitable[bool]) -> None:
    """Refuse to move a store to itself.

    Args:
        answer: of `is_same_store`.

    Raises:
        MigrationError: they are one, or nobody can tell; nothing was written.
    """
    try:
        same = await answer
    except StorageError as exc:
        raise MigrationError(
            "it cannot be found out whether source and target are the same store, so nothing was "
            f"written: {exc}",
            retryable=exc.retryable,
        ) from exc
    if same:
        raise MigrationError("source and target are the same store; nothing was written")


async def refuse_undeclared(store: Asked, what: str, leave_out: Container[str] = ()) -> list[str]:
    """Refuse a full read that would leave something out, but for what is to be left out.

    Args:
        what: the store, as an error names it.
        leave_out: collections (`jobs`) and fields (`machines.owner`).

    Returns:
        What is left out.

    Raises:
        ConfigurationError: names the declarations that are missing.
    """
    hidden = {each.name for each in SYSTEM_COLLECTIONS}
    found = [each for each in await store.undeclared() if each.partition(".")[0] not in hidden]
    missing = [each for each in found if each not in leave_out]
    if missing:
        raise ConfigurationError(
            f"{what} holds what is not declared here, and a full read would leave it out: "
            f"{listed(missing)}. Declare it (--collections MODULE:NAME on the command line), or say "
            "that it stays behind (leave_out, or --leave-out NAME)"
        )
    return found


async def refuse_undeclared_fields(store: StorageStrategy, what: str) -> None:
    """Refuse to write whole entities into a store that has fields of theirs beyond the declaration.

    What is stored in such a field would stay in an entity that is replaced.

    Raises:
        ConfigurationError: names the declarations that are missing.
    """
    fields = [
        each for each in await store.undeclared() if each.partition(".")[0] in store.collections
    ]
    if fields:
        raise ConfigurationError(
            f"{what} has fields that are not declared here, and whose values would stay beside what "
            f"is written: {listed(fields)}. Declare them (--collections MODULE:NAME on the command "
            "line)"
        )


def check_leave_out(leave_out: Iterable[str], schema: Mapping[str, object]) -> None:
    """Refuse to leave out what is declared, and so comes along.

    Raises:
        InvalidInputError.
    """
    declared = [each for each in leave_out if each in schema]
    if declared:
        raise InvalidInputError(
            f"{declared[0]!r} is declared, so it is not left out: declare less, or leave it in"
        )


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many there are more."""
    more = f" and {len(names) - _MAX_SHOWN:,} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more
