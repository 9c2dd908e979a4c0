"""Opens the store of a configuration. A strategy is imported only when one of its stores is opened."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Final, Protocol, cast

from msgspec.structs import replace

from hf_async_store.arguments import check_callable, check_seconds, is_listed
from hf_async_store.errors import ConfigurationError, InvalidInputError
from hf_async_store.expiry import PURGE_SECONDS
from hf_async_store.schema import HOST_FACTORY, Collection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime
    from pathlib import Path

    from hf_async_store.config import ConfigSource, StorageConfig
    from hf_async_store.observer import Observer
    from hf_async_store.strategy import StorageStrategy

GROUP: Final = "hf_async_store.strategies"
"""The entry-point group under which other packages register a `StorageStrategy` by name."""

_BUILT_IN: Final = {
    "memory": ("hf_async_store.strategies.memory", "MemoryStorageStrategy"),
    "json": ("hf_async_store.strategies.json", "JSONStorageStrategy"),
    "sql": ("hf_async_store.strategies.sql", "SQLStorageStrategy"),
    "dynamodb": ("hf_async_store.strategies.dynamodb", "DynamoDBStorageStrategy"),
}


def open_store(
    config: StorageConfig | Mapping[str, object] | str | Path,
    *,
    collections: Iterable[Collection] = HOST_FACTORY,
    follow_moves: Iterable[ConfigSource] = (),
    clock: Callable[[], datetime] | None = None,
    purge_seconds: float | None = PURGE_SECONDS,
    observer: Observer | None = None,
) -> StorageStrategy:
    """Create the store of a configuration, for use with `async with`.

    Args:
        config: a dict with the structure of the spec, the path of a JSON file that contains one, a
            `StorageConfig`, or a URL: `json:PATH`, `sqlite:PATH`,
            `postgresql://USER:PASSWORD@HOST:PORT/NAME`, `dynamodb://REGION/PREFIX`, `memory:`. The
            query of a URL sets any key of the strategy's configuration. See `config.load_config`.
        collections: the declared collections; by default those of the spec.
        follow_moves: the stores to which this store may be followed during a live migration, in any
            of the forms of `config`, in addition to those listed in `config`.
        clock: returns the time, with a time zone, for tests: it decides what has expired, and gives
            `created_at` and `updated_at`. By default, the clock of the machine. A time before that of an
            earlier call counts as that one.
        purge_seconds: how long the store, while it is open, pauses between two removals of expired
            entities in the background; None: it does not remove them.
        observer: is told what the store does, for traces and metrics, such as an
            `integrations.opentelemetry.OpenTelemetryObserver`.

    Raises:
        ConfigurationError: names the path of the invalid key and what is expected there.
    """
    from hf_async_store.config import NO_STRATEGY, load_config, permitted_moves

    loaded = load_config(config)
    if not loaded.strategy:
        raise ConfigurationError(NO_STRATEGY)
    if not is_listed(follow_moves):
        raise ConfigurationError(
            f"follow_moves must be a list of configurations, not {type(follow_moves).__name__}"
        )
    permitted = permitted_moves(list(follow_moves))
    if permitted:
        loaded = replace(loaded, follow_moves=(*loaded.follow_moves, *permitted))
    if clock is not None:
        check_callable(clock, "clock")
    if purge_seconds is not None:
        check_seconds(purge_seconds, "purge_seconds")
        if purge_seconds <= 0:
            raise InvalidInputError("purge_seconds must be greater than 0, or None")
    store = strategy_type(loaded.strategy)(loaded, collections=collections)
    store._set_clock(clock, purge_seconds)
    if observer is not None:
        store._observe(observer)
    return store


class StrategyType(Protocol):
    """The type of a registered strategy: a class or any other callable that creates a store."""

    def __call__(
        self, config: StorageConfig, *, collections: Iterable[Collection]
    ) -> StorageStrategy: ...


def strategy_type(name: str) -> StrategyType:
    """The class of a strategy, built in or registered in the entry-point group.

    Raises:
        ConfigurationError: there is no such strategy, or its package cannot be imported.
    """
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name]
        return cast("StrategyType", getattr(import_module(module), attribute))
    return _registered(name)


def _registered(name: str) -> StrategyType:
    from importlib.metadata import entry_points

    registered = {each.name: each for each in entry_points(group=GROUP)}
    if name not in registered:
        known = ", ".join(sorted({*_BUILT_IN, *registered}))
        raise ConfigurationError(f"no storage strategy {name!r}; there are: {known}")
    try:
        return cast("StrategyType", registered[name].load())
    except (ImportError, AttributeError) as exc:
        raise ConfigurationError(
            f"the storage strategy {name!r} ({registered[name].value}) cannot be imported: {exc}"
        ) from exc
