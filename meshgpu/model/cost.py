"""What a machine of one's own costs beside a rented one: the break-even of buying. Arithmetic, no decisions."""

import math
from dataclasses import dataclass
from typing import Final

HOURS_PER_WEEK: Final = 168
HOURS_PER_YEAR: Final = 8760


@dataclass(frozen=True, slots=True)
class Purchase:
    """A machine that may be bought, and the one in the cloud that it replaces.

    price_usd, resale_usd: paid at first and got back at last. speed: of the machine, over that of the cloud's.
    cloud_usd_per_hour: spot or on-demand. cloud_overhead: cloud hours paid for each that counts, 1 at least (spot:
    about 1.05 for boots and lost work). power_w: drawn under load. upkeep_usd_per_hour: whatever else an hour costs.
    hours_per_week: for how long it is really used, above 0 and 168 at most.
    """

    price_usd: float
    speed: float
    cloud_usd_per_hour: float
    resale_usd: float = 0.0
    cloud_overhead: float = 1.0
    power_w: float = 0.0
    electricity_usd_per_kwh: float = 0.0
    upkeep_usd_per_hour: float = 0.0
    hours_per_week: float = 40.0


@dataclass(frozen=True, slots=True)
class BreakEven:
    """When the machine has paid for itself; the hours and years are None where it never does.

    worth_usd_per_hour: what one of its hours would cost in the cloud. running_usd_per_hour: what one costs here.
    cloud_hours: those that do the work of local_hours. years: how long that takes at the hours of use per week.
    """

    worth_usd_per_hour: float
    running_usd_per_hour: float
    local_hours: float | None
    cloud_hours: float | None
    years: float | None


def break_even(purchase: Purchase) -> BreakEven:
    """The hours after which buying was cheaper than renting.

    With price C, resale R, speed s, cloud price p, overhead o and running cost e, one local hour is worth q = p·s·o of
    cloud, so (C - R) / (q - e) local hours pay for the machine. Source: the sum of Spell's article on local GPUs of
    2020 (2000 / 0.918 · 1.25, without R, e and o), completed by what it leaves out.
    """
    worth = purchase.cloud_usd_per_hour * purchase.speed * purchase.cloud_overhead
    running = purchase.power_w / 1000 * purchase.electricity_usd_per_kwh + purchase.upkeep_usd_per_hour
    saved = worth - running
    hours = (purchase.price_usd - purchase.resale_usd) / saved if saved > 0 else math.inf
    if not math.isfinite(hours):
        return BreakEven(worth, running, None, None, None)
    share = purchase.hours_per_week / HOURS_PER_WEEK
    return BreakEven(worth, running, hours, hours * purchase.speed, hours / (HOURS_PER_YEAR * share))
