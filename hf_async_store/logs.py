"""The loggers of drivers. Those of this package are listed in `docs/logging.md`."""

from __future__ import annotations

import logging


def hide_debug_messages(*names: str) -> None:
    """Let the loggers of a driver show no debug messages, which contain values, unless their level is set.

    The level of a logger above them, such as the root, then has no effect on this.
    """
    for each in names:
        logger = logging.getLogger(each)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
