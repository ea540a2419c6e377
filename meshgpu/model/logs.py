"""What a job printed: records of an append-only ledger, and which of them somebody wants."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

TAIL_BYTES: Final = 64 * 1024
"""Of the newest output of an attempt, with what tells stream and time: what its job's stewards keep of it."""


class LogStream(StrEnum):
    STDOUT = "stdout"
    STDERR = "stderr"


@dataclass(frozen=True, slots=True)
class LogRecord:
    """Bytes that the job wrote to one stream at `wall_s`. `position` is where the next record starts in the ledger."""

    stream: LogStream
    wall_s: float
    data: bytes
    position: int


@dataclass(frozen=True, slots=True)
class LogGap:
    """`size_bytes` of the ledger, up to `position`, are not kept any more. 0 tells only where reading begins."""

    size_bytes: int
    position: int


LogPiece = LogRecord | LogGap


@dataclass(frozen=True, slots=True)
class LogChunk:
    """A stretch of a ledger, from `start` to `end`. data: its records as they travel."""

    start: int
    end: int
    data: bytes


@dataclass(frozen=True, slots=True)
class LogSelection:
    """Which part of a log is wanted: the newest `lines` (None: all) of what was taken from `since_wall_s` on.

    A line belongs to one stream. What stands last in each without a line end counts, and is wanted unless lines is 0.
    stream: None for both.
    """

    lines: int | None = None
    since_wall_s: float = 0.0
    stream: LogStream | None = None


WHOLE_LOG = LogSelection()
