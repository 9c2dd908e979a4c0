"""The collections that a command declares by naming a Python module."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hf_async_store.errors import ConfigurationError
from hf_async_store.schema import Collection

if TYPE_CHECKING:
    from argparse import Namespace

    from hf_async_store.config import StorageConfig

VARIABLE: Final = "HF_ASYNC_STORE_COLLECTIONS"


def named_collections(
    arguments: Namespace, configs: Iterable[StorageConfig]
) -> Iterable[Collection] | None:
    """The collections that the command line, the environment or a configuration names; None: none.

    Raises:
        ConfigurationError: they cannot be imported.
    """
    sources = [
        ("--collections", arguments.collections),
        (VARIABLE, os.environ.get(VARIABLE)),
        *(("storage.collections", each.collections) for each in configs),
    ]
    for source, named in sources:
        if named:
            return _imported(named, f"{source} {named}")
    return None


def _imported(named: str, source: str) -> Iterable[Collection]:
    name, value = imported(named, source)
    if isinstance(value, Collection):
        return (value,)
    items = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []
    if not items or not all(isinstance(each, Collection) for each in items):
        raise ConfigurationError(
            f"{source}: expected {name} to be a Collection or a non-empty list of "
            f"Collection, got {type(value).__name__}"
        )
    return items


def imported(named: str, source: str) -> tuple[str, object]:
    """The name and the value of what the text MODULE:NAME names.

    Args:
        source: where the text is from, for errors.

    Raises:
        ConfigurationError: it cannot be imported.
    """
    module, colon, name = named.partition(":")
    if not (module and colon and name):
        raise ConfigurationError(f"{source}: expected MODULE:NAME")
    return name, _import_attribute(module, name, source)


def _import_attribute(module: str, name: str, source: str) -> object:
    from importlib import import_module

    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        return getattr(import_module(module), name)
    except Exception as exc:
        raise ConfigurationError(
            f"{source}: cannot be imported from {folder}: {type(exc).__name__}: {exc}"
        ) from exc
    finally:
        if added:
            # Only that module is wanted from the working directory. Move the folder to the end, so
            # that no other file in it is imported instead of a driver of the same name.
            sys.path.remove(folder)
            sys.path.append(folder)
