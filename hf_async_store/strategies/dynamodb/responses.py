"""Decoding and validation of HTTP responses, for all operations.

A valid response has the structure documented for its operation and matches its request. Any other
response (an HTML page of a proxy, damaged bytes, a response of another server) raises an error
here, so that the callers need not validate it.
"""

from __future__ import annotations

import zlib
from types import GenericAlias
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Required, TypedDict, cast
from urllib.parse import urlsplit

import msgspec

from hf_async_store.errors import (
    AuthenticationError,
    PermissionDeniedError,
    ProtocolError,
    StorageError,
    ThrottledError,
)
from hf_async_store.event_loop import Chunks
from hf_async_store.strategies.dynamodb.errors import ResponseLost, UnexpectedResponse, translate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class AttributeValue(TypedDict, total=False):
    """An attribute value; it has exactly one of these members, which `codec.decode` checks."""

    S: str
    N: str
    B: bytes
    BOOL: bool
    NULL: bool
    SS: list[str]
    NS: list[str]
    BS: list[bytes]
    M: dict[str, AttributeValue]
    L: list[AttributeValue]


Item = dict[str, AttributeValue]


def _object(required: str = "", **members: Any) -> Any:
    """The type of a JSON object: the members that are used, and the names of those it must have."""
    kinds = {
        name: Required[kind] if name in required.split() else kind for name, kind in members.items()
    }
    return _TYPED_DICT("_Object", kinds, total=False)


def _list(kind: Any) -> Any:
    return GenericAlias(list, (kind,))


def _map(kind: Any) -> Any:
    return GenericAlias(dict, (str, kind))


_TYPED_DICT: Final[Any] = TypedDict  # the static type requires a literal
_ITEMS: Final = list[Item]
_ITEM: Final = Item | None
_STRING: Final = str | None

_GET: Final = _object(Item=Item)
_KEYS: Final = _object("Keys", Keys=_ITEMS, ConsistentRead=bool)
_BATCH_GET: Final = _object("Responses", Responses=_map(_ITEMS), UnprocessedKeys=_map(_KEYS) | None)
_PAGE: Final = _object("Count", Count=int, ScannedCount=int, Items=_ITEMS, LastEvaluatedKey=_ITEM)
_PUT_REQUEST: Final = _object("PutRequest", PutRequest=_object("Item", Item=Item))
_BATCH_WRITE: Final = _object("UnprocessedItems", UnprocessedItems=_map(_list(_PUT_REQUEST)) | None)
_STATEMENT_ERROR: Final = _object("Code", Code=str, Message=_STRING, Item=_ITEM)
_STATEMENT: Final = _object(Error=_STATEMENT_ERROR | None, Item=_ITEM)
_KEY_SCHEMA: Final = _list(_object("AttributeName KeyType", AttributeName=str, KeyType=str))
_DEFINITION: Final = _object("AttributeName AttributeType", AttributeName=str, AttributeType=str)
_THROUGHPUT: Final = _object(ReadCapacityUnits=int, WriteCapacityUnits=int)
_INDEX: Final = _object(
    "IndexName KeySchema",
    IndexName=str,
    KeySchema=_KEY_SCHEMA,
    Projection=_object(ProjectionType=str),
    IndexStatus=str,
    Backfilling=bool,
    ProvisionedThroughput=_THROUGHPUT,
    ItemCount=int,
)
_TABLE: Final = _object(
    "TableStatus KeySchema",
    TableStatus=str,
    KeySchema=_KEY_SCHEMA,
    TableName=str,
    TableId=str,
    TableArn=str,
    AttributeDefinitions=_list(_DEFINITION),
    GlobalSecondaryIndexes=_list(_INDEX),
    BillingModeSummary=_object(BillingMode=str),
    ProvisionedThroughput=_THROUGHPUT,
    ItemCount=int,
    TableSizeBytes=int,
    Replicas=_list(_object(RegionName=str)),
    StreamSpecification=_object(StreamEnabled=bool, StreamViewType=_STRING) | None,
    LatestStreamArn=_STRING,
)
_RECOVERY: Final = _object(PointInTimeRecoveryStatus=str)
_BACKUPS: Final = _object(PointInTimeRecoveryDescription=_RECOVERY)
_TIME_TO_LIVE: Final = _object(TimeToLiveStatus=_STRING, AttributeName=_STRING)
_SHARD: Final = _object(
    "ShardId",
    ShardId=str,
    ParentShardId=_STRING,
    SequenceNumberRange=_object(StartingSequenceNumber=_STRING),
)
_STREAM: Final = _object("Shards", Shards=_list(_SHARD), LastEvaluatedShardId=_STRING)
_STREAM_RECORD: Final = _object(
    "SequenceNumber",
    SequenceNumber=str,
    ApproximateCreationDateTime=float,
    OldImage=_ITEM,
    NewImage=_ITEM,
)
_RECORDS: Final = _list(_object("dynamodb", dynamodb=_STREAM_RECORD))
_REASON: Final = _object(Code=_STRING, Message=_STRING, Item=_ITEM)
_FAILURE: Final = _object(
    "__type",
    __type=str,
    message=_STRING,
    Message=_STRING,
    Item=_ITEM,
    CancellationReasons=_list(_REASON) | None,
)
_ANY: Final = dict[str, Any]

_SHAPES: Final[dict[str, Any]] = {
    "GetItem": _GET,
    "BatchGetItem": _BATCH_GET,
    "Query": _PAGE,
    "Scan": _PAGE,
    "PutItem": _ANY,
    "UpdateItem": _object(Attributes=Item),
    "DeleteItem": _ANY,
    "BatchWriteItem": _BATCH_WRITE,
    "BatchExecuteStatement": _object("Responses", Responses=_list(_STATEMENT)),
    "TransactGetItems": _object("Responses", Responses=_list(_GET)),
    "TransactWriteItems": _ANY,
    "DescribeTable": _object("Table", Table=_TABLE),
    "ListTables": _object("TableNames", TableNames=list[str], LastEvaluatedTableName=_STRING),
    "CreateTable": _object(),
    "UpdateTable": _object(),
    "DeleteTable": _object(),
    "DescribeContinuousBackups": _object(
        "ContinuousBackupsDescription", ContinuousBackupsDescription=_BACKUPS
    ),
    "UpdateContinuousBackups": _object(),
    "DescribeTimeToLive": _object("TimeToLiveDescription", TimeToLiveDescription=_TIME_TO_LIVE),
    "UpdateTimeToLive": _object(),
    "DescribeStream": _object("StreamDescription", StreamDescription=_STREAM),
    "GetShardIterator": _object("ShardIterator", ShardIterator=str),
    "GetRecords": _object("Records", Records=_RECORDS, NextShardIterator=_STRING),
}
_DECODE: Final[dict[str, Callable[[bytes], Any]]] = {
    operation: msgspec.json.Decoder(shape).decode for operation, shape in _SHAPES.items()
}
_RAW_ITEMS: Final = list[msgspec.Raw]
_RAW_PAGE: Final = _object(
    "Count", Count=int, ScannedCount=int, Items=_RAW_ITEMS, LastEvaluatedKey=_ITEM
)
_RAW_BATCH_GET: Final = _object(
    "Responses", Responses=_map(_RAW_ITEMS), UnprocessedKeys=_map(_KEYS) | None
)
_DECODE_RAW: Final[dict[str, Callable[[bytes], Any]]] = {
    "BatchGetItem": msgspec.json.Decoder(_RAW_BATCH_GET).decode,
    "Query": msgspec.json.Decoder(_RAW_PAGE).decode,
    "Scan": msgspec.json.Decoder(_RAW_PAGE).decode,
}
_DECODE_ITEM: Final = msgspec.json.Decoder(Item).decode
_PART_BYTES: Final = 2**16
"""About so much of a response is decoded at once."""

_DECODE_FAILURE: Final = msgspec.json.Decoder(_FAILURE).decode

# Raised by decoding for bytes that are not JSON, not UTF-8, of another structure or nested too
# deeply.
_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Received(NamedTuple):
    """An HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes


async def read_in_parts(
    operation: str, params: Mapping[str, Any], received: Received
) -> dict[str, Any]:
    """As `read_response`. The event loop runs other tasks while the items of a large page are decoded."""
    is_small = len(received.body) <= _PART_BYTES
    if is_small or operation not in _DECODE_RAW or received.status != 200:
        return read_response(operation, params, received)
    response = _decoded(operation, params, received, _DECODE_RAW[operation])
    try:
        if operation == "BatchGetItem":
            tables = response["Responses"]
            for table, items in tables.items():
                tables[table] = await _items_in(items)
        elif "Items" in response:
            response["Items"] = await _items_in(response["Items"])
    except _UNREADABLE as exc:
        raise _unreadable(operation, exc) from exc
    check(operation, params, response)
    return response


async def _items_in(items: Sequence[msgspec.Raw]) -> list[Any]:
    size = sum(len(memoryview(each)) for each in items)
    number = max(1, len(items) * _PART_BYTES // max(size, 1))
    return [_DECODE_ITEM(each) async for some in Chunks(items, number) for each in some]


def read_response(operation: str, params: Mapping[str, Any], received: Received) -> dict[str, Any]:
    """Decode and validate the response to a request.

    Raises:
        UnexpectedResponse: the response is invalid; has `outcome_unknown`.
        StorageError: the response is an error; see `errors.translate`.
    """
    response = _decoded(operation, params, received, _DECODE[operation])
    check(operation, params, response)
    return response


def _decoded(
    operation: str,
    params: Mapping[str, Any],
    received: Received,
    decode: Callable[[bytes], Any],
) -> dict[str, Any]:
    status, headers, body = received
    if headers.get("x-amz-crc32") not in (None, str(zlib.crc32(body))):
        raise ResponseLost(
            "the response of DynamoDB does not match its checksum (x-amz-crc32)",
            outcome_unknown=True,
        )
    if status != 200:
        raise _failure(received, params)
    content_type = headers.get("content-type", "json")
    if "json" not in content_type.lower():
        raise _invalid(f"it has the content type {content_type[:80]!r}, not JSON")
    try:
        if not body.isascii():
            body.decode()  # checks the members that are not decoded, too
        response: dict[str, Any] = decode(body)
    except _UNREADABLE as exc:
        raise _unreadable(operation, exc) from exc
    return response


def convert(operation: str, params: Mapping[str, Any], response: object) -> dict[str, Any]:
    """Validate a response that the DAX client has decoded.

    Raises:
        UnexpectedResponse: the response is invalid.
    """
    try:
        converted: dict[str, Any] = msgspec.convert(response, _SHAPES[operation])
    except _UNREADABLE as exc:
        raise _unreadable(operation, exc) from exc
    check(operation, params, converted)
    return converted


def _unreadable(operation: str, exc: Exception) -> UnexpectedResponse:
    return _invalid(f"it is not a response to {operation}: {type(exc).__name__}")


def _invalid(why: str) -> UnexpectedResponse:
    return UnexpectedResponse(
        f"the response is not from DynamoDB or was changed by a proxy: {why}",
        outcome_unknown=True,
    )


# -- checks of a response against its request ------------------------------------------------


def check(operation: str, params: Mapping[str, Any], response: Mapping[str, Any]) -> None:
    """Check that a response matches its request.

    Raises:
        UnexpectedResponse: it does not.
    """
    is_match = _CHECKS.get(operation)
    if is_match is not None and not is_match(params, response):
        raise _invalid(f"it does not match its {operation} request")


def _check_get(params: Mapping[str, Any], response: Mapping[str, Any]) -> bool:
    item = response.get("Item")
    return item is None or all(item.get(name) == each for name, each in params["Key"].items())


def _check_batch_get(params: Mapping[str, Any], response: Mapping[str, Any]) -> bool:
    requested = {table: _ids(each["Keys"]) for table, each in params["RequestItems"].items()}
    return all(
        table in requested and _ids_of(items, requested[table]) <= requested[table].keys()
        for table, items in response["Responses"].items()
    ) and all(
        table in requested
        and _ids_of(unprocessed["Keys"], requested[table]) <= requested[table].keys()
        for table, unprocessed in (response.get("UnprocessedKeys") or {}).items()
    )


def _ids(keys: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The ids in these keys, each with the name of its key attribute."""
    return {value["S"]: name for key in keys for name, value in key.items()}


def _ids_of(items: Sequence[Mapping[str, Any]], requested: Mapping[str, str]) -> set[str]:
    """The ids of items; "" for an item without an id, because no request contains this id."""
    name = next(iter(requested.values()))
    return {cast("str", each.get(name, {}).get("S", "")) for each in items}


def _check_rows(params: Mapping[str, Any], response: Mapping[str, Any]) -> bool:
    last = response.get("LastEvaluatedKey")
    if last and last == params.get("ExclusiveStartKey"):
        return False  # requesting the next page would never end
    return response["Count"] >= 0 and (params.get("Select") == "COUNT" or "Items" in response)


def _check_written(params: Mapping[str, Any], response: Mapping[str, Any]) -> bool:
    # A successful write returns an empty object or these members. Other members show that the
    # response is not from DynamoDB.
    return response.keys() <= {"Attributes", "ConsumedCapacity", "ItemCollectionMetrics"}


def _check_update(params: Mapping[str, Any], response: Mapping[str, Any]) -> bool:
    return "ReturnValues" not in params or "Attributes" in response


def _check_statements(params: Mapping[str, Any], response: Mapping[str, Any]) -> bool:
    return len(response["Responses"]) == len(params["Statements"])


def _check_transact_get(params: Mapping[str, Any], response: Mapping[str, Any]) -> bool:
    requested, responses = params["TransactItems"], response["Responses"]
    return len(responses) == len(requested) and all(
        _check_get(each["Get"], item_response)
        for each, item_response in zip(requested, responses, strict=True)
    )


_CHECKS: Final[Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any]], bool]]] = {
    "GetItem": _check_get,
    "BatchGetItem": _check_batch_get,
    "Query": _check_rows,
    "Scan": _check_rows,
    "PutItem": _check_written,
    "DeleteItem": _check_written,
    "TransactWriteItems": _check_written,
    "UpdateItem": _check_update,
    "BatchExecuteStatement": _check_statements,
    "TransactGetItems": _check_transact_get,
}


# -- failures --------------------------------------------------------------------------------


def _failure(received: Received, params: Mapping[str, Any]) -> StorageError:
    """The error of a response whose status is not 200."""
    status, headers, body = received
    try:
        failure = _DECODE_FAILURE(body)
    except _UNREADABLE:
        return _intermediary_error(status, headers)
    if not 400 <= status < 600:
        return _intermediary_error(status, headers)
    code = str(failure["__type"])
    reasons = failure.get("CancellationReasons")
    if code.endswith("TransactionCanceledException") and len(reasons or ()) != len(
        params.get("TransactItems", ())
    ):
        # Nothing was written.
        return UnexpectedResponse(
            "DynamoDB cancelled a transaction without a cancellation reason for each action"
        )
    message = failure.get("message") or failure.get("Message") or ""
    return translate(code, message, status, failure)


def _intermediary_error(status: int, headers: Mapping[str, str]) -> StorageError:
    """The error for a response that is not from DynamoDB but from a proxy or another server.

    It is unknown whether a write was applied before.
    """
    source = f"HTTP {status}, not from DynamoDB"
    if 300 <= status < 400:
        return ProtocolError(
            f"the response is a redirect{_target(headers)} ({source}), which is not followed because "
            "the signed credentials are for one host only; check dynamodb_strategy.endpoint_url "
            "and the proxy settings",
            outcome_unknown=True,
        )
    if status == 407:
        return AuthenticationError(
            f"the proxy requires credentials ({source}); check HTTPS_PROXY and HTTP_PROXY",
            outcome_unknown=True,
        )
    if status in (401, 403):
        return PermissionDeniedError(
            f"access was denied ({source}); a proxy, a firewall or another server responds at the "
            "endpoint",
            outcome_unknown=True,
        )
    if status == 413:
        return ProtocolError(
            f"a proxy rejected the request as too large ({source})",
            outcome_unknown=True,
        )
    if status == 429:
        return ThrottledError(f"the request was throttled ({source})", outcome_unknown=True)
    if status == 408 or status >= 500:
        return ResponseLost(f"no response from DynamoDB ({source})", outcome_unknown=True)
    return _invalid(source)


def _target(headers: Mapping[str, str]) -> str:
    """The host of a redirect; the rest of the URL may contain secrets."""
    try:
        host = urlsplit(headers.get("location", "")).hostname
    except ValueError:
        host = None
    return f" to {host[:255]}" if host else ""
