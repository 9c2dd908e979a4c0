"""Everything that can be measured, and why some of it cannot be here."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from hf_async_store.bench.plan import Subject
from hf_async_store.config import load_config
from hf_async_store.errors import ConfigurationError, InvalidInputError
from hf_async_store.strategies import strategy_type

if TYPE_CHECKING:
    from collections.abc import Sequence

_STORE: Final = "hf_async_store.bench.targets:StoreTarget"
_FLOORS: Final = "hf_async_store.bench.floors"
_PEERS: Final = "hf_async_store.bench.peers"

STRATEGIES: Final = (
    Subject(
        name="memory",
        kind="strategy",
        family="memory",
        target=_STORE,
        place="nothing",
        url="memory:",
    ),
    Subject(
        name="json",
        kind="strategy",
        family="json",
        target=_STORE,
        place="folder",
        url="json:{folder}/request_database.json",
        relaxed="sync_writes=no",
    ),
    Subject(
        name="json split",
        kind="strategy",
        family="json",
        target=_STORE,
        place="folder",
        url="json:{folder}/split",
        relaxed="sync_writes=no",
    ),
    Subject(
        name="sqlite",
        kind="strategy",
        family="sqlite",
        target=_STORE,
        place="folder",
        package="aiosqlite",
        url="sqlite:{folder}/store.sqlite",
        relaxed="synchronous=NORMAL",
    ),
    Subject(
        name="postgresql",
        kind="strategy",
        family="postgresql",
        target=_STORE,
        place="postgres",
        package="asyncpg",
        url="{postgres}",
    ),
    Subject(
        name="dynamodb",
        kind="strategy",
        family="dynamodb",
        target=_STORE,
        place="dynamodb",
        package="aiobotocore",
        url="dynamodb://eu-west-1/{name}?endpoint_url={dynamodb}",
        most=(100_000, "the test server holds all of it in its memory, and takes minutes"),
    ),
)

FLOORS: Final = (
    Subject(
        name="append and sync each",
        kind="floor",
        family="json",
        target=f"{_FLOORS}.journal:JournalEach",
        place="folder",
    ),
    Subject(
        name="group commit by hand",
        kind="floor",
        family="json",
        target=f"{_FLOORS}.journal:JournalTogether",
        place="folder",
    ),
    Subject(
        name="aiosqlite each",
        kind="floor",
        family="sqlite",
        target=f"{_FLOORS}.sqlite:Aiosqlite",
        place="folder",
        package="aiosqlite",
    ),
    Subject(
        name="SQLAlchemy Core on aiosqlite each",
        kind="floor",
        family="sqlite",
        target=f"{_FLOORS}.sqlite:Core",
        place="folder",
        package="sqlalchemy",
    ),
    Subject(
        name="SQLAlchemy Core, 64 rows a statement",
        kind="floor",
        family="sqlite",
        target=f"{_FLOORS}.sqlite:CoreTogether",
        place="folder",
        package="sqlalchemy",
    ),
    Subject(
        name="sqlite3 batched by hand",
        kind="floor",
        family="sqlite",
        target=f"{_FLOORS}.sqlite:Sqlite3Together",
        place="folder",
        package="aiosqlite",
    ),
    Subject(
        name="aiosqlite, a multi-row insert",
        kind="floor",
        family="sqlite",
        target=f"{_FLOORS}.sqlite:MultiRow",
        place="folder",
        package="aiosqlite",
    ),
    Subject(
        name="asyncpg pool each",
        kind="floor",
        family="postgresql",
        target=f"{_FLOORS}.postgres:Pool",
        place="postgres",
        package="asyncpg",
    ),
    Subject(
        name="asyncpg held connections each",
        kind="floor",
        family="postgresql",
        target=f"{_FLOORS}.postgres:Held",
        place="postgres",
        package="asyncpg",
    ),
    Subject(
        name="SQLAlchemy Core on asyncpg each",
        kind="floor",
        family="postgresql",
        target=f"{_FLOORS}.postgres:Core",
        place="postgres",
        package="asyncpg",
    ),
    Subject(
        name="asyncpg batched by hand",
        kind="floor",
        family="postgresql",
        target=f"{_FLOORS}.postgres:AsyncpgTogether",
        place="postgres",
        package="asyncpg",
    ),
    Subject(
        name="asyncpg, a multi-row insert",
        kind="floor",
        family="postgresql",
        target=f"{_FLOORS}.postgres:MultiRow",
        place="postgres",
        package="asyncpg",
    ),
    Subject(
        name="aiobotocore each",
        kind="floor",
        family="dynamodb",
        target=f"{_FLOORS}.dynamodb:Each",
        place="dynamodb",
        package="aiobotocore",
    ),
    Subject(
        name="aiobotocore batched by hand",
        kind="floor",
        family="dynamodb",
        target=f"{_FLOORS}.dynamodb:AllTogether",
        place="dynamodb",
        package="aiobotocore",
    ),
)

PEERS: Final = (
    Subject(
        name="tinydb",
        kind="peer",
        family="json",
        target=f"{_PEERS}.tinydb:Target",
        place="folder",
        package="tinydb",
        blocking=True,
    ),
    Subject(
        name="orb-py JSON",
        kind="peer",
        family="json",
        target=f"{_PEERS}.orb:Target",
        place="folder",
        package="orb",
        blocking=True,
    ),
    Subject(
        name="diskcache",
        kind="peer",
        family="sqlite",
        target=f"{_PEERS}.diskcache:Target",
        place="folder",
        package="diskcache",
        blocking=True,
    ),
    Subject(
        name="py-key-value disk",
        kind="peer",
        family="sqlite",
        target=f"{_PEERS}.keyvalue:Disk",
        place="folder",
        package="key_value.aio",
    ),
    Subject(
        name="advanced-alchemy",
        kind="peer",
        family="sqlite",
        target=f"{_PEERS}.advanced:Target",
        place="folder",
        package="advanced_alchemy",
    ),
    Subject(
        name="py-key-value PostgreSQL",
        kind="peer",
        family="postgresql",
        target=f"{_PEERS}.keyvalue:PostgreSQL",
        place="postgres",
        package="key_value.aio",
    ),
    Subject(
        name="aiodynamo",
        kind="peer",
        family="dynamodb",
        target=f"{_PEERS}.aiodynamo:Target",
        place="dynamodb",
        package="aiodynamo",
    ),
    Subject(
        name="pydynox",
        kind="peer",
        family="dynamodb",
        target=f"{_PEERS}.pydynox:Target",
        place="dynamodb",
        package="pydynox",
    ),
)

ALL: Final = (*STRATEGIES, *FLOORS, *PEERS)


def missing(subject: Subject) -> str | None:
    """Why it cannot be measured here, as far as can be told without starting anything."""
    if subject.package is not None and not _is_installed(subject.package):
        return f"{subject.package} is not installed"
    if subject.kind == "strategy":
        try:
            url = subject.url.format(
                folder="f", postgres="postgresql://h/n", dynamodb="d", name="n"
            )
            strategy_type(load_config(url).strategy)
        except ConfigurationError as exc:
            return str(exc)
    return None


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def chosen(names: Sequence[str]) -> list[Subject]:
    """Those of the names; a family's name stands for all of it.

    Raises:
        ConfigurationError: nothing is called so.
    """
    found: list[Subject] = []
    for name in names:
        those = [each for each in ALL if name in (each.name, each.family, each.kind)]
        if not those:
            known = ", ".join(each.name for each in ALL)
            raise ConfigurationError(f"nothing to measure is called {name!r}; there are: {known}")
        found += [each for each in those if each not in found]
    return found


def of_url(url: str) -> Subject:
    """A store that the user names, as of a strategy of another package.

    Args:
        url: with `{folder}` in it, the place of each temporary store.

    Raises:
        InvalidInputError: it has none: what is measured would be written into a store in use.
        ConfigurationError: it names no store.
    """
    if "{folder}" not in url:
        raise InvalidInputError(
            "--store: the URL needs {folder} in it, where temporary stores are made, as in "
            "'json:{folder}/store.json?cache_size=0'; what is measured is never written elsewhere"
        )
    strategy = load_config(url.replace("{folder}", "folder")).strategy
    return Subject(
        name=f"yours ({strategy})",
        kind="strategy",
        family=strategy,
        target=_STORE,
        place="folder",
        url=url,
        copied=False,
    )
