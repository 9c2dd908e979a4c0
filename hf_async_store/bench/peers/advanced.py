"""advanced-alchemy: repositories over SQLAlchemy's ORM, a session for each operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
from advanced_alchemy.base import DefaultBase
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Mapped, mapped_column

if TYPE_CHECKING:
    from hf_async_store.bench.data import Entity
    from hf_async_store.bench.plan import Place

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Machine(DefaultBase):
    __tablename__ = "machines"

    id: Mapped[str] = mapped_column(primary_key=True)
    doc: Mapped[str]


class Machines(SQLAlchemyAsyncRepository[Machine]):
    model_type = Machine


class Target:
    """On SQLite through aiosqlite, in WAL mode and as durable as the others."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)

    @classmethod
    async def open(cls, place: Place) -> Self:
        engine = create_async_engine(f"sqlite+aiosqlite:///{Path(place.folder) / 'peer.sqlite'}")
        level = "FULL" if place.durable else "NORMAL"

        @event.listens_for(engine.sync_engine, "connect")
        def connected(connection: Any, record: object) -> None:
            for each in ("journal_mode=WAL", f"synchronous={level}", "busy_timeout=30000"):
                connection.execute(f"PRAGMA {each}")

        async with engine.begin() as connection:
            await connection.run_sync(DefaultBase.metadata.create_all)
        return cls(engine)

    async def close(self) -> None:
        await self._engine.dispose()

    async def fill(self, machines: Sequence[Entity]) -> None:
        await self.create_many(machines)

    async def read_back(self, ids: Sequence[str]) -> list[Mapping[str, Any] | None]:
        return [await self.get(each) for each in ids]

    async def save(self, machine: Entity) -> None:
        async with self._sessions() as session:
            await Machines(session=session, auto_commit=True).upsert(_row(machine))

    async def get(self, machine: str) -> Mapping[str, Any] | None:
        async with self._sessions() as session:
            row = await Machines(session=session).get_one_or_none(id=machine)
        if row is None:
            return None
        entity: Mapping[str, Any] = _decode(row.doc)
        return entity

    async def create_many(self, machines: Sequence[Entity]) -> None:
        async with self._sessions() as session:
            rows = list(map(_row, machines))
            await Machines(session=session, auto_commit=True).add_many(rows)


def _row(machine: Entity) -> Machine:
    return Machine(id=machine["machine_id"], doc=_encode(machine).decode())
