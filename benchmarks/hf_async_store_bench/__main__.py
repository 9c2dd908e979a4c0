"""`python -m hf_async_store_bench worker` and `... demo-worker`: processes that the harness and the
demo start. They get their plan over a pipe."""

from __future__ import annotations

import asyncio
import sys


def main(role: str) -> int:
    """The exit code of a worker."""
    if role == "demo-worker":
        from hf_async_store_bench.demo.worker import work as demo_work

        return asyncio.run(demo_work())
    from hf_async_store_bench.worker import work

    return asyncio.run(work())


raise SystemExit(main(sys.argv[1]))
