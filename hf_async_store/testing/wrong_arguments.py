"""Case 127: names that are not declared, operands that a field cannot hold, arguments of the wrong kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from hf_async_store.errors import InvalidQueryError, StorageError
from hf_async_store.query import (
    Op,
    and_,
    asc,
    begins_with,
    between,
    contains,
    desc,
    eq,
    gt,
    gte,
    in_,
    lt,
    lte,
    ne,
    not_,
    not_in,
    or_,
    path,
)
from hf_async_store.schema import Collection, Field

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from hf_async_store.query import Filters, OrderBy
    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness

# -- wrong kinds of arguments ---------------------------------------------------------------

KINDS: Final[Mapping[str, object]] = {
    "none": None,
    "boolean": True,
    "integer": 7,
    "float": 1.5,
    "nan": float("nan"),
    "text": "x",
    "bytes": b"x",
    "list": ["x"],
    "list of integers": [7],
    "empty dict": {},
    "dict": {"x": 1},
    "set": {"x"},
    "object": object(),
    "function": lambda *given, **named: None,
}
"""A value of each kind that is passed as each argument."""

_DICTS: Final = ("empty dict", "dict")
_LISTS: Final = ("list", "set")
_SECONDS: Final = ("integer", "float")

ACCEPTED: Final[Mapping[str, tuple[str, ...]]] = {
    "collection": (),
    "entity_id": ("text",),
    "entity": (),
    "entities": (),
    "updates": ("empty dict",),
    "ids": _LISTS,
    "expected_version": ("integer",),
    "expected_versions": ("none", "empty dict"),
    "change": (),
    "filters": ("none", *_DICTS),
    "order_by": ("none", "text", "list"),
    "limit": ("none", "integer"),
    "cursor": ("none",),
    "timeout": ("none", *_SECONDS),
    "retry_seconds": _SECONDS,
    "isolation": ("none",),
    "read_only": ("boolean",),
    "changes": _DICTS,
    "default": ("none", "empty dict", "dict"),
    "field": ("text",),
    "offset": ("integer",),
    "returning": ("boolean",),
    "if_absent": ("boolean",),
    "progress": ("none", "function"),
    "complete": ("boolean",),
    "transform": ("none", "empty dict"),
    "work": (),
    "model": (),
    "other": (),
    "data": ("empty dict",),
    "recover_from": ("none",),
    "sql": (),
    "params": (*_DICTS, "list", "list of integers"),
    "index_name": (),
    "key_condition": (),
    "expression_values": (),
    "descending": ("boolean",),
    "condition_expression": ("none",),
    "update_entity.expression_values": ("none",),
    "update_entity.fields": _DICTS,
    "conditional_update.fields": _DICTS,
    "fields": ("none", *_LISTS),
    "query_page.limit": ("integer",),
    "claim_entities.limit": ("integer",),
    "lease": _SECONDS,
    "owner": ("none", "text"),
    "wait": ("none", *_SECONDS),
    "max_attempts": ("none", "integer"),
    "name": ("text",),
    "permits.limit": ("integer",),
    "purge_expired.collection": ("none",),
    "clear.collection": ("none",),
    "expired": ("boolean",),
    "since": ("none",),
    "subscribe.collection": (),
}
"""The kinds that a parameter accepts, by its name or `METHOD.NAME`. All others must be refused."""

_VALID: Final[Mapping[str, object]] = {
    "collection": "items",
    "entity_id": "a",
    "entity": {"item_id": "a"},
    "entities": [{"item_id": "a"}],
    "updates": {"a": {"label": "x"}},
    "ids": ["a"],
    "change": lambda entity: entity,
    "changes": {"label": "x"},
    "field": "label",
    "filters": {"label": "x"},
    "update_entity.fields": {"label": "x"},
    "conditional_update.fields": {"label": "x"},
    "model": dict,
    "claim_entities.collection": "counters",
    "timeout": 0.01,
    "name": "x",
    "permits.limit": 3,
    "sql": "SELECT 1",
    "data": {},
    "index_name": "label-index",
    "key_condition": "label = :label",
    "expression_values": {":label": "x"},
}
"""Arguments for the required parameters that are not tested at the moment."""

_NOT_CALLED: Final = ("open", "close", "abandon")


def public_methods(kind: type) -> list[str]:
    """The names of the methods that have parameters."""
    return [
        name
        for name, each in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
        and name not in _NOT_CALLED
        and len(inspect.signature(each).parameters) > 1
    ]


def wrong_calls(
    function: Callable[..., object],
    accepted: Mapping[str, tuple[str, ...]],
    valid: Mapping[str, object],
) -> Iterator[tuple[str, dict[str, object], bool]]:
    """For each parameter and kind: what is passed, the arguments, and whether it must be refused."""
    name = getattr(function, "__name__", "")
    parameters = inspect.signature(function).parameters

    def of(table: Mapping[str, Any], parameter: str) -> Any:
        return table[full] if (full := f"{name}.{parameter}") in table else table[parameter]

    required = {
        each: of(valid, each)
        for each, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    for parameter in parameters:
        allowed = of(accepted, parameter)
        for kind, value in KINDS.items():
            described = f"{name}({parameter}={kind})"
            yield described, {**required, parameter: value}, kind not in allowed


async def completed(result: object) -> object:
    """The result of a call: awaited, iterated once, or entered and left."""
    if inspect.isawaitable(result):
        return await result
    if inspect.isasyncgen(result):
        async with aclosing(result):
            return await anext(result, None)
    if hasattr(result, "__aenter__"):
        async with cast("Any", result) as entered:
            return entered
    return result


async def check_call(described: str, call: Callable[[], object], *, refused: bool) -> None:
    """Assert that a call with a wrong argument ends in an error of this package, and no other."""
    try:
        await completed(call())
    except StorageError as exc:
        assert str(exc), described
    except Exception as exc:  # noqa: BLE001  # any other is the fault that is looked for
        pytest.fail(f"{described} ended in {type(exc).__name__}: {exc}")
    else:
        assert not refused, f"{described} was accepted"


# -- names and operands ---------------------------------------------------------------------

JOBS: Final = Collection(
    "jobs",
    key="job_id",
    fields=[
        "status",
        Field("size", "integer"),
        Field("ratio", "number"),
        Field("done", "boolean"),
        Field("due_at", "timestamp"),
        Field("tags", "json"),
    ],
)

_NOON: Final = "2026-01-01T12:00:00.000000Z"

UNDECLARED: Final[Mapping[str, tuple[str, str]]] = {
    "misspelt": ("statsu", "the nearest are: status"),
    "no field is near": ("xyz", "path('xyz')"),
    "an operator in the name": ("status__ne", 'write {"status": ne(value)}'),
    "a sign in the name": ("status !=", 'write {"status": ne(value)}'),
    "of a dict by a dot": ("tags.owner", "path('tags', 'owner')"),
    "of a list by underlines": ("tags__0", "path('tags', 0)"),
    "an operator of other systems": ("$or", "or_(...)"),
}
"""Names in filters that are refused, and what the message says."""

UNORDERED: Final[Mapping[str, tuple[object, str]]] = {
    "misspelt": ("creatd_at", "the nearest are: created_at"),
    "with a direction": ("created_at desc", 'write desc("created_at") or "-created_at"'),
    "ascending": ("due_at ASC", 'write "due_at"'),
    "a pair": (("due_at", "desc"), 'desc("name") or "-name"'),
    "pairs": ([("due_at", "desc")], 'desc("name") or "-name"'),
    "several in a text": ("status, -due_at", 'write ["status", "-due_at"]'),
    "by asc": (asc("creatd_at"), "created_at"),
    "by desc": (desc("creatd_at"), "created_at"),
    "in a list": (["status", "-creatd_at"], "created_at"),
}

UNFIT: Final[Mapping[str, tuple[dict[str, object], str]]] = {
    "a list for a text": ({"status": ["a", "b"]}, "in_([...])"),
    "a set for a text": ({"status": {"a"}}, "in_([...])"),
    "an operator of other systems": ({"status": {"$in": ["a"]}}, "in_([...])"),
    "the same for json": ({"tags": {"$in": ["a"]}}, "in_([...])"),
    "a dict for a text": ({"status": {"a": 1}}, "status: eq needs a string, not a dict"),
    "a number for a text": ({"status": 5}, "path('status') takes any value"),
    "a text for an integer": ({"size": "5"}, "size: eq needs an integer, not a string"),
    "a half for an integer": ({"size": 0.5}, "an integer"),
    "a boolean for an integer": ({"size": gt(True)}, "an integer"),
    "a text for a number": ({"ratio": lt("5")}, "a number"),
    "a text for a boolean": ({"done": "true"}, "True or False"),
    "a number for a boolean": ({"done": ne(1)}, "True or False"),
    "no timestamp": ({"due_at": lt("yesterday")}, "a timestamp, for example"),
    "a number for a timestamp": ({"due_at": gte(5)}, "a timestamp, for example"),
    "a bound of another type": ({"size": between(1, "5")}, "size: between needs an integer"),
    "an item of another type": ({"size": in_([1, "5"])}, "size: in needs an integer"),
    "not_in": ({"status": not_in(["a", 5])}, "status: not_in needs a string"),
    "null in a comparison": ({"due_at": lte(None)}, "write eq(None)"),
    "null in between": ({"size": between(None, 5)}, "write eq(None)"),
    "begins_with of an integer": ({"size": begins_with("5")}, "of type integer"),
    "contains of a boolean": ({"done": contains("t")}, "of type boolean"),
    "contains a number in a text": ({"status": contains(5)}, "needs a string"),
    "an unknown operator": ({"status": Op(cast("Any", "like"), "x")}, "begins_with(prefix)"),
    "a key of another type": ({"job_id": 5}, "a string"),
    "the version as a text": ({"version": "1"}, "an integer"),
}
"""Filters that are refused, and what the message says."""

FIT: Final[tuple[tuple[Filters, list[str]], ...]] = (
    ({"status": None}, ["b"]),
    ({"status": in_(["new", None])}, ["a", "b"]),
    ({"status": ne("new")}, ["b", "c"]),
    ({"size": 3.0}, ["a"]),
    ({"size": gt(2.5)}, ["a"]),
    ({"size": between(0, 3.5)}, ["a"]),
    ({"ratio": 1}, ["a"]),
    ({"done": lt(True)}, ["a"]),
    ({"due_at": "2026-01-01T13:00:00+01:00"}, ["a"]),
    ({"due_at": lte("2026-01-01 12:00")}, ["a"]),
    ({"due_at": begins_with("2026-01")}, ["a"]),
    ({"tags": ["x", 5]}, ["a"]),
    ({"tags": contains(5)}, ["a"]),
    ({"version": 1, "job_id": "a"}, ["a"]),
    # By a path, any name and any value.
    ({path("note"): "n"}, ["c"]),
    ({path("status"): 5}, []),
    ({path("status"): in_([5, None])}, ["b"]),
    ({path("size"): "5"}, []),
    ({path("due_at"): lt("yesterday")}, ["a"]),
    ({path("due_at"): lt(None)}, []),
    ({path("tags"): {"$in": [1]}}, []),
)
"""Filters on `STORED` that are accepted, and the ids that they find."""

STORED: Final[tuple[dict[str, object], ...]] = (
    {
        "job_id": "a",
        "status": "new",
        "size": 3,
        "ratio": 1.0,
        "done": False,
        "due_at": _NOON,
        "tags": ["x", 5],
    },
    {"job_id": "b", "status": None},
    {"job_id": "c", "note": "n"},
)


async def _ids(repository: RepositoryInterface, filters: Filters, order: OrderBy = "job_id") -> Any:
    return [each["job_id"] for each in await repository.query_entities("jobs", filters, order)]


def _verbs(
    repository: RepositoryInterface, filters: Filters, order: OrderBy
) -> list[Coroutine[Any, Any, object]]:
    verbs: list[Coroutine[Any, Any, object]] = [
        repository.query_entities("jobs", filters, order),
        repository.query_page("jobs", filters, order),
        completed(repository.stream_entities("jobs", filters, order)),
    ]
    if order is None:
        verbs.append(repository.count_entities("jobs", filters))
    return verbs


async def _all_refuse(store: StorageStrategy, filters: Filters, order: OrderBy, told: str) -> None:
    async def check(verb: Coroutine[Any, Any, object]) -> None:
        with pytest.raises(InvalidQueryError) as caught:
            await verb
        assert told in str(caught.value)

    for verb in [*_verbs(store, filters, order), store.explain_query("jobs", filters, order)]:
        await check(verb)
    async with store.begin_transaction() as tx:
        for verb in _verbs(tx, filters, order):
            await check(verb)


class ArgumentContract:
    """Case 127."""

    @pytest.mark.parametrize(("name", "told"), UNDECLARED.values(), ids=UNDECLARED)
    async def test_127_a_name_in_a_filter_is_declared(
        self, harness: Harness, name: str, told: str
    ) -> None:
        async with harness.store([JOBS]) as store:
            for filters in ({name: "x"}, and_({"status": "x"}, or_(not_({name: eq("x")}), {}))):
                await _all_refuse(store, filters, None, told)

    @pytest.mark.parametrize(("order", "told"), UNORDERED.values(), ids=UNORDERED)
    async def test_127_a_name_in_an_order_is_declared(
        self, harness: Harness, order: Any, told: str
    ) -> None:
        async with harness.store([JOBS]) as store:
            await _all_refuse(store, None, order, told)

    async def test_127_a_name_in_fields_is_declared(self, harness: Harness) -> None:
        async with harness.store([JOBS]) as store:
            await store.create_entities("jobs", STORED)
            for fields, told in (
                (["statsu"], "the nearest are: status"),
                ([path("tags", "x")], "whole fields"),
            ):
                with pytest.raises(InvalidQueryError, match=told):
                    await store.query_entities("jobs", fields=cast("Any", fields))
            found = await store.query_entities(
                "jobs", {"job_id": "c"}, fields=["status", path("note"), path("nothing")]
            )
            assert found == [{"job_id": "c", "note": "n", "version": 1}]

    @pytest.mark.parametrize(("filters", "told"), UNFIT.values(), ids=UNFIT)
    async def test_127_an_operand_is_one_that_the_field_can_hold(
        self, harness: Harness, filters: dict[str, object], told: str
    ) -> None:
        async with harness.store([JOBS]) as store:
            await _all_refuse(store, filters, None, told)

    async def test_127_what_is_accepted(self, harness: Harness) -> None:
        async with harness.store([JOBS]) as store:
            await store.create_entities("jobs", STORED)
            for filters, expected in FIT:
                assert await _ids(store, filters) == expected, filters
                assert await store.count_entities("jobs", filters) == len(expected), filters

    async def test_127_values_of_another_type_are_found_by_path(self, harness: Harness) -> None:
        if not harness.capabilities.durable:
            pytest.skip("the engine is not durable")
        async with harness.store([Collection("jobs", key="job_id")]) as store:
            await store.create_entity("jobs", {"job_id": "a", "status": 5, "size": "5"})
        async with harness.store([JOBS]) as store:
            assert await _ids(store, {path("status"): 5, path("size"): in_(["5", 6])}) == ["a"]
            assert await _ids(store, {"status": ne("x")}) == ["a"]

    async def test_127_an_open_collection_has_undeclared_names(self, harness: Harness) -> None:
        collection = Collection("jobs", key="job_id", fields=["status"], open=True)
        async with harness.store([collection]) as store:
            await store.create_entities("jobs", STORED)
            assert await _ids(store, {"note": "n"}) == ["c"]
            assert await _ids(store, {"size": gt(2), "status": "new"}, "size") == ["a"]
            assert await _ids(store, None, ["-size", "job_id"]) == ["a", "b", "c"]
            found = await store.query_entities("jobs", {"job_id": "c"}, fields=["note"])
            assert found == [{"job_id": "c", "note": "n", "version": 1}]
            with pytest.raises(InvalidQueryError):
                await store.query_entities("jobs", {"status": 5})

    async def test_127_every_method_refuses_arguments_of_the_wrong_kind(
        self, store: StorageStrategy
    ) -> None:
        # Those to be claimed: else the calls with `wait` would take their time.
        await store.create_entities("counters", [{"counter_id": f"{each}"} for each in range(64)])
        valid = {**_VALID, "work": _nothing, "other": store}
        for name in public_methods(type(store)):
            method = getattr(store, name)
            for described, arguments, refused in wrong_calls(method, ACCEPTED, valid):
                await check_call(described, lambda: method(**arguments), refused=refused)  # noqa: B023

    async def test_127_every_method_of_a_transaction_does(self, store: StorageStrategy) -> None:
        for name in public_methods(store.transaction_type):
            async with store.begin_transaction() as tx:
                calls = list(wrong_calls(getattr(tx, name), ACCEPTED, _VALID))
            for described, arguments, refused in calls:
                await check_call(
                    described,
                    lambda: _in_transaction(store, name, arguments),  # noqa: B023
                    refused=refused,
                )


async def _nothing(tx: object) -> None:
    """Work of a transaction."""


async def _in_transaction(store: StorageStrategy, name: str, arguments: dict[str, object]) -> None:
    async with store.begin_transaction() as tx:
        await completed(getattr(tx, name)(**arguments))
