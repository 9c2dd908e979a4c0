"""Case 116: a migration keeps the entities that have expired, and their time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from hf_async_store import MigrationTool, open_store
from hf_async_store.testing.expiry import EXPIRING, stored

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Place

    from hf_async_store import StorageStrategy

NOW = datetime(2040, 1, 1, tzinfo=UTC)


async def _fill(store: StorageStrategy) -> None:
    """A task that has expired by 2041, with a child; and sessions."""
    task = {"task_id": "t", "status": "DONE", "completed_at": NOW}
    await store.create_entity("tasks", task)
    await store.create_entity("notes", {"note_id": "n", "task_id": "t"})
    sessions = [
        {"session_id": "late", "expires_at": NOW + timedelta(days=3650)},
        {"session_id": "soon", "expires_at": NOW + timedelta(days=1)},
    ]
    await store.create_entities("sessions", sessions)


@pytest.mark.hf_sampled
@pytest.mark.parametrize("merge", [None, "newest"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("json-single", "sqlite"),
        ("sqlite", "json-split"),
        ("json-split", "postgresql"),
        ("sqlite", "dynamodb"),
    ],
)
async def test_116_a_migration_keeps_what_has_expired(
    source: str, target: str, merge: str | None, place: Place, tmp_path: Path
) -> None:
    first, second = place(source, "a"), place(target, "b")
    async with open_store(first, collections=EXPIRING, clock=lambda: NOW) as store:
        await _fill(store)
    later = NOW + timedelta(days=365)
    one = open_store(first, collections=EXPIRING, clock=lambda: later, purge_seconds=None)
    other = open_store(second, collections=EXPIRING, clock=lambda: later, purge_seconds=None)
    config = {"cleanup_source": True, "backup_location": f"{tmp_path / 'backups'}/"}
    async with one, other:
        assert await one.get_entity("tasks", "t") is None
        async with MigrationTool(one, other, config, merge=merge) as tool:  # type: ignore[arg-type]
            report = await tool.migrate()
        assert report.ok, report.problems
        assert report.verified
        assert report.cleaned
        assert await stored(one, "sessions") == await stored(one, "tasks") == []
        assert await stored(other, "sessions") == ["late", "soon"]
        assert await stored(other, "tasks") == ["t"]
        assert await other.get_entity("sessions", "soon") is None
        assert await other.get_entity("tasks", "t") is None
        assert await other.get_entity("notes", "n") is not None
        assert await other.update_entity("notes", "n", {"text": "x"}) == 2
        assert await other.create_entity("sessions", {"session_id": "soon"}) == 1
