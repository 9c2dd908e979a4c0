"""The change feed as server-sent events: resumed, kept alive, and ended with the client."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from hf_async_store import (
    Collection,
    FeedExpiredError,
    InvalidInputError,
    StorageStrategy,
    UnavailableError,
    open_store,
)
from hf_async_store.integrations.server_sent_events import ChangesResponse, last_event_id
from hf_async_store.integrations.starlette import EXCEPTION_HANDLERS, set_store, store_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from starlette.types import Message

    from hf_async_store.strategies.memory import MemoryEngine
    from hf_async_store_bench.servers import PostgresServer

pytestmark = pytest.mark.hf_sampled

SECONDS = 20
MACHINES = Collection("machines", key="machine_id", fields=["status"], feed=3600)


@pytest.fixture
def hf_store_collections() -> Iterable[Collection]:
    return [MACHINES]


@pytest.fixture(
    params=["memory:", "json:{tmp_path}/store", "sqlite:{tmp_path}/store.db", "postgresql"]
)
def hf_store_url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "postgresql":
        yield request.param
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    url = server.database("")
    yield url
    server.drop(url)


async def changes(request: Request) -> ChangesResponse:
    status = request.query_params.get("status")
    filters = None if status is None else {"status": status}
    watch = store_of(request).watch("machines", filters, since=last_event_id(request))
    return ChangesResponse(watch, heartbeat=float(request.query_params.get("heartbeat", 60)))


@pytest.fixture
def app(hf_store: StorageStrategy) -> Starlette:
    application = Starlette(
        routes=[Route("/changes", changes)], exception_handlers=EXCEPTION_HANDLERS
    )
    set_store(application, hf_store)
    return application


class Connection:
    """What a client has received of a response that may not end."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.ended = False
        self.left = asyncio.Event()
        self.arrived = asyncio.Event()
        self.bodies: list[bytes] = []

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.bodies.append(message["body"])
            self.ended = not message.get("more_body", False)
        self.arrived.set()

    async def parts(self, number: int) -> list[dict[str, str]]:
        """The first events and comments, by the names of their fields."""
        async with asyncio.timeout(SECONDS):
            while b"".join(self.bodies).count(b"\n\n") < number:
                self.arrived.clear()
                await self.arrived.wait()
        texts = b"".join(self.bodies).decode().split("\n\n")[:number]
        return [dict(line.split(":", 1) for line in text.split("\n")) for text in texts]


@asynccontextmanager
async def connected(app: Starlette, query: str = "", **headers: str) -> AsyncIterator[Connection]:
    """A connection, until the client goes away; then the request must end."""
    connection = Connection()
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/changes",
        "query_string": query.encode(),
        "headers": [(n.replace("_", "-").encode(), v.encode()) for n, v in headers.items()],
    }
    request = asyncio.create_task(app(scope, connection.receive, connection.send))
    try:
        yield connection
    finally:
        connection.left.set()
        async with asyncio.timeout(SECONDS):
            await request


def data_of(part: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(part[" data" if " data" in part else "data"])
    return found


async def write(store: StorageStrategy, *ids: str, status: str = "UP") -> None:
    for each in ids:
        await store.save_entity("machines", {"machine_id": each, "status": status})


async def test_changes_as_they_are_committed(app: Starlette, hf_store: StorageStrategy) -> None:
    await write(hf_store, "before")
    async with connected(app) as client:
        [begun] = await client.parts(1)
        assert (begun["event"], begun["data"]) == (" start", " {}")
        assert client.headers["content-type"] == "text/event-stream"
        assert "content-length" not in client.headers
        await write(hf_store, "a\n\nb")
        await hf_store.delete_entity("machines", "a\n\nb")
        _, put, deleted = await client.parts(3)
        assert put["event"] == " put"
        assert data_of(put)["id"] == "a\n\nb"
        assert data_of(put)["entity"]["status"] == "UP"
        assert deleted["event"] == " delete"
        assert data_of(deleted) == {"id": "a\n\nb", "version": 1}
    assert not client.ended, "the client went away"


async def test_a_client_goes_on_where_it_was(app: Starlette, hf_store: StorageStrategy) -> None:
    async with connected(app) as client:
        await client.parts(1)
        await write(hf_store, "a", "b")
        token = (await client.parts(2))[1]["id"].strip()
    await write(hf_store, "c")
    for resumed in (
        connected(app, last_event_id=token),
        connected(app, f"since={token}"),
        connected(app, "since=altered", last_event_id=token),
    ):
        async with resumed as again:
            parts = await again.parts(3)
            assert [data_of(each).get("id") for each in parts] == [None, "b", "c"]
            assert parts[0]["id"].strip() == token


async def test_comments_keep_the_connection_and_move_the_token(
    app: Starlette, hf_store: StorageStrategy
) -> None:
    async with connected(app, "status=DOWN&heartbeat=0.05") as client:
        first = (await client.parts(1))[0]["id"]
        await write(hf_store, "a", "b")
        async with asyncio.timeout(SECONDS):
            while (last := (await client.parts(len(client.bodies)))[-1])["id"] == first:
                await asyncio.sleep(0.02)
        assert set(last) == {"", "id"}, "it is a comment"
        await write(hf_store, "c", status="DOWN")
        async with asyncio.timeout(SECONDS):
            while b"event: put" not in b"".join(client.bodies):
                await asyncio.sleep(0.02)
    async with connected(app, last_event_id=last["id"].strip()) as again:
        assert data_of((await again.parts(2))[1])["id"] == "c"


@pytest.mark.parametrize("how", [{"query": "since=altered"}, {"last_event_id": "altered"}])
async def test_an_invalid_token_is_an_error(app: Starlette, how: dict[str, str]) -> None:
    async with connected(app, **how) as client:
        await client.parts(0)
        async with asyncio.timeout(SECONDS):
            await client.arrived.wait()
    assert client.status == 422
    assert json.loads(b"".join(client.bodies))["error"] == "InvalidCursorError"


class Failing:
    """A watch that fails when it begins, or while it is read."""

    collection = token = "x"

    def __init__(self, error: Exception, *, at_first: bool) -> None:
        self._error = error
        self._at_first = at_first

    async def __aenter__(self) -> Failing:
        if self._at_first:
            raise self._error
        return self

    async def __aexit__(self, *exc: object) -> None: ...

    async def __anext__(self) -> object:
        raise self._error


@pytest.mark.parametrize(
    ("error", "at_first", "status"),
    [
        (FeedExpiredError("too old"), True, 410),
        (UnavailableError("no answer"), True, 503),
        (FeedExpiredError("too old"), False, 200),
        (UnavailableError("no answer"), False, 200),
    ],
)
async def test_errors_before_and_after_the_first_event(
    error: Exception, at_first: bool, status: int
) -> None:
    async def fail(request: Request) -> ChangesResponse:
        del request
        return ChangesResponse(Failing(error, at_first=at_first))  # type: ignore[arg-type]

    app = Starlette(routes=[Route("/changes", fail)], exception_handlers=EXCEPTION_HANDLERS)
    async with connected(app) as client:
        async with asyncio.timeout(SECONDS):
            while not client.ended:
                await asyncio.sleep(0)
    assert client.status == status


async def test_a_token_whose_changes_are_not_kept_or_of_another_store_is_an_error() -> None:
    app = Starlette(routes=[Route("/changes", changes)], exception_handlers=EXCEPTION_HANDLERS)
    tokens = []
    for _ in range(2):
        async with open_store("memory:", collections=[MACHINES]) as store:
            async with store.watch("machines") as watch:
                tokens.append(watch.token)
                await write(store, "a")
            if len(tokens) == 1:
                continue
            feed = cast("MemoryEngine", store.engine).feed("machines")
            feed.remove(len(feed))
            set_store(app, store)
            statuses = []
            for token in tokens:
                async with connected(app, last_event_id=token) as client:
                    async with asyncio.timeout(SECONDS):
                        while not client.ended:
                            await asyncio.sleep(0)
                    statuses.append(client.status)
            assert statuses == [422, 410]


async def test_a_closed_store_ends_the_stream() -> None:
    app = Starlette(routes=[Route("/changes", changes)], exception_handlers=EXCEPTION_HANDLERS)
    async with open_store("memory:", collections=[MACHINES]) as store:
        set_store(app, store)
        async with connected(app) as client:
            await client.parts(1)
            await store.close()
            async with asyncio.timeout(SECONDS):
                while not client.ended:
                    await asyncio.sleep(0)


async def test_a_cancelled_request_ends(app: Starlette) -> None:
    connection = Connection()
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/changes",
        "query_string": b"",
        "headers": [],
    }
    request = asyncio.create_task(app(scope, connection.receive, connection.send))
    await connection.parts(1)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert not [
        each for each in asyncio.all_tasks() if "server_sent_events" in repr(each.get_coro())
    ]


@pytest.mark.parametrize("heartbeat", [0, -1, float("nan"), "x"])
def test_an_invalid_heartbeat(heartbeat: Any) -> None:
    with pytest.raises(InvalidInputError):
        ChangesResponse(Failing(UnavailableError("x"), at_first=True), heartbeat=heartbeat)  # type: ignore[arg-type]


async def test_nothing_is_watched_for_a_head(app: Starlette) -> None:
    connection = Connection()
    scope = {
        "type": "http",
        "method": "HEAD",
        "path": "/changes",
        "query_string": b"",
        "headers": [],
    }
    await app(scope, connection.receive, connection.send)
    assert (connection.status, connection.bodies, connection.ended) == (200, [b""], True)
