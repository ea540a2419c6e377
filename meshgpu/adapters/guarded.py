"""An attempt's life under a guard, the same for every executor: staged, guarded, watched, concluded, told once."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from meshgpu import guard
from meshgpu.adapters import guards, results
from meshgpu.adapters.log_tail import TailReader
from meshgpu.adapters.metrics import MetricReader
from meshgpu.errors import MeshgpuError
from meshgpu.guard import ExitRecord, GuardRecord, LedgerBounds, Notice, Request
from meshgpu.model.ids import JobId
from meshgpu.model.job import AttemptPlan, AttemptState, Phase, Result, StopMode
from meshgpu.model.receipt import NO_EVIDENCE, Evidence
from meshgpu.model.sweep import Metric
from meshgpu.ports import (
    AttemptEnded,
    AttemptMeasured,
    AttemptPrinted,
    AttemptProgress,
    AttemptStarted,
    ExecutorEvent,
)

STOP_GRACE_S: Final = 30.0
"""Between SIGTERM and SIGKILL: time to write a checkpoint, short enough for an owner who waits."""
MEASURE_S: Final = 2.0
"""Between two looks at what a job reports: as often as people's screens are drawn again."""
TAIL_S: Final = 0.2
"""Between two looks at what a job prints, for those who keep its newest output: they have it within 250 ms."""
TAIL_BYTES_PER_S: Final = 32 * 1024
"""To each of them and of each job: 64 loud jobs of a machine are what its peers let it say."""
CLAIM_LIMIT_S: Final = 10.0
"""A guard answers in some 5 ms; after this another one is tried, and only one of them can claim the attempt."""
GUARD_TRIES: Final = 2
KEEP_LOG: Final = LedgerBounds(keep_bytes=10**9, keep_free_bytes=0)
"""A gigabyte of an attempt's log, for who has no other wish: a day at 11 kB/s."""
JOBS_FAULTS: Final = ("environment", "image")
"""Codes of what cannot be made ready anywhere: the job itself has failed."""

Unseal = Callable[[AttemptPlan], Mapping[str, str]]
"""{name: value} of a job's secrets. Raises MeshgpuError, in which none of them stands. Blocks."""

_log = logging.getLogger(__name__)


def nothing_sealed(plan: AttemptPlan) -> Mapping[str, str]:
    """For who has no key: a job with secrets cannot run there."""
    if plan.spec.secrets is None:
        return {}
    raise MeshgpuError("sealed", "cannot open the job's secrets: this machine has no key for any")


@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt while it is watched; `directory/work` is the job's tree."""

    plan: AttemptPlan
    directory: Path
    is_adopted: bool
    task: asyncio.Task[None] | None = None
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    is_staging: bool = False
    has_started: bool = False
    stop: StopMode | None = None
    pidfd: int | None = None
    reader: MetricReader | None = None

    def pass_stop_on(self) -> None:
        """Tell the guard of a stop that was asked for; without a guard, it is told once there is one."""
        if self.stop is not None and self.pidfd is not None:
            number = signal.SIGUSR1 if self.stop is StopMode.KILL else signal.SIGTERM
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    @property
    def work(self) -> Path:
        return self.directory / "work"


class GuardedExecutor(ABC):
    """Runs attempts below `jobs_dir/<job>/<epoch>/`: `work` is the job's tree, the rest is written here.

    A kind of executor says how an attempt is made ready, and what of it a guard cannot take along.
    """

    def __init__(self, jobs_dir: Path, unseal: Unseal = nothing_sealed, ledger: LedgerBounds = KEEP_LOG) -> None:
        self._jobs_dir = jobs_dir.absolute()
        self._unseal = unseal
        self._ledger = ledger
        self._server = guards.ForkServer(self._hear, self._server_gone)
        self._attempts: dict[Path, Attempt] = {}
        self._guards: dict[Path, GuardRecord] = {}
        self._emit: Callable[[ExecutorEvent], None] = lambda _: None
        self._is_closing = False

    @abstractmethod
    async def _stage(self, attempt: Attempt) -> Request:
        """Make the attempt ready; told through `_progress`. Raises MeshgpuError or OSError; cancelled by a stop."""

    @abstractmethod
    def _entrust(self, attempt: Attempt, request: Request, secrets: Mapping[str, str]) -> Request:
        """`request` with the variables in it that must be on no disk and no command line. Only where there are any."""

    @abstractmethod
    async def _clear(self, attempt: Attempt, exited: ExitRecord | None) -> None:
        """End and remove what was there for the job only. exited: None where no guard has seen to the job's end."""

    def _verdict(self, attempt: Attempt, exited: ExitRecord) -> tuple[AttemptState, str]:  # noqa: ARG002
        """What the attempt came to, and why."""
        if exited["stopped_by"] == "timeout":
            return AttemptState.TIMED_OUT, exited["reason"]
        return AttemptState.CRASHED if exited["exit_code"] is None else AttemptState.EXITED, exited["reason"]

    async def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        self._emit = emit
        self._guards = await asyncio.to_thread(guards.live_guards, self._jobs_dir)

    def guards(self) -> frozenset[int]:
        """Pids of live guards: what descends from one of them is a job, not a user of this machine."""
        return frozenset(record["pid"] for record in self._guards.values() if guards.is_alive(record))

    def run(self, plan: AttemptPlan, tree: Path) -> None:
        if attempt := self._enter(plan, is_adopted=False):
            assert tree.absolute() == attempt.work, f"{tree} is not the work directory of {attempt.directory}"
            attempt.is_staging = True
            self._begin(attempt, self._conduct(attempt))

    def adopt(self, plan: AttemptPlan) -> None:
        if attempt := self._enter(plan, is_adopted=True):
            self._begin(attempt, self._take_up(attempt, "the agent stopped while the job was being prepared"))

    def stop(self, job: JobId, epoch: int, mode: StopMode) -> None:
        attempt = self._attempts.get(self._directory(job, epoch))
        if attempt is None or attempt.stop in (mode, StopMode.KILL):
            return
        attempt.stop = mode
        if attempt.is_staging and attempt.task is not None:
            attempt.task.cancel()
        else:
            attempt.pass_stop_on()

    async def close(self) -> None:
        self._is_closing = True
        tasks = [attempt.task for attempt in self._attempts.values() if attempt.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.close()

    # -- bookkeeping ---------------------------------------------------------------------------------------------

    def _directory(self, job: JobId, epoch: int) -> Path:
        return self._jobs_dir / job / str(epoch)

    def _enter(self, plan: AttemptPlan, *, is_adopted: bool) -> Attempt | None:
        directory = self._directory(plan.spec.job, plan.epoch)
        if directory in self._attempts:
            return None
        attempt = self._attempts[directory] = Attempt(plan, directory, is_adopted)
        if plan.spec.objective is not None:
            attempt.reader = MetricReader(directory, plan.spec.objective)
        return attempt

    def _begin(self, attempt: Attempt, life: Coroutine[None, None, None]) -> None:
        attempt.task = asyncio.get_running_loop().create_task(self._live(attempt, life))
        attempt.task.add_done_callback(_report_failure)

    def _hear(self, notice: Notice) -> None:
        directory, record = Path(notice["directory"]), notice["guard"]
        if attempt := self._attempts.get(directory):
            self._guards[directory] = record
            attempt.answered.set()
            if record["job_pid"] is not None:
                self._started(attempt, record)

    def _server_gone(self) -> None:
        for attempt in self._attempts.values():
            attempt.answered.set()

    def _started(self, attempt: Attempt, record: GuardRecord) -> None:
        if not attempt.has_started:
            attempt.has_started = True
            self._emit(AttemptStarted(attempt.plan.spec.job, attempt.plan.epoch, record["started_wall_s"]))

    def _progress(self, attempt: Attempt, phase: Phase, detail: str) -> None:
        self._emit(AttemptProgress(attempt.plan.spec.job, attempt.plan.epoch, phase, detail))

    def _end(
        self,
        attempt: Attempt,
        result: Result,
        ended_wall_s: float | None = None,
        evidence: Evidence = NO_EVIDENCE,
    ) -> None:
        del self._attempts[attempt.directory]
        self._guards.pop(attempt.directory, None)
        moment = time.time() if ended_wall_s is None else ended_wall_s
        self._emit(AttemptEnded(attempt.plan.spec.job, attempt.plan.epoch, moment, result, evidence))

    # -- an attempt's life ---------------------------------------------------------------------------------------

    async def _live(self, attempt: Attempt, life: Coroutine[None, None, None]) -> None:
        try:
            await life
        except Exception as error:
            # The executor runs effects: whatever a job's spec or files made fail here ends this attempt, and no other.
            # One that never ended would hold its GPUs for ever.
            _log.exception("an attempt failed within the agent", extra={"directory": str(attempt.directory)})
            await self._end_guard(attempt)
            if self._attempts.get(attempt.directory) is attempt:
                reason = f"a fault of the agent: {type(error).__name__}: {error}"
                self._end(attempt, Result(AttemptState.CRASHED, None, reason))

    async def _end_guard(self, attempt: Attempt) -> None:
        """Return once the attempt's guard, and so its job, is gone and none can start."""
        attempt.is_staging = False
        attempt.stop = StopMode.KILL
        record = await asyncio.to_thread(guards.guard_or_claim, attempt.directory)
        if record is not None and (pidfd := guards.open_guard(record)) is not None:
            attempt.pidfd = pidfd
            try:
                attempt.pass_stop_on()
                await guards.ended(pidfd)
            finally:
                attempt.pidfd = None
                os.close(pidfd)

    async def _conduct(self, attempt: Attempt) -> None:
        """Stage, start the guard, see the attempt to its end."""
        try:
            request = await self._stage(attempt)
            secrets = await asyncio.to_thread(self._unseal, attempt.plan)
        except asyncio.CancelledError:
            if attempt.stop is None or self._is_closing:
                raise
            self._end(attempt, Result(AttemptState.ABANDONED, None, "stopped before it started"))
            return
        except (MeshgpuError, OSError) as error:
            is_the_jobs_fault = isinstance(error, MeshgpuError) and error.code in JOBS_FAULTS
            outcome = AttemptState.EXITED if is_the_jobs_fault else AttemptState.CRASHED
            hint = getattr(error, "hint", None)
            self._end(attempt, Result(outcome, None, f"{error} ({hint})" if hint else str(error)))
            return
        attempt.is_staging = False
        for _ in range(GUARD_TRIES):
            attempt.answered.clear()
            await self._server.send(self._entrust(attempt, request, secrets) if secrets else request)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(attempt.answered.wait(), CLAIM_LIMIT_S)
            if attempt.directory in self._guards:
                break
        await self._take_up(attempt, "no guard could be started for the job")

    async def _take_up(self, attempt: Attempt, if_none: str) -> None:
        """Watch the attempt's guard, then tell how the attempt ended. if_none: why there is no guard and never was."""
        record = await asyncio.to_thread(guards.guard_or_claim, attempt.directory)
        if record is None:
            await self._clear(attempt, None)
            self._end(attempt, Result(AttemptState.CRASHED, None, if_none))
            return
        attempt.pidfd = guards.open_guard(record)
        if attempt.pidfd is not None:
            self._guards[attempt.directory] = record
            try:
                attempt.pass_stop_on()
                if attempt.is_adopted:
                    self._started(attempt, record)
                async with self._listening(attempt):
                    await guards.ended(attempt.pidfd)
            finally:
                os.close(attempt.pidfd)
                attempt.pidfd = None
        await self._conclude(attempt)

    @contextlib.asynccontextmanager
    async def _listening(self, attempt: Attempt) -> AsyncIterator[None]:
        """Tell what the job reports and prints while it runs, and at last what came before its end."""
        over = asyncio.Event()
        listeners: list[Coroutine[None, None, None]] = []
        if attempt.reader is not None:
            listeners.append(self._measure(attempt, attempt.reader, over))
        if attempt.plan.is_tailed:
            listeners.append(self._tell_tail(attempt, TailReader(attempt.directory / "log"), over))
        tasks = {asyncio.get_running_loop().create_task(listener) for listener in listeners}
        try:
            yield
        finally:
            over.set()
            if tasks:
                await asyncio.wait(tasks)
            for task in tasks:
                _report_failure(task)

    async def _measure(self, attempt: Attempt, reader: MetricReader, over: asyncio.Event) -> None:
        told: Metric | None = None
        while not over.is_set():
            metric = await asyncio.to_thread(reader.read)
            if metric is not None and metric != told:
                told = metric
                self._emit(AttemptMeasured(attempt.plan.spec.job, attempt.plan.epoch, metric))
            await _sleep(MEASURE_S, over)

    async def _tell_tail(self, attempt: Attempt, reader: TailReader, over: asyncio.Event) -> None:
        is_last = False
        while not is_last:
            is_last = over.is_set()
            chunk = await asyncio.to_thread(reader.read) if reader.has_news() else None
            if chunk is not None:
                self._emit(AttemptPrinted(attempt.plan.spec.job, attempt.plan.epoch, chunk))
            await _sleep(max(TAIL_S, len(chunk.data) / TAIL_BYTES_PER_S if chunk else 0.0), over)

    async def _conclude(self, attempt: Attempt) -> None:
        """The guard has ended: make sure that its job has too, and tell what came of it."""
        record = guards.read_guard(attempt.directory)
        exited = guards.read_exit(attempt.directory)
        if record["job_pid"] is not None and not attempt.is_adopted:
            self._started(attempt, record)
        if exited is None:
            await self._clear(attempt, None)
            is_same_boot = record["boot_id"] == guard.boot_id()
            reason = "the job's guard was killed" if is_same_boot else "the machine restarted"
            evidence = await asyncio.to_thread(results.find_evidence, attempt.directory)
            self._end(attempt, Result(AttemptState.CRASHED, None, reason), evidence=evidence)
            return
        self._progress(attempt, Phase.SAVING, "")
        count, size = await asyncio.to_thread(results.list_outputs, attempt.directory)
        await self._clear(attempt, exited)
        outcome, reason = self._verdict(attempt, exited)
        exit_code = None if outcome is AttemptState.CRASHED else exited["exit_code"]
        metric = None if attempt.reader is None else await asyncio.to_thread(attempt.reader.read)
        result = Result(outcome, exit_code, reason, count, size, metric)
        evidence = await asyncio.to_thread(results.find_evidence, attempt.directory)
        self._end(attempt, result, exited["ended_wall_s"], evidence)


async def _sleep(seconds: float, over: asyncio.Event) -> None:
    """Wait, unless it is over before."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), seconds)


def _report_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.error("an attempt is no longer watched", exc_info=error)
