"""The one generator of what is stored and written, and how it is divided into calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Final, TypeAlias, TypeVar

import msgspec

from hf_async_store import Capabilities, StorageStrategy

Entity: TypeAlias = dict[str, Any]

USUAL_BYTES: Final = 311  # of a machine without anything special, as JSON
MACHINES_OF_A_REQUEST: Final = 100
TEMPLATE: Final[Entity] = {"template_id": "t-1", "name": "Standard"}
STATUSES: Final = ("RUNNING", "PENDING", "STOPPED")

_ENTITY_BYTES: Final = 4096  # more than any entity weighs, for limits that are in bytes
_SETTLE_SECONDS: Final = 10.0
_SCATTER: Final = 61_803_399


def machine(number: int, size: int = USUAL_BYTES, count: int = 0) -> Entity:
    """A machine whose JSON takes about `size` bytes, 100 at least; `count` is how many times it was
    written, and shows a lost write."""
    entity = _small(number) | (_rest(number) if size >= USUAL_BYTES else {})
    entity["count"] = count
    padding = size - (_USUAL_WITHOUT if size >= USUAL_BYTES else _SMALL_WITHOUT)
    if padding > 0:
        entity["tags"] = {"note": "x" * padding}
    return entity


def _small(number: int) -> Entity:
    request = request_id(number // MACHINES_OF_A_REQUEST)
    status = STATUSES[number % len(STATUSES)]
    return {"machine_id": machine_id(number), "request_id": request, "status": status}


def _rest(number: int) -> Entity:
    return {
        "template_id": "t-1",
        "return_request_id": None,
        "name": f"node-{number * _SCATTER % 10**8:08d}-a1",
        "instance_type": "m5.2xlarge",
        "private_ip": f"10.1{number >> 16 & 63:02d}.1{number >> 8 & 63:02d}.1{number & 63:02d}",
        "created_at": f"2026-{1 + number % 12:02d}-{1 + number % 28:02d}T08:00:00.{number % 10**6:06d}Z",
    }


def machine_id(number: int) -> str:
    return f"i-{number:017x}"


def request(number: int, machines: int = MACHINES_OF_A_REQUEST) -> Entity:
    named = {"request_id": request_id(number), "template_id": "t-1", "machine_count": machines}
    return {**named, "status": "PENDING", "request_type": "acquire"}


def request_id(number: int) -> str:
    return f"req-{number:08d}"


def utc_now() -> str:
    """The time, as stores keep it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


_FILL: Final = {"count": 0, "tags": {"note": ""}}
_SMALL_WITHOUT: Final = len(msgspec.json.encode({**_small(0), **_FILL}))
_USUAL_WITHOUT: Final = len(msgspec.json.encode({**_small(0), **_rest(0), **_FILL}))

_Item = TypeVar("_Item")


def batches(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def transaction_limit(can: Capabilities) -> int | None:
    """How many entities of ours fit in one transaction; None: any number."""
    size = can.max_transaction_bytes and can.max_transaction_bytes // _ENTITY_BYTES
    return min((i for i in (can.max_transaction_changes, size) if i is not None), default=None)


async def settled_count(
    store: StorageStrategy, filters: Mapping[str, object], expected: int
) -> int:
    """How many machines match; where queries may be behind, once they have caught up."""
    until = monotonic() + _SETTLE_SECONDS
    while True:
        found = await store.count_entities("machines", filters)
        behind = store.capabilities.query_isolation == "eventual" and found != expected
        if not behind or monotonic() > until:
            return found
        await asyncio.sleep(0.2)
