"""Finds where in a ledger to begin: at a time, or so many lines before its end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from meshgpu.adapters.log_ledger import ledger_files, records_in
from meshgpu.guard import LEDGER_HEADER
from meshgpu.model.logs import LogGap, LogPiece, LogRecord, LogSelection, LogStream


@dataclass(frozen=True, slots=True)
class Begin:
    """Where to read on, and what of that is wanted. cuts: {stream: (end of a record, offset in its payload)}, before
    which nothing of that stream is. stream: None for both.
    """

    position: int
    stream: LogStream | None = None
    cuts: Mapping[LogStream, tuple[int, int]] = field(default_factory=dict)

    def keep(self, piece: LogPiece) -> LogPiece | None:
        """What of it is wanted."""
        if isinstance(piece, LogGap):
            return piece
        if self.stream not in (None, piece.stream):
            return None
        end, offset = self.cuts.get(piece.stream, (0, 0))
        if piece.position > end:
            return piece
        data = piece.data[offset:] if piece.position == end else b""
        return replace(piece, data=data) if data else None


def find_begin(path: Path, selection: LogSelection) -> Begin:
    """Where what is selected begins: at 0 where more would be than is kept. Blocks, and reads a file of the ledger for
    every 8 MB that the lines take. A line that began in an earlier file than is read for them lacks its head.
    """
    while True:
        try:
            return _find(path, selection)
        except FileNotFoundError:  # the oldest file was let go meanwhile
            continue


def select(records: Sequence[LogRecord], selection: LogSelection) -> list[LogRecord]:
    """What is selected of a log's end that is in memory."""
    found = [
        record
        for record in records
        if record.wall_s >= selection.since_wall_s and selection.stream in (None, record.stream)
    ]
    if selection.lines is None:
        return found
    newest = {record.stream: record for record in found}
    tails = sum(not record.data.endswith(b"\n") for record in newest.values())
    skip = sum(record.data.count(b"\n") for record in found) + tails - selection.lines
    kept: list[LogRecord] = []
    for record in found if selection.lines else ():
        ends = min(record.data.count(b"\n"), max(skip, 0))
        if ends:
            skip -= ends
            kept = [other for other in kept if other.stream is not record.stream]
        if data := record.data.split(b"\n", ends)[-1]:
            kept.append(replace(record, data=data))
    return kept


def _find(path: Path, selection: LogSelection) -> Begin:
    files = ledger_files(path)
    first, position = _at(files, selection.since_wall_s)
    if selection.lines is None:
        return Begin(position, selection.stream)
    if selection.lines == 0:
        return Begin(_end(files), selection.stream)
    total = 0
    is_open: dict[LogStream, bool] = {}
    for index in range(len(files) - 1, first - 1, -1):
        start = max(files[index][0], position)
        ends, here_open = _count(files[index], start, selection.stream)
        total += ends + sum(is_it for stream, is_it in here_open.items() if stream not in is_open)
        is_open = here_open | is_open
        if total > selection.lines:
            return _skip(files[index:], start, total - selection.lines, selection.stream)
    return Begin(position, selection.stream)


def _at(files: list[tuple[int, Path]], since_wall_s: float) -> tuple[int, int]:
    """(index of a file, position in it) of the first record from then on; (0, 0) where even the oldest one is."""
    for index in range(len(files) - 1, -1, -1) if since_wall_s > 0 else ():
        start, name = files[index]
        with name.open("rb") as file:
            head = file.read(LEDGER_HEADER.size)
        if len(head) < LEDGER_HEADER.size or LEDGER_HEADER.unpack(head)[1] >= since_wall_s:
            continue
        position = start
        for _, wall_s, _, end in records_in(name.read_bytes(), start, name):
            if wall_s >= since_wall_s:
                break
            position = start + end
        return index, position
    return 0, 0


def _end(files: list[tuple[int, Path]]) -> int:
    if not files:
        return 0
    start, name = files[-1]
    ends = [end for _, _, _, end in records_in(name.read_bytes(), start, name)]
    return start + (ends[-1] if ends else 0)


def _count(file: tuple[int, Path], position: int, wanted: LogStream | None) -> tuple[int, dict[LogStream, bool]]:
    """(line ends from `position` on, {stream: whether its last line here has none})."""
    start, name = file
    data = name.read_bytes()[position - start :]
    ends = 0
    is_open: dict[LogStream, bool] = {}
    for stream, _, begin, end in records_in(data, position, name):
        if wanted in (None, stream):
            ends += data.count(b"\n", begin, end)
            is_open[stream] = data[end - 1] != ord("\n")
    return ends, is_open


def _skip(files: list[tuple[int, Path]], position: int, skip: int, wanted: LogStream | None) -> Begin:
    """Begin after the `skip` oldest line ends from `position` on, each stream after its own last one of them."""
    cuts: dict[LogStream, tuple[int, int]] = {}
    for start, name in files:
        here = max(start, position)
        data = name.read_bytes()[here - start :]
        for stream, _, begin, end in records_in(data, here, name):
            if wanted not in (None, stream):
                continue
            ends = min(data.count(b"\n", begin, end), skip)
            if ends:
                last = begin - 1
                for _ in range(ends):
                    last = data.index(b"\n", last + 1)
                cuts[stream] = (here + end, last + 1 - begin)
                skip -= ends
            if skip == 0:
                return Begin(position, wanted, cuts)
    return Begin(position, wanted, cuts)
