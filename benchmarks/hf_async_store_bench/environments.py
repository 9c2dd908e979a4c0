"""Where systems store their data: temporary folders, and servers that are started when needed."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Final, Self, TypeVar, cast

from hf_async_store_bench import servers
from hf_async_store_bench.messages import Environment, Needs, SystemUnderTest
from hf_async_store_bench.worker_group import SkippedError

_POSTGRES: Final = {"max_connections": "800"}  # all systems of a load are open at once
_Server = TypeVar("_Server")


class Environments:
    """To be used with `with`: everything is gone afterwards. Durable ones outlive a loss of power."""

    def __init__(self, *, durable: bool = True, folder: str | None = None) -> None:
        self._durable = durable
        self._base = folder
        self._stack = ExitStack()
        self._servers: dict[Needs, Any] = {}

    @classmethod
    def beside(cls, system: SystemUnderTest, environment: Environment) -> Self:
        """More environments for a system that has one: in its folder, on its server."""
        environments = cls(durable=environment.durable, folder=environment.folder)
        kinds = {"postgres": servers.PostgresServer, "dynamodb": servers.DynamoDBServer}
        if system.needs in kinds:
            environments._servers[system.needs] = kinds[system.needs](environment.server)
        return environments

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="hf-async-store-bench-", dir=self._base))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make(self, system: SystemUnderTest) -> Environment:
        """A new, empty environment; SkippedError if its server cannot be had here."""
        if system.needs == "postgres":
            return self._environment(system, self._postgres.database())
        if system.needs == "dynamodb":
            return self._environment(system, self._dynamodb.endpoint_url)
        return self._environment(system)

    async def copy(self, system: SystemUnderTest, original: Environment) -> Environment:
        """A new environment with what an original holds that nobody has open."""
        server = ""
        if system.needs == "postgres":
            server = await asyncio.to_thread(self._postgres.copy, original.server)
        made = self._environment(system, server)
        await asyncio.to_thread(shutil.copytree, original.folder, made.folder, dirs_exist_ok=True)
        return made

    async def analyze(self, system: SystemUnderTest, environment: Environment) -> None:
        """Have a server vacuum and analyze now, not while something is measured."""
        if system.needs == "postgres":
            run = self._postgres.run
            await asyncio.to_thread(run, "VACUUM (ANALYZE)", environment.server)

    async def logged_bytes(self, system: SystemUnderTest) -> int:
        """What the server has written into its log so far; 0 if there is none that tells."""
        if system.needs != "postgres":
            return 0
        told = "SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint"
        return cast("int", await self._postgres.ask(told))

    def remove(self, system: SystemUnderTest, environment: Environment) -> None:
        shutil.rmtree(environment.folder, ignore_errors=True)
        if system.needs == "postgres":
            self._postgres.drop(environment.server)
        elif system.needs == "dynamodb":
            self._dynamodb.drop_tables(environment.prefix)

    def _environment(self, system: SystemUnderTest, server: str = "") -> Environment:
        name = f"b{secrets.token_hex(4)}"
        folder = self.folder / name
        folder.mkdir()
        url = system.url_of(folder=str(folder), postgres=server, dynamodb=server, name=name)
        if not self._durable and system.nondurable_query:
            url += ("&" if "?" in url else "?") + system.nondurable_query
        more = {"server": server, "url": url, "prefix": name}
        return Environment(folder=str(folder), durable=self._durable, **more)

    @property
    def _postgres(self) -> servers.PostgresServer:
        server = servers.postgres(durable=self._durable, settings=_POSTGRES)
        return self._started("postgres", server)

    @property
    def _dynamodb(self) -> servers.DynamoDBServer:
        servers.any_credentials()
        return self._started("dynamodb", servers.dynamodb())

    def _started(self, name: Needs, server: AbstractContextManager[_Server]) -> _Server:
        """The one that runs already, or this one; what cannot be had is not tried again."""
        if name not in self._servers:
            try:
                self._servers[name] = self._stack.enter_context(server)
            except servers.ServerUnavailable as exc:
                self._servers[name] = exc
        found = self._servers[name]
        if isinstance(found, servers.ServerUnavailable):
            raise SkippedError(str(found)) from found
        return cast("_Server", found)
