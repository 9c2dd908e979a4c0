"""The JSON form of an `Expire`, in which a store remembers it.

What was read from a store is data: the filter is rebuilt from names, operators and values, and validated
like that of a program.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

import msgspec

from hf_async_store.errors import ConfigurationError
from hf_async_store.expiry import Expire
from hf_async_store.lifetimes import filter_of
from hf_async_store.query import (
    EVERYTHING,
    And,
    Combined,
    Comparison,
    Filter,
    FilterMap,
    Not,
    Op,
    OpName,
    Path,
)
from hf_async_store.schema import Collection


class RecordedExpire(msgspec.Struct, frozen=True, omit_defaults=True):
    """An `Expire` in its JSON form.

    Attributes:
        where: null; or a comparison, `[path, operator, value]`; or `{"and": [...]}`, `{"or": [...]}` or
            `{"not": [...]}` of such filters.
    """

    field: str
    after: timedelta = timedelta()
    where: Any = None

    def declared(self) -> Expire:
        """The declaration.

        Raises:
            ConfigurationError: the filter is malformed.
        """
        return Expire(self.field, self.after, None if self.where is None else _decoded(self.where))


def recorded_expire(collection: Collection) -> RecordedExpire | None:
    """The JSON form of the expiry of a collection; None if its entities do not expire."""
    expire = collection.expires
    if expire is None:
        return None
    where = filter_of(collection)
    return RecordedExpire(
        expire.field, expire.after, None if where == EVERYTHING else _encoded(where)
    )


def declared_expire(recorded: RecordedExpire | None) -> Expire | None:
    """The declaration of a JSON form."""
    return None if recorded is None else recorded.declared()


def _encoded(where: Filter) -> object:
    if isinstance(where, Comparison):
        return [list(where.path), where.op, where.value]
    if isinstance(where, Not):
        return {"not": [_encoded(where.part)]}
    return {"and" if isinstance(where, And) else "or": [_encoded(each) for each in where.parts]}


def _decoded(where: object) -> FilterMap | Combined:
    if isinstance(where, list) and len(where) == 3 and isinstance(where[0], list):
        path, op, value = where
        is_listed = op in ("in", "not_in", "between") and isinstance(value, list)
        operand = tuple(value) if is_listed else value
        return {Path(tuple(path)): Op(cast("OpName", op), operand)}
    if isinstance(where, dict) and len(where) == 1:
        [(kind, parts)] = where.items()
        if kind in ("and", "or", "not") and isinstance(parts, list):
            return Combined(kind, tuple(map(_decoded, parts)))
    raise ConfigurationError("the filter of an Expire is malformed")
