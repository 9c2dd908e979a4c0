"""Where targets put their data: temporary folders, and servers that are started when first needed."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self, cast

from hf_async_store.bench.crew import LeftOutError
from hf_async_store.bench.plan import Place, Subject
from hf_async_store.testing.servers import (
    DynamoDBServer,
    PostgresServer,
    ServerUnavailable,
    dynamodb,
    postgres,
)

_CREDENTIALS: Final = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_DEFAULT_REGION": "eu-west-1",
}


_POSTGRES: Final = {"max_connections": "800"}
"""All sides of a load are open at once, and some have 32 connections in each of their processes."""


class Places:
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
    def beside(cls, subject: Subject, place: Place) -> Self:
        """More places for a subject that has one: in its folder, on its server."""
        places = cls(durable=place.durable, folder=place.folder)
        if subject.place == "postgres":
            places._postgres = PostgresServer(place.server, None)
        elif subject.place == "dynamodb":
            places._dynamodb = DynamoDBServer(place.server, None)
        return places

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="hf-async-store-bench-", dir=self._base))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make(self, subject: Subject) -> Place:
        """A new, empty place.

        Raises:
            LeftOutError: its server cannot be had here.
        """
        server = ""
        if subject.place == "postgres":
            server = self._postgres_server().database()
        elif subject.place == "dynamodb":
            server = self._dynamodb_server().endpoint_url
        return self._place(subject, server)

    def can_copy(self, subject: Subject) -> bool:
        """Whether `copy` knows how."""
        return subject.place in ("folder", "postgres")

    async def copy(self, subject: Subject, original: Place) -> Place:
        """A new place with what an original holds that nobody has open."""
        server = ""
        if subject.place == "postgres":
            server = await asyncio.to_thread(self._postgres_server().copy, original.server)
        place = self._place(subject, server)
        await asyncio.to_thread(shutil.copytree, original.folder, place.folder, dirs_exist_ok=True)
        return place

    async def settle(self, subject: Subject, place: Place) -> None:
        """Have a server tidy up now, not while something is measured."""
        if subject.place == "postgres":
            server = self._postgres_server()
            await asyncio.to_thread(server.run, "VACUUM (ANALYZE)", place.server)

    async def logged_bytes(self, subject: Subject) -> int:
        """What the server has written into its log so far; 0 if there is none that tells."""
        if subject.place != "postgres":
            return 0
        told = "SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint"
        return cast("int", await self._postgres_server().ask(told))

    def _place(self, subject: Subject, server: str) -> Place:
        name = f"b{secrets.token_hex(4)}"
        folder = self.folder / name
        folder.mkdir()
        url = subject.url_of(folder=str(folder), postgres=server, dynamodb=server, name=name)
        if not self._durable and subject.relaxed:
            url += ("&" if "?" in url else "?") + subject.relaxed
        return Place(folder=str(folder), server=server, url=url, prefix=name, durable=self._durable)

    def remove(self, subject: Subject, place: Place) -> None:
        """Remove it with everything in it."""
        shutil.rmtree(place.folder, ignore_errors=True)
        if subject.place == "postgres":
            self._postgres_server().drop(place.server)
        elif subject.place == "dynamodb":
            self._dynamodb_server().drop_tables(place.prefix)

    def _postgres_server(self) -> PostgresServer:
        if self._postgres is None:
            try:
                server = postgres(durable=self._durable, settings=_POSTGRES)
                self._postgres = self._stack.enter_context(server)
            except ServerUnavailable as exc:
                self._postgres = exc
        if isinstance(self._postgres, ServerUnavailable):
            raise LeftOutError(str(self._postgres)) from self._postgres
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
            raise LeftOutError(str(self._dynamodb)) from self._dynamodb
        return self._dynamodb
