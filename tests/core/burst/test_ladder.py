"""What is asked for first."""

from dataclasses import replace

from meshgpu.core.burst.ladder import REST_LIMIT_S, REST_S, RUNGS, Rests, ladder
from meshgpu.model.clock import Now
from meshgpu.model.cloud import Caps, Market, Rung
from meshgpu.model.gossip import Need
from meshgpu.model.ids import JobId
from meshgpu.model.resources import GB, GpuRequest, Resources

ONE = Rung("g6.xlarge", "a", Market.SPOT, "L4", 1, 22 * 2**30, 4, 16 * GB, 0.40)
A10G = replace(ONE, instance_type="g5.xlarge", gpu_name="A10G", usd_per_hour=0.5)
FOUR = Rung("g6.12xlarge", "a", Market.SPOT, "L4", 4, 22 * 2**30, 48, 192 * GB, 1.2)
CAPS = Caps(100.0, 100.0, 1000.0, 100.0, 4, True, 3600.0)


def need(name: str, gpus: GpuRequest | None = None, memory_bytes: int = 0) -> Need:
    return Need(JobId(name * 26), Resources(gpus or GpuRequest(1), 0, memory_bytes), 0.0)


def dearer(rung: Rung) -> Rung:
    return replace(rung, market=Market.ON_DEMAND, usd_per_hour=rung.usd_per_hour * 2)


def test_cheapest_that_fits_comes_first() -> None:
    assert ladder([FOUR, A10G, ONE], [need("a")], CAPS) == [ONE, A10G, FOUR]


def test_spot_comes_before_on_demand_and_on_demand_only_where_it_is_allowed() -> None:
    cheap = replace(dearer(ONE), usd_per_hour=0.1)
    assert ladder([cheap, A10G], [need("a")], CAPS) == [A10G, cheap]
    assert ladder([cheap, A10G], [need("a")], replace(CAPS, on_demand=False)) == [A10G]


def test_rung_that_serves_several_needs_is_worth_more() -> None:
    needs = [need("a"), need("b"), need("c"), need("d")]
    assert ladder([ONE, FOUR], needs, CAPS)[0] == FOUR  # 0.30 an hour for each
    assert ladder([ONE, FOUR], needs[:2], CAPS)[0] == ONE


def test_gpus_are_matched_by_model_count_and_memory_as_placement_does() -> None:
    rungs = [ONE, A10G, FOUR]
    assert ladder(rungs, [need("a", GpuRequest(1, model="a10g"))], CAPS) == [A10G]
    assert ladder(rungs, [need("a", GpuRequest(2))], CAPS) == [FOUR]
    assert ladder(rungs, [need("a", GpuRequest(1, memory_bytes=40 * GB))], CAPS) == []
    assert ladder(rungs, [need("a", memory_bytes=100 * GB)], CAPS) == [FOUR]


def test_ladder_has_a_dozen_rungs_at_most() -> None:
    rungs = [replace(ONE, zone=f"{number:02d}") for number in range(40)]
    assert ladder(rungs, [need("a")], CAPS) == rungs[:RUNGS]


def test_rung_without_capacity_rests_longer_each_time_up_to_a_limit() -> None:
    rests, now = Rests(), Now(1000.0, 0.0, "boot")
    lengths = []
    for _ in range(8):
        rests.failed(now, ONE, is_refused=False)
        lengths.append(rests.until(ONE) - now.boot_s)
    assert lengths[:3] == [REST_S, 2 * REST_S, 4 * REST_S]
    assert lengths[-1] == REST_LIMIT_S
    assert rests.until(A10G) == 0.0
    rests.worked(ONE)
    assert rests.until(ONE) == 0.0
