"""Commands that other packages register by entry points."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from command import Cli

MODULE = """
SUMMARY = "remove what is old"
MANUAL = "as often as you like"

def add_arguments(parser):
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--store", help="its own meaning")

def run(arguments):
    print("archived", arguments.days, arguments.store, arguments.config)
    return 4
"""


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that registers the commands `archive` and `get`; the latter is ignored."""
    folder = tmp_path / "site"
    information = folder / "acme_archive-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "acme_archive.py").write_text(MODULE)
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: acme-archive\nVersion: 1.0\n"
    )
    (information / "entry_points.txt").write_text(
        dedent("""\
            [hf_async_store.commands]
            archive = acme_archive
            get = acme_archive
            """)
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "acme_archive", raising=False)


@pytest.mark.usefixtures("archive")
def test_a_command_of_another_package_is_run(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    ran = cli("--config", "c.json", "archive", "--days", "7", "--store", "memory:")
    assert ran.code == 4
    assert "archived 7 memory: c.json" in ran.out + capsys.readouterr().out


@pytest.mark.usefixtures("archive")
def test_a_command_of_another_package_can_refuse_common_options(cli: Cli, tmp_path: Path) -> None:
    module = tmp_path / "site" / "acme_archive.py"
    module.write_text(MODULE + '\nREFUSED = {"config": "it has none"}\n')
    ran = cli("archive", "--config", "c.json")
    assert (ran.code, ran.message) == (2, "archive does not take --config: it has none")


@pytest.mark.usefixtures("archive")
def test_help_lists_the_command_and_shows_its_manual(cli: Cli) -> None:
    shown = cli("--help").out
    assert "archive            remove what is old" in shown
    assert "as often as you like" in cli("archive", "--help").out


@pytest.mark.usefixtures("archive", "filled")
def test_a_command_of_the_product_stays(cli: Cli) -> None:
    assert "archived" not in cli("get", "machines", "m-1").out


def test_a_missing_extra_is_named_in_the_error(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_async_store.cli import extensions

    monkeypatch.setattr(extensions, "GROUP", "hf_async_store.nothing")
    for name in ("bench", "advise", "demo"):
        ran = cli(name)
        assert ran.code == 2
        assert "pip install hf-async-store-bench (in a checkout: pip install ./bench" in ran.message
    assert cli("--help").out.count("not installed: pip install hf-async-store-bench") == 3


def test_an_unknown_command_is_refused_as_before(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_async_store.cli import extensions

    ran = cli("gte")
    assert ran.code == 2
    assert "did you mean 'get'?" in ran.message
    assert ", demo" in ran.message
    monkeypatch.setattr(extensions, "GROUP", "hf_async_store.nothing")
    assert "demo" not in cli("gte").message


def test_another_word_for_a_command_is_understood(cli: Cli) -> None:
    for word, command in (("save", "put"), ("list", "query"), ("remove", "delete")):
        assert f"did you mean '{command}'?" in cli(word).message


def test_a_store_of_another_package_is_named_by_its_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    (tmp_path / "acme_strategy.py").write_text(_ACME)
    info = tmp_path / "acme_strategy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-strategy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[hf_async_store.strategies]\nacme = acme_strategy:AcmeStrategy\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "acme_strategy", raising=False)
    url = "acme://app:hunter2@host/3?table_prefix=cli&token=hunter2"
    ran = cli("put", "templates", '{"template_id": "t-1"}', "--store", url)
    assert ran.message == "note: a new store was created at acme://host/3?table_prefix=cli"


_ACME = """
from hf_async_store.strategies.sql import SQLStorageStrategy


class AcmeStrategy(SQLStorageStrategy):
    def __init__(self, config, *, collections):
        super().__init__("sqlite:acme.db?table_prefix=cli", collections=collections)
"""
