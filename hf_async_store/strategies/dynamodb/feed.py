"""The change feed of a collection: the stream of its table, as entities.

The stream contains every write of an item by whichever program. Records that do not change the entity are
skipped: claims, and items rewritten by another declaration.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgspec.structs import replace

from hf_async_store.driver import FeedBatch, FeedEntry
from hf_async_store.errors import FeedExpiredError, SchemaMismatchError, UnavailableError
from hf_async_store.strategies.dynamodb.errors import (
    IteratorExpired,
    RecordsTrimmed,
    StatementRefused,
    TableMissing,
    UnexpectedResponse,
)
from hf_async_store.strategies.dynamodb.feed_positions import (
    Mark,
    Position,
    invalid_position,
    position_in,
    table_of,
)
from hf_async_store.strategies.dynamodb.items import TOKEN
from hf_async_store.strategies.dynamodb.partitions import PARALLEL, gather
from hf_async_store.strategies.dynamodb.stream_shards import Place, Shards
from hf_async_store.strategies.dynamodb.table_stream import problem_with, stream_of
from hf_async_store.strategies.dynamodb.write_op import chunks
from hf_async_store.values import VERSION, canonical

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hf_async_store.changes import Record
    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.items import ItemMapping
    from hf_async_store.strategies.dynamodb.tables import Tables

# The service allows 5 calls of GetRecords a second for a shard.
_FIRST_PAUSE: Final = 0.2
_LONGEST_PAUSE: Final = 1.0
_PAUSE_GROWTH: Final = 1.5

_MAX_PAGES: Final = 10
"""So many pages without a change of an entity are read at once."""

_MIN_RECORDS: Final = 10
_MAX_POSITION: Final = 2_900
"""A longer position does not contain the iterators of its shards, each of which has some hundred bytes:
its token must fit into a header, such as Last-Event-ID, of which servers accept 4 KB."""

_ROUNDED: Final = 1.0
"""The times of records are rounded down to seconds."""


class _Change(NamedTuple):
    """A change, and the mark of its shard after it."""

    before: Record | None
    after: Record | None
    mark: Mark


class _Part(NamedTuple):
    """What was read of one shard.

    Attributes:
        mark: where it was read to.
        has_ended: there are no more records.
    """

    changes: list[_Change]
    mark: Mark
    has_ended: bool


class Feed:
    """Implements the feed of the engine.

    Args:
        client: sends requests to DynamoDB Streams.
    """

    def __init__(self, client: Client, tables: Tables) -> None:
        self._client = client
        self._tables = tables
        self._shards = Shards(client)
        self._streams: dict[str, str] = {}
        self._seen: Mapping[str, str] = {}
        self._pause = _FIRST_PAUSE

    async def end(self, collection: str) -> str:
        """As `Engine.feed_position`. A missing table is created."""
        if await self._tables.find(collection) is None:
            await self._tables.ensure(collection)
        stream = await self._stream(collection)
        if stream is None:
            raise UnavailableError(f"the table {self._tables.name(collection)} was deleted")
        mark = Mark(since=time.time())
        iterators: list[str] = []
        with _public(collection):
            newest = await self._newest(stream)
            for some in chunks((Place(stream, each, mark) for each in newest), PARALLEL):
                iterators += await gather([self._shards.end_of(each) for each in some])
        exact = [replace(mark, iterator=each) for each in iterators]
        text = Position(stream, dict(zip(newest, exact, strict=True))).text()
        if len(text) <= _MAX_POSITION:
            return text
        # Then only this process has them.
        return Position(stream, dict.fromkeys(newest, mark)).text()

    async def _newest(self, stream: str) -> list[str]:
        """The shards that no other one continues."""
        retries = self._client.retries()
        while True:
            shards = await self._shards.listed(stream)
            parents = {each.parent for each in shards.values()}
            newest = [each for each in shards if each not in parents]
            if newest:
                return newest
            if not await retries.pause():
                raise UnavailableError("DynamoDB does not list the shards of a stream yet")

    async def _stream(self, collection: str) -> str | None:
        """The ARN of the stream of a collection; None if there is no table.

        Raises:
            SchemaMismatchError: the table has no stream, or one without the items before and after.
        """
        table = await self._tables.described(collection)
        if table is None:
            return None
        problem = problem_with(table, self._tables.name(collection))
        if problem:
            raise SchemaMismatchError(problem)
        self._streams[collection] = stream = stream_of(table)
        return stream

    async def read(self, collection: str, since: str, limit: int) -> FeedBatch:
        """As `Engine.read_feed`."""
        position = position_in(since)
        if position.stream != self._streams.get(collection):
            await self._check_stream(collection, position)
        places = [Place(position.stream, each, mark) for each, mark in position.shards.items()]
        most = max(limit // len(places), _MIN_RECORDS)
        parts: list[_Part] = []
        with _public(collection):
            for some in chunks(places, PARALLEL):
                parts += await gather([self._read_shard(collection, each, most) for each in some])
            batch = await self._batch(collection, position, dict(zip(places, parts, strict=True)))
        if not batch.is_end and batch.position == since:
            await asyncio.sleep(_FIRST_PAUSE)
        return batch

    async def _check_stream(self, collection: str, position: Position) -> None:
        """Check that a position is in the present stream of the collection.

        Raises:
            FeedExpiredError: it is in a former one, after which changes may not have been recorded.
            InvalidCursorError: it is in that of another table.
        """
        stream = await self._stream(collection)
        if stream == position.stream:
            return
        own = self._tables.name(collection) if stream is None else table_of(stream)
        if not position.table.endswith(own):
            raise invalid_position()
        raise FeedExpiredError(
            f"the feed of {collection} has begun anew: its table was made again, or its stream was disabled"
        )

    async def _batch(
        self, collection: str, position: Position, parts: Mapping[Place, _Part]
    ) -> FeedBatch:
        marks = dict(position.shards)
        entries: list[FeedEntry] = []
        for place, part in parts.items():
            for change in part.changes:
                marks[place.shard] = change.mark
                record = change.after or change.before
                assert record is not None, "a change of an entity"
                after = Position(position.stream, marks).text()
                entries.append(FeedEntry(record.key, change.before, change.after, after))
            marks[place.shard] = part.mark
        ended = [each.shard for each, part in parts.items() if part.has_ended]
        if ended:
            await self._go_on(collection, position, marks, ended)
        is_end = (
            not entries
            and marks == position.shards
            and not any(self._shards.is_behind(each, self._tolerance) for each in parts)
        )
        return FeedBatch(entries, Position(position.stream, marks).text(), is_end)

    async def _go_on(
        self, collection: str, position: Position, marks: dict[str, Mark], ended: Sequence[str]
    ) -> None:
        """Replace shards that were read to their end by those that continue them."""
        shards = await self._shards.listed(position.stream)
        for shard in ended:
            children = {
                name: Mark(each.first, is_next=True)
                for name, each in shards.items()
                if each.parent == shard
            }
            if children:
                del marks[shard]
                marks.update(children)
        if marks == position.shards:
            # Nothing goes on: perhaps the stream has ended.
            await self._check_stream(collection, position)

    async def _read_shard(self, collection: str, place: Place, limit: int) -> _Part:
        """Read pages until there are changes, or no more records for now."""
        for _ in range(_MAX_PAGES):
            page = await self._shards.read(place, limit)
            part = self._part(collection, place.mark, page.records, has_ended=page.is_last)
            if part.changes or page.is_last or not page.records:
                break
            place = place._replace(mark=part.mark)
        return part

    def _part(
        self,
        collection: str,
        mark: Mark,
        records: Sequence[Mapping[str, Any]],
        *,
        has_ended: bool,
    ) -> _Part:
        mapping = self._tables.mappings[collection]
        earliest = mark.since - self._tolerance if mark.since else 0.0
        changes: list[_Change] = []
        for each in records:
            record = each["dynamodb"]
            is_skipped = record.get("ApproximateCreationDateTime", earliest) < earliest
            mark = Mark(record["SequenceNumber"], since=mark.since if is_skipped else 0.0)
            change = None if is_skipped else _change_in(mapping, record)
            if change is not None:
                changes.append(_Change(*change, mark))
        return _Part(changes, mark, has_ended)

    @property
    def _tolerance(self) -> float:
        """By how much the time of a record may be before that of a place that it follows."""
        return self._tables.config.max_clock_skew + _ROUNDED

    async def changed(self, positions: Mapping[str, str], seconds: float) -> None:
        """As `Engine.feed_changed`: the pause between two reads."""
        is_idle = positions == self._seen
        self._seen = dict(positions)
        self._pause = min(self._pause * _PAUSE_GROWTH, _LONGEST_PAUSE) if is_idle else _FIRST_PAUSE
        await asyncio.sleep(min(self._pause, seconds))


@contextmanager
def _public(collection: str) -> Iterator[None]:
    """Raise the errors of the feed for those of its stream."""
    try:
        yield
    except (RecordsTrimmed, TableMissing) as exc:
        raise FeedExpiredError(
            f"the feed of {collection} does not contain all changes after this position any more"
        ) from exc
    except IteratorExpired as exc:  # a new one
        raise UnavailableError("DynamoDB does not accept its iterators of a stream") from exc
    except StatementRefused as exc:
        raise invalid_position() from exc


def _change_in(
    mapping: ItemMapping, record: Mapping[str, Any]
) -> tuple[Record | None, Record | None] | None:
    """The entity before and after a record of the stream; None if the record does not change an entity.

    Raises:
        CorruptionError: another program wrote an item that is not a valid entity.
    """
    before, after = record.get("OldImage"), record.get("NewImage")
    item = after or before
    if item is None:
        raise UnexpectedResponse("DynamoDB returned a record of a stream without items")
    if not mapping.is_entity(item) or (before and after and _is_same_write(before, after)):
        return None
    old = mapping.record(before) if before else None
    new = mapping.record(after) if after else None
    if old and new and canonical(old.entity) == canonical(new.entity):
        return None
    return old, new


def _is_same_write(before: Attributes, after: Attributes) -> bool:
    """Whether only attributes of the store have changed, such as the claim."""
    return TOKEN in after and all(before.get(each) == after.get(each) for each in (TOKEN, VERSION))
