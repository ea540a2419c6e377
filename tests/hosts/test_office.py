"""Three machines on one switch, real agents, the command line as people use it."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.hosts]

COUNT = "import time\nfor i in range({lines}):\n    print('line', i, flush=True)\n    time.sleep({pause})\n"


@pytest.fixture(scope="module")
def lab(office: Any) -> Any:
    """A mesh of ada, bob and cyd, all of one user, with bob lending only to his owner unless he is fenced."""
    hosts = [office.host(name) for name in ("ada", "bob", "cyd")]
    office.form_mesh(*hosts)
    return hosts


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "count.py").write_text(COUNT.format(lines=100, pause=0.1))
    (tmp_path / "quick.py").write_text(COUNT.format(lines=5, pause=0.01))
    return tmp_path


def lines_of(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^line (\d+)$", text, re.MULTILINE)]


def submit(host: Any, project: Path, machine: str, *command: str) -> str:
    done = host.meshgpu("run", "-d", "--json", "-m", machine, "--", *command, directory=project)
    return str(json.loads(done.stdout)["id"])


def job(host: Any, name: str) -> Any:
    return next(row for row in host.json("ps", "-a")["jobs"] if row["id"] == name)


def test_machines_discover_each_other_without_any_address(lab: Any) -> None:
    ada = lab[0]
    seen = json.loads(ada.meshgpu("discover", "--json").stdout)["machines"]
    assert {row["name"] for row in seen if row["ours"]} == {"ada", "bob", "cyd"}


def test_job_runs_on_the_machine_that_was_named(lab: Any, project: Path) -> None:
    ada = lab[0]
    done = ada.meshgpu(
        "run", "-m", "bob", "--", "sh", "-c", "cat quick.py; echo on $MESHGPU_MACHINE", directory=project
    )
    assert (project / "quick.py").read_text() in done.stdout
    assert done.stdout.endswith("on bob\n")


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("true", 0)])
def test_exit_code_of_the_job_comes_back(lab: Any, project: Path, command: str, code: int) -> None:
    lab[0].meshgpu("run", "-m", "cyd", "--", "sh", "-c", command, directory=project, code=code)


@pytest.mark.parametrize(("command", "code"), [("no-such-command", 127), ("./count.py", 126)])
def test_command_that_cannot_run_says_so(lab: Any, project: Path, command: str, code: int) -> None:
    done = lab[0].meshgpu("run", "-m", "bob", "--", command, directory=project, code=code)
    assert command in done.stderr


def test_unknown_machine_is_refused_with_the_nearest_name(lab: Any, project: Path) -> None:
    done = lab[0].meshgpu("run", "-m", "bobb", "--", "true", directory=project, code=None)
    assert done.returncode != 0
    assert "did you mean -m bob?" in done.stderr


def test_machine_without_enough_gpus_is_refused(lab: Any, project: Path) -> None:
    done = lab[0].meshgpu("run", "-m", "bob", "-g", "2", "--", "true", directory=project, code=None)
    assert done.returncode != 0
    assert "no GPU" in done.stderr


def test_what_the_job_leaves_is_fetched_from_any_machine(lab: Any, project: Path, tmp_path: Path) -> None:
    ada, _, cyd = lab
    name = submit(ada, project, "bob", "sh", "-c", "mkdir -p out; echo hello > out/greeting.txt")
    cyd.meshgpu("wait", name)
    assert "out/greeting.txt" in cyd.meshgpu("ls", f"runs/{name}").stdout
    target = tmp_path / "fetched"
    target.mkdir()
    cyd.meshgpu("cp", f"runs/{name}/out/greeting.txt", str(target))
    assert (target / "greeting.txt").read_text() == "hello\n"


def test_stop_ends_the_job_and_keeps_what_it_saved(lab: Any, project: Path) -> None:
    (project / "careful.py").write_text(
        "import signal, sys, time\n"
        "def save(*_):\n    open('saved.txt', 'w').write('saved'); sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    ada = lab[0]
    name = submit(ada, project, "bob", "python", "careful.py")
    follower = ada.start("logs", "-f", name)
    assert follower.stdout is not None
    assert follower.stdout.readline() == "ready\n"
    ada.meshgpu("stop", name)
    assert follower.wait(timeout=30) == 3
    follower.communicate()
    assert job(ada, name)["state"] == "cancelled"
    assert "saved.txt" in ada.meshgpu("ls", f"runs/{name}").stdout


def test_ctrl_c_detaches_and_the_job_runs_on(lab: Any, project: Path, wait_until: Callable[..., None]) -> None:
    ada = lab[0]
    runner = ada.start("run", "-m", "bob", "--", "python", "count.py", directory=project)
    assert runner.stdout is not None
    runner.stdout.readline()
    runner.send_signal(signal.SIGINT)
    _, err = runner.communicate(timeout=20)
    assert "meshgpu logs -f" in err
    name = next(row["id"] for row in ada.json("ps")["jobs"] if "count.py" in row["command"])
    ada.meshgpu("kill", name)
    wait_until(lambda: job(ada, name)["state"] == "cancelled")


def test_command_line_killed_leaves_the_job_running(lab: Any, project: Path) -> None:
    ada, _, cyd = lab
    runner = ada.start("run", "-m", "bob", "--", "python", "-c", COUNT.format(lines=20, pause=0.1), directory=project)
    assert runner.stdout is not None
    runner.stdout.readline()
    runner.kill()
    runner.communicate()
    name = next(row["id"] for row in cyd.json("ps")["jobs"])
    cyd.meshgpu("wait", name)
    assert lines_of(cyd.meshgpu("logs", name).stdout) == list(range(20))


def test_agent_killed_in_mid_job_loses_and_doubles_no_line(lab: Any, project: Path) -> None:
    ada, bob, _ = lab
    (project / "long.py").write_text(COUNT.format(lines=150, pause=0.1))
    runner = ada.start("run", "-m", "bob", "--", "python", "long.py", directory=project)
    assert runner.stdout is not None
    first = runner.stdout.readline()
    bob.kill_agent()
    time.sleep(2.0)
    bob.meshgpu("up")
    out, err = runner.communicate(timeout=60)
    assert runner.returncode == 0, err
    assert lines_of(first + out) == list(range(150))


def test_machine_cut_off_for_30_s_goes_on_with_the_same_attempt(lab: Any, project: Path) -> None:
    ada, bob, _ = lab
    (project / "long.py").write_text(COUNT.format(lines=400, pause=0.1))
    runner = ada.start("run", "-m", "bob", "--", "python", "long.py", directory=project)
    assert runner.stdout is not None
    first = runner.stdout.readline()
    bob.cut()
    time.sleep(30.0)  # a machine that vanished is noticed within 25 s
    copies = subprocess.run(["pgrep", "-fc", "python long.py"], capture_output=True, text=True, check=False)
    bob.heal()
    out, err = runner.communicate(timeout=90)
    assert runner.returncode == 0, err
    assert lines_of(first + out) == list(range(400))
    assert "out of touch" in err
    assert int(copies.stdout) >= 1
    done = next(row for row in ada.json("ps", "-a")["jobs"] if "long.py" in row["command"])
    assert done["epoch"] == 1
