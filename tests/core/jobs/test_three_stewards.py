"""Three stewards of one job, which say what they say to one another: who speaks, who takes over, and what is held."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from meshgpu.core.effects import Effect, FetchTree, Persist, Reject, Send
from meshgpu.core.jobs import steward as steward_module
from meshgpu.core.jobs.placement import Candidate
from meshgpu.core.jobs.queue import Crowd
from meshgpu.core.jobs.steward import Stewardship, StewardTiming
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import RequestRules
from meshgpu.errors import BrokenInvariant
from meshgpu.model.clock import Now
from meshgpu.model.gossip import Capacity, NodeRecord
from meshgpu.model.ids import HoldId, KeyId, NodeId, UserName
from meshgpu.model.job import Action, AttemptState, JobRequest, JobSpec, JobState, Phase, Register, Result, Standing
from meshgpu.model.logs import TAIL_BYTES, LogChunk
from meshgpu.model.messages import (
    Accept,
    Accepted,
    Activate,
    Answer,
    Ask,
    AttemptOutput,
    AttemptReport,
    Commit,
    CommitAnswer,
    Fence,
    Message,
    Offer,
    OfferAnswer,
    Prepare,
    Promise,
    ReportAck,
    Submit,
    SubmitAnswer,
)
from meshgpu.model.records import JobRecord
from meshgpu.model.trust import Signed
from meshgpu.sim.office import Office

Clock = Callable[[float], Now]
Sign = Callable[..., tuple[JobSpec, Signed]]
TIMING = StewardTiming()
HOLD = HoldId("h" * 26)


@dataclass
class Table:
    """Machines 0, 1 and 2 hold a job of machine 1's; machine 3 runs it. What they say to one another arrives at once,
    but from and to those who are `away`. said: what was said to others, in order. disks: {machine: its record}.
    """

    office: Office
    log: MeshLog
    spec: JobSpec
    signed: Signed
    at: Clock
    now_s: float = 0.0
    away: set[NodeId] = field(default_factory=set)
    said: list[tuple[NodeId, NodeId, Message]] = field(default_factory=list)
    disks: dict[NodeId, JobRecord] = field(default_factory=dict)
    seats: dict[NodeId, Stewardship] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for steward in self.spec.stewards:
            self.start(steward)

    @property
    def now(self) -> Now:
        return self.at(self.now_s)

    @property
    def runner(self) -> NodeId:
        return self.office.setups[3].node

    def start(self, steward: NodeId) -> None:
        """An agent starts with what is on its disk, and meets those who are there."""
        number = [setup.node for setup in self.office.setups].index(steward)
        notary = self.office.notaries[number]
        room = self.office.setups[3]
        machine = Candidate(room.node, room.name, NodeRecord("1", (), room.inventory), Capacity((), ()))
        self.seats[steward] = Stewardship(
            steward,
            self.log,
            RequestRules(notary, self.log, steward),
            notary,
            random.Random(number),
            lambda _guest, _machine: [machine],
            lambda: Crowd({}, {}),
            lambda node: node not in self.away,
            TIMING,
        )
        record = self.disks.get(steward)
        self.do(steward, self.seats[steward].restore(self.now, [record] if record else []))
        for other in self.seats:
            if other != steward and not {steward, other} & self.away:
                self.do(steward, self.seats[steward].linked(self.now, other))
                self.do(other, self.seats[other].linked(self.now, steward))

    def leave(self, *stewards: NodeId) -> None:
        self.away |= set(stewards)

    def come_back(self, *stewards: NodeId) -> None:
        self.away -= set(stewards)
        for steward in stewards:
            self.start(steward)

    def wait(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s = min(self.now_s + 0.25, until_s)
            for steward in self.spec.stewards:
                if steward not in self.away:
                    self.do(steward, self.seats[steward].step(self.now))

    def do(self, steward: NodeId, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Persist) and isinstance(effect.record, JobRecord):
                self.disks[steward] = effect.record
        for effect in effects:
            if isinstance(effect, FetchTree):
                self.do(steward, self.seats[steward].tree_arrived(self.now, effect.job))
            elif isinstance(effect, Send):
                self.said.append((steward, effect.peer, effect.message))
                if effect.peer in self.seats and not {steward, effect.peer} & self.away:
                    self.hear(effect.peer, steward, effect.message)

    def hear(self, steward: NodeId, peer: NodeId, message: Message) -> None:
        seat = self.seats[steward]
        match message:
            case Prepare():
                self.do(steward, seat.prepared(self.now, peer, message))
            case Promise():
                self.do(steward, seat.promised(self.now, peer, message))
            case Accept():
                self.do(steward, seat.accept(self.now, peer, message))
            case Accepted():
                self.do(steward, seat.accepted(self.now, peer, message))
            case Submit():
                self.do(steward, seat.submitted(self.now, peer, message))
            case OfferAnswer():
                self.do(steward, seat.offer_answered(self.now, peer, message))
            case CommitAnswer():
                self.do(steward, seat.commit_answered(self.now, peer, message))
            case AttemptReport():
                self.do(steward, seat.reported(self.now, peer, message))
            case Ask():
                self.do(steward, seat.asked(self.now, peer, message))
            case _:
                pass  # for a submitter or a node that is a steward as well

    def told(self, kind: type[Message], to: NodeId | None = None) -> list[Message]:
        return [message for _, peer, message in self.said if isinstance(message, kind) and to in (None, peer)]

    def register(self, steward: NodeId) -> Register:
        view = self.seats[steward].view(self.spec.job)
        assert view is not None
        return view.register

    def speakers(self) -> list[NodeId]:
        return [steward for steward, seat in self.seats.items() if seat.turn(self.spec.job) is not None]

    # -- the way of a job ---------------------------------------------------------------------------------------------

    def submit(self, to: int = 0) -> None:
        self.hear(self.spec.stewards[to], self.spec.submitter, Submit(self.spec.job, self.signed))

    def run(self) -> None:
        """Submitted, placed and begun, by the first steward."""
        first = self.spec.stewards[0]
        self.submit()
        self.place(first, 1)
        self.report(first)

    def place(self, steward: NodeId, epoch: int) -> None:
        """The runner takes what is offered to it as this epoch."""
        for _ in range(20):
            self.said.clear()
            self.wait(0.25)
            if any(isinstance(offer, Offer) and offer.epoch == epoch for offer in self.told(Offer)):
                break
        self.hear(steward, self.runner, OfferAnswer(self.spec.job, epoch, HOLD))
        self.hear(steward, self.runner, CommitAnswer(self.spec.job, epoch, accepted=True))

    def report(self, *stewards: NodeId, result: Result | None = None, epoch: int = 1) -> None:
        wall_s = self.now.wall_s
        report = AttemptReport(
            self.spec.job, epoch, None if result else Phase.RUNNING, "", 1.0, wall_s if result else None, result
        )
        for steward in stewards:
            if steward not in self.away:
                self.hear(steward, self.runner, report)

    def stop(self, steward: NodeId) -> None:
        key = self.office.setups[1].accounts[UserName("ada")]
        request = JobRequest(
            self.spec.mesh, self.spec.user, Action.STOP, steward, self.now.wall_s, "nonce", self.spec.job
        )
        ask = Ask("q", self.office.notaries[1].sign(key, request))
        self.hear(steward, self.spec.submitter, ask)


@pytest.fixture
def table(office: Office, log: MeshLog, signed: Sign, at: Clock) -> Table:
    stewards = tuple(office.setups[number].node for number in (0, 2, 1))
    spec, envelope = signed(stewards=stewards, retries=1)
    return Table(office, log, spec, envelope, at)


EXITED = Result(AttemptState.EXITED, 0)


# -- held by a quorum --------------------------------------------------------------------------------------------------


def test_job_is_confirmed_once_a_quorum_has_it_on_disk(table: Table) -> None:
    first, second, third = table.spec.stewards
    table.leave(second, third)
    table.submit()
    assert table.disks.keys() == {first}
    assert SubmitAnswer(table.spec.job, held=True) not in table.told(SubmitAnswer)
    table.come_back(third)
    table.wait(2.0)
    assert table.disks.keys() >= {first, third}
    assert SubmitAnswer(table.spec.job, held=True) in table.told(SubmitAnswer)


def test_nothing_is_offered_before_a_quorum_holds_the_job(table: Table) -> None:
    table.leave(*table.spec.stewards[1:])
    table.submit()
    table.wait(30.0)
    assert table.told(Offer) == []
    table.come_back(table.spec.stewards[1])
    table.wait(2.0)
    assert table.told(Offer)


def test_ticket_has_the_votes_of_a_quorum(table: Table) -> None:
    table.run()
    (commit,) = table.told(Commit, table.runner)
    assert isinstance(commit, Commit)
    assert len({vote.key for vote in commit.votes}) == 2
    assert {vote.key for vote in commit.votes} <= {KeyId(steward) for steward in table.spec.stewards}
    assert len(table.told(Activate, table.runner)) == 1


def test_job_does_not_start_while_only_one_steward_has_written_it(table: Table) -> None:
    first, second, third = table.spec.stewards
    table.submit()
    table.wait(0.25)
    table.hear(first, table.runner, OfferAnswer(table.spec.job, 1, HOLD))
    table.leave(second, third)
    table.hear(first, table.runner, CommitAnswer(table.spec.job, 1, accepted=True))
    table.wait(5.0)
    assert table.told(Activate) == []
    assert table.register(first).state is JobState.PLACING  # what people see is what is chosen
    table.come_back(second)
    table.wait(2.0)
    assert len(table.told(Activate)) >= 1


def test_result_is_acknowledged_once_a_quorum_has_it(table: Table) -> None:
    first, second, third = table.spec.stewards
    table.run()
    table.leave(second, third)
    table.report(first, result=EXITED)
    table.wait(3.0)
    assert table.told(ReportAck) == []
    assert table.register(first).state is JobState.ACTIVE
    table.come_back(second)
    table.wait(2.0)
    assert table.told(ReportAck) == [ReportAck(table.spec.job, 1)]
    assert table.register(first).state is JobState.SUCCEEDED


def test_steward_that_was_away_hears_of_the_end(table: Table) -> None:
    first, _, third = table.spec.stewards
    table.run()
    table.leave(third)
    table.report(first, result=EXITED)
    assert table.register(third).state is JobState.ACTIVE
    table.come_back(third)
    table.wait(2.0)
    assert table.register(third).state is JobState.SUCCEEDED
    assert table.disks[third].register == table.disks[first].register


# -- who speaks --------------------------------------------------------------------------------------------------------


def test_next_steward_takes_over_after_a_while_and_goes_on(table: Table) -> None:
    first, second, third = table.spec.stewards
    table.run()
    table.leave(first)
    table.wait(TIMING.turns.takeover_s - 0.5)
    assert table.speakers() == [first]
    table.wait(1.5)
    assert second in table.speakers()
    table.report(second, third, result=EXITED)
    assert table.register(second).state is JobState.SUCCEEDED
    assert table.register(third).state is JobState.SUCCEEDED
    assert table.told(ReportAck) == [ReportAck(table.spec.job, 1)]


def test_last_steward_takes_over_later_and_alone_it_changes_nothing(table: Table) -> None:
    first, second, third = table.spec.stewards
    table.run()
    table.leave(first, second)
    table.wait(60.0)
    assert third not in table.speakers()
    table.report(third, result=EXITED)
    table.wait(5.0)
    assert table.told(ReportAck) == []
    table.come_back(second)
    table.wait(TIMING.turns.takeover_s + 2.0)
    table.report(second, third, result=EXITED)
    assert table.register(third).state is JobState.SUCCEEDED


def test_first_steward_speaks_again_when_it_is_back(table: Table) -> None:
    first, second, _ = table.spec.stewards
    table.run()
    table.leave(first)
    table.wait(TIMING.turns.takeover_s + 2.0)
    table.come_back(first)
    table.wait(3.0)
    assert table.speakers() == [first]
    assert table.register(first).epoch == 1
    assert table.register(second).state is JobState.ACTIVE


def test_steward_that_comes_back_with_an_old_register_fences_nobody(table: Table) -> None:
    """It went before the job was placed a second time; the second attempt must live on."""
    first, second, third = table.spec.stewards
    table.run()
    old = table.disks[first]
    table.leave(first)
    table.wait(TIMING.turns.takeover_s + 2.0)
    died = Result(AttemptState.CRASHED, None, "the machine started anew")
    table.report(second, third, result=died)
    table.place(second, 2)
    assert table.register(third).epoch == 2
    table.disks[first] = old
    table.come_back(first)
    table.report(first, epoch=2)
    table.wait(3.0)
    assert table.told(Fence) == []
    assert table.told(ReportAck) == []
    assert table.register(first).epoch == 2


def test_what_was_to_follow_from_an_old_turn_does_not_follow_from_the_next(table: Table) -> None:
    """The first wrote the end alone; others went on meanwhile. It must not acknowledge what they never heard."""
    first, second, third = table.spec.stewards
    table.run()
    table.leave(second, third)
    table.report(first, result=EXITED)
    table.leave(first)
    table.come_back(second, third)
    table.wait(TIMING.turns.takeover_s + 2.0)
    table.report(second, third, result=Result(AttemptState.CRASHED, None, "the machine started anew"))
    table.said.clear()
    table.come_back(first)
    table.wait(5.0)
    assert table.told(ReportAck) == []
    assert [table.register(steward).died for steward in table.spec.stewards] == [1, 1, 1]


def test_steward_that_never_heard_of_the_job_takes_over_all_the_same(table: Table) -> None:
    first, second, third = table.spec.stewards
    table.leave(second)
    table.run()
    table.come_back(second)
    table.disks.pop(second, None)
    table.start(second)
    table.leave(first)
    table.wait(TIMING.turns.takeover_s + 5.0)
    assert second in table.speakers()
    assert table.register(second).state is not JobState.DRAFT
    assert table.register(third).epoch == 1


def test_job_is_submitted_to_the_next_where_the_first_is_away(table: Table) -> None:
    first, second, third = table.spec.stewards
    table.leave(first)
    table.submit(to=1)
    table.wait(2.0)
    assert SubmitAnswer(table.spec.job, held=True) in table.told(SubmitAnswer)
    assert table.disks.keys() == {second, third}


def test_draft_of_which_nothing_came_is_forgotten(table: Table) -> None:
    second = table.spec.stewards[1]
    table.submit(to=1)
    assert table.seats[second].unfinished == 1
    table.now_s += TIMING.sweep_s + 10.0
    table.wait(1.0)
    assert table.seats[second].unfinished == 0


def test_submitter_that_asks_the_wrong_one_changes_nothing(table: Table) -> None:
    table.submit(to=1)
    table.wait(2.0)
    assert table.told(SubmitAnswer) == []
    table.submit()
    assert SubmitAnswer(table.spec.job, held=True) in table.told(SubmitAnswer)


# -- what users ask ----------------------------------------------------------------------------------------------------


def test_stop_is_left_to_who_speaks(table: Table) -> None:
    first, second, _ = table.spec.stewards
    table.run()
    table.stop(second)
    (answer,) = table.told(Answer)
    assert isinstance(answer, Answer)
    assert answer.code == "elsewhere"
    assert table.register(first).stop is None
    table.stop(first)
    assert table.register(second).state is JobState.CANCELLING


def test_stop_makes_the_next_take_over_at_once_where_the_first_is_away(table: Table) -> None:
    first, second, third = table.spec.stewards
    table.run()
    table.leave(first)
    table.stop(second)
    assert [answer.code for answer in table.told(Answer) if isinstance(answer, Answer)] == [""]
    assert table.register(third).state is JobState.CANCELLING


def test_stop_is_not_answered_while_too_few_are_there(table: Table) -> None:
    first, second, third = table.spec.stewards
    table.run()
    table.leave(second, third)
    table.stop(first)
    table.wait(10.0)
    assert table.told(Answer) == []


def test_stop_that_was_told_to_be_impossible_does_not_happen_later(table: Table) -> None:
    first, second, third = table.spec.stewards
    table.run()
    table.leave(first, third)
    table.stop(second)
    table.wait(10.0)
    table.come_back(third)
    table.wait(3.0)
    assert second in table.speakers()
    assert table.register(second).stop is None


# -- what others may not do --------------------------------------------------------------------------------------------


def test_who_does_not_hold_the_job_cannot_change_it(table: Table) -> None:
    table.run()
    first = table.spec.stewards[0]
    before = table.disks[first]
    ballot = replace(before.register.stamp.ballot, round=9, steward=table.runner)
    stranger = table.runner
    table.hear(first, stranger, Prepare(table.spec.job, ballot, table.signed))
    forged = replace(before.register, state=JobState.FAILED, stamp=replace(before.register.stamp, ballot=ballot))
    table.hear(first, stranger, Accept(table.spec.job, Standing(forged), table.signed))
    assert table.disks[first] == before
    assert table.speakers() == [first]


def test_steward_cannot_ask_in_the_name_of_another(table: Table) -> None:
    table.run()
    first, second, third = table.spec.stewards
    ballot = replace(table.disks[first].register.stamp.ballot, round=9, steward=third)
    table.hear(first, second, Prepare(table.spec.job, ballot, table.signed))
    assert table.speakers() == [first]


def test_job_that_may_have_been_forgotten_is_not_brought_back(table: Table) -> None:
    table.run()
    first, second, third = table.spec.stewards
    table.leave(first)
    for steward in (second, third):
        del table.disks[steward]
    table.now_s = TIMING.retention_s + 10.0
    for steward in (second, third):
        table.start(steward)
    table.come_back(first)
    table.wait(20.0)
    assert all(table.register(steward).state is JobState.DRAFT for steward in (second, third))
    assert table.told(ReportAck) == []


def test_final_register_is_proposed_no_change(table: Table) -> None:
    table.run()
    first = table.spec.stewards[0]
    table.report(first, result=EXITED)
    job = table.seats[first]._find(table.spec.job)
    assert job is not None
    with pytest.raises(BrokenInvariant):
        job.change(table.now, state=JobState.QUEUED)


def test_each_steward_keeps_what_the_attempt_of_the_register_prints(table: Table) -> None:
    table.submit()
    table.run()
    job = table.spec.job
    for seat in table.seats.values():
        assert seat.tail(job) is None
        for node, epoch, start in ((table.runner, 1, 0), (table.spec.stewards[0], 1, 3), (table.runner, 2, 3)):
            seat.printed(node, AttemptOutput(job, epoch, LogChunk(start, start + 3, b"abc")))
        assert seat.tail(job) == LogChunk(0, 3, b"abc")
        for size, end in ((4 * TAIL_BYTES, 9), (3, 3)):
            chunk = LogChunk(3, end, b"x" * size)
            assert isinstance(seat.printed(table.runner, AttemptOutput(job, 1, chunk))[0], Reject)
        assert seat.tail(job) == LogChunk(0, 3, b"abc")


def test_output_that_stewards_keep_is_bounded(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    table.submit()
    table.run()
    monkeypatch.setattr(steward_module, "TAILS_LIMIT", 0)
    seat = table.seats[table.spec.stewards[0]]
    seat.printed(table.runner, AttemptOutput(table.spec.job, 1, LogChunk(0, 3, b"abc")))
    assert seat.tail(table.spec.job) is None
