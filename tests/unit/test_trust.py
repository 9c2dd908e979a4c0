"""Untrusted input: configurations, locations of stores, and stored data that is never executed."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hf_async_store import (
    CorruptionError,
    JSONStorageStrategy,
    MigrationError,
    MigrationTool,
    SQLStorageStrategy,
    StorageError,
    StoreClosedError,
    load_config,
    open_store,
)
from hf_async_store.changes import Record
from hf_async_store.config import (
    ConfigurationError,
    DynamoDBConfig,
    JSONConfig,
    MemoryConfig,
    SQLConfig,
    StorageConfig,
    load_migration,
    redacted,
)
from hf_async_store.migration import live
from hf_async_store.migration.checkpoint import Checkpoint, CheckpointFile, Progress
from hf_async_store.migration.live import LiveMigration
from hf_async_store.migration_routing import MIGRATION_KEY, MigrationRouter, migration_state_in
from hf_async_store.schema import SYSTEM_COLLECTIONS
from hf_async_store.strategies.json.journal import FileState, Fold, Head, control, record
from hf_async_store.strategies.memory import MemoryEngine
from hf_async_store.strategy import StorageStrategy, schema_of
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS
from hf_async_store.testing.repetitions import repetitions
from hf_async_store.values import Key

FEW = settings(
    max_examples=repetitions(200), suppress_health_check=list(HealthCheck), deadline=None
)
MANY = settings(max_examples=20_000, suppress_health_check=list(HealthCheck), deadline=None)

# -- an application's own file --------------------------------------------------------------


def test_other_settings_of_an_application_are_ignored(tmp_path: Path) -> None:
    app = {
        "scheduler": {"type": "hostfactory"},
        "strategy": "of something else",
        "launch_strategy": {"a": "${NOT_SET}"},
        "storage": {"strategy": "json", "json_strategy": {"base_path": "data"}},
        "migration": {"batch_size": 7},
    }
    file = tmp_path / "app.json"
    file.write_text(json.dumps(app))
    for source in (app, file, str(file)):
        loaded = load_config(source)
        assert loaded.options == JSONConfig(base_path="data")
        assert loaded.migration.batch_size == 7


def test_null_stands_for_the_default() -> None:
    block: dict[str, Any] = {
        "type": "sqlite",
        "name": "x.db",
        "username": None,
        "port": None,
        "password": None,
    }
    assert load_config({"sql_strategy": block}).options == SQLConfig(name="x.db")
    files = {"filenames": {"single_file": None, "split_files": {"templates": None}}}
    assert load_config({"json_strategy": files}).options == JSONConfig()
    assert load_config({"json_strategy": None}).options == JSONConfig()
    nothing = {"storage": {"strategy": None, "json_strategy": {}, "follow_moves": None}}
    assert load_config({**nothing, "migration": None}) == load_config({"json_strategy": {}})
    assert load_config({"dynamodb_strategy": {"auto_scaling": None}}).options == DynamoDBConfig()


def test_a_migration_block_alone_is_for_a_migration(tmp_path: Path) -> None:
    block = {"migration": {"batch_size": 7}}
    file = tmp_path / "migration.json"
    file.write_text(json.dumps(block))
    for source in (block, file, str(file)):
        assert load_migration(source).batch_size == 7
        assert load_config(source).migration.batch_size == 7
        with pytest.raises(ConfigurationError, match="no strategy is named"):
            open_store(source)
        with pytest.raises(ConfigurationError, match="no strategy is named"):
            JSONStorageStrategy(source)
        tool = MigrationTool(f"json:{tmp_path}/a.json", f"json:{tmp_path}/b.json", source)
        assert tool._config.batch_size == 7


# -- places ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("postgresql://app:hunter2@DB1/store?pool_size=3", "postgresql://db1:5432/store"),
        ("postgresql:///store", "postgresql://localhost:5432/store"),
        ("postgresql://me@[::1]:6432/", "postgresql://[::1]:6432/me"),
        ("postgresql://h/a%20b%2Fc", "postgresql://h:5432/a%20b%2Fc"),
        ("dynamodb://us-east-1/app?consistent_reads=no", "dynamodb://us-east-1/app"),
        (
            "dynamodb://r/p?endpoint_url=http://u:p@LOCALHOST:8000/",
            "dynamodb://r/p?endpoint_url=http%3A%2F%2Flocalhost%3A8000",
        ),
    ],
)
def test_a_location_contains_no_secret_and_no_setting(source: str, place: str) -> None:
    assert load_config(source).location() == place


def test_one_file_has_one_location_whatever_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("link").symlink_to("data")
    folder = tmp_path.resolve() / "data"
    for path in ("data/x.json", "./data/../data/x.json", f"{tmp_path}/link/x.json"):
        assert load_config(f"json:{path}").location() == f"json:{folder}/x.json"
    for path in ("data/x.db", f"{tmp_path}/link/x.db"):
        assert load_config(f"sqlite:{path}").location() == f"sqlite:{folder}/x.db"
    assert load_config("json:link").location() == f"json:{folder}"


def test_a_dynamodb_location_without_a_region_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="region"):
        load_config("dynamodb:///app").location()
    with pytest.raises(ConfigurationError, match=r"follow_moves\[0\]: region"):
        load_config({"strategy": "memory", "follow_moves": ["dynamodb:///app"]})


# -- follow_moves ---------------------------------------------------------------------------


def test_follow_moves_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PW", "a/b:c@d?e&f=%41${HOME}")
    url = "postgresql://app:${PW}@db1/store"
    expected = load_config(url)
    assert expected.options.password.reveal() == "a/b:c@d?e&f=%41${HOME}"  # type: ignore[union-attr]
    file = tmp_path / "target.json"
    file.write_text(json.dumps({"storage": {"sql_strategy": {
        "type": "postgresql", "host": "db1", "name": "store", "username": "app", "password": "${PW}"
    }}}))  # fmt: skip
    for each in (url, str(file), json.loads(file.read_text())):
        mapping = {"storage": {"json_strategy": {}, "follow_moves": [each]}}
        assert load_config(mapping).follow_moves == (expected,)
    inner = "postgresql%3A%2F%2Fapp%3A${PW}%40db1%2Fstore"
    by_url = load_config(f"json:data?follow_moves={inner}&cache_size=5&follow_moves=json%3Ax")
    assert by_url.follow_moves == (expected, load_config("json:x"))
    assert by_url.options == load_config("json:data?cache_size=5").options
    router = open_store("json:data", follow_moves=[url]).engine
    assert isinstance(router, MigrationRouter)
    assert router._open_engine(expected.location()) is not None
    assert router._open_engine("postgresql://db2:5432/store") is None
    assert "a/b" not in repr(by_url) + json.dumps(redacted(by_url))


def test_two_configurations_may_name_each_other(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        text = {"json_strategy": {"base_path": one}, "follow_moves": [f"{tmp_path}/{other}.json"]}
        (tmp_path / f"{one}.json").write_text(json.dumps(text))
    loaded = load_config(tmp_path / "a.json")
    assert [each.follow_moves for each in loaded.follow_moves] == [()]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("json:x", "follow_moves: expected array, got string"),
        ({"a": 1}, "follow_moves: expected array, got object"),
        ([5], r"follow_moves\[0\]: a configuration is"),
        (["json:x", "postgresq://u:p@h/db"], r"follow_moves\[1\]: no such configuration file"),
        ([{"json_strategy": {"cache": 1}}], r"follow_moves\[0\]: json_strategy.cache: unknown"),
    ],
)
def test_follow_moves_that_cannot_be_used(given: object, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        load_config({"json_strategy": {}, "follow_moves": given})


# -- the working directory ------------------------------------------------------------------


@pytest.mark.parametrize("url", ["json:data/db.json", "json:data", "sqlite:db.sqlite"])
async def test_a_later_change_of_the_working_directory_has_no_effect(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    store, twin = open_store(url), open_store(url)
    monkeypatch.chdir(tmp_path / "other")
    async with store:
        await store.save_entity("templates", {"template_id": "t"})
        # A migration opens the data again, possibly much later.
        assert isinstance(store.engine, MigrationRouter)
        again = store.engine._open_engine(None)
        assert again is not None
        assert await again.fetch([Key("templates", "t")]) != [None]
        await again.close()
    async with twin:
        assert await twin.get_entity("templates", "t")
        monkeypatch.chdir(tmp_path / "one")
        assert await twin.get_entity("templates", "t")
    assert list((tmp_path / "other").iterdir()) == []


def test_paths_of_a_server_are_made_absolute_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = SQLStorageStrategy("postgresql://h/db?sslmode=verify-full&sslrootcert=ca.pem")
    told = store.describe()["configuration"]
    assert isinstance(told, dict)
    assert told["sslrootcert"] == f"{tmp_path}/ca.pem"
    assert told["name"] == "db"


async def test_a_migration_resolves_its_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    async with open_store("json:a.json") as store:
        await store.save_entity("templates", {"template_id": "t"})
    tool = MigrationTool("json:a.json", "json:b.json")
    monkeypatch.chdir(tmp_path / "other")
    async with tool:
        report = await tool.migrate()
    assert report.verified
    assert list((tmp_path / "other").iterdir()) == []
    assert len(list((tmp_path / "one" / "backups").glob("*.gz"))) == 1


async def test_a_checkpoint_is_not_written_through_a_symbolic_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    source, target = open_store(f"json:{tmp_path}/a.json"), open_store(f"json:{tmp_path}/b.json")
    file = CheckpointFile(tmp_path, source, target)
    file.path.with_name(f".{file.path.name}.tmp").symlink_to(victim)
    with pytest.raises(StorageError, match=r"write .*checkpoint"):
        await file.save(Checkpoint(file.pair, 7, None, None, {}))
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["../victim.json", "/etc/hostname", "a/b.json", "..", "a\0b"])
@pytest.mark.parametrize("kind", ["head", "fold"])
async def test_a_journal_that_names_a_file_outside_its_folder_is_refused(
    name: str, kind: str, tmp_path: Path
) -> None:
    """The files that a journal names are read and replaced."""
    folder = tmp_path / "data"
    victim = tmp_path / "victim.json"
    victim.write_text("{}")
    state = FileState(None, 0, ours=True, collection="templates")
    body = Head(1, {name: state}) if kind == "head" else Fold({name: state})
    records = [] if kind == "head" else [record(*control(Head(1, {})), 0)]
    records.append(record(*control(body), len(records)))
    async with open_store(f"json:{folder}") as store:
        journal = store._json.files.journal(1)  # type: ignore[attr-defined]
        folder.mkdir()
        journal.write_bytes(b"".join(records))
        with pytest.raises(CorruptionError, match="names the file"):
            await store.get_entity("templates", "t")
        with pytest.raises(CorruptionError, match="names the file"):
            await store.save_entity("templates", {"template_id": "t"})
        assert "names the file" in str((await store.health())["problems"])
    assert victim.read_text() == "{}"


# -- what is read is data: any bytes --------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
NAMES = st.sampled_from(
    sorted(
        {"storage", "strategy", "migration", "follow_moves", "filenames", "split_files"}
        | {f"{each}_strategy" for each in ("json", "sql", "dynamodb", "memory", "acme")}
        | {name for model in (JSONConfig, SQLConfig, DynamoDBConfig) for name in model.__struct_fields__}
    )
)  # fmt: skip
WORDS = st.sampled_from(
    ["json", "sql", "sqlite", "${", "${X", "${X:-1}", "$${", "json:x", "a/b", "\0", "\ud800", "http://h"]
)  # fmt: skip
MAPPINGS = st.recursive(
    SCALARS | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
_PARTS = (
    "json: sqlite: postgresql:// dynamodb:// memory: a u:p@ [ ] :1 / // ? & = % %41 %FF "
    "${X} ${X:-y} $${ \0 \ud800 follow_moves= name= port= filenames. @ #"
)
URLS = st.builds(
    "".join,
    st.lists(
        st.sampled_from(
            _PARTS.split()
        )
        | st.text(max_size=3),
        max_size=10,
    ),
)  # fmt: skip
PHASES = ["COPYING", "CUTTING_OVER", "SWITCHED", "ROLLING_BACK", "FINALIZED"]
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["source", "target"]) | MAPPINGS,
        "phase": st.sampled_from(PHASES) | MAPPINGS,
        "other": st.sampled_from(["json:/x", "sqlite:y"]) | URLS | MAPPINGS,
        "epoch": st.integers(0, 9) | MAPPINGS,
        "term": st.integers(0, 9) | MAPPINGS,
        "version": st.integers(0, 9) | MAPPINGS,
    },
)  # fmt: skip


def loads_or_is_refused(source: Any) -> None:
    try:
        loaded = load_config(source)
        loaded.location()
    except ConfigurationError:
        return
    assert isinstance(loaded, StorageConfig)
    assert json.dumps(redacted(loaded))
    assert repr(loaded)


def a_move_or_corruption(record: Any) -> None:
    try:
        move = migration_state_in(Record(MIGRATION_KEY, record))
    except CorruptionError as exc:
        assert "'move' of hf_move" in str(exc)
        return
    assert move is not None
    assert re.fullmatch("[!-~]+", move.other_location)


def _file_is_refused_or_loads(folder: Path, data: bytes) -> None:
    file = folder / "config.json"
    file.write_bytes(data)
    loads_or_is_refused(file)


class Fuzz:
    """Each fuzz test exists twice: a short one here, and a longer one in `make test-long`."""

    @staticmethod
    def mapping(source: Any) -> None:
        loads_or_is_refused(source if isinstance(source, dict) else {"storage": source})

    @staticmethod
    def file(data: bytes, mapping: Any, at: int) -> None:
        import tempfile

        text = msgspec.json.encode(mapping) if _is_json(mapping) else b"{}"
        with tempfile.TemporaryDirectory() as folder:
            for each in (data, text, text[:at] + data + text[at:], b"[" * 100_000):
                _file_is_refused_or_loads(Path(folder), each)

    @staticmethod
    def checkpoint(record: Any, data: bytes, at: int) -> None:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(_checkpoint(Path(folder), record, data, at))


def _is_json(value: Any) -> bool:
    try:
        msgspec.json.encode(value)
    except (ValueError, TypeError, OverflowError):  # lone surrogates, large integers
        return False
    return True


async def _checkpoint(folder: Path, record: Any, data: bytes, at: int) -> None:
    source, target = open_store(f"json:{folder}/a.json"), open_store(f"json:{folder}/b.json")
    file = CheckpointFile(folder, source, target)
    good = Checkpoint(file.pair, 7, None, None, {"templates": Progress("c", 1, "d")})
    plain = {**msgspec.to_builtins(good), **(record if isinstance(record, dict) else {})}
    text = msgspec.json.encode(plain) if _is_json(plain) else b""
    for each in (data, text, text[:at] + data + text[at:], b"[" * 100_000, b'{"a":' * 100_000):
        file.path.write_bytes(each)
        try:
            found = await file.read()
        except StorageError as exc:
            assert str(file.path) in str(exc)
        else:
            assert isinstance(found, Checkpoint)


CHECKPOINTS = st.dictionaries(
    st.sampled_from(["pair", "batch_size", "rule", "merge", "collections", "backup", "format"]),
    MAPPINGS,
)


@FEW
@given(MAPPINGS)
@example({"storage": {"strategy": "json", "json_strategy": {"base_path": "\ud800"}}})
def test_any_mapping(source: Any) -> None:
    Fuzz.mapping(source)


@pytest.mark.long
@MANY
@given(MAPPINGS)
def test_any_mapping_for_long(source: Any) -> None:
    Fuzz.mapping(source)


@FEW
@given(URLS)
@example("json:\ud800")
@example("dynamodb://\ud800/x")
@example("postgresql://[/x")
def test_any_url(url: str) -> None:
    loads_or_is_refused(url)


@pytest.mark.long
@MANY
@given(URLS)
def test_any_url_for_long(url: str) -> None:
    loads_or_is_refused(url)


@FEW
@given(st.binary(max_size=40), MAPPINGS, st.integers(0, 60))
def test_any_file(data: bytes, mapping: Any, at: int) -> None:
    Fuzz.file(data, mapping, at)


@pytest.mark.long
@MANY
@given(st.binary(max_size=40), MAPPINGS, st.integers(0, 60))
def test_any_file_for_long(data: bytes, mapping: Any, at: int) -> None:
    Fuzz.file(data, mapping, at)


@FEW
@given(RECORDS | MAPPINGS)
@example({"other": "json:/x", "role": "source", "phase": "COPYING", "epoch": 1, "term": 1})
@example({"role": "\ud800"})
@example({"\ud800": 1})
@example({"other": "json:\ud800", "role": "source", "phase": "COPYING", "epoch": 1, "term": 1})
@example({"other": "json:x", "role": "source", "phase": "COPYING", "epoch": 2**64, "term": 1})
def test_any_migration_record(record: Any) -> None:
    a_move_or_corruption(record)


@pytest.mark.long
@MANY
@given(RECORDS | MAPPINGS)
def test_any_migration_record_for_long(record: Any) -> None:
    a_move_or_corruption(record)


@FEW
@given(CHECKPOINTS, st.binary(max_size=40), st.integers(0, 60))
def test_any_checkpoint(record: Any, data: bytes, at: int) -> None:
    Fuzz.checkpoint(record, data, at)


@pytest.mark.long
@MANY
@given(CHECKPOINTS, st.binary(max_size=40), st.integers(0, 60))
def test_any_checkpoint_for_long(record: Any, data: bytes, at: int) -> None:
    Fuzz.checkpoint(record, data, at)


# -- a strategy that cannot follow a migration ----------------------------------------------


class _SharedEngine(MemoryEngine):
    """The engine of a third-party strategy, which declares that it is shared by processes."""

    capabilities = msgspec.structs.replace(
        MemoryEngine.capabilities, multi_process=True, durable=True
    )


class _ThirdPartyStrategy(StorageStrategy):
    """Implements only the required methods of a strategy."""

    def __init__(self) -> None:
        schema = schema_of([*CONTRACT_COLLECTIONS, *SYSTEM_COLLECTIONS])
        super().__init__(_SharedEngine(schema, MemoryConfig()), schema)


async def test_a_live_migration_refuses_a_strategy_that_does_not_follow_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "open_store", lambda *_, **__: _ThirdPartyStrategy())
    migration = LiveMigration("json:a", "json:b", collections=CONTRACT_COLLECTIONS)
    with pytest.raises(MigrationError, match="does not follow live migrations"):
        await migration.__aenter__()


async def test_a_router_opens_no_engine_after_its_close(tmp_path: Path) -> None:
    store = open_store(f"json:{tmp_path}/db.json")
    async with store:
        await store.save_entity("templates", {"template_id": "t"})
    assert isinstance(store.engine, MigrationRouter)
    with pytest.raises(StoreClosedError):
        store.engine._engine_at(None)
