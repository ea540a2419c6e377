"""One launch of this node, from the journal until its instance is gone: what is due for it, and what it comes to."""

import random
from dataclasses import dataclass, replace
from typing import Final

from meshgpu.core.effects import Effect, Enrol, Launch, Persist, Terminate
from meshgpu.core.statemachine import earliest
from meshgpu.model.clock import Now
from meshgpu.model.cloud import INSTANCE_PORT, Instance, InstanceState, LaunchId
from meshgpu.model.ids import Address
from meshgpu.model.records import LaunchRecord, LaunchState

REPEAT_FOR_S: Final = 300.0
"""How long a call is repeated: far less than EC2 remembers a token, and while its bootstrap certificate serves."""

SEEK_S: Final = 90.0
"""After which a survey shows what a call has made: descriptions lag behind calls by seconds."""

JOIN_WITHIN_S: Final = 840.0
"""From the request to the Welcome: the bootstrap certificate holds for 900 s, a handshake and a log take seconds."""

END_EARLY_S: Final = 60.0
"""Before the lease is over: the provider counts until the instance is down."""

ADDRESS_S: Final = 5.0
ENDING_S: Final = 15.0
SURVEY_S: Final = 60.0
"""How often the provider is asked while an instance has no address yet; while it ends; while it lives."""

FIRST_PAUSE_S: Final = 2.0
PAUSE_LIMIT_S: Final = 60.0
"""Between two tries of one thing; doubled each time."""

ENROL_PAUSE_S: Final = 5.0
"""Between two dials of an instance that boots."""

MISSED: Final = 2
"""Surveys in a row that do not name an instance before it counts as gone."""


def member_name(launch: LaunchId) -> str:
    """What the instance of a launch is called in the mesh."""
    return f"cloud-{launch[:8]}"


@dataclass(slots=True)
class Rental:
    """The record, and what only memory holds.

    is_busy: an effect of it is under way. due: `boot_s` of its next try. called_at: when a call of it last ended or
    may have. useful_at: when a job last ran on it or was meant for it. missed: surveys that did not name it.
    trouble: why it was last not reached. has_worked: a job ran on it.
    """

    record: LaunchRecord
    due: float
    called_at: float
    useful_at: float
    pause_s: float = FIRST_PAUSE_S
    is_busy: bool = False
    address: str = ""
    missed: int = 0
    trouble: str = ""
    has_worked: bool = False

    @property
    def launch(self) -> LaunchId:
        return self.record.request.launch

    @property
    def state(self) -> LaunchState:
        return self.record.state

    @property
    def reach(self) -> Address:
        return Address(f"{self.address}:{INSTANCE_PORT}")

    def become(self, state: LaunchState, **changes: object) -> Persist:
        """Move on; the next thing to do is due at once."""
        self.record = replace(self.record, state=state, **changes)  # type: ignore[arg-type]  # LaunchRecord's fields
        self.pause_s, self.due = FIRST_PAUSE_S, 0.0
        return Persist("launch", self.launch, self.record)

    def end(self, reason: str) -> list[Effect]:
        """Give the instance back."""
        return [] if self.state is LaunchState.ENDING else [self.become(LaunchState.ENDING, reason=reason)]

    def retry(self, now: Now, rng: random.Random, pause_s: float | None = None) -> None:
        """The last try failed: the next one comes after a pause, longer each time unless it is given."""
        self.is_busy = False
        self.due = now.boot_s + (pause_s or self.pause_s) * rng.uniform(0.8, 1.2)
        self.pause_s = min(self.pause_s * 2, PAUSE_LIMIT_S)

    # -- what is due --------------------------------------------------------------------------------------------------

    def step(self, now: Now, idle_s: float, *, is_wanted: bool) -> list[Effect]:
        """is_wanted: the job still waits for it, and no other instance is for that job."""
        effects: list[Effect] = []
        reason = self._why_end(now, idle_s)
        if reason:
            effects += self.end(reason)
        if self.is_busy or now.boot_s < self.due:
            return effects
        order: Effect | None = None
        match self.state:
            case LaunchState.ASKED if is_wanted and self._may_repeat(now):
                order = Launch(self.record.request)
            case LaunchState.RENTED | LaunchState.ENROLLED if self.address:
                order = Enrol(self.launch, self.reach, self.record.bootstrap)
            case LaunchState.ENDING:
                order = Terminate(self.record.instance)
        if order is None:
            return effects
        self.is_busy = True
        return [*effects, order]

    def deadline(self, now: Now, idle_s: float, *, is_wanted: bool) -> float | None:
        """When `step` has something to do without being told anything."""
        to_boot = now.boot_s - now.wall_s
        is_due = (
            (self.state is LaunchState.ASKED and is_wanted and self._may_repeat(now))
            or (self.state in (LaunchState.RENTED, LaunchState.ENROLLED) and bool(self.address))
            or self.state is LaunchState.ENDING
        )
        ends: list[float] = []
        if self.state in (LaunchState.RENTED, LaunchState.ENROLLED, LaunchState.JOINED):
            ends = [self.useful_at + idle_s, to_boot + self.record.request.lease_ends_wall_s - END_EARLY_S]
        if self.state in (LaunchState.RENTED, LaunchState.ENROLLED):
            ends.append(to_boot + self.record.asked_wall_s + JOIN_WITHIN_S)
        return earliest(self.due if is_due and not self.is_busy else None, *ends)

    def survey_s(self, now: Now, *, is_wanted: bool) -> float:
        """How old the last survey may get."""
        match self.state:
            case LaunchState.ASKED if not self.is_busy and not (is_wanted and self._may_repeat(now)):
                return ENDING_S
            case LaunchState.RENTED | LaunchState.ENROLLED if not self.address:
                return ADDRESS_S
            case LaunchState.ENDING:
                return ENDING_S
            case _:
                return SURVEY_S

    def _may_repeat(self, now: Now) -> bool:
        return now.wall_s < self.record.asked_wall_s + REPEAT_FOR_S

    def _why_end(self, now: Now, idle_s: float) -> str:
        if self.state not in (LaunchState.RENTED, LaunchState.ENROLLED, LaunchState.JOINED):
            return ""
        if now.wall_s >= self.record.request.lease_ends_wall_s - END_EARLY_S:
            return "its lease ends"
        if self.state is not LaunchState.JOINED and now.wall_s >= self.record.asked_wall_s + JOIN_WITHIN_S:
            return "it did not join in time"
        if now.boot_s >= self.useful_at + idle_s:
            return "nothing runs on it or waits for it"
        return ""

    # -- what the provider shows --------------------------------------------------------------------------------------

    def is_gone(self, now: Now, seen: Instance | None, begun_at: float, *, is_wanted: bool) -> bool:
        """Take in a survey that began at `begun_at`; whether it shows that the instance is gone, or never was."""
        if seen is not None:
            self.missed, self.address = 0, seen.address
            return seen.state is InstanceState.TERMINATED
        if self.is_busy or begun_at < self.called_at + SEEK_S:
            return False
        if self.state is LaunchState.ASKED:
            return not (is_wanted and self._may_repeat(now))
        self.missed += 1
        return self.missed >= MISSED
