"""Names in SQL: of tables, views, columns and indexes."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

DOC: Final = "doc"
"""The column that contains the entity."""

GENERATION: Final = "row-generation"
"""The column, on PostgreSQL, that contains the generation of the table by which a row was written."""

GENERATION_PREFIX: Final = "generation-"
"""What the names of the constraints begin with that `generation_constraint` returns."""

CATALOGUE: Final = "hf_catalogue"
"""The table that describes the store: see `catalogue`."""

# The system columns of every table in PostgreSQL.
_TAKEN: Final = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})
_ENTITIES: Final = "-entities"
_CLAIMS: Final = "-claims"


def sql_name(name: str) -> str:
    """The name of a declared field, or of the view of a collection, in SQL.

    Reserved names get the prefix `_`, with which no declared name begins.
    """
    return f"_{name}" if name in _TAKEN or name.startswith("sqlite_") else name


def table_name(collection: str) -> str:
    """The name of the table of a collection. No declared name contains a hyphen."""
    return f"{sql_name(collection)}{_ENTITIES}"


def claim_table_name(collection: str) -> str:
    """The name of the table of the claims of a collection."""
    return f"{sql_name(collection)}{_CLAIMS}"


def collection_name(table: str) -> str | None:
    """The collection of a table; None if its name is not that of such a table."""
    name = table.removesuffix(_ENTITIES)
    if name == table:
        return None
    plain = name.removeprefix("_")
    return plain if sql_name(plain) == name else name


def key_column(field: str) -> str:
    """The name of the column that contains `sort_bytes` of a field."""
    return f"{sql_name(field)}-key"


def index_name(collection: str, fields: Sequence[str]) -> str:
    """The name of an index; it identifies the collection and the fields."""
    return limited(f"{sql_name(collection)}-{'-'.join(fields)}-index")


def generation_constraint(collection: str) -> str:
    """The name of the constraint, on PostgreSQL, that refuses rows of programs that do not know all key
    columns."""
    return limited(f"{GENERATION_PREFIX}{sql_name(collection)}")


def quoted(name: str) -> str:
    """A name of this module as a quoted SQL identifier."""
    return f'"{name}"'


def limited(name: str) -> str:
    """A name of at most 63 bytes, because PostgreSQL truncates longer ones."""
    if len(name) <= 63:
        return name
    return f"{name[:50]}~{blake2b(name.encode(), digest_size=6).hexdigest()}"
