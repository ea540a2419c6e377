"""What is to be rented now for each need that is known, and why or why not. Pure: the same outlook, the same plan."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshgpu.core.burst.budget import day, refusal, usd, worst_case
from meshgpu.core.burst.demand import Place, Waiting, assign
from meshgpu.core.burst.ladder import Rests, inventory_of, ladder
from meshgpu.model.clock import Now
from meshgpu.model.cloud import BurstSettings, LaunchId, Rung
from meshgpu.model.gossip import Need
from meshgpu.model.ids import JobId, NodeId
from meshgpu.model.records import SpendRecord


@dataclass(frozen=True, slots=True)
class Plan:
    """What is thought of one need. rung: what is to be rented for it now, at worst for `usd`; None for nothing.

    words: why, or why not. again_at: `boot_s` of the next look at it; None where only an event can change it.
    """

    need: Need
    rung: Rung | None
    usd: float
    words: str
    again_at: float | None = None


@dataclass(frozen=True, slots=True)
class Outlook:
    """All that a plan follows from.

    places: what is rented already. courtesy_s: how long this node leaves needs to others; None where it may not rent.
    rungs: None before the provider has answered. taken_until: {need: boot_s until when another peer is renting for it}.
    live_usd_per_hour: of each instance that lives, or may.
    """

    now: Now
    node: NodeId
    settings: BurstSettings
    waiting: Waiting
    places: tuple[Place, ...]
    courtesy_s: float | None
    rungs: tuple[Rung, ...] | None
    rests: Rests
    taken_until: Mapping[JobId, float]
    spends: tuple[SpendRecord, ...]
    live_usd_per_hour: tuple[float, ...]

    def forbids(self, spend: SpendRecord, planned: Iterable[SpendRecord] = ()) -> str:
        """Which cap forbids a launch besides those that are planned; empty if none does."""
        planned = tuple(planned)
        live = (*self.live_usd_per_hour, *(other.usd_per_hour for other in planned))
        return refusal(self.settings.caps, spend, (*self.spends, *planned), live)


def plans(outlook: Outlook) -> list[Plan]:
    """One for each need, the oldest first, as if everything that is planned were rented at once."""
    needs, now = outlook.waiting.needs, outlook.now
    places = list(outlook.places)
    unmet = {need.job for need in assign(needs, places)}
    after_s = outlook.settings.burst_after_s + (outlook.courtesy_s or 0.0)
    ripe_at = {need.job: outlook.waiting.ripe_at(now, need, after_s) for need in needs}
    planned: list[SpendRecord] = []
    found: list[Plan] = []
    for number, need in enumerate(needs):
        if need.job not in unmet:
            place = next(place for place in places if need.job in place.serves)
            found.append(Plan(need, None, 0.0, f"waits for {place.name}"))
        elif outlook.courtesy_s is None:
            found.append(Plan(need, None, 0.0, "this node may not rent"))
        elif now.boot_s < ripe_at[need.job]:
            words = f"waits {ripe_at[need.job] - now.boot_s:.0f} s more for the office"
            found.append(Plan(need, None, 0.0, words, ripe_at[need.job]))
        else:
            ripe = [n for n in needs[number:] if n.job in unmet and now.boot_s >= ripe_at[n.job]]
            plan = _plan(outlook, ripe, planned)
            found.append(plan)
            if plan.rung is not None:
                planned.append(_spend(outlook, need, plan.rung))
                place = Place("an instance that is about to be rented", need.job, inventory_of(plan.rung))
                places.append(place)
                assign(ripe, (place,))
                unmet -= set(place.serves)
    return found


def _plan(outlook: Outlook, needs: list[Need], planned: list[SpendRecord]) -> Plan:
    """The best rung for the first need that may be tried now and is within the caps."""
    need, now = needs[0], outlook.now
    taken_until = outlook.taken_until.get(need.job, -math.inf)
    if now.boot_s < taken_until:
        return Plan(need, None, 0.0, "another burst peer rents for it", taken_until)
    if outlook.rungs is None:
        return Plan(need, None, 0.0, "the provider has not answered yet")
    rungs = ladder(outlook.rungs, needs, outlook.settings.caps)
    if not rungs:
        return Plan(need, None, 0.0, "no instance type that may be rented fits")
    refused = ""
    rests: list[float] = []
    for rung in rungs:
        if now.boot_s < outlook.rests.until(rung):
            rests.append(outlook.rests.until(rung))
            continue
        spend = _spend(outlook, need, rung)
        words = outlook.forbids(spend, planned)
        if not words:
            return Plan(need, rung, usd(spend), f"{rung.instance_type}, {rung.market}, in {rung.zone}")
        refused = refused or words
    if refused:
        tomorrow = now.boot_s + day(now.wall_s)[1] - now.wall_s
        return Plan(need, None, 0.0, refused, min(tomorrow, *rests) if rests else tomorrow)
    return Plan(need, None, 0.0, f"no capacity: tried again in {min(rests) - now.boot_s:.0f} s", min(rests))


def _spend(outlook: Outlook, need: Need, rung: Rung) -> SpendRecord:
    """What it would cost, were it rented now."""
    ends = outlook.now.wall_s + outlook.settings.caps.lease_s
    return worst_case(LaunchId(""), outlook.node, need.job, 0, rung, outlook.now, ends)
