"""Real agents that die, lose their cable, or stand still; and what the others make of it, and when."""

import os
import signal
import subprocess
import time
from typing import Any

import pytest

from meshgpu.client.agent import AgentClient

pytestmark = [pytest.mark.hosts]


@pytest.fixture(scope="module")
def lab(office: Any) -> Any:
    hosts = [office.host(name) for name in ("ada", "bob", "cyd", "dan")]
    office.form_mesh(*hosts)
    return hosts


def state(at: Any, whom: Any) -> str:
    machines = AgentClient(at.home).machines()["machines"]
    return next(machine["state"] for machine in machines if machine["name"] == whom.name)


def known_after(witnesses: list[Any], whom: Any, wanted: str, within_s: float) -> float:
    """Seconds until all of them show that state, to a hundredth."""
    began = time.monotonic()
    while {state(at, whom) for at in witnesses} != {wanted}:
        assert time.monotonic() - began < within_s, [(at.name, state(at, whom), at.log()) for at in witnesses]
        time.sleep(0.01)
    return time.monotonic() - began


def test_agent_that_is_killed_is_known_everywhere_at_once_and_alive_when_it_is_back(lab: Any) -> None:
    ada, bob, cyd, dan = lab
    os.kill(bob.agent_pid(), signal.SIGKILL)
    took = known_after([ada, cyd, dan], bob, "down", 10.0)
    bob.meshgpu("up")
    back = known_after([ada, cyd, dan], bob, "alive", 20.0)
    print(f"a killed agent is known everywhere after {took * 1000:.0f} ms, and alive again {back:.1f} s after `up`")
    assert took < 3.0  # the target is 0.5 s: this machine may be busy with other tests


def test_agent_that_stands_still_is_in_doubt_and_not_down(lab: Any) -> None:
    ada, bob, cyd, dan = lab
    pid = bob.agent_pid()
    seen = set()
    os.kill(pid, signal.SIGSTOP)
    try:
        ends = time.monotonic() + 10.0
        while time.monotonic() < ends:
            seen |= {state(at, bob) for at in (ada, cyd, dan)}
            time.sleep(0.1)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert seen == {"alive", "suspect"}
    known_after([ada, cyd, dan], bob, "alive", 10.0)


def test_path_that_is_open_one_way_alone_is_noticed_by_the_two_and_taken_for_no_death_by_others(lab: Any) -> None:
    ada, bob, cyd, dan = lab
    rule = ["INPUT", "-s", bob.address, "-j", "DROP"]
    others: set[str] = set()

    def is_noticed() -> bool:
        others.update(state(at, whom) for at in (cyd, dan) for whom in (ada, bob))
        return "alive" not in (state(ada, bob), state(bob, ada))

    subprocess.run(ada.argv("iptables", "-A", *rule), check=True)
    try:
        began = time.monotonic()
        while not is_noticed():
            assert time.monotonic() - began < 60.0, [(at.name, at.log()) for at in (ada, bob)]
            time.sleep(0.1)
        print(f"a path that is open one way alone is noticed by both ends after {time.monotonic() - began:.1f} s")
    finally:
        subprocess.run(ada.argv("iptables", "-D", *rule), check=True)
    known_after([ada], bob, "alive", 60.0)
    known_after([bob], ada, "alive", 60.0)
    assert "down" not in others
    assert {state(at, whom) for at in (cyd, dan) for whom in (ada, bob)} == {"alive"}


def test_machine_without_its_cable_is_known_everywhere_and_found_again(lab: Any) -> None:
    ada, bob, cyd, dan = lab
    bob.cut()
    took = known_after([ada, cyd, dan], bob, "down", 30.0)
    for other in (ada, cyd, dan):
        known_after([bob], other, "down", 40.0)
    bob.heal()
    back = known_after([ada, cyd, dan], bob, "alive", 60.0)
    print(f"a pulled cable is known everywhere after {took:.1f} s, and all is well {back:.1f} s after it is back")
    assert {state(bob, other) for other in (ada, cyd, dan)} == {"alive"}
    assert took < 20.0
