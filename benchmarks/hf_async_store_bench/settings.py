"""What a run does, and what the short and the full one do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Final, Literal, TypeAlias

import msgspec

from hf_async_store_bench.csv_rows import rows_beside
from hf_async_store_bench.messages import Load
from hf_async_store_bench.scenarios import SCENARIOS

Parameter: TypeAlias = Literal["entities", "tasks", "size", "processes"]


class Series(msgspec.Struct, frozen=True):
    """One sweep: a parameter, its values in the order in which they are measured (the ends first), the
    workloads that are run at each of them on one filled store (what writes comes last), and the share of
    the run's budget."""

    parameter: Parameter
    values: tuple[int, ...]
    workloads: tuple[str, ...]
    load: Load
    share: float


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a run does.

    Attributes:
        rounds: of each system at one visit to a load, if there is time.
        steady: seconds of the round at fixed times; 0: none.
        shares: one such round for each of these parts of what the system can do; several: of saves
            alone; one: with 5,000 operations a second at most.
        rate: operations a second instead.
        budget: seconds of the whole run; None: as long as it takes.
        first_share: of the budget, for the first visit to all loads.
        again: go on with further visits until the budget is spent.
        scenario_sizes: machines in the stores of the scenarios, if not those that they name.
        scenario_seconds: how long a scenario goes on that lasts as long as one likes.
        compared: the workloads under which baselines and competitors run, too; None: wherever they can.
        pairs: the systems that run under each load, by its name; None: wherever they can.
    """

    mode: str
    loads: tuple[Load, ...]
    rounds: int = 3
    duration: float
    steady: float
    shares: tuple[float, ...] = (0.5,)
    rate: float | None = None
    budget: float | None = None
    first_share: float = 1.0
    again: bool = False
    compared: tuple[str, ...] | None = None
    series: tuple[Series, ...] = ()
    scenarios: tuple[str, ...] = ()
    scenario_sizes: tuple[int, ...] = ()
    scenario_seconds: float = 10.0
    pairs: Mapping[str, Set[str]] | None = None
    seed: int = 1


_LOADS: Final = rows_beside(__file__, Load)

SHORT: Final = Settings(
    mode="short",
    loads=_LOADS[:8],
    duration=0.25,
    steady=0.3,
    budget=100.0,
    first_share=0.85,
    again=True,
    compared=("save", "get", "acquire", "one-shot"),
)

_SIZES: Final = (100, 100_000, 1000, 10_000)

FULL: Final = Settings(
    mode="full",
    loads=_LOADS,
    duration=0.3,
    steady=0.5,
    budget=1140.0,
    first_share=0.4,
    again=True,
    series=(
        Series("tasks", (1, 512, 8, 64), ("get", "save"), Load(workload="get"), 0.05),
        Series("size", _SIZES, ("get", "save"), Load(workload="get", entities=1000), 0.05),
        Series("processes", (1, 8, 2, 4), ("save",), Load(workload="save", tasks=8), 0.04),
    ),
    scenarios=tuple(SCENARIOS),
)


SPEED: Final = Settings(
    mode="speed",
    loads=(),  # those of targets.csv: see `targets.speed`
    rounds=7,
    duration=0.5,
    steady=1.0,
    shares=(0.5, 0.8, 0.95),
    scenarios=("migrate to sqlite", "migrate to postgresql"),
)


def chosen_loads(names: Sequence[str]) -> tuple[Load, ...]:
    """Of each of these workloads, the load with which the full run begins."""
    first = {each.workload: each for each in reversed(FULL.loads)}
    return tuple(first[each] for each in dict.fromkeys(names) if each in first)
