"""Reading a backup of a JSON store: what it is, and whether it is whole and good."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, cast

import msgspec

from hf_async_store.cli.json_files import EMPTY, as_object
from hf_async_store.config import Filenames, JSONConfig
from hf_async_store.errors import CorruptionError, InvalidInputError, StorageError
from hf_async_store.migration_routing import SYSTEM_COLLECTIONS
from hf_async_store.strategies.json import JSONStorageStrategy
from hf_async_store.strategies.json.files import read_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

    from hf_async_store.cli.json_files import Data, JSONFiles
    from hf_async_store.schema import Schema

_MAX_SHOWN: Final = 5


class _BackupStore(JSONStorageStrategy):
    """A backup, opened as a store. It may have been made while its store was moved, or by anybody:
    whatever it says of a live move, it is this file that was asked for."""

    _obeys_moves = False


class Backup(NamedTuple):
    """A backup that was found good.

    Attributes:
        data: its entities by collection and id; of one collection if it is the file of one.
        texts: the data files of the store as they would hold the same.
        left_out: its sections that no collection declares.
    """

    data: Data
    texts: dict[str, bytes]
    left_out: list[str]


class _Source(NamedTuple):
    """What a path is taken for.

    Attributes:
        links: its files, by the name under which it is opened.
        names: the file of each collection; None if one file holds all.
        only: the collection that it holds alone.
    """

    links: dict[str, Path]
    names: dict[str, str] | None
    only: str | None = None


async def read_backup(source: Path, files: JSONFiles, schema: Schema) -> Backup:
    """A backup, read whole and checked.

    It is opened as a store of its own, by copies in a folder of its own: nothing is written beside
    it, and a link would lead the store to where the backup is.

    Raises:
        CorruptionError: it is damaged.
        InvalidInputError: it is no backup of this store, or holds what the store does not take.
    """
    taken = _taken_for(source, files, schema)
    folder = Path(tempfile.mkdtemp(prefix="hf-async-store-"))
    try:
        await asyncio.to_thread(_copy, taken.links, folder)
        data, left_out = await _opened(folder, taken, schema)
        _refuse_foreign(source, data, left_out, schema)
        _check(source, data, schema)
        return Backup(data, await _texts(folder, taken, files, data, left_out), left_out)
    except CorruptionError as exc:
        said = str(exc)
        for name, path in taken.links.items():
            said = said.replace(str(folder / name), str(path))
        raise CorruptionError(f"{source} is not a valid backup: {said}") from exc
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy(files: Mapping[str, Path], folder: Path) -> None:
    for name, path in files.items():
        shutil.copyfile(path, folder / name)


def _taken_for(source: Path, files: JSONFiles, schema: Schema) -> _Source:
    options = files.options
    is_split = options.storage_type == "split_files"
    names = (options if is_split else JSONConfig(storage_type="split_files")).files(schema)
    if source.is_dir():
        forms = [f"{name}{suffix}" for name in names.values() for suffix in ("", ".gz")]
        links = {each: source / each for each in forms if (source / each).is_file()}
        if not links:
            raise InvalidInputError(
                f"{source} is no backup of this store: it holds none of {', '.join(names.values())}"
            )
        return _Source(links, names)
    # A backup that a fold kept: NAME.bak.00000012.
    name = re.sub(r"\.bak\.[0-9]+$", "", source.name)
    plain = name.removesuffix(".gz")
    only = next((each for each, file in names.items() if is_split and file == plain), None)
    return _Source({name: source}, None if only is None else names, only)


async def _opened(folder: Path, taken: _Source, schema: Schema) -> tuple[Data, list[str]]:
    if taken.names is not None:
        options = JSONConfig(
            storage_type="split_files",
            base_path=str(folder),
            filenames=Filenames(split_files=taken.names),
        )
    else:
        name = next(iter(taken.links)).removesuffix(".gz")
        options = JSONConfig(base_path=str(folder), filenames=Filenames(single_file=name))
    async with _BackupStore(options, collections=schema.values()) as store:
        data = await store.read_file()
        left_out = cast("list[str]", (await store.health())["undeclared_sections"])
    return {taken.only: data[taken.only]} if taken.only else data, left_out


def _refuse_foreign(source: Path, data: Data, left_out: list[str], schema: Schema) -> None:
    """Any map is JSON of a store, with sections that nobody declares. It would empty this one."""
    if left_out and not any(data.values()):
        raise InvalidInputError(
            f"{source} is no backup of this store: it holds {listed(left_out)}, and none of "
            f"{', '.join(schema)}"
        )


def _check(source: Path, data: Data, schema: Schema) -> None:
    for name, entities in data.items():
        for entity_id, entity in entities.items():
            try:
                schema[name].entity(entity)
            except InvalidInputError as exc:
                raise exc.at(f"{source}, {name} {entity_id!r}") from exc


async def _texts(
    folder: Path, taken: _Source, files: JSONFiles, data: Data, left_out: list[str]
) -> dict[str, bytes]:
    """The store's own data files with the content of the backup."""
    names = files.manager.names
    if taken.only:
        names = {name: each for name, each in names.items() if each == taken.only}
    if files.manager.single is not (taken.names is None):
        return files.texts(data)
    # Byte for byte, but for what is left out and the records of a live migration.
    omitted = {*left_out, *(each.name for each in SYSTEM_COLLECTIONS)}
    texts = dict.fromkeys(names, EMPTY)
    for link in taken.links:
        found = await read_file(folder / link)
        name = link.removesuffix(".gz") if taken.names else next(iter(names))
        if found is None:
            raise StorageError(f"{taken.links[link]} was there, and is gone")
        texts[name] = found.text if taken.names else _without(found.text, omitted)
    return texts


def _without(text: bytes, omitted: Set[str]) -> bytes:
    """The one file of a store without these sections; the same bytes if it has none of them."""
    sections = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    if not omitted & sections.keys():
        return text
    return as_object({name: bytes(each) for name, each in sections.items() if name not in omitted})


def listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN:,} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(map(repr, names[:_MAX_SHOWN])) + more
