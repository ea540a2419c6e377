"""What an attempt printed since the last look; of much, only the newest part."""

from collections import deque
from pathlib import Path

from meshgpu.adapters.log_ledger import STEP_BYTES, LedgerReader, ledger_files
from meshgpu.guard import LEDGER_HEADER
from meshgpu.model.logs import TAIL_BYTES, LogChunk, LogRecord
from meshgpu.wire.logs import encode_piece


class TailReader:
    """Follows one ledger. All calls but `has_news` block; one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = LedgerReader(path)

    def has_news(self) -> bool:
        return self._reader.has_news()

    def read(self) -> LogChunk | None:
        """The newest records that fit TAIL_BYTES, or the newest alone; None where nothing was printed.

        Reads two files of the ledger at most.
        """
        files = ledger_files(self._path)
        if len(files) > 1 and self._reader.position < files[-2][0]:
            self._reader = LedgerReader(self._path, files[-2][0])
        kept: deque[tuple[LogRecord, bytes]] = deque()
        size = 0
        while pieces := self._reader.read(STEP_BYTES):
            for piece in pieces:
                if isinstance(piece, LogRecord):
                    kept.append((piece, encode_piece(piece)))
                    size += len(kept[-1][1])
                    while size > TAIL_BYTES and len(kept) > 1:
                        size -= len(kept.popleft()[1])
        if not kept:
            return None
        first, last = kept[0][0], kept[-1][0]
        start = first.position - len(first.data) - LEDGER_HEADER.size
        return LogChunk(start, last.position, b"".join(data for _, data in kept))
