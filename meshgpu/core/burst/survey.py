"""What the provider said last, and when it is asked again."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from meshgpu.core.burst.rental import SURVEY_S
from meshgpu.model.clock import Now
from meshgpu.model.cloud import Instance, InstanceState, Rung

FRESH_S: Final = 5.0
"""How old a survey may be when something is rented."""

QUIET_S: Final = 1800.0
"""How often the provider is asked while nothing of the mesh lives there."""

DOUBT_S: Final = 300.0
"""After a call that brought nothing the provider is still asked each minute: an earlier try of it may show late."""

FAULT_PAUSE_S: Final = 5.0
FAULT_LIMIT_S: Final = 300.0
"""Between surveys that fail; doubled each time."""


@dataclass(slots=True)
class Survey:
    """rungs, instances: of the last survey that succeeded, `at`; None before the first.

    begun_at: of the one under way, or the last. is_current: no call has ended since it began; otherwise it is no
    ground for the next one. doubt_until: see DOUBT_S. not_before: after a failure.
    """

    rungs: tuple[Rung, ...] = ()
    instances: tuple[Instance, ...] = ()
    at: float | None = None
    begun_at: float = -math.inf
    ended_at: float = -math.inf
    is_under_way: bool = False
    is_current: bool = True
    doubt_until: float = -math.inf
    pause_s: float = FAULT_PAUSE_S
    not_before: float = -math.inf

    def begin(self, now: Now) -> None:
        self.is_under_way, self.begun_at, self.is_current = True, now.boot_s, True

    def fail(self, now: Now) -> None:
        self.is_under_way, self.ended_at = False, now.boot_s
        self.not_before = now.boot_s + self.pause_s
        self.pause_s = min(self.pause_s * 2, FAULT_LIMIT_S)

    def succeed(self, now: Now, rungs: tuple[Rung, ...], instances: tuple[Instance, ...]) -> None:
        self.rungs, self.instances = rungs, instances
        self.is_under_way, self.ended_at, self.at = False, now.boot_s, now.boot_s
        self.pause_s, self.not_before = FAULT_PAUSE_S, -math.inf

    def call_ended(self, now: Now) -> None:
        self.is_current, self.doubt_until = False, now.boot_s + DOUBT_S

    def is_fresh(self, now: Now) -> bool:
        """Whether something may be rented on it."""
        return self.at is not None and now.boot_s <= self.at + FRESH_S and self.is_current

    def due(self, ages_s: Iterable[float], *, is_wanted: bool) -> float:
        """`boot_s` of the next one. ages_s: how old this may get for each rental; is_wanted: somebody waits for it."""
        if is_wanted or self.not_before > self.ended_at:
            return self.not_before
        ages = [QUIET_S, *ages_s]
        is_alive = any(instance.state is not InstanceState.TERMINATED for instance in self.instances)
        if is_alive or self.ended_at < self.doubt_until:
            ages.append(SURVEY_S)
        return self.ended_at + min(ages)
