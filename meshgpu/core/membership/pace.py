"""How fast a member may speak: one that says too much is heard more slowly, and nothing that it says is lost.

Whoever reads from it waits, gRPC's flow control holds it back, and frames pile up at its side, which ends the Link when
there are too many. Others are heard meanwhile.
"""

from dataclasses import dataclass
from typing import Final

from meshgpu.model.clock import Now
from meshgpu.model.ids import NodeId

FRAMES_PER_S: Final = 1_000.0
"""Twice what a machine says that has 100 short jobs a second placed; to read them takes a third of one core."""

BYTES_PER_S: Final = 2.0 * 2**20
"""If they are signed entries, to check them takes two fifths of one core."""

BURST_S: Final = 8.0
"""How much may come at once, in seconds of the above: a log of 16 MiB when two meet, a sweep that begins."""


@dataclass(slots=True)
class _Credit:
    """What a member may still say at once, at `at_s`; below zero it is heard later."""

    frames: float
    size: float
    at_s: float


class Paces:
    """Token buckets, one for each member, which a new Link does not refill."""

    def __init__(self) -> None:
        self._credits: dict[NodeId, _Credit] = {}

    def heard(self, now: Now, peer: NodeId, size: int) -> float:
        """A frame of `size` bytes came. Returns for how many seconds not to read on; nearly always 0."""
        credit = self._credits.get(peer)
        if credit is None:
            credit = self._credits[peer] = _Credit(FRAMES_PER_S * BURST_S, BYTES_PER_S * BURST_S, now.boot_s)
        passed_s = now.boot_s - credit.at_s
        credit.frames = min(credit.frames + passed_s * FRAMES_PER_S, FRAMES_PER_S * BURST_S) - 1.0
        credit.size = min(credit.size + passed_s * BYTES_PER_S, BYTES_PER_S * BURST_S) - size
        credit.at_s = now.boot_s
        return max(-credit.frames / FRAMES_PER_S, -credit.size / BYTES_PER_S, 0.0)
