"""Whom a node knocks for, where, and how often; and how it asks others to knock at its own door."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from meshgpu.core import events as ev
from meshgpu.core.effects import Answered, Effect, KnockBack, Reject, Send
from meshgpu.core.membership.knocking import ADDRESSES_LIMIT, Knocking, KnockTiming, knockable
from meshgpu.core.node import Node, NodeConfig
from meshgpu.model.clock import Now
from meshgpu.model.gossip import GossipEntry, Incarnation, KnockOutcome, NodeRecord
from meshgpu.model.ids import Address, KeyId, NodeId
from meshgpu.model.inventory import Inventory
from meshgpu.model.messages import GossipDelta, KnockAnswer, KnockResult, KnockWanted
from meshgpu.model.trust import Role
from meshgpu.sim.office import Office

Clock = Callable[[float], Now]
BOB, CYD, DAN, EVE = (NodeId(name) for name in ("bob", "cyd", "dan", "eve"))
DOOR, OTHER_DOOR = Address("10.0.0.2:7443"), Address("10.0.1.2:7443")
OWN = (Address("10.0.0.1:7443"),)
TIMING = KnockTiming()


@pytest.fixture
def knocking() -> Knocking:
    return Knocking(random.Random(1), TIMING)


def queries(effects: list[Effect]) -> dict[NodeId, str]:
    """{who is asked: the query}."""
    return {e.peer: e.message.query for e in effects if isinstance(e, Send) and isinstance(e.message, KnockWanted)}


def answer(query: str, wall_s: float = 0.0) -> KnockAnswer:
    return KnockAnswer(query, (KnockResult(DOOR, KnockOutcome.SILENT),), hears=True, announces=True, wall_s=wall_s)


def is_busy(effects: list[Effect]) -> bool:
    (sent,) = effects
    return isinstance(sent, Send) and isinstance(sent.message, KnockAnswer) and sent.message.is_busy


# -- asking ----------------------------------------------------------------------------------------------------------


def test_question_ends_when_all_have_answered_and_says_whose_clock_is_ahead(knocking: Knocking, at: Clock) -> None:
    asked = queries(knocking.ask(at(0), "q1", [BOB, CYD]))
    assert set(asked) == {BOB, CYD}
    ahead = answer(asked[BOB], at(1).wall_s + 300)
    assert knocking.answered(at(1), BOB, ahead) == []
    right = answer(asked[CYD], at(1).wall_s)
    (done,) = knocking.answered(at(1), CYD, right)
    assert done == Answered("q1", knocks=((BOB, ahead, 300.0), (CYD, right, 0.0)))
    assert knocking.deadline() is None


def test_who_stays_silent_is_not_waited_for_for_ever(knocking: Knocking, at: Clock) -> None:
    asked = queries(knocking.ask(at(0), "q1", [BOB, CYD]))
    knocking.answered(at(1), BOB, answer(asked[BOB]))
    assert knocking.deadline() == TIMING.answer_s
    (done,) = knocking.step(at(TIMING.answer_s))
    assert isinstance(done, Answered)
    assert [peer for peer, _, _ in done.knocks] == [BOB]


def test_three_peers_of_many_are_asked_and_none_if_there_is_none(knocking: Knocking, at: Clock) -> None:
    assert len(queries(knocking.ask(at(0), "q1", [BOB, CYD, DAN, EVE]))) == TIMING.helpers == 3
    assert knocking.ask(at(0), "q2", []) == [Answered("q2")]


def test_answer_of_somebody_who_was_not_asked_or_asked_long_ago_is_refused(knocking: Knocking, at: Clock) -> None:
    asked = queries(knocking.ask(at(0), "q1", [BOB]))
    for peer, query in ((CYD, asked[BOB]), (BOB, "made up")):
        (refused,) = knocking.answered(at(1), peer, answer(query))
        assert isinstance(refused, Reject)
    assert len(knocking.answered(at(1), BOB, answer(asked[BOB]))) == 1
    (again,) = knocking.answered(at(1), BOB, answer(asked[BOB]))
    assert isinstance(again, Reject)


# -- helping ---------------------------------------------------------------------------------------------------------


def test_what_was_found_goes_to_who_asked_and_to_nobody_else(knocking: Knocking, at: Clock) -> None:
    assert knocking.wanted(at(0), BOB, "q", (DOOR,), OWN) == [KnockBack(BOB, (DOOR,))]
    found = (KnockResult(DOOR, KnockOutcome.ANSWERED, BOB),)
    assert knocking.knocked(at(1), CYD, found, hears=True, announces=True) == []
    told = KnockAnswer("q", found, hears=True, announces=False, wall_s=at(1).wall_s)
    assert knocking.knocked(at(1), BOB, found, hears=True, announces=False) == [Send(BOB, told)]


def test_nothing_is_told_to_who_is_no_member_any_more(knocking: Knocking, at: Clock) -> None:
    knocking.wanted(at(0), BOB, "q", (DOOR,), OWN)
    knocking.forget(BOB)
    assert knocking.knocked(at(1), BOB, (), hears=True, announces=True) == []


def test_peer_is_knocked_for_once_at_a_time_and_some_times_a_minute(knocking: Knocking, at: Clock) -> None:
    assert knocking.wanted(at(0), BOB, "q", (DOOR,), OWN) == [KnockBack(BOB, (DOOR,))]
    assert is_busy(knocking.wanted(at(0), BOB, "q", (DOOR,), OWN))
    knocking.knocked(at(0), BOB, (), hears=False, announces=False)
    for number in range(1, TIMING.served):
        assert knocking.wanted(at(number), BOB, "q", (DOOR,), OWN) == [KnockBack(BOB, (DOOR,))]
        knocking.knocked(at(number), BOB, (), hears=False, announces=False)
    assert is_busy(knocking.wanted(at(59.9), BOB, "q", (DOOR,), OWN))
    assert knocking.wanted(at(59.9), CYD, "q", (DOOR,), OWN) == [KnockBack(CYD, (DOOR,))]
    assert knocking.wanted(at(60.0), BOB, "q", (DOOR,), OWN) == [KnockBack(BOB, (DOOR,))]


def test_no_more_than_some_are_knocked_for_at_the_same_time(knocking: Knocking, at: Clock) -> None:
    for number in range(TIMING.at_once):
        assert not is_busy(knocking.wanted(at(0), NodeId(f"n{number}"), "q", (DOOR,), OWN))
    assert is_busy(knocking.wanted(at(0), BOB, "q", (DOOR,), OWN))


@pytest.mark.parametrize(
    ("announced", "expected"),
    [
        ((DOOR, OTHER_DOOR, DOOR), (DOOR, OTHER_DOOR)),
        ((), ()),
        ((Address("10.0.0.2:7443"), Address("10.0.0.3:22")), (DOOR,)),  # an agent has one port
        ((Address("intranet.corp:7443"), DOOR), (DOOR,)),  # we resolve no names for others
        ((Address("127.0.0.1:7443"), DOOR), (DOOR,)),  # what listens on our loopback is nobody's business
        ((Address("127.1.2.3:7443"), Address("[::1]:7443"), DOOR), (DOOR,)),
        ((Address("[::ffff:127.0.0.1]:7443"), DOOR), (DOOR,)),  # which the kernel takes for the same
        ((Address("10.0.0.1:7443"), DOOR), (DOOR,)),  # nor what else listens at our own address
        ((Address("[::ffff:10.0.0.1]:7443"), DOOR), (DOOR,)),
        ((Address("224.0.0.251:7443"), Address("0.0.0.0:7443"), Address("255.255.255.255:7443"), DOOR), (DOOR,)),
        ((Address("[fd00::2]:7443"),), (Address("[fd00::2]:7443"),)),
    ],
)
def test_only_numbers_of_other_machines_at_one_port_are_knocked_at(
    announced: tuple[Address, ...], expected: tuple[Address, ...]
) -> None:
    assert knockable(announced, OWN) == expected


def test_record_with_many_addresses_is_cut() -> None:
    many = [Address(f"10.0.2.{number}:7443") for number in range(100)]
    assert knockable(many, OWN) == tuple(many[:ADDRESSES_LIMIT])


def test_where_all_agents_are_on_one_computer_they_knock_on_its_loopback() -> None:
    assert knockable((Address("127.0.0.1:7450"),), (Address("127.0.0.1:7451"),)) == (Address("127.0.0.1:7450"),)


# -- within a node ---------------------------------------------------------------------------------------------------


def node_beside(office: Office, at: Clock, addresses: tuple[Address, ...]) -> tuple[Node, NodeId]:
    """The first node, linked to the second one, whose signed record says `addresses`."""
    here, there = office.setups[0], office.setups[1]
    node = Node(here.node, at(0), office.notaries[0], random.Random(1), NodeConfig("1"), ())
    node.step(at(0), ev.MeshEntered(office.mesh, office.log))
    node.step(at(0), ev.LinkOpened(there.node))
    entry = GossipEntry(office.mesh, there.node, Incarnation(1, 0), 1, NodeRecord("1", addresses, Inventory(1, 1)))
    signed = office.notaries[1].sign(KeyId(there.node), entry)
    node.step(at(0), ev.MessageArrived(there.node, GossipDelta((signed,))))
    return node, there.node


def knocks(effects: list[Effect]) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, KnockBack)]


def test_node_knocks_at_what_the_askers_own_record_says_and_nowhere_else(office: Office, at: Clock) -> None:
    node, peer = node_beside(office, at, (DOOR,))
    wanted = ev.MessageArrived(peer, KnockWanted("10.9.9.9:22"))
    assert knocks(node.step(at(1), wanted)) == [KnockBack(peer, (DOOR,))]
    stranger = office.setups[2].node
    assert knocks(node.step(at(1), ev.MessageArrived(stranger, KnockWanted("q")))) == [KnockBack(stranger, ())]


@pytest.mark.parametrize(("role", "served"), [(Role.CLOUD, False), (Role.VIEWER, True), (Role.RIG, True)])
def test_rented_machine_has_nobody_knock(office: Office, at: Clock, role: Role, served: bool) -> None:
    node, peer = node_beside(office, at, (DOOR,))
    node.log.members[peer] = replace(node.log.members[peer], role=role)
    effects = node.step(at(1), ev.MessageArrived(peer, KnockWanted("q")))
    assert bool(knocks(effects)) == served
    assert any(isinstance(effect, Reject) for effect in effects) != served


def test_rented_machines_are_not_asked_to_knock(office: Office, at: Clock) -> None:
    node, peer = node_beside(office, at, (DOOR,))
    assert set(queries(node.step(at(1), ev.KnocksAsked("q1")))) == {peer}
    node.log.members[peer] = replace(node.log.members[peer], role=Role.CLOUD)
    assert node.step(at(1), ev.KnocksAsked("q2")) == [Answered("q2")]
