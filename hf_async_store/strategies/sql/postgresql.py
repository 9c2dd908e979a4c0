"""PostgreSQL: a server, many writers, serializable snapshots, JSON as JSONB."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeAlias, cast

from sqlalchemy import BigInteger, Boolean, Numeric, Text, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from hf_async_store.config import SQLConfig
from hf_async_store.engine import Capabilities, Isolation, Plan
from hf_async_store.entities import Field, FieldType, Index, Schema, Value
from hf_async_store.errors import (
    AuthenticationError,
    ConfigurationError,
    StorageError,
    UnavailableError,
)
from hf_async_store.strategies.sql.compiler import SHORT, Arguments, SortPart
from hf_async_store.strategies.sql.dialect import Dialect
from hf_async_store.strategies.sql.errors import link_error, postgres_error
from hf_async_store.strategies.sql.jsonb import array_text, decimal_text, json_text, number_of
from hf_async_store.strategies.sql.tables import SIDE, Kind, decode_json, limited, quoted

try:
    import asyncpg  # type: ignore[import-untyped]  # it has no types
except ImportError as exc:
    raise ConfigurationError(
        "PostgreSQL needs the package asyncpg: pip install 'hf_async_store[postgres]'"
    ) from exc

if TYPE_CHECKING:
    from sqlalchemy import MetaData
    from sqlalchemy.types import TypeEngine

PasswordProvider: TypeAlias = "Callable[[str, int, str], str | Awaitable[str]]"
"""Given host, port and user name, the password of one new connection."""

_PORT: Final = 5432
_PIECE: Final = 256
_MOST_ROWS: Final = 1024
_GRACE: Final = 5.0
"""How much longer than the server we wait for its word that a statement took too long."""

_SCHEMA_LOCK: Final = int.from_bytes(b"hfstore", "big")
_ARRAYS: Final = {"integer": "bigint", "bigint": "bigint", "boolean": "boolean"}
_CASTS: Final = {"number": "::numeric", "json": "::jsonb"}
_PARAMETERS: Final = {
    "integer": "::bigint",
    "bigint": "::bigint",
    "boolean": "::boolean",
    "number": "::text::numeric",
    "json": "::text::jsonb",
    "step": "::int",
    "list": "::text::text[]",
}
_TYPES: Final = {
    "integer": "bigint",
    "bigint": "bigint",
    "boolean": "boolean",
    "number": "numeric",
    "json": "jsonb",
}
_SIGNS: Final = {"lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
_JSON_TYPES: Final = {str: "string", bool: "boolean", int: "number", float: "number"}


class PostgreSQL(Dialect):
    """The dialect of one database on a server."""

    driver_errors: ClassVar[tuple[type[Exception], ...]] = (
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        OSError,
        asyncio.TimeoutError,
    )
    mark = "$"
    one_writer = False
    batches_commit_together = False
    bulk = None
    inline_references = False
    to_column = MappingProxyType({"number": decimal_text, "json": json_text})
    from_column = MappingProxyType({"number": number_of, "json": decode_json})

    def __init__(self, config: SQLConfig, password: PasswordProvider | None = None) -> None:
        self._config = config
        self._password = password or _provider(config.login_provider)
        self.needs_transactions = config.pgbouncer
        self.gains_by_readers = not config.pgbouncer
        first = config.isolation
        others: tuple[Isolation, ...] = ("serializable", "repeatable_read", "read_committed")
        self.capabilities = Capabilities(
            engine="postgresql",
            durable=True,
            processes=True,
            isolations=(first, *(each for each in others if each != first)),
            overtaken_reads="ordered",
            read_batch=512,
            read_lanes=2,
            write_lanes=1,
        )

    def json_text(self, value: Value) -> tuple[str, bool]:
        return json_text(value)

    # -- the driver --------------------------------------------------------------------------

    def engine(self, *, size: int, overflow: int, read_only: bool) -> AsyncEngine:
        return create_async_engine(
            "postgresql+asyncpg://",
            async_creator=lambda: self._connect(read_only=read_only),
            poolclass=AsyncAdaptedQueuePool,
            pool_size=size,
            max_overflow=overflow,
            pool_recycle=self._config.pool_recycle,
            pool_reset_on_return=None,
            pool_use_lifo=True,
        )

    async def _connect(self, *, read_only: bool) -> Any:
        config = self._config
        host, port = config.host or "localhost", config.port or _PORT
        try:
            return await asyncpg.connect(
                self._dsn(),
                host=host,
                port=port,
                user=config.username or None,
                password=await self._secret(host, port),
                database=config.name or None,
                timeout=config.timeout,
                command_timeout=config.timeout + _GRACE,
                statement_cache_size=0
                if config.pgbouncer or not config.enable_query_cache
                else 512,
                server_settings=self._settings(read_only=read_only),
            )
        except self.driver_errors as exc:
            raise self._refused(exc, f"connect to {host}:{port}") from exc

    def _dsn(self) -> str:
        """What asyncpg takes in no other way: the mode of TLS and whom it trusts."""
        from urllib.parse import urlencode

        config = self._config
        query: dict[str, str] = {"sslmode": config.sslmode}
        if config.sslrootcert:
            query["sslrootcert"] = config.sslrootcert
        return f"postgresql:///?{urlencode(query)}"

    async def _secret(self, host: str, port: int) -> str | None:
        config = self._config
        if self._password is None:
            return None if config.password is None else config.password.reveal()
        try:
            found = self._password(host, port, config.username)
            return found if isinstance(found, str) else await found
        except Exception as exc:  # whatever the caller's own code raises
            raise AuthenticationError(
                f"cannot connect to {host}:{port}: no password to be had ({type(exc).__name__})"
            ) from exc

    def _settings(self, *, read_only: bool) -> dict[str, str]:
        if self._config.pgbouncer:
            return {}  # they would stay with whatever connection it hands out
        limit = str(int(self._config.timeout * 1000))
        return {
            "application_name": "hf_async_store",
            "default_transaction_isolation": self._config.isolation.replace("_", " "),
            "default_transaction_read_only": "on" if read_only else "off",
            "statement_timeout": limit,
            "lock_timeout": limit,
            "jit": "off",
        }

    def _refused(self, exc: Exception, doing: str) -> StorageError:
        if isinstance(exc, asyncpg.PostgresError):
            return self.translate(exc, doing=doing, writes=False)
        if isinstance(exc, asyncpg.InterfaceError | asyncpg.InternalClientError):
            # Above all: a password is asked for and none was given.
            return AuthenticationError(f"cannot {doing}: {exc}")
        return UnavailableError(f"cannot {doing}: {str(exc) or 'no answer in time'}")

    def is_lost(self, driver: Any) -> bool:
        return bool(driver.is_closed())

    async def rows(self, driver: Any, sql: str, args: Sequence[object]) -> Sequence[Sequence[Any]]:
        return cast("Sequence[Sequence[Any]]", await driver.fetch(sql, *args))

    async def labelled(
        self, driver: Any, sql: str, args: Sequence[object]
    ) -> list[dict[str, Value]]:
        return [dict(each) for each in await driver.fetch(sql, *args)]

    async def pieces(
        self, driver: Any, sql: str, args: Sequence[object], *, written: bool
    ) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
        cursor = await driver.cursor(sql, *args)
        while rows := await cursor.fetch(_PIECE):
            yield rows
            if len(rows) < _PIECE:
                return

    async def begin(self, driver: Any, isolation: Isolation | None) -> Any:
        if isolation is None and self._config.pgbouncer and not driver.is_in_transaction():
            isolation = self._config.isolation
        handle = driver.transaction(isolation=isolation)
        await handle.start()
        return handle

    async def begin_reading(self, driver: Any, statements: Literal["one", "many"]) -> Any:
        # Not serializable: the row locks of a long reader would become a lock of the table, and
        # abort its neighbours.
        handle = driver.transaction(isolation="repeatable_read", readonly=True)
        await handle.start()
        return handle

    async def commit(self, handle: Any) -> None:
        await handle.commit()

    async def roll_back(self, handle: Any) -> None:
        await handle.rollback()

    async def tidy(self, driver: Any) -> bool:
        return not driver.is_closed() and not driver.is_in_transaction()

    async def discard(self, driver: Any) -> None:
        pass  # the pool ends it, and the server rolls back

    def translate(self, exc: Exception, *, doing: str, writes: bool) -> StorageError:
        if isinstance(exc, asyncpg.PostgresError) and exc.sqlstate is not None:
            # `message` alone: details show what is stored.
            return postgres_error(exc.sqlstate, exc.message or "", doing=doing, writes=writes)
        timed_out = isinstance(exc, asyncio.TimeoutError)
        return link_error(exc, doing=doing, writes=writes, timed_out=timed_out)

    # -- the schema --------------------------------------------------------------------------

    def column_type(self, kind: FieldType | Kind) -> TypeEngine[Any]:
        if kind in ("integer", "bigint"):
            return BigInteger()
        if kind == "boolean":
            return Boolean()
        if kind == "number":
            return Numeric()
        return JSONB() if kind == "json" else Text(collation="C")

    def index_part(self, column: Any, field: Field) -> Any:
        if field.type == "text" and not (field.references and field.enforced):
            # The server refuses index entries of more than about 2,700 bytes.
            column = func.left(column, SHORT)
        return column.nulls_first()

    async def owned_by_others(
        self, driver: Any, tables: Sequence[str], declared: Sequence[str]
    ) -> dict[str, str]:
        found = await self.rows(driver, _OTHERS, (list(tables), list(declared)))
        return {table: owner for table, owner in found}  # noqa: C416  # rows are of any length

    async def found_columns(self, driver: Any, tables: Sequence[str]) -> dict[str, dict[str, str]]:
        rows = await self.rows(driver, _COLUMNS, (list(tables),))
        found: dict[str, dict[str, str]] = {}
        for table, column, kind in rows:
            found.setdefault(table, {})[column] = kind
        return found

    async def found_indexes(self, driver: Any, tables: Sequence[str]) -> dict[str, str]:
        rows = await self.rows(driver, _INDEXES, (list(tables),))
        return dict(cast("Any", rows))

    def same_type(self, found: str, kind: FieldType | Kind) -> bool:
        return found.split(" PRIMARY")[0].split(" NOT")[0] == _TYPES.get(kind, "text COLLATE C")

    async def begin_ddl(self, driver: Any) -> Any:
        # Read committed: behind the lock it must see what the one before has made.
        handle = driver.transaction(isolation="read_committed")
        await handle.start()
        await driver.execute("SET TRANSACTION READ WRITE")
        await driver.fetch("SELECT pg_advisory_xact_lock($1::bigint)", _SCHEMA_LOCK)
        return handle

    def more_ddl(self, schema: Schema, metadata: MetaData, found: Mapping[str, str]) -> list[str]:
        """The foreign keys, as the switch has them, and what lets a parent find its children.

        A foreign key is added as not valid: what was broken before stands in nobody's way.
        """
        wanted = self._config.enforce_references
        statements: list[str] = []
        for collection in schema.values():
            for field in collection.references:
                parent = schema[cast("str", field.references)]
                table, column = quoted(collection.name), quoted(field.name)
                name = limited(f"{collection.name}-{field.name}-reference")
                index = limited(f"{collection.name}-{field.name}-children")
                if wanted and name not in found:
                    statements.append(
                        f'ALTER TABLE {table} ADD CONSTRAINT "{name}" FOREIGN KEY ({column}) '
                        f"REFERENCES {quoted(parent.name)} ({quoted(parent.key)}) NOT VALID"
                    )
                if not wanted and name in found:
                    statements.append(f'ALTER TABLE {table} DROP CONSTRAINT "{name}"')
                leads = any(each.field == field.name for each in collection.indexes)
                if not leads and index not in found:
                    statements.append(f'CREATE INDEX "{index}" ON {table} ({column})')
        return statements

    # -- grammar: writes ---------------------------------------------------------------------

    def batches(self, rows: int) -> list[int]:
        return [min(_MOST_ROWS, rows - n) for n in range(0, rows, _MOST_ROWS)]

    def form(self, rows: int) -> int:
        return 0

    def source(self, kinds: Sequence[Kind], rows: int) -> str:
        arrays = [f"${n}::text::{_ARRAYS.get(kind, 'text')}[]" for n, kind in enumerate(kinds, 1)]
        columns = [f"c{n}" for n in range(len(kinds))]
        # Of several arrays the parser itself takes the server's own; of one, whatever is found first.
        unnest = "pg_catalog.unnest" if len(arrays) == 1 else "unnest"
        return f"{unnest}({', '.join(arrays)}) AS i ({', '.join(columns)})"

    def pack(self, columns: Sequence[Sequence[object]], kinds: Sequence[Kind]) -> Sequence[object]:
        return list(map(array_text, columns))

    def given(self, column: str, kind: Kind) -> str:
        return f"{column}{_CASTS.get(kind, '')}"

    def merged(self, column: str, sets: str, removes: str) -> str:
        return (
            f"nullif((coalesce({column}, '{{}}'::jsonb) "
            f"- ARRAY(SELECT jsonb_array_elements_text(coalesce({removes}, '[]')::jsonb))) "
            f"|| coalesce({sets}, '{{}}')::jsonb, '{{}}'::jsonb)"
        )

    def size(self, column: str) -> str:
        return f"octet_length({column}::text)"

    def deletion(self, table: str, key: str, rows: int, *, versions: bool) -> str:
        kinds = ["text", "bigint"] if versions else ["text"]
        also = " AND t.version = i.c1" if versions else ""
        return (
            f"DELETE FROM {table} AS t USING {self.source(kinds, rows)} WHERE t.{key} = i.c0{also}"
        )

    # -- grammar: reads ----------------------------------------------------------------------

    def read(self, column: str, kind: Kind) -> str:
        return f"{column}::text" if kind in ("number", "json") else column

    def parameter(self, number: int, kind: Kind) -> str:
        return f"${number}{_PARAMETERS.get(kind, '::text')}"

    def argument(self, value: Any, kind: Kind) -> object:
        if kind == "number":
            return decimal_text(value)[0]
        if kind == "list":
            return array_text(value)
        return json_text(value)[0] if kind == "json" else value

    def one_of(self, expression: str, values: Sequence[Any], kind: Kind, args: Arguments) -> str:
        if kind in ("number", "json"):
            texts = [self.argument(each, kind) for each in values]
            return f"{expression} = ANY({args.add(texts, 'list')}{_CASTS[kind]}[])"
        array = args.add(list(values), "list")
        cast_to = f"::{_ARRAYS[kind]}[]" if kind in _ARRAYS else ""
        return f"{expression} = ANY({array}{cast_to})"

    def one_of_ids(self, expression: str) -> str:
        return f"{expression} = ANY($1::text::text[])"

    def shortened(self, expression: str) -> str | None:
        return f"left({expression}, {SHORT})"

    def has_side(self, name: str) -> str:
        return f"coalesce(t.{SIDE} ? '{name}', false)"

    def has_text(self, expression: str, part: str) -> str:
        return f'strpos({expression} COLLATE "C", {part}) > 0'

    def ordered(self, part: SortPart, *, descending: bool) -> str:
        way = " DESC NULLS LAST" if descending else " ASC NULLS FIRST"
        null = f", {part.null}{way}" if part.null is not None else ""
        return f"{part.sql}{way if part.nullable else way[:5]}{null}"

    def json_test(
        self, base: str, steps: Sequence[str | int], op: str, value: Value, args: Arguments
    ) -> tuple[str, bool]:
        nothing = (op == "in" and not value) or (op in _SIGNS and value is None)
        if nothing or (op == "between" and None in cast("list[Value]", value)):
            return "FALSE", True
        place = _place(base, steps, args)
        if op == "exists":
            return f"{place} IS {'NOT ' if value else ''}NULL", True
        if op == "eq":
            return f"{place} = {args.add(value, 'json')}", True
        if op == "in":
            return self.one_of(place, cast("list[Value]", value), "json", args), True
        if op == "between":
            low, high = cast("list[Value]", value)
            one, exact_one = self._compared(place, "gte", low, args)
            two, exact_two = self._compared(place, "lte", high, args)
            return f"({one} AND {two})", exact_one and exact_two
        if op == "contains":
            return self._contains(place, value, args), True
        if op == "begins_with":
            begins = f"starts_with({place} #>> '{{}}'::text[], {args.add(value, 'text')})"
            return f"({_is(place, 'string')} AND {begins})", True
        return self._compared(place, op, value, args)

    def _compared(self, place: str, op: str, value: Value, args: Arguments) -> tuple[str, bool]:
        sign = _SIGNS[op]
        if isinstance(value, list | dict):
            # JSONB has an order of these, but it is not ours.
            return _is(place, "array" if isinstance(value, list) else "object"), False
        kind = _JSON_TYPES[type(value)]
        if isinstance(value, str):
            test = f"(({place} #>> '{{}}'::text[]) COLLATE \"C\") {sign} {args.add(value, 'text')}"
        else:
            test = f"{place} {sign} {args.add(value, 'json')}"
        return f"({_is(place, kind)} AND {test})", True

    def _contains(self, place: str, value: Value, args: Arguments) -> str:
        array = f"CASE WHEN {_is(place, 'array')} THEN {place} ELSE '[]'::jsonb END"
        element = args.add(value, "json")
        test = (
            f"EXISTS (SELECT 1 FROM jsonb_array_elements({array}) AS e (v) WHERE e.v = {element})"
        )
        if not isinstance(value, str):
            return test
        text = self.has_text(f"({place} #>> '{{}}'::text[])", args.add(value, "text"))
        return f"({test} OR ({_is(place, 'string')} AND {text}))"

    def json_order(self, base: str, steps: Sequence[str | int], args: Arguments) -> SortPart | None:
        return None  # its order of lists and maps is another, and its texts go by the locale

    def order_argument(self, value: Value) -> object:
        raise AssertionError("nothing sorts by JSON here")

    # -- the rest ----------------------------------------------------------------------------

    async def explain(
        self,
        driver: Any,
        sql: str,
        args: Sequence[object],
        indexes: Mapping[str, Index],
        comparisons: int,
    ) -> Plan:
        [[found]] = await self.rows(driver, f"EXPLAIN (FORMAT JSON) {sql}", args)
        nodes = _nodes(found[0]["Plan"])  # SQLAlchemy has taught the driver to decode JSON
        own = [each for each in nodes if each.get("Alias") == "t" or "Index Name" in each]
        names = [str(each["Index Name"]) for each in own if "Index Cond" in each]
        index = next((indexes[each] for each in names if each in indexes), None)
        return Plan(
            access="index" if index is not None else "key" if names else "scan",
            index=None if index is None else index.name,
            residual=any("Filter" in each for each in own),
            sorted_here=any("Sort" in str(each["Node Type"]) for each in nodes),
            detail=" < ".join(_said(each) for each in nodes),
        )

    async def health(self, driver: Any, tables: Sequence[str]) -> dict[str, Value]:
        [[version, size, recovering, used, most]] = await self.rows(driver, _HEALTH, ())
        sizes = await self.rows(driver, _SIZES, (list(tables),))
        problems: list[Value] = []
        if recovering:
            problems.append("the server is a standby and takes no writes")
        if used >= most * 0.9:
            problems.append(f"{used} of the server's {most} connections are in use")
        return {
            "server_version": version,
            "database_bytes": size,
            "table_bytes": dict(cast("Any", sizes)),
            "server_connections": used,
            "server_max_connections": most,
            "problems": problems,
        }

    def describe(self) -> dict[str, Value]:
        config = self._config
        host, port = config.host or "localhost", config.port or _PORT
        return {"server": f"{host}:{port}", "database": config.name or config.username}

    def lockable(self, sql: str) -> str:
        return sql


# Operators are looked up along the search path, and an exact match of anybody's in the schema of our
# tables would be taken before an inexact one of the server's. So both sides are cast to one type here.
_COLUMNS: Final = """
SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod)
    || CASE WHEN a.attcollation = 0::oid THEN ''::text
            ELSE ' COLLATE '::text || l.collname::text END
    || CASE WHEN k.conkey IS NOT NULL THEN ' PRIMARY KEY'::text
            WHEN a.attnotnull AND NOT a.atthasdef THEN ' NOT NULL'::text ELSE ''::text END
FROM pg_attribute AS a
JOIN pg_class AS c ON c.oid = a.attrelid
LEFT JOIN pg_collation AS l ON l.oid = a.attcollation
LEFT JOIN pg_constraint AS k
    ON k.conrelid = c.oid AND k.contype = 'p'::"char"
    AND k.conkey[1] = a.attnum AND pg_catalog.cardinality(k.conkey) = 1
WHERE c.relnamespace = current_schema()::regnamespace::oid
    AND c.relkind IN ('r'::"char", 'p'::"char")
    AND c.relname::text = ANY($1::text[]) AND a.attnum > 0::int2 AND NOT a.attisdropped
"""

_OTHERS: Final = """
SELECT c.relname::text, r.rolname::text FROM pg_class AS c
JOIN pg_roles AS r ON r.oid = c.relowner
JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_database AS d ON d.datname = current_database()
WHERE c.relnamespace = current_schema()::regnamespace::oid AND c.relname::text = ANY($1::text[])
    AND NOT (r.rolsuper OR pg_has_role(c.relowner, 'USAGE'::text)
        OR c.relowner = n.nspowner OR c.relowner = d.datdba
        OR EXISTS (
            SELECT 1 FROM pg_class AS o WHERE o.relnamespace = c.relnamespace
            AND o.relowner = c.relowner AND o.relname::text = ANY($2::text[])
        ))
"""

_INDEXES: Final = """
SELECT c.relname::text, pg_get_indexdef(i.indexrelid) FROM pg_index AS i
JOIN pg_class AS c ON c.oid = i.indexrelid
JOIN pg_class AS t ON t.oid = i.indrelid
WHERE t.relnamespace = current_schema()::regnamespace::oid AND t.relname::text = ANY($1::text[])
UNION ALL
SELECT k.conname::text, '' FROM pg_constraint AS k
JOIN pg_class AS t ON t.oid = k.conrelid
WHERE k.contype = 'f'::"char" AND t.relnamespace = current_schema()::regnamespace::oid
    AND t.relname::text = ANY($1::text[])
"""

_HEALTH: Final = """
SELECT current_setting('server_version'), pg_database_size(current_database()),
    pg_is_in_recovery(), (
        SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'::text
    ),
    current_setting('max_connections')::int
"""

_SIZES: Final = """
SELECT relname::text, pg_total_relation_size(oid::regclass) FROM pg_class
WHERE relnamespace = current_schema()::regnamespace::oid AND relname::text = ANY($1::text[])
ORDER BY 1
"""


def _provider(name: str) -> PasswordProvider | None:
    if not name:
        return None
    module, _, attribute = name.partition(":")
    try:
        return cast("PasswordProvider", getattr(import_module(module), attribute))
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigurationError(
            f"login_provider: {name!r} is no module:function that can be imported"
        ) from exc


def _place(base: str, steps: Sequence[str | int], args: Arguments) -> str:
    """The JSON at a place below a column, NULL where there is none.

    An arrow with a text steps into maps alone.
    """
    place = base
    for each in steps:
        if isinstance(each, str):
            place = f"({place} -> {args.add(each, 'text')})"
        else:
            # To this arrow a lone text or number is a list of one.
            element = f"{place} -> {args.add(each, 'step')}"
            place = f"(CASE WHEN {_is(place, 'array')} THEN {element} END)"
    return place


def _is(place: str, kind: str) -> str:
    return f"jsonb_typeof({place}) = '{kind}'"


def _nodes(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The nodes of a plan, from the top down."""
    nodes = [plan]
    for each in plan.get("Plans", ()):
        nodes += _nodes(each)
    return nodes


def _said(node: Mapping[str, Any]) -> str:
    names = ("Index Name", "Relation Name", "Index Cond", "Filter", "Sort Key")
    more = (f"{name.lower()} {node[name]}" for name in names if name in node)
    return ", ".join((str(node["Node Type"]), *more))
