"""fastapi-users over hf_async_store: its users, OAuth accounts and access tokens, as typed collections.

    async with open_store("sqlite:users.db", collections=COLLECTIONS) as store:
        users = EntityUserDatabase(store, User)
        await users.create({"email": "ada@example.com", "hashed_password": "..."})

A subclass of `User` may add fields: declare it by `user_collection` and give it to the database. No two
users have the same address, in whatever case: a unique index on the address in lower case ensures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Generic, TypeVar
from uuid import UUID, uuid4

from fastapi_users.authentication.strategy.db import AccessTokenDatabase
from fastapi_users.db import BaseUserDatabase

from hf_async_store import Collection, Index, References, StorageStrategy, Transaction


@dataclass
class OAuthAccount:
    """The account of a user at another service."""

    oauth_name: str
    access_token: str
    account_id: str
    account_email: str
    expires_at: int | None = None
    refresh_token: str | None = None
    id: UUID = field(default_factory=uuid4)


@dataclass
class User:
    """A user. `email_key` is the address in lower case, which the database sets."""

    email: str
    hashed_password: str
    is_active: bool = True
    is_superuser: bool = False
    is_verified: bool = False
    oauth_accounts: list[OAuthAccount] = field(default_factory=list)
    email_key: str = ""
    id: UUID = field(default_factory=uuid4)


@dataclass
class OAuthLink:
    """Whose account it is; the id consists of the name of the service and of the account."""

    account: str
    user_id: Annotated[UUID, References("users")]


@dataclass
class AccessToken:
    """A token by which a user has logged in."""

    token: str
    user_id: Annotated[UUID, References("users")]
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))


UserType = TypeVar("UserType", bound=User)


def user_collection(model: type[User]) -> Collection:
    """The collection of users of this class."""
    return Collection.from_model(
        model, name="users", key="id", indexes=[Index("email_key", unique=True)]
    )


LINKS: Final = (
    Collection.from_model(OAuthLink, name="oauth_links", key="account", indexes=["user_id"]),
    Collection.from_model(AccessToken, name="access_tokens", key="token", indexes=["user_id"]),
)
COLLECTIONS: Final = (user_collection(User), *LINKS)


class EntityUserDatabase(BaseUserDatabase[UserType, UUID], Generic[UserType]):
    """The users of fastapi-users, on an open store that declares `COLLECTIONS`.

    Args:
        store: who opened it closes it.
        model: the class of the users.
    """

    def __init__(self, store: StorageStrategy, model: type[UserType]) -> None:
        self._store = store
        self._model = model
        self._users = store.typed(model)
        self._links = store.typed(OAuthLink)

    async def get(self, id: UUID) -> UserType | None:  # noqa: A002  # so it is called
        return await self._users.get(str(id))

    async def get_by_email(self, email: str) -> UserType | None:
        found = await self._users.query({"email_key": email.lower()}, limit=1)
        return found[0] if found else None

    async def get_by_oauth_account(self, oauth: str, account_id: str) -> UserType | None:
        link = await self._links.get(_account(oauth, account_id))
        return None if link is None else await self.get(link.user_id)

    async def create(self, create_dict: Mapping[str, Any]) -> UserType:
        user = self._model(**_with_key(create_dict))
        await self._users.create(user)
        return user

    async def update(self, user: UserType, update_dict: Mapping[str, Any]) -> UserType:
        changes = _with_key(update_dict)
        await self._users.patch(str(user.id), **changes)
        _set(user, changes)
        return user

    async def delete(self, user: UserType) -> None:
        async def deleted(tx: Transaction) -> None:
            for each in LINKS:
                await tx.delete_where(each.name, {"user_id": str(user.id)})
            await tx.delete_entity("users", str(user.id))

        await self._store.run_transaction(deleted)

    async def add_oauth_account(self, user: UserType, create_dict: Mapping[str, Any]) -> UserType:
        account = OAuthAccount(**create_dict)
        link = OAuthLink(_account(account.oauth_name, account.account_id), user.id)

        def changed(stored: UserType) -> UserType:
            stored.oauth_accounts.append(account)
            return stored

        async def added(tx: Transaction) -> UserType:
            users = tx.typed(self._model)
            await tx.typed(OAuthLink).create(link)
            await users.modify(str(user.id), changed)
            return await users.get(str(user.id)) or user

        return await self._store.run_transaction(added)

    async def update_oauth_account(
        self, user: UserType, oauth_account: Any, update_dict: Mapping[str, Any]
    ) -> UserType:
        def changed(stored: UserType) -> UserType:
            for each in stored.oauth_accounts:
                if each.id == oauth_account.id:
                    _set(each, update_dict)
            return stored

        await self._users.modify(str(user.id), changed)
        return await self.get(user.id) or user


class EntityAccessTokenDatabase(AccessTokenDatabase[AccessToken]):
    """The access tokens of fastapi-users, on an open store that declares `COLLECTIONS`."""

    def __init__(self, store: StorageStrategy) -> None:
        self._tokens = store.typed(AccessToken)

    async def get_by_token(self, token: str, max_age: datetime | None = None) -> AccessToken | None:
        found = await self._tokens.get(token)
        if found is None or max_age is None:
            return found
        return found if found.created_at >= max_age else None

    async def create(self, create_dict: Mapping[str, Any]) -> AccessToken:
        token = AccessToken(**create_dict)
        await self._tokens.create(token)
        return token

    async def update(
        self, access_token: AccessToken, update_dict: Mapping[str, Any]
    ) -> AccessToken:
        await self._tokens.patch(access_token.token, **update_dict)
        _set(access_token, update_dict)
        return access_token

    async def delete(self, access_token: AccessToken) -> None:
        await self._tokens.delete(access_token.token)


def _account(service: str, account_id: str) -> str:
    return f"{service}:{account_id}"


def _with_key(fields: Mapping[str, Any]) -> dict[str, Any]:
    email = fields.get("email")
    return {**fields, "email_key": email.lower()} if isinstance(email, str) else {**fields}


def _set(instance: object, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        setattr(instance, name, value)
