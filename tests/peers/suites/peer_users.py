"""The tests of fastapi-users' adapter for SQLAlchemy, with our database in place of its own; imported at
the end of its test modules."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest_asyncio
from examples import users_database
from examples.users_database import (
    LINKS,
    EntityAccessTokenDatabase,
    EntityUserDatabase,
    user_collection,
)
from peer_store import empty_store

from hf_async_store import AlreadyExistsError, UniqueViolationError

exc = SimpleNamespace(IntegrityError=(AlreadyExistsError, UniqueViolationError))


@dataclass
class Knight(users_database.User):
    first_name: str | None = None


class WithoutAccounts(EntityUserDatabase[Knight]):
    """Ours always has OAuth accounts; the suite also tests an adapter that has none."""

    async def get_by_oauth_account(self, oauth: str, account_id: str) -> Knight | None:
        raise NotImplementedError

    async def add_oauth_account(self, user: Knight, create_dict: Any) -> Knight:
        raise NotImplementedError

    async def update_oauth_account(self, user: Knight, oauth_account: Any, changes: Any) -> Knight:
        raise NotImplementedError


@pytest_asyncio.fixture
async def sqlalchemy_user_db(tmp_path: Path) -> AsyncGenerator[EntityUserDatabase[Knight], None]:
    async with empty_store([user_collection(Knight), *LINKS], tmp_path) as store:
        yield WithoutAccounts(store, Knight)


@pytest_asyncio.fixture
async def sqlalchemy_user_db_oauth(
    tmp_path: Path,
) -> AsyncGenerator[EntityUserDatabase[Knight], None]:
    async with empty_store([user_collection(Knight), *LINKS], tmp_path) as store:
        yield EntityUserDatabase(store, Knight)


@pytest_asyncio.fixture
async def sqlalchemy_access_token_db(
    user_id: UUID, tmp_path: Path
) -> AsyncGenerator[EntityAccessTokenDatabase, None]:
    async with empty_store([user_collection(Knight), *LINKS], tmp_path) as store:
        user = Knight("lancelot@camelot.bt", "guinevere", id=user_id)
        await store.typed(Knight).create(user)
        yield EntityAccessTokenDatabase(store)
