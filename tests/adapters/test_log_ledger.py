import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshgpu import guard
from meshgpu.adapters.log_ledger import LedgerReader, follow, ledger_digest, ledger_files
from meshgpu.errors import MeshgpuError
from meshgpu.guard import LEDGER_HEADER, RECORD_LIMIT_BYTES, Ledger, LedgerBounds
from meshgpu.model.ids import NO_DIGEST, digest
from meshgpu.model.logs import LogGap, LogPiece, LogRecord, LogStream

DEADLINE_S = 10.0
FILE_BYTES = 1000
"""Of a file of a ledger in tests that go through several."""


def record(data: bytes, stream: int = 1, wall_s: float = 1000.5) -> bytes:
    return LEDGER_HEADER.pack(stream, wall_s, len(data)) + data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def all_of(reader: LedgerReader, limit_bytes: int = 1000) -> list[LogPiece]:
    found: list[LogPiece] = []
    while pieces := reader.read(limit_bytes):
        found += pieces
    return found


def data_of(pieces: list[LogPiece]) -> list[bytes]:
    return [piece.data for piece in pieces if isinstance(piece, LogRecord)]


async def followed(reader: LedgerReader, ended: Callable[[], bool]) -> list[bytes]:
    return [data async for pieces in follow(reader, ended) for data in data_of(pieces)]


def test_missing_ledger_is_empty(path: Path) -> None:
    reader = LedgerReader(path)
    assert (reader.read(1000), reader.has_news(), ledger_digest(path)) == ([], False, NO_DIGEST)


def test_records_keep_stream_time_and_position(path: Path) -> None:
    append(path, record(b"one") + record(b"two", stream=2, wall_s=1001.25))
    first_end = LEDGER_HEADER.size + 3
    assert LedgerReader(path).read(1000) == [
        LogRecord(LogStream.STDOUT, 1000.5, b"one", first_end),
        LogRecord(LogStream.STDERR, 1001.25, b"two", 2 * first_end),
    ]
    assert data_of(LedgerReader(path, first_end).read(1000)) == [b"two"]


def test_torn_tail_waits_until_it_is_whole(path: Path) -> None:
    whole = record(b"first") + record(b"second")
    for cut in range(len(record(b"first")), len(whole)):
        path.write_bytes(whole[:cut])
        assert data_of(all_of(LedgerReader(path))) == [b"first"]
    path.write_bytes(whole)
    assert data_of(all_of(LedgerReader(path))) == [b"first", b"second"]


def test_limit_ends_a_read_but_never_starves_it(path: Path) -> None:
    append(path, record(b"x" * RECORD_LIMIT_BYTES) + record(b"y") * 3)
    reader = LedgerReader(path)
    (first,) = data_of(reader.read(1))
    assert len(first) == RECORD_LIMIT_BYTES
    assert data_of(reader.read(2)) == [b"y", b"y"]


@pytest.mark.parametrize(
    "bad", [record(b"x", stream=3), LEDGER_HEADER.pack(1, 0.0, RECORD_LIMIT_BYTES + 1), LEDGER_HEADER.pack(1, 0.0, 0)]
)
def test_wrong_position_is_named(path: Path, bad: bytes) -> None:
    append(path, record(b"one") + bad)
    with pytest.raises(MeshgpuError, match="at byte 16: no record starts there") as caught:
        LedgerReader(path).read(1000)
    assert caught.value.code == "bad-ledger"


# -- several files ---------------------------------------------------------------------------------------------------


def written(path: Path, count: int, keep_bytes: int = 10**6, keep_free_bytes: int = 0) -> Ledger:
    """A guard's ledger with records `0` to `count - 1`."""
    ledger = Ledger(str(path), LedgerBounds(keep_bytes=keep_bytes, keep_free_bytes=keep_free_bytes))
    for number in range(count):
        ledger.append(record(str(number).encode()))
    os.close(ledger.descriptor)
    return ledger


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LEDGER_FILE_BYTES", FILE_BYTES)


@pytest.mark.usefixtures("small_files")
def test_ledger_of_many_files_reads_as_one(path: Path) -> None:
    written(path, 500)
    assert len(ledger_files(path)) > 5
    whole = b"".join(name.read_bytes() for _, name in ledger_files(path))
    for position in (0, len(record(b"0")), 10 * len(record(b"0"))):
        count = position // len(record(b"0"))
        assert data_of(all_of(LedgerReader(path, position))) == [str(n).encode() for n in range(count, 500)]
    assert ledger_digest(path) == digest(whole)
    assert all(name.stat().st_size < FILE_BYTES + 100 for _, name in ledger_files(path))


@pytest.mark.usefixtures("small_files")
def test_head_beyond_the_bound_is_dropped_and_told(path: Path) -> None:
    written(path, 1000, keep_bytes=5 * FILE_BYTES)
    kept = sum(name.stat().st_size for _, name in ledger_files(path))
    assert 3 * FILE_BYTES < kept <= 5 * FILE_BYTES + 100
    gap, *records = all_of(LedgerReader(path))
    whole = sum(len(record(str(number).encode())) for number in range(1000))
    assert gap == LogGap(whole - kept, whole - kept)
    numbers = [int(data) for data in data_of(records)]
    assert numbers == list(range(numbers[0], 1000))
    assert records[-1].position == whole
    assert all_of(LedgerReader(path, records[0].position)) == records[1:]


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(("keep_bytes", "keep_free_bytes"), [(0, 0), (10**9, 2**62)], ids=["bound", "full disk"])
def test_newest_two_files_always_stay(path: Path, keep_bytes: int, keep_free_bytes: int) -> None:
    written(path, 1000, keep_bytes, keep_free_bytes)
    assert len(ledger_files(path)) == 2
    assert data_of(all_of(LedgerReader(path)))[-1] == b"999"


@pytest.mark.usefixtures("small_files")
def test_reader_that_is_overtaken_is_told_what_it_missed(path: Path) -> None:
    ledger = written(path, 100)
    reader = LedgerReader(path)
    first = reader.read(1)
    for start, name in ledger_files(path)[:-1]:
        assert start < reader.position or name.exists()
        name.unlink()
    (begin, _) = ledger_files(path)[0]
    assert reader.has_news()
    gap, *rest = all_of(reader)
    assert gap == LogGap(begin - first[0].position, begin)
    assert data_of(rest)[-1] == b"99"
    assert ledger.held == b""


def test_what_only_looks_like_a_part_of_the_ledger_is_none(path: Path) -> None:
    append(path, record(b"one"))
    for name in ("log.new", "log.²", "logs", "log.16.bak"):
        (path.parent / name).write_text("?")
    assert ledger_files(path) == [(0, path)]


# -- following -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_files")
async def test_follow_sees_each_record_once_and_ends_after_the_last(path: Path) -> None:
    expected = [str(number).encode() for number in range(200)]
    is_over = False

    async def write() -> None:
        nonlocal is_over
        ledger = Ledger(str(path), LedgerBounds(keep_bytes=10**6, keep_free_bytes=0))
        name, size = path, 0
        for data in expected:
            ledger.append(record(data))
            await asyncio.sleep(0)
            *_, (_, now) = ledger_files(path)
            name, size = now, now.stat().st_size
        os.close(ledger.descriptor)
        assert (name.name, size) != ("log", 0)
        is_over = True

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        assert await followed(LedgerReader(path), lambda: is_over) == expected


async def test_follow_waits_for_the_rest_of_a_torn_record(path: Path) -> None:
    whole = record(b"late")
    is_over = False

    async def write() -> None:
        nonlocal is_over
        append(path, whole[:7])
        await asyncio.sleep(0.05)
        append(path, whole[7:])
        is_over = True

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        assert await followed(LedgerReader(path), lambda: is_over) == [b"late"]


async def test_follow_reads_what_came_with_the_end(path: Path) -> None:
    """The last record may be written between a look at the ledger and the end of the job."""
    looks = 0

    def ended() -> bool:
        nonlocal looks
        looks += 1
        if looks == 1:
            append(path, record(b"last words"))
        return True

    async with asyncio.timeout(DEADLINE_S):
        assert await followed(LedgerReader(path), ended) == [b"last words"]


async def test_follow_resumes_where_it_was_left(path: Path) -> None:
    append(path, record(b"one") + record(b"two"))
    async with asyncio.timeout(DEADLINE_S):
        (first,) = LedgerReader(path).read(1)
        assert await followed(LedgerReader(path, first.position), lambda: True) == [b"two"]
