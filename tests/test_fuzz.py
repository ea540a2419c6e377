"""A bounded share of `make fuzz`."""

from pathlib import Path

from tests.fuzz import fuzz


def test_nothing_forged_mutated_or_replayed_has_an_effect(tmp_path: Path) -> None:
    tried = fuzz(4_000, 7, tmp_path)
    assert min(tried[kind] for kind in ("replayed", "flipped", "cut", "grown", "spliced", "misdirected")) > 100
