"""What callers write in DynamoDB's own expression language, on fields as they know them.

Names are fields, whatever words DynamoDB reserves and wherever a field lies in the item: `status`,
`doc` and `size` work as they stand, `tags.owner[0]` steps into a value, and a name that is no word
stands in double quotes. Values are `:name`, given beside.
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
        raise InvalidQueryError(f"{what} is a string in DynamoDB's expression language")
    if len(text) > _MAX_TEXT:
        raise InvalidQueryError(f"{what} is longer than the 4 KB that DynamoDB takes")
    parts: list[_Part] = []
    place = 0
    end = len(text.rstrip())
    while place < end:
        found = _TOKEN.match(text, place)
        if found is None:
            raise InvalidQueryError(f"{what}: cannot be read from character {place + 1} on")
        kind = str(found.lastgroup)
        inner = found[kind]
        if kind == "quoted":
            kind, inner = "name", inner[1:-1].replace('""', '"')
            if not is_plain_name(inner) or "\0" in inner:
                raise InvalidQueryError(f"{what}: no field has the name {inner[:50]!r}")
        parts.append(_Part(kind, inner))
        place = found.end()
    return parts


def _given(values: Mapping[str, object] | None, what: str) -> dict[str, Value]:
    if values is not None and not isinstance(values, Mapping):
        raise InvalidQueryError(f"{what}: expression_values is a map")
    given: dict[str, Value] = {}
    for name, value in (values or {}).items():
        if not isinstance(name, str):
            raise InvalidQueryError(f"{what}: the names of expression_values are strings")
        given[name if name.startswith(":") else f":{name}"] = normalise(value, (name,))
    return given


class _Values:
    """The values of an expression; each must be used."""

    def __init__(self, values: Mapping[str, object] | None, what: str) -> None:
        self._what = what
        self._values = _given(values, what)
        self._left = set(self._values)

    def pop(self, name: str) -> Value:
        if name not in self._values:
            raise InvalidQueryError(f"{self._what}: no value is given for {name}")
        self._left.discard(name)
        return self._values[name]

    def assert_exhausted(self) -> None:
        if self._left:
            raise InvalidQueryError(f"{self._what} does not use {', '.join(sorted(self._left))}")


# -- conditions -----------------------------------------------------------------------------


def condition(
    text: object, values: Mapping[str, object] | None, form: ItemMapping, names: Names
) -> str:
    """A condition expression with placeholders of `names`.

    Raises:
        InvalidQueryError.
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
                raise InvalidQueryError(f"{what}: there is no function {part.text}")
            written.append(part.text)
        else:
            steps: list[str | int] = [part.text]
            place = _steps(parts, place, steps)
            if steps[0] != VERSION and steps[0] not in form.collection.fields:
                steps.insert(0, DOC)
            written.append(names.path(steps))
    given.assert_exhausted()
    return " ".join(written)


def _steps(parts: list[_Part], place: int, steps: list[str | int]) -> int:
    """The rest of a path; returns the place behind it."""
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
    # A number is compared as a number, be it an integral float, too.
    if type(value) in (int, float):
        return {"N": repr(value)}
    return encode(value)


# -- key conditions -------------------------------------------------------------------------


def key_condition(
    text: object,
    values: Mapping[str, object] | None,
    form: ItemMapping,
    index: Index,
    names: Names,
) -> str:
    """A key condition expression on an index: `field = :value`, and at most one on its sort field.

    Raises:
        InvalidQueryError.
    """
    what = "key_condition"
    given = _Values(values, what)
    written: list[str] = []
    parts = _parts(text, what)
    fields: list[str] = []
    while not written or parts:
        if written:
            _expect(parts, "AND", what)
        written.append(_term(parts, given, form, index, names, what, fields))
    given.assert_exhausted()
    if index.field not in fields or len(fields) != len({*fields}):
        raise InvalidQueryError(
            f"{what}: it needs {index.field} = :value, and has each field once at most"
        )
    return " AND ".join(written)


def _term(
    parts: list[_Part],
    given: _Values,
    form: ItemMapping,
    index: Index,
    names: Names,
    what: str,
    fields: list[str],
) -> str:
    """The next comparison, taken from `parts`; its field is added to `fields`."""

    def attribute() -> str:
        part = _next(parts, what)
        if part.kind not in ("word", "name") or part.text not in (index.field, index.sort):
            known = " and ".join(filter(None, (index.field, index.sort)))
            raise InvalidQueryError(f"{what}: the fields of {index.name} are {known}")
        fields.append(part.text)
        return names.name(attribute_of(form, part.text))

    def value() -> str:
        part = _next(parts, what)
        if part.kind != "value":
            raise InvalidQueryError(f"{what}: a field is compared with a :value")
        operand = given.pop(part.text)
        indexed = form.indexed.get(fields[-1])
        key = encode(operand) if indexed is None else indexed.key_of(operand)
        if key is None:
            raise InvalidQueryError(f"{what}: {index.name} does not hold the value {part.text}")
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
            raise InvalidQueryError(f"{what}: a key cannot be compared by {sign}")
    if fields[-1] == index.field and sign != "=":
        raise InvalidQueryError(f"{what}: {index.field} is compared by = alone")
    return text


def _next(parts: list[_Part], what: str) -> _Part:
    if not parts:
        raise InvalidQueryError(f"{what}: it ends too early")
    return parts.pop(0)


def _expect(parts: list[_Part], text: str, what: str) -> None:
    if _next(parts, what).text.upper() != text:
        raise InvalidQueryError(f"{what}: {text} is missing")
