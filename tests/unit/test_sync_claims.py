"""Claims, locks and permits of the blocking store."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from hf_async_store import ClaimLostError, Collection, LockTimeoutError, claims, sync

if TYPE_CHECKING:
    from collections.abc import Iterator

JOBS = [Collection("jobs", key="job_id", fields=["status"])]


@pytest.fixture
def store() -> Iterator[sync.Store]:
    with sync.open_store("memory:", collections=JOBS) as store:
        store.create_entity("jobs", {"job_id": "a"})
        yield store


def _claim(store: sync.Store, lease: float = 30.0) -> sync.Claim:
    [claim] = store.claim_entities("jobs", lease=lease)
    return claim


def _lose(store: sync.Store) -> None:
    store.break_claim("jobs", "a")
    time.sleep(0.3)


def test_106_a_block_updates_and_finishes(store: sync.Store) -> None:
    with _claim(store) as claim:
        assert store.claim_entities("jobs") == []
        claim.update({"status": "running"})
        with claim.transaction() as tx:
            tx.create_entity("jobs", {"job_id": "b"})
        claim.finish({"status": "done"})
    assert store.claims("jobs") == []
    assert store.query_entities("jobs", {"status": "done"})[0]["version"] == 3


def test_105_a_block_is_renewed_and_released(store: sync.Store) -> None:
    with _claim(store, lease=1.5):
        time.sleep(2)
        assert store.claims("jobs")[0].state == "held"
    assert store.claims("jobs")[0].state == "free"


def test_106_a_renewal_while_the_end_is_computed(
    store: sync.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The renewals of a block are in another thread than the caller."""
    claim, lease = _claim(store, lease=5.0), timedelta(seconds=600)

    def renewed() -> float:
        monkeypatch.undo()
        claim.renew(lease.total_seconds())
        return claims.boot_seconds()

    monkeypatch.setattr(claims, "boot_seconds", renewed)
    assert claim.expires_at is not None
    assert claim.expires_at > datetime.now(UTC) + lease / 2


def test_105_the_end_of_a_block_reports_a_claim_that_was_lost(store: sync.Store) -> None:
    with pytest.raises(ClaimLostError), _claim(store, lease=0.3):
        _lose(store)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("lost", [False, True])
def test_105_the_end_of_a_block_hides_no_other_exception(
    store: sync.Store, error: type[BaseException], lost: bool
) -> None:
    def fail() -> None:
        if lost:
            _lose(store)
        raise error

    with pytest.raises(error), _claim(store, lease=0.3):
        fail()
    assert [each.state for each in store.claims("jobs")] == ([] if lost else ["free"])


def test_131_locks_and_permits(store: sync.Store) -> None:
    with store.lock("x") as lock:
        with pytest.raises(LockTimeoutError), store.lock("x", timeout=0.05):
            pytest.fail("the lock is held")
        with lock.transaction() as tx:
            tx.create_entity("jobs", {"job_id": "b"})
    with store.permits("y", 2), store.permits("y", 2):
        assert len(store.claims("hf_locks")) == 2
        with pytest.raises(LockTimeoutError), store.permits("y", 2, timeout=0.05):
            pytest.fail("both are held")
    assert store.claims("hf_locks") == []
