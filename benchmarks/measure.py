"""Measuring: figures with their targets, sides that take turns, and the holds of an event loop.

What every script of an engine here has in common, so that `hf-async-store bench` can read it into
its report (`--figures FILE`): it takes `--quick`, `--json FILE` and `--folder DIR`, and writes its
file by `reported`. A figure with a target becomes a row of the report; one without is context.
A ratio to a floor is a figure of its own, in "x", so that the target is held against the ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hf_async_store.bench.floors.journal import sync_data

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Collection,
        Iterator,
        Mapping,
        Sequence,
    )

_PACKAGES: Final = ("hf_async_store", "msgspec", "aiofiles")
_SYNCS: Final = 200


# -- figures --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report: a median, its range, and what it should be.

    Attributes:
        row: the name by which `--only` knows what it belongs to.
        samples: one value a round.
        at_least, at_most: the target, if there is one; it is held against the median.
        beside: what helps to read it, by name, in the same unit; medians.
    """

    row: str
    what: str
    samples: Sequence[float]
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f"at least {shown(self.at_least)}"
        return "" if self.at_most is None else f"at most {shown(self.at_most)}"

    @property
    def met(self) -> bool | None:
        """None where there is no target."""
        if self.at_least is not None:
            return self.median >= self.at_least
        return None if self.at_most is None else self.median <= self.at_most

    def as_json(self) -> dict[str, object]:
        return {
            "row": self.row,
            "what": self.what,
            "median": self.median,
            "low": min(self.samples),
            "high": max(self.samples),
            "unit": self.unit,
            "rounds": len(self.samples),
            "target": self.target or None,
            "met": self.met,
            "beside": dict(self.beside),
        }

    def as_cells(self) -> tuple[str, ...]:
        low, high = shown(min(self.samples)), shown(max(self.samples))
        return (
            self.row,
            self.what,
            f"{shown(self.median)} {self.unit}",
            "" if low == high else f"{low} .. {high}",
            self.target,
            {True: "met", False: "MISSED", None: ""}[self.met],
            ", ".join(f"{name} {shown(value)}" for name, value in self.beside.items()),
        )


def shown(value: float) -> str:
    """Three digits that count, and never an exponent."""
    if value >= 1000:
        return f"{value:,.0f}"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def print_table(figures: Sequence[Figure]) -> None:
    heads = ("row", "what", "median", "range", "target", "", "beside")
    lines = [heads, *(each.as_cells() for each in figures)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = {2, 3}
    for line in lines:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


# -- a run ----------------------------------------------------------------------------------


def arguments(about: str, rows: Collection[str], results: Path) -> argparse.ArgumentParser:
    """What every script takes.

    Args:
        about: what it measures.
        rows: the names that `--only` chooses from.
        results: where it writes unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="less of everything, fewer rounds")
    parser.add_argument("--only", nargs="+", choices=rows, default=list(rows), metavar="NAME")
    parser.add_argument("--json", type=Path, default=results, metavar="FILE")
    parser.add_argument("--folder", type=Path, help="where the stores lie, on the disk to measure")
    return parser


@contextmanager
def reported(
    options: argparse.Namespace, settings: Any, packages: Sequence[str] = ()
) -> Iterator[tuple[Path, list[Figure]]]:
    """A folder to measure in, and the list of the figures: printed and written at the end.

    Args:
        settings: of the run, a dataclass.
        packages: whose versions count, beside the usual ones.
    """
    started = time.perf_counter()
    before = os.getloadavg()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="hf-async-store-", dir=options.folder) as folder:
        facts: dict[str, object] = {
            "machine": machine_facts(Path(folder)),
            "versions": {
                "python": sys.version.split()[0],
                **{each: version(each) for each in (*_PACKAGES, *packages)},
            },
            "settings": {"quick": options.quick, "rows": options.only, **asdict(settings)},
        }
        yield Path(folder), figures
    after = os.getloadavg()
    facts["load"] = {"before": before, "after": after}
    facts["seconds"] = round(time.perf_counter() - started, 1)
    print_table(figures)
    # Others at work make everything slower, and not all of it alike.
    print(f"\nload {before[0]:.1f} before, {after[0]:.1f} after, on {os.cpu_count()} cores")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report = {**facts, "figures": [each.as_json() for each in figures]}
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    missed = sum(each.met is False for each in figures)
    print(f"{missed} targets missed; {facts['seconds']} s; written to {options.json}")


# -- what it was measured on ----------------------------------------------------------------


def machine_facts(folder: Path) -> dict[str, object]:
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "fdatasync_ms": round(statistics.median(_sync_times(folder)) * 1000, 3),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _sync_times(folder: Path) -> list[float]:
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_SYNCS):
            started = time.perf_counter()
            os.write(file.fileno(), b"x" * 350)
            sync_data(file.fileno())
            times.append(time.perf_counter() - started)
    return times


# -- sides that take turns ------------------------------------------------------------------


async def alternate(rounds: int, *sides: Callable[[], Awaitable[float]]) -> tuple[list[float], ...]:
    """What each side gives in each round, A B A B: the noise of the machine hits all alike.

    One more round goes before, to warm up; it does not count.
    """
    found: tuple[list[float], ...] = tuple([] for _ in sides)
    for number in range(rounds + 1):
        for samples, side in zip(found, sides, strict=True):
            value = await side()
            if number:
                samples.append(value)
    return found


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Round by round."""
    return [each / other for each, other in zip(of, to, strict=True)]


async def seconds(work: Awaitable[object]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


# -- holds of the loop ----------------------------------------------------------------------

_TICK: Final = 0.001


@dataclass(slots=True)
class Hold:
    """The longest time in seconds for which the event loop did not come round.

    Attributes:
        wall: between two ticks, as whoever else runs in the loop sees it. A tick is 1 ms, so an
            idle loop shows a little more than that.
        processor: what the loop's own thread computed in one such gap: where it is much less than
            `wall`, the loop waited, for the machine or for another thread.
        collector: the longest single run of the garbage collector, which `wall` includes.
    """

    wall: float = 0.0
    processor: float = 0.0
    collector: float = 0.0


@asynccontextmanager
async def watched_loop() -> AsyncIterator[Hold]:
    """Watches the running loop; the figures are right once the context is left."""
    hold = Hold()
    ticker = asyncio.get_running_loop().create_task(_tick(hold))
    with _watched_collector(hold):
        await asyncio.sleep(2 * _TICK)
        try:
            yield hold
        finally:
            # What held the loop last shows in the tick that comes after it.
            await asyncio.sleep(2 * _TICK)
            ticker.cancel()


async def _tick(hold: Hold) -> None:
    wall, processor = time.perf_counter(), time.thread_time()
    while True:
        await asyncio.sleep(_TICK)
        now, used = time.perf_counter(), time.thread_time()
        hold.wall = max(hold.wall, now - wall)
        hold.processor = max(hold.processor, used - processor)
        wall, processor = now, used


@contextmanager
def _watched_collector(hold: Hold) -> Iterator[None]:
    started = 0.0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal started
        if phase == "start":
            started = time.perf_counter()
        else:
            hold.collector = max(hold.collector, time.perf_counter() - started)

    gc.callbacks.append(note)
    try:
        yield
    finally:
        gc.callbacks.remove(note)
