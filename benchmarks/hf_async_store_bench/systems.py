"""Everything that can be measured, and why some of it cannot be here."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import msgspec

from hf_async_store import ConfigurationError, InvalidInputError, load_config, open_store
from hf_async_store_bench.messages import Needs, SystemUnderTest

_PACKAGE: Final = "hf_async_store_bench"
_NEEDS: Final[dict[str, Needs]] = {
    "memory": "nothing",
    "postgresql": "postgres",
    "dynamodb": "dynamodb",
}
_DRIVERS: Final = {"sqlite": "aiosqlite", "postgresql": "asyncpg", "dynamodb": "aiobotocore"}
_NONDURABLE: Final = {"json": "sync_writes=no", "sqlite": "synchronous=NORMAL"}


def _system(engine: str, adapter: str, **more: Any) -> SystemUnderTest:
    needs = {"needs": _NEEDS.get(engine, "folder")}
    return SystemUnderTest(engine=engine, adapter=f"{_PACKAGE}.{adapter}", **{**needs, **more})


def _strategy(name: str, engine: str, url: str, **more: Any) -> SystemUnderTest:
    given = {"name": name, "role": "strategy", "package": _DRIVERS.get(engine), "url": url}
    return _system(engine, "adapters:StoreAdapter", **given, **more)


_DYNAMODB: Final = "dynamodb://eu-west-1/{name}?endpoint_url={dynamodb}"

STRATEGIES: Final = tuple(
    msgspec.structs.replace(each, nondurable_query=_NONDURABLE.get(each.engine, ""))
    for each in (
        _strategy("memory", "memory", "memory:"),
        _strategy("json", "json", "json:{folder}/request_database.json"),
        _strategy("json split", "json", "json:{folder}/split"),
        _strategy("sqlite", "sqlite", "sqlite:{folder}/store.sqlite"),
        _strategy("postgresql", "postgresql", "{postgres}"),
        _strategy("dynamodb", "dynamodb", _DYNAMODB),
    )
)


def _others() -> Iterator[tuple[SystemUnderTest, bool]]:
    """The baselines and competitors, and whether the short run has them."""
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            runs, package = row.pop("runs"), row.pop("package") or None
            one = _system(**row, package=package, blocking=runs == "blocking")
            yield one, runs == "short"


_OTHERS: Final = tuple(_others())
BASELINES: Final = tuple(each for each, _ in _OTHERS if each.role == "baseline")
COMPETITORS: Final = tuple(each for each, _ in _OTHERS if each.role == "competitor")
ALL: Final = (*STRATEGIES, *BASELINES, *COMPETITORS)
SHORT_SYSTEMS: Final = (
    *(each for each in STRATEGIES if each.name != "json split"),
    *(each for each, is_short in _OTHERS if is_short),
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
