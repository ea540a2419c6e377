"""A job's register, row by row of the design's table: what makes it leave each state, and what never does."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from meshgpu.core.effects import Effect, FetchTree, Persist, Reject, Send
from meshgpu.core.jobs import listing
from meshgpu.core.jobs import steward as steward_module
from meshgpu.core.jobs.placement import Candidate, Rule
from meshgpu.core.jobs.queue import CLAIM_AFTER_S, COURTESY_S, Crowd
from meshgpu.core.jobs.steward import UNSTARTED_TRIES, Stewardship, StewardTiming
from meshgpu.core.trust import freshness
from meshgpu.core.trust.freshness import Challenges
from meshgpu.core.trust.requests import RequestRules
from meshgpu.errors import BrokenInvariant
from meshgpu.model.clock import WALL_CLOCK_SLACK_S, Now
from meshgpu.model.gossip import Allocation, Capacity, Line, NodeRecord
from meshgpu.model.ids import Digest, HoldId, JobId, KeyId, NodeId, UserName, key_id
from meshgpu.model.job import (
    Action,
    AttemptState,
    CloudUse,
    JobRequest,
    JobSpec,
    JobState,
    Phase,
    Priority,
    Register,
    Result,
    SecretBox,
    SecretWrap,
    StopMode,
)
from meshgpu.model.logs import LogChunk
from meshgpu.model.messages import (
    Activate,
    Answer,
    Ask,
    AttemptOutput,
    AttemptReport,
    Cancel,
    Commit,
    CommitAnswer,
    Fence,
    JobUpdate,
    Message,
    Offer,
    OfferAnswer,
    Release,
    ReportAck,
    Submit,
    SubmitAnswer,
)
from meshgpu.model.receipt import Receipt
from meshgpu.model.records import JobRecord, ObeyedRecord
from meshgpu.model.resources import GpuShare
from meshgpu.model.trust import LinkUser, Signed
from meshgpu.sim.office import Office

Clock = Callable[[float], Now]
Sign = Callable[..., tuple[JobSpec, Signed]]
TIMING = StewardTiming()
HOLD = HoldId("h" * 26)


@dataclass
class Bench:
    """The first machine as the steward of one job; it sees the third and fourth as machines with room."""

    office: Office
    rules: RequestRules
    spec: JobSpec
    signed: Signed
    at: Clock
    stewardship: Stewardship = field(init=False)
    candidates: list[Candidate] = field(default_factory=list)
    crowd: Crowd = field(default_factory=lambda: Crowd({}, {}))

    def __post_init__(self) -> None:
        self.candidates = [self.candidate(2), self.candidate(3)]
        self.restart()

    def candidate(self, number: int) -> Candidate:
        setup = self.office.setups[number]
        return Candidate(setup.node, setup.name, NodeRecord("1", (), setup.inventory), Capacity((), ()))

    def restart(self, *records: JobRecord) -> list[Effect]:
        self.stewardship = Stewardship(
            self.me,
            self.rules._log,
            self.rules,
            self.office.notaries[0],
            random.Random(1),
            lambda _user, _machine: self.candidates,
            lambda: self.crowd,
            lambda _node: True,
            TIMING,
        )
        return self.stewardship.restore(self.at(0), records)

    @property
    def me(self) -> NodeId:
        return self.office.setups[0].node

    @property
    def submitter(self) -> NodeId:
        return self.office.setups[1].node

    @property
    def register(self) -> Register:
        view = self.stewardship.view(self.spec.job)
        assert view is not None
        return view.register

    @property
    def node(self) -> NodeId:
        """Where the current epoch was placed."""
        assert self.register.node is not None
        return self.register.node

    # -- the way of a job ---------------------------------------------------------------------------------------------

    def submit(self) -> list[Effect]:
        return self.stewardship.submitted(self.at(0), self.submitter, Submit(self.spec.job, self.signed))

    def queue(self) -> list[Effect]:
        self.submit()
        return self.stewardship.tree_arrived(self.at(0), self.spec.job)

    def answer(self, node: NodeId, hold: HoldId | None = HOLD, now_s: float = 0.1, epoch: int = 1) -> list[Effect]:
        answer = OfferAnswer(self.spec.job, epoch, hold, refusal="" if hold else "is busy")
        return self.stewardship.offer_answered(self.at(now_s), node, answer)

    def place(self) -> list[Effect]:
        self.queue()
        self.answer(self.candidates[0].node)
        return self.answer(self.candidates[1].node)

    def accept(self, now_s: float = 0.2, epoch: int = 1) -> list[Effect]:
        answer = CommitAnswer(self.spec.job, epoch, accepted=True)
        return self.stewardship.commit_answered(self.at(now_s), self.node, answer)

    def activate(self) -> list[Effect]:
        self.place()
        return self.accept()

    def report(
        self, result: Result | None = None, started_s: float | None = 1.0, now_s: float = 1.0, epoch: int = 1
    ) -> list[Effect]:
        ended = None if result is None else 2.0
        phase = Phase.RUNNING if result is None else None
        message = AttemptReport(self.spec.job, epoch, phase, "", started_s, ended, result)
        return self.stewardship.reported(self.at(now_s), self.node, message)

    def ask(
        self,
        action: Action,
        now_s: float = 0.5,
        user: str = "ada",
        seat: int = 1,
        *,
        issued_s: float | None = None,
        nonce: str = "",
        challenge: bytes = b"",
    ) -> list[Effect]:
        issued_wall_s = self.at(now_s if issued_s is None else issued_s).wall_s
        mesh, job = self.office.mesh, self.spec.job
        request = JobRequest(mesh, UserName(user), action, self.me, issued_wall_s, nonce or action, job, challenge)
        signed = self.office.notaries[seat].sign(self.office.setups[seat].accounts[UserName("ada")], request)
        return self.stewardship.asked(self.at(now_s), self.office.setups[seat].node, Ask("q", signed))


@pytest.fixture
def bench(office: Office, rules: RequestRules, signed: Sign, at: Clock) -> Bench:
    spec, envelope = signed()
    return Bench(office, rules, spec, envelope, at)


def sent(effects: list[Effect], kind: type[Message]) -> list[tuple[NodeId, Message]]:
    return [(e.peer, e.message) for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def kept(effects: list[Effect]) -> list[Register]:
    return [e.record.register for e in effects if isinstance(e, Persist) and isinstance(e.record, JobRecord)]


def record_of(effects: list[Effect]) -> JobRecord:
    (record,) = [e.record for e in effects if isinstance(e, Persist) and isinstance(e.record, JobRecord)]
    return record


# -- draft -------------------------------------------------------------------------------------------------------------


def test_draft_waits_for_its_tree_and_is_not_confirmed(bench: Bench) -> None:
    effects = bench.submit()
    assert effects == [FetchTree(bench.spec.job, bench.spec.tree, (bench.submitter,))]
    assert bench.register.state is JobState.DRAFT


def test_job_is_kept_and_only_then_confirmed(bench: Bench) -> None:
    effects = bench.queue()
    assert isinstance(effects[0], Persist)
    assert kept(effects)[0].state is JobState.QUEUED
    assert sent(effects, SubmitAnswer) == [(bench.submitter, SubmitAnswer(bench.spec.job, held=True))]


def test_submitting_again_is_answered_and_makes_no_second_job(bench: Bench) -> None:
    bench.submit()
    assert sent(bench.submit(), SubmitAnswer) == [(bench.submitter, SubmitAnswer(bench.spec.job, held=False))]
    bench.stewardship.tree_arrived(bench.at(0), bench.spec.job)
    assert sent(bench.submit(), SubmitAnswer) == [(bench.submitter, SubmitAnswer(bench.spec.job, held=True))]


def test_id_that_is_taken_is_refused(bench: Bench, signed: Sign) -> None:
    bench.queue()
    _, other = signed(name="other")
    ((_, answer),) = sent(
        bench.stewardship.submitted(bench.at(0), bench.submitter, Submit(bench.spec.job, other)), SubmitAnswer
    )
    assert isinstance(answer, SubmitAnswer)
    assert answer.code == "bad-request"


def test_tree_that_does_not_come_ends_the_draft(bench: Bench) -> None:
    bench.submit()
    ((_, answer),) = sent(bench.stewardship.tree_failed(bench.spec.job, "disk-full", "no room"), SubmitAnswer)
    assert isinstance(answer, SubmitAnswer)
    assert (answer.code, answer.reason) == ("disk-full", "no room")
    assert bench.stewardship.view(bench.spec.job) is None


def test_progress_of_the_tree_is_told_to_the_submitter(bench: Bench) -> None:
    bench.submit()
    effects = bench.stewardship.tree_progressed(bench.spec.job, 1, 2)
    assert sent(effects, SubmitAnswer) == [(bench.submitter, SubmitAnswer(bench.spec.job, False, 1, 2))]


def test_job_is_taken_only_from_the_machine_that_signed_it(bench: Bench) -> None:
    effects = bench.stewardship.submitted(
        bench.at(0), bench.office.setups[2].node, Submit(bench.spec.job, bench.signed)
    )
    assert isinstance(effects[0], Reject)
    assert bench.stewardship.view(bench.spec.job) is None


def test_job_for_other_stewards_is_refused(bench: Bench, signed: Sign) -> None:
    spec, envelope = signed(stewards=(bench.office.setups[2].node,))
    effects = bench.stewardship.submitted(bench.at(0), bench.submitter, Submit(spec.job, envelope))
    assert isinstance(effects[0], Reject)


def test_stale_spec_is_refused(bench: Bench) -> None:
    effects = bench.stewardship.submitted(bench.at(200), bench.submitter, Submit(bench.spec.job, bench.signed))
    ((_, answer),) = sent(effects, SubmitAnswer)
    assert isinstance(answer, SubmitAnswer)
    assert answer.code == "stale"


def test_one_users_unfinished_jobs_are_limited(bench: Bench, signed: Sign, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steward_module, "UNFINISHED_LIMIT", 1)
    bench.queue()
    spec, envelope = signed(number=2)
    ((_, answer),) = sent(
        bench.stewardship.submitted(bench.at(0), bench.submitter, Submit(spec.job, envelope)), SubmitAnswer
    )
    assert isinstance(answer, SubmitAnswer)
    assert answer.code == "too-many-jobs"


# -- queued ------------------------------------------------------------------------------------------------------------


def test_queued_job_is_offered_as_the_next_epoch(bench: Bench) -> None:
    offers = sent(bench.queue(), Offer)
    assert {peer for peer, _ in offers} == {candidate.node for candidate in bench.candidates}
    assert all(isinstance(offer, Offer) and offer.epoch == 1 for _, offer in offers)


def test_best_hold_is_committed_and_the_others_are_released(bench: Bench) -> None:
    effects = bench.place()
    assert [register.state for register in kept(effects)] == [JobState.PLACING]
    ((node, commit),) = sent(effects, Commit)
    assert node == bench.register.node
    assert isinstance(commit, Commit)
    assert (commit.epoch, commit.hold, len(commit.votes)) == (1, HOLD, 1)
    ((other, _),) = sent(effects, Release)
    assert other != node


def test_commit_waits_no_longer_than_the_slowest_offer_may_take(bench: Bench) -> None:
    bench.queue()
    bench.answer(bench.candidates[1].node)
    assert sent(bench.stewardship.step(bench.at(TIMING.offers.offer_s)), Commit)[0][0] == bench.candidates[1].node


def test_late_hold_is_released(bench: Bench) -> None:
    bench.place()
    other = next(c.node for c in bench.candidates if c.node != bench.register.node)
    assert sent(bench.answer(other), Release) == [(other, Release(bench.spec.job, HOLD))]
    assert sent(bench.answer(bench.submitter), Release)


def test_job_waits_with_what_the_machines_said_and_is_offered_again(bench: Bench) -> None:
    bench.queue()
    now_s = 0.0
    for _ in range(TIMING.offers.rounds):
        for candidate in bench.candidates:
            bench.answer(candidate.node, hold=None, now_s=now_s)
        due = bench.stewardship.deadline()
        assert due is not None
        now_s = due
        bench.stewardship.step(bench.at(now_s))
    assert bench.register.state is JobState.QUEUED
    assert bench.register.reason == "rig2, rig3 is busy"
    assert bench.register.epoch == 0
    offers = [bench.stewardship.step(bench.at(now_s + tick)) for tick in range(1, 10)]
    assert any(sent(effects, Offer) for effects in offers)


def test_job_without_a_machine_waits_until_room_changes(bench: Bench) -> None:
    bench.candidates = [replace(bench.candidate(2), refusal="does not answer", rule=Rule.DOWN)]
    bench.queue()
    assert bench.register.reason == "rig2 does not answer"
    bench.candidates = [bench.candidate(2)]
    bench.stewardship.room_changed(bench.at(1))
    assert sent(bench.stewardship.step(bench.at(1)), Offer)


def test_older_job_is_offered_first(bench: Bench, signed: Sign) -> None:
    bench.candidates = []
    bench.queue()
    spec, envelope = signed(number=2)
    bench.stewardship.submitted(bench.at(1), bench.submitter, Submit(spec.job, envelope))
    bench.stewardship.tree_arrived(bench.at(1), spec.job)
    bench.candidates = [bench.candidate(2)]
    bench.stewardship.room_changed(bench.at(2))
    offers = sent(bench.stewardship.step(bench.at(2)), Offer)
    assert [offer.job for _, offer in offers if isinstance(offer, Offer)] == [bench.spec.job, spec.job]


def test_queued_job_is_stopped_at_once(bench: Bench) -> None:
    bench.queue()
    effects = bench.ask(Action.STOP)
    assert bench.register.state is JobState.CANCELLED
    assert kept(effects)[0].reason == "stopped before it started"
    assert sent(bench.answer(bench.candidates[0].node), Release)


# -- placing -----------------------------------------------------------------------------------------------------------


def test_acknowledged_commit_is_kept_as_active_and_then_activated(bench: Bench) -> None:
    effects = bench.activate()
    assert isinstance(effects[0], Persist)
    assert kept(effects)[0].state is JobState.ACTIVE
    assert sent(effects, Activate) == [(bench.node, Activate(bench.spec.job, 1))]


def test_declined_commit_spends_the_epoch(bench: Bench) -> None:
    bench.place()
    answer = CommitAnswer(bench.spec.job, 1, accepted=False, reason="the hold has run out")
    bench.stewardship.commit_answered(bench.at(0.2), bench.node, answer)
    assert (bench.register.state, bench.register.epoch) == (JobState.QUEUED, 1)
    offers = [effects for tick in range(1, 10) if (effects := sent(bench.stewardship.step(bench.at(tick / 5)), Offer))]
    assert isinstance(offers[0][0][1], Offer)
    assert offers[0][0][1].epoch == 2


def test_silent_commit_is_given_up_and_its_late_acceptance_fenced(bench: Bench) -> None:
    bench.place()
    node = bench.node
    bench.stewardship.step(bench.at(0.1 + TIMING.placing_s))
    assert bench.register.state is JobState.QUEUED
    assert "did not answer in time" in bench.register.reason
    effects = bench.accept(now_s=16.0)
    assert sent(effects, Fence) == [(node, Fence(bench.spec.job, 1))]
    assert sent(effects, Activate) == []


def test_acceptance_by_another_node_or_of_another_epoch_counts_for_nothing(bench: Bench) -> None:
    bench.place()
    answer = CommitAnswer(bench.spec.job, 1, accepted=True)
    assert sent(bench.stewardship.commit_answered(bench.at(0.2), bench.submitter, answer), Fence)
    assert sent(bench.accept(epoch=2), Fence)
    assert bench.register.state is JobState.PLACING


def test_stop_while_placing_waits_for_the_node(bench: Bench) -> None:
    bench.place()
    effects = bench.ask(Action.STOP)
    assert bench.register.state is JobState.CANCELLING
    assert sent(effects, Cancel)[0][0] == bench.node
    assert sent(bench.accept(now_s=0.6), Activate) == []


# -- active and unknown ------------------------------------------------------------------------------------------------


def test_node_that_asks_again_is_activated_again(bench: Bench) -> None:
    bench.activate()
    assert sent(bench.accept(now_s=2.0), Activate) == [(bench.node, Activate(bench.spec.job, 1))]


def test_report_tells_what_the_job_is_doing(bench: Bench) -> None:
    bench.activate()
    effects = bench.report()
    assert kept(effects)[0].started_wall_s == 1.0
    assert bench.register.phase is Phase.RUNNING
    assert kept(bench.report(now_s=6.0)) == []


def test_silence_makes_a_job_unknown_and_never_moves_it(bench: Bench) -> None:
    bench.activate()
    bench.report()
    effects: list[Effect] = []
    for tick in range(1, 10_000, 7):
        effects += bench.stewardship.step(bench.at(1 + tick))
    assert bench.register.state is JobState.UNKNOWN
    assert sent(effects, Offer) == []
    assert (bench.register.epoch, kept(effects)) == (1, [])


def test_unknown_job_that_is_heard_of_is_active_again(bench: Bench) -> None:
    bench.activate()
    bench.stewardship.step(bench.at(60))
    bench.report(now_s=61.0)
    assert bench.register.state is JobState.ACTIVE


@pytest.mark.parametrize(("code", "state"), [(0, JobState.SUCCEEDED), (1, JobState.FAILED), (143, JobState.FAILED)])
def test_result_makes_a_job_final_and_is_kept_before_it_is_acknowledged(
    bench: Bench, code: int, state: JobState
) -> None:
    bench.activate()
    effects = bench.report(Result(AttemptState.EXITED, code))
    assert kept(effects)[0].state is state
    assert isinstance(effects[0], Persist)
    assert sent(effects, ReportAck) == [(bench.node, ReportAck(bench.spec.job, 1))]


def test_result_that_is_told_again_is_acknowledged_and_changes_nothing(bench: Bench) -> None:
    bench.activate()
    bench.report(Result(AttemptState.EXITED, 0))
    before = bench.register
    assert sent(bench.report(Result(AttemptState.EXITED, 1)), ReportAck)
    assert bench.register == before


def test_result_of_another_node_counts_for_nothing(bench: Bench) -> None:
    bench.activate()
    message = AttemptReport(bench.spec.job, 1, None, "", 1.0, 2.0, Result(AttemptState.EXITED, 0))
    bench.stewardship.reported(bench.at(1), bench.submitter, message)
    assert bench.register.state is JobState.ACTIVE


def test_attempt_that_died_while_it_ran_fails_the_job(bench: Bench) -> None:
    bench.activate()
    bench.report(Result(AttemptState.CRASHED, None, "the machine was started again"))
    assert bench.register.state is JobState.FAILED
    assert bench.register.reason == "the machine was started again"


def test_attempt_that_died_before_it_started_is_tried_again_a_few_times(bench: Bench) -> None:
    bench.activate()
    for epoch in range(1, UNSTARTED_TRIES + 1):
        bench.report(Result(AttemptState.CRASHED, None, "no tree"), started_s=None, epoch=epoch)
        if epoch == UNSTARTED_TRIES:
            break
        assert (bench.register.state, bench.register.epoch) == (JobState.QUEUED, epoch)
        bench.stewardship.step(bench.at(epoch * 10))
        for candidate in bench.candidates:
            bench.answer(candidate.node, now_s=epoch * 10, epoch=epoch + 1)
        bench.accept(now_s=epoch * 10, epoch=epoch + 1)
    assert bench.register.state is JobState.FAILED


def test_stale_reports_are_fenced_and_stale_results_acknowledged(bench: Bench) -> None:
    bench.place()
    node = bench.node
    bench.stewardship.step(bench.at(20))
    running = AttemptReport(bench.spec.job, 1, Phase.RUNNING, "", 1.0, None)
    assert sent(bench.stewardship.reported(bench.at(21), node, running), Fence)
    ended = replace(running, result=Result(AttemptState.EXITED, 0), phase=None)
    assert sent(bench.stewardship.reported(bench.at(21), node, ended), ReportAck)
    assert bench.register.state is JobState.QUEUED


# -- cancelling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "mode"), [(Action.STOP, StopMode.STOP), (Action.KILL, StopMode.KILL)])
def test_running_job_is_cancelled_when_its_node_confirms_never_by_time(
    bench: Bench, action: Action, mode: StopMode
) -> None:
    bench.activate()
    effects = bench.ask(action)
    assert (bench.register.state, bench.register.stop) == (JobState.CANCELLING, mode)
    assert isinstance(effects[0], Persist)
    repeated = [bench.stewardship.step(bench.at(0.5 + tick)) for tick in range(1, 1000)]
    assert sum(bool(sent(step, Cancel)) for step in repeated) > 400
    assert [kept(step) for step in repeated if kept(step)] == []
    final = kept(bench.report(Result(AttemptState.EXITED, 143), now_s=1001.0))
    assert [register.state for register in final] == [JobState.CANCELLED]


def test_kill_after_stop_is_passed_on(bench: Bench) -> None:
    bench.activate()
    bench.ask(Action.STOP)
    assert sent(bench.ask(Action.KILL, now_s=1.0), Cancel)
    assert bench.register.stop is StopMode.KILL
    assert sent(bench.ask(Action.STOP, now_s=2.0), Cancel) == []


def test_cancelling_survives_a_restart(bench: Bench) -> None:
    bench.activate()
    record = record_of(bench.ask(Action.STOP))
    bench.restart(record)
    assert sent(bench.stewardship.step(bench.at(0)), Cancel)[0][0] == bench.node


def test_final_job_is_not_stopped_again(bench: Bench) -> None:
    bench.activate()
    bench.report(Result(AttemptState.EXITED, 0))
    before = bench.register
    assert kept(bench.ask(Action.KILL)) == []
    assert bench.register == before


def test_final_register_never_changes(bench: Bench) -> None:
    bench.queue()
    bench.ask(Action.STOP)
    with pytest.raises(BrokenInvariant, match="final register"):
        bench.stewardship._final[bench.spec.job].change(bench.at(1), reason="late")


# -- what users ask ----------------------------------------------------------------------------------------------------


def test_request_in_anothers_name_is_refused(bench: Bench) -> None:
    bench.queue()
    ((_, answer),) = sent(bench.ask(Action.STOP, user="bob"), Answer)
    assert isinstance(answer, Answer)
    assert answer.code == "not-allowed"
    assert bench.register.state is JobState.QUEUED


def test_colleague_cannot_stop_a_job(bench: Bench) -> None:
    admin = bench.office.setups[0].accounts[UserName("ada")]
    key, seat = bench.office.ring.make("bob"), bench.office.setups[2].node
    log = bench.rules._log
    log.add(log.write(admin, [LinkUser(UserName("bob"), key, seat, 2000)]))
    bench.queue()
    request = JobRequest(
        bench.office.mesh, UserName("bob"), Action.KILL, bench.me, bench.at(1).wall_s, "nonce", bench.spec.job
    )
    ask = Ask("q", bench.office.ring.sign(key_id(key), request))
    ((_, answer),) = sent(bench.stewardship.asked(bench.at(1), seat, ask), Answer)
    assert isinstance(answer, Answer)
    assert answer.code == "unknown-job"
    assert bench.register.state is JobState.QUEUED


def test_user_lists_own_jobs_from_any_machine(bench: Bench) -> None:
    bench.queue()
    ((_, answer),) = sent(bench.ask(Action.LIST, seat=3), Answer)
    assert isinstance(answer, Answer)
    assert [view.register.job for view in answer.views] == [bench.spec.job]
    assert bench.stewardship.views_of(UserName("bob")) == ()


def test_drafts_are_not_listed(bench: Bench) -> None:
    bench.submit()
    assert bench.stewardship.views_of(UserName("ada")) == ()


def test_unknown_job_is_said_to_be_unknown(bench: Bench) -> None:
    ((_, answer),) = sent(bench.ask(Action.STOP), Answer)
    assert isinstance(answer, Answer)
    assert answer.code == "unknown-job"


def test_watcher_hears_every_change_until_the_watch_ends(bench: Bench) -> None:
    bench.queue()
    bench.ask(Action.WATCH)
    for candidate in bench.candidates:
        effects = bench.answer(candidate.node)
    assert sent(effects, JobUpdate) == [(bench.submitter, JobUpdate(bench.register))]
    assert sent(bench.accept(now_s=0.5 + TIMING.watch_s), JobUpdate) == []


# -- restarts ----------------------------------------------------------------------------------------------------------


def test_restart_finds_every_job_where_it_stood(bench: Bench) -> None:
    record = record_of(bench.activate())
    bench.restart(record)
    assert bench.register.state is JobState.ACTIVE
    assert sent(bench.accept(now_s=1.0), Activate)
    assert kept(bench.report(Result(AttemptState.EXITED, 0)))[0].state is JobState.SUCCEEDED


def test_restart_gives_up_what_was_being_placed(bench: Bench) -> None:
    """What the node accepted meanwhile asks, and is fenced: the epoch is spent."""
    record = record_of(bench.place())
    bench.restart(record)
    bench.stewardship.step(bench.at(0))
    assert (bench.register.state, bench.register.epoch) == (JobState.QUEUED, 1)
    assert sent(bench.accept(now_s=1.0), Fence)


def test_final_jobs_are_kept_for_a_month(bench: Bench, at: Clock) -> None:
    bench.activate()
    ended = AttemptReport(bench.spec.job, 1, None, "", at(1).wall_s, at(2).wall_s, Result(AttemptState.EXITED, 0))
    record = record_of(bench.stewardship.reported(at(2), bench.node, ended))
    bench.restart(record)
    assert bench.stewardship.step(at(TIMING.retention_s)) == []
    later = at(TIMING.retention_s + TIMING.sweep_s)
    assert bench.stewardship.step(later) == [Persist("job", bench.spec.job, None)]
    assert bench.stewardship.view(bench.spec.job) is None


def test_record_that_no_longer_verifies_is_left_out(bench: Bench) -> None:
    record = record_of(bench.activate())
    effects = bench.restart(replace(record, spec=replace(record.spec, signature=b"x" * 32)))
    assert isinstance(effects[0], Reject)
    assert bench.stewardship.view(JobId(bench.spec.job)) is None


def test_preempted_job_waits_again_however_often_it_was_and_whatever_its_exit_code(bench: Bench) -> None:
    bench.activate()
    left = Result(AttemptState.PREEMPTED, 0, "its owner is using the GPU")
    effects = bench.report(left)
    assert sent(effects, ReportAck)
    assert (bench.register.state, bench.register.reason) == (JobState.QUEUED, "its owner is using the GPU")
    assert bench.register.result is None


def test_preempted_job_that_its_user_stopped_is_cancelled(bench: Bench) -> None:
    bench.activate()
    bench.ask(Action.STOP)
    bench.report(Result(AttemptState.PREEMPTED, 143, "its owner is using the GPU"))
    assert bench.register.state is JobState.CANCELLED


# -- the cloud ---------------------------------------------------------------------------------------------------------


def rent(bench: Bench, signed: Sign, **changes: object) -> None:
    """The bench's job is another one, with these changes."""
    bench.spec, bench.signed = signed(**changes)


def test_job_that_may_leave_is_told_as_a_need_once_no_machine_has_room(bench: Bench, signed: Sign) -> None:
    rent(bench, signed, cloud=CloudUse.OK)
    bench.candidates = [replace(bench.candidate(2), refusal="does not answer", rule=Rule.DOWN)]
    bench.queue()
    (need,) = bench.stewardship.demand(may_leave=True).needs
    assert (need.job, need.resources) == (bench.spec.job, bench.spec.resources)
    bench.stewardship.room_changed(bench.at(50))
    bench.stewardship.step(bench.at(50))
    assert bench.stewardship.demand(may_leave=True).needs == (need,)  # it has waited since the first time
    bench.ask(Action.STOP)
    assert bench.stewardship.demand(may_leave=True).needs == ()


def test_job_that_must_stay_is_no_need(bench: Bench) -> None:
    bench.candidates = [replace(bench.candidate(2), refusal="does not answer", rule=Rule.DOWN)]
    bench.queue()
    assert bench.stewardship.demand(may_leave=True).needs == ()


def test_job_on_an_instance_that_is_gone_is_placed_again_as_often_as_its_user_allows(
    bench: Bench, signed: Sign
) -> None:
    rent(bench, signed, cloud=CloudUse.OK, retries=1)
    bench.activate()
    bench.report()
    bench.stewardship.node_gone(bench.at(5), bench.node)
    assert (bench.register.state, bench.register.died) == (JobState.QUEUED, 1)
    bench.stewardship.step(bench.at(10))
    for candidate in bench.candidates:
        bench.answer(candidate.node, now_s=10.1, epoch=2)
    bench.accept(now_s=10.2, epoch=2)
    bench.report(epoch=2, now_s=11)
    bench.stewardship.node_gone(bench.at(12), bench.node)
    assert (bench.register.state, bench.register.reason) == (JobState.FAILED, "the instance it ran on is gone")


def test_job_that_had_not_begun_on_an_instance_that_is_gone_loses_nothing(bench: Bench) -> None:
    bench.activate()
    bench.stewardship.node_gone(bench.at(5), bench.node)
    assert (bench.register.state, bench.register.died) == (JobState.QUEUED, 0)


def test_stop_of_a_job_on_an_instance_that_is_gone_is_confirmed_by_that(bench: Bench) -> None:
    bench.activate()
    bench.report()
    bench.ask(Action.STOP)
    bench.stewardship.node_gone(bench.at(5), bench.node)
    assert bench.register.state is JobState.CANCELLED


def test_other_jobs_are_none_of_an_instances_business(bench: Bench) -> None:
    bench.activate()
    bench.report()
    other = next(c.node for c in bench.candidates if c.node != bench.node)
    assert bench.stewardship.node_gone(bench.at(5), other) == []


def test_attempt_that_its_own_machine_calls_dead_is_forgiven_as_often_as_the_user_allows(
    bench: Bench, signed: Sign
) -> None:
    rent(bench, signed, retries=1)
    bench.activate()
    bench.report(Result(AttemptState.CRASHED, None, "the machine restarted"))
    assert (bench.register.state, bench.register.died) == (JobState.QUEUED, 1)


def test_plain_failure_is_not_tried_again(bench: Bench, signed: Sign) -> None:
    rent(bench, signed, retries=5)
    bench.activate()
    bench.report(Result(AttemptState.EXITED, 1))
    assert bench.register.state is JobState.FAILED


def test_job_that_ran_too_long_has_failed_and_is_not_tried_again(bench: Bench, signed: Sign) -> None:
    rent(bench, signed, retries=5, timeout_s=7200.0)
    bench.activate()
    bench.report(Result(AttemptState.TIMED_OUT, 0, "ran longer than its limit of 2 h"))
    assert (bench.register.state, bench.register.reason) == (JobState.FAILED, "ran longer than its limit of 2 h")


def expiring(bench: Bench, signed: Sign) -> None:
    """The bench's job may wait half an hour, and nobody has room for it."""
    rent(bench, signed, start_within_s=1800.0)
    bench.candidates = [replace(c, refusal="is busy", rule=Rule.BUSY) for c in bench.candidates]
    bench.queue()
    bench.stewardship.step(bench.at(0.0))


def test_job_that_finds_no_machine_in_time_expires_with_the_reason(bench: Bench, signed: Sign) -> None:
    expiring(bench, signed)
    bench.stewardship.step(bench.at(1799.0))
    assert bench.register.state is JobState.QUEUED
    deadline = bench.stewardship.deadline()
    assert deadline is not None
    assert deadline <= 1800.0
    (final,) = kept(bench.stewardship.step(bench.at(1800.0)))
    assert (final.state, final.epoch) == (JobState.EXPIRED, 0)
    assert final.reason.startswith("did not start within 30 min: ")
    assert "busy" in final.reason


def test_clock_that_is_set_forward_is_noticed(bench: Bench, signed: Sign) -> None:
    expiring(bench, signed)
    bench.stewardship.step(bench.at(1.0))
    later = replace(bench.at(62.0), wall_s=bench.at(1800.0).wall_s)
    assert kept(bench.stewardship.step(later))[-1].state is JobState.EXPIRED


def test_job_that_waits_too_long_while_its_steward_is_off_expires_when_it_is_back(bench: Bench, signed: Sign) -> None:
    rent(bench, signed, start_within_s=1800.0)
    bench.restart(record_of(bench.queue()))
    assert kept(bench.stewardship.step(bench.at(4000.0)))[-1].state is JobState.EXPIRED


def test_job_that_is_being_placed_in_time_runs(bench: Bench, signed: Sign) -> None:
    rent(bench, signed, start_within_s=10.0)
    bench.place()
    bench.stewardship.step(bench.at(11.0))
    bench.accept(now_s=12.0)
    bench.stewardship.step(bench.at(13.0))
    assert bench.register.state is JobState.ACTIVE


def test_job_that_was_declined_in_the_end_expires(bench: Bench, signed: Sign) -> None:
    rent(bench, signed, start_within_s=10.0)
    bench.place()
    bench.stewardship.step(bench.at(30.0))
    assert bench.register.state is JobState.QUEUED
    assert kept(bench.stewardship.step(bench.at(30.0)))[-1].state is JobState.EXPIRED


@pytest.mark.parametrize("is_told", [True, False])
def test_job_that_has_run_waits_as_long_as_it_takes(bench: Bench, signed: Sign, *, is_told: bool) -> None:
    rent(bench, signed, start_within_s=10.0)
    bench.activate()
    node = bench.node
    if is_told:  # else its end is the first that is heard of its start
        running = AttemptReport(bench.spec.job, 1, Phase.RUNNING, "", 2.0, None, None)
        bench.stewardship.reported(bench.at(3), node, running)
    bench.report(Result(AttemptState.PREEMPTED, 143, "its owner is using the GPU"), now_s=20.0)
    assert (bench.register.state, bench.register.ran_on) == (JobState.QUEUED, node)
    bench.candidates = []
    bench.stewardship.step(bench.at(100.0))
    assert bench.register.state is JobState.QUEUED


def test_job_with_secrets_is_no_need_because_a_new_instance_could_not_read_them(bench: Bench, signed: Sign) -> None:
    box = SecretBox(("TOKEN",), b"ciphertext", (SecretWrap(bench.me, b"e" * 32, b"w" * 48),))
    rent(bench, signed, cloud=CloudUse.OK, secrets=box)
    bench.candidates = [replace(bench.candidate(2), refusal="does not answer", rule=Rule.DOWN)]
    bench.queue()
    assert bench.stewardship.demand(may_leave=True).needs == ()


# -- what others may see -----------------------------------------------------------------------------------------------

EVE = UserName("eve")


def as_eve(bench: Bench, action: Action, job: JobId | None) -> Answer:
    """What the steward answers another user of the mesh, who sits at the third machine."""
    seat, log = bench.office.setups[2], bench.rules._log
    if EVE not in {user.user for user in log.users.values()}:
        public = bench.office.ring.make("eve@rig2")
        admin = bench.office.setups[0].accounts[UserName("ada")]
        log.add(log.write(admin, [LinkUser(EVE, public, seat.node, 1666)]))
    key = key_id(bench.office.ring.make("eve@rig2"))
    request = JobRequest(bench.office.mesh, EVE, action, bench.me, bench.at(0.5).wall_s, f"eve {action}", job)
    effects = bench.stewardship.asked(bench.at(0.5), seat.node, Ask("q", bench.office.ring.sign(key, request)))
    ((_, answer),) = sent(effects, Answer)
    assert isinstance(answer, Answer)
    assert kept(effects) == []
    return answer


def test_job_that_is_not_shared_does_not_exist_for_others(bench: Bench) -> None:
    bench.activate()
    assert as_eve(bench, Action.LIST, None).views == ()
    for action in (Action.WATCH, Action.STOP, Action.KILL):
        hidden, missing = as_eve(bench, action, bench.spec.job), as_eve(bench, action, JobId("z" * 26))
        assert (hidden.code, hidden.reason) == (missing.code, missing.reason) == ("unknown-job", hidden.reason)
        assert hidden.views == ()


def test_shared_job_is_listed_and_followed_by_others_and_not_stopped(bench: Bench, signed: Sign) -> None:
    bench.spec, bench.signed = signed(shared=True)
    bench.activate()
    (view,) = as_eve(bench, Action.LIST, None).views
    assert view.spec == bench.signed
    assert len(as_eve(bench, Action.WATCH, bench.spec.job).views) == 1
    assert bench.office.setups[2].node in [peer for peer, _ in sent(bench.report(), JobUpdate)]
    for action in (Action.STOP, Action.KILL):
        refused = as_eve(bench, action, bench.spec.job)
        assert refused.code == "not-allowed"
        assert "it belongs to ada" in refused.reason
    assert bench.register.state is JobState.ACTIVE
    assert bench.register.stop is None


def test_own_jobs_are_listed_before_what_others_share(
    bench: Bench, signed: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.queue()
    (own,) = bench.stewardship.views_of(UserName("ada"))
    job = bench.stewardship._jobs[bench.spec.job]
    monkeypatch.setattr(listing, "VIEWS_LIMIT_BYTES", 2 * listing.REGISTER_BYTES)
    _, envelope = signed(2)
    others = [replace(job, spec=replace(job.spec, user=EVE, shared=True), signed=envelope)] * 3
    assert listing.listed([job], others, {})[0] == own
    assert len(listing.listed([job], others, {})) < 4


# -- wrong clocks and repeated requests --------------------------------------------------------------------------------

LATE_S = 7200.0


@pytest.fixture
def challenging(bench: Bench) -> Bench:
    """The bench, whose steward challenges what is stale."""
    office = bench.office
    bench.rules = RequestRules(office.notaries[0], bench.rules._log, bench.me, Challenges(random.Random(1)))
    bench.restart()
    return bench


def submit_late(bench: Bench, envelope: Signed, now_s: float = LATE_S, fresh: Signed | None = None) -> SubmitAnswer:
    submit = Submit(bench.spec.job, envelope, fresh)
    effects = bench.stewardship.submitted(bench.at(now_s), bench.submitter, submit)
    ((_, answer),) = sent(effects, SubmitAnswer)
    assert isinstance(answer, SubmitAnswer)
    return answer


def fresh(bench: Bench, refused: SubmitAnswer, **changes: object) -> Signed:
    """What the user signs where his clock differs."""
    assert refused.challenge is not None
    spec = bench.spec
    wall_s, nonce = bench.at(0).wall_s, refused.challenge.nonce
    request = JobRequest(spec.mesh, spec.user, Action.SUBMIT, bench.me, wall_s, "nonce", spec.job, nonce)
    request = replace(request, **changes)  # type: ignore[arg-type]  # names and types are JobRequest's
    return bench.office.notaries[1].sign(bench.signed.key, request)


def test_job_of_a_machine_with_a_wrong_clock_is_held_once_it_is_signed_again(challenging: Bench, signed: Sign) -> None:
    bench = challenging
    refused = submit_late(bench, bench.signed)
    assert (refused.code, refused.held) == ("stale", False)
    assert refused.challenge is not None
    assert refused.challenge.wall_s == bench.at(LATE_S).wall_s
    again = Submit(bench.spec.job, bench.signed, fresh(bench, refused))
    effects = bench.stewardship.submitted(bench.at(LATE_S + 1), bench.submitter, again)
    assert [type(effect) for effect in effects] == [FetchTree]
    bench.stewardship.tree_arrived(bench.at(LATE_S + 2), bench.spec.job)
    for proof in (None, again.fresh):  # what was on its way meanwhile is the same job
        assert submit_late(bench, bench.signed, LATE_S + 3, proof) == SubmitAnswer(bench.spec.job, held=True)
    _, other = signed(command=("evil",))
    assert submit_late(bench, other, LATE_S + 4).code == "bad-request"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"action": Action.STOP}, "not-allowed"),
        ({"job": JobId("j" * 26)}, "not-allowed"),
        ({"node": NodeId("x" * 52)}, "not-allowed"),
        ({"challenge": b"m" * 32}, "stale"),
        ({"challenge": b""}, "stale"),
    ],
)
def test_what_was_signed_for_something_else_makes_no_job_fresh(
    challenging: Bench, changes: dict[str, object], code: str
) -> None:
    bench = challenging
    proof = fresh(bench, submit_late(bench, bench.signed), **changes)
    assert submit_late(bench, bench.signed, LATE_S + 1, proof).code == code


def test_submit_that_is_repeated_after_the_end_and_a_restart_runs_nothing(challenging: Bench) -> None:
    bench = challenging
    bench.activate()
    record = record_of(bench.report(Result(AttemptState.EXITED, 0)))
    record = replace(record, register=replace(record.register, ended_wall_s=bench.at(2).wall_s))
    for now_s in (3.0, LATE_S):
        bench.restart(record)
        effects = bench.stewardship.submitted(bench.at(now_s), bench.submitter, Submit(bench.spec.job, bench.signed))
        assert effects == [Send(bench.submitter, SubmitAnswer(bench.spec.job, held=True))]
        assert bench.register.state is JobState.SUCCEEDED
        assert bench.stewardship.step(bench.at(now_s + 1)) == []


def test_submit_that_is_repeated_after_its_job_was_forgotten_is_stale(challenging: Bench) -> None:
    bench = challenging
    proof = fresh(bench, submit_late(bench, bench.signed))
    bench.stewardship.submitted(bench.at(LATE_S), bench.submitter, Submit(bench.spec.job, bench.signed, proof))
    bench.stewardship.tree_arrived(bench.at(LATE_S), bench.spec.job)
    bench.ask(Action.STOP, now_s=LATE_S)
    bench.stewardship.step(bench.at(LATE_S + TIMING.retention_s + TIMING.sweep_s))
    assert bench.stewardship.view(bench.spec.job) is None
    late_s = LATE_S + TIMING.retention_s + TIMING.sweep_s + 1
    for again in (None, proof):
        assert submit_late(bench, bench.signed, late_s, again).code == "stale"
        assert bench.stewardship.view(bench.spec.job) is None


def test_stop_of_a_machine_with_a_wrong_clock_is_obeyed_once_it_is_signed_again(challenging: Bench) -> None:
    bench = challenging
    bench.activate()
    ((_, refused),) = sent(bench.ask(Action.STOP, now_s=LATE_S, issued_s=0.0), Answer)
    assert isinstance(refused, Answer)
    assert (refused.code, bench.register.state) == ("stale", JobState.ACTIVE)
    assert refused.challenge is not None
    effects = bench.ask(Action.STOP, now_s=LATE_S, issued_s=0.0, challenge=refused.challenge.nonce)
    assert sent(effects, Answer) == [(bench.submitter, Answer("q", bench.stewardship.views_of(UserName("ada"))))]
    assert bench.register.state is JobState.CANCELLING


def test_stop_that_is_repeated_is_answered_and_changes_nothing(bench: Bench) -> None:
    bench.activate()
    first = bench.ask(Action.KILL)
    assert any(isinstance(e, Persist) and isinstance(e.record, ObeyedRecord) for e in first)
    again = bench.ask(Action.KILL, now_s=100.0)
    assert again == [Send(bench.submitter, Answer("q", bench.stewardship.views_of(UserName("ada"))))]
    # Whatever its job may have become: what was asked for once is not asked for again.
    bench.stewardship._jobs[bench.spec.job].register = replace(bench.register, state=JobState.ACTIVE, stop=None)
    assert kept(bench.ask(Action.KILL, now_s=100.5)) == []
    assert kept(bench.ask(Action.KILL, now_s=100.5, nonce="another")) != []


def test_repeated_stop_is_known_after_a_restart_and_forgotten_when_it_would_be_stale(bench: Bench) -> None:
    bench.activate()
    effects = bench.ask(Action.STOP)
    records = [e.record for e in effects if isinstance(e, Persist) and isinstance(e.record, ObeyedRecord)]
    bench.restart(next(e.record for e in effects if isinstance(e, Persist) and isinstance(e.record, JobRecord)))
    bench.stewardship.obeyed.restore(records)
    bench.stewardship._jobs[bench.spec.job].register = replace(bench.register, state=JobState.ACTIVE, stop=None)
    assert kept(bench.ask(Action.STOP, now_s=1.0)) == []
    (old,) = [record for record in records if record is not None]
    until_s = old.until_wall_s - bench.at(0).wall_s
    assert until_s == 0.5 + 2 * WALL_CLOCK_SLACK_S
    assert bench.stewardship.obeyed.forget_old(bench.at(until_s - 1)) == []
    forgotten = bench.stewardship.obeyed.forget_old(bench.at(until_s))
    assert forgotten == [Persist("obeyed", f"{old.key}/{old.nonce}", None)]
    ((_, answer),) = sent(bench.ask(Action.STOP, now_s=until_s, issued_s=0.5), Answer)
    assert isinstance(answer, Answer)
    assert answer.code == "stale"


def test_requests_that_are_remembered_are_limited_for_each_key(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freshness, "OBEYED_LIMIT", 2)
    bench.activate()
    codes = []
    for number in range(3):
        ((_, answer),) = sent(bench.ask(Action.STOP, nonce=f"n{number}"), Answer)
        assert isinstance(answer, Answer)
        codes.append(answer.code)
    assert codes == ["", "", "busy"]
    ((_, answer),) = sent(bench.ask(Action.STOP, nonce="x" * 65), Answer)
    assert isinstance(answer, Answer)
    assert answer.code == "bad-request"


# -- receipts ----------------------------------------------------------------------------------------------------------


def signed_receipt(bench: Bench, result: Result, **changes: object) -> Signed:
    """What the machine of the register signs for a run that took from 1 s to 2 s."""
    register = bench.register
    receipt = Receipt(
        bench.office.mesh,
        bench.spec.job,
        register.epoch,
        bench.node,
        bench.office.notaries[0].digest(bench.signed),
        bench.spec.tree,
        True,
        tuple(share.uuid for share in register.gpus),
        "",
        "",
        "",
        Digest(""),
        result.outcome,
        result.exit_code,
        1.0,
        2.0,
    )
    seat = next(n for n, setup in enumerate(bench.office.setups) if setup.node == bench.node)
    receipt = replace(receipt, **changes)  # type: ignore[arg-type]  # names and types are Receipt's
    return bench.office.notaries[seat].sign(KeyId(bench.node), receipt)


def end(bench: Bench, result: Result, receipt: Signed | None) -> list[Effect]:
    message = AttemptReport(bench.spec.job, bench.register.epoch, None, "", 1.0, 2.0, result, receipt=receipt)
    return bench.stewardship.reported(bench.at(2), bench.node, message)


def told_receipts(effects: list[Effect]) -> list[Signed | None]:
    return [view.receipt for _, a in sent(effects, Answer) if isinstance(a, Answer) for view in a.views]


def test_receipt_is_kept_with_the_job_and_told_where_it_is_asked_for(bench: Bench) -> None:
    bench.activate()
    result = Result(AttemptState.EXITED, 3)
    receipt = signed_receipt(bench, result)
    record = record_of(end(bench, result, receipt))
    assert record.receipt == receipt
    assert told_receipts(bench.ask(Action.RECEIPT)) == [receipt]
    assert told_receipts(bench.ask(Action.LIST)) == [None]
    bench.restart(record)
    assert told_receipts(bench.ask(Action.RECEIPT)) == [receipt]


def test_receipt_is_not_for_who_pretends_to_be_another(bench: Bench) -> None:
    bench.activate()
    bench.ask(Action.RECEIPT)
    (answer,) = [a for _, a in sent(bench.ask(Action.RECEIPT, user="bob"), Answer) if isinstance(a, Answer)]
    assert (answer.views, answer.code) == ((), "not-allowed")


def test_receipt_that_does_not_hold_is_dropped_aloud_and_the_job_ends(bench: Bench) -> None:
    bench.activate()
    result = Result(AttemptState.EXITED, 0)
    effects = end(bench, result, signed_receipt(bench, result, exit_code=1))
    assert [e.reason for e in effects if isinstance(e, Reject)] == [
        "cannot trust a receipt: it says something else than the report it came with"
    ]
    record = record_of(effects)
    assert (record.receipt, record.register.state) == (None, JobState.SUCCEEDED)


def test_receipt_of_another_request_is_dropped_aloud(bench: Bench) -> None:
    bench.activate()
    result = Result(AttemptState.EXITED, 0)
    effects = end(bench, result, signed_receipt(bench, result, tree=Digest("f" * 64)))
    assert [e.reason for e in effects if isinstance(e, Reject)] == [
        "cannot trust a receipt: it is of another working directory"
    ]
    assert record_of(effects).receipt is None


def test_receipt_of_a_newer_attempt_takes_the_place_of_an_older_one(bench: Bench) -> None:
    bench.activate()
    gone = Result(AttemptState.PREEMPTED, None, "its owner plays")
    first = signed_receipt(bench, gone)
    assert record_of(end(bench, gone, first)).receipt == first
    bench.stewardship.step(bench.at(5))
    for candidate in bench.candidates:
        bench.answer(candidate.node, now_s=5.1, epoch=2)
    bench.accept(5.2, epoch=2)
    assert bench.register.epoch == 2
    done = Result(AttemptState.EXITED, 0)
    second = signed_receipt(bench, done)
    assert record_of(end(bench, done, second)).receipt == second


# -- what jobs print --------------------------------------------------------------------------------------------------


def test_output_is_kept_of_the_current_attempt_only_and_from_its_machine(bench: Bench) -> None:
    bench.activate()
    chunk = LogChunk(0, 5, b"hello")
    bench.stewardship.printed(bench.office.setups[1].node, AttemptOutput(bench.spec.job, 1, chunk))
    assert bench.stewardship.tail(bench.spec.job) is None
    bench.stewardship.printed(bench.node, AttemptOutput(bench.spec.job, 2, chunk))
    assert bench.stewardship.tail(bench.spec.job) is None
    bench.stewardship.printed(bench.node, AttemptOutput(bench.spec.job, 1, chunk))
    assert bench.stewardship.tail(bench.spec.job) == chunk


# -- the queue --------------------------------------------------------------------------------------------------------


def offers(effects: list[Effect]) -> list[tuple[NodeId, Offer]]:
    return [(node, message) for node, message in sent(effects, Offer) if isinstance(message, Offer)]


def fill(bench: Bench, number: int, **how: bool) -> None:
    """The `number`-th candidate is taken by a job of bob's."""
    candidate = bench.candidates[number]
    assert candidate.record is not None
    gpus = tuple(GpuShare(gpu.uuid) for gpu in candidate.record.inventory.gpus)
    low = Allocation(JobId("o" * 26), 1, "other", UserName("bob"), gpus, priority=Priority.LOW, **how)
    bench.candidates[number] = replace(candidate, capacity=Capacity((), (low,)))


def tick(bench: Bench, now_s: float) -> list[Effect]:
    bench.stewardship.room_changed(bench.at(now_s))
    return bench.stewardship.step(bench.at(now_s))


def test_job_behind_those_of_other_stewards_lets_them_pass(bench: Bench) -> None:
    line = Line(UserName("ada"), Priority.NORMAL, 1, bench.at(-10).wall_s, bench.at(-10).wall_s)
    bench.crowd = Crowd({}, {NodeId("other"): (line,), NodeId("another"): (line,)})
    assert offers(bench.queue()) == []
    pause_s = 2 * COURTESY_S
    assert bench.stewardship.deadline() == pytest.approx(pause_s)
    assert offers(tick(bench, pause_s - 0.01)) == []
    assert offers(tick(bench, pause_s)), "news of room must not make it wait anew"


def test_what_waits_is_told(bench: Bench) -> None:
    fill(bench, 0)
    fill(bench, 1)
    bench.queue()
    bench.stewardship.step(bench.at(0))
    tick(bench, 1.0)
    told = bench.stewardship.demand(may_leave=False)
    wall_s = bench.at(0).wall_s
    assert (told.needs, told.lines) == ((), (Line(UserName("ada"), Priority.NORMAL, 1, wall_s, wall_s),))
    bench.ask(Action.STOP, now_s=2.0)
    tick(bench, 10.0)
    assert bench.stewardship.demand(may_leave=False).lines == ()


def test_job_claims_at_once_where_all_that_is_in_its_way_gives_way(bench: Bench) -> None:
    fill(bench, 0)
    fill(bench, 1, preemptible=True)
    ((node, offer),) = offers(bench.queue())
    assert (node, offer.claims) == (bench.candidates[1].node, True)


def test_job_claims_a_machine_once_it_has_waited_for_long_at_the_head(bench: Bench) -> None:
    fill(bench, 0)
    fill(bench, 1)
    assert offers(bench.queue()) == []
    assert offers(tick(bench, CLAIM_AFTER_S - 1)) == []
    ((node, offer),) = offers(tick(bench, CLAIM_AFTER_S))
    assert node in [candidate.node for candidate in bench.candidates]
    assert offer.claims


def test_job_claims_nothing_behind_another_stewards_job(bench: Bench) -> None:
    fill(bench, 0)
    fill(bench, 1)
    bench.queue()
    line = Line(UserName("ada"), Priority.NORMAL, 1, bench.at(-10).wall_s, bench.at(-10).wall_s)
    bench.crowd = Crowd({}, {NodeId("other"): (line,)})
    tick(bench, CLAIM_AFTER_S)
    assert offers(tick(bench, CLAIM_AFTER_S + 1)) == []


def test_nothing_is_claimed_that_is_kept_for_another(bench: Bench) -> None:
    fill(bench, 0)
    fill(bench, 1)
    kept = Allocation(JobId("p" * 26), 1, "other", UserName("bob"), (), is_kept=True)
    for number, candidate in enumerate(bench.candidates):
        assert candidate.capacity is not None
        taken = (*candidate.capacity.allocations, kept)
        bench.candidates[number] = replace(candidate, capacity=Capacity((), taken))
    bench.queue()
    assert offers(tick(bench, CLAIM_AFTER_S)) == []


def test_what_is_kept_for_a_job_is_free_for_it(bench: Bench) -> None:
    candidate = bench.candidates[0]
    assert candidate.record is not None
    gpus = tuple(GpuShare(gpu.uuid) for gpu in candidate.record.inventory.gpus)
    kept = Allocation(bench.spec.job, 1, "train", UserName("ada"), gpus, is_kept=True)
    bench.candidates = [replace(candidate, capacity=Capacity((), (kept,)))]
    assert [offer.claims for _, offer in offers(bench.queue())] == [False]
    other = replace(kept, job=JobId("o" * 26))
    bench.candidates = [replace(candidate, capacity=Capacity((), (other,)))]
    bench.restart()
    assert offers(bench.queue()) == []
