"""Configuration: one model per strategy, and the forms in which a caller may specify it.

`load_config` accepts the JSON of the spec, as a mapping or a file, and URLs. An invalid configuration
raises a `ConfigurationError` that names the key by its path.

**Environment.** In every string value of a mapping or file, and in URLs, `${NAME}` is replaced by the
environment variable, and `${NAME:-default}` by the default if the variable is unset or empty.
`$${` is a literal `${`; any other `$` is unchanged, because passwords may contain it. Such a value
is converted to the type of its key: `"port": "${PGPORT}"` is a number. In a URL, the inserted string
is percent-encoded, so that it cannot be mistaken for URL syntax.

**Secrets.** Errors name keys and never show values, because any value may be a misplaced secret. For
the same reason no error is raised while an exception with such a value is being handled: it would
remain attached as the context.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import isfinite
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Final,
    Literal,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
)

import msgspec

from hf_async_store.errors import ConfigurationError
from hf_async_store.json_input import decode_json
from hf_async_store.redaction import REDACTED, is_sensitive, redact_text, redact_url

if TYPE_CHECKING:
    from hf_async_store.values import Value

FOLLOW_MOVES: Final = "follow_moves"
COLLECTIONS: Final = "collections"

NO_STRATEGY: Final = (
    "strategy: required, because no strategy is named (json, sql, dynamodb or memory)"
)

LOCATION_KEYS: Final = (
    "host",
    "port",
    "database",
    "name",
    "schema",
    "region",
    "table_prefix",
    "endpoint_url",
)
"""The settings of a third-party strategy that are part of the location of a store, beside its URL."""

STRATEGY_GROUP: Final = "hf_async_store.strategies"
"""The entry-point group under which other packages register a strategy by name."""

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
AtLeastOne: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
Port: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Percent: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=100)]


class Secret:
    """A string that is never shown: `str`, `repr` and formatting give `***`. False if it is empty."""

    __slots__ = ("_value",)

    def __init__(self, text: str) -> None:
        self._value = text

    def reveal(self) -> str:
        """The string itself."""
        return self._value

    def __repr__(self) -> str:
        return repr(REDACTED)

    def __str__(self) -> str:
        return REDACTED

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return self._value == other._value if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        return hash((Secret, self._value))


class _ExternalString(str):
    """A string from a URL or the environment: not expanded again, converted to the type of its key."""

    __slots__ = ()


# -- the models -----------------------------------------------------------------------------


class _RedactedRepr(msgspec.Struct, frozen=True, kw_only=True):
    """A struct whose `repr` (also that of rich) hides secrets, even in plain mappings."""

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({fields})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, _redact(name, getattr(self, name))) for name in self.__struct_fields__]


class _Model(_RedactedRepr, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A block of the configuration, also validated if it is created in Python.

    Raises:
        ConfigurationError: a value has the wrong type or is out of range; names its path.
    """

    _urls: ClassVar[tuple[str, ...]] = ()
    """The keys whose value is a URL."""

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            value = _checked(getattr(self, name), kind, name)
            msgspec.structs.force_setattr(self, name, value)
            if isinstance(value, str) and "://" in value and name not in self._urls:
                # It may contain a password, and would be used as the name of a file, user or table.
                raise ConfigurationError(f"{name}: a URL is not expected here")

    def path_keys(self) -> tuple[str, ...]:
        """The keys whose value is a local path."""
        return ()


class StrategyOptions(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The typed configuration of a third-party strategy: subclass it, and read it by `options_of`.

    The types of the keys are those that msgspec converts; `Secret` is a string that no `repr` shows.

    Attributes:
        url: the URL without its query, if the store was opened by one.

    Example:
        `class AcmeOptions(StrategyOptions, frozen=True, kw_only=True): pool: int = 5`
    """

    _urls: ClassVar[tuple[str, ...]] = ("url",)

    url: str = ""


class Filenames(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file names of the JSON strategy, relative to `base_path` and inside it.

    Attributes:
        single_file: the file of `single_file` storage.
        split_files: the file of each collection; the default is `NAME.json`.
    """

    single_file: str = "request_database.json"
    split_files: Mapping[str, str] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_filename("single_file", self.single_file)
        if isinstance(self.split_files, Mapping):
            for name, file in self.split_files.items():
                _check_filename(f"split_files.{name}", file)
            _refuse_same_file(self.split_files, "split_files.")
        super().__post_init__()


class JSONConfig(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`json_strategy`.

    Attributes:
        base_path: a folder; a relative one is below the working directory.
        enable_compression: compress with gzip, to `NAME.gz`.
        cache_size: the maximum number of decoded entities of each collection that queries cache.
        write_buffer_size: the size in bytes that the journal may reach before a compaction.
        update_files: when the commits in the journal are written to the data files: "when needed" (the
            journal is large, or the store is idle or closed and small), also "at close" of the last
            process, or "after each commit", before it is acknowledged.
        sync_writes: a commit is written to the disk before it is acknowledged.
        backup_enabled, backup_count: keep this number of earlier generations of the file(s).
        feed_bytes: the size of the journals that are kept for change feeds; beyond it, and after the
            retention of the collections, the oldest are removed.
        lock_timeout: seconds to wait for the lock between processes.
        enforce_references: refuse missing parents, and deleting a parent that has children.
    """

    storage_type: Literal["single_file", "split_files"] = "single_file"
    base_path: str = "data"
    filenames: Filenames = msgspec.field(default_factory=Filenames)
    enable_compression: bool = False
    cache_size: Count = 1000
    write_buffer_size: Count = 64000
    update_files: Literal["when needed", "at close", "after each commit"] = "when needed"
    sync_writes: bool = True
    backup_enabled: bool = True
    backup_count: Count = 5
    feed_bytes: Count = 256_000_000
    lock_timeout: Seconds = 30.0
    enforce_references: bool = True

    def path_keys(self) -> tuple[str, ...]:
        return ("base_path",)

    def location(self) -> str:
        """See `StorageConfig.location`."""
        single = self.storage_type == "single_file"
        name = self.filenames.single_file if single else ""
        return f"json:{_file_location(os.path.join(self.base_path, name))}"  # noqa: PTH118

    def files(self, collections: Iterable[str]) -> dict[str, str]:
        """The file of each collection, relative to `base_path`.

        Raises:
            ConfigurationError: two collections have the same split file, for example because one is
                assigned the default name of another.
        """
        if self.storage_type == "single_file":
            return dict.fromkeys(collections, self.filenames.single_file)
        named = self.filenames.split_files
        files = {each: named.get(each, f"{each}.json") for each in collections}
        _refuse_same_file(files, "filenames.split_files.")
        return files


class SQLConfig(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`sql_strategy`. As in the spec, an empty string and port 0 mean "not specified".

    Attributes:
        name: the database; for SQLite the path of its file, or `:memory:`.
        max_streams: the maximum number of streams and snapshots open at once. Each has a connection
            of its own, in addition to those of the pool.
        pool_timeout: seconds to wait for a free connection.
        pool_recycle: seconds after which a connection is replaced.
        timeout: seconds to wait for a lock or a statement.
        enable_query_cache: the statement cache of the driver.
        enforce_references: refuse missing parents, and deleting a parent that has children.
        synchronous: SQLite: with FULL, every commit is on the disk before it is acknowledged. With
            NORMAL, a loss of power may lose the last commits, but never part of a commit.
        isolation: PostgreSQL: the isolation level of transactions and single operations.
        host, port: PostgreSQL: several, separated by commas, are tried in this order; a single port
            applies to all hosts.
        target_session_attrs, load_balance_hosts, connect_timeout, application_name, options,
        sslmode, sslrootcert, sslcert, sslkey, sslpassword, sslcrl, channel_binding, gssencmode:
            PostgreSQL: as in libpq.
        schema: PostgreSQL: the schema of the tables; an empty string: the role's search_path decides.
        table_prefix: what the names of all tables, views and indexes of the store begin with. Stores
            with different prefixes can share a database.
        pgbouncer: PostgreSQL is accessed through a pool that assigns connections per transaction.
        login_provider: `module:function`. The function is called with host, port and user name, and
            returns the password of each new connection; it may be async.
    """

    type: Literal["sqlite", "postgresql"] = "sqlite"
    name: str = ""
    host: str = ""
    port: Port | str = 0
    username: str = ""
    password: Secret | None = None
    pool_size: Count = 5
    max_overflow: Count = 10
    max_streams: AtLeastOne = 32
    pool_timeout: Seconds = 30.0
    pool_recycle: Seconds = 3600.0
    timeout: Seconds = 30.0
    enable_query_cache: bool = True
    enforce_references: bool = True
    table_prefix: str = ""
    synchronous: Literal["FULL", "NORMAL"] = "FULL"
    isolation: Literal["serializable", "repeatable_read", "read_committed"] = "serializable"
    sslmode: Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] = "prefer"
    sslrootcert: str = ""
    sslcert: str = ""
    sslkey: str = ""
    sslpassword: Secret | None = None
    sslcrl: str = ""
    channel_binding: Literal["disable", "prefer", "require"] = "prefer"
    gssencmode: Literal["disable", "prefer", "require"] = "prefer"
    target_session_attrs: Literal[
        "any", "read-write", "read-only", "primary", "standby", "prefer-standby"
    ] = "any"
    load_balance_hosts: Literal["disable", "random"] = "disable"
    connect_timeout: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    schema: str = ""
    application_name: str = ""
    options: str = ""
    pgbouncer: bool = False
    login_provider: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.port, str) and "," not in self.port:
            msgspec.structs.force_setattr(self, "port", _port(self.port))
        super().__post_init__()
        if "@" in self.host:
            raise ConfigurationError("host: expected a host name without a user")
        for key in ("channel_binding", "gssencmode"):
            if getattr(self, key) == "require":
                raise ConfigurationError(
                    f"{key}: 'require' is not supported by the driver; use 'prefer', and sslmode "
                    "'verify-full'"
                )
        self.servers()
        if "\0" in self.table_prefix or re.search(_SURROGATE, self.table_prefix):
            raise ConfigurationError("table_prefix: expected UTF-8 text without U+0000")
        if self.pgbouncer and (self.schema or self.options):
            raise ConfigurationError(
                f"{'schema' if self.schema else 'options'}: not supported with pgbouncer, which does not "
                "keep session settings; use ALTER ROLE ... SET "
                f"{'search_path' if self.schema else '<setting>'} instead"
            )

    def servers(self) -> list[tuple[str, int]]:
        """Host and port of each server, in the order in which they are tried; port 0: not specified.

        Raises:
            ConfigurationError: the numbers of hosts and ports do not agree.
        """
        hosts = self.host.split(",")
        ports = (
            [self.port] if isinstance(self.port, int) else list(map(_port, self.port.split(",")))
        )
        if len(ports) == 1:
            ports *= len(hosts)
        if len(ports) != len(hosts):
            raise ConfigurationError(f"port: {len(ports)} ports for {len(hosts)} hosts")
        return list(zip(hosts, ports, strict=True))

    def path_keys(self) -> tuple[str, ...]:
        database = ("name",) if self.type == "sqlite" and self.name != ":memory:" else ()
        return (*database, "sslrootcert", "sslcert", "sslkey")

    def location(self) -> str:
        """See `StorageConfig.location`."""
        if self.type == "sqlite":
            return f"sqlite:{_file_location(self.name)}{self._part()}"
        servers = ",".join(
            f"{_server(host.lower() or 'localhost')}:{port or 5432}"
            for host, port in self.servers()
        )
        return f"postgresql://{servers}/{_quoted(self.name or self.username)}{self._part()}"

    def _part(self) -> str:
        """The part of the database that is the store, as the query of a URL."""
        return _query({"schema": self.schema, "table_prefix": self.table_prefix})


def _query(named: Mapping[str, str]) -> str:
    """The query of a URL, without empty values."""
    query = "&".join(f"{key}={_quoted(each)}" for key, each in named.items() if each)
    return query and f"?{query}"


def _port(digits: str) -> int:
    """The port number in a string; for an empty one 0, "not specified"."""
    port = int(digits) if digits.isdecimal() and len(digits) < 10 else 0 if digits == "" else None
    if port is None:
        raise ConfigurationError(
            "port: expected a number, or a string of digits (for several servers, separated by commas)"
        )
    checked: int = _checked(port, Port, "port")
    return checked


def _server(host: str) -> str:
    return f"[{host}]" if ":" in host else _quoted(host)


class AutoScaling(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`auto_scaling` as a mapping; `true` means these defaults."""

    enabled: bool = True
    min_read_capacity: AtLeastOne = 1
    max_read_capacity: AtLeastOne = 100
    min_write_capacity: AtLeastOne = 1
    max_write_capacity: AtLeastOne = 100
    target_utilization: Percent = 70

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("read_capacity", "write_capacity"):
            if getattr(self, f"min_{name}") > getattr(self, f"max_{name}"):
                raise ConfigurationError(f"min_{name}: more than max_{name}")


class DynamoDBConfig(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dynamodb_strategy`.

    Attributes:
        region, profile: None: from the AWS environment.
        read_capacity, write_capacity: for `PROVISIONED` tables.
        enable_dax, dax_endpoint: reads that need not be consistent are sent to this DAX cluster.
        consistent_reads: reads by key, table queries and scans are strongly consistent.
        point_in_time_recovery: enabled for the tables that the store creates.
        allow_scan: a query that no key or index can answer reads the whole table; otherwise it is
            rejected.
        endpoint_url: a server other than the endpoint of the region.
        connect_timeout, read_timeout: seconds for one request.
        retry_timeout: seconds for which throttled or failed requests are retried.
        max_pool_connections: the maximum number of requests in progress at once.
        max_clock_skew: by how many seconds the clocks of the programs may differ: holders of claims stop
            that much earlier.
    """

    _urls = ("dax_endpoint", "endpoint_url")

    region: str | None = None
    profile: str | None = None
    table_prefix: str = "hostfactory"
    read_capacity: Count = 5
    write_capacity: Count = 5
    billing_mode: Literal["PAY_PER_REQUEST", "PROVISIONED"] = "PAY_PER_REQUEST"
    auto_scaling: bool | AutoScaling = False
    enable_dax: bool = False
    dax_endpoint: str | None = None
    consistent_reads: bool = True
    point_in_time_recovery: bool = False
    allow_scan: bool = True
    endpoint_url: str | None = None
    connect_timeout: Seconds = 5.0
    read_timeout: Seconds = 10.0
    retry_timeout: Seconds = 30.0
    max_pool_connections: AtLeastOne = 32
    max_clock_skew: Annotated[float, msgspec.Meta(ge=0)] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.endpoint_url is not None and not re.match(_ENDPOINT, self.endpoint_url):
            raise ConfigurationError("endpoint_url: expected http://HOST:PORT or https://HOST:PORT")

    @property
    def endpoint(self) -> str | None:
        """`endpoint_url` without user and password, which cannot be sent in a request to AWS."""
        if self.endpoint_url is None:
            return None
        scheme, _, rest = self.endpoint_url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    def location(self) -> str:
        """See `StorageConfig.location`."""
        if self.region is None:
            raise ConfigurationError(
                "region: required, because other processes must be able to open the store by its URL"
            )
        url = f"dynamodb://{_quoted(self.region)}/{_quoted(self.table_prefix)}"
        if self.endpoint is None:
            return url
        server = self.endpoint.partition("?")[0].rstrip("/").lower()
        return f"{url}?endpoint_url={_quoted(server)}"


class MemoryConfig(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`memory_strategy`.

    Attributes:
        enforce_references: refuse missing parents, and deleting a parent that has children.
    """

    enforce_references: bool = True

    def location(self) -> str:
        """See `StorageConfig.location`."""
        return "memory:"  # other processes cannot open it, and it cannot be migrated live


class MigrationConfig(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`migration`: how entities are copied from one store to another.

    Attributes:
        backup_location: a folder if it ends in `/` or exists as one, else a file.
    """

    batch_size: AtLeastOne = 1000
    create_backup: bool = True
    backup_location: str = "backups/"
    validate_after_migration: bool = True
    cleanup_source: bool = False
    parallel_workers: AtLeastOne = 4


# The form of `endpoint_url`. A user and a password in it may contain any character.
_ENDPOINT: Final = (
    r"(?is)https?://(?:.*@)?(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d+)?(?:[/?][^@\s]*)?\Z"
)

StrategyConfig: TypeAlias = JSONConfig | SQLConfig | DynamoDBConfig | MemoryConfig
if TYPE_CHECKING:
    Options: TypeAlias = StrategyConfig | Mapping[str, Value]
else:  # without a module for the type of values, which only `help` would use
    Options = StrategyConfig | Mapping[str, object]
"""The configuration of a strategy: a model, or the plain mapping of a third-party one."""

_SIMILAR_NAME: Final = 0.8
"""By less, `sqlite:` or `sql` would be taken for what `mysql:` or `mysql` means."""
_INSTALLED_WITH: Final = "an engine of another package is known once that package is installed"
_MODELS: Final[Mapping[str, type[StrategyConfig]]] = {
    "json": JSONConfig,
    "sql": SQLConfig,
    "dynamodb": DynamoDBConfig,
    "memory": MemoryConfig,
}


_BLOCKS: Final = tuple(f"{each}_strategy" for each in _MODELS)


class StorageConfig(_RedactedRepr, frozen=True, kw_only=True):
    """A whole configuration.

    Attributes:
        strategy: json, sql, dynamodb, memory, or the registered name of a third-party strategy. An
            empty string if there was only a `migration` block: then only a migration can use it.
        options: the configuration of that strategy.
        others: the configurations of other strategies from the same source, by name.
        migration: the `migration` block, or its defaults.
        follow_moves: the stores to which a program with this configuration follows a live migration,
            with the configurations by which it opens them. The location that a store records for a
            migration only selects one of these.
        collections: `module:name` of the declared collections, for the command line; None: those that
            the store remembers.

    Raises:
        ConfigurationError: `options` that belong to another strategy.
    """

    strategy: str
    options: Options
    others: Mapping[str, Options] = msgspec.field(default_factory=dict)
    migration: MigrationConfig = msgspec.field(default_factory=MigrationConfig)
    follow_moves: tuple[StorageConfig, ...] = ()
    collections: str | None = None

    def __post_init__(self) -> None:
        for name, options in ((self.strategy, self.options), *self.others.items()):
            model = _MODELS.get(name, Mapping)
            if not isinstance(options, model):
                raise ConfigurationError(
                    f"{name}: expected options of type {model.__name__}, got {_type_name(options)}"
                )

    def location(self) -> str:
        """The location of the store: a URL in canonical form, without secrets, to compare and to show.

        Of a third-party strategy, it contains the URL and the settings in `LOCATION_KEYS`. A live migration
        does not rely on it alone: a store is followed to only if it has a record of the migration.

        Raises:
            ConfigurationError: the configuration does not define a location for other processes.
        """
        if not isinstance(self.options, Mapping):
            return self.options.location()
        url = self.options.get("url")
        if not isinstance(url, str):
            raise ConfigurationError(
                f"{self.strategy}: required as a URL, by which other processes can open the store"
            )
        scheme, _, body = url.partition("?")[0].partition(":")
        user, at, rest = body.rpartition("@")
        part = _query(
            {each: redact_url(str(self.options.get(each) or "")) for each in LOCATION_KEYS}
        )
        return f"{scheme}:{'//' if at and user.startswith('//') else ''}{_quoted_path(rest)}{part}"

    def block(self, name: str) -> Options:
        """The configuration of a strategy: the selected one, or one of `others`.

        Raises:
            ConfigurationError: there is none; the message lists the configured ones.
        """
        if name == self.strategy:
            return self.options
        if name not in self.others:
            configured = ", ".join((self.strategy, *self.others))
            raise ConfigurationError(
                f"the configuration has no block for {name!r}; it has: {configured}"
            )
        return self.others[name]


ConfigSource: TypeAlias = (
    "StorageConfig | StrategyConfig | Mapping[str, object] | str | os.PathLike[str]"
)
"""The types that `load_config` accepts."""

# -- loading --------------------------------------------------------------------------------


def load_config(source: ConfigSource) -> StorageConfig:
    """Load a configuration.

    Args:
        source: one of
            * a `StorageConfig`, returned unchanged, or the model of one strategy;
            * a mapping with the structure of the spec,
              `{"storage": {"strategy": ..., "json_strategy": ...}}`, or only the value of its
              `storage`. `strategy` may be omitted if there is exactly one strategy block, and a
              block if its defaults suffice. In addition to `storage`, the mapping may contain
              `migration`, and any other keys of an application. Null means the default. A mapping
              with `migration` alone gives a configuration that only a migration can use;
            * the path of a JSON file that contains such a mapping: a `Path`, or any string that
              does not begin with a known scheme;
            * a URL: `json:PATH` (one file if PATH ends in `.json`, else a folder of split files),
              `sqlite:PATH`, `postgresql://USER:PASSWORD@HOST:PORT/NAME`,
              `dynamodb://REGION/PREFIX`, `memory:`, or the registered name of a third-party
              strategy as the scheme. The query sets any key of the strategy's configuration, a
              nested one with dots: `?sync_writes=no&auto_scaling.enabled=true`; booleans are
              true/false, yes/no, 1/0. `follow_moves` may be repeated. `%XX` is decoded in all
              components, and `+` is a literal plus sign.

    Raises:
        ConfigurationError: names the path of the invalid key and what is expected there.
    """
    return _load(source, follows=True)


def _load(source: ConfigSource, *, follows: bool) -> StorageConfig:
    """See `load_config`.

    Args:
        follows: False: `follow_moves` is ignored, because `source` is itself an entry of one, and
            two configurations may refer to each other.
    """
    if isinstance(source, StorageConfig):
        return source
    if isinstance(source, Mapping):
        return _from_mapping(source, follows=follows)
    if source == "":
        raise ConfigurationError("a configuration is a mapping, a path or a URL, not an empty text")
    if isinstance(source, str):
        scheme = _scheme(source)
        if scheme is None:
            return _from_file(source, follows=follows)
        return _from_url(scheme, source, follows=follows)
    if isinstance(source, os.PathLike):
        return _from_file(os.fsdecode(source), follows=follows)
    for name, model in _MODELS.items():
        if isinstance(source, model):
            return StorageConfig(strategy=name, options=source)
    raise ConfigurationError(
        f"a configuration is a mapping, a path or a URL, not {_type_name(source)}"
    )


def permitted_moves(source: object, path: str = FOLLOW_MOVES) -> tuple[StorageConfig, ...]:
    """Load a `follow_moves`: a list of sources as `load_config` accepts them.

    Raises:
        ConfigurationError: names the path of the invalid entry.
    """
    if source is None:
        return ()
    if not isinstance(source, list | tuple):
        raise ConfigurationError(f"{path}: expected array, got {_type_name(source)}")
    loaded: list[StorageConfig] = []
    for number, each in enumerate(source):
        with _error_prefix(f"{path}[{number}]: "):
            loaded.append(_load(each, follows=False))
            loaded[-1].location()  # without a location, the entry would never match
    return tuple(loaded)


ModelT = TypeVar("ModelT", bound=_Model)


def strategy_config(source: ConfigSource, model: type[ModelT]) -> ModelT:
    """The configuration of the one strategy whose model is `model`.

    Raises:
        ConfigurationError: as in `load_config`, or `source` selects another strategy.
    """
    loaded = load_config(source)
    if not isinstance(loaded.options, model):
        raise ConfigurationError(
            f"a {model.__name__} is required; this configures the strategy {loaded.strategy!r}"
            if loaded.strategy
            else NO_STRATEGY
        )
    return loaded.options


OptionsT = TypeVar("OptionsT", bound=StrategyOptions)


def options_of(config: StorageConfig, model: type[OptionsT]) -> OptionsT:
    """The typed configuration of a third-party strategy.

    Its values come from a file, a dict or the query of a URL, so strings are converted to the types of
    the keys: `?pool=5` is an integer, and `?fast=true` a boolean.

    Raises:
        ConfigurationError: a key is unknown, or a value has another type; names its path.
    """
    path = f"{config.strategy}_strategy"
    kinds = _kinds(model)
    return _model(
        model,
        {
            name: _typed(_ExternalString(each), kinds[name])
            if isinstance(each, str) and name in kinds
            else each
            for name, each in _mapping(config.options, path).items()
        },
        path,
    )


def anchored(config: StorageConfig) -> StorageConfig:
    """The configuration with relative paths made absolute, so that a later change of the working
    directory has no effect.

    Raises:
        ConfigurationError: as in `absolute`.
    """
    options = config.options
    if not isinstance(options, Mapping):
        paths = {name: path for name in options.path_keys() if (path := getattr(options, name))}
        changed = {name: absolute(path) for name, path in paths.items()}
        options = msgspec.structs.replace(options, **changed)
    permitted = tuple(anchored(each) for each in config.follow_moves)
    return msgspec.structs.replace(config, options=options, follow_moves=permitted)


def absolute(path: str) -> str:
    """The absolute path; a trailing `/` is kept.

    Raises:
        ConfigurationError: it is relative, and the working directory does not exist.
    """
    if os.path.isabs(path):  # noqa: PTH117  # a string, kept unchanged
        return path
    try:
        return os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118
    except OSError as exc:
        raise ConfigurationError(
            f"the path {path!r} is relative, and the working directory cannot be read"
        ) from exc


def _file_location(path: str) -> str:
    """The canonical path of a file or folder, as the path of a URL."""
    return _quoted_path(os.path.realpath(absolute(path)))


def load_migration(source: MigrationConfig | ConfigSource) -> MigrationConfig:
    """Load the `migration` block from any source that `load_config` accepts.

    A mapping may also be the value of the block alone.

    Raises:
        ConfigurationError: names the path of the invalid key.
    """
    if isinstance(source, MigrationConfig):
        return source
    if isinstance(source, Mapping) and not _is_config(source):
        return _model(MigrationConfig, source, "")
    return load_config(source).migration


def _is_config(data: Mapping[Any, object]) -> bool:
    return any(
        each in ("storage", "strategy", "migration") or str(each).endswith("_strategy")
        for each in data
    )


def _from_mapping(source: Mapping[str, object], *, follows: bool = True) -> StorageConfig:
    if "storage" in source:
        # Other keys belong to the application, but a misplaced block of a strategy is an error.
        for name in source:
            if name in _BLOCKS or name == FOLLOW_MOVES:
                raise ConfigurationError(f"{name}: belongs inside storage")
        path = "storage"
        storage = _mapping(source["storage"], path)
    else:
        path = ""
        storage = {name: each for name, each in source.items() if name != "migration"}
    _refuse_unknown(storage, _storage_keys(storage, path), path)
    blocks: dict[str, Options] = {
        name.removesuffix("_strategy"): _options(
            name, {} if block is None else block, _at(path, name)
        )
        for name, block in storage.items()
        if name not in ("strategy", FOLLOW_MOVES, COLLECTIONS)
    }
    migration = source.get("migration")
    config = _model(MigrationConfig, {} if migration is None else migration, "migration")
    if storage.get("strategy") is None and not blocks and path == "" and "migration" in source:
        _refuse_unknown(storage, (), path)
        return StorageConfig(strategy="", options={}, migration=config)
    strategy = _selected_strategy(storage, list(blocks), path)
    options = (
        blocks.pop(strategy) if strategy in blocks else _options(f"{strategy}_strategy", {}, "")
    )
    return StorageConfig(
        strategy=strategy,
        options=options,
        others=blocks,
        migration=config,
        follow_moves=permitted_moves(storage.get(FOLLOW_MOVES), _at(path, FOLLOW_MOVES))
        if follows
        else (),
        collections=_collections_of(storage.get(COLLECTIONS), _at(path, COLLECTIONS)),
    )


def _collections_of(value: object, path: str) -> str | None:
    if value is None or (isinstance(value, str) and all(value.partition(":"))):
        return value
    raise ConfigurationError(f"{path}: expected the text MODULE:NAME, got {_type_name(value)}")


def _storage_keys(storage: Mapping[str, object], path: str) -> list[str]:
    """The keys that are allowed in `storage`."""
    known = ["strategy", *_BLOCKS, FOLLOW_MOVES, COLLECTIONS]
    if not storage.keys() <= set(known):
        known += [f"{name}_strategy" for name in _registered()]
        if path == "":
            known += ["storage", "migration"]
    return known


def _selected_strategy(storage: Mapping[str, object], blocks: list[str], parent: str) -> str:
    """The name of the strategy that `storage` selects; `parent` is the path of `storage`."""
    path = _at(parent, "strategy")
    name = storage.get("strategy")
    if name is None:
        if len(blocks) == 1:
            return blocks[0]
        reason = f"there are blocks for {', '.join(blocks)}" if blocks else "no strategy is named"
        raise ConfigurationError(f"{path}: required, because {reason}")
    if not isinstance(name, str):
        raise ConfigurationError(f"{path}: expected string, got {_type_name(name)}")
    name = str(_expand(name, path))
    if name not in _MODELS:
        known = [*_MODELS, *_registered()]
        if name not in known:
            raise ConfigurationError(
                f"{path}: unknown strategy ({_known(name, known, _SIMILAR_NAME)}); {_INSTALLED_WITH}"
            )
    return name


def _options(key: str, block: object, path: str) -> Options:
    """The configuration in the block with this key."""
    model = _MODELS.get(key.removesuffix("_strategy"))
    if model is None:
        plain: Mapping[str, Value] = _plain(_mapping(block, path), path)
        return plain
    return _model(model, block, path)


def _registered() -> list[str]:
    """The names of the third-party strategies. They are read only for a name that is not built in."""
    from importlib.metadata import entry_points

    names = {each.name for each in entry_points(group=STRATEGY_GROUP)}
    return sorted(names - _MODELS.keys())


# -- one block ------------------------------------------------------------------------------


def _model(model: type[ModelT], data: object, path: str) -> ModelT:
    """Validate a loaded block and convert it to its model."""
    if isinstance(data, model):
        return data
    block = _mapping(data, path)
    kinds = _kinds(model)
    _refuse_unknown(block, kinds, path)
    values: dict[str, object] = {}
    for name, value in block.items():
        if value is None:
            continue  # the default
        inner = _at(path, name)
        nested_model = _nested_model(kinds[name])
        if nested_model is not None and isinstance(value, Mapping):
            values[name] = _model(nested_model, value, inner)
        else:
            values[name] = _setting(value, kinds[name], inner)
    with _error_prefix(f"{path}." if path else ""):
        return model(**values)


def _nested_model(kind: Any) -> type[_Model] | None:
    """The model of a mapping, if the value of a key may be one."""
    kinds = [each for each in (kind, *get_args(kind)) if isinstance(each, type)]
    return next((each for each in kinds if issubclass(each, _Model)), None)


def _setting(value: object, kind: Any, path: str) -> object:
    """A value with its variables expanded, in a form that can be validated against its type."""
    if isinstance(value, Mapping):
        return {
            name: _setting(each, str, _at(path, name))
            for name, each in value.items()
            if each is not None
        }
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, str):
        return value
    expanded = _expand(value, path)
    if Secret in get_args(kind):
        return Secret(str(expanded))
    return _typed(expanded, kind) if isinstance(expanded, _ExternalString) else expanded


_BOOLEANS: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _boolean(word: str) -> bool:
    if word.lower() not in _BOOLEANS:
        raise ValueError
    return _BOOLEANS[word.lower()]


def _typed(string: _ExternalString, kind: Any) -> object:
    """The string converted to a type that `kind` accepts.

    If there is none, the first successful conversion other than to `str`, so that the later
    validation reports the most specific error.
    """
    parsers: tuple[Callable[[str], object], ...] = (str, int, float, _boolean)
    rejected: list[object] = []
    for parse in parsers:
        try:
            value = parse(string)
        except ValueError:
            continue
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError:
            rejected.append(value)
        else:
            return value
    return rejected[1] if len(rejected) > 1 else rejected[0]


@cache
def _kinds(model: type[_Model]) -> dict[str, Any]:
    """The keys of a model and their types."""
    return {each.name: each.type for each in msgspec.structs.fields(model)}


def _checked(value: object, kind: Any, path: str) -> Any:
    """The validated value; an integer is converted where a float is expected."""
    try:
        converted = msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        problem = _expected(str(exc), kind, value)
    else:
        if isinstance(converted, str) and "\x00" in converted:
            problem = "string with U+0000"
        elif isinstance(converted, str) and re.search(_LONE_SURROGATE, converted):
            problem = "string with a lone surrogate"
        elif isinstance(converted, float) and not isfinite(converted):
            problem = "expected a finite number"
        else:
            return converted
    raise ConfigurationError(f"{path}: {problem}")


_TYPE_NAMES: Final = {
    "Secret": "string",
    "bool": "boolean",
    "dict": "object",
    "float": "number",
    "int": "integer",
    "list": "array",
    "NoneType": "null",
    "str": "string",
    "tuple": "array",
}
"""The types in terms of JSON. An object of another type keeps the name of its class."""


def _expected(message: str, kind: Any, value: object) -> str:
    """An error message of msgspec, in terms of the configuration and without the value."""
    if get_origin(kind) is Literal:
        return "expected " + " or ".join(map(repr, get_args(kind)))
    if kind is bool:
        return f"expected true or false (in a URL also yes or no), got {_type_name(value)}"
    message = message.partition(" - at ")[0].replace("`", "")
    message = re.sub(r"\w+", lambda word: _TYPE_NAMES.get(word[0], word[0]), message)
    return message[0].lower() + message[1:]


def _check_filename(path: str, name: object) -> None:
    if not isinstance(name, str):
        raise ConfigurationError(f"{path}: expected string, got {_type_name(name)}")
    if name in ("", ".", "..") or "/" in name or "\x00" in name:
        raise ConfigurationError(
            f"{path}: expected a relative file name inside base_path, without a folder"
        )


def _refuse_same_file(files: Mapping[str, str], path: str) -> None:
    """Reject two collections in the same file: they would overwrite each other."""
    seen: dict[str, str] = {}
    for collection, name in files.items():
        # Normalised, because `./a.json` is a.json, `A.json` is the same file on the file systems of
        # macOS, and with compression a.json is stored in a.json.gz.
        normalised = "/".join(each for each in name.split("/") if each not in ("", "."))
        other = seen.setdefault(normalised.casefold().removesuffix(".gz"), collection)
        if other != collection:
            raise ConfigurationError(
                f"{path}{collection}: {other} and {collection} have the same file name; give each its "
                "own"
            )


def _plain(value: object, path: str) -> Any:
    """A copy of a third-party block with its variables expanded."""
    if isinstance(value, Mapping):
        return {name: _plain(each, _at(path, name)) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, f"{path}[{index}]") for index, each in enumerate(value)]
    if isinstance(value, str):
        return str(_expand(value, path))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


# -- paths and unknown keys -----------------------------------------------------------------


def _at(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


@contextmanager
def _error_prefix(prefix: str) -> Iterator[None]:
    """Prefix the messages of errors raised in the body, to name the path of the key."""
    try:
        yield
    except ConfigurationError as exc:
        raise ConfigurationError(f"{prefix}{exc}") from exc.__cause__


def _type_name(value: object) -> str:
    name = type(value).__name__
    return _TYPE_NAMES.get(name, name)


def _mapping(data: object, path: str) -> Mapping[str, object]:
    if not isinstance(data, Mapping):
        where = path or "configuration"
        raise ConfigurationError(f"{where}: expected object, got {_type_name(data)}")
    return data


def _refuse_unknown(data: Mapping[str, object], known: Iterable[str], path: str) -> None:
    names = list(known)
    for key in data:
        if key not in names:
            raise ConfigurationError(f"{_at(path, key)}: unknown key ({_known(key, names)})")


def _known(name: str, names: list[str], similarity: float = 0.6) -> str:
    """`known: a, b; did you mean 'a'?`"""
    from difflib import get_close_matches

    close = get_close_matches(str(name).lower(), names, n=1, cutoff=similarity)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"known: {', '.join(names) or 'none'}{hint}"


# -- environment ----------------------------------------------------------------------------

# These patterns are strings, because most programs never use them: `re` compiles and caches them at
# their first use.
_REFERENCE: Final = r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?"
# Without U+DC80 to U+DCFF, by which Python represents the bytes of file names that are not UTF-8.
_LONE_SURROGATE: Final = "[\ud800-\udc7f\udd00-\udfff]"
_SURROGATE: Final = "[\ud800-\udfff]"


def _expand(string: str, path: str, encode: Callable[[str], str] = str) -> str:
    """The string with its variables replaced; an `_ExternalString` if it contained any.

    Args:
        encode: is applied to each inserted value.

    Raises:
        ConfigurationError: names the variable and the path of the key.
    """
    if isinstance(string, _ExternalString) or "${" not in string:
        return string

    def replaced(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        if match[1] is None:
            raise ConfigurationError(
                f"{path}: '${{' must begin ${{NAME}} or ${{NAME:-default}} "
                "(write '$${' for a literal '${')"
            )
        value = os.environ.get(match[1])
        if match[2] is not None:
            value = value or match[2]
        if value is None:
            raise ConfigurationError(f"{path}: the environment variable {match[1]} is not set")
        if re.search(_SURROGATE, value):
            raise ConfigurationError(f"{path}: the environment variable {match[1]} is not UTF-8")
        return encode(value)

    return _ExternalString(re.sub(_REFERENCE, replaced, string))


# -- files ----------------------------------------------------------------------------------

_SQLITE_HEADER: Final = b"SQLite format 3\0"


def _from_file(path: str, *, follows: bool = True) -> StorageConfig:
    content = _read(path)
    if content.startswith(_SQLITE_HEADER):
        raise ConfigurationError(
            f"{path!r} is a SQLite file, not a configuration file; did you mean 'sqlite:{path}'?"
        )
    data, problem = decode_json(content, path)
    if problem is not None:
        raise ConfigurationError(
            f"{problem}; a configuration file is in JSON, not in YAML or TOML; a URL such as "
            "'sqlite:jobs.db' needs no file"
        )
    with _error_prefix(f"{path}: "):
        if isinstance(data, Mapping) and not _is_config(data):
            raise ConfigurationError(
                "not a configuration: it has no key 'storage'; "
                f"for a store in this file, did you mean 'json:{path}'?"
            )
        return _from_mapping(_mapping(data, ""), follows=follows)


def _read(path: str) -> bytes:
    from pathlib import Path

    try:
        return Path(path).read_bytes()
    except IsADirectoryError as exc:
        raise ConfigurationError(
            f"{path!r} is a folder, not a configuration file; did you mean 'json:{path}'?"
        ) from exc
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass
    except OSError as exc:
        if exc.errno != errno.ENAMETOOLONG:
            raise ConfigurationError(
                f"cannot read the configuration file {path!r}: {exc.strerror}"
            ) from exc
    # Raised outside the handler: the error of the operating system, which would be attached as the
    # context, shows the path, and that may be a URL with a password.
    raise _missing_file(path)


# -- URLs -----------------------------------------------------------------------------------

_SCHEME: Final = r"([A-Za-z][A-Za-z0-9+._-]*):"


def _scheme(source: str) -> str | None:
    """The scheme of a URL; None if the string does not begin with a known scheme: then it is a path."""
    match = re.match(_SCHEME, source)
    if match is None:
        return None
    scheme = match[1].lower()
    return scheme if scheme in _URLS or scheme in _registered() else None


def _missing_file(path: str) -> ConfigurationError:
    match = re.match(_SCHEME, path)
    if match is None and path not in _URLS:
        shown = redact_url(path)
        return ConfigurationError(
            f"no such configuration file {shown!r}; did you mean 'json:{shown}'?"
        )
    # It may be a URL with a mistyped scheme and a password anywhere, so only the scheme is shown.
    shown = path if match is None else f"{match[0]}..."
    schemes = [f"{each}:" for each in (*_URLS, *_registered())]
    known = _known(shown.removesuffix("..."), schemes, _SIMILAR_NAME)
    return ConfigurationError(
        f"no such configuration file {shown!r}, and not a URL of a known scheme ({known}); "
        f"{_INSTALLED_WITH}"
    )


def _from_url(scheme: str, url: str, *, follows: bool = True) -> StorageConfig:
    # Variables in a nested URL are replaced when that is loaded: otherwise they would be decoded twice.
    moves = re.findall(_FOLLOW, url)
    rest = _expand(re.sub(_FOLLOW, r"\1", url), f"{scheme}: URL", _quoted)[len(scheme) + 1 :]
    body, _, query = rest.partition("?")
    with _error_prefix(f"{scheme}: URL: "):
        permitted = permitted_moves([_unquoted(each) for _, each in moves]) if follows else ()
        if scheme not in _URLS:
            settings = {"url": f"{scheme}:{body}"}
            _add_query(settings, query)
            return StorageConfig(strategy=scheme, options=settings, follow_moves=permitted)
        strategy, parse = _URLS[scheme]
        settings = {name: each for name, each in parse(body).items() if each}
        if scheme == "postgresql" and "@" in query:
            # The `?` may be part of a password, which an error about an invalid key would show.
            raise _unencoded()
        _add_query(settings, query)
        block = _options(f"{strategy}_strategy", _nested(settings), "")
    return StorageConfig(strategy=strategy, options=block, follow_moves=permitted)


def _json_url(body: str) -> dict[str, str]:
    path = _file_path(body, "json")
    if not path.endswith(".json"):
        return {"storage_type": "split_files", "base_path": path}
    folder, slash, name = path.rpartition("/")
    return {
        "storage_type": "single_file",
        "base_path": folder or slash or ".",
        "filenames.single_file": name,
    }


def _sqlite_url(body: str) -> dict[str, str]:
    return {"type": "sqlite", "name": _file_path(body, "sqlite")}


def _postgresql_url(body: str) -> dict[str, str]:
    authority, name = _authority(body, "postgresql://USER:PASSWORD@HOST:PORT/NAME")
    user, _, locations = authority.rpartition("@")
    if "@" in name or "/" in name:
        raise _unencoded()
    username, _, password = user.partition(":")
    servers = [_host_and_port(each) for each in locations.split(",")]
    host, port = (",".join(each) for each in zip(*servers, strict=True))
    port = port if port.strip(",") else ""
    named = {"username": username, "password": password, "host": host, "port": port, "name": name}
    return {"type": "postgresql"} | {key: _unquoted(each) for key, each in named.items()}


def _host_and_port(server: str) -> tuple[str, str]:
    if server.startswith("["):
        host, _, port = server[1:].partition("]")
        return host, port.removeprefix(":")
    host, _, port = server.partition(":")
    return host, port


def _dynamodb_url(body: str) -> dict[str, str]:
    region, prefix = _authority(body, "dynamodb://REGION/PREFIX")
    if "@" in body or ":" in region:
        raise ConfigurationError("dynamodb://REGION/PREFIX takes no user, password or port")
    return {"region": _unquoted(region), "table_prefix": _unquoted(prefix)}


def _memory_url(body: str) -> dict[str, str]:
    if body not in ("", "//"):
        raise ConfigurationError("only a query may follow memory:")
    return {}


_URLS: Final[Mapping[str, tuple[str, Callable[[str], dict[str, str]]]]] = {
    "json": ("json", _json_url),
    "sqlite": ("sql", _sqlite_url),
    "postgresql": ("sql", _postgresql_url),
    "dynamodb": ("dynamodb", _dynamodb_url),
    "memory": ("memory", _memory_url),
}
"""By scheme: the strategy, and the function that converts the URL before the query to settings."""


def _file_path(body: str, scheme: str) -> str:
    # After `//`, a URL has a host; and in SQLAlchemy three slashes begin a relative path.
    if body == "" or body.startswith("//"):
        raise ConfigurationError(
            f"expected {scheme}:PATH, where a PATH that begins with one / is absolute"
        )
    return _unquoted(body)


def _authority(body: str, form: str) -> tuple[str, str]:
    if not body.startswith("//"):
        raise ConfigurationError(f"expected {form}")
    authority, _, path = body[2:].partition("/")
    return authority, path


def _unencoded() -> ConfigurationError:
    return ConfigurationError(
        "@ : / ? and % in the user, password and name must be percent-encoded, and @ in the query"
    )


_FOLLOW: Final = rf"([?&]){FOLLOW_MOVES}=([^&]*)"
_QUERY_KEY: Final = r"[A-Za-z_][\w.-]*\Z"


def _add_query(settings: dict[str, str], query: str) -> None:
    """Add the settings in the query of a URL."""
    for pair in filter(None, query.split("&")):
        key, _, value = pair.partition("=")
        key = _unquoted(key)
        if not re.match(_QUERY_KEY, key):
            raise ConfigurationError("expected key=value pairs after the ?")
        if key in settings:
            raise ConfigurationError(f"{key}: specified twice")
        settings[key] = _unquoted(value)


def _nested(settings: Mapping[str, str]) -> dict[str, object]:
    """`{"a.b": value}` as `{"a": {"b": value}}`, with each value as an `_ExternalString`."""
    nested: dict[str, Any] = {}
    for path, value in settings.items():
        *outer, last = path.split(".")
        inner: Any = nested
        for name in outer:
            inner = inner.setdefault(name, {}) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last in inner:
            raise ConfigurationError(f"{path}: specified twice")
        inner[last] = _ExternalString(value)
    return nested


def _quoted(string: str, safe: str = "") -> str:
    from urllib.parse import quote

    return quote(string, safe=safe, errors="surrogateescape")


def _quoted_path(path: str) -> str:
    return _quoted(path, safe="/:")


def _unquoted(string: str) -> str:
    if "%" not in string:
        return string
    from urllib.parse import unquote

    decoded = unquote(string)
    if "\ufffd" in decoded and "\ufffd" not in string and "%EF%BF%BD" not in string.upper():
        raise ConfigurationError("the percent-encoded bytes are not UTF-8")
    return decoded


# -- redaction ------------------------------------------------------------------------------


def redacted(
    config: StorageConfig | StrategyConfig | MigrationConfig | Mapping[str, object],
) -> dict[str, Value]:
    """A configuration as plain data that may be shown; a `StorageConfig` with the spec's structure.

    Secrets, the values of keys whose name suggests a secret, and passwords in URLs are hidden.
    """
    if isinstance(config, StorageConfig):
        blocks = {config.strategy: config.options, **config.others}
        storage: dict[str, object] = {"strategy": config.strategy}
        storage |= {f"{name}_strategy": options for name, options in blocks.items()}
        if config.follow_moves:
            storage[FOLLOW_MOVES] = [redacted(each)["storage"] for each in config.follow_moves]
        if config.collections is not None:
            storage[COLLECTIONS] = config.collections
        config = {"storage": storage, "migration": config.migration}
    return _redact_all(config)


def _redact_all(values: _RedactedRepr | Mapping[str, object]) -> dict[str, Value]:
    if isinstance(values, _RedactedRepr):
        values = {each: getattr(values, each) for each in values.__struct_fields__}
    return {str(name): _redact(str(name), each) for name, each in values.items()}


def _redact(name: str, value: object) -> Value:
    if isinstance(value, Secret):
        return REDACTED
    if value is None or isinstance(value, bool):
        return value
    if is_sensitive(name):
        return REDACTED
    if isinstance(value, _RedactedRepr | Mapping):
        return _redact_all(value)
    if isinstance(value, list | tuple):
        return [_redact("", each) for each in value]
    if isinstance(value, str):
        return redact_url(value) if re.match(_SCHEME, value) else redact_text(value)
    return value if isinstance(value, int | float) else str(value)
