"""The contract suite: subclass `StrategyContract`, give it the fixture `harness`, and run pytest.

    class TestMyEngine(StrategyContract):
        @pytest.fixture
        def harness(self, tmp_path: Path) -> Harness:
            return MyHarness(tmp_path)

The names of the cases carry the numbers of the contract. The suite asks an engine's capabilities
and never its name; what an engine declares absent must be absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from hf_async_store.testing.assertions import no_complaints, nothing_is_left
from hf_async_store.testing.bulk import BulkContract
from hf_async_store.testing.cancellation import CancellationContract
from hf_async_store.testing.entities import EntityContract
from hf_async_store.testing.isolation import IsolationContract
from hf_async_store.testing.lifecycle import LifecycleContract
from hf_async_store.testing.limits import LimitContract
from hf_async_store.testing.neighbours import NeighbourContract
from hf_async_store.testing.queries import QueryContract
from hf_async_store.testing.references import ReferenceContract
from hf_async_store.testing.streams import StreamContract
from hf_async_store.testing.transactions import TransactionContract
from hf_async_store.testing.trust import TrustContract
from hf_async_store.testing.values import ValueContract
from hf_async_store.testing.versions import VersionContract

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from hf_async_store.strategy import StorageStrategy
    from hf_async_store.testing.harness import Harness


@pytest.mark.asyncio
class StrategyContract(
    EntityContract,
    ValueContract,
    VersionContract,
    TransactionContract,
    IsolationContract,
    QueryContract,
    LimitContract,
    BulkContract,
    NeighbourContract,
    LifecycleContract,
    CancellationContract,
    StreamContract,
    ReferenceContract,
    TrustContract,
):
    """What every engine must show."""

    @pytest.fixture
    def harness(self) -> Harness:
        raise NotImplementedError("a subclass of StrategyContract gives the fixture `harness`")

    @pytest_asyncio.fixture(autouse=True)
    async def _nothing_is_left(self, harness: Harness) -> AsyncGenerator[None, None]:
        """Every case ends by this: no task, nothing that the harness would call a leak, and nothing
        that the event loop complains of."""
        with no_complaints():
            yield
            await nothing_is_left(harness)

    @pytest_asyncio.fixture
    async def store(
        self, harness: Harness, _nothing_is_left: None
    ) -> AsyncGenerator[StorageStrategy, None]:
        """A store that is open, on the data of this case."""
        async with harness.store() as store:
            yield store
