"""The contract suite: subclass `StrategyContract`, define the fixture `harness`, and run pytest.

    class TestMyEngine(StrategyContract):
        @pytest.fixture
        def harness(self, tmp_path: Path) -> Harness:
            return MyHarness(tmp_path)

The names of the tests contain the numbers of the cases in the contract. The suite depends on an
engine's declared capabilities, never on its name; a feature that is declared absent must be absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from hf_async_store.testing.assertions import no_complaints, nothing_is_left
from hf_async_store.testing.bulk import BulkContract
from hf_async_store.testing.cancellation import CancellationContract
from hf_async_store.testing.changed_declarations import ChangedDeclarationContract
from hf_async_store.testing.claims import ClaimContract
from hf_async_store.testing.clearing import ClearingContract
from hf_async_store.testing.declarations import DeclarationContract
from hf_async_store.testing.driver_interface import DriverContract
from hf_async_store.testing.entities import EntityContract
from hf_async_store.testing.expiry import ExpiryContract
from hf_async_store.testing.expiry_of_owners import OwnerExpiryContract
from hf_async_store.testing.feed import FeedContract
from hf_async_store.testing.field_operations import FieldOperationContract
from hf_async_store.testing.filtered_changes import FilteredChangeContract
from hf_async_store.testing.groups import GroupContract
from hf_async_store.testing.independent_changes import IndependentChangeContract
from hf_async_store.testing.isolation import IsolationContract
from hf_async_store.testing.lifecycle import LifecycleContract
from hf_async_store.testing.limits import LimitContract
from hf_async_store.testing.lost_connections import LostConnectionContract
from hf_async_store.testing.observation import ObservationContract
from hf_async_store.testing.planted_records import PlantedRecordContract
from hf_async_store.testing.queries import QueryContract
from hf_async_store.testing.read_only_transactions import ReadOnlyTransactionContract
from hf_async_store.testing.references import ReferenceContract
from hf_async_store.testing.rollout import RolloutContract
from hf_async_store.testing.shared_databases import SharedDatabaseContract
from hf_async_store.testing.streams import StreamContract
from hf_async_store.testing.subscriptions import SubscriptionContract
from hf_async_store.testing.transactions import TransactionContract
from hf_async_store.testing.transformed_entities import TransformContract
from hf_async_store.testing.type_changes import TypeChangeContract
from hf_async_store.testing.unique_indexes import UniqueIndexContract
from hf_async_store.testing.use_after_close import ClosedContract
from hf_async_store.testing.values import ValueContract
from hf_async_store.testing.versions import VersionContract
from hf_async_store.testing.waiting import WaitingContract
from hf_async_store.testing.wrong_arguments import ArgumentContract

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness


@pytest.mark.asyncio
@pytest.mark.hf_sampled
class StrategyContract(
    EntityContract,
    ValueContract,
    VersionContract,
    TransactionContract,
    ReadOnlyTransactionContract,
    IsolationContract,
    QueryContract,
    LimitContract,
    BulkContract,
    IndependentChangeContract,
    LifecycleContract,
    CancellationContract,
    StreamContract,
    ReferenceContract,
    ChangedDeclarationContract,
    TypeChangeContract,
    RolloutContract,
    PlantedRecordContract,
    DeclarationContract,
    TransformContract,
    SharedDatabaseContract,
    ArgumentContract,
    FieldOperationContract,
    FilteredChangeContract,
    GroupContract,
    UniqueIndexContract,
    ClaimContract,
    ExpiryContract,
    OwnerExpiryContract,
    ObservationContract,
    ClearingContract,
    FeedContract,
    WaitingContract,
    SubscriptionContract,
    DriverContract,
    ClosedContract,
    LostConnectionContract,
):
    """All cases of the contract."""

    @pytest.fixture
    def harness(self) -> Harness:
        raise NotImplementedError(
            "a subclass of StrategyContract must define the fixture `harness`"
        )

    @pytest_asyncio.fixture(autouse=True)
    async def _nothing_is_left(self, harness: Harness) -> AsyncGenerator[None, None]:
        """After every case: no task is running, the harness reports no leak, and asyncio has logged no
        error."""
        with no_complaints():
            yield
            await nothing_is_left(harness)

    @pytest_asyncio.fixture
    async def store(
        self, harness: Harness, _nothing_is_left: None
    ) -> AsyncGenerator[StorageStrategy, None]:
        """An open store on the data of this case."""
        async with harness.store() as store:
            yield store
