"""The command `cost`: sums about money, with every input printed. It needs no agent."""

import json
import math
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from meshgpu.cli.watch import Json
from meshgpu.errors import MeshgpuError
from meshgpu.model.cost import HOURS_PER_WEEK, BreakEven, Purchase, break_even


class Sum(StrEnum):
    """What may be worked out."""

    BREAK_EVEN = "break-even"


def cost(
    what: Annotated[Sum, typer.Argument(metavar="break-even", help="When a machine of your own has paid for itself.")],
    price: Annotated[float, typer.Option("--price", min=0, metavar="USD", help="What the machine costs.")] = 2000.0,
    resale: Annotated[float, typer.Option("--resale", min=0, metavar="USD", help="What it brings at last.")] = 0.0,
    speed: Annotated[
        float, typer.Option("--speed", min=0, metavar="RATIO", help="Its speed, over that of the cloud's machine.")
    ] = 0.8,
    cloud: Annotated[
        float, typer.Option("--cloud-usd-per-hour", min=0, metavar="USD", help="The cloud's price, spot or on-demand.")
    ] = 0.918,
    overhead: Annotated[
        float,
        typer.Option("--cloud-overhead", min=1, metavar="RATIO", help="Cloud hours paid for each that counts."),
    ] = 1.0,
    power: Annotated[float, typer.Option("--power-w", min=0, metavar="W", help="What it draws under load.")] = 0.0,
    electricity: Annotated[
        float, typer.Option("--electricity-usd-per-kwh", min=0, metavar="USD", help="What electricity costs.")
    ] = 0.15,
    upkeep: Annotated[
        float, typer.Option("--upkeep-usd-per-hour", min=0, metavar="USD", help="What else an hour of it costs.")
    ] = 0.0,
    hours_per_week: Annotated[
        float, typer.Option("--hours-per-week", min=0.1, max=HOURS_PER_WEEK, metavar="H", help="How long it is used.")
    ] = 40.0,
    as_json: Json = False,
) -> None:
    """Work out after how many hours buying a machine was cheaper than renting one."""
    assert what is Sum.BREAK_EVEN  # the only sum so far
    numbers = (price, resale, speed, cloud, overhead, power, electricity, upkeep, hours_per_week)
    if not all(map(math.isfinite, numbers)):
        raise MeshgpuError("bad-request", "cannot work it out: a number is not finite", "meshgpu cost --help")
    if resale > price:
        raise MeshgpuError(
            "bad-request", f"cannot work it out: it is sold for ${resale:,.0f}, more than its price ${price:,.0f}"
        )
    purchase = Purchase(price, speed, cloud, resale, overhead, power, electricity, upkeep, hours_per_week)
    result = break_even(purchase)
    if as_json:
        print(json.dumps({"inputs": asdict(purchase), "break_even": asdict(result)}))
        return
    facts = inputs(purchase) | outcome(purchase, result)
    width = max(map(len, facts))
    print("\n".join(f"{name:{width}}  {fact}" for name, fact in facts.items()))


def inputs(purchase: Purchase) -> dict[str, str]:
    """What goes into the sum, each with its flag."""
    return {
        "price": f"${purchase.price_usd:,.0f} (--price)",
        "resale": f"${purchase.resale_usd:,.0f} (--resale)",
        "speed": f"{purchase.speed:g} × the cloud's machine (--speed)",
        "cloud": f"${purchase.cloud_usd_per_hour:g} an hour (--cloud-usd-per-hour)",
        "cloud overhead": f"{purchase.cloud_overhead:g} hours paid for one that counts (--cloud-overhead)",
        "power": f"{purchase.power_w:g} W (--power-w)",
        "electricity": f"${purchase.electricity_usd_per_kwh:g} a kWh (--electricity-usd-per-kwh)",
        "upkeep": f"${purchase.upkeep_usd_per_hour:g} an hour (--upkeep-usd-per-hour)",
        "use": f"{purchase.hours_per_week:g} hours a week (--hours-per-week)",
    }


def outcome(purchase: Purchase, result: BreakEven) -> dict[str, str]:
    """What comes of it, and what to use it for."""
    facts = {
        "an hour here": f"is worth ${result.worth_usd_per_hour:.3f} of cloud, costs ${result.running_usd_per_hour:.3f}",
    }
    if result.local_hours is None or result.cloud_hours is None or result.years is None:
        return facts | {"break-even": "never: an hour here costs as much as it is worth"}
    return facts | {
        "break-even": f"{result.local_hours:,.0f} local hours, the work of {result.cloud_hours:,.0f} cloud hours",
        "that takes": f"{span(result.years)} at {purchase.hours_per_week:g} hours a week",
        "use it for": "buying: a machine that you have is cheaper whenever its hour costs less than it is worth",
    }


def span(years: float) -> str:
    """`34 days`, `14.2 months`, `3.1 years`."""
    if years < 0.25:
        return f"{years * 365:.0f} days"
    return f"{years * 12:.1f} months" if years < 2 else f"{years:.1f} years"
