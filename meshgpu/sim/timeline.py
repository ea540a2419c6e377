"""Virtual time: what happens next, in an order that only the seed decides."""

import heapq
import random
from collections.abc import Callable

Happening = Callable[[], None]


class Timeline:
    """A heap of (time, sequence, happening). Equal times happen in the order in which they were planned."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - a reproducible world, not a secret
        self.time_s = 0.0
        self.happened = 0
        self._heap: list[tuple[float, int, Happening]] = []
        self._sequence = 0

    def at(self, time_s: float, happening: Happening) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (max(time_s, self.time_s), self._sequence, happening))

    def after(self, delay_s: float, happening: Happening) -> None:
        self.at(self.time_s + delay_s, happening)

    def run_until(self, time_s: float) -> None:
        """Let everything happen that is due up to `time_s`, which is the time afterwards."""
        heap = self._heap
        while heap and heap[0][0] <= time_s:
            self.time_s, _, happening = heapq.heappop(heap)
            self.happened += 1
            happening()
        self.time_s = time_s
