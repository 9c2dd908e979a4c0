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
from hf_async_store.bench.results import Figure, Results, ratio
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
    yield Merit("dynamodb", load("save"), each, at_most=0.35, of="processor")
    yield Merit("dynamodb", load("get"), "aiodynamo", at_least=1)
    yield Merit("dynamodb", load("save", 1), each, at_most=1.1, of="time")
    yield Merit("dynamodb", load("get", 1), each, at_most=1.1, of="time")
    yield Merit("dynamodb", load("create batch", 1), together, at_least=0.35)
    yield Merit("dynamodb", load("save batch", 1), together, at_least=0.2)


MERITS: Final = tuple(_merits())

_JSON, _SQL, _DYNAMODB, _MIGRATION = "json_store", "sql_store", "dynamodb_store", "migration"

SCRIPTS: Final = {_JSON: "json", _SQL: "sql", _DYNAMODB: "dynamodb", _MIGRATION: "migration"}
"""The scripts, and what each measures."""

ELSEWHERE: Final = (
    (_JSON, "one save at 10,000 to 1,000,000 machines against 1,000, time", "at most 1.5"),
    (_JSON, "get of the shell, 10,000 machines, against an empty asyncio.run", "at most 2.5"),
    (_JSON, "opening 10,000 machines against decoding their file", "at most 1"),
    (_JSON, "memory at 100,000 machines, indexes included, against the file", "at most 3"),
    (_JSON, "longest hold of the event loop at 100,000 machines, in ms", "at most 20"),
    (_SQL, "one at a time, 64 waiting, and 1,000 in a transaction, measured at length", "several"),
    (_DYNAMODB, "one at a time, 64 waiting, and batches, measured at length", "several"),
    (_MIGRATION, "100,000 machines JSON to SQLite against a bulk load", "at least 0.3"),
    (_MIGRATION, "100,000 machines JSON to PostgreSQL against a bulk load", "at least 0.3"),
    (_MIGRATION, "memory at 1,000,000 machines against 10,000", "at most 1.2"),
    (_MIGRATION, "backup of 1,000,000 on JSON against streaming compression", "at least 0.3"),
    (_MIGRATION, "backup of 1,000,000 on SQLite against streaming compression", "at least 0.3"),
)
"""What only the scripts know, with its target; their files have these rows in their own words."""


def figures(results: Results, files: Sequence[Path]) -> list[Figure]:
    """Every figure of merit, with its value where this run or one of the files has it.

    Raises:
        ConfigurationError: a file that cannot be read.
    """
    rows = [_measured(results, each) for each in MERITS]
    rows += [figure for each in _growth(results) for figure in each]
    names = {each.stem for each in files}
    for path in files:
        rows += _read(path)
    rows += [
        Figure(
            engine=SCRIPTS[script],
            what=what,
            unit="",
            target=target,
            source=f"benchmarks/{script}.py",
            note=f"benchmarks/{script}.py measures it (--figures)",
        )
        for script, what, target in ELSEWHERE
        if script not in names
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


def _growth(results: Results) -> Iterator[list[Figure]]:
    """What a save costs in the largest store, against the smallest of at least a thousand."""
    for sweep in results.sweeps:
        if (sweep.knob, sweep.workload) != ("entities", "save"):
            continue
        for curve in sweep.curves:
            points = [each for each in curve.points if each.size >= 1000]
            if curve.subject != "json" or len(points) < 2:
                continue
            value = points[-1].cost / points[0].cost
            yield [
                Figure(
                    engine="json",
                    what=f"save, 1 task, at {points[-1].size:,.0f} machines "
                    f"against {points[0].size:,.0f}, time of one operation",
                    unit="x",
                    target="at most 1.5",
                    source="this run",
                    value=value,
                    met=value <= 1.5,
                )
            ]


def _read(path: Path) -> list[Figure]:
    """The rows of a script's file that have a target."""
    try:
        held: dict[str, Any] = json.loads(path.read_bytes())
        return [
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
            )
            for each in held["figures"]
            if each["target"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigurationError(f"{path}: these are no figures of a script: {exc!r}") from exc
