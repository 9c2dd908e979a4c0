"""`hf-async-store bench` and `hf-async-store advise`, from their arguments to their exit code."""

from __future__ import annotations

import argparse
import sys
from itertools import compress
from pathlib import Path
from typing import Any, Final

import msgspec

from hf_async_store import InvalidInputError
from hf_async_store_bench import compare, recommend, tables, targets
from hf_async_store_bench.environments import Environments
from hf_async_store_bench.messages import Load, encode
from hf_async_store_bench.results import Results, Skipped
from hf_async_store_bench.run import Run, tell
from hf_async_store_bench.scenarios import SCENARIOS
from hf_async_store_bench.settings import FULL, SHORT, Settings, chosen_loads
from hf_async_store_bench.systems import ALL, SHORT_SYSTEMS, chosen, of_url
from hf_async_store_bench.workloads import WORKLOADS

PASSED, FAILED = 0, 4
_PARAMETERS: Final = ("entities", "size", "tasks", "processes", "burst")
# The columns that a terminal has no room for; the report has all.
_WIDE: Final = frozenset({"range", "p99.9", "memory", "written", "checked", "retries"})


async def bench(arguments: argparse.Namespace) -> int:
    """Measure, write the report, and print the outcome; or compare two runs. Returns 0, or 4 if an
    invariant broke: a lost write, a wrong answer, a worker that ended."""
    if arguments.words:
        return _compare(arguments)
    from hf_async_store_bench import report  # what draws takes a while to import

    settings = _settings(arguments)
    systems = chosen(arguments.only) or list(
        ALL if arguments.full or arguments.speed else SHORT_SYSTEMS
    )
    systems += [of_url(arguments.store)] if arguments.store else []
    if arguments.page is not None:
        report.around_results(
            Path(arguments.page), settings.mode
        )  # before the minutes of a run, not after
    with Environments(durable=not arguments.no_fsync, folder=arguments.folder) as environments:
        run = Run(settings, systems, environments, tell)
        for each in ALL:
            if each not in systems and not arguments.only:
                run.results.skipped.append(Skipped(each.name, "only in the full run"))
        results = await run.whole()
    results.settings = _told(arguments, settings) | results.settings
    results.figures = targets.figures(results)
    written = report.write(results, Path(arguments.output))
    if arguments.page is not None:
        report.write_into(Path(arguments.page), results)
    if arguments.json:
        _say(encode(results).decode())
    else:
        _show(results, written)
    return FAILED if results.failures else PASSED


async def advice(arguments: argparse.Namespace) -> int:
    """Measure the engines under the load that is described, and recommend one."""
    how = {each: getattr(arguments, each) for each in ("entities", "tasks", "processes")}
    wanted = Load(workload="mixed", reads=arguments.reads_percent, **how)
    with Environments(folder=arguments.folder) as environments:
        found = await recommend.advise(wanted, environments, tell)
    _say(msgspec.json.encode(found).decode() if arguments.json else recommend.as_text(found))
    return FAILED if found.failures else PASSED


def _compare(arguments: argparse.Namespace) -> int:
    if len(arguments.words) != 3 or arguments.words[0] != "compare":
        raise InvalidInputError("expected `bench compare OLD.json NEW.json`, or no words")
    old, new = (Results.read(Path(each)) for each in arguments.words[1:])
    found = compare.differences(old, new)
    if arguments.json:
        for each in found:
            _say(msgspec.json.encode(each.as_json()).decode())
    else:
        _say(tables.as_text(compare.as_table(found)))
        for line in compare.unmatched(old, new):
            _say(f"  {line}")
    return PASSED


def _settings(arguments: argparse.Namespace) -> Settings:
    settings = FULL if arguments.full else targets.speed() if arguments.speed else SHORT
    named = arguments.workload
    known = (*WORKLOADS, *SCENARIOS)
    for each in named:
        if each not in known:
            raise InvalidInputError(f"no workload {each!r}; there are: {', '.join(known)}")
    knobs = {name: getattr(arguments, name) for name in _PARAMETERS}
    knobs["reads"] = arguments.reads_percent
    given = {name: value for name, value in knobs.items() if value is not None}
    loads = chosen_loads(named) if named else settings.loads
    loads = tuple(dict.fromkeys(msgspec.structs.replace(each, **given) for each in loads))
    changed: dict[str, Any] = {"loads": loads, "seed": arguments.seed, "rate": arguments.rate}
    if arguments.duration is not None:
        duration = arguments.duration
        changed |= {"duration": duration, "steady": duration, "scenario_seconds": duration}
    if arguments.rounds is not None:
        changed |= {"rounds": arguments.rounds, "again": False}
    if named or given:
        # What is chosen by hand is run wherever it can be, and as long as it takes.
        changed |= {"series": (), "compared": None, "budget": None, "again": False, "pairs": None}
        changed["scenarios"] = tuple(each for each in named if each in SCENARIOS)
        if arguments.entities and all(len(SCENARIOS[i].sizes) == 1 for i in changed["scenarios"]):
            changed["scenario_sizes"] = (arguments.entities,)
    if arguments.budget is not None:
        changed["budget"] = arguments.budget
    return msgspec.structs.replace(settings, **changed)


def _told(arguments: argparse.Namespace, settings: Settings) -> dict[str, str]:
    return {
        "durable": "no" if arguments.no_fsync else "yes",
        "rounds": f"{settings.rounds} of {settings.duration:g} s at each visit, taking turns",
        "at fixed times": f"{settings.steady:g} s",
        "seed": str(settings.seed),
        **{i.name: f"{i.entities:,} machines of {i.size} bytes stored" for i in settings.loads},
    }


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _show(results: Results, written: list[Path]) -> None:
    shown = [_short(tables.measured(results, each)) for each in results.loads if results.of(each)]
    shown += [*map(tables.grown, results.sweeps), tables.targets(results)]
    for table in (*shown, tables.latencies(results), tables.skipped(results, asked_for=True)):
        if table.rows:
            _say(tables.as_text(table) + "\n")
    for each in results.failures:
        _say(f"BROKEN {each}")
    _say(tables.verdict(results))
    _say(f"Took {results.seconds:g} s. Written: {', '.join(map(str, written))}")


def _short(table: tables.Table) -> tables.Table:
    keep = [head not in _WIDE for head in table.heads]
    heads, *rows = (tuple(compress(row, keep)) for row in (table.heads, *table.rows))
    return table._replace(heads=heads, rows=rows)
