"""One agent per GPU: a GPU is lent only by the agent that holds the lock file of its UUID."""

import fcntl
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from meshgpu.model.ids import GpuId
from meshgpu.model.inventory import GpuReading, Inventory

LOCK_DIRECTORIES: Final = (Path("/run/lock"), Path("/tmp"))  # noqa: S108  # names are fixed, contents do not matter
TAKEN: Final = "lent by another agent on this computer"


class GpuLocks:
    """Holds the locks of this agent's GPUs until `close` or its end."""

    def __init__(self, directories: Iterable[Path] = LOCK_DIRECTORIES) -> None:
        self._directories = tuple(directories)
        self._held: dict[GpuId, int] = {}

    def claim(self, inventory: Inventory, readings: tuple[GpuReading, ...]) -> tuple[GpuReading, ...]:
        """Lock what can be locked; GPUs that another agent lends get a fault."""
        taken = {gpu.uuid for gpu in inventory.gpus if not self._lock(gpu.uuid)}
        known = {reading.uuid for reading in readings}
        unread = tuple(GpuReading(uuid) for uuid in sorted(taken - known))
        return tuple(
            replace(reading, fault=TAKEN) if reading.uuid in taken else reading for reading in (*readings, *unread)
        )

    def _lock(self, uuid: GpuId) -> bool:
        if uuid in self._held:
            return True
        directory = next((d for d in self._directories if os.access(d, os.W_OK)), None)
        if directory is None:
            return True  # nowhere to agree: better lent twice by name than never
        safe = "".join(c if c.isalnum() or c == "-" else "_" for c in uuid)
        try:
            descriptor = _open(directory / f"meshgpu-{safe}.lock")
        except OSError:
            return False  # another account's, and closed to this one
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._held[uuid] = descriptor
        return True

    def close(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()


def _open(path: Path) -> int:
    """The lock file, whoever made it: what counts is who holds it, not that it is there. Raises OSError.

    An account of this computer can keep a GPU from being lent, by holding or hiding its lock, as it can by using it.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # it may be a fifo
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT, 0o644)
