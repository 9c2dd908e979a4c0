"""The commands on entities: put, get, update, delete, query, count, update-where, delete-where."""

from __future__ import annotations

import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from hf_async_store.changes import ANY
from hf_async_store.cli import output
from hf_async_store.cli.context import Context, opened_stdin, path_of
from hf_async_store.cli.exit_codes import NOT_FOUND, is_refusal, report
from hf_async_store.errors import BatchError, EntityNotFoundError, InvalidInputError, StorageError
from hf_async_store.values import VERSION

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Sequence

    from hf_async_store.changes import Expect
    from hf_async_store.cli.filter_syntax import EntityInput
    from hf_async_store.query import Filters, Path
    from hf_async_store.schema import Collection
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.values import Entity

_CHUNK_SIZE: Final = 1000
"""Number of entities that are written between two steps of the progress bar, about one commit."""

_READ_BYTES: Final = 1 << 16
_MIN_SIMILARITY: Final = 0.8
"""Of an undeclared field to a declared one, for a note; 1 is equality (see difflib)."""


# -- get ------------------------------------------------------------------------------------


def get(arguments: Namespace) -> int:
    context = Context(arguments)
    collection = context.collection()

    async def work(store: StorageStrategy) -> int:
        entities = await store.get_entities(collection.name, arguments.ids)
        missing = 0
        for entity_id, entity in zip(arguments.ids, entities, strict=True):
            if entity is None:
                missing += 1
                report(EntityNotFoundError(collection.name, entity_id), verbose=False)
            else:
                output.value(arguments, entity)
        return NOT_FOUND if missing else 0

    return context.run(work, needs_store=True)


# -- put ------------------------------------------------------------------------------------


def put(arguments: Namespace) -> int:
    context = Context(arguments)
    collection = context.collection(needs_store=False)
    if arguments.create and arguments.expected_version is not None:
        raise InvalidInputError("give either --create or --expected-version, not both")
    # Read before the event loop runs, so that Ctrl-C interrupts reading from a keyboard.
    inputs = _read_inputs(arguments)
    _check(inputs, collection)
    _note_undeclared(collection, (name for each in inputs for name in each.entity))
    if isinstance(arguments.expected_version, int) and len(inputs) > 1:
        raise InvalidInputError(
            f"--expected-version N can be given for one object only, not for {len(inputs):,}"
        )
    entities = [each.entity for each in inputs]
    expected = arguments.expected_version
    return _Put(
        context, collection, entities, arguments.create or expected == "absent", expected
    ).run()


def _read_inputs(arguments: Namespace) -> list[EntityInput]:
    from hf_async_store.cli.filter_syntax import entities_of

    source: str | None = arguments.source
    if source is not None and arguments.file is not None:
        raise InvalidInputError("give only one of: the JSON, - for stdin, or --file FILE")
    if arguments.file is not None:
        return entities_of(_read(arguments.file), arguments.file)
    if source == "-" or (source is None and sys.stdin is not None and not sys.stdin.isatty()):
        # Read in chunks: during one long read, a signal that arrives between two of its system
        # calls would not be handled at once.
        stdin = opened_stdin()
        return entities_of(b"".join(iter(lambda: stdin.read1(_READ_BYTES), b"")), "stdin")
    if source is None:
        raise InvalidInputError("there is no input: give the JSON, - for stdin, or --file FILE")
    try:
        return entities_of(source.encode(errors="surrogatepass"), "the JSON argument")
    except InvalidInputError as exc:
        if not source.lstrip().startswith(("{", "[")):
            raise InvalidInputError(f"{exc}; to read a file, give --file {source[:80]}") from exc
        raise


def _read(path: str) -> bytes:
    try:
        return path_of(path).read_bytes()
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise InvalidInputError(f"cannot read {path}: {reason}") from exc


def _check(inputs: Sequence[EntityInput], collection: Collection) -> None:
    """Check all entities before anything is written; an error says where the entity was read."""
    for position, entity in inputs:
        try:
            collection.entity(entity)
        except InvalidInputError as exc:
            raise exc.at(position) from exc


def _note_undeclared(collection: Collection, targets: Iterable[str | Path]) -> None:
    """Name the fields that are probably misspelt: not declared, but very similar to declared ones."""
    names = {each if isinstance(each, str) else str(each.parts[0]) for each in targets}
    undeclared = names - {*collection.fields, VERSION}
    if not undeclared or collection.open:
        return
    from difflib import get_close_matches

    for name in sorted(undeclared):
        for near in get_close_matches(name, collection.fields, n=1, cutoff=_MIN_SIMILARITY):
            output.log_line(f"note: {name!r} is not declared; did you mean {near!r}?")


class _Put(Struct):
    """Writes all entities of a `put` command, chunk by chunk."""

    context: Context
    collection: Collection
    entities: list[dict[str, Any]]
    create: bool
    expected: Any
    outcomes: list[int | bool | StorageError] = []

    def run(self) -> int:
        status = self.context.run(self._put, writes=True)
        stored = [each for each in self.outcomes if not isinstance(each, StorageError)]
        if stored and not self.context.existed:
            output.log_line(f"note: a new store was created at {self.context.location()}")
        return status

    async def _put(self, store: StorageStrategy) -> int:
        from asyncio import CancelledError

        from hf_async_store.cli.progress import Bars

        chunks = [
            self.entities[start : start + _CHUNK_SIZE]
            for start in range(0, len(self.entities), _CHUNK_SIZE)
        ]
        count = len(self.entities)
        what = f"put {self.collection.name}"
        with Bars({what: count}, is_long=len(chunks) > 1) as bars:
            try:
                bars.advance(what)
                for chunk in chunks:
                    stored = await self._put_chunk(store, chunk)
                    if self._all_failed(len(chunk)):
                        break
                    bars.advance(what, stored)
            except (CancelledError, StorageError):
                self._log_progress()
                raise
        return self._finish()

    async def _put_chunk(self, store: StorageStrategy, chunk: list[dict[str, Any]]) -> int:
        """Returns how many of the entities were stored."""
        name = self.collection.name
        timeout = self.context.remaining_time()
        try:
            if self.create:
                versions = await store.create_entities(name, chunk, timeout=timeout)
            else:
                first = chunk[0][self.collection.key]
                expected = None if self.expected is None else {first: self.expected}
                versions = await store.save_entities(name, chunk, expected, timeout=timeout)
        except BatchError as exc:
            self.outcomes += exc.outcomes
            return sum(not isinstance(each, StorageError) for each in exc.outcomes)
        self.outcomes += versions
        return len(versions)

    def _all_failed(self, size: int) -> bool:
        """Whether the last `size` writes failed because of the store, so that others would, too."""
        return all(
            isinstance(each, StorageError) and not is_refusal(each)
            for each in self.outcomes[-size:]
        )

    def _log_progress(self) -> None:
        done = sum(not isinstance(each, StorageError) for each in self.outcomes)
        if len(self.entities) > 1:
            output.log_line(
                f"{done:,} of {len(self.entities):,} entities were stored before the command ended"
            )

    def _finish(self) -> int:
        key = self.collection.key
        stored = [
            {key: entity[key], VERSION: outcome}
            for entity, outcome in zip(self.entities, self.outcomes, strict=False)
            if not isinstance(outcome, StorageError)
        ]
        self._show(stored)
        if len(stored) == len(self.entities):
            return 0
        errors = [each for each in self.outcomes if isinstance(each, StorageError)]
        if len(self.entities) == 1:
            raise errors[0]
        remaining = len(self.entities) - len(self.outcomes)
        if remaining:
            output.log_line(f"{remaining:,} entities were not written")
        raise BatchError(f"{len(errors)} failed", self.outcomes) from errors[0]

    def _show(self, stored: list[dict[str, Any]]) -> None:
        if not output.for_people(self.context.arguments):
            for each in stored:
                output.json_line(each)
        elif len(stored) == 1:
            output.line(
                f"{_named(self.collection, stored[0])} stored, version {stored[0][VERSION]}"
            )
        elif stored:
            output.line(f"{len(stored):,} {self.collection.name} stored")


def _named(collection: Collection, entity: dict[str, Any]) -> str:
    return f"{collection.name} {entity[collection.key]}"


# -- update and delete ----------------------------------------------------------------------


def update(arguments: Namespace) -> int:
    from hf_async_store.cli.filter_syntax import changes_of

    context = Context(arguments)
    collection = context.collection()
    changes = changes_of(arguments.changes, arguments.remove, collection)
    _note_undeclared(collection, changes)

    async def work(store: StorageStrategy) -> int:
        version = await store.update_entity(
            collection.name,
            arguments.id,
            changes,
            expected_version=_expected(arguments),
            timeout=context.remaining_time(),
        )
        done = {collection.key: arguments.id, VERSION: version}
        output.result(arguments, done, f"{_named(collection, done)} updated, version {version}")
        return 0

    return context.run(work, writes=True, needs_store=True)


def delete(arguments: Namespace) -> int:
    context = Context(arguments)
    collection = context.collection()
    if arguments.expected_version is not None and len(arguments.ids) > 1:
        raise InvalidInputError("--expected-version can be given for one id only")

    async def work(store: StorageStrategy) -> int:
        expected = _expected(arguments)
        try:
            outcomes: Sequence[Any] = await store.delete_entities(
                collection.name,
                arguments.ids,
                None if expected is ANY else {arguments.ids[0]: expected},
                timeout=context.remaining_time(),
            )
        except BatchError as exc:
            if len(arguments.ids) == 1 and isinstance(exc.outcomes[0], StorageError):
                raise exc.outcomes[0] from exc
            _show_deleted(arguments, collection, exc.outcomes)
            raise
        return _show_deleted(arguments, collection, outcomes)

    return context.run(work, writes=True, needs_store=True)


def _show_deleted(arguments: Namespace, collection: Collection, outcomes: Sequence[Any]) -> int:
    status = 0
    for entity_id, outcome in zip(arguments.ids, outcomes, strict=True):
        if outcome is True:
            shown = {collection.key: entity_id, "deleted": True}
            output.result(arguments, shown, f"{_named(collection, shown)} deleted")
        elif outcome is False:
            status = report(EntityNotFoundError(collection.name, entity_id), verbose=False)
    return status


def update_where(arguments: Namespace) -> int:
    from hf_async_store.cli.filter_syntax import changes_of, filters_of, order_of

    context = Context(arguments)
    collection = context.collection()
    filters = filters_of(arguments.filters, collection)
    changes = changes_of(arguments.changes, arguments.remove, collection)
    _note_undeclared(collection, changes)
    order = order_of(arguments.order, collection)

    async def work(store: StorageStrategy) -> int:
        number = await context.with_timeout(
            store.update_where(
                collection.name, filters, changes, order_by=order, limit=arguments.limit
            )
        )
        output.result(arguments, {"updated": number}, f"{number:,} {collection.name} updated")
        return 0

    return context.run(work, writes=True, needs_store=True)


def delete_where(arguments: Namespace) -> int:
    from hf_async_store.cli.filter_syntax import filters_of, order_of

    context = Context(arguments)
    collection = context.collection()
    filters = filters_of(arguments.filters, collection)
    order = order_of(arguments.order, collection)

    async def work(store: StorageStrategy) -> int:
        number = await context.with_timeout(
            store.delete_where(collection.name, filters, order_by=order, limit=arguments.limit)
        )
        output.result(arguments, {"deleted": number}, f"{number:,} {collection.name} deleted")
        return 0

    return context.run(work, writes=True, needs_store=True)


def _expected(arguments: Namespace) -> int | Expect:
    return ANY if arguments.expected_version is None else int(arguments.expected_version)


# -- query and count ------------------------------------------------------------------------


def query(arguments: Namespace) -> int:
    from hf_async_store.cli.filter_syntax import fields_of, filters_of, order_of

    context = Context(arguments)
    collection = context.collection()
    filters = filters_of(arguments.filters, collection)
    order = order_of(arguments.order, collection)
    fields = fields_of(arguments.fields, collection)

    async def work(store: StorageStrategy) -> int:
        if arguments.explain:
            plan = await store.explain_query(collection.name, filters, order, arguments.limit)
            output.value(arguments, plan)
            return 0
        rows = store.stream_entities(
            collection.name, filters, order, arguments.limit, fields=fields
        )
        async with aclosing(rows):
            if output.for_people(arguments):
                names = None if fields is None else [str(each.parts[0]) for each in fields]
                _show_table(collection, [each async for each in rows], names)
            else:
                async for each in rows:
                    output.json_line(each)
        return 0

    return context.run(work, needs_store=True)


def _show_table(collection: Collection, rows: list[Entity], fields: list[str] | None) -> None:
    if not rows:
        output.log_line(f"no {collection.name} match")
        return
    from hf_async_store.cli.tables import show_entities

    show_entities(collection, rows, fields)


def count(arguments: Namespace) -> int:
    from hf_async_store.cli.filter_syntax import aggregated_of, filters_of

    context = Context(arguments)
    collection = context.collection()
    filters = filters_of(arguments.filters, collection)
    option, word = arguments.aggregate or ("", "")
    field = aggregated_of(word, option, collection) if option else None

    async def work(store: StorageStrategy) -> int:
        if field is None:
            output.json_line(await store.count_entities(collection.name, filters))
        elif option == "--by":
            await _show_groups(store, collection.name, field, filters)
        else:
            compute = {"--sum": store.sum_of, "--min": store.min_of, "--max": store.max_of}[option]
            output.json_line(await compute(collection.name, field, filters))
        return 0

    return context.run(work, needs_store=True)


async def _show_groups(
    store: StorageStrategy, collection: str, field: Path, filters: Filters
) -> None:
    from hf_async_store.query import MISSING

    for value, number in await store.count_by(collection, field, filters):
        shown = {} if value is MISSING else {"value": value}
        output.json_line({**shown, "count": number})
