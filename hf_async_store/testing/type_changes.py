"""Case 94: the type of a field changes, for each ordered pair of types, before, during and after.

An old and a new program use one store, whose field `value` they declare with two types. Tables of calls
by every verb are run by both; every answer is that of the memory engine with the same entities and the
same declaration (`ReferenceStore`).
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store.errors import SchemaMismatchError
from hf_async_store.field_operations import add_to_set, append, increment, remove_from_set
from hf_async_store.query import desc, gte, lt, path
from hf_async_store.testing.changed_declarations import (
    TYPES,
    VALUES,
    declared,
    opened,
    questions,
    require_shared,
    things,
)
from hf_async_store.testing.concurrency import answer_of
from hf_async_store.testing.random_choices import FULL_VARIABLE
from hf_async_store.testing.reference_store import ReferenceStore
from hf_async_store.testing.state_machine import (
    Call,
    Script,
    comparable,
    result_of,
    run_script,
    supported_steps,
)
from hf_async_store.values import REMOVE, FieldType

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from hf_async_store.driver import Capabilities
    from hf_async_store.schema import Collection
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness

PAIRS: Final = list(permutations(TYPES, 2))
_IDS: Final = [f"t{number:02}" for number in range(100)]
_AT_ONCE: Final = 8
_STRIDE: Final = 11
"""Of this many questions, a program is asked one in each step of a pair, unless the run is full; of
three times as many, where an answer may have to be asked for repeatedly."""


def _call(verb: str, *args: object, **more: object) -> Call:
    return Call(verb, ("things", *args), more)


def _questions(kind: FieldType, operands: tuple[object, ...]) -> list[Call]:
    """Queries with every operator, order and verb, about `value` as a path, and by its name."""
    asked: list[tuple[Any, list[Any]]] = list(questions(operands))
    value = VALUES[kind][0]
    asked += [({"value": value}, ["value"]), ({"value": gte(value)}, ["-value", "label"])]
    asked += [({"value": [lt(value), None]}, []), ({"label": "x"}, ["value"])]
    calls: list[Call] = []
    for number, (filters, order) in enumerate(asked):
        whole = [*order, "thing_id"]
        calls += [
            _call("query_entities", filters, whole),
            _call("count_entities", filters),
            _call("walk", filters, whole, 3 + number % 3),
            _call("stream", filters, whole, number % 5 or None),
            _call("query_entities", filters, whole, 3, offset=number % 3, fields=["value"]),
        ]
    for field in ("value", path("value"), path("value", "a")):
        for filters in (None, {"label": "x"}, {path("value"): gte(operands[0])}):
            verbs = ("count_by", "min_of", "max_of", "sum_of")
            calls += [_call(verb, field, filters) for verb in verbs]
    return [*calls, _call("get_entities", _IDS), _call("get_entity", "t01")]


_OPERATIONS: Final = (
    *(increment(), increment(-5), append("x"), append([1.0]), add_to_set(1), add_to_set(None)),
    *(remove_from_set(7), REMOVE, None),
)


def _writes(kind: FieldType, other: FieldType, tag: str) -> list[Call]:
    """Every verb that writes, with values of the type of a program, and of the other one."""
    value, more = VALUES[kind][:2]
    foreign = VALUES[other][0]
    new = [{"thing_id": f"{tag}{n}", "label": "x", "value": value} for n in range(4)]
    strange = {"thing_id": f"{tag}5", "label": "y", "value": foreign}
    calls = [
        *(_call("create_entity", each) for each in (new[0], new[0], strange)),
        _call("create_entities", [new[0], new[1]], if_absent=True),
        _call("create_entities", [new[1], new[2], strange]),
        *(_call("save_entity", each) for each in (new[3], strange, {**new[3], "more": more})),
        _call("save_entities", [{**new[0], "value": None}, strange, {**new[1], "value": more}]),
        _call("import_entities", [{**new[2], "version": 7}, {**strange, "version": 3}]),
        _call("update_entity", "t00", {"value": value}, returning=True),
        _call("update_entity", "t01", {"value": foreign}, expected_version=1),
        _call("update_entity", "t02", {"label": "y"}),
        _call("update_entity", "t03", {path("value", "a"): 1}, returning=True),
        _call("update_entities", {"t03": {"label": "x"}, "t98": {"value": more}, "t99": {}}),
        _call("update_entities", {"t00": {"value": foreign}, "t02": {"more": value}}),
        _call("modify", "t03", {"more": value}),
        _call("modify", f"{tag}9", {"value": more}, default={"label": "x"}),
        _call("delete_entity", f"{tag}0"),
        _call("delete_entities", [f"{tag}1", f"{tag}1", "none"]),
    ]
    for number, operation in enumerate(_OPERATIONS):
        calls.append(_call("update_entity", f"t{number % 4:02}", {"value": operation}))
    calls.append(_call("update_entity", "t00", {"value": value}))
    return calls


def _changes_by_filter(kind: FieldType, other: FieldType) -> list[Call]:
    some = {path("value"): gte(VALUES[other][0])}
    return [
        _call("update_where", some, {"more": VALUES[kind][0]}, order_by="thing_id", limit=3),
        _call("update_where", {"label": "y"}, {"value": VALUES[kind][1]}, order_by=desc("label")),
        _call("delete_where", {path("value"): VALUES[kind][1]}, order_by="thing_id", limit=1),
    ]


def _transactions(kind: FieldType, other: FieldType, capabilities: Capabilities) -> list[Script]:
    value = VALUES[kind][1]
    ask = _call("query_entities", {path("value"): value}, ["-value", "thing_id"])
    steps: list[Call | Script] = [
        _call("get_entity", "t01"),
        _call("update_entity", "t01", {"value": value}),
        _call("conditional_update", "t99", {"value": value}),
        _call("save_entity", {"thing_id": "tx", "label": "x", "value": value}),
        Script([_call("delete_entity", "t02"), ask], rolled_back=True),
        *(ask, _call("count_entities", {path("value"): VALUES[other][1]}), ask),
    ]
    refused = [_call("update_entity", "t02", {"value": VALUES[other][0]})]
    scripts = [Script(steps, False), Script([ask, *steps[1:3]], True), Script([*refused], False)]
    return [supported_steps(each, capabilities) for each in scripts]


class _Program:
    """A program, and the reference that it is compared with.

    Args:
        kinds: the type of `value` that it declares, and that of the other program.
    """

    def __init__(
        self, store: StorageStrategy, reference: ReferenceStore, kinds: tuple[FieldType, FieldType]
    ) -> None:
        self._store = store
        self._reference = reference
        self._kinds = kinds
        self._collections: tuple[Collection, ...] = (declared(kinds[0]),)

    async def answers(self, start: int) -> None:
        """Compare the answers to the questions, from one of them on."""
        kind, other = self._kinds
        asked = _questions(kind, (VALUES[kind][1], VALUES[other][0], 7))
        if not os.environ.get(FULL_VARIABLE):
            is_eventual = self._store.capabilities.query_isolation == "eventual"
            stride = _STRIDE * 3 if is_eventual else _STRIDE
            asked = asked[start % stride :: stride]
        async with self._reference.opened(self._collections) as reference:
            wanted = [comparable(await result_of(reference, each)) for each in asked]

        async def found(call: Call, expected: object) -> object:
            async def ask() -> object:
                return comparable(await result_of(self._store, call))

            return await answer_of(self._store.capabilities, ask, expected)

        for begin in range(0, len(asked), _AT_ONCE):
            part = slice(begin, begin + _AT_ONCE)
            pairs = zip(asked[part], wanted[part], strict=True)
            got = await asyncio.gather(*(found(*each) for each in pairs))
            for call, expected, answer in zip(asked[part], wanted[part], got, strict=True):
                assert answer == expected, f"{call} of a program that declares {kind}"

    async def writes(self, tag: str) -> None:
        """Compare the results of all writes, and the entities afterwards."""
        capabilities = self._store.capabilities
        calls = _writes(*self._kinds, tag)
        if capabilities.query_isolation == "snapshot":
            calls += _changes_by_filter(*self._kinds)
        for call in calls:
            await self._same(call, partial(_result_of, call))
        for script in _transactions(*self._kinds, capabilities):
            await self._same(script, partial(_run, script))
        read = _call("get_entities", [*_IDS, "tx", *(f"{tag}{n}" for n in range(10))])
        await self._same(read, partial(_result_of, read))

    async def apply_schema(self, *, complete: bool = False) -> None:
        """Apply the declaration to both, unless the engine demands that an index is deleted before."""
        try:
            await self._store.apply_schema(complete=complete)
        except SchemaMismatchError as exc:
            assert "delete it" in str(exc)
            return
        async with self._reference.opened(self._collections) as reference:
            await reference.apply_schema()

    async def plant(self, entities: Sequence[dict[str, object]]) -> None:
        save = _call("save_entities", entities)
        await self._same(save, partial(_result_of, save))

    async def _same(
        self, what: object, ask: Callable[[StorageStrategy], Coroutine[Any, Any, object]]
    ) -> None:
        async with self._reference.opened(self._collections) as reference:
            expected = comparable(await ask(reference))
        found = comparable(await ask(self._store))
        assert found == expected, f"{what} by a program that declares {self._kinds[0]}"


async def _result_of(call: Call, store: StorageStrategy) -> object:
    return await result_of(store, call)


async def _run(script: Script, store: StorageStrategy) -> object:
    return await run_script(store.begin_transaction, script)


class TypeChangeContract:
    """Case 94."""

    @pytest.mark.parametrize(("before", "after"), PAIRS)
    async def test_94_a_type_changes_while_old_and_new_programs_use_the_store(
        self, harness: Harness, before: FieldType, after: FieldType
    ) -> None:
        require_shared(harness)
        number = PAIRS.index((before, after))
        reference = ReferenceStore(references=harness.capabilities.references)
        async with opened(harness, before) as store:
            old = _Program(store, reference, (before, after))
            await old.plant(things(VALUES[before]))
            await old.answers(number)
            async with opened(harness, after) as other:
                new = _Program(other, reference, (after, before))
                for step, program in enumerate((new, old)):
                    await program.answers(number + step + 1)
                    await program.writes("no"[step])
                await new.answers(number + 3)
                await new.apply_schema()
                for step, program in enumerate((old, new)):
                    await program.writes("pq"[step])
                    await program.answers(number + step + 4)
        async with opened(harness, after) as store:
            new = _Program(store, reference, (after, before))
            await new.apply_schema(complete=True)
            await new.writes("z")
            await new.answers(number + 6)
