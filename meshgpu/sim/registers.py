"""What can happen to a register of three stewards: every course of events within a scope, or long ones at random.

A message that was sent may arrive at any time, at everybody whom it concerns, often or never. So lost, late, repeated
and forwarded ones are all there. What a steward does about one event is a single step: a crash before the step is kept
is like the event lost, a crash after it like all that it sent lost, so that restarts between steps are enough.
A value is the tuple of all changes that led to it; hence one follows from another if it begins with it.
"""

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, ClassVar, Final

from meshgpu.core.jobs.replica import Replica
from meshgpu.errors import BrokenInvariant
from meshgpu.model.ids import NodeId
from meshgpu.model.job import Ballot, Stamp

Value = tuple[str, ...]

STEWARDS: Final = (NodeId("s0"), NodeId("s1"), NodeId("s2"))
QUORUM: Final = 2


class Rule(StrEnum):
    """What must hold whatever happens."""

    PROMISE = "what a steward has promised never falls"
    AGREEMENT = "no two values have one stamp"
    CHAIN = "each chosen value follows from those chosen before"
    TOLD = "what is told as chosen is chosen, and a quorum of disks has it or what follows from it"
    READ = "who wins the turn knows all that was chosen in the turns before"


# -- messages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepare:
    ballot: Ballot

    def concerns(self, steward: NodeId) -> bool:
        return steward != self.ballot.steward


@dataclass(frozen=True, slots=True)
class Promise:
    steward: NodeId
    ballot: Ballot
    promised: Ballot
    stamp: Stamp
    value: Value | None

    def concerns(self, steward: NodeId) -> bool:
        return steward == self.ballot.steward


@dataclass(frozen=True, slots=True)
class Accept:
    """Whoever has accepted it may forward it, to its proposer as well."""

    stamp: Stamp
    value: Value

    def concerns(self, steward: NodeId) -> bool:
        return bool(steward)


@dataclass(frozen=True, slots=True)
class Accepted:
    steward: NodeId
    stamp: Stamp
    promised: Ballot

    def concerns(self, steward: NodeId) -> bool:
        return steward != self.steward


@dataclass(frozen=True, slots=True)
class Vote:
    """Nobody hears it: that the steward accepted this very change, for the judge."""

    steward: NodeId
    stamp: Stamp

    def concerns(self, steward: NodeId) -> bool:
        return not steward


Message = Prepare | Promise | Accept | Accepted | Vote


# -- stewards ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scope:
    """How much may happen. asks, restarts: of each steward. steps: of one turn; a value that is adopted is one."""

    asks: tuple[int, int, int]
    restarts: tuple[int, int, int] = (0, 0, 0)
    steps: int = 2


class Steward:
    """A replica and its owner, who keeps what must be kept before he sends anything."""

    replica_type: ClassVar[type[Replica[Value]]] = Replica

    def __init__(self, rank: int, scope: Scope) -> None:
        self.me = STEWARDS[rank]
        self.asks = scope.asks[rank]
        self.restarts = scope.restarts[rank]
        self.steps = scope.steps
        self.disk: tuple[Ballot, Stamp, Value | None] | None = None
        self.replica = self.begin()
        self.sent: list[Message] = []
        self.told: Stamp | None = None
        self.has_won = False

    def begin(self) -> Replica[Value]:
        return self.replica_type(self.me, STEWARDS, *(self.disk or ()))

    def keep(self) -> None:
        self.disk = (self.replica.promised, self.replica.stamp, self.replica.value)

    def copy(self) -> "Steward":
        """As it is, with nothing sent or told yet."""
        twin = copy.copy(self)
        twin.replica = copy.copy(self.replica)
        for name, part in vars(twin.replica).items():
            if isinstance(part, dict):
                setattr(twin.replica, name, dict(part))
        twin.sent, twin.told, twin.has_won = [], None, False
        return twin

    def key(self) -> tuple[Any, ...]:
        """Equal for two that will do the same from now on."""
        replica = (tuple(sorted(part.items())) if isinstance(part, dict) else part for part in _parts(self.replica))
        return (self.asks, self.restarts, self.disk, *replica)

    def moves(self) -> Iterator[str]:
        """What it may do of its own accord."""
        if self.asks and self.replica.turn is None:
            yield "ask"
        if self.replica.turn is not None and self.replica.next_stamp().step <= self.steps:
            yield "propose"
        if self.restarts:
            yield "restart"

    def move(self, move: str) -> None:
        {"ask": self.ask, "propose": self.propose, "restart": self.restart}[move]()

    def ask(self) -> None:
        self.asks -= 1
        self.replica.ask()
        self.keep()
        if self.replica.asked is not None:
            self.sent.append(Prepare(self.replica.asked))
        else:
            self.win()

    def win(self) -> None:
        self.has_won = True

    def propose(self) -> None:
        """The value that was adopted once more; after that, and where there is none, a change of its own."""
        stamp, held = self.replica.next_stamp(), self.replica.value
        is_adopted = held is not None and self.replica.stamp.ballot != stamp.ballot
        # Before and after a restart it has different things in mind.
        change = f"{self.me}:{stamp.ballot.round}.{stamp.step}-{self.restarts}"
        value = held if held is not None and is_adopted else (*(held or ()), change)
        before = self.replica.chosen
        self.replica.propose(value, stamp=stamp)
        self.keep()
        self.sent += [Accept(stamp, value), Vote(self.me, stamp)]
        if self.replica.chosen > before:
            self.told = self.replica.chosen

    def restart(self) -> None:
        self.restarts -= 1
        self.replica = self.begin()

    def hear(self, message: Message) -> None:
        match message:
            case Prepare(ballot):
                if self.replica.prepare(ballot):
                    self.keep()
                replica = self.replica
                self.sent.append(Promise(self.me, ballot, replica.promised, replica.stamp, replica.value))
            case Promise(steward, ballot, promised, stamp, value):
                if self.replica.answered(steward, ballot, promised, stamp, value):
                    self.win()
            case Accept(stamp, value):
                if self.replica.accept(stamp, value):
                    self.keep()
                    if self.replica.stamp == stamp:
                        self.sent.append(Vote(self.me, stamp))
                self.sent.append(Accepted(self.me, self.replica.stamp, self.replica.promised))
            case Accepted(steward, stamp, promised):
                if self.replica.confirmed(steward, stamp, promised):
                    self.told = self.replica.chosen
            case Vote():
                raise BrokenInvariant("a vote is nobody's business")


def _parts(replica: Replica[Value]) -> Iterator[Any]:
    return (part for name, part in vars(replica).items() if name not in ("me", "stewards"))


# -- the judge --------------------------------------------------------------------------------------------------------


class History:
    """All that was ever proposed and accepted."""

    def __init__(self) -> None:
        self.values: dict[Stamp, Value] = {}
        self.steps: dict[Ballot, dict[NodeId, int]] = {}
        self.chosen: list[Stamp] = []
        """In their order."""
        self.broken: Rule | None = None

    def add(self, message: Message) -> None:
        if isinstance(message, Accept) and self.values.setdefault(message.stamp, message.value) != message.value:
            self.broken = Rule.AGREEMENT
        if isinstance(message, Vote):
            steps = self.steps.setdefault(message.stamp.ballot, {})
            steps[message.steward] = max(message.stamp.step, steps.get(message.steward, 0))

    def judge(self) -> None:
        """Who has accepted a later change of a turn has accepted those before it as well."""
        self.chosen = [
            Stamp(ballot, step)
            for ballot, steps in sorted(self.steps.items())
            if len(steps) >= QUORUM
            for step in range(1, sorted(steps.values(), reverse=True)[QUORUM - 1] + 1)
        ]
        for before, after in pairwise(self.chosen):
            if not follows(self.values[after], self.values[before]):
                self.broken = Rule.CHAIN

    def judge_step(self, stewards: list[Steward], steward: Steward) -> Rule | None:
        """What `steward` has just found or told."""
        replica = steward.replica
        if self.broken is None and steward.has_won and replica.turn is not None:
            before = [stamp for stamp in self.chosen if stamp.ballot < replica.turn]
            if before and not follows(replica.value, self.values[before[-1]]):
                return Rule.READ
        if self.broken is None and steward.told is not None:
            told = self.values[steward.told]
            disks = [other.disk[2] for other in stewards if other.disk is not None]
            if steward.told not in self.chosen or sum(follows(value, told) for value in disks) < QUORUM:
                return Rule.TOLD
        return self.broken


def follows(value: Value | None, before: Value) -> bool:
    return value is not None and value[: len(before)] == before


def _has_fallen(before: Steward, after: Steward) -> bool:
    old, new = before.disk, after.disk
    return old is not None and (new is None or min(new[0], after.replica.promised) < old[0])


# -- every course of events -------------------------------------------------------------------------------------------

State = tuple[int, int, int, int]
"""Which of its states each steward is in; the messages sent, a bit for each."""


@dataclass(frozen=True, slots=True)
class _Step:
    """of: the message heard as a bit, or the move. to: its state after it. sent: as bits."""

    of: int | str
    to: int
    sent: int
    steward: Steward
    has_fallen: bool


class Search:
    """Goes through all states that can be reached within `scope`, nearest first, and judges each step.

    Each step of the real replica is taken once for each of its states and remembered: the same one comes up in
    thousands of states of the whole.
    """

    def __init__(self, scope: Scope, kind: type[Steward] = Steward, ignored: frozenset[Rule] = frozenset()) -> None:
        self.ignored = ignored
        self.states = 0
        self.messages: list[Message] = []
        self._bits: dict[Message, int] = {}
        self._concerning = [0, 0, 0]
        self._judged = 0
        """The messages that the judge hears, as bits."""
        self._stewards: list[list[Steward]] = [[], [], []]
        self._known: list[dict[tuple[Any, ...], int]] = [{}, {}, {}]
        self._moves: list[dict[int, list[_Step]]] = [{}, {}, {}]
        self._heard: list[dict[int, dict[int, _Step | None]]] = [{}, {}, {}]
        self._deaf: list[dict[int, int]] = [{}, {}, {}]
        """The messages to which a steward in this state does nothing at all, as bits."""
        self._histories: dict[int, History] = {}
        first = [self._state(rank, kind(rank, scope)) for rank in range(3)]
        self._start: State = (first[0], first[1], first[2], 0)

    def run(self) -> None:
        """Raises BrokenInvariant with the shortest course of events to it where a rule is broken."""
        came_from: dict[State, State | None] = {self._start: None}
        frontier = [self._start]
        while frontier:
            found: list[State] = []
            for state in frontier:
                for rank, step in self._steps(state):
                    after = self._after(state, rank, step)
                    broken = self._judge(state, after, step)
                    is_known = after in came_from
                    if not is_known:
                        came_from[after] = state
                    if broken is not None and broken not in self.ignored:
                        self.states = len(came_from)
                        raise BrokenInvariant(f"not kept: {broken}", tuple(self._story(after, came_from)))
                    if not is_known:
                        found.append(after)
            frontier = found
        self.states = len(came_from)

    def _steps(self, state: State) -> Iterator[tuple[int, _Step]]:
        net = state[3]
        for rank in range(3):
            local = state[rank]
            for step in self._moves_of(rank, local):
                yield rank, step
            heard = self._heard[rank].setdefault(local, {})
            left = net & self._concerning[rank] & ~self._deaf[rank].get(local, 0)
            while left:
                bit = left & -left
                left ^= bit
                if bit not in heard:
                    heard[bit] = self._hear(rank, local, bit)
                hearing = heard[bit]
                if hearing is not None and (hearing.to != local or hearing.sent & ~net):
                    yield rank, hearing

    @staticmethod
    def _after(state: State, rank: int, step: _Step) -> State:
        s0, s1, s2, net = state
        net |= step.sent
        if rank == 0:
            return step.to, s1, s2, net
        return (s0, step.to, s2, net) if rank == 1 else (s0, s1, step.to, net)

    def _moves_of(self, rank: int, local: int) -> list[_Step]:
        if local not in self._moves[rank]:
            before = self._stewards[rank][local]
            steps = []
            for move in before.moves():
                after = before.copy()
                after.move(move)
                steps.append(self._step(rank, move, before, after))
            self._moves[rank][local] = steps
        return self._moves[rank][local]

    def _hear(self, rank: int, local: int, bit: int) -> _Step | None:
        before = self._stewards[rank][local]
        after = before.copy()
        after.hear(self.messages[bit.bit_length() - 1])
        step = self._step(rank, bit, before, after)
        if step.to == local and not step.sent:
            self._deaf[rank][local] = self._deaf[rank].get(local, 0) | bit
            return None
        return step

    def _step(self, rank: int, of: int | str, before: Steward, after: Steward) -> _Step:
        sent = 0
        for message in after.sent:
            sent |= self._bit(message)
        return _Step(of, self._state(rank, after), sent, after, _has_fallen(before, after))

    def _state(self, rank: int, steward: Steward) -> int:
        key = steward.key()
        if key not in self._known[rank]:
            self._known[rank][key] = len(self._stewards[rank])
            self._stewards[rank].append(steward)
        return self._known[rank][key]

    def _bit(self, message: Message) -> int:
        if message not in self._bits:
            bit = self._bits[message] = 1 << len(self.messages)
            self.messages.append(message)
            for rank, steward in enumerate(STEWARDS):
                self._concerning[rank] |= bit if message.concerns(steward) else 0
            self._judged |= bit if isinstance(message, Accept | Vote) else 0
        return self._bits[message]

    def _judge(self, before: State, after: State, step: _Step) -> Rule | None:
        if step.has_fallen and Rule.PROMISE not in self.ignored:
            return Rule.PROMISE
        is_told = step.steward.has_won or step.steward.told is not None
        if not is_told and not step.sent & self._judged & ~before[3]:
            return None
        stewards = [self._stewards[rank][after[rank]] for rank in range(3)]
        return self._history(after[3] & self._judged).judge_step(stewards, step.steward)

    def _history(self, judged: int) -> History:
        if judged not in self._histories:
            history = self._histories[judged] = History()
            for at, message in enumerate(self.messages):
                if judged >> at & 1:
                    history.add(message)
            history.judge()
        return self._histories[judged]

    def _story(self, state: State, came_from: dict[State, State | None]) -> list[str]:
        lines: list[str] = []
        before = came_from[state]
        while before is not None:
            rank, step = next((r, s) for r, s in self._steps(before) if self._after(before, r, s) == state)
            of = step.of if isinstance(step.of, str) else f"hears {self.messages[step.of.bit_length() - 1]}"
            lines.append(f"{STEWARDS[rank]} {of}")
            state, before = before, came_from[before]
        return lines[::-1]


# -- long ones at random ----------------------------------------------------------------------------------------------


def walk(seed: int, steps: int, kind: type[Steward] = Steward) -> History:
    """One course of so many events; returns what was chosen, or raises BrokenInvariant with the seed."""
    rng = random.Random(seed)  # noqa: S311 - a simulation
    endless = (steps, steps, steps)
    stewards = [kind(rank, Scope(endless, endless, steps)) for rank in range(3)]
    sent: list[Message] = []
    seen: set[Message] = set()
    history = History()
    for at in range(steps):
        rank = rng.randrange(3)
        before = stewards[rank]
        after = before.copy()
        moves = [move for move in before.moves() if rng.random() < _EAGERNESS[move]]
        heard = None if moves or not sent else _pick(rng, sent)
        if heard is not None and heard.concerns(after.me):
            after.hear(heard)
        elif moves:
            after.move(moves[0])
        stewards[rank] = after
        new = [message for message in after.sent if message not in seen]
        seen.update(new)
        sent += [message for message in new if not isinstance(message, Vote)]
        for message in new:
            history.add(message)
        history.judge()
        broken = Rule.PROMISE if _has_fallen(before, after) else history.judge_step(stewards, after)
        if broken is not None:
            raise BrokenInvariant(f"not kept: {broken}", (f"seed {seed}, event {at}", f"{after.me}: {moves or heard}"))
    return history


_EAGERNESS: Final = {"ask": 0.03, "propose": 0.15, "restart": 0.02}
"""How likely a steward does it, if it may, when it comes up."""


def _pick(rng: random.Random, sent: list[Message]) -> Message:
    """Mostly one of the last: what is old is mostly of no use to anybody."""
    return rng.choice(sent if rng.random() < 0.1 else sent[-12:])
