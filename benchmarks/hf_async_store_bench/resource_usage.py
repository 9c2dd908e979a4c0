"""What a run costs this process, and what the machine is."""

from __future__ import annotations

import os
import platform
import resource
import socket
import stat
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Final

_PROCESS: Final = Path("/proc/self")
_TCP_INFO_BYTES: Final = 136
_BYTES_ACKED: Final = slice(120, 128)  # of `struct tcp_info`, in the order of linux/tcp.h
_SYNCS: Final = 100
_PACKAGES: Final = (
    *("hf_async_store", "msgspec", "aiosqlite", "sqlalchemy", "asyncpg", "aiobotocore", "tinydb"),
    *("diskcache", "py-key-value-aio", "advanced-alchemy", "aiodynamo", "orb-py"),
)


def resident_bytes() -> int:
    """What this process holds in memory now; where the system does not tell, its peak."""
    return _status_bytes("VmRSS:")


def peak_bytes() -> int:
    """The most that this process has held, since `forget_peak`."""
    return _status_bytes("VmHWM:")


def forget_peak() -> None:
    """Let the peak begin anew at what is held now."""
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def _status_bytes(name: str) -> int:
    held = _told("status", name)
    if held is None:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return held * 1024


def written_bytes() -> int | None:
    """What this process has caused to be written to disks; None where the system does not tell."""
    return _told("io", "write_bytes:")


def _told(file: str, name: str) -> int | None:
    with suppress(OSError):
        lines = (_PROCESS / file).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))
    return None


def sent_bytes() -> int:
    """What the connections that this process has open have sent so far, as Linux counts it."""
    descriptors = _PROCESS / "fd"
    names = [int(each.name) for each in descriptors.iterdir()] if descriptors.exists() else []
    return sum(map(_sent_by, names))


def _sent_by(descriptor: int) -> int:
    """What came through at the other end; 0 of what is closed by now, or no TCP connection."""
    with suppress(OSError):
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            with socket.socket(fileno=os.dup(descriptor)) as one:
                if one.type == socket.SOCK_STREAM and one.family != socket.AF_UNIX:
                    told = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
                    return int.from_bytes(told[_BYTES_ACKED], sys.byteorder)
    return 0


def processor_seconds() -> float:
    """What this process and the children that it waited for have computed."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def machine() -> dict[str, str]:
    memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    sync, folder = f"{_sync_seconds() * 1000:.2f} ms", tempfile.gettempdir()
    has = {"processor": _processor(), "cores": str(os.cpu_count()), "memory": memory}
    return {"system": platform.platform(), **has, "one sync": sync, "folder": folder}


def versions() -> dict[str, str]:
    """Of Python and of everything that is measured and installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def load_average() -> float:
    """How many processes wanted to run in the last minute: others disturb what is measured."""
    return round(os.getloadavg()[0], 2)


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _sync_seconds() -> float:
    """The median of an append and its fdatasync, on the disk of the temporary folder."""
    from hf_async_store_bench.baselines.journal import sync_data

    times = [time.perf_counter()]
    with tempfile.TemporaryFile() as file:
        for _ in range(_SYNCS):
            os.write(file.fileno(), b"x" * 350)
            sync_data(file.fileno())
            times.append(time.perf_counter())
    return statistics.median(after - before for before, after in pairwise(times))
