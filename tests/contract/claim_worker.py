"""A worker process of `test_claim_processes`: claims items until none is left, and sometimes misbehaves.

It appends a line to the log for each claim, when the work on it ends: the id, and the beginning and the
end of the work by the clock of the machine that counts from its start.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from random import Random

from hf_async_store import Claim, ClaimLostError, StorageStrategy, increment, open_store
from hf_async_store.claim_clock import boot_seconds
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS


async def main(url: str, log: str, seed: int, lease: float, evil: float) -> None:
    random = Random(seed)
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    async with open_store(url, collections=CONTRACT_COLLECTIONS) as store:
        while claims := await _next(store, lease):
            await _work(claims[0], fd, random, lease, evil)


async def _next(store: StorageStrategy, lease: float) -> list[Claim]:
    return await store.claim_entities(
        "items", {"label": "new"}, order_by="item_id", lease=lease, wait=4 * lease
    )


async def _work(claim: Claim, fd: int, random: Random, lease: float, evil: float) -> None:
    began = boot_seconds()

    def record() -> None:
        # A healthy worker on a busy machine may notice late that its claim was lost.
        ended = min(boot_seconds(), claim.deadline)
        os.write(fd, f"{claim.id} {began} {ended}\n".encode())

    try:
        async with claim:
            await asyncio.sleep(random.random() * 0.01)
            record()
            if random.random() < evil:
                _misbehave(random, lease)
            await claim.finish({"label": "done", "count": increment(1)})
    except ClaimLostError:
        pass


def _misbehave(random: Random, lease: float) -> None:
    how = random.choice(["killed", "stopped", "blocked"])
    if how == "blocked":
        time.sleep(1.5 * lease)
    else:
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)


if __name__ == "__main__":
    url, log, seed, lease, evil = sys.argv[1:]
    asyncio.run(main(url, log, int(seed), float(lease), float(evil)))
