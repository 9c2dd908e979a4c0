"""Makes an engine follow live migrations, to the stores that the configuration of its store permits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hf_async_store.errors import ConfigurationError
from hf_async_store.migration_routing import MigrationRouter, unrouted
from hf_async_store.schema import MIGRATION_COLLECTIONS, EngineSchema, Schema
from hf_async_store.strategies import open_store

if TYPE_CHECKING:
    from hf_async_store.config import StorageConfig
    from hf_async_store.driver import Engine


def routed(
    engine: Engine, schema: Schema, config: StorageConfig, reopen: Callable[[Schema], Engine]
) -> MigrationRouter:
    """An engine that sends each operation to `engine`, or during a live migration to the active store.

    A strategy passes its engine through this function to take part in live migrations. Every program
    that uses the store must then use a version of the strategy that does, and each method of the
    strategy that is not part of the driver interface runs in `Engine.direct`.

    Args:
        engine: it has the capabilities `multi_process` and `durable`; without `change_markers`, it can
            only be the target of a migration.
        schema: of the store.
        config: of the store, with absolute paths (`config.anchored`): its `follow_moves` are the
            stores to which a live migration may be followed.
        reopen: opens another engine on the same data, with other collections.

    Raises:
        ConfigurationError: the engine lacks one of the capabilities, or a store of `follow_moves` cannot
            have the change feeds of the schema.
    """
    capabilities = engine.capabilities
    if not (capabilities.multi_process and capabilities.durable):
        raise ConfigurationError(
            f"the engine {capabilities.engine!r} cannot take part in live migrations, because it is not "
            "durable or is limited to one process"
        )
    system = (each for each in MIGRATION_COLLECTIONS if each.name not in schema)
    declared = EngineSchema([*schema.values(), *system])

    if any(each.feed is not None for each in schema.values()):
        for move in config.follow_moves:
            open_store(move, collections=declared.values())  # raises if it cannot have these feeds

    def open_engine(location: str | None) -> Engine | None:
        if location is None:
            return reopen(declared)
        # It is opened as configured, including secrets, not by the recorded location.
        permitted = (each for each in config.follow_moves if each.location() == location)
        target = next(permitted, None)
        if target is None:
            return None
        return unrouted(open_store(target, collections=declared.values()).engine)

    def own_location() -> str | None:
        try:
            return config.location()
        except ConfigurationError:
            return None

    return MigrationRouter(engine, open_engine, own_location)
