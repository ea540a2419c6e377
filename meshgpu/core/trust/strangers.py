"""Which addresses the pairing listener still hears: one that brings too much that proves nothing is muted for a while.

An address is only a hurdle: on a local network a stranger can take many. So nothing that is secret rests on this; an
invite's secret is beyond guessing, and a window counts all that it answers, whoever asked (`admitting`).
"""

from collections import deque
from typing import Final

from meshgpu.errors import MeshgpuError
from meshgpu.model.clock import Now

MUTED_S: Final = 600.0
"""As long as a window of `meshgpu admit` is open."""

FAILURES_LIMIT: Final = 4
"""Of one address within MUTED_S: enough for a person's slips, one less than close a window."""

ADDRESSES_LIMIT: Final = 1024
"""About 100 KiB. The address that failed longest ago is forgotten first."""


class Strangers:
    """What each address got wrong lately. host: an IP address without port."""

    def __init__(self) -> None:
        self._failures: dict[str, deque[float]] = {}  # {host: boot_s of each, oldest first}; who failed last is last

    def check(self, now: Now, host: str) -> None:
        """Raises MeshgpuError `busy` where `host` is muted."""
        failures = self._failures.get(host, ())
        if sum(1 for failed_s in failures if now.boot_s - failed_s < MUTED_S) >= FAILURES_LIMIT:
            raise MeshgpuError(
                "busy", f"cannot pair: too many tries that came to nothing were made from {host}", "wait ten minutes"
            )

    def failed(self, now: Now, host: str) -> None:
        """It showed no right to join, spoke nonsense, was silent, or began a comparison that ended without one."""
        failures = self._failures.pop(host, deque(maxlen=FAILURES_LIMIT))
        failures.append(now.boot_s)
        self._failures[host] = failures
        if len(self._failures) > ADDRESSES_LIMIT:
            del self._failures[next(iter(self._failures))]
