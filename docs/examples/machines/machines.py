"""The machines of requests, over HTTP: an application with FastAPI.

pip install "hf_async_store[starlette]" fastapi uvicorn
MACHINES_STORE=sqlite:machines.db uvicorn --factory machines:create_app
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, PositiveInt

from hf_async_store import (
    Collection,
    EntityNotFoundError,
    Field,
    Index,
    StorageStrategy,
    Transaction,
    open_store,
)
from hf_async_store.integrations.http import check_preconditions, expected_version
from hf_async_store.integrations.server_sent_events import ChangesResponse, last_event_id
from hf_async_store.integrations.starlette import (
    EXCEPTION_HANDLERS,
    entity_response,
    page_response,
    store_lifespan,
    store_of,
)

COLLECTIONS = (
    Collection("requests", key="request_id", fields=["status", Field("machine_count", "integer")]),
    Collection(
        "machines",
        key="machine_id",
        fields=["status", Field("request_id", references="requests")],
        indexes=["request_id", Index("request_id", "status")],
        feed=timedelta(hours=1),
    ),
)

PAGE = Path(__file__).with_name("live.html")
Store = Annotated[StorageStrategy, Depends(store_of)]
router = APIRouter()


class Wanted(BaseModel):
    machine_count: PositiveInt


class Status(BaseModel):
    status: Literal["PENDING", "RUNNING", "DONE", "FAILED"]


def open_configured() -> StorageStrategy:
    return open_store(os.environ.get("MACHINES_STORE", "memory:"), collections=COLLECTIONS)


def create_app(open_it: Callable[[], StorageStrategy] = open_configured) -> FastAPI:
    app = FastAPI(lifespan=store_lifespan(open_it), exception_handlers=EXCEPTION_HANDLERS)
    app.include_router(router)
    return app


@router.put("/requests/{request_id}", status_code=201)
async def create(request: Request, store: Store, request_id: str, wanted: Wanted) -> Response:
    """A new request and its machines, all or nothing. Repeated, it is refused: 409."""

    async def work(tx: Transaction) -> None:
        await tx.create_entity(
            "requests", {"request_id": request_id, "status": "PENDING", **wanted.model_dump()}
        )
        await tx.create_entities(
            "machines",
            [
                {
                    "machine_id": f"{request_id}-{number:04}",
                    "request_id": request_id,
                    "status": "PENDING",
                }
                for number in range(wanted.machine_count)
            ],
        )

    await store.run_transaction(work)
    created = await store.get_entity("requests", request_id)
    return entity_response(request, created, status_code=201)


@router.get("/requests/{request_id}")
async def read(request: Request, store: Store, request_id: str) -> Response:
    return entity_response(request, await store.get_entity("requests", request_id))


@router.delete("/requests/{request_id}", status_code=204)
async def delete(request: Request, store: Store, request_id: str) -> None:
    """Delete a request and its machines, if it is the one that If-Match names."""

    async def work(tx: Transaction) -> None:
        entity = await tx.get_entity("requests", request_id)
        if entity is None:
            raise EntityNotFoundError("requests", request_id)
        check_preconditions(request.headers, entity)
        await tx.delete_where("machines", {"request_id": request_id})
        await tx.delete_entity("requests", request_id)

    await store.run_transaction(work)


@router.get("/requests/{request_id}/machines")
async def list_machines(
    request: Request,
    store: Store,
    request_id: str,
    status: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: str | None = None,
) -> Response:
    """The machines of a request, in pages: the Link header has the next one."""
    filters = {"request_id": request_id} | ({} if status is None else {"status": status})
    page = await store.query_page(
        "machines", filters, order_by="machine_id", limit=limit, cursor=cursor, timeout=10
    )
    return page_response(request, page)


@router.get("/requests/{request_id}/changes")
async def follow_machines(request: Request, store: Store, request_id: str) -> Response:
    """The changes of these machines from now on, or after the last one that the client has seen."""
    since = last_event_id(request)
    return ChangesResponse(store.watch("machines", {"request_id": request_id}, since=since))


@router.get("/requests/{request_id}/live")
async def show_machines(request_id: str) -> Response:
    """A page that shows them as they are."""
    return HTMLResponse(PAGE.read_text(encoding="utf-8"))


@router.get("/machines/{machine_id}")
async def read_machine(request: Request, store: Store, machine_id: str) -> Response:
    return entity_response(request, await store.get_entity("machines", machine_id))


@router.patch("/machines/{machine_id}")
async def update_machine(
    request: Request, store: Store, machine_id: str, changed: Status
) -> Response:
    """Set the status of a machine, if it is the one that If-Match names."""
    updated = await store.update_entity(
        "machines",
        machine_id,
        changed.model_dump(),
        expected_version=expected_version(request.headers),
        returning=True,
        timeout=10,
    )
    return entity_response(request, updated)


@router.get("/health")
async def health(store: Store, response: Response) -> dict[str, object]:
    report = await store.health()
    response.status_code = 200 if report["ok"] else 503
    return {"ok": report["ok"]}
