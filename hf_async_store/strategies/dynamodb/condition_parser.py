"""Parser of conditions that callers write in DynamoDB's expression language.

Names in an expression are fields of the entity, even if they are reserved words of DynamoDB (such as
`status` and `size`), and wherever the field is stored in the item. `tags.owner[0]` refers to a nested
value. A name that is not an identifier is written in double quotes. A value is written as `:name` and
passed separately.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from hf_async_store.errors import InvalidQueryError
from hf_async_store.schema import Index
from hf_async_store.strategies.dynamodb.codec import Attribute, encode, is_plain_name
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.items import DOC, ItemMapping
from hf_async_store.strategies.dynamodb.tables import attribute_of
from hf_async_store.values import VERSION, Value, normalise

_TOKEN: Final = re.compile(
    r"\s*(?:(?P<value>:\w+)|(?P<quoted>\"(?:[^\"]|\"\")+\")|(?P<word>[^\W\d]\w*)"
    r"|(?P<number>\d+)|(?P<sign><=|>=|<>|[=<>().,\[\]]))"
)
_WORDS: Final = frozenset({"AND", "OR", "NOT", "BETWEEN", "IN"})
_FUNCTIONS: Final = frozenset(
    {
        "attribute_exists",
        "attribute_not_exists",
        "attribute_type",
        "begins_with",
        "contains",
        "size",
    }
)
# Source: DynamoDB service quotas, "Expression parameters".
_MAX_TEXT: Final = 4096
_COMPARED: Final = frozenset({"=", "<", "<=", ">", ">="})


class _Part(NamedTuple):
    kind: str
    text: str


def _parts(text: object, what: str) -> list[_Part]:
    if not isinstance(text, str) or not text.strip():
        raise InvalidQueryError(
            f"{what} must be a non-empty string in DynamoDB's expression language"
        )
    if len(text) > _MAX_TEXT:
        raise InvalidQueryError(f"{what} is longer than DynamoDB's limit of 4 KB")
    parts: list[_Part] = []
    place = 0
    end = len(text.rstrip())
    while place < end:
        found = _TOKEN.match(text, place)
        if found is None:
            raise InvalidQueryError(f"{what}: syntax error at character {place + 1}")
        kind = str(found.lastgroup)
        inner = found[kind]
        if kind == "quoted":
            kind, inner = "name", inner[1:-1].replace('""', '"')
            if not is_plain_name(inner) or "\0" in inner:
                raise InvalidQueryError(f"{what}: {inner[:50]!r} is not a valid field name")
        parts.append(_Part(kind, inner))
        place = found.end()
    return parts


def _given(values: Mapping[str, object] | None, what: str) -> dict[str, Value]:
    if values is not None and not isinstance(values, Mapping):
        raise InvalidQueryError(f"{what}: expression_values must be a mapping")
    given: dict[str, Value] = {}
    for name, value in (values or {}).items():
        if not isinstance(name, str):
            raise InvalidQueryError(f"{what}: the keys of expression_values must be strings")
        given[name if name.startswith(":") else f":{name}"] = normalise(value, (name,))
    return given


class _Values:
    """The values of an expression, each of which must be used."""

    def __init__(self, values: Mapping[str, object] | None, what: str) -> None:
        self._what = what
        self._values = _given(values, what)
        self._left = set(self._values)

    def pop(self, name: str) -> Value:
        if name not in self._values:
            raise InvalidQueryError(f"{self._what}: expression_values has no value for {name}")
        self._left.discard(name)
        return self._values[name]

    def assert_exhausted(self) -> None:
        if self._left:
            raise InvalidQueryError(
                f"{self._what} does not use these values: {', '.join(sorted(self._left))}"
            )


# -- conditions -----------------------------------------------------------------------------


def condition(
    text: object, values: Mapping[str, object] | None, mapping: ItemMapping, names: Names
) -> str:
    """Translate a condition to a ConditionExpression with placeholders from `names`.

    Raises:
        InvalidQueryError: the condition or its values are invalid.
    """
    what = "condition_expression"
    parts = _parts(text, what)
    given = _Values(values, what)
    written: list[str] = []
    place = 0
    while place < len(parts):
        part = parts[place]
        following = parts[place + 1].text if place + 1 < len(parts) else ""
        place += 1
        if part.kind == "value":
            written.append(names.value(_operand(given.pop(part.text))))
        elif part.kind in ("sign", "number"):
            written.append(part.text)
        elif part.kind == "word" and part.text.upper() in _WORDS:
            written.append(part.text.upper())
        elif part.kind == "word" and following == "(":
            if part.text not in _FUNCTIONS:
                raise InvalidQueryError(f"{what}: unknown function {part.text}")
            written.append(part.text)
        else:
            steps: list[str | int] = [part.text]
            place = _steps(parts, place, steps)
            if steps[0] != VERSION and steps[0] not in mapping.collection.fields:
                steps.insert(0, DOC)
            written.append(names.path(steps))
    given.assert_exhausted()
    return " ".join(written)


def _steps(parts: list[_Part], place: int, steps: list[str | int]) -> int:
    """Append the rest of a path to `steps`; return the position after it."""
    while place + 1 < len(parts):
        sign, step = parts[place].text, parts[place + 1]
        if parts[place].kind != "sign":
            break
        if sign == "." and step.kind in ("word", "name"):
            steps.append(step.text)
            place += 2
        elif (
            sign == "["
            and step.kind == "number"
            and parts[place + 2 : place + 3] == [_Part("sign", "]")]
        ):
            steps.append(int(step.text))
            place += 3
        else:
            break
    return place


def _operand(value: Value) -> Attribute:
    # Integral floats are compared as numbers, too.
    if type(value) in (int, float):
        return {"N": repr(value)}
    return encode(value)


# -- key conditions -------------------------------------------------------------------------


def key_condition(
    text: object,
    values: Mapping[str, object] | None,
    mapping: ItemMapping,
    index: Index,
    names: Names,
) -> str:
    """Translate a condition on the key of an index to a KeyConditionExpression.

    It consists of `field = :value` and at most one comparison of the sort field.

    Raises:
        InvalidQueryError: the condition or its values are invalid.
    """
    what = "key_condition"
    given = _Values(values, what)
    written: list[str] = []
    parts = _parts(text, what)
    fields: list[str] = []
    while not written or parts:
        if written:
            _expect(parts, "AND", what)
        written.append(_term(parts, given, mapping, index, names, what, fields))
    given.assert_exhausted()
    if index.field not in fields or len(fields) != len({*fields}):
        raise InvalidQueryError(
            f"{what}: must contain {index.field} = :value, and each field at most once"
        )
    return " AND ".join(written)


def _term(
    parts: list[_Part],
    given: _Values,
    mapping: ItemMapping,
    index: Index,
    names: Names,
    what: str,
    fields: list[str],
) -> str:
    """Remove the next comparison from `parts`, translate it, and append its field to `fields`."""

    def attribute() -> str:
        part = _next(parts, what)
        if part.kind not in ("word", "name") or part.text not in (index.field, index.sort):
            known = " and ".join(filter(None, (index.field, index.sort)))
            raise InvalidQueryError(
                f"{what}: {part.text} is not a field of the index {index.name}; its fields are: "
                f"{known}"
            )
        fields.append(part.text)
        return names.name(attribute_of(mapping, part.text))

    def value() -> str:
        part = _next(parts, what)
        if part.kind != "value":
            raise InvalidQueryError(
                f"{what}: a field must be compared with a :value, not with {part.text}"
            )
        operand = given.pop(part.text)
        indexed = mapping.indexed.get(fields[-1])
        key = encode(operand) if indexed is None else indexed.key_of(operand)
        if key is None:
            raise InvalidQueryError(
                f"{what}: the index {index.name} cannot contain the value of {part.text}"
            )
        return names.value(key)

    if parts and parts[0] == _Part("word", "begins_with") and parts[1:2] == [_Part("sign", "(")]:
        del parts[:2]
        name = attribute()
        _expect(parts, ",", what)
        start = value()
        _expect(parts, ")", what)
        text = f"begins_with({name}, {start})"
        sign = "begins_with"
    else:
        name = attribute()
        sign = _next(parts, what).text
        if sign.upper() == "BETWEEN":
            low = value()
            _expect(parts, "AND", what)
            text = f"{name} BETWEEN {low} AND {value()}"
        elif sign in _COMPARED:
            text = f"{name} {sign} {value()}"
        else:
            raise InvalidQueryError(f"{what}: a key cannot be compared with {sign}")
    if fields[-1] == index.field and sign != "=":
        raise InvalidQueryError(f"{what}: {index.field} can only be compared with =")
    return text


def _next(parts: list[_Part], what: str) -> _Part:
    if not parts:
        raise InvalidQueryError(f"{what}: the expression is incomplete")
    return parts.pop(0)


def _expect(parts: list[_Part], text: str, what: str) -> None:
    if _next(parts, what).text.upper() != text:
        raise InvalidQueryError(f"{what}: expected {text}")
