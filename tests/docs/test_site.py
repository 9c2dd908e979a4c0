"""The documentation site, as far as it can be tested without building it: `make docs` does that."""

from __future__ import annotations

import re
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest

import hf_async_store
from docs_site import check_links, commands, links, reference
from hf_async_store import Capabilities, QueryPlan, open_store
from hf_async_store.cli.arguments import COMMANDS
from tests.pytest_process import PYTEST

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"


def test_every_public_name_is_in_the_reference() -> None:
    described = {
        name.rpartition(".")[2] for section in reference.SECTIONS.values() for name in section.names
    }
    assert set(hf_async_store.__all__) <= described


def test_every_command_has_a_page() -> None:
    pages = dict(commands.pages())
    assert pages.keys() == COMMANDS.keys()
    assert "| `--order NAME\\|-NAME` |" in pages["query"]
    assert "`--collections MODULE:NAME`" in pages["query"]


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    written = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    generated = {f"project/{name}" for name in links.PROJECT_PAGES}
    assert {each for each in written if not each.startswith("decisions/")} | generated == listed


@pytest.mark.parametrize(
    ("source", "target", "written", "expected"),
    [
        ("docs/guide.md", "docs/guide.md", "[a](tuning.md#b)", "[a](tuning.md#b)"),
        ("docs/guide.md", "docs/guide.md", "[a](#b) [c](https://d/e)", "[a](#b) [c](https://d/e)"),
        ("docs/index.md", "docs/index.md", "[a](../README.md)", "[a](index.md)"),
        ("docs/index.md", "docs/index.md", "[a](../SECURITY.md)", "[a](project/SECURITY.md)"),
        (
            "SECURITY.md",
            "docs/project/SECURITY.md",
            "[a](docs/decisions/) [b](docs/guide.md#c)",
            "[a](../index.md#decisions) [b](../guide.md#c)",
        ),
        ("docs/a.md", "docs/a.md", "<!-- not run: why -->\n| `a \\| b` | c |", "| `a | b` | c |"),
    ],
)
def test_links_are_rewritten(source: str, target: str, written: str, expected: str) -> None:
    assert links.for_site(written, source, target) == expected


def test_broken_links_of_the_built_site_are_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/index.html").write_text('<h1 id="here">')
    (tmp_path / "index.html").write_text(
        '<a href="a/#here"></a><a href="a/#there"></a><a href="b/"></a><script src="//host/c.js">'
    )
    assert check_links.mistakes(tmp_path) == [
        "index.html links to a/#there, an anchor that is not there",
        "index.html links to b/, which is not there",
        "index.html loads //host/c.js",
    ]


# -- tables of fields -----------------------------------------------------------------------


def rows_of(page: str, columns: int) -> Iterator[list[str]]:
    for line in (DOCS / page).read_text("utf-8").splitlines():
        cells = [each.strip() for each in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == columns and cells[0].startswith("`"):
            yield [cells[0].strip("`"), *cells[1:]]


def test_every_field_of_a_plan_is_described() -> None:
    described = [row[0] for row in rows_of("plans-and-capabilities.md", 3)]
    assert described == [each.name for each in msgspec.structs.fields(QueryPlan)]


def test_every_capability_is_described() -> None:
    described = [row[0] for row in rows_of("plans-and-capabilities.md", 2)]
    assert described == [each.name for each in msgspec.structs.fields(Capabilities)]


def test_the_values_of_capabilities_are_those_of_the_engines() -> None:
    urls = ("memory:", "json:x", "sqlite:x.db", "postgresql://a@localhost/b", "dynamodb://r-1/p")
    stores = [open_store(each) for each in urls]
    table = list(rows_of("plans-and-capabilities.md", 6))
    assert [row[0] for row in table] == [each.name for each in msgspec.structs.fields(Capabilities)]
    for name, *values in table:
        assert values == [shown(getattr(each.capabilities, name)) for each in stores], name


def shown(value: Any) -> str:
    """A value as the table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(f"`{each}`" for each in value)
    if isinstance(value, timedelta):
        return f"{value.total_seconds() / 3600:g} hours"
    return f"{value:,}" if isinstance(value, int) else f"`{value}`"


@pytest.mark.parametrize("url", ["memory:", "sqlite:{tmp_path}/jobs.db"])
def test_the_test_file_of_the_page_passes(tmp_path: Path, url: str) -> None:
    page = (DOCS / "testing-applications.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "test_jobs.py").write_text("\n\n".join(blocks))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [*PYTEST, "-q", "test_jobs.py", f"--hf-store-url={url}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "7 passed" in done.stdout
