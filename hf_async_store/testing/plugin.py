"""The pytest plugin: for applications, the fixtures of `testing.fixtures`; for the contract suite, options
for the seed and for a full run, the choice of variants, and a list of skipped engines.

Every pytest run in an environment in which this package is installed loads this module. So it
imports little besides pytest, and does nothing until the suite or a fixture is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from random import SystemRandom
from typing import Final

import pytest

from hf_async_store.testing.random_choices import FULL_VARIABLE, SEED_VARIABLE, STRIDE, random_of

pytest_plugins = ("hf_async_store.testing.fixtures",)

# Each module separately: the package `hf_async_store.testing` is imported already, because it contains
# this module, and pytest cannot rewrite the assertions of imported modules.
_MODULES: Final = sorted(each.stem for each in Path(__file__).parent.glob("*.py"))
_IMPORTED: Final = ("__init__", "plugin", "random_choices")
pytest.register_assert_rewrite(
    *(f"hf_async_store.testing.{each}" for each in _MODULES if each not in _IMPORTED)
)

LEFT_OUT: Final = "engine left out: "
"""The prefix of the skip reasons of `harness.skip_engine`."""

NOT_TRIED: Final = "fault not tried, because the harness does not implement it: "
"""The prefix of the skip reasons of `harness.skip_fault`."""

REQUIRE_VARIABLE: Final = "HF_ASYNC_STORE_REQUIRE_ENGINES"

_MARKER: Final = (
    "hf_sampled(by='test'): in a run of whole files without --hf-full, a random sixth of the variants of "
    "each test is run, at least one; by='class' or 'module': of all marked tests of the class or module; "
    "by='url': of the variants with the same value of this parameter or fixture; "
    "one_in=12: a twelfth instead of a sixth"
)
_SUCCESSFUL: Final = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hf_async_store")
    group.addoption(
        "--hf-seed",
        type=int,
        metavar="N",
        help="seed of the random cases and of the choice of variants; a failing test reports its seed",
    )
    group.addoption(
        "--hf-full",
        action="store_true",
        help="repeat the cases of the contract suite as often as the contract states, not a tenth, "
        "and run all variants of a case, not a sixth",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)
    seed = config.getoption("--hf-seed")
    # In the environment, so that worker processes inherit it.
    if seed is not None:
        os.environ[SEED_VARIABLE] = str(seed)
    os.environ.setdefault(SEED_VARIABLE, str(SystemRandom().randrange(2**32)))
    if config.getoption("--hf-full"):
        os.environ[FULL_VARIABLE] = "1"
    config.pluginmanager.register(_SkippedEngines(), "hf_async_store_left_out")


@pytest.hookimpl(trylast=True)  # after the selection by `-m`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = config.option.keyword or any("::" in each for each in config.args)
    if named or os.environ.get(FULL_VARIABLE):
        return
    groups: dict[tuple[str, int], list[pytest.Item]] = {}
    for each in items:
        markers = list(each.iter_markers("hf_sampled"))
        if markers:
            stride = max(marker.kwargs.get("one_in", STRIDE) for marker in markers)
            groups.setdefault((_group(each, markers), stride), []).append(each)
    dropped: set[pytest.Item] = set()
    for (name, stride), variants in groups.items():
        start = random_of(name).randrange(min(stride, len(variants)))
        dropped.update(variants)
        dropped.difference_update(variants[start::stride])
    if dropped:
        config.hook.pytest_deselected(items=[each for each in items if each in dropped])
        items[:] = [each for each in items if each not in dropped]


def _group(item: pytest.Item, markers: Iterable[pytest.Mark]) -> str:
    """The name of the tests from which variants are drawn together."""
    name = item.nodeid.partition("[")[0]
    for by in (marker.kwargs.get("by", "test") for marker in markers):
        if by == "class":
            name = item.nodeid.partition("[")[0].rpartition("::")[0]
        elif by == "module":
            name = item.nodeid.partition("::")[0]
        elif by != "test":
            name += f" {item.callspec.params.get(by)}" if hasattr(item, "callspec") else ""
    return name


def repeating() -> str:
    """How a run is repeated with the same seed."""
    return f"--hf-seed {os.environ[SEED_VARIABLE]} repeats the random choices of this run"


class _SkippedEngines:
    """Reports the engines and the faults that were skipped; fails the run if all engines are required."""

    def __init__(self) -> None:
        self._skipped: dict[str, None] = {}  # a dict as an ordered set
        self._not_tried: dict[str, None] = {}
        self._required = os.environ.get(REQUIRE_VARIABLE) == "all"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._record_skip(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._record_skip(report)

    def _record_skip(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if reason.startswith(LEFT_OUT):
                self._skipped[reason.removeprefix(LEFT_OUT)] = None
            elif reason.startswith(NOT_TRIED):
                self._not_tried[reason] = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._skipped and self._required and session.exitstatus in _SUCCESSFUL:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for each in self._skipped:
            terminalreporter.line(
                f"{'FAILED ' if self._required else ''}{LEFT_OUT}{each}",
                red=self._required,
                yellow=not self._required,
            )
        for each in self._not_tried:
            terminalreporter.line(each, yellow=True)
        failed = (*terminalreporter.getreports("failed"), *terminalreporter.getreports("error"))
        # A module that cannot be collected has no keywords.
        if any("hf_sampled" in getattr(each, "keywords", ()) for each in failed):
            terminalreporter.line(repeating())
