import asyncio
from pathlib import Path

import pytest

from meshgpu.adapters.log_ledger import follow, read_records
from meshgpu.errors import MeshgpuError
from meshgpu.guard import LEDGER_HEADER, RECORD_LIMIT_BYTES
from meshgpu.model.logs import LogRecord, LogStream

DEADLINE_S = 10.0


def record(data: bytes, stream: int = 1, wall_s: float = 1000.5) -> bytes:
    return LEDGER_HEADER.pack(stream, wall_s, len(data)) + data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_missing_ledger_is_empty(path: Path) -> None:
    assert read_records(path, 0, 1000) == []


def test_records_keep_stream_time_and_position(path: Path) -> None:
    append(path, record(b"one") + record(b"two", stream=2, wall_s=1001.25))
    first_end = LEDGER_HEADER.size + 3
    assert read_records(path, 0, 1000) == [
        LogRecord(LogStream.STDOUT, 1000.5, b"one", first_end),
        LogRecord(LogStream.STDERR, 1001.25, b"two", 2 * first_end),
    ]
    assert [found.data for found in read_records(path, first_end, 1000)] == [b"two"]


def test_torn_tail_waits_until_it_is_whole(path: Path) -> None:
    whole = record(b"first") + record(b"second")
    for cut in range(len(record(b"first")), len(whole)):
        path.write_bytes(whole[:cut])
        assert [found.data for found in read_records(path, 0, 1000)] == [b"first"]
    path.write_bytes(whole)
    assert [found.data for found in read_records(path, 0, 1000)] == [b"first", b"second"]


def test_limit_ends_a_read_but_never_starves_it(path: Path) -> None:
    append(path, record(b"x" * RECORD_LIMIT_BYTES) + record(b"y") * 3)
    (first,) = read_records(path, 0, 1)
    assert len(first.data) == RECORD_LIMIT_BYTES
    assert [found.data for found in read_records(path, first.position, 2)] == [b"y", b"y"]


@pytest.mark.parametrize(
    "bad", [record(b"x", stream=3), LEDGER_HEADER.pack(1, 0.0, RECORD_LIMIT_BYTES + 1), LEDGER_HEADER.pack(1, 0.0, 0)]
)
def test_wrong_position_is_named(path: Path, bad: bytes) -> None:
    append(path, record(b"one") + bad)
    with pytest.raises(MeshgpuError, match="at byte 16: no record starts there") as caught:
        read_records(path, 0, 1000)
    assert caught.value.code == "bad-ledger"


async def test_follow_sees_each_record_once_and_ends_after_the_last(path: Path) -> None:
    expected = [str(number).encode() for number in range(200)]
    is_over = False

    async def write() -> None:
        nonlocal is_over
        for data in expected:
            whole = record(data)
            append(path, whole[:7])
            await asyncio.sleep(0)
            append(path, whole[7:])
        is_over = True

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        assert [found.data async for found in follow(path, 0, lambda: is_over)] == expected


async def test_follow_reads_what_came_with_the_end(path: Path) -> None:
    """The last record may be written between a look at the ledger and the end of the job."""

    def ended() -> bool:
        append(path, record(b"last words"))
        return True

    async with asyncio.timeout(DEADLINE_S):
        async for found in follow(path, 0, ended):
            assert found.data == b"last words"
            break
        else:
            pytest.fail("the record was missed")


async def test_follow_resumes_where_it_was_left(path: Path) -> None:
    append(path, record(b"one") + record(b"two"))
    async with asyncio.timeout(DEADLINE_S):
        first = [found async for found in follow(path, 0, lambda: True)]
        assert [found.data async for found in follow(path, first[0].position, lambda: True)] == [b"two"]
