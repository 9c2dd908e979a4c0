"""The run: load, work in three processes, kill one, finish what it left, verify, report."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Final, TypeAlias

import msgspec

from hf_async_store import StorageStrategy, open_store
from hf_async_store.config import DynamoDBConfig, load_config
from hf_async_store_bench.data import transaction_limit
from hf_async_store_bench.demo import data, report
from hf_async_store_bench.demo.orchestrator import Orchestrator
from hf_async_store_bench.demo.plan import KEPT_SECONDS, Plan, Settings, draw_sizes, shares
from hf_async_store_bench.demo.recorder import Recorder
from hf_async_store_bench.demo.verify import Verifier, compare_indexes, purge, read_back
from hf_async_store_bench.demo.worker import GO, Worker
from hf_async_store_bench.demo.write_log import ProcessLog, WriteLog
from hf_async_store_bench.processes import run_to_completion
from hf_async_store_bench.servers import ServerUnavailable, any_credentials, dynamodb

Opening: TypeAlias = Callable[[Plan], StorageStrategy]

PASSED, FAILED = 0, 4
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_DYNAMODB", "AWS_ENDPOINT_URL")
_END_SECONDS: Final = 90.0  # how long a worker may take beyond its time before it counts as stuck


async def run_demo(settings: Settings, opening: Opening = Plan.open) -> int:
    """Run the demo and print it; returns its exit code. `opening` opens the store in this process;
    workers always open it by its URL or file."""
    run = _Run(settings, Path(tempfile.mkdtemp(prefix="hf-async-store-demo-")), opening)
    try:
        return await run_to_completion(run.run_demo())
    finally:
        if not run.keep:
            shutil.rmtree(run.folder)


class _Run:
    """One run; `run_demo` is the story, everything else its chapters."""

    def __init__(self, settings: Settings, folder: Path, opening: Opening) -> None:
        self.folder = folder
        self.keep = False
        self._settings = settings
        self._is_temporary = settings.store is None and settings.config is None
        self._opening = opening
        self._screen = report.Screen()
        self._prefix = f"demo-{secrets.token_hex(3)}-"
        self._base: data.Entities = {}
        self._ended_badly: list[str] = []
        self._recorder = Recorder()

    async def run_demo(self) -> int:
        plan = self._first_plan()
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(self._opening(plan))
            can = store.capabilities
            plan = await self._prepare(store, plan)
            self._introduce(store)
            if not can.multi_process:
                self._screen.stage(f"One process only: no others can use a {can.engine} store.")
            plans = self._plans(plan, self._settings.processes if can.multi_process else 1)
            async with self._recorder.recording(store):
                seconds = await self._work(store, plans)
            if can.durable or can.multi_process:
                try:
                    await asyncio.wait_for(store.close(), _END_SECONDS)
                except TimeoutError:
                    self._ended_badly.append("the store: its close() was never answered")
                self._screen.stage("Verifying with a newly opened store ...")
                store = await stack.enter_async_context(self._opening(plan))
            else:
                self._screen.stage("Verifying in the open store: it does not outlive its closing.")
            async with self._recorder.recording(store):
                return await self._report(store, plans, seconds)

    def _introduce(self, store: StorageStrategy) -> None:
        """Print the capabilities of the store, which determine how the run is done."""
        can = store.capabilities
        limit = transaction_limit(can)
        durable = "durable" if can.durable else "not durable"
        many = "any number of" if limit is None else f"up to {limit}"
        self._screen.stage(
            f"The {can.engine} engine: {durable}, {many} entities in a transaction, query isolation "
            f"{can.query_isolation!r}."
        )

    def _first_plan(self) -> Plan:
        settings = self._settings
        if self._is_temporary:
            source, folder = data.chosen(settings.data), self.folder / "store"
            empty = data.json_url(folder / "request_database.json")
            store = source.copy(folder) if source else empty
            settings = msgspec.structs.replace(settings, store=store)
        notes = str(self.folder / "process-1.notes")
        return Plan(settings=settings, write_log=notes, prefix=self._prefix)

    async def _prepare(self, store: StorageStrategy, plan: Plan) -> Plan:
        """Load what there is to load, make up the rest; returns the plan with their names."""
        self._base = {name: {} for name in store.collections}
        await self._load(store)
        templates = list(self._base["templates"])
        if not templates:
            self._screen.stage("The run generates templates.")
            made = data.made_up(self._prefix)
            await store.create_entities("templates", made)
            self._base["templates"] = {i["template_id"]: {**i, "version": 1} for i in made}
            templates = list(self._base["templates"])
        requests = self._base["requests"].items()
        adopted = [name for name, each in requests if each.get("status") in data.OPEN]
        return msgspec.structs.replace(plan, templates=templates, adopted=adopted)

    async def _load(self, store: StorageStrategy) -> None:
        source = data.chosen(self._settings.data)
        if source is None:
            self._screen.stage(f"No initial data was given (--data DIR or ${data.REAL_DATA}).")
            return
        plain = source.plain(store.collections)
        if self._is_temporary:
            self._base = plain or await data.everything(store)
            self._screen.stage(f"Working on a copy of {source}: {_sizes(self._base)}.")
            return
        async with open_store(source.copy(self.folder / "data")) as copy:
            held = await data.everything(copy)
        if await data.import_new(store, held):
            self._base = plain or held
            self._screen.stage(f"Imported from a copy of {source}: {_sizes(self._base)}.")
        else:
            self._screen.stage(f"The store has some of {source} already: nothing is imported.")

    def _plans(self, first: Plan, processes: int) -> list[Plan]:
        plans = []
        for index, part in enumerate(shares(self._settings.requests, processes)):
            sizes = draw_sizes(self._settings.seed, index, part)
            log = str(self.folder / f"process-{index + 1}.notes")
            changed = {"index": index, "write_log": log, "endless": 0 < index == processes - 1}
            plans.append(msgspec.structs.replace(first, sizes=sizes, **changed))
        return plans

    async def _work(self, store: StorageStrategy, plans: Sequence[Plan]) -> float:
        """Run all processes at the same time; returns the seconds that they worked."""
        first, *others = plans
        requests = sum(len(each.sizes) for each in plans)
        most = max(max(each.sizes) for each in plans)
        asked = f"{requests} requests, each for up to {most:,} machines ..."
        self._screen.stage(f"{len(plans)} processes work on {asked}")
        async with _workers(others) as workers:
            with (
                WriteLog(Path(first.write_log)) as log,
                self._screen.progress(requests) as progress,
            ):

                def advance(done: int) -> None:
                    progress(done + sum(each.done for each in workers))

                orchestrator = Orchestrator(store, log, first, advance)
                started = monotonic()
                async with asyncio.TaskGroup() as group:
                    group.create_task(orchestrator.run())
                    for worker in workers:
                        worker.process.tell(GO)
                        group.create_task(self._follow(worker))
                    if workers:
                        group.create_task(self._kill_midway(workers[-1]))
                swept = await orchestrator.sweep()
                seconds = monotonic() - started
        if swept:
            self._screen.stage(f"Finished {swept} requests that the processes had left.")
        return seconds

    async def _follow(self, worker: Worker) -> None:
        try:
            wrong = await asyncio.wait_for(worker.follow(), self._settings.seconds + _END_SECONDS)
        except TimeoutError:
            wrong = "did not come to its end"
            worker.process.kill()
        if wrong is not None:
            self._ended_badly.append(f"process {worker.plan.index + 1}: {wrong}")

    async def _kill_midway(self, victim: Worker) -> None:
        """SIGKILL at half of its work, or of the time, whichever comes first."""
        with suppress(TimeoutError):
            await asyncio.wait_for(victim.midway.wait(), self._settings.seconds / 2)
        # It has just reported the end of a request; a moment later it is in the middle of its writes.
        await asyncio.sleep(random.uniform(0, 0.05))
        victim.process.kill()
        self._screen.stage(
            f"Killed process {victim.plan.index + 1} (pid {victim.process.pid}) with SIGKILL after "
            f"{victim.done} requests."
        )

    async def _report(self, store: StorageStrategy, plans: Sequence[Plan], seconds: float) -> int:
        logs = {}
        for each in plans:
            name = f"process {each.index + 1}" + " (killed)" * each.endless
            path = Path(each.write_log)
            logs[name] = await asyncio.to_thread(ProcessLog.of, path, killed=each.endless)
        await asyncio.sleep(KEPT_SECONDS)  # then all that was completed has expired
        stored = await read_back(store, self._prefix, self._base)
        ends = list(logs.values())
        verifier = Verifier(ends, self._base, stored, store.collections, self._prefix)
        invariants = await asyncio.to_thread(verifier.invariants)
        invariants.append(await compare_indexes(store, stored, self._prefix))
        invariants.append(await purge(store, verifier.expired))
        await self._recorder.catch_up(verifier.to_come())
        invariants.append(await asyncio.to_thread(verifier.changes, self._recorder.heard))
        invariants[-1].failures += self._recorder.errors
        finished = next(each for each in invariants if each.name == "finished")
        finished.failures += self._ended_badly
        report.print_work(self._screen, logs)
        report.print_speed(self._screen, logs.values(), self._recorder.came, seconds)
        report.print_unanswered(self._screen, verifier, logs)
        broken = any(each.failures for each in invariants)
        # The notes and the store are the evidence of a failure.
        self.keep = broken or self._settings.keep
        report.print_verdict(self._screen, invariants, str(self.folder) if self.keep else None)
        return FAILED if broken else PASSED


@asynccontextmanager
async def _workers(plans: Sequence[Plan]) -> AsyncIterator[list[Worker]]:
    """The other processes, ready to go; gone afterwards, however this ends."""
    workers: list[Worker] = []
    try:
        for plan in plans:
            worker = await Worker.start(plan)
            workers.append(worker)
        for worker in workers:
            await worker.process.hear()  # it has opened its store, or has failed to
        yield workers
    finally:
        for each in workers:
            await each.process.end()


def _sizes(entities: data.Entities) -> str:
    return ", ".join(f"{len(each):,} {name}" for name, each in entities.items())


@contextmanager
def served(settings: Settings) -> Iterator[Settings]:
    """The settings, for a DynamoDB URL without `endpoint_url` with the address of the test server, if it
    is installed: then the run costs nothing and touches no account."""
    store = settings.store or ""
    options = load_config(store).options if store else None
    named = not isinstance(options, DynamoDBConfig) or options.endpoint_url or options.profile
    if named or any(map(os.environ.get, _ENDPOINTS)):
        yield settings
        return
    try:
        with dynamodb() as server:
            any_credentials()
            mark = "&" if "?" in store else "?"
            url = f"{store}{mark}endpoint_url={server.endpoint_url}"
            yield msgspec.structs.replace(settings, store=url)
    except ServerUnavailable:
        yield settings
