"""The command `cost`."""

import json
from collections.abc import Callable

import pytest
from typer.testing import Result

Cli = Callable[..., Result]


def test_break_even_prints_the_articles_sum_and_every_input_with_its_flag(cli: Cli) -> None:
    shown = cli("cost", "break-even").stdout
    assert "2,723 local hours, the work of 2,179 cloud hours" in shown
    assert "15.7 months at 40 hours a week" in shown
    for flag in (
        *("--price", "--resale", "--speed", "--cloud-usd-per-hour", "--cloud-overhead"),
        *("--power-w", "--electricity-usd-per-kwh", "--upkeep-usd-per-hour", "--hours-per-week"),
    ):
        assert f"({flag})" in shown
    assert "817 local hours" in cli("cost", "break-even", "--cloud-usd-per-hour", "3.06").stdout


def test_each_flag_reaches_the_sum(cli: Cli) -> None:
    flags = "--price 1000 --resale 100 --speed 0.5 --cloud-usd-per-hour 2 --cloud-overhead 1.1 --power-w 400"
    more = "--electricity-usd-per-kwh 0.25 --upkeep-usd-per-hour 0.1 --hours-per-week 84"
    done = cli("cost", "break-even", *flags.split(), *more.split(), "--json")
    document = json.loads(done.stdout)
    assert document["inputs"] == {
        "price_usd": 1000,
        "resale_usd": 100,
        "speed": 0.5,
        "cloud_usd_per_hour": 2,
        "cloud_overhead": 1.1,
        "power_w": 400,
        "electricity_usd_per_kwh": 0.25,
        "upkeep_usd_per_hour": 0.1,
        "hours_per_week": 84,
    }
    assert document["break_even"]["local_hours"] == pytest.approx(900 / (1.1 - 0.2))
    assert document["break_even"]["years"] == pytest.approx(1000 / 4380)


def test_machine_that_never_pays_says_so(cli: Cli) -> None:
    assert "never" in cli("cost", "break-even", "--upkeep-usd-per-hour", "9").stdout
    document = json.loads(cli("cost", "break-even", "--upkeep-usd-per-hour", "9", "--json").stdout)
    assert document["break_even"]["local_hours"] is None


@pytest.mark.parametrize(
    "flags",
    [
        ("--price", "-1"),
        ("--price", "nan"),
        ("--speed", "inf"),
        ("--resale", "2001"),
        ("--hours-per-week", "0"),
        ("--hours-per-week", "169"),
        ("--cloud-overhead", "0.9"),
        ("--price", "cheap"),
    ],
)
def test_impossible_inputs_are_usage_errors(cli: Cli, flags: tuple[str, ...]) -> None:
    done = cli("cost", "break-even", *flags)
    assert done.exit_code == 2
    assert done.stdout == ""


def test_unknown_sum_names_the_one_there_is(cli: Cli) -> None:
    done = cli("cost", "everything")
    assert done.exit_code == 2
    assert "break-even" in done.stderr
