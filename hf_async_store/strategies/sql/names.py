"""Names in SQL: of tables, columns and indexes."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

DOC: Final = "doc"
"""The column that contains the entity."""

OLD_SIDE: Final = "_side"
"""A column of the first layout of the tables, by which that layout is recognised."""

PROBES: Final = "_hf_async_store"
"""The table without entities, in which `test_connection` writes and deletes a row."""

CATALOGUE: Final = "_hf_async_store_catalogue"
"""The table that describes the store: see `ddl`."""

# The system columns of every table in PostgreSQL.
_TAKEN: Final = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})


def sql_name(name: str) -> str:
    """The name of a declared field or collection in SQL.

    Reserved names get the prefix `_`, with which no declared name begins.
    """
    return f"_{name}" if name in _TAKEN or name.startswith("sqlite_") else name


def declared_name(name: str) -> str:
    """The inverse of `sql_name`."""
    return name.removeprefix("_") if sql_name(name.removeprefix("_")) == name else name


def quoted(name: str) -> str:
    """A declared name, which matches `[a-z][a-z0-9_]*`, as a quoted SQL identifier."""
    return f'"{sql_name(name)}"'


def limited(name: str) -> str:
    """A name of at most 63 bytes, because PostgreSQL truncates longer ones."""
    if len(name) <= 63:
        return name
    return f"{name[:50]}~{blake2b(name.encode(), digest_size=6).hexdigest()}"
