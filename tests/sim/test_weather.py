"""Delay and loss, as streams and datagrams feel them."""

import random

import pytest

from meshgpu.sim.weather import RESEND_S, Weather


def drawn(weather: Weather, count: int = 20_000) -> list[float]:
    rng = random.Random(1)
    return [weather.stream_s(rng) for _ in range(count)]


def test_without_loss_a_stream_draws_one_number_for_each_message() -> None:
    """So that worlds without loss stay as they were."""
    one, other = random.Random(1), random.Random(1)
    assert Weather((0.001, 0.005)).stream_s(one) == 0.001 + 0.004 * other.random()
    assert one.random() == other.random()


def test_stream_waits_twice_as_long_for_each_loss_of_one_message() -> None:
    waits = {round(took_s / RESEND_S) for took_s in drawn(Weather((0.0, 0.0), loss=0.3))}
    assert {0, 1, 3, 7} <= waits <= {2**losses - 1 for losses in range(30)}


def test_as_many_messages_are_late_as_packets_are_lost() -> None:
    late = sum(took_s > 0.1 for took_s in drawn(Weather(loss=0.1)))
    assert late / 20_000 == pytest.approx(0.1, abs=0.01)


def test_datagram_that_is_lost_is_lost() -> None:
    rng, weather = random.Random(1), Weather(loss=0.1)
    took = [weather.datagram_s(rng) for _ in range(20_000)]
    assert sum(took_s is None for took_s in took) / 20_000 == pytest.approx(0.1, abs=0.01)
    assert max(took_s for took_s in took if took_s is not None) < 0.1


def test_jitter_is_a_mean() -> None:
    took = drawn(Weather((0.0, 0.0), jitter_s=0.02))
    assert sum(took) / len(took) == pytest.approx(0.02, rel=0.05)
