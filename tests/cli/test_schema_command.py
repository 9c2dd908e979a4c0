"""`schema plan`, `apply` and `check`, and the ways to name the collections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from command import Cli

OLD = "Collection('jobs', key='job_id', fields=['owner'])"
NEW = (
    "Collection('jobs', key='job_id', fields=['owner', Field('due_at', 'timestamp'), "
    "Field('size', 'integer')], indexes=['owner'])"
)
STRICT = "Collection('jobs', key='job_id', fields=[Field('owner', required=True)])"


@pytest.fixture(autouse=True)
def modules(workplace: Path) -> None:
    text = "from hf_async_store import Collection, Field, Index\n"
    (workplace / "jobs_of_a_test.py").write_text(
        f"{text}OLD = [{OLD}]\nNEW = [{NEW}]\nSTRICT = [{STRICT}]\n"
    )


def named(name: str) -> list[str]:
    return ["--collections", f"jobs_of_a_test:{name}"]


def filled(cli: Cli) -> None:
    rows = [
        {"job_id": "a", "owner": "o", "due_at": "2026-01-05", "size": 1},
        {"job_id": "b", "size": "large"},
    ]
    assert cli("put", "jobs", json.dumps(rows), *named("OLD")).code == 0


def test_plan_apply_and_check(cli: Cli) -> None:
    filled(cli)
    assert cli("schema", "check", *named("OLD")).code == 0
    kinds = [
        ("field", "due_at"), ("field", "size"), ("index", "owner-index"), ("form", "due_at"),
        ("values", "size"),
    ]  # fmt: skip
    ran = cli("schema", "plan", *named("NEW"))
    assert (ran.code, [(each["kind"], each["name"]) for each in ran.rows]) == (0, kinds)
    assert cli("get", "jobs", "a").rows[0]["due_at"] == "2026-01-05", "nothing is changed"
    assert cli("schema", "check", *named("NEW")).code == 3
    ran = cli("schema", "apply", *named("NEW"), "--complete")
    assert (ran.code, [each["kind"] for each in ran.rows]) == (0, ["values"])
    assert cli("get", "jobs", "a").rows[0]["due_at"] == "2026-01-05T00:00:00.000000Z"
    assert cli("schema", "check", *named("NEW")).code == 3
    assert cli("schema", "check", *named("NEW"), "--allow", "values").code == 0


def test_apply_refuses_missing_values(cli: Cli) -> None:
    filled(cli)
    ran = cli("schema", "apply", *named("STRICT"))
    assert ran.code == 4
    assert "jobs.owner" in ran.message
    assert "'b'" in ran.message


def test_the_declarations_must_be_named(cli: Cli) -> None:
    filled(cli)
    ran = cli("schema", "check")
    assert ran.code == 2
    assert "HF_ASYNC_STORE_COLLECTIONS" in ran.message


def test_other_ways_to_name_collections(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(cli)
    block = {"json_strategy": {"base_path": "other"}, "collections": "jobs_of_a_test:NEW"}
    Path("config.json").write_text(json.dumps({"storage": block}))
    monkeypatch.delenv("HF_ASYNC_STORE")
    assert cli("put", "jobs", '{"job_id": "x"}', "--config", "config.json").code == 0
    assert cli("schema", "check", "--config", "config.json").code == 0
    monkeypatch.setenv("HF_ASYNC_STORE_COLLECTIONS", "jobs_of_a_test:STRICT")
    ran = cli("put", "jobs", '{"job_id": "y"}', "--config", "config.json")
    assert ran.code == 2
    assert "jobs.owner is required" in ran.message
    monkeypatch.setenv("HF_ASYNC_STORE_COLLECTIONS", "nope:ALL")
    ran = cli("count", "jobs", "--config", "config.json")
    assert ran.code == 2
    assert "HF_ASYNC_STORE_COLLECTIONS nope:ALL" in ran.message
    Path("config.json").write_text(json.dumps({"storage": {**block, "collections": ["jobs"]}}))
    assert "storage.collections" in cli("count", "jobs", "--config", "config.json").message


def test_every_command_sees_the_collections_of_all_programs(cli: Cli) -> None:
    filled(cli)
    other = "from hf_async_store import Collection\nALL = [Collection('parts', key='part_id')]\n"
    Path("parts_of_a_test.py").write_text(other)
    assert cli("put", "parts", '{"part_id": "p"}', "--collections", "parts_of_a_test:ALL").code == 0
    assert cli("count", "jobs").out == "2\n"
    assert cli("query", "parts", "--json").rows[0]["part_id"] == "p"
    ran = cli("get", "templates", "t-1")
    assert ran.code == 2
    assert "declared are: jobs, parts" in ran.message
    assert sorted(cli("describe").rows[0]["collections"]) == ["jobs", "parts"]


def test_recorded_declarations_that_cannot_be_read(cli: Cli) -> None:
    filled(cli)
    [file] = Path().glob("**/.*.declarations")
    file.write_text('{"format": 2}')
    ran = cli("count", "jobs")
    assert ran.code == 4
    assert str(file) in ran.message
    assert cli("count", "jobs", *named("OLD")).out == "2\n"
    ran = cli("health")
    assert ran.code == 4
    assert str(file) in str(ran.rows[0]["problems"])


def test_a_copy_keeps_the_declarations(cli: Cli) -> None:
    filled(cli)
    assert cli("backup", "--copy", "copy.json").code == 0
    assert cli("restore", "copy.json", "--store", "json:new/db.json").code == 0
    assert cli("count", "jobs", "--store", "json:new/db.json").out == "2\n"
