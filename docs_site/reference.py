"""The pages of the reference: which public names each describes. mkdocstrings reads their docstrings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import hf_async_store
from hf_async_store import driver


class Section(NamedTuple):
    """A page of the reference.

    Attributes:
        title: its heading.
        text: the sentence below the heading.
        names: what it describes, as names of `hf_async_store` or of its modules.
    """

    title: str
    text: str
    names: tuple[str, ...]


ERRORS: Final = tuple(
    name
    for name in hf_async_store.__all__
    if name.endswith("Error") and issubclass(getattr(hf_async_store, name), Exception)
)

ENGINE_BASES: Final = ("Engine", "Session", "Reader")
ENGINE_NAMES: Final = tuple(
    f"driver.{name}"
    for name in driver.__all__
    if name not in (*hf_async_store.__all__, *ENGINE_BASES)
)

STARLETTE_NAMES: Final = (
    *("store_lifespan", "set_store", "store_of", "EXCEPTION_HANDLERS", "storage_error_response"),
    *("entity_response", "page_response"),
)
EVENT_NAMES: Final = ("ChangesResponse", "last_event_id")
HTTP_NAMES: Final = (
    *("problem_of", "status_of", "Problem", "PreconditionFailedError", "entity_tag"),
    *("expected_version", "check_preconditions", "is_match", "is_none_match", "page_headers"),
)

SECTIONS: Final[Mapping[str, Section]] = {
    "store": Section(
        "The store",
        "Opening a store, and the methods that only a store has. Those on entities are on the next page.",
        ("open_store", "StorageStrategy"),
    ),
    "entities": Section(
        "Entities",
        "The methods that stores and transactions share, and the types of what they take and return.",
        ("RepositoryInterface", "Entity", "Value", "ABSENT", "REMOVE", "Page"),
    ),
    "transactions": Section(
        "Transactions",
        "What a transaction has besides the methods on entities.",
        ("Transaction",),
    ),
    "claims": Section(
        "Claims",
        "What `claim_entities` and `claims` of a store return.",
        ("Claim", "ClaimInfo"),
    ),
    "feed": Section(
        "Change feed",
        "The methods of a store that watch its changes or wait for one, and what they return.",
        (
            *("watching.WatchedStore", "Changes", "EntityChange"),
            *("Subscription", "SubscriptionInfo"),
        ),
    ),
    "queries": Section(
        "Filters and orders",
        "The operators of filters, and the forms of `order_by`.",
        (
            *("eq", "ne", "lt", "lte", "gt", "gte", "between", "in_", "not_in", "exists"),
            *("contains", "begins_with", "and_", "or_", "not_", "path", "asc", "desc", "MISSING"),
        ),
    ),
    "updates": Section(
        "Computed changes",
        "Changes that the store computes from the stored value, in the same step as the write.",
        ("increment", "append", "add_to_set", "remove_from_set"),
    ),
    "collections": Section(
        "Collections",
        "Declarations of collections, and what a class adds to its annotations.",
        (
            *("Collection", "Field", "Index", "Expire", "References", "StoreVersion"),
            "HOST_FACTORY",
        ),
    ),
    "typed": Section(
        "Typed collections",
        "The methods of one collection, with instances of a class instead of dicts.",
        (
            *("TypedCollection", "TypedRepository", "TypedPage", "Versioned", "TypedClaim"),
            *("TypedChanges", "TypedChange"),
        ),
    ),
    "observation": Section(
        "Observation",
        "What an observer of a store is told, in `hf_async_store.observer`, and the one for OpenTelemetry.",
        (
            *("observer.Observer", "observer.StoreObserver", "observer.Observation"),
            *("observer.Operation", "integrations.opentelemetry.OpenTelemetryObserver"),
        ),
    ),
    "capabilities": Section(
        "Capabilities, plans and schema changes",
        "What a store tells about itself.",
        ("Capabilities", "QueryPlan", "SchemaChange"),
    ),
    "configuration": Section(
        "Configuration",
        "Configurations as objects. The keys are described on the page Configuration.",
        ("load_config", "StorageConfig"),
    ),
    "strategies": Section(
        "Strategies",
        "The classes of stores, with the methods that only one engine has.",
        (
            *("JSONStorageStrategy", "SQLStorageStrategy"),
            *("DynamoDBStorageStrategy", "MemoryStorageStrategy"),
        ),
    ),
    "migration": Section(
        "Migration and backups",
        "Copies of whole stores. Import these names from `hf_async_store.migration` and "
        "`hf_async_store.migration.live`.",
        (
            "migration.MigrationTool",
            "migration.MigrationReport",
            "migration.backup_store",
            "migration.restore_store",
            "migration.compare_stores",
            "migration.live.LiveMigration",
            "migration.live.LiveStatus",
        ),
    ),
    "blocking": Section(
        "Blocking callers",
        "The functions of `hf_async_store.sync`. The methods of its stores are those of the asynchronous "
        "store, without `await`.",
        ("sync.open_store", "sync.blocking_store"),
    ),
    "web": Section(
        "Web applications",
        "Import these names from the modules `starlette`, `server_sent_events` and `http` of "
        "`hf_async_store.integrations`. Examples are on the page Web applications.",
        (
            *(f"integrations.starlette.{each}" for each in STARLETTE_NAMES),
            *(f"integrations.server_sent_events.{each}" for each in EVENT_NAMES),
            *(f"integrations.http.{each}" for each in HTTP_NAMES),
        ),
    ),
    "test suites": Section(
        "Tests of applications",
        "Examples are on the page Testing an application, and so are the fixtures.",
        ("testing.settable_clock.SettableClock", "testing.faults.Faults"),
    ),
    "errors": Section(
        "Errors",
        "Every error that the store raises intentionally. What to do about each is on the page "
        "Troubleshooting.",
        ("StorageError", *(each for each in ERRORS if each != "StorageError")),
    ),
    "engines": Section(
        "Engines",
        "What a strategy of your own implements. Import these names from `hf_async_store.driver`.",
        tuple(f"driver.{name}" for name in ENGINE_BASES),
    ),
    "engine names": Section(
        "Names for engines",
        "What the methods of engines take and return, and the decisions that engines share. Import these "
        "names from `hf_async_store.driver`, too.",
        (
            *ENGINE_NAMES,
            "overlay_session.OverlaySession",
            "strategy.schema_of",
            "strategies.routing.routed",
        ),
    ),
}


def text_of(section: Section) -> str:
    """The page, in Markdown, with an instruction for mkdocstrings for each name."""
    names = "\n\n".join(f"::: hf_async_store.{each}" for each in section.names)
    return f"# {section.title}\n\n{section.text}\n\n{names}\n"
