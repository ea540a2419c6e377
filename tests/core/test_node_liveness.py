"""How a node uses what it sees of others: what it offers, shows and says, and whom it leaves alone."""

import random

from meshgpu.core import effects as fx
from meshgpu.core import events as ev
from meshgpu.core.jobs.placement import Guest, Rule
from meshgpu.core.membership.clones import CLONE_S
from meshgpu.core.node import MachineView, Node, NodeConfig
from meshgpu.model import messages as msg
from meshgpu.model.clock import Now
from meshgpu.model.gossip import Doubt, Doubts, GossipEntry, Incarnation, KnockOutcome, MemberState
from meshgpu.model.ids import KeyId, NodeId
from meshgpu.model.trust import RemoveNode, Revoke
from meshgpu.sim.office import furnish
from tests.core.test_node_rekey import ADA, WALL_S, Machine, Room

GUEST = Guest(ADA)


class Hall(Room):
    """A room whose machines can be put out of reach; a knock at such a machine comes to `outcome`."""

    def __init__(self, size: int) -> None:
        self.outcome: KnockOutcome | None = None
        super().__init__(size)

    def _step(self, node: NodeId, event: ev.Event) -> list[fx.Effect]:
        effects = super()._step(node, event)
        for effect in effects:
            if isinstance(effect, fx.Knock) and self.outcome is not None:
                self.tell(node, ev.Knocked(effect.peer, self.outcome))
        return effects

    def lose(self, victim: NodeId, outcome: KnockOutcome | None = None) -> Machine:
        """Its agent is gone, and every Link to it is closed."""
        machine = self.machines.pop(victim)
        self.outcome = outcome
        for node in self.machines:
            self.tell(node, ev.LinkClosed(victim, "gone"))
        return machine

    def see(self, at: NodeId, whom: NodeId) -> MachineView:
        return next(v for v in self.machines[at].node.machines(self.now()) if v.member.node == whom)

    def offered(self, by: NodeId) -> list[NodeId]:
        done = self.machines[by].done
        return [e.peer for e in done if isinstance(e, fx.Send) and isinstance(e.message, msg.Offer)]


def test_member_in_doubt_is_offered_nothing_and_says_why() -> None:
    hall = Hall(4)
    first, second, third, steward = hall.nodes
    hall.lose(second)
    assert hall.see(first, second).state is MemberState.SUSPECT
    hall.run(first, "rig1")
    (job,) = hall.machines[steward].node.stewardship._jobs
    hall.tell(steward, ev.TreeArrived(job))
    spec = hall.machines[steward].node.stewardship._jobs[job].spec
    verdicts = {verdict.name: verdict for verdict in hall.machines[steward].node.why(spec)}
    assert (verdicts["rig1"].rule, verdicts["rig1"].refusal) == (Rule.DOWN, "does not answer at the moment")
    assert second not in hall.offered(steward)
    assert third not in hall.offered(steward)


def test_member_that_two_see_gone_is_down_and_offered_nothing() -> None:
    hall = Hall(4)
    first, second, _, _ = hall.nodes
    hall.lose(second, KnockOutcome.REFUSED)
    hall.pass_time(0.1)
    view = hall.see(first, second)
    assert view.state is MemberState.DOWN
    assert view.down_s is not None
    assert view.doubted_by == ("rig2", "rig3")


def test_machines_show_since_when_what_is_known() -> None:
    hall = Hall(3)
    first, second, _ = hall.nodes
    hall.pass_time(0.5)
    heard, told = hall.see(first, second).heard_s, hall.see(first, second).capacity_s
    hall.at += 2.0
    later = hall.see(first, second)
    assert heard is not None
    assert told is not None
    assert later.heard_s == heard + 2.0
    assert later.capacity_s == told + 2.0
    assert hall.see(first, first).state is MemberState.ALIVE


def test_who_is_doubted_refutes_above_what_was_doubted_and_the_doubt_is_taken_back() -> None:
    hall = Hall(3)
    first, second, third = hall.nodes
    hall.tell(first, ev.LinkClosed(second, "the path broke"))
    for _ in range(4):  # they hear of it by the next probe of a third machine
        hall.pass_time(1.0)
    gossip = hall.machines[third].node._gossip
    assert gossip.incarnation(second) == Incarnation(1, 1)
    assert hall.machines[second].node._gossip.incarnation(second) == Incarnation(1, 1)
    assert hall.see(third, second).state is MemberState.ALIVE
    assert hall.machines[first].node._gossip.doubts(first) == ()


def say(hall: Hall, to: NodeId, owner: NodeId, *doubts: Doubt) -> list[fx.Effect]:
    """`to` hears what a member says that it doubts now; returns what it orders then."""
    gossip = hall.machines[to].node._gossip
    version = gossip._owners[owner].version + 1
    entry = GossipEntry(hall.office.mesh, owner, gossip.incarnation(owner), version, Doubts(doubts))
    notary = hall.office.notaries[hall.nodes.index(owner)]
    delta = msg.GossipDelta((notary.sign(KeyId(owner), entry),))
    return hall.machines[to].node.step(hall.now(), ev.MessageArrived(owner, delta))


def test_doubt_of_who_is_in_doubt_itself_counts_for_nothing_and_nobody_is_its_own_witness() -> None:
    hall = Hall(4)
    first, second, third, fourth = hall.nodes
    node, doubt = hall.machines[first].node, Doubt(second, Incarnation(1, 0), is_gone=True)
    say(hall, first, second, doubt)
    say(hall, first, third, doubt)
    say(hall, first, fourth, doubt)
    assert set(dict(node._doubted_by(second))) == {third, fourth}
    hall.lose(fourth)
    assert set(dict(node._doubted_by(second))) == {third}


def test_who_hears_that_it_is_doubted_takes_itself_for_slow_and_of_another_it_looks_at_once() -> None:
    hall = Hall(4)
    first, second, third, _ = hall.nodes
    node = hall.machines[first].node
    hall.at += 0.6  # nobody was heard just now
    say(hall, first, third, Doubt(first, Incarnation(1, 0), is_gone=False))
    assert node._liveness.health == 1
    effects = say(hall, first, third, Doubt(second, Incarnation(1, 0), is_gone=False))
    assert [e.peer for e in effects if isinstance(e, fx.Send) and getattr(e.message, "is_probe", False)] == [second]


def test_what_a_doubted_member_says_above_the_doubt_ends_it_though_another_brings_it() -> None:
    hall = Hall(3)
    first, second, third = hall.nodes
    hall.lose(second)
    assert hall.machines[first].node._liveness.doubts().doubts
    record = hall.machines[first].node._gossip.record(second)
    assert record is not None
    entry = GossipEntry(hall.office.mesh, second, Incarnation(1, 1), 1, record)
    signed = hall.office.notaries[1].sign(KeyId(second), entry)
    hall.tell(first, ev.MessageArrived(third, msg.GossipDelta((signed,))))
    assert not hall.machines[first].node._liveness.doubts().doubts


def test_rented_machine_is_nobodys_witness() -> None:
    office = furnish(random.Random(1), 3, is_plain=True, instances=1)
    me, other, _, rented = (setup.node for setup in office.setups)
    node = Node(me, at(0.0), office.notaries[0], random.Random(1), NodeConfig("1"), ())
    node.step(at(0.0), ev.MeshEntered(office.mesh, office.log))
    node.step(at(0.0), ev.LinkOpened(rented))
    entry = GossipEntry(office.mesh, rented, Incarnation(1, 0), 1, Doubts((Doubt(other, Incarnation(1, 0), True),)))
    signed = office.notaries[3].sign(KeyId(rented), entry)
    node.step(at(0.1), ev.MessageArrived(rented, msg.GossipDelta((signed,))))
    assert node._gossip.doubts(rented)
    assert list(node._doubted_by(other)) == []


def test_incarnation_grows_with_every_start() -> None:
    hall = Hall(2)
    first, second = hall.nodes
    machine = hall.lose(second)
    for epoch in (2, 3):
        config = NodeConfig("1")
        node = Node(second, hall.now(), machine.notary, random.Random(1), config, machine.disk.values())
        for effect in node.start(hall.now()):
            if isinstance(effect, fx.Persist) and effect.record is not None:
                machine.disk[effect.kind, effect.key] = effect.record
        assert node._gossip.incarnation(second) == Incarnation(epoch, 0)
    hall.machines[second] = Machine(node, machine.notary, machine.disk)
    hall.tell(second, ev.LinkOpened(first))
    hall.tell(first, ev.LinkOpened(second))
    assert hall.machines[first].node._gossip.incarnation(second) == Incarnation(3, 0)


def test_member_that_leaves_is_neither_doubted_nor_shown() -> None:
    hall = Hall(3)
    first, second, _ = hall.nodes
    log = hall.machines[second].node.log
    hall.tell(second, ev.LogWritten(log.write(KeyId(second), [RemoveNode(second)])))
    hall.lose(second)
    hall.pass_time(1.0)
    assert second not in {view.member.node for view in hall.machines[first].node.machines(hall.now())}
    assert hall.machines[first].node._gossip.doubts(first) == ()


def test_doubt_is_taken_back_when_the_member_is_put_out() -> None:
    hall = Hall(3)
    first, second, third = hall.nodes
    hall.lose(second)
    hall.pass_time(0.1)
    assert [doubt.node for doubt in hall.machines[third].node._gossip.doubts(first)] == [second]
    admin = hall.office.setups[0].accounts[hall.office.setups[0].owner]
    hall.tell(first, ev.LogWritten(hall.machines[first].node.log.write(admin, [Revoke(second, (), stops_jobs=False)])))
    hall.pass_time(0.1)
    hall.pass_time(0.1)
    assert hall.machines[third].node._gossip.doubts(first) == ()
    assert second not in {row.owner for row in hall.machines[first].node._gossip.known()}


def test_heir_of_a_watched_member_is_alive_when_it_is_linked_and_nobody_doubts_the_old_one() -> None:
    hall = Hall(3)
    first, second, third = hall.nodes
    _, _, heir, notary = hall.rekey(second)
    machine = hall.lose(second)
    hall.pass_time(0.1)
    assert hall.see(first, heir).state is MemberState.DOWN
    assert hall.machines[first].node._gossip.doubts(first) == ()
    node = Node(heir, hall.now(), notary, random.Random(1), NodeConfig("1"), machine.disk.values())
    hall.machines[heir] = Machine(node, notary, machine.disk)
    node.start(hall.now())
    for other in (first, third):
        hall.tell(heir, ev.LinkOpened(other))
        hall.tell(other, ev.LinkOpened(heir))
    assert hall.see(first, heir).state is MemberState.ALIVE


def test_member_whose_old_agent_comes_back_beside_the_new_one_is_given_no_work_and_named() -> None:
    hall = Hall(2)
    first, second = hall.nodes

    def meet(instance: str) -> list[fx.Effect]:
        return [e for e in hall.tell(first, ev.LinkOpened(second, instance)) if isinstance(e, fx.Warn)]

    assert [meet(name) for name in ("a", "b", "b", "c")] == [[], [], [], []]
    assert not hall.see(first, second).is_cloned
    assert meet("a") == [], "a Link that was on its way when that agent ended"
    assert meet("c") == [], "whose Link it took"
    assert not hall.see(first, second).is_cloned
    assert len(meet("a")) == 1
    assert meet("c") == []
    assert hall.see(first, second).is_cloned
    candidate = next(c for c in hall.machines[first].node._candidates(GUEST, None) if c.node == second)
    assert (candidate.rule, candidate.refusal) == (Rule.CLONED, "two agents run with its keys")
    hall.pass_time(CLONE_S)
    assert not hall.see(first, second).is_cloned


def test_rented_machine_neither_probes_nor_is_probed_nor_doubted() -> None:
    office = furnish(random.Random(1), 2, is_plain=True, instances=1)
    for number in (0, 2):
        me, other = office.setups[number].node, office.setups[2 - number].node
        node = Node(me, at(0.0), office.notaries[number], random.Random(1), NodeConfig("1"), ())
        node.step(at(0.0), ev.MeshEntered(office.mesh, office.log))
        node.step(at(0.0), ev.LinkOpened(other))
        assert node.state(other) is MemberState.ALIVE
        done = [effect for tick in range(100) for effect in node.step(at(tick / 10), ev.Ticked())]
        digests = [e.message for e in done if isinstance(e, fx.Send) and isinstance(e.message, msg.GossipDigest)]
        assert len(digests) >= 8
        assert not any(digest.is_probe for digest in digests)
        node.step(at(10.0), ev.LinkClosed(other, "gone"))
        assert node.state(other) is MemberState.DOWN
        assert node._liveness.doubts() == Doubts(())


def at(boot_s: float) -> Now:
    return Now(boot_s, WALL_S + boot_s, "boot")
