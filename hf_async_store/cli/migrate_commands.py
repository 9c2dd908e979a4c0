"""The commands that migrate and compare stores: migrate, migrateRepository, verify."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.cli import output
from hf_async_store.cli.arguments import STORE_VARIABLE
from hf_async_store.cli.context import declared_schema, repeatable, run_work
from hf_async_store.cli.exit_codes import CONFLICT, BackupNotFoundError
from hf_async_store.cli.progress import Bars
from hf_async_store.config import SQLConfig, StorageConfig, load_config
from hf_async_store.errors import ConfigurationError, VerificationError
from hf_async_store.migration import MigrationTool, check_portable, compare_stores, require_store
from hf_async_store.migration.tool import refuse_different
from hf_async_store.redaction import redact_url
from hf_async_store.strategies import open_store

if TYPE_CHECKING:
    from argparse import Namespace

    from hf_async_store.config import MigrationConfig
    from hf_async_store.migration import Comparison, MigrationReport
    from hf_async_store.schema import Collection
    from hf_async_store.strategy import StorageStrategy

_SQL_TYPES: Final = ("sqlite", "postgresql")


def migrate(arguments: Namespace) -> int:
    """Migrate from one store to another, each given as a URL or a configuration file."""
    source = load_config(arguments.source)
    target = load_config(arguments.target)
    config = load_config(Path(arguments.config)) if arguments.config else source
    return _run(arguments, source, target, config.migration)


def migrate_repository(arguments: Namespace) -> int:
    """Migrate between stores given by their types; configuration files have a block for each."""
    common = arguments.config or os.environ.get(STORE_VARIABLE)
    source = _of_type(arguments.source_type, arguments.source_config or common, "--source-config")
    target = _of_type(arguments.target_type, arguments.target_config or common, "--target-config")
    return _run(arguments, source, target, source.migration)


def _of_type(name: str, location: str | None, option: str) -> StorageConfig:
    """The configuration of one store type from a file that may hold those of other types, too."""
    if location is None:
        raise ConfigurationError(
            f"the {name} store is not configured: give --config FILE with a block for each of the "
            f"two types, or {option} FILE"
        )
    config = load_config(location)
    options = config.block("sql" if name in _SQL_TYPES else name)
    if name in _SQL_TYPES and (not isinstance(options, SQLConfig) or options.type != name):
        raise ConfigurationError(
            f"{redact_url(location)}: its sql_strategy is not of the type {name!r}; if source and "
            "target are both SQL, give --source-config and --target-config"
        )
    strategy = "sql" if name in _SQL_TYPES else name
    return StorageConfig(strategy=strategy, options=options, migration=config.migration)


def _configured(arguments: Namespace, config: MigrationConfig) -> MigrationConfig:
    """The migration block, overridden by the options of the command line."""
    overrides = {
        "batch_size": arguments.batch_size,
        "parallel_workers": arguments.workers,
        "backup_location": arguments.backup_location,
        "create_backup": False if arguments.no_backup else None,
        "validate_after_migration": False if arguments.no_verify else None,
        "cleanup_source": True if arguments.cleanup_source else None,
    }
    return msgspec.structs.replace(
        config, **{name: value for name, value in overrides.items() if value is not None}
    )


_INCOMPLETE: Final = "the migration is incomplete; if anything was copied, --resume continues it"


def _run(
    arguments: Namespace, source: StorageConfig, target: StorageConfig, config: MigrationConfig
) -> int:
    schema = _collections(arguments, source, target)
    tool = MigrationTool(
        source,
        target,
        _configured(arguments, config),
        collections=schema,
        merge=arguments.merge,
        leave_out=arguments.leave_out,
    )

    async def work() -> MigrationReport:
        async with tool:
            await require_store(tool.source, "the source")
            with Bars(await _sizes(tool.source, schema)) as bars:
                tool.advance = bars.advance
                if arguments.dry_run:
                    return await tool.migrate(dry_run=True)
                with repeatable(_INCOMPLETE):
                    return await (tool.resume() if arguments.resume else tool.migrate())

    report = run_work(arguments, work())
    _show_report(arguments, report)
    return 0 if report.ok else CONFLICT


def _collections(
    arguments: Namespace, source: StorageConfig, target: StorageConfig
) -> tuple[Collection, ...]:
    return tuple(declared_schema(arguments, source, target).values())


async def _sizes(store: StorageStrategy, schema: tuple[Collection, ...]) -> dict[str, int]:
    """The number of entities of each collection, if counting is cheaper than reading."""
    if store.capabilities.query_isolation != "snapshot":
        return {}
    return {each.name: await store.count_entities(each.name) for each in schema}


def _show_report(arguments: Namespace, report: MigrationReport) -> None:
    if not output.for_people(arguments):
        output.json_line({**msgspec.to_builtins(report), "ok": report.ok})
    else:
        from hf_async_store.cli.tables import show_plain

        headings = ["collection", "read", "written", "unchanged", "kept", "cleaned"]
        rows = [
            [name, *(f"{getattr(each, column):,}" for column in headings[1:])]
            for name, each in report.collections.items()
        ]
        show_plain(headings, rows)
        output.line(_sentence(report))
    for each in report.notices:
        output.log_line(f"note: {each}")
    for each in report.left_out:
        output.log_line(f"note: not migrated, as requested: {each}")
    for each in report.problems:
        output.log_line(f"incompatible: {each}")
    if report.more_problems:
        output.log_line("and more incompatibilities")


def _sentence(report: MigrationReport) -> str:
    if report.dry_run:
        return (
            "dry run: nothing was written; everything is compatible"
            if report.ok
            else "dry run: nothing was written; not everything is compatible"
        )
    parts = [f"{report.source} to {report.target} in {report.seconds:,.1f} s"]
    parts.append("verified" if report.verified else "not verified")
    parts += [f"backup in {report.backup}"] if report.backup else []
    parts += ["the source is empty now"] if report.cleaned else []
    return "; ".join(parts)


# -- verify ---------------------------------------------------------------------------------


def verify(arguments: Namespace) -> int:
    """Compare two stores, or verify a backup."""
    if arguments.backup is not None:
        return _verify_backup(arguments)
    if arguments.source is None or arguments.target is None:
        raise ConfigurationError("give --from URL and --to URL, or a backup file")
    configs = [load_config(each) for each in (arguments.source, arguments.target)]
    schema = _collections(arguments, *configs)

    async def work() -> Comparison:
        async with AsyncExitStack() as stack:
            source, target = [
                await stack.enter_async_context(open_store(each, collections=schema))
                for each in configs
            ]
            for store, label in ((source, "the source"), (target, "the target")):
                await require_store(store, label)
            sizes = await _sizes(source, schema)
            with Bars({"verify": 2 * sum(sizes.values())} if sizes else {}) as bars:
                return await compare_stores(
                    source,
                    target,
                    leave_out=arguments.leave_out,
                    advance=partial(bars.advance, "verify"),
                )

    compared = run_work(arguments, work())
    _show_comparison(arguments, compared)
    try:
        refuse_different(compared)
    except VerificationError as exc:
        for each in exc.differences:
            output.log_line(each)
        if compared.more:
            output.log_line("and more differences")
        return CONFLICT
    return 0


def _show_comparison(arguments: Namespace, compared: Comparison) -> None:
    if not output.for_people(arguments):
        output.json_line({**msgspec.to_builtins(compared), "equal": compared.equal})
        return
    from hf_async_store.cli.tables import show_plain

    rows = [
        [name, f"{each.source_count:,}", f"{each.target_count:,}", "yes" if each.equal else "NO"]
        for name, each in compared.collections.items()
    ]
    show_plain(["collection", "source", "target", "equal"], rows)


def _verify_backup(arguments: Namespace) -> int:
    path = Path(arguments.backup)
    if not path.exists():
        raise BackupNotFoundError(f"the backup {path} does not exist")
    digests = run_work(arguments, check_portable(path))
    counts = {name: each.count for name, each in digests.items()}
    shown = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    output.result(
        arguments,
        {"backup": str(path), "entities": counts, "ok": True},
        f"{path} is complete and was not altered: {shown}",
    )
    return 0
