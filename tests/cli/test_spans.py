"""Spans and moments as people type them."""

import time
from collections.abc import Iterator

import pytest

from meshgpu.cli.spans import parse_moment
from meshgpu.errors import MeshgpuError


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """2026-03-28 17:30:00 in Berlin, the evening before its clocks are set forward."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield time.mktime((2026, 3, 28, 17, 30, 0, 0, 0, -1))
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(("text", "after_s"), [("18:00", 1800), ("17:30", 23 * 3600), ("9:05", 52_500)])
def test_moment_is_the_next_time_that_the_clock_shows_it(now: float, text: str, after_s: float) -> None:
    assert parse_moment(text, now, "") - now == after_s


def test_moment_may_be_a_span(now: float) -> None:
    assert parse_moment("30m", now, "") == now + 1800


@pytest.mark.parametrize("text", ["24:00", "12:60", "noon", "18:00:00"])
def test_moment_that_is_none_is_refused_with_an_example(now: float, text: str) -> None:
    with pytest.raises(MeshgpuError) as caught:
        parse_moment(text, now, "--start-by 30m")
    assert caught.value.hint == "--start-by 30m"
