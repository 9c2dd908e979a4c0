"""Claims on PostgreSQL that an expiry has ended: the claim of a row whose entity has expired, and which is
about to be replaced by a new entity.

A deletion removes the claim with the row, by the foreign key; a replacement does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hf_async_store.strategies.sql.names import DOC, quoted

if TYPE_CHECKING:
    from hf_async_store.strategies.sql.connections import LeasedConnection
    from hf_async_store.strategies.sql.decisions import Stored
    from hf_async_store.strategies.sql.rows import Table
    from hf_async_store.values import Key

_IS_TRUSTED: Final = """
SELECT 1 FROM pg_catalog.pg_class AS c, pg_catalog.pg_class AS o
WHERE c.oid = pg_catalog.to_regclass($1::text) AND o.oid = pg_catalog.to_regclass($2::text)
    AND (c.relowner = o.relowner OR pg_catalog.pg_has_role(c.relowner, 'USAGE'::text))
"""
"""Returns a row if the table of claims exists, and belongs to the owner of the entities or to our role."""


async def end_claim(
    lease: LeasedConnection, claims: str, table: Table, key: Key, expired: Stored
) -> None:
    """Delete the claim of an expired entity, if its row is still the one that was read.

    Args:
        claims: the name of the table of claims, which need not exist.
    """
    if not await lease.rows(_IS_TRUSTED, (quoted(claims), table.name)):
        return
    # The row is locked, so that nobody has created the entity again, and claimed it.
    await lease.rows(
        f"WITH e AS MATERIALIZED (SELECT t.{table.key} FROM {table.name} AS t "
        f"WHERE t.{table.key} = $1::text AND t.{DOC} = $2::text::jsonb FOR UPDATE) "
        f"DELETE FROM {quoted(claims)} AS c USING e WHERE c.id = e.{table.key}",
        (key.id, expired.doc),
        doing="end a claim",
        writes=True,
    )
