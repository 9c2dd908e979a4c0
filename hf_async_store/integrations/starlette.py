"""Starlette and FastAPI: the store of an application, and answers to its requests.

    app = FastAPI(
        lifespan=store_lifespan(lambda: open_store("json:data.json", collections=COLLECTIONS)),
        exception_handlers=EXCEPTION_HANDLERS,
    )

    @app.get("/machines/{machine_id}")
    async def read(request: Request, machine_id: str) -> Response:
        return entity_response(request, await store_of(request).get_entity("machines", machine_id))

Nothing here imports FastAPI, whose applications, requests and responses are those of Starlette. `Depends`
takes `store_of` as it is.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from typing import Any, Final, TypeAlias

import msgspec
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.status import WS_1011_INTERNAL_ERROR, WS_1013_TRY_AGAIN_LATER
from starlette.websockets import WebSocket

from hf_async_store.errors import ConfigurationError, StorageError
from hf_async_store.integrations.http import (
    PROBLEM_TYPE,
    PreconditionFailedError,
    entity_tag,
    is_match,
    is_none_match,
    page_headers,
    problem_of,
)
from hf_async_store.query import Page
from hf_async_store.strategy import StorageStrategy
from hf_async_store.values import Entity

log: Final = logging.getLogger("hf_async_store.http")

Lifespan: TypeAlias = Callable[[Starlette], AbstractAsyncContextManager[None]]

_JSON_TYPE: Final = "application/json"
_ATTRIBUTE: Final = "hf_store"


# -- the store of an application ------------------------------------------------------------


def store_lifespan(open_it: Callable[[], StorageStrategy]) -> Lifespan:
    """The `lifespan` of an application with one store, which all its requests share.

    It is opened before the first request, and closed after the last: writes in progress are completed.
    In a lifespan of your own, use `async with store_lifespan(open_it)(app):`.

    Args:
        open_it: returns the store, not opened yet.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        async with open_it() as store:
            set_store(app, store)
            try:
                yield
            finally:
                set_store(app, None)

    return lifespan


def set_store(app: Starlette, store: StorageStrategy | None) -> None:
    """Let an application use a store that somebody else opens and closes, such as a test."""
    setattr(app.state, _ATTRIBUTE, store)


def store_of(connection: HTTPConnection) -> StorageStrategy:
    """The store of the application that a request or a WebSocket is for; for FastAPI, a dependency.

    Raises:
        ConfigurationError: the application has none.
    """
    store = getattr(connection.app.state, _ATTRIBUTE, None)
    if store is None:
        raise ConfigurationError(
            "this application has no store: give it lifespan=store_lifespan(...), and an "
            "application that is mounted in another one the same store by set_store"
        )
    assert isinstance(store, StorageStrategy)
    return store


# -- answers --------------------------------------------------------------------------------


async def storage_error_response(connection: HTTPConnection, error: Exception) -> Response | None:
    """The answer to a request that ended in a `StorageError`: see `http.problem_of`.

    Those with status 500 and above are logged, as `hf_async_store.http`. A WebSocket is closed, with 1013
    (try again later) if the error is retryable, else 1011.
    """
    assert isinstance(error, StorageError)
    problem = problem_of(error, connection.headers)
    what = connection.scope.get("method", "WebSocket"), connection.scope["path"]
    if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("%s %r failed", *what, exc_info=error)
    elif problem.status > HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning("%s %r failed: %s", *what, error)
    if isinstance(connection, WebSocket):
        code = WS_1013_TRY_AGAIN_LATER if error.retryable else WS_1011_INTERNAL_ERROR
        await connection.close(code)
        return None
    return Response(msgspec.json.encode(problem.document), problem.status, problem.headers)


EXCEPTION_HANDLERS: Final[
    dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Any]]]
] = {StorageError: storage_error_response}
"""The `exception_handlers` of an application."""


def entity_response(
    request: Request,
    entity: Entity | None,
    *,
    status_code: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An entity as JSON, with its ETag.

    A GET or HEAD whose If-None-Match names the entity is answered by 304 without a body.

    Args:
        entity: None: 404.

    Raises:
        PreconditionFailedError: a GET or HEAD has an If-Match that does not name the entity.
    """
    if entity is None:
        missing = {"title": HTTPStatus.NOT_FOUND.phrase, "status": 404}
        return Response(msgspec.json.encode(missing), 404, media_type=PROBLEM_TYPE)
    answer = {**(headers or {}), "ETag": entity_tag(entity)}
    if request.method in ("GET", "HEAD"):
        if not is_match(request.headers, entity):
            raise PreconditionFailedError("the entity is not the one that the request expects")
        if is_none_match(request.headers, entity):
            return Response(None, 304, answer)
    return Response(msgspec.json.encode(entity), status_code, answer, _JSON_TYPE)


def page_response(
    request: Request, page: Page, *, headers: Mapping[str, str] | None = None
) -> Response:
    """The entities of a page as a JSON array, with a Link header to the next page."""
    answer = {**(headers or {}), **page_headers(page, request.query_params.multi_items())}
    return Response(msgspec.json.encode(page.items), 200, answer, _JSON_TYPE)
