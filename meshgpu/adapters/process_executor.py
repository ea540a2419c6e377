"""Executor port over plain processes: shut in where a fence is needed, in a Python environment of their own."""

import asyncio
import os
import pwd
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from meshgpu.adapters import fences, guards, inside, job_trees, results
from meshgpu.adapters.guarded import KEEP_LOG, STOP_GRACE_S, Attempt, GuardedExecutor, Unseal, nothing_sealed
from meshgpu.errors import MeshgpuError
from meshgpu.guard import ExitRecord, LedgerBounds, Request
from meshgpu.model.job import Phase
from meshgpu.ports import Environment, Environments, ExecutorEvent

PASSED_ON: Final = ("LANG", "TZ")
"""What a job inherits of the agent's environment, with LC_*; the rest may hold keys."""

TAG_CHARACTERS: Final = 4
"""Of an environment's key, as people see it."""


class ProcessExecutor(GuardedExecutor):
    """Runs attempts as processes of this machine.

    fence: found by trial where it is not given. grace_s: between SIGTERM and SIGKILL of a stop.
    """

    def __init__(
        self,
        jobs_dir: Path,
        environments: Environments,
        *,
        fence: fences.Fence | None = None,
        grace_s: float = STOP_GRACE_S,
        unseal: Unseal = nothing_sealed,
        ledger: LedgerBounds = KEEP_LOG,
    ) -> None:
        super().__init__(jobs_dir, unseal, ledger)
        self._environments = environments
        self._fence = fence
        self._grace_s = grace_s

    async def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        if self._fence is None:
            self._fence = await asyncio.to_thread(fences.find_fence)
        await super().start(emit)
        await self._server.start()

    def fence(self) -> str:
        return self._fence.name if self._fence else ""

    def fence_reason(self) -> str:
        """Why the fence is not a stronger one, for people; empty for the strongest."""
        return self._fence.reason if self._fence else ""

    async def _stage(self, attempt: Attempt) -> Request:
        plan = attempt.plan
        if plan.fenced and not self.fence():
            raise MeshgpuError("no-fence", f"cannot run {plan.spec.user}'s job: nothing shuts it in on this machine")
        environment = await self._environments.build(
            plan, attempt.work, lambda detail: self._progress(attempt, Phase.STAGING, detail)
        )
        self._progress(attempt, Phase.STAGING, _environment_words(environment))
        return await asyncio.to_thread(_prepare, attempt, environment, self._fence, self._grace_s, self._ledger)

    def _entrust(self, attempt: Attempt, request: Request, secrets: Mapping[str, str]) -> Request:
        if attempt.plan.fenced:  # its environment is a file, and what makes the fence must not have the job's variables
            return {**request, "given": fences.exports(secrets)}
        return {**request, "env": {**secrets, **request["env"]}}

    async def _clear(self, attempt: Attempt, exited: ExitRecord | None) -> None:
        await asyncio.to_thread(_clear, attempt, exited)


def _environment_words(environment: Environment) -> str:
    """`environment 3f2a (cached)`, or what it was built from."""
    return f"environment {environment.key[:TAG_CHARACTERS]} ({'cached' if environment.cached else environment.source})"


# -- before the job --------------------------------------------------------------------------------------------------


def _prepare(
    attempt: Attempt, environment: Environment, fence: fences.Fence | None, grace_s: float, ledger: LedgerBounds
) -> Request:
    """Put on disk what the guard needs. Blocks."""
    plan, directory = attempt.plan, attempt.directory
    argv = ["sh", "-c", plan.spec.command[0]] if plan.spec.shell else [*plan.spec.command]
    results.note_inputs(directory)
    results.note_staged(directory, environment=environment.key)
    variables = {**_outer_variables(), **_account_variables(attempt, fence), **_job_variables(attempt, environment)}
    if plan.fenced:
        assert fence is not None
        enclosure = fences.Enclosure(
            attempt.work,
            directory / "home",
            directory / "tmp",
            directory / "environment",
            fences.interpreter_paths(environment.bin_path, environment.interpreter),
            fences.gpu_devices([share.uuid for share in plan.gpus]),
        )
        enclosure.home.mkdir(exist_ok=True)
        enclosure.tmp.mkdir(exist_ok=True)
        inside.put_into(enclosure.home)
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
        after=[],
        given="",
        timeout_s=plan.spec.timeout_s,
        ledger=ledger,
    )


def _outer_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith("LC_")}


def _account_variables(attempt: Attempt, fence: fences.Fence | None) -> dict[str, str]:
    if attempt.plan.fenced and fence is not None:
        tmp = "/tmp" if fence.name == "bubblewrap" else str(attempt.directory / "tmp")  # noqa: S108 - its own /tmp
        return {"HOME": str(attempt.directory / "home"), "TMPDIR": tmp, "USER": fences.account(fence)}
    account = pwd.getpwuid(os.geteuid())
    return {"HOME": account.pw_dir, "USER": account.pw_name}


def _job_variables(attempt: Attempt, environment: Environment) -> dict[str, str]:
    plan = attempt.plan
    asked = dict(plan.spec.env)
    library = inside.place_in(attempt.directory / "home") if plan.fenced else inside.LIBRARY
    return {
        "PATH": f"{environment.bin_path}:{fences.CLEAN_ENVIRONMENT['PATH']}",
        **asked,
        **inside.variables(library, attempt.work, asked),
        "VIRTUAL_ENV": str(environment.bin_path.parent),
        "MESHGPU_JOB_ID": plan.spec.job,
        "MESHGPU_MACHINE": plan.machine,
        "MESHGPU_OUTPUT_DIR": str(attempt.work),
        "CUDA_VISIBLE_DEVICES": ",".join(share.uuid for share in plan.gpus),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTHONUNBUFFERED": "1",
    }


def _clear(attempt: Attempt, exited: ExitRecord | None) -> None:
    """Kill what a killed guard could not take along, and remove what was only for the job's lifetime. Blocks."""
    if exited is None:
        guards.kill_leftovers(attempt.work)
    for name in ("home", "tmp"):
        job_trees.remove_tree(attempt.directory / name)
    (attempt.directory / "environment").unlink(missing_ok=True)
