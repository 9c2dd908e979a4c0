"""`python -m hf_async_store`: the command line."""

from hf_async_store.cli import run

run()
