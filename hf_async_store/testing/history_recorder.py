"""Records the operations and results of many callers of a store, for `consistency_checkers`.

The callers run as tasks of one process or in several processes of one machine. On Linux and macOS
`monotonic_ns` is the same clock for all of them.
"""

from __future__ import annotations

import asyncio
from time import monotonic_ns
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypeVar, cast

from hf_async_store.changes import ABSENT, ANY, Expect
from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    ConcurrencyConflictError,
    EntityNotFoundError,
    StorageError,
)
from hf_async_store.testing.consistency_checkers import NOTHING, Act, Answer, Installed, Txn
from hf_async_store.values import Entity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence
    from random import Random

    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.transaction import Transaction

COLLECTION: Final = "counters"
"""A collection without declared fields: an entity has only an id and a value."""

_REFUSALS: Final = (AlreadyExistsError, EntityNotFoundError, ConcurrencyConflictError)
_Verb: TypeAlias = 'Literal["get", "save", "update", "delete"]'
_MAX_PAUSE_SECONDS: Final = 0.002

Result = TypeVar("Result")


def _entity(key: str, value: str) -> Entity:
    return {"counter_id": key, "value": value}


def installed(entity: Entity | None) -> Installed:
    """The version and value of an entity, as they are recorded."""
    if entity is None:
        return NOTHING
    return cast("int", entity["version"]), cast("str", entity["value"])


async def _random_pause(random: Random) -> None:
    """A pause of random length, mostly none, so that the callers do not run in lockstep."""
    await asyncio.sleep(random.choice((0, 0, 0, random.random() * _MAX_PAUSE_SECONDS)))


# -- single keys ----------------------------------------------------------------------------


class _Recorder:
    """One caller.

    Args:
        caller: a unique name; the values that it writes contain it.
    """

    def __init__(self, store: StorageStrategy, random: Random, caller: str) -> None:
        self._store = store
        self._random = random
        self._caller = caller
        self._written = 0

    def _value(self) -> str:
        self._written += 1
        return f"{self._caller}:{self._written}"


class ActRecorder(_Recorder):
    """A caller of single operations and of batches, which are recorded as single operations."""

    def __init__(self, store: StorageStrategy, random: Random, caller: str) -> None:
        super().__init__(store, random, caller)
        self._versions: dict[str, int] = {}
        self.acts: list[Act] = []

    async def run(self, keys: Sequence[str], steps: int) -> list[Act]:
        """Make `steps` random calls; returns their history."""
        for _ in range(steps):
            verb = self._random.choice(
                (self._get, self._get, self._save, self._save, self._update, self._delete)
            )
            if self._random.random() < 0.25:
                await verb(self._random.sample(keys, self._random.randint(1, len(keys))), True)
            else:
                await verb([self._random.choice(keys)], False)
            await _random_pause(self._random)
        return self.acts

    async def _get(self, keys: list[str], many: bool) -> None:
        read = (
            self._store.get_entities(COLLECTION, keys)
            if many
            else _one(self._store.get_entity(COLLECTION, keys[0]))
        )
        invoked = monotonic_ns()
        try:
            entities = await read
        except StorageError:
            return  # a failed read has no result to record
        for key, entity in zip(keys, entities, strict=True):
            seen = None if entity is None else installed(entity)
            self._record("get", key, invoked, seen)

    async def _save(self, keys: list[str], many: bool) -> None:
        expected = {key: self._expected(key, absent=True) for key in keys}
        values = {key: self._value() for key in keys}
        entities = [_entity(key, value) for key, value in values.items()]
        await self._write(
            "save",
            expected,
            values,
            self._store.save_entities(COLLECTION, entities, _expected_versions(expected))
            if many
            else _one(
                self._store.save_entity(COLLECTION, entities[0], expected_version=expected[keys[0]])
            ),
        )

    async def _update(self, keys: list[str], many: bool) -> None:
        expected = {key: self._expected(key, absent=False) for key in keys}
        values = {key: self._value() for key in keys}
        fields = {key: {"value": value} for key, value in values.items()}
        await self._write(
            "update",
            expected,
            values,
            self._store.update_entities(COLLECTION, fields, _expected_versions(expected))
            if many
            else _one(
                self._store.update_entity(
                    COLLECTION, keys[0], fields[keys[0]], expected_version=expected[keys[0]]
                )
            ),
        )

    async def _delete(self, keys: list[str], many: bool) -> None:
        expected = {key: self._expected(key, absent=False) for key in keys}
        await self._write(
            "delete",
            expected,
            dict.fromkeys(keys, ""),
            self._store.delete_entities(COLLECTION, keys, _expected_versions(expected))
            if many
            else _one(
                self._store.delete_entity(COLLECTION, keys[0], expected_version=expected[keys[0]])
            ),
        )

    async def _write(
        self,
        verb: _Verb,
        expected: dict[str, int | Expect],
        values: dict[str, str],
        work: Awaitable[Sequence[int | bool]],
    ) -> None:
        invoked = monotonic_ns()
        outcomes: Sequence[int | bool | StorageError]
        try:
            outcomes = await work
        except BatchError as exc:
            outcomes = exc.outcomes
        except StorageError as exc:
            outcomes = [exc] * len(values)
        for (key, value), answer in zip(values.items(), outcomes, strict=True):
            self._record_write(verb, key, value, expected[key], invoked, answer)

    def _record_write(
        self,
        verb: _Verb,
        key: str,
        value: str,
        expect: int | Expect,
        invoked: int,
        answer: int | bool | StorageError,
    ) -> None:
        if isinstance(answer, _REFUSALS):
            self._record(verb, key, invoked, type(answer).__name__, value, expect)
        elif isinstance(answer, StorageError):
            if answer.outcome_unknown:
                self._record(verb, key, invoked, None, value, expect, known=False)
        else:
            self._record(verb, key, invoked, answer, value, expect)

    def _record(
        self,
        verb: _Verb,
        key: str,
        invoked: int,
        answer: Answer,
        value: str = "",
        expect: int | Expect = ANY,
        *,
        known: bool = True,
    ) -> None:
        if isinstance(answer, tuple):
            self._versions[key] = answer[0]
        elif type(answer) is int:
            self._versions[key] = answer
        self.acts.append(
            Act(
                caller=self._caller,
                key=key,
                verb=verb,
                invoked=invoked,
                responded=monotonic_ns() if known else None,
                answer=answer,
                value=value,
                expect="any"
                if expect is ANY
                else "absent"
                if expect is ABSENT
                else cast("int", expect),
            )
        )

    def _expected(self, key: str, *, absent: bool) -> int | Expect:
        """A precondition: often none, otherwise the version seen last or a similar one."""
        choice = self._random.random()
        if choice < 0.4:
            return ANY
        if choice < 0.5 and absent:
            return ABSENT
        version = self._versions.get(key, 1)
        return version if choice < 0.9 else self._random.randint(0, version + 1)


async def _one(work: Awaitable[Result]) -> list[Result]:
    return [await work]


def _expected_versions(expected: dict[str, int | Expect]) -> dict[str, int | Expect]:
    """`expected_versions` of a batch, which contains no entry for "any"."""
    return {key: expect for key, expect in expected.items() if expect is not ANY}


# -- transactions ---------------------------------------------------------------------------


class _RollbackError(Exception):
    """Raised to roll a transaction back."""


class TxnRecorder(_Recorder):
    """A caller of transactions over several keys, with single operations between them.

    It never deletes, so that the versions of a key define the order of its writes.
    """

    def __init__(self, store: StorageStrategy, random: Random, caller: str) -> None:
        super().__init__(store, random, caller)
        self._reads: list[tuple[str, Installed]] = []
        self._writes: dict[str, list[Installed]] = {}
        self.txns: list[Txn] = []

    async def run(self, keys: Sequence[str], steps: int) -> list[Txn]:
        """Make `steps` random transactions and single operations; returns their history."""
        for _ in range(steps):
            work = self._random.choice((self._transaction, self._transaction, self._single))
            self._reads, self._writes = [], {}
            began = monotonic_ns()
            committed = await self._committed(work(keys))
            self.txns.append(
                Txn(
                    caller=self._caller,
                    reads=self._reads,
                    writes=self._writes,
                    committed=committed,
                    began=began,
                    ended=monotonic_ns(),
                )
            )
            await _random_pause(self._random)
        return self.txns

    async def _committed(self, work: Awaitable[None]) -> bool | None:
        try:
            await work
        except _RollbackError:
            return False
        except StorageError as exc:
            return None if exc.outcome_unknown else False
        return True

    async def _transaction(self, keys: Sequence[str]) -> None:
        work = self._random.choice((self._read_then_write, self._random_accesses))
        async with self._store.begin_transaction() as tx:
            await work(tx, keys)
            if self._random.random() < 0.1:
                raise _RollbackError

    async def _read_then_write(self, tx: Transaction, keys: Sequence[str]) -> None:
        """Read two keys, then write one of them: not serializable if only write conflicts are detected."""
        chosen = self._random.sample(keys, 2)
        if self._random.random() < 0.5:
            await self._get_all(tx, chosen)
        else:
            for key in chosen:
                await self._get(tx, key)
                await _random_pause(self._random)
        await _random_pause(self._random)
        await self._put(tx, chosen[0])

    async def _random_accesses(self, tx: Transaction, keys: Sequence[str]) -> None:
        for key in self._random.sample(keys, self._random.randint(1, 3)):
            await self._access(tx, key)
            await _random_pause(self._random)

    async def _access(self, tx: Transaction, key: str) -> None:
        if self._random.random() < 0.6:
            await self._get(tx, key)
        if self._random.random() < 0.6:
            await self._put(tx, key)
        if self._random.random() < 0.2 and self._store.capabilities.savepoints:
            await self._rolled_back_savepoint(tx, key)
        if self._random.random() < 0.2:
            await self._get(tx, key)

    async def _rolled_back_savepoint(self, tx: Transaction, key: str) -> None:
        before = {each: list(versions) for each, versions in self._writes.items()}
        try:
            async with tx.begin_transaction() as inner:
                await self._put(inner, key)
                await self._get(inner, key)
                raise _RollbackError
        except _RollbackError:
            self._writes = before

    async def _single(self, keys: Sequence[str]) -> None:
        key = self._random.choice(keys)
        choice = self._random.random()
        if choice < 0.4:
            await self._get(self._store, key)
        elif choice < 0.8:
            await self._put(self._store, key)
        else:
            await self._modify(key)

    async def _modify(self, key: str) -> None:
        value = self._value()

        def change(entity: Entity) -> Entity:
            self._reads = [(key, installed(entity))]
            return {**entity, "value": value}

        version = await self._store.modify_entity(COLLECTION, key, change)
        self._writes[key] = [(version, value)]

    async def _get(self, repository: RepositoryInterface, key: str) -> None:
        self._record_read(key, await repository.get_entity(COLLECTION, key))

    async def _get_all(self, repository: RepositoryInterface, keys: list[str]) -> None:
        for key, entity in zip(keys, await repository.get_entities(COLLECTION, keys), strict=True):
            self._record_read(key, entity)

    def _record_read(self, key: str, entity: Entity | None) -> None:
        seen = installed(entity)
        if key in self._writes:
            own = self._writes[key][-1]
            assert seen == own, f"{self._caller} wrote {own} to {key!r} and then read {seen}"
        else:
            self._reads.append((key, seen))

    async def _put(self, repository: RepositoryInterface, key: str) -> None:
        value = self._value()
        if self._random.random() < 0.5:
            version = await repository.save_entity(COLLECTION, _entity(key, value))
        else:
            version = await repository.update_entity(COLLECTION, key, {"value": value})
        self._writes.setdefault(key, []).append((version, value))
