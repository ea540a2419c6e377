"""The checker bites: bugs planted in the core are found within a few seeds."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import pytest

from meshgpu.core.audit import AuditChain
from meshgpu.core.effects import Effect, Persist, Send
from meshgpu.core.jobs import attempts as attempts_module
from meshgpu.core.jobs import steward, sweeps
from meshgpu.core.jobs.attempt import Attempt
from meshgpu.core.jobs.attempts import Attempts
from meshgpu.core.jobs.held_job import HeldJob
from meshgpu.core.jobs.placement import Room, find_room
from meshgpu.core.jobs.replica import Replica
from meshgpu.core.jobs.steward import Stewardship
from meshgpu.core.jobs.submission import Submissions
from meshgpu.core.jobs.turns import Turns
from meshgpu.core.membership.gossip import Gossip, _Owner
from meshgpu.core.membership.links import Links
from meshgpu.core.node import Node
from meshgpu.core.owner import Owner, Permission
from meshgpu.core.sweep import expand
from meshgpu.core.trust.freshness import Challenges, Obeyed
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import RequestRules
from meshgpu.errors import BrokenInvariant
from meshgpu.model.audit import AuditEvent
from meshgpu.model.clock import Now
from meshgpu.model.gossip import Allocation, GossipEntry
from meshgpu.model.ids import JobId, NodeId
from meshgpu.model.job import NO_STAMP, AttemptState, Ballot, JobRequest, JobState, Register, Result, Stamp, Standing
from meshgpu.model.messages import Accept, Activate, AttemptReport, CommitAnswer, ReportAck, SubmitAnswer
from meshgpu.model.receipt import Evidence, Receipt
from meshgpu.model.records import JobRecord
from meshgpu.model.sweep import Trial
from meshgpu.model.trust import Role, Signed
from meshgpu.sim.fakes import ToyNotary
from meshgpu.sim.invariants import Invariants
from meshgpu.sim.scenario import INSTANCES, OWNERS, REKEYS, SWEEPS, WRONG_CLOCKS, Scenario, simulate
from meshgpu.sim.world import WorldConfig
from tests.sim.test_seeds import check_wrong_clocks

SEEDS = 120

Plant = Callable[[pytest.MonkeyPatch], None]


def find(pattern: str, seeds: int = SEEDS, scenario: Scenario | None = None) -> int:
    """The first seed whose world breaks an invariant, with a message that fits `pattern`."""
    for seed in range(seeds):
        try:
            simulate(seed, scenario)
        except (BrokenInvariant, AssertionError) as error:
            with pytest.raises(type(error), match=pattern):
                raise
            return seed
    pytest.fail(f"no world of {seeds} noticed the planted bug")


def test_node_that_grants_one_gpu_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(*args: object) -> Room:
        resources, inventory, readings, _ = args
        return find_room(resources, inventory, readings, ())  # type: ignore[arg-type]  # the arguments of find_room

    monkeypatch.setattr(attempts_module, "find_room", careless)
    find("promises .* twice|promises more")


def test_node_that_forgets_what_its_running_jobs_use_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attempt, "occupies", property(lambda self: self.state is AttemptState.HELD))
    find("runs jobs on .* twice|more memory|allocations|lives|still")


@pytest.mark.slow
def test_steward_that_requeues_an_active_job_by_timeout_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stewardship.step

    def impatient(self: Stewardship, now: Now) -> list[Effect]:
        effects: list[Effect] = []
        for job in list(self._jobs.values()):
            if job.register.state is JobState.ACTIVE and job.due is not None and now.boot_s >= job.due:
                effects += self._requeue(now, job, "silent for too long")
        return effects + original(self, now)

    monkeypatch.setattr(Stewardship, "step", impatient)
    find("placed again while it lives|lives twice|cancelled|while it lives|delivered")


def test_node_that_starts_before_it_is_activated_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Attempts.committed

    def eager(self: Attempts, now: Now, steward: object, commit: object) -> list[Effect]:
        effects = original(self, now, steward, commit)  # type: ignore[arg-type]  # the arguments of committed
        accepted = [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, CommitAnswer)]
        if accepted and accepted[0].accepted:
            answer = accepted[0]
            effects += self.activated(now, steward, Activate(answer.job, answer.epoch))  # type: ignore[arg-type]
        return effects

    monkeypatch.setattr(Attempts, "committed", eager)
    find("starts on .* but the register is|first written as")


def test_steward_that_confirms_before_it_persists_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stewardship.submitted

    def hasty(self: Stewardship, now: Now, peer: object, submit: object) -> list[Effect]:
        effects = original(self, now, peer, submit)  # type: ignore[arg-type]  # the arguments of submitted
        answered = any(isinstance(effect, Send) for effect in effects)
        return effects if answered else [*effects, Send(peer, SubmitAnswer(submit.job, held=True))]  # type: ignore[attr-defined, arg-type]

    monkeypatch.setattr(Stewardship, "submitted", hasty)
    find("was confirmed, but")


def test_driver_that_sends_before_it_persists_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Node.step

    def reversed_order(self: Node, now: Now, event: object) -> list[Effect]:
        return original(self, now, event)[::-1]  # type: ignore[arg-type]  # the arguments of step

    monkeypatch.setattr(Node, "step", reversed_order)
    find("orders a Persist after another effect")


def test_steward_that_forgets_to_persist_placing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stewardship._place

    def forgetful(self: Stewardship, now: Now, job: HeldJob) -> list[Effect]:
        return [effect for effect in original(self, now, job) if not isinstance(effect, Persist)]

    monkeypatch.setattr(Stewardship, "_place", forgetful)
    find("before its stewards wrote it down|epochs of .* jump")


def test_steward_that_acknowledges_what_it_did_not_write_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Turns.accept

    def forgetful(self: Turns, job: HeldJob, peer: NodeId, accept: Accept) -> list[Effect]:
        return [effect for effect in original(self, job, peer, accept) if not isinstance(effect, Persist)]

    monkeypatch.setattr(Turns, "accept", forgetful)
    find("was confirmed, but|before its stewards wrote it down|starts on")


def test_steward_that_acts_before_its_change_is_chosen_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeldJob, "after", lambda _self, *effects: list(effects))
    find("was confirmed, but|before its stewards wrote it down|starts on|counts as delivered")


def test_steward_that_takes_the_turn_without_a_quorum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replica, "quorum", property(lambda _self: 1))
    find(
        "two registers|epochs of|before its stewards|starts on|was confirmed|while it lives|lives twice|final register"
    )


def test_steward_that_goes_on_from_its_own_register_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Replica.answered

    def stubborn(
        self: Replica[Standing], who: NodeId, ballot: Ballot, promised: Ballot, stamp: Stamp, value: Standing | None
    ) -> bool:
        known = (stamp, value) if who == self.me else (NO_STAMP, None)
        return original(self, who, ballot, promised, *known)

    monkeypatch.setattr(Replica, "answered", stubborn)
    find("epochs of|starts on|was confirmed|while it lives|lives twice|final register|not at rest|first register|back")


def test_steward_that_forgets_what_it_promised_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steward, "replica_of", lambda _record, me, stewards: Replica(me, stewards))
    find("goes back|two registers|epochs of|first register|lives twice")


def test_job_whose_first_steward_alone_may_speak_for_it_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turns, "is_first", lambda _self, job: job.rank == 0)
    find("nobody speaks for|not at rest|has yet to tell")


def test_steward_that_reuses_an_epoch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stewardship._requeue

    def thrifty(self: Stewardship, now: Now, job: object, *args: Any, **how: Any) -> list[Effect]:
        effects = original(self, now, job, *args, **how)  # type: ignore[arg-type]
        register: Register = job.register  # type: ignore[attr-defined]
        job.register = replace(register, epoch=register.epoch - 1)  # type: ignore[attr-defined]
        return effects

    monkeypatch.setattr(Stewardship, "_requeue", thrifty)
    find("accepted again|epochs of .* jump|starts on|not at rest")


def test_steward_that_acknowledges_a_result_it_does_not_keep_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stewardship.reported

    def rash(self: Stewardship, now: Now, node: object, report: object) -> list[Effect]:
        if report.result is not None:  # type: ignore[attr-defined]
            return [Send(node, ReportAck(report.job, report.epoch))]  # type: ignore[arg-type, attr-defined]
        return original(self, now, node, report)  # type: ignore[arg-type]

    monkeypatch.setattr(Stewardship, "reported", rash)
    find("counts as delivered")


def test_node_that_lets_everybody_in_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def welcoming(*_args: object) -> Permission:
        return Permission()

    monkeypatch.setattr(attempts_module, "permission", welcoming)
    monkeypatch.setattr("meshgpu.core.node.permission", welcoming)
    find("runs on .* fenced")


def test_node_that_forgets_its_allocations_on_restart_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Attempts.restore

    def amnesiac(self: Attempts, now: Now, records: object) -> list[Effect]:
        return original(self, now, ())

    monkeypatch.setattr(Attempts, "restore", amnesiac)
    find("twice|more|not at rest|accepted again|goes back|first written|while it lives")


@pytest.mark.slow
def test_node_that_asks_a_stubborn_job_only_once_to_leave_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts_module, "GRACE_S", 1e9)
    find("whose owner waits for it", scenario=OWNERS)


def test_node_that_sees_owners_where_none_are_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Owner, "takes_back", lambda *_args: "somebody coughed")
    find("its owner never wanted the GPU|not at rest", scenario=OWNERS)


def test_steward_that_takes_a_preempted_job_for_a_finished_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Attempts.finished

    def forgetful(
        self: Attempts, now: Now, job: JobId, epoch: int, ended: float, result: Result, evidence: Evidence
    ) -> list[Effect]:
        effects = original(self, now, job, epoch, ended, result, evidence)
        for attempt in (self._live.get((job, epoch)),):
            if attempt is not None and attempt.result is not None and attempt.preempted:
                attempt.result = replace(attempt.result, outcome=AttemptState.EXITED, reason=result.reason)
                return [attempt.persist(), self._report(attempt)]
        return effects

    monkeypatch.setattr(Attempts, "finished", forgetful)
    find("was sent away, but is recorded as", scenario=OWNERS)


def test_steward_that_begins_all_trials_at_once_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(sweep: HeldJob, trials: Collection[HeldJob]) -> list[Trial]:
        assert sweep.spec.sweep is not None
        return [expand(sweep.spec.sweep, n) for n in range(len(trials) + 1, sweep.spec.sweep.trials + 1)]

    monkeypatch.setattr(sweeps, "beginning", hasty)
    find("begins beside", scenario=SWEEPS)


def test_steward_that_ends_a_sweep_before_its_trials_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "ending", lambda _sweep, _trials: (JobState.SUCCEEDED, ""))
    find("but of its trials", scenario=SWEEPS)


def test_steward_that_forgets_its_sweeps_at_restart_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stewardship.restore

    def forgetful(self: Stewardship, now: Now, records: Iterable[JobRecord]) -> list[Effect]:
        effects = original(self, now, records)
        self._trials.clear()
        return effects

    monkeypatch.setattr(Stewardship, "restore", forgetful)
    find("epochs of .* jump|begins beside|not at rest|the final register of|goes back", scenario=SWEEPS)


def test_instance_that_takes_any_job_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("attempts", "placement"):
        monkeypatch.setattr(f"meshgpu.core.jobs.{module}.out_of_bounds", lambda *_args, **_facts: "")
    monkeypatch.setattr("meshgpu.core.node.out_of_bounds", lambda *_args, **_facts: "")
    find("may not leave the office", scenario=INSTANCES)


def test_machine_that_tells_an_instance_about_the_office_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gossip, "_is_of_office", lambda *_args: True)
    find("tells an instance about the office", scenario=INSTANCES)


def test_instance_that_dials_into_the_office_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Links, "_role", lambda *_args: Role.RIG)
    monkeypatch.setattr(Gossip, "_is_of_office", lambda *_args: True)
    monkeypatch.setattr(Invariants, "_check_told", lambda *_args: None)
    find("is rented and orders Dial", scenario=INSTANCES)


def test_steward_that_waits_for_an_instance_that_is_gone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stewardship, "node_gone", lambda *_args: [])
    find("not at rest", scenario=INSTANCES)


# -- when machines take new keys ---------------------------------------------------------------------------------------


SNAPPING = replace(REKEYS, faults=replace(REKEYS.faults, snips=0.3))
"""Links break so often that many an acknowledgement is lost."""


def test_node_that_tells_only_the_id_its_steward_had_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attempts, "_report", lambda _self, attempt: Send(attempt.steward, attempt.report()))
    monkeypatch.setattr(
        Attempts, "_tell_all", lambda _self, attempt, told: [Send(node, told) for node in attempt.spec.stewards]
    )
    find("has yet to tell", scenario=SNAPPING)


def test_node_that_hears_only_the_id_its_steward_had_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attempts, "_holds", lambda _self, node, spec: node in spec.stewards)
    find("has yet to tell|not at rest", scenario=SNAPPING)


def test_node_that_takes_new_keys_whatever_runs_or_is_held_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Node, "_check_may_rekey", lambda _self: None)
    find("gives up its keys while", scenario=REKEYS)


def test_node_that_takes_new_keys_before_its_results_are_heard_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attempts, "_is_heard", lambda _self, _attempt: False)
    find("gives up its keys while|has yet to tell", scenario=REKEYS)


def test_mesh_in_which_keys_that_were_given_up_stay_members_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = MeshLog._place

    def lenient(self: MeshLog, *args: Any) -> None:
        original(self, *args)
        self.members |= {node: self.former[node] for node in self.heirs}

    monkeypatch.setattr(MeshLog, "_place", lenient)
    find("counts .* twice|has new keys, and wrote|no member under its new ones", scenario=REKEYS)


def test_machine_that_forgets_its_next_keys_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshgpu.sim.machine.is_said", lambda *_args: False)
    find("not at rest", scenario=REKEYS)


def test_office_in_which_nobody_brings_the_word_of_new_keys_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the old keys, for."""
    monkeypatch.setattr("meshgpu.sim.network.Network.errand", lambda *_args: None)
    find("no Link between|knows .* as None|not at rest", scenario=REKEYS)


def test_node_that_believes_records_under_keys_that_were_given_up_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def accepted(self: Gossip, now: Now, signed: Signed) -> bool:
        log = self._log
        node = NodeId(signed.key)
        if node in log.heirs:
            entry = self._notary.read(signed, log.former[node].public_key, GossipEntry)
            self._owners[entry.owner] = owner = _Owner(entry.incarnation)
            owner.put(now, entry, signed)
            return True
        return original(self, now, signed)

    original = Gossip._accept
    monkeypatch.setattr(Gossip, "_accept", accepted)
    find("what it never said", scenario=replace(REKEYS, world=replace(REKEYS.world, has_intruder=True)))


def test_steward_that_obeys_keys_that_were_given_up_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestRules, "verify_addressed", lambda self, signed, _peer: self.read_request(signed))
    find(
        "its user did not ask for it|was sent away",
        scenario=replace(REKEYS, world=replace(REKEYS.world, has_intruder=True)),
    )


# -- what an intruder finds --------------------------------------------------------------------------------------------


def find_by_lies(pattern: str) -> int:
    return find(pattern, scenario=Scenario(world=WorldConfig(has_intruder=True)))


def test_node_that_checks_no_signatures_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyNotary, "read", lambda self, signed, _key, kind: self._decode(signed, kind))
    find_by_lies(".")


def test_steward_that_takes_stale_specs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestRules, "_check_fresh", lambda *_args: None)
    find_by_lies("which no user asked for")


@pytest.mark.slow
def test_steward_that_lets_anybody_stop_a_job_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original, begin = RequestRules.verify_addressed, HeldJob.__post_init__

    def obliging(self: RequestRules, signed: Signed, peer: NodeId) -> JobRequest:
        request = original(self, signed, peer)
        found = held.get(request.job or JobId(""))
        return replace(request, user=found.spec.user) if found is not None else request

    held: dict[JobId, HeldJob] = {}
    monkeypatch.setattr(HeldJob, "__post_init__", lambda job: (held.update({job.spec.job: job}), begin(job))[1])
    monkeypatch.setattr(RequestRules, "verify_addressed", obliging)
    find_by_lies("its user did not ask for it")


def test_steward_that_believes_reports_of_any_node_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stewardship.reported

    def gullible(self: Stewardship, now: Now, node: NodeId, report: AttemptReport) -> list[Effect]:
        job = self._jobs.get(report.job)
        return original(self, now, (job.register.node if job else None) or node, report)

    monkeypatch.setattr(Stewardship, "reported", gullible)
    find_by_lies("ended with|while it lives")


def test_node_that_obeys_any_steward_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attempts, "_of_steward", lambda self, _steward, job, epoch: self._live.get((job, epoch)))
    find_by_lies("nobody asked for it|but the register is|counts as delivered")


def test_submitter_that_believes_any_steward_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Submissions.answered

    def credulous(self: Submissions, now: Now, steward: NodeId, answer: SubmitAnswer) -> list[Effect]:
        found = self._open.get(answer.job)
        return original(self, now, found.spec.stewards[0] if found else steward, answer)

    monkeypatch.setattr(Submissions, "answered", credulous)
    find_by_lies("was confirmed, but|rest")


def test_node_that_takes_entries_of_others_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ToyNotary.read

    def trusting(self: ToyNotary, signed: Signed, key: bytes, kind: type[object]) -> object:
        return self._decode(signed, kind) if kind is GossipEntry else original(self, signed, key, kind)

    monkeypatch.setattr(ToyNotary, "read", trusting)
    find_by_lies("what it never said")


def test_steward_that_accepts_any_challenge_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Challenges, "redeem", lambda *_args: True)
    find_by_lies("which no user asked for")


def test_steward_that_takes_the_challenge_of_another_peer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Challenges, now: Now, peer: NodeId, nonce: bytes) -> bool:
        del peer
        return any(nonce in kept and now.boot_s < kept[nonce] for kept in self._open.values())

    monkeypatch.setattr(Challenges, "redeem", careless)
    world = WorldConfig(has_intruder=True, has_wrong_clocks=True)
    find("which no user asked for", scenario=replace(WRONG_CLOCKS, world=world))


def test_steward_that_obeys_a_repeated_stop_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Obeyed, "has", lambda *_args: False)
    find_by_lies("obeys the request .* a second time")


def test_steward_that_forgets_at_restart_what_it_obeyed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Obeyed, "restore", lambda *_args: None)
    find_by_lies("obeys the request .* a second time")


def test_submitter_that_is_not_challenged_cannot_submit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the world with wrong clocks is good for."""
    monkeypatch.setattr(Submissions, "_sign_again", lambda *_args: [])
    with pytest.raises(AssertionError, match="nobody could submit"):
        check_wrong_clocks(1)


def test_machine_that_begins_its_audit_anew_at_restart_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AuditChain, "restore", lambda *_args: [])
    find("cannot trust the audit|its audit")


def test_machine_that_leaves_an_end_out_of_its_audit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = AuditChain.wrote

    def discreet(self: AuditChain, event: AuditEvent, attempt: Attempt, at_wall_s: float) -> list[Effect]:
        return [] if event is AuditEvent.ENDED else original(self, event, attempt, at_wall_s)

    monkeypatch.setattr(AuditChain, "wrote", discreet)
    find("but its audit says")


def test_machine_that_writes_the_audit_after_the_attempt_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another transaction, between which the agent may crash."""
    original, stepped = AuditChain.wrote, Attempts.step
    late: dict[AuditChain, list[Effect]] = {}
    due: dict[AuditChain, list[Effect]] = {}

    def later(self: AuditChain, event: AuditEvent, attempt: Attempt, at_wall_s: float) -> list[Effect]:
        late.setdefault(self, []).extend(original(self, event, attempt, at_wall_s))
        return []

    def step(self: Attempts, now: Now) -> list[Effect]:
        written, due[self.audit] = due.get(self.audit, []), late.pop(self.audit, [])
        return [*written, *stepped(self, now)]

    monkeypatch.setattr(AuditChain, "wrote", later)
    monkeypatch.setattr(Attempts, "step", step)
    find("cannot trust the audit|but its audit says")


def test_receipt_of_another_attempt_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Attempt.account

    def wrong(self: Attempt, *args: Any) -> Receipt:
        return replace(original(self, *args), epoch=self.epoch + 1)

    monkeypatch.setattr(Attempt, "account", wrong)
    find("without a receipt")


def test_steward_that_keeps_any_receipt_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    test_receipt_of_another_attempt_is_not_kept(monkeypatch)
    monkeypatch.setattr(steward, "check_told", lambda *_args: None)
    find("has the receipt of attempt")


def test_node_that_stops_jobs_which_did_not_agree_to_give_way_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Allocation, "gives_way_to", lambda self, priority: self.priority.rank < priority.rank)
    find("must leave .*, but its owner never wanted the GPU|nobody asked for it")
