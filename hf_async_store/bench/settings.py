"""What the short and the full run do."""

from __future__ import annotations

from typing import Final

from hf_async_store.bench.plan import Load
from hf_async_store.bench.run import Series, Settings

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
    "asyncpg pool each",
    "asyncpg batched by hand",
    "aiobotocore each",
    "aiobotocore batched by hand",
)
"""The short run leaves out peers, and floors that say much the same as another."""

_ENTITIES: Final = 10_000

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
    Load(workload="create"),
    Load(workload="update"),
    Load(workload="create batch", tasks=1),
    Load(workload="save batch", tasks=1),
    Load(workload="migrate", tasks=1),
    Load(workload="save", tasks=8, processes=4),
    Load(workload="contend", tasks=1, processes=4),
)

SHORT: Final = Settings(
    mode="short",
    loads=_LOADS,
    rounds=3,
    duration=0.25,
    steady=0.3,
    budget=90.0,
    compared=("save", "get", "acquire"),
)

FULL: Final = Settings(
    mode="full",
    loads=(*_LOADS, *_MORE_LOADS),
    rounds=5,
    duration=0.7,
    steady=1.0,
    budget=540.0,
    series=(
        Series(
            knob="entities",
            values=(100, 1000, 10_000, 100_000, 1_000_000),
            workloads=("get", "query", "save"),
            load=Load(workload="get", tasks=1),
            budget=150.0,
        ),
        Series(
            knob="tasks",
            values=(1, 8, 64, 512),
            workloads=("get", "save"),
            load=Load(workload="get"),
            budget=60.0,
        ),
        Series(
            knob="size",
            values=(100, 1000, 10_000, 100_000),
            workloads=("get", "save"),
            load=Load(workload="get", entities=1000),
            budget=60.0,
        ),
        Series(
            knob="processes",
            values=(1, 2, 4, 8),
            workloads=("save",),
            load=Load(workload="save", tasks=8),
            budget=60.0,
        ),
    ),
)
