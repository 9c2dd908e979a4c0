"""A state machine that runs the same operations on an engine and the memory engine.

    def test_my_engine_beside_memory(tmp_path_factory):
        @contextmanager
        def make() -> Iterator[Stores]:
            folder = tmp_path_factory.mktemp("data")
            yield lambda collections: MyStrategy(folder, collections=collections)

        run_machine(make)

Every result is compared. Values are drawn from the whole portable domain. Results are compared
including their types, and errors by their class. Of a timestamp that the store has set itself, only
its presence is compared, because the two stores read the clock at different times.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, TypeAlias, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hf_async_store.changes import ABSENT
from hf_async_store.errors import BatchError, StorageError
from hf_async_store.expiry import Expire
from hf_async_store.field_operations import add_to_set, append, increment, remove_from_set
from hf_async_store.lifetimes import Lifetimes
from hf_async_store.query import not_in
from hf_async_store.schema import HOST_FACTORY, Collection
from hf_async_store.strategies.memory import MemoryStorageStrategy
from hf_async_store.testing import hypothesis_strategies
from hf_async_store.testing.assertions import typed
from hf_async_store.testing.hypothesis_strategies import Places, chance, pick
from hf_async_store.values import (
    CREATED_AT,
    INT_MAX,
    MAX_ENTITY_BYTES,
    REMOVE,
    UPDATED_AT,
    normalise,
    parse_timestamp,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from hf_async_store.driver import Capabilities
    from hf_async_store.query import Path
    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.transaction import Transaction

Result = TypeVar("Result")

Collections: TypeAlias = "tuple[Collection, ...]"

Stores: TypeAlias = Callable[[Collections], "StorageStrategy"]
"""Returns a new store of these collections on the data of one run, not opened yet, at each call."""

MakeStores: TypeAlias = "Callable[[], AbstractContextManager[Stores]]"
"""Creates empty data for one run, and deletes it at the end."""


def run_machine(make: MakeStores, *, long: bool = False) -> None:
    """Test an engine with many random runs.

    Args:
        make: creates the engine's stores, on empty data for each run.
        long: thousands of steps, for occasional runs; otherwise some hundreds, for every test run.

    Raises:
        AssertionError: a result differs from that of the memory engine. Hypothesis prints the
            shortest failing run that it finds, and how to reproduce it.
    """

    class Machine(EngineMachine):
        make_stores = staticmethod(make)

    run_state_machine_as_test(Machine, settings=LONG if long else SHORT)


_COMMON: Final = settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SHORT: Final = settings(_COMMON, max_examples=10, stateful_step_count=25)
LONG: Final = settings(_COMMON, max_examples=200, stateful_step_count=60)

# -- operations -----------------------------------------------------------------------------


class Call(NamedTuple):
    """One verb with its arguments, for a store or a transaction."""

    verb: str
    args: tuple[Any, ...]
    more: dict[str, Any]

    @property
    def is_query(self) -> bool:
        return self.verb in ("query_entities", "stream", "walk", "count_entities", "count_by")

    @property
    def changes_what_a_query_finds(self) -> bool:
        return self.verb in ("update_where", "delete_where")


class Script(NamedTuple):
    """A transaction, or a savepoint in one: its steps, and how it ends."""

    steps: list[Call | Script]
    rolled_back: bool


class _RolledBackError(Exception):
    """Raised to roll a transaction back."""


async def _stream(repository: RepositoryInterface, *args: Any, **more: Any) -> object:
    async with aclosing(repository.stream_entities(*args, **more)) as rows:
        return [each async for each in rows]


async def _walk(
    repository: RepositoryInterface, collection: str, filters: Any, order: Any, limit: int
) -> object:
    """All pages of a query."""
    pages: list[object] = []
    cursor: str | None = None
    while not pages or cursor is not None:
        page = await repository.query_page(collection, filters, order, limit, cursor=cursor)
        pages.append(page.items)
        cursor = page.cursor
    return pages


async def _modify(
    repository: RepositoryInterface,
    collection: str,
    entity_id: str,
    fields: Mapping[str, Any],
    **more: Any,
) -> object:
    return await repository.modify_entity(
        collection, entity_id, lambda entity: {**entity, **fields}, retry_seconds=1, **more
    )


_MORE_VERBS: Final[Mapping[str, Callable[..., Coroutine[Any, Any, object]]]] = {
    "modify": _modify,
    "stream": _stream,
    "walk": _walk,
}


async def result_of(repository: RepositoryInterface, call: Call) -> object:
    """The result of a call, or the class of its error; for a failed batch, those of its changes."""
    try:
        if call.verb in _MORE_VERBS:
            return await _MORE_VERBS[call.verb](repository, *call.args, **call.more)
        return await getattr(repository, call.verb)(*call.args, **call.more)
    except BatchError as exc:
        return [type(each) if isinstance(each, StorageError) else each for each in exc.outcomes]
    except StorageError as exc:
        return type(exc)


async def run_script(begin: Callable[[], Transaction], script: Script) -> list[object]:
    """The results of the steps of a transaction, including those of its savepoints, and its end."""
    answers: list[object] = []
    try:
        async with begin() as tx:
            for step in script.steps:
                if isinstance(step, Script):
                    answers.append(await run_script(tx.begin_transaction, step))
                else:
                    answers.append(await result_of(tx, step))
            if script.rolled_back:
                raise _RolledBackError
    except _RolledBackError:
        answers.append("rolled back")
    except StorageError as exc:
        answers.append(type(exc))
    else:
        answers.append("committed")
    return answers


# -- permitted differences ------------------------------------------------------------------

_TIME: Final = re.compile(r"(\d{4})-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\Z")


def _is_clock(value: object) -> bool:
    """Whether the store has set this timestamp: `hypothesis_strategies.timestamps` are in the past."""
    found = _TIME.match(value) if isinstance(value, str) else None
    return found is not None and abs(int(found[1]) - datetime.now(UTC).year) <= 1


def comparable(answer: object) -> object:
    """The part of a result that must be equal on two engines."""
    if isinstance(answer, list | tuple):
        return [comparable(each) for each in answer]
    if isinstance(answer, dict) and "version" in answer:
        return {
            name: "the clock" if name.endswith("ed_at") and _is_clock(value) else typed(value)
            for name, value in answer.items()
        }
    return typed(answer)


# -- random operations ----------------------------------------------------------------------

IDS: Final[Mapping[str, Sequence[str]]] = {
    "templates": ("t", "T", "t ", "é"),
    "requests": ("r", "../r", "r%", "\U0001f600"),
    "machines": ("m", "m'\"", "e\u0301", "x" * 1024),
}
"""Few ids, so that operations use the same ones; chosen to be difficult as file names, in patterns and
for collations."""

_BAD_IDS: Final = ("", "a\0", "x" * 1025)
_STRANGE_VERSIONS: Final = (None, -1, True, "", 1.0)
_LARGE_STRINGS: Final = tuple("x" * (MAX_ENTITY_BYTES // part) for part in (1, 2, 3))
_INVALID_OR_LARGE: Final = (
    *hypothesis_strategies.STRANGERS,
    hypothesis_strategies.DEEPEST,
    *_LARGE_STRINGS,
)

_VERSIONS: Final = (1, 1, 2, 2, 3, 4, 0, INT_MAX)
_RARE: Final = 20


def _draw_id(draw: st.DrawFn, collection: Collection) -> str:
    return pick(draw, _BAD_IDS if chance(draw, _RARE) else IDS[collection.name])


def _draw_ids(draw: st.DrawFn, collection: Collection) -> list[str]:
    return [pick(draw, IDS[collection.name]) for _ in range(draw(_up_to_4))]


def _draw_fields(draw: st.DrawFn, collection: Collection, *, whole: bool) -> dict[str, Any]:
    """Fields of an entity; occasionally with an invalid or very large value."""
    fields = hypothesis_strategies.draw_fields(draw, collection, IDS, whole=whole)
    if chance(draw, _RARE):
        name = draw(
            st.sampled_from((*collection.fields, *hypothesis_strategies.UNDECLARED, "version"))
        )
        fields[name] = (
            pick(draw, _INVALID_OR_LARGE) if chance(draw, 2) else draw(hypothesis_strategies.values)
        )
    return fields


def _draw_entity(draw: st.DrawFn, collection: Collection) -> dict[str, Any]:
    entity_id = _draw_id(draw, collection)
    return {**_draw_fields(draw, collection, whole=True), collection.key: entity_id}


_OPERATIONS: Final = (
    *(increment(), increment(-5), increment(INT_MAX), append("x"), append([1.0])),
    *(add_to_set(1), add_to_set(None), remove_from_set(1.0), remove_from_set("x"), REMOVE),
)


def _draw_update(draw: st.DrawFn, collection: Collection) -> dict[Any, Any]:
    """Named fields, some of them to be removed, or to be computed from the stored value."""
    fields: dict[Any, Any] = _draw_fields(draw, collection, whole=False)
    if chance(draw, 3):
        name = pick(draw, (*collection.fields, *hypothesis_strategies.UNDECLARED[:2]))
        fields[name] = pick(draw, (*_OPERATIONS, REMOVE, REMOVE))
    if chance(draw, 4):
        fields[pick(draw, _PATHS_IN_EXTRA)] = pick(draw, (*_OPERATIONS, 1))
    return fields


def _draw_flag(draw: st.DrawFn, name: str) -> dict[str, Any]:
    return {name: True} if chance(draw, 3) else {}


def _draw_expected(draw: st.DrawFn, *, absent: bool) -> dict[str, Any]:
    """The argument `expected_version`, or often none."""
    if chance(draw, 2):
        return {}
    if chance(draw, _RARE):
        return {"expected_version": pick(draw, _STRANGE_VERSIONS)}
    return {"expected_version": ABSENT if absent and chance(draw, 2) else pick(draw, _VERSIONS)}


def _draw_expected_by_id(draw: st.DrawFn, ids: Iterable[str], *, absent: bool) -> Any:
    expected = {each: _draw_expected(draw, absent=absent) for each in dict.fromkeys(ids)}
    return {each: some["expected_version"] for each, some in expected.items() if some} or None


@st.composite
def _writes(draw: st.DrawFn, collections: Collections) -> Call:
    """One change of one entity."""
    collection = pick(draw, collections)
    name = collection.name
    verb = pick(draw, ("create", "save", "update", "delete", "save", "update"))
    if verb == "create":
        return Call("create_entity", (name, _draw_entity(draw, collection)), {})
    more = _draw_expected(draw, absent=verb == "save")
    if verb == "save":
        return Call("save_entity", (name, _draw_entity(draw, collection)), more)
    entity_id = _draw_id(draw, collection)
    if verb == "delete":
        return Call("delete_entity", (name, entity_id), more)
    more |= _draw_flag(draw, "returning")
    return Call("update_entity", (name, entity_id, _draw_update(draw, collection)), more)


@st.composite
def _batches(draw: st.DrawFn, collections: Collections) -> Call:
    """A batch; ids may repeat."""
    collection = pick(draw, collections)
    name = collection.name
    verb = pick(draw, ("create", "save", "update", "delete", "import"))
    if verb in ("update", "delete"):
        ids = _draw_ids(draw, collection)
        expected = _draw_expected_by_id(draw, ids, absent=False)
        if verb == "delete":
            return Call("delete_entities", (name, ids, expected), {})
        updates = {each: _draw_update(draw, collection) for each in ids}
        flag = _draw_flag(draw, "returning")
        return Call("update_entities", (name, updates, expected), flag)
    entities = [_draw_entity(draw, collection) for _ in range(draw(_up_to_4))]
    if verb == "create":
        return Call("create_entities", (name, entities), _draw_flag(draw, "if_absent"))
    if verb == "save":
        ids = [each[collection.key] for each in entities]
        expected = _draw_expected_by_id(draw, ids, absent=True)
        return Call("save_entities", (name, entities, expected), {})
    for each in entities:
        if not chance(draw, 4):
            each["version"] = pick(draw, _VERSIONS)
    return Call("import_entities", (name, entities), {})


@st.composite
def _modifications(draw: st.DrawFn, collections: Collections) -> Call:
    """`modify_entity` with a change that sets some fields."""
    collection = pick(draw, collections)
    fields = _draw_fields(draw, collection, whole=False)
    more = _draw_flag(draw, "returning")
    if chance(draw, 2):
        more["default"] = _draw_fields(draw, collection, whole=True)
    return Call("modify", (collection.name, _draw_id(draw, collection), fields), more)


@st.composite
def _conditional_updates(draw: st.DrawFn, collections: Collections) -> Call:
    collection = pick(draw, collections)
    fields = _draw_update(draw, collection)
    return Call("conditional_update", (collection.name, _draw_id(draw, collection), fields), {})


@st.composite
def _reads(draw: st.DrawFn, collections: Collections) -> Call:
    collection = pick(draw, collections)
    if chance(draw, 2):
        return Call("get_entity", (collection.name, _draw_id(draw, collection)), {})
    return Call("get_entities", (collection.name, _draw_ids(draw, collection)), {})


@st.composite
def _queries(draw: st.DrawFn, collections: Collections) -> Call:
    """A query; always with an order, because without one the order may differ between engines."""
    collection = pick(draw, collections)
    name = collection.name
    places: Places = (*collection.fields, *hypothesis_strategies.UNDECLARED[:3], *_PATHS_IN_EXTRA)
    filters = (
        None if chance(draw, 4) else hypothesis_strategies.draw_filters(draw, places, _operands_at)
    )
    verb = pick(draw, ("query_entities", "stream", "walk", "count_entities", "count_by"))
    if verb == "count_entities":
        return Call(verb, (name, filters), {})
    if verb == "count_by":
        # The clocks of two stores differ.
        grouped = [each for each in places if each not in (CREATED_AT, UPDATED_AT)]
        return Call(verb, (name, draw(st.sampled_from(grouped)), filters), {})
    order = [*hypothesis_strategies.draw_order(draw, places), collection.key]
    if verb == "walk":
        return Call(verb, (name, filters, order, 1 + draw(_up_to_4)), {})
    limit = None if chance(draw, 2) else draw(_up_to_4)
    fields = None if chance(draw, 2) else [pick(draw, tuple(collection.fields))]
    more = {"offset": draw(_up_to_4)} if verb == "query_entities" else {}
    return Call(verb, (name, filters, order, limit), {"fields": fields, **more})


@st.composite
def _changes_by_filter(draw: st.DrawFn, collections: Collections) -> Call:
    collection = pick(draw, collections)
    places: Places = (*collection.fields, *_PATHS_IN_EXTRA)
    filters = hypothesis_strategies.draw_filters(draw, places, _operands_at)
    more = {"order_by": collection.key, "limit": draw(_up_to_4)}
    if chance(draw, 3):
        more |= _draw_flag(draw, "returning")
        return Call("delete_where", (collection.name, filters), more)
    return Call("update_where", (collection.name, filters, _draw_update(draw, collection)), more)


_up_to_4: Final = st.integers(0, 4)
_PATHS_IN_EXTRA: Final = tuple(hypothesis_strategies.paths_in("extra"))
_id_operands: Final = st.sampled_from([each for ids in IDS.values() for each in ids])
_operands: Final = st.one_of(
    hypothesis_strategies.pooled, hypothesis_strategies.timestamps, hypothesis_strategies.values
)


def _operands_at(place: str | Path) -> st.SearchStrategy[Any]:
    """Operands for a field or path: mostly values that it may contain."""
    if not isinstance(place, str):
        return hypothesis_strategies.pooled
    return _id_operands if place.endswith("_id") else _operands


@st.composite
def _scripts(draw: st.DrawFn, collections: Collections) -> Script:
    """A transaction with nested savepoints."""
    return _draw_script(draw, calls_on(collections).in_transaction, 0)


def _draw_script(draw: st.DrawFn, calls: Sequence[st.SearchStrategy[Call]], depth: int) -> Script:
    steps: list[Call | Script] = []
    for _ in range(draw(_up_to_4)):
        if depth < 2 and chance(draw, 4):
            steps.append(_draw_script(draw, calls, depth + 1))
        else:
            steps.append(draw(pick(draw, calls)))
    return Script(steps, chance(draw, 4))


class Calls(NamedTuple):
    """Hypothesis strategies of the calls on some collections."""

    writes: st.SearchStrategy[Call]
    batches: st.SearchStrategy[Call]
    reads: st.SearchStrategy[Call]
    queries: st.SearchStrategy[Call]
    modifications: st.SearchStrategy[Call]
    changes_by_filter: st.SearchStrategy[Call]
    conditional_updates: st.SearchStrategy[Call]
    scripts: st.SearchStrategy[Script]

    @property
    def in_transaction(self) -> Sequence[st.SearchStrategy[Call]]:
        return (
            *(self.writes, self.writes, self.writes, self.batches, self.reads, self.queries),
            *(self.modifications, self.conditional_updates, self.changes_by_filter),
        )


@cache
def calls_on(collections: Collections) -> Calls:
    """The strategies of the calls on at most 20 collections."""
    return Calls(
        *(_writes(collections), _batches(collections), _reads(collections)),
        *(_queries(collections), _modifications(collections), _changes_by_filter(collections)),
        *(_conditional_updates(collections), _scripts(collections)),
    )


def supported_steps(script: Script, capabilities: Capabilities) -> Script:
    """The steps of a script for which the engine declares the same behaviour as the memory engine."""
    steps: list[Call | Script] = []
    for step in script.steps:
        if isinstance(step, Script):
            if capabilities.savepoints:
                steps.append(supported_steps(step, capabilities))
        elif step.changes_what_a_query_finds:
            if capabilities.queries_in_transaction == "serializable":
                steps.append(step)
        elif not step.is_query or capabilities.queries_in_transaction != "outside":
            steps.append(step)
    return Script(steps, script.rolled_back)


_CALLS: Final = calls_on(HOST_FACTORY)
# -- time -----------------------------------------------------------------------------------

_EXPIRY: Final = {
    "requests": Expire(
        "completed_at", after=timedelta(days=1), where={"status": not_in(["", "a"])}
    ),
    "machines": Expire("terminated_at"),
}
_EXPIRING: Final = tuple(
    Collection(
        each.name,
        key=each.key,
        fields=[field for field in each.fields.values() if field.name != each.key],
        indexes=each.indexes,
        expires=_EXPIRY.get(each.name),
    )
    for each in HOST_FACTORY
)
"""`HOST_FACTORY`, of which requests and machines expire."""


def initial_calls() -> Iterator[Call]:
    """Creates entities, so that references have parents, and updates have targets."""
    for collection in HOST_FACTORY:
        parents = {each.name: IDS[each.parent][0] for each in collection.references}
        entities = [{collection.key: each, **parents} for each in IDS[collection.name][:2]]
        yield Call("create_entities", (collection.name, entities), {})


class _Time:
    """A clock that begins before all timestamps of the operations."""

    def __init__(self) -> None:
        self.now = datetime.min.replace(tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def set(self, store: StorageStrategy) -> StorageStrategy:
        """Let a store use this clock, and its entities expire."""
        store._set_clock(self, None)
        references = store.capabilities.references
        store._lifetimes = Lifetimes(_EXPIRING, store._clock, references=references)
        return store


# -- the machine ----------------------------------------------------------------------------

_ATTEMPTS: Final = 50
_PAUSE_SECONDS: Final = 0.1


class EngineMachine(RuleBasedStateMachine):
    """Runs the same operations on an engine and on the memory engine.

    Each run has its own event loop, because a store belongs to one and Hypothesis provides none.
    """

    make_stores: ClassVar[MakeStores]

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        with self._stack as stack:
            self._runner = stack.enter_context(asyncio.Runner(loop_factory=asyncio.new_event_loop))
            self._stores = stack.enter_context(type(self).make_stores())
            self._time = _Time()
            self._engine = self._time.set(self._stores(HOST_FACTORY))
            self._capabilities = self._engine.capabilities
            self._memory = MemoryStorageStrategy(
                {
                    "strategy": "memory",
                    "memory_strategy": {"enforce_references": self._capabilities.references},
                },
                collections=HOST_FACTORY,
            )
            self._time.set(self._memory)
            self._runner.run(self._engine.open())
            self._runner.run(self._memory.open())
            self._stack = stack.pop_all()

    def teardown(self) -> None:
        with self._stack:
            try:
                self._compare_contents()
            finally:
                self._runner.run(self._engine.close())
                self._runner.run(self._memory.close())

    # -- rules -------------------------------------------------------------------------------

    @initialize()
    def entities(self) -> None:
        """See `initial_calls`."""
        for each in initial_calls():
            self._compare_call(each)

    @rule(call=_CALLS.writes)
    def write(self, call: Call) -> None:
        self._compare_call(call)

    @rule(call=_CALLS.batches)
    def write_many(self, call: Call) -> None:
        self._compare_call(call)

    @rule(call=_CALLS.reads)
    def read(self, call: Call) -> None:
        self._compare_call(call)

    @rule(call=_CALLS.queries)
    def query(self, call: Call) -> None:
        self._compare_call(call)

    @rule(script=_CALLS.scripts)
    def transaction(self, script: Script) -> None:
        fitting = supported_steps(script, self._capabilities)
        self._compare(fitting, lambda store: run_script(store.begin_transaction, fitting))

    @rule(call=_CALLS.modifications)
    def modify(self, call: Call) -> None:
        self._compare_call(call)

    @precondition(lambda self: self._capabilities.query_isolation == "snapshot")
    @rule(call=_CALLS.changes_by_filter)
    def change_by_filter(self, call: Call) -> None:
        self._compare_call(call)

    @rule(at=hypothesis_strategies.timestamps)
    def time_passes(self, at: str | datetime) -> None:
        """Entities expire at exactly this time."""
        moment = parse_timestamp(str(normalise(at)))
        assert moment is not None
        self._time.now = max(self._time.now, datetime.fromisoformat(moment))
        self._compare_contents()

    @rule()
    def purge(self) -> None:
        """The removal of expired entities does not change what is found."""
        self._compare_call(Call("purge_expired", (), {}))
        self._compare_contents()

    @precondition(lambda self: self._capabilities.durable)
    @rule()
    def reopen(self) -> None:
        """Acknowledged changes are found by the next store that is opened on the data."""
        self._runner.run(self._engine.close())
        self._engine = self._time.set(self._stores(HOST_FACTORY))
        self._runner.run(self._engine.open())
        self._compare_contents()

    @precondition(lambda self: hasattr(self._engine, "checkpoint"))
    @rule()
    def checkpoint(self) -> None:
        """A checkpoint does not change the stored data."""
        self._runner.run(self._engine.checkpoint())  # type: ignore[attr-defined]

    # -- comparing ---------------------------------------------------------------------------

    def _compare_call(self, call: Call) -> None:
        self._compare(call, lambda store: result_of(store, call), may_be_stale=call.is_query)

    def _compare(
        self,
        what: object,
        ask: Callable[[StorageStrategy], Coroutine[Any, Any, object]],
        *,
        may_be_stale: bool = False,
    ) -> None:
        expected = comparable(self._runner.run(ask(self._memory)))
        found = comparable(self._runner.run(ask(self._engine)))
        if may_be_stale and self._capabilities.query_isolation == "eventual":
            for _ in range(_ATTEMPTS):
                if found == expected:
                    break
                self._runner.run(asyncio.sleep(_PAUSE_SECONDS))
                found = comparable(self._runner.run(ask(self._engine)))
        assert found == expected, f"{what}\nreturned {found}\nexpected {expected}"

    def _compare_contents(self) -> None:
        for collection in HOST_FACTORY:
            self._compare_call(Call("query_entities", (collection.name, None, collection.key), {}))
            self._compare_call(Call("get_entities", (collection.name, IDS[collection.name]), {}))
