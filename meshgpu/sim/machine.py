"""One simulated computer: its disk, clocks and processes, and the agent that runs the real core on it."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, Protocol, assert_never

from meshgpu.core import effects as fx
from meshgpu.core.audit import AUDIT
from meshgpu.core.events import Event, MachineRead, Ticked, TreeArrived, TreeFailed, TreeProgressed
from meshgpu.core.node import Node, NodeConfig
from meshgpu.core.owner import OwnerPolicy
from meshgpu.errors import BrokenInvariant
from meshgpu.model.clock import Now
from meshgpu.model.gossip import Capacity, MemberState, NodeRecord
from meshgpu.model.ids import Address, Digest, GpuId, JobId, KeyId, NodeId, UserName
from meshgpu.model.inventory import GpuProcess, GpuReading, Inventory, ProcessKind
from meshgpu.model.job import AttemptPlan, Result
from meshgpu.model.records import Record
from meshgpu.model.trust import Notary
from meshgpu.sim.cloud import SimCloud
from meshgpu.sim.fakes import ExecutorTiming, FakeExecutor
from meshgpu.sim.network import Network
from meshgpu.sim.timeline import Timeline

WALL_START_S: Final = 1_800_000_000.0
DISK_S: Final = (0.0005, 0.008)
"""What one durable transaction takes."""
READ_S: Final = 2.0
"""How often the GPUs are read."""
NUDGE_S: Final = 1e-6
"""A tick comes this much after its deadline: two clocks never round to the same instant."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a machine is. accounts: {user: key of the user's account here}. is_rented: whether it is an instance."""

    node: NodeId
    name: str
    owner: UserName
    accounts: dict[UserName, KeyId]
    inventory: Inventory
    fence: str
    policy: OwnerPolicy
    address: Address
    wall_offset_s: float
    may_steward: bool = True
    is_rented: bool = False

    @property
    def at_home(self) -> UserName:
        """Whose jobs need no fence here."""
        return UserName("") if self.is_rented else self.owner


class Watcher(Protocol):
    """Sees everything that happens in a world; raises BrokenInvariant."""

    def stepped(self, machine: "Machine", event: Event | None, effects: list[fx.Effect]) -> None: ...

    def persisting(self, machine: "Machine", order: fx.Persist) -> None:
        """`order` is about to reach the disk."""
        ...

    def lives(self, machine: "Machine", plan: AttemptPlan) -> None:
        """An attempt may have a process from now on."""
        ...

    def over(self, machine: "Machine", plan: AttemptPlan, result: Result | None) -> None: ...

    def answered(self, answer: fx.Answered) -> None: ...


class CrashPoint(StrEnum):
    BEFORE_PERSIST = "before-persist"
    AFTER_PERSIST = "after-persist"


@dataclass(slots=True)
class _Outbox:
    """Effects of steps, in order; those of a step that persists wait until that is on disk."""

    waiting: list[list[fx.Effect]] = field(default_factory=list)
    writing: list[list[fx.Effect]] = field(default_factory=list)


class Machine:
    """Owns what survives what: processes and disk an agent's crash, the disk alone a reboot."""

    def __init__(
        self,
        setup: Setup,
        timeline: Timeline,
        network: Network,
        notary: Notary,
        watcher: Watcher,
        config: NodeConfig,
        seed: str,
        timing: ExecutorTiming,
    ) -> None:
        self.setup = setup
        self.node = setup.node
        self.addresses: tuple[Address, ...] = (setup.address,)
        self.is_on = True
        self.is_gone = False
        self.instance = 0
        self.lag_s = 0.0
        self.paused_until_s = 0.0
        self.agent: Node | None = None
        self.disk: dict[tuple[str, str], Record] = {}
        self.trees: set[Digest] = set()
        self.readings: tuple[GpuReading, ...] = ()
        self.wanted: set[GpuId] = set()
        self.crash_at: CrashPoint | None = None
        self.rejected = 0
        self.warnings: list[str] = []
        self.steps = 0
        self.announce: Callable[[Machine], None] = lambda _machine: None
        self.crashed: Callable[[Machine], None] = lambda _machine: None
        self.cloud: SimCloud | None = None
        self._timeline = timeline
        self._network = network
        self.notary = notary
        self._watcher = watcher
        self._config = config
        self._seed = seed
        self._starts = 0
        self._boots = 1
        self._booted_at = -timeline.rng.uniform(0.0, 1e6)
        self._wake_at: float | None = None
        self._outbox = _Outbox()
        self._trusted: frozenset[NodeId] = frozenset()
        rng = random.Random(f"{seed} executor {setup.name}")  # noqa: S311 - a reproducible world
        self.executor = FakeExecutor(
            timeline,
            rng,
            timing,
            lambda: self.now().wall_s,
            self._later,
            lambda plan: watcher.lives(self, plan),
            lambda plan, result: watcher.over(self, plan, result),
        )

    def now(self) -> Now:
        time_s = self._timeline.time_s
        wall_s = WALL_START_S + time_s + self.setup.wall_offset_s
        return Now(time_s - self._booted_at, wall_s, f"{self.setup.name}-{self._boots}")

    def trusts(self, peer: NodeId) -> bool:
        return peer in self._trusted

    def is_linked(self, other: "Machine") -> bool:
        return self._network.is_linked(self.node, other.node)

    def sees(self, other: "Machine") -> MemberState | None:
        """How the other stands here; None while no agent runs."""
        return self.agent.state(other.node) if self.agent is not None else None

    def views(self) -> dict[NodeId, tuple[NodeRecord | None, Capacity | None]]:
        """{member: what this machine's agent has heard of it}."""
        if self.agent is None:
            return {}
        return {view.member.node: (view.record, view.capacity) for view in self.agent.machines(self.now())}

    def heard(self, owner: NodeId) -> tuple[NodeRecord | None, Capacity | None]:
        """What this machine's agent has heard of one member."""
        return (None, None) if self.agent is None else self.agent.heard(owner)

    @property
    def rng(self) -> random.Random:
        return self._timeline.rng

    @property
    def is_paused(self) -> bool:
        return self._timeline.time_s < self.paused_until_s

    def pause(self, for_s: float) -> None:
        """The agent gets no processor for a while; its machine answers for it as far as TCP goes."""
        self.paused_until_s = max(self.paused_until_s, self._timeline.time_s + for_s)

    # -- the agent's life ---------------------------------------------------------------------------------------------

    def start_agent(self) -> None:
        if not self.is_on or self.agent is not None:
            return
        self._starts += 1
        self.instance = self._starts
        rng = random.Random(f"{self._seed} {self.setup.name} {self._starts}")  # noqa: S311 - a reproducible world
        self.agent = Node(self.node, self.now(), self.notary, rng, self._config, self._loaded())
        self._stepped(None, self.agent.start(self.now()))
        self._read_gpus(self.instance)

    def _loaded(self) -> list[Record]:
        """What an agent reads at its start: everything but the audit, and of that the newest entry."""
        audit = [key for key in self.disk if key[0] == AUDIT]
        return [record for key, record in self.disk.items() if key[0] != AUDIT or key == max(audit)]

    def crash_agent(self, at: CrashPoint = CrashPoint.BEFORE_PERSIST) -> None:
        """Memory is gone. What was being written is on disk or not, as a whole; what should have followed never was."""
        if self.agent is None:
            return
        if at is CrashPoint.AFTER_PERSIST:
            self._write([*self._outbox.writing, *self._outbox.waiting])
        self.agent, self.instance, self._wake_at, self._outbox = None, 0, None, _Outbox()
        self._trusted = frozenset()
        self.crash_at = None
        self._network.agent_died(self.node)
        self.executor.agent_died()

    def power_off(self) -> None:
        """Everything but the disk is gone, and nobody says goodbye."""
        if not self.is_on:
            return
        self._network.machine_died(self.node)
        self.crash_agent()
        self.executor.machine_died()
        self.is_on = False

    def power_on(self) -> None:
        """Boot: another boot id, a clock that starts near zero, and the agent as a service."""
        if self.is_on or self.is_gone:
            return
        self.is_on = True
        self._boots += 1
        self._booted_at = self._timeline.time_s - self.rng.uniform(1.0, 20.0)
        self.start_agent()

    def vanish(self) -> None:
        """The seller took the instance back: nothing of it is left, and it never returns."""
        self.power_off()
        self.is_gone = True

    # -- events in ----------------------------------------------------------------------------------------------------

    def post(self, event: Event) -> None:
        """Let the agent know, if one runs; when it runs again, while it is paused."""
        life = self.instance
        if self.is_paused:
            self._timeline.at(self.paused_until_s, lambda: self.post(event) if self.instance == life else None)
        elif self.agent is not None:
            self._stepped(event, self.agent.step(self.now(), event))

    def _later(self, event: Event) -> None:
        """An event of this machine's own, for the agent that runs now."""
        life = self.instance
        self._timeline.after(0.0005 + self.lag_s, lambda: self.post(event) if self.instance == life else None)

    def _stepped(self, event: Event | None, effects: list[fx.Effect]) -> None:
        self.steps += 1
        self._watcher.stepped(self, event, effects)
        if effects:
            self._emit(effects)
        self._set_alarm()

    def _set_alarm(self) -> None:
        if self.agent is None:
            return
        deadline = self.agent.deadline()
        if deadline is None:
            return
        at = max(deadline + self._booted_at, self._timeline.time_s) + NUDGE_S + self.lag_s
        if self._wake_at is not None and self._wake_at <= at:
            return
        self._wake_at = at
        life = self.instance

        def wake() -> None:
            if self.instance == life and self._wake_at == at:
                self._wake_at = None
                self.post(Ticked())

        self._timeline.at(at, wake)

    def redescribe(self, memory_bytes: int) -> None:
        """Somebody plugged in more memory, and the agent notices."""
        self.setup = replace(self.setup, inventory=replace(self.setup.inventory, memory_bytes=memory_bytes))
        self.post(MachineRead(self.setup.inventory, self.readings))

    def owner_begins(self, gpu: GpuId) -> None:
        """The owner starts a game."""
        self.wanted.add(gpu)
        game = (GpuProcess(1, ProcessKind.GRAPHICS, name="game"),)
        self.readings = tuple(replace(r, processes=game if r.uuid == gpu else ()) for r in self.readings)

    def owner_leaves(self) -> None:
        self.readings = tuple(replace(reading, processes=()) for reading in self.readings)

    @property
    def has_owner_here(self) -> bool:
        return any(reading.processes for reading in self.readings)

    def _read_gpus(self, life: int) -> None:
        if self.instance == life:
            self.post(MachineRead(self.setup.inventory, self.readings))
            self._timeline.after(READ_S, lambda: self._read_gpus(life))

    # -- effects out --------------------------------------------------------------------------------------------------

    def _emit(self, effects: list[fx.Effect]) -> None:
        outbox = self._outbox
        if outbox.writing or any(isinstance(effect, fx.Persist) for effect in effects):
            outbox.waiting.append(effects)
            if not outbox.writing:
                self._begin_write()
        else:
            self._perform_all(effects)

    def _begin_write(self) -> None:
        """One transaction for all that has gathered."""
        outbox, life = self._outbox, self.instance
        outbox.writing, outbox.waiting = outbox.waiting, []

        def written() -> None:
            if self.instance != life or self._outbox is not outbox:
                return
            if self.crash_at is not None and any(isinstance(e, fx.Persist) for step in outbox.writing for e in step):
                outbox.waiting = []
                self.crash_agent(self.crash_at)
                self.crashed(self)
                return
            self._write(outbox.writing)
            batch, outbox.writing = outbox.writing, []
            for step in batch:
                self._perform_all(step)
            if outbox.waiting and not outbox.writing and self._outbox is outbox:
                self._begin_write()

        self._timeline.after(self.rng.uniform(*DISK_S), written)

    def _write(self, steps: list[list[fx.Effect]]) -> None:
        for step in steps:
            for effect in step:
                if isinstance(effect, fx.Persist):
                    self._watcher.persisting(self, effect)
                    if effect.record is None:
                        self.disk.pop((effect.kind, effect.key), None)
                    else:
                        self.disk[effect.kind, effect.key] = effect.record

    def _perform_all(self, effects: list[fx.Effect]) -> None:
        life = self.instance
        for effect in effects:
            if self.instance == life:
                self._perform(effect)

    def _perform(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Send(peer=peer, message=message):
                self._network.send(self.node, peer, message)
            case fx.Persist() | fx.QueryProgressed() | fx.TellWatchers() | fx.DiscardAttempt() | fx.NoteNewKeys():
                pass
            case fx.Dial(peer=peer, address=address):
                self._network.dial(self.node, peer, address)
            case fx.Knock(peer=peer, address=address):
                self._network.knock(self.node, peer, address)
            case fx.CloseLink(peer=peer, reason=reason):
                self._network.close(self.node, peer, reason)
            case fx.Identify(address=address):
                self._network.identify(self.node, address)
            case fx.TrustMembers(members=members):
                self._trusted = frozenset(member.node for member in members)
                self._network.drop_untrusted(self.node)
            case fx.Announce():
                self.announce(self)
            case fx.FetchTree():
                self._fetch_tree(effect)
            case fx.StartAttempt(plan=plan, sources=sources):
                self.executor.start(plan, has_tree=lambda: self._find_tree(plan.spec.job, plan.spec.tree, sources))
            case fx.AdoptAttempt(plan=plan):
                self.executor.adopt(plan)
            case fx.EndAttempt(job=job, epoch=epoch, mode=mode):
                self.executor.end(job, epoch, mode)
            case fx.Answered():
                self._watcher.answered(effect)
            case fx.Reject():
                self.rejected += 1
            case fx.Warn(reason=reason):
                self.warnings.append(reason)
            case fx.SurveyCloud() | fx.PrepareLaunch() | fx.Launch() | fx.Terminate() | fx.Enrol() | fx.Welcome():
                self._rent(effect)
            case fx.PowerOff():
                raise BrokenInvariant("a machine of the office ends itself")
            case _:
                assert_never(effect)

    def _rent(self, order: fx.BurstEffect) -> None:
        assert self.cloud is not None
        life = self.instance
        self.cloud.perform(order, lambda event: self.post(event) if self.instance == life else None)

    def _fetch_tree(self, order: fx.FetchTree) -> None:
        life = self.instance

        def fetched() -> None:
            if self.instance != life:
                return
            if self._find_tree(order.job, order.tree, order.sources):
                self.post(TreeArrived(order.job))
            else:
                self.post(TreeFailed(order.job, "no-answer", "no machine that has the tree answers"))

        took_s = self.rng.uniform(0.005, 1.0)
        if took_s > 0.5:  # a tree of some size: the submitter sees how far it is
            self._timeline.after(took_s / 2, lambda: self._later(TreeProgressed(order.job, 1, 2)))
        self._timeline.after(took_s, fetched)

    def _find_tree(self, job: JobId, tree: Digest, sources: tuple[NodeId, ...]) -> bool:
        """Fetch from the first source that has the tree, can be reached and lets this node have it."""
        if tree in self.trees:
            return True
        for source in sources:
            host = self._network.hosts[source]
            assert isinstance(host, Machine)
            may = host.agent is not None and host.agent.tree_for(job, self.node) == tree
            if may and tree in host.trees and self._network.can_reach(self.node, source):
                self.trees.add(tree)
                return True
        return False
