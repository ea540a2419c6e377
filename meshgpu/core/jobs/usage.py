"""Who used this machine lately: what fair shares are counted by."""

from typing import Final

from meshgpu.core.effects import Effect, Persist
from meshgpu.core.jobs.queue import had
from meshgpu.model.clock import Now
from meshgpu.model.gossip import Allocation, Used
from meshgpu.model.ids import UserName
from meshgpu.model.records import UsageRecord

HALF_LIFE_S: Final = 86_400.0
"""After which what a user had counts half: yesterday's sweep must not keep him waiting for a week."""

STEP_S: Final = 360.0
"""What is told is rounded to tenths of a GPU hour, so that a machine on which nothing happens says nothing."""


KEEP_S: Final = 60.0
"""How often the count is written down while something runs: what is lost with the agent is less than is rounded."""


class Usage:
    """Counts what is held as well: for the seconds between a hold and the start it is nobody else's either."""

    def __init__(self) -> None:
        self._keep_at = 0.0
        self._used: dict[UserName, float] = {}
        self._at: float | None = None
        self._running: tuple[Allocation, ...] = ()

    def restore(self, now: Now, record: UsageRecord) -> None:
        """Take up the count of an earlier agent; it fades while none runs."""
        faded = _fading(max(now.wall_s - record.wall_s, 0.0))
        self._used = {used.user: used.gpu_s * faded for used in record.used}

    def step(self, now: Now, running: tuple[Allocation, ...]) -> list[Effect]:
        """Count until now what ran since the last step."""
        past_s = now.boot_s - self._at if self._at is not None else 0.0
        self._at = now.boot_s
        faded = _fading(past_s)
        self._used = {user: gpu_s * faded for user, gpu_s in self._used.items() if gpu_s * faded >= 1.0}
        for allocation in self._running:
            self._used[allocation.user] = self._used.get(allocation.user, 0.0) + had(allocation) * past_s
        is_due = bool(self._running) and now.boot_s >= self._keep_at
        self._running = running
        if not is_due:
            return []
        self._keep_at = now.boot_s + KEEP_S
        return [Persist("usage", "usage", UsageRecord(now.wall_s, self._all()))]

    def told(self) -> tuple[Used, ...]:
        """By user, rounded to STEP_S; without those who used next to nothing."""
        rounded = (Used(used.user, round(used.gpu_s / STEP_S) * STEP_S) for used in self._all())
        return tuple(used for used in rounded if used.gpu_s)

    def _all(self) -> tuple[Used, ...]:
        return tuple(Used(user, gpu_s) for user, gpu_s in sorted(self._used.items()))


def _fading(seconds: float) -> float:
    return float(0.5 ** (seconds / HALF_LIFE_S))
