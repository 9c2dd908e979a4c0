"""The state machine: every engine is compared with the memory engine."""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import open_store
from hf_async_store.testing.claim_machine import run_claim_machine
from hf_async_store.testing.declaration_machine import run_declaration_machine
from hf_async_store.testing.feed_machine import run_feed_machine
from hf_async_store.testing.state_machine import Stores, run_machine
from tests.contract.harnesses import execute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from hf_async_store_bench.servers import DynamoDBServer, PostgresServer


def json_at(name: str) -> Callable[[], AbstractContextManager[Stores]]:
    @contextmanager
    def make() -> Iterator[Stores]:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "data" / name
            yield lambda collections: open_store(f"json:{path}", collections=collections)

    return make


@contextmanager
def memory() -> Iterator[Stores]:
    """The memory engine compared with itself: the state machine must find no difference."""
    yield lambda collections: open_store("memory:", collections=collections)


def postgresql(server: PostgresServer, collation: str) -> Callable[[], Any]:
    """A database on the server, which is emptied before each example."""
    url = server.database(COLLATIONS[collation])

    @contextmanager
    def make() -> Iterator[Stores]:
        execute(url, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        yield lambda collections: open_store(url, collections=collections)

    return make


@contextmanager
def sqlite() -> Iterator[Stores]:
    with TemporaryDirectory() as folder:
        yield lambda collections: open_store(f"sqlite:{folder}/store.db", collections=collections)


ENGINES = {
    "memory": memory,
    "json-single": json_at("db.json"),
    "json-split": json_at("folder"),
    "sqlite": sqlite,
}

COLLATIONS = {"C": "", "ICU": "LOCALE_PROVIDER icu ICU_LOCALE 'sv-SE'"}
"""The collation C hides errors in the order; in Swedish V sorts with W, and Å, Ä and Ö after Z."""


def dynamodb_at(server: DynamoDBServer) -> Callable[[], AbstractContextManager[Stores]]:
    @contextmanager
    def make() -> Iterator[Stores]:
        url = f"dynamodb://us-east-1/m{secrets.token_hex(6)}?endpoint_url={server.endpoint_url}"
        yield lambda collections: open_store(url, collections=collections)

    return make


@pytest.mark.parametrize("engine", ENGINES)
def test_machine(engine: str) -> None:
    run_machine(ENGINES[engine])


@pytest.mark.hf_sampled(by="module")
@pytest.mark.parametrize("collation", COLLATIONS)
def test_machine_on_postgresql(postgres_server: PostgresServer, collation: str) -> None:
    run_machine(postgresql(postgres_server, collation))


@pytest.mark.hf_sampled(by="module")
def test_machine_on_dynamodb(dynamodb_server: DynamoDBServer) -> None:
    run_machine(dynamodb_at(dynamodb_server))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ENGINES)
def test_machine_long(engine: str) -> None:
    run_machine(ENGINES[engine], long=True)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("collation", COLLATIONS)
def test_machine_on_postgresql_long(postgres_server: PostgresServer, collation: str) -> None:
    run_machine(postgresql(postgres_server, collation), long=True)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_machine_on_dynamodb_long(dynamodb_server: DynamoDBServer) -> None:
    run_machine(dynamodb_at(dynamodb_server), long=True)


# -- change feeds ---------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_feed_machine(engine: str) -> None:
    run_feed_machine(ENGINES[engine])


@pytest.mark.hf_sampled(by="module")
def test_feed_machine_on_postgresql(postgres_server: PostgresServer) -> None:
    run_feed_machine(postgresql(postgres_server, "C"))


@pytest.mark.hf_sampled(by="module")
def test_feed_machine_on_dynamodb(dynamodb_server: DynamoDBServer) -> None:
    run_feed_machine(dynamodb_at(dynamodb_server))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ENGINES)
def test_feed_machine_long(engine: str) -> None:
    run_feed_machine(ENGINES[engine], long=True)


# -- declarations that change ---------------------------------------------------------------


@pytest.mark.hf_sampled(by="module")
@pytest.mark.parametrize("engine", [each for each in ENGINES if each != "memory"])
def test_declaration_machine(engine: str) -> None:
    run_declaration_machine(ENGINES[engine], shared_references=engine == "sqlite")


@pytest.mark.hf_sampled(by="module")
def test_declaration_machine_on_postgresql(postgres_server: PostgresServer) -> None:
    run_declaration_machine(postgresql(postgres_server, "C"), shared_references=True)


@pytest.mark.hf_sampled(by="module")
def test_declaration_machine_on_dynamodb(dynamodb_server: DynamoDBServer) -> None:
    # A run makes a thousand requests.
    run_declaration_machine(dynamodb_at(dynamodb_server), examples=2)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", [each for each in ENGINES if each != "memory"])
def test_declaration_machine_long(engine: str) -> None:
    run_declaration_machine(ENGINES[engine], long=True, shared_references=engine == "sqlite")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_declaration_machine_on_postgresql_long(postgres_server: PostgresServer) -> None:
    make = postgresql(postgres_server, "C")
    run_declaration_machine(make, long=True, shared_references=True)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_declaration_machine_on_dynamodb_long(dynamodb_server: DynamoDBServer) -> None:
    run_declaration_machine(dynamodb_at(dynamodb_server), long=True)


# -- claims ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_claim_machine(engine: str) -> None:
    run_claim_machine(ENGINES[engine])


@pytest.mark.hf_sampled(by="module")
def test_claim_machine_on_postgresql(postgres_server: PostgresServer) -> None:
    run_claim_machine(postgresql(postgres_server, "C"))


@pytest.mark.hf_sampled(by="module")
def test_claim_machine_on_dynamodb(dynamodb_server: DynamoDBServer) -> None:
    run_claim_machine(dynamodb_at(dynamodb_server))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ENGINES)
def test_claim_machine_long(engine: str) -> None:
    run_claim_machine(ENGINES[engine], long=True)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_claim_machine_on_postgresql_long(postgres_server: PostgresServer) -> None:
    run_claim_machine(postgresql(postgres_server, "C"), long=True)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_claim_machine_on_dynamodb_long(dynamodb_server: DynamoDBServer) -> None:
    run_claim_machine(dynamodb_at(dynamodb_server), long=True)
