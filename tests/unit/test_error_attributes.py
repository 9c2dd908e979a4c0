"""What errors of several changes say about a second call."""

from __future__ import annotations

import errno
import os

import pytest

from hf_async_store import (
    BatchError,
    EntityNotFoundError,
    PartialChangeError,
    StorageError,
    ThrottledError,
)
from hf_async_store.os_errors import translate_os_error
from hf_async_store.repository import timed_out

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


@pytest.mark.parametrize(
    "name", ["ENOENT", "ENOTDIR", "ENAMETOOLONG", "ELOOP", "EINVAL", "EROFS", "EACCES", "ENOSPC"]
)
def test_what_only_a_person_can_mend_is_not_retryable(name: str) -> None:
    number = getattr(errno, name)
    assert not translate_os_error(OSError(number, os.strerror(number)), "open x").retryable
    assert translate_os_error(OSError(errno.EIO, "I/O error"), "open x").retryable


@pytest.mark.parametrize(
    ("timeout", "shown"), [(1.99402, "2 s"), (30.0, "30 s"), (0.25, "0.25 s"), (1e-5, "1e-05 s")]
)
def test_the_time_of_a_command_is_shown_as_it_was_given(timeout: float, shown: str) -> None:
    assert str(timed_out(timeout, outcome_unknown=False)) == f"not completed within {shown}"
