"""Processes that use one store at the same time.

`run_workers` starts them as `python -m hf_async_store.testing.process_workers`, and keeps them for the
next case, because starting one takes up to half a second. A worker reads a job from stdin, opens its
store, prints `ready`, reads a line, so that all workers begin together, runs its role, and prints the
result as one line of JSON. It ends at the end of stdin. Each role is one function below.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

from msgspec import to_builtins

from hf_async_store.errors import (
    AlreadyExistsError,
    ConcurrencyConflictError,
    EventLoopMismatchError,
    UniqueViolationError,
)
from hf_async_store.field_operations import append, increment
from hf_async_store.query import path
from hf_async_store.strategies import open_store
from hf_async_store.testing.concurrent_workloads import TOTAL, count_up, total, transfer
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS
from hf_async_store.testing.history_recorder import ActRecorder, TxnRecorder
from hf_async_store.testing.rollout_programs import apply, program

if TYPE_CHECKING:
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.values import Entity

Role: TypeAlias = Callable[..., Awaitable[object]]
Work: TypeAlias = "tuple[str, Mapping[str, object]]"
"""The name of a role, and its arguments."""

HANG_SECONDS: Final = 120.0
"""A worker that is not done after this time is considered to hang."""

# -- roles ----------------------------------------------------------------------------------


async def save_many(store: StorageStrategy, *, prefix: str, times: int) -> list[int]:
    """Save `times` new items, one after another; returns their versions."""
    return [
        await store.save_entity("items", {"item_id": f"{prefix}-{number}", "count": number})
        for number in range(times)
    ]


async def create_race(store: StorageStrategy, *, name: str, ids: Sequence[str]) -> list[str]:
    """Try to create every item; returns the ids that this worker created."""
    won = []
    for each in ids:
        try:
            await store.create_entity("items", {"item_id": each, "label": name})
        except AlreadyExistsError:
            continue
        won.append(each)
    return won


async def unique_race(
    store: StorageStrategy, *, name: str, rounds: Sequence[int], tasks: int
) -> list[tuple[str, str]]:
    """In each round, try to create an item with the label of the round, in several tasks at once.

    Returns the labels and ids that this worker created.
    """
    won = []
    for number in rounds:
        label = f"v{number}"
        ids = [f"{name}-{number}-{each}" for each in range(tasks)]
        created = await asyncio.gather(
            *(store.create_entity("items", {"item_id": each, "label": label}) for each in ids),
            return_exceptions=True,
        )
        for entity_id, outcome in zip(ids, created, strict=True):
            if not isinstance(outcome, BaseException):
                won.append((label, entity_id))
            elif not isinstance(outcome, UniqueViolationError):
                raise outcome
    return won


async def cas_counter(store: StorageStrategy, *, counter_id: str, times: int) -> list[int]:
    """Add 1 to `n` of a counter `times` times; returns the versions that this produced."""

    def increment(entity: Entity) -> Entity:
        n = entity["n"]
        assert isinstance(n, int)
        return {**entity, "n": n + 1}

    return [await store.modify_entity("counters", counter_id, increment) for _ in range(times)]


async def operations(store: StorageStrategy, *, counter_id: str, times: int) -> list[int]:
    """As `cas_counter`, by field operations; the versions in any order."""
    return [
        await store.update_entity("counters", counter_id, {"n": increment(1)}) for _ in range(times)
    ]


async def take_matching(store: StorageStrategy, *, name: str, verb: str, limit: int) -> int:
    """Update or delete pending counters, a few at a time, until there are none; returns how many."""
    pending = {path("state"): "PENDING"}
    total = 0
    while True:
        if verb == "delete":
            done = await store.delete_where("counters", pending, limit=limit)
        else:
            change = {"state": "RUNNING", "by": append(name)}
            done = await store.update_where("counters", pending, change, limit=limit)
        total += done
        if not done:
            return total


async def version_race(
    store: StorageStrategy, *, counter_id: str, rounds: int, writers: int
) -> list[int]:
    """Update from the stored version with several concurrent tasks, until it exceeds `rounds`.

    Returns the versions that the tasks of this worker produced.
    """
    won: list[int] = []
    while True:
        counter = await store.get_entity("counters", counter_id)
        assert counter is not None
        version = counter["version"]
        assert isinstance(version, int)
        if version > rounds:
            return won
        won += await winners(store, counter_id, version, writers)


async def first_use(store: StorageStrategy, *, name: str) -> object:
    """Use a new store at the same time as other workers; returns the written entity."""
    await store.create_entity("items", {"item_id": name, "data": {"by": name}})
    # `run_transaction` retries: concurrent first uses may conflict with one another.
    await store.run_transaction(lambda tx: tx.update_entity("items", name, {"label": "twice"}))
    return await store.get_entity("items", name)


async def transfers(store: StorageStrategy, *, seed: int, times: int) -> None:
    """Move amounts between the accounts, and check the total after each transfer."""
    random = Random(seed)
    for _ in range(times):
        await transfer(store, random, 1)
        assert await store.run_transaction(total) == TOTAL


async def increments(store: StorageStrategy, *, seed: int, counter_id: str, times: int) -> None:
    """Add 1 to a counter `times` times, in all the ways of `count_up`."""
    await count_up(store, Random(seed), counter_id, times)


async def single_keys(
    store: StorageStrategy, *, seed: int, caller: str, keys: Sequence[str], steps: int, tasks: int
) -> object:
    """Run several callers of single operations; returns their history, as `consistency_checkers.Act`s."""
    callers = [ActRecorder(store, Random(seed + n), f"{caller}.{n}") for n in range(tasks)]
    histories = await asyncio.gather(*(each.run(keys, steps) for each in callers))
    return to_builtins([each for history in histories for each in history])


async def transactions(
    store: StorageStrategy, *, seed: int, caller: str, keys: Sequence[str], steps: int, tasks: int
) -> object:
    """Run several callers of transactions; returns their history, as `consistency_checkers.Txn`s."""
    callers = [TxnRecorder(store, Random(seed + n), f"{caller}.{n}") for n in range(tasks)]
    histories = await asyncio.gather(*(each.run(keys, steps) for each in callers))
    return to_builtins([each for history in histories for each in history])


async def fork(store: StorageStrategy, *, name: str) -> dict[str, object]:
    """Use the store before a fork, in two ways in the child, and in the parent after the fork."""
    await store.save_entity("items", {"item_id": name})
    child = os.fork()
    if not child:
        _run_child(store, name)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    version = await store.save_entity("items", {"item_id": name})
    failed = _FORK_STEPS[os.waitstatus_to_exitcode(status)]
    return {"not refused in the child": failed, "version in the parent": version}


_FORK_STEPS: Final = (None, "the verb that follows the fork", "a verb in a new event loop")


def _run_child(store: StorageStrategy, entity_id: str) -> NoReturn:
    """Check that the child cannot use the store, and end it with `os._exit`.

    `os._exit` runs no cleanup: the child must not close connections and files of the parent. The exit
    code is the index in `_FORK_STEPS` of the step that was not refused.
    """
    step = 1
    try:
        store.get_entity("items", entity_id).send(None)
    except EventLoopMismatchError:
        step = 2
        with suppress(EventLoopMismatchError):
            asyncio.run(_get(store, entity_id))
            os._exit(step)
        step = 0
    finally:
        os._exit(step)


async def _get(store: StorageStrategy, entity_id: str) -> None:
    await store.get_entity("items", entity_id)


ROLES: Final[Mapping[str, Role]] = {
    "apply": apply,
    "cas-counter": cas_counter,
    "create-race": create_race,
    "unique-race": unique_race,
    "first-use": first_use,
    "fork": fork,
    "increments": increments,
    "operations": operations,
    "program": program,
    "save-many": save_many,
    "single-keys": single_keys,
    "take-matching": take_matching,
    "transactions": transactions,
    "transfers": transfers,
    "version-race": version_race,
}


async def winners(store: StorageStrategy, counter_id: str, version: int, writers: int) -> list[int]:
    """Update a counter with several concurrent writers; returns the versions of those that succeeded."""
    writes = (
        store.update_entity("counters", counter_id, {"by": number}, expected_version=version)
        for number in range(writers)
    )
    won = []
    for result in await asyncio.gather(*writes, return_exceptions=True):
        if isinstance(result, int):
            won.append(result)
        elif not isinstance(result, ConcurrencyConflictError):
            raise result
    return won


# -- the process ----------------------------------------------------------------------------


async def _run_job(role: str, url: str, arguments: Mapping[str, Any]) -> None:
    async with open_store(url, collections=CONTRACT_COLLECTIONS) as store:
        _print("ready")
        sys.stdin.readline()  # blocks the event loop, in which nothing else runs yet
        result = await ROLES[role](store, **arguments)
    # Printed after the store was closed: the reported writes are acknowledged.
    _print(json.dumps(result))


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


# -- in the process of the test -------------------------------------------------------------


class _Worker:
    """One worker process; its methods block."""

    def __init__(self) -> None:
        self._errors = TemporaryFile()  # noqa: SIM115  # closed by `stop`
        self._process = subprocess.Popen(  # noqa: S603  # this very module
            (sys.executable, "-m", __name__),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: str) -> str:
        """Write a line; returns the next line of the worker.

        Raises:
            AssertionError: the worker ended; the message contains its stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._errors.seek(0)
            raise AssertionError(f"a worker failed:\n{self._errors.read().decode()}")
        return answer.decode().strip()

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


_IDLE: Final[list[_Worker]] = []
"""The workers that wait for their next job."""

_THREADS: Final = ThreadPoolExecutor(8, thread_name_prefix="workers")
"""Not those of the event loop, which the store under test uses."""


@atexit.register
def _stop_idle_workers() -> None:
    while _IDLE:
        _IDLE.pop().stop()


async def run_workers(url: str, *works: Work) -> list[Any]:
    """Run each item of `works` in a separate process, all beginning together; returns the results.

    Raises:
        AssertionError: a worker failed; the message contains its stderr.
    """
    workers: list[_Worker] = []
    try:
        while len(workers) < len(works):
            worker = _IDLE.pop() if _IDLE else _Worker()
            if worker.is_running:
                workers.append(worker)
            else:
                worker.stop()
        async with asyncio.timeout(HANG_SECONDS):
            here = [str(Path.cwd()), dict(os.environ)]  # a test may have changed them
            jobs = [json.dumps([*here, role, url, arguments]) for role, arguments in works]
            assert set(await _ask_all(workers, jobs)) == {"ready"}
            results = await _ask_all(workers, ["go"] * len(workers))
    except BaseException:
        for each in workers:
            each.stop()
        raise
    _IDLE.extend(workers)
    return [json.loads(each) for each in results]


async def _ask_all(workers: Sequence[_Worker], lines: Sequence[str]) -> list[str]:
    loop = asyncio.get_running_loop()
    asked = (
        loop.run_in_executor(_THREADS, worker.ask, line)
        for worker, line in zip(workers, lines, strict=True)
    )
    return await asyncio.gather(*asked)


if __name__ == "__main__":
    for job in iter(sys.stdin.readline, ""):
        directory, environment, *work = json.loads(job)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        asyncio.run(_run_job(*work))
