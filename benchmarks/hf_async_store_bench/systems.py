"""Everything that can be measured, and why some of it cannot be here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Final

import msgspec

from hf_async_store import ConfigurationError, InvalidInputError, load_config, open_store
from hf_async_store_bench.csv_rows import rows_beside
from hf_async_store_bench.messages import SystemUnderTest

ALL: Final = rows_beside(__file__, SystemUnderTest)
STRATEGIES: Final = tuple(each for each in ALL if each.role == "strategy")
BASELINES: Final = tuple(each for each in ALL if each.role == "baseline")
COMPETITORS: Final = tuple(each for each in ALL if each.role == "competitor")
SHORT_SYSTEMS: Final = tuple(each for each in ALL if each.short)


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
    return next(each for each in ALL if each.name == name)


def of_url(url: str) -> SystemUnderTest:
    """A store that the user names, with `{folder}` in the URL: the folder of each temporary store."""
    if "{folder}" not in url:
        raise InvalidInputError(
            "--store: the URL needs {folder} in it, where temporary stores are made, as in "
            "'json:{folder}/store.json?cache_size=0'; what is measured is never written elsewhere"
        )
    strategy = load_config(url.replace("{folder}", "folder")).strategy
    known = next((each for each in STRATEGIES if each.engine == strategy), STRATEGIES[0])
    changed = {"name": f"yours ({strategy})", "engine": strategy, "url": url, "needs": "folder"}
    return msgspec.structs.replace(known, **changed, nondurable_query="", copied=False)
