"""When a need is ripe, whoever's clock is wrong, and which needs something rented will serve."""

from meshgpu.core.burst.demand import Place, Waiting, assign
from meshgpu.core.burst.ladder import inventory_of
from meshgpu.model.clock import Now
from meshgpu.model.cloud import Market, Rung
from meshgpu.model.gossip import Demand, Need
from meshgpu.model.ids import JobId
from meshgpu.model.resources import GB, GpuRequest, Resources

WALL_S = 1_800_000_000.0
FOUR = Rung("g6.12xlarge", "a", Market.SPOT, "L4", 4, 22 * 2**30, 48, 192 * GB, 4.6)


def at(boot_s: float) -> Now:
    return Now(boot_s, WALL_S + boot_s, "boot")


def need(name: str, since_s: float = 0.0, gpus: int = 1) -> Need:
    return Need(JobId(name * 26), Resources(GpuRequest(gpus)), WALL_S + since_s)


def test_needs_of_all_stewards_are_taken_once_the_oldest_first() -> None:
    waiting = Waiting()
    waiting.refresh(at(0), [Demand((need("b", 5), need("c", 9))), Demand((need("a", 7), need("b", 5)))])
    assert [found.job[0] for found in waiting.needs] == ["b", "a", "c"]


def test_need_is_ripe_once_it_was_seen_here_for_long_enough() -> None:
    waiting = Waiting()
    late = need("a", since_s=10_000.0)  # its steward's clock is far ahead
    waiting.refresh(at(100), [Demand((late,))])
    assert waiting.ripe_at(at(100), late, 60.0) == 160.0
    waiting.refresh(at(130), [Demand((late,))])
    assert waiting.ripe_at(at(130), late, 60.0) == 160.0


def test_need_that_is_older_than_any_wrong_clock_explains_is_ripe_at_once() -> None:
    waiting = Waiting()
    old = need("a", since_s=-181.0)
    waiting.refresh(at(0), [Demand((old,))])
    assert waiting.ripe_at(at(0), old, 60.0) <= 0.0
    young = need("b", since_s=-100.0)  # perhaps 100 s, perhaps not at all
    waiting.refresh(at(0), [Demand((young,))])
    assert waiting.ripe_at(at(0), young, 60.0) == 60.0


def test_need_that_was_withdrawn_waits_anew() -> None:
    waiting = Waiting()
    again = need("a", since_s=500.0)
    waiting.refresh(at(0), [Demand((again,))])
    waiting.refresh(at(30), [])
    waiting.refresh(at(40), [Demand((again,))])
    assert waiting.seen_at(again.job) == 40.0


def test_needs_share_an_instance_while_it_has_room() -> None:
    place = Place("i-1", JobId("a" * 26), inventory_of(FOUR))
    unmet = assign([need("a"), need("b", gpus=2), need("c", gpus=2), need("d")], [place])
    assert [left.job[0] for left in unmet] == ["c"]
    assert [job[0] for job in place.serves] == ["a", "b", "d"]


def test_need_waits_for_the_instance_that_was_rented_for_it_even_without_room() -> None:
    full = Place("i-1", JobId("b" * 26), inventory_of(FOUR))
    assert full.take(need("x", gpus=4))
    assert assign([need("b")], [full]) == []


def test_place_that_ends_serves_nobody_else() -> None:
    place = Place("i-1", JobId("a" * 26), inventory_of(FOUR), is_closed=True)
    assert [left.job[0] for left in assign([need("a"), need("b")], [place])] == ["b"]
