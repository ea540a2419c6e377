"""Reads the ledger that a guard writes: the record of what a job printed, while it grows and after.

A position counts bytes from the ledger's beginning. The ledger lies in files, each named by its first position; the
oldest may be gone. So a position stays what it is, and a file does not change any more once there is a next one.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final

from meshgpu.errors import MeshgpuError
from meshgpu.guard import LEDGER_HEADER, RECORD_LIMIT_BYTES, ledger_file
from meshgpu.model.ids import NO_DIGEST, Digest
from meshgpu.model.logs import LogGap, LogPiece, LogRecord, LogStream

FIRST_WAIT_S: Final = 0.02
"""Between two looks at a ledger that just grew: well under what people notice."""
LONGEST_WAIT_S: Final = 0.1
"""Between two looks at a silent ledger, and so how late a line may be seen. A look costs a stat or two."""
STEP_BYTES: Final = 256 * 1024
"""Payload read at a time: some milliseconds, were it all short lines."""
_STREAMS: Final = {1: LogStream.STDOUT, 2: LogStream.STDERR}
_NUMBERS: Final = {stream: number for number, stream in _STREAMS.items()}


def as_written(record: LogRecord) -> bytes:
    """The record's bytes in the ledger that it was read from."""
    return LEDGER_HEADER.pack(_NUMBERS[record.stream], record.wall_s, len(record.data)) + record.data


def ledger_files(path: Path) -> list[tuple[int, Path]]:
    """[(position of its first record, file)] of what is kept of the ledger, in order."""
    found = [(0, path)] if path.exists() else []
    for name in path.parent.glob(f"{path.name}.*"):
        if (start := name.suffix[1:]).isdecimal():
            found.append((int(start), name))
    return sorted(found)


def ledger_digest(path: Path) -> Digest:
    """SHA-256 of what is kept of the ledger; NO_DIGEST where there is none. Blocks for as long as reading takes."""
    files = ledger_files(path)
    found = hashlib.sha256()
    for _, name in files:
        with name.open("rb") as file:
            while block := file.read(2**20):
                found.update(block)
    return Digest(found.hexdigest()) if files else NO_DIGEST


def records_in(data: bytes, position: int, path: Path) -> Iterator[tuple[LogStream, float, int, int]]:
    """(stream, Unix time, start, end) of the payload of each whole record in `data`, which stands at `position`.

    Raises MeshgpuError `bad-ledger` where none can start.
    """
    start = 0
    while len(data) - start >= LEDGER_HEADER.size:
        number, wall_s, length = LEDGER_HEADER.unpack_from(data, start)
        if number not in _STREAMS or not 0 < length <= RECORD_LIMIT_BYTES:
            raise MeshgpuError("bad-ledger", f"cannot read {path} at byte {position + start}: no record starts there")
        start += LEDGER_HEADER.size
        if start + length > len(data):
            return
        yield _STREAMS[number], wall_s, start, start + length
        start += length


class LedgerReader:
    """Reads on from `position`, past what is not kept any more. One thread at a time; `read` blocks."""

    def __init__(self, path: Path, position: int = 0) -> None:
        self._path = path
        self._start = 0
        self._file: Path | None = None
        self.position = position

    def has_news(self) -> bool:
        """Whether more is there than was read; a record that is not complete yet counts."""
        if self._file is None:
            return bool(ledger_files(self._path))
        try:
            if self._file.stat().st_size > self.position - self._start:
                return True
        except FileNotFoundError:
            return True
        return self._next_file() is not None

    def read(self, limit_bytes: int) -> list[LogPiece]:
        """What comes next: a gap, or whole records of about `limit_bytes` of payload; nothing at the end.

        A record that is not complete yet is left for later; a missing ledger is an empty one.
        Raises MeshgpuError `bad-ledger` where no record can start at the position.
        """
        while True:
            if self._file is None:
                files = ledger_files(self._path)
                if not files:
                    return []
                self._start, self._file = max((file for file in files if file[0] <= self.position), default=files[0])
                if self._start > self.position:
                    gap = LogGap(self._start - self.position, self._start)
                    self.position = self._start
                    return [gap]
            try:
                records = self._records(self._file, limit_bytes)
            except FileNotFoundError:  # it was let go meanwhile
                self._file = None
                continue
            if records:
                self.position = records[-1].position
                return [*records]
            if (following := self._next_file()) is None:
                return []
            self._start, self._file = self.position, following

    def _records(self, name: Path, limit_bytes: int) -> list[LogRecord]:
        with name.open("rb") as file:
            file.seek(self.position - self._start)
            data = file.read(limit_bytes + LEDGER_HEADER.size + RECORD_LIMIT_BYTES)
        records: list[LogRecord] = []
        payload = 0
        for stream, wall_s, start, end in records_in(data, self.position, name):
            records.append(LogRecord(stream, wall_s, data[start:end], self.position + end))
            payload += end - start
            if payload >= limit_bytes:
                break
        return records

    def _next_file(self) -> Path | None:
        """The file that begins where this one has been read to."""
        following = Path(ledger_file(str(self._path), self.position))
        return following if following != self._file and following.exists() else None


async def follow(reader: LedgerReader, ended: Callable[[], bool]) -> AsyncIterator[list[LogPiece]]:
    """What comes, as it comes; returns once `ended()` was true and all is read."""
    wait_s = FIRST_WAIT_S
    while True:
        is_last = ended()
        if is_last or reader.has_news():
            pieces = await asyncio.to_thread(reader.read, STEP_BYTES)
            if pieces:
                yield pieces
                wait_s = FIRST_WAIT_S
                if is_last or len(pieces) > 1:
                    continue
            elif is_last:
                return
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 1.5, LONGEST_WAIT_S)
