"""The harness detects faulty engines: each injected fault must be reported."""

from __future__ import annotations

import pytest
from faulty_systems import Measure, system

from hf_async_store_bench.messages import Load
from hf_async_store_bench.systems import chosen

pytestmark = pytest.mark.hf_sampled(by="module")

SAVE = Load(workload="save", tasks=8, entities=1000)


async def test_a_slow_engine_has_lower_throughput_and_higher_latency(measure: Measure) -> None:
    results = await measure([system("Good"), system("Slow")], SAVE)
    good, slow = (results.cell(each, SAVE.name) for each in ("Good", "Slow"))
    assert good is not None
    assert slow is not None
    assert results.failures == []
    # Eight tasks that wait ten milliseconds each do at most 800 operations per second.
    assert slow.rate < 800
    assert good.rate > 1.5 * slow.rate
    assert slow.calm.percentile(0.5) > 0.01


async def test_a_stall_affects_the_latency_of_all_waiting_operations(
    measure: Measure,
) -> None:
    results = await measure(
        [system("Good"), system("Stalling")], SAVE, rate=500.0, duration=0.5, steady=1.0
    )
    good, stalling = (results.cell(each, SAVE.name) for each in ("Good", "Stalling"))
    assert good is not None
    assert stalling is not None
    assert results.failures == []
    # Two fifths of the scheduled operations fell into a stall of a fifth of a second. In a closed loop
    # only the eight running operations would have been affected.
    assert stalling.calm.percentile(0.9) > 0.1
    assert stalling.calm.percentile(0.99) > 0.17
    assert good.calm.percentile(0.9) < stalling.calm.percentile(0.9)
    assert stalling.rate < 0.9 * good.rate


async def test_processor_time_and_memory_are_measured(measure: Measure) -> None:
    systems = [system(each) for each in ("Good", "Burning", "Hoarding")]
    results = await measure(systems, SAVE, steady=0.0, duration=0.2)
    good, burning, hoarding = (results.cell(each.name, SAVE.name) for each in systems)
    assert good is not None
    assert burning is not None
    assert hoarding is not None
    assert results.failures == []
    assert burning.processor > 0.001
    assert good.processor < 0.5 * burning.processor
    saved = [sum(each.units for each in hoarding.rounds[: n + 1]) for n in range(3)]
    # The median of three rounds is the memory of the process after the second one.
    assert hoarding.memory > 0.9 * 100_000 * saved[1]
    assert hoarding.memory > good.memory + 5e6


@pytest.mark.parametrize(
    ("fault", "load", "said"),
    [
        ("Losing", SAVE, "acknowledged"),
        ("Lying", Load(workload="get", tasks=8, entities=1000), "wrong answer"),
        ("Refusing", SAVE, "operations ended in RuntimeError"),
        ("Dying", SAVE, "ended"),
        ("Half", Load(workload="acquire", tasks=1, entities=100, burst=50), "not all there"),
    ],
)
async def test_a_run_against_a_broken_engine_fails(
    measure: Measure, fault: str, load: Load, said: str
) -> None:
    results = await measure([system("Good"), system(fault)], load, rounds=2, steady=0.0)
    assert results.failures
    assert all(each.startswith(f"{fault}: ") and said in each for each in results.failures[:1])
    assert not [each for each in results.failures if each.startswith("Good")]


async def test_every_workload_passes_and_does_its_work(measure: Measure) -> None:
    from hf_async_store_bench.workloads import WORKLOADS

    loads = [
        Load(workload=each, tasks=4, entities=500, burst=50)
        for each in WORKLOADS
        if each != "one-shot"
    ]
    systems = chosen(["json"])[:1]
    # At a given rate, because half of the measured one may be too slow to be tried on a busy machine.
    results = await measure(systems, *loads, rounds=1, duration=0.1, steady=0.1, rate=100.0)
    assert results.failures == []
    for load in loads:
        cell = results.cell("json", load.name)
        assert cell is not None, load.name
        assert cell.rate > 0
        assert cell.checked > 0
        assert cell.calm.count > 0


async def test_several_processes_write_and_all_of_it_is_verified(measure: Measure) -> None:
    loads = [
        Load(workload="save", tasks=4, processes=3, entities=300),
        Load(workload="contend", tasks=2, processes=3, entities=300),
    ]
    results = await measure(chosen(["json"])[:1], *loads, rounds=1, steady=0.0)
    assert results.failures == []
    for load in loads:
        cell = results.cell("json", load.name)
        assert cell is not None
        assert cell.checked > 0
    counted = results.cell("json", loads[1].name)
    assert counted is not None
    assert counted.rounds[0].operations > 3


async def test_unmeasurable_systems_are_skipped_by_name(measure: Measure) -> None:
    load = Load(workload="save", tasks=2, processes=2, entities=100)
    missing = system("Good")
    absent = type(missing)(
        name="absent",
        role="competitor",
        engine="memory",
        adapter="x:Y",
        needs="nothing",
        package="absent",
    )
    results = await measure([missing, absent], load, Load(workload="one-shot", entities=100))
    skipped = {each.what: each.why for each in results.skipped}
    assert skipped["absent"] == "absent is not installed"
    assert skipped[f"Good: {load.name}"] == "its data is in the memory of one process"
    assert "no other process" in skipped["Good: one-shot, 64 tasks"]
    assert results.failures == []
