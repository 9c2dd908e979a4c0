"""Reading a store from its files: which file belongs to which journal, and what is in them.

A journal names the digests of the files it belongs to. A file that it does not name was replaced by
hand: if no commit waits for it, it is simply taken over; otherwise only the operator can say which
of the two counts. Nothing here takes a lock or writes; the caller tries again when others wrote
meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import msgspec

from hf_async_store.errors import ConfigurationError, CorruptionError, DataFileConflictError
from hf_async_store.os_errors import translate_os_error
from hf_async_store.strategies.json.collection_table import CollectionTable, reclaim
from hf_async_store.strategies.json.files import DataFile, FileManager, Signature, is_doubtful
from hf_async_store.strategies.json.journal import (
    Entry,
    FileState,
    Images,
    Kind,
    image,
    read_commit,
    read_fold,
    read_head,
    scan,
)
from hf_async_store.strategies.json.serializer import (
    CHUNK_BYTES,
    UNREADABLE,
    Held,
    JSONSerializer,
    NotOurs,
    cut_lines,
    cut_object,
    cut_piece,
    cut_text,
    held,
    layout_of,
    refuse_repeated,
)

if TYPE_CHECKING:
    from hf_async_store.schema import Schema


class _Journal(NamedTuple):
    """A generation as it was read; not `whole`: what came behind these entries is lost."""

    generation: int
    entries: list[Entry]
    end: int
    alone: bool
    whole: bool


_LARGE: Final = 16 << 20
"""A foreign layout over this size is brought into ours by a child process before it is cut: cutting
it takes one step, which would hold the loop."""

_SMALL_TAIL: Final = 1 << 16
_LARGE_TAIL: Final = 4 << 20
_TAIL_CHUNK: Final = 1 << 20
_FREE_CHUNK: Final = 8

Merged: TypeAlias = Mapping[str, "dict[str, Held]"]
"""Sections by name, with the images of a commit in them already."""


class JournalMissing(Exception):  # noqa: N818  # never leaves the strategy
    """A file that was just listed is gone, or the chain has a gap: others are folding. Look again."""


@dataclass(slots=True)
class StoreState:
    """A store in memory, and how far it has followed the files."""

    sections: dict[str, CollectionTable] = field(default_factory=dict)
    extras: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """By data file: the sections that no collection declares, as they lie there."""
    known: dict[str, list[FileState]] = field(default_factory=dict)
    """By data file: the contents that are right, the newest last."""
    content: dict[str, FileState] = field(default_factory=dict)
    """By data file: what it held when it was read, or was folded to since."""
    signatures: dict[str, Signature | None] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    """The data files that were replaced by hand and taken over; the journal does not name them."""
    pending: dict[int, dict[str, int]] = field(default_factory=dict)
    """By generation and collection: the bytes of commits that are not in the data files yet."""
    replayed: dict[str, dict[str, bytes | None]] = field(default_factory=dict)
    """When adopting: what the journals added to the data files."""
    unread: list[int] = field(default_factory=list)
    """When adopting what is readable: the generations that are left out, in part or whole."""
    superseded: bool = False
    """Journals lie there that an adoption left behind: nothing of them counts."""
    first: int = 0
    """The oldest generation that counted when the files were read."""
    suspect: int = 0
    """The newest generation of which a sync failed, whoever's it was."""
    generation: int = 0
    fd: int = -1
    offset: int = 0
    sequence: int = 0
    sealed: bool = False

    @property
    def pending_bytes(self) -> int:
        return sum(sum(each.values()) for each in self.pending.values())

    def waiting_for(self, collections: Mapping[str, object] | set[str]) -> bool:
        """Whether a commit to one of these is not in its data file yet."""
        return any(name in collections for each in self.pending.values() for name in each)

    @property
    def in_doubt(self) -> bool:
        """Whether a data file lacks commits that a loss of power may take."""
        return self.suspect > 0 and any(
            each.covers <= self.suspect for each in self.content.values()
        )

    async def merged(self, images: Images) -> Merged:
        """What those sections will be that many images go to, for `take`."""
        made = {name: await self.sections[name].merged(each) for name, each in images.items()}
        return {name: merged for name, merged in made.items() if merged is not None}

    def apply(self, images: Images, size: int, merged: Merged) -> None:
        """A commit of the current generation, `size` bytes of journal; `sweep` is to follow."""
        waiting = self.pending.setdefault(self.generation, {})
        for name, section_images in images.items():
            waiting[name] = waiting.get(name, 0) + size // len(images)
            self.sections[name].apply(section_images, merged.get(name))

    async def reclaim(self) -> None:
        for section in self.sections.values():
            await section.reclaim()

    def covered(self, name: str, content: FileState, collections: set[str]) -> None:
        """This file, as it lies in its place, holds everything before its generation."""
        newer = [each for each in self.known.get(name, []) if each.covers > content.covers]
        self.known[name] = [content, *newer]
        self.content[name] = content
        self.signatures[name] = None if content.digest is None else Signature.known(content)
        self.replaced.discard(name)
        for generation in [each for each in self.pending if each < content.covers]:
            for collection in collections:
                self.pending[generation].pop(collection, None)
            if not self.pending[generation]:
                del self.pending[generation]

    def kept(self, collection: str, entity_id: str) -> Held | None:
        """The text of an entity, also of a collection that only others declare."""
        section = self.sections.get(collection)
        if section is not None and entity_id in section.held:
            return section.held[entity_id]
        for extras in self.extras.values():
            if collection in extras:
                members = cut_object(msgspec.Raw(extras[collection]), f"section {collection!r}")
                return members.get(entity_id)
        return None

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class StoreLoader:
    """Reads the files of one store."""

    def __init__(
        self, files: FileManager, schema: Schema, serializer: JSONSerializer, cache_size: int
    ) -> None:
        self._files = files
        self._schema = schema
        self._serializer = serializer
        self._cache_size = cache_size

    def section(self, name: str) -> CollectionTable:
        """An empty section; of a collection that is not declared, one that is only kept."""
        # Not `get`: a schema answers an unknown name with an error of its own.
        collection = self._schema[name] if name in self._schema else None  # noqa: SIM401  # see above
        return CollectionTable(collection, self._serializer, self._cache_size)

    def collections_of(self, name: str, state: StoreState) -> set[str]:
        """The collections whose entities lie in a data file."""
        collection = self._files.names[name]
        return set(state.sections) if collection is None else {collection}

    # -- the whole ---------------------------------------------------------------------------

    async def load(self, *, adopt: str | None = None) -> StoreState:
        """The store as its files have it.

        Args:
            adopt: settle a file that was replaced by hand: "file" takes the data files as they
                are and leaves the journal out, "journal" replays it over them. "salvage" settles
                a damaged journal: it counts up to the damage.

        Raises:
            CorruptionError: naming the file, the place and the way back.
            DataFileConflictError: naming the two ways out.
            JournalMissing: others changed the files meanwhile.
        """
        state = StoreState()
        try:
            await self._load(state, adopt)
        except BaseException:
            state.close()
            raise
        return state

    async def _load(self, state: StoreState, adopt: str | None) -> None:
        for name in self._schema:
            state.sections[name] = self.section(name)
        journals: list[_Journal] = []
        if adopt == "file":
            # The numbers are not used again: nobody may take an old generation for a new one.
            state.generation = max(self._files.journals(), default=0)
            state.sealed = True
        else:
            journals = await self._journals(state, readable=adopt == "salvage")
        first = journals[0].generation if journals else state.generation + 1
        strange = [
            name
            for name in list(self._files.names)
            if not await self._load_file(name, state, adopt, first)
        ]
        if strange and adopt is None:
            await self._refuse_moved(state)
        self._refuse_gap(state, journals)
        await self._replay_all(state, journals, adopt)
        if adopt in (None, "salvage"):
            self._refuse_mixture(state)

    async def _refuse_moved(self, state: StoreState) -> None:
        """Files that no journal names can be of two moments, if somebody folded meanwhile."""
        newest = self._files.journals()[-1:]
        if state.fd < 0:
            moved = bool(newest)
        else:
            path = self._files.journal(state.generation)
            tail = read_blocks(state.fd, state.offset, os.fstat(state.fd).st_size, path)
            more = scan(tail, str(path), state.offset, state.sequence)
            moved = newest != [state.generation]
            moved = moved or await asyncio.to_thread(next, more, None) is not None
        if moved:
            raise JournalMissing("the journal went on while the files were read")

    def _refuse_gap(self, state: StoreState, journals: list[_Journal]) -> None:
        """Every generation that some file lacks must be there."""
        if not journals:
            return
        first = min(each.covers for each in state.content.values())
        if first < journals[0].generation:
            raise CorruptionError(
                f"{self._files.journal(first)} is missing, and the data files do not hold what was "
                "in it. Restore a backup (`hf-async-store restore`), or go on without it: "
                "`hf-async-store checkpoint --recover-from file`"
            )

    def _refuse_mixture(self, state: StoreState) -> None:
        for name in state.replaced:
            if state.waiting_for(self.collections_of(name, state)):
                raise DataFileConflictError(
                    f"{self._files.path(name)} is not the file that its journal belongs to, and the "
                    "journal holds commits. Say which one counts: `hf-async-store checkpoint "
                    "--recover-from file` takes the file as it is and drops the journal, "
                    "`--recover-from journal` puts the journal's commits on top of the file"
                )

    # -- journals ----------------------------------------------------------------------------

    async def _journals(self, state: StoreState, *, readable: bool) -> list[_Journal]:
        """The generations in the folder that count, oldest first; the newest stays open in `state`.

        Args:
            readable: take what is before the damage, of each.
        """
        found: list[_Journal] = []
        generations = self._files.journals()
        for generation in reversed(generations):
            whole = not found or generation + 1 == found[-1].generation
            if not whole and not readable:
                raise JournalMissing(f"generation {generation + 1} is missing")
            journal = await self._open_journal(state, generation, readable, keep=not found)
            found.append(journal._replace(whole=journal.whole and whole))
            if journal.alone:
                break
        found.reverse()
        if found:
            state.first = found[0].generation
            state.superseded = state.first > generations[0]
        for journal in found:
            for entry in journal.entries:
                if entry.kind is Kind.HEAD:
                    self._know(state, read_head(entry.payload).files)
                elif entry.kind is Kind.FOLD:
                    self._know(state, read_fold(entry.payload).files)
        return found

    async def _open_journal(
        self, state: StoreState, generation: int, readable: bool, *, keep: bool
    ) -> _Journal:
        path = self._files.journal(generation)
        fd = open_journal(path)
        try:
            if is_doubtful(os.fstat(fd)):
                state.suspect = max(state.suspect, generation)
            journal = await self._read_journal(path, generation, fd, readable, newest=keep)
        except BaseException:
            os.close(fd)
            raise
        if keep:
            state.fd = fd
            state.generation = generation
            state.offset = journal.end
            state.sequence = len(journal.entries)
            state.sealed = bool(journal.entries) and journal.entries[-1].kind is Kind.SEAL
        else:
            os.close(fd)
        return journal

    async def _read_journal(
        self, path: Path, generation: int, fd: int, readable: bool, *, newest: bool
    ) -> _Journal:
        entries: list[Entry] = []
        end = 0
        alone = False
        try:
            async for entry, position in scanned(fd, path, os.fstat(fd).st_size):
                if not entries:
                    if entry.kind is not Kind.HEAD:
                        break
                    head = read_head(entry.payload)
                    if head.generation != generation:
                        raise CorruptionError(
                            f"{path} says that it is generation {head.generation}"
                        )
                    alone = head.alone
                entries.append(entry)
                end = position
            if not entries:
                raise CorruptionError(
                    f"{path} at byte 0: a journal begins with its head. Restore a backup "
                    "(`hf-async-store restore`), or take the data file alone: `hf-async-store "
                    "checkpoint --recover-from file`"
                )
            if not newest and entries[-1].kind is not Kind.SEAL:
                raise CorruptionError(
                    f"{path} ends without a seal, though generation {generation + 1} exists. "
                    "Restore a backup (`hf-async-store restore`), or go on with what can be read: "
                    "`hf-async-store checkpoint --recover-from salvage`"
                )
        except CorruptionError:
            if not readable:
                raise
            return _Journal(generation, entries, end, alone, whole=False)
        return _Journal(generation, entries, end, alone, whole=True)

    def _know(self, state: StoreState, files: Mapping[str, FileState]) -> None:
        for name, each in files.items():
            self._files.add(name, each.collection)
            known = state.known.setdefault(name, [])
            if each not in known:
                known.append(each)

    def announce(self, state: StoreState, files: Mapping[str, FileState]) -> None:
        """A FOLD was read: these contents belong there from now on. Those that were there before
        are in their place; the others may never come, if the one who folds dies."""
        self._know(state, files)
        for name, each in files.items():
            now = state.content.setdefault(name, FileState(None, 0, ours=False))
            if now.digest == each.digest:
                state.covered(name, each, self.collections_of(name, state))

    async def _replay_all(
        self, state: StoreState, journals: list[_Journal], adopt: str | None
    ) -> None:
        newest = state.generation
        covers = min((each.covers for each in state.content.values()), default=0)
        try:
            for number, journal in enumerate(journals):
                state.generation = journal.generation
                whole = await self._replay(state, journal, adopt)
                if covers <= journal.generation and not whole:
                    # What comes later leans on what is lost.
                    state.unread = [each.generation for each in journals[number:]]
                    break
        finally:
            state.generation = newest

    async def _replay(self, state: StoreState, journal: _Journal, adopt: str | None) -> bool:
        """The commits of a generation, over the data files that do not hold them yet.

        Over one that does, it would be harmless but for a file that was replaced by hand.

        Returns:
            Whether that was all of it.
        """
        for number, entry in enumerate(journal.entries, 1):
            if entry.kind is Kind.COMMIT:
                try:
                    images = await self.commit(state, entry, adopting=adopt is not None)
                except CorruptionError:
                    if adopt != "salvage":
                        raise
                    return False
                await state.reclaim()
                await reclaim_images(entry, images)
            if not number % 64:
                await asyncio.sleep(0)
        return journal.whole

    async def commit(
        self, state: StoreState, entry: Entry, *, adopting: bool = False
    ) -> dict[str, dict[str, bytes | None]]:
        """Take over a COMMIT of the current generation; `sweep` and `reclaim_images` are to follow.

        Args:
            adopting: note in the state what of it the data files lacked.
        """
        try:
            images = await _images(entry)
        except CorruptionError as exc:
            raise CorruptionError(
                f"{self._files.journal(state.generation)}: {exc}. Restore a backup "
                "(`hf-async-store restore`), or go on with what can be read: `hf-async-store "
                "checkpoint --adopt-readable`"
            ) from exc
        for name in images.keys() - state.sections.keys():
            state.sections[name] = self._revived(state, name)
        held_already = {
            collection
            for name, content in state.content.items()
            if content.covers > state.generation
            for collection in self.collections_of(name, state)
        }
        lacking = {name: each for name, each in images.items() if name not in held_already}
        if lacking:
            state.apply(lacking, entry.size, await state.merged(lacking))
        if adopting:
            for name, each in lacking.items():
                state.replayed.setdefault(name, {}).update(each)
        return images

    def _revived(self, state: StoreState, name: str) -> CollectionTable:
        """The section of a collection that only others declare, out of what was kept of it."""
        section = self.section(name)
        for extras in state.extras.values():
            if name in extras:
                section.held.update(cut_object(msgspec.Raw(extras.pop(name)), f"section {name!r}"))
        return section

    # -- data files --------------------------------------------------------------------------

    async def _load_file(self, name: str, state: StoreState, adopt: str | None, first: int) -> bool:
        """Take in a data file; False if no journal names it.

        Args:
            first: the oldest generation that is there.
        """
        known = state.known.get(name, [])
        found = await self._files.read(name, known)
        if found is not None and not known:
            self._refuse_other_names(name)
        digest = None if found is None else found.digest
        match = next((each for each in reversed(known) if each.digest == digest), None)
        if match is not None and match.covers < first <= max(each.covers for each in known):
            match = None  # it was folded since, and somebody put the old one back
        content = match or self._taken_over(name, digest, state, adopt, first)
        state.content[name] = content
        state.signatures[name] = None if found is None else found.signature
        if found is not None:
            await self._cut(name, found, state, ours=content.ours)
        return match is not None

    def _refuse_other_names(self, name: str) -> None:
        """A file that has no journal here may have one under another name."""
        for path in self._files.found(name):
            others = self._files.other_names(path)
            if others:
                raise ConfigurationError(
                    f"{path} has {others} more name(s) (hard links). Under another one it may be "
                    "a store already, and to replace it here would leave that one as it is. Use "
                    "the other name, or make this a file of its own: copy it, and move the copy "
                    "over it"
                )

    def _taken_over(
        self, name: str, digest: str | None, state: StoreState, adopt: str | None, first: int
    ) -> FileState:
        """The content of a file that no journal names."""
        known = state.known.get(name, [])
        if known:
            if digest is None and adopt != "file":
                # Also when the journal is to count: on top of nothing it would pass for the whole.
                newest = [str(each) for each in self._files.backups(name)[:1]]
                raise CorruptionError(
                    f"{self._files.path(name)} is missing, though its journal belongs to it. "
                    f"Restore a backup (the newest: {newest[0] if newest else 'none was kept'}) by "
                    "`hf-async-store restore`, or go on without what was in it: "
                    "`hf-async-store checkpoint --recover-from file`"
                )
            state.replaced.add(name)
        return FileState(digest, first, ours=False, collection=self._files.names[name])

    async def _cut(self, name: str, found: DataFile, state: StoreState, *, ours: bool) -> None:
        try:
            await self._cut_lines(name, found.text, state, ours=ours)
        except NotOurs:
            for collection in self.collections_of(name, state):
                state.sections[collection] = self.section(collection)
            state.extras.pop(name, None)
            await self._cut_foreign(name, found.text, state, ours=ours)

    async def _cut_lines(self, name: str, text: bytes, state: StoreState, *, ours: bool) -> None:
        """A file that lies one entity a line."""
        if not text.startswith(b"{\n") or not text.endswith(b"}\n"):
            raise NotOurs
        collection = self._files.names[name]
        if collection is not None:
            section = state.sections.setdefault(collection, self.section(collection))
            if await _fill(section, text, 2, ours=ours) + 2 != len(text):
                raise NotOurs
            if collection in section.held and not ours:
                raise NotOurs  # perhaps a wrapping of that name
            return
        position = 2
        seen: set[str] = set()
        while position + 2 != len(text):
            end = text.find(b"\n", position)
            line = text[position:end]
            section_name = _name_of(line)
            if section_name not in state.sections:
                await self._cut_rest(name, b"{" + text[position:], state, ours=ours, seen=seen)
                return
            if section_name in seen:
                raise NotOurs
            seen.add(section_name)
            position = await _fill(state.sections[section_name], text, end + 1, ours=ours)
            last = position + 4 == len(text)
            if text[position : position + 3] != (b"}\n}" if last else b"},\n"):
                raise NotOurs
            position += 2 if last else 3
            if not last and position + 2 == len(text):
                raise NotOurs  # a comma, and nothing behind it

    async def _cut_foreign(self, name: str, text: bytes, state: StoreState, *, ours: bool) -> None:
        """A file in another layout."""
        collection = self._files.names[name]
        if len(text) > _LARGE and (collection is None or collection in self._schema):
            from hf_async_store.strategies.json.normalize_layout import rewritten

            # Where no child can be had, or no room for its files, the loop has to be held.
            with suppress(NotOurs, OSError):
                declared = None if collection is None else self._schema[collection]
                lines = await rewritten(text, declared, self._schema)
                await self._cut_lines(name, lines, state, ours=False)
                return
        await self._cut_rest(name, text, state, ours=ours)

    async def _cut_rest(
        self, name: str, text: bytes, state: StoreState, *, ours: bool, seen: Set[str] = frozenset()
    ) -> None:
        path = str(self._files.path(name))
        members = await _members(text, path, once=not ours)
        if seen & members.keys():
            raise NotOurs
        collection = self._files.names[name]
        if collection is not None and (
            collection not in self._schema or layout_of(self._schema[collection], members) == "flat"
        ):
            state.sections.setdefault(collection, self.section(collection)).held.update(
                held(members, ours=ours)
            )
            return
        for each, raw in members.items():
            if each in state.sections and collection in (None, each):
                found = await _members(raw, f"section {each!r} of {path}", once=not ours)
                state.sections[each].held.update(held(found, ours=ours))
            else:
                state.extras.setdefault(name, {})[each] = bytes(raw)


async def _members(text: Held, what: str, *, once: bool) -> dict[str, msgspec.Raw]:
    """`cut_object`, with turns for the loop."""
    try:
        found = cut_text(text)
    except UNREADABLE:
        # It takes longer, and finds out what is wrong; no name comes twice then.
        return await asyncio.to_thread(cut_object, text, what)
    if once:
        await asyncio.sleep(0)
        for _ in refuse_repeated(bytes(text), found, what):
            await asyncio.sleep(0)
    return found


async def _fill(section: CollectionTable, text: bytes, start: int, *, ours: bool) -> int:
    """Take the entities in that lie one a line from `start` on; where they end.

    Raises:
        NotOurs: they lie otherwise, or an id comes twice.
    """
    end = start
    for piece in cut_lines(text, start, ours=ours):
        if isinstance(piece, int):
            end = piece
            continue
        number = len(section.held) + len(piece)
        section.held.update(piece)
        if len(section.held) != number:
            raise NotOurs
        await asyncio.sleep(0)
    return end


async def scanned(
    fd: int, path: Path, size: int, offset: int = 0, sequence: int = 0
) -> AsyncGenerator[tuple[Entry, int], None]:
    """`scan` of what a journal of `size` bytes holds from `offset` on, with turns for the loop."""
    blocks: Iterable[bytes] = read_blocks(fd, offset, size, path)
    # The checksum of a large record would hold the loop.
    large = size - offset > _LARGE_TAIL
    if not large and size - offset > _SMALL_TAIL:
        blocks = await asyncio.to_thread(list, blocks)
    entries = scan(blocks, str(path), offset, sequence)
    while True:
        some = _EntryBuffer()
        if large:
            await asyncio.to_thread(some.take, entries)
        else:
            some.take(entries)
        for each in some.entries:
            yield each
        if some.failure is not None:
            raise some.failure
        if not some.more:
            return
        await asyncio.sleep(0)


class _EntryBuffer:
    """The next records of a journal, up to a piece."""

    def __init__(self) -> None:
        self.entries: list[tuple[Entry, int]] = []
        self.more = False
        self.failure: CorruptionError | None = None

    def take(self, entries: Iterator[tuple[Entry, int]]) -> None:
        size = 0
        try:
            for entry, end in entries:
                self.entries.append((entry, end))
                size += entry.size
                if size > _TAIL_CHUNK:
                    self.more = True
                    return
        except CorruptionError as exc:
            self.failure = exc  # what lies before it counts


async def _images(entry: Entry) -> dict[str, dict[str, bytes | None]]:
    """The post-images in a COMMIT."""
    if entry.size > CHUNK_BYTES:
        with suppress(NotOurs):
            return await cut_commit(entry.pieces)
    return read_commit(entry.payload)


async def cut_commit(pieces: Sequence[bytes]) -> dict[str, dict[str, bytes | None]]:
    """One that lies one entity a line."""
    found: dict[str, dict[str, bytes | None]] = {}
    images: dict[str, bytes | None] | None = None  # of the section that is being cut
    ended = False
    for lines in _whole_lines(pieces):
        rest = lines
        while rest:
            if ended:
                raise NotOurs
            if images is not None:
                part, rest, over = _cut_part(rest)
                images.update(
                    (each, text if type(text) is bytes else image(bytes(text)))
                    for each, text in part.items()
                )
                if over:
                    images = None
                await asyncio.sleep(0)
                continue
            line, _, rest = rest.partition(b"\n")
            begins = b"}," if found else b"{"
            name = _name_of(line.removeprefix(begins)) if line.startswith(begins) else ""
            ended = line == b"}}"
            if name:
                if name in found:
                    raise NotOurs
                images = found[name] = {}
            elif not ended:
                raise NotOurs
    if not ended:
        raise NotOurs
    return found


def _whole_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """A text in whole lines, about a piece at a time, without the newline behind the last."""
    begun: list[bytes] = []
    for piece in pieces:
        end = piece.rfind(b"\n")
        if end < 0:
            begun.append(piece)
            continue
        yield b"".join((*begun, piece[:end]))
        begun = [piece[end + 1 :]]
    yield b"".join(begun)


def _cut_part(lines: bytes) -> tuple[dict[str, Held], bytes, bool]:
    """The entities up to the end of their section, what follows it, and whether it ends here."""
    last = not lines.endswith(b",")
    try:
        return cut_piece(lines, last=last, ours=True), b"", last
    except NotOurs:
        end = lines.find(b"\n}")
        if end < 0:
            raise
    return cut_piece(lines[:end], last=True, ours=True), lines[end + 1 :], True


async def reclaim_images(entry: Entry, images: Mapping[str, dict[str, bytes | None]]) -> None:
    """Free a commit that was taken over, in pieces: at once it would hold the loop."""
    if entry.size <= CHUNK_BYTES:
        return
    for each in images.values():
        await reclaim(each)
    while entry.pieces:
        del entry.pieces[-_FREE_CHUNK:]
        await asyncio.sleep(0)


def _name_of(line: bytes) -> str:
    if not line.endswith(b":{"):
        return ""
    try:
        return msgspec.json.decode(line[:-2], type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


def open_journal(path: Path) -> int:
    """A descriptor to read a journal.

    Raises:
        JournalMissing: it is not there.
    """
    try:
        # Not to follow a link to elsewhere, nor to wait for the other end of a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            regular = stat.S_ISREG(os.fstat(fd).st_mode)
        except OSError:
            os.close(fd)
            raise
    except FileNotFoundError as exc:
        raise JournalMissing(str(path)) from exc
    except OSError as exc:
        raise translate_os_error(exc, f"read {path}") from exc
    if not regular:
        os.close(fd)
        raise ConfigurationError(f"{path} is no regular file, and so no journal of the store")
    return fd


def read_blocks(fd: int, offset: int, size: int, path: Path) -> Iterator[bytes]:
    """What a journal holds from `offset` up to `size`, block by block."""
    while offset < size:
        try:
            block = os.pread(fd, min(CHUNK_BYTES, size - offset), offset)
        except OSError as exc:
            raise translate_os_error(exc, f"read {path}") from exc
        if not block:
            return
        yield block
        offset += len(block)
