"""What a run does, and what the short and the full one do."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import msgspec

from hf_async_store_bench.messages import Load
from hf_async_store_bench.scenarios import SCENARIOS

Parameter: TypeAlias = Literal["entities", "tasks", "size", "processes"]


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One sweep: a parameter, its values, and what is measured at each of them.

    Attributes:
        values: from small to large.
        workloads: on one filled store, one after the other; what writes comes last.
        share: of the run's budget; what does not fit is listed.
    """

    parameter: Parameter
    values: tuple[int, ...]
    workloads: tuple[str, ...]
    load: Load
    share: float


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a run does.

    Attributes:
        compared: the workloads under which baselines and competitors run, too; None: wherever they can.
        rounds: of each system at one visit to a load, if the load's share of the time has room.
        duration: seconds of one round of one system.
        steady: seconds of the round at fixed times; 0: none.
        rate: its operations a second; None: half as many as the system can do, 5,000 at most.
        budget: seconds of the whole run; None: as long as it takes.
        first_share: of the budget, for the first visit to all loads.
        again: go on with further visits until the budget is spent.
        scenarios: their names; each as far as there is time.
    """

    mode: str
    loads: tuple[Load, ...]
    rounds: int
    duration: float
    steady: float
    rate: float | None = None
    budget: float | None = None
    first_share: float = 1.0
    again: bool = False
    compared: tuple[str, ...] | None = None
    series: tuple[Series, ...] = ()
    scenarios: tuple[str, ...] = ()
    seed: int = 1


SHORT_SYSTEMS: Final = (
    "memory",
    "json",
    "sqlite",
    "postgresql",
    "dynamodb",
    "append and sync each",
    "start of Python",
    "group commit by hand",
    "SQLAlchemy Core on aiosqlite each",
    "sqlite3 batched by hand",
    "aiosqlite, a multi-row insert",
    "asyncpg pool each",
    "asyncpg batched by hand",
    "asyncpg, a multi-row insert",
    "aiobotocore each",
    "aiobotocore batched by hand",
)
"""The short run has no competitors, and no baselines that say much the same as another."""

_LOADS: Final = (
    Load(workload="save"),
    Load(workload="get"),
    Load(workload="acquire", tasks=1),
    Load(workload="poll", tasks=16),
    Load(workload="query", tasks=16),
    Load(workload="contend", tasks=16),
    Load(workload="mixed"),
    Load(workload="one-shot", tasks=1),
)

_MORE_LOADS: Final = (
    Load(workload="save", tasks=1),
    Load(workload="get", tasks=1),
    Load(workload="create", tasks=1),
    Load(workload="update", tasks=1),
    Load(workload="create"),
    Load(workload="update"),
    Load(workload="create batch", tasks=1),
    Load(workload="save batch", tasks=1),
    Load(workload="import batch", tasks=1),
    Load(workload="acquire", tasks=8, burst=24),
    Load(workload="save", tasks=8, processes=4),
    Load(workload="contend", tasks=1, processes=4),
)

SHORT: Final = Settings(
    mode="short",
    loads=_LOADS,
    rounds=3,
    duration=0.25,
    steady=0.3,
    budget=100.0,
    first_share=0.85,
    again=True,
    compared=("save", "get", "acquire", "one-shot"),
)

FULL: Final = Settings(
    mode="full",
    loads=(*_LOADS, *_MORE_LOADS),
    rounds=3,
    duration=0.3,
    steady=0.5,
    budget=1140.0,
    first_share=0.4,
    again=True,
    series=(
        Series(
            parameter="entities",
            values=(100, 1000, 10_000, 100_000, 1_000_000),
            workloads=("get", "query", "save"),
            load=Load(workload="get", tasks=1),
            share=0.22,
        ),
        Series(
            parameter="tasks",
            values=(1, 8, 64, 512),
            workloads=("get", "save"),
            load=Load(workload="get"),
            share=0.05,
        ),
        Series(
            parameter="size",
            values=(100, 1000, 10_000, 100_000),
            workloads=("get", "save"),
            load=Load(workload="get", entities=1000),
            share=0.05,
        ),
        Series(
            parameter="processes",
            values=(1, 2, 4, 8),
            workloads=("save",),
            load=Load(workload="save", tasks=8),
            share=0.04,
        ),
    ),
    scenarios=tuple(SCENARIOS),
)
"""Within 20 minutes, with what it takes to draw the report."""
