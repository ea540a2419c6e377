"""A study gives equal figures for equal seeds, begins with a mesh in which all is well, and sees what goes wrong."""

import math
from collections.abc import Callable, Sequence
from itertools import permutations

import pytest

from meshgpu.core.membership.gossip import Gossip
from meshgpu.core.membership.liveness import Liveness
from meshgpu.model.messages import GossipDelta, GossipDigest
from meshgpu.sim.meshes import FRAME_BYTES, OurMesh, Sizes
from meshgpu.sim.study import LATE_S, Figures, Part, Plan, loss, news, quantile, starving, study, traffic
from meshgpu.sim.weather import Weather

SIZES = Sizes(value=lambda _value: 100, frame=lambda message: 1000 if isinstance(message, GossipDelta) else 50)
SMALL = Plan(seconds=20.0)


def ours(size: int, seed: int = 1, weather: Weather | None = None) -> OurMesh:
    return OurMesh(seed, size, weather or Weather(), SIZES)


def backwards(play: Callable[[Part], Figures], parts: Sequence[Part]) -> list[Figures]:
    """As `map`, the last first: where several processors work, no order is kept."""
    return [play(part) for part in reversed(parts)][::-1]


def test_equal_plans_give_equal_figures() -> None:
    first, second = study(SMALL, (4,), SIZES), study(SMALL, (4,), SIZES, backwards)
    assert first == second
    (other,) = study(Plan(seconds=20.0, seed=2), (4,), SIZES)
    assert other.ours.known_s != first[0].ours.known_s


def test_mesh_begins_with_everybody_linked_alive_and_known() -> None:
    mesh = ours(12)
    assert mesh.world.invariants.unsettled() == []
    assert not any(mesh.holds_down(one, other) for one, other in permutations(range(12), 2))
    agents = [machine.agent for machine in mesh.machines]
    assert all(
        agent and agent.addresses(other.node)
        for agent in agents
        for other in mesh.machines
        if agent and agent.node != other.node
    )


def test_mesh_that_was_put_together_behaves_as_one_that_grew() -> None:
    """Nothing was due that it left out: for a minute nobody finds anything to tell, dial or doubt."""
    mesh = ours(8)
    told: list[object] = []
    mesh.world.network.sent = told.append
    dialled = mesh.world.network._dials
    mesh.timeline.run_until(mesh.timeline.time_s + 60.0)
    assert all(isinstance(message, GossipDigest) and message.is_brief for message in told)
    assert mesh.world.network._dials == dialled


def test_killed_agent_and_lost_machine_come_back() -> None:
    mesh = ours(5)
    killed, lost = loss(mesh, 1, mesh.kill), loss(mesh, 2, mesh.lose)
    assert killed < 0.5 < lost < 10.0
    assert not any(mesh.holds_down(one, other) for one, other in permutations(range(5), 2))
    assert mesh.world.invariants.unsettled() == []


def test_news_of_a_halved_mesh_waits_until_it_is_whole() -> None:
    known = news(ours(6), Plan(seconds=60.0, cuts=((10.0, 40.0),)))
    assert sum(took_s > 1.0 for took_s in known) >= 5
    assert max(known) < LATE_S
    assert quantile(known, 0.25) < 0.01


def test_lost_packets_make_news_late_and_lose_none() -> None:
    calm, rough = news(ours(6), SMALL), news(ours(6, weather=Weather(loss=0.2)), SMALL)
    assert math.inf not in rough
    assert calm[-1] < 0.01 < quantile(rough, 0.5)
    assert rough[-1] > 0.2  # sent again, not before TCP's timer says so


def test_traffic_counts_each_message_with_what_is_around_it() -> None:
    mesh = ours(4)
    told: list[int] = []
    weigh = mesh.world.network.sent

    def note(message: object) -> None:
        told.append(1000 if isinstance(message, GossipDelta) else 50)
        weigh(message)  # type: ignore[arg-type]  # what a Link takes

    mesh.world.network.sent = note
    rate = traffic(mesh, 30.0, reads=True)
    messages = sum(told) + FRAME_BYTES * len(told)
    assert 1000 in told
    assert messages < rate * 30.0 * 4 < messages * 1.5  # and keepalive


def test_nobody_is_held_for_down_while_some_starve_and_stop() -> None:
    downs, node_seconds = starving(ours(8), Plan(seconds=120.0))
    assert (downs, round(node_seconds)) == (0, 8 * 120)


# -- planted faults: the study shows them -----------------------------------------------------------------------------


def test_gossip_that_pushes_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gossip, "_schedule_push", lambda *_: None)
    assert quantile(news(ours(6), SMALL), 0.5) > 0.1


def test_doubt_that_ends_at_once_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Liveness, "_patience_s", lambda *_: 0.0)
    downs, _ = starving(ours(8), Plan(seconds=120.0))
    assert downs > 0


def test_killed_agent_that_nobody_knocks_at_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Liveness, "knocked", lambda *_: [])
    mesh = ours(5)
    assert loss(mesh, 1, mesh.kill) > 1.0


def test_figures_say_never_where_nobody_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Liveness, "_patience_s", lambda *_: 1e9)
    mesh = ours(3)
    assert loss(mesh, 1, mesh.lose) == math.inf


def test_all_figures_of_a_size_stand_together() -> None:
    two, three = study(SMALL, (3, 2), SIZES)
    assert (two.nodes, three.nodes) == (2, 3)
    for found in (three.ours, three.memberlist):
        assert len(found.killed_s) == len(found.lost_s) == 8
        assert found.node_seconds == pytest.approx(60.0)
        assert len(found.known_s) == 9
    assert 0 < three.ours.quiet_bytes < three.ours.busy_bytes


def test_large_meshes_are_studied_for_less_long_unless_one_says_how_long() -> None:
    assert [Plan().lasts_s(nodes) for nodes in (4, 64, 128, 256)] == [300.0, 300.0, 150.0, 75.0]
    assert Plan(seconds=300.0).lasts_s(256) == 300.0
