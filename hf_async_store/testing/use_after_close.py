"""Part of case 124: no method of the driver interface works after `close`."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Final, TypeAlias

import pytest

from hf_async_store.changes import Delete
from hf_async_store.claim_records import ClaimTerms
from hf_async_store.driver import Engine
from hf_async_store.errors import (
    ClaimLostError,
    ConcurrencyConflictError,
    StorageError,
    StoreClosedError,
)
from hf_async_store.generators import Owned
from hf_async_store.migration_routing import unrouted
from hf_async_store.query import Query
from hf_async_store.schema import LOCK_COLLECTION, Collection, Index
from hf_async_store.values import Key

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from hf_async_store.driver import Capabilities, Reader
    from hf_async_store.testing.harness import Harness

_NOTE: Final = Key("notes", "a")
_ALL: Final = Query("notes")
_LATER: Final = Collection("later", key="later_id")
_TERMS: Final = ClaimTerms(60.0, "somebody")


async def _drained(found: AsyncGenerator[object, None]) -> None:
    async with Owned(found) as owned:
        async for _ in owned:
            pass


async def _read_in(context: AbstractAsyncContextManager[Reader]) -> None:
    async with context as reader:
        await reader.fetch([_NOTE])


_Call: TypeAlias = "Callable[[Engine, str], Awaitable[object]]"

_CALLS: Final[Mapping[str, _Call]] = {
    "fetch": lambda engine, position: engine.fetch([_NOTE]),
    "select": lambda engine, position: _drained(engine.select(_ALL)),
    "select_batches": lambda engine, position: _drained(engine.select_batches(_ALL)),
    "count": lambda engine, position: engine.count(_ALL),
    "write_each": lambda engine, position: engine.write_each([Delete(_NOTE)]),
    "write_unblocked": lambda engine, position: engine.write_unblocked(lambda: [Delete(_NOTE)]),
    "write_cancellable": lambda engine, position: (
        engine.write_cancellable([Delete(_NOTE)]) or engine.write_each([Delete(_NOTE)])
    ),
    "session": lambda engine, position: _read_in(engine.session(None)),
    "snapshot": lambda engine, position: _read_in(engine.snapshot()),
    "fetch_undeclared": lambda engine, position: engine.fetch_undeclared(_LATER, "a"),
    "exists": lambda engine, position: engine.exists(),
    "undeclared": lambda engine, position: engine.undeclared(),
    "declarations": lambda engine, position: engine.declarations(),
    "remember": lambda engine, position: engine.remember([_LATER]),
    "claim": lambda engine, position: engine.claim(_ALL.with_limit(1), _TERMS),
    "claim_name": lambda engine, position: engine.claim_name(
        [Key(LOCK_COLLECTION.name, "a")], _TERMS
    ),
    "renew_claim": lambda engine, position: engine.renew_claim(_NOTE, 1, 60.0),
    "release_claim": lambda engine, position: engine.release_claim(_NOTE, 1, None),
    "claimed_session": lambda engine, position: _read_in(engine.claimed_session(_NOTE, 1)),
    "write_claimed": lambda engine, position: engine.write_claimed(1, Delete(_NOTE), ends=True),
    "break_claim": lambda engine, position: engine.break_claim(_NOTE),
    "claims": lambda engine, position: engine.claims("notes"),
    "feed_position": lambda engine, position: engine.feed_position("notes"),
    "read_feed": lambda engine, position: engine.read_feed("notes", position, 1),
    "feed_changed": lambda engine, position: engine.feed_changed({"notes": position}, 60.0),
    "schema_changes": lambda engine, position: engine.schema_changes(),
    "apply_schema": lambda engine, position: engine.apply_schema(),
    "unenforced": lambda engine, position: engine.unenforced(),
    "explain": lambda engine, position: engine.explain(_ALL),
    "probe": lambda engine, position: engine.probe(),
    "health": lambda engine, position: engine.health(),
}
"""A call of each method that reaches what is stored, with a position of the feed."""

_CONSTANT: Final = {"exists", "undeclared", "schema_changes", "apply_schema"} | {
    *("unenforced", "explain", "probe", "health"),
}
"""The methods whose default reaches nothing."""

_NEEDED: Final = {
    **dict.fromkeys((each for each in _CALLS if "claim" in each), "claims"),
    **dict.fromkeys((each for each in _CALLS if "feed" in each), "feed"),
}
"""The capability that a method needs."""


class ClosedContract:
    """Part of case 124."""

    async def test_124_no_method_works_after_close(self, harness: Harness) -> None:
        """Of an engine in memory, only of what it implements: some defaults return a constant."""
        async with _opened(harness) as (engine, position):
            calls = _calls_of(engine, harness.capabilities)
        worked = []
        for name, call in calls.items():
            with suppress(StoreClosedError):
                await call(engine, position)
                worked.append(name)
        assert worked == []

    @pytest.mark.parametrize("seconds", [0, 0.002, 0.02])
    async def test_124_closing_amid_calls(self, harness: Harness, seconds: float) -> None:
        """A call that has begun ends as ever, or with StoreClosedError, whenever the store is closed."""
        async with _opened(harness) as (engine, position):
            tasks = {
                name: asyncio.ensure_future(call(engine, position))
                for name, call in _calls_of(engine, harness.capabilities).items()
            }
            await asyncio.sleep(seconds)
        await asyncio.wait(tasks.values())
        errors = {name: each.exception() for name, each in tasks.items()}
        assert {name: each for name, each in errors.items() if not _may_end(each)} == {}


@asynccontextmanager
async def _opened(harness: Harness) -> AsyncIterator[tuple[Engine, str]]:
    """The engine of a store that holds an entity, and a position of its feed."""
    async with harness.store([_declared(harness.capabilities)]) as store:
        await store.save_entity("notes", {"note_id": "a", "label": "first"})
        engine = store.engine
        yield engine, await engine.feed_position("notes") if harness.capabilities.feed else ""


def _calls_of(engine: Engine, capabilities: Capabilities) -> dict[str, _Call]:
    """The calls of the methods that the engine has."""
    kind = type(unrouted(engine))
    return {
        name: call
        for name, call in _CALLS.items()
        if getattr(capabilities, _NEEDED.get(name, ""), True)
        and not (name in _CONSTANT and getattr(kind, name) is getattr(Engine, name))
    }


def _may_end(error: BaseException | None) -> bool:
    """Whether a call may end in this way: the others change and delete the entity meanwhile."""
    if error is None or isinstance(
        error, StoreClosedError | ConcurrencyConflictError | ClaimLostError
    ):
        return True
    return isinstance(error, StorageError) and error.outcome_unknown


def _declared(capabilities: Capabilities) -> Collection:
    """A collection for which each method of the engine has something to do."""
    index = Index("label", unique=True) if capabilities.unique_indexes else "label"
    feed = timedelta(hours=1) if capabilities.feed else None
    return Collection("notes", key="note_id", fields=["label"], indexes=[index], feed=feed)
