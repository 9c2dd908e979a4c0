"""Updates that return the entities, where an attempt fails after an earlier one has written some."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hf_async_store import BatchError, UnavailableError, increment, open_store
from hf_async_store.driver import PRESENT, Key, Patch, Record
from hf_async_store.values import utc_now


async def test_what_an_earlier_attempt_has_written_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_store("memory:") as store:
        await store.create_entities(
            "templates", [{"template_id": each, "n": 0} for each in ("a", "b")]
        )
        engine = store.engine
        fetch = engine.fetch
        reads = 0

        async def disturbed(keys: Sequence[Key]) -> list[Record | None]:
            nonlocal reads
            reads += 1
            if reads == 2:
                raise UnavailableError("gone", retryable=True)
            records = await fetch(keys)
            now = utc_now()
            await engine.write_each([Patch(Key("templates", "b"), {"n": 5}, now, PRESENT)])
            return records

        monkeypatch.setattr(engine, "fetch", disturbed)
        with pytest.raises(BatchError) as caught:
            await store.update_entities(
                "templates", {each: {"n": increment()} for each in ("a", "b")}, returning=True
            )
        monkeypatch.undo()
        written, failure = caught.value.outcomes
        assert written == await store.get_entity("templates", "a")
        assert written["n"] == 1
        assert isinstance(failure, UnavailableError)
