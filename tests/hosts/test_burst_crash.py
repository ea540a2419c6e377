"""A burst peer that is killed at any moment of a launch loses no job, rents nothing twice and leaves nothing behind."""

import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from meshgpu.core.burst.survey import FRESH_S
from tests.ec2.front import Fault, Moment, Stage
from tests.hosts.office import until
from tests.hosts.renting import AGAIN_S, RENTED_S, Project, Story, Strike

pytestmark = [pytest.mark.hosts, pytest.mark.slow]

HTTPS: Final = ":01BB"
ESTABLISHED: Final = "01"
"""As proc_net_tcp(5) writes port 443 and the state."""

GRID_S: Final = 0.01
STEPS: Final = 300
"""Moments within 3 s of the agent's start: by then it asks and dials, and it seldom has done all."""


@pytest.fixture(scope="module")
def filled(opened: Story, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The office's GPU is taken, by a job that outlives its agent."""
    with opened.filled(Project(opened.ada, tmp_path_factory.mktemp("filler"))) as name:
        yield name


@pytest.fixture
def story(opened: Story, filled: str) -> Iterator[Story]:
    with opened.at_rest(filled):
        yield opened
        assert opened.job(filled)["phase"] == "running"
        assert opened.job(filled)["epoch"] == 1


Aim = Callable[[Story, Project, Strike], None]
"""Lets the strike come at a moment of the launch to be."""


def call(action: str, stage: Stage, *faults: Fault) -> Aim:
    """While the provider deals with a call; with a fault it does not happen, whoever repeats it."""

    def aim(story: Story, project: Project, strike: Strike) -> None:
        story.cloud.ec2.faults += faults
        story.cloud.ec2.moments.append(Moment(action, stage, strike))

    return aim


def dialled(story: Story, project: Project, strike: Strike) -> None:
    """As soon as somebody is connected to the first listener of the instance."""

    def holds() -> bool:
        return any(f"{HTTPS} " in line for line in connections(story))

    strike.when(holds)


def enrolled(story: Story, project: Project, strike: Strike) -> None:
    """As soon as the instance has the mesh log on its disk."""
    strike.when(lambda: any(m.console.read_bytes().endswith(b" enrolled\n") for m in story.cloud.running()))


def joined(story: Story, project: Project, strike: Strike) -> None:
    """As soon as a link is open there."""
    strike.when(lambda: any(b" link opened: " in m.console.read_bytes() for m in story.cloud.running()))


def begun(story: Story, project: Project, strike: Strike) -> None:
    """As soon as the job runs there."""
    strike.when(lambda: project.times("begins") == 1)


def connections(story: Story) -> list[str]:
    """Those that stand with the instances, as the kernel lists them by local port: ` ADDRESS:01BB `."""
    lines: list[str] = []
    for machine in story.cloud.running():
        shown = subprocess.run(
            machine.argv("cat", "/proc/net/tcp", "/proc/net/tcp6"), capture_output=True, text=True, check=False
        )
        fields = [line.split() for line in shown.stdout.splitlines()]
        lines += [f"{field[1]} " for field in fields if len(field) > 3 and field[3] == ESTABLISHED]
    return lines


POINTS: Final[dict[str, Aim]] = {
    "survey-arrives": call("DescribeInstances", Stage.ARRIVED),
    "request-gets-lost": call("RunInstances", Stage.ARRIVED, Fault("RunInstances", "Unavailable", 503)),
    "reply-gets-lost": call("RunInstances", Stage.DONE),
    "reply-is-told": call("RunInstances", Stage.TOLD),
    "instance-is-dialled": dialled,
    "instance-is-enrolled": enrolled,
    "instance-joins": joined,
    "job-begins": begun,
}


def check_launch(story: Story, project: Project, *aims: Aim, spans: str = "3") -> None:
    """Rent for a job, be killed at moments of that and start again: the job ends well, once, on the only instance."""
    before = set(story.cloud.machines)
    name = project.submit(spans)
    for aim in aims:
        strike_and_start(story, project, aim)
    until(lambda: story.is_done(name), "the job did not end", AGAIN_S)
    story.give_back()
    assert project.times("begins") == project.times("ends") == 1, project.diary()
    assert len(set(story.cloud.machines) - before) == 1
    assert story.cloud.ec2.most_live == 1
    assert len({request["ClientToken"] for request in story.cloud.ec2.actions("RunInstances")}) == 1


def strike_and_start(story: Story, project: Project, aim: Aim) -> None:
    strike = Strike(story.ada)
    try:
        aim(story, project, strike)
        until(strike.is_over.is_set, "the moment did not come", RENTED_S)
        assert project.times("ends") == 0, "it came too late"
    finally:
        is_struck = strike.is_over.is_set()
        strike.is_over.set()
        story.cloud.ec2.moments.clear()
        if is_struck:
            until(strike.is_dead)
            story.ada.meshgpu("up")
        story.cloud.ec2.faults.clear()


@pytest.mark.parametrize("point", POINTS)
def test_burst_peer_killed_at_a_call_goes_on_after_it(story: Story, project: Project, point: str) -> None:
    if point == "survey-arrives":
        time.sleep(FRESH_S)  # the last one must be too old to rent on it
    check_launch(story, project, POINTS[point])


@pytest.mark.parametrize("seed", [1])
def test_burst_peer_killed_again_and_again_gets_there(story: Story, project: Project, seed: int) -> None:
    """Five times in one launch, at moments on a grid of 10 ms after each start."""
    rng = random.Random(seed)
    print("seed", seed)

    def again(_story: Story, _project: Project, strike: Strike) -> None:
        threading.Timer(rng.randrange(STEPS) * GRID_S, strike).start()

    check_launch(story, project, *[again] * 5, spans="15")
