"""The commands on backups: backup, restore, backups.

Portable backups can be made of every store. For JSON stores, copies of the data files are supported,
too. Restoring one replaces the content of the store in one commit, so that other processes can keep
using it. Only if a store cannot be opened, its files are replaced, after they were copied.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct, to_builtins
from msgspec.json import encode

from hf_async_store.cli import output
from hf_async_store.cli.admin_commands import make_empty
from hf_async_store.cli.context import Context, path_of, run_work
from hf_async_store.cli.exit_codes import CONFLICT, BackupNotFoundError
from hf_async_store.cli.json_backup_reader import declarations_beside, read_backup
from hf_async_store.cli.json_files import JSONFiles, dated, remove
from hf_async_store.cli.progress import Bars
from hf_async_store.errors import CorruptionError, InvalidInputError
from hf_async_store.migration import backup_store, is_portable, restore_store
from hf_async_store.migration.backup_format import declarations_in
from hf_async_store.migration.store_checks import listed

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from hf_async_store.cli.json_backup_reader import Backup
    from hf_async_store.strategy import StorageStrategy


_PROGRESS_BYTES: Final = 4 << 20
"""A progress bar is shown from this number of bytes on."""


@contextmanager
def _progress(what: str, size: int = _PROGRESS_BYTES) -> Iterator[None]:
    with Bars({}, is_long=size >= _PROGRESS_BYTES) as bars:
        bars.advance(what)
        yield


# -- backup ---------------------------------------------------------------------------------


def backup(arguments: Namespace) -> int:
    if arguments.copy:
        return _copy(arguments)
    context = Context(arguments)
    destination = arguments.destination or context.config.migration.backup_location
    path_of(destination)

    async def work(store: StorageStrategy) -> int:
        with _progress("backup"):
            result = await backup_store(
                store,
                destination,
                keep=arguments.keep,
                allow_smaller=arguments.allow_smaller,
                leave_out=arguments.leave_out,
            )
        size = _bytes(Path(result.path))
        done = {
            "backup": result.path,
            "entities": result.counts,
            "digests": result.digests,
            "bytes": size,
            "removed": result.removed,
            "spared": result.spared,
            "left_out": result.left_out,
        }
        shown = ", ".join(f"{count:,} {name}" for name, count in result.counts.items())
        removed = f"; {len(result.removed)} older backups deleted" if result.removed else ""
        output.result(arguments, done, f"{shown} in {result.path} ({size:,} bytes){removed}")
        _log_left_out(result.left_out)
        if result.spared:
            output.log_line(
                f"{len(result.spared)} older backups were not deleted, because this backup, or each "
                "remaining one, holds far less than an older one. Check that this is the right "
                "store; if it is, repeat the command with --allow-smaller to delete them: "
                + listed(map(repr, result.spared))
            )
        return CONFLICT if result.spared else 0

    return context.run(work, needs_store=True)


def _copy(arguments: Namespace) -> int:
    """Copy the data files; the copy is itself a JSON store."""
    if arguments.keep is not None:
        raise InvalidInputError("--keep cannot be combined with --copy")
    context = Context(arguments)
    files = JSONFiles(context)
    target = _target(arguments.destination or context.config.migration.backup_location, files)

    async def work(store: StorageStrategy) -> int:
        with _progress("backup", files.size()):
            created = await files.copy_out(target)
        size = sum(each.stat().st_size for each in created)
        done = {"backup": str(target), "files": [str(each) for each in created], "bytes": size}
        output.result(arguments, done, f"{context.location()} copied to {target} ({size:,} bytes)")
        return 0

    return context.run(work, needs_store=True)


def _target(destination: str, files: JSONFiles) -> Path:
    """The path of the new file or folder for a destination.

    Raises:
        InvalidInputError: the path exists already.
    """
    target = path_of(destination)
    suffix = ".json" if files.manager.single else ""
    # The name must show whether the copy is compressed, like the names of data files.
    gzip_suffix = ".gz" if suffix and files.options.enable_compression else ""
    if destination.endswith("/") or target.is_dir():
        return dated(target, "backup", suffix + gzip_suffix)
    if suffix:
        target = target.with_name(target.name.removesuffix(".gz") + gzip_suffix)
    if target.exists() or target.is_symlink():
        raise InvalidInputError(f"{target} exists already; a backup needs a new name")
    return target


# -- backups --------------------------------------------------------------------------------


def backups(arguments: Namespace) -> int:
    context = Context(arguments)
    files = JSONFiles(context)
    kept = []
    for path in files.store.backups():
        with suppress(FileNotFoundError):  # a compaction has just deleted the oldest
            kept.append((path, path.stat()))
    kept.sort(key=lambda each: each[1].st_mtime_ns, reverse=True)
    rows = [
        {
            "backup": str(path),
            "written": datetime.fromtimestamp(stat.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "bytes": stat.st_size,
        }
        for path, stat in kept
    ]
    if not output.for_people(arguments):
        for row in rows:
            output.json_line(row)
    elif rows:
        from hf_async_store.cli.tables import show_plain

        show_plain(list(rows[0]), [[str(each) for each in row.values()] for row in rows])
    if rows:
        return 0

    async def none_yet(store: StorageStrategy) -> int:
        output.log_line(f"{context.location()} has not kept any backup yet")
        return 0

    return context.run(none_yet, needs_store=True)


# -- restore --------------------------------------------------------------------------------


def restore(arguments: Namespace) -> int:
    source = path_of(arguments.source)
    if is_portable(source):
        declared = run_work(arguments, declarations_in(source))
        return _restore_portable(arguments, Context(arguments, also=declared), source)
    context = Context(arguments, also=run_work(arguments, declarations_beside(source)))
    if not source.exists():
        raise BackupNotFoundError(
            f"the backup {source} does not exist; `{output.PROGRAM} backups` lists the backups that "
            "a JSON store has kept"
        )
    if not (source.is_file() or source.is_dir()):
        raise InvalidInputError(f"{source} is neither a file nor a folder, so it is not a backup")
    files = JSONFiles(context)
    if arguments.merge is not None:
        raise InvalidInputError(
            f"--merge can be used with portable backups only, and {source} is not a portable backup"
        )

    async def work(store: StorageStrategy) -> int:
        with _progress("restore", max(_bytes(source), files.size())):
            contents = await read_backup(source, files, context.schema)
            _refuse_left_out(source, contents, arguments.leave_out)
            done = await context.with_timeout(_Replacement(files, source, contents).run())
            await _make_empty_if_absent(context)
        _log_left_out(contents.left_out)
        shown = ", ".join(f"{count:,} {name}" for name, count in done["entities"].items())
        output.result(
            arguments,
            done,
            f"{context.location()} was restored from {source}: {shown}"
            + (f"; the previous content is kept in {done['before']}" if done["before"] else ""),
        )
        return 0

    return context.run(work, writes=True)


def _restore_portable(arguments: Namespace, context: Context, source: Path) -> int:
    restored = 0

    def count(entities: int) -> None:
        nonlocal restored
        restored += entities

    async def work(store: StorageStrategy) -> int:
        restoring = restore_store(
            store, source, merge=arguments.merge, leave_out=arguments.leave_out, advance=count
        )
        with _progress("restore", 8 * _bytes(source)):
            try:
                result = await context.with_timeout(restoring)
            except asyncio.CancelledError:
                rule = arguments.merge or "replace"
                output.log_line(
                    f"the restore of {source} is incomplete: {restored:,} entities are restored, "
                    f"and possibly some of the next batch; run it again with --merge {rule}"
                )
                raise
            await _make_empty_if_absent(context)
        shown = ", ".join(f"{each.written:,} {name}" for name, each in result.merged.items())
        rest = sum(each.unchanged + each.kept for each in result.merged.values())
        others = f"; {rest:,} entities were not changed" if rest else ""
        output.result(
            arguments,
            {
                "restored": str(source),
                "entities": to_builtins(result.merged),
                "left_out": result.left_out,
            },
            f"restored from {source}: {shown}{others}",
        )
        _log_left_out(result.left_out)
        return 0

    return context.run(work, writes=True)


class _Replacement(Struct):
    """Replaces the content of a JSON store by that of a backup."""

    files: JSONFiles
    source: Path
    backup: Backup

    async def run(self) -> dict[str, Any]:
        """Replace the content; returns the result that the command shows."""
        try:
            before = await self._commit()
        except CorruptionError as exc:
            before = await self._replace_files(exc)
        return {
            "restored": str(self.source),
            "entities": {name: len(each) for name, each in self.backup.data.items()},
            "before": None if before is None else str(before),
        }

    async def _commit(self) -> Path | None:
        """Replace the content in one commit; returns the file or folder with the previous content."""
        before: Path | None = None
        async with self.files.store.acquire_write_lock():
            current = await self.files.store.read_file()
            data = {**current, **self.backup.data}
            if any(current.values()) and encode(data) != encode(current):
                before = await self.files.keep(current)
            try:
                await self.files.store.write_file(data)
            except BaseException:
                if before is not None:
                    remove(before)
                raise
        await self.files.store.checkpoint()
        return before

    async def _replace_files(self, damage: CorruptionError) -> Path:
        """Replace files that cannot be opened; returns the folder with copies of the old files."""
        output.log_line(f"the store cannot be opened, so its files are replaced: {damage}")
        files = self.files
        folder = dated(files.folder, "damaged")
        # A compaction by a process that still holds the store in memory would replace them again.
        async with files.no_compaction():
            await files.copy_damaged(folder)
            contents = files.encode(self.backup.data)
            await files.replace_files(contents)
            if len(contents) == len(files.manager.names):
                await self.files.store.checkpoint(recover_from="file")
            else:
                # The journal may hold commits that are not in the other files. Then this raises an
                # error that says so.
                await self.files.store.read_file()
        return folder


async def _make_empty_if_absent(context: Context) -> None:
    """Create the store, if the backup held no entities, and therefore nothing was written."""
    if not context.existed and not await context.store.exists():
        await context.with_timeout(make_empty(context))


def _bytes(source: Path) -> int:
    files = source.iterdir() if source.is_dir() else [source]
    return sum(each.stat().st_size for each in files)


def _refuse_left_out(source: Path, backup: Backup, leave_out: list[str]) -> None:
    missing = [each for each in backup.left_out if each not in leave_out]
    if missing:
        raise InvalidInputError(
            f"{source} holds undeclared collections: {listed(map(repr, missing))}; nothing was changed. "
            "Declare them (--collections MODULE:NAME), or exclude them from the restore "
            "(--leave-out NAME)"
        )


def _log_left_out(names: list[str]) -> None:
    if names:
        output.log_line(f"note: left out, as requested: {listed(map(repr, names))}")
