"""The parameters of a caller's own SQL: `?` and `:name`, both as the driver takes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from hf_async_store.errors import InvalidInputError

# Texts, quoted names, comments and casts are passed over; then the two forms of a parameter.
_TOKEN: Final = re.compile(
    r"""
    '(?:[^']|'')*'                      # a text
    | "(?:[^"]|"")*"                    # a quoted name
    | \$(\w*)\$.*?\$\1\$                # a text in dollars
    | --[^\n]* | /\*.*?\*/              # comments
    | ::                                # a cast
    | (?P<mark>\?)
    | :(?P<name>[A-Za-z_]\w*)
    """,
    re.VERBOSE | re.DOTALL,
)


def bound(
    sql: str, params: Sequence[object] | Mapping[str, object], mark: str
) -> tuple[str, list[object]]:
    """A statement with numbered parameters, and its arguments in that order.

    Args:
        mark: what stands before the number of a parameter.

    Raises:
        InvalidInputError: parameters and arguments do not fit together.
    """
    args: list[object] = []
    numbers: dict[str, int] = {}

    def replaced(token: re.Match[str]) -> str:
        name = token["name"]
        if name is not None and isinstance(params, Mapping):
            if name not in params:
                raise InvalidInputError(f"execute_with_lock: no argument for :{name}")
            if name not in numbers:
                args.append(params[name])
                numbers[name] = len(args)
            return f"{mark}{numbers[name]}"
        if token["mark"] is not None and not isinstance(params, Mapping):
            if len(args) == len(params):
                raise InvalidInputError("execute_with_lock: more `?` than arguments")
            args.append(params[len(args)])
            return f"{mark}{len(args)}"
        return token[0]

    text = _TOKEN.sub(replaced, sql)
    if len(args) != len(params):
        raise InvalidInputError("execute_with_lock: more arguments than parameters")
    return text, args
