"""Commands that need an existing store: mistyped names, undeclared collections, shrinking backups."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest
from command import STORE, Cli

from hf_async_store import Collection, open_store

ENGINES = ("json-single", "json-split", "sqlite", "postgresql", "dynamodb")
Url = Callable[[str], str]


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Url:
    """Returns the URL of a store that does not exist yet."""

    def make(engine: str) -> str:
        if engine == "postgresql":
            server = request.getfixturevalue("postgres_server")
            found: str = server.database()
            request.addfinalizer(lambda: server.drop(found))
            return found
        if engine == "dynamodb":
            endpoint = request.getfixturevalue("dynamodb_server").endpoint_url
            return f"dynamodb://us-east-1/c{secrets.token_hex(4)}?endpoint_url={endpoint}"
        return {"json-single": "json:x/a.json", "json-split": "json:x", "sqlite": "sqlite:x.db"}[
            engine
        ]

    return make


def _exists(url: str) -> bool:
    async def ask() -> bool:
        async with open_store(url) as store:
            return await store.exists()

    return asyncio.run(ask())


@pytest.mark.hf_sampled
@pytest.mark.parametrize("engine", ENGINES)
def test_a_mistyped_store_is_reported_and_not_created(engine: str, url: Url, cli: Cli) -> None:
    place = url(engine)
    for words in (
        ["get", "machines", "m-1"],
        ["query", "machines"],
        ["count", "machines"],
        ["update", "machines", "m-1", "status=X"],
        ["delete", "machines", "m-1"],
        ["health"],
        ["backup", "b/"],
    ):
        ran = cli(*words, "--store", place)
        assert ran.code == 1, (words, ran)
        assert ran.message.startswith("there is no store at ")
        assert "`hf-async-store init`" in ran.message
        assert ran.out == ""
    for words in (
        ["migrate", "--from", place, "--to", "json:target.json"],
        ["migrate", "--from", place, "--to", "json:target.json", "--dry-run"],
        ["migrate", "--from", place, "--to", "json:target.json", "--resume"],
        ["verify", "--from", place, "--to", "json:target.json"],
    ):
        ran = cli(*words)
        assert ran.code == 1, (words, ran)
        assert "there is no store at the source" in ran.message
        assert "mistyped" in ran.message
    assert not _exists(place)
    assert [each for each in os.listdir() if each.startswith(("x", "b", "target"))] == []


@pytest.mark.hf_sampled
@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_put_reports_that_it_created_a_store(engine: str, url: Url, cli: Cli) -> None:
    place = url(engine)
    ran = cli("put", "templates", '{"template_id": "t-1"}', "--store", place)
    assert ran.code == 0
    assert ran.message.startswith("note: a new store was created at ")
    assert cli("put", "templates", '{"template_id": "t-2"}', "--store", place).err == ""
    assert cli("count", "templates", "--store", place).out == "2\n"


def test_a_backup_that_is_not_there(cli: Cli) -> None:
    cli("init")
    for words in (["verify", "gone.jsonl.gz"], ["restore", "gone.jsonl.gz"]):
        ran = cli(*words)
        assert ran.code == 1
        assert "the backup gone.jsonl.gz does not exist" in ran.message


def test_a_pipe_is_refused_as_a_backup(filled: Cli) -> None:
    os.mkfifo("pipe")
    for words in (["verify", "pipe"], ["restore", "pipe"]):
        ran = filled(*words)
        assert ran.code == 2
        assert "pipe" in ran.message


# -- what nobody declares ---------------------------------------------------------------------------

_OWN = [
    Collection("templates", key="template_id", fields=["name", "owner"]),
    Collection("orders", key="order_id"),
]


async def _application(place: str) -> None:
    async with open_store(place, collections=_OWN) as store:
        await store.save_entity("templates", {"template_id": "t-1", "name": "x", "owner": "ops"})
        await store.save_entity("orders", {"order_id": "o-1"})


@pytest.mark.hf_sampled
@pytest.mark.parametrize("engine", ENGINES)
def test_undeclared_collections_need_an_option(engine: str, url: Url, cli: Cli) -> None:
    place = url(engine)
    asyncio.run(_application(place))
    to = ["--to", "json:target.json"]
    spec = ["--collections", "hf_async_store:HOST_FACTORY"]
    commands = [
        ["backup", "b.jsonl.gz", "--store", place, *spec],
        ["migrate", "--from", place, *to, "--no-backup", *spec],
    ]
    lost = ["orders"]
    leave_out = [word for each in lost for word in ("--leave-out", each)]
    for words in commands:
        ran = cli(*words)
        assert ran.code == 2, ran
        assert all(each in ran.message for each in lost)
        assert "--leave-out NAME" in ran.message
    assert not Path("b.jsonl.gz").exists()
    assert not Path("target.json").exists()
    for words in commands:
        ran = cli(*words, *leave_out)
        assert ran.code == 0, ran
        assert ran.rows[0]["left_out"] == lost
        assert "as requested" in ran.err
    ran = cli("verify", "--from", place, *to, *spec)
    assert ran.code == 2
    assert "orders" in ran.message
    assert cli("verify", "--from", place, *to, *leave_out, *spec).code == 0


@pytest.mark.hf_sampled
@pytest.mark.parametrize("engine", ENGINES)
def test_what_programs_declared_is_backed_up_and_migrated(engine: str, url: Url, cli: Cli) -> None:
    place = url(engine)
    asyncio.run(_application(place))
    ran = cli("backup", "b.jsonl.gz", "--store", place)
    assert (ran.code, ran.rows[0]["entities"]) == (0, {"templates": 1, "orders": 1})
    to = ["--to", "json:target.json"]
    assert cli("migrate", "--from", place, *to, "--no-backup").code == 0
    assert cli("verify", "--from", place, *to).code == 0
    assert cli("count", "orders", "--store", "json:target.json").out == "1\n"
    assert cli("restore", "b.jsonl.gz", "--store", "json:restored.json").code == 0
    assert cli("count", "orders", "--store", "json:restored.json").out == "1\n"


def test_a_backup_of_undeclared_collections_needs_an_option(cli: Cli) -> None:
    asyncio.run(_application("json:a.json"))
    Path("own.py").write_text(
        "from hf_async_store import Collection\n"
        "ALL = [Collection('templates', key='template_id'), Collection('orders', key='order_id')]\n"
    )
    own = ["--collections", "own:ALL"]
    assert cli("backup", "b.jsonl.gz", "--store", "json:a.json", *own).code == 0
    spec = ["--collections", "hf_async_store:HOST_FACTORY"]
    ran = cli("restore", "b.jsonl.gz", "--store", "json:b.json", *spec)
    assert ran.code == 2
    assert "1 entities of 'orders', which is not declared" in ran.message
    assert not Path("b.json").exists()
    ran = cli("restore", "b.jsonl.gz", "--store", "json:b.json", "--leave-out", "orders", *spec)
    assert ran.code == 0
    assert ran.rows[0]["left_out"] == ["orders"]
    assert "left out, as requested: 'orders'" in ran.err


# -- backups that are kept ----------------------------------------------------------------------------


def _put(cli: Cli, count: int) -> None:
    rows = "".join(f'{{"template_id": "t-{n}"}}\n' for n in range(count))
    assert cli("put", "templates", "-", stdin=rows.encode()).code == 0


def _kept() -> list[str]:
    return sorted(str(each) for each in Path("b").iterdir())


@pytest.mark.parametrize("left", [0, 4])
def test_a_much_smaller_backup_removes_no_older_one(left: int, cli: Cli) -> None:
    _put(cli, 10)
    for _ in range(2):
        assert cli("backup", "b/", "--keep", "2").code == 0
    good = _kept()
    assert cli("delete", "templates", *(f"t-{n}" for n in range(left, 10))).code == 0
    ran = cli("backup", "b/", "--keep", "2")
    assert ran.code == 3
    assert ran.rows[0]["removed"] == []
    assert len(ran.rows[0]["spared"]) == 1
    assert "holds far less than an older one" in ran.message
    assert "--allow-smaller" in ran.message
    # After many backups, the last good one is still kept.
    for _ in range(3):
        cli("backup", "b/", "--keep", "2")
        assert set(_kept()) & set(good)
    ran = cli("backup", "b/", "--keep", "2", "--allow-smaller")
    assert ran.code == 0
    assert len(_kept()) == 2
    assert not set(_kept()) & set(good)


def test_a_backup_that_grew_or_shrank_a_little_rotates(cli: Cli) -> None:
    _put(cli, 10)
    for count in (10, 6, 20, 11):
        rows = [f"t-{n}" for n in range(30)]
        cli("delete", "templates", *rows)
        _put(cli, count)
        ran = cli("backup", "b/", "--keep", "1")
        assert (ran.code, ran.err) == (0, "")
        assert len(_kept()) == 1


def test_an_empty_store_may_keep_its_backups(cli: Cli) -> None:
    cli("init")
    for _ in range(4):
        assert cli("backup", "b/", "--keep", "2").code == 0
    assert len(_kept()) == 2


def test_a_migration_to_itself_is_refused_and_deletes_nothing(filled: Cli) -> None:
    Path("link").symlink_to("data")
    for other in (STORE, "json:./data/db.json", "json:link/db.json", "json:data/../data/db.json"):
        for pair in ((STORE, other), (other, STORE)):
            ran = filled("migrate", "--from", pair[0], "--to", pair[1], "--cleanup-source")
            assert ran.code == 4
            assert "source and target are the same store" in ran.message
    assert filled("count", "machines").out == "3\n"
