"""The newest part of an attempt's log, as its node and the job's stewards keep it in memory."""

from collections import deque
from typing import Final

from meshgpu.model.logs import TAIL_BYTES, LogChunk

CHUNK_LIMIT_BYTES: Final = 3 * TAIL_BYTES
"""Of what another may say at once: a whole tail, which is less than two, and a record more."""


class Tail:
    """At least TAIL_BYTES where there are so many, and less than a chunk more; nothing is missing within."""

    def __init__(self) -> None:
        self._chunks: deque[LogChunk] = deque()

    def add(self, chunk: LogChunk) -> None:
        """What was printed next; one that does not follow begins anew, one that is known already is passed over."""
        if self._chunks and chunk.end <= self._chunks[-1].end:
            return
        if self._chunks and chunk.start != self._chunks[-1].end:
            self._chunks.clear()
        self._chunks.append(chunk)
        while sum(len(one.data) for one in self._chunks) - len(self._chunks[0].data) >= TAIL_BYTES:
            self._chunks.popleft()

    def whole(self) -> LogChunk | None:
        """All of it; None for nothing."""
        if not self._chunks:
            return None
        return LogChunk(self._chunks[0].start, self._chunks[-1].end, b"".join(chunk.data for chunk in self._chunks))
