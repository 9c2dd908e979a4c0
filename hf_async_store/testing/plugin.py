"""The pytest plugin of the contract suite: a seed, and an honest last line.

Every pytest run of everybody who has this package installed loads this module, so it imports
nothing but pytest and does nothing until the suite is used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

# Module by module: what is imported cannot be rewritten any more, and this package already is.
_MODULES: Final = sorted(each.stem for each in Path(__file__).parent.glob("*.py"))
pytest.register_assert_rewrite(
    *(f"hf_async_store.testing.{each}" for each in _MODULES if each not in ("__init__", "plugin"))
)

LEFT_OUT: Final = "engine left out: "
"""How the reason of a skip begins that `harness.leave_out` raised."""

REQUIRE_VARIABLE: Final = "HF_ASYNC_STORE_REQUIRE_ENGINES"
SEED_VARIABLE: Final = "HF_ASYNC_STORE_TEST_SEED"
FULL_VARIABLE: Final = "HF_ASYNC_STORE_TEST_FULL"

_GOOD: Final = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hf_async_store")
    group.addoption(
        "--hf-seed",
        type=int,
        metavar="N",
        help="the seed of the random cases of the contract suite; a failure tells the one it had",
    )
    group.addoption(
        "--hf-full",
        action="store_true",
        help="repeat the cases of the contract suite as often as the contract states, not a fifth",
    )


def pytest_configure(config: pytest.Config) -> None:
    seed = config.getoption("--hf-seed")
    if seed is not None:
        # The environment, so that worker processes have it, too.
        os.environ[SEED_VARIABLE] = str(seed)
    if config.getoption("--hf-full"):
        os.environ[FULL_VARIABLE] = "1"
    config.pluginmanager.register(_LeftOut(), "hf_async_store_left_out")


class _LeftOut:
    """The engines that a run had to leave out: said in its last lines, or made a failure."""

    def __init__(self) -> None:
        self._found: dict[str, None] = {}  # in the order in which they were met
        self._required = os.environ.get(REQUIRE_VARIABLE) == "all"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if reason.startswith(LEFT_OUT):
                self._found[reason.removeprefix(LEFT_OUT)] = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._found and self._required and session.exitstatus in _GOOD:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for each in self._found:
            terminalreporter.line(
                f"{'FAILED ' if self._required else ''}{LEFT_OUT}{each}",
                red=self._required,
                yellow=not self._required,
            )
