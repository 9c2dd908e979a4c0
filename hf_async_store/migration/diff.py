"""Comparing two stores: counts and digests by collection, then what differs, by id and field."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Container, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from hf_async_store.changes import Record
from hf_async_store.driver import iter_json
from hf_async_store.migration.digest import Digest
from hf_async_store.migration.requirements import refuse_undeclared, require_store
from hf_async_store.query import build_query
from hf_async_store.values import Entity, Key, canonical

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_async_store.driver import Reader
    from hf_async_store.schema import Collection
    from hf_async_store.strategy import StorageStrategy

LIMIT: Final = 20
_CHUNK_SIZE: Final = 500


class Difference(msgspec.Struct, frozen=True):
    """One entity that differs.

    Attributes:
        kind: "missing" in the target, "extra" there, or "changed".
        fields: what differs in a changed one; `version` is one of them. No values: they may be
            secrets.
    """

    kind: Literal["missing", "extra", "changed"]
    collection: str
    id: str
    fields: list[str]

    def __str__(self) -> str:
        where = f"{self.collection} {self.id!r}"
        if self.kind == "changed":
            return f"{where} differs in {', '.join(self.fields)}"
        return (
            f"{where} is missing in the target" if self.kind == "missing" else f"{where} is extra"
        )


class CollectionComparison(msgspec.Struct, frozen=True):
    """Counts and digests of a collection on both sides."""

    source_count: int
    target_count: int
    source_digest: str
    target_digest: str

    @property
    def equal(self) -> bool:
        return (self.source_count, self.source_digest) == (self.target_count, self.target_digest)


class Comparison(msgspec.Struct, frozen=True):
    """Two stores side by side.

    Attributes:
        differences: the first of them.
        more: there are more than are listed.
    """

    collections: dict[str, CollectionComparison]
    differences: list[Difference] = []
    more: bool = False

    @property
    def equal(self) -> bool:
        return all(each.equal for each in self.collections.values())


async def compare_stores(
    source: StorageStrategy,
    target: StorageStrategy,
    *,
    limit: int = LIMIT,
    leave_out: Container[str] = (),
    advance: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """Read both stores through; where their digests differ, find out what does.

    Args:
        limit: how many differences are listed at most.
        leave_out: what is stored and need not be declared: collections (`jobs`) and fields
            (`machines.owner`). They are not compared.
        advance: called with how many entities were read.

    Raises:
        StoreNotFoundError: one of them is not there.
        ConfigurationError: one of them holds what is neither declared nor to be left out.
    """
    for store, what in ((source, "the source"), (target, "the target")):
        await require_store(store, what)
        await refuse_undeclared(store, what, leave_out)
    return await compare_declared(source, target, limit=limit, advance=advance)


async def compare_declared(
    source: StorageStrategy,
    target: StorageStrategy,
    *,
    limit: int = LIMIT,
    advance: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """As `compare_stores`, of what the source declares."""
    async with source.snapshot() as there, target.snapshot() as here:
        return await compare_readers(there, here, source.collections, limit=limit, advance=advance)


async def compare_readers(
    source: Reader,
    target: Reader,
    schema: Mapping[str, Collection],
    *,
    limit: int = LIMIT,
    advance: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """As `compare_stores`, of what is read already."""
    compared: dict[str, CollectionComparison] = {}
    for name, declared in schema.items():
        ours, theirs = await asyncio.gather(
            digest_of(source, declared, advance), digest_of(target, declared, advance)
        )
        compared[name] = CollectionComparison(ours.count, theirs.count, str(ours), str(theirs))
    found: list[Difference] = []
    for name, each in compared.items():
        if not each.equal and len(found) <= limit:
            differences = differences_of(source, target, schema[name])
            async with aclosing(differences):
                async for difference in differences:
                    found.append(difference)
                    if len(found) > limit:
                        break
    return Comparison(compared, found[:limit], more=len(found) > limit)


async def digest_of(
    reader: Reader,
    declared: Collection,
    advance: Callable[[int], None] = lambda count: None,
) -> Digest:
    """The digest of a collection, read through."""
    digest = Digest()
    async with aclosing(iter_json(reader, build_query(declared))) as pieces:
        async for texts in pieces:
            digest.add_all(texts)
            advance(len(texts))
    return digest


async def differences_of(
    source: Reader, target: Reader, declared: Collection
) -> AsyncGenerator[Difference, None]:
    """What differs in a collection: by looking each entity of one side up on the other.

    It needs no common order of the two engines, and holds one piece at a time.
    """
    async with aclosing(_pieces(source, declared)) as pieces:
        async for piece in pieces:
            twins = await target.fetch([each.key for each in piece])
            for record, twin in zip(piece, twins, strict=True):
                if twin is None:
                    yield Difference("missing", declared.name, record.key.id, [])
                elif fields := differing(record.entity, twin.entity):
                    yield Difference("changed", declared.name, record.key.id, fields)
    async with aclosing(_pieces(target, declared)) as pieces:
        async for piece in pieces:
            twins = await source.fetch([each.key for each in piece])
            for record, twin in zip(piece, twins, strict=True):
                if twin is None:
                    yield Difference("extra", declared.name, record.key.id, [])


async def _pieces(reader: Reader, declared: Collection) -> AsyncGenerator[list[Record], None]:
    piece: list[Record] = []
    async with aclosing(reader.select(build_query(declared))) as records:
        async for record in records:
            piece.append(record)
            if len(piece) == _CHUNK_SIZE:
                yield piece
                piece = []
    if piece:
        yield piece


def differing(one: Entity, other: Entity) -> list[str]:
    """The top-level fields in which two entities differ, by type and value."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if _text(one, name) != _text(other, name)]


def _text(entity: Entity, name: str) -> bytes | None:
    return canonical({name: entity[name]}) if name in entity else None


async def first_unexpected(source: StorageStrategy, target: StorageStrategy) -> Difference | None:
    """The first entity of the target that the source does not have just so; None if there is none."""
    async with source.snapshot() as there, target.snapshot() as here:
        for declared in target.collections.values():
            async with aclosing(_pieces(here, declared)) as pieces:
                async for piece in pieces:
                    keys: list[Key] = [each.key for each in piece]
                    for record, twin in zip(piece, await there.fetch(keys), strict=True):
                        if twin is None:
                            return Difference("extra", declared.name, record.key.id, [])
                        if fields := differing(twin.entity, record.entity):
                            return Difference("changed", declared.name, record.key.id, fields)
    return None
