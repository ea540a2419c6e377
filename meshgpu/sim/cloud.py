"""A simulated seller: tokens, lost replies, shortage, descriptions that lag, and the nets of each instance.

It behaves as EC2 documents itself where that matters: a token that was used returns the instance of that time, with
other parameters it is refused; a description may lag behind the call. The instances have the timers that user data
sets up before anything else runs.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from meshgpu.core.effects import BurstEffect, Enrol, Launch, PrepareLaunch, SurveyCloud, Terminate, Welcome
from meshgpu.core.events import (
    BurstEvent,
    CloudSurveyed,
    Enrolled,
    LaunchEnded,
    LaunchPrepared,
    TerminateEnded,
    WelcomeEnded,
)
from meshgpu.model.cloud import Instance, InstanceState, LaunchId, LaunchRequest, Market, Rung
from meshgpu.model.ids import NodeId, node_id
from meshgpu.model.resources import GB
from meshgpu.sim.timeline import Timeline

CALL_S: Final = (0.05, 3.0)
ADDRESS_S: Final = (5.0, 40.0)
BOOT_S: Final = (20.0, 150.0)
"""After the launch: an address; the bootstrap listener."""
ENDING_S: Final = (2.0, 60.0)
LAG_S: Final = 20.0
"""How long a new instance may be missing from descriptions."""
TIMEOUT_S: Final = 60.0
"""When a caller gives up on a call whose request or reply was lost."""
TOKEN_S: Final = 900.0
"""How long a token is remembered: far less than EC2's day, so that nobody may count on it."""
VANISH_S: Final = 3600.0
"""How long a terminated instance is still described."""
BOOTSTRAP_S: Final = 900.0
"""How long the bootstrap certificate holds."""
LIVE: Final = (InstanceState.PENDING, InstanceState.RUNNING)


@dataclass(frozen=True, slots=True)
class CloudFaults:
    """Probabilities, for each call: the request is lost, or its reply; it is throttled. short: of a rung, for a while.

    dead: an instance that never boots, so that none of its own nets hold. spot: the provider takes a joined one back.
    """

    lost_request: float = 0.05
    lost_reply: float = 0.1
    throttled: float = 0.08
    short: float = 0.35
    dead: float = 0.06
    spot: float = 0.1


NO_FAULTS: Final = CloudFaults(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(slots=True)
class Rented:
    """One instance in truth. over_s: when it stopped costing. heard_at, used_at: of its own timers."""

    request: LaunchRequest
    instance: str
    launched_s: float
    visible_s: float
    address_s: float
    boots_s: float | None
    state: InstanceState = InstanceState.PENDING
    over_s: float | None = None
    vanishes_s: float | None = None
    is_member: bool = False
    heard_at: float = 0.0
    used_at: float = 0.0
    public_key: bytes = b""

    @property
    def is_live(self) -> bool:
        return self.over_s is None

    @property
    def node(self) -> NodeId:
        return node_id(self.public_key)


@dataclass(slots=True)
class Nets:
    """The timers of an instance, as its user data sets them."""

    idle_s: float
    no_contact_s: float


class SimCloud:
    """The provider. `wall_s` is true time as Unix seconds; `launched` is told of each new instance."""

    def __init__(
        self,
        timeline: Timeline,
        faults: CloudFaults,
        nets: Nets,
        wall_s: Callable[[], float],
        launched: Callable[[Rented], None],
    ) -> None:
        self.faults = faults
        self.rented: list[Rented] = []
        self.calls = 0
        self._timeline = timeline
        self._nets = nets
        self._wall_s = wall_s
        self._launched = launched
        self._tokens: dict[str, tuple[float, Rented]] = {}
        self._short: dict[tuple[str, str, Market], float] = {}
        self._rungs = rungs(timeline.rng)

    def live(self) -> list[Rented]:
        return [rented for rented in self.rented if rented.is_live]

    def perform(self, order: BurstEffect, reply: Callable[[BurstEvent], None]) -> None:
        """Carry out an order of a burst peer; `reply` hears how it ended, as the peer's own shell would say it."""
        rng, faults = self._timeline.rng, self.faults
        self.calls += 1
        if isinstance(order, PrepareLaunch):
            prepared = LaunchPrepared(order.launch, rng.randbytes(8), b"bootstrap " + order.launch.encode())
            self._timeline.after(0.02, lambda: reply(prepared))
            return
        fate = rng.random()
        if fate < faults.lost_request:
            self._timeline.after(TIMEOUT_S, lambda: reply(_failed(order, "unknown-outcome")))
            return
        if fate < faults.lost_request + faults.throttled:
            self._timeline.after(rng.uniform(*CALL_S), lambda: reply(_failed(order, "throttled")))
            return
        is_lost = fate > 1.0 - faults.lost_reply

        def arrived() -> None:
            answer = self._answer(order)
            if is_lost:
                answer = _failed(order, "unknown-outcome")
            self._timeline.after(TIMEOUT_S if is_lost else rng.uniform(*CALL_S), lambda: reply(answer))

        self._timeline.after(rng.uniform(*CALL_S), arrived)

    def _answer(self, order: BurstEffect) -> BurstEvent:
        match order:
            case SurveyCloud():
                return CloudSurveyed(self._rungs, self._described())
            case Launch(request=request):
                return self._launch(request)
            case Terminate(instance=instance):
                for rented in self.rented:
                    if rented.instance == instance:
                        self.end(rented)
                return TerminateEnded(instance)
            case Enrol(launch=launch, bootstrap=bootstrap):
                return self._enrol(launch, bootstrap)
            case Welcome(launch=launch):
                return self._welcome(launch)
        raise AssertionError(order)

    # -- calls --------------------------------------------------------------------------------------------------------

    def _launch(self, request: LaunchRequest) -> LaunchEnded:
        now, rng = self._timeline.time_s, self._timeline.rng
        used_at, known = self._tokens.get(request.token, (0.0, None))
        if known is not None and now < used_at + TOKEN_S:
            if known.request != request:
                return LaunchEnded(request.launch, None, "token-taken", "another request used this token")
            return LaunchEnded(request.launch, self._describe(known))
        rung = request.rung
        place = (rung.instance_type, rung.zone, rung.market)
        if now >= self._short.get(place, 0.0) and rng.random() < self.faults.short:
            self._short[place] = now + rng.uniform(60.0, 600.0)
        if now < self._short.get(place, 0.0):
            return LaunchEnded(request.launch, None, "no-capacity", "insufficient capacity")
        is_dead = rng.random() < self.faults.dead
        rented = Rented(
            request,
            f"i-{len(self.rented):04d}",
            now,
            now + rng.uniform(0.0, LAG_S),
            now + rng.uniform(*ADDRESS_S),
            None if is_dead else now + rng.uniform(*BOOT_S),
            public_key=b"key of " + request.launch.encode(),
        )
        self.rented.append(rented)
        self._tokens[request.token] = (now, rented)
        if rented.boots_s is not None:
            self._timeline.at(rented.boots_s, lambda: self._booted(rented))
        self._launched(rented)
        return LaunchEnded(request.launch, self._describe(rented))

    def _described(self) -> tuple[Instance, ...]:
        now = self._timeline.time_s
        return tuple(
            self._describe(rented)
            for rented in self.rented
            if now >= rented.visible_s and (rented.vanishes_s is None or now < rented.vanishes_s)
        )

    def _describe(self, rented: Rented) -> Instance:
        request, has_address = rented.request, self._timeline.time_s >= rented.address_s
        is_live = rented.state is InstanceState.PENDING and has_address
        return Instance(
            rented.instance,
            request.launch,
            request.mesh,
            request.owner,
            request.need,
            InstanceState.RUNNING if is_live else rented.state,
            f"198.51.100.{len(self.rented) % 250}" if has_address and rented.is_live else "",
            self._wall_s() - self._timeline.time_s + rented.launched_s,
            request.lease_ends_wall_s,
            request.rung.instance_type,
            request.rung.market,
            request.rung.usd_per_hour,
        )

    def _enrol(self, launch: LaunchId, bootstrap: bytes) -> Enrolled:
        rented = self._listening(launch)
        if rented is None or rented.is_member or bootstrap != b"bootstrap " + launch.encode():
            return Enrolled(launch, code="no-answer", reason="nothing listens there with this certificate")
        rented.heard_at = self._timeline.time_s
        return Enrolled(launch, rented.public_key, b"ca " + rented.public_key)

    def _welcome(self, launch: LaunchId) -> WelcomeEnded:
        rented = self._listening(launch)
        if rented is None:
            return WelcomeEnded(launch, "no-answer", "nothing listens there")
        rented.is_member = True
        rented.heard_at = rented.used_at = self._timeline.time_s
        return WelcomeEnded(launch)

    def _listening(self, launch: LaunchId) -> Rented | None:
        now = self._timeline.time_s
        rented = next((rented for rented in self.live() if rented.request.launch == launch), None)
        is_up = rented is not None and rented.boots_s is not None and now >= rented.boots_s
        return rented if rented and is_up and now < rented.launched_s + BOOTSTRAP_S else None

    # -- what instances do by themselves ------------------------------------------------------------------------------

    def _booted(self, rented: Rented) -> None:
        """The nets: lease, contact, use. They hold whatever becomes of the office."""
        if not rented.is_live:
            return
        rng = self._timeline.rng
        rented.heard_at = rented.used_at = self._timeline.time_s
        lease_s = rented.request.lease_ends_wall_s - self._wall_s()
        self._timeline.after(max(lease_s, 0.0), lambda: self.end(rented))
        if rng.random() < self.faults.spot:
            self._timeline.after(rng.uniform(30.0, 1800.0), lambda: self.end(rented))
        self._watch(rented)

    def _watch(self, rented: Rented) -> None:
        if not rented.is_live:
            return
        ends = rented.heard_at + self._nets.no_contact_s
        if rented.is_member:
            ends = min(ends, rented.used_at + self._nets.idle_s)
        if self._timeline.time_s >= ends:
            self.end(rented)
        else:
            self._timeline.at(ends + 1.0, lambda: self._watch(rented))

    def end(self, rented: Rented) -> None:
        """Shut down: it costs nothing more, is described as ending, later as terminated, and then not at all."""
        if not rented.is_live:
            return
        now = self._timeline.time_s
        rented.over_s, rented.state, rented.is_member = now, InstanceState.ENDING, False
        ended_s = now + self._timeline.rng.uniform(*ENDING_S)
        rented.vanishes_s = ended_s + VANISH_S
        self._timeline.at(ended_s, lambda: setattr(rented, "state", InstanceState.TERMINATED))


def rungs(rng: random.Random) -> tuple[Rung, ...]:
    """Two small types and one with four GPUs, in two zones, both markets; spot prices by the seed."""
    types = (("g6.xlarge", "L4", 1, 22, 4, 16, 0.80), ("g5.xlarge", "A10G", 1, 22, 4, 16, 1.01))
    large = ("g6.12xlarge", "L4", 4, 22, 48, 192, 4.60)
    offers: list[Rung] = []
    for kind, gpu, count, gigabytes, cpus, memory, price in (*types, large):
        for zone in ("a", "b"):
            base = Rung(kind, zone, Market.ON_DEMAND, gpu, count, gigabytes * 2**30, cpus, memory * GB, price)
            offers += [base, replace(base, market=Market.SPOT, usd_per_hour=price * rng.uniform(0.3, 0.9))]
    return tuple(offers)


def _failed(order: BurstEffect, code: str) -> BurstEvent:
    match order:
        case SurveyCloud():
            return CloudSurveyed(code=code, reason=code)
        case Launch(request=request):
            return LaunchEnded(request.launch, None, code, code)
        case Terminate(instance=instance):
            return TerminateEnded(instance, code, code)
        case Enrol(launch=launch):
            return Enrolled(launch, code=code, reason=code)
        case Welcome(launch=launch):
            return WelcomeEnded(launch, code, code)
    raise AssertionError(order)
