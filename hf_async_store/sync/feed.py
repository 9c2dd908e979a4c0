"""The blocking form of the changes of a feed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from hf_async_store.sync.calls import Blocking

if TYPE_CHECKING:
    from hf_async_store import subscriptions
    from hf_async_store.feed import EntityChange

Change = TypeVar("Change")


class Changes(Blocking, Iterator[Change], Generic[Change]):
    """As the asynchronous `Changes`. The thread that reads it waits until there is a change."""

    _target: Any

    @property
    def token(self) -> str:
        """As `Changes.token`."""
        token: str = self._target.token
        return token

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change:
        change: Change = self._run(self._target.__anext__)
        return change


class Subscription(Changes["EntityChange"]):
    """As the asynchronous `Subscription`."""

    _target: subscriptions.Subscription

    @property
    def name(self) -> str:
        """The name of the subscription."""
        return self._target.name

    def advance(self, change: EntityChange, tx: Blocking | None = None) -> None:
        """As `Subscription.advance`."""
        self._run(partial(self._target.advance, change, None if tx is None else tx._target))
