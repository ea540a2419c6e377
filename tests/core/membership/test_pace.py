"""Who says too much is heard more slowly, and nobody else is."""

import random

import pytest

from meshgpu.core.membership.pace import BURST_S, BYTES_PER_S, FRAMES_PER_S, Paces
from meshgpu.model.clock import Now
from meshgpu.model.ids import NodeId

EVE, ADA = NodeId("e" * 52), NodeId("a" * 52)


def at(time_s: float) -> Now:
    return Now(time_s, 1_800_000_000.0 + time_s, "boot")


@pytest.mark.parametrize(("size", "per_s"), [(10, FRAMES_PER_S), (64 * 1024, BYTES_PER_S / (64 * 1024))])
def test_member_that_sends_without_end_is_heard_at_the_rate_that_we_can_bear(size: int, per_s: float) -> None:
    paces, time_s, frames = Paces(), 0.0, 0
    while time_s < 60.0:
        time_s += paces.heard(at(time_s), EVE, size)
        frames += 1
    assert frames == pytest.approx(per_s * (60.0 + BURST_S), rel=0.02)


def test_others_are_not_held_back() -> None:
    paces = Paces()
    for _ in range(100):
        paces.heard(at(0), EVE, 2**20)
    assert paces.heard(at(0), EVE, 1) > 0
    assert paces.heard(at(0), ADA, 2**20) == 0


def test_member_that_says_what_members_say_never_waits() -> None:
    paces, rng, time_s = Paces(), random.Random(1), 0.0
    for _ in range(20_000):
        time_s += rng.expovariate(FRAMES_PER_S / 2)
        assert paces.heard(at(time_s), EVE, rng.randrange(2_000)) == 0


def test_credit_of_a_silent_member_does_not_grow_without_end() -> None:
    paces = Paces()
    paces.heard(at(0), EVE, 1)
    waits = [paces.heard(at(1e6), EVE, 1) for _ in range(int(FRAMES_PER_S * BURST_S) + 1)]
    assert waits[-2] == 0 < waits[-1]
