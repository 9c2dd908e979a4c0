"""What the harness and its worker processes tell each other: what to measure, and the results."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast

import msgspec

from hf_async_store_bench.acked_writes import AckedByEntity
from hf_async_store_bench.histogram import Histogram

if TYPE_CHECKING:
    from hf_async_store_bench.adapters import Adapter

Role: TypeAlias = Literal["strategy", "baseline", "competitor"]
Needs: TypeAlias = Literal["nothing", "folder", "postgres", "dynamodb"]
_Any = TypeVar("_Any")


class SystemUnderTest(msgspec.Struct, frozen=True, kw_only=True):
    """One side of the comparison.

    Attributes:
        role: an engine of the product (or a user's own store), hand-written code on the same driver,
            or what others use instead.
        engine: which engine it is, is the baseline of, or is an alternative to.
        adapter: `module:class` of its `Adapter`, imported only by the process that measures it.
        needs: what its data is stored in.
        package: what must be installed, by the name that it is imported by.
        blocking: each call blocks the whole process, so one task can do all that it is able to.
        url: of a strategy, its store, with `{folder}`, `{postgres}` and `{dynamodb}` to be filled in.
        nondurable_query: added to a strategy's URL when acknowledged writes need not be durable.
        copied: its data can be copied as a folder or a database.
        max_entities: more than this number its server cannot hold, for the reason behind it.
        made: of a baseline, what it does and how it was written.
        source: a checkout whose product is measured instead of the installed one.
    """

    name: str
    role: Role
    engine: str
    adapter: str
    needs: Needs
    package: str | None = None
    blocking: bool = False
    url: str = ""
    nondurable_query: str = ""
    copied: bool = True
    max_entities: tuple[int, str] | None = None
    made: str = ""
    source: str = ""

    def url_of(self, **values: str) -> str:
        """The URL, filled in."""
        url = self.url
        for name, value in values.items():
            url = url.replace("{" + name + "}", value)
        return url

    def load(self) -> type[Adapter]:
        """The class of its adapter, imported now."""
        module, _, name = self.adapter.partition(":")
        return cast("type[Adapter]", getattr(import_module(module), name))


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where one system stores its data. It travels over a pipe: it may hold a password.

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
    """One workload with its parameters.

    Attributes:
        tasks: concurrent tasks in each process.
        entities: machines that are stored before it begins.
        size: bytes of JSON of one machine.
        burst: machines of one acquired request, and of one batch.
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
        burst = f" of {self.burst}" if self.burst != 1000 else ""
        return f"{self.workload}{mixed}{burst}, {tasks}" + (
            f" in each of {self.processes} processes" if self.processes > 1 else ""
        )


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The part of one worker process."""

    system: SystemUnderTest
    environment: Environment
    load: Load
    index: int = 0
    seed: int = 1


class WrongAnswerError(Exception):
    """A read returned what cannot be. It makes the run fail."""


class RoundStats(msgspec.Struct, kw_only=True):
    """What one process, or several together, did in one round.

    Attributes:
        operations: that were acknowledged; `units` is how many entities they were about.
        seconds: from the start to the end of the last operation.
        errors: by the name of the exception; conflicts are counted apart.
        retries: further tries inside of operations that succeeded.
        wrong: the first wrong answers; they are errors, too.
        unserved: open loop: operations that were due and had not begun when the round was ended. They
            count in the latencies with the time that they had waited by then.
        processor: seconds of processor time, of all threads of the process.
        memory: bytes by which the process has grown since before it opened its system.
        written: bytes that it wrote to disks, plus what it sent to a DynamoDB server and what a
            PostgreSQL server wrote into its log; None where the system does not say.
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

    def add(self, other: RoundStats) -> None:
        """Count what another process did at the same time."""
        for name in ("operations", "units", "conflicts", "retries", "unserved", "processor"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.memory += other.memory
        self.seconds = max(self.seconds, other.seconds)
        for name, count in other.errors.items():
            self.errors[name] = self.errors.get(name, 0) + count
        self.wrong += other.wrong
        if other.written is not None:
            self.written = (self.written or 0) + other.written
        self.latencies.add(other.latencies)


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of a scenario: a value of each round, and the bound that was promised, if any."""

    what: str
    samples: list[float]
    unit: str
    at_least: float | None = None
    at_most: float | None = None


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told; it answers each with one line.

    Attributes:
        do: load the data (one process alone); open it; run a round; stop and tell what was
            acknowledged; verify that of all processes (one process alone); or measure a scenario.
        workload: what to open it for, where that is another than the plan's; or the scenario.
        rate: operations a second at fixed times (open loop); None: as fast as they are answered.
    """

    do: Literal["load", "open", "run", "stop", "verify", "scenario"]
    workload: str | None = None
    seconds: float = 0.0
    rate: float | None = None
    acked: AckedByEntity = {}


class VerificationResult(msgspec.Struct, frozen=True):
    """What a verification found, and among how many checks."""

    checked: int
    failures: list[str]


class Answer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a worker answers.

    Attributes:
        refused: it cannot go on, and this is why.
        skipped: the system cannot do this workload by what it declares, and that is no fault.
        apart: the data that it loaded can be opened by other processes.
    """

    refused: str | None = None
    skipped: str | None = None
    apart: bool = False
    stats: RoundStats | None = None
    acked: AckedByEntity | None = None
    verification: VerificationResult | None = None
    measurements: list[Measurement] | None = None


def encode(message: object) -> bytes:
    """As one line of JSON, without its end."""
    return msgspec.json.encode(message, enc_hook=_encode_histogram)


def decode(line: bytes, kind: type[_Any]) -> _Any:
    """Raises:
    msgspec.MsgspecError: it is no such message.
    """
    return msgspec.json.decode(line, type=kind, dec_hook=_decode_histogram)


def _encode_histogram(value: object) -> object:
    if isinstance(value, Histogram):
        return value.encoded()
    raise NotImplementedError(type(value))


def _decode_histogram(kind: type, value: Any) -> object:
    if kind is Histogram:
        return Histogram(value)
    raise NotImplementedError(kind)
