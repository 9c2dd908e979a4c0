"""The commands that write entities to a file, and read them from one: export, import."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, Self, cast

import msgspec

from hf_async_store.changes import ABSENT
from hf_async_store.cli import output
from hf_async_store.cli.context import Context, opened_stdin, path_of
from hf_async_store.cli.entity_files import CSVLines, Row, line_of, rows_of
from hf_async_store.cli.exit_codes import INTERRUPTED, code_of, is_refusal, sentence
from hf_async_store.cli.filter_syntax import fields_of, filters_of, order_of
from hf_async_store.cli.progress import Bars
from hf_async_store.errors import (
    AlreadyExistsError,
    BatchError,
    EntityNotFoundError,
    InvalidInputError,
    InvalidKeyError,
    StorageError,
)
from hf_async_store.os_errors import translate_os_error

if TYPE_CHECKING:
    from argparse import Namespace

    from hf_async_store.query import Path
    from hf_async_store.schema import Collection
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.values import Entity

_BATCH_SIZE: Final = 1000
_EXISTS: Final = "use --update, --replace or --skip-existing"
_MAX_SHOWN: Final = 10
"""Maximum number of refused rows that are reported one by one."""


# -- export ---------------------------------------------------------------------------------


def export(arguments: Namespace) -> int:
    context = Context(arguments)
    collection = context.collection()
    filters = filters_of(arguments.filters, collection)
    order = order_of(arguments.order, collection)
    fields = fields_of(arguments.fields, collection)
    header, encode = _encoding(arguments, collection, fields)

    async def work(store: StorageStrategy) -> int:
        rows = store.stream_entities(
            collection.name, filters, order, arguments.limit, fields=fields
        )
        what = f"export {collection.name}"
        count = 0
        async with AsyncExitStack() as stack:
            write = stack.enter_context(_written(arguments.output))
            bars = stack.enter_context(Bars({}, is_long=arguments.output is not None))
            await stack.enter_async_context(aclosing(rows))
            write(header)
            async for each in rows:
                write(encode(each))
                count += 1
                if not count % _BATCH_SIZE:
                    bars.advance(what, _BATCH_SIZE)
        if arguments.output is not None:
            done = {"file": arguments.output, "exported": count}
            output.result(
                arguments, done, f"{count:,} {collection.name} written to {arguments.output}"
            )
        return 0

    return context.run(work, needs_store=True)


def _encoding(
    arguments: Namespace, collection: Collection, fields: Sequence[Path] | None
) -> tuple[bytes, Callable[[Entity], bytes]]:
    """What the file begins with, and the function that encodes an entity."""
    if arguments.format == "jsonl":
        return b"", line_of
    lines = CSVLines(
        collection, None if fields is None else [str(each.parts[0]) for each in fields]
    )
    return lines.header(), lines.line_of


@contextmanager
def _written(name: str | None) -> Iterator[Callable[[bytes], object]]:
    """The function that writes to a new file or, if there is no name, to stdout.

    The file gets its name when it is complete; until then, a file of that name stays as it is.
    """
    if name is None:
        yield output.write
        return
    path = path_of(name)
    if path.is_dir():
        raise InvalidInputError(f"--output {name} is a folder: name a file in it")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file.write
        partial.replace(path)
    except OSError as exc:  # those of writing do not name the file
        raise translate_os_error(exc, f"write {name}") from exc
    finally:
        partial.unlink(missing_ok=True)


# -- import ---------------------------------------------------------------------------------


def import_(arguments: Namespace) -> int:
    context = Context(arguments)
    collection = context.collection(needs_store=False)
    if arguments.keep_versions and arguments.existing == "update":
        raise InvalidInputError("--keep-versions cannot be combined with --update")
    with ExitStack() as stack:
        source = "stdin" if arguments.file == "-" else arguments.file
        stream = _opened(arguments.file, stack)
        rows = rows_of(stream, arguments.format, collection, source, arguments.key)
        return _Import(context, collection, source, rows).run()


def _opened(name: str, stack: ExitStack) -> BinaryIO:
    if name == "-":
        return opened_stdin()
    try:
        return stack.enter_context(path_of(name).open("rb"))
    except OSError as exc:
        raise InvalidInputError(f"cannot read {name}: {exc.strerror}") from exc


class _Counts(msgspec.Struct):
    """How many rows were imported, skipped because their entity exists, and refused."""

    imported: int = 0
    skipped: int = 0
    refused: int = 0


class _Interruption:
    """Ctrl-C during an import: the batch that is being written is completed; a second Ctrl-C ends it.

    Attributes:
        requested: whether Ctrl-C was pressed.
        is_reading: while the file is read, nothing needs to be completed.
    """

    def __init__(self) -> None:
        self.requested = False
        self.is_reading = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exc_info: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, number: int, frame: object) -> None:
        del number, frame
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)
        if self.is_reading:
            raise KeyboardInterrupt


class _Failure(NamedTuple):
    """A failure of the store, which ends an import: it says nothing about the rows that it left.

    Attributes:
        row: the first row that was not written.
        error: what happened.
        is_partial: rows after it may have been written, or it itself.
    """

    row: Row
    error: StorageError
    is_partial: bool


class _Import:
    """Writes the rows of a file into a collection, batch by batch."""

    def __init__(
        self, context: Context, collection: Collection, source: str, rows: Iterator[Row]
    ) -> None:
        self._context = context
        self._arguments = context.arguments
        self._collection = collection
        self._source = source
        self._rows = rows
        self._counts = _Counts()
        self._done_to = self._arguments.from_line - 1  # every row up to this line is decided
        self._last_row = 0  # the line in which the last row that was read ends
        self._next: Row | None = None  # it begins the next batch
        self._code = 0
        self._failure: _Failure | None = None
        self._unreadable: InvalidInputError | None = None  # the file, after the rows that were read

    def run(self) -> int:
        """Import all rows; returns the exit code."""
        status = self._context.run(self._run, writes=True)
        if self._counts.imported and not (self._context.existed or self._arguments.dry_run):
            output.log_line(f"note: a new store was created at {self._context.location()}")
        return status

    async def _run(self, store: StorageStrategy) -> int:
        what = f"import {self._collection.name}"
        with Bars({}, is_long=True) as bars, _Interruption() as interruption:
            try:
                while batch := self._batch(interruption):
                    await self._write_all(store, batch)
                    if self._failure is not None:
                        break
                    self._done_to = batch[-1].end
                    bars.advance(what, len(batch), self._refusals())
                    if interruption.requested:
                        break
            except InvalidInputError:  # the file cannot be read on
                self._summarize()
                if self._counts != _Counts():
                    self._log_place()
                raise
            except (asyncio.CancelledError, StorageError):
                self._summarize()
                self._log_place(is_partial=True)
                raise
        return self._finish(interrupted=interruption.requested)

    def _refusals(self) -> str:
        return f"{self._counts.refused:,} refused" if self._counts.refused else ""

    # -- reading -----------------------------------------------------------------------------

    def _batch(self, interruption: _Interruption) -> list[Row]:
        """The next rows; empty at the end of the file, or if Ctrl-C was pressed.

        Raises:
            InvalidInputError: the file cannot be read on; the rows before that place were returned.
        """
        interruption.is_reading = True
        try:
            rows = list(islice(self._distinct(), _BATCH_SIZE))
        except KeyboardInterrupt:
            return []
        finally:
            interruption.is_reading = False
        if not rows and self._unreadable is not None:
            raise self._unreadable
        return rows

    def _distinct(self) -> Iterator[Row]:
        """Rows up to the first one with an id that was there before, so that each row is decided alone."""
        seen = set()
        while (row := self._next or self._read()) is not None:
            self._next = None
            self._last_row = row.end
            if row.line < self._arguments.from_line:
                continue
            if not isinstance(row.entity, InvalidInputError):
                entity_id = row.entity.get(self._collection.key)
                if isinstance(entity_id, str):
                    if entity_id in seen:
                        self._next = row
                        return
                    seen.add(entity_id)
            yield row

    def _read(self) -> Row | None:
        """The next row; None at the end, or where the file cannot be read on."""
        try:
            return next(self._rows, None)
        except InvalidInputError as exc:
            self._unreadable = exc
            return None

    # -- writing -----------------------------------------------------------------------------

    async def _write_all(self, store: StorageStrategy, batch: Sequence[Row]) -> None:
        valid = []
        for row in batch:
            if isinstance(row.entity, InvalidInputError):
                self._refuse(row, row.entity)
            else:
                valid.append(row)
        if valid:
            await self._write(store, valid)

    async def _write(self, store: StorageStrategy, rows: Sequence[Row]) -> None:
        entities = [cast("Entity", each.entity) for each in rows]
        write = self._check if self._arguments.dry_run else self._write_entities
        try:
            outcomes: Sequence[object] = await write(store, entities)
        except BatchError as exc:
            outcomes = exc.outcomes
        except InvalidInputError as exc:
            # The whole batch is refused, before anything is written.
            if len(rows) > 1:
                middle = len(rows) // 2
                await self._write(store, rows[:middle])
                if self._failure is None:
                    await self._write(store, rows[middle:])
                return
            outcomes = [exc]
        self._failure = _failure(rows, outcomes)
        for row, outcome in zip(rows, outcomes, strict=True):
            if not _is_failure(outcome):
                self._count(row, outcome)

    def _count(self, row: Row, outcome: object) -> None:
        is_skipped = outcome is False or (
            isinstance(outcome, AlreadyExistsError) and self._arguments.existing == "skip"
        )
        if is_skipped:
            self._counts.skipped += 1
        elif isinstance(outcome, StorageError):
            self._refuse(row, outcome)
        else:
            self._counts.imported += 1

    def _refuse(self, row: Row, error: StorageError) -> None:
        self._counts.refused += 1
        self._code = max(self._code, code_of(error))
        if self._counts.refused <= _MAX_SHOWN or self._arguments.verbose:
            self._log_error(row, error)

    def _log_error(self, row: Row, error: StorageError) -> None:
        where = f"{self._source}, line {row.line}"
        # The prefix is that of a batch of this row alone.
        text = sentence(error, _EXISTS).removeprefix("item 0: ")
        output.log_line(text if text.startswith(where) else f"{where}: {text}")

    async def _write_entities(
        self, store: StorageStrategy, entities: Sequence[Entity]
    ) -> Sequence[object]:
        name, existing = self._collection.name, self._arguments.existing
        timeout = self._context.remaining_time()
        if self._arguments.keep_versions:
            absent = {self._id(each): ABSENT for each in entities}
            expected = None if existing == "replace" else absent
            return await store.import_entities(name, entities, expected, timeout=timeout)
        if existing == "replace":
            return await store.save_entities(name, entities, timeout=timeout)
        if existing == "update":
            return await self._update(store, entities, timeout)
        if existing == "skip":
            return await store.create_entities(name, entities, if_absent=True, timeout=timeout)
        return await store.create_entities(name, entities, timeout=timeout)

    def _id(self, entity: Entity) -> str:
        """The id of an entity; raises if it is missing or not valid."""
        key = self._collection.key
        if key not in entity:
            raise InvalidKeyError(
                f"an entity of {self._collection.name} needs its key field {key!r}"
            )
        return self._collection.key_of(entity[key]).id

    async def _update(
        self, store: StorageStrategy, entities: Sequence[Entity], timeout: float | None
    ) -> Sequence[object]:
        """Set the fields of the rows in the entities that exist, and create the others."""
        name = self._collection.name
        changes = {self._id(each): each for each in entities}
        try:
            return await store.update_entities(name, changes, timeout=timeout)
        except BatchError as exc:
            outcomes = list(exc.outcomes)
        absent = [n for n, each in enumerate(outcomes) if isinstance(each, EntityNotFoundError)]
        created: Sequence[Any] = []
        if absent:
            try:
                created = await store.create_entities(
                    name, [entities[n] for n in absent], timeout=self._context.remaining_time()
                )
            except BatchError as exc:
                created = exc.outcomes
        for number, outcome in zip(absent, created, strict=True):
            outcomes[number] = outcome
        return outcomes

    async def _check(self, store: StorageStrategy, entities: Sequence[Entity]) -> Sequence[object]:
        """What writing the entities would result in, as far as it can be told without writing."""
        existing = self._arguments.existing
        ids = [self._id(each) for each in entities]
        stored = await store.get_entities(self._collection.name, ids)
        outcomes: list[object] = []
        for entity_id, entity, found in zip(ids, entities, stored, strict=True):
            if found is not None and existing == "update":
                self._collection.changes(entity_id, entity)
            else:
                self._collection.entity(entity)
            if found is None or existing in ("replace", "update"):
                outcomes.append(True)
            else:
                outcomes.append(AlreadyExistsError(self._collection.name, entity_id))
        return outcomes

    # -- the end -----------------------------------------------------------------------------

    def _log_place(self, *, is_partial: bool = False) -> None:
        """Say how far the import came.

        Args:
            is_partial: some of the rows after the last one that is done may have been written, too.
        """
        if self._arguments.dry_run:
            return
        more = ", and possibly some of the next 1,000," if is_partial else ""
        skip = " --skip-existing" if is_partial and self._arguments.existing is None else ""
        output.log_line(
            f"the rows up to line {self._done_to:,} of {self._source}{more} are done; go on with "
            f"--from-line {self._done_to + 1}{skip}"
        )

    def _summarize(self) -> None:
        counts = self._counts
        hidden = 0 if self._arguments.verbose else counts.refused - _MAX_SHOWN
        if hidden > 0:
            output.log_line(f"and {hidden:,} more rows were refused (--verbose shows all)")
        parts = [f"{counts.imported:,} {self._collection.name} imported"]
        parts += [f"{counts.skipped:,} exist already"] if counts.skipped else []
        parts += [self._refusals()] if counts.refused else []
        begin = "dry run, nothing was written: " if self._arguments.dry_run else ""
        done: dict[str, Any] = {**msgspec.to_builtins(counts), "last_line": self._done_to}
        if self._arguments.dry_run:
            done["dry_run"] = True
        output.result(self._arguments, done, begin + ", ".join(parts))

    def _finish(self, *, interrupted: bool) -> int:
        failure, first = self._failure, self._arguments.from_line
        if failure is not None:
            self._done_to = failure.row.line - 1
        elif not interrupted and first > self._last_row + 1:
            last = f"the last row of {self._source} ends in line {self._last_row}"
            no_row = f"there is no row in {self._source}"
            raise InvalidInputError(f"--from-line {first}: {last if self._last_row else no_row}")
        self._summarize()
        if failure is not None:
            self._log_error(failure.row, failure.error)
            self._log_place(is_partial=failure.is_partial)
            return code_of(failure.error)
        if interrupted:
            self._log_place()
            output.log_line("interrupted")
            return INTERRUPTED
        return self._code


def _failure(rows: Sequence[Row], outcomes: Sequence[object]) -> _Failure | None:
    """The first failure of the store among the outcomes of the rows."""
    failed = [n for n, each in enumerate(outcomes) if _is_failure(each)]
    if not failed:
        return None
    errors = [cast("StorageError", outcomes[n]) for n in failed]
    is_partial = any(each.outcome_unknown for each in errors) or any(
        not isinstance(each, StorageError) for each in outcomes[failed[0] :]
    )
    return _Failure(rows[failed[0]], errors[0], is_partial)


def _is_failure(outcome: object) -> bool:
    """Whether the store failed, instead of having refused this row: the same row may be imported later."""
    return isinstance(outcome, StorageError) and (
        not is_refusal(outcome) or outcome.outcome_unknown or outcome.retryable
    )
