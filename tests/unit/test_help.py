"""`help` of what packages use: the signature of a class is computed from its annotations."""

from __future__ import annotations

import inspect
import pydoc

import msgspec
import pytest

import hf_async_store
from hf_async_store import StorageConfig, config, driver, feed, migration, query


def _structs() -> list[type]:
    modules = (hf_async_store, driver, config, feed, migration, query)
    found = {each for module in modules for each in vars(module).values() if isinstance(each, type)}
    structs = (each for each in found if issubclass(each, msgspec.Struct))
    return sorted(structs, key=lambda struct: struct.__name__)


@pytest.mark.parametrize("struct", _structs(), ids=lambda struct: struct.__name__)
def test_each_struct_has_a_signature(struct: type) -> None:
    inspect.signature(struct)


def test_help() -> None:
    assert "follow_moves" in pydoc.render_doc(StorageConfig)
    assert "write_each" in pydoc.render_doc(driver)
