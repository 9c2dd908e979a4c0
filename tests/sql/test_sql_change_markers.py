"""Marks are written in the commit of their change, also in batches and beside failing changes."""

from __future__ import annotations

from hf_async_store import HOST_FACTORY, Collection, ReferenceViolationError, open_store
from hf_async_store.changes import Change, ChangeMarker, Put
from hf_async_store.values import Key

COLLECTIONS = (*HOST_FACTORY, Collection("marks", key="mark_id"))
AT = "2026-01-01T00:00:00.000000Z"


def put(collection: str, entity: dict[str, object], mark: str) -> Put:
    """An import of an entity, with a mark that names it."""
    key = Key(collection, str(entity[f"{collection[:-1]}_id"]))
    noted = ChangeMarker(Key("marks", mark), {"mark_id": mark, "of": key.id, "version": 3})
    return Put(key, entity, AT, import_version=7, mark=noted)  # type: ignore[arg-type]  # portable values


async def test_marks_are_committed_with_their_changes(url: str) -> None:
    changes: list[Change] = [put("templates", {"template_id": "t"}, "m-0")]
    for n in range(300):
        parent = "nobody" if n % 50 == 7 else "t"
        request = {"request_id": f"r{n:03}", "template_id": parent}
        changes.append(put("requests", request, f"m-{n + 1}"))
    async with open_store(url, collections=COLLECTIONS) as store:
        outcomes = await store.engine.write_each(changes)
        broken = [n for n, each in enumerate(outcomes) if isinstance(each, ReferenceViolationError)]
        assert broken == [n + 1 for n in range(300) if n % 50 == 7]
        assert {each for n, each in enumerate(outcomes) if n not in broken} == {7}
        marks = await store.get_entities("marks", [f"m-{n}" for n in range(301)])
        assert [n for n, each in enumerate(marks) if each is None] == broken
        assert all(each["version"] == 3 for each in marks if each is not None)
        # The same mark several times: the last one is stored.
        again = [put("templates", {"template_id": f"t{n}"}, "m-0") for n in range(5)]
        assert await store.engine.write_each(again) == [7] * 5
        last = await store.get_entity("marks", "m-0")
        assert last == {"mark_id": "m-0", "of": "t4", "version": 3}
        async with store.engine.session(None) as session:
            assert await session.write([put("templates", {"template_id": "u"}, "m-u")]) == [7]
        assert await store.get_entity("marks", "m-u") is not None
