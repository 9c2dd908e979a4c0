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
from hf_async_store.strategies.dynamodb.codec import Attribute, encode, is_plain_name
from hf_async_store.strategies.dynamodb.expressions import Names
from hf_async_store.strategies.dynamodb.index_keys import IndexShape
from hf_async_store.strategies.dynamodb.items import DOC, ItemMapping
from hf_async_store.values import VERSION, Value, normalise

_TOKEN_PATTERN: Final = re.compile(
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
_MAX_LENGTH: Final = 4096
_COMPARED: Final = frozenset({"=", "<", "<=", ">", ">="})


class _Token(NamedTuple):
    kind: str
    text: str


def _tokenize(expression: object, argument: str) -> list[_Token]:
    if not isinstance(expression, str) or not expression.strip():
        raise InvalidQueryError(
            f"{argument} must be a non-empty string in DynamoDB's expression language"
        )
    if len(expression) > _MAX_LENGTH:
        raise InvalidQueryError(f"{argument} is longer than DynamoDB's limit of 4 KB")
    tokens: list[_Token] = []
    position = 0
    end = len(expression.rstrip())
    while position < end:
        match = _TOKEN_PATTERN.match(expression, position)
        if match is None:
            raise InvalidQueryError(f"{argument}: syntax error at character {position + 1}")
        kind = str(match.lastgroup)
        token_text = match[kind]
        if kind == "quoted":
            kind, token_text = "name", token_text[1:-1].replace('""', '"')
            if not is_plain_name(token_text) or "\0" in token_text:
                raise InvalidQueryError(
                    f"{argument}: {token_text[:50]!r} is not a valid field name"
                )
        tokens.append(_Token(kind, token_text))
        position = match.end()
    return tokens


def _normalised(values: Mapping[str, object] | None, argument: str) -> dict[str, Value]:
    if values is not None and not isinstance(values, Mapping):
        raise InvalidQueryError(f"{argument}: expression_values must be a mapping")
    operands: dict[str, Value] = {}
    for name, value in (values or {}).items():
        if not isinstance(name, str):
            raise InvalidQueryError(f"{argument}: the keys of expression_values must be strings")
        operands[name if name.startswith(":") else f":{name}"] = normalise(value, (name,))
    return operands


class _Values:
    """The values of an expression, each of which must be used."""

    def __init__(self, values: Mapping[str, object] | None, argument: str) -> None:
        self._argument = argument
        self._values = _normalised(values, argument)
        self._unused = set(self._values)

    def pop(self, name: str) -> Value:
        if name not in self._values:
            raise InvalidQueryError(f"{self._argument}: expression_values has no value for {name}")
        self._unused.discard(name)
        return self._values[name]

    def assert_exhausted(self) -> None:
        if self._unused:
            raise InvalidQueryError(
                f"{self._argument} does not use these values: {', '.join(sorted(self._unused))}"
            )


# -- conditions -----------------------------------------------------------------------------


def condition(
    expression: object, values: Mapping[str, object] | None, mapping: ItemMapping, names: Names
) -> str:
    """Translate a condition to a ConditionExpression with placeholders from `names`.

    Raises:
        InvalidQueryError: the condition or its values are invalid.
    """
    argument = "condition_expression"
    tokens = _tokenize(expression, argument)
    operands = _Values(values, argument)
    output: list[str] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        next_text = tokens[position + 1].text if position + 1 < len(tokens) else ""
        position += 1
        if token.kind == "value":
            output.append(names.value(_operand(operands.pop(token.text))))
        elif token.kind in ("sign", "number"):
            output.append(token.text)
        elif token.kind == "word" and token.text.upper() in _WORDS:
            output.append(token.text.upper())
        elif token.kind == "word" and next_text == "(":
            if token.text not in _FUNCTIONS:
                raise InvalidQueryError(f"{argument}: unknown function {token.text}")
            output.append(token.text)
        else:
            steps: list[str | int] = [token.text]
            position = _parse_steps(tokens, position, steps)
            if steps[0] != VERSION and not mapping.is_attribute(token.text):
                steps.insert(0, DOC)
            output.append(names.path(steps))
    operands.assert_exhausted()
    return " ".join(output)


def _parse_steps(tokens: list[_Token], position: int, steps: list[str | int]) -> int:
    """Append the rest of a path to `steps`; return the position after it."""
    while position + 1 < len(tokens):
        operator, step = tokens[position].text, tokens[position + 1]
        if tokens[position].kind != "sign":
            break
        if operator == "." and step.kind in ("word", "name"):
            steps.append(step.text)
            position += 2
        elif (
            operator == "["
            and step.kind == "number"
            and tokens[position + 2 : position + 3] == [_Token("sign", "]")]
        ):
            steps.append(int(step.text))
            position += 3
        else:
            break
    return position


def _operand(value: Value) -> Attribute:
    # Integral floats are compared as numbers, too.
    if type(value) in (int, float):
        return {"N": repr(value)}
    return encode(value)


# -- key conditions -------------------------------------------------------------------------


def key_condition(
    expression: object,
    values: Mapping[str, object] | None,
    mapping: ItemMapping,
    shape: IndexShape,
    names: Names,
) -> str:
    """Translate a condition on the key of an index to a KeyConditionExpression.

    It consists of `field = :value` and at most one comparison of the sort field. An index on one
    timestamp, integer or number field has that field as its sort field.

    Raises:
        InvalidQueryError: the condition or its values are invalid.
    """
    argument = "key_condition"
    operands = _Values(values, argument)
    output: list[str] = []
    tokens = _tokenize(expression, argument)
    fields: list[str] = []
    while not output or tokens:
        if output:
            _expect(tokens, "AND", argument)
        output.append(_parse_comparison(tokens, operands, mapping, shape, names, argument, fields))
    operands.assert_exhausted()
    if shape.index.field not in fields or len(fields) != len({*fields}):
        raise InvalidQueryError(
            f"{argument}: must contain {shape.index.field} = :value, and each field at most once"
        )
    return " AND ".join(output)


def _parse_comparison(
    tokens: list[_Token],
    operands: _Values,
    mapping: ItemMapping,
    shape: IndexShape,
    names: Names,
    argument: str,
    fields: list[str],
) -> str:
    """Remove the next comparison from `tokens`, translate it, and append its field to `fields`."""

    index, known = shape.index, _compared_fields(shape)

    def attribute() -> str:
        token = _pop_token(tokens, argument)
        if token.kind not in ("word", "name") or token.text not in known:
            raise InvalidQueryError(
                f"{argument}: only these fields of the index {index.name} can be compared: "
                f"{' and '.join(known)}"
            )
        fields.append(token.text)
        return names.name(known[token.text])

    def value() -> str:
        token = _pop_token(tokens, argument)
        if token.kind != "value":
            raise InvalidQueryError(f"{argument}: a field must be compared with a :value")
        operand = operands.pop(token.text)
        indexed = mapping.indexed.get(fields[-1])
        key = encode(operand) if indexed is None else indexed.key_of(operand)
        if key is None:
            raise InvalidQueryError(
                f"{argument}: the index {index.name} cannot find the value of {token.text}. It finds "
                "values of the declared type of the field, except null, empty strings, strings that "
                "are too long for a key, and numbers that a key cannot represent exactly; "
                "query_entities finds these, too"
            )
        return names.value(key)

    if (
        tokens
        and tokens[0] == _Token("word", "begins_with")
        and tokens[1:2] == [_Token("sign", "(")]
    ):
        del tokens[:2]
        name = attribute()
        _expect(tokens, ",", argument)
        prefix = value()
        _expect(tokens, ")", argument)
        comparison = f"begins_with({name}, {prefix})"
        operator = "begins_with"
    else:
        name = attribute()
        operator = _pop_token(tokens, argument).text
        if operator.upper() == "BETWEEN":
            low = value()
            _expect(tokens, "AND", argument)
            comparison = f"{name} BETWEEN {low} AND {value()}"
        elif operator in _COMPARED:
            comparison = f"{name} {operator} {value()}"
        else:
            raise InvalidQueryError(f"{argument}: a key cannot be compared with {operator}")
    if fields[-1] == index.field and operator != "=" and not shape.is_spread:
        raise InvalidQueryError(f"{argument}: {index.field} can only be compared with =")
    return comparison


def _compared_fields(shape: IndexShape) -> dict[str, str]:
    """The fields that a condition can compare, with their key attributes."""
    known = {} if shape.is_spread else {shape.index.field: shape.partition.name}
    if shape.sort is not None and not shape.is_composite:
        known[shape.sort_fields[0]] = shape.sort.name
    return known


def _pop_token(tokens: list[_Token], argument: str) -> _Token:
    if not tokens:
        raise InvalidQueryError(f"{argument}: the expression is incomplete")
    return tokens.pop(0)


def _expect(tokens: list[_Token], expected: str, argument: str) -> None:
    if _pop_token(tokens, argument).text.upper() != expected:
        raise InvalidQueryError(f"{argument}: expected {expected}")
