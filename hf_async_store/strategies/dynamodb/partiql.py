"""Independent writes as PartiQL statements, each with its own condition.

All values are parameters. The text of a statement therefore depends only on the names in it, and is
cached.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hf_async_store.strategies.dynamodb.codec import is_plain_name
from hf_async_store.strategies.dynamodb.items import DECLARATION_DIGEST, SIZE, TOKEN
from hf_async_store.values import UPDATED_AT, VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_async_store.strategies.dynamodb.codec import Attribute, Attributes

Statement: TypeAlias = dict[str, Any]
Path: TypeAlias = "tuple[str, ...]"

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


class ConditionBuilder:
    """The condition of an update or delete, in addition to its key.

    Attributes:
        comparisons: the names of attributes, each with an operator; all must hold.
        values: what they are compared with.
    """

    __slots__ = ("comparisons", "values")

    def __init__(
        self, comparisons: Sequence[tuple[str, str]] = (), values: Sequence[Attribute] = ()
    ) -> None:
        self.comparisons = tuple(comparisons)
        self.values = list(values)

    @property
    def expression(self) -> str:
        """The condition, with `?` for its values; "" if there is none."""
        return " AND ".join([f'"{name}" {operator} ?' for name, operator in self.comparisons])

    @classmethod
    def version(cls, version: int, requested_at: str) -> ConditionBuilder:
        """The item has this version, and was last updated before the write was requested.

        Otherwise, a delayed attempt could be applied after the entity was deleted and created
        again, when it has the same version.
        """
        comparisons = ((VERSION, "="), (UPDATED_AT, "<"))
        return cls(comparisons, [{"N": str(version)}, {"S": requested_at}])

    @classmethod
    def token(cls, token: str) -> ConditionBuilder:
        return cls(((TOKEN, "="),), [{"S": token}])

    def and_declaration(self, digest: Attribute) -> ConditionBuilder:
        """Add the condition that the item was written with this declaration."""
        return self._and(DECLARATION_DIGEST, "=", digest)

    def and_size_at_most(self, max_size: int) -> ConditionBuilder:
        """Add the condition that the stored size is at most `max_size`."""
        return self._and(SIZE, "<=", {"N": str(max_size)})

    def _and(self, name: str, operator: str, value: Attribute) -> ConditionBuilder:
        return ConditionBuilder([*self.comparisons, (name, operator)], [*self.values, value])


def update(
    table: str,
    key: tuple[str, str],
    assignments: dict[Path, Attribute],
    removed: Sequence[Path],
    condition: ConditionBuilder,
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
        condition.expression,
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
        "Parameters": values + condition.values,
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
    clauses.append(f'WHERE "{key}" = ?')
    if condition:
        clauses.append(f"AND {condition}")
    if adds_version:
        clauses.append("RETURNING MODIFIED NEW *")
    return " ".join(clauses)


def _quoted(path: Path) -> str:
    return ".".join('"' + each.replace('"', '""') + '"' for each in path)


def delete(table: str, key: tuple[str, str], condition: ConditionBuilder) -> Statement:
    """Delete an item if it exists and satisfies `condition`; the response returns the deleted item."""
    # The names of tables and keys are validated where they are declared; all else is a parameter.
    statement = f'DELETE FROM "{table}" WHERE "{key[0]}" = ?'  # noqa: S608
    if condition.comparisons:
        statement += f" AND {condition.expression}"
    return {
        "Statement": f"{statement} RETURNING ALL OLD *",
        "Parameters": [{"S": key[1]}, *condition.values],
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }
