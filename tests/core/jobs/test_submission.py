"""From what was typed to a signed job on its steward."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest

from meshgpu.core.effects import Answered, Effect, QueryProgressed, Send
from meshgpu.core.jobs.placement import Candidate, Guest, Rule
from meshgpu.core.jobs.submission import Submissions, SubmissionTiming
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import RequestRules
from meshgpu.core.trust.sealing import binding_of
from meshgpu.model.clock import ClockGap, Now
from meshgpu.model.gossip import Capacity, NodeRecord
from meshgpu.model.ids import KeyId, NodeId, UserName, digest
from meshgpu.model.inventory import Inventory
from meshgpu.model.job import Action, CloudUse, Draft, EnvironmentRequest, JobSpec, SecretBox, SecretWrap
from meshgpu.model.messages import Challenge, Submit, SubmitAnswer
from meshgpu.model.resources import NO_GPU, GpuRequest, Resources, parse_gpus
from meshgpu.model.trust import Role, SetPolicy, SetRole
from meshgpu.sim.office import Office

Clock = Callable[[float], Now]
TIMING = SubmissionTiming()


@dataclass
class Bench:
    """The first machine as the submitter; candidates by name can be changed."""

    office: Office
    log: MeshLog
    at: Clock
    candidates: dict[str, Candidate] = field(default_factory=dict)
    submissions: Submissions = field(init=False)

    def __post_init__(self) -> None:
        for setup in self.office.setups:
            record = NodeRecord("1", (), setup.inventory)
            self.candidates[setup.name] = Candidate(setup.node, setup.name, record, Capacity((), ()))
        self.submissions = Submissions(
            self.office.setups[0].node, self.log, self.office.notaries[0], random.Random(1), self.look, TIMING
        )

    def look(self, guest: Guest, machine: NodeId | None) -> list[Candidate]:
        return [c for c in self.candidates.values() if machine in (None, c.node)]

    def change(self, *names: str, **changes: object) -> None:
        for name in names or tuple(self.candidates):
            self.candidates[name] = replace(self.candidates[name], **changes)  # type: ignore[arg-type]

    def laptops(self, *names: str) -> None:
        """They are not meant to stay on."""
        for name in names:
            record = self.candidates[name].record
            assert record is not None
            self.change(name, record=replace(record, may_steward=False))

    def inventory(self, *names: str, gpus: int = 0) -> None:
        for name in names or tuple(self.candidates):
            record = self.candidates[name].record
            assert record is not None
            hardware = Inventory(8, 10**10, self.office.setups[0].inventory.gpus[:gpus])
            self.change(name, record=replace(record, inventory=hardware))

    def ask(
        self, gpus: str | None = None, machine: str = "", key: KeyId | None = None, cloud: CloudUse | None = None
    ) -> list[Effect]:
        resources = None if gpus is None else Resources(parse_gpus(gpus))
        command = ("python", "train.py")
        tree = digest(b"tree")
        draft = Draft(
            "train", command, False, (), EnvironmentRequest(), tree, 1, 1, machine, resources, cpus=2, cloud=cloud
        )
        key = key or self.office.setups[0].accounts[UserName("ada")]
        return self.submissions.asked(self.at(0), "q", key, draft)

    def spec(self, effects: list[Effect]) -> JobSpec:
        (effect,) = effects
        assert isinstance(effect, Send)
        assert isinstance(effect.message, Submit)
        spec = RequestRules(self.office.notaries[1], self.log, effect.peer).verify_spec(effect.message.spec)
        assert effect.peer in spec.stewards
        assert spec.job == effect.message.job
        return spec


@pytest.fixture
def bench(office: Office, log: MeshLog, at: Clock) -> Bench:
    return Bench(office, log, at)


def refusal(effects: list[Effect]) -> Answered:
    (effect,) = effects
    assert isinstance(effect, Answered)
    assert effect.code
    return effect


# -- resolving ---------------------------------------------------------------------------------------------------------


def test_named_machine_holds_and_runs_the_job(bench: Bench) -> None:
    bench.laptops("rig1", "rig3")
    spec = bench.spec(bench.ask(machine="rig2"))
    assert spec.machine == bench.office.setups[2].node
    assert spec.stewards == (bench.office.setups[2].node,)


def test_three_rigs_hold_the_job_and_all_rigs_do_so_alike(bench: Bench) -> None:
    held = [bench.spec(bench.ask(machine="rig2")[:1]).stewards for _ in range(100)]
    assert all(len(set(stewards)) == 3 for stewards in held)
    first = [sum(stewards[0] == setup.node for stewards in held) for setup in bench.office.setups]
    assert min(first) > 10  # of 25 that each would have


def test_rig_that_does_not_answer_is_not_asked_to_hold_a_job(bench: Bench) -> None:
    bench.change("rig1", rule=Rule.DOWN, refusal="does not answer")
    assert all(bench.office.setups[1].node not in bench.spec(bench.ask("1")).stewards for _ in range(20))


def test_machine_that_is_not_meant_to_stay_on_holds_nothing(bench: Bench) -> None:
    bench.laptops("rig2")
    spec = bench.spec(bench.ask(machine="rig2"))
    assert spec.machine == bench.office.setups[2].node
    assert bench.office.setups[2].node not in spec.stewards


def test_job_without_a_machine_is_held_where_it_would_run(bench: Bench) -> None:
    bench.laptops("rig0", "rig1")
    bench.inventory("rig0", "rig1", "rig3")
    assert bench.spec(bench.ask("1")).stewards == (bench.office.setups[2].node,)


def test_job_is_held_elsewhere_when_there_is_no_room(bench: Bench) -> None:
    bench.laptops("rig1", "rig2")
    bench.change(capacity=None)
    assert bench.spec(bench.ask("1")).stewards == (bench.office.setups[3].node,)


def test_last_resort_is_to_hold_it_oneself(bench: Bench) -> None:
    bench.change("rig1", "rig2", "rig3", rule=Rule.DOWN, refusal="does not answer")
    bench.change("rig0", capacity=None)
    effects = bench.ask("1")
    assert isinstance(effects[0], Send)
    assert effects[0].peer == bench.office.setups[0].node


def test_unknown_machine_is_refused_with_the_nearest_name(bench: Bench) -> None:
    answer = refusal(bench.ask(machine="rgi2"))
    assert answer.code == "unknown-machine"
    assert answer.hint == "did you mean -m rig2?"
    assert refusal(bench.ask(machine="zzzzzzz")).hint == "the machines are: rig0, rig1, rig2, rig3"


def test_without_g_a_machine_with_a_gpu_gives_one_whole(bench: Bench) -> None:
    spec = bench.spec(bench.ask(machine="rig2"))
    assert spec.resources == Resources(GpuRequest(1), 2)


def test_without_g_a_machine_without_gpus_gives_none(bench: Bench) -> None:
    bench.inventory("rig2")
    assert bench.spec(bench.ask(machine="rig2")).resources.gpus == NO_GPU
    assert bench.spec(bench.ask()).resources.gpus == GpuRequest(1)
    bench.inventory()
    assert bench.spec(bench.ask()).resources.gpus == NO_GPU


def test_request_that_no_machine_can_ever_satisfy_is_refused_now(bench: Bench) -> None:
    answer = refusal(bench.ask("h100"))
    assert answer.code == "impossible"
    assert "cannot run anywhere" in answer.reason
    assert "h100:1" in answer.reason
    assert "RTX 4090 24 GB" in answer.reason


def test_request_that_only_has_to_wait_is_not_refused(bench: Bench) -> None:
    bench.change(rule=Rule.DOWN, refusal="does not answer")
    assert isinstance(bench.ask("1")[0], Send)


def test_request_that_the_named_machine_cannot_satisfy_is_refused(bench: Bench) -> None:
    answer = refusal(bench.ask("2", machine="rig2"))
    assert answer.reason == "cannot run on rig2: it has RTX 4090 24 GB; the job asks for 2"


def test_machine_that_is_closed_to_the_user_is_refused(bench: Bench) -> None:
    bench.change(rule=Rule.CLOSED, refusal="lends nothing at the moment")
    assert refusal(bench.ask("1", machine="rig2")).reason == "cannot run on rig2: it lends nothing at the moment"
    assert refusal(bench.ask("1")).code == "impossible"


def test_machine_that_has_said_nothing_yet_may_turn_out_to_fit(bench: Bench) -> None:
    bench.change(record=None, capacity=None)
    assert isinstance(bench.ask("h100")[0], Send)


def test_account_of_no_user_submits_nothing(bench: Bench) -> None:
    assert refusal(bench.ask(key=KeyId("x" * 52))).code == "not-allowed"


# -- on the way --------------------------------------------------------------------------------------------------------


def test_id_is_told_only_when_the_steward_holds_the_job(bench: Bench) -> None:
    spec = bench.spec(bench.ask("1"))
    steward = spec.stewards[0]
    assert bench.submissions.answered(bench.at(1), steward, SubmitAnswer(spec.job, held=False)) == []
    (answer,) = bench.submissions.answered(bench.at(2), steward, SubmitAnswer(spec.job, held=True))
    assert isinstance(answer, Answered)
    assert [view.spec for view in answer.views] == [spec]
    assert bench.submissions.deadline() is None


def test_confirmation_of_another_machine_counts_for_nothing(bench: Bench) -> None:
    spec = bench.spec(bench.ask("1"))
    other = next(setup.node for setup in bench.office.setups if setup.node not in spec.stewards)
    assert bench.submissions.answered(bench.at(1), other, SubmitAnswer(spec.job, held=True)) == []
    assert bench.submissions.tree_for(spec.job, other) is None
    assert bench.submissions.tree_for(spec.job, spec.stewards[0]) == spec.tree


def test_spec_is_sent_again_unchanged_until_it_is_answered(bench: Bench) -> None:
    (first,) = bench.ask("1")
    assert isinstance(first, Send)
    stewards = bench.spec([first]).stewards
    repeated = [effects[0] for tick in range(1, 9) if (effects := bench.submissions.step(bench.at(tick)))]
    assert repeated == [replace(first, peer=stewards[turn % 3]) for turn in (1, 2, 3, 4)]  # whoever speaks by now


def test_silent_steward_is_told_to_the_user(bench: Bench) -> None:
    spec = bench.spec(bench.ask("1"))
    (answer,) = bench.submissions.step(bench.at(TIMING.patience_s))
    assert refusal([answer]).code == "no-answer"
    assert bench.submissions.answered(bench.at(11), spec.stewards[0], SubmitAnswer(spec.job, held=True)) == []


def test_tree_that_is_on_its_way_buys_patience(bench: Bench) -> None:
    spec = bench.spec(bench.ask("1"))
    effects = bench.submissions.answered(bench.at(9), spec.stewards[0], SubmitAnswer(spec.job, False, 1, 2))
    assert effects == [QueryProgressed("q", 1, 2)]
    assert not any(isinstance(e, Answered) for e in bench.submissions.step(bench.at(15)))
    assert any(isinstance(e, Answered) for e in bench.submissions.step(bench.at(9 + TIMING.patience_s)))


def test_refusal_of_the_steward_ends_the_submission(bench: Bench) -> None:
    spec = bench.spec(bench.ask("1"))
    refused = SubmitAnswer(spec.job, held=False, code="stale", reason="cannot accept a job")
    effects = bench.submissions.answered(bench.at(1), spec.stewards[0], refused)
    assert refusal(effects).code == "stale"
    assert bench.submissions.step(bench.at(60)) == []


def test_refusal_of_another_than_the_first_counts_only_if_nobody_holds_the_job(bench: Bench) -> None:
    spec = bench.spec(bench.ask("1"))
    refused = SubmitAnswer(spec.job, held=False, code="too-many-jobs", reason="cannot hold a job")
    assert bench.submissions.answered(bench.at(1), spec.stewards[1], refused) == []
    (answer,) = bench.submissions.step(bench.at(TIMING.patience_s))
    assert refusal([answer]).code == "too-many-jobs"


def test_link_to_the_steward_makes_it_send_at_once(bench: Bench) -> None:
    spec = bench.spec(bench.ask("1"))
    bench.submissions.steward_linked(bench.at(0.3), spec.stewards[0])
    assert bench.submissions.deadline() == 0.3


# -- leaving the office ------------------------------------------------------------------------------------------------


def let_leave(bench: Bench) -> None:
    """The mesh's policy lets jobs leave, and one machine may rent."""
    admin = bench.office.setups[0].accounts[UserName("ada")]
    granted = bench.log.write(admin, [SetPolicy(may_leave=True), SetRole(bench.office.setups[1].node, Role.BURST)])
    bench.log.add(granted)


@pytest.mark.parametrize("wish", [CloudUse.OK, CloudUse.ONLY])
def test_no_job_leaves_where_the_mesh_does_not_say_so(bench: Bench, wish: CloudUse) -> None:
    refused = refusal(bench.ask("1", cloud=wish))
    assert refused.code == "not-allowed"
    assert refused.hint == "meshgpu burst setup"


def test_job_may_leave_where_the_mesh_says_so_unless_its_user_does_not(bench: Bench) -> None:
    let_leave(bench)
    for wish, use in ((None, CloudUse.OK), (CloudUse.NEVER, CloudUse.NEVER), (CloudUse.ONLY, CloudUse.ONLY)):
        bench.ask("1", cloud=wish)
        assert list(bench.submissions._open.values())[-1].spec.cloud is use


def test_what_no_machine_of_the_office_has_may_be_rented(bench: Bench) -> None:
    assert refusal(bench.ask("8")).code == "impossible"
    let_leave(bench)
    assert isinstance(bench.ask("8")[0], Send)
    assert refusal(bench.ask("8", cloud=CloudUse.NEVER)).code == "impossible"


# -- secrets -----------------------------------------------------------------------------------------------------------


@dataclass
class Sealer:
    """Takes down what was to be sealed to whom."""

    asked: list[tuple[str, bytes, tuple[str, ...], dict[NodeId, bytes]]] = field(default_factory=list)

    def seal(self, query: str, bound_to: bytes, names: tuple[str, ...], keys: Mapping[NodeId, bytes]) -> SecretBox:
        self.asked.append((query, bound_to, names, dict(keys)))
        return SecretBox(names, b"ciphertext", tuple(SecretWrap(node, b"e" * 32, b"w" * 48) for node in keys))


@pytest.fixture
def sealer(bench: Bench) -> Sealer:
    """The bench, with secrets: all of its machines have a sealing key."""
    sealer = Sealer()
    bench.submissions = Submissions(
        bench.office.setups[0].node,
        bench.log,
        bench.office.notaries[0],
        random.Random(1),
        bench.look,
        TIMING,
        sealer.seal,
    )
    for name, candidate in bench.candidates.items():
        assert candidate.record is not None
        bench.change(name, record=replace(candidate.record, sealing_key=name.encode().ljust(32, b".")))
    return sealer


def ask_with(bench: Bench, *secrets: str, **changes: object) -> list[Effect]:
    draft = Draft("train", ("python", "train.py"), False, (), EnvironmentRequest(), digest(b"tree"), 1, 1, "", None)
    draft = replace(draft, secrets=secrets, **changes)  # type: ignore[arg-type]  # names and types are Draft's
    return bench.submissions.asked(bench.at(0), "q", bench.office.setups[0].accounts[UserName("ada")], draft)


def nodes(bench: Bench, *numbers: int) -> set[NodeId]:
    return {bench.office.setups[number].node for number in numbers}


def test_secrets_are_sealed_to_every_machine_that_may_run_the_job(bench: Bench, sealer: Sealer) -> None:
    bench.change("rig1", rule=Rule.CLOSED, refusal="lends to its owner only")
    bench.change("rig2", rule=Rule.DOWN, refusal="does not answer")
    spec = bench.spec(ask_with(bench, "TOKEN", "KEY"))
    ((query, bound_to, names, keys),) = sealer.asked
    assert (query, names, set(keys)) == ("q", ("TOKEN", "KEY"), nodes(bench, 0, 2, 3))
    assert spec.secrets is not None
    assert bound_to == binding_of(spec, bench.office.setups[0].accounts[UserName("ada")])


def test_secrets_are_sealed_to_the_named_machine_alone(bench: Bench, sealer: Sealer) -> None:
    spec = bench.spec(ask_with(bench, "TOKEN", machine="rig2"))
    assert spec.secrets is not None
    assert {wrap.node for wrap in spec.secrets.wraps} == nodes(bench, 2)


def test_named_machine_that_cannot_take_secrets_is_refused(bench: Bench, sealer: Sealer) -> None:
    record = bench.candidates["rig2"].record
    assert record is not None
    bench.change("rig2", record=replace(record, sealing_key=b""))
    refused = refusal(ask_with(bench, "TOKEN", machine="rig2"))
    assert refused.code == "no-sealing-key"
    assert "cannot pass secrets to rig2" in refused.reason
    spec = bench.spec(ask_with(bench, "TOKEN"))
    assert spec.secrets is not None
    assert {wrap.node for wrap in spec.secrets.wraps} == nodes(bench, 0, 1, 3)


@pytest.mark.parametrize(
    ("secrets", "changes", "code"),
    [
        (("A",) * 2, {}, "bad-request"),
        (("A",), {"env": (("A", "1"),)}, "bad-request"),
        (("A-B",), {}, "bad-request"),
        (("MESHGPU_JOB_ID",), {}, "bad-request"),
        (tuple(f"A{n}" for n in range(65)), {}, "too-large"),
        (("A",), {"cloud": CloudUse.ONLY}, "impossible"),
    ],
)
def test_secrets_that_no_job_can_have_are_refused(
    bench: Bench, sealer: Sealer, secrets: tuple[str, ...], changes: dict[str, object], code: str
) -> None:
    assert refusal(ask_with(bench, *secrets, **changes)).code == code
    assert sealer.asked == []


def test_job_with_secrets_that_fits_no_machine_does_not_wait_for_a_rented_one(bench: Bench, sealer: Sealer) -> None:
    let_leave(bench)
    asked = Resources(parse_gpus("7"))
    assert isinstance(ask_with(bench, resources=asked)[0], Send)
    assert refusal(ask_with(bench, "TOKEN", resources=asked)).code == "impossible"


# -- wrong clocks ------------------------------------------------------------------------------------------------------

NONCE = b"n" * 32


def stale(spec: JobSpec, challenge: Challenge | None) -> SubmitAnswer:
    return SubmitAnswer(spec.job, held=False, code="stale", reason="cannot accept a job", challenge=challenge)


def test_job_that_is_stale_is_signed_again_with_what_the_steward_asked_for(bench: Bench) -> None:
    spec = bench.spec(bench.ask("1"))
    steward, wall_s = spec.stewards[0], bench.at(0).wall_s + 7200
    (again,) = bench.submissions.answered(bench.at(1), steward, stale(spec, Challenge(NONCE, wall_s)))
    assert isinstance(again, Send)
    assert isinstance(again.message, Submit)
    assert bench.spec([again]) == spec
    assert again.message.fresh is not None
    request = RequestRules(bench.office.notaries[1], bench.log, steward).read_request(again.message.fresh)
    assert (request.action, request.job, request.node, request.challenge) == (Action.SUBMIT, spec.job, steward, NONCE)
    resent = [e for n in (1, 2, 3) for e in bench.submissions.step(bench.at(1 + n * TIMING.resend_s))]
    assert again in resent
    assert all(
        isinstance(e, Send) and (e == again or e.message == Submit(spec.job, again.message.spec)) for e in resent
    )
    (answer,) = bench.submissions.answered(bench.at(4), steward, SubmitAnswer(spec.job, held=True))
    assert isinstance(answer, Answered)
    assert answer.views[0].spec == spec
    assert answer.clock == ClockGap(steward, 7199.0)


def test_job_is_signed_again_once_and_late_refusals_count_for_nothing(bench: Bench) -> None:
    spec = bench.spec(bench.ask("1"))
    steward = spec.stewards[0]
    assert bench.submissions.answered(bench.at(1), NodeId("x" * 52), stale(spec, Challenge(NONCE, 0.0))) == []
    bench.submissions.answered(bench.at(1), steward, stale(spec, Challenge(NONCE, 0.0)))
    late = stale(spec, Challenge(b"m" * 32, 0.0))  # the answer to a spec that was sent twice before
    assert bench.submissions.answered(bench.at(1.1), steward, late) == []
    for_good = stale(spec, Challenge(b"o" * 32, 0.0, NONCE))
    assert refusal(bench.submissions.answered(bench.at(2), steward, for_good)).code == "stale"
    assert bench.submissions.step(bench.at(60)) == []


@pytest.mark.parametrize("nonce", [b"", b"short", b"l" * 33])
def test_what_is_no_challenge_is_not_signed(bench: Bench, nonce: bytes) -> None:
    spec = bench.spec(bench.ask("1"))
    effects = bench.submissions.answered(bench.at(1), spec.stewards[0], stale(spec, Challenge(nonce, 0.0)))
    assert refusal(effects).code == "stale"
