"""The commands on a whole store: init, purge, health, describe, create-tables, checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hf_async_store.cli import output
from hf_async_store.cli.context import Context
from hf_async_store.cli.declared import named_collections
from hf_async_store.cli.exit_codes import STORAGE
from hf_async_store.cli.json_files import JSONFiles, as_json
from hf_async_store.config import JSONConfig
from hf_async_store.errors import ConfigurationError, StorageError

if TYPE_CHECKING:
    from argparse import Namespace

    from hf_async_store.strategy import StorageStrategy


def init(arguments: Namespace) -> int:
    context = Context(arguments)

    async def work(store: StorageStrategy) -> int:
        files = await make_empty(context)
        if named_collections(arguments, [context.config]) is not None:
            # Else the store would remember them only from its first write on.
            await store.engine.remember(context.schema.values())
        location = context.location()
        if isinstance(context.config.options, JSONConfig):
            action = f"created {', '.join(files)}" if files else "exists already, nothing to do"
            output.result(arguments, {"store": location, "created": files}, f"{location}: {action}")
        else:
            output.result(arguments, {"store": location, "ready": True}, f"{location}: ready")
        return 0

    return context.run(work)


async def make_empty(context: Context) -> list[str]:
    """Create an empty store, if none exists; returns the files created for a JSON store."""
    if isinstance(context.config.options, JSONConfig):
        return [str(each) for each in await JSONFiles(context).make_empty()]
    # Tables are created at the first use of a store, which this is.
    await context.store.test_connection()
    return []


def purge(arguments: Namespace) -> int:
    context = Context(arguments)
    collection: str | None = arguments.collection

    async def work(store: StorageStrategy) -> int:
        removed = await context.with_timeout(store.purge_expired(collection, limit=arguments.limit))
        output.result(arguments, {"removed": removed}, f"removed {removed:,} expired entities")
        return 0

    return context.run(work, writes=True, needs_store=True)


def health(arguments: Namespace) -> int:
    context = Context(arguments, tolerant=True)

    async def work(store: StorageStrategy) -> int:
        report = await store.health()
        output.value(arguments, report)
        problems = report["problems"]
        assert isinstance(problems, list)
        for each in problems:
            output.log_line(f"problem: {each}")
        return STORAGE if problems else 0

    return context.run(work, needs_store=True)


def describe(arguments: Namespace) -> int:
    context = Context(arguments, tolerant=True)

    async def work(store: StorageStrategy) -> int:
        description = store.describe()
        tables: dict[str, Any] = {}
        compare = getattr(store, "compare_tables", None)
        if compare is not None:
            # Tables that were created earlier may differ from the current declarations.
            try:
                tables = await compare()
                description["tables"] = tables
            except StorageError:
                output.value(arguments, description)
                raise
        output.value(arguments, description)
        for table in tables.values():
            for each in table["differences"]:
                output.log_line(f"differs: {each}")
        return 0

    return context.run(work)


def create_tables(arguments: Namespace) -> int:
    context = Context(arguments)
    create = getattr(context.store, "create_tables", None)
    if create is None:
        engine = context.store.capabilities.engine
        raise ConfigurationError(
            f"create-tables is only for stores whose tables are created in advance (DynamoDB); the "
            f"engine of this store is {engine}"
        )

    async def work(store: StorageStrategy) -> int:
        created: list[str] = await create()
        message = "\n".join(created) or "all tables and indexes exist already, nothing to do"
        output.result(arguments, {"created": created}, message)
        return 0

    return context.run(work)


_RECOVERED_FROM: Final = {
    "file": "the data file",
    "journal": "the journal",
    "salvage": "the readable part of the journal",
}


def checkpoint(arguments: Namespace) -> int:
    context = Context(arguments)
    json_store = as_json(context.store)
    source: str | None = arguments.recover_from

    async def work(store: StorageStrategy) -> int:
        await json_store.checkpoint(arguments.recover_from)
        location = context.location()
        done: dict[str, Any] = {"store": location, "recovered_from": source}
        recovered = f", recovered from {_RECOVERED_FROM[source]}" if source else ""
        output.result(arguments, done, f"{location}: all commits are in the data files{recovered}")
        return 0

    return context.run(work, needs_store=True)
