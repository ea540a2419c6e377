"""Sends each attempt to the executor of its kind: to containers where it has an image, else to processes."""

from collections.abc import Callable
from pathlib import Path

from meshgpu.adapters.docker_executor import DockerExecutor
from meshgpu.adapters.process_executor import ProcessExecutor
from meshgpu.model.ids import JobId
from meshgpu.model.job import AttemptPlan, StopMode
from meshgpu.ports import ExecutorEvent


class Executors:
    """The port `Executor` over both of them."""

    def __init__(self, processes: ProcessExecutor, containers: DockerExecutor) -> None:
        self._processes = processes
        self._containers = containers

    async def start(self, emit: Callable[[ExecutorEvent], None]) -> None:
        await self._processes.start(emit)
        await self._containers.start(emit)

    def run(self, plan: AttemptPlan, tree: Path) -> None:
        self._of(plan).run(plan, tree)

    def adopt(self, plan: AttemptPlan) -> None:
        self._of(plan).adopt(plan)

    def stop(self, job: JobId, epoch: int, mode: StopMode) -> None:
        for executor in (self._processes, self._containers):  # each ignores attempts that it does not have
            executor.stop(job, epoch, mode)

    def fence(self) -> str:
        return self._processes.fence()

    def fence_reason(self) -> str:
        """Why the fence is not a stronger one, for people; empty for the strongest."""
        return self._processes.fence_reason()

    def guards(self) -> frozenset[int]:
        """Pids of which every process of a job descends that runs in no container."""
        return self._processes.guards() | self._containers.guards()

    def containers(self) -> frozenset[str]:
        """Ids of the containers that jobs run in."""
        return self._containers.containers()

    async def close(self) -> None:
        await self._processes.close()
        await self._containers.close()

    def _of(self, plan: AttemptPlan) -> ProcessExecutor | DockerExecutor:
        return self._containers if plan.image else self._processes
