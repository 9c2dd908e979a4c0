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
_SHAPES: Final = 512


def insert(table: str, item: Attributes, *, whole: bool) -> Statement:
    """Insert an item whose key must not exist.

    Args:
        whole: pass the item as one parameter, which the server parses faster but may not support.
    """
    if whole:
        return {"Statement": f'INSERT INTO "{table}" VALUE ?', "Parameters": [{"M": item}]}
    return {"Statement": _insert(table, tuple(item)), "Parameters": list(item.values())}


@lru_cache(_SHAPES)
def _insert(table: str, names: Sequence[str]) -> str:
    values = ", ".join(f"'{each}': ?" for each in names)
    return f'INSERT INTO "{table}" VALUE {{{values}}}'


class ConditionBuilder:
    """The condition of an update or delete, in addition to its key.

    Attributes:
        text: the condition, with `?` for its values; "" if there is none.
        values: the parameters of the condition.
    """

    __slots__ = ("text", "values")

    def __init__(self, text: str = "", values: Sequence[Attribute] = ()) -> None:
        self.text = text
        self.values = list(values)

    @classmethod
    def version(cls, version: int, began: str) -> ConditionBuilder:
        """The item has this version, and was last updated before the write was requested.

        Otherwise, a delayed attempt could be applied after the entity was deleted and created
        again, when it has the same version.
        """
        text = f'"{VERSION}" = ? AND "{UPDATED_AT}" < ?'
        return cls(text, [{"N": str(version)}, {"S": began}])

    @classmethod
    def token(cls, token: str) -> ConditionBuilder:
        return cls(f'"{TOKEN}" = ?', [{"S": token}])

    def and_declaration(self, mark: Attribute) -> ConditionBuilder:
        """Add the condition that the item was written with this declaration."""
        text = (
            f'{self.text} AND "{DECLARATION_DIGEST}" = ?'
            if self.text
            else f'"{DECLARATION_DIGEST}" = ?'
        )
        return ConditionBuilder(text, [*self.values, mark])

    def and_size_below(self, most: int) -> ConditionBuilder:
        """Add the condition that the stored size is at most `most`."""
        text = f'{self.text} AND "{SIZE}" <= ?' if self.text else f'"{SIZE}" <= ?'
        return ConditionBuilder(text, [*self.values, {"N": str(most)}])


def update(
    table: str,
    key: tuple[str, str],
    put: dict[Path, Attribute],
    removed: Sequence[Path],
    guard: ConditionBuilder,
    *,
    version: int | None,
    weight: int | None,
    returning: bool,
) -> Statement | None:
    """Update an existing item; None if one statement cannot express the update.

    Args:
        version: the new version; None adds 1 to the stored version.
        weight: the size that the change adds; None if `put` contains the new size.
        returning: request the changed attributes in the response.
    """
    paths = tuple(put)
    text = _update(
        table,
        key[0],
        paths,
        tuple(removed),
        guard.text,
        version is None,
        weight is not None,
        returning,
    )
    if len(text) > MAX_STATEMENT or not all(
        is_plain_name(each) for path in (*paths, *removed) for each in path
    ):
        return None
    values = list(put.values())
    if version is not None:
        values.append({"N": str(version)})
    if weight is not None:
        values.append({"N": str(weight)})
    values.append({"S": key[1]})
    return {
        "Statement": text,
        "Parameters": values + guard.values,
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }


@lru_cache(_SHAPES)
def _update(
    table: str,
    key: str,
    put: Sequence[Path],
    removed: Sequence[Path],
    guard: str,
    adds_version: bool,
    adds_weight: bool,
    returning: bool,
) -> str:
    text = [f'UPDATE "{table}"']
    text += [f"SET {_quoted(each)} = ?" for each in put]
    text.append(f'SET "{VERSION}" = "{VERSION}" + 1' if adds_version else f'SET "{VERSION}" = ?')
    if adds_weight:
        text.append(f'SET "{SIZE}" = "{SIZE}" + ?')
    text += [f"REMOVE {_quoted(each)}" for each in removed]
    text.append(f'WHERE "{key}" = ?')
    if guard:
        text.append(f"AND {guard}")
    if returning:
        text.append("RETURNING MODIFIED NEW *")
    return " ".join(text)


def _quoted(path: Path) -> str:
    return ".".join('"' + each.replace('"', '""') + '"' for each in path)


def delete(table: str, key: tuple[str, str], guard: ConditionBuilder) -> Statement:
    """Delete an item if it exists and satisfies `guard`; the response returns the deleted item."""
    # The names of tables and keys are validated where they are declared; all else is a parameter.
    text = f'DELETE FROM "{table}" WHERE "{key[0]}" = ?'  # noqa: S608
    if guard.text:
        text += f" AND {guard.text}"
    return {
        "Statement": f"{text} RETURNING ALL OLD *",
        "Parameters": [{"S": key[1]}, *guard.values],
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }
