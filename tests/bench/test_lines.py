"""The benchmark distribution, with the demo and the test servers, stays small."""

from __future__ import annotations

from pathlib import Path

MOST = 8000


def test_the_distribution_has_no_more_lines_than_allowed() -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    lines = {
        str(file.relative_to(benchmarks)): len(file.read_text(encoding="utf-8").splitlines())
        for file in benchmarks.rglob("*.py")
    }
    assert "hf_async_store_bench/servers.py" in lines
    total = sum(lines.values())
    assert total <= MOST, f"{total:,} lines of Python in {len(lines)} files"
