"""The command line on DynamoDB, in real processes; and the demo, which starts the server itself."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hf_async_store import UnavailableError
from hf_async_store.cli import main
from hf_async_store.testing.harness import skip_engine
from hf_async_store_bench.servers import DYNAMODB_VARIABLE, ServerUnavailable, dynamodb
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from hf_async_store_bench.servers import DynamoDBServer

PROGRAM = Path(sys.executable).with_name("hf-async-store")


def run(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [PROGRAM, *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_commands_from_creation_to_deletion(
    dynamodb_server: DynamoDBServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: each separate one imports the driver, which takes a second."""
    prefix = new_prefix()
    url = f"dynamodb://us-east-1/{prefix}?endpoint_url={dynamodb_server.endpoint_url}"

    def command(*arguments: str) -> tuple[int, str]:
        code = main(["--store", url, *arguments])
        return code, "".join(capsys.readouterr())

    status, said = command("create-tables", "--json")
    assert status == 0, said
    assert json.loads(said) == {
        "created": [f"created {prefix}_{each}" for each in ("templates", "requests", "machines")]
    }
    assert json.loads(command("create-tables", "--json")[1]) == {"created": []}
    assert command("put", "requests", '{"request_id": "r", "status": "PENDING"}')[0] == 0
    assert command("update", "requests", "r", "status=RUNNING", "--expected-version", "1")[0] == 0
    status, said = command("get", "requests", "r", "--json")
    assert status == 0, said
    assert json.loads(said)["version"] == 2
    status, said = command("query", "requests", "status=RUNNING", "--explain", "--json")
    assert json.loads(said)["index"] == "status-created_at-index", said
    assert (
        json.loads(command("query", "requests", "status=RUNNING", "--json")[1])["request_id"] == "r"
    )
    assert command("count", "requests")[1].strip() == "1"
    status, said = command("health", "--json")
    assert status == 0, said
    assert json.loads(said)["tables"]["requests"]["status"] == "ACTIVE"
    status, said = command("describe", "--json")
    assert status == 0, said
    requests = json.loads(said)["tables"]["requests"]
    assert requests["existing"] == requests["declared"]
    assert requests["existing"]["billing_mode"] == "PAY_PER_REQUEST"
    status, said = run("--store", f"{url}&billing_mode=PROVISIONED", "describe")
    assert status == 0, said
    assert (
        f"differs: {prefix}_requests: billing_mode is PAY_PER_REQUEST, but the declared value is PROV"
        in said
    )
    assert command("delete", "requests", "r")[0] == 0
    status, said = command("checkpoint")
    assert status == 2
    assert "for JSON stores" in said


def test_create_tables_is_for_stores_with_tables(tmp_path: Path) -> None:
    status, said = run("--store", f"json:{tmp_path}/db.json", "create-tables")
    assert status == 2
    assert "the engine of this store is json" in said


def test_a_secret_is_not_shown() -> None:
    secret = "s3cr3t-0f-aws"
    status, said = run(
        "--store",
        "dynamodb://us-east-1/p?endpoint_url=http://127.0.0.1:1&retry_timeout=0.1",
        "get",
        "requests",
        "r",
        "--verbose",
        environment={"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": secret},
    )
    assert status == 4
    assert "cannot be reached" in said
    assert secret not in said


@pytest.mark.long
def test_the_demo_starts_the_server_itself() -> None:
    if os.environ.get(DYNAMODB_VARIABLE):
        pytest.skip("a server is given")
    try:
        with dynamodb():
            pass
    except ServerUnavailable as exc:
        skip_engine("dynamodb", str(exc))
    status, said = run(
        "demo",
        "--store",
        f"dynamodb://us-east-1/{new_prefix()}",
        "--seconds",
        "4",
        "--requests",
        "24",
    )
    assert status == 0, said
    assert "The dynamodb engine" in said
    assert "PASSED: all" in said


async def test_a_server_that_is_killed_and_restarted_without_data() -> None:
    """The server loses all data. The store reports that instead of returning empty results."""
    if os.environ.get(DYNAMODB_VARIABLE):
        pytest.skip("the server is not ours to kill")
    try:
        context = dynamodb()
        server = context.__enter__()
    except ServerUnavailable as exc:
        skip_engine("dynamodb", str(exc))
    try:
        async with store_at(server.endpoint_url, retry_timeout=0.3) as store:
            await store.create_entities("items", [{"item_id": f"{n}"} for n in range(50)])
            errors: list[BaseException] = []

            async def load(number: int) -> None:
                for _ in range(50):
                    try:
                        await store.update_entity("items", f"{number}", {"count": 1})
                    except UnavailableError as exc:
                        errors.append(exc)
                        return

            work = asyncio.gather(*(load(n) for n in range(50)))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(server.kill)
            await work
            assert errors
            with pytest.raises(UnavailableError, match="cannot be reached"):
                await store.get_entity("items", "1")
            await asyncio.to_thread(server.start)
            for verb in (
                store.get_entity("items", "1"),
                store.query_entities("items"),
                store.update_entity("items", "1", {}),
            ):
                with pytest.raises(UnavailableError, match="was deleted"):
                    await verb
            await store.create_tables()
            assert await store.create_entity("items", {"item_id": "1"}) == 1, "without reopening"
    finally:
        context.__exit__(None, None, None)
