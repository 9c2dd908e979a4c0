"""`python -m hf_async_store.bench`: a worker process of the harness. It gets its plan over a pipe."""

from __future__ import annotations

import asyncio

from hf_async_store.bench.worker import work

raise SystemExit(asyncio.run(work()))
