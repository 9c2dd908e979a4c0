"""Where systems store their data: temporary folders, and servers that are started when needed."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self, cast

from hf_async_store_bench.messages import Environment, SystemUnderTest
from hf_async_store_bench.servers import (
    DynamoDBServer,
    PostgresServer,
    ServerUnavailable,
    dynamodb,
    postgres,
)
from hf_async_store_bench.worker_group import SkippedError

_CREDENTIALS: Final = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_DEFAULT_REGION": "eu-west-1",
}


_POSTGRES: Final = {"max_connections": "800"}
"""All systems of a load are open at once, and some have 32 connections in each of their processes."""


class Environments:
    """To be used with `with`: everything is gone afterwards.

    Args:
        durable: acknowledged writes outlive a loss of power; of PostgreSQL, too.
    """

    def __init__(self, *, durable: bool = True, folder: str | None = None) -> None:
        self._durable = durable
        self._stack = ExitStack()
        self._base = folder
        self._postgres: PostgresServer | ServerUnavailable | None = None
        self._dynamodb: DynamoDBServer | ServerUnavailable | None = None

    @classmethod
    def beside(cls, system: SystemUnderTest, environment: Environment) -> Self:
        """More environments for a system that has one: in its folder, on its server."""
        environments = cls(durable=environment.durable, folder=environment.folder)
        if system.needs == "postgres":
            environments._postgres = PostgresServer(environment.server, None)
        elif system.needs == "dynamodb":
            environments._dynamodb = DynamoDBServer(environment.server, None)
        return environments

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="hf-async-store-bench-", dir=self._base))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make(self, system: SystemUnderTest) -> Environment:
        """A new, empty environment.

        Raises:
            SkippedError: its server cannot be had here.
        """
        server = ""
        if system.needs == "postgres":
            server = self._postgres_server().database()
        elif system.needs == "dynamodb":
            server = self._dynamodb_server().endpoint_url
        return self._environment(system, server)

    def can_copy(self, system: SystemUnderTest) -> bool:
        """Whether `copy` knows how."""
        return system.needs in ("folder", "postgres")

    async def copy(self, system: SystemUnderTest, original: Environment) -> Environment:
        """A new environment with what an original holds that nobody has open."""
        server = ""
        if system.needs == "postgres":
            server = await asyncio.to_thread(self._postgres_server().copy, original.server)
        environment = self._environment(system, server)
        await asyncio.to_thread(
            shutil.copytree, original.folder, environment.folder, dirs_exist_ok=True
        )
        return environment

    async def analyze(self, system: SystemUnderTest, environment: Environment) -> None:
        """Have a server vacuum and analyze now, not while something is measured."""
        if system.needs == "postgres":
            server = self._postgres_server()
            await asyncio.to_thread(server.run, "VACUUM (ANALYZE)", environment.server)

    async def logged_bytes(self, system: SystemUnderTest) -> int:
        """What the server has written into its log so far; 0 if there is none that tells."""
        if system.needs != "postgres":
            return 0
        told = "SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint"
        return cast("int", await self._postgres_server().ask(told))

    def _environment(self, system: SystemUnderTest, server: str) -> Environment:
        name = f"b{secrets.token_hex(4)}"
        folder = self.folder / name
        folder.mkdir()
        url = system.url_of(folder=str(folder), postgres=server, dynamodb=server, name=name)
        if not self._durable and system.nondurable_query:
            url += ("&" if "?" in url else "?") + system.nondurable_query
        return Environment(
            folder=str(folder), server=server, url=url, prefix=name, durable=self._durable
        )

    def remove(self, system: SystemUnderTest, environment: Environment) -> None:
        """Remove it with everything in it."""
        shutil.rmtree(environment.folder, ignore_errors=True)
        if system.needs == "postgres":
            self._postgres_server().drop(environment.server)
        elif system.needs == "dynamodb":
            self._dynamodb_server().drop_tables(environment.prefix)

    def _postgres_server(self) -> PostgresServer:
        if self._postgres is None:
            try:
                server = postgres(durable=self._durable, settings=_POSTGRES)
                self._postgres = self._stack.enter_context(server)
            except ServerUnavailable as exc:
                self._postgres = exc
        if isinstance(self._postgres, ServerUnavailable):
            raise SkippedError(str(self._postgres)) from self._postgres
        return self._postgres

    def _dynamodb_server(self) -> DynamoDBServer:
        if self._dynamodb is None:
            try:
                self._dynamodb = self._stack.enter_context(dynamodb())
            except ServerUnavailable as exc:
                self._dynamodb = exc
            else:
                # The test server takes any; without them a driver would look for the user's own.
                os.environ.update({k: v for k, v in _CREDENTIALS.items() if k not in os.environ})
        if isinstance(self._dynamodb, ServerUnavailable):
            raise SkippedError(str(self._dynamodb)) from self._dynamodb
        return self._dynamodb
