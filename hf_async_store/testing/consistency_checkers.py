"""Judges of recorded histories: is there an order of the operations that explains every answer?

`unlinearizable` judges operations on single keys: the order must also respect real time.
`unserializable` judges transactions over several keys. Both return what they found wrong, in words,
and nothing for a history that a correct store could have produced.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

# -- single keys ----------------------------------------------------------------------------

State: TypeAlias = "tuple[int, str] | None"
"""What one key holds: a version and a value, or nothing."""

Answer: TypeAlias = "tuple[int, str] | int | bool | str | None"
"""What an operation answered: a get the state, a write its version, a delete whether the entity was
there; each of them the name of an error instead."""


class Act(msgspec.Struct, frozen=True, kw_only=True):
    """One operation on one key, as its caller saw it.

    Attributes:
        value: what is written; no two acts write the same.
        expect: "any", "absent" or an exact version.
        invoked, responded: on one clock for all callers. `responded` is None where it is not known
            whether the operation took effect; then it may have done so at any time, or never.
    """

    caller: str
    key: str
    verb: Literal["get", "save", "update", "delete"]
    invoked: int
    responded: int | None
    answer: Answer = None
    value: str = ""
    expect: int | Literal["any", "absent"] = "any"


def unlinearizable(acts: Iterable[Act]) -> list[str]:
    """For each key without an order that explains its answers: how far an order can be found.

    The search is Wing and Gong's with Lowe's memory of what was tried. Keys are judged apart,
    because a history is linearizable exactly if it is so on each key.
    """
    by_key: dict[str, list[Act]] = defaultdict(list)
    for act in acts:
        by_key[act.key].append(act)
    found = ((key, _Search(each).furthest()) for key, each in sorted(by_key.items()))
    return [f"{key!r} is not linearizable: {stuck}" for key, stuck in found if stuck]


def outcome(state: State, act: Act) -> tuple[State, Answer]:
    """The state after an act and its answer, as a store with nobody else on it would have it."""
    if act.verb == "get":
        return state, state
    refusal = _refusal(state, act)
    if refusal is not None:
        return state, refusal
    if act.verb == "delete":
        return None, state is not None
    version = 1 if state is None else state[0] + 1
    return (version, act.value), version


def _refusal(state: State, act: Act) -> str | None:
    if act.expect == "absent":
        return None if state is None else "AlreadyExistsError"
    if state is None:
        needed = act.verb == "update" or act.expect != "any"
        return "EntityNotFoundError" if needed else None
    return None if act.expect in ("any", state[0]) else "ConcurrencyConflictError"


_NEVER: Final = 2**63


class _Search:
    """The search for an order of the acts on one key."""

    def __init__(self, acts: Sequence[Act]) -> None:
        self._acts = sorted(acts, key=lambda each: each.invoked)
        self._ends = [_NEVER if each.responded is None else each.responded for each in self._acts]
        self._needed = sum(
            1 << n for n, each in enumerate(self._acts) if each.responded is not None
        )

    def furthest(self) -> str | None:
        """None if there is an order; else the point beyond which there is none."""
        start: tuple[int, State] = (0, None)
        seen = {start}
        waiting = [start]
        best = start
        while waiting:
            done, state = waiting.pop()
            if done & self._needed == self._needed:
                return None
            if done.bit_count() > best[0].bit_count():
                best = done, state
            for step in self._steps(done, state):
                if step not in seen:
                    seen.add(step)
                    waiting.append(step)
        return self._told(*best)

    def _steps(self, done: int, state: State) -> Iterator[tuple[int, State]]:
        """Where one more act can lead."""
        changing: list[tuple[int, State]] = []
        for n in self._next(done):
            act = self._acts[n]
            after, answer = outcome(state, act)
            if after != state:
                if act.responded is None or _same(answer, act.answer):
                    changing.append((done | 1 << n, after))
            elif act.responded is not None and _same(answer, act.answer):
                # What changes nothing stands in nobody's way: now is as good as any time.
                yield done | 1 << n, state
                return
        yield from changing

    def _next(self, done: int) -> Iterator[int]:
        """The acts that may come next: none still to come had ended before they began."""
        first_end = _NEVER
        # The lowest act that is not done; all before it are.
        n = (~done & (done + 1)).bit_length() - 1
        while n < len(self._acts):
            if not done >> n & 1:
                if self._acts[n].invoked > first_end:
                    return
                yield n
                first_end = min(first_end, self._ends[n])
            n += 1

    def _told(self, done: int, state: State) -> str:
        blocked = "\n  ".join(str(self._acts[n]) for n in self._next(done))
        return (
            f"after {done.bit_count()} of {len(self._acts)} operations it holds {state}, "
            f"and none of these can come next:\n  {blocked}"
        )


def _same(answer: Answer, recorded: Answer) -> bool:
    return type(answer) is type(recorded) and answer == recorded


# -- transactions ---------------------------------------------------------------------------

Installed: TypeAlias = tuple[int, str]
"""A version of a key and the value that came with it; (0, "") stands for no entity."""

NOTHING: Final[Installed] = (0, "")


class Txn(msgspec.Struct, frozen=True, kw_only=True):
    """One transaction, or single operation, as its caller saw it. There are no deletes in it.

    Attributes:
        reads: each key and what it saw there before it wrote there itself.
        writes: by key: what it installed, in order; only the last is for others to see.
        committed: None where it is not known.
        began, ended: on one clock for all callers.
    """

    caller: str
    reads: list[tuple[str, Installed]]
    writes: dict[str, list[Installed]]
    committed: bool | None
    began: int
    ended: int


_Edges: TypeAlias = "dict[int, dict[int, str]]"


def unserializable(history: Sequence[Txn], initial: Mapping[str, Installed]) -> list[str]:
    """What no serial order of the transactions explains.

    The versions give the order of the writes of each key, so the graph of who must come before whom
    is known in full, and a serial order exists exactly if it has no cycle (Adya). A transaction
    must also see what was committed before it began.

    Args:
        initial: what each key held at first; `NOTHING` where it is left out.
    """
    txns = _effective(history)
    problems, writers = _writers(txns, initial)
    problems += _strange_reads(txns, writers, initial)
    problems += _stale_reads(txns)
    if problems:
        return problems
    cycle = _cycle(_edges(txns, writers))
    return [] if cycle is None else [_told(txns, *cycle)]


def _effective(history: Sequence[Txn]) -> list[Txn]:
    """The transactions that took effect; of those nobody knows about, the ones others have seen."""
    seen = {item for txn in history if txn.committed for item in txn.reads}
    return [
        txn
        for txn in history
        if txn.committed
        or (
            txn.committed is None
            and any((key, made[-1]) in seen for key, made in txn.writes.items())
        )
    ]


def _writers(
    txns: Sequence[Txn], initial: Mapping[str, Installed]
) -> tuple[list[str], dict[str, dict[int, int]]]:
    """By key and version: which transaction left it behind. And what is wrong with the versions."""
    problems: list[str] = []
    made_by: dict[tuple[str, int], int] = {}
    writers: dict[str, dict[int, int]] = defaultdict(dict)
    for n, txn in enumerate(txns):
        for key, made in txn.writes.items():
            writers[key][made[-1][0]] = n
            if made[-1][0] - made[0][0] != len(made) - 1:
                problems.append(f"{_short(txn)} was interrupted in its writes to {key!r}")
            for version, _ in made:
                first = made_by.setdefault((key, version), n)
                if first != n or version <= initial.get(key, NOTHING)[0]:
                    problems.append(
                        f"an update was lost: version {version} of {key!r} was made twice: "
                        f"{_short(txns[first])} and {_short(txn)}"
                    )
    return problems, writers


def _strange_reads(
    txns: Sequence[Txn], writers: Mapping[str, Mapping[int, int]], initial: Mapping[str, Installed]
) -> list[str]:
    """Reads of what no transaction left behind: dirty, half done, or made up."""
    problems: list[str] = []
    for txn in txns:
        for key, seen in txn.reads:
            writer = writers.get(key, {}).get(seen[0])
            left = initial.get(key, NOTHING) if writer is None else txns[writer].writes[key][-1]
            if seen != left:
                problems.append(
                    f"{_short(txn)} saw {seen} in {key!r}, which no transaction left there"
                )
    return problems


def _stale_reads(txns: Sequence[Txn]) -> list[str]:
    """Reads that miss what was committed before their transaction began."""
    problems: list[str] = []
    for txn in txns:
        for key, (version, _) in txn.reads:
            problems += [
                f"{_short(txn)} saw version {version} of {key!r}, though version "
                f"{other.writes[key][-1][0]} was committed before it began, by {_short(other)}"
                for other in txns
                if key in other.writes
                and other.committed
                and other.ended < txn.began
                and other.writes[key][-1][0] > version
            ]
    return problems


def _edges(txns: Sequence[Txn], writers: Mapping[str, Mapping[int, int]]) -> _Edges:
    """Who must come before whom, and why."""
    edges: _Edges = defaultdict(dict)

    def edge(before: int, behind: int, why: str) -> None:
        if before != behind:
            edges[before].setdefault(behind, why)

    for key, by_version in writers.items():
        for low, high in pairwise(sorted(by_version)):
            edge(by_version[low], by_version[high], f"wrote {key!r} before")
    for n, txn in enumerate(txns):
        for key, (version, _) in txn.reads:
            by_version = writers.get(key, {})
            if version in by_version:
                edge(by_version[version], n, f"wrote the {key!r} that was read by")
            later = [each for each in by_version if each > version]
            if later:
                edge(n, by_version[min(later)], f"read {key!r} before it was written by")
    return edges


def _cycle(edges: _Edges) -> tuple[list[int], list[str]] | None:
    """A walk that comes back to where it began, with the reason for each step."""
    finished: set[int] = set()
    for root in list(edges):
        path = [root]
        ways = [iter(edges[root].items())]
        while path:
            step = next(ways[-1], None)
            if step is None:
                finished.add(path.pop())
                ways.pop()
            elif step[0] in path:
                walk = path[path.index(step[0]) :]
                return walk, [edges[a][b] for a, b in pairwise([*walk, walk[0]])]
            elif step[0] not in finished:
                path.append(step[0])
                ways.append(iter(edges.get(step[0], {}).items()))
    return None


def _told(txns: Sequence[Txn], walk: Sequence[int], reasons: Sequence[str]) -> str:
    steps = "\n  ".join(f"{_short(txns[n])} {why}" for n, why in zip(walk, reasons, strict=True))
    return f"no serial order, for these go round in a circle:\n  {steps}\n  the first of them"


def _short(txn: Txn) -> str:
    return f"[{txn.caller} read {txn.reads} wrote {txn.writes}]"
