"""The registers this node holds as a steward: from draft to final, one compare-and-set at a time.

Thin form: a set of one steward, whose own vote is the quorum. A job has at most one attempt that may live: a new
epoch is offered only after the node of the last one said that it ended, or before it was ever activated.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from meshgpu.core.effects import Effect, FetchTree, Persist, Reject, Send
from meshgpu.core.jobs import sweeps
from meshgpu.core.jobs.held_job import HeldJob
from meshgpu.core.jobs.listing import listed
from meshgpu.core.jobs.offering import Offering, OfferTiming
from meshgpu.core.jobs.placement import Candidate, Guest
from meshgpu.core.statemachine import earliest
from meshgpu.core.sweep import check_space, trial_spec
from meshgpu.core.trust.freshness import Obeyed
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.receipts import check_about, check_told, read_receipt
from meshgpu.core.trust.requests import STOPPED, RequestRules
from meshgpu.errors import MeshgpuError, StaleRequest, TrustError
from meshgpu.model.clock import Now
from meshgpu.model.gossip import NEEDS_LIMIT, Demand, Need
from meshgpu.model.ids import Digest, JobId, NodeId, UserName
from meshgpu.model.job import (
    Action,
    AttemptState,
    CloudUse,
    JobRequest,
    JobSpec,
    JobState,
    JobView,
    Phase,
    Register,
    Result,
    StopMode,
)
from meshgpu.model.messages import (
    Activate,
    Answer,
    Ask,
    AttemptReport,
    Challenge,
    CommitAnswer,
    Fence,
    OfferAnswer,
    Release,
    ReportAck,
    SignedView,
    Submit,
    SubmitAnswer,
)
from meshgpu.model.records import JobRecord
from meshgpu.model.trust import Notary, Signed

UNFINISHED_LIMIT: Final = 5_000
"""A user's unfinished jobs at most: a loop must not fill a colleague's memory."""

SPEC_LIMIT_BYTES: Final = 256 * 1024
"""A signed spec at most: environment variables and a requirements file fit, data does not."""

USER_LIMIT_BYTES: Final = 64 * 2**20
"""Of all specs of one user that are kept: sixty thousand ordinary jobs."""

REASON_CHARACTERS: Final = 2_000
"""Of what a node tells about an attempt: the last lines of a failed build; a register must fit a frame."""

GONE: Final = "the instance it ran on is gone"

CHANGING: Final = (Action.STOP, Action.KILL)
"""Requests that are obeyed once, however often they come."""

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
    placing_s: float = 15.0
    silence_s: float = 12.0
    cancel_s: float = 2.0
    watch_s: float = 15.0
    sweep_s: float = 3600.0
    retention_s: float = 30 * 86400.0


class Stewardship:
    """All registers of this node. `candidates(guest, machine)` is the mesh as known here."""

    def __init__(
        self,
        node: NodeId,
        log: MeshLog,
        rules: RequestRules,
        notary: Notary,
        rng: random.Random,
        candidates: Callable[[Guest, NodeId | None], list[Candidate]],
        timing: StewardTiming,
    ) -> None:
        self._node = node
        self._log = log
        self._rules = rules
        self._notary = notary
        self._timing = timing
        self._offering = Offering(rng, candidates, timing.offers)
        self._jobs: dict[JobId, HeldJob] = {}
        self._final: dict[JobId, HeldJob] = {}
        self._trials: dict[JobId, dict[int, HeldJob]] = {}
        self._sweep_at: float | None = None
        self.obeyed = Obeyed()

    def restore(self, now: Now, records: Iterable[JobRecord]) -> list[Effect]:
        """Take up the registers of an earlier agent, each where it stood."""
        self._sweep_at = now.boot_s + self._timing.sweep_s
        effects: list[Effect] = []
        for record in records:
            try:
                asked = self._rules.verify_spec(record.spec)
                spec = asked if record.trial is None else trial_spec(asked, record.trial)
            except TrustError as error:
                effects.append(Reject(self._node, error.message))
                continue
            job = HeldJob(spec, record.spec, record.register, now.boot_s, cancel=record.cancel, trial=record.trial)
            job.receipt = record.receipt
            if record.trial is not None:
                job.sweep = asked
                self._trials.setdefault(asked.job, {})[record.trial.number] = job
            if record.register.state in (JobState.ACTIVE, JobState.UNKNOWN):
                job.due = now.boot_s + self._timing.silence_s
            if spec.sweep is not None:
                job.due = None  # its trials have their own
            (self._final if record.register.state.is_final else self._jobs)[spec.job] = job
        for job in [job for job in self._jobs.values() if job.spec.sweep is not None]:
            effects += self._drive(now, job)
        return effects

    # -- reading ------------------------------------------------------------------------------------------------------

    def view(self, job: JobId) -> JobView | None:
        found = self._jobs.get(job) or self._final.get(job)
        return JobView(found.spec, found.register, found.trial, found.sweep) if found else None

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
        """The job's tree, if `peer` runs the job now."""
        found = self._jobs.get(job)
        return found.spec.tree if found is not None and self._is_at(peer, found) else None

    # -- submitting ---------------------------------------------------------------------------------------------------

    def submitted(self, now: Now, peer: NodeId, submit: Submit) -> list[Effect]:
        known = self._jobs.get(submit.job) or self._final.get(submit.job)
        if known is not None:
            if not self._is_same(known, submit.spec):
                return [Send(peer, SubmitAnswer(submit.job, held=False, code="bad-request", reason="the id is taken"))]
            return [Send(peer, SubmitAnswer(submit.job, held=known.register.state is not JobState.DRAFT))]
        try:
            spec = self._rules.verify_new_spec(submit.spec)
            self._check_acceptable(spec, peer, submit)
            self._rules.check_fresh_spec(spec, now, peer)
        except MeshgpuError as error:
            challenge = challenge_of(error)
            answer = SubmitAnswer(submit.job, False, code=error.code, reason=error.message, challenge=challenge)
            return [Reject(peer, error.message), Send(peer, answer)]
        register = Register(spec.job, JobState.DRAFT, submitted_wall_s=now.wall_s)
        self._jobs[spec.job] = HeldJob(spec, submit.spec, register)
        return [FetchTree(spec.job, spec.tree, (spec.submitter,))]

    def _is_same(self, known: HeldJob, signed: Signed) -> bool:
        """Whether it is the job that is held, as it was before or after its submitter was challenged."""
        if known.signed == signed:
            return True
        try:
            one, other = (replace(self._rules.verify_spec(s), challenge=b"") for s in (known.signed, signed))
        except TrustError:
            return False
        return one == other and one.job == known.spec.job

    def _check_acceptable(self, spec: JobSpec, peer: NodeId, submit: Submit) -> None:
        if spec.job != submit.job or spec.submitter != peer:
            raise TrustError("not-allowed", "cannot hold a job: it was not sent by the machine that signed it")
        if spec.stewards != (self._node,):
            raise TrustError("not-allowed", "cannot hold a job: it names other machines to hold it")
        if sum(job.spec.user == spec.user for job in self._jobs.values()) >= UNFINISHED_LIMIT:
            raise TrustError("too-many-jobs", f"cannot hold a job: {UNFINISHED_LIMIT} of yours are here already")
        held = (*self._jobs.values(), *self._final.values())
        if (
            sum(len(job.signed.payload) for job in held if job.spec.user == spec.user and job.trial is None)
            >= USER_LIMIT_BYTES
        ):
            raise TrustError("too-many-jobs", "cannot hold a job: your jobs of the last 30 days fill what is kept here")
        if spec.sweep is not None:
            check_space(spec.sweep, spec.command)
        if len(submit.spec.payload) > SPEC_LIMIT_BYTES:
            raise TrustError("too-large", f"cannot hold a job: its request has more than {SPEC_LIMIT_BYTES} bytes")

    # -- sweeps -------------------------------------------------------------------------------------------------------

    def _drive(self, now: Now, sweep: HeldJob) -> list[Effect]:
        """Begin the trials that are due, or end the sweep; to be asked whenever one of its trials ends."""
        trials = self._trials.setdefault(sweep.spec.job, {})
        effects: list[Effect] = []
        for trial in sweeps.beginning(sweep, trials.values()):
            spec = trial_spec(sweep.spec, trial)
            register = Register(spec.job, JobState.DRAFT, submitted_wall_s=now.wall_s)
            job = HeldJob(spec, sweep.signed, register, trial=trial, sweep=sweep.spec)
            trials[trial.number] = self._jobs[spec.job] = job
            effects += job.change(now, state=JobState.QUEUED)
            self._offering.retry_at = now.boot_s
        if end := sweeps.ending(sweep, trials.values()):
            return [*effects, *self._finish(now, sweep, end[0], None, None, end[1])]
        if sweep.state is JobState.QUEUED:
            effects += sweep.change(now, state=JobState.ACTIVE, started_wall_s=now.wall_s)
            sweep.due = None
        return effects

    # -- while the tree comes -----------------------------------------------------------------------------------------

    def tree_progressed(self, job: JobId, done_bytes: int, total_bytes: int) -> list[Effect]:
        found = self._jobs.get(job)
        if found is None or found.state is not JobState.DRAFT:
            return []
        return [Send(found.spec.submitter, SubmitAnswer(job, False, done_bytes, total_bytes))]

    def tree_failed(self, job: JobId, code: str, reason: str) -> list[Effect]:
        found = self._jobs.get(job)
        if found is None or found.state is not JobState.DRAFT:
            return []
        del self._jobs[job]
        return [Send(found.spec.submitter, SubmitAnswer(job, held=False, code=code, reason=reason))]

    def tree_arrived(self, now: Now, job: JobId) -> list[Effect]:
        """Spec and tree are here: the job is durable, and only now may its id be printed."""
        found = self._jobs.get(job)
        if found is None or found.state is not JobState.DRAFT:
            return []
        effects = found.change(now, state=JobState.QUEUED)
        return [
            *effects,
            *(self._drive(now, found) if found.spec.sweep is not None else ()),
            Send(found.spec.submitter, SubmitAnswer(job, held=True)),
            *self._offering.place_waiting(now, self._jobs.values()),
        ]

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
        return [*effects, Send(chosen.node, job.commit(self._notary, self._node)), *others]

    def commit_answered(self, now: Now, node: NodeId, answer: CommitAnswer) -> list[Effect]:
        job = self._jobs.get(answer.job)
        if job is None or not self._is_at(node, job) or answer.epoch != job.register.epoch:
            is_stale = answer.accepted and (job is not None or answer.job in self._final)
            return [Send(node, Fence(answer.job, answer.epoch))] if is_stale else []
        register = job.register
        if register.state is JobState.PLACING:
            if not answer.accepted:
                return self._requeue(now, job, f"{self._name(node)} declined: {answer.reason}")
            effects = job.change(now, state=JobState.ACTIVE, phase=Phase.STAGING, heard_wall_s=now.wall_s)
            job.due = now.boot_s + self._timing.silence_s
            return [*effects, Send(node, Activate(answer.job, answer.epoch))]
        if register.state in (JobState.ACTIVE, JobState.UNKNOWN) and answer.accepted:
            return [Send(node, Activate(answer.job, answer.epoch))]
        if register.state is JobState.QUEUED and answer.accepted:  # this epoch was given up before it was activated
            return [Send(node, Fence(answer.job, answer.epoch))]
        return []

    def _requeue(self, now: Now, job: HeldJob, reason: str, died: int = 0) -> list[Effect]:
        """The attempt is over and nothing of it lives: its epoch is spent, the job waits again."""
        effects = job.change(
            now,
            state=JobState.QUEUED,
            phase=None,
            detail="",
            started_wall_s=None,
            reason=reason,
            metric=None,
            died=job.register.died + died,
        )
        job.due = self._offering.soon(now)
        return effects

    # -- while it runs ------------------------------------------------------------------------------------------------

    def reported(self, now: Now, node: NodeId, report: AttemptReport) -> list[Effect]:
        report = _clipped(report)
        job = self._jobs.get(report.job)
        if job is None or not self._is_at(node, job) or job.register.epoch != report.epoch:
            return self._answer_stale(node, report)
        if report.result is not None:
            rejects = self._keep_receipt(job, report, report.result)
            effects = self._ended(now, job, report, report.result)
            return [*rejects, *effects, Send(node, ReportAck(report.job, report.epoch))]
        if job.state is JobState.QUEUED:  # spent before it was activated; it must not go on
            return [Send(node, Fence(report.job, report.epoch))]
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

    def _answer_stale(self, node: NodeId, report: AttemptReport) -> list[Effect]:
        """A report of an epoch that is not the register's (any more), or of a job that was forgotten long ago."""
        if report.result is not None:
            return [Send(node, ReportAck(report.job, report.epoch))]
        is_known = report.job in self._jobs or report.job in self._final
        return [Send(node, Fence(report.job, report.epoch))] if is_known else []

    def _ended(self, now: Now, job: HeldJob, report: AttemptReport, result: Result) -> list[Effect]:
        register = job.register
        if register.state is JobState.QUEUED:
            return []
        if register.state is JobState.CANCELLING or register.stop is not None:
            return self._finish(now, job, JobState.CANCELLED, report, result, result.reason)
        if result.outcome is AttemptState.EXITED:
            state = JobState.SUCCEEDED if result.exit_code == 0 else JobState.FAILED
            return self._finish(now, job, state, report, result, result.reason)
        if result.outcome is AttemptState.PREEMPTED:
            return self._requeue(now, job, result.reason)
        if report.started_wall_s is not None and register.died < job.spec.retries:
            return self._requeue(now, job, result.reason, died=1)
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
        job.cancel = None
        self._final[job.spec.job] = self._jobs.pop(job.spec.job)
        if job.sweep is not None and (sweep := self._jobs.get(job.sweep.job)) is not None:
            effects += self._drive(now, sweep)
        return effects

    # -- what users ask -----------------------------------------------------------------------------------------------

    def asked(self, now: Now, peer: NodeId, ask: Ask) -> list[Effect]:
        try:
            request = self._rules.verify_addressed(ask.request, peer)
            is_repeated = request.action in CHANGING and self.obeyed.has(ask.request.key, request.nonce)
            if not is_repeated:
                self._rules.check_fresh_request(request, now, peer)
            views, effects = self._obey(now, peer, request, ask.request, is_repeated=is_repeated)
        except TrustError as error:
            answer = Answer(ask.query, (), error.code, error.message, challenge_of(error))
            return [Reject(peer, error.message), Send(peer, answer)]
        return [*effects, Send(peer, Answer(ask.query, views))]

    def _obey(
        self, now: Now, peer: NodeId, request: JobRequest, signed: Signed, *, is_repeated: bool = False
    ) -> tuple[tuple[SignedView, ...], list[Effect]]:
        """What is answered, and what follows. is_repeated: it was obeyed before, and changes nothing now."""
        if request.action is Action.LIST:
            return self.views_of(request.user), []
        job = self._jobs.get(request.job or JobId("")) or self._final.get(request.job or JobId(""))
        is_own = job is not None and job.spec.user == request.user
        if job is None or not (is_own or job.spec.shared):  # the same words, so that nobody learns what exists
            raise TrustError("unknown-job", "cannot find that job among yours here", "meshgpu ps -a")
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
            case Action.LOGS | Action.FILES:
                raise TrustError("not-allowed", f"cannot answer {request.action} over a Link: it is a bulk stream")
        return (job.view(),), effects

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
        return [*effects, *job.cancel_order(self._log.current)]

    def _stop_sweep(self, now: Now, sweep: HeldJob, mode: StopMode, signed: Signed) -> list[Effect]:
        """Ends all trials that have not ended, then the sweep."""
        effects = sweep.change(now, state=JobState.CANCELLING, stop=mode)
        for trial in list(self._trials[sweep.spec.job].values()):
            effects += self._stop(now, trial, mode, signed)
        return effects if sweep.state.is_final else [*effects, *self._drive(now, sweep)]

    # -- the cloud ----------------------------------------------------------------------------------------------------

    def demand(self) -> Demand:
        """Jobs that may leave the office and for which no machine had room, the oldest first.

        None with secrets: an instance that is rented for it could not read them.
        """
        waiting = [
            Need(job.spec.job, job.spec.resources, job.waits_since)
            for job in self._jobs.values()
            if job.waits_since is not None
            and job.state is JobState.QUEUED
            and job.spec.cloud is not CloudUse.NEVER
            and job.spec.secrets is None
        ]
        waiting.sort(key=lambda need: (need.since_wall_s, need.job))
        return Demand(tuple(waiting[:NEEDS_LIMIT]))

    def node_gone(self, now: Now, node: NodeId) -> list[Effect]:
        """An instance is gone for good: what it ran has died, whatever it last said."""
        effects: list[Effect] = []
        for job in list(self._jobs.values()):
            register = job.register
            if register.node != node or register.state in (JobState.QUEUED, JobState.DRAFT):
                continue
            if register.state is JobState.CANCELLING:
                effects += self._finish(now, job, JobState.CANCELLED, None, None, GONE)
            elif register.started_wall_s is None:
                effects += self._requeue(now, job, GONE)
            elif register.died < job.spec.retries:
                effects += self._requeue(now, job, GONE, died=1)
            else:
                effects += self._finish(now, job, JobState.FAILED, None, None, GONE)
        return effects

    def keys_stopped(self, now: Now) -> list[Effect]:
        """A revocation may have ended the jobs of some keys: what waits is over; what runs its node stops by itself."""
        stopped = [job for job in self._jobs.values() if job.signed.key in self._log.stopped]
        effects: list[Effect] = []
        for job in sorted(stopped, key=lambda job: job.spec.sweep is None):  # sweeps first: they begin no more trials
            if job.state is JobState.DRAFT:
                del self._jobs[job.spec.job]  # nobody was told that it is here
            elif (
                job.state not in (JobState.ACTIVE, JobState.UNKNOWN, JobState.CANCELLING) or job.spec.sweep is not None
            ):
                effects += self._finish(now, job, JobState.CANCELLED, None, None, STOPPED)
            elif job.state is not JobState.CANCELLING:
                job.due = None
                effects += job.change(now, state=JobState.CANCELLING, stop=StopMode.STOP, reason=STOPPED)
        return effects

    # -- time ---------------------------------------------------------------------------------------------------------

    def room_changed(self, now: Now) -> None:
        """Somebody's capacity changed: jobs that wait may try again at once."""
        self._offering.room_changed(now, self._jobs.values())

    def step(self, now: Now) -> list[Effect]:
        effects: list[Effect] = []
        for job in list(self._jobs.values()):
            if job.due is None or now.boot_s < job.due:
                continue
            match job.state:
                case JobState.QUEUED if job.offers:
                    effects.extend(self._place(now, job))
                case JobState.QUEUED:
                    job.due = None
                    self._offering.retry_at = now.boot_s
                case JobState.PLACING:
                    effects.extend(self._requeue(now, job, f"{self._name(job.register.node)} did not answer in time"))
                case JobState.ACTIVE:
                    job.due = None
                    effects.extend(job.change(now, durable=False, state=JobState.UNKNOWN))
                case JobState.CANCELLING:
                    job.due = now.boot_s + self._timing.cancel_s
                    effects.extend(job.cancel_order(self._log.current))
                case _:
                    job.due = None
        if self._offering.retry_at is not None and now.boot_s >= self._offering.retry_at:
            effects.extend(self._offering.place_waiting(now, self._jobs.values()))
        if self._sweep_at is not None and now.boot_s >= self._sweep_at:
            self._sweep_at = now.boot_s + self._timing.sweep_s
            effects.extend(self._forget_old(now))
            effects.extend(self.obeyed.forget_old(now))
        return effects

    def deadline(self) -> float | None:
        return earliest(self._sweep_at, self._offering.retry_at, *(job.due for job in self._jobs.values()))

    def _forget_old(self, now: Now) -> list[Effect]:
        old = [
            job
            for job, found in self._final.items()
            if now.wall_s >= (found.register.ended_wall_s or 0.0) + self._timing.retention_s
        ]
        for job in old:
            del self._final[job]
            self._trials.pop(job, None)
        return [Persist("job", job, None) for job in old]

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
