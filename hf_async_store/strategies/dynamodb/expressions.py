"""Translation of filters to FilterExpressions of DynamoDB, as far as these can express them.

An expression must hold for every row that matches the filter. It may also hold for other rows,
because the filter is applied again to every row received. `is_exact` is true if the expression is
equivalent to the filter.

A filter is not translated where DynamoDB's semantics differ: numbers in lists, comparisons with a
whole list or map, and the key of an index (its attribute may be a placeholder). A filter that would
exceed the limits of a request is not translated either.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from hf_async_store.query import And, Comparison, Filter, Not, Or
from hf_async_store.strategies.dynamodb.codec import is_native, is_plain_name
from hf_async_store.strategies.dynamodb.items import (
    CREATED_SIDE,
    DOC,
    SURE_SORT_BYTES,
    IndexedField,
    ItemMapping,
    shortened,
)
from hf_async_store.values import CREATED_AT, INT_MAX, INT_MIN, VERSION, Value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_async_store.strategies.dynamodb.codec import Attribute

# Source: DynamoDB service quotas, "Expression parameters": an expression of 4 KB, 300 operators, 2 MB
# of values. The limits here are lower, because a filter larger than the rows it excludes saves nothing.
_MAX_TEXT: Final = 3_500
_MAX_OPERATORS: Final = 200
_MAX_VALUES: Final = 64_000
_MAX_CHOICES: Final = 40
_MAX_DEPTH: Final = 30

_PLACEHOLDER: Final = re.compile(r"[#:][nv]\d+")
_RANGE: Final = {"lt": "<", "lte": "<=", "gt": ">", "gte": ">="}


class _TooMuch(Exception):  # noqa: N818  # not an error: the rest of the filter is applied here
    """The expression would exceed a limit."""


class Translation(NamedTuple):
    """A translated part of a filter; exact if it is equivalent to that part."""

    text: str
    is_exact: bool


class Names:
    """The placeholders for names and values in the expressions of one request."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.values: dict[str, Attribute] = {}
        self._by_name: dict[str, str] = {}

    def copy(self) -> Names:
        """A copy with the same placeholders."""
        twin = Names()
        twin.names, twin.values = dict(self.names), dict(self.values)
        twin._by_name = dict(self._by_name)
        return twin

    def name(self, name: str) -> str:
        if name not in self._by_name:
            self._by_name[name] = f"#n{len(self.names)}"
            self.names[self._by_name[name]] = name
        return self._by_name[name]

    def value(self, attribute: Attribute) -> str:
        holder = f":v{len(self.values)}"
        self.values[holder] = attribute
        return holder

    def path(self, steps: Sequence[str | int]) -> str:
        text = ""
        for step in steps:
            if isinstance(step, int):
                text += f"[{step}]"
            else:
                text += ("." if text else "") + self.name(step)
        return text

    def request(self, **texts: str) -> dict[str, Any]:
        """Request parameters with these expressions and the placeholders that they use."""
        used = set(_PLACEHOLDER.findall(" ".join(texts.values())))
        names = {holder: name for holder, name in self.names.items() if holder in used}
        values = {holder: value for holder, value in self.values.items() if holder in used}
        request: dict[str, Any] = dict(texts)
        if names:
            request["ExpressionAttributeNames"] = names
        if values:
            request["ExpressionAttributeValues"] = values
        return request


class FilterTranslator:
    """Translates filters on the items of a collection.

    Args:
        hidden: the key attributes of the queried index, which a FilterExpression must not contain.
    """

    def __init__(self, mapping: ItemMapping, names: Names, hidden: frozenset[str]) -> None:
        self._form = mapping
        self._names = names
        self._hidden = hidden
        self._operators = 0
        self._text = 0
        self._size = 0

    def translate(self, where: Filter) -> Translation | None:
        """Translate the filter, or the parts of a conjunction that can be translated.

        Returns None if nothing can. The translation stops at the limits of a request.
        """
        if not isinstance(where, And):
            return self._if_it_fits(where)
        parts = [self._if_it_fits(each) for each in where.parts]
        translated = [each for each in parts if each is not None]
        if not translated:
            return None
        whole = len(translated) == len(parts) and all(each.is_exact for each in translated)
        return Translation(_joined(" AND ", translated), whole)

    def _if_it_fits(self, where: Filter) -> Translation | None:
        """Translate a part that must hold; None if it would exceed the limits of the expression."""
        spent = self._operators, self._text, self._size
        try:
            translated = self._translate(where)
            if translated is not None:
                self._text += len(translated.text) + len(" AND ")
                self._refuse_too_much()
        except _TooMuch:
            translated = None
        if translated is None:
            self._operators, self._text, self._size = spent
        return translated

    def _translate(self, where: Filter) -> Translation | None:
        if isinstance(where, And):
            parts = [self._translate(each) for each in where.parts]
            translated = [each for each in parts if each is not None]
            if not translated:
                return None
            whole = len(translated) == len(parts) and all(each.is_exact for each in translated)
            return Translation(_joined(" AND ", translated), whole)
        if isinstance(where, Or):
            translated = []
            for each in where.parts:
                part = self._translate(each)
                if part is None:
                    return None
                translated.append(part)
            if not translated:
                return None
            return Translation(
                _joined(" OR ", translated), all(each.is_exact for each in translated)
            )
        if isinstance(where, Not):
            inner = self._translate(where.part)
            return _negated(inner)
        self._operators += 1
        if where.value is not None:
            self._size += len(str(where.value))
        self._refuse_too_much()
        return self._comparison(where)

    def _refuse_too_much(self) -> None:
        if self._operators > _MAX_OPERATORS or self._size > _MAX_VALUES or self._text > _MAX_TEXT:
            raise _TooMuch

    def _comparison(self, where: Comparison) -> Translation | None:
        steps = where.path
        name = cast("str", steps[0])
        if len(steps) > _MAX_DEPTH or not all(
            isinstance(each, int) or is_plain_name(each) for each in steps
        ):
            return None
        field = self._form.indexed.get(name)
        if name in self._hidden or (field is not None and field.attribute in self._hidden):
            return None
        if field is not None:
            if len(steps) > 1:
                return None  # the field contains no map or list, so the path matches nothing
            return self._on_indexed(where, field)
        if name == VERSION or name in self._form.plain:
            return self._on(where, self._names.path(steps))
        return self._on(where, self._names.path((DOC, *steps)))

    # -- fields that are not the key of an index ---------------------------------------------

    def _on(self, where: Comparison, path: str) -> Translation | None:
        op, value = where.op, where.value
        if op == "eq":
            return self._equal(path, value)
        if op == "ne":
            return _negated(self._equal(path, value))
        if op in ("in", "not_in"):
            translated = self._one_of(path, cast("list[Value]", value))
            return translated if op == "in" else _negated(translated)
        if op == "exists":
            return Translation(f"attribute_{'' if value else 'not_'}exists({path})", is_exact=True)
        if op == "between":
            low, high = cast("list[Value]", value)
            one, two = self._ranged(path, "gte", low), self._ranged(path, "lte", high)
            if one is None or two is None:
                half = one or two
                return None if half is None else Translation(half.text, is_exact=False)
            return Translation(f"({one.text} AND {two.text})", one.is_exact and two.is_exact)
        if op in ("contains", "begins_with"):
            if not isinstance(value, str) or not value:
                return None
            if op == "begins_with":
                return Translation(self._begins(path, value), is_exact=True)
            # The substitute encoding of a float is a set, in which `contains` searches, too.
            return Translation(
                f"contains({path}, {self._names.value({'S': value})})", is_exact=False
            )
        return self._ranged(path, op, value)

    def _begins(self, path: str, prefix: str) -> str:
        """A prefix match as a range, which, unlike a function, accepts values of all types."""
        text = f"{path} >= {self._names.value({'S': prefix})}"
        end = _after(prefix)
        return text if not end else f"({text} AND {path} < {self._names.value({'S': end})})"

    def _one_of(self, path: str, values: list[Value]) -> Translation | None:
        if not 0 < len(values) <= _MAX_CHOICES:
            return None
        self._operators += len(values)
        translated = [self._equal(path, each) for each in values]
        parts = [each for each in translated if each is not None]
        if len(parts) != len(translated):
            return None
        return Translation(_joined(" OR ", parts), all(each.is_exact for each in parts))

    def _equal(self, path: str, value: Value) -> Translation | None:
        if value is None:
            kind = self._names.value({"S": "NULL"})
            return Translation(f"attribute_type({path}, {kind})", is_exact=True)
        if isinstance(value, bool):
            return Translation(f"{path} = {self._names.value({'BOOL': value})}", is_exact=True)
        if isinstance(value, str):
            return Translation(f"{path} = {self._names.value({'S': value})}", is_exact=True)
        if isinstance(value, int | float):
            forms = _forms_of_number(value)
            tests = [f"{path} = {self._names.value(each)}" for each in forms]
            self._operators += len(tests)
            return Translation(f"({' OR '.join(tests)})", is_exact=True)
        return None

    def _ranged(self, path: str, op: str, value: Value) -> Translation | None:
        if isinstance(value, str):
            return Translation(
                f"{path} {_RANGE[op]} {self._names.value({'S': value})}", is_exact=True
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if type(value) is float and not is_native(value) and not INT_MIN <= value <= INT_MAX:
            return None
        number = {"N": repr(value) if is_float_key(value) else str(int(value))}
        side = self._names.value({"S": "SS"})
        test = f"{path} {_RANGE[op]} {self._names.value(number)}"
        self._operators += 2
        return Translation(f"({test} OR attribute_type({path}, {side}))", is_exact=False)

    # -- fields that are the key of an index -------------------------------------------------

    def _on_indexed(self, where: Comparison, field: IndexedField) -> Translation | None:
        """Compare the attribute, which may be a placeholder, and the substitute encoding."""
        if field.type == "boolean":
            return self._on(where, self._names.name(field.name))
        if where.op == "eq":
            return self._equal_indexed(field, where.value)
        if where.op == "ne":
            return _negated(self._equal_indexed(field, where.value))
        if where.op in ("in", "not_in"):
            values = cast("list[Value]", where.value)
            if not 0 < len(values) <= _MAX_CHOICES:
                return None
            self._operators += len(values)
            parts = [self._equal_indexed(field, each) for each in values]
            translated = [each for each in parts if each is not None]
            if len(translated) != len(parts):
                return None
            whole = Translation(
                _joined(" OR ", translated), all(each.is_exact for each in translated)
            )
            return whole if where.op == "in" else _negated(whole)
        if where.op == "begins_with" and isinstance(where.value, str) and where.value:
            start = shortened(where.value, SURE_SORT_BYTES)
            tests = [
                self._begins(each, start)
                for each in (self._names.name(field.name), self._side(field))
            ]
            return Translation(f"({' OR '.join(tests)})", is_exact=False)
        return None

    def _equal_indexed(self, field: IndexedField, value: Value) -> Translation | None:
        side = self._side(field)
        if value is None:
            kind = self._names.value({"S": "NULL"})
            return Translation(f"attribute_type({side}, {kind})", is_exact=True)
        key = field.key_of(value)
        if key is not None:
            exact = not field.is_sort or (
                isinstance(value, str)
                and len(value.encode()) < SURE_SORT_BYTES
                and value > "\x01"
                and field.type == "text"
            )
            return Translation(f"{self._names.name(field.name)} = {self._names.value(key)}", exact)
        if isinstance(value, str) and field.type == "text":
            return Translation(f"{side} = {self._names.value({'S': value})}", is_exact=True)
        return None

    def _side(self, field: IndexedField) -> str:
        if field.name == CREATED_AT:
            return self._names.name(CREATED_SIDE)
        return self._names.path((DOC, field.name))


def _joined(word: str, parts: Sequence[Translation]) -> str:
    if len(parts) == 1:
        return parts[0].text
    return f"({word.join(each.text for each in parts)})"


def _negated(translated: Translation | None) -> Translation | None:
    if translated is None or not translated.is_exact:
        return None
    return Translation(f"(NOT {translated.text})", is_exact=True)


def _after(prefix: str) -> str:
    """The smallest string that is greater than all strings with this prefix; "" if there is none."""
    kept = prefix.rstrip("\U0010ffff")
    if not kept:
        return ""
    code = ord(kept[-1]) + 1
    # Strings with surrogates are not valid; skip this range.
    return kept[:-1] + chr(0xE000 if 0xD800 <= code <= 0xDFFF else code)


def is_float_key(value: float) -> bool:
    return type(value) is float and is_native(value)


def _forms_of_number(value: float) -> list[Attribute]:
    """All encodings of numbers that are equal to this one."""
    if is_float_key(value):
        return [{"N": repr(value)}]
    forms: list[Attribute] = []
    if value == int(value) and INT_MIN <= value <= INT_MAX:
        forms.append({"N": str(int(value))})
    try:
        as_float = float(value)
    except OverflowError:
        return forms
    if as_float == value:
        forms.append({"SS": [repr(as_float)]})
        if value == 0:
            forms = [{"N": "0"}, {"SS": ["0.0"]}, {"SS": ["-0.0"]}]
    return forms
