"""The SQL of claims, and what differs in it between SQLite and PostgreSQL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final

from hf_async_store.strategies.sql.compiler import compile_query
from hf_async_store.strategies.sql.grammar import Arguments
from hf_async_store.strategies.sql.names import quoted
from hf_async_store.strategies.sql.sqlite_functions import NANOSECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_async_store.claim_clock import Moment
    from hf_async_store.claim_records import ClaimTerms
    from hf_async_store.query import Query
    from hf_async_store.strategies.sql.grammar import Compiled, Grammar
    from hf_async_store.strategies.sql.rows import Table
    from hf_async_store.values import Key

COLUMNS: Final = "id, token, owner, era, ends, held, attempts"


TOOK_LONG: Final = (
    "pg_catalog.clock_timestamp() > pg_catalog.statement_timestamp() + '2 ms'::interval"
)
"""On PostgreSQL, whether a statement has taken so long that it has probably passed over many entities."""

_LOOK_UP_UNTIL: Final = "(SELECT pg_catalog.clock_timestamp() + '500 us'::interval)"

_FEW_CLAIMS: Final = (
    "c.id >= ''::text AND c.attempts + 0::bigint >= 0::bigint "
    "AND c.attempts + 0::bigint < 9223372036854775807::bigint"
)
"""Always true. Because of it, the server expects few claims, so that it hashes them whatever `work_mem` is,
and reads them by their index, because scans of tables are disabled where entities are claimed."""


class ClaimSQL(Arguments, ABC):
    """A statement about the claims of a collection, while it is written; `c` is its table.

    Args:
        name: of the table.
        now: by the clock of claims.
    """

    greatest: ClassVar[str]
    """The function that returns the greater of two numbers."""

    server_seconds: ClassVar[str]
    """The clock of the server, in seconds."""

    server_nanoseconds: ClassVar[str]
    """The same in nanoseconds, for new tokens, of the moment at which the row is written: an earlier
    statement may have waited for the lock while an entity was claimed and deleted."""

    lock: ClassVar[str]
    """The end of a SELECT from the claims `c` that locks them."""

    def __init__(self, grammar: Grammar, name: str, now: Moment) -> None:
        super().__init__(grammar)
        self.table = quoted(name)
        self._now = now

    @abstractmethod
    def number(self, value: float) -> str:
        """A parameter for a float."""

    @abstractmethod
    def integer(self, value: int) -> str:
        """A parameter for an integer of 64 bits."""

    @abstractmethod
    def candidates(
        self,
        table: Table,
        query: Query,
        terms: ClaimTerms,
        prefix: Sequence[str],
        limit: str,
        *,
        many: bool,
    ) -> Compiled:
        """The SELECT of the first entities that can be claimed, without those that others have locked: the
        columns of `Table.selected`, and possibly the place of the row.

        Args:
            prefix: see `compile_query`.
            limit: as SQL.
            many: many of the first ones are probably held.
        """

    @abstractmethod
    def listed(self, ids: Sequence[str]) -> str:
        """The item `i (id)` of a FROM clause with these ids."""

    @classmethod
    @abstractmethod
    def ddl(cls, name: str, entities: Table | None) -> list[str]:
        """The statements that create the table.

        Args:
            name: of the table.
            entities: the table of the entities, with which their claims are deleted; None: of locks.
        """

    # -- parts -------------------------------------------------------------------------------

    @property
    def seconds(self) -> str:
        """The present time, in seconds."""
        now = self._now.seconds
        return self.server_seconds if now is None else self.number(now)

    def is_busy(self, terms: ClaimTerms, *, once: bool = False) -> str:
        """The condition that an entity cannot be claimed.

        Args:
            once: the clock is read once for many rows.
        """
        seconds = f"(SELECT {self.seconds})" if once else self.seconds
        busy = f"(c.era = {self.add(self._now.era)} AND c.ends > {seconds})"
        if terms.max_attempts is not None:
            busy = f"({busy} OR c.attempts >= {self.integer(terms.max_attempts)})"
        return busy

    def no_claim(self, entities: Table, busy: str) -> str:
        """The condition that the entity `t` can be claimed: its claim, if there is one, is not busy."""
        busy = f"c.id = t.{entities.key} AND {busy}"
        return f"NOT EXISTS (SELECT 1 FROM {self.table} AS c WHERE {busy})"

    def is_held(self, key: Key, token: int) -> str:
        """The condition that the holder of a token holds a claim."""
        return (
            f"c.id = {self.add(key.id)} AND c.token = {self.integer(token)} AND c.held = TRUE "
            f"AND c.era = {self.add(self._now.era)} AND c.ends > {self.seconds}"
        )

    # -- statements --------------------------------------------------------------------------

    def insert(self, source: str, terms: ClaimTerms) -> str:
        """Claims the ids `i.id` of a source, if their claims allow it."""
        return (
            f"INSERT INTO {self.table} AS c ({COLUMNS}) SELECT i.id, {self.server_nanoseconds}, "
            f"{self.add(terms.owner)}, {self.add(self._now.era)}, "
            f"{self.seconds} + {self.number(terms.lease)}, TRUE, 1 "
            f"FROM {source} WHERE TRUE ON CONFLICT (id) DO UPDATE SET "
            f"token = {self.greatest}(c.token + 1, excluded.token), owner = excluded.owner, "
            "era = excluded.era, ends = excluded.ends, held = TRUE, attempts = c.attempts + 1 "
            f"WHERE NOT {self.is_busy(terms)} RETURNING id, token, attempts"
        )

    def update(self, key: Key, token: int, seconds: float, *, held: bool) -> str:
        """Lets a claim that is held end some seconds from now."""
        ends = f"{self.seconds} + {self.number(seconds)}"
        sets = f"ends = {ends}, held = {'TRUE' if held else 'FALSE'}"
        return f"UPDATE {self.table} AS c SET {sets} WHERE {self.is_held(key, token)} RETURNING id"

    def delete(self, key: Key, token: int | None) -> str:
        """Deletes a claim, if it is held with this token; None: whoever holds it."""
        condition = f"c.id = {self.add(key.id)}" if token is None else self.is_held(key, token)
        return f"DELETE FROM {self.table} AS c WHERE {condition} RETURNING id"

    def check(self, key: Key, token: int) -> str:
        """Returns a row, and locks it, if a claim is held with this token."""
        return f"SELECT 1 FROM {self.table} AS c WHERE {self.is_held(key, token)}{self.lock}"

    def write(
        self, sql: str, key: Key, token: int, place: object, *, ends: bool, snapshot: bool
    ) -> str:
        """Locks a claim, and if it is held with this token, executes a statement of `Writer.if_held`, whose
        arguments come first. Returns a row if it is held: the version that was written, and the place of
        the row.

        Args:
            place: where the row was, for a statement that asks for it; else None.
            ends: the claim is deleted, if the statement has changed a row.
            snapshot: the transaction has one snapshot, so the deletion fails with a conflict if the claim
                was changed since, and need not lock it before.
        """
        lock = "" if ends and snapshot else self.lock
        at = "" if place is None else f", {self.add(place, 'place')} AS place"
        held = f"SELECT c.id{at} FROM {self.table} AS c WHERE {self.is_held(key, token)}{lock}"
        end = ""
        if ends:
            written = f"c.id = {self.add(key.id)} AND EXISTS (SELECT 1 FROM w)"
            end = f", e AS (DELETE FROM {self.table} AS c WHERE {written})"
        return (
            f"WITH held AS MATERIALIZED ({held}), w (id, version, place) AS ({sql}){end} "
            "SELECT w.version, w.place FROM held LEFT JOIN w ON TRUE"
        )

    def list(self) -> str:
        """Returns the claims, each with the present time."""
        return f"SELECT {COLUMNS}, {self.seconds} FROM {self.table} ORDER BY id"


class SQLiteClaimSQL(ClaimSQL):
    greatest = "max"
    server_seconds = ""
    server_nanoseconds = f"{NANOSECONDS}()"
    lock = ""

    def candidates(
        self,
        table: Table,
        query: Query,
        terms: ClaimTerms,
        prefix: Sequence[str],
        limit: str,
        *,
        many: bool,
    ) -> Compiled:
        del many  # a look-up in the same process costs little more than a row
        found = compile_query(
            table,
            query,
            args=self,
            also=lambda: self.no_claim(table, self.is_busy(terms)),
            prefix=prefix,
        )
        return found._replace(sql=f"{found.sql} LIMIT {limit}")

    def number(self, value: float) -> str:
        return self.add(value)

    def integer(self, value: int) -> str:
        return self.add(value)

    def listed(self, ids: Sequence[str]) -> str:
        ids_ = self.add(self._grammar.strings(ids), "list")
        return f"(SELECT value AS id FROM json_each({ids_})) AS i"

    @classmethod
    def ddl(cls, name: str, entities: Table | None) -> list[str]:
        statements = [
            f"CREATE TABLE {quoted(name)} (id TEXT PRIMARY KEY NOT NULL, token BIGINT NOT NULL, "
            "owner TEXT NOT NULL, era TEXT NOT NULL, ends REAL NOT NULL, held BOOLEAN NOT NULL, "
            "attempts BIGINT NOT NULL) WITHOUT ROWID"
        ]
        if entities is not None:
            statements.append(
                f"CREATE TRIGGER {quoted(f'{name}-end')} AFTER DELETE ON {entities.name} "
                f"BEGIN DELETE FROM {quoted(name)} WHERE id = OLD.{entities.key}; END"
            )
        return statements


class PostgresClaimSQL(ClaimSQL):
    greatest = "greatest"
    # Not the time at which the transaction began: it may have waited for a lock since. Not in a subquery,
    # which is evaluated once, but costs as much as for 50 rows; `extract` has a decimal as result.
    server_seconds = "pg_catalog.date_part('epoch'::text, pg_catalog.clock_timestamp())"
    server_nanoseconds = f"1000::bigint * (1000000::float8 * {server_seconds})::bigint"
    lock = " FOR UPDATE OF c"

    def candidates(
        self,
        table: Table,
        query: Query,
        terms: ClaimTerms,
        prefix: Sequence[str],
        limit: str,
        *,
        many: bool,
    ) -> Compiled:
        row, skip_locked = f"{table.selected}, t.ctid", " FOR UPDATE OF t SKIP LOCKED"
        no_claim = self._no_claim_of_many if many else self.no_claim
        found = compile_query(
            table,
            query,
            args=self,
            also=lambda: no_claim(table, self.is_busy(terms, once=many)),
            prefix=prefix,
            selected=f"t.{table.key}" if many else row,
        )
        if not many:
            return found._replace(sql=f"{found.sql} LIMIT {limit}{skip_locked}")
        # The ids are read from the index alone, and a row only when nobody holds it. The rows are in the
        # order of the ids: LATERAL can only be a nested loop around them.
        found_row = (
            f"SELECT {row} FROM {table.name} AS t "
            f"WHERE t.{table.key} = s.id AND ({found.where}){skip_locked}"
        )
        return found._replace(
            sql=f"SELECT l.* FROM ({found.sql}) AS s (id), LATERAL ({found_row}) AS l LIMIT {limit}"
        )

    def _no_claim_of_many(self, table: Table, busy: str) -> str:
        """As `no_claim`; after half a millisecond, all claims are read, and hashed.

        To look up some thousand claims takes longer. To read all of them at once would be in vain if the
        first entities can be claimed, and nearly all claims are of others.
        """
        claims = f"SELECT c.id FROM {self.table} AS c WHERE {busy} AND {_FEW_CLAIMS}"
        return (
            f"CASE WHEN pg_catalog.clock_timestamp() < {_LOOK_UP_UNTIL} "
            f"THEN {self.no_claim(table, busy)} ELSE t.{table.key} NOT IN ({claims}) END"
        )

    def number(self, value: float) -> str:
        return f"{self.add(repr(value))}::float8"

    def integer(self, value: int) -> str:
        return f"{self.add(str(value))}::bigint"

    def listed(self, ids: Sequence[str]) -> str:
        ids_ = self.add(self._grammar.strings(ids), "list")
        return f"pg_catalog.unnest({ids_}) AS i (id)"

    @classmethod
    def ddl(cls, name: str, entities: Table | None) -> list[str]:
        parent = ""
        if entities is not None:
            parent = f" REFERENCES {entities.name} ({entities.key}) ON DELETE CASCADE"
        return [
            f"CREATE TABLE {quoted(name)} "
            f'(id text COLLATE "C" PRIMARY KEY NOT NULL{parent}, token bigint NOT NULL, '
            "owner text NOT NULL, era text NOT NULL, ends double precision NOT NULL, "
            "held boolean NOT NULL, attempts bigint NOT NULL) "
            # So few rows in a page that a look-up by id never seems more expensive than reading the table,
            # before its statistics are gathered; a renewal then stays in its page.
            "WITH (fillfactor = 10)"
        ]
