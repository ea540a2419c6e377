"""What a mesh does to news, to the network and to those who are slow, in figures; memberlist beside it.

Three worlds for each size: one in which machines say something new and paths are cut, one in which agents are killed
and machines are lost, and one in which machines starve and stop. Each is run twice: with our nodes, and with
memberlist's. Weather, changes, cuts and victims are the same in both.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Final

from meshgpu.sim.meshes import MemberlistMesh, Mesh, OurMesh, Sizes
from meshgpu.sim.weather import Weather

QUIET_S: Final = 60.0
"""For which nothing happens while traffic is weighed: two of memberlist's full exchanges."""
NEWS_S: Final = 2.0
"""A random machine says something new this often."""
READINGS_S: Final = 6.0
"""How often readings go out that change all the time: gossiped after 5 s at the earliest, read every 2 s."""
LATE_S: Final = 120.0
"""After the last news, and after each loss: what not all know by then counts as never."""
REST_S: Final = 30.0
"""Between two losses, all being well."""
LOSSES: Final = 8
LOSSES_OF_ALL: Final = 512
"""Agents killed, and machines lost, in each world; fewer where there are more than 64 machines."""
STARVED_S: Final = 1.0
"""How often a starved machine's lag is drawn anew."""
STARVED_LAG_S: Final = 0.3
STARVED_LIMIT_S: Final = 5.0
"""Its mean, drawn exponentially, and its limit."""
PAUSES_S: Final = 30.0
"""One random machine stops this often."""
LOOK_S: Final = 0.5
"""How often all are asked whom they hold for down, in the world of the starved."""
META_LIMIT_BYTES: Final = 512
"""Of what a member of memberlist says of itself: MetaMaxSize of its delegate.go."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is studied. seconds: of news, and of starving. cuts: when the mesh is halved, and until when, in seconds of
    the news. starved: part of the machines whose steps come late. pause_s: for how long machines stop; 0: never.
    """

    seconds: float = 300.0
    seed: int = 1
    weather: Weather = field(default_factory=Weather)
    cuts: tuple[tuple[float, float], ...] = ()
    starved: float = 0.2
    pause_s: float = 20.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of it, of one mesh. Seconds are sorted, infinite where it never was.

    known_s: until all know a change. killed_s, lost_s: until all others hold a killed agent, a lost machine for down.
    quiet_bytes, busy_bytes: sent by each machine each second, while nothing happens and while all readings change.
    false_downs: how often a machine that lives was held for down by somebody, in `node_seconds`.
    """

    known_s: tuple[float, ...]
    killed_s: tuple[float, ...]
    lost_s: tuple[float, ...]
    quiet_bytes: float
    busy_bytes: float
    false_downs: int
    node_seconds: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Both meshes, of one size."""

    nodes: int
    ours: Figures
    memberlist: Figures


def study(plan: Plan, nodes: int, sizes: Sizes) -> Pair:
    """Run all worlds of one size. Equal plans give equal figures."""
    meta_bytes = min(OurMesh(plan.seed, 2, Weather(), None).said_bytes(sizes), META_LIMIT_BYTES)
    return Pair(
        nodes,
        figures(plan, lambda seed: OurMesh(seed, nodes, plan.weather, sizes)),
        figures(plan, lambda seed: MemberlistMesh(seed, nodes, plan.weather, meta_bytes)),
    )


def figures(plan: Plan, make: Callable[[int], Mesh]) -> Figures:
    """make(seed): a mesh in which all is well."""
    mesh = make(plan.seed)
    quiet = traffic(mesh, QUIET_S)
    known = news(mesh, plan)
    busy = traffic(mesh, QUIET_S, reads=True)
    downs, node_seconds = starving(make(plan.seed + 2), plan)
    mesh = make(plan.seed + 1)
    rng = random.Random(f"{plan.seed} losses")  # noqa: S311 - a reproducible world
    victims = [rng.randrange(mesh.size) for _ in range(max(min(LOSSES, LOSSES_OF_ALL // mesh.size), 2))]
    killed = sorted(loss(mesh, victim, mesh.kill) for victim in victims)
    lost = sorted(loss(mesh, victim, mesh.lose) for victim in victims)
    return Figures(tuple(known), tuple(killed), tuple(lost), quiet, busy, downs, node_seconds)


# -- what is measured --------------------------------------------------------------------------------------------------


def traffic(mesh: Mesh, for_s: float, *, reads: bool = False) -> float:
    """Bytes that each machine sends each second. reads: whether all readings change meanwhile."""
    before, ends = mesh.sent_bytes, mesh.timeline.time_s + for_s
    if reads:
        for node in range(mesh.size):
            _repeat(mesh, READINGS_S, ends, lambda node=node: mesh.read(node), READINGS_S * node / mesh.size)  # type: ignore[misc]  # mypy cannot type bound defaults
    mesh.timeline.run_until(ends)
    return (mesh.sent_bytes - before) / for_s / mesh.size


def news(mesh: Mesh, plan: Plan) -> list[float]:
    """How long each change took to be known everywhere, sorted; the mesh is halved meanwhile, as planned."""
    timeline, rng = mesh.timeline, random.Random(f"{plan.seed} news")  # noqa: S311 - a reproducible world
    began, took = timeline.time_s, list[float]()
    lacking: dict[int, tuple[float, set[int]]] = {}  # {who changed: when first, and who has not heard its newest}

    def heard(observer: int) -> None:
        for node in [node for node, (_, who) in lacking.items() if observer in who and mesh.knows(observer, node)]:
            since, who = lacking[node]
            who.discard(observer)
            if not who:
                del lacking[node]
                took.append(timeline.time_s - since)

    def change() -> None:
        quiet = [node for node in range(mesh.size) if node not in lacking]
        if not quiet:
            return
        node = rng.choice(quiet)
        lacking[node] = timeline.time_s, set(range(mesh.size)) - {node}
        mesh.change(node)

    mesh.stepped = heard
    _repeat(mesh, NEWS_S, began + plan.seconds, change, NEWS_S)
    for begins, ends in plan.cuts:
        half = set(rng.sample(range(mesh.size), mesh.size // 2))
        across = [(a, b) for a, b in permutations(range(mesh.size), 2) if (a in half) != (b in half)]
        _each(mesh, began + begins, across, mesh.cut)
        _each(mesh, began + ends, across, mesh.heal)
    timeline.run_until(began + plan.seconds + LATE_S)
    mesh.stepped = _ignore
    return sorted([*took, *(math.inf for _ in lacking)])


def loss(mesh: Mesh, victim: int, take: Callable[[int], None]) -> float:
    """How long it takes until all others hold `victim` for down; then it comes back, and all is well again."""
    timeline = mesh.timeline
    began = timeline.time_s
    unaware = set(range(mesh.size)) - {victim}
    last = began

    def noticed(observer: int) -> None:
        nonlocal last
        if observer in unaware and mesh.holds_down(observer, victim):
            unaware.discard(observer)
            last = timeline.time_s

    mesh.stepped = noticed
    take(victim)
    while unaware and timeline.time_s - began < LATE_S:
        timeline.run_until(timeline.time_s + 0.5)
    mesh.stepped = _ignore
    mesh.restore(victim)
    others = [node for node in range(mesh.size) if node != victim]
    while timeline.time_s - began < 2 * LATE_S:
        timeline.run_until(timeline.time_s + REST_S)
        if not any(mesh.holds_down(o, victim) or mesh.holds_down(victim, o) for o in others):
            break
    return math.inf if unaware else last - began


def starving(mesh: Mesh, plan: Plan) -> tuple[int, float]:
    """(how often one that lives was held for down, node seconds): some starve all the time, one after the other stops.

    One that several hold for down at a time counts once, until nobody does.
    """
    rng = random.Random(f"{plan.seed} starving")  # noqa: S311 - a reproducible world
    began, ends = mesh.timeline.time_s, mesh.timeline.time_s + plan.seconds
    starved = sorted(rng.sample(range(mesh.size), round(mesh.size * plan.starved)))
    held: set[int] = set()
    count = 0

    def starve() -> None:
        for node in starved:
            mesh.starve(node, min(rng.expovariate(1.0 / STARVED_LAG_S), STARVED_LIMIT_S))

    def pause() -> None:
        mesh.pause(rng.randrange(mesh.size), plan.pause_s)

    def look() -> None:
        nonlocal count
        now = {
            node for node in range(mesh.size) if any(mesh.holds_down(o, node) for o in range(mesh.size) if o != node)
        }
        count += len(now - held)
        held.clear()
        held.update(now)

    if starved:
        _repeat(mesh, STARVED_S, ends, starve, STARVED_S)
    if plan.pause_s:
        _repeat(mesh, PAUSES_S, ends, pause, 1.0)
    _repeat(mesh, LOOK_S, ends, look, LOOK_S)
    mesh.timeline.run_until(ends)
    return count, mesh.size * (mesh.timeline.time_s - began)


def _repeat(mesh: Mesh, every_s: float, until_s: float, act: Callable[[], None], first_s: float) -> None:
    def again() -> None:
        if mesh.timeline.time_s < until_s:
            act()
            mesh.timeline.after(every_s, again)

    mesh.timeline.after(first_s, again)


def _each(mesh: Mesh, at_s: float, paths: list[tuple[int, int]], act: Callable[[int, int], None]) -> None:
    def do() -> None:
        for one, other in paths:
            act(one, other)

    mesh.timeline.at(at_s, do)


def _ignore(_node: int) -> None:
    pass


# -- what is shown -----------------------------------------------------------------------------------------------------


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest of sorted values that `part` of them do not exceed; not a number where there are none."""
    return values[max(math.ceil(part * len(values)) - 1, 0)] if values else math.nan


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. note: of how many it is made."""

    what: str
    unit: str
    ours: float
    memberlist: float
    note: str = ""


def rows(pair: Pair) -> Iterator[Row]:
    def row(what: str, unit: str, read: Callable[[Figures], float], note: str = "") -> Row:
        return Row(what, unit, read(pair.ours), read(pair.memberlist), note)

    ours = pair.ours
    yield row("all know a change, p50", "ms", lambda f: quantile(f.known_s, 0.5) * 1e3, f"{len(ours.known_s)} changes")
    yield row("all know a change, p99", "ms", lambda f: quantile(f.known_s, 0.99) * 1e3)
    yield row("sent by each machine, idle", "B/s", lambda f: f.quiet_bytes)
    yield row("sent by each machine, GPU readings change", "B/s", lambda f: f.busy_bytes)
    yield row(
        "all know of a killed agent, p50", "s", lambda f: quantile(f.killed_s, 0.5), f"{len(ours.killed_s)} agents"
    )
    yield row("all know of a killed agent, worst", "s", lambda f: quantile(f.killed_s, 1.0))
    yield row("all know of a lost machine, p50", "s", lambda f: quantile(f.lost_s, 0.5), f"{len(ours.lost_s)} machines")
    yield row("all know of a lost machine, worst", "s", lambda f: quantile(f.lost_s, 1.0))
    counts = f"{ours.false_downs} and {pair.memberlist.false_downs} in {ours.node_seconds:,.0f}"
    yield row("false DOWN per 10^6 node seconds", "", lambda f: f.false_downs / f.node_seconds * 1e6, counts)
