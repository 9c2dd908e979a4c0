"""docs/contract.md and the tests agree: each case has a test, and each numbered test has a case."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]


def listed() -> list[int]:
    """The numbers of the cases in the tables of the page, in order."""
    page = (ROOT / "docs/contract.md").read_text(encoding="utf-8")
    return [int(each) for each in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)]


@cache
def files_by_number() -> dict[int, list[str]]:
    """By case number, the files with tests whose names contain it."""
    found: dict[int, list[str]] = {}
    for folder in ("hf_async_store/testing", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            for number in re.findall(r"def test_(\d{1,3})_", text):
                found.setdefault(int(number), []).append(str(path.relative_to(ROOT)))
    return found


def test_the_case_numbers_are_ascending() -> None:
    assert listed() == sorted(set(listed()))


@pytest.mark.parametrize("number", listed())
def test_a_listed_case_has_a_test(number: int) -> None:
    assert number in files_by_number(), f"no test is named test_{number}_..."


def test_a_numbered_test_has_its_case() -> None:
    unknown = {
        number: files for number, files in files_by_number().items() if number not in listed()
    }
    assert not unknown
