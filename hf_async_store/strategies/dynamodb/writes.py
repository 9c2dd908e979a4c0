"""Independent writes: many share a request, and each keeps its own condition and outcome.

Most changes become one PartiQL statement, and 25 statements share a `BatchExecuteStatement`. How a
change is made depends on what is known before it:

* create, and whatever expects a version: at once; the condition says everything;
* an update or delete that only needs something to be there: at once, and the answer brings the
  version; of what this store wrote last itself the update knows it (`recent`), and insists on it;
* a save that expects nothing, alone: by `UpdateItem`, which inserts or replaces;
* among others: the items of its batch are read first, for PartiQL has no upsert; then an insert, or an
  update of what differs, that insists on the token, tried again if it lost a race;
* what no statement can say (very long names, a change with a mark, an entity near its limits): read,
  changed here, and written whole under the condition that its token is still the same.

**Answers that are lost.** Every write leaves its token. A write whose condition names a version or
token is simply tried again: it lands once, or meets its own token. (A version comes again in another
life of the entity, so the item must also be older than the write: a try that comes late finds none.)
The others look for their token; if it is not there, nobody can tell, and the error says
`outcome_unknown`. (An insert that the server
answered by a failure, and that left nothing, is tried again.) For a while after that, all of these
read first, so that more lost answers do no harm.
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
    AnswerLost,
    Cancelled,
    ConditionFailed,
    StatementRefused,
    TableMissing,
    conflict,
    refused_query,
    short,
    translate,
)
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.items import (
    CREATED_SIDE,
    DECLARATION_DIGEST,
    SIZE,
    TOKEN,
    ItemMapping,
    new_token,
    probe_id,
    size_of,
    stored_size,
    token_of,
    weight_in,
)
from hf_async_store.strategies.dynamodb.requests import unchanged, update_item, upsert_item
from hf_async_store.strategies.dynamodb.statements import (
    ConditionBuilder,
    Path,
    Statement,
    delete,
    insert,
    update,
)
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
_FEW: Final = 4
"""So many deletes are made one by one, before it is worth learning whether they can share."""
_READ_FIRST_SECONDS: Final = 60.0
_ROUNDS_AT_ONCE: Final = 8
"""So many races may a write lose before it pauses between them."""


class Writes:
    """`write_each` of the engine."""

    def __init__(
        self, client: Client, tables: Tables, reading: Reading, recent: WriteCache
    ) -> None:
        self._client = client
        self._tables = tables
        self._reading = reading
        self._recent = recent
        self._seconds = client.config.retry_timeout
        self._imports = Imports(client, tables)
        # Whether the answer to a statement brings its item: not every server does that.
        self._returns: bool | None = None
        # Whether an insert may bring its item as one parameter: AWS does not say so.
        self._inserts_whole = True
        self._read_first_until = 0.0

    async def write_each(self, changes: Sequence[Change]) -> list[Outcome]:
        """As `Engine.write_each`."""
        for collection in {each.key.collection for each in changes}:
            await self._tables.ensure(collection)
        ops = [self._op(each) for each in changes]
        for wave in _waves(ops):
            await self._run(wave)
            for each in wave:
                self._remember(each)
        return [each.outcome for each in ops]

    def _op(self, change: Change) -> WriteOp:
        name = change.key.collection
        return WriteOp(change, self._tables.forms[name], self._tables.name(name))

    def _recall(self, op: WriteOp) -> None:
        """See in it what this store wrote last, if that is what it asks for."""
        change = op.change
        if not isinstance(change, Patch) or op.full_replace:
            return
        left = self._recent.get(op.table, change.key.id)
        if left is not None and (op.needs_state or change.expect == left.version):
            op.observed = left.seen()
            op.from_cache = True

    def _remember(self, op: WriteOp) -> None:
        if op.receipt is None or isinstance(op.outcome, StorageError):
            self._recent.drop(op.table, op.change.key.id)
        else:
            self._recent.put(op.table, op.change.key.id, op.receipt)

    async def _run(self, ops: list[WriteOp]) -> None:
        imports = [each for each in ops if is_import(each.change)]
        if imports:
            await self._imports.write(imports)
        if self._returns is None and sum(isinstance(each.change, Delete) for each in ops) > _FEW:
            self._returns = await self._probe_returning_support(ops[0])
        backoff = Backoff(self._seconds)
        waiting = [each for each in ops if not each.is_done]
        for each in waiting:
            self._recall(each)
        rounds = 0
        while waiting:
            alone = len(waiting) == 1 and time.monotonic() >= self._read_first_until
            await self._look([each for each in waiting if self._must_look(each, is_single=alone)])
            failed = await self._send([each for each in waiting if not each.is_done])
            waiting = [each for each in waiting if not each.is_done]
            rounds += 1
            if failed is None and rounds > _ROUNDS_AT_ONCE:
                failed = conflict()  # others are faster each time, or what is read is not current
            if failed and waiting and not await backoff.pause(failed):
                for each in waiting:
                    each.done(_given_up(each, failed))

    async def _probe_returning_support(self, op: WriteOp) -> bool | None:
        """Whether a delete brings back what it deleted, by one of a key that nobody else has."""
        key = {op.form.key: {"S": probe_id()}}
        statement = delete(op.table, (op.form.key, key[op.form.key]["S"]), ConditionBuilder())
        try:
            await self._client.read("PutItem", {"TableName": op.table, "Item": key})
            answer = await self._client.read("BatchExecuteStatement", {"Statements": [statement]})
            await self._client.read("DeleteItem", {"TableName": op.table, "Key": key})
        except StorageError:
            return None  # whatever it is, the deletes themselves will meet it, too
        [response] = answer["Responses"]
        return "Item" in response

    # -- what is known -----------------------------------------------------------------------

    def _must_look(self, op: WriteOp, *, is_single: bool) -> bool:
        if op.observed is not UNKNOWN:
            return False
        change = op.change
        if isinstance(change, Put) and change.expect is ANY and not is_single:
            return True
        if op.ambiguous:
            return op.needs_state or change.expect is ABSENT
        return op.needs_state and (
            self._returns is False or time.monotonic() < self._read_first_until
        )

    async def _look(self, ops: list[WriteOp]) -> None:
        """Read what is there, and settle what that settles."""
        ops = [each for each in ops if not each.full_replace]
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
                    error.outcome_unknown = False  # this was a read
                    each.done(error)
            return
        for op, item in zip(ops, items, strict=True):
            with _its_own(op):
                self._saw(op, item)

    def _saw(self, op: WriteOp, item: Attributes | None) -> None:
        """What is there now; settles what an answer that was lost left open."""
        before, op.observed = op.observed, item
        if not op.ambiguous:
            return
        if item is not None and op.is_own(item):
            op.landed_at(item)
        elif item is not None and isinstance(before, dict) and token_of(item) == token_of(before):
            return  # on which every try insisted: so none landed, and but one can
        elif isinstance(op.change, Put) and item is None and not op.may_land_later:
            return  # an insert that left nothing
        elif op.change.expect is ABSENT and item is not None:
            op.done(AlreadyExistsError(op.change.key.collection, op.change.key.id))
        else:
            op.done(op.unknown("its token was not found"))

    # -- statements --------------------------------------------------------------------------

    async def _send(self, ops: list[WriteOp]) -> StorageError | None:
        """One try for each; returns an error that says to wait before the next."""
        pairs: list[tuple[WriteOp, Statement]] = []
        for op in ops:
            try:
                statement = None if op.full_replace else self._statement(op)
            except StorageError as exc:
                op.done(exc)
                continue
            if statement is not None:
                pairs.append((op, statement))
            elif not op.is_done:
                op.full_replace = True
        sent = [self._execute(each) for each in chunks(pairs, MAX_STATEMENTS)]
        sent += [self._alone(each) for each in ops if each.full_replace and not each.is_done]
        failures = [await sent[0]] if len(sent) == 1 else await asyncio.gather(*sent)
        return next((each for each in failures if each is not None), None)

    def _statement(self, op: WriteOp) -> Statement | None:
        """How the change is made; None if it is done, or no statement can say it.

        Raises:
            StorageError: what was read says that it cannot be made.
        """
        change, seen = op.change, op.observed
        op.guarded_by_token = False
        op.receipt = None
        if isinstance(seen, Unknown) and isinstance(change, Put) and op.needs_state:
            op.is_upsert = change.expect is ANY
            return None
        if change.expect is ABSENT:
            return self._insert(op)
        if change.expect == INT_MAX and not isinstance(change, Delete):
            return None  # there is no version after it, if that is what is stored
        if isinstance(seen, Unknown):
            guard = self._blind_guard(op)
        elif seen is None:
            if change.expect is not ANY:
                raise op.not_found()
            if isinstance(change, Put):
                return self._insert(op)
            op.done(None)
            return None
        else:
            token = token_of(seen)
            if token is None:
                return None  # another program wrote it
            if (
                isinstance(change, Patch)
                and not op.from_cache
                and seen.get(DECLARATION_DIGEST) != op.form.mark
            ):
                return None
            op.guarded_by_token = True
            guard = ConditionBuilder.token(token)
            if not isinstance(change, Delete):
                op.new_version = next_version(change.key, op.version_of(seen))
        if not isinstance(change, Delete):
            return self._update(op, guard)
        # A delete succeeds where nothing is there: only what comes back tells.
        return delete(op.table, op.key, guard) if self._returns else None

    def _blind_guard(self, op: WriteOp) -> ConditionBuilder:
        expect = op.change.expect
        op.new_version = None
        guard = ConditionBuilder()
        if type(expect) is int:
            guard = ConditionBuilder.version(expect, op.requested_at)
            if not isinstance(op.change, Delete):
                op.new_version = next_version(op.change.key, expect)
        return guard if isinstance(op.change, Delete) else guard.and_declaration(op.form.mark)

    def _insert(self, op: WriteOp) -> Statement:
        put = cast("Put", op.change)
        entity = put.entity
        if CREATED_AT not in entity and put.import_version is None:
            entity = {**entity, CREATED_AT: put.written_at}
        op.new_version = 1 if put.import_version is None else put.import_version
        item = op.form.item(put.key.id, entity, op.new_version, op.token)
        op.receipt = _left(op, item)
        return insert(op.table, item, whole=self._inserts_whole)

    def _update(self, op: WriteOp, guard: ConditionBuilder) -> Statement | None:
        change = op.change
        put: dict[Path, Attribute] = {(TOKEN,): {"S": op.token}}
        removed: list[Path]
        weight: int | None = None
        if isinstance(change, Put):
            if change.import_version is not None:
                return None
            attributes, names = op.form.parts(change.entity, keep_created=True)
            attributes.pop(op.form.key)
            assert op.new_version is not None, "only a patch leaves it to the server"
            attributes[SIZE] = stored_size(change.entity, op.new_version)
            op.receipt = _left(op, attributes)
            if isinstance(op.observed, dict) and op.guarded_by_token:
                attributes, names = _difference(op.observed, attributes, names, op.form)
            put.update({(name,): each for name, each in attributes.items()})
            removed = [(each,) for each in names]
        else:
            assert isinstance(change, Patch)
            fields = change.fields
            if op.form.key in fields:
                fields = {name: each for name, each in fields.items() if name != op.form.key}
            sets, removed = op.form.changes(fields)
            put.update(sets)
            weight = size_of(cast("Entity", fields))
            known = _known_weight(op) + weight
            if known <= MAX_ENTITY_BYTES:
                put[SIZE,] = {"N": str(known)}
                op.receipt = _left(op, {SIZE: put[SIZE,]})
                weight = None
            else:
                guard = guard.and_size_below(MAX_ENTITY_BYTES - weight)
        return update(
            op.table,
            op.key,
            put,
            removed,
            guard,
            version=op.new_version,
            weight=weight,
            returning=op.new_version is None,
        )

    async def _execute(self, pairs: Sequence[tuple[WriteOp, Statement]]) -> StorageError | None:
        try:
            answer = await self._client.call(
                "BatchExecuteStatement", {"Statements": [each for _, each in pairs]}
            )
        except StorageError as exc:
            if self._inserts_whole and isinstance(exc, StatementRefused) and _inserting(pairs):
                self._inserts_whole = False  # and again, in the form that every server knows
                return None
            if len(pairs) > 1 and _may_be_of_one(exc):
                middle = len(pairs) // 2
                waits = [await self._execute(each) for each in (pairs[:middle], pairs[middle:])]
                return waits[0] or waits[1]
            waits = [self._failed(op, exc) for op, _ in pairs]
            return next((each for each in waits if each is not None), None)
        wait: StorageError | None = None
        for (op, _), response in zip(pairs, answer["Responses"], strict=True):
            error = response.get("Error")
            with _its_own(op):
                if error is None:
                    self._landed(op, response.get("Item"))
                else:
                    wait = self._refused(op, error) or wait
        return wait

    # -- answers -----------------------------------------------------------------------------

    def _landed(self, op: WriteOp, item: Attributes | None) -> None:
        if op.new_version is not None:
            op.done(op.new_version)
        elif item is not None and VERSION in item:
            self._returns = True
            op.landed_at(item)
            if not isinstance(op.change, Delete) and not isinstance(op.outcome, StorageError):
                op.receipt = _left(op, item)
        elif not isinstance(op.change, Delete):
            # This server brings nothing back: from now on versions are read before.
            self._returns = False
            op.ambiguous = True
            op.observed = UNKNOWN
        elif op.ambiguous:
            op.done(op.unknown("the entity is deleted now"))
        else:
            op.done(None if op.change.expect is ANY else op.not_found())

    def _refused(self, op: WriteOp, answer: Mapping[str, Any]) -> StorageError | None:
        """What a statement's own error means; returns it if it says to wait."""
        code = short(answer.get("Code") or "")
        if code == "ConditionalCheckFailed":
            return self._condition_failed(op, answer.get("Item"))
        if code == "DuplicateItem":
            self._duplicate(op)
            return None
        error = translate(code, answer.get("Message") or "", 400, answer)
        if isinstance(error, ConcurrencyConflictError):
            return error  # a transaction is at it: nothing was done, and soon it can be
        return self._failed(op, error)

    def _failed(self, op: WriteOp, exc: StorageError) -> StorageError | None:
        if isinstance(exc, StatementRefused) and not op.full_replace:
            if self._inserts_whole and _inserts(op):
                self._inserts_whole = False  # as above, told of the one statement
            else:
                op.full_replace = True
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
            op.may_land_later = op.may_land_later or isinstance(exc, AnswerLost)
            if op.full_replace:
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
            op.observed = UNKNOWN  # somebody was faster, or it was this very write
            if op.change.expect is not ABSENT and not op.ambiguous:
                return
            op.ambiguous = True
        else:
            op.done(AlreadyExistsError(op.change.key.collection, op.change.key.id))

    def _condition_failed(self, op: WriteOp, item: Attributes | None) -> StorageError | None:
        change = op.change
        if item is not None and op.ambiguous and op.is_own(item):
            op.landed_at(item)
        elif item is None:
            self._nothing_there(op)
        elif type(change.expect) is int and op.version_of(item) != change.expect:
            op.done(_stale(op, item))
        elif op.guarded_by_token:
            return self._race_lost(op, item)
        elif op.requested_at and not _is_older(item, op.requested_at):
            if op.ambiguous:  # this may be another life, and it landed in the one before
                op.done(op.unknown("others have written since"))
            op.observed = item  # a clock that is ahead wrote it, or none
        else:
            # The version is the last there is, the entity may become too heavy, or another
            # declaration was in force when it was written.
            op.full_replace = True
            op.observed = item
        return None

    def _nothing_there(self, op: WriteOp) -> None:
        if op.ambiguous and (isinstance(op.change, Delete) or op.change.expect is ANY):
            op.done(op.unknown("the entity is deleted now"))
        elif op.guarded_by_token and op.change.expect is ANY:
            op.observed = None
        else:
            op.done(op.not_found())

    def _race_lost(self, op: WriteOp, item: Attributes | Unknown) -> StorageError | None:
        seen = op.observed
        assert isinstance(item, dict), "there is one"
        if isinstance(seen, dict) and token_of(seen) == token_of(item):
            op.full_replace = True  # it is the weight that does not fit
        elif op.ambiguous:
            op.done(op.unknown("others have written since"))
            return None
        elif op.from_cache:
            self._recent.was_wrong()
            op.from_cache = False
            item = UNKNOWN  # without a guess it need not win a race
        op.observed = item
        return None

    # -- alone -------------------------------------------------------------------------------

    async def _alone(self, op: WriteOp) -> StorageError | None:
        """A change in a request of its own."""
        try:
            return await (self._upsert(op) if op.is_upsert else self._write_whole(op))
        except CorruptionError as exc:
            op.done(exc)
            return None

    async def _upsert(self, op: WriteOp) -> StorageError | None:
        """A save that expects nothing, by the one request that inserts or replaces."""
        op.receipt = None
        op.is_upsert = op.full_replace = (
            False  # where it does not come through, it goes the usual way
        )
        try:
            answer = await self._client.call("UpdateItem", upsert_item(op))
        except ConditionFailed:
            op.full_replace = (
                True  # another declaration wrote it, or its version is the last there is
            )
            return None
        except StorageError as exc:
            return self._failed(op, exc)
        attributes = answer["Attributes"]
        op.landed_at(attributes)
        if not isinstance(op.outcome, StorageError):
            op.receipt = _left(op, attributes)
        return None

    # -- whole -------------------------------------------------------------------------------

    async def _write_whole(self, op: WriteOp) -> StorageError | None:
        """Read, change here, and write under the condition that nobody else did."""
        change = op.change
        op.receipt = None
        try:
            if isinstance(op.observed, Unknown) or not _is_whole(op):
                self._saw(op, await self._reading.item(change.key))
                if op.is_done:
                    return None
            seen = cast("Attributes | None", op.observed)
            if op.ambiguous and seen is not None and op.is_own(seen):
                op.landed_at(seen)
                return None
            if seen is not None and not _takes_any_version(change):
                op.version_of(seen)
            entity = changed(change, None if seen is None else op.form.entity(seen))
            if isinstance(change, Delete) and seen is None:
                op.done(None)
                return None
            await self._replace(op, entity)
        except ConditionFailed as exc:
            if exc.item is not None and op.is_own(exc.item):
                op.landed_at(exc.item)
            elif op.ambiguous:
                op.done(op.unknown("others have written since"))
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
            return self._failed(op, exc)
        op.done(_outcome(op, entity))
        return None

    async def _replace(self, op: WriteOp, entity: Entity | None) -> None:
        change = op.change
        seen = cast("Attributes | None", op.observed)
        request: dict[str, Any] = {"TableName": op.table, **unchanged(op.form, seen)}
        request["ReturnValuesOnConditionCheckFailure"] = "ALL_OLD"
        if entity is None:
            action = "Delete"
            request["Key"] = {op.form.key: {"S": change.key.id}}
        else:
            action = "Put"
            version = cast("int", entity[VERSION])
            request["Item"] = op.form.item(change.key.id, entity, version, op.token)
        if change.mark is None:
            await self._client.call(f"{action}Item", request)
            return
        await self._tables.ensure(change.mark.key.collection)
        mark = self._op(Put(change.mark.key, change.mark.entity, ""))
        item = mark.form.item(
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

    # -- under a condition of the caller's ---------------------------------------------------

    async def update_where(self, change: Patch, condition: str, names: Names) -> int:
        """Update an entity if a condition holds of it; returns the new version.

        Args:
            condition: in DynamoDB's language, with placeholders of `names`.

        Raises:
            EntityNotFoundError, ConcurrencyConflictError, InvalidQueryError.
        """
        await self._tables.ensure(change.key.collection)
        op = self._op(change)
        self._recent.drop(op.table, change.key.id)
        backoff = Backoff(self._seconds)
        for round_ in count():
            if round_ > _ROUNDS_AT_ONCE and not await backoff.pause():
                raise conflict(change.key.collection, change.key.id)
            try:
                answer = await self._client.call(
                    "UpdateItem", update_item(op, condition, names.copy())
                )
                return _own_version_in(op, answer["Attributes"])
            except ConditionFailed as exc:
                if exc.item is None:
                    raise op.not_found() from exc
                if exc.item.get(DECLARATION_DIGEST) != op.form.mark:
                    await self._bring_into_form(op, exc.item)
                    continue
                if not _was_the_weight(op, exc.item):
                    raise _unmet(op, exc.item) from exc
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
                    # The condition may hold still, or again: sent twice, it could land twice.
                    return await self._own_version(op, exc)
                if not await backoff.pause(exc):
                    raise
        raise AssertionError("there is always another round")

    async def _bring_into_form(self, op: WriteOp, item: Attributes) -> None:
        """Have an item that another declaration or program wrote as this one writes it."""
        key = op.change.key
        token = token_of(item) or new_token()
        new = op.form.item(key.id, op.form.entity(item), op.version_of(item), token)
        request = {"TableName": op.table, "Item": new, **unchanged(op.form, item)}
        # It is the same entity: late or twice, it changes nothing.
        with suppress(ConditionFailed):
            await self._client.read("PutItem", request)

    async def _own_version(self, op: WriteOp, lost: UnavailableError) -> int:
        """The version that a write left of which the answer was lost.

        Raises:
            UnavailableError: it left none, or nobody can tell; `outcome_unknown`.
        """
        try:
            item = await self._reading.item(op.change.key)
        except StorageError as exc:
            raise op.unknown(f"reading it back failed: {exc}") from exc
        if item is not None and op.is_own(item):
            return _own_version_in(op, item)
        raise op.unknown(f"{lost}") from lost


@contextmanager
def _its_own(op: WriteOp) -> Iterator[None]:
    """An item that cannot be read ends the change that is about it, and no other."""
    try:
        yield
    except CorruptionError as exc:
        op.done(exc)


def _takes_any_version(change: Change) -> bool:
    """Whether it neither asks for a version nor makes the next one."""
    if isinstance(change, Delete):
        return type(change.expect) is not int
    return isinstance(change, Put) and change.import_version is not None


def _may_be_of_one(exc: StorageError) -> bool:
    """Whether a refusal of a whole batch may be the fault of one, and nothing was done."""
    return not (
        isinstance(exc, UnavailableError | ConcurrencyConflictError | AuthenticationError)
        or exc.outcome_unknown
    )


def _inserting(pairs: Sequence[tuple[WriteOp, Statement]]) -> bool:
    return any(_inserts(op) for op, _ in pairs)


def _own_version_in(op: WriteOp, item: Attributes) -> int:
    """The version that this very write left."""
    try:
        return op.version_of(item)
    except CorruptionError as exc:
        exc.outcome_unknown = True
        raise


def _inserts(op: WriteOp) -> bool:
    """Whether what was just sent for it was an insert."""
    return op.change.expect is ABSENT or (op.observed is None and isinstance(op.change, Put))


def _left(op: WriteOp, item: Attributes) -> WriteReceipt | None:
    """What a write leaves that sets this; the version is in it, or known."""
    version = op.version_of(item) if op.new_version is None else op.new_version
    weight = weight_in(item)
    return None if weight is None else WriteReceipt(version, op.token, weight)


def _known_weight(op: WriteOp) -> int:
    """What the item weighs at most; more than any may where that is not known."""
    seen = op.observed
    weight = weight_in(seen) if isinstance(seen, dict) and op.guarded_by_token else None
    return MAX_ENTITY_BYTES + 1 if weight is None else weight


def _difference(
    seen: Attributes, attributes: Attributes, names: Sequence[str], form: ItemMapping
) -> tuple[Attributes, list[str]]:
    """What a save must set and remove where all of the item is known.

    Args:
        attributes, names: what it sets and removes where nothing is.
    """
    kept = {form.key, VERSION, TOKEN}
    if CREATED_AT not in attributes:
        kept |= {CREATED_AT, CREATED_SIDE}
    changed = {name: each for name, each in attributes.items() if seen.get(name) != each}
    return changed, [each for each in seen if each not in attributes and each not in kept]


def _was_the_weight(op: WriteOp, item: Attributes) -> bool:
    """Whether an update may have been refused for its weight alone, though it is not too heavy.

    Raises:
        UnsupportedValueError: it is.
    """
    change = cast("Patch", op.change)
    if type(change.expect) is int and op.version_of(item) != change.expect:
        return False
    weight = size_of(cast("Entity", dict(change.fields)))
    if isinstance(op.observed, dict):
        return token_of(item) != token_of(op.observed)  # others wrote meanwhile
    if (weight_in(item) or 0) <= MAX_ENTITY_BYTES - weight:
        return False
    entity = op.form.entity(item)
    check_size(patched(entity, change.fields, cast("int", entity[VERSION])))
    return True


def _unmet(op: WriteOp, item: Attributes) -> StorageError:
    expect = op.change.expect
    if type(expect) is int and op.version_of(item) != expect:
        return _stale(op, item)
    version = next_version(op.change.key, op.version_of(item)) - 1
    return ConcurrencyConflictError(
        f"the condition does not hold for {op.change.key.collection} {op.change.key.id!r}",
        collection=op.change.key.collection,
        entity_id=op.change.key.id,
        actual=version,
        current=op.form.entity(item),
    )


def _is_older(item: Attributes, than: str) -> bool:
    return bool(item.get(UPDATED_AT, {}).get("S", than) < than)


def _is_whole(op: WriteOp) -> bool:
    """Whether what was seen is the whole item: a look reads its version and token alone."""
    return op.observed is None or (isinstance(op.observed, dict) and "doc" in op.observed)


def _outcome(op: WriteOp, entity: Entity | None) -> Outcome:
    if entity is not None:
        return cast("int", entity[VERSION])
    try:
        return op.version_of(cast("Attributes", op.observed))
    except CorruptionError:
        return 0  # of what was deleted, whatever its version was


def _stale(op: WriteOp, item: Attributes) -> StorageError:
    change = op.change
    actual = op.version_of(item)
    expected = cast("int", change.expect)
    try:
        check(change.key, expected, actual, op.form.entity(item))
    except StorageError as exc:
        return exc
    raise AssertionError("the versions differ")


def _given_up(op: WriteOp, last: StorageError) -> StorageError:
    if op.ambiguous:
        return op.unknown(f"the retry failed: {last}")
    if isinstance(last, UnavailableError | ConcurrencyConflictError):
        error = last.copy()
        error.outcome_unknown = False
        return error
    return throttled(f"{op.change.key.collection} {op.change.key.id!r}")


def _reason(exc: Cancelled) -> StorageError:
    """Why a change with a mark was cancelled."""
    for each in exc.reasons:
        code = each.get("Code")
        if code and code != "None":
            return translate(code, each.get("Message") or "", 400, each)
    return UnavailableError("the transaction was cancelled without a reason")


def _waves(ops: Sequence[WriteOp]) -> list[list[WriteOp]]:
    """The ops in as few lists as there may be without a key twice in one."""
    waves: list[list[WriteOp]] = []
    seen: dict[tuple[str, str], int] = {}
    for op in ops:
        place = (op.table, op.change.key.id)
        number = seen.get(place, 0)
        seen[place] = number + 1
        if number == len(waves):
            waves.append([])
        waves[number].append(op)
    return waves
