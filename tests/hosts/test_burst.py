"""The whole of renting: an office behind its NAT, a local EC2 whose instances run, real agents on both sides."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

from meshgpu.config import Config
from meshgpu.model.cloud import INSTANCE_PORT
from tests.ec2.cloud import PROGRAMS
from tests.ec2.front import Fault
from tests.ec2.internet import API_HOST
from tests.hosts.office import MESHGPU, until
from tests.hosts.renting import AGAIN_S, RENTED_S, Project, Story

pytestmark = [pytest.mark.hosts]

DIAL: Final = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 2.0).close()
except OSError as error:
    sys.exit(f"refused: {error}")
"""


def test_job_that_finds_no_room_runs_on_a_rented_machine_which_is_given_back(story: Story, project: Project) -> None:
    with story.filled(project):
        name = project.submit("2")
        until(lambda: story.runs_on_rented(name), "no machine was rented", RENTED_S)
        until(lambda: story.is_done(name), "the job did not end there")
        assert story.ada.meshgpu("logs", name).stdout == "works\n"
        assert project.times("ends") == 1
        story.give_back()


def test_type_without_capacity_is_left_for_the_next_one(story: Story, project: Project) -> None:
    lacking = Fault("RunInstances", "InsufficientInstanceCapacity", 500, {"InstanceType": "g6.xlarge"}, times=-1)
    story.cloud.ec2.faults.append(lacking)
    try:
        with story.filled(project):
            name = project.submit("2")
            until(lambda: story.is_done(name), "the job did not run", RENTED_S)
            assert project.times("ends") == 1
    finally:
        story.cloud.ec2.faults.remove(lacking)
    asked = [
        (call["InstanceType"], call["Placement.AvailabilityZone"], call.get("InstanceMarketOptions.MarketType"))
        for call in story.cloud.ec2.actions("RunInstances")
    ]
    assert len(asked) == len(set(asked)) > 1
    assert {kind for kind, _, _ in asked[:-1]} == {"g6.xlarge"}
    assert asked[-1][0] == "g5.xlarge"
    assert story.cloud.ec2.most_live == 1


# -- what may be done to it from outside, and what it does ----------------------------------------------------------


def reaches(argv: list[str], address: str, port: int) -> bool:
    return subprocess.run([*argv, sys.executable, "-c", DIAL, address, str(port)], check=False).returncode == 0


@pytest.mark.slow
def test_rented_machine_reaches_nothing_of_the_office_and_tries_nothing(story: Story, project: Project) -> None:
    link_port = Config().link_port

    def dials() -> int:
        """How many connections out of it were begun since it booted."""
        rules = machine.argv("iptables", "-n", "-L", "OUTPUT", "-v", "-x")
        shown = subprocess.run(rules, capture_output=True, text=True, check=True).stdout
        (ours,) = [line.split() for line in shown.splitlines() if "!lo" in line]
        return int(ours[0])

    with story.filled(project):
        name = project.submit("600")  # what ran nothing would end while it is looked at
        until(lambda: bool(story.cloud.running()), "no machine was rented")
        machine = story.machine()
        subprocess.run(machine.argv("iptables", "-A", "OUTPUT", "-p", "tcp", "--syn", "!", "-o", "lo"), check=True)
        assert b"to be enrolled" not in machine.console.read_bytes(), "it was looked at too late"
        until(lambda: story.ada.meshgpu("logs", name).stdout == "works\n", "the job did not run there", RENTED_S)
        assert dials() == 0
        assert reaches(story.ada.argv(), story.ada.address, link_port)
        assert reaches(story.ada.argv(), machine.public, INSTANCE_PORT)
        assert reaches(machine.argv(), API_HOST, urlsplit(story.cloud.ec2.url).port or 0)
        assert dials() == 1
        office = story.cloud.internet.office_address
        for address, port in ((story.ada.address, link_port), (office, link_port), (office, INSTANCE_PORT)):
            assert not reaches(machine.argv(), address, port), (address, port)


@pytest.mark.slow
def test_instances_are_listed_and_ended_with_nothing_but_credentials(
    story: Story, project: Project, tmp_path: Path
) -> None:
    def burst(*arguments: str) -> "subprocess.CompletedProcess[str]":
        """On somebody's machine anywhere in the Internet."""
        environment = {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        return subprocess.run(
            story.cloud.internet.argv(MESHGPU, "burst", *arguments),
            env=environment | story.cloud.ec2.environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )

    with story.filled(project):
        name = project.submit("600,1", "--retries", "1")
        until(lambda: project.times("begins") == 1, "no machine was rented", RENTED_S)
        machine = story.machine()
        (listed,) = json.loads(burst("ls", "--json").stdout)["instances"]
        assert (listed["instance"], listed["job"]) == (machine.instance, name)
        assert machine.instance in burst("ls").stdout
        assert "1 instance told to end" in burst("reap", "--yes").stderr
        assert story.cloud.ec2.live() == []
        assert "no instance of meshgpu lives" in burst("ls").stderr
        until(lambda: story.is_done(name), "the job did not get another machine", AGAIN_S)
    assert project.words() == ["begins", "begins", "ends"]
    assert story.job(name)["epoch"] == 2
    assert story.cloud.ec2.most_live == 1


@pytest.mark.slow
def test_sweep_runs_here_and_there_each_trial_once(story: Story, project: Project) -> None:
    done = story.ada.meshgpu(
        "sweep", "grid", "--param", "n=1,2,3,4,5,6", "--parallel", "3", "-d", "--json", "-g", "1",
        "--", "python", "work.py", "6", str(project.path), "{n}", directory=project.directory,
    )  # fmt: skip
    name = json.loads(done.stdout)["id"]
    until(
        lambda: bool(story.ada.json("sweep", "status", name)["sweep"]["state"] == "succeeded"),
        "the sweep did not end",
        120,
    )
    trials = story.ada.json("sweep", "status", name)["trials"]
    assert [(trial["state"], trial["epoch"]) for trial in trials] == [("succeeded", 1)] * 6
    for word in ("begins", "ends"):
        assert sorted(line[1] for line in project.diary() if line[0] == word) == list("123456")
    machines = {str(trial["machine"]) for trial in trials}
    assert "ada" in machines
    assert any(machine.startswith("cloud-") for machine in machines)
    assert 1 <= story.cloud.ec2.most_live <= 2
