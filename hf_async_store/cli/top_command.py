"""A view of what happens in a store, as it can be seen from outside of the programs that use it: top."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from hf_async_store.claims import LOCKS
from hf_async_store.cli import output
from hf_async_store.cli.context import Context
from hf_async_store.cli.exit_codes import STORAGE, sentence
from hf_async_store.errors import StorageError
from hf_async_store.repository import operation_timeout
from hf_async_store.values import utc_now

if TYPE_CHECKING:
    from argparse import Namespace

    from rich.console import RenderableType

    from hf_async_store.driver import ClaimInfo
    from hf_async_store.strategy import StorageStrategy

_INTERVAL_SECONDS: Final = 2.0
_INTERVAL_OF_SCANS: Final = 60.0
"""The default if counting entities reads, and costs, as much as reading them."""

_HEALTH_SECONDS: Final = 30.0
"""`health` writes a test value, and may check a whole file."""

_RETRY_SECONDS: Final = 1.0
_CANCEL_SECONDS: Final = 0.2


class CollectionFigures(msgspec.Struct, frozen=True):
    """What is seen of a collection.

    Attributes:
        entities: their number.
        entities_per_second: by how much their number changes.
        changes_per_second: None if the collection has no feed.
        feed_position: the token of the last change that was seen.
        claims: how many are held; None if the engine has no claims.
        oldest_claim: the id of the entity whose claim is held longest, as far as it was observed.
        oldest_claim_seconds: for how long it was observed.
    """

    entities: int
    entities_per_second: float
    changes_per_second: float | None
    feed_position: str | None
    claims: int | None
    oldest_claim: str | None
    oldest_claim_seconds: float


class Sample(msgspec.Struct, frozen=True):
    """What is seen of a store at one moment.

    Attributes:
        time: when it was taken, by the clock of this machine.
        seconds: since the sample before, the time to which the rates refer.
        locks: the named locks and permits that are held.
        health: the last report of `health`.
        health_seconds: how long ago `health` was called.
    """

    time: str
    seconds: float
    collections: dict[str, CollectionFigures]
    locks: list[str]
    health: dict[str, Any]
    health_seconds: float


class FailedSample(msgspec.Struct, frozen=True):
    """A look at a store that failed.

    Attributes:
        time: as in `Sample`.
        error: why.
    """

    time: str
    error: str


def top(arguments: Namespace) -> int:
    context = Context(arguments)

    async def work(store: StorageStrategy) -> int:
        scans = store.capabilities.query_isolation != "snapshot"
        interval = arguments.interval or (_INTERVAL_OF_SCANS if scans else _INTERVAL_SECONDS)
        async with AsyncExitStack() as stack:
            leave = stack.enter_context(_signals())
            observer = await stack.enter_async_context(_observer(store))
            view = _View(context, observer, interval)
            watching = asyncio.ensure_future(view.once() if arguments.once else view.run(leave))
            leaving = asyncio.ensure_future(leave.wait())
            await asyncio.wait({watching, leaving}, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            if not watching.done():
                watching.cancel()
                await asyncio.wait({watching}, timeout=_CANCEL_SECONDS)
            return 0 if not watching.done() or watching.cancelled() else watching.result()

    return context.run(work, writes=True, needs_store=True)


@contextmanager
def _signals() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C or SIGTERM sets."""
    loop = asyncio.get_running_loop()
    leave = asyncio.Event()
    previous = signal.getsignal(signal.SIGINT)
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, leave.set)
    try:
        yield leave
    finally:
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)
        signal.signal(signal.SIGINT, previous)


# -- observing ------------------------------------------------------------------------------


class _Feed(msgspec.Struct):
    """The changes of a collection that were seen since the last sample."""

    changes: int = 0
    position: str | None = None


@asynccontextmanager
async def _observer(store: StorageStrategy) -> AsyncIterator[_Observer]:
    feeds = {name: _Feed() for name, each in store.collections.items() if each.feed is not None}
    tasks = [asyncio.ensure_future(_count(store, name, feed)) for name, feed in feeds.items()]
    try:
        yield _Observer(store, feeds)
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _count(store: StorageStrategy, collection: str, feed: _Feed) -> None:
    """Count the changes of a collection; after an error, begin again with what is committed then."""
    while True:
        with suppress(StorageError):
            async with store.watch(collection) as changes:
                async for each in changes:
                    feed.changes += 1
                    feed.position = each.token
        await asyncio.sleep(_RETRY_SECONDS)


class _Observer:
    """Takes samples of a store."""

    def __init__(self, store: StorageStrategy, feeds: Mapping[str, _Feed]) -> None:
        self._store = store
        self._feeds = feeds
        self._counts: dict[str, int] = {}
        self._first_seen: dict[tuple[str, str, int], float] = {}
        self._health: dict[str, Any] = {}
        self._health_at = float("-inf")
        self._last = time.monotonic()

    async def sample(self) -> Sample:
        """What is seen now; rates refer to the time since the sample before."""
        now = time.monotonic()
        health_at, self._health_at = self._health_at, float("-inf")  # asked again after a failure
        if now - health_at >= _HEALTH_SECONDS:
            self._health, health_at = await self._store.health(), now
        counts = {each: await self._store.count_entities(each) for each in self._store.collections}
        claims = {each: await self._claims(each) for each in self._store.collections}
        locks = await self._claims(LOCKS)
        now = time.monotonic()
        seconds = now - self._last
        figures = {
            name: self._figures(name, counts[name], claims[name], now, seconds) for name in counts
        }
        held = {
            (name, each.id, each.token) for name, found in claims.items() for each in found or ()
        }
        self._first_seen = {key: at for key, at in self._first_seen.items() if key in held}
        self._counts, self._last, self._health_at = counts, now, health_at
        return Sample(
            utc_now(),
            round(seconds, 3),
            figures,
            [each.id for each in locks or ()],
            self._health,
            round(now - health_at, 1),
        )

    async def _claims(self, collection: str) -> list[ClaimInfo] | None:
        """The claims that are held; None if the engine has none."""
        if not self._store.capabilities.claims:
            return None
        return [each for each in await self._store.claims(collection) if each.state == "held"]

    def _figures(
        self, name: str, count: int, claims: list[ClaimInfo] | None, now: float, seconds: float
    ) -> CollectionFigures:
        since = {
            each.id: self._first_seen.setdefault((name, each.id, each.token), now)
            for each in claims or ()
        }
        oldest = min(since, key=lambda each: since[each], default=None)
        feed = self._feeds.get(name)
        changes, position = (None, None) if feed is None else (feed.changes, feed.position)
        if feed is not None:
            feed.changes = 0
        return CollectionFigures(
            count,
            round((count - self._counts.get(name, count)) / seconds, 1),
            None if changes is None else round(changes / seconds, 1),
            position,
            None if claims is None else len(claims),
            oldest,
            0.0 if oldest is None else round(now - since[oldest], 1),
        )


# -- showing --------------------------------------------------------------------------------


class _View:
    """Shows samples: on a screen of its own on a terminal, otherwise as lines of JSON."""

    def __init__(self, context: Context, observer: _Observer, interval: float) -> None:
        self._context = context
        self._observer = observer
        self._interval = interval

    async def once(self) -> int:
        """Show what is seen in one interval; returns the exit code."""
        await self._sample()
        await asyncio.sleep(self._interval)
        sample = await self._sample()
        if output.for_people(self._context.arguments):
            from rich.console import Console

            Console().print(_rendered(self._context.location(), sample, None))
        else:
            output.json_line(sample)
        return STORAGE if sample.health["problems"] else 0

    async def run(self, leave: asyncio.Event) -> int:
        """Show samples until the caller cancels it, or the key q was typed."""
        if not output.for_people(self._context.arguments):
            while True:
                output.json_line(await self._sample_or_failure())
                output.flush()
                await asyncio.sleep(self._interval)
        from rich.live import Live
        from rich.text import Text

        with _keys(leave), Live(Text("..."), screen=True, auto_refresh=False) as live:
            last: Sample | None = None
            while True:
                sample = await self._sample_or_failure()
                if isinstance(sample, Sample):
                    last, problem = sample, None
                else:
                    problem = sample.error
                live.update(_rendered(self._context.location(), last, problem), refresh=True)
                await asyncio.sleep(self._interval)

    async def _sample_or_failure(self) -> Sample | FailedSample:
        """What is seen now; a failure does not end the command, because the store may come back."""
        try:
            return await self._sample()
        except StorageError as exc:
            return FailedSample(utc_now(), sentence(exc))

    async def _sample(self) -> Sample:
        async with operation_timeout(self._context.arguments.timeout):
            return await self._observer.sample()


@contextmanager
def _keys(leave: asyncio.Event) -> Iterator[None]:
    """Set the event when q is typed; the terminal does not echo meanwhile."""
    if not output.is_terminal(sys.stdin):
        yield
        return
    import os
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    loop = asyncio.get_running_loop()

    def read() -> None:
        typed = b""
        with suppress(OSError):
            typed = os.read(descriptor, 64)
        if not typed:  # the terminal is gone
            loop.remove_reader(descriptor)
        if not typed or b"q" in typed.lower():
            leave.set()

    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, read)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _rendered(location: str, sample: Sample | None, problem: str | None) -> RenderableType:
    """The screen.

    Args:
        sample: the last one that was taken.
        problem: why there is none of this moment.
    """
    from rich.console import Group
    from rich.text import Text

    title = Text(f"{output.printable(location)}   {time.strftime('%H:%M:%S')}", "bold")
    parts: list[RenderableType] = [title]
    style = "" if problem is None else "dim"
    if problem is not None:
        parts.append(Text(output.printable(problem), "red"))
        if sample is not None:
            parts.append(Text(f"what follows is not current: it was seen at {sample.time}", "red"))
    if sample is not None:
        parts += [Text(""), _table(sample, style), Text("")]
        parts += [Text(output.printable(each), style) for each in _lines(sample)]
        problems = sample.health["problems"]
        parts += [Text(output.printable(f"problem: {each}"), "red") for each in problems]
    return Group(*parts)


def _table(sample: Sample, style: str) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, style=style)
    table.add_column("collection")
    for heading in ("entities", "entities/s", "changes/s", "claims"):
        table.add_column(heading, justify="right")
    table.add_column("oldest claim")
    for name, each in sample.collections.items():
        changes = (
            "no feed" if each.changes_per_second is None else f"{each.changes_per_second:,.1f}"
        )
        claims = "-" if each.claims is None else f"{each.claims:,}"
        oldest = ""
        if each.oldest_claim is not None:
            oldest = output.printable(f"{each.oldest_claim} ({each.oldest_claim_seconds:,.0f} s)")
        cells = (f"{each.entities:,}", f"{each.entities_per_second:+,.1f}", changes, claims, oldest)
        table.add_row(name, *map(Text, cells), style=style)
    return table


def _lines(sample: Sample) -> Iterator[str]:
    """What is shown besides the table."""
    health = sample.health
    if sample.locks:
        yield f"locks held: {', '.join(sample.locks)}"
    yield f"health, checked {sample.health_seconds:,.0f} s ago:"
    sizes = dict(_sizes(health))
    if sizes:
        yield "bytes: " + ", ".join(f"{name} {number:,}" for name, number in sizes.items())
    connections = [_counted(name, health[name]) for name in _CONNECTIONS if name in health]
    if connections:
        yield f"connections: {'; '.join(connections)}"
    if "latency_ms" in health:
        yield f"a test write took {health['latency_ms']:,.1f} ms"
    for each in health["slow_queries"]:
        advice = f"; {each['advice']}" if each["advice"] else ""
        yield (
            f"slow here: {each['collection']} {each['filter'] or 'all'}: {each['count']:,} times, up to "
            f"{each['worst_seconds']:.3f} s{advice}"
        )


def _counted(name: str, figures: int | Mapping[str, int]) -> str:
    """One figure, or several of one name: `pool most 15, open 1, in use 0`."""
    values = {"": figures} if isinstance(figures, int) else figures
    shown = ", ".join(f"{each} {number:,}".strip() for each, number in values.items())
    return f"{name} {shown}".replace("_", " ")


_CONNECTIONS: Final = ("pool", "streams", "server_connections", "server_max_connections")


def _sizes(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """The numbers of bytes in a report, also those inside of it, by their names."""
    for name, value in report.items():
        if isinstance(value, dict):
            in_bytes = name.endswith("_bytes")
            inner = {f"{each}_bytes": size for each, size in value.items()} if in_bytes else value
            yield from _sizes(inner, prefix if in_bytes else f"{prefix}{name} ")
        elif "bytes" in name and isinstance(value, int):
            shown = name.replace("_bytes", "").replace("bytes", "").replace("_", " ")
            yield f"{prefix}{shown}".strip(), value
