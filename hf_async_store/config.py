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
    cast,
    get_args,
    get_origin,
)

import msgspec

from hf_async_store.errors import ConfigurationError
from hf_async_store.redaction import REDACTED, is_sensitive, redact_text, redact_url

if TYPE_CHECKING:
    from hf_async_store.values import Value

FOLLOW_MOVES: Final = "follow_moves"

NO_STRATEGY: Final = "strategy: required, because no strategy is named"

STRATEGY_GROUP: Final = "hf_async_store.strategies"
"""The entry-point group under which other packages register a strategy by name."""

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
AtLeastOne: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
Port: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Percent: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=100)]


class Secret:
    """A string that is never shown: `str`, `repr` and formatting give `***`. False if it is empty."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The string itself."""
        return self._text

    def __repr__(self) -> str:
        return repr(REDACTED)

    def __str__(self) -> str:
        return REDACTED

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        return hash((Secret, self._text))


class _Text(str):
    """A string from a URL or the environment: not expanded again, converted to the type of its key."""

    __slots__ = ()


# -- the models -----------------------------------------------------------------------------


class _Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A struct whose `repr` (also that of rich) hides secrets, even in plain mappings."""

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({fields})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, _redact(name, getattr(self, name))) for name in self.__struct_fields__]


class _Model(_Shown, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A block of the configuration, also validated if it is created in Python.

    Raises:
        ConfigurationError: a value has the wrong type or is out of range; names its path.
    """

    _parts: ClassVar[Mapping[str, type[_Model]]] = {}
    """The keys whose value may be a mapping, and its model."""

    _urls: ClassVar[tuple[str, ...]] = ()
    """The keys whose value is a URL."""

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            value = _checked(getattr(self, name), kind, name)
            msgspec.structs.force_setattr(self, name, value)
            if isinstance(value, str) and "://" in value and name not in self._urls:
                # It may hold a password, and would become the name of a file, a user or a table.
                raise ConfigurationError(f"{name}: a URL is not expected here")

    def path_keys(self) -> tuple[str, ...]:
        """The keys whose value is a local path."""
        return ()


class Filenames(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the JSON strategy keeps what, relative to `base_path` and inside it.

    Attributes:
        single_file: the one file of `single_file` storage.
        split_files: the file of each collection; one that is not named has `NAME.json`.
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
        enable_compression: gzip, at `NAME.gz`.
        cache_size: how many decoded entities queries may keep; 0 keeps none.
        write_buffer_size: how many bytes of journal may gather before a fold.
        sync_writes: a commit is on the disk before it is acknowledged.
        backup_enabled, backup_count: keep that many older generations of the file(s).
        lock_timeout: seconds to wait for the lock between processes.
        enforce_references: refuse missing parents, and deleting a parent that has children.
    """

    _parts = {"filenames": Filenames}

    storage_type: Literal["single_file", "split_files"] = "single_file"
    base_path: str = "data"
    filenames: Filenames = msgspec.field(default_factory=Filenames)
    enable_compression: bool = False
    cache_size: Count = 1000
    write_buffer_size: Count = 64000
    sync_writes: bool = True
    backup_enabled: bool = True
    backup_count: Count = 5
    lock_timeout: Seconds = 30.0
    enforce_references: bool = True

    def path_keys(self) -> tuple[str, ...]:
        return ("base_path",)

    def place(self) -> str:
        """See `StorageConfig.place`."""
        single = self.storage_type == "single_file"
        name = self.filenames.single_file if single else ""
        return f"json:{_place_of_file(os.path.join(self.base_path, name))}"  # noqa: PTH118

    def files(self, collections: Iterable[str]) -> dict[str, str]:
        """The file of each collection, relative to `base_path`.

        Raises:
            ConfigurationError: two collections would share a file of their own, as when one is
                given the `NAME.json` of another that is not named.
        """
        if self.storage_type == "single_file":
            return dict.fromkeys(collections, self.filenames.single_file)
        named = self.filenames.split_files
        files = {each: named.get(each, f"{each}.json") for each in collections}
        _refuse_same_file(files, "filenames.split_files.")
        return files


class SQLConfig(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`sql_strategy`. As in the spec, an empty text and port 0 stand for "not given".

    Attributes:
        name: the database: a file for SQLite.
        max_streams: streams and snapshots that may be open at once, each with a connection of its
            own, beside those of the pool.
        pool_timeout: seconds to wait for a free connection.
        pool_recycle: seconds after which a connection is replaced.
        timeout: seconds to wait for a lock or a statement.
        enable_query_cache: the statement cache of the driver.
        enforce_references: refuse missing parents, and deleting a parent that has children.
        synchronous: SQLite: FULL brings every commit to the disk, NORMAL may lose the last ones
            with the power, and tears none.
        isolation: PostgreSQL: what transactions, and single operations, run at.
        host, port: PostgreSQL: several, divided by commas, are tried in their order; one port
            holds for all of them.
        target_session_attrs, load_balance_hosts, connect_timeout, application_name, options,
        sslmode, sslrootcert, sslcert, sslkey, sslpassword, sslcrl, channel_binding, gssencmode:
            PostgreSQL: as libpq takes them.
        schema: PostgreSQL: where the tables are; an empty text leaves it to the role's search_path.
        pgbouncer: PostgreSQL behind a pool that hands out connections by transaction.
        login_provider: `module:function`, asked for the password of each new connection with
            host, port and user name; it may be async.
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
                    f"{key}: not supported by the driver; use 'prefer', and sslmode 'verify-full'"
                )
        self.servers()
        if self.pgbouncer and (self.schema or self.options):
            raise ConfigurationError(
                f"{'schema' if self.schema else 'options'}: not supported with pgbouncer, which does not "
                "keep session settings; use ALTER ROLE ... SET search_path instead"
            )

    def servers(self) -> list[tuple[str, int]]:
        """Host and port of each server, in the order in which they are tried; port 0: not given.

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
        own = ("name",) if self.type == "sqlite" and self.name != ":memory:" else ()
        return (*own, "sslrootcert", "sslcert", "sslkey")

    def place(self) -> str:
        """See `StorageConfig.place`."""
        if self.type == "sqlite":
            return f"sqlite:{_place_of_file(self.name)}"
        servers = ",".join(
            f"{_server(host.lower() or 'localhost')}:{port or 5432}"
            for host, port in self.servers()
        )
        return f"postgresql://{servers}/{_quoted(self.name or self.username)}"


def _port(text: str) -> int:
    """The number that a text stands for; an empty one is 0, "not given"."""
    port = int(text) if text.isdecimal() and len(text) < 10 else 0 if text == "" else None
    if port is None:
        raise ConfigurationError("port: expected int, got str")
    return cast("int", _checked(port, Port, "port"))


def _server(host: str) -> str:
    return f"[{host}]" if ":" in host else _quoted(host)


class AutoScaling(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`auto_scaling` in its long form; `true` stands for these defaults."""

    enabled: bool = True
    min_read_capacity: AtLeastOne = 1
    max_read_capacity: AtLeastOne = 100
    min_write_capacity: AtLeastOne = 1
    max_write_capacity: AtLeastOne = 100
    target_utilization: Percent = 70

    def __post_init__(self) -> None:
        super().__post_init__()
        for what in ("read_capacity", "write_capacity"):
            if getattr(self, f"min_{what}") > getattr(self, f"max_{what}"):
                raise ConfigurationError(f"min_{what}: more than max_{what}")


class DynamoDBConfig(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dynamodb_strategy`.

    Attributes:
        region, profile: None leaves them to the AWS environment.
        read_capacity, write_capacity: for `PROVISIONED` tables.
        enable_dax, dax_endpoint: reads that need not be consistent go through this DAX cluster.
        consistent_reads: reads by key, table queries and scans are strongly consistent.
        point_in_time_recovery: kept for tables that are made here.
        allow_scan: a query that no key or index can answer reads the whole table; else it is
            refused.
        endpoint_url: another server than the region's own.
        connect_timeout, read_timeout: seconds for one request.
        retry_timeout: seconds for which throttled or failed requests are tried again.
        max_pool_connections: how many requests may be under way at once.
    """

    _parts = {"auto_scaling": AutoScaling}
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.endpoint_url is not None and not re.match(_ENDPOINT, self.endpoint_url):
            raise ConfigurationError("endpoint_url: expected http://HOST:PORT or https://HOST:PORT")

    @property
    def endpoint(self) -> str | None:
        """`endpoint_url` without user and password, which no request of AWS can carry."""
        if self.endpoint_url is None:
            return None
        scheme, _, rest = self.endpoint_url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    def place(self) -> str:
        """See `StorageConfig.place`."""
        if self.region is None:
            raise ConfigurationError(
                "region: required, because other processes must be able to open the store by its URL"
            )
        at = f"dynamodb://{_quoted(self.region)}/{_quoted(self.table_prefix)}"
        if self.endpoint is None:
            return at
        server = self.endpoint.partition("?")[0].rstrip("/").lower()
        return f"{at}?endpoint_url={_quoted(server)}"


class MemoryConfig(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`memory_strategy`.

    Attributes:
        enforce_references: refuse missing parents, and deleting a parent that has children.
    """

    enforce_references: bool = True

    def place(self) -> str:
        """See `StorageConfig.place`."""
        return "memory:"  # no other process finds it there, and no live move begins there


class MigrationConfig(_Model, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`migration`: how entities move from one store to another.

    Attributes:
        backup_location: a folder where it ends in `/`, else a file.
    """

    batch_size: AtLeastOne = 100
    create_backup: bool = True
    backup_location: str = "backups/"
    validate_after_migration: bool = True
    cleanup_source: bool = False
    parallel_workers: AtLeastOne = 4


# Of `endpoint_url`. A user and a password in it may hold any character.
_ENDPOINT: Final = (
    r"(?is)https?://(?:.*@)?(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d+)?(?:[/?][^@\s]*)?\Z"
)

StrategyConfig: TypeAlias = JSONConfig | SQLConfig | DynamoDBConfig | MemoryConfig
Options: TypeAlias = "StrategyConfig | Mapping[str, Value]"
"""The configuration of a strategy: a model, or the plain mapping of a third-party one."""

_MODELS: Final[Mapping[str, type[StrategyConfig]]] = {
    "json": JSONConfig,
    "sql": SQLConfig,
    "dynamodb": DynamoDBConfig,
    "memory": MemoryConfig,
}


_BLOCKS: Final = tuple(f"{each}_strategy" for each in _MODELS)


class StorageConfig(_Shown, frozen=True, kw_only=True):
    """A whole configuration.

    Attributes:
        strategy: json, sql, dynamodb, memory, or the registered name of a third-party strategy. An
            empty text where a `migration` block stood alone: only a migration can use that.
        options: the configuration of that strategy.
        others: those of the strategies whose blocks stood beside it, by name.
        migration: the `migration` block, or its defaults.
        follow_moves: the stores that a program with this configuration follows a live move to, as
            it opens them. What a store itself says of a move only chooses among these.

    Raises:
        ConfigurationError: `options` that belong to another strategy.
    """

    strategy: str
    options: Options
    others: Mapping[str, Options] = msgspec.field(default_factory=dict)
    migration: MigrationConfig = msgspec.field(default_factory=MigrationConfig)
    follow_moves: tuple[StorageConfig, ...] = ()

    def __post_init__(self) -> None:
        for name, options in ((self.strategy, self.options), *self.others.items()):
            if not isinstance(options, _MODELS.get(name, Mapping)):
                raise ConfigurationError(f"{name}: its options are of type {_type_name(options)}")

    def place(self) -> str:
        """Where the store is, in one canonical form, without secrets: a URL to compare and to show.

        Raises:
            ConfigurationError: others cannot find it.
        """
        if not isinstance(self.options, Mapping):
            return self.options.place()
        url = self.options.get("url")
        if not isinstance(url, str):
            raise ConfigurationError(
                f"{self.strategy}: required as a URL, by which other processes can open the store"
            )
        scheme, _, body = url.partition("?")[0].partition(":")
        user, at, rest = body.rpartition("@")
        return f"{scheme}:{'//' if at and user.startswith('//') else ''}{_quoted_path(rest)}"

    def block(self, name: str) -> Options:
        """The configuration of a strategy, the selected one or another.

        Raises:
            ConfigurationError: there is none; the message lists the configured ones.
        """
        if name == self.strategy:
            return self.options
        if name not in self.others:
            there = ", ".join((self.strategy, *self.others))
            raise ConfigurationError(f"no configuration for {name!r}; there are: {there}")
        return self.others[name]


ConfigSource: TypeAlias = (
    "StorageConfig | StrategyConfig | Mapping[str, object] | str | os.PathLike[str]"
)
"""What `load_config` takes."""

# -- loading --------------------------------------------------------------------------------


def load_config(source: ConfigSource) -> StorageConfig:
    """The configuration that `source` stands for.

    Args:
        source: one of
            * a `StorageConfig`, returned as it is, or the model of one strategy;
            * a mapping in the spec's shape, `{"storage": {"strategy": ..., "json_strategy": ...}}`,
              or what is inside its `storage`; `strategy` may be left out where exactly one
              block is there, and a block where its defaults will do. Beside `storage` may stand
              `migration`, and what else an application keeps in its file. A null stands for the
              default. `migration` alone makes a configuration that only a migration can use;
            * a path of a JSON file that holds such a mapping: a `Path`, or any text that
              does not begin with a known scheme;
            * a URL: `json:PATH` (one file if PATH ends in `.json`, else a folder of split files),
              `sqlite:PATH`, `postgresql://USER:PASSWORD@HOST:PORT/NAME`,
              `dynamodb://REGION/PREFIX`, `memory:`, or the registered name of a third-party
              strategy as the scheme. A query sets any key of the strategy's configuration, an
              inner one with dots: `?sync_writes=no&auto_scaling.enabled=true`; booleans are
              true/false, yes/no, 1/0. `follow_moves` may be given several times. In all parts `%XX`
              is decoded, and `+` is itself.

    Raises:
        ConfigurationError: what is wrong, by its path, and what would be right.
    """
    return _loaded(source, follows=True)


def _loaded(source: ConfigSource, *, follows: bool) -> StorageConfig:
    """
    Args:
        follows: False: its `follow_moves` is not looked at. It is an entry of one itself, and two
            configurations may well name each other.
    """
    if isinstance(source, StorageConfig):
        return source
    if isinstance(source, Mapping):
        return _from_mapping(source, follows=follows)
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
    """The stores of a `follow_moves`: a list of whatever `load_config` takes.

    Raises:
        ConfigurationError: what is wrong, by its path.
    """
    if source is None:
        return ()
    if not isinstance(source, list | tuple):
        raise ConfigurationError(f"{path}: expected array, got {_type_name(source)}")
    loaded: list[StorageConfig] = []
    for number, each in enumerate(source):
        with _in(f"{path}[{number}]: "):
            loaded.append(_loaded(each, follows=False))
            loaded[-1].place()  # what nobody could name would permit nothing
    return tuple(loaded)


ModelT = TypeVar("ModelT", bound=_Model)


def strategy_config(source: ConfigSource, model: type[ModelT]) -> ModelT:
    """The configuration of the one strategy whose model is `model`.

    Raises:
        ConfigurationError: as by `load_config`, or `source` chooses another strategy.
    """
    loaded = load_config(source)
    if not isinstance(loaded.options, model):
        raise ConfigurationError(
            f"a {model.__name__} is required; this configures the strategy {loaded.strategy!r}"
            if loaded.strategy
            else NO_STRATEGY
        )
    return loaded.options


def anchored(config: StorageConfig) -> StorageConfig:
    """The configuration with relative paths made absolute, so that a later change of the working
    directory has no effect.

    Raises:
        ConfigurationError: as by `absolute`.
    """
    options = config.options
    if not isinstance(options, Mapping):
        paths = {name: text for name in options.path_keys() if (text := getattr(options, name))}
        changed = {name: absolute(text) for name, text in paths.items()}
        options = msgspec.structs.replace(options, **changed)
    permitted = tuple(anchored(each) for each in config.follow_moves)
    return msgspec.structs.replace(config, options=options, follow_moves=permitted)


def absolute(path: str) -> str:
    """The absolute path; a trailing `/` is kept.

    Raises:
        ConfigurationError: it is relative, and the working directory does not exist.
    """
    if os.path.isabs(path):  # noqa: PTH117  # text, as it was given
        return path
    try:
        return os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118
    except OSError as exc:
        raise ConfigurationError(
            f"the path {path!r} is relative, and the working directory cannot be read"
        ) from exc


def _place_of_file(path: str) -> str:
    """The canonical path of a file or folder, as the path of a URL."""
    return _quoted_path(os.path.realpath(absolute(path)))


def load_migration(source: MigrationConfig | ConfigSource) -> MigrationConfig:
    """The `migration` block of whatever `load_config` takes, or of a mapping that has nothing else.

    The inside of the block alone will do, too.

    Raises:
        ConfigurationError: what is wrong, by its path.
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
        # What else stands there is the application's own, but not a block that slipped out.
        for name in source:
            if name in _BLOCKS or name == FOLLOW_MOVES:
                raise ConfigurationError(f"{name}: belongs inside storage")
        at = "storage"
        storage = _mapping(source["storage"], at)
    else:
        at = ""
        storage = {name: each for name, each in source.items() if name != "migration"}
    _refuse_unknown(storage, _storage_keys(storage, at), at)
    blocks: dict[str, Options] = {
        name.removesuffix("_strategy"): _options(
            name, {} if block is None else block, _at(at, name)
        )
        for name, block in storage.items()
        if name not in ("strategy", FOLLOW_MOVES)
    }
    migration = source.get("migration")
    config = _model(MigrationConfig, {} if migration is None else migration, "migration")
    if storage.get("strategy") is None and not blocks and at == "" and "migration" in source:
        _refuse_unknown(storage, (), at)
        return StorageConfig(strategy="", options={}, migration=config)
    strategy = _chosen(storage, list(blocks), at)
    options = (
        blocks.pop(strategy) if strategy in blocks else _options(f"{strategy}_strategy", {}, "")
    )
    return StorageConfig(
        strategy=strategy,
        options=options,
        others=blocks,
        migration=config,
        follow_moves=permitted_moves(storage.get(FOLLOW_MOVES), _at(at, FOLLOW_MOVES))
        if follows
        else (),
    )


def _storage_keys(storage: Mapping[str, object], at: str) -> list[str]:
    """The keys that may stand in `storage`."""
    known = ["strategy", *_BLOCKS, FOLLOW_MOVES]
    if not storage.keys() <= set(known):
        known += [f"{name}_strategy" for name in _registered()]
        if at == "":
            known += ["storage", "migration"]
    return known


def _chosen(storage: Mapping[str, object], blocks: list[str], at: str) -> str:
    name = storage.get("strategy")
    if name is None:
        if len(blocks) == 1:
            return blocks[0]
        found = f"there are blocks for {', '.join(blocks)}" if blocks else "no strategy is named"
        raise ConfigurationError(f"{_at(at, 'strategy')}: required, because {found}")
    path = _at(at, "strategy")
    if not isinstance(name, str):
        raise ConfigurationError(f"{path}: expected str, got {_type_name(name)}")
    name = str(_expand(name, path))
    if name not in _MODELS:
        known = [*_MODELS, *_registered()]
        if name not in known:
            raise ConfigurationError(f"{path}: unknown strategy ({_known(name, known)})")
    return name


def _options(key: str, block: object, path: str) -> Options:
    """The configuration in a block, by the name of its key."""
    model = _MODELS.get(key.removesuffix("_strategy"))
    if model is None:
        return cast("Mapping[str, Value]", _plain(_mapping(block, path), path))
    return _model(model, block, path)


def _registered() -> list[str]:
    """The names of the third-party strategies. Asked only for a name that is not built in."""
    from importlib.metadata import entry_points

    names = {each.name for each in entry_points(group=STRATEGY_GROUP)}
    return sorted(names - _MODELS.keys())


# -- one block ------------------------------------------------------------------------------


def _model(model: type[ModelT], data: object, path: str) -> ModelT:
    """The model of a block that was loaded."""
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
        part = model._parts.get(name)
        if part is not None and isinstance(value, Mapping):
            values[name] = _model(part, value, inner)
        else:
            values[name] = _leaf(value, kinds[name], inner)
    with _in(f"{path}." if path else ""):
        return model(**values)


def _leaf(value: object, kind: Any, path: str) -> object:
    """A value made ready for the check of its type."""
    if isinstance(value, Mapping):
        return {
            name: _leaf(each, str, _at(path, name))
            for name, each in value.items()
            if each is not None
        }
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, str):
        return value
    text = _expand(value, path)
    if Secret in get_args(kind):
        return Secret(str(text))
    return _typed(text, kind) if isinstance(text, _Text) else text


_BOOLEANS: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError
    return _BOOLEANS[text.lower()]


def _typed(text: _Text, kind: Any) -> object:
    """What the text stands for where `kind` is expected, or the nearest to it, to be refused."""
    readings: tuple[Callable[[str], object], ...] = (str, int, float, _boolean)
    refused: list[object] = []
    for read in readings:
        try:
            value = read(text)
        except ValueError:
            continue
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError:
            refused.append(value)
        else:
            return value
    return refused[1] if len(refused) > 1 else refused[0]


@cache
def _kinds(model: type[_Model]) -> dict[str, Any]:
    """The keys of a model and their types."""
    return {each.name: each.type for each in msgspec.structs.fields(model)}


def _checked(value: object, kind: Any, path: str) -> object:
    """The validated value; an integer is converted where a float is expected."""
    try:
        converted: object = msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        problem = _expected(str(exc), kind)
    else:
        if isinstance(converted, str) and "\x00" in converted:
            problem = "string with U+0000"
        elif isinstance(converted, str) and re.search(_NO_TEXT, converted):
            problem = "string with a lone surrogate"
        elif isinstance(converted, float) and not isfinite(converted):
            problem = "expected a finite number"
        else:
            return converted
    raise ConfigurationError(f"{path}: {problem}")


_WORDS: Final = {"Secret": "str", "object": "mapping"}


def _expected(problem: str, kind: Any) -> str:
    """The message of msgspec, in terms of the configuration and without the value."""
    if get_origin(kind) is Literal:
        return "expected " + " or ".join(map(repr, get_args(kind)))
    problem = problem.partition(" - at ")[0].replace("`", "")
    problem = re.sub(r"\w+", lambda word: _WORDS.get(word[0], word[0]), problem)
    return problem[0].lower() + problem[1:]


def _check_filename(path: str, name: object) -> None:
    if not isinstance(name, str):
        raise ConfigurationError(f"{path}: expected str, got {_type_name(name)}")
    if name in ("", ".", "..") or "/" in name or "\x00" in name:
        raise ConfigurationError(
            f"{path}: expected a relative file name inside base_path, without a folder"
        )


def _refuse_same_file(files: Mapping[str, str], path: str) -> None:
    """Two collections in one file would overwrite each other."""
    seen: dict[str, str] = {}
    for collection, name in files.items():
        # Not by spelling: `./a.json` is a.json, so is `A.json` on the file systems of macOS, and
        # with compression a.json is kept at a.json.gz.
        plain = "/".join(each for each in name.split("/") if each not in ("", "."))
        other = seen.setdefault(plain.casefold().removesuffix(".gz"), collection)
        if other != collection:
            raise ConfigurationError(f"{path}{collection}: the same file as for {other}")


def _plain(value: object, path: str) -> object:
    """A copy of a third-party block, variables expanded."""
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
def _in(place: str) -> Iterator[None]:
    """Says where an error was found."""
    try:
        yield
    except ConfigurationError as exc:
        raise ConfigurationError(f"{place}{exc}") from exc.__cause__


def _type_name(value: object) -> str:
    return type(value).__name__


def _mapping(data: object, path: str) -> Mapping[str, object]:
    if not isinstance(data, Mapping):
        where = path or "configuration"
        raise ConfigurationError(f"{where}: expected mapping, got {_type_name(data)}")
    return cast("Mapping[str, object]", data)


def _refuse_unknown(data: Mapping[str, object], known: Iterable[str], path: str) -> None:
    names = list(known)
    for key in data:
        if key not in names:
            raise ConfigurationError(f"{_at(path, key)}: unknown key ({_known(key, names)})")


def _known(name: str, names: list[str]) -> str:
    """`known: a, b; did you mean 'a'?`"""
    from difflib import get_close_matches

    close = get_close_matches(str(name).lower(), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"known: {', '.join(names) or 'none'}{hint}"


# -- environment ----------------------------------------------------------------------------

# Patterns that most programs never need stay text here; `re` compiles and keeps them at first use.
_REFERENCE: Final = r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?"
_NO_TEXT: Final = "[\ud800-\udc7f\udd00-\udfff]"  # the others stand for bytes of a file's name
_SURROGATE: Final = "[\ud800-\udfff]"


def _expand(text: str, path: str, inserted: Callable[[str], str] = str) -> str:
    """The text with its variables replaced, as `_Text` where it held any.

    Raises:
        ConfigurationError: naming the variable and the path of the key.
    """
    if isinstance(text, _Text) or "${" not in text:
        return text

    def replaced(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        if match[1] is None:
            raise ConfigurationError(
                f"{path}: a '${{' that is neither ${{NAME}} nor ${{NAME:-default}} "
                "(a literal one is written '$${')"
            )
        value = os.environ.get(match[1])
        if match[2] is not None:
            value = value or match[2]
        if value is None:
            raise ConfigurationError(f"{path}: the environment variable {match[1]} is not set")
        if re.search(_SURROGATE, value):
            raise ConfigurationError(f"{path}: the environment variable {match[1]} is not UTF-8")
        return inserted(value)

    return _Text(re.sub(_REFERENCE, replaced, text))


# -- files ----------------------------------------------------------------------------------


def _from_file(path: str, *, follows: bool = True) -> StorageConfig:
    data = _decoded(_read(path), path)
    with _in(f"{path}: "):
        if isinstance(data, Mapping) and not _is_config(data):
            raise ConfigurationError(
                "not a configuration, which has a key 'storage'; "
                f"for a store in that file, did you mean 'json:{path}'?"
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
    # Out here, because the foreign error shows the path, and that may be a URL with a password.
    raise _missing_file(path)


def _decoded(data: bytes, path: str) -> object:
    """What a JSON file holds. Nothing is chained: errors of codecs show bytes of the file."""
    try:
        data.decode()
        return msgspec.json.decode(data)
    except UnicodeDecodeError as exc:
        at: int | None = exc.start
        problem = "not UTF-8"
    except msgspec.DecodeError as exc:
        text = str(exc)
        found = re.search(r" \(byte (\d+)\)", text)
        at = int(found[1]) if found else len(data) if "truncated" in text else None
        problem = re.sub(r" \(byte \d+\)| - at .*", "", text)
    except RecursionError:
        at, problem = None, "nested too deep"
    if at is None:
        raise ConfigurationError(f"{path}: {problem}")
    line = data.count(b"\n", 0, at) + 1
    start = data.rfind(b"\n", 0, at) + 1
    column = len(data[start:at].decode(errors="replace")) + 1
    raise ConfigurationError(f"{path}, line {line}, column {column}: {problem}")


# -- URLs -----------------------------------------------------------------------------------

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+._-]*):")


def _scheme(text: str) -> str | None:
    """The scheme of a URL, or None for what must be a path."""
    match = _SCHEME.match(text)
    if match is None:
        return None
    scheme = match[1].lower()
    return scheme if scheme in _URLS or scheme in _registered() else None


def _missing_file(path: str) -> ConfigurationError:
    match = _SCHEME.match(path)
    if match is None and path not in _URLS:
        shown = redact_url(path)
        return ConfigurationError(
            f"no such configuration file {shown!r}; did you mean 'json:{shown}'?"
        )
    # It may well be a URL with a mistyped scheme, and a password in any place: only that is shown.
    shown = path if match is None else f"{match[0]}..."
    known = _known(shown.removesuffix("..."), [f"{each}:" for each in (*_URLS, *_registered())])
    return ConfigurationError(
        f"no such configuration file {shown!r}, and not a URL of a known scheme ({known})"
    )


def _from_url(scheme: str, url: str, *, follows: bool = True) -> StorageConfig:
    # Variables of an inner URL are replaced when that is loaded: else they would be decoded twice.
    moves = re.findall(_FOLLOW, url)
    rest = _expand(re.sub(_FOLLOW, r"\1", url), f"{scheme}: URL", _quoted)[len(scheme) + 1 :]
    body, _, query = rest.partition("?")
    with _in(f"{scheme}: URL: "):
        permitted = permitted_moves([_unquoted(each) for _, each in moves]) if follows else ()
        if scheme not in _URLS:
            return _third_party(scheme, f"{scheme}:{body}", query, permitted)
        strategy, parts = _URLS[scheme]
        given = {name: each for name, each in parts(body).items() if each}
        if scheme == "postgresql" and "@" in query:
            raise _unencoded()  # the `?` may be one inside a password, and keys are named
        _add_query(given, query)
        block = _options(f"{strategy}_strategy", _nested(given), "")
    return StorageConfig(strategy=strategy, options=block, follow_moves=permitted)


def _third_party(
    scheme: str, url: str, query: str, permitted: tuple[StorageConfig, ...]
) -> StorageConfig:
    given = {"url": url}
    _add_query(given, query)
    return StorageConfig(
        strategy=scheme, options=cast("Mapping[str, Value]", given), follow_moves=permitted
    )


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
    user, _, place = authority.rpartition("@")
    if "@" in name or "/" in name:
        raise _unencoded()
    username, _, password = user.partition(":")
    servers = [_host_and_port(each) for each in place.split(",")]
    host, port = (",".join(each) for each in zip(*servers, strict=True))
    port = port if port.strip(",") else ""
    named = {"username": username, "password": password, "host": host, "port": port, "name": name}
    return {"type": "postgresql"} | {key: _unquoted(each) for key, each in named.items()}


def _host_and_port(place: str) -> tuple[str, str]:
    if place.startswith("["):
        host, _, port = place[1:].partition("]")
        return host, port.removeprefix(":")
    host, _, port = place.partition(":")
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
"""The strategy of a scheme, and how the part before the query sets keys."""


def _file_path(body: str, scheme: str) -> str:
    # `//` would be a host here, and three slashes mean a relative path to SQLAlchemy.
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
        "in user, password and name, @ : / ? and % must be percent-encoded; in the query, @"
    )


_FOLLOW: Final = rf"([?&]){FOLLOW_MOVES}=([^&]*)"
_QUERY_KEY: Final = r"[A-Za-z_][\w.-]*\Z"


def _add_query(given: dict[str, str], query: str) -> None:
    """Add the keys of a query to those that the URL itself gave."""
    for pair in filter(None, query.split("&")):
        key, _, value = pair.partition("=")
        key = _unquoted(key)
        if not re.match(_QUERY_KEY, key):
            raise ConfigurationError("expected key=value pairs after the ?")
        if key in given:
            raise ConfigurationError(f"{key}: specified twice")
        given[key] = _unquoted(value)


def _nested(given: Mapping[str, str]) -> dict[str, object]:
    """`{"a.b": text}` as `{"a": {"b": text}}`, every text final."""
    nested: dict[str, Any] = {}
    for path, text in given.items():
        *outer, last = path.split(".")
        inner: Any = nested
        for name in outer:
            inner = inner.setdefault(name, {}) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last in inner:
            raise ConfigurationError(f"{path}: specified twice")
        inner[last] = _Text(text)
    return nested


def _quoted(text: str, safe: str = "") -> str:
    from urllib.parse import quote

    return quote(text, safe=safe, errors="surrogateescape")


def _quoted_path(path: str) -> str:
    return _quoted(path, safe="/:")


def _unquoted(text: str) -> str:
    if "%" not in text:
        return text
    from urllib.parse import unquote

    decoded = unquote(text)
    if "\ufffd" in decoded and "\ufffd" not in text and "%EF%BF%BD" not in text.upper():
        raise ConfigurationError("the percent-encoded bytes are not UTF-8")
    return decoded


# -- redaction ------------------------------------------------------------------------------


def redacted(
    config: StorageConfig | StrategyConfig | MigrationConfig | Mapping[str, object],
) -> dict[str, Value]:
    """A configuration as plain data that may be shown; a `StorageConfig` in the spec's shape.

    Hidden are secrets, the values of keys that sound like one, and passwords in URLs.
    """
    if isinstance(config, StorageConfig):
        blocks = {config.strategy: config.options, **config.others}
        storage: dict[str, object] = {"strategy": config.strategy}
        storage |= {f"{name}_strategy": options for name, options in blocks.items()}
        if config.follow_moves:
            storage[FOLLOW_MOVES] = [redacted(each)["storage"] for each in config.follow_moves]
        config = {"storage": storage, "migration": config.migration}
    return cast("dict[str, Value]", _redact("", config))


def _redact(name: str, value: object) -> Value:
    if isinstance(value, _Shown):
        value = {each: getattr(value, each) for each in value.__struct_fields__}
    if isinstance(value, Secret):
        return REDACTED
    if value is None or isinstance(value, bool):
        return value
    if is_sensitive(name):
        return REDACTED
    if isinstance(value, Mapping):
        return {str(each): _redact(str(each), inner) for each, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redact("", each) for each in value]
    if isinstance(value, str):
        return redact_url(value) if _SCHEME.match(value) else redact_text(value)
    return value if isinstance(value, int | float) else str(value)
