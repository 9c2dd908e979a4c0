"""A forked child neither keeps nor releases the locks of its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hf_async_store import open_store

if TYPE_CHECKING:
    from pathlib import Path

_PARENT = """
import asyncio, os, signal, sys, time
from hf_async_store import LockTimeoutError, open_store
from hf_async_store.strategies.json.files import begin_sync

async def main(url, what):
    async with open_store(url) as store:
        await store.save_entity("templates", {"template_id": "a"})
        if what == "sync":  # its descriptor is that of the journal
            child = fork()
            begin_sync(store._json.follower.state.write_fd)
            os.kill(os.getpid(), signal.SIGKILL)
        async with store.begin_transaction() as tx:
            await tx.save_entity("templates", {"template_id": "b"})
            if what == "transaction":
                fork()
                os.kill(os.getpid(), signal.SIGKILL)
            child = os.fork()
            if not child:
                store._json._release()  # as the end of the program may do
                os._exit(0)
            os.waitpid(child, 0)
            async with open_store(f"{url}?lock_timeout=0.1") as other:
                try:
                    await other.save_entity("templates", {"template_id": "c"})
                except LockTimeoutError:
                    print("locked", flush=True)

def fork():
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    return child

asyncio.run(main(*sys.argv[1:]))
"""


def _run(url: str, what: str) -> str:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, url, what], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        line = parent.stdout.readline().strip()
        parent.wait()
    return line


@pytest.mark.parametrize("what", ["transaction", "sync"])
async def test_a_child_does_not_keep_the_locks_of_a_killed_parent(
    tmp_path: Path, what: str
) -> None:
    url = f"json:{tmp_path}/data"
    child = int(_run(url, what))
    try:
        async with open_store(f"{url}?lock_timeout=2") as store:
            assert await store.save_entity("templates", {"template_id": "b"}) == 1
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_does_not_unlock_the_file_of_its_parent(tmp_path: Path) -> None:
    assert _run(f"json:{tmp_path}/data", "release") == "locked"
