"""The index that `explain_query` advises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    Collection,
    Field,
    Index,
    QueryPlan,
    and_,
    between,
    contains,
    desc,
    gt,
    in_,
    ne,
    or_,
    path,
)
from hf_async_store.index_advice import advice
from hf_async_store.query import build_query

if TYPE_CHECKING:
    from collections.abc import Sequence

SCAN = QueryPlan(access="scan", residual=True, sorted_here=True)
FIELDS = ["status", "owner", "kind", "zone", Field("size", "integer"), Field("data", "json")]


def advised(
    filters: Any = None,
    order_by: Any = None,
    *,
    indexes: Sequence[Index] = (),
    plan: QueryPlan = SCAN,
) -> str | None:
    jobs = Collection("jobs", key="job_id", fields=FIELDS, indexes=indexes)
    return advice(jobs, build_query(jobs, filters=filters, order_by=order_by), plan)


@pytest.mark.parametrize(
    ("filters", "order_by", "expected"),
    [
        ({"status": "x"}, None, 'Index("status")'),
        ({"status": "x"}, "-created_at", 'Index("status", "created_at")'),
        ({"status": in_(["x"]), "size": gt(1)}, None, 'Index("status", "size")'),
        ({"size": between(1, 2)}, None, 'Index("size")'),
        # The order is read off the index, and the range is checked for each row.
        ({"size": gt(1)}, "created_at", 'Index("created_at")'),
        ({"size": gt(1)}, ["size", "created_at"], 'Index("size", "created_at")'),
        (None, "-created_at", 'Index("created_at")'),
        (None, ["status", "created_at", "job_id"], 'Index("status", "created_at")'),
        # Only fields of one direction can be read together.
        (None, ["status", desc("created_at")], 'Index("status")'),
        (and_({"owner": "x"}, {"kind": "y"}), ["zone", "size", "status"],
         'Index("owner", "kind", "zone", "size")'),
        ({"status": "x", "owner": ne("y")}, None, 'Index("status")'),
        ({path("status"): "x", path("data", "a"): 1}, None, 'Index("status")'),
        ({"status": "x"}, "status", 'Index("status")'),
        # No index serves these.
        (None, None, None),
        (None, "-job_id", None),
        (None, "data", None),
        ({"data": 1}, None, None),
        ({path("note"): 1}, path("note"), None),
        ({"status": contains("x")}, None, None),
        (or_({"status": "x"}, {"owner": "y"}), None, None),
    ],
)  # fmt: skip
def test_the_fields_of_the_index(filters: Any, order_by: Any, expected: str | None) -> None:
    assert advised(filters, order_by) == expected


def test_no_advice_for_a_query_that_neither_scans_nor_sorts() -> None:
    for access in ("index", "key"):
        plan = QueryPlan(access=access, residual=True)  # type: ignore[arg-type]  # one of these
        assert advised({"status": "x"}, plan=plan) is None
    plan = QueryPlan(access="index", index="status-index", sorted_here=True)
    indexes = [Index("status")]
    assert advised({"status": "x"}, "size", plan=plan, indexes=indexes) == 'Index("status", "size")'


def test_no_advice_for_an_index_that_is_declared() -> None:
    for declared in (Index("status", "size"), Index("status", "size", "owner")):
        assert advised({"status": "x"}, "size", indexes=[declared]) is None
    assert advised({"status": "x"}, indexes=[Index("owner", "status")]) == 'Index("status")'


def test_the_advice_is_a_declaration() -> None:
    text = advised({"status": "x"}, "-created_at")
    assert text is not None
    assert eval(text) == Index("status", "created_at")  # it is meant to be pasted
