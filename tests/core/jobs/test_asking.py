"""What users ask of machines that hold their jobs."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from meshgpu.core.effects import Answered, Effect, Send, TellWatchers
from meshgpu.core.jobs.asking import ELSEWHERE, Asking, AskTiming
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import RequestRules
from meshgpu.model.clock import ClockGap, Now
from meshgpu.model.ids import JobId, KeyId, NodeId, UserName, key_id
from meshgpu.model.job import Action, Ballot, JobRequest, JobSpec, JobState, JobView, Phase, Register, Stamp
from meshgpu.model.messages import Answer, Ask, Challenge, JobUpdate, SignedView
from meshgpu.model.trust import LinkUser, Signed
from meshgpu.sim.fakes import ToyNotary
from meshgpu.sim.office import Office

Clock = Callable[[float], Now]
Sign = Callable[..., tuple[JobSpec, Signed]]
TIMING = AskTiming()


@dataclass
class Bench:
    office: Office
    log: MeshLog
    at: Clock
    view: JobView
    told: SignedView
    linked: list[NodeId] = field(default_factory=list)
    asking: Asking = field(init=False)

    def __post_init__(self) -> None:
        me = self.office.setups[1].node
        self.linked = [setup.node for setup in self.office.setups[:3]]
        rules = RequestRules(self.office.notaries[1], self.log, me)
        self.asking = Asking(
            me, self.log, rules, self.office.notaries[1], random.Random(1), lambda: self.linked, TIMING
        )

    @property
    def key(self) -> KeyId:
        return self.office.setups[1].accounts[UserName("ada")]

    @property
    def steward(self) -> NodeId:
        return self.view.spec.stewards[0]

    def request(self, effect: Effect) -> JobRequest:
        assert isinstance(effect, Send)
        assert isinstance(effect.message, Ask)
        user = self.log.users[effect.message.request.key]
        return self.office.notaries[0].read(effect.message.request, user.public_key, JobRequest)


@pytest.fixture
def bench(office: Office, log: MeshLog, at: Clock, signed: Sign) -> Bench:
    spec, envelope = signed()
    register = Register(spec.job, JobState.QUEUED)
    return Bench(office, log, at, JobView(spec, register, signed=envelope), SignedView(envelope, register))


def test_all_live_members_are_asked_each_with_a_request_of_its_own(bench: Bench) -> None:
    effects = bench.asking.list_jobs(bench.at(0), "q", bench.key)
    assert [effect.peer for effect in effects if isinstance(effect, Send)] == bench.linked
    requests = [bench.request(effect) for effect in effects]
    assert [request.node for request in requests] == bench.linked
    assert len({request.nonce for request in requests}) == 3


def test_list_ends_with_the_last_answer_and_names_who_was_not_reached(bench: Bench) -> None:
    bench.asking.list_jobs(bench.at(0), "q", bench.key)
    assert bench.asking.answered(bench.linked[0], Answer("q", (bench.told,))) == []
    assert bench.asking.answered(bench.linked[1], Answer("q", ())) == []
    (answer,) = bench.asking.answered(bench.linked[2], Answer("q", ()))
    assert isinstance(answer, Answered)
    assert answer.views == (bench.view,)
    assert answer.silent == (bench.office.setups[3].node,)


def test_list_does_not_wait_for_slow_members(bench: Bench) -> None:
    bench.asking.list_jobs(bench.at(0), "q", bench.key)
    bench.asking.answered(bench.linked[0], Answer("q", (bench.told,)))
    (answer,) = bench.asking.step(bench.at(TIMING.list_s))
    assert isinstance(answer, Answered)
    assert answer.views == (bench.view,)
    assert set(answer.silent) == {bench.linked[1], bench.linked[2], bench.office.setups[3].node}
    assert bench.asking.answered(bench.linked[1], Answer("q", (bench.told,))) == []


def test_only_stewards_speak_for_a_job(bench: Bench) -> None:
    bench.asking.list_jobs(bench.at(0), "q", bench.key)
    for node in bench.linked[1:]:
        effects = bench.asking.answered(node, Answer("q", (bench.told,)))
    effects += bench.asking.answered(bench.linked[0], Answer("q", ()))
    assert [effect.views for effect in effects if isinstance(effect, Answered)] == [()]


def test_second_answer_of_one_node_counts_for_nothing(bench: Bench) -> None:
    bench.asking.list_jobs(bench.at(0), "q", bench.key)
    bench.asking.answered(bench.linked[0], Answer("q", (bench.told,)))
    assert bench.asking.answered(bench.linked[0], Answer("q", (bench.told,))) == []
    assert bench.asking.answered(NodeId("x" * 52), Answer("q", (bench.told,))) == []


def test_stop_is_asked_of_the_steward_alone(bench: Bench) -> None:
    (effect,) = bench.asking.act(bench.at(0), "q", bench.key, Action.STOP, bench.view.spec.job, (bench.steward,))
    request = bench.request(effect)
    assert (request.action, request.job, request.node) == (Action.STOP, bench.view.spec.job, bench.steward)
    (answer,) = bench.asking.answered(bench.steward, Answer("q", (bench.told,)))
    assert isinstance(answer, Answered)
    assert answer.views == (bench.view,)


def test_refused_stop_says_why(bench: Bench) -> None:
    bench.asking.act(bench.at(0), "q", bench.key, Action.STOP, bench.view.spec.job, (bench.steward,))
    (answer,) = bench.asking.answered(bench.steward, Answer("q", (), "unknown-job", "cannot find that job"))
    assert isinstance(answer, Answered)
    assert (answer.code, answer.reason) == ("unknown-job", "cannot find that job")


def test_silent_steward_is_named(bench: Bench) -> None:
    bench.asking.act(bench.at(0), "q", bench.key, Action.KILL, bench.view.spec.job, (bench.steward,))
    (answer,) = bench.asking.step(bench.at(TIMING.act_s))
    assert isinstance(answer, Answered)
    assert answer.code == "no-answer"
    assert "rig0 did not answer" in answer.reason


def test_steward_outside_the_mesh_is_no_reason_to_fall_over(bench: Bench) -> None:
    stranger = NodeId("x" * 52)
    bench.asking.act(bench.at(0), "q", bench.key, Action.KILL, bench.view.spec.job, (stranger,))
    (answer,) = bench.asking.step(bench.at(TIMING.act_s))
    assert isinstance(answer, Answered)
    assert answer.code == "no-answer"


def test_account_of_no_user_asks_nothing(bench: Bench) -> None:
    (answer,) = bench.asking.list_jobs(bench.at(0), "q", KeyId("x" * 52))
    assert isinstance(answer, Answered)
    assert answer.code == "not-allowed"
    bench.asking.watch(bench.at(0), KeyId("x" * 52), JobId("j"), (bench.steward,))
    assert bench.asking.step(bench.at(0)) == []


def test_watch_is_renewed_until_it_ends(bench: Bench) -> None:
    job = bench.view.spec.job
    bench.asking.watch(bench.at(0), bench.key, job, (bench.steward,))
    asked = [bench.asking.step(bench.at(tick)) for tick in range(21)]
    assert sum(bool(effects) for effects in asked) == 5
    assert bench.request(asked[0][0]).action is Action.WATCH
    bench.asking.unwatch(job)
    assert bench.asking.deadline() is None


def test_watch_is_renewed_at_once_when_the_steward_is_back(bench: Bench) -> None:
    bench.asking.watch(bench.at(0), bench.key, bench.view.spec.job, (bench.steward,))
    bench.asking.step(bench.at(0))
    bench.asking.linked_again(bench.at(1), bench.steward)
    assert bench.asking.deadline() == 1


def test_watchers_believe_only_the_steward(bench: Bench) -> None:
    job = bench.view.spec.job
    register = replace(bench.view.register, stamp=Stamp(Ballot(1, bench.steward), 1))
    bench.asking.watch(bench.at(0), bench.key, job, (bench.steward,))
    assert bench.asking.updated(bench.linked[2], JobUpdate(register)) == []
    assert bench.asking.updated(bench.steward, JobUpdate(register)) == [TellWatchers(register)]
    told = replace(bench.told, register=register)
    assert bench.asking.answered(bench.steward, Answer(f"watch-{job}", (told,))) == [TellWatchers(register)]
    bench.asking.unwatch(job)
    assert bench.asking.updated(bench.steward, JobUpdate(register)) == []


def test_of_three_stewards_the_newest_register_is_told_and_once(bench: Bench) -> None:
    job, stewards = bench.view.spec.job, tuple(bench.linked[:3])
    bench.asking.watch(bench.at(0), bench.key, job, stewards)
    old, new = (
        replace(bench.view.register, stamp=Stamp(Ballot(turn, stewards[turn]), 1), reason=str(turn)) for turn in (0, 1)
    )
    assert bench.asking.updated(stewards[0], JobUpdate(old)) == [TellWatchers(old)]
    assert bench.asking.updated(stewards[1], JobUpdate(new)) == [TellWatchers(new)]
    for steward in (stewards[0], stewards[2]):  # who do not speak for it know less of the same, or it is old
        assert bench.asking.updated(steward, JobUpdate(new)) == []
    assert bench.asking.updated(stewards[0], JobUpdate(old)) == []
    running = replace(new, phase=Phase.RUNNING)
    assert bench.asking.updated(stewards[1], JobUpdate(running)) == [TellWatchers(running)]


def test_stop_is_asked_of_all_stewards_and_again_of_those_that_leave_it_to_another(bench: Bench) -> None:
    stewards = tuple(bench.linked[:3])
    asks = bench.asking.act(bench.at(0), "q", bench.key, Action.STOP, bench.view.spec.job, stewards)
    assert [ask.peer for ask in asks if isinstance(ask, Send)] == list(stewards)
    assert bench.asking.answered(bench.steward, Answer("q", (), ELSEWHERE, "another speaks for it")) == []
    again = bench.asking.step(bench.at(TIMING.again_s))
    assert [ask.peer for ask in again if isinstance(ask, Send)] == [bench.steward]
    (answer,) = bench.asking.answered(bench.steward, Answer("q", (bench.told,)))
    assert isinstance(answer, Answered)
    assert [view.spec for view in answer.views] == [bench.view.spec]


def test_account_that_leaves_the_mesh_while_it_asks_is_told_that_nobody_answered(bench: Bench) -> None:
    bench.asking.act(bench.at(0), "q", bench.key, Action.STOP, bench.view.spec.job, (bench.steward,))
    bench.asking.answered(bench.steward, Answer("q", (), ELSEWHERE, "another speaks for it"))
    bench.log.users.pop(bench.key)
    assert bench.asking.step(bench.at(TIMING.again_s)) == []
    (answer,) = bench.asking.step(bench.at(TIMING.act_s))
    assert isinstance(answer, Answered)
    assert answer.code == "no-answer"


def test_stop_that_nobody_may_obey_says_so(bench: Bench) -> None:
    stewards = tuple(bench.linked[:3])
    bench.asking.act(bench.at(0), "q", bench.key, Action.STOP, bench.view.spec.job, stewards)
    bench.asking.answered(stewards[1], Answer("q", (), ELSEWHERE, "another speaks for it"))
    (answer,) = bench.asking.step(bench.at(TIMING.act_s))
    assert isinstance(answer, Answered)
    assert answer.code == "no-answer"
    assert "too few are there" in answer.reason


def test_job_that_a_steward_invented_is_not_believed(bench: Bench, signed: Sign) -> None:
    """Ada's own key must have signed it: a rig that holds jobs could otherwise show her any result."""
    spec, envelope = signed(name="invented")
    forged = bench.office.ring.forge(bench.key, spec)
    bench.asking.list_jobs(bench.at(0), "q", bench.key)
    for told in (
        SignedView(forged, bench.told.register),
        SignedView(replace(envelope, payload=b""), bench.told.register),
    ):
        bench.asking.answered(bench.linked[0], Answer("q", (told,)))
    (answer,) = bench.asking.step(bench.at(TIMING.list_s))
    assert isinstance(answer, Answered)
    assert answer.views == ()


def test_register_of_another_job_is_not_believed(bench: Bench) -> None:
    bench.asking.list_jobs(bench.at(0), "q", bench.key)
    other = SignedView(bench.told.spec, replace(bench.told.register, job=JobId("b" * 26)))
    bench.asking.answered(bench.linked[0], Answer("q", (other,)))
    (answer,) = bench.asking.step(bench.at(TIMING.list_s))
    assert isinstance(answer, Answered)
    assert answer.views == ()


def test_list_has_what_others_share_and_nothing_else_of_theirs(bench: Bench, signed: Sign) -> None:
    """Ada's jobs, as another user of the mesh is told of them."""
    shared, shared_envelope = signed(2, shared=True)
    public = bench.office.ring.make("eve@rig1")
    eve = LinkUser(UserName("eve"), public, bench.office.setups[1].node, 1666)
    bench.log.add(bench.log.write(bench.office.setups[0].accounts[UserName("ada")], [eve]))
    notary = ToyNotary(bench.office.ring, (public,))
    bench.asking._notary = notary
    bench.linked = [bench.steward]
    bench.asking.list_jobs(bench.at(0), "q", key_id(public))
    told = SignedView(shared_envelope, Register(shared.job, JobState.QUEUED))
    (answer,) = bench.asking.answered(bench.steward, Answer("q", (bench.told, told)))
    assert isinstance(answer, Answered)
    assert [view.spec.job for view in answer.views] == [shared.job]


# -- wrong clocks ------------------------------------------------------------------------------------------------------


def stale(bench: Bench, query: str = "q", nonce: bytes = b"n" * 32, refused: bytes = b"") -> Answer:
    return Answer(query, (), "stale", "cannot accept a request", Challenge(nonce, bench.at(0).wall_s - 7200, refused))


def test_stale_request_is_signed_again_for_the_node_that_refused_it(bench: Bench) -> None:
    first = {r.node: r for r in map(bench.request, bench.asking.list_jobs(bench.at(0), "q", bench.key))}
    (effect,) = bench.asking.answered(bench.linked[0], stale(bench))
    assert bench.request(effect) == replace(first[bench.linked[0]], challenge=b"n" * 32)
    for node in bench.linked[1:]:
        bench.asking.answered(node, Answer("q", ()))
    assert bench.asking.step(bench.at(TIMING.list_s)) == []  # it waits for one more exchange
    (answer,) = bench.asking.answered(bench.linked[0], Answer("q", (bench.told,)))
    assert isinstance(answer, Answered)
    assert answer.views == (bench.view,)
    assert answer.clock is None  # of three clocks one differs: it is not ours that is wrong


@pytest.mark.parametrize(("late", "is_told"), [(1, False), (2, True), (3, True)])
def test_people_are_told_of_their_clock_where_most_others_differ(bench: Bench, late: int, is_told: bool) -> None:
    bench.linked = [setup.node for setup in bench.office.setups]
    others = sorted(set(bench.linked) - {bench.office.setups[1].node})
    bench.asking.list_jobs(bench.at(0), "q", bench.key)
    for node in others[:late]:
        bench.asking.answered(node, stale(bench))
    answers = [bench.asking.answered(node, Answer("q", ())) for node in bench.linked]
    (answer,) = answers[-1]
    assert isinstance(answer, Answered)
    assert answer.clock == (ClockGap(others[0], -7200.0) if is_told else None)


def test_request_is_signed_again_once_and_the_refusal_is_told(bench: Bench) -> None:
    bench.asking.act(bench.at(0), "q", bench.key, Action.STOP, bench.view.spec.job, (bench.steward,))
    assert len(bench.asking.answered(bench.steward, stale(bench))) == 1
    (answer,) = bench.asking.answered(bench.steward, stale(bench, nonce=b"m" * 32, refused=b"n" * 32))
    assert isinstance(answer, Answered)
    assert answer.code == "stale"


def test_node_that_refuses_a_list_is_named(bench: Bench) -> None:
    bench.asking.list_jobs(bench.at(0), "q", bench.key)
    for node in bench.linked[1:]:
        bench.asking.answered(node, Answer("q", ()))
    (answer,) = bench.asking.answered(bench.linked[0], Answer("q", (), "stale", "cannot accept a request"))
    assert isinstance(answer, Answered)
    assert bench.linked[0] in answer.silent


def test_challenge_of_a_node_that_was_not_asked_is_not_signed(bench: Bench) -> None:
    bench.asking.act(bench.at(0), "q", bench.key, Action.STOP, bench.view.spec.job, (bench.steward,))
    for node in (bench.linked[1], NodeId("x" * 52)):
        assert bench.asking.answered(node, stale(bench)) == []
        assert bench.asking.answered(node, stale(bench, f"watch-{bench.view.spec.job}")) == []


def test_watch_goes_on_where_clocks_differ(bench: Bench) -> None:
    job = bench.view.spec.job
    bench.asking.watch(bench.at(0), bench.key, job, (bench.steward,))
    for now_s in (0.0, TIMING.watch_s):  # every renewal is challenged anew
        (effect,) = bench.asking.step(bench.at(now_s))
        asked = bench.request(effect)
        (again,) = bench.asking.answered(bench.steward, stale(bench, f"watch-{job}"))
        assert bench.request(again) == replace(asked, challenge=b"n" * 32)
        assert bench.asking.answered(bench.steward, stale(bench, f"watch-{job}", refused=b"n" * 32)) == []
