"""hf_async_store: an async-first store for entities: JSON files, SQLite, PostgreSQL, DynamoDB, memory.

    from hf_async_store import open_store

    async with open_store("json:data/request_database.json") as store:
        version = await store.save_entity("requests", {"request_id": "req-1", "status": "PENDING"})

All public names can be imported from this package. Importing it imports no database driver; a strategy
is imported when one of its stores is opened or its class is accessed, so that a command starts fast.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hf_async_store.changes import ABSENT
    from hf_async_store.claims import Claim
    from hf_async_store.config import StorageConfig, load_config
    from hf_async_store.driver import Capabilities, ClaimInfo, QueryPlan, SchemaChange
    from hf_async_store.errors import (
        AlreadyExistsError,
        AuthenticationError,
        BatchError,
        ClaimLostError,
        ConcurrencyConflictError,
        ConfigurationError,
        CorruptionError,
        DataFileConflictError,
        DiskFullError,
        EntityMismatchError,
        EntityNotFoundError,
        EventLoopMismatchError,
        FeedExpiredError,
        InvalidCursorError,
        InvalidFieldError,
        InvalidInputError,
        InvalidKeyError,
        InvalidQueryError,
        InvalidVersionError,
        LockTimeoutError,
        MigrationError,
        NewerFormatError,
        OperationTimeoutError,
        PartialChangeError,
        PermissionDeniedError,
        PoolTimeoutError,
        ProtocolError,
        ReadOnlyStoreError,
        ReferenceViolationError,
        RetriesExhaustedError,
        SchemaMismatchError,
        StorageError,
        StoreClosedError,
        StoreNotFoundError,
        StoreRelocatedError,
        SubscriptionAdvancedError,
        TargetNotEmptyError,
        ThrottledError,
        TransactionAbortedError,
        TransactionClosedError,
        TransactionError,
        TransactionReentryError,
        TransactionTooLargeError,
        UnavailableError,
        UniqueViolationError,
        UnknownCollectionError,
        UnsupportedValueError,
        VerificationError,
    )
    from hf_async_store.expiry import Expire
    from hf_async_store.feed import Changes, EntityChange
    from hf_async_store.field_operations import add_to_set, append, increment, remove_from_set
    from hf_async_store.migration import MigrationTool
    from hf_async_store.models import References, StoreVersion
    from hf_async_store.query import (
        MISSING,
        Page,
        and_,
        asc,
        begins_with,
        between,
        contains,
        desc,
        eq,
        exists,
        gt,
        gte,
        in_,
        lt,
        lte,
        ne,
        not_,
        not_in,
        or_,
        path,
    )
    from hf_async_store.repository import RepositoryInterface
    from hf_async_store.schema import HOST_FACTORY, Collection, Field, Index
    from hf_async_store.strategies import open_store
    from hf_async_store.strategies.dynamodb import DynamoDBStorageStrategy
    from hf_async_store.strategies.json import JSONStorageStrategy
    from hf_async_store.strategies.memory import MemoryStorageStrategy
    from hf_async_store.strategies.sql import SQLStorageStrategy
    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.subscriptions import Subscription, SubscriptionInfo
    from hf_async_store.transaction import Transaction
    from hf_async_store.typed import TypedPage, TypedRepository, Versioned
    from hf_async_store.typed_collections import (
        TypedChange,
        TypedChanges,
        TypedClaim,
        TypedCollection,
    )
    from hf_async_store.values import REMOVE, Entity, Value

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

_MODULES: Final = {
    "changes": "ABSENT",
    "claims": "Claim",
    "config": "StorageConfig load_config",
    "driver": "Capabilities ClaimInfo QueryPlan SchemaChange",
    "expiry": "Expire",
    "feed": "Changes EntityChange",
    "field_operations": "add_to_set append increment remove_from_set",
    "models": "References StoreVersion",
    "query": (
        "MISSING Page and_ asc begins_with between contains desc eq exists gt gte in_ lt lte ne "
        "not_ not_in or_ path"
    ),
    "repository": "RepositoryInterface",
    "schema": "HOST_FACTORY Collection Field Index",
    "strategies": "open_store",
    "strategy": "StorageStrategy",
    "subscriptions": "Subscription SubscriptionInfo",
    "transaction": "Transaction",
    "typed": "TypedPage TypedRepository Versioned",
    "typed_collections": "TypedChange TypedChanges TypedClaim TypedCollection",
    "values": "REMOVE Entity Value",
    "migration": "MigrationTool",
    "strategies.dynamodb": "DynamoDBStorageStrategy",
    "strategies.json": "JSONStorageStrategy",
    "strategies.memory": "MemoryStorageStrategy",
    "strategies.sql": "SQLStorageStrategy",
}
"""The modules of the public names except errors. Each is imported when one of its names is first used."""

_MODULE_OF: Final = {name: module for module, names in _MODULES.items() for name in names.split()}


if not TYPE_CHECKING:  # to which a module with `__getattr__` has every name

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULE_OF.get(name, 'errors')}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "ABSENT",
    "HOST_FACTORY",
    "MISSING",
    "REMOVE",
    "AlreadyExistsError",
    "AuthenticationError",
    "BatchError",
    "Capabilities",
    "Changes",
    "Claim",
    "ClaimInfo",
    "ClaimLostError",
    "Collection",
    "ConcurrencyConflictError",
    "ConfigurationError",
    "CorruptionError",
    "DataFileConflictError",
    "DiskFullError",
    "DynamoDBStorageStrategy",
    "Entity",
    "EntityChange",
    "EntityMismatchError",
    "EntityNotFoundError",
    "EventLoopMismatchError",
    "Expire",
    "FeedExpiredError",
    "Field",
    "Index",
    "InvalidCursorError",
    "InvalidFieldError",
    "InvalidInputError",
    "InvalidKeyError",
    "InvalidQueryError",
    "InvalidVersionError",
    "JSONStorageStrategy",
    "LockTimeoutError",
    "MemoryStorageStrategy",
    "MigrationError",
    "MigrationTool",
    "NewerFormatError",
    "OperationTimeoutError",
    "Page",
    "PartialChangeError",
    "PermissionDeniedError",
    "PoolTimeoutError",
    "ProtocolError",
    "QueryPlan",
    "ReadOnlyStoreError",
    "ReferenceViolationError",
    "References",
    "RepositoryInterface",
    "RetriesExhaustedError",
    "SQLStorageStrategy",
    "SchemaChange",
    "SchemaMismatchError",
    "StorageConfig",
    "StorageError",
    "StorageStrategy",
    "StoreClosedError",
    "StoreNotFoundError",
    "StoreRelocatedError",
    "StoreVersion",
    "Subscription",
    "SubscriptionAdvancedError",
    "SubscriptionInfo",
    "TargetNotEmptyError",
    "ThrottledError",
    "Transaction",
    "TransactionAbortedError",
    "TransactionClosedError",
    "TransactionError",
    "TransactionReentryError",
    "TransactionTooLargeError",
    "TypedChange",
    "TypedChanges",
    "TypedClaim",
    "TypedCollection",
    "TypedPage",
    "TypedRepository",
    "UnavailableError",
    "UniqueViolationError",
    "UnknownCollectionError",
    "UnsupportedValueError",
    "Value",
    "VerificationError",
    "Versioned",
    "add_to_set",
    "and_",
    "append",
    "asc",
    "begins_with",
    "between",
    "contains",
    "desc",
    "eq",
    "exists",
    "gt",
    "gte",
    "in_",
    "increment",
    "load_config",
    "lt",
    "lte",
    "ne",
    "not_",
    "not_in",
    "open_store",
    "or_",
    "path",
    "remove_from_set",
]
