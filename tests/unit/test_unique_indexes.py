"""Unique indexes: declarations, the digest of values, the capability, blocking callers and exit codes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from msgspec.structs import replace

from hf_async_store import (
    Collection,
    ConfigurationError,
    Field,
    Index,
    InvalidFieldError,
    StorageStrategy,
    UniqueViolationError,
    sync,
)
from hf_async_store.cli.exit_codes import CONFLICT, code_of, sentence
from hf_async_store.config import MemoryConfig
from hf_async_store.strategies.memory import MemoryEngine
from hf_async_store.strategy import schema_of
from hf_async_store.unique import digest

HOSTS = [
    Collection("hosts", key="host_id", fields=["name"], indexes=[Index("name", unique=True)]),
]


@pytest.mark.parametrize("name", ["host_id", "created_at", "updated_at"])
def test_a_unique_index_of_what_the_store_sets_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"does not contain '{name}'"):
        Collection(
            "hosts", key="host_id", fields=["zone"], indexes=[Index("zone", name, unique=True)]
        )


def test_unique_is_a_boolean() -> None:
    with pytest.raises(ConfigurationError, match="unique must be True or False"):
        Index("name", unique="yes")  # type: ignore[arg-type]


def of(*values: Any) -> bytes | None:
    names = tuple(f"f{number}" for number in range(len(values)))
    return digest(dict(zip(names, values, strict=True)), names, "hosts")


def test_equal_values_have_the_same_digest() -> None:
    assert of(1) == of(1.0)
    assert of(0) == of(-0.0)
    assert of(2**53) == of(float(2**53))
    assert of("a", 1) == of("a", 1.0)


def test_different_values_have_different_digests() -> None:
    values = [1, True, "1", "", 0, False, "a", "A", "é", "e\u0301", 2**53 + 1, 2**53]
    values += [-1, 0.1, 5e-324, "\x01", "x" * 1024, "x" * 1023]
    assert len({of(each) for each in values}) == len(values)
    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("a", "b"), ("b", "a"), (1, "a")]
    assert len({of(*each) for each in pairs}) == len(pairs)


def test_null_and_missing_values_have_no_digest() -> None:
    assert of(None) is None
    assert of("a", None) is None
    assert digest({"f0": "a"}, ("f0", "f1"), "hosts") is None


@pytest.mark.parametrize("value", ["x" * 1025, "é" * 513, [1], {"a": 1}])
def test_what_a_unique_index_cannot_contain_is_refused(value: Any) -> None:
    with pytest.raises(InvalidFieldError, match=r"hosts\.f0"):
        of(value)


def engine_without(declared: list[Collection]) -> MemoryEngine:
    engine = MemoryEngine(schema_of(declared), MemoryConfig())
    engine.capabilities = replace(engine.capabilities, unique_indexes=False)
    return engine


async def test_an_engine_without_the_capability_refuses_the_declaration() -> None:
    with pytest.raises(ConfigurationError, match=r"hosts.*'memory'.*unique_indexes"):
        StorageStrategy(engine_without(HOSTS), schema_of(HOSTS))
    plain = [Collection("hosts", key="host_id", fields=[Field("name")], indexes=["name"])]
    async with StorageStrategy(engine_without(plain), schema_of(plain)) as store:
        assert await store.create_entity("hosts", {"host_id": "a"}) == 1


def test_a_blocking_caller_gets_the_error() -> None:
    with sync.open_store("memory:", collections=HOSTS) as store:
        store.create_entity("hosts", {"host_id": "a", "name": "x"})
        with pytest.raises(UniqueViolationError) as caught:
            store.create_entity("hosts", {"host_id": "b", "name": "x"})
    assert (caught.value.owner_id, caught.value.fields) == ("a", ("name",))


def test_the_error_has_the_exit_code_of_a_conflict_and_can_be_pickled() -> None:
    error = UniqueViolationError("hosts", "b", ("name", "zone"), "a")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.owner_id, copy.field) == (str(error), "a", "name, zone")
    assert code_of(error) == CONFLICT
    assert "change the other entity" in sentence(error)
