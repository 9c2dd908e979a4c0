"""Assertions of the contract suite: type-exact comparison, and refusal before any I/O."""

from __future__ import annotations

import asyncio
import gc
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hf_async_store.errors import StorageError
from hf_async_store.testing.concurrency import answer_of
from hf_async_store.values import CREATED_AT, UPDATED_AT, VERSION

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator, Mapping

    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.values import Entity

Failure = TypeVar("Failure", bound=StorageError)

_OWNED: Final = (VERSION, CREATED_AT, UPDATED_AT)


def typed(value: object) -> object:
    """A representation of a value whose `==` distinguishes types, signed zeros and all float bits.

    Python's own `==` treats 1, 1.0 and True as equal, and 0.0 and -0.0.
    """
    if isinstance(value, float):
        return "float", value.hex()
    if isinstance(value, dict):
        return "dict", {typed(name): typed(each) for name, each in value.items()}
    if isinstance(value, list):
        return "list", [typed(each) for each in value]
    return type(value).__name__, value


def payload(entity: Mapping[str, object] | None) -> dict[str, object] | None:
    """An entity without the fields that the store adds: version and timestamps."""
    if entity is None:
        return None
    return {name: each for name, each in entity.items() if name not in _OWNED}


async def get_existing(store: RepositoryInterface, collection: str, entity_id: str) -> Entity:
    """The entity; asserts that it exists."""
    entity = await store.get_entity(collection, entity_id)
    assert entity is not None, f"{collection} {entity_id!r} does not exist"
    return entity


async def payloads(
    store: RepositoryInterface, collection: str, ids: Iterable[str]
) -> dict[str, dict[str, object] | None]:
    """The entities by id, without version and timestamps; None for a missing entity."""
    listed = list(ids)
    entities = await store.get_entities(collection, listed)
    return {each: payload(entity) for each, entity in zip(listed, entities, strict=True)}


async def counted(store: StorageStrategy, collection: str, expected: int) -> int:
    """The number of entities; on an engine with eventually consistent queries, asked repeatedly until
    it is the expected one (see `answer_of`)."""
    return await answer_of(store.capabilities, lambda: store.count_entities(collection), expected)


def refused_at_once(call: Coroutine[Any, Any, object], error: type[Failure]) -> Failure:
    """The error that a verb raises for its arguments. It must do so before its first await.

    A coroutine that has not suspended has not waited for I/O, and no other task has run meanwhile.
    """
    try:
        call.send(None)
    except error as exc:
        return exc
    except StopIteration as stop:
        raise AssertionError(f"the call was accepted and returned {stop.value!r}") from None
    finally:
        call.close()
    raise AssertionError("the call suspended instead of refusing its arguments")


def all_refused_at_once(error: type[StorageError], *calls: Coroutine[Any, Any, object]) -> None:
    """Assert that each call is `refused_at_once`; the failure message names the verbs that are not."""
    wrong: list[str] = []
    for call in calls:
        verb = getattr(call, "__name__", "stream step")
        try:
            refused_at_once(call, error)
        except (AssertionError, StorageError) as exc:
            wrong.append(f"{verb}: {type(exc).__name__}: {exc}")
    assert not wrong, f"not refused by {error.__name__}: {wrong}"


def done_at_once(call: Coroutine[Any, Any, object]) -> None:
    """Assert that a coroutine completes without suspending."""
    try:
        call.send(None)
    except StopIteration:
        return
    finally:
        call.close()
    raise AssertionError("the coroutine suspended")


class _LoopErrors(logging.Handler):
    """Collects the errors that asyncio only logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)  # a slow callback is logged as a warning
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(self.format(record))


@contextmanager
def no_complaints() -> Iterator[None]:
    """Assert that asyncio logs no errors: no pending task destroyed, no exception that was never
    retrieved, no client session left unclosed."""
    errors = _LoopErrors()
    logger = logging.getLogger("asyncio")
    logger.addHandler(errors)
    try:
        yield
        gc.collect(1)  # most are logged when a task is freed; all generations would take longer
    finally:
        logger.removeHandler(errors)
    assert errors.messages == []


async def nothing_is_left(harness: Harness) -> None:
    """Assert that closed stores have released everything: no task is running, and nothing leaked."""
    gc.collect(1)  # all generations would take longer than most cases
    for _ in range(3):  # the loop closes an abandoned iterator in a separate task
        await asyncio.sleep(0)
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    assert not tasks, f"tasks are still running: {tasks}"
    assert harness.leaks() == []
