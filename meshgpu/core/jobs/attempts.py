"""A node's own attempts: it alone decides about its GPUs. Hold → accept → start when activated → report until heard.

An accepted attempt starts only when its steward says that active(epoch) is recorded, so a lost acknowledgement
never becomes a second copy; and an epoch that is not above all accepted ones of its job is refused.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from meshgpu.core.audit import AuditChain
from meshgpu.core.effects import AdoptAttempt, DiscardAttempt, Effect, EndAttempt, Persist, Reject, Send, StartAttempt
from meshgpu.core.jobs.attempt import Attempt, allocation_of
from meshgpu.core.jobs.placement import Host, clear, find_room, out_of_bounds
from meshgpu.core.jobs.queue import CLAIM_AFTER_S
from meshgpu.core.jobs.tail import Tail
from meshgpu.core.owner import GRACE_S, NEEDS_IMAGE, Owner, Permission, at_home, permission
from meshgpu.core.statemachine import earliest
from meshgpu.core.sweep import runnable
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import STOPPED, RequestRules
from meshgpu.core.trust.sealing import NO_WRAP
from meshgpu.errors import TrustError
from meshgpu.model.audit import AuditEvent
from meshgpu.model.clock import Now, span
from meshgpu.model.gossip import Allocation
from meshgpu.model.ids import RANDOM_ID_BYTES, HoldId, JobId, KeyId, NodeId, UserName, display_name, random_id
from meshgpu.model.inventory import GpuReading, Inventory
from meshgpu.model.job import Action, AttemptPlan, AttemptState, JobSpec, Phase, PlacingVote, Result, StopMode, quorum
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
from meshgpu.model.receipt import NO_EVIDENCE, Evidence
from meshgpu.model.records import AttemptRecord
from meshgpu.model.sweep import Metric
from meshgpu.model.trust import LENDING_ROLES, STEWARD_ROLES, Notary, Role

HOLDS_LIMIT: Final = 256
"""Open holds at a time: more than any burst of offers needs, less than what hurts."""

EPOCHS_LIMIT: Final = 1024
"""Attempts of one job that are looked up: more than anybody lets a job die."""

NOBODY: Final = UserName("")
"""Whose home a machine is that the mesh log does not know (any more): whoever rented it out may be gone."""

MAY_LIVE: Final = (AttemptState.STAGING, AttemptState.RUNNING, AttemptState.STOPPING)


@dataclass(frozen=True, slots=True)
class AttemptTiming:
    """hold_s: how long an offer is kept; longer blocks GPUs after a steward's crash.
    report_s: how often a live attempt is reported. ask_s: how often activation or an acknowledgement is asked again.
    give_up_s: when an accepted attempt that nobody activates is given back. sweep_s: how often old records are sought.
    claim_s: how long room is kept free for a job that does not ask again.
    """

    hold_s: float = 3.0
    report_s: float = 5.0
    ask_s: float = 1.0
    give_up_s: float = 60.0
    sweep_s: float = 3600.0
    retention_s: float = 30 * 86400.0
    claim_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Claim:
    """Room that is kept free for a job. until: `boot_s`."""

    allocation: Allocation
    until: float


class Attempts:
    """Holds, attempts and spent epochs of this node."""

    def __init__(
        self,
        node: NodeId,
        log: MeshLog,
        rules: RequestRules,
        notary: Notary,
        rng: random.Random,
        owner: Owner,
        timing: AttemptTiming,
    ) -> None:
        self._node = node
        self._log = log
        self._rules = rules
        self._notary = notary
        self._rng = rng
        self._owner = owner
        self._timing = timing
        self.audit = AuditChain(node, notary)
        self._live: dict[tuple[JobId, int], Attempt] = {}
        self._delivered: dict[tuple[JobId, int], Attempt] = {}
        self._spent: dict[JobId, int] = {}
        self._sweep_at: float | None = None
        self._inventory = Inventory(0, 0)
        self._readings: tuple[GpuReading, ...] = ()
        self._claim: Claim | None = None
        self.fence = ""
        self.closed = ""
        """Why this machine takes no new work at all; empty while it does."""

    def machine_read(self, inventory: Inventory, readings: tuple[GpuReading, ...]) -> None:
        self._inventory, self._readings = inventory, readings

    def restore(self, now: Now, records: Iterable[AttemptRecord]) -> list[Effect]:
        """Take up what an earlier agent left; attempts that may live are adopted."""
        effects: list[Effect] = []
        self._sweep_at = now.boot_s + self._timing.sweep_s
        for record in sorted(records, key=lambda record: (record.job, record.epoch)):
            try:
                attempt = self._from_record(now, record)
            except TrustError as error:
                effects.append(Reject(self._node, error.message))
                continue
            self._spend(record.job, record.epoch)
            kept = self._delivered if record.state is AttemptState.DELIVERED else self._live
            kept[record.job, record.epoch] = attempt
            if record.state in MAY_LIVE:
                effects.append(AdoptAttempt(self._plan(attempt)))
        return effects

    def _from_record(self, now: Now, record: AttemptRecord) -> Attempt:
        spec = self._rules.verify_job(record.spec, record.trial)
        attempt = Attempt(
            spec,
            record.spec,
            record.epoch,
            record.state,
            record.gpus,
            record.hold,
            spec.stewards[0],
            now.boot_s,
            trial=record.trial,
        )
        attempt.accepted_at = now.boot_s
        attempt.stop, attempt.result = record.stop, record.result
        attempt.preempted, attempt.kill_at = record.preempted, now.boot_s + GRACE_S if record.preempted else None
        attempt.started_wall_s, attempt.ended_wall_s = record.started_wall_s, record.ended_wall_s
        attempt.fenced, attempt.receipt = record.fenced, record.receipt
        return attempt

    # -- reading ------------------------------------------------------------------------------------------------------

    def allocations(self) -> tuple[Allocation, ...]:
        """What is held or in use, by job."""
        return tuple(attempt.allocation() for _, attempt in sorted(self._live.items()) if attempt.occupies)

    def kept(self) -> tuple[Allocation, ...]:
        """What is kept free for jobs that wait."""
        return (self._claim.allocation,) if self._claim is not None else ()

    @property
    def is_idle(self) -> bool:
        """Nothing runs or is promised, and how everything ended is known to its steward, where that still is one."""
        return not any(map(self._is_pending, self._live.values()))

    def latest(self, job: JobId) -> Attempt | None:
        """The newest accepted attempt of a job on this node."""
        return self.find(job, self._spent.get(job, 0))

    def find(self, job: JobId, epoch: int) -> Attempt | None:
        """An attempt that this node accepted."""
        attempt = self._live.get((job, epoch)) or self._delivered.get((job, epoch))
        return attempt if attempt is not None and attempt.state is not AttemptState.HELD else None

    def epochs(self, job: JobId) -> list[int]:
        """Of the newest EPOCHS_LIMIT attempts of a job, those that this node accepted."""
        newest = self._spent.get(job, 0)
        asked = range(max(1, newest - EPOCHS_LIMIT + 1), newest + 1)
        return [epoch for epoch in asked if self.find(job, epoch) is not None]

    # -- messages from stewards ---------------------------------------------------------------------------------------

    def offered(self, now: Now, steward: NodeId, offer: Offer) -> list[Effect]:
        try:
            spec = self._rules.verify_job(offer.spec, offer.trial)
            self._rules.check_may_start(offer.spec)
        except TrustError as error:
            return [Reject(steward, error.message), _refuse(steward, offer, error.message)]
        refusal = self._offer_refusal(steward, offer, spec)
        if refusal:
            return [_refuse(steward, offer, refusal)]
        # An offer that is repeated gets a new hold: the one before it must not count as taken.
        self._live.pop((spec.job, offer.epoch), None)
        kept = tuple(allocation for allocation in self.kept() if allocation.job != spec.job)
        room = find_room(spec.resources, self._host(), self._readings, (*self.allocations(), *kept))
        if room.refusal:
            cleared = self._make_room(now, offer, spec, kept) if offer.claims else []
            return [*cleared, _refuse(steward, offer, room.refusal)]
        hold = HoldId(random_id(self._rng.randbytes(RANDOM_ID_BYTES)))
        ends = now.boot_s + self._timing.hold_s
        self._live[spec.job, offer.epoch] = Attempt(
            spec, offer.spec, offer.epoch, AttemptState.HELD, room.gpus, hold, steward, ends, trial=offer.trial
        )
        return [Send(steward, OfferAnswer(spec.job, offer.epoch, hold, room.gpus))]

    def _offer_refusal(self, steward: NodeId, offer: Offer, spec: JobSpec) -> str:
        if steward not in spec.stewards or offer.job != spec.job:
            return "the offer does not come from a machine that holds the job"
        if spec.machine is not None and self._log.current(spec.machine) != self._node:
            return "the job is meant for another machine"
        if offer.epoch <= self._spent.get(spec.job, 0):
            return f"attempt {offer.epoch} of this job was here before"
        if self.closed:
            return self.closed
        me = self._log.members.get(self._node)
        if me is None or me.role not in LENDING_ROLES:
            return f"lends nothing: it is a {me.role}" if me else "is no member of the mesh any more"
        if sum(attempt.state is AttemptState.HELD for attempt in self._live.values()) >= HOLDS_LIMIT:
            return "has too many open offers"
        if wrong_side := out_of_bounds(spec.cloud, is_rented=me.role is Role.CLOUD):
            return wrong_side
        if self._owner.policy.needs_image and not spec.image:
            return NEEDS_IMAGE
        if spec.secrets is not None and not spec.secrets.opens_for(self._node):
            return NO_WRAP
        return self._permission(spec).refusal or self._owner.refusal()

    def _make_room(self, now: Now, offer: Offer, spec: JobSpec, kept: tuple[Allocation, ...]) -> list[Effect]:
        """Keep what the job needs free for it, and ask those to leave who give way, once only they are in its way."""
        if any(allocation.priority.rank >= spec.priority.rank for allocation in kept):
            return []
        clearing = clear(spec.resources, self._host(), self._readings, self.allocations(), spec.priority)
        if clearing is None or not (clearing.gives_way or now.wall_s - spec.issued_wall_s >= CLAIM_AFTER_S):
            return []
        kept_free = allocation_of(spec, offer.epoch, clearing.gpus, is_kept=True)
        self._claim = Claim(kept_free, now.boot_s + self._timing.claim_s)
        if not clearing.gives_way:
            return []
        reason = f"gave way to {display_name(spec.name, spec.job)} ({spec.user})"
        effects: list[Effect] = []
        for allocation in clearing.blocking:
            attempt = self._live[allocation.job, allocation.epoch]
            effects += [] if attempt.preempted else self._send_away(now, attempt, reason)
        return effects

    def _host(self) -> Host:
        me = self._log.members[self._node]
        return Host(self._inventory, me.name, me.owner)

    def released(self, steward: NodeId, release: Release) -> list[Effect]:
        for key, attempt in list(self._live.items()):
            is_meant = key[0] == release.job and attempt.hold == release.hold and attempt.steward == steward
            if is_meant and attempt.state is AttemptState.HELD:
                del self._live[key]
        return []

    def committed(self, now: Now, steward: NodeId, commit: Commit) -> list[Effect]:
        key = (commit.job, commit.epoch)
        attempt = self._live.get(key) or self._delivered.get(key)
        if attempt is None or attempt.hold != commit.hold or not self._holds(steward, attempt.spec):
            return [_decline(steward, commit, "the hold is not known here (any more)")]
        attempt.steward = steward  # another than the one that offered the job may speak for it by now
        if attempt.state is not AttemptState.HELD:  # it was accepted before: say so again
            return [Send(steward, CommitAnswer(*key, accepted=True))]
        if now.boot_s >= attempt.due:
            del self._live[key]
            return [_decline(steward, commit, "the hold has run out")]
        try:
            self._verify_ticket(attempt, commit)
        except TrustError as error:
            return [Reject(steward, error.message), _decline(steward, commit, error.message)]
        self._spend(*key)
        if self._claim is not None and self._claim.allocation.job == commit.job:
            self._claim = None
        attempt.accepted_at = now.boot_s
        attempt.due = now.boot_s + self._timing.ask_s
        attempt.fenced = self._permission(attempt.spec).needs_fence
        attempt.advance(AttemptState.ACCEPTED)
        written = self.audit.wrote(AuditEvent.ACCEPTED, attempt, now.wall_s)
        return [attempt.persist(), *written, Send(steward, CommitAnswer(*key, accepted=True))]

    def _verify_ticket(self, attempt: Attempt, commit: Commit) -> None:
        spec = attempt.spec
        wanted = PlacingVote(
            spec.mesh,
            spec.job,
            self._notary.digest(attempt.signed),
            commit.epoch,
            self._node,
            attempt.hold,
            attempt.steward,
        )
        self._rules.verify_ticket(commit.votes, wanted, spec.stewards)

    def activated(self, now: Now, steward: NodeId, activate: Activate) -> list[Effect]:
        attempt = self._of_steward(steward, activate.job, activate.epoch)
        if attempt is None or attempt.state is not AttemptState.ACCEPTED:
            return []
        attempt.fenced = self._permission(attempt.spec).needs_fence
        attempt.advance(AttemptState.STAGING)
        attempt.phase = Phase.STAGING
        attempt.due = now.boot_s + self._timing.report_s
        return [attempt.persist(), StartAttempt(self._plan(attempt), attempt.spec.stewards), self._report(attempt)]

    def fenced(self, now: Now, steward: NodeId, fence: Fence) -> list[Effect]:
        """The steward says that this epoch is spent: what never started is dropped, what runs is ended."""
        attempt = self._of_steward(steward, fence.job, fence.epoch)
        if attempt is None:
            return []
        if attempt.state is AttemptState.HELD:
            del self._live[fence.job, fence.epoch]
            return []
        if attempt.state is AttemptState.ACCEPTED:
            result = Result(AttemptState.FENCED, None, "another attempt of the job was chosen")
            return [*self._conclude(attempt, result, now.wall_s), *self._settle(attempt)]
        if attempt.occupies:
            return self._end(attempt, StopMode.KILL)
        return self._settle(attempt)

    def cancelled(self, now: Now, steward: NodeId, cancel: Cancel) -> list[Effect]:
        try:
            asked = self._rules.verify_spec(cancel.spec)
            spec = runnable(asked, cancel.trial)
            request = self._rules.verify_cancel(cancel.request, spec, asked.job)
        except TrustError as error:
            return [Reject(steward, error.message)]
        attempt = self._of_steward(steward, cancel.job, cancel.epoch)
        if spec.job != cancel.job or not self._holds(steward, spec):
            return [Reject(steward, "cannot stop a job: the request does not come from a machine that holds it")]
        if (told := self._delivered.get((cancel.job, cancel.epoch))) is not None:
            return [Send(steward, told.report())]  # another steward has heard it, and this one not
        if attempt is None or attempt.state is AttemptState.HELD:
            if attempt is not None:  # without its hold a Commit that is still on its way is refused: it cannot start
                del self._live[cancel.job, cancel.epoch]
            never = Result(AttemptState.ABANDONED, None, "stopped before it started")
            return [Send(steward, AttemptReport(cancel.job, cancel.epoch, None, "", None, now.wall_s, never))]
        if attempt.state is AttemptState.ACCEPTED:
            return self._never(now, attempt, AttemptState.ABANDONED, "stopped before it started")
        if not attempt.occupies:
            return [self._report(attempt)]
        return self._end(attempt, StopMode.KILL if request.action is Action.KILL else StopMode.STOP)

    def acknowledged(self, steward: NodeId, ack: ReportAck) -> list[Effect]:
        """A steward has recorded the result; or it knows of no such job, which counts once a quorum says so."""
        attempt = self._of_steward(steward, ack.job, ack.epoch)
        if attempt is None or attempt.result is None:
            return []
        if ack.is_forgotten:
            attempt.forgotten_by.add(steward)
            if len(attempt.forgotten_by) < quorum(attempt.spec.stewards):
                return []
        return self._settle(attempt)

    def drain(self, now: Now, reason: str) -> list[Effect]:
        """This machine goes away: everything on it must leave."""
        effects: list[Effect] = []
        for attempt in list(self._live.values()):
            if attempt.occupies and not attempt.preempted:
                effects += self._send_away(now, attempt, reason)
        return effects

    def keys_stopped(self, now: Now) -> list[Effect]:
        """A revocation may have ended the jobs of some keys: theirs stop here."""
        effects: list[Effect] = []
        for attempt in [a for a in self._live.values() if a.signed.key in self._log.stopped]:
            if attempt.state is AttemptState.HELD:
                del self._live[attempt.spec.job, attempt.epoch]
            elif attempt.state is AttemptState.ACCEPTED:
                effects += self._never(now, attempt, AttemptState.ABANDONED, STOPPED)
            elif attempt.occupies:
                effects += self._end(attempt, StopMode.STOP)
        return effects

    def members_left(self) -> None:
        """A hold whose steward left, or gave up the keys that it asked with, can never be committed: let it go."""
        for key, attempt in list(self._live.items()):
            if attempt.state is AttemptState.HELD and attempt.steward not in self._log.members:
                del self._live[key]

    def steward_linked(self, now: Now, steward: NodeId) -> list[Effect]:
        """A Link to a steward is up again: tell it at once how its attempts stand, and what they printed last."""
        effects: list[Effect] = []
        for (job, epoch), attempt in self._live.items():
            if self._holds(steward, attempt.spec) and attempt.needs_telling:
                attempt.due = now.boot_s
                if steward in self._listeners(attempt.spec) and (tail := attempt.tail.whole()) is not None:
                    effects.append(Send(steward, AttemptOutput(job, epoch, tail)))
        return effects

    # -- what the executor says ---------------------------------------------------------------------------------------

    def measured(self, job: JobId, epoch: int, metric: Metric) -> list[Effect]:
        """The job has reported its objective."""
        attempt = self._live.get((job, epoch))
        if attempt is None or attempt.state not in MAY_LIVE or attempt.metric == metric:
            return []
        attempt.metric = metric
        return [self._report(attempt)]

    def printed(self, job: JobId, epoch: int, chunk: LogChunk) -> list[Effect]:
        """The job has printed something: its stewards keep the newest part."""
        attempt = self._live.get((job, epoch))
        if attempt is None or attempt.state not in MAY_LIVE:
            return []
        attempt.tail.add(chunk)
        return [Send(steward, AttemptOutput(job, epoch, chunk)) for steward in self._listeners(attempt.spec)]

    def progressed(self, job: JobId, epoch: int, phase: Phase, detail: str) -> list[Effect]:
        attempt = self._live.get((job, epoch))
        if attempt is None or not attempt.occupies:
            return []
        if attempt.phase is not Phase.STOPPING or phase is Phase.SAVING:
            attempt.phase = phase
        attempt.detail = detail or attempt.detail
        return [self._report(attempt)]

    def began(self, job: JobId, epoch: int, started_wall_s: float) -> list[Effect]:
        attempt = self._live.get((job, epoch))
        if attempt is None or attempt.state not in MAY_LIVE:
            return []
        is_new = attempt.started_wall_s is None  # an adopted one began before
        attempt.started_wall_s = started_wall_s
        if attempt.state is AttemptState.STAGING:
            attempt.advance(AttemptState.RUNNING)
        attempt.phase = Phase.STOPPING if attempt.state is AttemptState.STOPPING else Phase.RUNNING
        written = self.audit.wrote(AuditEvent.STARTED, attempt, started_wall_s) if is_new else []
        return [attempt.persist(), *written, self._report(attempt)]

    def finished(
        self, now: Now, job: JobId, epoch: int, ended_wall_s: float, result: Result, evidence: Evidence = NO_EVIDENCE
    ) -> list[Effect]:
        attempt = self._live.get((job, epoch))
        if attempt is None or attempt.state not in MAY_LIVE:
            return []
        if result.outcome is AttemptState.TIMED_OUT:
            why = f"ran longer than its limit of {span(attempt.spec.timeout_s or 0.0)}"
            result = replace(result, reason="; ".join(filter(None, (why, result.reason))))
        elif attempt.preempted:  # also with exit code 0: it may have been asked to leave just before its end, or obeyed
            result = replace(result, outcome=AttemptState.PREEMPTED, reason=attempt.preempted)
        attempt.due = now.boot_s + self._timing.ask_s
        return [*self._conclude(attempt, result, ended_wall_s, evidence), self._report(attempt)]

    # -- time ---------------------------------------------------------------------------------------------------------

    def step(self, now: Now) -> list[Effect]:
        effects = self._give_back(now)
        if self._claim is not None and now.boot_s >= self._claim.until:
            self._claim = None
        for key, attempt in list(self._live.items()):
            if now.boot_s < attempt.due or not self._is_pending(attempt):
                continue
            if attempt.state is AttemptState.HELD:
                del self._live[key]
            elif attempt.state is not AttemptState.ACCEPTED:
                attempt.due = now.boot_s + (self._timing.report_s if attempt.occupies else self._timing.ask_s)
                effects.extend(self._tell_all(attempt, attempt.report()))
            elif now.boot_s >= attempt.accepted_at + self._timing.give_up_s:
                effects.extend(self._never(now, attempt, AttemptState.ABANDONED, "nobody said that it may start"))
            else:
                attempt.due = now.boot_s + self._timing.ask_s
                effects.extend(self._tell_all(attempt, CommitAnswer(*key, accepted=True)))
        if self._sweep_at is not None and now.boot_s >= self._sweep_at:
            self._sweep_at = now.boot_s + self._timing.sweep_s
            effects.extend(self._forget_old(now))
        return effects

    def deadline(self) -> float | None:
        kills = (attempt.kill_at for attempt in self._live.values() if attempt.occupies)
        pending = (attempt.due for attempt in self._live.values() if self._is_pending(attempt))
        return earliest(self._sweep_at, *pending, *kills)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _permission(self, spec: JobSpec) -> Permission:
        me = self._log.known(self._node)  # also once it was taken out: what runs here runs on
        return permission(self._owner.policy, spec.user, at_home(me) if me is not None else NOBODY, self.fence)

    def _plan(self, attempt: Attempt) -> AttemptPlan:
        image = self._owner.policy.image(attempt.spec.image)
        name = self._log.name_of(self._node)
        return AttemptPlan(
            attempt.spec,
            attempt.epoch,
            attempt.gpus,
            attempt.fenced,
            name,
            image,
            attempt.signed.key,
            is_tailed=bool(self._listeners(attempt.spec)),
        )

    def _listeners(self, spec: JobSpec) -> list[NodeId]:
        """Who else is to have the newest output. A job with secrets may print them, and they are for its node alone."""
        if spec.secrets is not None:
            return []
        return [node for steward in spec.stewards if (node := self._log.current(steward)) != self._node]

    def _conclude(
        self, attempt: Attempt, result: Result, ended_wall_s: float, evidence: Evidence = NO_EVIDENCE
    ) -> list[Effect]:
        """It has ended: record, receipt and audit say so in one step, and so in one transaction."""
        attempt.result, attempt.ended_wall_s, attempt.phase = result, ended_wall_s, None
        attempt.advance(result.outcome)
        receipt = attempt.account(self._node, self._notary.digest(attempt.signed), self._inventory, evidence)
        attempt.receipt = self._notary.sign(KeyId(self._node), receipt)
        return [attempt.persist(), *self.audit.wrote(AuditEvent.ENDED, attempt, ended_wall_s)]

    def _of_steward(self, steward: NodeId, job: JobId, epoch: int) -> Attempt | None:
        """A live attempt, if it is `steward`'s to command; who does so speaks for the job, and hears how it stands."""
        attempt = self._live.get((job, epoch))
        if attempt is None or not self._holds(steward, attempt.spec):
            return None
        attempt.steward = steward
        return attempt

    def _holds(self, node: NodeId, spec: JobSpec) -> bool:
        """Whether `node` is one of the job's stewards, under the keys it has now."""
        return node in map(self._log.current, spec.stewards)

    def _is_heard(self, attempt: Attempt) -> bool:
        """Whether one of its stewards, under whatever keys, still is there and may answer. If not now, it may be again:
        a removal that did not count is undone, a role is given back."""
        known = (self._log.members.get(self._log.current(steward)) for steward in attempt.spec.stewards)
        return any(steward is not None and steward.role in STEWARD_ROLES for steward in known)

    def _is_pending(self, attempt: Attempt) -> bool:
        """Whether there is anything left to do about it. What has ended is only told, as long as somebody listens."""
        return attempt.occupies or self._is_heard(attempt)

    def _report(self, attempt: Attempt) -> Send:
        """How it stands, to the steward that speaks for it."""
        return Send(self._log.current(attempt.steward), attempt.report())

    def _tell_all(self, attempt: Attempt, message: AttemptReport | CommitAnswer) -> list[Effect]:
        """Said from time to time to all its stewards: another may speak for it by now."""
        return [Send(self._log.current(steward), message) for steward in attempt.spec.stewards]

    def _spend(self, job: JobId, epoch: int) -> None:
        self._spent[job] = max(epoch, self._spent.get(job, 0))

    def _never(self, now: Now, attempt: Attempt, outcome: AttemptState, reason: str) -> list[Effect]:
        """Give back what was accepted and never started: only its own node may say so."""
        attempt.due = now.boot_s + self._timing.ask_s
        return [*self._conclude(attempt, Result(outcome, None, reason), now.wall_s), self._report(attempt)]

    def _give_back(self, now: Now) -> list[Effect]:
        """End what stands in the owner's way: asked first, killed GRACE_S later."""
        effects: list[Effect] = []
        for attempt in list(self._live.values()):
            if not attempt.occupies:
                continue
            if attempt.preempted:
                if attempt.kill_at is not None and now.boot_s >= attempt.kill_at:
                    attempt.kill_at = None
                    effects += self._end(attempt, StopMode.KILL)
            elif reason := self._owner.takes_back(share.uuid for share in attempt.gpus):
                effects += self._send_away(now, attempt, reason)
        return effects

    def _send_away(self, now: Now, attempt: Attempt, reason: str) -> list[Effect]:
        """Make an attempt leave, so that its job is placed elsewhere."""
        if attempt.state is AttemptState.HELD:
            del self._live[attempt.spec.job, attempt.epoch]
            return []
        if attempt.state is AttemptState.ACCEPTED:
            return self._never(now, attempt, AttemptState.PREEMPTED, reason)
        attempt.preempted, attempt.kill_at = reason, now.boot_s + GRACE_S
        return [attempt.persist(), *self._end(attempt, StopMode.STOP)]

    def _end(self, attempt: Attempt, mode: StopMode) -> list[Effect]:
        order = EndAttempt(attempt.spec.job, attempt.epoch, mode)
        if attempt.stop in (StopMode.KILL, mode):
            return [order]
        attempt.stop = mode
        attempt.phase = Phase.STOPPING
        attempt.advance(AttemptState.STOPPING)
        return [attempt.persist(), order, self._report(attempt)]

    def _settle(self, attempt: Attempt) -> list[Effect]:
        """Its steward knows how it ended."""
        key = (attempt.spec.job, attempt.epoch)
        self._delivered[key] = self._live.pop(key)
        attempt.tail = Tail()
        attempt.advance(AttemptState.DELIVERED)
        return [attempt.persist()]

    def _forget_old(self, now: Now) -> list[Effect]:
        """Records and files that have been kept long enough. A job that old can no longer be submitted again."""
        effects: list[Effect] = []
        untold = {key: attempt for key, attempt in self._live.items() if not self._is_pending(attempt)}
        for key, attempt in {**self._delivered, **untold}.items():
            if now.wall_s >= (attempt.ended_wall_s or 0.0) + self._timing.retention_s:
                (self._live if key in untold else self._delivered).pop(key)
                self._spent.pop(key[0], None)
                effects += [Persist("attempt", f"{key[0]}/{key[1]}", None), DiscardAttempt(*key)]
        return effects


def _refuse(steward: NodeId, offer: Offer, refusal: str) -> Send:
    return Send(steward, OfferAnswer(offer.job, offer.epoch, None, refusal=refusal))


def _decline(steward: NodeId, commit: Commit, reason: str) -> Send:
    return Send(steward, CommitAnswer(commit.job, commit.epoch, accepted=False, reason=reason))
