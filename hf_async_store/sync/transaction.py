"""The blocking methods on entities, transactions and snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from hf_async_store import driver, repository, transaction
from hf_async_store.models import Model
from hf_async_store.sync.calls import Blocking, Entering, blocking, calling_back, streaming
from hf_async_store.sync.typed import TypedRepository

if TYPE_CHECKING:
    from hf_async_store.schema import Collection


class Repository(Blocking):
    """The methods that the store and its transactions share: as in `RepositoryInterface`."""

    _target: repository.RepositoryInterface

    @property
    def collections(self) -> Mapping[str, Collection]:
        """As `RepositoryInterface.collections`."""
        return self._target.collections

    create_entity = blocking(repository.RepositoryInterface.create_entity)
    save_entity = blocking(repository.RepositoryInterface.save_entity)
    update_entity = blocking(repository.RepositoryInterface.update_entity)
    delete_entity = blocking(repository.RepositoryInterface.delete_entity)
    get_entity = blocking(repository.RepositoryInterface.get_entity)
    modify_entity = calling_back(repository.RepositoryInterface.modify_entity)

    create_entities = blocking(repository.RepositoryInterface.create_entities)
    save_entities = blocking(repository.RepositoryInterface.save_entities)
    update_entities = blocking(repository.RepositoryInterface.update_entities)
    delete_entities = blocking(repository.RepositoryInterface.delete_entities)
    get_entities = blocking(repository.RepositoryInterface.get_entities)
    import_entities = blocking(repository.RepositoryInterface.import_entities)

    query_entities = blocking(repository.RepositoryInterface.query_entities)
    stream_entities = streaming(repository.RepositoryInterface.stream_entities)
    query_page = blocking(repository.RepositoryInterface.query_page)
    count_entities = blocking(repository.RepositoryInterface.count_entities)

    update_where = blocking(repository.RepositoryInterface.update_where)
    delete_where = blocking(repository.RepositoryInterface.delete_where)
    count_by = blocking(repository.RepositoryInterface.count_by)
    sum_of = blocking(repository.RepositoryInterface.sum_of)
    min_of = blocking(repository.RepositoryInterface.min_of)
    max_of = blocking(repository.RepositoryInterface.max_of)


class Transaction(Entering, Repository):
    """As the asynchronous `Transaction`, for use with `with`. Calls of several threads take turns."""

    _target: transaction.Transaction

    def __enter__(self) -> Self:
        try:
            self._run(self._enter)
            return self
        except BaseException as exc:
            self._leave_if_interrupted(exc)
            raise

    def typed(self, model: type[Model]) -> TypedRepository[Model]:
        """As `Transaction.typed`."""
        return TypedRepository(self._target.typed(model), self._loop_thread)

    def begin_transaction(self) -> Self:
        """As `Transaction.begin_transaction`."""

        async def begin() -> transaction.Transaction:
            return self._target.begin_transaction()

        return type(self)(self._run(begin), self._loop_thread)

    conditional_update = blocking(transaction.Transaction.conditional_update)


class Snapshot(Blocking):
    """As `driver.Reader`."""

    fetch = blocking(driver.Reader.fetch)
    first_page = blocking(driver.Reader.first_page)
    count = blocking(driver.Reader.count)
    select = streaming(driver.Reader.select)
    select_batches = streaming(driver.Reader.select_batches, read_ahead=1)
