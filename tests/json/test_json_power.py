"""A loss of power: what was not synced may be gone. A model, for no test can pull the plug.

At every file call of a workload the disk is taken down as it may come up again: file contents as they
were last synced or as they are, and the names in the folder likewise. What was acknowledged must be
there, in each of these.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.json.crash_driver import WORKLOADS, model
from tests.json.support import (
    LAYOUTS,
    WHOLE,
    Call,
    FileCalls,
    Stored,
    data_files,
    journals,
    open_json,
    parsed,
    reopened,
    whole,
    without_times,
)

_open, _fstat, _pread, _close, _stat = os.open, os.fstat, os.pread, os.close, os.stat


class Moment(NamedTuple):
    """The disk at one call, and how many steps were acknowledged before it."""

    call: Call
    acked: int
    disks: list[dict[str, bytes]]


class Disk:
    """Follows one folder: what is there, and what would be there after a loss of power.

    Its files stay open, so that no inode number comes twice.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fds: dict[int, int] = {}
        self._synced: dict[int, bytes] = {}
        self._names: dict[str, int] = {}
        self._last: Call | None = None
        self.acked = 0
        self.moments: list[Moment] = []

    def __call__(self, call: Call, size: int) -> int:
        """Before a call: the one before it is done."""
        self._follow()
        self.moments.append(Moment(call, self.acked, self._disks()))
        self._last = call
        return WHOLE

    def _follow(self) -> None:
        now = self._now()
        last = self._last
        if last is None or last.name not in ("fsync", "fdatasync"):
            return
        if Path(last.path) == self._folder:
            self._names = now
        else:
            inode = now.get(Path(last.path).name)
            if inode is not None:
                self._synced[inode] = self._content(inode)

    def _now(self) -> dict[str, int]:
        found = {}
        for name in os.listdir(self._folder) if self._folder.exists() else []:
            if ".lock" in name:
                continue
            inode = _stat(self._folder / name).st_ino
            found[name] = inode
            if inode not in self._fds:
                self._fds[inode] = _open(self._folder / name, os.O_RDONLY)
        return found

    def _content(self, inode: int) -> bytes:
        fd = self._fds[inode]
        return _pread(fd, _fstat(fd).st_size, 0)

    def _disks(self) -> list[dict[str, bytes]]:
        """As it may come up: old names or new ones, old contents, new ones or something between."""
        now = self._now()
        disks = []
        for names, part in itertools.product((self._names, now), (0.0, 0.5, 1.0)):
            disks.append({name: self._some(inode, part) for name, inode in names.items()})
        return disks

    def _some(self, inode: int, part: float) -> bytes:
        synced, now = self._synced.get(inode, b""), self._content(inode)
        if now.startswith(synced):
            return now[: len(synced) + int(part * (len(now) - len(synced)))]
        return now if part else synced

    def close(self) -> None:
        for fd in self._fds.values():
            _close(fd)


async def _run(folder: Path, layout: str, workload: str, **settings: Any) -> Disk:
    disk = Disk(folder)
    with FileCalls(folder, disk):
        async with open_json(folder, layout, **settings) as store:
            for step in WORKLOADS[workload]:
                await step(store)
                disk.acked += 1
    return disk


async def _after(folder: Path, disk: dict[str, bytes], layout: str, **settings: Any) -> Stored:
    folder.mkdir()
    for name, text in disk.items():
        (folder / name).write_bytes(text)
    for each in data_files(folder):
        parsed(each)
    found = await reopened(folder, layout, **settings)
    async with open_json(folder, layout, **settings) as store:
        await store.save_entity("templates", {"template_id": "after"})
        await store.checkpoint()
        now = await whole(store)
        assert now["templates"].pop("after")
        assert now == found
        assert len(journals(folder)) == 1
    return without_times(found)


_SETTINGS: Final[list[dict[str, Any]]] = [{}, {"enable_compression": True, "backup_enabled": False}]


async def _sweep(layout: str, settings: dict[str, Any], *, loses: bool = False) -> None:
    problems = []
    states = await model(WORKLOADS["script"], {})
    memory = Path("/dev/shm")
    where = str(memory) if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hf-power-", dir=where) as base:
        disk = await _run(Path(base, "run"), layout, "script", **settings)
        disk.close()
        seen: set[tuple[int, frozenset[tuple[str, bytes]]]] = set()
        for moment in disk.moments:
            for number, files in enumerate(moment.disks):
                key = (moment.acked, frozenset(files.items()))
                if key in seen:
                    continue
                seen.add(key)
                least = 0 if loses else moment.acked
                try:
                    found = await _after(Path(base, str(len(seen))), files, layout, **settings)
                    assert found in states[least : moment.acked + 2], f"there is {found}"
                except Exception as exc:
                    what = f"{moment.call}, disk {number}, after {moment.acked} steps"
                    problems.append(f"{what}: {type(exc).__name__}: {str(exc)[:300]}")
    assert not problems, f"{len(problems)} of {len(seen)}:\n" + "\n".join(problems[:12])
    assert len(seen) > 100, "too few to mean anything"


@pytest.mark.parametrize("settings", _SETTINGS, ids=["plain", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_82_the_power_goes(layout: str, settings: dict[str, Any]) -> None:
    await _sweep(layout, settings)


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_82_the_power_goes_without_syncs(layout: str) -> None:
    """`sync_writes` off: the last commits may be gone, and nothing else is wrong."""
    await _sweep(layout, {"sync_writes": False}, loses=True)
