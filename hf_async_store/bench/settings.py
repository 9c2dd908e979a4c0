"""What a run does, and what the short and the full one do."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import msgspec

from hf_async_store.bench.plan import Load

Knob: TypeAlias = Literal["entities", "tasks", "size", "processes"]


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One sweep: a knob, its values, and what is measured at each of them.

    Attributes:
        values: from small to large.
        workloads: on one filled target, one after the other; what writes comes last.
        share: of the run's budget; what does not fit is listed.
    """

    knob: Knob
    values: tuple[int, ...]
    workloads: tuple[str, ...]
    load: Load
    share: float


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a run does.

    Attributes:
        compared: the workloads under which floors and peers run, too; None: wherever they can.
        rounds: of each subject at one visit to a load, if the load's share of the time has room.
        duration: seconds of one round of one subject.
        steady: seconds of the round at fixed times; 0: none.
        rate: its operations a second; None: half as many as the side can do, 5,000 at most.
        budget: seconds of the whole run; None: as long as it takes.
        first_share: of the budget, for the first visit to all loads.
        again: go on with further visits until the budget is spent.
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
    seed: int = 1


SHORT_SUBJECTS: Final = (
    "memory",
    "json",
    "sqlite",
    "postgresql",
    "dynamodb",
    "append and sync each",
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
"""The short run leaves out peers, and floors that say much the same as another."""

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
    Load(workload="migrate", tasks=1),
    Load(workload="migrate in", tasks=1),
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
    compared=("save", "get", "acquire"),
)

FULL: Final = Settings(
    mode="full",
    loads=(*_LOADS, *_MORE_LOADS),
    rounds=3,
    duration=0.3,
    steady=0.5,
    budget=960.0,
    first_share=0.5,
    again=True,
    series=(
        Series(
            knob="entities",
            values=(100, 1000, 10_000, 100_000, 1_000_000),
            workloads=("get", "query", "save"),
            load=Load(workload="get", tasks=1),
            share=0.3,
        ),
        Series(
            knob="tasks",
            values=(1, 8, 64, 512),
            workloads=("get", "save"),
            load=Load(workload="get"),
            share=0.07,
        ),
        Series(
            knob="size",
            values=(100, 1000, 10_000, 100_000),
            workloads=("get", "save"),
            load=Load(workload="get", entities=1000),
            share=0.07,
        ),
        Series(
            knob="processes",
            values=(1, 2, 4, 8),
            workloads=("save",),
            load=Load(workload="save", tasks=8),
            share=0.05,
        ),
    ),
)
"""With the scripts of the engines, `make bench-full` ends within 20 minutes."""
