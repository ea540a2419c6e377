"""Who answers and who does not: probes, what others doubt, and how long a doubt lasts before a member counts as down.

SWIM with Lifeguard's local health, over Links. Three things are ours (decision 15):

- Only what this node has seen itself makes a member suspect or down. What others doubt makes it look at once, and
  shortens the wait where it sees the same; a liar makes others ask once more, and nothing else.
- A doubt is an entry of its owner's gossip, signed like any other, and taken back by its owner: there are no rumours
  with a life of their own. Who hears that it is doubted says everything again under a higher incarnation.
- Where a Link is gone or silent, a bare TCP knock at the member's port tells three things apart: nobody listens (the
  process is gone: two who see it suffice), the host answers but its agent does not (it starves or was stopped: much
  patience), or nothing answers (the host or the path is gone).

No job is ever acted on because of it.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from meshgpu.core.effects import CloseLink, Effect, Reject, Send
from meshgpu.core.statemachine import earliest
from meshgpu.model.clock import Now
from meshgpu.model.gossip import Doubt, Doubts, Incarnation, KnockOutcome, MemberState
from meshgpu.model.ids import NodeId
from meshgpu.model.messages import ProbeAnswer, ProbeFor

HEALTH_LIMIT: Final = 8
"""Worst local health: everything takes nine times as long before it counts as missed."""

CONFIRMATIONS: Final = 3
"""Others who see the same, after which a doubt lasts its shortest time."""

LONGEST: Final = 6.0
"""By how much a doubt that nobody shares lasts longer than one that three share."""


FAVOURS_BURST: Final = 16
"""Probes that a member may ask of this node at once: it asks three of many when one does not answer it, so these are
for when half of a mesh is gone."""

FAVOURS_PER_S: Final = 1.0
"""And then on. Who probes one member a second misses no more; through 63 helpers no more than 63 a second reach
anybody, far less than one may say itself."""


NO_INCARNATION: Final = Incarnation(0, 0)


@dataclass(frozen=True, slots=True)
class LivenessTiming:
    """period_s: between two probes, each of another member. answer_s: within which a member answers; higher tolerates
    slower machines and finds dead ones later. helpers: who are asked to probe in its stead.
    suspicion_s: how long a doubt lasts at least, in a mesh of ten.
    soon_s: after the first knock at a member in doubt, the next (a process that dies may lose its Link before its
    port); the pauses double up to knock_s. silent_s: how long a host may answer without its agent.
    late_s: a step that comes later than that is this machine's own fault.
    resume_s: one that comes later than that follows a suspend. calm_s: for how long nobody is doubted after it.
    """

    period_s: float = 1.0
    jitter: float = 0.1
    answer_s: float = 0.5
    helpers: int = 3
    suspicion_s: float = 4.0
    soon_s: float = 0.1
    knock_s: float = 2.0
    silent_s: float = 60.0
    late_s: float = 0.25
    resume_s: float = 5.0
    calm_s: float = 5.0


@dataclass(slots=True)
class _Watched:
    """One member. heard_at: `boot_s` of the last message of its own. asked_at: of the probe under way, with its number.

    doubted_at: since when this node doubts it, under `incarnation`. is_gone: nobody listens at its port.
    host_answers: something did, at the last knock. helpers: whose answer is still out.
    """

    state: MemberState = MemberState.DOWN
    heard_at: float = -math.inf
    number: int = 0
    asked_at: float | None = None
    is_helped: bool = False
    helpers: set[NodeId] = field(default_factory=set)
    helpers_answered: bool = False
    doubted_at: float | None = None
    incarnation: Incarnation = NO_INCARNATION
    is_gone: bool = False
    host_answers: bool = False
    knock_at: float | None = None
    knocks: int = 0

    @property
    def is_awaited(self) -> bool:
        """Whether an answer, the end of a doubt or the next knock is waited for."""
        return self.asked_at is not None or self.doubted_at is not None or self.knock_at is not None

    def calm(self) -> None:
        """There is life: nothing of what was asked or doubted counts any more."""
        self.asked_at, self.is_helped, self.helpers_answered = None, False, False
        self.helpers.clear()
        self.doubted_at, self.knock_at = None, None
        self.is_gone = self.host_answers = False
        self.knocks = 0


@dataclass(slots=True)
class _Favour:
    """A probe that another node asked for."""

    asker: NodeId
    their_number: int
    asked_at: float


class Liveness:
    """How each member stands here.

    peers(): the members that are watched: all of the office but this node. is_linked(peer): whether its Link is open.
    incarnation(peer): the highest that was heard of it. doubted_by(peer): who of the others doubts it, and how.
    probe(peer, number): what asks it for an answer. knock(peer): what tries its port; nothing where none is known.
    """

    def __init__(
        self,
        rng: random.Random,
        timing: LivenessTiming,
        *,
        peers: Callable[[], Iterable[NodeId]],
        is_linked: Callable[[NodeId], bool],
        incarnation: Callable[[NodeId], Incarnation],
        doubted_by: Callable[[NodeId], Iterable[tuple[NodeId, Doubt]]],
        probe: Callable[[NodeId, int], Effect],
        knock: Callable[[NodeId], list[Effect]],
    ) -> None:
        self._rng = rng
        self._timing = timing
        self._peers = peers
        self._is_linked = is_linked
        self._incarnation = incarnation
        self._doubted_by = doubted_by
        self._probe = probe
        self._knock_at = knock
        self._watched: dict[NodeId, _Watched] = {}
        self._unsure: dict[NodeId, _Watched] = {}
        """Those of whom something is waited for, or was a moment ago: few of many, and mostly nobody."""
        self._favours: dict[tuple[NodeId, int], _Favour] = {}
        self._credits: dict[NodeId, tuple[float, float]] = {}
        """{asker: how many probes it may have asked of us, at which `boot_s`}"""
        self._round: list[NodeId] = []
        self._turned: list[tuple[NodeId, MemberState]] = []
        self._numbers = 0
        self._next_at: float | None = None
        self._calm_until = -math.inf
        self._wanted_at: float | None = None
        self.health = 0
        """0: well. Higher: this machine is slow, so others get more time."""

    # -- reading ------------------------------------------------------------------------------------------------------

    def state(self, peer: NodeId) -> MemberState:
        found = self._watched.get(peer)
        return found.state if found else MemberState.DOWN

    def heard_at(self, peer: NodeId) -> float | None:
        """`boot_s` of the last thing that it said itself; None if there was none."""
        found = self._watched.get(peer)
        return found.heard_at if found and found.heard_at > -math.inf else None

    def doubts(self) -> Doubts:
        """What this node doubts, for its gossip."""
        doubted = sorted(peer for peer, found in self._unsure.items() if found.doubted_at is not None)
        found = self._watched
        return Doubts(tuple(Doubt(peer, found[peer].incarnation, found[peer].is_gone) for peer in doubted))

    def turned(self) -> list[tuple[NodeId, MemberState]]:
        """Who stands otherwise than before, in order, since this was last asked."""
        turned, self._turned = self._turned, []
        return turned

    # -- what is heard ------------------------------------------------------------------------------------------------

    def heard(self, now: Now, peer: NodeId) -> None:
        """Something arrived on the peer's Link."""
        found = self._watch(peer)
        if found.asked_at is not None and self.health:
            self.health -= 1
        found.heard_at = now.boot_s
        found.calm()
        if self._is_linked(peer):
            self._turn(peer, found, MemberState.ALIVE)

    def link_opened(self, now: Now, peer: NodeId) -> None:
        self.heard(now, peer)
        if self._next_at is None:
            self._next_at = now.boot_s + self._interval()

    def link_closed(self, now: Now, peer: NodeId) -> list[Effect]:
        """It may be gone, or only the path: whoever knocks, knows."""
        found = self._watch(peer)
        if found.state is MemberState.DOWN or found.doubted_at is not None:
            return []
        if now.boot_s < self._calm_until:
            self._look_again(peer, found, self._calm_until)
            return []
        self._doubt(now, peer, found)
        return self._knock(now, peer, found)

    def knocked(self, now: Now, peer: NodeId, outcome: KnockOutcome) -> list[Effect]:
        found = self._watched.get(peer)
        if found is None or found.doubted_at is None:
            return []
        found.is_gone = outcome is KnockOutcome.REFUSED
        found.host_answers = outcome is KnockOutcome.ANSWERED
        return self._judge(now, peer, found)

    def helped(self, peer: NodeId, answer: ProbeAnswer) -> None:
        """A helper has probed the target, or could not reach it either."""
        found = self._watched.get(answer.target)
        if found is None or found.number != answer.number or peer not in found.helpers:
            return
        found.helpers.discard(peer)
        found.helpers_answered = True
        if answer.is_alive and found.asked_at is not None and found.doubted_at is None:
            found.asked_at, found.is_helped = None, False  # it lives; the path from here will show in its own time

    def asked_for(self, now: Now, asker: NodeId, ask: ProbeFor) -> list[Effect]:
        """Probe the target for somebody else. What is not linked here is answered for at once.

        Each probe counts against what its asker may have of us, answered or not: nobody is flooded through others.
        """
        if ask.target not in self._watched or not self._is_linked(ask.target):
            return [Send(asker, ProbeAnswer(ask.target, ask.number, is_alive=False))]
        credit, at_s = self._credits.get(asker, (float(FAVOURS_BURST), now.boot_s))
        credit = min(credit + (now.boot_s - at_s) * FAVOURS_PER_S, FAVOURS_BURST)
        if credit < 1.0:
            return [Reject(asker, "asks for more probes than a member needs")]
        self._credits[asker] = credit - 1.0, now.boot_s
        self._numbers += 1
        self._favours[ask.target, self._numbers] = _Favour(asker, ask.number, now.boot_s)
        return [self._probe(ask.target, self._numbers)]

    def acknowledged(self, peer: NodeId, number: int) -> list[Effect]:
        """A probe was answered."""
        favour = self._favours.pop((peer, number), None)
        return [Send(favour.asker, ProbeAnswer(peer, favour.their_number, is_alive=True))] if favour else []

    def doubted(self, now: Now, peer: NodeId) -> list[Effect]:
        """Others have begun to doubt it, or more of them: look for oneself, at once."""
        found = self._watched.get(peer)
        if found is None or found.state is MemberState.DOWN:
            return []
        if found.doubted_at is not None:
            return self._judge(now, peer, found)
        is_fresh = now.boot_s - found.heard_at < self._timing.answer_s
        if found.asked_at is None and self._is_linked(peer) and not is_fresh:
            return self._ask(now, peer, found)
        return []

    def was_doubted(self) -> None:
        """Somebody could not reach this node: it may be slow without knowing."""
        self.health = min(self.health + 1, HEALTH_LIMIT)

    def refuted(self, now: Now, peer: NodeId) -> None:
        """It has said something under a higher incarnation than the one that was doubted: it lives, wherever."""
        found = self._watched.get(peer)
        if found is None or found.doubted_at is None or self._incarnation(peer) <= found.incarnation:
            return
        found.calm()
        if not self._is_linked(peer):
            self._look_again(peer, found, now.boot_s + self._timing.silent_s)

    def forget(self, peer: NodeId) -> None:
        """It is no member any more."""
        self._watched.pop(peer, None)
        self._unsure.pop(peer, None)
        self._credits.pop(peer, None)

    # -- time ---------------------------------------------------------------------------------------------------------

    def woke(self, now: Now) -> None:
        """To be called before what happened is taken in: a step that comes late is this machine's own fault."""
        late_s = 0.0 if self._wanted_at is None else now.boot_s - self._wanted_at
        if late_s <= self._timing.late_s:
            return
        self._wanted_at = None
        self.health = min(self.health + 1, HEALTH_LIMIT)
        for found in self._unsure.values():
            if found.asked_at is not None:
                found.asked_at += late_s
            if found.doubted_at is not None and found.state is not MemberState.DOWN:
                found.doubted_at += late_s
        if late_s > self._timing.resume_s:
            self._calm_until = now.boot_s + self._timing.calm_s

    def step(self, now: Now) -> list[Effect]:
        effects: list[Effect] = []
        if self._next_at is not None and now.boot_s >= self._next_at:
            self._next_at = now.boot_s + self._interval()
            effects += self._probe_next(now)
        for peer, found in list(self._unsure.items()):
            if found.is_awaited:
                effects += self._step_one(now, peer, found)
            else:
                del self._unsure[peer]
        for key, favour in list(self._favours.items()):
            if now.boot_s >= favour.asked_at + self._timing.answer_s:
                del self._favours[key]
                effects.append(Send(favour.asker, ProbeAnswer(key[0], favour.their_number, is_alive=False)))
        self._wanted_at = self.deadline()
        return effects

    def deadline(self) -> float | None:
        times = [self._next_at, *(favour.asked_at + self._timing.answer_s for favour in self._favours.values())]
        for peer, found in self._unsure.items():
            if found.asked_at is not None:
                times.append(found.asked_at + (self._round_s() if self._is_waiting(found) else self._answer_s()))
            if found.doubted_at is not None and found.state is not MemberState.DOWN:
                times.append(found.doubted_at + self._patience_s(peer, found))
            times.append(found.knock_at)
        return earliest(*times)

    def _step_one(self, now: Now, peer: NodeId, found: _Watched) -> list[Effect]:
        effects: list[Effect] = []
        if found.asked_at is not None:
            if now.boot_s >= found.asked_at + self._round_s():
                effects += self._miss(now, peer, found)
            elif not self._is_waiting(found) and now.boot_s >= found.asked_at + self._answer_s():
                effects += self._ask_helpers(peer, found)
        if found.knock_at is not None and now.boot_s >= found.knock_at:
            if found.doubted_at is None:  # it was to be looked at again: still no Link, and nothing heard since
                self._doubt(now, peer, found)
            effects += self._knock(now, peer, found)
        if found.doubted_at is not None:
            effects += self._judge(now, peer, found)
        return effects

    # -- probing ------------------------------------------------------------------------------------------------------

    def _probe_next(self, now: Now) -> list[Effect]:
        """The next member in an order that is drawn anew each round, so that nobody waits for long."""
        while self._round or any(self._is_linked(peer) for peer in self._peers()):
            if not self._round:
                self._round = sorted(peer for peer in self._peers() if self._is_linked(peer))
                self._rng.shuffle(self._round)
            peer = self._round.pop()
            if self._is_linked(peer):
                found = self._watch(peer)
                return self._ask(now, peer, found) if found.asked_at is None else []
        return []

    def _ask(self, now: Now, peer: NodeId, found: _Watched) -> list[Effect]:
        self._numbers += 1
        self._unsure[peer] = found
        found.number, found.asked_at, found.is_helped, found.helpers_answered = self._numbers, now.boot_s, False, False
        found.helpers.clear()
        return [self._probe(peer, found.number)]

    def _ask_helpers(self, peer: NodeId, found: _Watched) -> list[Effect]:
        found.is_helped = True
        able = [p for p in sorted(self._watched) if p != peer and self._watched[p].state is MemberState.ALIVE]
        chosen = self._rng.sample(able, min(len(able), self._timing.helpers))
        found.helpers = set(chosen)
        return [*self._knock_at(peer), *(Send(helper, ProbeFor(peer, found.number)) for helper in chosen)]

    def _miss(self, now: Now, peer: NodeId, found: _Watched) -> list[Effect]:
        """Neither it nor a helper has answered for it. Where no helper answered at all, it may be us."""
        found.asked_at = None
        if found.doubted_at is not None:
            return []
        if found.helpers and not found.helpers_answered:
            self.health = min(self.health + 1, HEALTH_LIMIT)
        if now.boot_s < self._calm_until:
            return []
        self._doubt(now, peer, found)
        return self._knock(now, peer, found)

    # -- doubting -----------------------------------------------------------------------------------------------------

    def _doubt(self, now: Now, peer: NodeId, found: _Watched) -> None:
        found.calm()
        self._unsure[peer] = found
        found.doubted_at, found.incarnation = now.boot_s, self._incarnation(peer)
        self._turn(peer, found, MemberState.SUSPECT)

    def _turn(self, peer: NodeId, found: _Watched, state: MemberState) -> None:
        if found.state is not state:
            found.state = state
            self._turned.append((peer, state))

    def _look_again(self, peer: NodeId, found: _Watched, at_s: float) -> None:
        """It has no Link, but nobody is to hear of a doubt before `at_s`."""
        found.calm()
        self._unsure[peer] = found
        found.knock_at = at_s
        self._turn(peer, found, MemberState.SUSPECT)

    def _knock(self, now: Now, peer: NodeId, found: _Watched) -> list[Effect]:
        pause_s = min(self._timing.soon_s * 2.0 ** min(found.knocks, 10), self._timing.knock_s)
        found.knock_at, found.knocks = now.boot_s + pause_s, found.knocks + 1
        return self._knock_at(peer)

    def _judge(self, now: Now, peer: NodeId, found: _Watched) -> list[Effect]:
        """Down, if the doubt has lasted long enough for how many share it."""
        if found.doubted_at is None or found.state is MemberState.DOWN:
            return []
        if now.boot_s < found.doubted_at + self._patience_s(peer, found):
            return []
        found.knock_at = None
        self._turn(peer, found, MemberState.DOWN)
        return [CloseLink(peer, "it does not answer")] if self._is_linked(peer) else []

    def _patience_s(self, peer: NodeId, found: _Watched) -> float:
        """How long this doubt may last before the member counts as down."""
        able = (p for p, w in self._watched.items() if p != peer and w.state is MemberState.ALIVE)
        could = sum(1 for _ in islice(able, CONFIRMATIONS))  # no more are looked at: of many this is asked at each step
        if found.is_gone and (not could or any(doubt.is_gone for doubt in self._sharing(peer, found))):
            return 0.0
        shortest = self._timing.suspicion_s * max(1.0, math.log10(len(self._watched) + 1))
        if found.host_answers:
            return max(self._timing.silent_s, shortest)
        share = sum(1 for _ in islice(self._sharing(peer, found), could))
        shared = math.log(share + 1) / math.log(could + 1) if could else 1.0
        return shortest * (LONGEST - (LONGEST - 1.0) * shared)

    def _sharing(self, peer: NodeId, found: _Watched) -> Iterator[Doubt]:
        """What others doubt of it, as it is now."""
        return (doubt for _, doubt in self._doubted_by(peer) if doubt.incarnation >= found.incarnation)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _is_waiting(self, found: _Watched) -> bool:
        """Whether there is nothing left to do but to wait for the end of the round."""
        return found.is_helped or found.doubted_at is not None

    def _watch(self, peer: NodeId) -> _Watched:
        return self._watched.setdefault(peer, _Watched())

    def _interval(self) -> float:
        spread = self._timing.period_s * self._timing.jitter
        return self._timing.period_s + self._rng.uniform(-spread, spread)

    def _answer_s(self) -> float:
        return self._timing.answer_s * (1 + self.health)

    def _round_s(self) -> float:
        return 2 * self._timing.answer_s * (1 + self.health)
