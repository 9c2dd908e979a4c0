"""put, get, update, delete, query, count: what they do, print and return."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command import shell

if TYPE_CHECKING:
    from command import Cli


def machines(count: int) -> bytes:
    return b"".join(
        json.dumps({"machine_id": f"m-{number:05}", "status": "RUNNING"}).encode() + b"\n"
        for number in range(count)
    )


# -- put ------------------------------------------------------------------------------------


def test_put_one_object(cli: Cli) -> None:
    ran = cli("put", "templates", '{"template_id": "t-1", "name": "Standard"}')
    assert (ran.code, ran.rows) == (0, [{"template_id": "t-1", "version": 1}])
    assert ran.message == "note: a new store was created at data/db.json"
    again = cli("put", "templates", '{"template_id": "t-1"}')
    assert (again.code, again.rows, again.err) == (0, [{"template_id": "t-1", "version": 2}], "")
    [entity] = cli("get", "templates", "t-1").rows
    assert "name" not in entity


def test_put_from_a_file_and_from_stdin(cli: Cli, workplace: Path) -> None:
    (workplace / "in.jsonl").write_bytes(machines(3))
    assert len(cli("put", "machines", "--file", "in.jsonl").rows) == 3
    assert len(cli("put", "machines", "-", stdin=machines(4)).rows) == 4
    assert len(cli("put", "machines", stdin=machines(5)).rows) == 5
    assert cli("count", "machines").out == "5\n"


def test_the_output_of_a_query_can_be_put(filled: Cli) -> None:
    printed = filled("query", "requests").out
    filled("put", "templates", '{"template_id": "t-1"}', "--store", "json:copy.json")
    copied = filled("put", "requests", "-", "--store", "json:copy.json", stdin=printed.encode())
    assert copied.code == 0
    copies = filled("query", "requests", "--store", "json:copy.json").rows
    for copy, row in zip(copies, [json.loads(each) for each in printed.splitlines()], strict=True):
        assert {**copy, "updated_at": 0, "version": 0} == {**row, "updated_at": 0, "version": 0}


def test_create_refuses_an_existing_entity(filled: Cli) -> None:
    for words in (["--create"], ["--expected-version", "absent"]):
        ran = filled("put", "templates", '{"template_id": "t-1"}', *words)
        assert ran.code == 3
        assert ran.message == (
            "templates already has an entity 't-1'; "
            "`update` changes it; `put` without --create replaces it"
        )
    assert filled("get", "templates", "t-1").rows[0]["name"] == "Standard"


def test_put_with_an_expected_version(filled: Cli) -> None:
    body = '{"template_id": "t-1"}'
    stale = filled("put", "templates", body, "--expected-version", "7")
    assert stale.code == 3
    assert (
        "'t-1' is at version 1, not 7; it was changed concurrently: `get` it again" in stale.message
    )
    assert filled("put", "templates", body, "--expected-version", "1").rows[0]["version"] == 2
    missing = filled("put", "templates", '{"template_id": "x"}', "--expected-version", "1")
    assert (missing.code, missing.message) == (1, "templates has no entity 'x'")


def test_some_of_many_are_refused(filled: Cli) -> None:
    ran = filled("put", "machines", "--create", stdin=machines(3) + b'{"machine_id": "m-1"}')
    assert ran.code == 3
    assert [each["machine_id"] for each in ran.rows] == ["m-00000", "m-00001", "m-00002"]
    first, last = ran.err.splitlines()
    assert "machines already has an entity 'm-1'" in first
    assert last == "hf-async-store: 1 of 4 failed; the others succeeded"


def test_a_missing_parent(filled: Cli) -> None:
    ran = filled("put", "machines", '{"machine_id": "m-9", "request_id": "r-9"}')
    assert ran.code == 3
    assert ran.message == (
        "machines 'm-9': request_id refers to 'r-9', which does not exist in requests (if it is "
        "stored elsewhere, declare the field with enforced=False, or set enforce_references to false); "
        "put the parent first"
    )


def test_not_all_of_many_failures_are_listed(filled: Cli) -> None:
    filled("put", "machines", stdin=machines(30))
    ran = filled("put", "machines", "--create", stdin=machines(30))
    lines = ran.err.splitlines()
    assert (ran.code, len(lines)) == (3, 12)
    assert lines[10:] == [
        "hf-async-store: and 20 more errors (--verbose shows all)",
        "hf-async-store: 30 of 30 failed",
    ]


def test_nothing_is_put_if_one_entity_is_invalid(cli: Cli) -> None:
    wrong = machines(2500) + b'{"machine_id": "bad", "status": 5}\n'
    ran = cli("put", "machines", stdin=wrong)
    assert ran.code == 2
    assert (
        ran.message
        == "stdin, line 2501: machines.status is declared as text, but the value is an integer"
    )
    assert not Path("data").exists()


def test_many_entities_are_put_in_batches(cli: Cli) -> None:
    ran = cli("put", "machines", stdin=machines(2500))
    assert (ran.code, len(ran.rows)) == (0, 2500)
    assert cli("count", "machines", "status=RUNNING").out == "2500\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["put", "machines"], "there is no input: give the JSON, - for stdin, or --file FILE"),
        (
            ["put", "machines", "-", "--file", "x"],
            "give only one of: the JSON, - for stdin, or --file FILE",
        ),
        (["put", "machines", "--file", "x"], "cannot read x: No such file or directory"),
        (["put", "machines", "in.json"], "to read a file, give --file in.json"),
        (
            ["put", "machines", '{"status": "x"}'],
            "needs its key field 'machine_id'; the key field holds the id",
        ),
        (["put", "machines", '{"machine_id": 5}'], "an id of machines must be a string, not int"),
        (
            ["put", "nope", "{}"],
            "no collection 'nope'; declared are: templates, requests, machines",
        ),
        (["put", "nope", "{}"], "--collections MODULE:NAME declares other collections"),
        (
            ["put", "machines", "{}", "--create", "--expected-version", "1"],
            "give either --create or --expected-version, not both",
        ),
        (
            ["put", "machines", '[{"machine_id":"a"},{"machine_id":"b"}]', "--expected-version=1"],
            "--expected-version N can be given for one object only, not for 2",
        ),
        (
            ["put", "machines", "{}", "--expected-version", "-1"],
            "expected a version, an integer >= 0",
        ),
    ],
)
def test_invalid_input_of_put(cli: Cli, words: list[str], told: str) -> None:
    ran = cli(*words)
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.message


# -- get ------------------------------------------------------------------------------------


def test_get_several_of_which_one_is_missing(filled: Cli) -> None:
    ran = filled("get", "machines", "m-2", "m-9", "m-1")
    assert ran.code == 1
    assert [each["machine_id"] for each in ran.rows] == ["m-2", "m-1"]
    assert ran.message == "machines has no entity 'm-9'"


def test_get_an_id_that_begins_with_a_dash(cli: Cli) -> None:
    cli("put", "machines", '{"machine_id": "-x"}')
    assert cli("get", "machines", "--", "-x").rows[0]["machine_id"] == "-x"
    assert cli("get", "machines", "--json", "--", "-x").code == 0


# -- update ---------------------------------------------------------------------------------


def test_update(filled: Cli) -> None:
    ran = filled(
        "update", "requests", "r-1", "status=RUNNING", "note:=null", "--remove", "tags", "zone=x"
    )
    assert (ran.code, ran.rows) == (0, [{"request_id": "r-1", "version": 2}])
    [entity] = filled("get", "requests", "r-1").rows
    assert (entity["status"], entity["note"], entity["zone"]) == ("RUNNING", None, "x")
    assert "tags" not in entity
    assert entity["machine_count"] == 3
    assert filled("update", "requests", "r-1", '{"machine_count": 5}').rows[0]["version"] == 3


def test_update_with_an_expected_version(filled: Cli) -> None:
    stale = filled("update", "requests", "r-1", "status=X", "--expected-version", "4")
    assert (stale.code, stale.out) == (3, "")
    assert "requests 'r-1' is at version 1, not 4" in stale.message
    assert filled("update", "requests", "r-1", "status=X", "--expected-version", "1").code == 0


def test_update_of_a_missing_entity(filled: Cli) -> None:
    ran = filled("update", "requests", "r-9", "status=X")
    assert (ran.code, ran.message) == (1, "requests has no entity 'r-9'")


def test_a_field_that_is_probably_misspelt_is_noted(filled: Cli) -> None:
    note = "note: 'statsu' is not declared; did you mean 'status'?"
    ran = filled("put", "requests", '{"request_id": "r-8", "statsu": "X", "color": "red"}')
    assert (ran.code, ran.message) == (0, note)
    for words in (
        ("update", "requests", "r-8", "statsu=Y"),
        ("update", "requests", "r-8", "--remove", "statsu"),
        ("update-where", "requests", "request_id=r-8", "--set", "statsu/deep=1"),
    ):
        assert note in filled(*words).err, words
    assert filled("update", "requests", "r-8", "color=blue", "status=X").err == ""


def test_update_to_a_wrong_type(filled: Cli) -> None:
    ran = filled("update", "requests", "r-1", "machine_count=2.5")
    assert ran.code == 2
    assert ran.message == "requests.machine_count is declared as integer, but the value is a float"
    ran = filled("put", "requests", '{"request_id": "r-1", "created_at": "yesterday"}')
    assert ran.message == (
        "the JSON argument: requests.created_at takes a timestamp, for example 2025-06-30T12:00:00Z, "
        "but the value is a string"
    )
    ran = filled("update", "requests", "r-1", "--remove", "request_id")
    assert ran.code == 2
    assert "requests.request_id is the key" in ran.message


# -- delete ---------------------------------------------------------------------------------


def test_delete(filled: Cli) -> None:
    ran = filled("delete", "machines", "m-1", "m-9", "m-2")
    assert ran.code == 1
    assert ran.rows == [
        {"machine_id": "m-1", "deleted": True},
        {"machine_id": "m-2", "deleted": True},
    ]
    assert ran.message == "machines has no entity 'm-9'"
    assert filled("count", "machines").out == "1\n"


def test_delete_of_a_referenced_entity(filled: Cli) -> None:
    ran = filled("delete", "requests", "r-1", "r-2")
    assert ran.code == 3
    first, second, last = ran.err.splitlines()
    assert "requests 'r-1' cannot be deleted: machines 'm-" in first
    assert first.endswith("refers to it in request_id; delete the children first")
    assert "requests 'r-2' cannot be deleted: machines 'm-3' refers to it" in second
    assert last == "hf-async-store: 2 of 2 failed"
    assert filled("delete", "requests", "r-1").message.endswith("delete the children first")


def test_delete_with_an_expected_version(filled: Cli) -> None:
    assert filled("delete", "machines", "m-1", "--expected-version", "2").code == 3
    assert filled("delete", "machines", "m-1", "m-2", "--expected-version", "1").code == 2
    assert filled("delete", "machines", "m-1", "--expected-version", "1").code == 0
    missing = filled("delete", "machines", "m-1", "--expected-version", "1")
    assert (missing.code, missing.message) == (1, "machines has no entity 'm-1'")


# -- query and count ------------------------------------------------------------------------


def ids(cli: Cli, *words: str) -> list[str]:
    ran = cli("query", *words)
    assert (ran.code, ran.err) == (0, "")
    return [next(value for name, value in row.items() if name.endswith("_id")) for row in ran.rows]


def test_query(filled: Cli) -> None:
    assert ids(filled, "machines") == ["m-1", "m-2", "m-3"]
    assert ids(filled, "machines", "status=RUNNING", "request_id=r-1") == ["m-1"]
    assert ids(filled, "machines", "status:in=STOPPED,GONE") == ["m-2"]
    assert ids(filled, "machines", "name:exists=false") == ["m-3"]
    assert ids(filled, "machines", "name:=null") == ["m-2"]
    assert ids(filled, "requests", "tags/owner=ops") == ["r-1"]
    assert ids(filled, "requests", '["tags","a/b",1]=2') == ["r-1"]
    assert ids(filled, "requests", '["zone"]=7') == ["r-2"]
    assert ids(filled, "requests", '["zone"]:="7"') == []
    assert ids(filled, "requests", "completed_at:gt=2025-06-30T10:00:00+02:00") == ["r-2"]
    assert ids(filled, "requests", "machine_count:between=2,4") == ["r-1"]


def test_order_and_limit(filled: Cli) -> None:
    assert ids(filled, "machines", "--order", "-machine_id") == ["m-3", "m-2", "m-1"]
    assert ids(filled, "machines", "--order=-status,-machine_id") == ["m-2", "m-3", "m-1"]
    assert ids(filled, "machines", "--order", "status", "--order", "-machine_id") == [
        "m-3",
        "m-1",
        "m-2",
    ]
    assert ids(filled, "requests", "--order", "-tags/owner") == ["r-1", "r-2"]
    assert ids(filled, "machines", "--limit", "1", "--order", "-machine_id") == ["m-3"]
    assert ids(filled, "machines", "--limit", "0") == []


def test_options_and_filters_in_any_order(filled: Cli) -> None:
    assert ids(filled, "--limit", "5", "machines", "--json", "status=RUNNING") == ["m-1", "m-3"]
    assert ids(filled, "machines", "request_id=r-1", "--order", "-name", "status=RUNNING") == [
        "m-1"
    ]


def test_fields(filled: Cli) -> None:
    ran = filled("query", "machines", "--fields", "status, name", "--limit", "1")
    assert ran.rows == [{"machine_id": "m-1", "name": "one", "status": "RUNNING", "version": 1}]
    ran = filled("query", "requests", "--fields", '["zone"]', "--order", '-["zone"]')
    assert [each.get("zone") for each in ran.rows] == [7, None]
    ran = filled("query", "machines", "--fields", "status,nope")
    assert (ran.code, ran.out) == (2, "")
    assert "machines has no declared field 'nope'" in ran.message
    assert "--fields needs field names" in filled("query", "machines", "--fields", ",").message


def test_operators_that_ignore_case(filled: Cli) -> None:
    assert ids(filled, "machines", "name:contains_ignore_case=ONE") == ["m-1"]
    assert ids(filled, "machines", "name:begins_with_ignore_case=Ne") == []
    assert filled("count", "requests", '["zone"]:contains_ignore_case=7').out == "0\n"


def test_explain(filled: Cli) -> None:
    [plan] = filled("query", "machines", "status=RUNNING", "--explain").rows
    assert (plan["access"], plan["index"]) == ("index", "status-created_at-index")


def test_count(filled: Cli) -> None:
    assert filled("count", "machines").out == "3\n"
    assert filled("count", "machines", "status=RUNNING").out == "2\n"
    assert filled("count", "machines", "status=GONE").out == "0\n"


def test_count_by(filled: Cli) -> None:
    assert filled("count", "machines", "--by", "status").rows == [
        {"value": "RUNNING", "count": 2},
        {"value": "STOPPED", "count": 1},
    ]
    assert filled("count", "machines", "--by", "name").rows == [
        {"count": 1},
        {"value": None, "count": 1},
        {"value": "one", "count": 1},
    ]
    assert filled("count", "machines", "status=RUNNING", "--by", "tags/owner").rows == [
        {"count": 2}
    ]
    assert filled("count", "machines", "--by", '["name"]').rows[0] == {"count": 1}
    assert filled("count", "machines", "--by", "a//b").code == 2
    refused = filled("count", "machines", "--by", "statu")
    assert "--by statu" in refused.err
    assert "nearest are: status" in refused.err
    assert """'["statu"]'""" in refused.err


def test_sum_min_and_max(filled: Cli) -> None:
    filled("update", "machines", "m-1", '["cores"]=8')
    filled("update", "machines", "m-2", '["cores"]=2.5')
    assert filled("count", "machines", "--sum", '["cores"]').out == "10.5\n"
    assert filled("count", "machines", "status=GONE", "--sum", '["cores"]').out == "0\n"
    assert filled("count", "machines", "--min", '["cores"]').rows == [2.5]
    assert filled("count", "machines", "--max", '["cores"]').rows == [8]
    assert filled("count", "machines", "--max", "status").rows == ["STOPPED"]
    assert filled("count", "machines", "status=GONE", "--min", "status").rows == [None]
    assert "declared as text" in filled("count", "machines", "--sum", "status").message
    assert "--max statu" in filled("count", "machines", "--max", "statu").message
    both = filled("count", "machines", "--sum", '["cores"]', "--by", "status")
    assert (both.code, "not allowed with" in both.message) == (2, True)


def test_update_where(filled: Cli) -> None:
    assert filled("update-where", "machines", "--set", "name=x").code == 2  # never everything
    assert filled("update-where", "machines", "status=RUNNING").code == 2  # no change is given
    words = ("update-where", "machines", "status=RUNNING", "--set", "status=STOPPED")
    words = (*words, "--set", "tags/owner=night", "--remove", "private_ip")
    assert filled(*words, "--order", "-machine_id", "--limit", "1").rows == [{"updated": 1}]
    assert filled(*words).rows == [{"updated": 1}]
    assert filled(*words).rows == [{"updated": 0}]
    found = filled("query", "machines", "tags/owner=night", "status=STOPPED").rows
    assert len(found) == 2
    assert not any("private_ip" in each for each in found)
    ran = filled("update-where", "machines", "status=STOPPED", "--set", "version=3")
    assert ran.code == 2
    assert "the version cannot be set" in ran.message


def test_delete_where(filled: Cli) -> None:
    assert filled("delete-where", "machines").code == 2  # never everything by mistake
    words = ("delete-where", "machines", "status=RUNNING")
    assert filled(*words, "--order", "-machine_id", "--limit", "1").rows == [{"deleted": 1}]
    assert filled(*words).rows == [{"deleted": 1}]
    assert filled(*words).rows == [{"deleted": 0}]
    ran = filled("delete-where", "requests", "request_id=r-1")
    assert ran.code == 3
    assert "cannot be deleted: machines 'm-2' refers to it" in ran.message
    assert filled("count", "machines").out == "1\n"


@pytest.mark.parametrize("command", ["query", "count"])
def test_a_filter_that_is_wrong(filled: Cli, command: str) -> None:
    ran = filled(command, "machines", "statu:equals=x")
    assert ran.code == 2
    assert "unknown operator 'equals'; the operators are: eq, ne, lt" in ran.message
    assert "timestamp_lte" not in ran.message
    assert "required: COLLECTION (see" in filled(command).message


# -- where there is no store ----------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["get", "machines", "m-1"],
        ["query", "machines"],
        ["count", "machines"],
        ["update", "machines", "m-1", "status=x"],
        ["delete", "machines", "m-1"],
        ["update-where", "machines", "status=x", "--set", "name=y"],
        ["delete-where", "machines", "status=x"],
        ["health"],
        ["checkpoint"],
        ["backup"],
        ["backups"],
        ["get", "jobs", "j-1"],
        ["count", "jobs"],
        ["update", "jobs", "j-1", "status=x"],
        ["export", "jobs", "--format", "csv"],
        ["watch", "jobs"],
    ],
)
def test_a_store_that_is_not_there(cli: Cli, workplace: Path, words: list[str]) -> None:
    ran = cli(*words)
    assert (ran.code, ran.out) == (1, "")
    assert ran.message == (
        "there is no store at data/db.json; correct --store or --config, or create an empty "
        "store with `hf-async-store init`"
    )
    assert list(workplace.iterdir()) == []


def test_a_store_that_is_only_a_journal_yet(cli: Cli) -> None:
    cli("init")
    Path("data/db.json").rename("data/db.json.journal.00000001")
    # The store exists, whatever the journal contains; problems are reported by the store.
    assert cli("count", "machines").code == 4


def test_modules_in_the_working_directory_do_not_shadow_a_driver() -> None:
    Path("declared.py").write_text(
        "from hf_async_store import Collection\nTHINGS = [Collection('things', key='id')]\n"
    )
    Path("aiosqlite.py").write_text("open('ran', 'a').close()\n")
    words = ["put", "things", '{"id": "t-1"}', "--collections", "declared:THINGS"]
    # As the installed command starts: without the working directory in sys.path.
    program = [sys.executable, "-P", "-m", "hf_async_store"]
    ran = shell(*words, "--store", "sqlite:things.db", program=program)
    assert ran.code == 0, ran.err
    assert not Path("ran").exists()
