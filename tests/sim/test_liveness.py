"""Who is known to be gone, how soon, and how seldom somebody is taken for gone who is not."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import permutations

import pytest

from meshgpu.core.events import LogWritten
from meshgpu.core.membership.liveness import Liveness
from meshgpu.core.node import Node
from meshgpu.model.clock import Now
from meshgpu.model.gossip import Doubt, Doubts, MemberState
from meshgpu.model.ids import NodeId, node_id
from meshgpu.model.trust import AddNode, Revoke, Role
from meshgpu.sim.machine import Machine
from meshgpu.sim.world import World, WorldConfig

LOOK_S = 0.25
LONGEST_PAUSE_S = 20.0
MORE_PER_PAIR = 5
"""Messages more than at rest, for each pair one way, when a machine wakes: all take their doubt of it back and tell
all, and it meets each of them with a digest and what either lacked."""


def office(size: int, seed: int = 1) -> World:
    """An office in which all have met."""
    world = World(seed, WorldConfig(size=size))
    world.start()
    world.run(40.0)
    assert set(states(world)) == {MemberState.ALIVE}
    return world


def pairs(world: World) -> Iterator[tuple[Machine, Machine]]:
    return permutations(world.machines.values(), 2)


def states(world: World) -> list[MemberState | None]:
    return [one.sees(other) for one, other in pairs(world)]


def until(world: World, holds: Callable[[], bool], within_s: float, step_s: float = 0.01) -> float:
    began = world.timeline.time_s
    while not holds():
        assert world.timeline.time_s - began < within_s
        world.run(step_s)
    return world.timeline.time_s - began


def known_down(world: World, victim: Machine) -> bool:
    return all(one.sees(victim) is MemberState.DOWN for one, other in pairs(world) if other is victim)


def hours_of_starvation(seed: int, for_s: float, size: int = 7) -> tuple[float, float]:
    """(node-seconds watched, those of them in which a member that runs was taken for down).

    Every machine is up to 0.3 s late with everything, and now and then one of them stands still for up to 20 s.
    """
    world = office(size, seed)
    rng = world.timeline.rng
    for machine in world.machines.values():
        machine.lag_s = rng.uniform(0.0, 0.3)
    ends, watched, wrong = world.timeline.time_s + for_s, 0.0, 0.0
    pause_at = world.timeline.time_s
    while world.timeline.time_s < ends:
        if world.timeline.time_s >= pause_at:
            rng.choice(list(world.machines.values())).pause(rng.uniform(1.0, LONGEST_PAUSE_S))
            pause_at += rng.uniform(2.0, 15.0)
        world.run(LOOK_S)
        found = states(world)
        watched += LOOK_S * size
        wrong += LOOK_S * sum(state is MemberState.DOWN for state in found) / (size - 1)
    return watched, wrong


def test_agent_that_dies_is_known_everywhere_within_half_a_second() -> None:
    for size in (3, 7, 16):
        world = office(size)
        victim = world.named("rig1")
        victim.crash_agent()
        took = until(world, lambda world=world, victim=victim: known_down(world, victim), 5.0)  # type: ignore[misc]  # mypy cannot type bound defaults
        print(f"{size} machines: a dead agent is known everywhere after {took * 1000:.0f} ms")
        assert took <= 0.5


def test_machine_that_loses_power_is_known_everywhere_within_ten_seconds() -> None:
    for size in (3, 7, 16):
        world = office(size)
        victim = world.named("rig1")
        victim.power_off()
        took = until(world, lambda world=world, victim=victim: known_down(world, victim), 60.0)  # type: ignore[misc]  # as above
        print(f"{size} machines: a machine without power is known everywhere after {took:.1f} s")
        assert took <= 10.0


def test_starved_machine_is_not_taken_for_down() -> None:
    watched, wrong = hours_of_starvation(0, 200.0)
    print(f"{wrong:.1f} false node-seconds of {watched:.0f}")
    assert wrong == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 8))
def test_starved_machine_is_not_taken_for_down_in_a_long_time(seed: int) -> None:
    watched, wrong = hours_of_starvation(seed, 3600.0)
    print(f"seed {seed}: {wrong:.1f} false node-seconds of {watched:.0f}")
    assert wrong == 0


def test_halves_that_lost_each_other_find_together_again() -> None:
    world = office(8)
    nodes = list(world.machines)
    cut = [(a, b) for a, b in permutations(nodes, 2) if (a in nodes[:4]) != (b in nodes[:4])]
    for one, other in cut:
        world.network.cut(one, other)

    def is_apart() -> bool:
        return all(
            one.sees(other) is (MemberState.DOWN if (one.node, other.node) in cut else MemberState.ALIVE)
            for one, other in pairs(world)
        )

    print(f"both halves know after {until(world, is_apart, 60.0, LOOK_S):.1f} s")
    world.run(30.0)
    assert is_apart()
    for one, other in cut:
        world.network.heal(one, other)
    took = until(world, lambda: set(states(world)) == {MemberState.ALIVE}, 60.0, LOOK_S)
    print(f"and are one again {took:.1f} s after the cut is healed")


@pytest.mark.parametrize("away_s", [3600.0, pytest.param(7 * 86_400.0, marks=pytest.mark.slow)])
def test_member_that_was_away_for_long_is_found_within_a_minute(away_s: float) -> None:
    world = office(2)
    one, other = world.machines
    world.network.cut(one, other)
    world.network.cut(other, one)
    world.run(away_s)
    assert set(states(world)) == {MemberState.DOWN}
    world.network.heal(one, other)
    world.network.heal(other, one)
    until(world, lambda: set(states(world)) == {MemberState.ALIVE}, 60.0, LOOK_S)


def suspend(world: World, sleeper: Machine, for_s: float) -> None:
    """Nothing of it runs or answers for so long; its clocks go on, and its Links are dead when it wakes."""
    others = [node for node in world.machines if node != sleeper.node]
    for other in others:
        world.network.cut(sleeper.node, other)
        world.network.cut(other, sleeper.node)
    sleeper.pause(for_s)
    world.run(for_s)
    for other in others:
        world.network.heal(sleeper.node, other)
        world.network.heal(other, sleeper.node)


@pytest.mark.parametrize("asleep_s", [600.0, pytest.param(8 * 3600.0, marks=pytest.mark.slow)])
def test_machine_that_slept_is_back_soon_and_brings_no_storm(asleep_s: float) -> None:
    """One exchange with each of the others, and what a mesh at rest says: counted from when it wakes."""
    size, counted_s = 16, 30.0
    world = office(size)
    sleeper = world.named("rig1")
    sent: Counter[str] = Counter()
    doubted: set[tuple[str, str]] = set()
    world.network.sent = lambda message: sent.update([type(message).__name__])
    world.run(counted_s)
    at_rest = sent.copy()
    suspend(world, sleeper, asleep_s)
    assert known_down(world, sleeper)
    sent.clear()

    def is_well() -> bool:
        doubted.update(
            (one.setup.name, other.setup.name)
            for one, other in pairs(world)
            if sleeper not in (one, other) and one.sees(other) is not MemberState.ALIVE
        )
        return set(states(world)) == {MemberState.ALIVE}

    took = until(world, is_well, 60.0, LOOK_S)
    world.run(counted_s - took)
    more = {kind: count - at_rest[kind] for kind, count in sorted(sent.items()) if count > at_rest[kind]}
    print(
        f"all see all {took:.1f} s after it woke; sent in {counted_s:.0f} s: {sum(sent.values())}, "
        f"at rest {sum(at_rest.values())}; more of {more}"
    )
    assert doubted == set()
    assert sum(sent.values()) - sum(at_rest.values()) <= MORE_PER_PAIR * size * (size - 1)


def test_machine_that_was_off_for_a_week_takes_in_who_joined_and_who_was_put_out_meanwhile() -> None:
    """Its boot clock begins anew, its wall clock is a week on, and it has its disk alone. The office was closed."""
    world = World(1, WorldConfig(size=4))
    world.start()
    world.run(40.0)
    admin, sleeper, put_out, other = world.machines.values()
    sleeper.power_off()
    world.run(60.0)
    assert admin.agent is not None
    key, public = admin.setup.accounts[admin.setup.owner], world.office.ring.make("newcomer")
    newcomer = AddNode(node_id(public), public, b"ca " + public, "newcomer", Role.RIG, admin.setup.owner)
    put = Revoke(put_out.node, (), stops_jobs=False)
    admin.post(LogWritten(admin.agent.log.write(key, [newcomer, put])))
    world.run(60.0)
    for machine in (admin, put_out, other):
        machine.power_off()
    world.run(7 * 86_400.0)
    for machine in (admin, other):
        machine.power_on()
    world.run(60.0)
    before = sleeper.now()
    sleeper.power_on()
    assert sleeper.now().boot_id != before.boot_id
    assert sleeper.agent is not None
    assert put_out.node in sleeper.agent.log.members, "it knows what its disk knows"
    here = (admin, sleeper, other)

    def is_well() -> bool:
        logs = [machine.agent.log.members for machine in here if machine.agent is not None]
        has_heard = all(put_out.node not in members and newcomer.node in members for members in logs)
        return has_heard and {one.sees(two) for one, two in permutations(here, 2)} == {MemberState.ALIVE}

    print(f"all are one {until(world, is_well, 60.0, LOOK_S):.1f} s after it is back")
    world.run(60.0)
    assert is_well()
    assert not sleeper.trusts(put_out.node)


def lie(liar: Node) -> None:
    """From now on it says that nobody else answers, and that their ports refuse."""
    everybody = [node for node in liar.log.members if node != liar.node]
    liar._liveness.doubts = lambda: Doubts(  # type: ignore[method-assign]  # a liar
        tuple(Doubt(node, liar._gossip.incarnation(node), is_gone=True) for node in sorted(everybody))
    )


def liars_take_nobody_down() -> None:
    world = office(7)
    liars = list(world.machines.values())[:4]
    for machine in liars:
        assert machine.agent is not None
        lie(machine.agent)
    for _ in range(60):
        world.run(LOOK_S)
        honest = [one.sees(other) for one, other in pairs(world) if one not in liars]
        assert set(honest) == {MemberState.ALIVE}


def test_liars_in_the_majority_take_nobody_down() -> None:
    liars_take_nobody_down()


# -- planted bugs: the tests above notice ------------------------------------------------------------------------------


def test_doubt_of_others_that_is_believed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Liveness.doubted

    def credulous(self: Liveness, now: Now, peer: NodeId) -> object:
        self._doubt(now, peer, self._watch(peer))
        return original(self, now, peer)

    monkeypatch.setattr(Liveness, "doubted", credulous)
    with pytest.raises(AssertionError):
        liars_take_nobody_down()


def test_starvation_without_the_knock_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Liveness, "knocked", lambda *_: [])
    _, wrong = hours_of_starvation(0, 200.0)
    assert wrong > 0
