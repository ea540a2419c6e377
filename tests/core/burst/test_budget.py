"""Each cap, counted at the worst case, and what launches are written down as."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from meshgpu.core.burst.budget import LEAST_BILLED_S, Spending, day, month, refusal, spent_usd, worst_case
from meshgpu.core.effects import Persist
from meshgpu.model.clock import WALL_CLOCK_SLACK_S, Now
from meshgpu.model.cloud import Caps, Instance, InstanceState, LaunchId, Market, Rung
from meshgpu.model.ids import JobId, MeshId, NodeId
from meshgpu.model.records import SpendRecord
from meshgpu.model.resources import GB

NOON = datetime(2026, 3, 31, 12, tzinfo=UTC).timestamp()
ME, OTHER = NodeId("m" * 52), NodeId("o" * 52)
JOB = JobId("j" * 26)
RUNG = Rung("g6.xlarge", "a", Market.SPOT, "L4", 1, 22 * 2**30, 4, 16 * GB, 1.0)
CAPS = Caps(10.0, 10.0, 10.0, 10.0, 10, False, 3600.0)


def spend(name: str = "a", hours: float = 1.0, begin: float = NOON, need: JobId = JOB, usd: float = 1.0) -> SpendRecord:
    return SpendRecord(LaunchId(name * 26), ME, need, 1, usd, begin, begin + hours * 3600.0)


def test_day_and_month_are_those_of_utc() -> None:
    assert day(NOON) == (NOON - 12 * 3600, NOON + 12 * 3600)
    begin, end = (datetime.fromtimestamp(t, UTC) for t in month(NOON))
    assert (begin.isoformat(), end.isoformat()) == ("2026-03-01T00:00:00+00:00", "2026-04-01T00:00:00+00:00")
    december = month(datetime(2026, 12, 31, 23, tzinfo=UTC).timestamp())
    assert datetime.fromtimestamp(december[1], UTC).isoformat() == "2027-01-01T00:00:00+00:00"


def test_what_is_spent_in_a_span_is_the_part_that_lies_in_it() -> None:
    assert spent_usd([spend(hours=4.0)], NOON + 3600.0, NOON + 2 * 3600.0) == pytest.approx(1.0)
    assert spent_usd([spend(hours=1.0)], NOON + 7200.0, NOON + 9000.0) == 0.0


@pytest.mark.parametrize(
    ("caps", "words"),
    [
        (replace(CAPS, instances=2), "the cap of 2 instances at a time: 2 instances live"),
        (replace(CAPS, usd_per_hour=2.5), "the cap of $2.50 an hour: $2.00 and $1.00 more would be $3.00"),
        (replace(CAPS, usd_per_job=1.9), "the cap of $1.90 for a job: $1.00 and $1.00 more would be $2.00"),
        (replace(CAPS, usd_per_day=3.9), "the cap of $3.90 a day: $3.00 and $1.00 more would be $4.00"),
        (replace(CAPS, usd_per_month=4.9), "the cap of $4.90 a month: $4.00 and $1.00 more would be $5.00"),
    ],
)
def test_each_cap_refuses_in_words(caps: Caps, words: str) -> None:
    other = JobId("k" * 26)
    spends = [spend("b"), spend("c", 2.0, need=other), spend("d", begin=NOON - 5 * 86400, need=other)]
    assert refusal(CAPS, spend(), spends, (1.0, 1.0)) == ""
    assert refusal(caps, spend(), spends, (1.0, 1.0)) == words


def test_cap_may_be_used_up_to_the_last_cent() -> None:
    assert refusal(replace(CAPS, usd_per_job=2.0), spend(), [spend("b")], ()) == ""


def test_nothing_may_be_rented_where_caps_are_zero() -> None:
    for field in ("usd_per_hour", "usd_per_day", "usd_per_month", "usd_per_job", "instances"):
        assert refusal(replace(CAPS, **{field: 0}), spend(), (), ())  # type: ignore[arg-type]  # a field of Caps


def test_lease_that_reaches_into_the_next_day_needs_room_there_too() -> None:
    """The last day of March: tomorrow is another month as well."""
    late = NOON + 11.5 * 3600
    tomorrow = spend("b", 4.0, NOON + 12 * 3600, JobId("k" * 26))
    assert refusal(replace(CAPS, usd_per_day=4.2), spend(begin=late), [tomorrow], ()).startswith(
        "the cap of $4.20 a day"
    )
    assert refusal(replace(CAPS, usd_per_month=4.2), spend(begin=late), [tomorrow], ()).startswith(
        "the cap of $4.20 a m"
    )
    assert refusal(replace(CAPS, usd_per_day=4.6), spend(begin=late), [tomorrow], ()) == ""


def now(after_s: float) -> Now:
    return Now(after_s, NOON + after_s, "boot")


def instance(state: InstanceState, launch: str = "x", owner: NodeId = OTHER) -> Instance:
    name = LaunchId(launch * 26)
    return Instance(
        f"i-{launch}", name, MeshId("5e" * 32), owner, JOB, state, "", NOON, NOON + 3600, "g6.xlarge", Market.SPOT, 2.0
    )


def test_launch_is_counted_whole_until_it_is_known_to_be_over() -> None:
    spending = Spending()
    launch = LaunchId("a" * 26)
    spending.commit(worst_case(launch, ME, JOB, spending.next_number(JOB), RUNG, now(0), NOON + 3600))
    assert spent_usd(spending.spends, *day(NOON)) == pytest.approx(1.0 + WALL_CLOCK_SLACK_S / 3600)
    spending.close(now(600), launch)
    assert spending.spends[0].until_wall_s == NOON + 600
    assert spending.spends[0].is_over


def test_instance_costs_a_minute_at_least() -> None:
    spending = Spending()
    spending.commit(worst_case(LaunchId("a" * 26), ME, JOB, 1, RUNG, now(0), NOON + 3600))
    spending.close(now(1), LaunchId("a" * 26))
    assert spending.spends[0].until_wall_s == NOON + LEAST_BILLED_S


def test_numbers_of_a_need_are_never_used_again() -> None:
    spending = Spending()
    for number in (1, 2, 3):
        assert spending.next_number(JOB) == number
        launch = LaunchId(f"{number}" * 26)
        effects = spending.commit(worst_case(launch, ME, JOB, number, RUNG, now(0), NOON + 3600))
        spending.void(launch)
        forgotten = [e for e in effects if isinstance(e, Persist) and e.record is None]
        assert len(forgotten) == (number > 1)  # one line for all that came to nothing
    again = Spending()
    for record in spending.spends:
        again.restore(record)
    assert again.next_number(JOB) == 4
    assert spent_usd(again.spends, *day(NOON)) == 0.0


def test_numbers_go_on_where_this_machine_took_new_keys() -> None:
    spending = Spending()
    before = worst_case(LaunchId("a" * 26), OTHER, JOB, 3, RUNG, now(0), NOON + 3600)
    spending.restore(before)
    assert spending.next_number(JOB) == 4


def test_instances_of_other_burst_peers_count_while_they_live() -> None:
    spending = Spending()
    spending.account(now(60), [instance(InstanceState.RUNNING)], ())
    assert [(s.owner, s.until_wall_s, s.is_over) for s in spending.spends] == [(OTHER, NOON + 3600, False)]
    assert spending.next_number(JOB) == 1
    spending.account(now(900), [instance(InstanceState.TERMINATED)], ())
    assert spending.spends[0].until_wall_s == NOON + 900
    spending.account(now(960), [], ())
    assert spending.spends[0].until_wall_s == NOON + 900


def test_launch_that_seemed_to_have_come_to_nothing_counts_again_when_it_shows() -> None:
    spending = Spending()
    launch = LaunchId("x" * 26)
    spending.commit(worst_case(launch, ME, JOB, 1, RUNG, now(0), NOON + 3600))
    spending.void(launch)
    spending.account(now(60), [instance(InstanceState.RUNNING, owner=ME)], ())
    assert spent_usd(spending.spends, *day(NOON)) >= 2.0
    assert spending.next_number(JOB) == 2


def test_spending_of_older_months_is_forgotten() -> None:
    spending = Spending()
    spending.restore(replace(spend(begin=NOON - 70 * 86400), is_over=True))
    effects = spending.account(now(0), (), ())
    assert effects == [Persist("spend", "a" * 26, None)]


def test_each_day_of_a_long_lease_needs_room() -> None:
    """From noon for 48 hours: the day in the middle costs most."""
    lease = spend(hours=48.0)
    roomy = replace(CAPS, usd_per_hour=9.0, usd_per_day=24.0, usd_per_month=99.0, usd_per_job=99.0)
    assert refusal(roomy, lease, [], ()) == ""
    assert refusal(replace(roomy, usd_per_day=23.0), lease, [], ()).startswith("the cap of $23.00 a day")
