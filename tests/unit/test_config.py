from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_async_store.config
from hf_async_store.config import (
    AutoScaling,
    DynamoDBConfig,
    Filenames,
    JSONConfig,
    MemoryConfig,
    MigrationConfig,
    Secret,
    SQLConfig,
    StorageConfig,
    StrategyOptions,
    load_config,
    load_migration,
    options_of,
    redacted,
    strategy_config,
)
from hf_async_store.errors import ConfigurationError
from hf_async_store.redaction import redact_url
from hf_async_store.testing.repetitions import repetitions

# -- the spec's blocks, word for word -------------------------------------------------------

SPEC = {
    "json single file": """
{
"storage": {
"strategy": "json",
"json_strategy": {
"storage_type": "single_file",
"base_path": "data",
"filenames": {
"single_file": "request_database.json"
}
}
}
}""",
    "json split files": """
{
"storage": {
"strategy": "json",
"json_strategy": {
"storage_type": "split_files",
"base_path": "data",
"filenames": {
"split_files": {
"templates": "templates.json",
"requests": "requests.json",
"machines": "machines.json"
}
}
}
}
}""",
    "sqlite": """
{
"storage": {
"strategy": "sql",
"sql_strategy": {
"type": "sqlite",
"name": "request_database.db",
"host": "",
"port": 0,
"pool_size": 5,
"max_overflow": 10,
"timeout": 30
}
}
}""",
    "postgresql": """
{
"storage": {
"strategy": "sql",
"sql_strategy": {
"type": "postgresql",
"host": "localhost",
"port": 5432,
"name": "hostfactory",
"username": "hostfactory_user",
"password": "${DB_PASSWORD}",
"pool_size": 20,
"max_overflow": 30,
"timeout": 60
}
}
}""",
    "dynamodb": """
{
"storage": {
"strategy": "dynamodb",
"dynamodb_strategy": {
"region": "us-east-1",
"profile": "production",
"table_prefix": "hostfactory",
"read_capacity": 5,
"write_capacity": 5,
"billing_mode": "PAY_PER_REQUEST"
}
}
}""",
    "dynamodb auto-scaling": """
{
"dynamodb_strategy": {
"auto_scaling": {
"enabled": true,
"min_read_capacity": 1,
"max_read_capacity": 100,
"min_write_capacity": 1,
"max_write_capacity": 100,
"target_utilization": 70
}
}
}""",
    "json optimised": """
{
"json_strategy": {
"enable_compression": true,
"cache_size": 1000,
"write_buffer_size": 64000,
"sync_writes": false
}
}""",
    "sql optimised": """
{
"sql_strategy": {
"pool_size": 20,
"max_overflow": 30,
"pool_timeout": 30,
"pool_recycle": 3600,
"enable_query_cache": true
}
}""",
    "dynamodb optimised": """
{
"dynamodb_strategy": {
"read_capacity": 10,
"write_capacity": 10,
"auto_scaling": true,
"enable_dax": true,
"consistent_reads": false
}
}""",
}

SPEC_MIGRATION = """
{
"migration": {
"batch_size": 100,
"create_backup": true,
"backup_location": "backups/",
"validate_after_migration": true,
"cleanup_source": false,
"parallel_workers": 4
}
}"""


def holds(loaded: object, given: object) -> bool:
    """Whether the loaded configuration contains all given keys with the given values."""
    if isinstance(given, Mapping):
        return all(holds(loaded[name], each) for name, each in given.items())  # type: ignore[index]
    return loaded == given


@pytest.mark.parametrize("name", SPEC)
@pytest.mark.parametrize("as_file", [False, True])
def test_the_blocks_of_the_spec_load_unchanged(
    name: str, as_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", "hidden")
    path = tmp_path / "config.json"
    path.write_text(SPEC[name])
    block = json.loads(SPEC[name])
    config = load_config(str(path) if as_file else block)
    storage = block.get("storage", block)
    storage = {each: value for each, value in storage.items() if each != "strategy"}
    password = storage.get("sql_strategy", {}).pop("password", None)
    assert holds(redacted(config)["storage"], storage)
    assert [f"{config.strategy}_strategy"] == list(storage)
    if password is not None:
        assert isinstance(config.options, SQLConfig)
        assert config.options.password == Secret("hidden")


def test_the_migration_block_of_the_spec_loads_unchanged() -> None:
    block = json.loads(SPEC_MIGRATION)
    assert holds(redacted(load_migration(block)), block["migration"])
    assert load_migration(block["migration"]) == load_migration(block)


def test_a_file_loads_from_a_path_object_too(tmp_path: Path) -> None:
    path = tmp_path / "store.conf"
    path.write_text(SPEC["sqlite"])
    assert load_config(path) == load_config(str(path))


# -- shapes ---------------------------------------------------------------------------------


def test_a_loaded_configuration_is_returned_unchanged() -> None:
    config = load_config("memory:")
    assert load_config(config) is config
    options = JSONConfig(base_path="here")
    assert load_config(options) == StorageConfig(strategy="json", options=options)


@pytest.mark.parametrize(
    "source",
    [
        {"json_strategy": {"base_path": "x"}},
        {"strategy": "json", "json_strategy": {"base_path": "x"}},
        {"storage": {"json_strategy": {"base_path": "x"}}},
        {"storage": {"strategy": "json", "json_strategy": {"base_path": Path("x")}}},
        {"json_strategy": JSONConfig(base_path="x")},
    ],
)
def test_fragments(source: dict[str, object]) -> None:
    assert load_config(source) == load_config(JSONConfig(base_path="x"))


def test_a_block_is_optional_if_its_defaults_suffice() -> None:
    assert load_config({"storage": {"strategy": "json"}}).options == JSONConfig()
    assert load_config({"strategy": "memory"}).options == MemoryConfig()


def test_other_blocks_and_the_migration_block_are_kept() -> None:
    config = load_config(
        {
            "storage": {
                "strategy": "json",
                "sql_strategy": {"name": "a.db"},
                "json_strategy": {"base_path": "x"},
            },
            "migration": {"batch_size": 50},
        }
    )
    assert config.block("json") is config.options
    assert config.block("sql") == SQLConfig(name="a.db")
    assert config.migration == load_migration(config) == MigrationConfig(batch_size=50)
    with pytest.raises(ConfigurationError, match="'dynamodb'; it has: json, sql"):
        config.block("dynamodb")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (True, True),
        (False, False),
        ({"max_read_capacity": 7}, AutoScaling(max_read_capacity=7)),
    ],
)
def test_both_forms_of_auto_scaling(given: object, expected: object) -> None:
    config = load_config({"dynamodb_strategy": {"auto_scaling": given}})
    assert isinstance(config.options, DynamoDBConfig)
    assert config.options.auto_scaling == expected


def test_the_configuration_of_one_strategy() -> None:
    assert strategy_config("memory:", MemoryConfig) == MemoryConfig()
    assert strategy_config(MemoryConfig(), MemoryConfig) == MemoryConfig()
    with pytest.raises(ConfigurationError, match=r"JSONConfig is required; .* strategy 'memory'"):
        strategy_config("memory:", JSONConfig)


def test_files_of_collections() -> None:
    assert JSONConfig().files(["a", "b"]) == {
        "a": "request_database.json",
        "b": "request_database.json",
    }
    split = JSONConfig(storage_type="split_files", filenames=Filenames(split_files={"a": "a.json"}))
    assert split.files(["a", "b"]) == {"a": "a.json", "b": "b.json"}
    clash = JSONConfig(storage_type="split_files", filenames=Filenames(split_files={"a": "b.json"}))
    with pytest.raises(
        ConfigurationError, match=r"split_files\.b: a and b have the same file name"
    ):
        clash.files(["a", "b"])


def test_a_configuration_is_independent_of_its_source() -> None:
    names = {"requests": "r.json"}
    config = strategy_config({"json_strategy": {"filenames": {"split_files": names}}}, JSONConfig)
    names["machines"] = "r.json"
    assert config.filenames.split_files == {"requests": "r.json"}


# -- what is refused, and where -------------------------------------------------------------


def in_json(**keys: object) -> dict[str, object]:
    return {"storage": {"strategy": "json", "json_strategy": keys}}


def in_sql(**keys: object) -> dict[str, object]:
    return {"storage": {"strategy": "sql", "sql_strategy": keys}}


def in_dynamodb(**keys: object) -> dict[str, object]:
    return {"dynamodb_strategy": keys}


@pytest.mark.parametrize(
    ("source", "start"),
    [
        (in_json(enable_compresion=True), "storage.json_strategy.enable_compresion: unknown key"),
        (
            in_json(filenames={"singel_file": "x"}),
            "storage.json_strategy.filenames.singel_file: unknown key",
        ),
        (
            in_dynamodb(auto_scaling={"enable": True}),
            "dynamodb_strategy.auto_scaling.enable: unknown key",
        ),
        ({"store": 1, "strategy": "json"}, "store: unknown key (known: strategy, json_strategy"),
        ({"storage": {}, "json_strategy": {}}, "json_strategy: belongs inside storage"),
        ({"storage": {}, "follow_moves": []}, "follow_moves: belongs inside storage"),
        ({"storage": {"strategy": "json", "jsn_strategy": {}}}, "storage.jsn_strategy: unknown"),
        ({"strategy": "json", "colour": 1}, "colour: unknown key (known: strategy, json_strategy"),
        ({"strategy": "json", "migration": {"batch": 1}}, "migration.batch: unknown key"),
        (
            {"strategy": "jsn"},
            "strategy: unknown strategy (known: json, sql, dynamodb, memory; did",
        ),
        ("", "a configuration is a mapping, a path or a URL, not an empty text"),
        ({"strategy": 5}, "strategy: expected string, got integer"),
        ({"storage": []}, "storage: expected object, got array"),
        ({}, "strategy: required, because no strategy is named"),
        ({"storage": {}, "migration": {}}, "storage.strategy: required"),
        ({"colour": 1, "migration": {}}, "colour: unknown key"),
        ({"json_strategy": {}, "sql_strategy": {}}, "strategy: required, because there are blocks"),
        ({"storage": None}, "storage: expected object, got null"),
        ({"json_strategy": {5: 1}}, "json_strategy.5: unknown key"),
        # Errors in the block of a strategy that is not selected.
        (
            {"strategy": "json", "sql_strategy": {"port": "x"}},
            "sql_strategy.port: expected a number",
        ),
        # Types and ranges.
        (in_json(cache_size="5"), "storage.json_strategy.cache_size: expected integer, got string"),
        (
            in_json(cache_size=True),
            "storage.json_strategy.cache_size: expected integer, got boolean",
        ),
        (in_json(cache_size=-1), "storage.json_strategy.cache_size: expected integer >= 0"),
        (in_json(cache_size={}), "storage.json_strategy.cache_size: expected integer, got object"),
        (in_json(cache_size=[1]), "storage.json_strategy.cache_size: expected integer, got array"),
        (
            in_json(sync_writes=1),
            "storage.json_strategy.sync_writes: expected true or false (in a URL also yes or no), "
            "got integer",
        ),
        (in_json(lock_timeout=0), "storage.json_strategy.lock_timeout: expected number > 0.0"),
        (in_json(lock_timeout=float("nan")), "storage.json_strategy.lock_timeout: expected number"),
        (in_json(lock_timeout=float("inf")), "storage.json_strategy.lock_timeout: expected a fin"),
        (in_json(base_path="a\0b"), "storage.json_strategy.base_path: string with U+0000"),
        (
            in_json(storage_type="single"),
            "storage.json_strategy.storage_type: expected 'single_file' or 'split_files'",
        ),
        (in_json(filenames="x"), "storage.json_strategy.filenames: expected object, got string"),
        (
            in_json(filenames={"split_files": {"a": 5}}),
            "storage.json_strategy.filenames.split_files.a: expected string, got integer",
        ),
        (
            in_json(filenames={"split_files": 5}),
            "storage.json_strategy.filenames.split_files: expected object, got integer",
        ),
        (in_sql(password=5), "storage.sql_strategy.password: expected string, got integer"),
        (in_sql(port=70000), "storage.sql_strategy.port: expected integer <= 65535"),
        (in_sql(type="mysql"), "storage.sql_strategy.type: expected 'sqlite' or 'postgresql'"),
        (
            in_dynamodb(auto_scaling="yes"),
            "dynamodb_strategy.auto_scaling: expected boolean | object, got string",
        ),
        (
            in_dynamodb(auto_scaling={"min_read_capacity": 9, "max_read_capacity": 8}),
            "dynamodb_strategy.auto_scaling.min_read_capacity: more than max_read_capacity",
        ),
    ],
)
def test_refusals_name_the_path(source: Any, start: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config(source)
    assert str(caught.value).startswith(start)
    assert not caught.value.retryable


def test_the_error_for_an_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config(in_json(enable_compresion=True))
    assert str(caught.value) == (
        "storage.json_strategy.enable_compresion: unknown key (known: storage_type, base_path, "
        "filenames, enable_compression, cache_size, write_buffer_size, update_files, sync_writes, "
        "backup_enabled, backup_count, feed_bytes, lock_timeout, enforce_references; "
        "did you mean 'enable_compression'?)"
    )


@pytest.mark.parametrize("name", ["", "/a.json", "../a.json", "a/../../b", "a/", ".", "a/.", "a\0"])
def test_file_names_stay_inside_the_base_path(name: str) -> None:
    for filenames in ({"single_file": name}, {"split_files": {"requests": name}}):
        with pytest.raises(ConfigurationError, match="expected a relative file name inside"):
            load_config(in_json(filenames=filenames))


@pytest.mark.parametrize("other", ["a.json", "./a.json", "x/../a.json", "A.json", "a.json.gz"])
def test_no_file_for_two_collections(other: str) -> None:
    with pytest.raises(ConfigurationError, match=r"split_files\.machines: "):
        load_config(in_json(filenames={"split_files": {"requests": "a.json", "machines": other}}))


def test_models_are_checked_in_python_too() -> None:
    with pytest.raises(ConfigurationError, match="cache_size: expected integer >= 0"):
        JSONConfig(cache_size=-1)
    with pytest.raises(ConfigurationError, match="password: expected string"):
        SQLConfig(password="plain")  # type: ignore[arg-type]
    with pytest.raises(
        ConfigurationError, match="json: expected options of type JSONConfig, got MemoryConfig"
    ):
        StorageConfig(strategy="json", options=MemoryConfig())
    with pytest.raises(AttributeError):
        JSONConfig().cache_size = 5  # type: ignore[misc]


def test_objects_that_are_no_configuration() -> None:
    with pytest.raises(ConfigurationError, match="a mapping, a path or a URL, not int"):
        load_config(5)  # type: ignore[arg-type]


# -- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{\n  "storage": {\n    "strategy" "json"\n}', r", line 3, column 16: .*malformed"),
        (b'{"storage": {"strategy": "json"', ", line 1, column 32: the JSON is incomplete"),
        (b"", ", line 1, column 1: the JSON is incomplete"),
        ('{"a": "é", }'.encode(), ", line 1, column 12: .*malformed"),
        (b'{\n"a": "\xff"}', ", line 2, column 7: not UTF-8"),
        (b"[" * 100_000, ": nested too deep"),
        (b"storage:\n  strategy: json\n", ", line 1, column 1: .*is in JSON, not in YAML or TOML"),
        (
            b'[storage]\nstrategy = "json"\n',
            ", line 1, column 2: .* a URL such as 'sqlite:jobs.db'",
        ),
        (b"[]", ": configuration: expected object, got array"),
        (b'{"storage": {"strategy": "json", "x": 1}}', ": storage.x: unknown key"),
        (b'{"requests": {}, "machines": {}}', ": not a configuration.* did you mean 'json:"),
    ],
)
def test_the_error_for_a_malformed_file_names_the_position(
    content: bytes, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=problem) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))


def test_a_sqlite_file_is_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE a (b)")
    with pytest.raises(ConfigurationError) as caught:
        load_config(str(path))
    assert str(caught.value) == (
        f"'{path}' is a SQLite file, not a configuration file; did you mean 'sqlite:{path}'?"
    )


def test_a_missing_file_names_both_possibilities() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config("data/no-such.json")
    assert str(caught.value) == (
        "no such configuration file 'data/no-such.json'; did you mean 'json:data/no-such.json'?"
    )


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("postgres://me@host/db", "did you mean 'postgresql:'?"),
        ("sqlite3:a.db", "did you mean 'sqlite:'?"),
        ("memory", "did you mean 'memory:'?"),
    ],
)
def test_a_mistyped_scheme_gets_a_suggestion(source: str, hint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config(source)
    assert str(caught.value).startswith("no such configuration file ")
    assert hint in str(caught.value)


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "{}/inside.json"])
def test_paths_that_cannot_be(source: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="no such configuration file"):
        load_config(source.format(tmp_path / "file"))


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is a folder.*did you mean 'json:"):
        load_config(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    path = tmp_path / "config.json"
    with pytest.raises(ConfigurationError, match=r"cannot read .*config\.json': Perm") as caught:
        load_config(path)
    assert isinstance(caught.value.__cause__, PermissionError)


# -- environment ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${HERE}", "value"),
        ("a-${HERE}-${HERE}", "a-value-value"),
        ("${GONE:-other}", "other"),
        ("${GONE:-}", ""),
        ("${EMPTY:-other}", "other"),
        ("${EMPTY}", ""),
        ("${HERE:-other}", "value"),
        ("$${HERE}", "${HERE}"),
        ("$HERE pa$$word $", "$HERE pa$$word $"),
        ("${NESTED}", "${HERE}"),
    ],
)
def test_expansion(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "value")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("NESTED", "${HERE}")
    monkeypatch.delenv("GONE", raising=False)
    config = strategy_config(in_sql(username=text, password=text), SQLConfig)
    assert config.username == expected
    assert config.password == Secret(expected)


def test_expansion_applies_to_all_strings_and_converts_to_the_type_of_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"KIND": "json", "SIZE": "7", "FLAG": "No", "FILE": "r.json"}.items():
        monkeypatch.setenv(name, value)
    config = load_config(
        {
            "strategy": "${KIND}",
            "json_strategy": {
                "cache_size": "${SIZE}",
                "lock_timeout": "${SIZE}.5",
                "sync_writes": "${FLAG}",
                "base_path": "${SIZE}",
                "filenames": {"split_files": {"requests": "${FILE}"}},
            },
            "migration": {"batch_size": "${SIZE}"},
        }
    )
    assert config.options == JSONConfig(
        cache_size=7,
        lock_timeout=7.5,
        sync_writes=False,
        base_path="7",
        filenames=Filenames(split_files={"requests": "r.json"}),
    )
    assert config.migration.batch_size == 7


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("${GONE}", "the environment variable GONE is not set"),
        ("${}", "'${' must begin ${NAME} or"),
        ("${GONE", "'${' must begin ${NAME} or"),
        ("${1A}", "'${' must begin ${NAME} or"),
        ("${A B}", "'${' must begin ${NAME} or"),
        ("${BYTES}", "the environment variable BYTES is not UTF-8"),
    ],
)
def test_invalid_variable_references(
    text: str, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GONE", raising=False)
    monkeypatch.setenv("BYTES", "\udcff")
    with pytest.raises(ConfigurationError) as caught:
        load_config(in_sql(password=text))
    assert str(caught.value).startswith(f"storage.sql_strategy.password: {problem}")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(in_sql(password=text)))
    with pytest.raises(ConfigurationError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: storage.sql_strategy.password: {problem}")
    with pytest.raises(ConfigurationError) as caught:
        load_config(f"postgresql://me:{text}@host/db")
    assert str(caught.value).startswith(f"postgresql: URL: {problem}")


# -- URLs -----------------------------------------------------------------------------------


def single(folder: str, name: str, **keys: Any) -> JSONConfig:
    return JSONConfig(base_path=folder, filenames=Filenames(single_file=name), **keys)


def split(folder: str, **keys: Any) -> JSONConfig:
    return JSONConfig(storage_type="split_files", base_path=folder, **keys)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("json:data/db.json", single("data", "db.json")),
        ("json:db.json", single(".", "db.json")),
        ("json:/db.json", single("/", "db.json")),
        ("json:/var/lib/db.json", single("/var/lib", "db.json")),
        ("JSON:../a%20b%3F.json", single("..", "a b?.json")),
        ("json:data", split("data")),
        ("json:da+ta/", split("da+ta/")),
        ("json:100%/x", split("100%/x")),
        ("json:x?sync_writes=false&cache_size=0", split("x", sync_writes=False, cache_size=0)),
        (
            "json:x?filenames.split_files.requests=r.json",
            split("x", filenames=Filenames(split_files={"requests": "r.json"})),
        ),
        ("sqlite:a.db", SQLConfig(name="a.db")),
        ("sqlite:/x/a.db?timeout=2.5", SQLConfig(name="/x/a.db", timeout=2.5)),
        ("sqlite::memory:", SQLConfig(name=":memory:")),
        (
            "postgresql://user:pass@host:5433/name",
            SQLConfig(
                type="postgresql",
                username="user",
                password=Secret("pass"),
                host="host",
                port=5433,
                name="name",
            ),
        ),
        (
            "postgresql://a%40b:p%3A%2F%40%25%24%7BX%7D+@[::1]:5433/my%20db",
            SQLConfig(
                type="postgresql",
                username="a@b",
                password=Secret("p:/@%${X}+"),
                host="::1",
                port=5433,
                name="my db",
            ),
        ),
        ("postgresql://", SQLConfig(type="postgresql")),
        ("postgresql:///db?host=/tmp", SQLConfig(type="postgresql", name="db", host="/tmp")),
        (
            "postgresql://u@h/db?password=p%26q&pool_size=20",
            SQLConfig(
                type="postgresql",
                username="u",
                password=Secret("p&q"),
                host="h",
                name="db",
                pool_size=20,
            ),
        ),
        ("dynamodb://eu-west-1/app", DynamoDBConfig(region="eu-west-1", table_prefix="app")),
        ("dynamodb://eu-west-1", DynamoDBConfig(region="eu-west-1")),
        ("dynamodb:///app?auto_scaling=1", DynamoDBConfig(table_prefix="app", auto_scaling=True)),
        (
            "dynamodb://r/p?endpoint_url=http://localhost:8000/?a=b&auto_scaling.enabled=no",
            DynamoDBConfig(
                region="r",
                table_prefix="p",
                endpoint_url="http://localhost:8000/?a=b",
                auto_scaling=AutoScaling(enabled=False),
            ),
        ),
        ("memory:", MemoryConfig()),
        ("memory://?enforce_references=No", MemoryConfig(enforce_references=False)),
    ],
)
def test_urls(url: str, expected: object) -> None:
    assert load_config(url).options == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", True), ("YES", True), ("1", True), ("false", False), ("no", False), ("0", False)],
)
def test_booleans_in_a_query(text: str, expected: bool) -> None:
    config = strategy_config(f"json:x?backup_enabled={text}", JSONConfig)
    assert config.backup_enabled is expected


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("json:", "expected json:PATH"),
        ("json://data/db.json", "expected json:PATH"),
        ("sqlite:///a.db", "expected sqlite:PATH"),
        ("postgresql:name", "expected postgresql://USER:PASSWORD@HOST:PORT/NAME"),
        (
            "postgresql://h:port/db",
            "port: expected a number, or a string of digits (for several servers, separated by commas)",
        ),
        ("postgresql://h/db?username=a@b", "@ : / ? and % in the user, password and name must be"),
        ("postgresql://h/db/more", "@ : / ? and % in the user, password and name must be"),
        ("dynamodb:us-east-1", "expected dynamodb://REGION/PREFIX"),
        ("dynamodb://key:value@us-east-1/p", "dynamodb://REGION/PREFIX takes no user"),
        ("memory:name", "only a query may follow memory:"),
        ("memory:?size=1", "size: unknown key (known: enforce_references)"),
        ("json:x?enable_compresion=1", "enable_compresion: unknown key (known: storage_type, "),
        ("json:x?filenames.single=a", "filenames.single: unknown key (known: single_file, "),
        (
            "json:x?sync_writes=maybe",
            "sync_writes: expected true or false (in a URL also yes or no), got string",
        ),
        (
            "json:x?sync_writes=2",
            "sync_writes: expected true or false (in a URL also yes or no), got integer",
        ),
        (
            "json:x?sync_writes",
            "sync_writes: expected true or false (in a URL also yes or no), got string",
        ),
        ("json:x?cache_size=-1", "cache_size: expected integer >= 0"),
        ("json:x?cache_size=1.5", "cache_size: expected integer, got number"),
        ("json:x?cache_size=1&cache_size=2", "cache_size: specified twice"),
        ("json:x?base_path=y", "base_path: specified twice"),
        ("json:x?cache_size.a=1&cache_size=1", "cache_size: specified twice"),
        ("json:x?base_path.a=1", "base_path.a: specified twice"),
        ("json:x?=1", "expected key=value pairs"),
        ("json:x%FF", "the percent-encoded bytes are not UTF-8"),
        ("json:..?filenames.single_file=../a", "filenames.single_file: expected a relative"),
    ],
)
def test_bad_urls(url: str, problem: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config(url)
    assert str(caught.value).startswith(f"{url.partition(':')[0]}: URL: {problem}")


def test_a_url_is_not_a_name() -> None:
    with pytest.raises(ConfigurationError, match="name: a URL is not expected here"):
        SQLConfig(type="postgresql", name="postgresql://me:secret@h/db")


_NAMES = st.text(min_size=1).filter(lambda text: "\0" not in text and "://" not in text)


@given(username=_NAMES, password=st.text(min_size=1), name=_NAMES)
def test_any_string_can_be_percent_encoded_in_a_url(
    username: str, password: str, name: str
) -> None:
    user, secret, database = (quote(each, safe="") for each in (username, password, name))
    config = strategy_config(f"postgresql://{user}:{secret}@h/{database}", SQLConfig)
    assert (config.username, config.name) == (username, name)
    assert config.password == Secret(password)


def test_variables_in_a_url_are_encoded_where_they_are_inserted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ODD", "a/b:c@d?e&f=${g}%41 +")
    url = "postgresql://${ODD}:${ODD}@${GONE:-h}:${PORT:-5433}/${ODD}?timeout=${LONG:-9}"
    assert strategy_config(url, SQLConfig) == SQLConfig(
        type="postgresql",
        username="a/b:c@d?e&f=${g}%41 +",
        password=Secret("a/b:c@d?e&f=${g}%41 +"),
        host="h",
        port=5433,
        name="a/b:c@d?e&f=${g}%41 +",
        timeout=9.0,
    )


# -- third-party strategies -----------------------------------------------------------------


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hf_async_store.strategies]\nacme = acme:Store\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("registered")
def test_a_registered_strategy_has_a_plain_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "here")
    block = {"place": "${WHERE}", "deep": {"list": ["${WHERE}", 1]}, "password": "hidden"}
    expected = {"place": "here", "deep": {"list": ["here", 1]}, "password": "hidden"}
    for source in (
        {"storage": {"strategy": "acme", "acme_strategy": block}},
        {"acme_strategy": block},
    ):
        config = load_config(source)
        assert config.strategy == "acme"
        assert config.options == expected
        assert "hidden" not in repr(config)
    assert load_config({"strategy": "acme"}).options == {}
    beside = load_config({"strategy": "json", "acme_strategy": block})
    assert beside.block("acme") == expected
    with pytest.raises(ConfigurationError, match=r"acme_strategy\.place: the environment"):
        load_config({"acme_strategy": {"place": "${NO_SUCH_VARIABLE}"}})


@pytest.mark.usefixtures("registered")
def test_a_url_of_a_registered_strategy() -> None:
    config = load_config("acme://u:p@h/x?pool=5&token=t")
    assert config.strategy == "acme"
    assert config.options == {"url": "acme://u:p@h/x", "pool": "5", "token": "t"}
    assert redacted(config)["storage"] == {
        "strategy": "acme",
        "acme_strategy": {"url": "acme://u:***@h/x", "pool": "5", "token": "***"},
    }


class AcmeOptions(StrategyOptions, frozen=True, kw_only=True):
    pool: int = 1
    wait: float = 1.0
    fast: bool = False
    token: Secret | None = None
    names: tuple[str, ...] = ()


@pytest.mark.usefixtures("registered")
def test_typed_options_of_a_registered_strategy() -> None:
    config = load_config("acme://u:p@h/x?pool=5&wait=2&fast=true&token=hidden")
    options = options_of(config, AcmeOptions)
    assert options == AcmeOptions(
        url="acme://u:p@h/x", pool=5, wait=2.0, fast=True, token=Secret("hidden")
    )
    assert "hidden" not in repr(options)
    block = {"pool": 7, "wait": 1, "fast": "no", "names": ["5"]}
    for source in ({"acme_strategy": block}, {"strategy": "acme", "acme_strategy": block}):
        assert options_of(load_config(source), AcmeOptions) == AcmeOptions(
            pool=7, wait=1.0, names=("5",)
        )
    assert options_of(load_config({"strategy": "acme"}), AcmeOptions) == AcmeOptions()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("pol=5", r"acme_strategy\.pol: unknown key.*pool"),
        ("pool=many", r"acme_strategy\.pool: expected integer"),
        ("fast=maybe", r"acme_strategy\.fast: expected true or false"),
        ("pool=5.5", r"acme_strategy\.pool: expected integer"),
    ],
)
def test_typed_options_are_checked(query: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        options_of(load_config(f"acme:x?{query}"), AcmeOptions)


def test_an_unregistered_strategy() -> None:
    with pytest.raises(ConfigurationError, match="not a URL of a known scheme"):
        load_config("acme:x")
    with pytest.raises(ConfigurationError, match="strategy: unknown strategy"):
        load_config({"strategy": "acme", "json_strategy": {}})
    for unknown in ("mysql://root@localhost/x", {"strategy": "mysql"}):
        with pytest.raises(ConfigurationError, match=r"once that package is installed") as raised:
            load_config(unknown)
        assert "did you mean" not in str(raised.value)
    with pytest.raises(ConfigurationError, match="did you mean 'postgresql:'"):
        load_config("postgresq://localhost/x")
    assert StorageConfig(strategy="acme", options={"a": 1}).options == {"a": 1}


# -- secrets --------------------------------------------------------------------------------

MARK = "Zq9xK"
SECRET = f"{MARK}{MARK}"


def told(error: BaseException | None) -> Iterator[str]:
    """The text of an error and of its chained exceptions, including their attributes."""
    if error is not None:
        yield str(error)
        yield repr(error)
        yield repr(vars(error))
        yield "".join(traceback.format_exception(error))
        yield from told(error.__cause__)
        yield from told(error.__context__)


def refusal(source: Any) -> ConfigurationError | None:
    """The error of loading `source`, which must not show any value that contains MARK; None if it loads."""
    error = None
    try:
        load_config(source)
    except ConfigurationError as exc:
        error = exc
    assert not [text for text in told(error) if MARK in text]
    return error


def assert_silent(source: Any) -> None:
    """Assert that neither a successful nor a failed loading of `source` shows a password with MARK."""
    if refusal(source) is None:
        config = load_config(source)
        assert MARK not in repr(config) + str(config) + repr(redacted(config))


def test_a_secret_is_shown_only_on_request() -> None:
    secret = Secret(SECRET)
    assert secret.reveal() == SECRET
    assert str(secret) == f"{secret}" == "***"
    assert repr(secret) == "'***'"
    assert secret == Secret(SECRET) != Secret("other")
    assert hash(secret) == hash(Secret(SECRET))
    assert secret != SECRET
    assert secret
    assert not Secret("")
    with pytest.raises(TypeError):
        msgspec.json.encode(SQLConfig(password=secret))


def test_a_password_is_in_no_representation_of_a_configuration() -> None:
    config = load_config(f"postgresql://me:{SECRET}@host/db")
    options = config.options
    assert isinstance(options, SQLConfig)
    assert options.password == Secret(SECRET)
    shown = redacted(config)
    assert json.loads(json.dumps(shown)) == shown
    assert redacted(options)["password"] == "***"
    pictures = [repr(config), str(options), f"{config}", repr(shown), repr(redacted(options))]
    pictures += [repr(options.__rich_repr__()), repr(config.__rich_repr__())]
    assert not [each for each in pictures if MARK in each]


def test_redaction_hides_only_values_with_secret_names() -> None:
    assert redacted(
        {
            "api_key": SECRET,
            "deep": [{"Client-Secret": 5}],
            "dsn": f"mongo://me:{SECRET}@h/d",
            "passwordless": True,
            "token": None,
            "table": "x",
            "ratio": 0.5,
        }
    ) == {
        "api_key": "***",
        "deep": [{"Client-Secret": "***"}],
        "dsn": "mongo://me:***@h/d",
        "passwordless": True,
        "token": None,
        "table": "x",
        "ratio": 0.5,
    }
    for config in ("json:a", "sqlite:a", "dynamodb://r/p", "memory:"):
        assert "***" not in repr(load_config(config))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:pw@h:5/db", "postgresql://me:***@h:5/db"),
        ("postgresql://me:p/w@x?y:z@h:5/db", "postgresql://me:***@h:5/db"),
        ("postgresql://:pw@h/db", "postgresql://:***@h/db"),
        ("postgresql://h:5/db", "postgresql://h:5/db"),
        ("https://token@h:5/db", "https://***@h:5/db"),
        ("acme:me:pw@h", "acme:***@h"),
        ("me:pw@h/db", "me:***@h/db"),
        ("x://h?Password=a&b=c&api-key=d=e", "x://h?Password=***&b=c&api-key=***"),
        ("json:/data/a:b@c.json", "json:/data/a:b@c.json"),
        ("data/x@y.json", "data/x@y.json"),
        ("", ""),
    ],
)
def test_redacted_urls(url: str, shown: str) -> None:
    assert redact_url(url) == shown


MODELS = {
    "json": JSONConfig,
    "sql": SQLConfig,
    "dynamodb": DynamoDBConfig,
    "memory": MemoryConfig,
}


@pytest.mark.parametrize("strategy", MODELS)
@pytest.mark.parametrize(
    "wrap", [lambda value: value, lambda value: [value], lambda value: {"x": value}]
)
def test_no_error_shows_a_value(
    strategy: str, wrap: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Any value may be a misplaced password: a literal, from the environment, or in a file."""
    monkeypatch.setenv("MISPLACED", SECRET)
    path = tmp_path / "config.json"
    errors = []
    for key in (*MODELS[strategy].__struct_fields__, "pasword"):
        for text in (SECRET, "${MISPLACED}", f"{SECRET}${{"):
            source = {f"{strategy}_strategy": {key: wrap(text)}}
            path.write_text(json.dumps(source))
            errors += [refusal(source), refusal(path)]
    assert any(errors)


@settings(max_examples=repetitions(300), deadline=None)
@given(
    password=st.lists(
        st.sampled_from(
            [MARK, MARK, "@", ":", "/", "?", "#", "&", "=", "%", "%ff", "$", "${", "é"]
        ),
        min_size=1,
        max_size=6,
    ).map(lambda parts: MARK + "".join(parts) + MARK),
    place=st.sampled_from(
        [
            "postgresql://me:{}@host:5432/db",
            "postgresql://me:{}@host:5432/db?pool_size=x",
            "postgresql://me:{}@host:port/db?colour=blue",
            "postgresql://:{}@[::1]/db/db",
            "postgresql:me:{}@host/db",
            "postgres://me:{}@host/db",
            "me:{}@host/db",
            "dynamodb://key:{}@us-east-1/p",
            "memory:{}",
            "memory://me:{}@x",
        ]
    ),
)
def test_no_error_shows_a_password_that_was_put_raw_into_a_url(password: str, place: str) -> None:
    assert_silent(place.format(password))


@settings(max_examples=repetitions(200), deadline=None)
@given(
    password=st.text(max_size=8).map(lambda text: MARK + text + MARK),
    broken=st.sampled_from(
        ["", "&pool_size=x", "&type=sqlite", "&colour=1", "&port=%FF", "&password=x"]
    ),
)
def test_no_error_shows_a_password_in_a_query_or_mapping(password: str, broken: str) -> None:
    assert_silent(f"postgresql://h/db?password={quote(password, safe='')}{broken}")
    assert_silent(f"postgresql://me:{quote(password, safe='')}@h/db?timeout=1{broken}")
    wrongs: list[dict[str, object]] = [
        {},
        {"port": "x"},
        {"colour": 1},
        {"type": 5},
        {"host": {}},
        {"pool_size": -1},
    ]
    for wrong in wrongs:
        assert_silent(in_sql(password=password, **wrong))


def test_a_malformed_file_does_not_show_its_passwords(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    whole = json.dumps(in_sql(password=SECRET, name="é"), ensure_ascii=False).encode()
    for cut in range(len(whole)):
        for content in (
            whole[:cut],
            whole[:cut] + b"\xff" + whole[cut:],
            whole[:cut] + b"\x01" + whole[cut:],
        ):
            path.write_bytes(content)
            with pytest.raises(ConfigurationError) as caught:
                load_config(path)
            # A key may be split by the corruption; its parts are named in the error.
            assert not [text for text in told(caught.value) if MARK in text]


# -- cost -----------------------------------------------------------------------------------


def test_importing_and_loading_imports_few_modules() -> None:
    """Apart from msgspec, only cheap modules are imported; a stub replaces the package itself."""
    folder = Path(hf_async_store.config.__file__).parent
    script = f"""
import sys, types, msgspec
package = types.ModuleType("hf_async_store")
package.__path__ = [{str(folder)!r}]
sys.modules["hf_async_store"] = package
before = set(sys.modules)
from hf_async_store.config import load_config
load_config("json:data/db.json")
load_config({{"storage": {{"strategy": "sql", "sql_strategy": {{"name": "a.db"}}}}}})
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert set(done.stdout.split()) <= {
        "errno",
        "math",
        "hf_async_store.config",
        "hf_async_store.changes",
        "hf_async_store.schema",
        "hf_async_store.values",
        "hf_async_store.errors",
        "hf_async_store.json_input",
        "hf_async_store.redaction",
    }
