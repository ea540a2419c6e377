"""The registers this node holds as a steward: from draft to final, one compare-and-set at a time.

It acts for a job while it is its turn (`Turns`): every change is proposed to the other stewards, and what follows from
it happens once a quorum has accepted it. A job has at most one attempt that may live: a new epoch is offered only after
the node of the last one said that it ended, or before it was ever activated.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from meshgpu.core.effects import Effect, FetchTree, Persist, Reject, Send
from meshgpu.core.jobs import sweeps
from meshgpu.core.jobs.asking import ELSEWHERE
from meshgpu.core.jobs.held_job import HeldJob, replica_of
from meshgpu.core.jobs.listing import listed
from meshgpu.core.jobs.offering import Offering, OfferTiming
from meshgpu.core.jobs.placement import Candidate, Guest
from meshgpu.core.jobs.queue import Crowd
from meshgpu.core.jobs.replica import Replica
from meshgpu.core.jobs.tail import CHUNK_LIMIT_BYTES, Tail
from meshgpu.core.jobs.turns import Turns, TurnTiming
from meshgpu.core.statemachine import earliest
from meshgpu.core.sweep import check_space, runnable, trial_spec
from meshgpu.core.trust.freshness import Obeyed
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.receipts import check_about, check_told, read_receipt
from meshgpu.core.trust.requests import STOPPED, RequestRules
from meshgpu.errors import MeshgpuError, StaleRequest, TrustError
from meshgpu.model.clock import Now, span
from meshgpu.model.gossip import NEEDS_LIMIT, Demand, Need
from meshgpu.model.ids import Digest, JobId, NodeId, UserName
from meshgpu.model.job import (
    NO_BALLOT,
    NO_STAMP,
    Action,
    AttemptState,
    Ballot,
    CloudUse,
    JobRequest,
    JobSpec,
    JobState,
    JobView,
    Phase,
    Register,
    Result,
    Standing,
    StopMode,
)
from meshgpu.model.logs import LogChunk
from meshgpu.model.messages import (
    Accept,
    Accepted,
    Activate,
    Answer,
    Ask,
    AttemptOutput,
    AttemptReport,
    Challenge,
    CommitAnswer,
    Fence,
    OfferAnswer,
    Prepare,
    Promise,
    Release,
    ReportAck,
    SignedView,
    Submit,
    SubmitAnswer,
)
from meshgpu.model.records import JobRecord
from meshgpu.model.sweep import Trial
from meshgpu.model.trust import Notary, Signed

TAILS_LIMIT: Final = 128
"""Jobs whose newest output is kept: 16 MiB at the very most."""

UNFINISHED_LIMIT: Final = 5_000
"""A user's unfinished jobs at most: a loop must not fill a colleague's memory."""

SPEC_LIMIT_BYTES: Final = 256 * 1024
"""A signed spec at most: environment variables and a requirements file fit, data does not."""

USER_LIMIT_BYTES: Final = 64 * 2**20
"""Of all specs of one user that are kept: sixty thousand ordinary jobs."""

REASON_CHARACTERS: Final = 2_000
"""Of what a node tells about an attempt: the last lines of a failed build; a register must fit a frame."""

DOUBT_S: Final = 3600.0
"""For how long after its end a steward that starts again asks the others how a job has ended: it may have been the only
one to write so."""

DRAFT_S: Final = 3600.0
"""For how long a draft is kept in memory that nobody asks about any more."""

GONE: Final = "the instance it ran on is gone"

CHANGING: Final = (Action.STOP, Action.KILL)
"""Requests that are obeyed once, however often they come."""

WAITING_ASKS_LIMIT: Final = 8
"""Requests that wait until the turn is won: of one user, who tries again."""

ASK_KEPT_S: Final = 4.0
"""For how long: less than who asked waits for the answer, so that nothing happens that was told to be impossible."""

CLOCK_S: Final = 60.0
"""How often it is looked whether a job has waited for too long: a wall clock may be set meanwhile."""

UNSTARTED_TRIES: Final = 3
"""Attempts that may die before they start (a machine that reboots) before the job is given up."""


@dataclass(frozen=True, slots=True)
class StewardTiming:
    """placing_s: how long a commit may stay unanswered.
    silence_s: after which an active job counts as out of touch. cancel_s: how often a cancellation is repeated.
    watch_s: how long a watcher is told without asking again.
    retention_s: how long final registers are kept; sweep_s: how often old ones are sought.
    """

    offers: OfferTiming = field(default_factory=OfferTiming)
    turns: TurnTiming = field(default_factory=TurnTiming)
    placing_s: float = 15.0
    silence_s: float = 12.0
    cancel_s: float = 2.0
    watch_s: float = 15.0
    sweep_s: float = 3600.0
    retention_s: float = 30 * 86400.0


class Stewardship:
    """All registers of this node. `candidates(guest, machine)` and `crowd()`: the mesh as known here.

    `is_alive(node)`: whether a machine is there, by the id that it has now.
    """

    def __init__(
        self,
        node: NodeId,
        log: MeshLog,
        rules: RequestRules,
        notary: Notary,
        rng: random.Random,
        candidates: Callable[[Guest, NodeId | None], list[Candidate]],
        crowd: Callable[[], Crowd],
        is_alive: Callable[[NodeId], bool],
        timing: StewardTiming,
    ) -> None:
        self._node = node
        self._log = log
        self._rules = rules
        self._notary = notary
        self._timing = timing
        self._turns = Turns(notary, rng, is_alive, timing.turns)
        self._turn_at: float | None = None
        self._offering = Offering(rng, candidates, crowd, timing.offers)
        self._jobs: dict[JobId, HeldJob] = {}
        self._final: dict[JobId, HeldJob] = {}
        self._ending: dict[JobId, HeldJob] = {}
        self._doubted: dict[JobId, HeldJob] = {}
        """Jobs that have ended by what this disk has, which others may see otherwise."""
        self._trials: dict[JobId, dict[int, HeldJob]] = {}
        self._tails: dict[JobId, tuple[int, Tail]] = {}
        """{job: (attempt, what it printed last)}, the one that printed last at the end."""
        self._sweep_at: float | None = None
        self._expiry_at: float | None = None
        """`boot_s` at which it is looked whether a job has waited for too long; None while none may."""
        self.obeyed = Obeyed()

    def restore(self, now: Now, records: Iterable[JobRecord]) -> list[Effect]:
        """Take up the registers of an earlier agent, each where it stood."""
        self._sweep_at = now.boot_s + self._timing.sweep_s
        effects: list[Effect] = []
        for record in records:
            try:
                asked = self._rules.verify_spec(record.spec)
                spec = asked if record.trial is None else trial_spec(asked, record.trial)
                replica = replica_of(record, self._seat(spec), spec.stewards)
            except TrustError as error:
                effects.append(Reject(self._node, error.message))
                continue
            job = HeldJob(spec, record.spec, record.register, replica, self._log.current)
            job.cancel, job.receipt, job.trial = record.cancel, record.receipt, record.trial
            job.has_tree = record.register.state is not JobState.DRAFT
            if record.trial is not None:
                job.sweep = asked
                self._trials.setdefault(asked.job, {})[record.trial.number] = job
            (self._final if record.register.state.is_final else self._jobs)[spec.job] = job
            if len(spec.stewards) == 1:
                job.replica.ask()  # nobody else has a say
            elif job.state.is_final and now.wall_s - (job.register.ended_wall_s or now.wall_s) < DOUBT_S:
                self._doubted[spec.job] = job
        alone = [job for job in self._jobs.values() if job.acts]
        for job in sorted(alone, key=lambda job: job.spec.sweep is not None):  # a sweep knows its trials by then
            effects += self._resume(now, job)
        if self._jobs or self._doubted:
            self._turn_at = now.boot_s
        return effects

    # -- reading ------------------------------------------------------------------------------------------------------

    def view(self, job: JobId) -> JobView | None:
        found = self._find(job)
        return JobView(found.spec, found.told, found.trial, found.sweep) if found else None

    def tail(self, job: JobId) -> LogChunk | None:
        """What the newest attempt of a job printed last, as far as it is known here."""
        found = self._find(job)
        epoch, tail = self._tails.get(job, (0, Tail()))
        return tail.whole() if found is not None and found.register.epoch == epoch else None

    def turn(self, job: JobId) -> Ballot | None:
        """The ballot by which this node speaks for a job; None where it does not."""
        found = self._find(job)
        return found.replica.turn if found is not None else None

    @property
    def unfinished(self) -> int:
        """How many jobs are held here and have not ended."""
        return len(self._jobs)

    def views_of(self, user: UserName) -> tuple[SignedView, ...]:
        """The user's jobs, then those that others share, newest first, as many as fit a frame.

        Trials are told with their sweep.
        """
        jobs = (*self._final.values(), *self._jobs.values())
        shared = [job for job in jobs if job.spec.user != user and job.spec.shared]
        return listed([job for job in jobs if job.spec.user == user], shared, self._trials)

    def tree_for(self, job: JobId, peer: NodeId) -> Digest | None:
        """The job's tree, if `peer` runs the job now, or is to hold it as well."""
        found = self._jobs.get(job)
        if found is None or not (self._is_at(peer, found) or (found.has_tree and peer in found.fellows)):
            return None
        return found.spec.tree

    # -- submitting ---------------------------------------------------------------------------------------------------

    def submitted(self, now: Now, peer: NodeId, submit: Submit) -> list[Effect]:
        known = self._find(submit.job)
        if known is not None:
            return self._submitted_again(now, peer, known, submit)
        try:
            spec = self._rules.verify_new_spec(submit.spec)
            self._check_acceptable(spec, peer, submit)
            if peer == spec.submitter:  # else a fellow steward has asked that
                self._rules.check_fresh_spec(spec, submit.fresh, now, peer)
        except MeshgpuError as error:
            challenge = challenge_of(error)
            answer = SubmitAnswer(submit.job, False, code=error.code, reason=error.message, challenge=challenge)
            return [Reject(peer, error.message), Send(peer, answer)]
        job = self._draft(now, spec, submit.spec)
        effects: list[Effect] = [FetchTree(spec.job, spec.tree, self._sources(job, peer))]
        if peer != spec.submitter or not self._turns.is_first(job):
            return effects
        job.answer_to = peer
        effects += (Send(fellow, submit) for fellow in job.fellows)
        return effects if job.acts else [*effects, *self._turns.ask(now, job)]

    def _submitted_again(self, now: Now, peer: NodeId, job: HeldJob, submit: Submit) -> list[Effect]:
        if job.signed != submit.spec:
            return [Send(peer, SubmitAnswer(submit.job, held=False, code="bad-request", reason="the id is taken"))]
        if peer != job.spec.submitter:
            return []
        if job.acts:
            is_held = job.state is not JobState.DRAFT
            return job.after(Send(peer, SubmitAnswer(submit.job, held=is_held)))
        if not self._turns.is_first(job):
            return []
        job.answer_to = peer
        return self._turns.ask(now, job)

    def _draft(self, now: Now, spec: JobSpec, signed: Signed, trial: Trial | None = None) -> HeldJob:
        """A job of which nothing is on this disk."""
        register = Register(spec.job, JobState.DRAFT, submitted_wall_s=now.wall_s)
        replica: Replica[Standing] = Replica(self._seat(spec), spec.stewards)
        job = HeldJob(spec, signed, register, replica, self._log.current, trial=trial)
        self._jobs[spec.job] = job
        return job

    def _seat(self, spec: JobSpec) -> NodeId:
        """The id by which the job names this machine. Raises TrustError where it names others."""
        seat = next((steward for steward in spec.stewards if self._log.current(steward) == self._node), None)
        if seat is None:
            raise TrustError("not-allowed", "cannot hold a job: it names other machines to hold it")
        return seat

    def _find(self, job: JobId) -> HeldJob | None:
        return self._jobs.get(job) or self._final.get(job)

    def _sources(self, job: HeldJob, first: NodeId) -> tuple[NodeId, ...]:
        """Who may have the tree of a job that is new here, `first` before all others."""
        known = dict.fromkeys((first, job.spec.submitter, *job.fellows))
        return tuple(node for node in known if node != self._node) or (self._node,)

    def _check_acceptable(self, spec: JobSpec, peer: NodeId, submit: Submit) -> None:
        if self._node not in spec.stewards:
            raise TrustError("not-allowed", "cannot hold a job: it names other machines to hold it")
        if spec.job != submit.job or peer not in (spec.submitter, *spec.stewards):
            raise TrustError("not-allowed", "cannot hold a job: it was not sent by the machine that signed it")
        self._check_room(spec, submit.spec)
        if spec.sweep is not None:
            check_space(spec.sweep, spec.command)

    def _check_room(self, spec: JobSpec, signed: Signed) -> None:
        if sum(job.spec.user == spec.user for job in self._jobs.values()) >= UNFINISHED_LIMIT:
            raise TrustError("too-many-jobs", f"cannot hold a job: {UNFINISHED_LIMIT} of yours are here already")
        held = (*self._jobs.values(), *self._final.values())
        if (
            sum(len(job.signed.payload) for job in held if job.spec.user == spec.user and job.trial is None)
            >= USER_LIMIT_BYTES
        ):
            raise TrustError("too-many-jobs", "cannot hold a job: your jobs of the last 30 days fill what is kept here")
        if len(signed.payload) > SPEC_LIMIT_BYTES:
            raise TrustError("too-large", f"cannot hold a job: its request has more than {SPEC_LIMIT_BYTES} bytes")

    # -- sweeps -------------------------------------------------------------------------------------------------------

    def _drive(self, now: Now, sweep: HeldJob) -> list[Effect]:
        """Begin the trials that are due, or end the sweep; to be asked whenever one of its trials ends."""
        if not sweep.acts:
            return []
        trials = self._trials.setdefault(sweep.spec.job, {})
        effects: list[Effect] = []
        for known in list(trials.values()):
            effects += self._drive_trial(now, sweep, known)
        for trial in sweeps.beginning(sweep, trials.values()):
            job = self._draft(now, trial_spec(sweep.spec, trial), sweep.signed, trial)
            job.sweep, job.has_tree = sweep.spec, True
            trials[trial.number] = job
            effects += self._begin(now, job) if job.acts else self._turns.ask(now, job)
        if end := sweeps.ending(sweep, trials.values()):
            return [*effects, *self._finish(now, sweep, end[0], None, None, end[1])]
        if sweep.state is JobState.QUEUED:
            effects += sweep.change(now, state=JobState.ACTIVE, started_wall_s=now.wall_s)
            sweep.due = None
        return effects

    def _drive_trial(self, now: Now, sweep: HeldJob, trial: HeldJob) -> list[Effect]:
        """See to a trial that was left in between: by another steward, or when its turn was won after its sweep's."""
        if trial.state.is_final and not trial.acts:
            self._doubted[trial.spec.job] = trial
            self._turn_at = now.boot_s
        if not trial.acts or trial.state.is_final:
            return []
        if sweep.state is JobState.CANCELLING and trial.state is JobState.DRAFT:
            return self._finish(now, trial, JobState.CANCELLED, None, None, "stopped before it started")
        if sweep.state is JobState.CANCELLING and sweep.cancel is not None and trial.register.stop is None:
            return self._stop(now, trial, sweep.register.stop or StopMode.STOP, sweep.cancel)
        return self._begin(now, trial) if trial.state is JobState.DRAFT else []

    # -- while the tree comes -----------------------------------------------------------------------------------------

    def tree_progressed(self, job: JobId, done_bytes: int, total_bytes: int) -> list[Effect]:
        found = self._jobs.get(job)
        if found is None or found.state is not JobState.DRAFT or found.answer_to is None:
            return []
        return [Send(found.answer_to, SubmitAnswer(job, False, done_bytes, total_bytes))]

    def tree_failed(self, job: JobId, code: str, reason: str) -> list[Effect]:
        found = self._jobs.get(job)
        if found is None or found.state is not JobState.DRAFT:
            return []
        to, found.accept = found.answer_to, None
        if found.is_unwritten:  # else a promise was made, which must be kept
            del self._jobs[job]
        return [Send(to, SubmitAnswer(job, held=False, code=code, reason=reason))] if to is not None else []

    def tree_arrived(self, now: Now, job: JobId) -> list[Effect]:
        """Spec and tree are here. Once a quorum says so, the job is durable, and only then may its id be printed."""
        found = self._jobs.get(job)
        if found is None or found.has_tree:
            return []
        found.has_tree = True
        effects: list[Effect] = []
        if found.accept is not None:
            (peer, accept), found.accept = found.accept, None
            effects += self._accept(now, found, peer, accept)
        if found.acts and found.state is JobState.DRAFT and found.answer_to is not None:
            effects += self._begin(now, found)
        return [*effects, *self._offering.place_waiting(now, self._jobs.values())]

    def _begin(self, now: Now, job: HeldJob) -> list[Effect]:
        """A draft becomes a job."""
        effects = job.change(now, state=JobState.QUEUED)
        self._note_limit(now, job)
        if job.spec.sweep is not None:
            effects += self._drive(now, job)
        if job.answer_to is not None:
            effects += job.after(Send(job.answer_to, SubmitAnswer(job.spec.job, held=True)))
        self._offering.retry_at = now.boot_s
        return effects

    # -- among stewards -----------------------------------------------------------------------------------------------

    def prepared(self, now: Now, peer: NodeId, prepare: Prepare) -> list[Effect]:
        job, effects = self._joined(now, peer, prepare.job, prepare.spec, prepare.trial)
        if job is None:
            return effects
        if self._log.current(prepare.ballot.steward) != peer:
            return [Reject(peer, "a steward asked for the turn of another")]
        effects += self._turns.prepared(job, peer, prepare)
        self._file(job)
        self._turn_at = now.boot_s
        return effects

    def promised(self, now: Now, peer: NodeId, promise: Promise) -> list[Effect]:
        job = self._find(promise.job)
        if job is None or (steward := job.fellows.get(peer)) is None:
            return []
        self._turn_at = now.boot_s
        return self._resume(now, job) if self._turns.promised(now, job, steward, promise) else []

    def accept(self, now: Now, peer: NodeId, accept: Accept) -> list[Effect]:
        """Another's change; one of a job whose tree is not here waits for that."""
        job, effects = self._joined(now, peer, accept.job, accept.spec, accept.trial)
        if job is None:
            return effects
        if accept.standing.register.job != accept.job:
            return [Reject(peer, "a steward tells of one job in another's name")]
        age_s = now.wall_s - accept.standing.register.submitted_wall_s
        if job.replica.value is None and age_s >= self._timing.retention_s:
            return [Reject(peer, "a steward tells of a job so old that it may have ended here, and be forgotten")]
        if job.has_tree or accept.standing.register.state.is_final:
            return [*effects, *self._accept(now, job, peer, accept)]
        is_first = job.accept is None
        job.accept = (peer, accept)
        return [FetchTree(accept.job, job.spec.tree, self._sources(job, peer))] if is_first else []

    def _accept(self, now: Now, job: HeldJob, peer: NodeId, accept: Accept) -> list[Effect]:
        effects = self._turns.accept(job, peer, accept)
        self._file(job)
        self._turn_at = now.boot_s
        return [*effects, *(self._drive_sweep_of(now, job) if job.state.is_final else ())]

    def accepted(self, now: Now, peer: NodeId, accepted: Accepted) -> list[Effect]:
        job = self._find(accepted.job)
        if job is None and not accepted.is_lacking:
            return [Send(peer, Accepted(accepted.job, NO_STAMP, NO_BALLOT, is_lacking=True))]
        if job is None or (steward := job.fellows.get(peer)) is None:
            return []
        if not job.acts and not accepted.is_lacking:
            is_other = accepted.stamp != job.replica.stamp
            return self._turns.ask(now, job) if is_other and self._turns.is_first(job) else []
        was_settled = job.replica.is_settled
        effects = self._turns.confirmed(now, job, steward, accepted)
        if not job.acts:
            self._file(job)
            self._turn_at = now.boot_s
        elif job.replica.is_settled and not was_settled:
            effects += self._settled(now, job)
        return effects

    def _settled(self, now: Now, job: HeldJob) -> list[Effect]:
        """All that was proposed is chosen."""
        if job.state is JobState.PLACING:
            assert job.register.node is not None
            return [Send(self._log.current(job.register.node), job.commit(self._notary))]
        if job.state is JobState.QUEUED:
            self._offering.retry_at = now.boot_s
            self._note_limit(now, job)
        return self._drive_sweep_of(now, job) if job.is_over else []

    def _drive_sweep_of(self, now: Now, job: HeldJob) -> list[Effect]:
        sweep = self._jobs.get(job.sweep.job) if job.sweep is not None else None
        return self._drive(now, sweep) if sweep is not None else []

    def _joined(
        self, now: Now, peer: NodeId, job: JobId, signed: Signed | None, trial: Trial | None
    ) -> tuple[HeldJob | None, list[Effect]]:
        """The job that a fellow steward speaks of, known or new here; or None, and what follows from that."""
        found = self._find(job)
        if found is not None:
            return (found, []) if peer in found.fellows else (None, [Reject(peer, "it does not hold that job")])
        if signed is None:
            return None, [Send(peer, Accepted(job, NO_STAMP, NO_BALLOT, is_lacking=True))]
        try:
            asked = self._rules.verify_spec(signed)
            spec = asked if trial is None else runnable(asked, trial)
            if spec.job != job or self._node not in spec.stewards or peer not in spec.stewards:
                raise TrustError("not-allowed", "cannot hold a job: it is not ours to hold")
            self._check_room(spec, signed)
            found = self._draft(now, spec, signed, trial)
        except MeshgpuError as error:
            return None, [Reject(peer, error.message)]
        if trial is not None:
            found.sweep, found.has_tree = asked, True  # to have the tree is its sweep's affair
            self._trials.setdefault(asked.job, {})[trial.number] = found
        return found, []

    def _file(self, job: HeldJob) -> None:
        """Among those that have ended, or not: what one steward accepted alone may turn out not to have been chosen."""
        here, there = (self._final, self._jobs) if job.state.is_final else (self._jobs, self._final)
        there.pop(job.spec.job, None)
        here[job.spec.job] = job
        if job.state.is_final and job.acts:
            self._ending[job.spec.job] = job
        elif job.state.is_final and job.replica.stamp.ballot.steward == job.replica.me:
            self._doubted[job.spec.job] = job  # written here in a turn that is over: the others may have gone on

    def _unheard(self) -> list[HeldJob]:
        """Jobs that have ended here, which some of their other stewards have not heard."""
        for job in [job for job in self._ending.values() if not job.acts or not job.replica.behind()]:
            del self._ending[job.spec.job]
        return list(self._ending.values())

    def _resume(self, now: Now, job: HeldJob) -> list[Effect]:
        """The turn is won: see to it that the job stands as it is found, and go on from there."""
        self._file(job)
        if job.replica.value is None:  # nobody has accepted anything
            if job.trial is not None:
                return self._drive_sweep_of(now, job)
            return self._begin(now, job) if job.has_tree and job.answer_to is not None else []
        effects = job.propose(now) if job.replica.others else []
        if not job.has_tree and not job.state.is_final:
            effects.append(FetchTree(job.spec.job, job.spec.tree, self._sources(job, job.spec.submitter)))
        if job.answer_to is not None:
            effects += job.after(Send(job.answer_to, SubmitAnswer(job.spec.job, held=True)))
        asks, job.asks = job.asks, []
        if not job.state.is_final:
            effects += self._go_on(now, job)
        elif job.is_over:
            effects += self._drive_sweep_of(now, job)
        for until_s, peer, ask in asks:
            if now.boot_s < until_s:
                effects += self.asked(now, peer, ask, is_fresh=True)
        return effects

    def _go_on(self, now: Now, job: HeldJob) -> list[Effect]:
        """What is due in a job that another drove, or this node before it started anew."""
        job.due = now.boot_s
        self._note_limit(now, job)
        if job.state in (JobState.ACTIVE, JobState.UNKNOWN):
            job.due = now.boot_s + self._timing.silence_s
        if job.signed.key in self._log.stopped:
            return self._key_stopped(now, job)
        if job.spec.sweep is not None:
            job.due = None  # its trials have their own
            return self._drive(now, job)
        if job.register.node in self._log.ended:
            return self._is_gone(now, job)
        return []

    def _take_turns(self, now: Now) -> list[Effect]:
        """Ask for the turn of each job that nobody speaks for who is before this node."""
        is_idle = not (self._jobs or self._doubted)  # then it is nobody's turn, and nobody need be looked for
        has_changed = self._turns.look(now, () if is_idle else self._log.members)
        if has_changed:
            self._turn_at = now.boot_s
        if self._turn_at is None or now.boot_s < self._turn_at:
            return []
        effects: list[Effect] = []
        dues: list[float] = []
        for job in [job for job in self._doubted.values() if job.acts or not job.state.is_final]:
            del self._doubted[job.spec.job]
        for job in [*self._jobs.values(), *self._doubted.values()]:
            if job.acts or (job.state is JobState.DRAFT and job.answer_to is None and job.trial is None):
                continue
            if has_changed and self._turns.is_orphaned(job):  # who ought to take over may not even know the job
                effects.append(Send(self._turns.first(job), job.accepted()))
            due = self._turns.due(now, job)
            if due is not None and now.boot_s >= due:
                effects += self._turns.ask(now, job)
                due = self._turns.due(now, job)
            if due is not None:
                dues.append(due)
        self._turn_at = earliest(*dues)
        return effects

    def linked(self, now: Now, peer: NodeId) -> list[Effect]:
        """A Link to another machine is up: what it holds with this one, both are to know alike."""
        effects: list[Effect] = []
        for job in [*self._jobs.values(), *self._unheard(), *self._doubted.values()]:
            if (steward := job.fellows.get(peer)) is None:
                continue
            if job.acts and steward in job.replica.behind():
                effects += self._turns.resend(now, job)
            elif job.acts:
                continue
            elif job.replica.asked is not None:
                effects += job.prepares()
            else:
                effects.append(Send(peer, job.accepted()))
        self._turn_at = now.boot_s
        return effects

    # -- placing ------------------------------------------------------------------------------------------------------

    def offer_answered(self, now: Now, node: NodeId, answer: OfferAnswer) -> list[Effect]:
        job = self._jobs.get(answer.job)
        if job is None or not self._offering.is_awaited(job, node, answer):
            return [Send(node, Release(answer.job, answer.hold))] if answer.hold else []
        return self._place(now, job) if self._offering.answered(job, node, answer) else []

    def _place(self, now: Now, job: HeldJob) -> list[Effect]:
        """Commit the best hold of a round of offers, if there was one."""
        chosen, others = self._offering.choose(now, job)
        if chosen is None:
            return others
        job.waits_since = None
        effects = job.change(
            now,
            state=JobState.PLACING,
            epoch=job.register.epoch + 1,
            node=chosen.node,
            hold=chosen.hold,
            gpus=chosen.gpus,
            phase=None,
            detail="",
            started_wall_s=None,
            reason="",
        )
        job.due = now.boot_s + self._timing.placing_s
        if job.replica.is_settled:
            effects += self._settled(now, job)
        return [*effects, *others]

    def commit_answered(self, now: Now, node: NodeId, answer: CommitAnswer) -> list[Effect]:
        job = self._find(answer.job)
        if job is None or not job.acts:
            return self._look_again(now, job)
        if job.state.is_final or not self._is_at(node, job) or answer.epoch != job.register.epoch:
            return self._fence(now, job, node, answer.epoch) if answer.accepted else []
        register = job.register
        if register.state is JobState.PLACING:
            if not answer.accepted:
                return self._requeue(now, job, f"{self._name(node)} declined: {answer.reason}")
            effects = job.change(now, state=JobState.ACTIVE, phase=Phase.STAGING, heard_wall_s=now.wall_s)
            job.due = now.boot_s + self._timing.silence_s
            return [*effects, *job.after(Send(node, Activate(answer.job, answer.epoch)))]
        if register.state in (JobState.ACTIVE, JobState.UNKNOWN) and answer.accepted:
            return job.after(Send(node, Activate(answer.job, answer.epoch)))
        if register.state is JobState.QUEUED and answer.accepted:  # this epoch was given up before it was activated
            return job.after(Send(node, Fence(answer.job, answer.epoch)))
        return []

    def _fence(self, now: Now, job: HeldJob, node: NodeId, epoch: int) -> list[Effect]:
        """A node speaks of an epoch that is not the register's: it is spent, unless this register is behind others'."""
        if epoch > job.register.epoch and job.replica.others:
            return self._turns.ask(now, job)
        return job.after(Send(node, Fence(job.spec.job, epoch)))

    def _look_again(self, now: Now, job: HeldJob | None) -> list[Effect]:
        """A node speaks of a job for which this steward does not act: it asks for the turn, or tells who ought to."""
        if job is None:
            return []
        if not self._turns.is_first(job):
            return [Send(self._turns.first(job), job.accepted())]
        return self._turns.ask(now, job)

    def _requeue(
        self, now: Now, job: HeldJob, reason: str, report: AttemptReport | None = None, died: int = 0
    ) -> list[Effect]:
        """The attempt is over and nothing of it lives: its epoch is spent, the job waits again."""
        register = job.register
        had_started = register.started_wall_s is not None or (report is not None and report.started_wall_s is not None)
        effects = job.change(
            now,
            state=JobState.QUEUED,
            phase=None,
            detail="",
            started_wall_s=None,
            reason=reason,
            metric=None,
            died=register.died + died,
            ran_on=register.node if had_started else register.ran_on,
        )
        self._note_limit(now, job)
        job.due = self._offering.soon(now)
        return effects

    # -- while it runs ------------------------------------------------------------------------------------------------

    def reported(self, now: Now, node: NodeId, report: AttemptReport) -> list[Effect]:
        report = _clipped(report)
        job = self._find(report.job)
        ack = ReportAck(report.job, report.epoch)
        if job is None:
            return [Send(node, replace(ack, is_forgotten=True))] if report.result is not None else []
        if not job.acts:
            return self._look_again(now, job) if report.result is not None or self._turns.is_first(job) else []
        is_current = not job.state.is_final and self._is_at(node, job) and job.register.epoch == report.epoch
        if report.result is not None and (is_current or report.epoch <= job.register.epoch):
            effects = self._ended(now, job, report, report.result) if is_current else []
            return [*effects, *job.after(Send(node, ack))]
        if not is_current or job.state is JobState.QUEUED:  # spent, maybe before it was activated; it must not go on
            return self._fence(now, job, node, report.epoch)
        if job.state not in (JobState.ACTIVE, JobState.UNKNOWN, JobState.CANCELLING):
            return []
        is_cancelling = job.state is JobState.CANCELLING
        state = JobState.CANCELLING if is_cancelling else JobState.ACTIVE
        has_begun = report.started_wall_s != job.register.started_wall_s
        if not is_cancelling:
            job.due = now.boot_s + self._timing.silence_s
        return job.change(
            now,
            durable=has_begun,
            state=state,
            phase=report.phase,
            detail=report.detail,
            started_wall_s=report.started_wall_s,
            heard_wall_s=now.wall_s,
            metric=report.metric,
        )

    def printed(self, node: NodeId, output: AttemptOutput) -> list[Effect]:
        """What the attempt of a job printed last; kept in memory, of the TAILS_LIMIT jobs that printed last."""
        job = self._find(output.job)
        is_meant = job is not None and self._is_at(node, job) and job.register.epoch == output.epoch
        if job is None or not is_meant or job.spec.secrets is not None:
            return []
        if len(output.chunk.data) > CHUNK_LIMIT_BYTES or output.chunk.end <= output.chunk.start:
            return [Reject(node, "says of a log what cannot be")]
        epoch, tail = self._tails.pop(output.job, (0, Tail()))
        if epoch != output.epoch:
            tail = Tail()
        tail.add(output.chunk)
        self._tails[output.job] = output.epoch, tail
        if len(self._tails) > TAILS_LIMIT:
            del self._tails[next(iter(self._tails))]
        return []

    def _keep_receipt(self, job: HeldJob, report: AttemptReport, result: Result) -> list[Effect]:
        """Only what can be shown later: a receipt of this very attempt, which says what the report says."""
        if report.receipt is None:
            return []  # it was never accepted there
        try:
            receipt = read_receipt(report.receipt, self._log, self._notary)
            check_about(receipt, job.spec, self._notary.digest(job.signed), self._log)
            check_told(receipt, job.register, report, result)
        except TrustError as error:
            assert job.register.node is not None
            return [Reject(job.register.node, error.message)]
        job.receipt = report.receipt
        return []

    def _ended(self, now: Now, job: HeldJob, report: AttemptReport, result: Result) -> list[Effect]:
        register = job.register
        if register.state is JobState.QUEUED:
            return []
        rejects = self._keep_receipt(job, report, result)
        return [*rejects, *self._after_end(now, job, report, result)]

    def _after_end(self, now: Now, job: HeldJob, report: AttemptReport, result: Result) -> list[Effect]:
        register = job.register
        if register.state is JobState.CANCELLING or register.stop is not None:
            return self._finish(now, job, JobState.CANCELLED, report, result, result.reason)
        if result.outcome is AttemptState.EXITED:
            state = JobState.SUCCEEDED if result.exit_code == 0 else JobState.FAILED
            return self._finish(now, job, state, report, result, result.reason)
        if result.outcome is AttemptState.TIMED_OUT:  # it would only run out of time again
            return self._finish(now, job, JobState.FAILED, report, result, result.reason)
        if result.outcome is AttemptState.PREEMPTED:
            return self._requeue(now, job, result.reason, report)
        if report.started_wall_s is not None and register.died < job.spec.retries:
            return self._requeue(now, job, result.reason, report, died=1)
        if report.started_wall_s is None:
            job.unstarted += 1
            if job.unstarted < UNSTARTED_TRIES:
                return self._requeue(now, job, result.reason)
        return self._finish(now, job, JobState.FAILED, report, result, result.reason)

    def _finish(
        self, now: Now, job: HeldJob, state: JobState, report: AttemptReport | None, result: Result | None, reason: str
    ) -> list[Effect]:
        effects = job.change(
            now,
            state=state,
            phase=None,
            result=result,
            reason=reason,
            started_wall_s=report.started_wall_s if report else job.register.started_wall_s,
            metric=result.metric if result else job.register.metric,
            ended_wall_s=(report.ended_wall_s if report else None) or now.wall_s,
        )
        job.due = None
        self._file(job)
        return [*effects, *(self._drive_sweep_of(now, job) if job.is_over else ())]

    # -- what users ask -----------------------------------------------------------------------------------------------

    def asked(self, now: Now, peer: NodeId, ask: Ask, *, is_fresh: bool = False) -> list[Effect]:
        """is_fresh: its time was looked at before, when it came."""
        try:
            request = self._rules.verify_addressed(ask.request, peer)
            is_repeated = request.action in CHANGING and self.obeyed.has(ask.request.key, request.nonce)
            if not is_repeated and not is_fresh:
                self._rules.check_fresh_request(request, now, peer)
            job = self._visible(request)
            if job is not None and request.action in CHANGING and not job.acts:
                return self._keep_ask(now, job, peer, ask)
            views, effects = self._obey(now, peer, job, request, ask.request, is_repeated=is_repeated)
        except TrustError as error:
            answer = Answer(ask.query, (), error.code, error.message, challenge_of(error))
            return [Reject(peer, error.message), Send(peer, answer)]
        told = Send(peer, Answer(ask.query, views))
        return [*effects, *(job.after(told) if job is not None and request.action in CHANGING else (told,))]

    def _keep_ask(self, now: Now, job: HeldJob, peer: NodeId, ask: Ask) -> list[Effect]:
        """What changes a job waits for the turn, where it is this node's to take. Raises TrustError where it is not."""
        if not self._turns.is_first(job) or len(job.asks) >= WAITING_ASKS_LIMIT:
            raise TrustError(ELSEWHERE, "cannot change the job: another machine that holds it speaks for it now")
        job.asks.append((now.boot_s + ASK_KEPT_S, peer, ask))
        return self._turns.ask(now, job)

    def _visible(self, request: JobRequest) -> HeldJob | None:
        """The job that is asked about, None for a list. Raises TrustError in the same words, be it there or not."""
        if request.action is Action.LIST:
            return None
        job = self._find(request.job or JobId(""))
        if job is None or not (job.spec.user == request.user or job.spec.shared):
            raise TrustError("unknown-job", "cannot find that job among yours here", "meshgpu ps -a")
        return job

    def _obey(
        self, now: Now, peer: NodeId, job: HeldJob | None, request: JobRequest, signed: Signed, *, is_repeated: bool
    ) -> tuple[tuple[SignedView, ...], list[Effect]]:
        """What is answered, and what follows. job: what is asked about, None for a list. is_repeated: it was obeyed
        before, and changes nothing now.
        """
        if job is None:
            return self.views_of(request.user), []
        is_own = job.spec.user == request.user
        effects: list[Effect] = []
        match request.action:
            case Action.WATCH:
                job.watchers[peer] = now.boot_s + self._timing.watch_s
            case Action.STOP | Action.KILL if not is_own:
                raise TrustError("not-allowed", f"cannot {request.action} {job.spec.name}: {only_shared(job.spec)}")
            case Action.STOP | Action.KILL if not is_repeated:
                self.obeyed.check_room(now, signed.key, request.nonce)
                effects = self._stop(now, job, StopMode(request.action.value), signed)
                effects += self.obeyed.note(now, signed.key, request.nonce)
            case Action.STOP | Action.KILL:
                pass
            case Action.RECEIPT:
                return (replace(job.view(), receipt=job.receipt),), []
            case Action.LOGS | Action.FILES | Action.SUBMIT:
                raise TrustError("not-allowed", f"cannot answer {request.action} over a Link: it goes another way")
        return (replace(job.view(), register=job.register) if effects else job.view(),), effects

    def _stop(self, now: Now, job: HeldJob, mode: StopMode, signed: Signed) -> list[Effect]:
        """Ends a job for its user. What may live somewhere is cancelled only when its node confirms."""
        register = job.register
        if register.state.is_final or register.state is JobState.DRAFT or register.stop is StopMode.KILL:
            return []
        if job.spec.sweep is not None:
            return self._stop_sweep(now, job, mode, signed)
        if register.state is JobState.QUEUED:
            return self._finish(now, job, JobState.CANCELLED, None, None, "stopped before it started")
        job.cancel = signed
        job.due = now.boot_s + self._timing.cancel_s
        effects = job.change(now, state=JobState.CANCELLING, stop=mode)
        return [*effects, *job.after(*job.cancel_order())]

    def _stop_sweep(self, now: Now, sweep: HeldJob, mode: StopMode, signed: Signed) -> list[Effect]:
        """Ends all trials that have not ended, then the sweep."""
        sweep.cancel = signed
        effects = sweep.change(now, state=JobState.CANCELLING, stop=mode)
        for trial in [trial for trial in self._trials[sweep.spec.job].values() if trial.acts]:
            effects += self._stop(now, trial, mode, signed)
        return effects if sweep.state.is_final else [*effects, *self._drive(now, sweep)]

    # -- the cloud ----------------------------------------------------------------------------------------------------

    def demand(self, *, may_leave: bool) -> Demand:
        """Jobs for which no machine had room. may_leave: whether the mesh lets jobs leave the office at all."""
        return Demand(self._needs() if may_leave else (), self._offering.lines)

    def _needs(self) -> tuple[Need, ...]:
        """Those that may leave it, the oldest first.

        None with secrets: an instance that is rented for it could not read them.
        """
        waiting = [
            Need(job.spec.job, job.spec.resources, job.waits_since)
            for job in self._jobs.values()
            if job.acts
            and job.waits_since is not None
            and job.state is JobState.QUEUED
            and job.spec.cloud is not CloudUse.NEVER
            and job.spec.secrets is None
        ]
        waiting.sort(key=lambda need: (need.since_wall_s, need.job))
        return tuple(waiting[:NEEDS_LIMIT])

    def node_gone(self, now: Now, node: NodeId) -> list[Effect]:
        """An instance is gone for good: what it ran has died, whatever it last said."""
        there = [job for job in self._jobs.values() if job.acts and job.register.node == node]
        return [effect for job in there for effect in self._is_gone(now, job)]

    def _is_gone(self, now: Now, job: HeldJob) -> list[Effect]:
        """So is the machine that the register names."""
        register = job.register
        if register.state in (JobState.QUEUED, JobState.DRAFT) or register.state.is_final:
            return []
        if register.state is JobState.CANCELLING:
            return self._finish(now, job, JobState.CANCELLED, None, None, GONE)
        if register.started_wall_s is None:
            return self._requeue(now, job, GONE)
        if register.died < job.spec.retries:
            return self._requeue(now, job, GONE, died=1)
        return self._finish(now, job, JobState.FAILED, None, None, GONE)

    def keys_stopped(self, now: Now) -> list[Effect]:
        """A revocation may have ended the jobs of some keys: what waits is over; what runs its node stops by itself."""
        stopped = [job for job in self._jobs.values() if job.signed.key in self._log.stopped]
        effects: list[Effect] = []
        for job in sorted(stopped, key=lambda job: job.spec.sweep is None):  # sweeps first: they begin no more trials
            if job.acts:
                effects += self._key_stopped(now, job)
            elif job.is_unwritten:
                del self._jobs[job.spec.job]
        return effects

    def _key_stopped(self, now: Now, job: HeldJob) -> list[Effect]:
        if job.state is JobState.DRAFT:
            del self._jobs[job.spec.job]  # nobody was told that it is here
            return []
        if job.state not in (JobState.ACTIVE, JobState.UNKNOWN, JobState.CANCELLING) or job.spec.sweep is not None:
            return self._finish(now, job, JobState.CANCELLED, None, None, STOPPED)
        if job.state is JobState.CANCELLING:
            return []
        job.due = None
        return job.change(now, state=JobState.CANCELLING, stop=StopMode.STOP, reason=STOPPED)

    # -- time ---------------------------------------------------------------------------------------------------------

    def room_changed(self, now: Now) -> None:
        """Somebody's capacity changed: jobs that wait may try again at once."""
        self._offering.room_changed(now, self._jobs.values())

    def step(self, now: Now) -> list[Effect]:
        effects = [*self._take_turns(now), *self._expire(now)]
        for job in [*self._jobs.values(), *self._unheard()]:
            if job.resend_at is not None and now.boot_s >= job.resend_at:
                effects += self._turns.resend(now, job)
            if job.due is None or now.boot_s < job.due or not job.replica.is_settled:
                continue
            match job.state:
                case JobState.QUEUED if job.offers:
                    effects.extend(self._place(now, job))
                case JobState.QUEUED:
                    self._offering.retry_at = now.boot_s
                case JobState.PLACING:
                    effects.extend(self._requeue(now, job, f"{self._name(job.register.node)} did not answer in time"))
                case JobState.ACTIVE:
                    job.due = None
                    effects.extend(job.change(now, durable=False, state=JobState.UNKNOWN))
                case JobState.CANCELLING:
                    job.due = now.boot_s + self._timing.cancel_s
                    effects.extend(job.cancel_order())
                case _:
                    job.due = None
        if self._offering.retry_at is not None and now.boot_s >= self._offering.retry_at:
            effects.extend(self._offering.place_waiting(now, self._jobs.values()))
        if self._sweep_at is not None and now.boot_s >= self._sweep_at:
            self._sweep_at = now.boot_s + self._timing.sweep_s
            effects.extend(self._forget_old(now))
            effects.extend(self.obeyed.forget_old(now))
        return effects

    def _note_limit(self, now: Now, job: HeldJob) -> None:
        """The job may have begun to wait."""
        if job.may_wait_s(now) is not None:
            self._expiry_at = now.boot_s

    def _expire(self, now: Now) -> list[Effect]:
        """End jobs that were to start by now and never did. One that is being placed is not among them."""
        if self._expiry_at is None or now.boot_s < self._expiry_at:
            return []
        effects: list[Effect] = []
        spans: list[float] = []
        for job in [job for job in self._jobs.values() if job.acts and job.replica.is_settled]:
            left_s = job.may_wait_s(now)
            if left_s is not None and left_s > 0:
                spans.append(left_s)
            elif left_s is not None:
                reason = f"did not start within {span(round(job.spec.start_within_s or 0.0))}"
                reason = f"{reason}: {job.register.reason}" if job.register.reason else reason
                effects += self._finish(now, job, JobState.EXPIRED, None, None, reason)
        self._expiry_at = now.boot_s + min(CLOCK_S, *spans) if spans else None
        return effects

    def deadline(self) -> float | None:
        dues = (job.due for job in self._jobs.values() if job.replica.is_settled)
        resends = (job.resend_at for job in (*self._jobs.values(), *self._unheard()))
        return earliest(self._sweep_at, self._offering.retry_at, self._turn_at, self._expiry_at, *dues, *resends)

    def _forget_old(self, now: Now) -> list[Effect]:
        for draft in [job for job in self._jobs.values() if self._is_abandoned(now, job)]:
            del self._jobs[draft.spec.job]
        old = [
            job
            for job, found in self._final.items()
            if now.wall_s >= (found.register.ended_wall_s or 0.0) + self._timing.retention_s
        ]
        for job in old:
            del self._final[job]
            self._ending.pop(job, None)
            self._doubted.pop(job, None)
            self._trials.pop(job, None)
            self._tails.pop(job, None)
        return [Persist("job", job, None) for job in old]

    def _is_abandoned(self, now: Now, job: HeldJob) -> bool:
        """Whether it is a draft of which nothing came, and nothing is on disk: who was to speak for it is gone."""
        is_old = now.wall_s >= job.register.submitted_wall_s + DRAFT_S
        return is_old and job.is_unwritten and job.answer_to is None and job.trial is None

    # -- inside -------------------------------------------------------------------------------------------------------

    def _is_at(self, node: NodeId, job: HeldJob) -> bool:
        """Whether the register names that machine, under the keys it has now."""
        return job.register.node is not None and self._log.current(job.register.node) == node

    def _name(self, node: NodeId | None) -> str:
        member = self._log.members.get(self._log.current(node)) if node else None
        return member.name if member else "the machine"


def challenge_of(error: MeshgpuError) -> Challenge | None:
    """What a refusal offers to be signed."""
    if not isinstance(error, StaleRequest) or not error.challenge:
        return None
    return Challenge(error.challenge, error.wall_s, error.refused)


def only_shared(spec: JobSpec) -> str:
    """Why a job of another user can be seen and not ended."""
    return f"it belongs to {spec.user}, who lets others see it only"


def _clipped(report: AttemptReport) -> AttemptReport:
    """A node may say much; what is kept of it is bounded."""
    result = report.result and replace(report.result, reason=report.result.reason[:REASON_CHARACTERS])
    return replace(report, detail=report.detail[:REASON_CHARACTERS], result=result)
