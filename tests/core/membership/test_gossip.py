"""What is said reaches everybody, and nobody speaks for another."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from meshgpu.core.effects import Effect, Reject, Send
from meshgpu.core.membership.gossip import ENTRY_PARTS, Gossip, GossipTiming
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.model.clock import Now
from meshgpu.model.gossip import Capacity, Doubt, Doubts, GossipEntry, Incarnation, NodeRecord
from meshgpu.model.ids import Address, KeyId, MeshId, NodeId
from meshgpu.model.inventory import Inventory
from meshgpu.model.messages import GossipDelta, GossipDigest, LogDelta
from meshgpu.model.trust import Signed
from meshgpu.sim.office import Office, furnish

Clock = Callable[[float], Now]
RECORD = NodeRecord("1", (Address("a:1"),), Inventory(1, 1))


def make(office: Office, number: int, epoch: int = 1, count: int | None = None) -> Gossip:
    log = MeshLog(office.notaries[number])
    log.enter(office.mesh, office.log[:count])
    return Gossip(
        office.setups[number].node, epoch, log, office.notaries[number], random.Random(number), GossipTiming()
    )


@pytest.fixture
def pair(office: Office) -> tuple[Gossip, Gossip]:
    return make(office, 0), make(office, 1)


@pytest.fixture
def nodes(office: Office) -> tuple[NodeId, NodeId]:
    return office.setups[0].node, office.setups[1].node


def messages(effects: list[Effect], kind: type[object]) -> list[object]:
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def converse(now: Now, one: Gossip, other: Gossip, names: tuple[NodeId, NodeId], effects: list[Effect]) -> None:
    """Deliver what `one` sends, and all that follows from it."""
    pending = [(one, other, names, effect) for effect in effects]
    while pending:
        sender, receiver, (me, you), effect = pending.pop(0)
        assert isinstance(effect, Send)
        match effect.message:
            case GossipDigest() as digest:
                answers = receiver.digest_arrived(me, digest)
            case GossipDelta() as delta:
                _, answers = receiver.delta_arrived(now, me, delta)
            case _:
                answers = []
        pending += [(receiver, sender, (you, me), answer) for answer in answers]


def entry(office: Office, owner: int, signer: int, **changes: object) -> Signed:
    value = GossipEntry(office.mesh, office.setups[owner].node, Incarnation(1, 0), 1, RECORD)
    value = replace(value, **changes)  # type: ignore[arg-type]  # names and types are GossipEntry's
    return office.notaries[signer].sign(KeyId(office.setups[signer].node), value)


def test_first_change_is_pushed_at_once_and_the_next_in_company(
    office: Office, pair: tuple[Gossip, Gossip], nodes: tuple[NodeId, NodeId], at: Clock
) -> None:
    one, _ = pair
    one.link_opened(at(0), nodes[1])
    one.say(at(1), RECORD)
    assert one.deadline() is not None
    assert len(messages(one.step(at(1)), GossipDelta)) == 1
    one.say(at(1.01), Capacity((), ()))
    one.say(at(1.02), replace(RECORD, fence="bubblewrap"))
    assert messages(one.step(at(1.03)), GossipDelta) == []
    (push,) = messages(one.step(at(1.05)), GossipDelta)
    assert isinstance(push, GossipDelta)
    assert len(push.entries) == 2


def test_what_does_not_change_is_not_said_again(
    pair: tuple[Gossip, Gossip], nodes: tuple[NodeId, NodeId], at: Clock
) -> None:
    one, _ = pair
    one.link_opened(at(0), nodes[1])
    one.say(at(1), RECORD)
    one.step(at(1.05))
    one.say(at(2), RECORD)
    assert messages(one.step(at(2)), GossipDelta) == []


def test_new_link_syncs_both_sides(pair: tuple[Gossip, Gossip], nodes: tuple[NodeId, NodeId], at: Clock) -> None:
    one, other = pair
    one.say(at(0), RECORD)
    other.say(at(0), Capacity((), ()))
    converse(at(1), one, other, nodes, one.link_opened(at(1), nodes[1]))
    assert other.record(nodes[0]) == RECORD
    assert one.capacity(nodes[1]) == Capacity((), ())
    assert one.known() == other.known()


def test_push_to_a_peer_that_knows_nothing_leaves_no_gap(
    pair: tuple[Gossip, Gossip], nodes: tuple[NodeId, NodeId], at: Clock
) -> None:
    """The Link breaks before the answer to its digest: what the peer then claims must be what it has."""
    one, other = pair
    one.say(at(0), RECORD)
    one.step(at(0.1))
    one.link_opened(at(1), nodes[1])
    one.say(at(1), Capacity((), ()))
    (push,) = messages(one.step(at(1)), GossipDelta)
    assert isinstance(push, GossipDelta)
    other.delta_arrived(at(1), nodes[0], push)
    assert other.known() == one.known()
    assert other.record(nodes[0]) == RECORD


def test_digest_brings_what_was_missed_and_nothing_else(
    pair: tuple[Gossip, Gossip], nodes: tuple[NodeId, NodeId], at: Clock
) -> None:
    one, other = pair
    one.say(at(0), RECORD)
    converse(at(1), one, other, nodes, one.link_opened(at(1), nodes[1]))
    one.say(at(2), Capacity((), ()))
    digest = GossipDigest(other.known(), (), wants_answer=False)
    (delta,) = messages(one.digest_arrived(nodes[1], digest), GossipDelta)
    assert isinstance(delta, GossipDelta)
    assert len(delta.entries) == 1
    other.delta_arrived(at(2), nodes[0], delta)
    assert (
        messages(one.digest_arrived(nodes[1], GossipDigest(other.known(), (), wants_answer=False)), GossipDelta) == []
    )


def rented_pair() -> tuple[Gossip, NodeId]:
    """The gossip of a machine of an office, and the id of an instance."""
    office = furnish(random.Random(1), 2, is_plain=True, instances=1)
    return make(office, 0), office.setups[2].node


def digests_in_ten_seconds(gossip: Gossip, at: Clock) -> int:
    return sum(bool(messages(gossip.step(at(tick / 10)), GossipDigest)) for tick in range(100))


def test_digest_goes_to_an_instance_every_second(at: Clock) -> None:
    one, instance = rented_pair()
    one.link_opened(at(0), instance)
    assert 8 <= digests_in_ten_seconds(one, at) <= 13


def test_digests_between_machines_of_the_office_ride_in_probes_alone(
    pair: tuple[Gossip, Gossip], nodes: tuple[NodeId, NodeId], at: Clock
) -> None:
    one, _ = pair
    one.link_opened(at(0), nodes[1])
    assert digests_in_ten_seconds(one, at) == 0


def test_probe_is_answered_in_brief_by_who_knows_the_same(
    pair: tuple[Gossip, Gossip], nodes: tuple[NodeId, NodeId], at: Clock
) -> None:
    one, other = pair
    one.say(at(0), RECORD)
    converse(at(0), one, other, nodes, one.link_opened(at(0), nodes[1]))
    asked = one.probe(nodes[1], 7)
    assert isinstance(asked, Send)
    assert isinstance(asked.message, GossipDigest)
    assert asked.message.is_probe
    assert other.digest_arrived(nodes[0], asked.message) == [
        Send(nodes[0], GossipDigest((), (), False, other.summary(), 7))
    ]


def test_probe_brings_what_was_missed_both_ways(
    pair: tuple[Gossip, Gossip], nodes: tuple[NodeId, NodeId], at: Clock
) -> None:
    one, other = pair
    one.say(at(0), RECORD)
    other.say(at(0), Capacity((), ()))
    converse(at(0), one, other, nodes, [one.probe(nodes[1], 7)])
    assert one.capacity(nodes[1]) == Capacity((), ())
    assert other.record(nodes[0]) == RECORD
    assert one.summary() == other.summary()


def test_summary_differs_where_only_the_log_does(office: Office) -> None:
    assert make(office, 0).summary() != make(office, 0, count=3).summary()


def test_who_is_doubted_says_everything_again_above_it(
    pair: tuple[Gossip, Gossip], nodes: tuple[NodeId, NodeId], at: Clock
) -> None:
    one, other = pair
    one.link_opened(at(0), nodes[1])
    one.say(at(0), RECORD)
    assert one.outbid(at(1), Incarnation(1, 4))
    assert one.incarnation(nodes[0]) == Incarnation(1, 5)
    assert not one.outbid(at(1), Incarnation(1, 4))
    converse(at(1), one, other, nodes, one.step(at(1)))
    assert other.incarnation(nodes[0]) == Incarnation(1, 5)
    assert other.record(nodes[0]) == RECORD


def test_closed_link_is_not_used(pair: tuple[Gossip, Gossip], nodes: tuple[NodeId, NodeId], at: Clock) -> None:
    one, _ = pair
    one.link_opened(at(0), nodes[1])
    one.link_closed(nodes[1])
    one.say(at(1), RECORD)
    assert one.step(at(5)) == []


def test_missing_log_entries_are_sent(office: Office, nodes: tuple[NodeId, NodeId]) -> None:
    one, late = make(office, 0), make(office, 1, count=3)
    (digest,) = messages(late.link_opened(Now(0, 0, ""), nodes[0]), GossipDigest)
    assert isinstance(digest, GossipDigest)
    (delta,) = messages(one.digest_arrived(nodes[1], digest), LogDelta)
    assert isinstance(delta, LogDelta)
    assert delta.entries == office.log[3:]


def test_news_of_the_log_is_passed_on_but_not_back(office: Office, nodes: tuple[NodeId, NodeId], at: Clock) -> None:
    one = make(office, 0)
    others = [setup.node for setup in office.setups[1:]]
    for node in others:
        one.link_opened(at(0), node)
    told = [e.peer for e in one.log_grew(office.log[:1], others[0]) if isinstance(e, Send)]
    assert told == others[1:]


@pytest.mark.parametrize(
    "forge",
    [
        lambda office: entry(office, owner=2, signer=3),
        lambda office: office.ring.forge(KeyId(office.setups[2].node), "anything"),
        lambda office: replace(entry(office, owner=2, signer=2), signature=b"x" * 32),
        lambda office: entry(office, owner=2, signer=2, mesh=MeshId("ab" * 32)),
        lambda office: replace(entry(office, owner=2, signer=2), key=KeyId("x" * 52)),
    ],
)
def test_entry_that_its_owner_did_not_sign_is_refused(
    office: Office, pair: tuple[Gossip, Gossip], at: Clock, forge: Callable[[Office], Signed]
) -> None:
    one, _ = pair
    changed, effects = one.delta_arrived(at(0), office.setups[3].node, GossipDelta((forge(office),)))
    assert changed == []
    assert isinstance(effects[0], Reject)
    assert one.record(office.setups[2].node) is None


def test_entries_after_a_refused_one_of_the_same_owner_are_left_out(office: Office, at: Clock) -> None:
    one = make(office, 0)
    bad = replace(entry(office, owner=2, signer=2), signature=b"x" * 32)
    later = entry(office, owner=2, signer=2, version=2, value=Capacity((), ()))
    good = entry(office, owner=3, signer=3)
    changed, _ = one.delta_arrived(at(0), office.setups[1].node, GossipDelta((bad, later, good)))
    assert changed == [office.setups[3].node]
    assert one.capacity(office.setups[2].node) is None


@pytest.mark.parametrize(
    ("incarnation", "version", "is_taken"),
    [
        (Incarnation(1, 0), 2, True),
        (Incarnation(2, 0), 1, True),
        (Incarnation(1, 1), 1, True),
        (Incarnation(1, 0), 1, False),
        (Incarnation(0, 9), 9, False),
    ],
)
def test_later_entry_wins_whatever_the_order(
    office: Office, at: Clock, incarnation: Incarnation, version: int, is_taken: bool
) -> None:
    one, peer = make(office, 0), office.setups[1].node
    one.delta_arrived(at(0), peer, GossipDelta((entry(office, owner=2, signer=2),)))
    other = replace(RECORD, agent_version="2")
    news = entry(office, owner=2, signer=2, incarnation=incarnation, version=version, value=other)
    one.delta_arrived(at(0), peer, GossipDelta((news,)))
    assert (one.record(office.setups[2].node) == other) is is_taken


def test_higher_incarnation_drops_what_was_said_before(office: Office, at: Clock) -> None:
    one, peer = make(office, 0), office.setups[1].node
    one.delta_arrived(at(0), peer, GossipDelta((entry(office, owner=2, signer=2, value=Capacity((), ())),)))
    one.delta_arrived(at(0), peer, GossipDelta((entry(office, owner=2, signer=2, incarnation=Incarnation(2, 0)),)))
    assert one.capacity(office.setups[2].node) is None


def test_who_hears_a_later_self_outbids_it(office: Office, at: Clock) -> None:
    one = make(office, 0)
    one.link_opened(at(0), office.setups[1].node)
    one.say(at(0), RECORD)
    one.step(at(0))
    later = entry(office, owner=0, signer=0, incarnation=Incarnation(7, 3), value=replace(RECORD, agent_version="old"))
    changed, _ = one.delta_arrived(at(1), office.setups[1].node, GossipDelta((later,)))
    assert changed == []
    assert one.record(office.setups[0].node) == RECORD
    assert one.known()[0].incarnation == Incarnation(7, 4)
    (push,) = messages(one.step(at(1)), GossipDelta)
    assert isinstance(push, GossipDelta)
    assert len(push.entries) == 1


def test_nothing_is_said_before_there_is_a_mesh(office: Office, at: Clock) -> None:
    gossip = Gossip(
        office.setups[0].node, 1, MeshLog(office.notaries[0]), office.notaries[0], random.Random(1), GossipTiming()
    )
    gossip.say(at(0), RECORD)
    assert gossip.known() == ()
    assert gossip.deadline() is None


def doubting(office: Office, owner: int, counter: int, version: int, *doubted: int) -> GossipDelta:
    """What a member says when it doubts some others under their first incarnation."""
    doubts = tuple(Doubt(office.setups[number].node, Incarnation(1, 0), is_gone=False) for number in doubted)
    said = entry(office, owner, owner, value=Doubts(doubts), incarnation=Incarnation(1, counter), version=version)
    return GossipDelta((said,))


def who_doubts(office: Office, gossip: Gossip) -> dict[int, set[int]]:
    """{doubted: by whom}, as numbers; nobody whom nobody doubts."""
    numbers = {setup.node: number for number, setup in enumerate(office.setups)}
    found = {numbers[node]: {numbers[other] for other in gossip.doubters(node)} for node in numbers}
    return {number: who for number, who in found.items() if who}


def test_who_doubts_whom_follows_what_is_said_now(office: Office, at: Clock) -> None:
    gossip = make(office, 0)
    second, third = office.setups[1].node, office.setups[2].node
    gossip.delta_arrived(at(0), second, doubting(office, 1, 0, 1, 0, 2))
    gossip.delta_arrived(at(0), third, doubting(office, 2, 0, 1, 0))
    assert who_doubts(office, gossip) == {0: {1, 2}, 2: {1}}
    gossip.delta_arrived(at(1), second, doubting(office, 1, 0, 2, 2, 2))
    assert who_doubts(office, gossip) == {0: {2}, 2: {1}}
    gossip.delta_arrived(at(2), second, doubting(office, 1, 0, 1, 0))  # said before, heard late
    assert who_doubts(office, gossip) == {0: {2}, 2: {1}}
    gossip.delta_arrived(at(3), second, doubting(office, 1, 0, 3))
    assert who_doubts(office, gossip) == {0: {2}}


def test_higher_incarnation_that_says_nothing_of_doubts_has_none(office: Office, at: Clock) -> None:
    gossip, second = make(office, 0), office.setups[1].node
    gossip.delta_arrived(at(0), second, doubting(office, 1, 0, 1, 0, 2))
    gossip.delta_arrived(at(1), second, GossipDelta((entry(office, 1, 1, incarnation=Incarnation(1, 1)),)))
    assert who_doubts(office, gossip) == {}


def test_doubts_of_who_is_no_member_any_more_count_no_more(office: Office, at: Clock) -> None:
    gossip, second = make(office, 0), office.setups[1].node
    gossip.delta_arrived(at(0), second, doubting(office, 1, 0, 1, 0, 2))
    gossip.forget(second)
    assert who_doubts(office, gossip) == {}


def test_own_doubts_are_nobody_elses(office: Office, at: Clock) -> None:
    gossip = make(office, 0)
    gossip.say(at(0), Doubts((Doubt(office.setups[1].node, Incarnation(1, 0), is_gone=False),)))
    assert gossip.doubts(office.setups[0].node)
    assert who_doubts(office, gossip) == {}


def test_more_doubts_than_a_mesh_has_members_are_refused(office: Office, at: Clock) -> None:
    gossip, second = make(office, 0), office.setups[1].node
    gossip.delta_arrived(at(0), second, doubting(office, 1, 0, 1, *[2] * ENTRY_PARTS))
    assert who_doubts(office, gossip) == {2: {1}}
    _, effects = gossip.delta_arrived(at(1), second, doubting(office, 1, 0, 2, *[0] * (ENTRY_PARTS + 1)))
    assert [type(effect) for effect in effects] == [Reject]
    assert who_doubts(office, gossip) == {2: {1}}
