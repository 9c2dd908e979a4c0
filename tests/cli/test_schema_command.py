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
CHANGES = """
def renamed(entity):
    if "size" not in entity:
        return None
    return {"bytes": entity["size"], "size": REMOVE, "owner": entity.get("owner", "nobody")}

async def broken(entity):
    return {"n": entity.get("n", 0) + 1}

ALL = {"jobs": renamed}
BROKEN = {"jobs": broken}
UNKNOWN = {"nope": renamed}
WRONG = {"jobs": 1}
"""
STRICT = "Collection('jobs', key='job_id', fields=[Field('owner', required=True)])"


@pytest.fixture(autouse=True)
def modules(workplace: Path) -> None:
    text = "from hf_async_store import Collection, Field, Index\n"
    (workplace / "jobs_of_a_test.py").write_text(
        f"{text}OLD = [{OLD}]\nNEW = [{NEW}]\nSTRICT = [{STRICT}]\n"
    )
    (workplace / "changes_of_a_test.py").write_text(f"from hf_async_store import REMOVE\n{CHANGES}")


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
    applied = ("form jobs", "field jobs.due_at", "field jobs.size", "index jobs.owner-index")
    assert ran.message == f"applied: {', '.join(applied)}"
    ran = cli("schema", "apply", *named("NEW"))
    assert ran.message == "applied: nothing was missing"
    assert cli("get", "jobs", "a").rows[0]["due_at"] == "2026-01-05T00:00:00.000000Z"
    assert cli("schema", "check", *named("NEW")).code == 3
    assert cli("schema", "check", *named("NEW"), "--allow", "values").code == 0


def test_apply_refuses_missing_values(cli: Cli) -> None:
    filled(cli)
    ran = cli("schema", "apply", *named("STRICT"))
    assert ran.code == 3
    assert "jobs.owner" in ran.message
    assert "'b'" in ran.message


def test_apply_with_a_transform(cli: Cli) -> None:
    filled(cli)
    for transformed in (2, 0):
        ran = cli("schema", "apply", *named("STRICT"), "--transform", "changes_of_a_test:ALL")
        assert (ran.code, ran.rows) == (0, [{"transformed": transformed}]), ran.message
        found = {each["job_id"]: each for each in cli("query", "jobs", "--json").rows}
        assert found["b"]["bytes"] == "large"
        assert (found["b"]["owner"], found["a"]["owner"]) == ("nobody", "o")
        assert {each["version"] for each in found.values()} == {2}
        assert "size" not in found["a"]


@pytest.mark.parametrize(
    ("action", "name", "code", "told"),
    [
        ("apply", "changes_of_a_test:BROKEN", 2, "each time it is run"),
        ("apply", "changes_of_a_test:UNKNOWN", 2, "no collection 'nope'"),
        ("apply", "changes_of_a_test:WRONG", 2, "a dict of functions by collection"),
        ("apply", "changes_of_a_test:renamed", 2, "a dict of functions by collection"),
        ("apply", "changes_of_a_test", 2, "expected MODULE:NAME"),
        ("apply", "nope:ALL", 2, "cannot be imported"),
        ("plan", "changes_of_a_test:ALL", 2, "only for schema apply"),
        ("check", "changes_of_a_test:ALL", 2, "only for schema apply"),
    ],
)
def test_transforms_that_are_refused(
    cli: Cli, action: str, name: str, code: int, told: str
) -> None:
    filled(cli)
    ran = cli("schema", action, *named("OLD"), "--transform", name)
    assert ran.code == code, ran.message
    assert told in ran.message
    assert {each["version"] for each in cli("query", "jobs", "--json").rows} == {1}


@pytest.mark.parametrize("prefix", ["app_", "My%20%22odd%22%20%25"])
def test_stores_with_a_prefix(cli: Cli, prefix: str) -> None:
    """Every command finds the store of its prefix, and no other."""
    other = ["--store", f"sqlite:shared.db?table_prefix={prefix}"]
    assert cli("put", "jobs", '{"job_id": "a"}', *named("OLD"), *other).code == 0
    plain = ["--store", "sqlite:shared.db"]
    assert cli("put", "jobs", '{"job_id": "b"}', *named("OLD"), *plain).code == 0
    for store, name in ((other, "a"), (plain, "b")):
        assert [each["job_id"] for each in cli("query", "jobs", "--json", *store).rows] == [name]
        assert cli("schema", "apply", *named("NEW"), *store).code == 0
        assert cli("schema", "check", *named("NEW"), *store).code == 0
        assert cli("backup", f"{name}.backup", *store).code == 0
    again = ["--store", "sqlite:shared.db?table_prefix=again_"]
    assert cli("restore", "a.backup", *again).code == 0
    assert cli("get", "jobs", "a", *again).code == 0
    ran = cli("migrate", "--from", plain[1], "--to", "sqlite:shared.db?table_prefix=moved_")
    assert ran.code == 0, ran.message
    moved = ["--store", "sqlite:shared.db?table_prefix=moved_"]
    assert cli("get", "jobs", "b", *moved).code == 0
    ran = cli("migrate", "--from", plain[1], "--to", "sqlite:./shared.db?table_prefix=")
    assert ran.code == 4
    assert "same" in ran.message


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
