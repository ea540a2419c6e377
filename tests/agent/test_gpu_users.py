"""Which processes on a GPU are jobs of ours."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshgpu.agent.gpu_users import without_jobs
from meshgpu.model.ids import GpuId
from meshgpu.model.inventory import GpuProcess, GpuReading, ProcessKind


class Jobs:
    def __init__(self, guards: frozenset[int] = frozenset(), containers: frozenset[str] = frozenset()) -> None:
        self.guards, self.containers = (lambda: guards), (lambda: containers)


@pytest.fixture
def child() -> Iterator[int]:
    """A child of this process, as a job is one of its guard's."""
    with subprocess.Popen([sys.executable, "-c", "print(); input()"], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()  # only now it has the name that it keeps
        yield process.pid
        process.kill()


def strangers(pid: int, jobs: Jobs) -> list[str]:
    reading = GpuReading(GpuId("GPU-1"), processes=(GpuProcess(pid, ProcessKind.COMPUTE),))
    (found,) = without_jobs([reading], jobs)
    return [process.name for process in found.processes]


def test_stranger_is_named_as_the_kernel_has_it(child: int) -> None:
    (name,) = strangers(child, Jobs())
    assert name == Path(f"/proc/{child}/comm").read_text().strip()


def test_what_descends_from_a_guard_is_a_job(child: int) -> None:
    assert strangers(child, Jobs(guards=frozenset([os.getpid()]))) == []
    assert len(strangers(child, Jobs(guards=frozenset([child + 10**6])))) == 1


def test_what_lives_in_the_control_group_of_a_jobs_container_is_a_job(child: int) -> None:
    group = Path(f"/proc/{child}/cgroup").read_text().splitlines()[0]
    assert strangers(child, Jobs(containers=frozenset([group]))) == []
    assert len(strangers(child, Jobs(containers=frozenset(["f" * 64])))) == 1


def test_process_that_has_ended_counts_for_nothing() -> None:
    assert strangers(2**22 + 5, Jobs()) == []
