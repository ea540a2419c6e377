"""What must hold in every world, at every step. Each rule raises BrokenInvariant with what was seen."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NoReturn

from meshgpu.core import effects as fx
from meshgpu.core.events import Event, MessageArrived, RekeyAsked
from meshgpu.core.jobs.placement import Host, never_fits, out_of_bounds
from meshgpu.core.owner import permission
from meshgpu.core.sweep import expand, trial_spec
from meshgpu.errors import BrokenInvariant
from meshgpu.model.gossip import Allocation, GossipValue, MemberState
from meshgpu.model.ids import GpuId, HoldId, JobId, KeyId, NodeId
from meshgpu.model.job import (
    ATTEMPT_ORDER,
    ENDED_ATTEMPT_STATES,
    NO_BALLOT,
    NO_STAMP,
    AttemptPlan,
    AttemptState,
    Ballot,
    CloudUse,
    JobSpec,
    JobState,
    JobView,
    Register,
    Result,
    Stamp,
    Standing,
)
from meshgpu.model.messages import GossipDelta, GossipDigest
from meshgpu.model.records import AttemptRecord, JobRecord, ObeyedRecord
from meshgpu.model.resources import GpuShare
from meshgpu.sim import evidence
from meshgpu.sim.machine import Machine

STORY_LENGTH: Final = 40
UNSETTLED_STATES: Final = (JobState.PLACING, JobState.ACTIVE, JobState.UNKNOWN, JobState.CANCELLING)
"""States of a register whose epoch may still live somewhere."""
LATE_S: Final = 20.0
"""By how much a job may start or expire too late: what is offered or placed by then may take 15 s to be given up."""
COMMITTED_STATES: Final = (JobState.ACTIVE, JobState.UNKNOWN, JobState.CANCELLING)


@dataclass(slots=True)
class Confirmed:
    """A job whose id was printed."""

    view: JobView


@dataclass(slots=True)
class Ledger:
    """What the world knows and no node does.

    machines: by the id that each has now. ids: by every id that each has or had. submitted: jobs that a user signed.
    said: entries that their owner signed. stops_asked: jobs whose user, or whoever revoked his machine, wants them to
    end. living: where each job may have a process. accepted: {(job, epoch): node and hold}.
    standings: how a job stands by each stamp that a steward wrote, and the names of those that did. chosen: the newest
    that a quorum of its stewards has written.
    preempted: attempts that had to make way for the owner of their machine. stopped: machines that were revoked with
    all their jobs. obeyed: requests to stop, by the name of the machine that obeyed them, key and nonce.
    begun: jobs of which some node has on disk that their command started. activated: epochs that some steward has on
    disk as active.
    """

    machines: dict[NodeId, Machine]
    ids: dict[NodeId, Machine] = field(default_factory=dict)
    confirmed: dict[JobId, Confirmed] = field(default_factory=dict)
    submitted: dict[JobId, JobSpec] = field(default_factory=dict)
    said: dict[NodeId, set[GossipValue | None]] = field(default_factory=dict)
    stops_asked: set[JobId] = field(default_factory=set)
    living: dict[JobId, tuple[NodeId, int]] = field(default_factory=dict)
    accepted: dict[tuple[JobId, int], tuple[NodeId, HoldId]] = field(default_factory=dict)
    standings: dict[tuple[JobId, Stamp], tuple[Standing, set[str]]] = field(default_factory=dict)
    chosen: dict[JobId, Standing] = field(default_factory=dict)
    results: dict[tuple[JobId, int], Result] = field(default_factory=dict)
    preempted: set[tuple[JobId, int]] = field(default_factory=set)
    stopped: set[NodeId] = field(default_factory=set)
    obeyed: set[tuple[str, KeyId, str]] = field(default_factory=set)
    begun: set[JobId] = field(default_factory=set)
    activated: set[tuple[JobId, int]] = field(default_factory=set)
    started: int = 0


class Invariants:
    """The watcher of a world."""

    def __init__(self) -> None:
        self.ledger = Ledger({})
        self._story: deque[str] = deque(maxlen=STORY_LENGTH)
        self._given_up: dict[tuple[str, int], set[NodeId]] = {}
        """{(machine, agent there): ids that it has heard of being given up}"""

    # -- hooks --------------------------------------------------------------------------------------------------------

    def stepped(self, machine: Machine, event: Event | None, effects: list[fx.Effect]) -> None:
        if machine.agent is not None:
            self._check_room(machine, machine.agent.attempts.allocations())
            if isinstance(event, RekeyAsked):
                self._check_new_keys(machine, event.query, effects)
            if any(isinstance(effect, fx.TrustMembers) for effect in effects):
                self._check_members(machine)
        if isinstance(event, MessageArrived) and isinstance(event.message, GossipDelta):
            self._check_heard(machine, event.message)
        is_other = False
        for effect in effects:
            if machine.setup.is_rented and isinstance(effect, fx.Dial | fx.FetchTree | fx.Identify):
                self._fail(f"{machine.setup.name} is rented and orders {effect}")
            if isinstance(effect, fx.Send) and self._is_rented(effect.peer) and effect.peer != machine.node:
                self._check_told(machine, effect.message)
            if not isinstance(effect, fx.Persist):
                is_other = True
            elif is_other:
                self._fail(f"{machine.setup.name} orders a Persist after another effect: {event}")

    def persisting(self, machine: Machine, order: fx.Persist) -> None:
        before = machine.disk.get((order.kind, order.key))
        match order.record:
            case JobRecord() as record:
                self._tell(machine, f"register {_brief(record.register)}")
                self._check_register(machine, before, record)
            case AttemptRecord() as record:
                self._tell(machine, f"attempt {record.job[:5]}/{record.epoch} {record.state}")
                self._check_attempt(machine, before, record)
            case ObeyedRecord() as record:
                self._check_obeyed(machine, record)
            case None if order.kind == "job":
                self._fail(f"{machine.setup.name} forgets the job {order.key}")
            case _:
                pass

    def lives(self, machine: Machine, plan: AttemptPlan) -> None:
        self._tell(machine, f"lives: {plan.spec.job[:5]}/{plan.epoch}")
        where = (machine.node, plan.epoch)
        if plan.spec.job in self.ledger.living:
            self._fail(f"{plan.spec.job} lives twice: {where} and {self.ledger.living[plan.spec.job]}")
        self.ledger.living[plan.spec.job] = where
        self.ledger.started += 1
        self._check_start(machine, plan)

    def over(self, machine: Machine, plan: AttemptPlan, result: Result | None) -> None:
        self._tell(machine, f"is over: {plan.spec.job[:5]}/{plan.epoch} {result or ''}")
        self.ledger.living.pop(plan.spec.job, None)
        if result is not None:
            self.ledger.results[plan.spec.job, plan.epoch] = result

    def answered(self, answer: fx.Answered) -> None:
        for view in answer.views:
            if answer.query.startswith("run"):
                self.ledger.confirmed[view.spec.job] = Confirmed(view)
                self._check_held(view.spec.job)

    def owner_waited(self, machine: Machine, gpu: GpuId) -> None:
        """The owner of `machine` has used the GPU for as long as he may have to wait for it."""
        for plan in machine.executor.living:
            if any(share.uuid == gpu for share in plan.gpus):
                self._fail(f"{plan.spec.job} still uses {gpu} of {machine.setup.name}, whose owner waits for it")

    # -- new keys -----------------------------------------------------------------------------------------------------

    def giving_up_keys(self, machine: Machine) -> None:
        """That a machine goes on under new keys reaches its disk: nothing may be under way by its old id."""
        for record in machine.disk.values():
            if isinstance(record, JobRecord) and not record.register.state.is_final:
                self._fail(f"{machine.setup.name} gives up its keys while it holds {record.register}")
            if isinstance(record, AttemptRecord) and record.state is not AttemptState.DELIVERED:
                self._fail(
                    f"{machine.setup.name} gives up its keys while {record.job}/{record.epoch} is {record.state}"
                )

    def _check_new_keys(self, machine: Machine, query: str, effects: list[fx.Effect]) -> None:
        """A machine that was told to take new keys did, or nothing has changed."""
        assert machine.agent is not None
        (answer,) = [effect for effect in effects if isinstance(effect, fx.Answered) and effect.query == query]
        written = [effect for effect in effects if isinstance(effect, fx.Persist) and effect.kind == "log"]
        is_member = machine.node in machine.agent.log.members
        if answer.code and (written or not is_member):
            self._fail(f"{machine.setup.name} was refused new keys ({answer.reason}), and wrote {written}")
        if not answer.code and (not written or is_member):
            self._fail(f"{machine.setup.name} has new keys, and wrote {written}")

    def _check_members(self, machine: Machine) -> None:
        """Nobody is a member twice, and who went on under another id never is one again under an old one."""
        assert machine.agent is not None
        members = machine.agent.log.members
        names: dict[str, NodeId] = {}
        known = self._given_up.setdefault((machine.setup.name, machine.instance), set())
        for node in members:
            if node in known:
                self._fail(f"{machine.setup.name} believes in {node} again, which was given up")
            name = self.ledger.ids[node].setup.name if node in self.ledger.ids else node
            if name in names:
                self._fail(f"{machine.setup.name} counts {name} twice: as {names[name]} and as {node}")
            names[name] = node
        known.update(machine.agent.log.heirs)

    # -- what is rented -----------------------------------------------------------------------------------------------

    def _is_rented(self, node: NodeId) -> bool:
        return node in self.ledger.machines and self.ledger.machines[node].setup.is_rented

    def _check_told(self, machine: Machine, message: object) -> None:
        """An instance hears nothing of the office but the mesh log."""
        if isinstance(message, GossipDelta) or (isinstance(message, GossipDigest) and len(message.known) > 1):
            self._fail(f"{machine.setup.name} tells an instance about the office: {message}")

    # -- machines -----------------------------------------------------------------------------------------------------

    def _check_heard(self, machine: Machine, delta: GossipDelta) -> None:
        """What is known of a member is what it said itself."""
        if machine.agent is None:
            return
        for owner in {NodeId(signed.key) for signed in delta.entries} & self.ledger.ids.keys():
            for value in machine.heard(owner):
                if value is not None and value not in self.ledger.said[owner]:
                    self._fail(f"{machine.setup.name} believes of {owner} what it never said: {value}")

    def _check_room(self, machine: Machine, allocations: Sequence[Allocation]) -> None:
        if allocations:
            shares = [share for allocation in allocations for share in allocation.gpus]
            self._check_shares(machine, "promises", shares)
            inventory = machine.setup.inventory
            if sum(a.cpus for a in allocations) > inventory.cpus:
                self._fail(f"{machine.setup.name} promises more processors than it has")
            if sum(a.memory_bytes for a in allocations) > inventory.memory_bytes:
                self._fail(f"{machine.setup.name} promises more memory than it has")

    def _check_shares(self, machine: Machine, verb: str, shares: Iterable[GpuShare]) -> None:
        totals = {gpu.uuid: gpu.memory_total_bytes for gpu in machine.setup.inventory.gpus}
        whole: set[GpuId] = set()
        reserved: dict[GpuId, int] = {}
        for share in shares:
            if share.uuid not in totals:
                self._fail(f"{machine.setup.name} {verb} a GPU that it does not have: {share.uuid}")
            if share.uuid in whole or (share.is_whole and share.uuid in reserved):
                self._fail(f"{machine.setup.name} {verb} {share.uuid} twice")
            if share.is_whole:
                whole.add(share.uuid)
            reserved[share.uuid] = reserved.get(share.uuid, 0) + share.memory_bytes
            if reserved[share.uuid] > totals[share.uuid]:
                self._fail(f"{machine.setup.name} {verb} more memory of {share.uuid} than it has")

    def _check_start(self, machine: Machine, plan: AttemptPlan) -> None:
        """An attempt starts where its steward recorded it as active, where its user may, with what it asked for."""
        spec, setup = plan.spec, machine.setup
        self._check_shares(machine, "runs jobs on", [s for living in machine.executor.living for s in living.gpus])
        if len(plan.gpus) != spec.resources.gpus.count:
            self._fail(f"{spec.job} asked for {spec.resources.gpus}, got {plan.gpus}")
        allowed = permission(setup.policy, spec.user, setup.at_home, setup.fence)
        if allowed.refusal or allowed.needs_fence != plan.fenced:
            self._fail(f"{spec.job} of {spec.user} runs on {setup.name} of {setup.owner}, fenced: {plan.fenced}")
        if setup.is_rented and spec.cloud is CloudUse.NEVER:
            self._fail(f"{spec.job} runs on {setup.name}, but it may not leave the office")
        if spec.machine is not None and self.ledger.ids.get(spec.machine) is not machine:
            self._fail(f"{spec.job} runs on {setup.name}, which its user did not name")
        if unfit := never_fits(spec.resources, Host(setup.inventory, setup.name, setup.at_home)):
            self._fail(f"{spec.job} runs on {setup.name}, which {unfit}")
        if spec.job not in self.ledger.submitted:
            self._fail(f"{spec.job} runs, but no user asked for it")
        register = self._register(spec.job)
        is_active = (
            register is not None
            and register.node is not None
            and (self.ledger.ids[register.node], register.epoch) == (machine, plan.epoch)
            and register.state in COMMITTED_STATES
        )
        if not is_active:
            self._fail(f"{spec.job}/{plan.epoch} starts on {setup.name}, but the register is {register}")

    # -- attempts -----------------------------------------------------------------------------------------------------

    def _check_attempt(self, machine: Machine, before: object, record: AttemptRecord) -> None:
        key = (record.job, record.epoch)
        if record.started_wall_s is not None:
            self.ledger.begun.add(record.job)
        if not isinstance(before, AttemptRecord):
            self._check_acceptance(machine, record)
            self.ledger.accepted[key] = (machine.node, record.hold)
            return
        if ATTEMPT_ORDER[record.state] < ATTEMPT_ORDER[before.state]:
            self._fail(f"{key} goes back on disk: {before.state} → {record.state}")
        if before.result is not None and record.result != before.result:
            self._fail(f"{key} changes its result: {before.result} → {record.result}")
        is_wanted = any(share.uuid in machine.wanted for share in record.gpus)
        if record.preempted and not (is_wanted or self._gives_way(record.job)):
            self._fail(f"{key} must leave {machine.setup.name}, but its owner never wanted the GPU")
        if record.preempted:
            self.ledger.preempted.add(key)
        is_asked = record.job in self.ledger.stops_asked or record.preempted
        if record.stop is not None and before.stop is None and not is_asked:
            register = self._register(record.job)
            if register is not None and register.epoch == record.epoch and register.state in COMMITTED_STATES:
                self._fail(f"{key} is stopped on {machine.setup.name}, but nobody asked for it")
        if record.state is AttemptState.DELIVERED and before.state is not AttemptState.DELIVERED:
            register = self._register(record.job)
            if register is not None and register.epoch == record.epoch and register.state in UNSETTLED_STATES:
                self._fail(f"{key} counts as delivered, but the register is {register}")

    def _check_acceptance(self, machine: Machine, record: AttemptRecord) -> None:
        key = (record.job, record.epoch)
        if record.state is not AttemptState.ACCEPTED:
            self._fail(f"{key} is first written as {record.state} on {machine.setup.name}")
        if key in self.ledger.accepted:
            self._fail(f"{key} is accepted again, on {machine.setup.name}: before by {self.ledger.accepted[key]}")
        higher = [e for job, e in self.ledger.accepted if job == record.job and e > record.epoch]
        here = [e for e in higher if self.ledger.ids[self.ledger.accepted[record.job, e][0]] is machine]
        if here:
            self._fail(f"{key} is accepted on {machine.setup.name} after {here}")
        register = self._register(record.job)
        if register is None or register.epoch < record.epoch:
            self._fail(f"{key} is accepted on {machine.setup.name} before its stewards wrote it down: {register}")

    def _check_obeyed(self, machine: Machine, record: ObeyedRecord) -> None:
        """A request is obeyed once, whatever is repeated and whoever restarts. (No world lasts longer than that.)"""
        once = (machine.setup.name, record.key, record.nonce)
        if once in self.ledger.obeyed:
            self._fail(f"{machine.setup.name} obeys the request {record.nonce} a second time")
        self.ledger.obeyed.add(once)

    # -- registers ----------------------------------------------------------------------------------------------------

    def _check_register(self, machine: Machine, before: object, record: JobRecord) -> None:
        """What one steward is about to write; where that makes a quorum, what is chosen by it."""
        register = record.register
        if register.job not in self.ledger.submitted:
            self._fail(f"{machine.setup.name} holds {register.job}, which no user asked for")
        was = (before.promised, before.register.stamp) if isinstance(before, JobRecord) else (NO_BALLOT, NO_STAMP)
        if record.promised < was[0] or register.stamp < was[1]:
            self._fail(f"{machine.setup.name} goes back: {before} → {record}")
        if register.stamp == NO_STAMP:
            return
        if register.state is JobState.ACTIVE and (register.job, register.epoch) not in self.ledger.activated:
            self.ledger.activated.add((register.job, register.epoch))
            self._check_in_time(machine, register)
        standing = Standing(register, record.cancel, record.receipt)
        known, writers = self.ledger.standings.setdefault((register.job, register.stamp), (standing, set()))
        if known != standing:
            self._fail(f"two registers have one stamp: {known} and {standing}")
        writers.add(machine.setup.name)
        stewards = self.ledger.submitted[register.job].stewards
        chosen = self.ledger.chosen.get(register.job)
        if len(writers) > len(stewards) // 2 and (chosen is None or register.stamp > chosen.register.stamp):
            self._check_chosen(chosen.register if chosen else None, record)
            self.ledger.chosen[register.job] = standing

    def _check_chosen(self, was: Register | None, record: JobRecord) -> None:
        register = record.register
        if register.stop is not None and register.job not in self.ledger.stops_asked:
            self._fail(f"{register.job} is stopped, but its user did not ask for it")
        if was is None:
            if record.trial is not None:
                self._check_parallel(record)
            is_sweep = self.ledger.submitted[register.job].sweep is not None
            may_be_further = is_sweep or register.job in self.ledger.stops_asked  # the change after it made a quorum
            if register.epoch or not (register.state is JobState.QUEUED or may_be_further):
                self._fail(f"the first register of {register.job} is {register}")
            return
        if was.state.is_final and replace(register, stamp=was.stamp) != was:
            self._fail(f"the final register of {register.job} changes: {was} → {register}")
        if register.epoch != was.epoch:
            self._check_new_epoch(was, register)
        if register.state.is_final and not was.state.is_final:
            self._check_final(register)

    def _check_parallel(self, record: JobRecord) -> None:
        """A trial begins: no more of them at a time than its user wants, whatever became of its stewards between."""
        trial = self.ledger.submitted[record.register.job]
        sweep = next(spec for spec in self.ledger.submitted.values() if spec.sweep and spec.nonce == trial.nonce)
        trials = [self._register(spec.job) for spec in trials_of(sweep)]
        running = sum(register is not None and not register.state.is_final for register in trials)
        if sweep.sweep is None or running >= sweep.sweep.parallel:
            self._fail(f"{record.register.job} begins beside {running} trials of {sweep}")

    def _check_new_epoch(self, was: Register, register: Register) -> None:
        if register.epoch != was.epoch + 1 or was.state is not JobState.QUEUED:
            self._fail(f"epochs of {register.job} jump: {was} → {register}")
        living = self.ledger.living.get(register.job)
        if living is not None:
            self._fail(f"{register.job} is placed again while it lives at {living}")

    def _gives_way(self, job: JobId) -> bool:
        """Whether it may be stopped for one of the other jobs."""
        spec = self.ledger.submitted[job]
        return spec.preemptible and any(s.priority.rank > spec.priority.rank for s in self.ledger.submitted.values())

    def _check_final(self, register: Register) -> None:
        if register.job in self.ledger.living:
            self._fail(f"{register.job} is {register.state} while it lives")
        is_timed_out = register.result is not None and register.result.outcome is AttemptState.TIMED_OUT
        was_sent_away = (register.job, register.epoch) in self.ledger.preempted and not is_timed_out
        is_expired = register.state is JobState.EXPIRED  # it never began, and had no time left to begin elsewhere
        if was_sent_away and not is_expired and register.job not in self.ledger.stops_asked:
            self._fail(f"{register.job}/{register.epoch} was sent away, but is recorded as {register.state}")
        if register.state is JobState.CANCELLED and register.job not in self.ledger.stops_asked:
            self._fail(f"{register.job} is cancelled, but its user did not ask for it")
        if register.state is JobState.EXPIRED:
            self._check_expired(register)
        for trial in trials_of(self.ledger.submitted[register.job]):
            found = self._register(trial.job)
            must = register.state is not JobState.CANCELLED
            if (found is None and must) or (found is not None and not found.state.is_final):
                self._fail(f"the sweep {register.job} is {register.state}, but of its trials {trial.job} is {found}")
        if register.result is not None and register.result.outcome in (AttemptState.EXITED, AttemptState.TIMED_OUT):
            true = self.ledger.results.get((register.job, register.epoch))
            if true is None or replace(true, reason=register.result.reason) != register.result:
                self._fail(f"{register.job}/{register.epoch} ended with {true}, recorded is {register.result}")

    def _check_in_time(self, machine: Machine, register: Register) -> None:
        """A job that may not wait for long starts in time, or never; until it has run once."""
        limit_s = self.ledger.submitted[register.job].start_within_s
        waited_s = machine.now().wall_s - register.submitted_wall_s
        if limit_s is not None and waited_s > limit_s + LATE_S and register.job not in self.ledger.begun:
            self._fail(f"{register.job} starts after {waited_s:.1f} s, which it was to do within {limit_s:.1f} s")

    def _check_expired(self, register: Register) -> None:
        """Only a job that may not wait for long expires, not before its time, and never once it has run."""
        limit_s = self.ledger.submitted[register.job].start_within_s
        assert register.ended_wall_s is not None
        if limit_s is None or register.ended_wall_s - register.submitted_wall_s < limit_s:
            self._fail(f"{register.job} expires before its time, which is {limit_s}: {register}")
        if register.job in self.ledger.begun:
            self._fail(f"{register.job} expires although it has run: {register}")

    def _check_held(self, job: JobId) -> None:
        held = self._register(job)
        if held is None or held.state is JobState.DRAFT:
            self._fail(f"{job} was confirmed, but what a quorum of its stewards has on disk is {held}")

    # -- in the end ---------------------------------------------------------------------------------------------------

    def unsettled(self) -> list[str]:
        """What is not yet as it must become once faults have stopped; empty when the world has come to rest."""
        machines = [machine for machine in self.ledger.machines.values() if machine.agent is not None]
        away = {node for node, m in self.ledger.machines.items() if m.agent is None and not m.is_gone}
        reasons = [f"{m.setup.name} still uses {used}" for m in machines if (used := _allocations(m))]
        for job in sorted(self.ledger.confirmed):
            reason = self._job_unsettled(job, away)
            if reason:
                reasons.append(reason)
        reasons += [f"{m.setup.name} {untold}" for m in machines for untold in self._untold(m, away)]
        gone = {node for node, machine in self.ledger.machines.items() if machine.is_gone}
        reasons += [f"{m.setup.name} has not heard that an instance is gone" for m in machines if gone & _members(m)]
        return reasons or [*_links_unsettled(machines), *_gossip_unsettled(machines)]

    def _untold(self, machine: Machine, away: set[NodeId]) -> list[str]:
        """What ended on a machine, and who is there to hear it has not said that he did."""
        records = [record for record in machine.disk.values() if isinstance(record, AttemptRecord)]
        return [
            f"has yet to tell its stewards how {record.job}/{record.epoch} ended"
            for record in records
            if record.state in ENDED_ATTEMPT_STATES and record.state is not AttemptState.DELIVERED
            if self._has_quorum(record.job, away)
        ]

    def check_end(self) -> None:
        """Nothing that was confirmed is lost, and nobody got in who was not let in."""
        machines = self.ledger.machines.values()
        accounts = {key for machine in machines for key in machine.setup.accounts.values()}
        for machine in machines:
            there = {node for node, other in self.ledger.machines.items() if not other.is_gone}
            if machine.agent is not None and set(machine.agent.log.members) != there:
                self._fail(f"{machine.setup.name} counts members that nobody admitted")
            if machine.agent is not None and set(machine.agent.log.users) != accounts:
                self._fail(f"{machine.setup.name} knows users that nobody linked")
        for job in sorted(self.ledger.confirmed):
            self._check_held(job)
        for fault in evidence.faults(machines, self.ledger.accepted):
            self._fail(fault)

    def _job_unsettled(self, job: JobId, away: set[NodeId]) -> str:
        spec = self.ledger.submitted[job]
        register = self._register(job)
        if register is None or register.state.is_final or not self._has_quorum(job, away):
            return ""
        speaker = self._speaker(job, away)
        if speaker is None or speaker.agent is None:
            return f"nobody speaks for {job}, which is {register}"
        view = speaker.agent.stewardship.view(job)
        assert view is not None
        where = self.ledger.ids[view.register.node].node if view.register.node else None
        if view.register.state.is_final or (where in away and view.register.state in UNSETTLED_STATES):
            return ""
        limit_s = None if view.register.ran_on else spec.start_within_s
        if limit_s is not None and speaker.now().wall_s > view.register.submitted_wall_s + limit_s + LATE_S:
            return f"{job} still waits to start, which it was to do within {limit_s} s: {view.register}"
        if view.register.state is JobState.QUEUED and view.register.reason and self._must_wait(view, away):
            return ""
        begun = [trial.job for trial in trials_of(spec) if self._register(trial.job) is not None]
        if begun and register.state is not JobState.QUEUED:
            is_waiting = any(not register.state.is_final for trial in begun if (register := self._register(trial)))
            stuck = "" if is_waiting else f"the sweep {job} goes on, but none of its trials does"
            return next(filter(None, (self._job_unsettled(trial, away) for trial in begun)), stuck)
        return f"{job} is {view.register} at {speaker.setup.name}"

    def _must_wait(self, view: JobView, away: set[NodeId]) -> bool:
        """Whether no machine that is there could ever run the job."""
        spec = view.spec
        for node, machine in self.ledger.machines.items():
            setup = machine.setup
            is_named = spec.machine is None or self.ledger.ids.get(spec.machine) is machine
            is_meant = is_named and node not in away and not machine.is_gone
            is_meant = is_meant and not out_of_bounds(spec.cloud, is_rented=setup.is_rented)
            is_meant = is_meant and not permission(setup.policy, spec.user, setup.at_home, setup.fence).refusal
            if is_meant and not never_fits(spec.resources, Host(setup.inventory, setup.name, setup.at_home)):
                return False
        return True

    # -- inside -------------------------------------------------------------------------------------------------------

    def _register(self, job: JobId) -> Register | None:
        """The newest register that was chosen."""
        chosen = self.ledger.chosen.get(job)
        return chosen.register if chosen is not None else None

    def _speaker(self, job: JobId, away: set[NodeId]) -> Machine | None:
        """The steward that speaks for the job, of several who believe that they do the one whom others obey."""
        best: tuple[Ballot, Machine] | None = None
        for machine in (self.ledger.ids[node] for node in self.ledger.submitted[job].stewards):
            agent = machine.agent if machine.node not in away else None
            turn = agent.stewardship.turn(job) if agent is not None else None
            if turn is not None and (best is None or turn > best[0]):
                best = (turn, machine)
        return best[1] if best else None

    def _has_quorum(self, job: JobId, away: set[NodeId]) -> bool:
        stewards = self.ledger.submitted[job].stewards
        return sum(self.ledger.ids[node].node not in away for node in stewards) > len(stewards) // 2

    def _tell(self, machine: Machine, what: str) -> None:
        self._story.append(f"{machine.setup.name}: {what}")

    def _fail(self, message: str) -> NoReturn:
        raise BrokenInvariant(message, tuple(self._story))


def trials_of(spec: JobSpec) -> list[JobSpec]:
    """Every trial of a sweep, as its steward must make them; none of a job of its own."""
    return [trial_spec(spec, expand(spec.sweep, n)) for n in range(1, spec.sweep.trials + 1)] if spec.sweep else []


def _brief(register: Register) -> str:
    return f"{register.job[:5]}/{register.epoch} {register.state} {register.reason}"


def _allocations(machine: Machine) -> tuple[Allocation, ...]:
    return machine.agent.attempts.allocations() if machine.agent is not None else ()


def _members(machine: Machine) -> set[NodeId]:
    return set(machine.agent.log.members) if machine.agent is not None else set()


def _links_unsettled(machines: list[Machine]) -> list[str]:
    unseen = [
        f"{one.setup.name} takes {other.setup.name} for {state}"
        for one in machines
        for other in machines
        if one.is_linked(other) and (state := one.sees(other)) is not MemberState.ALIVE
    ]
    return unseen + [
        f"no Link between {one.setup.name} and {other.setup.name}"
        for one in machines
        for other in machines
        if one.node < other.node and not one.is_linked(other) and not (one.setup.is_rented and other.setup.is_rented)
    ]


def _gossip_unsettled(machines: list[Machine]) -> list[str]:
    views = {machine.node: machine.views() for machine in machines}
    reasons = [
        f"{other.setup.name} knows {owner.setup.name} as {views[other.node].get(owner.node)}"
        for owner in machines
        for other in machines
        if not other.setup.is_rented and views[other.node].get(owner.node) != views[owner.node].get(owner.node)
    ]
    heads = {machine.agent.log.heads() for machine in machines if machine.agent is not None}
    return reasons + (["the mesh logs differ"] if len(heads) > 1 else [])
