"""Contract cases that engines of this package do not fulfil yet."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Final

import pytest

from hf_async_store.testing.changed_declarations import TYPES
from hf_async_store.testing.contract import StrategyContract

if TYPE_CHECKING:
    from hf_async_store import StorageStrategy
    from hf_async_store.testing.harness import Harness
    from hf_async_store.values import FieldType

_COLUMNS: Final = pytest.mark.xfail(
    strict=True, reason="a declared field has a column, and queries look at the column alone"
)


class OneColumnForAField(StrategyContract):
    """An engine that stores declared fields in columns, whatever declaration wrote an entity."""

    @_COLUMNS
    @pytest.mark.parametrize("field_type", TYPES)
    async def test_92_a_field_declared_later_answers_as_if_always_declared(
        self, harness: Harness, field_type: FieldType
    ) -> None:
        await super().test_92_a_field_declared_later_answers_as_if_always_declared(
            harness, field_type
        )

    @_COLUMNS
    @pytest.mark.parametrize("field_type", TYPES)
    async def test_93_a_field_no_longer_declared_stays_and_is_found(
        self, harness: Harness, field_type: FieldType
    ) -> None:
        await super().test_93_a_field_no_longer_declared_stays_and_is_found(harness, field_type)

    @_COLUMNS
    @pytest.mark.parametrize(("before", "after"), list(permutations(TYPES, 2)))
    async def test_94_values_of_an_earlier_type_stay_and_compare_as_their_own(
        self, harness: Harness, before: FieldType, after: FieldType
    ) -> None:
        await super().test_94_values_of_an_earlier_type_stay_and_compare_as_their_own(
            harness, before, after
        )

    @_COLUMNS
    @pytest.mark.parametrize("field_type", TYPES)
    async def test_95_two_declarations_at_once(
        self, harness: Harness, field_type: FieldType
    ) -> None:
        await super().test_95_two_declarations_at_once(harness, field_type)


class OneStatementForAll(OneColumnForAField):
    """An engine that writes all queued changes in one statement, which waits for the locks of all rows."""

    @pytest.mark.xfail(strict=True, reason="a locked row blocks the whole statement")
    async def test_135_a_blocked_change_does_not_delay_its_neighbours(
        self, harness: Harness, store: StorageStrategy
    ) -> None:
        await super().test_135_a_blocked_change_does_not_delay_its_neighbours(harness, store)
