"""What is to be done: the settings of a run, and the part of it that one process plays."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store import StorageStrategy, open_store

if TYPE_CHECKING:
    import argparse

LARGEST: Final = 1000
"""The machines of the largest burst."""

_LARGE_EVERY: Final = 20


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """A run, as the user asked for it."""

    store: str | None = None
    config: str | None = None
    data: str | None = None
    seconds: float
    requests: int
    seed: int = 1
    keep: bool = False
    processes: int = 3

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Settings:
        """The settings in parsed arguments; `store` and `config` may be left out or None."""
        store, config = (getattr(arguments, each, None) for each in ("store", "config"))
        return cls(
            store=store,
            config=None if config is None else str(config),
            data=arguments.data,
            seconds=arguments.seconds,
            requests=arguments.requests,
            seed=arguments.seed,
            keep=arguments.keep,
        )


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The part of one process. It travels to workers over a pipe: it may hold a password.

    Attributes:
        store, config: the store; one of them.
        write_log: the file of this process's notes.
        prefix: of every id that the run makes, so that it never touches what others own.
        sizes: the machines of each request that this process makes.
        endless: go on with small requests after that, until somebody ends the process.
        templates: what requests ask for; each counts its uses.
        counters: entities that everybody counts up all the time.
        adopted: open requests of the loaded data.
    """

    store: str | None
    config: str | None
    write_log: str
    index: int
    prefix: str
    seed: int
    seconds: float
    sizes: list[int]
    endless: bool
    templates: list[str]
    counters: list[str]
    adopted: list[str]

    def open(self) -> StorageStrategy:
        """The store, not entered yet."""
        return open_store(self.store if self.store is not None else Path(str(self.config)))

    def random(self) -> random.Random:
        """Chance, the same for the same seed and process."""
        return random.Random(f"{self.seed}-{self.index}")


def draw_sizes(seed: int, process: int, requests: int) -> list[int]:
    """How many machines each request of a process asks for: mostly few, a burst now and then."""
    chance = random.Random(f"sizes-{seed}-{process}")
    sizes = [_size(chance) for _ in range(requests)]
    sizes[::_LARGE_EVERY] = [LARGEST for _ in sizes[::_LARGE_EVERY]]
    return sizes


def _size(chance: random.Random) -> int:
    kind = chance.random()
    if kind < 0.7:
        return chance.randint(1, 10)
    return chance.randint(11, 50) if kind < 0.95 else chance.randint(100, 300)


def shares(total: int, parts: int) -> list[int]:
    """`total` in nearly equal whole parts, each at least one."""
    return [max(1, total // parts + (part < total % parts)) for part in range(parts)]
