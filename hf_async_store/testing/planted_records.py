"""Case 118: stored data never causes code to run, a URL to be opened or a variable to be expanded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from hf_async_store.errors import BatchError, CorruptionError, StorageError, StoreRelocatedError
from hf_async_store.migration_routing import MIGRATION_KEY
from hf_async_store.schema import MIGRATION_COLLECTION, MIGRATION_COLLECTIONS
from hf_async_store.strategies import open_store
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS, Harness

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from hf_async_store.strategy import StorageStrategy

_MODULE: Final = "hf_async_store_contract_planted"
_RECORD: Final = {"phase": "SWITCHED", "epoch": 1, "term": 1}

PLACES: Final = (
    f"postgresql://u@127.0.0.1:1/db?login_provider={_MODULE}:password",
    "postgresql://u:${HF_PLANTED}@127.0.0.1:1/db",
    "sqlite:{folder}/planted.db",
    "json:{folder}/planted",
    "json:{folder}/planted_${HF_PLANTED}.json",
    "dynamodb://us-east-1/planted?endpoint_url=http://127.0.0.1:1",
    f"{_MODULE}:{{folder}}",
)
"""Targets that an attacker with write access to a store could put into its migration record."""

NONSENSE: Final[dict[str, dict[str, object]]] = {
    "phase": {"phase": "nonsense"},
    "no phase": {"phase": None},
    "role": {"role": "both"},
    "epoch": {"epoch": "1"},
    "negative": {"term": -1},
    "list": {"other": ["json:x"]},
    "map": {"other": {"url": "json:x"}},
    "space": {"other": "json:a b"},
    "line": {"other": "json:a\n"},
    "path": {"other": "/etc/passwd"},
    "memory": {"other": "memory:"},
    "long": {"other": "json:" + "x" * 5000},
}
"""Fields that make a migration record invalid."""


async def plant(harness: Harness, record: dict[str, object]) -> None:
    """Write a migration record into the store, as an attacker with write access can."""
    declared = [*CONTRACT_COLLECTIONS, *MIGRATION_COLLECTIONS]
    async with harness.store(declared) as store:
        await store.save_entity("counters", {"counter_id": "c", "n": 1})
        await store.save_entity(
            MIGRATION_COLLECTION.name,
            {MIGRATION_COLLECTION.key: MIGRATION_KEY.id, **_RECORD, **record},
        )


def verbs(store: StorageStrategy) -> list[Callable[[], Awaitable[Any]]]:
    async def in_transaction() -> None:
        async with store.begin_transaction() as tx:
            await tx.get_entity("counters", "c")

    async def in_snapshot() -> None:
        async with store.snapshot():
            pass

    return [
        lambda: store.get_entity("counters", "c"),
        lambda: store.get_entities("counters", ["c", "d"]),
        lambda: store.query_entities("counters"),
        lambda: store.count_entities("counters"),
        lambda: store.save_entity("counters", {"counter_id": "c", "n": 2}),
        lambda: store.update_entity("counters", "c", {"n": 2}),
        lambda: store.delete_entity("counters", "c"),
        lambda: store.import_entities("counters", [{"counter_id": "c"}]),
        lambda: store.test_connection(),
        in_transaction,
        in_snapshot,
    ]


async def _refusal_messages(store: StorageStrategy, kind: type[StorageError]) -> list[str]:
    """The error messages of all verbs; asserts that each verb is refused."""
    messages = []
    for verb in verbs(store):
        with pytest.raises(StorageError) as caught:
            await verb()
        error = caught.value
        for each in error.outcomes if isinstance(error, BatchError) else [error]:
            assert isinstance(each, kind), repr(each)
            messages.append(str(each))
    return messages


class PlantedRecordContract:
    """Write access to a store must not affect its readers beyond the stored data."""

    @pytest.fixture
    def planted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harness: Harness
    ) -> Iterator[Path]:
        """A folder for planted targets; asserts that none was opened and that no planted code was run."""
        if not harness.capabilities.multi_process:
            pytest.skip("no other process can write to the store")
        code = tmp_path / "code"
        code.mkdir()
        ran = tmp_path / "ran"
        (code / f"{_MODULE}.py").write_text(
            f"open({str(ran)!r}, 'a').close()\ndef password(*given): return 'x'\n"
        )
        info = code / f"{_MODULE}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_MODULE}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(
            f"[hf_async_store.strategies]\n{_MODULE} = {_MODULE}:password\n"
        )
        monkeypatch.syspath_prepend(str(code))
        monkeypatch.setenv("HF_PLANTED", "expanded")
        folder = tmp_path / "folder"
        folder.mkdir()
        yield folder
        assert not ran.exists()
        assert _MODULE not in sys.modules
        assert os.listdir(folder) == []  # noqa: PTH208  # names are enough

    @pytest.mark.parametrize("role", ["source", "target"])
    @pytest.mark.parametrize("place", PLACES)
    async def test_118_a_planted_migration_record_is_not_followed(
        self, harness: Harness, planted: Path, place: str, role: str
    ) -> None:
        other = place.replace("{folder}", str(planted))
        await plant(harness, {"role": role, "other": other})
        async with harness.store() as store:
            for message in await _refusal_messages(store, StoreRelocatedError):
                assert "follow_moves" in message
                assert "expanded" not in message
            assert (await store.health())["ok"] is False

    async def test_118_a_source_that_is_still_active_stays_usable(
        self, harness: Harness, planted: Path
    ) -> None:
        other = f"sqlite:{planted}/planted.db"
        await plant(harness, {"role": "source", "phase": "COPYING", "other": other})
        async with harness.store() as store:
            assert await store.get_entity("counters", "c")
            assert await store.update_entity("counters", "c", {"n": 2}) == 2
            async with store.begin_transaction() as tx:
                await tx.update_entity("counters", "c", {"n": 3})
            assert (await store.query_entities("counters"))[0]["n"] == 3
            assert (await store.health())["ok"] is True

    @pytest.mark.parametrize("record", NONSENSE.values(), ids=NONSENSE)
    async def test_118_an_invalid_migration_record_is_reported(
        self, harness: Harness, planted: Path, record: dict[str, object]
    ) -> None:
        await plant(harness, {"role": "source", "other": f"json:{planted}/x", **record})
        async with harness.store() as store:
            for message in await _refusal_messages(store, CorruptionError):
                assert "'move' of hf_move" in message

    async def test_118_a_permitted_target_is_followed_with_its_configured_settings(
        self, harness: Harness, planted: Path, tmp_path: Path
    ) -> None:
        target = f"json:{tmp_path}/permitted.json"
        declared = [*CONTRACT_COLLECTIONS, *MIGRATION_COLLECTIONS]
        url = harness.url()
        assert url is not None
        async with open_store(target, collections=declared) as store:
            await store.save_entity("counters", {"counter_id": "c", "n": "there"})
            await plant(harness, {"role": "source", "other": target})
            async with open_store(
                url, collections=CONTRACT_COLLECTIONS, follow_moves=[target]
            ) as source:
                for message in await _refusal_messages(source, StoreRelocatedError):
                    assert "has no record of this migration" in message
            await store.save_entity(
                MIGRATION_COLLECTION.name,
                {MIGRATION_COLLECTION.key: MIGRATION_KEY.id}
                | {**_RECORD, "role": "target", "other": target},
            )
        # The permitted URL may have another spelling and other settings; its settings are used.
        permitted = f"json:{tmp_path}/folder/../permitted.json?cache_size=7"
        async with open_store(
            url, collections=CONTRACT_COLLECTIONS, follow_moves=[f"json:{planted}", permitted]
        ) as store:
            found = await store.get_entity("counters", "c")
            assert found is not None
            assert found["n"] == "there"
