"""Checkers of recorded histories: is there an order of the operations that explains every result?

`unlinearizable` checks operations on single keys: the order must also respect real time.
`unserializable` checks transactions over several keys. Both return descriptions of the violations,
and an empty list for a history that a correct store could have produced.
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
"""The state of one key: a version and a value, or None if there is no entity."""

Answer: TypeAlias = "tuple[int, str] | int | bool | str | None"
"""The result of an operation: the state for a get, the new version for a write, whether the entity
existed for a delete; or the class name of the error that it raised."""


class Act(msgspec.Struct, frozen=True, kw_only=True):
    """One operation on one key, as its caller saw it.

    Attributes:
        value: the value that is written; it differs for all operations.
        expect: the precondition: "any", "absent" or an exact version.
        invoked, responded: times on one clock for all callers. `responded` is None if the outcome
            is unknown; then the operation may have taken effect at any later time, or never.
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
    """For each key whose results no order explains: the longest order that could be found.

    The algorithm is that of Wing and Gong, with Lowe's cache of the configurations that were
    visited. Keys are checked separately, because a history is linearizable if and only if it is
    linearizable for each key.
    """
    by_key: dict[str, list[Act]] = defaultdict(list)
    for act in acts:
        by_key[act.key].append(act)
    failures = ((key, _Search(each).failure()) for key, each in sorted(by_key.items()))
    return [f"{key!r} is not linearizable: {failure}" for key, failure in failures if failure]


def outcome(state: State, act: Act) -> tuple[State, Answer]:
    """The state after an operation, and its result, on a store without concurrent operations."""
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

    def failure(self) -> str | None:
        """None if there is an order; else a description of the longest order that was found."""
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
        return self._description(*best)

    def _steps(self, done: int, state: State) -> Iterator[tuple[int, State]]:
        """The configurations that one more operation can lead to."""
        changing: list[tuple[int, State]] = []
        for n in self._next(done):
            act = self._acts[n]
            after, answer = outcome(state, act)
            if after != state:
                if act.responded is None or _same(answer, act.answer):
                    changing.append((done | 1 << n, after))
            elif act.responded is not None and _same(answer, act.answer):
                # An operation that changes nothing cannot prevent another one, so no alternatives
                # have to be tried.
                yield done | 1 << n, state
                return
        yield from changing

    def _next(self, done: int) -> Iterator[int]:
        """The operations that may come next: those that began before any remaining one had ended."""
        first_end = _NEVER
        # The first operation that is not done; all before it are.
        n = (~done & (done + 1)).bit_length() - 1
        while n < len(self._acts):
            if not done >> n & 1:
                if self._acts[n].invoked > first_end:
                    return
                yield n
                first_end = min(first_end, self._ends[n])
            n += 1

    def _description(self, done: int, state: State) -> str:
        blocked = "\n  ".join(str(self._acts[n]) for n in self._next(done))
        return (
            f"after {done.bit_count()} of {len(self._acts)} operations the state is {state}, "
            f"and none of these operations can come next:\n  {blocked}"
        )


def _same(answer: Answer, recorded: Answer) -> bool:
    return type(answer) is type(recorded) and answer == recorded


# -- transactions ---------------------------------------------------------------------------

Installed: TypeAlias = tuple[int, str]
"""A version of a key and its value; (0, "") stands for no entity."""

NOTHING: Final[Installed] = (0, "")


class Txn(msgspec.Struct, frozen=True, kw_only=True):
    """One transaction, or a single operation, as its caller saw it. It contains no deletes.

    Attributes:
        reads: the keys, with the version and value that it read before its own first write there.
        writes: by key, the versions that it wrote, in order; others may only see the last one.
        committed: None if the outcome is unknown.
        began, ended: times on one clock for all callers.
    """

    caller: str
    reads: list[tuple[str, Installed]]
    writes: dict[str, list[Installed]]
    committed: bool | None
    began: int
    ended: int


_Edges: TypeAlias = "dict[int, dict[int, str]]"


def unserializable(history: Sequence[Txn], initial: Mapping[str, Installed]) -> list[str]:
    """The observations that no serial order of the transactions explains.

    The versions give the order of the writes of each key, so the complete dependency graph is known,
    and a serial order exists if and only if the graph has no cycle (Adya). A transaction must also
    see everything that was committed before it began.

    Args:
        initial: the initial version and value of each key; `NOTHING` for a key without an entry.
    """
    txns = _effective(history)
    problems, writers = _writers(txns, initial)
    problems += _unexplained_reads(txns, writers, initial)
    problems += _stale_reads(txns)
    if problems:
        return problems
    cycle = _cycle(_edges(txns, writers))
    return [] if cycle is None else [_cycle_description(txns, *cycle)]


def _effective(history: Sequence[Txn]) -> list[Txn]:
    """The transactions that took effect: the committed ones, and those with an unknown outcome whose
    writes a committed transaction has read."""
    seen = {item for txn in history if txn.committed for item in txn.reads}
    return [
        txn
        for txn in history
        if txn.committed
        or (
            txn.committed is None
            and any((key, versions[-1]) in seen for key, versions in txn.writes.items())
        )
    ]


def _writers(
    txns: Sequence[Txn], initial: Mapping[str, Installed]
) -> tuple[list[str], dict[str, dict[int, int]]]:
    """Violations of the version order; and by key and version, the transaction that committed it."""
    problems: list[str] = []
    first_writers: dict[tuple[str, int], int] = {}
    writers: dict[str, dict[int, int]] = defaultdict(dict)
    for n, txn in enumerate(txns):
        for key, versions in txn.writes.items():
            writers[key][versions[-1][0]] = n
            if versions[-1][0] - versions[0][0] != len(versions) - 1:
                problems.append(
                    f"the writes of {_short(txn)} to {key!r} were interrupted by another transaction"
                )
            for version, _ in versions:
                first = first_writers.setdefault((key, version), n)
                if first != n or version <= initial.get(key, NOTHING)[0]:
                    problems.append(
                        f"an update was lost: version {version} of {key!r} was written twice: "
                        f"{_short(txns[first])} and {_short(txn)}"
                    )
    return problems, writers


def _unexplained_reads(
    txns: Sequence[Txn], writers: Mapping[str, Mapping[int, int]], initial: Mapping[str, Installed]
) -> list[str]:
    """Reads of values that no transaction committed: dirty, intermediate or invented ones."""
    problems: list[str] = []
    for txn in txns:
        for key, seen in txn.reads:
            writer = writers.get(key, {}).get(seen[0])
            expected = initial.get(key, NOTHING) if writer is None else txns[writer].writes[key][-1]
            if seen != expected:
                problems.append(
                    f"{_short(txn)} read {seen} from {key!r}, which no transaction committed"
                )
    return problems


def _stale_reads(txns: Sequence[Txn]) -> list[str]:
    """Reads of a version older than one that was committed before the reading transaction began."""
    problems: list[str] = []
    for txn in txns:
        for key, (version, _) in txn.reads:
            problems += [
                f"{_short(txn)} read version {version} of {key!r}, though version "
                f"{other.writes[key][-1][0]} was committed before it began, by {_short(other)}"
                for other in txns
                if key in other.writes
                and other.committed
                and other.ended < txn.began
                and other.writes[key][-1][0] > version
            ]
    return problems


def _edges(txns: Sequence[Txn], writers: Mapping[str, Mapping[int, int]]) -> _Edges:
    """The dependency graph: which transaction must precede which, and why."""
    edges: _Edges = defaultdict(dict)

    def edge(before: int, after: int, why: str) -> None:
        if before != after:
            edges[before].setdefault(after, why)

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
    """A cycle in the graph, with the reason for each edge."""
    finished: set[int] = set()
    for root in list(edges):
        path = [root]
        branches = [iter(edges[root].items())]
        while path:
            step = next(branches[-1], None)
            if step is None:
                finished.add(path.pop())
                branches.pop()
            elif step[0] in path:
                walk = path[path.index(step[0]) :]
                return walk, [edges[a][b] for a, b in pairwise([*walk, walk[0]])]
            elif step[0] not in finished:
                path.append(step[0])
                branches.append(iter(edges.get(step[0], {}).items()))
    return None


def _cycle_description(txns: Sequence[Txn], walk: Sequence[int], reasons: Sequence[str]) -> str:
    steps = "\n  ".join(f"{_short(txns[n])} {why}" for n, why in zip(walk, reasons, strict=True))
    return (
        "there is no serial order, because these transactions form a cycle:\n"
        f"  {steps}\n  the first of them"
    )


def _short(txn: Txn) -> str:
    return f"[{txn.caller} read {txn.reads} wrote {txn.writes}]"
