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
    desc,
    in_,
    lt,
    path,
)

CHECKPOINTS, WRITES = "checkpoints", "checkpoint_writes"
COLLECTIONS: Final = (
    Collection(
        CHECKPOINTS,
        key="key",
        fields=["thread_id", "branch", "checkpoint_id", "run_id", Field("metadata", "json")],
        indexes=[Index("branch", "checkpoint_id"), Index("thread_id", "checkpoint_id"), "run_id"],
    ),
    Collection(
        WRITES, key="key", fields=["thread_id", "checkpoint"], indexes=["thread_id", "checkpoint"]
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
            key = _key(thread_id, namespace, checkpoint_id)
            entity = await self._store.get_entity(CHECKPOINTS, key)
            found = [] if entity is None else [entity]
        else:
            latest = desc("checkpoint_id")
            branch = {"branch": _key(thread_id, namespace)}
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
        where: dict[Any, object] = {
            path("metadata", name): value for name, value in (filter or {}).items()
        }
        if config is not None:
            thread_id, namespace = _branch(config)
            if "checkpoint_ns" in config["configurable"]:
                where["branch"] = _key(thread_id, namespace)
            else:
                where["thread_id"] = thread_id
            if checkpoint_id := get_checkpoint_id(config):
                where[path("checkpoint_id")] = checkpoint_id
        if before is not None and (checkpoint_id := get_checkpoint_id(before)):
            where["checkpoint_id"] = lt(checkpoint_id)
        if limit is not None and limit <= 0:
            return
        found = await self._store.query_entities(
            CHECKPOINTS, where, order_by=desc("checkpoint_id"), limit=limit
        )
        for each in await self._tuples(found):
            yield each

    async def _tuples(self, checkpoints: Sequence[Entity]) -> list[CheckpointTuple]:
        """Checkpoints with what tasks have written since."""
        if not checkpoints:
            return []
        written: dict[str, list[Any]] = {str(each["key"]): [] for each in checkpoints}
        some = {"checkpoint": in_(list(written))}
        for each in await self._store.query_entities(WRITES, some):
            written[str(each["checkpoint"])] += _sortable(each)
        return [
            self._tuple(each, sorted(written[str(each["key"])], key=lambda write: write[0]))
            for each in checkpoints
        ]

    def _tuple(self, entity: Entity, writes: Iterable[Any]) -> CheckpointTuple:
        thread_id, namespace, checkpoint_id = json.loads(str(entity["key"]))
        parent_id = entity["parent_id"]
        return CheckpointTuple(
            _config(thread_id, namespace, checkpoint_id),
            self._loaded(entity["checkpoint"]),
            cast("CheckpointMetadata", entity["metadata"]),
            None if parent_id is None else _config(thread_id, namespace, str(parent_id)),
            [(task_id, channel, self._loaded(value)) for _, task_id, channel, value in writes],
        )

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        thread_id, namespace = _branch(config)
        stored = dict(get_checkpoint_metadata(config, metadata))
        run_id = stored.get("run_id")
        entity = {
            **_place(thread_id, namespace, checkpoint["id"]),
            "parent_id": get_checkpoint_id(config),
            "run_id": run_id if isinstance(run_id, str) else None,
            "metadata": stored,
            "checkpoint": self._dumped(checkpoint),
        }
        await self._store.save_entity(CHECKPOINTS, entity)
        return _config(thread_id, namespace, checkpoint["id"])

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        thread_id, namespace = _branch(config)
        checkpoint_id = config["configurable"]["checkpoint_id"]
        new = {
            str(WRITES_IDX_MAP.get(channel, index)): [channel, self._dumped(value)]
            for index, (channel, value) in enumerate(writes)
        }
        entity = {
            "key": _key(thread_id, namespace, checkpoint_id, task_id),
            "thread_id": thread_id,
            "checkpoint": _key(thread_id, namespace, checkpoint_id),
            "task_path": task_path,
            "writes": new,
        }
        try:
            await self._store.create_entity(WRITES, entity)
        except AlreadyExistsError:
            await self._store.modify_entity(
                WRITES, str(entity["key"]), lambda stored: _merged(stored, new), default=entity
            )

    async def adelete_thread(self, thread_id: str) -> None:
        for collection in (WRITES, CHECKPOINTS):
            await self._store.delete_where(collection, {"thread_id": thread_id})

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        of_runs = {"run_id": in_(list(run_ids))}
        found = await self._store.query_entities(CHECKPOINTS, of_runs, fields=["key"])
        await self._delete([str(each["key"]) for each in found])

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        if strategy == "delete":
            for each in thread_ids:
                await self.adelete_thread(each)
            return
        found = await self._store.query_entities(
            CHECKPOINTS,
            {"thread_id": in_(list(thread_ids))},
            order_by="checkpoint_id",
            fields=["branch"],
        )
        latest = {each["branch"]: each["key"] for each in found}.values()
        await self._delete([str(each["key"]) for each in found if each["key"] not in latest])

    async def _delete(self, keys: Sequence[str]) -> None:
        await self._store.delete_where(WRITES, {"checkpoint": in_(keys)})
        await self._store.delete_entities(CHECKPOINTS, keys)

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


def _key(*parts: str) -> str:
    return json.dumps(parts)


def _branch(config: RunnableConfig) -> tuple[str, str]:
    configurable = config["configurable"]
    return str(configurable["thread_id"]), configurable.get("checkpoint_ns", "")


def _place(thread_id: str, namespace: str, checkpoint_id: str) -> dict[str, object]:
    return {
        "key": _key(thread_id, namespace, checkpoint_id),
        "thread_id": thread_id,
        "branch": _key(thread_id, namespace),
        "checkpoint_id": checkpoint_id,
    }


def _config(thread_id: str, namespace: str, checkpoint_id: str) -> RunnableConfig:
    place = {"thread_id": thread_id, "checkpoint_ns": namespace, "checkpoint_id": checkpoint_id}
    return {"configurable": place}


def _sortable(entity: Entity) -> list[Any]:
    """What one task has written: the place in the order of all, task, channel, value."""
    task_id = json.loads(str(entity["key"]))[-1]
    writes = cast("dict[str, list[Any]]", entity["writes"])
    return [
        (writes_sort_key(str(entity["task_path"]), task_id, int(index)), task_id, *write)
        for index, write in writes.items()
    ]


def _merged(stored: Entity, new: Mapping[str, object]) -> Entity:
    """What a task writes again is ignored, except for errors and the like, whose places are negative."""
    old = cast("dict[str, object]", stored["writes"])
    changed = {place: write for place, write in new.items() if int(place) < 0 or place not in old}
    return cast("Entity", {**stored, "writes": {**old, **changed}})


def _moved(entity: Entity, thread_id: str) -> dict[str, object]:
    """A copy of a checkpoint, or of what a task has written, for another thread."""
    _, *place = json.loads(str(entity["key"]))
    if "branch" in entity:
        return {**entity, **_place(thread_id, *place)}
    checkpoint = _key(thread_id, *place[:2])
    return {
        **entity,
        "key": _key(thread_id, *place),
        "thread_id": thread_id,
        "checkpoint": checkpoint,
    }
