"""The standard scenario: a mesh under load and faults, then peace, then the question whether all is well."""

from dataclasses import dataclass, field, replace
from typing import Final

from meshgpu.model.job import Action
from meshgpu.sim.fakes import ExecutorTiming
from meshgpu.sim.faults import FaultRates
from meshgpu.sim.world import World, WorldConfig

RUSH: Final = 0.4
"""Part of the jobs that are asked for at one and the same moment, so that they compete."""


TAKEN_BACK: Final = 0.6
"""Part of the rented machines that vanish."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """trouble_s: how long faults and load go on. settle_s: how long all may take to come to rest after that.
    jobs, limited, sweeps, stops, watches: how often people do what; `limited` are jobs with limits of time.
    lies: messages of an intruder in a fifth of all worlds.
    """

    trouble_s: float = 40.0
    settle_s: float = 240.0
    jobs: int = 24
    limited: int = 0
    sweeps: int = 0
    stops: int = 4
    watches: int = 3
    lies: int = 300
    faults: FaultRates = field(default_factory=FaultRates)
    world: WorldConfig = field(default_factory=WorldConfig)


OWNERS: Final = Scenario(
    faults=FaultRates(owners=12.0), world=WorldConfig(executor=ExecutorTiming(long=0.6, stubborn=0.5))
)
"""Owners come back again and again to machines where jobs run long and do not like to leave."""


SWEEPS: Final = Scenario(jobs=6, sweeps=6, faults=FaultRates(crashes=5.0, crashes_at_write=8.0))
"""Sweeps whose stewards crash again and again."""


LIMITS: Final = Scenario(
    jobs=6, limited=24, world=WorldConfig(size=4, executor=ExecutorTiming(long=0.5, stubborn=0.3, grace_s=5.0))
)
"""A small office with more work than room, most of which may neither wait nor run for long."""


WRONG_CLOCKS: Final = Scenario(stops=8, watches=8, world=WorldConfig(has_wrong_clocks=True))
"""An office in which hardly two wall clocks agree."""


INSTANCES: Final = Scenario(faults=FaultRates(lost=0.0), world=WorldConfig(size=4, instances=2))
"""A small office with two rented machines, which are taken back while jobs run on them."""


REKEYS: Final = Scenario(
    jobs=8,
    faults=FaultRates(rekeys=8.0, crashes_at_write=5.0, cuts=5.0, partitions=1.0, snips=0.1, lost=0.0),
    world=WorldConfig(executor=ExecutorTiming(run_s=(0.3, 3.0), long=0.05)),
)
"""Machines take new keys in the middle of everything, some while nobody hears them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a world. settled_s: how long it took to come to rest."""

    world: World
    settled_s: float


def simulate(seed: int, scenario: Scenario | None = None) -> Outcome:
    """Run one world. Raises BrokenInvariant, or AssertionError where it does not come to rest."""
    scenario = scenario or Scenario()
    has_intruder = scenario.world.has_intruder or seed % 5 == 0
    world = World(seed, replace(scenario.world, has_intruder=has_intruder))
    rng, at = world.timeline.rng, world.timeline.at
    world.start()
    rush_s = rng.uniform(0.5, scenario.trouble_s)
    for _ in range(scenario.jobs):
        is_rush = rng.random() < RUSH
        at(rush_s if is_rush else rng.uniform(0.5, scenario.trouble_s), world.people.run_something)
    for _ in range(scenario.limited):
        at(rng.uniform(0.5, scenario.trouble_s), lambda: world.people.run_something(is_limited=True))
    for _ in range(scenario.sweeps):
        at(rng.uniform(0.5, scenario.trouble_s / 2), world.people.sweep_something)
    for _ in range(scenario.stops):
        action = rng.choice((Action.STOP, Action.KILL))
        at(rng.uniform(3.0, scenario.trouble_s), lambda action=action: world.people.end_something(action))  # type: ignore[misc]  # mypy cannot type bound defaults
    for _ in range(scenario.watches):
        at(rng.uniform(3.0, scenario.trouble_s), world.people.watch_something)
    for _ in range(scenario.lies if has_intruder else 0):
        at(rng.uniform(1.0, scenario.trouble_s), world.intruder.lie)
    for machine in world.machines.values():
        if machine.setup.is_rented and rng.random() < TAKEN_BACK:
            at(rng.uniform(5.0, scenario.trouble_s), lambda machine=machine: world.take_back(machine))  # type: ignore[misc]  # as above
    world.faults.plan(scenario.faults, scenario.trouble_s)
    world.run(scenario.trouble_s)
    return Outcome(world, world.settle(scenario.settle_s))
