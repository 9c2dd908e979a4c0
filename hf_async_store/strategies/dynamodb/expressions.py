"""Filters in DynamoDB's language, as far as it can say them.

What is sent must hold for every row that matches; it may hold for others, too, because every row
that comes is looked at again here. `is_exact` tells where it says the whole filter.

It is not translated where the two disagree: a number in a list, a list or map as a whole, an index's key
(its attribute may be a stand-in), more than a request takes.
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

# Source: DynamoDB service quotas, "Expression parameters": 4 KB of text, 300 operators, 2 MB of
# values; and nothing is won by a filter that is longer than the rows it keeps away.
_MAX_TEXT: Final = 3_500
_MAX_OPERATORS: Final = 200
_MAX_VALUES: Final = 64_000
_MAX_CHOICES: Final = 40
_MAX_DEPTH: Final = 30

_PLACEHOLDER: Final = re.compile(r"[#:][nv]\d+")
_RANGE: Final = {"lt": "<", "lte": "<=", "gt": ">", "gte": ">="}


class _TooMuch(Exception):  # noqa: N818  # it is no error: what is left unsaid is looked at here
    """More than a request takes."""


class Translation(NamedTuple):
    """A part of a filter in DynamoDB's language; exact where it says neither more nor less."""

    text: str
    is_exact: bool


class Names:
    """The placeholders of one request."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.values: dict[str, Attribute] = {}
        self._by_name: dict[str, str] = {}

    def copy(self) -> Names:
        """Another with the same so far."""
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
        """The part of a request with these expressions: they, and the placeholders in them."""
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
    """Says filters on the items of a collection.

    Args:
        hidden: attributes that a filter of this request may not name: the keys of what is queried.
    """

    def __init__(self, form: ItemMapping, names: Names, hidden: frozenset[str]) -> None:
        self._form = form
        self._names = names
        self._hidden = hidden
        self._operators = 0
        self._text = 0
        self._size = 0

    def translate(self, where: Filter) -> Translation | None:
        """The filter, or what of it can be translated; None if nothing can.

        What is translated costs time and space in its length: it ends where a request takes no more.
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
        """A part that must hold, if there is room for it beside those before it."""
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
                return None  # it holds no map or list, so nothing can be there
            return self._on_indexed(where, field)
        if name == VERSION or name in self._form.plain:
            return self._on(where, self._names.path(steps))
        return self._on(where, self._names.path((DOC, *steps)))

    # -- on what is stored as it is ----------------------------------------------------------

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
            # A side form is a set, and sets are looked into as well.
            return Translation(
                f"contains({path}, {self._names.value({'S': value})})", is_exact=False
            )
        return self._ranged(path, op, value)

    def _begins(self, path: str, prefix: str) -> str:
        """That a text begins so, as a range: no function has to meet values that are no text."""
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

    # -- on the key of an index --------------------------------------------------------------

    def _on_indexed(self, where: Comparison, field: IndexedField) -> Translation | None:
        """On its attribute, which may be a stand-in, and its side form."""
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
    """The first text behind all that begin so; "" if there is none."""
    kept = prefix.rstrip("\U0010ffff")
    if not kept:
        return ""
    code = ord(kept[-1]) + 1
    # There are no texts with surrogates.
    return kept[:-1] + chr(0xE000 if 0xD800 <= code <= 0xDFFF else code)


def is_float_key(value: float) -> bool:
    return type(value) is float and is_native(value)


def _forms_of_number(value: float) -> list[Attribute]:
    """Every form in which a number that is equal to this one may be stored."""
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
