"""`python -m hf_async_store.demo`: the demo alone; with `--worker`, a process of the demo."""

from __future__ import annotations

import argparse
import asyncio
import sys

from hf_async_store.demo import add_arguments, run


def main() -> int:
    """The exit code of the demo, or of one of its workers."""
    if sys.argv[1:] == ["--worker"]:
        from hf_async_store.demo.worker import work

        return asyncio.run(work())
    parser = argparse.ArgumentParser(prog="python -m hf_async_store.demo")
    parser.add_argument("--store", metavar="URL")
    parser.add_argument("--config", metavar="FILE")
    add_arguments(parser)
    try:
        return asyncio.run(run(parser.parse_args()))
    except KeyboardInterrupt:
        return 130


raise SystemExit(main())
