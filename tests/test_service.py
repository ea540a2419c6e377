"""The service's promise, without systemd: what it does to the agent with KillMode=process leaves jobs alone."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshgpu.cli import service

pytestmark = pytest.mark.slow

MESHGPU = str(Path(sys.executable).parent / "meshgpu")
DEADLINE_S = 60.0
COUNT = "import time\nfor i in range(60):\n    print('line', i, flush=True)\n    time.sleep(0.1)\n"


class Service:
    """Runs ExecStart of the unit that `install` writes, and ends the main process alone, as systemd would."""

    def __init__(self, directory: Path) -> None:
        self.home = directory / "home"
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith("MESHGPU_")} | {
            "MESHGPU_HOME": str(self.home),
            "MESHGPU_LOOPBACK": "true",
            "MESHGPU_LINK_PORT": "0",
            "MESHGPU_PAIRING_PORT": "0",
            "MESHGPU_KEEP_FREE_GB": "0",
        }
        text = service.unit_text(self.home, turned_lingering_on=False)
        self.settings = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and line[0] != "#")
        self.main: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.main = subprocess.Popen(
            shlex.split(self.settings["ExecStart"]),
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until(lambda: self.call("version", "--json")["agent"] is not None)

    def end(self, number: signal.Signals) -> int:
        """KillMode=process: the signal reaches the main process and nothing else."""
        assert self.main is not None
        self.main.send_signal(number)
        return self.main.wait(float(self.settings["TimeoutStopSec"]))

    def run(self, *arguments: str, directory: Path | None = None) -> str:
        done = subprocess.run(
            [MESHGPU, *arguments],
            env=self.environ,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, f"meshgpu {arguments} ended with {done.returncode}\n{done.stderr}"
        return done.stdout

    def call(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


@pytest.fixture
def unit() -> Iterator[Service]:
    """In a short directory: the control socket's path must fit."""
    directory = Path(tempfile.mkdtemp(prefix="mgs-"))
    running = Service(directory)
    try:
        yield running
    finally:
        if running.main is not None and running.main.poll() is None:
            running.end(signal.SIGTERM)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_job_runs_on_while_the_service_restarts(unit: Service, tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "count.py").write_text(COUNT)
    unit.start()
    unit.run("init", "--mesh", "lab", "--name", "rig", "--yes")
    job = json.loads(unit.run("run", "-d", "--json", "-g", "0", "--", "python", "count.py", directory=tmp_path))["id"]
    until(lambda: "line 3" in unit.run("logs", job))

    ended = unit.end(number)
    is_spared = ended == int(unit.settings["RestartPreventExitStatus"])
    assert is_spared == (number is signal.SIGTERM), "systemd restarts an agent that was killed, not one told to stop"
    unit.start()

    unit.run("wait", job)
    assert [int(n) for n in re.findall(r"^line (\d+)$", unit.run("logs", job), re.MULTILINE)] == list(range(60))
    (row,) = unit.call("ps", "-a", "--json")["jobs"]
    assert (row["state"], row["epoch"]) == ("succeeded", 1)


def test_agent_that_is_told_to_go_down_stays_down(unit: Service) -> None:
    unit.start()
    unit.run("down")
    assert unit.main is not None
    assert unit.main.wait(DEADLINE_S) == int(unit.settings["RestartPreventExitStatus"])


def test_why_explains_a_job_that_waits_and_one_that_ran(unit: Service, tmp_path: Path) -> None:
    (tmp_path / "count.py").write_text(COUNT)
    unit.start()
    unit.run("init", "--mesh", "lab", "--name", "rig", "--yes")
    cpus = unit.call("machines", "--json")["machines"][0]["cpus"]
    busy = f"--cpus {cpus} -g 0 -d --json --name first -- python count.py".split()
    first = json.loads(unit.run("run", *busy, directory=tmp_path))["id"]
    until(lambda: unit.call("info", first, "--json")["job"]["phase"] == "running")
    second = json.loads(unit.run("run", "-d", "--json", "-g", "0", "--name", "second", "--", "true"))["id"]
    until(lambda: unit.call("info", second, "--json")["job"]["reason"] != "")

    waiting = unit.run("why", second)
    assert f"rig      -    is busy: 0 of {cpus} processors free, the job asks for 1" in waiting
    assert "end of first-" in waiting
    assert "where: rig" in unit.run("why", first)
    unit.run("kill", first)
    unit.run("wait", second)
    assert "why there: one of the machines that had room" in unit.run("why", second)
