"""DAX, as far as it can be tested without a cluster: which reads use it, and what is refused.

These tests use a fake client. No test connects to a cluster, and the documentation says so.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import ConfigurationError, UnavailableError
from hf_async_store.config import DynamoDBConfig
from hf_async_store.strategies.dynamodb import dax
from tests.dynamodb.support import store_at

if TYPE_CHECKING:
    from tests.dynamodb.proxy import Proxy


class Cluster:
    """A fake client that returns the given responses, and records the calls."""

    def __init__(
        self, answers: dict[str, Any] | None = None, error: Exception | None = None
    ) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._answers = answers or {}
        self._error = error
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        def method(**params: Any) -> Any:
            self.asked.append((name, params))
            if self._error is not None:
                raise self._error
            return self._answers[name]

        return method

    def close(self) -> None:
        self.closed = True


def test_dax_requires_an_endpoint() -> None:
    with pytest.raises(ConfigurationError, match="dax_endpoint"):
        dax.cache_of(DynamoDBConfig(enable_dax=True))
    assert dax.cache_of(DynamoDBConfig(dax_endpoint="dax://x:8111")) is None


def test_without_the_extra_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dax, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"hf_async_store\[dax\]"):
        dax.cache_of(DynamoDBConfig(enable_dax=True, dax_endpoint="dax://x:8111"))


@pytest.mark.skipif(find_spec("amazondax") is None, reason="Amazon's client is not installed")
async def test_a_cluster_that_cannot_be_reached() -> None:
    config = DynamoDBConfig(
        region="us-east-1", enable_dax=True, dax_endpoint="dax://127.0.0.1:1", retry_timeout=0.1
    )
    cache = dax.cache_of(config)
    assert cache is not None
    with pytest.raises(UnavailableError):
        await cache.read("GetItem", {"TableName": "t", "Key": {"id": {"S": "a"}}})
    await cache.close()


async def test_only_eventually_consistent_reads_use_dax(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = {"item_id": {"S": "cached"}, "version": {"N": "3"}, "doc": {"M": {}}, "_w": {"S": "x"}}
    cluster = Cluster(
        {
            "get_item": {"Item": item},
            "batch_get_item": {"Responses": {}, "UnprocessedKeys": {}},
            "query": {"Items": [item], "Count": 1},
            "scan": {"Items": [], "Count": 0},
        }
    )
    monkeypatch.setattr(dax, "find_spec", lambda name: True)
    monkeypatch.setattr(dax, "_amazon_client", lambda config: cluster)
    settings = {"enable_dax": True, "dax_endpoint": "dax://x:8111"}
    async with store_at(proxy.url, **settings) as store:
        await store.create_entity("items", {"item_id": "a", "label": "x"})
        assert await store.get_entity("items", "cached") is None
        found = await store.query_entities("items", {"label": "x"})
        assert [each["item_id"] for each in found] == []  # the store filters, too
        assert [name for name, _ in cluster.asked] == ["query"]
    assert cluster.closed
    cluster.asked.clear()
    async with store_at(proxy.url, consistent_reads=False, **settings) as store:
        await store.create_entity("items", {"item_id": "a", "label": "x"})
        entity = await store.get_entity("items", "cached")
        assert entity is not None
        assert entity["version"] == 3
        await store.get_entities("items", ["a", "b"])
        await store.query_entities("items")
        assert {name for name, _ in cluster.asked} == {"get_item", "batch_get_item", "scan"}
        cluster.asked.clear()
        await store.save_entity("items", {"item_id": "a"})
        await store.save_entities("items", [{"item_id": "a"}, {"item_id": "b"}])
        async with store.begin_transaction() as tx:
            assert await tx.get_entity("items", "cached") is None
            await tx.update_entity("items", "a", {"count": 1})
        assert cluster.asked == [], "a write or a read in a transaction used DAX"


async def test_failures_of_the_cluster_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ClientError

    from hf_async_store import PermissionDeniedError, ThrottledError

    def refusing(code: str) -> dax.Cache:
        error = ClientError({"Error": {"Code": code, "Message": "?"}}, "GetItem")
        return dax.Cache(lambda: Cluster(error=error), 0.1)

    for code, kind in (
        ("ThrottlingException", ThrottledError),
        ("AccessDeniedException", PermissionDeniedError),
        ("InternalServerError", UnavailableError),
    ):
        cache = refusing(code)
        with pytest.raises(kind):
            await cache.read("GetItem", {})
        await cache.close()
