"""A server for the demo, where its store needs one and names none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from hf_async_store.config import DynamoDBConfig, load_config
from hf_async_store_bench.demo.plan import Settings
from hf_async_store_bench.servers import ServerUnavailable, any_credentials, dynamodb

_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_DYNAMODB", "AWS_ENDPOINT_URL")


@contextmanager
def served(settings: Settings) -> Iterator[Settings]:
    """The settings, for a DynamoDB URL without `endpoint_url` with the address of the test server, if it
    is installed: then the run costs nothing and touches no account."""
    if settings.store is None or not _needs_dynamodb(settings.store):
        yield settings
        return
    try:
        with dynamodb() as server:
            any_credentials()
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
