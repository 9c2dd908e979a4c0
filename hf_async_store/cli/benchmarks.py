"""The commands that measure."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hf_async_store.bench import commands

if TYPE_CHECKING:
    from argparse import Namespace


def bench(arguments: Namespace) -> int:
    return asyncio.run(commands.bench(arguments))


def advise(arguments: Namespace) -> int:
    return asyncio.run(commands.advice(arguments))
