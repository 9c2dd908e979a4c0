"""The types of stored values. They are exported by `values`; errors use them, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, ForwardRef, TypeAlias

if TYPE_CHECKING:
    Value: TypeAlias = "None | bool | int | float | str | list[Value] | dict[str, Value]"
else:
    # With its module: `help` evaluates the annotations of a class in the module of that class.
    Value = ForwardRef(
        "None | bool | int | float | str | list[Value] | dict[str, Value]", module=__name__
    )
Entity: TypeAlias = dict[str, Value]
