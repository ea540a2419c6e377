"""What a node and a job's stewards keep of the newest output."""

import random

from meshgpu.core.jobs.tail import Tail
from meshgpu.model.logs import TAIL_BYTES, LogChunk


def chunk(start: int, size: int) -> LogChunk:
    return LogChunk(start, start + size, bytes([start % 251]) * size)


def test_chunks_that_follow_are_one() -> None:
    tail = Tail()
    assert tail.whole() is None
    tail.add(LogChunk(0, 3, b"abc"))
    tail.add(LogChunk(3, 5, b"de"))
    assert tail.whole() == LogChunk(0, 5, b"abcde")


def test_at_least_the_newest_part_is_kept_and_hardly_more() -> None:
    rng = random.Random(1)
    tail, end = Tail(), 0
    for _ in range(300):
        size = rng.randint(1, TAIL_BYTES)
        tail.add(chunk(end, size))
        end += size
        whole = tail.whole()
        assert whole is not None
        assert whole.end == end
        assert min(end, TAIL_BYTES) <= whole.end - whole.start == len(whole.data) < 2 * TAIL_BYTES


def test_gap_begins_anew() -> None:
    tail = Tail()
    tail.add(LogChunk(0, 3, b"abc"))
    tail.add(LogChunk(7, 9, b"xy"))
    assert tail.whole() == LogChunk(7, 9, b"xy")


def test_what_is_known_is_passed_over_and_a_longer_tail_taken() -> None:
    tail = Tail()
    tail.add(LogChunk(4, 6, b"ef"))
    tail.add(LogChunk(4, 6, b"ef"))
    tail.add(LogChunk(2, 5, b"cde"))
    assert tail.whole() == LogChunk(4, 6, b"ef")
    tail.add(LogChunk(0, 7, b"abcdefg"))
    assert tail.whole() == LogChunk(0, 7, b"abcdefg")
