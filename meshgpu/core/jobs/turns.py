"""Whose turn it is to change a register, and what its stewards say to one another about it.

The first steward that is there speaks for all; the next takes over when those before it have been away for a while.
That is a courtesy: whoever asks, a register changes only as `Replica` allows.
"""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from meshgpu.core.effects import Effect, Send
from meshgpu.core.jobs.held_job import RESEND_S, HeldJob
from meshgpu.model.clock import Now
from meshgpu.model.ids import NodeId
from meshgpu.model.job import NO_STAMP, JobState, Register
from meshgpu.model.messages import Accept, Accepted, Prepare, Promise
from meshgpu.model.trust import Notary, Signed


@dataclass(frozen=True, slots=True)
class TurnTiming:
    """takeover_s: for how long all before it must be away until a steward takes over, times its rank.
    ask_s: how often it asks for the turn again.
    """

    takeover_s: float = 5.0
    ask_s: float = 1.0


class Turns:
    """For all jobs of one node. `is_alive(node)`: whether a machine, by the id that it has now, is there."""

    def __init__(
        self, notary: Notary, rng: random.Random, is_alive: Callable[[NodeId], bool], timing: TurnTiming
    ) -> None:
        self._notary = notary
        self._rng = rng
        self._is_alive = is_alive
        self._timing = timing
        self._away: dict[NodeId, float] = {}

    def look(self, now: Now, stewards: Iterable[NodeId]) -> bool:
        """Note who of them is away, and since when it was looked; returns whether that has changed."""
        away = {steward: self._away.get(steward, now.boot_s) for steward in stewards if not self._is_alive(steward)}
        has_changed = away.keys() != self._away.keys()
        self._away = away
        return has_changed

    def is_first(self, job: HeldJob) -> bool:
        """Whether no steward that speaks before this one is there."""
        return not any(self._is_alive(job.current(steward)) for steward in job.replica.stewards[: job.rank])

    def first(self, job: HeldJob) -> NodeId:
        """The steward that ought to speak for the job, by the id that it has now."""
        stewards = [job.current(steward) for steward in job.replica.stewards]
        return next((steward for steward in stewards[: job.rank] if self._is_alive(steward)), stewards[job.rank])

    def is_orphaned(self, job: HeldJob) -> bool:
        """Whether who spoke for the job last is away, and it is another's than this steward's to take over."""
        speaker = job.current(job.replica.stamp.ballot.steward)
        return job.replica.value is not None and not self._is_alive(speaker) and not self.is_first(job)

    def due(self, now: Now, job: HeldJob) -> float | None:
        """`boot_s` at which this node asks for the turn, or asks again; None where it leaves it to another."""
        if not job.acts and job.replica.asked is not None:
            return job.ask_at  # whoever was asked is bound by that: see it through
        if job.acts or not self.is_first(job):
            return None
        before = (job.current(steward) for steward in job.replica.stewards[: job.rank])
        alone_since = max((self._away.get(steward, -math.inf) for steward in before), default=now.boot_s)
        at = alone_since + self._timing.takeover_s * job.rank
        return max(at, job.ask_at) if job.ask_at is not None else at

    # -- in its own turn, or on the way to it -------------------------------------------------------------------------

    def ask(self, now: Now, job: HeldJob) -> list[Effect]:
        """Ask for the turn, or ask those again who have not answered; not before the last try had its time."""
        if job.ask_at is not None and now.boot_s < job.ask_at:
            return []
        job.ask_at = now.boot_s + self._timing.ask_s * self._rng.uniform(0.8, 1.2)
        if job.replica.asked is not None:
            return job.prepares()
        if job.acts:  # it was told that others may be further: what it had in mind may be of no use
            job.stand_back()
        job.replica.ask()
        return [job.persist(), *(job.prepares() if job.replica.asked is not None else ())]

    def promised(self, now: Now, job: HeldJob, steward: NodeId, promise: Promise) -> bool:
        """Whether the turn is won by that answer; then the job stands as the newest that anybody had accepted."""
        stamp = promise.standing.register.stamp if promise.standing else NO_STAMP
        is_won = job.replica.answered(steward, promise.ballot, promise.promised, stamp, promise.standing)
        if is_won:
            job.ask_at = None
            job.take_up()
        elif promise.promised > promise.ballot:
            self._outbid(now, job)
        return is_won

    def confirmed(self, now: Now, job: HeldJob, steward: NodeId, accepted: Accepted) -> list[Effect]:
        """A fellow tells how far it is: what follows from the changes that are chosen by that."""
        if accepted.is_lacking:  # what was accepted here may be passed on by anybody
            job.informed.discard(steward)
            return job.accepts([steward])
        acted = job.acts
        has_chosen = job.replica.confirmed(steward, accepted.stamp, accepted.promised)
        if acted and not job.acts:
            job.stand_back()
            self._outbid(now, job)
            return []
        job.informed.add(steward)
        if accepted.vote is not None and accepted.stamp == job.register.stamp and job.state is JobState.PLACING:
            job.votes[steward] = accepted.vote
        return job.chosen(now) if has_chosen else []

    def resend(self, now: Now, job: HeldJob) -> list[Effect]:
        """Tell those that are there and behind once more; those that are away are told when they come."""
        there = [steward for steward in job.replica.behind() if self._is_alive(job.current(steward))]
        job.resend_at = now.boot_s + RESEND_S if there else None
        return job.accepts(there)

    def _outbid(self, now: Now, job: HeldJob) -> None:
        """Two ask at once: not both again at once."""
        job.ask_at = now.boot_s + self._timing.ask_s * self._rng.uniform(0.5, 1.5)

    # -- in another's turn --------------------------------------------------------------------------------------------

    def prepared(self, job: HeldJob, peer: NodeId, prepare: Prepare) -> list[Effect]:
        """Another steward asks for the turn."""
        acted = job.acts
        is_granted = job.replica.prepare(prepare.ballot)
        if acted and not job.acts:
            job.stand_back()
        return [*([job.persist()] if is_granted else ()), Send(peer, job.promise(prepare))]

    def accept(self, job: HeldJob, peer: NodeId, accept: Accept) -> list[Effect]:
        """Another's change."""
        before = job.register
        acted, was = job.acts, (job.replica.stamp, job.replica.promised)
        register = accept.standing.register
        is_accepted = job.replica.accept(register.stamp, accept.standing)
        if acted and not job.acts:
            job.stand_back()
        is_new = was != (job.replica.stamp, job.replica.promised)
        if is_new:
            job.take_up()
        vote = self._vote(job, before) if is_accepted and register.stamp == job.replica.stamp else None
        return [*([job.persist()] if is_new else ()), Send(peer, job.accepted(vote))]

    def _vote(self, job: HeldJob, before: Register) -> Signed | None:
        """For a placing; one for each epoch."""
        register = job.register
        is_other = (before.node, before.hold) != (register.node, register.hold)
        if register.state is not JobState.PLACING or (before.epoch == register.epoch and is_other):
            return None
        return job.vote(self._notary)
