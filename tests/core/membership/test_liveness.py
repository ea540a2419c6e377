"""What makes a member suspect or down: what this node sees itself, and nothing that others merely say."""

import random
from dataclasses import replace

import pytest

from meshgpu.core.effects import CloseLink, Effect, Knock, Reject, Send
from meshgpu.core.membership.liveness import FAVOURS_BURST, FAVOURS_PER_S, HEALTH_LIMIT, Liveness, LivenessTiming
from meshgpu.model.clock import Now
from meshgpu.model.gossip import Doubt, Incarnation, KnockOutcome, MemberState
from meshgpu.model.ids import Address, NodeId
from meshgpu.model.messages import GossipDigest, ProbeAnswer, ProbeFor

TIMING = LivenessTiming()
FIRST = Incarnation(1, 0)
TICK_S = 0.05


class Eye:
    """One node's view of members that the test plays. Those in `answering` answer each probe at once."""

    def __init__(self, size: int, timing: LivenessTiming = TIMING) -> None:
        self.peers = [NodeId(f"n{number}") for number in range(1, size)]
        self.linked = set(self.peers)
        self.answering = set(self.peers)
        self.incarnations = dict.fromkeys(self.peers, FIRST)
        self.doubters: dict[NodeId, dict[NodeId, Doubt]] = {}
        self.sent: list[Effect] = []
        self.at = 0.0
        self.liveness = Liveness(
            random.Random(1),
            timing,
            peers=lambda: self.peers,
            is_linked=lambda peer: peer in self.linked,
            incarnation=lambda peer: self.incarnations[peer],
            doubted_by=lambda peer: self.doubters.get(peer, {}).items(),
            probe=lambda peer, number: Send(peer, GossipDigest((), (), True, "all", number)),
            knock=lambda peer: [Knock(peer, Address("there:1"))],
        )
        for peer in self.peers:
            self.liveness.link_opened(self.now, peer)

    @property
    def now(self) -> Now:
        return Now(self.at, 1e9 + self.at, "boot")

    def step(self) -> list[Effect]:
        self.liveness.woke(self.now)
        effects = self.liveness.step(self.now)
        self.sent += effects
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, GossipDigest) and effect.peer in self.answering:
                self.liveness.heard(self.now, effect.peer)
        return effects

    def run(self, for_s: float) -> None:
        ends = self.at + for_s
        while self.at < ends:
            self.at += TICK_S
            self.step()

    def until(self, peer: NodeId, state: MemberState, within_s: float) -> float:
        """Seconds until `peer` is in that state."""
        began = self.at
        while self.state(peer) is not state:
            assert self.at - began < within_s, f"{peer} is {self.state(peer)} after {within_s} s"
            self.at += TICK_S
            self.step()
        return self.at - began

    def state(self, peer: NodeId) -> MemberState:
        return self.liveness.state(peer)

    def lose(self, peer: NodeId, outcome: KnockOutcome | None = None) -> list[Effect]:
        """Its Link closes; the knock that follows ends in `outcome`."""
        self.answering.discard(peer)
        self.linked.discard(peer)
        effects = self.liveness.link_closed(self.now, peer)
        self.sent += effects
        if outcome is not None:
            self.sent += self.liveness.knocked(self.now, peer, outcome)
        return effects

    def others_doubt(self, peer: NodeId, count: int, *, is_gone: bool = False) -> None:
        others = [other for other in self.peers if other != peer][:count]
        self.doubters[peer] = {other: Doubt(peer, self.incarnations[peer], is_gone) for other in others}
        self.sent += self.liveness.doubted(self.now, peer)

    def probes_of(self, peer: NodeId) -> int:
        return sum(isinstance(e, Send) and isinstance(e.message, GossipDigest) and e.peer == peer for e in self.sent)

    def helpers_of(self, peer: NodeId) -> list[NodeId]:
        asked = [e for e in self.sent if isinstance(e, Send) and isinstance(e.message, ProbeFor)]
        return [e.peer for e in asked if isinstance(e.message, ProbeFor) and e.message.target == peer]

    def last_number(self, peer: NodeId) -> int:
        sent = [e.message for e in self.sent if isinstance(e, Send) and e.peer == peer]
        return [m.number for m in sent if isinstance(m, GossipDigest)][-1]


A, B, C, D = (NodeId(f"n{number}") for number in range(1, 5))


# -- probing ----------------------------------------------------------------------------------------------------------


def test_one_member_is_probed_each_second_and_nobody_twice_before_all_were() -> None:
    eye = Eye(5)
    eye.run(12.5)
    counts = [eye.probes_of(peer) for peer in eye.peers]
    assert 10 <= sum(counts) <= 14
    assert max(counts) - min(counts) <= 1


def test_members_that_answer_stay_alive_and_undoubted() -> None:
    eye = Eye(5)
    eye.run(120.0)
    assert {eye.state(peer) for peer in eye.peers} == {MemberState.ALIVE}
    assert eye.liveness.doubts().doubts == ()
    assert not any(isinstance(effect, Knock | CloseLink) for effect in eye.sent)


def test_member_that_was_never_linked_is_down() -> None:
    assert Eye(3).state(NodeId("never")) is MemberState.DOWN


def test_three_others_are_asked_to_probe_who_does_not_answer_within_half_a_second() -> None:
    eye = Eye(7)
    eye.answering.discard(A)
    eye.run(8.0)
    helpers = eye.helpers_of(A)[: TIMING.helpers]
    assert len(set(helpers)) == 3
    assert A not in helpers


def test_member_that_a_helper_reaches_is_not_doubted() -> None:
    eye = Eye(4)
    eye.answering.discard(A)
    while not eye.helpers_of(A):
        eye.run(TICK_S)
    eye.liveness.helped(eye.helpers_of(A)[0], ProbeAnswer(A, eye.last_number(A), is_alive=True))
    eye.run(0.9)
    assert eye.state(A) is MemberState.ALIVE


def test_answer_of_who_was_not_asked_or_about_another_probe_counts_for_nothing() -> None:
    eye = Eye(8)
    eye.answering.discard(A)
    while not eye.helpers_of(A):
        eye.run(TICK_S)
    helper = eye.helpers_of(A)[0]
    stranger = next(peer for peer in eye.peers if peer != A and peer not in eye.helpers_of(A))
    eye.liveness.helped(stranger, ProbeAnswer(A, eye.last_number(A), is_alive=True))
    eye.liveness.helped(helper, ProbeAnswer(A, eye.last_number(A) - 1, is_alive=True))
    eye.until(A, MemberState.SUSPECT, 1.0)


def test_helper_probes_and_tells_whether_the_target_answered() -> None:
    eye = Eye(3)
    (probe,) = eye.liveness.asked_for(eye.now, B, ProbeFor(A, 41))
    assert isinstance(probe, Send)
    assert isinstance(probe.message, GossipDigest)
    assert probe.peer == A
    assert eye.liveness.acknowledged(A, probe.message.number) == [Send(B, ProbeAnswer(A, 41, is_alive=True))]
    assert eye.liveness.acknowledged(A, probe.message.number) == []


def test_helper_tells_in_time_that_the_target_did_not_answer() -> None:
    eye = Eye(3)
    eye.liveness.asked_for(eye.now, B, ProbeFor(A, 41))
    eye.run(TIMING.answer_s + TICK_S)
    assert Send(B, ProbeAnswer(A, 41, is_alive=False)) in eye.sent


def test_helper_without_a_link_to_the_target_says_so_at_once() -> None:
    eye = Eye(3)
    eye.linked.discard(A)
    no = [Send(B, ProbeAnswer(A, 41, is_alive=False))]
    assert eye.liveness.asked_for(eye.now, B, ProbeFor(A, 41)) == no


def test_nobody_is_probed_for_another_who_is_not_watched() -> None:
    eye = Eye(3)
    eye.linked.add(NodeId("instance"))
    (answer,) = eye.liveness.asked_for(eye.now, B, ProbeFor(NodeId("instance"), 41))
    assert answer == Send(B, ProbeAnswer(NodeId("instance"), 41, is_alive=False))


def favours(eye: Eye, asker: NodeId, count: int) -> int:
    """How many of `count` probes of A that the asker wants are made; A answers each at once."""
    made = 0
    for number in range(count):
        (effect,) = eye.liveness.asked_for(eye.now, asker, ProbeFor(A, number))
        if isinstance(effect, Reject):
            assert effect.peer == asker
            continue
        assert isinstance(effect, Send)
        assert isinstance(effect.message, GossipDigest)
        assert eye.liveness.acknowledged(A, effect.message.number)
        made += 1
    return made


def test_nobody_is_flooded_through_others() -> None:
    eye = Eye(4)
    assert favours(eye, B, 1000) == FAVOURS_BURST
    assert favours(eye, C, 1) == 1  # what one has had takes nothing from another
    eye.at += 5.0
    assert favours(eye, B, 1000) == 5 * FAVOURS_PER_S
    eye.at += 3600.0
    assert favours(eye, B, 1000) == FAVOURS_BURST


def test_who_joins_again_may_ask_as_a_new_member_may() -> None:
    eye = Eye(4)
    assert favours(eye, B, FAVOURS_BURST) == FAVOURS_BURST
    eye.liveness.forget(B)
    assert favours(eye, B, 1) == 1


def test_what_costs_no_probe_counts_against_nobody() -> None:
    eye = Eye(4)
    eye.linked.discard(A)
    for number in range(2 * FAVOURS_BURST):
        eye.liveness.asked_for(eye.now, B, ProbeFor(A, number))
    eye.linked.add(A)
    assert favours(eye, B, 1) == 1


# -- doubting ---------------------------------------------------------------------------------------------------------


def test_silent_member_is_suspect_and_down_after_the_longest_wait_where_nobody_shares_the_doubt() -> None:
    eye = Eye(5)
    eye.answering.discard(A)
    eye.until(A, MemberState.SUSPECT, 6.0)
    (doubt,) = eye.liveness.doubts().doubts
    assert doubt == Doubt(A, FIRST)
    took = eye.until(A, MemberState.DOWN, 60.0)
    assert took == pytest.approx(6 * TIMING.suspicion_s, abs=0.2)
    assert CloseLink(A, "it does not answer") in eye.sent


def test_each_turn_is_told_once() -> None:
    eye = Eye(10)
    assert sorted(eye.liveness.turned()) == [(peer, MemberState.ALIVE) for peer in sorted(eye.peers)]
    eye.others_doubt(A, 1, is_gone=True)
    eye.lose(A, KnockOutcome.REFUSED)
    eye.run(5.0)
    assert eye.liveness.turned() == [(A, MemberState.SUSPECT), (A, MemberState.DOWN)]
    assert eye.liveness.turned() == []


@pytest.mark.parametrize(("others", "factor"), [(0, 6.0), (1, 3.5), (3, 1.0), (8, 1.0)])
def test_doubt_that_others_share_lasts_shorter(others: int, factor: float) -> None:
    """Lifeguard's formula: logarithmic in the number of confirmations, from six times down to once."""
    eye = Eye(10)
    eye.lose(A, KnockOutcome.SILENT)
    eye.others_doubt(A, others)
    assert eye.until(A, MemberState.DOWN, 60.0) == pytest.approx(TIMING.suspicion_s * factor, abs=0.2)


def test_doubt_lasts_longer_in_a_large_mesh() -> None:
    eye = Eye(100)
    eye.lose(A, KnockOutcome.SILENT)
    eye.others_doubt(A, 3)
    assert eye.until(A, MemberState.DOWN, 60.0) == pytest.approx(2 * TIMING.suspicion_s, abs=0.2)


def test_doubt_of_an_earlier_incarnation_confirms_nothing() -> None:
    eye = Eye(10)
    eye.incarnations[A] = Incarnation(2, 0)
    eye.lose(A, KnockOutcome.SILENT)
    eye.doubters[A] = {other: Doubt(A, FIRST) for other in (B, C, D)}
    eye.run(TIMING.suspicion_s + 1.0)
    assert eye.state(A) is MemberState.SUSPECT


def test_doubts_of_others_make_this_node_look_at_once_and_nothing_else() -> None:
    eye = Eye(10)
    eye.run(1.0)
    before = eye.probes_of(A)
    eye.at += TIMING.answer_s
    eye.others_doubt(A, 8, is_gone=True)
    assert eye.probes_of(A) == before + 1
    assert eye.state(A) is MemberState.ALIVE
    eye.liveness.heard(eye.now, A)
    eye.run(60.0)
    assert eye.state(A) is MemberState.ALIVE
    assert eye.liveness.doubts().doubts == ()


def test_doubt_about_who_was_heard_just_now_costs_no_probe() -> None:
    eye = Eye(10)
    before = eye.probes_of(A)
    eye.liveness.heard(eye.now, A)
    eye.others_doubt(A, 8)
    assert eye.probes_of(A) == before


def test_anything_heard_ends_a_doubt() -> None:
    eye = Eye(5)
    eye.answering.discard(A)
    eye.until(A, MemberState.SUSPECT, 6.0)
    eye.liveness.heard(eye.now, A)
    assert eye.state(A) is MemberState.ALIVE
    assert eye.liveness.doubts().doubts == ()


def test_member_that_was_down_is_alive_when_its_link_opens() -> None:
    eye = Eye(5)
    eye.lose(A, KnockOutcome.SILENT)
    eye.until(A, MemberState.DOWN, 60.0)
    eye.linked.add(A)
    eye.liveness.link_opened(eye.now, A)
    assert eye.state(A) is MemberState.ALIVE


def test_probe_that_is_missed_while_in_doubt_leaves_no_deadline_behind() -> None:
    eye = Eye(2)
    eye.answering.discard(A)
    for _ in range(800):
        eye.run(TICK_S)
        deadline = eye.liveness.deadline()
        assert deadline is not None
        assert deadline > eye.at


def test_doubts_are_taken_back_when_a_member_leaves() -> None:
    eye = Eye(5)
    eye.lose(A, KnockOutcome.SILENT)
    eye.liveness.forget(A)
    assert eye.liveness.doubts().doubts == ()


# -- the knock --------------------------------------------------------------------------------------------------------


def test_closed_link_is_followed_by_a_knock() -> None:
    eye = Eye(5)
    assert eye.lose(A) == [Knock(A, Address("there:1"))]
    assert eye.state(A) is MemberState.SUSPECT


def test_refused_knock_and_one_witness_make_down_at_once() -> None:
    eye = Eye(10)
    eye.others_doubt(A, 1, is_gone=True)
    eye.lose(A, KnockOutcome.REFUSED)
    assert eye.state(A) is MemberState.DOWN


def test_port_that_closes_just_after_the_link_is_knocked_at_again_soon() -> None:
    eye = Eye(10)
    eye.lose(A, KnockOutcome.ANSWERED)
    eye.others_doubt(A, 1, is_gone=True)
    eye.sent.clear()
    eye.run(0.15)
    assert [effect for effect in eye.sent if isinstance(effect, Knock)] == [Knock(A, Address("there:1"))]
    eye.liveness.knocked(eye.now, A, KnockOutcome.REFUSED)
    assert eye.state(A) is MemberState.DOWN


def test_witness_may_come_after_the_knock() -> None:
    eye = Eye(10)
    eye.lose(A, KnockOutcome.REFUSED)
    assert eye.state(A) is MemberState.SUSPECT
    eye.others_doubt(A, 1, is_gone=True)
    assert eye.state(A) is MemberState.DOWN


@pytest.mark.parametrize(("outcome", "is_gone"), [(KnockOutcome.REFUSED, False), (KnockOutcome.SILENT, True)])
def test_refusal_that_only_one_has_seen_waits_its_time(outcome: KnockOutcome, is_gone: bool) -> None:
    eye = Eye(10)
    eye.others_doubt(A, 1, is_gone=is_gone)
    eye.lose(A, outcome)
    eye.run(TIMING.suspicion_s)
    assert eye.state(A) is MemberState.SUSPECT


def test_lone_node_needs_no_witness() -> None:
    eye = Eye(2)
    eye.lose(A, KnockOutcome.REFUSED)
    assert eye.state(A) is MemberState.DOWN


def test_lone_node_waits_no_longer_than_the_shortest_time_for_a_host_that_is_gone() -> None:
    eye = Eye(2)
    eye.lose(A, KnockOutcome.SILENT)
    assert eye.until(A, MemberState.DOWN, 60.0) == pytest.approx(TIMING.suspicion_s, abs=0.2)


def test_host_that_answers_without_its_agent_is_given_a_minute_though_all_doubt_it() -> None:
    eye = Eye(10)
    eye.lose(A, KnockOutcome.ANSWERED)
    eye.others_doubt(A, 8)
    took = 0.0
    while eye.state(A) is not MemberState.DOWN:
        took += TICK_S
        eye.at += TICK_S
        if any(isinstance(effect, Knock) for effect in eye.step()):
            eye.liveness.knocked(eye.now, A, KnockOutcome.ANSWERED)
        assert took < 70.0
    assert took == pytest.approx(TIMING.silent_s, abs=0.2)


def test_knocks_go_on_while_in_doubt_and_end_with_it() -> None:
    eye = Eye(5)
    eye.lose(A, KnockOutcome.SILENT)
    eye.run(10.5)
    assert sum(isinstance(effect, Knock) for effect in eye.sent) == 9  # at 0, .1, .3, .7, 1.5, 3.1, 5.1, 7.1 and 9.1 s
    eye.until(A, MemberState.DOWN, 60.0)
    eye.sent.clear()
    eye.run(10.0)
    assert not any(isinstance(effect, Knock) for effect in eye.sent)


# -- refutation -------------------------------------------------------------------------------------------------------


def test_higher_incarnation_refutes_a_doubt_and_the_same_one_does_not() -> None:
    eye = Eye(5)
    eye.answering.discard(A)
    eye.until(A, MemberState.SUSPECT, 6.0)
    eye.liveness.refuted(eye.now, A)
    assert len(eye.liveness.doubts().doubts) == 1
    eye.incarnations[A] = Incarnation(1, 1)
    eye.liveness.refuted(eye.now, A)
    assert eye.liveness.doubts().doubts == ()


def test_refuted_member_without_a_link_is_offered_nothing_and_doubted_again_after_a_minute() -> None:
    eye = Eye(5)
    eye.lose(A, KnockOutcome.SILENT)
    eye.incarnations[A] = Incarnation(1, 1)
    eye.liveness.refuted(eye.now, A)
    eye.run(TIMING.silent_s - 1.0)
    assert eye.state(A) is MemberState.SUSPECT
    assert eye.liveness.doubts().doubts == ()
    eye.run(2.0)
    assert eye.liveness.doubts().doubts == (Doubt(A, Incarnation(1, 1)),)


# -- this machine's own health ----------------------------------------------------------------------------------------


def test_late_step_raises_health_and_moves_the_waits() -> None:
    eye = Eye(5)
    eye.lose(A, KnockOutcome.SILENT)
    eye.run(1.0)
    eye.at += 4.0
    eye.liveness.woke(eye.now)
    assert eye.liveness.health == 1
    assert eye.until(A, MemberState.DOWN, 60.0) == pytest.approx(6 * TIMING.suspicion_s - 1.0, abs=1.1)


def test_late_step_is_no_missed_probe() -> None:
    eye = Eye(2)
    eye.answering.discard(A)
    while eye.probes_of(A) == 0:
        eye.run(TICK_S)
    eye.at += 4.0
    eye.step()
    assert eye.state(A) is MemberState.ALIVE


def test_worse_health_gives_others_more_time_and_answers_mend_it() -> None:
    eye = Eye(2)
    for _ in range(20):
        eye.liveness.was_doubted()
    assert eye.liveness.health == HEALTH_LIMIT
    eye.answering.discard(A)
    while eye.probes_of(A) == 0:
        eye.run(TICK_S)
    eye.run(2 * TIMING.answer_s * HEALTH_LIMIT)
    assert eye.state(A) is MemberState.ALIVE
    eye.answering.add(A)
    eye.liveness.heard(eye.now, A)
    assert eye.liveness.health == HEALTH_LIMIT - 1


def test_worse_health_asks_helpers_later() -> None:
    eye = Eye(3)
    for _ in range(20):
        eye.liveness.was_doubted()
    eye.answering.clear()
    while not eye.sent:
        eye.run(TICK_S)
    eye.run(TIMING.answer_s * HEALTH_LIMIT)
    assert not eye.helpers_of(A)
    assert not eye.helpers_of(B)
    eye.run(2 * TIMING.answer_s)
    assert eye.helpers_of(A) or eye.helpers_of(B)


def test_silence_of_all_helpers_is_put_down_to_this_machine() -> None:
    eye = Eye(4)
    eye.answering.discard(A)
    eye.until(A, MemberState.SUSPECT, 6.0)
    assert eye.liveness.health == 1


def test_resume_is_followed_by_calm_and_no_storm() -> None:
    eye = Eye(10)
    eye.run(3.0)
    eye.sent.clear()
    eye.at += 3600.0
    assert len(eye.step()) <= 1
    assert eye.lose(A) == []
    assert eye.state(A) is MemberState.SUSPECT
    eye.run(TIMING.calm_s - 1.0)
    assert eye.liveness.doubts().doubts == ()
    assert eye.probes_of(B) <= 1
    eye.run(2.0)
    assert [doubt.node for doubt in eye.liveness.doubts().doubts] == [A]


def test_link_that_closes_in_the_calm_is_looked_at_after_it_though_nothing_else_is_waited_for() -> None:
    eye = Eye(2, replace(TIMING, period_s=1000.0, jitter=0.0))
    eye.run(1001.0)  # one probe, answered
    eye.at += 3600.0
    eye.step()
    eye.run(1.0)
    eye.lose(A)
    eye.run(TIMING.calm_s)
    assert [doubt.node for doubt in eye.liveness.doubts().doubts] == [A]


def test_member_that_misses_a_probe_in_the_calm_is_not_doubted_yet() -> None:
    eye = Eye(2, replace(TIMING, calm_s=20.0))
    eye.run(1.0)
    eye.at += 3600.0
    eye.step()
    eye.answering.discard(A)
    eye.run(15.0)
    assert eye.state(A) is MemberState.ALIVE
