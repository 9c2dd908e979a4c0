"""`export`, `import` and `top` on the engines that are servers."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from command import MACHINES, PROGRAM, check_failure, shell

if TYPE_CHECKING:
    from collections.abc import Iterator

    from command import Cli

    from hf_async_store_bench.servers import PostgresServer


@pytest.fixture(params=["postgresql", "dynamodb"])
def server_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty store."""
    if request.param == "postgresql":
        postgres = request.getfixturevalue("postgres_server")
        url: str = postgres.database()
        yield url
        postgres.drop(url)
    else:
        dynamodb = request.getfixturevalue("dynamodb_server")
        prefix = f"t{uuid4().hex[:8]}"
        yield f"dynamodb://us-east-1/{prefix}?endpoint_url={dynamodb.endpoint_url}"
        dynamodb.drop_tables(prefix)


def test_an_import_there_and_an_export_back(
    filled: Cli, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    filled("update", "requests", "r-1", "machine_count=4", '["odd"]:={"a": [1, 1.5, null]}')
    there = ("--store", server_url)
    keep = ("--format", "csv", "--keep-versions")
    filled("export", "requests", "--format", "csv", "--output", "r.csv")
    ran = shell("import", "requests", "r.csv", *keep, *there)
    assert (ran.code, ran.rows[0]["imported"]) == (0, 2)
    ran = filled("import", "requests", "r.csv", *keep, *there)
    assert (ran.code, ran.rows[0]["refused"]) == (3, 2)
    ran = filled("import", "requests", "r.csv", *keep, "--skip-existing", *there)
    assert (ran.code, ran.rows[0]["skipped"]) == (0, 2)
    ran = filled("import", "requests", "r.csv", "--format", "csv", "--update", *there)
    assert (ran.code, ran.rows[0]["imported"]) == (0, 2)
    words = ("import", "requests", "r.csv", *keep, "--replace", *there)
    assert filled(*words).rows[0]["imported"] == 2
    assert filled("export", "requests", "--format", "csv", "--output", "back.csv", *there).code == 0
    copy = ("--store", "json:copy.json")
    assert filled("import", "requests", "back.csv", *keep, *copy).code == 0
    seen = [filled("query", "requests", "--order", "request_id", *each).rows for each in ((), copy)]
    before, after = (json.dumps(each, sort_keys=True) for each in seen)
    assert before == after
    ran = shell("top", "--once", "--interval", "0.1", *there)
    assert ran.code == 0
    [sample] = ran.rows
    assert sample["collections"]["requests"]["entities"] == 2
    assert sample["collections"]["requests"]["claims"] == 0


def fail(server: PostgresServer, url: str, state: str, condition: str) -> None:
    """Let the server refuse to insert machines that meet a condition, with an SQLSTATE."""
    failure = f"RAISE EXCEPTION 'it failed' USING ERRCODE = '{state}'"
    body = f"BEGIN IF {condition} THEN {failure}; END IF; RETURN NEW; END"
    for each in (
        f"CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$",
        'CREATE TRIGGER fail BEFORE INSERT ON "machines-entities" FOR EACH ROW EXECUTE FUNCTION fail()',
    ):
        server.run(each, url)


@pytest.mark.parametrize(
    ("state", "code"),
    # A full disk, a role that may not log in any more, a database that was dropped.
    [("53100", 4), ("28000", 2), ("57P04", 2)],
)
def test_a_server_that_fails_loses_no_row(
    cli: Cli, postgres_server: PostgresServer, state: str, code: int
) -> None:
    url = postgres_server.database()
    words = ("import", "machines", "-", "--format", "jsonl", "--store", url)
    cli("init", "--store", url)
    fail(postgres_server, url, state, "NEW.machine_id = 'm-001700'")
    ran = cli(*words, stdin=MACHINES)
    postgres_server.run('DROP TRIGGER fail ON "machines-entities"', url)
    check_failure(cli, ran, words, code)
    assert ran.rows[0]["last_line"] == 1000
    postgres_server.drop(url)


def test_a_put_ends_when_the_server_fails(cli: Cli, postgres_server: PostgresServer) -> None:
    url = postgres_server.database()
    cli("init", "--store", url)
    fail(postgres_server, url, "28000", "true")
    ran = cli("put", "machines", "--store", url, stdin=MACHINES)
    assert ran.code == 2
    assert "2,500 entities were not written" in ran.err
    postgres_server.drop(url)


def test_top_goes_on_after_a_failure(cli: Cli, postgres_server: PostgresServer) -> None:
    url = postgres_server.database()
    name = urlsplit(url).path[1:]
    assert cli("init", "--store", url).code == 0

    def allow(how: str) -> None:
        postgres_server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {how}")
        gone = f"FROM pg_stat_activity WHERE datname = '{name}'"
        postgres_server.run(f"SELECT pg_terminate_backend(pid, 5000) {gone}")

    words = [*PROGRAM, "top", "--interval", "0.1", "--store", url]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines: Iterator[dict[str, Any]] = map(json.loads, process.stdout)
        assert "error" not in next(lines)
        allow("false")
        failed = next(each for each in lines if "error" in each)
        assert failed.keys() == {"time", "error"}
        allow("true")
        back = next(each for each in lines if "error" not in each)
        assert back["time"] > failed["time"]
        assert back["health"]["problems"] == []
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    postgres_server.drop(url)
