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

MOST_STATEMENTS: Final = 25
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
        works = [self._work(each) for each in changes]
        for wave in _waves(works):
            await self._run(wave)
            for each in wave:
                self._remember(each)
        return [each.outcome for each in works]

    def _work(self, change: Change) -> WriteOp:
        name = change.key.collection
        return WriteOp(change, self._tables.forms[name], self._tables.name(name))

    def _recall(self, work: WriteOp) -> None:
        """See in it what this store wrote last, if that is what it asks for."""
        change = work.change
        if not isinstance(change, Patch) or work.full_replace:
            return
        left = self._recent.get(work.table, change.key.id)
        if left is not None and (work.needs_state or change.expect == left.version):
            work.observed = left.seen()
            work.from_cache = True

    def _remember(self, work: WriteOp) -> None:
        if work.receipt is None or isinstance(work.outcome, StorageError):
            self._recent.drop(work.table, work.change.key.id)
        else:
            self._recent.put(work.table, work.change.key.id, work.receipt)

    async def _run(self, works: list[WriteOp]) -> None:
        imports = [each for each in works if is_import(each.change)]
        if imports:
            await self._imports.write(imports)
        if self._returns is None and sum(isinstance(each.change, Delete) for each in works) > _FEW:
            self._returns = await self._probe_returning_support(works[0])
        backoff = Backoff(self._seconds)
        waiting = [each for each in works if not each.is_done]
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

    async def _probe_returning_support(self, work: WriteOp) -> bool | None:
        """Whether a delete brings back what it deleted, by one of a key that nobody else has."""
        key = {work.form.key: {"S": probe_id()}}
        statement = delete(work.table, (work.form.key, key[work.form.key]["S"]), ConditionBuilder())
        try:
            await self._client.read("PutItem", {"TableName": work.table, "Item": key})
            answer = await self._client.read("BatchExecuteStatement", {"Statements": [statement]})
            await self._client.read("DeleteItem", {"TableName": work.table, "Key": key})
        except StorageError:
            return None  # whatever it is, the deletes themselves will meet it, too
        [response] = answer["Responses"]
        return "Item" in response

    # -- what is known -----------------------------------------------------------------------

    def _must_look(self, work: WriteOp, *, is_single: bool) -> bool:
        if work.observed is not UNKNOWN:
            return False
        change = work.change
        if isinstance(change, Put) and change.expect is ANY and not is_single:
            return True
        if work.ambiguous:
            return work.needs_state or change.expect is ABSENT
        return work.needs_state and (
            self._returns is False or time.monotonic() < self._read_first_until
        )

    async def _look(self, works: list[WriteOp]) -> None:
        """Read what is there, and settle what that settles."""
        works = [each for each in works if not each.full_replace]
        if not works:
            return
        try:
            items = await self._reading.items([each.change.key for each in works], consistent=True)
        except StorageError as exc:
            for each in works:
                if each.ambiguous and isinstance(exc, UnavailableError):
                    each.done(each.unknown(f"reading it back failed: {exc}"))
                else:
                    error = exc.copy()
                    error.outcome_unknown = False  # this was a read
                    each.done(error)
            return
        for work, item in zip(works, items, strict=True):
            with _its_own(work):
                self._saw(work, item)

    def _saw(self, work: WriteOp, item: Attributes | None) -> None:
        """What is there now; settles what an answer that was lost left open."""
        before, work.observed = work.observed, item
        if not work.ambiguous:
            return
        if item is not None and work.is_own(item):
            work.landed_at(item)
        elif item is not None and isinstance(before, dict) and token_of(item) == token_of(before):
            return  # on which every try insisted: so none landed, and but one can
        elif isinstance(work.change, Put) and item is None and not work.may_land_later:
            return  # an insert that left nothing
        elif work.change.expect is ABSENT and item is not None:
            work.done(AlreadyExistsError(work.change.key.collection, work.change.key.id))
        else:
            work.done(work.unknown("its token was not found"))

    # -- statements --------------------------------------------------------------------------

    async def _send(self, works: list[WriteOp]) -> StorageError | None:
        """One try for each; returns an error that says to wait before the next."""
        pairs: list[tuple[WriteOp, Statement]] = []
        for work in works:
            try:
                statement = None if work.full_replace else self._statement(work)
            except StorageError as exc:
                work.done(exc)
                continue
            if statement is not None:
                pairs.append((work, statement))
            elif not work.is_done:
                work.full_replace = True
        sent = [self._execute(each) for each in chunks(pairs, MOST_STATEMENTS)]
        sent += [self._alone(each) for each in works if each.full_replace and not each.is_done]
        failures = [await sent[0]] if len(sent) == 1 else await asyncio.gather(*sent)
        return next((each for each in failures if each is not None), None)

    def _statement(self, work: WriteOp) -> Statement | None:
        """How the change is made; None if it is done, or no statement can say it.

        Raises:
            StorageError: what was read says that it cannot be made.
        """
        change, seen = work.change, work.observed
        work.guarded_by_token = False
        work.receipt = None
        if isinstance(seen, Unknown) and isinstance(change, Put) and work.needs_state:
            work.is_upsert = change.expect is ANY
            return None
        if change.expect is ABSENT:
            return self._insert(work)
        if change.expect == INT_MAX and not isinstance(change, Delete):
            return None  # there is no version after it, if that is what is stored
        if isinstance(seen, Unknown):
            guard = self._blind_guard(work)
        elif seen is None:
            if change.expect is not ANY:
                raise work.not_found()
            if isinstance(change, Put):
                return self._insert(work)
            work.done(None)
            return None
        else:
            token = token_of(seen)
            if token is None:
                return None  # another program wrote it
            if (
                isinstance(change, Patch)
                and not work.from_cache
                and seen.get(DECLARATION_DIGEST) != work.form.mark
            ):
                return None
            work.guarded_by_token = True
            guard = ConditionBuilder.token(token)
            if not isinstance(change, Delete):
                work.new_version = next_version(change.key, work.version_of(seen))
        if not isinstance(change, Delete):
            return self._update(work, guard)
        # A delete succeeds where nothing is there: only what comes back tells.
        return delete(work.table, work.key, guard) if self._returns else None

    def _blind_guard(self, work: WriteOp) -> ConditionBuilder:
        expect = work.change.expect
        work.new_version = None
        guard = ConditionBuilder()
        if type(expect) is int:
            guard = ConditionBuilder.version(expect, work.requested_at)
            if not isinstance(work.change, Delete):
                work.new_version = next_version(work.change.key, expect)
        return guard if isinstance(work.change, Delete) else guard.and_declaration(work.form.mark)

    def _insert(self, work: WriteOp) -> Statement:
        put = cast("Put", work.change)
        entity = put.entity
        if CREATED_AT not in entity and put.import_version is None:
            entity = {**entity, CREATED_AT: put.written_at}
        work.new_version = 1 if put.import_version is None else put.import_version
        item = work.form.item(put.key.id, entity, work.new_version, work.token)
        work.receipt = _left(work, item)
        return insert(work.table, item, whole=self._inserts_whole)

    def _update(self, work: WriteOp, guard: ConditionBuilder) -> Statement | None:
        change = work.change
        put: dict[Path, Attribute] = {(TOKEN,): {"S": work.token}}
        removed: list[Path]
        weight: int | None = None
        if isinstance(change, Put):
            if change.import_version is not None:
                return None
            attributes, names = work.form.parts(change.entity, keep_created=True)
            attributes.pop(work.form.key)
            assert work.new_version is not None, "only a patch leaves it to the server"
            attributes[SIZE] = stored_size(change.entity, work.new_version)
            work.receipt = _left(work, attributes)
            if isinstance(work.observed, dict) and work.guarded_by_token:
                attributes, names = _difference(work.observed, attributes, names, work.form)
            put.update({(name,): each for name, each in attributes.items()})
            removed = [(each,) for each in names]
        else:
            assert isinstance(change, Patch)
            fields = change.fields
            if work.form.key in fields:
                fields = {name: each for name, each in fields.items() if name != work.form.key}
            sets, removed = work.form.changes(fields)
            put.update(sets)
            weight = size_of(cast("Entity", fields))
            known = _known_weight(work) + weight
            if known <= MAX_ENTITY_BYTES:
                put[SIZE,] = {"N": str(known)}
                work.receipt = _left(work, {SIZE: put[SIZE,]})
                weight = None
            else:
                guard = guard.and_size_below(MAX_ENTITY_BYTES - weight)
        return update(
            work.table,
            work.key,
            put,
            removed,
            guard,
            version=work.new_version,
            weight=weight,
            returning=work.new_version is None,
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
            waits = [self._failed(work, exc) for work, _ in pairs]
            return next((each for each in waits if each is not None), None)
        wait: StorageError | None = None
        for (work, _), response in zip(pairs, answer["Responses"], strict=True):
            error = response.get("Error")
            with _its_own(work):
                if error is None:
                    self._landed(work, response.get("Item"))
                else:
                    wait = self._refused(work, error) or wait
        return wait

    # -- answers -----------------------------------------------------------------------------

    def _landed(self, work: WriteOp, item: Attributes | None) -> None:
        if work.new_version is not None:
            work.done(work.new_version)
        elif item is not None and VERSION in item:
            self._returns = True
            work.landed_at(item)
            if not isinstance(work.change, Delete) and not isinstance(work.outcome, StorageError):
                work.receipt = _left(work, item)
        elif not isinstance(work.change, Delete):
            # This server brings nothing back: from now on versions are read before.
            self._returns = False
            work.ambiguous = True
            work.observed = UNKNOWN
        elif work.ambiguous:
            work.done(work.unknown("the entity is deleted now"))
        else:
            work.done(None if work.change.expect is ANY else work.not_found())

    def _refused(self, work: WriteOp, answer: Mapping[str, Any]) -> StorageError | None:
        """What a statement's own error means; returns it if it says to wait."""
        code = short(answer.get("Code") or "")
        if code == "ConditionalCheckFailed":
            return self._condition_failed(work, answer.get("Item"))
        if code == "DuplicateItem":
            self._duplicate(work)
            return None
        error = translate(code, answer.get("Message") or "", 400, answer)
        if isinstance(error, ConcurrencyConflictError):
            return error  # a transaction is at it: nothing was done, and soon it can be
        return self._failed(work, error)

    def _failed(self, work: WriteOp, exc: StorageError) -> StorageError | None:
        if isinstance(exc, StatementRefused) and not work.full_replace:
            if self._inserts_whole and _inserts(work):
                self._inserts_whole = False  # as above, told of the one statement
            else:
                work.full_replace = True
            return None
        if isinstance(exc, TableMissing):
            work.done(deleted_meanwhile(work))
            return None
        if isinstance(exc, ConcurrencyConflictError):
            return exc
        if not isinstance(exc, UnavailableError):
            work.done(exc.copy())
            return None
        if not is_safe_to_retry(exc):
            work.ambiguous = True
            work.may_land_later = work.may_land_later or isinstance(exc, AnswerLost)
            if work.full_replace:
                if work.observed is None:
                    work.observed = UNKNOWN
            elif work.needs_state and not work.guarded_by_token:
                self._read_first_until = time.monotonic() + _READ_FIRST_SECONDS
                work.observed = UNKNOWN
            elif work.change.expect is ABSENT:
                work.observed = UNKNOWN
        return exc

    def _duplicate(self, work: WriteOp) -> None:
        if work.change.expect is not ABSENT or work.ambiguous:
            work.observed = UNKNOWN  # somebody was faster, or it was this very write
            if work.change.expect is not ABSENT and not work.ambiguous:
                return
            work.ambiguous = True
        else:
            work.done(AlreadyExistsError(work.change.key.collection, work.change.key.id))

    def _condition_failed(self, work: WriteOp, item: Attributes | None) -> StorageError | None:
        change = work.change
        if item is not None and work.ambiguous and work.is_own(item):
            work.landed_at(item)
        elif item is None:
            self._nothing_there(work)
        elif type(change.expect) is int and work.version_of(item) != change.expect:
            work.done(_stale(work, item))
        elif work.guarded_by_token:
            return self._race_lost(work, item)
        elif work.requested_at and not _is_older(item, work.requested_at):
            if work.ambiguous:  # this may be another life, and it landed in the one before
                work.done(work.unknown("others have written since"))
            work.observed = item  # a clock that is ahead wrote it, or none
        else:
            # The version is the last there is, the entity may become too heavy, or another
            # declaration was in force when it was written.
            work.full_replace = True
            work.observed = item
        return None

    def _nothing_there(self, work: WriteOp) -> None:
        if work.ambiguous and (isinstance(work.change, Delete) or work.change.expect is ANY):
            work.done(work.unknown("the entity is deleted now"))
        elif work.guarded_by_token and work.change.expect is ANY:
            work.observed = None
        else:
            work.done(work.not_found())

    def _race_lost(self, work: WriteOp, item: Attributes | Unknown) -> StorageError | None:
        seen = work.observed
        assert isinstance(item, dict), "there is one"
        if isinstance(seen, dict) and token_of(seen) == token_of(item):
            work.full_replace = True  # it is the weight that does not fit
        elif work.ambiguous:
            work.done(work.unknown("others have written since"))
            return None
        elif work.from_cache:
            self._recent.was_wrong()
            work.from_cache = False
            item = UNKNOWN  # without a guess it need not win a race
        work.observed = item
        return None

    # -- alone -------------------------------------------------------------------------------

    async def _alone(self, work: WriteOp) -> StorageError | None:
        """A change in a request of its own."""
        try:
            return await (self._upsert(work) if work.is_upsert else self._write_whole(work))
        except CorruptionError as exc:
            work.done(exc)
            return None

    async def _upsert(self, work: WriteOp) -> StorageError | None:
        """A save that expects nothing, by the one request that inserts or replaces."""
        work.receipt = None
        work.is_upsert = work.full_replace = (
            False  # where it does not come through, it goes the usual way
        )
        try:
            answer = await self._client.call("UpdateItem", upsert_item(work))
        except ConditionFailed:
            work.full_replace = (
                True  # another declaration wrote it, or its version is the last there is
            )
            return None
        except StorageError as exc:
            return self._failed(work, exc)
        attributes = answer["Attributes"]
        work.landed_at(attributes)
        if not isinstance(work.outcome, StorageError):
            work.receipt = _left(work, attributes)
        return None

    # -- whole -------------------------------------------------------------------------------

    async def _write_whole(self, work: WriteOp) -> StorageError | None:
        """Read, change here, and write under the condition that nobody else did."""
        change = work.change
        work.receipt = None
        try:
            if isinstance(work.observed, Unknown) or not _is_whole(work):
                self._saw(work, await self._reading.item(change.key))
                if work.is_done:
                    return None
            seen = cast("Attributes | None", work.observed)
            if work.ambiguous and seen is not None and work.is_own(seen):
                work.landed_at(seen)
                return None
            if seen is not None and not _takes_any_version(change):
                work.version_of(seen)
            entity = changed(change, None if seen is None else work.form.entity(seen))
            if isinstance(change, Delete) and seen is None:
                work.done(None)
                return None
            await self._replace(work, entity)
        except ConditionFailed as exc:
            if exc.item is not None and work.is_own(exc.item):
                work.landed_at(exc.item)
            elif work.ambiguous:
                work.done(work.unknown("others have written since"))
            else:
                work.observed = exc.item
            return None
        except StatementRefused as exc:
            work.done(exc)
            return None
        except ConcurrencyConflictError as exc:
            if exc.retryable:
                return exc
            work.done(exc)
            return None
        except StorageError as exc:
            return self._failed(work, exc)
        work.done(_outcome(work, entity))
        return None

    async def _replace(self, work: WriteOp, entity: Entity | None) -> None:
        change = work.change
        seen = cast("Attributes | None", work.observed)
        request: dict[str, Any] = {"TableName": work.table, **unchanged(work.form, seen)}
        request["ReturnValuesOnConditionCheckFailure"] = "ALL_OLD"
        if entity is None:
            action = "Delete"
            request["Key"] = {work.form.key: {"S": change.key.id}}
        else:
            action = "Put"
            version = cast("int", entity[VERSION])
            request["Item"] = work.form.item(change.key.id, entity, version, work.token)
        if change.mark is None:
            await self._client.call(f"{action}Item", request)
            return
        await self._tables.ensure(change.mark.key.collection)
        mark = self._work(Put(change.mark.key, change.mark.entity, ""))
        item = mark.form.item(
            change.mark.key.id,
            change.mark.entity,
            cast("int", change.mark.entity.get(VERSION, 0)),
            work.token,
        )
        actions = [{action: request}, {"Put": {"TableName": mark.table, "Item": item}}]
        try:
            await self._client.call(
                "TransactWriteItems", {"TransactItems": actions, "ClientRequestToken": work.token}
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
        work = self._work(change)
        self._recent.drop(work.table, change.key.id)
        backoff = Backoff(self._seconds)
        for round_ in count():
            if round_ > _ROUNDS_AT_ONCE and not await backoff.pause():
                raise conflict(change.key.collection, change.key.id)
            try:
                answer = await self._client.call(
                    "UpdateItem", update_item(work, condition, names.copy())
                )
                return _own_version_in(work, answer["Attributes"])
            except ConditionFailed as exc:
                if exc.item is None:
                    raise work.not_found() from exc
                if exc.item.get(DECLARATION_DIGEST) != work.form.mark:
                    await self._bring_into_form(work, exc.item)
                    continue
                if not _was_the_weight(work, exc.item):
                    raise _unmet(work, exc.item) from exc
                work.observed = exc.item
            except StatementRefused as exc:
                raise refused_query(exc) from exc
            except TableMissing as exc:
                raise deleted_meanwhile(work) from exc
            except ConcurrencyConflictError:
                if not await backoff.pause():
                    raise
            except UnavailableError as exc:
                if not is_safe_to_retry(exc):
                    # The condition may hold still, or again: sent twice, it could land twice.
                    return await self._own_version(work, exc)
                if not await backoff.pause(exc):
                    raise
        raise AssertionError("there is always another round")

    async def _bring_into_form(self, work: WriteOp, item: Attributes) -> None:
        """Have an item that another declaration or program wrote as this one writes it."""
        key = work.change.key
        token = token_of(item) or new_token()
        new = work.form.item(key.id, work.form.entity(item), work.version_of(item), token)
        request = {"TableName": work.table, "Item": new, **unchanged(work.form, item)}
        # It is the same entity: late or twice, it changes nothing.
        with suppress(ConditionFailed):
            await self._client.read("PutItem", request)

    async def _own_version(self, work: WriteOp, lost: UnavailableError) -> int:
        """The version that a write left of which the answer was lost.

        Raises:
            UnavailableError: it left none, or nobody can tell; `outcome_unknown`.
        """
        try:
            item = await self._reading.item(work.change.key)
        except StorageError as exc:
            raise work.unknown(f"reading it back failed: {exc}") from exc
        if item is not None and work.is_own(item):
            return _own_version_in(work, item)
        raise work.unknown(f"{lost}") from lost


@contextmanager
def _its_own(work: WriteOp) -> Iterator[None]:
    """An item that cannot be read ends the change that is about it, and no other."""
    try:
        yield
    except CorruptionError as exc:
        work.done(exc)


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
    return any(_inserts(work) for work, _ in pairs)


def _own_version_in(work: WriteOp, item: Attributes) -> int:
    """The version that this very write left."""
    try:
        return work.version_of(item)
    except CorruptionError as exc:
        exc.outcome_unknown = True
        raise


def _inserts(work: WriteOp) -> bool:
    """Whether what was just sent for it was an insert."""
    return work.change.expect is ABSENT or (work.observed is None and isinstance(work.change, Put))


def _left(work: WriteOp, item: Attributes) -> WriteReceipt | None:
    """What a write leaves that sets this; the version is in it, or known."""
    version = work.version_of(item) if work.new_version is None else work.new_version
    weight = weight_in(item)
    return None if weight is None else WriteReceipt(version, work.token, weight)


def _known_weight(work: WriteOp) -> int:
    """What the item weighs at most; more than any may where that is not known."""
    seen = work.observed
    weight = weight_in(seen) if isinstance(seen, dict) and work.guarded_by_token else None
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


def _was_the_weight(work: WriteOp, item: Attributes) -> bool:
    """Whether an update may have been refused for its weight alone, though it is not too heavy.

    Raises:
        UnsupportedValueError: it is.
    """
    change = cast("Patch", work.change)
    if type(change.expect) is int and work.version_of(item) != change.expect:
        return False
    weight = size_of(cast("Entity", dict(change.fields)))
    if isinstance(work.observed, dict):
        return token_of(item) != token_of(work.observed)  # others wrote meanwhile
    if (weight_in(item) or 0) <= MAX_ENTITY_BYTES - weight:
        return False
    entity = work.form.entity(item)
    check_size(patched(entity, change.fields, cast("int", entity[VERSION])))
    return True


def _unmet(work: WriteOp, item: Attributes) -> StorageError:
    expect = work.change.expect
    if type(expect) is int and work.version_of(item) != expect:
        return _stale(work, item)
    version = next_version(work.change.key, work.version_of(item)) - 1
    return ConcurrencyConflictError(
        f"the condition does not hold for {work.change.key.collection} {work.change.key.id!r}",
        collection=work.change.key.collection,
        entity_id=work.change.key.id,
        actual=version,
        current=work.form.entity(item),
    )


def _is_older(item: Attributes, than: str) -> bool:
    return bool(item.get(UPDATED_AT, {}).get("S", than) < than)


def _is_whole(work: WriteOp) -> bool:
    """Whether what was seen is the whole item: a look reads its version and token alone."""
    return work.observed is None or (isinstance(work.observed, dict) and "doc" in work.observed)


def _outcome(work: WriteOp, entity: Entity | None) -> Outcome:
    if entity is not None:
        return cast("int", entity[VERSION])
    try:
        return work.version_of(cast("Attributes", work.observed))
    except CorruptionError:
        return 0  # of what was deleted, whatever its version was


def _stale(work: WriteOp, item: Attributes) -> StorageError:
    change = work.change
    actual = work.version_of(item)
    expected = cast("int", change.expect)
    try:
        check(change.key, expected, actual, work.form.entity(item))
    except StorageError as exc:
        return exc
    raise AssertionError("the versions differ")


def _given_up(work: WriteOp, last: StorageError) -> StorageError:
    if work.ambiguous:
        return work.unknown(f"the retry failed: {last}")
    if isinstance(last, UnavailableError | ConcurrencyConflictError):
        error = last.copy()
        error.outcome_unknown = False
        return error
    return throttled(f"{work.change.key.collection} {work.change.key.id!r}")


def _reason(exc: Cancelled) -> StorageError:
    """Why a change with a mark was cancelled."""
    for each in exc.reasons:
        code = each.get("Code")
        if code and code != "None":
            return translate(code, each.get("Message") or "", 400, each)
    return UnavailableError("the transaction was cancelled without a reason")


def _waves(works: Sequence[WriteOp]) -> list[list[WriteOp]]:
    """The works in as few lists as there may be without a key twice in one."""
    waves: list[list[WriteOp]] = []
    seen: dict[tuple[str, str], int] = {}
    for work in works:
        place = (work.table, work.change.key.id)
        number = seen.get(place, 0)
        seen[place] = number + 1
        if number == len(waves):
            waves.append([])
        waves[number].append(work)
    return waves
