"""What a job printed: records of an append-only ledger."""

from dataclasses import dataclass
from enum import StrEnum


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
