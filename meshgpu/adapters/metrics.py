"""What a job reports of its objective: by `meshgpu.log`, or in the lines of its log."""

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from meshgpu.adapters.log_ledger import LedgerReader
from meshgpu.errors import MeshgpuError
from meshgpu.model.logs import LogGap, LogStream
from meshgpu.model.sweep import Metric, Objective, is_better

FILE: Final = "meshgpu-metrics.jsonl"
"""In the job's working directory, so that whoever fetches its results has the whole curve."""

LINE_LIMIT_BYTES: Final = 16 * 1024
"""Of a line that may hold a number; the rest of a longer one is not looked at."""

PIECE_BYTES: Final = 1024 * 1024


def compile_pattern(text: str) -> Any:
    """RE2: linear time, whatever its author had in mind. Raises MeshgpuError `bad-request`."""
    import re2  # a library of its own, which only sweeps over logs pay for

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(text.encode(), options)
    except re2.error as error:
        message = f"cannot use the pattern {text!r}: {error.args[0]!r}"
        raise MeshgpuError("bad-request", message, "--metric-regex 'loss=([0-9.e-]+)'") from error


class MetricReader:
    """Follows one attempt. All calls block; one thread at a time."""

    def __init__(self, directory: Path, objective: Objective) -> None:
        self._directory = directory
        self._objective = objective
        self._pattern = compile_pattern(objective.pattern) if objective.pattern else None
        self._ledger = LedgerReader(directory / "log")
        self._position = 0
        self._halves: dict[LogStream, bytes] = {}
        self._half = b""
        self._metric: Metric | None = None

    def read(self) -> Metric | None:
        """What the job has reported by now."""
        for value, step in self._matches() if self._pattern is not None else self._reports():
            best = value
            if self._metric is not None and not is_better(self._objective, value, self._metric.best):
                best = self._metric.best
            self._metric = Metric(value, best, step)
        return self._metric

    def _matches(self) -> Iterator[tuple[float, int | None]]:
        """Numbers that the pattern finds in what was printed since the last call."""
        try:
            while pieces := self._ledger.read(PIECE_BYTES):
                for record in pieces:
                    if isinstance(record, LogGap):
                        self._halves.clear()
                        continue
                    *lines, rest = (self._halves.get(record.stream, b"") + record.data).split(b"\n")
                    self._halves[record.stream] = rest[:LINE_LIMIT_BYTES]
                    for line in lines:
                        yield from self._found(line[:LINE_LIMIT_BYTES])
        except MeshgpuError:
            return  # a ledger that cannot be read tells nothing more

    def _found(self, line: bytes) -> Iterator[tuple[float, int | None]]:
        assert self._pattern is not None
        if match := self._pattern.search(line):
            number = _finite(match.group(1) if self._pattern.groups else match.group(0))
            if number is not None:
                yield number, None

    def _reports(self) -> Iterator[tuple[float, int | None]]:
        """Numbers that were reported since the last call."""
        while piece := _read(self._directory / "work" / FILE, self._position):
            self._position += len(piece)
            *lines, rest = (self._half + piece).split(b"\n")
            self._half = rest[:LINE_LIMIT_BYTES]
            for line in lines:
                yield from self._reported(line[:LINE_LIMIT_BYTES])

    def _reported(self, line: bytes) -> Iterator[tuple[float, int | None]]:
        try:
            report = json.loads(line)
        except (ValueError, RecursionError):
            return
        if isinstance(report, dict) and (value := _finite(report.get(self._objective.name))) is not None:
            step = report.get("step")
            yield value, step if type(step) is int and 0 <= step < 2**63 else None


def _read(path: Path, position: int) -> bytes:
    """Up to PIECE_BYTES of a regular file; nothing of what is none, which the job may have put there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.pread(descriptor, PIECE_BYTES, position) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    finally:
        os.close(descriptor)


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, bytes | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
