"""A caller's own SQL: what is refused of it, and its parameters, `?` and `:name`, as drivers take them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, cast

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

_COMMENTS: Final = re.compile(r"(?s)(?:\s|;|--[^\n]*(?:\n|\Z))*")
_CONTROL: Final = re.compile(
    r"(?i)(?:abort|begin|commit|end|release|rollback|savepoint|start\s+transaction"
    r"|prepare\s+transaction)\b"
)


def check_statement(sql: object, params: object) -> None:
    """Refuse what no engine takes, and what would end or divide a transaction of the store.

    Raises:
        InvalidInputError.
    """
    _check_text(sql, "the statement")
    text = _without_comments(cast("str", sql))
    if not text:
        raise InvalidInputError("execute_with_lock: the statement is empty")
    if _CONTROL.match(text):
        raise InvalidInputError(
            f"execute_with_lock: {text.split()[0].upper()} is left to begin_transaction(), whose "
            "transactions are all or nothing"
        )
    if isinstance(params, Mapping):
        params = list(params.values())
    if isinstance(params, str | bytes) or not isinstance(params, Sequence):
        raise InvalidInputError("execute_with_lock: the arguments are a list or a map")
    for each in params:
        if isinstance(each, str):
            _check_text(each, "an argument")


def _check_text(value: object, what: str) -> None:
    if not isinstance(value, str):
        raise InvalidInputError(f"execute_with_lock: {what} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInputError(f"execute_with_lock: {what} holds a lone surrogate") from exc
    if "\0" in value:
        raise InvalidInputError(f"execute_with_lock: {what} holds U+0000")


def _without_comments(sql: str) -> str:
    """A statement from its first word on. Comments may hold comments, as on PostgreSQL."""
    start = 0
    while True:
        skipped = _COMMENTS.match(sql, start)
        start = start if skipped is None else skipped.end()
        if not sql.startswith("/*", start):
            return sql[start:]
        depth = 0
        for each in re.finditer(r"/\*|\*/", sql[start:]):
            depth += 1 if each[0] == "/*" else -1
            if depth == 0:
                start += each.end()
                break
        else:
            return ""


def bind(
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
