"""Starlette without FastAPI, and the example of an application with FastAPI as its users run it."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from hf_async_store import (
    ConfigurationError,
    CorruptionError,
    InvalidFieldError,
    StorageStrategy,
    UnavailableError,
    open_store,
)
from hf_async_store.integrations.http import expected_version
from hf_async_store.integrations.starlette import (
    EXCEPTION_HANDLERS,
    entity_response,
    page_response,
    set_store,
    store_lifespan,
    store_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT: Final = Path(__file__).parents[2]
EXAMPLE: Final = ROOT / "docs/examples/machines"


async def read(request: Request) -> Response:
    store = store_of(request)
    return entity_response(request, await store.get_entity("templates", request.path_params["id"]))


async def put(request: Request) -> Response:
    entity = {**await request.json(), "template_id": request.path_params["id"]}
    expected = expected_version(request.headers)
    await store_of(request).save_entity("templates", entity, expected_version=expected)
    return Response(None, 204)


async def query(request: Request) -> Response:
    store, cursor = store_of(request), request.query_params.get("cursor")
    page = await store.query_page("templates", order_by="template_id", limit=2, cursor=cursor)
    return page_response(request, page, headers={"Cache-Control": "no-store"})


async def fail(request: Request) -> Response:
    del request
    raise CorruptionError("file /data/requests.json, offset 17")


async def be_unavailable(request: Request) -> Response:
    del request
    raise UnavailableError("the host db.internal does not respond")


ROUTES: Final = [
    Route("/templates/{id}", read),
    Route("/templates/{id}", put, methods=["PUT"]),
    Route("/templates", query),
    Route("/fail", fail),
    Route("/unavailable", be_unavailable),
]


def application() -> Starlette:
    return Starlette(
        routes=ROUTES,
        lifespan=store_lifespan(lambda: open_store("memory:")),
        exception_handlers=EXCEPTION_HANDLERS,
    )


@asynccontextmanager
async def client_of(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that is started and ended, as a server does."""
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


async def test_an_application_opens_and_closes_its_store() -> None:
    app = application()
    for _ in range(2):  # each start opens a new one
        async with client_of(app) as client:
            store = app.state.hf_store
            created = await client.put("/templates/t", json={"name": "x"})
            assert created.status_code == 204
            assert (await client.get("/templates/t")).json()["version"] == 1
        assert store._closed
        with pytest.raises(ConfigurationError, match="set_store"):
            store_of(Request({"type": "http", "app": app}))


async def test_preconditions() -> None:
    async with client_of(application()) as client:
        only_new = {"If-None-Match": "*"}
        assert (await client.put("/templates/t", json={}, headers=only_new)).status_code == 204
        assert (await client.put("/templates/t", json={}, headers=only_new)).status_code == 412
        found = await client.get("/templates/t")
        tag = {"If-Match": found.headers["etag"]}
        assert found.headers["content-type"] == "application/json"
        assert (await client.get("/templates/t", headers=tag)).status_code == 200
        assert (await client.put("/templates/t", json={}, headers=tag)).status_code == 204
        assert (await client.put("/templates/t", json={}, headers=tag)).status_code == 412
        assert (await client.get("/templates/t", headers=tag)).status_code == 412
        assert (await client.put("/templates/u", json={}, headers=tag)).status_code == 404
        seen = {"If-None-Match": f"W/{found.headers['etag']}, *"}
        assert (await client.get("/templates/t", headers=seen)).status_code == 422


async def test_a_client_that_has_the_entity_gets_no_body() -> None:
    async with client_of(application()) as client:
        await client.put("/templates/t", json={"name": "x"})
        tag = (await client.get("/templates/t")).headers["etag"]
        for have in (tag, f"W/{tag}", f'"x", {tag}', "*"):
            again = await client.get("/templates/t", headers={"If-None-Match": have})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == tag
        missing = await client.get("/templates/u", headers={"If-None-Match": "*"})
        assert missing.status_code == 404
        assert missing.json() == {"title": "Not Found", "status": 404}


async def test_pages() -> None:
    async with client_of(application()) as client:
        for name in "abcde":
            await client.put(f"/templates/{name}", json={})
        page, found = await client.get("/templates"), ""
        while True:
            found += "".join(each["template_id"] for each in page.json())
            assert page.headers["cache-control"] == "no-store"
            if "next" not in page.links:
                break
            page = await client.get(page.url.join(page.links["next"]["url"]))
        assert found == "abcde"


async def test_errors_are_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    async with client_of(application()) as client:
        for path, status, level in (
            ("/fail", 500, logging.ERROR),
            ("/unavailable", 503, logging.WARNING),
        ):
            caplog.clear()
            answer = await client.get(path)
            assert answer.status_code == status
            assert answer.headers["content-type"] == "application/problem+json"
            assert not re.search(r"requests|offset|db\.|StorageError", answer.text)
            [logged] = caplog.records
            assert (logged.name, logged.levelno) == ("hf_async_store.http", level)
        caplog.clear()
        wrong = await client.put("/templates/t", json={"max_number": "x"})
        assert (wrong.status_code, wrong.json()["error"]) == (422, InvalidFieldError.__name__)
        assert not caplog.records


async def test_an_application_inside_another_one(hf_store: StorageStrategy) -> None:
    inner = Starlette(routes=ROUTES, exception_handlers=EXCEPTION_HANDLERS)
    outer = Starlette(routes=[Mount("/inner", inner)])
    transport = httpx.ASGITransport(outer)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/inner/templates")).status_code == 500
        set_store(inner, hf_store)
        assert (await client.get("/inner/templates")).json() == []


# -- the example ----------------------------------------------------------------------------


def run_example(folder: Path, *arguments: str) -> str:
    """Run the tests of the example, as in a folder of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments, str(EXAMPLE)],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--hf-store-url=sqlite:{tmp_path}/machines.db"],
        ["-n2", "--hf-store-url=json:machines-{worker}?sync_writes=false"],
    ],
    ids=["memory", "sqlite", "json, two workers"],
)
def test_the_tests_of_the_example(tmp_path: Path, arguments: list[str]) -> None:
    assert "8 passed" in run_example(tmp_path, *arguments)


def test_the_example_as_a_real_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "uvicorn", "--factory", "machines:create_app"]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--app-dir", str(EXAMPLE), "--host", "127.0.0.1", "--port", "0"],
            env={**os.environ, "MACHINES_STORE": f"sqlite:{tmp_path}/machines.db"},
            stderr=output,
            cwd=tmp_path,
        )
    try:
        url = address_in(log, server)
        with httpx.Client(base_url=url) as client:
            created = client.put("/requests/r-1", json={"machine_count": 3})
            assert created.status_code == 201, created.text
            tag = {"If-Match": client.get("/machines/r-1-0001").headers["etag"]}
            for status in (200, 412):
                sent = client.patch("/machines/r-1-0001", json={"status": "DONE"}, headers=tag)
                assert sent.status_code == status
            done = client.get("/requests/r-1/machines", params={"status": "DONE"})
            assert [each["machine_id"] for each in done.json()] == ["r-1-0001"]
            assert client.get("/health").json() == {"ok": True}
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == -signal.SIGTERM or server.returncode == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        server.kill()
        server.wait()


def address_in(log: Path, server: subprocess.Popen[bytes]) -> str:
    """The address of a server, from its log."""
    for _ in range(600):
        found = re.search(r"running on (http://[\d.:]+)", log.read_text())
        if found:
            return found[1]
        assert server.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())
