"""Loading a store from its data files and journals.

A journal names the digests of the data files to which it belongs. A data file that no journal names was
replaced manually. If the journal contains no commit for it, it is accepted; otherwise only the operator
can decide whether the file or the journal is valid. This module acquires no lock and writes nothing; the
caller retries if another process wrote meanwhile.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from hf_async_store.errors import (
    ConfigurationError,
    CorruptionError,
    DataFileConflictError,
    StorageError,
)
from hf_async_store.event_loop import in_thread, long_work, pause, reclaim
from hf_async_store.os_errors import translate_os_error
from hf_async_store.schema import Schema
from hf_async_store.strategies.json.collection_table import CollectionTable
from hf_async_store.strategies.json.files import (
    SYSTEM_SECTIONS,
    DataFile,
    FileManager,
    Signature,
    has_failed_sync,
)
from hf_async_store.strategies.json.journal import (
    USE_FILES,
    USE_UNDAMAGED,
    Entry,
    FeedPosition,
    FileState,
    Fold,
    Head,
    Kind,
    image,
    read_commit,
    read_naming,
    scan,
)
from hf_async_store.strategies.json.serializer import (
    CHUNK_BYTES,
    UNREADABLE,
    JSONSerializer,
    OtherLayout,
    Span,
    StoredEntity,
    decode_members,
    find_line,
    has_key,
    is_wrapped,
    parse_chunk,
    parse_lines,
    parse_object,
    refuse_duplicates,
    span_of_section,
    stored_entities,
)
from hf_async_store.strategies.json.store_state import StoreState
from hf_async_store.values import Key

_Images: TypeAlias = dict[str, dict[str, bytes | None]]


class _Journal(msgspec.Struct, frozen=True):
    """The journal of a generation.

    Attributes:
        named: the data files that its HEAD and its FOLDs name.
        complete: it is not damaged after these entries.
    """

    generation: int
    entries: list[Entry]
    named: list[Mapping[str, FileState]]
    end: int
    alone: bool
    feed_end: FeedPosition | None
    complete: bool


_LARGE_FILE: Final = 16 << 20
"""A larger data file in another layout is converted by a child process before it is parsed: parsing it
is one step, which would block the event loop."""

_LARGE_JOURNALS: Final = 4 << 20
"""The size of the journals up to which the first reads of a process look for entities in them: beside data
files of `_LARGE_FILE`, larger ones are about to be compacted."""

SMALL_TAIL: Final = 1 << 16
_LARGE_TAIL: Final = 4 << 20
_TAIL_CHUNK: Final = 1 << 20
_TAIL_PIECE: Final = 1 << 18  # in the event loop: up to 1 ms
_FREE_CHUNK: Final = 8


class JournalMissing(Exception):  # noqa: N818  # never leaves the strategy
    """A listed journal no longer exists, or a generation is missing: another process is compacting,
    and the caller retries.

    Attributes:
        remains: a journal before the missing one contains commits that are not in the data files.
    """

    def __init__(self, what: str, *, remains: bool = False) -> None:
        super().__init__(what)
        self.remains = remains


class StoreLoader:
    """Reads the files of one store."""

    def __init__(
        self, files: FileManager, schema: Schema, serializer: JSONSerializer, cache_size: int
    ) -> None:
        self._files = files
        self._schema = schema
        self._serializer = serializer
        self._cache_size = cache_size
        self._unparsed: dict[str, DataFile | None] = {}

    def section(self, name: str) -> CollectionTable:
        """An empty table for a collection, which need not be declared."""
        # Not `get` of the schema, which raises an error for an unknown name.
        collection = self._schema[name] if name in self._schema else SYSTEM_SECTIONS.get(name)
        return CollectionTable(collection, self._serializer, self._cache_size)

    def collections_of(self, name: str, state: StoreState) -> set[str]:
        """The collections that are stored in a data file."""
        collection = self._files.names[name]
        return set(state.sections) if collection is None else {collection}

    # -- the whole ---------------------------------------------------------------------------

    async def load(self, *, recover_from: str | None = None) -> StoreState:
        """Load the store from its files.

        Args:
            recover_from: recover from a manually replaced data file, or from a damaged journal: "file" uses
                the data files without the journal, "journal" replays the journal over the data
                files, "salvage" replays the journal up to the damage.

        Raises:
            CorruptionError: a file is damaged or missing; the message names the file, the position
                and the remedy.
            DataFileConflictError: a data file was replaced while the journal contained commits; the
                message names the two remedies.
            JournalMissing: another process changed the files meanwhile.
        """
        state = StoreState()
        try:
            await self._load(state, recover_from)
        except BaseException:
            state.close()
            raise
        return state

    async def _load(self, state: StoreState, recover_from: str | None) -> None:
        for name in (*self._schema, *SYSTEM_SECTIONS):
            state.sections[name] = self.section(name)
        journals: list[_Journal] = []
        if recover_from == "file":
            # The numbers are not reused: no process may mistake an old generation for a new one.
            state.generation = max(self._files.journals(), default=0)
            state.sealed = True
        else:
            journals = await self._journals(state, salvage=recover_from == "salvage")
        first = journals[0].generation if journals else state.generation + 1
        unknown = [
            name
            for name in list(self._files.names)
            if not await self._load_file(name, state, recover_from, first)
        ]
        if unknown and recover_from is None:
            await self._refuse_concurrent_change(state)
        self._refuse_gap(state, journals)
        await self._replay_all(state, journals, recover_from)
        if recover_from in (None, "salvage"):
            self._refuse_conflict(state)

    # -- a few entities ----------------------------------------------------------------------

    async def load_unparsed(self) -> StoreState | None:
        """Read the files without parsing the entities, for `look_up`.

        Parsing takes more time than all the rest. Without it, everything is checked that `load` checks, by
        the digests of the files. None if there is anything else to do than to find a line or an image: the
        journals or a data file are large, or a data file was not written by this package, or has another
        layout.
        """
        state = StoreState()
        try:
            if await self._load_unparsed(state):
                return state
        except (StorageError, OSError, JournalMissing, OtherLayout):
            pass  # `load` meets it again, and knows what to do
        except BaseException:
            state.close()
            raise
        state.close()
        return None

    async def _load_unparsed(self, state: StoreState) -> bool:
        for name in (*self._schema, *SYSTEM_SECTIONS):
            state.sections[name] = self.section(name)
        paths = map(self._files.journal, self._files.journals())
        if sum(each.stat().st_size for each in paths) > _LARGE_JOURNALS:
            return False  # `load` would read them again
        journals = await self._journals(state, salvage=False)
        if not journals:
            return False
        for name in list(self._files.names):
            if not await self._read_unparsed(name, state, journals[0].generation):
                return False
        self._refuse_gap(state, journals)
        if any(each.covers > journals[0].generation for each in state.content.values()):
            return False  # some data files contain commits of these journals, others may not
        await _collect_commits(state, journals)
        return True

    async def _read_unparsed(self, name: str, state: StoreState, first: int) -> bool:
        file = self._unparsed[name] = await self._read_file(name, state.known.get(name, []))
        if file is not None and len(file.text) > _LARGE_FILE:
            return False  # `load` computes the digest while it parses
        digest = None if file is None else await file.digest
        if not self._set_content(name, digest, state, None, first):
            return False
        state.signatures[name] = None if file is None else file.signature
        if file is None:
            return True
        if not state.content[name].ours:
            return False
        for collection, (start, end) in self._spans(name, file.text, state):
            if start < end:
                state.unparsed[collection] = file, (start, end)
        return True

    def _spans(self, name: str, data: bytes, state: StoreState) -> Iterator[tuple[str, Span]]:
        """The collections in a data file that has one entity per line, and where they are.

        Raises:
            OtherLayout: it has another layout, or contains something else.
        """
        if not data.startswith(b"{\n") or not data.endswith(b"\n}\n"):
            raise OtherLayout
        collection = self._files.names[name]
        if collection is not None:
            if _section_name(data[2 : data.find(b"\n", 2)]):
                raise OtherLayout  # its entities are in a section
            yield collection, (2, len(data) - 2)
            return
        position = 1
        while not data.startswith(b"\n}\n", position):
            end = data.find(b"\n", position + 1)
            each = _section_name(data[position + 1 : end])
            if each not in state.sections:
                raise OtherLayout
            span = span_of_section(data, end + 1)
            yield each, span
            position = span[1] + (2 if data.startswith(b"},\n", span[1]) else 1)
        if position + 3 != len(data):
            raise OtherLayout

    async def look_up(self, state: StoreState, keys: Iterable[Key]) -> bool:
        """Add these entities to a state without the others; False if one was not found.

        One that is not there is left to `load`, except in a collection that has no entities at all.
        """
        for key in keys:
            section = state.sections.setdefault(key.collection, self.section(key.collection))
            raw = await self._newest_line(state, key)
            if raw is None and key.collection in state.unparsed:
                return False
            if raw is not None and bytes(raw) != b"null":
                section.entities.update(stored_entities({key.id: raw}, trusted=True))
        return True

    async def _newest_line(self, state: StoreState, key: Key) -> msgspec.Raw | None:
        """The JSON of an entity in the newest commit that contains it, or else in its data file."""
        work = long_work()
        for payload, spans in reversed(state.commits):
            if key.collection in spans:
                raw = await find_line(payload, spans[key.collection], key.id)
                if raw is not None:
                    return raw
            await work.pause_if_due()
        if key.collection not in state.unparsed:
            return None
        file, span = state.unparsed[key.collection]
        return await find_line(file.text, span, key.id)

    async def _read_file(self, name: str, known: list[FileState]) -> DataFile | None:
        """Read a data file, unless `load_unparsed` has just read it."""
        file = self._unparsed.pop(name, None)
        if file is not None and file.signature == self._files.signature(name):
            return file
        return await self._files.read(name, known)

    async def _refuse_concurrent_change(self, state: StoreState) -> None:
        """Retry if the journal was changed while data files were read that no journal names: because
        of a compaction, these may not belong to the same moment."""
        newest = self._files.journals()[-1:]
        if state.fd < 0:
            changed = bool(newest)
        else:
            path = self._files.journal(state.generation)
            tail = read_chunks(state.fd, state.offset, os.fstat(state.fd).st_size, path)
            records = scan(tail, str(path), state.offset, state.sequence)
            changed = newest != [state.generation]
            changed = changed or await in_thread(next, records, None) is not None
        if changed:
            raise JournalMissing("the journal was changed while the data files were read")

    def _refuse_gap(self, state: StoreState, journals: list[_Journal]) -> None:
        """Check that the journals begin with the first generation that some data file needs."""
        if not journals:
            return
        first = min(each.covers for each in state.content.values())
        if first < journals[0].generation:
            raise CorruptionError(
                f"{self._files.journal(first)} is missing, and the data files do not contain its "
                f"commits. {USE_FILES}"
            )

    def _refuse_conflict(self, state: StoreState) -> None:
        for name in state.replaced:
            if state.has_pending(self.collections_of(name, state)):
                raise DataFileConflictError(
                    f"{self._files.path(name)} was replaced while its journal contained commits. "
                    "Copy the folder, then choose: `hf-async-store checkpoint --recover-from file` uses "
                    "the file and deletes the journal (all commits since the last compaction are lost), "
                    "`--recover-from journal` applies the commits in the journal to the file"
                )

    # -- journals ----------------------------------------------------------------------------

    async def _journals(self, state: StoreState, *, salvage: bool) -> list[_Journal]:
        """Read the valid journals, oldest first; the newest stays open in `state`.

        Args:
            salvage: read a damaged journal up to the damage, instead of raising an error.
        """
        journals: list[_Journal] = []
        generations = self._files.journals()
        for generation in reversed(generations):
            if journals and generation + 1 < journals[-1].generation and not salvage:
                known = journals[-1].named[0].values()
                needed = any(each.covers <= generation for each in known)
                raise JournalMissing(f"generation {generation + 1} is missing", remains=needed)
            journal = await self._open_journal(state, generation, salvage, keep=not journals)
            journals.append(journal)
            if journal.alone:
                break
        journals.reverse()
        if journals:
            state.first = journals[0].generation
            state.superseded = state.first > generations[0]
        for journal in journals:
            for files in journal.named:
                self._add_known(state, files)
        return journals

    async def _open_journal(
        self, state: StoreState, generation: int, salvage: bool, *, keep: bool
    ) -> _Journal:
        path = self._files.journal(generation)
        fd = open_journal(path)
        try:
            status = os.fstat(fd)
            if has_failed_sync(status):
                state.failed_sync_generation = max(state.failed_sync_generation, generation)
            journal = await self._read_journal(path, generation, fd, salvage, newest=keep)
        except BaseException:
            os.close(fd)
            raise
        if keep:
            state.follow(fd, status)
            state.generation = generation
            state.offset = journal.end
            state.sequence = len(journal.entries)
            state.feed_end = journal.feed_end
            state.sealed = bool(journal.entries) and journal.entries[-1].kind is Kind.SEAL
        else:
            os.close(fd)
        return journal

    async def _read_journal(
        self, path: Path, generation: int, fd: int, salvage: bool, *, newest: bool
    ) -> _Journal:
        entries: list[Entry] = []
        named: list[Mapping[str, FileState]] = []
        end = 0
        alone = False
        feed_end: FeedPosition | None = None
        try:
            async for entry, position in scan_file(fd, path, os.fstat(fd).st_size):
                if not entries:
                    if entry.kind is not Kind.HEAD:
                        break
                    head = _head(entry, path, generation)
                    alone = head.alone
                    feed_end = head.position(entry.check)
                    named.append(head.files)
                elif entry.kind is Kind.FOLD:
                    named.append(read_naming(Fold, entry.payload, str(path)).files)
                if entry.before:
                    feed_end = FeedPosition(generation, end, entry.check)
                    entry.before.clear()
                entries.append(entry)
                end = position
            if not entries:
                raise CorruptionError(
                    f"{path} at byte 0: the journal does not begin with a HEAD record. {USE_FILES}"
                )
            if not newest and entries[-1].kind is not Kind.SEAL:
                raise CorruptionError(
                    f"{path} ends without a SEAL record, although generation {generation + 1} exists. "
                    f"{USE_UNDAMAGED}"
                )
        except CorruptionError:
            if not salvage:
                raise
            return _Journal(generation, entries, named, end, alone, feed_end, complete=False)
        return _Journal(generation, entries, named, end, alone, feed_end, complete=True)

    def _add_known(self, state: StoreState, files: Mapping[str, FileState]) -> None:
        for name, each in files.items():
            self._files.add(name, each.collection)
            known = state.known.setdefault(name, [])
            if each not in known:
                known.append(each)

    def announce(self, state: StoreState, files: Mapping[str, FileState]) -> None:
        """Add the contents that a FOLD record names. Those equal to the current content are already in
        place; the others may never appear, if the compacting process dies."""
        self._add_known(state, files)
        for name, each in files.items():
            current = state.content.setdefault(name, FileState(None, 0, ours=False))
            if current.digest == each.digest:
                state.mark_covered(name, each, self.collections_of(name, state))

    async def _replay_all(
        self, state: StoreState, journals: list[_Journal], recover_from: str | None
    ) -> None:
        newest = state.generation
        covers = min((each.covers for each in state.content.values()), default=0)
        expected = covers
        try:
            for number, journal in enumerate(journals):
                state.generation = journal.generation
                complete = expected >= journal.generation and await self._replay(
                    state, journal, recover_from
                )
                if covers <= journal.generation and not complete:
                    # Later commits may depend on the commits that were lost.
                    state.unread = [each.generation for each in journals[number:]]
                    break
                expected = max(expected, journal.generation + 1)
        finally:
            state.generation = newest

    async def _replay(self, state: StoreState, journal: _Journal, recover_from: str | None) -> bool:
        """Apply the commits of a generation to the collections whose data files do not contain them.

        To apply them to the others would be harmless, except for a file that was replaced manually.

        Returns:
            Whether all commits of the generation were applied.
        """
        work = long_work()
        for entry in journal.entries:
            await work.pause_if_due()
            if entry.kind is Kind.COMMIT:
                try:
                    images = await self.commit(state, entry, recovering=recover_from is not None)
                except CorruptionError:
                    if recover_from != "salvage":
                        raise
                    return False
                await state.reclaim()
                await reclaim_images(entry, images)
        return journal.complete

    async def commit(self, state: StoreState, entry: Entry, *, recovering: bool = False) -> _Images:
        """Apply a COMMIT of the current generation.

        The caller calls `state.reclaim` and `reclaim_images` afterwards.

        Args:
            recovering: add the images that were applied to `state.replayed`.
        """
        try:
            images = await images_in(entry.chunks)
        except CorruptionError as exc:
            raise self._unreadable(state, exc) from exc
        missing = self._missing(state, images)
        if missing:
            state.apply(missing, entry.size, await state.merged(missing))
        if recovering:
            for name, each in missing.items():
                state.replayed.setdefault(name, {}).update(each)
        return images

    def commit_small(self, state: StoreState, entries: Sequence[Entry]) -> None:
        """`commit` of consecutive records of together at most `SMALL_TAIL` bytes, in one step."""
        images: dict[str, dict[str, bytes | None]] = {}
        try:
            for entry in entries:
                for name, section in read_commit(entry.payload).items():
                    images.setdefault(name, {}).update(section)
        except CorruptionError as exc:
            raise self._unreadable(state, exc) from exc
        missing = self._missing(state, images)
        if missing:
            state.apply(missing, sum([each.size for each in entries]), {})

    def _unreadable(self, state: StoreState, exc: CorruptionError) -> CorruptionError:
        return CorruptionError(f"{self._files.journal(state.generation)}: {exc}. {USE_UNDAMAGED}")

    def _missing(self, state: StoreState, images: _Images) -> _Images:
        """The images for the collections whose data files do not contain this generation."""
        for name in images.keys() - state.sections.keys():
            state.sections[name] = self._undeclared_section(state, name)
        newer = [each for each in state.content if state.content[each].covers > state.generation]
        if not newer:
            return images
        contained = set().union(*[self.collections_of(each, state) for each in newer])
        return {name: each for name, each in images.items() if name not in contained}

    def _undeclared_section(self, state: StoreState, name: str) -> CollectionTable:
        """The section of an undeclared collection, with the entities that its data file contains."""
        section = self.section(name)
        for extras in state.extras.values():
            if name in extras:
                section.entities.update(
                    parse_object(msgspec.Raw(extras.pop(name)), f"section {name!r}")
                )
        return section

    # -- data files --------------------------------------------------------------------------

    async def _load_file(
        self, name: str, state: StoreState, recover_from: str | None, first: int
    ) -> bool:
        """Load a data file; False if no journal names its content.

        Args:
            first: the oldest existing generation.
        """
        known = state.known.get(name, [])
        file = await self._read_file(name, known)
        if file is None:
            state.signatures[name] = None
            return self._set_content(name, None, state, recover_from, first)
        if not known:
            self._refuse_other_links(name)
        digest = await self._expected_digest(file, known)
        named = self._set_content(name, digest, state, recover_from, first)
        try:
            wrapped = await self._parse_file(name, file, state)
        except StorageError:
            if await file.digest == digest or not known:
                raise
        actual = await file.digest
        if actual != digest:
            # It was parsed as if it were the content with its signature, or without a known one.
            named = self._set_content(name, actual, state, recover_from, first)
            if known:
                self._forget_file(name, state)
                wrapped = await self._parse_file(name, file, state)
        state.signatures[name] = file.signature
        state.content[name] = msgspec.structs.replace(state.content[name], wrapped=wrapped)
        return named

    async def _expected_digest(self, file: DataFile, known: list[FileState]) -> str:
        """The digest of the known content with the signature of a file. If there is none, that of the
        file, for which parsing waits only if there are other known contents."""
        for each in reversed(known):
            if each.digest is not None and Signature.known(each) == file.signature:
                return each.digest
        return "" if not known and not file.digest.done() else await file.digest

    def _set_content(
        self, name: str, digest: str | None, state: StoreState, recover_from: str | None, first: int
    ) -> bool:
        """Record the content of a data file; False if no journal names it."""
        known = state.known.get(name, [])
        match = next((each for each in reversed(known) if each.digest == digest), None)
        if match is not None and match.covers < first <= max(each.covers for each in known):
            match = None  # an older file was put back after a compaction
        state.content[name] = match or self._accepted_content(
            name, digest, state, recover_from, first
        )
        return match is not None

    def _forget_file(self, name: str, state: StoreState) -> None:
        for collection in self.collections_of(name, state):
            state.sections[collection] = self.section(collection)
        state.extras.pop(name, None)

    def _refuse_other_links(self, name: str) -> None:
        """Refuse a file without a journal that has other hard links: it may have a journal there."""
        for path in self._files.paths_of(name):
            links = self._files.other_link_count(path)
            if links:
                raise ConfigurationError(
                    f"{path} has {links} other name(s) (hard links), and may already be in use as a "
                    "store under one of them: replacing it here would not change the file there. Use "
                    "the other name, or break the link: copy the file, and rename the copy to this "
                    "path"
                )

    def _accepted_content(
        self, name: str, digest: str | None, state: StoreState, recover_from: str | None, first: int
    ) -> FileState:
        """Accept a file whose content no journal names."""
        known = state.known.get(name, [])
        if known:
            if digest is None and recover_from != "file":
                # Even with "journal" or "salvage": the journal alone would appear to be the complete
                # content.
                copy = "".join(
                    f"copy {each} to {str(each).rpartition('.bak.')[0]}, and run `hf-async-store "
                    "checkpoint --recover-from journal` (the commits between that backup and the last "
                    "compaction are lost); or "
                    for each in self._files.backups(name)[:1]
                )
                raise CorruptionError(
                    f"{self._files.path(name)} is missing, although its journal exists. Copy the "
                    f"folder, then {copy}restore a backup by `hf-async-store restore`; or continue "
                    "without its content and without the journal: `hf-async-store checkpoint "
                    "--recover-from file` (all commits since the last compaction are then lost, too)"
                )
            state.replaced.add(name)
        collection = self._files.names[name]
        key = known[-1].key if known else ""
        if collection is not None and collection in self._schema:
            key = self._schema[collection].key
        return FileState(digest, first, ours=False, collection=collection, key=key)

    async def _parse_file(self, name: str, file: DataFile, state: StoreState) -> bool:
        """Parse a data file into its sections; returns whether it wraps its collection."""
        try:
            return await self._parse_file_lines(name, file.text, state)
        except OtherLayout:
            self._forget_file(name, state)
            return await self._parse_other_layout(name, file.text, state)

    async def _parse_file_lines(self, name: str, data: bytes, state: StoreState) -> bool:
        """Parse a file that has one entity per line."""
        if not data.startswith(b"{\n") or not data.endswith(b"}\n"):
            raise OtherLayout
        collection = self._files.names[name]
        if collection is None:
            await self._parse_sections(name, data, state)
            return False
        trusted = state.content[name].ours
        section = state.sections.setdefault(collection, self.section(collection))
        wrapped = _section_name(data[2 : data.find(b"\n", 2)]) == collection
        if wrapped:
            await self._parse_sections(name, data, state)
        elif await _load_lines(section, data, 2, trusted=trusted) + 2 != len(data):
            raise OtherLayout
        found = section.entities.get(collection)
        if found is not None and not (trusted and (wrapped or type(found) is bytes)):
            raise OtherLayout  # perhaps it wraps the entities
        return wrapped

    async def _parse_sections(self, name: str, data: bytes, state: StoreState) -> None:
        """Parse sections that have one entity per line."""
        trusted = state.content[name].ours
        collections = self.collections_of(name, state)
        position = 2
        key = state.content[name].key
        seen: set[str] = set()
        while position + 2 != len(data):
            end = data.find(b"\n", position)
            section_name = _section_name(data[position:end])
            if section_name not in collections:
                await self._parse_object_members(name, b"{" + data[position:], state, seen=seen)
                return
            if section_name in seen:
                raise OtherLayout
            seen.add(section_name)
            section = state.sections[section_name]
            position = await _load_lines(section, data, end + 1, trusted=trusted)
            if key and not trusted and has_key(key, section_name, section.entities):
                raise OtherLayout  # it is an entity, and no section
            last = position + 4 == len(data)
            if data[position : position + 3] != (b"}\n}" if last else b"},\n"):
                raise OtherLayout
            position += 2 if last else 3
            if not last and position + 2 == len(data):
                raise OtherLayout  # a comma after the last section

    async def _parse_other_layout(self, name: str, data: bytes, state: StoreState) -> bool:
        """Parse a file in another layout."""
        collection = self._files.names[name]
        if len(data) > _LARGE_FILE:
            from hf_async_store.strategies.json.normalize_layout import rewritten

            # If the child process, or disk space for its files, is not available, the parsing below
            # blocks the event loop.
            with suppress(OtherLayout, OSError):
                key = state.content[name].key
                lines = await rewritten(data, collection, key, self._schema)
                return await self._parse_file_lines(name, lines, state)
        return await self._parse_object_members(name, data, state)

    async def _parse_object_members(
        self, name: str, data: bytes, state: StoreState, *, seen: Set[str] = frozenset()
    ) -> bool:
        """Parse an object whose members are sections or entities.

        Args:
            seen: the sections before this object, which was cut out of the file.

        Returns:
            Whether it wraps the collection of the file.
        """
        trusted = state.content[name].ours
        path = str(self._files.path(name))
        members = await _members(data, path, unique=not trusted)
        if seen & members.keys():
            raise OtherLayout
        collection = self._files.names[name]
        key = state.content[name].key
        if collection is not None and not seen and not is_wrapped(collection, key, members):
            state.sections.setdefault(collection, self.section(collection)).entities.update(
                stored_entities(members, trusted=trusted)
            )
            return False
        for each, raw in members.items():
            if each in state.sections and collection in (None, each):
                entities = await _members(raw, f"section {each!r} of {path}", unique=not trusted)
                state.sections[each].entities.update(stored_entities(entities, trusted=trusted))
            else:
                if not trusted:
                    self._refuse_mixed(name, key, each, raw)
                state.extras.setdefault(name, {})[each] = bytes(raw)
        return collection is not None

    def _refuse_mixed(self, name: str, key: str, member: str, raw: msgspec.Raw) -> None:
        """Check that a member beside the one that wraps the collection is not an entity, by its key
        field or another declared one.

        Raises:
            CorruptionError: it is an entity. In either layout, some entities would be missing.
        """
        collection = self._files.names[name]
        if collection is None:
            return
        try:
            members = parse_object(raw, member)
        except CorruptionError:
            return  # an undeclared section of another form
        declared = self._schema[collection].fields if collection in self._schema else {}
        if has_key(key, member, members) or members.keys() & declared.keys():
            raise CorruptionError(
                f"{self._files.path(name)} mixes two layouts: it has entities in its member "
                f"{collection!r}, and the entity {member!r} beside it. Nothing was changed. Move all "
                "entities into that member, or all out of it, or restore a backup (`hf-async-store "
                "restore`)"
            )


def _head(entry: Entry, path: Path, generation: int) -> Head:
    head = read_naming(Head, entry.payload, str(path))
    if head.generation != generation:
        raise CorruptionError(
            f"{path} contains generation {head.generation}, which does not match the number in its "
            "name. If the file was renamed, restore its name; otherwise restore a backup "
            "(`hf-async-store restore`)"
        )
    return head


async def _members(data: StoredEntity, what: str, *, unique: bool) -> dict[str, msgspec.Raw]:
    """The same as `parse_object`, but it returns control to the event loop in between."""
    try:
        members = decode_members(data)
    except UNREADABLE:
        # This takes longer, determines the cause, and refuses duplicate names.
        return await in_thread(parse_object, data, what)
    if unique:
        await pause()
        for _ in refuse_duplicates(bytes(data), members, what):
            await pause()
    return members


async def _load_lines(section: CollectionTable, data: bytes, start: int, *, trusted: bool) -> int:
    """Load the entities of a section that begins at `start`, with one entity per line.

    Returns:
        The offset of the brace that ends the section.

    Raises:
        OtherLayout: the section has another layout, or contains an id twice.
    """
    end = start
    for chunk in parse_lines(data, start, trusted=trusted):
        if isinstance(chunk, int):
            end = chunk
            continue
        number = len(section.entities) + len(chunk)
        section.entities.update(chunk)
        if len(section.entities) != number:
            raise OtherLayout
        await pause()
    return end


async def scan_file(
    fd: int, path: str | Path, size: int, offset: int = 0, sequence: int = 0
) -> AsyncGenerator[tuple[Entry, int], None]:
    """`scan` a journal of `size` bytes from `offset` on, and return control to the event loop in
    between."""
    chunks: Iterable[bytes] = read_chunks(fd, offset, size, path)
    # In a thread: the checksum of a large record would block the event loop.
    large = size - offset > _LARGE_TAIL
    if not large and size - offset > SMALL_TAIL:
        chunks = await in_thread(list, chunks)
    entries = scan(chunks, str(path), offset, sequence)
    more = True
    while more:
        batch: list[tuple[Entry, int]] = []
        failure: CorruptionError | None = None
        try:
            if large:
                more = await in_thread(_fill, batch, entries, _TAIL_CHUNK)
            else:
                more = _fill(batch, entries, _TAIL_PIECE)
        except CorruptionError as exc:
            failure = exc
        for each in batch:
            yield each
        if failure is not None:
            raise failure
        await pause()


def _fill(batch: list[tuple[Entry, int]], entries: Iterator[tuple[Entry, int]], most: int) -> bool:
    """Add the next records, up to about `most` bytes; returns whether there may be more."""
    size = 0
    for entry, end in entries:
        batch.append((entry, end))
        size += entry.size
        if size > most:
            return True
    return False


async def _collect_commits(state: StoreState, journals: Iterable[_Journal]) -> None:
    """Add the commits of journals to a state for lookups."""
    work = long_work()
    for journal in journals:
        sizes = state.pending.setdefault(journal.generation, {})
        for entry in journal.entries:
            if entry.kind is Kind.COMMIT:
                payload = entry.payload
                spans = _spans_of_commit(payload)
                state.commits.append((payload, spans))
                for collection, (start, end) in spans.items():
                    sizes[collection] = sizes.get(collection, 0) + end - start
                await work.pause_if_due()
        if not sizes:
            del state.pending[journal.generation]


def _spans_of_commit(payload: bytes) -> dict[str, Span]:
    """The collections in the payload of a COMMIT with one entity per line, and where they are.

    Raises:
        OtherLayout: it has another layout.
    """
    spans: dict[str, Span] = {}
    position = 1
    while payload[position : position + 1] != b"}":
        start = payload.find(b"\n", position) + 1
        name = _section_name(payload[position : start - 1])
        if not name or name in spans:
            raise OtherLayout
        spans[name] = span = span_of_section(payload, start)
        position = span[1] + 1 + (payload[span[1] + 1 : span[1] + 2] == b",")
    if not payload.startswith(b"{") or position + 1 != len(payload):
        raise OtherLayout
    return spans


async def images_in(chunks: Sequence[bytes]) -> dict[str, dict[str, bytes | None]]:
    """The images in the payload of a COMMIT."""
    if sum(map(len, chunks)) > CHUNK_BYTES:
        with suppress(OtherLayout):
            return await parse_commit(chunks)
    return read_commit(b"".join(chunks))


async def parse_commit(chunks: Sequence[bytes]) -> dict[str, dict[str, bytes | None]]:
    """Parse the payload of a COMMIT with one entity per line.

    Raises:
        OtherLayout: it has another layout.
    """
    images: dict[str, dict[str, bytes | None]] = {}
    section: dict[str, bytes | None] | None = None  # the section that is being parsed
    ended = False
    for lines in _whole_lines(chunks):
        rest = lines
        while rest:
            if ended:
                raise OtherLayout
            if section is not None:
                entities, rest, section_ended = _parse_section_lines(rest)
                section.update(
                    (each, raw if type(raw) is bytes else image(bytes(raw)))
                    for each, raw in entities.items()
                )
                if section_ended:
                    section = None
                await pause()
                continue
            line, _, rest = rest.partition(b"\n")
            prefix = b"}," if images else b"{"
            name = _section_name(line.removeprefix(prefix)) if line.startswith(prefix) else ""
            ended = line == b"}}"
            if name:
                if name in images:
                    raise OtherLayout
                section = images[name] = {}
            elif not ended:
                raise OtherLayout
    if not ended:
        raise OtherLayout
    return images


def _whole_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Divide chunks at line boundaries: each result has whole lines, without the last newline."""
    incomplete: list[bytes] = []
    for chunk in chunks:
        end = chunk.rfind(b"\n")
        if end < 0:
            incomplete.append(chunk)
            continue
        yield b"".join((*incomplete, chunk[:end]))
        incomplete = [chunk[end + 1 :]]
    yield b"".join(incomplete)


def _parse_section_lines(lines: bytes) -> tuple[dict[str, StoredEntity], bytes, bool]:
    """Parse lines up to the end of the section.

    Returns:
        The entities, the remaining lines, and whether the section ends in these lines.
    """
    last = not lines.endswith(b",")
    try:
        return parse_chunk(lines, last=last, trusted=True), b"", last
    except OtherLayout:
        end = lines.find(b"\n}")
        if end < 0:
            raise
    return parse_chunk(lines[:end], last=True, trusted=True), lines[end + 1 :], True


async def reclaim_images(entry: Entry, images: Mapping[str, dict[str, bytes | None]]) -> None:
    """Free an applied commit in chunks: in one step it would block the event loop."""
    if entry.size <= CHUNK_BYTES:
        return
    for each in images.values():
        await reclaim(each)
    for chunks in (entry.before, entry.chunks):
        while chunks:
            del chunks[-_FREE_CHUNK:]
            await pause()


def _section_name(line: bytes) -> str:
    if not line.endswith(b":{"):
        return ""
    try:
        return msgspec.json.decode(line[:-2], type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


def open_journal(path: Path) -> int:
    """Open a journal for reading; returns the descriptor.

    Raises:
        JournalMissing: it does not exist.
    """
    try:
        # O_NOFOLLOW: links are not followed. O_NONBLOCK: opening a pipe must not wait.
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
        raise ConfigurationError(
            f"{path} has the name of a journal but is not a regular file. Move it to another folder"
        )
    return fd


def read_chunks(fd: int, offset: int, size: int, path: str | Path) -> Iterator[bytes]:
    """Read a journal from `offset` up to `size`, in chunks."""
    while offset < size:
        try:
            chunk = os.pread(fd, min(CHUNK_BYTES, size - offset), offset)
        except OSError as exc:
            raise translate_os_error(exc, f"read {path}") from exc
        if not chunk:
            return
        yield chunk
        offset += len(chunk)
