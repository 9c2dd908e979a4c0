"""Independent writes: many share a request, each with its own condition and outcome.

Most changes become one PartiQL statement each, and up to 25 statements share a
`BatchExecuteStatement`:

* A create, and a change that expects a version, is sent without a read; its condition is sufficient.
* An update or delete that only requires the entity to exist is sent without a read, and the response
  returns the version. If the write cache has the state of the entity, an update writes the next
  version on condition that the token is unchanged.
* A single save without an expected version uses `UpdateItem`, which inserts or replaces. If the write cache
  has the state of the entity, a single save replaces the item on condition that the token is unchanged.
* If there are several changes, the items of such saves are read first, because PartiQL has no upsert.
  Each becomes an insert, or an update of the attributes that differ on condition that the token is
  unchanged; it is repeated if another write came first.
* Updates of one entity that compute fields from what is stored share an item; see `combined_updates`.
* If the table has a stream, each attempt is a request of its own, PutItem, UpdateItem or DeleteItem with
  the same condition: not every server records statements in streams.
* A change that no statement can express (very long names, a change with a mark, an entity near its
  limits) reads the item and writes it as a whole on condition that the token is unchanged.

`write_states` decides what follows from each response, also from a lost one. The version of an entity
that was deleted and created again may be the same. Therefore, a condition on a version also requires
that the item is older than the write, which excludes delayed attempts. For a while after a lost
response, writes without such a condition read first, so that they can be repeated after further lost
responses.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final, cast

from hf_async_store.changes import Change, Delete, Patch, Put
from hf_async_store.errors import (
    AuthenticationError,
    ConcurrencyConflictError,
    InvalidQueryError,
    StorageError,
    ThrottledError,
    UnavailableError,
)
from hf_async_store.strategies.dynamodb.bulk_import import (
    MAX_PUTS,
    import_request,
    unprocessed_keys,
)
from hf_async_store.strategies.dynamodb.combined_updates import CombinedUpdates, combined
from hf_async_store.strategies.dynamodb.conditional_update import ConditionalUpdate
from hf_async_store.strategies.dynamodb.errors import (
    Cancelled,
    ConditionFailed,
    ResponseLost,
    StatementRefused,
    TableMissing,
    conflict,
    refused_query,
    short,
    translate,
)
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.items import probe_id
from hf_async_store.strategies.dynamodb.partiql import delete
from hf_async_store.strategies.dynamodb.request_retry import (
    is_safe_to_retry,
    throttled,
)
from hf_async_store.strategies.dynamodb.transactions import DynamoDBSession
from hf_async_store.strategies.dynamodb.unique_markers import (
    each_in_order,
    in_transactions,
    may_touch,
)
from hf_async_store.strategies.dynamodb.write_op import WriteOp, chunks, deleted_meanwhile
from hf_async_store.strategies.dynamodb.write_requests import (
    StatementSupport,
    statement_of,
    upsert_item,
    whole_item_request,
)
from hf_async_store.strategies.dynamodb.write_states import (
    ATTEMPTS,
    STATEMENTS,
    Response,
    first_state,
)
from hf_async_store.values import CREATED_AT, VERSION

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from hf_async_store.changes import ChangeMarker, Outcome
    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.codec import Attributes
    from hf_async_store.strategies.dynamodb.items import ItemMapping
    from hf_async_store.strategies.dynamodb.reading import Reading
    from hf_async_store.strategies.dynamodb.tables import Tables
    from hf_async_store.strategies.dynamodb.write_cache import WriteCache
    from hf_async_store.unique import Fields

MAX_STATEMENTS: Final = 25
_MAX_DELETES_WITHOUT_PROBE: Final = 4
"""With more deletes than this in a call, the store first probes whether statements return items."""
_READ_FIRST_SECONDS: Final = 60.0
_ROUNDS_WITHOUT_PAUSE: Final = 8
"""After so many rounds in which other writes came first, a write pauses, and begins as many again: with one
round between two pauses, it would have no chance against stores that do not pause."""


class Writes:
    """Implements `write_each` of the engine."""

    def __init__(
        self, client: Client, tables: Tables, reading: Reading, write_cache: WriteCache
    ) -> None:
        self._client = client
        self._tables = tables
        self._reading = reading
        self._write_cache = write_cache
        self._support = StatementSupport()
        self._read_first_until = 0.0

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        """As `Engine.write_each`."""
        collections = {each.key.collection for each in changes}
        for collection in collections:
            await self._tables.ensure(collection)
        unique = {name: self._tables.unique(name) for name in collections}
        if any(unique.values()):
            return await self._write_unique(changes, unique)
        return await self._write_plain(changes)

    async def _write_unique(
        self, changes: Sequence[Change], unique: Mapping[str, Sequence[Fields]]
    ) -> list[Outcome]:
        """Apply changes of which some may touch unique values: those in transactions of their own."""
        outcomes: list[Outcome] = [None] * len(changes)
        places = in_transactions(changes, unique)
        others = [n for n, each in enumerate(changes) if each.key not in places]
        plain = await self._write_plain([changes[each] for each in others])
        for place, outcome in zip(others, plain, strict=True):
            outcomes[place] = outcome
        await each_in_order(changes, places, self._write_alone, outcomes)
        return outcomes

    async def _write_alone(self, change: Change) -> Outcome:
        """Apply a change in a transaction, again after each conflict with another one."""
        retries = self._client.retries()
        while True:
            session = DynamoDBSession(self._client, self._tables, self._reading, self._write_cache)
            try:
                [outcome] = await session.write([change])
                if not isinstance(outcome, StorageError):
                    await session.commit()
            except ConcurrencyConflictError as exc:
                if exc.outcome_unknown or not await retries.pause_after(exc):
                    return exc
            except StorageError as exc:
                return exc
            else:
                return outcome

    async def _write_plain(self, changes: Sequence[Change]) -> list[Outcome]:
        outcomes: list[Outcome] = [None] * len(changes)
        groups = combined(changes, self._tables.has_stream)
        ops = [self._op([changes[place] for place in each]) for each in groups]
        places = dict(zip(ops, groups, strict=True))
        for batch in _split_repeated_keys(ops):
            await self._run_batch(batch)
            for op in batch:
                for place, outcome in zip(places[op], await self._outcomes(op), strict=True):
                    outcomes[place] = outcome
        return outcomes

    async def _run_batch(self, batch: list[WriteOp]) -> None:
        """Run writes of different entities, again if the indexes of their tables have changed."""
        await self._run(batch)
        refused = await self._repeatable(batch)
        again = [self._op([each.change]) for each in refused]
        await self._run(again)
        for before, after in zip(refused, again, strict=True):
            before.outcome, before.receipt = after.outcome, after.receipt
        for each in batch:
            self._update_cache(each)

    async def _outcomes(self, op: WriteOp) -> list[Outcome]:
        """The outcomes of the changes of a write. Combined ones that were refused are made one by one."""
        if not isinstance(op, CombinedUpdates):
            return [op.outcome]
        error = op.outcome
        if not isinstance(error, StorageError):
            return op.decided
        if not _may_be_caused_by_one(error):
            return [error.copy() for _ in op.changes]
        alone = [self._op([each]) for each in op.changes]
        for each in alone:
            await self._run_batch([each])
        return [each.outcome for each in alone]

    async def update_where(
        self,
        change: Patch,
        condition_of: Callable[[ItemMapping, Names], str],
        *,
        ends_claim: bool = False,
        token: str | None = None,
    ) -> int:
        """Update an entity if it satisfies a condition; return the new version.

        Args:
            condition_of: returns the ConditionExpression for the items of a table, with placeholders of
                the names.
            ends_claim: the update removes the claim of the item.
            token: the write token of the new item, by default any.

        Raises:
            EntityNotFoundError: the entity does not exist.
            ConcurrencyConflictError: the condition or the expected version does not hold.
            InvalidQueryError: DynamoDB rejected the condition.
        """
        collection = change.key.collection
        await self._tables.ensure(collection)
        if may_touch(change, self._tables.unique(collection)):
            raise InvalidQueryError(
                f"a condition_expression cannot be combined with a change of a field of {collection} "
                "that is in a unique index; use a transaction"
            )
        op = self._conditional(change, condition_of, ends_claim, token)
        await self._run([op])
        if await self._repeatable([op]):
            op = self._conditional(change, condition_of, ends_claim, token)
            await self._run([op])
        self._update_cache(op)
        if isinstance(op.outcome, StatementRefused):
            raise refused_query(op.outcome) from op.outcome
        if isinstance(op.outcome, StorageError):
            raise op.outcome
        return cast("int", op.outcome)

    def _op(self, changes: Sequence[Change]) -> WriteOp:
        """The write of a change, or of combined ones."""
        name = changes[0].key.collection
        mapping, table = self._tables.mappings[name], self._tables.name(name)
        if len(changes) > 1:
            return CombinedUpdates(changes, mapping, table)
        return WriteOp(changes[0], mapping, table, by_item=self._tables.has_stream(name))

    def _conditional(
        self,
        change: Patch,
        condition_of: Callable[[ItemMapping, Names], str],
        ends_claim: bool,
        token: str | None,
    ) -> ConditionalUpdate:
        name, names = change.key.collection, Names()
        mapping = self._tables.mappings[name]
        condition = condition_of(mapping, names)
        table = self._tables.name(name)
        op = ConditionalUpdate(change, mapping, table, condition, names, ends_claim=ends_claim)
        op.token = token or op.token
        return op

    async def _repeatable(self, ops: Sequence[WriteOp]) -> list[WriteOp]:
        """The writes that were refused, but may not be for the present indexes of their tables."""
        refused = [
            each
            for each in ops
            if isinstance(each.outcome, StatementRefused)
            and not each.outcome.outcome_unknown
            and not isinstance(each, CombinedUpdates)  # their changes are made one by one
        ]
        mappings = {each.mapping for each in refused}
        changed = {each for each in mappings if await self._tables.have_changed(each)}
        return [each for each in refused if each.mapping in changed]

    def _update_cache(self, op: WriteOp) -> None:
        if op.receipt is None or isinstance(op.outcome, StorageError):
            self._write_cache.drop(op.table, op.change.key.id)
        else:
            self._write_cache.put(op.table, op.change.key.id, op.receipt)

    async def _run(self, ops: list[WriteOp]) -> None:
        if self._support.returns_items is None:
            await self._probe_support(ops)
        retries = self._client.retries()
        pending, rounds = ops, 0
        while pending:
            rounds += 1
            error = await self._round(pending)
            if error is None and rounds % _ROUNDS_WITHOUT_PAUSE == 0:
                # Other writes came first in each round, or the reads are not current.
                error = conflict()
            pending = [each for each in pending if not each.is_done]
            if error and pending and not await retries.pause_after(error):
                for each in pending:
                    each.end(_retries_exhausted(each, error))
                return

    async def _probe_support(self, ops: Sequence[WriteOp]) -> None:
        """Before many deletes: test with a probe item whether a delete returns the deleted item."""
        deletes = [each for each in ops if isinstance(each.change, Delete) and not each.by_item]
        if len(deletes) <= _MAX_DELETES_WITHOUT_PROBE:
            return
        table, (name, _) = deletes[0].table, deletes[0].key
        key = {name: {"S": probe_id()}}
        statement = delete(table, (name, key[name]["S"]), ())
        try:
            await self._client.read("PutItem", {"TableName": table, "Item": key})
            response = await self._client.read("BatchExecuteStatement", {"Statements": [statement]})
            await self._client.read("DeleteItem", {"TableName": table, "Key": key})
        except StorageError:
            return  # the deletes themselves will report the error
        self._support.returns_items = "Item" in response["Responses"][0]

    # -- one round: an attempt of each write -------------------------------------------------

    async def _round(self, ops: Sequence[WriteOp]) -> StorageError | None:
        """Send each write once; return an error that requires a pause before the next attempt."""
        reads_first = time.monotonic() < self._read_first_until
        for op in ops:
            if op.state == "start":
                self._start(op, alone=len(ops) == 1 or op.by_item, reads_first=reads_first)
        await self._read_current([each for each in ops if each.state == "read"])
        statements: list[WriteOp] = []
        imports: list[WriteOp] = []
        separate: list[WriteOp] = []
        for op in ops:
            if self._has_statement(op):
                (separate if op.by_item else statements).append(op)
            elif op.state == "import":
                imports.append(op)
            elif op.state in ATTEMPTS:
                separate.append(op)
        sent = [self._execute(each) for each in chunks(statements, MAX_STATEMENTS)]
        sent += [self._import(each) for each in chunks(imports, MAX_PUTS)]
        sent += [self._send_separately(each) for each in separate]
        return _first([await sent[0]] if len(sent) == 1 else await asyncio.gather(*sent))

    def _start(self, op: WriteOp, *, alone: bool, reads_first: bool) -> None:
        """Choose the first attempt, which may use the state in the write cache."""
        change = op.change
        receipt = None
        # PutItem is the cheapest request for a whole entity, but several changes share statements.
        is_put = alone and isinstance(change, Put) and CREATED_AT in change.entity
        if (is_put or isinstance(change, Patch)) and not op.whole:
            receipt = self._write_cache.get(op.table, change.key.id)
            if op.intent == "expect" and receipt and receipt.version != change.expect:
                receipt = None
            if is_put and receipt and receipt.is_claimed:
                receipt = None  # it does not contain the claim, which PutItem would have to repeat
        if receipt is not None:
            op.observed = receipt.as_attributes()
        is_save = op.intent == "save"
        op.state = first_state(
            op.intent,
            whole=op.whole or (isinstance(change, Delete) and not self._returns_item(op)),
            is_cached=receipt is not None,
            alone=alone,
            # The response to a save that is sent alone always returns the version.
            reads_first=reads_first or (self._returns_item(op) is False and not is_save),
        )
        op.whole = op.whole or (is_put and receipt is not None)

    def _returns_item(self, op: WriteOp) -> bool | None:
        """Whether the response to an attempt without a read contains the item; None: not known yet."""
        if op.by_item:
            return not isinstance(op.change, Delete)
        return self._support.returns_items

    async def _read_current(self, ops: Sequence[WriteOp]) -> None:
        if not ops:
            return
        try:
            items = await self._reading.items([each.change.key for each in ops], consistent=True)
        except StorageError as exc:
            for each in ops:
                each.respond("error", cause=exc)
            return
        for op, item in zip(ops, items, strict=True):
            op.respond_with(item)

    def _has_statement(self, op: WriteOp) -> bool:
        """Set the statement of the next attempt; return False if it needs another request.

        For a write by items, it is an UpdateItem request.
        """
        while op.state in STATEMENTS and not op.whole:
            try:
                op.statement = statement_of(op, self._support)
            except StorageError as exc:
                op.end(exc)
                return False
            if op.statement is not None:
                return True
            op.respond("unsupported")
        return False

    async def _execute(self, ops: Sequence[WriteOp]) -> StorageError | None:
        statements = [each.statement for each in ops]
        try:
            response = await self._client.call("BatchExecuteStatement", {"Statements": statements})
        except StorageError as exc:
            if (
                self._support.inserts_as_parameter
                and isinstance(exc, StatementRefused)
                and any(op.state == "insert" for op in ops)
            ):
                self._support.inserts_as_parameter = False  # repeat, in the form of all servers
                return None
            return await self._batch_failed(ops, exc, self._execute)
        results = zip(ops, response["Responses"], strict=True)
        return _first([self._statement_result(op, result) for op, result in results])

    async def _import(self, ops: Sequence[WriteOp]) -> StorageError | None:
        try:
            response = await self._client.call("BatchWriteItem", import_request(ops))
            unprocessed = unprocessed_keys(ops, response)
        except StorageError as exc:
            return await self._batch_failed(ops, exc, self._import)
        for op in ops:
            is_unprocessed = (op.table, op.change.key.id) in unprocessed
            op.respond("busy" if is_unprocessed else "applied")
        return throttled("an import") if unprocessed else None

    async def _batch_failed(
        self,
        ops: Sequence[WriteOp],
        exc: StorageError,
        send: Callable[[Sequence[WriteOp]], Awaitable[StorageError | None]],
    ) -> StorageError | None:
        """Apply the error of a batch. One rejected operation fails all: send the halves separately."""
        if len(ops) == 1 or not _may_be_caused_by_one(exc):
            return _first([self._failed(op, exc) for op in ops])
        middle = len(ops) // 2
        return _first([await send(each) for each in (ops[:middle], ops[middle:])])

    def _statement_result(self, op: WriteOp, result: Mapping[str, Any]) -> StorageError | None:
        """Apply the result of a statement; return an error that requires a pause."""
        error = result.get("Error")
        if error is None:
            self._statement_applied(op, result.get("Item"))
            return None
        code = short(error.get("Code") or "")
        if code == "DuplicateItem":
            op.respond("exists")
            return None
        return self._failed(op, translate(code, error.get("Message") or "", 400, error))

    def _statement_applied(self, op: WriteOp, item: Attributes | None) -> None:
        if op.new_version is not None:
            op.respond("applied")
        elif isinstance(op.change, Delete):
            op.respond("applied" if item else "missing", item or None)
        elif item is not None and VERSION in item:
            self._support.returns_items = True
            op.respond("applied", item)
        else:
            self._support.returns_items = False
            op.respond("silent")

    def _failed(self, op: WriteOp, exc: StorageError) -> StorageError | None:
        """Apply an error response; return it if it requires a pause."""
        if isinstance(exc, ConditionFailed):
            # A claim that was taken meanwhile does not change the token.
            is_stale = op.state == "cached" and not op.is_observed(exc.item)
            op.respond_with(exc.item)
            if is_stale and op.state == "start":
                self._write_cache.report_stale_entry()
            return None
        response = _response_of(exc)
        is_insert = op.state == "insert" and not op.whole
        if response == "unsupported" and is_insert and self._support.inserts_as_parameter:
            self._support.inserts_as_parameter = False  # as in `_execute`
            return None
        op.respond(response, cause=deleted_meanwhile(op) if isinstance(exc, TableMissing) else exc)
        if response not in ("busy", "failed", "lost"):
            return None
        if op.state == "read" and op.intent != "create":
            self._read_first_until = time.monotonic() + _READ_FIRST_SECONDS
        return exc

    # -- separate requests -------------------------------------------------------------------

    async def _send_separately(self, op: WriteOp) -> StorageError | None:
        """Send an attempt as a request of its own."""
        try:
            operation, params = await self._separate_request(op)
        except StorageError as exc:
            op.end(exc)
            return None
        try:
            response = await self._client.call(operation, params)
        except StorageError as exc:
            return self._failed(op, _reason(exc) if isinstance(exc, Cancelled) else exc)
        # Servers may return more than was requested.
        item = response.get("Attributes") if operation == "UpdateItem" else None
        op.respond("applied", item)
        return None

    async def _separate_request(self, op: WriteOp) -> tuple[str, dict[str, Any]]:
        if op.by_item and op.state in STATEMENTS and not op.whole:
            return "UpdateItem", cast("dict[str, Any]", op.statement)
        if op.state == "upsert":
            return "UpdateItem", upsert_item(op)
        if isinstance(op, ConditionalUpdate):
            return "UpdateItem", await op.request(self._client)
        action, request = whole_item_request(op)
        if op.change.mark is None:
            return f"{action}Item", request
        return "TransactWriteItems", await self._with_mark(op, {action: request}, op.change.mark)

    async def _with_mark(
        self, op: WriteOp, action: dict[str, Any], mark: ChangeMarker
    ) -> dict[str, Any]:
        """The transaction of an action and the change marker."""
        await self._tables.ensure(mark.key.collection)
        item = self._tables.mappings[mark.key.collection].item(
            mark.key.id, mark.entity, cast("int", mark.entity.get(VERSION, 0)), op.token
        )
        put = {"Put": {"TableName": self._tables.name(mark.key.collection), "Item": item}}
        return {"TransactItems": [action, put], "ClientRequestToken": op.token}


def _response_of(exc: StorageError) -> Response:
    """The kind of an error response other than a failed condition."""
    if isinstance(exc, StatementRefused):
        return "unsupported"
    if isinstance(exc, ConcurrencyConflictError):
        return "busy"  # a concurrent transaction; nothing was written
    if isinstance(exc, ResponseLost) or (isinstance(exc, ThrottledError) and exc.outcome_unknown):
        return "lost"  # the latter from a proxy
    if isinstance(exc, UnavailableError):
        return "busy" if is_safe_to_retry(exc) else "failed"
    return "error"


def _first(errors: Iterable[StorageError | None]) -> StorageError | None:
    return next((each for each in errors if each is not None), None)


def _may_be_caused_by_one(exc: StorageError) -> bool:
    """Whether a batch may have been rejected because of one operation, without any write."""
    return not (
        isinstance(exc, UnavailableError | ConcurrencyConflictError | AuthenticationError)
        or exc.outcome_unknown
    )


def _retries_exhausted(op: WriteOp, last: StorageError) -> StorageError:
    if op.doubt != "none":
        return op.unknown(last)
    if not isinstance(last, UnavailableError | ConcurrencyConflictError):
        return throttled(op.name)
    error = last.copy()
    error.outcome_unknown = False  # it may be the error of another write
    return error


def _reason(exc: Cancelled) -> StorageError:
    """The error for a cancelled change with a mark: that of the first action that failed."""
    for each in exc.reasons:
        code = each.get("Code")
        if code and code != "None":
            return translate(code, each.get("Message") or "", 400, each)
    return UnavailableError("DynamoDB cancelled the transaction without giving a reason")


def _split_repeated_keys(ops: Sequence[WriteOp]) -> list[list[WriteOp]]:
    """Split the operations into as few batches as possible, none of which contains a key twice."""
    batches: list[list[WriteOp]] = []
    counts: dict[tuple[str, str], int] = {}
    for op in ops:
        key = (op.table, op.change.key.id)
        number = counts.get(key, 0)
        counts[key] = number + 1
        if number == len(batches):
            batches.append([])
        batches[number].append(op)
    return batches
