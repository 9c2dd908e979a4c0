"""The free space of a disk, and whether it is enough."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hf_async_store.os_errors import translate_os_error

if TYPE_CHECKING:
    from pathlib import Path


def free_bytes(folder: Path) -> int:
    """How many bytes this process may still write in a folder."""
    try:
        space = os.statvfs(folder)
    except OSError as exc:
        raise translate_os_error(exc, f"check {folder}") from exc
    return space.f_bavail * space.f_frsize


def too_little(folder: Path, free: int, needed: int) -> list[str]:
    """The problem that fewer bytes are free than the store needs to go on, if that is so."""
    if free >= needed:
        return []
    return [
        f"the disk of {folder} has {free:,} bytes left, and the store may need {needed:,} to go on: "
        "free some space"
    ]
