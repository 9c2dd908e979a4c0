"""A role that may only create objects in the schema cannot make the service run its code.

PostgreSQL resolves functions and operators along the search path, and prefers an exact match in a
later schema to an inexact one in `pg_catalog`. So the tests create, in the schema of the tables, every
function and operator that the statements of the store use, for every other combination of types.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hf_async_store import (
    PermissionDeniedError,
    and_,
    begins_with,
    between,
    contains,
    exists,
    gt,
    in_,
    ne,
    open_store,
    path,
)
from hf_async_store.migration.live import LiveMigration
from hf_async_store.strategies import sql
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS

if TYPE_CHECKING:
    from hf_async_store_bench.servers import PostgresServer

_TYPES = [
    "text", "varchar", "name", "smallint", "integer", "bigint", "numeric",
    "boolean", "jsonb", "oid", "regnamespace", "\"char\"", "text[]",
    "smallint[]", "bytea", "bytea[]",
]  # fmt: skip
_OPERATORS = ["=", "<>", "<", "<=", ">", ">=", "||", "->", "->>", "#>", "#>>", "-", "+", "@>", "*"]

_TRAPS = """
DO $do$
DECLARE one text; other text; name text; made int := 0;
BEGIN
    FOREACH one IN ARRAY {types} LOOP
        EXECUTE format('CREATE FUNCTION public.trap(a %s) RETURNS text LANGUAGE plpgsql AS '
            '$f$ BEGIN RAISE EXCEPTION ''trapped by %%'', pg_typeof(a); END $f$', one);
        FOREACH name IN ARRAY {functions} LOOP
            IF to_regprocedure(format('pg_catalog.%I(%s)', name, one)) IS NULL THEN
                EXECUTE format('CREATE FUNCTION public.%I(a %s) RETURNS text LANGUAGE plpgsql AS '
                    '$f$ BEGIN RAISE EXCEPTION ''trapped by %%'', pg_typeof(a); END $f$', name, one);
                made := made + 1;
            END IF;
        END LOOP;
        FOREACH other IN ARRAY {types} LOOP
            EXECUTE format('CREATE FUNCTION public.trap(a %s, b %s) RETURNS boolean LANGUAGE plpgsql '
                'AS $f$ BEGIN RAISE EXCEPTION ''trapped by %%'', pg_typeof(a); END $f$', one, other);
            FOREACH name IN ARRAY {operators} LOOP
                IF to_regoperator(format('pg_catalog.%s(%s,%s)', name, one, other)) IS NULL THEN
                    EXECUTE format('CREATE OPERATOR public.%s (FUNCTION = public.trap, LEFTARG = %s, '
                        'RIGHTARG = %s)', name, one, other);
                    made := made + 1;
                END IF;
            END LOOP;
            FOREACH name IN ARRAY {functions} LOOP
                IF to_regprocedure(format('pg_catalog.%I(%s,%s)', name, one, other)) IS NULL THEN
                    EXECUTE format('CREATE FUNCTION public.%I(a %s, b %s) RETURNS text LANGUAGE '
                        'plpgsql AS $f$ BEGIN RAISE EXCEPTION ''trapped by %%'', pg_typeof(a); END $f$',
                        name, one, other);
                    made := made + 1;
                END IF;
            END LOOP;
        END LOOP;
    END LOOP;
    IF made < 1000 THEN RAISE EXCEPTION 'too few traps: %', made; END IF;
END $do$
"""


def functions() -> list[str]:
    """The names in the source code that look like calls of SQL functions."""
    folder = Path(str(sql.__file__)).parent
    text = "".join(each.read_text() for each in folder.glob("*.py"))
    return sorted(set(re.findall(r"\b([a-z][a-z0-9_]*)\(", text)))


def array(texts: list[str]) -> str:
    return "ARRAY[" + ", ".join("'" + each.replace("'", "''") + "'" for each in texts) + "]"


async def lay_traps(server: PostgresServer, url: str) -> None:
    """Create the functions and operators with a role that may only create objects in the schema."""
    await server.ask("GRANT CREATE ON SCHEMA public TO PUBLIC", url)
    if not await server.ask("SELECT count(*) FROM pg_roles WHERE rolname = 'low'", url):
        await server.ask("CREATE ROLE low LOGIN", url)
    known = await server.ask("SELECT array_agg(DISTINCT proname::text) FROM pg_proc", url)
    assert isinstance(known, list)
    # Not `format`, which the traps themselves call.
    named = [each for each in functions() if each in known and each != "format"]
    assert {"jsonb_typeof", "set_config", "starts_with"} <= set(named)
    traps = (
        _TRAPS.replace("{types}", array(_TYPES))
        .replace("{functions}", array(named))
        .replace("{operators}", array(_OPERATORS))
    )
    await server.ask(traps, url.replace("postgres@", "low@"))


@pytest.mark.timeout(300)
async def test_functions_and_operators_of_an_untrusted_role_are_not_run(
    postgres_server: PostgresServer,
) -> None:
    url = postgres_server.database()
    await lay_traps(postgres_server, url)
    async with open_store(url, collections=CONTRACT_COLLECTIONS) as store:
        await store.create_entity("templates", {"template_id": "t"})
        await store.create_entities(
            "requests", [{"request_id": f"r-{n}", "template_id": "t"} for n in range(20)]
        )
        items = [
            {"item_id": f"i-{n}", "label": f"l{n}", "count": n, "ratio": n / 2, "active": n % 2 == 0,
             "due_at": "2026-01-01T00:00:00Z", "data": {"a": [n, "x"]}, "other": {"b": n}}
            for n in range(20)
        ]  # fmt: skip
        await store.save_entities("items", items)
        await store.import_entities("items", [{**each, "version": 3} for each in items])
        await store.update_entity("items", "i-1", {"count": 5, "other": None})
        await store.update_entities("items", {"i-2": {"label": "z"}, "i-3": {"ratio": 1}})
        await store.update_entity("items", "i-4", {"count": 4}, expected_version=3)
        path_to_other = {path("data", "a", 0): gt(1)}
        for filters in (
            {"label": "l5"}, {"count": gt(3)}, {"ratio": between(1, 5)}, {"active": True},
            {"label": in_(["l1", "l2"])}, {"label": begins_with("l1")}, {"label": ne("l1")},
            {"data": contains("x")}, {"due_at": exists(True)}, and_({"count": 1}, {"label": "l1"}),
            path_to_other,
        ):  # fmt: skip
            await store.query_entities("items", filters, order_by="count", limit=5)
            await store.count_entities("items", filters)
            await store.explain_query("items", filters, order_by="label")
        for order in ("label", "ratio", "active", "due_at", "data"):
            page = await store.query_page("items", order_by=order, limit=3)
            await store.query_page("items", order_by=order, limit=3, cursor=page.cursor)
        async with store.begin_transaction() as tx:
            assert await tx.get_entities("items", ["i-1", "i-2"])
            await tx.update_entity("items", "i-1", {"data": {"b": [1]}})
            await tx.delete_entity("items", "i-5")
        await store.delete_entities("items", ["i-6", "i-7"])
        health = await store.health()
        assert health["ok"], health
        assert len(await store.query_entities("items")) == 17


_PLANTED = """
CREATE FUNCTION public.note(t text) RETURNS boolean LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'trapped as %', current_user; END $$;
CREATE TABLE "hf_move-entities" (move_id text COLLATE "C" PRIMARY KEY, version bigint NOT NULL,
    doc jsonb NOT NULL, "row-generation" int NOT NULL);
GRANT ALL ON "hf_move-entities" TO PUBLIC;
INSERT INTO "hf_move-entities" VALUES ('move', 1, '{"move_id": "move", "role": "source", "phase": "COPYING",
    "other": "json:/x", "epoch": 1, "term": 1}', 1);
ALTER TABLE "hf_move-entities" ENABLE ROW LEVEL SECURITY;
CREATE POLICY trap ON "hf_move-entities" USING (public.note(move_id));
"""


async def as_role(server: PostgresServer, url: str, name: str) -> str:
    if not await server.ask(f"SELECT count(*) FROM pg_roles WHERE rolname = '{name}'", url):
        await server.ask(f"CREATE ROLE {name} LOGIN", url)
    return url.replace("postgres@", f"{name}@")


async def test_a_migration_table_of_an_untrusted_role_is_not_read(
    postgres_server: PostgresServer,
) -> None:
    """A row security policy of its owner would run with the privileges of the reader."""
    url = postgres_server.database()
    await postgres_server.ask("GRANT CREATE ON SCHEMA public TO PUBLIC", url)
    app, low = [await as_role(postgres_server, url, each) for each in ("app", "low")]
    async with open_store(app) as store:
        await store.save_entity("templates", {"template_id": "t"})
    for statement in _PLANTED.strip().split(";\n"):
        await postgres_server.ask(statement, low)
    async with open_store(app) as store:
        with pytest.raises(
            PermissionDeniedError, match="hf_move-entities belongs to the role 'low'"
        ):
            await store.get_entity("templates", "t")
    live = LiveMigration(app, f"json:{Path.cwd()}/never")
    with pytest.raises(PermissionDeniedError, match="hf_move-entities belongs to the role 'low'"):
        async with live:
            await live.status()
    # The owner of the other tables is trusted, and so are roles of which this role is a member.
    await postgres_server.ask('DROP POLICY trap ON "hf_move-entities"', url)
    await postgres_server.ask("GRANT low TO app", url)
    async with open_store(app) as store:
        assert await store.get_entity("templates", "t")
    await postgres_server.ask("REVOKE low FROM app", url)
    await postgres_server.ask('ALTER TABLE "hf_move-entities" OWNER TO app', url)
    async with open_store(app) as store:
        assert await store.get_entity("templates", "t")
