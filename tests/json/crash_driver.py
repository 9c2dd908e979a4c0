"""Kills a process at every file call of a workload, and checks the files that remain.

    python -m tests.json.crash_driver '{"folder": ..., "workload": ..., "layout": ...}'

It is a separate program because it forks: it has one thread, has imported all modules, and runs every
workload and every check in a child process. First, an undisturbed run to the end counts the file
calls. The program prints a line of JSON: that number, the calls at which a process was killed, and the
errors that were found.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec

from hf_async_store import (
    HOST_FACTORY,
    Collection,
    JSONStorageStrategy,
    StorageStrategy,
    open_store,
)
from hf_async_store.errors import CorruptionError, DataFileConflictError, StorageError
from hf_async_store.strategies.json import compaction as folding
from hf_async_store.strategies.json import kept_journals
from hf_async_store.strategies.json.journal import HEADER_SIZE, Kind, record
from hf_async_store.values import Entity, Key
from tests.json.support import (
    WHOLE,
    Call,
    FileCalls,
    Stored,
    abandon,
    data_files,
    journals,
    open_json,
    parsed,
    reopened,
    temporary,
    whole,
    without_times,
)


class Spec(msgspec.Struct, frozen=True):
    """One sweep.

    Attributes:
        folder: each kill uses a separate store below this folder.
        workload: a name in `WORKLOADS`, or "crowd".
        settings: the settings of the store.
        adopt: "file" or "journal": the workload resolves the conflict with a file that was replaced
            manually. "salvage": it recovers a journal that ends with a record whose content was
            never written.
        lane, lanes: this process runs every kill whose number is `lane` modulo `lanes`.
        readers: of the stores of this process, every `readers`-th is read by another process while it
            is written; 0: none. A process that closes the store while another one reads does not
            compact it, and so makes fewer calls; a kill at a call that is missing for this reason is
            repeated without a reader.
        feed: the collections have a change feed, which must contain every change.
    """

    folder: str
    workload: str
    layout: str
    settings: dict[str, Any] = {}
    adopt: Literal["file", "journal", "salvage"] | None = None
    lane: int = 0
    lanes: int = 1
    readers: int = 0
    feed: bool = False

    @property
    def collections(self) -> list[Collection]:
        return [_fed(each) for each in HOST_FACTORY] if self.feed else [*HOST_FACTORY]

    @property
    def positions(self) -> Path:
        """The file with the first position in each feed, which the preparation writes."""
        return Path(self.folder, "positions")


def _fed(each: Collection) -> Collection:
    fields = [field for field in each.fields.values() if field.name != each.key]
    return Collection(each.name, key=each.key, fields=fields, indexes=each.indexes, feed=3600)


Step: TypeAlias = "Callable[[StorageStrategy], Awaitable[object]]"


class Fault:
    """Makes the next sync of a journal fail, in the child that runs a workload."""

    armed = False


# -- workloads --------------------------------------------------------------------------------


async def checkpoint(store: StorageStrategy) -> None:
    if isinstance(store, JSONStorageStrategy):  # the memory engine has no compaction
        await store.checkpoint()


async def _templates(store: StorageStrategy) -> None:
    await store.save_entity("templates", {"template_id": "t1", "name": "a" * 300})


async def _requests(store: StorageStrategy) -> None:
    rows = [{"request_id": f"r{n}", "template_id": "t1", "status": "é"} for n in range(1, 4)]
    await store.save_entities("requests", rows)


async def _three_files(store: StorageStrategy) -> None:
    async with store.begin_transaction() as tx:
        await tx.update_entity("templates", "t1", {"name": "b"})
        await tx.save_entity("requests", {"request_id": "r4", "template_id": "t1"})
        await tx.save_entities(
            "machines", [{"machine_id": f"m{n}", "request_id": "r4"} for n in range(1, 3)]
        )


async def _update(store: StorageStrategy) -> None:
    await store.update_entity("requests", "r1", {"status": "DONE", "tags": {"x": [1, 1.0]}})


async def _savepoint(store: StorageStrategy) -> None:
    async with store.begin_transaction() as tx:
        await tx.delete_entity("machines", "m1")
        try:
            async with tx.begin_transaction() as inner:
                await inner.save_entity("machines", {"machine_id": "never"})
                raise KeyError
        except KeyError:
            pass
        await tx.update_entity("requests", "r2", {"status": "HALF"})


async def _delete(store: StorageStrategy) -> None:
    await store.delete_entity("requests", "r3")


async def _many(store: StorageStrategy) -> None:
    rows = [{"machine_id": f"b{n}", "request_id": "r1", "name": "n" * n} for n in range(12)]
    await store.save_entities("machines", rows)


async def _save_again(store: StorageStrategy) -> None:
    await store.save_entity("templates", {"template_id": "t2"})


async def _failed_sync(store: StorageStrategy) -> None:
    Fault.armed = isinstance(store, JSONStorageStrategy)
    try:
        await store.update_entity("templates", "t1", {"name": "not synced"})
    except StorageError as exc:
        if not exc.outcome_unknown:
            raise
    if Fault.armed:
        raise AssertionError("the sync did not fail")


_SCRIPT: Final[list[Step]] = [
    _templates,
    _requests,
    _three_files,
    checkpoint,
    _update,
    _savepoint,
    _delete,
    checkpoint,
    _many,
    checkpoint,
    _save_again,
]
WORKLOADS: Final[dict[str, list[Step]]] = {
    "script": _SCRIPT,
    "failed sync": [_templates, _requests, checkpoint, _three_files, _failed_sync, _update, _many],
    "take over": [_update, checkpoint, _delete],
    "adopt": [],
    "crowd": [],
}

_TASKS: Final = 3
_ROUNDS: Final = 5


async def _concurrent_tasks(store: JSONStorageStrategy, acks: int) -> None:
    """Concurrent tasks whose commits are batched, with compactions in between."""

    async def one(task: int) -> None:
        for number in range(1, _ROUNDS + 1):
            async with store.begin_transaction() as tx:
                await tx.save_entity("templates", {"template_id": f"x{task}", "name": str(number)})
                await tx.save_entity("machines", {"machine_id": f"x{task}", "name": str(number)})
            os.write(acks, bytes([task]))
            await store.save_entity("requests", {"request_id": f"x{task}", "status": str(number)})
            os.write(acks, bytes([task + _TASKS]))

    async def folds() -> None:
        for _ in range(3):
            await store.checkpoint()
            await asyncio.sleep(0)

    await asyncio.gather(folds(), *(one(task) for task in range(_TASKS)))


def crowd_problems(found: Stored, acks: bytes) -> list[str]:
    """Acknowledged changes that are missing, and changes that are only partly visible."""
    problems = []
    for task in range(_TASKS):
        pair = [found[name].get(f"x{task}", {}) for name in ("templates", "machines", "requests")]
        versions = [each.get("version", 0) for each in pair]
        acked = [acks.count(bytes([task])), acks.count(bytes([task + _TASKS]))]
        whole_pair = versions[0] == versions[1] and pair[0].get("name") == pair[1].get("name")
        if (
            not whole_pair
            or versions[0] not in (acked[0], acked[0] + 1)
            or versions[2] not in (acked[1], acked[1] + 1)
        ):
            problems.append(f"task {task}: {versions}, acknowledged {acked}")
    return problems


async def model(steps: list[Step], start: Stored) -> list[Stored]:
    """The expected contents after each number of steps, computed with the memory engine."""
    async with open_store("memory:") as store:
        for name, entities in start.items():
            await store.import_entities(name, entities.values())
        states = [await _shown(store)]
        for step in steps:
            await step(store)
            states.append(await _shown(store))
    return [without_times(each) for each in states]


async def _shown(store: StorageStrategy) -> Stored:
    return {
        name: {str(each[declared.key]): each for each in await store.query_entities(name)}
        for name, declared in store.collections.items()
    }


# -- the store before the workload ------------------------------------------------------------


async def prepare(spec: Spec, folder: Path) -> None:
    """Create the initial store, if the workload needs one."""
    if spec.feed:
        async with open_json(folder, spec.layout, collections=spec.collections) as store:
            names = [*store.collections]
            positions = {each: await store._json.feed_position(each) for each in names}
        spec.positions.write_text(json.dumps(positions))
    if spec.workload not in ("take over", "adopt"):
        return
    settings = {name: each for name, each in spec.settings.items() if name != "enable_compression"}
    if spec.workload == "adopt":
        settings = spec.settings
    async with open_json(folder, spec.layout, **settings) as store:
        for step in (_templates, _requests, _three_files):
            await step(store)
    if spec.workload == "adopt":
        store = await open_json(folder, spec.layout, **spec.settings).open()
        await _update(store)
        await _save_again(store)
        await abandon(store)
        if spec.adopt == "salvage":
            [journal] = journals(folder)
            torn = record(Kind.COMMIT, b'{"templates":{}}', 3)
            journal.write_bytes(journal.read_bytes() + torn[:HEADER_SIZE] + b"\0" * 16)
            return
        for each in data_files(folder):
            text = each.read_bytes()
            each.write_bytes(text.replace(b'"name":"b"', b'"name":"by hand"'))


# -- the child that is killed -----------------------------------------------------------------


def run_child(spec: Spec, folder: Path, kill_at: int, *, part: bool, acks: int) -> int:
    """Run the workload and kill this process at a call: before it, or in the middle of its write.

    Returns:
        The number of calls, if the workload completed.
    """
    # On a slow machine a compaction of the idle store would change the numbers of all later calls.
    folding._IDLE_SECONDS = sys.maxsize
    kept_journals._MERGED = 2  # so that they are merged

    def hook(call: Call, size: int) -> int:
        if call.number == kill_at + part:
            os.kill(os.getpid(), signal.SIGKILL)
        if Fault.armed and call.name == "fdatasync" and ".journal." in call.path:
            Fault.armed = False
            raise OSError(errno.EIO, "the device says no")
        return size // 2 if part and call.number == kill_at and size > 1 else WHOLE

    async def work() -> None:
        store = open_json(folder, spec.layout, collections=spec.collections, **spec.settings)
        async with store:
            if spec.adopt:
                await store.checkpoint(recover_from=spec.adopt)
                os.write(acks, b".")
            if spec.workload == "crowd":
                await _concurrent_tasks(store, acks)
            for step in WORKLOADS[spec.workload]:
                await step(store)
                os.write(acks, b".")

    with FileCalls(folder, hook) as calls:
        asyncio.run(work())
    return calls.count


# -- checks after the kill --------------------------------------------------------------------


async def check_after_kill(spec: Spec, folder: Path, states: list[Stored], acks: bytes) -> None:
    """Check that all acknowledged changes exist, that no other is visible in part, and that the store is
    usable."""
    acked = len(acks)
    for each in data_files(folder):
        parsed(each)
    if spec.adopt:
        await _resolve_conflict(spec, folder, acked)
    first = await reopened(folder, spec.layout, **spec.settings)
    if spec.workload == "crowd":
        assert not crowd_problems(first, acks), crowd_problems(first, acks)
    elif without_times(first) not in (allowed := states[acked : acked + 2]):
        raise AssertionError(f"after {acked} steps there is {first}, not one of {allowed}")
    second = await reopened(folder, spec.layout, **spec.settings)
    assert second == first, f"a second read returned {second}, the first {first}"
    if spec.feed:
        await _check_feed(spec, folder, first)
    await _check_usable(spec, folder, first)


async def _check_feed(spec: Spec, folder: Path, stored: Stored) -> None:
    """Check that the changes in the feed lead to the content of the store, without a gap."""
    store = await open_json(folder, spec.layout, collections=spec.collections).open()
    try:
        for name, position in json.loads(spec.positions.read_text()).items():
            replayed: dict[str, Entity] = {}
            while (batch := await store._json.read_feed(name, position, 3)).entries:
                for each in batch.entries:
                    before = None if each.before is None else each.before.entity
                    assert replayed.pop(each.key.id, None) == before, f"a gap before {each}"
                    if each.after is not None:
                        replayed[each.key.id] = each.after.entity
                position = batch.position
            assert replayed == stored[name], f"the feed leads to {replayed}, not {stored[name]}"
    finally:
        await abandon(store)


async def _resolve_conflict(spec: Spec, folder: Path, acked: int) -> None:
    """Check that a killed adoption is complete, or that the conflict is still reported."""
    try:
        await reopened(folder, spec.layout, **spec.settings)
    except (DataFileConflictError, CorruptionError):
        assert not acked, "the adoption was acknowledged, but the conflict is still reported"
        async with open_json(folder, spec.layout, **spec.settings) as store:
            await store.checkpoint(recover_from=spec.adopt)


async def _check_usable(spec: Spec, folder: Path, before: Stored) -> None:
    async with open_json(folder, spec.layout, **spec.settings) as store:
        await store.save_entity("templates", {"template_id": "after"})
        async with store.begin_transaction() as tx:
            await tx.save_entity("machines", {"machine_id": "after"})
            await tx.update_entity("templates", "after", {"name": "x"})
        if spec.settings.get("update_files") != "after each commit":
            await store.checkpoint()
        now = await whole(store)
        assert now["templates"].pop("after")["version"] == 2
        assert now["machines"].pop("after")["version"] == 1
        assert now == before, f"after going on there is {now}, not {before}"
        assert not temporary(folder), f"left behind: {temporary(folder)}"
        assert len(journals(folder)) == 1, f"left behind: {journals(folder)}"
        assert len(store.backups()) <= 5 * (1 if spec.layout == "single_file" else 3)
    files = data_files(folder)
    text = {each.name.partition(".")[0]: parsed(each) for each in files}
    at_rest = text["request_database"] if spec.layout == "single_file" else text
    assert at_rest["templates"]["after"]["version"] == 2
    assert {name: set(each) for name, each in at_rest.items()} == {
        name: {*each} | ({"after"} if name != "requests" else set())
        for name, each in before.items()
        if each or name != "requests" or spec.layout == "single_file"
    }


# -- a concurrent reader ----------------------------------------------------------------------


async def read_concurrently(spec: Spec, folder: Path, states: list[Stored], stop: int) -> None:
    """Read the whole store repeatedly: each time one of the valid states, and never an older one."""
    keys = [Key(name, each) for name in states[-1] for each in _values_of(states, name)]
    os.set_blocking(stop, False)
    store = await open_json(folder, spec.layout, **spec.settings).open()
    at = 0
    try:
        while _is_running(stop):
            records = await store._fetch(keys, None)
            shown: Stored = {name: {} for name in states[0]}
            for record in records:
                if record is not None:
                    shown[record.key.collection][record.key.id] = record.entity
            at = _index_of_state(without_times(shown), states, at)
            await asyncio.sleep(0)
    finally:
        await abandon(store)


def _values_of(states: list[Stored], name: str) -> list[str]:
    return sorted({each for state in states for each in state[name]})


def _index_of_state(shown: Stored, states: list[Stored], at: int) -> int:
    for number in range(at, len(states)):
        if states[number] == shown:
            return number
    past = [number for number in range(at) if states[number] == shown]
    raise AssertionError(f"a reader at {at} saw {past or shown}")


def _is_running(stop: int) -> bool:
    try:
        return os.read(stop, 1) != b""
    except BlockingIOError:
        return True


# -- the driver -------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a child process that reports errors through a pipe; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        work()
    except BaseException as exc:
        print(f"{type(exc).__name__}: {exc}"[:3000], file=sys.stderr, flush=True)
        code = 1
    os._exit(code)


class ErrorPipe:
    """A pipe for the errors of a child process."""

    def __init__(self) -> None:
        self.out, self.into = os.pipe()

    def run(self, work: Callable[[], object], *unwanted: int) -> int:
        def told() -> None:
            os.dup2(self.into, 2)
            for fd in (self.out, *unwanted):
                os.close(fd)
            work()

        pid = in_child(told)
        os.close(self.into)
        return pid

    def text(self) -> str:
        with os.fdopen(self.out, "rb") as pipe:
            return pipe.read().decode(errors="replace").strip()


def kill_once(
    spec: Spec, folder: Path, states: list[Stored], kill_at: int, *, part: bool, reader: bool
) -> tuple[bool, list[str]]:
    """Whether the workload was killed before its end, and the errors that were found."""
    problems: list[str] = []
    stop_out, stop_in = os.pipe()
    watching = ErrorPipe()
    watcher = -1
    if reader:
        watcher = watching.run(
            lambda: asyncio.run(read_concurrently(spec, folder, states, stop_out)), stop_in
        )
    else:
        os.close(watching.into)
    out, into = os.pipe()
    running = ErrorPipe()
    pid = running.run(
        lambda: run_child(spec, folder, kill_at, part=part, acks=into), out, stop_in, stop_out
    )
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        acks = pipe.read()
    status = os.waitpid(pid, 0)[1]
    said = running.text()
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status:
        problems.append(f"the workload failed: {said}")
    looking = ErrorPipe()
    pid = looking.run(
        lambda: asyncio.run(check_after_kill(spec, folder, states, acks)), stop_in, stop_out
    )
    said = looking.text()
    if os.waitpid(pid, 0)[1]:
        problems.append(f"after {len(acks)} steps: {said}")
    os.close(stop_in)
    os.close(stop_out)
    said = watching.text()
    if reader and os.waitpid(watcher, 0)[1]:
        problems.append(f"reader: {said}")
    return killed, problems


def sweep(spec: Spec) -> dict[str, object]:
    base = Path(spec.folder)
    base.mkdir(parents=True, exist_ok=True)
    gc.freeze()
    begun = base / "begun"
    begun.mkdir()
    start: Stored = {}
    if spec.feed or spec.workload in ("take over", "adopt"):
        assert not os.waitpid(in_child(lambda: asyncio.run(prepare(spec, begun))), 0)[1]
    if spec.workload in ("take over", "adopt"):
        start = _start(spec, begun)
    states = asyncio.run(model(WORKLOADS[spec.workload], start))
    if spec.adopt:
        states = [states[0], states[0]]
    problems: list[str] = []

    def kill(kill_at: int, *, part: bool, reader: bool) -> bool:
        folder = base / f"{kill_at}{'p' if part else ''}{'r' if reader else ''}"
        if start or spec.feed:
            shutil.copytree(begun, folder)
        killed, found = kill_once(spec, folder, states, kill_at, part=part, reader=reader)
        problems.extend(f"{folder.name}: {each}" for each in found)
        if not found:
            shutil.rmtree(folder, ignore_errors=True)
        return killed

    steps = None if spec.workload == "crowd" else _steps(spec, base / "whole", begun)
    killed: list[int] = []
    for kill_at in itertools.count(spec.lane, spec.lanes):
        if (steps is not None and kill_at >= steps) or len(problems) >= 10:
            break
        reader = bool(spec.readers) and len(killed) % spec.readers == 0
        if not kill(kill_at, part=False, reader=reader) and not (
            reader and kill(kill_at, part=False, reader=False)
        ):
            break
        killed.append(kill_at)
        kill(kill_at, part=True, reader=False)
    return {"steps": steps, "killed": killed, "problems": problems}


def _steps(spec: Spec, folder: Path, begun: Path) -> int:
    """The number of calls of the workload if no other process uses the store."""
    shutil.copytree(begun, folder)
    out, into = os.pipe()

    def run() -> None:
        with open(os.devnull, "wb") as acks:  # only its descriptor is needed
            steps = run_child(spec, folder, sys.maxsize, part=False, acks=acks.fileno())
        os.write(into, str(steps).encode())

    pid = in_child(run)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        steps = int(pipe.read())
    assert not os.waitpid(pid, 0)[1]
    shutil.rmtree(folder)
    return steps


def _start(spec: Spec, folder: Path) -> Stored:
    """The contents of the prepared store, read with a plain JSON parser, after the chosen adoption."""
    text = {each.name.partition(".")[0]: parsed(each) for each in data_files(folder)}
    text = text["request_database"] if spec.layout == "single_file" else text
    stored: Stored = {name: text[name] for name in ("templates", "requests", "machines")}
    if spec.adopt in ("journal", "salvage"):
        # The journal is adopted: its two commits are applied to the file.
        stored["requests"]["r1"] |= {"status": "DONE", "tags": {"x": [1, 1.0]}, "version": 2}
        stored["templates"]["t2"] = {"template_id": "t2", "version": 1}
    return stored


def main() -> None:
    spec = msgspec.json.decode(sys.argv[1], type=Spec)
    print(json.dumps(sweep(spec)), flush=True)


if __name__ == "__main__":
    main()
