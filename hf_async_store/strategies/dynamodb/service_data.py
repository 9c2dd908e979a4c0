"""The data files of botocore, without what the store does not use.

botocore keeps the description of every operation of a service, and the endpoints of all services, as
Python objects, which each full garbage collection traverses. The store sends its requests itself, see
`client`: of the services of DynamoDB it needs the metadata, and of the endpoints those of the services
that it or the search for credentials calls. It is imported with the driver, at the first use of a store.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict

import msgspec
from botocore.loaders import JSONFileLoader, Loader  # type: ignore[import-untyped]  # no types

if TYPE_CHECKING:
    from collections.abc import Mapping

_COMMON: Final = {
    "apiVersion": "2012-08-10",
    "auth": ["aws.auth#sigv4"],
    "jsonVersion": "1.0",
    "protocol": "json",
    "protocols": ["json"],
    "signatureVersion": "v4",
    "signingName": "dynamodb",
}
_METADATA: Final[Mapping[str, Mapping[str, object]]] = {
    "dynamodb": {**_COMMON, "endpointPrefix": "dynamodb", "serviceId": "DynamoDB"},
    "dynamodbstreams": {
        **_COMMON,
        "endpointPrefix": "streams.dynamodb",
        "serviceId": "DynamoDB Streams",
    },
}
WITH_ENDPOINTS: Final = (
    "dynamodb",
    "streams.dynamodb",
    "application-autoscaling",
    "oidc",
    "portal.sso",
    "signin",
    "sts",
)


class _Endpoints(TypedDict):
    partitions: list[dict[str, msgspec.Raw]]


_DECODE_ENDPOINTS: Final = msgspec.json.Decoder(_Endpoints).decode
_DECODE_SERVICES: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class _Files(JSONFileLoader):  # type: ignore[misc]  # its base has no types
    def load_file(self, file_path: str) -> Any:
        path = Path(f"{file_path}.json")
        if path.name != "endpoints.json" or not path.is_file():
            return super().load_file(file_path)
        return {
            "partitions": [
                _used(each) for each in _DECODE_ENDPOINTS(path.read_bytes())["partitions"]
            ]
        }


def _used(partition: dict[str, msgspec.Raw]) -> dict[str, Any]:
    services = _DECODE_SERVICES(partition.pop("services"))
    used = {
        name: msgspec.json.decode(services[name]) for name in WITH_ENDPOINTS if name in services
    }
    return {
        **{name: msgspec.json.decode(each) for name, each in partition.items()},
        "services": used,
    }


class ServiceData(Loader):  # type: ignore[misc]  # its base has no types
    """Loads complete data, except for clients of DynamoDB, whose methods are not called."""

    FILE_LOADER_CLASS = _Files

    def load_service_model(
        self, service_name: str, type_name: str, api_version: str | None = None
    ) -> Any:
        metadata = _METADATA.get(service_name)
        if metadata is None:
            return super().load_service_model(service_name, type_name, api_version)
        if type_name == "service-2":
            return {"metadata": dict(metadata)}
        return {
            "version": "1.0",
            "parameters": {},
            "rules": [],
        }  # the endpoint is that of the partition
