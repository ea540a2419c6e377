"""What a local user asks of machines that hold jobs: list, stop, watch. No index: all live members are asked."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from meshgpu.core.effects import Answered, Effect, Send, TellWatchers
from meshgpu.core.statemachine import earliest
from meshgpu.core.sweep import trial_spec
from meshgpu.core.trust.freshness import CHALLENGE_BYTES
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import RequestRules
from meshgpu.errors import TrustError
from meshgpu.model.clock import ClockGap, Now
from meshgpu.model.ids import JobId, KeyId, NodeId, UserName, base32
from meshgpu.model.job import NO_STAMP, Action, JobRequest, JobSpec, JobView, Register, Stamp
from meshgpu.model.messages import Answer, Ask, Challenge, JobUpdate, SignedView
from meshgpu.model.sweep import Trial
from meshgpu.model.trust import Notary, Signed

ELSEWHERE: Final = "elsewhere"
"""Code of a steward that holds the job, for which another speaks."""

_WATCH: Final = "watch-"
"""Begins the query of a watch; a question's is a number of its agent's."""


@dataclass(frozen=True, slots=True)
class AskTiming:
    """list_s: how long a list waits for slow members. act_s: how long a stop waits for the stewards.
    again_s: how often those are asked again who say that another speaks for the job.
    watch_s: how often a watch is renewed: a third of the time for which a steward keeps it.
    """

    list_s: float = 0.3
    act_s: float = 5.0
    again_s: float = 1.0
    watch_s: float = 5.0


@dataclass(slots=True)
class _Question:
    """asked: {node: what it was asked}. views: {job: the newest that was told, and whether by who speaks for it}.

    refused: nodes that answered a list with a refusal. elsewhere: those for which another speaks; they are asked
    again. gaps: {node whose clock differs too much: by how many seconds it is ahead}.
    """

    action: Action
    key: KeyId
    user: UserName | None
    give_up_at: float
    wait_s: float
    asked: dict[NodeId, JobRequest]
    waiting: set[NodeId]
    again_at: float
    views: dict[JobId, tuple[bool, JobView]] = field(default_factory=dict)
    failure: tuple[str, str] | None = None
    refused: set[NodeId] = field(default_factory=set)
    elsewhere: set[NodeId] = field(default_factory=set)
    gaps: dict[NodeId, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Watch:
    """seen: stamp of the newest register that was told."""

    key: KeyId
    stewards: tuple[NodeId, ...]
    renew_at: float
    asked: dict[NodeId, JobRequest] = field(default_factory=dict)
    seen: Stamp = NO_STAMP


class Asking:
    """Open questions and watches of this node's users. `linked()` are the members that can be asked, self included."""

    def __init__(
        self,
        node: NodeId,
        log: MeshLog,
        rules: RequestRules,
        notary: Notary,
        rng: random.Random,
        linked: Callable[[], list[NodeId]],
        timing: AskTiming,
    ) -> None:
        self._node = node
        self._log = log
        self._rules = rules
        self._notary = notary
        self._rng = rng
        self._linked = linked
        self._timing = timing
        self._open: dict[str, _Question] = {}
        self._watches: dict[JobId, _Watch] = {}

    def sign_request(
        self, now: Now, key: KeyId, action: Action, job: JobId | None, node: NodeId, challenge: bytes = b""
    ) -> Signed:
        """A user's request to one node. Raises TrustError where the key is no user's."""
        return self._notary.sign(key, self._request(now, key, action, job, node, challenge))

    def _request(
        self, now: Now, key: KeyId, action: Action, job: JobId | None, node: NodeId, challenge: bytes = b""
    ) -> JobRequest:
        user = self._log.user_of(key)
        if user is None or self._log.mesh is None:
            raise TrustError("not-allowed", "cannot ask: this account is no user of the mesh", "meshgpu version")
        nonce = base32(self._rng.randbytes(10))
        return JobRequest(self._log.mesh, user, action, node, now.wall_s, nonce, job, challenge)

    def list_jobs(self, now: Now, query: str, key: KeyId) -> list[Effect]:
        return self._ask(now, query, key, Action.LIST, None, self._linked(), self._timing.list_s)

    def act(
        self, now: Now, query: str, key: KeyId, action: Action, job: JobId, stewards: tuple[NodeId, ...]
    ) -> list[Effect]:
        """Ask all of a job's stewards: the one that speaks for it obeys."""
        nodes = list(dict.fromkeys(map(self._log.current, stewards)))
        return self._ask(now, query, key, action, job, nodes, self._timing.act_s)

    def _ask(
        self, now: Now, query: str, key: KeyId, action: Action, job: JobId | None, nodes: list[NodeId], wait_s: float
    ) -> list[Effect]:
        try:
            requests = {node: self._request(now, key, action, job, node) for node in nodes}
            asks: list[Effect] = [
                Send(node, Ask(query, self._notary.sign(key, request))) for node, request in requests.items()
            ]
        except TrustError as error:
            return [Answered(query, code=error.code, reason=error.message, hint=error.hint)]
        user = self._log.user_of(key)
        again_at = now.boot_s + self._timing.again_s
        self._open[query] = _Question(action, key, user, now.boot_s + wait_s, wait_s, requests, set(nodes), again_at)
        return asks

    def answered(self, node: NodeId, answer: Answer) -> list[Effect]:
        if answer.challenge is not None and (again := self._sign_again(node, answer.query, answer.challenge)):
            return again
        question = self._open.get(answer.query)
        is_open = question is not None and node in question.waiting
        views = self._verified(node, answer.views) if is_open or answer.query.startswith(_WATCH) else []
        watched = [effect for view in views for effect in self._watched(node, view.register)]
        if question is None or not is_open:
            return watched
        if answer.code == ELSEWHERE:
            question.elsewhere.add(node)
            return watched
        question.waiting.discard(node)
        for view in views:
            if view.spec.user == question.user or view.spec.shared:
                self._note(question, node, view)
        if answer.code and question.action is Action.LIST:
            question.refused.add(node)
        elif answer.code:
            question.failure = (answer.code, answer.reason)
        is_done = not question.waiting or (question.action is not Action.LIST and not answer.code)
        return [*watched, *(self._close(answer.query, question) if is_done else [])]

    def _note(self, question: _Question, node: NodeId, view: JobView) -> None:
        """Of what several stewards tell of one job the newest counts, and best what comes from who speaks for it."""
        speaks = self._speaks(node, view.register)
        known = question.views.get(view.spec.job)
        if known is None or (known[1].register.stamp, known[0]) < (view.register.stamp, speaks):
            question.views[view.spec.job] = (speaks, view)

    def _speaks(self, node: NodeId, register: Register) -> bool:
        """Whether the register was changed last in that node's turn. It alone knows also what is kept on no disk."""
        return self._log.current(register.stamp.ballot.steward) == node

    def _sign_again(self, node: NodeId, query: str, challenge: Challenge) -> list[Effect]:
        """Our clock and the node's differ: the same request with what it asked for in it, once. Empty: it is over."""
        watch = self._watches.get(JobId(query.removeprefix(_WATCH))) if query.startswith(_WATCH) else None
        question = self._open.get(query)
        key, asked = None, None
        if watch is not None:
            key, asked = watch.key, watch.asked.get(node)
        elif question is not None and node in question.waiting:
            key, asked = question.key, question.asked[node]
        is_first = asked is not None and not asked.challenge and not challenge.refused
        if key is None or asked is None or not is_first or len(challenge.nonce) != CHALLENGE_BYTES:
            return []
        request = replace(asked, challenge=challenge.nonce)
        try:
            signed = self._notary.sign(key, request)
        except TrustError:
            return []
        if watch is not None:
            watch.asked[node] = request
        elif question is not None:
            if not question.gaps:  # one more exchange, with all that need it at the same time
                question.give_up_at += question.wait_s
            question.gaps[node] = challenge.wall_s - asked.issued_wall_s
            question.asked[node] = request
        return [Send(node, Ask(query, signed))]

    def _clock(self, question: _Question) -> ClockGap | None:
        """Whose clock differs; of many that were asked most must, or it is theirs that is wrong, not this machine's."""
        others = len(question.asked.keys() - {self._node})
        if 2 * len(question.gaps) <= others:
            return None
        return next((ClockGap(node, ahead_s) for node, ahead_s in sorted(question.gaps.items())), None)

    def _verified(self, node: NodeId, views: tuple[SignedView, ...]) -> list[JobView]:
        """The jobs that their users really signed, and gave to `node` to hold."""
        found: list[JobView] = []
        for view in views:
            try:
                asked = self._rules.verify_spec(view.spec)
                own = JobView(asked, view.register) if view.trial is None else _trial(asked, view.trial, view.register)
                own = replace(own, signed=view.spec, receipt=view.receipt)
                trials = [_trial(asked, trial.trial, trial.register) for trial in view.trials]
            except TrustError:
                continue
            holds = node in map(self._log.current, asked.stewards)
            found.extend(v for v in (own, *trials) if holds and v.register.job == v.spec.job)
        return found

    def updated(self, node: NodeId, update: JobUpdate) -> list[Effect]:
        return self._watched(node, update.register)

    def _watched(self, node: NodeId, register: Register) -> list[Effect]:
        """A steward of a job that is watched here tells of it; what is older than what was told is dropped."""
        watch = self._watches.get(register.job)
        if watch is None or node not in map(self._log.current, watch.stewards) or register.stamp < watch.seen:
            return []
        if register.stamp == watch.seen and not self._speaks(node, register):
            return []
        watch.seen = register.stamp
        return [TellWatchers(register)]

    def watch(self, now: Now, key: KeyId, job: JobId, stewards: tuple[NodeId, ...]) -> None:
        """From now on every change of the job is told, until `unwatch`; renewed in `step`."""
        self._watches[job] = _Watch(key, stewards, now.boot_s)

    def unwatch(self, job: JobId) -> None:
        self._watches.pop(job, None)

    def linked_again(self, now: Now, node: NodeId) -> None:
        for watch in self._watches.values():
            if node in map(self._log.current, watch.stewards):
                watch.renew_at = now.boot_s

    def step(self, now: Now) -> list[Effect]:
        effects: list[Effect] = []
        for query, question in list(self._open.items()):
            if now.boot_s >= question.give_up_at:
                effects.extend(self._close(query, question))
            elif now.boot_s >= question.again_at:
                question.again_at = now.boot_s + self._timing.again_s
                effects.extend(self._again(now, query, question))
        for job, watch in self._watches.items():
            if now.boot_s >= watch.renew_at:
                watch.renew_at = now.boot_s + self._timing.watch_s
                for steward in dict.fromkeys(map(self._log.current, watch.stewards)):
                    try:
                        watch.asked[steward] = self._request(now, watch.key, Action.WATCH, job, steward)
                        signed = self._notary.sign(watch.key, watch.asked[steward])
                    except TrustError:
                        continue  # the account left the mesh: its watch simply tells no more
                    effects.append(Send(steward, Ask(f"{_WATCH}{job}", signed)))
        return effects

    def _again(self, now: Now, query: str, question: _Question) -> list[Effect]:
        """Those that left it to another are asked again: who speaks for the job may be away."""
        effects: list[Effect] = []
        for node in sorted(question.elsewhere):
            before = question.asked[node]
            try:
                request = self._request(now, question.key, before.action, before.job, node)
                effects.append(Send(node, Ask(query, self._notary.sign(question.key, request))))
            except TrustError:
                continue  # the account left the mesh: the question ends unanswered
            question.asked[node] = request
        question.elsewhere.clear()
        return effects

    def deadline(self) -> float | None:
        return earliest(
            *(min(question.give_up_at, question.again_at) for question in self._open.values()),
            *(watch.renew_at for watch in self._watches.values()),
        )

    def _close(self, query: str, question: _Question) -> list[Effect]:
        del self._open[query]
        silent = tuple(sorted(question.waiting - question.elsewhere))
        clock = self._clock(question)
        views = tuple(view for _, view in question.views.values())
        if question.action is Action.LIST:
            reached = set(self._linked()) - question.waiting - question.refused
            away = tuple(node for node in sorted(self._log.members) if node not in reached)
            return [Answered(query, views, away, clock=clock)]
        if views:
            return [Answered(query, views, clock=clock)]
        if question.failure:
            code, reason = question.failure
            return [Answered(query, silent=silent, code=code, reason=reason, clock=clock)]
        names = ", ".join(self._log.name_of(node) for node in silent)
        reason = f"cannot {question.action} the job: {names or 'nobody'} did not answer"
        if question.elsewhere:
            reason += ", and of those that hold it too few are there to change it"
        return [Answered(query, silent=silent, code="no-answer", reason=reason, hint="meshgpu machines")]


def _trial(sweep: JobSpec, trial: Trial, register: Register) -> JobView:
    """Raises TrustError where it lies outside the sweep."""
    return JobView(trial_spec(sweep, trial), register, trial, sweep)
