"""The commands on backups: backup, restore, backups.

The portable file is for every store. Beside it stand, for JSON stores, copies of the data files: their
`restore` replaces the content by one commit, so that others may go on working meanwhile. Only a
store that cannot be opened has its files replaced, after a copy of everything as it was.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec import to_builtins
from msgspec.json import encode

from hf_async_store.cli import output
from hf_async_store.cli.admin_commands import make_empty
from hf_async_store.cli.backup_reader import listed, read_backup
from hf_async_store.cli.context import Context, path_of
from hf_async_store.cli.exit_codes import CONFLICT, BackupNotFoundError
from hf_async_store.cli.json_files import JSONFiles, dated, remove
from hf_async_store.errors import CorruptionError, InvalidInputError
from hf_async_store.migration import backup_store, is_portable, restore_store

if TYPE_CHECKING:
    from argparse import Namespace

    from hf_async_store.cli.backup_reader import Backup
    from hf_async_store.strategy import StorageStrategy


_LONG: Final = 4 << 20
"""From so many bytes on a person begins to wonder."""


# -- backup ---------------------------------------------------------------------------------


def backup(arguments: Namespace) -> int:
    if arguments.copy:
        return _copy(arguments)
    context = Context(arguments)
    place = arguments.destination or context.config.migration.backup_location
    path_of(place)

    async def work(store: StorageStrategy) -> int:
        with output.progress("backup", is_long=True):
            made = await backup_store(
                store,
                place,
                keep=arguments.keep,
                allow_smaller=arguments.allow_smaller,
                leave_out=arguments.leave_out,
            )
        size = _bytes(Path(made.path))
        done = {
            "backup": made.path,
            "entities": made.counts,
            "digests": made.digests,
            "bytes": size,
            "removed": made.removed,
            "spared": made.spared,
            "left_out": made.left_out,
        }
        shown = ", ".join(f"{count:,} {name}" for name, count in made.counts.items())
        gone = f"; {len(made.removed)} older removed" if made.removed else ""
        output.result(arguments, done, f"{shown} in {made.path} ({size:,} bytes){gone}")
        _tell_left_out(made.left_out)
        if made.spared:
            output.log_line(
                f"{len(made.spared)} older backups beyond --keep stay, because they hold far more "
                "than this one; is it the right store? If so, --allow-smaller removes them: "
                + listed(made.spared)
            )
        return CONFLICT if made.spared else 0

    return context.run(work, needs_store=True)


def _copy(arguments: Namespace) -> int:
    """A copy of the data files, which is a JSON store itself."""
    if arguments.keep is not None:
        raise InvalidInputError("--keep does not go with --copy")
    context = Context(arguments)
    files = JSONFiles(context)
    target = _target(arguments.destination or context.config.migration.backup_location, files)

    async def work(store: StorageStrategy) -> int:
        with output.progress("backup", is_long=files.size() > _LONG):
            made = await files.copy_out(target)
        size = sum(each.stat().st_size for each in made)
        done = {"backup": str(target), "files": [str(each) for each in made], "bytes": size}
        output.result(arguments, done, f"{context.location()} copied to {target} ({size:,} bytes)")
        return 0

    return context.run(work, needs_store=True)


def _target(destination: str, files: JSONFiles) -> Path:
    """The new file or folder that a destination stands for.

    Raises:
        InvalidInputError: something is there.
    """
    target = path_of(destination)
    plain = ".json" if files.manager.single else ""
    # By its name the copy will be known for what it is, plain or gzip.
    packed = ".gz" if plain and files.options.enable_compression else ""
    if destination.endswith("/") or target.is_dir():
        return dated(target, "backup", plain + packed)
    if plain:
        target = target.with_name(target.name.removesuffix(".gz") + packed)
    if target.exists() or target.is_symlink():
        raise InvalidInputError(f"{target} is there already; a backup needs a new name")
    return target


# -- backups --------------------------------------------------------------------------------


def backups(arguments: Namespace) -> int:
    context = Context(arguments)
    files = JSONFiles(context)
    found = []
    for path in files.store.backups():
        with suppress(FileNotFoundError):  # a fold has just dropped the oldest
            found.append((path, path.stat()))
    found.sort(key=lambda each: each[1].st_mtime_ns, reverse=True)
    rows = [
        {
            "backup": str(path),
            "written": datetime.fromtimestamp(stat.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "bytes": stat.st_size,
        }
        for path, stat in found
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
        output.log_line(f"{context.location()} has kept no backups yet")
        return 0

    return context.run(none_yet, needs_store=True)


# -- restore --------------------------------------------------------------------------------


def restore(arguments: Namespace) -> int:
    context = Context(arguments)
    source = path_of(arguments.source)
    if is_portable(source):
        return _restore_portable(arguments, context, source)
    if not source.exists():
        raise BackupNotFoundError(
            f"there is no backup {source}; `{output.PROGRAM} backups` lists what the store kept"
        )
    if not (source.is_file() or source.is_dir()):
        raise InvalidInputError(f"{source} is neither a file nor a folder, so it is no backup")
    files = JSONFiles(context)
    if arguments.merge is not None:
        raise InvalidInputError(f"--merge is for files that `backup` made, and {source} is none")

    async def work(store: StorageStrategy) -> int:
        with output.progress("restore", is_long=max(_bytes(source), files.size()) > _LONG):
            found = await read_backup(source, files, context.schema)
            _refuse_left_out(source, found, arguments.leave_out)
            done = await context.watched(_Restoring(files, source, found).run())
            await _make_empty_if_absent(context)
        _tell_left_out(found.left_out)
        shown = ", ".join(f"{count:,} {name}" for name, count in done["entities"].items())
        output.result(
            arguments,
            done,
            f"{context.location()} holds what {source} does: {shown}"
            + (f"; what was there is kept in {done['before']}" if done["before"] else ""),
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
        with output.progress("restore", is_long=_bytes(source) > _LONG // 8):
            try:
                found = await context.watched(restoring)
            except asyncio.CancelledError:
                output.log_line(
                    f"the restore of {source} is incomplete: {restored:,} entities are restored, "
                    "and perhaps some of the batch after them; run it again with --merge replace"
                )
                raise
            await _make_empty_if_absent(context)
        shown = ", ".join(f"{each.written:,} {name}" for name, each in found.merged.items())
        rest = sum(each.unchanged + each.kept for each in found.merged.values())
        others = f"; {rest:,} others stayed as they were" if rest else ""
        output.result(
            arguments,
            {
                "restored": str(source),
                "entities": to_builtins(found.merged),
                "left_out": found.left_out,
            },
            f"restored from {source}: {shown}{others}",
        )
        _tell_left_out(found.left_out)
        return 0

    return context.run(work, writes=True)


class _Restoring:
    """The replacement of a store's content."""

    def __init__(self, files: JSONFiles, source: Path, found: Backup) -> None:
        self._files = files
        self._store = files.store
        self._source = source
        self._found = found
        self._is_whole = len(found.texts) == len(files.manager.names)

    async def run(self) -> dict[str, Any]:
        """What was done, as the command shows it."""
        try:
            before = await self._commit()
        except CorruptionError as exc:
            before = await self._replace_files(exc)
        return {
            "restored": str(self._source),
            "entities": {name: len(each) for name, each in self._found.data.items()},
            "before": None if before is None else str(before),
        }

    async def _commit(self) -> Path | None:
        """Replace the content as one commit; the file or folder that keeps what was there."""
        before: Path | None = None
        async with self._store.acquire_write_lock():
            current = await self._store.read_file()
            data = {**current, **self._found.data}
            if any(current.values()) and encode(data) != encode(current):
                before = await self._files.keep(current)
            try:
                await self._store.write_file(data)
            except BaseException:
                if before is not None:
                    remove(before)
                raise
        await self._store.checkpoint()
        return before

    async def _replace_files(self, damage: CorruptionError) -> Path:
        """Replace files that cannot be opened; the folder that keeps them as they were."""
        output.log_line(f"the store cannot be opened, so its files are replaced: {damage}")
        files = self._files
        aside = dated(files.folder, "damaged")
        # A fold by a process that still has the store in memory would replace them again.
        async with files.no_folding():
            await files.set_aside(aside)
            await files.place(self._found.texts)
            if self._is_whole:
                await self._store.checkpoint(recover_from="file")
            else:
                # The journal may hold what other files lack. If it does, this raises and says so.
                await self._store.read_file()
        return aside


async def _make_empty_if_absent(context: Context) -> None:
    """A backup without entities writes nothing; also after it, there is a store."""
    if not context.was_there and not await context.store.exists():
        await context.watched(make_empty(context))


def _bytes(source: Path) -> int:
    found = source.iterdir() if source.is_dir() else [source]
    return sum(each.stat().st_size for each in found)


def _refuse_left_out(source: Path, found: Backup, leave_out: list[str]) -> None:
    missing = [each for each in found.left_out if each not in leave_out]
    if missing:
        raise InvalidInputError(
            f"{source} holds what no collection declares: {listed(missing)}; nothing was changed. "
            "Declare it (--collections MODULE:NAME), or say that it is not restored "
            "(--leave-out NAME)"
        )


def _tell_left_out(names: list[str]) -> None:
    if names:
        output.log_line(f"note: left out, as requested: {listed(names)}")
