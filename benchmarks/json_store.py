"""Measures the JSON store on this machine, beside the least code that does the same work.

    python benchmarks/json_store.py [--quick] [--only NAME ...] [--json FILE]

Prints a table and writes a JSON file. The sides of a comparison take turns in one run, so hold on
to the ratios: absolute figures move from machine to machine.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
from floors import RewritingStore
from holds import IDLE, longest_holds
from measure import (
    Figure,
    Hold,
    alternate,
    arguments,
    ratios,
    reported,
    seconds,
    watched_loop,
)
from stores import (
    ENTITY_BYTES,
    NEVER,
    Entity,
    Stores,
    encode,
    generation,
    machine,
    machine_id,
    opened,
    request,
    rewrite_as_ours,
    write_foreign,
)

from hf_async_store.bench.floors.journal import BareGroupCommit, BareJournal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence

    from hf_async_store import JSONStorageStrategy

_HERE: Final = Path(__file__).parent
_RESULTS: Final = _HERE / "results" / "json_store.json"
_TASKS: Final = 64
_SIZE: Final = 10_000
_PROCESSES: Final = 4
_COMPILING: Final = frozenset({"PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"})


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is done."""

    sizes: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)
    rounds: int = 9
    saves: int = 100
    saves_at_once: int = 150
    fold_saves: int = 3000
    fold_rounds: int = 3
    gets: int = 20_000
    runs: int = 25
    memory_runs: int = 3
    hold_runs: int = 5
    process_seconds: float = 4.0


_QUICK: Final = Settings(
    sizes=(1000, 10_000, 100_000),
    rounds=5,
    saves=60,
    saves_at_once=75,
    fold_saves=1000,
    gets=10_000,
    runs=15,
    memory_runs=1,
    hold_runs=3,
    process_seconds=1.5,
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every row is given."""

    settings: Settings
    stores: Stores


Row: TypeAlias = "Callable[[Bench], Coroutine[None, None, list[Figure]]]"


# -- saves ----------------------------------------------------------------------------------


async def sizes(bench: Bench) -> list[Figure]:
    """One save at a time in stores of several sizes, all open at once and taking turns."""
    sizes = bench.settings.sizes
    async with AsyncExitStack() as stack:
        stores = []
        for size in sizes:
            path = await bench.stores.copy(size)
            stack.callback(bench.stores.remove, path)
            store = await stack.enter_async_context(opened(path, write_buffer_size=NEVER))
            await store.save_entity("machines", machine(0))
            stores.append((size, store))
        rounds = [await _save_round(stores, bench) for _ in range(bench.settings.rounds + 1)][1:]
    medians = list(zip(*rounds, strict=True))
    return [
        figure
        for size, samples in zip(sizes, medians, strict=True)
        for figure in _size_figures(size, samples, medians[0])
    ]


async def _save_round(
    stores: Sequence[tuple[int, JSONStorageStrategy]], bench: Bench
) -> list[float]:
    """The median of one save in each store."""
    samples: list[list[float]] = [[] for _ in stores]
    turns = list(zip(stores, samples, strict=True))
    for _ in range(bench.settings.saves):
        random.shuffle(turns)
        for (size, store), times in turns:
            entity = machine(random.randrange(size))
            times.append(await seconds(store.save_entity("machines", entity)))
    return list(map(statistics.median, samples))


def _size_figures(size: int, samples: Sequence[float], first: Sequence[float]) -> Iterator[Figure]:
    yield Figure("sizes", f"one save at {size:,} machines", _scaled(samples, 1000), "ms")
    if samples is not first:
        what = f"one save at {size:,} machines against the smallest store"
        yield Figure("sizes", what, ratios(samples, first), "x", at_most=1.5)


async def fold(bench: Bench) -> list[Figure]:
    """What folding adds to a save: with it and without, and as a share at other sizes."""
    figures = [figure for size in bench.settings.sizes for figure in await _fold_share(size, bench)]
    return figures + await _with_folds(bench)


async def _fold_share(size: int, bench: Bench) -> list[Figure]:
    """One fold, and its part in each of the saves that it takes until the next is due."""
    path = await bench.stores.copy(size)
    times = []
    async with opened(path, write_buffer_size=NEVER) as store:
        for number in range(3):
            await store.save_entity("machines", machine(number))
            times.append(await seconds(store.checkpoint()))
    # Due when the journal outgrows write_buffer_size and a quarter of the file.
    saves = max(64_000, path.stat().st_size / 4) / (ENTITY_BYTES + 80)
    bench.stores.remove(path)
    what = f"one fold at {size:,} machines"
    return [
        Figure("fold", what, _scaled(times, 1000), "ms"),
        Figure(
            "fold",
            f"the same, a save's part of it ({saves:,.0f} saves a fold)",
            [each / saves * 1e6 for each in times],
            "us",
        ),
    ]


async def _with_folds(bench: Bench) -> list[Figure]:
    count = bench.settings.fold_saves
    plain, folding = [await bench.stores.copy(_SIZE) for _ in range(2)]
    before = generation(folding)
    async with opened(folding) as store, opened(plain, write_buffer_size=NEVER) as unfolded:
        with_folds, without = await alternate(
            bench.settings.fold_rounds,
            lambda: _save_rate(store, count),
            lambda: _save_rate(unfolded, count),
        )
        folds = generation(folding) - before
    bench.stores.remove(plain, folding)
    done = (bench.settings.fold_rounds + 1) * count
    what = f"one at a time at {_SIZE:,}, {folds} folds in {done:,} saves"
    return [
        Figure("fold", what, with_folds, "saves/s"),
        Figure("fold", "the same without folds", without, "saves/s"),
        Figure("fold", "with against without", ratios(with_folds, without), "x"),
    ]


async def _save_rate(store: JSONStorageStrategy, count: int) -> float:
    entities = _some_machines()
    started = time.perf_counter()
    for entity in itertools.islice(entities, count):
        await store.save_entity("machines", entity)
    return count / (time.perf_counter() - started)


async def single(bench: Bench) -> list[Figure]:
    """One save at a time, against one append and one fdatasync through one worker thread."""
    path = await bench.stores.copy(_SIZE)
    count = bench.settings.saves * 3
    lines = [encode(each) for each in _some_machines()]
    floor = BareJournal(path.with_name("floor"))

    async def bare() -> float:
        started = time.perf_counter()
        for line in lines[:count]:
            await floor.append(line)
        return count / (time.perf_counter() - started)

    with closing(floor):
        async with opened(path, write_buffer_size=NEVER) as store:
            ours, bares = await alternate(
                bench.settings.rounds, lambda: _save_rate(store, count), bare
            )
    bench.stores.remove(path)
    return [
        Figure("single", "one at a time", ours, "saves/s"),
        Figure("single", "bare append and fdatasync, one at a time", bares, "saves/s"),
        Figure("single", "against bare append and sync", ratios(ours, bares), "x", at_least=0.6),
    ]


async def together(bench: Bench) -> list[Figure]:
    """64 tasks that save at once, against a hand-written group commit."""
    count = bench.settings.saves_at_once
    paths = [await bench.stores.copy(_SIZE) for _ in range(2)]
    lines = itertools.cycle([encode(each) for each in _some_machines()])
    entities = itertools.cycle(_some_machines())
    floor = BareGroupCommit(paths[0].with_name("floor"))

    async def rate(save: Callable[[], Awaitable[object]]) -> float:
        async def saving() -> None:
            for _ in range(count):
                await save()

        took = await seconds(asyncio.gather(*(saving() for _ in range(_TASKS))))
        return _TASKS * count / took

    with closing(floor):
        async with opened(paths[0], write_buffer_size=NEVER) as store, opened(paths[1]) as folding:
            ours, with_folds, bares = await alternate(
                bench.settings.rounds,
                lambda: rate(lambda: store.save_entity("machines", next(entities))),
                lambda: rate(lambda: folding.save_entity("machines", next(entities))),
                lambda: rate(lambda: floor.save(next(lines))),
            )
    bench.stores.remove(*paths)
    return [
        Figure("together", f"{_TASKS} tasks at once", ours, "saves/s"),
        Figure("together", "the same with folds going on", with_folds, "saves/s"),
        Figure("together", f"bare group commit, {_TASKS} tasks at once", bares, "saves/s"),
        Figure("together", "against bare group commit", ratios(ours, bares), "x", at_least=0.25),
        Figure(
            "together",
            "with folds, against bare group commit",
            ratios(with_folds, bares),
            "x",
            at_least=0.25,
        ),
    ]


async def rewriting(bench: Bench) -> list[Figure]:
    """Against a store that writes its whole file at every save."""
    path = await bench.stores.copy(_SIZE)
    floor = RewritingStore(
        path.with_name("rewriting.json"), {machine_id(each): machine(each) for each in range(_SIZE)}
    )

    async def rewrites() -> float:
        took = [await seconds(floor.save(machine(number))) for number in range(5)]
        return len(took) / sum(took)

    with closing(floor):
        async with opened(path) as store:
            ours, whole = await alternate(
                bench.settings.rounds, lambda: _save_rate(store, bench.settings.saves), rewrites
            )
    bench.stores.remove(path)
    return [
        Figure("rewriting", f"one at a time at {_SIZE:,} machines", ours, "saves/s"),
        Figure("rewriting", "a store that rewrites its file at every save", whole, "saves/s"),
        Figure("rewriting", "against it", ratios(ours, whole), "x"),
    ]


async def burst(bench: Bench) -> list[Figure]:
    """1,000 machines and their request in one transaction."""
    path = await bench.stores.copy(_SIZE)
    floor = BareJournal(path.with_name("floor"))
    numbers = itertools.count(100)

    async def ours() -> float:
        number = next(numbers)
        machines = list(map(machine, range(number * 1000, number * 1000 + 1000)))
        return await seconds(_acquire(store, request(number), machines))

    async def bare() -> float:
        entities = list(map(machine, range(1000)))
        started = time.perf_counter()
        await floor.append(b"\n".join(map(encode, entities)))
        return time.perf_counter() - started

    with closing(floor):
        async with opened(path, write_buffer_size=NEVER) as store:
            took, bares = await alternate(bench.settings.rounds * 2, ours, bare)
    bench.stores.remove(path)
    return [
        Figure("burst", "a request and its 1,000 machines, one commit", _scaled(took, 1000), "ms"),
        Figure("burst", "encoding them, one append, one fdatasync", _scaled(bares, 1000), "ms"),
        Figure("burst", "against it", ratios(took, bares), "x"),
    ]


async def _acquire(store: JSONStorageStrategy, asked: Entity, machines: list[Entity]) -> None:
    async with store.begin_transaction() as tx:
        await tx.create_entity("requests", asked)
        await tx.create_entities("machines", machines)


async def processes(bench: Bench) -> list[Figure]:
    """Several processes that save into one store, 64 tasks each."""
    many, one = [], []
    for _ in range(3):
        many.append(await _processes(_PROCESSES, bench))
        one.append(await _processes(1, bench))
    return [
        Figure("processes", f"{_PROCESSES} processes, {_TASKS} tasks each", many, "saves/s"),
        Figure("processes", f"1 process, {_TASKS} tasks", one, "saves/s"),
    ]


async def _processes(count: int, bench: Bench) -> float:
    path = await bench.stores.copy(_SIZE)
    length = str(bench.settings.process_seconds)
    children = [_child("save", path, length, str(_TASKS), str(each)) for each in range(count)]
    for each in children:
        _line_from(each)
    for each in children:
        print("go", file=each.stdin, flush=True)
    results = [json.loads(_line_from(each)) for each in children]
    for each in children:
        each.communicate()
    bench.stores.remove(path)
    return float(sum(each["saves"] / each["seconds"] for each in results))


# -- reads ----------------------------------------------------------------------------------


async def gets(bench: Bench) -> list[Figure]:
    """Single reads by id."""
    path = await bench.stores.copy(_SIZE)
    count = bench.settings.gets
    ids = [machine_id(random.randrange(_SIZE)) for _ in range(count)]
    texts = {machine_id(each): encode(machine(each)) for each in range(_SIZE)}

    async def reading(part: Iterable[str]) -> None:
        for each in part:
            await store.get_entity("machines", each)

    async def one() -> float:
        return count / await seconds(reading(ids))

    async def many() -> float:
        parts = (reading(ids[number::_TASKS]) for number in range(_TASKS))
        return count / await seconds(asyncio.gather(*parts))

    async def decodes() -> float:
        decode = msgspec.json.Decoder().decode
        started = time.perf_counter()
        for each in ids:
            decode(texts[each])
        return count / (time.perf_counter() - started)

    async with opened(path) as store:
        ones, manies, bares = await alternate(bench.settings.rounds, one, many, decodes)
    bench.stores.remove(path)
    return [
        Figure("gets", "one task", ones, "gets/s", at_least=100_000),
        Figure("gets", f"{_TASKS} tasks", manies, "gets/s"),
        Figure("gets", "a dict and msgspec, no store and no await", bares, "gets/s"),
    ]


async def command(bench: Bench) -> list[Figure]:
    """A whole process that shows one entity, against one that only starts asyncio."""
    path = await bench.stores.copy(_SIZE)
    get = ["-m", "hf_async_store", "get", "machines", machine_id(5000), "--store", f"json:{path}"]
    nothing = ["-c", "import asyncio; asyncio.run(asyncio.sleep(0))"]
    ours, bares = _Command(get, bench), _Command(nothing, bench)
    took, bare = await alternate(bench.settings.runs, ours.run, bares.run)
    megabytes = path.stat().st_size / 1e6
    bench.stores.remove(path)
    return [
        Figure("command", f"get of one entity from {megabytes:.1f} MB", _scaled(took, 1000), "ms"),
        Figure("command", "asyncio.run of nothing", _scaled(bare, 1000), "ms"),
        Figure(
            "command",
            "get of one, against asyncio.run of nothing",
            ratios(took, bare),
            "x",
            at_most=2.5,
        ),
        Figure("command", "against it, processor time", ratios(ours.used[1:], bares.used[1:]), "x"),
    ]


class _Command:
    """A process of its own, compiled as an installed package is; the warm-up does that."""

    def __init__(self, arguments: Sequence[str], bench: Bench) -> None:
        self.used: list[float] = []
        self._command = [sys.executable, *arguments]
        self._environment = {
            **{name: value for name, value in os.environ.items() if name not in _COMPILING},
            "PYTHONPYCACHEPREFIX": str(bench.stores.folder / "compiled"),
        }

    async def run(self) -> float:
        before = _used_by_children()
        started = time.perf_counter()
        subprocess.run(self._command, check=True, stdout=subprocess.DEVNULL, env=self._environment)
        took = time.perf_counter() - started
        self.used.append(_used_by_children() - before)
        return took


def _used_by_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


async def opening(bench: Bench) -> list[Figure]:
    """Opening a store and its first get, against decoding the same file."""
    path = bench.stores.new_folder("field") / "request_database.json"
    origin = write_foreign(path, _SIZE)
    figures = await _opening(path, f"{origin}, a foreign file", bench)
    await rewrite_as_ours(path)
    figures += await _opening(path, f"{origin}, as this package wrote it", bench)
    bench.stores.remove(path)
    return figures


async def _opening(path: Path, what: str, bench: Bench) -> list[Figure]:
    async def ours() -> float:
        store = opened(path)
        started = time.perf_counter()
        await store.open()
        assert await store.get_entity("machines", machine_id(_SIZE // 2))
        took = time.perf_counter() - started
        await store.close()
        return took

    async def decode() -> float:
        started = time.perf_counter()
        whole = msgspec.json.decode(path.read_bytes())
        took = time.perf_counter() - started
        del whole
        return took

    async def hold() -> float:
        async with watched_loop() as watched:
            await ours()
        return watched.wall

    opens, decodes = await alternate(bench.settings.rounds, ours, decode)
    (holds,) = await alternate(bench.settings.hold_runs, hold)
    megabytes = path.stat().st_size / 1e6
    return [
        Figure("opening", f"{what}, {megabytes:.1f} MB", _scaled(opens, 1000), "ms"),
        Figure("opening", "reading and decoding it", _scaled(decodes, 1000), "ms"),
        Figure("opening", f"{what}, against decoding", ratios(opens, decodes), "x", at_most=1.0),
        Figure("opening", "the longest hold of the loop meanwhile", _scaled(holds, 1000), "ms"),
    ]


# -- memory and the loop --------------------------------------------------------------------


async def memory(bench: Bench) -> list[Figure]:
    """How a fresh process grows when it opens 100,000 machines and builds every index."""
    path = await bench.stores.copy(100_000)
    size = path.stat().st_size
    children = [_child("memory", path) for _ in range(bench.settings.memory_runs)]
    grown = [json.loads(each.communicate()[0]) for each in children]
    bench.stores.remove(path)
    opened_, indexed = ([each[key] / size for each in grown] for key in ("opened", "indexed"))
    what = f"opened {size / 1e6:.1f} MB of {ENTITY_BYTES} bytes each, against the file"
    return [
        Figure("memory", what, opened_, "x"),
        Figure("memory", "opened, every index built, against the file", indexed, "x", at_most=3.0),
    ]


async def hold(bench: Bench) -> list[Figure]:
    """The longest hold of the event loop while 100,000 machines are worked on."""
    holds = await longest_holds(bench.stores, bench.settings.hold_runs)
    return [_hold_figure(what, found) for what, found in holds.items()]


def _hold_figure(what: str, found: Sequence[Hold]) -> Figure:
    return Figure(
        "hold",
        what,
        [each.wall * 1000 for each in found],
        "ms",
        at_most=None if what == IDLE else 20.0,
        beside={
            "computing": statistics.median([each.processor * 1000 for each in found]),
            "collector": statistics.median([each.collector * 1000 for each in found]),
        },
    )


# -- small parts ----------------------------------------------------------------------------


def _some_machines() -> list[Entity]:
    """Machines that a store of 10,000 has already, in no order."""
    return [machine(random.randrange(_SIZE)) for _ in range(_SIZE)]


def _scaled(samples: Iterable[float], factor: float) -> list[float]:
    return [each * factor for each in samples]


def _child(what: str, path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(_HERE / "children.py"), what, str(path), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _line_from(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None, "it was asked for"
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"{child.args!r} ended with {child.wait()}")
    return line


_ROWS: Final[dict[str, Row]] = {
    each.__name__: each
    for each in (
        sizes,
        fold,
        together,
        single,
        gets,
        rewriting,
        command,
        opening,
        memory,
        hold,
        burst,
        processes,
    )
}


def measured(names: Iterable[str], settings: Settings, folder: Path) -> list[Figure]:
    bench = Bench(settings, Stores(folder))
    figures: list[Figure] = []
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        gc.collect()
        figures += asyncio.run(_ROWS[name](bench))
    return figures


def main() -> None:
    options = arguments("Measures the JSON store on this machine.", _ROWS, _RESULTS).parse_args()
    settings = _QUICK if options.quick else Settings()
    with reported(options, settings) as (folder, figures):
        figures += measured(options.only, settings, folder)


if __name__ == "__main__":
    main()
