"""A secret on its way through real agents: it is searched for wherever it must not be. And what others may see."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.hosts]

CANARY = "c4n4ry-7f3e9a52d1 $HOME 'x'"
PRINT = (
    "import hashlib, os, pathlib, time\n"
    "print('digest', hashlib.sha256(os.environ['TOKEN'].encode()).hexdigest(), flush=True)\n"
    "while not pathlib.Path('go').exists():\n"
    "    time.sleep(0.05)\n"
)
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def lab(office: Any) -> Any:
    """ada and bob are hers, eve is another user's."""
    ada, bob, eve = (office.host(name) for name in ("ada", "bob", "eve"))
    office.form_mesh(ada, bob)
    office.join(ada, eve, "--user", "eve")
    return ada, bob, eve


@pytest.fixture
def project(tmp_path: Path) -> Path:
    directory = tmp_path / "project"
    directory.mkdir()
    return directory


def needles(text: str) -> list[bytes]:
    """The forms in which the canary could stand somewhere; base64 at each of its three offsets."""
    data = text.encode()
    forms = [data, data.hex().encode(), text.split()[0].encode(), json.dumps(text).encode()]
    for offset in range(3):
        whole = base64.b64encode(b"x" * offset + data)
        forms += [whole[4:-4], base64.urlsafe_b64encode(b"x" * offset + data)[4:-4]]
    return forms


def found_in(data: bytes) -> bool:
    return any(needle in data for needle in needles(CANARY))


def files_below(*tops: Path) -> Iterator[tuple[Path, bytes]]:
    for top in tops:
        for path in top.rglob("*"):
            try:
                if path.is_file() and not path.is_symlink():
                    yield path, path.read_bytes()
            except OSError:
                continue


def of_processes(what: str) -> Iterator[tuple[str, bytes]]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            yield entry.name, (entry / what).read_bytes()
        except OSError:
            continue


@pytest.mark.parametrize("machine", ["ada", "bob", "eve"], ids=["here", "there", "fenced"])
def test_secret_is_nowhere_but_in_the_jobs_own_environment(
    lab: Any, project: Path, machine: str, wait_until: Callable[..., None]
) -> None:
    ada = lab[0]
    (project / "show.py").write_text(PRINT)
    ada.settings["TOKEN"] = CANARY
    try:
        options = ("--secret", "TOKEN", "--no-env", "-g", "0", "-m", machine)
        process = ada.start("run", *options, "--", "python3", "show.py", directory=project)
    finally:
        del ada.settings["TOKEN"]
    runner = next(host for host in lab if host.name == machine)
    wait_until(lambda: "digest" in "".join(_logs(ada)), "the job said nothing")
    name = next(job for job in ada.json("ps")["jobs"] if job["name"] == "show")["id"]
    told = ada.meshgpu("info", name, "--json").stdout + ada.meshgpu("info", name, "-v").stdout
    told += ada.meshgpu("ps", "-a", "--json").stdout + ada.meshgpu("why", name, "--json").stdout
    assert json.loads(ada.meshgpu("info", name, "--json").stdout)["job"]["secrets"] == ["TOKEN"]

    holders = {pid for pid, data in of_processes("environ") if CANARY.encode() in data}
    client = str(process.pid)
    jobs = {pid for pid, data in of_processes("cmdline") if b"show.py" in data and b"meshgpu" not in data}
    assert holders & jobs, "the search finds what is there"
    assert holders <= jobs | _descendants(client) | {client}, "no other process has it in its environment"
    assert not any(found_in(data) for _, data in of_processes("cmdline"))
    searched = [path for path, data in files_below(*(host.home for host in lab)) if not found_in(data)]
    assert len(searched) > 20
    assert [path for path, data in files_below(*(host.home for host in lab)) if found_in(data)] == []

    works = list((runner.home / "jobs" / name).glob("*/work"))
    (works[0] / "go").touch()
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    assert f"digest {hashlib.sha256(CANARY.encode()).hexdigest()}" in out
    assert not found_in((out + err + told).encode())
    wait_until(lambda: not ada.json("ps")["jobs"], "the job did not end")
    assert [path for path, data in files_below(*(host.home for host in lab)) if found_in(data)] == []


def _logs(host: Any) -> list[str]:
    return [
        host.meshgpu("logs", job["id"], code=None).stdout for job in host.json("ps")["jobs"] if job["name"] == "show"
    ]


def _descendants(pid: str) -> set[str]:
    """`ip netns exec` becomes the command; what it starts counts as the command line's."""
    found: set[str] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "stat").read_text().rpartition(")")[2].split()[1] == pid:
                found |= {entry.name, *_descendants(entry.name)}
        except OSError:
            continue
    return found


# -- what others see -------------------------------------------------------------------------------------------------


def submitted(host: Any, project: Path, *options: str) -> str:
    """A job on eve's machine that has ended, by its id."""
    command = ("sh", "-c", "echo printed; echo left > left")
    done = host.meshgpu("run", "-d", "--json", "-g", "0", "-m", "eve", *options, "--", *command, directory=project)
    job = str(json.loads(done.stdout)["id"])
    host.meshgpu("wait", job)
    return job


def test_owner_cannot_read_another_users_job_and_nobody_else_can(lab: Any, project: Path) -> None:
    ada, bob, eve = lab
    job = submitted(ada, project)
    for command in (("logs", job), ("info", job), ("ls", f"runs/{job}"), ("why", job), ("stop", job)):
        refused = eve.meshgpu(*command, code=125)
        assert f"cannot find a job {job} among yours" in refused.stderr
    missing = "z" * 26
    said = eve.meshgpu("logs", job, code=125).stderr.replace(job, missing)
    assert said == eve.meshgpu("logs", missing, code=125).stderr
    assert job not in eve.meshgpu("ps", "-a", "--all-users", "--json").stdout
    assert bob.meshgpu("logs", job).stdout == "printed\n"  # the same user, on another machine


def test_shared_job_is_seen_by_all_and_stopped_by_its_user_only(lab: Any, project: Path) -> None:
    ada, _, eve = lab
    job = submitted(ada, project, "--share")
    assert eve.meshgpu("logs", job).stdout == "printed\n"
    assert eve.json("info", job)["job"]["user"] == ada.json("info", job)["job"]["user"]
    assert "left" in eve.meshgpu("ls", f"runs/{job}").stdout
    assert job in eve.meshgpu("ps", "-a", "--all-users", "--json").stdout
    assert job not in eve.meshgpu("ps", "-a", "--json").stdout
    refused = eve.meshgpu("stop", job, code=125)
    assert "lets others see it only" in refused.stderr


# -- wrong clocks ----------------------------------------------------------------------------------------------------

WRONG = """
import time, types
from meshgpu.adapters import boot_clock
boot_clock.time = types.SimpleNamespace(
    time=lambda: time.time() - 3 * 3600, clock_gettime=time.clock_gettime, CLOCK_BOOTTIME=time.CLOCK_BOOTTIME
)
"""
"""Read by Python at its start: the agent lives three hours ago, gRPC's deadlines do not."""


def test_machine_whose_clock_is_hours_behind_does_all_that_others_do(
    office: Any, lab: Any, project: Path, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WRONG)
    late = office.host("late", PYTHONPATH=str(tmp_path))
    office.join(lab[0], late)
    wait_until(lambda: office.sees_all(late, 4), "late does not see the others")
    options = ("-g", "0", "--no-env", "-m", "bob", "--")
    done = late.meshgpu("run", *options, "sh", "-c", "echo printed; echo left > left", directory=project)
    assert done.stdout.endswith("printed\n")
    assert done.stderr.count("the clock of this machine is 3 h 0 m behind that of ") == 1
    job = next(job for job in late.json("ps", "-a")["jobs"])
    assert late.meshgpu("logs", job["id"]).stdout == "printed\n"
    assert "left" in late.meshgpu("ls", f"runs/{job['id']}").stdout
    late.meshgpu("cp", f"runs/{job['id']}/left", str(tmp_path / "fetched"))
    assert (tmp_path / "fetched").read_text() == "left\n"
    name = json.loads(late.meshgpu("run", "-d", "--json", *options, "sleep", "600", directory=project).stdout)["id"]
    late.meshgpu("kill", name)
    late.meshgpu("wait", name, code=None)
    assert next(job for job in lab[0].json("ps", "-a")["jobs"] if job["id"] == name)["state"] == "cancelled"
    assert "clock" not in lab[0].meshgpu("run", *options, "true", directory=project).stderr
