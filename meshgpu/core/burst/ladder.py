"""What to ask the provider for, in which order: the rungs that fit, the cheapest for the jobs first, spot first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from meshgpu.core.burst.demand import Place
from meshgpu.core.jobs.placement import Host, never_fits
from meshgpu.model.clock import Now
from meshgpu.model.cloud import Caps, Market, Rung
from meshgpu.model.gossip import Need
from meshgpu.model.ids import GpuId, JobId
from meshgpu.model.inventory import Gpu, Inventory

RUNGS: Final = 12
"""Tried for a need at most: four types in three zones."""

REST_S: Final = 180.0
"""A rung without capacity is left alone for so long, as other autoscalers do; doubled each time, up to REST_LIMIT_S."""

REST_LIMIT_S: Final = 1800.0

REFUSED_REST_S: Final = 3600.0
"""A rung that the provider does not understand is left alone for so long: waiting alone does not mend it."""


def inventory_of(rung: Rung) -> Inventory:
    """The machine that the rung promises."""
    gpus = tuple(Gpu(GpuId(f"{index}"), index, rung.gpu_name, rung.gpu_memory_bytes) for index in range(rung.gpus))
    return Inventory(rung.cpus, rung.memory_bytes, gpus)


def ladder(rungs: Iterable[Rung], needs: Sequence[Need], caps: Caps) -> list[Rung]:
    """The rungs that fit the first of the needs, best first, at most RUNGS.

    A rung that has room for several needs is worth its price to each of them.
    """
    fitting = [
        rung
        for rung in rungs
        if (caps.on_demand or rung.market is Market.SPOT)
        and not never_fits(needs[0].resources, Host(inventory_of(rung)))
    ]
    fitting.sort(
        key=lambda rung: (
            rung.market is not Market.SPOT,
            rung.usd_per_hour / served(rung, needs),
            rung.usd_per_hour,
            rung.instance_type,
            rung.zone,
        )
    )
    return fitting[:RUNGS]


def served(rung: Rung, needs: Sequence[Need]) -> int:
    """How many of the needs fit on one instance, oldest first; the first one does."""
    place = Place("", JobId(""), inventory_of(rung))
    return sum(place.take(need) for need in needs)


@dataclass(slots=True)
class Rests:
    """Which rungs had no capacity lately. {(type, zone, market): (boot_s of the next try, the rest before that)}"""

    _until: dict[tuple[str, str, Market], tuple[float, float]] = field(default_factory=dict)

    def until(self, rung: Rung) -> float:
        """`boot_s` from which on the rung may be tried."""
        return self._until.get(_place(rung), (0.0, 0.0))[0]

    def failed(self, now: Now, rung: Rung, *, is_refused: bool) -> None:
        """Leave the rung alone for a while, longer each time."""
        _, before_s = self._until.get(_place(rung), (0.0, 0.0))
        rest_s = REFUSED_REST_S if is_refused else min(max(before_s * 2, REST_S), REST_LIMIT_S)
        self._until[_place(rung)] = (now.boot_s + rest_s, rest_s)

    def worked(self, rung: Rung) -> None:
        self._until.pop(_place(rung), None)


def _place(rung: Rung) -> tuple[str, str, Market]:
    return (rung.instance_type, rung.zone, rung.market)
