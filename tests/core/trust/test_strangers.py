"""Which addresses are heard at the pairing listener."""

from collections.abc import Callable

import pytest

from meshgpu.core.trust.strangers import ADDRESSES_LIMIT, FAILURES_LIMIT, MUTED_S, Strangers
from meshgpu.errors import MeshgpuError
from meshgpu.model.clock import Now

Clock = Callable[[float], Now]


def test_address_that_fails_too_often_is_muted_and_no_other(at: Clock) -> None:
    strangers = Strangers()
    for number in range(FAILURES_LIMIT):
        strangers.check(at(number), "10.0.0.66")
        strangers.failed(at(number), "10.0.0.66")
    with pytest.raises(MeshgpuError) as muted:
        strangers.check(at(FAILURES_LIMIT), "10.0.0.66")
    assert muted.value.code == "busy"
    strangers.check(at(FAILURES_LIMIT), "10.0.0.6")


def test_muted_address_is_heard_again_when_its_failures_are_old(at: Clock) -> None:
    strangers = Strangers()
    for number in range(FAILURES_LIMIT):
        strangers.failed(at(number), "10.0.0.66")
    with pytest.raises(MeshgpuError):
        strangers.check(at(MUTED_S - 1), "10.0.0.66")
    strangers.check(at(MUTED_S), "10.0.0.66")
    strangers.failed(at(MUTED_S), "10.0.0.66")
    with pytest.raises(MeshgpuError):
        strangers.check(at(MUTED_S), "10.0.0.66")


def test_flood_of_addresses_is_bounded_and_forgets_the_oldest_first(at: Clock) -> None:
    strangers = Strangers()
    strangers.failed(at(0), "young")
    for _ in range(FAILURES_LIMIT):
        strangers.failed(at(0), "old")
    for _ in range(FAILURES_LIMIT - 1):
        strangers.failed(at(1), "young")
    for number in range(ADDRESSES_LIMIT - 1):
        strangers.failed(at(2), f"10.0.{number // 256}.{number % 256}")
    strangers.check(at(3), "old")
    with pytest.raises(MeshgpuError):
        strangers.check(at(3), "young")
    assert len(strangers._failures) == ADDRESSES_LIMIT
