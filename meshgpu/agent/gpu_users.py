"""Who uses the GPUs: which of their processes are jobs of ours, and what the others are called."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from meshgpu.agent.callers import descends_from
from meshgpu.model.inventory import GpuProcess, GpuReading


class Jobs(Protocol):
    """What tells a job's process from others."""

    def guards(self) -> frozenset[int]:
        """Pids of which every process of a job descends that runs in no container."""
        ...

    def containers(self) -> frozenset[str]:
        """Ids of the containers that jobs run in."""
        ...


def without_jobs(readings: Iterable[GpuReading], jobs: Jobs) -> tuple[GpuReading, ...]:
    """The readings with the processes that are no job's, by name. One that has ended meanwhile is none."""
    readings = tuple(readings)
    if not any(reading.processes for reading in readings):
        return readings
    guards, containers = jobs.guards(), jobs.containers()
    return tuple(
        replace(reading, processes=tuple(_strangers(reading.processes, guards, containers))) for reading in readings
    )


def _strangers(
    processes: Iterable[GpuProcess], guards: frozenset[int], containers: frozenset[str]
) -> Iterable[GpuProcess]:
    for process in processes:
        home = Path(f"/proc/{process.pid}")
        try:
            name, group = (home / "comm").read_text().strip(), (home / "cgroup").read_text()
        except OSError:
            continue
        if not descends_from(process.pid, guards) and not any(container in group for container in containers):
            yield replace(process, name=name)
