"""The table of the states of a write, without a server.

`World` is a model of one item with everything that can happen to it: other writers, responses that
are lost, and attempts that are applied late. All sequences up to a certain length are tried.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Final, NamedTuple, get_args

import pytest

from hf_async_store.changes import ABSENT, ANY, PRESENT, Change, Delete, Patch, Put
from hf_async_store.strategies.dynamodb.write_states import (
    ATTEMPTS,
    RESULTS,
    STATEMENTS,
    Doubt,
    Intent,
    Response,
    State,
    StoredItem,
    first_state,
    intent_of,
    next_step,
    response_of,
)
from hf_async_store.values import Key

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.hf_sampled

KEY: Final = Key("items", "a")
WAITING: Final = ATTEMPTS | {"read"}
DOUBTS: Final = get_args(Doubt)
RESPONSES: Final = get_args(Response)
INTENTS: Final = get_args(Intent)
REFUSALS: Final = RESULTS - {"applied", "error", "unknown"}

# -- every pair ------------------------------------------------------------------------------

PAIRS: Final = list(product(sorted(WAITING), DOUBTS, RESPONSES, INTENTS))


@pytest.mark.parametrize("whole", [False, True])
def test_every_response_in_every_state_has_a_next_state(whole: bool) -> None:
    for state, doubt, response, intent in PAIRS:
        step = next_step(state, doubt, response, intent, whole)
        assert step.state in {*ATTEMPTS, *RESULTS, "start", "read"}
        assert step.whole or not whole, "a write of the whole item remains one"
        # A response can raise doubt, but not remove it.
        assert doubt == "none" or step.doubt != "none"
        assert doubt != "open" or step.doubt == "open"


def test_only_the_own_token_is_a_proof_while_there_is_doubt() -> None:
    for state, doubt, response, intent in PAIRS:
        step = next_step(state, doubt, response, intent, False)
        if doubt != "none":
            assert step.state not in REFUSALS, (state, response)
        if step.state == "applied":
            assert response in ("applied", "own")
        if response in ("failed", "lost"):
            assert step.doubt != "none"
            assert step.state not in RESULTS - {"unknown"}


def test_an_attempt_that_may_be_applied_twice_is_not_repeated() -> None:
    repeatable = {"version", "token", "cached", "import"}
    for state, doubt, intent in product(ATTEMPTS, DOUBTS, INTENTS):
        for response in ("failed", "lost"):
            step = next_step(state, doubt, response, intent, False)
            assert step.state == (state if state in repeatable else "read")


def test_a_response_that_contradicts_the_attempt_leaves_the_outcome_unknown() -> None:
    for state, response in (
        ("insert", "missing"),
        ("version", "exists"),
        ("read", "applied"),
        ("token", "silent"),
    ):
        step = next_step(state, "none", response, "create", False)
        assert step.state == "unknown"


def test_statements_that_are_not_supported_end_after_one_more_form() -> None:
    for state, doubt, intent in product(ATTEMPTS, DOUBTS, INTENTS):
        step = next_step(state, doubt, "unsupported", intent, False)
        assert step.whole == (state in STATEMENTS or state == "upsert")
        if step.state in ATTEMPTS:
            again = next_step(step.state, step.doubt, "unsupported", intent, True)
            assert again.state == "error"


CHANGES: Final[dict[Intent, list[Change]]] = {
    "create": [Put(KEY, {}, "", expect=ABSENT)],
    "save": [Put(KEY, {}, "", expect=ANY)],
    "replace": [Put(KEY, {}, "", expect=PRESENT)],
    "change": [Patch(KEY, {}, ""), Delete(KEY, expect=PRESENT)],
    "delete": [Delete(KEY)],
    "expect": [
        Put(KEY, {}, "", expect=0),
        Patch(KEY, {}, "", expect=3),
        Delete(KEY, expect=1),
    ],
}


@pytest.mark.parametrize("intent", INTENTS)
def test_intents(intent: Intent) -> None:
    assert [intent_of(each) for each in CHANGES[intent]] == [intent] * len(CHANGES[intent])


# -- every sequence --------------------------------------------------------------------------

OWN: Final = 0
"""The token of the write. Other writers use the numbers from 1."""
MAX_ATTEMPTS: Final = 4
MAX_RIVALS: Final = 2


class Item(NamedTuple):
    """The stored item, as far as conditions depend on it.

    Attributes:
        has_version: it has the version that the write expects.
        is_older: it was written before the write was requested.
        is_suitable: a statement can change it: its declaration and size are as required.
        is_met: it satisfies the condition of the caller.
    """

    token: int
    has_version: bool = True
    is_older: bool = True
    is_suitable: bool = True
    is_met: bool = True


class Attempt(NamedTuple):
    state: State
    whole: bool
    token: int | None

    def is_met(self, item: Item | None, intent: Intent) -> bool:
        """Whether the condition of the attempt holds."""
        if self.state == "insert":
            return item is None
        if item is None:
            return self.state == "upsert"
        if self.state == "condition" and not item.is_met:
            return False
        if self.state == "version" and not (item.has_version and item.is_older):
            return False
        if self.state in ("token", "cached") and item.token != self.token:
            return False
        return item.is_suitable or self.whole


class World(NamedTuple):
    """The item, the write, and what has happened.

    Attributes:
        observed: the token of the observed item.
        late: attempts without a response, which may still be applied.
        applied: how often the write was applied.
        tokens: the number of tokens of other writers.
        failed: an attempt was applied, but the server reported a failure.
    """

    item: Item | None
    state: State
    observed: int | None = None
    doubt: Doubt = "none"
    whole: bool = False
    late: frozenset[Attempt] = frozenset()
    applied: int = 0
    attempts: int = 0
    tokens: int = 1
    failed: bool = False

    def after(self, response: Response, intent: Intent) -> World:
        """The world after a response to the write, which changes nothing else."""
        step = next_step(self.state, self.doubt, response, intent, self.whole)
        observed = self.observed
        if response == "missing":
            observed = None
        elif response not in ("busy", "failed", "lost", "unsupported"):
            observed = self.item.token if self.item is not None else None
        return self._replace(
            state=step.state, doubt=step.doubt, whole=step.whole, observed=observed
        )

    def seen(self, intent: Intent) -> Response:
        """The response that contains the item."""
        has_version = intent != "expect" or (self.item is not None and self.item.has_version)
        if self.state == "condition" and self.item is not None:
            if not has_version:
                return "other_version"
            return "unmet" if self.item.is_suitable else "unsuitable"
        stored = self.item and StoredItem(
            is_own=self.item.token == OWN,
            has_version=has_version,
            is_older=self.item.is_older,
            is_observed=self.item.token == self.observed,
        )
        return response_of(self.state, stored, whole=self.whole)

    def apply(self, deletes: bool) -> World:
        written = None if deletes else Item(OWN, has_version=False, is_older=False)
        return self._replace(item=written, applied=self.applied + 1)


class Write(NamedTuple):
    """A kind of write: its intent, whether it deletes, and how it starts.

    Attributes:
        puts: its first attempt writes the whole item if its state is in the write cache.
    """

    intent: Intent
    deletes: bool = False
    is_cached: bool = False
    alone: bool = True
    reads_first: bool = False
    whole: bool = False
    conditional: bool = False
    puts: bool = False

    def start(self, world: World) -> World:
        """Choose the first attempt, or again after the cached state was stale."""
        if self.conditional:
            return world._replace(state="condition")
        is_cached = self.is_cached and world.attempts == 0
        state = first_state(
            self.intent,
            whole=world.whole,
            is_cached=is_cached,
            alone=self.alone,
            reads_first=self.reads_first,
        )
        whole = world.whole or (self.puts and is_cached)
        observed = 1 if is_cached else world.observed
        return world._replace(state=state, observed=observed, whole=whole)

    # -- the moves of the server and of others ------------------------------------------------

    def moves(self, world: World) -> Iterator[World]:
        """Everything that can happen next."""
        for each in world.late:
            landed = world._replace(late=world.late - {each})
            yield landed.apply(self.deletes) if each.is_met(world.item, self.intent) else landed
        yield from self._rivals(world)
        if world.state == "condition" and world.item is not None:
            yield world._replace(item=world.item._replace(is_suitable=True))  # it is rewritten
        if world.state == "start":
            yield self.start(world)
        elif world.state == "read":
            yield world.after(world.seen(self.intent), self.intent)
            yield world.after("error", self.intent)
        elif world.state in ATTEMPTS and world.attempts < MAX_ATTEMPTS:
            yield from self._attempts(world._replace(attempts=world.attempts + 1))

    def _rivals(self, world: World) -> Iterator[World]:
        if world.tokens > MAX_RIVALS or (self._is_tolerated(world) and world.item is not None):
            return
        changed = world._replace(tokens=world.tokens + 1)
        if world.item is None:
            for has_version, is_suitable in product((True, False), repeat=2):
                item = Item(changed.tokens, has_version, is_older=False, is_suitable=is_suitable)
                yield changed._replace(item=item)
        else:
            yield changed._replace(item=Item(changed.tokens, False, False, world.item.is_suitable))
            yield changed._replace(item=None)

    def _is_tolerated(self, world: World) -> bool:
        """Decision 033: an insert that failed and was applied, and whose item was then deleted, is
        sent again."""
        return world.failed and world.doubt == "failed_insert"

    def _attempts(self, world: World) -> Iterator[World]:
        attempt = Attempt(world.state, world.whole, world.observed)
        for response in ("busy", "unsupported", "error"):
            yield world.after(response, self.intent)
        yield world.after("failed", self.intent)
        yield world.after("lost", self.intent)._replace(late=world.late | {attempt})
        if not attempt.is_met(world.item, self.intent):
            is_exists = world.state == "insert" and not world.whole
            response = "exists" if is_exists else world.seen(self.intent)
            yield world.after(response, self.intent)
            return
        applied = world.apply(self.deletes)
        yield applied.after("applied", self.intent)
        yield applied.after("failed", self.intent)._replace(failed=True)
        yield applied.after("lost", self.intent)
        if world.state == "existing" and not self.deletes:
            yield applied.after("silent", self.intent)


WRITES: Final = {
    "create": Write("create"),
    "create whole": Write("create", whole=True),
    "save": Write("save"),
    "save among others": Write("save", alone=False),
    "save whole": Write("save", whole=True),
    "save cached": Write("save", is_cached=True, puts=True),
    "replace": Write("replace"),
    "replace cached": Write("replace", is_cached=True, puts=True),
    "update": Write("change"),
    "update cached": Write("change", is_cached=True),
    "update read first": Write("change", reads_first=True),
    "expect": Write("expect"),
    "expect cached": Write("expect", is_cached=True),
    "expect whole": Write("expect", whole=True),
    "expect cached whole": Write("expect", is_cached=True, puts=True),
    "update where": Write("change", conditional=True),
    "update where expecting": Write("expect", conditional=True),
    "delete": Write("delete", deletes=True),
    "delete read first": Write("delete", deletes=True, reads_first=True),
    "delete expecting": Write("expect", deletes=True),
}
BEFORE: Final = [None, *(Item(1, *each) for each in product((True, False), repeat=4))]


REFUSALS_OF: Final[dict[Intent, set[str]]] = {
    "create": {"exists"},
    "save": set(),
    "delete": {"nothing"},
    "replace": {"not_found"},
    "change": {"not_found"},
    "expect": {"not_found", "conflict"},
}


def _check(world: World, write: Write) -> None:
    assert world.applied <= 1, "the write was applied twice"
    if world.state == "applied":
        assert world.applied == 1, "the write succeeded, but was not applied"
    elif world.state == "unknown":
        assert world.doubt != "none", "the outcome is known"
    elif world.state in REFUSALS or (world.state == "error" and world.doubt == "none"):
        assert not world.applied, "the write was applied, but reported as refused"
        assert not world.late, "the write is reported as refused, and may be applied later"
        refusals = REFUSALS_OF[write.intent] | ({"conflict"} if write.conditional else set())
        assert world.state in refusals | {"error"}, "another writer must not end this write"


@pytest.mark.parametrize("state", sorted((ATTEMPTS | {"read"}) - {"import"}))
def test_an_item_with_the_token_of_the_write_proves_that_it_was_applied(state: State) -> None:
    for doubt, intent, whole in product(get_args(Doubt), get_args(Intent), (False, True)):
        assert next_step(state, doubt, "own", intent, whole).state == "applied"


@pytest.mark.parametrize("name", WRITES)
def test_no_sequence_applies_a_write_twice_or_reports_it_wrongly(name: str) -> None:
    write = WRITES[name]
    seen: set[World] = set()
    waiting = [
        World(item, "start", whole=write.whole)
        for item in BEFORE
        if write.intent == "expect" or item is None or (item.has_version and item.is_older)
    ]
    results: set[State] = set()
    while waiting:
        world = waiting.pop()
        if world in seen:
            continue
        seen.add(world)
        _check(world, write)
        results.add(world.state)
        waiting += write.moves(world)
    assert "applied" in results
    assert "unknown" in results
