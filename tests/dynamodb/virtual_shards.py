"""A stream with many shards: the only shard of the test server, divided by a rule of the proxy.

At each split, every open shard ends and two others continue it. An item is always in one open shard.
"""

from __future__ import annotations

import json
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from zlib import crc32

from tests.dynamodb.proxy import Answer, Fault, Proxy, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

_PAGE: Final = 2
"""So many shards are listed in one response."""


class _Shard(NamedTuple):
    generation: int
    part: int

    @property
    def id(self) -> str:
        return f"shardId-{self.generation:020d}-{self.part:08d}"

    @property
    def parent(self) -> _Shard | None:
        if not self.generation:
            return None
        return _Shard(self.generation - 1, self.part % 2 ** (self.generation - 1))


class VirtualShards:
    """The rule of a proxy.

    Attributes:
        iterator_length: how many characters an iterator has at least.
    """

    def __init__(self, proxy: Proxy, table: str) -> None:
        self._proxy = proxy
        self._table = table
        self._splits: list[int] = []
        self._trimmed = 0
        self._iterator_of_server = ""
        self._read: list[dict[str, Any]] = []
        self.expired = False
        self.iterator_length = 0
        proxy.rule = self

    def split(self) -> None:
        """End all open shards."""
        self._splits.append(len(self._records()))

    def trim(self) -> None:
        """Forget the present records."""
        self._trimmed = len(self._records())

    def __call__(self, request: Request) -> Fault | None:
        answer = {
            "DescribeStream": self._described,
            "GetShardIterator": self._iterator,
            "GetRecords": self._page,
        }.get(request.operation)
        return None if answer is None else answer(request.params)

    # -- answers -----------------------------------------------------------------------------

    def _described(self, params: dict[str, Any]) -> Answer:
        ids = [each.id for each in self._listed()]
        last = params.get("ExclusiveStartShardId")
        start = ids.index(last) + 1 if last else 0
        shards = [self._description(each) for each in self._listed()[start : start + _PAGE]]
        description: dict[str, Any] = {"StreamArn": params["StreamArn"], "Shards": shards}
        if start + _PAGE < len(ids):
            description["LastEvaluatedShardId"] = shards[-1]["ShardId"]
        return Answer(200, {"StreamDescription": description})

    def _description(self, shard: _Shard) -> dict[str, Any]:
        start, end = self._range(shard)
        numbers = {"StartingSequenceNumber": self._number(start)}
        if end is not None:
            numbers["EndingSequenceNumber"] = self._number(end)
        found: dict[str, Any] = {"ShardId": shard.id, "SequenceNumberRange": numbers}
        if shard.parent in self._listed():
            assert shard.parent is not None
            found["ParentShardId"] = shard.parent.id
        return found

    def _iterator(self, params: dict[str, Any]) -> Answer:
        shards = {each.id: each for each in self._listed()}
        shard = shards.get(params["ShardId"])
        if shard is None:
            return _refused("ResourceNotFoundException")
        records = self._records()
        kind, number = params["ShardIteratorType"], params.get("SequenceNumber", "")
        numbers = [each["dynamodb"]["SequenceNumber"] for each in records]
        start, end = self._range(shard)
        if kind == "LATEST":
            place = len(records) if end is None else end
        elif kind == "TRIM_HORIZON":
            place = max(start, self._trimmed)
        else:
            is_before = kind == "AT_SEQUENCE_NUMBER"
            place = sum(
                int(each) < int(number) or (each == number and not is_before) for each in numbers
            )
            if place < self._trimmed:
                return _refused("TrimmedDataAccessException")
        self.expired = False
        return Answer(200, {"ShardIterator": self._iterator_of(shard.id, place)})

    def _iterator_of(self, shard_id: str, place: int) -> str:
        return json.dumps([shard_id, place]).ljust(self.iterator_length)

    def _page(self, params: dict[str, Any]) -> Answer:
        if self.expired:
            return _refused("ExpiredIteratorException")
        shard_id, place = json.loads(params["ShardIterator"])
        if place < self._trimmed:
            return _refused("TrimmedDataAccessException")
        shard = next(each for each in self._all() if each.id == shard_id)
        _, end = self._range(shard)
        records = self._records()[:end]
        page: list[dict[str, Any]] = []
        while place < len(records) and len(page) < params["Limit"]:
            if self._is_in(shard, records[place]):
                page.append(records[place])
            place += 1
        answer: dict[str, Any] = {"Records": page}
        if end is None or place < end:
            answer["NextShardIterator"] = self._iterator_of(shard_id, place)
        return Answer(200, answer)

    # -- shards ------------------------------------------------------------------------------

    def _all(self) -> Sequence[_Shard]:
        generations = range(len(self._splits) + 1)
        return [_Shard(each, part) for each in generations for part in range(2**each)]

    def _listed(self) -> Sequence[_Shard]:
        ends = {each: self._range(each)[1] for each in self._all()}
        return [each for each, end in ends.items() if end is None or end > self._trimmed]

    def _range(self, shard: _Shard) -> tuple[int, int | None]:
        starts = [0, *self._splits]
        is_open = shard.generation == len(self._splits)
        return starts[shard.generation], None if is_open else self._splits[shard.generation]

    def _is_in(self, shard: _Shard, record: dict[str, Any]) -> bool:
        key = json.dumps(record["dynamodb"]["Keys"])
        return crc32(key.encode()) % 2**shard.generation == shard.part

    def _number(self, place: int) -> str:
        records = self._records()
        if place < len(records):
            number: str = records[place]["dynamodb"]["SequenceNumber"]
            return number
        return str(int(records[-1]["dynamodb"]["SequenceNumber"]) + 1 if records else 1)

    # -- the server --------------------------------------------------------------------------

    def _records(self) -> list[dict[str, Any]]:
        """All records of the table."""
        if not self._iterator_of_server:
            table = self._ask("DynamoDB_20120810.DescribeTable", {"TableName": self._table})[
                "Table"
            ]
            params = {
                "StreamArn": table["LatestStreamArn"],
                "ShardId": "shardId-00000000000000000000-00000000",
                "ShardIteratorType": "TRIM_HORIZON",
            }
            found = self._ask("DynamoDBStreams_20120810.GetShardIterator", params)
            self._iterator_of_server = found["ShardIterator"]
        page = self._ask(
            "DynamoDBStreams_20120810.GetRecords", {"ShardIterator": self._iterator_of_server}
        )
        self._iterator_of_server = page["NextShardIterator"]
        self._read += page["Records"]
        return self._read

    def _ask(self, target: str, params: dict[str, Any]) -> Any:
        connection = HTTPConnection(*self._proxy.to, timeout=30)
        scope = "test/20260101/us-east-1/dynamodb/aws4_request"
        headers = {
            "X-Amz-Target": target,
            "Content-Type": "application/x-amz-json-1.0",
            "Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0",
        }
        try:
            connection.request("POST", "/", json.dumps(params), headers)
            return json.load(connection.getresponse())
        finally:
            connection.close()


def _refused(code: str) -> Answer:
    return Answer(400, {"__type": f"com.amazonaws#{code}", "message": ""})
