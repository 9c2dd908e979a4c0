"""docs/driver-interface.md and the driver interface agree. The page is also the record of its version: if a
method has changed so that an engine that was right may now be wrong, INTERFACE_VERSION grows."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import pytest

from docs_site import reference
from hf_async_store import driver
from hf_async_store.driver import INTERFACE_VERSION, Capabilities, Engine, Reader, Session
from tests.contract.test_wrong_capabilities import WRONG
from tests.contract.test_wrong_engines import WRONG_METHODS
from tests.docs.test_contract_page import listed

PAGE: Final = (Path(__file__).parents[2] / "docs/driver-interface.md").read_text("utf-8")


class Row(NamedTuple):
    """A row of a table of the page."""

    cells: list[str]

    @property
    def signature(self) -> str:
        return self.cells[0].strip("`")

    @property
    def name(self) -> str:
        return self.signature.partition("(")[0]

    @property
    def cases(self) -> set[int]:
        spans = re.findall(r"(\d+)(?: to (\d+))?", self.cells[-1])
        return {each for first, last in spans for each in range(int(first), int(last or first) + 1)}


def rows_below(heading: str) -> list[Row]:
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*) \|$", section, re.MULTILINE)
    return [Row([cell.strip() for cell in row.split(" | ")]) for row in rows]


def written(kind: type, name: str) -> str:
    """A method as the page writes it."""
    parameters = list(inspect.signature(getattr(kind, name)).parameters.values())[1:]
    keyword_only = [each.kind is each.KEYWORD_ONLY for each in parameters]
    names = [each.name for each in parameters]
    if True in keyword_only:
        names.insert(keyword_only.index(True), "*")
    return f"{name}({', '.join(names)})"


@pytest.mark.parametrize("kind", [Reader, Session, Engine])
def test_each_method_is_on_the_page(kind: Any) -> None:
    methods = [
        name
        for name, each in vars(kind).items()
        if inspect.isfunction(each) and not name.startswith("_")
    ]
    rows = rows_below(kind.__name__)
    assert {each.signature for each in rows} == {written(kind, name) for name in methods}
    required = {each.name for each in rows if each.cells[1] == "required"}
    assert required == {each for each in methods if each in kind.__abstractmethods__}


def test_each_capability_is_on_the_page() -> None:
    defaults = {
        each.name: "required" if each.required else f"`{each.default!r}`"
        for each in msgspec.structs.fields(Capabilities)
    }
    rows = rows_below("Capabilities")
    assert {each.name: each.cells[1].replace('"', "'") for each in rows} == defaults


@pytest.mark.parametrize("heading", ["Reader", "Session", "Engine", "Capabilities"])
def test_each_row_names_cases_of_the_contract(heading: str) -> None:
    for row in rows_below(heading):
        assert row.cases <= set(listed()), row.name
        assert row.cases or row.cells[-1].startswith("none: "), row.name


@pytest.mark.parametrize(("method", "case"), sorted(WRONG_METHODS))
def test_a_case_that_refuses_a_wrong_method_is_in_its_row(method: str, case: int) -> None:
    rows = {
        each.name: each for kind in (Reader, Session, Engine) for each in rows_below(kind.__name__)
    }
    assert case in rows[method].cases


def test_each_method_is_done_wrongly_by_an_engine() -> None:
    rows = [each for kind in (Reader, Session, Engine) for each in rows_below(kind.__name__)]
    assert {each.name for each in rows} == {method for method, _ in WRONG_METHODS}


@pytest.mark.parametrize(
    ("capability", "case"), sorted({(name, wrong.case) for name, wrong in WRONG})
)
def test_a_case_that_refuses_a_wrong_declaration_is_in_its_row(capability: str, case: str) -> None:
    rows = {each.name: each for each in rows_below("Capabilities")}
    assert int(case.split("_")[1]) in rows[capability].cases


def test_the_version_is_on_the_page() -> None:
    assert f"`hf_async_store.driver.INTERFACE_VERSION` is {INTERFACE_VERSION}." in PAGE
    assert f"    interface_version = {INTERFACE_VERSION}\n" in PAGE


def test_each_name_of_the_interface_is_in_the_reference() -> None:
    described = {
        name.rpartition(".")[2] for section in reference.SECTIONS.values() for name in section.names
    }
    assert set(driver.__all__) <= described
