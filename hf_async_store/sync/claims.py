"""Blocking claims."""

from __future__ import annotations

from asyncio import CancelledError
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Generic, Self

from hf_async_store import claims, typed_collections
from hf_async_store.errors import ClaimLostError
from hf_async_store.models import Model
from hf_async_store.sync.calls import Blocking, blocking
from hf_async_store.sync.event_loop_thread import EventLoopThread
from hf_async_store.sync.transaction import Transaction

if TYPE_CHECKING:
    from hf_async_store.values import Entity


class _Claim(Blocking, claims.ClaimFacts):
    """What claims of entities and of instances share."""

    _target: claims.Claim

    def __init__(
        self,
        claim: claims.Claim,
        loop_thread: EventLoopThread,
        transaction_type: type[Transaction],
    ) -> None:
        super().__init__(claim, loop_thread)
        self._held = claim
        self._transaction_type = transaction_type

    def __repr__(self) -> str:
        return repr(self._target)

    delete = blocking(claims.Claim.delete)
    renew = blocking(claims.Claim.renew)
    release = blocking(claims.Claim.release)

    def transaction(self) -> Transaction:
        """As `Claim.transaction`, for use with `with`."""
        return self._transaction_type(self._target.transaction(), self._opened())

    def __enter__(self) -> Self:
        async def enter() -> None:
            self._target._enter(None)

        self._run(enter)
        return self

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if exc is not None and not isinstance(exc, Exception):
            # KeyboardInterrupt, SystemExit: in a task, asyncio would end the event loop.
            with suppress(ClaimLostError):
                self._run(partial(self._target.__aexit__, None, CancelledError(), None))
            return
        self._run(partial(self._target.__aexit__, None, exc, None))


class Claim(_Claim):
    """As the asynchronous `Claim`, for use with `with`: it is renewed in the background.

    If it is lost meanwhile, its methods raise ClaimLostError from then on, and so does the end of the
    block: a thread cannot be cancelled.
    """

    @property
    def entity(self) -> Entity:
        """The entity as it was claimed."""
        return self._target.entity

    update = blocking(claims.Claim.update)
    finish = blocking(claims.Claim.finish)


class TypedClaim(_Claim, Generic[Model]):
    """As `TypedClaim`, for use with `with`: it is renewed in the background.

    If it is lost meanwhile, its methods raise ClaimLostError from then on, and so does the end of the
    block: a thread cannot be cancelled.
    """

    def __init__(
        self,
        claim: typed_collections.TypedClaim[Model],
        loop_thread: EventLoopThread,
        transaction_type: type[Transaction],
    ) -> None:
        super().__init__(claim.claim, loop_thread, transaction_type)
        self._typed = claim

    @property
    def claim(self) -> Claim:
        """The same claim, whose `entity` is a dict."""
        return Claim(self._target, self._opened(), self._transaction_type)

    @property
    def instance(self) -> Model:
        """As `TypedClaim.instance`."""
        return self._typed.instance

    def update(self, instance: Model | None = None, /, **fields: object) -> int:
        """As `TypedClaim.update`."""
        return self._run(partial(self._typed.update, instance, **fields))

    def finish(self, instance: Model | None = None, /, **fields: object) -> None:
        """As `TypedClaim.finish`."""
        self._run(partial(self._typed.finish, instance, **fields))
