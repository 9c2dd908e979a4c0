"""A caller's own SQL: rejects invalid statements, and numbers the parameters `?` and `:name` for the
driver."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, cast

from hf_async_store.errors import InvalidInputError

# String literals, quoted names, comments and casts are skipped; the last two alternatives are the
# forms of a parameter.
_TOKEN: Final = re.compile(
    r"""
    '(?:[^']|'')*'                      # a string literal
    | "(?:[^"]|"")*"                    # a quoted name
    | \$(\w*)\$.*?\$\1\$                # a dollar-quoted string
    | --[^\n]* | /\*.*?\*/              # comments
    | ::                                # a cast
    | (?P<question>\?)
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
    """Reject invalid statements and arguments, and statements for transaction control.

    Raises:
        InvalidInputError.
    """
    _check_string(sql, "the statement")
    statement = _without_comments(cast("str", sql))
    if not statement:
        raise InvalidInputError("execute_with_lock: the statement is empty")
    if _CONTROL.match(statement):
        raise InvalidInputError(
            f"execute_with_lock: {statement.split()[0].upper()} is not allowed: use "
            "begin_transaction() for a transaction"
        )
    if isinstance(params, Mapping):
        params = list(params.values())
    if isinstance(params, str | bytes) or not isinstance(params, Sequence):
        raise InvalidInputError("execute_with_lock: the arguments must be a list or a dict")
    for each in params:
        if isinstance(each, str):
            _check_string(each, "an argument")


def _check_string(value: object, subject: str) -> None:
    if not isinstance(value, str):
        raise InvalidInputError(f"execute_with_lock: {subject} is not a string")
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInputError(f"execute_with_lock: {subject} contains a lone surrogate") from exc
    if "\0" in value:
        raise InvalidInputError(f"execute_with_lock: {subject} contains U+0000")


def _without_comments(sql: str) -> str:
    """A statement without leading white space, semicolons and comments, which may be nested."""
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
    sql: str, params: Sequence[object] | Mapping[str, object], prefix: str
) -> tuple[str, list[object]]:
    """A statement with numbered parameters, and its arguments in that order.

    Args:
        prefix: the prefix of the number of a parameter.

    Raises:
        InvalidInputError: parameters and arguments do not correspond.
    """
    args: list[object] = []
    numbers: dict[str, int] = {}

    def replace(token: re.Match[str]) -> str:
        name = token["name"]
        if name is not None and isinstance(params, Mapping):
            if name not in params:
                raise InvalidInputError(f"execute_with_lock: no argument for :{name}")
            if name not in numbers:
                args.append(params[name])
                numbers[name] = len(args)
            return f"{prefix}{numbers[name]}"
        if token["question"] is not None and not isinstance(params, Mapping):
            if len(args) == len(params):
                raise InvalidInputError(
                    "execute_with_lock: the statement has more `?` than there are arguments"
                )
            args.append(params[len(args)])
            return f"{prefix}{len(args)}"
        return token[0]

    numbered = _TOKEN.sub(replace, sql)
    if len(args) != len(params):
        raise InvalidInputError(
            "execute_with_lock: there are more arguments than parameters in the statement"
        )
    return numbered, args
