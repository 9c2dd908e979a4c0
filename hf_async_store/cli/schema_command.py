"""The command that compares a store with the declared collections: schema plan, apply, check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from hf_async_store.cli import output
from hf_async_store.cli.context import Context, repeatable
from hf_async_store.cli.declared import VARIABLE, imported, named_collections
from hf_async_store.cli.exit_codes import CONFLICT, report
from hf_async_store.cli.progress import Bars
from hf_async_store.errors import ConfigurationError, SchemaMismatchError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from hf_async_store.driver import SchemaChange
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.transforms import Transforms


def schema(arguments: Namespace) -> int:
    context = Context(arguments)
    if named_collections(arguments, [context.config]) is None:
        raise ConfigurationError(
            "the collections to compare the store with are not named; give --collections "
            f"MODULE:NAME (those of the spec are hf_async_store:HOST_FACTORY), set {VARIABLE}, or "
            "set storage.collections in the configuration file"
        )

    if arguments.transform and arguments.action != "apply":
        raise ConfigurationError("--transform: only for schema apply")
    transforms = _transforms(arguments.transform) if arguments.transform else None

    async def work(store: StorageStrategy) -> int:
        if arguments.action == "apply":
            applied = _apply(store, transforms, complete=arguments.complete)
            try:
                number = await context.with_timeout(applied)
            except SchemaMismatchError as exc:  # refused because of the stored data
                report(exc, verbose=arguments.verbose)
                return CONFLICT
            if transforms is not None:
                shown = f"{number:,} entities transformed"
                output.result(arguments, {"transformed": number}, shown)
        changes = await store.schema_changes()
        _show(arguments, changes)
        if arguments.action == "check" and any(
            each.kind not in arguments.allow for each in changes
        ):
            return CONFLICT
        return 0

    return context.run(work, writes=arguments.action == "apply")


def _transforms(named: str) -> Transforms:
    source = f"--transform {named}"
    name, value = imported(named, source)
    if not isinstance(value, Mapping) or not all(map(callable, value.values())):
        raise ConfigurationError(
            f"{source}: expected {name} to be a dict of functions by collection, got "
            f"{type(value).__name__}"
        )
    return value


async def _apply(store: StorageStrategy, transforms: Transforms | None, *, complete: bool) -> int:
    done: dict[str, int] = {}
    with Bars({}) as bars, repeatable("run `schema apply` again to complete it"):

        def progress(change: SchemaChange, count: int, total: int | None) -> None:
            del total  # a bar without a total shows the count and the rate
            what = _title(change)
            bars.advance(what, count - done.get(what, 0))
            done[what] = count

        transformed = await store.apply_schema(progress, complete, transforms)
    # Not on stdout, on which is what remains.
    output.log_line(f"applied: {', '.join(done)}" if done else "applied: nothing was missing")
    return transformed


def _title(change: SchemaChange) -> str:
    place = f"{change.collection}.{change.name}" if change.name else change.collection
    return f"{change.kind} {place}"


def _show(arguments: Namespace, changes: Sequence[SchemaChange]) -> None:
    if not output.for_people(arguments):
        for each in changes:
            output.json_line(msgspec.to_builtins(each))
        return
    if not changes:
        output.line("the store is as declared")
    for each in changes:
        waits = " (writers wait)" if each.blocking else ""
        output.line(f"{_title(each)}: {each.detail}{waits}")
