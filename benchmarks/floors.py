"""What people write by hand where they have no store."""

from __future__ import annotations

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class RewritingStore:
    """Writes its whole file at every save, as stores on a JSON file usually do."""

    def __init__(self, path: Path, machines: Mapping[str, Mapping[str, Any]]) -> None:
        self._path = path
        self._machines = dict(machines)
        self._thread = ThreadPoolExecutor(1)

    def close(self) -> None:
        self._thread.shutdown()

    async def save(self, entity: Mapping[str, Any]) -> None:
        self._machines[entity["machine_id"]] = entity
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write)

    def _write(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.write(json.dumps({"machines": self._machines}))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
