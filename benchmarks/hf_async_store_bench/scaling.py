"""How cost grows with one parameter: at each of its values, in the order of the series."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from hf_async_store_bench.executor import Executor
from hf_async_store_bench.messages import SystemUnderTest
from hf_async_store_bench.results import Point, Sweep, cell_of
from hf_async_store_bench.settings import Series
from hf_async_store_bench.worker_group import WorkerGroup
from hf_async_store_bench.workloads import WORKLOADS

_ROUNDS = 2


async def scaling(
    series: Series,
    systems: Sequence[SystemUnderTest],
    executor: Executor,
    budget: float,
    tell: Callable[[str], None],
) -> list[Sweep]:
    """One sweep for each workload. Of the budget in seconds the first value is measured in any case."""
    began = time.monotonic()
    sweeps = [
        Sweep(parameter=series.parameter, workload=each, unit=WORKLOADS[each].unit)
        for each in series.workloads
    ]
    growth = f"growth with {series.parameter}"
    for value in series.values:
        if value != series.values[0] and time.monotonic() - began > budget:
            executor.skip(f"{growth}: at {value:,}", f"the sweep's {budget:.0f} s were over")
            continue
        tell(f"{growth} at {value:,}: {len(systems)} systems")
        changed = {series.parameter: value, "workload": series.workloads[0]}
        load = msgspec.structs.replace(series.load, **changed)
        async with executor.filled(systems, load, series.workloads) as groups:
            for group in groups:
                await _points(executor, group, sweeps, value)
    took = f"took {time.monotonic() - began:.0f} s, of {budget:.0f} s that it may take"
    executor.results.settings[growth] = f"{', '.join(series.workloads)}: {took}"
    return sweeps


async def _points(
    executor: Executor, group: WorkerGroup, sweeps: Sequence[Sweep], value: int
) -> None:
    for sweep in sweeps if await executor.started([group]) else ():
        load = msgspec.structs.replace(group.load, workload=sweep.workload)
        if await executor.attempt(group.system, load, group.turn_to(sweep.workload)):
            cell = cell_of(group.system, load, sweep.unit)
            await executor.warm_up(group, cell)
            for _ in range(_ROUNDS):
                await executor.round(group, cell)
            await executor.verify(group, cell)
            where = f"{cell.system}: growth of {load.name} at {sweep.parameter} {value:,}"
            executor.results.broken += [f"{where}: {each}" for each in cell.failures]
            if cell.rate:
                point = Point(
                    size=value, cost=1 / cell.rate, rates=cell.rates, checked=cell.checked
                )
                sweep.add(cell.system, cell.engine, point)
    await group.end()
