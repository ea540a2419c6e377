"""The burst world: two burst peers that rent for a queue, under an oracle of membership and gossip.

The planners are the real ones; what they see of the mesh is told to them at once, unless they are cut off. Agents
crash at any persist and any call, computers restart, the provider fails as it can. True are the provider's own books.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from meshgpu.core.burst.budget import day, month
from meshgpu.core.burst.demand import Place
from meshgpu.core.burst.ladder import inventory_of
from meshgpu.core.burst.planner import Planner, Scribe, Sight
from meshgpu.core.burst.rental import member_name
from meshgpu.core.effects import BurstEffect, Effect, Launch, Persist
from meshgpu.core.events import BurstConfigured, BurstEvent
from meshgpu.errors import BrokenInvariant
from meshgpu.model.clock import Now
from meshgpu.model.cloud import BurstSettings, Caps, LaunchId
from meshgpu.model.gossip import Capacity, Demand, Need, NodeRecord
from meshgpu.model.ids import JobId, KeyId, MeshId, NodeId, UserName, digest, node_id
from meshgpu.model.records import LaunchRecord, MeshLogRecord, Record, SpendRecord
from meshgpu.model.resources import GpuRequest, Resources
from meshgpu.model.trust import AddNode, Member, RemoveNode, Role
from meshgpu.sim.cloud import CloudFaults, Nets, Rented, SimCloud
from meshgpu.sim.fakes import KeyRing
from meshgpu.sim.timeline import Timeline

WALL_START_S: Final = 1_800_000_000.0
MESH: Final = MeshId("5e" * 32)
STEWARD: Final = NodeId("a" * 52)
OWNER: Final = UserName("ada")
CAPS: Final = Caps(
    usd_per_hour=5.0,
    usd_per_day=12.0,
    usd_per_month=40.0,
    usd_per_job=4.0,
    instances=3,
    on_demand=True,
    lease_s=3600.0,
)
SETTINGS: Final = BurstSettings(
    region="eu-central-1",
    caps=CAPS,
    instance_types=("g6.xlarge", "g5.xlarge", "g6.12xlarge"),
    burst_after_s=60.0,
    idle_s=300.0,
    no_contact_s=900.0,
    image="",
    security_group="",
    install="true",
)


@dataclass(frozen=True, slots=True)
class RentingFaults:
    """crash: probability at each persist and each call, before it and after it. crashes, reboots, cuts: expected.

    splits: how often the two peers lose each other, but not the office. gone: probability that one goes off for good.
    for_s: faults end then, and the queue is emptied.
    """

    crash: float = 0.02
    crashes: float = 2.0
    reboots: float = 1.0
    cuts: float = 1.0
    splits: float = 1.5
    gone: float = 0.1
    for_s: float = 5400.0
    jobs: int = 7
    cloud: CloudFaults = field(default_factory=CloudFaults)


@dataclass(slots=True)
class Job:
    """A queued job of the oracle steward. runs_on: where, and ends_s: until when."""

    need: Need
    work_s: float
    runs_on: Rented | None = None
    ends_s: float = 0.0
    is_over: bool = False


class Peer:
    """One burst peer: its disk, its clocks, and the planner that runs now, if one does."""

    def __init__(self, world: "RentingWorld", name: str, offset_s: float) -> None:
        self.name = name
        self.public_key = world.ring.make(name)
        self.node = node_id(self.public_key)
        self.disk: dict[tuple[str, str], Record] = {}
        self.planner: Planner | None = None
        self.life = 0
        self.is_cut = False
        self.is_gone = False
        self.points = 0
        self._world = world
        self._offset_s = offset_s
        self._boots = 1
        self._booted_at = -1000.0
        self._rank = 0

    def now(self) -> Now:
        time_s = self._world.timeline.time_s
        return Now(time_s - self._booted_at, WALL_START_S + time_s + self._offset_s, f"{self.name}-{self._boots}")

    # -- its life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        if self.planner is not None or self.is_gone:
            return
        self.life += 1
        world = self._world
        self._rank = 1 + max((r.rank for r in self.disk.values() if isinstance(r, MeshLogRecord)), default=-1)
        sight = Sight(lambda: MESH, lambda: world.members(self), self._is_alive, self._demand, world.heard)
        self.planner = Planner(
            self.node, world.timeline.rng, sight, Scribe(self._write, tuple, lambda _now, _node, _address: [])
        )
        self.planner.restore(self.now(), self.disk.values())
        is_set_up = ("burst", "burst") in self.disk
        self.post(None if is_set_up else BurstConfigured(world.settings))  # who set it up sees that it was not kept

    def crash(self) -> None:
        self.planner = None
        self.life += 1

    def reboot(self) -> None:
        self.crash()
        self._boots += 1
        self._booted_at = self._world.timeline.time_s - 5.0

    def post(self, event: BurstEvent | None) -> None:
        planner = self.planner
        if planner is None:
            return
        now = self.now()
        effects = planner.heard(now, event) if event is not None else []
        effects += planner.step(now)
        persists = [effect for effect in effects if isinstance(effect, Persist)]
        life = self.life
        if persists and self._may_crash():
            return
        for persist in persists:
            self._persist(persist)
        if persists and self._may_crash():
            return
        for effect in effects:
            if isinstance(effect, Persist):
                continue
            if self._may_crash():
                return
            self._perform(effect)
            if self._may_crash():
                return
        if self.life == life:
            self._set_alarm()

    def changed(self) -> None:
        """Gossip says something new."""
        if self.planner is not None:
            self.planner.mesh_changed(self.now())
            self.post(None)

    def _set_alarm(self) -> None:
        assert self.planner is not None
        deadline, life = self.planner.deadline(), self.life
        if deadline is None:
            return
        at = max(deadline + self._booted_at, self._world.timeline.time_s) + 1e-3

        def wake() -> None:
            if self.life == life and self.planner is not None and self.planner.deadline() == deadline:
                self.post(None)

        self._world.timeline.at(at, wake)

    def _may_crash(self) -> bool:
        """Whether this is where the agent's life ends. Each point has a number, so that a test can visit them all."""
        self.points += 1
        if not self._world.crashes_at(self):
            return False
        self.crash()
        self._world.timeline.after(self._world.away_s(), self.start)
        return True

    # -- what it orders -----------------------------------------------------------------------------------------------

    def _persist(self, effect: Persist) -> None:
        if effect.record is None:
            self.disk.pop((effect.kind, effect.key), None)
        else:
            self.disk[effect.kind, effect.key] = effect.record
        self._world.persisted(self, effect)

    def _perform(self, effect: Effect) -> None:
        life = self.life

        def reply(event: BurstEvent) -> None:
            if self.life == life:
                self.post(event)

        assert isinstance(effect, BurstEffect)
        if isinstance(effect, Launch):
            self._world.asked(self, effect)
        self._world.cloud.perform(effect, reply)

    def _write(self, _now: Now, bodies: tuple[AddNode | RemoveNode, ...]) -> list[Effect]:
        effects: list[Effect] = []
        for body in bodies:
            self._world.ring.signed(body)
            entry = self._world.ring.sign(KeyId(self.node), body)
            effects.append(Persist("log", f"{self._rank:08d}", MeshLogRecord(self._rank, entry)))
            self._rank += 1
        return effects

    def _is_alive(self, node: NodeId) -> bool:
        if node == self.node:
            return True
        other = next((peer for peer in self._world.peers if peer.node == node), None)
        if other is not None:
            return other.planner is not None and not (other.is_cut or self.is_cut or self._world.is_split)
        is_office = node == STEWARD or any(r.is_member and r.node == node for r in self._world.cloud.rented)
        return is_office and not self.is_cut

    def _demand(self, node: NodeId) -> Demand | None:
        return self._world.demand() if node == STEWARD else None


class RentingWorld:
    """Equal seeds make equal worlds. crash_at: the one point (peer, number) at which an agent dies, else by chance."""

    def __init__(
        self,
        seed: int,
        faults: RentingFaults | None = None,
        settings: BurstSettings = SETTINGS,
        crash_at: tuple[int, int] | None = None,
    ) -> None:
        self.seed = seed
        self.faults = faults or RentingFaults()
        self.settings = settings
        self.timeline = Timeline(seed)
        self.ring = KeyRing()
        self.jobs: list[Job] = []
        self.launched = 0
        self.crashes = 0
        self._crash_at = crash_at
        self.is_split = False
        self._is_calm = False
        rng = self.timeline.rng
        nets = Nets(settings.idle_s, settings.no_contact_s)
        self.cloud = SimCloud(
            self.timeline, self.faults.cloud, nets, lambda: WALL_START_S + self.timeline.time_s, self._launched
        )
        self.peers = [Peer(self, f"rig{number}", rng.uniform(-55.0, 55.0)) for number in range(2)]

    # -- the whole story ----------------------------------------------------------------------------------------------

    def play(self) -> None:
        """Faults and jobs, then rest; raises BrokenInvariant or AssertionError where a promise is broken."""
        faults, rng = self.faults, self.timeline.rng
        for peer in self.peers:
            peer.start()
        for number in range(faults.jobs):
            self.timeline.at(rng.uniform(0.0, faults.for_s * 0.6), lambda number=number: self._submit(number))  # type: ignore[misc]  # mypy cannot type bound defaults
        self._plan_faults()
        self._tick()
        self.timeline.run_until(faults.for_s)
        self._calm()
        self.timeline.run_until(faults.for_s + 900.0)
        self._check_settled()
        for job in self.jobs:
            job.is_over, job.runs_on = True, None
        self._changed()
        self.timeline.run_until(faults.for_s + 900.0 + self.settings.caps.lease_s)
        self._check_end()

    def _plan_faults(self) -> None:
        faults, rng = self.faults, self.timeline.rng
        kinds: list[tuple[float, Callable[[Peer], None]]] = [
            (faults.crashes, self._crash),
            (faults.reboots, self._reboot),
            (faults.cuts, self._cut),
            (faults.splits, self._split),
        ]
        for expected, fault in kinds:
            for _ in range(int(expected) + (rng.random() < expected % 1)):
                peer = rng.choice(self.peers)
                self.timeline.at(rng.uniform(0.0, faults.for_s * 0.9), lambda fault=fault, peer=peer: fault(peer))  # type: ignore[misc]  # mypy cannot type bound defaults
        if rng.random() < faults.gone:
            self.timeline.at(rng.uniform(0.0, faults.for_s), lambda: self._leave(rng.choice(self.peers)))

    def _calm(self) -> None:
        """From now on nothing fails any more."""
        self._is_calm, self.is_split = True, False
        self.cloud.faults = CloudFaults(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        for peer in self.peers:
            peer.is_cut = False
            peer.start()
        self._changed()

    def crashes_at(self, peer: Peer) -> bool:
        if self._crash_at is not None:
            is_here = (self.peers.index(peer), peer.points) == self._crash_at
        else:
            is_here = not self._is_calm and self.faults.crash > 0 and self.timeline.rng.random() < self.faults.crash
        self.crashes += is_here
        return is_here

    def away_s(self) -> float:
        rng = self.timeline.rng
        return rng.uniform(300.0, 1500.0) if rng.random() < 0.1 else rng.uniform(0.5, 40.0)

    def _crash(self, peer: Peer) -> None:
        self.crashes += 1
        peer.crash()
        self.timeline.after(self.away_s(), peer.start)

    def _reboot(self, peer: Peer) -> None:
        peer.reboot()
        self.timeline.after(self.away_s(), peer.start)

    def _cut(self, peer: Peer) -> None:
        peer.is_cut = True
        self.timeline.after(self.timeline.rng.uniform(30.0, 1500.0), lambda: setattr(peer, "is_cut", False))

    def _split(self, _peer: Peer) -> None:
        self.is_split = True
        self.timeline.after(self.timeline.rng.uniform(60.0, 1200.0), lambda: setattr(self, "is_split", False))

    def _leave(self, peer: Peer) -> None:
        peer.crash()
        peer.is_gone = True

    # -- the oracle ---------------------------------------------------------------------------------------------------

    def members(self, reader: Peer) -> Mapping[NodeId, Member]:
        """Everybody: what is on any disk has been told to all who can hear; a peer also has what it wrote itself."""
        members = {STEWARD: Member(STEWARD, "steward", b"", b"", Role.RIG, OWNER)}
        for peer in self.peers:
            members[peer.node] = Member(peer.node, peer.name, peer.public_key, b"", Role.BURST, OWNER)
        bodies = [
            self.ring.decode(record.entry.payload)
            for peer in self.peers
            if peer is reader or not (peer.is_cut or reader.is_cut)
            for record in peer.disk.values()
            if isinstance(record, MeshLogRecord)
        ]
        for body in bodies:
            if isinstance(body, AddNode):
                members[body.node] = Member(
                    body.node, body.name, body.public_key, body.device_ca, body.role, body.owner, body.expires_wall_s
                )
        for body in bodies:
            if isinstance(body, RemoveNode):
                members.pop(body.node, None)
        return members

    def heard(self, node: NodeId) -> tuple[NodeRecord | None, Capacity | None]:
        rented = next((r for r in self.cloud.rented if r.is_member and r.node == node), None)
        if rented is None:
            return None, None
        place = self._place(rented)
        return NodeRecord("sim", (), place.inventory), Capacity((), tuple(place.allocations))

    def demand(self) -> Demand:
        return Demand(tuple(job.need for job in self.jobs if not job.is_over and job.runs_on is None))

    def _place(self, rented: Rented) -> Place:
        place = Place(rented.instance, JobId(""), inventory_of(rented.request.rung))
        for job in self.jobs:
            if job.runs_on is rented:
                place.take(job.need)
        return place

    def _submit(self, number: int) -> None:
        rng = self.timeline.rng
        name = JobId(digest(f"{self.seed} {number}".encode())[:26])
        gpus = GpuRequest(rng.choice((1, 1, 1, 2)))
        need = Need(name, Resources(gpus), WALL_START_S + self.timeline.time_s + rng.uniform(-55.0, 55.0))
        job = Job(need, rng.uniform(20.0, 1500.0))
        self.jobs.append(job)
        if rng.random() < 0.25:  # the office takes it, or its user does not want it any more
            self.timeline.after(rng.uniform(20.0, 600.0), lambda: self._withdraw(job))
        self._changed()

    def _withdraw(self, job: Job) -> None:
        if job.runs_on is None:
            job.is_over = True
            self._changed()

    def _tick(self) -> None:
        """The steward places jobs on members with room; what an instance ran when it ended is queued again."""
        now, is_news = self.timeline.time_s, False
        for job in self.jobs:
            if job.runs_on is not None and not job.runs_on.is_member:
                job.runs_on, is_news = None, True
            elif job.runs_on is not None and now >= job.ends_s:
                job.runs_on, job.is_over, is_news = None, True, True
            if job.runs_on is None and not job.is_over:
                job.runs_on = self._find(job)
                job.ends_s = now + job.work_s
                is_news = is_news or job.runs_on is not None
        in_touch = any(peer.planner is not None and not peer.is_cut for peer in self.peers)
        for rented in self.cloud.live():
            if in_touch and rented.is_member:
                rented.heard_at = now
            if any(job.runs_on is rented for job in self.jobs):
                rented.used_at = now
        if is_news:
            self._changed()
        self.timeline.after(5.0, self._tick)

    def _find(self, job: Job) -> Rented | None:
        return next((r for r in self.cloud.live() if r.is_member and self._place(r).take(job.need)), None)

    def _changed(self) -> None:
        for peer in self.peers:
            peer.changed()

    # -- promises -----------------------------------------------------------------------------------------------------

    def asked(self, peer: Peer, order: Launch) -> None:
        """A call is about to be made: its request must be on the disk, as it is."""
        record = peer.disk.get(("launch", order.request.launch))
        if not isinstance(record, LaunchRecord) or record.request != order.request:
            self._fail(f"{peer.name} asks for what it has not journalled: {order.request.launch}")
        if not isinstance(peer.disk.get(("spend", order.request.launch)), SpendRecord):
            self._fail(f"{peer.name} asks for what it has not counted: {order.request.launch}")

    def persisted(self, peer: Peer, effect: Persist) -> None:
        if effect.kind == "launch" and effect.record is None:
            rented = [r for r in self.cloud.live() if r.request.launch == effect.key and r.boots_s is not None]
            if rented and rented[0].launched_s < self.timeline.time_s - 240.0:
                self._fail(f"{peer.name} forgets {effect.key}, whose instance lives")

    def _launched(self, rented: Rented) -> None:
        """A new instance: the caps of its owner must hold for the worst that may come."""
        self.launched += 1
        request, caps = rented.request, self.settings.caps
        mine = [r for r in self.cloud.rented if r.request.owner == request.owner]
        live = [r for r in mine if r.is_live]
        if sum(r.request.launch == request.launch for r in self.cloud.rented) > 1:
            self._fail(f"the launch {request.launch} made two instances")
        if len(live) > caps.instances:
            self._fail(f"{len(live)} instances live, {caps.instances} may")
        if sum(r.request.rung.usd_per_hour for r in live) > caps.usd_per_hour + 1e-6:
            self._fail("the instances that live cost more an hour than the cap allows")
        for what, cap, span in (("day", caps.usd_per_day, day), ("month", caps.usd_per_month, month)):
            for wall_s in (WALL_START_S + self.timeline.time_s, request.lease_ends_wall_s):
                worst = sum(self._worst_usd(r, *span(wall_s)) for r in mine)
                if worst > cap + 1e-6:
                    self._fail(f"a {what} may cost ${worst:.2f}, the cap is ${cap:.2f}")
        of_job = sum(self._worst_usd(r, 0.0, 2e9 * 2) for r in mine if r.request.need == request.need)
        if of_job > caps.usd_per_job + 1e-6:
            self._fail(f"a job may cost ${of_job:.2f}, the cap is ${caps.usd_per_job:.2f}")

    def _worst_usd(self, rented: Rented, begin_wall_s: float, end_wall_s: float) -> float:
        """What it has cost or can cost until its lease ends."""
        begin = WALL_START_S + rented.launched_s
        end = rented.request.lease_ends_wall_s if rented.over_s is None else WALL_START_S + rented.over_s
        return rented.request.rung.usd_per_hour * max(min(end, end_wall_s) - max(begin, begin_wall_s), 0.0) / 3600.0

    def _check_settled(self) -> None:
        """Fifteen minutes after the last fault: one instance for each need, each known to a peer that answers."""
        live = self.cloud.live()
        for need in sorted({rented.request.need for rented in live}):
            same = [rented.instance for rented in live if rented.request.need == need]
            if len(same) > 1:
                self._fail(f"{same} live for one need")
        waiting = [job.need.job for job in self.jobs if not job.is_over]
        if len(live) > len(waiting) + sum(self.timeline.time_s - r.used_at < 900.0 for r in live if r.is_member):
            self._fail(f"{len(live)} instances live for {len(waiting)} jobs")

    def _check_end(self) -> None:
        """Nobody wants anything: nothing lives, nothing is journalled, and nothing cost more than was counted."""
        if live := self.cloud.live():
            self._fail(f"leaked: {[(r.instance, r.request.launch, r.boots_s) for r in live]}")
        for peer in self.peers:
            spends = [record for record in peer.disk.values() if isinstance(record, SpendRecord)]
            counted = sum(
                s.usd_per_hour * (s.until_wall_s - s.from_wall_s) / 3600.0 for s in spends if s.owner == peer.node
            )
            true = sum(self._worst_usd(r, 0.0, 4e9) for r in self.cloud.rented if r.request.owner == peer.node)
            if true > counted + 1e-6:
                self._fail(f"{peer.name} spent ${true:.4f} and counted ${counted:.4f}")
            if peer.is_gone:
                continue
            if left := [key for kind, key in peer.disk if kind == "launch"]:
                self._fail(f"{peer.name} still keeps launches: {left}")
            names = {member_name(LaunchId(r.request.launch)) for r in self.cloud.rented}
            lost = [m.name for m in self.members(peer).values() if m.name in names and self._owner_is_here(m.name)]
            if lost:
                self._fail(f"members whose instances are gone: {lost}")

    def _owner_is_here(self, name: str) -> bool:
        rented = next(r for r in self.cloud.rented if member_name(r.request.launch) == name)
        return any(peer.node == rented.request.owner and not peer.is_gone for peer in self.peers)

    def _fail(self, what: str) -> None:
        raise BrokenInvariant(f"seed {self.seed} at {self.timeline.time_s:.1f} s: {what}", ())
