"""A node's own attempts: held, accepted, started when activated, ended, told until heard."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import pytest

from meshgpu.core.effects import AdoptAttempt, DiscardAttempt, Effect, EndAttempt, Persist, Reject, Send, StartAttempt
from meshgpu.core.jobs.attempts import HOLDS_LIMIT, Attempts, AttemptTiming
from meshgpu.core.jobs.queue import CLAIM_AFTER_S
from meshgpu.core.owner import GRACE_S, Owner, OwnerPolicy
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import RequestRules
from meshgpu.model.clock import Now
from meshgpu.model.ids import GpuId, HoldId, JobId, KeyId, NodeId, UserName, digest, display_name
from meshgpu.model.inventory import GpuProcess, GpuReading, ProcessKind
from meshgpu.model.job import (
    Action,
    AttemptState,
    JobRequest,
    JobSpec,
    Phase,
    PlacingVote,
    Priority,
    Result,
    SecretBox,
    SecretWrap,
    StopMode,
)
from meshgpu.model.lending import Pause
from meshgpu.model.logs import LogChunk
from meshgpu.model.messages import (
    Activate,
    AttemptOutput,
    AttemptReport,
    Cancel,
    Commit,
    CommitAnswer,
    Fence,
    Offer,
    OfferAnswer,
    Release,
    ReportAck,
)
from meshgpu.model.receipt import Evidence, Receipt
from meshgpu.model.records import AttemptRecord
from meshgpu.model.trust import Signed
from meshgpu.sim.office import Office

T = TypeVar("T")
Clock = Callable[[float], Now]
Sign = Callable[..., tuple[JobSpec, Signed]]
TIMING = AttemptTiming()
DONE = Result(AttemptState.EXITED, 0)


@dataclass
class Bench:
    """The fourth machine's attempts, and the first machine as the steward of one job."""

    attempts: Attempts
    office: Office
    steward: NodeId
    spec: JobSpec
    signed: Signed
    at: Clock

    def offer(self, now_s: float = 0.0, epoch: int = 1) -> OfferAnswer:
        effects = self.attempts.offered(self.at(now_s), self.steward, Offer(self.spec.job, epoch, self.signed))
        return only(effects, OfferAnswer)

    def commit(self, hold: HoldId | None, epoch: int = 1) -> Commit:
        assert hold is not None
        digest = self.office.notaries[0].digest(self.signed)
        node = self.office.setups[3].node
        vote = PlacingVote(self.office.mesh, self.spec.job, digest, epoch, node, hold, self.steward)
        ticket = self.office.notaries[0].sign(KeyId(self.steward), vote)
        return Commit(self.spec.job, epoch, hold, (ticket,))

    def accept(self, epoch: int = 1) -> list[Effect]:
        hold = self.offer(epoch=epoch).hold
        return self.attempts.committed(self.at(0.1), self.steward, self.commit(hold, epoch))

    def activate(self, now_s: float = 0.2) -> list[Effect]:
        return self.attempts.activated(self.at(now_s), self.steward, Activate(self.spec.job, 1))

    def run(self) -> None:
        self.accept()
        self.activate()
        self.attempts.began(self.spec.job, 1, 100.0)

    def cancel(self, action: Action = Action.STOP, steward: NodeId | None = None) -> list[Effect]:
        request = JobRequest(
            self.office.mesh, UserName("ada"), action, self.spec.stewards[0], 0.0, "nonce", self.spec.job
        )
        key = self.office.setups[1].accounts[UserName("ada")]
        message = Cancel(self.spec.job, 1, self.signed, self.office.notaries[1].sign(key, request))
        return self.attempts.cancelled(self.at(1), steward or self.steward, message)

    @property
    def state(self) -> AttemptState | None:
        found = self.attempts.latest(self.spec.job)
        return found.state if found else None


@pytest.fixture
def bench(office: Office, signed: Sign, at: Clock) -> Bench:
    spec, envelope = signed()
    return Bench(make(office), office, office.setups[0].node, spec, envelope, at)


def make(office: Office, policy: OwnerPolicy | None = None, fence: str = "bubblewrap") -> Attempts:
    log = MeshLog(office.notaries[3])
    log.enter(office.mesh, office.log)
    node = office.setups[3].node
    rules = RequestRules(office.notaries[3], log, node)
    owner = Owner(policy or OwnerPolicy())
    attempts = Attempts(node, log, rules, office.notaries[3], random.Random(1), owner, TIMING)
    attempts.fence = fence
    attempts.machine_read(office.setups[3].inventory, ())
    return attempts


def only(effects: list[Effect], kind: type[T]) -> T:
    """The one effect, or the one message that is sent, of a kind."""
    (found,) = all_of(effects, kind)
    return found


def all_of(effects: list[Effect], kind: type[T]) -> list[T]:
    things = [effect.message if isinstance(effect, Send) else effect for effect in effects]
    return [thing for thing in things if isinstance(thing, kind)]


def record_of(effects: list[Effect]) -> AttemptRecord:
    """The attempt's record as the effects leave it."""
    *_, record = [effect.record for effect in effects if isinstance(effect, Persist) and effect.kind == "attempt"]
    assert isinstance(record, AttemptRecord)
    return record


# -- holds -------------------------------------------------------------------------------------------------------------


def test_offer_is_answered_with_a_hold_on_named_gpus(bench: Bench) -> None:
    answer = bench.offer()
    assert answer.hold is not None
    assert [share.uuid for share in answer.gpus] == ["GPU-rig3-0"]
    assert [allocation.job for allocation in bench.attempts.allocations()] == [bench.spec.job]


def test_hold_runs_out(bench: Bench) -> None:
    hold = bench.offer().hold
    assert bench.attempts.deadline() == TIMING.hold_s
    bench.attempts.step(bench.at(TIMING.hold_s))
    assert bench.attempts.allocations() == ()
    answer = only(bench.attempts.committed(bench.at(3.1), bench.steward, bench.commit(hold)), CommitAnswer)
    assert not answer.accepted


def test_hold_that_ran_out_is_not_committed_even_before_anybody_looked(bench: Bench) -> None:
    hold = bench.offer().hold
    answer = only(bench.attempts.committed(bench.at(3.0), bench.steward, bench.commit(hold)), CommitAnswer)
    assert answer.reason == "the hold has run out"


def test_gpu_that_is_held_is_not_held_again(bench: Bench, signed: Sign) -> None:
    bench.offer()
    spec, envelope = signed(number=2)
    effects = bench.attempts.offered(bench.at(0), bench.steward, Offer(spec.job, 1, envelope))
    answer = only(effects, OfferAnswer)
    assert answer.hold is None
    assert "is busy" in answer.refusal


def test_repeated_offer_replaces_its_hold(bench: Bench) -> None:
    first, second = bench.offer(), bench.offer()
    assert first.hold != second.hold
    assert second.hold is not None
    assert len(bench.attempts.allocations()) == 1


def test_released_hold_is_free_but_only_for_its_steward(bench: Bench) -> None:
    hold = bench.offer().hold
    assert hold is not None
    bench.attempts.released(bench.office.setups[2].node, Release(bench.spec.job, hold))
    bench.attempts.released(bench.steward, Release(bench.spec.job, HoldId("other")))
    assert bench.attempts.allocations()
    bench.attempts.released(bench.steward, Release(bench.spec.job, hold))
    assert bench.attempts.allocations() == ()


def test_offer_of_a_machine_that_does_not_hold_the_job_is_refused(bench: Bench) -> None:
    other = bench.office.setups[2].node
    answer = only(bench.attempts.offered(bench.at(0), other, Offer(bench.spec.job, 1, bench.signed)), OfferAnswer)
    assert answer.hold is None


def test_forged_spec_is_rejected(bench: Bench) -> None:
    forged = bench.office.ring.forge(bench.signed.key, bench.spec)
    effects = bench.attempts.offered(bench.at(0), bench.steward, Offer(bench.spec.job, 1, forged))
    assert isinstance(effects[0], Reject)
    assert bench.attempts.allocations() == ()


def test_offer_under_another_id_or_for_another_machine_is_refused(bench: Bench, signed: Sign) -> None:
    effects = bench.attempts.offered(bench.at(0), bench.steward, Offer(JobId("j" * 26), 1, bench.signed))
    assert only(effects, OfferAnswer).hold is None
    spec, envelope = signed(machine=bench.office.setups[2].node)
    effects = bench.attempts.offered(bench.at(0), bench.steward, Offer(spec.job, 1, envelope))
    assert only(effects, OfferAnswer).refusal == "the job is meant for another machine"


def test_owner_who_lends_nothing_gets_no_jobs(bench: Bench) -> None:
    bench.attempts = make(bench.office, OwnerPolicy(lends=False))
    assert bench.offer().hold is None


def test_open_offers_are_limited(bench: Bench, signed: Sign) -> None:
    inventory = replace(bench.office.setups[3].inventory, cpus=10_000)
    bench.attempts.machine_read(inventory, ())
    resources = replace(bench.spec.resources, gpus=replace(bench.spec.resources.gpus, count=0))
    for number in range(HOLDS_LIMIT):
        spec, envelope = signed(number, resources=resources)
        bench.attempts.offered(bench.at(0), bench.steward, Offer(spec.job, 1, envelope))
    assert len(bench.attempts.allocations()) == HOLDS_LIMIT
    spec, envelope = signed(HOLDS_LIMIT, resources=resources)
    effects = bench.attempts.offered(bench.at(0), bench.steward, Offer(spec.job, 1, envelope))
    assert only(effects, OfferAnswer).refusal == "has too many open offers"


# -- claims ------------------------------------------------------------------------------------------------------------


OLD_S = CLAIM_AFTER_S + 1.0


def claim(bench: Bench, spec: JobSpec, envelope: Signed, now_s: float = OLD_S, epoch: int = 1) -> list[Effect]:
    return bench.attempts.offered(bench.at(now_s), bench.steward, Offer(spec.job, epoch, envelope, claims=True))


def test_room_is_kept_free_for_a_job_that_waited_for_long(bench: Bench, signed: Sign) -> None:
    bench.run()
    waiting = signed(number=2)
    effects = claim(bench, *waiting)
    assert only(effects, OfferAnswer).hold is None
    assert all_of(effects, EndAttempt) == []
    (kept,) = bench.attempts.kept()
    assert (kept.job, [share.uuid for share in kept.gpus]) == (waiting[0].job, ["GPU-rig3-0"])
    bench.attempts.finished(bench.at(OLD_S + 1), bench.spec.job, 1, 2.0, DONE)
    other = signed(number=3)
    refused = bench.attempts.offered(bench.at(OLD_S + 2), bench.steward, Offer(other[0].job, 1, other[1]))
    assert only(refused, OfferAnswer).refusal.endswith(f"kept free for {display_name('train', waiting[0].job)} (ada)")
    hold = only(claim(bench, *waiting, now_s=OLD_S + 3), OfferAnswer).hold
    assert hold is not None
    bench.spec, bench.signed = waiting
    bench.attempts.committed(bench.at(OLD_S + 3.1), bench.steward, bench.commit(hold))
    assert bench.attempts.kept() == ()


def test_room_is_kept_no_longer_than_the_job_asks(bench: Bench, signed: Sign) -> None:
    bench.run()
    claim(bench, *signed(number=2))
    claim(bench, *signed(number=2), now_s=OLD_S + 10)
    bench.attempts.step(bench.at(OLD_S + TIMING.claim_s))
    assert bench.attempts.kept() != ()
    bench.attempts.step(bench.at(OLD_S + 10 + TIMING.claim_s))
    assert bench.attempts.kept() == ()


def test_young_job_claims_nothing_from_those_who_do_not_give_way(bench: Bench, signed: Sign) -> None:
    bench.run()
    effects = claim(bench, *signed(number=2, priority=Priority.HIGH), now_s=CLAIM_AFTER_S - 1)
    assert all_of(effects, EndAttempt) == []
    assert bench.attempts.kept() == ()


def test_job_that_gives_way_is_stopped_for_one_of_higher_priority(bench: Bench, signed: Sign) -> None:
    bench.spec, bench.signed = signed(preemptible=True)
    bench.run()
    important = signed(number=2, priority=Priority.HIGH)
    effects = claim(bench, *important, now_s=1.0)
    assert only(effects, EndAttempt).mode is StopMode.STOP
    assert record_of(effects).preempted == f"gave way to {display_name('train', important[0].job)} (ada)"
    assert all_of(claim(bench, *important, now_s=2.0), EndAttempt) == []
    ended = bench.attempts.finished(bench.at(3), bench.spec.job, 1, 2.0, Result(AttemptState.EXITED, 143))
    report = only(ended, AttemptReport)
    assert report.result is not None
    assert report.result.outcome is AttemptState.PREEMPTED
    again = bench.attempts.offered(bench.at(4), bench.steward, Offer(bench.spec.job, 2, bench.signed))
    assert only(again, OfferAnswer).hold is None, "it must not take back what it gave"


@pytest.mark.parametrize("priority", [Priority.LOW, Priority.NORMAL])
def test_nobody_gives_way_to_his_equal(bench: Bench, signed: Sign, priority: Priority) -> None:
    bench.spec, bench.signed = signed(preemptible=True)
    bench.run()
    effects = claim(bench, *signed(number=2, priority=priority))
    assert all_of(effects, EndAttempt) == []


def test_job_that_did_not_agree_is_never_stopped_for_another(bench: Bench, signed: Sign) -> None:
    bench.spec, bench.signed = signed(priority=Priority.LOW)
    bench.run()
    assert all_of(claim(bench, *signed(number=2, priority=Priority.HIGH)), EndAttempt) == []


def test_claim_yields_to_a_higher_priority_only(bench: Bench, signed: Sign) -> None:
    bench.run()
    claim(bench, *signed(number=2))
    claim(bench, *signed(number=3))
    assert [kept.job for kept in bench.attempts.kept()] == [signed(number=2)[0].job]
    high = signed(number=4, priority=Priority.HIGH)
    claim(bench, *high)
    assert [kept.job for kept in bench.attempts.kept()] == [high[0].job]


def test_nobody_is_stopped_where_that_would_not_help(bench: Bench, signed: Sign) -> None:
    bench.spec, bench.signed = signed(preemptible=True)
    bench.run()
    large = replace(bench.spec.resources, gpus=replace(bench.spec.resources.gpus, count=9))
    effects = claim(bench, *signed(number=2, priority=Priority.HIGH, resources=large))
    assert all_of(effects, EndAttempt) == []
    assert bench.attempts.kept() == ()


# -- accepting ---------------------------------------------------------------------------------------------------------


def test_commit_is_kept_before_it_is_acknowledged(bench: Bench) -> None:
    effects = bench.accept()
    assert isinstance(effects[0], Persist)
    assert record_of(effects).state is AttemptState.ACCEPTED
    assert only(effects, CommitAnswer) == CommitAnswer(bench.spec.job, 1, accepted=True)


def test_accepted_attempt_does_not_start_by_itself(bench: Bench) -> None:
    effects = bench.accept()
    for second in range(1, 60):
        effects += bench.attempts.step(bench.at(0.1 + second))
    assert not any(isinstance(effect, StartAttempt) for effect in effects)
    assert len(all_of(effects, CommitAnswer)) == 60


def test_accepted_attempt_that_nobody_activates_is_given_back(bench: Bench) -> None:
    bench.accept()
    effects = bench.attempts.step(bench.at(0.1 + TIMING.give_up_s))
    assert record_of(effects).state is AttemptState.ABANDONED
    assert bench.attempts.allocations() == ()
    assert bench.activate(100.0) == []


def test_repeated_commit_is_acknowledged_again(bench: Bench) -> None:
    hold = bench.offer().hold
    bench.attempts.committed(bench.at(0.1), bench.steward, bench.commit(hold))
    effects = bench.attempts.committed(bench.at(0.2), bench.steward, bench.commit(hold))
    assert effects == [Send(bench.steward, CommitAnswer(bench.spec.job, 1, accepted=True))]


def test_commit_of_another_machine_hold_or_ticket_is_declined(bench: Bench) -> None:
    hold = bench.offer().hold
    commit = bench.commit(hold)
    wrong_vote = bench.commit(HoldId("h" * 26)).votes
    for steward, message in (
        (bench.office.setups[2].node, commit),
        (bench.steward, replace(commit, hold=HoldId("h" * 26))),
        (bench.steward, replace(commit, votes=())),
        (bench.steward, replace(commit, votes=wrong_vote)),
    ):
        answer = only(bench.attempts.committed(bench.at(0.1), steward, message), CommitAnswer)
        assert not answer.accepted
    assert bench.state is None


@pytest.mark.parametrize("epoch", [1, 2])
def test_spent_epoch_is_never_held_again(bench: Bench, epoch: int) -> None:
    bench.accept(epoch=2)
    assert "was here before" in bench.offer(epoch=epoch).refusal


def test_spent_epoch_stays_spent_after_a_restart(bench: Bench, at: Clock) -> None:
    record = record_of(bench.accept(epoch=2))
    bench.attempts = make(bench.office)
    bench.attempts.restore(at(0), [record])
    assert "was here before" in bench.offer(epoch=2).refusal


# -- running -----------------------------------------------------------------------------------------------------------


def test_activated_attempt_starts_once(bench: Bench) -> None:
    bench.accept()
    effects = bench.activate()
    assert record_of(effects).state is AttemptState.STAGING
    start = only(effects, StartAttempt)
    assert start.sources == bench.spec.stewards
    assert not start.plan.fenced
    assert bench.activate() == []


def test_only_its_steward_activates_fences_and_acknowledges(bench: Bench) -> None:
    other = bench.office.setups[2].node
    bench.accept()
    assert bench.attempts.activated(bench.at(1), other, Activate(bench.spec.job, 1)) == []
    assert bench.attempts.fenced(bench.at(1), other, Fence(bench.spec.job, 1)) == []
    bench.activate()
    bench.attempts.finished(bench.at(2), bench.spec.job, 1, 0.0, DONE)
    assert bench.attempts.acknowledged(other, ReportAck(bench.spec.job, 1)) == []
    assert bench.state is AttemptState.EXITED


def test_running_attempt_is_reported_every_few_seconds(bench: Bench) -> None:
    bench.run()
    sent = [bench.attempts.step(bench.at(0.2 + second)) for second in range(1, 31)]
    reports = [effects for effects in sent if effects]
    assert len(reports) == 30 // TIMING.report_s
    report = only(reports[0], AttemptReport)
    assert (report.phase, report.started_wall_s, report.result) == (Phase.RUNNING, 100.0, None)


def test_progress_is_reported(bench: Bench) -> None:
    bench.accept()
    bench.activate()
    effects = bench.attempts.progressed(bench.spec.job, 1, Phase.STAGING, "environment: 12 packages")
    assert only(effects, AttemptReport).detail == "environment: 12 packages"


def test_result_is_told_until_its_steward_has_it(bench: Bench) -> None:
    bench.run()
    effects = bench.attempts.finished(bench.at(10), bench.spec.job, 1, 0.0, DONE)
    assert record_of(effects).result == DONE
    assert bench.attempts.allocations() == ()
    told = [bench.attempts.step(bench.at(10 + second)) for second in range(1, 6)]
    assert all(only(effects, AttemptReport).result == DONE for effects in told)
    settled = bench.attempts.acknowledged(bench.steward, ReportAck(bench.spec.job, 1))
    assert record_of(settled).state is AttemptState.DELIVERED
    assert bench.attempts.step(bench.at(20)) == []


def test_link_to_its_steward_makes_it_tell_at_once(bench: Bench) -> None:
    bench.run()
    bench.attempts.finished(bench.at(10), bench.spec.job, 1, 0.0, DONE)
    bench.attempts.steward_linked(bench.at(10.1), bench.steward)
    assert bench.attempts.deadline() == 10.1


def test_acknowledgement_before_the_end_changes_nothing(bench: Bench) -> None:
    bench.run()
    assert bench.attempts.acknowledged(bench.steward, ReportAck(bench.spec.job, 1)) == []
    assert bench.state is AttemptState.RUNNING


def test_news_of_an_attempt_that_is_over_changes_nothing(bench: Bench) -> None:
    bench.run()
    bench.attempts.finished(bench.at(10), bench.spec.job, 1, 0.0, DONE)
    other = Result(AttemptState.EXITED, 1)
    assert bench.attempts.finished(bench.at(11), bench.spec.job, 1, 0.0, other) == []
    assert bench.attempts.began(bench.spec.job, 1, 5.0) == []
    assert bench.attempts.progressed(bench.spec.job, 1, Phase.RUNNING, "") == []


# -- stopping and fencing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "mode"), [(Action.STOP, StopMode.STOP), (Action.KILL, StopMode.KILL)])
def test_users_stop_ends_a_running_attempt(bench: Bench, action: Action, mode: StopMode) -> None:
    bench.run()
    effects = bench.cancel(action)
    assert record_of(effects).stop is mode
    assert only(effects, EndAttempt) == EndAttempt(bench.spec.job, 1, mode)
    assert bench.state is AttemptState.STOPPING


def test_kill_overrides_stop_and_stop_does_not_soften_kill(bench: Bench) -> None:
    bench.run()
    bench.cancel(Action.STOP)
    assert only(bench.cancel(Action.KILL), EndAttempt) == EndAttempt(bench.spec.job, 1, StopMode.KILL)
    assert bench.cancel(Action.STOP) == [EndAttempt(bench.spec.job, 1, StopMode.STOP)]
    found = bench.attempts.latest(bench.spec.job)
    assert found is not None
    assert found.stop is StopMode.KILL


def test_attempt_that_is_stopped_before_it_starts_never_does(bench: Bench) -> None:
    bench.accept()
    effects = bench.cancel()
    assert record_of(effects).state is AttemptState.ABANDONED
    assert bench.activate() == []


def test_stop_before_the_commit_arrives_takes_the_hold_away(bench: Bench) -> None:
    hold = bench.offer().hold
    result = only(bench.cancel(), AttemptReport).result
    assert result is not None
    assert result.outcome is AttemptState.ABANDONED
    late = only(bench.attempts.committed(bench.at(0.5), bench.steward, bench.commit(hold)), CommitAnswer)
    assert not late.accepted


def test_cancel_of_a_machine_that_does_not_hold_the_job_is_rejected(bench: Bench) -> None:
    bench.run()
    effects = bench.cancel(steward=bench.office.setups[2].node)
    assert isinstance(effects[0], Reject)
    assert bench.state is AttemptState.RUNNING


def test_fence_drops_what_never_started(bench: Bench) -> None:
    bench.accept()
    effects = bench.attempts.fenced(bench.at(1), bench.steward, Fence(bench.spec.job, 1))
    assert record_of(effects).result == Result(AttemptState.FENCED, None, "another attempt of the job was chosen")
    assert bench.attempts.allocations() == ()
    assert bench.activate() == []


def test_fence_kills_what_runs(bench: Bench) -> None:
    bench.run()
    effects = bench.attempts.fenced(bench.at(1), bench.steward, Fence(bench.spec.job, 1))
    assert only(effects, EndAttempt) == EndAttempt(bench.spec.job, 1, StopMode.KILL)


def test_fence_drops_a_hold(bench: Bench) -> None:
    bench.offer()
    assert bench.attempts.fenced(bench.at(1), bench.steward, Fence(bench.spec.job, 1)) == []
    assert bench.attempts.allocations() == ()


# -- restarts ----------------------------------------------------------------------------------------------------------


def test_attempt_that_may_live_is_adopted(bench: Bench, at: Clock) -> None:
    bench.accept()
    record = record_of(bench.activate())
    bench.attempts = make(bench.office)
    effects = bench.attempts.restore(at(0), [record])
    adopted = only(effects, AdoptAttempt)
    assert adopted.plan.spec == bench.spec
    assert len(bench.attempts.allocations()) == 1
    assert only(bench.attempts.step(at(0)), AttemptReport).job == bench.spec.job


def test_accepted_attempt_asks_again_after_a_restart(bench: Bench, at: Clock) -> None:
    record = record_of(bench.accept())
    bench.attempts = make(bench.office)
    assert bench.attempts.restore(at(0), [record]) == []
    assert only(bench.attempts.step(at(0)), CommitAnswer) == CommitAnswer(bench.spec.job, 1, accepted=True)


def test_result_is_told_again_after_a_restart(bench: Bench, at: Clock) -> None:
    bench.run()
    record = record_of(bench.attempts.finished(at(10), bench.spec.job, 1, 0.0, DONE))
    bench.attempts = make(bench.office)
    assert bench.attempts.restore(at(0), [record]) == []
    assert only(bench.attempts.step(at(0)), AttemptReport).result == DONE


def test_delivered_attempt_is_kept_for_a_month_and_then_forgotten(bench: Bench, at: Clock) -> None:
    bench.run()
    bench.attempts.finished(at(10), bench.spec.job, 1, at(10).wall_s, DONE)
    record = record_of(bench.attempts.acknowledged(bench.steward, ReportAck(bench.spec.job, 1)))
    bench.attempts = make(bench.office)
    bench.attempts.restore(at(0), [record])
    assert bench.state is AttemptState.DELIVERED
    assert bench.attempts.step(at(TIMING.retention_s)) == []
    effects = bench.attempts.step(at(TIMING.retention_s + TIMING.sweep_s))
    assert DiscardAttempt(bench.spec.job, 1) in effects
    assert Persist("attempt", f"{bench.spec.job}/1", None) in effects
    assert bench.state is None


def test_unfenced_machine_runs_jobs_of_trusted_users_unfenced(bench: Bench, signed: Sign) -> None:
    bench.attempts = make(bench.office, OwnerPolicy(trusted=(UserName("ada"),)), fence="")
    bench.accept()
    start = only(bench.activate(), StartAttempt)
    assert not start.plan.fenced


def test_job_of_another_user_is_not_ended_by_a_spec_with_its_id(bench: Bench) -> None:
    """Ids are gossiped with allocations; only the key that chose one can sign a job of that id."""
    bench.run()
    setup, user = bench.office.setups[2], UserName("ada")  # another key of hers is another's key as well
    key, notary = setup.accounts[user], bench.office.notaries[bench.office.setups.index(setup)]
    spec = replace(bench.spec, user=user, submitter=setup.node, stewards=(setup.node,))
    request = JobRequest(bench.office.mesh, user, Action.KILL, setup.node, 0.0, "nonce", spec.job)
    message = Cancel(spec.job, 1, notary.sign(key, spec), notary.sign(key, request))
    effects = bench.attempts.cancelled(bench.at(1), setup.node, message)
    assert [type(effect) for effect in effects] == [Reject]
    assert bench.state is AttemptState.RUNNING
    assert len(bench.attempts.allocations()) == 1


# -- the owner takes his machine back ----------------------------------------------------------------------------------


def play(bench: Bench) -> None:
    """The owner's game shows in two samples."""
    for _ in range(2):
        game = GpuReading(GpuId("GPU-rig3-0"), processes=(GpuProcess(1, ProcessKind.GRAPHICS, None, "game"),))
        bench.attempts.machine_read(bench.office.setups[3].inventory, bench.attempts._owner.read([game]))


def test_job_leaves_when_the_owner_returns_and_is_killed_if_it_stays(bench: Bench) -> None:
    bench.run()
    play(bench)
    effects = bench.attempts.step(bench.at(10.0))
    assert only(effects, EndAttempt).mode is StopMode.STOP
    assert all_of(effects, AttemptReport)[-1].phase is Phase.STOPPING
    assert [record.preempted for record in records_of(effects)][-1] == "its owner is using the GPU"
    assert bench.attempts.deadline() == 10.0 + TIMING.report_s
    assert not all_of(bench.attempts.step(bench.at(10.0 + GRACE_S - 0.1)), EndAttempt)
    assert only(bench.attempts.step(bench.at(10.0 + GRACE_S)), EndAttempt).mode is StopMode.KILL
    assert not all_of(bench.attempts.step(bench.at(10.0 + GRACE_S + 1)), EndAttempt)


@pytest.mark.parametrize("code", [0, 143])
def test_job_that_left_is_preempted_whatever_its_exit_code(bench: Bench, code: int) -> None:
    bench.run()
    play(bench)
    bench.attempts.step(bench.at(10.0))
    ended = bench.attempts.finished(bench.at(11.0), bench.spec.job, 1, 111.0, Result(AttemptState.EXITED, code))
    result = only(ended, AttemptReport).result
    assert result == Result(AttemptState.PREEMPTED, code, "its owner is using the GPU")
    assert bench.state is AttemptState.PREEMPTED


def test_job_that_ran_too_long_says_so_though_its_owner_wants_the_gpu_by_then(bench: Bench, signed: Sign) -> None:
    bench.spec, bench.signed = signed(timeout_s=7200.0)
    bench.run()
    play(bench)
    bench.attempts.step(bench.at(10.0))
    killed = Result(AttemptState.TIMED_OUT, 137, "killed: it still ran 30 s after it was told to stop")
    result = only(bench.attempts.finished(bench.at(11.0), bench.spec.job, 1, 111.0, killed), AttemptReport).result
    assert result is not None
    assert (result.outcome, result.exit_code) == (AttemptState.TIMED_OUT, 137)
    assert result.reason == f"ran longer than its limit of 2 h; {killed.reason}"


def test_owner_of_a_machine_whose_agent_restarts_still_gets_it_back(bench: Bench) -> None:
    bench.run()
    play(bench)
    record = records_of(bench.attempts.step(bench.at(10.0)))[-1]
    bench.attempts = make(bench.office)
    bench.attempts.restore(bench.at(20.0), [record])
    assert not all_of(bench.attempts.step(bench.at(20.0)), EndAttempt)
    assert only(bench.attempts.step(bench.at(20.0 + GRACE_S)), EndAttempt).mode is StopMode.KILL
    ended = bench.attempts.finished(bench.at(45.0), bench.spec.job, 1, 145.0, Result(AttemptState.EXITED, 137))
    assert only(ended, AttemptReport).result.outcome is AttemptState.PREEMPTED  # type: ignore[union-attr]  # it has ended


def test_attempt_that_was_only_promised_is_taken_back(bench: Bench) -> None:
    hold = bench.offer().hold
    play(bench)
    bench.attempts.step(bench.at(0.1))
    refused = only(bench.attempts.committed(bench.at(0.2), bench.steward, bench.commit(hold)), CommitAnswer)
    assert not refused.accepted


def test_attempt_that_was_only_accepted_is_preempted(bench: Bench) -> None:
    bench.accept()
    play(bench)
    effects = bench.attempts.step(bench.at(0.3))
    assert only(effects, AttemptReport).result == Result(AttemptState.PREEMPTED, None, "its owner is using the GPU")
    assert not bench.activate()


def test_no_job_begins_where_the_owner_plays_or_paused(bench: Bench) -> None:
    play(bench)
    assert "its owner is using it" in bench.offer().refusal
    bench.attempts = make(bench.office)
    bench.attempts._owner.paused(bench.at(0.0), Pause(None))
    assert bench.offer().refusal == "is paused by its owner"


def test_owner_who_wants_containers_refuses_processes_or_gives_them_an_image(bench: Bench) -> None:
    bench.attempts = make(bench.office, OwnerPolicy(containers_only=True))
    assert "containers only" in bench.offer().refusal
    bench.attempts = make(bench.office, OwnerPolicy(containers_only=True, default_image="base"))
    bench.accept()
    assert only(bench.activate(), StartAttempt).plan.image == "base"


def records_of(effects: list[Effect]) -> list[AttemptRecord]:
    return [e.record for e in effects if isinstance(e, Persist) and isinstance(e.record, AttemptRecord)]


# -- secrets -----------------------------------------------------------------------------------------------------------


def sealed_to(*nodes: NodeId) -> SecretBox:
    return SecretBox(("TOKEN",), b"ciphertext", tuple(SecretWrap(node, b"e" * 32, b"w" * 48) for node in nodes))


def test_offer_of_a_job_with_secrets_that_are_not_for_this_machine_is_refused(bench: Bench, signed: Sign) -> None:
    bench.spec, bench.signed = signed(secrets=sealed_to(bench.office.setups[2].node))
    answer = bench.offer()
    assert answer.hold is None
    assert "has no key to the job's secrets" in answer.refusal


def test_sealed_box_and_its_users_key_go_to_the_executor_only_on_activation(bench: Bench, signed: Sign) -> None:
    box = sealed_to(bench.office.setups[3].node)
    bench.spec, bench.signed = signed(secrets=box)
    assert not any(isinstance(effect, StartAttempt) for effect in bench.accept())
    (start,) = [effect for effect in bench.activate() if isinstance(effect, StartAttempt)]
    assert start.plan.spec.secrets == box
    assert start.plan.key == bench.signed.key


# -- audit and receipt -------------------------------------------------------------------------------------------------


def audited(effects: list[Effect]) -> list[str]:
    """What the audit is told, in the same effects, and so in the same transaction, as the attempt's record."""
    kinds = {effect.kind for effect in effects if isinstance(effect, Persist)}
    assert kinds in ({"attempt", "audit"}, {"attempt"}, set())
    return [
        effect.key.lstrip("0") or "0" for effect in effects if isinstance(effect, Persist) and effect.kind == "audit"
    ]


def test_audit_is_written_with_acceptance_start_and_end(bench: Bench) -> None:
    assert audited(bench.accept()) == ["0"]
    assert audited(bench.activate()) == []
    assert audited(bench.attempts.began(bench.spec.job, 1, 100.0)) == ["1"]
    assert audited(bench.attempts.began(bench.spec.job, 1, 100.0)) == []  # an agent that took it up again
    assert audited(bench.attempts.finished(bench.at(9), bench.spec.job, 1, 109.0, DONE)) == ["2"]


def test_receipt_says_what_ran_and_what_came_of_it(bench: Bench) -> None:
    bench.attempts.machine_read(replace(bench.office.setups[3].inventory, driver_version="580.1"), ())
    bench.run()
    evidence = Evidence("k" * 32, "sha256:1", digest(b"log"))
    effects = bench.attempts.finished(bench.at(9), bench.spec.job, 1, 109.0, DONE, evidence)
    record, report = record_of(effects), only(effects, AttemptReport)
    assert record.receipt is not None
    assert record.receipt == report.receipt
    node, notary = bench.office.setups[3].node, bench.office.notaries[3]
    receipt = notary.read(record.receipt, bench.office.ring.public(KeyId(node)), Receipt)
    assert receipt == Receipt(
        bench.office.mesh,
        bench.spec.job,
        1,
        node,
        notary.digest(bench.signed),
        bench.spec.tree,
        False,
        tuple(share.uuid for share in record.gpus),
        "580.1",
        "k" * 32,
        "sha256:1",
        digest(b"log"),
        AttemptState.EXITED,
        0,
        100.0,
        109.0,
    )


def test_what_never_ran_has_a_receipt_that_says_so(bench: Bench) -> None:
    bench.accept()
    report = only(bench.cancel(), AttemptReport)
    assert report.receipt is not None
    node = bench.office.setups[3].node
    receipt = bench.office.notaries[3].read(report.receipt, bench.office.ring.public(KeyId(node)), Receipt)
    assert (receipt.outcome, receipt.exit_code, receipt.started_wall_s) == (AttemptState.ABANDONED, None, None)


def test_receipt_and_fence_are_the_same_after_a_restart(bench: Bench) -> None:
    bench.run()
    record = record_of(bench.attempts.finished(bench.at(9), bench.spec.job, 1, 109.0, DONE))
    again = make(bench.office)
    again.restore(bench.at(0), [record])
    latest = again.latest(bench.spec.job)
    assert latest is not None
    assert (latest.receipt, latest.fenced) == (record.receipt, record.fenced)


# -- what it prints --------------------------------------------------------------------------------------------------


def printed(*ends: int) -> list[LogChunk]:
    return [LogChunk(start, end, b"x" * (end - start)) for start, end in pairwise((0, *ends))]


def test_stewards_hear_what_is_printed_and_all_of_it_when_they_come_back(bench: Bench) -> None:
    bench.accept()
    started = only(bench.activate(), StartAttempt)
    assert started.plan.is_tailed
    bench.attempts.began(bench.spec.job, 1, 100.0)
    for chunk in printed(5, 8):
        (told,) = bench.attempts.printed(bench.spec.job, 1, chunk)
        assert told == Send(bench.steward, AttemptOutput(bench.spec.job, 1, chunk))
    whole = LogChunk(0, 8, b"x" * 8)
    assert bench.attempts.steward_linked(bench.at(2), bench.steward) == [
        Send(bench.steward, AttemptOutput(bench.spec.job, 1, whole))
    ]
    assert bench.attempts.steward_linked(bench.at(2), bench.office.setups[2].node) == []


def test_output_of_a_job_with_secrets_stays_where_it_runs(bench: Bench, signed: Sign) -> None:
    secrets = SecretBox(("TOKEN",), b"box", (SecretWrap(bench.office.setups[3].node, b"e" * 32, b"w" * 48),))
    bench.spec, bench.signed = signed(secrets=secrets)
    bench.accept()
    assert not only(bench.activate(), StartAttempt).plan.is_tailed
    assert bench.attempts.printed(bench.spec.job, 1, *printed(5)) == []
    assert bench.attempts.steward_linked(bench.at(2), bench.steward) == []


def test_output_is_told_to_nobody_where_only_the_node_itself_holds_the_job(bench: Bench, signed: Sign) -> None:
    me = bench.office.setups[3].node
    bench.spec, bench.signed = signed(stewards=(me,))
    effects = bench.attempts.offered(bench.at(0), me, Offer(bench.spec.job, 1, bench.signed))
    assert only(effects, OfferAnswer).hold
    assert not bench.attempts._listeners(bench.spec)


def test_output_of_an_attempt_that_is_over_is_forgotten(bench: Bench) -> None:
    bench.run()
    bench.attempts.printed(bench.spec.job, 1, *printed(5))
    bench.attempts.finished(bench.at(3), bench.spec.job, 1, 130.0, DONE)
    assert bench.attempts.printed(bench.spec.job, 1, LogChunk(5, 6, b"y")) == []
    bench.attempts.acknowledged(bench.steward, ReportAck(bench.spec.job, 1))
    found = bench.attempts.latest(bench.spec.job)
    assert found is not None
    assert found.tail.whole() is None


def test_attempts_are_found_by_number(bench: Bench) -> None:
    assert bench.attempts.epochs(bench.spec.job) == []
    bench.offer()
    assert bench.attempts.find(bench.spec.job, 1) is None  # held is not accepted
    bench.run()
    assert bench.attempts.epochs(bench.spec.job) == [1]
    assert bench.attempts.find(bench.spec.job, 1) is bench.attempts.latest(bench.spec.job)
