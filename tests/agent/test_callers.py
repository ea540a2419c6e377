"""The control socket tells people from what jobs started."""

import os
import subprocess
import sys

from meshgpu.agent.callers import descends_from


def test_process_descends_from_itself_and_its_ancestors() -> None:
    assert descends_from(os.getpid(), {os.getpid()})
    assert descends_from(os.getpid(), {os.getppid()})


def test_grandchild_is_recognised() -> None:
    inner = "import subprocess, sys; subprocess.run(['sh', '-c', 'echo $$; read line'], stdin=sys.stdin)"
    child = subprocess.Popen([sys.executable, "-c", inner], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    assert descends_from(grandchild, {child.pid})
    assert not descends_from(os.getpid(), {child.pid})
    child.communicate("done\n", timeout=10)


def test_process_that_cannot_be_looked_at_counts_as_a_job() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert descends_from(gone.pid, {os.getpid()})


def test_without_jobs_everybody_is_a_person() -> None:
    assert not descends_from(2**22 + 1, frozenset())
