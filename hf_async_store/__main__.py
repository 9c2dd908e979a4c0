"""`python -m hf_async_store`: the command line."""

from __future__ import annotations

import gc
from typing import Final, NoReturn

_OBJECTS_PER_COLLECTION: Final = 100_000
"""How many objects more than before there are when garbage is looked for."""


def run() -> NoReturn:
    """Run the command of this process, and end it."""
    # Almost all that a short command allocates are modules, which stay. By default, garbage would be looked
    # for among them some two hundred times. Set before they are imported.
    gc.set_threshold(_OBJECTS_PER_COLLECTION)
    from hf_async_store import cli

    cli.run()


if __name__ == "__main__":
    run()
