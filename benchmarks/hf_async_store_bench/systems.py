"""Everything that can be measured, and why some of it cannot be here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, Final

import msgspec

from hf_async_store import ConfigurationError, InvalidInputError, load_config, open_store
from hf_async_store_bench.messages import Needs, Role, SystemUnderTest

_PACKAGE: Final = "hf_async_store_bench"
_NEEDS: Final[dict[str, Needs]] = {
    "memory": "nothing",
    "postgresql": "postgres",
    "dynamodb": "dynamodb",
}
_DRIVERS: Final = {"sqlite": "aiosqlite", "postgresql": "asyncpg", "dynamodb": "aiobotocore"}
_NONDURABLE: Final = {"json": "sync_writes=no", "sqlite": "synchronous=NORMAL"}


def _system(
    role: Role, name: str, engine: str, adapter: str, package: str | None = None, **more: Any
) -> SystemUnderTest:
    return SystemUnderTest(
        name=name,
        role=role,
        engine=engine,
        adapter=f"{_PACKAGE}.{adapter}",
        package=package or _DRIVERS.get(engine),
        **{"needs": _NEEDS.get(engine, "folder"), **more},
    )


def _strategy(name: str, engine: str, url: str, **more: Any) -> SystemUnderTest:
    return _system("strategy", name, engine, "adapters:StoreAdapter", url=url, **more)


_baseline = partial(_system, "baseline")
_competitor = partial(_system, "competitor")
_HELD: Final = "the test server holds all of it in its memory, and takes minutes"
_DYNAMODB: Final = "dynamodb://eu-west-1/{name}?endpoint_url={dynamodb}"

STRATEGIES: Final = tuple(
    msgspec.structs.replace(each, nondurable_query=_NONDURABLE.get(each.engine, ""))
    for each in (
        _strategy("memory", "memory", "memory:"),
        _strategy("json", "json", "json:{folder}/request_database.json"),
        _strategy("json split", "json", "json:{folder}/split"),
        _strategy("sqlite", "sqlite", "sqlite:{folder}/store.sqlite"),
        _strategy("postgresql", "postgresql", "{postgres}"),
        _strategy("dynamodb", "dynamodb", _DYNAMODB, max_entities=(100_000, _HELD)),
    )
)

BASELINES: Final = (
    _baseline("append and sync each", "json", "baselines.journal:JournalEach"),
    _baseline("group commit by hand", "json", "baselines.journal:JournalTogether"),
    _baseline("start of Python", "json", "baselines.journal:StartOfPython"),
    _baseline("aiosqlite each", "sqlite", "baselines.sqlite:Aiosqlite"),
    _baseline("SQLAlchemy Core on aiosqlite each", "sqlite", "baselines.sqlite:Core"),
    _baseline("sqlite3 batched by hand", "sqlite", "baselines.sqlite:Sqlite3Batched"),
    _baseline("aiosqlite, a multi-row insert", "sqlite", "baselines.sqlite:MultiRow"),
    _baseline("asyncpg pool each", "postgresql", "baselines.postgresql:Pool"),
    _baseline("asyncpg held connections each", "postgresql", "baselines.postgresql:Held"),
    _baseline("SQLAlchemy Core on asyncpg each", "postgresql", "baselines.postgresql:Core"),
    _baseline("asyncpg batched by hand", "postgresql", "baselines.postgresql:Batched"),
    _baseline("asyncpg, a multi-row insert", "postgresql", "baselines.postgresql:MultiRow"),
    _baseline("aiobotocore each", "dynamodb", "baselines.dynamodb:Each"),
    _baseline("aiobotocore batched by hand", "dynamodb", "baselines.dynamodb:Batched"),
)

COMPETITORS: Final = (
    _competitor("tinydb", "json", "competitors:TinyDB", "tinydb", blocking=True),
    _competitor("orb-py JSON", "json", "competitors:Orb", "orb", blocking=True),
    _competitor("diskcache", "sqlite", "competitors:DiskCache", "diskcache", blocking=True),
    _competitor("py-key-value disk", "sqlite", "competitors:KeyValueDisk", "key_value.aio"),
    _competitor("advanced-alchemy", "sqlite", "competitors:AdvancedAlchemy", "advanced_alchemy"),
    _competitor(
        "py-key-value PostgreSQL", "postgresql", "competitors:KeyValuePostgreSQL", "key_value.aio"
    ),
    _competitor("aiodynamo", "dynamodb", "competitors:AioDynamo", "aiodynamo"),
    _competitor("pydynox", "dynamodb", "competitors:Pydynox", "pydynox"),
)

ALL: Final = (*STRATEGIES, *BASELINES, *COMPETITORS)
_ONLY_FULL: Final = (
    "json split",
    "aiosqlite each",
    "asyncpg held connections each",
    "SQLAlchemy Core on asyncpg each",
)
SHORT_SYSTEMS: Final = tuple(
    each for each in (*STRATEGIES, *BASELINES) if each.name not in _ONLY_FULL
)
"""The short run has no competitors, and nothing that says much the same as another."""


def missing(system: SystemUnderTest) -> str | None:
    """Why it cannot be measured here, as far as can be told without starting anything."""
    if system.package is not None:
        try:
            found = find_spec(system.package)
        except ModuleNotFoundError:  # of the package that it is in
            found = None
        if found is None:
            return f"{system.package} is not installed"
    if system.role == "strategy":
        places = {"folder": "f", "postgres": "postgresql://h/n", "dynamodb": "http://h"}
        try:
            open_store(system.url_of(**places, name="n"))
        except ConfigurationError as exc:
            return str(exc)
    return None


def chosen(names: Sequence[str]) -> list[SystemUnderTest]:
    """Those of the names; an engine's name stands for everything that belongs to it."""
    found: list[SystemUnderTest] = []
    for name in names:
        those = [each for each in ALL if name in (each.name, each.engine, each.role)]
        if not those:
            known = ", ".join(each.name for each in ALL)
            raise ConfigurationError(f"nothing to measure is called {name!r}; there are: {known}")
        found += [each for each in those if each not in found]
    return found


def named(name: str) -> SystemUnderTest:
    """The one of this name."""
    return next(each for each in ALL if each.name == name)


def of_url(url: str) -> SystemUnderTest:
    """A store that the user names, with `{folder}` in the URL: the folder of each temporary store."""
    if "{folder}" not in url:
        raise InvalidInputError(
            "--store: the URL needs {folder} in it, where temporary stores are made, as in "
            "'json:{folder}/store.json?cache_size=0'; what is measured is never written elsewhere"
        )
    strategy = load_config(url.replace("{folder}", "folder")).strategy
    return _strategy(f"yours ({strategy})", strategy, url, needs="folder", copied=False)
