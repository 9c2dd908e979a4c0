"""Each error of DynamoDB, its driver and its configuration, and the error that the store raises."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Final

import botocore.exceptions  # type: ignore[import-untyped]  # it has no types
import pytest
from aiohttp import web

from hf_async_store import (
    AuthenticationError,
    ConfigurationError,
    DynamoDBStorageStrategy,
    EventLoopMismatchError,
    PermissionDeniedError,
    StorageError,
    UnavailableError,
)
from hf_async_store import errors as public_errors
from hf_async_store.strategies.dynamodb import errors
from hf_async_store.strategies.dynamodb.errors import CODES, before_sending, of_client, public
from tests.dynamodb.proxy import WRITES, Raw
from tests.dynamodb.support import new_prefix, store_at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.dynamodb.proxy import Proxy

pytestmark = pytest.mark.hf_sampled

JSON: Final = {"Content-Type": "application/x-amz-json-1.0"}


def _answer(code: str, message: str = "why") -> Raw:
    body = {"__type": f"com.amazonaws.dynamodb.v20120810#{code}Exception", "message": message}
    return Raw(400, json.dumps(body).encode(), JSON)


@pytest.mark.parametrize("code", CODES)
async def test_a_code_of_the_service(proxy: Proxy, code: str) -> None:
    row = CODES[code]
    async with store_at(proxy.url, retry_timeout=0.05) as store:
        await store.create_entity("items", {"item_id": "a"})
        for work in (
            lambda: store.get_entity("items", "a"),
            lambda: store.query_entities("items", limit=1),
            lambda: store.save_entity("items", {"item_id": "a"}),
            lambda: store.update_entity("items", "a", {"n": 1}, expected_version=1),
        ):
            proxy.requests.clear()
            proxy.rule = lambda request: _answer(code)
            with pytest.raises(StorageError) as caught:
                await work()
            error = caught.value
            assert type(error) is getattr(public_errors, type(error).__name__)
            assert issubclass(row.kind, type(error)) or isinstance(error, UnavailableError)
            assert code in str(error)
            if not row.kind("")._retryable:
                assert not error.retryable
                assert len(proxy.requests) <= 2, "the error is reported as retryable"
            proxy.rule = None


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Signature expired: 20150830T123600Z is now earlier than 20150830T124000Z", "clock"),
        ("Signature not yet current: 20990830T123600Z is still later than now", "clock"),
        ("The request signature we calculated does not match", "secret access key"),
    ],
)
async def test_a_signature_that_is_not_accepted(proxy: Proxy, message: str, said: str) -> None:
    async with store_at(proxy.url) as store:
        proxy.rule = lambda request: _answer("InvalidSignature", message)
        with pytest.raises(AuthenticationError, match=said):
            await store.get_entity("items", "a")


async def test_permission_errors_name_the_action_and_the_resource(proxy: Proxy) -> None:
    arn = "arn:aws:dynamodb:us-east-1:123456789012:table/hostfactory_items"
    message = (
        "User: arn:aws:iam::1:user/app is not authorized to perform: dynamodb:PutItem on "
        f"resource: {arn} because no identity-based policy allows the action"
    )
    async with store_at(proxy.url) as store:
        await store.create_entity("items", {"item_id": "a"})
        proxy.rule = lambda request: (
            _answer("AccessDenied", message) if request.operation in WRITES else None
        )
        with pytest.raises(PermissionDeniedError) as caught:
            await store.save_entity("items", {"item_id": "a"})
        assert f"dynamodb:PutItem on {arn}" in str(caught.value)
        assert not caught.value.outcome_unknown


@pytest.mark.parametrize("name", sorted(errors._CONFIGURATION | errors._NO_CREDENTIALS))
def test_a_failure_of_the_driver_before_anything_was_sent(name: str) -> None:
    kind = getattr(botocore.exceptions, name)
    exc = kind.__new__(kind)
    exc.kwargs = {}
    exc.args = ("the reason",)
    wanted = ConfigurationError if name in errors._CONFIGURATION else AuthenticationError
    error = before_sending(exc)
    assert type(error) is wanted
    assert not error.retryable
    assert not error.outcome_unknown


def test_a_failure_before_sending_has_no_unknown_outcome() -> None:
    for exc in (ValueError("?"), KeyError("?"), OSError("?"), RuntimeError("?")):
        error = before_sending(exc)
        assert not error.outcome_unknown
        assert type(error) is getattr(public_errors, type(error).__name__)


def test_a_driver_that_is_not_installed() -> None:
    error = before_sending(ModuleNotFoundError("?", name="aiobotocore"))
    assert type(error) is ConfigurationError
    assert "pip install 'hf_async_store[dynamodb]'" in str(error)


def test_a_failure_after_sending_has_an_unknown_outcome() -> None:
    for name in ("ReadTimeoutError", "ConnectionClosedError", "HTTPClientError"):
        exc = getattr(botocore.exceptions, name)(endpoint_url="http://x", error=Exception("?"))
        error = public(of_client(exc, "DynamoDB", "example.org"))
        assert type(error) is UnavailableError
        assert error.outcome_unknown
        assert "example.org" in str(error)


# -- configuration ---------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An AWS configuration file, and no AWS variables in the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    config = tmp_path / "config"
    config.write_text(
        "[profile base]\naws_access_key_id=a\naws_secret_access_key=b\n"
        "[profile denied]\nrole_arn=arn:aws:iam::123456789012:role/app\nsource_profile=base\n"
        "[profile nosource]\nrole_arn=arn:aws:iam::123456789012:role/app\nsource_profile=missing\n"
        "[profile process]\ncredential_process=/nonexistent/tool\n"
        "[profile web]\nrole_arn=arn:aws:iam::123456789012:role/app\n"
        "web_identity_token_file=/nonexistent/token\n"
        "[profile half]\naws_access_key_id=a\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    return config


async def _refused(store: DynamoDBStorageStrategy, match: str, kind: type[StorageError]) -> None:
    started = time.monotonic()
    async with store:  # retries would take at least 30 s for each of the two
        for work in (
            store.get_entity("items", "a"),
            store.create_entity("items", {"item_id": "a"}),
        ):
            with pytest.raises(kind, match=match) as caught:
                await work
            assert not caught.value.retryable
            assert not caught.value.outcome_unknown
        report = await store.health()
        assert not report["ok"]
    assert time.monotonic() - started < 30, "the request was retried"


@pytest.mark.parametrize(
    ("profile", "match", "kind"),
    [
        ("nobody", "nobody", ConfigurationError),
        ("nosource", "missing", ConfigurationError),
        ("process", "/nonexistent/tool", ConfigurationError),
        ("web", "/nonexistent/token", ConfigurationError),
        ("half", "credentials", PermissionDeniedError),
    ],
)
async def test_a_profile_that_cannot_be_used(
    bare: Path, proxy: Proxy, profile: str, match: str, kind: type[StorageError]
) -> None:
    await _refused(store_at(proxy.url, profile=profile), match, kind)
    assert not proxy.requests


async def test_a_role_that_may_not_be_assumed(
    bare: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = (
        b"<ErrorResponse><Error><Code>AccessDenied</Code><Message>not authorized to perform: "
        b"sts:AssumeRole</Message></Error></ErrorResponse>"
    )
    async with _Server(web.Response(status=403, body=body)) as sts:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
        await _refused(store_at(proxy.url, profile="denied"), "AssumeRole", PermissionDeniedError)
    assert not proxy.requests


async def test_certificates_that_cannot_be_read(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = tmp_path / "missing.pem"
    monkeypatch.setenv("AWS_CA_BUNDLE", str(missing))
    await _refused(store_at("https://127.0.0.1:1"), "AWS_CA_BUNDLE", ConfigurationError)
    missing.write_text("no certificate")
    await _refused(store_at("https://127.0.0.1:1"), "AWS_CA_BUNDLE", ConfigurationError)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "//host", "ftp://host", "http://", "http://host:port", "http://[::"]
)
def test_an_invalid_endpoint_is_refused_at_the_creation_of_the_store(url: str) -> None:
    with pytest.raises(ConfigurationError, match="endpoint_url"):
        store_at(url)


async def test_an_invalid_endpoint_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_DYNAMODB", "user:hunter2@localhost:8000")
    store = DynamoDBStorageStrategy(f"dynamodb://us-east-1/{new_prefix()}")
    async with store:
        with pytest.raises(ConfigurationError, match="AWS_ENDPOINT_URL_DYNAMODB") as caught:
            await store.get_entity("templates", "a")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["has space", "ä", "", "x" * 250, "a/b"])
def test_a_prefix_that_no_table_can_have(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match="table_prefix"):
        DynamoDBStorageStrategy(
            {"dynamodb_strategy": {"region": "us-east-1", "table_prefix": prefix or " "}}
        )


def test_a_store_is_closed_in_its_own_loop(proxy: Proxy) -> None:
    with asyncio.Runner() as one, asyncio.Runner() as two:
        store = store_at(proxy.url)
        one.run(store.open())
        one.run(store.get_entity("items", "a"))
        with pytest.raises(EventLoopMismatchError):
            two.run(store.close())
        one.run(store.close())
        one.run(store.close())


# -- credentials go to one host --------------------------------------------------------------


class _Server:
    """An HTTP server that returns the same response to every request, and records the requests."""

    def __init__(self, answer: web.Response) -> None:
        self._answer = answer
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.url = ""

    async def __aenter__(self) -> _Server:
        async def handle(request: web.BaseRequest) -> web.Response:
            await request.read()
            self.seen.append((str(request.url), dict(request.headers)))
            answer = self._answer
            return web.Response(status=answer.status, body=answer.body, headers=answer.headers)

        self._runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._runner.cleanup()


@pytest.fixture
def session_token(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "SESSIONTOKEN")
    return


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed(session_token: None, status: int) -> None:
    async with _Server(web.Response(body=b"{}")) as other:
        moved = web.Response(status=status, headers={"Location": f"{other.url}/elsewhere"})
        async with _Server(moved) as server, store_at(server.url, retry_timeout=0.3) as store:
            for work in (
                store.get_entity("items", "a"),
                store.create_entity("items", {"item_id": "a"}),
                store.query_entities("items"),
                store.create_tables(),
                store.exists(),
            ):
                with pytest.raises(StorageError, match="redirect to 127.0.0.1"):
                    await work
            assert server.seen
        assert other.seen == []


async def test_no_redirect_is_followed_for_credentials_and_scaling(
    bare: Path, proxy: Proxy, session_token: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _Server(web.Response(body=b"{}")) as other:
        moved = web.Response(status=307, headers={"Location": f"{other.url}/elsewhere"})
        async with _Server(moved) as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.url)
            async with store_at(proxy.url, profile="denied", retry_timeout=0.3) as store:
                with pytest.raises(StorageError):
                    await store.get_entity("items", "a")
            asked = len(server.seen)
            assert asked
            monkeypatch.setenv("AWS_ENDPOINT_URL_APPLICATION_AUTO_SCALING", server.url)
            async with store_at(
                proxy.url, profile="base", auto_scaling=True, retry_timeout=0.3
            ) as store:
                with pytest.raises(StorageError):
                    await store.create_tables()
            assert len(server.seen) > asked
        assert other.seen == []


async def test_a_password_in_the_endpoint_is_shown_nowhere(proxy: Proxy) -> None:
    url = proxy.url.replace("http://", "http://user:hunter2@")
    async with store_at(url, retry_timeout=0.1) as store:
        said = [str(store.describe())]
        proxy.rule = lambda request: Raw(502, b"", {})
        for work in (
            store.get_entity("items", "a"),
            store.create_entity("items", {"item_id": "a"}),
        ):
            with pytest.raises(StorageError) as caught:
                await work
            said.append(repr(caught.value))
        said.append(str(await store.health()))
    async with store_at("http://user:hunter2@127.0.0.1:1", retry_timeout=0.1) as store:
        with pytest.raises(StorageError) as caught:
            await store.get_entity("items", "a")
        said.append(repr(caught.value))
    assert not [each for each in said if "hunter2" in each]
