"""What goes wrong in a simulated office, in an order that the seed decides. Every fault ends after a while."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Final

from meshgpu.model.ids import GpuId, NodeId
from meshgpu.sim.machine import CrashPoint, Machine
from meshgpu.sim.network import Network
from meshgpu.sim.timeline import Timeline

MEAN_S: Final = 10.0
"""How long a fault lasts on average: as long as a steward waits before it calls a silent job unknown."""


REKEY_AGAIN_S: Final = (0.2, 2.0)
"""After which a machine that could not take new keys is told to once more."""

OWNER_WAITS_S: Final = 30.0 + 2.0
"""What an owner is promised, and what a machine lags behind at most."""


@dataclass(frozen=True, slots=True)
class FaultRates:
    """How many of each are expected in a world. lost: machines that go off for good.

    rekeys: how often a machine is told to take new keys, again and again until it may or a while has passed.
    snips: probability that a Link breaks just as a message about a job is sent.
    halves: how often half the machines lose power at once. owners: who come back to their machines for a while.
    """

    crashes: float = 3.0
    crashes_at_write: float = 3.0
    reboots: float = 1.0
    cuts: float = 3.0
    partitions: float = 0.7
    one_way: float = 1.0
    slow: float = 1.0
    lost: float = 0.15
    halves: float = 0.2
    owners: float = 2.0
    rekeys: float = 0.0
    snips: float = 0.04


class Faults:
    """Plans the faults of one world within its first `for_s` seconds; by then all but the lost machines are well."""

    def __init__(self, timeline: Timeline, network: Network, machines: dict[NodeId, Machine]) -> None:
        self._timeline = timeline
        self._network = network
        self._machines = machines
        self.owner_waited: Callable[[Machine, GpuId], None] = lambda _machine, _gpu: None
        self.take_new_keys: Callable[[Machine], None] = lambda _machine: None
        for machine in machines.values():
            machine.crashed = self._restart_soon

    def plan(self, rates: FaultRates, for_s: float) -> None:
        kinds: list[tuple[float, Callable[[float], None]]] = [
            (rates.crashes, self._crash),
            (rates.crashes_at_write, self._crash_at_write),
            (rates.reboots, self._reboot),
            (rates.cuts, self._cut),
            (rates.partitions, self._partition),
            (rates.one_way, self._delay_one_way),
            (rates.slow, self._slow_machine),
            (rates.halves, self._power_cut),
            (rates.owners, self._owner_returns),
        ]
        rng = self._timeline.rng
        if rates.rekeys:
            kinds.append((rates.rekeys, self._rekey))
        for expected, fault in kinds:
            for _ in range(int(expected) + (rng.random() < expected % 1)):
                begins = rng.uniform(0.5, for_s * 0.9)
                ends = min(begins + rng.expovariate(1 / MEAN_S), for_s)
                self._timeline.at(begins, lambda fault=fault, ends=ends: fault(ends))  # type: ignore[misc]  # mypy cannot type bound defaults
        self._network.snips = rates.snips
        self._timeline.at(for_s, lambda: setattr(self._network, "snips", 0.0))
        if rng.random() < rates.lost:
            victim = self._any()
            self._timeline.at(rng.uniform(1.0, for_s), victim.power_off)
            self._timeline.at(for_s, victim.power_off)
            self._timeline.at(for_s, lambda: self._all_well(victim))
        else:
            self._timeline.at(for_s, lambda: self._all_well(None))

    def _any(self) -> Machine:
        return self._timeline.rng.choice(list(self._machines.values()))

    def _all_well(self, lost: Machine | None) -> None:
        for machine in list(self._machines.values()):
            machine.crash_at, machine.lag_s = None, 0.0
            if machine is lost:
                continue
            machine.power_on()
            machine.start_agent()

    # -- agents and machines ------------------------------------------------------------------------------------------

    def _crash(self, ends: float) -> None:
        machine = self._any()
        machine.crash_agent(self._timeline.rng.choice(tuple(CrashPoint)))
        self._timeline.at(ends, machine.start_agent)

    def _crash_at_write(self, ends: float) -> None:
        """The next thing that this machine keeps is the last thing it does."""
        machine = self._any()
        machine.crash_at = self._timeline.rng.choice(tuple(CrashPoint))
        self._timeline.at(ends, lambda: setattr(machine, "crash_at", None))

    def _restart_soon(self, machine: Machine) -> None:
        self._timeline.after(self._timeline.rng.expovariate(0.5), machine.start_agent)

    def _reboot(self, ends: float) -> None:
        machine = self._any()
        machine.power_off()
        self._timeline.at(ends, machine.power_on)

    def _power_cut(self, ends: float) -> None:
        machines = list(self._machines.values())
        for machine in self._timeline.rng.sample(machines, len(machines) // 2):
            machine.power_off()
            self._timeline.at(ends, machine.power_on)

    def _slow_machine(self, ends: float) -> None:
        machine = self._any()
        machine.lag_s = self._timeline.rng.uniform(0.05, 2.0)
        self._timeline.at(ends, lambda: setattr(machine, "lag_s", 0.0))

    def _owner_returns(self, ends: float) -> None:
        """An owner plays for a while on one of his GPUs, and has it to himself soon, unless his agent is down."""
        rng = self._timeline.rng
        machine = self._any()
        if machine.setup.is_rented or not machine.setup.inventory.gpus or machine.has_owner_here:
            return
        gpu = rng.choice(machine.setup.inventory.gpus).uuid
        machine.owner_begins(gpu)
        reading, life = machine.readings, machine.instance

        def waited() -> None:
            if machine.readings is reading and machine.instance == life and machine.agent is not None:
                self.owner_waited(machine, gpu)

        self._timeline.after(OWNER_WAITS_S, waited)
        self._timeline.at(ends + rng.uniform(0.0, 2 * OWNER_WAITS_S), machine.owner_leaves)

    def _rekey(self, ends: float) -> None:
        machine = self._any()
        given_up = len(machine.before)

        def ask() -> None:
            if len(machine.before) == given_up and self._timeline.time_s < ends:
                self.take_new_keys(machine)
                self._timeline.after(self._timeline.rng.uniform(*REKEY_AGAIN_S), ask)

        ask()

    # -- paths --------------------------------------------------------------------------------------------------------

    def _cut(self, ends: float) -> None:
        one, other = self._timeline.rng.sample(list(self._machines), 2)
        paths = [(one, other)] if self._timeline.rng.random() < 0.3 else [(one, other), (other, one)]
        self._cut_until(paths, ends)

    def _partition(self, ends: float) -> None:
        """Two halves that cannot reach one another."""
        nodes = list(self._machines)
        half = set(self._timeline.rng.sample(nodes, len(nodes) // 2))
        self._cut_until([(a, b) for a, b in permutations(nodes, 2) if (a in half) != (b in half)], ends)

    def _cut_until(self, paths: list[tuple[NodeId, NodeId]], ends: float) -> None:
        for one, other in paths:
            self._network.cut(one, other)
            self._timeline.at(ends, lambda one=one, other=other: self._network.heal(one, other))  # type: ignore[misc]  # mypy cannot type bound defaults

    def _delay_one_way(self, ends: float) -> None:
        one, other = self._timeline.rng.sample(list(self._machines), 2)
        self._network.slow_down(one, other, self._timeline.rng.uniform(0.02, 3.0))
        self._timeline.at(ends, lambda: self._network.slow_down(one, other, 0.0))
