"""docs/logging.md lists every message that is logged, with its logger and level."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
LEVELS: Final = ("debug", "info", "warning", "error", "exception", "critical")


def loggers_of(tree: ast.AST) -> dict[str, str]:
    """The names of the loggers of a module by those of its variables."""
    return {
        each.target.id: each.value.args[0].value
        for each in ast.walk(tree)
        if isinstance(each, ast.AnnAssign)
        and isinstance(each.target, ast.Name)
        and isinstance(each.value, ast.Call)
        and ast.unparse(each.value.func) == "logging.getLogger"
        and isinstance(each.value.args[0], ast.Constant)
    }


def logged() -> Iterator[tuple[str, str, str]]:
    for path in sorted((ROOT / "hf_async_store").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "getLogger" not in text:
            continue
        tree = ast.parse(text)
        loggers = loggers_of(tree)
        for each in ast.walk(tree):
            if (
                isinstance(each, ast.Call)
                and isinstance(each.func, ast.Attribute)
                and each.func.attr in LEVELS
                and ast.unparse(each.func.value) in loggers
            ):
                logger = loggers[ast.unparse(each.func.value)]
                yield logger, each.func.attr.upper(), ast.literal_eval(each.args[0])


def listed() -> list[tuple[str, ...]]:
    page = (ROOT / "docs/logging.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \| ([A-Z]+) \| `([^`]+)` \|", page, re.MULTILINE)


def test_every_message_is_listed() -> None:
    found = list(logged())
    assert len(found) > 20
    assert sorted(listed()) == sorted(set(found))
