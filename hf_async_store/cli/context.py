"""What a command works with: its arguments, the store that they name, and the loop to use it in."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from hf_async_store.cli.arguments import STORE_VARIABLE
from hf_async_store.cli.output import PROGRAM, log_line, write_error
from hf_async_store.config import JSONConfig, load_config
from hf_async_store.errors import (
    ConfigurationError,
    InvalidInputError,
    OperationTimeoutError,
    StoreNotFoundError,
)
from hf_async_store.redaction import redact_text
from hf_async_store.repository import operation_timeout
from hf_async_store.schema import HOST_FACTORY, Collection, Schema
from hf_async_store.strategies import open_store

if TYPE_CHECKING:
    from argparse import Namespace

    from hf_async_store.config import StorageConfig
    from hf_async_store.strategy import StorageStrategy

Work = Callable[["StorageStrategy"], Coroutine[Any, Any, int]]
Result = TypeVar("Result")

_LOG: Final = logging.getLogger("hf_async_store")
_SOON: Final = 0.001
_LAST_SECONDS: Final = 0.2


class Context:
    """The store of one command.

    Attributes:
        was_there: the store was, before a command that writes.

    Raises:
        ConfigurationError: no store is named, or it cannot be used as it is written.
    """

    def __init__(self, arguments: Namespace) -> None:
        self.arguments = arguments
        self.config = _config_of(arguments)
        self.schema = Schema(collections_of(arguments.collections))
        self.store = open_store(self.config, collections=self.schema.values())
        self.was_there = True
        self._ends: float | None = None

    def collection(self) -> Collection:
        """The declared collection that the arguments name."""
        return self.schema[self.arguments.collection]

    # -- running -----------------------------------------------------------------------------

    def run(self, work: Work, *, writes: bool = False, needs_store: bool = False) -> int:
        """The exit code of `work` with the open store.

        Args:
            writes: `work` watches the time by itself, by `left`, because only the verbs know
                whether what they were writing may have landed.
            needs_store: refuse to look for anything in a store that is not there: its name may be
                mistyped.

        Raises:
            StoreNotFoundError.
        """
        timeout: float | None = self.arguments.timeout
        self._ends = None if timeout is None else time.monotonic() + timeout

        async def body() -> int:
            async with _opened(self.store) as store:
                if writes or needs_store:
                    async with operation_timeout(timeout):
                        self.was_there = await store.exists()
                if needs_store and not self.was_there:
                    raise StoreNotFoundError(
                        f"there is no store at {self.location()}; correct --store or --config, or "
                        f"make an empty one: `{PROGRAM} init`"
                    )
                async with operation_timeout(None if writes else timeout):
                    return await abandonable(work(store))

        with warnings_logged(verbose=self.arguments.verbose):
            try:
                return asyncio.run(body())
            except OperationTimeoutError as exc:
                if timeout is None:
                    raise
                # In the words of the command; a verb was given only what was left of the time.
                raise OperationTimeoutError(
                    f"not done within {timeout:g} s", outcome_unknown=exc.outcome_unknown
                ) from exc

    def left(self) -> float | None:
        """The `timeout=` of a verb now.

        Raises:
            OperationTimeoutError: no time is left.
        """
        if self._ends is None:
            return None
        left = self._ends - time.monotonic()
        if left < _SOON:
            raise OperationTimeoutError(f"not done within {self.arguments.timeout:g} s")
        return left

    async def watched(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Bounds work that takes no `timeout=` of its own and may write."""
        async with operation_timeout(self.left(), outcome_unknown=lambda: True):
            return await abandonable(work)

    # -- is there a store at all -------------------------------------------------------------

    def location(self) -> str:
        """Where the store is, as a person would say it."""
        options = self.config.options
        if not isinstance(options, JSONConfig):
            from hf_async_store.migration import location_of

            return location_of(self.store)
        folder = Path(options.base_path)
        single = options.storage_type == "single_file"
        return str(folder / options.filenames.single_file if single else folder)


async def abandonable(work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` such that a cancellation, by Ctrl-C or a timeout, ends the waiting for it at once.

    A write that is cancelled waits until nothing of it can land any more, which may take as long as
    a lock is waited for. A person does not wait for that: the end of the loop cancels what remains.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=_LAST_SECONDS)
        for each in done:
            if not each.cancelled():
                each.exception()  # marked as retrieved; the reason is reported already
        raise


@asynccontextmanager
async def _opened(store: StorageStrategy) -> AsyncIterator[StorageStrategy]:
    """The open store. Who gives up does not wait for what closing it would wait for, as a lock:
    the end of the loop cancels that, and to the store it is as if this process had been killed."""
    await store.open()
    has_given_up = False
    try:
        yield store
    except (asyncio.CancelledError, OperationTimeoutError):
        has_given_up = True
        raise
    finally:
        closing = asyncio.ensure_future(store.close())
        if has_given_up:
            try:
                await asyncio.wait([closing], timeout=_LAST_SECONDS)
            finally:
                store.abandon()
            with suppress(asyncio.CancelledError, asyncio.InvalidStateError):
                closing.exception()  # it is seen, and no news beside why this ends
        else:
            await closing


def path_of(text: str) -> Path:
    """A path. Not a URL: it may hold a password, which would become the name of a file.

    Raises:
        InvalidInputError: it is a URL.
    """
    if "://" in text:
        raise InvalidInputError(f"expected a path, not the URL {text}")
    return Path(text)


# -- which store ----------------------------------------------------------------------------


def _config_of(arguments: Namespace) -> StorageConfig:
    if arguments.store is not None and arguments.config is not None:
        raise ConfigurationError("give --store or --config, not both")
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


def collections_of(named: str | None) -> Iterable[Collection]:
    """The collections that `--collections MODULE:NAME` stands for."""
    if named is None:
        return HOST_FACTORY
    module, colon, name = named.partition(":")
    if not (module and colon and name):
        raise ConfigurationError(f"--collections {named!r}: expected MODULE:NAME")
    found = _imported(module, name, named)
    if isinstance(found, Collection):
        return (found,)
    given = list(found) if isinstance(found, Iterable) and not isinstance(found, str) else []
    if not given or not all(isinstance(each, Collection) for each in given):
        raise ConfigurationError(
            f"--collections {named}: {name} is no list of Collection, but {type(found).__name__}"
        )
    return given


def _imported(module: str, name: str, named: str) -> object:
    from importlib import import_module

    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return cast("object", getattr(import_module(module), name))
    except Exception as exc:
        raise ConfigurationError(
            f"--collections {named}: cannot be imported from {here}: {type(exc).__name__}: {exc}"
        ) from exc
    finally:
        if added:
            # That module was asked for. Other files there must not be imported in place of a driver.
            sys.path.remove(here)
            sys.path.append(here)


# -- warnings -------------------------------------------------------------------------------


class _LogHandler(logging.Handler):
    """Warnings of the store, one line each."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__(logging.WARNING)
        self._verbose = verbose

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        log_line(redact_text(f"warning: {record.getMessage()}" + (f": {cause}" if cause else "")))
        if cause is not None and self._verbose:
            write_error(redact_text(logging.Formatter().formatException(record.exc_info)) + "\n")  # type: ignore[arg-type]


@contextmanager
def warnings_logged(*, verbose: bool) -> Iterator[None]:
    handler = _LogHandler(verbose=verbose)
    _LOG.addHandler(handler)
    try:
        yield
    finally:
        _LOG.removeHandler(handler)
