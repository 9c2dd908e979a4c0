"""Figures of merit: what each engine promised to reach, as rows with their targets.

Most are ratios to a floor that this harness runs beside the engine. What needs more care than a
workload (memory, holds of the loop, opening, migration) is measured by the scripts in `benchmarks/`
of the source, whose files are read in; without them those rows say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec

from hf_async_store.bench.plan import Load
from hf_async_store.bench.results import Cell, Figure, Results, ratio
from hf_async_store.errors import ConfigurationError


class Merit(NamedTuple):
    """A figure that this harness measures.

    Attributes:
        to: the side that it is held against; None: the rate itself.
        of: the ratio of rates, of the times of one operation, or of processor time.
    """

    engine: str
    load: Load
    to: str | None
    at_least: float | None = None
    at_most: float | None = None
    of: Literal["rate", "time", "processor"] = "rate"


_MANY: Final = 64


def _merits() -> Iterator[Merit]:
    def load(workload: str, tasks: int = _MANY) -> Load:
        return Load(workload=workload, tasks=tasks)

    yield Merit("json", load("save"), "group commit by hand", at_least=0.25)
    yield Merit("json", load("save", 1), "append and sync each", at_least=0.6)
    yield Merit("json", load("get", 1), None, at_least=100_000)

    core = "SQLAlchemy Core on aiosqlite each"
    yield Merit("sqlite", load("save"), core, at_least=15)
    yield Merit("sqlite", load("get"), core, at_least=20)
    yield Merit("sqlite", load("save", 1), core, at_least=1)
    yield Merit("sqlite", load("get", 1), core, at_least=1)
    yield Merit(
        "sqlite", load("acquire", 1), "aiosqlite, a multi-row insert", at_most=1.5, of="time"
    )

    core = "SQLAlchemy Core on asyncpg each"
    yield Merit("postgresql", load("save"), "asyncpg pool each", at_least=2)
    yield Merit("postgresql", load("get"), "asyncpg pool each", at_least=2)
    yield Merit("postgresql", load("save"), "asyncpg held connections each", at_least=1)
    yield Merit("postgresql", load("save", 1), core, at_most=1.3, of="time")
    yield Merit("postgresql", load("get", 1), core, at_most=1.3, of="time")
    yield Merit(
        "postgresql", load("acquire", 1), "asyncpg, a multi-row insert", at_most=1.5, of="time"
    )

    each, together = "aiobotocore each", "aiobotocore batched by hand"
    yield Merit("dynamodb", load("get"), each, at_least=4)
    yield Merit("dynamodb", load("create"), each, at_least=3)
    yield Merit("dynamodb", load("update"), each, at_least=2)
    yield Merit("dynamodb", load("save"), each, at_least=1.8)
    for workload in ("create", "update", "save"):
        yield Merit("dynamodb", load(workload), each, at_most=0.35, of="processor")
    yield Merit("dynamodb", load("get"), "aiodynamo", at_least=1)
    for workload in ("get", "create", "update", "save"):
        yield Merit("dynamodb", load(workload, 1), each, at_most=1.1, of="time")
    yield Merit("dynamodb", load("create batch", 1), together, at_least=0.35)
    yield Merit("dynamodb", load("save batch", 1), together, at_least=0.2)


MERITS: Final = tuple(_merits())

_JSON, _SQL, _DYNAMODB, _MIGRATION = "json_store", "sql_store", "dynamodb_store", "migration"

SCRIPTS: Final = {_JSON: "json", _SQL: "sql", _DYNAMODB: "dynamodb", _MIGRATION: "migration"}
"""The scripts, and what each measures."""

ELSEWHERE: Final = (
    (_JSON, "sizes", "one save at 10,000 to 1,000,000 machines against 1,000, time", "at most 1.5"),
    (_JSON, "together", "64 tasks at once against bare group commit", "at least 0.25"),
    (_JSON, "single", "one save at a time against bare append and sync", "at least 0.6"),
    (_JSON, "gets", "gets of one task, a second", "at least 100,000"),
    (_JSON, "command", "get of the shell, 10,000 machines, against asyncio.run", "at most 2.5"),
    (_JSON, "opening", "opening 10,000 machines against decoding their file", "at most 1"),
    (_JSON, "memory", "memory at 100,000 machines, indexes included, to the file", "at most 3"),
    (_JSON, "hold", "longest hold of the event loop at 100,000 machines, in ms", "at most 20"),
    (_SQL, "sqlite", "64 waiting, one at a time, and 1,000 in a transaction", "several"),
    (_SQL, "postgresql", "64 waiting, one at a time, and 1,000 in a transaction", "several"),
    (_DYNAMODB, "together", "64 waiting, against aiobotocore", "several"),
    (_DYNAMODB, "peer", "64 waiting, gets against aiodynamo", "at least 1"),
    (_DYNAMODB, "single", "one at a time against aiobotocore, time", "at most 1.1"),
    (_DYNAMODB, "batch", "batches of 1,000 against BatchWriteItem", "several"),
    (_MIGRATION, "sqlite", "100,000 machines JSON to SQLite, to a bulk load", "at least 0.3"),
    (_MIGRATION, "postgresql", "100,000 machines JSON to PostgreSQL, to COPY", "at least 0.3"),
    (_MIGRATION, "memory", "memory at 1,000,000 machines against 10,000", "at most 1.2"),
    (_MIGRATION, "json_backup", "backup of 1,000,000 on JSON against zlib", "at least 0.3"),
    (_MIGRATION, "sqlite_backup", "backup of 1,000,000 on SQLite against zlib", "at least 0.3"),
)
"""What only the scripts know: script, row, figure and target. Their files have these rows in their
own words; one that is missing there is told by these."""


def figures(results: Results, files: Sequence[Path]) -> list[Figure]:
    """Every figure of merit, with its value where this run or one of the files has it.

    Raises:
        ConfigurationError: a file that cannot be read.
    """
    rows = [_measured(results, each) for each in MERITS]
    rows += [*_growth(results), *_kept(results)]
    known = set()
    for path in files:
        for row, figure in _read(path):
            known.add((path.stem, row))
            rows.append(figure)
    rows += [
        Figure(
            engine=SCRIPTS[script],
            what=f"{row}: {what}",
            unit="",
            target=target,
            source=f"benchmarks/{script}.py",
            note=f"benchmarks/{script}.py measures it (make bench-full)",
        )
        for script, row, what, target in ELSEWHERE
        if (script, row) not in known
    ]
    return rows


def check(files: Sequence[Path]) -> None:
    """Read the files once, for their errors.

    Raises:
        ConfigurationError: one that cannot be read.
    """
    for each in files:
        _read(each)


def _measured(results: Results, merit: Merit) -> Figure:
    what = {"rate": merit.load.name, "time": f"{merit.load.name}, time of one operation"}.get(
        merit.of, f"{merit.load.name}, processor time"
    )
    limit = merit.at_least if merit.at_least is not None else merit.at_most
    target = f"at {'least' if merit.at_least is not None else 'most'} {limit:,g}"
    row = Figure(
        engine=merit.engine,
        what=what + (f" against {merit.to}" if merit.to else ""),
        unit="x" if merit.to else "a second",
        target=target,
        source="this run",
    )
    value = _value(results, merit)
    if isinstance(value, str):
        return msgspec.structs.replace(row, note=value)
    middle, low, high = value
    met = middle >= limit if merit.at_least is not None else middle <= limit  # type: ignore[operator]  # one of them is there
    return msgspec.structs.replace(row, value=middle, low=low, high=high, met=met)


def _value(results: Results, merit: Merit) -> tuple[float, float, float] | str:
    """The figure, or why there is none."""
    ours = results.cell(merit.engine, merit.load.name)
    if ours is None:
        return "not in this run"
    if merit.to is None:
        return ours.rate, min(ours.rates), max(ours.rates)
    theirs = results.cell(merit.to, merit.load.name)
    if theirs is None:
        return f"{merit.to} is not in this run"
    if merit.of == "processor":
        value = ours.processor / max(theirs.processor, 1e-9)
        return value, value, value
    found = ratio(ours, theirs)
    if found is None:
        return "no round in common"
    if merit.of == "time":
        return 1 / found.value, 1 / found.high, 1 / found.low if found.low else float("inf")
    return found


_GROWS_AT_MOST: Final = 1.5
_FIRST: Final = 1000


def _growth(results: Results) -> Iterator[Figure]:
    """What a save costs in a large JSON store, against one of a thousand machines."""
    points = {
        point.size: point.cost
        for sweep in results.sweeps
        if (sweep.knob, sweep.workload) == ("entities", "save")
        for curve in sweep.curves
        if curve.subject == "json"
        for point in curve.points
    }
    for size in _SIZES:
        row = Figure(
            engine="json",
            what=f"save, 1 task, at {size:,} machines against {_FIRST:,}, time of one operation",
            unit="x",
            target=f"at most {_GROWS_AT_MOST:g}",
            source="this run",
        )
        if size in points and _FIRST in points:
            value = points[size] / points[_FIRST]
            yield msgspec.structs.replace(row, value=value, met=value <= _GROWS_AT_MOST)
        else:
            yield msgspec.structs.replace(row, note="not in this run")


_SIZES: Final = (10_000, 100_000, 1_000_000)


def _kept(results: Results) -> Iterator[Figure]:
    """Acknowledged writes have to be there: of each engine, and where processes share a store."""
    for engine in dict.fromkeys(each.subject for each in results.cells if each.kind == "strategy"):
        cells = [each for each in results.cells if each.subject == engine]
        yield _lost(engine, "all workloads", cells)
    for workload in ("save", "contend"):
        cells = [
            each
            for each in results.cells
            if (each.subject, each.load.workload) == ("json", workload) and each.load.processes > 1
        ]
        many = max((each.load.processes for each in cells), default=0)
        yield _lost("json", f"{workload} by {many or 'several'} processes at once", cells)


def _lost(engine: str, what: str, cells: Sequence[Cell]) -> Figure:
    checked = sum(each.checked for each in cells)
    row = Figure(
        engine=engine,
        what=f"{what}: acknowledged and not there, of {checked:,} entities compared",
        unit="entities",
        target="at most 0",
        source="this run",
    )
    if not checked:
        return msgspec.structs.replace(row, note="not in this run")
    lost = sum(len(each.failures) for each in cells)
    return msgspec.structs.replace(row, value=float(lost), met=not lost)


def _read(path: Path) -> list[tuple[str, Figure]]:
    """The rows of a script's file that have a target, with their names."""
    try:
        held: dict[str, Any] = json.loads(path.read_bytes())
        return [
            (
                each["row"],
                Figure(
                    engine=SCRIPTS.get(path.stem, path.stem),
                    what=f"{each['row']}: {each['what']}",
                    unit=each["unit"],
                    target=each["target"],
                    source=f"benchmarks/{path.stem}.py",
                    value=each["median"],
                    low=each["low"],
                    high=each["high"],
                    met=each["met"],
                ),
            )
            for each in held["figures"]
            if each["target"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigurationError(f"{path}: these are no figures of a script: {exc!r}") from exc
