"""Migration, backup and restore for blocking callers. Callbacks are called in the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from hf_async_store import migration
from hf_async_store.strategy import StorageStrategy
from hf_async_store.sync.calls import Entering, blocking, streaming
from hf_async_store.sync.event_loop_thread import EventLoopThread, refuse_running_loop
from hf_async_store.sync.store import Store

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _of_store(
    function: Callable[Concatenate[StorageStrategy, Parameters], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[Store, Parameters], Result]:
    """The blocking form of a function whose first argument is a store."""

    @wraps(function)
    def call(store: Store, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return store._run(partial(function, store._target, *args, **kwargs))

    return call


def _of_stores(
    function: Callable[
        Concatenate[StorageStrategy, StorageStrategy, Parameters], Coroutine[Any, Any, Result]
    ],
) -> Callable[Concatenate[Store, Store, Parameters], Result]:
    """The blocking form of a function whose first two arguments are stores."""

    @wraps(function)
    def call(
        one: Store, other: Store, /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        return one._run(partial(function, one._target, other._target, *args, **kwargs))

    return call


backup_store = _of_store(migration.backup_store)
restore_store = _of_store(migration.restore_store)
compare_stores = _of_stores(migration.compare_stores)


class MigrationTool(Entering):
    """As `hf_async_store.MigrationTool`, for use with `with`.

    Args:
        tool: the asynchronous one, whose stores are given as configurations.
    """

    _target: migration.MigrationTool

    def __init__(self, tool: migration.MigrationTool) -> None:
        super().__init__(tool, None)

    def __enter__(self) -> Self:
        refuse_running_loop()
        self._loop_thread = EventLoopThread.acquire(self._target.source)
        try:
            self._run(self._enter)
        except BaseException:
            self._loop_thread.release(self._target.source)
            raise
        return self

    def __exit__(self, *exc_info: Any) -> None:
        try:
            super().__exit__(*exc_info)
        finally:
            self._opened().release(self._target.source)

    validate_source_connection = blocking(migration.MigrationTool.validate_source_connection)
    validate_target_connection = blocking(migration.MigrationTool.validate_target_connection)
    validate_schema_compatibility = blocking(migration.MigrationTool.validate_schema_compatibility)
    create_backup = blocking(migration.MigrationTool.create_backup)
    get_migration_batches = streaming(migration.MigrationTool.get_migration_batches, read_ahead=1)
    validate_migration = blocking(migration.MigrationTool.validate_migration)
    compare = blocking(migration.MigrationTool.compare)
    migrate = blocking(migration.MigrationTool.migrate)
    resume = blocking(migration.MigrationTool.resume)
