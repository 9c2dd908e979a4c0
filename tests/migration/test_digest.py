"""The digest of a collection depends on types, but not on order."""

from __future__ import annotations

import random

from hypothesis import given

from hf_async_store.migration.digest import Digest
from hf_async_store.testing.hypothesis_strategies import values
from hf_async_store.values import canonical


def digest_of(*entities: dict[str, object]) -> str:
    digest = Digest()
    for each in entities:
        digest.add(canonical(each))  # type: ignore[arg-type]  # portable, as drawn
    return str(digest)


def test_similar_values_have_different_digests() -> None:
    alike = [1, 1.0, True, "1", -1, 0, 0.0, False, None, "", [], {}, [1], [1.0], {"a": 1}]
    assert len({digest_of({"x": each}) for each in alike}) == len(alike)
    assert digest_of({"x": -0.0}) == digest_of({"x": 0.0})
    assert digest_of({"x": 1}) != digest_of({"y": 1}) != digest_of({"x": 1, "y": None})


@given(values)
def test_the_order_of_keys_does_not_affect_the_digest(value: object) -> None:
    turned = {"b": _turned(value), "a": 1}
    assert digest_of({"a": 1, "b": value}) == digest_of(turned)


def _turned(value: object) -> object:
    if isinstance(value, dict):
        return {name: _turned(value[name]) for name in reversed(value)}
    return [_turned(each) for each in value] if isinstance(value, list) else value


def test_the_number_but_not_the_order_of_entities_affects_the_digest() -> None:
    entities: list[dict[str, object]] = [{"id": n, "x": n % 3} for n in range(50)]
    shuffled = random.Random(7).sample(entities, len(entities))
    assert digest_of(*entities) == digest_of(*shuffled)
    assert digest_of(*entities) != digest_of(*entities, entities[0])
    # With an exclusive or, two equal digests would cancel out.
    assert digest_of(*entities) != digest_of(*entities, entities[0], entities[0])
    assert digest_of() != digest_of(*entities)


def test_a_digest_can_be_continued() -> None:
    entities: list[dict[str, object]] = [{"id": n} for n in range(10)]
    first = Digest()
    for each in entities[:4]:
        first.add(canonical(each))  # type: ignore[arg-type]  # portable
    second = Digest(str(first), first.count)
    for each in entities[4:]:
        second.add(canonical(each))  # type: ignore[arg-type]  # portable
    assert str(second) == digest_of(*entities)
    assert second.count == 10
