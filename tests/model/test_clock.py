"""Spans of time in words."""

import pytest

from meshgpu.model.clock import span


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.5, "0.5 s"),
        (45, "45 s"),
        (90, "1 min 30 s"),
        (1800, "30 min"),
        (7200, "2 h"),
        (5400.0, "1 h 30 min"),
        (90_000, "1 d 1 h"),
        (86_400 * 366, "366 d"),
    ],
)
def test_span_is_told_exactly(seconds: float, words: str) -> None:
    assert span(seconds) == words
