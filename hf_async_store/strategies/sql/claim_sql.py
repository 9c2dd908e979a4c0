"""The SQL of claims, and what differs in it between SQLite and PostgreSQL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final

from hf_async_store.strategies.sql.grammar import Arguments
from hf_async_store.strategies.sql.names import quoted
from hf_async_store.strategies.sql.sqlite_functions import NANOSECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_async_store.claim_clock import Moment
    from hf_async_store.claim_records import ClaimTerms
    from hf_async_store.strategies.sql.grammar import Grammar
    from hf_async_store.strategies.sql.rows import Table
    from hf_async_store.values import Key

COLUMNS: Final = "id, token, owner, era, ends, held, attempts"


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

    skip_locked: ClassVar[str]
    """The end of a SELECT from the entities `t`: it locks them, except those that others have locked."""

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

    def is_busy(self, terms: ClaimTerms) -> str:
        """The condition that an entity cannot be claimed."""
        busy = f"(c.era = {self.add(self._now.era)} AND c.ends > {self.seconds})"
        if terms.max_attempts is not None:
            busy = f"({busy} OR c.attempts >= {self.integer(terms.max_attempts)})"
        return busy

    def no_claim(self, entities: Table, terms: ClaimTerms) -> str:
        """The condition that the entity `t` can be claimed."""
        busy = f"c.id = t.{entities.key} AND {self.is_busy(terms)}"
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

    def write(self, sql: str, key: Key, token: int, *, ends: bool, snapshot: bool) -> str:
        """Locks a claim, and if it is held with this token, executes a statement of `Writer.if_held`, whose
        arguments come first. Returns whether it is held, and the version that was written.

        Args:
            ends: the claim is deleted, if the statement has changed a row.
            snapshot: the transaction has one snapshot, so the deletion fails with a conflict if the claim
                was changed since, and need not lock it before.
        """
        lock = "" if ends and snapshot else self.lock
        held = f"SELECT c.id FROM {self.table} AS c WHERE {self.is_held(key, token)}{lock}"
        end = ""
        if ends:
            written = f"c.id = {self.add(key.id)} AND EXISTS (SELECT 1 FROM w)"
            end = f", e AS (DELETE FROM {self.table} AS c WHERE {written})"
        return (
            f"WITH held AS MATERIALIZED ({held}), w (id, version) AS ({sql}){end} "
            "SELECT EXISTS (SELECT 1 FROM held), (SELECT w.version FROM w)"
        )

    def list(self) -> str:
        """Returns the claims, each with the present time."""
        return f"SELECT {COLUMNS}, {self.seconds} FROM {self.table} ORDER BY id"


class SQLiteClaimSQL(ClaimSQL):
    greatest = "max"
    server_seconds = ""
    server_nanoseconds = f"{NANOSECONDS}()"
    skip_locked = ""
    lock = ""

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
    # Not the time at which the transaction began: it may have waited for a lock since. A subquery is
    # evaluated once, not for each row.
    server_seconds = "(SELECT extract(epoch FROM pg_catalog.clock_timestamp())::float8)"
    server_nanoseconds = (
        "(SELECT 1000 * (1e6 * extract(epoch FROM pg_catalog.clock_timestamp()))::bigint)"
    )
    skip_locked = " FOR UPDATE OF t SKIP LOCKED"
    lock = " FOR UPDATE OF c"

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
