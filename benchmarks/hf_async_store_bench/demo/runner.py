"""The run: load, work in three processes, kill one, finish what it left, verify, report."""

from __future__ import annotations

import asyncio
import random
import secrets
import shutil
import signal
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from hf_async_store import Entity, StorageStrategy, open_store
from hf_async_store_bench.data import transaction_limit
from hf_async_store_bench.demo import report
from hf_async_store_bench.demo.data import (
    OPEN,
    REAL_DATA,
    Entities,
    chosen,
    everything,
    import_new,
    json_url,
    made_up,
)
from hf_async_store_bench.demo.orchestrator import Orchestrator
from hf_async_store_bench.demo.plan import Plan, Settings, draw_sizes, shares
from hf_async_store_bench.demo.verify import Invariant, Verifier, compare_indexes, read_back
from hf_async_store_bench.demo.worker import Worker
from hf_async_store_bench.demo.write_log import ProcessLog, WriteLog
from hf_async_store_bench.signals import ended_by_sigterm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

Opening: TypeAlias = "Callable[[Plan], StorageStrategy]"

PASSED: Final = 0
FAILED: Final = 4
_COUNTERS: Final = 3
_END_SECONDS: Final = 60.0
"""How long a worker may take beyond its time before it counts as stuck."""


async def run_demo(settings: Settings, opening: Opening = Plan.open) -> int:
    """Run the demo and print it; returns its exit code.

    Args:
        opening: opens the store in this process. Workers always open it by its URL or file.
    """
    # Made synchronously, so that nothing can come between its making and its removal.
    folder = Path(tempfile.mkdtemp(prefix="hf-async-store-demo-"))
    kept = False
    try:
        with ended_by_sigterm() as ended:
            try:
                passed = await _Run(settings, folder, opening).run_demo()
            except asyncio.CancelledError:
                if not ended():
                    raise
                return 128 + signal.SIGTERM
        # The notes and the store are the evidence of a failure.
        kept = settings.keep or not passed
        return PASSED if passed else FAILED
    finally:
        if not kept:
            shutil.rmtree(folder)


class _Run:
    """One run; `run_demo` is the story, everything else its chapters."""

    def __init__(self, settings: Settings, folder: Path, opening: Opening) -> None:
        self._settings = settings
        self._folder = folder
        self._opening = opening
        self._screen = report.screen()
        self._prefix = f"demo-{secrets.token_hex(3)}-"
        self._base: Entities = {}
        self._ended_badly: list[str] = []

    async def run_demo(self) -> bool:
        settings = self._settings
        plan = self._first_plan()
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(self._opening(plan))
            can = store.capabilities
            plan = await self._prepare(store, plan)
            await self._introduce(store)
            processes = settings.processes if can.multi_process else 1
            if not can.multi_process:
                self._screen.stage(
                    f"One process only: processes cannot share a store of the {can.engine} engine."
                )
            plans = self._plans(plan, processes)
            seconds = await self._work(store, plans)
            if can.durable or can.multi_process:
                await self._close(store)
                self._screen.stage("Verifying from a freshly opened store ...")
                store = await stack.enter_async_context(self._opening(plan))
            else:
                self._screen.stage("Verifying in the open store: it does not outlive its closing.")
            return await self._report(store, plans, seconds)

    async def _introduce(self, store: StorageStrategy) -> None:
        """Say what the store says of itself; the run is made for that."""
        can = store.capabilities
        limit = transaction_limit(can)
        plan = await store.explain_query("machines", {"request_id": "any"}, "created_at")
        self._screen.stage(
            f"The {can.engine} engine: {'durable' if can.durable else 'not durable'}, "
            f"{'any number of' if limit is None else f'up to {limit}'} entities in a transaction, "
            f"queries of the {can.query_isolation} kind; "
            f"machines of a request by {plan.index or plan.access}."
        )

    # -- loading -----------------------------------------------------------------------------

    def _first_plan(self) -> Plan:
        settings = self._settings
        store = settings.store
        if store is None and settings.config is None:
            source = chosen(settings.data)
            folder = self._folder / "store"
            store = source.copy(folder) if source else json_url(folder / "request_database.json")
        return Plan(
            store=store,
            config=settings.config,
            write_log=str(self._folder / "process-1.notes"),
            index=0,
            prefix=self._prefix,
            seed=settings.seed,
            seconds=settings.seconds,
            sizes=[],
            endless=False,
            templates=[],
            counters=[],
            adopted=[],
        )

    async def _prepare(self, store: StorageStrategy, plan: Plan) -> Plan:
        """Load what there is to load, make up the rest; returns the plan with their names."""
        self._base = {name: {} for name in store.collections}
        await self._load(store)
        templates = list(self._base["templates"])
        if not templates:
            self._screen.stage("The run makes up templates of its own.")
            templates = await self._make_up(store)
        counters = await self._make_counters(store)
        adopted = [
            name for name, each in self._base["requests"].items() if each.get("status") in OPEN
        ]
        return msgspec.structs.replace(
            plan, templates=templates, counters=counters, adopted=adopted
        )

    async def _load(self, store: StorageStrategy) -> None:
        source = chosen(self._settings.data)
        if source is None:
            self._screen.stage(f"No data to start from (neither --data DIR nor ${REAL_DATA}).")
            return
        plain = source.plain(store.collections)
        if self._settings.store is None and self._settings.config is None:
            self._base = plain or await everything(store)
            self._screen.stage(f"Working on a copy of {source}: {_sizes(self._base)}.")
            return
        url = source.copy(self._folder / "data")
        async with open_store(url) as copy:
            held = await everything(copy)
        if await import_new(store, held):
            self._base = plain or held
            self._screen.stage(f"Imported from a copy of {source}: {_sizes(self._base)}.")
        else:
            self._screen.stage(f"The store has some of {source} already: nothing is imported.")

    async def _make_up(self, store: StorageStrategy) -> list[str]:
        return await self._create_templates(store, made_up(self._prefix))

    async def _make_counters(self, store: StorageStrategy) -> list[str]:
        return await self._create_templates(
            store,
            [
                {"template_id": f"{self._prefix}counter-{number}", "name": "a counter", "uses": 0}
                for number in range(_COUNTERS)
            ],
        )

    async def _create_templates(
        self, store: StorageStrategy, templates: Sequence[dict[str, Any]]
    ) -> list[str]:
        await store.create_entities("templates", templates)
        made: dict[str, Entity] = {
            each["template_id"]: {**each, "version": 1} for each in templates
        }
        self._base["templates"] |= made
        return list(made)

    # -- working -----------------------------------------------------------------------------

    def _plans(self, first: Plan, processes: int) -> list[Plan]:
        parts = shares(self._settings.requests, processes)
        return [
            msgspec.structs.replace(
                first,
                index=index,
                write_log=str(self._folder / f"process-{index + 1}.notes"),
                sizes=draw_sizes(self._settings.seed, index, part),
                endless=0 < index == processes - 1,
            )
            for index, part in enumerate(parts)
        ]

    async def _work(self, store: StorageStrategy, plans: Sequence[Plan]) -> float:
        """All processes at once; returns the seconds they worked."""
        self._screen.stage(
            f"{len(plans)} processes ask for {sum(len(each.sizes) for each in plans)} requests, "
            f"{max(max(each.sizes) for each in plans):,} machines at most in one ..."
            if len(plans) > 1
            else f"This process asks for {len(plans[0].sizes)} requests ..."
        )
        async with _workers(plans[1:]) as workers:
            with (
                WriteLog(Path(plans[0].write_log)) as write_log,
                self._screen.progress(sum(len(each.sizes) for each in plans)) as progress,
            ):

                def advance(done: int) -> None:
                    progress(done + sum(each.done for each in workers))

                orchestrator = Orchestrator(store, write_log, plans[0], advance)
                started = monotonic()
                async with asyncio.TaskGroup() as group:
                    group.create_task(orchestrator.run())
                    for worker in workers:
                        worker.go()
                        group.create_task(self._follow(worker))
                    if workers:
                        group.create_task(self._kill_midway(workers[-1]))
                swept = await orchestrator.sweep()
                seconds = monotonic() - started
        if swept:
            self._screen.stage(f"Finished {swept} requests that the killed process had left open.")
        return seconds

    async def _close(self, store: StorageStrategy) -> None:
        try:
            async with asyncio.timeout(_END_SECONDS):
                await store.close()
        except TimeoutError:
            self._ended_badly.append("the store: its close() was never answered")

    async def _follow(self, worker: Worker) -> None:
        name = f"process {worker.plan.index + 1}"
        try:
            async with asyncio.timeout(self._settings.seconds + _END_SECONDS):
                wrong = await worker.follow()
        except TimeoutError:
            wrong = "did not come to its end"
            worker.kill()
        if wrong is not None:
            self._ended_badly.append(f"{name}: {wrong}")

    async def _kill_midway(self, victim: Worker) -> None:
        """SIGKILL at half of its work, or of the time, whichever comes first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.seconds / 2):
                await victim.midway.wait()
        # It has just told of a request's end; some moments later it is amid its writes.
        await asyncio.sleep(random.uniform(0, 0.05))
        victim.kill()
        self._screen.stage(
            f"Killed process {victim.plan.index + 1} (pid {victim.pid}) by SIGKILL, "
            f"{victim.done} requests into its work."
        )

    # -- reporting ---------------------------------------------------------------------------

    async def _report(self, store: StorageStrategy, plans: Sequence[Plan], seconds: float) -> bool:
        notes = [
            await asyncio.to_thread(ProcessLog.of, Path(each.write_log), killed=each.endless)
            for each in plans
        ]
        names = [f"process {each.index + 1}" + " (killed)" * each.endless for each in plans]
        stored = await read_back(store, self._prefix, self._base)
        examination = Verifier(notes, self._base, stored, store.collections, self._prefix)
        invariants = await asyncio.to_thread(examination.invariants)
        indexes = Invariant("indexes", "indexes agree with a walk over all")
        await compare_indexes(store, stored, self._prefix, indexes)
        invariants.append(indexes)
        for each in invariants:
            if each.name == "finished":
                each.failures += self._ended_badly
        report.print_work(self._screen, notes, names)
        report.print_speed(self._screen, notes, seconds)
        report.print_unanswered(self._screen, examination, notes, names)
        broken = any(each.failures for each in invariants)
        kept = str(self._folder) if broken or self._settings.keep else None
        return report.print_verdict(self._screen, invariants, kept)


@asynccontextmanager
async def _workers(plans: Sequence[Plan]) -> AsyncIterator[list[Worker]]:
    """The other processes, ready to go; gone afterwards, however this ends."""
    workers: list[Worker] = []
    try:
        for plan in plans:
            worker = await Worker.start(plan)
            workers.append(worker)
        for worker in workers:
            await worker.ready()
        yield workers
    finally:
        for each in workers:
            await each.end()


def _sizes(entities: Entities) -> str:
    return ", ".join(f"{len(each):,} {name}" for name, each in entities.items())
