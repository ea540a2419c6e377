"""What every executor promises, asked of each."""

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from meshgpu.adapters.docker_executor import DockerExecutor
from meshgpu.adapters.fences import Fence
from meshgpu.adapters.guarded import GuardedExecutor
from meshgpu.adapters.process_executor import ProcessExecutor
from meshgpu.agent.executors import Executors
from meshgpu.model.ids import JobId, NodeId, digest
from meshgpu.model.job import AttemptPlan, AttemptState, Result, StopMode
from meshgpu.model.receipt import NO_EVIDENCE
from meshgpu.ports import AttemptEnded, AttemptStarted, Environment
from tests.adapters.test_docker_executor import JOB, Rig, engine, node, plan
from tests.images.busybox import IMAGE

__all__ = ["engine", "node"]
KINDS = ["process", "container"]


class ThisInterpreter:
    async def build(self, plan: AttemptPlan, tree: Path, progress: Callable[[str], None]) -> Environment:
        progress("environment: none")
        await asyncio.sleep(0)
        return Environment(Path(sys.executable).parent, "k7qd", cached=True, source="none")


class Kind:
    """Makes rigs of one kind, and the plans that fit them."""

    def __init__(self, name: str, jobs_dir: Path, engine: Path | None, node: str) -> None:
        self.name, self._jobs_dir, self._engine, self._node = name, jobs_dir, engine, node
        self._rigs: list[Rig] = []

    async def rig(self) -> Rig:
        executor: GuardedExecutor = ProcessExecutor(self._jobs_dir, ThisInterpreter(), fence=Fence(""))
        if self._engine:
            executor = DockerExecutor(self._jobs_dir, NodeId(self._node), engine=self._engine)
        rig = Rig(self._jobs_dir, self._engine or Path("/none"), self._node, executor=executor)
        self._rigs.append(rig)
        await rig.start()
        return rig

    def plan(self, command: str) -> AttemptPlan:
        return plan(command, shell=True, image=IMAGE if self._engine else "")

    async def close(self) -> None:
        for rig in self._rigs:
            await rig.executor.close()


@pytest.fixture(params=KINDS)
async def kind(request: pytest.FixtureRequest, tmp_path: Path, node: str) -> AsyncIterator[Kind]:
    engine = request.getfixturevalue("engine") if request.param == "container" else None
    kind = Kind(request.param, tmp_path / "jobs", engine, node)
    yield kind
    await kind.close()


async def test_attempt_is_told_once_with_its_code_and_outputs(kind: Kind) -> None:
    rig = await kind.rig()
    rig.submit(kind.plan("echo out; echo err >&2; echo data > result; exit 7"))
    assert await rig.ended() == Result(AttemptState.EXITED, 7, "", 1, 5)
    assert rig.printed() == "out\n"
    assert json.loads((rig.attempt / "outputs.json").read_text()) == [["result", 5]]
    told = [event for event in rig.events if isinstance(event, AttemptStarted | AttemptEnded)]
    assert [type(event) for event in told] == [AttemptStarted, AttemptEnded]


async def test_end_brings_what_can_be_vouched_for(kind: Kind) -> None:
    rig = await kind.rig()
    rig.submit(kind.plan("echo out; exit 7"))
    await rig.ended()
    evidence = next(event.evidence for event in rig.events if isinstance(event, AttemptEnded))
    assert evidence.log == digest((rig.attempt / "log").read_bytes())
    if kind.name == "process":
        assert (evidence.environment, evidence.image) == ("k7qd", "")
    else:
        assert evidence.environment == ""
        assert evidence.image.startswith("sha256:")


async def test_end_that_another_agent_sees_brings_the_same(kind: Kind) -> None:
    rig = await kind.rig()
    rig.submit(kind.plan("echo out; sleep 1"))
    await rig.until(AttemptStarted)
    await rig.executor.close()
    fresh = await kind.rig()
    fresh.executor.adopt(kind.plan("echo out; sleep 1"))
    await fresh.ended()
    evidence = next(event.evidence for event in fresh.events if isinstance(event, AttemptEnded))
    assert evidence.log == digest((rig.attempt / "log").read_bytes())
    assert evidence.environment or evidence.image


async def test_what_never_ran_brings_no_evidence(kind: Kind) -> None:
    rig = await kind.rig()
    plan = kind.plan("true")
    rig.executor.adopt(plan)
    await rig.ended()
    assert [event.evidence for event in rig.events if isinstance(event, AttemptEnded)] == [NO_EVIDENCE]


async def test_second_run_of_an_attempt_is_ignored(kind: Kind) -> None:
    rig = await kind.rig()
    rig.submit(kind.plan("echo once"))
    rig.submit(kind.plan("echo twice"))
    await rig.ended()
    assert rig.printed() == "once\n"


async def test_stop_lets_the_job_end_by_itself(kind: Kind) -> None:
    rig = await kind.rig()
    rig.submit(kind.plan("trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done"))
    await rig.says("ready")
    rig.executor.stop(JOB, 1, StopMode.STOP)
    assert (await rig.ended()).exit_code == 3


async def test_kill_overrides_a_stop_that_is_waiting(kind: Kind) -> None:
    rig = await kind.rig()
    rig.submit(kind.plan("trap 'echo told' TERM; echo ready; while :; do sleep 0.1; done"))
    await rig.says("ready")
    rig.executor.stop(JOB, 1, StopMode.STOP)
    await rig.says("told")
    rig.executor.stop(JOB, 1, StopMode.KILL)
    assert (await rig.ended()).exit_code == 137


async def test_job_that_runs_too_long_is_ended_and_says_so(kind: Kind) -> None:
    rig = await kind.rig()
    job = kind.plan("trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done")
    rig.submit(replace(job, spec=replace(job.spec, timeout_s=1.0)))
    assert await rig.ended() == Result(AttemptState.TIMED_OUT, 3)
    assert rig.printed() == "ready\n"


async def test_job_runs_no_longer_than_it_may_though_its_executor_is_gone(kind: Kind) -> None:
    job = kind.plan("echo ready; exec sleep 600")
    job = replace(job, spec=replace(job.spec, timeout_s=1.5))
    rig = await kind.rig()
    rig.submit(job)
    await rig.says("ready")
    await rig.executor.close()
    await asyncio.sleep(2.0)
    fresh = await kind.rig()
    fresh.executor.adopt(job)
    assert (await fresh.ended()).outcome is AttemptState.TIMED_OUT


async def test_stop_during_staging_abandons_the_attempt(kind: Kind) -> None:
    rig = await kind.rig()
    rig.submit(kind.plan("sleep 600"))
    await asyncio.sleep(0)
    rig.executor.stop(JOB, 1, StopMode.STOP)
    assert await rig.ended() == Result(AttemptState.ABANDONED, None, "stopped before it started")


async def test_stop_of_an_unknown_attempt_is_ignored(kind: Kind) -> None:
    rig = await kind.rig()
    rig.executor.stop(JobId("other"), 1, StopMode.KILL)
    assert rig.events == []


async def test_job_runs_on_without_its_executor_and_is_adopted(kind: Kind) -> None:
    job = kind.plan("echo ready; while [ ! -e go ]; do sleep 0.05; done; echo done; exit 5")
    rig = await kind.rig()
    rig.submit(job)
    await rig.says("ready")
    await rig.executor.close()
    fresh = await kind.rig()
    assert fresh.executor.guards()
    fresh.executor.adopt(job)
    await fresh.until(AttemptStarted)
    (fresh.work / "go").touch()
    assert (await fresh.ended()).exit_code == 5
    assert fresh.printed() == "ready\ndone\n"


async def test_attempt_that_ended_meanwhile_is_told_once(kind: Kind) -> None:
    job = kind.plan("exit 5")
    rig = await kind.rig()
    rig.submit(job)
    await rig.until(AttemptStarted)
    await rig.executor.close()
    fresh = await kind.rig()
    fresh.executor.adopt(job)
    fresh.executor.adopt(job)
    assert (await fresh.ended()).exit_code == 5
    assert len([event for event in fresh.events if isinstance(event, AttemptEnded)]) == 1


async def test_adopted_attempt_that_never_started_has_crashed(kind: Kind) -> None:
    rig = await kind.rig()
    rig.executor.adopt(kind.plan("true"))
    assert (await rig.ended()).outcome is AttemptState.CRASHED


async def test_image_decides_which_executor_runs_a_job(tmp_path: Path, engine: Path, node: str) -> None:
    processes = ProcessExecutor(tmp_path, ThisInterpreter(), fence=Fence("landlock"))
    executors = Executors(processes, DockerExecutor(tmp_path, NodeId(node), engine=engine))
    rig = Rig(tmp_path, engine, node, executor=executors)
    await rig.start()
    assert executors.fence() == "landlock"
    for image, printed, guards in (("", "\nready\n", 1), (IMAGE, "1\nready\n", 2)):
        rig.events.clear()
        shutil.rmtree(rig.attempt, ignore_errors=True)
        rig.submit(plan("echo $FROM_IMAGE; echo ready; sleep 600", shell=True, image=image))
        await rig.says("ready")
        assert len(executors.guards()) == guards  # a container's first process counts, too
        executors.stop(JOB, 1, StopMode.KILL)
        await rig.ended()
        assert rig.printed() == printed
    await executors.close()
