"""The tests of the application: its requests by httpx, its store by the fixtures of hf_async_store."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from machines import create_app

from hf_async_store import StorageStrategy
from hf_async_store.integrations.starlette import set_store
from hf_async_store.testing.faults import Faults


@pytest.fixture
def app(hf_store: StorageStrategy) -> FastAPI:
    application = create_app()
    set_store(application, hf_store)
    return application


@pytest_asyncio.fixture
async def client(app: FastAPI) -> AsyncGenerator[httpx.AsyncClient, None]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as opened:
        yield opened


async def create(client: httpx.AsyncClient, count: int = 3) -> None:
    created = await client.put("/requests/r-1", json={"machine_count": count})
    assert created.status_code == 201


async def test_a_request_is_created_once(
    client: httpx.AsyncClient, hf_store: StorageStrategy
) -> None:
    await create(client)
    assert await hf_store.count_entities("machines", {"request_id": "r-1"}) == 3
    again = await client.put("/requests/r-1", json={"machine_count": 5})
    assert again.status_code == 409
    assert again.headers["content-type"] == "application/problem+json"
    assert again.json()["error"] == "AlreadyExistsError"
    assert again.json()["id"] == "r-1"


async def test_what_does_not_exist(client: httpx.AsyncClient) -> None:
    assert (await client.get("/requests/nothing")).status_code == 404
    missing = await client.patch("/machines/nothing", json={"status": "DONE"})
    assert missing.status_code == 404
    assert missing.json()["collection"] == "machines"


async def test_invalid_requests(client: httpx.AsyncClient) -> None:
    assert (await client.put("/requests/r-1", json={"machine_count": 0})).status_code == 422
    wrong = await client.get("/requests/r-1/machines", params={"cursor": "x"})
    assert (wrong.status_code, wrong.json()["error"]) == (422, "InvalidCursorError")


async def test_a_change_of_what_the_client_has_read(client: httpx.AsyncClient) -> None:
    await create(client)
    machine = "/machines/r-1-0000"
    tag = (await client.get(machine)).headers["etag"]
    unchanged = await client.get(machine, headers={"If-None-Match": tag})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    sent = {"status": "RUNNING"}
    changed = await client.patch(machine, json=sent, headers={"If-Match": tag})
    assert (changed.status_code, changed.json()["status"]) == (200, "RUNNING")
    assert changed.headers["etag"] != tag
    late = await client.patch(machine, json=sent, headers={"If-Match": tag})
    assert (late.status_code, late.json()["error"]) == (412, "ConcurrencyConflictError")


async def test_a_deletion_of_what_the_client_has_read(client: httpx.AsyncClient) -> None:
    await create(client)
    tag = (await client.get("/requests/r-1")).headers["etag"]
    refused = await client.delete("/requests/r-1", headers={"If-Match": '"1-000000000000"'})
    assert refused.status_code == 412
    assert (await client.delete("/requests/r-1", headers={"If-Match": tag})).status_code == 204
    assert (await client.delete("/requests/r-1")).status_code == 404


async def test_pages(client: httpx.AsyncClient) -> None:
    await create(client, 5)
    found, url = [], httpx.URL("http://test/requests/r-1/machines?status=PENDING&limit=2")
    while True:
        page = await client.get(url)
        found += [each["machine_id"] for each in page.json()]
        if "next" not in page.links:
            break
        url = page.url.join(page.links["next"]["url"])
    assert found == [f"r-1-{number:04}" for number in range(5)]


async def test_the_store_is_not_available(client: httpx.AsyncClient, hf_faults: Faults) -> None:
    hf_faults.fail_next_write()
    refused = await client.put("/requests/r-1", json={"machine_count": 3})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "detail" not in refused.json()
    await create(client)


async def test_an_answer_is_lost(
    client: httpx.AsyncClient, hf_store: StorageStrategy, hf_faults: Faults
) -> None:
    hf_faults.lose_next_answer()
    lost = await client.put("/requests/r-1", json={"machine_count": 3})
    assert lost.status_code == 503
    assert lost.json()["outcome_unknown"]
    assert "retry-after" not in lost.headers
    assert await hf_store.count_entities("machines") == 3
