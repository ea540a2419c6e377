"""Where a log begins for who wants its newest lines, or those from a time on."""

import os
import random
from pathlib import Path

import pytest

from meshgpu import guard
from meshgpu.adapters.log_ledger import LedgerReader
from meshgpu.adapters.log_search import find_begin, select
from meshgpu.guard import LEDGER_HEADER, Ledger, LedgerBounds
from meshgpu.model.logs import LogRecord, LogSelection, LogStream

NUMBERS = {LogStream.STDOUT: 1, LogStream.STDERR: 2}
OUT, ERR = LogStream
Line = tuple[LogStream, float, bytes]


def write(path: Path, *prints: Line, keep_bytes: int = 10**6) -> None:
    ledger = Ledger(str(path), LedgerBounds(keep_bytes=keep_bytes, keep_free_bytes=0))
    for stream, wall_s, data in prints:
        ledger.append(LEDGER_HEADER.pack(NUMBERS[stream], wall_s, len(data)) + data)
    os.close(ledger.descriptor)


def read(path: Path, selection: LogSelection) -> dict[LogStream, bytes]:
    """What each stream tells of the selection."""
    begin = find_begin(path, selection)
    reader = LedgerReader(path, begin.position)
    told = dict.fromkeys(LogStream, b"")
    while pieces := reader.read(100):
        for piece in pieces:
            if isinstance(kept := begin.keep(piece), LogRecord):
                told[kept.stream] += kept.data
    return told


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(guard, "LEDGER_FILE_BYTES", 300)
    return tmp_path / "log"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (None, b"one\ntwo\nthree\n"),
        (5, b"one\ntwo\nthree\n"),
        (3, b"one\ntwo\nthree\n"),
        (2, b"two\nthree\n"),
        (0, b""),
    ],
)
def test_newest_lines(path: Path, lines: int | None, told: bytes) -> None:
    write(path, (OUT, 1.0, b"one\ntw"), (OUT, 2.0, b"o\n"), (OUT, 3.0, b"three\n"))
    assert read(path, LogSelection(lines))[OUT] == told


def test_line_without_an_end_counts(path: Path) -> None:
    write(path, (OUT, 1.0, b"one\ntwo\n"), (ERR, 1.0, b"50 %\r"), (OUT, 1.0, b"thr"), (ERR, 2.0, b"60 %\r"))
    assert read(path, LogSelection(2)) == {OUT: b"thr", ERR: b"50 %\r60 %\r"}
    assert read(path, LogSelection(3)) == {OUT: b"two\nthr", ERR: b"50 %\r60 %\r"}


def test_line_of_one_stream_is_not_cut_by_the_other(path: Path) -> None:
    write(path, (OUT, 1.0, b"old\nab"), (ERR, 1.0, b"x\ny\n"), (OUT, 1.0, b"cd\n"))
    assert read(path, LogSelection(2)) == {OUT: b"abcd\n", ERR: b"y\n"}


def test_stream_is_chosen_before_lines_are_counted(path: Path) -> None:
    write(path, (ERR, 1.0, b"one\ntwo\n"), (OUT, 2.0, b"noise\n" * 20))
    assert read(path, LogSelection(1, stream=ERR)) == {OUT: b"", ERR: b"two\n"}


def test_time_chooses_records_and_lines_the_newest_of_them(path: Path) -> None:
    write(path, *[(OUT, float(number), b"%d\n" % number) for number in range(1, 200)])
    assert read(path, LogSelection(since_wall_s=150.5))[OUT].split() == [b"%d" % n for n in range(151, 200)]
    assert read(path, LogSelection(3, since_wall_s=150.0))[OUT] == b"197\n198\n199\n"
    assert read(path, LogSelection(1000, since_wall_s=150.0))[OUT].split() == [b"%d" % n for n in range(150, 200)]
    assert read(path, LogSelection(since_wall_s=200.0))[OUT] == b""
    assert read(path, LogSelection(since_wall_s=0.5))[OUT].count(b"\n") == 199


def test_clock_that_was_set_back_loses_nothing_after_the_moment(path: Path) -> None:
    write(path, (OUT, 10.0, b"a\n"), (OUT, 20.0, b"b\n"), (OUT, 5.0, b"c\n"))
    assert read(path, LogSelection(since_wall_s=15.0))[OUT] == b"b\nc\n"


def test_more_than_is_kept_begins_at_the_gap(path: Path) -> None:
    write(path, *[(OUT, float(number), b"%d\n" % number) for number in range(1, 500)], keep_bytes=900)
    for selection in (LogSelection(), LogSelection(10_000), LogSelection(since_wall_s=2.0)):
        assert find_begin(path, selection).position == 0
    assert find_begin(path, LogSelection(3)).position > 0
    assert read(path, LogSelection(3))[OUT] == b"497\n498\n499\n"


@pytest.mark.parametrize("file_bytes", [60, 300, 10**6])
@pytest.mark.parametrize("seed", range(20))
def test_newest_lines_of_any_log_are_those_of_a_simple_count(
    path: Path, seed: int, file_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a reader that has the whole log before it."""
    monkeypatch.setattr(guard, "LEDGER_FILE_BYTES", file_bytes)
    rng = random.Random(seed)
    prints: list[Line] = [
        (rng.choice((OUT, ERR)), float(moment), bytes(rng.choices(b"ab\n", (3, 3, 2), k=rng.randint(1, 12))))
        for moment in range(60)
    ]
    write(path, *prints)
    ends = [stream for stream, _, data in prints for _ in range(data.count(b"\n"))]
    whole = {stream: b"".join(data for other, _, data in prints if other is stream) for stream in LogStream}
    tails = [stream for stream in LogStream if not whole[stream].endswith(b"\n")]
    for lines in (1, 2, 7, 30):
        wanted = [*ends[len(ends) - max(0, lines - len(tails)) :], *tails]
        told = read(path, LogSelection(lines))
        for stream in LogStream:
            parts = whole[stream].splitlines(keepends=True)
            newest = b"".join(parts[len(parts) - wanted.count(stream) :])
            if file_bytes == 10**6:
                assert told[stream] == newest
            else:  # a line's head, or a tail that grew no more, may lie in an earlier file
                assert whole[stream].endswith(told[stream])
                assert told[stream].count(b"\n") >= newest.count(b"\n")
        assert sum(data.count(b"\n") for data in told.values()) <= lines
        short = select([LogRecord(stream, wall_s, data, 0) for stream, wall_s, data in prints], LogSelection(lines))
        for stream in LogStream:
            parts = whole[stream].splitlines(keepends=True)
            kept = b"".join(record.data for record in short if record.stream is stream)
            assert kept == b"".join(parts[len(parts) - wanted.count(stream) :])
