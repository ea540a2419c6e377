"""Whose turn it is when jobs wait: priority, then fair shares between users, then age.

Every steward orders its own jobs, and knows of the others' only how many of whom wait (`Line`). Who is behind jobs of
other stewards waits a moment when room appears: that is courtesy, and nothing depends on it.
"""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from meshgpu.core.jobs.held_job import HeldJob
from meshgpu.model.gossip import Allocation, Capacity, Line
from meshgpu.model.ids import NodeId, UserName
from meshgpu.model.job import Priority
from meshgpu.model.resources import GpuRequest

ADVANCE_S: Final = 600.0
"""What a GPU that is in use counts beside what its user had before: so that many short jobs of one user do not all go
first."""

PART: Final = 0.5
NOTHING: Final = 0.1
"""Of a GPU: what a job counts that has a part of one, or none."""

COURTESY_S: Final = 0.1
"""How long a job waits, for each other steward that holds jobs before it: longer than news and an offer take."""

COURTESY_LIMIT: Final = 8
"""Stewards that are let pass."""

CLAIM_AFTER_S: Final = 600.0
"""How long a job waits at the head of the queue before a machine is kept free for it: less would idle GPUs often."""

Key = tuple[int, float, float]
"""Orders what waits; the smallest goes first."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """What of the mesh decides whose turn it is.

    loads: {user: seconds of whole GPUs that he had lately}, with what he has now. lines: of the stewards that are
    there; for one of them, of the others.
    """

    loads: Mapping[UserName, float]
    lines: Mapping[NodeId, tuple[Line, ...]]

    def key(self, user: UserName, priority: Priority, since_wall_s: float) -> Key:
        return (-priority.rank, self.loads.get(user, 0.0), since_wall_s)

    def key_of(self, job: HeldJob) -> Key:
        return self.key(job.spec.user, job.spec.priority, job.register.submitted_wall_s)

    def heads(self) -> list[Key]:
        """The first of what waits at each steward, in order."""
        return sorted(min(map(self._first, lines)) for lines in self.lines.values() if lines)

    def ahead(self, user: UserName, priority: Priority, since_wall_s: float) -> dict[UserName, int]:
        """{user: how many of his jobs in `lines` go before such a job, at most}; it is not counted itself."""
        own = self.key(user, priority, since_wall_s)
        found: dict[UserName, int] = {}
        for line in (line for lines in self.lines.values() for line in lines if self._first(line) < own):
            may_be_in_it = (line.user, line.priority) == (user, priority) and line.last_wall_s >= since_wall_s
            found[line.user] = found.get(line.user, 0) + line.jobs - may_be_in_it
        return {user: jobs for user, jobs in sorted(found.items()) if jobs}

    def _first(self, line: Line) -> Key:
        return self.key(line.user, line.priority, line.first_wall_s)


def loads(capacities: Iterable[Capacity]) -> dict[UserName, float]:
    """{user: seconds of whole GPUs that he had lately}, and ADVANCE_S for each that he has now."""
    found: dict[UserName, float] = {}
    for capacity in capacities:
        for used in capacity.used:
            found[used.user] = found.get(used.user, 0.0) + used.gpu_s
        for allocation in capacity.allocations:
            if not allocation.is_kept:
                found[allocation.user] = found.get(allocation.user, 0.0) + had(allocation) * ADVANCE_S
    return found


def had(allocation: Allocation) -> float:
    """How many GPUs a job has, as the shares of users are counted."""
    return sum(1.0 if share.is_whole else PART for share in allocation.gpus) or NOTHING


def wanted(request: GpuRequest) -> float:
    """How many it will have."""
    return request.count * (PART if request.shared else 1.0) or NOTHING


class Order:
    """Jobs that wait at one steward, in their turn. Whoever is given something comes after those who were not yet."""

    def __init__(self, waiting: Iterable[HeldJob], crowd: Crowd) -> None:
        self._loads = dict(crowd.loads)
        self._users: dict[UserName, list[tuple[int, float, str, HeldJob]]] = {}
        for job in waiting:
            spec, since = job.spec, job.register.submitted_wall_s
            self._users.setdefault(spec.user, []).append((-spec.priority.rank, since, spec.job, job))
        for jobs in self._users.values():  # those of one moment, as trials are, stay as they came
            jobs.sort(key=lambda entry: entry[:2])
            jobs.reverse()
        self._heads: list[tuple[int, float, float, str, UserName]] = []
        for user in self._users:
            self._line_up(user)

    def next(self) -> HeldJob | None:
        """The job whose turn it is; None when there is none left."""
        if not self._heads:
            return None
        user = heapq.heappop(self._heads)[-1]
        job = self._users[user].pop()[-1]
        self._line_up(user)
        return job

    def given(self, job: HeldJob) -> None:
        """It is about to have what it wants: the next turn may be another user's."""
        user = job.spec.user
        self._loads[user] = self._loads.get(user, 0.0) + wanted(job.spec.resources.gpus) * ADVANCE_S
        self._heads = [head for head in self._heads if head[-1] != user]
        heapq.heapify(self._heads)
        self._line_up(user)

    def _line_up(self, user: UserName) -> None:
        if jobs := self._users[user]:
            rank, since, name, _ = jobs[-1]
            heapq.heappush(self._heads, (rank, self._loads.get(user, 0.0), since, name, user))


def lines(waiting: Iterable[HeldJob]) -> tuple[Line, ...]:
    """What a steward tells of its jobs that wait."""
    found: dict[tuple[UserName, Priority], list[float]] = {}
    for job in waiting:
        found.setdefault((job.spec.user, job.spec.priority), []).append(job.register.submitted_wall_s)
    return tuple(
        Line(user, priority, len(times), min(times), max(times)) for (user, priority), times in sorted(found.items())
    )
