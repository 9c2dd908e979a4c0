"""Translation of filters to FilterExpressions of DynamoDB, as far as these can express them.

An expression must hold for every row that matches the filter. It may also hold for other rows,
because the filter is applied again to every row received. `is_exact` is true if the expression is
equivalent to the filter.

A field is compared where the item has it: its entry in `doc`, or else its attribute. So items of every
declaration are found by their stored values.

A filter is not translated where DynamoDB's semantics differ (numbers in lists, comparisons with a
whole list or map), and on the keys of the queried index, which DynamoDB does not allow. A filter that
would exceed the limits of a request is not translated either.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from hf_async_store.query import FOLDED_OPS, And, Filter, Not, Or
from hf_async_store.strategies.dynamodb.codec import is_native, is_plain_name
from hf_async_store.strategies.dynamodb.items import (
    CREATED_SUBSTITUTE,
    DOC,
    MISSING_SENTINEL,
    ItemMapping,
    is_field_name,
)
from hf_async_store.values import CREATED_AT, INT_MAX, INT_MIN, VERSION, Value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hf_async_store.strategies.dynamodb.codec import Attribute

# Source: DynamoDB service quotas, "Expression parameters": an expression of 4 KB, 300 operators, 2 MB
# of values. The limits here are lower, because a filter larger than the rows it excludes saves nothing.
_MAX_LENGTH: Final = 3_500
_MAX_OPERATORS: Final = 280
_MAX_COMPARISONS: Final = 100
_MAX_VALUES: Final = 64_000
_MAX_CHOICES: Final = 40
_MAX_DEPTH: Final = 30

_FIELD: Final = "\0"
"""Stands for the path of a field in an expression, until it is replaced by its two places."""

_PLACEHOLDER: Final = re.compile(r"[#:][nv]\d+")
_OPERATOR: Final = re.compile(r"AND|OR|NOT|attribute_[a-z_]+|contains|[<>]=?|=")
_NEGATIONS: Final = {"ne": "eq", "not_in": "in"}
_RANGE_OPERATORS: Final = {"lt": "<", "lte": "<=", "gt": ">", "gte": ">=", "timestamp_lte": "<="}


class _LimitExceeded(Exception):  # noqa: N818  # not an error: the rest of the filter is applied here
    """The expression would exceed a limit."""


class Translation(NamedTuple):
    """A translated part of a filter; exact if it is equivalent to that part."""

    expression: str
    is_exact: bool


class Names:
    """The placeholders for names and values in the expressions of one request."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.values: dict[str, Attribute] = {}
        self._by_name: dict[str, str] = {}

    def copy(self) -> Names:
        """A copy with the same placeholders."""
        duplicate = Names()
        duplicate.names, duplicate.values = dict(self.names), dict(self.values)
        duplicate._by_name = dict(self._by_name)
        return duplicate

    def name(self, name: str) -> str:
        if name not in self._by_name:
            self._by_name[name] = f"#n{len(self.names)}"
            self.names[self._by_name[name]] = name
        return self._by_name[name]

    def value(self, attribute: Attribute) -> str:
        placeholder = f":v{len(self.values)}"
        self.values[placeholder] = attribute
        return placeholder

    def path(self, steps: Sequence[str | int]) -> str:
        expression = ""
        for step in steps:
            if isinstance(step, int):
                expression += f"[{step}]"
            else:
                expression += ("." if expression else "") + self.name(step)
        return expression

    def request(self, **expressions: str) -> dict[str, Any]:
        """Request parameters with these expressions and the placeholders that they use."""
        used = set(_PLACEHOLDER.findall(" ".join(expressions.values())))
        names = {
            placeholder: name for placeholder, name in self.names.items() if placeholder in used
        }
        values = {
            placeholder: value for placeholder, value in self.values.items() if placeholder in used
        }
        request: dict[str, Any] = dict(expressions)
        if names:
            request["ExpressionAttributeNames"] = names
        if values:
            request["ExpressionAttributeValues"] = values
        return request


class FilterTranslator:
    """Translates filters on the items of a collection.

    Args:
        excluded: the key attributes of the queried index, which a FilterExpression must not contain.
    """

    def __init__(self, mapping: ItemMapping, names: Names, excluded: frozenset[str]) -> None:
        self._mapping = mapping
        self._names = names
        self._excluded = excluded
        self._comparisons = 0
        self._operators = 0
        self._length = 0
        self._values_size = 0

    def translate(self, where: Filter) -> Translation | None:
        """Translate the filter, or the parts of a conjunction that can be translated.

        Returns None if nothing can. The translation stops at the limits of a request.
        """
        if not isinstance(where, And):
            return self._translate_within_limits(where)
        return _all_of([self._translate_within_limits(each) for each in where.parts])

    def _translate_within_limits(self, where: Filter) -> Translation | None:
        """Translate a part that must hold; None if it would exceed the limits of the expression."""
        saved = self._comparisons, self._operators, self._length, self._values_size
        try:
            translated = self._translate(where)
            if translated is not None:
                self._length += len(translated.expression) + len(" AND ")
                self._operators += len(_OPERATOR.findall(translated.expression)) + 1
                self._check_limits()
        except _LimitExceeded:
            translated = None
        if translated is None:
            self._comparisons, self._operators, self._length, self._values_size = saved
        return translated

    def _translate(self, where: Filter) -> Translation | None:
        if isinstance(where, And):
            return _all_of([self._translate(each) for each in where.parts])
        if isinstance(where, Or):
            return _any_of([self._translate(each) for each in where.parts])
        if isinstance(where, Not):
            return _negated(self._translate(where.part))
        self._comparisons += 1
        if where.value is not None:
            self._values_size += len(str(where.value))
        self._check_limits()
        positive = _NEGATIONS.get(where.op)
        if positive is not None or (where.op == "exists" and not where.value):
            return _negated(self._comparison(where.path, positive or where.op, where.value))
        return self._comparison(where.path, where.op, where.value)

    def _check_limits(self) -> None:
        if (
            self._comparisons > _MAX_COMPARISONS
            or self._operators > _MAX_OPERATORS
            or self._values_size > _MAX_VALUES
            or self._length > _MAX_LENGTH
        ):
            raise _LimitExceeded

    def _comparison(self, steps: Sequence[str | int], op: str, value: Value) -> Translation | None:
        name = cast("str", steps[0])
        if (
            op in FOLDED_OPS
            or len(steps) > _MAX_DEPTH
            or not all(isinstance(each, int) or is_plain_name(each) for each in steps)
        ):
            return None
        if name in self._excluded:
            return None
        inner = self._names.path(steps[1:])
        inner = f".{inner}" if inner and not inner.startswith("[") else inner
        translated = self._plain_comparison(f"{_FIELD}{inner}", op, value)
        return None if translated is None else self._in_its_place(name, translated)

    def _in_its_place(self, name: str, translated: Translation) -> Translation:
        """A comparison of `_FIELD` as one of the field where an item has it."""
        expression, is_exact = translated
        attribute = self._names.name(name)
        if name in (VERSION, self._mapping.key):
            return Translation(expression.replace(_FIELD, attribute), is_exact)
        document = self._names.path((DOC, name))
        if name == CREATED_AT:
            document = self._names.name(CREATED_SUBSTITUTE)
        in_document = expression.replace(_FIELD, document)
        if name == DOC or not is_field_name(name):
            return Translation(in_document, is_exact)
        as_attribute = expression.replace(_FIELD, attribute)
        return Translation(
            f"({in_document} OR (attribute_not_exists({document}) AND {as_attribute}))", is_exact
        )

    def _one_of(
        self, values: Value, equal: Callable[[Value], Translation | None]
    ) -> Translation | None:
        choices = cast("list[Value]", values)
        if not 0 < len(choices) <= _MAX_CHOICES:
            return None
        self._comparisons += len(choices)
        return _any_of([equal(each) for each in choices])

    def _plain_comparison(self, path: str, op: str, value: Value) -> Translation | None:
        if op == "eq":
            return self._equal(path, value)
        if op == "in":
            return self._one_of(value, lambda each: self._equal(path, each))
        if op == "exists":
            sentinel = self._names.value(MISSING_SENTINEL)
            present = f"(attribute_exists({path}) AND NOT {path} = {sentinel})"
            return Translation(present, is_exact=True)
        if op == "between":
            low, high = cast("list[Value]", value)
            return _all_of([self._range(path, "gte", low), self._range(path, "lte", high)])
        if op not in ("contains", "begins_with"):
            return self._range(path, op, value)
        if not isinstance(value, str) or not value:
            return None
        if op == "begins_with":
            return Translation(self._begins_with(path, value), is_exact=True)
        # The substitute encoding of a float is a set, in which `contains` searches, too.
        return Translation(f"contains({path}, {self._names.value({'S': value})})", is_exact=False)

    def _begins_with(self, path: str, prefix: str) -> str:
        """A prefix match as a range, which, unlike a function, accepts values of all types."""
        expression = f"{path} >= {self._names.value({'S': prefix})}"
        end = _end_of_prefix(prefix)
        return (
            expression
            if not end
            else f"({expression} AND {path} < {self._names.value({'S': end})})"
        )

    def _equal(self, path: str, value: Value) -> Translation | None:
        if value is None:
            kind = self._names.value({"S": "NULL"})
            return Translation(f"attribute_type({path}, {kind})", is_exact=True)
        if isinstance(value, bool | str):
            attribute: Attribute = {"S" if isinstance(value, str) else "BOOL": value}
            return Translation(f"{path} = {self._names.value(attribute)}", is_exact=True)
        if isinstance(value, int | float):
            encodings = _encodings_of_number(value)
            comparisons = [f"{path} = {self._names.value(each)}" for each in encodings]
            self._comparisons += len(comparisons)
            return Translation(f"({' OR '.join(comparisons)})", is_exact=True)
        return None

    def _range(self, path: str, op: str, value: Value) -> Translation | None:
        if isinstance(value, str):
            # An expression cannot test whether a text is a timestamp.
            return Translation(
                f"{path} {_RANGE_OPERATORS[op]} {self._names.value({'S': value})}",
                is_exact=op != "timestamp_lte",
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if type(value) is float and not is_native(value) and not INT_MIN <= value <= INT_MAX:
            return None
        number = {"N": repr(value) if is_float_key(value) else str(int(value))}
        substitute = self._names.value({"S": "SS"})
        comparison = f"{path} {_RANGE_OPERATORS[op]} {self._names.value(number)}"
        self._comparisons += 2
        return Translation(
            f"({comparison} OR attribute_type({path}, {substitute}))", is_exact=False
        )


def _joined(word: str, parts: Sequence[Translation]) -> str:
    if len(parts) == 1:
        return parts[0].expression
    return f"({word.join(each.expression for each in parts)})"


def _all_of(parts: Sequence[Translation | None]) -> Translation | None:
    """The conjunction of the parts that are translated; None if there are none."""
    translated = [each for each in parts if each is not None]
    if not translated:
        return None
    is_exact = len(translated) == len(parts) and all(each.is_exact for each in translated)
    return Translation(_joined(" AND ", translated), is_exact)


def _any_of(parts: Sequence[Translation | None]) -> Translation | None:
    """The disjunction of the parts; None if one of them is not translated."""
    translated = [each for each in parts if each is not None]
    if not translated or len(translated) != len(parts):
        return None
    return Translation(_joined(" OR ", translated), all(each.is_exact for each in translated))


def _negated(translated: Translation | None) -> Translation | None:
    if translated is None or not translated.is_exact:
        return None
    return Translation(f"(NOT {translated.expression})", is_exact=True)


def _end_of_prefix(prefix: str) -> str:
    """The smallest string that is greater than all strings with this prefix; "" if there is none."""
    kept = prefix.rstrip("\U0010ffff")
    if not kept:
        return ""
    code = ord(kept[-1]) + 1
    # Strings with surrogates are not valid; skip this range.
    return kept[:-1] + chr(0xE000 if 0xD800 <= code <= 0xDFFF else code)


def is_float_key(value: float) -> bool:
    return type(value) is float and is_native(value)


def _encodings_of_number(value: float) -> list[Attribute]:
    """All encodings of numbers that are equal to this one."""
    if is_float_key(value):
        return [{"N": repr(value)}]
    encodings: list[Attribute] = []
    if value == int(value) and INT_MIN <= value <= INT_MAX:
        encodings.append({"N": str(int(value))})
    try:
        as_float = float(value)
    except OverflowError:
        return encodings
    if as_float == value:
        encodings.append({"SS": [repr(as_float)]})
        if value == 0:
            encodings = [{"N": "0"}, {"SS": ["0.0"]}, {"SS": ["-0.0"]}]
    return encodings
