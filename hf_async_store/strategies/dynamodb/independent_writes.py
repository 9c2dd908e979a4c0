"""Independent writes: many share a request, each with its own condition and outcome.

Most changes become one PartiQL statement each, and up to 25 statements share a
`BatchExecuteStatement`:

* A create, and a change that expects a version, is sent without a read; its condition is sufficient.
* An update or delete that only requires the entity to exist is sent without a read, and the response
  returns the version. If the write cache has the state of the entity, an update writes the next
  version on condition that the token is unchanged.
* A single save without an expected version uses `UpdateItem`, which inserts or replaces.
* If there are several changes, the items of such saves are read first, because PartiQL has no upsert.
  Each becomes an insert, or an update of the attributes that differ on condition that the token is
  unchanged; it is repeated if another write came first.
* A change that no statement can express (very long names, a change with a mark, an entity near its
  limits) reads the item and writes it as a whole on condition that the token is unchanged.

**Lost responses.** Every write stores its token. A write whose condition contains a version or token
is repeated: it is applied once, or the repeated attempt finds its own token. (The version of an entity
that was deleted and created again may be the same. Therefore, the condition also requires that the
item is older than the write, which excludes delayed attempts.) Other writes read the item and look for
their token. If the item has another token or does not exist, the outcome cannot be determined, and the
error has `outcome_unknown`. (An insert to which the server responded with a failure is repeated if the
item does not exist.) For a while after a lost response all such writes read first, so that they can be
repeated after further lost responses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from hf_async_store.changes import ABSENT, ANY, Change, Delete, Patch, Put
from hf_async_store.errors import (
    AlreadyExistsError,
    AuthenticationError,
    ConcurrencyConflictError,
    CorruptionError,
    StorageError,
    UnavailableError,
)
from hf_async_store.preconditions import changed, check, next_version, patched
from hf_async_store.strategies.dynamodb.backoff import Backoff, is_safe_to_retry, throttled
from hf_async_store.strategies.dynamodb.bulk_import import Imports, is_import
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
from hf_async_store.strategies.dynamodb.items import (
    CREATED_SUBSTITUTE,
    DECLARATION_DIGEST,
    SIZE,
    TOKEN,
    ItemMapping,
    new_token,
    probe_id,
    size_bound_of,
    size_of,
    stored_size,
    token_of,
)
from hf_async_store.strategies.dynamodb.partiql import (
    ConditionBuilder,
    Path,
    Statement,
    delete,
    insert,
    update,
)
from hf_async_store.strategies.dynamodb.requests import unchanged, update_item, upsert_item
from hf_async_store.strategies.dynamodb.write_cache import WriteReceipt
from hf_async_store.strategies.dynamodb.write_op import (
    UNKNOWN,
    Unknown,
    WriteOp,
    chunks,
    deleted_meanwhile,
)
from hf_async_store.values import (
    CREATED_AT,
    INT_MAX,
    MAX_ENTITY_BYTES,
    UPDATED_AT,
    VERSION,
    Entity,
    check_size,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hf_async_store.changes import Outcome
    from hf_async_store.strategies.dynamodb.client import Client
    from hf_async_store.strategies.dynamodb.codec import Attribute, Attributes
    from hf_async_store.strategies.dynamodb.reading import Reading
    from hf_async_store.strategies.dynamodb.tables import Tables
    from hf_async_store.strategies.dynamodb.write_cache import WriteCache

Item = TypeVar("Item")

MAX_STATEMENTS: Final = 25
_MAX_DELETES_WITHOUT_PROBE: Final = 4
"""With more deletes than this in a call, the store first probes whether statements return items."""
_READ_FIRST_SECONDS: Final = 60.0
_ROUNDS_WITHOUT_PAUSE: Final = 8
"""After this many rounds, in which concurrent writes came first, a write pauses between rounds."""


class Writes:
    """Implements `write_each` of the engine."""

    def __init__(
        self, client: Client, tables: Tables, reading: Reading, write_cache: WriteCache
    ) -> None:
        self._client = client
        self._tables = tables
        self._reading = reading
        self._write_cache = write_cache
        self._retry_seconds = client.config.retry_timeout
        self._imports = Imports(client, tables)
        # Whether the response to a statement returns the item, which not every server does; None
        # if unknown.
        self._returns_items: bool | None = None
        # Whether an insert can pass its item as one parameter, which AWS does not document.
        self._inserts_as_parameter = True
        self._read_first_until = 0.0

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        """As `Engine.write_each`."""
        for collection in {each.key.collection for each in changes}:
            await self._tables.ensure(collection)
        ops = [self._op(each) for each in changes]
        for batch in _split_repeated_keys(ops):
            await self._run(batch)
            for each in batch:
                self._update_cache(each)
        return [each.outcome for each in ops]

    def _op(self, change: Change) -> WriteOp:
        name = change.key.collection
        return WriteOp(change, self._tables.mappings[name], self._tables.name(name))

    def _use_cached_state(self, op: WriteOp) -> None:
        """Use the state in the write cache if the operation can be based on it."""
        change = op.change
        if not isinstance(change, Patch) or op.separate_request:
            return
        receipt = self._write_cache.get(op.table, change.key.id)
        if receipt is not None and (op.needs_state or change.expect == receipt.version):
            op.observed = receipt.as_attributes()
            op.from_cache = True

    def _update_cache(self, op: WriteOp) -> None:
        if op.receipt is None or isinstance(op.outcome, StorageError):
            self._write_cache.drop(op.table, op.change.key.id)
        else:
            self._write_cache.put(op.table, op.change.key.id, op.receipt)

    async def _run(self, ops: list[WriteOp]) -> None:
        imports = [each for each in ops if is_import(each.change)]
        if imports:
            await self._imports.write(imports)
        if (
            self._returns_items is None
            and sum(isinstance(each.change, Delete) for each in ops) > _MAX_DELETES_WITHOUT_PROBE
        ):
            self._returns_items = await self._probe_returning_support(ops[0])
        backoff = Backoff(self._retry_seconds)
        pending = [each for each in ops if not each.is_done]
        for each in pending:
            self._use_cached_state(each)
        rounds = 0
        while pending:
            is_single = len(pending) == 1 and time.monotonic() >= self._read_first_until
            await self._read_current(
                [each for each in pending if self._must_read(each, is_single=is_single)]
            )
            last_error = await self._send([each for each in pending if not each.is_done])
            pending = [each for each in pending if not each.is_done]
            rounds += 1
            if last_error is None and rounds > _ROUNDS_WITHOUT_PAUSE:
                # Other writes came first in each round, or the reads are not current.
                last_error = conflict()
            if last_error and pending and not await backoff.pause(last_error):
                for each in pending:
                    each.done(_retries_exhausted(each, last_error))

    async def _probe_returning_support(self, op: WriteOp) -> bool | None:
        """Whether a delete returns the deleted item, tested with a probe item; None if unknown."""
        key = {op.mapping.key: {"S": probe_id()}}
        statement = delete(op.table, (op.mapping.key, key[op.mapping.key]["S"]), ConditionBuilder())
        try:
            await self._client.read("PutItem", {"TableName": op.table, "Item": key})
            response = await self._client.read("BatchExecuteStatement", {"Statements": [statement]})
            await self._client.read("DeleteItem", {"TableName": op.table, "Key": key})
        except StorageError:
            return None  # the deletes themselves will report the error
        [result] = response["Responses"]
        return "Item" in result

    # -- reads before writes -----------------------------------------------------------------

    def _must_read(self, op: WriteOp, *, is_single: bool) -> bool:
        if op.observed is not UNKNOWN:
            return False
        change = op.change
        if isinstance(change, Put) and change.expect is ANY and not is_single:
            return True
        if op.ambiguous:
            return op.needs_state or change.expect is ABSENT
        return op.needs_state and (
            self._returns_items is False or time.monotonic() < self._read_first_until
        )

    async def _read_current(self, ops: list[WriteOp]) -> None:
        """Read the items of operations, and complete those whose outcome this determines."""
        ops = [each for each in ops if not each.separate_request]
        if not ops:
            return
        try:
            items = await self._reading.items([each.change.key for each in ops], consistent=True)
        except StorageError as exc:
            for each in ops:
                if each.ambiguous and isinstance(exc, UnavailableError):
                    each.done(each.unknown(f"reading it back failed: {exc}"))
                else:
                    error = exc.copy()
                    error.outcome_unknown = False  # the failed request was a read
                    each.done(error)
            return
        for op, item in zip(ops, items, strict=True):
            with _catch_corruption(op):
                self._observe(op, item)

    def _observe(self, op: WriteOp, item: Attributes | None) -> None:
        """Record the item that was read; after a lost response, determine the outcome from it."""
        before, op.observed = op.observed, item
        if not op.ambiguous:
            return
        if item is not None and op.is_own(item):
            op.complete_with(item)
        elif item is not None and isinstance(before, dict) and token_of(item) == token_of(before):
            return  # all attempts required this token: none was applied, and only one can be
        elif isinstance(op.change, Put) and item is None and not op.may_be_applied_later:
            return  # an insert that was not applied
        elif op.change.expect is ABSENT and item is not None:
            op.done(AlreadyExistsError(op.change.key.collection, op.change.key.id))
        else:
            op.done(op.unknown("the stored item does not have the token of the write"))

    # -- statements --------------------------------------------------------------------------

    async def _send(self, ops: list[WriteOp]) -> StorageError | None:
        """Send each operation once; return an error that requires a pause before the next attempt."""
        pairs: list[tuple[WriteOp, Statement]] = []
        for op in ops:
            try:
                statement = None if op.separate_request else self._statement(op)
            except StorageError as exc:
                op.done(exc)
                continue
            if statement is not None:
                pairs.append((op, statement))
            elif not op.is_done:
                op.separate_request = True
        sent = [self._execute(each) for each in chunks(pairs, MAX_STATEMENTS)]
        sent += [
            self._send_separately(each)
            for each in ops
            if each.separate_request and not each.is_done
        ]
        failures = [await sent[0]] if len(sent) == 1 else await asyncio.gather(*sent)
        return next((each for each in failures if each is not None), None)

    def _statement(self, op: WriteOp) -> Statement | None:
        """The statement for an operation; None if it is complete or no statement can express it.

        Raises:
            StorageError: the operation fails because of the item that was read.
        """
        change, observed = op.change, op.observed
        op.guarded_by_token = False
        op.receipt = None
        if isinstance(observed, Unknown) and isinstance(change, Put) and op.needs_state:
            op.is_upsert = change.expect is ANY
            return None
        if change.expect is ABSENT:
            return self._insert(op)
        if change.expect == INT_MAX and not isinstance(change, Delete):
            return None  # if this is the stored version, there is no next one
        if isinstance(observed, Unknown):
            condition = self._condition_without_read(op)
        elif observed is None:
            if change.expect is not ANY:
                raise op.not_found()
            if isinstance(change, Put):
                return self._insert(op)
            op.done(None)
            return None
        else:
            token = token_of(observed)
            if token is None:
                return None  # another program wrote the item
            if (
                isinstance(change, Patch)
                and not op.from_cache
                and observed.get(DECLARATION_DIGEST) != op.mapping.digest
            ):
                return None
            op.guarded_by_token = True
            condition = ConditionBuilder.token(token)
            if not isinstance(change, Delete):
                op.new_version = next_version(change.key, op.version_of(observed))
        if not isinstance(change, Delete):
            return self._update(op, condition)
        # A delete of a missing item succeeds, too; only a returned item shows that it existed.
        return delete(op.table, op.key, condition) if self._returns_items else None

    def _condition_without_read(self, op: WriteOp) -> ConditionBuilder:
        expect = op.change.expect
        op.new_version = None
        condition = ConditionBuilder()
        if type(expect) is int:
            condition = ConditionBuilder.version(expect, op.requested_at)
            if not isinstance(op.change, Delete):
                op.new_version = next_version(op.change.key, expect)
        return (
            condition
            if isinstance(op.change, Delete)
            else condition.and_declaration(op.mapping.digest)
        )

    def _insert(self, op: WriteOp) -> Statement:
        put = cast("Put", op.change)
        entity = put.entity
        if CREATED_AT not in entity and put.import_version is None:
            entity = {**entity, CREATED_AT: put.written_at}
        op.new_version = 1 if put.import_version is None else put.import_version
        item = op.mapping.item(put.key.id, entity, op.new_version, op.token)
        op.receipt = _receipt_of(op, item)
        return insert(op.table, item, whole=self._inserts_as_parameter)

    def _update(self, op: WriteOp, condition: ConditionBuilder) -> Statement | None:
        change = op.change
        assigned: dict[Path, Attribute] = {(TOKEN,): {"S": op.token}}
        removed: list[Path]
        added_size: int | None = None
        if isinstance(change, Put):
            if change.import_version is not None:
                return None
            attributes, names = op.mapping.parts(change.entity, keep_created=True)
            attributes.pop(op.mapping.key)
            assert op.new_version is not None, "the server computes the version of a patch only"
            attributes[SIZE] = stored_size(change.entity, op.new_version)
            op.receipt = _receipt_of(op, attributes)
            if isinstance(op.observed, dict) and op.guarded_by_token:
                attributes, names = _difference(op.observed, attributes, op.mapping)
            assigned.update({(name,): each for name, each in attributes.items()})
            removed = [(each,) for each in names]
        else:
            assert isinstance(change, Patch)
            fields = change.fields
            if op.mapping.key in fields:
                fields = {name: each for name, each in fields.items() if name != op.mapping.key}
            changed_attributes, removed = op.mapping.changes(fields)
            assigned.update(changed_attributes)
            added_size = size_of(cast("Entity", fields))
            known = _known_size(op) + added_size
            if known <= MAX_ENTITY_BYTES:
                assigned[SIZE,] = {"N": str(known)}
                op.receipt = _receipt_of(op, {SIZE: assigned[SIZE,]})
                added_size = None
            else:
                condition = condition.and_size_at_most(MAX_ENTITY_BYTES - added_size)
        return update(
            op.table,
            op.key,
            assigned,
            removed,
            condition,
            version=op.new_version,
            added_size=added_size,
            returning=op.new_version is None,
        )

    async def _execute(self, pairs: Sequence[tuple[WriteOp, Statement]]) -> StorageError | None:
        try:
            response = await self._client.call(
                "BatchExecuteStatement", {"Statements": [each for _, each in pairs]}
            )
        except StorageError as exc:
            if (
                self._inserts_as_parameter
                and isinstance(exc, StatementRefused)
                and _any_insert(pairs)
            ):
                self._inserts_as_parameter = False  # repeat, in the form that all servers support
                return None
            if len(pairs) > 1 and _may_be_caused_by_one(exc):
                middle = len(pairs) // 2
                errors = [await self._execute(each) for each in (pairs[:middle], pairs[middle:])]
                return errors[0] or errors[1]
            errors = [self._request_failed(op, exc) for op, _ in pairs]
            return next((each for each in errors if each is not None), None)
        error_to_wait_for: StorageError | None = None
        for (op, _), result in zip(pairs, response["Responses"], strict=True):
            error = result.get("Error")
            with _catch_corruption(op):
                if error is None:
                    self._statement_applied(op, result.get("Item"))
                else:
                    error_to_wait_for = self._statement_failed(op, error) or error_to_wait_for
        return error_to_wait_for

    # -- responses ---------------------------------------------------------------------------

    def _statement_applied(self, op: WriteOp, item: Attributes | None) -> None:
        if op.new_version is not None:
            op.done(op.new_version)
        elif item is not None and VERSION in item:
            self._returns_items = True
            op.complete_with(item)
            if not isinstance(op.change, Delete) and not isinstance(op.outcome, StorageError):
                op.receipt = _receipt_of(op, item)
        elif not isinstance(op.change, Delete):
            # This server does not return items: from now on, versions are read first.
            self._returns_items = False
            op.ambiguous = True
            op.observed = UNKNOWN
        elif op.ambiguous:
            op.done(op.unknown("the entity does not exist any more"))
        else:
            op.done(None if op.change.expect is ANY else op.not_found())

    def _statement_failed(self, op: WriteOp, failure: Mapping[str, Any]) -> StorageError | None:
        """Handle the error of a statement; return it if it requires a pause."""
        code = short(failure.get("Code") or "")
        if code == "ConditionalCheckFailed":
            return self._condition_failed(op, failure.get("Item"))
        if code == "DuplicateItem":
            self._duplicate(op)
            return None
        error = translate(code, failure.get("Message") or "", 400, failure)
        if isinstance(error, ConcurrencyConflictError):
            return error  # a concurrent transaction; nothing was written, and a retry may succeed
        return self._request_failed(op, error)

    def _request_failed(self, op: WriteOp, exc: StorageError) -> StorageError | None:
        if isinstance(exc, StatementRefused) and not op.separate_request:
            if self._inserts_as_parameter and _is_insert(op):
                self._inserts_as_parameter = False  # as in `_execute`
            else:
                op.separate_request = True
            return None
        if isinstance(exc, TableMissing):
            op.done(deleted_meanwhile(op))
            return None
        if isinstance(exc, ConcurrencyConflictError):
            return exc
        if not isinstance(exc, UnavailableError):
            op.done(exc.copy())
            return None
        if not is_safe_to_retry(exc):
            op.ambiguous = True
            op.may_be_applied_later = op.may_be_applied_later or isinstance(exc, ResponseLost)
            if op.separate_request:
                if op.observed is None:
                    op.observed = UNKNOWN
            elif op.needs_state and not op.guarded_by_token:
                self._read_first_until = time.monotonic() + _READ_FIRST_SECONDS
                op.observed = UNKNOWN
            elif op.change.expect is ABSENT:
                op.observed = UNKNOWN
        return exc

    def _duplicate(self, op: WriteOp) -> None:
        if op.change.expect is not ABSENT or op.ambiguous:
            op.observed = UNKNOWN  # another write or an earlier attempt inserted the item
            if op.change.expect is not ABSENT and not op.ambiguous:
                return
            op.ambiguous = True
        else:
            op.done(AlreadyExistsError(op.change.key.collection, op.change.key.id))

    def _condition_failed(self, op: WriteOp, item: Attributes | None) -> StorageError | None:
        change = op.change
        if item is not None and op.ambiguous and op.is_own(item):
            op.complete_with(item)
        elif item is None:
            self._item_missing(op)
        elif type(change.expect) is int and op.version_of(item) != change.expect:
            op.done(_version_conflict(op, item))
        elif op.guarded_by_token:
            return self._race_lost(op, item)
        elif op.requested_at and not _is_older(item, op.requested_at):
            # The clock of the last writer is ahead, or the item has no `updated_at`.
            if op.ambiguous:  # or the entity was deleted and created again after an attempt
                op.done(op.unknown("the entity was written again since"))
            op.observed = item
        else:
            # The version is the maximum, the entity may become too large, or the item was written
            # with another declaration.
            op.separate_request = True
            op.observed = item
        return None

    def _item_missing(self, op: WriteOp) -> None:
        if op.ambiguous and (isinstance(op.change, Delete) or op.change.expect is ANY):
            op.done(op.unknown("the entity does not exist any more"))
        elif op.guarded_by_token and op.change.expect is ANY:
            op.observed = None
        else:
            op.done(op.not_found())

    def _race_lost(self, op: WriteOp, item: Attributes | Unknown) -> StorageError | None:
        observed = op.observed
        assert isinstance(item, dict), "the item exists"
        if isinstance(observed, dict) and token_of(observed) == token_of(item):
            op.separate_request = True  # the condition on the size failed
        elif op.ambiguous:
            op.done(op.unknown("the entity was written again since"))
            return None
        elif op.from_cache:
            self._write_cache.report_stale_entry()
            op.from_cache = False
            item = UNKNOWN  # an attempt without the cache does not depend on a token
        op.observed = item
        return None

    # -- separate requests -------------------------------------------------------------------

    async def _send_separately(self, op: WriteOp) -> StorageError | None:
        """Send a change as a separate request."""
        try:
            return await (self._upsert(op) if op.is_upsert else self._write_whole(op))
        except CorruptionError as exc:
            op.done(exc)
            return None

    async def _upsert(self, op: WriteOp) -> StorageError | None:
        """Send a save without an expected version as UpdateItem, which inserts or replaces."""
        op.receipt = None
        # If this request fails, the next attempt uses a statement.
        op.is_upsert = op.separate_request = False
        try:
            response = await self._client.call("UpdateItem", upsert_item(op))
        except ConditionFailed:
            # The item was written with another declaration, or its version is near the maximum.
            op.separate_request = True
            return None
        except StorageError as exc:
            return self._request_failed(op, exc)
        attributes = response["Attributes"]
        op.complete_with(attributes)
        if not isinstance(op.outcome, StorageError):
            op.receipt = _receipt_of(op, attributes)
        return None

    # -- writes of the whole item ------------------------------------------------------------

    async def _write_whole(self, op: WriteOp) -> StorageError | None:
        """Read the item, apply the change, and write it if no other write came first."""
        change = op.change
        op.receipt = None
        try:
            if isinstance(op.observed, Unknown) or not _is_whole_item(op):
                self._observe(op, await self._reading.item(change.key))
                if op.is_done:
                    return None
            observed = cast("Attributes | None", op.observed)
            if op.ambiguous and observed is not None and op.is_own(observed):
                op.complete_with(observed)
                return None
            if observed is not None and not _takes_any_version(change):
                op.version_of(observed)
            entity = changed(change, None if observed is None else op.mapping.entity(observed))
            if isinstance(change, Delete) and observed is None:
                op.done(None)
                return None
            await self._replace(op, entity)
        except ConditionFailed as exc:
            if exc.item is not None and op.is_own(exc.item):
                op.complete_with(exc.item)
            elif op.ambiguous:
                op.done(op.unknown("the entity was written again since"))
            else:
                op.observed = exc.item
            return None
        except StatementRefused as exc:
            op.done(exc)
            return None
        except ConcurrencyConflictError as exc:
            if exc.retryable:
                return exc
            op.done(exc)
            return None
        except StorageError as exc:
            return self._request_failed(op, exc)
        op.done(_outcome(op, entity))
        return None

    async def _replace(self, op: WriteOp, entity: Entity | None) -> None:
        change = op.change
        observed = cast("Attributes | None", op.observed)
        request: dict[str, Any] = {"TableName": op.table, **unchanged(op.mapping, observed)}
        request["ReturnValuesOnConditionCheckFailure"] = "ALL_OLD"
        if entity is None:
            action = "Delete"
            request["Key"] = {op.mapping.key: {"S": change.key.id}}
        else:
            action = "Put"
            version = cast("int", entity[VERSION])
            request["Item"] = op.mapping.item(change.key.id, entity, version, op.token)
        if change.mark is None:
            await self._client.call(f"{action}Item", request)
            return
        await self._tables.ensure(change.mark.key.collection)
        mark = self._op(Put(change.mark.key, change.mark.entity, ""))
        item = mark.mapping.item(
            change.mark.key.id,
            change.mark.entity,
            cast("int", change.mark.entity.get(VERSION, 0)),
            op.token,
        )
        actions = [{action: request}, {"Put": {"TableName": mark.table, "Item": item}}]
        try:
            await self._client.call(
                "TransactWriteItems", {"TransactItems": actions, "ClientRequestToken": op.token}
            )
        except Cancelled as exc:
            raise _reason(exc) from exc

    # -- updates with a condition of the caller ----------------------------------------------

    async def update_where(self, change: Patch, condition: str, names: Names) -> int:
        """Update an entity if it satisfies a condition; return the new version.

        Args:
            condition: a ConditionExpression with placeholders of `names`.

        Raises:
            EntityNotFoundError: the entity does not exist.
            ConcurrencyConflictError: the condition or the expected version does not hold.
            InvalidQueryError: DynamoDB rejected the condition.
        """
        await self._tables.ensure(change.key.collection)
        op = self._op(change)
        self._write_cache.drop(op.table, change.key.id)
        backoff = Backoff(self._retry_seconds)
        for round_ in count():
            if round_ > _ROUNDS_WITHOUT_PAUSE and not await backoff.pause():
                raise conflict(change.key.collection, change.key.id)
            try:
                response = await self._client.call(
                    "UpdateItem", update_item(op, condition, names.copy())
                )
                return _own_version_in(op, response["Attributes"])
            except ConditionFailed as exc:
                if exc.item is None:
                    raise op.not_found() from exc
                if exc.item.get(DECLARATION_DIGEST) != op.mapping.digest:
                    await self._rewrite(op, exc.item)
                    continue
                if not _size_condition_failed(op, exc.item):
                    raise _condition_not_met(op, exc.item) from exc
                op.observed = exc.item
            except StatementRefused as exc:
                raise refused_query(exc) from exc
            except TableMissing as exc:
                raise deleted_meanwhile(op) from exc
            except ConcurrencyConflictError:
                if not await backoff.pause():
                    raise
            except UnavailableError as exc:
                if not is_safe_to_retry(exc):
                    # The condition may still hold; a repeated request could be applied twice.
                    return await self._own_version(op, exc)
                if not await backoff.pause(exc):
                    raise
        raise AssertionError("unreachable: the loop does not end")

    async def _rewrite(self, op: WriteOp, item: Attributes) -> None:
        """Rewrite an item that was written with another declaration or by another program."""
        key = op.change.key
        token = token_of(item) or new_token()
        new = op.mapping.item(key.id, op.mapping.entity(item), op.version_of(item), token)
        request = {"TableName": op.table, "Item": new, **unchanged(op.mapping, item)}
        # The entity remains the same, so a delayed or repeated request has no effect.
        with suppress(ConditionFailed):
            await self._client.read("PutItem", request)

    async def _own_version(self, op: WriteOp, lost: UnavailableError) -> int:
        """The version written by a write whose response was lost.

        Raises:
            UnavailableError: whether the write was applied is unknown; has `outcome_unknown`.
        """
        try:
            item = await self._reading.item(op.change.key)
        except StorageError as exc:
            raise op.unknown(f"reading it back failed: {exc}") from exc
        if item is not None and op.is_own(item):
            return _own_version_in(op, item)
        raise op.unknown(f"{lost}") from lost


@contextmanager
def _catch_corruption(op: WriteOp) -> Iterator[None]:
    """Complete only this operation with an error if its item is invalid."""
    try:
        yield
    except CorruptionError as exc:
        op.done(exc)


def _takes_any_version(change: Change) -> bool:
    """Whether the change neither expects a version nor computes the next one."""
    if isinstance(change, Delete):
        return type(change.expect) is not int
    return isinstance(change, Put) and change.import_version is not None


def _may_be_caused_by_one(exc: StorageError) -> bool:
    """Whether a batch may have been rejected because of one operation, without any write."""
    return not (
        isinstance(exc, UnavailableError | ConcurrencyConflictError | AuthenticationError)
        or exc.outcome_unknown
    )


def _any_insert(pairs: Sequence[tuple[WriteOp, Statement]]) -> bool:
    return any(_is_insert(op) for op, _ in pairs)


def _own_version_in(op: WriteOp, item: Attributes) -> int:
    """The version of the item written by this operation."""
    try:
        return op.version_of(item)
    except CorruptionError as exc:
        exc.outcome_unknown = True
        raise


def _is_insert(op: WriteOp) -> bool:
    """Whether the statement that was sent for the operation was an insert."""
    return op.change.expect is ABSENT or (op.observed is None and isinstance(op.change, Put))


def _receipt_of(op: WriteOp, item: Attributes) -> WriteReceipt | None:
    """The state after a write of these attributes; None if they do not contain a size.

    The version is that in the attributes, or else `op.new_version`, which an earlier attempt may have
    set.
    """
    version = op.version_of(item) if VERSION in item else op.new_version
    assert version is not None, "the server computes the version only if it returns the item"
    size = size_bound_of(item)
    return None if size is None else WriteReceipt(version, op.token, size)


def _known_size(op: WriteOp) -> int:
    """The upper bound of the size of the item; if unknown, a value that exceeds the limit."""
    observed = op.observed
    size = size_bound_of(observed) if isinstance(observed, dict) and op.guarded_by_token else None
    return MAX_ENTITY_BYTES + 1 if size is None else size


def _difference(
    observed: Attributes, attributes: Attributes, mapping: ItemMapping
) -> tuple[Attributes, list[str]]:
    """The attributes that a save must set and remove, given the complete stored item.

    Args:
        attributes: the attributes of the whole entity.
    """
    kept = {mapping.key, VERSION, TOKEN}
    if CREATED_AT not in attributes:
        kept |= {CREATED_AT, CREATED_SUBSTITUTE}
    changed = {name: each for name, each in attributes.items() if observed.get(name) != each}
    return changed, [each for each in observed if each not in attributes and each not in kept]


def _size_condition_failed(op: WriteOp, item: Attributes) -> bool:
    """Whether only the condition on the size may have failed, so that the update can be repeated.

    Raises:
        UnsupportedValueError: the updated entity would exceed the limit.
    """
    change = cast("Patch", op.change)
    if type(change.expect) is int and op.version_of(item) != change.expect:
        return False
    added_size = size_of(cast("Entity", dict(change.fields)))
    if isinstance(op.observed, dict):
        return token_of(item) != token_of(op.observed)  # another write came first
    if (size_bound_of(item) or 0) <= MAX_ENTITY_BYTES - added_size:
        return False
    entity = op.mapping.entity(item)
    check_size(patched(entity, change.fields, cast("int", entity[VERSION])))
    return True


def _condition_not_met(op: WriteOp, item: Attributes) -> StorageError:
    expect = op.change.expect
    if type(expect) is int and op.version_of(item) != expect:
        return _version_conflict(op, item)
    version = next_version(op.change.key, op.version_of(item)) - 1
    return ConcurrencyConflictError(
        f"condition_expression does not hold for {op.change.key.collection} {op.change.key.id!r}",
        collection=op.change.key.collection,
        entity_id=op.change.key.id,
        actual=version,
        current=op.mapping.entity(item),
    )


def _is_older(item: Attributes, than: str) -> bool:
    return bool(item.get(UPDATED_AT, {}).get("S", than) < than)


def _is_whole_item(op: WriteOp) -> bool:
    """Whether `observed` is the whole item; from the write cache or a response it is only a part."""
    return op.observed is None or (isinstance(op.observed, dict) and "doc" in op.observed)


def _outcome(op: WriteOp, entity: Entity | None) -> Outcome:
    if entity is not None:
        return cast("int", entity[VERSION])
    try:
        return op.version_of(cast("Attributes", op.observed))
    except CorruptionError:
        return 0  # the deleted item had an invalid version


def _version_conflict(op: WriteOp, item: Attributes) -> StorageError:
    change = op.change
    actual = op.version_of(item)
    expected = cast("int", change.expect)
    try:
        check(change.key, expected, actual, op.mapping.entity(item))
    except StorageError as exc:
        return exc
    raise AssertionError(
        f"{change.key.collection} {change.key.id!r}: no conflict between the stored version {actual} "
        f"and the expected version {expected}"
    )


def _retries_exhausted(op: WriteOp, last: StorageError) -> StorageError:
    if op.ambiguous:
        return op.unknown(f"the retry failed: {last}")
    if isinstance(last, UnavailableError | ConcurrencyConflictError):
        error = last.copy()
        error.outcome_unknown = False
        return error
    return throttled(f"{op.change.key.collection} {op.change.key.id!r}")


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
