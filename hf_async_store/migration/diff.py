"""Comparing two stores: counts and digests of each collection, then differences by id and field."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Container, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from hf_async_store.migration.digest import Digest
from hf_async_store.migration.store_checks import refuse_same, refuse_undeclared, require_store
from hf_async_store.query import build_query
from hf_async_store.values import Entity, Key, all_canonical, canonical

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_async_store.driver import Reader
    from hf_async_store.schema import Collection
    from hf_async_store.strategy import StorageStrategy

LIMIT: Final = 20


class Difference(msgspec.Struct, frozen=True):
    """One entity that differs.

    Attributes:
        kind: "missing" in the target, "extra" in the target, or "changed".
        fields: the names of the fields that differ in a changed entity, including `version`. Values
            are not reported, because they may be secrets.
    """

    kind: Literal["missing", "extra", "changed"]
    collection: str
    id: str
    fields: list[str]

    def __str__(self) -> str:
        name = f"{self.collection} {self.id!r}"
        if self.kind == "changed":
            return f"{name} differs in {', '.join(self.fields)}"
        return (
            f"{name} is missing in the target"
            if self.kind == "missing"
            else f"{name} is in the target only"
        )


class CollectionComparison(msgspec.Struct, frozen=True):
    """Counts and digests of a collection in both stores."""

    source_count: int
    target_count: int
    source_digest: str
    target_digest: str

    @property
    def equal(self) -> bool:
        return (self.source_count, self.source_digest) == (self.target_count, self.target_digest)


class Comparison(msgspec.Struct, frozen=True):
    """The result of comparing two stores.

    Attributes:
        differences: the first differences, up to the limit.
        more: there are more differences than are listed.
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
    """Read both stores completely, and find the differing entities if their digests differ.

    Args:
        limit: the maximum number of differences that are listed.
        leave_out: collections (`jobs`) and fields (`machines.owner`) that may be stored without
            being declared. They are not compared.
        advance: called with the number of entities that were read since the last call.

    Raises:
        StoreNotFoundError: one of the stores does not exist.
        ConfigurationError: one of the stores holds undeclared collections or fields that are not
            in `leave_out`.
        MigrationError: both are the same store, or this cannot be determined.
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
    """Compare the declared collections; see `compare_stores`."""
    await refuse_same(source.is_same_store(target), "nothing was compared")
    async with (
        source.snapshot(expired=True) as source_reader,
        target.snapshot(expired=True) as target_reader,
    ):
        return await compare_readers(
            source_reader, target_reader, source.collections, limit, advance
        )


async def compare_readers(
    source: Reader,
    target: Reader,
    schema: Mapping[str, Collection],
    limit: int = LIMIT,
    advance: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """Compare collections; see `compare_stores`."""
    compared: dict[str, CollectionComparison] = {}
    for name, declared in schema.items():
        in_source, in_target = await asyncio.gather(
            digest_of(source, declared, advance), digest_of(target, declared, advance)
        )
        compared[name] = CollectionComparison(
            in_source.count, in_target.count, str(in_source), str(in_target)
        )
    listed: list[Difference] = []
    for name, each in compared.items():
        if not each.equal and len(listed) <= limit:
            differences = differences_of(source, target, schema[name])
            async with aclosing(differences):
                async for difference in differences:
                    listed.append(difference)
                    if len(listed) > limit:
                        break
    return Comparison(compared, listed[:limit], more=len(listed) > limit)


async def digest_of(
    reader: Reader,
    declared: Collection,
    advance: Callable[[int], None] = lambda count: None,
) -> Digest:
    """Read a whole collection; returns its digest."""
    digest = Digest()
    async with aclosing(reader.select_batches(build_query(declared))) as batches:
        async for batch in batches:
            digest.add_all(all_canonical(batch))
            advance(len(batch))
    return digest


async def differences_of(
    source: Reader, target: Reader, declared: Collection
) -> AsyncGenerator[Difference, None]:
    """The differences of a collection, found by looking up the entities of each side on the other.

    The two engines need not return entities in the same order, and only one batch is held at a time.
    """
    async with aclosing(_unequal(source, target, declared, "missing")) as differences:
        async for each in differences:
            yield each
    async with aclosing(_unequal(target, source, declared, "extra", compare=False)) as differences:
        async for each in differences:
            yield each


async def _unequal(
    one: Reader,
    other: Reader,
    declared: Collection,
    absent: Literal["missing", "extra"],
    *,
    compare: bool = True,
) -> AsyncGenerator[Difference, None]:
    """The entities of `one` that `other` does not hold, of the kind `absent`, or that differ in it.

    Args:
        compare: also compare the entities that both hold.
    """
    async with aclosing(one.select_batches(build_query(declared))) as batches:
        async for batch in batches:
            keys = [Key(declared.name, declared.id_of(each)) for each in batch]
            for key, entity, found in zip(keys, batch, await other.fetch(keys), strict=True):
                if found is None:
                    yield Difference(absent, key.collection, key.id, [])
                elif compare and (fields := differing(entity, found.entity)):
                    yield Difference("changed", key.collection, key.id, fields)


def differing(one: Entity, other: Entity) -> list[str]:
    """The top-level fields in which two entities differ, by type and value."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if _encoded(one, name) != _encoded(other, name)]


def _encoded(entity: Entity, name: str) -> bytes | None:
    return canonical({name: entity[name]}) if name in entity else None


async def first_unexpected(source: StorageStrategy, target: StorageStrategy) -> Difference | None:
    """The first entity of the target that the source lacks or that differs; None if there is none."""
    async with (
        source.snapshot(expired=True) as source_reader,
        target.snapshot(expired=True) as target_reader,
    ):
        for declared in target.collections.values():
            differences = _unequal(target_reader, source_reader, declared, "extra")
            async with aclosing(differences):
                async for each in differences:
                    return each
    return None
