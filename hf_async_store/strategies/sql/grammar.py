"""The SQL of a database system: paths into entities, conditions, sort terms and definitions.

The position of a value in the total order of values is expressed by sort terms, expressions that are
never NULL: the number or text, or a code that sorts before or after all of these. An index on the sort
terms of a field serves filters and orders, whatever the types of its values. A value is inexact if its
sort terms do not determine its position: a list, for example. Rows with inexact values are compared
again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, TypeAlias

import msgspec

from hf_async_store.query import MISSING, Missing
from hf_async_store.values import FieldType, Value

if TYPE_CHECKING:
    from sqlalchemy.types import TypeEngine

    from hf_async_store.schema import Field, Schema

TRUE: Final = "TRUE"
FALSE: Final = "FALSE"
OPERATORS: Final = {"lt": "<", "lte": "<=", "gt": ">", "gte": ">="}

encode_json: Final = msgspec.json.encode
decode_json: Final = msgspec.json.decode

MISSING_RANK: Final = 0
NUMBER_RANK: Final = 4
TEXT_RANK: Final = 5


def rank_of(value: Value | Missing) -> int:
    """The place of the type of a value in the total order; false and true have one each."""
    if value is MISSING:
        return MISSING_RANK
    if value is None:
        return 1
    if isinstance(value, bool):
        return 3 if value else 2
    if isinstance(value, int | float):
        return NUMBER_RANK
    if isinstance(value, str):
        return TEXT_RANK
    return 6 if isinstance(value, list) else 7


Form: TypeAlias = Literal["any", "text", "number"]
"""Of which type values are exact: of both, or of one, with the other values before or after them."""


class SortTerms(NamedTuple):
    """The expressions by which values are sorted."""

    form: Form
    sql: tuple[str, ...]


class Condition(NamedTuple):
    """A condition of a WHERE. If it is not exact, it accepts more rows than it should."""

    sql: str
    exact: bool = True


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

    stored: ClassVar[bool]
    """Whether generated columns are stored in the table."""

    @abstractmethod
    def encode(self, value: Value) -> str:
        """The JSON of a value, in a form that the document column returns unchanged."""

    @abstractmethod
    def parameter(self, number: int, kind: str) -> str: ...

    @abstractmethod
    def strings(self, values: Sequence[str]) -> object:
        """A list of strings as one argument of the kind "list"."""

    @abstractmethod
    def in_list(self, parameter: str) -> str:
        """The operator and operand for: is in the list of strings that is an argument."""

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
    def contains(self, expression: str, part: str) -> str: ...

    @abstractmethod
    def version(self, column: str) -> str:
        """The version as a number that can be compared with any number."""

    @abstractmethod
    def number(self, value: float, args: Arguments) -> str:
        """A parameter for a number."""

    # -- sort terms --------------------------------------------------------------------------

    @abstractmethod
    def terms(self, target: str) -> SortTerms:
        """The sort terms of a JSON value of any type."""

    @abstractmethod
    def indexed_terms(self, field: Field, prefix: str) -> SortTerms:
        """The sort terms of a field as its indexes contain them.

        Args:
            prefix: of the columns: `t.`, or nothing in a definition.
        """

    @abstractmethod
    def operand(
        self, value: Value | Missing, form: Form, args: Arguments, *, below: bool | None = None
    ) -> tuple[str, ...]:
        """The sort terms of a value as parameters.

        Args:
            below: for an inexact value: whether to return a position before every row that may
                have the value, or after; None: its own.
        """

    @abstractmethod
    def exact(self, value: Value | Missing, form: Form) -> bool:
        """Whether the sort terms of a value determine its position."""

    @abstractmethod
    def confusable(self, one: Value | Missing, other: Value | Missing, form: Form) -> bool:
        """Whether sort terms may put two values, of which one is inexact, in the wrong order."""

    @abstractmethod
    def equal(self, terms: SortTerms, values: Sequence[Value], args: Arguments) -> Condition:
        """The condition that a value equals one of some values of one rank, not lists or dicts."""

    @abstractmethod
    def bound(
        self, terms: SortTerms, target: str, op: str, value: str | float, args: Arguments
    ) -> Condition:
        """The condition that a string or number is less or greater than another one.

        Args:
            target: the JSON value, of which `terms` are the sort terms.
        """

    # -- definitions -------------------------------------------------------------------------

    @abstractmethod
    def type_of(self, kind: FieldType) -> TypeEngine[Any]:
        """The type of the generated column of a field."""

    @property
    @abstractmethod
    def document_type(self) -> TypeEngine[Any]: ...

    @abstractmethod
    def same_type(self, existing: str, type_: TypeEngine[Any]) -> bool:
        """Whether a column of the catalog, as `Dialect.reflect_columns` describes it, has a type."""

    @abstractmethod
    def generated(self, field: Field) -> str:
        """The value of the generated column of a field: NULL if the value has another type."""

    @abstractmethod
    def sort_columns(self, field: Field) -> Mapping[str, str]:
        """By name, further generated columns that the indexes of a field need."""

    @abstractmethod
    def index_fields(self, definition: str) -> list[str]:
        """The names of the fields in the definition of an index of this store, in their order."""

    @abstractmethod
    def refers(self, alias: str, field: Field, parent: str) -> str:
        """The condition that a reference contains an id; an index serves it."""

    @abstractmethod
    def reference_ddl(
        self, schema: Schema, existing: Mapping[str, str], *, enforced: bool
    ) -> list[str]:
        """The statements that make the database itself enforce the references, or stop it.

        Args:
            existing: the indexes, constraints and triggers by name.
        """
