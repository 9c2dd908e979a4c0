"""A store in memory, and the position up to which it has read the journal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final, TypeAlias

import msgspec
from msgspec import Struct, field

from hf_async_store.locked_descriptors import close_locked
from hf_async_store.strategies.json.collection_table import CollectionTable
from hf_async_store.strategies.json.files import DataFile, Signature
from hf_async_store.strategies.json.journal import FeedPosition, FileState, Head, Images
from hf_async_store.strategies.json.serializer import Span, StoredEntity, parse_object
from hf_async_store.table import Merged

_JOURNAL_DIVISOR: Final = 4
"""A journal is compacted when it is larger than 1/4 of the data files: so the bytes that compactions
write stay in proportion to the bytes that commits write."""

_SMALL_FILE_BYTES: Final = 1 << 20
"""Data files up to this size are compacted whenever the store is idle, and at close."""

MergedSections: TypeAlias = Mapping[str, Merged[StoredEntity]]
"""Copies of sections by name, to which the images of a commit are already applied."""


class PendingAppend(Struct, eq=False):
    """A record that is being appended to the journal, and the images of its commit.

    Attributes:
        end: the offset of its end.
        size: the size of its post-images. Pre-images do not count for compactions, which write none.
        check: of a FED_COMMIT, the checksum of its header.
        is_applied: the images are in the state.
    """

    images: Images
    merged: MergedSections
    end: int
    size: int
    check: int | None
    is_applied: bool = False


class StoreState(Struct, eq=False):
    """A store in memory, and the position up to which it has read the journal."""

    sections: dict[str, CollectionTable] = field(default_factory=dict)
    extras: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """By data file: the undeclared sections, with their bytes as in the file."""
    known: dict[str, list[FileState]] = field(default_factory=dict)
    """By data file: the valid contents, the newest last."""
    content: dict[str, FileState] = field(default_factory=dict)
    """By data file: its content when it was read, or since the last compaction."""
    signatures: dict[str, Signature | None] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    """The data files that were replaced manually and accepted; the journal does not name them."""
    pending: dict[int, dict[str, int]] = field(default_factory=dict)
    """By generation and collection: the size of the commits that are not in the data files yet."""
    replayed: dict[str, dict[str, bytes | None]] = field(default_factory=dict)
    """During a recovery: the images that were replayed over the data files."""
    unread: list[int] = field(default_factory=list)
    """During a recovery with "salvage": the generations that are omitted, partly or completely."""
    superseded: bool = False
    """Whether there are journals older than `first`, which a recovery has made invalid."""
    first: int = 0
    """The oldest valid generation when the files were read."""
    failed_sync_generation: int = 0
    """The newest generation of which a sync failed, in any process; 0: none."""
    generation: int = 0
    fd: int = -1
    journal_identity: tuple[int, int] | None = None
    """The device and inode of the open journal."""
    write_fd: int = -1
    """The journal, opened for writing by the first append of this process to it."""
    is_end_checked: bool = False
    """Whether the journal ended at `offset`, without an incomplete record, when this process wrote it."""
    offset: int = 0
    sequence: int = 0
    sealed: bool = False
    feed_end: FeedPosition | None = None
    """The last position of the change feed; None if the current generation has no feed."""
    appending: PendingAppend | None = None
    unparsed: dict[str, tuple[DataFile, Span]] = field(default_factory=dict)
    """Of a state for lookups, by collection: where its entities are. Its sections contain only those that
    were looked up."""
    commits: list[tuple[bytes, dict[str, Span]]] = field(default_factory=list)
    """Of a state for lookups: the commits that the data files do not contain, oldest first, each with where
    the images of its collections are."""

    @property
    def is_open(self) -> bool:
        """Whether there is a journal to which commits can be appended."""
        return self.fd >= 0 and not self.sealed

    @property
    def pending_bytes(self) -> int:
        return sum(sum(each.values()) for each in self.pending.values())

    @property
    def file_bytes(self) -> int:
        return sum(0 if each is None else each.size for each in self.signatures.values())

    @property
    def is_small(self) -> bool:
        return self.file_bytes <= _SMALL_FILE_BYTES

    def is_journal_large(self, buffer_size: int) -> bool:
        """Whether so much is pending that the journal should be compacted.

        Args:
            buffer_size: what may be pending in any case.
        """
        pending = self.pending_bytes
        return pending > buffer_size and pending > self.file_bytes // _JOURNAL_DIVISOR

    def has_pending(self, collections: set[str]) -> bool:
        """Whether a commit to one of these collections is not in its data file yet."""
        return any(name in collections for each in self.pending.values() for name in each)

    @property
    def needs_rewrite(self) -> bool:
        """Whether a data file lacks commits whose sync failed: a power failure could lose them."""
        return self.failed_sync_generation > 0 and any(
            each.covers <= self.failed_sync_generation for each in self.content.values()
        )

    async def before(self, images: Images) -> dict[str, dict[str, bytes | None]]:
        """The entities that a commit is about to change, as they are; without those that it creates."""
        return {name: await self.sections[name].stored(each) for name, each in images.items()}

    async def merged(self, images: Images) -> MergedSections:
        """Copies of the sections to which many of the images apply, for `apply`."""
        return {
            name: await self.sections[name].merged(each)
            for name, each in images.items()
            if self.sections[name].is_bulk(each)
        }

    def apply(self, images: Images, size: int, merged: MergedSections) -> None:
        """Apply a commit of the current generation that has `size` bytes in the journal.

        The caller calls `reclaim` afterwards.
        """
        sizes = self.pending.setdefault(self.generation, {})
        for name, section_images in images.items():
            sizes[name] = sizes.get(name, 0) + size // len(images)
            self.sections[name].apply(section_images, merged.get(name))

    def complete(self, append: PendingAppend) -> None:
        """Apply the record that is being appended, unless it was applied before."""
        if not append.is_applied:
            append.is_applied = True
            if append.check is not None:
                self.feed_end = FeedPosition(self.generation, self.offset, append.check)
            self.offset = append.end
            self.sequence += 1
            if append.images:
                self.apply(append.images, append.size, append.merged)

    async def reclaim(self) -> None:
        for section in self.sections.values():
            if section.garbage:
                await section.reclaim()

    async def free(self) -> None:
        """Free the entities of a store that was closed, in small steps."""
        for section in self.sections.values():
            await section.close()

    def mark_covered(self, name: str, content: FileState, collections: set[str]) -> None:
        """Record that a data file has this content, and all commits before `content.covers`."""
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

    def raw_entity(self, collection: str, entity_id: str) -> StoredEntity | None:
        """The stored bytes of an entity, even of an undeclared collection."""
        section = self.sections.get(collection)
        if section is not None and entity_id in section.entities:
            return section.entities[entity_id]
        for extras in self.extras.values():
            if collection in extras:
                members = parse_object(msgspec.Raw(extras[collection]), f"section {collection!r}")
                return members.get(entity_id)
        return None

    def switch(
        self,
        fd: int,
        status: os.stat_result,
        head: Head,
        check: int,
        offset: int,
        sequence: int,
    ) -> int:
        """Continue with another journal, which is not sealed.

        Args:
            status: of the file.
            check: the checksum of the header of its HEAD.

        Returns:
            The descriptor of the previous one, which the caller closes; -1 if there was none.
        """
        previous, self.fd = self.fd, -1
        self.close()
        self.follow(fd, status)
        self.generation = head.generation
        self.feed_end = head.position(check)
        self.offset = offset
        self.sequence = sequence
        self.sealed = False
        return previous

    def follow(self, fd: int, status: os.stat_result) -> None:
        """Use this journal, which has this status, from now on."""
        self.fd, self.journal_identity = fd, (status.st_dev, status.st_ino)
        self.is_end_checked = False

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        if self.write_fd >= 0:
            close_locked(self.write_fd)
        self.fd = self.write_fd = -1
