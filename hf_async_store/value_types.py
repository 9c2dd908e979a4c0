"""The types of stored values. They are exported by `values`; errors use them, too."""

from __future__ import annotations

from typing import TypeAlias

Value: TypeAlias = "None | bool | int | float | str | list[Value] | dict[str, Value]"
Entity: TypeAlias = dict[str, Value]
