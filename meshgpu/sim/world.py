"""A whole office in one process: machines, a network and people on one timeline, all decided by one seed."""

from dataclasses import dataclass, field
from typing import Final

from meshgpu.core.effects import Answered, Effect, Persist
from meshgpu.core.events import AddressesChanged, Event, LogWritten, MachineSighted, MeshEntered
from meshgpu.core.node import NodeConfig
from meshgpu.model.gossip import GossipEntry, Sighting
from meshgpu.model.ids import KeyId, NodeId
from meshgpu.model.inventory import GpuReading
from meshgpu.model.job import AttemptPlan, JobSpec, Result
from meshgpu.model.records import MeshLogRecord
from meshgpu.model.trust import LogEntry, Rekey, RemoveNode, Revoke
from meshgpu.sim.fakes import ExecutorTiming
from meshgpu.sim.faults import Faults
from meshgpu.sim.intruder import Intruder
from meshgpu.sim.invariants import Invariants, trials_of
from meshgpu.sim.load import People
from meshgpu.sim.machine import Machine
from meshgpu.sim.network import Network
from meshgpu.sim.office import furnish
from meshgpu.sim.timeline import Timeline
from meshgpu.sim.transcript import Transcript
from meshgpu.sim.weather import Weather

SIGHTED_S: Final = (0.02, 2.0)
"""How long an announcement by mDNS takes to be seen."""
ASKED_AGAIN_S: Final = (5.0, 30.0)
"""After which a machine that was not seen is looked for again."""
SETTLE_STEP_S: Final = 2.0
"""How often a world is asked whether it has come to rest."""


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """size: machines. is_plain: the same office for every seed. transcript: which story is kept, if any.

    has_intruder: whether the last machine of the office lies. instances: rented machines beside it.
    has_wrong_clocks: whether the machines' wall clocks are wrong by hours.
    """

    size: int = 7
    is_plain: bool = False
    has_intruder: bool = False
    instances: int = 0
    has_wrong_clocks: bool = False
    executor: ExecutorTiming = field(default_factory=ExecutorTiming)
    transcript: Transcript | None = None
    weather: Weather = field(default_factory=Weather)


class World:
    """Everything there is. Equal seeds and equal calls make equal worlds."""

    def __init__(self, seed: int, config: WorldConfig | None = None) -> None:
        self.seed = seed
        self.config = config or WorldConfig()
        self.timeline = Timeline(seed)
        self.network = Network(self.timeline, self.config.weather)
        self.invariants = Invariants()
        self.answers: dict[str, Answered] = {}
        self.office = furnish(
            self.timeline.rng,
            self.config.size,
            is_plain=self.config.is_plain,
            has_intruder=self.config.has_intruder,
            instances=self.config.instances,
            has_wrong_clocks=self.config.has_wrong_clocks,
        )
        self.machines: dict[NodeId, Machine] = {}
        for setup, notary in zip(self.office.setups, self.office.notaries, strict=True):
            node_config = NodeConfig("sim", fence=setup.fence, may_steward=setup.may_steward, policy=setup.policy)
            machine = Machine(
                setup, self.timeline, self.network, notary, self, node_config, str(seed), self.config.executor
            )
            machine.readings = tuple(GpuReading(gpu.uuid) for gpu in setup.inventory.gpus)
            machine.announce = self._announce
            self.machines[setup.node] = machine
            self.network.hosts[setup.node] = machine
        self.ledger = self.invariants.ledger
        self.ledger.machines = self.machines
        self.ledger.ids = dict(self.machines)
        self.office.ring.signed = self._signed
        self.people = People(self.timeline, self.ledger, bool(self.config.instances))
        last = self.machines[self.office.setups[self.config.size - 1].node]
        self.intruder = Intruder(last, self.ledger, self.network, self.timeline, self.office.ring)
        self.faults = Faults(self.timeline, self.network, self.machines)
        self.faults.owner_waited = self.invariants.owner_waited
        self.faults.take_new_keys = self.take_new_keys
        self._renewing: dict[str, Machine] = {}

    def named(self, name: str) -> Machine:
        return next(machine for machine in self.machines.values() if machine.setup.name == name)

    # -- time ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Every agent starts and enters the mesh."""
        for machine in self.machines.values():
            machine.start_agent()
            machine.post(MeshEntered(self.office.mesh, self.office.log))

    def run(self, for_s: float) -> None:
        self.timeline.run_until(self.timeline.time_s + for_s)

    def settle(self, within_s: float) -> float:
        """Let things come to rest; returns after how many seconds. Raises AssertionError that names what did not."""
        began = self.timeline.time_s
        while unsettled := self.invariants.unsettled():
            if self.timeline.time_s - began >= within_s:
                raise AssertionError(f"not at rest after {within_s:.0f} s:\n  " + "\n  ".join(unsettled[:12]))
            self.run(SETTLE_STEP_S)
        self.invariants.check_end()
        return self.timeline.time_s - began

    # -- the watcher's hooks ------------------------------------------------------------------------------------------

    def stepped(self, machine: Machine, event: Event | None, effects: list[Effect]) -> None:
        if self.config.transcript is not None:
            self.config.transcript.stepped(self.timeline.time_s, machine, event, effects)
        self.invariants.stepped(machine, event, effects)

    def persisting(self, machine: Machine, order: Persist) -> None:
        self.invariants.persisting(machine, order)
        if isinstance(order.record, MeshLogRecord):
            entry = self.office.ring.decode(order.record.entry.payload)
            if isinstance(entry, LogEntry) and isinstance(entry.body, Rekey) and entry.author == KeyId(machine.node):
                self.invariants.giving_up_keys(machine)

    def lives(self, machine: Machine, plan: AttemptPlan) -> None:
        self.invariants.lives(machine, plan)

    def over(self, machine: Machine, plan: AttemptPlan, result: Result | None) -> None:
        self.invariants.over(machine, plan, result)

    def answered(self, answer: Answered) -> None:
        self.answers[answer.query] = answer
        if (renewed := self._renewing.pop(answer.query, None)) is not None:
            renewed.new_keys_answered(answer)
            return
        self.people.heard(answer)
        self.invariants.answered(answer)

    def renamed(self, machine: Machine, before: NodeId) -> None:
        self.network.renamed(before, machine.node)
        self.ledger.ids[machine.node] = machine
        machines = list(self.machines.values())  # in the same order under the ids of now
        self.machines.clear()
        self.machines.update((other.node, other) for other in machines)

    def take_new_keys(self, machine: Machine) -> None:
        """`meshgpu rekey` on a machine that has an agent and is not rented.

        The last machine of the office keeps its keys. Where all change theirs while one is cut off that does so as
        well, nobody answers it any more by an id that it knows: docs/trust.md, known weaknesses. And it is the
        intruder's, whose rights would have two names.
        """
        keeps = machine.setup.is_rented or machine is self.intruder.machine
        if machine.agent is None or keeps or machine.next_keys is not None:
            return
        query = f"rekey{len(self.answers)} {self.timeline.happened}"
        self._renewing[query] = machine
        machine.take_new_keys(query, self.office.ring)

    def _signed(self, value: object) -> None:
        if isinstance(value, JobSpec):
            self.ledger.submitted[value.job] = value
            for trial in trials_of(value):
                self.ledger.submitted[trial.job] = trial
            self._ask_to_stop()
        elif isinstance(value, LogEntry) and isinstance(value.body, Revoke) and value.body.stops_jobs:
            self.ledger.stopped.add(value.body.node)
            self._ask_to_stop()
        elif isinstance(value, GossipEntry):
            self.ledger.said.setdefault(value.owner, set()).add(value.value)

    def _ask_to_stop(self) -> None:
        """Whoever revoked a machine may want its jobs to end, and those that it still finds somebody for."""
        ledger = self.ledger
        ledger.stops_asked |= {job for job, spec in ledger.submitted.items() if spec.submitter in ledger.stopped}

    # -- the seller of instances --------------------------------------------------------------------------------------

    def take_back(self, machine: Machine) -> None:
        """An instance is gone. Whoever rented it sees that, as soon as its agent runs, and says so to the mesh."""
        machine.vanish()
        renter = self.ledger.ids[self.office.setups[1].node]

        def seen() -> None:
            if renter.agent is None or renter.node not in renter.agent.log.members:
                self.timeline.after(1.0, seen)
            elif machine.node in renter.agent.log.members:
                renter.post(LogWritten(renter.agent.log.write(KeyId(renter.node), [RemoveNode(machine.node)])))
                self.timeline.after(1.0, seen)  # until it is on disk

        self.timeline.after(self.timeline.rng.uniform(0.5, 5.0), seen)

    # -- mDNS ---------------------------------------------------------------------------------------------------------

    def _announce(self, machine: Machine) -> None:
        """All see the machine, and it sees all, as far as paths are open; an instance sees nobody."""
        for other in self.machines.values():
            if other is not machine:
                self._sight(other, machine)
                self._sight(machine, other)
        self.timeline.after(0.0, lambda: machine.post(AddressesChanged(machine.addresses)))

    def _sight(self, who: Machine, whom: Machine) -> None:
        def seen() -> None:
            if who.setup.is_rented:
                return
            if self.network.is_cut(who.node, whom.node):
                self.timeline.after(self.timeline.rng.uniform(*ASKED_AGAIN_S), seen)
            elif whom.agent is not None:
                tag = self.office.mesh[:12]
                who.post(MachineSighted(Sighting(whom.node, tag, "office", 1, whom.addresses)))

        self.timeline.after(self.timeline.rng.uniform(*SIGHTED_S), seen)
