"""Scenarios return figures with confidence bounds, measured in separate processes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from faulty_systems import Measure

from hf_async_store_bench import executor, queries, scenarios, targets
from hf_async_store_bench.messages import Measurement, WrongAnswerError
from hf_async_store_bench.scenarios import SCENARIOS
from hf_async_store_bench.systems import named


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scenarios on small stores."""
    for name, each in SCENARIOS.items():
        sizes = tuple(min(size, 2000 * (1 + place)) for place, size in enumerate(each.sizes))
        monkeypatch.setitem(SCENARIOS, name, each._replace(sizes=sizes, runs=min(each.runs, 2)))


@pytest.mark.hf_sampled(by="module")
@pytest.mark.parametrize(
    "name",
    [
        "opening",
        "soak of json",
        *(
            pytest.param(each, marks=pytest.mark.long)
            for each in ("event loop", "memory", "migration memory")
        ),
    ],
)
async def test_a_json_scenario_returns_figures(measure: Measure, name: str) -> None:
    results = await measure([named("json")], scenarios=(name,))
    assert results.failures == []
    assert results.skipped == []
    assert results.figures
    for figure in results.figures:
        assert figure.engine == "json"
        assert figure.what.startswith(f"{name}: ")
        assert figure.value is not None
        assert (figure.met is None) == (not figure.target)
    assert any(each.target for each in results.figures)


@pytest.mark.hf_sampled(by="module")
@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("json", None),
        pytest.param("sqlite", "sqlite3 batched by hand", marks=pytest.mark.long),
        pytest.param("postgresql", "asyncpg batched by hand", marks=pytest.mark.long),
    ],
)
async def test_queries_are_measured_on_stores_of_several_sizes(
    measure: Measure, name: str, by_hand: str | None
) -> None:
    results = await measure([named(name)], scenarios=(f"queries of {name}",))
    assert results.failures == []
    assert [each.workload for each in results.sweeps] == [each.name for each in queries.QUERIES]
    for sweep in results.sweeps:
        assert [each.system for each in sweep.curves] == [name, *filter(None, [by_hand])]
        assert all([i.size for i in each.points] == [1000, 2000] for each in sweep.curves)
    bounds = {each.target for each in results.figures}
    assert bounds == {"at most 1.5", "at most 1.3" if by_hand else "at most 1"}


async def test_a_query_that_finds_too_little_is_a_wrong_answer() -> None:
    async def nothing() -> list[object]:
        return []

    side = queries.Side("json", 1000, [nothing], nothing)
    with pytest.raises(WrongAnswerError, match="newest 50: 0 machines of 1,000"):
        await queries._seconds(queries.QUERIES[1], side, nothing)


@pytest.mark.hf_sampled(by="module")
async def test_a_backup_is_compared_with_plain_compression(measure: Measure) -> None:
    results = await measure(
        [named("json"), named("sqlite")], scenarios=("backup", "backup of sqlite")
    )
    assert results.failures == []
    assert {each.engine for each in results.figures} == {"json", "sqlite"}


def test_the_larger_of_two_sizes_is_scaled_to_the_smaller() -> None:
    one = Measurement(what="peak", samples=[10.0], unit="MB", at_most=1.2)
    more = msgspec.structs.replace(one, samples=[15.0])
    (figure,) = targets.scenario_figures(
        "migration memory", {100: {"peak": one}, 200: {"peak": more}}
    )
    assert (figure.value, figure.unit, figure.met) == (1.5, "x", False)
    assert "200 against 100 machines" in figure.what


@pytest.mark.hf_sampled(by="module")
async def test_a_scenario_that_raises_is_a_failure(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCENARIOS, "gone", SCENARIOS["opening"])  # the worker does not have it
    results = await measure([named("json")], scenarios=("gone",))
    assert any("KeyError" in each for each in results.failures)


@pytest.mark.hf_sampled(by="module")
async def test_scenarios_beyond_the_time_budget_are_skipped(measure: Measure) -> None:
    results = await measure([named("json")], scenarios=("memory",), budget=1.0)
    assert [each.what for each in results.skipped] == ["scenario memory"]


def test_every_scenario_has_a_known_system(tmp_path: Path) -> None:
    for each in SCENARIOS.values():
        assert named(each.system).role == "strategy"
    assert scenarios.SCENARIOS is executor.SCENARIOS
