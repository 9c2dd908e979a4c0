"""A transaction of SQLite in one call of the driver's thread.

A call costs more than a small statement, and other processes wait for the write lock meanwhile.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def committed(
    connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], Result]
) -> Result:
    """Do work under the write lock, and commit it; if it fails, nothing has been done."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result
