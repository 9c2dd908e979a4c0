"""Case 81: a backup is verified completely before anything is written, and a failed restore reports
correctly what was written."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from backup_files import line, write_by_hand
from support import KINDS, everything, opened

from hf_async_store import (
    HOST_FACTORY,
    Collection,
    CorruptionError,
    Field,
    InvalidFieldError,
    InvalidInputError,
    MigrationError,
    ReferenceViolationError,
    StorageError,
    open_store,
)
from hf_async_store.migration import backup_store, check_portable, is_portable, restore_store
from hf_async_store.migration import restore as restore_module

if TYPE_CHECKING:
    from conftest import Place

pytestmark = pytest.mark.hf_sampled(by="kind")

GOOD = [line(template_id=f"t-{n:05}", name="x" * 300) for n in range(5000)]

UNREADABLE = {
    "a number that is none": (b'{"template_id":"z","x":1e999}', "entity 5,001 of templates"),
    "nested deep": (
        b'{"template_id":"z","x":' + b"[" * 5000 + b"]" * 5000 + b"}",
        "entity 5,001 of templates is nested too deeply",
    ),
    "nested deeper than a value may be": (
        b'{"template_id":"z","x":' + b"[" * 40 + b"]" * 40 + b"}",
        "templates 'z' cannot be stored in any store",
    ),
    "no UTF-8": (b'{"template_id":"z","x":"\xff"}', "entity 5,001 of templates"),
    "a lone surrogate": (b'{"template_id":"z","x":"\\ud800"}', "templates"),
    "a long number": (b'{"template_id":"z","x":' + b"9" * 30 + b"}", "templates"),
    "no key": (b'{"x":1}', "templates None cannot be stored in any store"),
    "a key that is none": (b'{"template_id":7}', "templates 7 cannot be stored in any store"),
    "an empty key": (b'{"template_id":""}', "templates '' cannot be stored in any store"),
    "a version that is none": (b'{"template_id":"z","version":-1}', "templates 'z'"),
    "a version of text": (b'{"template_id":"z","version":"1"}', "templates 'z'"),
    "too large": (b'{"template_id":"z","x":"' + b"y" * 500_000 + b'"}', "templates 'z'"),
    "far too large": (
        b'{"template_id":"z","x":[' + b"[]," * 1_200_000 + b"1]}",
        "exceeds the maximum size",
    ),
    "the same id again": (GOOD[-1], "occurs twice, or the entities are not sorted by id"),
    "no JSON": (b'{"template_id":"z"', "entity 5,001 of templates"),
}


@pytest.mark.parametrize("bad", UNREADABLE)
async def test_81_an_invalid_entity_is_found_before_anything_is_written(
    bad: str, tmp_path: Path
) -> None:
    text, named = UNREADABLE[bad]
    path = write_by_hand(tmp_path / "b.jsonl.gz", {"templates": [*GOOD, text]})
    with pytest.raises(CorruptionError, match="is not a valid backup") as proven:
        await check_portable(path)
    assert named in str(proven.value)
    async with open_store("memory:") as store:
        with pytest.raises(CorruptionError, match="nothing was written") as caught:
            await restore_store(store, path)
        assert named in str(caught.value)
        assert not any((await everything(store)).values())
        with pytest.raises(CorruptionError):
            await restore_store(store, path, merge="replace")
        assert not any((await everything(store)).values())


@pytest.mark.parametrize("kind", KINDS)
async def test_81_an_unstorable_entity_is_found_before_anything_is_written(
    kind: str, place: Place, tmp_path: Path
) -> None:
    good = [line(item_id=f"i-{n:04}", count=n) for n in range(1500)]
    wrong = line(item_id="x", count="many")
    path = write_by_hand(tmp_path / "b.jsonl.gz", {"items": [*good, wrong]})
    assert (await check_portable(path))["items"].count == 1501  # the unmodified backup is valid
    async with opened(place(kind, "a")) as store:
        with pytest.raises(
            InvalidFieldError, match=r"items 'x': items\.count is declared"
        ) as caught:
            await restore_store(store, path)
        assert "nothing was written" in str(caught.value)
        assert not any((await everything(store)).values())


@pytest.mark.parametrize("kind", ["json-single", "sqlite", "postgresql"])
async def test_81_a_missing_parent_is_found_before_anything_is_written(
    kind: str, place: Place, tmp_path: Path
) -> None:
    sections = {
        "templates": [line(template_id="t-1")],
        "requests": [line(request_id=f"r-{n:04}", template_id="t-1") for n in range(1500)],
        "machines": [line(machine_id="m-1", request_id="gone")],
    }
    path = write_by_hand(tmp_path / "b.jsonl.gz", sections)
    async with opened(place(kind, "a")) as store:
        with pytest.raises(ReferenceViolationError) as caught:
            await restore_store(store, path)
        assert "machines 'm-1': request_id refers to requests 'gone'" in str(caught.value)
        assert "nothing was written" in str(caught.value)
        assert not any((await everything(store)).values())
        # The parent exists in the store already: then the backup can be restored.
        await store.save_entity("requests", {"request_id": "gone"})
        done = await restore_store(store, path, merge="keep")
        assert done.merged["machines"].written == 1


TREE = Collection("nodes", key="node_id", fields=[Field("parent", references="nodes")])


@pytest.mark.parametrize("rule", [None, "keep", "replace", "newest"])
@pytest.mark.parametrize("url", ["memory:", "json:{}/a.json", "sqlite:{}/a.db"])
async def test_81_children_may_come_before_their_parents(
    url: str, rule: str | None, tmp_path: Path
) -> None:
    async with open_store("memory:", collections=[TREE]) as source:
        for n in reversed(range(30)):
            parent = f"n-{n + 1:03}" if n < 29 else None
            await source.save_entity("nodes", {"node_id": f"n-{n:03}", "parent": parent})
        made = await backup_store(source, tmp_path / "b.jsonl.gz")
        before = await everything(source)
    async with open_store(url.format(tmp_path), collections=[TREE]) as store:
        result = await restore_store(store, made.path, merge=rule)  # type: ignore[arg-type]
        assert result.merged["nodes"].written == 30
        assert await everything(store) == before


async def test_children_before_their_parents_with_collections_that_are_left_out(
    tmp_path: Path,
) -> None:
    other = Collection("orders", key="order_id")
    nodes = [{"node_id": "n-1", "parent": "n-2"}, {"node_id": "n-2"}]
    async with open_store("memory:", collections=[other, TREE]) as source:
        await source.save_entity("orders", {"order_id": "o-1"})
        await source.import_entities("nodes", nodes[::-1])
        made = await backup_store(source, tmp_path / "b.jsonl.gz")
    async with open_store("memory:", collections=[TREE]) as store:
        result = await restore_store(store, made.path, leave_out=["orders"])
        assert result.merged["nodes"].written == 2
        assert result.left_out == ["orders"]


@pytest.mark.parametrize("parents_first", [True, False])
async def test_81_collections_may_come_in_any_order(parents_first: bool, tmp_path: Path) -> None:
    sections = {
        "templates": [line(template_id="t-1")],
        "requests": [line(request_id="r-1", template_id="t-1")],
        "machines": [line(machine_id="m-1", request_id="r-1")],
    }
    names = list(sections) if parents_first else list(reversed(sections))
    path = write_by_hand(tmp_path / "b.jsonl.gz", {name: sections[name] for name in names})
    async with open_store("memory:") as store:
        await restore_store(store, path)
        assert await store.get_entity("machines", "m-1") is not None


async def test_a_failed_restore_reports_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_by_hand(tmp_path / "b.jsonl.gz", {"templates": GOOD})
    async with open_store(f"json:{tmp_path}/a.json") as store:
        write, calls = os.pwrite, 0

        def full(fd: int, data: bytes, offset: int) -> int:
            nonlocal calls
            calls += 1
            if calls > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(fd, data, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(MigrationError) as caught:
                await restore_store(store, path)
        said = str(caught.value)
        there = await store.count_entities("templates")
        assert there > 0
        assert f"Entities that were written: {there:,} templates" in said
        assert "--merge replace" in said
        assert isinstance(caught.value.__cause__, StorageError)
        await restore_store(store, path, merge="replace")
        assert await store.count_entities("templates") == 5000


async def test_a_backup_with_undeclared_collections_needs_an_option(tmp_path: Path) -> None:
    own = Collection("orders", key="order_id")
    async with open_store("memory:", collections=[*HOST_FACTORY, own]) as source:
        await source.save_entity("orders", {"order_id": "o-1"})
        await source.save_entity("templates", {"template_id": "t-1"})
        made = await backup_store(source, tmp_path / "b.jsonl.gz")
    async with open_store("memory:") as store:
        with pytest.raises(InvalidInputError, match=r"1 entities of 'orders'.*--leave-out"):
            await restore_store(store, made.path)
        result = await restore_store(store, made.path, leave_out=["orders"])
        assert result.left_out == ["orders"]
        assert result.merged["templates"].written == 1
        with pytest.raises(InvalidInputError, match="'templates' is declared"):
            await restore_store(store, made.path, leave_out=["templates"])


async def test_a_file_that_changes_after_its_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error does not claim that nothing was written, because that is unknown."""
    path = write_by_hand(tmp_path / "b.jsonl.gz", {"templates": GOOD})
    other = write_by_hand(tmp_path / "c.jsonl.gz", {"strangers": [b'{"stranger_id":"x"'] * 3})
    read = restore_module.read_portable

    def replaced(given: Path) -> object:
        other.replace(given)
        return read(given)

    monkeypatch.setattr(restore_module, "read_portable", replaced)
    async with open_store("memory:") as store:
        with pytest.raises(MigrationError, match="is incomplete") as caught:
            await restore_store(store, path)
        assert "nothing was" not in str(caught.value)


# -- what unpacks to far more than it is -------------------------------------------------------

_BOUNDED = """
import asyncio, resource, sys
from pathlib import Path
from hf_async_store import StorageError, open_store
from hf_async_store.migration import check_portable, restore_store

async def main():
    for work in (check_portable, lambda path: restore_store(store, path)):
        async with open_store("memory:") as store:
            try:
                await work(Path(sys.argv[1]))
            except StorageError as exc:
                print(type(exc).__name__)
asyncio.run(main())
status = Path("/proc/self/status")
if status.exists():  # on Linux, ru_maxrss counts what the parent had when it forked
    [line] = [each for each in status.read_text().splitlines() if each.startswith("VmHWM")]
    print(line.split()[1])
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize(
    "filling",
    [
        b'{"a":[[[',
        *(
            pytest.param(each, marks=pytest.mark.long)
            for each in (b"\0", b"{}\n", b"\n", b'{"template_id":"a"}\n')
        ),
    ],
)
def test_81_a_small_file_that_unpacks_to_gigabytes(filling: bytes, tmp_path: Path) -> None:
    import gzip
    import zlib

    good = write_by_hand(tmp_path / "b.jsonl.gz", {"templates": GOOD[:1]})
    head = gzip.decompress(good.read_bytes()).splitlines()[0] + b"\n"
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = filling * ((1 << 20) // len(filling))
    body = pack.compress(b'"templates"\n') + pack.flush(zlib.Z_FULL_FLUSH)
    # Packed once, and there is no end: after a full flush, nothing depends on what is before it.
    body += (pack.compress(block) + pack.flush(zlib.Z_FULL_FLUSH)) * 1500
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(head, 0) + body)
    assert bomb.stat().st_size < 8 << 20
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDED, str(bomb)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )
    *errors, peak = done.stdout.splitlines()
    assert errors == ["CorruptionError"] * 2, done.stderr
    assert int(peak) < 300 << 10  # KiB


async def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert not is_portable(path)
    with pytest.raises(InvalidInputError, match="is not a regular file"):
        await check_portable(path)


@pytest.mark.parametrize("verb", ["import_entities", "create_entities", "save_entities"])
async def test_an_error_in_a_batch_names_collection_and_id(verb: str) -> None:
    async with open_store("memory:") as store:
        write = getattr(store, verb)
        with pytest.raises(InvalidInputError, match="^machines 'm-2': machines.status is declared"):
            await write("machines", [{"machine_id": "m-1"}, {"machine_id": "m-2", "status": 5}])
        with pytest.raises(InvalidInputError, match="^item 1: an entity of machines needs its key"):
            await write("machines", [{"machine_id": "m-1"}, {"status": 5}])
