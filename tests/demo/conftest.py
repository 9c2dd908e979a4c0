"""Initial data for the demo: real data, or generated data in the same layouts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

LAYOUTS = ("single_file", "split_files_flat", "split_files_wrapped")


@pytest.fixture(params=LAYOUTS)
def field_data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with data in one of the existing layouts; real data if they are available."""
    return _data(request.param, tmp_path)


@pytest.fixture
def single_file(tmp_path: Path) -> Path:
    return _data("single_file", tmp_path)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Clear the environment variables for data, and use a separate folder for temporary files."""
    monkeypatch.delenv("HF_ASYNC_STORE_REAL_DATA", raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


# Read before `no_environment` removes it.
_REAL = os.environ.get("HF_ASYNC_STORE_REAL_DATA")


def _data(layout: str, tmp_path: Path) -> Path:
    folder = tmp_path / layout
    if _REAL:
        shutil.copytree(Path(_REAL) / layout, folder)
    else:
        folder.mkdir()
        _write(layout, folder)
    return folder


def _write(layout: str, folder: Path) -> None:
    data = _made_up()
    if layout == "single_file":
        (folder / "request_database.json").write_text(json.dumps(data, ensure_ascii=False))
        return
    for name, entities in data.items():
        held = {name: entities} if layout == "split_files_wrapped" else entities
        (folder / f"{name}.json").write_text(json.dumps(held, indent=2))


def _made_up() -> dict[str, dict[str, Any]]:
    """Data like real ones: no version or versions from 0, no time zone, null, non-ASCII text."""
    templates = {
        name: {
            "template_id": name,
            "name": f"Vorlage {name} für 数据",
            "machine_types": {"t3.medium": 2, "t3.xlarge": 4},
            "max_machines": 100,
            "created_at": "2026-07-06T22:07:11.806716",
        }
        for name in ("EC2Fleet-Instant", "SpotFleet-Request")
    }
    requests = {
        f"req-{number}": {
            "request_id": f"req-{number}",
            "template_id": "SpotFleet-Request",
            "machine_count": 5,
            "status": ("pending", "complete", "in_progress")[number % 3],
            "request_type": "acquire",
            "metadata": {"ratio": 2.5, "whole": 2.0, "attempt": 0, "note": None},
            "created_at": "2026-06-01T08:00:00.414002+00:00",
            "completed_at": None,
            "version": number % 2,
        }
        for number in range(9)
    }
    machines = {
        f"i-{number}": {
            "created_at": "2026-06-01T10:00:00+02:00",
            "updated_at": None,
            "machine_id": f"i-{number}",
            "template_id": "SpotFleet-Request",
            "request_id": f"req-{number // 5}",
            "return_request_id": None,
            "status": ("pending", "running", "failed")[number % 3],
            "security_group_ids": ["sg-0d9f3a77"],
            "tags": {"Owner": "数据"},
            "version": 1,
        }
        for number in range(45)
    }
    return {"templates": templates, "requests": requests, "machines": machines}
