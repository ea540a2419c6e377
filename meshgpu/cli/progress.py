"""What is shown while something takes its time: one line on stderr that gives way to the next."""

import sys
import time
from shutil import get_terminal_size
from typing import Final

from meshgpu.cli.render import is_terminal, note, size

PATIENCE_S: Final = 0.5
"""What is done sooner is not worth a word."""

REDRAW_S: Final = 0.1
BAR_CELLS: Final = 24


class StatusLine:
    """On a terminal a line that is overwritten; elsewhere plain lines."""

    def __init__(self) -> None:
        self._terminal = is_terminal(sys.stderr)
        self._shown = False

    def show(self, text: str) -> None:
        if not self._terminal:
            note(text)
            return
        width = max(get_terminal_size().columns, 40) - 1
        print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
        self._shown = True

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False


class Progress:
    """How far `total_bytes` are: a bar on a terminal, one plain line elsewhere, nothing for the first half second."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self._label = label
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._begin_s = self._drawn_s = time.monotonic()
        self._line = StatusLine()
        self._bar = is_terminal(sys.stderr)
        self._told = False

    def add(self, more_bytes: int) -> None:
        self.update(self._done_bytes + more_bytes)

    def update(self, done_bytes: int) -> None:
        self._done_bytes = done_bytes
        now_s = time.monotonic()
        if now_s - self._begin_s < PATIENCE_S or now_s - self._drawn_s < REDRAW_S:
            return
        self._drawn_s = now_s
        if self._bar:
            self._line.show(self._drawing(done_bytes, now_s))
        elif not self._told:
            self._told = True
            note(f"{self._label} {size(self._total_bytes)}")

    def close(self) -> None:
        self._line.clear()

    def _drawing(self, done_bytes: int, now_s: float) -> str:
        cells = BAR_CELLS * min(done_bytes, self._total_bytes) // max(self._total_bytes, 1)
        rate = size(done_bytes / (now_s - self._begin_s))
        bar = "#" * cells + "." * (BAR_CELLS - cells)
        return f"{self._label} [{bar}] {size(done_bytes)} of {size(self._total_bytes)}, {rate}/s"
