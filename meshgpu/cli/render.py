"""Tables, numbers and notes as people read them: no borders, colour only on a terminal."""

import os
import sys
from collections.abc import Sequence
from shutil import get_terminal_size
from typing import IO, Final

from meshgpu.errors import MeshgpuError

GAP: Final = "  "
BOLD: Final = "1"
RED: Final = "1;31"


def is_terminal(stream: IO[str]) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def colour(text: str, code: str, stream: IO[str]) -> str:
    """`text` in an SGR colour where `stream` is a terminal and NO_COLOR (no-color.org) is not set."""
    if os.environ.get("NO_COLOR") or not is_terminal(stream):
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def plain(text: str) -> str:
    """`text` on one line and without control characters: what others typed must not drive this terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def note(text: str) -> None:
    """Tell the person something that is no data."""
    print(text, file=sys.stderr, flush=True)


def show_error(error: MeshgpuError) -> None:
    """Tell of an error, in lines as its author broke them."""
    lines = [plain(line) for line in error.message.split("\n")]
    note("\n".join([f"{colour('error:', RED, sys.stderr)} {lines[0]}", *lines[1:]]))
    if error.hint:
        note("\n".join(plain(line) for line in f"hint: {error.hint}".split("\n")))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[str] = frozenset()) -> list[str]:
    """Lines of a table. Columns named in `right` are right-aligned; the last one is never padded."""
    cells = [list(header), *([plain(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        lines.append(GAP.join(padded).rstrip())
    return lines


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[str] = frozenset()) -> None:
    """Print it; on a terminal the header is bold and lines are cut at its width."""
    lines = table(header, rows, right)
    if is_terminal(sys.stdout):
        width = max(get_terminal_size().columns, 40)
        lines = [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
        lines[0] = colour(lines[0], BOLD, sys.stdout)
    print("\n".join(lines), flush=True)


def size(amount_bytes: float) -> str:
    """Decimal, two or three digits: `41 kB`, `1.2 MB`, `300 MB`."""
    if amount_bytes < 1000:
        return f"{amount_bytes:.0f} B"
    unit = ""
    for unit in ("kB", "MB", "GB", "TB"):  # noqa: B007 - the one it stops at is printed
        amount_bytes /= 1000
        if amount_bytes < 999.5:
            break
    return f"{amount_bytes:.1f} {unit}" if amount_bytes < 9.95 else f"{amount_bytes:.0f} {unit}"


def ago(seconds: float) -> str:
    """A span in words: `40 s`, `3 m`, `5 h 10 m`, `3 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes < 100:
        return f"{minutes} m"
    if hours < 48:
        return f"{hours} h {minutes % 60} m"
    return f"{days} d {hours % 24} h"


def clock(seconds: float) -> str:
    """A span as a clock shows it: `0:40`, `12:05`, `1:02:05`, `2-03:04:05`."""
    whole = max(0, int(seconds))
    days, hours, minutes, rest = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    if days:
        return f"{days}-{hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {plural or f'{noun}s'}"
