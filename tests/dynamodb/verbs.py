"""Every verb of a store on DynamoDB, for the existing `items` "a", "b" and "c"."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from hf_async_store import increment

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hf_async_store import DynamoDBStorageStrategy

    Verb = Callable[[DynamoDBStorageStrategy], Awaitable[Any]]


AT: Final = "2024-01-01T00:00:00.000000Z"


async def make(store: DynamoDBStorageStrategy) -> None:
    """Create the entities that the verbs use, each at version 1."""
    entities: list[Any] = [
        {"item_id": each, "label": "x", "tags": {"n": [1]}, "created_at": AT, "updated_at": AT}
        for each in "abc"
    ]
    await store.import_entities("items", [{**each, "version": 1} for each in entities])
    await store.delete_entity("items", "new")
    await store.create_entities("counters", [])


async def _stream(store: DynamoDBStorageStrategy) -> list[Any]:
    async with aclosing(store.stream_entities("items", {"label": "x"}, "-created_at")) as rows:
        return [row async for row in rows]


async def _read_in_transaction(store: DynamoDBStorageStrategy) -> Any:
    async with store.begin_transaction() as tx:
        await tx.get_entity("items", "a")
        return await tx.get_entities("items", ["b", "c", "nobody"])


async def _write_in_transaction(store: DynamoDBStorageStrategy) -> int:
    async with store.begin_transaction() as tx:
        await tx.get_entity("items", "b")
        return await tx.update_entity("items", "a", {"label": "y"})


READS: Final[dict[str, Verb]] = {
    "get": lambda store: store.get_entity("items", "a"),
    "get many": lambda store: store.get_entities("items", ["a", "b", "nobody"]),
    "query": lambda store: store.query_entities("items", {"tags": {"n": [1]}}),
    "query by index": lambda store: store.query_entities("items", {"label": "x"}),
    "count": lambda store: store.count_entities("items"),
    "page": lambda store: store.query_page("items", limit=2),
    "stream": _stream,
    "query_by_gsi": lambda store: store.query_by_gsi(
        "items", "label-index", "label = :l", {":l": "x"}
    ),
    "read in a transaction": _read_in_transaction,
    "exists": lambda store: store.exists(),
    "undeclared": lambda store: store.engine.undeclared(),
    "compare_tables": lambda store: store.compare_tables(),
}

WRITES: Final[dict[str, Verb]] = {
    "create": lambda store: store.create_entity("items", {"item_id": "new", "label": "x"}),
    "save": lambda store: store.save_entity("items", {"item_id": "a", "label": "y"}),
    "save expecting": lambda store: store.save_entity(
        "items", {"item_id": "a", "label": "y"}, expected_version=1
    ),
    "save many": lambda store: store.save_entities(
        "items", [{"item_id": each, "label": "y"} for each in "abc"]
    ),
    "update": lambda store: store.update_entity("items", "a", {"label": "y"}),
    "update expecting": lambda store: store.update_entity(
        "items", "a", {"label": "y"}, expected_version=1
    ),
    "update where": lambda store: store.update_entity(
        "items",
        "a",
        {"label": "y"},
        condition_expression="label = :l",
        expression_values={":l": "x"},
    ),
    "increment": lambda store: store.update_entity("items", "a", {"count": increment(1)}),
    "delete": lambda store: store.delete_entity("items", "a"),
    "delete expecting": lambda store: store.delete_entity("items", "a", expected_version=1),
    "import": lambda store: store.import_entities("items", [{"item_id": "a", "version": 7}]),
    "transaction": _write_in_transaction,
}
