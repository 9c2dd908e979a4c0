"""`purge`, and expired entities on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from command import Cli

TEXT = """\
from datetime import timedelta
from hf_async_store import Collection, Expire, Field, in_
ALL = [
    Collection("sessions", key="id", expires=Expire("expires_at")),
    Collection(
        "jobs",
        key="id",
        fields=["status", Field("done_at", "timestamp")],
        expires=Expire("done_at", after=timedelta(days=1), where={"status": in_(["DONE"])}),
    ),
    Collection("plain", key="id"),
]
LATER = [Collection("sessions", key="id", expires=Expire("until"))]
"""
NAMED = ["--collections", "sessions_of_a_test:ALL"]


@pytest.fixture(autouse=True)
def modules(workplace: Path) -> None:
    (workplace / "sessions_of_a_test.py").write_text(TEXT)


def test_purge_and_the_remembered_declaration(cli: Cli) -> None:
    past, future = "2001-01-01T00:00:00Z", "2101-01-01T00:00:00Z"
    sessions = [
        *({"id": f"old{number}", "expires_at": past} for number in range(5)),
        {"id": "new", "expires_at": future},
    ]
    jobs = [{"id": status, "status": status, "done_at": past} for status in ("DONE", "OPEN")]
    assert cli("put", "sessions", json.dumps(sessions), *NAMED).code == 0
    assert cli("put", "jobs", json.dumps(jobs), *NAMED).code == 0
    # Without --collections: the store remembers when its entities expire.
    assert [each["id"] for each in cli("query", "sessions").rows] == ["new"]
    assert [each["id"] for each in cli("query", "jobs").rows] == ["OPEN"]
    assert cli("get", "sessions", "old1").code == 1
    assert cli("delete", "sessions", "old1").code == 1
    assert cli("purge", "sessions", "--limit", "2").rows == [{"removed": 2}]
    assert cli("purge").rows == [{"removed": 4}]
    assert cli("purge").rows == [{"removed": 0}]
    assert cli("purge", "plain", *NAMED).code == 2
    assert cli("purge", "nothing").code == 2
    described = cli("describe").rows[0]["collections"]
    assert described["sessions"]["expires"] == "expires_at"
    assert described["jobs"]["expires"] == "done_at + 1 day, 0:00:00, where a filter matches"


def test_schema_plan_shows_it(cli: Cli) -> None:
    assert cli("put", "sessions", '{"id": "a"}', *NAMED).code == 0
    later = ["--collections", "sessions_of_a_test:LATER"]
    rows = cli("schema", "plan", *later).rows
    assert ("expiry", "until") in [(each["kind"], each["name"]) for each in rows]
    assert cli("schema", "apply", *later).rows == []
