"""What the harness and its worker processes tell each other: what to measure, and the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from hf_async_store_bench.acked_writes import AckedByEntity
from hf_async_store_bench.histogram import Histogram

Role: TypeAlias = Literal["strategy", "baseline", "competitor"]
Needs: TypeAlias = Literal["nothing", "folder", "postgres", "dynamodb"]
_Any = TypeVar("_Any")
_SUMMED = ("operations", "units", "conflicts", "retries", "wrong", "unserved")


class SystemUnderTest(msgspec.Struct, frozen=True, kw_only=True):
    """One side of the comparison.

    Attributes:
        role: an engine of the product (or a user's own store), hand-written code on the same driver,
            or a competitor: another library.
        engine: which engine it is, is the baseline of, or is an alternative to.
        adapter: `module:class`; the docstring says how a baseline is made.
        package: what must be installed, by the name that it is imported by.
        short: the short run has it: no competitor, and nothing that says much the same as another.
        blocking: each call blocks the whole process, so one task can do all that it is able to.
        url: of a strategy, its store, with `{folder}`, `{postgres}` and `{dynamodb}` to be filled in.
        nondurable_query: added to the URL when acknowledged writes need not be durable.
        source: a checkout whose product is measured instead of the installed one.
    """

    name: str
    role: Role
    engine: str
    adapter: str
    needs: Needs
    package: str | None = None
    short: bool = False
    blocking: bool = False
    url: str = ""
    nondurable_query: str = ""
    copied: bool = True
    source: str = ""

    def url_of(self, **values: str) -> str:
        url = self.url
        for name, value in values.items():
            url = url.replace("{" + name + "}", value)
        return url

    def load(self) -> Any:
        """The class of its adapter, imported now."""
        module, _, name = self.adapter.partition(":")
        return getattr(import_module(module), name)


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where one system stores its data. It travels over a pipe: it may hold a password.

    Attributes:
        server: the URL of an empty database, or the address of the DynamoDB server; else empty.
        url: of a strategy, the URL of its store.
        prefix: of whatever it names on a server that others use, too.
    """

    folder: str
    server: str = ""
    url: str = ""
    prefix: str = ""
    durable: bool = True


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One workload with its parameters: tasks in each process, machines that are stored before, bytes
    of each, machines of an acquired request and of a batch, reads of a hundred mixed operations."""

    workload: str
    tasks: int = 64
    processes: int = 1
    entities: int = 10_000
    size: int = 311
    burst: int = 1000
    reads: int = 80

    @property
    def name(self) -> str:
        """As the report calls it."""
        tasks = "1 task" if self.tasks == 1 else f"{self.tasks} tasks"
        mixed = f" {self.reads}/{100 - self.reads}" if self.workload == "mixed" else ""
        burst = f" of {self.burst}" if self.burst != 1000 else ""
        processes = f" in each of {self.processes} processes" if self.processes > 1 else ""
        return f"{self.workload}{mixed}{burst}, {tasks}{processes}"


class Plan(msgspec.Struct, frozen=True):
    """The part of one worker process; `seconds`: of a scenario that lasts as long as one likes."""

    system: SystemUnderTest
    environment: Environment
    load: Load
    index: int = 0
    seed: int = 1
    seconds: float = 0.0


class WrongAnswerError(Exception):
    """A read returned what cannot be. It makes the run fail."""


class RoundStats(msgspec.Struct, kw_only=True):
    """What one process, or several together, did in one round.

    Attributes:
        operations: that were acknowledged; `units` is how many entities they were about.
        errors: by the name of the exception; conflicts are counted apart.
        share: open loop: of what the system can do.
        unserved: operations that were due and had not begun when the round was ended. They count in the
            latencies with the time that they had waited by then.
        memory: bytes by which the process has grown since before it opened its system.
        written: bytes to disks, to a DynamoDB server, and by a PostgreSQL server into its log; None
            where the system does not say.
    """

    operations: int = 0
    units: int = 0
    seconds: float = 0.0
    errors: dict[str, int] = {}
    conflicts: int = 0
    retries: int = 0
    wrong: list[str] = []
    unserved: int = 0
    share: float = 0.0
    processor: float = 0.0
    memory: int = 0
    written: int | None = None
    latencies: Histogram = msgspec.field(default_factory=Histogram)

    @property
    def rate(self) -> float:
        """Entities a second."""
        return self.units / self.seconds if self.seconds else 0.0

    @classmethod
    def together(cls, parts: Iterable[RoundStats]) -> RoundStats:
        """What several processes did at the same time, or one in several rounds."""
        whole = cls()
        for part in parts:
            for name in (*_SUMMED, "processor", "memory"):
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
            whole.seconds = max(whole.seconds, part.seconds)
            whole.errors = dict(Counter(whole.errors) + Counter(part.errors))
            if part.written is not None:
                whole.written = (whole.written or 0) + part.written
            whole.latencies.add(part.latencies)
        return whole


class Measurement(msgspec.Struct, frozen=True):
    """One figure of a scenario: a value of each round, and the bound that was promised, if any; or the
    seconds that something takes on a system with so many entities, a point of a curve."""

    what: str
    samples: list[float]
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    system: str = ""
    entities: int = 0


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told: load the data (one process alone); open it for a workload; run a round, at
    a rate or as fast as it is answered; stop and tell what was acknowledged; verify that of all
    processes (one process alone); measure a scenario."""

    do: Literal["load", "open", "run", "stop", "verify", "scenario"]
    workload: str = ""
    seconds: float = 0.0
    rate: float | None = None
    acked: AckedByEntity = {}


class VerificationResult(msgspec.Struct, frozen=True):
    checked: int
    failures: list[str]


class Answer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a worker answers: why it cannot go on; or why its system cannot do this workload, which is
    no fault; whether what it loaded can be opened by other processes; or what it measured."""

    refused: str | None = None
    skipped: str | None = None
    apart: bool = False
    stats: RoundStats = msgspec.field(default_factory=RoundStats)
    acked: AckedByEntity = {}
    verification: VerificationResult = VerificationResult(0, [])
    measurements: list[Measurement] = []


def encode(message: object) -> bytes:
    """As one line of JSON, without its end."""
    return msgspec.json.encode(message, enc_hook=Histogram.encoded)


def decode(line: bytes, kind: type[_Any]) -> _Any:
    """Of such a line."""
    return msgspec.json.decode(line, type=kind, dec_hook=lambda _, text: Histogram(text))
