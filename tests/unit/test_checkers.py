"""The consistency checkers, on histories with known violations."""

from __future__ import annotations

from itertools import count, pairwise, permutations
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_async_store.testing.consistency_checkers import (
    NOTHING,
    Act,
    Txn,
    outcome,
    unlinearizable,
    unserializable,
)
from hf_async_store.testing.repetitions import repetitions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hf_async_store.testing.consistency_checkers import Installed, State

# -- single keys ----------------------------------------------------------------------------


def act(verb: Any, answer: Any, invoked: int, responded: int | None, **more: Any) -> Act:
    return Act(
        caller="c",
        key="k",
        verb=verb,
        answer=answer,
        invoked=invoked,
        responded=responded,
        **more,
    )


def save(value: str, answer: Any, invoked: int, responded: int | None, **more: Any) -> Act:
    return act("save", answer, invoked, responded, value=value, **more)


def get(answer: Any, invoked: int, responded: int) -> Act:
    return act("get", answer, invoked, responded)


GOOD_ACTS: dict[str, list[Act]] = {
    "nothing": [],
    "a life": [
        get(None, 0, 1),
        save("a", 1, 2, 3, expect="absent"),
        act("update", 2, 4, 5, value="b", expect=1),
        save("c", "ConcurrencyConflictError", 6, 7, expect=1),
        save("c", "AlreadyExistsError", 8, 9, expect="absent"),
        get((2, "b"), 10, 11),
        act("delete", True, 12, 13, expect=2),
        act("delete", False, 14, 15),
        act("delete", "EntityNotFoundError", 16, 17, expect=2),
        act("update", "EntityNotFoundError", 18, 19),
        save("d", 1, 20, 21),
    ],
    "a read beside a write sees the old": [
        save("a", 1, 0, 1),
        save("b", 2, 2, 9),
        get((1, "a"), 3, 4),
    ],
    "a read beside a write sees the new": [
        save("a", 1, 0, 1),
        save("b", 2, 2, 9),
        get((2, "b"), 3, 4),
    ],
    "writes side by side in the other order": [save("a", 2, 0, 9), save("b", 1, 1, 8)],
    "an unknown outcome that took effect": [save("a", None, 0, None), get((1, "a"), 5, 6)],
    "an unknown outcome that took effect late": [
        save("a", None, 0, None),
        get(None, 5, 6),
        get((1, "a"), 7, 8),
    ],
    "an unknown outcome that never took effect": [save("a", None, 0, None), get(None, 5, 6)],
    "an unknown update that finds its entity later": [
        act("update", None, 0, None, value="a"),
        get(None, 1, 2),
        save("b", 1, 3, 4),
        get((2, "a"), 5, 6),
    ],
    "other keys": [
        save("a", 1, 0, 1),
        Act(caller="c", key="other", verb="get", invoked=2, responded=3),
    ],
}

BAD_ACTS: dict[str, list[Act]] = {
    "a stale read": [save("a", 1, 0, 1), save("b", 2, 2, 3), get((1, "a"), 4, 5)],
    "a write that vanished": [save("a", 1, 0, 1), get(None, 2, 3)],
    "a lost update": [
        save("a", 1, 0, 1),
        save("b", 2, 2, 9, expect=1),
        save("c", 2, 3, 8, expect=1),
    ],
    "a value that nobody wrote": [save("a", 1, 0, 1), get((1, "b"), 2, 3)],
    "a version that nobody made": [save("a", 1, 0, 1), get((2, "a"), 2, 3)],
    "a read from the future": [get((1, "a"), 0, 1), save("a", 1, 2, 3)],
    "reads that go back": [
        save("a", 1, 0, 1),
        save("b", 2, 2, 20),
        get((2, "b"), 3, 4),
        get((1, "a"), 5, 6),
    ],
    "readers that disagree on the order": [
        save("a", 1, 0, 20),
        save("b", 2, 0, 20),
        get((2, "b"), 1, 2),
        get((1, "a"), 3, 4),
    ],
    "a conflict with nobody": [
        save("a", 1, 0, 1),
        save("b", "ConcurrencyConflictError", 2, 3, expect=1),
    ],
    "two creators": [save("a", 1, 0, 9, expect="absent"), save("b", 1, 0, 9, expect="absent")],
    "two deletes of one life": [
        save("a", 1, 0, 1),
        act("delete", True, 2, 9),
        act("delete", True, 3, 8),
    ],
    "a delete that did nothing": [
        save("a", 1, 0, 1),
        act("delete", True, 2, 3),
        get((1, "a"), 4, 5),
    ],
    "an update of nothing that inserted": [act("update", 1, 0, 1, value="a"), get((1, "a"), 2, 3)],
    "a version left out": [save("a", 1, 0, 1), save("b", 3, 2, 3)],
    "an unknown outcome that took effect twice": [
        save("a", None, 0, None),
        get((1, "a"), 1, 2),
        act("delete", True, 3, 4),
        get((1, "a"), 5, 6),
    ],
    "an unknown outcome before it was asked for": [get((1, "a"), 0, 1), save("a", None, 2, None)],
}


@pytest.mark.parametrize("name", GOOD_ACTS)
def test_a_linearizable_history_passes(name: str) -> None:
    assert unlinearizable(GOOD_ACTS[name]) == []


@pytest.mark.parametrize("name", BAD_ACTS)
def test_a_history_that_is_not_linearizable_is_found(name: str) -> None:
    [told] = unlinearizable(BAD_ACTS[name])
    assert "'k' is not linearizable" in told


def test_each_key_with_a_violation_is_reported() -> None:
    acts = [
        Act(caller="c", key=key, verb="get", answer=(1, "x"), invoked=0, responded=1)
        for key in ("b", "a")
    ]
    assert [told[:3] for told in unlinearizable(acts)] == ["'a'", "'b'"]


ANSWERS: list[Any] = [
    None,
    1,
    2,
    True,
    False,
    (1, "v0"),
    (2, "v1"),
    "EntityNotFoundError",
    "AlreadyExistsError",
    "ConcurrencyConflictError",
]


@st.composite
def acts_of_a_store(draw: st.DrawFn) -> list[Act]:
    """A history of a correct store: each operation takes effect at one moment of its interval."""
    state: State = None
    acts: list[Act] = []
    for n in range(draw(st.integers(1, 25))):
        moment = 10 * n
        made = act(
            draw(st.sampled_from(("get", "save", "update", "delete"))),
            None,
            moment - draw(st.integers(0, 60)),
            moment + draw(st.integers(0, 60)),
            value=f"v{n}",
            expect=draw(st.sampled_from(("any", "any", 1, 2))),
        )
        state, answer = outcome(state, made)
        acts.append(changed(made, answer=answer))
    return acts


def changed(made: Act, **more: Any) -> Act:
    values = {name: getattr(made, name) for name in made.__struct_fields__}
    return Act(**{**values, **more})


@given(acts=acts_of_a_store())
def test_a_history_of_a_correct_store_is_linearizable(acts: list[Act]) -> None:
    assert unlinearizable(acts) == []


@given(acts=acts_of_a_store(), unknown=st.sets(st.integers(0, 24)))
def test_unknown_outcomes_do_not_cause_violations(acts: list[Act], unknown: set[int]) -> None:
    lost = [
        changed(each, responded=None, answer=None) if n in unknown else each
        for n, each in enumerate(acts)
    ]
    assert unlinearizable(lost) == []


@st.composite
def any_acts(draw: st.DrawFn) -> list[Act]:
    """A few operations with arbitrary results."""
    acts: list[Act] = []
    for n in range(draw(st.integers(1, 5))):
        invoked = draw(st.integers(0, 12))
        acts.append(
            act(
                draw(st.sampled_from(("get", "save", "update", "delete"))),
                draw(st.sampled_from(ANSWERS)),
                invoked,
                draw(st.none() | st.integers(invoked, invoked + 8)),
                value=f"v{n}",
                expect=draw(st.sampled_from(("any", "absent", 1))),
            )
        )
    return acts


@settings(max_examples=repetitions(400))
@given(acts=any_acts() | acts_of_a_store().map(lambda acts: acts[:5]))
def test_the_search_agrees_with_an_exhaustive_search(acts: list[Act]) -> None:
    assert (unlinearizable(acts) == []) == any(map(explains, orders_of(acts)))


def orders_of(acts: Sequence[Act]) -> Iterator[tuple[Act, ...]]:
    """Every order of all operations, also without some of those whose outcome is unknown."""
    unknown = [each for each in acts if each.responded is None]
    for chosen in range(2 ** len(unknown)):
        left_out = [id(each) for n, each in enumerate(unknown) if chosen >> n & 1]
        yield from permutations([each for each in acts if id(each) not in left_out])


def explains(order: Sequence[Act]) -> bool:
    """Whether this order respects real time and explains every result."""
    for n, later in enumerate(order):
        if any(
            later.responded is not None and later.responded < earlier.invoked
            for earlier in order[:n]
        ):
            return False
    state: State = None
    for each in order:
        state, answer = outcome(state, each)
        known = each.responded is not None
        if known and (type(answer) is not type(each.answer) or answer != each.answer):
            return False
    return True


# -- transactions ---------------------------------------------------------------------------


def txn(
    reads: dict[str, Installed] | list[tuple[str, Installed]],
    writes: dict[str, Any],
    committed: bool | None = True,
    began: int = 0,
    ended: int = 9,
) -> Txn:
    """A transaction; `writes` maps a key to the version and value that it wrote, or a list of them."""
    return Txn(
        caller="c",
        reads=list(reads.items()) if isinstance(reads, dict) else reads,
        writes={key: each if isinstance(each, list) else [each] for key, each in writes.items()},
        committed=committed,
        began=began,
        ended=ended,
    )


GOOD_TXNS: dict[str, list[Txn]] = {
    "nothing": [],
    "one after another": [
        txn({"x": NOTHING}, {"x": (1, "a")}, began=0, ended=1),
        txn({"x": (1, "a")}, {"x": (2, "b"), "y": (1, "b")}, began=2, ended=3),
        txn({"x": (2, "b"), "y": (1, "b")}, {}, began=4, ended=5),
    ],
    "side by side, to be put in order": [
        txn({"x": NOTHING}, {"y": (1, "a")}),
        txn({"y": (1, "a")}, {"x": (1, "b")}),
    ],
    "several writes to one key": [
        txn({}, {"x": [(1, "a"), (2, "b")]}),
        txn({"x": (2, "b")}, {"x": (3, "c")}),
    ],
    "an abort that nobody saw": [
        txn({"x": NOTHING}, {"x": (1, "a")}, committed=False),
        txn({"x": NOTHING}, {"x": (1, "b")}),
    ],
    "an unknown end that took effect": [
        txn({}, {"x": (1, "a")}, committed=None),
        txn({"x": (1, "a")}, {}),
    ],
    "an unknown end that did not": [
        txn({}, {"x": (1, "a")}, committed=None),
        txn({"x": NOTHING}, {"x": (1, "b")}),
    ],
    "a read of the old beside a commit": [
        txn({}, {"x": (1, "a")}, began=0, ended=5),
        txn({"x": NOTHING}, {}, began=4, ended=6),
    ],
    # Serializable, but not in real-time order: the writer of y is ordered before that of x.
    "an old read that began before": [
        txn({}, {"x": (1, "a")}, began=0, ended=1),
        txn({"x": (1, "a"), "y": NOTHING}, {}, began=2, ended=9),
        txn({}, {"y": (1, "b")}, began=3, ended=4),
    ],
}

BAD_TXNS: dict[str, tuple[str, list[Txn]]] = {
    "a lost update": (
        "written twice",
        [txn({"x": NOTHING}, {"x": (1, "a")}), txn({"x": NOTHING}, {"x": (1, "b")})],
    ),
    "an update that went back": ("written twice", [txn({}, {"z": (3, "a")})]),
    "a dirty read": (
        "no transaction committed",
        [txn({}, {"x": (1, "a")}, committed=False), txn({"x": (1, "a")}, {})],
    ),
    "a read of half a transaction": (
        "no transaction committed",
        [txn({}, {"x": [(1, "a"), (2, "b")]}), txn({"x": (1, "a")}, {})],
    ),
    "a version with another value": (
        "no transaction committed",
        [txn({}, {"x": (1, "a")}), txn({"x": (1, "b")}, {})],
    ),
    "a value out of nowhere": ("no transaction committed", [txn({"x": (7, "a")}, {})]),
    "what there was at first, changed": (
        "no transaction committed",
        [txn({"z": (3, "other")}, {})],
    ),
    "a write between two of another": (
        "interrupted",
        [txn({}, {"x": [(1, "a"), (3, "c")]}), txn({}, {"x": (2, "b")})],
    ),
    "write skew": (
        "cycle",
        [
            txn({"x": NOTHING, "y": NOTHING}, {"x": (1, "a")}),
            txn({"x": NOTHING, "y": NOTHING}, {"y": (1, "b")}),
        ],
    ),
    "half of a commit": (
        "cycle",
        [txn({}, {"x": (1, "a"), "y": (1, "a")}), txn({"x": (1, "a"), "y": NOTHING}, {})],
    ),
    "two reads that differ": (
        "cycle",
        [txn([("x", NOTHING), ("x", (1, "a"))], {}), txn({}, {"x": (1, "a")})],
    ),
    "readers that disagree on the order": (
        "cycle",
        [
            txn({}, {"x": (1, "a")}),
            txn({}, {"y": (1, "b")}),
            txn({"x": (1, "a"), "y": NOTHING}, {}),
            txn({"x": NOTHING, "y": (1, "b")}, {}),
        ],
    ),
    "what each got from the other": (
        "cycle",
        [txn({"y": (1, "b")}, {"x": (1, "a")}), txn({"x": (1, "a")}, {"y": (1, "b")})],
    ),
    "writes in opposed orders": (
        "cycle",
        [
            txn({}, {"x": (1, "a"), "y": (2, "a")}),
            txn({}, {"x": (2, "b"), "y": (1, "b")}),
        ],
    ),
    "a stale read": (
        "before it began",
        [txn({}, {"x": (1, "a")}, began=0, ended=1), txn({"x": NOTHING}, {}, began=2, ended=3)],
    ),
    "an unknown end that was seen by half": (
        "cycle",
        [
            txn({}, {"x": (1, "a"), "y": (1, "a")}, committed=None),
            txn({"x": (1, "a"), "y": NOTHING}, {}),
        ],
    ),
}

INITIAL = {"z": (3, "start")}


@pytest.mark.parametrize("name", GOOD_TXNS)
def test_a_serializable_history_passes(name: str) -> None:
    assert unserializable(GOOD_TXNS[name], INITIAL) == []


@pytest.mark.parametrize("name", BAD_TXNS)
def test_a_history_that_is_not_serializable_is_found(name: str) -> None:
    reason, txns = BAD_TXNS[name]
    problems = unserializable(txns, INITIAL)
    assert any(reason in each for each in problems), problems


def test_a_long_cycle_is_described_step_by_step() -> None:
    keys = [f"k{n}" for n in range(6)]
    txns = [txn({here: NOTHING}, {there: (1, "x")}) for here, there in pairwise([*keys, keys[0]])]
    [told] = unserializable(txns, {})
    assert told.count("before it was written by") == 6


@st.composite
def interleaved(draw: st.DrawFn, *, careful: bool) -> list[Txn]:
    """Transactions on three keys.

    Args:
        careful: the transactions run serially; otherwise their steps are interleaved, and each
            sees the uncommitted writes of the others.
    """
    versions = count(1)
    stored: dict[str, Installed] = {}
    txns = [txn({}, {}) for _ in range(draw(st.integers(1, 4)))]
    turns = [n for n in range(len(txns)) for _ in range(3)]
    if not careful:
        turns = draw(st.permutations(turns))
    for n in turns:
        key = draw(st.sampled_from("xyz"))
        one = txns[n]
        if draw(st.booleans()):
            made = (stored.get(key, NOTHING)[0] + 1, f"v{next(versions)}")
            stored[key] = made
            one.writes.setdefault(key, []).append(made)
        elif key not in one.writes:
            one.reads.append((key, stored.get(key, NOTHING)))
    return txns


@given(txns=interleaved(careful=True), order=st.randoms(use_true_random=False))
def test_a_serial_history_is_serializable(txns: list[Txn], order: Any) -> None:
    order.shuffle(txns)
    assert unserializable(txns, {}) == []


@settings(max_examples=repetitions(400))
@given(txns=interleaved(careful=False))
def test_the_graph_agrees_with_an_exhaustive_search(txns: list[Txn]) -> None:
    assert (unserializable(txns, {}) == []) == any(map(is_serial, permutations(txns)))


def is_serial(order: Sequence[Txn]) -> bool:
    """Whether running the transactions serially in this order gives the recorded reads and versions."""
    stored: dict[str, Installed] = {}
    for one in order:
        if any(stored.get(key, NOTHING) != seen for key, seen in one.reads):
            return False
        for key, made in one.writes.items():
            before = stored.get(key, NOTHING)[0]
            if [version for version, _ in made] != list(range(before + 1, before + len(made) + 1)):
                return False
            stored[key] = made[-1]
    return True
