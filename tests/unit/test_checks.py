"""Checks that apply to all tests: errors that the event loop logs, and unclosed stores."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable

import pytest

from hf_async_store import open_store
from hf_async_store.testing.assertions import no_complaints


@pytest.fixture
def _no_complaints() -> None:
    """Overrides the fixture of all tests: these tests cause errors of the event loop on purpose."""


def _never_retrieved() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        task = asyncio.create_task(fail())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task

    asyncio.run(main())


def _destroyed() -> None:
    async def main() -> None:
        asyncio.create_task(asyncio.sleep(100))  # noqa: RUF006 - nobody refers to it
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()


@pytest.mark.parametrize(
    ("cause", "words"), [(_never_retrieved, "never retrieved"), (_destroyed, "was destroyed")]
)
def test_errors_logged_by_the_event_loop_fail_a_test(cause: Callable[[], None], words: str) -> None:
    def checked() -> None:
        with no_complaints():
            cause()

    with pytest.raises(AssertionError, match=words):
        checked()


def test_a_slow_callback_does_not_fail_a_test() -> None:
    with no_complaints():
        logging.getLogger("asyncio").warning("Executing took 1.2 seconds")


async def _forget() -> None:
    await open_store("memory:").open()
    gc.collect()


async def test_an_unclosed_store_is_noticed() -> None:
    with pytest.warns(ResourceWarning, match="unclosed store"):
        await _forget()


async def test_a_closed_or_never_opened_store_causes_no_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    async with open_store("memory:"):
        pass
    open_store("memory:")
    gc.collect()
    assert not [each for each in recwarn if each.category is ResourceWarning]
