"""The stores that are measured: of machines of 311 bytes, and of machines found in the field."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import msgspec

from hf_async_store import HOST_FACTORY, JSONStorageStrategy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Entity: TypeAlias = "dict[str, Any]"

ENTITY_BYTES: Final = 311
NEVER: Final = 1 << 40
"""A `write_buffer_size` that no journal reaches: nothing is folded in the background."""

_FILE: Final = "request_database.json"
_BATCH: Final = 10_000
_MACHINES_OF_A_REQUEST: Final = 1000
_STATUSES: Final = ("RUNNING", "PENDING", "STOPPED")
_SCATTER: Final = 61_803_399
_TIME: Final = "2026-06-01T08:00:00.414002Z"

encode = msgspec.json.Encoder().encode


# -- entities -------------------------------------------------------------------------------


def machine(number: int) -> Entity:
    """A machine whose JSON takes 311 bytes, in the caller's hands as in the file."""
    high, low = divmod(number, 10_000)
    name = number * _SCATTER % 10**8  # so that the order by name is not the order by id
    return {
        "version": 1,
        "machine_id": machine_id(number),
        "request_id": request_id(number // _MACHINES_OF_A_REQUEST),
        "template_id": "t-1",
        "return_request_id": None,
        "name": f"node-{name:08d}-a1",
        "status": _STATUSES[number % 3],
        "instance_type": "m5.2xlarge",
        "private_ip": f"10.1{high % 100:02d}.1{low // 100:02d}.1{low % 100:02d}",
        "created_at": _TIME,
        "updated_at": _TIME,
    }


def machine_id(number: int) -> str:
    return f"i-{number:017x}"


def request(number: int) -> Entity:
    return {
        "request_id": request_id(number),
        "template_id": "t-1",
        "machine_count": _MACHINES_OF_A_REQUEST,
        "status": "PENDING",
        "request_type": "acquire",
    }


def request_id(number: int) -> str:
    return f"req-{number:08d}"


# -- stores ---------------------------------------------------------------------------------


def opened(path: Path, **settings: Any) -> JSONStorageStrategy:
    """The store in a file, for `async with`."""
    config = {
        "strategy": "json",
        "json_strategy": {
            "storage_type": "single_file",
            "base_path": str(path.parent),
            "filenames": {"single_file": path.name},
            **settings,
        },
    }
    return JSONStorageStrategy(config)


class Stores:
    """Stores of so many machines, each made once, in a folder for the length of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[int, Path] = {}
        self._numbers = itertools.count()

    def new_folder(self, name: str) -> Path:
        folder = self.folder / f"{name}-{next(self._numbers)}"
        folder.mkdir()
        return folder

    async def copy(self, size: int) -> Path:
        """A copy of the store of `size` machines, to be written to; its data file."""
        if size not in self._made:
            self._made[size] = self.new_folder(f"machines-{size}") / _FILE
            await make_store(self._made[size], size)
        folder = self.new_folder(f"copy-{size}")
        shutil.copytree(self._made[size].parent, folder, dirs_exist_ok=True)
        os.sync()  # what the copy left to write would disturb what is measured next
        return folder / _FILE

    def remove(self, *files: Path) -> None:
        for each in files:
            shutil.rmtree(each.parent)


async def make_store(path: Path, size: int) -> None:
    """Written by the package itself, and folded: at rest, all is in the data file."""
    async with opened(path, write_buffer_size=NEVER, backup_enabled=False) as store:
        await store.save_entity("templates", {"template_id": "t-1"})
        requests = range(-(-size // _MACHINES_OF_A_REQUEST))
        await store.create_entities("requests", map(request, requests))
        for start in range(0, size, _BATCH):
            numbers = range(start, min(size, start + _BATCH))
            await store.create_entities("machines", map(machine, numbers))
        await store.checkpoint()


def generation(path: Path) -> int:
    """The number of the newest journal: it grows by one with every fold."""
    journals = path.parent.glob(f"{path.name}.journal.*")
    return max((int(each.suffix[1:]) for each in journals), default=0)


# -- as found in the field ------------------------------------------------------------------


def real_store() -> tuple[dict[str, dict[str, Entity]], str]:
    """A store found in the field, or one of its shape; and where it comes from."""
    place = os.environ.get("HF_ASYNC_STORE_REAL_DATA")
    if place:
        file = Path(place) / "single_file" / _FILE
        return json.loads(file.read_bytes()), "real machines"
    machines = [_field_machine(number) for number in range(1000)]
    return {
        "templates": {"t-1": {"template_id": "t-1", "name": "generated"}},
        "requests": {request_id(0): {**request(0), "version": 0}},
        "machines": {each["machine_id"]: each for each in machines},
    }, "generated machines"


def many_of(found: Sequence[Entity], count: int) -> Iterable[Entity]:
    """So many machines made from those that were found, under new ids."""
    for number, each in zip(range(count), itertools.cycle(found)):
        yield {**each, "machine_id": machine_id(number)}


def write_foreign(path: Path, count: int) -> str:
    """A pretty-printed file of `count` machines, as others write it; where they come from."""
    found, origin = real_store()
    machines = many_of(list(found["machines"].values()), count)
    whole = {**found, "machines": {each["machine_id"]: each for each in machines}}
    path.write_text(json.dumps(whole, indent=2))
    return origin


async def rewrite_as_ours(path: Path) -> None:
    """Have the package write a foreign file in its own form."""
    async with opened(path, backup_enabled=False) as store:
        template = cast("Entity", (await store.query_entities("templates", limit=1))[0])
        await store.save_entity("templates", template)
        await store.checkpoint()


def _field_machine(number: int) -> Entity:
    """In the shape of those found in the field: about 1 KB, times without a zone, maps, lists."""
    return {
        "created_at": "2026-06-01T08:00:00.414002",
        "updated_at": None,
        "machine_id": machine_id(number),
        "name": f"ip-10-217-30-{number % 256}.eu-west-2.compute.internal",
        "template_id": "t-1",
        "request_id": request_id(0),
        "return_request_id": None,
        "provider_type": "aws",
        "provider_name": "aws_flamurg-eu-west-2",
        "provider_api": "SpotFleet",
        "resource_id": "fleet-6b0d549b-6f03-475a-9600-a35a099950d8",
        "instance_type": "t3.xlarge",
        "image_id": "ami-3f28c105d1fb17c23",
        "price_type": "spot",
        "private_ip": f"10.217.30.{number % 256}",
        "public_ip": None,
        "private_dns_name": None,
        "public_dns_name": None,
        "subnet_id": "subnet-0a1b2c3d",
        "security_group_ids": ["sg-0d9f3a77"],
        "vpc_id": "vpc-01aa",
        "status": "running",
        "status_reason": None,
        "launch_time": "2026-06-01T08:02:27.414002Z",
        "provisioning_started_at": None,
        "termination_time": None,
        "tags": {"Environment": "dev", "Owner": "数据"},
        "metadata": {"vcpu": 4, "health": None},
        "provider_data": {},
        "version": 1,
        "schema_version": "2.0.0",
    }


assert len(encode(machine(999_999))) == ENTITY_BYTES, len(encode(machine(999_999)))
assert {each.name for each in HOST_FACTORY} == {"templates", "requests", "machines"}
