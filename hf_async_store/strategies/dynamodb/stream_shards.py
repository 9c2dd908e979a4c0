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

from msgspec.structs import replace

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

_MAX_ITERATORS: Final = 4_096
_MARGIN_SECONDS: Final = 60.0


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


class Shards:
    """Reads the streams of a store."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._iterators: dict[Place, tuple[str, float]] = {}

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

    async def end_of(self, place: Place, *, exact: bool) -> Mark:
        """The present end of the shard of a place, where it is until the iterator expires.

        Args:
            exact: the mark contains the iterator. Otherwise only this process has it.
        """
        iterator = await self._iterator(place, "LATEST")
        if exact:
            return replace(place.mark, iterator=iterator)
        self._keep(place, iterator)
        return place.mark

    async def read(self, place: Place, limit: int) -> Page:
        """The records after a place.

        Raises:
            RecordsTrimmed: some of them are not kept any more.
            TableMissing: the shard is not kept any more.
        """
        response = await self._records(place, limit)
        records, following = response["Records"], response.get("NextShardIterator")
        if following and not records:
            self._keep(place, following)
        elif following:
            number = records[-1]["dynamodb"]["SequenceNumber"]
            self._keep(place._replace(mark=type(place.mark)(number)), following)
        return Page(records, not following)

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
        if len(self._iterators) > _MAX_ITERATORS:
            del self._iterators[next(iter(self._iterators))]


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
