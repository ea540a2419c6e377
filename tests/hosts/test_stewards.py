"""Jobs whose stewards are killed, one after the other: real agents, real disks."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.hosts]

WAIT = """
import pathlib, time
print('begun', flush=True)
while not pathlib.Path({flag!r}).exists():
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def lab(office: Any) -> Any:
    """Four machines of one user."""
    hosts = [office.host(name) for name in ("ada", "bob", "cyd", "dan")]
    office.form_mesh(*hosts)
    return {host.name: host for host in hosts}


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    (tmp_path / "wait.py").write_text(WAIT.format(flag=str(tmp_path / "flag")))
    return tmp_path / "flag"


def job(host: Any, name: str) -> Any:
    return next(row for row in host.json("ps", "-a")["jobs"] if row["id"] == name)


def until(host: Any, name: str, *states: str, seconds: float = 60.0) -> Any:
    """The job once it is in one of `states`, as `host` hears of it."""
    ends = time.monotonic() + seconds
    while (found := job(host, name))["state"] not in states:
        assert time.monotonic() < ends, f"{name} is {found} after {seconds} s"
        time.sleep(0.2)
    return found


def submit(lab: Any, flag: Path) -> Any:
    """A job that runs on dan until there is a flag; bob or cyd speaks for it, and both hold it."""
    for _ in range(40):
        done = lab["ada"].meshgpu("run", "-d", "--json", "-m", "dan", "--", "python", "wait.py", directory=flag.parent)
        name = str(json.loads(done.stdout)["id"])
        found = job(lab["ada"], name)
        assert len(set(found["held_by"])) == 3
        if found["held_by"][0] in ("bob", "cyd") and {"bob", "cyd"} < set(found["held_by"]):
            until(lab["ada"], name, "active")
            return job(lab["ada"], name)
        lab["ada"].meshgpu("kill", name)
    raise AssertionError("40 jobs, and bob and cyd hold none of them")


def test_job_goes_on_and_ends_while_the_machine_that_speaks_for_it_is_off(lab: Any, flag: Path) -> None:
    ada, found = lab["ada"], submit(lab, flag)
    speaker = lab[found["held_by"][0]]
    speaker.kill_agent()
    flag.touch()
    ended = until(ada, found["id"], "succeeded")
    assert (ended["epoch"], ended["exit_code"]) == (1, 0)
    assert ada.meshgpu("logs", found["id"]).stdout == "begun\n"
    speaker.meshgpu("up")
    again = until(speaker, found["id"], "succeeded")
    assert (again["epoch"], again["exit_code"]) == (1, 0)


def test_job_is_stopped_although_the_machine_that_speaks_for_it_is_off(lab: Any, flag: Path) -> None:
    ada, found = lab["ada"], submit(lab, flag)
    speaker = lab[found["held_by"][0]]
    speaker.kill_agent()
    ada.meshgpu("stop", found["id"])
    until(ada, found["id"], "cancelled")
    speaker.meshgpu("up")
    assert until(speaker, found["id"], "cancelled")["epoch"] == 1


def test_with_two_of_three_away_nothing_is_decided_and_ps_says_so(lab: Any, flag: Path) -> None:
    ada, found = lab["ada"], submit(lab, flag)
    holders = [lab["bob"], lab["cyd"]]
    for host in holders:
        host.kill_agent()
    flag.touch()
    ends = time.monotonic() + 30.0
    while "hold it" not in (seen := job(ada, found["id"]))["reason"]:
        assert time.monotonic() < ends, seen
        time.sleep(0.2)
    assert seen["state"] in ("active", "unknown")
    assert all(host.name in seen["reason"] for host in holders)
    refused = ada.meshgpu("stop", found["id"], code=None)
    assert refused.returncode != 0
    for host in holders:
        host.meshgpu("up")
    assert until(ada, found["id"], "succeeded")["epoch"] == 1
