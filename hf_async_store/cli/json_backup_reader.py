"""Reading and checking a backup of a JSON store: a data file, or a folder of data files."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from hf_async_store.config import Filenames, JSONConfig
from hf_async_store.errors import CorruptionError, InvalidInputError
from hf_async_store.migration.store_checks import listed
from hf_async_store.schema import Collection, Schema
from hf_async_store.strategies.json.declarations_file import DeclarationsFile
from hf_async_store.strategies.json.engine import JSONEngine
from hf_async_store.strategies.json.files import FileManager
from hf_async_store.strategy import StorageStrategy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hf_async_store.cli.json_files import Data, JSONFiles


class Backup(NamedTuple):
    """A backup that was checked.

    Attributes:
        data: its entities by collection and id; only one collection for the file of one collection.
        left_out: its sections that no collection declares.
    """

    data: Data
    left_out: list[str]


class _BackupFiles(NamedTuple):
    """The files of a backup.

    Attributes:
        paths: the path of each file, by the name under which a copy of it is opened.
        names: the file name of each collection; None if one file holds all collections.
        only: the only collection in the backup, if it is the file of one collection.
    """

    paths: dict[str, Path]
    names: dict[str, str] | None
    only: str | None = None


async def read_backup(source: Path, files: JSONFiles, schema: Schema) -> Backup:
    """Read a whole backup and check it.

    Copies of its files are opened as a store in a temporary folder, so that nothing is written next
    to the backup. They are not links, because the store would follow them to the backup's folder.

    Raises:
        CorruptionError: the backup is damaged.
        InvalidInputError: it is not a backup of this store, or holds entities that are not valid.
    """
    backup_files = _files_of(source, files, schema)
    folder = Path(tempfile.mkdtemp(prefix="hf-async-store-"))
    try:
        await asyncio.to_thread(_copy, backup_files.paths, folder)
        data, left_out = await _read_copies(folder, backup_files, schema)
        _refuse_foreign(source, data, left_out, schema)
        _check(source, data, schema)
        return Backup(data, left_out)
    except CorruptionError as exc:
        message = str(exc)
        for name, path in backup_files.paths.items():
            message = message.replace(str(folder / name), str(path))
        raise CorruptionError(f"{source} is not a valid backup: {message}") from exc
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def declarations_beside(source: Path) -> list[Collection]:
    """The declarations that were copied together with a backup; empty if there are none."""
    return await DeclarationsFile(FileManager(_options_of(source), Schema([]))).read()


def _options_of(source: Path) -> JSONConfig:
    """The configuration of a store whose data files are this backup."""
    if source.is_dir():
        return JSONConfig(storage_type="split_files", base_path=str(source))
    name = re.sub(r"\.bak\.[0-9]+$", "", source.name).removesuffix(".gz")
    return JSONConfig(base_path=str(source.parent), filenames=Filenames(single_file=name))


def _copy(files: Mapping[str, Path], folder: Path) -> None:
    for name, path in files.items():
        shutil.copyfile(path, folder / name)


def _files_of(source: Path, files: JSONFiles, schema: Schema) -> _BackupFiles:
    options = files.options
    is_split = options.storage_type == "split_files"
    names = (options if is_split else JSONConfig(storage_type="split_files")).files(schema)
    if source.is_dir():
        candidates = [f"{name}{suffix}" for name in names.values() for suffix in ("", ".gz")]
        paths = {each: source / each for each in candidates if (source / each).is_file()}
        if not paths:
            raise InvalidInputError(
                f"{source} is not a backup of this store: it holds none of the files "
                f"{', '.join(names.values())}"
            )
        return _BackupFiles(paths, names)
    # A backup that a compaction kept is named NAME.bak.00000012.
    name = re.sub(r"\.bak\.[0-9]+$", "", source.name)
    plain = name.removesuffix(".gz")
    only = next((each for each, file in names.items() if is_split and file == plain), None)
    return _BackupFiles({name: source}, None if only is None else names, only)


async def _read_copies(
    folder: Path, source: _BackupFiles, schema: Schema
) -> tuple[Data, list[str]]:
    """Open the copies as a store; returns its entities and its undeclared sections."""
    if source.names is not None:
        options = JSONConfig(
            storage_type="split_files",
            base_path=str(folder),
            filenames=Filenames(split_files=source.names),
        )
    else:
        name = next(iter(source.paths)).removesuffix(".gz")
        options = JSONConfig(base_path=str(folder), filenames=Filenames(single_file=name))
    # Without routing: a record of a live migration may stem from the time of the backup, or from
    # anyone, and this file is the one to be read.
    async with StorageStrategy(JSONEngine(options, schema), schema) as store:
        data = {
            name: {declared.id_of(each): each async for each in store.stream_entities(name)}
            for name, declared in schema.items()
        }
        left_out = cast("list[str]", (await store.health())["undeclared_sections"])
    return {source.only: data[source.only]} if source.only else data, left_out


def _refuse_foreign(source: Path, data: Data, left_out: list[str], schema: Schema) -> None:
    """Refuse a file without any declared collection.

    Any JSON object can be read as a store with undeclared sections, and would empty this store.
    """
    if left_out and not any(data.values()):
        raise InvalidInputError(
            f"{source} is not a backup of this store: it holds {listed(map(repr, left_out))}, but none "
            f"of the collections {', '.join(schema)}"
        )


def _check(source: Path, data: Data, schema: Schema) -> None:
    for name, entities in data.items():
        for entity_id, entity in entities.items():
            try:
                schema[name].entity(entity)
            except InvalidInputError as exc:
                raise exc.at(f"{source}, {name} {entity_id!r}") from exc
