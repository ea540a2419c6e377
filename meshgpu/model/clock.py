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


WALL_CLOCK_SLACK_S: Final = 120.0
"""How far two machines' wall clocks may differ before a signed record counts as stale or from the future."""
