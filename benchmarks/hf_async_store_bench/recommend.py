""" "Which engine for me?": a short benchmark of the load that is described, and what it says."""

from __future__ import annotations

import os
from typing import Final

import msgspec

from hf_async_store_bench import tables
from hf_async_store_bench.environments import Environments
from hf_async_store_bench.messages import Load
from hf_async_store_bench.results import Cell, Skipped
from hf_async_store_bench.run import Run, Told
from hf_async_store_bench.settings import Settings
from hf_async_store_bench.systems import STRATEGIES
from hf_async_store_bench.tables import bytes_shown, range_shown, shown, time_shown

_MOST_ENTITIES: Final = 50_000  # more take too long: two sizes are measured, and extrapolated
_ENOUGH: Final = 0.7  # of the fastest one's work: as good, if the engine needs less
_MEMORY_SHARE: Final = 0.25  # of the machine's memory, what all processes together may take
# From what needs least to what needs most; json split is the same as json.
_NEEDS: Final = {
    "json": "files alone: they can be read, copied and compared as they are",
    "sqlite": "one file, no server",
    "postgresql": "a PostgreSQL server; several machines can share it",
    "dynamodb": "an AWS account; several machines can share it",
}


class Candidate(msgspec.Struct, frozen=True):
    """One engine under that load: what it does, seconds at half of that, memory, what it needs, and why it
    does not fit."""

    engine: str
    rate: float
    low: float
    high: float
    p50: float
    p99: float
    memory: float
    needs: str
    against: str = ""


class Advice(msgspec.Struct):
    wanted: Load
    measured: Load
    candidates: list[Candidate]
    skipped: list[Skipped]
    failures: list[str]
    engine: str | None = None
    reasons: list[str] = []


async def advise(wanted: Load, environments: Environments, tell: Told) -> Advice:
    entities = min(wanted.entities, _MOST_ENTITIES)
    load = msgspec.structs.replace(wanted, entities=entities)
    systems = [each for each in STRATEGIES if each.name in _NEEDS]
    settings = Settings(mode="advise", loads=(load,), rounds=3, duration=0.7, steady=0.7)
    results = await Run(settings, systems, environments, tell).whole()
    # A tenth of it, too: what it takes for each further machine. Its speed does not matter.
    small = msgspec.structs.replace(load, entities=max(100, entities // 10))
    brief = Settings(mode="advise", loads=(small,), rounds=1, duration=0.2, steady=0.0)
    fewer = await Run(brief, systems, environments, tell).whole()
    cells = [(results.cell(each, load.name), fewer.cell(each, small.name)) for each in _NEEDS]
    candidates = [_candidate(wanted, cell, other) for cell, other in cells if cell]
    failures = results.failures + fewer.failures
    advice = Advice(wanted, load, candidates, results.skipped, failures)
    decide(advice)
    return advice


def _candidate(wanted: Load, cell: Cell, small: Cell | None) -> Candidate:
    """Its memory is extrapolated from two sizes; it is never less than what was measured."""
    memory, more = cell.memory, wanted.entities - cell.load.entities
    if small is not None and small.load.entities != cell.load.entities:
        step = (memory - small.memory) / (cell.load.entities - small.load.entities)
        memory = max(memory, memory + step * more)
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * _MEMORY_SHARE
    against = f"would take {bytes_shown(memory)} of memory" if memory > most else ""
    does = (cell.rate, min(cell.rates), max(cell.rates))
    waits = (cell.calm.percentile(0.5), cell.calm.percentile(0.99))
    return Candidate(cell.system, *does, *waits, memory, _NEEDS[cell.system], against)


def decide(advice: Advice) -> None:
    """The engine that needs least among those that do nearly as much as the fastest."""
    fit = [each for each in advice.candidates if not each.against]
    if not fit:
        advice.reasons = ["None of the engines that run here fits it."]
        return
    fit.sort(key=lambda each: -each.rate)
    enough = [each for each in fit if each.rate >= _ENOUGH * fit[0].rate]
    chosen = min(enough, key=lambda each: list(_NEEDS).index(each.engine))
    advice.engine = chosen.engine
    advice.reasons = _reasons(advice, chosen, fit)


def _reasons(advice: Advice, chosen: Candidate, fit: list[Candidate]) -> list[str]:
    best, *others = fit
    wanted, measured = advice.wanted.entities, advice.measured.entities
    reasons = [
        f"It does {shown(chosen.rate)} operations a second here ({shown(chosen.low)} to "
        f"{shown(chosen.high)}); at half of that, one takes {time_shown(chosen.p50)}, "
        f"and 99 of 100 take at most {time_shown(chosen.p99)}.",
        f"It needs {chosen.needs}.",
    ]
    if chosen is not best:
        reasons.append(
            f"{best.engine} does {shown(best.rate)} a second, not enough more to be worth "
            f"what it needs: {best.needs}."
        )
    elif others:
        times = shown(best.rate / others[0].rate)
        reasons.append(f"That is {times} times what the next, {others[0].engine}, does.")
    if measured < wanted:
        reasons.append(
            f"Measured with {measured:,} machines, not {wanted:,}: memory is extrapolated from "
            "there, and speed by key hardly depends on it."
        )
    if any(each.engine == "dynamodb" for each in advice.candidates):
        reasons.append(
            "dynamodb was measured on the local test server; the service has another speed, "
            "and its network in between."
        )
    return reasons


def as_text(advice: Advice) -> str:
    """For a person: the recommendation, the figures behind it, what was left out."""
    wanted = advice.wanted
    rows = [
        (
            each.engine,
            shown(each.rate),
            range_shown(each.low, each.high),
            *map(time_shown, (each.p50, each.p99)),
            bytes_shown(each.memory),
            each.against or ("recommended" if each.engine == advice.engine else ""),
        )
        for each in sorted(advice.candidates, key=lambda each: -each.rate)
    ]
    heads = ("", "operations/s", "range", "p50", "p99", "memory", "remark")
    return "\n".join(
        [
            f"For {wanted.entities:,} machines, {wanted.tasks} tasks in each of {wanted.processes} "
            f"processes, {wanted.reads} % reads: {advice.engine or 'no engine'}.",
            *(f"  {each}" for each in advice.reasons),
            "",
            tables.as_text(tables.Table("Measured here", heads, rows)) if rows else "",
            *(f"left out: {each.what}: {each.why}" for each in advice.skipped),
            *(f"BROKEN {each}" for each in advice.failures),
        ]
    )
