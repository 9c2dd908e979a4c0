"""The syntax of command-line arguments: filters, orders, assignments, and JSON for `put`."""

from __future__ import annotations

from typing import Any

import pytest

from hf_async_store import REMOVE, Collection, Field, StorageError
from hf_async_store.cli.filter_syntax import (
    changes_of,
    entities_of,
    fields_of,
    filters_of,
    order_of,
)
from hf_async_store.query import Comparison, asc, build_query, desc, path

THINGS = Collection(
    "things",
    key="thing_id",
    fields=[
        "note",
        Field("total", "number"),
        Field("count", "integer"),
        Field("paid", "boolean"),
        Field("done_at", "timestamp"),
        Field("lines", "json"),
    ],
)


def comparison(word: str) -> Comparison:
    """The comparison that an argument is parsed into, validated like a query."""
    where = build_query(THINGS, filters=filters_of([word], THINGS)).where
    assert isinstance(where, Comparison)
    return where


@pytest.mark.parametrize(
    ("word", "path", "op", "value"),
    [
        ("note=RUNNING", ("note",), "eq", "RUNNING"),
        ("note=", ("note",), "eq", ""),
        ("note=a=b:c", ("note",), "eq", "a=b:c"),
        ("note=a!=b", ("note",), "eq", "a!=b"),
        ("note:gt=>=", ("note",), "gt", ">="),
        ('note:="=a"', ("note",), "eq", "=a"),
        ('["note"]:=5', ("note",), "eq", 5),
        ('["count"]:="5"', ("count",), "eq", "5"),
        ("count=5.0", ("count",), "eq", 5.0),
        ("note=null", ("note",), "eq", "null"),
        ("note=5", ("note",), "eq", "5"),
        ("note:=null", ("note",), "eq", None),
        ("note:ne:=null", ("note",), "ne", None),
        ("thing_id=7", ("thing_id",), "eq", "7"),
        ("count=5", ("count",), "eq", 5),
        ("count:gt=2.5", ("count",), "gt", 2.5),
        ("count=null", ("count",), "eq", None),
        ("total:lte=-1e3", ("total",), "lte", -1000.0),
        ("version:gte=2", ("version",), "gte", 2),
        ("paid=true", ("paid",), "eq", True),
        ("paid:ne=False", ("paid",), "ne", False),
        ("done_at:lt=2025-06-30", ("done_at",), "lt", "2025-06-30T00:00:00.000000Z"),
        ("done_at:begins_with=2025-06", ("done_at",), "begins_with", "2025-06"),
        ("done_at:exists=false", ("done_at",), "exists", False),
        ("done_at:exists=true", ("done_at",), "exists", True),
        ("done_at:exists", ("done_at",), "exists", True),
        ("lines=[1]", ("lines",), "eq", [1]),
        ("lines:contains=1", ("lines",), "contains", 1),
        ("note:contains=1", ("note",), "contains", "1"),
        ('["zone"]=7', ("zone",), "eq", 7),
        ('["zone"]=seven', ("zone",), "eq", "seven"),
        ('["zone"]=007', ("zone",), "eq", "007"),
        ('["zone"]:="7"', ("zone",), "eq", "7"),
        ('["zone"]=NaN', ("zone",), "eq", "NaN"),
        ("note:in=b, a", ("note",), "in", ["a", "b"]),
        ("count:in=1,2", ("count",), "in", [1, 2]),
        ('note:in:=["a,b"]', ("note",), "in", ["a,b"]),
        ("note:not_in=a", ("note",), "not_in", ["a"]),
        ("count:between=1,10", ("count",), "between", [1, 10]),
        ("count:between:=[1,2]", ("count",), "between", [1, 2]),
        ("tags/owner=ops", ("tags", "owner"), "eq", "ops"),
        ("disks/0/size:gte=100", ("disks", 0, "size"), "gte", 100),
        ('["tags","a/b:c=d"]=x', ("tags", "a/b:c=d"), "eq", "x"),
        ('["tags","0"]:exists', ("tags", "0"), "exists", True),
        ('["note"]:begins_with=x', ("note",), "begins_with", "x"),
        ('["tags","n"]:ne:=null', ("tags", "n"), "ne", None),
        # A path below a declared field has no declared type.
        ("note/count=5", ("note", "count"), "eq", 5),
    ],
)
def test_a_filter(word: str, path: tuple[object, ...], op: str, value: Any) -> None:
    found = comparison(word)
    assert (found.path, found.op) == (path, op)
    assert repr(found.value) == repr(value)


def test_several_filters_are_combined_with_and() -> None:
    where = build_query(
        THINGS, filters=filters_of(["count:gt=1", "count:lt=5", "note=x"], THINGS)
    ).where
    assert len(where.parts) == 3  # type: ignore[union-attr]
    assert filters_of([], THINGS) is None


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("note", "'note' is not a filter; write field=value"),
        ("note:gt", "'note:gt' is not a filter; write field=value"),
        ("note:eqq=x", "unknown operator 'eqq'; the operators are: eq, ne, lt"),
        ("a:b:eq=x", "write a field name with a colon as a JSON list"),
        ("=x", "a field name is missing"),
        ("tags//x=1", "a field name is missing"),
        ("count=x", "'count=x': the field takes an integer"),
        ("count=", "the field takes an integer"),
        ("count=1_0", "the field takes an integer"),
        ("total=0x1", "the field takes a number"),
        ("paid=yes", "the field takes true or false"),
        ("done_at=yesterday", "takes a timestamp, for example 2025-06-30T12:00:00Z"),
        ("done_at:exists=1", "exists takes =true or =false"),
        ("note:in=", "in needs at least one value"),
        ("note:not_in:=[]", "not_in needs at least one value"),
        ("note:in:=5", "in needs a JSON list after :="),
        ("count:between=1", "between takes two values, for example 1,10"),
        ("note:={", "the value after = is not valid JSON"),
        ('["a"=x', "begins with [, but not with a valid JSON list of path steps"),
        ("[]=x", "path steps must be strings or integers"),
        ("[true]=x", "path steps must be strings or integers"),
        ('["a"]x=1', "expected =value or :operator=value after the JSON list"),
        ("note=" + "x" * 500 + "\n:", None),
        ("note!=done", "write note:ne=VALUE"),
        ("note<>done", "write note:ne=VALUE"),
        ("count>=5", "write count:gte=VALUE"),
        ("count > 5", "write count:gt=VALUE"),
        ("count<5", "write count:lt=VALUE"),
        ("count = 5", "write count=VALUE"),
        ("tags/size>=5", "write tags/size:gte=VALUE"),
        ("note==done", "write note=VALUE, or note:='\"=...\"'"),
        ("noet=done", "things has no declared field 'noet'; the nearest are: note"),
        ("noet=done", "written as a JSON list: '[\"noet\"]'"),
        ('note:=["a"]', "eq needs a string, not a list"),
        ('note:=["a"]', "for any of several values: note:in=a,b"),
        ('count:="5"', "eq needs an integer, not a string"),
        ("count=0.5", "eq needs an integer, not a float"),
        ("count:contains=5", "but this is of type integer"),
        ("done_at:lt:=null", "never matches null"),
        ('done_at:in:=["soon"]', "in needs a timestamp, for example"),
    ],
)
def test_a_filter_that_is_refused(word: str, told: str | None) -> None:
    if told is None:
        assert comparison(word).value == word.removeprefix("note=")
        return
    with pytest.raises(StorageError) as caught:
        comparison(word)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_order() -> None:
    assert order_of(["note,-created_at", "tags/owner", '-["a,b",0]', '["zone"]'], THINGS) == [
        asc(path("note")),
        desc(path("created_at")),
        asc(path("tags", "owner")),
        desc(path("a,b", 0)),
        asc(path("zone")),
    ]
    assert order_of([], THINGS) is None
    for wrong in ("", "a,", "-"):
        with pytest.raises(StorageError, match="--order needs names"):
            order_of([wrong], THINGS)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("done_at desc", "write --order -done_at"),
        ("done_at:DESC", "write --order -done_at"),
        ("done_at asc", "write --order done_at"),
        ("tags/owner desc", "write --order -tags/owner"),
        ("done_at,desc", "a descending order is written -name"),
        ("done_ta", "--order done_ta': things has no declared field 'done_ta'; the nearest"),
        ("-done_ta", "written as a JSON list: '[\"done_ta\"]'"),
    ],
)
def test_an_order_that_is_refused(word: str, told: str) -> None:
    with pytest.raises(StorageError) as caught:
        order_of([word], THINGS)
    assert told in str(caught.value)


def test_fields() -> None:
    assert fields_of([], THINGS) is None
    assert fields_of(["note, count", '["zo,ne"]'], THINGS) == [
        path("note"),
        path("count"),
        path("zo,ne"),
    ]
    for wrong, told in (("", "--fields needs"), ("zone", "no declared field 'zone'")):
        with pytest.raises(StorageError, match=told):
            fields_of([wrong], THINGS)


def test_assignments() -> None:
    changes = changes_of(
        ["note=5", "count=5", "paid=null", "lines=[1]", "zone=x", "done_at=2025-06-30", "a:=null"],
        ["old", "older"],
        THINGS,
    )
    assert changes == {
        "note": "5",
        "count": 5,
        "paid": None,
        "lines": [1],
        "zone": "x",
        "done_at": "2025-06-30",
        "a": None,
        "old": REMOVE,
        "older": REMOVE,
    }
    assert changes_of(['{"note": null, "x": 1}'], [], THINGS) == {"note": None, "x": 1}
    assert changes_of(['["a/b"]=1'], [], THINGS) == {"a/b": 1}
    assert changes_of([], ["x"], THINGS) == {"x": REMOVE}
    nested = {path("tags", "owner"): "x", path("tags", "old"): REMOVE}
    assert changes_of(["tags/owner=x"], ["tags/old"], THINGS) == nested


@pytest.mark.parametrize(
    ("words", "removed", "told"),
    [
        ([], [], "no change is given: give field=value, a JSON object, or --remove FIELD"),
        (["note"], [], "is not an assignment; write field=value"),
        (["count:gt=1"], [], "is not an assignment"),
        (["note=a", "note=b"], [], "note is given twice"),
        (["note=a"], ["note"], "--remove note: the field is also given a value"),
        (["tags/owner=x", "tags/owner=y"], [], "owner is given twice"),
        (["version=3"], [], "use --expected-version"),
        (["count=x"], [], "the field takes an integer"),
        (['{"note": }'], [], "the JSON argument, line 1, column 10"),
    ],
)
def test_assignments_that_are_refused(words: list[str], removed: list[str], told: str) -> None:
    with pytest.raises(StorageError) as caught:
        changes_of(words, removed, THINGS)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        (b'{"a": 1}', ["x"]),
        (b'\xef\xbb\xbf{"a":\r\n 1}\r\n', ["x"]),
        (b'[{"a": 1}, {"a": 2}]', ["x, item 1", "x, item 2"]),
        (b'[\n{"a": 1}\n]', ["x, item 1"]),
        (b"[]", []),
        (b'{"a": 1}\n\n{"a": 2}\r\n', ["x, line 1", "x, line 3"]),
    ],
)
def test_json_that_is_put(text: bytes, places: list[str]) -> None:
    given = entities_of(text, "x")
    assert [each.position for each in given] == places
    assert [each.entity for each in given] == [{"a": n} for n, _ in enumerate(given, 1)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "x: the input is empty"),
        (b" \n", "x: the input is empty"),
        (b"5", "x: expected a JSON object, got int"),
        (b'["a"]', "x, item 1: expected a JSON object, got str"),
        (b'{"a": 1}\n[]', "x, line 2: expected a JSON object, got list"),
        (b'{"a": 1}\n{"b"', "x, line 2, column 5: the JSON is incomplete"),
        (b'{"a":\n 1,\n}', "x, line 3, column 1"),
        (b'{"a": "\xff"}', "x, line 1, column 8: not UTF-8"),
        ('{"ä": x}'.encode(), "x, line 1, column 7"),
        (b'{"a": NaN}', "x, line 1, column 7"),
        (b"[" * 100_000, "x: nested too deeply"),
    ],
)
def test_json_that_is_refused(text: bytes, told: str) -> None:
    with pytest.raises(StorageError) as caught:
        entities_of(text, "x")
    assert told in str(caught.value)
