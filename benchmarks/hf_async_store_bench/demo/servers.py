"""A server for the demo, where its store needs one and names none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from hf_async_store.config import DynamoDBConfig, load_config
from hf_async_store_bench.servers import ServerUnavailable, dynamodb

if TYPE_CHECKING:
    from hf_async_store_bench.demo.plan import Settings

_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_DYNAMODB", "AWS_ENDPOINT_URL")
_CREDENTIALS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@contextmanager
def served(settings: Settings) -> Iterator[Settings]:
    """The settings, with the address of a server that runs as long as the context.

    Only for a DynamoDB URL without `endpoint_url`, and where the test server is installed: then the
    run costs nothing and touches no account.
    """
    if settings.store is None or not _needs_dynamodb(settings.store):
        yield settings
        return
    try:
        with dynamodb() as server, _any_credentials():
            mark = "&" if "?" in settings.store else "?"
            url = f"{settings.store}{mark}endpoint_url={server.endpoint_url}"
            yield msgspec.structs.replace(settings, store=url)
    except ServerUnavailable:
        yield settings


def _needs_dynamodb(url: str) -> bool:
    options = load_config(url).options
    return (
        isinstance(options, DynamoDBConfig)
        and options.endpoint_url is None
        and options.profile is None
        and not any(map(os.environ.get, _ENDPOINTS))
    )


@contextmanager
def _any_credentials() -> Iterator[None]:
    """The test server takes any; workers find them in the environment."""
    missing = [each for each in _CREDENTIALS if not os.environ.get(each)]
    os.environ.update(dict.fromkeys(missing, "demo"))
    try:
        yield
    finally:
        for each in missing:
            os.environ.pop(each, None)
