"""A state machine that changes declarations among its steps, with two programs on the data of one engine.

The programs declare the collections differently: fields, types, required fields, references, indexes, and
whole collections. Every answer of both is compared with that of the memory engine which has the same
entities and was opened with the same declaration (`ReferenceStore`). See `run_declaration_machine`.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Final, get_args

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hf_async_store.errors import ConcurrencyConflictError, SchemaMismatchError
from hf_async_store.schema import HOST_FACTORY, Collection, Field, Index
from hf_async_store.testing.hypothesis_strategies import UNDECLARED
from hf_async_store.testing.reference_store import ReferenceStore
from hf_async_store.testing.state_machine import (
    IDS,
    LONG,
    SHORT,
    Call,
    Script,
    calls_on,
    comparable,
    initial_calls,
    result_of,
    run_script,
    supported_steps,
)
from hf_async_store.values import FieldType

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.state_machine import Collections, MakeStores

_TYPES: Final[tuple[FieldType, ...]] = get_args(FieldType)
_VARIANTS: Final = 20
_ATTEMPTS: Final = 50
_PAUSE_SECONDS: Final = 0.1


def run_declaration_machine(
    make: MakeStores,
    *,
    long: bool = False,
    shared_references: bool = False,
    examples: int = 8,
) -> None:
    """Test an engine with many random runs, as `run_machine`.

    Args:
        examples: the number of runs, unless the test is a long one.
        shared_references: a reference that one program has recorded is enforced by all programs.

    Raises:
        AssertionError: a result differs from that of the memory engine.
    """

    class Machine(DeclarationMachine):
        make_stores = staticmethod(make)
        shares_references = shared_references

    profile = settings(LONG, max_examples=100) if long else settings(SHORT, max_examples=examples)
    run_state_machine_as_test(Machine, settings=profile)


# -- declarations ---------------------------------------------------------------------------


@cache
def _variants(name: str) -> tuple[Collection, ...]:
    """Declarations of a collection; the first is that of `HOST_FACTORY`."""
    [collection] = [each for each in HOST_FACTORY if each.name == name]
    others = [_variant(collection, Random(f"{name} {number}")) for number in range(1, _VARIANTS)]
    return (collection, *others)


def _variant(collection: Collection, random: Random) -> Collection:
    """The collection with a few fields declared differently."""
    fields = dict(collection.fields)
    for each in (collection.key, "created_at", "updated_at"):
        del fields[each]
    references = [each.name for each in collection.references]
    plain = [each for each in fields if each not in references]
    for name in (*random.sample(plain, 2), *UNDECLARED[:1]):
        fields.pop(name, None)
        if random.random() < 0.8:
            fields[name] = Field(name, random.choice(_TYPES), random.random() < 0.2)
    for name in references:
        if random.random() < 0.4:
            del fields[name]
        elif random.random() < 0.3:
            fields[name] = Field(name)
    indexable = {
        collection.key,
        "created_at",
        *(each.name for each in fields.values() if each.type != "json"),
    }
    candidates = [*collection.indexes, Index("extra"), Index("status", "extra"), Index("status")]
    indexes = [
        each for each in candidates if indexable.issuperset(each.fields) and random.random() < 0.7
    ]
    return Collection(collection.name, key=collection.key, fields=fields.values(), indexes=indexes)


def _consistent(collections: dict[str, Collection]) -> Collections:
    """Collections without references to those that are not declared."""
    return tuple(
        _without_references(each, collections)
        if any(field.references not in collections for field in each.references)
        else each
        for each in collections.values()
    )


def _without_references(collection: Collection, others: dict[str, Collection]) -> Collection:
    fields = [
        field if field.references is None or field.references in others else Field(field.name)
        for field in collection.fields.values()
        if field.name != collection.key
    ]
    return Collection(
        collection.name, key=collection.key, fields=fields, indexes=collection.indexes
    )


# -- the machine ----------------------------------------------------------------------------

_program: Final = st.sampled_from((0, 1))
_declaration: Final = st.tuples(
    st.sampled_from([each.name for each in HOST_FACTORY]), st.integers(-2, _VARIANTS - 1)
)
"""The name of a collection, and the number of its declaration; below 0: it is not declared."""


class Program:
    """A program with a declaration of its own.

    Attributes:
        chosen: the declared collections, before references to undeclared ones are removed.
    """

    def __init__(self, open_store: Callable[[Collections], StorageStrategy]) -> None:
        self._open = open_store
        self.chosen = {each.name: each for each in HOST_FACTORY}
        self.collections: Collections = HOST_FACTORY
        self.store = open_store(self.collections)

    def restarted(self) -> StorageStrategy:
        """The store of the program after its end, not opened yet."""
        self.collections = _consistent(self.chosen)
        self.store = self._open(self.collections)
        return self.store


class DeclarationMachine(RuleBasedStateMachine):
    """Two programs, and the reference with which both are compared."""

    make_stores: ClassVar[MakeStores]
    shares_references: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        with self._stack as stack:
            self._runner = stack.enter_context(asyncio.Runner(loop_factory=asyncio.new_event_loop))
            open_store = stack.enter_context(type(self).make_stores())
            self._programs = (Program(open_store), Program(open_store))
            self._capabilities = self._programs[0].store.capabilities
            self._reference = ReferenceStore(references=self._capabilities.references)
            for each in self._programs:
                self._runner.run(each.store.open())
            self._stack = stack.pop_all()

    def teardown(self) -> None:
        with self._stack:
            try:
                for each in self._programs:
                    self._compare_contents(each)
            finally:
                for each in self._programs:
                    self._runner.run(each.store.close())

    # -- rules -------------------------------------------------------------------------------

    @initialize()
    def entities(self) -> None:
        """See `initial_calls`."""
        for each in initial_calls():
            self._compare_call(self._programs[0], each)

    @rule(number=_program, data=st.data(), kind=st.sampled_from((0, 0, 0, 1, 1, 2, 3, 3, 3, 3)))
    def call(self, number: int, data: Any, kind: int) -> None:
        """One call by one of the programs, on collections that it declares."""
        program = self._programs[number]
        calls = calls_on(program.collections)
        by_kind = (calls.writes, calls.batches, calls.modifications, calls.queries)
        self._compare_call(program, data.draw(by_kind[kind]))

    @rule(number=_program, data=st.data())
    def read(self, number: int, data: Any) -> None:
        program = self._programs[number]
        self._compare_call(program, data.draw(calls_on(program.collections).reads))

    @rule(number=_program, data=st.data())
    def transaction(self, number: int, data: Any) -> None:
        program = self._programs[number]
        script = data.draw(calls_on(program.collections).scripts)
        fitting = supported_steps(script, self._capabilities)
        self._compare(program, fitting, lambda store: _run_script(store, fitting))

    @precondition(lambda self: self._capabilities.query_isolation == "snapshot")
    @rule(number=_program, data=st.data())
    def change_by_filter(self, number: int, data: Any) -> None:
        program = self._programs[number]
        self._compare_call(program, data.draw(calls_on(program.collections).changes_by_filter))

    @rule(number=_program, changes=st.lists(_declaration, min_size=1, max_size=3))
    def declare(self, number: int, changes: list[tuple[str, int]]) -> None:
        """A program ends, and another version of it starts."""
        program = self._programs[number]
        for name, variant in changes:
            if variant >= 0:
                program.chosen[name] = _variants(name)[variant]
            elif len(program.chosen) > 1:
                program.chosen.pop(name, None)
        self._restart(program)
        self._compare_contents(program)

    @rule(number=_program)
    def apply(self, number: int) -> None:
        """One program brings the store to its declaration; the other one goes on."""
        self._apply(self._programs[number], complete=False)

    @rule(number=_program)
    def complete(self, number: int) -> None:
        """As `apply`, after all older programs have ended."""
        for each in self._programs:
            self._restart(each)
        self._apply(self._programs[number], complete=True)

    # -- steps -------------------------------------------------------------------------------

    def _restart(self, program: Program) -> None:
        self._runner.run(program.store.close())
        self._runner.run(program.restarted().open())

    def _apply(self, program: Program, *, complete: bool) -> None:
        self._compare(program, "schema_changes", _listed)
        changes = self._runner.run(program.store.schema_changes())
        try:
            self._runner.run(program.store.apply_schema(complete=complete))
        except SchemaMismatchError:
            refused = {each.kind for each in changes} & {"required", "index"}
            assert refused, "nothing of the declaration contradicts the store"
        else:

            async def apply_to_reference() -> None:
                async with self._reference.opened(program.collections) as store:
                    await store.apply_schema()

            self._runner.run(apply_to_reference())
        for each in self._programs:
            self._compare_contents(each)

    # -- comparing ---------------------------------------------------------------------------

    def _compare_call(self, program: Program, call: Call) -> None:
        self._compare(program, call, lambda store: result_of(store, call), call.is_query)

    def _compare(
        self,
        program: Program,
        what: object,
        ask: Callable[[StorageStrategy], Coroutine[Any, Any, object]],
        may_be_stale: bool = False,
    ) -> None:
        async def asked() -> tuple[object, object]:
            recorded: list[Collection] = []
            if self.shares_references:
                recorded = await program.store.recorded_collections()
            async with self._reference.opened(program.collections, recorded) as reference:
                expected = comparable(await ask(reference))
            found = comparable(await ask(program.store))
            if may_be_stale and self._capabilities.query_isolation == "eventual":
                for _ in range(_ATTEMPTS):
                    if found == expected:
                        break
                    await asyncio.sleep(_PAUSE_SECONDS)
                    found = comparable(await ask(program.store))
            return found, expected

        found, expected = self._runner.run(asked())
        assert found == expected, (
            f"{what}\nreturned {found}\nexpected {expected}\nby {program.collections}"
        )

    def _compare_contents(self, program: Program) -> None:
        for collection in program.collections:
            name = collection.name
            self._compare_call(program, Call("query_entities", (name, None, collection.key), {}))
            self._compare_call(program, Call("get_entities", (name, IDS[name]), {}))


async def _run_script(store: StorageStrategy, script: Script) -> list[object]:
    """As `run_script`, again if the transaction failed because another program has changed the tables."""
    while True:
        found = await run_script(store.begin_transaction, script)
        if not any(_is_conflict(each) for each in found):
            return found


def _is_conflict(answer: object) -> bool:
    if isinstance(answer, list):
        return any(map(_is_conflict, answer))
    # A conflict of versions is of the class itself, and is an answer.
    return (
        isinstance(answer, type)
        and issubclass(answer, ConcurrencyConflictError)
        and answer is not ConcurrencyConflictError
    )


async def _listed(store: StorageStrategy) -> object:
    """The differences between the stored values and the declaration."""
    kinds = ("values", "form", "required")
    changes = [each for each in await store.schema_changes() if each.kind in kinds]
    return sorted((each.kind, each.collection, each.name, each.detail) for each in changes)
