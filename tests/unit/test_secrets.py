"""No output contains a secret that is given in any key of the configuration of any strategy.

The keys are read from the models, so that new ones are tested without a change here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import msgspec
import pytest

from hf_async_store import StorageError, config, open_store
from hf_async_store.cli import main
from hf_async_store.config import Secret, load_config, load_migration, redacted

pytestmark = pytest.mark.hf_sampled

MARK = "Zq9xKpW"
URL = f"https://user:{MARK}@host.invalid/x"
STRATEGIES = {"json": "json", "sqlite": "sql", "postgresql": "sql", "dynamodb": "dynamodb"}


def keys_of(model: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The keys of a model and of the blocks inside it, with their types."""
    for each in msgspec.structs.fields(model):
        at = (*path, each.name)
        yield at, each.type
        nested = config._nested_model(each.type)
        if nested is not None:
            yield from keys_of(nested, at)


CASES = [
    (strategy, path, kind)
    for strategy, name in STRATEGIES.items()
    for path, kind in keys_of(config._MODELS[name])
    if path != ("type",)  # another type would select another strategy
]


def base(strategy: str, folder: Path) -> dict[str, Any]:
    """A configuration that fails quickly if it needs a server."""
    if strategy == "json":
        return {"base_path": f"{folder}/data"}
    if strategy == "sqlite":
        return {"type": "sqlite", "name": f"{folder}/a.db"}
    if strategy == "postgresql":
        return {"type": "postgresql", "host": "127.0.0.1", "port": 1, "timeout": 2, "name": "db"}
    return {
        "region": "us-east-1",
        "endpoint_url": "http://127.0.0.1:1",
        "retry_timeout": 0.1,
        "connect_timeout": 1,
        "read_timeout": 1,
    }


def planted(strategy: str, folder: Path, path: tuple[str, ...], kind: Any) -> dict[str, Any]:
    block = base(strategy, folder)
    inner = block
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
    secret = Secret in get_args(kind)
    inner[path[-1]] = {URL: URL} if "Mapping" in str(kind) else MARK if secret else URL
    if path == ("endpoint_url",):
        inner[path[-1]] = f"http://user:{MARK}@127.0.0.1:1"  # one that is tried
    if path[-1] == "dax_endpoint":
        inner["enable_dax"] = True
    return {
        "storage": {"strategy": STRATEGIES[strategy], f"{STRATEGIES[strategy]}_strategy": block}
    }


def told(error: BaseException | None) -> Iterator[str]:
    """The text, attributes and traceback of an error, with its chained exceptions."""
    if error is not None:
        yield str(error)
        yield repr(error)
        yield repr(vars(error))
        yield "".join(traceback.format_exception(error))


async def outputs(source: Any) -> list[str]:
    """All output about a store with that configuration, from loading to the errors of its verbs."""
    shown: list[str] = []
    try:
        loaded = load_config(source)
        shown += [repr(loaded), str(loaded), json.dumps(redacted(loaded)), loaded.location()]
        store = open_store(loaded)
        shown += [repr(store), json.dumps(store.describe())]
    except StorageError as exc:
        return [*shown, *told(exc)]
    async with store:
        try:
            shown.append(json.dumps(await store.health()))
            shown.append(json.dumps(await store.get_entity("templates", "t")))
            await store.save_entity("templates", {"template_id": "t"})
        except StorageError as exc:
            shown += told(exc)
        shown.append(json.dumps(store.describe()))
    return shown


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.usefixtures("aws")
@pytest.mark.parametrize(
    ("strategy", "path", "kind"), CASES, ids=[f"{each[0]}-{'.'.join(each[1])}" for each in CASES]
)
def test_a_planted_secret_is_in_no_output(
    strategy: str,
    path: tuple[str, ...],
    kind: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = planted(strategy, tmp_path, path, kind)
    caplog.set_level(logging.DEBUG)
    shown = asyncio.run(outputs(source))
    file = tmp_path / "store.json"
    file.write_text(json.dumps(source))
    for command in ("describe", "health", "count templates"):
        main([*command.split(), "--config", str(file), "--timeout", "5", "--verbose"])
    shown += capsys.readouterr()
    shown.append(caplog.text)
    file.unlink()
    shown += [os.fspath(each) for each in tmp_path.rglob("*")]
    assert len("".join(shown)) > 50
    assert not [each for each in shown if MARK in each]


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{MARK}@127.0.0.1:1/db?timeout=1",
        f"postgresql://127.0.0.1:1/db?timeout=1&password={MARK}&username=u",
        f"dynamodb://us-east-1/p?endpoint_url={quote(URL)}&retry_timeout=2",
        f"json:data?base={MARK}",
        f"json:data?follow_moves={quote(f'postgresql://u:{MARK}@h/db')}",
        f"json:data?follow_moves={quote(f'json:x?enable={MARK}')}",
        f"postgres://user:{MARK}@h/db",
        f"user:{MARK}@h",
    ],
)
def test_a_secret_in_a_url_is_in_no_output(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown: list[str] = []
    try:
        loaded = load_config(url)
        shown += [
            repr(loaded),
            json.dumps(redacted(loaded)),
            json.dumps(open_store(url).describe()),
        ]
    except StorageError as exc:
        shown += told(exc)
    main(["describe", "--store", url, "--verbose", "--timeout", "3"])
    main(["live-migrate", "status", "--from", url, "--to", url, "--verbose", "--timeout", "3"])
    main(["verify", "--from", url, "--to", "json:data", "--verbose", "--timeout", "3"])
    shown += capsys.readouterr()
    assert not [each for each in shown if MARK in each]


def test_a_secret_in_the_migration_block() -> None:
    for path, _ in keys_of(config.MigrationConfig):
        try:
            loaded = load_migration({path[0]: URL})
        except StorageError as exc:
            assert MARK not in "".join(told(exc))
        else:
            assert MARK not in repr(loaded) + json.dumps(redacted(loaded))


def test_every_error_hides_passwords_in_urls() -> None:
    assert MARK not in str(StorageError(f"cannot reach {URL}"))
    assert str(StorageError(f"cannot reach {URL}")) == (
        "cannot reach https://user:***@host.invalid/x"
    )
    assert str(StorageError("json:a@b, and https://host/a")) == "json:a@b, and https://host/a"
