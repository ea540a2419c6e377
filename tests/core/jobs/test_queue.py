"""Whose turn it is when jobs wait, and what room is made for them."""

import random
from collections.abc import Callable

import pytest

from meshgpu.core.effects import Send
from meshgpu.core.jobs.held_job import HeldJob
from meshgpu.core.jobs.offering import Offering, OfferTiming
from meshgpu.core.jobs.placement import Candidate
from meshgpu.core.jobs.queue import ADVANCE_S, CLAIM_AFTER_S, Crowd, Order, lines, loads
from meshgpu.core.jobs.replica import Replica
from meshgpu.model.clock import Now
from meshgpu.model.gossip import Allocation, Capacity, Line, NodeRecord, Used
from meshgpu.model.ids import GpuId, JobId, NodeId, UserName
from meshgpu.model.inventory import Gpu, Inventory
from meshgpu.model.job import JobSpec, JobState, Priority, Register
from meshgpu.model.messages import Offer
from meshgpu.model.resources import GB, NO_GPU, GpuRequest, GpuShare, Resources
from meshgpu.model.trust import Signed

ADA, BOB = UserName("ada"), UserName("bob")
ALONE = Crowd({}, {})
Sign = Callable[..., tuple[JobSpec, Signed]]
Make = Callable[..., HeldJob]


@pytest.fixture
def job(signed: Sign) -> Make:
    """A job that waits since `since_s`; `name` tells it from the others."""
    count = iter(range(1000))

    def make(name: str, user: UserName = ADA, since_s: float = 0.0, **changes: object) -> HeldJob:
        spec, envelope = signed(next(count), name=name, user=user, **changes)
        register = Register(spec.job, JobState.QUEUED, submitted_wall_s=since_s)
        return HeldJob(spec, envelope, register, Replica(spec.stewards[0], spec.stewards), lambda node: node)

    return make


def turns(jobs: list[HeldJob], crowd: Crowd = ALONE, *, has_room: bool = True) -> list[str]:
    """The names, in their turn; with room each is given what it wants."""
    order = Order(jobs, crowd)
    names: list[str] = []
    while (found := order.next()) is not None:
        names.append(found.spec.name)
        if has_room:
            order.given(found)
    return names


def test_oldest_goes_first(job: Make) -> None:
    assert turns([job("late", since_s=3), job("early", since_s=1), job("between", since_s=2)]) == [
        "early",
        "between",
        "late",
    ]


def test_jobs_of_one_moment_go_as_they_came(job: Make) -> None:
    assert turns([job(f"trial{number}") for number in range(20)]) == [f"trial{number}" for number in range(20)]


def test_priority_goes_before_age_and_before_shares(job: Make) -> None:
    high, low = job("high", BOB, 9, priority=Priority.HIGH), job("low", ADA, 0, priority=Priority.LOW)
    assert turns([low, job("normal", ADA, 5), high], Crowd({BOB: 1e9}, {})) == ["high", "normal", "low"]


def test_who_had_less_goes_first_however_young(job: Make) -> None:
    assert turns([job("a", ADA, 0), job("b", BOB, 100)], Crowd({ADA: 3600.0}, {})) == ["b", "a"]


def test_users_take_turns_where_there_is_room(job: Make) -> None:
    many = [job(f"a{number}", ADA, number) for number in range(4)]
    few = [job("b0", BOB, 100), job("b1", BOB, 101)]
    assert turns([*many, *few]) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_who_gets_nothing_loses_no_turn(job: Make) -> None:
    many = [job(f"a{number}", ADA, number) for number in range(3)]
    assert turns([*many, job("b", BOB, 100)], has_room=False) == ["a0", "a1", "a2", "b"]


def test_large_jobs_count_for_what_they_take(job: Make) -> None:
    large = [job(f"a{number}", ADA, number, resources=Resources(GpuRequest(4))) for number in range(2)]
    small = [job(f"b{number}", BOB, 100 + number) for number in range(5)]
    assert turns([*large, *small]) == ["a0", "b0", "b1", "b2", "b3", "a1", "b4"]
    part = Resources(GpuRequest(1, 8 * GB, shared=True))
    parts = [job(f"a{number}", ADA, number, resources=part) for number in range(4)]
    assert turns([*parts, *small[:2]]) == ["a0", "b0", "a1", "a2", "b1", "a3"]
    bare = [job(f"a{number}", ADA, number, resources=Resources(NO_GPU)) for number in range(3)]
    assert turns([*bare, *small[:2]]) == ["a0", "b0", "a1", "a2", "b1"]


def test_what_runs_counts_beside_what_was_used() -> None:
    whole, part = GpuShare(GpuId("a")), GpuShare(GpuId("b"), 8 * GB)
    running = (
        Allocation(JobId("j" * 26), 1, "train", ADA, (whole, whole)),
        Allocation(JobId("k" * 26), 1, "train", ADA, (part,)),
        Allocation(JobId("l" * 26), 1, "train", BOB, (), cpus=4),
        Allocation(JobId("m" * 26), 1, "train", BOB, (whole,), is_kept=True),
    )
    found = loads([Capacity((), running, used=(Used(ADA, 100.0),)), Capacity((), (), used=(Used(BOB, 50.0),))])
    assert found == {ADA: 100.0 + 2.5 * ADVANCE_S, BOB: 50.0 + 0.1 * ADVANCE_S}


def test_job_lets_those_stewards_pass_whose_jobs_go_first(job: Make) -> None:
    def line(user: UserName, first_s: float, priority: Priority = Priority.NORMAL) -> tuple[Line, ...]:
        return (Line(user, priority, 1, first_s, first_s),)

    older, younger, high = line(ADA, 1), line(ADA, 20), line(ADA, 20, Priority.HIGH)
    crowd = Crowd({}, dict(zip(map(NodeId, "abcd"), (older, younger, high, ()), strict=True)))
    before = [key < crowd.key_of(job("mine", ADA, 10)) for key in crowd.heads()]
    assert before == [True, True, False]
    urgent = job("mine", ADA, 10, priority=Priority.HIGH)
    assert min(crowd.heads()) > crowd.key_of(urgent)
    assert Crowd({BOB: 1.0}, {NodeId("a"): line(BOB, 1)}).heads() > [crowd.key_of(job("mine", ADA, 10))]


def test_ahead_of_a_job_are_those_that_go_first(job: Make) -> None:
    there = {
        NodeId("a"): (Line(ADA, Priority.NORMAL, 3, 1, 9), Line(BOB, Priority.HIGH, 2, 50, 60)),
        NodeId("b"): (Line(ADA, Priority.NORMAL, 4, 1, 4), Line(BOB, Priority.LOW, 5, 1, 1)),
    }
    assert Crowd({}, there).ahead(ADA, Priority.NORMAL, 5) == {ADA: 2 + 4, BOB: 2}
    assert Crowd({}, there).ahead(ADA, Priority.NORMAL, 1) == {BOB: 2}
    assert Crowd({BOB: 1.0}, there).ahead(BOB, Priority.LOW, 1) == {ADA: 7, BOB: 2}


def test_room_goes_to_users_in_turn(job: Make, at: Callable[[float], Now]) -> None:
    gpus = tuple(Gpu(GpuId(f"GPU-{index}"), index, "RTX 4090", 24 * 2**30) for index in range(8))
    room = Candidate(NodeId("rig"), "rig", NodeRecord("1", (), Inventory(8, 64 * GB, gpus)), Capacity((), ()))
    offering = Offering(random.Random(1), lambda _guest, _machine: [room], lambda: ALONE, OfferTiming())
    jobs = [job(name, user, since_s) for name, user, since_s in (("a0", ADA, 0), ("a1", ADA, 1), ("b0", BOB, 2))]
    names = {held.spec.job: held.spec.name for held in jobs}
    for held in jobs:
        held.replica.ask()
    effects = offering.place_waiting(at(0), jobs)
    offers = [effect.message for effect in effects if isinstance(effect, Send)]
    assert [names[offer.job] for offer in offers if isinstance(offer, Offer)] == ["a0", "b0", "a1"]


def test_only_the_head_of_the_queue_claims(job: Make, at: Callable[[float], Now]) -> None:
    gpu = Gpu(GpuId("GPU-0"), 0, "RTX 4090", 24 * 2**30)
    taken = Allocation(JobId("o" * 26), 1, "other", BOB, (GpuShare(gpu.uuid),))
    full = Candidate(NodeId("rig"), "rig", NodeRecord("1", (), Inventory(8, 64 * GB, (gpu,))), Capacity((), (taken,)))
    offering = Offering(random.Random(1), lambda _guest, _machine: [full], lambda: ALONE, OfferTiming())
    first, second = job("first", ADA, 0), job("second", ADA, 1, resources=Resources(GpuRequest(1), cpus=1))
    for held in (second, first):
        held.replica.ask()
        held.waits_since = at(0).wall_s
    offering.place_waiting(at(CLAIM_AFTER_S), [second, first])
    assert (list(first.offers), list(second.offers)) == ([NodeId("rig")], [])


def test_what_waits_is_told_in_a_line_for_each_user_and_priority(job: Make) -> None:
    waiting = [job("a", ADA, 5), job("b", ADA, 2), job("c", BOB, 3), job("d", ADA, 4, priority=Priority.HIGH)]
    assert lines(waiting) == (
        Line(ADA, Priority.HIGH, 1, 4, 4),
        Line(ADA, Priority.NORMAL, 2, 2, 5),
        Line(BOB, Priority.NORMAL, 1, 3, 3),
    )
