"""Starlette without FastAPI, and the example of an application with FastAPI as its users run it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

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
from tests.bench.browser import browse
from tests.pytest_process import PYTEST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from starlette.types import Message

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


@pytest.mark.parametrize(("retryable", "code"), [(True, 1013), (False, 1011)])
async def test_a_websocket_is_closed(retryable: bool, code: int) -> None:
    async def fail_socket(socket: WebSocket) -> None:
        await socket.accept()
        raise UnavailableError("the host db.internal does not respond", retryable=retryable)

    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    app = Starlette(
        routes=[WebSocketRoute("/socket", fail_socket)], exception_handlers=EXCEPTION_HANDLERS
    )
    scope = {"type": "websocket", "path": "/socket", "query_string": b"", "headers": []}
    await app(scope, receive, send)
    assert [each["type"] for each in sent] == ["websocket.accept", "websocket.close"]
    assert sent[1]["code"] == code
    assert "db" not in sent[1]["reason"]


async def test_an_application_inside_another_one(hf_store: StorageStrategy) -> None:
    inner = Starlette(routes=ROUTES, exception_handlers=EXCEPTION_HANDLERS)
    outer = Starlette(routes=[Mount("/inner", inner)])
    transport = httpx.ASGITransport(outer)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/inner/templates")).status_code == 500
        set_store(inner, hf_store)
        assert (await client.get("/inner/templates")).json() == []


def test_an_application_in_an_event_loop_of_its_own(
    hf_new_store: Callable[[], StorageStrategy],
) -> None:
    app = Starlette(routes=ROUTES, lifespan=store_lifespan(hf_new_store))

    async def use() -> None:
        async with client_of(app) as client:
            assert (await client.put("/templates/t", json={})).status_code == 204
            assert (await client.get("/templates/t")).json()["version"] == 1

    asyncio.run(use())


# -- the example ----------------------------------------------------------------------------


def run_example(folder: Path, *arguments: str) -> str:
    """Run the tests of the example, as in a folder of its own."""
    done = subprocess.run(
        [*PYTEST, "-q", *arguments, str(EXAMPLE)],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.hf_sampled
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


@contextmanager
def served(folder: Path, *application: str, **environment: str) -> Iterator[str]:
    """The address of an application, run by uvicorn until the context is left; then it must end cleanly."""
    log = folder / "log"
    options = ("--host=127.0.0.1", "--port=0", "--timeout-graceful-shutdown=1")
    paths = os.pathsep.join([str(EXAMPLE), str(Path(__file__).parent), *sys.path])
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", *application, *options],
            env={**os.environ, "PYTHONPATH": paths, **environment},
            stderr=output,
            cwd=folder,
        )
    try:
        yield address_in(log, server)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) in (0, -signal.SIGTERM), log.read_text()
        assert "Application shutdown complete" in log.read_text(), log.read_text()
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


def test_the_example_as_a_real_process(tmp_path: Path) -> None:
    application = ("--factory", "machines:create_app")
    with (
        served(tmp_path, *application, MACHINES_STORE=f"sqlite:{tmp_path}/machines.db") as url,
        httpx.Client(base_url=url) as client,
    ):
        created = client.put("/requests/r-1", json={"machine_count": 3})
        assert created.status_code == 201, created.text
        tag = {"If-Match": client.get("/machines/r-1-0001").headers["etag"]}
        for status in (200, 412):
            sent = client.patch("/machines/r-1-0001", json={"status": "DONE"}, headers=tag)
            assert sent.status_code == status
        done = client.get("/requests/r-1/machines", params={"status": "DONE"})
        assert [each["machine_id"] for each in done.json()] == ["r-1-0001"]
        assert client.get("/health").json() == {"ok": True}
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_changes_over_a_real_connection(tmp_path: Path) -> None:
    application = ("--factory", "machines:create_app")
    with (
        ExitStack() as stack,
        served(tmp_path, *application, MACHINES_STORE="memory:") as url,
    ):
        client = stack.enter_context(httpx.Client(base_url=url, timeout=20))
        client.put("/requests/r-1", json={"machine_count": 3})
        token, seen = "", []
        for number in range(3):  # each connection goes on where the last one was
            headers = {"Last-Event-ID": token} if token else {}
            with client.stream("GET", "/requests/r-1/changes", headers=headers) as response:
                assert response.status_code == 200
                lines = response.iter_lines()
                assert next(lines) == "event: start"
                client.patch(f"/machines/r-1-000{number}", json={"status": "DONE"})
                for line in lines:
                    token = line.removeprefix("id: ") if line.startswith("id: ") else token
                    if line.startswith("data: ") and "machine_id" in line:
                        seen.append(json.loads(line.removeprefix("data: "))["id"])
                        break
            client.patch("/machines/r-1-0000", json={"status": "RUNNING"})  # while away
        assert seen == ["r-1-0000", "r-1-0000", "r-1-0001"], "every change, in order"
        with client.stream("GET", "/requests/r-1/changes") as response:
            assert next(response.iter_lines()) == "event: start"
            assert response.status_code == 200
        held = stack.enter_context(client.stream("GET", "/requests/r-1/changes"))
        assert held.status_code == 200, "the server ends it"


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    with (
        served(tmp_path, "live_application:app") as url,
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor() as threads,
    ):
        client.put("/requests/r-1", json={"machine_count": 150})
        page = f"{url}/test/page/r-1/live"
        browser = threads.submit(browse, page, tmp_path, "--dump-dom")
        client.get("/test/wait")
        assert client.patch("/machines/r-1-0007", json={"status": "DONE"}).status_code == 200
        shown = browser.result().stdout
    cells = re.findall(r"<td>([^<]*)</td>" * 3, shown)
    assert len(cells) == 150
    assert ("r-1-0007", "DONE", "2") in cells
    assert ("r-1-0149", "PENDING", "1") in cells
