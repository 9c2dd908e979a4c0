"""Several processes on one store, at the same time and one after another."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from hf_async_store.errors import LockTimeoutError
from tests.json.layouts import both_layouts, one_layout
from tests.json.process_roles import Member, together
from tests.json.support import (
    abandon,
    data_files,
    journals,
    never_folds,
    open_json,
    parsed,
    reopened,
    temporary,
    whole,
)

pytestmark = pytest.mark.hf_sampled


@one_layout
async def test_51_eight_processes_save_fifty_each(tmp_path: Path, layout: str) -> None:
    """All 400 saves are kept; the reference implementation kept 50."""
    results = await together(
        *(Member("saver", tmp_path, layout, name=f"p{n}", times=50) for n in range(8))
    )
    assert results == [[1] * 50] * 8
    machines = (await reopened(tmp_path, layout))["machines"]
    assert len(machines) == 400
    assert not temporary(tmp_path)
    assert len(journals(tmp_path)) == 1
    # The last process that closed the store has compacted it.
    at_rest = parsed(data_files(tmp_path)[0])
    assert len(at_rest.get("machines", at_rest)) == 400


@one_layout
async def test_51_four_processes_count_fifty_each(tmp_path: Path, layout: str) -> None:
    async with open_json(tmp_path, layout) as store:
        await store.save_entity("templates", {"template_id": "counter", "max_number": 0})
    await together(*(Member("counter", tmp_path, layout, times=50) for _ in range(4)))
    entity = (await reopened(tmp_path, layout))["templates"]["counter"]
    assert entity["max_number"] == 200
    assert entity["version"] == 201


@pytest.mark.parametrize(
    ("layout", "packed"),
    [("single_file", False), ("split_files", False), ("split_files", True)],
)
async def test_51_compactions_beside_writers_and_readers(
    tmp_path: Path, layout: str, packed: bool
) -> None:
    """Two processes compact continuously; no reader sees a partial transaction or an older state."""
    settings = {"enable_compression": packed, "write_buffer_size": 1000}
    names = ["a", "b"]
    writers = [
        Member("pairs", tmp_path, layout, name=each, times=60, settings=settings) for each in names
    ]
    others = [
        *(Member("folder", tmp_path, layout, settings=settings) for _ in range(2)),
        *(
            Member("watcher", tmp_path, layout, names=names, pause=pause, settings=settings)
            for pause in (0, 0.03)
        ),
    ]
    async with AsyncExitStack() as stack:
        everybody = await asyncio.gather(*map(stack.enter_async_context, [*others, *writers]))
        for each in everybody:
            each.say()
        assert [await each.result() for each in writers] == [60, 60]
        for other in others:
            other.say("stop")
        results = [await each.result() for each in others]
    for folds in results[:2]:
        assert isinstance(folds, int), folds
    for seen in results[2:]:
        assert isinstance(seen, dict), seen
    stored = await reopened(tmp_path, layout, **settings)
    for name in names:
        assert stored["templates"][name]["version"] == stored["machines"][name]["version"] == 60
    assert not temporary(tmp_path)
    assert len(journals(tmp_path)) == 1


@one_layout
async def test_75_three_processes_open_a_new_store_at_once(tmp_path: Path, layout: str) -> None:
    for round_ in range(2):
        folder = tmp_path / str(round_) / "new"
        results = await together(
            *(Member("saver", folder, layout, name=f"p{n}", times=3) for n in range(3))
        )
        assert results == [[1, 1, 1]] * 3
        assert len((await reopened(folder, layout))["machines"]) == 9


async def test_the_last_of_two_overlapping_closes_updates_the_files(tmp_path: Path) -> None:
    """A process that opens the store while the last one closes it compacts its own commits."""
    settings: dict[str, Any] = {"update_files": "at close"}
    store = await open_json(tmp_path, "single_file", **settings).open()
    never_folds(store)
    rows = [{"template_id": f"t-{each}", "name": "a" * 9999} for each in range(200)]
    await store.save_entities("templates", rows)
    compactor = store._json.compactor
    real = compactor._write
    writing, go_on = asyncio.Event(), asyncio.Event()

    async def write(*args: Any) -> Any:
        writing.set()
        await go_on.wait()
        return await real(*args)

    compactor._write = write  # type: ignore[method-assign]
    closing = asyncio.create_task(store.close())
    await writing.wait()
    async with Member(
        "saver", tmp_path, "single_file", name="m", times=3, settings=settings
    ) as other:
        other.say()
        while b'"m-2"' not in journals(tmp_path)[-1].read_bytes():
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)
        go_on.set()
        assert await other.result() == [1, 1, 1]
    await closing
    [path] = data_files(tmp_path)
    assert parsed(path)["machines"].keys() == {"m-0", "m-1", "m-2"}


async def test_processes_whose_commits_update_the_files(tmp_path: Path) -> None:
    """Also beside a process that compacts by itself, and a reader."""
    settings: dict[str, Any] = {"update_files": "after each commit"}
    names = ["a", "b", "c"]
    writers = [
        Member("pairs", tmp_path, "split_files", name="a", times=25, settings=settings),
        Member("pairs", tmp_path, "split_files", name="b", times=25, settings=settings),
        Member("pairs", tmp_path, "split_files", name="c", times=25),
    ]
    reader = Member("watcher", tmp_path, "split_files", names=names, pause=0.001)
    async with AsyncExitStack() as stack:
        everybody = await asyncio.gather(*map(stack.enter_async_context, [reader, *writers]))
        for each in everybody:
            each.say()
        assert [await each.result() for each in writers] == [25, 25, 25]
        async with open_json(tmp_path, "split_files", **settings) as store:
            await store.save_entity("templates", {"template_id": "last"})
            for name in ("templates", "machines"):
                content = parsed(tmp_path / f"{name}.json")
                assert [content[each]["name"] for each in names] == ["25"] * 3
            assert not temporary(tmp_path)
            assert len(journals(tmp_path)) == 1
        reader.say("stop")
        found = await reader.result()
        assert [found[each] for each in names] == [25, 25, 25]


@one_layout
async def test_short_lived_processes_one_after_another(tmp_path: Path, layout: str) -> None:
    for number in range(5):
        assert await together(Member("saver", tmp_path, layout, name=f"p{number}", times=1)) == [
            [1]
        ]
        assert len(journals(tmp_path)) == 1
    assert len((await reopened(tmp_path, layout))["machines"]) == 5


@both_layouts
@pytest.mark.parametrize("wakes", ["reads", "writes", "folds"])
async def test_a_process_that_missed_many_generations(
    tmp_path: Path, layout: str, wakes: str
) -> None:
    async with open_json(tmp_path, layout) as store:
        await store.save_entity("templates", {"template_id": "t"})
        sleeper = await open_json(tmp_path, layout).open()
        await whole(sleeper)
        for number in range(12):
            await store.save_entity("templates", {"template_id": "t", "name": str(number)})
            await store.save_entity("machines", {"machine_id": f"m{number}"})
            if number % 3:
                await store.checkpoint()
        await store.save_entity("templates", {"template_id": "t", "name": "last"})
        if wakes == "writes":
            assert await sleeper.save_entity("templates", {"template_id": "t"}) == 15
        elif wakes == "folds":
            await sleeper.checkpoint()
        assert await whole(sleeper) == await whole(store) == await reopened(tmp_path, layout)
        await abandon(sleeper)


@both_layouts
async def test_a_reader_that_was_suspended(tmp_path: Path, layout: str) -> None:
    """SIGSTOP at any point, compactions meanwhile, SIGCONT: the reader never sees an older state."""
    async with open_json(tmp_path, layout) as store:
        await _pair(layout, tmp_path, 1)
        watcher = Member("watcher", tmp_path, layout, names=["a"], pause=0)
        async with watcher:
            watcher.say()
            for number in range(8):
                await asyncio.sleep(0.01 * number)
                watcher.process.send_signal(signal.SIGSTOP)
                for _ in range(3):
                    async with store.begin_transaction() as tx:
                        await tx.save_entity("templates", {"template_id": "a"})
                        await tx.save_entity("machines", {"machine_id": "a"})
                    await store.checkpoint()
                watcher.process.send_signal(signal.SIGCONT)
            watcher.say("stop")
            seen = await watcher.result()
        assert isinstance(seen, dict), seen


async def _pair(layout: str, folder: Path, times: int) -> None:
    assert await together(Member("pairs", folder, layout, name="a", times=times)) == [times]


@both_layouts
async def test_a_process_suspended_with_the_write_lock(tmp_path: Path, layout: str) -> None:
    """Readers succeed; writers get a retryable error; after SIGCONT all succeed."""
    async with open_json(tmp_path, layout, lock_timeout=0.3) as store:
        await store.save_entity("templates", {"template_id": "t"})
        async with Member("holder", tmp_path, layout) as holder:
            holder.say()
            assert await holder.line() == "holding"
            await _until_stopped(holder)
            with pytest.raises(LockTimeoutError) as caught:
                await store.save_entity("templates", {"template_id": "t"})
            assert caught.value.retryable
            assert not caught.value.outcome_unknown
            assert (await store.get_entity("templates", "t") or {})["version"] == 1
            assert await store.get_entity("templates", "held") is None
            holder.process.send_signal(signal.SIGCONT)
            assert await holder.result() == "committed"
        assert await store.get_entity("templates", "held")
        assert await store.save_entity("templates", {"template_id": "t"}) == 2


@both_layouts
async def test_a_process_suspended_during_a_compaction(tmp_path: Path, layout: str) -> None:
    """Commits succeed, without compactions; the suspended one completes correctly after SIGCONT."""
    async with open_json(tmp_path, layout, lock_timeout=0.5) as store:
        async with Member("sleeper_in_a_fold", tmp_path, layout) as sleeper:
            sleeper.say()
            assert await sleeper.line() == "folding"
            await _until_stopped(sleeper)
            for number in range(1, 4):
                assert await store.save_entity("templates", {"template_id": "t"}) == number
            with pytest.raises(LockTimeoutError):
                await asyncio.wait_for(store.checkpoint(), 60)
            sleeper.process.send_signal(signal.SIGCONT)
            assert await sleeper.result() == "folded"
        assert (await store.get_entity("templates", "t") or {})["version"] == 3
        await store.checkpoint()
        assert await whole(store) == await reopened(tmp_path, layout)
        assert len(journals(tmp_path)) == 1
        assert not temporary(tmp_path)


@one_layout
async def test_a_process_killed_during_a_compaction(tmp_path: Path, layout: str) -> None:
    """Its compaction lock is released immediately, and its temporary files are removed."""
    async with open_json(tmp_path, layout) as store:
        async with Member("sleeper_in_a_fold", tmp_path, layout) as sleeper:
            sleeper.say()
            assert await sleeper.line() == "folding"
            await _until_stopped(sleeper)
            assert temporary(tmp_path)
            sleeper.process.kill()
            await sleeper.process.wait()
            await store.checkpoint()
        assert not temporary(tmp_path)
        assert await store.get_entity("templates", "before")
        assert len(journals(tmp_path)) == 1


async def _killed(name: str, folder: Path, layout: str, chance: random.Random) -> int:
    """A process that commits until it is killed; returns the version of its last acknowledged commit."""
    settings = {"write_buffer_size": 500}
    async with Member("teller", folder, layout, name=name, settings=settings) as member:
        member.say()
        await asyncio.sleep(chance.random() * 0.4)
        member.process.kill()
        last = 0
        while (told := await member.line()) is not None:
            assert isinstance(told, int), told
            last = told
        return last


async def _kills(folder: Path, layout: str, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    names = ["a", "b", "c"]
    acked = dict.fromkeys(names, 0)
    watcher = Member("watcher", folder, layout, names=names, pause=0)
    async with watcher:
        watcher.say()
        for _ in range(rounds):
            found = await asyncio.gather(*(_killed(name, folder, layout, chance) for name in names))
            stored = await reopened(folder, layout)
            for name, last in zip(names, found, strict=True):
                acked[name] = max(acked[name], last)
                version = stored["templates"].get(name, {}).get("version", 0)
                assert version == stored["machines"].get(name, {}).get("version", 0)
                assert isinstance(version, int)
                assert version >= acked[name], f"{name} is at {version} of {acked[name]}"
        watcher.say("stop")
        seen = await watcher.result()
        assert isinstance(seen, dict), seen
    async with open_json(folder, layout) as store:
        await store.checkpoint()
        assert await whole(store) == await reopened(folder, layout)
    assert not temporary(folder)
    assert len(journals(folder)) == 1


@one_layout
async def test_82_killed_at_random_beside_other_processes(tmp_path: Path, layout: str) -> None:
    await _kills(tmp_path, layout, rounds=2, seed=82)


@pytest.mark.long
@both_layouts
@pytest.mark.parametrize("seed", range(5))
async def test_82_killed_at_random_many_times(tmp_path: Path, layout: str, seed: int) -> None:
    await _kills(tmp_path, layout, rounds=12, seed=seed)


async def _until_stopped(member: Member) -> None:
    """Wait until the system reports that the process is suspended."""
    deadline = time.monotonic() + 60
    state = Path(f"/proc/{member.process.pid}/stat")
    if not state.exists():
        await asyncio.sleep(
            1.0
        )  # without /proc: the process suspends itself right after its output
        return
    while state.read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@both_layouts
async def test_the_write_lock_is_free_when_a_write_returns(tmp_path: Path, layout: str) -> None:
    """The program may compute, or wait for the user, for any time."""
    async with open_json(tmp_path, layout) as store:
        held = []

        async def write(number: int) -> None:
            await store.save_entity("templates", {"template_id": str(number)})
            held.append(store._json.locks.exclusive_held)

        for number in range(3):
            await write(number)
        await asyncio.gather(*map(write, range(3)))
        assert held == [False] * 6
