"""The check of acknowledged writes: accepted and reported deviations."""

from __future__ import annotations

import asyncio

import pytest

from hf_async_store import ConcurrencyConflictError, UnavailableError
from hf_async_store_bench.acked_writes import AckedWrites, add_all, lost_writes, writing

REFUSED = UnavailableError("refused")
UNKNOWN = UnavailableError("no response", outcome_unknown=True)


def noted(*ends: BaseException | None) -> AckedWrites:
    entry = AckedWrites()
    for end in ends:
        try:
            with writing(entry):
                if end is not None:
                    raise end
        except BaseException as exc:
            assert exc is end
    return entry


@pytest.mark.parametrize(
    ("end", "counted"),
    [
        (None, (1, 0)),
        (REFUSED, (0, 0)),
        (ConcurrencyConflictError("late"), (0, 0)),
        (UNKNOWN, (0, 1)),
        (asyncio.CancelledError(), (0, 1)),
        (RuntimeError("of a driver"), (0, 1)),
    ],
)
def test_the_outcome_of_a_write_determines_its_class(
    end: BaseException | None, counted: tuple[int, int]
) -> None:
    entry = noted(end)
    assert (entry.acknowledged, entry.unknown) == counted


@pytest.mark.parametrize(
    ("stored", "holds"), [(4, False), (5, True), (6, True), (7, False), (None, False), (5.0, False)]
)
def test_a_counter_is_between_acknowledged_and_attempted_increments(
    stored: object, holds: bool
) -> None:
    entry = noted(None, None, UNKNOWN, REFUSED)
    assert (entry.wrong_count(stored, first=3) is None) is holds
    if type(stored) is int:
        assert (entry.wrong_version(stored, first=3) is None) is holds


def test_lost_writes_are_named() -> None:
    acked = {"a": noted(None), "b": noted(None, None), "c": noted(REFUSED), "d": noted(UNKNOWN)}
    stored = {"a": None, "b": {"n": 1, "version": 1}, "c": {"n": 1, "version": 1}, "d": None}
    failures = lost_writes(acked, stored.items(), counter="n", first_version={})
    assert [each.partition(":")[0] for each in failures] == ["a", "b", "b", "c", "c"]
    assert failures[0] == "a: not there, and 1 writes were acknowledged"
    assert failures[1] == "b: counts 1, 2 were acknowledged"
    whole = {"a": {"version": 1}, "b": {"version": 2}, "c": None, "d": {"version": 1}}
    assert lost_writes(acked, whole.items(), first_version={}) == []


def test_the_writes_of_several_processes_are_merged() -> None:
    acked = {"a": noted(None, UNKNOWN)}
    add_all(acked, {"a": noted(None, None), "b": noted(None)})
    assert acked["b"] == noted(None)
    entry = acked["a"]
    assert (entry.acknowledged, entry.unknown, entry.tried) == (3, 1, 4)
