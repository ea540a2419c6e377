"""Spans of time as people type them."""

import re
from typing import Final

from meshgpu.errors import MeshgpuError

UNITS_S: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_span(text: str, example: str) -> float:
    """`90`, `90s`, `1.5m`, `2h`, `1d` in seconds; raises MeshgpuError `bad-request` with `example` as its hint."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if match is None:
        raise MeshgpuError("bad-request", f"cannot read the time {text!r}: expected 90s, 10m or 2h", example)
    return float(match[1]) * UNITS_S[match[2]]
