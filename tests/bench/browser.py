"""A headless browser."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def browse(page: Path | str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page, without a network but for 127.0.0.1, so that missing resources are noticed."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        if os.environ.get("HF_ASYNC_STORE_REQUIRE_ENGINES") == "all":
            pytest.fail("no Chromium is installed, and everything is required")
        pytest.skip("no Chromium is installed")
    command = [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={folder / 'browser'}",
        *options,
        page if isinstance(page, str) else page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
