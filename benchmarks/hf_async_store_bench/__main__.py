"""`python -m hf_async_store_bench worker`, or `demo.worker`: a process that the harness or the demo
starts, and tells its plan over a pipe."""

import asyncio
import sys
from importlib import import_module

raise SystemExit(asyncio.run(import_module(f"hf_async_store_bench.{sys.argv[1]}").work()))
