"""When a machine of one's own has paid for itself."""

from dataclasses import replace

import pytest

from meshgpu.model.cost import Purchase, break_even

BOX = Purchase(price_usd=2000, speed=0.8, cloud_usd_per_hour=0.918)


@pytest.mark.parametrize(("cloud", "local_hours", "cloud_hours"), [(0.918, 2723, 2179), (3.06, 817, 654)])
def test_sum_of_the_article(cloud: float, local_hours: int, cloud_hours: int) -> None:
    """Spell, 2020: a $2,000 machine at 80 % of the speed of a V100, spot and on-demand."""
    result = break_even(replace(BOX, cloud_usd_per_hour=cloud))
    assert result.local_hours is not None
    assert result.cloud_hours is not None
    assert (round(result.local_hours), round(result.cloud_hours)) == (local_hours, cloud_hours)


def test_electricity_delays_and_resale_hastens() -> None:
    powered = replace(BOX, power_w=450, electricity_usd_per_kwh=0.15)
    sold = replace(powered, resale_usd=600)
    hours = [break_even(p).local_hours for p in (powered, sold, replace(sold, cloud_usd_per_hour=3.06))]
    assert [round(h or 0) for h in hours] == [2999, 2099, 588]


def test_overhead_makes_each_local_hour_worth_more() -> None:
    assert break_even(replace(BOX, cloud_overhead=1.05)).worth_usd_per_hour == pytest.approx(0.918 * 0.8 * 1.05)


@pytest.mark.parametrize(("share", "years"), [(0.33, 0.94), (0.15, 2.07)])
def test_less_use_takes_longer(share: float, years: float) -> None:
    """The article's two shares of use, as the research checked them."""
    assert break_even(replace(BOX, hours_per_week=168 * share)).years == pytest.approx(years, abs=0.005)


@pytest.mark.parametrize(
    "purchase",
    [
        replace(BOX, speed=0),
        replace(BOX, cloud_usd_per_hour=0),
        replace(BOX, upkeep_usd_per_hour=0.918 * 0.8),
        replace(BOX, upkeep_usd_per_hour=5),
        replace(BOX, price_usd=1e308, cloud_usd_per_hour=1e-300),
    ],
)
def test_hour_that_saves_nothing_never_pays(purchase: Purchase) -> None:
    result = break_even(purchase)
    assert (result.local_hours, result.cloud_hours, result.years) == (None, None, None)


def test_machine_that_is_sold_for_its_price_has_paid_at_once() -> None:
    assert break_even(replace(BOX, resale_usd=2000)).local_hours == 0
