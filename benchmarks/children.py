"""What is measured in processes of its own; each prints one line of JSON.

python benchmarks/children.py memory FILE
python benchmarks/children.py save FILE SECONDS TASKS SEED
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import resource
import sys
import time
from pathlib import Path
from typing import Final

from stores import machine, opened

from hf_async_store import HOST_FACTORY, Collection, JSONStorageStrategy

_STATUS: Final = Path("/proc/self/status")


def resident_bytes() -> int:
    """What this process holds in memory now; where the system does not tell, its peak."""
    return _status_bytes("VmRSS:")


def peak_bytes() -> int:
    """The most that this process has ever held."""
    return _status_bytes("VmHWM:")


def forget_peak() -> None:
    """Let the peak begin anew at what is held now; opening a large file has one of its own."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(name: str) -> int:
    if not _STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


async def memory(path: Path) -> dict[str, float]:
    """How the process grows when it opens the store, and when every declared index is built."""
    gc.collect()
    before = resident_bytes()
    async with opened(path) as store:
        assert await store.get_entity("machines", machine(0)["machine_id"])
        with_entities = resident_bytes()
        for collection in HOST_FACTORY:
            await _query_indexes(store, collection)
        with_indexes = resident_bytes()
    return {"opened": with_entities - before, "indexed": with_indexes - before}


async def _query_indexes(store: JSONStorageStrategy, collection: Collection) -> None:
    for index in collection.indexes:
        filters = {index.field: machine(0).get(index.field, "PENDING")}
        assert (await store.explain_query(collection.name, filters)).access == "index"
        await store.query_entities(collection.name, filters, limit=1)


async def save(path: Path, seconds: float, tasks: int, seed: int) -> dict[str, float]:
    """So many tasks save at once, from the moment at which a line comes in."""
    rng = random.Random(seed)
    machines = [machine(rng.randrange(10_000)) for _ in range(5000)]
    async with opened(path) as store:
        await store.save_entity("machines", machines[0])
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        end = time.perf_counter() + seconds

        async def saving() -> int:
            count = 0
            while time.perf_counter() < end:
                await store.save_entity("machines", rng.choice(machines))
                count += 1
            return count

        started = time.perf_counter()
        counts = await asyncio.gather(*(saving() for _ in range(tasks)))
        return {"saves": sum(counts), "seconds": time.perf_counter() - started}


async def main(what: str, path: str, *rest: str) -> None:
    if what == "memory":
        result = await memory(Path(path))
    else:
        length, tasks, seed = rest
        result = await save(Path(path), float(length), int(tasks), int(seed))
    print(json.dumps(result))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
