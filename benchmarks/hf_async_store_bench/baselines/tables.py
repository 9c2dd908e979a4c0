"""The tables of the SQL baselines (tables.sql), and their statements: one definition for every driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncEngine

from hf_async_store_bench.data import Entity, utc_now

_DDL: Final = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
_TYPES: Final = {
    "sqlite": {"text": "VARCHAR", "document": "VARCHAR"},
    "postgresql": {"text": 'VARCHAR COLLATE "C"', "document": "JSONB"},
}
TEXTS: Final = (
    *("request_id", "template_id", "return_request_id", "name", "status", "instance_type"),
    *("provider_instance_id", "private_ip", "public_ip", "started_at", "terminated_at"),
    *("created_at", "updated_at"),
)
COLUMNS: Final = ("machine_id", *TEXTS, "doc", "version")
_REQUEST: Final = ("template_id", "status", "request_type", "created_at", "updated_at")
_DECLARED: Final = frozenset(COLUMNS) - {"doc"}
MACHINES: Final = sa.table(
    "hand_machines",
    *(sa.column(each, sa.String) for each in ("machine_id", *TEXTS)),
    sa.column("doc", sa.String().with_variant(postgresql.JSONB(), "postgresql")),
    sa.column("version", sa.BigInteger),
)
_SELECT_ONE: Final = sa.select(MACHINES).where(MACHINES.c.machine_id == sa.bindparam("wanted"))

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def ddl(dialect: str) -> list[str]:
    """The statements that make the tables and their indexes, where they are not there."""
    return _DDL.format(**_TYPES[dialect]).split(";")


def upsert(dialect: str) -> Any:
    """Insert or replace a machine and raise its version, for SQLAlchemy."""
    insert = (sqlite if dialect == "sqlite" else postgresql).insert(MACHINES)
    changed: dict[str, Any] = {each: insert.excluded[each] for each in (*TEXTS, "doc")}
    changed["created_at"] = MACHINES.c.created_at
    changed["version"] = MACHINES.c.version + 1
    return insert.on_conflict_do_update(index_elements=["machine_id"], set_=changed)


class CoreOperations:
    """What a baseline on SQLAlchemy Core does: begin, a statement, commit for each operation."""

    engine: AsyncEngine
    upsert: Any

    async def save(self, machine: Entity) -> None:
        await self.execute(self.upsert, machine)

    async def execute(self, statement: Any, machine: Entity) -> None:
        """Write a machine by a statement that takes its columns."""
        row = dict(zip(COLUMNS, row_of(machine, utc_now()), strict=True))
        async with self.engine.begin() as connection:
            await connection.execute(statement, row)

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        async with self.engine.connect() as connection:
            found = await connection.execute(_SELECT_ONE, {"wanted": machine})
            return entity_of(found.first())


def row_of(machine: Mapping[str, Any], now: str) -> list[Any]:
    """A machine as a row: its columns, the rest as a document, the first version."""
    rest = {name: value for name, value in machine.items() if name not in _DECLARED}
    values = [machine.get(each) for each in COLUMNS[:-2]]
    values[-2:] = values[-2] or now, now
    return [*values, _encode(rest).decode() if rest else None, 1]


def rows_of(machines: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Each machine once, its last form, in the order of their keys: two statements of many rows
    never wait for one another."""
    now = utc_now()
    latest = {each["machine_id"]: each for each in machines}
    return [row_of(latest[each], now) for each in sorted(latest)]


def entity_of(row: Sequence[Any] | None) -> dict[str, Any] | None:
    """A machine of its row, without what it does not have."""
    if row is None:
        return None
    *texts, doc, version = row
    known = zip(COLUMNS, texts, strict=False)
    found = {name: value for name, value in known if value is not None}
    return {**found, **(_decode(doc) if doc else {}), "version": version}


def request_of(request: Mapping[str, Any]) -> tuple[Any, ...]:
    """A request as a row of INTO_REQUESTS."""
    now = utc_now()
    known = [request.get(each) for each in _REQUEST[:-2]]
    return (request["request_id"], *known, now, now, request.get("machine_count"), 1)


def parents_of(machines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The templates and the requests that machines refer to."""
    templates = {each["template_id"] for each in machines if each.get("template_id")}
    requests = {each["request_id"] for each in machines if each.get("request_id")}
    return sorted(templates), [{"request_id": each} for each in sorted(requests)]


def marks(dialect: str, count: int) -> str:
    """So many placeholders."""
    numbers = range(1, count + 1)
    return ", ".join("?" if dialect == "sqlite" else f"${each}" for each in numbers)


INTO_MACHINES: Final = f"INSERT INTO hand_machines ({', '.join(COLUMNS)})"
INTO_REQUESTS: Final = (
    f"INSERT INTO hand_requests (request_id, {', '.join(_REQUEST)}, machine_count, version)"
)
ON_CONFLICT: Final = "ON CONFLICT (machine_id) DO UPDATE SET " + ", ".join(
    [f"{each} = excluded.{each}" for each in (*TEXTS, "doc") if each != "created_at"]
    + ["version = hand_machines.version + 1"]
)
SELECT: Final = f"SELECT {', '.join(COLUMNS)} FROM hand_machines WHERE machine_id"
