"""Processes that run during a live migration: applications, and migration processes that get killed.

    python live_applications.py work URL NOTES SEED [OTHER]  until its stdin is closed; may move to OTHER
    python live_applications.py move ACTION SOURCE TARGET [KILL_AT]

An application records each acknowledged write as a JSON line before it continues. A migration process
kills itself (SIGKILL) at the named step.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from hf_async_store import (
    HOST_FACTORY,
    Collection,
    Entity,
    Field,
    StorageError,
    StorageStrategy,
    Transaction,
    migration_routing,
    open_store,
)
from hf_async_store.changes import Change, Outcome
from hf_async_store.migration import live
from hf_async_store.migration.diff import compare_readers
from hf_async_store.migration.live import LiveMigration
from hf_async_store.schema import MARKER_COLLECTION

COLLECTIONS: Final = (
    *HOST_FACTORY,
    Collection("accounts", key="account_id", fields=[Field("balance", "integer", required=True)]),
)
ACCOUNTS: Final = 8
COUNTERS: Final = 4
BALANCE: Final = 100
PAUSE: Final = 0.06
"""Seconds between two writes of a task, and between two reads. Writes are frequent compared with the
steps of a migration, and leave the processors to the migration and to the processes of other tests: four
applications without a pause keep both busy for as long as the migration waits for them."""


def hurry() -> None:
    """Use short leases, the same ones in all processes of a test."""
    lease = float(os.environ.get("HF_TEST_LEASE", "0.6"))
    migration_routing.LEASE_SECONDS = live.LEASE_SECONDS = lease  # type: ignore[misc]
    migration_routing.ABANDONED_SWITCH_SECONDS = 12.0 if lease > 1 else 3.0  # type: ignore[misc]
    live.SWITCH_SECONDS = 10.0 if lease > 1 else 2.5  # type: ignore[misc]


async def fill(store: StorageStrategy, machines: int = 400) -> None:
    await store.create_entity("templates", {"template_id": "t-1"})
    await store.create_entities(
        "requests", [{"request_id": f"r-{n}", "template_id": "t-1"} for n in range(10)]
    )
    await store.create_entities(
        "machines",
        [{"machine_id": f"old-{n:04d}", "request_id": f"r-{n % 10}"} for n in range(machines)],
    )
    await store.create_entities(
        "accounts", [{"account_id": f"a-{n}", "balance": BALANCE} for n in range(ACCOUNTS)]
    )
    await store.create_entities(
        "templates", [{"template_id": f"counter-{n}", "uses": 0} for n in range(COUNTERS)]
    )


class Application:
    """One process of an application, with four tasks that read and write in different ways."""

    def __init__(self, store: StorageStrategy, notes: Path, seed: int) -> None:
        self._store = store
        self._notes = notes.open("a", encoding="utf-8")
        self._rng = random.Random(seed)
        self._seed = seed
        self.over = False

    async def run(self) -> None:
        await asyncio.gather(
            self._counting(), self._transferring(), self._living(), self._living(), self._reading()
        )

    def _note(self, what: str, **more: Any) -> None:
        self._notes.write(json.dumps({"what": what, **more}) + "\n")
        self._notes.flush()

    async def _try(self, what: str, work: Callable[[], Awaitable[Any]], **more: Any) -> bool:
        """Whether the write was acknowledged. An unknown outcome is recorded as such."""
        began = time.monotonic()
        try:
            await work()
        except StorageError as exc:
            if exc.outcome_unknown:
                self._note(f"maybe {what}", error=str(exc), **more)
            else:
                self._note("failed", of=what, error=f"{type(exc).__name__}: {exc}")
            await asyncio.sleep(0.02)
            return False
        finally:
            self._note("took", seconds=time.monotonic() - began)
        self._note(what, **more)
        return True

    async def _counting(self) -> None:
        while not self.over:
            name = f"counter-{self._rng.randrange(COUNTERS)}"
            await self._try(
                "count",
                lambda name=name: self._store.modify_entity(  # type: ignore[misc]
                    "templates",
                    name,
                    lambda e: {**e, "uses": e["uses"] + 1},  # type: ignore[operator]
                ),
                name=name,
            )
            await asyncio.sleep(PAUSE)

    async def _transferring(self) -> None:
        while not self.over:
            one, other = self._rng.sample(range(ACCOUNTS), 2)

            async def transfer(tx: Transaction, one: int = one, other: int = other) -> None:
                accounts = await tx.get_entities("accounts", [f"a-{one}", f"a-{other}"])
                for account, change in zip(accounts, (-1, 1), strict=True):
                    assert account is not None
                    balance = account["balance"]
                    assert isinstance(balance, int)
                    entity_id = str(account["account_id"])
                    await tx.update_entity("accounts", entity_id, {"balance": balance + change})

            await self._try("transfer", lambda t=transfer: self._store.run_transaction(t))  # type: ignore[misc]
            await asyncio.sleep(PAUSE)

    async def _living(self) -> None:
        """Create machines, change them by compare-and-set, and delete some."""
        number = 0
        token = f"{self._seed}-{self._rng.randrange(10**9)}"
        while not self.over:
            number += 1
            name = f"m-{token}-{number}"
            entity: Entity = {"machine_id": name, "request_id": f"r-{number % 10}", "n": 0}
            if not await self._try(
                "create",
                lambda e=entity: self._store.create_entity("machines", e),
                name=name,  # type: ignore[misc]
            ):
                continue
            version = 1
            for n in range(1, self._rng.randrange(1, 4)):
                if not await self._try(
                    "update",
                    lambda v=version, n=n, name=name: self._store.update_entity(  # type: ignore[misc]
                        "machines", name, {"n": n}, expected_version=v
                    ),
                    name=name,
                    n=n,
                ):
                    break
                version += 1
            if number % 3 == 0:
                await self._try(
                    "delete",
                    lambda name=name: self._store.delete_entity("machines", name),  # type: ignore[misc]
                    name=name,
                )
            await asyncio.sleep(PAUSE)

    async def _reading(self) -> None:
        """Check that the sum of all accounts, read in one transaction, is constant."""
        while not self.over:
            total = 0

            async def look(tx: Transaction) -> None:
                nonlocal total
                found = await tx.get_entities("accounts", [f"a-{n}" for n in range(ACCOUNTS)])
                total = sum(each["balance"] for each in found if each is not None)  # type: ignore[misc]

            seen = await self._try("look", lambda: self._store.run_transaction(look))
            if seen and total != ACCOUNTS * BALANCE:
                self._note("wrong", total=total)
            await asyncio.sleep(PAUSE)


async def work(url: str, notes: str, seed: str, *follow_moves: str) -> None:
    async with open_store(url, collections=COLLECTIONS, follow_moves=follow_moves) as store:
        application = Application(store, Path(notes), int(seed))
        print("ready", flush=True)
        running = asyncio.create_task(application.run())
        told = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
        await asyncio.wait({running, told}, return_when=asyncio.FIRST_COMPLETED)
        application.over = True
        await running


STEPS: Final = ("begun", "copying", "copied", "repaired", "cut", "drained", "flipped")
"""The steps of a migration from the source to the target. Further steps: `record-N`, when the Nth change
of a migration record is written; `amid`, with a transaction written and not committed; `marked`, when
changes are copied and their marks not deleted; `forgetting`, while marks are deleted at the end."""


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(step: str) -> None:
    """Let this process kill itself at a step of the migration, exactly at a write."""
    begin, bring, repair = LiveMigration._begin, LiveMigration._copy_keys, LiveMigration._repair
    change, verify, copy = LiveMigration._change_state, LiveMigration._verify, LiveMigration._copy
    enter, forget = LiveMigration.__aenter__, LiveMigration._cleanup
    brought = records = 0
    forgetting = False

    async def entered(self: LiveMigration) -> LiveMigration:
        for engine in (self._source, self._target):
            watch(engine)
        return await enter(self)

    def watch(engine: Any) -> None:
        write_each, session = engine.write_each, engine.session

        async def written(changes: Sequence[Change]) -> list[Outcome]:
            nonlocal records
            of_marks = changes[0].key.collection == MARKER_COLLECTION.name
            if of_marks and step == "marked":
                _kill()
            if of_marks and forgetting:
                await write_each(changes[: len(changes) // 2 + 1])
                _kill()
            outcomes: list[Outcome] = await write_each(changes)
            if changes[0].key == migration_routing.MIGRATION_KEY:
                records += 1
                if step == f"record-{records}":
                    _kill()
            return outcomes

        @asynccontextmanager
        async def begun(isolation: Any) -> AsyncIterator[Any]:
            async with session(isolation) as opened:
                yield opened
                if step == "amid":
                    _kill()

        engine.write_each, engine.session = written, begun

    async def forgot(self: LiveMigration, *arguments: Any) -> None:
        nonlocal forgetting
        forgetting = step == "forgetting"
        await forget(self, *arguments)

    async def begun(self: LiveMigration) -> None:
        await begin(self)
        if step == "begun":
            _kill()

    async def bringing(self: LiveMigration, *arguments: Any) -> None:
        nonlocal brought
        brought += 1
        await bring(self, *arguments)
        if step == "copying" and brought == 3:
            _kill()

    async def copied(self: LiveMigration) -> None:
        await copy(self)
        if step == "copied":
            _kill()

    async def repaired(self: LiveMigration, *arguments: Any) -> None:
        await repair(self, *arguments)
        if step == "repaired":
            _kill()

    async def changed(self: LiveMigration, **named: Any) -> None:
        await change(self, **named)
        phase = named.get("phase")
        if step == "cut" and phase in ("CUTTING_OVER", "ROLLING_BACK"):
            _kill()
        if step == "flipped" and "term" in named:
            _kill()

    async def verified(self: LiveMigration, *arguments: Any) -> None:
        await verify(self, *arguments)
        if step == "drained":
            _kill()

    LiveMigration.__aenter__ = entered  # type: ignore[assignment,method-assign]
    LiveMigration._cleanup = forgot  # type: ignore[method-assign]
    LiveMigration._begin = begun  # type: ignore[method-assign]
    LiveMigration._copy_keys = bringing  # type: ignore[method-assign]
    LiveMigration._copy = copied  # type: ignore[method-assign]
    LiveMigration._repair = repaired  # type: ignore[method-assign]
    LiveMigration._change_state = changed  # type: ignore[method-assign]
    LiveMigration._verify = verified  # type: ignore[method-assign]


async def are_equal(mover: LiveMigration) -> bool:
    """Compare the two stores of a migration while no process writes."""
    async with mover._source.snapshot() as source, mover._target.snapshot() as target:
        return (await compare_readers(source, target, mover._schema)).equal


async def move(action: str, source: str, target: str, *kill: str) -> None:
    if kill:
        kill_at(kill[0])
    async with LiveMigration(source, target, collections=COLLECTIONS) as mover:
        if action == "equal":
            print(await are_equal(mover))
        else:
            print(json.dumps((await getattr(mover, action)()).phase))


if __name__ == "__main__":
    hurry()
    asyncio.run({"work": work, "move": move}[sys.argv[1]](*sys.argv[2:]))  # type: ignore[operator]
