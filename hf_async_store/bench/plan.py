"""What the harness and its worker processes tell each other: what to measure, and what came of it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import msgspec

from hf_async_store.bench.histogram import Histogram

if TYPE_CHECKING:
    from hf_async_store.bench.targets import Target

Kind: TypeAlias = Literal["strategy", "floor", "peer"]


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """One side of the comparison.

    Attributes:
        kind: one of this package's engines (or a user's own store), the least code by hand on the
            same driver, or what others use instead.
        family: the engine that it is, lies beneath of, or stands in for.
        target: `module:class` of its `Target`, imported only by the process that measures it.
        place: what it needs to put its data in: a folder, a server, or nothing.
        package: what must be installed, by the name that it is imported by; None: nothing more.
        blocking: it holds up the whole process at each call, so that one task has all there is.
        url: of a strategy, how its store is named, with `{folder}`, `{postgres}` and `{dynamodb}`
            where the place goes.
        relaxed: what a strategy's URL gets when acknowledged writes need not be durable.
        copied: what it stored can be copied as a folder or a database.
        most: machines; more than that its server cannot reasonably hold, for the reason behind it.
    """

    name: str
    kind: Kind
    family: str
    target: str
    place: Literal["nothing", "folder", "postgres", "dynamodb"]
    package: str | None = None
    blocking: bool = False
    url: str = ""
    relaxed: str = ""
    copied: bool = True
    most: tuple[int, str] | None = None

    def url_of(self, **places: str) -> str:
        """The URL with its places filled in."""
        url = self.url
        for name, place in places.items():
            url = url.replace("{" + name + "}", place)
        return url

    def load(self) -> type[Target]:
        """Its class, imported now."""
        module, _, name = self.target.partition(":")
        return cast("type[Target]", getattr(import_module(module), name))


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where one target puts its data. It travels over a pipe: it may hold a password.

    Attributes:
        folder: an empty one of its own, removed afterwards.
        server: the URL of an empty database, or the address of the DynamoDB server; else empty.
        url: of a strategy, the URL of its store.
        prefix: of whatever it names on a server that others use, too.
        durable: an acknowledged write has to outlive a loss of power.
    """

    folder: str
    server: str = ""
    url: str = ""
    prefix: str = ""
    durable: bool = True


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One workload with its knobs.

    Attributes:
        tasks: that work at once in each process.
        entities: machines that are stored before it begins.
        size: bytes of JSON of one machine.
        burst: machines of one acquired request.
        reads: of a hundred operations of the mixed workload.
    """

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
        return f"{self.workload}{mixed}, {tasks}" + (
            f" in each of {self.processes} processes" if self.processes > 1 else ""
        )


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The part of one process."""

    subject: Subject
    place: Place
    load: Load
    index: int = 0
    seed: int = 1


class WrongAnswerError(Exception):
    """A read answered what cannot be. It makes the run fail."""


class Tally(msgspec.Struct, kw_only=True):
    """What one process, or several together, did in one round.

    Attributes:
        operations: that were acknowledged; `units` is how many entities they were about.
        seconds: from the start to the end of the last operation.
        errors: by the name of the exception; conflicts are counted apart.
        retries: further tries inside of operations that landed.
        wrong: the first answers that cannot be; they are errors, too.
        unserved: open loop: what was due and had not begun when the round was broken off. It counts
            in the latencies with the time that it had waited by then.
        processor: seconds that the process computed, all of its threads together.
        memory: bytes by which the process has grown since before it opened its target.
        written: bytes that it caused to be written to the disk, with what it sent to a DynamoDB and
            what a PostgreSQL put into its log; None where the system does not say.
    """

    operations: int = 0
    units: int = 0
    seconds: float = 0.0
    errors: dict[str, int] = {}
    conflicts: int = 0
    retries: int = 0
    wrong: list[str] = []
    unserved: int = 0
    processor: float = 0.0
    memory: int = 0
    written: int | None = None
    latencies: Histogram = msgspec.field(default_factory=Histogram)

    @property
    def rate(self) -> float:
        """Entities a second."""
        return self.units / self.seconds if self.seconds else 0.0

    def add(self, other: Tally) -> None:
        """Count what another process did at the same time."""
        self.operations += other.operations
        self.units += other.units
        self.seconds = max(self.seconds, other.seconds)
        for name, count in other.errors.items():
            self.errors[name] = self.errors.get(name, 0) + count
        self.conflicts += other.conflicts
        self.retries += other.retries
        self.wrong += other.wrong
        self.unserved += other.unserved
        self.processor += other.processor
        self.memory += other.memory
        if other.written is not None:
            self.written = (self.written or 0) + other.written
        self.latencies.add(other.latencies)


class Claim(msgspec.Struct, array_like=True):
    """The writes to one entity: acknowledged, and those of which nobody knows."""

    acknowledged: int = 0
    unknown: int = 0


Claims: TypeAlias = dict[str, Claim]
"""By id. What all processes together claim is what the store has to show at the end."""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told; it answers each with one line.

    Attributes:
        do: load the data (one process alone); open it; run a round; stop and tell the claims;
            verify those of the others and its own (one process alone).
        workload: what to open it for, where that is another than the plan's.
        rate: operations a second at fixed times (open loop); None: as fast as they are answered.
    """

    do: Literal["load", "open", "run", "stop", "verify"]
    workload: str | None = None
    seconds: float = 0.0
    rate: float | None = None
    claims: Claims = {}


class Verdict(msgspec.Struct, frozen=True):
    """What a verification found. No failures among too few checks are no proof: both are told."""

    checked: int
    failures: list[str]


class Answer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a worker answers.

    Attributes:
        refused: it cannot go on, and this is why.
        left_out: the target cannot do this workload by what it declares, and that is no fault.
        apart: the data that it loaded can be opened by other processes.
    """

    refused: str | None = None
    left_out: str | None = None
    apart: bool = False
    tally: Tally | None = None
    claims: Claims | None = None
    verdict: Verdict | None = None
