"""What was acknowledged, and whether a store shows it: one oracle for benchmarks, the demo and tests.

A store must show all writes that were acknowledged, and at most those of unknown outcome in addition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import msgspec

from hf_async_store import StorageError


class AckedWrites(msgspec.Struct, array_like=True):
    """The writes to one entity: how many were acknowledged, and of how many the outcome is unknown."""

    acknowledged: int = 0
    unknown: int = 0

    @property
    def tried(self) -> int:
        """The number of writes that may have been applied."""
        return self.acknowledged + self.unknown

    def note(self, error: BaseException | None = None) -> None:
        """Count a write by how it ended; an error that says that nothing was written is no write."""
        if error is None:
            self.acknowledged += 1
        elif not isinstance(error, StorageError) or error.outcome_unknown:
            self.unknown += 1

    def wrong_count(self, stored: object, first: int = 0) -> str | None:
        """What is wrong with a counter that each write raised by one from `first`, if anything."""
        least = first + self.acknowledged
        holds = type(stored) is int and least <= stored <= least + self.unknown
        return None if holds else f"counts {stored}, {least} were acknowledged"

    def wrong_version(self, stored: int, first: int = 0) -> str | None:
        """What is wrong with the version of an entity that had `first` before, if anything."""
        least = first + self.acknowledged
        if least <= stored <= least + self.unknown:
            return None
        most = f" to {least + self.unknown}" if self.unknown else ""
        return f"version {stored} is stored, {least}{most} writes were acknowledged"


AckedByEntity: TypeAlias = dict[str, AckedWrites]
"""By id. What all processes wrote together is what the store has to show at the end."""


def add_all(acked: AckedByEntity, others: AckedByEntity) -> None:
    """Count what another process wrote."""
    for name, other in others.items():
        entry = acked.setdefault(name, AckedWrites())
        entry.acknowledged += other.acknowledged
        entry.unknown += other.unknown


@contextmanager
def writing(*entries: AckedWrites) -> Iterator[None]:
    """One write to each of these: acknowledged when the context is left without an error."""
    try:
        yield
    except BaseException as exc:
        for each in entries:
            each.note(exc)
        raise
    for each in entries:
        each.acknowledged += 1


def lost_writes(
    acked: Mapping[str, AckedWrites],
    stored: Iterable[tuple[str, Mapping[str, Any] | None]],
    *,
    counter: str | None = None,
    first_version: Mapping[str, int] | None = None,
) -> list[str]:
    """What a store does not show as it was acknowledged, one line each.

    Args:
        counter: a field that each write raised by one.
        first_version: the versions before the first of the writes; None: versions are not compared.
    """
    failures = []
    for name, entity in stored:
        writes = acked[name]
        wrong: list[str | None] = []
        if entity is None and writes.acknowledged:
            wrong.append(f"not there, and {writes.acknowledged} writes were acknowledged")
        if entity is not None and counter:
            wrong.append(writes.wrong_count(entity[counter]))
        if entity is not None and first_version is not None:
            wrong.append(writes.wrong_version(entity["version"], first_version.get(name, 0)))
        failures += [f"{name}: {each}" for each in wrong if each is not None]
    return failures
