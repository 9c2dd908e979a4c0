"""Many whole entities in one transaction: without a conflict, and with one."""

from __future__ import annotations

from typing import Any

import pytest

from hf_async_store import (
    AlreadyExistsError,
    BatchError,
    ReferenceViolationError,
    TransactionAbortedError,
    open_store,
)

pytestmark = pytest.mark.hf_sampled(by="url")

SIZES = (2, 9, 260, 1000, 1300)


def machines(count: int) -> list[dict[str, Any]]:
    """Entities with empty columns, nulls and undeclared fields, not in the order of their ids."""
    return [
        {
            "machine_id": f"i-{n * 7919 % count:05d}",
            "request_id": "r" if n % 3 else None,
            "name": "数据",
            "status": None,
            "tags": {"n": n},
            **({"more": 1e300} if n % 5 == 0 else {}),
        }
        for n in range(count)
    ]


@pytest.mark.parametrize("count", SIZES)
async def test_all_entities_are_written_and_read_back(url: str, count: int) -> None:
    given = machines(count)
    async with open_store(url) as store:
        await store.create_entity("requests", {"request_id": "r"})
        await store.create_entity("machines", given[0])
        async with store.begin_transaction() as tx:
            versions = await tx.save_entities("machines", given)
        assert versions == [2, *[1] * (count - 1)]
        read = await store.get_entities("machines", [each["machine_id"] for each in given])
        for entity, version, back in zip(given, versions, read, strict=True):
            assert back is not None
            assert back.pop("version") == version
            assert {name for name in back if name not in entity} == {"created_at", "updated_at"}
            assert repr({name: back[name] for name in entity}) == repr(entity)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("what", ["there already", "no parent"])
async def test_a_conflict_is_named_and_nothing_is_written(url: str, count: int, what: str) -> None:
    given = machines(count)
    place = count - 1
    kind: type[Exception] = (
        AlreadyExistsError if what == "there already" else ReferenceViolationError
    )
    async with open_store(url) as store:
        await store.create_entity("requests", {"request_id": "r"})
        if what == "there already":
            await store.create_entity("machines", given[place])
        else:
            given[place]["request_id"] = "no such"
        before = await store.count_entities("machines")
        with pytest.raises((kind, BatchError, TransactionAbortedError)) as info:
            async with store.begin_transaction() as tx:
                await tx.create_entities("machines", given)
        assert isinstance(info.value, kind) or isinstance(info.value.__cause__, kind)
        assert await store.count_entities("machines") == before
