"""`export` and `import`: CSV and JSON lines, refused rows, existing entities, Ctrl-C."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command import MACHINES, PROGRAM, check_failure, line, shell

from hf_async_store import open_store
from hf_async_store.cli import progress
from hf_async_store.cli.entity_files import Row
from hf_async_store.cli.transfer_commands import _failure
from hf_async_store.errors import (
    AlreadyExistsError,
    ConcurrencyConflictError,
    UnavailableError,
)

if TYPE_CHECKING:
    from command import Cli

COPY = ("--store", "json:copy.json")


def stored(location: str, collection: str) -> list[dict[str, Any]]:
    async def read() -> list[dict[str, Any]]:
        async with open_store(location) as store:
            return await store.query_entities(collection)

    return asyncio.run(read())


ODD: list[dict[str, Any]] = [
    {"request_id": "plain", "status": "DONE", "machine_count": 3, "tags": {"a": [1, 1.0, None]}},
    {"request_id": "", "status": "", "tags": ""},
    {"request_id": "null", "status": "null", "tags": "null", "machine_count": None},
    {"request_id": "nulls", "status": None, "tags": None, "zone": None},
    {"request_id": '"quoted"', "status": '"x', "tags": '"x', "zone": "7"},
    {"request_id": "lines\r\nand, commas;\ttabs\r", "status": "a\rb\n", "zone": 7, "*": "star"},
    {"request_id": "日本 \ufeff", "status": "=1+1", "odd.name": 1e300, "[x]": True, "": -1},
    {"request_id": " spaces ", "status": " ", "tags": " {", "zone": 9223372036854775807},
    {"request_id": "times", "created_at": "2025-06-30T12:00:00Z", "completed_at": None},
    {"request_id": "types", "tags": False, "zone": 1.0, "other": [{}], "text": "true"},
]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_an_import_of_an_export_is_equal(cli: Cli, form: str) -> None:
    entities = [each for each in ODD if each["request_id"]]
    assert cli("put", "requests", json.dumps(entities)).code == 0
    cli("update", "requests", "plain", "status=OTHER")
    ran = cli("export", "requests", "--format", form, "--output", "r")
    assert ran.rows == [{"file": "r", "exported": len(entities)}]
    assert sorted(os.listdir()) == ["data", "r"]
    ran = cli("import", "requests", "r", "--format", form, "--keep-versions", *COPY)
    assert (ran.code, ran.rows[0]["imported"]) == (0, len(entities))
    before, after = stored("json:data/db.json", "requests"), stored("json:copy.json", "requests")
    # Type for type, also 1 and 1.0.
    assert json.dumps(after, sort_keys=True) == json.dumps(before, sort_keys=True)
    again = shell("export", "requests", "--format", form, *COPY)
    assert again.out.encode() == Path("r").read_bytes()


def test_the_form_of_csv(filled: Cli) -> None:
    filled("update", "machines", "m-2", '["zone"]=7', "status=null")
    ran = filled("export", "machines", "--format", "csv", "--fields", "name,status")
    assert ran.out.splitlines() == [
        "machine_id,name,status,version",
        "m-1,one,RUNNING,1",
        'm-2,null,"""null""",2',
        "m-3,,RUNNING,1",
    ]
    ran = filled("export", "machines", "machine_id=m-2", "--format", "csv")
    header, row = ran.out.splitlines()
    assert header.endswith(",version,*")
    assert row.endswith(',2,"{""zone"":7}"')


def test_versions_are_new_unless_they_are_kept(filled: Cli) -> None:
    filled("update", "templates", "t-1", "name=x")
    filled("export", "templates", "--format", "csv", "--output", "t.csv")
    filled("import", "templates", "t.csv", "--format", "csv", *COPY)
    [entity] = stored("json:copy.json", "templates")
    assert (entity["version"], entity["name"], entity["max_number"]) == (1, "x", 10)
    ran = filled("import", "templates", "t.csv", "--format", "csv", "--keep-versions", *COPY)
    assert ran.code == 3
    assert "t.csv, line 2: " in ran.err
    words = ("--keep-versions", "--replace", *COPY)
    assert filled("import", "templates", "t.csv", "--format", "csv", *words).code == 0
    assert stored("json:copy.json", "templates")[0]["version"] == 2


HOSTS = """\
hostname,status,machine_id_of_old,cores,note
m-1,UP,7,4,
m-9,UP,,8,hello
"""


def test_a_file_of_another_program(filled: Cli) -> None:
    Path("hosts.csv").write_text(HOSTS)
    words = ("import", "machines", "hosts.csv", "--format", "csv", "--key", "hostname")
    ran = filled(*words, "--dry-run")
    assert (ran.code, ran.rows[0]["imported"], ran.rows[0]["refused"]) == (3, 1, 1)
    assert "line 2: machines already has an entity 'm-1'; use --update, --replace or" in ran.err
    ran = filled(*words, "--skip-existing", "--dry-run")
    assert (ran.code, ran.rows[0]["imported"], ran.rows[0]["skipped"]) == (0, 1, 1)
    assert filled("count", "machines").out == "3\n"
    assert filled(*words, "--skip-existing").rows == [
        {"imported": 1, "skipped": 1, "refused": 0, "last_line": 3}
    ]
    [new] = filled("get", "machines", "m-9").rows
    assert (new["cores"], new["note"], new["version"]) == (8, "hello", 1)
    assert filled(*words, "--update").rows[0]["imported"] == 2
    [old] = filled("get", "machines", "m-1").rows
    assert (old["status"], old["name"], old["version"]) == ("UP", "one", 2)
    assert filled(*words, "--replace").code == 0
    [old] = filled("get", "machines", "m-1").rows
    assert "name" not in old
    assert filled("import", "machines", "hosts.csv", "--format", "csv").code == 2


def test_update_creates_what_is_absent(filled: Cli) -> None:
    lines = b'{"machine_id": "m-1", "status": "UP"}\n{"machine_id": "m-7", "status": "UP"}\n'
    ran = filled("import", "machines", "-", "--format", "jsonl", "--update", stdin=lines)
    assert (ran.code, ran.rows[0]["imported"]) == (0, 2)
    assert [each["version"] for each in filled("get", "machines", "m-1", "m-7").rows] == [2, 1]


def test_refused_rows_are_named(cli: Cli) -> None:
    rows = [
        "request_id,machine_count,tags",
        "r-1,1,",
        '"r-2\nx",many,',
        "r-3,1",
        'r-4,1,{"a"',
        ",1,",
        "r-1,2,",
        "r-6,1.5,",
        "",
        'r-7,1,"{""a"": 1}"',
    ]
    data = "\ufeff" + "\r\n".join(rows)
    ran = cli("import", "requests", "-", "--format", "csv", stdin=data.encode())
    assert ran.code == 3
    assert ran.rows == [{"imported": 2, "skipped": 0, "refused": 6, "last_line": 11}]
    lines = [each.partition(": stdin, line ")[2] for each in ran.err.splitlines()]
    assert [each.partition(":")[0] for each in lines if each] == ["3", "5", "6", "7", "8", "9"]
    assert "takes an integer" in ran.err
    assert "2 cells, but the first line names 3 columns" in ran.err
    assert [each["request_id"] for each in cli("query", "requests").rows] == ["r-1", "r-7"]


COMPRESSED = gzip.compress(b"{}\n")


@pytest.mark.parametrize(
    ("form", "data", "message"),
    [
        ("csv", b"", "the first line must contain the names"),
        ("csv", b"name\nx\n", "there is no column 'machine_id', only 'name'; "),
        (
            "csv",
            b"machine_id;name\nx;y\n",
            "there is no column 'machine_id', only 'machine_id;name'",
        ),
        ("csv", b"machine_id,machine_id\n", "is there twice"),
        (
            "csv",
            b'machine_id\n"open\n',
            "line 2: unexpected end of data; the quote opened in line 2",
        ),
        ("csv", b"machine_id,\xff\n", "line 1: not UTF-8"),
        ("csv", b"machine_id\n\xff\n", "line 2: not UTF-8"),
        pytest.param("csv", COMPRESSED, "stdin is compressed with gzip", id="csv-gzip"),
        pytest.param("jsonl", COMPRESSED, "stdin is compressed with gzip", id="jsonl-gzip"),
        ("jsonl", b"{\n", "line 1, column 2: the JSON is incomplete"),
        ("jsonl", b"[]\n", "line 1: expected a JSON object, got list"),
        ("jsonl", b"{}\n", "line 1: an entity of machines needs its key field"),
    ],
)
def test_files_that_cannot_be_read(cli: Cli, form: str, data: bytes, message: str) -> None:
    ran = cli("import", "machines", "-", "--format", form, stdin=data)
    assert ran.code == 2
    assert message in ran.err
    assert not Path("data").exists()


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_wrong_name_of_the_key(cli: Cli, form: str) -> None:
    data = b"hostname,name\nx,y\n" if form == "csv" else b'{"hostname": "x"}\n'
    ran = cli("import", "machines", "-", "--format", form, "--key", "hst", stdin=data)
    assert ran.code == 2
    assert "'hst'" in ran.err
    assert "machine_id" not in ran.err


def test_rows_that_are_not_utf8_are_refused(cli: Cli) -> None:
    rows = [
        b"machine_id,name",
        b"m-1,one",
        b"m-2,caf\xe9",
        b'm-3,"two\r\nlines \xe9"',
        b"m-4,four",
    ]
    ran = cli("import", "machines", "-", "--format", "csv", stdin=b"\r\n".join(rows))
    assert ran.code == 2
    assert ran.rows == [{"imported": 2, "skipped": 0, "refused": 2, "last_line": 6}]
    assert [each.partition("stdin, ")[2] for each in ran.err.splitlines()[:2]] == [
        "line 3: not UTF-8",
        "line 4: not UTF-8",
    ]


def test_a_quote_that_is_not_closed_ends_an_import(cli: Cli) -> None:
    rows = [
        b"machine_id,name",
        b"m-1,one",
        b'm-2,"two\nlines"',
        b'm-3,"open',
        b'm-4,"four"',
        b"m-5,",
    ]
    data = b"\n".join(rows)
    ran = cli("import", "machines", "-", "--format", "csv", stdin=data)
    assert ran.code == 2
    # What comes before the place is imported.
    assert ran.rows == [{"imported": 2, "skipped": 0, "refused": 0, "last_line": 4}]
    assert (
        "stdin, line 5: ',' expected after '\"'; the quote opened in line 5 is not closed"
        in ran.err
    )
    assert "the rows up to line 4 of stdin are done; go on with --from-line 5" in ran.err


@pytest.mark.parametrize("name", ["machine_id", "name", "hostname"])
def test_a_field_is_in_one_column(cli: Cli, name: str) -> None:
    data = b'hostname,name,*\nm-1,,"{""%s"": ""x""}"\n' % name.encode()
    words = ("import", "machines", "-", "--format", "csv", "--key", "hostname")
    ran = cli(*words, stdin=data)
    if name == "hostname":  # of this name there is no column in the store
        assert ran.code == 0
        return
    assert ran.code == 2
    assert f"line 2: the column * contains '{name}', which has a column of its own" in ran.err


def test_a_dry_run_says_so(cli: Cli) -> None:
    data = b'{"machine_id": "m-1"}\n'
    words = ("import", "machines", "-", "--format", "jsonl", "--dry-run")
    assert cli(*words, stdin=data).rows == [
        {"imported": 1, "skipped": 0, "refused": 0, "last_line": 1, "dry_run": True}
    ]


def test_the_progress_counts_refused_rows(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0)
    data = b'{"machine_id": "m-1"}\n{}\n'
    ran = cli("import", "machines", "-", "--format", "jsonl", stdin=data)
    assert "hf-async-store: import machines: 2, 1 refused\n" in ran.err


def test_a_first_line_after_the_end_is_an_error(cli: Cli) -> None:
    data = b"".join(map(line, range(3)))
    words = ("import", "machines", "-", "--format", "jsonl", "--from-line")
    ran = cli(*words, "5", stdin=data)
    assert (ran.code, ran.out) == (2, "")
    assert ran.message == "--from-line 5: the last row of stdin ends in line 3"
    ran = cli(*words, "2", stdin=b"")
    assert ran.message == "--from-line 2: there is no row in stdin"
    # All rows are done: that is where an interrupted import may go on.
    assert cli(*words, "4", stdin=data).rows[0]["last_line"] == 3


# -- failures of the store --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "most"),
    [("json:f.json", 150_000), ("sqlite:f.db", 100_000), ("sqlite:f.db", 1_200_000)],
)
def test_a_full_disk_loses_no_row(cli: Cli, location: str, most: int) -> None:
    words = ("import", "machines", "-", "--format", "jsonl", "--store", location)
    cli("init", "--store", location)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        ran = cli(*words, stdin=MACHINES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_failure(cli, ran, words)


def test_the_first_failure_of_a_batch() -> None:
    """Engines that decide each row alone may write rows after one that failed."""
    rows = [Row(number, number, {}) for number in (1, 2, 3)]
    down = UnavailableError("down")
    lost = UnavailableError("lost", outcome_unknown=True)
    refused = AlreadyExistsError("machines", "m")
    beaten = ConcurrencyConflictError("overtaken", retryable=True)
    for outcomes, first, is_partial in (
        ([1, refused, 1], None, False),
        ([1, down, refused], 1, False),
        ([down, 1, refused], 0, True),
        ([1, down, lost], 1, True),
        ([1, 1, beaten], 2, False),
    ):
        found = _failure(rows, outcomes)
        expected = None if first is None else (rows[first], outcomes[first], is_partial)
        assert found == expected


def test_an_export_that_fails_leaves_the_file(filled: Cli) -> None:
    Path("m.csv").write_text("before")
    ran = filled("export", "machines", "--format", "csv", "--output", "m.csv", "--timeout", "1e-9")
    assert ran.code == 4
    assert Path("m.csv").read_text() == "before"
    assert sorted(os.listdir()) == ["data", "m.csv"]


def test_an_export_to_a_folder_is_refused(filled: Cli) -> None:
    Path("out").mkdir()
    ran = filled("export", "machines", "--format", "csv", "--output", "out")
    assert (ran.code, ran.message) == (2, "--output out is a folder: name a file in it")


def test_an_export_to_a_full_disk_names_the_file(
    filled: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every write to this file fails as on a full disk.
    Path("m.csv.7.partial").symlink_to("/dev/full")
    monkeypatch.setattr(os, "getpid", lambda: 7)
    ran = filled("export", "machines", "--format", "csv", "--output", "m.csv")
    assert ran.code == 4
    assert ran.message.startswith("cannot write m.csv: No space left on device; ")
    assert sorted(os.listdir()) == ["data"]


def test_ctrl_c_leaves_whole_batches(cli: Cli) -> None:
    cli("init")
    with subprocess.Popen(
        [*PROGRAM, "import", "machines", "-", "--format", "jsonl"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"".join(map(line, range(2500))))
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while cli("count", "machines").out != "2000\n":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)  # while it waits for the rest of the third batch
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out)["last_line"] == 2000
    assert b"go on with --from-line 2001" in err
    assert cli("count", "machines").out == "2000\n"
    data = b"".join(map(line, range(2500)))
    words = ("import", "machines", "-", "--format", "jsonl", "--from-line", "2001")
    assert cli(*words, stdin=data).rows[0] == {
        "imported": 500,
        "skipped": 0,
        "refused": 0,
        "last_line": 2500,
    }
    assert cli("count", "machines").out == "2500\n"


def test_memory_is_constant(cli: Cli) -> None:
    """Twenty times as many rows need at most 24 MB more."""
    cli("init", "--store", "sqlite:m.db")
    code = (
        "import resource, sys\nfrom hf_async_store.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    )
    peaks = []
    for number in (2000, 40_000):
        with open("rows", "wb") as file:
            file.writelines(
                b'{"machine_id": "m-%d-%d", "name": "%s"}\n' % (number, each, b"x" * 1000)
                for each in range(number)
            )
        words = ("import", "machines", "rows", "--format", "jsonl", "--store", "sqlite:m.db")
        ran = shell(*words, program=[PROGRAM[0], "-c", code])
        assert ran.code == 0
        peaks.append(int(ran.err.split()[-1]))
    assert peaks[1] - peaks[0] < 24 << 10
