"""A bounded share of `make fuzz`."""

from pathlib import Path

from tests.fuzz import fuzz
from tests.fuzz_parsers import at_random


def test_nothing_forged_mutated_or_replayed_has_an_effect(tmp_path: Path) -> None:
    tried = fuzz(4_000, 7, tmp_path)
    assert min(tried[kind] for kind in ("replayed", "flipped", "cut", "grown", "spliced", "misdirected")) > 100


def test_parsers_read_or_refuse_whatever_comes_and_write_what_they_read(tmp_path: Path) -> None:
    came = at_random(6_000, 7, tmp_path)
    assert came.keys() == {"read", "refused"}
    assert min(came.values()) > 300
