"""The moment at which something happens, on the two clocks that the mesh uses."""

from dataclasses import dataclass
from typing import Final

from meshgpu.model.ids import NodeId


@dataclass(frozen=True, slots=True)
class Now:
    """One instant.

    `boot_s` is CLOCK_BOOTTIME in seconds: holds, leases and timers; it never crosses the wire and means nothing
    under another `boot_id`. `wall_s` is Unix time in seconds: expiries of signed records and what people read.
    """

    boot_s: float
    wall_s: float
    boot_id: str


@dataclass(frozen=True, slots=True)
class ClockGap:
    """That a member's wall clock and this machine's differ too much. ahead_s: by how much the member's is ahead."""

    member: NodeId
    ahead_s: float


_UNITS: Final = (("d", 86_400), ("h", 3600), ("min", 60))


def span(seconds: float) -> str:
    """As people say it, exactly: `90 min` is `1 h 30 min`, `7200` seconds are `2 h`; below a second `0.5 s`."""
    parts, left = [], seconds
    for name, unit_s in _UNITS:
        number, left = divmod(left, unit_s)
        if number:
            parts.append(f"{number:.0f} {name}")
    return " ".join([*parts, *([f"{left:g} s"] if left or not parts else [])])


WALL_CLOCK_SLACK_S: Final = 120.0
"""How far two machines' wall clocks may differ before a signed record counts as stale or from the future."""
