"""What may be spent: every cap is checked before a launch, with the worst case, which is the whole lease."""

from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

from meshgpu.core.effects import Effect, Persist
from meshgpu.model.clock import WALL_CLOCK_SLACK_S, Now
from meshgpu.model.cloud import Caps, Instance, InstanceState, LaunchId, Rung
from meshgpu.model.ids import JobId, NodeId
from meshgpu.model.records import SpendRecord

HOUR_S: Final = 3600.0
CENT_PART: Final = 1e-6
"""US dollars: what adding up floats may be wrong by."""

KEEP_S: Final = 62 * 86400.0
"""Two months: this one, the one before, and every job that still waits."""

LEAST_BILLED_S: Final = 60.0
"""EC2 charges for a minute at least (EC2 on-demand pricing)."""


def usd(spend: SpendRecord) -> float:
    """What the launch costs at most, altogether."""
    return spend.usd_per_hour * (spend.until_wall_s - spend.from_wall_s) / HOUR_S


def worst_case(
    launch: LaunchId, owner: NodeId, need: JobId, number: int, rung: Rung, now: Now, lease_ends_wall_s: float
) -> SpendRecord:
    """A launch that is asked for now, as it is counted: its whole lease, by whichever clock that takes longer."""
    begun = now.wall_s - WALL_CLOCK_SLACK_S
    return SpendRecord(launch, owner, need, number, rung.usd_per_hour, begun, lease_ends_wall_s)


def spent_usd(spends: Iterable[SpendRecord], begin_wall_s: float, end_wall_s: float) -> float:
    """What the launches cost at most within a span of time."""
    return sum(
        spend.usd_per_hour
        * max(min(spend.until_wall_s, end_wall_s) - max(spend.from_wall_s, begin_wall_s), 0.0)
        / HOUR_S
        for spend in spends
    )


def day(wall_s: float) -> tuple[float, float]:
    """Begin and end of the UTC day."""
    begin = datetime.fromtimestamp(wall_s, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return begin.timestamp(), (begin + timedelta(days=1)).timestamp()


def month(wall_s: float) -> tuple[float, float]:
    """Begin and end of the UTC month."""
    begin = datetime.fromtimestamp(wall_s, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return begin.timestamp(), (begin + timedelta(days=32)).replace(day=1).timestamp()


def refusal(
    caps: Caps, candidate: SpendRecord, spends: Iterable[SpendRecord], live_usd_per_hour: Iterable[float]
) -> str:
    """Which cap forbids the candidate, in words; empty if none does.

    live_usd_per_hour: of each instance that lives or may. Days and months are those that the lease touches.
    """
    spends, live = tuple(spends), tuple(live_usd_per_hour)
    if len(live) + 1 > caps.instances:
        return f"the cap of {_count(caps.instances)} at a time: {_count(len(live))} live"
    rows = [
        ("an hour", caps.usd_per_hour, sum(live), candidate.usd_per_hour),
        ("for a job", caps.usd_per_job, _of_job(spends, candidate.need), usd(candidate)),
    ]
    for name, cap, span in (("a day", caps.usd_per_day, day), ("a month", caps.usd_per_month, month)):
        begin, end = span(candidate.from_wall_s)
        while begin < candidate.until_wall_s:
            rows.append((name, cap, spent_usd(spends, begin, end), spent_usd((candidate,), begin, end)))
            begin, end = span(end)
    for name, cap, before, more in rows:
        if before + more > cap + CENT_PART:
            return f"the cap of ${cap:.2f} {name}: ${before:.2f} and ${more:.2f} more would be ${before + more:.2f}"
    return ""


def _of_job(spends: Iterable[SpendRecord], need: JobId) -> float:
    return sum(usd(spend) for spend in spends if spend.need == need)


def _count(instances: int) -> str:
    return f"{instances} instance" if instances == 1 else f"{instances} instances"


class Spending:
    """What every launch that is known here costs at most; each change is to be kept."""

    def __init__(self) -> None:
        self._spends: dict[LaunchId, SpendRecord] = {}

    def restore(self, spend: SpendRecord) -> None:
        self._spends[spend.launch] = spend

    @property
    def spends(self) -> tuple[SpendRecord, ...]:
        return tuple(self._spends.values())

    def next_number(self, need: JobId) -> int:
        """A token whose instance has died returns the dead one: every request of a need has a number of its own.

        Those that this machine made under keys of before count, too; another's have the number 0.
        """
        numbers = (spend.number for spend in self.spends if spend.need == need)
        return 1 + max(numbers, default=0)

    def commit(self, spend: SpendRecord) -> list[Effect]:
        """Count a launch that is about to be asked for. It takes over the number of those that came to nothing."""
        void = self._forget(lambda old: old.need == spend.need and old.until_wall_s <= old.from_wall_s)
        return [*void, self._keep(spend)]

    def close(self, now: Now, launch: LaunchId) -> list[Effect]:
        """The instance is known to be gone now."""
        spend = self._spends.get(launch)
        if spend is None:
            return []
        until = min(spend.until_wall_s, max(now.wall_s, spend.from_wall_s + WALL_CLOCK_SLACK_S + LEAST_BILLED_S))
        return [self._keep(replace(spend, until_wall_s=until, is_over=True))]

    def void(self, launch: LaunchId) -> list[Effect]:
        """Nothing was rented."""
        spend = self._spends.get(launch)
        return [] if spend is None else [self._keep(replace(spend, until_wall_s=spend.from_wall_s, is_over=True))]

    def account(self, now: Now, instances: Iterable[Instance], own: Container[LaunchId]) -> list[Effect]:
        """Take in a survey: count what lives and is not counted (another burst peer's, or of a launch that seemed to
        have come to nothing), close what is gone and not among this node's `own`, forget what is long over."""
        effects: list[Effect] = []
        living = {i.launch: i for i in instances if i.state is not InstanceState.TERMINATED}
        for launch, instance in living.items():
            spend = self._spends.get(launch)
            if spend is None or spend.is_over:
                number = spend.number if spend else 0
                effects.append(
                    self._keep(
                        SpendRecord(
                            launch,
                            instance.owner,
                            instance.need,
                            number,
                            instance.usd_per_hour,
                            instance.launched_wall_s - WALL_CLOCK_SLACK_S,
                            instance.lease_ends_wall_s,
                        )
                    )
                )
        for spend in self.spends:
            if not spend.is_over and spend.launch not in living and spend.launch not in own:
                effects += self.close(now, spend.launch)
        return effects + self._forget(lambda old: old.is_over and old.until_wall_s < now.wall_s - KEEP_S)

    def _keep(self, spend: SpendRecord) -> Persist:
        self._spends[spend.launch] = spend
        return Persist("spend", spend.launch, spend)

    def _forget(self, is_old: Callable[[SpendRecord], bool]) -> list[Effect]:
        old = [spend.launch for spend in self.spends if is_old(spend)]
        for launch in old:
            del self._spends[launch]
        return [Persist("spend", launch, None) for launch in old]
