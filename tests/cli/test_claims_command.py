"""`claims list` and `claims break`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from hf_async_store import open_store

if TYPE_CHECKING:
    from command import Cli


async def _claim(path: Path) -> None:
    async with open_store(f"json:{path}") as store:
        await store.claim_entities("requests", owner="worker 1", lease=600)


def test_claims_are_listed_and_broken(cli: Cli, workplace: Path) -> None:
    store = ("--store", "json:claims.json")
    assert cli(*store, "put", "requests", '{"request_id": "r-1"}').code == 0
    asyncio.run(_claim(workplace / "claims.json"))
    ran = cli(*store, "claims", "list", "requests")
    [row] = ran.rows
    assert (ran.code, row["id"], row["state"]) == (0, "r-1", "held")
    assert (row["owner"], row["attempts"]) == ("worker 1", 1)
    ran = cli(*store, "claims", "break", "requests", "r-1", "r-2")
    assert (ran.code, ran.rows) == (1, [{"broken": 1}])
    assert cli(*store, "claims", "list", "requests").rows == []
    assert cli(*store, "claims", "break", "requests").code == 2
    assert cli(*store, "claims", "list", "nothing").code == 2
    ran = cli(*store, "claims")
    assert ran.message.startswith("the following arguments are required: ACTION, COLLECTION (see")
