"""A rented machine ends itself in time, for each reason, and exactly then."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from meshgpu.core import events as ev
from meshgpu.core.burst.instance import (
    DRAIN_S,
    LEAVE_EARLY_S,
    NOTICE_MARGIN_S,
    OFF_EARLY_S,
    REPEAT_S,
    InstanceLife,
)
from meshgpu.core.effects import EndAttempt, PowerOff, Send
from meshgpu.core.node import Node, NodeConfig
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.model import messages as msg
from meshgpu.model.clock import Now
from meshgpu.model.enrolment import InstanceTerms
from meshgpu.model.ids import KeyId, NodeId
from meshgpu.model.job import AttemptState, JobSpec, PlacingVote, Result, StopMode
from meshgpu.model.trust import RemoveNode, Signed
from meshgpu.sim.office import Office
from tests.core.conftest import WALL_S

Clock = Callable[[float], Now]
LEASE_S, IDLE_S, ALONE_S = 7200.0, 600.0, 900.0
TERMS = InstanceTerms(WALL_S + LEASE_S, IDLE_S, ALONE_S)


@pytest.fixture
def life(at: Clock) -> InstanceLife:
    return InstanceLife(TERMS, at(0))


def reason(life: InstanceLife, now: Now, *, linked: bool = True, idle: bool = False) -> str | None:
    effects = life.step(now, is_linked=linked, is_idle=idle)
    assert len(effects) <= 1
    return effects[0].reason if effects and isinstance(effects[0], PowerOff) else None


# -- idle --------------------------------------------------------------------------------------------------------------


def test_nothing_to_do_ends_it(life: InstanceLife, at: Clock) -> None:
    assert life.deadline() == IDLE_S
    assert reason(life, at(IDLE_S - 0.001), idle=True) is None
    assert not life.refusal
    assert reason(life, at(IDLE_S), idle=True) == "nothing runs here"
    assert "about to end" in life.refusal


def test_work_starts_the_idle_time_anew(life: InstanceLife, at: Clock) -> None:
    assert reason(life, at(IDLE_S - 1), idle=True) is None
    assert reason(life, at(IDLE_S - 0.5)) is None  # it runs
    assert reason(life, at(2000)) is None
    assert reason(life, at(2001), idle=True) is None
    assert life.deadline() == 2001 + IDLE_S
    assert reason(life, at(2001 + IDLE_S - 0.001), idle=True) is None
    assert reason(life, at(2001 + IDLE_S), idle=True) == "nothing runs here"


# -- contact -----------------------------------------------------------------------------------------------------------


def test_without_the_office_it_stops_its_work_and_ends(life: InstanceLife, at: Clock) -> None:
    assert reason(life, at(100)) is None
    assert reason(life, at(200), linked=False) is None
    assert life.deadline() == 200 + ALONE_S
    assert reason(life, at(200 + ALONE_S - 0.001), linked=False) is None
    assert not life.is_leaving
    assert reason(life, at(200 + ALONE_S), linked=False) is None
    assert life.is_leaving
    assert life.deadline() == 200 + ALONE_S + DRAIN_S
    assert reason(life, at(200 + ALONE_S + DRAIN_S - 0.001), linked=False) is None
    assert reason(life, at(200 + ALONE_S + DRAIN_S), linked=False) == "nobody of the office is in touch"


def test_it_ends_as_soon_as_its_work_has(life: InstanceLife, at: Clock) -> None:
    assert reason(life, at(ALONE_S), linked=False) is None
    assert reason(life, at(ALONE_S + 7), linked=False, idle=True) == "nobody of the office is in touch"


def test_never_linked_counts_from_the_start(life: InstanceLife, at: Clock) -> None:
    assert reason(life, at(ALONE_S - 0.001), linked=False) is None
    assert reason(life, at(ALONE_S), linked=False) is None
    assert life.is_leaving


def test_a_link_starts_the_time_anew(life: InstanceLife, at: Clock) -> None:
    assert reason(life, at(ALONE_S - 1), linked=False) is None
    assert reason(life, at(ALONE_S - 0.5)) is None
    assert reason(life, at(ALONE_S + 500), linked=False) is None
    assert not life.is_leaving


# -- the lease ---------------------------------------------------------------------------------------------------------


def test_work_stops_before_the_lease_ends_and_then_the_machine(life: InstanceLife, at: Clock) -> None:
    assert reason(life, at(LEASE_S - LEAVE_EARLY_S - 0.001)) is None
    assert life.deadline() == LEASE_S - LEAVE_EARLY_S
    assert not life.is_leaving
    assert reason(life, at(LEASE_S - LEAVE_EARLY_S)) is None
    assert life.is_leaving
    assert life.deadline() == LEASE_S - OFF_EARLY_S
    assert reason(life, at(LEASE_S - OFF_EARLY_S - 0.001)) is None
    assert reason(life, at(LEASE_S - OFF_EARLY_S)) == "its lease ends"


def test_the_lease_ends_by_the_wall_clock(life: InstanceLife) -> None:
    """A clock that was set right after boot counts at once."""
    late = Now(10.0, WALL_S + LEASE_S, "boot")
    assert reason(life, late) == "its lease ends"


# -- the provider ------------------------------------------------------------------------------------------------------


def test_spot_notice_drains_until_just_before_its_moment(life: InstanceLife, at: Clock) -> None:
    life.noticed(at(100), WALL_S + 220)
    assert life.is_leaving
    assert reason(life, at(100)) is None
    assert life.deadline() == 220 - NOTICE_MARGIN_S
    assert reason(life, at(220 - NOTICE_MARGIN_S - 0.001)) is None
    assert reason(life, at(220 - NOTICE_MARGIN_S)) == "the provider takes it back"


def test_a_notice_that_is_heard_again_moves_nothing_but_earlier(life: InstanceLife, at: Clock) -> None:
    life.noticed(at(100), WALL_S + 220)
    life.noticed(at(105), WALL_S + 400)
    assert reason(life, at(105)) is None
    assert life.deadline() == 220 - NOTICE_MARGIN_S


def test_recommendation_lets_work_end_but_takes_none(life: InstanceLife, at: Clock) -> None:
    assert reason(life, at(100)) is None
    life.noticed(at(100), None)
    assert "taken back" in life.refusal
    assert not life.is_leaving
    assert reason(life, at(1000)) is None
    assert reason(life, at(1001), idle=True) == "the provider may take it back"


def test_a_machine_that_should_be_off_is_told_again(life: InstanceLife, at: Clock) -> None:
    assert reason(life, at(IDLE_S), idle=True)
    assert life.deadline() == IDLE_S + REPEAT_S
    assert reason(life, at(IDLE_S + REPEAT_S - 0.001), idle=True) is None
    assert reason(life, at(IDLE_S + REPEAT_S), idle=True) == "nothing runs here"


# -- in its node -------------------------------------------------------------------------------------------------------


@pytest.fixture
def node(office: Office, at: Clock) -> Node:
    """The fourth machine of the office, as if it were rented, with one Link."""
    setup = office.setups[3]
    config = NodeConfig("1", fence="bubblewrap", may_steward=False, instance=TERMS)
    node = Node(setup.node, at(0), office.notaries[3], random.Random(1), config, ())
    node.start(at(0))
    node.step(at(0), ev.MeshEntered(office.mesh, office.log))
    node.step(at(0), ev.MachineRead(setup.inventory, ()))
    node.step(at(0), ev.LinkOpened(office.setups[0].node))
    return node


@pytest.fixture
def hear(office: Office, node: Node, at: Clock) -> Callable[[float, msg.Message], list[object]]:
    """What the node does on a message of the steward, messages unpacked."""

    def step(now_s: float, message: msg.Message) -> list[object]:
        effects = node.step(at(now_s), ev.MessageArrived(office.setups[0].node, message))
        return [getattr(effect, "message", effect) for effect in effects]

    return step


Hear = Callable[[float, msg.Message], list[object]]
Signing = Callable[..., tuple[JobSpec, Signed]]


def run(
    office: Office, node: Node, hear: Hear, spec: JobSpec, signed: Signed, at: Clock, *, is_activated: bool = True
) -> None:
    """Let the node run a job of the first machine, from the offer on."""
    (answer,) = [m for m in hear(1, msg.Offer(spec.job, 1, signed)) if isinstance(m, msg.OfferAnswer)]
    assert answer.hold is not None, answer.refusal
    steward = office.setups[0].node
    vote = PlacingVote(
        office.mesh, spec.job, office.notaries[0].digest(signed), 1, node.node, answer.hold, NodeId(steward)
    )
    hear(1.1, msg.Commit(spec.job, 1, answer.hold, (office.notaries[0].sign(KeyId(steward), vote),)))
    if not is_activated:
        return
    hear(1.2, msg.Activate(spec.job, 1))
    node.step(at(1.3), ev.AttemptBegan(spec.job, 1, WALL_S))


def test_notice_stops_the_job_once_and_the_machine_after_its_result_is_told(
    office: Office, node: Node, hear: Hear, signed: Signing, at: Clock
) -> None:
    spec, envelope = signed()
    run(office, node, hear, spec, envelope, at)
    effects = node.step(at(10), ev.InterruptionNoticed(WALL_S + 130))
    assert [e for e in effects if isinstance(e, EndAttempt | PowerOff)] == [EndAttempt(spec.job, 1, StopMode.STOP)]
    assert not [e for e in node.step(at(10.5), ev.Ticked()) if isinstance(e, EndAttempt | PowerOff)]
    other, other_signed = signed(2)
    (refusal,) = [m for m in hear(11, msg.Offer(other.job, 1, other_signed)) if isinstance(m, msg.OfferAnswer)]
    assert "the provider takes it back" in refusal.refusal
    stopped = Result(AttemptState.EXITED, 143)
    effects = node.step(at(12), ev.AttemptFinished(spec.job, 1, WALL_S + 12, stopped))
    assert not [e for e in effects if isinstance(e, EndAttempt | PowerOff)]
    told = hear(12.1, msg.ReportAck(spec.job, 1))
    assert [e for e in told if isinstance(e, PowerOff)] == [PowerOff("the provider takes it back")]


def test_notice_after_a_recommendation_still_stops_the_job(
    office: Office, node: Node, hear: Hear, signed: Signing, at: Clock
) -> None:
    spec, envelope = signed()
    run(office, node, hear, spec, envelope, at)
    assert not [e for e in node.step(at(10), ev.InterruptionNoticed(None)) if isinstance(e, EndAttempt)]
    effects = node.step(at(11), ev.InterruptionNoticed(WALL_S + 130))
    assert [e for e in effects if isinstance(e, EndAttempt)] == [EndAttempt(spec.job, 1, StopMode.STOP)]


def test_what_never_started_is_given_back(office: Office, node: Node, hear: Hear, signed: Signing, at: Clock) -> None:
    spec, envelope = signed()
    (answer,) = [m for m in hear(1, msg.Offer(spec.job, 1, envelope)) if isinstance(m, msg.OfferAnswer)]
    effects = node.step(at(2), ev.InterruptionNoticed(WALL_S + 130))
    assert node.attempts.allocations() == ()
    assert [e for e in effects if isinstance(e, PowerOff)]
    assert answer.hold is not None


def test_accepted_attempt_is_preempted_and_told(
    office: Office, node: Node, hear: Hear, signed: Signing, at: Clock
) -> None:
    spec, envelope = signed()
    run(office, node, hear, spec, envelope, at, is_activated=False)
    effects = node.step(at(2), ev.InterruptionNoticed(WALL_S + 130))
    reports = [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, msg.AttemptReport)]
    assert [report.result and report.result.outcome for report in reports] == [AttemptState.PREEMPTED]
    assert not [e for e in effects if isinstance(e, EndAttempt | PowerOff)]


def test_result_that_only_a_machine_that_left_could_hear_does_not_keep_it_running(
    office: Office, node: Node, hear: Hear, signed: Signing, at: Clock
) -> None:
    spec, envelope = signed()
    run(office, node, hear, spec, envelope, at)
    steward = office.setups[0].node
    log = MeshLog(office.notaries[0])
    log.enter(office.mesh, office.log)
    node.step(at(10), ev.LinkOpened(office.setups[1].node))
    node.step(at(10), ev.LogWritten(log.write(KeyId(steward), (RemoveNode(steward),))))
    node.step(at(11), ev.LinkClosed(steward, "no longer trusted"))
    assert not [e for e in node.step(at(1000), ev.Ticked()) if isinstance(e, EndAttempt | PowerOff)], "its job runs on"
    node.step(at(1001), ev.AttemptFinished(spec.job, 1, WALL_S + 1001, Result(AttemptState.EXITED, 0)))
    off = node.step(at(1001 + IDLE_S), ev.Ticked())
    assert [e for e in off if isinstance(e, PowerOff)] == [PowerOff("nothing runs here")]


def test_rented_machine_that_nobody_links_powers_off(node: Node, office: Office, at: Clock) -> None:
    node.step(at(100), ev.LinkClosed(office.setups[0].node, "gone"))
    deadlines = []
    now = at(100)
    while not (off := [e for e in node.step(now, ev.Ticked()) if isinstance(e, PowerOff)]):
        deadline = node.deadline()
        assert deadline is not None
        deadlines.append(deadline)
        now = at(max(deadline, now.boot_s + 0.01))
    assert off == [PowerOff("nothing runs here")]
    assert now.boot_s == IDLE_S


def test_a_machine_of_the_office_never_ends_itself(node: Node, office: Office, at: Clock) -> None:
    config = replace(node._config, instance=None)
    rig = Node(office.setups[3].node, at(0), office.notaries[3], random.Random(1), config, ())
    rig.step(at(0), ev.MeshEntered(office.mesh, office.log))
    for moment in (10.0, ALONE_S + DRAIN_S + 1, LEASE_S + 1):
        for event in (ev.InterruptionNoticed(WALL_S), ev.Ticked()):
            assert not [e for e in rig.step(at(moment), event) if isinstance(e, PowerOff)]
