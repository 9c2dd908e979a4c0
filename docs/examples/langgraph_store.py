"""LangGraph's long-term memory over hf_async_store: items by namespace and key, with search.

    async with open_store("sqlite:memories.db", collections=COLLECTIONS) as store:
        graph = builder.compile(store=EntityMemoryStore(store))

Filters, namespaces and the time to live are left to the store. Without vector indexes there, a search by
meaning compares the vectors of all items of a namespace, which is good for some thousands.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from operator import mul
from typing import Any, Final, cast

from langgraph.store.base import (
    GetOp,
    IndexConfig,
    Item,
    ListNamespacesOp,
    MatchCondition,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
    ensure_embeddings,
    get_text_at_path,
    tokenize_path,
    validate_op_namespace,
)
from langgraph.store.base.batch import AsyncBatchedBaseStore

from hf_async_store import (
    Collection,
    Entity,
    Expire,
    Field,
    Index,
    StorageStrategy,
    begins_with,
    desc,
    eq,
    gt,
    gte,
    lt,
    lte,
    ne,
    path,
)

ITEMS: Final = "memory_items"
COLLECTIONS: Final = (
    Collection(
        ITEMS,
        key="item_id",
        fields=["namespace", Field("value", "json"), Field("expires_at", "timestamp")],
        indexes=[Index("namespace", "updated_at"), "expires_at"],
        expires=Expire("expires_at"),
    ),
)
_END: Final = "."
"""Ends each label of a namespace, so that `("a",)` is no prefix of `("ab",)`; none contains it."""
_SEARCHES: Final = 4
"""How many searches of a batch run at once, each on a connection of the store."""

_OPERATORS: Final = {"$eq": eq, "$ne": ne, "$gt": gt, "$gte": gte, "$lt": lt, "$lte": lte}


class EntityMemoryStore(AsyncBatchedBaseStore):
    """A store of LangGraph, on an open store that declares `COLLECTIONS`.

    Args:
        store: who opened it closes it.
        index: what is embedded for searches, and by what, as of every store of LangGraph.
    """

    supports_ttl = True

    def __init__(self, store: StorageStrategy, *, index: IndexConfig | None = None) -> None:
        super().__init__()
        self._store = store
        self._turn = asyncio.Semaphore(_SEARCHES)
        self.index_config = index
        self._embeddings = None if index is None else ensure_embeddings(index["embed"])
        self._fields = ["$"] if index is None else index.get("fields") or ["$"]

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """What is read is as it was before the changes of the batch; of several, the last one counts."""
        given = list(ops)
        for op in given:
            validate_op_namespace(op)
        gets = [(at, op) for at, op in enumerate(given) if isinstance(op, GetOp)]
        results: list[Result] = [None] * len(given)
        items = await self._get([op for _, op in gets])
        for (at, _), item in zip(gets, items, strict=True):
            results[at] = item
        searches = [(at, op) for at, op in enumerate(given) if isinstance(op, SearchOp)]
        found = await asyncio.gather(*(self._search(op) for _, op in searches))
        for (at, _), several in zip(searches, found, strict=True):
            results[at] = several
        for at, op in enumerate(given):
            if isinstance(op, ListNamespacesOp):
                results[at] = await self._namespaces(op)
        puts = {_id(op.namespace, op.key): op for op in given if isinstance(op, PutOp)}
        await self._put(puts)
        return results

    async def _get(self, ops: Sequence[GetOp]) -> list[Item | None]:
        if not ops:
            return []
        found = await self._store.get_entities(ITEMS, [_id(op.namespace, op.key) for op in ops])
        pairs = zip(ops, found, strict=True)
        await self._refresh(each for op, each in pairs if each is not None and op.refresh_ttl)
        return [None if each is None else Item(**_item(each)) for each in found]

    async def _refresh(self, entities: Iterable[Entity]) -> None:
        """Let items live as long again as when they were put."""
        limited = [each for each in entities if each["ttl"] is not None]
        if limited:
            await self._store.update_entities(
                ITEMS,
                {str(e["item_id"]): {"expires_at": _end(cast("float", e["ttl"]))} for e in limited},
            )

    async def _put(self, ops: Mapping[str, PutOp]) -> None:
        gone = [item_id for item_id, op in ops.items() if op.value is None]
        if gone:
            await self._store.delete_entities(ITEMS, gone)
        kept = {item_id: op for item_id, op in ops.items() if op.value is not None}
        if not kept:
            return
        vectors = await self._vectors(list(kept.values()))
        entities = [
            {
                "item_id": item_id,
                "namespace": _text(op.namespace),
                "item_key": op.key,
                "value": op.value,
                "vectors": vectors.get(at, []),
                "ttl": op.ttl,
                "expires_at": None if op.ttl is None else _end(op.ttl),
            }
            for at, (item_id, op) in enumerate(kept.items())
        ]
        await self._store.save_entities(ITEMS, entities)

    async def _vectors(self, ops: Sequence[PutOp]) -> dict[int, list[list[float]]]:
        """The vectors of the texts in each item."""
        if self._embeddings is None:
            return {}
        texts = [
            (at, text)
            for at, op in enumerate(ops)
            if op.index is not False
            for name in op.index or self._fields
            for text in get_text_at_path(op.value, "$" if name == "$" else tokenize_path(name))
        ]
        embedded = await self._embeddings.aembed_documents([text for _, text in texts])
        vectors: dict[int, list[list[float]]] = {}
        for (at, _), vector in zip(texts, embedded, strict=True):
            vectors.setdefault(at, []).append([float(each) for each in vector])
        return vectors

    async def _search(self, op: SearchOp) -> list[SearchItem]:
        async with self._turn:
            return await self._found(op)

    async def _found(self, op: SearchOp) -> list[SearchItem]:
        where = _within(op.namespace_prefix)
        for name, condition in (op.filter or {}).items():
            where |= _conditions(("value", name), condition)
        by_meaning = self._embeddings is not None and bool(op.query)
        found = await self._store.query_entities(
            ITEMS,
            where,
            order_by=desc("updated_at"),
            limit=None if by_meaning else op.limit,
            offset=0 if by_meaning else op.offset,
        )
        scores: Sequence[float | None] = [None] * len(found)
        if by_meaning and self._embeddings is not None:
            query = await self._embeddings.aembed_query(str(op.query))
            scores = [_score(query, each) for each in found]
        ranked = [(score, each) for score, each in zip(scores, found, strict=True)]
        if by_meaning:
            ranked.sort(key=lambda pair: -math.inf if pair[0] is None else pair[0], reverse=True)
            ranked = ranked[op.offset : op.offset + op.limit]
        if op.refresh_ttl:
            await self._refresh(each for _, each in ranked)
        return [SearchItem(**_item(each), score=score) for score, each in ranked]

    async def _namespaces(self, op: ListNamespacesOp) -> list[tuple[str, ...]]:
        conditions = op.match_conditions or ()
        counted = await self._store.count_by(ITEMS, "namespace", _within(_prefix(conditions)))
        found = {
            _parts(text)[: op.max_depth]
            for text, _ in counted
            if all(_matches(each, _parts(text)) for each in conditions)
        }
        return sorted(found)[op.offset : op.offset + op.limit]


def _text(namespace: Iterable[str]) -> str:
    return "".join(each + _END for each in namespace)


def _parts(text: object) -> tuple[str, ...]:
    return tuple(str(text).split(_END)[:-1])


def _id(namespace: Iterable[str], key: str) -> str:
    """An id has 1,024 bytes at most."""
    text = (_text(namespace) + key).encode()
    return text.decode() if len(text) <= 1024 else sha256(text).hexdigest()


def _end(ttl: float) -> datetime:
    return datetime.now(UTC) + timedelta(minutes=ttl)


def _within(prefix: Iterable[str]) -> dict[Any, object]:
    text = _text(prefix)
    return {"namespace": begins_with(text)} if text else {}


def _prefix(conditions: Iterable[MatchCondition]) -> tuple[str, ...]:
    """The longest prefix that is asked for, up to its first wildcard."""
    found: list[tuple[str, ...]] = [()]
    for each in conditions:
        if each.match_type == "prefix":
            parts = tuple(each.path)
            found.append(parts[: parts.index("*")] if "*" in parts else parts)
    return max(found, key=len)


def _matches(condition: MatchCondition, namespace: tuple[str, ...]) -> bool:
    wanted, parts = tuple(condition.path), namespace
    if condition.match_type == "suffix":
        wanted, parts = wanted[::-1], parts[::-1]
    return len(parts) >= len(wanted) and all(
        want in ("*", part) for want, part in zip(wanted, parts, strict=False)
    )


def _conditions(place: tuple[str, ...], condition: object) -> dict[Any, object]:
    """The filter for a condition of LangGraph on a part of the value."""
    if not isinstance(condition, dict):
        return {path(*place): eq(cast("Any", condition))}
    found: dict[Any, object] = {}
    for name, value in condition.items():
        if name in _OPERATORS:
            found[path(*place)] = _OPERATORS[name](value)
        elif name.startswith("$"):
            raise ValueError(f"unsupported operator: {name}")
        else:
            found |= _conditions((*place, name), value)
    return found


def _score(query: Sequence[float], entity: Entity) -> float | None:
    """How near the nearest vector of an item is to a query: the cosine of the angle."""
    vectors = cast("list[list[float]]", entity["vectors"])
    return max((_cosine(query, each) for each in vectors), default=None)


def _cosine(left: Sequence[float], right: Sequence[float]) -> float:
    length = math.hypot(*left) * math.hypot(*right)
    return sum(map(mul, left, right)) / length if length else 0.0


def _item(entity: Entity) -> dict[str, Any]:
    return {
        "namespace": _parts(entity["namespace"]),
        "key": entity["item_key"],
        "value": entity["value"],
        "created_at": datetime.fromisoformat(str(entity["created_at"])),
        "updated_at": datetime.fromisoformat(str(entity["updated_at"])),
    }
