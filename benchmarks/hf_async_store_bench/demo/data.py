"""Where the run starts from: a JSON store found in the field, or templates made up for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import quote

from hf_async_store import ConfigurationError, Entity, StorageStrategy
from hf_async_store_bench.data import batches

Entities: TypeAlias = dict[str, dict[str, Entity]]  # by id, by collection
REAL_DATA: Final = "HF_ASYNC_STORE_REAL_DATA"
# The statuses of a request that waits for machines; in lower case they are from the field.
OPEN: Final = frozenset({"PENDING", "pending", "in_progress"})
_SINGLE: Final = "request_database.json"
_BATCH: Final = 500


class Source:
    """A JSON store in any of the layouts found in the field: in a folder, in a file, or the first in a
    folder of such folders. ConfigurationError if there is none."""

    def __init__(self, place: Path) -> None:
        self.file = _found(place)  # the only file, or the folder of split files
        self._folder = self.file if self.file.is_dir() else self.file.parent

    def __str__(self) -> str:
        return str(self.file)

    def copy(self, to: Path) -> str:
        """Copy it into a new folder; returns the URL of the copy. The source is only read."""
        to.mkdir(mode=0o700, parents=True)
        for each in self._folder.iterdir():
            if each.is_file() and not each.name.startswith("."):
                shutil.copyfile(each, to / each.name)
        return json_url(to if self.file.is_dir() else to / self.file.name)

    def plain(self, collections: Mapping[str, object]) -> Entities | None:
        """What its files hold, or None where a journal beside them may hold more."""
        names = [each.name for each in self._folder.iterdir()]
        if not all(each.startswith(".") or each.endswith(".json") for each in names):
            return None
        if not self.file.is_dir():
            sections = json.loads(self.file.read_bytes())
            return {name: sections.get(name, {}) for name in collections}
        return {name: _unwrapped(self.file / f"{name}.json", name) for name in collections}


def chosen(data: str | None) -> Source | None:
    """The data to start from: what the user named, else the environment's, else none."""
    place = data or os.environ.get(REAL_DATA)
    return Source(Path(place)) if place else None


def json_url(path: Path) -> str:
    return f"json:{quote(str(path))}"


def made_up(prefix: str) -> list[dict[str, Any]]:
    """Templates for a run without data."""
    templates = json.loads(Path(__file__).with_name("templates.json").read_bytes())
    return [{**each, "template_id": prefix + each["template_id"]} for each in templates]


async def everything(store: StorageStrategy) -> Entities:
    return {name: await streamed(store, name) for name in store.collections}


async def streamed(
    store: StorageStrategy, name: str, filters: Mapping[str, object] | None = None
) -> dict[str, Entity]:
    """The entities of a collection, by id."""
    key = store.collections[name].key
    found: dict[str, Entity] = {}
    async with aclosing(store.stream_entities(name, filters)) as rows:
        async for each in rows:
            found[str(each[key])] = each
    return found


async def import_new(store: StorageStrategy, entities: Entities) -> bool:
    """Import all of it, parents first; False, and nothing done, if the store has any of it: that
    belongs to somebody else, and what is missing beside it was perhaps deleted by them."""
    for name in store.collections:
        for ids in batches(list(entities[name]), _BATCH):
            if any(each is not None for each in await store.get_entities(name, ids)):
                return False
    for name in store.collections:
        for some in batches(list(entities[name].values()), _BATCH):
            await store.import_entities(name, some)
    return True


def _found(place: Path) -> Path:
    if place.is_file():
        return place
    if place.is_dir():
        for folder in (place, *sorted(each for each in place.iterdir() if each.is_dir())):
            if (folder / _SINGLE).is_file():
                return folder / _SINGLE
            if (folder / "templates.json").is_file() or (folder / "machines.json").is_file():
                return folder
    expected = f"{_SINGLE}, or templates.json, requests.json and machines.json"
    raise ConfigurationError(f"--data {place}: no JSON store there (expected {expected})")


def _unwrapped(file: Path, name: str) -> dict[str, Entity]:
    if not file.exists():
        return {}
    held: dict[str, Any] = json.loads(file.read_bytes())
    # A wrapped collection is one entry that is no entity: nothing in it names itself.
    inner = held.get(name)
    key = f"{name.removesuffix('s')}_id"
    return inner if len(held) == 1 and isinstance(inner, dict) and key not in inner else held
