"""A pgbouncer for tests, if the machine has one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from hf_async_store_bench import servers


@contextmanager
def pgbouncer(server: servers.PostgresServer) -> Iterator[str]:
    """A pgbouncer in transaction pooling before a PostgreSQL, for as long as the context lasts; or
    ServerUnavailable. Gives the address to put into the URL of a database: host and port."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise servers.ServerUnavailable(
            "no pgbouncer on this machine: install the package pgbouncer"
        )
    user = servers._unprivileged() if os.geteuid() == 0 else None  # it refuses to run as root, too
    behind = urlsplit(server.url)
    with servers._folder("pgbouncer", user) as folder:
        port = servers._free_port()
        settings = folder / "pgbouncer.ini"
        settings.write_text(
            "[databases]\n"
            f"* = host={behind.hostname} port={behind.port} user={behind.username}\n"
            "[pgbouncer]\n"
            f"listen_addr = {servers._HOST}\nlisten_port = {port}\nunix_socket_dir =\n"
            "auth_type = any\npool_mode = transaction\nmax_client_conn = 500\n"
            # As many as one store opens; each transaction gets the one that has waited longest.
            "default_pool_size = 48\nserver_round_robin = 1\nserver_idle_timeout = 1\n"
        )
        command: list[str | Path] = [program, settings]
        process = servers._Process(command, lambda _: servers._answers_at(port), folder, user=user)
        with process.running(signal.SIGINT):
            yield f"{servers._HOST}:{port}"
