"""Measures moving and backing up on this machine, beside the least code that does the same work.

    python benchmarks/migration.py [--quick] [--only NAME ...] [--json FILE]

Needs what the engines need; a PostgreSQL server is started for the run. Prints a table and writes a
JSON file, as the other scripts do. The sides of a comparison take turns in one run.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import gzip
import json
import os
import sqlite3
import subprocess
import sys
import time
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from children import forget_peak, peak_bytes, resident_bytes
from measure import (
    Figure,
    alternate,
    arguments,
    ratios,
    reported,
)
from stores import Stores, machine, opened, request

from hf_async_store import MigrationTool, open_store
from hf_async_store.migration import backup_store, restore_store
from hf_async_store.testing.servers import PostgresServer, postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

_RESULTS: Final = Path(__file__).parent / "results" / "migration.json"
_FLAT: Final = 1.2
_SHARE: Final = 0.3
_LEVEL: Final = 6
_PIECE: Final = 1 << 20
_BATCH: Final = 1000


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is done."""

    moved: int = 100_000
    backed_up: int = 1_000_000
    small: int = 10_000
    large: int = 1_000_000
    rounds: int = 3
    backup_rounds: int = 2


_QUICK: Final = Settings(moved=20_000, backed_up=100_000, large=100_000, rounds=2)
_REPORT: Final = Settings(rounds=2, backup_rounds=1)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every row is given."""

    settings: Settings
    stores: Stores
    server: PostgresServer | None


Row: TypeAlias = "Callable[[Bench], Coroutine[None, None, list[Figure]]]"


# -- moving ---------------------------------------------------------------------------------


async def sqlite(bench: Bench) -> list[Figure]:
    """JSON to SQLite, against sqlite3 and executemany into the same tables, in one transaction."""

    async def bulk() -> float:
        folder = bench.stores.new_folder("bulk")
        file = folder / "bulk.db"
        await _made(f"sqlite:{file}")
        rows = _rows(bench.settings.moved)
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            started = time.perf_counter()
            with connection:
                for table, columns, values in rows:
                    marks = ", ".join("?" * len(columns))
                    connection.executemany(
                        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", values
                    )
            took = time.perf_counter() - started
        bench.stores.remove(file)
        return took

    async def move() -> float:
        folder = bench.stores.new_folder("moved")
        took = await _move(bench, f"sqlite:{folder}/moved.db")
        bench.stores.remove(folder / "moved.db")
        return took

    return await _against("sqlite", bench, move, bulk, "sqlite3, executemany, one transaction")


async def postgresql(bench: Bench) -> list[Figure]:
    """JSON to PostgreSQL, against COPY by asyncpg into the same tables, in one transaction."""
    import asyncpg

    server = bench.server
    assert server is not None, "started for this row"

    async def bulk() -> float:
        url = server.database()
        await _made(url)
        rows = _rows(bench.settings.moved)
        connection = await asyncpg.connect(url)
        started = time.perf_counter()
        async with connection.transaction():
            for table, columns, values in rows:
                await connection.copy_records_to_table(table, records=values, columns=columns)
        took = time.perf_counter() - started
        await connection.close()
        return took

    async def move() -> float:
        return await _move(bench, server.database())

    return await _against("postgresql", bench, move, bulk, "asyncpg, COPY, one transaction")


async def _against(
    row: str,
    bench: Bench,
    move: Callable[[], Coroutine[None, None, float]],
    bulk: Callable[[], Coroutine[None, None, float]],
    what: str,
) -> list[Figure]:
    count = bench.settings.moved
    ours, bare = await alternate(bench.settings.rounds, move, bulk)
    rates = [[count / each for each in side] for side in (ours, bare)]
    return [
        Figure(row, f"JSON, {count:,} machines, digests counted", rates[0], "machines/s"),
        Figure(row, what, rates[1], "machines/s"),
        Figure(row, f"{count:,} machines against {what}", ratios(*rates), "x", at_least=_SHARE),
    ]


async def _made(url: str) -> None:
    """A store with its tables, and nothing in them."""
    async with open_store(url) as store:
        assert not await store.count_entities("machines")


async def _move(bench: Bench, url: str) -> float:
    """The seconds of the copy alone: neither backup nor verification, both sides open."""
    source = await bench.stores.copy(bench.settings.moved)
    folder = bench.stores.new_folder("checkpoints")
    config = {
        "batch_size": _BATCH,
        "create_backup": False,
        "validate_after_migration": False,
        "backup_location": f"{folder}/",
    }
    async with opened(source) as one, open_store(url) as other:
        await one.query_page("machines", limit=1)
        await other.query_page("machines", limit=1)
        gc.collect()
        started = time.perf_counter()
        report = await MigrationTool(one, other, config).migrate()
        took = time.perf_counter() - started
        assert report.collections["machines"].written == bench.settings.moved
    bench.stores.remove(source, folder / "none")
    return took


def _rows(count: int) -> list[tuple[str, list[str], list[tuple[Any, ...]]]]:
    """What a hand-written load has in its hands: columns, the rest as a document, the version."""
    requests = -(-count // 1000)
    parts = [
        ("templates", [{"template_id": "t-1"}]),
        ("requests", list(map(request, range(requests)))),
        ("machines", list(map(machine, range(count)))),
    ]
    found = []
    for table, entities in parts:
        columns = [each for each in entities[0] if each != "version"]
        rows = [(*(entity[name] for name in columns), "{}", 1) for entity in entities]
        found.append((table, [*columns, "doc", "version"], rows))
    return found


# -- backups --------------------------------------------------------------------------------


async def json_backup(bench: Bench) -> list[Figure]:
    """A backup of a JSON store, against compressing the same bytes."""
    source = await bench.stores.copy(bench.settings.backed_up)
    figures = await _backup("json_backup", f"json:{source}", bench)
    bench.stores.remove(source)
    return figures


async def sqlite_backup(bench: Bench) -> list[Figure]:
    """A backup of a SQLite store, against compressing the same bytes."""
    source = await bench.stores.copy(bench.settings.backed_up)
    folder = bench.stores.new_folder("sqlite")
    url = f"sqlite:{folder}/store.db"
    async with opened(source) as one:
        made = await backup_store(one, folder / "first.jsonl.gz")
    async with open_store(url) as store:
        await restore_store(store, made.path)
    figures = await _backup("sqlite_backup", url, bench)
    bench.stores.remove(source, folder / "store.db")
    return figures


async def _backup(row: str, url: str, bench: Bench) -> list[Figure]:
    folder = bench.stores.new_folder("backups")
    numbers = iter(range(1000))
    texts: list[bytes] = []

    async with open_store(url) as store:
        await store.query_page("machines", limit=1)

        async def ours() -> float:
            path = folder / f"{next(numbers)}.jsonl.gz"
            started = time.perf_counter()
            await backup_store(store, path)
            took = time.perf_counter() - started
            if not texts:
                texts.append(gzip.decompress(path.read_bytes()))
            path.unlink()
            return took

        async def compress() -> float:
            return await asyncio.to_thread(_compress, texts[0], folder / "plain.gz")

        backups, plain = await alternate(bench.settings.backup_rounds, ours, compress)
    bench.stores.remove(folder / "plain.gz")
    count = bench.settings.backed_up
    return [
        Figure(row, f"{count:,} machines, {len(texts[0]) / 1e6:.0f} MB of text", backups, "s"),
        Figure(row, "zlib over the same bytes, piece by piece, to a file", plain, "s"),
        Figure(
            row, f"{count:,} machines against zlib", ratios(plain, backups), "x", at_least=_SHARE
        ),
    ]


def _compress(text: bytes, path: Path) -> float:
    started = time.perf_counter()
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)
    with path.open("wb") as file:
        for start in range(0, len(text), _PIECE):
            file.write(packer.compress(text[start : start + _PIECE]))
        file.write(packer.flush())
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started


# -- memory ---------------------------------------------------------------------------------


async def memory(bench: Bench) -> list[Figure]:
    """What moving and backing up take beyond an open JSON store, small and large."""
    grown = {}
    for size in (bench.settings.small, bench.settings.large):
        source = await bench.stores.copy(size)
        folder = bench.stores.new_folder("memory")
        for what in ("move", "backup"):
            grown[what, size] = _child(what, source, folder)
        bench.stores.remove(source, folder / "none")
    figures = []
    for what, name in (("move", "JSON to SQLite"), ("backup", "a backup of JSON")):
        small, large = (grown[what, each] for each in (bench.settings.small, bench.settings.large))
        figures += [
            Figure("memory", f"{name}, {bench.settings.small:,} machines", [small / 1e6], "MB"),
            Figure("memory", f"{name}, {bench.settings.large:,} machines", [large / 1e6], "MB"),
            Figure(
                "memory",
                f"{name}, {bench.settings.large:,} against {bench.settings.small:,} machines",
                [large / small],
                "x",
                at_most=_FLAT,
            ),
        ]
    return figures


def _child(what: str, source: Path, folder: Path) -> float:
    command = [sys.executable, __file__, "--child", what, str(source), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


async def child(what: str, source: Path, folder: Path) -> float:
    """The peak of this process beyond what it held with the store open."""
    async with opened(source) as store:
        # As an open store holds them: the entities, and their order.
        await store.query_page("machines", limit=1)
        gc.collect()
        before = resident_bytes()
        forget_peak()
        if what == "backup":
            await backup_store(store, folder / "backup.jsonl.gz")
        else:
            config = {
                "batch_size": _BATCH,
                "create_backup": False,
                "backup_location": f"{folder}/",
            }
            async with open_store(f"sqlite:{folder}/moved.db") as target:
                report = await MigrationTool(store, target, config).migrate()
                assert report.verified
        return peak_bytes() - before


# -- the run --------------------------------------------------------------------------------

_ROWS: Final[dict[str, Row]] = {
    each.__name__: each for each in (sqlite, postgresql, json_backup, sqlite_backup, memory)
}


def measured(names: Sequence[str], settings: Settings, folder: Path) -> list[Figure]:
    def run(chosen: Iterable[str], server: PostgresServer | None) -> list[Figure]:
        bench = Bench(settings, Stores(folder), server)
        figures: list[Figure] = []
        for name in chosen:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            gc.collect()
            figures += asyncio.run(_ROWS[name](bench))
        return figures

    if "postgresql" not in names:
        return run(names, None)
    with postgres() as server:
        return run(names, server)


def main() -> None:
    parser = arguments("Measures moving and backing up.", _ROWS, _RESULTS)
    parser.add_argument(
        "--report", action="store_true", help="the sizes that the targets name, in few rounds"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, source, place = options.child
        print(json.dumps(asyncio.run(child(what, Path(source), Path(place)))))
        return
    settings = _QUICK if options.quick else _REPORT if options.report else Settings()
    with reported(options, settings) as (folder, figures):
        figures += measured(options.only, settings, folder)


if __name__ == "__main__":
    main()
