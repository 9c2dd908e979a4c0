"""Updates of one entity that wait together: decided one after the other on the item that was read, and
written as one item. So many tasks that count up one entity share a read and a write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from hf_async_store.changes import PRESENT, Change, Outcome, Patch
from hf_async_store.errors import StorageError
from hf_async_store.field_operations import plain_fields
from hf_async_store.preconditions import changed
from hf_async_store.strategies.dynamodb.write_op import WriteOp
from hf_async_store.values import VERSION, Entity, Key

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hf_async_store.strategies.dynamodb.items import ItemMapping


def combined(changes: Sequence[Change], has_stream: Callable[[str], bool]) -> list[list[int]]:
    """The places of the changes, in order; those of updates that share a write are in one group.

    These compute fields from what is stored, and follow each other among the changes of their entity.
    Other updates need no read, and may leave more of an item of another program as it is.

    Args:
        has_stream: whether each version of a collection is in a feed, so that none can be left out.
    """
    groups: list[list[int]] = []
    last: dict[Key, list[int]] = {}
    for place, change in enumerate(changes):
        group = last.get(change.key)
        if (
            group is not None
            and _is_computed(change)
            and _is_computed(changes[group[0]])
            and not has_stream(change.key.collection)
        ):
            group.append(place)
            continue
        group = last[change.key] = [place]
        groups.append(group)
    return groups


def _is_computed(change: Change) -> bool:
    """Whether a change computes fields, and requires nothing but that the entity exists."""
    return (
        isinstance(change, Patch)
        and change.expect is PRESENT
        and change.mark is None
        and change.lifetimes is None
        and plain_fields(change.fields) is None
    )


class CombinedUpdates(WriteOp):
    """Several updates of an entity as one write. Each has an outcome, and a version, of its own.

    Args:
        changes: as grouped by `combined`.

    Attributes:
        decided: their outcomes if the write is applied.
    """

    def __init__(self, changes: Sequence[Change], mapping: ItemMapping, table: str) -> None:
        super().__init__(changes[0], mapping, table)
        self.changes = changes
        self.decided: list[Outcome] = []

    def decide(self, stored: Entity | None) -> Entity | None:
        self.decided = []
        entity = stored
        for change in self.changes:
            try:
                entity = cast("Entity", changed(change, entity))  # no update deletes
            except StorageError as exc:
                self.decided.append(exc)
            else:
                self.decided.append(cast("int", entity[VERSION]))
        if entity is stored:
            raise cast("StorageError", self.decided[0])
        return entity
