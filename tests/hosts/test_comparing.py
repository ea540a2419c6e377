"""Joining by comparing digits, as two people at two terminals see it."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.hosts.office import until
from tests.hosts.screen import DEADLINE_S, Screen, screens

pytestmark = [pytest.mark.hosts]


@pytest.fixture(scope="module")
def ada(office: Any) -> Any:
    host = office.host("ada")
    host.meshgpu("init", "--mesh", "lab", "--name", "ada", "--yes")
    return host


def compared(ada: Any, host: Any, said_there: str, said_here: str) -> tuple[Screen, Screen]:
    """Both screens after both people answered; their digits were the same."""
    until(lambda: not ada.json("discover")["machines"][0]["pairing"], "the window before this one stays open")
    there = Screen(ada, "admit", host.name)
    there.read_until("Waiting for")
    here = Screen(host, "join", "--name", host.name, "--as", host.name, "--yes")
    digits = here.read_until(r"\d{3} \d{3}")
    assert there.read_until(r"\d{3} \d{3}") == digits
    for screen, said in ((there, said_there), (here, said_here)):
        screen.read_until(r"\[y/N\]")
        screen.type(said)
    return there, here


def test_machine_is_a_member_once_both_people_agreed(office: Any, ada: Any, wait_until: Callable[..., None]) -> None:
    bob = office.host("bob")
    there, here = compared(ada, bob, "y", "y")
    with screens(there, here):
        there.read_until("bob is a member now")
        here.read_until("bob is in lab, let in by ada")
        assert there.process.wait(DEADLINE_S) == here.process.wait(DEADLINE_S) == 0
    owners = {machine["name"]: machine["owner"] for machine in ada.json("machines")["machines"]}
    assert owners["bob"] == "bob"
    wait_until(lambda: office.sees_all(bob, 2))


@pytest.mark.parametrize(("said_there", "said_here"), [("n", "y"), ("y", "n")])
def test_machine_stays_out_where_one_person_declines(office: Any, ada: Any, said_there: str, said_here: str) -> None:
    name = "eve" if said_there == "n" else "mallory"
    host = office.host(name)
    there, here = compared(ada, host, said_there, said_here)
    with screens(there, here):
        here.read_until("other digits, or said no" if said_here == "y" else "not confirmed here")
        there.read_until("Not admitted: .*said no")
        assert here.process.wait(DEADLINE_S) == 125
    assert name not in {machine["name"] for machine in ada.json("machines")["machines"]}
    assert host.json("discover")["machines"][0]["mesh_tag"] is None


def test_admit_needs_a_person_at_a_terminal(ada: Any) -> None:
    refused = ada.meshgpu("admit", code=2)
    assert "no person sits at a terminal" in refused.stderr
    assert "meshgpu invite" in refused.stderr
