"""What needs more than one operation again and again: memory, the event loop, opening, backups."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

import hf_async_store as hfas
from hf_async_store import JSONStorageStrategy, StorageStrategy, open_store
from hf_async_store.migration import backup_store
from hf_async_store_bench import data, systems
from hf_async_store_bench.adapters import StoreAdapter
from hf_async_store_bench.concurrency import alternate, side_by_side
from hf_async_store_bench.csv_rows import rows_beside
from hf_async_store_bench.demo.data import json_url
from hf_async_store_bench.environments import Environments
from hf_async_store_bench.messages import Measurement, Plan, WrongAnswerError
from hf_async_store_bench.queries import BULK_LOADS, querying
from hf_async_store_bench.resource_usage import forget_peak, peak_bytes, resident_bytes
from hf_async_store_bench.statistics import ratios


class Scenario(NamedTuple):
    """One of them, on a filled store of a system.

    Attributes:
        sizes: machines that are stored; of two sizes, what counts is the larger in parts of the smaller.
        seconds: what it takes on a slow machine; less time than that, and it is skipped.
        runs: how often, each in a new process.
    """

    system: str
    summary: str
    sizes: tuple[int, ...]
    measure: Callable[[Plan], Awaitable[list[Measurement]]]
    seconds: float
    writes: bool = False
    runs: int = 1


async def seconds(work: Awaitable[object]) -> float:
    gc.collect()
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


@asynccontextmanager
async def watched_loop() -> AsyncIterator[list[tuple[float, float]]]:
    """The times in seconds between the ticks of a task that wakes each millisecond, and how much of them
    this thread computed: the longest is that for which other tasks could not run."""
    ticks: list[tuple[float, float]] = []

    async def tick() -> None:
        last, used = time.perf_counter(), time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now, more = time.perf_counter(), time.thread_time()
            ticks.append((now - last, more - used))
            last, used = now, more

    gc.collect()
    ticker = asyncio.get_running_loop().create_task(tick())
    await asyncio.sleep(0.002)
    try:
        yield ticks
    finally:
        # What held the loop last shows in the tick that comes after it.
        await asyncio.sleep(0.002)
        ticker.cancel()


async def memory(plan: Plan) -> list[Measurement]:
    """How this process grows by opening the store, and by building every declared index."""
    file = _data_file(plan).stat().st_size
    before = resident_bytes()
    async with open_store(plan.environment.url) as store:
        assert await store.get_entity("machines", data.machine_id(0))
        opened = resident_bytes()
        for collection in hfas.HOST_FACTORY:
            for index in collection.indexes:
                filters = {hfas.path(index.field): "PENDING"}  # whatever its type
                await store.query_entities(collection.name, filters, limit=1)
        indexed = resident_bytes()
    grown, full = ([(each - before) / file] for each in (opened, indexed))
    every = "opened, every index built, against the file"
    first = Measurement("opened, against the file", grown, "x")
    return [first, Measurement(every, full, "x", at_most=3.0)]


async def migration_memory(plan: Plan) -> list[Measurement]:
    """The peak of this process above what it holds with the store open."""
    folder = Path(plan.environment.folder)
    async with open_store(plan.environment.url) as store:

        async def peak(work: Awaitable[object]) -> float:
            await store.query_page("machines", limit=1)  # as an open store holds them: in order
            before = resident_bytes()
            forget_peak()
            await work
            return (peak_bytes() - before) / 1e6

        entities = plan.load.entities
        into = f"sqlite:{folder}/migrated.db"
        async with open_store(into) as target:
            migrated = await peak(migrate(store, target, folder, entities, verify=True))
        backed_up = await peak(backup_store(store, folder / "backup.jsonl.gz"))
    return [
        Measurement("JSON to SQLite: peak", [migrated], "MB", at_most=1.2),
        Measurement("a backup of JSON: peak", [backed_up], "MB", at_most=1.2),
    ]


async def opening(plan: Plan) -> list[Measurement]:
    """Opening a file and its first get, against decoding the same file."""
    path = Path(plan.environment.folder) / "found.json"
    origin = "generated machines of 1,000 bytes"
    machines = {data.machine_id(each): data.machine(each, size=1000) for each in range(10_000)}
    path.write_text(json.dumps({"templates": {}, "requests": {}, "machines": machines}, indent=2))
    figures = await _opening(path, f"{origin}, a foreign file")
    async with JSONStorageStrategy(json_url(path)) as store:
        await store.save_entity("templates", {"template_id": "t-1"})
        await store.checkpoint()
    return figures + await _opening(path, f"{origin}, as the store wrote it")


async def _opening(path: Path, what: str) -> list[Measurement]:
    async def first_get(store: StorageStrategy) -> None:
        await store.open()
        assert await store.get_entity("machines", data.machine_id(5000))

    async def decoded() -> object:
        return msgspec.json.decode(path.read_bytes())

    async def ours() -> float:
        store = open_store(json_url(path))
        took = await seconds(first_get(store))
        await store.close()
        return took

    took, bare = await alternate(5, ours, lambda: seconds(decoded()))
    against = f"{what}, against decoding it"
    return [
        Measurement(what, [each * 1000 for each in took], "ms"),
        Measurement(against, ratios(took, bare), "x", at_most=1.0),
    ]


Work: TypeAlias = Callable[[JSONStorageStrategy], Awaitable[object]]
_ADDED: Final = 10_000
_IDS: Final = [data.machine_id(number) for number in range(_ADDED)]
_FILTER: Final = {"instance_type": hfas.gt("m5.large")}


async def event_loop(plan: Plan) -> list[Measurement]:
    """The longest time for which each kind of work keeps all other tasks from running."""
    found: list[Measurement] = []

    async def watch(what: str, work: Work) -> None:
        async with watched_loop() as ticks:
            result = await work(store)
        # Only now: freeing what a caller was given is the caller's own time.
        del result
        bound = None if what == "nothing" else 20.0
        found.append(Measurement(what, [max(ticks)[0] * 1000], "ms", at_most=bound))

    size = plan.load.entities
    batch = _new_machines(size, _ADDED)
    acquired = _new_machines(size + _ADDED, 1000)
    path = _data_file(plan)
    store, other = (JSONStorageStrategy(json_url(path)) for _ in range(2))

    async def acquire(store: JSONStorageStrategy) -> None:
        await StoreAdapter(store).acquire(data.request(size), acquired)

    async def stream(store: JSONStorageStrategy) -> None:
        async for _ in store.stream_entities("machines", None, "name"):
            pass

    await watch("nothing", lambda _: asyncio.sleep(1))
    await watch("open and first get", _open)
    await watch("one save", lambda s: s.save_entity("machines", data.machine(0)))
    await watch("batch of 10,000 creates", lambda s: s.create_entities("machines", batch))
    await watch("transaction of 1,000 creates", acquire)
    await watch("query by index, which is built first", _by_request)
    await watch("query by index", _by_request)
    await watch("count with a filter", lambda s: s.count_entities("machines", _FILTER))
    await watch("full scan with order_by", lambda s: s.query_entities("machines", None, "name"))
    await watch("stream with order_by, nothing kept", stream)
    await watch("four sorted pages of 1,000", _walk)
    await watch("get_entities of 10,000", lambda s: s.get_entities("machines", _IDS))
    await watch("checkpoint", lambda s: s.checkpoint())
    await watch("read_file", lambda s: s.read_file())
    whole = await store.read_file()
    await _open(other)
    await watch("write_file, all machines changed", lambda s: s.write_file(_changed(whole, "A")))
    async with store.snapshot():
        await watch("the same with a snapshot open", lambda s: s.write_file(_changed(whole, "B")))
    await watch("another store follows that", lambda _: other.get_entity("machines", _IDS[0]))
    await watch("checkpoint of all that", lambda s: s.checkpoint())
    await other.close()
    await store.close()
    return found


def _new_machines(start: int, count: int) -> list[data.Entity]:
    shared = {"request_id": data.request_id(0)}
    return [{**data.machine(each), **shared} for each in range(start, start + count)]


def _changed(whole: Any, status: str) -> Any:
    for each in whole["machines"].values():
        each["status"] = status
    return whole


async def _open(store: JSONStorageStrategy) -> object:
    await store.open()
    return await store.get_entity("machines", data.machine_id(0))


async def _by_request(store: JSONStorageStrategy) -> object:
    return await store.query_entities("machines", {"request_id": data.request_id(50)})


async def _walk(store: JSONStorageStrategy) -> object:
    pages = [await store.query_page("machines", None, "name", 1000)]
    while len(pages) < 4:
        cursor = pages[-1].cursor
        pages.append(await store.query_page("machines", None, "name", 1000, cursor=cursor))
    return pages


async def soak(plan: Plan) -> list[Measurement]:
    """The pauses of the event loop while tasks do everything at once, at a moderate rate, for as long as
    the plan says: also opening a second store, whose indexes are built."""
    until = time.perf_counter() + plan.seconds
    choose, machines = random.Random(plan.seed).randrange, plan.load.entities
    collections: list[float] = []

    def collected(phase: str, info: object) -> None:
        started = 0.0 if phase == "start" else collections.pop()
        collections.append(time.thread_time() - started)

    async def repeat(pause: float, work: Callable[[], Awaitable[object]]) -> None:
        while time.perf_counter() < until:
            await asyncio.sleep(pause)
            await work()

    def asked() -> dict[str, str]:
        return {"request_id": data.request_id(choose(machines // data.MACHINES_OF_A_REQUEST))}

    def one() -> data.Entity:
        return data.machine(choose(machines))

    async def other() -> None:
        async with open_store(plan.environment.url) as second:
            await second.query_entities("machines", asked())

    thousands = [[one() for _ in range(1000)] for _ in range(10)]  # to make them takes 4 ms
    async with open_store(plan.environment.url) as store:
        newest = partial(store.query_entities, "machines", {"status": "PENDING"}, "-created_at", 50)
        work: list[tuple[float, Callable[[], Awaitable[object]]]] = [
            *[(0.005, lambda: store.save_entity("machines", one()))] * 5,
            *[(0.005, lambda: store.get_entity("machines", one()["machine_id"]))] * 5,
            (0.05, lambda: store.query_entities("machines", asked())),
            (0.05, newest),
            (0.5, lambda: store.save_entities("machines", thousands[choose(10)])),
            (2.0, other),
        ]
        await other()
        async with watched_loop() as ticks:
            gc.freeze()  # as docs/tuning.md recommends to a service
            gc.callbacks.append(collected)
            await side_by_side(lambda each: repeat(*each), work)
        gc.callbacks.remove(collected)
    others = {"the longest pause, computing": max(each for _, each in ticks)}
    others["the longest collection, computing"] = max(collections, default=0.0)
    found = [Measurement(what, [each * 1000], "ms") for what, each in others.items()]
    return [Measurement("the longest pause", [max(ticks)[0] * 1000], "ms", at_most=20.0), *found]


async def migrating(plan: Plan) -> list[Measurement]:
    """Migrating from JSON, without backup and verification, against the bulk load of the batched
    baseline: executemany or COPY of everything, in one transaction."""
    name = plan.system.name
    count = 10_000 if name == "dynamodb" else 100_000
    machines = [data.machine(each) for each in range(count)]
    with Environments.beside(plan.system, plan.environment) as more:
        source = f"json:{more.folder}/source.json"
        async with open_store(source) as store:
            await StoreAdapter(store).fill(machines)

        async def ours() -> float:
            into = more.make(plan.system)
            async with open_store(source) as one, open_store(into.url) as other:
                await one.query_page("machines", limit=1)
                await other.query_page("machines", limit=1)
                took = await seconds(migrate(one, other, Path(into.folder), count, verify=False))
            more.remove(plan.system, into)
            return count / took

        async def bulk() -> float:
            into = more.make(baseline)
            adapter = await baseline.load().open(into)
            # One machine of each request, so that everything that the others refer to is there.
            few = enumerate(machines[:: data.MACHINES_OF_A_REQUEST])
            await adapter.fill([{**each, "machine_id": f"{place}"} for place, each in few])
            took = await seconds(adapter.import_many(machines))
            await adapter.close()
            more.remove(baseline, into)
            return count / took

        what, unit = f"{count:,} machines", "machines a second"
        if name not in BULK_LOADS:
            (rates,) = await alternate(2, ours)
            return [Measurement(what, rates, unit)]
        baseline = systems.named(BULK_LOADS[name])
        rates, bare = await alternate(2, ours, bulk)
    against = f"{what}, against a bulk load: {baseline.name}"
    return [
        Measurement(what, rates, unit),
        Measurement(against, ratios(rates, bare), "x", at_least=_BULK_SHARE[name]),
    ]


_BULK_SHARE: Final = {"sqlite": 0.6, "postgresql": 0.9}  # of the bulk load by hand


async def migrate(
    source: StorageStrategy, target: StorageStrategy, folder: Path, machines: int, *, verify: bool
) -> None:
    """Copy all of it, and look at what the tool says."""
    backups = {"create_backup": False, "backup_location": f"{folder}/backups/"}
    config = {"validate_after_migration": verify, **backups}
    async with hfas.MigrationTool(source, target, config) as tool:
        report = await tool.migrate()
    copied = report.collections["machines"].written
    if (verify and not report.verified) or copied != machines:
        raise WrongAnswerError(f"{copied:,} of {machines:,} machines were copied")


async def backing_up(plan: Plan) -> list[Measurement]:
    """A backup, against compressing the same bytes into a file."""
    folder = Path(plan.environment.folder)
    path = folder / "backup.jsonl.gz"
    async with open_store(plan.environment.url) as store:
        await store.query_page("machines", limit=1)
        await backup_store(store, path)
        text = gzip.decompress(path.read_bytes())
        path.unlink()
        backup = await seconds(backup_store(store, path))
    plain = await seconds(asyncio.to_thread(_compress, text, folder / "plain.gz"))
    against = "against zlib over the same bytes"
    return [
        Measurement(f"{len(text) / 1e6:.0f} MB of text", [backup], "s"),
        Measurement(against, [plain / backup], "x", at_least=0.3),
    ]


def _compress(text: bytes, path: Path) -> None:
    with path.open("wb") as file:
        file.write(gzip.compress(text, 6))
        file.flush()
        os.fsync(file.fileno())


def _data_file(plan: Plan) -> Path:
    return Path(plan.environment.folder) / "request_database.json"


def _scenario(row: dict[str, str]) -> Scenario:
    sizes = tuple(map(int, row["sizes"].split()))
    work = {"querying": querying, **globals()}[row["measure"]]
    how = (float(row["seconds"]), row.get("writes") == "true", int(row["runs"]))
    return Scenario(row["system"], row["summary"], sizes, work, *how)


SCENARIOS: Final = {each["name"]: _scenario(each) for each in rows_beside(__file__, dict[str, str])}
