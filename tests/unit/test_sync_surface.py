"""The blocking classes have every public name of the asynchronous ones, with the same parameters."""

from __future__ import annotations

import inspect
from typing import Final

import pytest

import hf_async_store
from hf_async_store import migration, sync
from hf_async_store.driver import Reader
from hf_async_store.repository import RepositoryInterface
from hf_async_store.strategies.sql.strategy import SQLTransaction
from hf_async_store.sync import migration as blocking_migration

PAIRS: Final[list[tuple[type, type]]] = [
    (RepositoryInterface, sync.Repository),
    (hf_async_store.StorageStrategy, sync.Store),
    (hf_async_store.Transaction, sync.Transaction),
    (Reader, sync.Snapshot),
    (hf_async_store.TypedRepository, sync.TypedRepository),
    (hf_async_store.TypedCollection, sync.TypedCollection),
    (hf_async_store.JSONStorageStrategy, sync.JSONStore),
    (hf_async_store.SQLStorageStrategy, sync.SQLStore),
    (SQLTransaction, sync.SQLTransaction),
    (hf_async_store.DynamoDBStorageStrategy, sync.DynamoDBStore),
    (migration.MigrationTool, sync.MigrationTool),
]

LEFT_OUT: Final = {"engine"}
"""The public names without a blocking form: the driver interface is asynchronous."""


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def parameters(function: object) -> list[tuple[str, object, object]]:
    found = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [(each.name, each.kind, each.default) for each in found]


@pytest.mark.parametrize(("asynchronous", "blocking"), PAIRS)
def test_125_every_public_name_with_the_same_parameters(asynchronous: type, blocking: type) -> None:
    expected = public(asynchronous) - LEFT_OUT
    assert public(blocking) == expected
    for name in sorted(expected):
        ours, theirs = getattr(blocking, name), getattr(asynchronous, name)
        if inspect.isfunction(theirs):
            assert parameters(ours) == parameters(theirs), name
            assert inspect.getdoc(ours), name
            assert not inspect.iscoroutinefunction(ours), name
            assert not inspect.isasyncgenfunction(ours), name
        else:
            assert isinstance(ours, property) is isinstance(theirs, property), name


def test_125_the_functions_have_the_same_parameters() -> None:
    assert parameters(sync.open_store) == parameters(hf_async_store.open_store)
    for name in ("backup_store", "restore_store", "compare_stores"):
        ours, theirs = getattr(blocking_migration, name), getattr(migration, name)
        assert parameters(ours) == parameters(theirs), name


def test_125_the_names_of_the_package_can_be_imported() -> None:
    assert all(callable(getattr(sync, each)) for each in sync.__all__)
    with pytest.raises(AttributeError, match="no attribute"):
        sync.nobody  # noqa: B018
