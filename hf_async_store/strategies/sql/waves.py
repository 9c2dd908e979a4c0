"""Divides changes into waves: the changes of a wave are independent of one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

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
    collections = {each.key.collection for each in changes}
    return references and any(
        field.references in collections for name in collections for field in schema[name].references
    )


def _dependency_depths(schema: Schema, changes: Sequence[Change]) -> list[int]:
    """For each change, the number of its wave: after the waves of all changes on which it may depend.

    A change depends on the earlier changes of the same key. A child and a change of its parent
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
        declared = schema[collection]
        named: list[Key] = []
        if not isinstance(change, Delete):
            fields = change.entity if isinstance(change, Put) else change.fields
            for field in declared.references:
                given = fields.get(field.name)
                if isinstance(given, str):
                    named.append(Key(cast("str", field.references), given))
        before = [of_key.get(change.key, -1), of_children.get(change.key, -1)]
        before += [of_key.get(parent, -1) for parent in named]
        before += [of_deletes.get(cast("str", each.references), -1) for each in declared.references]
        if isinstance(change, Delete):
            before += [
                of_collection.get(child.name, -1) for child, _ in schema.children[collection]
            ]
        level = 1 + max(before)
        levels.append(level)
        of_key[change.key] = level
        of_collection[collection] = max(level, of_collection.get(collection, -1))
        for parent in named:
            of_children[parent] = max(level, of_children.get(parent, -1))
        if isinstance(change, Delete) and schema.children[collection]:
            of_deletes[collection] = max(level, of_deletes.get(collection, -1))
    return levels
