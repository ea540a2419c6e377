"""Reads the ledger that a guard writes: the record of what a job printed, while it grows and after."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

from meshgpu.errors import MeshgpuError
from meshgpu.guard import LEDGER_HEADER, RECORD_LIMIT_BYTES
from meshgpu.model.logs import LogRecord, LogStream

FIRST_WAIT_S: Final = 0.02
"""Between two looks at a ledger that just grew: well under what people notice."""
LONGEST_WAIT_S: Final = 0.2
"""Between two looks at a silent ledger: a stat every 200 ms costs nothing."""
STEP_BYTES: Final = 256 * 1024
"""Payload read at a time while following."""
_STREAMS: Final = {1: LogStream.STDOUT, 2: LogStream.STDERR}
_NUMBERS: Final = {stream: number for number, stream in _STREAMS.items()}


def as_written(record: LogRecord) -> bytes:
    """The record's bytes in the ledger that it was read from."""
    return LEDGER_HEADER.pack(_NUMBERS[record.stream], record.wall_s, len(record.data)) + record.data


def read_records(path: Path, position: int, limit_bytes: int) -> list[LogRecord]:
    """Whole records from `position` on, about `limit_bytes` of payload, at least one if there is one.

    A record that is not complete yet is left for later; a missing ledger is an empty one.
    Raises MeshgpuError `bad-ledger` where no record can start at `position`.
    """
    try:
        with path.open("rb") as file:
            there = file.seek(0, os.SEEK_END) - position
            file.seek(position)
            data = file.read(max(0, min(there, limit_bytes + LEDGER_HEADER.size + RECORD_LIMIT_BYTES)))
    except FileNotFoundError:
        return []
    records: list[LogRecord] = []
    start = payload = 0
    while len(data) - start >= LEDGER_HEADER.size and (payload < limit_bytes or not records):
        number, wall_s, length = LEDGER_HEADER.unpack_from(data, start)
        if number not in _STREAMS or not 0 < length <= RECORD_LIMIT_BYTES:
            raise MeshgpuError("bad-ledger", f"cannot read {path} at byte {position + start}: no record starts there")
        end = start + LEDGER_HEADER.size + length
        if end > len(data):
            break
        body = data[start + LEDGER_HEADER.size : end]
        records.append(LogRecord(_STREAMS[number], wall_s, body, position + end))
        start, payload = end, payload + length
    return records


async def follow(path: Path, position: int, ended: Callable[[], bool]) -> AsyncIterator[LogRecord]:
    """Records from `position` on as they come; returns once `ended()` was true and all is read."""
    wait_s = FIRST_WAIT_S
    while True:
        is_last = ended()
        records = read_records(path, position, STEP_BYTES)
        for record in records:
            position = record.position
            yield record
        if records:
            wait_s = FIRST_WAIT_S
            if len(records) > 1 or is_last:
                continue
        elif is_last:
            return
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 1.5, LONGEST_WAIT_S)
