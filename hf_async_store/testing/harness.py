"""The interface between the contract suite and an engine: it creates stores on the data of a test."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, runtime_checkable

from hf_async_store.schema import HOST_FACTORY, Collection, Field, Index

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from hf_async_store.driver import Capabilities
    from hf_async_store.strategy import StorageStrategy

CONTRACT_COLLECTIONS: Final = (
    *HOST_FACTORY,
    Collection(
        "items",
        key="item_id",
        fields=[
            "label",
            Field("count", "integer"),
            Field("ratio", "number"),
            Field("active", "boolean"),
            Field("due_at", "timestamp"),
            Field("data", "json"),
        ],
        indexes=["label", Index("count", "due_at"), Index("ratio"), Index("active")],
        open=True,
    ),
    Collection("accounts", key="account_id", fields=[Field("balance", "integer", required=True)]),
    Collection("counters", key="counter_id"),
)
"""The collections of the suite: `HOST_FACTORY`, a collection with a field of every type,
whose queries may name undeclared fields, one with a required field, and one without declared fields."""

FED: Final = Collection(
    "notes", key="note_id", fields=["label", Field("count", "integer")], feed=timedelta(hours=1)
)
UNFED: Final = Collection("drafts", key="draft_id", fields=["label"])
FEED_COLLECTIONS: Final = (FED, UNFED)


class Harness(Protocol):
    """One engine, with separate data for one test.

    A subclass of `StrategyContract` returns it from the fixture `harness`. A harness may also
    implement the protocols below; a case that needs one that is not implemented is skipped.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    def store(
        self, collections: Iterable[Collection] = CONTRACT_COLLECTIONS, **settings: object
    ) -> StorageStrategy:
        """A new store on the data of this test, not opened yet. Several may be open at once. If the
        engine is neither durable nor shared by processes, each call returns an empty store.

        Args:
            settings: keys of the strategy's configuration. The suite uses `enforce_references`, only if
                `capabilities.references` is true, and those in `DropsAllResponses.hurried`.
        """
        ...

    def url(self) -> str | None:
        """The URL with which `open_store` in another process opens the same data; None if
        `capabilities.multi_process` is false."""
        ...

    def leaks(self) -> list[str]:
        """Resources that remain after every store was closed: temporary files, connections, locks."""
        ...


@runtime_checkable
class ObservesIO(Protocol):
    """A harness that can tell whether a store has done any I/O."""

    def touched(self) -> bool:
        """Whether there is a file, a table or a connection of a store."""
        ...


@runtime_checkable
class DropsResponses(Protocol):
    """A harness that can lose the response of a request to its engine."""

    def lose_next_answer(self) -> None:
        """Let the engine execute the next write request, and lose its response."""
        ...


@runtime_checkable
class DropsAllResponses(Protocol):
    """A harness that can lose the responses of all writes, those of repeated requests too."""

    hurried: Mapping[str, object]
    """The settings with which a store soon gives up repeating a request, so that a case is short: arguments
    of `store`, for example `{"timeout": 0.2}`; empty if it never repeats one."""

    def lose_answers(self) -> AbstractContextManager[None]:
        """Until the context is left, let the engine execute each write request, and lose its response; a
        request by which the engine finds out whether an earlier one was executed is answered, or not."""
        ...


class HeldWrite(Protocol):
    """A write request that is held up on its way to the engine."""

    async def arrived(self) -> None:
        """Wait until the request has been sent."""
        ...

    async def release(self) -> None:
        """Pass the request on, even if its client has gone, and wait until the engine has responded."""
        ...


@runtime_checkable
class HoldsWrites(Protocol):
    """A harness that can hold up a write request on its way to the engine."""

    def hold_next_write(self) -> HeldWrite:
        """Hold up the next write request, which for a transaction is that of its commit."""
        ...


@runtime_checkable
class CutsConnections(Protocol):
    """A harness that can break the connections of its stores, for example by a `FaultyProxy`."""

    def cut_connections(self) -> None:
        """Break all connections of this process to the engine, which stays available."""
        ...


@runtime_checkable
class RestartsServer(Protocol):
    """A harness of an engine that declares `durable`, whose server no other test uses."""

    async def restart(self) -> None:
        """Kill the server, so that it cannot save what it has only in memory, and start it again with
        the data that it has left; return when it responds."""
        ...


@runtime_checkable
class InjectsThrottling(Protocol):
    """A harness that can let its engine throttle requests."""

    def throttle(self, requests: int) -> None:
        """Let the next `requests` requests be throttled, or be executed only in part."""
        ...


@runtime_checkable
class ExcludesFaults(Protocol):
    """A harness of an engine to which some faults cannot happen, such as one without connections."""

    impossible_faults: tuple[type, ...]
    """Of the protocols of this module, those that do not fit the engine: a fault that cannot happen, or
    `SharesDatabase` of an engine each of whose databases is one store."""


@runtime_checkable
class InjectsRowLocks(Protocol):
    """A harness that can lock a single entity from outside of the stores."""

    def hold(self, collection: str, entity_id: str) -> AbstractAsyncContextManager[None]:
        """Lock an existing entity, as a transaction of another program does: until the context is
        left, a change of this entity must wait."""
        ...


@runtime_checkable
class RefusesLabels(Protocol):
    """A harness that can add a constraint to the database of its engine."""

    def refuse_label(self, label: str) -> None:
        """Let the engine refuse every item with this label, like a constraint that an administrator
        has added. The tables exist already."""
        ...


@runtime_checkable
class SharesDatabase(Protocol):
    """A harness whose engine can keep several stores in one database, next to tables of other programs."""

    def neighbour(self, name: str, collections: Iterable[Collection]) -> StorageStrategy:
        """A store in the same database whose tables have names that begin with another prefix; not
        opened yet.

        Raises:
            ConfigurationError: the engine does not accept this prefix.
        """
        ...

    async def occupy(self, collection: str) -> str:
        """Let something of another program have the name of the table of a collection, before the first
        write. Returns the name. If the collections of a store share a table, it is the name of this one."""
        ...

    async def occupant(self) -> object:
        """The form and contents of what `occupy` has created, to compare."""
        ...


@runtime_checkable
class HasStranger(Protocol):
    """A harness that can make a store on other data, which is no neighbour (see `SharesDatabase`)."""

    def stranger(self, collections: Iterable[Collection]) -> StorageStrategy:
        """A store on other data than that of this test, not opened yet."""
        ...


@runtime_checkable
class ForgetsFeed(Protocol):
    """A harness that can let the retention of a change feed pass."""

    async def forget_feed(self, store: StorageStrategy, collection: str) -> None:
        """Let the engine remove from the feed what is in it now, as when its retention has passed."""
        ...


@runtime_checkable
class DisturbsFeeds(Protocol):
    """A harness that can do to a store what may happen to it at any time."""

    async def disturb(self, store: StorageStrategy) -> None:
        """Compact or vacuum the data, end all connections, or the like, while the store is in use."""
        ...


def skip_engine(engine: str, reason: str) -> NoReturn:
    """Skip the test because its engine is not available; the summary of the run names the engine.

    Called by the fixture `harness`. With `HF_ASYNC_STORE_REQUIRE_ENGINES=all` the run then fails.
    """
    import pytest

    from hf_async_store.testing.plugin import LEFT_OUT

    pytest.skip(f"{LEFT_OUT}{engine} ({reason})")


def skip_fault(harness: Harness, protocol: type) -> NoReturn:
    """Skip the test because the harness does not implement a protocol by which a fault is injected; the
    summary of the run names it, unless the engine has no data that a fault could damage, or the harness
    states that the fault cannot happen."""
    import pytest

    from hf_async_store.testing.plugin import NOT_TRIED

    name = protocol.__name__
    if isinstance(harness, ExcludesFaults) and protocol in harness.impossible_faults:
        pytest.skip(f"{name}: this cannot happen to the engine")
    lasting = harness.capabilities.durable or harness.capabilities.multi_process
    pytest.skip(f"{NOT_TRIED}{name}" if lasting else f"the harness does not implement {name}")
