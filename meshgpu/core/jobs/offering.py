"""Finding a machine for jobs that wait: offers to three, a few rounds, then a reason, and again when room appears.

Jobs are offered in the order of `queue`. One that finds no room may claim a machine: what it needs there is kept free
for it, if it has waited for long at the head of the queue, or cleared of jobs that give way to its priority.

Knows nothing of registers beyond "it waits": what a chosen hold means is the steward's business.
"""

import random
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from meshgpu.core.effects import Effect, Send
from meshgpu.core.jobs.held_job import HeldJob
from meshgpu.core.jobs.placement import Candidate, Guest, Rule, clearable, explain, rank
from meshgpu.core.jobs.queue import CLAIM_AFTER_S, COURTESY_LIMIT, COURTESY_S, Crowd, Order, lines
from meshgpu.core.statemachine import earliest
from meshgpu.model.clock import Now
from meshgpu.model.gossip import Line
from meshgpu.model.ids import HoldId, NodeId
from meshgpu.model.job import JobState
from meshgpu.model.messages import OfferAnswer, Release
from meshgpu.model.resources import GpuShare

OFFERING_LIMIT: Final = 32
"""Jobs that are offered at the same time: enough to fill an office quickly, not a flood."""


@dataclass(frozen=True, slots=True)
class OfferTiming:
    """offer_s: how long offers may stay unanswered. rounds: offers in quick succession before the job waits.
    pause_s: longest pause between rounds. retry_s: how often a waiting job is offered again although nothing changed.
    """

    offer_s: float = 0.5
    rounds: int = 3
    pause_s: float = 0.5
    retry_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Chosen:
    """The best hold that was offered."""

    node: NodeId
    hold: HoldId
    gpus: tuple[GpuShare, ...]


class Offering:
    """Offers of all waiting jobs of one steward. `candidates(guest, machine)` and `crowd()`: the mesh as known here."""

    def __init__(
        self,
        rng: random.Random,
        candidates: Callable[[Guest, NodeId | None], list[Candidate]],
        crowd: Callable[[], Crowd],
        timing: OfferTiming,
    ) -> None:
        self._rng = rng
        self._candidates = candidates
        self._crowd = crowd
        self._timing = timing
        self.retry_at: float | None = None
        """`boot_s` at which waiting jobs are looked at again; None while none waits."""
        self.lines: tuple[Line, ...] = ()
        """What found no machine when it was last looked at."""

    def soon(self, now: Now) -> float:
        """A moment shortly from now, not the same for all: two who collided once shall not collide again."""
        return now.boot_s + self._rng.uniform(0.05, self._timing.pause_s)

    def _later(self, now: Now) -> float:
        return now.boot_s + self._timing.retry_s * self._rng.uniform(0.8, 1.2)

    def room_changed(self, now: Now, jobs: Iterable[HeldJob]) -> None:
        """Somebody's capacity changed: jobs that wait may try again at once, but for those that let others pass."""
        self.retry_at = now.boot_s
        soon_s = now.boot_s + COURTESY_LIMIT * COURTESY_S
        for job in jobs:
            if job.state is JobState.QUEUED and not job.offers and job.due is not None and job.due > soon_s:
                job.due = None

    def place_waiting(self, now: Now, jobs: Iterable[HeldJob]) -> list[Effect]:
        """Offer what waits, in turn. What finds no room costs one look for all jobs that ask for the same."""
        effects: list[Effect] = []
        hopeless: dict[tuple[object, ...], str] = {}
        waiting = [job for job in jobs if is_waiting(job)]
        offering = sum(bool(job.offers) for job in waiting)
        self.retry_at = None
        self.lines = lines(job for job in waiting if job.waits_since is not None)
        if not waiting:
            return effects
        crowd = self._crowd()
        order = Order([job for job in waiting if not job.offers], crowd)
        is_head, heads = not offering, crowd.heads()
        while (job := order.next()) is not None:
            before = bisect_left(heads, crowd.key_of(job))
            is_head, may_claim = False, is_head and not before
            if job.due is None and before:
                job.due = now.boot_s + min(before, COURTESY_LIMIT) * COURTESY_S
            if job.due is not None and now.boot_s < job.due:
                self.retry_at = earliest(self.retry_at, job.due)
                continue
            job.due = None
            self.retry_at = earliest(self.retry_at, self._later(now))
            alike = (job.spec.machine, job.spec.resources, job.spec.priority, Guest.of(job.spec))
            if alike in hopeless:
                effects.extend(_wait(now, job, hopeless[alike]))
            elif offering < OFFERING_LIMIT:
                effects.extend(self._offer(now, job, is_head=may_claim))
                offering += bool(job.offers)
                if job.offers:
                    order.given(job)
                else:
                    hopeless[alike] = job.register.reason
        return effects

    def _offer(self, now: Now, job: HeldJob, *, is_head: bool) -> list[Effect]:
        """Ask up to three machines that seem to have room, else the one that is claimed; else say why the job waits."""
        if job.round == 0:
            job.refused.clear()
        candidates = self._candidates(Guest.of(job.spec), job.spec.machine)
        job.ranked = rank(job.spec.resources, candidates, self._rng, job.spec.job)
        claimed = None if job.ranked else self._claim(now, job, candidates, is_head=is_head)
        if claimed is not None:
            job.ranked = [claimed]
        job.offers = dict.fromkeys(job.ranked)
        if not job.ranked:
            job.round = 0
            return _wait(now, job, _reason(job, candidates))
        job.due = now.boot_s + self._timing.offer_s
        return [Send(node, job.offer(claims=claimed is not None)) for node in job.ranked]

    def _claim(self, now: Now, job: HeldJob, candidates: list[Candidate], *, is_head: bool) -> NodeId | None:
        """The machine that is to make room for the job: the one where the fewest jobs have to end.

        Where some of them do not give way to it, only for the head of the queue, after a long time.
        """
        has_waited = is_head and job.waits_since is not None and now.wall_s - job.waits_since >= CLAIM_AFTER_S
        found: list[tuple[bool, int, NodeId]] = []
        for candidate in candidates:
            clearing = clearable(job.spec, candidate)
            if clearing is not None and (clearing.gives_way or has_waited):
                found.append((not clearing.gives_way, len(clearing.blocking), candidate.node))
        return min(found)[-1] if found else None

    def answered(self, job: HeldJob, node: NodeId, answer: OfferAnswer) -> bool:
        """Take note; returns whether that was the last answer. The offer must be one that `is_awaited`."""
        job.offers[node] = answer
        if answer.hold is None:
            job.refused[node] = answer.refusal
        return None not in job.offers.values()

    def is_awaited(self, job: HeldJob, node: NodeId, answer: OfferAnswer) -> bool:
        is_this_round = job.state is JobState.QUEUED and answer.epoch == job.register.epoch + 1
        return is_this_round and node in job.offers and job.offers[node] is None

    def choose(self, now: Now, job: HeldJob) -> tuple[Chosen | None, list[Effect]]:
        """All have answered, or time is up: the best hold, and releases of the rest."""
        holds = [
            Chosen(node, answer.hold, answer.gpus)
            for node in job.ranked
            if (answer := job.offers[node]) is not None and answer.hold is not None
        ]
        job.offers = {}
        if not holds:
            return None, self._again(now, job)
        job.round = 0
        self.retry_at = now.boot_s
        return holds[0], [Send(other.node, Release(job.spec.job, other.hold)) for other in holds[1:]]

    def _again(self, now: Now, job: HeldJob) -> list[Effect]:
        """Another round soon, for a few rounds; then the job waits and says why."""
        job.round += 1
        if job.round < self._timing.rounds:
            job.due = self.soon(now)
            return []
        job.round, job.due = 0, self._later(now)
        self.retry_at = now.boot_s
        return _wait(now, job, _reason(job, self._candidates(Guest.of(job.spec), job.spec.machine)))


def is_waiting(job: HeldJob) -> bool:
    """Whether a machine is sought for it."""
    return job.state is JobState.QUEUED and job.replica.is_settled and job.spec.sweep is None


def _reason(job: HeldJob, candidates: list[Candidate]) -> str:
    """Why nothing was placed: what the machines themselves said, else what is known of them."""

    def told(candidate: Candidate) -> Candidate:
        said = job.refused.get(candidate.node, "")
        return replace(candidate, refusal=said, rule=Rule.BUSY) if said and candidate.rule is None else candidate

    return explain(job.spec.resources, map(told, candidates))


def _wait(now: Now, job: HeldJob, reason: str) -> list[Effect]:
    job.waits_since = now.wall_s if job.waits_since is None else job.waits_since
    return [] if job.register.reason == reason else job.change(now, reason=reason, durable=False)
