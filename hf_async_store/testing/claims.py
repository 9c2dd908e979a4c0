"""Cases 104 to 108, 131 and 132: claims, named locks and permits.

Cases about time set the clock of the engine; only those about renewal in the background take time.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final

import pytest

from hf_async_store.claim_clock import Moment
from hf_async_store.errors import (
    ClaimLostError,
    InvalidFieldError,
    InvalidInputError,
    InvalidQueryError,
    LockTimeoutError,
    TransactionAbortedError,
)
from hf_async_store.field_operations import append, increment
from hf_async_store.migration_routing import unrouted
from hf_async_store.query import path
from hf_async_store.testing.assertions import get_existing
from hf_async_store.testing.concurrency import (
    HANG_SECONDS,
    answer_of,
    failure_of,
    second_store,
)
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import REMOVE, Key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from hf_async_store.claims import Claim
    from hf_async_store.driver import ClaimInfo
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness

_ROUNDS: Final = 100
_SHORT: Final = 0.9
"""A lease, in seconds, of which a third is long compared with a write on a busy machine."""


class SetClock:
    """A clock that shows what it is set to."""

    def __init__(self, *stores: StorageStrategy) -> None:
        self.seconds = 1000.0
        for each in stores:
            unrouted(each.engine).claim_clock = self

    def now(self) -> Moment:
        return Moment("test", self.seconds)


def _claims(harness: Harness) -> None:
    if not harness.capabilities.claims:
        pytest.skip("the engine has no claims")


async def _create(store: StorageStrategy, ids: Iterable[str], **fields: object) -> None:
    await store.create_entities(
        "items", [{"item_id": each, "label": "new", **fields} for each in ids]
    )


async def _claim(store: StorageStrategy, number: int = 1, lease: float = 10.0) -> list[Claim]:
    """Claims of this number of new items, as soon as an index shows them."""

    async def found() -> list[str]:
        new = await store.query_entities("items", {"label": "new"}, "item_id")
        return [str(each["item_id"]) for each in new]

    stored = await store.query_entities("items", order_by="item_id")
    await answer_of(
        store.capabilities,
        found,
        [str(each["item_id"]) for each in stored if each.get("label") == "new"],
    )
    return await store.claim_entities(
        "items", {"label": "new"}, order_by="item_id", limit=number, lease=lease
    )


async def _one(store: StorageStrategy, lease: float = 10.0) -> Claim:
    """A claim of the new item `a`."""
    await _create(store, ["a"])
    [claim] = await _claim(store, lease=lease)
    return claim


async def _only(store: StorageStrategy) -> ClaimInfo:
    [found] = await store.claims("items")
    return found


def uses_of(
    claim: Claim, late: Mapping[str, object], beside: Mapping[str, object]
) -> dict[str, Callable[[], Awaitable[object]]]:
    """Everything that a holder can do.

    Args:
        late: a change of the claimed entity.
        beside: another entity, which a transaction creates.
    """

    async def transact() -> None:
        async with claim.transaction() as tx:
            await tx.create_entity(claim.collection, beside)

    return {
        "update": lambda: claim.update(late),
        "finish": lambda: claim.finish(late),
        "finish without a change": claim.finish,
        "delete": claim.delete,
        "renew": claim.renew,
        "release": claim.release,
        "release later": lambda: claim.release(after=5.0),
        "transaction": transact,
    }


async def _all_lost(store: StorageStrategy, claim: Claim) -> None:
    """Assert that everything that the holder does is refused, and changes nothing."""
    before = await store.get_entity("items", claim.id), await store.claims("items")
    uses = uses_of(claim, {"label": "late"}, {"item_id": "beside"})
    for name, use in uses.items():
        error = await failure_of(use())
        assert isinstance(error, ClaimLostError), (name, error)
        assert (error.collection, error.entity_id) == ("items", claim.id), name
    assert await store.get_entity("items", "beside") is None
    assert before == (await store.get_entity("items", claim.id), await store.claims("items"))


class ClaimContract:
    """Cases 104 to 108, 131 and 132."""

    async def test_104_claims_are_absent_if_they_are_declared_absent(
        self, store: StorageStrategy
    ) -> None:
        if store.capabilities.claims:
            pytest.skip("the engine has claims")
        for call in (
            lambda: store.claim_entities("items"),
            lambda: store.claims("items"),
            lambda: store.break_claim("items", "a"),
        ):
            with pytest.raises(InvalidInputError, match="no claims"):
                await call()
        with pytest.raises(InvalidInputError, match="no claims"):
            store.lock("x")

    async def test_104_a_claim_takes_the_first_matches_that_nobody_holds(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        SetClock(store)
        await _create(store, "fbdace")
        await store.update_entity("items", "a", {"label": "old"})
        stored = await store.query_entities("items", order_by="item_id")
        first = await _claim(store, 2)
        assert [each.id for each in first] == ["b", "c"]
        assert [each.entity for each in first] == stored[1:3]
        second = await _claim(store, 10)
        assert [each.id for each in second] == ["d", "e", "f"]
        assert await _claim(store, 10) == []
        assert await store.query_entities("items", order_by="item_id") == stored
        found = await store.claims("items")
        assert [each.id for each in found] == ["b", "c", "d", "e", "f"]
        assert {(each.state, each.seconds, each.attempts) for each in found} == {("held", 10.0, 1)}
        assert [each.token for each in found] == [each.token for each in [*first, *second]]

    async def test_104_filters_and_orders_of_every_kind(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        for number in range(40):
            label = "Ärger" if number % 2 else "other"
            item = {"item_id": f"{number:02}", "label": label, "count": -number, "note": number}
            await store.create_entity("items", item)
        from hf_async_store.query import begins_with

        await answer_of(store.capabilities, lambda: store.count_entities("items"), 40)
        folded = {"label": begins_with("äRG", ignore_case=True)}
        for filters, order, expected in (
            (folded, "count", ["39", "37"]),
            (folded, "-count", ["01", "03"]),
            ({path("note"): 8}, None, ["08"]),
            ({"label": "other"}, ["-note", "count"], ["38", "36"]),
            ({"item_id": "04"}, None, ["04"]),
        ):
            found = await store.claim_entities("items", filters, order_by=order, limit=2)
            assert [each.id for each in found] == expected, (filters, order)
        rest = await store.claim_entities("items", folded, order_by="count", limit=100)
        assert [each.id for each in rest] == [f"{each:02}" for each in range(35, 3, -2)]

    async def test_104_claimers_share_the_entities(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        ids = [f"{each:03}" for each in range(60)]
        await _create(store, ids)
        await _claim(store, 1, lease=0.001)
        taken: Counter[str] = Counter()

        async def work(claimer: StorageStrategy) -> None:
            while found := await claimer.claim_entities(
                "items", {"label": "new"}, order_by="item_id", limit=3, wait=0.2
            ):
                taken.update(each.id for each in found)

        async with second_store(harness, store) as other:
            await asyncio.gather(*(work(each) for each in (store, other) * 4))
        assert taken == dict.fromkeys(ids, 1)

    async def test_104_one_of_two_claimers_gets_an_entity(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        await _create(store, ["a"])
        token = 0
        async with second_store(harness, store) as other:
            for _ in range(repetitions(_ROUNDS)):
                claimers = (store, other)
                found = await asyncio.gather(
                    *(each.claim_entities("items", {"item_id": "a"}) for each in claimers)
                )
                [claim] = [each for claims in found for each in claims]
                assert claim.token > token
                token = claim.token
                await claim.release()

    async def test_104_claimers_of_one_name_with_a_clock_that_is_behind(
        self, harness: Harness, store: StorageStrategy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _claims(harness)
        monkeypatch.setattr(time, "time_ns", lambda: 1)  # all choose the same token
        await _create(store, ["a"])
        async with second_store(harness, store) as other:
            for _ in range(repetitions(_ROUNDS)):
                found = await asyncio.gather(
                    *(
                        each.claim_entities("items", {"item_id": "a"}, owner="workers")
                        for each in (store, other)
                    )
                )
                [claim] = [each for claims in found for each in claims]
                await claim.release()

    async def test_104_a_claimer_that_is_cancelled_holds_nothing(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        await _create(store, "abc")
        async with store.lock("x"):  # creates the tables
            for each in await _claim(store, 3):
                await each.finish()

        async def lock() -> None:
            async with store.lock("x"):
                pass

        async def claim() -> None:
            claimed.extend(await store.claim_entities("items", limit=3))

        for step in range(40):
            for work in (lock, claim):
                claimed: list[Claim] = []
                task = asyncio.create_task(work())
                for _ in range(step % 20):
                    await asyncio.sleep(0)
                if step >= 20:
                    await asyncio.sleep(0.0003 * (step - 20))
                task.cancel()
                await asyncio.wait([task])
                assert await store.claims("hf_locks") == [], step
                held = [each.id for each in await store.claims("items") if each.state == "held"]
                assert held == [each.id for each in claimed], step
                for each in claimed:
                    await each.finish()

    async def test_104_arguments_are_checked_before_any_request(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        for limit in (0, -1, True, 1.5):
            with pytest.raises(InvalidQueryError):
                await store.claim_entities("items", limit=limit)  # type: ignore[arg-type]
        for lease in (0, -1.0, 1e12):
            with pytest.raises(InvalidInputError):
                await store.claim_entities("items", lease=lease)
        with pytest.raises(InvalidInputError):
            store.permits("x", 0)
        assert await store.claims("items") == []
        assert await store.break_claim("items", "a") is False

    # -- the lease ---------------------------------------------------------------------------

    async def test_105_a_claim_ends_with_its_lease(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        async with second_store(harness, store) as other:
            clock = SetClock(store, other)
            claim = await _one(store)
            clock.seconds += 9.75
            assert await _claim(other) == []
            assert await claim.update({"count": 1}) == claim.version == 2
            assert (await _only(store)).seconds == 0.25
            clock.seconds += 0.25
            await _all_lost(store, claim)
            [next_claim] = await _claim(other)
            assert next_claim.token > claim.token
            assert next_claim.attempts == 2
            await _all_lost(store, claim)
            await next_claim.finish({"count": 2})
            assert (await get_existing(store, "items", "a"))["count"] == 2

    async def test_105_a_clock_that_jumps_does_not_let_two_hold_one_entity(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        clock = SetClock(store)
        claim = await _one(store)
        for jump in (60.0, 3600.0, 1e6):
            clock.seconds += jump + 10
            [next_claim] = await _claim(store)
            clock.seconds -= jump + 10  # by this clock, the lease of the first has not ended
            await _all_lost(store, claim)
            await next_claim.update({"ratio": jump})
            claim = next_claim

    async def test_105_claims_of_another_era_have_ended(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        clock = SetClock(store)
        claim = await _one(store)
        clock.now = lambda: Moment("after a restart", 5.0)  # type: ignore[method-assign]
        assert (await _only(store)).state == "free"
        await _all_lost(store, claim)
        assert len(await _claim(store)) == 1

    @pytest.mark.parametrize("collection", ["items", "hf_locks"])
    async def test_105_a_store_in_which_nothing_was_claimed_refuses_a_holder(
        self, harness: Harness, store: StorageStrategy, collection: str
    ) -> None:
        # As after a live migration: the claim was made in the source.
        _claims(harness)
        await _create(store, ["a"])
        key = Key(collection, "a")

        async def transact() -> None:
            async with store.engine.claimed_session(key, 1):
                pytest.fail("the claim is not held")

        uses: list[Callable[[], Awaitable[None]]] = [
            lambda: store.engine.renew_claim(key, 1, 10.0),
            lambda: store.engine.release_claim(key, 1, None),
            lambda: store.engine.release_claim(key, 1, 1.0),
            transact,
        ]
        for use in uses:
            with pytest.raises(ClaimLostError):
                await use()
        assert await store.claims(collection) == []

    async def test_105_everybody_can_read_and_change_a_claimed_entity(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        SetClock(store)
        claim = await _one(store)
        async with second_store(harness, store) as other:
            assert await other.update_entity("items", "a", {"label": "changed"}) == 2
            assert await other.save_entity("items", {"item_id": "a", "count": 1}) == 3
            async with other.begin_transaction() as tx:
                await tx.update_entity("items", "a", {"ratio": 0.5})
        assert (await _only(store)).token == claim.token
        assert await claim.update({"active": True}) == 5
        entity = await get_existing(store, "items", "a")
        assert (entity["count"], entity["ratio"], entity["active"]) == (1, 0.5, True)

    async def test_105_a_lost_claim_is_told_before_a_change_that_does_not_apply(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        claim = await _one(store)
        version = await claim.update({"free": "text"})
        for change in {"free": increment(1)}, {"free": append("x")}:
            assert isinstance(await failure_of(claim.update(change)), InvalidFieldError)
            assert isinstance(await failure_of(claim.finish(change)), InvalidFieldError)
        assert await store.break_claim("items", "a")
        for change in {"free": increment(1)}, {"free": append("x")}:
            assert isinstance(await failure_of(claim.update(change)), ClaimLostError)
            assert isinstance(await failure_of(claim.finish(change)), ClaimLostError)
        assert (await get_existing(store, "items", "a"))["version"] == version

    async def test_105_a_block_is_renewed_in_the_background(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        claim = await _one(store, lease=_SHORT)
        async with claim:
            ends = claim.expires_at
            await asyncio.sleep(1.5 * _SHORT)
            assert claim.expires_at > ends
            assert await _claim(store) == []
            await claim.update({"count": 1})
        assert (await _only(store)).state == "free"
        assert len(await _claim(store)) == 1

    async def test_105_a_block_whose_claim_is_lost_is_cancelled(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        claim = await _one(store, lease=_SHORT)
        reached = False
        with pytest.raises(ClaimLostError) as lost:
            async with claim:
                assert await store.break_claim("items", "a")
                await asyncio.sleep(30)
                reached = True
        assert not reached
        assert lost.value.entity_id == "a"
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()

    async def test_105_what_leaves_a_block_ends_the_claim(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        claim = await _one(store)
        with pytest.raises(ZeroDivisionError):
            async with claim:
                raise ZeroDivisionError
        assert (await _only(store)).state == "free"
        [claim] = await _claim(store)
        entered = asyncio.Event()

        async def hold() -> None:
            async with claim:
                entered.set()
                await asyncio.sleep(30)

        holder = asyncio.create_task(hold())
        await entered.wait()
        holder.cancel()
        with pytest.raises(asyncio.CancelledError):
            await holder
        assert (await _only(store)).state == "free"

    # -- renew, release, finish --------------------------------------------------------------

    async def test_106_renew_extends_and_release_frees(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        clock = SetClock(store)
        claim = await _one(store)
        clock.seconds += 8
        await claim.renew()
        clock.seconds += 8
        assert await _claim(store) == []
        await claim.renew(lease=1.0)
        clock.seconds += 1
        [claim] = await _claim(store)
        await claim.release()
        await _all_lost(store, claim)
        [claim] = await _claim(store)
        await claim.release(after=5.0)
        assert (await _only(store)).state == "delayed"
        await _all_lost(store, claim)
        clock.seconds += 4.75
        assert await _claim(store) == []
        clock.seconds += 0.25
        [claim] = await _claim(store)
        assert claim.attempts == 4

    async def test_106_finish_is_one_commit(self, harness: Harness, store: StorageStrategy) -> None:
        _claims(harness)
        SetClock(store)
        claim = await _one(store)
        before = await _only(store)
        for changes in ({"item_id": "b"}, {"count": "x"}, {"item_id": REMOVE}):
            with pytest.raises(InvalidFieldError):
                await claim.finish(changes)
        assert await _only(store) == before
        await claim.finish({"label": "done"})
        assert await store.claims("items") == []
        assert (await get_existing(store, "items", "a"))["label"] == "done"
        await _all_lost(store, claim)
        await store.update_entity("items", "a", {"label": "new"})
        [claim] = await _claim(store)
        assert claim.attempts == 1
        await claim.finish()
        assert await store.claims("items") == []
        assert (await get_existing(store, "items", "a"))["version"] == 3

    # -- changes meanwhile -------------------------------------------------------------------

    async def test_107_a_deletion_ends_a_claim(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        SetClock(store)
        claim = await _one(store)
        assert await store.delete_entity("items", "a")
        assert await store.claims("items") == []
        await _all_lost(store, claim)
        await _create(store, ["a"])
        await _all_lost(store, claim)
        [second] = await _claim(store)
        assert second.attempts == 1
        assert second.token > claim.token
        async with store.begin_transaction() as tx:
            await tx.delete_entity("items", "a")
            await tx.create_entity("items", {"item_id": "a", "label": "new"})
        await _all_lost(store, second)
        [third] = await _claim(store)
        await third.delete()
        assert await store.get_entity("items", "a") is None
        assert await store.claims("items") == []

    async def test_107_a_deletion_that_is_rolled_back_ends_no_claim(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        SetClock(store)
        claim = await _one(store)
        with pytest.raises(ZeroDivisionError):
            async with store.begin_transaction() as tx:
                await tx.delete_entity("items", "a")
                raise ZeroDivisionError
        await claim.update({"count": 1})

    async def test_107_an_entity_that_does_not_match_any_more_stays_claimed(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        SetClock(store)
        claim = await _one(store)
        await claim.update({"label": "running"})
        assert (await _only(store)).state == "held"
        assert await store.claim_entities("items", {"item_id": "a"}) == []
        await claim.finish({"label": "done"})

    # -- fairness ----------------------------------------------------------------------------

    async def test_108_no_entity_waits_behind_others_that_are_held(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        SetClock(store)
        ids = [f"{each:03}" for each in range(150)]
        await _create(store, ids)
        assert len(await _claim(store, 149)) == 149
        [last] = await _claim(store, 149)
        assert last.id == "149"

    async def test_108_whoever_waits_gets_what_becomes_free(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        claim = await _one(store)
        waiting = asyncio.create_task(store.claim_entities("items", {"item_id": "a"}, wait=30))
        await asyncio.sleep(0.05)
        await claim.release()
        [found] = await waiting
        assert found.id == "a"
        assert await store.claim_entities("items", {"item_id": "a"}, wait=0.05) == []

    # -- locks -------------------------------------------------------------------------------

    async def test_131_one_holds_a_lock(self, harness: Harness, store: StorageStrategy) -> None:
        _claims(harness)
        holders = most = rounds = 0
        tokens: list[int] = []

        async def hold(claimer: StorageStrategy) -> None:
            nonlocal holders, most, rounds
            for _ in range(5):
                async with claimer.lock("rebalance") as claim:
                    holders += 1
                    most = max(most, holders)
                    tokens.append(claim.token)
                    await asyncio.sleep(0.001)
                    holders -= 1
                    rounds += 1

        async with second_store(harness, store) as other:
            await asyncio.gather(*(hold(each) for each in (store, other) * 2))
        assert (most, rounds) == (1, 20)
        assert tokens == sorted(set(tokens))
        assert await store.claims("hf_locks") == []

    async def test_131_a_lock_is_waited_for_and_lost(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        async with store.lock("a b/c") as claim:
            with pytest.raises(LockTimeoutError):
                async with store.lock("a b/c", timeout=0.05):
                    pytest.fail("the lock is held")
            async with store.lock("another", timeout=5.0):
                pass
            async with claim.transaction() as tx:
                await tx.create_entity("items", {"item_id": "a"})
        with pytest.raises(ClaimLostError):
            # The loss is noticed by a renewal, after a third of the lease.
            async with store.lock("a b/c", lease=3.0) as claim:
                assert await store.break_claim("hf_locks", "a b/c")
                async with store.lock("a b/c", timeout=5.0):
                    with pytest.raises(ClaimLostError):
                        async with claim.transaction() as tx:
                            await tx.create_entity("items", {"item_id": "b"})
                await asyncio.sleep(30)
        assert await store.get_entity("items", "a") is not None
        assert await store.get_entity("items", "b") is None

    async def test_131_permits_limit_the_number_of_holders(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        holders = most = 0
        together = asyncio.Event()  # two hold a permit at once

        async def hold(claimer: StorageStrategy) -> None:
            nonlocal holders, most
            async with claimer.permits("provider-eu", 3):
                holders += 1
                most = max(most, holders)
                if holders == 2:
                    together.set()
                await together.wait()
                await asyncio.sleep(0.02)
                holders -= 1

        async with second_store(harness, store) as other:
            async with asyncio.timeout(HANG_SECONDS):
                await asyncio.gather(*(hold(each) for each in (store, other) * 6))
        assert 2 <= most <= 3

    # -- transactions and attempts -----------------------------------------------------------

    async def test_132_other_changes_commit_under_a_claim(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        clock = SetClock(store)
        claim = await _one(store)
        async with claim.transaction() as tx:
            await tx.update_entity("items", "a", {"count": 1})
            await tx.create_entity("accounts", {"account_id": "x", "balance": 1})
        with pytest.raises(ZeroDivisionError):
            async with claim.transaction() as tx:
                await tx.update_entity("items", "a", {"count": 2})
                raise ZeroDivisionError
        clock.seconds += 10
        with pytest.raises((ClaimLostError, TransactionAbortedError)):
            async with claim.transaction() as tx:
                await tx.update_entity("accounts", "x", {"balance": 2})
        assert (await get_existing(store, "items", "a"))["count"] == 1
        assert (await get_existing(store, "accounts", "x"))["balance"] == 1

    async def test_132_what_kills_its_workers_is_set_aside(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        _claims(harness)
        clock = SetClock(store)
        await _create(store, ["a", "b"])
        await _claim(store, 2, lease=1)

        async def claimed() -> list[str]:
            clock.seconds += 1
            found = await store.claim_entities(
                "items", {"label": "new"}, order_by="item_id", limit=2, lease=1, max_attempts=3
            )
            for each in found:
                if each.id == "b":
                    await each.finish()
            return [each.id for each in found]

        assert [await claimed() for _ in range(5)] == [["a", "b"]] * 2 + [["b"]] * 3
        found = await store.claims("items")
        assert [(each.id, each.state, each.attempts) for each in found] == [("a", "free", 3)]
        assert await store.break_claim("items", "a")
        assert await claimed() == ["a", "b"]
