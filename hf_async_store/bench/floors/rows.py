"""Whole machines in rows: what one would write by hand to store the same as a SQL store does.

The same columns, with what has none in a document; the same indexes and references; a version. Many
machines are one INSERT of many rows, in one transaction. What a store costs above that is its own:
finding out what each change did, and what belongs to whom.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import aiosqlite

_TEXTS: Final = (
    "machine_id",
    "request_id",
    "template_id",
    "return_request_id",
    "name",
    "status",
    "instance_type",
    "provider_instance_id",
    "private_ip",
    "public_ip",
    "started_at",
    "terminated_at",
    "created_at",
    "updated_at",
)
_REQUEST: Final = (
    "request_id",
    "template_id",
    "machine_count",
    "status",
    "request_type",
    "created_at",
    "updated_at",
)
_HAS_COLUMN: Final = frozenset({*_TEXTS, "version"})
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS hand_templates (template_id {key});
CREATE TABLE IF NOT EXISTS hand_requests (
    request_id {key}, template_id {text} REFERENCES hand_templates, machine_count BIGINT,
    status {text}, request_type {text}, created_at {text}, updated_at {text},
    doc {document}, version BIGINT NOT NULL);
CREATE INDEX IF NOT EXISTS hand_requests_type ON hand_requests (request_type);
CREATE INDEX IF NOT EXISTS hand_requests_status ON hand_requests (status);
CREATE INDEX IF NOT EXISTS hand_requests_template ON hand_requests (template_id, created_at);
CREATE TABLE IF NOT EXISTS hand_machines (
    machine_id {key}, request_id {text} REFERENCES hand_requests,
    template_id {text} REFERENCES hand_templates, return_request_id {text}, name {text},
    status {text}, instance_type {text}, provider_instance_id {text}, private_ip {text},
    public_ip {text}, started_at {text}, terminated_at {text}, created_at {text}, updated_at {text},
    doc {document}, version BIGINT NOT NULL);
CREATE INDEX IF NOT EXISTS hand_machines_name ON hand_machines (name);
CREATE INDEX IF NOT EXISTS hand_machines_request ON hand_machines (request_id, created_at);
CREATE INDEX IF NOT EXISTS hand_machines_return ON hand_machines (return_request_id);
CREATE INDEX IF NOT EXISTS hand_machines_status ON hand_machines (status);
"""
_SQLITE: Final = _TABLES.format(key="TEXT PRIMARY KEY", text="TEXT", document="TEXT")
_POSTGRESQL: Final = _TABLES.format(
    key='TEXT COLLATE "C" PRIMARY KEY', text='TEXT COLLATE "C"', document="JSONB"
) + ("CREATE INDEX IF NOT EXISTS hand_machines_template ON hand_machines (template_id);")
_INTO_MACHINES: Final = f"INSERT INTO hand_machines ({', '.join(_TEXTS)}, doc, version)"
_INTO_REQUESTS: Final = f"INSERT INTO hand_requests ({', '.join(_REQUEST)}, version)"
_ALL: Final = f"SELECT {', '.join(_TEXTS)}, doc, version FROM hand_machines"  # noqa: S608  # constants
SELECT_SQLITE: Final = f"{_ALL} WHERE machine_id = ?"
SELECT_POSTGRESQL: Final = f"{_ALL} WHERE machine_id = ANY($1::text[])"
_MOST: Final = 2000
"""Rows of a statement: SQLite takes 32,766 values."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def values_of(machine: Mapping[str, Any], now: str) -> list[Any]:
    """A machine's row: its columns, the rest as a document, the first version."""
    rest = {name: value for name, value in machine.items() if name not in _HAS_COLUMN}
    values = [machine.get(each) for each in _TEXTS]
    values[-2] = values[-2] or now
    values[-1] = now
    return [*values, _encode(rest).decode() if rest else None, 1]


def parents_of(machines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The templates and the requests that they refer to."""
    templates, requests = (
        {each[name] for each in machines if each.get(name) is not None}
        for name in ("template_id", "request_id")
    )
    return list(templates), list(requests)


def _request_values(request: Mapping[str, Any], now: str) -> list[Any]:
    return [*(request.get(each) for each in _REQUEST[:-2]), now, now, 1]


def entity_of(row: Sequence[Any]) -> dict[str, Any]:
    """A machine of its row in `hand_machines`, without what it does not have."""
    *texts, doc, version = row
    known = {name: value for name, value in zip(_TEXTS, texts, strict=True) if value is not None}
    return {**known, **(_decode(doc) if doc else {}), "version": version}


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _cut(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + _MOST] for start in range(0, len(items), _MOST))


# -- SQLite ---------------------------------------------------------------------------------


async def make_sqlite(connection: aiosqlite.Connection) -> None:
    """The tables, and foreign keys that are looked at."""
    await connection.execute("PRAGMA foreign_keys = ON")
    await connection.executescript(_SQLITE)


async def add_parents_sqlite(
    connection: aiosqlite.Connection, templates: Sequence[str], requests: Sequence[str]
) -> None:
    """What machines refer to."""
    template = "INSERT OR IGNORE INTO hand_templates VALUES (?)"
    await connection.executemany(template, [(each,) for each in templates])
    await connection.executemany(
        "INSERT OR IGNORE INTO hand_requests (request_id, version) VALUES (?, 1)",
        [(each,) for each in requests],
    )


async def insert_sqlite(
    connection: aiosqlite.Connection,
    machines: Sequence[Mapping[str, Any]],
    request: Mapping[str, Any] | None = None,
) -> None:
    """All of them, with their request if it is new, in one transaction."""
    now = _now()
    await connection.execute_fetchall("BEGIN IMMEDIATE")
    try:
        if request is not None:
            marks = ", ".join("?" * (len(_REQUEST) + 1))
            values = _request_values(request, now)
            await connection.execute_fetchall(f"{_INTO_REQUESTS} VALUES ({marks})", values)
        row = f"({', '.join('?' * (len(_TEXTS) + 2))})"
        for some in _cut(machines):
            statement = f"{_INTO_MACHINES} VALUES {', '.join([row] * len(some))}"
            flat = [value for each in some for value in values_of(each, now)]
            await connection.execute_fetchall(statement, flat)
    except BaseException:
        await connection.execute_fetchall("ROLLBACK")
        raise
    await connection.execute_fetchall("COMMIT")


# -- PostgreSQL -----------------------------------------------------------------------------


async def make_postgres(connection: Any) -> None:
    """The tables."""
    await connection.execute(_POSTGRESQL)


async def add_parents_postgres(
    connection: Any, templates: Sequence[str], requests: Sequence[str]
) -> None:
    """What machines refer to."""
    await connection.execute(
        "INSERT INTO hand_templates SELECT unnest($1::text[]) ON CONFLICT DO NOTHING", templates
    )
    await connection.execute(
        "INSERT INTO hand_requests (request_id, version) SELECT unnest($1::text[]), 1 "
        "ON CONFLICT DO NOTHING",
        requests,
    )


async def insert_postgres(
    connection: Any,
    machines: Sequence[Mapping[str, Any]],
    request: Mapping[str, Any] | None = None,
) -> None:
    """All of them, with their request if it is new, in one transaction."""
    now = _now()
    arrays = [f"${number}::text[]" for number in range(1, len(_TEXTS) + 1)]
    arrays += [f"${len(_TEXTS) + 1}::jsonb[]", f"${len(_TEXTS) + 2}::bigint[]"]
    async with connection.transaction():
        if request is not None:
            marks = ", ".join(f"${number}" for number in range(1, len(_REQUEST) + 2))
            values = _request_values(request, now)
            await connection.execute(f"{_INTO_REQUESTS} VALUES ({marks})", *values)
        columns = zip(*(values_of(each, now) for each in machines), strict=True)
        statement = f"{_INTO_MACHINES} SELECT * FROM unnest({', '.join(arrays)})"  # noqa: S608  # constants
        await connection.execute(statement, *columns)
