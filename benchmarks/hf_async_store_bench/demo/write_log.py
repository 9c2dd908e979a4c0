"""The write log of a process: what it is about to write, and what the store acknowledged, one line each,
handed to the operating system at once: a kill loses nothing that was logged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Literal, Self, TypeAlias

import msgspec

from hf_async_store import StorageError

Answer: TypeAlias = "int | Literal['deleted', 'refused', 'unknown']"
"""What became of the write to one entity: its new version, or what happened instead."""


class Write(msgspec.Struct, frozen=True):
    """The same write to some entities of a collection, with the fields that each of them was given, or
    that new ones share; "add" counts a number up by compare-and-set, whatever it was."""

    collection: str
    kind: Literal["create", "update", "add", "delete"]
    ids: list[str]
    fields: dict[str, Any] = {}


class Intent(msgspec.Struct, frozen=True, tag="intent"):
    """About to write. `whole`: in one transaction."""

    number: int
    work: str
    writes: list[Write]
    whole: bool


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The store's answers, by write and id; None: nothing was written; []: cancelled, and nobody knows.
    `at` is when they came, by the clock of the machine."""

    number: int
    answers: list[list[Answer]] | None
    seconds: float
    at: float


class Read(msgspec.Struct, frozen=True, tag="read"):
    work: str
    seconds: float


class Hold(msgspec.Struct, frozen=True, tag="hold"):
    """A claim, and when its holder worked on it, by the clock of the machine; noted at its beginning with
    the end of its first lease, and again when its holder has ended it."""

    request: str
    token: int
    began: float
    until: float
    ended: bool = False


class Broken(msgspec.Struct, frozen=True, tag="broken"):
    """An invariant that this process saw broken while it worked."""

    invariant: str
    entity: str
    what: str


Line: TypeAlias = Intent | Done | Read | Hold | Broken


def answer(outcome: int | bool | StorageError) -> Answer:
    """The answer that an outcome of a batch stands for."""
    if isinstance(outcome, StorageError):
        return "unknown" if outcome.outcome_unknown else "refused"
    if isinstance(outcome, bool):
        return "deleted" if outcome else "refused"
    return outcome


class WriteLog:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def intent(self, work: str, writes: Sequence[Write], *, whole: bool = False) -> int:
        """Note a write before it is tried; returns its number."""
        self._number += 1
        self.note(Intent(self._number, work, list(writes), whole))
        return self._number

    def done(self, number: int, answers: list[list[Answer]] | None, seconds: float = 0.0) -> None:
        """Note what the store acknowledged; None: nothing was written."""
        self.note(Done(number, answers, seconds, monotonic()))

    def note(self, line: Line) -> None:
        left = memoryview(msgspec.json.encode(line) + b"\n")
        while left:
            left = left[os.write(self._file, left) :]


@dataclass(slots=True, eq=False)
class Operation:
    """A noted write, with its end; without answers when nobody knows what became of it."""

    intent: Intent
    answers: list[list[Answer]] | None = None
    seconds: float = 0.0
    at: float = 0.0

    def each(self) -> Iterator[tuple[Write, str, Answer]]:
        """Every entity that it wrote to, and what became of that."""
        for place, write in enumerate(self.intent.writes):
            unknown: list[Answer] = ["unknown"] * len(write.ids)
            answers = unknown if self.answers is None else self.answers[place]
            yield from ((write, *one) for one in zip(write.ids, answers, strict=True))


@dataclass
class ProcessLog:
    """What one process noted, read back; unanswered is what was under way when it ended."""

    killed: bool
    operations: list[Operation] = field(default_factory=list)
    unanswered: list[Operation] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    holds: dict[tuple[str, int], Hold] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path, *, killed: bool = False) -> ProcessLog:
        """The notes in a file. A last line without its end belongs to a process that was killed."""
        log = cls(killed)
        begun: dict[int, Operation] = {}
        decoder = msgspec.json.Decoder(Line)
        for raw in path.read_bytes().split(b"\n")[:-1]:
            match decoder.decode(raw):
                case Intent() as intent:
                    begun[intent.number] = Operation(intent)
                case Done() as done:
                    operation = begun.pop(done.number)
                    if done.answers is not None:
                        operation.answers = done.answers or None
                        operation.seconds, operation.at = done.seconds, done.at
                        log.operations.append(operation)
                case Read() as read:
                    log.reads.append(read)
                case Hold() as hold:
                    log.holds[hold.request, hold.token] = hold
                case Broken() as broken:
                    log.broken.append(broken)
        log.unanswered += begun.values()
        log.operations += begun.values()
        return log
