"""How the contract suite reaches an engine: stores on one set of data, made as often as wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn, Protocol, runtime_checkable

from hf_async_store.schema import HOST_FACTORY, Collection, Field, Index

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractAsyncContextManager

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
    ),
    Collection("accounts", key="account_id", fields=[Field("balance", "integer", required=True)]),
    Collection("counters", key="counter_id"),
)
"""What the suite declares: the spec's schema, a collection of every field type, one with a required
field, and one with no fields at all."""


class Harness(Protocol):
    """One engine, with data of its own for one test.

    A subclass of `StrategyContract` gives it as the fixture `harness`. What else a harness can do
    with its engine it shows by the protocols below; a case that needs more is skipped.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    def store(
        self, collections: Iterable[Collection] = CONTRACT_COLLECTIONS, **settings: object
    ) -> StorageStrategy:
        """A store on the data of this test, not opened yet. Several may be open at once, unless
        the engine is of one process and forgets (then each call gives an empty store).

        Args:
            settings: keys of the strategy's configuration. The suite uses `enforce_references`,
                and only where `capabilities.references` is true.
        """
        ...

    def url(self) -> str | None:
        """What `open_store` takes in another process to reach the same data; None where
        `capabilities.processes` is false."""
        ...

    def leaks(self) -> list[str]:
        """What is left over though every store was closed: temporary files, connections, locks."""
        ...


@runtime_checkable
class ObservesIO(Protocol):
    """A harness that can tell whether a store did anything yet."""

    def touched(self) -> bool:
        """Whether there is any trace of a store: a file, a table, a connection."""
        ...


@runtime_checkable
class DropsResponses(Protocol):
    """A harness of an engine behind a network."""

    def lose_next_answer(self) -> None:
        """Let the next request that writes be carried out, and its answer be lost."""
        ...


@runtime_checkable
class InjectsThrottling(Protocol):
    """A harness of an engine that may ask for less."""

    def throttle(self, requests: int) -> None:
        """Let so many of the next requests be refused as too many, or left undone in part."""
        ...


@runtime_checkable
class InjectsRowLocks(Protocol):
    """A harness of an engine where somebody else can hold one entity, and the others are free."""

    def hold(self, collection: str, entity_id: str) -> AbstractAsyncContextManager[None]:
        """Hold an entity that is there, as a transaction of another program does: until the end, a
        change of it must wait."""
        ...


@runtime_checkable
class RefusesLabels(Protocol):
    """A harness of an engine with rules of its own, beside those of the store."""

    def refuse_label(self, label: str) -> None:
        """Let the engine refuse every item with this label, as a constraint of its administrator
        would. The tables are there."""
        ...


def skip_engine(engine: str, reason: str) -> NoReturn:
    """For a fixture `harness` whose engine cannot be had here: skip, and be named at the end.

    With `HF_ASYNC_STORE_REQUIRE_ENGINES=all` the run then fails.
    """
    import pytest

    from hf_async_store.testing.plugin import LEFT_OUT

    pytest.skip(f"{LEFT_OUT}{engine} ({reason})")
