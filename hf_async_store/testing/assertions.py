"""What the cases compare with: type for type, and before any I/O."""

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
    """A form of a value whose `==` knows types, the sign of zero and every bit of a float.

    Python's own says that 1, 1.0 and True are one, and 0.0 and -0.0.
    """
    if isinstance(value, float):
        return "float", value.hex()
    if isinstance(value, dict):
        return "dict", {typed(name): typed(each) for name, each in value.items()}
    if isinstance(value, list):
        return "list", [typed(each) for each in value]
    return type(value).__name__, value


def payload(entity: Mapping[str, object] | None) -> dict[str, object] | None:
    """An entity without what the store adds: version and timestamps."""
    if entity is None:
        return None
    return {name: each for name, each in entity.items() if name not in _OWNED}


async def get_existing(store: RepositoryInterface, collection: str, entity_id: str) -> Entity:
    """The entity, which must be there."""
    entity = await store.get_entity(collection, entity_id)
    assert entity is not None, f"{collection} {entity_id!r} is not there"
    return entity


async def payloads(
    store: RepositoryInterface, collection: str, ids: Iterable[str]
) -> dict[str, dict[str, object] | None]:
    """By id, what is there without version and timestamps."""
    listed = list(ids)
    entities = await store.get_entities(collection, listed)
    return {each: payload(entity) for each, entity in zip(listed, entities, strict=True)}


async def counted(store: StorageStrategy, collection: str, expected: int) -> int:
    """How many entities there are; where queries may be behind, the last of several looks."""
    return await answer_of(store.capabilities, lambda: store.count_entities(collection), expected)


def refused_at_once(call: Coroutine[Any, Any, object], error: type[Failure]) -> Failure:
    """The error by which a verb refuses what it was given: before its first await.

    A verb that has not suspended has not waited for any device, and no other task saw anything.
    """
    try:
        call.send(None)
    except error as exc:
        return exc
    except StopIteration as stop:
        raise AssertionError(f"accepted, with the result {stop.value!r}") from None
    finally:
        call.close()
    raise AssertionError("it went on to the engine instead of refusing")


def all_refused_at_once(error: type[StorageError], *calls: Coroutine[Any, Any, object]) -> None:
    """Assert that each call is `refused_at_once`; what is wrong names the verb."""
    wrong: list[str] = []
    for call in calls:
        verb = getattr(call, "__name__", "a step of a stream")
        try:
            refused_at_once(call, error)
        except (AssertionError, StorageError) as exc:
            wrong.append(f"{verb}: {type(exc).__name__}: {exc}")
    assert not wrong, f"not refused by {error.__name__}: {wrong}"


def done_at_once(call: Coroutine[Any, Any, object]) -> None:
    """Assert that a coroutine ends without ever suspending."""
    try:
        call.send(None)
    except StopIteration:
        return
    finally:
        call.close()
    raise AssertionError("it suspended")


class _Complaints(logging.Handler):
    """Gathers what the event loop reports to nobody in particular."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)  # that a step was slow is a warning
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(self.format(record))


@contextmanager
def no_complaints() -> Iterator[None]:
    """Assert that the event loop reports nothing: no task destroyed while it waits, no exception
    that nobody retrieved, no client session that was not closed."""
    complaints = _Complaints()
    logger = logging.getLogger("asyncio")
    logger.addHandler(complaints)
    try:
        yield
        gc.collect(1)  # most of it is noticed when the task goes; all generations would take longer
    finally:
        logger.removeHandler(complaints)
    assert complaints.told == []


async def nothing_is_left(harness: Harness) -> None:
    """Assert that stores that were closed hold nothing any more: no task, and no leak."""
    gc.collect(1)  # all generations would take longer than most cases
    for _ in range(3):  # an abandoned iterator is closed by the loop, in a task of its own
        await asyncio.sleep(0)
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    assert not tasks, f"tasks are still running: {tasks}"
    assert harness.leaks() == []
