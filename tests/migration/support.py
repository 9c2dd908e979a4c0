"""Stores of every engine, and the test data for them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hypothesis import strategies as st

from hf_async_store import Entity, load_config, open_store
from hf_async_store.testing.harness import CONTRACT_COLLECTIONS
from hf_async_store.testing.hypothesis_strategies import draw_fields, values

if TYPE_CHECKING:
    from hf_async_store import Collection, StorageStrategy

KINDS: Final = ("json-single", "json-split", "sqlite", "postgresql", "dynamodb")
ITEMS: Final = CONTRACT_COLLECTIONS[3]
MOMENT: Final = "2026-06-01T08:00:00.414002Z"


def json_url(kind: str, folder: Path, name: str) -> str:
    return f"json:{folder / name}.json" if kind == "json-single" else f"json:{folder / name}"


def opened(url: str, collections: Iterable[Collection] = CONTRACT_COLLECTIONS) -> StorageStrategy:
    return open_store(url, collections=collections)


def place_of(url: str) -> str:
    """The location by which a live migration identifies a store."""
    return load_config(url).location()


def settings(folder: Path, **more: object) -> Mapping[str, object]:
    """A `migration` block whose backups and checkpoints are stored in `folder`."""
    return {"backup_location": f"{folder}/backups/", **more}


async def fill(store: StorageStrategy, machines: int = 60) -> None:
    """Store parents, children and unusual values, with realistic versions."""
    await store.import_entities(
        "templates",
        [{"template_id": f"t-{n}", "name": f"Template {n}", "version": n} for n in range(3)],
    )
    await store.import_entities(
        "requests",
        [
            {"request_id": f"r-{n}", "template_id": f"t-{n % 3}", "version": 1, "updated_at": None}
            for n in range(5)
        ],
    )
    await store.import_entities(
        "machines",
        [
            {
                "machine_id": f"m-{n:05d}",
                "request_id": f"r-{n % 5}",
                "version": n % 7,
                "created_at": MOMENT,
                "updated_at": MOMENT if n % 2 else None,
            }
            for n in range(machines)
        ],
    )
    await store.import_entities("items", odd_items())


def odd_items() -> list[Entity]:
    """Entities with all kinds of values that a codec could convert incorrectly."""
    odd: list[Any] = [
        None, True, False, 0, 1, 1.0, -0.0, 0.1, 5e-324, 1.7e308, 2**53, float(2**53), 2**63 - 1,
        -(2**63), "1", "", "é", "e\u0301", "\U00010000", "\uffff", [], {}, [None], {"a": None},
        {"b": 1, "a": 1.0}, {"$": [1, {"#": True}]}, "2026-06-01T08:00:00", 1e16, 1e22,
    ]  # fmt: skip
    items: list[Entity] = [
        {"item_id": f"odd-{n}", "data": value, "extra": value, "version": n}
        for n, value in enumerate(odd)
    ]
    items.append(
        {
            "item_id": "typed é/ \"'%",
            "label": "x",
            "count": 2**53 + 1,
            "ratio": -0.0,
            "active": False,
            "due_at": "1999-12-31T23:59:59.999999Z",
            "version": 2**40,
        }
    )
    items.append({"item_id": "long", "data": "x" * 200_000, "version": 1})
    return items


@st.composite
def generated_items(draw: st.DrawFn) -> list[dict[str, object]]:
    """Entities of the collection that has a field of every type."""
    ids = draw(st.lists(st.text("aé'\"/ %b", min_size=1, max_size=6), unique=True, max_size=12))
    return [
        {
            **draw_fields(draw, ITEMS, {}, whole=True),
            "data": draw(values),
            "item_id": each,
            "version": draw(st.integers(0, 2**62)),
        }
        for each in ids
    ]


def real_data() -> dict[str, dict[str, Entity]]:
    """The real data named by the environment; empty without them."""
    place = os.environ.get("HF_ASYNC_STORE_REAL_DATA")
    if not place:
        return {}
    file = Path(place) / "single_file" / "request_database.json"
    found: dict[str, dict[str, Entity]] = json.loads(file.read_bytes())
    return found


async def everything(store: StorageStrategy) -> dict[str, dict[str, Entity]]:
    return {
        name: {str(each[declared.key]): each for each in await store.query_entities(name)}
        for name, declared in store.collections.items()
    }
