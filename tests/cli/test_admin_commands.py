"""init, health, describe, checkpoint, demo, and how a store and its collections are named."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command import absolute

from hf_async_store import open_store
from hf_async_store.strategies.sql import sqlite

if TYPE_CHECKING:
    from command import Cli

# -- init -----------------------------------------------------------------------------------


def test_init_creates_an_empty_store_once(cli: Cli) -> None:
    ran = cli("init")
    made = [absolute("data/db.json")]
    assert (ran.code, ran.rows) == (0, [{"store": "data/db.json", "created": made}])
    assert json.loads(Path("data/db.json").read_bytes()) == {}
    assert Path("data/db.json").stat().st_mode & 0o777 == 0o600
    assert cli("count", "machines").out == "0\n"
    again = cli("init")
    assert (again.code, again.rows) == (0, [{"store": "data/db.json", "created": []}])


def test_init_keeps_an_existing_store(filled: Cli) -> None:
    assert filled("init").rows[0]["created"] == []
    assert filled("count", "machines").out == "3\n"


def test_init_keeps_commits_in_the_journal(cli: Cli) -> None:
    async def commit_and_die() -> None:
        store = await open_store("json:data/db.json").open()
        await store.save_entity("templates", {"template_id": "t-1"})
        # The files are as if the process had been killed here.
        journal = next(Path("data").glob("*.journal.*"))
        Path("kept").write_bytes(journal.read_bytes())
        await store.close()
        for each in Path("data").iterdir():
            each.unlink()
        Path("kept").rename(journal)

    asyncio.run(commit_and_die())
    assert cli("init").rows[0]["created"] == []
    assert cli("get", "templates", "t-1").code == 0


def test_init_of_split_and_compressed_files(cli: Cli) -> None:
    made = cli("init", "--store", "json:split").rows[0]["created"]
    names = ("templates", "requests", "machines")
    assert made == [absolute(f"split/{name}.json") for name in names]
    Path("split/requests.json").unlink()
    assert cli("init", "--store", "json:split").rows[0]["created"] == [
        absolute("split/requests.json")
    ]
    made = cli("init", "--store", "json:z/db.json?enable_compression=yes").rows[0]["created"]
    assert made == [absolute("z/db.json.gz")]
    assert cli("health", "--store", "json:z/db.json?enable_compression=yes").rows[0]["ok"] is True


def test_init_of_another_engine(cli: Cli) -> None:
    assert cli("init", "--store", "memory:").rows == [{"store": "memory", "ready": True}]
    [row] = cli("init", "--store", "sqlite:jobs.db?table_prefix=x_").rows
    assert row == {"store": f"path {absolute('jobs.db')}, table_prefix x_", "ready": True}


# -- health, describe, checkpoint -----------------------------------------------------------


def test_health(filled: Cli) -> None:
    ran = filled("health")
    [report] = ran.rows
    assert (ran.code, ran.err, report["ok"]) == (0, "", True)
    assert report["entities"] == {"templates": 1, "requests": 2, "machines": 3}


def test_health_of_a_damaged_store(filled: Cli) -> None:
    Path("data/db.json").write_text('{"machines": {')
    ran = filled("health")
    assert ran.code == 4
    assert ran.rows[0]["ok"] is False
    assert f"hf-async-store: problem: {absolute('data/db.json')}" in ran.err


@pytest.mark.parametrize("url", ["json:data/db.json", "sqlite:data/store.db"])
@pytest.mark.parametrize("command", ["health", "top"])
def test_too_little_disk_space_is_a_problem(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, url: str, command: str
) -> None:
    words = (
        command,
        "--store",
        url,
        *(["--once", "--interval", "0.01"] if command == "top" else []),
    )
    assert cli("put", "templates", '{"template_id": "t"}', "--store", url).code == 0
    assert cli(*words).code == 0
    monkeypatch.setattr(sqlite, "_CHECKPOINT_BYTES", 1 << 62)
    if url.startswith("json"):
        words = tuple(
            [f"{each}?write_buffer_size={1 << 62}" if each == url else each for each in words]
        )
    ran = cli(*words)
    assert ran.code == 4
    assert "bytes left, and the store may need " in ran.err + ran.out


def test_describe_shows_no_secret(cli: Cli) -> None:
    ran = cli("describe")
    assert ran.code == 0
    assert ran.rows[0]["collections"]["machines"]["key"] == "machine_id"
    assert not Path("data").exists()


def test_checkpoint(filled: Cli) -> None:
    filled("update", "machines", "m-1", "status=GONE")
    ran = filled("checkpoint")
    assert (ran.code, ran.rows) == (0, [{"store": "data/db.json", "recovered_from": None}])
    assert json.loads(Path("data/db.json").read_bytes())["machines"]["m-1"]["status"] == "GONE"


def replaced_by_hand(cli: Cli) -> None:
    """Replace a data file while the journal contains a commit."""

    async def make() -> None:
        store = await open_store("json:data/db.json").open()
        await store.save_entity("templates", {"template_id": "t-1"})
        await store.checkpoint()  # type: ignore[attr-defined]
        await store.save_entity("templates", {"template_id": "t-2"})
        Path("data/db.json").write_text('{"templates": {"t-3": {"template_id": "t-3"}}}')
        await store.close()

    asyncio.run(make())
    ran = cli("get", "templates", "t-1")
    assert ran.code == 4
    assert "`hf-async-store checkpoint --recover-from file`" in ran.message
    assert "`--recover-from journal`" in ran.message


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("which", "there"), [("file", ["t-3"]), ("journal", ["t-2", "t-3"])])
def test_checkpoint_resolves_a_replaced_file(cli: Cli, which: str, there: list[str]) -> None:
    replaced_by_hand(cli)
    ran = cli("checkpoint", "--recover-from", which)
    assert (ran.code, ran.rows[0]["recovered_from"]) == (0, which)
    assert [each["template_id"] for each in cli("query", "templates").rows] == there


def test_checkpoint_recovers_the_readable_part(cli: Cli) -> None:
    async def make() -> None:
        store = await open_store("json:data/db.json").open()
        await store.save_entity("templates", {"template_id": "t-1"})
        [journal] = Path("data").glob("db.json.journal.*")
        journal.write_bytes(journal.read_bytes() + b"\0" * 512)
        await store.close()

    asyncio.run(make())
    ran = cli("get", "templates", "t-1")
    assert ran.code == 4
    assert "`hf-async-store checkpoint --recover-from salvage`" in ran.message
    ran = cli("checkpoint", "--recover-from", "salvage")
    assert (ran.code, ran.rows[0]["recovered_from"]) == (0, "salvage")
    assert cli("get", "templates", "t-1").code == 0
    assert [each.name for each in Path("data").glob("*.damaged.*")] == ["db.json.damaged.00000001"]


def test_checkpoint_of_another_engine(cli: Cli) -> None:
    Path("x").write_text("{}")
    for command in (["checkpoint"], ["backup", "--copy"], ["backups"], ["restore", "x"]):
        ran = cli(*command, "--store", "memory:")
        assert ran.code == 2
        assert ran.message == (
            "this command is only for JSON stores; the engine of this store is memory"
        )


# -- which store ----------------------------------------------------------------------------


def test_the_store_may_be_named_before_or_after(
    filled: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ASYNC_STORE")
    for words in (
        ["--store", "json:data/db.json", "count", "machines"],
        ["count", "--store", "json:data/db.json", "machines"],
        ["count", "machines", "--store=json:data/db.json"],
    ):
        assert filled(*words).out == "3\n"


def test_the_option_overrides_the_environment(filled: Cli) -> None:
    assert filled("init", "--store", "json:other.json").code == 0
    assert filled("count", "machines", "--store", "json:other.json").out == "0\n"


def test_a_configuration_file(filled: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    block = {"base_path": "data", "filenames": {"single_file": "db.json"}}
    storage = {"storage": {"strategy": "json", "json_strategy": block}}
    Path("config.json").write_text(json.dumps(storage))
    assert filled("--config", "config.json", "count", "machines").out == "3\n"
    monkeypatch.setenv("HF_ASYNC_STORE", "config.json")
    assert filled("count", "machines").out == "3\n"


def test_no_store_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ASYNC_STORE")
    ran = cli("count", "machines")
    assert ran.code == 2
    assert ran.message == (
        "no store is named; give --store json:data/request_database.json (or another URL), "
        "--config FILE, or set HF_ASYNC_STORE to either"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"storage": ', "config.json, line 1, column 13: the JSON is incomplete"),
        ('{"storage": {"strategy": "jsn"}}', "config.json: storage.strategy: unknown strategy"),
        (
            '{"storage": {"strategy": "json", "json_strategy": {"base_pat": "x"}}}',
            "config.json: storage.json_strategy.base_pat: unknown key (known: storage_type",
        ),
        (
            '{"storage": {"strategy": "json", "json_strategy": {"cache_size": "x"}}}',
            "config.json: storage.json_strategy.cache_size: expected integer, got string",
        ),
        ('{"templates": {}}', "config.json: not a configuration: it has no key 'storage'"),
    ],
)
def test_a_configuration_that_is_wrong(cli: Cli, text: str, told: str) -> None:
    Path("config.json").write_text(text)
    ran = cli("count", "machines", "--config", "config.json")
    assert ran.code == 2
    assert told in ran.message


def test_other_ways_to_name_a_store_wrongly(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    both = cli("count", "machines", "--store", "json:x.json", "--config", "c.json")
    assert (both.code, both.message) == (2, "give either --store or --config, not both")
    for option in ("--store", "--config"):
        empty = cli("count", "machines", option, "")
        assert empty.code == 2
        assert empty.message == (
            "--store or --config is empty: is a variable of the shell not set?"
        )
    missing = cli("count", "machines", "--config", "c.json")
    assert (missing.code, missing.message[:37]) == (2, "no such configuration file 'c.json'; ")
    typo = cli("count", "machines", "--store", "jsn:x.json")
    assert typo.code == 2
    assert "did you mean 'json:'?" in typo.message
    monkeypatch.setenv("HF_ASYNC_STORE", "json:")
    assert cli("count", "machines").message.startswith("HF_ASYNC_STORE: json: URL: expected json:")


# -- which collections ----------------------------------------------------------------------

MINE = """
from hf_async_store import Collection, Field
ORDERS = Collection("orders", key="order_id", fields=[Field("total", "number"), "state"])
ALL = [ORDERS, Collection("parts", key="part_id", fields=[Field("order_id", references="orders")])]
EMPTY = []
TEXT = "orders"
"""


@pytest.fixture
def mine(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", ".")])
    (workplace / "mine.py").write_text(MINE)
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.mark.usefixtures("mine")
def test_collections_of_ones_own(cli: Cli) -> None:
    own = ["--collections", "mine:ALL"]
    assert cli("put", "orders", '{"order_id": "o-1", "total": 2.5}', *own).code == 0
    assert cli("put", "parts", '{"part_id": "p-1", "order_id": "o-1"}', *own).code == 0
    assert cli(*own, "query", "orders", "total:gt=2").rows[0]["order_id"] == "o-1"
    assert cli("delete", "orders", "o-1", *own).code == 3
    assert cli("count", "orders", "--collections", "mine:ORDERS").out == "1\n"
    unknown = cli("get", "machines", "m-1", *own)
    assert unknown.message.startswith("no collection 'machines'; declared are: orders, parts")


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("mine", "--collections mine: expected MODULE:NAME"),
        ("nope:ALL", "ModuleNotFoundError: No module named 'nope'"),
        ("mine:NOPE", "AttributeError: module 'mine' has no attribute 'NOPE'"),
        ("mine:TEXT", "TEXT to be a Collection or a non-empty list of Collection, got str"),
        ("mine:EMPTY", "EMPTY to be a Collection or a non-empty list of Collection, got list"),
    ],
)
def test_collections_that_cannot_be_loaded(cli: Cli, named: str, told: str) -> None:
    ran = cli("count", "orders", "--collections", named)
    assert ran.code == 2
    assert told in ran.message
