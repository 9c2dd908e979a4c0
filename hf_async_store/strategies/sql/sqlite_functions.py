"""Functions that are registered in SQLite: they compare JSON as the reference does, and follow paths
that SQLite cannot express."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, cast

from hf_async_store.claim_records import next_token
from hf_async_store.query import MISSING, Comparison, OpName, compile_filter
from hf_async_store.sort_bytes import sort_bytes
from hf_async_store.strategies.sql.grammar import decode_json, encode_json
from hf_async_store.unique import stored_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hf_async_store.values import Entity


def test(encoded: str | None, op: str, operand: str) -> bool:
    """Apply an operator of a filter to a JSON value; NULL is a missing value."""
    return _test(op, operand)({} if encoded is None else {"x": decode_json(encoded)})


@lru_cache(maxsize=512)
def _test(op: str, operand: str) -> Callable[[Entity], bool]:
    return compile_filter(Comparison(("x",), cast("OpName", op), decode_json(operand)))


def at(encoded: str | None, steps: str) -> str | None:
    """The JSON at a path that SQLite's own path syntax cannot express; NULL if there is no value."""
    if encoded is None:
        return None
    value: Any = decode_json(encoded)
    for step in decode_json(steps):
        kind = dict if isinstance(step, str) else list
        if not (isinstance(value, kind) and (step in value if kind is dict else step < len(value))):
            return None
        value = value[step]
    return encode_json(value).decode()


def key(encoded: str | None) -> bytes:
    """The `sort_bytes` of a JSON value; NULL is a missing value."""
    return sort_bytes(MISSING if encoded is None else decode_json(encoded))


def fill(doc: object, name: str) -> bytes:
    """The key column of a field of a document, for rows that were written before it existed.

    Where another program damaged the document, it is that of a missing value: reading the row fails.
    """
    try:
        return sort_bytes(decode_json(cast("str", doc)).get(name, MISSING))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return sort_bytes(MISSING)


def digest(doc: object, names: str) -> bytes | None:
    """The unique column of the fields with these names, separated by commas, as `fill`."""
    try:
        return stored_digest(decode_json(cast("str", doc)), tuple(names.split(",")))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def nanoseconds() -> int:
    """The clock for new tokens: see `next_token`."""
    return next_token(0)


class RowFunction:
    """A function of one connection, which an UPDATE calls for each row: `of_row`, which is set before."""

    of_row: Callable[..., str]

    def __call__(self, *row: object) -> str:
        return self.of_row(*row)


NANOSECONDS: Final = "hf_nanoseconds"
CHANGED_DOCUMENT: Final = "hf_changed_document"

FUNCTIONS: Final[Mapping[str, tuple[int, Callable[..., Any]]]] = {
    "hf_test": (3, test),
    "hf_at": (2, at),
    "hf_key": (1, key),
    "hf_fill": (2, fill),
    "hf_digest": (2, digest),
    "hf_bytes": (1, bytes.fromhex),
}
"""By name: the number of arguments, and the function. Each has the same result for the same arguments."""
