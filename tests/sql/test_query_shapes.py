"""Statements that are kept by the shape of a query: they are those that would be compiled for it."""

from __future__ import annotations

from typing import Any

import pytest

from hf_async_store import Collection, Field, Index, between, exists, gte, in_, lt, ne, path
from hf_async_store.query import CursorPosition, Query, build_query
from hf_async_store.strategies.sql.catalogue import Catalogue, declared
from hf_async_store.strategies.sql.compiler import compile_count, compile_query
from hf_async_store.strategies.sql.names import Names
from hf_async_store.strategies.sql.postgres_grammar import PostgresGrammar
from hf_async_store.strategies.sql.query_shapes import compiled_by_shape
from hf_async_store.strategies.sql.rows import Table
from hf_async_store.strategies.sql.sqlite_grammar import SQLiteGrammar

JOBS = Collection(
    "jobs",
    key="job_id",
    fields=[
        Field("status"),
        Field("size", type="integer"),
        Field("note"),
        Field("extra", type="json"),
    ],
    indexes=[Index("status", "created_at"), Index("size"), Index("note")],
)
LONG = "x" * 300

FILTERS: list[Any] = [
    None,
    {"status": "new"},
    {"status": "done"},
    {"status": "new", "size": 3},
    {"size": gte(3)},
    {"size": lt(2**62 + 1)},
    {"size": between(1, 9)},
    {"status": exists()},
    {"status": in_(["new"])},
    {"status": in_(["new", "old"])},
    {"status": ne("new")},
    {"note": LONG},
    {"note": "y" * 100},
    {"job_id": "j-1"},
    {path("extra"): [1]},
    {path("status"): {"a": 1}},
    {path("extra", "deep"): 1},
]
ORDERS: list[Any] = [
    None,
    "created_at",
    "-created_at",
    ["status", "-size"],
    "job_id",
    path("extra"),
]
POSITIONS: list[Any] = [None, "new", "old", None, 7, LONG, "é" * 70, [1], {"a": 1}]


@pytest.mark.parametrize(
    "grammar", [SQLiteGrammar(), PostgresGrammar()], ids=["sqlite", "postgresql"]
)
def test_a_kept_statement_is_the_one_that_would_be_compiled(grammar: Any) -> None:
    entry = declared(Catalogue(), [JOBS])["jobs"]
    table = Table("jobs", entry, grammar, Names(""))
    for _ in range(2):  # the second time, they are kept
        for query in queries():
            kept = compiled_by_shape(compile_query, table, query)
            fresh = compile_query(table, query)
            assert kept[:2] == fresh[:2], query
            assert kept[3:] == fresh[3:], query
            assert (kept.residual is None) == (fresh.residual is None), query
        for filters in FILTERS:
            query = build_query(JOBS, filters=filters)
            kept, fresh = (
                compiled_by_shape(compile_count, table, query),
                compile_count(table, query),
            )
            assert kept[:2] == fresh[:2], query
    assert table.statements
    assert not any(each.args for each in table.statements.values()), "values would be kept"


def queries() -> list[Query]:
    found: list[Query] = []
    for number, filters in enumerate(FILTERS):
        for order_by in ORDERS:
            query = build_query(JOBS, filters=filters, order_by=order_by, limit=number or None)
            found.append(query)
            for value in POSITIONS:
                values = tuple([value] * len(query.order))
                found.append(_after(query, CursorPosition(values, "j-7")))
    return found


def _after(query: Query, position: CursorPosition) -> Query:
    return Query(query.collection, query.where, query.order, query.limit, position)
