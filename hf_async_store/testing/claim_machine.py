"""A state machine that claims, works under claims and lets time pass, on an engine and the memory engine.

    def test_claims_of_my_engine_beside_memory(tmp_path_factory):
        run_claim_machine(make)  # as of `state_machine.run_machine`

Both engines get the same clock, which only the machine sets. After each step, the results, the errors and
the list of claims are the same on both; the tokens of an entity increase.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from hf_async_store.claim_clock import Moment
from hf_async_store.errors import StorageError
from hf_async_store.migration_routing import unrouted
from hf_async_store.schema import Collection
from hf_async_store.strategies.memory import MemoryStorageStrategy
from hf_async_store.testing.state_machine import LONG, SHORT, MakeStores

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hf_async_store.claims import Claim
    from hf_async_store.strategy import StorageStrategy

    Step: TypeAlias = Callable[[int], Awaitable[object]]
    """What is done with one of the two stores, by its number."""

_JOBS: Final = (Collection("jobs", key="job_id", fields=["status"]),)

_ids: Final = st.sampled_from(["a", "b", "c", "d"])
_statuses: Final = st.sampled_from(["new", "new", "done"])
_seconds: Final = st.integers(2, 20)
_numbers: Final = st.integers(0, 99)


def run_claim_machine(make: MakeStores, *, long: bool = False) -> None:
    """Test the claims of an engine with many random runs; see `state_machine.run_machine`.

    Raises:
        AssertionError: a result differs from that of the memory engine.
    """

    class Machine(ClaimMachine):
        make_stores = staticmethod(make)

    chosen = LONG if long else SHORT
    run_state_machine_as_test(Machine, settings=settings(chosen, stateful_step_count=50))


class ClaimMachine(RuleBasedStateMachine):
    """Runs the same steps on an engine and on the memory engine; its clock is that of both."""

    make_stores: ClassVar[MakeStores]

    def __init__(self) -> None:
        super().__init__()
        self._seconds = 1000.0
        self._claims: list[tuple[Claim, Claim]] = []
        self._tokens: dict[str, int] = {}
        self._stack = ExitStack()
        with self._stack as stack:
            self._runner = stack.enter_context(asyncio.Runner(loop_factory=asyncio.new_event_loop))
            engine = stack.enter_context(type(self).make_stores())(_JOBS)
            self._stores = (
                MemoryStorageStrategy({"strategy": "memory"}, collections=_JOBS),
                engine,
            )
            for each in self._stores:
                self._runner.run(each.open())
                unrouted(each.engine).claim_clock = self
            self._stack = stack.pop_all()

    def now(self) -> Moment:
        """As `ClaimClock`."""
        return Moment("test", self._seconds)

    def teardown(self) -> None:
        with self._stack:
            for each in self._stores:
                self._runner.run(each.close())

    # -- plain methods, and time -------------------------------------------------------------

    @rule(seconds=_seconds)
    def time_passes(self, seconds: int) -> None:
        # Not to a moment at which a lease ends: on DynamoDB, a holder stops a little earlier.
        self._seconds += seconds + 0.01

    @rule(job=_ids, status=_statuses)
    def save(self, job: str, status: str) -> None:
        entity = {"job_id": job, "status": status}
        self._compare(lambda n: self._stores[n].save_entity("jobs", entity))

    @rule(job=_ids)
    def delete(self, job: str) -> None:
        self._compare(lambda n: self._stores[n].delete_entity("jobs", job))

    @rule(job=_ids)
    def break_claim(self, job: str) -> None:
        self._compare(lambda n: self._stores[n].break_claim("jobs", job))

    # -- claims ------------------------------------------------------------------------------

    @rule(
        limit=st.integers(1, 3),
        lease=_seconds,
        max_attempts=st.sampled_from([None, None, 1, 2]),
        status=st.sampled_from([None, "new"]),
    )
    def claim(self, limit: int, lease: int, max_attempts: int | None, status: str | None) -> None:
        filters = None if status is None else {"status": status}

        async def step(number: int) -> object:
            found = await self._stores[number].claim_entities(
                "jobs",
                filters,
                order_by="job_id",
                limit=limit,
                lease=lease,
                max_attempts=max_attempts,
            )
            claimed.append(found)
            return [(each.id, each.attempts, each.version) for each in found]

        claimed: list[list[Claim]] = []
        self._compare(step)
        for each in claimed[1]:
            assert each.token > self._tokens.get(each.id, 0), "tokens increase"
            self._tokens[each.id] = each.token
        self._claims += zip(*claimed, strict=True)

    @rule(number=_numbers, status=_statuses)
    def update(self, number: int, status: str) -> None:
        self._with_claim(number, lambda claim: claim.update({"status": status}))

    @rule(number=_numbers, status=st.one_of(st.none(), _statuses))
    def finish(self, number: int, status: str | None) -> None:
        changes = None if status is None else {"status": status}
        self._with_claim(number, lambda claim: claim.finish(changes))

    @rule(number=_numbers)
    def delete_claimed(self, number: int) -> None:
        self._with_claim(number, lambda claim: claim.delete())

    @rule(number=_numbers, lease=st.one_of(st.none(), _seconds))
    def renew(self, number: int, lease: int | None) -> None:
        self._with_claim(number, lambda claim: claim.renew(lease))

    @rule(number=_numbers, after=st.one_of(st.just(0), _seconds))
    def release(self, number: int, after: int) -> None:
        self._with_claim(number, lambda claim: claim.release(after=after))

    @rule(number=_numbers, job=_ids, deleted=st.booleans())
    def transaction(self, number: int, job: str, deleted: bool) -> None:
        """A transaction under a claim changes another entity, or that of the claim."""

        async def transact(claim: Claim) -> None:
            async with claim.transaction() as tx:
                if deleted:
                    await tx.delete_entity("jobs", job)
                else:
                    await tx.save_entity("jobs", {"job_id": job, "status": "new"})

        self._with_claim(number, transact)

    # -- comparing ---------------------------------------------------------------------------

    def _with_claim(self, number: int, use: Callable[[Claim], Awaitable[object]]) -> None:
        """Use one of the claims, of which the last ones are the most likely to be held."""
        if self._claims:
            pair = self._claims[-1 - number % min(len(self._claims), 6)]
            self._compare(lambda n: use(pair[n]))

    def _compare(self, step: Step) -> None:
        expected, found = (self._runner.run(self._answer(step, n)) for n in (0, 1))
        assert found == expected, f"returned {found}\nexpected {expected}"

    async def _answer(self, step: Step, number: int) -> object:
        """What a step returns, the entities after it, and their claims."""
        try:
            result = await step(number)
        except StorageError as exc:
            result = type(exc)
        return result, await _contents(self._stores[number])


async def _contents(store: StorageStrategy) -> list[Any]:
    entities = await store.query_entities("jobs", order_by="job_id")
    return [
        [(each["job_id"], each.get("status"), each["version"]) for each in entities],
        [
            (each.id, each.state, round(each.seconds, 3), each.attempts)
            for each in await store.claims("jobs")
        ],
    ]
