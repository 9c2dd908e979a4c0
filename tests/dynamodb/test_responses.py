"""Invalid responses: of proxies, of other servers, and damaged ones. Contract case 122.

Whatever the response, a verb raises a `StorageError` or returns a correct result, in time; for a write
the error says `outcome_unknown`.
"""

from __future__ import annotations

import asyncio
import json
import time
from random import Random
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_async_store import (
    AuthenticationError,
    BatchError,
    DynamoDBStorageStrategy,
    PermissionDeniedError,
    ProtocolError,
    StorageError,
    UnavailableError,
)
from hf_async_store import errors as public_errors
from hf_async_store.strategies.dynamodb import request_retry, responses
from hf_async_store.strategies.dynamodb.errors import UnexpectedResponse
from hf_async_store.strategies.dynamodb.responses import Received, read_in_parts, read_response
from hf_async_store.testing.concurrency import seeded
from hf_async_store.testing.repetitions import repetitions
from tests.dynamodb import verbs
from tests.dynamodb.proxy import (
    WRITES,
    Changed,
    Dripped,
    Endless,
    Fault,
    Raw,
    Request,
    Torn,
)
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hf_async_store_bench.servers import DynamoDBServer
    from tests.dynamodb.proxy import Proxy

pytestmark = pytest.mark.hf_sampled

JSON: Final = {"Content-Type": "application/x-amz-json-1.0"}
HTML: Final = {"Content-Type": "text/html"}

NO_ANSWERS: Final[dict[str, Raw]] = {
    "a byte that is no UTF-8": Raw(200, b'{"Item":{"a":{"S":"\xff"}},"Responses":"\xff"}', JSON),
    "a failure that is no UTF-8": Raw(500, b'{"__type":"\xff"}', JSON),
    "a wrong checksum": Raw(200, b"{}", {**JSON, "x-amz-crc32": "1"}),
    "a checksum that is none": Raw(200, b"{}", {**JSON, "x-amz-crc32": "abc"}),
    "nothing": Raw(200, b"", JSON),
    "no JSON": Raw(200, b"OK", JSON),
    "a list": Raw(200, b"[]", JSON),
    "null": Raw(200, b"null", JSON),
    "nested without end": Raw(200, b'{"Responses":' + b"[" * 100_000, JSON),
    "items nested without end": Raw(
        200, b'{"Item":{"a":' + b'{"L":[' * 50_000 + b"]}" * 50_000 + b"}}", JSON
    ),
    "other types": Raw(
        200,
        b'{"Responses":5,"Item":7,"Items":"x","Count":"y","Attributes":1,"Table":[],'
        b'"UnprocessedItems":3,"TableNames":{}}',
        JSON,
    ),
    "a page of a portal": Raw(200, b"<html>Log in</html>", HTML),
    "an empty page of a portal": Raw(200, b"", HTML),
    "a page that is JSON": Raw(200, b"{}", HTML),
    "a redirect": Raw(307, b"", {"Location": "http://127.0.0.1:1/elsewhere?token=hunter2"}),
    "a redirect to nowhere": Raw(302, b"", {"Location": "http://[::"}),
    "201": Raw(201, b"{}", JSON),
    "400 of nobody": Raw(400, b"", HTML),
    "401 of a proxy": Raw(401, b"", HTML),
    "403 of a proxy": Raw(403, b"<html>Forbidden</html>", HTML),
    "404 of another server": Raw(404, b"not found", HTML),
    "407 of a proxy": Raw(407, b"", HTML),
    "408 of a proxy": Raw(408, b"", HTML),
    "413 of a proxy": Raw(413, b"", HTML),
    "429 of a proxy": Raw(429, b"", HTML),
    "502 of a proxy": Raw(502, b"<html>", HTML),
    "an error without a type": Raw(400, b'{"message":"no"}', JSON),
    "an error of another shape": Raw(400, b'{"__type":5,"message":[]}', JSON),
}

KINDS: Final[dict[str, type[StorageError]]] = {
    "a redirect": ProtocolError,
    "403 of a proxy": PermissionDeniedError,
    "407 of a proxy": AuthenticationError,
    "413 of a proxy": ProtocolError,
    "502 of a proxy": UnavailableError,
    "a page of a portal": ProtocolError,
    "other types": ProtocolError,
}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_retry, "_FIRST_PAUSE", 0.001)


def _is_public(exc: StorageError) -> bool:
    """Whether the error class is public."""
    return getattr(public_errors, type(exc).__name__, None) is type(exc)


def _outcomes(exc: StorageError) -> list[StorageError]:
    if isinstance(exc, BatchError):
        return [each for each in exc.outcomes if isinstance(each, StorageError)]
    return [exc]


@pytest.mark.parametrize("name", NO_ANSWERS)
async def test_an_invalid_response_is_an_error(proxy: Proxy, name: str) -> None:
    answer = NO_ANSWERS[name]
    async with store_at(proxy.url, retry_timeout=0.3) as store:
        await verbs.make(store)
        for verb, work in verbs.READS.items():
            proxy.rule = lambda request: answer
            with pytest.raises(StorageError) as caught:
                await asyncio.wait_for(work(store), 10)
            assert _is_public(caught.value), f"{verb}: {caught.value!r}"
            assert not caught.value.outcome_unknown, f"{verb}: {caught.value!r}"
            assert str(caught.value)
            assert "hunter2" not in str(caught.value)
            if name in KINDS:
                assert isinstance(caught.value, KINDS[name]), f"{verb}: {caught.value!r}"
            proxy.rule = None
        for verb, work in verbs.WRITES.items():
            await verbs.make(store)
            proxy.rule = lambda request: answer if request.operation in WRITES else None
            with pytest.raises(StorageError) as caught:
                await asyncio.wait_for(work(store), 10)
            for each in _outcomes(caught.value):
                assert _is_public(each), f"{verb}: {each!r}"
                assert each.outcome_unknown, f"{verb}: {each!r}"
            proxy.rule = None
        await verbs.make(store)
        assert await store.update_entity("items", "a", {"label": "z"}) == 2


@pytest.mark.parametrize(
    "name", ["a page of a portal", "nothing", "a wrong checksum", "502 of a proxy"]
)
async def test_a_write_applied_before_an_invalid_response_is_recognised(
    proxy: Proxy, name: str
) -> None:
    """After one invalid response the store reads the entity, and recognises its own write."""
    answer = NO_ANSWERS[name]._replace(applied=True)
    async with store_at(proxy.url) as store:
        for verb in (
            "create",
            "save",
            "save expecting",
            "update",
            "update expecting",
            "update where",
        ):
            await verbs.make(store)

            def rule(request: Request) -> Fault | None:
                if request.operation not in WRITES:
                    return None
                proxy.rule = None
                return answer

            proxy.rule = rule
            version = 1 if verb == "create" else 2
            assert await verbs.WRITES[verb](store) == version, verb
            entity = await store.get_entity("items", "new" if verb == "create" else "a")
            assert entity is not None
            assert entity["version"] == version, f"{verb} landed twice"


async def test_responses_of_other_requests(proxy: Proxy) -> None:
    item = {"item_id": {"S": "b"}, "label": {"S": "x"}}
    changes: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "get": lambda body: {"Item": item},
        "get many": lambda body: {"Responses": {"elsewhere": [item]}},
        "query by index": lambda body: {
            "Items": [],
            "Count": 0,
            "LastEvaluatedKey": {"item_id": {"S": "z"}},
        },
        "read in a transaction": lambda body: {"Responses": []},
        "save many": lambda body: {"Responses": []},
        "import": lambda body: {
            "UnprocessedItems": {"elsewhere": [{"PutRequest": {"Item": item}}]}
        },
    }
    async with store_at(proxy.url, retry_timeout=0.3) as store:
        for verb, change in changes.items():
            await verbs.make(store)
            is_write = verb in verbs.WRITES
            proxy.rule = lambda request, change=change, is_write=is_write: (  # type: ignore[misc]
                Changed(change)
                if (request.operation in WRITES) is is_write
                and not request.operation.startswith("Describe")
                else None
            )
            with pytest.raises(StorageError) as caught:
                await asyncio.wait_for(({**verbs.READS, **verbs.WRITES})[verb](store), 10)
            for each in _outcomes(caught.value):
                assert _is_public(each), f"{verb}: {each!r}"
                assert each.outcome_unknown is is_write, f"{verb}: {each!r}"
            proxy.rule = None


async def test_a_transaction_that_was_cancelled_without_reasons(proxy: Proxy) -> None:
    for body in (
        b'{"__type":"x#TransactionCanceledException"}',
        b'{"__type":"x#TransactionCanceledException","CancellationReasons":[{}]}',
    ):
        async with store_at(proxy.url, retry_timeout=0.3) as store:
            await verbs.make(store)
            answer = Raw(400, body, JSON)
            proxy.rule = lambda request, answer=answer: (  # type: ignore[misc]
                answer if "Transact" in request.operation else None
            )
            with pytest.raises(StorageError) as caught:
                await verbs.WRITES["transaction"](store)
            assert _is_public(caught.value)
            assert str(caught.value)
            proxy.rule = None


async def test_the_time_of_a_slow_response_is_bounded(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix) as store:
        await verbs.make(store)
    settings = {"connect_timeout": 1, "read_timeout": 1, "retry_timeout": 0.3}
    async with store_at(proxy.url, prefix, **settings) as store:
        for verb in ("get", "query", "update where", "create"):
            is_write = verb in verbs.WRITES
            proxy.rule = lambda request, is_write=is_write: (  # type: ignore[misc]
                Dripped(0.5) if not is_write or request.operation in WRITES else None
            )
            started = time.monotonic()
            try:
                assert await ({**verbs.READS, **verbs.WRITES})[verb](store), (
                    "the write was recognised by a read"
                )
                assert is_write, "a read of the slow response completed"
            except UnavailableError as exc:
                assert exc.outcome_unknown is is_write
            assert time.monotonic() - started < 30, "the whole response takes minutes"
            proxy.rule = None


async def test_an_endless_body_is_aborted(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_async_store.strategies.dynamodb import transport

    monkeypatch.setattr(transport, "MAX_BYTES", 4 * 2**20)
    async with store_at(proxy.url, retry_timeout=0.3) as store:
        await verbs.make(store)
        proxy.rule = lambda request: Endless()
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(store.get_entity("items", "a"), 20)
        proxy.rule = None
        assert await store.get_entity("items", "a")


async def test_a_truncated_body_is_an_error(proxy: Proxy) -> None:
    async with store_at(proxy.url, retry_timeout=0.3) as store:
        await verbs.make(store)
        proxy.rule = lambda request: Torn()
        with pytest.raises(UnavailableError):
            await store.get_entity("items", "a")
        proxy.rule = lambda request: Torn() if request.operation in WRITES else None
        with pytest.raises(UnavailableError) as caught:
            await store.delete_entity("items", "a")
        assert caught.value.outcome_unknown
        proxy.rule = None


# -- fuzzing ---------------------------------------------------------------------------------

# By operation, response bodies that once caused a bug, or might.
CORPUS: Final[tuple[tuple[str, bytes], ...]] = (
    ("GetItem", b'{"Item":{"item_id":{}}}'),
    ("GetItem", b'{"Item":{"item_id":{"S":"a","N":"1"}}}'),
    ("GetItem", b'{"Item":{"item_id":{"S":"a"},"n":{"N":"x"}}}'),
    ("GetItem", b'{"Item":{"item_id":{"S":"a"},"n":{"N":"nan"}}}'),
    ("GetItem", b'{"Item":{"item_id":{"S":"a"},"n":{"N":"1e999"}}}'),
    ("GetItem", b'{"Item":{"item_id":{"S":"a"},"n":{"NS":["x"]}}}'),
    ("GetItem", b'{"Item":{"item_id":{"S":"a"},"n":{"B":"?"}}}'),
    ("GetItem", b'{"Item":{"item_id":{"S":"a"},"n":{"Q":1}}}'),
    ("GetItem", b'{"Item":{"item_id":{"S":"a"},"doc":{"S":"x"}}}'),
    ("GetItem", b'{"Item":{"item_id":{"S":"a"},"doc":{"M":{"\\u00000":{"N":"1"}}}}}'),
    (
        "GetItem",
        b'{"Item":{"item_id":{"S":"a"},"doc":{"M":{"\\u00000":{"N":"1"},"\\u00000n":{"N":"1"}}}}}',
    ),
    ("GetItem", b'{"Item":{"item_id":{"S":"a"},"version":{"S":"1"}}}'),
    ("GetItem", b'{"Item":{"item_id":{"N":"1"}}}'),
    ("GetItem", b'{"Item":null}'),
    ("GetItem", b'{"Item":{"item_id":{"S":"\\ud800"}}}'),
    ("GetItem", b'{"Item":{"item_id":{"S":"a"},"":{"S":"x"}}}'),
    ("Query", b'{"Items":[{}],"Count":1}'),
    ("Query", b'{"Count":1}'),
    ("Query", b'{"Items":[],"Count":-1}'),
    ("Query", b'{"Items":[],"Count":1.5}'),
    ("BatchGetItem", b'{"Responses":{}}'),
    ("BatchGetItem", b'{"Responses":{},"UnprocessedKeys":{"t":{}}}'),
    ("BatchExecuteStatement", b'{"Responses":[{"Error":{}}]}'),
    ("BatchExecuteStatement", b'{"Responses":[null]}'),
    ("DescribeTable", b'{"Table":{}}'),
    ("DescribeTable", b'{"Table":{"TableStatus":"ACTIVE","KeySchema":[{}]}}'),
    ("ListTables", b'{"TableNames":[1]}'),
    ("TransactGetItems", b'{"Responses":[{"Item":5}]}'),
)


@pytest.mark.parametrize(("operation", "body"), CORPUS)
async def test_a_body_of_the_corpus(proxy: Proxy, operation: str, body: bytes) -> None:
    """Each body is returned to all verbs."""
    async with store_at(proxy.url, retry_timeout=0.1) as store:
        await verbs.make(store)
        proxy.rule = lambda request: (
            Raw(200, body, JSON) if request.operation == operation else None
        )
        for work in ({**verbs.READS, **verbs.WRITES}).values():
            try:
                await asyncio.wait_for(work(store), 10)
            except StorageError as exc:
                assert _is_public(exc)
        proxy.rule = None


_LEAVES: Final = (
    None,
    True,
    1,
    -1,
    2**70,
    1.5,
    "",
    "a",
    "S",
    "N",
    "1",
    "nan",
    "1e400",
    "version",
    "_w",
    "\0",
)
_NAMES: Final = (
    "S",
    "N",
    "M",
    "L",
    "SS",
    "NS",
    "B",
    "BOOL",
    "Item",
    "item_id",
    "doc",
    "version",
    "x",
)


def _value(random: Random, depth: int = 0) -> Any:
    kind = random.random()
    if depth > 3 or kind < 0.6:
        return random.choice(_LEAVES)
    number = random.randrange(3)
    if kind < 0.75:
        return [_value(random, depth + 1) for _ in range(number)]
    return {random.choice(_NAMES): _value(random, depth + 1) for _ in range(number)}


def _mutated(random: Random, body: bytes) -> bytes:
    """A response with a few bytes, or a few values in its structure, changed."""
    if random.random() < 0.7:
        try:
            whole = [json.loads(body)]
        except ValueError:
            whole = []
        for _ in range(random.randint(1, 3)):
            if whole:
                _change(random, whole)
        if whole:
            return json.dumps(whole[0]).encode()
    start = random.randint(0, len(body))
    end = random.randint(start, min(len(body), start + 20))
    return body[:start] + random.randbytes(random.randrange(8)) + body[end:]


def _change(random: Random, whole: list[Any]) -> None:
    """Change one value in the structure."""
    place: Any = whole
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = random.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and random.random() < 0.75:
            place = place[key]
            continue
        what = random.choice(("replace", "remove", "rename", "double"))
        if what == "remove" and place is not whole:
            del place[key]
        elif what == "rename" and isinstance(place, dict):
            place[random.choice(_NAMES)] = place.pop(key)
        elif what == "double" and isinstance(place, list) and place is not whole:
            place.append(place[key])
        else:
            place[key] = _value(random)
        return


class _Fuzz:
    """A store for which the responses of the server are mutated."""

    def __init__(self, url: str) -> None:
        self.store: DynamoDBStorageStrategy = store_at(url, new_prefix(), retry_timeout=0.1)
        self.mutate: Callable[[bytes], bytes] | None = None
        self.left = 0
        self.inputs = 0

    async def open(self) -> None:
        await self.store.open()
        await verbs.make(self.store)
        connection = await self.store._dynamodb.client.connection()
        send = connection._send

        async def sent(request: Any) -> Any:
            response = await send(request)
            if self.mutate is not None and self.left > 0:
                self.left -= 1
                response._content = self.mutate(await response.content)
                self.inputs += 1
            return response

        connection._send = sent

    async def one(self, verb: str, random: Random) -> None:
        self.store._dynamodb.tables._ready.clear()
        if verb in verbs.WRITES:
            await verbs.make(self.store)
        self.left = random.randint(1, 4)
        self.mutate = lambda body: _mutated(random, body)
        try:
            await asyncio.wait_for(({**verbs.READS, **verbs.WRITES})[verb](self.store), 20)
        except StorageError as exc:
            assert _is_public(exc), repr(exc)
        finally:
            self.mutate = None
            self.store._dynamodb.tables._ready.clear()


@pytest.fixture(scope="module")
def fuzz(dynamodb_server: DynamoDBServer) -> Iterator[tuple[asyncio.Runner, _Fuzz]]:
    with asyncio.Runner() as runner:
        fuzz = _Fuzz(dynamodb_server.endpoint_url)
        runner.run(fuzz.open())
        yield runner, fuzz
        runner.run(fuzz.store.close())
        print(f"{fuzz.inputs} mutated answers of DynamoDB")
        assert fuzz.inputs


ALL_VERBS: Final = (*verbs.READS, *verbs.WRITES)


@pytest.mark.parametrize("verb", ALL_VERBS)
def test_mutated_responses(fuzz: tuple[asyncio.Runner, _Fuzz], verb: str) -> None:
    _search(fuzz, verb, 25)


@pytest.mark.long
@pytest.mark.parametrize("verb", ALL_VERBS)
def test_many_mutated_responses(fuzz: tuple[asyncio.Runner, _Fuzz], verb: str) -> None:
    _search(fuzz, verb, 2_000)


def _search(fuzz: tuple[asyncio.Runner, _Fuzz], verb: str, examples: int) -> None:
    runner, each = fuzz
    with seeded() as random:
        for number in range(examples):
            seed = random.random()
            try:
                runner.run(each.one(verb, Random(seed)))
            except Exception as exc:
                raise AssertionError(f"input {number}, seed {seed} of {verb}: {exc!r}") from exc


@settings(max_examples=repetitions(300))
@given(
    operation=st.sampled_from(sorted(responses._SHAPES)),
    status=st.sampled_from((200, 200, 200, 400, 403, 500, 307)),
    body=st.binary(max_size=200)
    | st.integers().map(lambda n: json.dumps(_value(Random(n))).encode()),
    headers=st.dictionaries(
        st.sampled_from(("x-amz-crc32", "content-type", "location")), st.text(max_size=30)
    ),
)
def test_any_body_is_read_or_refused(
    operation: str, status: int, body: bytes, headers: dict[str, str]
) -> None:
    params = {
        "Key": {"item_id": {"S": "a"}},
        "RequestItems": {},
        "Statements": [],
        "TransactItems": [],
    }
    try:
        assert isinstance(read_response(operation, params, Received(status, headers, body)), dict)
    except StorageError as exc:
        assert str(exc)


def _large(operation: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request, and its response of about 0.5 MB."""
    items = [
        {"id": {"S": f"ü{n}"}, "doc": {"M": {"n": {"N": str(n)}, "text": {"S": "x" * 100}}}}
        for n in range(3_000)
    ]
    if operation != "BatchGetItem":
        return {}, {"Count": 3_000, "ScannedCount": 3_000, "Items": items}
    keys = [{"id": each["id"]} for each in items]
    return {"RequestItems": {"t": {"Keys": keys}}}, {"Responses": {"t": items}}


@pytest.mark.parametrize("operation", ["Query", "Scan", "BatchGetItem"])
async def test_the_event_loop_gets_turns_while_a_large_page_is_decoded(operation: str) -> None:
    params, response = _large(operation)
    body = json.dumps(response).encode()
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(turn())
    found = await read_in_parts(operation, params, Received(200, {}, body))
    other.cancel()
    assert turns >= 5
    assert found == read_response(operation, params, Received(200, {}, body))


@pytest.mark.parametrize("operation", ["Query", "Scan", "BatchGetItem"])
async def test_a_damaged_item_of_a_large_page_is_an_error(operation: str) -> None:
    params, response = _large(operation)
    body = json.dumps(response).encode()
    for damaged in (
        body.replace(b'{"N": "2999"}', b'{"N":  2999 }'),
        body.replace(b'{"N": "2999"}', b'{"N": "2999"'),
        body.replace(b'"2999"', b'"\xff999"'),
    ):
        assert damaged != body
        with pytest.raises(UnexpectedResponse):
            await read_in_parts(operation, params, Received(200, {}, damaged))
