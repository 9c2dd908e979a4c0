"""The pauses between the attempts of work that failed without any effect."""

from __future__ import annotations

from hf_async_store.backoff import Backoff


def conflict_backoff(seconds: float) -> Backoff:
    """The pauses after conflicts with other transactions, which take a few milliseconds."""
    return Backoff(seconds, first=0.002, longest=0.1, what="a statement")
