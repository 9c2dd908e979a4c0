"""The context of a command: its arguments, the store that they name, and the event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from hf_async_store.cli.arguments import STORE_VARIABLE
from hf_async_store.cli.declared import named_collections
from hf_async_store.cli.output import PROGRAM, log_line, write_error
from hf_async_store.config import JSONConfig, load_config
from hf_async_store.declarations import merged, schema_of_recorded
from hf_async_store.errors import (
    ConfigurationError,
    InvalidInputError,
    OperationTimeoutError,
    StorageError,
    StoreNotFoundError,
    UnknownCollectionError,
)
from hf_async_store.migration_routing import unrouted
from hf_async_store.redaction import redact_text
from hf_async_store.repository import operation_timeout
from hf_async_store.schema import HOST_FACTORY, Collection, Schema
from hf_async_store.strategies import open_store

if TYPE_CHECKING:
    from argparse import Namespace
    from io import BufferedReader

    from hf_async_store.config import StorageConfig
    from hf_async_store.strategy import StorageStrategy

Work = Callable[["StorageStrategy"], Coroutine[Any, Any, int]]
Result = TypeVar("Result")

_LOG: Final = logging.getLogger("hf_async_store")
_MIN_TIMEOUT_SECONDS: Final = 0.001
_CANCEL_SECONDS: Final = 0.2
"""How long to wait for work that was cancelled."""


class Context:
    """The store of one command.

    Args:
        also: further collections, which a backup contains.
        tolerant: if the collections that the store remembers cannot be read, those of the spec are
            used: for a command that reports what is wrong.

    Attributes:
        existed: whether the store existed before a command that writes.

    Raises:
        ConfigurationError: no store is named, or its configuration is not valid.
    """

    def __init__(
        self, arguments: Namespace, *, also: Iterable[Collection] = (), tolerant: bool = False
    ) -> None:
        self.arguments = arguments
        self.config = config_of(arguments)
        try:
            self.schema = declared_schema(arguments, self.config, also=also)
        except StorageError as exc:
            if not tolerant or isinstance(exc, ConfigurationError):
                raise
            self.schema = Schema(HOST_FACTORY)
        self.store = open_store(self.config, collections=self.schema.values())
        self.existed = True
        self._deadline: float | None = None

    def collection(self, *, needs_store: bool = True) -> Collection:
        """The declared collection that the arguments name.

        Args:
            needs_store: of a store that does not exist, say that and not that it has no such collection.
        """
        try:
            return self.schema[self.arguments.collection]
        except UnknownCollectionError:
            if needs_store and not run_work(self.arguments, self._exists()):
                raise self.not_found() from None
            raise

    async def _exists(self) -> bool:
        collections = list(self.schema.values())
        async with _opened(open_store(self.config, collections=collections)) as store:
            return await store.exists()

    # -- running -----------------------------------------------------------------------------

    def run(self, work: Work, *, writes: bool = False, needs_store: bool = False) -> int:
        """Open the store and run `work` with it; returns its exit code.

        Args:
            writes: `work` applies the timeout itself, with `remaining_time`, because only the
                methods of the store know whether a write may have been committed.
            needs_store: refuse a store that does not exist, because its name may be mistyped.

        Raises:
            StoreNotFoundError: the store is needed and does not exist.
        """
        timeout: float | None = self.arguments.timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout

        async def body() -> int:
            async with _opened(self.store) as store:
                if writes or needs_store:
                    async with operation_timeout(timeout):
                        self.existed = await store.exists()
                if needs_store and not self.existed:
                    raise self.not_found()
                async with operation_timeout(None if writes else timeout):
                    return await abandonable(work(store))

        with warnings_logged(verbose=self.arguments.verbose):
            try:
                return asyncio.run(body())
            except OperationTimeoutError as exc:
                if timeout is None:
                    raise
                # Report the timeout of the command; a method was given only the remaining time.
                raise self._timed_out(writes=writes, outcome_unknown=exc.outcome_unknown) from exc

    def remaining_time(self) -> float | None:
        """The value for the `timeout=` argument of a method that is called now.

        Raises:
            OperationTimeoutError: the time has expired.
        """
        if self._deadline is None:
            return None
        remaining = self._deadline - time.monotonic()
        if remaining < _MIN_TIMEOUT_SECONDS:
            raise self._timed_out(writes=True, outcome_unknown=False)
        return remaining

    def _timed_out(self, *, writes: bool, outcome_unknown: bool) -> OperationTimeoutError:
        names = (self.arguments.command, getattr(self.arguments, "collection", None))
        message = (
            f"{' '.join(filter(None, names))}: not completed within {self.arguments.timeout:g} s"
        )
        if writes and not outcome_unknown:
            message += "; nothing further was written"
        return OperationTimeoutError(message, outcome_unknown=outcome_unknown)

    def not_found(self) -> StoreNotFoundError:
        """The error that the store does not exist."""
        return StoreNotFoundError(
            f"there is no store at {self.location()}; correct --store or --config, or create an empty "
            f"store with `{PROGRAM} init`"
        )

    async def with_timeout(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run work that may write and that has no `timeout=` argument within the remaining time."""
        async with operation_timeout(self.remaining_time(), outcome_unknown=lambda: True):
            return await abandonable(work)

    # -- location ----------------------------------------------------------------------------

    def location(self) -> str:
        """The location of the store for messages."""
        options = self.config.options
        if isinstance(options, Mapping) and "url" in options:
            return self.config.location()
        if not isinstance(options, JSONConfig):
            from hf_async_store.migration import location_of

            return location_of(self.store)
        folder = Path(options.base_path)
        single = options.storage_type == "single_file"
        return str(folder / options.filenames.single_file if single else folder)


def declared_schema(
    arguments: Namespace, *configs: StorageConfig, also: Iterable[Collection] = ()
) -> Schema:
    """The collections of a command.

    They are those that the command line, the environment or a configuration names; otherwise those that
    the stores remember, and if they remember none, those of the spec.

    Args:
        configs: the stores; if they contradict one another, the first one is followed.
        also: further collections, unless the stores contradict them.
    """
    named = named_collections(arguments, configs)
    if named is not None:
        return Schema(named)

    async def recorded() -> list[Collection]:
        found = list(also)
        for config in reversed(configs):
            # Not routed: what this very store remembers, even if another one is active.
            async with _opened(open_store(config)) as store:
                found = merged(found, await unrouted(store.engine).declarations())
        return found

    return schema_of_recorded(run_work(arguments, recorded()) or HOST_FACTORY)


def run_work(arguments: Namespace, work: Coroutine[Any, Any, Result]) -> Result:
    """Run work that opens its stores itself, within the timeout of the command."""

    async def body() -> Result:
        async with operation_timeout(arguments.timeout):
            return await work

    with warnings_logged(verbose=arguments.verbose):
        return asyncio.run(body())


@contextmanager
def repeatable(how: str) -> Iterator[None]:
    """Say how work goes on that Ctrl-C or a timeout ends before its time."""
    try:
        yield
    except asyncio.CancelledError:
        log_line(how)
        raise


async def abandonable(work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` such that a cancellation, by Ctrl-C or a timeout, returns almost at once.

    A cancelled write waits until it certainly cannot be committed any more, which may take as long
    as the timeout of a lock. A command does not wait for that: closing the event loop cancels the
    remaining tasks.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=_CANCEL_SECONDS)
        for each in done:
            if not each.cancelled():
                each.exception()  # marked as retrieved; the reason is reported already
        raise


@asynccontextmanager
async def _opened(store: StorageStrategy) -> AsyncIterator[StorageStrategy]:
    """Open the store, and close it at the end.

    After a cancellation or a timeout, do not wait for `close`, which may wait for a lock: closing
    the event loop cancels it, which to the store is the same as if this process had been killed.
    """
    await store.open()
    is_cancelled = False
    try:
        yield store
    except (asyncio.CancelledError, OperationTimeoutError):
        is_cancelled = True
        raise
    finally:
        closing = asyncio.ensure_future(store.close())
        if is_cancelled:
            try:
                await asyncio.wait([closing], timeout=_CANCEL_SECONDS)
            finally:
                store.abandon()
            with suppress(asyncio.CancelledError, asyncio.InvalidStateError):
                closing.exception()  # marked as retrieved; the first error is reported already
        else:
            await closing


def opened_stdin() -> BufferedReader:
    """The bytes of stdin.

    Raises:
        InvalidInputError: the program was started with stdin closed.
    """
    if sys.stdin is None:
        raise InvalidInputError("stdin is closed")
    return cast("BufferedReader", sys.stdin.buffer)


def path_of(argument: str) -> Path:
    """Convert an argument to a path. URLs are refused: their password would become part of a name.

    Raises:
        InvalidInputError: the argument is a URL.
    """
    if "://" in argument:
        raise InvalidInputError(f"expected a path, not the URL {argument}")
    return Path(argument)


# -- configuration --------------------------------------------------------------------------


def config_of(arguments: Namespace) -> StorageConfig:
    """The configuration that the arguments or the environment name."""
    if arguments.store is not None and arguments.config is not None:
        raise ConfigurationError("give either --store or --config, not both")
    if "" in (arguments.store, arguments.config):
        raise ConfigurationError(
            "--store or --config is empty: is a variable of the shell not set?"
        )
    if arguments.config is not None:
        return load_config(Path(arguments.config))
    if arguments.store is not None:
        return load_config(arguments.store)
    if os.environ.get(STORE_VARIABLE):
        try:
            return load_config(os.environ[STORE_VARIABLE])
        except ConfigurationError as exc:
            raise ConfigurationError(f"{STORE_VARIABLE}: {exc}") from exc
    raise ConfigurationError(
        "no store is named; give --store json:data/request_database.json (or another URL), "
        f"--config FILE, or set {STORE_VARIABLE} to either"
    )


# -- warnings -------------------------------------------------------------------------------


class _LogHandler(logging.Handler):
    """Writes each warning of the store as one line to stderr."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__(logging.WARNING)
        self._verbose = verbose

    def emit(self, record: logging.LogRecord) -> None:
        info = record.exc_info
        cause = info[1] if info else None
        log_line(redact_text(f"warning: {record.getMessage()}" + (f": {cause}" if cause else "")))
        if info and cause is not None and self._verbose:
            write_error(redact_text(logging.Formatter().formatException(info)) + "\n")


@contextmanager
def warnings_logged(*, verbose: bool) -> Iterator[None]:
    handler = _LogHandler(verbose=verbose)
    _LOG.addHandler(handler)
    try:
        yield
    finally:
        _LOG.removeHandler(handler)
