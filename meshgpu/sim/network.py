"""Links between simulated machines: ordered and reliable while they are up, and silently dead when a path is cut.

The rules for two Links of one pair are those of the real transport.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from meshgpu.core.events import (
    AddressIdentified,
    DialFailed,
    Event,
    IdentifyFailed,
    Knocked,
    LinkClosed,
    LinkOpened,
    MessageArrived,
)
from meshgpu.model.gossip import KnockOutcome
from meshgpu.model.ids import Address, NodeId
from meshgpu.model.messages import GossipDelta, GossipDigest, KnockResult, Message
from meshgpu.model.trust import Head
from meshgpu.sim.timeline import Timeline
from meshgpu.sim.weather import Weather

DIAL_TIMEOUT_S: Final = 5.0
KNOCK_TIMEOUT_S: Final = 1.0
KEEPALIVE_S: Final = (1.0, 25.0)
"""When a side notices that its Link is dead: at once if it sends and is refused, by keepalive at the latest."""
GOSSIP_SNIPS: Final = 0.05
"""How much rarer that is for gossip, of which there is much more."""


class Host(Protocol):
    """A machine as the network sees it."""

    node: NodeId
    addresses: tuple[Address, ...]
    is_on: bool
    instance: int
    """Which agent process listens; 0 while none does."""
    lag_s: float
    """How much later than others a slow machine gets round to anything."""

    @property
    def is_paused(self) -> bool:
        """Whether its agent gets no processor at all."""
        ...

    def trusts(self, peer: NodeId) -> bool: ...

    def runs(self, agent: object) -> bool:
        """Whether it is this agent that runs there now."""
        ...

    def post(self, event: Event) -> None: ...

    def heads(self) -> tuple[Head, ...]:
        """What it has of the mesh log."""
        ...


@dataclass(slots=True, eq=False)
class _Link:
    """One Link. instances: of (dialler, answerer). arrives: {receiver: when its latest message arrives}."""

    dialler: NodeId
    answerer: NodeId
    instances: tuple[int, int]
    dial: int
    is_dead: bool = False
    arrives: dict[NodeId, float] = field(default_factory=dict)

    def other(self, node: NodeId) -> NodeId:
        return self.answerer if node == self.dialler else self.dialler

    def instance_of(self, node: NodeId) -> int:
        return self.instances[node != self.dialler]


class Network:
    """All paths and Links."""

    def __init__(self, timeline: Timeline, weather: Weather) -> None:
        self._timeline = timeline
        self._weather = weather
        self.hosts: dict[NodeId, Host] = {}
        """By every id that a machine has or had: what is under way to one that it gave up ends there."""
        self._places: dict[NodeId, NodeId] = {}
        self._ends: dict[tuple[NodeId, NodeId], _Link] = {}
        self._cuts: dict[tuple[NodeId, NodeId], int] = {}
        self._slow: dict[tuple[NodeId, NodeId], float] = {}
        self._dials = 0
        self.errands = 0
        """How often somebody was told of new keys who knew only the old ones."""
        self.snips = 0.0
        """Probability that a Link breaks just when a message about a job is sent on it, which is lost or not."""
        self.tap: deque[Message] = deque(maxlen=200)
        """The latest messages on any Link."""
        self.addressees: deque[NodeId] = deque(maxlen=200)
        """Whom each of them was for."""
        self.takes_dials = True
        self.carries = True
        """False while a mesh is put together by `join`: nobody dials, nothing is said."""
        self.sent: Callable[[Message], None] = lambda _message: None
        """Told of every message that a Link takes."""

    # -- faults -------------------------------------------------------------------------------------------------------

    def cut(self, source: NodeId, target: NodeId) -> None:
        """From now on nothing gets from `source` to `target`; cuts add up and are healed one by one."""
        path = self._path(source, target)
        self._cuts[path] = self._cuts.get(path, 0) + 1
        self._break(source, target)

    def heal(self, source: NodeId, target: NodeId) -> None:
        path = self._path(source, target)
        left = self._cuts[path] - 1
        if left:
            self._cuts[path] = left
        else:
            del self._cuts[path]

    def slow_down(self, source: NodeId, target: NodeId, delay_s: float) -> None:
        """Delay one direction of a path; 0 ends it."""
        self._slow[self._path(source, target)] = delay_s

    def is_cut(self, one: NodeId, other: NodeId) -> bool:
        return self._path(one, other) in self._cuts or self._path(other, one) in self._cuts

    def renamed(self, before: NodeId, node: NodeId) -> None:
        """A machine has another id. Its paths are what they were."""
        self.hosts[node] = self.hosts[before]
        self._places[node] = self._places.get(before, before)

    def _path(self, source: NodeId, target: NodeId) -> tuple[NodeId, NodeId]:
        """Between two machines, whatever their ids: by the first that each had."""
        return self._places.get(source, source), self._places.get(target, target)

    def agent_died(self, node: NodeId) -> None:
        """The operating system closes what the process had open: peers hear of it, unless the path is cut."""
        for (end, peer), link in list(self._ends.items()):
            if end == node:
                del self._ends[end, peer]
                self._close_far_end(link, peer, "connection reset")

    def machine_died(self, node: NodeId) -> None:
        """Nobody closes anything."""
        for (end, peer), link in list(self._ends.items()):
            if end == node:
                del self._ends[end, peer]
                self._kill(link)

    # -- what agents ask for ------------------------------------------------------------------------------------------

    def send(self, source: NodeId, target: NodeId, message: Message) -> None:
        link = self._ends.get((source, target))
        if link is None or not self.carries:
            return
        self.sent(message)
        self.tap.append(message)
        self.addressees.append(target)
        is_gossip = isinstance(message, GossipDigest | GossipDelta)
        if self.snips and self._timeline.rng.random() < self.snips * (GOSSIP_SNIPS if is_gossip else 1.0):
            self._snip(link)
        arrives = max(self._arrival(source, target), link.arrives.get(target, 0.0))
        link.arrives[target] = arrives

        def arrive() -> None:
            if not link.is_dead and self._ends.get((target, source)) is link:
                self.hosts[target].post(MessageArrived(source, message))

        self._timeline.at(arrives, arrive)

    def dial(self, source: NodeId, peer: NodeId, address: Address) -> None:
        """Ends in LinkOpened or DialFailed, unless a Link is open already."""
        if (source, peer) in self._ends or not self.takes_dials:
            return
        self._dials += 1
        dial, instance = self._dials, self.hosts[source].instance

        def fail(reason: str) -> None:
            if self.hosts[source].instance == instance and (source, peer) not in self._ends:
                self.hosts[source].post(DialFailed(peer, address, reason))

        answerer = self._listening(source, address)
        if answerer is None:
            self._timeline.after(DIAL_TIMEOUT_S, lambda: fail("timed out"))
        else:
            self._timeline.at(
                self._arrival(source, answerer.node), lambda: self._answer(source, peer, answerer, dial, instance, fail)
            )

    def join(self, one: NodeId, other: NodeId) -> None:
        """Open a Link at both ends at once, as if it had been open for long."""
        self._dials += 1
        link = _Link(one, other, (self.hosts[one].instance, self.hosts[other].instance), self._dials)
        self._open(link, one)
        self._open(link, other)

    def identify(self, source: NodeId, address: Address) -> None:
        answerer = self._listening(source, address)
        if answerer is None or not answerer.instance:
            event: Event = IdentifyFailed(address, "timed out")
        else:
            event = AddressIdentified(address, answerer.node)
        self._timeline.after(0.01, lambda: self.hosts[source].post(event))

    def errand(self, source: NodeId, target: NodeId, tell: Callable[[tuple[Head, ...]], Message]) -> None:
        """A Link under an id that its machine gave up, for one message: `tell` makes it of what `target` has."""
        host = self.hosts.get(target)
        if host is None or host.node != target or not host.instance or not host.trusts(source):
            return  # nobody answers there, or nobody who means this machine by that id
        if self.is_cut(source, target) or (target, source) in self._ends:
            return
        instance = host.instance

        def said() -> None:
            if host.instance != instance:
                return
            if not self.is_cut(source, target):
                self.errands += 1
                host.post(MessageArrived(source, tell(host.heads())))
            if host.instance == instance:
                host.post(LinkClosed(source, "closed by the other side"))

        host.post(LinkOpened(source))
        self._timeline.at(self._arrival(source, target), said)

    def knocks(self, source: NodeId, addresses: tuple[Address, ...]) -> tuple[KnockResult, ...]:
        """Who is behind each address now: an agent, a machine without one, or nothing that can be reached."""
        results = []
        for address in addresses:
            host = self._listening(source, address)
            if host is None:
                results.append(KnockResult(address, KnockOutcome.SILENT))
            elif host.instance:
                results.append(KnockResult(address, KnockOutcome.ANSWERED, host.node))
            else:
                results.append(KnockResult(address, KnockOutcome.REFUSED))
        return tuple(results)

    def knock(self, source: NodeId, peer: NodeId, address: Address) -> None:
        """A bare TCP connection: the host answers it, or refuses where no agent listens; else nothing does."""
        host = self._listening(source, address)
        if host is None:
            outcome, after_s = KnockOutcome.SILENT, KNOCK_TIMEOUT_S
        else:
            outcome = KnockOutcome.ANSWERED if host.instance else KnockOutcome.REFUSED
            after_s = 2 * self._weather.stream_s(self._timeline.rng)
        instance = self.hosts[source].instance

        def done() -> None:
            if self.hosts[source].instance == instance:
                self.hosts[source].post(Knocked(peer, outcome))

        self._timeline.after(after_s, done)

    def close(self, source: NodeId, peer: NodeId, reason: str) -> None:
        """One side gives its Link up."""
        if link := self._ends.get((source, peer)):
            self._close(link, source, reason)

    def drop_untrusted(self, node: NodeId) -> None:
        host = self.hosts[node]
        for (end, peer), link in list(self._ends.items()):
            if end == node and not host.trusts(peer):
                self._close(link, node, "no longer trusted")

    def can_reach(self, source: NodeId, target: NodeId) -> bool:
        """Whether a bulk stream from `source` to `target` would work now."""
        return source == target or (bool(self.hosts[target].instance) and not self.is_cut(source, target))

    @property
    def ends(self) -> int:
        """Of Links that somebody holds for open: two of each, while neither side has noticed that it is dead."""
        return len(self._ends)

    def is_linked(self, one: NodeId, other: NodeId) -> bool:
        link = self._ends.get((one, other))
        return link is not None and not link.is_dead and self._ends.get((other, one)) is link

    # -- the life of a Link -------------------------------------------------------------------------------------------

    def _answer(
        self,
        source: NodeId,
        peer: NodeId,
        answerer: Host,
        dial: int,
        instance: int,
        fail: Callable[[str], None],
    ) -> None:
        back = self._arrival(answerer.node, source)
        is_welcome = answerer.node == peer and answerer.trusts(source) and self.hosts[source].trusts(peer)
        if self.is_cut(source, peer) or answerer.is_paused:
            self._timeline.after(DIAL_TIMEOUT_S, lambda: fail("timed out"))
            return
        if not answerer.instance or not is_welcome:
            self._timeline.at(back, lambda: fail("connection refused"))
            return
        link = _Link(source, peer, (instance, answerer.instance), dial)
        if not self._open(link, peer):
            self._timeline.at(back, lambda: fail("another Link is open"))
            return
        link.arrives[source] = back
        self._timeline.at(back, lambda: self._welcome(link))

    def _welcome(self, link: _Link) -> None:
        """The dialler hears that it was let in."""
        is_same = self.hosts[link.dialler].instance == link.instances[0]
        if link.is_dead or self._ends.get((link.answerer, link.dialler)) is not link:
            if is_same and (link.dialler, link.answerer) not in self._ends:
                address = self.hosts[link.answerer].addresses[0]
                self.hosts[link.dialler].post(DialFailed(link.answerer, address, "connection lost"))
        elif not is_same or not self._open(link, link.dialler):
            self._close_far_end(link, link.answerer, "closed by the other side")

    def _open(self, link: _Link, end: NodeId) -> bool:
        """Make `link` the one Link of its pair at `end`, unless the one that is open must stay."""
        peer = link.other(end)
        current = self._ends.get((end, peer))
        if current is not None:
            if not self._wins(link, current, end):
                return False
            self._close(current, end, "replaced by a newer Link")
        self._ends[end, peer] = link
        self.hosts[end].post(LinkOpened(peer, str(link.instance_of(peer))))
        return True

    def _wins(self, link: _Link, current: _Link, end: NodeId) -> bool:
        peer = link.other(end)
        if link.instance_of(peer) != current.instance_of(peer):
            return True
        if link.dialler != current.dialler:
            return (link.dialler == end) == (end < peer)
        return link.dial > current.dial

    def _close(self, link: _Link, end: NodeId, reason: str) -> None:
        peer = link.other(end)
        if self._ends.get((end, peer)) is link:
            del self._ends[end, peer]
            self.hosts[end].post(LinkClosed(peer, reason))
            self._close_far_end(link, peer, "closed by the other side")

    def _close_far_end(self, link: _Link, end: NodeId, reason: str) -> None:
        other = link.other(end)
        if link.is_dead or self.is_cut(end, other):
            self._kill(link)
            return
        arrives = max(self._arrival(other, end), link.arrives.get(end, 0.0))
        self._timeline.at(arrives, lambda: self._notice(link, end, reason))

    def _break(self, one: NodeId, other: NodeId) -> None:
        for end, peer in ((one, other), (other, one)):
            link = self._ends.get((end, peer))
            if link is not None:
                self._kill(link)

    def _snip(self, link: _Link) -> None:
        """Break a Link now, or just after what is under way has arrived; both ends notice soon."""
        rng = self._timeline.rng
        breaks_s = rng.choice((0.0, 0.01))
        self._timeline.after(breaks_s, lambda: setattr(link, "is_dead", True))
        for end in (link.dialler, link.answerer):
            delay_s = breaks_s + rng.uniform(0.0, 2.0)
            self._timeline.after(delay_s, lambda end=end: self._notice(link, end, "connection reset"))  # type: ignore[misc]  # mypy cannot type a bound default
        if not breaks_s:
            link.is_dead = True

    def _kill(self, link: _Link) -> None:
        """Nothing passes any more; each end notices by itself."""
        if not link.is_dead:
            link.is_dead = True
            for end in (link.dialler, link.answerer):
                delay_s = self._timeline.rng.uniform(*KEEPALIVE_S)
                self._timeline.after(delay_s, lambda end=end: self._notice(link, end, "keepalive timed out"))  # type: ignore[misc]  # mypy cannot type a bound default

    def _notice(self, link: _Link, end: NodeId, reason: str) -> None:
        peer = link.other(end)
        if self._ends.get((end, peer)) is link:
            del self._ends[end, peer]
            self.hosts[end].post(LinkClosed(peer, reason))

    def _listening(self, source: NodeId, address: Address) -> Host | None:
        """Whose machine answers there; None where nothing does, not even with a refusal."""
        host = next((host for host in self.hosts.values() if address in host.addresses), None)
        return host if host is not None and host.is_on and not self.is_cut(source, host.node) else None

    def _arrival(self, source: NodeId, target: NodeId) -> float:
        delay_s = self._weather.stream_s(self._timeline.rng) + self._slow.get(self._path(source, target), 0.0)
        return self._timeline.time_s + delay_s + self.hosts[target].lag_s
