"""Which GPUs a job gets, and why it gets none."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshgpu.core.jobs.placement import (
    OFFERS,
    Candidate,
    Clearing,
    Host,
    Rule,
    clear,
    explain,
    find_room,
    nearest_name,
    never_fits,
    rank,
    wanted_cpus,
)
from meshgpu.model.constraints import Where
from meshgpu.model.gossip import Allocation, Capacity, NodeRecord
from meshgpu.model.ids import GpuId, JobId, NodeId, UserName
from meshgpu.model.inventory import Gpu, GpuReading, Inventory
from meshgpu.model.job import Priority
from meshgpu.model.resources import GB, NO_GPU, GpuRequest, GpuShare, Resources, parse_gpus

SMALL = Gpu(GpuId("GPU-small"), 0, "NVIDIA GeForce RTX 3060", 12 * 2**30)
LARGE = Gpu(GpuId("GPU-large"), 1, "NVIDIA GeForce RTX 4090", 24 * 2**30)
HUGE = Gpu(GpuId("GPU-huge"), 2, "NVIDIA A100-SXM4-80GB", 80 * 2**30)
MIXED = Host(Inventory(8, 64 * GB, (SMALL, LARGE, HUGE)))


def used(*shares: GpuShare, cpus: int = 0, memory_bytes: int = 0) -> Allocation:
    return Allocation(JobId("abcdefgh"), 1, "train", UserName("ada"), shares, cpus, memory_bytes)


def room(text: str, *allocations: Allocation, host: Host = MIXED) -> tuple[GpuId, ...] | str:
    """What `-g text` gets: ids, or the refusal."""
    found = find_room(Resources(parse_gpus(text)), host, (), allocations)
    return found.refusal or tuple(share.uuid for share in found.gpus)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", (SMALL.uuid,)),
        ("2", (SMALL.uuid, LARGE.uuid)),
        ("3", (SMALL.uuid, LARGE.uuid, HUGE.uuid)),
        ("8GB", (SMALL.uuid,)),
        ("20GB", (LARGE.uuid,)),
        ("24GB", (LARGE.uuid,)),
        ("2x20GB", (LARGE.uuid, HUGE.uuid)),
        ("4090", (LARGE.uuid,)),
        ("a100:1", (HUGE.uuid,)),
        ("rtx_4090", (LARGE.uuid,)),
        ("rtx:2", (SMALL.uuid, LARGE.uuid)),
    ],
)
def test_request_gets_the_tightest_gpus_that_fit(text: str, expected: tuple[GpuId, ...]) -> None:
    assert room(text) == expected


def test_shared_request_reserves_exactly_its_memory_and_others_take_gpus_whole() -> None:
    shared = find_room(Resources(parse_gpus("8GB")), MIXED, (), ())
    whole = find_room(Resources(parse_gpus("1x8GB")), MIXED, (), ())
    assert shared.gpus == (GpuShare(SMALL.uuid, 8 * GB),)
    assert whole.gpus == (GpuShare(SMALL.uuid),)


def test_whole_gpu_is_not_shared_nor_a_shared_one_given_whole() -> None:
    assert room("8GB", used(GpuShare(SMALL.uuid))) == (LARGE.uuid,)
    assert room("1", used(GpuShare(SMALL.uuid, GB))) == (LARGE.uuid,)


def test_parts_of_one_gpu_never_add_up_to_more_than_it_has() -> None:
    assert room("4GB", used(GpuShare(SMALL.uuid, 8 * GB))) == (SMALL.uuid,)
    assert room("5GB", used(GpuShare(SMALL.uuid, 8 * GB))) == (LARGE.uuid,)


def test_part_goes_where_the_least_is_left() -> None:
    assert room("4GB", used(GpuShare(LARGE.uuid, 20 * GB))) == (LARGE.uuid,)


def test_busy_machine_names_who_holds_it() -> None:
    refusal = room("a100", used(GpuShare(HUGE.uuid)))
    assert refusal == "is busy: 0 of 1 GPUs free, taken by train-abc (ada)"


def test_machine_that_never_fits_says_what_it_has() -> None:
    refusal = room("h100")
    assert refusal == "has RTX 3060 12 GB, RTX 4090 24 GB, A100-SXM4-80GB 80 GB; the job asks for h100:1"
    assert never_fits(Resources(GpuRequest(4)), MIXED)
    assert never_fits(Resources(GpuRequest(1)), Host(Inventory(1, 1))) == "has no GPU, the job asks for 1"
    assert never_fits(Resources(NO_GPU), Host(Inventory(1, 1))) == ""


def test_constraint_leaves_the_gpus_and_machines_out_for_which_it_does_not_hold() -> None:
    rig7 = replace(MIXED, name="rig7", owner=UserName("bob"))
    large = Resources(GpuRequest(1), on=Where("vram>=24GB and not name~a100"))
    assert find_room(large, rig7, (), ()).gpus == (GpuShare(LARGE.uuid),)
    assert find_room(replace(large, gpus=GpuRequest(2)), rig7, (), ()).refusal == (
        "has RTX 3060 12 GB, RTX 4090 24 GB, A100-SXM4-80GB 80 GB; "
        "the job asks for 2 where vram>=24GB and not name~a100"
    )
    assert never_fits(Resources(NO_GPU, on=Where("not (rig7)")), rig7) == "is not where the job may run: not (rig7)"
    assert never_fits(Resources(NO_GPU, on=Where("owner=bob")), rig7) == ""
    assert never_fits(Resources(GpuRequest(1), on=Where("rig8")), rig7)


def test_room_is_made_by_as_few_as_possible_and_first_by_those_who_give_way() -> None:
    pair = Host(Inventory(8, 64 * GB, (LARGE, replace(LARGE, uuid=GpuId("GPU-other"), index=2))))
    stays = replace(used(GpuShare(LARGE.uuid)), job=JobId("b" * 26))
    goes = replace(used(GpuShare(GpuId("GPU-other"))), job=JobId("c" * 26), priority=Priority.LOW, preemptible=True)
    one = clear(Resources(GpuRequest(1)), pair, (), (stays, goes), Priority.NORMAL)
    assert one == Clearing((GpuShare(GpuId("GPU-other")),), (goes,), gives_way=True)
    both = clear(Resources(GpuRequest(2)), pair, (), (stays, goes), Priority.NORMAL)
    assert both is not None
    assert (set(both.blocking), both.gives_way) == ({stays, goes}, False)
    assert clear(Resources(GpuRequest(3)), pair, (), (stays, goes), Priority.HIGH) is None


def test_faulty_gpu_is_left_out() -> None:
    readings = (GpuReading(SMALL.uuid, fault="lost: reset the machine"),)
    found = find_room(Resources(GpuRequest(1)), MIXED, readings, ())
    assert found.gpus == (GpuShare(LARGE.uuid),)
    alone = Host(Inventory(1, 1, (SMALL,)))
    assert "lost: reset" in find_room(Resources(GpuRequest(1)), alone, readings, ()).refusal


def test_measured_load_does_not_count() -> None:
    readings = (GpuReading(SMALL.uuid, memory_free_bytes=0, utilization_percent=100),)
    assert find_room(Resources(GpuRequest(1)), MIXED, readings, ()).gpus == (GpuShare(SMALL.uuid),)


def test_processors_and_memory_are_counted() -> None:
    asks = Resources(NO_GPU, cpus=4, memory_bytes=32 * GB)
    assert find_room(asks, MIXED, (), [used(cpus=4, memory_bytes=32 * GB)]).refusal == ""
    assert "is busy: 3 of 8 processors" in find_room(asks, MIXED, (), [used(cpus=5)]).refusal
    assert "GB of memory free" in find_room(asks, MIXED, (), [used(memory_bytes=40 * GB)]).refusal
    assert find_room(Resources(NO_GPU, cpus=9), MIXED, (), ()).refusal == "has 8 processors, the job asks for 9"


def test_job_that_names_nothing_occupies_a_processor() -> None:
    assert wanted_cpus(Resources(NO_GPU)) == 1
    assert wanted_cpus(Resources(NO_GPU, cpus=3)) == 3
    assert wanted_cpus(Resources(GpuRequest(1))) == 0


requests = st.sampled_from(["1", "2", "3", "8GB", "5GB", "12GB", "24GB", "2x20GB", "4090", "a100", "rtx:2", "1x10GB"])


@given(st.lists(requests, max_size=30))
def test_grants_never_exceed_a_gpu(texts: list[str]) -> None:
    allocations: list[Allocation] = []
    for text in texts:
        found = find_room(Resources(parse_gpus(text)), MIXED, (), allocations)
        if not found.refusal:
            assert len(found.gpus) == parse_gpus(text).count
            allocations.append(used(*found.gpus))
    for gpu in MIXED.inventory.gpus:
        shares = [share for allocation in allocations for share in allocation.gpus if share.uuid == gpu.uuid]
        if any(share.is_whole for share in shares):
            assert len(shares) == 1
        assert sum(share.memory_bytes for share in shares) <= gpu.memory_total_bytes


# -- ranking -----------------------------------------------------------------------------------------------------------


def machine(name: str, *gpus: Gpu, allocations: tuple[Allocation, ...] = (), refusal: str = "") -> Candidate:
    record = NodeRecord("1", (), Inventory(8, 64 * GB, gpus))
    return Candidate(NodeId(name), name, record, Capacity((), allocations), refusal, Rule.BUSY if refusal else None)


def test_smaller_class_comes_first_and_large_gpus_stay_free() -> None:
    candidates = [machine("huge", HUGE), machine("small", SMALL), machine("large", LARGE)]
    assert rank(Resources(GpuRequest(1)), candidates, random.Random(1)) == ["small", "large", "huge"]


def test_equal_machines_are_asked_in_random_order_and_only_three() -> None:
    candidates = [machine(f"m{number}", SMALL) for number in range(9)]
    orders = {tuple(rank(Resources(GpuRequest(1)), candidates, random.Random(seed))) for seed in range(50)}
    assert all(len(order) == OFFERS for order in orders)
    assert len({order[0] for order in orders}) == 9


def test_machines_that_are_full_closed_or_unknown_are_not_asked() -> None:
    candidates = [
        machine("full", SMALL, allocations=(used(GpuShare(SMALL.uuid)),)),
        machine("closed", SMALL, refusal="does not answer"),
        Candidate(NodeId("unknown"), "unknown", None, None),
        machine("none"),
    ]
    assert rank(Resources(GpuRequest(1)), candidates, random.Random(1)) == []


def test_explanation_groups_machines_by_reason() -> None:
    candidates = [
        machine("b", refusal="does not answer"),
        machine("a", refusal="does not answer"),
        machine("c"),
        Candidate(NodeId("d"), "d", None, None),
    ]
    assert explain(Resources(GpuRequest(1)), candidates) == (
        "a, b does not answer; c has no GPU, the job asks for 1; d has not said yet what it has"
    )
    assert explain(Resources(GpuRequest(1)), []) == "no machine of the mesh lends anything"


def test_rank_does_not_depend_on_the_order_of_candidates() -> None:
    candidates = [machine(f"m{number}", SMALL) for number in range(5)]
    asks = Resources(GpuRequest(1))
    assert rank(asks, candidates, random.Random(3)) == rank(asks, candidates[::-1], random.Random(3))


@pytest.mark.parametrize(("typed", "meant"), [("rgi7", "rig7"), ("rig", "rig7"), ("zzzz", None)])
def test_nearest_name_is_what_was_meant(typed: str, meant: str | None) -> None:
    assert nearest_name(typed, ["rig7", "laptop"]) == meant


def test_readings_of_another_gpu_do_not_matter() -> None:
    readings = (replace(GpuReading(GpuId("GPU-other")), fault="lost"),)
    assert find_room(Resources(GpuRequest(3)), MIXED, readings, ()).refusal == ""
