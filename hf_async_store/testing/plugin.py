"""The pytest plugin of the contract suite: an option for the seed, and a list of skipped engines.

Every pytest run in an environment in which this package is installed loads this module. So it
imports only pytest, and does nothing until the suite is used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

# Each module separately: the package `hf_async_store.testing` is imported already, because it contains
# this module, and pytest cannot rewrite the assertions of imported modules.
_MODULES: Final = sorted(each.stem for each in Path(__file__).parent.glob("*.py"))
pytest.register_assert_rewrite(
    *(f"hf_async_store.testing.{each}" for each in _MODULES if each not in ("__init__", "plugin"))
)

LEFT_OUT: Final = "engine left out: "
"""The prefix of the skip reasons of `harness.skip_engine`."""

REQUIRE_VARIABLE: Final = "HF_ASYNC_STORE_REQUIRE_ENGINES"
SEED_VARIABLE: Final = "HF_ASYNC_STORE_TEST_SEED"
FULL_VARIABLE: Final = "HF_ASYNC_STORE_TEST_FULL"

_SUCCESSFUL: Final = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hf_async_store")
    group.addoption(
        "--hf-seed",
        type=int,
        metavar="N",
        help="seed of the random cases of the contract suite; a failing test reports its seed",
    )
    group.addoption(
        "--hf-full",
        action="store_true",
        help="repeat the cases of the contract suite as often as the contract states, not a fifth",
    )


def pytest_configure(config: pytest.Config) -> None:
    seed = config.getoption("--hf-seed")
    if seed is not None:
        # In the environment, so that worker processes inherit it.
        os.environ[SEED_VARIABLE] = str(seed)
    if config.getoption("--hf-full"):
        os.environ[FULL_VARIABLE] = "1"
    config.pluginmanager.register(_SkippedEngines(), "hf_async_store_left_out")


class _SkippedEngines:
    """Reports the engines that were skipped; fails the run if all engines are required."""

    def __init__(self) -> None:
        self._skipped: dict[str, None] = {}  # a dict as an ordered set
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
