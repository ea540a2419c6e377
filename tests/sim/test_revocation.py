"""A machine is taken out in the middle of everything: nobody listens to it any more, and no job lives twice."""

import pytest

from meshgpu.core.events import LogWritten
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.model.job import AttemptState, JobState
from meshgpu.model.records import AttemptRecord
from meshgpu.model.trust import LogEntry, Revoke
from meshgpu.sim.faults import FaultRates
from meshgpu.sim.machine import Machine
from meshgpu.sim.world import World, WorldConfig

LOAD_S = 20.0
LATER_S = 90.0
FAULTS = FaultRates(lost=0.02)
REKEYING = FaultRates(lost=0.0, rekeys=6.0, cuts=6.0)


def troubled(seed: int, *, stops_jobs: bool, faults: FaultRates = FAULTS) -> tuple[World, Machine]:
    """A world under load and faults from which one machine was revoked, and that machine, long after."""
    world = World(seed, WorldConfig(size=5))
    rng, at = world.timeline.rng, world.timeline.at
    world.start()
    for _ in range(24):
        at(rng.uniform(0.5, LOAD_S), world.people.run_something)
    world.faults.plan(faults, LOAD_S)
    admin, *others = world.machines.values()
    lost = rng.choice(others[:-1] if faults.rekeys else others)

    def revoke() -> None:
        """Once, by the id that the admin knows it by."""
        log = admin.agent.log if admin.agent is not None else None
        if log is not None and admin.node in log.members and not is_revoked(world, log, lost):
            known = next(node for node in (lost.node, *lost.before) if node in log.members)
            body = log.revocation(known, stops_jobs=stops_jobs)
            admin.post(LogWritten(log.write(admin.setup.accounts[admin.setup.owner], (body,))))
        world.timeline.after(1.0, revoke)  # a crash may have come before it was on disk

    at(rng.uniform(5.0, LOAD_S - 2.0), revoke)
    world.run(LOAD_S + LATER_S)
    return world, lost


def is_revoked(world: World, log: MeshLog, lost: Machine) -> bool:
    """Whether an entry says so of any of its ids."""
    entries = [world.office.ring.decode(signed.payload) for signed in log.all_entries()]
    bodies = [entry.body for entry in entries if isinstance(entry, LogEntry)]
    return any(isinstance(body, Revoke) and body.node in (*lost.before, lost.node) for body in bodies)


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
def test_nobody_listens_to_a_revoked_machine_under_any_keys_it_ever_had(seed: int) -> None:
    world, lost = troubled(seed, stops_jobs=False, faults=REKEYING)
    ids = {*lost.before, lost.node, *([lost.next_keys.node] if lost.next_keys else [])}
    keys = {key for accounts in (*lost.before.values(), lost.setup.accounts) for key in accounts.values()}
    for machine in agents(world, lost):
        assert machine.agent is not None
        assert not machine.agent.log.members.keys() & ids
        assert not machine.agent.log.users.keys() & keys


def test_what_ran_for_a_revoked_machine_keeps_nobody_busy() -> None:
    """Who owes a result only to who is out is idle: it may take new keys, and would end if it were rented."""
    owed = 0
    for seed in range(12):
        world, lost = troubled(seed, stops_jobs=False, faults=FaultRates(lost=0.0))
        for machine in agents(world, lost):
            assert machine.agent is not None
            assert machine.agent.attempts.is_idle or machine.agent.attempts.allocations(), "busy with nothing that runs"
            undelivered = [
                record
                for record in machine.disk.values()
                if isinstance(record, AttemptRecord)
                and record.result is not None
                and record.state is not AttemptState.DELIVERED
            ]
            assert all(world.ledger.submitted[r.job].stewards == (lost.node,) for r in undelivered)
            owed += len(undelivered)
    assert owed  # else this proves nothing


@pytest.mark.parametrize("seed", range(12))
def test_its_jobs_end_elsewhere_where_the_admin_says_so(seed: int) -> None:
    world, lost = troubled(seed, stops_jobs=True)
    keys = set(lost.setup.accounts.values())
    signed = {job for job, spec in world.ledger.submitted.items() if spec.submitter == lost.node}
    for machine in agents(world, lost):
        assert machine.agent is not None
        assert machine.agent.log.stopped == keys
        assert not {allocation.job for allocation in machine.agent.attempts.allocations()} & signed
        held = [view for job in signed if (view := machine.agent.stewardship.view(job))]
        views = [view for view in held if view.register.state is not JobState.DRAFT]  # which nobody was told to be held
        # What ran on the lost machine itself nobody can know.
        assert all(view.register.state.is_final or view.register.node == lost.node for view in views)
        assert all(view.register.state is not JobState.QUEUED for view in views)


def test_machine_whose_new_keys_the_admin_had_not_heard_of_is_out_with_them() -> None:
    world = World(1, WorldConfig(size=3, is_plain=True))
    world.start()
    world.run(10.0)
    admin, lost, other = world.machines.values()
    paths = [path for peer in (lost, other) for path in ((admin.node, peer.node), (peer.node, admin.node))]
    for path in paths:
        world.network.cut(*path)
    world.take_new_keys(lost)
    world.run(3.0)
    (old,) = lost.before
    assert admin.agent is not None
    assert other.agent is not None
    assert old in admin.agent.log.members
    assert lost.node in other.agent.log.members
    body = admin.agent.log.revocation(old, stops_jobs=False)
    admin.post(LogWritten(admin.agent.log.write(admin.setup.accounts[admin.setup.owner], (body,))))
    for path in paths:
        world.network.heal(*path)
    world.run(LATER_S)
    for machine in agents(world, lost):
        assert machine.agent is not None
        assert machine.agent.log.members.keys() == {admin.node, other.node}
