"""Divides changes into waves: the changes of a wave are independent of one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_async_store.changes import Change, Delete, Put
from hf_async_store.schema import Schema
from hf_async_store.values import Key


def wave_numbers(schema: Schema, changes: Sequence[Change], *, references: bool) -> list[int]:
    """For each change, the number of its wave: after the waves of all changes on which it may depend."""
    if not _may_touch(schema, changes, references=references):
        return [0] * len(changes)
    return _dependency_depths(schema, changes)


def _may_touch(schema: Schema, changes: Sequence[Change], *, references: bool) -> bool:
    """Whether some of the changes may depend on others."""
    if len({each.key for each in changes}) < len(changes):
        return True
    return references and are_related(schema, changes)


def are_related(schema: Schema, changes: Sequence[Change]) -> bool:
    """Whether changes concern both a collection and one that refers to it."""
    collections = {each.key.collection for each in changes}
    return any(
        field.parent in collections for name in collections for field in schema[name].references
    )


def _dependency_depths(schema: Schema, changes: Sequence[Change]) -> list[int]:
    """A change depends on the earlier changes of the same key. A child and a change of its parent
    depend on each other in input order, and so do a delete in a collection that has children and
    every change of these children.
    """
    of_key: dict[Key, int] = {}
    of_children: dict[Key, int] = {}  # by parent: the last wave of a change that refers to it
    of_deletes: dict[str, int] = {}  # by collection of parents: the last wave of a delete
    of_collection: dict[str, int] = {}  # by collection: the last wave of any change
    levels: list[int] = []
    for change in changes:
        collection = change.key.collection
        parents = _parents(schema, change)
        children = schema.children[collection] if isinstance(change, Delete) else ()
        before = [of_key.get(change.key, -1), of_children.get(change.key, -1)]
        before += [of_key.get(parent, -1) for parent in parents]
        before += [of_deletes.get(field.parent, -1) for field in schema[collection].references]
        before += [of_collection.get(child.name, -1) for child, _ in children]
        level = 1 + max(before)
        levels.append(level)
        of_key[change.key] = level
        _raise(of_collection, collection, level)
        for parent in parents:
            of_children[parent] = max(level, of_children.get(parent, -1))
        if children:
            _raise(of_deletes, collection, level)
    return levels


def _parents(schema: Schema, change: Change) -> list[Key]:
    """The entities to which a change refers."""
    if isinstance(change, Delete):
        return []
    fields: Mapping[str, object] = change.entity if isinstance(change, Put) else change.fields
    named = [
        (field.parent, fields.get(field.name)) for field in schema[change.key.collection].references
    ]
    return [Key(parent, each) for parent, each in named if isinstance(each, str)]


def _raise(levels: dict[str, int], name: str, level: int) -> None:
    levels[name] = max(level, levels.get(name, -1))
