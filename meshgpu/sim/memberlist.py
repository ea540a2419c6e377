"""hashicorp/memberlist with its default LAN configuration, as a small model over simulated datagrams.

Modelled after its source at commit 1b4c746: `config.go` (DefaultLANConfig), `state.go` (probe, gossip, push/pull, and
what follows from alive, suspect and dead), `suspicion.go`, `awareness.go`, `queue.go` and `util.go` (the formulas).
Left out: compression (on by default; it makes its packets smaller than counted here), encryption (off by default),
labels, names in conflict, leaving. Packets are counted as msgpack writes them, with 5 bytes of checksum header.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from meshgpu.sim.timeline import Timeline
from meshgpu.sim.weather import Weather

DATAGRAM_BYTES: Final = 28 + 5
"""Around each packet: IPv4 and UDP headers, memberlist's checksum."""
STREAM_BYTES: Final = 52
"""Around each TCP segment: IPv4 and TCP headers with timestamps."""
SEGMENT_BYTES: Final = 1448
HANDSHAKE_BYTES: Final = 7 * STREAM_BYTES
"""What it takes to open a TCP connection and to close it, both sides together."""
CONNECT_TIMEOUT_S: Final = 10.0
"""TCPTimeout."""


@dataclass(frozen=True, slots=True)
class LanConfig:
    """DefaultLANConfig of config.go, by its own names."""

    gossip_interval_s: float = 0.2
    gossip_nodes: int = 3
    gossip_to_the_dead_s: float = 30.0
    retransmit_mult: int = 4
    probe_interval_s: float = 1.0
    probe_timeout_s: float = 0.5
    indirect_checks: int = 3
    suspicion_mult: int = 4
    suspicion_max_timeout_mult: int = 6
    push_pull_s: float = 30.0
    awareness_max: int = 8
    udp_buffer_bytes: int = 1400


def retransmit_limit(mult: int, nodes: int) -> int:
    """How often one node sends a broadcast (util.go, retransmitLimit)."""
    return mult * math.ceil(math.log10(nodes + 1))


def suspicion_s(config: LanConfig, nodes: int) -> tuple[float, float]:
    """Shortest and longest life of a suspicion (util.go, suspicionTimeout; state.go, suspectNode)."""
    shortest = config.suspicion_mult * max(1.0, math.log10(max(1.0, nodes))) * config.probe_interval_s
    return shortest, shortest * config.suspicion_max_timeout_mult


def push_pull_s(config: LanConfig, nodes: int) -> float:
    """Time between two full exchanges; longer from 33 nodes on (util.go, pushPullScale)."""
    return config.push_pull_s * (1.0 if nodes <= 32 else math.ceil(math.log2(nodes) - math.log2(32)) + 1.0)


class State(IntEnum):
    ALIVE = 0
    SUSPECT = 1
    DEAD = 2


@dataclass(frozen=True, slots=True)
class Alive:
    """meta: a number that stands for what the node says of itself; it takes `meta_bytes` on the wire."""

    node: int
    incarnation: int
    meta: int
    meta_bytes: int

    @property
    def size(self) -> int:
        return _map_bytes(Incarnation=4, Node=_name(self.node), Addr=5, Port=3, Meta=2 + self.meta_bytes, Vsn=7)


@dataclass(frozen=True, slots=True)
class _Accusation:
    """What `by` says of a node under an incarnation of it."""

    node: int
    incarnation: int
    by: int

    @property
    def size(self) -> int:
        return _map_bytes(Incarnation=3, Node=_name(self.node), From=_name(self.by))


class Suspect(_Accusation):
    __slots__ = ()


class Dead(_Accusation):
    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Ping:
    number: int
    target: int
    source: int

    @property
    def size(self) -> int:
        return _map_bytes(SeqNo=3, Node=_name(self.target), SourceAddr=5, SourcePort=3, SourceNode=_name(self.source))


@dataclass(frozen=True, slots=True)
class IndirectPing:
    number: int
    target: int
    source: int

    @property
    def size(self) -> int:
        return _map_bytes(
            SeqNo=3,
            Target=5,
            Port=3,
            Node=_name(self.target),
            Nack=1,
            SourceAddr=5,
            SourcePort=3,
            SourceNode=_name(self.source),
        )


@dataclass(frozen=True, slots=True)
class Ack:
    number: int

    @property
    def size(self) -> int:
        return _map_bytes(SeqNo=3, Payload=1)


@dataclass(frozen=True, slots=True)
class Nack:
    number: int

    @property
    def size(self) -> int:
        return _map_bytes(SeqNo=3)


Rumour = Alive | Suspect | Dead
Message = Rumour | Ping | IndirectPing | Ack | Nack


def _map_bytes(**values: int) -> int:
    """A message's type and its fields as a msgpack map; values: bytes of each."""
    return 2 + sum(1 + len(key) + value for key, value in values.items())


def _name(node: int) -> int:
    return 1 + len(f"rig{node}")


class Air:
    """The network between all members of one group. Cuts and machines that are off swallow everything."""

    def __init__(self, timeline: Timeline, weather: Weather) -> None:
        self.timeline = timeline
        self.weather = weather
        self.members: list[Memberlist] = []
        self.cuts: set[tuple[int, int]] = set()
        self.sent_bytes = 0

    def send(self, source: int, target: int, messages: list[Message]) -> None:
        """One datagram; more than one message make it a compound one (2 bytes, and 2 for each)."""
        size = sum(message.size for message in messages)
        self.sent_bytes += DATAGRAM_BYTES + size + (2 + 2 * len(messages) if len(messages) > 1 else 0)
        delay_s = self.weather.datagram_s(self.timeline.rng)
        if delay_s is not None and (source, target) not in self.cuts:
            member = self.members[target]
            self.timeline.after(delay_s + member.lag_s, lambda: member.do(lambda: member.take(source, messages)))

    def call(
        self, source: int, target: int, request_bytes: int, answer: Callable[[], int], done: Callable[[], None]
    ) -> None:
        """A TCP connection. answer: what the target does with the request, and the bytes it answers with; done: what
        the source does with those. Neither happens where nothing answers.
        """
        self.sent_bytes += HANDSHAKE_BYTES + _stream_bytes(request_bytes)
        rng, one, other = self.timeline.rng, self.members[source], self.members[target]
        instance = other.instance

        def asked() -> None:
            if other.instance != instance or not instance or (source, target) in self.cuts:
                return
            self.sent_bytes += _stream_bytes(answer())
            if (target, source) not in self.cuts:
                self.timeline.after(self.weather.stream_s(rng) + one.lag_s, lambda: one.do(done))

        # the handshake there and back, then the request
        there_s = sum(self.weather.stream_s(rng) for _ in range(3))
        self.timeline.after(there_s + other.lag_s, lambda: other.do(asked))


def _stream_bytes(size: int) -> int:
    """Segments, and an acknowledgement for every second of them."""
    segments = max(math.ceil(size / SEGMENT_BYTES), 1)
    return size + segments * STREAM_BYTES + math.ceil(segments / 2) * STREAM_BYTES


@dataclass(slots=True)
class _View:
    """What one member holds of another. suspicion: the one that runs."""

    said: Alive
    state: State = State.ALIVE
    changed_at: float = 0.0
    suspicion: "_Suspicion | None" = None


@dataclass(slots=True)
class _Suspicion:
    """wanted: confirmations after which it lasts its shortest time (k of suspicion.go). by: who suspects."""

    began_at: float
    wanted: int
    shortest_s: float
    longest_s: float
    by: set[int]

    def ends_at(self) -> float:
        """remainingSuspicionTime of suspicion.go."""
        if not self.wanted:
            return self.began_at + self.shortest_s
        part = math.log(len(self.by)) / math.log(self.wanted + 1)  # `by` counts the first one too
        return self.began_at + max(self.longest_s - part * (self.longest_s - self.shortest_s), self.shortest_s)


@dataclass(slots=True)
class _Broadcast:
    rumour: Rumour
    number: int
    transmits: int = 0


@dataclass(slots=True)
class _Probe:
    """One probe under way, own or for somebody else. answered: what an Ack does."""

    answered: Callable[[], None]
    nacks: int = 0


@dataclass(slots=True)
class Memberlist:
    """One member. `noticed` is told after whatever changed its view."""

    me: int
    air: Air
    rng: random.Random
    config: LanConfig = field(default_factory=LanConfig)
    noticed: Callable[[int], None] = lambda _me: None
    lag_s: float = 0.0
    instance: int = 0
    health: int = 0
    views: dict[int, _View] = field(default_factory=dict)
    _starts: int = 0
    _queue: dict[int, _Broadcast] = field(default_factory=dict)
    _queued: int = 0
    _numbers: int = 0
    _probes: dict[int, _Probe] = field(default_factory=dict)
    _is_probing: bool = False
    _round: list[int] = field(default_factory=list)
    _paused_until_s: float = 0.0

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self, views: dict[int, Alive]) -> None:
        """Begin as a member that knows `views`, itself among them."""
        self._starts += 1
        self.instance = self._starts
        self.views = {node: _View(said) for node, said in views.items()}
        config = self.config
        for interval_s, act in ((config.probe_interval_s, self._probe), (config.gossip_interval_s, self._gossip)):
            self._tick(self.rng.uniform(interval_s, 2 * interval_s), interval_s, act)
        self._after(self.rng.uniform(0.0, config.push_pull_s) + self._push_pull_s(), self._push_pull)

    def stop(self) -> None:
        """The process is killed."""
        self.instance, self.health = 0, 0
        self.views, self._queue, self._probes, self._round = {}, {}, {}, []
        self._is_probing, self._paused_until_s = False, 0.0

    def join(self, through: int) -> None:
        """As a process does that has just started: exchange everything with one member that it was told of."""
        self._exchange(through)

    def pause(self, for_s: float) -> None:
        """Stand still, as under SIGSTOP."""
        self._paused_until_s = max(self._paused_until_s, self._now + for_s)

    def do(self, act: Callable[[], None]) -> None:
        """Act now, unless the process is gone; a stopped one acts when it goes on."""
        life = self.instance
        if self._now < self._paused_until_s:
            self.air.timeline.at(self._paused_until_s, lambda: self.do(act) if self.instance == life else None)
        elif life:
            act()
            self.noticed(self.me)

    def say(self, meta: int, meta_bytes: int) -> None:
        """UpdateNode: change what this member says of itself, and broadcast it."""
        own = self.views[self.me]
        own.said = Alive(self.me, own.said.incarnation + 1, meta, meta_bytes)
        self._broadcast(own.said)

    def _after(self, delay_s: float, act: Callable[[], None]) -> None:
        life = self.instance
        self.air.timeline.after(delay_s + self.lag_s, lambda: self.do(act) if self.instance == life else None)

    def _tick(self, first_s: float, interval_s: float, act: Callable[[], None]) -> None:
        """A ticker: one that comes late drops the ticks that it missed."""

        def ticked() -> None:
            act()
            self._after(interval_s, ticked)

        self._after(first_s, ticked)

    @property
    def _now(self) -> float:
        return self.air.timeline.time_s

    # -- gossip -------------------------------------------------------------------------------------------------------

    def _broadcast(self, rumour: Rumour) -> None:
        """Queue it; an older one about the same member is dropped."""
        self._queued += 1
        self._queue[rumour.node] = _Broadcast(rumour, self._queued)

    def _take_broadcasts(self, room_bytes: int) -> list[Message]:
        """What fits, those first that were sent least often; of those the largest, then the newest (queue.go)."""
        if not self._queue:
            return []
        limit = retransmit_limit(self.config.retransmit_mult, len(self.views))
        taken: list[Message] = []
        for found in sorted(self._queue.values(), key=lambda b: (b.transmits, -b.rumour.size, -b.number)):
            size = found.rumour.size + 2
            if size > room_bytes:
                continue
            room_bytes -= size
            taken.append(found.rumour)
            found.transmits += 1
            if found.transmits >= limit:
                del self._queue[found.rumour.node]
        return taken

    def _gossip(self) -> None:
        if not self._queue:
            return
        for target in self._some(self.config.gossip_nodes, self._hears_gossip):
            messages = self._take_broadcasts(self.config.udp_buffer_bytes - 2)
            if not messages:
                return
            self.air.send(self.me, target, messages)

    def _hears_gossip(self, view: _View) -> bool:
        return view.state is not State.DEAD or self._now - view.changed_at <= self.config.gossip_to_the_dead_s

    def _send(self, target: int, message: Message) -> None:
        """With as many broadcasts as fit beside it."""
        self.air.send(
            self.me, target, [message, *self._take_broadcasts(self.config.udp_buffer_bytes - message.size - 2)]
        )

    def _some(self, count: int, suits: Callable[[_View], bool]) -> list[int]:
        suiting = [node for node, view in self.views.items() if node != self.me and suits(view)]
        return self.rng.sample(suiting, min(count, len(suiting)))

    def _push_pull_s(self) -> float:
        return push_pull_s(self.config, len(self.views))

    def _push_pull(self) -> None:
        self._after(self._push_pull_s(), self._push_pull)
        for target in self._some(1, lambda view: view.state is State.ALIVE):
            self._exchange(target)

    def _exchange(self, target: int) -> None:
        """Everything that either side knows, over TCP."""
        other = self.air.members[target]
        sent, answer = self.everything(), list[tuple[Alive, State]]()

        def answered() -> int:
            answer.extend(other.everything())
            other.merge(sent)
            return _state_bytes(answer)

        self.air.call(self.me, target, _state_bytes(sent), answered, lambda: self.merge(answer))

    def everything(self) -> list[tuple[Alive, State]]:
        return [(view.said, view.state) for view in self.views.values()]

    def merge(self, states: list[tuple[Alive, State]]) -> None:
        """mergeState of state.go: whom the other side calls dead is only suspected here."""
        for said, state in states:
            if state is State.ALIVE:
                self._alive(said)
            else:
                self._suspect(Suspect(said.node, said.incarnation, self.me))

    # -- rumours ------------------------------------------------------------------------------------------------------

    def take(self, source: int, messages: list[Message]) -> None:
        for message in messages:
            match message:
                case Alive():
                    self._alive(message)
                case Suspect():
                    self._suspect(message)
                case Dead():
                    self._dead(message)
                case Ping(number=number):
                    if message.target == self.me:
                        self._send(message.source, Ack(number))
                case IndirectPing():
                    self._ping_for(source, message)
                case Ack(number=number):
                    if probe := self._probes.pop(number, None):
                        probe.answered()
                case Nack(number=number):
                    if probe := self._probes.get(number):
                        probe.nacks += 1

    def _alive(self, said: Alive) -> None:
        view = self.views.get(said.node)
        if view is None:
            view = self.views[said.node] = _View(replaced(said, -1), State.DEAD)
        if said.node == self.me:
            if said.incarnation > view.said.incarnation:  # of a life before this one
                self._refute(view, said.incarnation)
            return
        if said.incarnation <= view.said.incarnation:
            return
        self._broadcast(said)
        view.said, view.suspicion = said, None
        if view.state is not State.ALIVE:
            view.state, view.changed_at = State.ALIVE, self._now

    def _suspect(self, rumour: Suspect) -> None:
        view = self.views.get(rumour.node)
        if view is None or rumour.incarnation < view.said.incarnation:
            return
        if view.suspicion is not None:
            self._confirm(view, view.suspicion, rumour)
        elif view.state is State.ALIVE and rumour.node == self.me:
            self._refute(view, rumour.incarnation)
        elif view.state is State.ALIVE:
            self._broadcast(rumour)
            view.said = replaced(view.said, rumour.incarnation)
            view.state, view.changed_at = State.SUSPECT, self._now
            wanted = self.config.suspicion_mult - 2
            shortest, longest = suspicion_s(self.config, len(self.views))
            wanted = wanted if len(self.views) - 2 >= wanted else 0
            view.suspicion = _Suspicion(self._now, wanted, shortest, longest, {rumour.by})
            self._expire_at(view, view.suspicion)

    def _confirm(self, view: _View, suspicion: _Suspicion, rumour: Suspect) -> None:
        if len(suspicion.by) <= suspicion.wanted and rumour.by not in suspicion.by:
            suspicion.by.add(rumour.by)
            self._broadcast(rumour)
            self._expire_at(view, suspicion)

    def _expire_at(self, view: _View, suspicion: _Suspicion) -> None:
        ends_at = suspicion.ends_at()

        def expired() -> None:
            if view.suspicion is suspicion and suspicion.ends_at() <= self._now + 1e-9:
                self._dead(Dead(view.said.node, view.said.incarnation, self.me))

        self._after(max(ends_at - self._now, 0.0), expired)

    def _dead(self, rumour: Dead) -> None:
        view = self.views.get(rumour.node)
        if view is None or rumour.incarnation < view.said.incarnation:
            return
        view.suspicion = None
        if view.state is State.DEAD:
            return
        if rumour.node == self.me:
            self._refute(view, rumour.incarnation)
            return
        self._broadcast(rumour)
        view.said = replaced(view.said, rumour.incarnation)
        view.state, view.changed_at = State.DEAD, self._now

    def _refute(self, own: _View, accused: int) -> None:
        own.said = replaced(own.said, max(accused, own.said.incarnation) + 1)
        own.state = State.ALIVE
        self._feel(1)
        self._broadcast(own.said)

    # -- probing ------------------------------------------------------------------------------------------------------

    def _feel(self, delta: int) -> None:
        """Local health (awareness.go): 0 is well."""
        self.health = min(max(self.health + delta, 0), self.config.awareness_max - 1)

    def _probe(self) -> None:
        """The next member in an order that is drawn anew each round; dead ones are left out."""
        if self._is_probing:
            return
        for _ in range(2):
            while self._round:
                target = self._round.pop()
                if target in self.views and self.views[target].state is not State.DEAD:
                    self._probe_one(target, self.views[target])
                    return
            self._forget_the_dead()
            self._round = [node for node in self.views if node != self.me]
            self.rng.shuffle(self._round)

    def _forget_the_dead(self) -> None:
        for node in [node for node, view in self.views.items() if not self._hears_gossip(view)]:
            del self.views[node]

    def _probe_one(self, target: int, view: _View) -> None:
        number = self._next()
        interval_s = self.config.probe_interval_s * (self.health + 1)
        helpers: list[int] = []
        reached: list[bool] = []
        self._is_probing = True

        def answered() -> None:
            self._is_probing = False
            self._feel(-1)

        def ask_others() -> None:
            if number not in self._probes:
                return
            alive = [n for n in self._some(len(self.views), lambda v: v.state is State.ALIVE) if n != target]
            helpers.extend(alive[: self.config.indirect_checks])
            for helper in helpers:
                self._send(helper, IndirectPing(number, target, self.me))
            ping = Ping(number, target, self.me).size
            self.air.call(self.me, target, ping, lambda: Ack(number).size, lambda: reached.append(True))

        def conclude() -> None:
            probe = self._probes.pop(number, None)
            if probe is None:
                return
            self._is_probing = False
            if reached:
                self._feel(-1)
                return
            self._feel(len(helpers) - probe.nacks if helpers else 1)
            self._suspect(Suspect(target, view.said.incarnation, self.me))

        self._probes[number] = _Probe(answered)
        ping = Ping(number, target, self.me)
        if view.state is State.ALIVE:
            self._send(target, ping)
        else:
            self.air.send(self.me, target, [ping, Suspect(target, view.said.incarnation, self.me)])
        self._after(self.config.probe_timeout_s, ask_others)
        self._after(interval_s, conclude)

    def _ping_for(self, source: int, asked: IndirectPing) -> None:
        """Probe for somebody else; say so if nothing comes of it."""
        number = self._next()
        self._probes[number] = _Probe(lambda: self._send(source, Ack(asked.number)))
        self._send(asked.target, Ping(number, asked.target, self.me))

        def silent() -> None:
            if self._probes.pop(number, None):
                self._send(source, Nack(asked.number))

        self._after(self.config.probe_timeout_s, silent)

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers


def replaced(said: Alive, incarnation: int) -> Alive:
    """The same under another incarnation."""
    return Alive(said.node, incarnation, said.meta, said.meta_bytes)


def _state_bytes(states: list[tuple[Alive, State]]) -> int:
    """pushPullHeader and a pushNodeState for each (net.go, sendLocalState)."""
    return 40 + sum(said.size + 8 for said, _ in states)
