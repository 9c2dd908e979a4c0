"""The documentation is correct: its examples run, its links resolve, its tables are complete.

The blocks of a page run in order, in the same folder and namespace. `# -> x` after an expression, or
on the line below it, is its expected value. A block that cannot run has a comment above it with the
reason: `<!-- not run: reason -->`; it is then reported as skipped, with that reason.
"""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import os
import re
import subprocess
import sys
from functools import cache
from inspect import CO_COROUTINE
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import pytest

import hf_async_store
from hf_async_store import StorageError, config, load_config

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
PAGES: Final = sorted(
    [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    + list(DOCS.rglob("*.md"))
)
BLOCK_SECONDS: Final = 120

# -- reading pages --------------------------------------------------------------------------


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None


_BLOCK: Final = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks_of(page: Path) -> Iterator[Block]:
    text = text_of(page)
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("text")) + 1
        yield Block(page, line, found["language"], found["text"], found["why"])


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose_of(page: Path) -> str:
    return _BLOCK.sub("", text_of(page))


# -- running examples -----------------------------------------------------------------------

_MAX_SHOWN: Final = re.compile(r"#\s*->\s*(.+?)\s*$")


class _Shows(ast.NodeTransformer):
    """Replaces an expression that is followed by `# -> x` by a check of its value."""

    def __init__(self, source: str) -> None:
        self._lines = source.splitlines()
        self.checks = 0

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        end = node.end_lineno or node.lineno
        below = self._lines[end].strip() if end < len(self._lines) else ""
        found = _MAX_SHOWN.search(self._lines[end - 1]) or (
            _MAX_SHOWN.search(below) if below.startswith("#") else None
        )
        if found is None:
            return node
        self.checks += 1
        check = ast.Call(
            ast.Name("__shows__", ast.Load()), [node.value, ast.Constant(found[1])], []
        )
        return ast.fix_missing_locations(ast.copy_location(ast.Expr(check), node))


def shows(value: object, expected: str) -> None:
    assert repr(value) == expected


def run_python(block: Block, namespace: dict[str, Any], runner: asyncio.Runner) -> None:
    # Preceded by blank lines, so that a traceback has the line number of the page.
    tree = ast.parse("\n" * (block.line - 1) + block.text)
    transformer = _Shows("\n" * (block.line - 1) + block.text)
    tree = transformer.visit(tree)
    assert transformer.checks == len(re.findall(r"#\s*->", block.text)), (
        "a `# -> x` follows no expression"
    )
    code = compile(
        tree, name_of(block.page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
    )
    if code.co_flags & CO_COROUTINE:

        async def body() -> None:
            async with asyncio.timeout(BLOCK_SECONDS):
                await eval(code, namespace)

        runner.run(body())
    else:
        exec(code, namespace)


class Shell:
    """Runs shell blocks one after another; exported variables are kept for the next block."""

    def __init__(self, folder: Path) -> None:
        self._exports = folder.with_name(f"{folder.name}.exports")
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("HF_ASYNC_")
        }
        programs = Path(sys.executable).parent
        self._environment["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"

    def run(self, block: Block, folder: Path) -> None:
        before = f". {self._exports}\n" if self._exports.exists() else ""
        script = f"set -euo pipefail\n{before}{block.text}\nexport -p > {self._exports}\n"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BLOCK_SECONDS,
            check=False,
        )
        said = f"{name_of(block.page)}, line {block.line}: exit code {done.returncode}"
        assert done.returncode == 0, f"{said}\n{done.stdout}{done.stderr}"


RUNNABLE: Final = ("python", "sh")


@pytest.mark.parametrize(
    "page",
    [each for each in PAGES if any(block.language in RUNNABLE for block in blocks_of(each))],
    ids=name_of,
)
def test_examples_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if page.name == "dynamodb.md":
        server = request.getfixturevalue("dynamodb_server")
        monkeypatch.setenv("AWS_ENDPOINT_URL_DYNAMODB", server.endpoint_url)
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)
    environment = dict(os.environ)
    loggers = [logging.getLogger(each) for each in logging.root.manager.loggerDict]
    levels = {each: each.level for each in (logging.root, *loggers)}
    # Annotations of a block are resolved in its module.
    namespace: dict[str, Any] = {"__name__": "__main__", "__shows__": shows}
    shell = Shell(folder)
    with asyncio.Runner() as runner:
        try:
            for block in blocks_of(page):
                if block.not_run is not None:
                    continue
                if block.language == "python":
                    run_python(block, namespace, runner)
                elif block.language == "sh":
                    shell.run(block, folder)
        finally:
            os.environ.clear()
            os.environ.update(environment)
            for logger in (logging.root, *map(logging.getLogger, logging.root.manager.loggerDict)):
                logger.setLevel(levels.get(logger, logging.NOTSET))


@pytest.mark.parametrize(
    "block",
    [block for page in PAGES for block in blocks_of(page) if block.not_run is not None],
    ids=lambda block: f"{name_of(block.page)}:{block.line}",
)
def test_blocks_that_are_not_run_say_why(block: Block) -> None:
    assert block.language in RUNNABLE
    assert "hf-async-store" not in block.text, "a block with commands of the product must be run"
    pytest.skip(f"{name_of(block.page)}, line {block.line}: {block.not_run}")


def test_few_blocks_are_not_run() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page) if block.language in RUNNABLE]
    assert len(blocks) > 30
    assert sum(block.not_run is not None for block in blocks) <= 3


def test_every_code_fence_is_parsed_as_a_block() -> None:
    known = {*RUNNABLE, "json", "toml", "mermaid"}
    for page in PAGES:
        found = list(blocks_of(page))
        assert 2 * len(found) == len(re.findall(r"^```", text_of(page), re.MULTILINE)), page
        assert {block.language for block in found} <= known, page


def test_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 125


# -- configuration --------------------------------------------------------------------------

MODELS: Final[dict[str, type[msgspec.Struct]]] = {
    "json_strategy": config.JSONConfig,
    "json_strategy.filenames": config.Filenames,
    "memory_strategy": config.MemoryConfig,
    "sql_strategy": config.SQLConfig,
    "dynamodb_strategy": config.DynamoDBConfig,
    "dynamodb_strategy.auto_scaling": config.AutoScaling,
    "migration": config.MigrationConfig,
}


def section_of(page: Path, heading: str) -> str:
    """The text below a heading, up to the next one of any level."""
    found = re.search(
        rf"^#+ `{re.escape(heading)}`$\n(.*?)(?=^#|\Z)", text_of(page), re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"no heading `{heading}`"
    return found[1]


@pytest.mark.parametrize("heading", MODELS)
def test_every_key_is_documented_with_its_default(heading: str) -> None:
    section = section_of(DOCS / "configuration.md", heading)
    rows = re.findall(r"^\| `(\w+)` \| (?:`([^`]*)`|([^|]*)) \| (.+) \|$", section, re.MULTILINE)
    written = {name: default for name, default, _, _ in rows}
    defaults = {each.name: each.get_default() for each in fields_of(MODELS[heading])}
    assert written.keys() == defaults.keys()
    for name, default in defaults.items():
        if not isinstance(default, config.Filenames):
            assert json.loads(written[name]) == default, name
            assert type(json.loads(written[name])) is type(default), name


class _Key(NamedTuple):
    name: str
    default: object
    default_factory: Any

    def get_default(self) -> object:
        if self.default is msgspec.NODEFAULT:
            return self.default_factory()
        return self.default


def fields_of(model: type[msgspec.Struct]) -> list[_Key]:
    return [
        _Key(each.name, each.default, each.default_factory)
        for each in msgspec.structs.fields(model)
    ]


def test_every_model_has_a_section() -> None:
    models = {
        each
        for each in vars(config).values()
        if isinstance(each, type) and issubclass(each, config._Model)
    } - {config._Model, config.StrategyOptions}
    assert models == set(MODELS.values())


@pytest.mark.parametrize(
    "block",
    [each for each in blocks_of(DOCS / "configuration.md") if each.language == "json"],
    ids=lambda block: f"line {block.line}",
)
def test_configurations_are_accepted(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "hunter2")
    load_config(json.loads(block.text))


# An IAM action such as `dynamodb:ListTables` is no URL.
URL: Final = re.compile(r"(?:json|sqlite|memory|postgresql|dynamodb(?!:[A-Z])):[^\s`\"'|)]*")


def test_urls_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "hunter2")
    urls = {
        each
        for page in PAGES
        for each in URL.findall(code_in(page))
        if "..." not in each and "PORT" not in each
    }
    assert len(urls) > 10
    for each in urls:
        load_config(each)


def code_in(page: Path) -> str:
    """All code on a page, in blocks and inline."""
    text = text_of(page)
    return "\n".join(
        [
            *(block.text for block in blocks_of(page) if block.language not in ("json", "toml")),
            *re.findall(r"`([^`\n]+)`", prose_of(page) if page != ROOT / "README.md" else text),
        ]
    )


def test_json_blocks_are_json() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            if block.language == "json":
                json.loads(block.text)


# -- completeness ---------------------------------------------------------------------------


def public_errors() -> list[str]:
    return [
        name
        for name in hf_async_store.__all__
        if isinstance(found := getattr(hf_async_store, name), type)
        and issubclass(found, StorageError)
    ]


def test_every_error_is_in_the_troubleshooting() -> None:
    text = text_of(DOCS / "troubleshooting.md")
    rows = re.findall(r"^\| `(\w+Error)` \| (.+) \| (.*) \|$", text, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(public_errors()) - {"StorageError"}
    assert "`StorageError`" in text


def test_every_public_name_is_documented() -> None:
    words = {word for page in PAGES for word in re.findall(r"\w+", code_in(page))}
    assert set(hf_async_store.__all__) <= words


def test_every_verb_is_documented() -> None:
    from hf_async_store import JSONStorageStrategy, Transaction

    words = {word for page in PAGES for word in re.findall(r"\w+", code_in(page))}
    verbs = {
        name for kind in (JSONStorageStrategy, Transaction) for name in dir(kind) if name[0] != "_"
    }
    assert verbs - {"transaction_type"} <= words


def test_every_command_is_documented() -> None:
    from hf_async_store.cli.arguments import COMMANDS

    words = {word for page in PAGES for word in re.findall(r"[\w-]+", text_of(page))}
    assert set(COMMANDS) <= words


def test_changelog_has_this_version() -> None:
    assert f"## [{hf_async_store.__version__}]" in text_of(ROOT / "CHANGELOG.md")


# -- links and words ------------------------------------------------------------------------

LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HOSTS: Final = {
    "app.test",  # reserved
    "keepachangelog.com",
    "opentelemetry.io",
    "semver.org",
}


def anchors_of(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub generates them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(prose_of(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors_of(target), link


def test_every_page_can_be_found() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in (ROOT / "README.md", DOCS / "index.md")
        for link in LINK.findall(prose_of(page))
        if not link.startswith("https://")
    }
    assert set(PAGES) <= linked | {ROOT / "README.md"}


def test_the_list_of_decisions_is_sorted_with_its_continuation_lines() -> None:
    rows = re.findall(r"^- \[(\d{3})\](.*\n(?:  .*\n)*)", text_of(DOCS / "index.md"), re.M)
    assert [number for number, _ in rows] == sorted(number for number, _ in rows)
    assert [number for number, row in rows if row.count("\n") > 2] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_contain_no_foreign_hosts_or_machine_paths(page: Path) -> None:
    text = text_of(page)
    assert set(re.findall(r"https?://([^/\s:)]+)", text)) <= HOSTS
    assert not re.search(r"(?<![\w.])/(work|tmp|root|home|Users|opt|mnt)\b", text)
    assert not re.search(r"--(extra-)?index-url|\bregistry\b", text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_short_enough_to_review(page: Path) -> None:
    long = [
        line
        for line in prose_of(page).splitlines()
        if len(line) > 120 and not line.startswith("|") and "](" not in line
    ]
    assert long == []
