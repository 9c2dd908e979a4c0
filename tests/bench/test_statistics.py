"""Confidence intervals contain the true value, and a comparison distinguishes changes from noise."""

from __future__ import annotations

import math
import random

import pytest

from hf_async_store_bench.compare import as_table, differences, drift
from hf_async_store_bench.messages import Load, RoundStats
from hf_async_store_bench.results import Cell, Results
from hf_async_store_bench.statistics import exponent, ratio_of_pairs, ratio_of_runs

CHANCE = random.Random(7)


def rounds(rate: float, noise: float, count: int = 5) -> list[float]:
    return [rate * math.exp(CHANCE.gauss(0, noise)) for _ in range(count)]


def test_an_interval_of_five_rounds_nearly_always_contains_the_true_value() -> None:
    held = 0
    for _ in range(150):
        slow = [
            CHANCE.gauss(0, 0.2) for _ in range(5)
        ]  # noise of the machine, which affects both sides
        ones = [
            2 * rate * math.exp(each) for rate, each in zip(rounds(100, 0.05), slow, strict=True)
        ]
        others = [rate * math.exp(each) for rate, each in zip(rounds(100, 0.05), slow, strict=True)]
        found = ratio_of_pairs(ones, others)
        assert found is not None
        held += found.low <= 2 <= found.high
        assert found.high / found.low < 1.6
    assert held >= 133  # 95 % of 150, minus random variation


def test_the_same_code_is_rarely_reported_as_changed() -> None:
    old, new = (run({f"s{each}": rounds(100, 0.04) for each in range(60)}) for _ in range(2))
    changed = [each for each in differences(old, new) if each.word != "same within the noise"]
    assert len(changed) <= 6


@pytest.mark.parametrize(("factor", "word"), [(0.8, "slower"), (1.25, "faster")])
def test_a_change_beyond_the_noise_is_reported(factor: float, word: str) -> None:
    old = run({f"s{each}": rounds(100, 0.02) for each in range(20)})
    new = run({f"s{each}": rounds(100 * factor, 0.02) for each in range(20)})
    found = differences(old, new)
    assert sum(each.word == word for each in found) >= 19
    assert as_table(found).rows[0][-1] == word


def test_a_small_significant_change_is_not_reported() -> None:
    old, new = run({"s": [100.0] * 5}), run({"s": [102.0] * 5})
    assert differences(old, new)[0].word == "same within the noise"


def test_one_round_proves_nothing() -> None:
    found = ratio_of_runs([10.0], [100.0])
    assert found is not None
    assert (found.low, found.high) == (0, math.inf)
    assert ratio_of_pairs([], []) is None


def test_the_drift_of_the_machine_is_measured_by_the_baselines() -> None:
    old = run({"baseline": [100.0] * 3}, role="baseline")
    new = run({"baseline": [50.0] * 3}, role="baseline")
    assert drift(differences(old, new)) == pytest.approx(0.5)


def test_runs_with_different_settings_are_not_compared() -> None:
    old, new = run({"s": [1.0] * 3}), run({"s": [1.0] * 3}, entities=5)
    assert differences(old, new) == []


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(power: float) -> None:
    sizes = [100.0, 1000.0, 10_000.0, 100_000.0]
    assert exponent([(each, 3 * each**power) for each in sizes]) == pytest.approx(power)
    assert exponent([(1, 1), (10, 10**power)]) == pytest.approx(power)
    assert exponent([(1, 1), (1, 2)]) is None


def run(rates: dict[str, list[float]], role: str = "strategy", entities: int = 100) -> Results:
    return Results(
        made_at="2026-01-01T00:00:00Z",
        mode="test",
        cells=[
            Cell(
                system=name,
                role=role,  # type: ignore[arg-type]
                engine="f",
                load=Load(workload="save", entities=entities),
                unit="saves",
                rounds=[RoundStats(units=round(each * 1000), seconds=1000.0) for each in found],
            )
            for name, found in rates.items()
        ],
    )
