"""Fuzzing of arguments: arbitrary objects and nearly valid cursors give a correct result or a
`StorageError`.

A short run is part of every test run; `make test-long` tries more inputs. A failure prints the input.
"""

from __future__ import annotations

import base64
import uuid
from collections import OrderedDict, UserDict
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_async_store.batch_validation import validate_batch
from hf_async_store.changes import ABSENT, ANY, check_version
from hf_async_store.errors import InvalidCursorError, InvalidInputError
from hf_async_store.query import (
    MISSING,
    Combined,
    Op,
    Path,
    Query,
    SortKeyInput,
    build_query,
    compile_filter,
    compile_order,
    encode_cursor,
)
from hf_async_store.schema import Collection, Field
from hf_async_store.testing.assertions import typed
from hf_async_store.values import REMOVE, Entity, normalise

if TYPE_CHECKING:
    from collections.abc import Callable

THINGS: Final = Collection(
    "things",
    key="thing_id",
    fields=[
        "label",
        Field("count", "integer"),
        Field("ratio", "number"),
        Field("active", "boolean"),
        Field("due_at", "timestamp"),
        Field("data", "json"),
        Field("must", required=True),
    ],
)

SHORT: Final = 100
LONG: Final = 30_000


class Colour(Enum):
    RED = "red"
    NUMBER = 7
    NOTHING = None
    STRANGE = object()


class Text(str):
    __slots__ = ()


class Number(int):
    pass


class Odd:
    """An object that is equal to nothing and has no hash."""

    __hash__ = None  # type: ignore[assignment]  # the purpose of the class

    def __eq__(self, other: object) -> bool:
        return False


_SCALARS: Final = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**64), 2**64)
    | st.floats()
    | st.text(max_size=8)
    | st.text(st.characters(), max_size=4)
    | st.binary(max_size=4)
    | st.sampled_from(
        [
            "\0",
            "\ud800",
            "x" * 2000,
            "2024-01-01",
            "2024-01-01T00:00:00+25:00",
            "9999-12-31T23:59:59.999999-12:00",
            Colour.RED,
            Colour.NUMBER,
            Colour.NOTHING,
            Colour.STRANGE,
            Text("text"),
            Number(3),
            Number(2**70),
            Decimal("1.5"),
            1j,
            uuid.UUID(int=1),
            ip_address("::1"),
            date(2024, 1, 1),
            datetime(2024, 1, 1),
            datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))),
            datetime.max.replace(tzinfo=UTC),
            timedelta(1),
            MISSING,
            REMOVE,
            ABSENT,
            ANY,
            Odd(),
            object(),
            int,
            len,
            ...,
        ]
    )
)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.text(max_size=5) | st.sampled_from(["\0", "\udfff", "", "a.b"])
    return (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(names, inner, max_size=4)
        | st.dictionaries(st.integers() | st.none() | names, inner, max_size=3)
        | st.dictionaries(names, inner, max_size=3).map(UserDict)
        | st.dictionaries(names, inner, max_size=3).map(OrderedDict)
        | st.frozensets(st.integers(), max_size=3)
        | st.integers(25, 40).flatmap(lambda depth: inner.map(lambda each: _nested(each, depth)))
    )


def _nested(value: object, depth: int) -> object:
    for _ in range(depth):
        value = [value]
    return value


objects: Final = st.recursive(_SCALARS, _containers, max_leaves=12)

_NAMES: Final = st.sampled_from([*THINGS.fields, "version", "other", "", "-label", "a.b"])
_OP_NAMES: Final = st.sampled_from(
    [
        *("eq", "ne", "lt", "lte", "gt", "gte", "in", "not_in", "between", "exists"),
        *("contains", "begins_with", "like", "", None, 5),
    ]
)
_named_paths: Final = _NAMES.map(lambda name: Path((name,)))  # compared with anything
_steps: Final = st.lists(_NAMES | st.integers() | objects, max_size=5).map(tuple) | objects
_paths: Final = _steps.map(lambda parts: Path(parts))


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


_ops: Final = st.builds(Op, _OP_NAMES, objects | st.lists(objects, max_size=3).map(tuple))
_maps: Final = st.dictionaries(
    _NAMES | _named_paths | _paths.filter(_hashable) | _SCALARS.filter(_hashable),
    _ops | objects | _paths,
    max_size=4,
)
filters: Final = st.recursive(
    _maps | objects,
    lambda inner: st.builds(
        Combined,
        st.sampled_from(["and", "or", "not", "xor"]),
        st.lists(inner, max_size=4).map(tuple) | objects,
    ),
    max_leaves=8,
)
_one_order: Final = st.one_of(
    _NAMES,
    _named_paths,
    _paths,
    st.builds(SortKeyInput, _NAMES | _named_paths | _paths | objects, st.booleans() | objects),
    objects,
)
orders: Final = _one_order | st.lists(_one_order, max_size=4)


def fuzzed(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        print_blob=True,
    )


_ENTITIES: Final[list[Entity]] = [
    {"thing_id": "a", "label": "x", "count": 1, "version": 1},
    {"thing_id": "b", "label": None, "data": [1, {"x": [None, True, 1.0]}], "version": 2},
    {"thing_id": "c", "ratio": 0.5, "other": {"a": "b"}, "version": 3},
]


@given(st.data())
def _queries(data: st.DataObject) -> None:
    """A query is refused with a `StorageError`, or can be evaluated for every entity."""
    try:
        query = build_query(
            THINGS,
            filters=data.draw(filters),
            order_by=data.draw(st.none() | orders),
            limit=data.draw(st.none() | st.integers(0, 5) | objects),
            fields=data.draw(st.none() | st.lists(_NAMES | _named_paths) | objects),
        )
    except InvalidInputError as exc:
        assert str(exc)
        return
    is_match, key = compile_filter(query.where), compile_order(query)
    for each in _ENTITIES:
        assert is_match(each) in (True, False)
    assert len(sorted(key(str(each["thing_id"]), each) for each in _ENTITIES)) == len(_ENTITIES)
    _continues(query)


def _continues(query: Query) -> None:
    for each in _ENTITIES:
        cursor = encode_cursor(query, str(each["thing_id"]), each)
        again = build_query(THINGS, cursor=cursor, **_asked(query))
        assert again.after is not None
        assert again.after.id == each["thing_id"]


def _asked(query: Query) -> dict[str, Any]:
    # The compiled query, converted back to the arguments of a caller.
    order = [SortKeyInput(Path(each.path), each.descending) for each in query.order]
    return {"filters": _said(query.where), "order_by": order}


def _said(where: Any) -> Any:
    if hasattr(where, "op"):
        value = where.value
        as_tuple = where.op in ("in", "not_in", "between")
        return {Path(where.path): Op(where.op, tuple(value) if as_tuple else value)}
    if hasattr(where, "part"):
        return Combined("not", (_said(where.part),))
    kind = "and" if type(where).__name__ == "And" else "or"
    return Combined(kind, tuple(map(_said, where.parts)))  # type: ignore[arg-type]  # one of two


_ORDERS: Final[list[Any]] = [None, "label", ["-data", "count"], ["thing_id"], ["-label"]]


@st.composite
def cursors(draw: st.DrawFn) -> tuple[Any, object]:
    """A modified cursor of a query, used for the same or another query."""
    order = draw(st.sampled_from(_ORDERS))
    query = build_query(THINGS, order_by=order)
    entity = draw(st.sampled_from(_ENTITIES))
    cursor: Any = encode_cursor(query, str(entity["thing_id"]), entity)
    raw = bytearray(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    way = draw(st.integers(0, 7))
    place = draw(st.integers(0, len(raw) - 1))
    if way == 0:
        raw[place] ^= 1 << draw(st.integers(0, 7))
        cursor = base64.urlsafe_b64encode(raw).decode().rstrip("=")
    elif way == 1:
        cursor = base64.urlsafe_b64encode(raw[:place]).decode().rstrip("=")
    elif way == 2:
        raw[place:place] = draw(st.binary(min_size=1, max_size=4))
        cursor = base64.urlsafe_b64encode(raw).decode().rstrip("=")
    elif way == 3:
        letter = draw(st.characters())
        at = draw(st.integers(0, len(cursor)))
        cursor = cursor[:at] + letter + cursor[at + draw(st.integers(0, 1)) :]
    elif way == 4:
        cursor = base64.urlsafe_b64encode(draw(st.binary(max_size=60))).decode()
    elif way == 5:
        cursor = draw(objects)
    elif way == 6:
        cursor += "=" * draw(st.integers(1, 3))
    return draw(st.sampled_from(_ORDERS)), cursor


@given(cursors())
def _cursors(case: tuple[Any, object]) -> None:
    """A cursor continues its own query, or is refused; it is never accepted for another query."""
    order, cursor = case
    try:
        query = build_query(THINGS, order_by=order, cursor=cursor)  # type: ignore[arg-type]
    except InvalidCursorError:
        return
    if cursor is None:
        assert query.after is None
        return
    assert query.after is not None
    own = [
        encode_cursor(build_query(THINGS, order_by=order), str(each["thing_id"]), each)
        for each in _ENTITIES
    ]
    assert cursor in own


@given(objects)
def _values(value: object) -> None:
    """A value is refused, or normalised to a portable one; normalising that again changes nothing."""
    try:
        portable = normalise(value)
    except InvalidInputError as exc:
        assert str(exc)
        return
    assert typed(normalise(portable)) == typed(portable)


_entities: Final = st.fixed_dictionaries(
    {"thing_id": st.text(max_size=3) | objects, "must": st.text(max_size=3) | objects},
    optional={
        "label": st.text(max_size=3) | objects,
        "count": st.integers(-(2**63), 2**63 - 1) | objects,
        "ratio": st.floats() | objects,
        "active": st.booleans() | objects,
        "due_at": st.datetimes(timezones=st.just(UTC)) | objects,
        "created_at": objects,
        "version": objects,
        "data": objects,
        "other": objects,
    },
)


@given(st.lists(_entities | objects, min_size=8, max_size=10) | st.lists(_entities, min_size=8))
def _batches(items: list[Any]) -> None:
    """Validation of a batch by columns and of each entity accept and refuse the same entities."""
    one_by_one: list[Any] = []
    refused: InvalidInputError | None = None
    for each in items:
        try:
            one_by_one.append(THINGS.entity(each))
        except InvalidInputError as exc:
            refused = exc
            break
    together = validate_batch(THINGS, items)
    if together is None:
        return  # then each entity is validated
    assert refused is None, f"column by column it was accepted: {refused}"
    assert [(key, typed(entity)) for key, entity in zip(*together, strict=True)] == [
        (key, typed(entity)) for key, entity in one_by_one
    ]


@given(st.text(max_size=3), _entities | st.dictionaries(_NAMES, objects) | objects, objects)
def _updates(entity_id: str, fields: Any, version: object) -> None:
    for refused in (
        lambda: THINGS.changes(entity_id, fields),
        lambda: THINGS.key_of(fields),
        lambda: check_version(version, absent=True),
    ):
        try:
            refused()
        except InvalidInputError as exc:
            assert str(exc)


PROPERTIES: Final[dict[str, Callable[[], None]]] = {
    each.__name__.strip("_"): each for each in (_queries, _cursors, _values, _batches, _updates)
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_fuzz(name: str) -> None:
    fuzzed(SHORT)(PROPERTIES[name])()


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PROPERTIES)
def test_fuzz_long(name: str) -> None:
    fuzzed(LONG)(PROPERTIES[name])()
