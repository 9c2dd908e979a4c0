"""Concurrent workloads for one store, run by several tasks of a process or by several processes.

Each is a function of a store and a random generator; the cases check the state that it produces.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

from hf_async_store.errors import ConcurrencyConflictError

if TYPE_CHECKING:
    from random import Random

    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.transaction import Transaction
    from hf_async_store.values import Entity

# -- transfers between accounts -------------------------------------------------------------

ACCOUNTS: Final = tuple(f"a{n}" for n in range(6))
BALANCE: Final = 100
TOTAL: Final = BALANCE * len(ACCOUNTS)


async def open_accounts(store: StorageStrategy) -> None:
    """Create the accounts, each with `BALANCE`."""
    await store.create_entities(
        "accounts", [{"account_id": each, "balance": BALANCE} for each in ACCOUNTS]
    )


async def transfer(store: StorageStrategy, random: Random, times: int) -> int:
    """Move amounts between two or three accounts at a time; returns the number of attempts."""
    attempts = 0

    async def move(tx: Transaction) -> None:
        nonlocal attempts
        attempts += 1
        source, *targets = random.sample(ACCOUNTS, random.choice((2, 2, 3)))
        amount = random.randint(1, 20)
        for account, more in (
            (source, -amount * len(targets)),
            *((each, amount) for each in targets),
        ):
            balance = _balance(await tx.get_entity("accounts", account))
            await _pause(random)
            fields: dict[str, object] = {"balance": balance + more}
            if random.random() < 0.5:
                await tx.update_entity("accounts", account, fields)
            else:
                await tx.save_entity("accounts", {"account_id": account, **fields})

    for _ in range(times):
        await store.run_transaction(move)
        await _pause(random)
    return attempts


async def total(repository: RepositoryInterface, *, one_by_one: bool = False) -> int:
    """The sum of all balances."""
    if one_by_one:
        found = [await repository.get_entity("accounts", each) for each in ACCOUNTS]
    else:
        found = await repository.get_entities("accounts", ACCOUNTS)
    return sum(map(_balance, found))


def _balance(account: Entity | None) -> int:
    assert account is not None, "an account is missing"
    return cast("int", account["balance"])


async def _pause(random: Random) -> None:
    """Let other tasks run: mostly for one event-loop iteration, sometimes for 1 ms."""
    await asyncio.sleep(random.choice((0, 0, 0, 0.001)))


# -- counting up ----------------------------------------------------------------------------


async def count_up(store: StorageStrategy, random: Random, counter: str, times: int) -> None:
    """Add one `times` times, each time in a random one of the ways in which no update may be lost."""
    for _ in range(times):
        increment = random.choice(
            (_by_modify, _by_version, _by_transaction, _by_conditional_update)
        )
        await increment(store, counter)
        await _pause(random)


def _one_more(entity: Entity | None) -> Entity:
    assert entity is not None, "the counter is missing"
    return {**entity, "value": cast("int", entity["value"]) + 1}


async def _by_modify(store: StorageStrategy, counter: str) -> None:
    await store.modify_entity("counters", counter, _one_more)


async def _by_version(store: StorageStrategy, counter: str) -> None:
    while True:
        entity = _one_more(await store.get_entity("counters", counter))
        try:
            await store.save_entity(
                "counters", entity, expected_version=cast("int", entity["version"])
            )
        except ConcurrencyConflictError:
            await asyncio.sleep(0)
        else:
            return


async def _by_transaction(store: StorageStrategy, counter: str) -> None:
    async def work(tx: Transaction) -> None:
        await tx.save_entity("counters", _one_more(await tx.get_entity("counters", counter)))

    await store.run_transaction(work)


async def _by_conditional_update(store: StorageStrategy, counter: str) -> None:
    async def work(tx: Transaction) -> None:
        entity = _one_more(await tx.get_entity("counters", counter))
        await tx.conditional_update("counters", counter, {"value": entity["value"]})

    await store.run_transaction(work)
