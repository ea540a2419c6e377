"""Which queued jobs have waited long enough for the office, and which of them something rented will serve anyhow."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from meshgpu.core.jobs.placement import Host, find_room
from meshgpu.model.clock import WALL_CLOCK_SLACK_S, Now
from meshgpu.model.gossip import Allocation, Demand, Need
from meshgpu.model.ids import JobId, UserName
from meshgpu.model.inventory import Inventory


class Waiting:
    """The needs of all stewards, and since when each was seen here."""

    def __init__(self) -> None:
        self.needs: list[Need] = []
        self._seen: dict[JobId, float] = {}

    def refresh(self, now: Now, demands: Iterable[Demand]) -> None:
        """Take in what the stewards say now: each need once, the oldest first. What is no longer said is forgotten."""
        needs: dict[JobId, Need] = {}
        for demand in demands:
            for need in demand.needs:
                needs.setdefault(need.job, need)
        self.needs = sorted(needs.values(), key=lambda need: (need.since_wall_s, need.job))
        self._seen = {need.job: self._seen.get(need.job, now.boot_s) for need in self.needs}

    def seen_at(self, job: JobId) -> float:
        """`boot_s` since when the need is known here."""
        return self._seen[job]

    def ripe_at(self, now: Now, need: Need, after_s: float) -> float:
        """`boot_s` from which the need has waited for `after_s`, whichever of two wall clocks is wrong.

        Its steward's clock may be behind ours: what it says counts only with slack, what was seen here counts in full.
        """
        by_steward = now.boot_s + need.since_wall_s + after_s + WALL_CLOCK_SLACK_S - now.wall_s
        return min(self._seen[need.job] + after_s, by_steward)


@dataclass(slots=True)
class Place:
    """What an instance, rented or about to be, offers. need: the job it is rented for. serves: whose turn it is next.

    is_closed: its own need waits for it, but nobody else may: it ends, or what it has is not known.
    """

    name: str
    need: JobId
    inventory: Inventory
    allocations: list[Allocation] = field(default_factory=list)
    is_closed: bool = False
    serves: list[JobId] = field(default_factory=list)

    def take(self, need: Need) -> bool:
        """Set room aside for the need, if there is some."""
        resources = need.resources
        room = find_room(resources, Host(self.inventory), (), self.allocations)
        if room.rule is not None:
            return False
        self.allocations.append(
            Allocation(need.job, 0, "", UserName(""), room.gpus, resources.cpus, resources.memory_bytes)
        )
        return True


def assign(needs: Iterable[Need], places: Iterable[Place]) -> list[Need]:
    """Give each need the place that was rented for it, else one with room; returns those for which there is none.

    A need waits for its own instance even while others use it, so that it never gets a second one.
    """
    places = tuple(places)
    others: list[Need] = []
    for need in needs:
        own = next((place for place in places if place.need == need.job), None)
        if own is None:
            others.append(need)
        else:
            own.take(need)
            own.serves.append(need.job)
    unmet: list[Need] = []
    for need in others:
        place = next((place for place in places if not place.is_closed and place.take(need)), None)
        if place is None:
            unmet.append(need)
        else:
            place.serves.append(need.job)
    return unmet
