"""LangGraph's checkpoints over hf_async_store: threads that any process can continue, on each engine.

    async with open_store("sqlite:threads.db", collections=COLLECTIONS) as store:
        graph = builder.compile(checkpointer=EntitySaver(store))
        await graph.ainvoke(question, {"configurable": {"thread_id": "ada"}})

A checkpoint is an entity, with its metadata as JSON, by which it is found; what a task has written is
another. Only the asynchronous methods are there. Checkpoints that another process needs to rebuild a
`DeltaChannel` are not kept by `aprune`.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Final, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    get_checkpoint_id,
    get_checkpoint_metadata,
    writes_sort_key,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from hf_async_store import (
    AlreadyExistsError,
    Collection,
    Entity,
    Field,
    Index,
    StorageStrategy,
    and_,
    desc,
    in_,
    lt,
    path,
)

CHECKPOINTS, WRITES = "checkpoints", "checkpoint_writes"
COLLECTIONS: Final = (
    Collection(
        CHECKPOINTS,
        key="checkpoint",
        fields=["thread_id", "namespace", "checkpoint_id", "run_id", Field("metadata", "json")],
        indexes=[Index("thread_id", "checkpoint_id"), "run_id"],
    ),
    Collection(
        WRITES,
        key="key",
        fields=["thread_id", "checkpoint"],
        indexes=[Index("thread_id", "checkpoint")],
    ),
)


class EntitySaver(BaseCheckpointSaver[int]):
    """A checkpointer of LangGraph, on an open store that declares `COLLECTIONS`.

    Args:
        store: who opened it closes it.
        serde: as of every checkpointer.
    """

    def __init__(self, store: StorageStrategy, *, serde: SerializerProtocol | None = None) -> None:
        super().__init__(serde=serde)
        self._store = store

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        thread_id, namespace = _branch(config)
        if checkpoint_id := get_checkpoint_id(config):
            ids = [_key(thread_id, namespace, checkpoint_id)]
            found = [each for each in await self._store.get_entities(CHECKPOINTS, ids) if each]
        else:
            branch = {"thread_id": thread_id, "namespace": namespace}
            latest = desc("checkpoint_id")
            found = await self._store.query_entities(CHECKPOINTS, branch, order_by=latest, limit=1)
        tuples = await self._tuples(found)
        return tuples[0] if tuples else None

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002  # so it is called
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        where: list[Mapping[Any, object]] = [
            {path("metadata", name): value for name, value in (filter or {}).items()}
        ]
        if config is not None:
            thread_id, namespace = _branch(config)
            where.append({"thread_id": thread_id})
            if "checkpoint_ns" in config["configurable"]:
                where.append({"namespace": namespace})
            if checkpoint_id := get_checkpoint_id(config):
                where.append({"checkpoint_id": checkpoint_id})
        if before is not None and (checkpoint_id := get_checkpoint_id(before)):
            where.append({"checkpoint_id": lt(checkpoint_id)})
        most = limit if limit is None else max(limit, 0)
        found = await self._store.query_entities(
            CHECKPOINTS, and_(*where), order_by=desc("checkpoint_id"), limit=most
        )
        for each in await self._tuples(found):
            yield each

    async def _tuples(self, checkpoints: Sequence[Entity]) -> list[CheckpointTuple]:
        """Checkpoints with what tasks have written since."""
        written: dict[object, list[Any]] = {each["checkpoint"]: [] for each in checkpoints}
        if checkpoints:
            for each in await self._store.query_entities(WRITES, _of(checkpoints)):
                written[each["checkpoint"]] += _sortable(each)
        return [self._tuple(each, sorted(written[each["checkpoint"]])) for each in checkpoints]

    def _tuple(self, entity: Entity, writes: Iterable[Any]) -> CheckpointTuple:
        parent_id = entity["parent_id"]
        return CheckpointTuple(
            _config(entity, entity["checkpoint_id"]),
            self._loaded(entity["data"]),
            cast("CheckpointMetadata", entity["metadata"]),
            None if parent_id is None else _config(entity, parent_id),
            [(task_id, channel, self._loaded(value)) for _, task_id, channel, value in writes],
        )

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        stored = dict(get_checkpoint_metadata(config, metadata))
        run_id = stored.get("run_id")
        entity = {
            **_place(*_branch(config), checkpoint["id"]),
            "parent_id": get_checkpoint_id(config),
            "run_id": run_id if isinstance(run_id, str) else None,
            "metadata": stored,
            "data": self._dumped(checkpoint),
        }
        await self._store.save_entity(CHECKPOINTS, entity)
        return _config(entity, checkpoint["id"])

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        place = _place(*_branch(config), config["configurable"]["checkpoint_id"])
        new = {
            str(WRITES_IDX_MAP.get(channel, index)): [channel, self._dumped(value)]
            for index, (channel, value) in enumerate(writes)
        }
        key = _key(place["checkpoint"], task_id)
        written = {"key": key, "task_id": task_id, "task_path": task_path, "writes": new}
        entity = {**place, **written}
        try:
            await self._store.create_entity(WRITES, entity)
        except AlreadyExistsError:
            await self._store.modify_entity(
                WRITES, key, lambda stored: _merged(stored, new), default=entity
            )

    async def adelete_thread(self, thread_id: str) -> None:
        await self._delete({"thread_id": thread_id})

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        of_runs = {"run_id": in_(list(run_ids))}
        found = await self._store.query_entities(CHECKPOINTS, of_runs, fields=["thread_id"])
        await self._delete(_of(found))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        of_threads = {"thread_id": in_(list(thread_ids))}
        if strategy == "delete":
            await self._delete(of_threads)
            return
        found = await self._store.query_entities(
            CHECKPOINTS, of_threads, order_by="checkpoint_id", fields=["thread_id", "namespace"]
        )
        latest = {(each["thread_id"], each["namespace"]): each["checkpoint"] for each in found}
        kept = set(latest.values())
        await self._delete(_of([each for each in found if each["checkpoint"] not in kept]))

    async def _delete(self, filters: Mapping[str, object]) -> None:
        for collection in (WRITES, CHECKPOINTS):
            await self._store.delete_where(collection, filters)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        for collection in (CHECKPOINTS, WRITES):
            found = await self._store.query_entities(collection, {"thread_id": source_thread_id})
            copies = [_moved(each, target_thread_id) for each in found]
            await self._store.save_entities(collection, copies)

    def _dumped(self, value: object) -> list[str]:
        kind, data = self.serde.dumps_typed(value)
        return [kind, b64encode(data).decode()]

    def _loaded(self, value: object) -> Any:
        kind, data = cast("tuple[str, str]", value)
        return self.serde.loads_typed((kind, b64decode(data)))


def _key(*parts: object) -> str:
    """An id has 1,024 bytes at most."""
    text = json.dumps(parts)
    return text if len(text) <= 1024 else sha256(text.encode()).hexdigest()


def _branch(config: RunnableConfig) -> tuple[str, str]:
    configurable = config["configurable"]
    return str(configurable["thread_id"]), configurable.get("checkpoint_ns", "")


def _place(thread_id: str, namespace: object, checkpoint_id: object) -> dict[str, object]:
    return {
        "checkpoint": _key(thread_id, namespace, checkpoint_id),
        "thread_id": thread_id,
        "namespace": namespace,
        "checkpoint_id": checkpoint_id,
    }


def _config(place: Mapping[str, object], checkpoint_id: object) -> RunnableConfig:
    configurable = {"thread_id": place["thread_id"], "checkpoint_ns": place["namespace"]}
    return {"configurable": {**configurable, "checkpoint_id": checkpoint_id}}


def _of(checkpoints: Sequence[Entity]) -> dict[str, object]:
    """The filter for checkpoints, and for what tasks have written since."""
    return {
        "thread_id": in_(list({str(each["thread_id"]) for each in checkpoints})),
        "checkpoint": in_([str(each["checkpoint"]) for each in checkpoints]),
    }


def _sortable(entity: Entity) -> list[Any]:
    """What one task has written: the place in the order of all, task, channel, value."""
    task_path, task_id = str(entity["task_path"]), str(entity["task_id"])
    writes = cast("dict[str, list[Any]]", entity["writes"])
    return [
        (writes_sort_key(task_path, task_id, int(index)), task_id, *write)
        for index, write in writes.items()
    ]


def _merged(stored: Entity, new: Mapping[str, object]) -> Entity:
    """What a task writes again is ignored, except for errors and the like, whose places are negative."""
    old = cast("dict[str, object]", stored["writes"])
    changed = {place: write for place, write in new.items() if int(place) < 0 or place not in old}
    return cast("Entity", {**stored, "writes": {**old, **changed}})


def _moved(entity: Entity, thread_id: str) -> dict[str, object]:
    """A copy of a checkpoint, or of what a task has written, for another thread."""
    place = _place(thread_id, entity["namespace"], entity["checkpoint_id"])
    if "task_id" in entity:
        place["key"] = _key(place["checkpoint"], entity["task_id"])
    return {**entity, **place}
