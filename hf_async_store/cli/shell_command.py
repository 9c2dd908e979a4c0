"""An interactive Python prompt with the store opened: shell.

The prompt runs in the main thread, and statements with `await` in the event loop of the blocking stores.
"""

from __future__ import annotations
import __future__

import ast
import asyncio
import code
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Final

import hf_async_store
from hf_async_store.cli import output
from hf_async_store.cli.context import Context, opened_stdin, warnings_logged
from hf_async_store.errors import InvalidInputError, StorageError
from hf_async_store.redaction import redact_text
from hf_async_store.sync.event_loop_thread import Caller, EventLoopThread

if TYPE_CHECKING:
    from argparse import Namespace

    from hf_async_store.strategy import StorageStrategy

_MAX_HISTORY: Final = 5000
_MAX_ITEMS: Final = 200
"""Longer lists are shown in part."""

_READING: Final = frozenset(
    {
        "capabilities",
        "claims",
        "collections",
        "count_by",
        "count_entities",
        "describe",
        "exists",
        "explain_query",
        "get_entities",
        "get_entity",
        "max_of",
        "min_of",
        "query_entities",
        "query_page",
        "recorded_collections",
        "schema_changes",
        "snapshot",
        "stream_entities",
        "subscriptions",
        "sum_of",
        "undeclared",
        "wait_for",
        "watch",
    }
)
"""The methods of a store that never write."""


def shell(arguments: Namespace) -> int:
    context = Context(arguments)
    with warnings_logged(verbose=arguments.verbose), _opened(context.store) as caller:
        if not caller.run(context.store.exists):
            raise context.not_found()
        store = ReadOnly(context.store) if arguments.read_only else context.store
        _Prompt(store, caller).run(_banner(context) if _is_interactive() else "")
    return 0


def _is_interactive() -> bool:
    return output.is_terminal(sys.stdin) and output.is_terminal(sys.stdout)


def _banner(context: Context) -> str:
    only = " (read-only)" if context.arguments.read_only else ""
    names = ", ".join(context.store.collections)
    return (
        f"store: {context.location()}{only}\ncollections: {names}\n"
        'for example: await store.query_entities("COLLECTION", limit=10)\n'
        "Ctrl-C ends a statement, Ctrl-D the shell"
    )


@contextmanager
def _opened(store: StorageStrategy) -> Iterator[Caller]:
    """The store, opened in the event loop of a second thread; the caller runs work there."""
    thread = EventLoopThread.acquire(store)
    try:
        caller = thread.caller()
        caller.run(store.open)
        try:
            yield caller
        finally:
            caller.run(store.close)
    except KeyboardInterrupt:  # closing would wait, for example for a lock
        store.abandon()
        raise
    finally:
        thread.release(store)


class ReadOnly:
    """A store without the methods that write, as a protection from mistakes."""

    def __init__(self, store: StorageStrategy) -> None:
        self._store = store

    def __repr__(self) -> str:
        return f"{self._store!r} (read-only)"

    def __dir__(self) -> list[str]:
        return sorted(each for each in _READING if hasattr(self._store, each))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in _READING:
            raise InvalidInputError(f"{name} could write, and this shell is read-only")
        return found


class _Prompt(code.InteractiveConsole):
    """The prompt; code may contain `await` outside of functions."""

    def __init__(self, store: object, caller: Caller) -> None:
        public = {name: getattr(hf_async_store, name) for name in hf_async_store.__all__}
        super().__init__({**public, "asyncio": asyncio, "store": store, "__name__": "__console__"})
        self.compile.compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        self._caller = caller
        self._failed = False

    def run(self, banner: str) -> None:
        """Read and run statements until the end of the input."""
        hook, sys.displayhook = sys.displayhook, self._show
        try:
            if _is_interactive():
                with _history(self.locals):
                    self.interact(banner, "")
            else:
                self._run_input()
        finally:
            sys.displayhook = hook

    def _run_input(self) -> None:
        """Run the statements of a file; an error ends them.

        All are compiled before the first one runs. As at the prompt, an empty line would end a block, and
        half of a transaction would be committed.
        """
        try:
            statements = self._statements(opened_stdin().read())
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as exc:
            self.showsyntaxerror(self.filename)
            raise InvalidInputError("the input is not valid Python; nothing was run") from exc
        for each in statements:
            self.runcode(each)
            if self._failed:
                raise InvalidInputError("the statement failed; those after it are not run")

    def _statements(self, source: bytes) -> list[CodeType]:
        """The code of each statement of a file, which shows the values of expressions."""
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        whole = compile(source, self.filename, "exec", flags, dont_inherit=True)
        flags |= whole.co_flags & __future__.annotations.compiler_flag
        return [
            compile(ast.Interactive([each]), self.filename, "single", flags, dont_inherit=True)
            for each in ast.parse(source, self.filename).body
        ]

    def runcode(self, code: CodeType) -> None:
        """Run one statement; its exceptions are shown."""
        try:
            self._run_code(code)
        except SystemExit:
            raise
        except KeyboardInterrupt:
            if not _is_interactive():
                raise
            self.write("\nKeyboardInterrupt\n")
        except StorageError as exc:
            self._failed = True
            self.write(redact_text(f"{type(exc).__name__}: {exc}") + "\n")
        except BaseException as exc:  # noqa: BLE001  # whatever the statement raised
            self._failed = True
            self._show_traceback(exc)

    def _run_code(self, code: CodeType) -> None:
        function = FunctionType(code, self.locals)
        if not code.co_flags & inspect.CO_COROUTINE:
            function()
            return

        async def run() -> BaseException | None:
            # Returned: a cancellation that the statement itself raises is not one of this task.
            try:
                await function()
            except BaseException as exc:  # noqa: BLE001
                return exc
            return None

        raised = self._caller.run(run)
        if raised is not None:
            raise raised

    def _show_traceback(self, exc: BaseException) -> None:
        """Show an exception, from the statement on."""
        while exc.__traceback__ and exc.__traceback__.tb_frame.f_code.co_filename != self.filename:
            exc.__traceback__ = exc.__traceback__.tb_next
        self.write("".join(traceback.format_exception(exc)))

    def showsyntaxerror(self, filename: str | None = None) -> None:
        """Show the error of code that cannot be compiled."""
        self._failed = True
        super().showsyntaxerror(filename)

    def write(self, data: str) -> None:
        """Write an error to stderr."""
        output.write_error(redact_text(data))

    def _show(self, value: object) -> None:
        """Print the value of an expression."""
        if value is None:
            return
        if inspect.iscoroutine(value):
            value.close()
            self.write(f"a coroutine: write `await` before {value.__name__}(...)\n")
            return
        self.locals["_"] = value
        from rich.pretty import pretty_repr

        for line in pretty_repr(value, max_width=_width(), max_length=_MAX_ITEMS).splitlines():
            output.line(line)
        output.flush()


def _width() -> int:
    from shutil import get_terminal_size

    return get_terminal_size().columns


# -- history and completion -----------------------------------------------------------------


@contextmanager
def _history(names: dict[str, Any]) -> Iterator[None]:
    """Editing of lines with the history of earlier shells, if Python has `readline`."""
    try:
        import readline
        from rlcompleter import Completer
    except ImportError:
        yield
        return
    path = _history_path()
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_MAX_HISTORY)
    readline.set_completer(Completer(names).complete)
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # values are in it
            readline.write_history_file(path)


def _history_path() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "hf-async-store" / "shell_history"
