"""A picture of who ran what when: one lane for each machine, one bar for each stay of a trial, as SVG."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

WIDTH: Final = 960
LEFT: Final = 150
RIGHT: Final = 24
TOP: Final = 64
LANE: Final = 58
BAR: Final = 30
AXIS: Final = 34
FONT: Final = "ui-sans-serif,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif"

COLOURS: Final = ("#4e79a7", "#f28e2b", "#59a14f", "#b6992d", "#76b7b2", "#9c6ade", "#d37295", "#7a8793")
"""Of trials, by their number; each bar also says which trial it is."""

INK: Final = "#1f2933"
FAINT: Final = "#7b8794"
PAPER: Final = "#ffffff"
BAND: Final = "#f4f6f8"
PLAY: Final = "#c4342d"


@dataclass(frozen=True, slots=True)
class Stay:
    """A trial on a machine from begin_s to end_s. is_cut: it was sent away before it was done."""

    trial: int
    begin_s: float
    end_s: float
    is_cut: bool = False


@dataclass(slots=True)
class Lane:
    """A machine. note: what it has. life: (asked for, joined, gone) of one that was rented.

    played: when its owner used the GPU himself.
    """

    name: str
    note: str
    stays: list[Stay] = field(default_factory=list)
    life: tuple[float, float, float] | None = None
    played: list[tuple[float, float]] = field(default_factory=list)


def draw(title: str, lanes: Sequence[Lane]) -> str:
    """The picture; times are seconds since the sweep began."""
    end_s = max(time_s for lane in lanes for time_s in _times(lane))
    scale = (WIDTH - LEFT - RIGHT) / max(end_s, 1.0)
    height = TOP + LANE * len(lanes) + AXIS
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    text = f'font-family="{FONT}" font-size="13" fill="{INK}"'
    stripes = f'<rect width="6" height="6" fill="#fbe4e2"/><rect width="1.5" height="6" fill="{PLAY}" opacity="0.6"/>'
    turned = 'width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {text} role="img" aria-label="{escape(title)}">',
        f'<defs><pattern id="play" {turned}>{stripes}</pattern></defs>',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="{PAPER}" stroke="#d9dee4"/>',
        f'<text x="20" y="34" font-size="16" font-weight="600">{escape(title)}</text>',
    ]
    for number, lane in enumerate(lanes):
        parts += _lane(lane, TOP + LANE * number, scale, is_odd=number % 2 == 1)
    parts += _axis(end_s, scale, TOP + LANE * len(lanes))
    return "\n".join([*parts, "</svg>\n"])


def _times(lane: Lane) -> Iterable[float]:
    yield from (stay.end_s for stay in lane.stays)
    yield from lane.life or ()
    yield from (end_s for _, end_s in lane.played)


def _lane(lane: Lane, y: int, scale: float, *, is_odd: bool) -> list[str]:
    middle = y + LANE / 2
    parts = [] if is_odd else [f'<rect x="1" y="{y}" width="{WIDTH - 2}" height="{LANE}" fill="{BAND}"/>']
    parts += [
        f'<text x="20" y="{middle - 3:.1f}" font-weight="600">{escape(lane.name)}</text>',
        f'<text x="20" y="{middle + 14:.1f}" font-size="11" fill="{FAINT}">{escape(lane.note)}</text>',
    ]
    if lane.life is not None:
        asked, joined, gone = (LEFT + time_s * scale for time_s in lane.life)
        parts += [
            f'<path d="M{asked:.1f} {middle - 19}v38M{gone:.1f} {middle - 19}v38" stroke="{INK}" stroke-width="1.5"/>',
            f'<path d="M{asked:.1f} {middle}H{joined:.1f}" stroke="{INK}" stroke-width="1.5" stroke-dasharray="2 3"/>',
            f'<path d="M{joined:.1f} {middle}H{gone:.1f}" stroke="{INK}" stroke-width="1.5"/>',
            _remark(asked - 6, middle - 8, "rented"),
            _remark(gone - 6, middle - 8, "given back"),
        ]
    for begin_s, end_s in lane.played:
        x, width = LEFT + begin_s * scale, (end_s - begin_s) * scale
        parts += [
            f'<rect x="{x:.1f}" y="{middle - BAR / 2}" width="{width:.1f}" height="{BAR}" rx="3" fill="url(#play)"/>',
            f'<rect x="{x + 8:.1f}" y="{middle - 9}" width="104" height="18" rx="3" fill="{PAPER}"/>',
            f'<text x="{x + 14:.1f}" y="{middle + 4.5:.1f}" font-size="12" fill="{PLAY}">the owner plays</text>',
        ]
    for stay in lane.stays:
        x, width = LEFT + stay.begin_s * scale, max((stay.end_s - stay.begin_s) * scale, 2.0)
        colour = COLOURS[(stay.trial - 1) % len(COLOURS)]
        look = f'fill="{colour}"' if not stay.is_cut else f'fill="{PAPER}" stroke="{colour}" stroke-dasharray="4 3"'
        parts.append(
            f'<rect x="{x + 0.75:.1f}" y="{middle - BAR / 2}" width="{width - 1.5:.1f}" height="{BAR}" rx="3" {look} '
            f'stroke-width="1.5"><title>trial {stay.trial}, {stay.begin_s:.1f} s to {stay.end_s:.1f} s</title></rect>'
        )
        ink = INK if stay.is_cut else PAPER
        said = f"#{stay.trial}" + (" moves" if stay.is_cut and width > 70 else "")
        if width > 22:
            parts.append(
                f'<text x="{x + width / 2:.1f}" y="{middle + 4.5:.1f}" fill="{ink}" text-anchor="middle">{said}</text>'
            )
    return parts


def _remark(right: float, y: float, said: str) -> str:
    return f'<text x="{right:.1f}" y="{y:.1f}" font-size="11" fill="{FAINT}" text-anchor="end">{said}</text>'


def _axis(end_s: float, scale: float, y: int) -> list[str]:
    step = next(step for step in (5, 10, 20, 30, 60, 120, 300, 600, 3600) if end_s / step <= 12)
    parts = []
    for second in range(0, int(end_s) + 1, step):
        x = LEFT + second * scale
        parts += [
            f'<path d="M{x:.1f} {y}v5" stroke="{FAINT}"/>',
            f'<text x="{x:.1f}" y="{y + 19}" font-size="11" fill="{FAINT}" text-anchor="middle">{second} s</text>',
        ]
    return parts
