"""A mesh of many machines comes together, and news of one machine reaches all."""

import statistics

import pytest

from meshgpu.sim.timeline import Timeline
from meshgpu.sim.world import World, WorldConfig

CHANGES = 20
STEP_S = 0.002
"""Resolution of what is measured."""


def spread(world: World) -> list[float]:
    """Seconds until a change of one machine is known on every other, sorted, for some changes."""
    rng = Timeline(7).rng
    took: list[float] = []
    for _ in range(CHANGES):
        machines = list(world.machines.values())
        changed = rng.choice(machines)
        changed.redescribe(memory_bytes=rng.randrange(10**9, 10**12))
        began = world.timeline.time_s
        while len({machine.heard(changed.node) for machine in machines}) > 1:
            world.run(STEP_S)
            assert world.timeline.time_s < began + 10.0
        took.append(world.timeline.time_s - began)
    return sorted(took)


@pytest.mark.parametrize(
    "size", [16, pytest.param(64, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.slow)]
)
def test_news_reaches_every_machine_at_once(size: int) -> None:
    world = World(1, WorldConfig(size=size))
    world.start()
    world.run(30.0)
    assert world.invariants.unsettled() == []
    took = spread(world)
    p50, p99 = statistics.median(took), took[-1]
    print(f"{size} machines: a change is known everywhere after {p50 * 1000:.0f} ms (p50), {p99 * 1000:.0f} ms (worst)")
    assert p99 < 0.2
