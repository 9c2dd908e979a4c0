"""`hf-async-store bench` and `hf-async-store advise`, from their arguments to their exit code."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from hf_async_store import InvalidInputError
from hf_async_store_bench import compare, docs_page, recommend, tables, targets
from hf_async_store_bench.environments import Environments
from hf_async_store_bench.messages import encode
from hf_async_store_bench.results import Results, Skipped
from hf_async_store_bench.run import Run
from hf_async_store_bench.scenarios import SCENARIOS
from hf_async_store_bench.settings import FULL, SHORT, SHORT_SYSTEMS, Settings
from hf_async_store_bench.signals import ended_by_sigterm
from hf_async_store_bench.systems import ALL, chosen, of_url
from hf_async_store_bench.workloads import WORKLOADS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Coroutine

    from hf_async_store_bench.messages import Load, SystemUnderTest

PASSED: Final = 0
FAILED: Final = 4

_PARAMETERS: Final = ("entities", "size", "tasks", "processes", "burst")


async def bench(arguments: argparse.Namespace) -> int:
    """Measure, write the report, and print the outcome; or compare two runs.

    Returns 0, or 4 if an invariant broke: a lost write, a wrong answer, a worker that ended.

    Raises:
        InvalidInputError, ConfigurationError: what cannot be measured as it is asked for.
    """
    if arguments.words:
        return _compare(arguments)
    return await _run_to_completion(_measured(arguments))


async def _measured(arguments: argparse.Namespace) -> int:
    settings, systems = _settings(arguments), _systems(arguments)
    page = None if arguments.page is None else docs_page.Page(Path(arguments.page))
    with Environments(durable=not arguments.no_fsync, folder=arguments.folder) as environments:
        run = Run(settings, systems, environments, _tell)
        for each in ALL:
            if each not in systems and not arguments.only:
                run.results.skipped.append(Skipped(each.name, "only in the full run"))
        results = await run.whole()
    results.settings = _told(arguments, settings) | results.settings
    results.figures = targets.figures(results)
    from hf_async_store_bench import report  # what draws takes a while to import

    written = report.write(results, Path(arguments.output))
    if page is not None:
        page.write(results)
    if arguments.json:
        sys.stdout.write(encode(results).decode() + "\n")
    else:
        _show(results, written)
    return FAILED if results.failures else PASSED


async def advice(arguments: argparse.Namespace) -> int:
    """Measure the engines under the load that is described, and recommend one."""
    return await _run_to_completion(_advised(arguments))


async def _advised(arguments: argparse.Namespace) -> int:
    with Environments(folder=arguments.folder) as environments:
        found = await recommend.advise(
            recommend.Wanted(
                entities=arguments.entities,
                tasks=arguments.tasks,
                processes=arguments.processes,
                reads=arguments.reads_percent,
            ),
            environments,
            _tell,
        )
    if arguments.json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    else:
        sys.stdout.write(recommend.as_text(found) + "\n")
    return FAILED if found.failures else PASSED


async def _run_to_completion(work: Coroutine[None, None, int]) -> int:
    """The exit code of a run; SIGTERM, too, stops the servers and processes that it started."""
    with ended_by_sigterm() as ended:
        try:
            return await work
        except asyncio.CancelledError:
            if not ended():
                raise
            return 128 + signal.SIGTERM


def _compare(arguments: argparse.Namespace) -> int:
    if len(arguments.words) != 3 or arguments.words[0] != "compare":
        raise InvalidInputError("expected `bench compare OLD.json NEW.json`, or no words")
    old, new = (Results.read(Path(each)) for each in arguments.words[1:])
    found = compare.differences(old, new)
    if arguments.json:
        for each in found:
            sys.stdout.write(msgspec.json.encode(_as_json(each)).decode() + "\n")
        return PASSED
    sys.stdout.write(tables.as_text(compare.as_table(found)) + "\n")
    for line in compare.unmatched(old, new):
        sys.stdout.write(f"  {line}\n")
    return PASSED


def _as_json(difference: compare.Difference) -> dict[str, Any]:
    return {
        "system": difference.old.system,
        "load": difference.old.load.name,
        "old": difference.old.rate,
        "new": difference.new.rate,
        "change": difference.change.value,
        "low": difference.change.low,
        "high": difference.change.high,
        "word": difference.word,
    }


# -- what is asked for ----------------------------------------------------------------------


def _settings(arguments: argparse.Namespace) -> Settings:
    settings = FULL if arguments.full else SHORT
    loads = _chosen_loads(arguments.workload) if arguments.workload else settings.loads
    scenarios = tuple(each for each in arguments.workload if each in SCENARIOS)
    knobs = {name: getattr(arguments, name) for name in _PARAMETERS}
    knobs["reads"] = arguments.reads_percent
    given = {name: value for name, value in knobs.items() if value is not None}
    loads = tuple(dict.fromkeys(msgspec.structs.replace(each, **given) for each in loads))
    chosen_ones: dict[str, Any] = {"loads": loads, "seed": arguments.seed, "rate": arguments.rate}
    if arguments.duration is not None:
        chosen_ones |= {"duration": arguments.duration, "steady": arguments.duration}
    if arguments.rounds is not None:
        chosen_ones |= {"rounds": arguments.rounds, "again": False}
    if arguments.workload or given:
        # What is chosen by hand is run wherever it can be, and as long as it takes.
        chosen_ones |= {"series": (), "compared": None, "budget": None, "again": False}
        chosen_ones["scenarios"] = scenarios
    if arguments.budget is not None:
        chosen_ones["budget"] = arguments.budget
    return msgspec.structs.replace(settings, **chosen_ones)


def _chosen_loads(names: list[str]) -> tuple[Load, ...]:
    unknown = [each for each in names if each not in WORKLOADS and each not in SCENARIOS]
    if unknown:
        known = ", ".join((*WORKLOADS, *SCENARIOS))
        raise InvalidInputError(f"no workload {unknown[0]!r}; there are: {known}")
    loads = [each for each in FULL.loads if each.workload in names and each.processes == 1]
    first: dict[str, Load] = {}
    for each in loads:
        first.setdefault(each.workload, each)
    return tuple(first[each] for each in dict.fromkeys(names) if each in first)


def _systems(arguments: argparse.Namespace) -> list[SystemUnderTest]:
    if arguments.only:
        systems = chosen(arguments.only)
    else:
        systems = [each for each in ALL if arguments.full or each.name in SHORT_SYSTEMS]
    return systems + ([of_url(arguments.store)] if arguments.store else [])


def _told(arguments: argparse.Namespace, settings: Settings) -> dict[str, str]:
    told = {
        "durable": "no" if arguments.no_fsync else "yes",
        "rounds": f"{settings.rounds} of {settings.duration:g} s at each visit, taking turns",
        "at fixed times": f"{settings.steady:g} s",
        "seed": str(settings.seed),
    }
    for load in settings.loads:
        told[load.name] = f"{load.entities:,} machines of {load.size} bytes stored"
    return told


# -- what is told ---------------------------------------------------------------------------


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _show(results: Results, written: list[Path]) -> None:
    say = sys.stdout.write
    for load in results.loads:
        if results.of(load):
            say(tables.as_text(_short(tables.measured(results, load))) + "\n\n")
    for sweep in results.sweeps:
        say(tables.as_text(tables.grown(sweep)) + "\n\n")
    for table in (tables.targets(results), tables.skipped(results, asked_for=True)):
        if table.rows:
            say(tables.as_text(table) + "\n\n")
    for each in results.failures:
        say(f"BROKEN {each}\n")
    say(f"{tables.verdict(results)}\n")
    say(f"Took {results.seconds:g} s. Written: {', '.join(map(str, written))}\n")


def _short(table: tables.Table) -> tables.Table:
    """As many columns as a terminal has room for; the report has all."""
    keep = [place for place, head in enumerate(table.heads) if head not in _WIDE]
    return table._replace(
        heads=tuple(table.heads[place] for place in keep),
        rows=[tuple(row[place] for place in keep) for row in table.rows],
    )


_WIDE: Final = frozenset({"range", "p99.9", "memory", "written", "checked", "retries"})
