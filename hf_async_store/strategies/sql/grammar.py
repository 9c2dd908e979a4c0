"""The SQL of a database system: conditions on the document, order terms, and definitions.

A field with a key column is compared and sorted by its key column, the same way everywhere; see
`compiler`. What is here is for all other paths, which have no index.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Final, NamedTuple

import msgspec

from hf_async_store.query import Missing
from hf_async_store.values import Entity, FieldType, Value

TRUE: Final = "TRUE"
FALSE: Final = "FALSE"
ROWS_PER_STEP: Final = 256
"""How many rows are decoded in one step of the event loop, if they need not be filtered here."""

OPERATORS: Final = {"lt": "<", "lte": "<=", "gt": ">", "gte": ">="}

encode_json: Final = msgspec.json.encode
decode_json: Final = msgspec.json.decode


class Condition(NamedTuple):
    """A condition of a WHERE. If it is not exact, it accepts more rows than it should."""

    sql: str
    exact: bool = True


class Compiled(NamedTuple):
    """A query as SQL.

    Attributes:
        args: the arguments of the statement.
        residual: the condition by which the rows must still be filtered; None if all rows match.
        limited: the statement applies the limit.
        step: how many rows are decoded, and filtered, in one step of the event loop.
        where: the condition of the statement.
    """

    sql: str
    args: list[object]
    residual: Callable[[Entity], bool] | None = None
    limited: bool = False
    step: int = ROWS_PER_STEP
    where: str = ""


class Arguments:
    """Collects the arguments of a statement while it is compiled."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self.values: list[object] = []

    def add(self, value: object, kind: str = "text") -> str:
        """Add an argument in the form that the driver takes; returns its parameter."""
        self.values.append(value)
        return self._grammar.parameter(len(self.values), kind)


class Grammar(ABC):
    """A database system: its SQL, its types and the form of values in it."""

    text_type: ClassVar[str]
    """The type of ids; it sorts by code point."""

    has_statistics: ClassVar[bool]
    """Whether the database estimates how many rows match, and chooses an index accordingly."""

    @abstractmethod
    def encode(self, value: Value) -> str:
        """The JSON of a value, in a form that the document column returns unchanged."""

    @abstractmethod
    def parameter(self, number: int, kind: str) -> str:
        """A parameter of the kind "text", "list" (of strings), "bytes", or one of the grammar's own."""

    @abstractmethod
    def strings(self, values: Sequence[str]) -> object:
        """A list of strings as one argument of the kind "list"."""

    @abstractmethod
    def in_list(self, parameter: str) -> str:
        """The operator and operand for: is in the list of strings that is an argument."""

    def unknown(self, operand: str) -> str:
        """An operand whose value does not affect the plan of a statement."""
        return operand

    @abstractmethod
    def read(self, column: str) -> str:
        """The expression by which a SELECT reads the document column as text."""

    # -- conditions --------------------------------------------------------------------------

    @abstractmethod
    def at(self, steps: Sequence[str | int], args: Arguments) -> str:
        """The JSON at a path in the entity; NULL if there is no value."""

    @abstractmethod
    def test(self, target: str, op: str, value: Value, args: Arguments) -> Condition:
        """The condition that an operator is true for a JSON value."""

    @abstractmethod
    def in_strings(self, expression: str, values: Sequence[str], args: Arguments) -> str:
        """The condition that a string is one of some strings."""

    @abstractmethod
    def in_bytes(self, column: str, values: Sequence[bytes], args: Arguments) -> str:
        """The condition that a key column contains one of some values; an index serves it."""

    @abstractmethod
    def contains(self, expression: str, part: str) -> str: ...

    @abstractmethod
    def version(self, column: str) -> str:
        """The version as a number that can be compared with any number."""

    @abstractmethod
    def number(self, value: float, args: Arguments) -> str:
        """A parameter for a number."""

    # -- order -------------------------------------------------------------------------------

    @abstractmethod
    def terms(self, target: str) -> tuple[str, ...]:
        """The expressions by which a JSON value is sorted.

        Values whose `sort_bytes` are equal and not exact are next to each other, in any order.
        """

    @abstractmethod
    def operands(self, value: Value | Missing, args: Arguments) -> tuple[str, ...]:
        """The `terms` of a value as parameters."""

    # -- definitions -------------------------------------------------------------------------

    @abstractmethod
    def view_column(self, field: str, kind: FieldType) -> str:
        """The value of a field in the view: NULL if the stored value has another type."""
