"""The requests to DynamoDB Streams: the shards of a stream, and their records.

A shard is read by an iterator, which each page replaces by the next one, and which expires after some
minutes. Iterators are kept by the place that they stand for, so that reading on from the end of a page
takes one request.
"""

from __future__ import annotations

import time
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hf_async_store.strategies.dynamodb.errors import IteratorExpired, RecordsTrimmed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.feed_positions import Mark

# Source: DynamoDB Developer Guide, "Change data capture for DynamoDB Streams".
RETENTION_SECONDS: Final = 24 * 3600.0
_MAX_RECORDS: Final = 1_000
_ITERATOR_SECONDS: Final = 10 * 60.0
"""The service keeps an iterator for 15 minutes."""

_MAX_KEPT: Final = 4_096
_MARGIN_SECONDS: Final = 60.0
_MAX_EMPTY: Final = 20
"""So many pages without records are read in a row, after the latest record of the shard that was read
from another place, before they are taken for its end."""


class Place(NamedTuple):
    """A place in a shard of a stream."""

    stream: str
    shard: str
    mark: Mark


class Shard(NamedTuple):
    """A shard as it is listed.

    Attributes:
        first: the sequence number of its first record; "" if it is not known.
    """

    parent: str
    first: str


class Page(NamedTuple):
    """Records that follow one another.

    Attributes:
        is_last: the shard has ended, and there are no more.
    """

    records: Sequence[Mapping[str, Any]]
    is_last: bool


class _Latest(NamedTuple):
    """The latest record of a shard that was read: its sequence number and its time."""

    number: int
    time: float


class Shards:
    """Reads the streams of a store."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._iterators: dict[Place, tuple[str, float]] = {}
        self._latest: dict[tuple[str, str], _Latest] = {}  # by shard, of all records that were read
        # Of places that are the end of a shard at some time: the latest record that was read before.
        self._ends: dict[tuple[str, str, float], int] = {}
        # The number of empty pages in a row, and the latest record when they were read.
        self._empty: dict[Place, tuple[int, _Latest | None]] = {}

    async def listed(self, stream: str) -> dict[str, Shard]:
        """The shards that the stream still contains, by id."""
        found: dict[str, Shard] = {}
        params = {"StreamArn": stream}
        while True:
            response = await self._client.read("DescribeStream", params)
            description = response["StreamDescription"]
            for each in description["Shards"]:
                first = each.get("SequenceNumberRange", {}).get("StartingSequenceNumber")
                found[each["ShardId"]] = Shard(each.get("ParentShardId") or "", first or "")
            last = description.get("LastEvaluatedShardId")
            if not last or last == params.get("ExclusiveStartShardId"):
                return found
            params["ExclusiveStartShardId"] = last

    async def end_of(self, place: Place) -> str:
        """An iterator for the present end of a shard, where the place is until it expires."""
        latest = self._latest.get(place[:2])
        iterator = await self._iterator(place, "LATEST")
        self._ends[_end_in(place)] = -1 if latest is None else latest.number
        _limit(self._ends)
        self._keep(place, iterator)
        return iterator

    async def read(self, place: Place, limit: int) -> Page:
        """The records after a place.

        Raises:
            RecordsTrimmed: some of them are not kept any more.
            TableMissing: the shard is not kept any more.
        """
        response = await self._records(place, limit)
        records, following = response["Records"], response.get("NextShardIterator")
        if not records:
            number = self._empty_pages(place) + 1
            self._empty.pop(place, None)
            self._empty[place] = number, self._latest.get(place[:2])
            _limit(self._empty)
        if following and not records:
            self._keep(place, following)
        elif following:
            number = records[-1]["dynamodb"]["SequenceNumber"]
            self._keep(place._replace(mark=type(place.mark)(number)), following)
        if records:
            self._empty.pop(place, None)
            self._note_latest(place, records[-1]["dynamodb"])
        return Page(records, not following)

    def is_behind(self, place: Place, tolerance: float) -> bool:
        """Whether records after a place were read before, or may have been.

        A page without records is no proof that none follow: several may have to be read first. Of a place
        that is only that of an iterator, the times tell, roughly; so that is limited.

        Args:
            tolerance: by how much the times may differ.
        """
        mark = place.mark
        latest = self._latest.get(place[:2])
        if latest is None:
            return False
        if mark.since and not mark.number:
            is_new = latest.number > self._ends.get(_end_in(place), -1)
            may_follow = is_new and latest.time >= mark.since - tolerance
            return may_follow and self._empty_pages(place) < _MAX_EMPTY
        number = int(mark.number or 0)
        return number <= latest.number if mark.is_next else number < latest.number

    def _empty_pages(self, place: Place) -> int:
        """How many empty pages were read since the latest record of the shard was."""
        number, latest = self._empty.get(place, (0, None))
        return number if latest == self._latest.get(place[:2]) else 0

    def _note_latest(self, place: Place, record: Mapping[str, Any]) -> None:
        time = record.get("ApproximateCreationDateTime", inf)
        new = _Latest(int(record["SequenceNumber"]), time)
        shard = place[:2]
        self._latest[shard] = max(self._latest.pop(shard, new), new)
        _limit(self._latest)

    async def _records(self, place: Place, limit: int) -> dict[str, Any]:
        number = min(limit, _MAX_RECORDS)
        iterator, kept_at = self._iterators.get(place, ("", -inf))
        if time.monotonic() - kept_at > _ITERATOR_SECONDS:
            iterator = place.mark.iterator
        if iterator:
            with suppress(IteratorExpired):
                params = {"ShardIterator": iterator, "Limit": number}
                return await self._client.read("GetRecords", params)
        iterator = await self._iterator(place, _kind_of(place.mark))
        return await self._client.read("GetRecords", {"ShardIterator": iterator, "Limit": number})

    async def _iterator(self, place: Place, kind: str) -> str:
        params = {"StreamArn": place.stream, "ShardId": place.shard, "ShardIteratorType": kind}
        if place.mark.number:
            params["SequenceNumber"] = place.mark.number
        response = await self._client.read("GetShardIterator", params)
        iterator: str = response["ShardIterator"]
        return iterator

    def _keep(self, place: Place, iterator: str) -> None:
        self._iterators.pop(place, None)
        self._iterators[place] = iterator, time.monotonic()
        _limit(self._iterators)


def _end_in(place: Place) -> tuple[str, str, float]:
    """A place that is the end of its shard at some time, with or without its iterator."""
    return place.stream, place.shard, place.mark.since


def _limit(kept: dict[Any, Any]) -> None:
    """Forget the oldest entry if there are too many."""
    if len(kept) > _MAX_KEPT:
        del kept[next(iter(kept))]


def _kind_of(mark: Mark) -> str:
    """How to begin at a mark without an iterator.

    Raises:
        RecordsTrimmed: the records after it may not be kept any more.
    """
    if mark.number:
        return "AT_SEQUENCE_NUMBER" if mark.is_next else "AFTER_SEQUENCE_NUMBER"
    if mark.since and time.time() - mark.since > RETENTION_SECONDS - _MARGIN_SECONDS:
        raise RecordsTrimmed("the stream does not contain the requested records any more")
    return "TRIM_HORIZON"
