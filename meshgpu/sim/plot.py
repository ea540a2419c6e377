"""The figures of a study as one SVG: four panels over the number of machines, ours and memberlist's in each."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from meshgpu.sim.study import Figures, Pair, quantile

WIDTH: Final = 960
PANEL_WIDTH: Final = 396
PANEL_HEIGHT: Final = 220
LEFT: Final = 62
GAP_X: Final = 84
TOP: Final = 160
GAP_Y: Final = 112
STYLE: Final = """
    .paper { fill: #ffffff; }
    text { fill: #1c2430; }
    .title { font-size: 19px; font-weight: 600; }
    .panel { font-size: 14px; font-weight: 600; }
    .soft { fill: #5b6675; font-size: 11.5px; }
    .grid { stroke: #e4e8ee; stroke-width: 1; }
    .axis { stroke: #9aa4b2; stroke-width: 1; }
    .ours { stroke: #0f766e; fill: none; stroke-width: 2.4; }
    .oursmark { fill: #0f766e; }
    .ourstext { fill: #0f766e; font-size: 11.5px; font-weight: 600; }
    .theirs { stroke: #b45309; fill: none; stroke-width: 2.4; }
    .theirsmark { fill: #b45309; }
    .theirstext { fill: #b45309; font-size: 11.5px; font-weight: 600; }
    .second { stroke-dasharray: 5 4; stroke-width: 1.8; opacity: 0.85; }
    @media (prefers-color-scheme: dark) {
      .paper { fill: #14181f; }
      text { fill: #e8ecf2; }
      .soft { fill: #a9b4c2; }
      .grid { stroke: #28303b; }
      .axis { stroke: #66717f; }
      .ours { stroke: #2dd4bf; }
      .oursmark { fill: #2dd4bf; }
      .ourstext { fill: #2dd4bf; }
      .theirs { stroke: #f5a524; }
      .theirsmark { fill: #f5a524; }
      .theirstext { fill: #f5a524; }
    }
"""


@dataclass(frozen=True, slots=True)
class Panel:
    """first, second: what the solid and the dashed line show, and how they are called."""

    title: str
    first: Callable[[Figures], float]
    second: Callable[[Figures], float]
    solid: str
    dashed: str


PANELS: Final = (
    Panel(
        "All know a change, ms",
        lambda f: quantile(f.known_s, 0.5) * 1e3,
        lambda f: quantile(f.known_s, 0.99) * 1e3,
        "half of them",
        "99 of 100",
    ),
    Panel(
        "Sent by each machine, bytes a second",
        lambda f: f.quiet_bytes,
        lambda f: f.busy_bytes,
        "idle",
        "GPU readings change",
    ),
    Panel(
        "All know that one is gone, s (median)",
        lambda f: quantile(f.killed_s, 0.5),
        lambda f: quantile(f.lost_s, 0.5),
        "agent killed",
        "machine lost",
    ),
)


def draw(pairs: Sequence[Pair], caption: str) -> str:
    """An SVG document. Figures that are infinite are left out of their line."""
    height = TOP + 2 * PANEL_HEIGHT + GAP_Y + 66
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"',
        '     role="img" aria-labelledby="title desc" font-family="system-ui, sans-serif" font-size="12">',
        '  <title id="title">meshgpu and memberlist over one simulated network</title>',
        f'  <desc id="desc">{escape(_described(pairs))}</desc>',
        f"  <style>{STYLE}  </style>",
        f'  <rect class="paper" width="{WIDTH}" height="{height}"/>',
        _text(LEFT, 38, "meshgpu and memberlist over one simulated network", "title"),
        _text(LEFT, 60, caption, "soft"),
        f'  <circle class="oursmark" cx="{LEFT + 5}" cy="80" r="5"/>',
        _text(LEFT + 16, 84, "meshgpu, the code that runs", "ourstext"),
        f'  <circle class="theirsmark" cx="{LEFT + 235}" cy="80" r="5"/>',
        _text(LEFT + 246, 84, "memberlist, a model of its defaults", "theirstext"),
    ]
    for number, panel in enumerate(PANELS):
        parts += _lines(panel, pairs, *_place(number))
    parts += _bars(pairs, *_place(len(PANELS)))
    return "\n".join([*parts, "</svg>", ""])


def _place(number: int) -> tuple[float, float]:
    return LEFT + number % 2 * (PANEL_WIDTH + GAP_X), TOP + number // 2 * (PANEL_HEIGHT + GAP_Y)


def _described(pairs: Sequence[Pair]) -> str:
    sizes = ", ".join(str(pair.nodes) for pair in pairs)
    return (
        f"Four panels over {sizes} machines: time until all know a change, bytes sent, time until all know that one is "
        "gone, and how often a living machine was held for down; meshgpu beside memberlist."
    )


# -- panels -----------------------------------------------------------------------------------------------------------


def _lines(panel: Panel, pairs: Sequence[Pair], left: float, top: float) -> Iterator[str]:
    """Both meshes over powers of ten."""
    sides = [(kind, [pair.ours for pair in pairs]) for kind in ("ours",)]
    sides.append(("theirs", [pair.memberlist for pair in pairs]))
    values = [read(f) for _, side in sides for f in side for read in (panel.first, panel.second)]
    shown = [value for value in values if 0 < value < math.inf] or [1.0]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    high = max(high, low + 1)

    def y(value: float) -> float:
        return top + PANEL_HEIGHT * (1 - (math.log10(value) - low) / (high - low))

    yield _text(left, top - 30, panel.title, "panel")
    yield _text(left, top - 13, f"solid: {panel.solid} · dashed: {panel.dashed}", "soft")
    for power in range(low, high + 1):
        yield _rule(left, y(10.0**power), _number(10.0**power))
    yield from _sizes(pairs, left, top)
    for kind, side in sides:
        for read, extra in ((panel.second, " second"), (panel.first, "")):
            points = [(_x(pairs, left, n), y(v)) for n, f in enumerate(side) if 0 < (v := read(f)) < math.inf]
            if len(points) > 1:
                path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
                yield f'  <polyline class="{kind}{extra}" points="{path}"/>'
            radius = 2.6 if extra else 3.6
            yield from (f'  <circle class="{kind}mark" cx="{px:.1f}" cy="{py:.1f}" r="{radius}"/>' for px, py in points)


def _bars(pairs: Sequence[Pair], left: float, top: float) -> Iterator[str]:
    """False alarms: counts, so zero has its place."""
    rates = [(_rate(pair.ours), _rate(pair.memberlist)) for pair in pairs]
    limit = _round_up(max((rate for pair in rates for rate in pair), default=0.0))
    yield _text(left, top - 30, "False DOWN per 10⁶ node seconds", "panel")
    yield _text(left, top - 13, "living machines that somebody held for down", "soft")
    for part in range(5):
        yield _rule(left, top + PANEL_HEIGHT * (1 - part / 4), _number(limit * part / 4))
    yield from _sizes(pairs, left, top)
    for number, both in enumerate(rates):
        for kind, rate, shift in zip(("ours", "theirs"), both, (-25.0, 1.0), strict=True):
            x, height = _x(pairs, left, number) + shift, PANEL_HEIGHT * rate / limit
            y = top + PANEL_HEIGHT - height
            if rate:
                yield f'  <rect class="{kind}mark" x="{x:.1f}" y="{y:.1f}" width="24" height="{height:.1f}" rx="2"/>'
            yield _text(x + 12, y - 5, _number(round(rate)), f"{kind}text", "middle")


def _rate(figures: Figures) -> float:
    return figures.false_downs / figures.node_seconds * 1e6


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, … above `value`, with room for a number over the highest bar."""
    if value <= 0:
        return 4.0
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 4, 8, 10, 20) if power * step >= value * 1.12)


def _sizes(pairs: Sequence[Pair], left: float, top: float) -> Iterator[str]:
    base = top + PANEL_HEIGHT
    yield f'  <line class="axis" x1="{left}" y1="{base}" x2="{left + PANEL_WIDTH}" y2="{base}"/>'
    for number, pair in enumerate(pairs):
        yield _text(_x(pairs, left, number), base + 18, str(pair.nodes), "soft", "middle")
    yield _text(left + PANEL_WIDTH / 2, base + 36, "machines", "soft", "middle")


def _x(pairs: Sequence[Pair], left: float, number: int) -> float:
    return left + PANEL_WIDTH * (number + 0.5) / len(pairs)


def _rule(left: float, y: float, label: str) -> str:
    line = f'  <line class="grid" x1="{left}" y1="{y:.1f}" x2="{left + PANEL_WIDTH}" y2="{y:.1f}"/>'
    return f"{line}\n{_text(left - 8, y + 4, label, 'soft', 'end')}"


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'  <text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:g}"
