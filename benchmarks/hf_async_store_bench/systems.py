"""Everything that can be measured, how each baseline is made, and why some of it cannot be here."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from hf_async_store import ConfigurationError, InvalidInputError, load_config, open_store
from hf_async_store_bench.messages import Needs, SystemUnderTest

if TYPE_CHECKING:
    from collections.abc import Sequence

_PACKAGE: Final = "hf_async_store_bench"


def _strategy(name: str, needs: Needs, url: str, **more: Any) -> SystemUnderTest:
    return SystemUnderTest(
        name=name,
        role="strategy",
        engine=name.partition(" ")[0],
        adapter=f"{_PACKAGE}.adapters:StoreAdapter",
        needs=needs,
        url=url,
        **more,
    )


def _baseline(
    name: str, engine: str, adapter: str, made: str, package: str | None = None
) -> SystemUnderTest:
    return SystemUnderTest(
        name=name,
        role="baseline",
        engine=engine,
        adapter=f"{_PACKAGE}.baselines.{adapter}",
        needs=_NEEDS.get(engine, "folder"),
        package=package,
        made=made,
    )


def _competitor(
    name: str, engine: str, adapter: str, package: str, *, blocking: bool = False
) -> SystemUnderTest:
    return SystemUnderTest(
        name=name,
        role="competitor",
        engine=engine,
        adapter=f"{_PACKAGE}.competitors:{adapter}",
        needs=_NEEDS.get(engine, "folder"),
        package=package,
        blocking=blocking,
    )


_NEEDS: Final[dict[str, Needs]] = {"postgresql": "postgres", "dynamodb": "dynamodb"}

STRATEGIES: Final = (
    _strategy("memory", "nothing", "memory:"),
    _strategy(
        "json", "folder", "json:{folder}/request_database.json", nondurable_query="sync_writes=no"
    ),
    _strategy("json split", "folder", "json:{folder}/split", nondurable_query="sync_writes=no"),
    _strategy(
        "sqlite",
        "folder",
        "sqlite:{folder}/store.sqlite",
        nondurable_query="synchronous=NORMAL",
        package="aiosqlite",
    ),
    _strategy("postgresql", "postgres", "{postgres}", package="asyncpg"),
    _strategy(
        "dynamodb",
        "dynamodb",
        "dynamodb://eu-west-1/{name}?endpoint_url={dynamodb}",
        package="aiobotocore",
        max_entities=(100_000, "the test server holds all of it in its memory, and takes minutes"),
    ),
)

_WAL: Final = "WAL, synchronous=FULL"
MADE: Final = (
    "SQL baselines store rows with the columns, indexes and foreign keys of the store, what has no "
    "column as a document, and a version that each write raises. DynamoDB baselines store items in a "
    "table with the store's four indexes, and a version."
)
"""What all baselines of an engine have in common."""


BASELINES: Final = (
    _baseline(
        "append and sync each",
        "json",
        "journal:JournalEach",
        "Encodes a machine, appends the line to a file, fdatasync, in one worker thread; no indexes, "
        "no conditions, nothing held in memory.",
    ),
    _baseline(
        "group commit by hand",
        "json",
        "journal:JournalTogether",
        "The same; all lines that wait share one append and one fdatasync.",
    ),
    _baseline(
        "start of Python",
        "json",
        "process:StartOfPython",
        "A process that runs asyncio.run of nothing.",
    ),
    _baseline(
        "aiosqlite each",
        "sqlite",
        "sqlite:Aiosqlite",
        f"One aiosqlite connection; a statement and its commit for each operation; {_WAL}.",
        "aiosqlite",
    ),
    _baseline(
        "SQLAlchemy Core on aiosqlite each",
        "sqlite",
        "sqlite:Core",
        f"create_async_engine with its own pool (5 connections and 10 more); begin, an "
        f"upsert or a select, commit for each operation; {_WAL}. With many tasks its connections "
        "wait for one another's write lock.",
        "sqlalchemy",
    ),
    _baseline(
        "sqlite3 batched by hand",
        "sqlite",
        "sqlite:Sqlite3Batched",
        f"sqlite3 in one thread; everything that waits in one transaction (executemany); {_WAL}.",
        "aiosqlite",
    ),
    _baseline(
        "aiosqlite, a multi-row insert",
        "sqlite",
        "sqlite:MultiRow",
        f"One INSERT of 1,500 rows at most, in one transaction; {_WAL}.",
        "aiosqlite",
    ),
    _baseline(
        "asyncpg pool each",
        "postgresql",
        "postgresql:Pool",
        "asyncpg's pool of 32 connections as it comes (it resets each connection on "
        "release); a statement for each operation.",
        "asyncpg",
    ),
    _baseline(
        "asyncpg held connections each",
        "postgresql",
        "postgresql:Held",
        "32 connections that are never reset; a prepared statement for each operation.",
        "asyncpg",
    ),
    _baseline(
        "SQLAlchemy Core on asyncpg each",
        "postgresql",
        "postgresql:Core",
        "create_async_engine with 32 connections in autocommit; a statement each.",
        "asyncpg",
    ),
    _baseline(
        "asyncpg batched by hand",
        "postgresql",
        "postgresql:Batched",
        "Up to 64 waiting operations as one statement of arrays, on 4 connections; "
        "imports by COPY.",
        "asyncpg",
    ),
    _baseline(
        "asyncpg, a multi-row insert",
        "postgresql",
        "postgresql:MultiRow",
        "One INSERT of arrays, in one transaction.",
        "asyncpg",
    ),
    _baseline(
        "aiobotocore each",
        "dynamodb",
        "dynamodb:Each",
        "One client with 64 connections, no validation of parameters; a request for each "
        "operation (UpdateItem for saves).",
        "aiobotocore",
    ),
    _baseline(
        "aiobotocore batched by hand",
        "dynamodb",
        "dynamodb:Batched",
        "BatchWriteItem of 25, which checks nothing and knows no versions, and "
        "BatchGetItem of 100; 8 at once.",
        "aiobotocore",
    ),
)

COMPETITORS: Final = (
    _competitor("tinydb", "json", "TinyDB", "tinydb", blocking=True),
    _competitor("orb-py JSON", "json", "Orb", "orb", blocking=True),
    _competitor("diskcache", "sqlite", "DiskCache", "diskcache", blocking=True),
    _competitor("py-key-value disk", "sqlite", "KeyValueDisk", "key_value.aio"),
    _competitor("advanced-alchemy", "sqlite", "AdvancedAlchemy", "advanced_alchemy"),
    _competitor("py-key-value PostgreSQL", "postgresql", "KeyValuePostgreSQL", "key_value.aio"),
    _competitor("aiodynamo", "dynamodb", "AioDynamo", "aiodynamo"),
    _competitor("pydynox", "dynamodb", "Pydynox", "pydynox"),
)

ALL: Final = (*STRATEGIES, *BASELINES, *COMPETITORS)


def missing(system: SystemUnderTest) -> str | None:
    """Why it cannot be measured here, as far as can be told without starting anything."""
    if system.package is not None and not _is_installed(system.package):
        return f"{system.package} is not installed"
    if system.role == "strategy":
        try:
            open_store(
                system.url_of(
                    folder="f", postgres="postgresql://h/n", dynamodb="http://h", name="n"
                )
            )
        except ConfigurationError as exc:
            return str(exc)
    return None


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def chosen(names: Sequence[str]) -> list[SystemUnderTest]:
    """Those of the names; an engine's name stands for everything that belongs to it.

    Raises:
        ConfigurationError: nothing has such a name.
    """
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
    """A store that the user names, as of a strategy of another package.

    Args:
        url: with `{folder}` in it, which becomes the folder of each temporary store.

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
    return SystemUnderTest(
        name=f"yours ({strategy})",
        role="strategy",
        engine=strategy,
        adapter=f"{_PACKAGE}.adapters:StoreAdapter",
        needs="folder",
        url=url,
        copied=False,
    )
