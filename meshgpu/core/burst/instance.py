"""When a rented machine ends itself. Its user data has set nets of its own below this one.

It leaves when nothing ran for a while, when nobody of the office was linked for a while, before its lease ends, and
when the provider takes it back. Leaving means: no new work, SIGTERM to what runs, and power off once all results are
told, or when the time for that is over.
"""

from dataclasses import dataclass
from typing import Final

from meshgpu.core.effects import Effect, PowerOff
from meshgpu.core.statemachine import earliest
from meshgpu.model.clock import Now
from meshgpu.model.enrolment import InstanceTerms

LEAVE_EARLY_S: Final = 150.0
"""Before the lease ends: the burst peer ends the instance 60 s before, and a stop takes 30 s and its outputs."""

OFF_EARLY_S: Final = 60.0
"""Before the lease ends: a shutdown takes some seconds, and the next net, the timer of the user data, is harsher."""

DRAIN_S: Final = 60.0
"""From SIGTERM until the power goes off where nobody can be told anything: 30 s, SIGKILL, outputs saved."""

NOTICE_MARGIN_S: Final = 5.0
"""Before the moment that a spot notice names."""

REPEAT_S: Final = 60.0
"""After which a machine that should be off is told so again."""


@dataclass(slots=True)
class _Leave:
    """Why it leaves, and at which `boot_s` the power goes off at the latest."""

    reason: str
    off_at: float


class InstanceLife:
    """The timers of one rented machine; made anew at each start of its agent."""

    def __init__(self, terms: InstanceTerms, now: Now) -> None:
        self._terms = terms
        self._idle_since: float | None = now.boot_s
        self._alone_since: float | None = now.boot_s
        self._lease_ends = now.boot_s + terms.lease_ends_wall_s - now.wall_s
        self._is_endangered = False
        self._leave: _Leave | None = None
        self._off_again: float | None = None

    @property
    def refusal(self) -> str:
        """Why no new work is taken; empty while it is."""
        if self._leave is not None:
            return f"is about to end: {self._leave.reason}"
        return "may be taken back by the provider at any moment" if self._is_endangered else ""

    @property
    def is_leaving(self) -> bool:
        """Whether what runs here is to be stopped."""
        return self._leave is not None

    def noticed(self, now: Now, ends_wall_s: float | None) -> None:
        """The provider takes the machine back, at a moment (Unix time) or, None, perhaps soon."""
        if ends_wall_s is None:
            self._is_endangered = True
        else:
            off_at = now.boot_s + max(ends_wall_s - now.wall_s - NOTICE_MARGIN_S, 0.0)
            self._begin("the provider takes it back", off_at)

    def step(self, now: Now, *, is_linked: bool, is_idle: bool) -> list[Effect]:
        """is_linked: a member is. is_idle: nothing runs, is promised, or has a result that was not told yet."""
        self._alone_since = None if is_linked else _since(self._alone_since, now)
        self._idle_since = _since(self._idle_since, now) if is_idle else None
        self._lease_ends = now.boot_s + self._terms.lease_ends_wall_s - now.wall_s
        if now.boot_s >= self._lease_ends - LEAVE_EARLY_S:
            self._begin("its lease ends", self._lease_ends - OFF_EARLY_S)
        if self._alone_since is not None and now.boot_s >= self._alone_since + self._terms.no_contact_s:
            self._begin("nobody of the office is in touch", now.boot_s + DRAIN_S)
        if self._idle_since is not None and now.boot_s >= self._idle_since + self._terms.idle_s:
            self._begin("nothing runs here", now.boot_s)
        if is_idle and self._is_endangered:
            self._begin("the provider may take it back", now.boot_s)
        if self._leave is None or not (is_idle or now.boot_s >= self._leave.off_at):
            return []
        if self._off_again is not None and now.boot_s < self._off_again:
            return []
        self._off_again = now.boot_s + REPEAT_S
        return [PowerOff(self._leave.reason)]

    def deadline(self) -> float | None:
        if self._off_again is not None:
            return self._off_again
        timers = [self._lease_ends - LEAVE_EARLY_S] if self._leave is None else [self._leave.off_at]
        if self._leave is None and self._alone_since is not None:
            timers.append(self._alone_since + self._terms.no_contact_s)
        if self._leave is None and self._idle_since is not None:
            timers.append(self._idle_since + self._terms.idle_s)
        return earliest(*timers)

    def _begin(self, reason: str, off_at: float) -> None:
        """Leave; of several reasons the first is told, and the earliest moment counts."""
        if self._leave is None:
            self._leave = _Leave(reason, off_at)
        else:
            self._leave.off_at = min(self._leave.off_at, off_at)


def _since(before: float | None, now: Now) -> float:
    """From when something holds that holds now."""
    return now.boot_s if before is None else before
