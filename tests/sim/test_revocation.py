"""A machine is taken out in the middle of everything: nobody listens to it any more, and no job lives twice."""

import pytest

from meshgpu.core.events import LogWritten
from meshgpu.model.job import JobState
from meshgpu.sim.faults import FaultRates
from meshgpu.sim.machine import Machine
from meshgpu.sim.world import World, WorldConfig

LOAD_S = 20.0
LATER_S = 90.0
FAULTS = FaultRates(lost=0.02)


def troubled(seed: int, *, stops_jobs: bool) -> tuple[World, Machine]:
    """A world under load and faults from which one machine was revoked, and that machine, long after."""
    world = World(seed, WorldConfig(size=5))
    rng, at = world.timeline.rng, world.timeline.at
    world.start()
    for _ in range(24):
        at(rng.uniform(0.5, LOAD_S), world.people.run_something)
    world.faults.plan(FAULTS, LOAD_S)
    admin, *others = world.machines.values()
    lost = rng.choice(others)

    def revoke() -> None:
        if admin.agent is not None and lost.node in admin.agent.log.members:
            body = admin.agent.log.revocation(lost.node, stops_jobs=stops_jobs)
            admin.post(LogWritten(admin.agent.log.write(admin.setup.accounts[admin.setup.owner], (body,))))
        world.timeline.after(1.0, revoke)  # a crash may have come before it was on disk

    at(rng.uniform(5.0, LOAD_S - 2.0), revoke)
    world.run(LOAD_S + LATER_S)
    return world, lost


def agents(world: World, lost: Machine) -> list[Machine]:
    """All other machines whose agents run."""
    return [machine for machine in world.machines.values() if machine is not lost and machine.agent is not None]


@pytest.mark.parametrize("seed", range(12))
def test_nobody_listens_to_a_revoked_machine(seed: int) -> None:
    world, lost = troubled(seed, stops_jobs=False)
    keys = set(lost.setup.accounts.values())
    for machine in agents(world, lost):
        assert machine.agent is not None
        assert lost.node not in machine.agent.log.members
        assert not machine.agent.log.users.keys() & keys
        assert machine.agent.heard(lost.node) == (None, None)
        assert all(view.member.node != lost.node for view in machine.agent.machines(machine.now()))


@pytest.mark.parametrize("seed", range(12))
def test_its_jobs_end_elsewhere_where_the_admin_says_so(seed: int) -> None:
    world, lost = troubled(seed, stops_jobs=True)
    keys = set(lost.setup.accounts.values())
    signed = {job for job, spec in world.ledger.submitted.items() if spec.submitter == lost.node}
    for machine in agents(world, lost):
        assert machine.agent is not None
        assert machine.agent.log.stopped == keys
        assert not {allocation.job for allocation in machine.agent.attempts.allocations()} & signed
        views = [view for job in signed if (view := machine.agent.stewardship.view(job))]
        # What ran on the lost machine itself nobody can know.
        assert all(view.register.state.is_final or view.register.node == lost.node for view in views)
        assert all(view.register.state is not JobState.QUEUED for view in views)
