"""Independent writes as PartiQL statements, each with its own condition.

All values are parameters. The text of a statement therefore depends only on the names in it, and is
cached.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hf_async_store.strategies.dynamodb.codec import is_plain_name
from hf_async_store.strategies.dynamodb.items import SIZE
from hf_async_store.values import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_async_store.strategies.dynamodb.codec import Attribute, Attributes

Statement: TypeAlias = dict[str, Any]
Path: TypeAlias = "tuple[str, ...]"
Condition: TypeAlias = "tuple[tuple[str, str, Attribute], ...]"
"""What must hold for an update or delete in addition to its key: attributes, operators and values."""

# Source: DynamoDB API Reference, BatchStatementRequest.
MAX_STATEMENT: Final = 8192
_CACHED_STATEMENTS: Final = 512


def insert(table: str, item: Attributes, *, whole: bool) -> Statement:
    """Insert an item whose key must not exist.

    Args:
        whole: pass the item as one parameter, which the server parses faster but may not support.
    """
    if whole:
        return {"Statement": f'INSERT INTO "{table}" VALUE ?', "Parameters": [{"M": item}]}
    return {"Statement": _insert(table, tuple(item)), "Parameters": list(item.values())}


@lru_cache(_CACHED_STATEMENTS)
def _insert(table: str, names: Sequence[str]) -> str:
    values = ", ".join(f"'{each}': ?" for each in names)
    return f'INSERT INTO "{table}" VALUE {{{values}}}'


def _conjunction(condition: Condition) -> str:
    return "".join([f' AND "{name}" {operator} ?' for name, operator, _ in condition])


def update(
    table: str,
    key: tuple[str, str],
    assignments: dict[Path, Attribute],
    removed: Sequence[Path],
    condition: Condition,
    *,
    version: int | None,
    added_size: int | None,
) -> Statement | None:
    """Update an existing item; None if one statement cannot express the update.

    Args:
        version: the new version; None adds 1 to the stored version, and the response contains it.
        added_size: the size that the change adds; None if `assignments` contains the new size.
    """
    paths = tuple(assignments)
    statement = _update(
        table,
        key[0],
        paths,
        tuple(removed),
        _conjunction(condition),
        version is None,
        added_size is not None,
    )
    if len(statement) > MAX_STATEMENT or not all(
        is_plain_name(each) for path in (*paths, *removed) for each in path
    ):
        return None
    values = list(assignments.values())
    if version is not None:
        values.append({"N": str(version)})
    if added_size is not None:
        values.append({"N": str(added_size)})
    values.append({"S": key[1]})
    return {
        "Statement": statement,
        "Parameters": [*values, *(value for _, _, value in condition)],
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }


@lru_cache(_CACHED_STATEMENTS)
def _update(
    table: str,
    key: str,
    assignments: Sequence[Path],
    removed: Sequence[Path],
    condition: str,
    adds_version: bool,
    adds_size: bool,
) -> str:
    clauses = [f'UPDATE "{table}"']
    clauses += [f"SET {_quoted(each)} = ?" for each in assignments]
    clauses.append(f'SET "{VERSION}" = "{VERSION}" + 1' if adds_version else f'SET "{VERSION}" = ?')
    if adds_size:
        clauses.append(f'SET "{SIZE}" = "{SIZE}" + ?')
    clauses += [f"REMOVE {_quoted(each)}" for each in removed]
    clauses.append(f'WHERE "{key}" = ?{condition}')
    if adds_version:
        clauses.append("RETURNING MODIFIED NEW *")
    return " ".join(clauses)


def _quoted(path: Path) -> str:
    return ".".join('"' + each.replace('"', '""') + '"' for each in path)


def delete(table: str, key: tuple[str, str], condition: Condition) -> Statement:
    """Delete an item if it exists and satisfies `condition`; the response returns the deleted item."""
    # The names of tables and keys are validated where they are declared; all else is a parameter.
    where = f'"{key[0]}" = ?{_conjunction(condition)}'
    return {
        "Statement": f'DELETE FROM "{table}" WHERE {where} RETURNING ALL OLD *',  # noqa: S608
        "Parameters": [{"S": key[1]}, *(value for _, _, value in condition)],
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }
