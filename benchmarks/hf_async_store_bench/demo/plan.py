"""What is to be done: the settings of a run, and the part of it that one process plays."""

from __future__ import annotations

import argparse
import random
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import msgspec

import hf_async_store as hfas
from hf_async_store import Collection, Expire, StorageStrategy

KEPT_SECONDS: Final = 1.0  # how long returns of the run are kept after their completion
_FEED: Final = timedelta(hours=1)  # how long changes are kept for watchers
_LARGEST: Final = 1000  # machines, of every so many requests
_LARGE_EVERY: Final = 20


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """A run, as the user asked for it. It may hold a password."""

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
        given = {each: getattr(arguments, each, None) for each in cls.__struct_fields__}
        if given["config"] is not None:
            given["config"] = str(given["config"])
        return cls(**{name: value for name, value in given.items() if value is not None})


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The part of one process. It travels to workers over a pipe.

    Attributes:
        prefix: of every id that the run makes, so that it never touches what others own.
        sizes: the machines of each request that this process makes.
        endless: go on with small requests after that, until somebody ends the process.
        templates: what requests ask for; each counts its uses.
        adopted: open requests of the loaded data.
    """

    settings: Settings
    write_log: str
    index: int = 0
    prefix: str
    sizes: list[int] = []
    endless: bool = False
    templates: list[str] = []
    adopted: list[str] = []

    def open(self) -> StorageStrategy:
        """The store, not entered yet."""
        store = self.settings.store
        place = store if store is not None else Path(str(self.settings.config))
        return hfas.open_store(place, collections=self.collections(), purge_seconds=KEPT_SECONDS)

    def collections(self) -> list[Collection]:
        """Those of the spec, of which requests and machines can be watched; completed returns of the run
        expire, and nothing else."""
        where = {"status": "COMPLETED", "request_id": hfas.begins_with(f"{self.prefix}return-")}
        expires = Expire("completed_at", after=timedelta(seconds=KEPT_SECONDS), where=where)
        templates, requests, machines = hfas.HOST_FACTORY
        return [templates, _watched(requests, expires), _watched(machines)]


def _watched(old: Collection, expires: Expire | None = None) -> Collection:
    fields = list(old.fields.values())[1:-2]  # a collection declares its key and its times itself
    how: dict[str, Any] = {"indexes": old.indexes, "expires": expires, "feed": _FEED}
    return Collection(old.name, key=old.key, fields=fields, **how)


def draw_sizes(seed: int, process: int, requests: int) -> list[int]:
    """How many machines each request of a process asks for: mostly few, a burst now and then."""
    chance = random.Random(f"sizes-{seed}-{process}")
    ranges = chance.choices([(1, 10), (11, 50), (100, 300)], [0.7, 0.25, 0.05], k=requests)
    sizes = [chance.randint(*each) for each in ranges]
    sizes[::_LARGE_EVERY] = [_LARGEST for _ in sizes[::_LARGE_EVERY]]
    return sizes


def shares(total: int, parts: int) -> list[int]:
    """`total` in nearly equal whole parts, each at least one."""
    return [max(1, total // parts + (part < total % parts)) for part in range(parts)]
