"""Who calls the control socket: a process that a job started is not a person."""

from collections.abc import Set
from pathlib import Path
from typing import Final

DEPTH_LIMIT: Final = 256
"""Ancestors looked at: a chain that is longer is no honest caller's."""


def descends_from(pid: int, ancestors: Set[int]) -> bool:
    """Whether `pid` or one of its ancestors is in `ancestors`; a process that cannot be looked at counts as one."""
    if not ancestors:
        return False
    for _ in range(DEPTH_LIMIT):
        if pid in ancestors:
            return True
        if pid <= 1:
            return False
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return True
        pid = int(status.rpartition(")")[2].split()[1])
    return True
