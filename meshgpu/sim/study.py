"""What a mesh does to news, to the network and to those who are slow, in figures; memberlist beside it.

Three worlds for each size: one in which machines say something new and paths are cut, one in which agents are killed
and machines are lost, and one in which machines starve and stop. Each is run twice: with our nodes, and with
memberlist's. Weather, changes, cuts and victims are the same in both. No world knows of another, so they may be run at
the same time.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import permutations, product
from typing import Final

from meshgpu.sim.meshes import MemberlistMesh, Mesh, OurMesh, Sizes
from meshgpu.sim.weather import Weather

LARGE: Final = 64
"""Machines. What happens in larger meshes grows with the square, so less of it is played, unless one says how long."""
SECONDS: Final = 300.0
"""Of news, and of starving, where the mesh is not large."""
QUIET_S: Final = 60.0
"""For which nothing happens while traffic is weighed: two of memberlist's full exchanges."""
NEWS_S: Final = 2.0
"""A random machine says something new this often."""
READINGS_S: Final = 6.0
"""How often readings go out that change all the time: gossiped after 5 s at the earliest, read every 2 s."""
LATE_S: Final = 120.0
"""After the last news, and after each loss, at most: what not all know by then counts as never."""
REST_S: Final = 30.0
"""Between two losses, all being well."""
LOSSES: Final = 8
LOSSES_OF_ALL: Final = 512
"""Agents killed, and machines lost, in each world; fewer in large meshes."""
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
    """What is studied. seconds: of news, and of starving; None: as long as suits the size.

    cuts: when the mesh is halved, and until when, in seconds of the news. starved: part of the machines whose steps
    come late. pause_s: for how long machines stop; 0: never.
    """

    seconds: float | None = None
    seed: int = 1
    weather: Weather = field(default_factory=Weather)
    cuts: tuple[tuple[float, float], ...] = ()
    starved: float = 0.2
    pause_s: float = 20.0

    def lasts_s(self, nodes: int) -> float:
        """Seconds of news, and of starving, in a mesh of that size."""
        return _shortened(SECONDS, nodes) if self.seconds is None else self.seconds


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of it, of one mesh. Seconds are sorted, infinite where it never was.

    known_s: until all know a change. killed_s, lost_s: until all others hold a killed agent, a lost machine for down.
    quiet_bytes, busy_bytes: sent by each machine each second, while nothing happens and while all readings change.
    false_downs: how often a machine that lives was held for down by somebody, in `node_seconds`.
    """

    known_s: tuple[float, ...] = ()
    killed_s: tuple[float, ...] = ()
    lost_s: tuple[float, ...] = ()
    quiet_bytes: float = 0.0
    busy_bytes: float = 0.0
    false_downs: int = 0
    node_seconds: float = 0.0

    def __add__(self, other: "Figures") -> "Figures":
        """With what another world showed, which is of something else."""
        return Figures(
            self.known_s + other.known_s,
            self.killed_s + other.killed_s,
            self.lost_s + other.lost_s,
            self.quiet_bytes + other.quiet_bytes,
            self.busy_bytes + other.busy_bytes,
            self.false_downs + other.false_downs,
            self.node_seconds + other.node_seconds,
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """Both meshes, of one size."""

    nodes: int
    ours: Figures
    memberlist: Figures


class Side(StrEnum):
    OURS = "meshgpu"
    MEMBERLIST = "memberlist"


class Life(StrEnum):
    """What is happening in a world."""

    NEWS = "news"
    LOSSES = "losses"
    STARVING = "starving"


@dataclass(frozen=True, slots=True)
class Part:
    """One world of a study."""

    plan: Plan
    nodes: int
    sizes: Sizes
    side: Side
    life: Life


Each = Callable[[Callable[[Part], Figures], Sequence[Part]], Iterable[Figures]]
"""`map`, or what does the same on several processors."""


def study(plan: Plan, nodes: Sequence[int], sizes: Sizes, each: Each = map) -> list[Pair]:
    """Run all worlds of all sizes. Equal plans give equal figures."""
    largest_first = sorted(set(nodes), reverse=True)  # they take longest: nobody shall wait for the last of them
    parts = [Part(plan, *part) for part in product(largest_first, (sizes,), Side, Life)]
    found: dict[tuple[int, Side], Figures] = {}
    for part, figures in zip(parts, each(play, parts), strict=True):
        found[part.nodes, part.side] = found.get((part.nodes, part.side), Figures()) + figures
    return [Pair(n, found[n, Side.OURS], found[n, Side.MEMBERLIST]) for n in reversed(largest_first)]


def play(part: Part) -> Figures:
    """Run one world, from a mesh in which all is well."""
    plan, nodes, sizes = part.plan, part.nodes, part.sizes
    seed = plan.seed + list(Life).index(part.life)
    mesh: Mesh
    if part.side is Side.OURS:
        mesh = OurMesh(seed, nodes, plan.weather, sizes)
    else:
        meta_bytes = min(OurMesh(plan.seed, 2, Weather(), None).said_bytes(sizes), META_LIMIT_BYTES)
        mesh = MemberlistMesh(seed, nodes, plan.weather, meta_bytes)
    match part.life:
        case Life.NEWS:
            quiet = traffic(mesh, QUIET_S)
            known = news(mesh, plan)
            busy = traffic(mesh, _shortened(QUIET_S, nodes), reads=True)
            return Figures(known_s=tuple(known), quiet_bytes=quiet, busy_bytes=busy)
        case Life.LOSSES:
            rng = random.Random(f"{plan.seed} losses")  # noqa: S311 - a reproducible world
            victims = [rng.randrange(nodes) for _ in range(max(min(LOSSES, LOSSES_OF_ALL // nodes), 2))]
            killed = sorted(loss(mesh, victim, mesh.kill) for victim in victims)
            lost = sorted(loss(mesh, victim, mesh.lose) for victim in victims)
            return Figures(killed_s=tuple(killed), lost_s=tuple(lost))
        case Life.STARVING:
            downs, node_seconds = starving(mesh, plan)
            return Figures(false_downs=downs, node_seconds=node_seconds)


def _shortened(seconds: float, nodes: int) -> float:
    """For large meshes."""
    return seconds * min(1.0, LARGE / nodes)


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
    ends = began + plan.lasts_s(mesh.size)
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
    _repeat(mesh, NEWS_S, ends, change, NEWS_S)
    for parted, whole in plan.cuts:
        half = set(rng.sample(range(mesh.size), mesh.size // 2))
        across = [(a, b) for a, b in permutations(range(mesh.size), 2) if (a in half) != (b in half)]
        _each(mesh, began + parted, across, mesh.cut)
        _each(mesh, began + whole, across, mesh.heal)
    timeline.run_until(ends)
    while lacking and timeline.time_s < ends + LATE_S:
        timeline.run_until(timeline.time_s + NEWS_S)
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
    began = mesh.timeline.time_s
    ends = began + plan.lasts_s(mesh.size)
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
