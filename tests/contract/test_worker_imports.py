"""What the programs import that tests start again and again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_IMPORTS = """
import sys
import hf_async_store.testing.process_workers
import tests.contract.claim_worker
import tests.contract.feed_worker
import tests.json.crash_driver
import tests.json.process_roles
print([each for each in ("pytest", "hypothesis") if each in sys.modules])
"""


def test_worker_processes_do_not_import_pytest() -> None:
    """It would take as long as everything else that they import."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
