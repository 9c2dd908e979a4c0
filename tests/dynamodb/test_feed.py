"""The change feed on DynamoDB: streams, shards, positions, and writes by item calls."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest

from hf_async_store import (
    AlreadyExistsError,
    Collection,
    ConcurrencyConflictError,
    EntityNotFoundError,
    FeedExpiredError,
    Field,
    InvalidCursorError,
    SchemaMismatchError,
    increment,
)
from hf_async_store.feed import Changes
from hf_async_store.feed import position_in as feed_position_in
from hf_async_store.strategies.dynamodb.feed_positions import Mark, Position, position_in
from hf_async_store.values import Key
from tests.dynamodb.proxy import Answer, Changed, Cut, throttled
from tests.dynamodb.support import new_prefix, store_at
from tests.dynamodb.virtual_shards import VirtualShards

if TYPE_CHECKING:
    from hf_async_store import DynamoDBStorageStrategy
    from hf_async_store.driver import FeedEntry
    from tests.dynamodb.proxy import Proxy, Request

FIELDS: Final = ["owner", Field("n", "number")]
PLAIN: Final = [Collection("jobs", key="job_id", fields=FIELDS, indexes=["owner"], open=True)]
FED: Final = [
    Collection(
        "jobs",
        key="job_id",
        fields=FIELDS,
        indexes=["owner"],
        open=True,
        feed=timedelta(hours=12),
    )
]
NUMBER: Final = 60

State = tuple[str, int | None, int | None]


async def _all(
    store: DynamoDBStorageStrategy, position: str, limit: int = 1_000
) -> tuple[list[FeedEntry], str]:
    """What there is after a position, and the position after it."""
    entries: list[FeedEntry] = []
    quiet = 0
    while quiet < 2:
        batch = await store._dynamodb.read_feed("jobs", position, limit)
        quiet = 0 if batch.entries or batch.position != position else quiet + 1
        entries, position = entries + batch.entries, batch.position
    return entries, position


def _states(entries: list[FeedEntry]) -> list[State]:
    return [
        (
            each.key.id,
            None if each.before is None else each.before.version,
            None if each.after is None else each.after.version,
        )
        for each in entries
    ]


def _position_of(changes: Changes) -> str:
    return feed_position_in(changes.token, "jobs")


def _statements(proxy: Proxy) -> list[str]:
    """The statements that wrote entities of the collection."""
    sent = [each for each in proxy.requests if each.operation == "BatchExecuteStatement"]
    texts = [each["Statement"] for request in sent for each in request.params["Statements"]]
    return [each for each in texts if "_jobs" in each]


async def test_every_verb_feeds_the_entity_before_and_after(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=FED) as store:
        begin = await store._dynamodb.feed_position("jobs")  # creates the table
        await store.create_entity("jobs", {"job_id": "a", "n": 1.0, "extra": {"x": None}})
        await store.save_entity("jobs", {"job_id": "a", "n": 2})
        await store.update_entity("jobs", "a", {"n": 3})
        await store.update_entity("jobs", "a", {"n": increment(1)}, expected_version=3)
        await store.update_entities("jobs", {"a": {"owner": "o"}})
        await store.save_entities("jobs", [{"job_id": "a"}, {"job_id": "b"}])
        await store.create_entities("jobs", [{"job_id": "c"}, {"job_id": "d"}])
        async with store.begin_transaction() as tx:
            await tx.update_entity("jobs", "a", {"n": 5})
            await tx.update_entity("jobs", "a", {"n": 6})
            await tx.delete_entity("jobs", "b")
        await store.import_entities("jobs", [{"job_id": "e", "version": 7}])
        await store.delete_entity("jobs", "a", expected_version=8)
        await store.delete_entities("jobs", ["c", "d"])
        entries, _ = await _all(store, begin)
        states = _states(entries)
        by_id = {each: [state[1:] for state in states if state[0] == each] for each in "abcde"}
        updates = [(each, each + 1) for each in range(1, 6)]
        assert by_id == {
            "a": [(None, 1), *updates, (6, 8), (8, None)],
            "b": [(None, 1), (1, None)],
            "c": [(None, 1), (1, None)],
            "d": [(None, 1), (1, None)],
            "e": [(None, 7)],
        }
        first = next(each for each in entries if each.key.id == "a").after
        assert first is not None
        assert first.entity["n"] == 1.0
        assert type(first.entity["n"]) is float
        assert first.entity["extra"] == {"x": None}
        assert not _statements(proxy)


async def test_what_changes_no_entity_feeds_nothing(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, FED) as store:
        await store.create_entity("jobs", {"job_id": "a", "n": 1})
        begin = await store._dynamodb.feed_position("jobs")
        [claim] = await store.claim_entities("jobs", {"n": 1}, lease=60)
        await claim.renew(60)
        await claim.release()
        await store._dynamodb.probe()
        wider = [Collection("jobs", key="job_id", fields=[*FIELDS, "zone"], feed=60, open=True)]
        async with store_at(proxy.url, prefix, wider) as other:
            await other.apply_schema()
        assert (await _all(store, begin))[0] == []
        await store.update_entity("jobs", "a", {"n": 2})
        assert _states((await _all(store, begin))[0]) == [("a", 1, 2)]


async def test_a_position_goes_on_after_each_entry(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, FED) as store:
        await store.create_entity("jobs", {"job_id": "old"})
        begin = await store._dynamodb.feed_position("jobs")
        assert (await store._dynamodb.read_feed("jobs", begin, 10)).position == begin
        await store.create_entities("jobs", [{"job_id": f"j{each}"} for each in range(30)])
        entries, end = await _all(store, begin, limit=10)
        assert len(entries) == 30
        async with store_at(proxy.url, prefix, FED) as other:
            for place in (0, 12, 29):
                following, same = await _all(other, entries[place].position, limit=10)
                assert _states(following) == _states(entries)[place + 1 :]
                assert same == end
            # In another process, from a position where nothing was read: also changes of shortly before.
            states = _states((await _all(other, begin))[0])
            assert states[-30:] == _states(entries)


async def test_a_position_without_an_iterator_skips_what_is_older(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, FED) as store:
        await store.create_entities("jobs", [{"job_id": f"j{each}"} for each in range(25)])
        position = position_in(await store._dynamodb.feed_position("jobs"))
        [shard] = position.shards
        later = Position(position.stream, {shard: Mark(since=time.time() + 30)})
        batch = await store._dynamodb.read_feed("jobs", later.text(), 10)
        assert batch.entries == []
        [mark] = position_in(batch.position).shards.values()
        assert mark.number
        assert mark.since == later.shards[shard].since
        sooner = Position(position.stream, {shard: Mark(since=time.time() - 30)})
        assert len((await _all(store, sooner.text()))[0]) == 25
        too_old = Position(position.stream, {shard: Mark(since=time.time() - 25 * 3600)})
        with pytest.raises(FeedExpiredError):
            await store._dynamodb.read_feed("jobs", too_old.text(), 10)


@pytest.mark.parametrize("limit", [1, 50])
async def test_shards_that_split_are_read_in_order(proxy: Proxy, limit: int) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, FED) as store:
        await store.create_entity("jobs", {"job_id": "old"})
        shards = VirtualShards(proxy, f"{prefix}_jobs")
        begin = await store._dynamodb.feed_position("jobs")
        ids = [f"j{each}" for each in range(12)]
        read: list[FeedEntry] = []
        position = begin
        for turn in range(4):
            await store.save_entities("jobs", [{"job_id": each, "n": turn} for each in ids])
            if turn:
                shards.split()
            if turn == 2:
                read, position = await _all(store, position, limit)
            if turn == 3:
                middle = await store._dynamodb.feed_position("jobs")
        await store.delete_entities("jobs", ids)
        versions = [(None, 1), (1, 2), (2, 3), (3, 4), (4, None)]

        def check(entries: list[FeedEntry], expected: list[tuple[int | None, int | None]]) -> None:
            states = _states(entries)
            assert len(states) == len(ids) * len(expected)
            for each in ids:
                assert [state[1:] for state in states if state[0] == each] == expected

        shards.expired = True  # all iterators that are kept
        rest, _ = await _all(store, position, limit)
        check(read + rest, versions)
        async with store_at(proxy.url, prefix, FED) as other:
            for place in range(0, len(read), 7):
                after, _ = await _all(other, read[place].position, limit)
                assert len(after) == len(read) + len(rest) - place - 1
        check((await _all(store, middle, limit))[0], versions[-1:])


async def test_trimmed_records_are_an_error(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, FED) as store:
        shards = VirtualShards(proxy, f"{prefix}_jobs")
        begin = await store._dynamodb.feed_position("jobs")
        ids = [f"j{each}" for each in range(8)]
        await store.create_entities("jobs", [{"job_id": each} for each in ids])
        entries, middle = await _all(store, begin)
        shards.split()
        await store.save_entities("jobs", [{"job_id": each} for each in ids])
        _, end = await _all(store, middle)
        await store.create_entity("jobs", {"job_id": "last"})
        shards.trim()
        async with store_at(proxy.url, prefix, FED) as other:
            for position in (entries[3].position, middle, end):
                with pytest.raises(FeedExpiredError):
                    await other._dynamodb.read_feed("jobs", position, 10)
        assert (await _all(store, await store._dynamodb.feed_position("jobs")))[0] == []


async def test_foreign_and_altered_positions_are_refused(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=FED) as store:
        begin = await store._dynamodb.feed_position("jobs")
        altered: dict[str, Any] = msgspec.json.decode(begin)
        [shard] = altered["shards"]
        positions = [
            "",
            "x",
            "\ud800",
            begin[:-1],
            msgspec.json.encode({**altered, "shards": {}}).decode(),
            msgspec.json.encode({**altered, "more": 1}).decode(),
            msgspec.json.encode({**altered, "shards": {"../x": altered["shards"][shard]}}).decode(),
            msgspec.json.encode({**altered, "shards": {shard: ["1 OR", False, 0]}}).decode(),
            begin.replace("_jobs/", "_others/"),
        ]
        async with store_at(proxy.url, collections=FED) as other:
            positions.append(await other._dynamodb.feed_position("jobs"))
        for each in positions:
            with pytest.raises(InvalidCursorError):
                await store._dynamodb.read_feed("jobs", each, 10)


async def test_a_table_made_anew_has_another_feed(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, FED) as store:
        begin = await store._dynamodb.feed_position("jobs")
        await store.create_entity("jobs", {"job_id": "a"})
        _, end = await _all(store, begin)
        table = {"TableName": f"{prefix}_jobs"}
        await store._dynamodb.client.call("DeleteTable", table)
        async with store_at(proxy.url, prefix, FED) as other:
            await other.create_entity("jobs", {"job_id": "b"})
            for each in (begin, end):
                with pytest.raises(FeedExpiredError):
                    await other._dynamodb.read_feed("jobs", each, 10)
        with pytest.raises(FeedExpiredError):
            await _all(store, end)


async def test_the_stream_of_an_existing_table_is_enabled_by_schema_apply(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with (
        store_at(proxy.url, prefix, PLAIN) as old,
        store_at(proxy.url, prefix, FED) as store,
    ):
        await old.create_entity("jobs", {"job_id": "a"})
        assert len(_statements(proxy)) == 1
        for problem in (
            store._dynamodb.feed_position("jobs"),
            store._dynamodb.read_feed(
                "jobs", Position("arn:x:table/t/stream/l", {"shard": Mark()}).text(), 1
            ),
        ):
            with pytest.raises(SchemaMismatchError, match="schema apply"):
                await problem
        assert [each.kind for each in await store._dynamodb.schema_changes()] == ["feed"]
        health = await store._dynamodb.health()
        assert "schema apply" in str(health["problems"])
        seen: list[str] = []
        await store._dynamodb.apply_schema(progress=lambda change, *_: seen.append(change.kind))
        assert "feed" in seen
        assert await store._dynamodb.schema_changes() == []
        begin = await store._dynamodb.feed_position("jobs")
        await store.update_entity("jobs", "a", {"n": 1})
        async with store_at(proxy.url, prefix, PLAIN) as other:  # knows it from the table
            await other.save_entities("jobs", [{"job_id": "a"}, {"job_id": "b"}])
        assert sorted(_states((await _all(store, begin))[0])) == [
            ("a", 1, 2),
            ("a", 2, 3),
            ("b", None, 1),
        ]


async def test_create_tables_enables_the_stream(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, PLAIN) as old:
        await old.create_tables()
    async with store_at(proxy.url, prefix, FED) as store:
        [difference] = (await store.compare_tables())["jobs"]["differences"]  # type: ignore[index,call-overload,misc]
        assert "stream is off" in str(difference)
        assert await store.create_tables() == [f"enabled the stream of {prefix}_jobs"]
        assert await store.create_tables() == []
        assert (await store.compare_tables())["jobs"]["differences"] == []  # type: ignore[index,call-overload]
        await store._dynamodb.feed_position("jobs")


async def test_another_view_of_a_stream_is_named(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, PLAIN) as old:
        await old.create_tables()
        params = {
            "TableName": f"{prefix}_jobs",
            "StreamSpecification": {"StreamEnabled": True, "StreamViewType": "KEYS_ONLY"},
        }
        await old._dynamodb.client.call("UpdateTable", params)
    async with store_at(proxy.url, prefix, FED) as store:
        with pytest.raises(SchemaMismatchError, match="KEYS_ONLY"):
            await store._dynamodb.feed_position("jobs")
        with pytest.raises(SchemaMismatchError, match="KEYS_ONLY"):
            await store._dynamodb.apply_schema()
        [change] = await store._dynamodb.schema_changes()
        assert "KEYS_ONLY" in change.detail


async def test_writes_by_item_calls_have_the_outcomes_of_statements(proxy: Proxy) -> None:
    outcomes: list[list[str]] = []
    for collections in (PLAIN, FED):
        async with store_at(proxy.url, collections=collections) as store:
            await store.create_entities("jobs", [{"job_id": f"j{each}"} for each in range(4)])
            await store.update_entity("jobs", "j1", {"n": 1})
            seen: list[str] = []
            work = [
                store.create_entity("jobs", {"job_id": "j0"}),
                store.create_entity("jobs", {"job_id": "new"}),
                store.update_entity("jobs", "none", {"n": 1}),
                store.update_entity("jobs", "j1", {"n": 2}, expected_version=1),
                store.update_entity("jobs", "j1", {"n": 2}, expected_version=2),
                store.update_entity("jobs", "j1", {"tags": ["x" * 9_000]}),
                store.save_entity("jobs", {"job_id": "j2"}, expected_version=7),
                store.save_entity("jobs", {"job_id": "j2"}, expected_version=1),
                store.save_entity("jobs", {"job_id": "other"}, expected_version=1),
                store.save_entities("jobs", [{"job_id": "j3", "n": 1}, {"job_id": "fresh"}]),
                store.delete_entity("jobs", "j3", expected_version=5),
                store.delete_entity("jobs", "none"),
                store.delete_entities("jobs", ["j3", "none", "fresh"]),
            ]
            for each in work:
                try:
                    seen.append(repr(await each))
                except (AlreadyExistsError, ConcurrencyConflictError, EntityNotFoundError) as exc:
                    seen.append(f"{type(exc).__name__} {getattr(exc, 'actual', '')}")
            records = await store.query_entities("jobs", order_by="job_id")
            seen.append(repr([(each["job_id"], each["version"]) for each in records]))
            outcomes.append(seen)
    assert outcomes[0] == outcomes[1]


async def test_lost_and_throttled_item_calls_are_written_once(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=FED) as store:
        begin = await store._dynamodb.feed_position("jobs")
        failing = {"UpdateItem": 3, "PutItem": 3, "DeleteItem": 1}

        def rule(request: Request) -> Any:
            left = failing.get(request.operation, 0)
            if not left:
                return None
            failing[request.operation] = left - 1
            return throttled() if left % 2 else Cut(applied=True)

        proxy.rule = rule
        ids = [f"j{each}" for each in range(6)]
        await store.save_entities("jobs", [{"job_id": each, "n": 0} for each in ids])
        await store.update_entities("jobs", {each: {"n": 1} for each in ids})
        failing.update(PutItem=3)
        await store.create_entities("jobs", [{"job_id": f"c{each}"} for each in range(3)])
        await store.delete_entities("jobs", ids)
        assert not any(failing.values())
        states = _states((await _all(store, begin))[0])
        for each in ids:
            assert [state[1:] for state in states if state[0] == each] == [
                (None, 1),
                (1, 2),
                (2, None),
            ]


async def test_requests_of_item_calls(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=FED) as store:
        await store.create_entity("jobs", {"job_id": "a"})
        proxy.requests.clear()
        await store.create_entity("jobs", {"job_id": "b"})
        await store.save_entity("jobs", {"job_id": "b"})
        await store.save_entities("jobs", [{"job_id": each} for each in "abc"])
        await store.update_entity("jobs", "c", {"n": 1})
        await store.update_entity("jobs", "c", {"n": 2}, expected_version=2)
        assert proxy.counted() == {"PutItem": 1, "UpdateItem": 6}
        proxy.requests.clear()
        await store.delete_entities("jobs", ["a", "b"])
        assert proxy.counted() == {"BatchGetItem": 1, "DeleteItem": 2}


async def test_an_unreadable_item_of_another_program_is_named(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, FED) as store:
        begin = await store._dynamodb.feed_position("jobs")
        item = {"job_id": {"S": "foreign"}, "count": {"NS": ["1", "2"]}, "raw": {"B": "AAE="}}
        params = {"TableName": f"{prefix}_jobs", "Item": item}
        await store._dynamodb.client.call("PutItem", params)
        [entry] = (await _all(store, begin))[0]
        assert entry.after is not None
        assert entry.after.entity == {
            "job_id": "foreign",
            "count": [1, 2],
            "raw": "AAE=",
            "version": 0,
        }
        update = {
            "TableName": f"{prefix}_jobs",
            "Key": {"job_id": {"S": "foreign"}},
            "UpdateExpression": "SET n = :n",
            "ExpressionAttributeValues": {":n": {"N": "1"}},
        }
        await store._dynamodb.client.call("UpdateItem", update)
        [entry] = (await _all(store, entry.position))[0]
        assert entry.key == Key("jobs", "foreign")


async def test_the_pause_between_reads_grows_while_nothing_happens(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=FED) as store:
        feed, pauses = store._dynamodb._feed, []
        for position in ("a", "a", "a", "b"):
            await store._dynamodb.feed_changed({"jobs": position}, 0.0)
            pauses.append(feed._pause)
        assert pauses[0] < pauses[1] < pauses[2] <= 1.0
        assert pauses[3] == pauses[0]


async def test_damaged_answers_are_errors(proxy: Proxy) -> None:
    async with store_at(proxy.url, collections=FED, retry_timeout=0.2) as store:
        begin = await store._dynamodb.feed_position("jobs")

        def rule(request: Request) -> Any:
            if request.operation != "GetRecords":
                return None
            return Changed(lambda _: {"Records": [{"dynamodb": {}}]})

        proxy.rule = rule
        with pytest.raises(Exception, match="not a response to GetRecords") as caught:
            await store._dynamodb.read_feed("jobs", begin, 10)
        assert type(caught.value).__name__ == "ProtocolError"


async def test_a_watcher_that_goes_on_at_the_end_of_a_shard_reads_what_others_have_read(
    proxy: Proxy,
) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, FED) as store:
        await store.create_entity("jobs", {"job_id": "old"})
        shards = VirtualShards(proxy, f"{prefix}_jobs")
        async with store.watch("jobs") as first:
            await store.create_entity("jobs", {"job_id": "a"})
            token = (await anext(first)).token
            shards.split()
            ids = {"b", "c", "d"}
            await store.create_entities("jobs", [{"job_id": each} for each in ids])
            assert {(await anext(first)).id for _ in ids} == ids
            waiting = asyncio.create_task(anext(first))
            await asyncio.sleep(0.5)
            async with asyncio.timeout(10), store.watch("jobs", since=token) as second:
                assert {(await anext(second)).id for _ in ids} == ids
            waiting.cancel()


def _empty_page(request: Request) -> Answer:
    """An answer to GetRecords without records, after which the next request asks for the same place."""
    following = request.params["ShardIterator"]
    return Answer(200, {"Records": [], "NextShardIterator": following})


class _EmptyPages:
    """A rule of the proxy: the next `left` answers to GetRecords are empty pages."""

    left = 0

    def __call__(self, request: Request) -> Any:
        if request.operation != "GetRecords" or not self.left:
            return None
        self.left -= 1
        return _empty_page(request)


async def test_empty_pages_before_records_are_not_the_end(proxy: Proxy) -> None:
    """GetRecords may have to be called several times before it returns the next records."""
    prefix = new_prefix()
    proxy.rule = empty = _EmptyPages()
    async with store_at(proxy.url, prefix, FED) as store:
        async with store.watch("jobs") as first:
            ids = [f"j{each}" for each in range(20)]  # more batches than are kept for others
            tokens = []
            for each in ids:
                await store.create_entity("jobs", {"job_id": each})
                tokens.append((await anext(first)).token)
            waiting = asyncio.create_task(anext(first))
            await asyncio.sleep(0.5)
            empty.left = 3
            async with asyncio.timeout(10), store.watch("jobs", since=tokens[0]) as second:
                assert [(await anext(second)).id for _ in ids[1:]] == ids[1:]
            waiting.cancel()


async def test_an_empty_page_of_a_new_watcher_is_not_the_end(proxy: Proxy) -> None:
    prefix = new_prefix()
    iterators: list[str] = []

    def rule(request: Request) -> Any:
        if request.operation != "GetRecords" or request.params["ShardIterator"] not in iterators:
            return None
        iterators.clear()
        return _empty_page(request)

    async with store_at(proxy.url, prefix, FED) as store:
        await store.create_entity("jobs", {"job_id": "old"})
        async with asyncio.timeout(20), store.watch("jobs") as first:
            await store.create_entity("jobs", {"job_id": "a"})
            assert (await anext(first)).id == "a"
            async with store.watch("jobs") as second:
                position = position_in(_position_of(second))
                [mark] = position.shards.values()
                await store.create_entity("jobs", {"job_id": "b"})
                assert (await anext(first)).id == "b"
                waiting = asyncio.create_task(anext(first))
                await asyncio.sleep(0.5)  # it waits at the shared end
                iterators.append(mark.iterator)
                proxy.rule = rule
                assert (await anext(second)).id == "b"
                assert not iterators
                waiting.cancel()


async def test_an_empty_page_after_many_others_is_not_the_end(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_async_store.strategies.dynamodb.feed._FIRST_PAUSE", 0.0)
    prefix = new_prefix()
    proxy.rule = empty = _EmptyPages()
    async with store_at(proxy.url, prefix, FED) as store:
        await store.create_entity("jobs", {"job_id": "old"})
        first, second = [await store._dynamodb.feed_position("jobs") for _ in range(2)]
        for _ in range(25):
            assert (await store._dynamodb.read_feed("jobs", second, 10)).is_end
        for name in ("a", "b"):
            await store.create_entity("jobs", {"job_id": name})
            entries: list[FeedEntry] = []
            while not entries:
                batch = await store._dynamodb.read_feed("jobs", first, 10)
                entries, first = batch.entries, batch.position
            assert [each.key.id for each in entries] == [name]
            empty.left = 1
            assert not (await store._dynamodb.read_feed("jobs", second, 10)).is_end
            if name == "a":
                # As if what was read were older: some empty pages are the end.
                empty.left = 25
                while not (await store._dynamodb.read_feed("jobs", second, 10)).is_end:
                    pass
                empty.left = 0
        read = await store._dynamodb.read_feed("jobs", second, 10)
        assert [each.key.id for each in read.entries] == ["a", "b"]


async def test_an_old_change_does_not_keep_a_new_watcher_reading(proxy: Proxy) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, FED) as store:
        await store.create_entity("jobs", {"job_id": "old"})
        async with store.watch("jobs") as first:
            await store.create_entity("jobs", {"job_id": "a"})
            assert (await anext(first)).id == "a"
            now = await store._dynamodb.feed_position("jobs")
            batch = await store._dynamodb.read_feed("jobs", now, 10)
            assert batch.is_end
            # A position of another process, of about the same time: several empty pages are the end.
            [(shard, mark)] = position_in(now).shards.items()
            other = Position(
                position_in(now).stream,
                {shard: msgspec.structs.replace(mark, since=mark.since - 0.01)},
            ).text()
            pages = 0
            while not (await store._dynamodb.read_feed("jobs", other, 10)).is_end:
                pages += 1
            assert 1 <= pages <= 30


@pytest.mark.parametrize("splits", [3, 4])
async def test_tokens_of_many_shards_fit_into_a_header(proxy: Proxy, splits: int) -> None:
    prefix = new_prefix()
    async with store_at(proxy.url, prefix, FED) as store:
        await store.create_entity("jobs", {"job_id": "old"})
        shards = VirtualShards(proxy, f"{prefix}_jobs")
        shards.iterator_length = 400
        for _ in range(splits):
            shards.split()
        async with asyncio.timeout(20), store.watch("jobs") as first:
            assert len(first.token) < 4_000
            await store.create_entity("jobs", {"job_id": "a"})
            change = await anext(first)
            assert change.id == "a"
            assert len(change.token) < 4_000
            async with store.watch("jobs", since=change.token) as second:
                await store.create_entity("jobs", {"job_id": "b"})
                assert [(await anext(each)).id for each in (first, second)] == ["b", "b"]
