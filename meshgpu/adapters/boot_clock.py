"""Clock port over the kernel's boot-time clock, which counts through suspend."""

import time
from pathlib import Path

from meshgpu.model.clock import Now

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class BootClock:
    def __init__(self) -> None:
        self._boot_id = _BOOT_ID.read_text().strip()

    def now(self) -> Now:
        return Now(boot_s=time.clock_gettime(time.CLOCK_BOOTTIME), wall_s=time.time(), boot_id=self._boot_id)
