"""One Link to every member: who dials, when, and where."""

import itertools
import random
from collections.abc import Callable

import pytest

from meshgpu.core.effects import Dial, Identify
from meshgpu.core.membership.links import Links, LinkTiming
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.model.clock import Now
from meshgpu.model.ids import Address, NodeId
from meshgpu.sim.office import Office, furnish

Clock = Callable[[float], Now]
HERE, THERE = Address("10.0.0.2:7443"), Address("10.0.0.3:7443")
TIMING = LinkTiming()


@pytest.fixture
def sorted_nodes(office: Office) -> list[NodeId]:
    return sorted(setup.node for setup in office.setups)


def links_of(node: NodeId, log: MeshLog, seeds: tuple[Address, ...] = (), timing: LinkTiming = TIMING) -> Links:
    return Links(node, log, random.Random(1), seeds, timing)


@pytest.fixture
def low(log: MeshLog, sorted_nodes: list[NodeId]) -> Links:
    """The node with the lowest id."""
    return links_of(sorted_nodes[0], log)


@pytest.fixture
def high(log: MeshLog, sorted_nodes: list[NodeId]) -> Links:
    return links_of(sorted_nodes[-1], log)


def test_lower_id_dials_at_once(low: Links, sorted_nodes: list[NodeId], at: Clock) -> None:
    low.learn(at(0), sorted_nodes[1], (HERE,), is_signed=False)
    assert low.step(at(0)) == [Dial(sorted_nodes[1], HERE)]
    assert low.step(at(100)) == []


def test_higher_id_dials_after_a_courtesy(high: Links, sorted_nodes: list[NodeId], at: Clock) -> None:
    high.learn(at(0), sorted_nodes[0], (HERE,), is_signed=False)
    assert high.step(at(4.9)) == []
    assert high.deadline() == 5.0
    assert high.step(at(5.0)) == [Dial(sorted_nodes[0], HERE)]


def test_who_is_linked_is_not_dialled(high: Links, sorted_nodes: list[NodeId], at: Clock) -> None:
    high.learn(at(0), sorted_nodes[0], (HERE,), is_signed=False)
    high.link_opened(at(1), sorted_nodes[0])
    assert high.deadline() is None
    assert high.step(at(60)) == []


def test_strangers_and_oneself_are_never_dialled(low: Links, sorted_nodes: list[NodeId], at: Clock) -> None:
    low.learn(at(0), NodeId("x" * 52), (HERE,), is_signed=False)
    low.learn(at(0), sorted_nodes[0], (HERE,), is_signed=False)
    assert low.step(at(60)) == []
    assert low.deadline() is None


def test_stranger_that_becomes_a_member_is_dialled(office: Office, sorted_nodes: list[NodeId], at: Clock) -> None:
    log = MeshLog(office.notaries[0])
    log.enter(office.mesh, office.log[:1])
    links = links_of(sorted_nodes[0], log)
    links.learn(at(0), sorted_nodes[1], (HERE,), is_signed=False)
    assert links.step(at(1)) == []
    log.add(office.log)
    assert links.step(at(1)) == [Dial(sorted_nodes[1], HERE)]


def test_nothing_is_dialled_outside_a_mesh(office: Office, sorted_nodes: list[NodeId], at: Clock) -> None:
    links = links_of(sorted_nodes[0], MeshLog(office.notaries[0]), seeds=(HERE,))
    links.learn(at(0), sorted_nodes[1], (HERE,), is_signed=False)
    assert links.step(at(0)) == []
    assert links.deadline() is None


def test_every_address_is_tried_before_a_pause(low: Links, sorted_nodes: list[NodeId], at: Clock) -> None:
    peer = sorted_nodes[1]
    low.learn(at(0), peer, (HERE, THERE), is_signed=True)
    assert low.step(at(0)) == [Dial(peer, HERE)]
    low.dial_failed(at(1), peer)
    assert low.step(at(1)) == [Dial(peer, THERE)]
    low.dial_failed(at(2), peer)
    assert low.step(at(2)) == []


def test_pauses_double_up_to_a_limit(low: Links, sorted_nodes: list[NodeId], at: Clock) -> None:
    peer, now_s, pauses = sorted_nodes[1], 0.0, []
    low.learn(at(0), peer, (HERE,), is_signed=True)
    low.step(at(0))
    for _ in range(12):
        low.dial_failed(at(now_s), peer)
        due = low.deadline()
        assert due is not None
        pauses.append(due - now_s)
        now_s = due
        assert low.step(at(now_s)) == [Dial(peer, HERE)]
    assert 0.75 <= pauses[0] <= 1.25
    assert all(later > pause for pause, later in itertools.pairwise(pauses[:5]))
    assert max(pauses) <= TIMING.retry_limit_s * 1.25


def test_new_address_ends_the_pause(low: Links, sorted_nodes: list[NodeId], at: Clock) -> None:
    peer = sorted_nodes[1]
    low.learn(at(0), peer, (HERE,), is_signed=False)
    for _ in range(8):
        low.step(at(1000))
        low.dial_failed(at(1000), peer)
    low.learn(at(1001), peer, (HERE,), is_signed=False)
    assert low.step(at(1001)) == []
    low.learn(at(1001), peer, (THERE,), is_signed=False)
    assert len(low.step(at(1001))) == 1


def test_one_that_is_there_again_makes_others_be_tried_at_once(
    low: Links, sorted_nodes: list[NodeId], at: Clock
) -> None:
    peer, other = sorted_nodes[1:3]
    for node, address in ((peer, HERE), (other, THERE)):
        low.learn(at(0), node, (address,), is_signed=True)
    for _ in range(12):
        low.step(at(1000))
        low.dial_failed(at(1000), peer)
        low.dial_failed(at(1000), other)
    low.link_opened(at(1001), peer)
    assert low.step(at(1001 + TIMING.together_s)) == [Dial(other, THERE)]
    low.dial_failed(at(1002), other)
    low.link_opened(at(1003), peer)
    assert low.step(at(1003 + TIMING.together_s)) == [], "it was there all the time"


def test_lost_link_is_dialled_again_by_the_lower_id_first(
    low: Links, high: Links, sorted_nodes: list[NodeId], at: Clock
) -> None:
    for links, peer in ((low, sorted_nodes[-1]), (high, sorted_nodes[0])):
        links.learn(at(0), peer, (HERE,), is_signed=True)
        links.link_opened(at(1), peer)
        links.link_closed(at(100), peer)
        assert links.last_seen(peer) == 100
    first, second = low.deadline(), high.deadline()
    assert first is not None
    assert second is not None
    assert first <= 101
    assert second >= 105


def test_few_dials_are_under_way_at_once(log: MeshLog, sorted_nodes: list[NodeId], at: Clock) -> None:
    links = links_of(sorted_nodes[0], log, timing=LinkTiming(dials=2))
    for peer in sorted_nodes[1:]:
        links.learn(at(0), peer, (HERE,), is_signed=False)
    assert links.step(at(0)) == [Dial(peer, HERE) for peer in sorted_nodes[1:3]]
    assert links.deadline() is None
    links.link_opened(at(1), sorted_nodes[1])
    assert links.step(at(1)) == [Dial(sorted_nodes[3], HERE)]


def test_lies_on_the_lan_do_not_push_out_what_a_node_signed(low: Links, sorted_nodes: list[NodeId], at: Clock) -> None:
    peer = sorted_nodes[1]
    low.learn(at(0), peer, (HERE,), is_signed=True)
    for number in range(100):
        low.learn(at(0), peer, (Address(f"10.9.9.{number}:1"),), is_signed=False)
    assert low.addresses(peer)[0] == HERE
    assert len(low.addresses(peer)) <= 8


def test_seeds_are_asked_who_they_are_until_their_node_is_linked(
    log: MeshLog, sorted_nodes: list[NodeId], at: Clock
) -> None:
    links = links_of(sorted_nodes[0], log, seeds=(HERE,))
    assert links.step(at(0)) == [Identify(HERE)]
    assert links.deadline() == TIMING.seed_s
    links.identified(at(1), HERE, sorted_nodes[1])
    assert links.step(at(1)) == [Dial(sorted_nodes[1], HERE)]
    assert links.step(at(30)) == [Identify(HERE)]
    links.link_opened(at(31), sorted_nodes[1])
    assert links.step(at(60)) == []


# -- cloud nodes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def rented() -> tuple[MeshLog, list[NodeId], NodeId]:
    """A mesh with an instance: its log, the machines of the office, the instance."""
    office = furnish(random.Random(1), 3, is_plain=True, instances=1)
    log = MeshLog(office.notaries[0])
    log.enter(office.mesh, office.log)
    return log, [setup.node for setup in office.setups[:3]], office.setups[3].node


def test_everybody_in_the_office_dials_an_instance_at_once(
    rented: tuple[MeshLog, list[NodeId], NodeId], at: Clock
) -> None:
    log, machines, instance = rented
    for machine in machines:
        links = links_of(machine, log)
        links.learn(at(0), instance, (HERE,), is_signed=False)
        assert links.step(at(0)) == [Dial(instance, HERE)]


def test_an_instance_dials_nobody(rented: tuple[MeshLog, list[NodeId], NodeId], at: Clock) -> None:
    log, machines, instance = rented
    links = links_of(instance, log)
    for machine in machines:
        links.learn(at(0), machine, (HERE,), is_signed=True)
    assert links.step(at(1000)) == []
    assert links.deadline() is None
