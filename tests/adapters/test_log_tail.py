import os
import random
from pathlib import Path

import pytest

from meshgpu import guard
from meshgpu.adapters.log_ledger import ledger_files
from meshgpu.adapters.log_tail import TailReader
from meshgpu.guard import LEDGER_HEADER, Ledger, LedgerBounds
from meshgpu.model.logs import TAIL_BYTES, LogChunk, LogRecord
from meshgpu.wire.logs import decode_pieces


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(str(tmp_path / "log"), LedgerBounds(keep_bytes=10**9, keep_free_bytes=0))


def put(ledger: Ledger, data: bytes, stream: int = 1) -> None:
    ledger.append(LEDGER_HEADER.pack(stream, 1000.0, len(data)) + data)


def records(chunk: LogChunk | None) -> list[LogRecord]:
    return [] if chunk is None else [piece for piece in decode_pieces(chunk.data) if isinstance(piece, LogRecord)]


def test_each_look_gives_what_is_new(ledger: Ledger, tmp_path: Path) -> None:
    reader = TailReader(tmp_path / "log")
    assert reader.read() is None
    put(ledger, b"one")
    put(ledger, b"two", stream=2)
    first = reader.read()
    assert [(record.stream, record.data) for record in records(first)] == [("stdout", b"one"), ("stderr", b"two")]
    assert (reader.has_news(), reader.read()) == (False, None)
    put(ledger, b"three")
    second = reader.read()
    assert [record.data for record in records(second)] == [b"three"]
    assert first is not None
    assert second is not None
    assert (first.start, first.end, second.end) == (0, second.start, os.fstat(ledger.descriptor).st_size)
    os.close(ledger.descriptor)


@pytest.mark.parametrize("size", [1, 100, 5000, guard.RECORD_LIMIT_BYTES])
def test_of_much_the_newest_part_is_told(
    ledger: Ledger, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LEDGER_FILE_BYTES", 100_000)
    rng = random.Random(size)
    printed = b""
    while len(printed) < max(20_000 if size == 1 else 300_000, 6 * size):
        data = rng.randbytes(size)
        printed += data
        put(ledger, data)
    os.close(ledger.descriptor)
    assert len(ledger_files(tmp_path / "log")) > 1
    chunk = TailReader(tmp_path / "log").read()
    assert chunk is not None
    told = b"".join(record.data for record in records(chunk))
    assert printed.endswith(told)
    assert len(chunk.data) <= TAIL_BYTES + size
    assert len(chunk.data) > TAIL_BYTES - size - 100
