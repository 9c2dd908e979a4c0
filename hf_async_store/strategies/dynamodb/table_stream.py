"""The stream of a table, which is the change feed of its collection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

VIEW: Final = "NEW_AND_OLD_IMAGES"
SPECIFICATION: Final = {"StreamEnabled": True, "StreamViewType": VIEW}


def view_of(table: Mapping[str, Any]) -> str | None:
    """What the records of the stream of a table contain; None if it has no stream."""
    specification = table.get("StreamSpecification") or {}
    if not specification.get("StreamEnabled"):
        return None
    return specification.get("StreamViewType") or ""


def stream_of(table: Mapping[str, Any]) -> str:
    """The ARN of the stream of a table."""
    return table.get("LatestStreamArn") or ""


def problem_with(table: Mapping[str, Any], name: str) -> str:
    """Why the stream of a table cannot be a change feed, as a message; "" if it can."""
    view = view_of(table)
    if view is None:
        return f"{name} has no stream of its changes; run `schema apply` to enable it"
    if view != VIEW:
        return (
            f"the stream of {name} contains {view or 'an unknown view'} instead of {VIEW}; when nobody "
            "uses it, disable it and run `schema apply`"
        )
    return ""
