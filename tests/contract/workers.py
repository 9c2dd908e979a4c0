"""Processes that run a program of this folder."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


class Workers:
    """Worker processes by id.

    Args:
        program: the name of their program.
    """

    def __init__(self, program: str) -> None:
        self._command = [sys.executable, str(Path(__file__).with_name(program))]
        self.running: set[int] = set()

    def start(self, *arguments: object) -> int:
        command = [*self._command, *map(str, arguments)]
        pid = os.posix_spawn(sys.executable, command, dict(os.environ))
        self.running.add(pid)
        return pid

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.running.discard(pid)

    def end(self) -> None:
        for each in list(self.running):
            self.kill(each)
