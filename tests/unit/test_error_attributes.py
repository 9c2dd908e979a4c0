"""What errors of several changes say about a second call."""

from __future__ import annotations

import pytest

from hf_async_store import (
    BatchError,
    EntityNotFoundError,
    PartialChangeError,
    StorageError,
    ThrottledError,
)

BUSY = ThrottledError("slow down")
GONE = EntityNotFoundError("jobs", "j")


@pytest.mark.parametrize(
    ("outcomes", "retryable"),
    [([BUSY, BUSY], True), ([BUSY, 1], False), ([BUSY, None], False), ([BUSY, GONE], False)],
)
def test_a_batch_is_retryable_if_nothing_was_applied(
    outcomes: list[object], retryable: bool
) -> None:
    assert BUSY.retryable
    assert BatchError("some failed", outcomes).retryable is retryable


@pytest.mark.parametrize(
    ("done", "cause", "retryable"), [(0, BUSY, True), (3, BUSY, False), (0, GONE, False)]
)
def test_a_change_by_filter_is_retryable_if_nothing_was_changed(
    done: int, cause: StorageError, retryable: bool
) -> None:
    assert PartialChangeError(done, cause).retryable is retryable
