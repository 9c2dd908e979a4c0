"""The declaration by which entities of a collection expire."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final, TypeAlias

import msgspec

from hf_async_store.errors import ConfigurationError

PURGE_SECONDS: Final = 60.0
"""How long a store pauses between two removals of expired entities in the background."""

ExpiryFilter: TypeAlias = Any
"""What `query.Filters` describes: this module is below it, and only keeps the value."""


class Expire(msgspec.Struct, frozen=True):
    """When the entities of a collection expire: from that time on, they are absent.

    An entity in which the field is missing or null, or contains no timestamp, never expires. Only the
    fixed form of timestamps counts, in which every write of the field stores it.

    Args:
        field: a field of type timestamp. If the collection does not declare it, this does.
        after: how long after that time the entity expires.
        where: a filter, as for queries; entities that do not match it do not expire.

    Examples:
        `Expire("expires_at")`
        `Expire("completed_at", after=timedelta(days=30), where={"status": in_(["DONE", "FAILED"])})`
    """

    field: str
    after: timedelta = timedelta()
    where: ExpiryFilter = None

    def __post_init__(self) -> None:
        if not isinstance(self.field, str):
            raise ConfigurationError(
                f"Expire: the field must be the name of one, not {type(self.field).__name__}"
            )
        if not isinstance(self.after, timedelta) or self.after < timedelta():
            raise ConfigurationError(
                f"Expire({self.field!r}): after must be a timedelta of at least 0, not {self.after!r}"
            )

        if self.where is not None and not isinstance(self.where, Mapping | msgspec.Struct):
            raise ConfigurationError(
                f"Expire({self.field!r}): where must be a filter, not {type(self.where).__name__}"
            )

    def __str__(self) -> str:
        later = f" + {self.after}" if self.after else ""
        return f"{self.field}{later}" + ("" if self.where is None else ", where a filter matches")
