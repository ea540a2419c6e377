"""Joining where two meshes take in machines at once, and where none is found by itself."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.hosts.office import until
from tests.hosts.screen import DEADLINE_S, Screen, screens

pytestmark = [pytest.mark.hosts]


@pytest.fixture(scope="module")
def founders(office: Any) -> Any:
    """ada of the mesh lab, cyd of the mesh attic."""
    ada, cyd = office.host("ada"), office.host("cyd")
    for host, mesh in ((ada, "lab"), (cyd, "attic")):
        host.meshgpu("init", "--mesh", mesh, "--name", host.name, "--user", host.name, "--yes")
    return ada, cyd


@pytest.fixture
def windows(founders: Any) -> Iterator[Any]:
    """Both take in machines."""
    ada, cyd = founders
    until(lambda: not any(host.json("discover")["machines"][0]["pairing"] for host in founders))
    there = Screen(ada, "admit"), Screen(cyd, "admit")
    with screens(*there):
        for screen in there:
            screen.read_until("Waiting for")
        yield there


def doors(host: Any) -> set[str]:
    return {machine["mesh_name"] for machine in host.json("discover")["machines"] if machine["pairing"]}


def agree(here: Screen, there: Screen) -> None:
    digits = here.read_until(r"\d{3} \d{3}")
    assert there.read_until(r"\d{3} \d{3}") == digits
    for screen in (here, there):
        screen.read_until(r"\[y/N\]")
        screen.type("y")


def test_newcomer_says_which_mesh_and_joins_that(office: Any, windows: Any, wait_until: Callable[..., None]) -> None:
    bob = office.host("bob")
    bob.meshgpu("up")
    wait_until(lambda: doors(bob) == {"lab", "attic"})
    refused = bob.meshgpu("join", "--yes", "--name", "bob", code=2)
    assert "these take in machines now: attic, lab" in refused.stderr
    undecided = Screen(bob, "join", "--yes", "--name", "bob", "--as", "bob")
    with screens(undecided):
        undecided.read_until(r"Which\? ")
        undecided.type("\x04")  # Ctrl-D: nobody answers
        undecided.read_until("cannot join: several machines take in others now, into attic, lab")
        assert undecided.process.wait(DEADLINE_S) == 125
    here = Screen(bob, "join", "--yes", "--name", "bob", "--as", "bob", "--mesh", "attic")
    with screens(here):
        agree(here, windows[1])
        here.read_until("bob is in attic, let in by cyd")
        windows[1].read_until("bob is a member now")


def test_seed_leads_to_a_window_that_is_not_found_by_itself(office: Any, founders: Any, windows: Any) -> None:
    dan = office.host("dan")
    here = Screen(dan, "join", "--yes", "--name", "dan", "--as", "dan", "--seed", founders[0].address)
    with screens(here):
        agree(here, windows[0])
        here.read_until("dan is in lab, let in by ada")
