"""Invalid responses of a server: whatever is received, the caller gets a StorageError in time."""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import asyncpg  # type: ignore[import-untyped]  # it has no types
import pytest

from hf_async_store import StorageError, open_store, path
from hf_async_store.strategies.sql import postgresql
from tests.sql.mutations import Damage, damaging_link

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VERBS = (
    *("get", "gets", "query", "stream", "count", "save", "update", "delete", "batch"),
    *("transaction", "statement", "snapshot", "health", "probe", "refused"),
)
LIMIT = 12.0
"""The time limit of a verb on a busy machine, in seconds; its own timeouts are below one second."""

LONG_RUN = 300.0
"""The duration of the long run, in seconds."""

# Seeds that once found a bug: an untranslated error of the driver or codec, or a hanging verb.
CORPUS = [2116, 188, 190, 206, 286, 303, 317, 375, 415, 453, 593, 998]


def template(key: str, **fields: object) -> dict[str, object]:
    return {"template_id": key, **fields}


async def verb_of(store: Any, name: str) -> None:
    if name == "get":
        await store.get_entity("templates", "t")
    elif name == "gets":
        await store.get_entities("templates", ["t", "u", "none"])
    elif name == "query":
        await store.query_entities("templates", {path("n"): 1})
    elif name == "stream":
        async for _ in store.stream_entities("templates"):
            pass
    elif name == "count":
        await store.count_entities("templates", {"name": "x"})
    elif name == "save":
        await store.save_entity("templates", template("t", n=2, name="saved"))
    elif name == "update":
        await store.update_entity("templates", "t", {"n": 3, "more": [1.5, None, "é"]})
    elif name == "delete":
        await store.delete_entity("templates", "t")
    elif name == "batch":
        await store.save_entities("templates", [template("t", n=4), template("v")])
    elif name == "transaction":
        async with store.begin_transaction() as tx:
            await tx.get_entity("templates", "t")
            await tx.save_entity("templates", template("t", n=5))
    elif name == "statement":
        await store.execute_with_lock("UPDATE templates SET version = version + 1 RETURNING doc")
    elif name == "refused":
        await store.execute_with_lock("SELEC 1")
    elif name == "snapshot":
        async with store.snapshot() as snapshot:
            await snapshot.fetch([])
    elif name == "health":
        await store.health()
    else:
        await store.test_connection()


async def try_inputs(database: str, seeds: range | list[int]) -> int:
    """Run a verb for each seed, with one damaged message; returns how many messages were damaged."""
    parts = urlsplit(database)
    assert parts.hostname is not None
    assert parts.port is not None
    async with open_store(database) as store:
        await store.save_entity("templates", template("t", n=1, name="x", doc={"a": 1.0}))
    direct = await asyncpg.connect(database)
    try:
        async with damaging_link(parts.hostname, parts.port) as link:
            through = database.replace(f":{parts.port}/", f":{link.port}/")
            url = (
                f"{through}?sslmode=disable&timeout=1&connect_timeout=1&pool_size=2&max_overflow=1"
            )
            for seed in seeds:
                await _one_input(url, seed, link, direct)
            return link.done
    finally:
        await direct.close()


async def _one_input(url: str, seed: int, link: Any, direct: Any) -> None:
    await direct.execute("DELETE FROM templates")
    sql = "INSERT INTO templates (template_id, version) VALUES ('t', 1), ('u', 1)"
    await direct.execute(sql)
    chance = random.Random(seed)
    name = chance.choice(VERBS)
    told = f"seed {seed}: {name}, {Damage(seed)!r}"
    error: StorageError | None = None
    async with asyncio.timeout(4 * LIMIT):
        async with open_store(url) as store:
            if chance.random() < 0.8:
                await _until_it_works(store, told)
            link.damage = Damage(seed)
            try:
                async with asyncio.timeout(LIMIT):
                    await verb_of(store, name)
            except StorageError as exc:
                error = exc
            except TimeoutError as exc:
                raise AssertionError(f"{told}: no end") from exc
            except Exception as exc:
                raise AssertionError(f"{told}: {type(exc).__name__}") from exc
            link.damage = None
            await _until_it_works(store, told)
    rows = await direct.fetch("SELECT template_id, version FROM templates ORDER BY 1")
    landed = [tuple(each) for each in rows] != [("t", 1), ("u", 1)]
    if landed and error is not None:
        assert error.outcome_unknown or name in ("health", "probe"), f"{told}: {error!r}"


async def _until_it_works(store: Any, told: str) -> None:
    last: StorageError | None = None
    for _ in range(12):
        try:
            async with asyncio.timeout(LIMIT):
                await store.count_entities("templates")
                await store.save_entity("templates", template("after"))
                await store.delete_entity("templates", "after")
        except StorageError as exc:
            last = exc
            await asyncio.sleep(0.01)
        except TimeoutError as exc:
            raise AssertionError(f"{told}: the store does not go on") from exc
        else:
            return
    raise AssertionError(f"{told}: the store does not go on") from last


_CRASHES = """
import asyncio, sys
from hf_async_store import StorageError, open_store
from tests.sql.mutations import Damage, damaging_link

async def main(host, port, path):
    async with damaging_link(host, port) as link:
        url = f"postgresql://postgres@{host}:{link.port}{path}?sslmode=disable&timeout=0.5"
        async with open_store(url) as store:
            await store.count_entities("templates")
            for kind in b"CTD":
                damage = Damage(1, kind="negative")
                damage.type, damage.skip = bytes([kind]), 0
                link.damage = damage
                try:
                    await store.query_entities("templates")
                except StorageError:
                    pass

asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
"""


@pytest.mark.xfail(strict=True, reason="the driver's C code trusts the length of a message")
def test_a_negative_length(database: str) -> None:
    """It ends the process; without TLS, anyone on the network path can do that."""
    parts = urlsplit(database)
    command = [sys.executable, "-c", _CRASHES, str(parts.hostname), str(parts.port), parts.path]
    ended = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr[-500:]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "_GRACE", 0.3)


@pytest.fixture
def driver_reports() -> Iterator[None]:
    """The driver's protocol raises for invalid messages, and the event loop logs that as an error."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(
            "Fatal error: protocol.data_received() call failed"
        )

    logger = logging.getLogger("asyncio")
    logger.addFilter(is_other)
    yield
    logger.removeFilter(is_other)


@pytest.mark.usefixtures("driver_reports")
async def test_damaged_responses(
    database: str, quick: None, record_property: Callable[[str, object], None]
) -> None:
    damaged = await try_inputs(database, [*CORPUS, *range(30)])
    record_property("damaged messages", damaged)
    assert damaged > 20


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("driver_reports")
async def test_many_damaged_responses(
    database: str, quick: None, record_property: Callable[[str, object], None]
) -> None:
    """As many seeds as the time allows, different in each run. Add a failing seed to the corpus."""
    until = time.monotonic() + LONG_RUN
    seed = first = random.randrange(10**9)
    damaged = 0
    while time.monotonic() < until:
        damaged += await try_inputs(database, range(seed, seed + 50))
        seed += 50
    record_property("inputs", seed - first)
    record_property("damaged messages", damaged)
    print(f"{seed - first} inputs from seed {first}, {damaged} of them damaged a message")
    assert damaged > (seed - first) / 3
