"""Declarations, `open_store` and `MigrationTool` refuse arguments of the wrong kind.

Case 127 of the contract does the same for the methods of stores and transactions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import (
    Collection,
    ConfigurationError,
    Expire,
    Field,
    Index,
    MigrationTool,
    load_config,
    open_store,
)
from hf_async_store.strategies import dynamodb, json, memory, sql
from hf_async_store.testing.wrong_arguments import (
    ACCEPTED,
    check_call,
    public_methods,
    wrong_calls,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MEMORY = {"storage": {"strategy": "memory"}}
FUNCTIONS: dict[Any, tuple[dict[str, tuple[str, ...]], dict[str, object]]] = {
    open_store: (
        {
            "config": (),
            "collections": (),
            "follow_moves": (),
            "clock": ("none", "function"),
            "purge_seconds": ("none", "integer", "float"),
            "observer": ("none",),
        },
        {"config": MEMORY},
    ),
    load_config: ({"source": ("empty dict", "dict")}, {"source": MEMORY}),
    Collection: (
        {
            "name": ("text",),
            "key": ("text",),
            "fields": ("list", "set"),
            "indexes": (),
            "open": ("boolean",),
            "expires": ("none",),
            "feed": ("none", "integer", "float"),
        },
        {"name": "jobs", "key": "job_id"},
    ),
    Expire: (
        {"field": ("text",), "after": (), "where": ("none", "empty dict", "dict")},
        {"field": "expires_at"},
    ),
    Field: (
        {
            "name": ("text",),
            "type": (),
            "required": ("boolean",),
            "references": ("none", "text"),
            "enforced": ("boolean",),
        },
        {"name": "size"},
    ),
    Index: (
        {
            "field": ("text",),
            "sort": ("none", "text"),
            "third": ("none", "text"),
            "fourth": ("none", "text"),
            "unique": ("boolean",),
        },
        {"field": "size"},
    ),
    memory.MemoryStorageStrategy: ({"config": (), "collections": ()}, {"config": MEMORY}),
    json.JSONStorageStrategy: ({"config": (), "collections": ()}, {"config": "json:x"}),
    sql.SQLStorageStrategy: (
        {"config": (), "collections": (), "password": ("none", "function")},
        {"config": "sqlite:x"},
    ),
    dynamodb.DynamoDBStorageStrategy: (
        {"config": (), "collections": ()},
        {"config": "dynamodb://eu-west-1/x"},
    ),
    MigrationTool: (
        {
            "source": (),
            "target": (),
            "config": ("none", "empty dict"),
            "collections": (),
            "merge": ("none",),
            "leave_out": ("list", "set"),
            "advance": ("function",),
        },
        {"source": MEMORY, "target": MEMORY},
    ),
}
"""The parameters with the kinds that they accept, and valid arguments of the required ones."""

TOOL = {
    **ACCEPTED,
    "source_type": ("none",),
    "backup_location": ("none", "text"),
    "batch_size": ("none", "integer"),
    "dry_run": ("boolean",),
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda each: each.__name__)
async def test_127_arguments_of_the_wrong_kind(
    function: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    accepted, valid = FUNCTIONS[function]
    for described, arguments, refused in wrong_calls(function, accepted, valid):
        await check_call(described, lambda: _made(function, arguments), refused=refused)  # noqa: B023


def _made(function: Callable[..., object], arguments: dict[str, object]) -> None:
    function(**arguments)  # a store or a tool is not entered


async def test_127_the_methods_of_a_migration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with MigrationTool(f"json:{tmp_path / 'one'}", f"json:{tmp_path / 'two'}") as tool:
        await tool.source.save_entity("templates", {"template_id": "t"})
        for name in public_methods(MigrationTool):
            method = getattr(tool, name)
            for described, arguments, refused in wrong_calls(method, TOOL, {}):
                await check_call(described, lambda: method(**arguments), refused=refused)  # noqa: B023


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: open_store("memory:", collections=["jobs"]), "list of Collection, but an item is"),
        (lambda: open_store("memory:", collections="jobs"), "list of Collection, not str"),
        (
            lambda: open_store("memory:", collections=Collection("jobs", key="j")),
            "list of Collection, not Collection",
        ),
        (lambda: Index("a", ("b",)), 'for example Index("status", "created_at"), not tuple'),
        (
            lambda: Collection("jobs", key="j", fields={"n": "integer"}),
            "the fields of 'jobs' must be a list of Field or str, not dict",
        ),
        (lambda: Collection("jobs", key="j", fields="n"), "not str"),
        (lambda: Collection("jobs", key="j", fields=[("n", "integer")]), "an item is tuple"),
        (lambda: Collection("jobs", key="j", indexes="n"), "the indexes of 'jobs'"),
        (
            lambda: Collection("jobs", key="j", indexes=[("status", "created_at")]),
            'one of two fields is Index("status", "created_at")',
        ),
        (lambda: open_store("memory:", collections=[dict]), "declared by Collection.from_model"),
        (lambda: Field("n", int), "the types are: text, integer, number"),
        (lambda: Field("n", required="yes"), "must be True or False"),
    ],
)
def test_127_declarations_say_what_was_expected(make: Any, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert told in str(caught.value)
