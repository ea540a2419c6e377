"""Executor port over plain processes: a guard owns each job, this only starts guards and watches them."""

import asyncio
import contextlib
import json
import logging
import os
import pwd
import shutil
import signal
import stat
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from meshgpu import guard
from meshgpu.adapters import fences, guards
from meshgpu.errors import MeshgpuError
from meshgpu.guard import GuardRecord, Notice, Request
from meshgpu.model.ids import JobId
from meshgpu.model.job import AttemptPlan, AttemptState, Phase, Result, StopMode
from meshgpu.ports import (
    AttemptEnded,
    AttemptProgress,
    AttemptStarted,
    Environment,
    Environments,
    ExecutorEvent,
)

STOP_GRACE_S: Final = 30.0
"""Between SIGTERM and SIGKILL: time to write a checkpoint, short enough for an owner who waits."""
CLAIM_LIMIT_S: Final = 10.0
"""A guard answers in some 5 ms; after this another one is tried, and only one of them can claim the attempt."""
GUARD_TRIES: Final = 2
PASSED_ON: Final = ("LANG", "TZ")
"""What a job inherits of the agent's environment, with LC_*; the rest may hold keys."""
NOT_OUTPUT: Final = "__pycache__"
"""Python leaves it beside every imported file; nobody means it as a result."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Attempt:
    plan: AttemptPlan
    directory: Path
    is_adopted: bool
    task: asyncio.Task[None] | None = None
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    is_staging: bool = False
    has_started: bool = False
    stop: StopMode | None = None
    pidfd: int | None = None

    def pass_stop_on(self) -> None:
        """Tell the guard of a stop that was asked for; without a guard, it is told once there is one."""
        if self.stop is not None and self.pidfd is not None:
            number = signal.SIGUSR1 if self.stop is StopMode.KILL else signal.SIGTERM
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    @property
    def work(self) -> Path:
        return self.directory / "work"


class ProcessExecutor:
    """Runs attempts below `jobs_dir/<job>/<epoch>/`: `work` is the job's tree, the rest is written here.

    fence: found by trial where it is not given. grace_s: between SIGTERM and SIGKILL of a stop.
    """

    def __init__(
        self,
        jobs_dir: Path,
        environments: Environments,
        *,
        fence: fences.Fence | None = None,
        grace_s: float = STOP_GRACE_S,
    ) -> None:
        self._jobs_dir = jobs_dir.absolute()
        self._environments = environments
        self._fence = fence
        self._grace_s = grace_s
        self._server = guards.ForkServer(self._hear, self._server_gone)
        self._attempts: dict[Path, _Attempt] = {}
        self._guards: dict[Path, GuardRecord] = {}
        self._emit: Callable[[ExecutorEvent], None] = lambda _: None
        self._is_closing = False

    async def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        self._emit = emit
        if self._fence is None:
            self._fence = await asyncio.to_thread(fences.find_fence)
        self._guards = await asyncio.to_thread(guards.live_guards, self._jobs_dir)
        await self._server.start()

    def fence(self) -> str:
        return self._fence.name if self._fence else ""

    def fence_reason(self) -> str:
        """Why the fence is not a stronger one, for people; empty for the strongest."""
        return self._fence.reason if self._fence else ""

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

    def _enter(self, plan: AttemptPlan, *, is_adopted: bool) -> _Attempt | None:
        directory = self._directory(plan.spec.job, plan.epoch)
        if directory in self._attempts:
            return None
        attempt = self._attempts[directory] = _Attempt(plan, directory, is_adopted)
        return attempt

    def _begin(self, attempt: _Attempt, life: Coroutine[None, None, None]) -> None:
        attempt.task = asyncio.get_running_loop().create_task(life)
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

    def _started(self, attempt: _Attempt, record: GuardRecord) -> None:
        if not attempt.has_started:
            attempt.has_started = True
            self._emit(AttemptStarted(attempt.plan.spec.job, attempt.plan.epoch, record["started_wall_s"]))

    def _progress(self, attempt: _Attempt, phase: Phase, detail: str) -> None:
        self._emit(AttemptProgress(attempt.plan.spec.job, attempt.plan.epoch, phase, detail))

    def _end(self, attempt: _Attempt, result: Result, ended_wall_s: float | None = None) -> None:
        del self._attempts[attempt.directory]
        self._guards.pop(attempt.directory, None)
        moment = time.time() if ended_wall_s is None else ended_wall_s
        self._emit(AttemptEnded(attempt.plan.spec.job, attempt.plan.epoch, moment, result))

    # -- an attempt's life ---------------------------------------------------------------------------------------

    async def _conduct(self, attempt: _Attempt) -> None:
        """Stage, start the guard, see the attempt to its end."""
        try:
            request = await self._stage(attempt)
        except asyncio.CancelledError:
            if attempt.stop is None or self._is_closing:
                raise
            self._end(attempt, Result(AttemptState.ABANDONED, None, "stopped before it started"))
            return
        except (MeshgpuError, OSError) as error:
            # An environment that cannot be built here cannot be built elsewhere: the job itself has failed.
            is_the_jobs_fault = isinstance(error, MeshgpuError) and error.code == "environment"
            outcome = AttemptState.EXITED if is_the_jobs_fault else AttemptState.CRASHED
            self._end(attempt, Result(outcome, None, str(error)))
            return
        attempt.is_staging = False
        for _ in range(GUARD_TRIES):
            attempt.answered.clear()
            await self._server.send(request)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(attempt.answered.wait(), CLAIM_LIMIT_S)
            if attempt.directory in self._guards:
                break
        await self._take_up(attempt, "no guard could be started for the job")

    async def _stage(self, attempt: _Attempt) -> Request:
        plan = attempt.plan
        if plan.fenced and not self.fence():
            raise MeshgpuError("no-fence", f"cannot run {plan.spec.user}'s job: nothing shuts it in on this machine")
        environment = await self._environments.build(
            plan, attempt.work, lambda detail: self._progress(attempt, Phase.STAGING, detail)
        )
        self._progress(attempt, Phase.STAGING, _environment_words(environment))
        return await asyncio.to_thread(_prepare, attempt, environment, self._fence, self._grace_s)

    async def _take_up(self, attempt: _Attempt, if_none: str) -> None:
        """Watch the attempt's guard, then tell how the attempt ended. if_none: why there is no guard and never was."""
        record = await asyncio.to_thread(guards.guard_or_claim, attempt.directory)
        if record is None:
            self._end(attempt, Result(AttemptState.CRASHED, None, if_none))
            return
        attempt.pidfd = guards.open_guard(record)
        if attempt.pidfd is not None:
            self._guards[attempt.directory] = record
            try:
                attempt.pass_stop_on()
                if attempt.is_adopted:
                    self._started(attempt, record)
                await guards.ended(attempt.pidfd)
            finally:
                os.close(attempt.pidfd)
                attempt.pidfd = None
        await self._conclude(attempt)

    async def _conclude(self, attempt: _Attempt) -> None:
        """The guard has ended: make sure that its job has too, and tell what came of it."""
        record = guards.read_guard(attempt.directory)
        exited = guards.read_exit(attempt.directory)
        if record["job_pid"] is not None and not attempt.is_adopted:
            self._started(attempt, record)
        if exited is None:
            await asyncio.to_thread(guards.kill_leftovers, attempt.work)
            is_same_boot = record["boot_id"] == guard.boot_id()
            reason = "the job's guard was killed" if is_same_boot else "the machine restarted"
            self._end(attempt, Result(AttemptState.CRASHED, None, reason))
            return
        self._progress(attempt, Phase.SAVING, "")
        count, size = await asyncio.to_thread(_save, attempt)
        outcome = AttemptState.CRASHED if exited["exit_code"] is None else AttemptState.EXITED
        result = Result(outcome, exited["exit_code"], exited["reason"], count, size)
        self._end(attempt, result, exited["ended_wall_s"])


def _environment_words(environment: Environment) -> str:
    """`environment 3f2a (cached)`, or what it was built from."""
    return f"environment {environment.tag} ({'cached' if environment.cached else environment.source})"


# -- before the job --------------------------------------------------------------------------------------------------


def _prepare(attempt: _Attempt, environment: Environment, fence: fences.Fence | None, grace_s: float) -> Request:
    """Put on disk what the guard needs. Blocks."""
    plan, directory = attempt.plan, attempt.directory
    argv = ["sh", "-c", plan.spec.command[0]] if plan.spec.shell else [*plan.spec.command]
    _write_json(directory / "before.json", dict(_files(attempt.work)))
    variables = {**_outer_variables(), **_account_variables(attempt, fence), **_job_variables(attempt, environment)}
    if plan.fenced:
        assert fence is not None
        enclosure = fences.Enclosure(
            attempt.work,
            directory / "home",
            directory / "tmp",
            directory / "environment",
            fences.interpreter_paths(environment.bin_path),
            fences.gpu_devices([share.uuid for share in plan.gpus]),
        )
        enclosure.home.mkdir(exist_ok=True)
        enclosure.tmp.mkdir(exist_ok=True)
        fences.hand_over(fence, enclosure, variables)
        argv = [*fences.fence_prefix(fence, enclosure), *argv]
        variables = fences.CLEAN_ENVIRONMENT
    return Request(
        directory=str(directory),
        work=str(attempt.work),
        argv=argv,
        env=variables,
        grace_s=grace_s,
        own_shm=plan.fenced,
        enclosed=plan.fenced and fence is not None and fence.name == "bubblewrap",
    )


def _outer_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith("LC_")}


def _account_variables(attempt: _Attempt, fence: fences.Fence | None) -> dict[str, str]:
    if attempt.plan.fenced and fence is not None:
        tmp = "/tmp" if fence.name == "bubblewrap" else str(attempt.directory / "tmp")  # noqa: S108 - its own /tmp
        return {"HOME": str(attempt.directory / "home"), "TMPDIR": tmp, "USER": fences.account(fence)}
    account = pwd.getpwuid(os.geteuid())
    return {"HOME": account.pw_dir, "USER": account.pw_name}


def _job_variables(attempt: _Attempt, environment: Environment) -> dict[str, str]:
    plan = attempt.plan
    return {
        "PATH": f"{environment.bin_path}:{fences.CLEAN_ENVIRONMENT['PATH']}",
        **dict(plan.spec.env),
        "VIRTUAL_ENV": str(environment.bin_path.parent),
        "MESHGPU_JOB_ID": plan.spec.job,
        "MESHGPU_MACHINE": plan.machine,
        "MESHGPU_OUTPUT_DIR": str(attempt.work),
        "CUDA_VISIBLE_DEVICES": ",".join(share.uuid for share in plan.gpus),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTHONUNBUFFERED": "1",
    }


def _report_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.error("an attempt is no longer watched", exc_info=error)


# -- outputs ---------------------------------------------------------------------------------------------------------


def _files(top: Path) -> Iterator[tuple[str, list[int]]]:
    """(relative path, [bytes, mtime_ns]) of all regular files below `top`; links are not followed."""
    for directory, directories, files in os.walk(top):
        directories[:] = sorted(name for name in directories if name != NOT_OUTPUT)
        for name in sorted(files):
            path = f"{directory}/{name}"
            with contextlib.suppress(FileNotFoundError):
                facts = os.lstat(path)
                if stat.S_ISREG(facts.st_mode):
                    yield path[len(str(top)) + 1 :], [facts.st_size, facts.st_mtime_ns]


def _save(attempt: _Attempt) -> tuple[int, int]:
    """List what the job left in outputs.json and remove what was only for its lifetime: (files, bytes). Blocks."""
    directory = attempt.directory
    before: dict[str, list[int]] = {}
    with contextlib.suppress(FileNotFoundError):
        before = json.loads((directory / "before.json").read_bytes())
    outputs = {path: state[0] for path, state in _files(attempt.work) if before.get(path) != state}
    _write_json(directory / "outputs.json", list(outputs.items()))
    for name in ("home", "tmp"):
        shutil.rmtree(directory / name, ignore_errors=True)
    (directory / "environment").unlink(missing_ok=True)
    return len(outputs), sum(outputs.values())


def _write_json(path: Path, document: object) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(document))
    temporary.replace(path)
