"""Names in SQL: of tables, views, columns and indexes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

import msgspec

DOC: Final = "doc"
"""The column that contains the entity."""

GENERATION: Final = "row-generation"
"""The column, on PostgreSQL, that contains the generation of the table by which a row was written."""

GENERATION_PREFIX: Final = "generation-"
"""What the names of the constraints begin with that `generation_constraint` returns."""

# The system columns of every table in PostgreSQL.
_TAKEN: Final = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})
_MAX_BYTES: Final = 63
"""The maximum length of a name: PostgreSQL truncates longer ones."""

_CUT: Final = re.compile(r"~[0-9a-f]{12}\Z")
"""How a name ends that `limited` has cut."""


class Names(msgspec.Struct, frozen=True):
    """The names of the tables, views and indexes of one store.

    No declared name contains a hyphen, so the names of different collections and fields differ.

    Attributes:
        prefix: what they begin with. Stores with different prefixes are separate.
    """

    prefix: str = ""

    @property
    def catalogue(self) -> str:
        """The table that describes the store: see `catalogue`."""
        return self._of("hf_catalogue")

    def view(self, collection: str) -> str:
        """The view of a collection."""
        return self._of(collection)

    def table(self, collection: str) -> str:
        """The table of a collection."""
        return self._of(collection, "-entities")

    def index(self, collection: str, fields: Sequence[str]) -> str:
        """An index of a collection on some fields."""
        return self._of(collection, f"-{'-'.join(fields)}-index")

    def unique_index(self, collection: str, fields: Sequence[str]) -> str:
        """The index of the unique column of some fields."""
        return self._of(collection, f"-{'-'.join(fields)}-unique")

    def claims(self, collection: str) -> str:
        """The table of the claims of a collection."""
        return self._of(collection, "-claims")

    def feed(self, collection: str) -> str:
        """The table of the changes of a collection; on PostgreSQL, also the function that writes it."""
        return self._of(collection, "-feed")

    def feed_trigger(self, collection: str, event: str) -> str:
        """The trigger of a collection that writes its changes."""
        return self._of(collection, f"-feed-{event}")

    def feed_trigger_place(self, collection: str, event: str) -> str:
        """As `feed_trigger`, as `Dialect.relations` names it."""
        return trigger_place(self.feed_trigger(collection, event), self.table(collection))

    def _of(self, name: str, ending: str = "") -> str:
        return limited(f"{sql_name(self.prefix + name)}{ending}")


def trigger_place(trigger: str, table: str) -> str:
    """The name of a trigger among those of tables, views and indexes."""
    return f"{trigger} ON {table}"


def is_unique_index(index: str, table: str) -> bool:
    """Whether an index of a table has a name as `Names.unique_index` returns; others are of other programs.

    Both names may be cut by `limited`, at different places of the same beginning.
    """
    own = _CUT.sub("", table) if _CUT.search(table) else f"{table.removesuffix('-entities')}-"
    if not _CUT.search(index):
        return index.startswith(own) and index.endswith("-unique")
    start = _CUT.sub("", index)
    return start.startswith(own) or own.startswith(start)


def sql_name(name: str) -> str:
    """The name of a declared field, or of the view of a collection, in SQL.

    Reserved names get the prefix `_`, with which no declared name begins.
    """
    return f"_{name}" if name in _TAKEN or name.lower().startswith("sqlite_") else name


def key_column(field: str) -> str:
    """The name of the column that contains `sort_bytes` of a field."""
    return f"{sql_name(field)}-key"


def unique_column(fields: Sequence[str]) -> str:
    """The name of the column that contains `unique.digest` of the fields of a unique index."""
    return limited(f"{'-'.join(fields)}-unique")


def generation_constraint(collection: str) -> str:
    """The name of the constraint, on PostgreSQL, that refuses rows of programs that do not know all key
    columns."""
    return limited(f"{GENERATION_PREFIX}{sql_name(collection)}")


def quoted(name: str) -> str:
    """A name as a quoted SQL identifier."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def limited(name: str) -> str:
    """A name of at most 63 bytes. A longer one is cut, and keeps its identity by a hash."""
    encoded = name.encode()
    if len(encoded) <= _MAX_BYTES:
        return name
    start = encoded[:50].decode(errors="ignore")
    return f"{start}~{blake2b(encoded, digest_size=6).hexdigest()}"
