"""Spans and moments of time as people type them."""

import re
import time
from datetime import datetime
from typing import Final

from meshgpu.errors import MeshgpuError

UNITS_S: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_span(text: str, example: str) -> float:
    """`90`, `90s`, `1.5m`, `2h`, `1d` in seconds; raises MeshgpuError `bad-request` with `example` as its hint."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if match is None:
        raise MeshgpuError("bad-request", f"cannot read the time {text!r}: expected 90s, 10m or 2h", example)
    return float(match[1]) * UNITS_S[match[2]]


def parse_moment(text: str, now: float, example: str) -> float:
    """`18:00`, the next time that this machine's clock shows it, or a span from `now` on, in Unix time.

    Raises MeshgpuError `bad-request` as parse_span.
    """
    match = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", text.strip())
    if match is None:
        return now + parse_span(text, example)
    today = time.localtime(now)
    for day in (today.tm_mday, today.tm_mday + 1):
        clock = (today.tm_year, today.tm_mon, day, int(match[1]), int(match[2]), 0, 0, 0, -1)
        if (moment := time.mktime(clock)) > now:
            break
    return moment


def parse_since(text: str, now_wall_s: float) -> float:
    """Unix time of a span before now, or of a moment, in local time unless it says otherwise; raises `bad-request`."""
    if re.fullmatch(r"[\d.]+\s*[smhd]?", text.strip()):
        return max(0.0, now_wall_s - parse_span(text, "--since 10m"))
    try:
        return max(0.0, datetime.fromisoformat(text.strip()).timestamp())
    except (ValueError, OverflowError) as error:
        expected = "expected 10m, 2h or 2026-11-27T10:00"
        raise MeshgpuError("bad-request", f"cannot read the time {text!r}: {expected}", "--since 10m") from error
