"""Two meshes to be studied alike: ours, which runs the real core, and one of memberlist's members."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from meshgpu.core.effects import Effect
from meshgpu.core.events import AddressesChanged, Event
from meshgpu.model.gossip import MemberState
from meshgpu.model.messages import GossipDelta, GossipDigest, LogDelta, Message
from meshgpu.model.trust import Signed
from meshgpu.sim.machine import Machine
from meshgpu.sim.memberlist import Air, Alive, Memberlist, State, push_pull_s
from meshgpu.sim.timeline import Timeline
from meshgpu.sim.weather import Weather
from meshgpu.sim.world import World, WorldConfig

FRAME_BYTES: Final = 5 + 9 + 22 + 52 + 52
"""Around each message on a Link: gRPC and HTTP/2 headers, the TLS record, IPv4 and TCP headers, and the segment that
acknowledges it. What is lost is counted once."""
KEEPALIVE_BYTES_PER_S: Final = 2 * (17 + 22 + 52 + 52) / 15.0
"""Of each end of a Link: a ping each 15 s, and the answer to the other side's."""
SIGNATURE_BYTES: Final = 64
FOUND_S: Final = 6.0
"""Within which all know all through one machine that is linked to all: a digest a second each way."""
MEMORY_BYTES: Final = 64 * 10**9


class Mesh(Protocol):
    """Machines by number. stepped: told of a machine after whatever it did."""

    timeline: Timeline
    size: int
    stepped: Callable[[int], None]

    @property
    def sent_bytes(self) -> float:
        """By all machines, since all was well."""
        ...

    def change(self, node: int) -> None:
        """Let the machine say something new of itself."""
        ...

    def read(self, node: int) -> None:
        """Its GPUs were read and are warmer or cooler than before."""
        ...

    def knows(self, observer: int, node: int) -> bool:
        """Whether the observer has heard the newest of it."""
        ...

    def holds_down(self, observer: int, node: int) -> bool: ...

    def kill(self, node: int) -> None:
        """Kill the agent: its kernel says so to whoever is connected."""
        ...

    def lose(self, node: int) -> None:
        """The machine is gone from one moment to the next."""
        ...

    def restore(self, node: int) -> None: ...

    def starve(self, node: int, lag_s: float) -> None:
        """From now on it gets round to anything that much later."""
        ...

    def pause(self, node: int, for_s: float) -> None:
        """Its agent stands still, as under SIGSTOP: the kernel goes on taking in what others send."""
        ...

    def cut(self, one: int, other: int) -> None: ...

    def heal(self, one: int, other: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes on the wire, which this room must not know: of a value that is signed, and of a message in its frame."""

    value: Callable[[object], int]
    frame: Callable[[Message], int]


class Scale:
    """Weighs messages whose signed payloads stand for values. Digests are weighed once for each number of rows."""

    def __init__(self, sizes: Sizes, decode: Callable[[bytes], object]) -> None:
        self._sizes = sizes
        self._decode = decode
        self._real: dict[bytes, Signed] = {}
        self._digests: dict[tuple[int, int], int] = {}
        self._last: tuple[Message, int] | None = None

    def weigh(self, message: Message) -> int:
        if self._last is not None and self._last[0] is message:
            return self._last[1]  # one push goes to many
        size = self._digest(message) if isinstance(message, GossipDigest) else self._other(message)
        self._last = message, size
        return size

    def _digest(self, digest: GossipDigest) -> int:
        key = len(digest.known), len(digest.heads)
        if key not in self._digests:
            self._digests[key] = self._sizes.frame(digest)
        return self._digests[key]

    def _other(self, message: Message) -> int:
        if isinstance(message, GossipDelta | LogDelta):
            message = replace(message, entries=tuple(self._as_real(signed) for signed in message.entries))
        return self._sizes.frame(message)

    def _as_real(self, signed: Signed) -> Signed:
        found = self._real.get(signed.payload)
        if found is None:
            payload = bytes(self._sizes.value(self._decode(signed.payload)))
            found = self._real[signed.payload] = Signed(signed.kind, payload, signed.key, bytes(SIGNATURE_BYTES))
        return found


class OurMesh:
    """The real core on every machine, from the moment at which all know all."""

    def __init__(self, seed: int, size: int, weather: Weather, sizes: Sizes | None) -> None:
        """Without `sizes` nothing is weighed."""
        self.size = size
        self.sent_bytes = 0.0
        self.stepped: Callable[[int], None] = lambda _node: None
        self.world = World(seed, WorldConfig(size, is_plain=True, transcript=_Watch(self._heard), weather=weather))
        self.timeline = self.world.timeline
        self.machines = tuple(self.world.machines.values())
        self._number = {machine.node: number for number, machine in enumerate(self.machines)}
        self._latest = [MEMORY_BYTES] * size
        self._temperature = 30
        self._come_together()
        if sizes is not None:
            self._scale = Scale(sizes, self.world.office.ring.decode)
            self.world.network.sent = self._sent
            self.timeline.after(1.0, self._keep_alive)

    def _come_together(self) -> None:
        """As if all had been up for long: one machine tells all about all, and then every Link is open.

        For a mesh of 300 that saves 45,000 handshakes, of which each would tell both sides what they know already.
        """
        network, hub = self.world.network, self.machines[0]
        announce = hub.announce
        for machine in self.machines:
            machine.announce = lambda _machine: None
        network.takes_dials = False
        self.world.start()
        self.world.run(0.1)  # the mesh log is on every disk
        for machine in self.machines:
            machine.post(AddressesChanged(machine.addresses))
        for machine in self.machines[1:]:
            network.join(hub.node, machine.node)
        self.world.run(FOUND_S)
        network.carries = False
        for number, machine in enumerate(self.machines[1:], start=1):
            for other in self.machines[number + 1 :]:
                network.join(machine.node, other.node)
        network.carries = network.takes_dials = True
        for machine in self.machines:
            machine.announce = announce

    def _sent(self, message: Message) -> None:
        self.sent_bytes += FRAME_BYTES + self._scale.weigh(message)

    def _keep_alive(self) -> None:
        self.sent_bytes += self.world.network.ends * KEEPALIVE_BYTES_PER_S
        self.timeline.after(1.0, self._keep_alive)

    def _heard(self, machine: Machine) -> None:
        self.stepped(self._number[machine.node])

    def change(self, node: int) -> None:
        self._latest[node] += 1
        self.machines[node].redescribe(self._latest[node])

    def read(self, node: int) -> None:
        machine = self.machines[node]
        self._temperature = 30 + (self._temperature - 29) % 60
        machine.readings = tuple(replace(reading, temperature_c=self._temperature) for reading in machine.readings)

    def said_bytes(self, sizes: Sizes) -> int:
        """What a machine says of itself, without signatures."""
        return sum(sizes.value(value) for value in self.machines[0].heard(self.machines[0].node) if value is not None)

    def knows(self, observer: int, node: int) -> bool:
        record, _ = self.machines[observer].heard(self.machines[node].node)
        return record is not None and record.inventory.memory_bytes >= self._latest[node]

    def holds_down(self, observer: int, node: int) -> bool:
        agent = self.machines[observer].agent
        return agent is not None and agent.state(self.machines[node].node) is MemberState.DOWN

    def kill(self, node: int) -> None:
        self.machines[node].crash_agent()

    def lose(self, node: int) -> None:
        self.machines[node].power_off()

    def restore(self, node: int) -> None:
        self.machines[node].power_on()
        self.machines[node].start_agent()

    def starve(self, node: int, lag_s: float) -> None:
        self.machines[node].lag_s = lag_s

    def pause(self, node: int, for_s: float) -> None:
        self.machines[node].pause(for_s)

    def cut(self, one: int, other: int) -> None:
        self.world.network.cut(self.machines[one].node, self.machines[other].node)

    def heal(self, one: int, other: int) -> None:
        self.world.network.heal(self.machines[one].node, self.machines[other].node)


@dataclass(frozen=True, slots=True)
class _Watch:
    """Where a world keeps its transcript: tells who has done something."""

    heard: Callable[[Machine], None]

    def stepped(self, time_s: float, machine: Machine, event: Event | None, effects: list[Effect]) -> None:  # noqa: ARG002 - a transcript's
        self.heard(machine)


class MemberlistMesh:
    """Members of one group that has been up for a while. meta_bytes: of what each says of itself."""

    def __init__(self, seed: int, size: int, weather: Weather, meta_bytes: int) -> None:
        self.size = size
        self.timeline = Timeline(seed)
        self.stepped: Callable[[int], None] = lambda _node: None
        self._meta_bytes = meta_bytes
        self._latest = [0] * size
        self.air = Air(self.timeline, weather)
        for node in range(size):
            rng = random.Random(f"{seed} memberlist {node}")  # noqa: S311 - a reproducible world
            self.air.members.append(Memberlist(node, self.air, rng, noticed=lambda node: self.stepped(node)))
        said = {node: Alive(node, 1, 0, meta_bytes) for node in range(size)}
        for member in self.air.members:
            member.start(said)
        config = self.air.members[0].config
        self.timeline.run_until(config.push_pull_s + push_pull_s(config, size))  # each has had its first full exchange

    @property
    def sent_bytes(self) -> float:
        return self.air.sent_bytes

    def change(self, node: int) -> None:
        self._latest[node] += 1
        self.air.members[node].say(self._latest[node], self._meta_bytes)

    def read(self, node: int) -> None:
        self.change(node)

    def knows(self, observer: int, node: int) -> bool:
        view = self.air.members[observer].views.get(node)
        return view is not None and view.said.meta >= self._latest[node]

    def holds_down(self, observer: int, node: int) -> bool:
        member = self.air.members[observer]
        if not member.instance:
            return False
        view = member.views.get(node)
        return view is None or view.state is State.DEAD

    def kill(self, node: int) -> None:
        """Nobody is connected, so nobody hears of it."""
        self.air.members[node].stop()

    def lose(self, node: int) -> None:
        self.air.members[node].stop()

    def restore(self, node: int) -> None:
        member = self.air.members[node]
        member.start({node: Alive(node, 1, self._latest[node], self._meta_bytes)})
        member.join((node + 1) % self.size)

    def starve(self, node: int, lag_s: float) -> None:
        self.air.members[node].lag_s = lag_s

    def pause(self, node: int, for_s: float) -> None:
        self.air.members[node].pause(for_s)

    def cut(self, one: int, other: int) -> None:
        self.air.cuts.add((one, other))

    def heal(self, one: int, other: int) -> None:
        self.air.cuts.discard((one, other))
